"""What the reference says of fixed pairs, computed once: the same training, a key that says what it is of."""
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import forest
import losses
import tiny
import train
from support import loop
from support.cli import InputError
from support.reference_cache import ReferenceCache
from tiny import run, trainer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model folder, a sharp one, and a file of 13 pairs."""
    path = tmp_path_factory.mktemp("world")
    tiny.folder(path / "model")
    tiny.folder(path / "sharp", scale=1.0)
    tiny.write_jsonl(path / "pairs.jsonl", tiny.pairs(13, seed=1))
    return path


@pytest.mark.parametrize("recipe", ["dpo", "sr-dpo"])
def test_a_cached_reference_changes_nothing(recipe, world, tmp_path, monkeypatch):
    """With another model as reference, held-out rows included; the second run with the cache loads no
    reference at all, and writes nothing."""
    monkeypatch.setattr(loop, "rounded", lambda record: record)
    changes = dict(recipe=recipe, reference=str(world / "sharp"), eval_data=[f"{world}/pairs.jsonl:0.5"])
    plain, cache = run(world, tmp_path / "plain", **changes), tmp_path / "cache" / "below"
    assert abs(plain[0]["margin"]) > 0.1 and "eval_margin" in plain[-1]
    changes["reference_cache"] = str(cache)
    run(world, tmp_path / "first", **changes)
    file, = cache.iterdir()
    written = file.stat().st_mtime_ns
    monkeypatch.delattr(train.Networks, "load_frozen")
    run(world, tmp_path / "second", **changes)
    assert list(cache.iterdir()) == [file] and file.stat().st_mtime_ns == written
    tiny.assert_same_run(tmp_path / "first", tmp_path / "plain", 1e-9)
    tiny.assert_same_run(tmp_path / "second", tmp_path / "first", 0)           # read back bit for bit


def test_cached_values_are_the_references(world, tmp_path):
    """Read alone after x and after p⊕x, each response has the cached value; the margins are the same."""
    changes = dict(recipe="sr-dpo", reference=str(world / "sharp"))
    plain = trainer(world, tmp_path / "out", **changes)
    cached = trainer(world, tmp_path / "out", reference_cache=str(tmp_path), **changes)
    assert plain.reference is not None and cached.reference is None
    values = load_file(next(tmp_path.glob("reference-*.safetensors")))
    assert sorted(values) == ["refined_x", "state", "x"] and not torch.equal(values["x"], values["refined_x"])
    for query in ("x", "refined_x"):
        for pair, expected in zip(plain.data.rows, values[query], strict=True):
            x = getattr(pair, query)
            with torch.no_grad():
                alone = [losses.logprobs(plain.reference, forest.pack([x + y]), [len(x)]).item()
                         for y in (pair.chosen, pair.rejected)]
            assert expected.tolist() == pytest.approx(alone, abs=1e-9)
        ours, theirs = (some.margin(some.data.rows[3:8], query)[0] for some in (plain, cached))
        assert (ours - theirs).abs().max() < 1e-9 and ours.abs().min() > 0


def test_only_what_the_reference_says_is_in_the_key(world, tmp_path):
    """Weights, rows, p, compute type and cuts make another file; the optimizer, the loss and the folder's
    name do not."""
    copy, rows = tmp_path / "copy", tiny.pairs(13, seed=1)
    shutil.copytree(world / "model", copy)
    rows[12]["rejected"] += " The small river sings."
    other = tiny.write_jsonl(tmp_path / "other.jsonl", rows)

    def name(**changes):
        made = trainer(world, tmp_path / "out", **{"recipe": "dpo", **changes})
        made.settings.reference_cache = str(tmp_path / "nowhere")
        pairs = made.data.rows + made.data.held_out
        return ReferenceCache(made.settings, made.dtype, pairs, made.recipe.is_refined).path.name
    key, p = name(), dict(recipe="sr-dpo", refinement_prompt="Please: ")
    same = [dict(batch_size=2), dict(lr=1.0), dict(beta=0.7), dict(recipe="ipo"), dict(seed=5),
            dict(reference=str(copy)), dict(max_length=400, max_prompt_length=200)]
    assert {name(**changes) for changes in same} == {key} and name(**p) == name(**p, lam=0.7)
    others = [dict(reference=str(world / "sharp")), dict(data=[other]), dict(dtype="float32"),
              dict(max_length=40), dict(eval_data=[other]), dict(recipe="sr-dpo"), p]
    assert len({key, *(name(**changes) for changes in others)}) == 1 + len(others)
    weights = load_file(copy / "model.safetensors")
    next(iter(weights.values()))[0, 0] += 1e-3
    save_file(weights, copy / "model.safetensors")
    assert name(reference=str(copy)) != key


def test_a_damaged_cache_is_named(world, tmp_path):
    """Cut off, of another shape, of another type, or another file altogether: it is left as it is."""
    def make():
        return trainer(world, tmp_path / "out", recipe="dpo", reference_cache=str(tmp_path / "cache"))
    make()
    file, = (tmp_path / "cache").iterdir()
    whole, x = file.read_bytes(), load_file(file)["x"]
    assert x.shape == (13, 2) and x.dtype == torch.float64
    damaged = [whole[:-1], whole[:20], b""]
    for wrong in ({"x": x[1:]}, {"x": x.float()}, {"refined_x": x}, {"x": x, "refined_x": x.clone()}):
        save_file(wrong, tmp_path / "wrong")
        damaged.append((tmp_path / "wrong").read_bytes())
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(InputError, match=file.name):
            make()
        assert file.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_named(world, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for folder in (file, file / "cache"):
        with pytest.raises(InputError, match=f"--reference_cache={folder} cannot be written"):
            trainer(world, tmp_path / "out", recipe="dpo", reference_cache=str(folder))
    assert file.read_text() == "mine"
