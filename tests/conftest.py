"""The repository's root on the path, and one thread: the networks here are so small that a second one only waits."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)
