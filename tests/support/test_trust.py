"""What a run promises whatever happens around it: it says what went wrong, saves only what is sound, notices
what was damaged, depends on no reader. Many more cases, drawn from seeds: tests/attack.py."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import driver
import recipes
import tiny
import train
from support import checkpoint, cli, ranks, reference_cache
from support.cli import InputError

SHORT = dict(recipe="dpo", steps=4, save_every=1, keep=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.world(tmp_path_factory.mktemp("world"))


def settings(world, out, **changes):
    given = tiny.settings(world, out, **SHORT | changes)
    del given["max_tokens"], given["k"]
    return given


def run(world, out, **changes):
    train.Trainer(recipes.Settings(**settings(world, out, **changes))).run()
    return tiny.metrics(out)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    run(world, path / "out")
    return path / "out"


def same(out, whole):
    """Whether two runs left the same bits."""
    weights = [path / "final/model.safetensors" for path in (out, whole)]
    return tiny.metrics(out) == tiny.metrics(whole) and weights[0].read_bytes() == weights[1].read_bytes()


def command(main, capsys, monkeypatch, arguments, cls=recipes.Settings):
    """(status, stdout, stderr) of a training's command line in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    status = 0
    try:
        cli.run(main, cls, is_training=True)
    except SystemExit as leaving:
        status = leaving.code
    return (status, *capsys.readouterr())


# ------------------------------------------------------------------------------------------------------------
# 1. Nobody reads what it prints

@pytest.mark.parametrize("reader, says", [
    ("there", None), ("gone", "Broken pipe"), ("full", "No space left on device"), ("closed", "is closed")])
def test_a_training_does_not_need_its_stdout(reader, says, world, whole, tmp_path, monkeypatch, capsys):
    """It ends with the same bits; log.txt has all that was said, and once that nobody could read it."""
    there, end = os.pipe()
    stream = open("/dev/full" if reader == "full" else end, "w") if reader != "closed" else None
    monkeypatch.setattr(sys, "stdout", stream)
    if reader == "gone":
        os.close(there)
    elif reader == "closed":
        monkeypatch.setattr(sys, "__stdout__", None)
    status, *_ = command(train.main, capsys, monkeypatch, tiny.typed(settings(world, tmp_path)))
    log = (tmp_path / "log.txt").read_text()
    assert status == 0 and same(tmp_path, whole)
    assert "dpo 4/4" in log and log.endswith(f"dpo: written to {tmp_path / 'final'}\n")
    assert log.count("note: standard output") == bool(says) and (says or "") in log
    if reader == "there":
        assert os.read(there, 1 << 16).decode() == log


def test_the_log_has_what_a_terminal_shows_in_the_end(tmp_path, monkeypatch, capsys):
    """A line that is rewritten in place is there once; what came before out_dir was there, too; an error."""
    def main(settings):
        print("early")
        sys.stdout.log_to(tmp_path / "log.txt")
        print("\r1/2   ", end="")
        print("\r2/2   ")
        print("unended", end="")
        raise InputError("late.")
    assert command(main, capsys, monkeypatch, [])[0] == 1
    assert (tmp_path / "log.txt").read_text() == "early\n2/2\nunended\nerror: late.\n"


@pytest.mark.slow
@pytest.mark.processes
def test_two_thousand_steps_after_the_reader_left(world, tmp_path):
    given = settings(world, tmp_path, steps=2000, batch_size=1, max_length=24, save_every=0)
    running = tiny.launch(tiny.typed(given))
    assert running.stdout.readline().endswith("rows used\n")
    running.stdout.close()
    assert running.wait(timeout=300) == 0
    assert len(tiny.metrics(tmp_path)) == 2000 and tiny.final(tmp_path)


# ------------------------------------------------------------------------------------------------------------
# 2. What is saved is finite

def test_what_is_not_finite_is_not_saved(world, whole, tmp_path, monkeypatch):
    """The third update makes one weight infinite: step-2 stays, no final/; without that, the same bits."""
    update = train.Trainer.update

    def poisoned(trainer, step):
        metrics = update(trainer, step)
        if step == 2:
            with torch.no_grad():
                trainer.policy.norm.weight[0] = float("-inf")
        return metrics
    with monkeypatch.context() as patch, pytest.raises(
            InputError, match="step-3 cannot be written: policy.norm.weight is not finite.*; step-2 is kept"):
        patch.setattr(train.Trainer, "update", poisoned)
        run(world, tmp_path)
    assert not (tmp_path / "final").exists() and not list(tmp_path.glob("checkpoint/.writing*"))
    run(world, tmp_path)
    assert same(tmp_path, whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_final_that_is_not_finite_is_not_written(bad, world, tmp_path):
    """The one before stays, though all weights are gathered to the end, as other ranks need it."""
    out = tiny.trainer(world, tmp_path, **SHORT).out
    (tmp_path / "final").mkdir()
    gathered = iter([("good", torch.ones(2)), ("empty", torch.ones(0)), ("bad", torch.tensor([1.0, bad])),
                     ("last", torch.ones(1))])
    with pytest.raises(InputError, match="final cannot be written: bad is not finite"):
        out.write_folder("final", lambda folder, weights: list(weights), gathered)
    assert not list(gathered) and (tmp_path / "final").exists()
    assert not (tmp_path / ".writing-final").exists()


# ------------------------------------------------------------------------------------------------------------
# 3. Damage is noticed

def flips(rng, path, count):
    """The file with one bit turned in its data, after the header: `count` times; then as it was."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for _ in range(count):
        at = rng.randrange(start, len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:])
        yield
    path.write_bytes(content)


def test_each_flipped_bit_of_a_checkpoint_is_named(world, whole, tmp_path, capsys):
    """30 of 30; the checkpoint before is taken, and leads to the same bits."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "final")
    shard, = out.glob("checkpoint/step-4/*.safetensors")
    place = checkpoint.OutDir(recipes.Settings(**settings(world, out)), ranks.Ranks(0, 1, "cpu"))
    for _ in flips(random.Random(0), shard, 30):
        folder, state = place.newest_sound()
        assert folder.name == "step-3" and state["step"] == 3
        assert f"note: {shard} is missing, incomplete or damaged" in capsys.readouterr().out
    assert place.newest_sound()[0].name == "step-4"
    next(flips(random.Random(1), shard, 1))
    run(world, out)
    assert same(out, whole)


@pytest.mark.parametrize("changes", [
    {"step": 3}, {"step": 5}, {"step": True}, {"files": {}}, {"files": {"x.safetensors": 1}},
    {"files": {"../../config.json": [1, 2]}}, {"files": []}])
def test_a_state_that_says_something_else_is_refused(changes, whole, tmp_path):
    shutil.copytree(whole / "checkpoint/step-4", tmp_path / "step-4")
    file = tmp_path / "step-4/state.json"
    said = checkpoint.read_state(tmp_path / "step-4")
    sizes = {name: size for name, (size, _) in said["files"].items()}
    file.write_text(json.dumps(said | {"files": sizes}))               # as 0.1 wrote it
    assert checkpoint.read_state(tmp_path / "step-4")["step"] == 4
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError, match=f"{tmp_path}/step-4/.*; remove"):
        checkpoint.read_state(tmp_path / "step-4")


def test_each_flipped_bit_of_the_reference_cache_is_named(world, tmp_path):
    made = tiny.trainer(world, tmp_path / "out", recipe="dpo", reference_cache=str(tmp_path / "cache"))
    cache = reference_cache.ReferenceCache(made.settings, made.dtype, made.data.rows, refined=False)
    assert cache.done == 13 and [cache.path] == list((tmp_path / "cache").iterdir())
    for _ in flips(random.Random(2), cache.path, 30):
        with pytest.raises(InputError, match=f"{cache.path} is damaged; remove it"):
            cache.read()
    cache.read()


# ------------------------------------------------------------------------------------------------------------
# 5. Folders that were moved

def test_moved_folders_may_be_links(world, whole, tmp_path):
    """final/ and checkpoint/ on another disk: the run goes on and is written, where the checkpoints are too;
    what a link to final/ leads to stays. So does what an old link that leads nowhere is in the way of."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    run(world, out, steps=2)
    for name in ("final", "checkpoint"):
        shutil.move(out / name, elsewhere / name)
        (out / name).symlink_to(elsewhere / name)
    before = (elsewhere / "final/model.safetensors").read_bytes()
    run(world, out, resume="force")
    assert same(out, whole) and not (out / "final").is_symlink()
    assert (elsewhere / "final/model.safetensors").read_bytes() == before
    assert sorted(path.name for path in (elsewhere / "checkpoint").iterdir()) == ["step-3", "step-4"]
    shutil.rmtree(out / "final")
    (out / "final").symlink_to(tmp_path / "nowhere")
    (out / ".removing-final").symlink_to(elsewhere)
    run(world, out)
    assert same(out, whole) and (elsewhere / "final").exists()


# ------------------------------------------------------------------------------------------------------------
# 7. Before the loop

def test_a_fill_goes_on(world, tmp_path, monkeypatch):
    """Interrupted after two of four parts, it computes the other two alone, and comes to the same values."""
    monkeypatch.setattr(reference_cache, "SAVE_SECONDS", 0)
    asked, ask = [], train.Trainer.reference_logprobs

    def counted(trainer, packed, starts):
        asked.append(len(starts) // 2)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return ask(trainer, packed, starts)

    def values(cache):
        changes = dict(recipe="dpo", micro_batch_size=4, reference_cache=str(tmp_path / cache))
        return tiny.trainer(world, tmp_path / "out", **changes).data.rows
    plain = values("whole")
    monkeypatch.setattr(train.Trainer, "reference_logprobs", counted)
    with pytest.raises(KeyboardInterrupt):
        values("parts")
    parts = values("parts")
    assert [pair.reference for pair in parts] == [pair.reference for pair in plain]
    assert asked == [4, 4, 4, 4, 1] and values("parts") and len(asked) == 5


@pytest.mark.slow
@pytest.mark.processes
def test_an_interrupt_while_it_loads(world, tmp_path):
    """In the middle of torch's import. (Where SIGINT is ignored, as after nohup, this cannot be tried.)"""
    running = tiny.launch(tiny.typed(settings(world, tmp_path, steps=10 ** 5)))
    tiny.until(lambda: "libtorch" in Path(f"/proc/{running.pid}/maps").read_text())
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate(timeout=120)
    assert running.returncode in (130, -signal.SIGINT) and "Traceback" not in said, said


@pytest.mark.slow
@pytest.mark.processes
def test_a_rank_that_hangs(world, tmp_path):
    """The other one waits for six seconds, and says so; torchrun ends the job."""
    given = settings(world, tmp_path, steps=10 ** 5, rank_minutes=0.1, save_every=0)
    running = tiny.launch(tiny.typed(given), ranks=2)
    tiny.until(lambda: tiny.lines(tmp_path / "metrics.jsonl") >= 2)
    os.kill(tiny.workers_of(running)[1], signal.SIGSTOP)
    said, _ = running.communicate(timeout=120)
    assert running.returncode and "train.py\", line" not in said, said
    assert "error: rank 0 has lost another rank, which stopped or was killed, or did not answer" in said


def test_torchruns_report_names_the_error(tmp_path, monkeypatch, capsys):
    """As torch's own reader of such a file understands it."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert command(recipes.Settings, capsys, monkeypatch, ["--k=none!"])[0] == 1
    said = ProcessFailure(0, 1, 1, str(tmp_path / "error.json"))
    assert said.message["extraInfo"]["py_callstack"].startswith("--k=none!") and said.timestamp > 1.7e9


# ------------------------------------------------------------------------------------------------------------
# 8. Signals

@pytest.mark.parametrize("name, status", [("SIGUSR1", 138), ("SIGHUP", 129), ("nohup", 0), ("SIGQUIT", 131)])
def test_other_signals(name, status, world, whole, tmp_path, monkeypatch, capsys):
    """USR1 and HUP finish the step and save; HUP after nohup is nothing; QUIT leaves at once and says so."""
    number = signal.SIGHUP if name == "nohup" else getattr(signal, name)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if name == "nohup" else signal.SIG_DFL)
    try:
        with monkeypatch.context() as patch:
            driver.plant({"signal": {"at": "update", "step": 2, "rank": 0, "number": number}}, patch.setattr)
            left, said, error = command(
                train.main, capsys, monkeypatch, tiny.typed(settings(world, tmp_path, save_every=0)))
    finally:
        signal.signal(signal.SIGHUP, before)
    saved = [path.name for path in tmp_path.glob("checkpoint/*")]
    assert left == status and saved == {0: ["step-4"], 131: []}.get(status, ["step-2"])
    assert f"{name}: stopped" in said + error or name == "nohup"
    run(world, tmp_path, save_every=0)
    assert same(tmp_path, whole)


# ------------------------------------------------------------------------------------------------------------
# 9. Memory, and what nobody foresaw

@pytest.mark.parametrize("ask, amount", [
    (lambda: torch.empty(10 ** 15), "4000000000000000 bytes"), (lambda: np.ones(10 ** 17), "711. PiB"),
    (lambda: bytearray(1 << 62), "more")])
def test_memory_that_is_not_there(ask, amount, monkeypatch, capsys):
    """Who asked for how much (10^15 float32 are 4 · 10^15 bytes), and what to lower."""
    status, _, error = command(lambda settings: ask(), capsys, monkeypatch, ["--k=1000000"])
    assert status == 1 and error.count("\n") == 1
    assert f"no memory: <lambda> in test_trust.py asked for {amount}, which is not there" in error
    assert "lower --k=1000000 or " in error


def test_adapters_that_are_too_large(world, tmp_path, monkeypatch, capsys):
    given = tiny.typed(settings(world, tmp_path, lora_rank=10 ** 12))
    status, _, error = command(train.main, capsys, monkeypatch, given)
    assert status == 1 and error.count("\n") == 1
    assert "no memory: fresh_adapters in model.py" in error and f"--lora_rank={10 ** 12}" in error


def test_an_error_that_nobody_foresaw(tmp_path, monkeypatch, capsys):
    """One sentence with the file where the traceback is; OSPREY_TRACEBACK prints it; Ctrl-C is no error."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def broken(settings):
        raise {"1": ZeroDivisionError("no reason\nat all"), "2": KeyboardInterrupt}[settings.model]
    status, _, error = command(broken, capsys, monkeypatch, ["--model=1"])
    place, = tmp_path.iterdir()
    assert status == 1 and error == (
        f"error: ZeroDivisionError: no reason; this was not foreseen, its traceback is in {place}.\n")
    assert "in broken\n" in place.read_text()
    monkeypatch.setenv("OSPREY_TRACEBACK", "1")
    status, _, error = command(broken, capsys, monkeypatch, ["--model=1"])
    assert status == 1 and "in broken\n" in error and len(list(tmp_path.iterdir())) == 1
    assert command(broken, capsys, monkeypatch, ["--model=2"])[0] == 130


# ------------------------------------------------------------------------------------------------------------
# 10, 11. Environment, paths, numbers

@pytest.mark.parametrize("environment, says", [
    ({"RANK": "5"}, "RANK=5 and WORLD_SIZE=1"), ({"RANK": "x"}, "RANK=x"), ({"RANK": ""}, "RANK=:"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"), ({"WORLD_SIZE": "1e9"}, "WORLD_SIZE=1e9"),
    ({"WORLD_SIZE": "2"}, "RANK= and WORLD_SIZE=2"), ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR"),
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "cannot meet")])
def test_an_environment_that_torchrun_did_not_make(environment, says, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=says):
        ranks.Ranks.start("cpu")


@pytest.mark.parametrize("changes, says", [
    ({"out_dir": "loop"}, "loop"), ({"model": "loop"}, "loop"), ({"data": ["loop"]}, "loop"),
    ({"out_dir": "x" * 300}, "File name too long"), ({"data": ["x" * 300]}, "File name too long"),
    ({"model": "x" * 300}, "File name too long"), ({"reference_cache": "x" * 300}, "File name too long"),
    ({"out_dir": "\udcff"}, "not UTF-8"), ({"lr": 1e300}, "less than 3e+38")])
def test_paths_and_numbers_that_cannot_be(changes, says, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    given = settings(world, "out", **changes)
    status, _, error = command(train.main, capsys, monkeypatch, tiny.typed(given))
    assert status == 1 and error.count("\n") == 1 and "foreseen" not in error and says in error, error


# ------------------------------------------------------------------------------------------------------------
# All of it, drawn from seeds

@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("kind, first, stop", [
    ("inputs", 0, 60), ("kills", 0, 6), ("kills", 32, 40), ("signals", 4, 9), ("disks", 0, 7),
    ("configs", 0, 4)])
def test_a_share_of_the_attack(kind, first, stop, tmp_path):
    command = [sys.executable, tiny.ROOT / "tests/attack.py", tmp_path, kind, str(first), str(stop)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    came = [json.loads(line)["came"] for line in open(tmp_path / "results.jsonl")]
    assert done.returncode == 0 and set(came) <= {"ok", "handled"} and len(came) == stop - first, done
