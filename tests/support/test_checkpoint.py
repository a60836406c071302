"""out_dir: whose it is, what a run goes on with, and what it never overwrites. Crashes: test_faults.py."""
import shutil
from pathlib import Path

import pytest

import tiny
from support.checkpoint import OutDir
from support.cli import InputError
from tiny import metrics


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.world(tmp_path_factory.mktemp("world"))


def run(world, out, **changes):
    return tiny.run(world, out, **{"recipe": "dpo", **changes})


def contents(folder):
    """{path: bytes, or when it was changed} of all that a folder holds, but for the lock."""
    return {path: path.is_file() and (path.read_bytes(), path.stat().st_mtime_ns)
            for path in folder.rglob("*") if path.name != ".lock"}


# ------------------------------------------------------------------------------------------------------------
# The same run

def test_a_finished_run_says_its_result_again(world, tmp_path, capsys):
    first = run(world, tmp_path)
    before = contents(tmp_path)
    assert "is finished" not in capsys.readouterr().out
    assert run(world, tmp_path) == first and contents(tmp_path) == before
    assert "is finished" in capsys.readouterr().out


def test_other_settings_are_named(world, tmp_path):
    run(world, tmp_path)
    with pytest.raises(InputError, match="beta.*0.1 → 0.3"):
        run(world, tmp_path, beta=0.3)
    assert len(run(world, tmp_path, beta=0.3, resume="never")) == 3


def test_changed_inputs_are_named(world, tmp_path):
    """The same settings with other contents: data, held-out rows, weights. Restored, the run is finished."""
    folder = tiny.folder(tmp_path / "model")
    file, held_out = (Path(tiny.write_jsonl(tmp_path / f"{name}.jsonl", tiny.pairs(6, seed=3)))
                      for name in ("data", "held_out"))
    changes = dict(model=str(folder), data=[str(file)], eval_data=[str(held_out)])
    first = run(world, tmp_path / "out", **changes)
    before = contents(tmp_path / "out")
    for path in (file, held_out, folder / "model.safetensors"):
        whole = path.read_bytes()
        at = len(whole) * 3 // 4
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])        # one bit, the same size
        named = folder if path.parent == folder else path
        with pytest.raises(InputError, match=f"the contents of {named};"):
            run(world, tmp_path / "out", **changes)
        path.write_bytes(whole)
    assert run(world, tmp_path / "out", **changes) == first and contents(tmp_path / "out") == before


def test_force_goes_on_with_changed_inputs(world, tmp_path):
    """The run keeps its steps, goes on with the new rows, and those are its inputs from then on."""
    file = tmp_path / "data.jsonl"
    changes = dict(data=[tiny.write_jsonl(file, tiny.pairs(6, seed=3))])
    first = run(world, tmp_path / "out", **changes)
    tiny.write_jsonl(file, tiny.pairs(6, seed=4))
    rows = run(world, tmp_path / "out", **changes, steps=5, resume="force")
    assert rows[:3] == first and [row["step"] for row in rows[3:]] == [4, 5]
    fresh = run(world, tmp_path / "fresh", **changes, steps=5)
    assert fresh[0]["chosen_logp"] != first[0]["chosen_logp"] and fresh[4]["loss"] != rows[4]["loss"]
    assert run(world, tmp_path / "out", **changes, steps=5) == rows


def test_a_forced_run_is_finished_only_when_it_is(world, tmp_path, monkeypatch):
    """It was interrupted in its last save, its last line is torn."""
    run(world, tmp_path / "whole", steps=4)
    out = tmp_path / "out"
    run(world, out, steps=2)

    def interrupted(*given):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(OutDir, "save", interrupted)
        run(world, out, steps=4, resume="force")
    assert not (out / "final").exists()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    run(world, out, steps=4)
    tiny.assert_same_run(out, tmp_path / "whole", 0)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints

def test_only_whole_checkpoints_count(world, tmp_path):
    """A folder step-old is nobody's; step-9 has no state.json. One that says nothing is named, and leaves the
    run as it was."""
    out, state = tmp_path / "out", tmp_path / "out/checkpoint/step-2/state.json"
    run(world, tmp_path / "whole", steps=4)
    run(world, out, steps=2)
    for name in ("step-old", "step-9"):
        (out / "checkpoint" / name).mkdir()
    (out / "checkpoint/step-old/state.json").write_text("{}")
    said = state.read_text()
    for text in ("{}", '{"step": "2", "files": {}}', '{"step": 2}', '{"step": 2, "files": []}', "[]", "{"):
        state.write_text(text)
        before = contents(out)
        with pytest.raises(InputError, match="step-2/state.json"):
            run(world, out, steps=4, resume="force")
        assert contents(out) == before
    state.write_text(said)
    run(world, out, steps=4, resume="force")
    tiny.assert_close(tiny.final(out), tiny.final(tmp_path / "whole"), 0)
    assert metrics(out) == metrics(tmp_path / "whole") and (out / "checkpoint/step-old").exists()


def test_fewer_steps_than_were_made_are_refused(world, tmp_path):
    """Two steps of a run that has made three cannot be had: no final/ that says so."""
    first = run(world, tmp_path)
    shutil.rmtree(tmp_path / "final")
    with pytest.raises(InputError, match="step 3 already, after --steps=2"):
        run(world, tmp_path, steps=2, resume="force")
    assert not (tmp_path / "final").exists() and metrics(tmp_path) == first
    assert run(world, tmp_path) == first and (tmp_path / "final").exists()


def test_a_checkpoint_of_another_shape_is_named(world, tmp_path):
    """Another width, more layers, fewer, another architecture, another optimizer: one line, nothing lost."""
    out = tmp_path / "out"
    run(world, out)
    before = contents(out)
    others = {"wide": dict(intermediate_size=64), "deep": dict(num_hidden_layers=3),
              "shallow": dict(num_hidden_layers=1), "neox": dict(family="neox")}
    models = [dict(model=str(tiny.folder(tmp_path / name, **sizes))) for name, sizes in others.items()]
    for changes in (*models, dict(optimizer="adam")):
        with pytest.raises(InputError, match=f"{out}/checkpoint/step-3 does not fit") as refused:
            run(world, out, steps=4, resume="force", **changes)
        assert "\n" not in str(refused.value) and contents(out) == before


# ------------------------------------------------------------------------------------------------------------
# Somebody else's

def test_an_out_dir_has_one_writer(world, tmp_path):
    """The second run is refused in a sentence and changes nothing; when the first is gone the lock is too."""
    first = tiny.trainer(world, tmp_path, recipe="dpo")
    with first.out.locked(), pytest.raises(InputError, match="another run is writing to --out_dir"):
        run(world, tmp_path)
    assert not contents(tmp_path) and len(run(world, tmp_path)) == 3


def test_what_is_read_or_foreign_is_never_overwritten(world, tmp_path):
    """The model's folder, a place in it, beside the data; a folder or file of another kind; a run whose
    config.json is lost. Nothing is written or deleted, whatever --resume says."""
    folder, out = tiny.folder(tmp_path / "model"), tmp_path / "out"
    run(world, out, recipe="osp", steps=2)
    rollouts = str(out / "rollouts.jsonl")
    for name in ("foreign/metrics.jsonl", "precious/final/mine.txt", "file"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"step": 7}\n')
    before = contents(tmp_path)
    for place, changes, words in (
            (folder, {}, "lies in the model folder"), (folder / "run", {}, "lies in the model folder"),
            (folder / "a" / "b", {}, "lies in the model folder"),
            (out, dict(data=[rollouts], resume="never"), "would overwrite .*rollouts.jsonl"),
            (out, dict(data=[rollouts + ":0.5"], resume="force"), "would overwrite .*rollouts.jsonl"),
            (out, dict(eval_data=[rollouts], resume="never"), "would overwrite .*rollouts.jsonl"),
            (out, dict(model=str(out / "final"), resume="never"), "would overwrite"),
            (tmp_path / "foreign", dict(resume="never"), "files of another kind"),
            (tmp_path / "precious", {}, "files of another kind"),
            (tmp_path / "file" / "out", {}, "cannot be read: Not a directory")):
        with pytest.raises(InputError, match=words):
            run(world, place, **{"model": str(folder), **changes})
        assert contents(tmp_path) == before, place
