"""The repository and tests/ on the path; one thread: for such small networks a second one only waits."""
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "core")]
torch.set_num_threads(1)
