"""RLHF: the formulas by hand, reward folders in transformers, PPO's parts against naive ones, one trajectory, resume."""
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from support import cli
import data
import losses
import model
from experiments import rlhf
import sample
import tiny
from experiments import toy
import train
from support.cli import InputError
from test_train import ROOT, assert_same, assert_same_weights, figures, metrics

FLOAT = dict(dtype=torch.float64)


def tensor(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **FLOAT)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model folder, a reward model of random weights beside it, and 13 pairs."""
    path = tmp_path_factory.mktemp("world")
    tiny.folder(path / "model")
    reward_folder(path / "reward", "llama")
    tiny.write_jsonl(path / "pairs.jsonl", tiny.pairs(13, seed=1))
    return path


def reward_folder(path, family, shift=0.25, **changes):
    """A reward model of random weights with the tokenizer of tiny.folder(…, family)."""
    language = tiny.folder(path.with_name(path.name + "-body"), family, seed=3, scale=0.7, **changes)
    net = model.load(language, scores=True)
    with torch.no_grad():
        net.head.weight.copy_(noise(*net.head.weight.shape, seed=4))
    net.config.source["reward_shift"] = shift
    shutil.copytree(language, path)
    model.save(net, path)
    return path


def settings(world, out, recipe, **changes):
    """Settings of a short float64 run whose steps are large enough to see; all of it as plain values."""
    own = dict(data=[str(world / "pairs.jsonl")]) if recipe == "reward" else \
        dict(reward=str(world / "reward"), prompts=[str(world / "pairs.jsonl")], k=2, max_tokens=12)
    return {"recipe": recipe, "model": str(world / "model"), "out_dir": str(out), "steps": 3, "batch_size": 4, "lr": 1e-3,
            "warmup_steps": 0, "max_length": 96, "dtype": "float64", **own, **changes}


def make(world, out, recipe, **changes):
    return rlhf.TRAINERS[recipe](rlhf.Settings(**settings(world, out, recipe, **changes)))


def run(world, out, recipe, **changes):
    make(world, out, recipe, **changes).run()
    return metrics(out)


# ---------------------------------------------------------------------------------------------------------------------
# Formulas

def test_reward_loss():
    """Softplus of -1 by hand, ln 2 where the rewards are equal, gradient -σ(-(r⁺ - r⁻)) by r⁺ and its opposite by r⁻."""
    chosen, rejected = tensor(1.5, -2.0, grad=True), tensor(0.5, -2.0, grad=True)
    loss = rlhf.reward_loss(chosen, rejected)
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(2)])
    loss.sum().backward()
    assert chosen.grad.tolist() == pytest.approx([-1 / (1 + math.exp(1)), -0.5])
    assert rejected.grad.tolist() == (-chosen.grad).tolist()
    assert torch.autograd.gradcheck(rlhf.reward_loss, (noise(5).requires_grad_(), noise(5, seed=1).requires_grad_()))


def test_token_rewards():
    """By hand; they add up to r - κ (log π_old(y) - log π_ref(y)); without κ there is only the last one."""
    rewards = rlhf.token_rewards(tensor(-1.0, -3.0), tensor(-3.0, -2.0), 3.0, 0.5)
    assert rewards.tolist() == [-1.0, 3.5]
    old, reference = noise(7), noise(7, seed=1)
    before = old.clone()
    total = rlhf.token_rewards(old, reference, 1.7, 0.05).sum()
    assert float(total) == pytest.approx(1.7 - 0.05 * float(old.sum() - reference.sum()))
    assert rlhf.token_rewards(old, reference, 1.7, 0.0).tolist() == [0.0] * 6 + [1.7]
    assert rlhf.token_rewards(old, old, 0.0, 0.05).tolist() == [0.0] * 7 and torch.equal(old, before)


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
    """(1, 3) by hand; mean 0 and variance 1; the order of size stays; equal advantages say nothing; ranks agree."""
    assert rlhf.whiten(tensor(1.0, 3.0)).tolist() == pytest.approx([-1, 1])
    values = 3 + 10 * noise(50)
    white = rlhf.whiten(values)
    assert abs(white.mean()) < 1e-14 and abs(white.var(correction=0) - 1) < 1e-12
    assert torch.equal(white.argsort(), values.argsort())
    assert rlhf.whiten(tensor(2.0, 2.0, 2.0)).tolist() == [0, 0, 0]
    parts, asked = values.split(30), iter([[[len(part), float(part.sum())] for part in values.split(30)],
                                          [[float((part - values.mean()).square().sum())] for part in values.split(30)]])
    split = rlhf.whiten(parts[0], lambda own: [sum(numbers) for numbers in zip(*next(asked))])
    assert (split - white[:30]).abs().max() < 1e-12


@pytest.mark.parametrize("ratio, advantage, loss, slope", [      # slope: d loss / d log π, -ρ A where nothing is clipped
    (1.5, 1.0, -1.2, 0.0), (1.5, -1.0, 1.5, 1.5),                # above: it may not grow further, but may come back
    (0.5, 1.0, -0.5, -0.5), (0.5, -1.0, 0.8, 0.0),               # below
    (1.1, 2.0, -2.2, -2.2), (0.9, -2.0, 1.8, 1.8), (1.0, 3.0, -3.0, -3.0), (1.0, -3.0, 3.0, 3.0),
])
def test_policy_loss(ratio, advantage, loss, slope):
    logprob = tensor(math.log(ratio) - 2, grad=True)
    value = rlhf.policy_loss(logprob, tensor(-2.0), tensor(advantage), 0.2)
    value.sum().backward()
    assert value.item() == pytest.approx(loss) and logprob.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize("value, loss, slope", [                 # V_old = 0, R = 1: V may come closer by ε = 0.2 a rollout
    (0.5, 0.32, 0.0), (-0.5, 1.125, -1.5), (0.1, 0.405, -0.9), (2.5, 1.125, 1.5), (0.0, 0.5, -1.0),
])
def test_value_loss(value, loss, slope):
    values = tensor(value, grad=True)
    found = rlhf.value_loss(values, tensor(0.0), tensor(1.0), 0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(loss) and values.grad.item() == pytest.approx(slope)


def test_gradients_of_the_losses():
    """Numerically, at random points (none within 1e-4 of a kink); with a wide ε they are -ρ A and ½ (V - R)²."""
    old, advantages, values, returns = (noise(12, seed=i) for i in range(4))
    logprobs, new = old + 0.4 * noise(12, seed=5), values + 0.4 * noise(12, seed=6)
    assert torch.autograd.gradcheck(lambda p: rlhf.policy_loss(p, old, advantages, 0.2), logprobs.requires_grad_())
    assert torch.autograd.gradcheck(lambda v: rlhf.value_loss(v, values, returns, 0.2), new.requires_grad_())
    wide = rlhf.policy_loss(logprobs, old, advantages, 1e9)
    assert torch.allclose(wide, -(logprobs - old).exp() * advantages)
    assert torch.allclose(rlhf.value_loss(new, values, returns, 1e9), 0.5 * (new - returns) ** 2)
    assert (rlhf.value_loss(new, values, returns, 0.2) >= 0.5 * (new - returns) ** 2).all()


# ---------------------------------------------------------------------------------------------------------------------
# One number instead of logits

X, YS = [1, 7, 8, 9], [[3, 4, 5, 2], [3, 4, 2], [6], [3, 4, 5, 2]]


def scorer(family):
    net = tiny.net(family)
    head = model.Transformer(model.scoring(net.config)).to(torch.float64)
    head.load_state_dict({**net.state_dict(), "head.weight": noise(1, net.config.width, seed=9)})
    return head


@pytest.mark.parametrize("family", ["llama", "mistral", "neox"])
def test_a_forest_scores_as_single_sequences_do(family):
    """Scores, values and their gradients: a last token that is also another's middle, and two equal responses."""
    together, alone = scorer(family), scorer(family)
    forest, starts = data.pack([X + y for y in YS]), [len(X)] * len(YS)
    weights = noise(len(YS)), noise(sum(map(len, YS)), seed=1)
    r, v = rlhf.scores(together, forest), rlhf.values_by_token(together, forest, starts)
    (r @ weights[0] + v @ weights[1]).backward()
    hidden = [alone.head(alone(torch.tensor([X + y])))[0, :, 0] for y in YS]
    r_alone = torch.stack([h[-1] for h in hidden])
    v_alone = torch.cat([h[len(X) - 1:-1] for h in hidden])
    (r_alone @ weights[0] + v_alone @ weights[1]).backward()
    assert (r - r_alone).abs().max() < 1e-10 and (v - v_alone).abs().max() < 1e-10 and r.std() > 0.1
    for (name, a), b in zip(together.named_parameters(), alone.parameters()):
        assert (a.grad - b.grad).abs().max() < 1e-9, name


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_logprobs_by_token(family):
    """Of each token of each response in turn, equal ones too; logprobs is their sum."""
    net = tiny.net(family)
    forest, starts = data.pack([X + y for y in YS]), [len(X)] * len(YS)
    expected = []
    for y in YS:
        logits = net.head(net(torch.tensor([X + y])))[0].log_softmax(-1)
        expected += [logits[len(X) - 1 + t, id] for t, id in enumerate(y)]
    found = losses.logprobs_by_token(net, forest, starts)
    assert (found - torch.stack(expected)).abs().max() < 1e-10
    sums = [part.sum().item() for part in found.split([len(y) for y in YS])]
    assert losses.logprobs(net, forest, starts).tolist() == pytest.approx(sums, abs=1e-12)


@pytest.mark.parametrize("family, changes", [("llama", {}), ("mistral", {}), ("neox", {}),
                                             ("llama", {"tie_word_embeddings": True})])
def test_a_reward_model_is_transformers_sequence_classification(family, changes, world, tmp_path):
    """Trained here, read there: equal scores of x⊕y with its EOS, alone and padded; and of our own reading of the folder."""
    folder = tiny.folder(tmp_path / "model", family, scale=0.7, **changes)
    run(world, tmp_path / "out", "reward", model=str(folder), lr=1e-2, dtype="float32", shift_samples=4)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/final")
    ours = model.load(tmp_path / "out/final", scores=True)
    assert type(theirs).__name__ == model.SCORERS[ours.config.model_type] and theirs.config.num_labels == 1
    tokenizer = data.load_tokenizer(tmp_path / "out/final")
    pad = theirs.config.pad_token_id
    rows = [data.Row(row["prompt"], row["chosen"], row["rejected"], None, "") for row in tiny.pairs(5, seed=8)]
    pairs, _ = data.encode_dataset(tokenizer, rows, "hh", 96, 48)
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
    """A row that no text has; <unk> where there is none; never BOS, EOS or the end of a turn; None where all can come."""
    llama, neox = data.load_tokenizer(world / "model"), data.load_tokenizer(tiny.write_tokenizer(world / "neox", "neox"))
    config = tiny.net("llama", vocab_size=420).config
    assert rlhf.padding_id(llama, "hh", config) == llama.unk_id == 0
    wide = tiny.net("llama", vocab_size=424).config
    assert rlhf.padding_id(llama, "hh", wide) == 423
    assert rlhf.padding_id(neox, "hh", tiny.net("neox", vocab_size=424).config) == 423
    neox.sampling_mask = lambda rows: torch.ones(rows, dtype=torch.bool).numpy()
    assert rlhf.padding_id(neox, "hh", config) is None


def test_a_language_model_becomes_a_reward_model(world):
    """Its body bit for bit, and a head of zeros; and each kind of folder is refused in the other's place."""
    body, net = model.load(world / "model"), model.load(world / "model", scores=True)
    before = dict(body.named_parameters())
    for name, weight in net.named_parameters():
        assert torch.equal(weight, before[name]) if name != "head.weight" else weight.shape == (1, 32) and not weight.any()
    with pytest.raises(InputError, match="reward is a reward model .LlamaForSequenceClassification"):
        sample.load_model(world / "reward", "float32", "cpu")
    source = json.loads((world / "reward/config.json").read_text())
    for wrong in ({"id2label": {"0": "a", "1": "b"}}, {"id2label": None}, {"num_labels": 3}):
        with pytest.raises(InputError, match="labels; a reward model has one"):
            model.parse_config(source | wrong)


# ---------------------------------------------------------------------------------------------------------------------
# The reward model

def test_reward_training(world, tmp_path):
    """From ln 2 exactly to every pair in order; the margin is r⁺ - r⁻; held-out figures come from the same function."""
    rows = run(world, tmp_path, "reward", steps=25, batch_size=13, micro_batch_size=13, lr=3e-3, eval_every=12,
               eval_data=[str(world / "pairs.jsonl")])
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-7) and rows[0]["margin"] == rows[0]["accuracy"] == 0
    assert rows[-1]["accuracy"] == 1 and rows[-1]["loss"] < 0.1 and rows[-1]["margin"] > 2
    for name in ("loss", "accuracy", "margin"):
        assert rows[11][f"eval_{name}"] == pytest.approx(rows[12][name], rel=1e-6)         # the same 13 rows in another order
    assert "kl" not in rows[0] and "chosen_logp" not in rows[0]


def test_rewards_are_shifted_by_the_mean_of_the_start_models_responses(world, tmp_path):
    """Recomputed with sample.generate, one prompt after the other: 5 prompts, one sample each."""
    trainer = make(world, tmp_path, "reward", shift_samples=5, dtype="float32", lr=1e-2)
    trainer.run()
    config = json.loads((tmp_path / "final/config.json").read_text())
    start, tokenizer = sample.load_model(world / "model", "float32", "cpu")
    stop, allowed = sample.stopping(tokenizer, "hh", start.config)
    net, found = model.load(tmp_path / "final", scores=True), []
    for place, row in trainer.data.positions(0, 5):
        uniforms = sample.uniforms(0, 3, place, 1, trainer.data.max_tokens)[None]
        one = sample.generate(start, [row.x], uniforms, stop, allowed, 1.0, 1.0, [96 - len(row.x)])[0][0]
        with torch.no_grad():
            found.append(net.head(net(torch.tensor([row.x + one.ids])))[0, -1, 0].item())
    assert config["reward_shift"] == pytest.approx(sum(found) / 5, abs=1e-5) and abs(config["reward_shift"]) > 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# PPO

@pytest.mark.parametrize("family", ["llama", "neox"])
def test_ppo_from_end_to_end(family, tmp_path):
    """At π = π_ref: kl 0 and, with one update a rollout, ratios of 1: policy loss 0 after whitening. What is left loads in
    transformers and is another model; nothing happens to the folders that were read."""
    path = tmp_path / "read"
    path.mkdir()
    folders = tiny.folder(path / "model", family), reward_folder(path / "reward", family)
    tiny.write_jsonl(path / "pairs.jsonl", tiny.pairs(8, seed=1))
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    held_out = [str(path / "pairs.jsonl")]
    rows = run(path, tmp_path / "out", "rlhf", dtype="float32", eval_data=held_out, eval_every=2, ppo_epochs=1)
    assert rows[0]["kl"] == 0 and rows[0]["clip_share"] == 0 and abs(rows[0]["policy_loss"]) < 1e-6 < rows[0]["value_loss"]
    assert rows[0]["loss"] == pytest.approx(0.1 * rows[0]["value_loss"], abs=1e-6)
    assert rows[2]["kl"] != 0 and {"reward", "explained_variance", "response_length", "grad_norm", "finished"} < rows[2].keys()
    assert [("eval_reward" in row, "eval_kl" in row) for row in rows] == [(False, False), (True, True), (True, True)]
    ours, theirs = model.load(tmp_path / "out/final"), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/final")
    start, tokens = model.load(folders[0]), torch.randint(0, 400, (2, 20), generator=torch.Generator().manual_seed(0))
    assert (ours.head(ours(tokens)) - theirs(tokens).logits).abs().max() < 1e-4
    assert (ours.head(ours(tokens)) - start.head(start(tokens))).abs().max() > 1e-3
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def naive(trainer, responses, policy, value):
    """The whole objective of a rollout, one sequence at a time, as it is written in the sources."""
    s, parts = trainer.settings, []
    raw = []
    for one in responses:
        T, n, ids = len(one.ids), len(one.x), torch.tensor([one.x + one.ids])
        with torch.no_grad():
            old, reference = (net.head(net(ids))[0].log_softmax(-1)[range(n - 1, n + T - 1), one.ids]
                              for net in (trainer.policy, trainer.reference))
            V = trainer.value.head(trainer.value(ids))[0, n - 1:-1, 0]
            score = trainer.reward.head(trainer.reward(ids))[0, -1, 0] - 0.25 - (0 if one.ids[-1] == 2 else s.eos_penalty)
        r = [-s.kl_coef * float(old[t] - reference[t]) + (float(score) if t == T - 1 else 0) for t in range(T)]
        delta = [r[t] + s.gamma * (float(V[t + 1]) if t + 1 < T else 0) - float(V[t]) for t in range(T)]
        A = [sum((s.gamma * s.gae_lambda) ** i * delta[t + i] for i in range(T - t)) for t in range(T)]
        raw += A
        parts.append((ids, n, T, old, V, A))
    mean = sum(raw) / len(raw)
    deviation = (sum((a - mean) ** 2 for a in raw) / len(raw)) ** 0.5
    total = 0
    for ids, n, T, old, V_old, A in parts:
        new = policy.head(policy(ids))[0].log_softmax(-1)[range(n - 1, n + T - 1), ids[0, n:]]
        V = value.head(value(ids))[0, n - 1:-1, 0]
        for t in range(T):
            ratio, a, R = (new[t] - old[t]).exp(), (A[t] - mean) / deviation, A[t] + V_old[t]
            bounded = min(max(V[t], V_old[t] - s.value_clip_range), V_old[t] + s.value_clip_range)
            total = total - min(ratio * a, min(max(ratio, 1 - s.clip_range), 1 + s.clip_range) * a) + \
                s.value_coef * 0.5 * max((V[t] - R) ** 2, (bounded - R) ** 2)
    return total / len(raw)


def test_the_objective_is_the_written_one(world, tmp_path, monkeypatch):
    """Loss and gradient of both networks after they have moved away from the rollout, against loops over single tokens.
    γ = 0.9, so that discounting shows; max_tokens = 12 leaves most responses without an EOS."""
    trainer = make(world, tmp_path, "rlhf", gamma=0.9, eos_penalty=2.0, model=str(tiny.folder(tmp_path / "m", scale=0.7)),
                   reference=str(world / "model"))
    tokenizer = trainer.tokenizer
    trainer.stop_ids, trainer.allowed = sample.stopping(tokenizer, "hh", trainer.policy.config)
    trainer.out.path.mkdir(exist_ok=True)
    groups = trainer.rollout(0, trainer.share(0), trainer.new_log())
    responses = [one for group in groups for one in group]
    responses[0].ids[-1] = tokenizer.eos_id if responses[0].finished else responses[0].ids[-1]
    moved = []
    for net in (trainer.policy, trainer.value):
        generator = torch.Generator().manual_seed(5)
        copy = model.Transformer(net.config).to(torch.float64)
        copy.load_state_dict({name: weight + 0.05 * weight.std() * torch.randn(weight.shape, generator=generator, **FLOAT)
                              for name, weight in net.state_dict().items()})
        moved.append(copy)
    expected = naive(trainer, responses, *moved)
    expected.backward()
    trainer.policy, trainer.value = moved
    wanted = [weight.grad.clone() for net in moved for weight in net.parameters()]
    for net in moved:
        net.zero_grad()
    log = trainer.new_log()
    loss = trainer.objective(groups, log) / sum(trainer.weight(group) for group in groups)
    loss.backward()
    assert len({one.finished for one in responses}) == 2 or not any(one.finished for one in responses)
    assert 0.02 < log.means()["clip_share"] < 0.98
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for weight, grad in zip([w for net in moved for w in net.parameters()], wanted):
        assert (weight.grad - grad).abs().max() < 1e-9 * max(1.0, float(grad.abs().max()))


def test_the_value_network_starts_from_the_reward_model(world, tmp_path):
    """Its values at the last token are the unshifted scores; after an update it has moved, and the reward model has not."""
    trainer = make(world, tmp_path, "rlhf", steps=1)
    forest = data.pack([X + y for y in YS])
    scores = rlhf.scores(trainer.reward, forest)
    assert trainer.shift == 0.25 and torch.equal(rlhf.scores(trainer.value, forest), scores)
    reference = [weight.clone() for weight in trainer.reference.parameters()]
    trainer.run()
    assert torch.equal(rlhf.scores(trainer.reward, forest), scores)
    assert (rlhf.scores(trainer.value, forest) - scores).abs().max() > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(trainer.reference.parameters(), reference))


def test_rollouts_say_what_the_metrics_say(world, tmp_path):
    """reward and kl are means over the rows of the step; the rewards are those of the texts' ids; sft can read the file."""
    rows = run(world, tmp_path, "rlhf")
    rollouts = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 3 * 4 * 2
    for row in rows:
        mine = [one for one in rollouts if one["step"] == row["step"]]
        for name in ("reward", "kl"):
            assert sum(one[name] for one in mine) / 8 == pytest.approx(row[name], abs=1e-5)
        assert sum(one["finished"][0] for one in mine) / 8 == row["finished"]
    found, report = data.read_rows(str(tmp_path / "rollouts.jsonl"), "responses")
    assert len(found) + sum(map(len, report.skipped.values())) == 24 and len(found) > 12


def test_a_response_without_an_end_pays_for_it(world, tmp_path):
    """With λ = 1 the return of each token is what is still to come: the penalty more with an EOS than without."""
    trainer = make(world, tmp_path, "rlhf", gae_lambda=1.0, eos_penalty=0.75, kl_coef=0.1)
    same = dict(x=[1], ids=[5, 6], score=2.0, old=tensor(-1.0, -2.0), reference=tensor(-2.0, -1.0), values=tensor(0.3, 0.4))
    whole, cut = (rlhf.Response(**same, finished=done) for done in (True, False))
    trainer.estimate([whole, cut], trainer.new_log())
    assert whole.returns.tolist() == pytest.approx([2.0, 2.0 + 0.1]) and cut.returns.tolist() == pytest.approx([1.25, 1.35])
    white = torch.cat((whole.advantages, cut.advantages))
    assert abs(white.mean()) < 1e-12 and white.var(correction=0) == pytest.approx(1)


def test_ppo_raises_the_reward_and_stays_near_the_reference(world, tmp_path, monkeypatch):
    """A reward that anybody can learn, how many of the last four ids are even: without κ it rises, and the KL with it; with a
    large one the policy stays where it was."""
    monkeypatch.setattr(rlhf, "scores", lambda net, forest: torch.stack([(forest.tokens[path[-4:]] % 2 == 0).double().sum()
                                                                         for path in forest.paths]))
    free, tied = (run(world, tmp_path / str(kl_coef), "rlhf", steps=8, batch_size=6, micro_batch_size=6, k=6, max_tokens=4,
                      lr=2e-2, kl_coef=kl_coef) for kl_coef in (0, 2))
    assert free[0]["reward"] == tied[0]["reward"] and free[-1]["reward"] > free[0]["reward"] + 0.7
    assert free[-1]["kl"] > 2 and abs(tied[-1]["kl"]) < free[-1]["kl"] / 2
    assert free[-1]["value_loss"] < free[0]["value_loss"] / 4 and free[-1]["explained_variance"] > free[0]["explained_variance"]


def test_tokens_are_counted_once(world):
    """Though the figures so far are asked for several times a step, and each time added up over two ranks."""
    class Two:
        sum = staticmethod(lambda values: [2 * value for value in values])
    log = train.Log(Two, rlhf.METRICS)
    log.count("tokens", 10)
    log.add("reward", tensor(1.0, 2.0))
    assert log.means() == log.means() == {"reward": 1.5} and log.tokens == 20


# ---------------------------------------------------------------------------------------------------------------------
# One trajectory

@pytest.mark.parametrize("recipe", ["reward", "rlhf"])
def test_accumulation_does_not_change_the_trajectory(recipe, world, tmp_path):
    rows = {size: run(world, tmp_path / str(size), recipe, micro_batch_size=size, steps=2) for size in (1, 3, 4)}
    for size in (1, 3):
        assert_same(rows[size], rows[4], 1e-7)           # metrics.jsonl keeps eight digits
        assert_same_weights(tmp_path / str(size), tmp_path / "4", 1e-10)


def test_two_ranks_follow_one(world, tmp_path):
    """Both recipes, sharded over two processes, equal one process to 1e-10; the last batch of the epoch of 13 has one row, so
    that the second rank has none. A checkpoint of two ranks is read by one."""
    held_out = dict(eval_data=[tiny.write_jsonl(tmp_path / "held_out.jsonl", tiny.pairs(3, seed=6))])
    runs = [dict(recipe="reward", steps=None, shift_samples=5, **held_out), dict(recipe="rlhf", steps=None, **held_out),
            dict(recipe="rlhf", steps=1, batch_size=3, micro_batch_size=1)]
    both = [[settings(world, tmp_path / f"{name}-{i}", **changes) for name in ("one", "two")] for i, changes in enumerate(runs)]
    (tmp_path / "runs.json").write_text(json.dumps([{"settings": two} for _, two in both]))
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "tests/ranks.py"),
         str(tmp_path / "runs.json")], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert launched.returncode == 0, launched.stderr[-3000:]
    for i, (one, two) in enumerate(both):
        if i == len(both) - 1:                           # two ranks' first step, and one rank goes on from there
            one["steps"], two["steps"], two["resume"] = 3, 3, "force"
            rlhf.TRAINERS["rlhf"](rlhf.Settings(**two)).run()
        rlhf.TRAINERS[one["recipe"]](rlhf.Settings(**one)).run()
        assert_same(metrics(one["out_dir"]), metrics(two["out_dir"]), 1e-7)          # metrics.jsonl keeps eight digits
        assert_same_weights(one["out_dir"], two["out_dir"], 1e-10)
    shifts = [json.loads((Path(side["out_dir"]) / "final/config.json").read_text())["reward_shift"] for side in both[0]]
    assert shifts[0] == pytest.approx(shifts[1], abs=1e-10) and shifts[0] != 0


@pytest.mark.parametrize("recipe", ["reward", "rlhf"])
def test_resume_equals_the_uninterrupted_run(recipe, world, tmp_path, monkeypatch):
    """Stopped in step 3 of 5 and started again: the same bits in metrics, rollouts, weights and optimizer of all networks."""
    changes = dict(steps=5, save_every=2, dtype="float32")
    whole = run(world, tmp_path / "whole", recipe, **changes)
    learn = rlhf.TRAINERS[recipe].learn

    def stop(trainer, step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        return learn(trainer, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rlhf.TRAINERS[recipe], "learn", stop)
        run(world, tmp_path / "parts", recipe, **changes)
    assert figures(run(world, tmp_path / "parts", recipe, **changes)) == figures(whole)
    a, b = ({name: weight for file in (tmp_path / name / "checkpoint/step-5").glob("*.safetensors")
             for name, weight in load_file(file).items()} for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    networks = {"policy", "value"} if recipe == "rlhf" else {"policy"}
    assert {name.split(".")[0] for name in a} == networks | {"optimizer"}
    assert {name.split(".")[1] for name in a if name.startswith("optimizer")} == networks
    assert (tmp_path / "whole/rollouts.jsonl").exists() == (recipe == "rlhf")
    if recipe == "rlhf":
        assert (tmp_path / "whole/rollouts.jsonl").read_text() == (tmp_path / "parts/rollouts.jsonl").read_text()


def test_a_step_is_dropped_as_long_as_it_has_changed_nothing(world, tmp_path, monkeypatch):
    """Asked to stop while sampling or in the first update: the weights stay. Later: all four updates are made."""
    trainer = make(world, tmp_path, "rlhf")
    trainer.begin()
    trainer.stop_ids, trainer.allowed = sample.stopping(trainer.tokenizer, "hh", trainer.policy.config)
    trainer.step_seconds, start = 100, {name: weight.clone() for name, weight in trainer.trained().items()}
    objective, calls = trainer.objective, []

    def asked_in(call):
        def watched(groups, log):
            calls.append(trainer.epoch)
            trainer.asked.number = 15 * (len(calls) > call)
            return objective(groups, log)
        trainer.asked, trainer.objective = train.Asked(), watched
        calls.clear()
    trainer.settings.micro_batch_size = 2                             # two parts an update
    asked_in(0)
    with pytest.raises(train.Dropped):
        trainer.update(0)
    trainer.optimizer.zero_grad()
    assert calls == [0] and all(torch.equal(weight, start[name]) for name, weight in trainer.trained().items())
    asked_in(2)
    trainer.update(0)
    assert calls == [0, 0, 1, 1, 2, 2, 3, 3] and not torch.equal(trainer.policy.embed.weight, start["policy.embed.weight"])


def test_a_run_that_diverges_stops_with_a_sentence(world, tmp_path, capsys):
    """Weights of 1e30 after the first update: the second fails, the other two are not tried, and nothing can be sampled then.
    The step has made an update, so it does not count as skipped."""
    with pytest.raises(InputError, match="logits are not finite, so nothing can be sampled: .*training has diverged"):
        run(world, tmp_path, "rlhf", steps=9, lr=1e30, dtype="float32", grad_clip=0.0)
    said, row = capsys.readouterr().out, metrics(tmp_path)[-1]
    assert said.count("is not finite") == said.count("step 1, update 2: the loss or its gradient is not finite") == 1
    assert (row["step"], row["skipped"]) == (1, 0)


def test_a_rollout_that_says_nothing_is_skipped(world, tmp_path, monkeypatch):
    """Where already the first update fails: once a rollout, and five such rollouts end the run."""
    monkeypatch.setattr(rlhf, "policy_loss", lambda logprobs, *rest: logprobs * math.nan)
    with pytest.raises(InputError, match="step 5: .*not finite, for 5 steps in a row"):
        run(world, tmp_path, "rlhf", steps=9)
    assert [row["skipped"] for row in metrics(tmp_path)] == [1, 2, 3, 4]


# ---------------------------------------------------------------------------------------------------------------------
# Command line

@pytest.mark.parametrize("arguments, words", [
    ("--recipe=ppo", ["--recipe=ppo", "reward, rlhf"]), ("--model={model} --prompts={pairs}", ["--reward"]),
    ("--model={model} --prompts={pairs} --reward={model}", ["--reward=", "no sequence-classification model"]),
    ("--model={model} --prompts={pairs} --reward=nowhere", ["nowhere is not a folder"]),
    ("--model={reward} --prompts={pairs} --reward={reward}", ["--model=", "is a reward model"]),
    ("--recipe=reward --model={reward} --data={pairs}", ["--model=", "is a reward model"]),
    ("--model={model} --prompts={pairs} --reward={other}", ["different tokenizers"]),
    ("--model={model} --prompts={pairs} --reward={odd}", ["reward_shift", "nan"]),
    ("--model={model} --reward={reward}", ["--prompts"]), ("--recipe=reward --model={model}", ["--data"]),
    ("--reward={reward}", ["--reward needs a model"]), ("--reward=", ["--reward= is empty"]), ("--k=0", ["--k=0"]),
    ("--kl_coef=-1", ["--kl_coef=-1"]), ("--kl_coef=nan", ["--kl_coef"]), ("--clip_range=0", ["--clip_range=0"]),
    ("--gae_lambda=1.5", ["--gae_lambda=1.5", "[0, 1]"]), ("--gamma=-0.1", ["--gamma"]), ("--ppo_epochs=0", ["--ppo_epochs=0"]),
    ("--value_clip_range=-1", ["--value_clip_range"]), ("--eos_penalty=-1", ["--eos_penalty"]),
    ("--shift_samples=0", ["--shift_samples"]),
    ("--lora_rank=4", ["--lora_rank=4", "train.py"]),
    ("--model={model} --dry_run", ["--dry_run", "train.py"]), ("--kl=0.1", ["--kl"]),
    *((f"--model={{model}} --prompts={{pairs}} --reward={{reward}} --{typed}", [f"--{typed.split('=')[0]} would change"])
      for typed in "beta=0.1 lam=1 judge=x judge_task=summary reference_cache=x shift_samples=3 eval_every=1".split()),
    *((f"--recipe=reward --model={{model}} --data={{pairs}} --{typed}", [f"--{typed.split('=')[0]} would change"])
      for typed in "k=2 kl_coef=1 reward=x reference=x max_tokens=3 temperature=1 ppo_epochs=4 sample_every=1".split()),
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
    both = dict(model="m", eval_data=["e"], eval_every=1, optimizer="adamw", weight_decay=0.1, betas=[0.8, 0.9], max_length=50,
                chat="hh")
    rlhf.Settings(recipe="reward", data=["d"], shift_samples=9, **both).check_used()
    rlhf.Settings(recipe="rlhf", reward="r", reference="f", prompts=["p"], k=3, temperature=0.5, top_p=0.5, max_tokens=9,
                  sample_every=1, kl_coef=0.1, ppo_epochs=2, clip_range=0.1, value_clip_range=0.3, value_coef=1.0, gamma=0.9, gae_lambda=0.9,
                  eos_penalty=2.0, **both).check_used()


def test_help_prints_every_setting(monkeypatch, capsys):
    """Those of train.py too, each with its comment; where both have one, rlhf.py's."""
    code, printed, _ = tiny.command(rlhf, capsys, monkeypatch, "--help")
    assert code == 0
    for field, comment in cli.fields_with_comments(rlhf.Settings):
        assert f"--{field.name}=" in printed and comment and comment in printed
    assert "--lr=" in printed and "--temperature=1.0" in printed and "π_old" in printed and "sr-dpo" not in printed


def test_changed_reward_models_are_noticed(world, tmp_path):
    """The reward model's contents belong to the run, and out_dir may not lie in its folder."""
    folder = reward_folder(tmp_path / "reward", "llama")
    run(world, tmp_path / "out", "rlhf", reward=str(folder), steps=1)
    with pytest.raises(InputError, match="lies in the model folder"):
        run(world, folder / "out", "rlhf", reward=str(folder), steps=1)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("0.25", "0.75"))
    with pytest.raises(InputError, match=f"the contents of {folder}"):
        run(world, tmp_path / "out", "rlhf", reward=str(folder), steps=1)


def test_the_toy_world_in_miniature(tmp_path, monkeypatch, capsys):
    """Without --model: base, SFT, reward model, PPO, and a table with the rows of SFT and PPO."""
    monkeypatch.setattr(toy, "ROWS", dict(texts=64, sft=64, pairs=64, blanks=16, held_out=24, advice=4, eval=16))
    monkeypatch.setattr(toy, "SHAPE", toy.SHAPE | dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1))
    for stage in toy.STAGES.values():
        monkeypatch.setitem(stage, "steps", 2)
        monkeypatch.setitem(stage, "batch_size", 8)
    code, printed, _ = tiny.command(rlhf, capsys, monkeypatch, f"--out_dir={tmp_path}", "--toy_family=neox", "--kl_coef=0.1")
    assert code == 0 and "rlhf.py" in printed and f"--reward={tmp_path / 'reward/final'}" in printed
    table = (tmp_path / "result-rlhf.txt").read_text()
    rows = {line.split()[0] for line in table.splitlines() if line[:4] in ("sft ", "rlhf", "rewa", "base")}
    assert table in printed and rows >= {"sft", "rlhf"} and "reward model's accuracy on 16 held-out" in table


@pytest.mark.slow
def test_rlhf_on_the_toy_world(tmp_path):
    """The whole job: the reward model orders three of four held-out pairs as labelled, and PPO raises the learned and the true
    reward with a KL below 20 nats."""
    toy.main(rlhf.Settings(out_dir=str(tmp_path)))
    accuracy, rows = metrics(tmp_path / "reward")[-1]["eval_accuracy"], metrics(tmp_path / "rlhf")
    assert accuracy > 0.7 and rows[-1]["eval_reward"] > rows[0]["reward"] + 1 and 0 < rows[-1]["eval_kl"] < 20
    lines = (tmp_path / "result-rlhf.txt").read_text().splitlines()
    table = {line.split()[0]: line.split() for line in lines if line[:4] in ("sft ", "rlhf")}
    assert float(table["rlhf"][1]) > float(table["sft"][1]) + 0.2
