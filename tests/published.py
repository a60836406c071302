"""Published layouts of model folders: what stands in their files. tests/layouts.py builds and tries them.

config.json has the published one's fields with smaller sizes. Of the tokenizer's files the pipeline is as
published, and the vocabulary is learned here. Templates render what the published ones do for plain turns.
Where a config or generation_config says "</s>" for an id, the id of that token is meant.
"""
import functools
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

import tiny
from support.tokenizer_json import BYTE_OF

GONE = object()             # a field that this layout lacks


@dataclass
class Layout:
    """One published folder; fields whose name ends with _token_id may be a token's text, or several."""
    config: dict
    tokenizer: Callable            # () -> {file name: bytes or text}
    names: dict                    # tokenizer_config.json, its chat template apart
    shows: str                     # what is special about it, for the table
    template: str | None = None
    generation: dict = field(default_factory=dict)         # generation_config.json
    spare_rows: int = 0            # rows of the embedding beyond the tokenizer's ids
    notes: str = ""                # the fields that a note on stderr names
    resaved: bool = False          # transformers 5 has read the folder and saved it again
    shards: bool = False           # weights in several files, with an index
    buffers: tuple = ()            # what a layer holds besides weights


# -----------------------------------------------------------------------------------------------------------
# Tokenizers

def corpus():
    """The shared one, and what tells pipelines apart: numbers, capitals, white space, other scripts."""
    yield from tiny.corpus()
    yield from ["In 2024 it's 12345 or 1999; we've 100 %, they'll say I'LL.\n\n\tnaïve  café 日本語 한국어   "
                "HTTPServer camelCase  The\r\n",
                "12 123 1234 12 123 1234 ½ ² 日本語 한국어 ()!?... a=(b)+c 5 × "] * 60


@functools.cache
def pieces(bos_piece="<s>", eos_piece="</s>", control=(), prefix=True, added=()):
    """A tokenizer.model: BPE with byte fallback. added: ordinary pieces at its end (CodeLlama's marks)."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(), model_writer=trained, model_type="bpe", vocab_size=480,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, add_dummy_prefix=prefix, bos_piece=bos_piece, eos_piece=eos_piece,
        control_symbols=list(control), minloglevel=2)
    proto = sentencepiece_model_pb2.ModelProto.FromString(trained.getvalue())
    for n, piece in enumerate(added):
        proto.pieces.add(piece=piece, score=-1000.0 - n)
    return proto.SerializeToString()


def spaced(both=True, bos=True, marks=(), more=(), **kind):
    """The files of a sentencepiece tokenizer; tokenizer.json beside it as transformers 4 converted it.

    bos: whether that puts BOS before a text; marks: pieces that it has as special tokens; more: special
    tokens that fine-tuning added after the vocabulary (added_tokens.json).
    """
    content = pieces(**kind)
    files = {"tokenizer.model": content}
    tokenizer = tiny.spaced_tokenizer(content, prefix=kind.get("prefix", True), bos=bos)
    size = tokenizer.get_vocab_size()
    more_special = [AddedToken(text, special=True, normalized=False) for text in (*marks, *more)]
    tokenizer.add_special_tokens(more_special)
    if more:
        files["added_tokens.json"] = json.dumps({text: size + n for n, text in enumerate(more)})
    return files | ({"tokenizer.json": tokenizer.to_str()} if both else {})


@functools.cache
def byte_level(*steps, first=(), last=(), plain=(), nfc=False, bos=None, **changes):
    """A tokenizer.json of byte-level BPE. steps: regexes of Splits, True for single Digits, before ByteLevel.

    first, last: special tokens before and after the vocabulary; plain: added tokens that are text; bos: what
    the post_processor puts before a text; changes: of the object `model`.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    cuts = [pre_tokenizers.Digits(individual_digits=True) if step is True else
            pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=set(steps) <= {True}))
    # Learned on coarser words than it will see, so that every cut keeps some merge from happening.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\s*\S+(?:\s$)?"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=500 + len(first), special_tokens=list(first), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts) if steps else cuts[0]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in last])
    tokenizer.add_tokens([AddedToken(text, normalized=text.isspace()) for text in plain])
    root = json.loads(tokenizer.to_str())
    root["model"] |= changes
    if bos:
        bos_id = tokenizer.token_to_id(bos)
        template = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, bos_id)])
        root["post_processor"] = {"type": "Sequence", "processors": [
            root["post_processor"], json.loads(template.__getstate__())]}
    return {"tokenizer.json": json.dumps(root)}


def smollm2():
    """Digits alone, and no tokens for eight bytes that its training text never had."""
    root = json.loads(byte_level(True, first=SMOLLM_TOKENS)["tokenizer.json"])
    gone = {char for char, byte in BYTE_OF.items() if byte in (4, 6, 0x13, 0x14, 0x16, 0x1d, 0xf1, 0xf2)}
    kept = [token for token in root["model"]["vocab"] if token not in gone]
    root["model"]["vocab"] = {token: id for id, token in enumerate(kept)}
    return {"tokenizer.json": json.dumps(root)}


LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN_WORDS = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK_CUTS = ("[\r\n]", r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿͰ-ͳͶͷΆΈ-ΊΌΎ-ΡΣ-ϵЀ-ҁҊ-ԯԱ-Ֆ]+",        # its first ranges
                 r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", "[一-龥ࠀ-一가-퟿]+", True)
CODER_CUTS = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", True)
SMOLLM_TOKENS = tuple("<|endoftext|> <|im_start|> <|im_end|> <repo_name> <reponame> <file_sep> <filename> "
                      "<gh_stars> <issue_start> <issue_comment> <issue_closed> <jupyter_start>".split())
LLAMA3_TOKENS = tuple("<|begin_of_text|> <|end_of_text|> <|finetune_right_pad_id|> <|start_header_id|> "
                      "<|end_header_id|> <|eom_id|> <|eot_id|> <|python_tag|>".split())
QWEN_TOKENS = tuple("<|endoftext|> <|im_start|> <|im_end|>".split())
QWEN25_TOKENS = (*QWEN_TOKENS, *"<|object_ref_start|> <|box_start|> <|vision_start|> <|image_pad|>".split())
THINK = ("<tool_call>", "</tool_call>", "<think>", "</think>")
BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SPACES = tuple(" " * n for n in range(24, 1, -1))          # GPT-NeoX's runs of spaces, each a token

neox_20b = functools.partial(byte_level, first=("<|endoftext|>", "<|padding|>"), plain=SPACES, nfc=True)
llama3 = functools.partial(byte_level, LLAMA3_WORDS, last=LLAMA3_TOKENS, bos="<|begin_of_text|>",
                           ignore_merges=True)
qwen = functools.partial(byte_level, QWEN_WORDS, last=QWEN25_TOKENS, nfc=True)
tekken = functools.partial(byte_level, TEKKEN_WORDS, bos="<s>",
                           first=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"))


# -----------------------------------------------------------------------------------------------------------
# Templates

CHATML = r"""
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""


def chatml(system):
    """ChatML with a system turn where the dialogue has none."""
    return r"""
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\nSYSTEM<|im_end|>\n' }}
{%- endif %}""".replace("SYSTEM", system) + CHATML


QWEN3 = r"""
{%- set ns = namespace(last=0) %}
{%- for m in messages[::-1] if m.role == 'user' and not ns.last %}
    {%- set ns.last = messages | length - loop.index %}
{%- endfor %}
{%- for m in messages %}
    {%- set text = m.content %}
    {%- if m.role == 'assistant' and '</think>' in text and loop.index0 <= ns.last %}
        {%- set text = text.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
LLAMA2 = r"""
{%- if messages[0].role == 'system' %}
    {%- set rest = messages[1:] %}
    {%- set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}
{%- else %}
    {%- set rest, system = messages, '' %}
{%- endif %}
{%- for m in rest %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if m.role == 'user' %}
        {{- bos_token + '[INST] ' + ((system if loop.first else '') + m.content).strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + m.content.strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""
MISTRAL = r"""
{{- bos_token }}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' + m.content + ' [/INST]' }}
    {%- else %}
        {{- m.content + eos_token }}
    {%- endif %}
{%- endfor %}"""
MISTRAL3 = MISTRAL.replace("' [/INST]'", "'[/INST]'").replace("m.content + e", "' ' + m.content | trim + e")
ZEPHYR = r"""{% for m in messages %}
{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
LLAMA3 = r"""
{%- for m in messages %}
    {{- bos_token if loop.first else '' }}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
LLAMA32 = r"""
{%- set date = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}
{%- set system, rest = '', messages %}
{%- if messages[0].role == 'system' %}
    {%- set system, rest = messages[0].content | trim, messages[1:] %}
{%- endif %}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' }}
{{- 'Today Date: ' + date + '\n\n' + system + '<|eot_id|>' }}
{%- for m in rest %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
DEEPSEEK_CHAT = r"""
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- 'User: ' + m.content + '\n\n' }}
    {%- elif m.role == 'assistant' %}
        {{- 'Assistant: ' + m.content + eos_token }}
    {%- else %}
        {{- m.content + '\n\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}"""
R1 = r"""
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<｜User｜>' + m.content }}
    {%- elif m.role == 'assistant' %}
        {{- '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}
    {%- else %}
        {{- m.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<｜Assistant｜><think>\n' }}
{%- endif %}"""

# -----------------------------------------------------------------------------------------------------------
# config.json and tokenizer_config.json

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=512)


def fields(base, changes):
    return {name: value for name, value in (base | changes).items() if value is not GONE}


def llama(**changes):
    """Llama 2's config.json."""
    return fields(dict(
        SIZES, architectures=["LlamaForCausalLM"], bos_token_id="<s>", eos_token_id="</s>", hidden_act="silu",
        initializer_range=0.02, model_type="llama", num_key_value_heads=4, pretraining_tp=1,
        rms_norm_eps=1e-5, rope_scaling=None, tie_word_embeddings=False, torch_dtype="float16",
        transformers_version="4.31.0.dev0", use_cache=True), changes)


def llama3_config(**changes):
    ends = dict(bos_token_id="<|begin_of_text|>", eos_token_id="<|end_of_text|>")
    return llama(**ends | dict(num_key_value_heads=2, rope_theta=500000.0, attention_bias=False,
                               attention_dropout=0.0, torch_dtype="bfloat16",
                               transformers_version="4.40.0.dev0") | changes)


def mistral(**changes):
    return fields(dict(
        SIZES, architectures=["MistralForCausalLM"], bos_token_id="<s>", eos_token_id="</s>",
        hidden_act="silu", initializer_range=0.02, model_type="mistral", num_key_value_heads=2,
        rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=48, tie_word_embeddings=False,
        torch_dtype="bfloat16", transformers_version="4.34.0.dev0", use_cache=True), changes)


def qwen2(**changes):
    return fields(dict(
        SIZES, architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id="<|endoftext|>",
        eos_token_id="<|im_end|>", hidden_act="silu", initializer_range=0.02, max_window_layers=2,
        model_type="qwen2", num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1000000.0, sliding_window=64,
        tie_word_embeddings=True, torch_dtype="bfloat16", transformers_version="4.43.1", use_cache=True,
        use_sliding_window=False), changes)


def neox(**changes):
    return fields(dict(
        SIZES, architectures=["GPTNeoXForCausalLM"], bos_token_id="<|endoftext|>",
        eos_token_id="<|endoftext|>", hidden_act="gelu", initializer_range=0.02, layer_norm_eps=1e-5,
        model_type="gpt_neox",
        rotary_emb_base=10000, rotary_pct=0.25, tie_word_embeddings=False, torch_dtype="float16",
        transformers_version="4.24.0", use_cache=True, use_parallel_residual=True), changes)


LLAMA_NAMES = dict(
    add_bos_token=True, add_eos_token=False, bos_token="<s>", clean_up_tokenization_spaces=False,
    eos_token="</s>", legacy=False, model_max_length=512, pad_token=None, padding_side="right",
    sp_model_kwargs={}, tokenizer_class="LlamaTokenizer", unk_token="<unk>")
FAST = dict(clean_up_tokenization_spaces=True, model_max_length=512,
            tokenizer_class="PreTrainedTokenizerFast")
LLAMA3_NAMES = FAST | dict(bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")
NEOX_NAMES = dict(add_prefix_space=False, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
                  tokenizer_class="GPTNeoXTokenizer", unk_token="<|endoftext|>")
QWEN_NAMES = dict(
    add_prefix_space=False, additional_special_tokens=["<|im_start|>", "<|im_end|>"], bos_token=None,
    clean_up_tokenization_spaces=False, eos_token="<|im_end|>", errors="replace", model_max_length=512,
    pad_token="<|endoftext|>", split_special_tokens=False, tokenizer_class="Qwen2Tokenizer", unk_token=None)
SMOLLM_NAMES = dict(
    add_prefix_space=False, additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    bos_token="<|im_start|>", clean_up_tokenization_spaces=False, eos_token="<|im_end|>",
    model_max_length=512, pad_token="<|im_end|>", tokenizer_class="GPT2Tokenizer", unk_token="<|endoftext|>",
    vocab_size=49152)
DEEPSEEK_NAMES = dict(
    add_bos_token=True, add_eos_token=False, bos_token={"__type": "AddedToken", "content": BEGIN},
    clean_up_tokenization_spaces=False, eos_token={"__type": "AddedToken", "content": END}, legacy=True,
    model_max_length=512, pad_token={"__type": "AddedToken", "content": END}, sp_model_kwargs={},
    unk_token=None, tokenizer_class="LlamaTokenizerFast")
CODE_MARKS = tuple("▁<SU ▁<SUF ▁<PRE ▁<M ▁<MID ▁<E ▁<EOT ▁<PRE> ▁<SUF> ▁<MID> ▁<EOT>".split())
CODE_NAMES = LLAMA_NAMES | dict(
    additional_special_tokens=["▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"], eot_token="▁<EOT>",
    fill_token="<FILL_ME>", legacy=None, middle_token="▁<MID>", prefix_token="▁<PRE>", suffix_token="▁<SUF>",
    tokenizer_class="CodeLlamaTokenizer")
ROPE_31 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192,
               rope_type="llama3")
LLAMA3_ENDS = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
TINYLLAMA = llama(num_key_value_heads=1, torch_dtype="float32")
TINYLLAMA_CHAT = TINYLLAMA | dict(attention_bias=False, rope_theta=10000.0, torch_dtype="bfloat16",
                                  transformers_version="4.35.0")
SMOLLM2 = llama(
    attention_bias=False, attention_dropout=0.0, bos_token_id="<|im_start|>", eos_token_id="<|im_end|>",
    initializer_range=0.041666666666666664, is_llama_config=True, mlp_bias=False, num_key_value_heads=2,
    pad_token_id="<|im_end|>", rope_interleaved=False, rope_theta=100000, tie_word_embeddings=True,
    torch_dtype="bfloat16", transformers_version="4.42.3",
    **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}})
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
PIPELINES = {"text-generation": {"impl": "instruct_pipeline.InstructionTextGenerationPipeline",
                                 "pt": "AutoModelForCausalLM", "tf": "TFAutoModelForCausalLM"}}
SMOLLM_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
LLAMA2_SAMPLING = dict(bos_token_id="<s>", do_sample=True, eos_token_id="</s>", max_length=512,
                       pad_token_id="<unk>", temperature=0.6, top_p=0.9)
QWEN_SAMPLING = dict(bos_token_id="<|endoftext|>", do_sample=True, pad_token_id="<|endoftext|>",
                     eos_token_id=["<|im_end|>", "<|endoftext|>"], repetition_penalty=1.1, temperature=0.7,
                     top_k=20, top_p=0.8)
INV_FREQ, MASKS = ("self_attn.rotary_emb.inv_freq",), ("attention.bias", "attention.masked_bias",
                                                       "attention.rotary_emb.inv_freq")

LAYOUTS = {
    "Llama 1": Layout(
        llama(max_position_embeddings=GONE, num_key_value_heads=GONE, pretraining_tp=GONE, rope_scaling=GONE,
              tie_word_embeddings=GONE, max_sequence_length=512, pad_token_id=-1, rms_norm_eps=1e-6,
              transformers_version="4.27.0.dev0"),
        spaced, LLAMA_NAMES | dict(legacy=GONE), "`max_sequence_length`, no `num_key_value_heads`",
        buffers=INV_FREQ, shards=True),
    "Llama 2": Layout(
        llama(), spaced, LLAMA_NAMES, "float16, files with an index", generation=LLAMA2_SAMPLING,
        buffers=INV_FREQ, shards=True),
    "Llama 2 Chat": Layout(
        llama(_name_or_path="meta-llama/Llama-2-7b-chat-hf"), spaced, LLAMA_NAMES, "`[INST]` and `<<SYS>>`",
        LLAMA2, generation=LLAMA2_SAMPLING),
    "Llama 2, transformers 5": Layout(
        llama(), spaced, LLAMA_NAMES, "Metaspace; `rope_parameters`, `dtype`", generation=LLAMA2_SAMPLING,
        resaved=True),
    "Llama 2 32K": Layout(
        llama(auto_map={"AutoModelForCausalLM": "modeling_flash_llama.LlamaForCausalLM"},
              rope_scaling={"factor": 8.0, "type": "linear"}),
        spaced, LLAMA_NAMES, "`auto_map`, rope linear", notes="auto_map"),
    "Vicuna 1.5": Layout(
        llama(_name_or_path="vicuna-7b-v1.5", pad_token_id="<unk>"), functools.partial(spaced, both=False),
        LLAMA_NAMES | dict(pad_token="<unk>"), "no template",
        generation=LLAMA2_SAMPLING | dict(_from_model_config=True)),
    "CodeLlama": Layout(
        llama(_name_or_path="codellama/CodeLlama-7b-hf", rope_theta=1000000, torch_dtype="bfloat16",
              tie_word_embeddings=GONE, transformers_version="4.33.0.dev0"),
        functools.partial(spaced, added=CODE_MARKS, marks=CODE_MARKS[-4:]), CODE_NAMES,
        "rope base 1e6, fill-in-the-middle marks"),
    "TinyLlama": Layout(
        TINYLLAMA, spaced, LLAMA_NAMES | dict(legacy=GONE), "one key head for four",
        generation=dict(bos_token_id="<s>", eos_token_id="</s>", max_length=512, pad_token_id="<unk>")),
    "TinyLlama Chat": Layout(
        TINYLLAMA_CHAT, spaced, LLAMA_NAMES | dict(pad_token="</s>"), "roles' marks are text", ZEPHYR),
    "TinyLlama Chat, transformers 5": Layout(
        TINYLLAMA_CHAT, spaced, LLAMA_NAMES | dict(pad_token="</s>"), "Metaspace, chat_template.jinja",
        ZEPHYR, resaved=True),
    "Yi": Layout(
        llama(bos_token_id="<|startoftext|>", eos_token_id="<|endoftext|>", num_key_value_heads=2,
              pad_token_id="<unk>", rope_theta=5000000.0, torch_dtype="bfloat16",
              transformers_version="4.34.0"),
        functools.partial(spaced, bos_piece="<|startoftext|>", eos_piece="<|endoftext|>", prefix=False,
                          bos=False, control=("<|im_start|>", "<|im_end|>", "<|im_sep|>")),
        LLAMA_NAMES | dict(add_bos_token=False, bos_token="<|startoftext|>", eos_token="<|endoftext|>",
                           legacy=GONE, pad_token="<unk>"),
        "no word-start, no BOS", CHATML,
        generation=dict(bos_token_id="<|startoftext|>", eos_token_id="<|im_end|>")),
    "DeepSeek LLM": Layout(
        llama(bos_token_id=BEGIN, eos_token_id=END, torch_dtype="bfloat16", transformers_version="4.33.1"),
        functools.partial(byte_level, *DEEPSEEK_CUTS, last=(BEGIN, END)), DEEPSEEK_NAMES,
        "five Splits and Digits", DEEPSEEK_CHAT, spare_rows=8),
    "DeepSeek Coder": Layout(
        llama(bos_token_id=BEGIN, eos_token_id=END, torch_dtype="bfloat16", rope_theta=100000,
              rope_scaling={"factor": 4.0, "type": "linear"}),
        functools.partial(byte_level, *CODER_CUTS, last=(BEGIN, END)), DEEPSEEK_NAMES,
        "four Splits and Digits, rope linear", spare_rows=8),
    "Llama 3": Layout(
        llama3_config(), llama3, LLAMA3_NAMES, "BOS by the post_processor, `ignore_merges`", LLAMA3,
        generation=dict(bos_token_id="<|begin_of_text|>", eos_token_id=["<|end_of_text|>", "<|eot_id|>"])),
    "Llama 3.1": Layout(
        llama3_config(eos_token_id=LLAMA3_ENDS, mlp_bias=False, rope_scaling=ROPE_31,
                      transformers_version="4.42.3"),
        llama3, LLAMA3_NAMES | dict(eos_token="<|eot_id|>"), "rope llama3, three stop ids", LLAMA32,
        generation=dict(bos_token_id="<|begin_of_text|>", eos_token_id=LLAMA3_ENDS), shards=True),
    "Llama 3.2": Layout(
        llama3_config(eos_token_id=LLAMA3_ENDS, head_dim=8, mlp_bias=False, tie_word_embeddings=True,
                      rope_scaling=ROPE_31 | dict(factor=32.0), transformers_version="4.45.0.dev0"),
        llama3, LLAMA3_NAMES | dict(eos_token="<|eot_id|>"), "tied head, a date in the template", LLAMA32),
    "Falcon3": Layout(
        llama3_config(activation="swiglu", bos_token_id=GONE, eos_token_id="<|endoftext|>", head_dim=16,
                      mlp_bias=False, pretraining_tp=GONE, rms_norm_eps=1e-6, rope_theta=1000042,
                      transformers_version="4.46.1"),
        functools.partial(byte_level, LLAMA3_WORDS, last=("<|endoftext|>", "<|pad|>")),
        FAST | dict(add_prefix_space=False, eos_token="<|endoftext|>", pad_token="<|pad|>"),
        "wide heads, `activation`", notes="activation"),
    "SmolLM2": Layout(
        SMOLLM2, smollm2, SMOLLM_NAMES, "`is_llama_config`; Digits, bytes without a token",
        chatml(SMOLLM_SYSTEM)),
    "SmolLM2, Unsloth": Layout(
        SMOLLM2 | dict(_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct", unsloth_fixed=True,
                       unsloth_version="2024.9"),
        smollm2, SMOLLM_NAMES, "`unsloth_fixed`, `unsloth_version`", chatml(SMOLLM_SYSTEM)),
    "Mistral 0.1": Layout(mistral(), spaced, LLAMA_NAMES | dict(legacy=True), "sliding window"),
    "Mistral 0.1, transformers 5": Layout(
        mistral(), spaced, LLAMA_NAMES | dict(legacy=True), "Prepend and Replace", MISTRAL, resaved=True),
    "Mistral 0.3 Instruct": Layout(
        mistral(attention_dropout=0.0, rope_theta=1000000.0, sliding_window=None,
                transformers_version="4.42.0.dev0"),
        functools.partial(spaced, control=("[INST]", "[/INST]", "[TOOL_CALLS]")), LLAMA_NAMES,
        "`[INST]` is a token", MISTRAL3),
    "Mistral Nemo": Layout(
        mistral(attention_dropout=0.0, head_dim=16, rope_theta=1000000.0, sliding_window=None,
                transformers_version="4.43.0.dev0"),
        tekken, FAST | dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_prefix_space=False),
        "`head_dim`, Tekken's pattern", MISTRAL3),
    "Zephyr": Layout(
        mistral(_name_or_path="mistralai/Mistral-7B-v0.1", pad_token_id="</s>"), spaced,
        LLAMA_NAMES | dict(legacy=True, pad_token="</s>", truncation_side="left"), "roles' marks are text",
        ZEPHYR),
    "OpenHermes 2.5": Layout(
        mistral(eos_token_id="<|im_end|>", use_cache=False),
        functools.partial(spaced, more=("<|im_end|>", "<|im_start|>")),
        LLAMA_NAMES | dict(eos_token="<|im_end|>", legacy=True, trust_remote_code=False),
        "added_tokens.json", CHATML, generation=dict(bos_token_id="<s>", eos_token_id="<|im_end|>")),
    "Qwen2": Layout(
        qwen2(), functools.partial(qwen, last=QWEN_TOKENS), QWEN_NAMES,
        "bias on q, k, v; `sliding_window` not in use", chatml("You are a helpful assistant."),
        generation=QWEN_SAMPLING, spare_rows=7),
    "Qwen2.5": Layout(
        qwen2(eos_token_id="<|endoftext|>", use_mrope=False), functools.partial(qwen, plain=THINK[:2]),
        QWEN_NAMES | dict(eos_token="<|endoftext|>"), "a base model with a template", chatml(QWEN_SYSTEM),
        generation=dict(bos_token_id="<|endoftext|>", eos_token_id="<|endoftext|>"), spare_rows=7),
    "Qwen2.5 Instruct": Layout(
        qwen2(), functools.partial(qwen, plain=THINK[:2]), QWEN_NAMES, "added tokens that are text",
        chatml(QWEN_SYSTEM), generation=QWEN_SAMPLING, spare_rows=7),
    "Qwen2.5 Instruct, transformers 5": Layout(
        qwen2(), functools.partial(qwen, plain=THINK[:2]), QWEN_NAMES, "`rope_parameters`, `layer_types`",
        chatml(QWEN_SYSTEM), generation=QWEN_SAMPLING, spare_rows=7, resaved=True),
    "R1, distilled into Qwen2.5": Layout(
        qwen2(bos_token_id=BEGIN, eos_token_id=END, max_window_layers=1, rope_theta=10000,
              tie_word_embeddings=False, transformers_version="4.44.0", use_mrope=False),
        functools.partial(qwen, last=(BEGIN, END, "<｜User｜>", "<｜Assistant｜>"), plain=THINK[2:]),
        DEEPSEEK_NAMES, "BOS by tokenizer_config.json; reasoning cut out", R1, spare_rows=7,
        generation=dict(_from_model_config=True, bos_token_id=BEGIN, eos_token_id=END, do_sample=True,
                        temperature=0.6, top_p=0.95)),
    "Qwen3": Layout(
        qwen2(architectures=["Qwen3ForCausalLM"], model_type="qwen3", attention_bias=False, head_dim=16,
              rope_scaling=None, sliding_window=None, transformers_version="4.51.0"),
        functools.partial(qwen, plain=THINK), QWEN_NAMES, "norms on q and k; reasoning cut out", QWEN3,
        generation=QWEN_SAMPLING, spare_rows=7),
    "Pythia": Layout(
        neox(), neox_20b, NEOX_NAMES, "float16, masks among the weights", spare_rows=27, buffers=MASKS),
    "GPT-NeoX 20B": Layout(
        neox(attention_probs_dropout_prob=0, hidden_act="gelu_fast", hidden_dropout_prob=0,
             use_parallel_residual=GONE, transformers_version="4.19.0.dev0"),
        neox_20b, NEOX_NAMES, "gelu_fast, no `use_parallel_residual`", spare_rows=155, buffers=MASKS[:2],
        shards=True),
    "RedPajama INCITE": Layout(
        neox(rotary_pct=1.0, use_parallel_residual=False, transformers_version="4.28.1"), neox_20b,
        NEOX_NAMES, "not parallel, all dimensions turn", spare_rows=155),
    "StableLM alpha": Layout(
        neox(transformers_version="4.28.1"),
        functools.partial(neox_20b, last=("<|SYSTEM|>", "<|USER|>", "<|ASSISTANT|>")), NEOX_NAMES,
        "turns' marks, no template", generation=dict(eos_token_id="<|endoftext|>"), spare_rows=8),
    "dolly v2": Layout(
        neox(custom_pipelines=PIPELINES, torch_dtype="bfloat16", transformers_version="4.25.1"),
        functools.partial(neox_20b, last=("### End", "### Instruction:", "### Response:\n")), NEOX_NAMES,
        "`custom_pipelines`", spare_rows=5),
    "OpenAssistant Pythia": Layout(
        neox(_name_or_path="EleutherAI/pythia-12b-deduped", transformers_version="4.28.0.dev0"),
        functools.partial(neox_20b, last=("<|prompter|>", "<|assistant|>", "<|system|>", "<|prefix_begin|>")),
        NEOX_NAMES | dict(sep_token="<|endoftext|>", pad_token="<|padding|>"), "turns' marks, no template",
        spare_rows=4),
}
# What is not computed as Llama is: (config.json, what the sentence that refuses it names).
REFUSED = {
    "Phi-3": (llama(architectures=["Phi3ForCausalLM"], model_type="phi3", sliding_window=2047), "'phi3'"),
    "Gemma": (llama(architectures=["GemmaForCausalLM"], model_type="gemma", head_dim=16), "'gemma'"),
    "Mixtral": (mistral(architectures=["MixtralForCausalLM"], model_type="mixtral", num_local_experts=8),
                "'mixtral'"),
    "Qwen2 MoE": (qwen2(architectures=["Qwen2MoeForCausalLM"], model_type="qwen2_moe", num_experts=60),
                  "'qwen2_moe'"),
    "SmolLM3": (llama(architectures=["SmolLM3ForCausalLM"], model_type="smollm3", no_rope_layers=[1, 0],
                      no_rope_layer_interval=4), "'smollm3'"),
    "Qwen with its window in use": (qwen2(use_sliding_window=True, max_window_layers=1),
                                    "'max_window_layers'"),
    "Llama in 4 bits": (llama(quantization_config={"bits": 4, "quant_method": "gptq"}),
                        "'quantization_config'"),
    "Llama without positions in some layers": (llama(no_rope_layers=[1, 0]), "'no_rope_layers'"),
    "Llama with muP's factors": (llama(scale_emb=12, scale_depth=1.4), "'scale_emb'"),
    "Yarn Llama 2": (llama(rope_scaling={"factor": 16.0, "type": "yarn", "finetuned": True}),
                     "'rope_scaling'"),
}
