"""One transformer for Llama, Mistral, Qwen (2, 2.5, 3) and GPT-NeoX (Pythia), read from Hugging Face folders.

    net = load("folder")               config.json and safetensors
    hidden = net(tokens)               (B, T) -> (B, T, D): each row a causal sequence
    hidden = net.hidden(forest)        (N, D): sequences that share prefixes, see forest.py
    logits = net.head(hidden)          (..., V): the widest layer; call it only where a token is needed
    save(net, "folder")                what transformers loads

Letters: B rows, T tokens, N tokens of a forest, D width, H query heads, G key/value heads, E head width,
V vocabulary, R rows in sampling.
"""
import contextlib
import itertools
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from forest import ForestAttention, rows
from support import hf
from support.cli import InputError, write_json
from support.families import ACTIVATIONS, FAMILIES, parse_config, read_config, with_reward_head  # noqa: F401

# -----------------------------------------------------------------------------------------------------------
# The transformer

class Linear(nn.Linear):
    """A linear layer that computes in its input's type, so that float32 masters serve a bfloat16 forward.

    With adapters (LoRA, arXiv 2106.09685): W x + scale · B A x; A is lora_a (rank, in), B lora_b (out, rank).
    """

    scale = 0.0                    # alpha / rank; 0: no adapters, or they are switched off

    def forward(self, x):
        y = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        if self.scale:
            inside = F.linear(x, self.lora_a.to(x.dtype)).view(-1, len(self.lora_a))
            # In place: no copy of y.
            y.view(-1, self.out_features).addmm_(inside, self.lora_b.to(x.dtype).T, alpha=self.scale)
        return y


class Norm(nn.Module):
    """RMSNorm (Llama), or LayerNorm with a bias (GPT-NeoX); computed in float32 at least."""

    def __init__(self, config, width=None):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(width or config.width))
        self.bias = nn.Parameter(torch.empty(width or config.width)) if config.is_neox else None

    def forward(self, x):
        if self.bias is not None:
            return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight.to(x.dtype)


def rope_frequencies(config):
    """(rotary_dims / 2,) radians per position, with the stretching of long-context checkpoints."""
    dims, scaling = config.rotary_dims, config.rope_scaling
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, dims, 2).float() / dims)
    if scaling is None:
        return frequency
    if scaling["rope_type"] == "linear":
        return frequency / scaling["factor"]
    # llama3: slow waves are stretched by the factor, fast ones kept, those between blended by wave count.
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    keep = ((waves - low) / (high - low)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / scaling["factor"]


def rotate(x, cos, sin):
    """Rotary position: x (B, H, T, E), cos and sin (B, 1, T, rotary_dims / 2); the rest of the head stays."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat((*turned, rest), -1)


class Attention(nn.Module):
    """Projections and rotary positions. `attend`, a ForestAttention or Cache.attend, knows who sees whom."""

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
        self.o = Linear(out, width, config.output_bias)
        if config.qk_norm:                                       # Qwen 3
            self.q_norm, self.k_norm = (Norm(config, config.head_dim) for _ in "qk")

    def forward(self, x, cos, sin, attend):
        """(B, T, D) -> (B, T, D); attend: q (B, H, T, E), k and v (B, G, T, E) -> (B, H, T, E)."""
        B, T, _ = x.shape
        if self.config.is_neox:
            q, k, v = self.qkv(x).view(B, T, self.config.heads, 3, -1).unbind(3)
        else:
            q, k, v = (layer(x).view(B, T, -1, self.config.head_dim) for layer in (self.q, self.k, self.v))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
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
    """Attention and MLP on the residual stream (B, T, D), one after the other or (GPT-NeoX) side by side."""

    recompute = False              # keep only the block's input for the gradient and compute the rest again

    def __init__(self, config, layer):
        super().__init__()
        self.parallel = config.parallel_residual
        self.norm1, self.attention = Norm(config), Attention(config, layer)
        self.norm2, self.mlp = Norm(config), MLP(config)

    def forward(self, x, cos, sin, attend):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, x, cos, sin, attend, use_reentrant=False,
                              preserve_rng_state=False)
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
        self.head = Linear(config.width, 1 if config.reward_head else config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.compute_dtype = None              # the type of the activations; None: that of the weights

    def hidden(self, forest, cache=None):
        """Final hidden states (N, D) of a Forest. A cache records its keys and values or has its past's."""
        device = self.embed.weight.device
        attend = ForestAttention(forest, self.config.sliding_window, device, cache)
        return self(forest.tokens[None].to(device), forest.depth[None], attend)[0]

    def forward(self, tokens, depth=None, attend=None, cache=None):
        """Final hidden states (B, T, D) of token ids (B, T), each row a causal sequence.

        cache: an open one; tokens (R, 1) are then each row's newest. depth, attend: for hidden().
        """
        B, T = tokens.shape
        if cache is not None:
            depth, attend = (cache.length + cache.step)[:, None], cache.attend
        elif attend is None:
            forest = rows(tokens)
            tokens, depth = forest.tokens[None], forest.depth[None]
            attend = ForestAttention(forest, self.config.sliding_window, tokens.device)
        x = F.embedding(tokens, self.embed.weight)
        x = x.to(self.compute_dtype or x.dtype)
        angle = depth.to(x.device).float()[:, None, :, None] * rope_frequencies(self.config).to(x.device)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin, attend)
        if cache is not None:
            cache.step += 1
        return self.norm(x.view(B, T, -1))

    @torch.no_grad()
    def initialise(self, seed):
        """Fresh weights: normal, of deviation 1/√inputs, smaller for layers that write to the residual.

        At width 128 the usual 0.02 leaves all attention uniform, and heads take very long to find a use.
        """
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


# -----------------------------------------------------------------------------------------------------------
# Adapters (LoRA)

def adapted(net):
    """[(name, layer)] of the linear layers that adapters stand on: all of the blocks'."""
    modules = net.blocks.named_modules(prefix="blocks")
    return [(name, layer) for name, layer in modules if isinstance(layer, Linear)]


def add_adapters(net, rank, alpha, dtype):
    """Freeze a network that has no memory yet and put trainable adapters of `dtype` on its linear layers."""
    net.requires_grad_(False)
    for _, layer in adapted(net):
        layer.lora_a = nn.Parameter(layer.weight.new_empty(rank, layer.in_features, dtype=dtype))
        layer.lora_b = nn.Parameter(layer.weight.new_empty(layer.out_features, rank, dtype=dtype))
        layer.scale = alpha / rank


def fresh_adapters(net, seed):
    """Yield (name, whole tensor): A uniform in ±1/√in, as in the paper's code, B = 0: they add nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, layer in adapted(net):
        rank, bound = layer.lora_a.shape[0], 1 / math.sqrt(layer.in_features)
        a = torch.empty(rank, layer.in_features)
        yield f"{name}.lora_a", a.uniform_(-bound, bound, generator=generator)
        yield f"{name}.lora_b", torch.zeros(layer.out_features, rank)


@contextlib.contextmanager
def without_adapters(net):
    """Inside, the network is the one that its adapters started from; one without, or None, stays as it is."""
    layers = [(layer, layer.scale) for _, layer in adapted(net) if layer.scale] if net is not None else []
    for layer, _ in layers:
        layer.scale = 0.0
    try:
        yield net
    finally:
        for layer, scale in layers:
            layer.scale = scale


def merged(net, whole=lambda tensor: tensor):
    """Yield (name, tensor), the adapters inside: W + scale · B A, in their type. whole(parameter) gathers a
    sharded one."""
    layers = dict(adapted(net))
    for name, weight in net.named_parameters():
        layer, kind = layers.get(name.rpartition(".")[0]), name.rpartition(".")[2]
        if kind.startswith("lora_"):
            continue
        weight = whole(weight.detach())
        if kind == "weight" and layer is not None and layer.scale:
            a, b = (whole(part.detach()) for part in (layer.lora_a, layer.lora_b))
            weight = weight.to(a.dtype) + layer.scale * b @ a
        yield name, weight


# -----------------------------------------------------------------------------------------------------------
# Folders

HEADS = "lm_head.weight", "embed_out.weight"


def file_name(config, name):
    """The checkpoint's name of our parameter, e.g. blocks.3.mlp.up.weight."""
    module, kind = name.rsplit(".", 1)
    if module == "head" and config.reward_head:
        return f"score.{kind}"
    layer = re.search(r"\.(\d+)\.", module)
    theirs = FAMILIES[config.model_type].modules[module.replace(layer[0], ".*.") if layer else module]
    return f"{theirs.replace('*', layer[1]) if layer else theirs}.{kind}"


def empty_network(folder, dtype=torch.float32, reward_head=False):
    """The network of a folder, its weights not read yet and without memory; see load for `reward_head`."""
    config = read_config(folder)
    if config.reward_head and not reward_head:
        raise InputError(f"{folder} is a reward model; a language model is needed here.")
    with torch.device("meta"):
        return Transformer(with_reward_head(config) if reward_head else config).to(dtype)


def match(config, shapes, folder):
    """({checkpoint's name: our name}, {checkpoint's name: its hf.tensors_in}) for `shapes` {our name: shape}.

    InputError where the folder's headers are not what config.json asks for.
    """
    tensors = hf.tensors_in(folder)
    names = {file_name(config, name): name for name in shapes}
    if "embed_out.weight" in names and "embed_out.weight" not in tensors:      # saved by transformers 5
        names["lm_head.weight"] = names.pop("embed_out.weight")
    # A tied head's copy may stand there too, and the head of a language model that becomes a reward model.
    hf.check(tensors, {name: shapes[ours] for name, ours in names.items()}, HEADS, folder)
    return names, {name: tensors[name] for name in names}


def checked_network(folder):
    """empty_network in float32, after `match` has compared the headers of its weights."""
    net = empty_network(folder)
    match(net.config, {name: weight.shape for name, weight in net.named_parameters()}, folder)
    return net


def load(folder, dtype=torch.float32, device="cpu", prepare=None, reward_head=False):
    """The transformer of a Hugging Face folder, its weights in `dtype` on `device`.

    Tensors are read one at a time: the peak is one copy of the weights and one tensor. prepare(net) may shard
    the network before it has memory, or give it adapters; each rank then reads only the rows that it keeps.
    reward_head: the head gives one number per token; a language model's is replaced by a new one, all zero.
    Raises InputError for anything missing, unexpected, misshapen or not implemented; pickles are refused.
    """
    net, held = empty_network(folder, dtype, reward_head), read_config(folder)
    if prepare is not None:
        prepare(net)
    weights = {name: weight for name, weight in net.named_parameters() if "lora_" not in name}
    new_head = reward_head and not held.reward_head
    names, tensors = match(held, {name: weight.shape for name, weight in weights.items()
                                  if not (new_head and name == "head.weight")}, folder)
    read = hf.read_tensors(tensors, lambda name: own_rows(weights[names[name]]))
    read = ((names[name], tensor) for name, tensor in read)
    if new_head:
        read = itertools.chain(read, [("head.weight", torch.zeros(1, held.width)[own_rows(net.head.weight)])])
    return fill(net, ((name, tensor.to(device=device, dtype=dtype)) for name, tensor in read))


def own_rows(weight):
    """The rows of a parameter that this rank keeps. FSDP2 cuts equal pieces, the last shorter or empty."""
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
            tensor = DTensor.from_local(tensor, empty.device_mesh, empty.placements, run_check=False,
                                        shape=empty.shape, stride=empty.stride())
        setattr(place, kind, nn.Parameter(tensor, requires_grad=empty.requires_grad))
    if net.config.tied:
        net.head.weight = net.embed.weight
    return net


@torch.no_grad()
def in_compute_dtype(net, dtype):
    """The network with its weights in `dtype`, adapters merged: sampling then casts nothing per token."""
    if net.embed.weight.dtype == dtype:
        return net
    with torch.device("meta"):
        copy = Transformer(net.config)
    return fill(copy, [(name, weight.to(dtype)) for name, weight in merged(net)])


def save(net, folder):
    """Write config.json and safetensors, above 5 GB several files and an index, as transformers has them."""
    save_weights(net.config, merged(net), folder)      # a tied head is listed once, as the embedding


def save_weights(config, weights, folder, rounding=iter):
    """The same from (our name, whole tensor) one by one: memory holds no more than one file's tensors.

    rounding: an hf.Rounding, which gives them the types of the folder where training began.
    """
    named = ((file_name(config, name), weight) for name, weight in weights)
    dtype = hf.write_weights(rounding(named), Path(folder))
    source = {key: value for key, value in config.source.items() if key != "dtype"}
    write_json(Path(folder) / "config.json", source | {"torch_dtype": str(dtype).removeprefix("torch.")})


def save_adapters(net, weights, base, folder):
    """Write (our name, whole tensor) of the adapters on the model in the folder `base` as PEFT reads them."""
    layer = adapted(net)[0][1]
    rank = len(layer.lora_a)
    named = ((*file_name(net.config, name).rsplit(".lora_"), weight) for name, weight in weights)
    hf.write_adapters(named, Path(folder), rank, layer.scale * rank, base)
