"""RLHF: formulas by hand, reward models in transformers, PPO's parts against naive ones, one trajectory."""
import copy
import json
import math
import shutil

import pytest
import torch
import transformers

import data
import driver
import losses
import model
import sample
import tiny
from experiments import rlhf
from support.chats import chat_of
from support.cli import InputError
from support.families import FAMILIES, parse_config, with_reward_head
from tiny import metrics


def tensor(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model folder, a reward model of random weights beside it, and 13 pairs."""
    path = tmp_path_factory.mktemp("world")
    tiny.folder(path / "model")
    reward_folder(path / "reward", "llama")
    tiny.write_jsonl(path / "pairs.jsonl", tiny.pairs(13, seed=1))
    return path


def reward_folder(path, family, shift=0.25):
    """A reward model of random weights with the tokenizer of tiny.folder(…, family)."""
    language = tiny.folder(path.with_name(path.name + "-body"), family, seed=3, scale=0.7)
    net = model.load(language, reward_head=True)
    with torch.no_grad():
        net.head.weight.copy_(noise(*net.head.weight.shape, seed=4))
    net.config.source["reward_shift"] = shift
    shutil.copytree(language, path)
    model.save(net, path)
    return path


def settings(world, out, recipe, **changes):
    """Settings, as plain values, of a short float64 run whose steps are large enough to see."""
    own = dict(k=2, reward=str(world / "reward")) if recipe == "rlhf" else dict(k=1)
    return tiny.settings(world, out, recipe=recipe, **own | changes)


def make(world, out, recipe, **changes):
    return rlhf.TRAINERS[recipe](rlhf.Settings(**settings(world, out, recipe, **changes)))


def run(world, out, recipe, **changes):
    make(world, out, recipe, **changes).run()
    return metrics(out)


# ------------------------------------------------------------------------------------------------------------
# Formulas

def test_reward_loss():
    """Softplus of -1, ln 2 where the rewards are equal; gradient -σ(-(r⁺ - r⁻)) by r⁺, its opposite by r⁻."""
    chosen, rejected = tensor(1.5, -2.0, grad=True), tensor(0.5, -2.0, grad=True)
    loss = rlhf.reward_loss(chosen, rejected)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(2)])
    assert chosen.grad.tolist() == pytest.approx([-1 / (1 + math.exp(1)), -0.5])
    assert rejected.grad.tolist() == (-chosen.grad).tolist()


def test_token_rewards():
    """By hand; they add up to r - κ (log π_old(y) - log π_ref(y)); without κ there is only the last one."""
    rewards = rlhf.token_rewards(tensor(-1.0, -3.0), tensor(-3.0, -2.0), 3.0, 0.5)
    assert rewards.tolist() == [-1.0, 3.5]
    old, reference = noise(7), noise(7, seed=1)
    total = rlhf.token_rewards(old, reference, 1.7, 0.05).sum()
    assert float(total) == pytest.approx(1.7 - 0.05 * float(old.sum() - reference.sum()))
    assert rlhf.token_rewards(old, reference, 1.7, 0.0).tolist() == [0.0] * 6 + [1.7]
    assert rlhf.token_rewards(old, old, 0.0, 0.05).tolist() == [0.0] * 7 and torch.equal(old, noise(7))


def test_gae():
    """By hand; λ = 1 is return minus value, λ = 0 is δ, in between the sum over l as it is written."""
    assert rlhf.gae(tensor(0.0, 1.0), tensor(0.5, 0.25), 1.0, 0.5).tolist() == [0.125, 0.75]
    rewards, values = noise(6), noise(6, seed=1)
    to_come = rewards.flip(0).cumsum(0).flip(0)
    assert (rlhf.gae(rewards, values, 1.0, 1.0) - (to_come - values)).abs().max() < 1e-14
    for gamma, lam in ((0.9, 0.0), (0.9, 0.7), (1.0, 0.95)):
        following = [*values[1:].tolist(), 0.0]
        delta = [float(r) + gamma * v1 - float(v0) for r, v0, v1 in zip(rewards, values, following)]
        written = [sum((gamma * lam) ** i * delta[t + i] for i in range(6 - t)) for t in range(6)]
        assert rlhf.gae(rewards, values, gamma, lam).tolist() == pytest.approx(written, abs=1e-14)
    assert rlhf.gae(tensor(2.0), tensor(0.5), 0.9, 0.95).tolist() == [1.5]


def test_whiten():
    """(1, 3) by hand; mean 0, variance 1; the order of size stays; equal advantages say nothing. Two ranks
    with 30 and 20 values tell each other what makes both use the moments of all 50."""
    assert rlhf.whiten(tensor(1.0, 3.0)).tolist() == pytest.approx([-1, 1])
    values = 3 + 10 * noise(50)
    white, parts = rlhf.whiten(values), values.split(30)
    assert abs(white.mean()) < 1e-14 and abs(white.var(correction=0) - 1) < 1e-12
    assert torch.equal(white.argsort(), values.argsort())
    assert rlhf.whiten(tensor(2.0, 2.0, 2.0)).tolist() == [0, 0, 0]
    told = iter([[[len(part), float(part.sum())] for part in parts],
                 [[float((part - values.mean()).square().sum())] for part in parts]])
    split = rlhf.whiten(parts[0], lambda own: [sum(numbers) for numbers in zip(*next(told))])
    assert (split - white[:30]).abs().max() < 1e-12


@pytest.mark.parametrize("ratio, advantage, loss, slope", [     # slope: d loss / d log π, -ρ A if not clipped
    (1.5, 1.0, -1.2, 0.0), (1.5, -1.0, 1.5, 1.5),               # above: no further, but it may come back
    (0.5, 1.0, -0.5, -0.5), (0.5, -1.0, 0.8, 0.0),              # below
    (1.1, 2.0, -2.2, -2.2), (0.9, -2.0, 1.8, 1.8), (1.0, 3.0, -3.0, -3.0), (1.0, -3.0, 3.0, 3.0),
])
def test_policy_loss(ratio, advantage, loss, slope):
    logprob = tensor(math.log(ratio) - 2, grad=True)
    value = rlhf.policy_loss(logprob, tensor(-2.0), tensor(advantage), 0.2)
    value.sum().backward()
    assert value.item() == pytest.approx(loss) and logprob.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize("value, loss, slope", [     # V_old = 0, R = 1: V comes closer by ε = 0.2 per rollout
    (0.5, 0.32, 0.0), (-0.5, 1.125, -1.5), (0.1, 0.405, -0.9), (2.5, 1.125, 1.5), (0.0, 0.5, -1.0),
])
def test_value_loss(value, loss, slope):
    values = tensor(value, grad=True)
    found = rlhf.value_loss(values, tensor(0.0), tensor(1.0), 0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(loss) and values.grad.item() == pytest.approx(slope)


def test_gradients_of_the_losses():
    """Numerically, at random points (none within 1e-4 of a kink); with a wide ε: -ρ A and ½ (V - R)²."""
    old, advantages, values, returns = (noise(12, seed=i) for i in range(4))
    new, V = ((known + 0.4 * noise(12, seed=5)).requires_grad_() for known in (old, values))
    assert torch.autograd.gradcheck(lambda new: rlhf.policy_loss(new, old, advantages, 0.2), new)
    assert torch.autograd.gradcheck(lambda V: rlhf.value_loss(V, values, returns, 0.2), V)
    assert torch.autograd.gradcheck(rlhf.reward_loss, (new, V))
    wide = rlhf.policy_loss(new, old, advantages, 1e9)
    assert torch.allclose(wide, -(new - old).exp() * advantages)
    assert torch.allclose(rlhf.value_loss(V, values, returns, 1e9), 0.5 * (V - returns) ** 2)
    assert (rlhf.value_loss(V, values, returns, 0.2) >= 0.5 * (V - returns) ** 2).all()


# ------------------------------------------------------------------------------------------------------------
# One number instead of logits

X, YS = [1, 7, 8, 9], [[3, 4, 5, 2], [3, 4, 2], [6], [3, 4, 5, 2]]


@pytest.mark.parametrize("family", ["llama", "mistral", "neox"])
def test_a_forest_is_read_as_single_sequences_are(family):
    """Scores, values, gradients, and log-probabilities: a last token that is also another's middle, and two
    equal responses."""
    net = tiny.net(family)
    together = model.Transformer(with_reward_head(net.config)).to(torch.float64)
    together.load_state_dict({**net.state_dict(), "head.weight": noise(1, net.config.width, seed=9)})
    alone = copy.deepcopy(together)
    forest, starts = data.pack([X + y for y in YS]), [len(X)] * len(YS)
    weights = noise(len(YS)), noise(sum(map(len, YS)), seed=1)
    r, v = rlhf.scores(together, forest), rlhf.values_by_token(together, forest, starts)
    (r @ weights[0] + v @ weights[1]).backward()
    numbers = [alone.head(alone(torch.tensor([X + y])))[0, :, 0] for y in YS]
    r_alone = torch.stack([one[-1] for one in numbers])
    v_alone = torch.cat([one[len(X) - 1:-1] for one in numbers])
    (r_alone @ weights[0] + v_alone @ weights[1]).backward()
    assert (r - r_alone).abs().max() < 1e-10 and (v - v_alone).abs().max() < 1e-10 and r.std() > 0.1
    for (name, a), b in zip(together.named_parameters(), alone.parameters()):
        assert (a.grad - b.grad).abs().max() < 1e-9, name
    logits = [net.head(net(torch.tensor([X + y])))[0].log_softmax(-1) for y in YS]
    expected = torch.stack([one[len(X) - 1 + t, id] for one, y in zip(logits, YS) for t, id in enumerate(y)])
    assert (losses.logprobs_by_token(net, forest, starts) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("family, changes", [("llama", {}), ("mistral", {}), ("neox", {}),
                                             ("llama", {"tie_word_embeddings": True})])
def test_a_reward_model_is_transformers_sequence_classification(family, changes, world, tmp_path):
    """Trained here, read there: equal scores of x⊕y with its EOS, alone and padded; and our own reading."""
    folder, final = tiny.folder(tmp_path / "model", family, scale=0.7, **changes), tmp_path / "out/final"
    run(world, tmp_path / "out", "reward", model=str(folder), lr=1e-2, dtype="float32", shift_samples=4)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(final)
    ours, tokenizer = model.load(final, reward_head=True), data.load_tokenizer(final)
    assert type(theirs).__name__ == FAMILIES[ours.config.model_type].scorer and theirs.config.num_labels == 1
    pad = theirs.config.pad_token_id
    rows = [data.Row(**row, p=None, where="") for row in tiny.pairs(5, seed=8)]
    pairs, _ = data.encode_dataset(tokenizer, rows, chat_of(tokenizer, "hh"), 96, 48)
    sequences = [pair.x + y for pair in pairs for y in (pair.chosen, pair.rejected)]
    assert all(ids[-1] == tokenizer.eos_id != pad and pad not in ids for ids in sequences)
    with torch.no_grad():
        found = rlhf.scores(ours, data.pack(sequences))
        single = torch.cat([theirs(torch.tensor([ids])).logits[:, 0] for ids in sequences])
        width = max(map(len, sequences))
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences])
        padded = torch.tensor([ids + [pad] * (width - len(ids)) for ids in sequences])
        padded = theirs(padded, attention_mask=mask).logits[:, 0]
    assert (found - single).abs().max() < 1e-4 and (found - padded).abs().max() < 1e-4 and found.std() > 0.01


def test_padding_never_ends_a_response(world):
    """A row that no text has, or else <unk>; never BOS, EOS or the end of a turn; None where all can come."""
    llama = data.load_tokenizer(world / "model")
    neox = data.load_tokenizer(tiny.write_tokenizer(world / "neox", "neox"))
    same, wide = (tiny.net("llama", vocab_size=rows).config for rows in (420, 424))

    def padding(tokenizer, config):
        return rlhf.padding_id(tokenizer, chat_of(tokenizer, "hh"), config)
    assert padding(llama, same) == llama.unk_id == 0 and padding(llama, wide) == padding(neox, wide) == 423
    neox.sampling_mask = lambda rows: torch.ones(rows, dtype=torch.bool).numpy()
    assert padding(neox, same) is None


def test_a_language_model_becomes_a_reward_model(world):
    """Its body bit for bit, and a head of zeros; each kind of folder is refused in the other's place."""
    body, net = model.load(world / "model"), model.load(world / "model", reward_head=True)
    before, after = dict(body.named_parameters()), dict(net.named_parameters())
    head = after.pop("head.weight")
    assert head.shape == (1, 32) and not head.any()
    assert all(torch.equal(weight, before[name]) for name, weight in after.items())
    with pytest.raises(InputError, match="reward is a reward model"):
        sample.load_model(world / "reward", "float32", "cpu")
    source = json.loads((world / "reward/config.json").read_text())
    for wrong in ({"id2label": {"0": "a", "1": "b"}}, {"id2label": None}, {"num_labels": 3}):
        with pytest.raises(InputError, match="labels; a reward model has one"):
            parse_config(source | wrong)


# ------------------------------------------------------------------------------------------------------------
# The reward model

def test_reward_training(world, tmp_path):
    """From ln 2 exactly to every pair in order; held-out figures come from the same function."""
    rows = run(world, tmp_path, "reward", steps=25, batch_size=13, micro_batch_size=13, lr=3e-3,
               eval_every=12, eval_data=[str(world / "pairs.jsonl")])
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert rows[0]["margin"] == rows[0]["accuracy"] == 0 and "kl" not in rows[0]
    assert rows[-1]["accuracy"] == 1 and rows[-1]["loss"] < 0.1 and rows[-1]["margin"] > 2
    for name in ("loss", "accuracy", "margin"):          # the same 13 rows in another order
        assert rows[11][f"eval_{name}"] == pytest.approx(rows[12][name], rel=1e-6)


def test_rewards_are_shifted_by_the_mean_of_the_start_models_responses(world, tmp_path):
    """Recomputed with sample.generate, one prompt after the other: 5 prompts, one sample each."""
    trainer = make(world, tmp_path, "reward", shift_samples=5, dtype="float32", lr=1e-2)
    trainer.run()
    shift = json.loads((tmp_path / "final/config.json").read_text())["reward_shift"]
    start, stop, allowed = model.load(world / "model"), trainer.stop_ids, trainer.allowed
    net, found = model.load(tmp_path / "final", reward_head=True), []
    for place, row in enumerate(trainer.data.positions(0, 5)):
        uniforms = sample.uniforms(0, 3, place, 1, trainer.data.max_tokens)[None]
        one = sample.generate(start, [row.x], uniforms, stop, allowed, 1.0, 1.0, [96 - len(row.x)])[0][0]
        with torch.no_grad():
            found.append(net.head(net(torch.tensor([row.x + one.ids])))[0, -1, 0].item())
    assert shift == pytest.approx(sum(found) / 5, abs=1e-5) and abs(shift) > 1e-4


# ------------------------------------------------------------------------------------------------------------
# PPO

@pytest.mark.parametrize("family", ["llama", "neox"])
def test_ppo_from_end_to_end(family, tmp_path):
    """At π = π_ref: kl 0 and, with one update per rollout, ratios of 1: policy loss 0 after whitening. What
    is left loads in transformers and is another model; the folders that were read stay as they were. reward
    and kl are means over the step's rollouts, which sft can read."""
    path, out = tmp_path / "read", tmp_path / "out"
    path.mkdir()
    reward_folder(path / "reward", family)
    start = model.load(tiny.folder(path / "model", family))
    held_out = [tiny.write_jsonl(path / "pairs.jsonl", tiny.pairs(8, seed=1))]
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    rows = run(path, out, "rlhf", dtype="float32", eval_data=held_out, eval_every=2, ppo_epochs=1)
    first, last = rows[0], rows[2]
    assert first["kl"] == first["clip_share"] == 0 and abs(first["policy_loss"]) < 1e-6 < first["value_loss"]
    assert first["loss"] == pytest.approx(0.1 * first["value_loss"], abs=1e-6) and last["kl"] != 0
    assert {"reward", "explained_variance", "response_length", "grad_norm", "finished"} < last.keys()
    measured = [("eval_reward" in row, "eval_kl" in row) for row in rows]
    assert measured == [(False, False), (True, True), (True, True)]
    rollouts = tiny.rollouts(out)
    for i, row in enumerate(rows):
        for name in ("reward", "kl"):
            mean = sum(one[name] for one in rollouts[8 * i:8 * i + 8]) / 8
            assert len(rollouts) == 24 and mean == pytest.approx(row[name], abs=1e-5)
    found, report = data.read_rows(out / "rollouts.jsonl", "responses")
    assert len(found) + sum(map(len, report.skipped.values())) == 24 and len(found) > 12
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(out / "final"), model.load(out / "final")
    tokens = torch.randint(0, 400, (2, 20), generator=torch.Generator().manual_seed(0))
    assert (ours.head(ours(tokens)) - theirs(tokens).logits).abs().max() < 1e-4
    assert (ours.head(ours(tokens)) - start.head(start(tokens))).abs().max() > 1e-3
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def naive(trainer, responses, policy, value):
    """The whole objective of a rollout, one token at a time, as it is written in the sources."""
    s, known, total = trainer.settings, [], 0

    def logprobs(net, one):
        logits, n = net.head(net(torch.tensor([one.x + one.ids])))[0], len(one.x)
        return logits.log_softmax(-1)[range(n - 1, n + len(one.ids) - 1), one.ids]

    def numbers(net, one):
        return net.head(net(torch.tensor([one.x + one.ids])))[0, len(one.x) - 1:, 0]
    for one in responses:
        T = len(one.ids)
        with torch.no_grad():
            old, reference = logprobs(trainer.policy, one), logprobs(trainer.reference, one)
            V = numbers(trainer.value, one).tolist()[:-1] + [0.0]
            score = float(numbers(trainer.reward, one)[-1]) - 0.25 - s.eos_penalty * (one.ids[-1] != 2)
        r = [-s.kl_coef * float(old[t] - reference[t]) + score * (t == T - 1) for t in range(T)]
        delta = [r[t] + s.gamma * V[t + 1] - V[t] for t in range(T)]
        A = [sum((s.gamma * s.gae_lambda) ** i * delta[t + i] for i in range(T - t)) for t in range(T)]
        known.append((one, old, V, A))
    every = [a for *_, A in known for a in A]
    mean = sum(every) / len(every)
    deviation = (sum((a - mean) ** 2 for a in every) / len(every)) ** 0.5
    for one, old, V_old, A in known:
        new, V = logprobs(policy, one), numbers(value, one)
        for t in range(len(one.ids)):
            ratio, a, R = (new[t] - old[t]).exp(), (A[t] - mean) / deviation, A[t] + V_old[t]
            near = min(max(V[t], V_old[t] - s.value_clip_range), V_old[t] + s.value_clip_range)
            total = total - min(ratio * a, min(max(ratio, 1 - s.clip_range), 1 + s.clip_range) * a)
            total = total + s.value_coef * 0.5 * max((V[t] - R) ** 2, (near - R) ** 2)
    return total / len(every)


def test_the_objective_is_the_written_one(world, tmp_path):
    """Loss and gradient of both networks, moved away from the rollout, against loops over single tokens.
    γ = 0.9, so that discounting shows; max_tokens = 12 leaves most responses without an EOS."""
    sharper = tiny.folder(tmp_path / "sharper", scale=0.7)
    trainer = make(world, tmp_path / "out", "rlhf", gamma=0.9, eos_penalty=2.0, model=str(sharper),
                   reference=str(world / "model"))
    trainer.out.path.mkdir()
    groups = trainer.rollout(0, trainer.batch(0))
    responses, moved = rlhf.all_of(groups), []
    for net in (trainer.policy, trainer.value):
        moved.append(copy.deepcopy(net))
        with torch.no_grad():
            for i, weight in enumerate(moved[-1].parameters()):
                weight += 0.05 * weight.std() * noise(*weight.shape, seed=i)
    weights = [weight for net in moved for weight in net.parameters()]
    expected = naive(trainer, responses, *moved)
    gradients = torch.autograd.grad(expected, weights)
    trainer.policy, trainer.value = moved
    trainer.log = trainer.new_log()
    loss = trainer.ppo_loss(groups).sum() / sum(group.count for group in groups)
    loss.backward()
    assert not all(one.finished for one in responses) and 0.02 < trainer.log.means()["clip_share"] < 0.98
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for weight, wanted in zip(weights, gradients):
        assert (weight.grad - wanted).abs().max() < 1e-9 * max(1.0, float(wanted.abs().max()))


def test_the_value_network_starts_from_the_reward_model(world, tmp_path):
    """Its values at last tokens are the unshifted scores; an update moves it, and nothing that is frozen."""
    trainer, forest = make(world, tmp_path, "rlhf", steps=1), data.pack([X + y for y in YS])
    scores = rlhf.scores(trainer.reward, forest)
    reference = copy.deepcopy(trainer.reference.state_dict())
    assert trainer.shift == 0.25 and torch.equal(rlhf.scores(trainer.value, forest), scores)
    trainer.run()
    assert (rlhf.scores(trainer.value, forest) - scores).abs().max() > 1e-3
    assert torch.equal(rlhf.scores(trainer.reward, forest), scores)
    tiny.assert_close(trainer.reference.state_dict(), reference, 0)


def test_a_response_without_an_end_pays_for_it(world, tmp_path):
    """With λ = 1 a token's return is what is still to come: the penalty more with an EOS than without."""
    trainer = make(world, tmp_path, "rlhf", gae_lambda=1.0, eos_penalty=0.75, kl_coef=0.1)
    same = dict(x=[1], ids=[5, 6], score=2.0, old=tensor(-1.0, -2.0), reference=tensor(-2.0, -1.0),
                values=tensor(0.3, 0.4))
    whole, cut = (rlhf.Response(**same, finished=done) for done in (True, False))
    trainer.estimate([whole, cut])
    assert whole.returns.tolist() == pytest.approx([2.0, 2.0 + 0.1])
    assert cut.returns.tolist() == pytest.approx([1.25, 1.35])
    white = torch.cat((whole.advantages, cut.advantages))
    assert abs(white.mean()) < 1e-12 and white.var(correction=0) == pytest.approx(1)


def test_ppo_raises_the_reward_and_stays_near_the_reference(world, tmp_path, monkeypatch):
    """A reward that anybody can learn, how many of the last four ids are even: without κ it rises, and the KL
    with it; with a large one the policy stays where it was."""
    def even(net, forest):
        return torch.stack([(forest.tokens[path[-4:]] % 2 == 0).double().sum() for path in forest.paths])
    monkeypatch.setattr(rlhf, "scores", even)
    free, tied = (run(world, tmp_path / str(kl_coef), "rlhf", steps=8, batch_size=6, micro_batch_size=6, k=6,
                      max_tokens=4, lr=2e-2, kl_coef=kl_coef) for kl_coef in (0, 2))
    assert free[0]["reward"] == tied[0]["reward"] and free[-1]["reward"] > free[0]["reward"] + 0.7
    assert free[-1]["kl"] > 2 and abs(tied[-1]["kl"]) < free[-1]["kl"] / 2
    assert free[-1]["value_loss"] < free[0]["value_loss"] / 4
    assert free[-1]["explained_variance"] > free[0]["explained_variance"]


# ------------------------------------------------------------------------------------------------------------
# One trajectory

@pytest.mark.parametrize("recipe", ["reward", "rlhf"])
def test_accumulation_does_not_change_the_trajectory(recipe, world, tmp_path):
    for size in (1, 3, 4):
        run(world, tmp_path / str(size), recipe, micro_batch_size=size, steps=2)
    for size in (1, 3):                                  # metrics.jsonl keeps eight digits
        tiny.assert_same_run(tmp_path / str(size), tmp_path / "4", 1e-10, digits=1e-7)


@pytest.mark.processes
def test_two_ranks_follow_one(world, tmp_path):
    """Both recipes, sharded over two processes, equal one process to 1e-10; the last batch of the epoch of 13
    has one row, so that the second rank has none. A checkpoint of two ranks is read by one."""
    held_out = [tiny.write_jsonl(tmp_path / "held_out.jsonl", tiny.pairs(3, seed=6))]
    epoch = dict(steps=None, eval_data=held_out)
    runs = {"reward": dict(recipe="reward", shift_samples=5, **epoch), "ppo": dict(recipe="rlhf", **epoch),
            "resumed": dict(recipe="rlhf", steps=1, batch_size=3, micro_batch_size=1)}
    one, two = ([{"settings": settings(world, tmp_path / f"{name}-{ranks}", **changes), "exact": True}
                 for name, changes in runs.items()] for ranks in (1, 2))
    driver.launch(two, 2, tmp_path / "runs.json")
    one[-1]["settings"]["steps"] = 3
    two[-1]["settings"] |= dict(steps=3, resume="force")      # after the two ranks' first step, one goes on
    driver.launch([*one, two[-1]], 1, None)
    for name in runs:
        tiny.assert_same_run(tmp_path / f"{name}-1", tmp_path / f"{name}-2", 1e-10)
    one, two = (json.loads((tmp_path / f"reward-{ranks}/final/config.json").read_text()) for ranks in (1, 2))
    assert one["reward_shift"] == pytest.approx(two["reward_shift"], abs=1e-10) and one["reward_shift"] != 0


@pytest.mark.parametrize("recipe", ["reward", "rlhf"])
def test_resume_equals_the_uninterrupted_run(recipe, world, tmp_path, monkeypatch):
    """Stopped in step 4 of 5 and started again: the same bits in networks, optimizers and rollouts."""
    changes = dict(steps=5, save_every=2, dtype="float32")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(world, whole, recipe, **changes)
    learn = rlhf.TRAINERS[recipe].learn

    def stop(trainer, *given):
        if trainer.state["step"] == 3:
            raise KeyboardInterrupt
        return learn(trainer, *given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rlhf.TRAINERS[recipe], "learn", stop)
        run(world, parts, recipe, **changes)
    assert tiny.last_checkpoint(parts)[0] == 2
    run(world, parts, recipe, **changes)
    tiny.assert_same_run(whole, parts, 0)
    saved = [name.split(".") for name in tiny.last_checkpoint(whole)[1]]
    networks = {"policy", "value"} if recipe == "rlhf" else {"policy"}
    assert {first for first, *_ in saved} == networks | {"optimizer"}
    assert {second for first, second, *_ in saved if first == "optimizer"} == networks
    assert (whole / "rollouts.jsonl").exists() == (recipe == "rlhf")
    assert recipe == "reward" or tiny.rollouts(whole) == tiny.rollouts(parts)


def test_a_run_that_diverges_stops_with_a_sentence(world, tmp_path, capsys):
    """Weights of 1e30 after the first update: the second fails, the other two are not tried, and nothing can
    be sampled then. The step has made an update, so it does not count as skipped."""
    with pytest.raises(InputError, match="logits are not finite, so nothing can be sampled: .*has diverged"):
        run(world, tmp_path, "rlhf", steps=9, lr=1e30, dtype="float32", grad_clip=0.0)
    said = [line for line in capsys.readouterr().out.splitlines() if "is not finite" in line]
    assert len(said) == 1 and said[0].startswith("step 1, update 2: the loss or its gradient is not finite")
    assert [(row["step"], row["skipped"]) for row in metrics(tmp_path)] == [(1, 0)]


def test_a_rollout_that_says_nothing_is_skipped(world, tmp_path, monkeypatch):
    """Where already the first update fails: once per rollout, and five such rollouts end the run."""
    monkeypatch.setattr(rlhf, "policy_loss", lambda logprobs, *rest: logprobs * math.nan)
    with pytest.raises(InputError, match="step 5: .*not finite, for 5 steps in a row"):
        run(world, tmp_path, "rlhf", steps=9)
    assert [row["skipped"] for row in metrics(tmp_path)] == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------------------
# Command line

PPO = "--model={model} --prompts={pairs} --reward={reward} "
REWARD = "--recipe=reward --model={model} --data={pairs} "


@pytest.mark.parametrize("arguments, words", [
    ("--recipe=ppo", ["--recipe=ppo", "reward, rlhf"]), ("--model={model} --prompts={pairs}", ["--reward"]),
    ("--model={model} --prompts={pairs} --reward={model}", ["--reward=", "is no reward model"]),
    ("--model={model} --prompts={pairs} --reward=nowhere", ["nowhere"]),
    ("--model={reward} --prompts={pairs} --reward={reward}", ["--model=", "is a reward model"]),
    ("--recipe=reward --model={reward} --data={pairs}", ["--model=", "is a reward model"]),
    ("--model={model} --prompts={pairs} --reward={other}", ["different tokenizers"]),
    ("--model={model} --prompts={pairs} --reward={odd}", ["reward_shift", "nan"]),
    ("--model={model} --reward={reward}", ["--prompts"]), ("--recipe=reward --model={model}", ["--data"]),
    ("--reward={reward}", ["--reward needs a model"]), ("--reward=", ["--reward= is empty"]),
    *((f"--{typed}", [f"--{typed}: must be"])
      for typed in "k=0 kl_coef=-1.0 kl_coef=nan clip_range=0.0 value_clip_range=-1.0 gae_lambda=1.5 "
                   "gamma=-0.1 ppo_epochs=0 eos_penalty=-1.0 shift_samples=0".split()),
    ("--lora_rank=4", ["--lora_rank=4", "train.py"]), ("--kl=0.1", ["--kl"]),
    ("--model={model} --dry_run", ["--dry_run", "train.py"]),
    *((f"{PPO}--{typed}", [f"--{typed.split('=')[0]} would change nothing"])
      for typed in "beta=0.1 lam=1 judge=x judge_task=summary reference_cache=x shift_samples=3".split()),
    *((f"{REWARD}--{typed}", [f"--{typed.split('=')[0]} would change nothing"])
      for typed in "k=2 kl_coef=1 reward=x reference=x max_tokens=3 temperature=1 ppo_epochs=4".split()),
])
def test_bad_settings_get_one_sentence(arguments, words, world, tmp_path, monkeypatch, capsys):
    """One line on stderr that names what is wrong, exit status 1, nothing written."""
    for name, family, shift in (("other", "neox", 0.0), ("odd", "llama", math.nan)):
        if "{" + name + "}" in arguments:
            reward_folder(tmp_path / name, family, shift)
    arguments = arguments.format(model=world / "model", reward=world / "reward", pairs=world / "pairs.jsonl",
                                 other=tmp_path / "other", odd=tmp_path / "odd").split()
    code, _, error = tiny.command(rlhf, capsys, monkeypatch, *arguments, f"--out_dir={tmp_path / 'out'}")
    assert code == 1 and error.startswith("error: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_a_setting_with_effect_passes():
    """What each recipe reads, all of it at once."""
    both = dict(model="m", eval_data=["e"], optimizer="adamw", weight_decay=0.1, max_length=50, chat="hh")
    rlhf.Settings(recipe="reward", data=["d"], shift_samples=9, **both).check_used()
    ppo = dict(kl_coef=0.1, ppo_epochs=2, clip_range=0.1, value_clip_range=0.3, value_coef=1.0, gamma=0.9,
               gae_lambda=0.9, eos_penalty=2.0, temperature=0.5, top_p=0.5, k=3, max_tokens=9)
    rlhf.Settings(recipe="rlhf", reward="r", reference="f", prompts=["p"], **ppo, **both).check_used()


def test_the_reward_models_folder_belongs_to_the_run(world, tmp_path):
    """out_dir may not lie in it, and its contents may not change."""
    folder = reward_folder(tmp_path / "reward", "llama")
    with pytest.raises(InputError, match="lies in the model folder"):
        run(world, folder / "out", "rlhf", reward=str(folder), steps=1)
    run(world, tmp_path / "out", "rlhf", reward=str(folder), steps=1)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("0.25", "0.75"))
    with pytest.raises(InputError, match=f"the contents of {folder}"):
        run(world, tmp_path / "out", "rlhf", reward=str(folder), steps=1)


def test_the_toy_world_in_miniature(tmp_path, monkeypatch, capsys):
    """Without --model: base, SFT, reward model, PPO, and a table with the rows of SFT and PPO."""
    tiny.small_world(monkeypatch, 2)
    code, printed, _ = tiny.command(rlhf, capsys, monkeypatch, f"--out_dir={tmp_path}", "--toy_family=neox",
                                    "--kl_coef=0.1")
    assert code == 0 and "experiments.rlhf" in printed and f"--reward={tmp_path / 'reward/final'}" in printed
    table = (tmp_path / "result-rlhf.txt").read_text()
    rows = {line.split()[0] for line in table.splitlines() if line[:4] in ("sft ", "rlhf", "rewa", "base")}
    assert table in printed and rows >= {"sft", "rlhf"} and "reward model's accuracy on 16 held-out" in table


@pytest.mark.slow
def test_rlhf_on_the_toy_world(tmp_path):
    """The whole job: the reward model orders three of four held-out pairs as labelled, and PPO raises the
    learned and the true reward with a KL below 20 nats."""
    rlhf.world(rlhf.Settings(out_dir=str(tmp_path)))
    accuracy, rows = metrics(tmp_path / "reward")[-1]["eval_accuracy"], metrics(tmp_path / "rlhf")
    assert accuracy > 0.7 and rows[-1]["eval_reward"] > rows[0]["reward"] + 1 and 0 < rows[-1]["eval_kl"] < 20
    lines = (tmp_path / "result-rlhf.txt").read_text().splitlines()
    table = {line.split()[0]: line.split() for line in lines if line[:4] in ("sft ", "rlhf")}
    assert float(table["rlhf"][1]) > float(table["sft"][1]) + 0.2
