"""Tokenizers: ids equal the reference libraries', text comes back, ends and stops are found, broken files are named.

The files in ../shared/data are used where they are at hand; every kind is also tested on tokenizers made here.
"""
import base64
import io
import json
import os
import random
import shutil
import time
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

import data
from support.cli import InputError
from data import load_tokenizer

DATA = Path(os.environ.get("OSPREY_DATA", Path(__file__).parents[3] / "shared/data"))

# ---------------------------------------------------------------------------------------------------------------------
# Text

SPECIAL_STRINGS = ["</s>", "<s>", "<unk>", "<|endoftext|>", "<|padding|>", "<|begin_of_text|>", "<|eot_id|>", "[INST]",
                   "<|im_start|>", "<0x0A>"]
ASSIGNED = [char for char in map(chr, range(0x110000)) if unicodedata.category(char) not in ("Cn", "Cs")]
POOLS = [list("abcdefghijklmnopqrstuvwxyz ETAOIN"), list(" \n\t\r"), [" "], list("0123456789.,!?'\"-()"),
         ["'s", "'LL", "'re", " the", " Human:", "\n\nAssistant:"],
         ["é", "ü", "e\u0301", "o\u0308", "\u0323\u0307", "\u1100\u1161\u11a8", "\u212b", "\ufb01"],
         list("😀👍🏽👨‍👩‍👧❤️🇩🇪"), list("日本語中文한국어ไทยعربيहिन्दी"),
         [chr(code) for code in range(32)] + ["\x7f", "\x85", "\xa0", "\u2028", "\u200b", "\u3000", "\ufeff"],
         ["\udc80", "\udfff", "\ud800 "], ["<think>", "日本", "日本日", "a", " "], SPECIAL_STRINGS, ASSIGNED]
FIXED = ["", " ", "  ", "a", " a", "a ", "\n", "\n\nHuman: hi\n\nAssistant:", " " * 200, "\t\t x", "é", "e\u0301",
         "👨‍👩‍👧", "x" * 3000, "\x00", "\ud800", "a\udfffb", "It's I'LL we'VE", "1234567 12", "\r\n\r\n",
         *SPECIAL_STRINGS]


def random_texts(count, seed):
    """Texts of up to six runs, each from one pool."""
    rng, texts = random.Random(seed), []
    for _ in range(count):
        pools = rng.choices(POOLS, k=rng.randint(0, 6))
        texts.append("".join("".join(rng.choices(pool, k=rng.randint(1, rng.choice((2, 6, 30))))) for pool in pools))
    return FIXED + texts


def repaired(text):
    return "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in text)


TEXTS = random_texts(20_000, seed=1)
CLEAN = [repaired(text) for text in TEXTS]      # what the reference libraries are given: some refuse surrogates


def assert_same(ids, expected):
    wrong = [(ascii(text), a, b) for text, a, b in zip(CLEAN, ids, expected, strict=True) if list(a) != list(b)]
    assert not wrong, f"{len(wrong)} of {len(CLEAN)} texts differ, first {wrong[0]}"


def assert_streams(tokenizer, id_lists):
    """Whole characters only, and in sum what decode says."""
    for continues in (False, True):
        for ids in id_lists:
            stream = tokenizer.stream(continues)
            pushed = [stream.push(id) for id in ids]
            assert "".join(pushed) + stream.flush() == tokenizer.decode(ids, continues)


def write(folder, **files):
    """Files of a model folder; __ stands for the dot: tokenizer_config__json=…"""
    for name, content in files.items():
        content = content if isinstance(content, (bytes, str)) else json.dumps(content)
        content = content.encode() if isinstance(content, str) else content
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers made here

def corpus():
    rng = random.Random(0)
    words = ("the cat sat on a mat and it's 2024 naïve café Ärger 日本 they'll we've banana bananas aaaa aaaaaaa "
             "Human: Assistant: hello help held helpless over under thunder wonder").split()
    ends = ["", "\n", ".\n\n", "!  "]
    return [" ".join(rng.choices(words, k=rng.randint(3, 12))) + rng.choice(ends) for _ in range(400)]


def train_sentencepiece(**options):
    options = {"vocab_size": 420, "byte_fallback": True, "normalization_rule_name": "identity",
               "remove_extra_whitespaces": False, "control_symbols": ["<|im_start|>"], **options}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus()), model_writer=model, model_type="bpe",
                                             hard_vocab_limit=False, minloglevel=2, **options)
    return model.getvalue()


def byte_level(split=None, nfc=False):
    """A trained byte-level BPE of the `tokenizers` library: GPT-NeoX's kind, or Llama 3's with a split pattern."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if split is None else (
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"),
                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<|endoftext|>", "<|padding|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def neox_like():
    tokenizer = byte_level(nfc=True)
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in (5, 4, 3, 2)]
                         + [AddedToken("<think>", normalized=False), AddedToken("日本", normalized=True)])
    return json.loads(tokenizer.to_str())


def llama3_like(seed=3):
    """With ids that are not in merge order, BOS by template, and words taken whole."""
    root = json.loads(byte_level(split=data.LLAMA3_WORDS).to_str())
    vocab, ids = root["model"]["vocab"], list(range(len(root["model"]["vocab"])))
    random.Random(seed).shuffle(ids)
    root["model"]["vocab"] = {token: ids[id] for token, id in vocab.items()}
    root["added_tokens"] = [dict(token, id=root["model"]["vocab"][token["content"]]) for token in root["added_tokens"]]
    root["added_tokens"].append(dict(root["added_tokens"][0], content="<|begin_of_text|>", id=len(vocab)))
    root["model"]["ignore_merges"] = True
    root["post_processor"] = {"type": "Sequence", "processors": [
        json.loads(processors.ByteLevel(trim_offsets=False).__getstate__()),
        {"type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
         "single": [{"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}}],
         "special_tokens": {"<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [len(vocab)],
                                                  "tokens": ["<|begin_of_text|>"]}}}]}
    return root


def tiktoken_ranks():
    """{bytes: rank} of a trained vocabulary, single bytes first."""
    byte_of, vocab = data.BYTE_OF, json.loads(byte_level(split=data.LLAMA3_WORDS).to_str())["model"]["vocab"]
    vocab = [token for token in vocab if token not in ("<|endoftext|>", "<|padding|>")]
    pieces = [bytes(byte_of[char] for char in token) for token in vocab]
    return {piece: rank for rank, piece in enumerate(sorted(pieces, key=lambda piece: len(piece) > 1))}


def tiktoken_lines(ranks):
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in ranks.items())


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """{kind: folder}"""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("sp", "sp-squeeze", "neox", "llama3", "tiktoken")}
    write(folders["sp"], tokenizer__model=train_sentencepiece())
    write(folders["sp-squeeze"], tokenizer__model=train_sentencepiece(remove_extra_whitespaces=True))
    write(folders["neox"], tokenizer__json=neox_like())
    write(folders["llama3"], tokenizer__json=llama3_like())
    write(folders["tiktoken"], tokenizer__model=tiktoken_lines(tiktoken_ranks()))
    return folders


SHARED = {"gpt-neox-20b": "tokenizers/gpt-neox-20b", "mistral-v1": "tokenizers/mistral-v1",
          "mistral-v3": "tokenizers/mistral-v3", "tiktoken-small": "tokenizers/tiktoken-small",
          "stories260K": "models/stories260K"}
LOADED = {}


@pytest.fixture
def folder_of(made):
    def find(name):
        if name in made:
            return made[name]
        if not DATA.is_dir():
            pytest.skip("shared/data is absent")
        return DATA / SHARED[name]
    return find


@pytest.fixture
def load(folder_of):
    def once(name):
        if name not in LOADED:
            LOADED[name] = load_tokenizer(folder_of(name))
        return LOADED[name]
    return once


SENTENCEPIECE = ["sp", "sp-squeeze", "mistral-v1", "mistral-v3", "stories260K"]
TOKENIZER_JSON = ["neox", "llama3", "gpt-neox-20b"]
TIKTOKEN = ["tiktoken", "tiktoken-small"]
ALL = SENTENCEPIECE + TOKENIZER_JSON + TIKTOKEN

# ---------------------------------------------------------------------------------------------------------------------
# Ids and text


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece_is_the_library(name, load, folder_of):
    tokenizer = load(name)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder_of(name) / "tokenizer.model"))
    ids = [tokenizer.encode(text) for text in TEXTS]
    assert_same(ids, reference.encode(CLEAN))
    assert [tokenizer.decode(row) for row in ids] == reference.decode(ids)
    rng = random.Random(2)          # ids no text has: broken UTF-8, control ids, word-starts at the front
    garbage = [rng.choices(range(1, tokenizer.vocab_size), k=4) + rng.choices(range(3, 300), k=4) for _ in range(3000)]
    # A first piece of the byte 0x20 is a space to sentencepiece, but to us a word-start. No text is encoded that way.
    garbage = [row for row in garbage if reference.id_to_piece(next(id for id in row if id > 2)) != "<0x20>"]
    assert [tokenizer.decode(row) for row in garbage] == reference.decode(garbage)
    assert_streams(tokenizer, garbage[:500] + ids[:500])


@pytest.mark.parametrize("name", TOKENIZER_JSON)
def test_tokenizer_json_is_the_library(name, load, folder_of):
    tokenizer = load(name)
    reference = tokenizers.Tokenizer.from_file(str(folder_of(name) / "tokenizer.json"))
    reference.encode_special_tokens = True      # special strings are plain text
    ids = [tokenizer.encode(text) for text in TEXTS]
    assert_same(ids, [encoding.ids for encoding in reference.encode_batch(CLEAN, add_special_tokens=False)])
    plain = [unicodedata.normalize("NFC", text) if "neox" in name else text for text in CLEAN]
    assert [tokenizer.decode(row) for row in ids] == plain
    rng = random.Random(2)
    garbage = [rng.choices(range(tokenizer.vocab_size), k=8) for _ in range(3000)]
    assert [tokenizer.decode(row) for row in garbage] == reference.decode_batch(garbage, skip_special_tokens=True)
    assert_streams(tokenizer, garbage[:500] + ids[:500])


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
    rng = random.Random(2)
    garbage = [rng.choices(range(len(ranks)), k=8) for _ in range(3000)]
    assert [tokenizer.decode(row) for row in garbage] == reference.decode_batch(garbage, num_threads=1)
    assert_streams(tokenizer, garbage[:500] + ids[:500])


@pytest.mark.parametrize("name, ids", [("gpt-neox-20b", [12092, 1533, 2]), ("mistral-v1", [22557, 1526, 28808]),
                                       ("mistral-v3", [23325, 2294, 29576])])
def test_known_ids(name, ids, load):
    assert load(name).encode("Hello world!") == ids


def test_llama3_json_and_tiktoken_lines_agree(tmp_path):
    """Llama 3's tokenizer.json has as merges all splits of a token into two tokens, by its rank and then by theirs."""
    ranks = tiktoken_ranks()
    visible = {byte: char for char, byte in data.BYTE_OF.items()}
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


def small_json(merges, extra=(), **model):
    """A tokenizer.json over all bytes with hand-made merges; `extra` are vocabulary entries without a merge."""
    vocab = dict.fromkeys([*data.BYTE_OF, *("".join(merge) for merge in merges), *extra])
    model = {"type": "BPE", "vocab": {token: id for id, token in enumerate(vocab)}, "merges": merges, **model}
    return {"version": "1.0", "added_tokens": [{"id": len(vocab), "content": "<|endoftext|>", "special": True,
            "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}], "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
            "post_processor": None, "decoder": None, "model": model}


def test_pairs_decide_and_not_what_they_make(tmp_path):
    """b+c goes first, so that a+b+c is never `abc`, although `abc` is a token that tiktoken alone would take."""
    tokenizer = load_tokenizer(write(tmp_path, tokenizer__json=small_json([["b", "c"], ["a", "b"], ["ab", "c"]])))
    vocab = small_json([["b", "c"], ["a", "b"], ["ab", "c"]])["model"]["vocab"]
    assert tokenizer.encode("abc") == [vocab["a"], vocab["bc"]]
    assert tokenizer.decode([vocab["abc"]]) == "abc"


def test_any_merges_in_any_order(tmp_path):
    """Merges made up at random, most of which no training would give, in an order that no training would give."""
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
        texts = ["".join(rng.choices("abc", k=rng.randint(1, 20))) + rng.choice(["", " x"]) for _ in range(150)]
        texts.append("cacab")                           # a token as it stands, for which ignore_merges needs no merges
        try:
            tokenizer = load_tokenizer(write(tmp_path, tokenizer__json=root))
        except InputError as error:                     # the one thing tiktoken cannot be told
            assert root["model"]["ignore_merges"] and "model.merges lacks" in str(error)
            continue
        reference = tokenizers.Tokenizer.from_str(json.dumps(root))
        assert [tokenizer.encode(text) for text in texts] == [row.ids for row in reference.encode_batch(texts)]
        compared += 1
    assert compared > 40


def test_pattern_that_leaves_text_over(tmp_path):
    root = small_json([["a", "b"], ["1", "2"]])
    root["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}
    tokenizer = load_tokenizer(write(tmp_path, tokenizer__json=root))
    reference = tokenizers.Tokenizer.from_str(json.dumps(root))
    texts = ["ab12ab12", "1 2\n12ab", "...", "AB12 ab"]
    assert [tokenizer.encode(text) for text in texts] == [row.ids for row in reference.encode_batch(texts)]


def test_merges_written_as_strings(tmp_path):
    pairs = [["a", "b"], ["ab", "c"]]
    root = small_json(pairs)
    expected = load_tokenizer(write(tmp_path, tokenizer__json=root)).encode("abcab")
    root["model"]["merges"] = [" ".join(pair) for pair in pairs]
    assert load_tokenizer(write(tmp_path, tokenizer__json=root)).encode("abcab") == expected and len(expected) == 2


def test_runs_of_spaces_are_the_longest_added_token(load):
    tokenizer = load("neox")
    spaces = [tokenizer.encode(" " * n) for n in range(2, 6)]
    assert all(len(ids) == 1 for ids in spaces)
    assert tokenizer.encode(" " * 9 + "cat") == spaces[3] + spaces[2] + tokenizer.encode("cat")


@pytest.mark.parametrize("name", ALL)
def test_very_long_runs(name, load):
    tokenizer, start = load(name), time.monotonic()
    for text in ("a" * 300_000, "-=" * 100_000, " " * 1_200_000 + "a"):
        text = " a" if text[0] == " " and tokenizer.encode(" ") == [] else text          # stories260K keeps one space
        assert tokenizer.decode(tokenizer.encode_after(text), continues=True) == text
    assert time.monotonic() - start < 20


# ---------------------------------------------------------------------------------------------------------------------
# Joints


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("sp-squeeze", "stories260K")])
def test_a_continuation_comes_back_as_it_is(name, load):
    tokenizer = load(name)
    for text in CLEAN[:4000]:
        text = unicodedata.normalize("NFC", text) if "neox" in name else text
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
def test_encode_after_is_encoding_behind_a_sentinel(name, load):
    tokenizer = load(name)
    sentinel = tokenizer.encode("\n")                       # a byte piece in these models: it merges with nothing
    for text in CLEAN[:4000]:
        assert sentinel + tokenizer.encode_after(text) == tokenizer.encode("\n" + text)


def test_squeezing_model_keeps_the_space_before_a_word(load):
    """stories260K's kind throws away spaces at both ends, and with them the space between prompt and response."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Streaming


@pytest.mark.parametrize("name", ["sp", "neox", "llama3", "tiktoken"])
def test_stream_gives_whole_characters(name, load):
    tokenizer = load(name)
    text = "né日本 👨‍👩‍👧 ok"
    stream = tokenizer.stream()
    pushed = [stream.push(id) for id in tokenizer.encode(text)]
    assert "".join(pushed) == text and stream.flush() == "" and "\ufffd" not in "".join(pushed)
    assert "" in pushed                                     # somewhere it had to wait for the rest of a character
    half = tokenizer.encode_after("👍")[:-1]
    stream = tokenizer.stream(continues=True)
    assert [stream.push(id) for id in half] == [""] * len(half) and "\ufffd" in stream.flush()


# ---------------------------------------------------------------------------------------------------------------------
# Special ids, stops, masks, files


def test_special_ids_of_each_kind(load):
    sp, neox, llama3, lines = (load(name) for name in ("sp", "neox", "llama3", "tiktoken"))
    assert (sp.bos_id, sp.eos_id, sp.adds_bos) == (1, 2, True)
    assert sp.special_ids.items() >= {"<s>": 1, "</s>": 2, "<|im_start|>": 3}.items() and "<unk>" not in sp.special_ids
    assert (neox.bos_id, neox.eos_id, neox.adds_bos) == (None, 0, False)
    assert neox.special_ids == {"<|endoftext|>": 0, "<|padding|>": 1}
    assert (neox.prefix(empty=True), neox.prefix(empty=False)) == ([0], [])
    assert llama3.adds_bos and llama3.bos_id == llama3.special_ids["<|begin_of_text|>"] == llama3.vocab_size - 1
    assert llama3.prefix(empty=False) == llama3.prefix(empty=True) == [llama3.bos_id]
    count = lines.vocab_size - 256
    assert (lines.bos_id, lines.eos_id, lines.adds_bos, lines.stop_ids) == (count, count + 1, True, {count + 1})
    assert len(lines.special_ids) == 256 and sorted(lines.special_ids.values()) == list(range(count, count + 256))
    for name, offset in {"start_header_id": 6, "end_header_id": 7, "eom_id": 8, "eot_id": 9, "python_tag": 10,
                         "reserved_special_token_3": 11, "reserved_special_token_247": 255}.items():
        assert lines.special_ids[f"<|{name}|>"] == count + offset
    assert lines.decode([count, *lines.encode("cat"), count + 9, count + 1]) == "cat"


def test_shared_files_have_their_known_facts(load):
    neox, mistral, v3, stories = (load(name) for name in ("gpt-neox-20b", "mistral-v1", "mistral-v3", "stories260K"))
    assert (neox.vocab_size, neox.eos_id, neox.bos_id, neox.prefix(True), neox.adds_bos) == (50277, 0, None, [0], False)
    mask = neox.sampling_mask(50304)
    assert mask.shape == (50304,) and mask[0] and not mask[1] and mask[2:50277].all() and not mask[50277:].any()
    assert (mistral.vocab_size, mistral.bos_id, mistral.eos_id, mistral.adds_bos) == (32000, 1, 2, True)
    assert v3.vocab_size == 32768 and v3.special_ids["[INST]"] == 3 and v3.encode("[INST]")[0] != 3
    assert (stories.vocab_size, stories.stop_ids) == (512, {2})
    assert stories.sampling_mask(512).tolist() == [False] + [True] * 511
    assert load("tiktoken-small").bos_id == 2000 and load("tiktoken-small").vocab_size == 2256


def test_sampling_mask(load):
    sp = load("sp")
    mask = sp.sampling_mask(sp.vocab_size + 5)
    assert not mask[sp.unk_id] and mask[sp.bos_id] and mask[sp.eos_id] and not mask[sp.special_ids["<|im_start|>"]]
    assert mask[4:sp.vocab_size].all() and not mask[sp.vocab_size:].any()
    assert sp.sampling_mask(10).shape == (10,)              # a model with fewer rows is no reason to fail here
    assert sp.decode([10 ** 6, sp.bos_id, *sp.encode("cat"), sp.eos_id]) == "cat"


def test_ends_and_stops(made, tmp_path):
    write(tmp_path, tokenizer__model=(made["sp"] / "tokenizer.model").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.stop_ids, tokenizer.chat_template) == (2, {2}, False)
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
    assert tokenizer.special_ids["<|im_end|>"] == n and tokenizer.vocab_size == n + 3 and tokenizer.chat_template
    assert tokenizer.decode([*tokenizer.encode("cat"), n + 2, n + 1, n]) == "cat<think>"
    assert tokenizer.sampling_mask(n + 9)[n:].tolist() == [True, False, True] + [False] * 6
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert [path.name for path in load_tokenizer(tmp_path).files] == [
        "chat_template.jinja", "generation_config.json", "tokenizer.model", "tokenizer_config.json"]


def test_tokenizer_config_decides_for_tokenizer_json(made, tmp_path):
    write(tmp_path, tokenizer__json=(made["neox"] / "tokenizer.json").read_bytes(), config__json={"eos_token_id": 0},
          tokenizer_config__json={"bos_token": "<|padding|>", "eos_token": "<|endoftext|>", "add_bos_token": True,
                                  "chat_template": "{{ messages }}"})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos, tokenizer.chat_template) == (1, 0, True, True)


def test_tokenizer_model_goes_before_tokenizer_json(made, tmp_path):
    write(tmp_path, tokenizer__json="broken", tokenizer__model=(made["sp"] / "tokenizer.model").read_bytes())
    assert load_tokenizer(str(tmp_path)).encode("cat") == load_tokenizer(made["sp"]).encode("cat")


# ---------------------------------------------------------------------------------------------------------------------
# Broken files


def broken_json(change):
    root = small_json([["a", "b"], ["ab", "c"]])
    end = root["added_tokens"][0]
    root["added_tokens"].append(dict(end, content="  ", id=end["id"] + 1, special=False))
    change(root)
    return root


BROKEN_JSON = {
    "model is missing": lambda root: root.pop("model"),
    "model.vocab": lambda root: root["model"].update(vocab=["a"]),
    "model.merges": lambda root: root["model"].pop("merges"),
    "model.merges[1]": lambda root: root["model"]["merges"].insert(1, ["x", "yz"]),
    "model.merges[0]": lambda root: root["model"]["merges"].insert(0, 7 * ["a"]),
    "the byte 0x41": lambda root: root["model"]["vocab"].pop("A"),
    "'ab', which is not an id": lambda root: root["model"]["vocab"].update(ab="7"),
    "one id to two tokens": lambda root: root["model"]["vocab"].update(ab=0),
    "alphabet of byte-level BPE": lambda root: root["model"]["vocab"].update({"▁the": 999}),
    "model.merges lacks ['x', 'y']": lambda root: root["model"].update(
        ignore_merges=True, vocab=root["model"]["vocab"] | {"xy": 999}),
    "model.dropout": lambda root: root["model"].update(dropout=0.1),
    "model.end_of_word_suffix": lambda root: root["model"].update(end_of_word_suffix="</w>"),
    "normalizer 'NFKC'": lambda root: root.update(normalizer={"type": "NFKC"}),
    "is not byte-level BPE (model 'Unigram'": lambda root: root.update(model={"type": "Unigram", "vocab": [["a", 0.0]]}),
    "comes with a tokenizer.model": lambda root: root["model"].update(byte_fallback=True),
    "pre_tokenizer 'Metaspace'": lambda root: root.update(pre_tokenizer={"type": "Metaspace", "replacement": "▁"}),
    "pre_tokenizer None": lambda root: root.update(pre_tokenizer=None),
    "add_prefix_space": lambda root: root["pre_tokenizer"].update(add_prefix_space=True),
    "unusable pattern": lambda root: root.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
        dict(root["pre_tokenizer"], use_regex=False)]}),
    "that does not cut": lambda root: root.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "x*"}, "behavior": "Isolated", "invert": False},
        dict(root["pre_tokenizer"], use_regex=False)]}),
    "one isolated Split": lambda root: root.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, root["pre_tokenizer"]]}),
    "added_tokens[1] '  ': single_word, lstrip, rstrip": lambda root: root["added_tokens"][1].update(lstrip=True),
    "added_tokens[0] '<|endoftext|>' cannot have the id 65": lambda root: root["added_tokens"][0].update(id=65),
    "'content'": lambda root: root["added_tokens"][0].pop("content"),
    "names no end-of-text token": lambda root: root["added_tokens"].pop(0),
    "'<|bos|>'": lambda root: root.update(post_processor={"type": "TemplateProcessing",
                                                          "single": [{"SpecialToken": {"id": "<|bos|>"}}]}),
}


def assert_refused(folder, *parts):
    with pytest.raises(InputError) as refusal:
        load_tokenizer(folder)
    message = str(refusal.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message and len(message) < 500


@pytest.mark.parametrize("message", BROKEN_JSON)
def test_broken_tokenizer_json(message, tmp_path):
    assert load_tokenizer(write(tmp_path, tokenizer__json=broken_json(lambda root: None))).encode("abc")
    write(tmp_path, tokenizer__json=broken_json(BROKEN_JSON[message]))
    assert_refused(tmp_path, str(tmp_path / "tokenizer.json"), message)


def test_truncated_tokenizer_json(made, tmp_path):
    content = (made["neox"] / "tokenizer.json").read_bytes()
    for end in (0, 1, 100, len(content) // 2, len(content) - 2):
        write(tmp_path, tokenizer__json=content[:end])
        assert_refused(tmp_path, str(tmp_path / "tokenizer.json"), "not valid JSON")
    assert_refused(write(tmp_path, tokenizer__json=b"\xff\xfe{}"), "tokenizer.json", "not valid JSON")
    assert_refused(write(tmp_path, tokenizer__json=b"[1]"), "tokenizer.json", "does not hold a JSON object")


def test_pattern_with_too_many_ways(tmp_path):
    """tiktoken's regex gives up in a text on which a pattern can be tried in a million ways; the text is named."""
    root = small_json([])
    root["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "(x+x+)+(?!x)y"}, "behavior": "Isolated", "invert": False},
        dict(root["pre_tokenizer"], use_regex=False)]}
    tokenizer = load_tokenizer(write(tmp_path, tokenizer__json=root))
    assert tokenizer.decode(tokenizer.encode("axxxyb")) == "axxxyb"
    with pytest.raises(InputError, match="tokenizer.json: pre_tokenizer has a pattern that does not cut 'xxx"):
        tokenizer.encode("x" * 300)


def test_broken_sentencepiece_names_the_place(made, tmp_path):
    content = (made["sp"] / "tokenizer.model").read_bytes()
    assert_refused(write(tmp_path, tokenizer__model=content[:1000]), "tokenizer.model", "byte ", ", behind piece ")
    assert_refused(write(tmp_path, tokenizer__model=content + b"\x0a\x03\x0a\x01a"), "tokenizer.model", "piece ", " is b'a', ")


def test_broken_sentencepiece(made, tmp_path):
    content = (made["sp"] / "tokenizer.model").read_bytes()
    for end in (0, 1, 1000, len(content) // 2, len(content) - 30):
        assert_refused(write(tmp_path, tokenizer__model=content[:end]), str(tmp_path / "tokenizer.model"))
    assert_refused(write(tmp_path, tokenizer__model=bytes(range(256)) * 10), str(tmp_path / "tokenizer.model"))
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.model").mkdir()
    assert_refused(tmp_path, str(tmp_path / "tokenizer.model"), "cannot be read")


@pytest.mark.parametrize("line, broken, message", [
    (3, b"not base64! 2", "line 3"), (3, b"YWI=", "line 3"), (300, b"YWJjZA== x", "line 300"), (5, b"AA== 4", "line 5"),
    (2, b" 1", "line 2"), (400, b"enp6eg== 7", "ranks 0 to"), (66, b"enp6eg== 65", "the byte 0x41"),
    (1, b"version https://git-lfs.github.com/spec/v1", "line 1")])
def test_broken_tiktoken_lines(line, broken, message, tmp_path):
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"q%d" % n: 256 + n for n in range(200)}
    lines = tiktoken_lines(ranks).splitlines()
    assert load_tokenizer(write(tmp_path, tokenizer__model=b"\n".join(lines))).vocab_size == 456 + 256
    lines[line - 1] = broken
    assert_refused(write(tmp_path, tokenizer__model=b"\n".join(lines)), str(tmp_path / "tokenizer.model"), message)


@pytest.mark.parametrize("name, content, message", [
    ("tokenizer_config.json", {"eos_token": "<|nowhere|>"}, "eos_token '<|nowhere|>'"),
    ("tokenizer_config.json", {"eos_token": ["</s>"]}, "eos_token"),
    ("tokenizer_config.json", {"add_bos_token": "yes"}, "add_bos_token"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "y"}}}, "added_tokens_decoder"),
    ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder"),
    ("config.json", {"eos_token_id": "2"}, "eos_token_id"),
    ("config.json", {"eos_token_id": 10 ** 6}, "eos_token_id 1000000"),
    ("config.json", {"eos_token_id": [2, True]}, "eos_token_id"),
    ("generation_config.json", {"eos_token_id": [[2]]}, "eos_token_id"), ("generation_config.json", [], "JSON object")])
def test_broken_companions(name, content, message, made, tmp_path):
    shutil.copy(made["sp"] / "tokenizer.model", tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    assert_refused(tmp_path, str(tmp_path / name), message)


def test_no_tokenizer(made, tmp_path):
    assert_refused(tmp_path, str(tmp_path), "tokenizer.model or tokenizer.json")
    assert_refused(tmp_path / "nowhere", "nowhere")
    shutil.copy(made["neox"] / "tokenizer.json", tmp_path)
    write(tmp_path, tokenizer_config__json={"add_bos_token": True})
    assert_refused(tmp_path, "tokenizer_config.json", "bos_token")      # GPT-NeoX's kind has none to put in front
