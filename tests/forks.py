"""Not a test: command lines in forks of this process, which has loaded torch: a second each instead of five.

    training(given, 2, said, plant)      a training on two ranks -> what came of it
    when(disk, "sync", 3, act)           in plant: call act() before the third call of disk.sync

What comes of a process:

    ok, handled    it worked and left what it should; or one sentence, and a status that is not 0
    unforeseen     one sentence too, but the one of last resort, whose traceback is in a file
    traceback, hang, zero (status 0, and no finished run), lost (what the run had, or other bits)
"""
import contextlib
import os
import resource
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import judge
import model
import recipes
import sample
import tiny
import train
from support import cli, disk, reference_cache

CPU_SECONDS, SECONDS, MEMORY = 60, 900, 3 << 29             # what one process may take
PROGRAMS = {"train": (train.start, recipes.Settings),
            "sample": (lambda: cli.run(sample.main, sample.Settings), sample.Settings),
            "judge": (lambda: cli.run(judge.main, judge.Settings), judge.Settings)}


def fork(program, arguments, said, environment, prepare):
    """The process id of a command line of which all that it says is added to the file `said`."""
    pid, status = os.fork(), 1
    if pid:
        return pid
    try:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 1)
        os.dup2(1, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS,) * 2)
        sys.argv = [f"{program}.py", *map(os.fsdecode, arguments)]
        os.environ.update(environment)
        prepare()
        PROGRAMS[program][0]()
        status = 0
    except SystemExit as leaving:
        status = leaving.code or 0
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(status)


def wait(pids):
    """Their exit statuses; None for one that had to be killed."""
    status, end = dict.fromkeys(pids), time.monotonic() + SECONDS
    while None in status.values() and time.monotonic() < end:
        for pid in [pid for pid in pids if status[pid] is None]:
            done, code = os.waitpid(pid, os.WNOHANG)
            status[pid] = os.waitstatus_to_exitcode(code) if done else None
        time.sleep(0.005)
    for pid in [pid for pid in pids if status[pid] is None]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return list(status.values())


def verdict(codes, said):
    text = said.read_text(errors="replace") if said.exists() else ""
    if None in codes or -signal.SIGXCPU in codes or "Traceback (most recent call last)" in text:
        return "traceback" if codes and "Traceback (most" in text else "hang"
    return "ok" if not any(codes) else "unforeseen" if "was not foreseen" in text else "handled"


def training(given, size, said, plant=lambda pids: None):
    """The verdict of a training on so many ranks; plant([pid, …]) runs in the first before it starts."""
    said.unlink(missing_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    notes = [said.with_suffix(f".pid{rank}") for rank in range(size)]

    def ready(rank):
        reference_cache.SAVE_SECONDS = 0
        notes[rank].write_text(f"{os.getpid()}\n")
        tiny.until(lambda: all(note.exists() and note.read_text().endswith("\n") for note in notes), SECONDS)
        if rank == 0:
            plant([int(note.read_text()) for note in notes])
    group = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": port} if size > 1 else {}
    codes = wait([fork("train", tiny.typed(given), said, group and group | {"RANK": str(rank)},
                       lambda rank=rank: ready(rank)) for rank in range(size)])
    for note in notes:
        note.unlink()
    came = verdict(codes, said)
    return "zero" if came == "ok" and not finished(Path(given["out_dir"]), given["steps"]) else came


def finished(out, steps):
    """Whether all steps have their line (None: no matter), and final/ is finite."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return (steps in (None, len(disk.read_metrics(out / "metrics.jsonl")))
                and all(weight.isfinite().all() for weight in model.load(out / "final").parameters()))


def when(owner, name, nth, act):
    """Call act() before the function owner.name is called for the nth time."""
    work, calls = getattr(owner, name), []

    def both(*given, **named):
        calls.append(name)
        if len(calls) == nth:
            act()
        return work(*given, **named)
    setattr(owner, name, both)


def ended(came, given, size, said, other):
    """The verdict on a run that something happened to, once the same command has gone on with it: it must
    leave what the run `other` has, bit for bit."""
    if came not in ("ok", "handled", "unforeseen"):
        return came
    after, out = training(given, size, said.with_suffix(".again")), Path(given["out_dir"])
    files = ["final/model.safetensors", *(path.name for path in other.glob("rollouts*"))]
    if after == "ok" and tiny.metrics(out) == tiny.metrics(other) and all(
            (out / name).read_bytes() == (other / name).read_bytes() for name in files):
        return came
    return "lost: other bits" if after == "ok" else f"lost: the same command ends with {after}"


def settings(place, out, **changes):
    """Of a run that has evaluations, checkpoints and a reference cache of its own."""
    given = tiny.settings(place / "world", out, **dict(
        recipe="sr-dpo", steps=4, save_every=1, eval_every=2, micro_batch_size=1,
        eval_data=[f"{place}/world/pairs.jsonl"], reference_cache=f"{out}.cache") | changes)
    if not recipes.RECIPES[given["recipe"]].online:
        del given["max_tokens"], given["k"]
    if recipes.RECIPES[given["recipe"]].pairs != "dataset":
        del given["reference_cache"]
    return given


def in_one_piece(place, size):
    """The out_dir of such a run to which nothing happened."""
    out = place / f"whole-{size}"
    came = finished(out, 4) or training(settings(place, out), size, place / f"whole-{size}.said")
    assert came in (True, "ok"), (place / f"whole-{size}.said").read_text()[-2000:]
    return out
