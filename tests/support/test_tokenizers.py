"""Ids equal the reference libraries', text comes back, ends and stops are found, broken files are named.

Every kind is tested on tokenizers made here, and on published ones where OSPREY_DATA has them.
"""
import base64
import contextlib
import functools
import gzip
import io
import itertools
import json
import os
import random
import re
import shutil
import time
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import AddedToken, pre_tokenizers

import published
import tiny
from support.cli import InputError
from support.tokenizer import load_tokenizer
from support.tokenizer_json import BYTE_OF

DATA = Path(os.environ.get("OSPREY_DATA", Path(__file__).parents[3] / "shared/data"))

# ------------------------------------------------------------------------------------------------------------
# Text

SPECIAL_STRINGS = ["</s>", "<s>", "<unk>", "<|endoftext|>", "<|padding|>", "<|begin_of_text|>", "<|eot_id|>",
                   "[INST]", "<|im_start|>", "<0x0A>"]
ASSIGNED = [char for char in map(chr, range(0x110000)) if unicodedata.category(char) not in ("Cn", "Cs")]
POOLS = [list("abcdefghijklmnopqrstuvwxyz ETAOIN"), list(" \n\t\r"), [" "], list("0123456789.,!?'\"-()"),
         ["'s", "'LL", "'re", " the", " Human:", "\n\nAssistant:"], list("½²Ⅻ1٣"),
         ["é", "ü", "e\u0301", "o\u0308", "\u0323\u0307", "\u1100\u1161\u11a8", "\u212b", "\ufb01"],
         list("😀👍🏽👨‍👩‍👧❤️🇩🇪"), list("日本語中文한국어ไทยعربيहिन्दी"),
         [chr(code) for code in range(32)] + ["\x7f", "\x85", "\xa0", "\u2028", "\u200b", "\u3000", "\ufeff"],
         ["\udc80", "\udfff", "\ud800 "], ["<think>", "日本", "日本日", "a", " "], SPECIAL_STRINGS, ASSIGNED]
FIXED = ["", " ", "  ", "a", " a", "a ", "\n", "\n\nHuman: hi\n\nAssistant:", " " * 200, "\t\t x", "é",
         "e\u0301", "👨‍👩‍👧", "x" * 3000, "\x00", "\ud800", "a\udfffb", "It's I'LL we'VE", "1234567 12",
         *SPECIAL_STRINGS]


def random_texts(count, seed):
    """Texts of up to six runs, each from one pool."""
    rng = random.Random(seed)

    def run(pool):
        return "".join(rng.choices(pool, k=rng.randint(1, rng.choice((2, 6, 30)))))

    return FIXED + ["".join(map(run, rng.choices(POOLS, k=rng.randint(0, 6)))) for _ in range(count)]


TEXTS = random_texts(20_000, seed=1)
CLEAN = [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in TEXTS]     # the libraries refuse surrogates
NFC = [unicodedata.normalize("NFC", text) for text in CLEAN]


def assert_same(ids, expected):
    wrong = [ascii(text) for text, one, other in zip(CLEAN, ids, expected) if one != other]
    assert not wrong, f"{len(wrong)} of {len(ids)} texts differ, first {wrong[0]}"
    assert len(ids) == len(expected)


def write(folder, **files):
    """Files of a model folder; __ stands for the dot: tokenizer_config__json=…"""
    for name, content in files.items():
        content = content if isinstance(content, (bytes, str)) else json.dumps(content)
        content = content.encode() if isinstance(content, str) else content
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


# ------------------------------------------------------------------------------------------------------------
# Tokenizers made here: kinds of tests/published.py, and what no published folder has


def squeezing():
    """stories260K's kind: sentencepiece that keeps one space of many, and none at the ends."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=published.corpus(), model_writer=model, model_type="bpe", vocab_size=480,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=True, minloglevel=2)
    return model.getvalue()


def with_tokens(content, *tokens):
    """The text of a tokenizer.json with (added token, whether it is looked for after normalization)."""
    tokenizer = tokenizers.Tokenizer.from_str(content)
    tokenizer.add_tokens([AddedToken(text, normalized=normalized) for text, normalized in tokens])
    return tokenizer.to_str()


TEXT_TOKENS = ("<think>", False), ("日本", True)


def shuffled(content):
    """A tokenizer.json whose ids are not in the order of its merges."""
    root = json.loads(content)
    vocab, rest = root["model"]["vocab"], random.Random(3)
    ids = rest.sample(range(len(vocab)), len(vocab))
    root["model"]["vocab"] = {token: ids[id] for token, id in vocab.items()}
    return json.dumps(root)


def spaced(first_only=True, first_merges=()):
    """sentencepiece's tokenizer as transformers 5 writes it (Metaspace), or as 4 did (Prepend, Replace)."""
    tokenizer = tiny.spaced_tokenizer(SPACED_MODEL, first_merges=first_merges)
    if first_only:
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    return with_tokens(tokenizer.to_str(), *TEXT_TOKENS)


def tiktoken_ranks():
    """{bytes: rank} of a vocabulary as Llama 3's is, single bytes first."""
    vocab = json.loads(published.llama3()["tokenizer.json"])["model"]["vocab"]
    pieces = [bytes(BYTE_OF[char] for char in token) for token in vocab]
    return {piece: rank for rank, piece in enumerate(sorted(pieces, key=lambda piece: len(piece) > 1))}


def tiktoken_lines(ranks):
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in ranks.items())


SPACED_MODEL = published.pieces(control=("<|im_start|>",))
MADE = {
    "sp": lambda: SPACED_MODEL, "sp-squeeze": squeezing,
    "tiktoken": lambda: tiktoken_lines(tiktoken_ranks()),
    "neox": lambda: with_tokens(published.neox_20b()["tokenizer.json"], *TEXT_TOKENS),
    "llama3": lambda: shuffled(published.llama3()["tokenizer.json"]),
    "qwen": lambda: published.qwen()["tokenizer.json"],
    "smollm": lambda: published.smollm2()["tokenizer.json"],
    "splits": lambda: published.byte_level(*published.CODER_CUTS, first=("</s>",))["tokenizer.json"],
    "metaspace": spaced, "prepend": lambda: spaced(first_only=False),
}
SHARED = {"gpt-neox-20b": "tokenizers/gpt-neox-20b", "mistral-v1": "tokenizers/mistral-v1",
          "mistral-v3": "tokenizers/mistral-v3", "tiktoken-small": "tokenizers/tiktoken-small",
          "stories260K": "models/stories260K"}
SPACED = "metaspace", "prepend"
ALL = [*MADE, *SHARED]
# Those of which every text comes back.
WHOLE = [name for name in ALL if name not in ("sp-squeeze", "stories260K", "smollm", "prepend")]
NFC_KINDS = "neox", "qwen", "gpt-neox-20b"


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    @functools.cache
    def find(name):
        if name in SHARED:
            return Path(tiny.shared(SHARED[name]))
        content = MADE[name]()
        kind = "tokenizer__model" if isinstance(content, bytes) else "tokenizer__json"
        return write(tmp_path_factory.mktemp(name), **{kind: content})
    return find


@pytest.fixture(scope="session")
def load(folder_of):
    return functools.cache(lambda name: load_tokenizer(folder_of(name)))


# ------------------------------------------------------------------------------------------------------------
# Ids and text


def library(folder):
    """(texts -> ids, ids -> texts, the least id that it reads) of the library a folder is written for."""
    path = folder / "tokenizer.json"
    if path.exists():
        its = tokenizers.Tokenizer.from_file(str(path))
        its.encode_special_tokens = True        # special strings are plain text
        return (lambda texts: [row.ids for row in its.encode_batch(texts, add_special_tokens=False)],
                its.decode_batch, 0)
    path = folder / "tokenizer.model"
    with contextlib.suppress(RuntimeError):
        its = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return its.encode, its.decode, 1
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in map(bytes.split, path.open("rb"))}
    its = tiktoken.Encoding("reference", mergeable_ranks=ranks, special_tokens={},
                            pat_str=published.LLAMA3_WORDS)
    return (lambda texts: its.encode_ordinary_batch(texts, num_threads=1),
            lambda rows: its.decode_batch([[id for id in row if id < len(ranks)] for row in rows]), 0)


@pytest.mark.parametrize("count", [4_000, pytest.param(len(TEXTS), marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ALL)
def test_ids_and_texts_are_the_library_s(name, count, load, folder_of):
    """Ids of texts; texts of these ids, and of ids that no text has; a stream says the same."""
    tokenizer, (encode, decode, least) = load(name), library(folder_of(name))
    ids = [tokenizer.encode(text) for text in TEXTS[:count]]
    assert_same(ids, encode(CLEAN[:count]))
    if name in WHOLE and name not in SPACED:
        assert [tokenizer.decode(row) for row in ids] == (NFC if name in NFC_KINDS else CLEAN)[:count]
    rng = random.Random(2)          # broken UTF-8, control ids, word-starts at the front
    garbage = [rng.choices(range(least, tokenizer.vocab_size), k=4) + rng.choices(range(3, 300), k=4)
               for _ in range(3000 * (name not in SPACED))]
    if least:       # what no text has, sentencepiece reads otherwise: a first piece of the byte 0x20, and
        space = tokenizer.alone.piece_to_id("<0x20>")         # bytes of one character around a control token
        garbage = [row for row in garbage if next(id for id in row if id > 2) != space
                   and not set(row[1:]) & set(tokenizer.special_ids.values())]
    assert [tokenizer.decode(row) for row in garbage + ids] == decode(garbage + ids)
    for row, continues in itertools.product(garbage[:300] + ids[:500], (False, True)):
        stream = tokenizer.stream(continues)
        assert "".join(map(stream.push, row)) + stream.flush() == tokenizer.decode(row, continues)


@pytest.mark.parametrize("normalizer, step", [
    (None, {"prepend_scheme": "always", "split": False}), (None, {"prepend_scheme": "always", "split": True}),
    (None, {"prepend_scheme": "never", "split": False}), ({"type": "Replace"}, None)])
@pytest.mark.parametrize("crossing", [False, True])
def test_spaces_of_other_files(normalizer, step, crossing, tmp_path):
    """Other ways to write a space, and a token that goes on after one: then no text is cut before merging."""
    root = json.loads(spaced(first_merges=[("e", "▁")] if crossing else []))
    root["normalizer"] = normalizer and {**normalizer, "pattern": {"String": " "}, "content": "▁"}
    root["pre_tokenizer"] = step and {"type": "Metaspace", "replacement": "▁", **step}
    tokenizer = load_tokenizer(write(tmp_path, tokenizer__json=root))
    texts = CLEAN[:2000] + ["the cat"]
    expected = library(tmp_path)[0](texts)
    assert list(map(tokenizer.encode, texts)) == expected
    crosses = [tokenizer.pieces[id] for id in expected[-1]].count(b"e ")
    assert crosses == (crossing and not (step or {}).get("split"))


@pytest.mark.slow
def test_smollm2_is_the_library():
    """SmolLM2-135M-Instruct's own files, also on 5,000 dialogues where OSPREY_DATA has them."""
    folder = Path(os.environ.get("OSPREY_SMOLLM2", "nowhere"))
    if not folder.is_dir():
        pytest.skip("OSPREY_SMOLLM2 names no folder of SmolLM2-135M-Instruct")
    tokenizer = load_tokenizer(folder)
    texts = CLEAN + [json.loads(line)[key] for path in sorted((DATA / "hh-rlhf").glob("*.gz"))
                     for line in gzip.open(path) for key in ("chosen", "rejected")][:5000]
    assert list(map(tokenizer.encode, texts)) == library(folder)[0](texts)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 2, False)
    assert tokenizer.vocab_size == 49152


def test_bytes_without_a_token(tmp_path):
    """Words are cut first, then such bytes are left out, then the others merge, also across the gap."""
    root = small_json([["/", "-"], ["a", "b"]])
    del root["model"]["vocab"]["Ą"]
    tokenizer = load_tokenizer(write(tmp_path, tokenizer__json=root))
    texts = ["/\x04-", "a\x04b", "\x04", "/\x04\x04- a  \x04b", "/-"]
    assert list(map(tokenizer.encode, texts)) == library(tmp_path)[0](texts)
    assert len(tokenizer.encode(texts[0])) == 1 and len(tokenizer.encode(texts[1])) == 2


def test_llama3_json_and_tiktoken_lines_agree(tmp_path):
    """Llama 3's tokenizer.json has as merges all splits of a token into two, by its rank, then by theirs."""
    ranks = tiktoken_ranks()
    visible = {byte: char for char, byte in BYTE_OF.items()}
    as_text = {piece: "".join(visible[byte] for byte in piece) for piece in ranks}
    merges = sorted((ranks[piece], ranks[piece[:i]], ranks[piece[i:]]) for piece in ranks
                    for i in range(1, len(piece)) if piece[:i] in ranks and piece[i:] in ranks)
    assert len(merges) > len(ranks) - 256
    names = list(as_text.values())
    root = json.loads(published.llama3()["tokenizer.json"])
    root["model"]["vocab"] = {name: rank for rank, name in enumerate(names)}
    root["model"]["merges"] = [[names[left], names[right]] for _, left, right in merges]
    root["added_tokens"] = [dict(token, id=len(ranks) + n) for n, token in enumerate(root["added_tokens"])]
    from_json = load_tokenizer(write(tmp_path, tokenizer__json=root))
    from_lines = load_tokenizer(write(tmp_path, tokenizer__model=tiktoken_lines(ranks)))
    assert list(map(from_json.encode, TEXTS[:9000])) == list(map(from_lines.encode, TEXTS[:9000]))
    assert (from_json.bos_id, from_json.eos_id) == (from_lines.bos_id, from_lines.eos_id)
    assert from_json.adds_bos and from_lines.adds_bos


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def small_json(merges, extra=(), **model):
    """A tokenizer.json over all bytes with hand-made merges; `extra` are tokens without a merge."""
    vocab = dict.fromkeys([*BYTE_OF, *("".join(merge) for merge in merges), *extra])
    model = {"type": "BPE", "vocab": {token: id for id, token in enumerate(vocab)}, "merges": merges, **model}
    return {"version": "1.0", "added_tokens": [{"id": len(vocab), "content": "<|endoftext|>", "special": True,
            "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}], "normalizer": None,
            "pre_tokenizer": dict(BYTE_LEVEL), "post_processor": None, "decoder": None, "model": model}


def split_by(pattern, **split):
    """A pre_tokenizer that cuts out words by a regex, as Llama 3's does."""
    return {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False, **split},
        {**BYTE_LEVEL, "use_regex": False}]}


def test_any_merges_in_any_order(tmp_path):
    """Merges made up at random, most of which no training would give, in any order."""
    rng, compared = random.Random(5), 0
    for _ in range(60):
        tokens, merges = list("abc"), []
        for _ in range(rng.randint(1, 25)):
            pair = [rng.choice(tokens), rng.choice(tokens)]
            if pair not in merges and len("".join(pair)) < 10:
                merges.append(pair)
                tokens.append("".join(pair))
        rng.shuffle(merges)
        root = small_json(merges, extra=["cacab"], ignore_merges=rng.random() < 0.3)
        if rng.random() < 0.5:
            root["model"]["merges"] = [" ".join(pair) for pair in merges]       # as older files have them
        texts = ["".join(rng.choices("abc", k=rng.randint(1, 20))) + rng.choice(["", " x"])
                 for _ in range(150)] + ["cacab"]       # a token that ignore_merges takes without merges
        try:
            tokenizer = load_tokenizer(write(tmp_path, tokenizer__json=root))
        except InputError as error:                     # the one thing tiktoken cannot be told
            assert root["model"]["ignore_merges"] and "model.merges lacks" in str(error)
            continue
        assert list(map(tokenizer.encode, texts)) == library(tmp_path)[0](texts)
        compared += 1
    assert compared > 40


def test_pattern_that_leaves_text_over(tmp_path):
    root = small_json([["a", "b"], ["1", "2"]]) | {"pre_tokenizer": split_by("[a-z]+")}
    tokenizer = load_tokenizer(write(tmp_path, tokenizer__json=root))
    texts = ["ab12ab12", "1 2\n12ab", "...", "AB12 ab"]
    assert list(map(tokenizer.encode, texts)) == library(tmp_path)[0](texts)


@pytest.mark.parametrize("name", ALL)
def test_very_long_runs(name, load):
    tokenizer, start = load(name), time.monotonic()
    for text in ("a" * 300_000, "-=" * 100_000, " " * 1_200_000 + "a"):
        if text[0] == " " and tokenizer.encode(" ") == []:      # stories260K keeps one space
            text = " a"
        assert tokenizer.decode(tokenizer.encode_after(text), continues=True) == text
    assert time.monotonic() - start < 20


# ------------------------------------------------------------------------------------------------------------
# Joints


@pytest.mark.parametrize("name", WHOLE)
def test_a_continuation_comes_back_as_it_is(name, load):
    tokenizer = load(name)
    for text in CLEAN[:4000]:
        text = unicodedata.normalize("NFC", text) if name in NFC_KINDS else text
        ids = tokenizer.encode_after(text)
        assert tokenizer.decode(ids, continues=True) == text
        assert tokenizer.decode(tokenizer.encode("Assistant:") + ids) == "Assistant:" + text


@pytest.mark.parametrize("name", ALL)
def test_a_continuation_joins_as_the_whole_text(name, load):
    tokenizer = load(name)
    for response in (" Sure", " Sure, I can help.", " the cat\n\nsat", " 2024"):
        joined = tokenizer.encode("Assistant:") + tokenizer.encode_after(response)
        assert joined == tokenizer.encode("Assistant:" + response)
        assert tokenizer.decode(tokenizer.encode_after(response), continues=True) == response


@pytest.mark.parametrize("name", ["sp", "mistral-v1", "mistral-v3"])
def test_encode_after_is_encoding_after_a_sentinel(name, load):
    tokenizer = load(name)
    sentinel = tokenizer.encode("\x01")     # a byte piece in these models: it merges with nothing
    for text in CLEAN[:4000]:
        assert sentinel + tokenizer.encode_after(text) == tokenizer.encode("\x01" + text)


def test_squeezing_model_keeps_the_space_before_a_word(load):
    """stories260K's kind throws away spaces at both ends, also the one between prompt and response."""
    tokenizer = load("sp-squeeze")
    assert tokenizer.encode(" cat") == tokenizer.encode("cat") == tokenizer.encode_after(" cat")
    assert tokenizer.encode("cat") != tokenizer.encode_after("cat")
    assert tokenizer.decode(tokenizer.encode_after(" cat"), continues=True) == " cat"
    assert tokenizer.decode(tokenizer.encode_after("s"), continues=True) == "s"
    assert tokenizer.decode(tokenizer.encode("cat")) == "cat"


@pytest.mark.parametrize("name", ALL)
def test_special_strings_are_plain_text(name, load):
    tokenizer = load(name)
    for text in SPECIAL_STRINGS + list(tokenizer.special_ids)[:20]:
        ids = tokenizer.encode_after("a" + text + "b")
        assert tokenizer.decode(ids, continues=True) == "a" + text + "b"
        assert not set(ids) & {tokenizer.bos_id, tokenizer.eos_id, *tokenizer.special_ids.values()}
    assert tokenizer.encode("") == tokenizer.encode_after("") == [] and tokenizer.decode([]) == ""


def test_surrogates(load):
    for name in ("sp", "neox", "llama3", "tiktoken"):
        tokenizer = load(name)
        assert tokenizer.encode("x\ud83dy\ude00") == tokenizer.encode("x\ufffdy\ufffd")
        assert tokenizer.encode_after("\udc00") == tokenizer.encode_after("\ufffd")
        assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")      # a pair is not lone


# ------------------------------------------------------------------------------------------------------------
# Streaming


@pytest.mark.parametrize("name", ["sp", "neox", "llama3", "tiktoken"])
def test_stream_gives_whole_characters(name, load):
    tokenizer = load(name)
    text = "né日本 👨‍👩‍👧 ok"
    stream = tokenizer.stream()
    pushed = [stream.push(id) for id in tokenizer.encode(text)]
    assert "".join(pushed) == text and stream.flush() == "" and "\ufffd" not in "".join(pushed)
    assert "" in pushed             # somewhere it had to wait for the rest of a character
    half = tokenizer.encode_after("👍")[:-1]
    stream = tokenizer.stream(continues=True)
    assert [stream.push(id) for id in half] == [""] * len(half) and "\ufffd" in stream.flush()


# ------------------------------------------------------------------------------------------------------------
# Special ids, stops, masks, files


def test_special_ids_of_each_kind(load):
    sp, neox, llama3, lines = (load(name) for name in ("sp", "neox", "llama3", "tiktoken"))
    assert (sp.bos_id, sp.eos_id, sp.adds_bos) == (1, 2, True)
    assert sp.special_ids == {"<s>": 1, "</s>": 2, "<|im_start|>": 3}
    assert (neox.bos_id, neox.eos_id, neox.adds_bos) == (None, 0, False)
    assert neox.special_ids == {"<|endoftext|>": 0, "<|padding|>": 1}
    assert (neox.prefix(empty=True), neox.prefix(empty=False)) == ([0], [])
    assert llama3.adds_bos
    assert llama3.bos_id == llama3.special_ids["<|begin_of_text|>"]
    assert llama3.prefix(empty=False) == llama3.prefix(empty=True) == [llama3.bos_id]
    count = lines.vocab_size - 256
    assert (lines.bos_id, lines.eos_id, lines.stop_ids) == (count, count + 1, {count + 1}) and lines.adds_bos
    assert sorted(lines.special_ids.values()) == list(range(count, count + 256))
    for name, offset in {"start_header_id": 6, "end_header_id": 7, "eom_id": 8, "eot_id": 9, "python_tag": 10,
                         "reserved_special_token_3": 11, "reserved_special_token_247": 255}.items():
        assert lines.special_ids[f"<|{name}|>"] == count + offset
    assert lines.decode([count, *lines.encode("cat"), count + 9, count + 1]) == "cat"


def test_shared_files_have_their_known_facts(load):
    neox, mistral, v3, stories = map(load, ("gpt-neox-20b", "mistral-v1", "mistral-v3", "stories260K"))
    assert (neox.vocab_size, neox.eos_id, neox.bos_id, neox.prefix(True)) == (50277, 0, None, [0])
    assert neox.sampling_mask(50304).tolist() == [True, False] + [True] * 50275 + [False] * 27
    assert neox.encode("Hello world!") == [12092, 1533, 2] and not neox.adds_bos
    assert mistral.encode("Hello world!") == [22557, 1526, 28808]
    assert v3.encode("Hello world!") == [23325, 2294, 29576]
    assert (mistral.vocab_size, mistral.bos_id, mistral.eos_id, mistral.adds_bos) == (32000, 1, 2, True)
    assert v3.vocab_size == 32768 and v3.special_ids["[INST]"] == 3 and v3.encode("[INST]")[0] != 3
    assert (stories.vocab_size, stories.stop_ids) == (512, {2})
    assert stories.sampling_mask(512).tolist() == [False] + [True] * 511
    assert load("tiktoken-small").bos_id == 2000 and load("tiktoken-small").vocab_size == 2256


def test_sampling_mask(load):
    sp = load("sp")
    mask = sp.sampling_mask(sp.vocab_size + 5)
    assert (sp.unk_id, sp.bos_id, sp.eos_id, sp.special_ids["<|im_start|>"]) == (0, 1, 2, 3)
    assert mask.tolist() == [False, True, True, False] + [True] * (sp.vocab_size - 4) + [False] * 5
    assert sp.sampling_mask(10).shape == (10,)      # a model with fewer rows is no reason to fail here
    assert sp.decode([10 ** 6, sp.bos_id, *sp.encode("cat"), sp.eos_id]) == "cat"


def test_ends_and_stops(folder_of, tmp_path):
    write(tmp_path, tokenizer__model=SPACED_MODEL)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.stop_ids, tokenizer.chat_template) == (2, {2}, None)
    n = tokenizer.vocab_size
    assert load_tokenizer(write(tmp_path, config__json={"eos_token_id": 5, "bos_token_id": 3})).bos_id == 3
    tokenizer = load_tokenizer(write(tmp_path, config__json={"eos_token_id": [7, 8], "bos_token_id": None}))
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.stop_ids) == (7, 1, {7, 8})
    write(tmp_path, generation_config__json={"eos_token_id": 9}, chat_template__jinja="{{ messages }}")
    write(tmp_path, tokenizer_config__json={
        "eos_token": {"content": "<|im_end|>", "special": True}, "bos_token": "<s>", "add_bos_token": False,
        "added_tokens_decoder": {"0": {"content": "<unk>", "special": True},
                                 "3": {"content": "<|im_start|>", "special": True},
                                 str(n): {"content": "<|im_end|>", "special": True},
                                 str(n + 2): {"content": "<think>", "special": False}}})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (n, {n, 7, 8, 9})
    assert tokenizer.adds_bos is False and tokenizer.prefix(True) == [1] and tokenizer.prefix(False) == []
    assert tokenizer.special_ids["<|im_end|>"] == n and tokenizer.vocab_size == n + 3
    assert tokenizer.chat_template
    assert tokenizer.decode([*tokenizer.encode("cat"), n + 2, n + 1, n]) == "cat<think>"
    assert tokenizer.sampling_mask(n + 9)[n:].tolist() == [True, False, True] + [False] * 6
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert [path.name for path in load_tokenizer(tmp_path).files] == [
        "chat_template.jinja", "generation_config.json", "tokenizer.model", "tokenizer_config.json"]


def test_tokenizer_model_goes_before_tokenizer_json(folder_of, tmp_path):
    write(tmp_path, tokenizer__json="broken", tokenizer__model=SPACED_MODEL)
    assert load_tokenizer(str(tmp_path)).encode("cat") == load_tokenizer(folder_of("sp")).encode("cat")


# ------------------------------------------------------------------------------------------------------------
# Broken files


def assert_refused(folder, *parts):
    """One InputError, a sentence that names the file, and no other exception."""
    with pytest.raises(InputError) as refusal:
        load_tokenizer(folder)
    message = str(refusal.value)
    assert all(str(part) in message for part in parts), message
    assert "\n" not in message and len(message) < 500


CHANGES = [      # (path of keys, new value or ... where the key is taken away)
    # What would give other ids than the library's, and is not supported.
    ("model dropout", 0.1), ("model end_of_word_suffix", "</w>"), ("model byte_fallback", True),
    ("model", {"type": "Unigram", "vocab": [["a", 0.0]]}), ("normalizer", {"type": "NFKC"}),
    ("pre_tokenizer", None), ("pre_tokenizer", {"type": "Metaspace"}),
    ("pre_tokenizer add_prefix_space", True),
    ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, BYTE_LEVEL]}),
    ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [split_by("(")["pretokenizers"][0], {
        "type": "Digits"}, BYTE_LEVEL]}),
    ("pre_tokenizer", split_by("x", invert=True)), ("pre_tokenizer", split_by("x", behavior="Removed")),
    ("added_tokens 1 lstrip", True), ("added_tokens 1 content", ""),
    # What is damaged.
    ("model", ...), ("model vocab", ["a"]), ("model vocab A", ...), ("model vocab ab", "7"),
    ("model vocab ab", True), ("model vocab ab", 0), ("model vocab ▁the", 999), ("model vocab xy", 999),
    ("model merges", ...),
    ("model merges 0", ["x", "yz"]), ("model merges 0", 7 * ["a"]), ("pre_tokenizer", split_by("(")),
    ("added_tokens 0 id", 65), ("added_tokens 0 content", ...), ("added_tokens 0 special", False),
    ("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|bos|>"}}]})]


@pytest.mark.parametrize("path, value", CHANGES)
def test_tokenizer_json_is_refused(path, value, tmp_path):
    root = small_json([["a", "b"], ["ab", "c"]], ignore_merges=True)
    end = root["added_tokens"][0]
    root["added_tokens"].append(dict(end, content="  ", id=end["id"] + 1, special=False))
    assert load_tokenizer(write(tmp_path, tokenizer__json=root)).encode("abc")
    *outer, last = [int(key) if key.isdigit() else key for key in path.split()]
    inner = functools.reduce(lambda value, key: value[key], outer, root)
    inner[last] = value
    if value is ...:
        del inner[last]
    assert_refused(write(tmp_path, tokenizer__json=root), tmp_path / "tokenizer.json")


@pytest.mark.parametrize("pattern, sound, text", [
    ("(x+x+)+(?!x)y", "axxxyb", "x" * 300), ("x*", "xx", "hello")])
def test_a_pattern_that_panics(pattern, sound, text, tmp_path):
    """tiktoken's regex panics where a pattern can be tried in a million ways, or matches no text at all."""
    root = small_json([]) | {"pre_tokenizer": split_by(pattern)}
    tokenizer = load_tokenizer(write(tmp_path, tokenizer__json=root))
    assert tokenizer.decode(tokenizer.encode(sound)) == sound
    with pytest.raises(InputError, match=f"tokenizer.json: .* does not cut '{text[:3]}"):
        tokenizer.encode(text)


@pytest.mark.parametrize("kind, name", [("sp", "tokenizer.model"), ("neox", "tokenizer.json")])
def test_truncated_and_wrong_bytes(kind, name, folder_of, tmp_path):
    path, content = tmp_path / name, (folder_of(kind) / name).read_bytes()
    for damaged in (b"", content[:1], content[:1000], content[:5000], content[:-30], b"\xff\xfe{}", b"[1]",
                    content + b"\x0a\x03\x0a\x01a", bytes(range(256)) * 10):
        path.write_bytes(damaged)
        assert_refused(tmp_path, path)
    path.unlink()
    path.mkdir()
    assert_refused(tmp_path, path)


@pytest.mark.parametrize("line, broken, place", [
    (3, b"not base64! 2", ", line 3"), (3, b"YWI=", ", line 3"), (300, b"YWJjZA== x", ", line 300"),
    (1, b"version https://git-lfs.github.com/spec/v1", ", line 1"), (2, b" 1", ", line 2"),
    (5, b"AA== 4", "ranks"), (400, b"enp6eg== 7", "ranks"), (66, b"enp6eg== 65", "0x41")])
def test_broken_tiktoken_lines(line, broken, place, tmp_path):
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"q%d" % n: 256 + n for n in range(200)}
    lines = tiktoken_lines(ranks).splitlines()
    assert load_tokenizer(write(tmp_path, tokenizer__model=b"\n".join(lines))).vocab_size == 456 + 256
    lines[line - 1] = broken
    assert_refused(write(tmp_path, tokenizer__model=b"\n".join(lines)), tmp_path / "tokenizer.model", place)


@pytest.mark.parametrize("name, content, key", [
    ("tokenizer_config.json", {"eos_token": "<|nowhere|>"}, "eos_token"),
    ("tokenizer_config.json", {"eos_token": ["</s>"]}, ""),
    ("tokenizer_config.json", {"add_bos_token": "yes"}, "add_bos_token"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "y"}}}, ""),
    ("tokenizer_config.json", {"added_tokens_decoder": {"-7": {"content": "y"}}}, "-7"),
    ("tokenizer_config.json", {"added_tokens_decoder": [1]}, ""),
    ("config.json", {"eos_token_id": "2"}, "eos_token_id"), ("config.json", {"eos_token_id": 999}, "999"),
    ("config.json", {"eos_token_id": [2, True]}, "eos_token_id"),
    ("generation_config.json", {"eos_token_id": [[2]]}, "eos_token_id"), ("generation_config.json", [], "")])
def test_broken_companions(name, content, key, folder_of, tmp_path):
    shutil.copy(folder_of("sp") / "tokenizer.model", tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    assert_refused(tmp_path, tmp_path / name, key)


def test_no_tokenizer(folder_of, tmp_path):
    assert_refused(tmp_path, tmp_path, "tokenizer.model or tokenizer.json")
    assert_refused(tmp_path / "nowhere", "nowhere")
    shutil.copy(folder_of("neox") / "tokenizer.json", tmp_path)
    write(tmp_path, tokenizer_config__json={"add_bos_token": True})
    assert_refused(tmp_path, tmp_path / "tokenizer_config.json", "bos_token")      # GPT-NeoX's kind has none
