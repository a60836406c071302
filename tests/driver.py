"""Not a test: trainings in processes of their own, with something going wrong in them.

    launch(runs, ranks=2, file=RUNS.json)                              several, in one group of processes
    FAULTS='{"slow": 0.2}' torchrun … tests/driver.py --recipe=dpo …   one, as train.py

`runs` is a list of {"settings": {…}} with, where needed, "from": an out_dir to copy first, "exact": true for
metrics with all their digits, and "faults". Steps count from 1:

    slow       seconds that each file's sync takes
    fill       {"at": "save", "final" or "update", "step": N, "file": PATH, "leave": bytes}: fills PATH's disk
    die        {"step": N, "rank": R}: SIGKILL to itself before this step, in the first of torchrun's tries
    interrupt  N: what stands for a crash, before this step
    signal     {"at": "update" or "evaluate", "step": N, "rank": R, "number": 15}: told to stop there
    at_a_time  [n, …]: how many prompts each rank samples together
    nan        {"at": "loss" or "gradient", "steps": […], "rank": R}

A run that bad input or a signal ends is no end of the others. Beside each out_dir every rank leaves a report,
OUT_DIR.rankR.json: what it read, kept and sampled, and the sentence of its error.
"""
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import ranks  # noqa: E402, I001  first: it looks at who started this process

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import losses  # noqa: E402
import recipes  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from support import checkpoint, disk, hf, loop  # noqa: E402
from support.cli import InputError, setting  # noqa: E402


class Interrupted(Exception):
    """A crash between two steps."""


class Poison(torch.autograd.Function):
    """The value, or its gradient, is not a number; the other one is as it was."""

    @staticmethod
    def forward(context, value, at):
        context.at = at
        return value * float("nan") if at == "loss" else value.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * float("nan") if context.at == "gradient" else gradient, None


def fill(file, leave):
    """Take the room that is left on the disk of `file`, but for `leave` bytes."""
    disk_of = os.statvfs(Path(file).parent)
    with open(file, "wb") as filler:
        filler.write(bytes(max(disk_of.f_bavail * disk_of.f_frsize - leave, 0)))


def plant(faults, replace=setattr):
    """Put the faults in; `replace` is setattr or what undoes itself, like monkeypatch.setattr."""
    rank = int(os.environ.get("RANK", 0))
    first_try = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    full, die, told, nan = (faults.get(name, {}) for name in ("fill", "die", "signal", "nan"))
    now = {"step": 0}                                    # of the update under way

    def before(place, name, act):
        original = getattr(place, name)

        def both(*given, **named):
            act(*given)
            return original(*given, **named)
        replace(place, name, both)

    def fill_at(at, step):
        if full.get("at") == at and full["step"] == step and rank == 0:
            fill(full["file"], full["leave"])

    def tell(at, step):
        if told.get("at") == at and told["step"] == step and told["rank"] == rank:
            os.kill(os.getpid(), told["number"])

    def begin_update(trainer, step):
        now["step"] = step + 1
        fill_at("update", step + 1)
        tell("update", step + 1)
        if die.get("step") == step + 1 and die["rank"] == rank and first_try:
            os.kill(os.getpid(), signal.SIGKILL)
        if faults.get("interrupt") == step + 1:
            raise Interrupted

    def end_update(loop, step):
        now["step"] = 0
        tell("evaluate", step)
    before(train.Trainer, "update", begin_update)
    before(train.Loop, "evaluate", end_update)
    if "slow" in faults:
        before(disk, "sync", lambda path: time.sleep(faults["slow"]))
    if full:
        before(checkpoint.OutDir, "save", lambda out, tensors, state: fill_at("save", state["step"]))
        before(checkpoint.OutDir, "write_folder", lambda out, *rest: fill_at("final", full["step"]))
    if nan and nan["rank"] == rank:
        dpo = losses.dpo

        @functools.wraps(dpo)                            # recipes.py reads its arguments' names
        def poisoned(*given, **named):
            values = dpo(*given, **named)
            return Poison.apply(values, nan["at"]) if now["step"] in nan["steps"] else values
        replace(losses, "dpo", poisoned)
    if "at_a_time" in faults:
        replace(train, "prompts_at_a_time", lambda *given: faults["at_a_time"][rank])


# ------------------------------------------------------------------------------------------------------------
# Several runs

def trainer_of(given):
    if given["recipe"] in recipes.RECIPES:
        return train.Trainer(recipes.Settings(**given))
    from experiments import rlhf
    return rlhf.TRAINERS[given["recipe"]](rlhf.Settings(**given))


def run(entry):
    """One training; returns this rank's report."""
    report = {"read": {}, "kept": {}, "lengths": [], "error": None}
    read_tensors, generate, given = hf.read_tensors, sample.generate, entry["settings"]

    def read(tensors, rows=None):
        if rows is None:                                     # whole ones, to compare what is saved with
            return read_tensors(tensors)

        def asked(name):
            _, _, shape = tensors[name]
            report["read"].setdefault(name, []).append(rows(name).indices(shape[0])[:2])
            return rows(name)
        return read_tensors(tensors, asked)

    def noted(*arguments):
        samples = generate(*arguments)
        report["lengths"].append([len(one.ids) for group in samples for one in group])
        return samples
    with contextlib.ExitStack() as stack:
        def replace(place, name, new):
            stack.enter_context(mock.patch.object(place, name, new))
        replace(hf, "read_tensors", read)
        replace(sample, "generate", noted)
        if entry.get("exact"):
            replace(loop, "rounded", lambda record: record)
        plant(entry.get("faults", {}), replace)
        stack.enter_context(contextlib.suppress(Interrupted))
        try:
            trainer = trainer_of(given)
            report["kept"] = {name: list(getattr(weight, "_local_tensor", weight).shape)
                              for name, weight in trainer.policy.named_parameters()}
            trainer.run()
        except InputError as error:
            report["error"] = str(error)
        except SystemExit as leaving:
            assert leaving.code > 128, leaving.code
    return report


def run_entry(entry, rank):
    """A training with what stands around it."""
    out = entry["settings"]["out_dir"]
    if rank == 0 and "from" in entry:
        shutil.copytree(entry["from"], out)
    if dist.is_initialized():
        dist.barrier()
    Path(f"{out}.rank{rank}.json").write_text(json.dumps(run(entry)))


def launch(entries, ranks, file):
    """Run them: one rank in this process, more by torchrun, which reads `file`; returns what they said."""
    if ranks == 1:
        for entry in entries:
            run_entry(entry, 0)
        return ""
    file.write_text(json.dumps(entries))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
               __file__, f"--runs={file}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "OSPREY_TRACEBACK": "1"})
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@dataclasses.dataclass
class Plan:
    """Several trainings."""
    runs: str = setting("", "the JSON file that names them")


def run_all(plan):
    rank = ranks.Ranks.start("cpu").rank
    for entry in json.loads(Path(plan.runs).read_text()):
        run_entry(entry, rank)


if __name__ == "__main__":
    if sys.argv[1].startswith("--runs="):
        ranks.launch(run_all, Plan)
    plant(json.loads(os.environ.get("FAULTS", "{}")))
    ranks.launch(train.main, recipes.Settings)
