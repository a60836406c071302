"""The loop: every recipe from end to end, one trajectory however a batch is split, evaluation, the end."""
import json
import math
import re
import signal
import time
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

import data
import model
import sample
import tiny
import train
from support import cli, loop, memory
from support.checkpoint import OutDir
from support.cli import InputError
from support.ranks import StopSignal

OFFLINE = ["dpo", "ipo", "sr-dpo", "sr-ipo"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model folder, one whose judgements are sharp, one with another tokenizer; a file of 13 pairs."""
    path = tmp_path_factory.mktemp("world")
    tiny.folder(path / "model")
    tiny.folder(path / "sharp", scale=1.0)
    tiny.folder(path / "neox", "neox")
    tiny.write_jsonl(path / "pairs.jsonl", tiny.pairs(13, seed=1))
    tiny.write_jsonl(path / "blank.jsonl", [{"prompt": "What?"}])
    return path


@pytest.fixture
def all_digits(monkeypatch):
    """metrics.jsonl as it was computed."""
    monkeypatch.setattr(loop, "rounded", lambda record: record)


# ------------------------------------------------------------------------------------------------------------
# Recipes

@pytest.mark.parametrize("family", ["llama", "neox"])
@pytest.mark.parametrize("recipe", list(train.RECIPES))
def test_recipe_from_end_to_end(recipe, family, world, tmp_path):
    """It runs, starts at the loss that algebra gives, and leaves what transformers loads."""
    folder, final = world / {"llama": "model"}.get(family, family), tmp_path / "out/final"
    rows = tiny.run(world, tmp_path / "out", model=str(folder), recipe=recipe, dtype="float32")
    assert [row["step"] for row in rows] == [1, 2, 3]
    # At π = π_ref every margin is 0: -log ½ for logistic losses and SPCE, (1/2β)² = 25 for IPO at β = 0.1.
    starts = dict.fromkeys(("dpo", "sr-dpo", "spce", "sr-spce"), math.log(2)) | {"ipo": 25.0, "sr-ipo": 25.0}
    first = starts.get(train.RECIPES[recipe].loss)
    if first is not None:
        assert rows[0]["loss"] == pytest.approx(first, rel=1e-7)
        assert rows[0]["margin"] == 0
        assert (rows[1]["margin"] == 0) == (recipe == "spin")        # in three steps three iterations begin
    ours, before = model.load(final), model.load(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(final)
    tokens = torch.randint(0, 400, (2, 40), generator=torch.Generator().manual_seed(0))
    assert (ours.head(ours(tokens)) - theirs(tokens).logits).abs().max() < 1e-4
    assert (ours.head(ours(tokens)) - before.head(before(tokens))).abs().max() > 1e-3
    text, reader = "The small river sings.", transformers.AutoTokenizer.from_pretrained(final)
    assert reader.encode(text, add_special_tokens=False) == data.load_tokenizer(final).encode(text)


@pytest.mark.parametrize("recipe", OFFLINE)
def test_pairs_are_learned(recipe, world, tmp_path):
    """One small step moves h up, for -dloss/dh is positive at h = 0; many steps learn all pairs by heart."""
    changes = dict(recipe=recipe, batch_size=13, optimizer="adam")
    rows = tiny.run(world, tmp_path / "one", steps=2, **changes | dict(lr=1e-4))
    assert rows[0]["margin"] == 0 < rows[1]["margin"] and rows[1]["loss"] < rows[0]["loss"]
    rows = tiny.run(world, tmp_path / "many", steps=16, **changes | dict(lr=5e-3))
    assert rows[-1]["accuracy"] >= 0.95 and rows[-1]["loss"] < rows[0]["loss"] / 2


def test_one_update_moves_the_strength_towards_the_judge(world, tmp_path):
    """SPCE on fixed pairs with known p: p̂ starts at ½ and moves up where p = 0.9, down where p = 0.1."""
    trainer = tiny.trainer(world, tmp_path, recipe="osp", optimizer="adam")
    rows = [data.Row(r["prompt"], r["chosen"], r["rejected"], None, "") for r in tiny.pairs(6, 5)]
    pairs, _ = data.encode_dataset(trainer.tokenizer, rows, data.chat_of(trainer.tokenizer, "hh"), 96, 48)
    for i, pair in enumerate(pairs):
        pair.strength = 0.9 if i % 2 else 0.1
    trainer.rollout = lambda step, prompts: pairs

    def p_hat():
        return trainer.margin(pairs, "x")[0].mul(trainer.settings.beta).sigmoid().tolist()
    assert p_hat() == [0.5] * 6
    trainer.update(0)
    assert all((after > 0.5) == (pair.strength > 0.5) for after, pair in zip(p_hat(), pairs))


@pytest.mark.parametrize("plain", ["dpo", "ipo"])
def test_lambda_zero_is_the_plain_loss_bit_for_bit(plain, world, tmp_path):
    tiny.run(world, tmp_path / "plain", recipe=plain)
    tiny.run(world, tmp_path / "refined", recipe=f"sr-{plain}", lam=0.0)
    tiny.assert_close(tiny.final(tmp_path / "plain"), tiny.final(tmp_path / "refined"), 0)


def test_a_run_that_diverges_stops_with_a_sentence(world, tmp_path):
    """A learning rate of 1e30: from the second step on nothing is finite; five such steps end the run, and
    the weights and the checkpoint are those of the first."""
    with pytest.raises(InputError, match="step 6: .*not finite, for 5 steps in a row; .* keeps step-5"):
        tiny.run(world, tmp_path, recipe="dpo", steps=9, lr=1e30, dtype="float32", grad_clip=0, save_every=1)
    rows = tiny.metrics(tmp_path)
    assert [row["skipped"] for row in rows] == [0, 1, 2, 3, 4] and rows[1]["grad_norm"] is None


# ------------------------------------------------------------------------------------------------------------
# Rollouts

def test_sampling_prompt_by_prompt_is_sampling_together(world, tmp_path, monkeypatch, all_digits):
    """How many prompts share a forward pass is a matter of memory: rollouts, figures and weights stay."""
    asked, generate = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda net, prompts, *rest: asked.append(len(prompts)) or
                        generate(net, prompts, *rest))
    for size in (9, 1, 3):
        monkeypatch.setattr(train, "prompts_at_a_time", lambda *given: size)
        tiny.run(world, tmp_path / str(size), model=str(world / "sharp"), recipe="osp")
    assert asked == [4] * 3 + [1] * 12 + [3, 1] * 3
    lines = [tiny.rollouts(tmp_path / name) for name in ("9", "1", "3")]
    assert len(lines[0]) == 3 * 4 * 2 and lines[0] == lines[1] == lines[2]
    for name in ("1", "3"):
        tiny.assert_same_run(tmp_path / name, tmp_path / "9", 1e-10)


def test_prompts_sampled_together_fit_into_memory():
    """Keys and values of so many prompts with all their responses stay within 1 GiB, or what the weights
    take; one prompt more does not; never none."""
    for weights, room in ((1000, 1 << 30), (1 << 28, 1 << 31)):
        shape = SimpleNamespace(whole=weights, layers=2, kv=2 * 2 * 8)
        for tokens in (100, 5000, 10**9):
            each = tokens * 2 * 2 * 2 * 8 * 8                # K and V, layers, heads, their width, bytes
            count = memory.prompts_at_a_time(shape, 8, tokens)
            assert count >= 1 and (count + 1) * each > room and (count * each <= room or count == 1)


def test_a_sample_changes_after_an_update(world, tmp_path):
    """The policy that samples is the updated one: with the same uniforms two runs part after step 1."""
    for name, lr in (("still", 1e-9), ("moving", 3e-2)):
        tiny.run(world, tmp_path / name, recipe="osp", lr=lr, steps=2)
    still, moving = ([[(row["chosen"], row["rejected"]) for row in tiny.rollouts(tmp_path / name)
                       if row["step"] == step] for step in (1, 2)] for name in ("still", "moving"))
    assert still[0] == moving[0] and still[1] != moving[1]


def test_samples_are_shown_and_kept(world, tmp_path, capsys):
    """--sample_every=2 shows steps 1 and 3: the first prompt, its K samples from the best down, its pairs.
    All of them are rows that an offline recipe can read."""
    tiny.run(world, tmp_path, recipe="osp", model=str(world / "sharp"), sample_every=2)
    said, rows = capsys.readouterr().out, tiny.rollouts(tmp_path)
    assert [line[:7] for line in said.splitlines() if line.startswith("step ")] == ["step 1:", "step 3:"]
    title, *samples, pairs = said[said.index("\nstep 1: "):].strip().splitlines()[:6]
    assert title == f"step 1: {data.context_text(rows[0]['prompt'])!r}"
    assert [line[:13] for line in samples] == [f"  {rank}. p(y ≻ ∅)" for rank in (1, 2, 3, 4)]
    strengths = [float(line.split()[5]) for line in samples]
    assert strengths == sorted(strengths, reverse=True)
    assert samples[0].endswith(repr(rows[0]["chosen"])) and samples[3].endswith(repr(rows[0]["rejected"]))
    assert re.findall(r"= ([\d.]+)", pairs) == [f"{row['p']:.3f}" for row in rows[:2]]
    read, report = data.read_rows(str(tmp_path / "rollouts.jsonl"), "pairs")
    assert len(read) + sum(map(len, report.skipped.values())) == 3 * 4 * 2       # steps × prompts × K // 2
    assert all(0 < row.p < 1 for row in read)


# ------------------------------------------------------------------------------------------------------------
# Rows

def test_a_replayed_rollout_names_its_winner_and_keeps_its_ends(world, tmp_path, capsys):
    """dpo on rows with p: p < ½ swaps the pair, p = ½ drops it, in held-out rows too, and is an error where
    it drops all. To spce it is a strength. A response that was cut gets no EOS."""
    row, file = {"prompt": "What?", "chosen": " river", "rejected": " cloud"}, tmp_path / "rows.jsonl"
    tiny.write_jsonl(file, [row | {"p": 0.9}, row | {"p": 0.2}, row | {"p": 0.5},
                            row | {"p": 0.7, "finished": [False, True]}])
    trainer = tiny.trainer(world, tmp_path / "out", recipe="dpo", data=[str(file)])
    kept, swapped, cut = trainer.data.rows
    assert (kept.chosen, kept.rejected) == (swapped.rejected, swapped.chosen)
    eos = trainer.tokenizer.eos_id
    assert kept.chosen == cut.chosen + [eos] and kept.rejected == cut.rejected and eos not in cut.chosen
    assert "1 of 4 pairs have p = ½" in capsys.readouterr().out
    none = tiny.write_jsonl(tmp_path / "none.jsonl", [row | {"p": 0.5}])
    for changes in (dict(data=[none]), dict(eval_data=[none])):
        with pytest.raises(InputError, match="none.jsonl: every pair has p = ½"):
            tiny.trainer(world, tmp_path / "out", recipe="dpo", **changes)
    soft = tiny.trainer(world, tmp_path / "out", recipe="osp", eval_data=[none])
    assert [pair.strength for pair in soft.data.held_out] == [0.5]


def test_rows_of_text_take_the_format_and_the_better_response(world, tmp_path):
    """sft with --chat trains on a user's turn, without it on the text; p < ½ takes the rejected response, cut
    as it was."""
    row = {"prompt": "What is it?", "chosen": "a cloud", "rejected": "a river", "p": 0.1,
           "finished": [True, False]}
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", [row])
    for chat, text in ((None, "What is it?"), ("hh", "\n\nHuman: What is it?\n\nAssistant:")):
        trainer = tiny.trainer(world, tmp_path / "out", recipe="sft", data=[file], chat=chat)
        (row,), tokenizer = trainer.data.rows, trainer.tokenizer
        assert row.ids[:row.start] == tokenizer.prefix(False) + tokenizer.encode(text)
        assert row.ids[row.start:] == tokenizer.encode_after("a river" if chat is None else " a river")


def test_prompt_and_answer_fit_into_max_length(world, tmp_path):
    """BOS included: the longest prompt with max_tokens after it has exactly max_length tokens."""
    prompt = tiny.write_jsonl(tmp_path / "long.jsonl", [{"prompt": "The small river sings. " * 50}])
    trainer = tiny.trainer(world, tmp_path / "out", recipe="osp", data=[prompt], max_length=40)
    assert len(trainer.data.rows[0].x) + trainer.data.max_tokens == 40


def test_judge_instructions_fit_into_max_length(world, tmp_path, capsys):
    """Their last id is the answer, A as often as B; what was too long is said, and responses without a rival
    stay what they are."""
    rows = [row | {"rejected": row["rejected"] * (1 + i % 6)} for i, row in enumerate(tiny.pairs(12, seed=2))]
    alone = [{"prompt": row["prompt"], "response": row["chosen"] * 20} for row in rows[:2]]
    file, lengths = tiny.write_jsonl(tmp_path / "rows.jsonl", rows + alone), {}
    for max_length in (200, None):
        trainer = tiny.trainer(world, tmp_path / "out", recipe="judge", data=[file], max_length=max_length)
        lengths[max_length] = [len(row.ids) for row in trainer.data.rows]
        said, a, b = capsys.readouterr().out, *trainer.judge_prompt.encode("", "", "")[1]
        answers = [row.ids[row.start:] for row in trainer.data.rows[:12]]
        assert answers.count([a]) == answers.count([b]) == 6
        assert ("shortened to the context" in said) == (max_length == 200)
    assert max(lengths[200]) == 200 < max(lengths[None]) <= 512 and len(lengths[200]) == 14


def test_ranks_work_on_disjoint_rows(world, tmp_path):
    """Each global batch is split without overlap; an epoch holds every row once, in an order of its own."""
    trainer = tiny.trainer(world, tmp_path, recipe="dpo", steps=None, epochs=2)
    batches = [trainer.batch(step) for step in range(trainer.steps)]
    trainer.ranks.size = 3
    for step, batch in enumerate(batches):
        for trainer.ranks.rank in range(3):
            assert trainer.batch(step) == batch[trainer.ranks.rank::3]
    rows = [id(row) for batch in batches for row in batch]
    assert list(map(len, batches)) == [4] * 6 + [2] and len(set(rows[:13])) == len(set(rows[13:])) == 13
    assert rows[:13] != rows[13:] and set(rows[:13]) == set(rows[13:])


# ------------------------------------------------------------------------------------------------------------
# One trajectory

@pytest.mark.parametrize("recipe", ["sft", "sr-dpo", "osp"])
def test_accumulation_does_not_change_the_trajectory(recipe, world, tmp_path, all_digits):
    for size in (4, 1, 3):
        tiny.run(world, tmp_path / str(size), recipe=recipe, micro_batch_size=size)
    for size in ("1", "3"):
        tiny.assert_same_run(tmp_path / size, tmp_path / "4", 1e-10)


@pytest.mark.parametrize("recipe, optimizer", [("dpo", "adam"), ("osp", "rmsprop"), ("sft", "adamw")])
def test_resume_equals_the_uninterrupted_run(recipe, optimizer, world, tmp_path, monkeypatch):
    """Stopped in step 5 of 7 and started again, a run ends with the same bits."""
    changes = dict(recipe=recipe, optimizer=optimizer, steps=7, save_every=3, dtype="float32")
    tiny.run(world, tmp_path / "whole", **changes)
    with tiny.stopped_before(4, monkeypatch):
        tiny.run(world, tmp_path / "parts", **changes)
    assert [row["step"] for row in tiny.metrics(tmp_path / "parts")] == [1, 2, 3, 4]
    tiny.run(world, tmp_path / "parts", **changes)
    tiny.assert_same_run(tmp_path / "whole", tmp_path / "parts", 0)
    if recipe == "osp":
        assert tiny.rollouts(tmp_path / "whole") == tiny.rollouts(tmp_path / "parts")


def test_a_signal_finishes_the_step_and_saves(world, tmp_path, capsys):
    """The status is 128 + the signal, and the same command goes on to the same bits."""
    tiny.run(world, tmp_path / "whole", recipe="dpo")
    trainer, stop = tiny.trainer(world, tmp_path / "cut", recipe="dpo"), StopSignal()
    update = trainer.update
    trainer.update = lambda step: (step == 1 and stop(signal.SIGTERM, None)) or update(step)
    with pytest.raises(SystemExit) as left:
        train.Loop(trainer, stop).run()
    assert left.value.code == 143 and "SIGTERM: stopped after step 2 of 3" in capsys.readouterr().out
    assert tiny.last_checkpoint(tmp_path / "cut")[0] == 2 and not (tmp_path / "cut/final").exists()
    tiny.run(world, tmp_path / "cut", recipe="dpo")
    tiny.assert_same_run(tmp_path / "whole", tmp_path / "cut", 0)


@pytest.mark.processes
@pytest.mark.slow
def test_workers_leave_with_their_torchrun(world, tmp_path):
    """SIGKILL of torchrun leaves its workers alive, and they would go on writing."""
    given, file = tiny.settings(world, tmp_path, steps=100_000), tmp_path / "metrics.jsonl"
    running = tiny.launch(tiny.typed(given), ranks=2)                # osp
    tiny.until(lambda: tiny.lines(file) >= 2)
    running.kill()
    running.wait()
    time.sleep(3)
    written = file.read_bytes()
    time.sleep(1)
    assert file.read_bytes() == written


@pytest.mark.parametrize("minutes, saved", [(2.0, [2, 4, 5]), (0.0, [5])])
def test_minutes_between_checkpoints(minutes, saved, world, tmp_path, monkeypatch):
    """Steps of 61 s: after every second one two minutes are over; the last step is always saved."""
    now, update = [0.0], train.Trainer.update

    def slow(trainer, step):
        now[0] += 61
        return update(trainer, step)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(train.Trainer, "update", slow)
    tiny.run(world, tmp_path, recipe="dpo", steps=5, save_minutes=minutes, keep=9)
    assert sorted(int(path.name[5:]) for path in tmp_path.glob("checkpoint/step-*")) == saved


# ------------------------------------------------------------------------------------------------------------
# Evaluation

def test_an_evaluation_has_a_line_of_its_own(world, tmp_path, monkeypatch):
    """{"step", "eval_…"}: after the step's own and before its save; at the end also unasked. On the training
    rows it finds what the step found, for the policy has not moved."""
    lines, save = {}, OutDir.save

    def noted(out, tensors, state):
        lines[state["step"]] = [json.loads(line) for line in open(out.path / "metrics.jsonl")]
        return save(out, tensors, state)
    monkeypatch.setattr(OutDir, "save", noted)
    changes = dict(recipe="sr-dpo", eval_data=[str(world / "pairs.jsonl")], eval_every=2, save_every=1)
    last = tiny.trainer(world, tmp_path, lr=1e-12, batch_size=13, **changes).run()
    assert [[line["step"] for line in lines[step]] for step in (1, 2, 3)] == [[1], [1, 2, 2], [1, 2, 2, 3, 3]]
    _, step, evaluated, *_, end = lines[3]
    assert evaluated.keys() == end.keys() and not any(name.startswith("eval_") for name in step)
    assert all(name.startswith("eval_") for name in evaluated.keys() - {"step"})
    assert {"eval_loss", "eval_margin", "eval_augmented_accuracy"} < evaluated.keys()
    assert evaluated["eval_chosen_logp"] == pytest.approx(step["chosen_logp"], rel=1e-6)
    assert loop.rounded(last)["eval_loss"] == end["eval_loss"] and {"loss", "grad_norm"} < last.keys()


def test_fixed_pairs_have_no_sampled_kl(world, tmp_path):
    """kl is a mean over fresh samples: an online run has it in training, not over held-out pairs, which have
    p = 1."""
    rows = tiny.run(world, tmp_path, recipe="osp", eval_data=[str(world / "pairs.jsonl")], eval_every=1,
                    reference=str(world / "sharp"))
    for row in rows:
        assert row["kl"] != 0 and row["eval_p"] == 1
        assert {"eval_loss", "eval_margin", "eval_accuracy", "eval_p_hat"} < row.keys()
        assert not {"eval_kl", "eval_response_length", "eval_finished"} & row.keys()


def test_the_best_evaluation_is_kept(world, tmp_path, monkeypatch):
    """best/ is what the run was after the step whose figure is the best; final/ is the last. A run that is
    stopped and goes on knows what it had before."""
    changes = dict(recipe="dpo", eval_data=[str(world / "pairs.jsonl")], eval_every=1, save_every=1, keep=9,
                   keep_best="eval_accuracy", lr=3e-2, steps=6, optimizer="adam", dtype="float32")
    tiny.run(world, tmp_path / "whole", **changes)
    with tiny.stopped_before(4, monkeypatch):
        tiny.run(world, tmp_path / "parts", **changes)
    tiny.run(world, tmp_path / "parts", **changes)
    figures = [row["eval_accuracy"] for row in tiny.metrics(tmp_path / "whole")]
    first = figures.index(max(figures)) + 1
    assert first < 6
    tiny.run(world, tmp_path / "short", **changes | dict(steps=first))
    tiny.run(world, tmp_path / "none", **changes | dict(steps=1, eval_data=None))       # nothing held out
    assert not (tmp_path / "none/best").exists()
    for name in ("whole", "parts"):
        kept = load_file(tmp_path / name / "best/model.safetensors")
        tiny.assert_close(kept, tiny.final(tmp_path / "short"), 0)
    tiny.assert_same_run(tmp_path / "whole", tmp_path / "parts", 0)


# ------------------------------------------------------------------------------------------------------------
# Health

def test_a_run_under_a_judge_that_cannot_judge_stops_and_is_saved(world, tmp_path):
    """Random weights give A and B nothing. Five steps in a row end the run; --judge_anyway goes on from
    there, to the same bits. A run of five steps is over anyway."""
    changes = dict(recipe="osp", steps=6, k=2, max_tokens=4)
    with pytest.raises(InputError, match="step 5: the judge gives A and B .* --judge_anyway"):
        tiny.run(world, tmp_path / "parts", **changes, judge_anyway=False)
    assert tiny.last_checkpoint(tmp_path / "parts")[0] == 5 and not (tmp_path / "parts/final").exists()
    for name in ("parts", "whole"):
        rows = tiny.run(world, tmp_path / name, **changes)
        assert [row["judge_off"] for row in rows] == [1.0] * 6 and 0 < rows[0]["judge_a_or_b"] < 0.5
    tiny.assert_same_run(tmp_path / "whole", tmp_path / "parts", 0)
    tiny.run(world, tmp_path / "short", **changes | dict(steps=5, judge_anyway=False))


# ------------------------------------------------------------------------------------------------------------
# Settings

def test_learning_rate():
    """Warm-up of 4 steps to 1.0, then 10 - 4 = 6 steps: at step 7, linear is 1 - 3/6, cosine ½ + ½ cos ½π."""
    for schedule, expected in (("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)):
        given = train.Settings(lr=1.0, lr_schedule=schedule)
        rates = [train.learning_rate(given, step, 10, 4) for step in range(8)]
        assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[7] == pytest.approx(expected)


FILES = "--model={world}/model --data={world}/pairs.jsonl"
BAD = [
    ("--recipe=ppo", ["--recipe=ppo", "osp"]), ("--k=1", ["--k=1", "at least 2"]), ("--model=", ["--model"]),
    ("--temperature=0", ["--temperature", "larger than 0"]), ("--steps=2 --steps=3", ["--steps", "twice"]),
    ("--model=nowhere", ["nowhere"]), ("--model={world}/model --data=nowhere.jsonl", ["nowhere.jsonl"]),
    ("--model={world}/model", ["--prompts"]), ("--model={world}/model --recipe=dpo", ["--data"]),
    (FILES + " --recipe=dpo --max_length=4000", ["--max_length=4000", "512"]),
    (FILES + " --recipe=dpo --chat=alpaca", ["--chat=alpaca"]),
    (FILES + " --max_length=20 --max_tokens=20", ["--max_tokens=20"]),
    (FILES + " --recipe=dpo --device=tpu", ["--device=tpu"]),
    (FILES + " --recipe=dpo --judge_task=helpful", ["--judge_task would change nothing"]),     # the default
    (FILES + " --prompts=p.jsonl", ["--data would change nothing", "--prompts"]),
    (FILES + " --judge={world}/neox", ["neox and", "different tokenizers"]),
    (FILES + " --reference={world}", ["config.json is missing"]),
    (FILES + " --recipe=dpo --eval_data={world}/none.jsonl", ["none.jsonl: cannot be read"]),
    (FILES + " --recipe=dpo --eval_data={world}/blank.jsonl", ["blank.jsonl: no row can be used for pairs"]),
    (FILES + " --recipe=dpo --eval_every=2 --show_prompts=0",
     ["--eval_every would change nothing", "--eval_data"]),
    (FILES + " --recipe=dpo --keep_best=eval_loss", ["--keep_best=eval_loss: needs --eval_every"]),
    (FILES + " --recipe=sft --eval_every=2 --keep_best=eval_accuracy", ["here is only eval_loss"]),
    # A forgotten --model is no wish for the toy world.
    *((f"--{name}=x", [f"--{name} needs a model: --model="])
      for name in ("data", "prompts", "eval_data", "reference", "judge")),
]


@pytest.mark.parametrize("arguments, words", BAD)
def test_bad_settings_get_one_sentence(arguments, words, world, tmp_path, monkeypatch, capsys):
    """One line on stderr that names what is wrong, exit status 1, nothing written, no weights read."""
    monkeypatch.setattr(model, "load", None)
    arguments = arguments.format(world=world).split()
    code, _, error = tiny.command(train, capsys, monkeypatch, *arguments, f"--out_dir={tmp_path / 'out'}")
    assert code == 1 and error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_help_names_every_setting_and_recipe(monkeypatch, capsys):
    code, said, _ = tiny.command(train, capsys, monkeypatch, "--help")
    assert code == 0 and all(f"\n  {name} " in said for name in train.RECIPES)
    for name, about in cli.described(train.Settings).items():
        assert f"\n  --{name}=" in said and about["text"] in said


# ------------------------------------------------------------------------------------------------------------
# Real data

HH = "hh-rlhf/helpful-base.test.lines-0001-1354.jsonl.gz"


def stories(out, recipe, **changes):
    return train.Trainer(train.Settings(recipe=recipe, model=tiny.shared("models/stories260K"),
                                        out_dir=str(out), max_length=192, **changes))


@pytest.mark.parametrize("recipe", [*OFFLINE, "osp"])
def test_real_checkpoint_on_real_preferences(recipe, tmp_path):
    """stories260K on HH-RLHF: step 0 is exact, a few steps run, final/ equals transformers' reading of it."""
    online = dict(max_tokens=16, k=4) if recipe == "osp" else {}
    stories(tmp_path, recipe, data=[tiny.shared(HH)], steps=2, batch_size=8, show_prompts=0, **online).run()
    first = 25.0 if "ipo" in recipe else math.log(2)
    assert tiny.metrics(tmp_path)[0]["loss"] == pytest.approx(first, rel=1e-7)
    tokens = torch.randint(3, 512, (2, 100), generator=torch.Generator().manual_seed(0))
    ours = model.load(tmp_path / "final")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert (ours.head(ours(tokens)) - theirs(tokens).logits).abs().max() < 1e-4
    # The source has a bare tokenizer.model; final/ says what it is, so that AutoTokenizer reads it too.
    text = "Once upon a time, there was a girl.\n\nHuman: hi"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "final").encode(text) == \
        [1] + data.load_tokenizer(tmp_path / "final").encode(text)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", OFFLINE)
def test_real_pairs_are_overfitted(recipe, tmp_path):
    """64 HH pairs, 60 steps of Adam: accuracy 95 % and more."""
    rows, _ = data.read_rows(tiny.shared(HH), "pairs")
    short = [row for row in rows if len(row.chosen) + len(row.rejected) < 600][:64]
    file = tiny.write_jsonl(tmp_path / "pairs.jsonl", [
        {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in short])
    stories(tmp_path / "out", recipe, data=[file], steps=60, batch_size=64, micro_batch_size=32,
            optimizer="adam", lr=3e-3).run()
    assert tiny.metrics(tmp_path / "out")[-1]["accuracy"] >= 0.95
