"""Not a test: runs several trainings one after the other in one group of processes.

    torchrun --nproc-per-node 2 tests/ranks.py RUNS.json

RUNS.json is a list of {"settings": …} with, where a run needs it, "from": an out_dir to copy first, "stop": the step before
which it is interrupted, "at_a_time": how many prompts each rank samples together. A run that bad input ends is no end of the
others. Beside each out_dir every rank leaves a report: what it read, kept and sampled, and the sentence of its error.
"""
import contextlib
import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
import model  # noqa: E402
from experiments import rlhf  # noqa: E402
import train  # noqa: E402


class Interrupted(Exception):
    """What stands here for a crash between two steps."""


class Reader:
    """An open safetensors file that notes which rows of which tensor are asked for."""

    def __init__(self, file, rows):
        self.file, self.rows = file, rows

    def __enter__(self):
        self.open = self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.open, name)

    def get_tensor(self, name):
        self.rows.setdefault(name, []).append("all")
        return self.open.get_tensor(name)

    def get_slice(self, name):
        return Slice(self.open.get_slice(name), self.rows.setdefault(name, []))


class Slice:
    def __init__(self, piece, rows):
        self.piece, self.rows = piece, rows

    def __getattr__(self, name):
        return getattr(self.piece, name)

    def __getitem__(self, wanted):
        first = wanted[0] if isinstance(wanted, tuple) else wanted
        self.rows.append(first.indices(self.piece.get_shape()[0])[:2] if isinstance(first, slice) else "all")
        return self.piece[wanted]


def run(entry):
    """One training, its metrics with all digits; returns this rank's report."""
    report = {"read": {}, "kept": {}, "lengths": [], "error": None}
    safe_open, generate, update = model.safe_open, train.sample.generate, train.Trainer.update

    def noted(*given):
        samples = generate(*given)
        report["lengths"].append([len(one.ids) for group in samples for one in group])
        return samples

    def interrupted(trainer, step):
        if step == entry.get("stop"):
            raise Interrupted
        return update(trainer, step)
    with contextlib.ExitStack() as stack:
        def instead(place, name, new):
            stack.enter_context(mock.patch.object(place, name, new))
        instead(model, "safe_open", lambda *given, **more: Reader(safe_open(*given, **more), report["read"]))
        instead(train, "rounded", lambda value: value)
        instead(train.sample, "generate", noted)
        instead(train.Trainer, "update", interrupted)
        if "at_a_time" in entry:
            instead(train.Trainer, "prompts_at_a_time", lambda trainer, share: entry["at_a_time"][trainer.ranks.rank])
        try:
            given = entry["settings"]
            if given["recipe"] in rlhf.RECIPES:
                trainer = rlhf.TRAINERS[given["recipe"]](rlhf.Settings(**given))
            else:
                trainer = train.Trainer(train.Settings(**given))
            local = [(name, getattr(weight, "_local_tensor", weight)) for name, weight in trainer.policy.named_parameters()]
            report["kept"] = {name: list(weight.shape) for name, weight in local}
            trainer.run()
        except Interrupted:
            pass
        except train.InputError as error:
            report["error"] = str(error)
    return report


def run_entry(entry, rank):
    """A training with what stands around it."""
    out = entry["settings"]["out_dir"]
    if rank == 0 and "from" in entry:
        shutil.copytree(entry["from"], out)
    if dist.is_initialized():
        dist.barrier()
    Path(f"{out}.rank{rank}.json").write_text(json.dumps(run(entry)))


if __name__ == "__main__":
    rank = train.Ranks.start("cpu").rank
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        run_entry(entry, rank)
    train.leave(0)
