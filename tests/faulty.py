"""Not a test: train.py with something going wrong in it, for test_faults.py.

    FAULTS='{"slow": 0.2}' torchrun --nproc-per-node 2 tests/faulty.py --recipe=dpo …        one training, as train.py
    torchrun --nproc-per-node 2 tests/faulty.py '[{"settings": {…}, "faults": {…}}, …]'       several in one group of processes

    slow     seconds that each file's sync takes
    fill     {"at": "save", "final" or "update", "step": N, "file": PATH, "leave": bytes}: fills PATH's filesystem
    die      {"step": N, "rank": R}: SIGKILL to itself before this step, in the first of torchrun's tries
    stop     {"at": "update" or "evaluate", "step": N, "rank": R, "signal": 15}: asked to stop in the first part of that step,
             by somebody without patience
    few      R: a rank that samples its prompts one at a time
    same     R: a rank whose samples of a prompt are all the same
    nan      {"at": "loss" or "gradient", "steps": […], "rank": R}
"""
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import train  # noqa: E402  first: it looks at the clock of its parent's life

from support import checkpoint  # noqa: E402
import cli  # noqa: E402
import torch  # noqa: E402


def fill(file, leave):
    """Take what room there is behind `file` but for `leave` bytes."""
    disk = os.statvfs(Path(file).parent)
    with open(file, "wb") as filler:
        filler.write(bytes(max(disk.f_bavail * disk.f_frsize - leave, 0)))


class Poison(torch.autograd.Function):
    """The value as it is, and a gradient that is not a number."""
    @staticmethod
    def forward(context, value):
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * float("nan")


def plant(faults, patch=setattr):
    """Put the faults in; `patch` is setattr or monkeypatch's."""
    sync, save, write_folder = checkpoint.sync, checkpoint.OutDir.save, checkpoint.OutDir.write_folder
    update, objective, generate = train.Trainer.update, train.Trainer.objective, train.sample.generate
    at_a_time = train.Trainer.prompts_at_a_time
    full, die, stop, nan = (faults.get(name, {}) for name in ("fill", "die", "stop", "nan"))
    seen = {"parts": 0}

    def slow_sync(path):
        time.sleep(faults["slow"])
        sync(path)

    def full_save(out, tensors, state):
        if full["at"] == "save" and state["step"] == full["step"]:
            out.ranks.on_first(lambda: fill(full["file"], full["leave"]))
        save(out, tensors, state)

    def full_folder(out, *rest):
        if full["at"] == "final":
            out.ranks.on_first(lambda: fill(full["file"], full["leave"]))
        write_folder(out, *rest)

    def faulty_update(trainer, step):
        if full.get("at") == "update" and step + 1 == full["step"]:
            trainer.ranks.on_first(lambda: fill(full["file"], full["leave"]))
        if die and step + 1 == die["step"] and trainer.ranks.rank == die["rank"] and \
                os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return update(trainer, step)

    def faulty_objective(trainer, examples, log):
        value = objective(trainer, examples, log)
        step, training = trainer.state["step"], torch.is_grad_enabled()
        if stop and trainer.ranks.rank == stop["rank"] and training == (stop["at"] == "update") and \
                step + training == stop["step"]:
            seen["parts"] += 1
            if seen["parts"] == 1:
                os.kill(os.getpid(), stop["signal"])
        if nan and training and step + 1 in nan["steps"] and trainer.ranks.rank == nan["rank"]:
            if nan["at"] == "gradient":
                return Poison.apply(value)
            log.add("loss", torch.tensor([float("nan")]), weight=0)
        return value

    def same_samples(*arguments):
        groups = generate(*arguments)
        return [[group[0]] * len(group) for group in groups] if int(os.environ.get("RANK", 0)) == faults["same"] else groups

    if "slow" in faults:
        patch(checkpoint, "sync", slow_sync)
    if full:
        patch(checkpoint.OutDir, "save", full_save)
        patch(checkpoint.OutDir, "write_folder", full_folder)
    if full or die:
        patch(train.Trainer, "update", faulty_update)
    if stop:
        patch(train, "PATIENCE", 0)
    if stop or nan:
        patch(train.Trainer, "objective", faulty_objective)
    if "few" in faults:
        patch(train.Trainer, "prompts_at_a_time",
              lambda trainer, share: 1 if trainer.ranks.rank == faults["few"] else at_a_time(trainer, share))
    if "same" in faults:
        patch(train.sample, "generate", same_samples)


def several(runs):
    """Runs one after the other; what one has planted is taken out before the next."""
    for one in runs:
        undo = []

        def patch(place, name, value):
            undo.append((place, name, getattr(place, name)))
            setattr(place, name, value)
        plant(one["faults"], patch)
        try:
            train.Trainer(train.Settings(**one["settings"])).run()
        except SystemExit as leaving:
            assert leaving.code in (128 + signal.SIGTERM, 128 + signal.SIGINT), leaving.code
        for place, name, value in undo:
            setattr(place, name, value)


if __name__ == "__main__":
    if sys.argv[1].startswith("["):
        several(json.loads(sys.argv[1]))
    else:
        plant(json.loads(os.environ.get("FAULTS", "{}")))
        cli.run(train.main, train.Settings)
    if train.dist.is_initialized():
        train.dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)                # as train.py
