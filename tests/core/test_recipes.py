"""What is special to each recipe beyond the loop that all share: its row in the table, how it samples, pairs
and labels, and what its loss and gradient are, worked by hand or against an identity of the papers.
"""
import collections
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
import tiny
import train
from recipes import PAPER_1, PAPER_2, RECIPES, Recipe, Settings
from support.cli import InputError
from support.ranks import Ranks
from tiny import metrics, rollouts


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two sharp models whose samples differ in length (a louder end of text), a file of 13 pairs, one of 5."""
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
    return tiny.settings(world, out, **{"steps": 2, "max_tokens": 8, **changes})


def trainer_of(world, out, **changes):
    return tiny.trainer(world, out, **settings(world, out, **changes))


def run(world, out, **changes):
    return tiny.run(world, out, **settings(world, out, **changes))


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


def same_weights(one, two):
    a, b = tiny.final(one), tiny.final(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rig(monkeypatch, labelled, strengths=(0.9, 0.8, 0.7, 0.6)):
    """A judge that says the same of every prompt, whatever pairs it is asked about."""
    monkeypatch.setattr(judge.RankingPass, "rank", lambda asked: [list(strengths)] * len(asked.prompts))
    monkeypatch.setattr(judge.RankingPass, "ask", lambda asked, pairs: [labelled] * len(asked.prompts))


# ------------------------------------------------------------------------------------------------------------
# The table

def test_the_papers_defaults():
    """β is 0.1 with hard labels and 0.02 with the judge's strength; RSO draws four times as many as it keeps."""
    sr, osp = Settings(recipe="sr-dpo"), Settings(recipe="osp")
    assert (sr.optimizer, sr.lr, sr.batch_size, sr.beta, sr.grad_clip) == ("rmsprop", 5e-7, 64, 0.1, 10.0)
    assert (osp.optimizer, osp.lr, osp.batch_size, osp.beta) == ("adam", 2e-6, 16, 0.02)
    assert (osp.k, osp.temperature, osp.top_p) == (7, 0.7, 0.9)
    for name, recipe in RECIPES.items():
        assert Settings(recipe=name).beta == {"hard": 0.1, "soft": 0.02, None: None}[recipe.labels], name
    spin, rso = Settings(recipe="spin"), Settings(recipe="rso", k=5)
    assert (spin.k, spin.iterations, rso.candidates) == (1, 3, 20)
    with pytest.raises(InputError, match="--candidates=4.*--k=5"):
        Settings(recipe="rso", k=5, candidates=4)


def test_how_many_examples_a_prompt_gives():
    """K = 7: three pairs, ranked or random; one of the extremes, one best response; a sample each of SPIN."""
    for name, recipe in RECIPES.items():
        expected = {"ranked": 3, "random": 3, "spin": 7}.get(recipe.pairs, 1)
        assert recipe.examples_per_prompt(7) == expected, name


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
        Recipe(*(None if axis == "-" else axis for axis in axes.split()))


def test_a_loss_of_ones_own(world, tmp_path, monkeypatch):
    """A function in losses.py and a row that names it: max(0, 1 - β h), 0.75 at h = ½ and β = ½, trains. At
    the first step h = 0 and the loss is 1; at the second one it follows from the mean margin."""
    monkeypatch.setattr(losses, "hinge", lambda margin, beta: torch.relu(1 - beta * margin), raising=False)
    assert losses.hinge(torch.tensor([0.5, 3.0]), 0.5).tolist() == [0.75, 0.0]
    monkeypatch.setitem(RECIPES, "hinge", Recipe("hinge", "dataset", "dataset", "hard", PAPER_1))
    first, second = run(world, tmp_path, recipe="hinge")
    assert (first["loss"], first["margin"]) == (1, 0) and second["margin"] > 0 == second["skipped"]
    assert second["loss"] == pytest.approx(1 - 0.1 * second["margin"], rel=1e-7)
    with pytest.raises(InputError, match="^labels: soft"):
        Recipe("hinge", "dataset", "dataset", "soft", PAPER_1)


def test_a_system_of_ones_own(world, tmp_path, monkeypatch):
    """A row alone: the reference's samples, paired as drawn, with the judge's strengths. In the first step
    that is random-pairs, whose policy is still the reference."""
    monkeypatch.setitem(RECIPES, "mine", Recipe("spce", "reference", "random", "soft", PAPER_2))
    for recipe in ("mine", "random-pairs"):
        run(world, tmp_path / recipe, recipe=recipe, lr=3e-2)
    mine, known = (rollouts(tmp_path / name) for name in ("mine", "random-pairs"))
    assert mine[:8] == known[:8] and texts(mine[8:]) != texts(known[8:])
    a, b = metrics(tmp_path / "mine"), metrics(tmp_path / "random-pairs")
    assert a[0]["loss"] == pytest.approx(math.log(2)) and a[0]["grad_norm"] == b[0]["grad_norm"]


USELESS = {
    "sft": "k=3 beta=1 lam=0.3 reference=x reference_cache=x judge=x judge_task=summary",
    "judge": "beta=1 temperature=0.7 refinement_prompt=x delta_scale=exact max_tokens=8",
    "dpo": "k=3 lam=0.5 top_p=0.5 judge=x judge_task=helpful prompts=x delta_scale=exact",
    "sr-dpo": "delta_scale=exact iterations=2", "sr-ipo": "k=7", "raft": "beta=0.1 rso_beta=1",
    "osp": "lam=0.5 reference_cache=x refinement_prompt=x candidates=9", "spin": "judge=x",
}


@pytest.mark.parametrize("recipe", USELESS)
def test_a_setting_without_effect_is_refused(recipe, tmp_path, monkeypatch, capsys):
    """Exit status 1 and one sentence with its name, though what was typed be the default."""
    for typed in USELESS[recipe].split():
        code, _, error = tiny.command(train, capsys, monkeypatch, f"--recipe={recipe}", f"--{typed}",
                                      "--model=m", f"--out_dir={tmp_path / 'out'}")
        name = typed.split("=")[0]
        assert code == 1 and error.startswith(f"error: --{name} would change nothing"), error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_setting_with_effect_passes():
    """What each recipe reads, all of it at once and none of it at its default."""
    every = dict(model="m", data=["d"], eval_data=["e"], lr=1.0, grad_clip=2.0, chat="hh", keep=3)
    pairs = every | dict(beta=0.7, reference="r", reference_cache="c")
    refined = pairs | dict(lam=0.7, refinement_prompt="q")
    judged = dict(judge="j", judge_task="summary")
    sampled = every | judged | dict(k=3, temperature=0.5, top_p=0.5, max_tokens=9, sample_every=1)
    osp = sampled | dict(beta=0.7, reference="r")
    spin = {name: value for name, value in osp.items() if name not in judged}
    used = dict.fromkeys(RECIPES, osp) | {
        "sft": every, "judge": every | dict(judge_task="summary"), "dpo": pairs, "ipo": pairs,
        "sr-dpo": refined, "sr-ipo": refined | dict(delta_scale="exact"), "offline-soft": pairs | judged,
        "raft": sampled, "spin": spin | dict(iterations=1), "rso": osp | dict(candidates=9, rso_beta=0.5),
        "sr-spce": osp | dict(lam=0.7, refinement_prompt="q")}
    for recipe, values in used.items():
        given = Settings(recipe=recipe, **values)
        assert given.given.keys() >= values.keys()
        given.check_used()
    Settings(recipe="osp", **osp | dict(prompts=["p"], data=None)).check_used()


# ------------------------------------------------------------------------------------------------------------
# Hard labels

@pytest.mark.parametrize("recipe", ["osp-dpo", "osp-ipo", "self-rewarding"])
def test_the_direct_verdict_names_the_winner(recipe, world, tmp_path, monkeypatch):
    """p > ½ keeps the pair, p < ½ swaps it, p = ½ drops and counts it; the loss is that of the swapped margins."""
    said = [(0, 3, 0.9), (1, 2, 0.2), (0, 1, 0.5), (2, 3, 0.7), (0, 2, 0.4)]
    rig(monkeypatch, said)
    trainer = moved(trainer_of(world, tmp_path, recipe=recipe, temperature=3.0))
    _, samples, pairs = rolled_out(trainer)
    assert all(len({tuple(one.ids) for one in group}) == 4 for group in samples)
    expected = [(group[i].ids, group[j].ids) for group in samples for i, j in ((0, 3), (2, 1), (2, 3), (2, 0))]
    assert [(pair.chosen, pair.rejected) for pair in pairs] == expected
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
    trainer = trainer_of(world, tmp_path, recipe="self-rewarding")
    before = [weight.clone() for weight in trainer.policy.parameters()]
    row = trainer.update(0)
    assert row["skipped"] == 1 and row["undecided"] == 1 and "loss" not in row
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters()))
    assert "step 1: no pair has a winner" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# Pairings

@pytest.mark.parametrize("K", range(2, 10))
def test_random_pairs_are_disjoint(K):
    """K // 2 pairs of 2·(K // 2) different samples."""
    for seed in range(20):
        pairs = judge.random_pairs([0.5] * K, np.random.default_rng(seed))
        assert len(pairs) == K // 2 and len(set(sum(pairs, ()))) == 2 * (K // 2)
        assert set(sum(pairs, ())) <= set(range(K))


def test_random_pairs_are_uniform_over_steps_and_places(world, tmp_path):
    """Of 4 samples, 3 ways to pair them: each comes 1000 ± 4.5 σ times in 3000 draws, 26 = σ; and so does each
    first one of a pair. A function of (seed, step, place) alone, whatever the strengths."""
    def draw(**changes):
        trainer = trainer_of(world, tmp_path, recipe="random-pairs", **changes)
        strengths = [0.1, 0.2, 0.3, 0.4] if not changes else [0.9, 0.1, 0.5, 0.2]
        return {(step, place): trainer.pair(step, place, strengths) for step in range(60) for place in range(50)}
    drawn = draw()
    ways = collections.Counter(frozenset(map(frozenset, pairs)) for pairs in drawn.values())
    assert len(ways) == 3 and all(abs(count - 1000) < 117 for count in ways.values())
    firsts = collections.Counter(i for pairs in drawn.values() for i, _ in pairs)
    assert len(firsts) == 4 and all(abs(count - 1500) < 125 for count in firsts.values())
    assert draw(batch_size=2, micro_batch_size=1) == drawn
    others = (draw(seed=1), {(step, place): drawn[(step + 1) % 60, place] for step, place in drawn},
              {(step, place): drawn[step, (place + 1) % 50] for step, place in drawn})
    for other in others:                              # another seed, step, place: 3000 / 24 agree by chance
        assert sum(drawn[key] == other[key] for key in drawn) < 250


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
            trainer = trainer_of(world, tmp_path / f"{out}{rank}", **changes)
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
    """By hand, and of a run: self-rewarding's rollouts are every second line of osp's two pairs per prompt."""
    assert judge.PAIRINGS["extremes"]([0.2, 0.9, 0.4, 0.1, 0.9], None) == [(1, 3)]
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
    prompts, samples, examples = rolled_out(trainer)
    best = [(query.x, group[1].ids) for query, group in zip(prompts, samples)]
    assert [(example.ids, example.start) for example in examples] == [(x + y, len(x)) for x, y in best]
    assert len({len(y) for _, y in best}) > 1
    loss = -sum(alone(trainer.policy, x, y) for x, y in best) / sum(len(y) for _, y in best)
    value, found = gradients(trainer, examples)
    assert value == pytest.approx(loss.item(), rel=1e-10)
    assert_close(found, by_hand(trainer, loss))


def test_raft_takes_what_the_judge_ranks_first(world, tmp_path):
    """The judge's own strengths: the best response is the winner of osp's first pair."""
    (_, _, pairs), (_, _, best) = (rolled_out(trainer_of(world, tmp_path / name, recipe=name))
                                   for name in ("osp", "raft"))
    assert [example.ids[example.start:] for example in best] == [pair.chosen for pair in pairs[::2]]


# ------------------------------------------------------------------------------------------------------------
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
        assert judge.rejection_sample(rewards, k, 0.2, generator) == accepted, (k, uniforms)
        assert not generator.left
    # The largest of a round is that of its beginning: after 0.9, 0.7 is still held against it.
    assert judge.rejection_sample([0.5, 0.9, 0.7], 1, 0.2, Given(0.13)) == [0]
    assert judge.rejection_sample([0.5, 0.9, 0.7], 2, 0.2, Given(0.14, 0.5, 0.38, 0.38, 0.99)) == [1, 2]


def test_rejection_at_its_ends():
    """β → ∞ accepts in the order drawn, β → 0 from the top; always k different candidates, also of rewards
    that are NaN."""
    generator = np.random.default_rng(0)
    for M in (2, 5, 8):
        rewards = list(generator.random(M))
        falling = sorted(range(M), key=lambda i: -rewards[i])
        for k in range(1, M + 1):
            assert judge.rejection_sample(rewards, k, 1e12, generator) == list(range(k))
            assert judge.rejection_sample(rewards, k, 1e-12, generator) == falling[:k]
            for beta in (0.05, 0.3, 2.0):
                accepted = judge.rejection_sample(rewards, k, beta, generator)
                assert len(accepted) == len(set(accepted)) == k and set(accepted) <= set(range(M))
    assert judge.rejection_sample([0.4] * 6, 4, 1e-12, generator) == [0, 1, 2, 3]
    assert sorted(judge.rejection_sample([math.nan, 0.5, math.nan], 3, 0.1, generator)) == [0, 1, 2]


def test_rejection_as_the_rounds_say():
    """Rewards 0.5 and 0.7, β = 0.2: 0.5 is accepted first with e⁻¹ where it was drawn first, never where it was
    drawn second. With 0.6 for a third, the order of three is the product of its rounds. 20000 draws, ± 4.5 σ of
    at most 0.0035."""
    generator, n = np.random.default_rng(1), 20000
    a, b = math.exp(-1), math.exp(-0.5)
    three = {(0, 1, 2): a * b, (0, 2, 1): a * (1 - b), (1, 2, 0): (1 - a) * b,
             (2, 0, 1): (1 - a) * (1 - b) * b, (2, 1, 0): (1 - a) * (1 - b) ** 2}    # (2,), then e^-½ again
    for rewards, k, expected in (
            ([0.5, 0.7], 1, {(0,): a, (1,): 1 - a}), ([0.7, 0.5], 1, {(0,): 1.0}),
            ([0.5, 0.7], 2, {(0, 1): a, (1, 0): 1 - a}),
            ([0.5, 0.6, 0.7], 1, {(0,): a, (1,): (1 - a) * b, (2,): (1 - a) * (1 - b)}),
            ([0.5, 0.6, 0.7], 3, three)):
        found = collections.Counter(tuple(judge.rejection_sample(rewards, k, 0.2, generator)) for _ in range(n))
        assert found.keys() == expected.keys()
        assert all(abs(found[order] / n - expected[order]) < 0.016 for order in expected), (rewards, found)


def test_rso_pairs_keep_the_candidates_numbers(world, tmp_path):
    """β → 0 accepts numbers 3, 1, 5, 6 of eight; ranked among themselves: the best of them with the worst, 3
    with 6, and 1 with 5; β → ∞ has the first four, of which 3 and 1 are the better ones."""
    strengths = [0.1, 0.8, 0.3, 0.9, 0.2, 0.7, 0.6, 0.4]
    for beta, pairs in ((1e-9, [(3, 6), (1, 5)]), (1e9, [(3, 0), (1, 2)])):
        trainer = trainer_of(world, tmp_path, recipe="rso", k=4, candidates=8, rso_beta=beta)
        assert trainer.pair(0, 0, strengths) == pairs


def test_rso_accepts_some_of_the_references_samples(world, tmp_path):
    """Of eight candidates four are accepted, all from the eight that sft-sampling pairs, prompt by prompt; with
    β → 0 those the judge ranks first, though the policy is another model."""
    changes = dict(steps=1, temperature=3.0, reference=str(world / "other"), judge=str(world / "model"))
    run(world, tmp_path / "all", recipe="sft-sampling", k=8, **changes)
    ranked = collections.defaultdict(list)                  # best with worst, second with second worst, …
    for prompt, chosen, rejected in texts(rollouts(tmp_path / "all")):
        ranked[prompt].append((chosen, rejected))
    for beta in (1e-9, 0.1):
        out, accepted = tmp_path / str(beta), collections.defaultdict(list)
        run(world, out, recipe="rso", k=4, candidates=8, rso_beta=beta, **changes)
        for prompt, chosen, rejected in texts(rollouts(out)):
            accepted[prompt] += [chosen, rejected]
        assert accepted.keys() == ranked.keys() and len(ranked) == 4
        for prompt, responses in accepted.items():
            assert len(responses) == 4 and set(responses) <= set(sum(ranked[prompt], ()))
            if beta == 1e-9:
                best = [chosen for chosen, _ in ranked[prompt]]
                assert responses == [best[0], best[3], best[1], best[2]]


@pytest.mark.parametrize("recipe", ["sft-sampling", "rso"])
def test_the_reference_samples_however_the_policy_moves(recipe, world, tmp_path):
    """The same rollouts after steps of 1e-12 and of 0.03, and the policy has moved."""
    rows = {lr: run(world, tmp_path / str(lr), recipe=recipe, lr=lr, steps=3) for lr in (1e-12, 3e-2)}
    still, far = (rollouts(tmp_path / str(lr)) for lr in rows)
    assert still == far and len(still) == 3 * 4 * 2
    assert abs(rows[3e-2][2]["margin"]) > 1e3 * abs(rows[1e-12][2]["margin"])


def test_sft_sampling_begins_as_osp(world, tmp_path):
    """In step 1 the policy is the reference: the same rollouts and update; then they part. And it is the
    reference that samples: beside a policy of another folder, it gives what osp does as its policy."""
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


# ------------------------------------------------------------------------------------------------------------
# SPIN

def test_spin_by_hand(world, tmp_path):
    """log(1 + exp(-β [log π_θ(y)/π_t(y) - log π_θ(y′)/π_t(y′)])) for one pair: y the data set's response, y′
    the sample of π_t; K = 2 gives two of them. Nobody judges."""
    trainer = moved(trainer_of(world, tmp_path, recipe="spin", k=2, temperature=3.0, beta=0.3))
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
    monkeypatch.setattr(train.Trainer, "sample_prompts", lambda trainer, net, *rest:
                        samplers.append(copy(net)) or draw(trainer, net, *rest))
    rows = run(world, tmp_path, recipe="spin", k=1, steps=7, iterations=3)
    assert [step for step, row in enumerate(rows) if row["margin"] == 0] == [0, 3, 5]
    assert [rows[step]["loss"] for step in (0, 3, 5)] == pytest.approx([math.log(2)] * 3, rel=1e-7)
    for step, (policy, reference, sampler) in enumerate(seen):
        begun = max(first for first in (0, 3, 5) if first <= step)
        assert torch.equal(reference, seen[begun][0]) and torch.equal(sampler, reference), step
        assert torch.equal(policy, reference) == (step == begun)
    saved, names = tiny.last_checkpoint(tmp_path)[1], dict(model.load(world / "model").named_parameters())
    assert torch.equal(torch.cat([saved[f"reference.{name}"].flatten() for name in names]), seen[5][0])


@pytest.mark.parametrize("steps, iterations, begins", [
    (7, 3, [3, 5]), (9, 3, [3, 6]), (4, 1, []), (2, 2, [1]), (2, None, [1])])
def test_spins_boundaries(steps, iterations, begins, world, tmp_path):
    """Where nobody typed a number, as many of the three iterations as there are steps."""
    trainer, begun = trainer_of(world, tmp_path, recipe="spin", steps=steps, iterations=iterations), []
    trainer.reference_from_policy = lambda: begun.append(step)
    for step in range(steps):
        trainer.begin_update(step)
    assert begun == begins


def test_iterations_that_cannot_be(world, tmp_path):
    """More than steps: each would learn nothing that lasts. Under adapters the reference is the frozen base,
    which cannot become the policy. A reference of its own would be thrown away at the first boundary."""
    other = str(world / "other")
    for changes, words in ((dict(iterations=3), "--iterations=3: more than the run's 2 steps"),
                           (dict(lora_rank=4), "--iterations=3: .*adapters"),
                           (dict(lora_rank=4, iterations=2), "--iterations=2: .*adapters"),
                           (dict(reference=other), "--reference=.*: spin's is the policy at the start")):
        with pytest.raises(InputError, match=words):
            trainer_of(world, tmp_path / "out", recipe="spin", **changes)
    for name, changes in (("lora", dict(lora_rank=4)), ("other", dict(reference=other))):
        rows = run(world, tmp_path / name, recipe="spin", iterations=1, **changes)
        assert (rows[0]["margin"] == 0) == (name == "lora") and rows[1]["margin"] != 0


# ------------------------------------------------------------------------------------------------------------
# Resume

@pytest.mark.parametrize("recipe", ["osp-dpo", "rso", "spin"])
def test_resume_equals_the_uninterrupted_run(recipe, world, tmp_path, monkeypatch):
    """Stopped before the last of 5 steps and gone on with from step 4: the same bits. For spin that is inside
    of the last of two iterations, which begins at step 3: its opponent comes from the checkpoint."""
    changes = dict(recipe=recipe, steps=5, save_every=2, dtype="float32", optimizer="rmsprop", batch_size=2)
    changes |= dict(iterations=2) if recipe == "spin" else {}
    run(world, tmp_path / "whole", **changes)
    with tiny.stopped_before(4, monkeypatch):
        run(world, tmp_path / "parts", **changes)
    assert tiny.last_checkpoint(tmp_path / "parts")[0] == 4
    run(world, tmp_path / "parts", **changes)
    tiny.assert_same_run(tmp_path / "whole", tmp_path / "parts", 0)
    assert rollouts(tmp_path / "whole") == rollouts(tmp_path / "parts")
    if recipe == "spin":
        assert [step for step, row in enumerate(metrics(tmp_path / "whole")) if row["margin"] == 0] == [0, 3]


# ------------------------------------------------------------------------------------------------------------
# Sr-SPCE, and the controls for Sr-*

def test_sr_spce_begins_as_spce(world, tmp_path):
    """At π = π_ref Δ is 0: the first loss and gradient are osp's, the second ones are not. λ = 0 is osp bit
    for bit."""
    for name, recipe, changes in (("osp", "osp", {}), ("sr", "sr-spce", {}), ("zero", "sr-spce", dict(lam=0.0))):
        run(world, tmp_path / name, recipe=recipe, lr=1e-2, beta=0.1, steps=3, **changes)
    osp, sr, zero = (metrics(tmp_path / name) for name in ("osp", "sr", "zero"))
    assert [sr[0][name] for name in ("loss", "grad_norm")] == [osp[0][name] for name in ("loss", "grad_norm")]
    assert sr[0]["margin"] == 0 and sr[1]["margin"] == osp[1]["margin"] and sr[1]["loss"] != osp[1]["loss"]
    assert [row["loss"] for row in zero] == [row["loss"] for row in osp]
    assert same_weights(tmp_path / "zero", tmp_path / "osp")
    assert not same_weights(tmp_path / "sr", tmp_path / "osp")
    assert rollouts(tmp_path / "zero") == rollouts(tmp_path / "osp")


def test_sr_spce_by_hand(world, tmp_path):
    """Cross-entropy of p with σ(βh - λβh_p), h_p a constant: no gradient comes through the pass after p."""
    trainer = moved(trainer_of(world, tmp_path, recipe="sr-spce", beta=0.2, lam=0.4, temperature=3.0,
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
    plain = moved(trainer_of(world, tmp_path, recipe="dpo", beta=0.5 * (1 - lam)))
    naive = moved(trainer_of(world, tmp_path, recipe="sr-dpo", beta=0.5, lam=lam, refinement_prompt=""))
    assert all(pair.refined_x == pair.x for pair in naive.data.rows)
    value, expected = gradients(plain, plain.data.rows)
    same, found = gradients(naive, naive.data.rows)
    assert same == pytest.approx(value, rel=1e-12) and abs(value - math.log(2)) > 1e-3
    assert_close(found, {name: weight / (1 - lam) for name, weight in expected.items()})


def test_the_controls_as_typed(world, tmp_path, monkeypatch, capsys):
    """--refinement_prompt= and a paraphrase, as typed: the same first step, three ways to go on."""
    rows = []
    for name, typed in (("p", []), ("empty", ["--refinement_prompt="]), ("other", ["--refinement_prompt=Help:"])):
        given = settings(world, tmp_path / name, recipe="sr-dpo", lr=1e-2, lam=0.5)
        arguments = tiny.typed({key: given[key] for key in given if key not in ("k", "max_tokens")})
        code, _, error = tiny.command(train, capsys, monkeypatch, *arguments, *typed)
        assert code == 0, error
        rows.append(metrics(tmp_path / name))
    assert len({row[0]["loss"] for row in rows}) == 1 and len({row[1]["margin"] for row in rows}) == 1
    assert len({row[1]["loss"] for row in rows}) == 3 and len({row[1]["refined_margin"] for row in rows}) == 3
    empty = rows[1][1]
    assert empty["refined_margin"] == pytest.approx(empty["margin"] / 2, rel=1e-6)         # h - λh
    assert empty["augmented_accuracy"] == empty["accuracy"]


def test_the_exact_scale_is_the_printed_one_with_delta_over_beta(world, tmp_path):
    """sr-ipo, β = 0.2: (h - λΔ/β - 2.5)² is what λ/β gives as printed; and h - λh_p - 2.5 by hand."""
    exact, printed, less = (moved(trainer_of(world, tmp_path, recipe="sr-ipo", beta=0.2, **changes))
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
    trainer = trainer_of(world, tmp_path / "out", recipe="offline-soft", data=[file], steps=3)
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


def test_the_judge_of_a_data_set_is_the_one_named(world, tmp_path):
    """Another judge, other strengths."""
    p = [run(world, tmp_path / name, recipe="offline-soft", judge=str(world / name), steps=1)[0]["p"]
         for name in ("model", "other")]
    own = trainer_of(world, tmp_path / "out", recipe="offline-soft")
    own.update(0)
    assert p[0] != p[1] and p[0] == pytest.approx(np.mean([pair.strength for pair in own.batch(0)]), rel=1e-7)


def test_a_sure_judge_makes_offline_soft_dpo(world, tmp_path):
    """p = 1 in every row: the metrics and weights of dpo with the same settings."""
    file = tiny.write_jsonl(tmp_path / "sure.jsonl", [row | {"p": 1.0} for row in tiny.pairs(7, seed=4)])
    both = dict(data=[file], beta=0.3, optimizer="adam", grad_clip=1.0, steps=3)
    soft, hard = (run(world, tmp_path / recipe, recipe=recipe, **both) for recipe in ("offline-soft", "dpo"))
    for a, b in zip(soft, hard):
        for name in ("loss", "margin", "grad_norm", "accuracy"):
            assert a[name] == pytest.approx(b[name], rel=1e-7)
    tiny.assert_close(tiny.final(tmp_path / "offline-soft"), tiny.final(tmp_path / "dpo"), 1e-8)


# ------------------------------------------------------------------------------------------------------------
# Shares of the data

def rows_of(world, **changes):
    given = Settings(**settings(world, world / "out", **changes))
    return data.Dataset(given, data.load_tokenizer(world / "model"), 512, list, lambda text: None)


def test_shares_are_nested(world, tmp_path):
    """2 % ⊂ 10 % ⊂ 50 % ⊂ all of 100 rows, by their lines; another seed draws others; held-out rows are all
    there. Beside weights: a share of what the file counts."""
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.pairs(100, seed=5))
    held_out = tiny.write_jsonl(tmp_path / "held-out.jsonl", tiny.pairs(20, seed=6))

    def drawn(*files, **changes):
        found = rows_of(world, recipe="dpo", data=list(files), eval_data=[held_out], **changes)
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


@pytest.mark.parametrize("recipe", ["osp", "judge", "sft", "spin"])
def test_every_recipe_reads_its_share(recipe, world, tmp_path):
    """A fifth of 10 rows is two, whatever they are read for."""
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.pairs(10, seed=5))
    assert len(rows_of(world, recipe=recipe, data=[file], data_fraction=0.2)) == 2


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
    """All trainings on one rank and on two, and spin whole, cut, resumed -> place(name, ranks), their out_dir."""
    base = tmp_path_factory.mktemp("runs")

    def entry(ranks, name, changes, **more):
        given = settings(world, base / f"{name}-{ranks}", micro_batch_size={1: 8, 2: 1}[ranks], **changes)
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
@pytest.mark.parametrize("name, need", [("raft", "responses"), ("spin", "pairs")])
def test_rollouts_without_judged_pairs_can_be_replayed(name, need, done):
    """RAFT's best response to each prompt, SPIN's samples against the data set's: rows that an offline recipe
    reads."""
    written = rollouts(done(name, 1))
    rows, report = data.read_rows(done(name, 1) / "rollouts.jsonl", need)
    assert len(rows) == len(written) and not report.skipped
    assert {row["step"] for row in written} == {row["step"] for row in metrics(done(name, 1))}
    for row, raw in zip(rows, written):
        expected = [raw["response"], None] if name == "raft" else [raw["chosen"], raw["rejected"]]
        assert [row.chosen, row.rejected] == expected and row.finished == tuple(raw["finished"])


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
