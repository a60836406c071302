"""One transformer for two families: Llama (Llama 2/3, TinyLlama, Mistral) and GPT-NeoX (Pythia).

    net = load("folder")                       a Hugging Face folder: config.json + safetensors
    hidden = net(tokens)                       (B, T) -> (B, T, D)
    logits = net.head(hidden)                  (B, T, V); call it only where a token is needed: it is the widest layer
    save(net, "folder")                        what transformers loads
    load("folder", scores=True)                its head gives one number, a reward or a value: sequence classification

Everything Osprey scores shares its front, so the attention here knows one rule only: token j is seen by token i exactly
when j <= i < end[j], where end[j] is the index after j's last descendant in a forest of sequences laid out depth first
(data.pack). A plain causal row is the forest with one branch. The cache at the end of the file is the same idea for
sampling: the keys and values of a prompt are computed once and shown to all of its rows.

Letters: B rows, T tokens, N tokens of a forest in one line, D width, H query heads, G key/value heads, E head width,
V vocabulary, P prompts, R rows in sampling.
"""
import contextlib
import itertools
import json
import math
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from forest import Cache, ForestAttention
from support.cli import InputError, read_json
from support.hf import BUFFERS, DTYPES, SHARD_BYTES, open_weights, read_header, weight_files

# ---------------------------------------------------------------------------------------------------------------------
# config.json

ACTIVATIONS = {
    "silu": F.silu, "swish": F.silu, "relu": F.relu, "gelu": F.gelu,
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), lambda x: F.gelu(x, approximate="tanh")),
}

# What each family understands, with the value transformers assumes when the file leaves the field out.
SHARED_FIELDS = {"vocab_size": None, "hidden_size": None, "intermediate_size": None, "num_hidden_layers": None,
                 "num_attention_heads": None, "max_position_embeddings": 2048, "tie_word_embeddings": False,
                 "rope_scaling": None, "rope_parameters": None}
LLAMA_FIELDS = {**SHARED_FIELDS, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
                "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False}
FIELDS = {
    "llama": LLAMA_FIELDS,
    "mistral": {**{k: v for k, v in LLAMA_FIELDS.items() if not k.endswith("_bias")},
                "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "gpt_neox": {**SHARED_FIELDS, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "rotary_pct": 0.25,
                 "rotary_emb_base": 10000.0, "use_parallel_residual": True, "attention_bias": True},
}
# Fields that say nothing about the mathematics of the forward pass (pretraining_tp only splits a product in slices).
HARMLESS = set("""
    model_type architectures dtype torch_dtype transformers_version _name_or_path bos_token_id eos_token_id pad_token_id
    unk_token_id initializer_range use_cache pretraining_tp classifier_dropout return_dict output_hidden_states
    output_attentions id2label label2id reward_shift problem_type chunk_size_feed_forward is_decoder tokenizer_class num_labels
    task_specific_params _attn_implementation_autoset attn_implementation gradient_checkpointing""".split())
SCORERS = {"llama": "LlamaForSequenceClassification", "mistral": "MistralForSequenceClassification",
           "gpt_neox": "GPTNeoXForSequenceClassification"}
DROPOUTS = {"attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"}
LARGEST = 2 ** 28       # no size is larger, and the bytes of a matrix of two of them can still be counted in 64 bits


@dataclass(frozen=True)
class Config:
    """What the forward pass needs to know, in one vocabulary for both families; `source` is config.json as read."""
    model_type: str
    vocab_size: int
    width: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int                   # positions the model was trained for (max_position_embeddings)
    activation: str
    norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    tied: bool                     # the head is the embedding
    parallel_residual: bool        # GPT-NeoX: attention and MLP read the same input
    sliding_window: int | None     # a token sees the last `sliding_window` positions, itself included
    rope_theta: float
    rotary_dims: int               # how many of the head's dimensions turn (GPT-NeoX: rotary_pct of them)
    rope_scaling: dict | None      # {"rope_type": "linear" | "llama3", …}
    source: dict
    scores: bool = False           # the head gives one number a token instead of logits (a reward model)

    @property
    def is_neox(self):
        return self.model_type == "gpt_neox"


def is_positive(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e30       # fits float32 too


def read_rope(raw, values, head_dim, where):
    """(theta, turning dimensions of a head, scaling or None) from either generation of config.json.

    Hub folders write rope_theta / rotary_emb_base, rotary_pct and rope_scaling; transformers 5 writes rope_parameters.
    """
    theta_name, share_name = (("rotary_emb_base", "rotary_pct") if raw["model_type"] == "gpt_neox"
                              else ("rope_theta", "partial_rotary_factor"))
    theta, share = values[theta_name], values.get(share_name, 1.0)
    if values["rope_parameters"] is not None and values["rope_scaling"] is not None:
        raise InputError(f"{where}: rope_parameters and rope_scaling are both given; keep one.")
    name = "rope_parameters" if values["rope_parameters"] is not None else "rope_scaling"
    scaling = values[name]
    if not isinstance(scaling, dict | None):
        raise InputError(f"{where}: {name} is not an object.")
    scaling = dict(scaling or {})
    for key, inside in ((theta_name, "rope_theta"), (share_name, "partial_rotary_factor")):
        found = scaling.pop(inside, None)
        if found is not None and raw.get(key) is not None and raw[key] != found:
            raise InputError(f"{where}: {key} is {raw[key]!r:.60} and {name}.{inside} is {found!r:.60}; keep one.")
        if found is not None:
            theta, share = (found, share) if inside == "rope_theta" else (theta, found)
    if not is_positive(theta):
        raise InputError(f"{where}: {theta_name} (or {name}.rope_theta) must be a positive number, not {theta!r:.60}.")
    if share != 0 and not is_positive(share) or share > 1:
        raise InputError(f"{where}: {share_name} (or {name}.partial_rotary_factor) must be between 0 and 1, not "
                         f"{share!r:.60}.")
    if share != 1 and raw["model_type"] != "gpt_neox":
        raise InputError(f"{where}: partial_rotary_factor {share} is not implemented for {raw['model_type']}.")
    rotary_dims = int(head_dim * share)
    if rotary_dims % 2:
        raise InputError(f"{where}: {share_name} {share} of head_dim {head_dim} gives {rotary_dims} rotary dimensions; an even "
                         f"number is needed.")
    kind = scaling.pop("type", None)
    kind = scaling.pop("rope_type", kind) or "default"
    needed = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                                                               "original_max_position_embeddings")}
    if str(kind) not in needed:
        raise InputError(f"{where}: {name} of type {kind!r:.60} is not implemented (linear and llama3 are).")
    for key in needed[kind]:
        if not is_positive(scaling.get(key)):
            raise InputError(f"{where}: {name}.{key} must be a positive number.")
    unknown = [key for key, value in scaling.items() if key not in needed[kind] and value is not None]
    if unknown:
        raise InputError(f"{where}: {name} has {unknown[0]!r:.60}, which is not implemented for the type {kind!r}.")
    if kind == "llama3" and not scaling["high_freq_factor"] > scaling["low_freq_factor"]:
        raise InputError(f"{where}: {name}.high_freq_factor must be larger than low_freq_factor.")
    return float(theta), rotary_dims, None if kind == "default" else {"rope_type": kind, **scaling}


def parse_config(raw, where="config"):
    """The Config of a config.json's object. Each field is implemented, known harmless, or refused by name (InputError)."""
    model_type = raw.get("model_type")
    if str(model_type) not in FIELDS:
        raise InputError(f"{where}: model_type {model_type!r:.60} is not implemented ({', '.join(FIELDS)} are).")
    fields = FIELDS[model_type]
    values = {key: default if raw.get(key) is None and key != "sliding_window" else raw.get(key, default)
              for key, default in fields.items()}
    # transformers 4 writes GPT-NeoX's rotary fields under both of their names.
    repeated = {"partial_rotary_factor": values.get("rotary_pct", 1), "rope_theta": values.get("rotary_emb_base")}
    for key, value in raw.items():
        if key in DROPOUTS:
            if value:
                print(f"note: {where}: {key} is {value!r:.60}; Osprey applies no dropout.", file=sys.stderr)
        elif key not in fields and key not in HARMLESS and value not in (None, False, repeated.get(key)):
            raise InputError(f"{where}: the field {key!r:.60} (here {value!r:.60}) is not implemented for {model_type}.")

    def positive(key, kind=int):
        value = values[key]
        fits = isinstance(value, int) or kind is float and isinstance(value, float)
        if not fits or isinstance(value, bool) or not 0 < value < LARGEST:
            raise InputError(f"{where}: {key} must be a positive {'integer' if kind is int else 'number'} below {LARGEST:,}, "
                             f"not {value!r:.60}.")
        return kind(value)

    def flag(key):
        if not isinstance(values.get(key, False), bool):
            raise InputError(f"{where}: {key} must be true or false, not {values[key]!r:.60}.")
        return values.get(key, False)

    width, heads = positive("hidden_size"), positive("num_attention_heads")
    kv_heads = positive("num_key_value_heads") if values.get("num_key_value_heads") is not None else heads
    if heads % kv_heads:
        raise InputError(f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}.")
    if values.get("head_dim") is None and width % heads:
        raise InputError(f"{where}: hidden_size {width} is no multiple of num_attention_heads {heads}.")
    head_dim = positive("head_dim") if values.get("head_dim") is not None else width // heads
    if heads * head_dim >= LARGEST:
        raise InputError(f"{where}: num_attention_heads {heads} of head_dim {head_dim} are wider than {LARGEST:,}.")
    if str(values["hidden_act"]) not in ACTIVATIONS:
        raise InputError(f"{where}: hidden_act {values['hidden_act']!r:.60} is not implemented ({', '.join(ACTIVATIONS)} are).")
    theta, rotary_dims, scaling = read_rope(raw, values, head_dim, where)
    neox = model_type == "gpt_neox"
    scores = SCORERS[model_type] in str(raw.get("architectures"))
    names = raw.get("id2label")
    labels = raw.get("num_labels", len(names) if isinstance(names, dict) else 2)           # transformers' default is two
    if scores and labels != 1:
        raise InputError(f"{where}: a {SCORERS[model_type]} with {labels} labels; a reward model has one.")
    return Config(
        model_type=model_type, vocab_size=positive("vocab_size"), width=width, ffn=positive("intermediate_size"),
        layers=positive("num_hidden_layers"), heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        context=positive("max_position_embeddings"), activation=values["hidden_act"],
        norm_eps=positive("layer_norm_eps" if neox else "rms_norm_eps", float), attention_bias=flag("attention_bias"),
        mlp_bias=neox or flag("mlp_bias"), tied=flag("tie_word_embeddings") and not scores,
        parallel_residual=flag("use_parallel_residual"),
        sliding_window=positive("sliding_window") if values.get("sliding_window") is not None else None,
        rope_theta=theta, rotary_dims=rotary_dims, rope_scaling=scaling, source=raw, scores=scores)


def read_config(folder):
    """The Config of a model folder."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is not a folder.")
    path = Path(folder) / "config.json"
    return parse_config(read_json(path), str(path))


def scoring(config):
    """The Config of the same body under a head of one number: what transformers reads as sequence classification."""
    source = config.source | {"architectures": [SCORERS[config.model_type]], "id2label": {"0": "reward"},
                              "label2id": {"reward": 0}}
    return replace(config, tied=False, scores=True, source=source)


# ---------------------------------------------------------------------------------------------------------------------
# The transformer

class Linear(nn.Linear):
    """A linear layer that computes in the type of its input, so that float32 masters serve a bfloat16 forward.

    With adapters (LoRA, arXiv 2106.09685): W x + scale · B A x, where lora_a is A (rank, in) and lora_b is B (out, rank).
    """

    scale = 0.0                    # alpha / rank; 0: no adapters, or they are switched off

    def forward(self, x):
        y = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        if self.scale:
            inside = F.linear(x, self.lora_a.to(x.dtype)).view(-1, len(self.lora_a))
            y.view(-1, self.out_features).addmm_(inside, self.lora_b.to(x.dtype).T, alpha=self.scale)   # in place: no copy of y
        return y


class Norm(nn.Module):
    """RMSNorm (Llama), or LayerNorm with a bias (GPT-NeoX); computed in float32 at least."""

    def __init__(self, config):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(config.width))
        self.bias = nn.Parameter(torch.empty(config.width)) if config.is_neox else None

    def forward(self, x):
        if self.bias is not None:
            return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight.to(x.dtype)


def rope_frequencies(config):
    """(rotary_dims / 2,) radians a position, with the `linear` or `llama3` stretching of long-context checkpoints."""
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, config.rotary_dims, 2).float() / config.rotary_dims)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling["rope_type"] == "linear":
        return frequency / scaling["factor"]
    # llama3: slow waves are stretched by the factor, fast ones kept, those between blended by their wave count.
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    keep = ((waves - low) / (high - low)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / scaling["factor"]


def rotate(x, cos, sin):
    """Rotary position: x (B, H, T, E), cos and sin (B, 1, T, rotary_dims / 2); the rest of the head stays."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return torch.cat((torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin), rest), -1)


class Attention(nn.Module):
    """Projections and rotary positions; who sees whom is the business of `attend`, a ForestAttention or an open Cache's."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        width, out, bias = config.width, config.heads * config.head_dim, config.attention_bias
        if config.is_neox:
            self.qkv = Linear(width, 3 * out, bias)              # rows lie head by head: its q, its k, its v
        else:
            self.q = Linear(width, out, bias)
            self.k = Linear(width, config.kv_heads * config.head_dim, bias)
            self.v = Linear(width, config.kv_heads * config.head_dim, bias)
        self.o = Linear(out, width, bias)

    def forward(self, x, cos, sin, attend):
        B, T, _ = x.shape
        if self.config.is_neox:
            q, k, v = self.qkv(x).view(B, T, self.config.heads, 3, -1).unbind(3)
        else:
            q, k, v = (layer(x).view(B, T, -1, self.config.head_dim) for layer in (self.q, self.k, self.v))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))   # (B, H or G, T, E)
        y = attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """Llama's gated feed-forward layer, or GPT-NeoX's plain one."""

    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.up = Linear(config.width, config.ffn, config.mlp_bias)
        self.gate = None if config.is_neox else Linear(config.width, config.ffn, config.mlp_bias)
        self.down = Linear(config.ffn, config.width, config.mlp_bias)

    def forward(self, x):
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and MLP on the residual stream, one after the other or (GPT-NeoX) side by side: (B, T, D) -> (B, T, D)."""

    recompute = False              # keep only the block's input for the gradient and compute the rest again

    def __init__(self, config, layer):
        super().__init__()
        self.parallel = config.parallel_residual
        self.norm1, self.attention = Norm(config), Attention(config, layer)
        self.norm2, self.mlp = Norm(config), MLP(config)

    def forward(self, x, cos, sin, attend):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, x, cos, sin, attend, use_reentrant=False, preserve_rng_state=False)
        return self.compute(x, cos, sin, attend)

    def compute(self, x, cos, sin, attend):
        y = x + self.attention(self.norm1(x), cos, sin, attend)
        return y + self.mlp(self.norm2(x if self.parallel else y))


class Transformer(nn.Module):
    """Embedding, blocks, last norm; and the head, which the caller applies where a token is needed."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = Norm(config)
        self.head = Linear(config.width, 1 if config.scores else config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.compute_dtype = None              # the type of the activations; None: that of the weights

    def read(self, forest, cache=None):
        """Final hidden states (N, D) of a data.Forest. A cache keeps its keys and values; for one that grew out of a past,
        it is the cache that kept the past's."""
        past = None if forest.past is None else (forest.branch, forest.past.depth, forest.past.end)
        known = 0 if past is None else len(forest.past.tokens)
        tokens = forest.tokens[None].to(self.embed.weight.device)
        return self(tokens, forest.depth[None], forest.end[None] - known, cache, past)[0]

    def forward(self, tokens, depth=None, end=None, cache=None, past=None):
        """Final hidden states (B, T, D) of token ids (B, T).

        Without more, each row is a causal sequence. With `depth` and `end` (B, T), on the CPU, each row is a forest:
        depth is a token's position in its own sequence, end[j] the index in the row behind j's last descendant.
        With a `cache`: a first call records the prompts; after cache.open() a call takes one token a row (R, 1); with
        `past` (branch, the past's depth and end) the row goes on where the recorded forest is left (see data.grow).
        """
        B, T = tokens.shape
        if cache is not None and cache.is_open:
            attend, depth = cache.attend, (cache.length + cache.step)[:, None]
        else:
            if end is None:
                depth, end = torch.arange(T).expand(B, T), torch.full((B, T), T)
            # All rows become one line of B·T tokens, and the rows its trees: linear layers see no padding to speak of.
            end = (end + T * torch.arange(B)[:, None]).reshape(-1)
            depth = depth.reshape(1, -1)
            attend = ForestAttention(depth[0], end, self.config.sliding_window, tokens.device, cache, past)
            tokens = tokens.reshape(1, -1)
        x = F.embedding(tokens, self.embed.weight)
        x = x.to(self.compute_dtype or x.dtype)
        angle = depth.to(x.device).float()[:, None, :, None] * rope_frequencies(self.config).to(x.device)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin, attend)
        if cache is not None and cache.is_open:
            cache.step += 1
        return self.norm(x.view(B, T, -1))

    @torch.no_grad()
    def initialise(self, seed):
        """Fresh weights: normal, a linear layer's deviation 1/√(its inputs), the layers that write to the residual scaled by
        their number. (At width 128 the usual 0.02 leaves all attention uniform, and heads take very long to find a use.)"""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif name in ("embed.weight", "head.weight"):
                weight.normal_(0, 0.1, generator=generator)
            else:
                writes = name.endswith(("attention.o.weight", "mlp.down.weight"))
                depth = 2 * self.config.layers if writes else 1
                weight.normal_(0, 1 / math.sqrt(weight.shape[1] * depth), generator=generator)
        return self


# ---------------------------------------------------------------------------------------------------------------------
# Adapters (LoRA)

def adapted(net):
    """[(name, layer)] of the linear layers that adapters stand on: all of the blocks'."""
    return [(name, module) for name, module in net.named_modules() if name.startswith("blocks.") and isinstance(module, Linear)]


def add_adapters(net, rank, alpha, dtype):
    """Freeze a network that has no memory yet and put trainable adapters of `dtype` on its linear layers."""
    net.requires_grad_(False)
    for _, layer in adapted(net):
        layer.lora_a = nn.Parameter(layer.weight.new_empty(rank, layer.in_features, dtype=dtype))
        layer.lora_b = nn.Parameter(layer.weight.new_empty(layer.out_features, rank, dtype=dtype))
        layer.scale = alpha / rank


def fresh_adapters(net, seed):
    """Yield (name, whole tensor): A uniform in ±1/√in, as the reference implementation has it, B = 0, so that a fresh
    adapter adds exactly nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, layer in adapted(net):
        rank, bound = layer.lora_a.shape[0], 1 / math.sqrt(layer.in_features)
        yield f"{name}.lora_a", torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        yield f"{name}.lora_b", torch.zeros(layer.out_features, rank)


@contextlib.contextmanager
def without_adapters(net):
    """Inside, the network is the one that its adapters started from; nothing happens to one that has none."""
    layers = [(layer, layer.scale) for _, layer in adapted(net) if layer.scale] if net is not None else []
    for layer, _ in layers:
        layer.scale = 0.0
    try:
        yield net
    finally:
        for layer, scale in layers:
            layer.scale = scale


def merged(net, whole=lambda tensor: tensor):
    """Yield (name, tensor) of a network whose adapters are part of its weights: W + scale · B A, added in float32 at least.
    whole: makes a sharded parameter one tensor."""
    layers = dict(adapted(net))
    for name, weight in net.named_parameters():
        layer, kind = layers.get(name.rpartition(".")[0]), name.rpartition(".")[2]
        if kind.startswith("lora_"):
            continue
        weight = whole(weight.detach())
        if kind == "weight" and layer is not None and layer.scale:
            a, b = (whole(part.detach()) for part in (layer.lora_a, layer.lora_b))
            weight = (weight.to(a.dtype) + layer.scale * b @ a).to(weight.dtype)
        yield name, weight


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face folders

NAMES = {   # our module -> its name in the checkpoint; * is the layer
    "llama": {
        "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
        "blocks.*.norm1": "model.layers.*.input_layernorm", "blocks.*.norm2": "model.layers.*.post_attention_layernorm",
        **{f"blocks.*.attention.{x}": f"model.layers.*.self_attn.{x}_proj" for x in "qkvo"},
        **{f"blocks.*.mlp.{x}": f"model.layers.*.mlp.{x}_proj" for x in ("gate", "up", "down")},
    },
    "gpt_neox": {
        "embed": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "head": "embed_out",
        "blocks.*.norm1": "gpt_neox.layers.*.input_layernorm", "blocks.*.norm2": "gpt_neox.layers.*.post_attention_layernorm",
        "blocks.*.attention.qkv": "gpt_neox.layers.*.attention.query_key_value",
        "blocks.*.attention.o": "gpt_neox.layers.*.attention.dense",
        "blocks.*.mlp.up": "gpt_neox.layers.*.mlp.dense_h_to_4h", "blocks.*.mlp.down": "gpt_neox.layers.*.mlp.dense_4h_to_h",
    },
}
NAMES["mistral"] = NAMES["llama"]



def file_name(config, name):
    """The checkpoint's name of our parameter, e.g. blocks.3.mlp.up.weight."""
    module, kind = name.rsplit(".", 1)
    if module == "head" and config.scores:
        return f"score.{kind}"
    layer = re.search(r"\.(\d+)\.", module)
    if layer is None:
        return f"{NAMES[config.model_type][module]}.{kind}"
    pattern = NAMES[config.model_type][module.replace(layer[0], ".*.")]
    return f"{pattern.replace('*', layer[1])}.{kind}"


def match_weights(config, folder, expected):
    """({name in the folder: our name} of the parameters in `expected` {our name: shape}, weight_files of the folder) from the
    headers alone; InputError where a tensor is missing, misshapen, of another type, or nobody's."""
    files = weight_files(folder)
    ours = {file_name(config, name): name for name in expected}
    head = file_name(config, "head.weight")
    # Published Pythia files call the head embed_out, transformers 5 calls it lm_head.
    if config.is_neox and not config.scores and "lm_head.weight" in files:
        ours, head = {"lm_head.weight" if n == head else n: ours[n] for n in ours}, "lm_head.weight"
    for name, (path, dtype, shape) in files.items():
        if name in ours:
            if shape != tuple(expected[ours[name]]):
                raise InputError(f"{path}: {name!r} has shape {str(list(shape)):.80}; config.json asks for "
                                 f"{list(expected[ours[name]])}.")
            if dtype not in DTYPES:
                raise InputError(f"{path}: {name!r} is stored as {dtype!r:.20}; float32, float16 and bfloat16 can be read.")
        elif not BUFFERS.fullmatch(name) and name != head:          # a tied head's copy, or one that nobody asked for
            raise InputError(f"{path}: unexpected tensor {name!r:.200}; the architecture in config.json has none of this name.")
    missing = [name for name in ours if name not in files]
    if missing:
        index = Path(folder) / "model.safetensors.index.json"
        raise InputError(f"{index if index.exists() else index.with_name('model.safetensors')}: the tensor {missing[0]!r} that "
                         f"config.json asks for is missing" +
                         (f" (and {len(missing) - 1} more)." if len(missing) > 1 else "."))
    return ours, files


def read_weights(config, folder, expected, rows=lambda name: slice(None)):
    """Yield (our name, tensor) for the parameters in `expected` {our name: shape}, one at a time, from a checked folder.
    rows(name): the rows to read of its first dimension."""
    ours, files = match_weights(config, folder, expected)
    for path in dict.fromkeys(files[name][0] for name in ours):
        with open_weights(path) as file:
            for name in (n for n in ours if files[n][0] == path):
                yield ours[name], file.get_slice(name)[rows(ours[name])]
    # Some files repeat the tied head; a different one would be ignored in silence.
    copies = [name for name in ("lm_head.weight", "embed_out.weight") if config.tied and name in files and name not in ours]
    for tied_copy in copies:
        embedding = file_name(config, "embed.weight")
        with open_weights(files[tied_copy][0]) as head, open_weights(files[embedding][0]) as embed:
            if not torch.equal(head.get_tensor(tied_copy), embed.get_tensor(embedding)):
                raise InputError(f"{files[tied_copy][0]}: {tied_copy!r} differs from the embedding, but config.json ties them.")


def blank(folder, dtype=torch.float32, scores=False):
    """The network of a folder without its weights and without memory for them; see load for `scores`."""
    config, held = read_config(folder), len(weight_files(folder))
    if config.scores and not scores:
        raise InputError(f"{folder} is a reward model ({SCORERS[config.model_type]}); a language model is needed here.")
    if config.layers > held:         # a network of layers that nobody has would take minutes to make
        raise InputError(f"{Path(folder) / 'config.json'}: num_hidden_layers is {config.layers:,}, but the folder holds "
                         f"{held:,} tensors in all.")
    with torch.device("meta"):
        return Transformer(scoring(config) if scores else config).to(dtype)


def load(folder, dtype=torch.float32, device="cpu", prepare=None, scores=False):
    """The transformer of a Hugging Face folder, its weights in `dtype` on `device`.

    Tensors are read one at a time into a network without memory, so the peak is one copy of the weights and one tensor.
    prepare(net) may shard that network or give it adapters; each rank then reads only the rows that it keeps.
    scores: the head is to give one number a token; on a language model's body it is new, and all zero.
    Raises InputError for anything missing, unexpected, misshapen or not implemented; pickles are refused.
    """
    net, held = blank(folder, dtype, scores), read_config(folder)
    if prepare is not None:
        prepare(net)
    weights = {name: weight for name, weight in net.named_parameters() if "lora_" not in name}
    new_head = scores and not held.scores
    read = {name: weight.shape for name, weight in weights.items() if not (new_head and name == "head.weight")}
    tensors = read_weights(held, folder, read, lambda name: own_rows(weights[name]))
    if new_head:
        tensors = itertools.chain(tensors, [("head.weight", torch.zeros(1, held.width)[own_rows(net.head.weight)])])
    return fill(net, ((name, tensor.to(device=device, dtype=dtype)) for name, tensor in tensors))


def own_rows(weight):
    """The rows of a parameter that this rank keeps: all of them, or its piece where the parameter is sharded (FSDP2 cuts the
    first dimension into pieces of one size; the last ones may be shorter or empty)."""
    if not isinstance(weight, DTensor):
        return slice(None)
    mesh, n = weight.device_mesh, weight.shape[0]
    piece, rank = -(-n // mesh.size(mesh.ndim - 1)), mesh.get_local_rank(mesh.ndim - 1)
    return slice(min(rank * piece, n), min((rank + 1) * piece, n))


def fill(net, weights):
    """Give a network without memory its weights: (our name, the rows that this rank keeps) one by one."""
    for name, tensor in weights:
        module, kind = name.rsplit(".", 1)
        place = net.get_submodule(module)
        empty = getattr(place, kind)
        if isinstance(empty, DTensor):
            tensor = DTensor.from_local(tensor, empty.device_mesh, empty.placements, run_check=False, shape=empty.shape,
                                        stride=empty.stride())
        setattr(place, kind, nn.Parameter(tensor, requires_grad=empty.requires_grad))
    if net.config.tied:
        net.head.weight = net.embed.weight
    return net


@torch.no_grad()
def cast(net, dtype):
    """A network with the same weights in `dtype`, adapters merged, to sample from: else all would be cast again for every
    token. The network itself where they are in `dtype` already."""
    if net.embed.weight.dtype == dtype:
        return net
    with torch.device("meta"):
        copy = Transformer(net.config)
    return fill(copy, [(name, weight.to(dtype)) for name, weight in merged(net)])


def save(net, folder):
    """Write config.json and safetensors (several files and an index above 5 GB) as transformers reads them."""
    save_weights(net.config, merged(net), folder)      # a tied head is listed once, as the embedding


def save_weights(config, weights, folder):
    """The same from (our name, whole tensor) one by one: no more than one file's tensors stand in memory."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("model-*-of-*.safetensors"), folder / "model.safetensors", folder / "model.safetensors.index.json"):
        old.unlink(missing_ok=True)                    # an earlier save's, of which a part might be read instead
    shard, size, total, weight_map, dtype = {}, 0, 0, {}, None

    def write():
        number = len(set(weight_map.values())) + 1
        save_file(shard, folder / f".part-{number}", metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, number))
        shard.clear()

    for name, weight in weights:
        if size and size + weight.nbytes > SHARD_BYTES:
            write()
            size = 0
        shard[file_name(config, name)] = weight.detach().cpu().contiguous()
        size, total, dtype = size + weight.nbytes, total + weight.nbytes, weight.dtype
    write()
    files = max(weight_map.values())                   # known only now, and part of the names
    names = {n: f"model-{n:05d}-of-{files:05d}.safetensors" if files > 1 else "model.safetensors" for n in range(1, files + 1)}
    for number, name in names.items():
        os.replace(folder / f".part-{number}", folder / name)
    if files > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {name: names[number] for name, number in weight_map.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    source = {k: v for k, v in config.source.items() if k != "dtype"} | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")


def save_adapters(net, weights, base, folder):
    """The adapters alone in the layout of PEFT, from (our name, whole tensor) of lora_a and lora_b: adapter_config.json and
    adapter_model.safetensors. base: the folder of the model that they stand on."""
    folder, config, layers = Path(folder), net.config, adapted(net)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, weight in weights:
        module, kind = name.rsplit(".", 1)
        inside = file_name(config, f"{module}.weight").removesuffix(".weight")
        tensors[f"base_model.model.{inside}.lora_{kind[-1].upper()}.weight"] = weight.detach().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    rank = layers[0][1].lora_a.shape[0]
    targets = sorted({file_name(config, f"{name}.weight").split(".")[-2] for name, _ in layers})
    described = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base), r=rank,
                     bias="none", lora_alpha=layers[0][1].scale * rank, lora_dropout=0.0, target_modules=targets, inference_mode=True)
    (folder / "adapter_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
