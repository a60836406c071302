"""What is special to each recipe beyond the loop that all share: its row in the table, how it samples, pairs and labels, and
what its loss and gradient are, worked by hand or against an identity of the papers."""
import collections
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import judge
import tiny
import train
from support.cli import InputError
from test_ranks import assert_same_run, last_checkpoint, launch, metrics

NEW = ["osp-dpo", "osp-ipo", "sr-spce", "random-pairs", "self-rewarding", "raft", "spin", "sft-sampling", "rso", "offline-soft"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two sharp models whose samples differ in length (a louder end of text), a file of 13 pairs and one of 5."""
    path = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("model", "other")):
        tiny.folder(path / name, scale=1.0, seed=seed, vocab_size=421)
        weights = load_file(path / name / "model.safetensors")
        weights["lm_head.weight"][2] *= 10
        save_file(weights, path / name / "model.safetensors")
    tiny.write_jsonl(path / "pairs.jsonl", tiny.pairs(13, seed=1))
    tiny.write_jsonl(path / "five.jsonl", tiny.pairs(5, seed=2))
    return path


def settings(world, out, **changes):
    """Settings of a short float64 run whose steps are large enough to see; all of it as plain values."""
    return {"model": str(world / "model"), "data": [str(world / "pairs.jsonl")], "out_dir": str(out), "steps": 2, "k": 4,
            "batch_size": 4, "lr": 1e-3, "warmup_steps": 0, "max_length": 96, "max_tokens": 8, "dtype": "float64",
            "device": "cpu", **changes}


def trainer_of(world, out, **changes):
    """A Trainer that can make rollouts and updates without train()."""
    trainer = train.Trainer(train.Settings(**settings(world, out, **changes)))
    if trainer.data.online:
        trainer.stop_ids, trainer.allowed = train.sample.stopping(trainer.tokenizer, None, trainer.policy.config)
    Path(out).mkdir(exist_ok=True)
    return trainer


def run(world, out, **changes):
    train.Trainer(train.Settings(**settings(world, out, **changes))).run()
    return metrics(out)


def rollouts(out):
    return [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]


def texts(rows):
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]


def moved(trainer, seed=7):
    """The same trainer with a policy that has left its reference: margins are not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in trainer.policy.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return trainer


def gradients(trainer, examples):
    """(the mean loss, {name: gradient}) that the optimizer would get for these examples."""
    found, log = {}, trainer.new_log()
    trainer.settings.grad_clip = 0.0
    trainer.optimizer.step = lambda: found.update({name: weight.grad.clone() for name, weight in trainer.trained().items()})
    trainer.learn(0, examples, log)
    assert found
    return log.means()["loss"], found


def by_hand(trainer, loss):
    """The gradient of a loss written out here."""
    return dict(zip(trainer.trained(), torch.autograd.grad(loss, list(trainer.trained().values()), retain_graph=True)))


def alone(net, x, y):
    """log π(y | x), summed, from one plain forward over the whole sequence."""
    scores = net.head(net(torch.tensor([x + y])))[0].log_softmax(-1)
    return sum(scores[len(x) + i - 1, token] for i, token in enumerate(y))


def margin(trainer, pair, query="x"):
    """h of one pair, each of its four log-probabilities by itself."""
    x, values = getattr(pair, query), []
    for y in (pair.chosen, pair.rejected):
        with torch.no_grad():
            reference = alone(trainer.reference, x, y)
        values.append(alone(trainer.policy, x, y) - reference)
    return values[0] - values[1]


def assert_close(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name in found:
        largest = expected[name].abs().max()
        assert (found[name] - expected[name]).abs().max() <= tolerance * max(largest, 1e-3), name
    assert max(weight.abs().max() for weight in expected.values()) > 1e-6


def same_weights(one, two):
    a, b = (load_file(out / "final" / "model.safetensors") for out in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rig(monkeypatch, labelled, strengths=(0.9, 0.8, 0.7, 0.6)):
    """A judge that says the same of every prompt, and the pairs it was asked to make are not what it returns."""
    monkeypatch.setattr(judge, "label", lambda net, questioner, contexts, responses, pairing: (
        [labelled] * len(contexts), [list(strengths)] * len(contexts), 6 * len(contexts), 0, 0))


# ---------------------------------------------------------------------------------------------------------------------
# The table

CONTRACT = {
    "sft": ("sft", "dataset", None, None), "judge": ("sft", "dataset", None, None),
    "dpo": ("dpo", "dataset", "dataset", "hard"), "ipo": ("ipo", "dataset", "dataset", "hard"),
    "sr-dpo": ("sr-dpo", "dataset", "dataset", "hard"), "sr-ipo": ("sr-ipo", "dataset", "dataset", "hard"),
    "offline-soft": ("spce", "dataset", "dataset", "soft"), "osp": ("spce", "policy", "ranked", "soft"),
    "osp-dpo": ("dpo", "policy", "ranked", "hard"), "osp-ipo": ("ipo", "policy", "ranked", "hard"),
    "sr-spce": ("sr-spce", "policy", "ranked", "soft"), "random-pairs": ("spce", "policy", "random", "soft"),
    "self-rewarding": ("dpo", "policy", "extremes", "hard"), "raft": ("sft", "policy", "best", None),
    "spin": ("dpo", "reference", "spin", "hard"), "sft-sampling": ("spce", "reference", "ranked", "soft"),
    "rso": ("spce", "rso", "ranked", "soft"),
}


def test_the_table():
    """Each of the 17 recipes by its four axes, and β: 0.1 with hard labels, 0.02 with the judge's strength."""
    assert {name: (r.loss, r.responses, r.pairs, r.labels) for name, r in train.RECIPES.items()} == CONTRACT
    for name, (loss, *_, labels) in CONTRACT.items():
        assert train.Settings(recipe=name).beta == {"hard": 0.1, "soft": 0.02, None: None}[labels], name
    spin, rso = train.Settings(recipe="spin"), train.Settings(recipe="rso", k=5)
    assert (spin.k, spin.iterations) == (1, 3) and rso.candidates == 20
    with pytest.raises(InputError, match="--candidates=4.*--k=5"):
        train.Settings(recipe="rso", k=5, candidates=4)


def test_how_many_pairs_a_prompt():
    """K = 7: three pairs, ranked or random; one of the extremes, one best response; an opponent's sample each."""
    count = {name: recipe.pairs_a_prompt(7) for name, recipe in train.RECIPES.items()}
    assert count == {name: {"ranked": 3, "random": 3, "spin": 7}.get(pairs, 1) for name, (_, _, pairs, _) in CONTRACT.items()}


@pytest.mark.parametrize("axes, word", [
    (("ipo", "policy", "ranked", "soft"), "labels: soft"), (("sr-spce", "policy", "ranked", "hard"), "labels: sr-spce"),
    (("dpo", "policy", "ranked", None), "labels: None"), (("sft", "policy", "best", "soft"), "labels: soft"),
    (("spce", "dataset", "random", "soft"), "pairs: random"), (("dpo", "reference", "dataset", "hard"), "pairs: dataset"),
    (("sft", "policy", "ranked", None), "pairs: ranked"), (("dpo", "policy", "best", "hard"), "pairs: best"),
    (("sft", "policy", None, None), "pairs: None"), (("spce", "reference", "spin", "soft"), "labels: soft"),
    (("dpo", "rso", "spin", "hard"), "pairs: spin"), (("sft", "rso", "best", None), "pairs: best"),
    (("spce", "polcy", "ranked", "soft"), "responses: polcy"), (("spce", "policy", "rank", "soft"), "pairs: rank"),
    (("dpo", "dataset", "dataset", "firm"), "labels: firm"), (("dpo", "dataset", "spin", "hard"), "pairs: spin"),
])
def test_senseless_combinations_name_the_axis(axes, word):
    with pytest.raises(InputError, match=f"^{word}"):
        train.Recipe(*axes)


# ---------------------------------------------------------------------------------------------------------------------
# Hard labels

@pytest.mark.parametrize("recipe", ["osp-dpo", "osp-ipo", "self-rewarding"])
def test_the_direct_verdict_names_the_winner(recipe, world, tmp_path, monkeypatch):
    """p > ½ keeps the pair, p < ½ swaps it, p = ½ drops it and counts it; the loss is that of the swapped margins."""
    said = [(0, 3, 0.9), (1, 2, 0.2), (0, 1, 0.5), (2, 3, 0.7), (0, 2, 0.4)]
    rig(monkeypatch, said)
    trainer = moved(trainer_of(world, tmp_path, recipe=recipe, temperature=3.0))
    share, log = trainer.share(0), trainer.new_log()
    samples = trainer.respond(trainer.policy, 0, share)
    assert all(len({tuple(one.ids) for one in group}) == 4 for group in samples)
    pairs = trainer.rollout(0, share, log)
    expected = [(group[i].ids, group[j].ids) for group in samples for i, j in ((0, 3), (2, 1), (2, 3), (2, 0))]
    assert [(pair.chosen, pair.rejected) for pair in pairs] == expected
    assert log.means()["undecided"] == pytest.approx(1 / 5) and log.means()["identical"] == 0
    h = torch.stack([margin(trainer, pair) for pair in pairs])
    assert h.abs().min() > 1e-3
    loss = (h - 5).square() if recipe == "osp-ipo" else (1 + (-0.1 * h).exp()).log()
    value, found = gradients(trainer, pairs)
    assert value == pytest.approx(loss.mean().item(), rel=1e-10)
    assert_close(found, by_hand(trainer, loss.mean()))
    assert [row["p"] for row in rollouts(tmp_path)] == [p for *_, p in said] * 4         # what the judge said, not who won


def test_nothing_but_undecided_pairs_is_a_skipped_step(world, tmp_path, monkeypatch, capsys):
    """The weights stay, and the sentence does not blame the samples."""
    rig(monkeypatch, [(0, 3, 0.5)])
    trainer = trainer_of(world, tmp_path, recipe="self-rewarding")
    before = [weight.clone() for weight in trainer.policy.parameters()]
    row = trainer.update(0)
    assert row["skipped"] == 1 and row["undecided"] == 1 and "loss" not in row
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters()))
    assert "step 1: no pair has a winner" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Pairings

@pytest.mark.parametrize("K", range(2, 10))
def test_random_pairs_are_disjoint(K):
    """K // 2 pairs of 2·(K // 2) different samples."""
    for seed in range(20):
        pairs = judge.random_pairs([0.5] * K, np.random.default_rng(seed))
        assert len(pairs) == K // 2 and len(set(sum(pairs, ()))) == 2 * (K // 2) and set(sum(pairs, ())) <= set(range(K))


def test_random_pairs_are_uniform_over_steps_and_places(world, tmp_path):
    """Of 4 samples, 3 ways to pair them: each comes 1000 ± 4.5 σ times in 3000 draws, 26 = σ; and so does each first one of a
    pair. A function of (seed, step, place) alone, whatever the strengths."""
    trainer = trainer_of(world, tmp_path, recipe="random-pairs")
    drawn = {(step, place): trainer.pairing(step, place)([0.1, 0.2, 0.3, 0.4]) for step in range(60) for place in range(50)}
    ways = collections.Counter(frozenset(map(frozenset, pairs)) for pairs in drawn.values())
    assert len(ways) == 3 and all(abs(count - 1000) < 117 for count in ways.values())
    firsts = collections.Counter(i for pairs in drawn.values() for i, _ in pairs)
    assert len(firsts) == 4 and all(abs(count - 1500) < 125 for count in firsts.values())
    again = trainer_of(world, tmp_path, recipe="random-pairs", batch_size=2, micro_batch_size=1)
    assert all(again.pairing(*key)([0.9, 0.1, 0.5, 0.2]) == pairs for key, pairs in drawn.items())
    same = lambda a, b: sum(drawn[key] == drawn[a(*key), b(*key)] for key in drawn)                   # noqa: E731
    expected = 3000 / 24                          # of two independent draws
    assert same(lambda s, p: (s + 1) % 60, lambda s, p: p) < 2 * expected          # steps differ,
    assert same(lambda s, p: s, lambda s, p: (p + 1) % 50) < 2 * expected          # and so do places
    other = trainer_of(world, tmp_path, recipe="random-pairs", seed=1)
    assert sum(other.pairing(*key)([0.5] * 4) == pairs for key, pairs in drawn.items()) < 2 * expected


@pytest.mark.parametrize("recipe", ["random-pairs", "rso"])
def test_draws_belong_to_their_prompt(recipe, world, tmp_path, monkeypatch):
    """How many prompts the judge reads together, and how a batch is shared out, changes no pair."""
    def made(out, ranks=1):
        rows = []
        for rank in range(ranks):
            changes = dict(recipe=recipe, k=5, candidates=8 if recipe == "rso" else None)
            trainer = trainer_of(world, tmp_path / f"{out}{rank}", **changes)
            trainer.ranks.rank, trainer.ranks.size = rank, ranks
            share = trainer.share(0)
            trainer.ranks.rank, trainer.ranks.size = 0, 1              # so that nobody is waited for
            trainer.rollout(0, share, trainer.new_log())
            rows += texts(rollouts(tmp_path / f"{out}{rank}"))
        return rows
    whole = made("whole")
    assert len(whole) == 4 * 2 and sorted(made("shared", ranks=3)) == sorted(whole)
    monkeypatch.setattr(judge, "FOREST_TOKENS", 1)
    assert made("alone") == whole


def test_extremes_are_the_first_ranked_pair(world, tmp_path):
    """By hand, and of a run: self-rewarding's rollouts are every second line of osp's two pairs a prompt."""
    assert judge.extreme_pair([0.2, 0.9, 0.4, 0.1, 0.9]) == [(1, 3)]
    for recipe in ("osp", "osp-dpo", "self-rewarding"):
        run(world, tmp_path / recipe, recipe=recipe, steps=1)
    ranked = rollouts(tmp_path / "osp")
    assert len(ranked) == 8 and rollouts(tmp_path / "osp-dpo") == ranked
    assert rollouts(tmp_path / "self-rewarding") == ranked[::2]


def test_raft_is_sft_on_the_best(world, tmp_path, monkeypatch):
    """The first of the best: its gradient is that of Σ -log π(y) over all of their tokens, divided by these."""
    rig(monkeypatch, [], (0.2, 0.7, 0.1, 0.7))
    trainer = trainer_of(world, tmp_path, recipe="raft", temperature=3.0)
    assert trainer.reference is None and trainer.judge is not None
    share, log = trainer.share(0), trainer.new_log()
    samples = trainer.respond(trainer.policy, 0, share)
    examples = trainer.rollout(0, share, log)
    assert [(e.ids, e.start) for e in examples] == [(query.x + group[1].ids, len(query.x))
                                                    for (_, query), group in zip(share, samples)]
    assert len({len(group[1].ids) for group in samples}) > 1
    best = [-alone(trainer.policy, query.x, group[1].ids) for (_, query), group in zip(share, samples)]
    loss = sum(best) / sum(len(group[1].ids) for group in samples)
    value, found = gradients(trainer, examples)
    assert value == pytest.approx(loss.item(), rel=1e-10)
    assert_close(found, by_hand(trainer, loss))


def test_raft_takes_what_the_judge_ranks_first(world, tmp_path):
    """The judge's own strengths: the best response is the winner of osp's first pair."""
    osp, raft = (trainer_of(world, tmp_path / name, recipe=name) for name in ("osp", "raft"))
    pairs = osp.rollout(0, osp.share(0), osp.new_log())[::2]
    assert [e.ids[e.start:] for e in raft.rollout(0, raft.share(0), raft.new_log())] == [pair.chosen for pair in pairs]


# ---------------------------------------------------------------------------------------------------------------------
# RSO and SFT sampling

class Given:
    """A generator whose uniforms are known."""

    def __init__(self, *numbers):
        self.left = list(numbers)

    def random(self):
        return self.left.pop(0)


def test_rejection_by_hand():
    """β = 0.2 and rewards 0.9, 0.5, 0.7: the first round accepts with 1, e⁻² = 0.135 and e⁻¹ = 0.368."""
    rewards = [0.9, 0.5, 0.7]
    for k, uniforms, accepted in (
            (2, (0.99, 0.14, 0.36), [0, 2]), (2, (0.99, 0.13), [0, 1]),
            (3, (0.99, 0.14, 0.36, 0.99), [0, 2, 1]),                # the second round has 0.5 for its largest
            (3, (0.99, 0.14, 0.37, 0.36, 0.99), [0, 1, 2]),          # 0.7 is: 0.5 is accepted with e⁻¹
            (3, (0.99, 0.14, 0.37, 0.37, 0.99, 0.99), [0, 2, 1]),    # the third has one left
            (1, (0.99,), [0])):
        generator = Given(*uniforms)
        assert judge.rejection_sample(rewards, k, 0.2, generator) == accepted and not generator.left, (k, uniforms)
    # The largest of a round is that of its beginning: behind 0.9, 0.7 is still held against it.
    assert judge.rejection_sample([0.5, 0.9, 0.7], 1, 0.2, Given(0.13)) == [0]
    assert judge.rejection_sample([0.5, 0.9, 0.7], 2, 0.2, Given(0.14, 0.5, 0.38, 0.38, 0.99)) == [1, 2]


def test_rejection_at_its_ends():
    """β → ∞ accepts in the order drawn, β → 0 from the top; always k different candidates, also of rewards that are NaN."""
    generator = np.random.default_rng(0)
    for M in (2, 5, 8):
        rewards = list(generator.random(M))
        for k in range(1, M + 1):
            assert judge.rejection_sample(rewards, k, 1e12, generator) == list(range(k))
            assert judge.rejection_sample(rewards, k, 1e-12, generator) == sorted(range(M), key=lambda i: -rewards[i])[:k]
            for beta in (0.05, 0.3, 2.0):
                accepted = judge.rejection_sample(rewards, k, beta, generator)
                assert len(accepted) == len(set(accepted)) == k and set(accepted) <= set(range(M))
    assert judge.rejection_sample([0.4] * 6, 4, 1e-12, generator) == [0, 1, 2, 3]
    assert sorted(judge.rejection_sample([math.nan, 0.5, math.nan], 3, 0.1, generator)) == [0, 1, 2]


def test_rejection_as_the_rounds_say():
    """Rewards 0.5 and 0.7, β = 0.2: 0.5 is accepted first with e⁻¹ where it was drawn first, never where it was drawn second.
    With 0.6 for a third, the order of three is the product of its rounds. 20000 draws, ± 4.5 σ of at most 0.0035."""
    generator, n = np.random.default_rng(1), 20000
    share = lambda rewards, k: {order: count / n for order, count in collections.Counter(                       # noqa: E731
        tuple(judge.rejection_sample(rewards, k, 0.2, generator)) for _ in range(n)).items()}
    a, b = math.exp(-1), math.exp(-0.5)
    for rewards, k, expected in (([0.5, 0.7], 1, {(0,): a, (1,): 1 - a}), ([0.7, 0.5], 1, {(0,): 1.0}),
                                 ([0.5, 0.7], 2, {(0, 1): a, (1, 0): 1 - a}),
                                 ([0.5, 0.6, 0.7], 1, {(0,): a, (1,): (1 - a) * b, (2,): (1 - a) * (1 - b)}),
                                 # behind (2,) the second round is that of 0.5 and 0.6: e^-½
                                 ([0.5, 0.6, 0.7], 3, {(0, 1, 2): a * b, (0, 2, 1): a * (1 - b), (1, 2, 0): (1 - a) * b,
                                                       (2, 0, 1): (1 - a) * (1 - b) * b, (2, 1, 0): (1 - a) * (1 - b) ** 2})):
        found = share(rewards, k)
        assert found.keys() == expected.keys()
        assert all(abs(found[order] - expected[order]) < 0.016 for order in expected), (rewards, found)


def test_rso_pairs_keep_the_candidates_numbers(world, tmp_path):
    """β → 0 accepts numbers 3, 1, 5, 6 of eight; ranked among themselves: the best of them with the worst, 3 with 6, and
    1 with 5; β → ∞ has the first four, of which 3 and 1 are the better ones."""
    strengths = [0.1, 0.8, 0.3, 0.9, 0.2, 0.7, 0.6, 0.4]
    for beta, pairs in ((1e-9, [(3, 6), (1, 5)]), (1e9, [(3, 0), (1, 2)])):
        trainer = trainer_of(world, tmp_path, recipe="rso", k=4, candidates=8, rso_beta=beta)
        assert trainer.samples == 8 and trainer.pairing(0, 0)(strengths) == pairs


def test_rso_accepts_some_of_the_references_samples(world, tmp_path):
    """Eight candidates of which four are accepted are four of the eight that sft-sampling pairs, prompt by prompt; with
    β → 0 those the judge ranks first, though the policy is another model."""
    changes = dict(steps=1, temperature=3.0, reference=str(world / "other"), judge=str(world / "model"))
    run(world, tmp_path / "all", recipe="sft-sampling", k=8, **changes)
    ranked = collections.defaultdict(list)
    for prompt, chosen, rejected in texts(rollouts(tmp_path / "all")):             # best with worst, second with second worst …
        ranked[prompt].append((chosen, rejected))
    for beta in (1e-9, 0.1):
        out = tmp_path / str(beta)
        run(world, out, recipe="rso", k=4, candidates=8, rso_beta=beta, **changes)
        accepted = collections.defaultdict(list)
        for prompt, chosen, rejected in texts(rollouts(out)):
            accepted[prompt] += [chosen, rejected]
        assert accepted.keys() == ranked.keys() and len(ranked) == 4
        for prompt, some in accepted.items():
            assert len(some) == 4 and set(some) <= set(sum(ranked[prompt], ()))
            if beta == 1e-9:
                best = [chosen for chosen, _ in ranked[prompt]]
                assert some == [best[0], best[3], best[1], best[2]]


@pytest.mark.parametrize("recipe", ["sft-sampling", "rso"])
def test_the_reference_samples_however_the_policy_moves(recipe, world, tmp_path):
    """Byte for byte the same rollouts behind steps of 1e-12 and of 0.03, and the policy has moved."""
    rows = {lr: run(world, tmp_path / str(lr), recipe=recipe, lr=lr, steps=3) for lr in (1e-12, 3e-2)}
    still, far = ((tmp_path / str(lr) / "rollouts.jsonl").read_text() for lr in rows)
    assert still == far and len(still.splitlines()) == 3 * 4 * 2
    assert abs(rows[3e-2][2]["margin"]) > 1e3 * abs(rows[1e-12][2]["margin"])


def test_sft_sampling_begins_as_osp(world, tmp_path):
    """In step 1 the policy is the reference: the same rollouts and update; then they part. And it is the reference that
    samples: beside a policy of another folder, it gives what osp does as its policy."""
    for recipe in ("osp", "sft-sampling"):
        run(world, tmp_path / recipe, recipe=recipe, lr=3e-2)
    osp, sft = (rollouts(tmp_path / name) for name in ("osp", "sft-sampling"))
    assert sft[:8] == osp[:8] and texts(sft[8:]) != texts(osp[8:])
    a, b = metrics(tmp_path / "osp"), metrics(tmp_path / "sft-sampling")
    assert a[0]["grad_norm"] == b[0]["grad_norm"] and a[1]["loss"] != b[1]["loss"]
    other, judged = str(world / "other"), dict(judge=str(world / "model"), steps=1)
    run(world, tmp_path / "policy", recipe="osp", model=other, **judged)
    run(world, tmp_path / "reference", recipe="sft-sampling", reference=other, **judged)
    assert rollouts(tmp_path / "policy") == rollouts(tmp_path / "reference")
    assert texts(rollouts(tmp_path / "policy")) != texts(osp[:8])


# ---------------------------------------------------------------------------------------------------------------------
# SPIN

def test_spin_by_hand(world, tmp_path):
    """log(1 + exp(-β [log π_θ(y)/π_t(y) - log π_θ(y′)/π_t(y′)])) for one pair: y the data set's response, y′ the sample of
    π_t; K = 2 gives two of them. Nobody judges."""
    trainer = trainer_of(world, tmp_path, recipe="spin", k=2, temperature=3.0, beta=0.3)
    assert trainer.judge is None
    moved(trainer)
    share = trainer.share(0)
    drawn = trainer.respond(trainer.reference, 0, share)
    pairs = trainer.rollout(0, share, trainer.new_log())
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        (query.chosen, one.ids) for (_, query), group in zip(share, drawn) for one in group]
    assert pairs[0].chosen == trainer.tokenizer.encode_after(share[0][1].row.chosen) + [trainer.tokenizer.eos_id]
    others = trainer.respond(trainer.policy, 0, share)
    assert [one.ids for group in others for one in group] != [pair.rejected for pair in pairs]
    pair = pairs[1]
    with torch.no_grad():
        theta, t = ([alone(net, pair.x, y) for y in (pair.chosen, pair.rejected)]
                    for net in (trainer.policy, trainer.reference))
        log = trainer.new_log()
        value = trainer.objective([pair], log).item()
    expected = math.log(1 + math.exp(-0.3 * ((theta[0] - t[0]) - (theta[1] - t[1]))))
    assert value == pytest.approx(expected, rel=1e-10) and abs(expected - math.log(2)) > 1e-3


def test_spins_iterations(world, tmp_path, monkeypatch):
    """7 steps in 3 iterations begin at steps 0, 3 and 5 (7/3 and 14/3, rounded up). There policy and opponent are equal, and
    margins 0; in between the opponent stands still, and it is the one that samples."""
    seen = []
    learn, respond = train.Trainer.learn, train.Trainer.respond

    def copy(net):
        return torch.cat([weight.detach().flatten() for weight in net.parameters()])

    def noted(trainer, step, examples, log):
        seen.append((copy(trainer.policy), copy(trainer.reference), samplers.pop()))
        return learn(trainer, step, examples, log)
    samplers = []
    monkeypatch.setattr(train.Trainer, "learn", noted)
    monkeypatch.setattr(train.Trainer, "respond", lambda trainer, net, *rest: samplers.append(copy(net)) or
                        respond(trainer, net, *rest))
    rows = run(world, tmp_path, recipe="spin", k=1, steps=7, iterations=3)
    assert [step for step, row in enumerate(rows) if row["margin"] == 0] == [0, 3, 5]
    assert [step for step, row in enumerate(rows) if row["loss"] == pytest.approx(math.log(2), rel=1e-7)] == [0, 3, 5]
    for step, (policy, reference, sampler) in enumerate(seen):
        begun = max(first for first in (0, 3, 5) if first <= step)
        assert torch.equal(reference, seen[begun][0]) and torch.equal(sampler, reference), step
        assert torch.equal(policy, reference) == (step == begun)
    _, saved = last_checkpoint(tmp_path)
    kept = torch.cat([saved[f"reference.{name}"].flatten() for name, _ in train.model.load(world / "model").named_parameters()])
    assert torch.equal(kept, seen[5][0])


@pytest.mark.parametrize("steps, iterations, begins", [(7, 3, [3, 5]), (9, 3, [3, 6]), (4, 1, []), (2, 2, [1])])
def test_spins_boundaries(steps, iterations, begins, world, tmp_path):
    trainer = trainer_of(world, tmp_path, recipe="spin", steps=steps, iterations=iterations)
    assert sorted({step for step in trainer.new_iterations() if step < steps}) == begins


def test_more_iterations_than_steps_are_refused(world, tmp_path):
    """Each step against itself would learn nothing that lasts; where nobody typed a number, there are as many as fit."""
    with pytest.raises(InputError, match="--iterations=3: more than the run's 2 steps"):
        trainer_of(world, tmp_path, recipe="spin", steps=2, iterations=3)
    assert trainer_of(world, tmp_path, recipe="spin", steps=2).new_iterations()


def test_spin_under_adapters_has_one_iteration(world, tmp_path):
    """The reference is the frozen base, which cannot become the policy."""
    for more in ({}, dict(iterations=2)):
        with pytest.raises(InputError, match="--iterations=[23]: .*--lora_rank"):
            train.Settings(recipe="spin", lora_rank=4, **more)
    rows = run(world, tmp_path, recipe="spin", iterations=1, lora_rank=4, k=1)
    assert rows[0]["margin"] == 0 != rows[1]["margin"]


def test_spins_opponent_can_become_the_policy(world, tmp_path):
    """A reference of its own would be thrown away at the first boundary: it is refused, but for a single iteration."""
    other = str(tiny.folder(tmp_path / "other", scale=1.0, vocab_size=421, intermediate_size=64))
    with pytest.raises(InputError, match="--reference: spin's reference is the policy"):
        trainer_of(world, tmp_path / "out", recipe="spin", reference=other)
    assert trainer_of(world, tmp_path / "out", recipe="spin", reference=other, iterations=1).new_iterations() == []


# ---------------------------------------------------------------------------------------------------------------------
# Resume

@pytest.mark.parametrize("recipe", ["osp-dpo", "rso", "spin"])
def test_resume_equals_the_uninterrupted_run(recipe, world, tmp_path, monkeypatch):
    """Stopped before the last of 5 steps and gone on with from step 4: the same bits. For spin that is inside of the last of
    two iterations, which begins at step 3: its opponent comes from the checkpoint."""
    changes = dict(recipe=recipe, steps=5, save_every=2, dtype="float32", optimizer="rmsprop", batch_size=2)
    changes |= dict(iterations=2) if recipe == "spin" else {}
    run(world, tmp_path / "whole", **changes)
    with tiny.stopped_before(4, monkeypatch):
        run(world, tmp_path / "parts", **changes)
    assert last_checkpoint(tmp_path / "parts")[0] == 4
    run(world, tmp_path / "parts", **changes)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 0)
    if recipe == "spin":
        assert [row["margin"] == 0 for row in metrics(tmp_path / "whole")] == [True, False, False, True, False]
    else:
        assert (tmp_path / "whole/rollouts.jsonl").read_text() == (tmp_path / "parts/rollouts.jsonl").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Sr-SPCE, and the controls for Sr-*

def test_sr_spce_begins_as_spce(world, tmp_path):
    """At π = π_ref Δ is 0: the first loss and gradient are osp's, the second ones are not. λ = 0 is osp bit for bit."""
    for name, recipe, changes in (("osp", "osp", {}), ("sr", "sr-spce", {}), ("zero", "sr-spce", dict(lam=0.0))):
        run(world, tmp_path / name, recipe=recipe, lr=1e-2, beta=0.1, steps=3, **changes)
    osp, sr, zero = (metrics(tmp_path / name) for name in ("osp", "sr", "zero"))
    assert sr[0]["loss"] == osp[0]["loss"] and sr[0]["grad_norm"] == osp[0]["grad_norm"] and sr[0]["margin"] == 0
    assert sr[1]["margin"] == osp[1]["margin"] and sr[1]["loss"] != osp[1]["loss"]
    assert [row["loss"] for row in zero] == [row["loss"] for row in osp]
    assert same_weights(tmp_path / "zero", tmp_path / "osp") and not same_weights(tmp_path / "sr", tmp_path / "osp")
    assert rollouts(tmp_path / "zero") == rollouts(tmp_path / "osp")


def test_sr_spce_by_hand(world, tmp_path):
    """Cross-entropy of p with σ(βh - λβh_p), h_p a constant: no gradient comes through the pass behind p."""
    trainer = moved(trainer_of(world, tmp_path, recipe="sr-spce", beta=0.2, lam=0.4, refinement_prompt="Be kind:",
                               temperature=3.0))
    pairs = trainer.rollout(0, trainer.share(0)[:2], trainer.new_log())
    assert len(pairs) == 4 and all(0 < pair.p < 1 for pair in pairs)
    p = torch.tensor([pair.p for pair in pairs])
    h, h_p = (torch.stack([margin(trainer, pair, query) for pair in pairs]) for query in ("x", "px"))
    assert (h - h_p).abs().min() > 1e-3

    def loss(h_p):
        logit = (0.2 * h - 0.4 * 0.2 * h_p).double()
        return -(p * logit.sigmoid().log() + (1 - p) * (1 - logit.sigmoid()).log()).mean()
    through = by_hand(trainer, loss(h_p))
    value, found = gradients(trainer, pairs)
    assert value == pytest.approx(loss(h_p).item(), rel=1e-7)
    assert_close(found, by_hand(trainer, loss(h_p.detach())), 1e-6)
    assert any((found[name] - through[name]).abs().max() > 1e-3 * through[name].abs().max() for name in found)


@pytest.mark.parametrize("lam", [0.3, 0.5])
def test_the_empty_prompt_is_the_naive_refinement(lam, world, tmp_path):
    """Δ_naive = βh: the loss is dpo's at β(1 - λ), the gradient that one's divided by (1 - λ)."""
    plain = moved(trainer_of(world, tmp_path, recipe="dpo", beta=0.5 * (1 - lam)))
    naive = moved(trainer_of(world, tmp_path, recipe="sr-dpo", beta=0.5, lam=lam, refinement_prompt=""))
    assert all(pair.px == pair.x for pair in naive.data.rows)
    value, expected = gradients(plain, plain.data.rows)
    same, found = gradients(naive, naive.data.rows)
    assert same == pytest.approx(value, rel=1e-12) and abs(value - math.log(2)) > 1e-3
    assert_close(found, {name: weight / (1 - lam) for name, weight in expected.items()})


def test_the_controls_as_typed(world, tmp_path, monkeypatch, capsys):
    """--refinement_prompt= and a paraphrase run from the command line: the same first step, three ways to go on."""
    said = {}
    for name, typed in (("p", []), ("empty", ["--refinement_prompt="]), ("other", ["--refinement_prompt=Answer well:"])):
        given = settings(world, tmp_path / name, recipe="sr-dpo", lr=1e-2, lam=0.5)
        arguments = [f"--{key}={','.join(value) if isinstance(value, list) else value}" for key, value in given.items()
                     if key not in ("k", "max_tokens")]
        code, _, error = tiny.command(train, capsys, monkeypatch, *arguments, *typed)
        assert code == 0, error
        said[name] = metrics(tmp_path / name)
    rows = list(said.values())
    assert len({row[0]["loss"] for row in rows}) == 1 and len({row[1]["margin"] for row in rows}) == 1
    assert len({row[1]["loss"] for row in rows}) == 3 and len({row[1]["refined_margin"] for row in rows}) == 3
    empty = said["empty"][1]
    assert empty["refined_margin"] == pytest.approx(empty["margin"] / 2, rel=1e-6)         # h - λh
    assert empty["augmented_accuracy"] == empty["accuracy"]


def test_the_exact_scale_is_the_printed_one_with_delta_over_beta(world, tmp_path):
    """sr-ipo, β = 0.2: (h - λΔ/β - 2.5)² is what λ/β gives as printed; and h - λh_p - 2.5 by hand."""
    exact = moved(trainer_of(world, tmp_path, recipe="sr-ipo", beta=0.2, lam=0.3, delta_scale="exact"))
    printed = moved(trainer_of(world, tmp_path, recipe="sr-ipo", beta=0.2, lam=1.5))
    less = moved(trainer_of(world, tmp_path, recipe="sr-ipo", beta=0.2, lam=0.3))
    value, found = gradients(exact, exact.data.rows[:4])
    same, expected = gradients(printed, printed.data.rows[:4])
    assert value == pytest.approx(same, rel=1e-12) and abs(gradients(less, less.data.rows[:4])[0] - value) > 1e-3
    assert_close(found, expected)
    with torch.no_grad():
        h, h_p = (torch.stack([margin(exact, pair, query) for pair in exact.data.rows[:4]]) for query in ("x", "px"))
    assert value == pytest.approx((h - 0.3 * h_p - 2.5).square().mean().item(), rel=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Soft labels for a data set

def test_each_row_is_asked_about_once(world, tmp_path, monkeypatch):
    """p is judge.compare's for the row's texts; a row's own p stays; the second epoch asks nothing."""
    rows = tiny.pairs(6, seed=3)
    rows[2]["p"], rows[4]["p"] = 0.25, 0.5
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    asked, compare = [], judge.compare
    monkeypatch.setattr(judge, "compare", lambda net, questioner, pairs: asked.extend(pairs) or compare(net, questioner, pairs))
    trainer = trainer_of(world, tmp_path / "out", recipe="offline-soft", data=[file], steps=3)
    first = [trainer.update(step) for step in range(3)]                  # 4 rows a step: two epochs
    assert all(0 < row["p"] < 1 and row["skipped"] == 0 for row in first)
    context = lambda row: data.context_text(row["prompt"])                                                      # noqa: E731
    wanted = [(context(row), row["chosen"], row["rejected"]) for i, row in enumerate(rows) if i not in (2, 4)]
    assert sorted(asked) == sorted(wanted) and len(asked) == 4
    found = {(pair.row.prompt, pair.row.chosen): pair.p for pair in trainer.data.rows}
    for i, row in enumerate(rows):
        texts_of = [(context(row), row["chosen"], row["rejected"])]
        p = row.get("p") or compare(trainer.judge, trainer.data.questioner, texts_of).p.item()
        assert found[row["prompt"], row["chosen"]] == pytest.approx(p, rel=1e-9), i
    assert len(set(found.values())) == 6


def test_the_judge_of_a_data_set_is_the_one_named(world, tmp_path):
    """Another judge, other strengths."""
    p = [run(world, tmp_path / name, recipe="offline-soft", judge=str(world / name), steps=1)[0]["p"]
         for name in ("model", "other")]
    own = trainer_of(world, tmp_path / "out", recipe="offline-soft")
    own.update(0)
    assert p[0] != p[1] and p[0] == pytest.approx(np.mean([row.p for _, row in own.share(0)]), rel=1e-7)


def test_a_sure_judge_makes_offline_soft_dpo(world, tmp_path):
    """p = 1 in every row: the metrics and weights of dpo with the same settings, and the judge is asked nothing."""
    file = tiny.write_jsonl(tmp_path / "sure.jsonl", [row | {"p": 1.0} for row in tiny.pairs(7, seed=4)])
    both = dict(data=[file], beta=0.3, optimizer="adam", grad_clip=1.0, steps=3)
    soft, hard = (run(world, tmp_path / recipe, recipe=recipe, **both) for recipe in ("offline-soft", "dpo"))
    for a, b in zip(soft, hard):
        assert all(a[name] == pytest.approx(b[name], rel=1e-7) for name in ("loss", "margin", "grad_norm", "accuracy"))
    a, b = (load_file(tmp_path / recipe / "final/model.safetensors") for recipe in ("offline-soft", "dpo"))
    assert all((a[name] - b[name]).abs().max() < 1e-8 for name in a)


# ---------------------------------------------------------------------------------------------------------------------
# Shares of the data

def test_shares_are_nested(world, tmp_path):
    """2 % ⊂ 10 % ⊂ 50 % ⊂ all of 100 rows, by their lines; another seed draws others; held-out rows are all there."""
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.pairs(100, seed=5))
    held_out = tiny.write_jsonl(tmp_path / "held-out.jsonl", tiny.pairs(20, seed=6))
    tokenizer = data.load_tokenizer(world / "model")

    def drawn(*files, **changes):
        given = train.Settings(**settings(world, tmp_path, recipe="dpo", data=list(files), eval_data=[held_out], **changes))
        found = train.Dataset(given, tokenizer, 512, 512, lambda text: None)
        assert len(found.held_out) == 20
        return collections.Counter(pair.row.where for pair in found.rows)
    shares = [drawn(file, data_fraction=fraction) for fraction in (0.02, 0.1, 0.5, 1.0)]
    assert [share.total() for share in shares] == [2, 10, 50, 100] and all(max(share.values()) == 1 for share in shares)
    assert all(small < large for small, large in zip(shares, shares[1:])) and shares[-1] == drawn(file)
    others = [drawn(file, data_fraction=fraction, seed=1) for fraction in (0.02, 0.1, 0.5)]
    assert others[0] < others[1] < others[2] and all(a != b for a, b in zip(shares, others))
    # Beside weights: a share of what the file counts.
    assert drawn(f"{file}:0.2", data_fraction=0.5) == shares[1] == drawn(f"{file}:0.1")
    thrice = drawn(f"{file}:3", data_fraction=0.5)
    assert thrice == drawn(f"{file}:1.5") and thrice.total() == 150 and shares[3] < thrice
    assert drawn(f"{file}:3", data_fraction=0.1) < shares[2] | shares[3] and drawn(f"{file}:3", data_fraction=0.1).total() == 30
    both = drawn(file, f"{held_out}:2", data_fraction=0.1)
    assert both.total() == 10 + 4 and shares[1] < both


@pytest.mark.parametrize("recipe", ["osp", "judge", "sft", "spin"])
def test_every_recipe_reads_its_share(recipe, world, tmp_path):
    """A fifth of 10 rows is two, whatever they are read for."""
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.pairs(10, seed=5))
    given = train.Settings(**settings(world, tmp_path, recipe=recipe, data=[file], data_fraction=0.2))
    assert len(train.Dataset(given, data.load_tokenizer(world / "model"), 512, 512, lambda text: None)) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Ranks

# 5 rows in two batches of 4: the second has one row, which leaves the second rank without.
RUNS = {recipe: dict(recipe=recipe, steps=None, data=["five.jsonl"]) for recipe in NEW}
for recipe in set(NEW) - {"offline-soft"}:
    RUNS[recipe]["temperature"] = 3.0             # samples that differ, so that no step is skipped
RUNS["spin"] |= dict(iterations=2)
RUNS["osp-dpo, one row a step"] = dict(recipe="osp-dpo", steps=2, batch_size=1, temperature=3.0)
RUNS["raft, lora"] = dict(recipe="raft", steps=2, lora_rank=4, batch_size=3)
SPIN = dict(recipe="spin", steps=5, iterations=2, save_every=2, batch_size=3)            # the second one begins at step 3


def plan(world, base, ranks):
    """What ranks.py runs: each recipe, and spin whole, cut and resumed."""
    def entry(name, changes, **more):
        given = settings(world, base / f"{name}-{ranks}", micro_batch_size={1: 8, 2: 1}[ranks], **changes)
        return {"settings": given | {"data": [str(world / Path(path).name) for path in given["data"]]}, **more}
    return [*(entry(name, changes) for name, changes in RUNS.items()), entry("whole", SPIN), entry("cut", SPIN, stop=4),
            entry("resumed", SPIN, **{"from": str(base / f"cut-{ranks}")})]


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    """All trainings on one rank and on two -> place(name, ranks), their out_dir."""
    base = tmp_path_factory.mktemp("runs")
    for ranks in (1, 2):
        launch(plan(world, base, ranks), ranks, base / f"plan-{ranks}.json")
    return lambda name, ranks: base / f"{name}-{ranks}"


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_follow_one(name, done):
    """Every figure, the final weights and the optimizer to 1e-10, and the same rollouts."""
    assert_same_run(done(name, 1), done(name, 2), 1e-10)
    rows = metrics(done(name, 1))
    assert all(row["skipped"] == 0 for row in rows) and (rows[0]["loss"] != rows[1]["loss"]) == (name != "spin")
    lines = [sorted(json.dumps(row | {"p": round(row.get("p", 1.0), 5)}) for file in done(name, ranks).glob("rollouts*.jsonl")
                    for row in map(json.loads, file.read_text().splitlines())) for ranks in (1, 2)]
    assert lines[0] == lines[1] and bool(lines[0]) == (RUNS[name]["recipe"] != "offline-soft")


@pytest.mark.parametrize("name, need", [("raft", "responses"), ("spin", "pairs")])
def test_rollouts_without_judged_pairs_can_be_replayed(name, need, done):
    """RAFT's best response to each prompt, SPIN's samples against the data set's: rows that an offline recipe reads."""
    place = done(name, 1)
    rows, report = data.read_rows(place / "rollouts.jsonl", need)
    written = rollouts(place)
    assert len(rows) == len(written) and not report.skipped and {row["step"] for row in written} == {
        row["step"] for row in metrics(place)}
    for row, raw in zip(rows, written):
        assert [row.chosen, row.rejected] == ([raw["response"], None] if name == "raft" else [raw["chosen"], raw["rejected"]])
        assert row.finished == tuple(raw["finished"])


def test_spin_on_two_ranks(done):
    """Its opponent moves and is saved shard by shard; gone on with inside of an iteration, the bits are the same."""
    assert_same_run(done("whole", 1), done("whole", 2), 1e-10)
    for ranks in (1, 2):
        assert last_checkpoint(done("cut", ranks))[0] == 4
        assert_same_run(done("whole", ranks), done("resumed", ranks), 0)
    assert [row["margin"] == 0 for row in metrics(done("whole", 2))] == [True, False, False, True, False]
    rows = [load_file(file)["reference.embed.weight"].shape[0] for file in sorted((done("whole", 2) / "checkpoint/step-5").glob(
        "*.safetensors"))]
    assert rows == [211, 210]
