"""model.py against transformers: logits over a grid of configs, folders there and back, the same config.json.

Every network here is small and every parameter random, biases and norms too, so that a wrong mapping shows.
Where a test says "equal", a control beside it shows that its comparison notices the mistakes it is there for.
"""
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

import forest
import model
from support.cli import InputError
from support.families import FAMILIES

DATA = Path(os.environ.get("OSPREY_DATA", Path(__file__).parents[3] / "shared" / "data"))
VOCAB, LENGTH = 61, 48
TOKENS = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))

SIZES = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, max_position_embeddings=64)
NEOX = dict(SIZES, model_type="gpt_neox", num_attention_heads=2, layer_norm_eps=0.03, rotary_pct=0.25,
            rotary_emb_base=50.0)
LLAMA = dict(SIZES, model_type="llama", rms_norm_eps=0.03, rope_theta=50.0, num_key_value_heads=2)
MISTRAL = dict(LLAMA, model_type="mistral", sliding_window=LENGTH // 2)
QWEN2 = dict(LLAMA, model_type="qwen2", use_sliding_window=False)
QWEN3 = dict(LLAMA, model_type="qwen3", head_dim=12)
LINEAR = {"type": "linear", "factor": 3.0}
LLAMA3 = {"rope_type": "llama3", "factor": 6.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
          "original_max_position_embeddings": 16}
CASES = {
    "neox": NEOX,
    "neox-sequential": dict(NEOX, use_parallel_residual=False, rotary_pct=1.0, hidden_act="gelu_new"),
    "neox-tied-unbiased": dict(NEOX, tie_word_embeddings=True, attention_bias=False, hidden_act="gelu_fast",
                               rotary_pct=0.5),
    "neox-linear": dict(NEOX, rope_scaling=LINEAR, rotary_pct=1.0),
    "llama": LLAMA,
    "llama-tied-biased": dict(LLAMA, num_key_value_heads=4, tie_word_embeddings=True, attention_bias=True,
                              mlp_bias=True),
    "llama-linear": dict(LLAMA, rope_scaling=LINEAR, head_dim=12),
    "llama-llama3": dict(LLAMA, rope_scaling=LLAMA3, num_key_value_heads=1, hidden_act="gelu"),
    "mistral": MISTRAL,
    "mistral-no-window": dict(MISTRAL, sliding_window=None, head_dim=6),
    "qwen2": dict(QWEN2, sliding_window=LENGTH // 2),      # it is there, and does not count
    "qwen2-tied-window": dict(QWEN2, tie_word_embeddings=True, use_sliding_window=True, max_window_layers=0,
                              sliding_window=LENGTH // 2),
    "qwen2-window-late": dict(QWEN2, use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "qwen3": QWEN3,
    "qwen3-tied-biased": dict(QWEN3, tie_word_embeddings=True, attention_bias=True, rope_scaling=LINEAR,
                              num_key_value_heads=4),
}
every_case = pytest.mark.parametrize("case", CASES)


# -----------------------------------------------------------------------------------------------------------
# Networks and folders

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
        config = AutoConfig.for_model(**json.loads(json.dumps(CASES[case])))    # a copy: it is changed
        net = randomise(AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval())
        folder = tmp_path_factory.mktemp(case)
        net.save_pretrained(folder)
        return net, folder

    return make


def read(folder):
    return json.loads((folder / "config.json").read_text())


def edit(folder, target, change):
    """A copy of the folder whose config.json is changed: change(its object) returns a new one or nothing."""
    shutil.copytree(folder, target)
    raw = read(folder)
    raw = change(raw) or raw
    (target / "config.json").write_text(json.dumps(raw))
    return target


# -----------------------------------------------------------------------------------------------------------
# Parity with transformers

@every_case
def test_logits_equal_transformers(case, oracle):
    net, folder = oracle(case)
    expected = their_logits(net)
    assert expected.std() > 1
    assert difference(our_logits(folder), expected) < 1e-4


def other_values(raw):
    """Yield (key, another value) for each field of a config.json that changes the result and no shape."""
    other = {"layer_norm_eps": 1e-5, "rms_norm_eps": 1e-6, "num_attention_heads": 4,
             "hidden_act": {"silu": "relu", "gelu": "gelu_new"}.get(raw["hidden_act"], "gelu"),
             "use_parallel_residual": not raw.get("use_parallel_residual"),
             "sliding_window": LENGTH // 2 - 1 if raw.get("sliding_window") else LENGTH - 1}
    if raw["model_type"] != "gpt_neox":
        del other["num_attention_heads"]          # it belongs to the shapes there
    if "full_attention" in raw.get("layer_types", []):
        del other["sliding_window"]               # Qwen's does not count
    yield from ((key, value) for key, value in other.items() if key in raw)
    for key, value in raw["rope_parameters"].items():
        if key == "partial_rotary_factor":
            yield f"rope_parameters.{key}", 0.75 if value == 1 else 1.0
        elif key not in ("rope_type", "type"):
            yield f"rope_parameters.{key}", value * 1.25


@every_case
def test_every_field_is_noticed(case, oracle, tmp_path):
    """The control of the test above: another value in config.json alone, and the logits are far off."""
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
    sizes = ("head_dim", "num_key_value_heads", "num_hidden_layers")
    other |= {key: 4 if raw[key] == 2 else 2 for key in sizes if key in raw}
    for key, value in other.items():
        if key != "tie_word_embeddings" or not value:         # a head beside a tied one is taken for its copy
            with pytest.raises(InputError, match=str(tmp_path / key)):
                model.load(edit(oracle(case)[1], tmp_path / key, lambda raw: raw.update({key: value})))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_fields_mean_what_transformers_takes_them_for(model_type):
    from transformers import AutoConfig
    sizes = {key: value * 4 for key, value in SIZES.items() if key != "max_position_embeddings"}
    sizes |= {"model_type": model_type, "num_attention_heads": 32 if "qwen" in model_type else 16}
    ours, theirs = model.parse_config(sizes), AutoConfig.for_model(**sizes)
    names = {"context": "max_position_embeddings", "activation": "hidden_act", "tied": "tie_word_embeddings",
             "norm_eps": "layer_norm_eps" if ours.is_neox else "rms_norm_eps",
             "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "attention_bias": "attention_bias",
             "sliding_window": "sliding_window", "output_bias": "attention_bias",
             "parallel_residual": "use_parallel_residual"}
    for mine, name in names.items():
        assert getattr(ours, mine) == getattr(theirs, name, getattr(ours, mine)), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.rope_scaling is None
    assert ours.rotary_dims == ours.head_dim * theirs.rope_parameters.get("partial_rotary_factor", 1)
    if ours.sliding_window:
        assert model.parse_config(dict(sizes, sliding_window=None)).sliding_window is None


def test_float32_masters_compute_like_bfloat16_weights(oracle):
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


# -----------------------------------------------------------------------------------------------------------
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
    scaling = None if kind == "default" else {name: kind, **rope}
    return dict(raw, torch_dtype=raw.pop("dtype"), rope_scaling=scaling)


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
    """transformers 4.4x writes rope_theta and partial_rotary_factor beside rotary_emb_base and rotary_pct."""
    net, folder = oracle("neox")
    for key, value in (("rope_theta", 50.0), ("partial_rotary_factor", 0.25)):
        both = edit(folder, tmp_path / key, lambda raw: dict(old_generation(raw), **{key: value * repeat}))
        if fits:
            assert difference(our_logits(both), their_logits(net)) < 1e-4
        else:
            with pytest.raises(InputError, match=f"config.json.*{key}"):
                model.load(both)


@pytest.mark.parametrize("case", ["llama", "neox"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(case, dtype, oracle, tmp_path):
    from transformers import AutoModelForCausalLM
    AutoModelForCausalLM.from_pretrained(oracle(case)[1], dtype=dtype).save_pretrained(tmp_path / "theirs")
    assert {tensor.dtype for tensor in load_file(tmp_path / "theirs/model.safetensors").values()} == {dtype}
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32,
                                                attn_implementation="eager")
    assert difference(our_logits(tmp_path / "theirs"), their_logits(wide)) < 1e-4
    model.save(model.load(tmp_path / "theirs", dtype=dtype), tmp_path / "ours")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert back.dtype == dtype                                  # config.json says so
    for name, weight in back.named_parameters():
        assert torch.equal(weight.float(), wide.get_parameter(name))


@pytest.mark.parametrize("name", ["embed_out.weight", "lm_head.weight"])
def test_both_names_of_the_neox_head(name, oracle, tmp_path):
    """Published Pythia files have one, transformers 5 writes the other."""
    net, folder = oracle("neox")
    file = shutil.copytree(folder, tmp_path / "copy") / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors.pop("embed_out.weight" if "embed_out.weight" in tensors else "lm_head.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    assert difference(our_logits(tmp_path / "copy"), their_logits(net)) < 1e-4


@pytest.mark.parametrize("case", ["llama-tied-biased", "neox-tied-unbiased"])
def test_a_tied_head_may_be_stored_once_more(case, oracle, tmp_path):
    folder = oracle(case)[1]
    file = shutil.copytree(folder, tmp_path / "copy") / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = next(tensor for name, tensor in tensors.items() if "embed" in name).clone()
    save_file(tensors, file, metadata={"format": "pt"})
    assert torch.equal(our_logits(tmp_path / "copy"), our_logits(folder))


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
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1.4), (torch.float16, 1.8)])     # its file is half
def test_load_takes_one_copy_of_memory(dtype, most, tmp_path):
    for name, vocabulary, width in (("small", 100, 32), ("large", 5000, 896)):
        raw = dict(LLAMA, vocab_size=vocabulary, hidden_size=width, num_hidden_layers=4)
        model.save(model.Transformer(model.parse_config(raw)).initialise(0).to(dtype), tmp_path / name)
    root = Path(model.__file__).parent
    result = subprocess.run([sys.executable, "-c", MEMORY, tmp_path / "small", tmp_path / "large"], cwd=root,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 0.9 < float(result.stdout) < most


# -----------------------------------------------------------------------------------------------------------
# The two real folders

def data_folder(name):
    folder = DATA / "models" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set OSPREY_DATA to the folder that holds models/{name}")
    return folder


STORY = ("Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One "
         "day, she saw a big, red ball. She wanted to play with it, but it was too high.")


@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_stories260K_tells_its_story(cached):
    """The temperature-0 output printed in karpathy/llama2.c, doc/stories260K.md."""
    folder = data_folder("stories260K")
    net = model.load(folder)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids, cache, prompt = [1], forest.Cache(net.config), forest.pack([[1]])
    hidden = net.hidden(prompt, cache)[None]
    cache.open(prompt.paths, 1, 100)
    for _ in range(90):
        ids.append(int(net.head(hidden[:, -1]).argmax()))
        hidden = net(torch.tensor([ids[-1:]]), cache=cache) if cached else net(torch.tensor([ids]))
    assert tokenizer.decode(ids[1:]).startswith(STORY)


@pytest.mark.parametrize("name", ["synthetic-tiny-gptneox", "stories260K"])
def test_real_folders_equal_transformers(name):
    folder = data_folder(name)
    tokens = torch.randint(512, (2, 200), generator=torch.Generator().manual_seed(0))
    assert difference(our_logits(folder, tokens), their_logits(folder, tokens)) < 1e-4


PROMPTS = ["What is the capital of France?", "Write a short poem about the sea.", "Explain photosynthesis.",
           "List three animals that can fly.", "What is 12 + 30?"]


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_equals_transformers():
    """SmolLM2-135M-Instruct: logits to 1e-4 of their scale; five greedy answers are those of `generate`."""
    from transformers import AutoModelForCausalLM

    from sample import generate
    from support.tokenizer import load_tokenizer
    folder = Path(os.environ.get("OSPREY_SMOLLM2", "nowhere"))
    if not folder.is_dir():
        pytest.skip("OSPREY_SMOLLM2 names no folder of SmolLM2-135M-Instruct")
    net, tokenizer = model.load(folder), load_tokenizer(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    user, end, assistant = (tokenizer.encode(text) for text in ("user\n", "\n", "assistant\n"))
    for prompt in PROMPTS:
        ids = [1, *user, *tokenizer.encode(prompt), 2, *end, 1, *assistant]
        expected = their_logits(theirs, torch.tensor([ids]))
        assert difference(our_logits(net, torch.tensor([ids])), expected) < 1e-4 * expected.abs().max()
        answer = theirs.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids):]
        [[ours]] = generate(net, [ids], torch.zeros(1, 1, 40), tokenizer.stop_ids,
                            tokenizer.sampling_mask(net.config.vocab_size), temperature=0)
        assert ours.ids == answer.tolist() and len(ours.ids) > 5


# -----------------------------------------------------------------------------------------------------------
# A config.json that cannot be used: one sentence that names the file and the field

BAD_CONFIGS = [
    {"model_type": None}, {"model_type": "gpt2"}, {"model_type": ["llama"]}, {"hidden_size": None},
    {"hidden_size": 0}, {"hidden_size": -32}, {"hidden_size": "32"}, {"hidden_size": 32.0},
    {"hidden_size": True}, {"hidden_size": 2 ** 50}, {"vocab_size": 0}, {"intermediate_size": []},
    {"num_hidden_layers": 0}, {"num_hidden_layers": 10 ** 8}, {"num_attention_heads": 3},
    {"num_attention_heads": {}}, {"num_key_value_heads": 3}, {"num_key_value_heads": -1}, {"head_dim": 0},
    {"head_dim": 7}, {"max_position_embeddings": "long"}, {"rms_norm_eps": 0}, {"rms_norm_eps": "1e-5"},
    {"rms_norm_eps": float("nan")}, {"rms_norm_eps": float("inf")}, {"rope_theta": -1.0},
    {"rope_theta": 10 ** 400}, {"rope_scaling": {"type": "linear", "factor": 10 ** 400}},
    {"hidden_act": "x" * 10 ** 6}, {"num_attention_heads": 2 ** 20, "head_dim": 2 ** 20},
    {"hidden_act": "quick_gelu"}, {"hidden_act": ["silu"]}, {"attention_bias": 1}, {"mlp_bias": "false"},
    {"tie_word_embeddings": "yes"}, {"quantization_config": {"bits": 4}}, {"sliding_window": 9},
    {"partial_rotary_factor": 0.5}, {"logit_scale": 0.1}, {"rope_interleaved": True}, {"num_experts": 8},
    {"no_rope_layers": [1, 0]}, {"attention_multiplier": 0.1}, {"final_logit_softcapping": 30.0},
    {"layer_types": ["full_attention", "sliding_attention"]}, {"layer_types": 7}, {"rope_scaling": "linear"},
    {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    {"rope_scaling": {"type": ["linear"], "factor": 2.0}}, {"rope_scaling": {"type": "linear"}},
    {"rope_scaling": {"type": "linear", "factor": 0}}, {"rope_scaling": {"type": "linear", "factor": "2"}},
    {"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 0.5}},
    {"rope_scaling": {**LLAMA3, "low_freq_factor": 3.0}},
    {"rope_parameters": {"partial_rotary_factor": 0.5}},
]
BAD_NEOX = [{"rotary_pct": 1.5}, {"rotary_pct": -0.5}, {"rotary_pct": "all"}, {"rotary_pct": 0.45},
            {"rotary_emb_base": 0}, {"layer_norm_eps": -1e-5}, {"use_parallel_residual": 0},
            {"num_key_value_heads": 2}, {"rms_norm_eps": 1e-5}]
BAD_MISTRAL = [{"sliding_window": 0}, {"sliding_window": 4.5}, {"attention_bias": True}]
BAD_QWEN = [{"max_window_layers": 1, "use_sliding_window": True}, {"max_window_layers": -1},
            {"mlp_bias": True}, {"use_sliding_window": 1}, {"layer_types": ["sliding_attention"] * 2},
            {"num_experts": 60}]


@pytest.mark.parametrize("raw, changes", [(LLAMA, BAD_CONFIGS), (NEOX, BAD_NEOX), (MISTRAL, BAD_MISTRAL),
                                          (QWEN2, BAD_QWEN)], ids=["llama", "gpt_neox", "mistral", "qwen2"])
def test_bad_config(raw, changes, tmp_path):
    """The config alone is refused: the folder holds no weights."""
    for change in changes:
        (tmp_path / "config.json").write_text(json.dumps({**raw, **change}))
        with pytest.raises(InputError) as caught:
            model.load(tmp_path)
        message, key = str(caught.value), repr(next(iter(change)))[1:-1].replace("rope_parameters", "rotary")
        assert str(tmp_path / "config.json") in message and key in message, change
        assert message.isprintable() and len(message) < 700


def test_sizes_of_no_machine_take_no_memory(tmp_path):
    """The largest sizes that are let through: the weights refuse them, and nothing is made for them."""
    model.save(model.Transformer(model.parse_config(LLAMA)).initialise(0), tmp_path / "small")
    huge = dict(vocab_size=2 ** 28, hidden_size=2 ** 27, intermediate_size=2 ** 28, num_attention_heads=2)
    edit(tmp_path / "small", tmp_path / "huge", lambda raw: raw.update(huge))
    with pytest.raises(InputError, match="huge"):
        model.load(tmp_path / "huge")


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_no_folder(name, tmp_path):
    (tmp_path / "file").write_text("{}")
    with pytest.raises(InputError, match=f"{name} is not a folder"):
        model.load(tmp_path / name)


def test_dropout_is_named_and_not_applied(tmp_path, capsys):
    model.save(randomise(model.Transformer(model.parse_config(LLAMA))), tmp_path / "plain")
    expected = our_logits(tmp_path / "plain")
    assert capsys.readouterr().err == ""
    edit(tmp_path / "plain", tmp_path / "copy", lambda raw: raw.update(attention_dropout=0.5))
    assert torch.equal(our_logits(tmp_path / "copy"), expected)
    assert "config.json: attention_dropout" in capsys.readouterr().err


def test_unknown_fields_are_named_once(tmp_path, capsys):
    """What published files hold besides is read; what nobody knows is named, on one line, however often."""
    model.save(randomise(model.Transformer(model.parse_config(LLAMA))), tmp_path / "plain")
    expected = our_logits(tmp_path / "plain")
    harmless = {"is_llama_config": True, "rope_interleaved": False, "unsloth_fixed": True, "logit_scale": 1.0,
                "unsloth_version": "2024.9", "custom_pipelines": {"text-generation": {}}, "pruned_heads": {},
                "max_sequence_length": 2048, "quantization_config": None,
                "layer_types": ["full_attention"] * 2}
    edit(tmp_path / "plain", tmp_path / "known", lambda raw: raw.update(harmless))
    assert torch.equal(our_logits(tmp_path / "known"), expected) and capsys.readouterr().err == ""
    unknown = {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}, "a\nb": 1}
    edit(tmp_path / "plain", tmp_path / "copy", lambda raw: raw.update(unknown))
    for _ in range(2):
        assert torch.equal(our_logits(tmp_path / "copy"), expected)
    assert capsys.readouterr().err == (
        f"note: {tmp_path / 'copy' / 'config.json'}: 'auto_map', 'a\\nb' not known here, "
        "taken as without effect.\n")
