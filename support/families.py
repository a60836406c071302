"""config.json: what each family of models calls its fields and tensors, read into one vocabulary.

A family that computes as Llama does is a row of FAMILIES. Each field of a file is implemented, known to be
without effect, or refused by name because it changes the mathematics; what is left is named on stderr.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import torch.nn.functional as F

from support.cli import InputError, note, read_json

ACTIVATIONS = {
    "silu": F.silu, "swish": F.silu, "relu": F.relu, "gelu": F.gelu,
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), lambda x: F.gelu(x, approximate="tanh")),
}


@dataclass(frozen=True)
class Config:
    """What the forward pass needs to know, in the same words for all families."""
    model_type: str
    source: dict                       # config.json as read
    vocab_size: int
    width: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int                       # positions that the model was trained for
    activation: str
    norm_eps: float
    tied: bool                         # the head is the embedding
    rope_theta: float
    rotary_dims: int                   # how many of the head's dimensions turn
    rope_scaling: dict | None          # {"rope_type": "linear" | "llama3", …}
    attention_bias: bool = False       # of q, k and v
    output_bias: bool = False          # of the attention's last layer
    mlp_bias: bool = False
    qk_norm: bool = False              # RMSNorm on each head of q and k, before they turn
    parallel_residual: bool = False    # attention and MLP read the same input
    sliding_window: int | None = None  # a token sees the last `sliding_window` positions, itself included
    reward_head: bool = False          # the head gives one number per token instead of logits

    @property
    def is_neox(self):
        return FAMILIES[self.model_type].is_neox


@dataclass(frozen=True)
class Family:
    """A model_type of config.json."""
    scorer: str                        # the architecture with a head of one number, for reward models
    fields: dict                       # our field -> (its name in config.json, what its absence means);
                                       # the name is None where the family always has this value
    modules: dict                      # our module -> its name in the checkpoint; * is the layer
    is_neox: bool = False              # q, k, v in one matrix; LayerNorm; no gate in the MLP


FIELDS = {     # None: it must be there, or follows from others
    "vocab_size": ("vocab_size", None), "width": ("hidden_size", None), "ffn": ("intermediate_size", None),
    "layers": ("num_hidden_layers", None), "heads": ("num_attention_heads", None),
    "context": ("max_position_embeddings", 2048), "tied": ("tie_word_embeddings", False),
}
LLAMA_FIELDS = FIELDS | {
    "kv_heads": ("num_key_value_heads", None), "head_dim": ("head_dim", None),
    "activation": ("hidden_act", "silu"), "norm_eps": ("rms_norm_eps", 1e-6),
    "rope_theta": ("rope_theta", 1e4),
}
QWEN_FIELDS = LLAMA_FIELDS | {
    "kv_heads": ("num_key_value_heads", 32), "context": ("max_position_embeddings", 32768),
    "sliding_window": ("sliding_window", 4096), "use_window": ("use_sliding_window", False),
    "window_from": ("max_window_layers", 28),
}
LLAMA_MODULES = {
    "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
    "blocks.*.norm1": "model.layers.*.input_layernorm",
    "blocks.*.norm2": "model.layers.*.post_attention_layernorm",
    **{f"blocks.*.attention.{x}": f"model.layers.*.self_attn.{x}_proj" for x in "qkvo"},
    **{f"blocks.*.mlp.{x}": f"model.layers.*.mlp.{x}_proj" for x in ("gate", "up", "down")},
}
FAMILIES = {
    "llama": Family("LlamaForSequenceClassification", LLAMA_FIELDS | {
        "attention_bias": ("attention_bias", False), "mlp_bias": ("mlp_bias", False)}, LLAMA_MODULES),
    "mistral": Family("MistralForSequenceClassification", LLAMA_FIELDS | {
        "kv_heads": ("num_key_value_heads", 8), "context": ("max_position_embeddings", 131072),
        "sliding_window": ("sliding_window", 4096)}, LLAMA_MODULES),
    "qwen2": Family("Qwen2ForSequenceClassification", QWEN_FIELDS | {
        "attention_bias": (None, True), "output_bias": (None, False)}, LLAMA_MODULES),
    "qwen3": Family("Qwen3ForSequenceClassification", QWEN_FIELDS | {
        "head_dim": ("head_dim", 128), "attention_bias": ("attention_bias", False), "qk_norm": (None, True)},
        LLAMA_MODULES | {f"blocks.*.attention.{x}_norm": f"model.layers.*.self_attn.{x}_norm" for x in "qk"}),
    "gpt_neox": Family("GPTNeoXForSequenceClassification", FIELDS | {
        "activation": ("hidden_act", "gelu"), "norm_eps": ("layer_norm_eps", 1e-5),
        "rope_theta": ("rotary_emb_base", 1e4), "rotary_share": ("rotary_pct", 0.25),
        "attention_bias": ("attention_bias", True), "parallel_residual": ("use_parallel_residual", True)}, {
        "embed": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "head": "embed_out",
        "blocks.*.norm1": "gpt_neox.layers.*.input_layernorm",
        "blocks.*.norm2": "gpt_neox.layers.*.post_attention_layernorm",
        "blocks.*.attention.qkv": "gpt_neox.layers.*.attention.query_key_value",
        "blocks.*.attention.o": "gpt_neox.layers.*.attention.dense",
        "blocks.*.mlp.up": "gpt_neox.layers.*.mlp.dense_h_to_4h",
        "blocks.*.mlp.down": "gpt_neox.layers.*.mlp.dense_4h_to_h"}, is_neox=True),
}
# Fields without effect on what is computed (pretraining_tp only splits a product in slices), and read_rope's.
HARMLESS = set("""
    model_type architectures dtype torch_dtype transformers_version _name_or_path bos_token_id eos_token_id
    pad_token_id unk_token_id initializer_range use_cache pretraining_tp classifier_dropout return_dict
    output_hidden_states output_attentions id2label label2id reward_shift problem_type chunk_size_feed_forward
    is_decoder tokenizer_class num_labels task_specific_params _attn_implementation_autoset
    attn_implementation gradient_checkpointing rope_scaling rope_parameters layer_types max_window_layers
    is_llama_config max_sequence_length unsloth_fixed unsloth_version custom_pipelines
    transformers.js_config""".split())
# What relatives of Llama in transformers compute otherwise: refused, unless false, empty or NEUTRAL.
CHANGING = set("""
    quantization_config rope_interleaved rope_interleave rope_dim rotary_dim partial_rotary_factor
    no_rope_layers no_rope_layer_interval use_sliding_window sliding_window_pattern attention_chunk_size
    cross_attention_layers use_bidirectional_attention position_embedding_type alibi use_logn_attn
    use_dynamic_ntk attn_temperature_tuning attention_multiplier query_pre_attn_scalar attn_logit_softcapping
    final_logit_softcapping logit_scale logits_scaling residual_multiplier embedding_multiplier key_multiplier
    lm_head_multiplier mlp_multipliers scale_emb scale_depth dim_model_base mup_width_scale
    qk_layernorm qk_norm use_qk_norm clip_qkv qkv_bias use_qkv_bias use_bias bias add_bias_linear
    num_experts num_local_experts n_routed_experts moe_num_experts num_experts_per_tok moe_intermediate_size
    mlp_only_layers kv_lora_rank q_lora_rank use_post_norm use_sandwich_norm""".split())
NEUTRAL = dict.fromkeys(("logit_scale", "logits_scaling", "residual_multiplier", "embedding_multiplier"), 1)
DROPOUTS = set("attention_dropout hidden_dropout residual_dropout resid_pdrop embd_pdrop attn_pdrop".split())
ROPE_TYPES = {"default": (), "linear": ("factor",), "llama3": (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
LARGEST = 2 ** 28          # no size is larger: the bytes of a matrix of two of them can be counted in 64 bits

# What a field may be, and in words.
SIZE = (lambda value: type(value) is int and 0 < value <= LARGEST, f"a positive integer up to {LARGEST:,}")
FEW = (lambda value: type(value) is int and 0 < value <= 1024, "a positive integer up to 1,024")
COUNT = (lambda value: type(value) is int and 0 <= value <= LARGEST, "a whole number from 0")
MAYBE = (lambda value: value is None or SIZE[0](value), SIZE[1])
NUMBER = (lambda value: type(value) in (int, float) and 0 < value < 1e30, "a positive number")
SHARE = (lambda value: type(value) in (int, float) and 0 <= value <= 1, "a number between 0 and 1")
FLAG = (lambda value: isinstance(value, bool), "true or false")
NAME = (lambda value: str(value) in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
KINDS = {      # all others: SIZE
    "layers": FEW, "kv_heads": MAYBE, "head_dim": MAYBE, "sliding_window": MAYBE, "window_from": COUNT,
    "activation": NAME, "norm_eps": NUMBER, "rope_theta": NUMBER, "rotary_share": SHARE,
    **dict.fromkeys(("tied", "attention_bias", "output_bias", "mlp_bias", "qk_norm", "use_window",
                     "parallel_residual"), FLAG),
}


def checked(value, kind):
    """The value if it is of its kind; else a ValueError that says what is needed."""
    valid, words = kind
    if not valid(value):
        raise ValueError(f"{words} is needed")
    return float(value) if kind is NUMBER else value


def read_rope(raw):
    """(theta, share of a head that turns, scaling) from rope_scaling or rope_parameters (transformers 5).

    None for what they do not say: the first two may be fields of their own.
    """
    said = {}
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(name), dict | None):
            raise ValueError("an object is needed")
        said |= raw.get(name) or {}
    theta, share = said.pop("rope_theta", None), said.pop("partial_rotary_factor", None)
    kind = said.pop("type", None)
    kind = said.pop("rope_type", kind) or "default"
    if str(kind) not in ROPE_TYPES:
        raise ValueError(f"of its types {', '.join(ROPE_TYPES)} are implemented")
    unknown = [key for key, value in said.items() if key not in ROPE_TYPES[kind] and value is not None]
    if unknown:
        raise ValueError(f"{unknown[0]!r:.60} is not implemented for the type {kind}")
    scaling = {key: checked(said.get(key), NUMBER) for key in ROPE_TYPES[kind]}
    if kind == "llama3" and not scaling["high_freq_factor"] > scaling["low_freq_factor"]:
        raise ValueError("high_freq_factor must be larger than low_freq_factor")
    return theta, share, {"rope_type": kind, **scaling} if scaling else None


def read_fields(raw, family, where):
    """({our field: value}, rope_scaling) of a config.json's object, each field checked alone."""
    field = "rope_scaling" if raw.get("rope_parameters") is None else "rope_parameters"
    value, values = raw.get(field), {"rotary_share": 1.0}
    try:
        theta, share, scaling = read_rope(raw)
        inside = {"rope_theta": theta, "rotary_share": share}
        for ours, (field, default) in family.fields.items():
            value = raw.get(field, default) if inside.get(ours) is None else inside[ours]
            values[ours] = checked(value, KINDS.get(ours, SIZE))
        # transformers 4 writes GPT-NeoX's rotary fields under both of their names.
        same = {"rope_theta": values["rope_theta"], "partial_rotary_factor": values["rotary_share"]}
        known, changing = names_of(family), CHANGING.union(*map(names_of, FAMILIES.values()))
        other = {field: value for field, value in (*raw.items(), ("partial_rotary_factor", share))
                 if value and field not in known and value != (NEUTRAL | same).get(field)}
        for field, value in other.items():      # noqa: B007 (both are told below)
            if field in changing:
                raise ValueError(f"this field is not implemented for {raw['model_type']}")
    except ValueError as error:
        raise InputError(f"{where}: {field!r:.60} is {value!r:.60}; {error}.") from None
    if other:
        note(f"{where}: {', '.join(map(repr, other)):.300} not known here, taken as without effect.")
    return values, scaling


def names_of(family):
    """The fields of a config.json that are read for this family, or are without effect for all."""
    return HARMLESS | DROPOUTS | {name for name, _ in family.fields.values()}


def read_window(raw, values, where):
    """How many positions a token sees, in all layers; None for all positions."""
    has_switch = "use_window" in values          # Qwen: whether, and from which layer on, the window counts
    used, first = values.pop("use_window", True), values.pop("window_from", 0)
    window = values.get("sliding_window") if used and first < values["layers"] else None
    if window and first:
        raise InputError(f"{where}: 'max_window_layers' is {first}; a sliding_window in the layers after "
                         "these alone is not implemented.")
    kinds, kind = raw.get("layer_types"), "sliding_attention" if window and has_switch else "full_attention"
    if kinds and (not isinstance(kinds, list) or any(other != kind for other in kinds)):
        raise InputError(f"{where}: 'layer_types' is {kinds!r:.60}; only {kind!r} in all layers is "
                         "implemented here.")
    return window


def parse_config(raw, where="config"):
    """The Config of a config.json's object; InputError names the file and the field that cannot be used."""
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        raise InputError(f"{where}: model_type {raw.get('model_type')!r:.60} is not implemented "
                         f"({', '.join(FAMILIES)} are).")
    values, scaling = read_fields(raw, family, where)
    width, heads, share = values["width"], values["heads"], values.pop("rotary_share")
    values["kv_heads"] = values.get("kv_heads") or heads
    head_dim = values.get("head_dim") or width // heads
    divided = values.get("head_dim") or width % heads == 0
    if heads % values["kv_heads"] or heads * head_dim > LARGEST or not divided:
        raise InputError(f"{where}: num_attention_heads {heads}, num_key_value_heads {values['kv_heads']}, "
                         f"hidden_size {width} and head_dim {head_dim} do not fit together.")
    values |= {"head_dim": head_dim, "rotary_dims": int(head_dim * share)}
    if values["rotary_dims"] % 2:
        raise InputError(f"{where}: head_dim {head_dim} with a rotary_pct of {share} gives "
                         f"{values['rotary_dims']} rotary dimensions; an even number is needed.")
    for field in sorted(DROPOUTS & raw.keys()):
        if raw[field]:
            note(f"{where}: {field} is {raw[field]!r:.60}; it is not applied.")
    reward_head, names = family.scorer in str(raw.get("architectures")), raw.get("id2label")
    labels = raw.get("num_labels", len(names) if isinstance(names, dict) else 2)      # as transformers
    if reward_head and labels != 1:
        raise InputError(f"{where}: a {family.scorer} with {labels!r:.60} labels; a reward model has one.")
    values |= {"tied": values["tied"] and not reward_head, "mlp_bias": values.get("mlp_bias", family.is_neox),
               "output_bias": values.get("output_bias", values.get("attention_bias", False)),
               "sliding_window": read_window(raw, values, where)}
    return Config(raw["model_type"], raw, **values, rope_scaling=scaling, reward_head=reward_head)


def read_config(folder):
    """The Config of a model folder."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is not a folder.")
    path = Path(folder) / "config.json"
    return parse_config(read_json(path), str(path))


def with_reward_head(config):
    """The Config of the same body with a head of one number: sequence classification to transformers."""
    scorer = FAMILIES[config.model_type].scorer
    labels = {"architectures": [scorer], "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    return replace(config, tied=False, reward_head=True, source=config.source | labels)
