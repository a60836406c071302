"""Nothing is trusted: damaged model folders, tokenizers and data files end in one clear sentence, or load as they should.

Each kind of file has its seeds, and each seed damages a good file in its own way. One child process reads all of a kind's,
with little memory to spare and a timer: a crash of native code, a hang and a size that was believed are failures too. A
failure names its kind and seed; to see that input alone:

    python tests/test_fuzz.py KIND SEED
"""
import base64
import collections
import copy
import dataclasses
import faulthandler
import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import pytest
import safetensors.torch
import sentencepiece
import torch

import data
import model
import tiny
from support.cli import InputError

resource = pytest.importorskip("resource")          # limits of memory are Unix's

SECONDS, SPARE_BYTES = 30, 1 << 30      # what one input may take, far beyond what any of them needs
GENERAL = 0.1       # the share of a kind's errors that may name the file alone

# ---------------------------------------------------------------------------------------------------------------------
# Damage

LONG, DEEP = "long" * 50_000, "a deep value stands here"
JUNK = [None, True, False, 0, -1, 1, 2, 3, 7, 64, 10 ** 8, 2 ** 31, 2 ** 39, 2 ** 63, 10 ** 30, 10 ** 400, -10 ** 400, 0.5,
        -0.5, 1.0, 1e-320, 1e39, 1e308, float("nan"), float("inf"), -float("inf"), "", "x", "3", "ü", "\ud800", "\0", "a\nb",
        LONG, DEEP, [], {}, [3], [[]], ["x"], {"a": 1}, {"": None}, [None], [DEEP]]


def write_json(path, root, rng):
    """The JSON tree in a file, DEEP as many brackets: more or fewer than any reader can follow."""
    depth = rng.choice((5, 90, 300, rng.randrange(940, 1000), 5000, 100_000))
    text = json.dumps(root, indent=rng.choice((None, 1))).replace(json.dumps(DEEP), "[" * depth + "]" * depth)
    path.write_text(text, encoding="utf-8")


def change_tree(rng, root, deeper=0.7):
    """Drop, replace, rename, repeat or swap one value of a JSON tree, in place."""
    holder = root
    while True:
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        if not isinstance(holder[key], dict | list) or not holder[key] or rng.random() > deeper:
            break
        holder = holder[key]
    other = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    action = rng.randrange(8)
    if action == 0:
        del holder[key]
    elif action == 1:
        holder[key], holder[other] = holder[other], holder[key]
    elif action == 2 and isinstance(holder, dict):
        holder[rng.choice((key + "x", key[:-1], "", "ü", "a\nb"))] = holder.pop(key)
    elif action == 2:
        holder.insert(key, rng.choice(holder))
    elif action == 3 and isinstance(holder[key], int | float):
        holder[key] = rng.choice((-holder[key], holder[key] + 1, holder[key] * 2, str(holder[key]), float(holder[key])))
    else:
        holder[key] = rng.choice(JUNK)


def flip(rng, content, start=0, stop=None, letters=b'0123456789{}[],:"\\ -.eE\n/'):
    """The bytes with one or a few of content[start:stop] exchanged, half of them for what means something in a text file."""
    damaged, stop = bytearray(content), len(content) if stop is None else stop
    for _ in range(rng.choice((1, 1, 1, 3, 10))):
        damaged[rng.randrange(start, stop)] = rng.choice((rng.randrange(256), rng.choice(letters)))
    return bytes(damaged)


def damage_json(rng, path, root, deeper=0.7):
    """Write the JSON tree to `path` with damage to a value (mostly) or to the text."""
    root = copy.deepcopy(root)
    if rng.random() < 0.7:
        change_tree(rng, root, deeper)
        write_json(path, root, rng)
        return
    content = json.dumps(root, indent=rng.choice((None, 1)), ensure_ascii=rng.random() < 0.5).encode()
    path.write_bytes(content[:rng.randrange(len(content))] if rng.random() < 0.3 else flip(rng, content))


def same(a, b):
    """Equality by which NaN equals itself and True is not 1."""
    try:
        return repr(a) == repr(b)
    except RecursionError:      # nothing that stood in a good file is so deep
        return False


def keys_of(root):
    """All keys of a JSON tree."""
    inner = root.values() if isinstance(root, dict) else root if isinstance(root, list) else ()
    return (set(root) if isinstance(root, dict) else set()).union(*map(keys_of, inner))


# ---------------------------------------------------------------------------------------------------------------------
# Kinds. Each takes an empty folder and returns attempt(rng), which damages an input and returns
#   files      paths one of which a message must name
#   names      keys, tensors, … one of which makes a message a particular one; "line 3" and the like do so too
#   read       reads the input; raises nothing but InputError
#   check      what must hold of a result of read()

def weights_of(net):
    return {model.file_name(net.config, name): weight.detach().view(torch.int32) for name, weight in net.named_parameters()}


def computes(net):
    """A network that was loaded can be used."""
    assert net.head(net(torch.tensor([[1, 2, 3]]))).shape == (1, 3, net.config.vocab_size)


def save_net(folder, family="llama", **changes):
    net = tiny.net(family, dtype=torch.float32, vocab_size=40, intermediate_size=24, **changes)
    model.save(net, folder)
    return net


def safetensors_kind(folder):
    net = save_net(folder)
    expected, path = weights_of(net), folder / "model.safetensors"
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}       # a file may hold more than is read
    safetensors.torch.save_file({**safetensors.torch.load_file(path), **buffer}, path, metadata={"format": "pt"})
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header, body = json.loads(good[8:8 + length]), good[8 + length:]
    places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}

    def entry(rng):
        root = copy.deepcopy(header)
        a, b = (root[name] for name in rng.sample(sorted(places), 2))
        action = rng.randrange(6)
        if action == 0:
            a["dtype"] = rng.choice(["F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "F4", "f32", "Q7"] + JUNK)
        elif action == 1:
            a["shape"] = rng.choice([a["shape"] + [1], a["shape"][::-1], [-n for n in a["shape"]], [2 ** 62, 4], [2 ** 32] * 2,
                                     [10 ** 400] * 50, [2] * 10 ** 5, [0] * 99, [1.0, 2.0], "32"] + JUNK)
        elif action == 2:
            start, stop = a["data_offsets"]
            a["data_offsets"] = rng.choice([[stop, start], [start, stop - 4], [start + 4, stop], [-4, stop], [start, 2 ** 63],
                                            [start, start], [0, len(body)], [start + 0.0, stop], [start],
                                            b["data_offsets"]] + JUNK)
        elif action == 3:
            a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]
        elif action == 4:
            root["__metadata__"] = rng.choice(JUNK + [{"format": 3}, {"format": [DEEP]}])
        else:
            change_tree(rng, root)
        text = folder / "header"
        write_json(text, root, rng)
        return text.read_bytes()

    def attempt(rng):
        action, text, tail = rng.randrange(8), good[8:8 + length], body      # the length of the header, the header, the data
        number, touched = length, set()
        if action == 0:
            number = rng.choice((0, 1, 7, length - 1, length + 1, len(good) - 8, len(good), 2 ** 31, 2 ** 40, 2 ** 63,
                                 2 ** 64 - 1, rng.randrange(2 * length), rng.randrange(2 ** 64)))
        elif action == 1:
            text = flip(rng, text)
        elif action in (2, 3, 4):
            text = entry(rng)
            number = len(text)
        elif action == 5:
            at = rng.randrange(len(body))
            tail = flip(rng, body, at, min(at + 4, len(body)))
            touched = {name for name, (start, stop) in places.items() if body[start:stop] != tail[start:stop]}
        elif action == 6:
            tail += bytes(rng.choice((1, 3, 8, 4096)))
        content = number.to_bytes(8, "little") + text + tail
        if action == 7:
            content = content[:rng.choice((rng.randrange(20), rng.randrange(length), rng.randrange(len(content))))]
        path.write_bytes(content)

        def check(net):
            computes(net)
            found, size = weights_of(net), int.from_bytes(content[:8], "little")
            told = json.loads(content[8:8 + size])
            for name, weight in found.items():
                start, stop = told[name]["data_offsets"]
                assert weight.numpy().tobytes() == content[8 + size + start:8 + size + stop], f"{name} is not what the file has"
            differ = {name for name in expected if not torch.equal(found[name], expected[name])}
            if action == 5:
                assert differ == touched, f"bytes of {touched} were changed, {differ} differ"
            else:               # the entry says so: another name or place for the same number of bytes
                moved = {name for name in places if told.get(name) != header[name]}
                assert differ <= moved, f"entries of {moved} were changed, {differ} differ"
        return [path], {*places, "__metadata__", "its header would take"}, lambda: model.load(folder), check
    return attempt


FIELD_OF = {"vocab_size": "vocab_size", "hidden_size": "width", "intermediate_size": "ffn", "num_hidden_layers": "layers",
            "num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "max_position_embeddings": "context",
            "hidden_act": "activation", "rms_norm_eps": "norm_eps", "layer_norm_eps": "norm_eps", "rope_theta": "rope_theta",
            "rotary_emb_base": "rope_theta", "attention_bias": "attention_bias", "tie_word_embeddings": "tied",
            "use_parallel_residual": "parallel_residual", "sliding_window": "sliding_window", "head_dim": "head_dim"}
DERIVED = {"num_attention_heads": {"kv_heads", "head_dim", "rotary_dims"}, "hidden_size": {"head_dim", "rotary_dims"},
           "head_dim": {"rotary_dims"}, "rotary_pct": {"rotary_dims"}, "mlp_bias": {"mlp_bias"},
           "rope_scaling": {"rope_scaling", "rope_theta", "rotary_dims"},
           "rope_parameters": {"rope_scaling", "rope_theta", "rotary_dims"}, "partial_rotary_factor": {"rotary_dims"}}


def config_kind(folder):
    harmless = dict(architectures=["ForCausalLM"], bos_token_id=1, initializer_range=0.02, use_cache=True, hidden_act="silu")
    llama3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                  original_max_position_embeddings=64)
    families = {"llama": dict(rope_scaling=llama3, rope_theta=500.0, attention_bias=False, mlp_bias=False, head_dim=8),
                "mistral": dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=900.0)),
                "neox": dict(rotary_emb_base=100, use_parallel_residual=True, attention_bias=True)}
    nets = {family: save_net(folder / family, family, **{**harmless, **more}) for family, more in families.items()}
    roots = {family: json.loads((folder / family / "config.json").read_text()) for family in nets}

    def attempt(rng):
        family = rng.choice(list(nets))
        net, root, path = nets[family], roots[family], folder / family / "config.json"
        if rng.random() < 0.2:           # sizes that nobody has
            key = rng.choice(sorted(key for key in root if type(root[key]) is int))
            write_json(path, {**root, key: rng.choice((10 ** 5, 10 ** 8, 2 ** 28 - 1, 2 ** 28, 2 ** 62, -10 ** 8))}, rng)
        else:
            damage_json(rng, path, root, 0.5)
        def check(loaded):
            computes(loaded)
            assert same(weights_of(loaded).keys(), weights_of(net).keys())
            assert all(map(torch.equal, weights_of(loaded).values(), weights_of(net).values()))
            told = json.loads(path.read_bytes())
            changed = {key for key in root.keys() | told.keys() if not same(root.get(key), told.get(key))}
            for key in changed & told.keys():
                value = told[key]
                known = key in model.FIELDS[told["model_type"]] or key in model.HARMLESS | model.DROPOUTS
                twice = key in ("rope_theta", "partial_rotary_factor") and "rotary_pct" in told
                assert known or twice or value in (None, False), f"{key} was swallowed"
                if key in FIELD_OF and value is not None:
                    assert getattr(loaded.config, FIELD_OF[key]) in (value, value * 1.0 if isinstance(value, int) else value)
            may = {"source"}.union(*({FIELD_OF.get(key)} | DERIVED.get(key, set()) for key in changed))
            differ = {field.name for field in dataclasses.fields(model.Config)
                      if not same(getattr(loaded.config, field.name), getattr(net.config, field.name))}
            assert "model_type" in changed or differ <= may, f"{changed} were changed, {differ - may} differ"
            model.save(loaded, folder / "saved")        # what was read can be written
        names = keys_of(root) | FIELD_OF.keys() | weights_of(net).keys()
        return [path, path.with_name("model.safetensors")], names, lambda: model.load(path.parent), check
    return attempt


def index_kind(folder):
    model.SHARD_BYTES = 6_000
    inside = folder / "models" / "one"
    net = save_net(inside)
    path = inside / "model.safetensors.index.json"
    root = json.loads(path.read_text())
    shards = sorted(inside.glob("*.safetensors"))
    contents = {shard: shard.read_bytes() for shard in shards}
    assert len(shards) > 3
    spoiled = []            # the shard to mend before the next input
    blobs = folder / "models" / "blobs"
    blobs.mkdir()
    for shard in shards:        # good files of the right tensors, but not in the folder
        (blobs / shard.name).write_bytes(contents[shard])
    os.mkfifo(inside / "pipe.safetensors")

    def attempt(rng):
        while spoiled:
            shard = spoiled.pop()
            shard.unlink(missing_ok=True)
            shard.write_bytes(contents[shard])
        action, changed, shard = rng.randrange(6), copy.deepcopy(root), rng.choice(shards)
        spoiled.append(shard)
        tensors = [name for name, file in root["weight_map"].items() if file == shard.name]
        if action == 0:
            damage_json(rng, path, root)
        elif action == 1:
            target = rng.choice([f"../blobs/{shard.name}", str(blobs / shard.name), f"./{shard.name}", f"{shard.name}/", "..",
                                 ".", "", f"..\\{shard.name}", "\0", "x" * 5000, "ü" * 200, "\ud800", "config.json", "a\nb",
                                 path.name, "pipe.safetensors", rng.choice(shards).name] + JUNK)
            changed["weight_map"].update(dict.fromkeys(tensors if rng.random() < 0.5 else tensors[:1], target))
            write_json(path, changed, rng)
        else:
            path.write_text(json.dumps(root))
        if action == 2:
            shard.unlink()
            if rng.random() < 0.5:
                shard.symlink_to(rng.choice((shard.name, "nowhere", "..")))
        elif action == 3:
            shard.write_bytes(contents[rng.choice(shards)])
        elif action == 4:
            shard.write_bytes(contents[shard][:rng.randrange(len(contents[shard]))])
        elif action == 5:                                   # as the hub's cache has it
            shard.unlink()
            shard.symlink_to(Path("../blobs") / shard.name)

        def check(loaded):
            assert all(map(torch.equal, weights_of(loaded).values(), weights_of(net).values()))
            computes(loaded)
            map_, told = root["weight_map"], json.loads(path.read_bytes())["weight_map"]
            assert told == map_ and action != 2 and action != 4
        names = {*keys_of(root), "its header would take", *(shard.name for shard in shards)}
        return [path, *shards, inside / "pipe.safetensors", inside / "config.json"], names, lambda: model.load(inside), check
    return attempt


TEXTS = ["", " ", "The small river moves.", "  two  spaces\n\nHuman: it's 12345 o'clock\tAssistant:",
         "é e\u0301 ﬁ 日本語 👍🏽 \u2028\x07\0", "</s><s><unk>[INST] <|endoftext|> <|im_start|> <0x0A>", "xxxxxxxxx" * 30, "\ud800a"]
CLEAN = [data.without_surrogates(text) for text in TEXTS]


def tokenize(folder):
    tokenizer = data.load_tokenizer(folder)
    return tokenizer, [(tokenizer.encode(text), tokenizer.encode_after(text)) for text in TEXTS]


def check_ids(tokenizer, ids):
    """Whatever was loaded, its ids are its own and read as text."""
    assert all(0 <= id < tokenizer.vocab_size for pair in ids for list_ in pair for id in list_)
    assert not set(tokenizer.special_ids.values()) & {id for pair in ids for list_ in pair for id in list_}
    for alone, behind in ids:
        tokenizer.decode(alone), tokenizer.decode(behind, continues=True)
    assert tokenizer.eos_id in tokenizer.stop_ids


def wire(content, start=0, stop=None):
    """[(field number, start, start of its body, stop)] of a sound protobuf message; 0 for what is no message or text."""
    found, at, stop = [], start, len(content) if stop is None else stop

    def varint(at):
        value = shift = 0
        while True:
            value |= (content[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if content[at - 1] < 128:
                return value, at
    while at < stop:
        tag, body = varint(at)
        if tag & 7 == 2:
            size, body = varint(body)
            end = body + size
        else:
            end = varint(body)[1] if tag & 7 == 0 else body + {1: 8, 5: 4}[tag & 7]
        found.append((tag >> 3 if tag & 7 == 2 else 0, at, body, end))
        at = end
    assert at == stop
    return found


def varint(value):
    return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])


def message(number, body):
    return varint(number << 3 | 2) + varint(len(body)) + body


def sentencepiece_kind(folder):
    trained = io.BytesIO()          # the default normalization brings tables of its own
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=tiny.corpus(), model_writer=trained, model_type="unigram",
                                             vocab_size=150, minloglevel=2, hard_vocab_limit=False)
    goods, expected = {}, {}
    for name, content in (("bpe", tiny.sentencepiece_model(420)), ("unigram", trained.getvalue())):
        (folder / name).mkdir()
        (folder / name / "tokenizer.model").write_bytes(content)
        goods[name], expected[name] = content, tokenize(folder / name)
        tokenizer, ids = expected[name]
        assert name == "unigram" or [tokenizer.decode(alone) for alone, _ in ids] == CLEAN
    space = expected["bpe"][0].encode_after(" ")[0]
    texts = [b"", b"\0", b"\xff", b"a", "▁".encode(), b"<0x0A>", b"<0x0a>", b"<unk>", b"x" * 10 ** 5, b"\x80", "日".encode()]

    def attempt(rng):
        name = rng.choice(("bpe", "bpe", "unigram"))
        path, good = folder / name / "tokenizer.model", goods[name]
        parts = [(number, good[body:stop]) for number, _, body, stop in wire(good)]     # all of them are messages
        pieces = [i for i, (number, _) in enumerate(parts) if number == 1]
        specs = [i for i, (number, _) in enumerate(parts) if number != 1]
        action, at = rng.randrange(10), rng.choice(pieces)
        content = None
        if action == 0:
            content = flip(rng, good)
        elif action == 1:
            content = good[:rng.randrange(len(good))]
        elif action == 2:            # a length or a tag
            _, start, body, _ = rng.choice(wire(good))
            content = flip(rng, good, start, body, bytes([0, 1, 2, 127, 128, 255, 9, 11, 12, 13]))
        elif action == 3:
            del parts[at]
        elif action == 4:
            parts.insert(at, parts[rng.choice(pieces)])
        elif action == 5:
            parts[at] = 1, message(1, rng.choice(texts)) + parts[at][1][-5:] * rng.randrange(2)
        elif action == 6:            # a score (5 bytes), then a kind
            score = rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\0\0\0\0"))
            kind = varint(rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 99, 2 ** 63)))
            parts[at] = 1, parts[at][1] + rng.choice((b"\x15" + score, b"\x18" + kind))
        elif action == 7:
            spec = rng.choice(specs)
            number = rng.choice((1, 2, 3, 4, 5, 6, 7, 10, 24, 35, 40, 41, 42, 43, 44, 45, 46, 47, 48))
            value = varint(number << 3) + varint(rng.choice((0, 1, 2, 3, 4, 300, 500, 2 ** 31, 2 ** 64 - 1)))
            value = value if rng.random() < 0.6 else message(number, rng.choice(texts))
            parts[spec] = parts[spec][0], parts[spec][1] + value
        elif action == 8:
            spec = rng.choice(specs)
            if parts[spec][1]:
                parts[spec] = parts[spec][0], flip(rng, parts[spec][1])
        else:
            extra = rng.choice((b"\0", b"\x0b", b"\x0c", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a" + b"\xff" * 12, b"\x1a\x02\x18",
                                b"\xff" * 40, message(2, b""), message(1, b""), message(200, b"x"), message(4, texts[-1])))
            content = good + extra
        content = b"".join(message(*part) for part in parts) if content is None else content
        path.write_bytes(content)

        def check(result):
            tokenizer, ids = result
            check_ids(tokenizer, ids)
            original, original_ids = expected[name]
            if content == good:
                assert ids == original_ids
            old, new = ([(number, source[body:stop]) for number, _, body, stop in wire(source)] for source in (good, content))
            if [part for part in old if part[0] in (1, 2, 3)] == [part for part in new if part[0] in (1, 2, 3)]:
                assert tokenizer.pieces == original.pieces and ids == original_ids
            roles = {original.unk_id, tokenizer.unk_id, original.bos_id, tokenizer.bos_id, original.eos_id, tokenizer.eos_id}
            lossless = name == "bpe" and [part for part in old if part[0] != 1] == [part for part in new if part[0] != 1]
            if lossless and tokenizer.pieces.get(space) == b" ":         # bytes stand in for every other piece
                assert [tokenizer.decode(alone) for alone, _ in ids] == CLEAN
            old, new = ([body for number, body in parts if number == 1] for parts in (old, new))
            for id, (before, after) in enumerate(zip(old, new)):
                if before == after and id not in roles:
                    assert tokenizer.pieces.get(id) == original.pieces.get(id), f"piece {id} was not touched"
        return [path], {"byte_fallback", "precompiled_charsmap"}, lambda: tokenize(path.parent), check
    return attempt


def tokenizer_json_kind(folder):
    (folder / "plain").mkdir()
    (folder / "split").mkdir()
    plain = json.loads(tiny.byte_level_json(300))
    split = copy.deepcopy(plain)         # as Llama 3's: a regex of its own, BOS from a template, NFC, an added token for text
    split["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": data.LLAMA3_WORDS}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}
    split["normalizer"] = {"type": "NFC"}
    split["model"]["ignore_merges"] = True
    split["post_processor"] = {"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": "<|padding|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}
    split["added_tokens"].append(dict(split["added_tokens"][0], id=300, content="  ", special=False))
    roots, expected = {"plain": plain, "split": split}, {}
    for name, root in roots.items():
        (folder / name / "tokenizer.json").write_text(json.dumps(root))
        expected[name] = tokenize(folder / name)

    def attempt(rng):
        name = rng.choice(("plain", "split"))
        path, root = folder / name / "tokenizer.json", copy.deepcopy(roots[name])
        action = rng.randrange(8)
        vocab, merges = root["model"]["vocab"], root["model"]["merges"]
        a, b = rng.sample(list(vocab), 2)
        if action == 0:
            vocab[a] = rng.choice((vocab[b], -1, 2 ** 31, 2 ** 63, 10 ** 400, 2 ** 31 - 1, 299.0, "3", None, True))
        elif action == 1:
            vocab[a], vocab[b] = vocab[b], vocab[a]
        elif action == 2:
            merges[rng.randrange(len(merges))] = rng.choice([[a, b], [a], [], [a, b, a], a + " " + b, [a, [b]], [a, 3],
                                                             ["", a]] + JUNK)
        elif action == 3 and name == "split" and rng.random() < 0.4:
            root["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = rng.choice(
                ["x*", "(?=x)", "^", "$", "|a", r"\b", "(?<=x)", "(x+x+)+(?!x)y", r"(((x*)*)*)*\1y", r"\K", r"\G", r"\p{L}*?",
                 "(", "[^x]", "(?:(?:(?:x{100}){100}){100})", "(?s:.)", r"x(?=x)|\s+(?!x)", r"\w+|(?<!x)", "\0",
                 r"\p{Nothing}", "(?R)", "x" * 10 ** 6])
        elif action == 3:
            where = rng.choice(("added_tokens", "pre_tokenizer", "post_processor", "normalizer"))
            if root[where]:
                change_tree(rng, root[where], 0.9)
        if action < 4:
            write_json(path, root, rng)
        elif action < 6:
            damage_json(rng, path, root, 0.5)
        else:
            content = json.dumps(root, ensure_ascii=rng.random() < 0.5).encode()
            key = rng.choice([key for key in ("added_tokens", "normalizer", "pre_tokenizer", "Regex", "model", "merges")
                              if f'"{key}"'.encode() in content])
            start = content.index(f'"{key}"'.encode())
            path.write_bytes(flip(rng, content, start, min(start + 250, len(content))))

        def check(result):
            tokenizer, ids = result
            check_ids(tokenizer, ids)
            told = json.loads(path.read_bytes())
            original, original_ids = expected[name]
            matter = ("model", "added_tokens", "pre_tokenizer", "normalizer")
            if all(same(told.get(key), roots[name].get(key)) for key in matter):
                assert ids == original_ids and tokenizer.pieces == original.pieces
            names = {id: token for token, id in roots[name]["model"]["vocab"].items()}
            told_names = {id: token for token, id in told["model"]["vocab"].items()}
            roles = {original.bos_id, tokenizer.bos_id, original.eos_id, tokenizer.eos_id}
            if same(told.get("added_tokens"), roots[name]["added_tokens"]):
                for id, piece in original.pieces.items():
                    if names.get(id) == told_names.get(id) and id not in roles:
                        assert tokenizer.pieces[id] == piece, f"id {id} was not touched"
            if told.get("normalizer") is None:           # bytes in, bytes out, whatever merges there are
                for text, (alone, behind) in zip(CLEAN, ids):
                    assert alone == behind and tokenizer.decode(alone) == text
        names = keys_of({key: value for key, value in root.items() if key != "model"})
        names |= {"model", "vocab", "merges", "type", "byte"} | set(root["model"])
        return [path, path.with_name("tokenizer_config.json")], names, lambda: tokenize(path.parent), check
    return attempt


def tiktoken_kind(folder):
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", b"in", b"ing", "é".encode(), b"  ", b"xx"]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    path = folder / "tokenizer.model"
    path.write_bytes(b"\n".join(lines) + b"\n")
    original, original_ids = tokenize(folder)

    def attempt(rng):
        damaged, n, m = list(lines), rng.randrange(len(lines)), rng.randrange(len(lines))
        token, rank = lines[n].split()
        action = rng.randrange(9)
        content = None
        if action == 0:
            del damaged[n]
        elif action == 1:
            damaged.insert(m, lines[n])
        elif action == 2:
            damaged[n] = token + b" " + rng.choice((b"-1", b"9" * 5000, b"9" * 30, b"x", b"", b"1.0", b"1e3", b"\xb2", b"1_0",
                                                    lines[m].split()[1]))
        elif action == 3:
            damaged[n] = rng.choice((b"", b"=", b"AA", b"====", b"!", b"\xff\xfe", b"A" * 10 ** 6, b"zzzzzz==",
                                     lines[m].split()[0])) + b" " + rank
        elif action == 4:
            damaged[n], damaged[m] = token + b" " + lines[m].split()[1], lines[m].split()[0] + b" " + rank
        elif action == 5:
            content = b"\n".join(lines)[:rng.randrange(sum(map(len, lines)))]
        elif action == 6:
            damaged[n] = flip(rng, lines[n])
        elif action == 7:
            content = flip(rng, b"\n".join(lines))
        else:
            damaged[n] = rng.choice((b"\0", b"\x85", b" " * 1000, token, lines[n] + b" " + rank, b"\t" + lines[n] + b"\r"))
        path.write_bytes(b"\n".join(damaged) if content is None else content)

        def check(result):
            tokenizer, ids = result
            check_ids(tokenizer, ids)
            told = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
            told = {int(rank): base64.b64decode(token) for token, rank in told}
            ordinary = {id: piece for id, piece in tokenizer.pieces.items() if id not in tokenizer.special_ids.values()}
            assert ordinary == told
            for text, (alone, behind) in zip(CLEAN, ids):
                assert alone == behind and tokenizer.decode(alone) == text
            if told == dict(enumerate(tokens)):
                assert ids == original_ids and tokenizer.special_ids == original.special_ids
        return [path], {"ranks", "byte"}, lambda: tokenize(folder), check
    return attempt


def companions_kind(folder):
    tiny.write_tokenizer(folder / "llama")
    tiny.write_tokenizer(folder / "neox", "neox")
    added = {str(n): {"content": f"<|im_{n}|>", "normalized": False, "special": n % 2 == 0} for n in range(420, 424)}
    good, expected, spoiled = {}, {}, []
    for family, (bos, eos) in {"llama": ("<s>", "</s>"), "neox": ("<|endoftext|>",) * 2}.items():
        for name, root in {
                "tokenizer_config.json": dict(bos_token={"content": bos}, eos_token=eos, add_bos_token=True, legacy=False,
                                              model_max_length=10 ** 30, added_tokens_decoder=added),
                "generation_config.json": dict(eos_token_id=[2, 420], temperature=0.7, max_length=10),
                "config.json": dict(model_type="llama", bos_token_id=0, eos_token_id=0)}.items():
            good[family, name] = root
            (folder / family / name).write_text(json.dumps(root))
        expected[family] = tokenize(folder / family)

    def attempt(rng):
        while spoiled:
            family, name = spoiled.pop()
            (folder / family / name).write_text(json.dumps(good[family, name]))
        family, name = rng.choice(list(good))
        path, root = folder / family / name, good[family, name]
        spoiled.append((family, name))
        if rng.random() < 0.3:
            root = copy.deepcopy(root)
            key = rng.choice([key for key in root if "token" in key])
            root[key] = rng.choice(JUNK + [{"content": junk} for junk in JUNK] + [
                [3, -1], [3, "4"], [True], {"7": {"content": "x"}}, {"content": "</s>"}, {"-7": {"content": "x"}},
                {"9" * 5000: {"content": "x"}}, {"500": {"content": 3}}, {"500": ["x"]}])
            write_json(path, root, rng)
        else:
            damage_json(rng, path, root)

        def check(result):
            tokenizer, ids = result
            check_ids(tokenizer, ids)
            original, original_ids = expected[family]
            assert ids == original_ids                                       # none of these files changes how text is read
            told = json.loads(path.read_bytes())
            changed = {key for key in root.keys() | told.keys() | good[family, name].keys()
                       if not same(good[family, name].get(key), told.get(key))}
            if "added_tokens_decoder" not in changed:
                assert tokenizer.special_ids == original.special_ids
            if not changed & {"bos_token", "bos_token_id", "added_tokens_decoder"}:
                assert tokenizer.bos_id == original.bos_id
            if not changed & {"eos_token", "eos_token_id", "added_tokens_decoder"}:
                assert tokenizer.eos_id == original.eos_id and tokenizer.stop_ids == original.stop_ids
            stops = told.get("eos_token_id")
            if name == "generation_config.json" and stops is not None:
                assert tokenizer.stop_ids >= set(stops if isinstance(stops, list) else [stops])
            assert tokenizer.adds_bos in (True, False)
        files = [path, path.with_name("tokenizer.model"), path.with_name("tokenizer.json")]
        return files, keys_of(root), lambda: tokenize(path.parent), check
    return attempt


def rows_kind(folder):
    turns = [{"role": role, "content": text} for role, text in (("system", "Be kind."), ("user", "Hi"), ("assistant", "Ho"))]
    other = dict(turns[2], content="A")
    records = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in tiny.pairs(3)]
    records += tiny.pairs(3, seed=1)
    records += [{"prompt": "Q?", "chosen": turns[:2] + [other], "rejected": turns},
                {"prompt": turns[:2], "chosen": turns[2:], "rejected": [other], "p": 0.25, "finished": [True, False]},
                {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "A"},
                 "rejected": {"from": "gpt", "value": "B"}},
                {"instruction": "Add.", "input": "1 2", "output": "3", "rejected": "4"}, {"messages": turns},
                {"prompt": "Q", "response": "R"}, {"turns": ["one", "two"]}, {"text": "Once there was."},
                {"prompt": "Ü\u2028", "chosen": "ä", "rejected": "ö", "p": 1}]
    needs = ("pairs", "ordered pairs", "judge", "responses", "prompts")

    def comparable(row):
        return dataclasses.replace(row, where="")

    def lone(value, need):
        """What one JSON value is read as, or None."""
        try:
            return comparable(data.read_row(copy.deepcopy(value), need, ""))
        except data.Unusable:
            return None
    original = {need: [lone(record, need) for record in records] for need in needs}

    def attempt(rng):
        need, form = rng.choice(needs), rng.choice((".jsonl", ".jsonl", ".jsonl.gz", ".json", ".json.gz"))
        path = folder / f"rows{form}"
        changed, at = copy.deepcopy(records), rng.randrange(len(records))
        action = rng.randrange(8)
        depth = rng.choice((5, 90, 300, rng.randrange(940, 1000), 5000, 100_000))
        if action in (0, 1):
            holder = [changed[at]]
            change_tree(rng, holder, 0.9)
            changed[at:at + 1] = holder
        elif action == 2:
            changed[at] = rng.choice(JUNK)
        elif action == 3:
            key = rng.choice(list(changed[at]))
            changed[at][key] = rng.choice([[turns], [turns[0]], turns[:2], [None], [dict(turns[1], role="bot")],
                                           [{"role": "user"}], turns[2], [[]], [dict(turns[2], content=[{"text": "x"}])],
                                           turns[::-1], turns * 2] + JUNK)
        texts = [json.dumps(record, ensure_ascii=rng.random() < 0.5) for record in changed]
        texts = [text.replace(json.dumps(DEEP), "[" * depth + "]" * depth).encode(errors="surrogatepass") for text in texts]
        if action == 4:
            texts[at] = flip(rng, texts[at]).replace(b"\n", b" ")
        elif action == 5:
            texts[at] = rng.choice((b"[" * depth, b'{"a":' * depth, b"\xff\xfe", b"{}", b"[]", b"nul", b"NaN",
                                    b'{"prompt": "\xff", "chosen": ' + b"[" * depth + b"]" * depth + b"}",
                                    b'{"prompt": "\xed\xa0\x80"}', b"\0",
                                    b'{"p": ' + b"9" * 5000 + b"}", texts[at] * 2, texts[at][:-3]))
        listed = form.startswith(".json") and not form.startswith(".jsonl")
        content = b"[" + b",\n".join(texts) + b"]" if listed else b"\n".join(texts) + b"\n"
        if action == 6:
            content = flip(rng, content)
        packed = gzip.compress(content, mtime=0) if form.endswith(".gz") else content
        if action == 7:
            packed = flip(rng, packed) if rng.random() < 0.5 else packed[:rng.randrange(len(packed))]
        path.write_bytes(packed)

        def check(result):
            rows, report = result
            content = gzip.decompress(packed) if form.endswith(".gz") else packed
            found = {row.where: comparable(row) for row in rows}
            skipped = [where for places in report.skipped.values() for where in places]
            assert len(found) == len(rows) == report.used and not found.keys() & set(skipped)
            assert "\n" not in str(report) and path.name in str(report) and (not skipped or "skipped (" in str(report))
            if content.lstrip().startswith(b"[") and listed:
                values = json.loads(content.decode(errors="surrogateescape"))
                good = {n: original[need][i] for n, value in enumerate(values, 1) for i, record in enumerate(records)
                        if same(value, record)}
                numbers = range(1, len(values) + 1)
            else:
                lines = content.split(b"\n")
                bytes_of = {json.dumps(record, ensure_ascii=escaped).encode(): i for i, record in enumerate(records)
                            for escaped in (True, False)}
                good = {n: original[need][bytes_of[line]] for n, line in enumerate(lines, 1) if line in bytes_of}
                numbers = [n for n, line in enumerate(lines, 1) if line.strip()]
                for n in numbers:
                    try:
                        json.loads(lines[n - 1].decode())
                    except (ValueError, RecursionError):
                        assert f"{path}:{n}" in skipped, f"line {n} is no JSON"
            assert sorted(found.keys() | set(skipped)) == sorted(f"{path}:{n}" for n in numbers), "a line got lost"
            for n, row in good.items():
                assert found.get(f"{path}:{n}") == row, f"line {n} was not touched"
        return [path], set(), lambda: data.read_rows(path, need), check
    return attempt


KINDS = {       # and how many seeds each has
    "safetensors": (safetensors_kind, 400), "config": (config_kind, 400), "index": (index_kind, 200),
    "sentencepiece": (sentencepiece_kind, 300), "tokenizer_json": (tokenizer_json_kind, 350),
    "tiktoken": (tiktoken_kind, 200), "companions": (companions_kind, 250), "rows": (rows_kind, 500),
}
assert sum(count for _, count in KINDS.values()) >= 2_000

PLACE = re.compile(r"\b(line|byte|piece) \d|\[\d+\]|:\d+: |(tensor|field) '")


def judge_message(message, files, names):
    """Whether a message names more than its file; it must be one sentence that names the file."""
    assert any(str(file) in message for file in files), f"names no file: {message}"
    assert message.isprintable() and message.endswith(".") and len(message) < 700, f"not one sentence: {message[:2000]!r}"
    rest = message
    for file in sorted(map(str, files), key=len, reverse=True):
        rest = rest.replace(file, "FILE")
    return bool(PLACE.search(rest)) or any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", rest) for name in names if name)


def child(kind, seeds):
    """Read the inputs of one kind -> how many loaded, how many were refused in particular and in general, and how."""
    counts = collections.Counter()
    with tempfile.TemporaryDirectory() as place:
        attempt = KINDS[kind][0](Path(place))
        if sys.platform == "linux":          # elsewhere a process is not told its own size
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE_BYTES,) * 2)
        for seed in seeds:
            print("seed", seed, flush=True)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            files, names, read, check = attempt(random.Random(f"{kind} {seed}"))
            try:
                result = read()
            except InputError as error:
                text = str(error)
                outcome = "particular" if judge_message(text, files, names) else "general"
                if outcome == "general" or len(seeds) == 1 or os.environ.get("SHOW"):
                    print(outcome, text.replace(place, "…"))
            else:
                outcome = "loaded"
                check(result)
            counts[outcome] += 1
        faulthandler.cancel_dump_traceback_later()
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input(kind):
    """Each damaged input is refused in one sentence or loads as it should, and few of the sentences are general ones."""
    count = KINDS[kind][1]
    done = subprocess.run([sys.executable, __file__, kind, "0", str(count)], text=True, capture_output=True, errors="replace",
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    seeds = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("seed ")]
    ended = done.returncode
    assert ended == 0, f"python tests/test_fuzz.py {kind} {(seeds or ['0'])[-1]} ends with {ended}:\n{done.stderr[-3000:]}"
    counts = json.loads(done.stdout.splitlines()[-1])
    print(kind, counts)
    assert len(seeds) == sum(counts.values()) == count
    general = [line for line in done.stdout.splitlines() if line.startswith("general ")]
    assert counts["general"] < GENERAL * (counts["general"] + counts["particular"]), "\n".join(general)
    assert counts["loaded"] > 0 and counts["particular"] > 0, "the damage is all of one sort"


if __name__ == "__main__":
    torch.set_num_threads(1)
    first, stop = int(sys.argv[2]), int((sys.argv[3:] or [int(sys.argv[2]) + 1])[0])
    found = child(sys.argv[1], range(first, stop))
    print(json.dumps({outcome: found[outcome] for outcome in ("loaded", "particular", "general")}))
