"""The repository's root and tests/ on the path, and one thread: the networks here are so small that a second one only waits."""
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent), str(Path(__file__).parent / "core")]
torch.set_num_threads(1)
