"""Nothing older than the last save is ever lost: killed, full, damaged, doubled and stopped runs go on to the same bits."""
import contextlib
import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support import checkpoint
import faulty
import tiny
import train
from support.cli import InputError

FAULTY = "tests/faulty.py"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model folder and a file of 13 pairs."""
    path = tmp_path_factory.mktemp("world")
    tiny.folder(path / "model")
    tiny.write_jsonl(path / "pairs.jsonl", tiny.pairs(13, seed=1))
    return path


def settings(world, out, **changes):
    """Settings of a short online float64 run, whose rollouts, weights and optimizer all have to come back; plain values."""
    given = {"recipe": "osp", "model": str(world / "model"), "data": [str(world / "pairs.jsonl")], "out_dir": str(out),
             "steps": 12, "batch_size": 4, "micro_batch_size": 1, "lr": 1e-3, "warmup_steps": 0, "max_length": 96, "max_tokens": 6, "k": 4,
             "dtype": "float64", **changes}
    unused = () if given["recipe"] == "osp" else ("max_tokens", "k")
    return {name: value for name, value in given.items() if name not in unused}


def typed(given):
    return [f"--{name}={','.join(value) if isinstance(value, list) else value}" for name, value in given.items()]


def run(world, out, **changes):
    train.Trainer(train.Settings(**settings(world, out, **changes))).run()
    return metrics(out)


def in_ranks(runs):
    """[(settings, faults)] one after the other in one group of two processes."""
    told = json.dumps([{"settings": given, "faults": faults} for given, faults in runs])
    running = tiny.launch([told], ranks=2, script=FAULTY)
    said, _ = running.communicate(timeout=300)
    assert running.returncode == 0, said[-3000:]
    return said


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def figures(out):
    """The metrics without times, which differ from run to run."""
    return [{k: v for k, v in row.items() if "second" not in k} for row in metrics(out)]


def same(out, whole):
    """Whether two runs left the same bits: metrics, rollouts, final weights."""
    files = ["final/model.safetensors", *sorted(path.name for path in Path(whole).glob("rollouts*.jsonl"))]
    assert figures(out) == figures(whole)
    for name in files:
        assert (Path(out) / name).read_bytes() == (Path(whole) / name).read_bytes(), name
    return True


def tensors_of(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def complete(out):
    """The steps of the checkpoints that have a state.json; each of them must be whole."""
    steps = []
    for folder in (Path(out) / "checkpoint").glob("step-*"):
        if (folder / "state.json").exists():
            state = checkpoint.read_state(folder)
            assert state["step"] == checkpoint.number(folder) and len(state["files"]) == state["ranks"]
            assert {name: (folder / name).stat().st_size for name in state["files"]} == state["files"]
            found = tensors_of(folder)
            assert found and all(tensor.isfinite().all() for tensor in found.values())
            steps.append(state["step"])
    return sorted(steps)


def half_saved(out):
    """The folders that a save under way, or one that was killed, has written aside."""
    return list((Path(out) / "checkpoint").glob(".writing-step-*"))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def workers_of(torchrun):
    """{rank: pid} of the processes that a torchrun has started."""
    found = {}
    for tasks in Path(f"/proc/{torchrun.pid}/task").glob("*/children"):
        for pid in tasks.read_text().split():
            with contextlib.suppress(OSError):
                for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    if item.startswith(b"RANK="):
                        found[int(item[5:])] = int(pid)
    return found


def one_sentence(said, *words):
    """The only line of an error; torchrun puts a page of its own behind it, but none of our frames."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(set(errors)) == 1 and "train.py\", line" not in said, said[-3000:]
    assert all(word in errors[0] for word in words), errors[0]
    return errors[0]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The uninterrupted run: of one process and of two ranks."""
    path = tmp_path_factory.mktemp("whole")
    run(world, path / "1")
    in_ranks([(settings(world, path / "2"), {})])
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Killed

def kill(running, whom):
    """SIGKILL for the torchrun, for it and all its workers, or for one rank. Returns when none of them is left."""
    workers = workers_of(running)
    if whom == "torchrun":
        os.kill(running.pid, signal.SIGKILL)
    elif whom == "all":
        for pid in (running.pid, *workers.values()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)               # each worker leads a group of its own
    elif whom in workers:
        os.kill(workers[whom], signal.SIGKILL)
    else:
        os.kill(running.pid, signal.SIGKILL)                 # so early that there is no such rank
    said, _ = running.communicate(timeout=120)               # whoever writes to the pipe is gone then
    tiny.until(lambda: not any(alive(pid) for pid in workers.values()))
    assert running.returncode != 0
    return said


def written_since(file, moment):
    return file.exists() and file.stat().st_mtime > moment


def kill_and_go_on(given, out, plan, rng):
    """Kill a job at the moments of the plan, going on with the same command each time; to the end at last.

    plan: [(whom, whether during a save)]. Returns how many kills left a checkpoint half written.
    """
    newest, during = 0, 0
    for whom, saving in plan:
        started = time.time()
        running = tiny.launch(typed(given), ranks=2, script=FAULTY, FAULTS='{"slow": 0.2}')
        if saving:
            ahead = newest + rng.randint(1, 2)
            # What the last kill has left lies there until the new job clears it, just before it writes its config.json.
            tiny.until(lambda: running.poll() is not None or written_since(out / "config.json", started) and any(
                checkpoint.number(Path(folder.name.removeprefix(".writing-"))) >= ahead for folder in half_saved(out)), 240)
            time.sleep(rng.uniform(0, 0.5))
        else:
            time.sleep(rng.uniform(1, 12))
        assert running.poll() is None, running.communicate()[0][-3000:]
        said = kill(running, whom)
        left = half_saved(out)
        if saving and not left:
            print(f"{whom} killed behind step {newest}, and the save was over:\n{said[:2000]}")
        during += bool(left) and written_since(out / "config.json", started)
        steps = complete(out)
        assert max(steps, default=0) >= newest, (steps, newest)
        newest = max(steps, default=0)
        assert newest < given["steps"], "the job was done before it was killed"
        if newest:
            rows = [row["step"] for _, row in checkpoint.records(Path(out) / "metrics.jsonl")]
            assert rows[:newest] == list(range(1, newest + 1))
    running = tiny.launch(typed(given), ranks=2, script=FAULTY)
    said, _ = running.communicate(timeout=300)
    assert running.returncode == 0 and f"going on from {Path(out) / 'checkpoint' / f'step-{newest}'}\n" in said, said[-3000:]
    assert not half_saved(out) and complete(out) == [given["steps"]]
    return during


def test_killed_while_saving(world, whole, tmp_path):
    """SIGKILL for torchrun, for the whole job and for the first rank, each at a random moment of a save: every checkpoint
    that has a state.json is whole, none is lost, no orphan goes on, and the job ends with the bits of one left alone."""
    given = settings(world, tmp_path, save_every=1)
    assert kill_and_go_on(given, tmp_path, [("torchrun", True), ("all", True), (0, True)], random.Random(1)) >= 2
    assert same(tmp_path, whole / "2")


@pytest.mark.slow
def test_killed_at_thirty_moments(world, tmp_path):
    """The same with 30 kills, 24 of them while saving, the others at any moment, the start included."""
    rng = random.Random(2)
    plan = [(whom, True) for whom in ("torchrun", "all", 0) for _ in range(8)]
    plan += [(whom, False) for whom in ("torchrun", "all", 0, 1, 1, 1)]
    rng.shuffle(plan)
    given = settings(world, tmp_path / "out", save_every=1, steps=80)
    during = kill_and_go_on(given, tmp_path / "out", plan, rng)
    print(f"{len(plan)} kills, {during} of them during a save")
    assert len(plan) == 30 and during >= 20
    in_ranks([(given | {"out_dir": str(tmp_path / "whole")}, {})])
    assert same(tmp_path / "out", tmp_path / "whole")


class Killed(BaseException):
    """What no handler of an error catches."""


@contextlib.contextmanager
def killed_at(monkeypatch, operation):
    """Everything that touches the disk fails from the operation of that number on, as if the process were gone. Yields a
    list of what was done."""
    done = []

    def counted(name, work):
        def operate(*arguments, **options):
            done.append((name, str(arguments[0])))
            if len(done) > operation:
                raise Killed
            return work(*arguments, **options)
        return operate
    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "rmdir", "mkdir", "fsync"):
            patch.setattr(os, name, counted(name, getattr(os, name)))
        patch.setattr(Path, "write_text", counted("write_text", Path.write_text))
        patch.setattr(checkpoint.OutDir, "append", counted("append", checkpoint.OutDir.append))
        patch.setattr(train.model, "save_weights", counted("save_weights", train.model.save_weights))
        yield done


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_killed_at_each_operation_on_the_disk(resume, every, world, tmp_path, monkeypatch):
    """A run whose disk stands still from the n-th rename, removal, sync, … on: what has a state.json is whole, the newest
    checkpoint is at most one save behind, and the run goes on to the same bits. --resume=never is over a finished run with
    the same settings."""
    changes = dict(recipe="dpo", steps=3, save_every=1, keep=1)
    run(world, tmp_path / "whole", **changes)
    operations = math.inf
    for n in range(0, 1000, every):
        if n > operations:
            break
        out = tmp_path / str(n)
        if resume == "never":
            shutil.copytree(tmp_path / "whole", out)
        with killed_at(monkeypatch, n) as done, contextlib.suppress(Killed, checkpoint.dcp.api.CheckpointException):
            run(world, out, **changes, resume=resume)
            operations = len(done)
        steps = complete(out)
        rows = [row["step"] for _, row in checkpoint.records(out / "metrics.jsonl")]
        assert rows == list(range(1, len(rows) + 1)) and len(steps) <= 2
        if resume == "auto":
            assert max(steps, default=0) >= len(rows) - 1, (n, done[-3:])
        run(world, out, **changes)
        assert same(out, tmp_path / "whole") and complete(out) == [3], n
        shutil.rmtree(out)
    assert 0 < operations < math.inf


# ---------------------------------------------------------------------------------------------------------------------
# A full and a read-only filesystem

class Disk:
    """A small tmpfs in a mount namespace of its own, which a waiting shell keeps; no trace of it outside."""

    def __init__(self, place, size):
        script = f"mount -t tmpfs -o size={size} none '{place}' && echo ready && while read -r line; do $line && echo ready; done"
        self.shell = subprocess.Popen(["unshare", "-rm", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE, text=True)
        if self.shell.stdout.readline() != "ready\n":
            pytest.skip(f"a small filesystem needs root or unshare -rm: {self.shell.communicate()[1].strip()}")
        self.place, self.path = place, Path(f"/proc/{self.shell.pid}/root/{str(place).lstrip('/')}")

    def remount(self, options):
        self.shell.stdin.write(f"mount -o remount,{options} {self.place}\n")
        self.shell.stdin.flush()
        assert self.shell.stdout.readline() == "ready\n"


@pytest.fixture
def disk(tmp_path):
    if shutil.which("unshare") is None:
        pytest.skip("a small filesystem needs unshare, of util-linux")
    (tmp_path / "disk").mkdir()
    small = Disk(tmp_path / "disk", "6m")
    yield small
    small.shell.stdin.close()
    small.shell.wait(timeout=30)


def process(given, ranks, faults, capsys, monkeypatch):
    """(exit status, all that was said) of a training: of one process in this one, of two ranks through torchrun."""
    if ranks > 1:
        running = tiny.launch(typed(given), ranks=ranks, script=FAULTY, FAULTS=json.dumps(faults))
        said, _ = running.communicate(timeout=120)
        return running.returncode, said
    with monkeypatch.context() as patch:
        faulty.plant(faults, patch.setattr)
        code, said, error = tiny.command(train, capsys, monkeypatch, *typed(given))
    assert error.count("\n") == bool(code)
    return code, said + error


@pytest.mark.parametrize("ranks, recipe", [(1, "osp"), (1, "dpo"), pytest.param(2, "osp", marks=pytest.mark.slow)])
def test_a_full_disk(ranks, recipe, world, whole, disk, capsys, monkeypatch):
    """Full while saving, while adding lines, while writing final/: status 1 and one sentence with what, why and the
    checkpoint that is kept. When there is room again the same command goes on, and ends with the same bits."""
    out, filler = disk.path / "out", disk.path / "filler"
    changes = dict(recipe=recipe, steps=12, save_every=2) if recipe == "osp" else dict(recipe=recipe, steps=40, save_every=20)
    given = settings(world, out, **changes)
    if recipe == "osp":
        stages = [("save", 2, 150_000, "checkpoint/step-2 cannot", "no checkpoint yet"),
                  ("save", 6, 300_000, "checkpoint/step-6 cannot", "step-4 is kept"),
                  ("update", 9, 0, ".jsonl cannot", "step-8 is kept")]
    else:
        stages = [("save", 20, 0, "checkpoint/step-20 cannot", "no checkpoint yet"),
                  ("update", 22, 0, "metrics.jsonl cannot", "step-20 is kept")]
    for at, step, leave, what, kept in [*stages, ("final", 0, 100_000, "final cannot", f"step-{given['steps']} is kept")]:
        fill = {"at": at, "step": step, "file": str(filler), "leave": leave}
        code, said = process(given, ranks, {"fill": fill}, capsys, monkeypatch)
        assert code == 1, said[-3000:]
        one_sentence(said, str(out), what, "be written: No space left on device", kept)
        assert complete(out) == ([int(kept.split()[0][5:])] if "step" in kept else []) and not half_saved(out)
        filler.unlink()
    code, said = process(given, ranks, {}, capsys, monkeypatch)
    assert code == 0
    if recipe == "osp":
        assert same(out, whole / str(ranks))
    else:
        run(world, disk.path / "whole", **changes)
        assert same(out, disk.path / "whole")


def test_no_room_for_the_rows_of_one_rank(world, tmp_path):
    """The second rank's file of rollouts alone cannot be written: both stop, with that rank's sentence."""
    given = settings(world, tmp_path, save_every=2)
    running = tiny.launch(typed(given), ranks=2, script=FAULTY, FAULTS='{"slow": 0.2}')
    tiny.until(lambda: (tmp_path / "checkpoint/step-2/state.json").exists() or running.poll() is not None, 120)
    (tmp_path / "rollouts.1.jsonl").unlink()
    (tmp_path / "rollouts.1.jsonl").symlink_to("/dev/full")
    said, _ = running.communicate(timeout=120)
    one_sentence(said, "rollouts.1.jsonl cannot be written: No space left on device", "is kept")
    (tmp_path / "rollouts.1.jsonl").unlink()


def test_a_read_only_out_dir(world, disk, capsys, monkeypatch):
    """A new run, and one that goes on: status 1, one sentence, nothing changed."""
    given = settings(world, disk.path / "out", recipe="dpo", steps=2)
    disk.remount("ro")
    code, said = process(given, 1, {}, capsys, monkeypatch)
    assert code == 1
    one_sentence(said, f"--out_dir={disk.path / 'out'} cannot be written: Read-only file system")
    disk.remount("rw")
    run(world, disk.path / "out", recipe="dpo", steps=2)
    shutil.rmtree(disk.path / "out/final")
    before = {path: path.read_bytes() for path in (disk.path / "out").rglob("*") if path.is_file()}
    disk.remount("ro")
    code, said = process(given, 1, {}, capsys, monkeypatch)
    assert code == 1
    one_sentence(said, f"--out_dir={disk.path / 'out'} cannot be written: Read-only file system")
    disk.remount("rw")
    assert before == {path: path.read_bytes() for path in (disk.path / "out").rglob("*") if path.is_file()}
    assert process(given, 1, {}, capsys, monkeypatch)[0] == 0


def test_an_out_dir_without_permission(world, tmp_path, capsys, monkeypatch):
    """Somebody else's folder: the same sentence. Root may write everywhere, so for root open() is made to refuse."""
    (tmp_path / "out").mkdir()
    os.chmod(tmp_path / "out", 0o555)
    if os.access(tmp_path / "out", os.W_OK):
        def refuse(path, *rest, **options):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        monkeypatch.setattr(checkpoint, "open", refuse, raising=False)
    code, said = process(settings(world, tmp_path / "out", recipe="dpo"), 1, {}, capsys, monkeypatch)
    assert code == 1
    one_sentence(said, f"--out_dir={tmp_path / 'out'} cannot be written: Permission denied")
    os.chmod(tmp_path / "out", 0o755)


# ---------------------------------------------------------------------------------------------------------------------
# torchrun

@pytest.mark.parametrize("resume, rank", [("auto", 1), pytest.param("never", 0, marks=pytest.mark.slow)])
def test_torchrun_restarts_a_killed_rank(resume, rank, world, whole, tmp_path):
    """--max-restarts=1: the second try goes on from the first one's checkpoint, also where the first was told to start over."""
    if resume == "never":
        run(world, tmp_path)                                # this one is to be gone
    given = settings(world, tmp_path, save_every=2, resume=resume)
    running = tiny.launch(typed(given), ranks=2, script=FAULTY, options=["--max-restarts=1"],
                          FAULTS=json.dumps({"die": {"step": 8, "rank": rank}}))
    said, _ = running.communicate(timeout=120)
    assert running.returncode == 0, said[-3000:]
    assert said.count("going on from") == 1 and f"going on from {tmp_path / 'checkpoint/step-6'}\n" in said
    assert same(tmp_path, whole / "2")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_rank_ends_the_job_and_a_second_job_is_refused(rank, world, tmp_path):
    """A second torchrun on the same out_dir gets one sentence and changes nothing; the first goes on. When one of its ranks
    is killed the other one says so, in a sentence, and all is over."""
    given = settings(world, tmp_path, recipe="dpo", steps=100_000)
    first = tiny.launch(typed(given), ranks=2)
    tiny.until(lambda: tiny.lines(tmp_path / "metrics.jsonl") >= 2)
    if rank == 0:
        second = tiny.launch(typed(given), ranks=2)
        said, _ = second.communicate(timeout=60)
        assert second.returncode == 1
        one_sentence(said, f"another run is writing to --out_dir={tmp_path}")
    before = tiny.lines(tmp_path / "metrics.jsonl")
    tiny.until(lambda: tiny.lines(tmp_path / "metrics.jsonl") > before)
    assert first.poll() is None
    said = kill(first, rank)
    one_sentence(said, f"rank {1 - rank} has lost another rank, which stopped or was killed")
    rows = [row["step"] for _, row in checkpoint.records(tmp_path / "metrics.jsonl")]
    assert rows == list(range(1, len(rows) + 1))


def test_the_lock_is_the_last_ranks(world, tmp_path):
    """The first rank is gone and the second still at work, as it may be for as long as it samples: nobody else comes in."""
    class Rank(train.Ranks):
        """Of two ranks in one process, each alone."""
        on_first = on_all = lambda self, work: work()
        wait = lambda self: None                  # noqa: E731
    chosen = train.Settings(**settings(world, tmp_path))
    places = [checkpoint.OutDir(chosen, Rank(rank, 2, "cpu")) for rank in (0, 1)]
    with contextlib.ExitStack() as one, contextlib.ExitStack() as two:
        one.enter_context(places[0].locked())
        places[1].lock(two, shared=True)
        one.close()
        with pytest.raises(InputError, match="another run"):
            run(world, tmp_path, recipe="dpo")
    run(world, tmp_path, recipe="dpo", steps=1)


def test_a_signal_to_torchrun(world, whole, tmp_path):
    """torchrun passes it on; the step is finished, saved and named, and the same command ends with the same bits."""
    given = settings(world, tmp_path, save_every=2)
    for number, behind in ((signal.SIGTERM, 2), (signal.SIGINT, 6)):
        running = tiny.launch(typed(given), ranks=2, script=FAULTY, FAULTS='{"slow": 0.2}')
        tiny.until(lambda: tiny.lines(tmp_path / "metrics.jsonl") >= behind)
        running.send_signal(number)
        said, _ = running.communicate(timeout=60)
        step, = complete(tmp_path)
        assert behind <= step < 12
        assert f"{number.name}: stopped after step {step} of 12 and saved" in said and "train.py\", line" not in said
    in_ranks([(given, {})])
    assert same(tmp_path, whole / "2")


# ---------------------------------------------------------------------------------------------------------------------
# Two ranks that differ

def test_two_ranks_that_differ(world, whole, tmp_path):
    """In one group of processes, none of which may hang. A rank is asked to stop in the middle of an update and of an
    evaluation: the step (or the evaluation alone) is given up by both, and made again to the same bits. One rank samples
    its prompts one by one: the same bits. One rank's samples are all the same: the other's pairs alone count. A loss or a
    gradient that is not finite on one rank skips the update on both."""
    held_out = dict(eval_data=[str(world / "pairs.jsonl")], eval_every=2, steps=6)
    given = {name: settings(world, tmp_path / name, **changes) for name, changes in {
        "update": {}, "few": {}, "evaluated": held_out, "evaluate": held_out, "end": held_out,
        "same": dict(steps=3), "loss": dict(steps=4, recipe="dpo"), "gradient": dict(steps=4, recipe="dpo")}.items()}
    stop = {"rank": 1, "signal": int(signal.SIGTERM)}
    said = in_ranks([(given["update"], {"stop": {**stop, "at": "update", "step": 5}}), (given["update"], {}),
                     (given["few"], {"few": 1}), (given["evaluated"], {}),
                     (given["evaluate"], {"stop": {**stop, "at": "evaluate", "step": 4}}), (given["evaluate"], {}),
                     (given["end"], {"stop": {**stop, "at": "evaluate", "step": 6}}), (given["end"], {}),
                     (given["same"], {"same": 1}),
                     *((given[at], {"nan": {"at": at, "steps": [2], "rank": 1}}) for at in ("loss", "gradient"))])
    for step, of in ((4, 12), (4, 6), (6, 6)):
        assert f"SIGTERM: stopped after step {step} of {of} and saved" in said
    assert same(tmp_path / "update", whole / "2") and same(tmp_path / "few", whole / "2")
    assert "eval_loss" in figures(tmp_path / "evaluated")[3]
    assert same(tmp_path / "evaluate", tmp_path / "evaluated") and same(tmp_path / "end", tmp_path / "evaluated")
    assert [row["skipped"] for row in metrics(tmp_path / "same")] == [0, 0, 0]
    assert all(0 < row["identical"] < 1 for row in metrics(tmp_path / "same"))
    for at in ("loss", "gradient"):
        assert [row["skipped"] for row in metrics(tmp_path / at)] == [0, 1, 1, 1]


@pytest.mark.parametrize("at, step, saved", [("update", 1, 0), ("update", 3, 2), ("evaluate", 2, 2), ("evaluate", 6, 6)])
def test_a_long_step_is_given_up(at, step, saved, world, tmp_path, monkeypatch, capsys):
    """A step longer than PATIENCE ends at its next part: the boundary before it is saved, rollouts of the step are dropped,
    and an evaluation that was given up is made first of all by the run that goes on."""
    changes = dict(eval_data=[str(world / "pairs.jsonl")], eval_every=2, steps=6)
    run(world, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        faulty.plant({"stop": {"at": at, "step": step, "rank": 0, "signal": int(signal.SIGTERM)}}, patch.setattr)
        run(world, tmp_path / "out", **changes)
    assert left.value.code == 128 + signal.SIGTERM and complete(tmp_path / "out") == [saved] * bool(saved)
    assert f"stopped after step {saved} of 6" in capsys.readouterr().out
    if at == "evaluate":                     # killed behind the evaluation, before the next save: it is made a second time
        def killed(*rest):
            raise Killed
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(checkpoint.OutDir, "save" if step < 6 else "write_folder", killed)
            run(world, tmp_path / "out", **changes)
        assert len(metrics(tmp_path / "out")) == 6
    run(world, tmp_path / "out", **changes)
    assert same(tmp_path / "out", tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------------
# Damaged

def truncate(folder):
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])


DAMAGE = {"truncated": truncate, "missing": lambda folder: next(folder.glob("*.safetensors")).unlink(),
          "state": lambda folder: (folder / "state.json").write_text((folder / "state.json").read_text()[:-9])}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(damage, world, tmp_path, capsys):
    """--keep=2 keeps two. The newest is damaged: it is named, and the run goes on from the one before, to the same bits.
    Both are: one sentence, and nothing is removed."""
    changes = dict(recipe="dpo", steps=6, save_every=2, keep=2)
    run(world, tmp_path / "whole", **changes)
    assert complete(tmp_path / "whole") == [4, 6]
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "whole", out)
    shutil.rmtree(out / "final")
    DAMAGE[damage](out / "checkpoint/step-6")
    capsys.readouterr()
    run(world, out, **changes)
    said = capsys.readouterr().out
    assert said.count("note: ") == 1 and f"note: {out / 'checkpoint/step-6'}" in said
    assert f"going on from {out / 'checkpoint/step-4'}\n" in said
    assert same(out, tmp_path / "whole") and complete(out) == [4, 6]
    shutil.rmtree(out / "final")
    for step in (4, 6):
        DAMAGE[damage](out / f"checkpoint/step-{step}")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as refused:
        run(world, out, **changes)
    assert str(refused.value).startswith(str(out / "checkpoint/step-6")) and "\n" not in str(refused.value)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_damaged_checkpoint_is_never_the_one_kept(world, tmp_path):
    """A damaged step-6 must not push out step-5, which is saved after it, with --keep=1."""
    changes = dict(recipe="dpo", steps=6)
    run(world, tmp_path / "whole", **changes)
    out = tmp_path / "out"
    run(world, out, **changes, save_every=2, keep=2)
    shutil.rmtree(out / "final")
    truncate(out / "checkpoint/step-6")
    trainer = train.Trainer(train.Settings(**settings(world, out, **changes, save_every=1, keep=1)))
    saved = []
    save = trainer.out.save
    trainer.out.save = lambda *rest: saved.append((save(*rest), complete(out))[1])
    trainer.run()
    assert saved == [[5], [6]]
    assert same(out, tmp_path / "whole")


def test_a_shard_of_the_right_size_that_cannot_be_read_is_named(world, tmp_path):
    run(world, tmp_path, recipe="dpo", steps=2)
    shutil.rmtree(tmp_path / "final")
    shard = next((tmp_path / "checkpoint/step-2").glob("*.safetensors"))
    whole = shard.read_bytes()
    for start in (bytes(8), b"\xff" * 8, whole[:8] + b"?"):
        shard.write_bytes(start + whole[len(start):])
        with pytest.raises(InputError, match="step-2.*remove") as refused:
            run(world, tmp_path, recipe="dpo", steps=2)
        assert "\n" not in str(refused.value)


def test_lines_end_with_a_newline_and_nothing_else(tmp_path):
    """A sampled text may hold U+2028 or U+0085, which str.splitlines takes for ends of lines; and a line that was torn just
    before its newline would run into the next one."""
    file = tmp_path / "rollouts.jsonl"
    rows = [{"step": i, "text": f"a{end}b"} for i, end in enumerate(("\u2028", "\x85", "\u2029", "\x0b", "\r\n", "\x1c"), 1)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_bytes((text + '{"step": 7}').encode())
    checkpoint.keep_records(file, 9)
    assert file.read_bytes() == text.encode()
    assert checkpoint.last_record(file) == rows[-1]


def test_a_run_that_came_first_is_seen(world, tmp_path):
    """Another run that began and ended while this one was reading its models is gone on from, not thrown away."""
    chosen = train.Settings(**settings(world, tmp_path, recipe="dpo", steps=2))
    trainer = train.Trainer(chosen)                    # out_dir is still empty
    first = run(world, tmp_path, recipe="dpo", steps=2)
    weights = (tmp_path / "final/model.safetensors").stat().st_mtime_ns
    assert trainer.run() == first[-1]
    assert (tmp_path / "final/model.safetensors").stat().st_mtime_ns == weights


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that go wrong

@pytest.mark.parametrize("at", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_a_step_that_is_not_finite_is_skipped(at, optimizer, world, tmp_path, monkeypatch):
    """It is counted, weights and optimizer stay what they were, and the run goes on."""
    changes = dict(recipe="dpo", optimizer=optimizer, steps=4, save_every=1, keep=9)
    faulty.plant({"nan": {"at": at, "steps": [3], "rank": 0}}, monkeypatch.setattr)
    rows = run(world, tmp_path, **changes)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1]
    assert rows[2]["loss" if at == "loss" else "grad_norm"] is None and rows[3]["loss"] is not None
    before, after, last = (tensors_of(tmp_path / f"checkpoint/step-{step}") for step in (2, 3, 4))
    assert any(name.startswith("optimizer.") for name in before) and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], last[name]) for name in after)


def test_skipped_steps_are_counted_across_a_resume(world, tmp_path, monkeypatch):
    """Three skipped steps, a stop, two more: five in a row end the run; with a good one between they do not. What was
    counted stands in state.json."""
    def stopped_behind(step, out):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            append = checkpoint.OutDir.append

            def stop(place, name, rows):
                append(place, name, rows)
                if name == "metrics.jsonl" and rows[0]["step"] == step:
                    os.kill(os.getpid(), signal.SIGTERM)
            patch.setattr(checkpoint.OutDir, "append", stop)
            run(world, out, **changes)
    changes = dict(recipe="dpo", steps=9)
    with monkeypatch.context() as patch:
        faulty.plant({"nan": {"at": "gradient", "steps": [2, 3, 4, 5, 6], "rank": 0}}, patch.setattr)
        stopped_behind(4, tmp_path / "five")
        state = checkpoint.read_state(tmp_path / "five/checkpoint/step-4")
        assert (state["skipped"], state["in_a_row"]) == (3, 3)
        with pytest.raises(InputError, match="step 6: .*5 steps in a row; the run stops and keeps step-4"):
            run(world, tmp_path / "five", **changes)
    with monkeypatch.context() as patch:
        faulty.plant({"nan": {"at": "gradient", "steps": [2, 3, 4, 6, 7], "rank": 0}}, patch.setattr)
        run(world, tmp_path / "whole", **changes)
        stopped_behind(4, tmp_path / "parts")
        run(world, tmp_path / "parts", **changes)
    assert [row["skipped"] for row in metrics(tmp_path / "parts")] == [0, 1, 2, 3, 3, 4, 5, 5, 5]
    assert same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_a_run_goes_on_from_steps_that_were_all_skipped(optimizer, world, tmp_path, monkeypatch):
    """A checkpoint from before the first update has no optimizer state, and none may come of reading it."""
    changes = dict(recipe="dpo", optimizer=optimizer, steps=4, save_every=1, keep=9)
    with monkeypatch.context() as patch:
        faulty.plant({"nan": {"at": "loss", "steps": [1, 2], "rank": 0}}, patch.setattr)
        run(world, tmp_path / "whole", **changes)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/final")
    for step in (3, 4):
        shutil.rmtree(tmp_path / f"parts/checkpoint/step-{step}")
    run(world, tmp_path / "parts", **changes)
    assert same(tmp_path / "parts", tmp_path / "whole")


def test_samples_that_teach_nothing(world, tmp_path, monkeypatch):
    """Empty samples, K times the same one, a judge that says neither A nor B: metrics say so; where no pair is left the
    update is skipped."""
    generate = train.sample.generate

    def change(make):
        monkeypatch.setattr(train.sample, "generate", lambda *arguments: [make(group) for group in generate(*arguments)])
    rows = run(world, tmp_path / "as it is", steps=2)
    assert all(row["identical"] < 1 and row["empty"] < 0.25 and row["skipped"] == 0 for row in rows)
    change(lambda group: [group[0]] * len(group))
    rows = run(world, tmp_path / "same", steps=2)
    assert [row["skipped"] for row in rows] == [1, 2] and all(row["identical"] == 1 and "loss" not in row for row in rows)
    start, end = train.model.load(world / "model"), train.model.load(tmp_path / "same/final")
    assert all(torch.equal(a, b) for a, b in zip(start.state_dict().values(), end.state_dict().values()))
    empty = train.sample.Sample([2], -1.0, True)          # the end-of-text token alone
    change(lambda group: [empty, *group[1:]])
    rows = run(world, tmp_path / "empty", steps=2)
    assert all(row["empty"] >= 0.25 and math.isfinite(row["loss"]) and row["skipped"] == 0 for row in rows)
    change(lambda group: [empty] * len(group))
    rows = run(world, tmp_path / "all empty", steps=2)
    assert [row["skipped"] for row in rows] == [1, 2] and all(row["empty"] == 1 for row in rows)


def test_a_judge_that_says_neither(world, tmp_path):
    """A judge to whom all 420 tokens are alike has next to nothing on A and B: judge_off is 1, and its strengths are ½."""
    shutil.copytree(world / "model", tmp_path / "judge")
    weights = load_file(tmp_path / "judge/model.safetensors")
    weights = {name: weight * ("lm_head" not in name) for name, weight in weights.items()}
    save_file(weights, tmp_path / "judge/model.safetensors")
    rows = run(world, tmp_path / "out", steps=2, judge=str(tmp_path / "judge"))
    assert all(row["judge_off"] == 1 and row["p"] == 0.5 and math.isfinite(row["loss"]) and row["skipped"] == 0 for row in rows)
