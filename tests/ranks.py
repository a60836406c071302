"""Not a test: runs several trainings one after the other in one group of processes.

    torchrun --nproc-per-node 2 tests/ranks.py '[{"recipe": "dpo", …}, …]'
"""
import json
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
import rlhf  # noqa: E402
import train  # noqa: E402

if __name__ == "__main__":
    for settings in json.loads(sys.argv[1]):
        if settings["recipe"] in rlhf.RECIPES:
            rlhf.TRAINERS[settings["recipe"]](rlhf.Settings(**settings)).run()
        else:
            train.Trainer(train.Settings(**settings)).run()
    dist.destroy_process_group()
