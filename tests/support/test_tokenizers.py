"""Ids equal the reference libraries', text comes back, ends and stops are found, broken files are named.

Every kind is tested on tokenizers made here, and on published ones where OSPREY_DATA has them.
"""
import base64
import functools
import gzip
import io
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
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from support.cli import InputError
from support.tokenizer import BYTE_OF, LLAMA3_WORDS, load_tokenizer

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
    wrong = [row for row in zip(map(ascii, CLEAN), ids, expected, strict=True) if row[1] != row[2]]
    assert not wrong, f"{len(wrong)} of {len(CLEAN)} texts differ, first {wrong[0]}"


def write(folder, **files):
    """Files of a model folder; __ stands for the dot: tokenizer_config__json=…"""
    for name, content in files.items():
        content = content if isinstance(content, (bytes, str)) else json.dumps(content)
        content = content.encode() if isinstance(content, str) else content
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


# ------------------------------------------------------------------------------------------------------------
# Tokenizers made here

WORDS = re.findall(r"\S+", "the cat sat on a mat and it's 2024 naïve café Ärger 日本 they'll we've banana "
                   "bananas aaaa aaaaaaa Human: Assistant: hello help held helpless over under thunder")


def corpus():
    rng = random.Random(0)
    ends = ["", "\n", ".\n\n", "!  "]
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) + rng.choice(ends) for _ in range(400)]


def train_sentencepiece(squeeze=False):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, model_type="bpe", vocab_size=420,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=squeeze,
        control_symbols=["<|im_start|>"], hard_vocab_limit=False, minloglevel=2)
    return model.getvalue()


def byte_level(*splits, digits=None, nfc=False):
    """A byte-level BPE trained with `tokenizers`: GPT-NeoX's kind, or with patterns and digits before it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits]
    steps += [] if digits is None else [pre_tokenizers.Digits(individual_digits=digits)]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<|endoftext|>", "<|padding|>"],
                                  show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def neox_like():
    tokenizer = byte_level(nfc=True)
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in (5, 4, 3, 2)]
                         + [AddedToken("<think>", normalized=False), AddedToken("日本", normalized=True)])
    return json.loads(tokenizer.to_str())


def llama3_like():
    """With ids that are not in merge order, BOS by template, and words taken whole."""
    root = json.loads(byte_level(LLAMA3_WORDS).to_str())
    vocab, added = root["model"]["vocab"], root["added_tokens"]
    ids = random.Random(3).sample(range(len(vocab)), len(vocab))
    root["model"].update(ignore_merges=True, vocab={token: ids[id] for token, id in vocab.items()})
    root["added_tokens"] = [dict(token, id=ids[token["id"]]) for token in added]
    root["added_tokens"].append(dict(added[0], content="<|begin_of_text|>", id=len(vocab)))
    bos = "<|begin_of_text|>"
    template = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, len(vocab))])
    steps = [json.loads(step.__getstate__()) for step in (processors.ByteLevel(trim_offsets=False), template)]
    root["post_processor"] = {"type": "Sequence", "processors": steps}
    return root


def smollm_like():
    """Single digits, and no tokens for some bytes that text can have."""
    root = json.loads(byte_level(digits=True).to_str())
    gone = {char for char, byte in BYTE_OF.items() if byte in (4, 6, 0x13, 0x14, 0x16, 0x1d, 0xf1, 0xf2)}
    vocab = [token for token in root["model"]["vocab"] if not gone & set(token)]
    assert len(vocab) == len(root["model"]["vocab"]) - 8
    root["model"]["vocab"] = {token: id for id, token in enumerate(vocab)}
    return root


QWEN_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")       # as published with Qwen2
SPLITS = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥]+"]        # DeepSeek's kind, with Digits after them


def spaced(first_only, first_merges=()):
    """sentencepiece's tokenizer as transformers 5 writes it (Metaspace), or as 4 did (Prepend, Replace)."""
    source = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece())
    vocab = {source.id_to_piece(id): id for id in range(source.vocab_size())}
    merges = [*first_merges, *((piece[:i], piece[i:]) for piece in vocab if not piece.startswith("<")
              for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab)]
    vocab |= {"".join(pair): len(vocab) + n for n, pair in enumerate(first_merges)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<|im_start|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("日本", normalized=True)])
    if first_only:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                           decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return json.loads(tokenizer.to_str())


def tiktoken_ranks():
    """{bytes: rank} of a trained vocabulary, single bytes first."""
    vocab = json.loads(byte_level(LLAMA3_WORDS).to_str())["model"]["vocab"]
    pieces = [bytes(BYTE_OF[char] for char in token) for token in vocab if not token.startswith("<|")]
    return {piece: rank for rank, piece in enumerate(sorted(pieces, key=lambda piece: len(piece) > 1))}


def tiktoken_lines(ranks):
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in ranks.items())


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """{kind: folder}"""
    files = {"sp": {"tokenizer__model": train_sentencepiece()},
             "sp-squeeze": {"tokenizer__model": train_sentencepiece(squeeze=True)},
             "neox": {"tokenizer__json": neox_like()}, "llama3": {"tokenizer__json": llama3_like()},
             "smollm": {"tokenizer__json": smollm_like()},
             "qwen": {"tokenizer__json": json.loads(byte_level(QWEN_WORDS, nfc=True).to_str())},
             "splits": {"tokenizer__json": json.loads(byte_level(*SPLITS, digits=False).to_str())},
             "metaspace": {"tokenizer__json": spaced(first_only=True)},
             "prepend": {"tokenizer__json": spaced(first_only=False)},
             "tiktoken": {"tokenizer__model": tiktoken_lines(tiktoken_ranks())}}
    return {kind: write(tmp_path_factory.mktemp(kind), **content) for kind, content in files.items()}


SHARED = {"gpt-neox-20b": "tokenizers/gpt-neox-20b", "mistral-v1": "tokenizers/mistral-v1",
          "mistral-v3": "tokenizers/mistral-v3", "tiktoken-small": "tokenizers/tiktoken-small",
          "stories260K": "models/stories260K"}


@pytest.fixture(scope="session")
def folder_of(made):
    def find(name):
        if name not in made and not DATA.is_dir():
            pytest.skip(f"{DATA} is absent")
        return made[name] if name in made else DATA / SHARED[name]
    return find


@pytest.fixture(scope="session")
def load(folder_of):
    return functools.cache(lambda name: load_tokenizer(folder_of(name)))


SENTENCEPIECE = ["sp", "sp-squeeze", "mistral-v1", "mistral-v3", "stories260K"]
TOKENIZER_JSON = ["neox", "llama3", "qwen", "smollm", "splits", "gpt-neox-20b"]
SPACED = ["metaspace", "prepend"]
TIKTOKEN = ["tiktoken", "tiktoken-small"]
ALL = SENTENCEPIECE + TOKENIZER_JSON + SPACED + TIKTOKEN
# Those of which every text comes back.
WHOLE = [name for name in ALL if name not in ("sp-squeeze", "stories260K", "smollm", "prepend")]
NFC_KINDS = "neox", "qwen", "gpt-neox-20b"

# ------------------------------------------------------------------------------------------------------------
# Ids and text


def assert_decodes(tokenizer, ids, decode, least=0, front=lambda row: True):
    """Ids of texts and ids that no text has read as `decode` reads them, and a stream says the same."""
    rng = random.Random(2)          # broken UTF-8, control ids, word-starts at the front
    garbage = [rng.choices(range(least, tokenizer.vocab_size), k=4) + rng.choices(range(3, 300), k=4)
               for _ in range(3000)]
    rows = [*filter(front, garbage), *ids]
    assert [tokenizer.decode(row) for row in rows] == decode(rows)
    for row in rows[:500] + ids[:500]:
        for continues in (False, True):
            stream = tokenizer.stream(continues)
            assert "".join(map(stream.push, row)) + stream.flush() == tokenizer.decode(row, continues)


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece_is_the_library(name, load, folder_of):
    tokenizer = load(name)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder_of(name) / "tokenizer.model"))
    ids = [tokenizer.encode(text) for text in TEXTS]
    assert_same(ids, reference.encode(CLEAN))
    # A first piece of the byte 0x20 is a space to sentencepiece, to us a word-start. No text is encoded so.
    front = lambda row: reference.id_to_piece(next(id for id in row if id > 2)) != "<0x20>"
    assert_decodes(tokenizer, ids, reference.decode, least=1, front=front)


@pytest.mark.parametrize("name", TOKENIZER_JSON)
def test_tokenizer_json_is_the_library(name, load, folder_of):
    tokenizer = load(name)
    reference = tokenizers.Tokenizer.from_file(str(folder_of(name) / "tokenizer.json"))
    reference.encode_special_tokens = True      # special strings are plain text
    ids = [tokenizer.encode(text) for text in TEXTS]
    assert_same(ids, [encoding.ids for encoding in reference.encode_batch(CLEAN, add_special_tokens=False)])
    if name in WHOLE:
        assert [tokenizer.decode(row) for row in ids] == (NFC if name in NFC_KINDS else CLEAN)
    assert_decodes(tokenizer, ids, lambda rows: reference.decode_batch(rows, skip_special_tokens=True))


@pytest.mark.parametrize("name", SPACED)
def test_spaced_tokenizer_json_is_the_library(name, load, folder_of):
    tokenizer = load(name)
    reference = tokenizers.Tokenizer.from_file(str(folder_of(name) / "tokenizer.json"))
    reference.encode_special_tokens = True
    ids = [tokenizer.encode(text) for text in TEXTS]
    assert_same(ids, [encoding.ids for encoding in reference.encode_batch(CLEAN, add_special_tokens=False)])
    assert [tokenizer.decode(row) for row in ids] == reference.decode_batch(ids)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 2, True)


@pytest.mark.parametrize("normalizer, step", [
    (None, {"prepend_scheme": "always", "split": False}), (None, {"prepend_scheme": "always", "split": True}),
    (None, {"prepend_scheme": "never", "split": False}), ({"type": "Replace"}, None)])
@pytest.mark.parametrize("crossing", [False, True])
def test_spaces_of_other_files(normalizer, step, crossing, tmp_path):
    """Other ways to write a space, and a token that goes on after one: then no text is cut before merging."""
    root = spaced(first_only=True, first_merges=[("e", "▁")] if crossing else [])
    root["normalizer"] = normalizer and {**normalizer, "pattern": {"String": " "}, "content": "▁"}
    root["pre_tokenizer"] = step and {"type": "Metaspace", "replacement": "▁", **step}
    tokenizer = load_tokenizer(write(tmp_path, tokenizer__json=root))
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    reference.encode_special_tokens = True
    expected = reference.encode_batch(CLEAN[:2000] + ["the cat"], add_special_tokens=False)
    assert [tokenizer.encode(text) for text in TEXTS[:2000] + ["the cat"]] == [row.ids for row in expected]
    assert ("e▁" in expected[-1].tokens) == (crossing and not (step or {}).get("split"))


@pytest.mark.slow
def test_smollm2_is_the_library():
    """SmolLM2-135M-Instruct's own files, also on 5,000 dialogues where OSPREY_DATA has them."""
    folder = Path(os.environ.get("OSPREY_SMOLLM2", "nowhere"))
    if not folder.is_dir():
        pytest.skip("OSPREY_SMOLLM2 names no folder of SmolLM2-135M-Instruct")
    tokenizer = load_tokenizer(folder)
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.encode_special_tokens = True
    texts = CLEAN + [json.loads(line)[key] for path in sorted((DATA / "hh-rlhf").glob("*.gz"))
                     for line in gzip.open(path) for key in ("chosen", "rejected")][:5000]
    expected = [encoding.ids for encoding in reference.encode_batch(texts)]
    assert list(map(tokenizer.encode, texts)) == expected
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 2, False)
    assert tokenizer.vocab_size == 49152


def test_bytes_without_a_token(tmp_path):
    """Words are cut first, then such bytes are left out, then the others merge, also across the gap."""
    root = small_json([["/", "-"], ["a", "b"]])
    del root["model"]["vocab"]["Ą"]
    tokenizer = load_tokenizer(write(tmp_path, tokenizer__json=root))
    reference = tokenizers.Tokenizer.from_str(json.dumps(root))
    texts = ["/\x04-", "a\x04b", "\x04", "/\x04\x04- a  \x04b", "/-"]
    assert [tokenizer.encode(text) for text in texts] == [row.ids for row in reference.encode_batch(texts)]
    assert len(tokenizer.encode(texts[0])) == 1 and len(tokenizer.encode(texts[1])) == 2


@pytest.mark.parametrize("name", TIKTOKEN)
def test_tiktoken_file_is_the_library(name, load, folder_of):
    tokenizer = load(name)
    lines = (folder_of(name) / "tokenizer.model").read_text().splitlines()
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
    reference = tiktoken.Encoding("reference", mergeable_ranks=ranks, special_tokens={}, pat_str=(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"))
    ids = [tokenizer.encode(text) for text in TEXTS]
    assert_same(ids, reference.encode_ordinary_batch(CLEAN, num_threads=1))
    assert [tokenizer.decode(row) for row in ids] == CLEAN
    plain = range(len(ranks))       # special ids read as nothing
    assert_decodes(tokenizer, ids, lambda rows: reference.decode_batch(
        [[id for id in row if id in plain] for row in rows], num_threads=1))


def test_llama3_json_and_tiktoken_lines_agree(tmp_path):
    """Llama 3's tokenizer.json has as merges all splits of a token into two, by its rank, then by theirs."""
    ranks = tiktoken_ranks()
    visible = {byte: char for char, byte in BYTE_OF.items()}
    as_text = {piece: "".join(visible[byte] for byte in piece) for piece in ranks}
    splits = [(piece, piece[:i], piece[i:]) for piece in ranks for i in range(1, len(piece))]
    merges = [(ranks[whole], ranks[left], ranks[right], [as_text[left], as_text[right]])
              for whole, left, right in splits if left in ranks and right in ranks]
    root = llama3_like()
    root["model"]["vocab"] = {as_text[piece]: rank for piece, rank in ranks.items()}
    root["model"]["merges"] = [merge[-1] for merge in sorted(merges)]
    assert len(merges) > len(ranks) - 256
    root["added_tokens"] = [dict(root["added_tokens"][0], content=name, id=len(ranks) + n)
                            for n, name in enumerate(["<|begin_of_text|>", "<|end_of_text|>"])]
    (tmp_path / "json").mkdir()
    (tmp_path / "lines").mkdir()
    from_json = load_tokenizer(write(tmp_path / "json", tokenizer__json=root))
    from_lines = load_tokenizer(write(tmp_path / "lines", tokenizer__model=tiktoken_lines(ranks)))
    assert_same([from_json.encode(text) for text in TEXTS], [from_lines.encode(text) for text in TEXTS])
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
        reference = tokenizers.Tokenizer.from_str(json.dumps(root))
        assert list(map(tokenizer.encode, texts)) == [row.ids for row in reference.encode_batch(texts)]
        compared += 1
    assert compared > 40


def test_pattern_that_leaves_text_over(tmp_path):
    root = small_json([["a", "b"], ["1", "2"]]) | {'pre_tokenizer': split_by("[a-z]+")}
    tokenizer = load_tokenizer(write(tmp_path, tokenizer__json=root))
    reference = tokenizers.Tokenizer.from_str(json.dumps(root))
    texts = ["ab12ab12", "1 2\n12ab", "...", "AB12 ab"]
    assert [tokenizer.encode(text) for text in texts] == [row.ids for row in reference.encode_batch(texts)]


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
    sentinel = tokenizer.encode("\n")       # a byte piece in these models: it merges with nothing
    for text in CLEAN[:4000]:
        assert sentinel + tokenizer.encode_after(text) == tokenizer.encode("\n" + text)


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
    assert llama3.bos_id == llama3.special_ids["<|begin_of_text|>"] == llama3.vocab_size - 1
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


def test_ends_and_stops(made, tmp_path):
    write(tmp_path, tokenizer__model=(made["sp"] / "tokenizer.model").read_bytes())
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


def test_tokenizer_config_decides_for_tokenizer_json(made, tmp_path):
    shutil.copy(made["neox"] / "tokenizer.json", tmp_path)
    write(tmp_path, config__json={"eos_token_id": 1}, tokenizer_config__json={
        "bos_token": "<|padding|>", "eos_token": "<|endoftext|>", "add_bos_token": True,
        "chat_template": "{{ messages }}"})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (1, 0, {0, 1})
    assert tokenizer.adds_bos and tokenizer.chat_template


def test_tokenizer_model_goes_before_tokenizer_json(made, tmp_path):
    write(tmp_path, tokenizer__json="broken", tokenizer__model=(made["sp"] / "tokenizer.model").read_bytes())
    assert load_tokenizer(str(tmp_path)).encode("cat") == load_tokenizer(made["sp"]).encode("cat")


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
def test_truncated_and_wrong_bytes(kind, name, made, tmp_path):
    path, content = tmp_path / name, (made[kind] / name).read_bytes()
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
def test_broken_companions(name, content, key, made, tmp_path):
    shutil.copy(made["sp"] / "tokenizer.model", tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    assert_refused(tmp_path, tmp_path / name, key)


def test_no_tokenizer(made, tmp_path):
    assert_refused(tmp_path, tmp_path, "tokenizer.model or tokenizer.json")
    assert_refused(tmp_path / "nowhere", "nowhere")
    shutil.copy(made["neox"] / "tokenizer.json", tmp_path)
    write(tmp_path, tokenizer_config__json={"add_bos_token": True})
    assert_refused(tmp_path, tmp_path / "tokenizer_config.json", "bos_token")      # GPT-NeoX's kind has none
