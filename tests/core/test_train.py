"""The loop: every recipe from end to end, one trajectory however the batch is split, resume, and what is refused."""
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from support import checkpoint
import data
import model
import tiny
import train
from support.cli import InputError

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("OSPREY_DATA", ROOT.parent / "shared/data"))
OFFLINE = ["dpo", "ipo", "sr-dpo", "sr-ipo"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model folder, one whose judgements are sharp, and a file of 13 pairs."""
    path = tmp_path_factory.mktemp("world")
    tiny.folder(path / "model")
    tiny.folder(path / "sharp", scale=1.0)
    tiny.write_jsonl(path / "pairs.jsonl", tiny.pairs(13, seed=1))
    return path


def settings(world, out, **changes):
    """Settings of a short float64 run whose steps are large enough to see; all of it as plain values."""
    return {"model": str(world / "model"), "data": [str(world / "pairs.jsonl")], "out_dir": str(out), "steps": 3,
            "batch_size": 4, "lr": 1e-3, "warmup_steps": 0, "max_length": 96, "max_tokens": 12, "k": 4, "dtype": "float64",
            **changes}


def run(world, out, **changes):
    train.Trainer(train.Settings(**settings(world, out, **changes))).run()
    return metrics(out)


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def figures(rows):
    """The metrics without times, which differ from run to run."""
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def assert_same(first, second, tolerance):
    assert len(first) == len(second)
    for a, b in zip(figures(first), figures(second)):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), (a["step"], key)


def assert_same_weights(first, second, tolerance):
    a, b = (load_file(Path(out) / "final" / "model.safetensors") for out in (first, second))
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance, name


# ---------------------------------------------------------------------------------------------------------------------
# Recipes

@pytest.mark.parametrize("family", ["llama", "neox"])
@pytest.mark.parametrize("recipe", list(train.RECIPES))
def test_recipe_from_end_to_end(recipe, family, world, tmp_path):
    """Each recipe runs on both architectures, starts at the loss that algebra gives, and leaves what transformers loads."""
    folder = tiny.folder(tmp_path / "model", family)
    rows = run(world, tmp_path / "out", model=str(folder), recipe=recipe, dtype="float32")
    assert [row["step"] for row in rows] == [1, 2, 3]
    # At π = π_ref every margin is 0: -log ½ for the logistic losses and p-weighted SPCE, (1/2β)² = 25 for IPO at β = 0.1.
    first = {"sft": None, "ipo": 25.0, "sr-ipo": 25.0}.get(train.RECIPES[recipe].loss, math.log(2))
    if first is not None:
        assert rows[0]["loss"] == pytest.approx(first, rel=1e-7)
        assert rows[0]["margin"] == 0
        assert (rows[1]["margin"] == 0) == (recipe == "spin")          # three iterations in three steps: each starts anew
    ours, theirs = model.load(tmp_path / "out/final"), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/final")
    before = model.load(folder)
    tokens = torch.randint(0, 400, (2, 40), generator=torch.Generator().manual_seed(0))
    assert (ours.head(ours(tokens)) - theirs(tokens).logits).abs().max() < 1e-4
    assert (ours.head(ours(tokens)) - before.head(before(tokens))).abs().max() > 1e-3
    text = "The small river sings."
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out/final").encode(text, add_special_tokens=False) == \
        data.load_tokenizer(tmp_path / "out/final").encode(text)


@pytest.mark.parametrize("recipe", OFFLINE)
def test_one_update_widens_the_margin(recipe, world, tmp_path):
    """On the batch it was made from, one small step moves h up: -dloss/dh is positive at h = 0 for all four."""
    rows = run(world, tmp_path, recipe=recipe, steps=2, batch_size=13, optimizer="adam", lr=1e-4)
    assert rows[0]["margin"] == 0 and rows[1]["margin"] > 0
    assert rows[1]["loss"] < rows[0]["loss"]


def test_one_update_moves_the_strength_towards_the_judge(world, tmp_path):
    """SPCE on fixed pairs with known p: p̂ starts at ½ and moves up where p = 0.9, down where p = 0.1."""
    trainer = train.Trainer(train.Settings(**settings(world, tmp_path, recipe="osp", optimizer="adam", lr=1e-3)))
    pairs = trainer.data.tokenizer, [data.Row(r["prompt"], r["chosen"], r["rejected"], None, "") for r in tiny.pairs(6, 5)]
    encoded, _ = data.encode_dataset(*pairs, "hh", 96, 48)
    for i, pair in enumerate(encoded):
        pair.p = 0.9 if i % 2 else 0.1
    trainer.rollout = lambda step, share, log: encoded
    p_hat = lambda: trainer.score(encoded, "x", grad=False)[2].mul(trainer.settings.beta).sigmoid()      # noqa: E731
    assert p_hat().tolist() == [0.5] * 6
    trainer.update(0)
    assert all((after > 0.5) == (pair.p > 0.5) for after, pair in zip(p_hat().tolist(), encoded))


def test_lambda_zero_is_the_plain_loss_bit_for_bit(world, tmp_path):
    for plain in ("dpo", "ipo"):
        run(world, tmp_path / plain, recipe=plain)
        run(world, tmp_path / f"sr-{plain}", recipe=f"sr-{plain}", lam=0.0)
        assert_same_weights(tmp_path / plain, tmp_path / f"sr-{plain}", 0)


def test_overfits_its_pairs(world, tmp_path):
    for recipe in OFFLINE:
        rows = run(world, tmp_path / recipe, recipe=recipe, steps=25, batch_size=13, optimizer="adam", lr=3e-3)
        assert rows[-1]["accuracy"] >= 0.95 and rows[-1]["loss"] < rows[0]["loss"] / 2


def test_sampling_prompt_by_prompt_is_sampling_together(world, tmp_path, monkeypatch):
    """How many prompts share a forward pass is a matter of memory: rollouts, strengths and weights are the same."""
    asked = []
    generate = train.sample.generate
    monkeypatch.setattr(train.sample, "generate", lambda net, prompts, *rest: asked.append(len(prompts)) or
                        generate(net, prompts, *rest))
    for size in (None, 1, 3):
        with monkeypatch.context() as patch:
            if size:
                patch.setattr(train.Trainer, "prompts_at_a_time", lambda trainer, share: size)
            run(world, tmp_path / str(size), model=str(world / "sharp"), recipe="osp")
    assert asked == [4] * 3 + [1] * 12 + [3, 1] * 3
    lines = [(tmp_path / name / "rollouts.jsonl").read_text().splitlines() for name in ("None", "1", "3")]
    assert len(lines[0]) == 3 * 4 * 2 and lines[0] == lines[1] == lines[2]
    for name in ("1", "3"):
        assert_same(metrics(tmp_path / name), metrics(tmp_path / "None"), 1e-7)
        assert_same_weights(tmp_path / name, tmp_path / "None", 1e-10)


def test_prompts_sampled_together_fit_into_memory(world, tmp_path):
    """Keys and values of so many prompts with all their responses stay within 1 GiB, one prompt more does not; never none."""
    trainer = train.Trainer(train.Settings(**settings(world, tmp_path, recipe="osp")))
    share, longest = trainer.share(0), max(len(row.x) for _, row in trainer.share(0))
    for k, max_tokens in ((4, 12), (1000, 5), (7, 10**9)):
        trainer.samples, trainer.data.max_tokens = k, max_tokens
        each = (longest + k * max_tokens) * 2 * 2 * 2 * 8 * 8                # K and V, layers, heads, their width, bytes
        count = trainer.prompts_at_a_time(share)
        assert count >= 1 and (count + 1) * each > 1 << 30 and (count * each <= 1 << 30 or count == 1)


def test_a_sample_changes_after_an_update(world, tmp_path):
    """The policy that samples is the updated one: with the same uniforms the rollouts of two runs part after step 1."""
    for name, lr in (("still", 1e-9), ("moving", 3e-2)):
        run(world, tmp_path / name, recipe="osp", lr=lr, steps=2)
    still, moving = ([json.loads(line) for line in (tmp_path / name / "rollouts.jsonl").read_text().splitlines()]
                     for name in ("still", "moving"))
    first = lambda rows: [(r["chosen"], r["rejected"]) for r in rows if r["step"] == 1]       # noqa: E731
    second = lambda rows: [(r["chosen"], r["rejected"]) for r in rows if r["step"] == 2]      # noqa: E731
    assert first(still) == first(moving) and second(still) != second(moving)


def test_rollouts_can_be_read_as_data(world, tmp_path):
    run(world, tmp_path, recipe="osp", steps=2)
    rows, report = data.read_rows(str(tmp_path / "rollouts.jsonl"), "pairs")
    assert len(rows) + sum(map(len, report.skipped.values())) == 2 * 4 * 2          # steps × prompts × K // 2
    assert all(0 < row.p < 1 for row in rows)


def test_a_replayed_rollout_names_its_winner_and_keeps_its_ends(world, tmp_path):
    """dpo on rows with p: p < ½ swaps the pair, p = ½ drops it; a response that was cut gets no EOS."""
    row = {"prompt": "What?", "chosen": " river", "rejected": " cloud"}
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", [row | {"p": 0.9}, row | {"p": 0.2}, row | {"p": 0.5},
                                                      row | {"p": 0.7, "finished": [False, True]}])
    trainer = train.Trainer(train.Settings(**settings(world, tmp_path / "out", recipe="dpo", data=[file])))
    kept, swapped, cut = trainer.data.rows
    assert (kept.chosen, kept.rejected) == (swapped.rejected, swapped.chosen)
    eos = trainer.tokenizer.eos_id
    assert kept.chosen == cut.chosen + [eos] and kept.rejected == cut.rejected and eos not in cut.chosen


def test_prompt_and_answer_fit_into_max_length(world, tmp_path):
    """BOS included: the longest prompt with max_tokens behind it has exactly max_length tokens."""
    prompt = tiny.write_jsonl(tmp_path / "long.jsonl", [{"prompt": "The small river sings. " * 50}])
    trainer = train.Trainer(train.Settings(**settings(world, tmp_path / "out", recipe="osp", data=[prompt], max_length=40)))
    assert len(trainer.data.rows[0].x) + trainer.data.max_tokens == 40


def test_held_out_rows_are_evaluated(world, tmp_path):
    """eval_ figures on the training rows themselves at step 1 are the training figures of an unchanged policy."""
    rows = run(world, tmp_path, recipe="sr-dpo", eval_data=[str(world / "pairs.jsonl")], eval_every=2, lr=1e-12, batch_size=13)
    assert "eval_loss" not in rows[0] and {"eval_loss", "eval_margin", "eval_augmented_accuracy"} < rows[1].keys()
    assert rows[1]["eval_chosen_logp"] == pytest.approx(rows[0]["chosen_logp"], rel=1e-6)


def test_fixed_pairs_have_no_sampled_kl(world, tmp_path):
    """kl is a mean over fresh samples: an online run has it in training, not over its held-out pairs, which have p = 1."""
    held_out = [str(world / "pairs.jsonl")]
    rows = run(world, tmp_path, recipe="osp", eval_data=held_out, eval_every=1, reference=str(world / "sharp"))
    for row in rows:
        assert row["kl"] != 0 and row["eval_p"] == 1
        assert {"eval_loss", "eval_margin", "eval_accuracy", "eval_p_hat"} < row.keys()
        assert not {"eval_kl", "eval_response_length", "eval_finished"} & row.keys()


def test_judge_instructions_fit_into_max_length(world, tmp_path, capsys):
    """Their last id is the answer, A as often as B; what was too long is said, and so are responses that stand alone."""
    rows = [row | {"rejected": row["rejected"] * (1 + i % 6)} for i, row in enumerate(tiny.pairs(12, seed=2))]
    alone = [{"prompt": row["prompt"], "response": row["chosen"] * 20} for row in rows[:2]]
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", rows + alone)
    lengths = {}
    for max_length in (200, None):
        changes = dict(recipe="judge", data=[file], max_length=max_length)
        trainer = train.Trainer(train.Settings(**settings(world, tmp_path / "out", **changes)))
        lengths[max_length] = [len(sequence.ids) for sequence in trainer.data.rows]
        told, a, b = capsys.readouterr().out, *trainer.data.questioner.encode("", "", "")[1]
        answers = [sequence.ids[sequence.start:] for sequence in trainer.data.rows[:12]]
        assert answers.count([a]) == answers.count([b]) == 6
        assert ("shortened to the context" in told) == (max_length == 200)
    assert max(lengths[200]) == 200 < max(lengths[None]) <= 512 and len(lengths[200]) == 14


# ---------------------------------------------------------------------------------------------------------------------
# The reference's log-probabilities, kept

def cache_path(world, out, **changes):
    """The one file that a dpo run with these settings would read or write; `out` stays empty."""
    trainer = train.Trainer(train.Settings(**settings(world, out, **{"recipe": "dpo", **changes})))
    rows = trainer.data.rows + (trainer.data.held_out or [])
    trainer.settings.reference_cache = str(world / "nowhere")
    return checkpoint.ReferenceCache(trainer.settings, trainer.dtype, rows, trainer.recipe.loss.startswith("sr-")).path


@pytest.mark.parametrize("recipe", ["dpo", "sr-dpo"])
def test_a_cached_reference_changes_nothing(recipe, world, tmp_path, monkeypatch):
    """With another model as reference, held-out rows included; the second run with the cache loads no reference at all."""
    changes = dict(recipe=recipe, reference=str(world / "sharp"), eval_data=[str(world / "pairs.jsonl") + ":0.5"])
    plain = run(world, tmp_path / "plain", **changes)
    assert abs(plain[0]["margin"]) > 0.1 and "eval_margin" in plain[-1]
    changes["reference_cache"] = str(tmp_path / "cache" / "below")
    assert_same(run(world, tmp_path / "first", **changes), plain, 1e-7)          # metrics.jsonl keeps eight digits
    file, = (tmp_path / "cache" / "below").iterdir()
    written = file.stat().st_mtime_ns
    assert file.name.startswith("reference-") and file.suffix == ".safetensors"
    monkeypatch.delattr(train.Trainer, "load_frozen")
    assert_same(run(world, tmp_path / "second", **changes), plain, 1e-7)
    assert [path.stat().st_mtime_ns for path in (tmp_path / "cache" / "below").iterdir()] == [written]
    assert_same_weights(tmp_path / "first", tmp_path / "plain", 1e-9)
    assert_same_weights(tmp_path / "second", tmp_path / "first", 0)              # read back bit for bit


def test_cached_values_are_the_references(world, tmp_path):
    """Scored alone behind x and behind p⊕x, each response has the cached value; score gives the same margins from both."""
    changes = dict(recipe="sr-dpo", reference=str(world / "sharp"))
    plain = train.Trainer(train.Settings(**settings(world, tmp_path / "out", **changes)))
    cached = train.Trainer(train.Settings(**settings(world, tmp_path / "out", reference_cache=str(tmp_path), **changes)))
    assert plain.reference is not None and cached.reference is None
    values = load_file(next(tmp_path.glob("reference-*.safetensors")))
    assert sorted(values) == ["px", "x"] and not torch.equal(values["x"], values["px"])
    for i, pair in enumerate(plain.data.rows):
        for query, x in (("x", pair.x), ("px", pair.px)):
            for j, y in enumerate((pair.chosen, pair.rejected)):
                with torch.no_grad():
                    alone = train.losses.logprobs(plain.reference, data.pack([x + y]), [len(x)]).item()
                assert values[query][i, j].item() == pytest.approx(alone, abs=1e-9)
    for query in ("x", "px"):
        margins = [trainer.score(trainer.data.rows[3:8], query, grad=False)[2] for trainer in (plain, cached)]
        assert (margins[0] - margins[1]).abs().max() < 1e-9 and margins[0].abs().min() > 0


def test_only_what_the_reference_says_is_in_the_key(world, tmp_path):
    """Weights, rows, p, compute type and cuts make another file; the optimizer, the loss and the folder's name do not."""
    out, q = tmp_path / "out", dict(recipe="sr-dpo", refinement_prompt="Please: ")
    key = cache_path(world, out)
    copy = tmp_path / "copy"
    shutil.copytree(world / "model", copy)
    same = [dict(batch_size=2), dict(lr=1.0), dict(beta=0.7), dict(recipe="ipo"), dict(seed=5), dict(micro_batch_size=1),
            dict(reference=str(copy)), dict(max_length=400, max_prompt_length=200)]
    assert {cache_path(world, out, **changes) for changes in same} == {key}
    rows = tiny.pairs(13, seed=1)
    rows[12]["rejected"] += " The small river sings."
    other = tiny.write_jsonl(tmp_path / "other.jsonl", rows)
    others = [dict(reference=str(world / "sharp")), dict(data=[other]), dict(dtype="float32"), dict(max_length=40),
              dict(eval_data=[other]), dict(recipe="sr-dpo"), q]
    assert len({key, *(cache_path(world, out, **changes) for changes in others)}) == 1 + len(others)
    assert cache_path(world, out, **q) == cache_path(world, out, **q, lam=0.7)
    weights = load_file(copy / "model.safetensors")
    next(iter(weights.values()))[0, 0] += 1e-3
    save_file(weights, copy / "model.safetensors")
    assert cache_path(world, out, reference=str(copy)) != key


def test_a_damaged_cache_is_named(world, tmp_path):
    """Cut off, of another shape, of another type, or another file altogether."""
    changes = dict(recipe="dpo", reference_cache=str(tmp_path / "cache"))
    train.Trainer(train.Settings(**settings(world, tmp_path / "out", **changes)))
    file, = (tmp_path / "cache").iterdir()
    whole, values = file.read_bytes(), load_file(file)
    assert values.keys() == {"x"} and values["x"].shape == (13, 2) and values["x"].dtype == torch.float64
    damaged = [whole[:-1], whole[:20], b""]
    for wrong in ({"x": values["x"][1:]}, {"x": values["x"].float()}, {"px": values["x"]}, {**values, "px": values["x"].clone()}):
        save_file(wrong, tmp_path / "wrong")
        damaged.append((tmp_path / "wrong").read_bytes())
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(InputError, match=file.name):
            train.Trainer(train.Settings(**settings(world, tmp_path / "out", **changes)))
        assert file.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_named(world, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(InputError, match=f"--reference_cache={folder} cannot be written"):
            train.Trainer(train.Settings(**settings(world, tmp_path / "out", recipe="dpo", reference_cache=str(folder))))
    assert (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------------------------------------------------------------
# One trajectory

@pytest.mark.parametrize("recipe", ["sft", "sr-dpo", "osp"])
def test_accumulation_does_not_change_the_trajectory(recipe, world, tmp_path):
    rows = {size: run(world, tmp_path / str(size), recipe=recipe, micro_batch_size=size) for size in (1, 3, 4)}
    assert_same(rows[1], rows[4], 1e-7)           # metrics.jsonl keeps eight digits
    assert_same(rows[3], rows[4], 1e-7)
    assert_same_weights(tmp_path / "1", tmp_path / "4", 1e-10)
    assert_same_weights(tmp_path / "3", tmp_path / "4", 1e-10)


def test_ranks_work_on_disjoint_rows(world, tmp_path):
    """Each global batch is split without overlap, and an epoch holds every row once."""
    trainer = train.Trainer(train.Settings(**settings(world, tmp_path, recipe="dpo", steps=None, epochs=2)))
    places = []
    for step in range(trainer.steps):
        shares = []
        for rank in range(3):
            trainer.ranks.rank, trainer.ranks.size = rank, 3
            shares.append([place for place, _ in trainer.share(step)])
        assert len(set().union(*shares)) == sum(map(len, shares))
        places += sorted(sum(shares, []))
    assert places == list(range(26))
    trainer.ranks.rank, trainer.ranks.size = 0, 1
    for epoch in range(2):
        rows = [id(row) for _, row in trainer.data.positions(13 * epoch, 13 * (epoch + 1))]
        assert len(set(rows)) == 13
    assert [r for _, r in trainer.data.positions(0, 13)] != [r for _, r in trainer.data.positions(13, 26)]


@pytest.mark.parametrize("recipe", ["dpo", "osp"])
@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_resume_equals_the_uninterrupted_run(recipe, optimizer, world, tmp_path, monkeypatch):
    """Stopped in step 4 of 7 and started again, a run ends with the same bits, in metrics, weights and optimizer."""
    changes = dict(recipe=recipe, optimizer=optimizer, steps=7, save_every=3, dtype="float32")
    whole = run(world, tmp_path / "whole", **changes)
    with tiny.stopped_before(4, monkeypatch):
        run(world, tmp_path / "parts", **changes)
    assert [row["step"] for row in metrics(tmp_path / "parts")] == [1, 2, 3, 4]
    parts = run(world, tmp_path / "parts", **changes)
    assert figures(parts) == figures(whole)
    a, b = ({name: tensor for file in (tmp_path / name / "checkpoint/step-7").glob("*.safetensors")
             for name, tensor in load_file(file).items()} for name in ("whole", "parts"))
    assert a.keys() == b.keys() and any(name.startswith("optimizer.") for name in a)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "whole/rollouts.jsonl").exists() == (recipe == "osp")
    if recipe == "osp":
        assert (tmp_path / "whole/rollouts.jsonl").read_text() == (tmp_path / "parts/rollouts.jsonl").read_text()


def test_a_finished_run_prints_its_result_again(world, tmp_path, capsys):
    first = run(world, tmp_path, recipe="dpo")
    weights = (tmp_path / "final/model.safetensors").stat().st_mtime_ns
    assert "is finished" not in capsys.readouterr().out
    assert run(world, tmp_path, recipe="dpo") == first
    assert "is finished" in capsys.readouterr().out
    assert (tmp_path / "final/model.safetensors").stat().st_mtime_ns == weights


def test_other_settings_in_a_used_out_dir_are_named(world, tmp_path):
    run(world, tmp_path, recipe="dpo")
    with pytest.raises(InputError, match="beta.*0.1 → 0.3"):
        run(world, tmp_path, recipe="dpo", beta=0.3)
    assert len(run(world, tmp_path, recipe="dpo", beta=0.3, resume="never")) == 3


def test_changed_inputs_of_a_finished_run_are_named(world, tmp_path, capsys):
    """The same settings with other contents behind them: data, held-out rows, weights. Restored, the run is finished again."""
    folder = tiny.folder(tmp_path / "model")
    file, held_out = (Path(tiny.write_jsonl(tmp_path / f"{name}.jsonl", tiny.pairs(6, seed=3))) for name in ("data", "held_out"))
    changes = dict(model=str(folder), recipe="dpo", data=[str(file)], eval_data=[str(held_out)])
    first = run(world, tmp_path / "out", **changes)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for path in (file, held_out, folder / "model.safetensors"):
        whole = path.read_bytes()
        at = len(whole) * 3 // 4
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])        # one bit, the same size
        named = folder if path.parent == folder else path
        with pytest.raises(InputError, match=f"the contents of {named};"):
            run(world, tmp_path / "out", **changes)
        path.write_bytes(whole)
        capsys.readouterr()
        assert run(world, tmp_path / "out", **changes) == first
        assert "is finished" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_force_goes_on_with_changed_inputs(world, tmp_path):
    """The run keeps its steps, goes on with the new rows, and those are its inputs from then on."""
    file = tmp_path / "data.jsonl"
    changes = dict(recipe="dpo", data=[tiny.write_jsonl(file, tiny.pairs(6, seed=3))])
    first = run(world, tmp_path / "out", **changes)
    tiny.write_jsonl(file, tiny.pairs(6, seed=4))
    rows = run(world, tmp_path / "out", **changes, steps=5, resume="force")
    assert rows[:3] == first and [row["step"] for row in rows[3:]] == [4, 5]
    fresh = run(world, tmp_path / "fresh", **changes, steps=5)
    assert fresh[0]["chosen_logp"] != first[0]["chosen_logp"] and fresh[4]["loss"] != rows[4]["loss"]
    assert run(world, tmp_path / "out", **changes, steps=5) == rows


def test_what_a_crash_leaves_behind(world, tmp_path, monkeypatch):
    """A torn last line does not stop a resume, and a run that was forced on is finished only when it is."""
    whole = run(world, tmp_path / "whole", recipe="dpo", steps=4)
    out = tmp_path / "out"
    run(world, out, recipe="dpo", steps=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.OutDir, "save", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt))
        run(world, out, recipe="dpo", steps=4, resume="force")
    assert not (out / "final").exists()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    assert figures(run(world, out, recipe="dpo", steps=4)) == figures(whole)
    assert_same_weights(out, tmp_path / "whole", 0)


def test_out_dir_is_not_somebody_elses(world, tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final/precious.txt").write_text("mine")
    with pytest.raises(InputError, match="files of another kind"):
        run(world, tmp_path, recipe="dpo")
    with pytest.raises(InputError, match="would overwrite"):
        run(world, world / "model", recipe="dpo")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written: a file"):
        run(world, tmp_path / "file" / "out", recipe="dpo")
    assert (tmp_path / "final/precious.txt").read_text() == "mine"


def test_an_out_dir_among_what_is_read_is_refused(world, tmp_path):
    """In the model's folder, beside the data, in a copied run that lacks its config.json: nothing is written or deleted."""
    folder = tiny.folder(tmp_path / "model")
    out = tmp_path / "out"
    run(world, out, recipe="osp", steps=2)
    rollouts = str(out / "rollouts.jsonl")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "metrics.jsonl").write_text('{"step": 7}\n')
    contents = lambda: {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}     # noqa: E731
    before = contents()
    for place, changes, words in ((folder, {}, "would overwrite"), (folder / "run", {}, "lies in the model folder"),
                                  (folder / "a" / "b", {}, "lies in the model folder"),
                                  (out, dict(recipe="dpo", data=[rollouts], resume="never"), "rollouts.jsonl lies in --out_dir"),
                                  (out, dict(data=[rollouts + ":0.5"], resume="force"), "rollouts.jsonl lies in --out_dir"),
                                  (out, dict(eval_data=[rollouts], resume="never"), "rollouts.jsonl lies in --out_dir"),
                                  (out, dict(model=str(out / "final"), resume="never"), "would overwrite"),
                                  (tmp_path / "foreign", {}, "files of another kind"),
                                  (tmp_path / "foreign", dict(resume="never"), "files of another kind")):
        with pytest.raises(InputError, match=words):
            run(world, place, **{"recipe": "osp", "model": str(folder), **changes})
        assert contents() == before, place


def test_a_run_that_diverges_stops_with_a_sentence(world, tmp_path):
    """A learning rate of 1e30: from the second step on nothing is finite; five such steps end the run, and the weights and
    the checkpoint are those of the first."""
    with pytest.raises(InputError, match="step 6: .*not finite, for 5 steps in a row; the run stops and keeps step-5"):
        run(world, tmp_path, recipe="dpo", steps=9, lr=1e30, dtype="float32", grad_clip=0.0, save_every=1)
    rows = metrics(tmp_path)
    assert [row["skipped"] for row in rows] == [0, 1, 2, 3, 4] and rows[1]["grad_norm"] is None


def test_all_models_of_a_run_share_a_tokenizer(world, tmp_path):
    other = tiny.folder(tmp_path / "other", "neox")
    with pytest.raises(InputError, match="different tokenizers"):
        run(world, tmp_path / "out", recipe="osp", judge=str(other))


def test_a_damaged_checkpoint_is_named(world, tmp_path):
    run(world, tmp_path, recipe="dpo", save_every=1)
    (tmp_path / "final").rename(tmp_path / "gone")
    shard = next((tmp_path / "checkpoint/step-3").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(InputError, match=shard.name):
        run(world, tmp_path, recipe="dpo", save_every=1)


def test_only_whole_checkpoints_count(world, tmp_path):
    """A folder step-old is nobody's checkpoint; a state.json that says nothing is named; both leave the run as it was."""
    whole = run(world, tmp_path / "whole", recipe="dpo", steps=4)
    out = tmp_path / "out"
    run(world, out, recipe="dpo", steps=2)
    (out / "checkpoint" / "step-old").mkdir()
    (out / "checkpoint" / "step-old" / "state.json").write_text("{}")
    (out / "checkpoint" / "step-9").mkdir()                                      # not finished: it has no state.json
    state = out / "checkpoint" / "step-2" / "state.json"
    said = state.read_text()
    for text in ("{}", '{"step": "2", "files": {}}', '{"step": 2}', '{"step": 2, "files": []}', "[]", "{"):
        state.write_text(text)
        with pytest.raises(InputError, match="step-2/state.json"):
            run(world, out, recipe="dpo", steps=4, resume="force")
        assert len(metrics(out)) == 2 and (out / "final").exists()
    state.write_text(said)
    assert figures(run(world, out, recipe="dpo", steps=4, resume="force")) == figures(whole)
    assert_same_weights(out, tmp_path / "whole", 0)
    assert (out / "checkpoint" / "step-old").exists()


def test_steps_behind_the_checkpoint_are_refused(world, tmp_path):
    """Two steps of a run that has made three cannot be had: no final/ that says so."""
    first = run(world, tmp_path, recipe="dpo")
    shutil.rmtree(tmp_path / "final")
    with pytest.raises(InputError, match="step 3 already, behind --steps=2"):
        run(world, tmp_path, recipe="dpo", steps=2, resume="force")
    assert not (tmp_path / "final").exists() and metrics(tmp_path) == first
    assert run(world, tmp_path, recipe="dpo") == first and (tmp_path / "final").exists()


def test_a_checkpoint_of_another_shape_is_named(world, tmp_path):
    """Another width, more layers, another architecture, another optimizer: one line that names the checkpoint, nothing lost."""
    out = tmp_path / "out"
    first = run(world, out, recipe="dpo")
    others = {"wide": dict(intermediate_size=64), "deep": dict(num_hidden_layers=3), "shallow": dict(num_hidden_layers=1),
              "neox": dict(family="neox")}
    models = [dict(model=str(tiny.folder(tmp_path / name, **sizes))) for name, sizes in others.items()]
    for changes in (*models, dict(optimizer="adam")):
        with pytest.raises(InputError) as refused:
            run(world, out, recipe="dpo", steps=4, resume="force", **changes)
        assert f"{out / 'checkpoint/step-3'} does not fit" in str(refused.value) and "\n" not in str(refused.value)
        assert metrics(out) == first and (out / "final").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Settings

def test_learning_rate(world, tmp_path):
    """Warm-up of 4 steps to 1.0, then over 10 - 4 = 6 steps: linear at step 7 is 1 - 3/6, cosine ½ + ½ cos(π/2)."""
    trainer = train.Trainer(train.Settings(**settings(world, tmp_path, recipe="dpo", steps=10, warmup_steps=4, lr=1.0)))
    for schedule, expected in (("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)):
        trainer.settings.lr_schedule = schedule
        assert [trainer.lr_at(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
        assert trainer.lr_at(4) == 1.0 and trainer.lr_at(7) == pytest.approx(expected)


def test_papers_defaults():
    sr, osp = train.Settings(recipe="sr-dpo"), train.Settings(recipe="osp")
    assert (sr.optimizer, sr.lr, sr.batch_size, sr.beta, sr.grad_clip) == ("rmsprop", 5e-7, 64, 0.1, 10.0)
    assert (osp.optimizer, osp.lr, osp.batch_size, osp.beta, osp.k, osp.temperature, osp.top_p) == \
        ("adam", 2e-6, 16, 0.02, 7, 0.7, 0.9)


@pytest.mark.parametrize("axes, word", [(("dpo", "policy", "ranked", "soft"), "labels"), (("spce", "policy", "ranked", "hard"), "labels"),
                                        (("sft", "dataset", None, "hard"), "labels"), (("dpo", "dataset", "ranked", "hard"), "pairs"),
                                        (("spce", "policy", "dataset", "soft"), "pairs")])
def test_senseless_recipes_name_the_axis(axes, word):
    with pytest.raises(InputError, match=word):
        train.Recipe(*axes)


@pytest.mark.parametrize("arguments, words", [
    ("--recipe=ppo", ["--recipe=ppo", "osp"]), ("--k=1", ["--k=1", "at least 2"]), ("--lam=-0.1", ["--lam=-0.1"]),
    ("--beta=0", ["--beta=0"]), ("--beta=nan", ["--beta=nan"]), ("--temperature=0", ["--temperature", "larger than 0"]),
    ("--top_p=1.5", ["--top_p=1.5"]), ("--batchsize=3", ["--batchsize", "--batch_size"]), ("--steps=many", ["--steps=many", "int"]),
    ("--beta", ["--beta", "value"]), ("beta=1", ["beta=1", "--key=value"]), ("--steps=2 --steps=3", ["--steps", "twice"]),
    ("--model=nowhere", ["nowhere"]), ("--dtype=float16", ["--dtype=float16"]), ("--optimizer=sgd", ["--optimizer=sgd"]),
    ("--model={model} --data=nowhere.jsonl", ["nowhere.jsonl"]), ("--model={model}", ["--prompts"]),
    ("--model={model} --recipe=dpo", ["--data"]), ("--model={model} --recipe=dpo --data={pairs} --max_length=4000", ["--max_length=4000", "512"]),
    ("--model={model} --recipe=dpo --data={pairs} --chat=alpaca", ["--chat=alpaca"]),
    ("--model={model} --data={pairs} --max_length=20 --max_tokens=20", ["--max_tokens=20"]),
    ("--model={model} --recipe=dpo --data={pairs} --device=tpu", ["--device=tpu"]), ("--model=", ["--model"]),
])
def test_bad_settings_get_one_sentence(arguments, words, world, tmp_path, monkeypatch, capsys):
    """One line on stderr that names what is wrong, exit status 1, nothing written."""
    arguments = arguments.format(model=world / "model", pairs=world / "pairs.jsonl").split() + [f"--out_dir={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as left:
        train.cli.run(train.main, train.Settings)
    error = capsys.readouterr().err
    assert left.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_help_prints_every_setting(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as left:
        train.cli.run(train.main, train.Settings)
    printed = capsys.readouterr().out
    assert left.value.code == 0
    for field, comment in train.cli.fields_with_comments(train.Settings):
        assert f"--{field.name}=" in printed and comment and comment in printed


USELESS = {
    "sft": "k=3 beta=1 weight_decay=0.1 lam=0.3 reference=x reference_cache=x judge=x judge_task=summary eval_every=1",
    "judge": "beta=1 temperature=0.7 refinement_prompt=x delta_scale=exact max_tokens=8 sample_every=1",
    "dpo": "k=3 lam=0.5 eval_every=1 betas=0.9,0.99 top_p=0.5 judge=x judge_task=helpful prompts={pairs} delta_scale=exact",
    "sr-dpo": "delta_scale=exact weight_decay=0 sample_every=0",
    "sr-ipo": "k=7",
    "osp": "lam=0.5 reference_cache=x refinement_prompt=x eval_every=1 weight_decay=0.1",
}


@pytest.mark.parametrize("recipe", USELESS)
def test_a_setting_without_effect_is_refused(recipe, world, tmp_path, monkeypatch, capsys):
    """Exit status 1 and one sentence with its name, though what was typed be the default."""
    for typed in USELESS[recipe].format(pairs=world / "pairs.jsonl").split():
        code, _, error = tiny.command(train, capsys, monkeypatch, f"--recipe={recipe}", f"--model={world / 'model'}",
                                      f"--data={world / 'pairs.jsonl'}", f"--out_dir={tmp_path / 'out'}", f"--{typed}")
        name = typed.split("=")[0]
        assert code == 1 and error.startswith(f"error: --{name} would change nothing") and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_data_beside_prompts_is_refused(world, tmp_path, monkeypatch, capsys):
    file = world / "pairs.jsonl"
    code, _, error = tiny.command(train, capsys, monkeypatch, f"--model={world / 'model'}", f"--data={file}",
                                  f"--prompts={file}", f"--out_dir={tmp_path / 'out'}")
    assert code == 1 and error.startswith("error: --data would change nothing") and "--prompts" in error


def test_a_setting_with_effect_passes():
    """What each recipe reads, all of it at once and none of it at its default."""
    all_of_them = dict(model="m", data=["d"], eval_data=["e"], eval_every=1, optimizer="adamw", weight_decay=0.1,
                       betas=[0.8, 0.9], lr=1.0, grad_clip=2.0, max_length=50, max_prompt_length=9, chat="hh", keep=3)
    pairs = dict(all_of_them, beta=0.7, reference="r", reference_cache="c")
    refined = dict(pairs, lam=0.7, refinement_prompt="q")
    used = {"sft": all_of_them, "judge": dict(all_of_them, judge_task="summary"), "dpo": pairs, "ipo": pairs, "sr-dpo": refined,
            "sr-ipo": dict(refined, delta_scale="exact"),
            "osp": dict(all_of_them, beta=0.7, reference="r", judge="j", judge_task="summary", k=3, temperature=0.5, top_p=0.5,
                        max_tokens=9, sample_every=1)}
    used["osp with prompts"] = {**used["osp"], "prompts": ["p"], "data": None}
    used |= {name: used["osp"] for name in ("osp-dpo", "osp-ipo", "random-pairs", "self-rewarding", "sft-sampling")}
    used |= {"raft": {key: value for key, value in used["osp"].items() if key not in ("beta", "reference")},
             "spin": {key: value for key, value in used["osp"].items() if "judge" not in key and key != "sample_every"} |
             dict(iterations=1), "rso": dict(used["osp"], candidates=9, rso_beta=0.5),
             "sr-spce": dict(used["osp"], lam=0.7, refinement_prompt="q"),
             "offline-soft": dict(pairs, judge="j", judge_task="summary")}
    assert used.keys() > train.RECIPES.keys()
    for recipe, values in used.items():
        chosen = train.Settings(recipe=recipe.split()[0], **values)
        assert chosen.given.keys() >= values.keys() - {"data"}
        chosen.check_used()
    train.Settings(recipe="osp", eval_every=5, k=3).check_used()         # the toy world has held-out rows of its own


@pytest.mark.parametrize("name", ["data", "prompts", "eval_data", "reference", "judge"])
def test_files_without_a_model_are_refused(name, world, tmp_path, monkeypatch, capsys):
    """A forgotten --model is no wish for the toy world."""
    monkeypatch.setattr("toy.main", lambda settings: pytest.fail("the toy world runs"))
    typed = f"--{name}={world / 'pairs.jsonl'}", f"--out_dir={tmp_path / 'out'}"
    code, _, error = tiny.command(train, capsys, monkeypatch, *typed)
    assert code == 1 and error.startswith(f"error: --{name} needs a model: --model=") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_rows_without_a_winner_are_left_out(world, tmp_path, capsys):
    """p = ½ says nothing to dpo: some such rows are counted, nothing but such rows is an error; held-out rows alike."""
    rows = [row | {"p": p} for row, p in zip(tiny.pairs(5, seed=2), (0.5, 0.9, 0.5, 0.1, 0.5))]
    some = tiny.write_jsonl(tmp_path / "some.jsonl", rows)
    none = tiny.write_jsonl(tmp_path / "none.jsonl", rows[::2])
    trainer = train.Trainer(train.Settings(**settings(world, tmp_path / "out", recipe="dpo", data=[some])))
    assert [pair.row.prompt for pair in trainer.data.rows] == [rows[1]["prompt"], rows[3]["prompt"]]
    assert "3 of 5 pairs have p = ½" in capsys.readouterr().out
    for changes in (dict(data=[none]), dict(eval_data=[none])):
        with pytest.raises(InputError, match="none.jsonl: every pair has p = ½; dpo"):
            train.Trainer(train.Settings(**settings(world, tmp_path / "out", recipe="dpo", **changes)))
    soft = train.Trainer(train.Settings(**settings(world, tmp_path / "out", recipe="osp", eval_data=[none])))
    assert [pair.p for pair in soft.data.held_out] == [0.5] * 3             # a strength of ½ is one to spce


# ---------------------------------------------------------------------------------------------------------------------
# Real data

@pytest.mark.parametrize("recipe", [*OFFLINE, "osp"])
def test_real_checkpoint_on_real_preferences(recipe, tmp_path):
    """stories260K on HH-RLHF: step 0 is exact, a few steps run, final/ equals transformers' reading of it."""
    folder = SHARED / "models/stories260K"
    if not folder.exists():
        pytest.skip(f"shared/data is absent ({SHARED}); set OSPREY_DATA")
    files = [str(SHARED / "hh-rlhf/helpful-base.test.lines-0001-1354.jsonl.gz")]
    train.Trainer(train.Settings(recipe=recipe, model=str(folder), data=files, out_dir=str(tmp_path), steps=2, batch_size=8,
                                 max_length=192, max_tokens=16, k=4)).run()
    rows = metrics(tmp_path)
    assert rows[0]["loss"] == pytest.approx(25.0 if "ipo" in recipe else math.log(2), rel=1e-7)
    tokens = torch.randint(3, 512, (2, 100), generator=torch.Generator().manual_seed(0))
    ours, theirs = model.load(tmp_path / "final"), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert (ours.head(ours(tokens)) - theirs(tokens).logits).abs().max() < 1e-4
    # The source has a bare tokenizer.model; final/ says what it is, so that AutoTokenizer reads it too.
    text = "Once upon a time, there was a girl.\n\nHuman: hi"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "final").encode(text) == \
        [1] + data.load_tokenizer(tmp_path / "final").encode(text)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", OFFLINE)
def test_real_pairs_are_overfitted(recipe, tmp_path):
    """64 HH pairs, 60 steps of Adam: accuracy 95 % and more."""
    folder = SHARED / "models/stories260K"
    if not folder.exists():
        pytest.skip(f"shared/data is absent ({SHARED}); set OSPREY_DATA")
    rows, _ = data.read_rows(str(SHARED / "hh-rlhf/helpful-base.test.lines-0001-1354.jsonl.gz"), "pairs")
    file = tiny.write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
                                                        for row in rows if len(row.chosen) + len(row.rejected) < 600][:64])
    train.Trainer(train.Settings(recipe=recipe, model=str(folder), data=[file], out_dir=str(tmp_path / "out"), steps=60,
                                 batch_size=64, micro_batch_size=32, optimizer="adam", lr=3e-3, max_length=192)).run()
    assert metrics(tmp_path / "out")[-1]["accuracy"] >= 0.95


def test_rows_of_text_take_the_format_and_the_better_response(world, tmp_path):
    """sft with --chat trains on a user's turn, without it on the text; p < ½ takes the rejected response, cut as it was."""
    row = {"prompt": "What is it?", "chosen": "a cloud", "rejected": "a river", "p": 0.1, "finished": [True, False]}
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", [row])
    for chat, text in ((None, "What is it?"), ("hh", "\n\nHuman: What is it?\n\nAssistant:")):
        trainer = train.Trainer(train.Settings(**settings(world, tmp_path / "out", recipe="sft", data=[file], chat=chat)))
        (sequence,), tokenizer = trainer.data.rows, trainer.tokenizer
        assert sequence.ids[:sequence.start] == tokenizer.prefix(False) + tokenizer.encode(text)
        assert sequence.ids[sequence.start:] == tokenizer.encode_after("a river" if chat is None else " a river")


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions

def arguments_of(world, out, **changes):
    given = dict(recipe="dpo", model=world / "model", data=world / "pairs.jsonl", out_dir=out, batch_size=4, dtype="float64",
                 **changes)
    return [f"--{name}={value}" for name, value in given.items()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(number, world, tmp_path):
    """The step under way is finished, a checkpoint is written, the status is 128 + the signal; the resumed run ends with the
    metrics of one that nobody stopped."""
    steps = 400
    running = tiny.launch(arguments_of(world, tmp_path / "cut", steps=steps))
    tiny.until(lambda: tiny.lines(tmp_path / "cut" / "metrics.jsonl") >= 3)
    running.send_signal(number)
    said, _ = running.communicate(timeout=60)
    done = tiny.lines(tmp_path / "cut" / "metrics.jsonl")
    assert running.returncode == 128 + number and f"{number.name}: stopped after step {done} of {steps}" in said
    assert (tmp_path / "cut" / "checkpoint" / f"step-{done}" / "state.json").exists() and 3 <= done < steps
    assert not (tmp_path / "cut" / "final").exists()
    given = dict(model=str(world / "model"), data=[str(world / "pairs.jsonl")], recipe="dpo", batch_size=4, dtype="float64", steps=steps)
    resumed = train.Trainer(train.Settings(**given, out_dir=str(tmp_path / "cut"))).run()
    whole = train.Trainer(train.Settings(**given, out_dir=str(tmp_path / "whole"))).run()
    for name in ("loss", "margin", "grad_norm", "chosen_logp"):
        assert resumed[name] == whole[name]


def test_an_out_dir_has_one_writer(world, tmp_path):
    """The second run is refused in a sentence and changes nothing; when the first is gone the lock is too."""
    running = tiny.launch(arguments_of(world, tmp_path / "out", steps=4000))
    tiny.until(lambda: tiny.lines(tmp_path / "out" / "metrics.jsonl") >= 2)
    second = tiny.launch(arguments_of(world, tmp_path / "out", steps=4000))
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 1 and f"error: another run is writing to --out_dir={tmp_path / 'out'}" in said
    assert running.poll() is None
    running.kill()
    running.wait()
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[:-1]]
    assert steps == list(range(1, len(steps) + 1))
    third = tiny.launch(arguments_of(world, tmp_path / "out", steps=4000))
    tiny.until(lambda: third.poll() is not None or tiny.lines(tmp_path / "out" / "metrics.jsonl") in range(1, 4))
    assert third.poll() is None
    third.kill()
    third.wait()


def test_workers_leave_with_their_torchrun(world, tmp_path):
    """SIGKILL of torchrun leaves its workers alive, and they would go on writing."""
    running = tiny.launch(arguments_of(world, tmp_path / "out", steps=100_000), ranks=2)
    metrics = tmp_path / "out" / "metrics.jsonl"
    tiny.until(lambda: tiny.lines(metrics) >= 2)
    running.kill()
    running.wait()
    time.sleep(3)
    written = metrics.read_bytes()
    time.sleep(1)
    assert metrics.read_bytes() == written
