"""Adapters: what a layer with them computes, that nothing else is trained, that the base stays reference and
judge, and that final/ and adapter/ are what transformers and PEFT read.
"""
import json
import math
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import forest
import losses
import model
import tiny
import train
from support.cli import InputError
from support.reference_cache import ReferenceCache

TOKENS = torch.randint(0, 400, (2, 40), generator=torch.Generator().manual_seed(0))
# (inputs + outputs) of the linear layers of one block: q k v o gate up down, and qkv o up down
ENDS = {"llama": 64 + 48 + 48 + 64 + 3 * 80, "mistral": 64 + 48 + 48 + 64 + 3 * 80, "neox": 128 + 64 + 2 * 80}
families = pytest.mark.parametrize("family", ENDS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder a family, a copy of the first, and 13 pairs."""
    path = tmp_path_factory.mktemp("world")
    for family in ENDS:
        tiny.folder(path / family, family)
    shutil.copytree(path / "llama", path / "copy")
    tiny.write_jsonl(path / "pairs.jsonl", tiny.pairs(13, seed=1))
    return path


def settings(world, out, **changes):
    """Settings of a short float64 run whose steps are large enough to see."""
    return train.Settings(**{
        "model": str(world / "llama"), "data": [str(world / "pairs.jsonl")], "out_dir": str(out),
        "recipe": "dpo", "steps": 3, "batch_size": 4, "lr": 1e-2, "warmup_steps": 0, "max_length": 96,
        "max_tokens": 12, "k": 4, "dtype": "float64", "lora_rank": 4, "lora_alpha": 8.0,
        "judge_anyway": True, "show_prompts": 0, **changes})


def trained(world, out, **changes):
    """(the trainer after its last step, its metrics without times)."""
    trainer = train.Trainer(settings(world, out, **changes))
    trainer.run()
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return trainer, [{key: value for key, value in row.items() if "second" not in key} for row in rows]


@torch.no_grad()
def logits(net):
    return net.head(net(TOKENS))


def adapted_net(family, rank=3, alpha=6.0, **changes):
    """A random float64 network with fresh adapters."""
    net = tiny.net(family, vocab_size=420, **changes)
    model.add_adapters(net, rank, alpha, torch.float64)
    return model.fill(net, ((name, tensor.double()) for name, tensor in model.fresh_adapters(net, 0)))


@torch.no_grad()
def disturb(net, seed=0):
    """Adapters as training might leave them: B no longer 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in net.named_parameters():
        if name.endswith("lora_b"):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return net


# -----------------------------------------------------------------------------------------------------------
# The layer

def test_a_layer_worked_by_hand():
    """x = (1, 2), W = [[1, 0], [2, 1]], bias (0, 5): W x + bias = (1, 9).

    A = [[1, 1], [0, -1]], B = [[1, 2], [0, 3]]: A x = (3, -2), B A x = (-1, -6). With alpha 6 and
    rank 2 the scale is 3: (1 - 3, 9 - 18) = (-2, -9).
    """
    net = adapted_net("neox", rank=2, alpha=6.0)
    layer = net.blocks[0].attention.o
    given = dict(weight=[[1, 0], [2, 1]], bias=[0, 5], lora_a=[[1, 1], [0, -1]], lora_b=[[1, 2], [0, 3]])
    for name, values in given.items():
        setattr(layer, name, torch.nn.Parameter(torch.tensor(values).double()))
    layer.out_features = 2
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert layer(x).tolist() == [-2, -9]
    with model.without_adapters(net):
        assert layer(x).tolist() == [1, 9]
    merged = dict(model.merged(net))["blocks.0.attention.o.weight"]
    assert merged.tolist() == [[1 + 3 * 1, 0 + 3 * -1], [2 + 3 * 0, 1 + 3 * -3]]


@families
def test_fresh_adapters_change_nothing(family):
    """Not a bit of the logits; and disturbed ones do, at every layer that has some."""
    net = adapted_net(family)
    assert torch.equal(logits(net), logits(tiny.net(family, vocab_size=420)))
    before = logits(net)
    for _, layer in model.adapted(net):
        with torch.no_grad():
            layer.lora_b.normal_(generator=torch.Generator().manual_seed(0))
            assert (logits(net) - before).abs().max() > 1e-3
            layer.lora_b.zero_()
    assert torch.equal(logits(net), before)


def test_a_fresh_a_is_uniform_and_a_function_of_the_seed():
    """Within ±1/√in and filling it, another one for each layer; B = 0."""
    net = adapted_net("llama", rank=16)
    first, again, other = (dict(model.fresh_adapters(net, seed)) for seed in (1, 1, 2))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if name.endswith("lora_b"):
            assert not tensor.any()
        else:
            bound = tensor.shape[1] ** -0.5
            assert 0.95 * bound < tensor.abs().max() <= bound
            assert tensor.std() == pytest.approx(bound / 3 ** 0.5, rel=0.1)
            assert not torch.equal(tensor, other[name])
    a = [tensor.flatten()[:8].tolist() for name, tensor in first.items() if name.endswith("lora_a")]
    assert len({tuple(row) for row in a}) == len(a) == 14


@families
def test_the_gradient_at_the_start(family, world, tmp_path):
    """B is 0, so A gets none and B some, in every layer; the frozen weights have none at all."""
    trainer = train.Trainer(settings(world, tmp_path, model=str(world / family)))
    trainer.loss(trainer.data.rows[:4]).sum().backward()
    for name, weight in trainer.policy.named_parameters():
        if name.endswith("lora_a"):
            assert not weight.grad.any(), name
        elif name.endswith("lora_b"):
            assert weight.grad.abs().max() > 1e-9, name
        else:
            assert weight.grad is None and not weight.requires_grad


def test_gradients_equal_those_of_the_merged_weight():
    """d/dB = scale · G Aᵀ and d/dA = scale · Bᵀ G, where G is the gradient of W + scale · B A itself."""
    net = disturb(adapted_net("neox"))
    whole = tiny.net("neox", vocab_size=420)
    model.fill(whole, list(model.merged(net)))
    loss = lambda net: net.head(net(TOKENS)).logsumexp(-1).sum()       # noqa: E731
    loss(net).backward()
    loss(whole).backward()
    for name, layer in model.adapted(net):
        gradient = whole.get_submodule(name).weight.grad
        assert (layer.lora_b.grad - 2.0 * gradient @ layer.lora_a.T).abs().max() < 1e-9
        assert (layer.lora_a.grad - 2.0 * layer.lora_b.T @ gradient).abs().max() < 1e-9
        assert layer.lora_a.grad.abs().max() > 1e-3


def test_without_adapters_ends_with_an_error_too():
    net = disturb(adapted_net("llama"))
    before = logits(net)
    with pytest.raises(ZeroDivisionError), model.without_adapters(net):
        assert torch.equal(logits(net), logits(tiny.net("llama", vocab_size=420)))
        1 / 0
    assert torch.equal(logits(net), before)
    with model.without_adapters(None) as nothing:
        assert nothing is None


def test_the_compute_type_has_the_adapters():
    net = disturb(adapted_net("llama"))
    low = model.in_compute_dtype(net, torch.float32)
    assert {weight.dtype for weight in low.parameters()} == {torch.float32}
    assert (logits(low) - logits(net)).abs().max() < 1e-3
    assert (logits(tiny.net("llama", vocab_size=420)) - logits(net)).abs().max() > 1e-2


# -----------------------------------------------------------------------------------------------------------
# Training

@pytest.mark.parametrize("recipe", ["dpo", "sr-dpo", "osp"])
@families
def test_the_first_step_is_exact(recipe, family, world, tmp_path):
    """The policy is the reference, bit for bit: ln 2 and a margin of 0, and neither afterwards."""
    _, rows = trained(world, tmp_path, recipe=recipe, model=str(world / family), dtype="float32")
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-7)
    assert rows[0]["margin"] == 0 and all(row["margin"] != 0 for row in rows[1:])


@families
def test_only_the_adapters_are_trained(family, world, tmp_path):
    """As many numbers as the formula says, all changed; the base keeps its bits and its logits."""
    trainer, _ = trained(world, tmp_path, model=str(world / family))
    base = model.load(world / family, torch.float64)
    policy = dict(trainer.policy.named_parameters())
    for name, weight in base.named_parameters():
        assert torch.equal(weight, policy.pop(name))
    assert policy and sum(weight.numel() for weight in policy.values()) == 4 * 2 * ENDS[family]
    fresh = dict(model.fresh_adapters(trainer.policy, 0))
    for name, weight in policy.items():
        assert weight.requires_grad and (weight != fresh[name]).all(), name
    optimized = [weight for group in trainer.optimizer.param_groups for weight in group["params"]]
    assert {id(weight) for weight in optimized} == {id(weight) for weight in policy.values()}
    with model.without_adapters(trainer.policy) as net:
        assert torch.equal(logits(net), logits(base))
    assert (logits(trainer.policy) - logits(base)).abs().max() > 1e-3


@pytest.mark.parametrize("recipe", ["dpo", "sr-dpo", "osp"])
def test_the_base_is_its_own_reference_and_judge(recipe, world, tmp_path, monkeypatch):
    """One network in memory, and every figure is that of a run whose reference and judge are a copy."""
    read, load = [], model.load

    def noted(folder, *rest):
        read.append(Path(folder).name)
        return load(folder, *rest)
    monkeypatch.setattr(model, "load", noted)
    one, first = trained(world, tmp_path / "one", recipe=recipe, steps=5)
    assert read == ["llama"] and one.reference is one.policy and one.judge in (None, one.policy)
    copies = dict.fromkeys(("reference", "judge") if recipe == "osp" else ("reference",), str(world / "copy"))
    two, second = trained(world, tmp_path / "two", recipe=recipe, steps=5, **copies)
    assert read == ["llama", "llama", "copy"] and two.reference is not two.policy
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=1e-12, abs=1e-12)
    a, b = (load_file(tmp_path / name / "final/model.safetensors") for name in ("one", "two"))
    assert all((a[name] - b[name]).abs().max() <= 1e-12 for name in a)
    assert abs(first[-1]["margin"]) > 1e-3
    if recipe == "osp":
        assert (tmp_path / "one/rollouts.jsonl").read_text() == (tmp_path / "two/rollouts.jsonl").read_text()


def test_a_cached_reference_is_the_base(world, tmp_path):
    """With adapters that have come from somewhere: what is kept of the reference is what the folder says."""
    trainer = train.Trainer(settings(world, tmp_path / "out", reference_cache=str(tmp_path / "cache")))
    assert trainer.reference is None
    pairs, base = trainer.data.rows, model.load(world / "llama", torch.float64)
    disturb(trainer.policy)
    trainer.reference = trainer.policy                # once more, and now the adapters would show
    again = trainer.reference_logprobs(*train.pack_pairs(pairs, "x"))
    kept = ReferenceCache(trainer.settings, trainer.dtype, pairs, False).values["x"]
    with torch.no_grad():
        alone = losses.logprobs(base, forest.pack([pairs[3].x + pairs[3].chosen]), [len(pairs[3].x)]).item()
    assert (again - kept).abs().max() < 1e-9 and kept[3, 0].item() == pytest.approx(alone, abs=1e-9)


def test_samples_come_from_the_adapted_policy(world, tmp_path):
    """The first step's rollouts are the base's; after an update they part."""
    for name, lr in (("still", 1e-9), ("moving", 0.3)):
        trained(world, tmp_path / name, recipe="osp", lr=lr, steps=2)
    rows = [[json.loads(line) for line in (tmp_path / name / "rollouts.jsonl").read_text().splitlines()]
            for name in ("still", "moving")]
    texts = [[[row["chosen"], row["rejected"]] for row in one if row["step"] == step]
             for step in (1, 2) for one in rows]
    assert texts[0] == texts[1] and texts[2] != texts[3]


@pytest.mark.parametrize("recipe", ["sft", "judge", "sr-dpo"])
def test_adapters_learn(recipe, world, tmp_path):
    """15 steps of Adam on 13 rows: the loss falls by a tenth and more (sr-dpo: by a half)."""
    _, rows = trained(world, tmp_path, recipe=recipe, steps=15, batch_size=13, optimizer="adam")
    assert rows[-1]["loss"] < rows[0]["loss"] * (0.5 if recipe == "sr-dpo" else 0.9)


@pytest.mark.parametrize("recipe", ["dpo", "osp", "sft"])
def test_half_precision(recipe, world, tmp_path):
    """A frozen base needs no masters: it lies in bfloat16; adapters and optimizer in float32, and final/ is
    float32 as the source is."""
    trainer, rows = trained(world, tmp_path, recipe=recipe, dtype="bfloat16", optimizer="adam")
    kinds = {("lora_" in name, weight.dtype) for name, weight in trainer.policy.named_parameters()}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32)}
    states = trainer.optimizer.state.values()
    assert {value.dtype for state in states for value in state.values()} == {torch.float32}
    for file, dtype in (("final/model", torch.float32), ("adapter/adapter_model", torch.float32)):
        assert {weight.dtype for weight in load_file(tmp_path / f"{file}.safetensors").values()} == {dtype}
    if recipe != "sft":
        assert rows[0]["margin"] == 0 and rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-3)
    assert rows[-1]["loss"] != rows[0]["loss"]


# -----------------------------------------------------------------------------------------------------------
# On disk

@families
def test_final_is_the_adapted_network(family, world, tmp_path):
    """Merged, in float32: logits within 1e-5 of the adapted ones, by our reading and by transformers'."""
    trainer, _ = trained(world, tmp_path, model=str(world / family), dtype="float32")
    expected = logits(trainer.policy)
    assert (expected - logits(model.load(world / family))).abs().max() > 1e-3
    assert (logits(model.load(tmp_path / "final")) - expected).abs().max() < 1e-5
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    with torch.no_grad():
        assert (theirs(TOKENS).logits - expected).abs().max() < 1e-5
    assert not any("lora" in name for name in load_file(tmp_path / "final/model.safetensors"))


@families
def test_adapter_is_what_peft_loads(family, world, tmp_path):
    """On the folder that adapter_config.json names: every tensor finds its place, logits to 1e-4."""
    trainer, _ = trained(world, tmp_path, model=str(world / family), dtype="float32")
    base = transformers.AutoModelForCausalLM.from_pretrained(world / family)
    with torch.no_grad():
        plain = base(TOKENS).logits
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        expected = logits(trainer.policy)
        assert (theirs(TOKENS).logits - expected).abs().max() < 1e-4 < (plain - expected).abs().max()
    found = peft.get_peft_model_state_dict(theirs)
    ours = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert found.keys() == ours.keys() and all(torch.equal(found[name], ours[name]) for name in ours)
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (4, 8.0, str(world / family))


def test_a_checkpoint_holds_adapters_and_their_optimizer(world, tmp_path):
    """Three times the adapters (with Adam's two moments and a step count), far less than the base."""
    trainer, _ = trained(world, tmp_path, optimizer="adam")
    saved = {name: tensor for file in (tmp_path / "checkpoint/step-3").glob("*.safetensors")
             for name, tensor in load_file(file).items()}
    assert saved.keys() == trainer.state_tensors().keys() and all("lora_" in name for name in saved)
    numbers = 4 * 2 * ENDS["llama"]
    assert sum(tensor.numel() for tensor in saved.values()) == 3 * numbers + 2 * 14
    trained(world, tmp_path / "full", optimizer="adam", lora_rank=0, lora_alpha=32.0)
    small, large = (sum(file.stat().st_size for file in (out / "checkpoint/step-3").iterdir())
                    for out in (tmp_path, tmp_path / "full"))
    assert 3 * 8 * numbers < small < large / 2
    assert not (tmp_path / "full/adapter").exists()


@pytest.mark.parametrize("recipe, optimizer", [("sr-dpo", "adam"), ("osp", "rmsprop")])
def test_resume_is_bit_for_bit(recipe, optimizer, world, tmp_path, monkeypatch):
    """Stopped in step 5 of 8, gone on with from step 4."""
    changes = dict(recipe=recipe, optimizer=optimizer, steps=8, save_every=2, dtype="float32")
    whole, expected = trained(world, tmp_path / "whole", **changes)
    with tiny.stopped_before(5, monkeypatch):
        trained(world, tmp_path / "parts", **changes)
    assert [path.name for path in (tmp_path / "parts/checkpoint").iterdir()] == ["step-4"]
    parts, rows = trained(world, tmp_path / "parts", **changes)
    assert rows == expected
    assert all(torch.equal(tensor, parts.state_tensors()[name])
               for name, tensor in whole.state_tensors().items())
    for file in ("final/model.safetensors", "adapter/adapter_model.safetensors"):
        a, b = (load_file(tmp_path / name / file) for name in ("whole", "parts"))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_adapters_belong_to_may_not_change(world, tmp_path):
    """Another rank or alpha, or none, is another run."""
    trained(world, tmp_path, steps=2)
    for changes in (dict(lora_rank=2), dict(lora_alpha=9.0), dict(lora_rank=0)):
        with pytest.raises(InputError, match=next(iter(changes))):
            trained(world, tmp_path, steps=2, **changes)


@pytest.mark.parametrize("typed, words", [("--lora_rank=-1", "--lora_rank=-1"),
                                          ("--lora_rank=2 --lora_alpha=0", "--lora_alpha=0")])
def test_settings_that_cannot_be(typed, words, world, tmp_path, monkeypatch, capsys):
    code, _, error = tiny.command(train, capsys, monkeypatch, "--recipe=dpo", f"--model={world / 'llama'}",
                                  f"--data={world / 'pairs.jsonl'}", f"--out_dir={tmp_path / 'out'}",
                                  *typed.split())
    assert code == 1 and error.startswith("error: ") and words in error and error.count("\n") == 1
