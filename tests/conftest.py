"""The repository's root on the path, and few threads: the networks of the tests are small."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(2)
