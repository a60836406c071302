"""model.py against transformers, against itself one sequence at a time, and against damaged folders.

Every network here is small and every parameter random, biases and norms too, so that a wrong mapping shows. Where a
test says "equal", a control beside it shows that its comparison notices the mistakes it is there for.
"""
import functools
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef

import model
from support.cli import InputError

DATA = Path(os.environ.get("OSPREY_DATA", Path(__file__).parents[3] / "shared" / "data"))
VOCAB, LENGTH = 61, 48
TOKENS = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))

# ---------------------------------------------------------------------------------------------------------------------
# Networks

SIZES = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64)
NEOX = dict(SIZES, model_type="gpt_neox", num_attention_heads=2, layer_norm_eps=0.03, rotary_pct=0.25, rotary_emb_base=50.0)
LLAMA = dict(SIZES, model_type="llama", rms_norm_eps=0.03, rope_theta=50.0, num_key_value_heads=2)
MISTRAL = dict(LLAMA, model_type="mistral", sliding_window=LENGTH // 2)
LINEAR = {"type": "linear", "factor": 3.0}
LLAMA3 = {"rope_type": "llama3", "factor": 6.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
          "original_max_position_embeddings": 16}
CASES = {
    "neox": NEOX,
    "neox-sequential": dict(NEOX, use_parallel_residual=False, rotary_pct=1.0, hidden_act="gelu_new"),
    "neox-tied-unbiased": dict(NEOX, tie_word_embeddings=True, attention_bias=False, hidden_act="gelu_fast", rotary_pct=0.5),
    "neox-linear": dict(NEOX, rope_scaling=LINEAR, rotary_pct=1.0),
    "llama": LLAMA,
    "llama-tied-biased": dict(LLAMA, num_key_value_heads=4, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama-linear": dict(LLAMA, rope_scaling=LINEAR, head_dim=12),
    "llama-llama3": dict(LLAMA, rope_scaling=LLAMA3, num_key_value_heads=1, hidden_act="gelu"),
    "mistral": MISTRAL,
    "mistral-no-window": dict(MISTRAL, sliding_window=None, head_dim=6),
}
SCALED = {name: case for name, case in CASES.items() if "rope_scaling" in case}
every_case = pytest.mark.parametrize("case", CASES)


@torch.no_grad()
def randomise(net, seed=0):
    """Every parameter random, at a scale that makes attention sharp and logits of deviation 1 or more."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in net.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        if weight.dim() == 1:
            weight.copy_(0.3 * noise + name.endswith("weight"))
        else:
            weight.copy_(noise if "embed" in name else 1.5 * noise / weight.shape[1] ** 0.5)
    return net


def our_net(raw, dtype=torch.float64):
    return randomise(model.Transformer(model.parse_config(raw)).to(dtype))


@torch.no_grad()
def our_logits(net, tokens=TOKENS):
    net = net if isinstance(net, model.Transformer) else model.load(net)
    return net.head(net(tokens))


@torch.no_grad()
def their_logits(net, tokens=TOKENS):
    if not isinstance(net, torch.nn.Module):
        from transformers import AutoModelForCausalLM
        net = AutoModelForCausalLM.from_pretrained(net, attn_implementation="eager")
    return net(tokens).logits


def difference(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """oracle(case) -> (transformers' network, the folder it was saved to)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    @functools.cache
    def make(case):
        config = AutoConfig.for_model(**json.loads(json.dumps(CASES[case])))    # a copy: transformers adds to rope_scaling
        net = randomise(AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval())
        folder = tmp_path_factory.mktemp(case)
        net.save_pretrained(folder)
        return net, folder

    return make


def read(folder):
    return json.loads((folder / "config.json").read_text())


def edit(folder, target, change):
    """A copy of the folder with config.json changed: `change` takes its object and returns the new one or nothing."""
    shutil.copytree(folder, target)
    raw = read(folder)
    raw = change(raw) or raw
    (target / "config.json").write_text(json.dumps(raw))
    return target


def rewrite(folder, change, file="model.safetensors"):
    """Change the tensors of a safetensors file in place."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Parity with transformers

@every_case
def test_logits_equal_transformers(case, oracle):
    net, folder = oracle(case)
    expected = their_logits(net)
    assert expected.std() > 1
    assert difference(our_logits(folder), expected) < 1e-4


def other_values(raw):
    """Yield (key, another value) for each field of a config.json that changes the mathematics and no shape."""
    other = {"layer_norm_eps": 1e-5, "rms_norm_eps": 1e-6, "num_attention_heads": 4,
             "hidden_act": {"silu": "relu", "gelu": "gelu_new"}.get(raw["hidden_act"], "gelu"),
             "use_parallel_residual": not raw.get("use_parallel_residual"),
             "sliding_window": LENGTH // 2 - 1 if raw.get("sliding_window") else LENGTH - 1}
    if raw["model_type"] != "gpt_neox":
        del other["num_attention_heads"]          # it belongs to the shapes there
    yield from ((key, value) for key, value in other.items() if key in raw)
    for key, value in raw["rope_parameters"].items():
        if key == "partial_rotary_factor":
            yield f"rope_parameters.{key}", 0.75 if value == 1 else 1.0
        elif key not in ("rope_type", "type"):
            yield f"rope_parameters.{key}", value * 1.25


@every_case
def test_every_field_is_noticed(case, oracle, tmp_path):
    """The control of the test above: another value in config.json alone, and the logits are far from the same."""
    net, folder = oracle(case)
    expected, changes = their_logits(net), dict(other_values(read(folder)))
    assert len(changes) >= 3
    for number, (key, value) in enumerate(changes.items()):
        def change(raw):
            inside, name = (raw[key.split(".")[0]], key.split(".")[1]) if "." in key else (raw, key)
            inside[name] = value
        found = difference(our_logits(edit(folder, tmp_path / str(number), change)), expected)
        assert found > 5e-4, f"{key} = {value} changes the logits by {found} only"


@every_case
def test_fields_that_belong_to_the_shapes_refuse_the_weights(case, oracle, tmp_path):
    raw = read(oracle(case)[1])
    other = {key: not raw[key] for key in ("attention_bias", "mlp_bias", "tie_word_embeddings") if key in raw}
    other |= {key: 4 if raw[key] == 2 else 2 for key in ("head_dim", "num_key_value_heads", "num_hidden_layers") if key in raw}
    for key, value in other.items():
        with pytest.raises(InputError, match="model.safetensors|is missing"):
            model.load(edit(oracle(case)[1], tmp_path / key, lambda raw: raw.update({key: value})))


@pytest.mark.parametrize("model_type", model.FIELDS)
def test_absent_fields_mean_what_transformers_takes_them_for(model_type):
    from transformers import AutoConfig
    sizes = {key: value * 4 for key, value in SIZES.items() if key != "max_position_embeddings"}
    ours, theirs = model.parse_config(dict(sizes, model_type=model_type)), AutoConfig.for_model(model_type, **sizes)
    names = {"context": "max_position_embeddings", "activation": "hidden_act", "tied": "tie_word_embeddings",
             "norm_eps": "layer_norm_eps" if ours.is_neox else "rms_norm_eps", "kv_heads": "num_key_value_heads",
             "head_dim": "head_dim", "attention_bias": "attention_bias", "sliding_window": "sliding_window",
             "parallel_residual": "use_parallel_residual"}
    for mine, name in names.items():
        assert getattr(ours, mine) == getattr(theirs, name, getattr(ours, mine)), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.rope_scaling is None
    assert ours.rotary_dims == ours.head_dim * theirs.rope_parameters.get("partial_rotary_factor", 1)
    if ours.sliding_window:
        assert model.parse_config(dict(sizes, model_type=model_type, sliding_window=None)).sliding_window is None


def test_float32_masters_compute_like_bfloat16_weights(oracle, tmp_path):
    """compute_dtype=bfloat16 on float32 weights gives the very values of a bfloat16 network."""
    folder = oracle("llama")[1]
    low, masters = model.load(folder, dtype=torch.bfloat16), model.load(folder)
    masters.compute_dtype = torch.bfloat16
    assert torch.equal(our_logits(masters), our_logits(low))
    assert our_logits(masters).dtype == torch.bfloat16 and masters.embed.weight.dtype == torch.float32


def test_initialise_is_a_function_of_the_seed():
    first, again, other = (model.Transformer(model.parse_config(NEOX)).initialise(seed) for seed in (1, 1, 2))
    for name, weight in first.named_parameters():
        assert torch.equal(weight, again.get_parameter(name))
        if weight.dim() == 2:
            assert not torch.equal(weight, other.get_parameter(name)) and 0.03 < weight.std() < 0.3
        else:
            assert (weight == ("norm" in name and name.endswith("weight"))).all()


# ---------------------------------------------------------------------------------------------------------------------
# Folders, there and back

def old_generation(raw):
    """The config.json that transformers 4 wrote for the same network."""
    rope = dict(raw.pop("rope_parameters"))
    kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
    if raw["model_type"] == "gpt_neox":
        raw.update(rotary_emb_base=theta, rotary_pct=rope.pop("partial_rotary_factor"))
    else:
        raw.update(rope_theta=theta)
    name = "type" if kind == "linear" else "rope_type"
    return dict(raw, torch_dtype=raw.pop("dtype"), rope_scaling=None if kind == "default" else {name: kind, **rope})


@every_case
@pytest.mark.parametrize("generation", ["new", "old"])
def test_there_and_back(case, generation, oracle, tmp_path):
    net, folder = oracle(case)
    assert "rope_parameters" in read(folder)
    if generation == "old":
        folder = edit(folder, tmp_path / "old", old_generation)
        assert "rope_parameters" not in read(folder)
    ours = our_logits(folder)
    assert difference(ours, their_logits(net)) < 1e-4
    model.save(model.load(folder), tmp_path / "saved")
    assert torch.equal(our_logits(tmp_path / "saved"), ours)
    assert difference(their_logits(tmp_path / "saved"), ours) < 1e-4


@pytest.mark.parametrize("repeat, fits", [(1.0, True), (0.5, False)])
def test_neox_fields_under_both_names(repeat, fits, oracle, tmp_path):
    """transformers 4.4x writes rope_theta beside rotary_emb_base and partial_rotary_factor beside rotary_pct."""
    net, folder = oracle("neox")
    for key, value in (("rope_theta", 50.0), ("partial_rotary_factor", 0.25)):
        both = edit(folder, tmp_path / key, lambda raw: dict(old_generation(raw), **{key: value * repeat}))
        if fits:
            assert difference(our_logits(both), their_logits(net)) < 1e-4
        else:
            with pytest.raises(InputError, match=f"config.json.*{key}"):
                model.load(both)


@pytest.mark.parametrize("case", ["llama", "llama-tied-biased", "neox", "neox-tied-unbiased"])
def test_shards(case, oracle, tmp_path, monkeypatch):
    net, folder = oracle(case)
    net.save_pretrained(tmp_path / "theirs", max_shard_size="12KB")
    assert len(list((tmp_path / "theirs").glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(our_logits(tmp_path / "theirs"), our_logits(folder))
    monkeypatch.setattr(model, "SHARD_BYTES", 12_000)
    model.save(model.load(folder), tmp_path / "ours")
    shards = [load_file(path) for path in (tmp_path / "ours").glob("model-*-of-*.safetensors")]
    assert len(shards) > 2
    assert all(len(shard) == 1 or sum(weight.nbytes for weight in shard.values()) <= 12_000 for shard in shards)
    assert torch.equal(our_logits(tmp_path / "ours"), our_logits(folder))
    assert difference(their_logits(tmp_path / "ours"), their_logits(net)) < 1e-6


@pytest.mark.parametrize("sharded_first", [True, False])
def test_saving_over_an_earlier_save(sharded_first, oracle, tmp_path, monkeypatch):
    """What is left of an earlier save with other shards must not be what either library reads, even the source's own."""
    folder = shutil.copytree(oracle("llama")[1], tmp_path / "folder")
    for limit, change in ((12_000 if sharded_first else 10 ** 9, 1), (10 ** 9 if sharded_first else 12_000, 2)):
        monkeypatch.setattr(model, "SHARD_BYTES", limit)
        net = model.load(folder)
        with torch.no_grad():
            net.norm.weight.mul_(change)
        model.save(net, folder)
    expected = 2 * our_logits(oracle("llama")[1])
    assert difference(our_logits(folder), expected) < 1e-4 and difference(their_logits(folder), expected) < 2e-4


def test_files_of_an_earlier_save_are_removed(oracle, tmp_path, monkeypatch):
    """From many files to fewer, to one and back to some: what the index names is all there is, and both libraries read it."""
    net = model.load(oracle("llama")[1])
    counts = []
    for limit in (6_000, 20_000, 10 ** 9, 12_000):
        monkeypatch.setattr(model, "SHARD_BYTES", limit)
        with torch.no_grad():
            net.norm.weight.mul_(2)
        model.save(net, tmp_path)
        files = {path.name for path in tmp_path.iterdir()} - {"config.json", "model.safetensors.index.json"}
        index = tmp_path / "model.safetensors.index.json"
        listed = set(json.loads(index.read_text())["weight_map"].values()) if limit < 10 ** 9 else {"model.safetensors"}
        assert files == listed and index.exists() == (limit < 10 ** 9)
        counts.append(len(files))
        assert torch.equal(our_logits(tmp_path), our_logits(net)) and difference(their_logits(tmp_path), our_logits(net)) < 1e-3
    assert counts[0] > counts[1] > counts[2] == 1 < counts[3]


def test_saving_holds_one_file_at_a_time(oracle, tmp_path, monkeypatch):
    """Weights are asked for one by one, and those of a file are gone when the next file's are: never more than SHARD_BYTES
    and the tensor that did not fit."""
    net = model.load(oracle("llama")[1])
    monkeypatch.setattr(model, "SHARD_BYTES", 12_000)
    given, most = [], []

    def weights():
        for name, weight in net.named_parameters():
            copy = weight.detach().clone()
            given.append((StorageWeakRef(copy.untyped_storage()), copy.nbytes))
            most.append(sum(size for storage, size in given if not storage.expired()))
            yield name, copy
            del copy
    model.save_weights(net.config, weights(), tmp_path)
    largest = max(weight.nbytes for weight in net.parameters())
    assert max(most) <= 12_000 + 2 * largest < sum(weight.nbytes for weight in net.parameters()) / 2
    assert torch.equal(our_logits(tmp_path), our_logits(net))


@pytest.mark.parametrize("case", ["llama", "neox"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(case, dtype, oracle, tmp_path):
    from transformers import AutoModelForCausalLM
    AutoModelForCausalLM.from_pretrained(oracle(case)[1], dtype=dtype).save_pretrained(tmp_path / "theirs")
    stored = {tensor.dtype for tensor in load_file(tmp_path / "theirs/model.safetensors").values()}
    assert stored == {dtype}
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32, attn_implementation="eager")
    assert difference(our_logits(tmp_path / "theirs"), their_logits(wide)) < 1e-4
    model.save(model.load(tmp_path / "theirs", dtype=dtype), tmp_path / "ours")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert back.dtype == dtype                                  # config.json says so
    assert all(torch.equal(weight.float(), wide.get_parameter(name)) for name, weight in back.named_parameters())


@pytest.mark.parametrize("name", ["embed_out.weight", "lm_head.weight"])
def test_both_names_of_the_neox_head(name, oracle, tmp_path):
    net, folder = oracle("neox")

    def change(tensors):
        tensors[name] = tensors.pop("embed_out.weight" if "embed_out.weight" in tensors else "lm_head.weight")
    rewrite(shutil.copytree(folder, tmp_path / "copy"), change)
    assert name in load_file(tmp_path / "copy/model.safetensors")
    assert difference(our_logits(tmp_path / "copy"), their_logits(net)) < 1e-4


@pytest.mark.parametrize("case", ["llama-tied-biased", "neox-tied-unbiased"])
def test_a_repeated_tied_head_must_be_the_embedding(case, oracle, tmp_path):
    net, folder = oracle(case)
    embedding = "gpt_neox.embed_in.weight" if case.startswith("neox") else "model.embed_tokens.weight"
    copy = shutil.copytree(folder, tmp_path / "copy")
    rewrite(copy, lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    assert torch.equal(our_logits(copy), our_logits(folder))
    rewrite(copy, lambda t: t["lm_head.weight"][3, 5].add_(1e-3))
    with pytest.raises(InputError, match="model.safetensors.*lm_head.weight.*tie"):
        model.load(copy)


PUBLISHED = {
    "neox": {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril(),
             "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
             "gpt_neox.layers.1.attention.rotary_emb.inv_freq": torch.ones(4)},
    "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("case", PUBLISHED)
def test_published_buffers_are_passed_over(case, sharded, oracle, tmp_path):
    net, folder = oracle(case)
    net.save_pretrained(tmp_path, max_shard_size="12KB" if sharded else "1GB")
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    rewrite(tmp_path, lambda tensors: tensors.update(PUBLISHED[case]), file.name)
    if sharded:                                   # some indices list the buffers, some do not
        assert torch.equal(our_logits(tmp_path), our_logits(folder))
        index = tmp_path / "model.safetensors.index.json"
        raw = json.loads(index.read_text())
        raw["weight_map"].update(dict.fromkeys(PUBLISHED[case], file.name))
        index.write_text(json.dumps(raw))
    assert torch.equal(our_logits(tmp_path), our_logits(folder))


MEMORY = """
import sys, torch, model
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
torch.set_num_threads(1)
model.load(sys.argv[1])                           # what only a first call takes
before = peak()
net = model.load(sys.argv[2])
sum(weight.sum() for weight in net.parameters())  # files may be mapped and not read before they are used
print((peak() - before) / sum(weight.nbytes for weight in net.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1.4), (torch.float16, 1.8)])     # copies; float16: its file is ½
def test_load_takes_one_copy_of_memory(dtype, most, tmp_path):
    small, large = (dict(LLAMA, vocab_size=v, hidden_size=w, num_hidden_layers=4) for v, w in ((100, 32), (5000, 896)))
    for name, raw in (("small", small), ("large", large)):
        model.save(model.Transformer(model.parse_config(raw)).initialise(0).to(dtype), tmp_path / name)
    root = Path(model.__file__).parent
    result = subprocess.run([sys.executable, "-c", MEMORY, tmp_path / "small", tmp_path / "large"], cwd=root,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 0.9 < float(result.stdout) < most


# ---------------------------------------------------------------------------------------------------------------------
# The two real folders

def data_folder(name):
    folder = DATA / "models" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set OSPREY_DATA to the folder that holds models/{name}")
    return folder


STORY = ("Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
         "big, red ball. She wanted to play with it, but it was too high.")


@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_stories260K_tells_its_story(cached):
    """The temperature-0 output printed in karpathy/llama2.c, doc/stories260K.md."""
    folder = data_folder("stories260K")
    net, tokenizer = model.load(folder), sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids, cache = [1], model.Cache(net.config)
    hidden = net(torch.tensor([ids]), cache=cache if cached else None)
    cache.open([torch.tensor([0])], 1, 100) if cached else None
    for _ in range(90):
        ids.append(int(net.head(hidden[:, -1]).argmax()))
        hidden = net(torch.tensor([ids[-1:]]), cache=cache) if cached else net(torch.tensor([ids]))
    assert tokenizer.decode(ids[1:]).startswith(STORY)


@pytest.mark.parametrize("name", ["synthetic-tiny-gptneox", "stories260K"])
def test_real_folders_equal_transformers(name):
    folder = data_folder(name)
    tokens = torch.randint(512, (2, 200), generator=torch.Generator().manual_seed(0))
    assert difference(our_logits(folder, tokens), their_logits(folder, tokens)) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Attention over a forest

def forest(sequences):
    """(tokens, depth, end, paths) of the trie of the sequences, laid out depth first: the plainest way to build it."""
    tokens, depth, end, paths = [], [], [], [[] for _ in sequences]

    def grow(members, at):
        members = [i for i in members if len(sequences[i]) > at]
        for token in dict.fromkeys(sequences[i][at] for i in members):
            node, below = len(tokens), [i for i in members if sequences[i][at] == token]
            tokens.append(token), depth.append(at), end.append(None)
            for i in below:
                paths[i].append(node)
            grow(below, at + 1)
            end[node] = len(tokens)

    grow(range(len(sequences)), 0)
    return torch.tensor(tokens), torch.tensor(depth), torch.tensor(end), paths


def random_sequences(seed, roots=1, number=8, longest=20):
    """Sequences that branch off each other: a front of an earlier one and some fresh tokens."""
    rng, sequences = random.Random(seed), []
    for i in range(number):
        front = [] if i < roots else rng.choice(sequences)
        front = front[:rng.randint(1, len(front))] if front else [i]
        sequences.append(front + [rng.randrange(VOCAB) for _ in range(rng.randint(1, longest - 8))])
    return sequences


LONG = list(range(20, 50))
FORESTS = {
    "random": random_sequences(1),
    "random-roots": random_sequences(2, roots=3, number=10),
    "prefix": [LONG, LONG[:7], LONG[:1], LONG[:12] + [3, 3]],
    "duplicates": [LONG[:9], LONG[:9], LONG[:4] + [1], LONG[:9]],
    "one": [LONG],
    "tokens": [[5], [9], [5]],
    "token": [[5]],
}
ARCHITECTURES = {"neox": NEOX, "llama": LLAMA, "mistral": dict(MISTRAL, sliding_window=5)}


def values_and_gradients(net, rows):
    """A random scalar of the hidden states of each sequence, and its gradients; rows: yields each sequence's (T, D)."""
    generator = torch.Generator().manual_seed(3)
    hidden = list(rows)
    loss = sum((h * torch.randn(h.shape, generator=generator, dtype=h.dtype)).sum() for h in hidden)
    weights = [w for n, w in net.named_parameters() if n != "head.weight"]
    return hidden, torch.autograd.grad(loss, weights)


def as_forest(net, tokens, depth, end, paths):
    hidden = net(tokens[None], depth[None], end[None])[0]
    return values_and_gradients(net, (hidden[path] for path in paths))


def apart(one, other):
    """The largest difference of values, and that of gradients."""
    return [max(difference(a, b) for a, b in zip(x, y, strict=True)) for x, y in zip(one, other, strict=True)]


@functools.cache
def one_at_a_time(architecture, name):
    net = our_net(ARCHITECTURES[architecture])
    return net, values_and_gradients(net, (net(torch.tensor([s]))[0] for s in FORESTS[name]))


@pytest.mark.parametrize("block", [4, model.QUERY_BLOCK])
@pytest.mark.parametrize("name", FORESTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_forest_is_its_sequences(architecture, name, block, monkeypatch):
    monkeypatch.setattr(model, "QUERY_BLOCK", block)
    net, expected = one_at_a_time(architecture, name)
    values, gradients = apart(as_forest(net, *forest(FORESTS[name])), expected)
    assert values < 1e-10 and gradients < 1e-10


@pytest.mark.parametrize("block", [4, model.QUERY_BLOCK])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_wrong_forest_is_noticed(architecture, block, monkeypatch):
    """The control: each wrong mask or position must be far off in values or gradients."""
    monkeypatch.setattr(model, "QUERY_BLOCK", block)
    net, expected = one_at_a_time(architecture, "random")
    tokens, depth, end, paths = forest(FORESTS["random"])
    N, index = len(tokens), torch.arange(len(tokens))
    parent = int(((end < N) & (end > index + 1)).nonzero()[-1])      # its subtree ends before the row does
    wrong = {
        "every end is N": (depth, torch.full_like(end, N)),
        "one end too late": (depth, end + (index == parent)),
        "one end too early": (depth, end - (index == parent).long()),
        "position is the index": (index, end),
    }
    for name, (depth, end) in wrong.items():
        assert max(apart(as_forest(net, tokens, depth, end, paths), expected)) > 1e-3, name


@pytest.mark.parametrize("block", [4, model.QUERY_BLOCK])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recomputing_activations_changes_no_bit(architecture, block, monkeypatch):
    """Values and gradients, on a forest of several query blocks, with a sliding window too; without a gradient nothing is
    computed twice."""
    monkeypatch.setattr(model, "QUERY_BLOCK", block)
    net, calls = our_net(ARCHITECTURES[architecture]), []
    attend = model.ForestAttention.__call__
    monkeypatch.setattr(model.ForestAttention, "__call__", lambda *given: calls.append(1) or attend(*given))
    results = []
    for recompute in (False, True):
        for layer in net.blocks:
            layer.recompute = recompute
        results.append(as_forest(net, *forest(FORESTS["random-roots"])))
        assert len(calls) == 2 * (1 + recompute)
        calls.clear()
    assert apart(*results) == [0, 0] and max(gradient.abs().max() for gradient in results[0][1]) > 1e-3
    our_logits(net)
    assert len(calls) == 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recomputing_activations_keeps_less(architecture):
    """What stands in memory between forward and backward: with it the input of each block, less than a tenth."""
    net, tokens, kept = our_net(dict(ARCHITECTURES[architecture], num_hidden_layers=6)), torch.arange(60)[None], {}
    weights = {weight.untyped_storage().data_ptr() for weight in net.parameters()}
    for recompute in (False, True):
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor
        for layer in net.blocks:
            layer.recompute = recompute
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            net(tokens)
        kept[recompute] = sum(storage.nbytes() for place, storage in storages.items() if place not in weights)
    inputs = 6 * 60 * 32 * 8
    assert inputs <= kept[True] < inputs * 2 and kept[True] < kept[False] / 10


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_batch_rows(architecture):
    """(B, T) rows, with or without depth and end, and rows that are padded forests, are the rows one by one."""
    net = our_net(ARCHITECTURES[architecture])
    T = LENGTH
    expected = torch.cat([net(row[None]) for row in TOKENS])
    assert difference(net(TOKENS), expected) < 1e-10
    assert difference(net(TOKENS, torch.arange(T).expand(2, T), torch.full((2, T), T)), expected) < 1e-10
    forests = [forest(random_sequences(seed, number=4))[:3] for seed in (4, 5, 6)]
    longest = max(len(tokens) for tokens, _, _ in forests)
    batch = torch.stack([torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long),
                         torch.arange(1, longest + 1).expand(3, -1)])            # padding: roots that see themselves
    for row, parts in enumerate(forests):
        batch[:, row, :len(parts[0])] = torch.stack(parts)
    hidden = net(*batch)
    for row, parts in enumerate(forests):
        assert difference(hidden[row, :len(parts[0])], net(*(part[None] for part in parts))[0]) < 1e-10


# ---------------------------------------------------------------------------------------------------------------------
# The cache

PROMPTS = [LONG[:14], [7], LONG[:6], LONG[:6] + [1, 2], LONG[:6], [8, 9, 10]]


@torch.no_grad()
def decode(net, prompts, k, drops, steps=8):
    """Largest difference between decoding random rows with the cache and without; drops: {step: rows to keep}."""
    generator = torch.Generator().manual_seed(0)
    tokens, depth, end, paths = forest(prompts)
    cache, worst = model.Cache(net.config), 0.0
    net(tokens[None], depth[None], end[None], cache=cache)
    cache.open([torch.tensor(path) for path in paths], k, steps)
    rows = [list(prompt) for prompt in prompts for _ in range(k)]
    for step in range(steps):
        if step in drops:
            cache.keep(torch.tensor(drops[step]))
            rows = [rows[i] for i in drops[step]]
        new = torch.randint(VOCAB, (len(rows), 1), generator=generator)
        rows = [row + token for row, token in zip(rows, new.tolist())]
        hidden = net(new, cache=cache)
        for row, h in zip(rows, hidden):
            worst = max(worst, difference(h[-1], net(torch.tensor([row]))[0, -1]))
    return worst


DROPS = {
    "all-rows-stay": {},
    "some-rows-leave": {2: [0, 2, 3, 4, 5, 8, 9, 13, 14, 16, 17], 5: [1, 2, 4, 9]},
    "prompts-leave": {1: [0, 1, 2, 6, 7, 8, 9, 11, 12, 17], 3: [1, 4, 5, 8, 9], 6: [3]},
    "before-the-first-token": {0: [4, 5, 10, 17]},
}


@pytest.mark.parametrize("drops", DROPS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoding_with_a_cache(architecture, drops):
    assert decode(our_net(ARCHITECTURES[architecture]), PROMPTS, 3, DROPS[drops]) < 1e-10


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoding_one_row_of_one_prompt(architecture):
    assert decode(our_net(ARCHITECTURES[architecture]), [LONG], 1, {}) < 1e-10


@pytest.mark.parametrize("fault", ["length", "window", "owner"])
def test_a_wrong_cache_is_noticed(fault, monkeypatch):
    """The control of the two tests above."""
    opened = model.Cache.open

    def open_wrongly(cache, *arguments):
        opened(cache, *arguments)
        if fault == "length":
            cache.length = cache.length + 1
        if fault == "window":
            cache.config = model.parse_config(dict(MISTRAL, sliding_window=6))
        if fault == "owner":
            cache.prompt = [tuple(part.flip(0) for part in pair) for pair in cache.prompt]
    monkeypatch.setattr(model.Cache, "open", open_wrongly)
    assert decode(our_net(ARCHITECTURES["mistral"]), PROMPTS, 3, {}, steps=3) > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one sentence that names the file and the key

def save_small(folder, raw=LLAMA):
    model.save(our_net(raw, torch.float32), folder)
    return folder


def refused(folder, *words):
    """Loading the folder is an InputError that holds all the words."""
    with pytest.raises(InputError) as caught:
        model.load(folder)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{caught.value!s} does not say {missing}"
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700


BAD_CONFIGS = [
    {"model_type": None}, {"model_type": "gpt2"}, {"model_type": ["llama"]}, {"model_type": 3},
    {"hidden_size": None}, {"hidden_size": 0}, {"hidden_size": -32}, {"hidden_size": "32"}, {"hidden_size": 32.0},
    {"hidden_size": True}, {"hidden_size": 2 ** 50}, {"vocab_size": 0}, {"intermediate_size": []}, {"num_hidden_layers": 0},
    {"num_attention_heads": 3}, {"num_attention_heads": {}}, {"num_key_value_heads": 3}, {"num_key_value_heads": -1},
    {"head_dim": 0}, {"head_dim": 7}, {"max_position_embeddings": "long"},
    {"rms_norm_eps": 0}, {"rms_norm_eps": "1e-5"}, {"rms_norm_eps": float("nan")}, {"rms_norm_eps": float("inf")},
    {"rope_theta": -1.0}, {"rope_theta": "10000"}, {"rope_theta": float("inf")}, {"rope_theta": True},
    {"rope_theta": 10 ** 400}, {"rope_scaling": {"type": "linear", "factor": 10 ** 400}}, {"hidden_act": "x" * 10 ** 6},
    {"num_attention_heads": 2 ** 20, "head_dim": 2 ** 20}, {"a\nb": 1}, {"use_cache": json.loads("[" * 300 + "]" * 300)},
    {"hidden_act": "quick_gelu"}, {"hidden_act": ["silu"]}, {"hidden_act": 1},
    {"attention_bias": 1}, {"mlp_bias": "false"}, {"tie_word_embeddings": "yes"},
    {"quantization_config": {"bits": 4}}, {"sliding_window": 9}, {"partial_rotary_factor": 0.5}, {"logit_scale": 0.1},
    {"rope_scaling": "linear"}, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, {"rope_scaling": {"type": "dynamic"}},
    {"rope_scaling": {"type": ["linear"], "factor": 2.0}}, {"rope_scaling": {"type": "linear"}},
    {"rope_scaling": {"type": "linear", "factor": 0}}, {"rope_scaling": {"type": "linear", "factor": "2"}},
    {"rope_scaling": {"type": "linear", "factor": float("inf")}},
    {"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 0.5}},
    {"rope_scaling": {**LLAMA3, "low_freq_factor": 3.0}}, {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": None}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},                # rope_theta says 50
    {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LINEAR},
]
BAD_NEOX = [{"rotary_pct": 1.5}, {"rotary_pct": -0.5}, {"rotary_pct": "all"}, {"rotary_pct": 0.45}, {"rotary_emb_base": 0},
            {"layer_norm_eps": -1e-5}, {"use_parallel_residual": 0}, {"num_key_value_heads": 2}, {"rms_norm_eps": 1e-5}]
BAD_MISTRAL = [{"sliding_window": 0}, {"sliding_window": 4.5}, {"attention_bias": True}]


@pytest.mark.parametrize("raw, change", [(raw, change) for raw, changes in ((LLAMA, BAD_CONFIGS), (NEOX, BAD_NEOX),
                                                                             (MISTRAL, BAD_MISTRAL)) for change in changes],
                         ids=lambda value: value.get("hidden_size") and value.get("model_type") or str(value))
def test_bad_config(raw, change, tmp_path):
    """The config alone is refused: the folder holds no weights."""
    (tmp_path / "config.json").write_text(json.dumps({**raw, **change}))
    refused(tmp_path, str(tmp_path / "config.json"), *(repr(key)[1:-1] for key in list(change)[:1]))


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"3", b"\xff\xfe{}", b'{"a": ' + b"9" * 5000 + b"}", b"[" * 10 ** 5],
                         ids=lambda content: str(content)[:12])
def test_broken_config_file(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    refused(tmp_path, str(tmp_path / "config.json"))


def test_layers_that_no_file_holds(tmp_path):
    """They are refused before a network of them is made, which would take all memory."""
    edit(save_small(tmp_path / "small"), tmp_path / "deep", lambda raw: raw.update(num_hidden_layers=10 ** 8))
    refused(tmp_path / "deep", str(tmp_path / "deep" / "config.json"), "num_hidden_layers is 100,000,000")


def test_no_folder(tmp_path):
    refused(tmp_path / "nowhere", "nowhere")
    (tmp_path / "file").write_text("{}")
    refused(tmp_path / "file", str(tmp_path / "file"))


def test_dropout_is_named_and_not_applied(tmp_path, capsys):
    expected = our_logits(save_small(tmp_path))
    assert capsys.readouterr().err == ""
    edit(tmp_path, tmp_path / "copy", lambda raw: raw.update(attention_dropout=0.5))
    assert torch.equal(our_logits(tmp_path / "copy"), expected)
    assert "config.json: attention_dropout" in capsys.readouterr().err


@pytest.mark.parametrize("share", [0, 1, 2, 3, 4, 5])
def test_truncated_weights(share, tmp_path):
    file = save_small(tmp_path) / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    length = [0, 5, 8, header - 1, header, len(content) - 1][share]
    file.write_bytes(content[:length])
    refused(tmp_path, str(file), "truncated")


def entry(start, stop, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


BAD_HEADERS = {     # header, number of data bytes, what the message names
    "not JSON": (b"{oops", 0, "JSON"),
    "not text": (b"\xff\xff", 0, "JSON"),
    "not an object": (b"[1]", 0, "object"),
    "entry is a number": ({"x": 3}, 0, "'x'"),
    "entry without shape": ({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, 8, "'x'"),
    "offsets not numbers": ({"x": entry("0", "8")}, 8, "'x'"),
    "offsets of three": ({"x": {**entry(0, 8), "data_offsets": [0, 4, 8]}}, 8, "'x'"),
    "offsets reversed": ({"x": entry(8, 0)}, 8, "'x'"),
    "negative shape": ({"x": entry(0, 8, (-1, -2))}, 8, "'x'"),
    "dtype a number": ({"x": entry(0, 8, dtype=4)}, 8, "'x'"),
    "behind the end": ({"x": entry(0, 8), "y": entry(8, 16)}, 12, "'y'"),
    "overlap": ({"x": entry(0, 8), "y": entry(4, 12)}, 12, "'y'"),
    "gap": ({"x": entry(0, 8), "y": entry(12, 20)}, 20, "'y'"),
    "gap in front": ({"x": entry(4, 12)}, 12, "'x'"),
    "bytes left over": ({"x": entry(0, 8)}, 9, "behind"),
    "shape without bytes": ({"x": entry(0, 8, (3,))}, 8, "'x'"),
    "shape of 2^64": ({"x": entry(0, 8, (2 ** 32, 2 ** 32))}, 8, "'x'"),
    "unknown to the reader": ({"x": entry(0, 8, dtype="Q7")}, 8, "sound"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_header(name, tmp_path):
    header, size, word = BAD_HEADERS[name]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with pytest.raises(InputError, match="weights.safetensors") as caught:
        model.read_header(path)
        model.open_weights(path)
    assert word in str(caught.value)


@pytest.mark.parametrize("length", [100, 2 ** 31, 2 ** 63, 2 ** 64 - 1])
def test_header_longer_than_the_file(length, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(InputError, match="weights.safetensors is truncated"):
        model.read_header(path)


def test_damaged_headers_never_raise_anything_else(tmp_path):
    """300 files with a few wrong bytes: each loads or is refused, and most are refused."""
    file, rng, refusals = save_small(tmp_path) / "model.safetensors", random.Random(0), 0
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 4))):
            damaged[rng.randrange(header)] = rng.choice((rng.randrange(256), ord(rng.choice('0123456789{}[],:" F'))))
        file.write_bytes(damaged)
        try:
            model.load(tmp_path)
        except InputError as error:
            refusals += str(tmp_path) in str(error)
    assert refusals > 250


UP = "model.layers.1.mlp.up_proj.weight"
BAD_WEIGHTS = {     # what is done to the tensors, what the message names
    "missing norm": (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
    "missing layer": (lambda t: [t.pop(n) for n in list(t) if ".layers.1." in n], "model.layers.1."),
    "missing head": (lambda t: t.pop("lm_head.weight"), "lm_head.weight"),
    "one layer more": (lambda t: t.update({UP.replace("1", "2"): t[UP].clone()}), "model.layers.2.mlp.up_proj.weight"),
    "adapter": (lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)}), "lora_A"),
    "bias": (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}), "q_proj.bias"),
    "not quite a buffer": (lambda t: t.update({"model.rotary_emb.inv_freq2": torch.ones(4)}), "inv_freq2"),
    "transposed": (lambda t: t.update({UP: t[UP].T.contiguous()}), UP),
    "another vocabulary": (lambda t: t.update({"model.embed_tokens.weight": torch.ones(60, 32)}), "model.embed_tokens.weight"),
    "one more axis": (lambda t: t.update({UP: t[UP][None].clone()}), UP),
    "integers": (lambda t: t.update({UP: t[UP].int()}), "I32"),
    "float8": (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), "F8"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights(name, tmp_path):
    change, word = BAD_WEIGHTS[name]
    file = tmp_path if name.startswith("missing") else tmp_path / "model.safetensors"
    refused(rewrite(save_small(tmp_path), change), str(file), word)


@pytest.mark.parametrize("target", ["../x.safetensors", "/etc/passwd", "a\\b.safetensors", "a/b.safetensors", "..", ".", "", 3, None])
def test_index_entries_stay_in_the_folder(target, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "SHARD_BYTES", 12_000)
    index = save_small(tmp_path / "folder") / "model.safetensors.index.json"
    shutil.copy(sorted(index.parent.glob("*.safetensors"))[0], tmp_path / "x.safetensors")
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.norm.weight"] = target
    index.write_text(json.dumps(raw))
    refused(index.parent, str(index), "model.norm.weight", "not a file of this folder")


@pytest.mark.parametrize("target", ["x" * 5000, "a\nb", "\0"])
def test_shards_under_a_name_that_no_file_has(target, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "SHARD_BYTES", 12_000)
    index = save_small(tmp_path) / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.norm.weight"] = target
    index.write_text(json.dumps(raw))
    refused(tmp_path, str(index), "model.norm.weight", "which the folder lacks")


@pytest.mark.parametrize("fault, words", [
    ("shard gone", ("model.safetensors.index.json", "model-00002-of-")),
    ("shard broken", ("model-00002-of-", "truncated")),
    ("wrong shard", ("model-00002-of-", "model.embed_tokens.weight", "lacks")),
    ("not listed", ("model-00001-of-", "model.embed_tokens.weight", "does not list")),
    ("held twice", ("model-00002-of-", "model.embed_tokens.weight", "does not list")),
    ("no map", ("model.safetensors.index.json", "weight_map")),
    ("not JSON", ("model.safetensors.index.json", "JSON")),
])
def test_bad_index(fault, words, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "SHARD_BYTES", 12_000)
    index = save_small(tmp_path) / "model.safetensors.index.json"
    raw, second = json.loads(index.read_text()), sorted(tmp_path.glob("model-*"))[1]
    if fault == "shard gone":
        second.unlink()
    if fault == "shard broken":
        second.write_bytes(second.read_bytes()[:-4])
    if fault == "wrong shard":
        raw["weight_map"]["model.embed_tokens.weight"] = second.name
    if fault == "not listed":
        raw["weight_map"]["another"] = raw["weight_map"].pop("model.embed_tokens.weight")
        rewrite(tmp_path, lambda t: t.update(another=torch.ones(1)), raw["weight_map"]["another"])
    if fault == "held twice":
        rewrite(tmp_path, lambda t: t.update({"model.embed_tokens.weight": torch.ones(VOCAB, 32)}), second.name)
    if fault == "no map":
        raw = {"weight_map": []}
    index.write_text("{" if fault == "not JSON" else json.dumps(raw))
    refused(tmp_path, *words)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused(name, tmp_path):
    save_small(tmp_path)
    (tmp_path / name).write_bytes(b"never read")
    expected = our_logits(tmp_path)                          # beside safetensors they are ignored
    assert expected.isfinite().all()
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, str(tmp_path), name, "save_pretrained")


def test_no_weights(tmp_path):
    (save_small(tmp_path) / "model.safetensors").unlink()
    refused(tmp_path, str(tmp_path), "model.safetensors")
