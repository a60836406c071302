"""What is special to each recipe beyond the loop that all share: its row in the table, how it samples, pairs
and labels, and what its loss and gradient are, worked by hand or against an identity of the papers.
"""
import collections
import itertools
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import driver
import judge
import losses
import model
import recipes
import tiny
import train
from recipes import PAPER_1, PAPER_2, RECIPES, Recipe, Settings
from support.cli import InputError
from support.ranks import Ranks
from tiny import metrics, rollouts


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two sharp models whose samples differ in length (a louder end of text), files of 13 pairs and 5."""
    path = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("model", "other")):
        tiny.folder(path / name, scale=1.0, seed=seed, vocab_size=421)
        weights = load_file(path / name / "model.safetensors")
        weights["lm_head.weight"][2] *= 10
        save_file(weights, path / name / "model.safetensors")
    tiny.write_jsonl(path / "pairs.jsonl", tiny.pairs(13, seed=1))
    tiny.write_jsonl(path / "five.jsonl", tiny.pairs(5, seed=2))
    return path


def texts(rows):
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]


def moved(trainer, seed=7):
    """The same trainer with a policy that has left its reference: margins are not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in trainer.policy.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return trainer


def rolled_out(trainer):
    """(prompts, K samples of each, what is learned from them) of step 0."""
    prompts = trainer.batch(0)
    return prompts, trainer.sample_prompts(trainer.sampler, 0, prompts, 0), trainer.rollout(0, prompts)


def gradients(trainer, examples):
    """(the mean loss, {name: gradient}) that the optimizer would get for these examples."""
    found = {}
    trainer.log, trainer.settings.grad_clip = trainer.new_log(), 0.0
    trainer.optimizer.step = lambda: found.update(
        {name: weight.grad.clone() for name, weight in trainer.trained().items()})
    trainer.learn(examples, trainer.loss)
    assert found
    return trainer.log.means()["loss"], found


def by_hand(trainer, loss):
    """The gradient of a loss written out here."""
    weights = trainer.trained()
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), retain_graph=True)))


def alone(net, x, y):
    """log π(y | x), summed, from one plain forward over the whole sequence."""
    scores = net.head(net(torch.tensor([x + y])))[0].log_softmax(-1)
    return sum(scores[len(x) + i - 1, token] for i, token in enumerate(y))


def margins(trainer, pairs, query="x"):
    """h of each pair, each of its four log-probabilities by itself."""
    def log_ratio(x, y):
        with torch.no_grad():
            reference = alone(trainer.reference, x, y)
        return alone(trainer.policy, x, y) - reference
    return torch.stack([log_ratio(getattr(pair, query), pair.chosen)
                        - log_ratio(getattr(pair, query), pair.rejected) for pair in pairs])


def assert_close(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name in found:
        largest = expected[name].abs().max()
        assert (found[name] - expected[name]).abs().max() <= tolerance * max(largest, 1e-3), name
    assert max(weight.abs().max() for weight in expected.values()) > 1e-6


def rig(monkeypatch, labelled, strengths=(0.9, 0.8, 0.7, 0.6)):
    """A judge that says the same of every prompt, whatever pairs it is asked about."""
    monkeypatch.setattr(judge.RankingPass, "rank", lambda asked: [list(strengths)] * len(asked.prompts))
    monkeypatch.setattr(judge.RankingPass, "ask", lambda asked, pairs: [labelled] * len(asked.prompts))


# ------------------------------------------------------------------------------------------------------------
# The table

def test_the_papers_defaults():
    """β is 0.1 with hard labels, 0.02 with soft ones; RSO draws four times as many as it keeps; of K = 7 come
    three pairs, ranked or random, one of the extremes, one best response, seven of SPIN."""
    sr, osp = Settings(recipe="sr-dpo"), Settings(recipe="osp")
    assert (sr.optimizer, sr.lr, sr.batch_size, sr.beta, sr.grad_clip) == ("rmsprop", 5e-7, 64, 0.1, 10.0)
    assert (osp.optimizer, osp.lr, osp.batch_size, osp.beta) == ("adam", 2e-6, 16, 0.02)
    assert (osp.k, osp.temperature, osp.top_p) == (7, 0.7, 0.9)
    for name, recipe in RECIPES.items():
        assert Settings(recipe=name).beta == {"hard": 0.1, "soft": 0.02, None: None}[recipe.labels], name
        examples = {"ranked": 3, "random": 3, "spin": 7}.get(recipe.pairs, 1)
        assert recipe.examples_per_prompt(7) == examples, name
    spin, rso = Settings(recipe="spin"), Settings(recipe="rso", k=5)
    assert (spin.k, spin.iterations, rso.candidates) == (1, 3, 20)
    with pytest.raises(InputError, match="--candidates=4.*--k=5"):
        Settings(recipe="rso", k=5, candidates=4)


@pytest.mark.parametrize("axes, word", [
    ("ipo policy ranked soft", "labels: soft"), ("sr-spce policy ranked hard", "labels: hard"),
    ("dpo policy ranked -", "labels: None"), ("sft policy best soft", "labels: soft"),
    ("sft dataset - hard", "labels: hard"), ("spce reference spin soft", "labels: soft"),
    ("dpo dataset dataset firm", "labels: firm"), ("spce dataset random soft", "pairs: random"),
    ("dpo reference dataset hard", "pairs: dataset"), ("sft policy ranked -", "pairs: ranked"),
    ("dpo policy best hard", "pairs: best"), ("sft policy - -", "pairs: None"),
    ("dpo rso spin hard", "pairs: spin"), ("sft rso best -", "pairs: best"),
    ("spce policy rank soft", "pairs: rank"), ("dpo dataset spin hard", "pairs: spin"),
    ("spce polcy ranked soft", "responses: polcy"), ("dp0 policy ranked hard", "loss: dp0"),
])
def test_senseless_combinations_name_the_axis(axes, word):
    with pytest.raises(InputError, match=f"^{word} does not fit: "):
        Recipe(*(None if axis == "-" else axis for axis in axes.split()), defaults={})


def test_a_loss_of_ones_own(world, tmp_path, monkeypatch):
    """A function in losses.py and a row that names it: max(0, 1 - β h), 0.75 at h = ½ and β = ½, trains. At
    the first step h = 0 and the loss is 1; at the second one it follows from the mean margin."""
    monkeypatch.setattr(losses, "hinge", lambda margin, beta: torch.relu(1 - beta * margin), raising=False)
    assert losses.hinge(torch.tensor([0.5, 3.0]), 0.5).tolist() == [0.75, 0.0]
    monkeypatch.setitem(RECIPES, "hinge", Recipe("hinge", "dataset", "dataset", "hard", PAPER_1))
    first, second = tiny.run(world, tmp_path, recipe="hinge", steps=2, lr=1e-4)
    assert (first["loss"], first["margin"]) == (1, 0) and second["margin"] > 0 == second["skipped"]
    assert second["loss"] == pytest.approx(1 - 0.1 * second["margin"], rel=1e-7)
    with pytest.raises(InputError, match="^labels: soft"):
        Recipe("hinge", "dataset", "dataset", "soft", PAPER_1)


def test_a_system_of_ones_own(world, tmp_path, monkeypatch):
    """A row alone: the reference's samples, paired as drawn, with the judge's strengths. In the first step
    that is random-pairs, whose policy is still the reference."""
    monkeypatch.setitem(RECIPES, "mine", Recipe("spce", "reference", "random", "soft", PAPER_2))
    for recipe in ("mine", "random-pairs"):
        tiny.run(world, tmp_path / recipe, recipe=recipe, lr=3e-2)
    mine, known = (rollouts(tmp_path / name) for name in ("mine", "random-pairs"))
    assert mine[:8] == known[:8] and texts(mine[8:]) != texts(known[8:])
    a, b = metrics(tmp_path / "mine"), metrics(tmp_path / "random-pairs")
    assert a[0]["loss"] == pytest.approx(math.log(2)) and a[0]["grad_norm"] == b[0]["grad_norm"]


METHOD = dict(beta=0.7, reference="r", reference_cache="c", lam=0.7, refinement_prompt="q", k=3,
              delta_scale="exact", temperature=0.5, top_p=0.5, max_tokens=9, prompts=["p"], judge="j",
              judge_task="summary", candidates=99, rso_beta=0.5, iterations=1, score_temperature=2.0)
FIXED, JUDGED = "beta reference reference_cache", "judge judge_task"
SAMPLED = "k temperature top_p max_tokens prompts"
OSP = f"{SAMPLED} {JUDGED} beta reference"
ONLINE = "osp osp-dpo osp-ipo random-pairs self-rewarding sft-sampling".split()
READS = dict.fromkeys(ONLINE, OSP) | {
    "sft": "", "judge": "judge_task", "dpo": FIXED, "ipo": FIXED, "sr-dpo": f"{FIXED} lam refinement_prompt",
    "sr-ipo": f"{FIXED} lam refinement_prompt delta_scale",
    "offline-soft": f"{FIXED} {JUDGED} score_temperature",
    "raft": f"{SAMPLED} {JUDGED}", "spin": f"{SAMPLED} beta reference iterations",
    "rso": f"{OSP} candidates rso_beta", "sr-spce": f"{OSP} lam refinement_prompt"}


@pytest.mark.parametrize("recipe", READS)
def test_a_setting_without_effect_is_refused(recipe):
    """Each of a method's settings by itself passes where the recipe reads it; else it is named."""
    single = dict(iterations=1) if recipe == "spin" else {}           # else it takes no reference of its own
    for name, value in METHOD.items():
        given = Settings(recipe=recipe, model="m", data=None, **single | {name: value})
        if name in READS[recipe].split():
            given.check_used()
        else:
            with pytest.raises(InputError, match=f"--{name} would change nothing"):
                given.check_used()


# ------------------------------------------------------------------------------------------------------------
# Hard labels

@pytest.mark.parametrize("recipe", ["osp-dpo", "osp-ipo", "self-rewarding"])
def test_the_direct_verdict_names_the_winner(recipe, world, tmp_path, monkeypatch):
    """p > ½ keeps the pair, p < ½ swaps it, p = ½ drops and counts it; the loss is that of these margins."""
    said = [(0, 3, 0.9), (1, 2, 0.2), (0, 1, 0.5), (2, 3, 0.7), (0, 2, 0.4)]
    rig(monkeypatch, said)
    trainer = moved(tiny.trainer(world, tmp_path, recipe=recipe, temperature=3.0))
    _, samples, pairs = rolled_out(trainer)
    assert all(len({tuple(one.ids) for one in group}) == 4 for group in samples)
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        (group[i].ids, group[j].ids) for group in samples for i, j in ((0, 3), (2, 1), (2, 3), (2, 0))]
    means = trainer.log.means()
    assert means["undecided"] == pytest.approx(1 / 5) and means["identical"] == 0
    h = margins(trainer, pairs)
    assert h.abs().min() > 1e-3
    loss = (h - 5).square() if recipe == "osp-ipo" else (1 + (-0.1 * h).exp()).log()
    value, found = gradients(trainer, pairs)
    assert value == pytest.approx(loss.mean().item(), rel=1e-10)
    assert_close(found, by_hand(trainer, loss.mean()))
    # In the file stands what the judge said, not who won.
    assert [row["p"] for row in rollouts(tmp_path)] == [p for *_, p in said] * 4


def test_nothing_but_undecided_pairs_is_a_skipped_step(world, tmp_path, monkeypatch, capsys):
    """The weights stay, and the sentence does not blame the samples."""
    rig(monkeypatch, [(0, 3, 0.5)])
    trainer = tiny.trainer(world, tmp_path, recipe="self-rewarding")
    before = {name: weight.clone() for name, weight in trainer.trained().items()}
    row = trainer.update(0)
    assert row["skipped"] == 1 == row["undecided"] and "loss" not in row
    tiny.assert_close(before, trainer.trained(), 0)
    assert "step 1: no pair has a winner" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# Pairings

def test_random_pairs_are_disjoint_and_uniform():
    """K // 2 pairs of 2·(K // 2) different samples. The 3 ways to pair 4 samples come 1000 ± 4.5 σ times each
    in 3000 draws, σ = 26; so does each first one of a pair. A function of (seed, step, place) alone, whatever
    the strengths: at another seed, step or place, 3000 / 24 draws agree by chance."""
    for K, seed in itertools.product(range(2, 10), range(20)):
        used = sum(judge.random_pairs([0.5] * K, np.random.default_rng(seed)), ())
        assert len(used) == len(set(used)) == 2 * (K // 2) and set(used) <= set(range(K))

    def draw(strengths, seed=0, **changes):
        given = Settings(recipe="random-pairs", seed=seed, **changes)
        return {(step, place): recipes.paired(given, step, place, strengths)
                for step in range(60) for place in range(50)}
    drawn = draw([0.1, 0.2, 0.3, 0.4])
    ways = collections.Counter(frozenset(map(frozenset, pairs)) for pairs in drawn.values())
    assert len(ways) == 3 and all(abs(count - 1000) < 117 for count in ways.values())
    firsts = collections.Counter(i for pairs in drawn.values() for i, _ in pairs)
    assert len(firsts) == 4 and all(abs(count - 1500) < 125 for count in firsts.values())
    assert draw([0.9, 0.1, 0.5, 0.2], batch_size=2, micro_batch_size=1) == drawn
    others = (draw([0.5] * 4, seed=1), {key: drawn[(key[0] + 1) % 60, key[1]] for key in drawn},
              {key: drawn[key[0], (key[1] + 1) % 50] for key in drawn})
    assert all(sum(drawn[key] == other[key] for key in drawn) < 250 for other in others)


class Part(Ranks):
    """One of several ranks, which waits for no other."""

    def sum(self, values):
        return list(values)

    def largest(self, value):
        return value


@pytest.mark.parametrize("recipe", ["random-pairs", "rso"])
def test_draws_belong_to_their_prompt(recipe, world, tmp_path, monkeypatch):
    """How many prompts the judge reads together, and how a batch is split over ranks, changes no pair."""
    def made(out, ranks=1):
        rows = []
        for rank in range(ranks):
            changes = dict(recipe=recipe, k=5, candidates=8 if recipe == "rso" else None)
            trainer = tiny.trainer(world, tmp_path / f"{out}{rank}", **changes)
            trainer.ranks = Part(rank, ranks, "cpu")
            trainer.begin_update(0)
            trainer.rollout(0, trainer.batch(0))
            rows += texts(rollouts(tmp_path / f"{out}{rank}"))
        return rows
    whole = made("whole")
    assert len(whole) == 4 * 2 and sorted(made("split", ranks=3)) == sorted(whole)
    monkeypatch.setattr(judge, "FOREST_TOKENS", 1)
    assert made("alone") == whole


def test_extremes_are_the_first_ranked_pair(world, tmp_path):
    """By hand, and of a run: self-rewarding's rollouts are every second line of osp's, two per prompt."""
    assert judge.PAIRINGS["extremes"]([0.2, 0.9, 0.4, 0.1, 0.9], None) == [(1, 3)]
    for recipe in ("osp", "osp-dpo", "self-rewarding"):
        tiny.run(world, tmp_path / recipe, recipe=recipe, steps=1)
    ranked = rollouts(tmp_path / "osp")
    assert len(ranked) == 8 and rollouts(tmp_path / "osp-dpo") == ranked
    assert rollouts(tmp_path / "self-rewarding") == ranked[::2]


@pytest.mark.parametrize("recipe, need", [("raft", "responses"), ("spin", "pairs")])
def test_rollouts_without_judged_pairs_can_be_replayed(recipe, need, world, tmp_path):
    """RAFT's best response to each prompt; SPIN's samples, against the data set's: an offline run's rows."""
    tiny.run(world, tmp_path, recipe=recipe, temperature=3.0)
    rows, report = data.read_rows(tmp_path / "rollouts.jsonl", need)
    assert not report.skipped
    for row, raw in zip(rows, rollouts(tmp_path), strict=True):
        expected = [raw["response"], None] if recipe == "raft" else [raw["chosen"], raw["rejected"]]
        assert [row.chosen, row.rejected] == expected and row.finished == tuple(raw["finished"])


def test_raft_is_sft_on_the_best(world, tmp_path, monkeypatch):
    """The first of the best: its gradient is that of Σ -log π(y) over all tokens, divided by their number."""
    rig(monkeypatch, [], (0.2, 0.7, 0.1, 0.7))
    trainer = tiny.trainer(world, tmp_path, recipe="raft", temperature=3.0)
    assert trainer.reference is None and trainer.judge is not None
    prompts, samples, examples = rolled_out(trainer)
    best = [(query.x, group[1].ids) for query, group in zip(prompts, samples)]
    assert [(example.ids, example.start) for example in examples] == [(x + y, len(x)) for x, y in best]
    assert len({len(y) for _, y in best}) > 1
    loss = -sum(alone(trainer.policy, x, y) for x, y in best) / sum(len(y) for _, y in best)
    value, found = gradients(trainer, examples)
    assert value == pytest.approx(loss.item(), rel=1e-10)
    assert_close(found, by_hand(trainer, loss))
    # With the judge's own strengths, the best response is the winner of osp's first pair.
    monkeypatch.undo()
    (_, _, pairs), (_, _, best) = (rolled_out(tiny.trainer(world, tmp_path / name, recipe=name))
                                   for name in ("osp", "raft"))
    assert [example.ids[example.start:] for example in best] == [pair.chosen for pair in pairs[::2]]


# ------------------------------------------------------------------------------------------------------------
# RSO and SFT sampling

def test_rejection_at_its_ends():
    """β → ∞ accepts in the order drawn, β → 0 from the top; always k different candidates, even of NaN."""
    generator, rewards = np.random.default_rng(0), [0.3, 0.9, 0.1, 0.5, 0.2]
    for k, beta in itertools.product(range(1, 6), (1e12, 1e-12, 0.05, 0.3, 2.0)):
        accepted = judge.rejection_sample(rewards, k, beta, generator)
        assert len(accepted) == len(set(accepted)) == k and set(accepted) <= set(range(5))
        assert accepted == {1e12: [0, 1, 2, 3, 4][:k], 1e-12: [1, 3, 0, 4, 2][:k]}.get(beta, accepted)
    assert judge.rejection_sample([0.4] * 6, 4, 1e-12, generator) == [0, 1, 2, 3]
    assert sorted(judge.rejection_sample([math.nan, 0.5, math.nan], 3, 0.1, generator)) == [0, 1, 2]


def test_rejection_as_the_rounds_say():
    """β = 0.2: 0.1 below the largest of its round a reward is accepted with b = e^-½, 0.2 below with a = e⁻¹.
    In whatever order they were drawn, the order of acceptance is the product of its rounds. 20000 draws,
    ± 4.5 σ of at most 0.0035."""
    generator, n = np.random.default_rng(1), 20000
    a, b = math.exp(-1), math.exp(-0.5)
    three = {(0, 1, 2): a * b, (0, 2, 1): a * (1 - b), (1, 2, 0): (1 - a) * b,
             (2, 0, 1): (1 - a) * (1 - b) * b, (2, 1, 0): (1 - a) * (1 - b) ** 2}    # (2,), then e^-½ again
    for rewards, k, expected in (
            ([0.5, 0.7], 1, {(0,): a, (1,): 1 - a}), ([0.7, 0.5], 1, {(0,): 1.0}),
            ([0.5, 0.7], 2, {(0, 1): a, (1, 0): 1 - a}),
            ([0.5, 0.6, 0.7], 1, {(0,): a, (1,): (1 - a) * b, (2,): (1 - a) * (1 - b)}),
            ([0.5, 0.6, 0.7], 3, three),
            # After 0.7, 0.5 is still held against it: r_max is that of the beginning of the round.
            ([0.7, 0.5, 0.6], 2, {(0, 1): a + (1 - a) * (1 - b) * b, (0, 2): (1 - a) * (b + (1 - b) ** 2)})):
        found = collections.Counter(
            tuple(judge.rejection_sample(rewards, k, 0.2, generator)) for _ in range(n))
        assert found.keys() == expected.keys()
        assert all(abs(found[order] / n - expected[order]) < 0.016 for order in expected), (rewards, found)


def test_rso_pairs_keep_the_candidates_numbers():
    """β → 0 accepts numbers 3, 1, 5, 6 of eight; ranked among themselves: the best of them with the worst, 3
    with 6, and 1 with 5; β → ∞ has the first four, of which 3 and 1 are the better ones."""
    strengths = [0.1, 0.8, 0.3, 0.9, 0.2, 0.7, 0.6, 0.4]
    for beta, pairs in ((1e-9, [(3, 6), (1, 5)]), (1e9, [(3, 0), (1, 2)])):
        given = Settings(recipe="rso", k=4, candidates=8, rso_beta=beta)
        assert recipes.paired(given, 0, 0, strengths) == pairs


def test_rso_accepts_some_of_the_references_samples(world, tmp_path):
    """Of eight candidates, which sft-sampling pairs, four are accepted for each prompt; with β → 0 those the
    judge ranks first, though the policy is another model."""
    changes = dict(steps=1, temperature=3.0, reference=str(world / "other"), judge=str(world / "model"))
    tiny.run(world, tmp_path / "all", recipe="sft-sampling", k=8, **changes)
    ranked = collections.defaultdict(list)                  # best with worst, second with second worst, …
    for prompt, chosen, rejected in texts(rollouts(tmp_path / "all")):
        ranked[prompt].append((chosen, rejected))
    for beta in (1e-9, 0.1):
        out, accepted = tmp_path / str(beta), collections.defaultdict(list)
        tiny.run(world, out, recipe="rso", k=4, candidates=8, rso_beta=beta, **changes)
        for prompt, chosen, rejected in texts(rollouts(out)):
            accepted[prompt] += [chosen, rejected]
        assert accepted.keys() == ranked.keys() and len(ranked) == 4
        for prompt, responses in accepted.items():
            assert len(responses) == 4 and set(responses) <= set(sum(ranked[prompt], ()))
            if beta == 1e-9:
                best = [chosen for chosen, _ in ranked[prompt]]
                assert responses == [best[0], best[3], best[1], best[2]]


def test_the_reference_samples_however_the_policy_moves(world, tmp_path):
    """The same rollouts after steps of 1e-12 and of 0.03, and the policy has moved."""
    rows = {lr: tiny.run(world, tmp_path / str(lr), recipe="rso", lr=lr) for lr in (1e-12, 3e-2)}
    still, far = (rollouts(tmp_path / str(lr)) for lr in rows)
    assert still == far and len(still) == 3 * 4 * 2
    assert abs(rows[3e-2][2]["margin"]) > 1e3 * abs(rows[1e-12][2]["margin"])


def test_sft_sampling_begins_as_osp(world, tmp_path):
    """In step 1 the policy is the reference: the same rollouts and update; then they part. And it is the
    reference that samples: beside a policy of another folder, it gives what osp does as its policy."""
    for recipe in ("osp", "sft-sampling"):
        tiny.run(world, tmp_path / recipe, recipe=recipe, lr=3e-2)
    osp, sft = (rollouts(tmp_path / name) for name in ("osp", "sft-sampling"))
    assert sft[:8] == osp[:8] and texts(sft[8:]) != texts(osp[8:])
    a, b = metrics(tmp_path / "osp"), metrics(tmp_path / "sft-sampling")
    assert a[0]["grad_norm"] == b[0]["grad_norm"] and a[1]["loss"] != b[1]["loss"]
    other, judged = str(world / "other"), dict(judge=str(world / "model"), steps=1)
    tiny.run(world, tmp_path / "policy", recipe="osp", model=other, **judged)
    tiny.run(world, tmp_path / "reference", recipe="sft-sampling", reference=other, **judged)
    assert rollouts(tmp_path / "policy") == rollouts(tmp_path / "reference")
    assert texts(rollouts(tmp_path / "policy")) != texts(osp[:8])


# ------------------------------------------------------------------------------------------------------------
# SPIN

def test_spin_by_hand(world, tmp_path):
    """log(1 + exp(-β [log π_θ(y)/π_t(y) - log π_θ(y′)/π_t(y′)])) for one pair: y the data set's response, y′
    the sample of π_t; K = 2 gives two of them. Nobody judges."""
    trainer = moved(tiny.trainer(world, tmp_path, recipe="spin", k=2, temperature=3.0, beta=0.3))
    assert trainer.judge is None
    prompts, drawn, pairs = rolled_out(trainer)
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        (query.chosen, one.ids) for query, group in zip(prompts, drawn) for one in group]
    tokenizer = trainer.tokenizer
    assert pairs[0].chosen == tokenizer.encode_after(prompts[0].row.chosen) + [tokenizer.eos_id]
    others = trainer.sample_prompts(trainer.policy, 0, prompts, 0)
    assert [one.ids for group in others for one in group] != [pair.rejected for pair in pairs]
    with torch.no_grad():
        value, h = trainer.pair_loss(pairs[1:2]).item(), margins(trainer, pairs[1:2]).item()
    expected = math.log(1 + math.exp(-0.3 * h))
    assert value == pytest.approx(expected, rel=1e-10) and abs(expected - math.log(2)) > 1e-3


def test_spins_iterations(world, tmp_path, monkeypatch):
    """7 steps in 3 iterations begin at steps 0, 3 and 5 (7/3 and 14/3, rounded up). There policy and opponent
    are equal, and margins 0; in between the opponent stands still, and it is the one that samples."""
    seen, samplers, learn, draw = [], [], train.Trainer.learn, train.Trainer.sample_prompts

    def copy(net):
        return torch.cat([weight.detach().flatten() for weight in net.parameters()])

    def noted(trainer, *rest):
        seen.append((copy(trainer.policy), copy(trainer.reference), samplers.pop()))
        return learn(trainer, *rest)
    monkeypatch.setattr(train.Trainer, "learn", noted)
    monkeypatch.setattr(train.Trainer, "sample_prompts", lambda trainer, net, *rest, **k:
                        samplers.append(copy(net)) or draw(trainer, net, *rest, **k))
    rows = tiny.run(world, tmp_path, recipe="spin", k=1, steps=7, iterations=3)
    assert [step for step, row in enumerate(rows) if row["margin"] == 0] == [0, 3, 5]
    assert [rows[step]["loss"] for step in (0, 3, 5)] == pytest.approx([math.log(2)] * 3, rel=1e-7)
    for step, (policy, reference, sampler) in enumerate(seen):
        begun = max(first for first in (0, 3, 5) if first <= step)
        assert torch.equal(reference, seen[begun][0]) and torch.equal(sampler, reference), step
        assert torch.equal(policy, reference) == (step == begun)
    saved, names = tiny.last_checkpoint(tmp_path)[1], dict(model.load(world / "model").named_parameters())
    assert torch.equal(torch.cat([saved[f"reference.{name}"].flatten() for name in names]), seen[5][0])


def test_iterations_that_cannot_be(world, tmp_path):
    """More than steps: each would learn nothing that lasts. Under adapters the reference is the frozen base,
    which cannot become the policy. A reference of its own would be thrown away at the first boundary."""
    other = str(world / "other")
    for changes, words in ((dict(steps=2, iterations=3), "--iterations=3: more than the run's 2 steps"),
                           (dict(lora_rank=4), "--iterations=3: .*adapters"),
                           (dict(lora_rank=4, iterations=2), "--iterations=2: .*adapters"),
                           (dict(reference=other), "--reference=.*: spin's is the policy at the start")):
        with pytest.raises(InputError, match=words):
            tiny.trainer(world, tmp_path / "out", recipe="spin", **changes)
    rows = tiny.run(world, tmp_path / "few", recipe="spin", steps=2)        # nobody typed a number: two fit
    assert [row["margin"] for row in rows] == [0, 0]
    for name, changes in (("lora", dict(lora_rank=4)), ("other", dict(reference=other))):
        rows = tiny.run(world, tmp_path / name, recipe="spin", iterations=1, **changes)
        assert (rows[0]["margin"] == 0) == (name == "lora") and rows[1]["margin"] != 0


def test_spin_goes_on_inside_of_an_iteration(world, tmp_path, monkeypatch):
    """Stopped before the last of 5 steps and gone on with from step 4, the second of two iterations having
    begun at step 3: the same bits. The opponent comes from the checkpoint."""
    changes = dict(recipe="spin", steps=5, iterations=2, save_every=2, dtype="float32", batch_size=2)
    tiny.run(world, tmp_path / "whole", **changes)
    with tiny.stopped_before(4, monkeypatch):
        tiny.run(world, tmp_path / "parts", **changes)
    assert tiny.last_checkpoint(tmp_path / "parts")[0] == 4
    tiny.run(world, tmp_path / "parts", **changes)
    tiny.assert_same_run(tmp_path / "whole", tmp_path / "parts", 0)
    assert rollouts(tmp_path / "whole") == rollouts(tmp_path / "parts")
    assert [step for step, row in enumerate(metrics(tmp_path / "whole")) if row["margin"] == 0] == [0, 3]


# ------------------------------------------------------------------------------------------------------------
# Sr-SPCE, and the controls for Sr-*

def test_sr_spce_begins_as_spce(world, tmp_path):
    """At π = π_ref Δ is 0: the first loss and gradient are osp's, the second ones are not. λ = 0 is osp bit
    for bit."""
    osp, sr, zero = (
        tiny.run(world, tmp_path / name, recipe=recipe, lr=1e-2, beta=0.1, lam=lam)
        for name, recipe, lam in (("osp", "osp", 0.3), ("sr", "sr-spce", 0.3), ("zero", "sr-spce", 0.0)))
    assert [sr[0][name] for name in ("loss", "grad_norm")] == [osp[0][name] for name in ("loss", "grad_norm")]
    assert sr[0]["margin"] == 0 and sr[1]["margin"] == osp[1]["margin"] and sr[1]["loss"] != osp[1]["loss"]
    assert [row["loss"] for row in zero] == [row["loss"] for row in osp]
    tiny.assert_close(tiny.final(tmp_path / "zero"), tiny.final(tmp_path / "osp"), 0)
    assert rollouts(tmp_path / "zero") == rollouts(tmp_path / "osp")


def test_sr_spce_by_hand(world, tmp_path):
    """Cross-entropy of p with σ(βh - λβh_p), h_p a constant: no gradient comes through the pass after p."""
    trainer = moved(tiny.trainer(world, tmp_path, recipe="sr-spce", beta=0.2, lam=0.4, temperature=3.0,
                               refinement_prompt="Be kind:"))
    pairs = trainer.rollout(0, trainer.batch(0)[:2])
    assert len(pairs) == 4 and all(0 < pair.strength < 1 for pair in pairs)
    p, h, h_p = torch.tensor([pair.strength for pair in pairs]), *(
        margins(trainer, pairs, query) for query in ("x", "refined_x"))
    assert (h - h_p).abs().min() > 1e-3

    def loss(h_p):
        logit = (0.2 * h - 0.4 * 0.2 * h_p).double()
        return -(p * logit.sigmoid().log() + (1 - p) * (1 - logit.sigmoid()).log()).mean()
    through = by_hand(trainer, loss(h_p))
    value, found = gradients(trainer, pairs)
    assert value == pytest.approx(loss(h_p).item(), rel=1e-7)
    assert_close(found, by_hand(trainer, loss(h_p.detach())), 1e-6)
    assert any((found[name] - grad).abs().max() > 1e-3 * grad.abs().max() for name, grad in through.items())


@pytest.mark.parametrize("lam", [0.3, 0.5])
def test_the_empty_prompt_is_the_naive_refinement(lam, world, tmp_path):
    """Δ_naive = βh: the loss is dpo's at β(1 - λ), the gradient that one's divided by (1 - λ)."""
    plain = moved(tiny.trainer(world, tmp_path, recipe="dpo", beta=0.5 * (1 - lam)))
    naive = moved(tiny.trainer(world, tmp_path, recipe="sr-dpo", beta=0.5, lam=lam, refinement_prompt=""))
    assert all(pair.refined_x == pair.x for pair in naive.data.rows)
    value, expected = gradients(plain, plain.data.rows)
    same, found = gradients(naive, naive.data.rows)
    assert same == pytest.approx(value, rel=1e-12) and abs(value - math.log(2)) > 1e-3
    assert_close(found, {name: weight / (1 - lam) for name, weight in expected.items()})


def test_the_controls_of_p(world, tmp_path):
    """No p and a paraphrase beside p: the same first step, three ways to go on."""
    rows = [tiny.run(world, tmp_path / str(i), recipe="sr-dpo", lr=1e-2, lam=0.5, refinement_prompt=p)
            for i, p in enumerate((data.REFINEMENT_PROMPT, "", "Answer well:"))]
    assert len({row[0]["loss"] for row in rows}) == 1 and len({row[1]["margin"] for row in rows}) == 1
    assert len({row[1]["loss"] for row in rows}) == len({row[1]["refined_margin"] for row in rows}) == 3
    empty = rows[1][1]
    assert empty["refined_margin"] == pytest.approx(empty["margin"] / 2, rel=1e-6)         # h - λh
    assert empty["augmented_accuracy"] == empty["accuracy"]


def test_the_exact_scale_is_the_printed_one_with_delta_over_beta(world, tmp_path):
    """sr-ipo, β = 0.2: (h - λΔ/β - 2.5)² is what λ/β gives as printed; and h - λh_p - 2.5 by hand."""
    exact, printed, less = (moved(tiny.trainer(world, tmp_path, recipe="sr-ipo", beta=0.2, **changes))
                            for changes in (dict(lam=0.3, delta_scale="exact"), dict(lam=1.5), dict(lam=0.3)))
    (value, found), (same, expected), (other, _) = (
        gradients(trainer, trainer.data.rows[:4]) for trainer in (exact, printed, less))
    assert value == pytest.approx(same, rel=1e-12) and abs(other - value) > 1e-3
    assert_close(found, expected)
    with torch.no_grad():
        h, h_p = (margins(exact, exact.data.rows[:4], query) for query in ("x", "refined_x"))
    assert value == pytest.approx((h - 0.3 * h_p - 2.5).square().mean().item(), rel=1e-10)


# ------------------------------------------------------------------------------------------------------------
# Soft labels for a data set

def test_each_row_is_asked_about_once(world, tmp_path, monkeypatch):
    """p is judge.compare's for the row's texts; a row's own p stays; the second epoch asks nothing."""
    rows = tiny.pairs(6, seed=3)
    rows[2]["p"], rows[4]["p"] = 0.25, 0.5
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    asked, compare = [], judge.compare
    monkeypatch.setattr(judge, "compare", lambda net, prompt, pairs: asked.extend(pairs) or
                        compare(net, prompt, pairs))
    changes = dict(recipe="offline-soft", data=[file])
    trainer = tiny.trainer(world, tmp_path / "out", **changes)
    for row in map(trainer.update, range(3)):                           # 4 rows a step: two epochs
        assert 0 < row["p"] < 1 and row["skipped"] == 0
    strengths = {(pair.row.prompt, pair.row.chosen): pair.strength for pair in trainer.data.rows}
    wanted = []
    for row in rows:
        question = (data.context_text(row["prompt"]), row["chosen"], row["rejected"])
        wanted += [question] if "p" not in row else []
        p = row.get("p") or compare(trainer.judge, trainer.judge_prompt, [question]).p.item()
        assert strengths[row["prompt"], row["chosen"]] == pytest.approx(p, rel=1e-9)
    assert sorted(asked) == sorted(wanted) and len(asked) == 4 and len(set(strengths.values())) == 6
    changes["judge"] = str(world / "other")
    other = tiny.trainer(world, tmp_path / "out", **changes)
    for pair in other.labelled(other.data.rows):                        # another judge, other strengths
        known = strengths[pair.row.prompt, pair.row.chosen]
        assert (pair.strength == known) == (pair.row.p is not None)


def test_a_sure_judge_makes_offline_soft_dpo(world, tmp_path):
    """p = 1 in every row: the metrics and weights of dpo with the same settings."""
    file = tiny.write_jsonl(tmp_path / "sure.jsonl", [row | {"p": 1.0} for row in tiny.pairs(7, seed=4)])
    both = dict(data=[file], beta=0.3, optimizer="adam", grad_clip=1.0)
    soft, hard = (tiny.run(world, tmp_path / name, recipe=name, **both) for name in ("offline-soft", "dpo"))
    for a, b in zip(soft, hard):
        tiny.assert_close(b, {name: a[name] for name in b}, 1e-7)
    tiny.assert_close(tiny.final(tmp_path / "offline-soft"), tiny.final(tmp_path / "dpo"), 1e-8)


# ------------------------------------------------------------------------------------------------------------
# Shares of the data

def test_shares_are_nested(world, tmp_path):
    """2 % ⊂ 10 % ⊂ 50 % ⊂ all of 100 rows, by their lines; another seed draws others; held-out rows are all
    there. Beside weights: a share of what the file counts."""
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.pairs(100, seed=5))
    held_out = tiny.write_jsonl(tmp_path / "held-out.jsonl", tiny.pairs(20, seed=6))

    def drawn(*files, **changes):
        given = dict(recipe="dpo", data=list(files), eval_data=[held_out], **changes)
        found = tiny.trainer(world, tmp_path / "out", **given).data
        assert len(found.held_out) == 20
        return collections.Counter(pair.row.where for pair in found.rows)
    shares = [drawn(file, data_fraction=fraction) for fraction in (0.02, 0.1, 0.5, 1.0)]
    assert [share.total() for share in shares] == [2, 10, 50, 100]
    assert all(max(share.values()) == 1 for share in shares) and shares[-1] == drawn(file)
    assert all(small < large for small, large in zip(shares, shares[1:]))
    others = [drawn(file, data_fraction=fraction, seed=1) for fraction in (0.02, 0.1, 0.5)]
    assert others[0] < others[1] < others[2] and all(a != b for a, b in zip(shares, others))
    assert drawn(f"{file}:0.2", data_fraction=0.5) == shares[1] == drawn(f"{file}:0.1")
    thrice = drawn(f"{file}:3", data_fraction=0.5)
    assert thrice == drawn(f"{file}:1.5") and thrice.total() == 150 and shares[3] < thrice
    tenth, both = drawn(f"{file}:3", data_fraction=0.1), drawn(file, f"{held_out}:2", data_fraction=0.1)
    assert tenth < shares[2] | shares[3] and tenth.total() == 30
    assert both.total() == 10 + 4 and shares[1] < both
    for recipe in ("osp", "judge", "sft", "spin"):                      # whatever rows are read for
        trainer = tiny.trainer(world, tmp_path / "out", recipe=recipe, data=[file], data_fraction=0.1)
        assert len(trainer.data) == 10


# ------------------------------------------------------------------------------------------------------------
# Ranks

# 5 rows in two batches of 4: the second has one row, which leaves the second rank without. The temperature
# makes samples differ, so that no step is skipped.
RUNS = {recipe: dict(recipe=recipe, steps=None, data=["five.jsonl"], temperature=3.0)
        for recipe in ("osp-dpo", "osp-ipo", "sr-spce", "random-pairs", "self-rewarding", "raft", "spin",
                       "sft-sampling", "rso", "offline-soft")}
RUNS["spin"]["iterations"] = 2
RUNS["osp-dpo, one row a step"] = dict(recipe="osp-dpo", steps=2, batch_size=1, temperature=3.0)
RUNS["raft, lora"] = dict(recipe="raft", steps=2, lora_rank=4, batch_size=3)
SPIN = dict(recipe="spin", steps=5, iterations=2, save_every=2, batch_size=3)    # the second begins at step 3


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    """All trainings on one rank and on two; spin whole, cut and resumed -> place(name, ranks), an out_dir."""
    base = tmp_path_factory.mktemp("runs")

    def entry(ranks, name, changes, **more):
        given = tiny.settings(world, base / f"{name}-{ranks}", **changes)
        given["micro_batch_size"] = {1: 8, 2: 1}[ranks]
        given["data"] = [str(world / path) for path in given["data"]]            # an absolute one stays
        return {"settings": given, "exact": True, **more}
    for ranks in (1, 2):
        driver.launch([*(entry(ranks, name, changes) for name, changes in RUNS.items()),
                       entry(ranks, "whole", SPIN), entry(ranks, "cut", SPIN, faults={"interrupt": 5}),
                       entry(ranks, "resumed", SPIN, **{"from": str(base / f"cut-{ranks}")})],
                      ranks, base / f"plan-{ranks}.json")
    return lambda name, ranks: base / f"{name}-{ranks}"


@pytest.mark.processes
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_follow_one(name, done):
    """Every figure, the final weights and the optimizer to 1e-10, and the same rollouts."""
    tiny.assert_same_run(done(name, 1), done(name, 2), 1e-10)
    rows = metrics(done(name, 1))
    assert all(row["skipped"] == 0 for row in rows)
    assert (rows[0]["loss"] != rows[1]["loss"]) == (name != "spin")
    lines = [sorted(json.dumps(row | {"p": round(row.get("p", 1.0), 5)})
                    for file in done(name, ranks).glob("rollouts*.jsonl")
                    for row in map(json.loads, file.read_text().splitlines())) for ranks in (1, 2)]
    assert lines[0] == lines[1] and bool(lines[0]) == (RUNS[name]["recipe"] != "offline-soft")


@pytest.mark.processes
def test_spin_on_two_ranks(done):
    """Its opponent moves and is saved shard by shard; gone on with inside of an iteration, the bits are the
    same."""
    tiny.assert_same_run(done("whole", 1), done("whole", 2), 1e-10)
    for ranks in (1, 2):
        assert tiny.last_checkpoint(done("cut", ranks))[0] == 4
        tiny.assert_same_run(done("whole", ranks), done("resumed", ranks), 0)
    assert [step for step, row in enumerate(metrics(done("whole", 2))) if row["margin"] == 0] == [0, 3]
    shards = sorted((done("whole", 2) / "checkpoint/step-5").glob("*.safetensors"))
    assert [load_file(file)["reference.embed.weight"].shape[0] for file in shards] == [211, 210]
