"""Nothing older than the last save is lost: killed, full, damaged and stopped runs end with the same bits."""
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

import driver
import model
import recipes
import sample
import tiny
import train
from support import checkpoint, disk
from support.cli import InputError
from support.ranks import Ranks

EVALUATED = dict(eval_every=2, steps=6)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.world(tmp_path_factory.mktemp("world"))


def settings(world, out, **changes):
    """Of a short online run, whose rollouts, weights and optimizer all have to come back."""
    short = dict(recipe="osp", steps=12, micro_batch_size=1, max_tokens=6)
    given = tiny.settings(world, out, **short | changes)
    if given["recipe"] == "dpo":
        del given["max_tokens"], given["k"]                  # where they are typed, they are refused
    if "eval_every" in given:
        given["eval_data"] = given["data"]
    return given


def run(world, out, **changes):
    train.Trainer(recipes.Settings(**settings(world, out, **changes))).run()
    return tiny.metrics(out)


def launch(given, ranks=2, options=(), **faults):
    return tiny.launch(tiny.typed(given), ranks, "tests/driver.py", options, FAULTS=json.dumps(faults))


def in_ranks(folder, runs):
    """[(settings, faults)] one after the other in one group of two processes; returns what they said."""
    entries = [{"settings": given, "faults": faults} for given, faults in runs]
    return driver.launch(entries, 2, folder / "runs.json")


def figures(out):
    """The lines of metrics.jsonl, those of evaluations too."""
    return tiny.timeless([row for _, row in disk.records(out / "metrics.jsonl")])


def steps_of(out):
    """The steps that have a line; they must be the first ones, in order."""
    steps = [row["step"] for row in tiny.metrics(out)]
    assert steps == list(range(1, len(steps) + 1))
    return len(steps)


def same(out, whole):
    """Whether two runs left the same bits: metrics, rollouts, final weights."""
    assert figures(out) == figures(whole)
    for name in ("final/model.safetensors", *(path.name for path in whole.glob("rollouts*.jsonl"))):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    return True


def tensors_of(folder):
    files = map(load_file, sorted(folder.glob("*.safetensors")))
    return {name: tensor for file in files for name, tensor in file.items()}


def complete(out):
    """The steps of the checkpoints that have a state.json; each of them must be whole."""
    steps = []
    for state_file in out.glob("checkpoint/step-*/state.json"):
        folder, state = state_file.parent, checkpoint.read_state(state_file.parent)
        assert state["step"] == checkpoint.number(folder) and len(state["files"]) == state["ranks"]
        assert {name: disk.checksum(folder / name) for name in state["files"]} == state["files"]
        tensors = tensors_of(folder)
        assert tensors and all(tensor.isfinite().all() for tensor in tensors.values())
        steps.append(state["step"])
    return sorted(steps)


def half_saved(out):
    """What a save under way, or one that was killed, has written aside."""
    return list(out.glob("checkpoint/.writing-step-*"))


def contents(out):
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def one_sentence(said, *words):
    """The only line of an error; torchrun adds a page of its own, but none of our frames."""
    errors = {line for line in said.splitlines() if line.startswith("error: ")}
    assert len(errors) == 1 and "train.py\", line" not in said, said[-3000:]
    assert all(word in error for word in words for error in errors), errors


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Uninterrupted runs: of one process, of two ranks, and each of them with evaluations."""
    path = tmp_path_factory.mktemp("whole")
    run(world, path / "1")
    run(world, path / "1 evaluated", **EVALUATED)
    evaluated = settings(world, path / "2 evaluated", **EVALUATED)
    in_ranks(path, [(settings(world, path / "2"), {}), (evaluated, {})])
    return path


# ------------------------------------------------------------------------------------------------------------
# Killed

def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def kill(running, rank):
    """SIGKILL for one rank of a torchrun; returns what was said when no process is left."""
    workers = tiny.workers_of(running)
    os.kill(workers[rank], signal.SIGKILL)
    said, _ = running.communicate(timeout=120)               # whoever writes to the pipe is gone then
    tiny.until(lambda: not any(alive(pid) for pid in workers.values()))
    assert running.returncode != 0
    return said


@pytest.mark.processes
def test_killed_while_saving(world, whole, tmp_path):
    """SIGKILL for torchrun in a save: what has a state.json is whole, no orphan goes on, and the same command
    comes to the same bits. Ranks killed at many places: tests/attack.py."""
    given = settings(world, tmp_path, save_every=1)
    running = launch(given, slow=0.2)
    tiny.until(lambda: running.poll() is not None or any(
        folder.name >= ".writing-step-3" for folder in half_saved(tmp_path)), 240)
    workers = tiny.workers_of(running)
    running.kill()
    running.communicate(timeout=120)
    tiny.until(lambda: not any(alive(pid) for pid in workers.values()))
    newest = max(complete(tmp_path))
    assert 2 <= newest < 12 and half_saved(tmp_path) and steps_of(tmp_path) >= newest
    running = launch(given)
    said, _ = running.communicate(timeout=300)
    assert f"going on from {tmp_path}/checkpoint/step-{newest}\n" in said, said[-3000:]
    assert not half_saved(tmp_path) and complete(tmp_path) == [12] and same(tmp_path, whole / "2")


class Killed(BaseException):
    """What no handler of an error catches."""


@contextlib.contextmanager
def still_from(monkeypatch, operation):
    """What touches the disk fails from that operation on, as if the process were gone. Yields the list."""
    done = []

    def counted(place, name):
        work = getattr(place, name)

        def operate(*arguments, **options):
            done.append((name, str(arguments[0])))
            if len(done) > operation:
                raise Killed
            return work(*arguments, **options)
        return place, name, operate
    with monkeypatch.context() as patch:
        for place, name in (*((os, name) for name in ("replace", "unlink", "rmdir", "mkdir", "fsync")),
                            (Path, "write_text"), (checkpoint.OutDir, "append"), (model, "save_weights")):
            patch.setattr(*counted(place, name))
        yield done


@pytest.mark.parametrize("every", [17, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_killed_at_each_operation_on_the_disk(resume, every, world, tmp_path, monkeypatch):
    """The disk stands still from the n-th rename, removal, sync, … on: what has a state.json is whole, one
    save is lost at most, and the run goes on to the same bits. `never` is over a finished run."""
    changes = dict(recipe="dpo", steps=3, save_every=1, keep=1, eval_every=2)
    run(world, tmp_path / "whole", **changes)
    operations = math.inf
    for n in range(0, 1000, every):
        if n > operations:
            break
        out = tmp_path / str(n)
        if resume == "never":
            shutil.copytree(tmp_path / "whole", out)
        with still_from(monkeypatch, n) as done, contextlib.suppress(Killed, CheckpointException):
            run(world, out, **changes, resume=resume)
            operations = len(done)
        saved, steps = complete(out), steps_of(out)
        assert len(saved) <= 2 and (resume == "never" or max(saved, default=0) >= steps - 1), (n, done[-3:])
        run(world, out, **changes)
        assert same(out, tmp_path / "whole") and complete(out) == [3], n
        shutil.rmtree(out)
    assert 0 < operations < math.inf


# ------------------------------------------------------------------------------------------------------------
# A full and a read-only filesystem

@pytest.fixture
def small(tmp_path):
    """(the path of a tmpfs of 6 MB, remount(options)). It is in a mount namespace of its own, which a waiting
    shell keeps: no trace of it outside."""
    if shutil.which("unshare") is None:
        pytest.skip("a small filesystem needs unshare, of util-linux")
    place = tmp_path / "disk"
    place.mkdir()
    script = (f"mount -t tmpfs -o size=6m none '{place}' && echo ready && "
              f"while read -r line; do $line && echo ready; done")
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    shell = subprocess.Popen(["unshare", "-rm", "sh", "-c", script], **pipes)
    if shell.stdout.readline() != "ready\n":
        pytest.skip(f"a small filesystem needs root or unshare -rm: {shell.communicate()[1]}")

    def remount(options):
        shell.stdin.write(f"mount -o remount,{options} {place}\n")
        shell.stdin.flush()
        assert shell.stdout.readline() == "ready\n"
    yield Path(f"/proc/{shell.pid}/root{place}"), remount
    shell.stdin.close()
    shell.wait(timeout=30)


def process(given, capsys, monkeypatch, **faults):
    """(exit status, all that was said) of a training in this process."""
    with monkeypatch.context() as patch:
        driver.plant(faults, patch.setattr)
        code, said, error = tiny.command(train, capsys, monkeypatch, *tiny.typed(given))
    assert error.count("\n") == bool(code)
    return code, said + error


def test_a_full_disk(world, whole, small, capsys, monkeypatch):
    """Full while saving, adding lines or writing final/: status 1 and one sentence with what, why and which
    checkpoint is kept. When there is room again the same command goes on, and ends with the same bits. Two
    ranks: tests/attack.py."""
    out, filler = small[0] / "out", small[0] / "filler"
    given = settings(world, out, save_every=2)
    for at, step, leave, what, kept in (("save", 2, 150_000, "checkpoint/step-2 cannot", None),
                                        ("save", 6, 300_000, "checkpoint/step-6 cannot", 4),
                                        ("update", 9, 0, ".jsonl cannot", 8),
                                        ("final", 0, 100_000, "final cannot", 12)):
        fill = {"at": at, "step": step, "file": str(filler), "leave": leave}
        code, said = process(given, capsys, monkeypatch, fill=fill)
        assert code == 1, said[-3000:]
        one_sentence(said, str(out), what, "be written: No space left on device",
                     f"step-{kept} is kept" if kept else "no checkpoint yet")
        assert complete(out) == [kept] * bool(kept) and not half_saved(out)
        filler.unlink()
    assert process(given, capsys, monkeypatch)[0] == 0
    assert same(out, whole / "1")


def test_a_read_only_out_dir(world, small, capsys, monkeypatch):
    """A new run, and one that goes on: status 1, one sentence, nothing changed."""
    (path, remount), changes = small, dict(recipe="dpo", steps=2)
    for _ in range(2):
        before = contents(path)
        remount("ro")
        code, said = process(settings(world, path / "out", **changes), capsys, monkeypatch)
        one_sentence(said, f"--out_dir={path / 'out'} cannot be written: Read-only file system")
        assert code == 1 and contents(path) == before
        remount("rw")
        run(world, path / "out", **changes)
        shutil.rmtree(path / "out/final")
    run(world, path / "out", **changes)


# ------------------------------------------------------------------------------------------------------------
# torchrun

@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("resume, rank", [("auto", 1), ("never", 0)])
def test_torchrun_restarts_a_killed_rank(resume, rank, world, whole, tmp_path):
    """--max-restarts=1: the second try goes on from the first one's checkpoint, though told to start over."""
    if resume == "never":
        run(world, tmp_path)                                # this one is to be gone
    running = launch(settings(world, tmp_path, save_every=2, resume=resume), options=["--max-restarts=1"],
                     die={"step": 8, "rank": rank})
    said, _ = running.communicate(timeout=120)
    assert running.returncode == 0, said[-3000:]
    assert said.count("going on from") == 1 and f"going on from {tmp_path / 'checkpoint/step-6'}\n" in said
    assert same(tmp_path, whole / "2")


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_rank_ends_the_job_and_a_second_job_is_refused(rank, world, tmp_path):
    """A second torchrun on the same out_dir gets one sentence and changes nothing; the first goes on. When
    one of its ranks is killed the other one says so, in a sentence, and all is over."""
    given = settings(world, tmp_path, recipe="dpo", steps=100_000)
    first = tiny.launch(tiny.typed(given), ranks=2)
    tiny.until(lambda: tiny.lines(tmp_path / "metrics.jsonl") >= 2)
    if rank == 0:
        second = tiny.launch(tiny.typed(given), ranks=2)
        said, _ = second.communicate(timeout=60)
        assert second.returncode == 1
        one_sentence(said, f"another run is writing to --out_dir={tmp_path}")
    before = tiny.lines(tmp_path / "metrics.jsonl")
    tiny.until(lambda: tiny.lines(tmp_path / "metrics.jsonl") > before)
    assert first.poll() is None
    one_sentence(kill(first, rank), f"rank {1 - rank} has lost another rank, which stopped or was killed")
    assert steps_of(tmp_path) > before


def test_the_lock_is_the_last_ranks(world, tmp_path):
    """The first rank is gone and the second still at work: nobody else comes in."""
    chosen = recipes.Settings(**settings(world, tmp_path))
    places = [checkpoint.OutDir(chosen, Ranks(0, 1, "cpu")) for _ in range(2)]
    with contextlib.ExitStack() as one, contextlib.ExitStack() as two:
        one.enter_context(places[0].locked())
        places[1].lock(two, shared=True)
        one.close()
        with pytest.raises(InputError, match="another run"):
            run(world, tmp_path, recipe="dpo")
    run(world, tmp_path, recipe="dpo", steps=1)


# ------------------------------------------------------------------------------------------------------------
# Told to stop

@pytest.mark.processes
@pytest.mark.slow
def test_a_signal_to_torchrun(world, whole, tmp_path):
    """torchrun passes it on; the step is finished, saved, named; the same command ends with the same bits."""
    given = settings(world, tmp_path, save_every=2)
    running = launch(given, slow=0.2)
    tiny.until(lambda: tiny.lines(tmp_path / "metrics.jsonl") >= 2)
    running.terminate()
    said, _ = running.communicate(timeout=60)
    step, = complete(tmp_path)
    assert 2 <= step < 12 and f"SIGTERM: stopped after step {step} of 12" in said
    assert "train.py\", line" not in said
    in_ranks(tmp_path, [(given, {})])
    assert same(tmp_path, whole / "2")


@pytest.mark.parametrize("at, step, number", [
    ("update", 1, signal.SIGTERM), ("evaluate", 2, signal.SIGTERM), ("update", 4, signal.SIGINT)])
def test_a_signal_finishes_the_step(at, step, number, world, whole, tmp_path, monkeypatch, capsys):
    """In an update or an evaluation: both are finished and saved, and the status is 128 + the signal."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        driver.plant({"signal": {"at": at, "step": step, "rank": 0, "number": int(number)}}, patch.setattr)
        run(world, tmp_path, **EVALUATED)
    assert left.value.code == 128 + number and complete(tmp_path) == [step]
    assert f"{number.name}: stopped after step {step} of 6" in capsys.readouterr().out
    assert steps_of(tmp_path) == step
    run(world, tmp_path, **EVALUATED)
    assert same(tmp_path, whole / "1 evaluated")


def test_a_second_interrupt_stops_at_once(world, whole, tmp_path, monkeypatch):
    """What lies after the last save is made again."""
    interrupt = {"at": "update", "step": 4, "rank": 0, "number": int(signal.SIGINT)}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        driver.plant({"signal": interrupt}, patch.setattr)
        driver.plant({"signal": interrupt}, patch.setattr)
        run(world, tmp_path, **EVALUATED, save_every=2)
    assert complete(tmp_path) == [2] and steps_of(tmp_path) == 3
    run(world, tmp_path, **EVALUATED, save_every=2)
    assert same(tmp_path, whole / "1 evaluated")


@pytest.mark.slow
@pytest.mark.processes
def test_two_ranks_that_differ(world, whole, tmp_path):
    """In one group of processes, none of which may hang. One rank is told to stop: both finish the update or
    evaluation and save. A loss or gradient that is not finite on one skips the update on both."""
    given = {name: settings(world, tmp_path / name, **changes) for name, changes in {
        "update": {}, "evaluate": EVALUATED, "loss": dict(recipe="dpo", steps=4),
        "gradient": dict(recipe="dpo", steps=4)}.items()}
    stop = {"rank": 1, "number": int(signal.SIGTERM)}
    said = in_ranks(tmp_path, [
        (given["update"], {"signal": {**stop, "at": "update", "step": 5}}), (given["update"], {}),
        (given["evaluate"], {"signal": {**stop, "at": "evaluate", "step": 4}}), (given["evaluate"], {}),
        *((given[at], {"nan": {"at": at, "steps": [2], "rank": 1}}) for at in ("loss", "gradient"))])
    assert all(f"SIGTERM: stopped after step {step}" in said for step in ("5 of 12", "4 of 6"))
    assert same(tmp_path / "update", whole / "2") and same(tmp_path / "evaluate", whole / "2 evaluated")
    for at in ("loss", "gradient"):
        assert [row["skipped"] for row in figures(tmp_path / at)] == [0, 1, 1, 1]


# ------------------------------------------------------------------------------------------------------------
# Damaged

def truncate(file):
    file.write_bytes(file.read_bytes()[:-10])


DAMAGE = {"truncated": ("*.safetensors", truncate), "missing": ("*.safetensors", Path.unlink),
          "state": ("state.json", truncate)}


def damage_of(kind, folder):
    files, harm = DAMAGE[kind]
    harm(next(folder.glob(files)))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(damage, world, tmp_path, capsys):
    """--keep=2 keeps two. The newest is damaged: it is named, and the run goes on from the one before, to the
    same bits. Both are: one sentence, and nothing is removed."""
    changes, out = dict(recipe="dpo", steps=6, save_every=2, keep=2), tmp_path / "out"
    run(world, tmp_path / "whole", **changes)
    assert complete(tmp_path / "whole") == [4, 6]
    shutil.copytree(tmp_path / "whole", out)
    shutil.rmtree(out / "final")
    damage_of(damage, out / "checkpoint/step-6")
    capsys.readouterr()
    run(world, out, **changes)
    said = capsys.readouterr().out
    assert said.count("note: ") == 1 and f"note: {out / 'checkpoint/step-6'}" in said
    assert f"going on from {out / 'checkpoint/step-4'}\n" in said
    assert same(out, tmp_path / "whole") and complete(out) == [4, 6]
    shutil.rmtree(out / "final")
    for step in (4, 6):
        damage_of(damage, out / f"checkpoint/step-{step}")
    before = contents(out)
    with pytest.raises(InputError) as refused:
        run(world, out, **changes)
    assert str(refused.value).startswith(str(out / "checkpoint/step-6")) and "\n" not in str(refused.value)
    assert before == contents(out)


def test_a_damaged_checkpoint_is_never_the_one_kept(world, tmp_path, monkeypatch):
    """A damaged step-6 must not push out step-5, which is saved after it, with --keep=1."""
    changes, out, saved, save = dict(recipe="dpo", steps=6), tmp_path / "out", [], checkpoint.OutDir.save
    run(world, tmp_path / "whole", **changes)
    run(world, out, **changes, save_every=2, keep=2)
    shutil.rmtree(out / "final")
    damage_of("truncated", out / "checkpoint/step-6")

    def noted(*given):
        save(*given)
        saved.append(complete(out))
    monkeypatch.setattr(checkpoint.OutDir, "save", noted)
    run(world, out, **changes, save_every=1, keep=1)
    assert saved == [[5], [6]] and same(out, tmp_path / "whole")


def test_a_shard_of_the_right_size_that_cannot_be_read_is_named(world, tmp_path):
    run(world, tmp_path, recipe="dpo", steps=2)
    shutil.rmtree(tmp_path / "final")
    shard = next(tmp_path.glob("checkpoint/step-2/*.safetensors"))
    whole = shard.read_bytes()
    for start in (bytes(8), b"\xff" * 8, whole[:8] + b"?"):
        shard.write_bytes(start + whole[len(start):])
        with pytest.raises(InputError, match="step-2.*remove") as refused:
            run(world, tmp_path, recipe="dpo", steps=2)
        assert "\n" not in str(refused.value)


def test_lines_end_with_a_newline_and_nothing_else(tmp_path):
    """A text may hold U+2028 or U+0085, which str.splitlines takes for line ends; and a line that was torn
    just before its newline would run into the next one."""
    file, ends = tmp_path / "rollouts.jsonl", ("\u2028", "\x85", "\u2029", "\x0b", "\r\n", "\x1c")
    rows = [{"step": i, "text": f"a{end}b"} for i, end in enumerate(ends, 1)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_bytes((text + '{"step": 7}').encode())
    disk.keep_records(file, 9)
    assert file.read_bytes() == text.encode() and disk.last_metrics(file) == rows[-1]


def test_a_run_that_came_first_is_seen(world, tmp_path):
    """Another run that began and ended while this one was reading its models is not thrown away."""
    trainer = train.Trainer(recipes.Settings(**settings(world, tmp_path, recipe="dpo", steps=2)))
    run(world, tmp_path, recipe="dpo", steps=2)
    weights = (tmp_path / "final/model.safetensors").stat().st_mtime_ns
    assert trainer.run() == disk.last_metrics(tmp_path / "metrics.jsonl")
    assert (tmp_path / "final/model.safetensors").stat().st_mtime_ns == weights


# ------------------------------------------------------------------------------------------------------------
# Numbers that go wrong

@pytest.mark.parametrize("at", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_a_step_that_is_not_finite_is_skipped(at, optimizer, world, tmp_path, monkeypatch):
    """It is counted, weights and optimizer stay what they were, and the run goes on."""
    driver.plant({"nan": {"at": at, "steps": [3], "rank": 0}}, monkeypatch.setattr)
    rows = run(world, tmp_path, recipe="dpo", optimizer=optimizer, steps=4, save_every=1, keep=9)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1]
    assert rows[2]["loss" if at == "loss" else "grad_norm"] is None and rows[3]["loss"] is not None
    before, after, last = (tensors_of(tmp_path / f"checkpoint/step-{step}") for step in (2, 3, 4))
    assert any(name.startswith("optimizer.") for name in before) and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], last[name]) for name in after)


def test_skipped_steps_are_counted_across_a_resume(world, tmp_path, monkeypatch):
    """Three skipped steps, a stop, two more: five in a row end the run, but not with a good one between."""
    changes = dict(recipe="dpo", steps=9)

    def poisoned(out, steps, **faults):
        with monkeypatch.context() as patch:
            driver.plant({"nan": {"at": "gradient", "steps": steps, "rank": 0}, **faults}, patch.setattr)
            return run(world, tmp_path / out, **changes)
    stop = {"at": "update", "step": 4, "rank": 0, "number": int(signal.SIGTERM)}
    for out, steps in (("five", [2, 3, 4, 5, 6]), ("parts", [2, 3, 4, 6, 7])):
        with pytest.raises(SystemExit):
            poisoned(out, steps, signal=stop)
        state = checkpoint.read_state(tmp_path / out / "checkpoint/step-4")
        assert (state["skipped"], state["consecutive_skips"]) == (3, 3)
    with pytest.raises(InputError, match="step 6: .*5 steps in a row; the run stops and keeps step-4"):
        poisoned("five", [2, 3, 4, 5, 6])
    rows = poisoned("parts", [2, 3, 4, 6, 7])
    assert [row["skipped"] for row in rows] == [0, 1, 2, 3, 3, 4, 5, 5, 5]
    poisoned("whole", [2, 3, 4, 6, 7])
    assert same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_a_run_goes_on_from_steps_that_were_all_skipped(optimizer, world, tmp_path, monkeypatch):
    """A checkpoint from before the first update has no optimizer state, and none may come of reading it."""
    changes = dict(recipe="dpo", optimizer=optimizer, steps=4, save_every=1, keep=9)
    with monkeypatch.context() as patch:
        driver.plant({"nan": {"at": "loss", "steps": [1, 2], "rank": 0}}, patch.setattr)
        run(world, tmp_path / "whole", **changes)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for name in ("final", "checkpoint/step-3", "checkpoint/step-4"):
        shutil.rmtree(tmp_path / "parts" / name)
    run(world, tmp_path / "parts", **changes)
    assert same(tmp_path / "parts", tmp_path / "whole")


def test_samples_that_teach_nothing(world, tmp_path, monkeypatch):
    """Empty samples, K times the same one: metrics say so; where no pair is left the update is skipped."""
    generate, empty = sample.generate, sample.Sample([2], -1.0, True)          # the end-of-text token alone

    def rows(name, make):
        monkeypatch.setattr(sample, "generate", lambda *given: [make(group) for group in generate(*given)])
        nothing = pytest.raises(InputError, match="nothing was learned")
        with contextlib.nullcontext() if name == "empty" else nothing:
            run(world, tmp_path / name, steps=2)
        assert (tmp_path / name / "final").exists() == (name == "empty")
        return tiny.metrics(tmp_path / name)
    for row in rows("same", lambda group: [group[0]] * len(group)):
        assert row["identical"] == 1 and "loss" not in row and row["skipped"] == row["step"]
    for row in rows("empty", lambda group: [empty, *group[1:]]):
        assert row["empty"] >= 0.25 and math.isfinite(row["loss"]) and row["skipped"] == 0
    for row in rows("all empty", lambda group: [empty] * len(group)):
        assert row["empty"] == 1 and row["skipped"] == row["step"]
