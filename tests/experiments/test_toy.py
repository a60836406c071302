"""The embedded world: its reward by hand, its files, its tokenizers, and a miniature of the whole job."""
import math

import numpy as np
import pytest
import transformers

import recipes
import tiny
import train
from experiments import toy
from support.cli import InputError
from support.tokenizer import load_tokenizer

TRAINERS = {name: (recipes.Settings, train.Trainer) for name in recipes.RECIPES}
SEA = "A calm line about the sea at dawn:"


@pytest.mark.parametrize("response, total", [
    ("calm waves tide shells dawn thanks", 4.5),       # ½ + 1 + 1 + 1 + ½ + ½, in six words: the best
    ("waves tide", 2.0),
    ("waves waves", 0.5),                              # a repeated word costs ½
    ("waves tide shells sails", 3.0),                  # a fourth noun adds nothing
    ("pines", -0.5), ("boring", -1.0),                 # off-topic, rude
    ("grand night", -1.0),                             # the wish and the time of other prompts
    ("calm waves tide shells dawn thanks sails foam", 4.0),      # the seventh and eighth word cost ¼ each
    ("", 0.0), ("meh meh meh meh meh meh", -4.5),      # cut off at the floor
])
def test_reward_by_hand(response, total):
    assert toy.reward(SEA, response) == pytest.approx(max(total / 4.5, -1))


def test_floor_and_ceiling():
    """No response of the data or of random words leaves [-1, 1]; for each prompt one reaches 1, one -1."""
    rng = np.random.default_rng(0)
    words = [*toy.WORDS, *toy.WISHES]
    for prompt in list(toy.PROMPTS.values())[::7]:
        best = " ".join([prompt.wish, *prompt.nouns[:3], prompt.time.split()[1], toy.POLITE[0]])
        assert toy.reward(prompt.text, best) == 1
        assert toy.reward(prompt.text, " ".join(toy.RUDE)) == -1
        for text in [toy.write_response(prompt, rng) for _ in range(5)] + [" ".join(rng.choice(words, 5))]:
            assert -1 <= toy.reward(prompt.text, text) <= 1


def test_held_out_combinations_are_in_no_training_file():
    world = toy.world(0)
    held_out = {row["prompt"] for name in ("eval_sft", "eval_pairs", "eval_prompts") for row in world[name]}
    trained = {row["prompt"] for name in ("sft", "pairs", "blanks", "prompts") for row in world[name]}
    assert len({row["prompt"] for row in world["eval_prompts"]}) >= 500 and not held_out & trained
    texts = " ".join(row["text"] for row in world["texts"])
    assert not any(prompt in texts for prompt in held_out)


def test_the_world_is_a_function_of_its_seed():
    one = toy.world(3)
    assert one == toy.world(3) and one["pairs"] != toy.world(4)["pairs"]


def test_labels_are_bradley_terry():
    """Among 4,000 pairs the better one is chosen as often as Σ σ(5 |r - r′|) says, within four deviations."""
    rows = toy.label_pairs(toy.split(0)[0], 4000, np.random.default_rng(0))
    gaps = [toy.reward(r["prompt"], r["chosen"]) - toy.reward(r["prompt"], r["rejected"]) for r in rows]
    chances = [1 / (1 + math.exp(-toy.SHARPNESS * abs(gap))) for gap in gaps if gap]
    right = sum(gap > 0 for gap in gaps)
    assert abs(right - sum(chances)) < 4 * math.sqrt(sum(p * (1 - p) for p in chances))


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_tokenizers_of_the_world(family, tmp_path):
    """The untrained folder loads here and in transformers: equal ids, texts come back, words are short."""
    toy.write_model(tmp_path, family, 0)
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for row in toy.world(0)["sft"][:200]:
        for text in (row["prompt"], row["prompt"] + row["response"]):
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode_after(row["response"]), continues=True) == row["response"]
        assert len(ours.encode_after(row["response"])) <= 2 * len(row["response"].split())


@pytest.fixture
def miniature(monkeypatch):
    """The job with a small model, few rows and two steps a stage."""
    tiny.small_world(monkeypatch, steps=2)


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_the_whole_job_in_miniature(family, miniature, tmp_path, capsys):
    """Every stage runs on the files of the one before, the table has its rows; a second call prints it."""
    settings = recipes.Settings(out_dir=str(tmp_path), toy_family=family, k=3)
    toy.main(settings, TRAINERS)
    printed = capsys.readouterr().out
    for name in ("base", "sft", "judge", "osp"):
        assert (tmp_path / name / "final" / "model.safetensors").exists()
        assert f"--out_dir={tmp_path / name}" in printed
    table = (tmp_path / "result-osp.txt").read_text()
    rows = {line.split()[0]: line.split() for line in table.splitlines() if line.strip()}
    assert {"sft", "judge", "osp"} <= rows.keys() and -1 <= float(rows["osp"][1]) <= 1
    assert "judge accuracy" in table and "held-out loss" in table
    toy.main(settings, TRAINERS)
    assert table in capsys.readouterr().out


@pytest.mark.parametrize("resume", ["never", "force"])
def test_another_world_is_made_or_refused(resume, miniature, tmp_path):
    """Another family and seed on the same out_dir: refused, or all is made anew and nothing old stays."""
    def job(out, **changes):
        toy.main(recipes.Settings(recipe="sft", out_dir=str(out), **changes), TRAINERS)
        files = [path for path in [*out.glob("world/**/*.*"), *out.glob("*/final/*.*")] if path.is_file()]
        return {path.relative_to(out): path.read_bytes() for path in files} | {
            "table": (out / "result-sft.txt").read_text()}

    other = dict(toy_family="neox", seed=1)
    first, there = job(tmp_path / "a"), job(tmp_path / "b", **other)
    for changes in (other, dict(seed=1), dict(toy_family="neox")):
        with pytest.raises(InputError, match="--toy_family=llama --seed=0"):
            job(tmp_path / "a", **changes)
    assert job(tmp_path / "a") == first
    assert job(tmp_path / "a", **other, resume=resume) == there != first and "seed 1, neox" in there["table"]


def test_a_half_written_world_is_made_again(miniature, tmp_path, monkeypatch):
    """world.json comes last: without it the world is not taken for one."""
    with monkeypatch.context() as patch:
        patch.setattr(toy, "write_model", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            toy.main(recipes.Settings(recipe="sft", out_dir=str(tmp_path)), TRAINERS)
    assert (tmp_path / "world" / "sft.jsonl").exists() and not (tmp_path / "world" / "world.json").exists()
    toy.main(recipes.Settings(recipe="sft", out_dir=str(tmp_path)), TRAINERS)
    assert (tmp_path / "world" / "world.json").exists() and (tmp_path / "result-sft.txt").exists()
