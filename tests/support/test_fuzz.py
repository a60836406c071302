"""A damaged model folder, tokenizer or data file is refused in one sentence that names it, or it can be used.

Each kind of file has its seeds, and each seed damages a good file in its own way. One child process uses all
inputs of a kind, with little memory to spare and a timer: a crash of native code, a hang and a size that was
believed are failures too. Nothing is written, nothing outside of the folder is read. To see one input alone:

    python tests/support/test_fuzz.py KIND SEED
"""
import base64
import copy
import faulthandler
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import pytest
import safetensors.torch
import torch

import model
import tiny
from support.cli import InputError
from support.rows import read_rows
from support.tokenizer import LLAMA3_WORDS, load_tokenizer

resource = pytest.importorskip("resource")          # limits of memory are Unix's

SECONDS, SPARE_BYTES = 30, 1 << 30      # what one input may take, far beyond what any of them needs

# -----------------------------------------------------------------------------------------------------------
# Damage

DEEP = "a deep value stands here"
JUNK = [None, True, False, 0, -1, 1, 2, 3, 7, 64, 10 ** 8, 2 ** 31, 2 ** 39, 2 ** 63, 10 ** 400, 0.5, 1e-320,
        1e39, float("nan"), float("inf"), "", "x", "3", "ü", "\ud800", "\0", "a\nb", "long" * 50_000, [], {},
        [3], [[]], ["x"], {"a": 1}, {"": None}, [None], DEEP, [DEEP]]


def nested(rng, text):
    """The JSON text with brackets for DEEP: more or fewer than any reader can follow."""
    depth = rng.choice((5, 90, 300, rng.randrange(940, 1000), 5000, 100_000))
    return text.replace(json.dumps(DEEP), "[" * depth + "]" * depth)


def write_json(path, root, rng):
    path.write_text(nested(rng, json.dumps(root, indent=rng.choice((None, 1)))), encoding="utf-8")


def change_tree(rng, root, deeper=0.7):
    """Drop, swap, rename, count on or replace one value of a JSON tree, in place."""
    holder = root
    while True:
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        key, other = rng.choice(keys), rng.choice(keys)
        if not isinstance(holder[key], dict | list) or not holder[key] or rng.random() > deeper:
            break
        holder = holder[key]
    action = rng.randrange(7)
    if action == 0:
        del holder[key]
    elif action == 1:
        holder[key], holder[other] = holder[other], holder[key]
    elif action == 2 and isinstance(holder, dict):
        holder[rng.choice((key + "x", key[:-1], "", "ü", "a\nb"))] = holder.pop(key)
    elif action == 3 and isinstance(holder[key], int | float):
        holder[key] = rng.choice((-holder[key], holder[key] + 1, str(holder[key]), float(holder[key])))
    else:
        holder[key] = rng.choice(JUNK)


def flip(rng, content, letters=b'0123456789{}[],:"\\ -.eE\n/'):
    """The bytes with one or a few exchanged, half of them for what means something in JSON."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 3, 10))):
        damaged[rng.randrange(len(content))] = rng.choice((rng.randrange(256), rng.choice(letters)))
    return bytes(damaged)


def damage_bytes(rng, content):
    return content[:rng.randrange(len(content))] if rng.random() < 0.3 else flip(rng, content)


def damage_json(rng, path, root, deeper=0.7):
    """Write the JSON tree to `path` with damage to a value (mostly) or to the text."""
    root = copy.deepcopy(root)
    if rng.random() < 0.7:
        change_tree(rng, root, deeper)
        return write_json(path, root, rng)
    text = json.dumps(root, indent=rng.choice((None, 1)), ensure_ascii=rng.random() < 0.5)
    path.write_bytes(damage_bytes(rng, text.encode()))


# -----------------------------------------------------------------------------------------------------------
# Kinds. Each takes an empty folder and returns attempt(rng), which damages a good input there and returns
#   files    paths one of which a message must name
#   use      reads the input and uses it; raises nothing but InputError

def save_net(folder, family="llama", **changes):
    model.save(tiny.net(family, dtype=torch.float32, vocab_size=40, intermediate_size=24, **changes), folder)
    return folder


def use_model(folder):
    net = model.load(folder)
    assert net.head(net(torch.tensor([[1, 2, 3]]))).shape == (1, 3, net.config.vocab_size)


def safetensors_kind(folder):
    path = save_net(folder) / "model.safetensors"
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header, body = json.loads(good[8:8 + length]), good[8 + length:]
    values = {"dtype": ["F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "F4", "f32", "Q7"],
              "shape": [[2 ** 62, 4], [2 ** 32] * 2, [10 ** 400] * 50, [2] * 10 ** 5, [1.0, 2], [-1, -1]],
              "data_offsets": [[0], [0, len(body)], [0, 0], [4, 0], [-4, 8], [0, 2 ** 63], [0.0, 8]]}

    def damaged_header(rng):
        root = copy.deepcopy(header)
        a, b = (root[name] for name in rng.sample([name for name in root if name != "__metadata__"], 2))
        key = rng.choice((*values, "swap", "tree"))
        if key == "swap":
            a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]
        elif key == "tree":
            change_tree(rng, root)
        else:
            a[key] = rng.choice([*values[key], *JUNK, b[key]])
        return nested(rng, json.dumps(root)).encode()

    def attempt(rng):
        action, number, text = rng.randrange(6), length, good[8:8 + length]
        if action == 0:
            number = rng.choice((0, 1, length - 1, length + 1, len(good) - 8, len(good), 2 ** 31, 2 ** 40,
                                 2 ** 63, 2 ** 64 - 1, rng.randrange(2 * length)))
        elif action in (1, 2, 3):
            text = flip(rng, text) if action == 1 else damaged_header(rng)
            number = len(text)
        content = number.to_bytes(8, "little") + text + body + bytes(3 * (action == 4))
        path.write_bytes(content[:rng.choice((20, length, len(content))) - 1] if action == 5 else content)
        return [path, folder], lambda: use_model(folder)
    return attempt


def config_kind(folder):
    harmless = dict(architectures=["ForCausalLM"], bos_token_id=1, use_cache=True, hidden_act="silu")
    llama3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                  original_max_position_embeddings=64)
    families = {"llama": dict(rope_scaling=llama3, rope_theta=500.0, attention_bias=False, head_dim=8),
                "mistral": dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=900.0)),
                "neox": dict(rotary_emb_base=100, use_parallel_residual=True, attention_bias=True)}
    for family, more in families.items():
        save_net(folder / family, family, **{**harmless, **more})
    roots = {family: json.loads((folder / family / "config.json").read_text()) for family in families}

    def attempt(rng):
        family = rng.choice(list(roots))
        root, path = roots[family], folder / family / "config.json"
        if rng.random() < 0.2:           # sizes that nobody has
            key = rng.choice(sorted(key for key in root if type(root[key]) is int))
            size = rng.choice((10 ** 5, 10 ** 8, 2 ** 28 - 1, 2 ** 28, 2 ** 62, -10 ** 8))
            write_json(path, {**root, key: size}, rng)
        else:
            damage_json(rng, path, root, 0.5)
        return [path, path.parent], lambda: use_model(path.parent)
    return attempt


def index_kind(folder):
    inside, blobs = save_net(folder / "models" / "one"), folder / "models" / "blobs"
    weights = safetensors.torch.load_file(inside / "model.safetensors")
    (inside / "model.safetensors").unlink()
    parts = {f"model-{n}.safetensors": sorted(weights)[n::4] for n in range(4)}
    contents = {file: safetensors.torch.save({name: weights[name] for name in part})
                for file, part in parts.items()}
    root = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    path = inside / "model.safetensors.index.json"
    blobs.mkdir()
    for file, content in contents.items():       # good files of the right tensors, but not in the folder
        (blobs / file).write_bytes(content)
    os.mkfifo(inside / "pipe.safetensors")

    def attempt(rng):
        for file, content in contents.items():
            (inside / file).unlink(missing_ok=True)
            (inside / file).write_bytes(content)
        path.write_text(json.dumps(root))
        action, file, target = rng.randrange(4), rng.choice(list(contents)), None
        beside = [f"../blobs/{file}", str(blobs / file), f"./../one/../blobs/{file}"]
        if action == 0:
            damage_json(rng, path, root)
        elif action == 1:
            target = rng.choice([*beside * 3, *JUNK, *contents, f"./{file}", f"{file}/", "..", "x" * 5000,
                                 "config.json", "pipe.safetensors"])
            part = parts[file] if rng.random() < 0.5 else parts[file][:1]
            write_json(path, {"weight_map": root["weight_map"] | dict.fromkeys(part, target)}, rng)
        elif action == 2:
            (inside / file).unlink()
            (inside / file).symlink_to(rng.choice((file, "nowhere", "..", beside[0])))
        else:
            (inside / file).write_bytes(damage_bytes(rng, contents[file]))

        def use():
            use_model(inside)
            assert target not in beside, "a file outside of the folder was read"
        return [path, inside], use
    return attempt


TEXTS = ["", " ", "  two  spaces\n\nHuman: it's 12345 o'clock\tAssistant:", "\ud800a", "xxxxxxxxx" * 30,
         "é e\u0301 ﬁ 日本語 👍🏽 \u2028\x07\0", "</s><s><unk>[INST] <|endoftext|> <|im_start|> <0x0A>"]


def use_tokenizer(folder):
    """Whatever was loaded, its ids are its own and read as text."""
    tokenizer = load_tokenizer(folder)
    special = set(tokenizer.special_ids.values())
    for text in TEXTS:
        for ids in (tokenizer.encode(text), tokenizer.encode_after(text)):
            assert all(0 <= id < tokenizer.vocab_size for id in ids) and not special & set(ids)
            assert isinstance(tokenizer.decode(ids), str)
    assert tokenizer.eos_id in tokenizer.stop_ids


def sentencepiece_kind(folder):
    from sentencepiece import sentencepiece_model_pb2
    path, good = folder / "tokenizer.model", tiny.sentencepiece_model(420)
    piece = {"piece": ["", "\0", "a", "▁", "<0x0A>", "<0x0a>", "<unk>", "x" * 10 ** 5, "日"],
             "score": [float("nan"), float("inf"), -float("inf"), 3e38, 0], "type": [1, 2, 3, 4, 5, 6]}
    trainer = {"model_type": [1, 2, 3, 4], "byte_fallback": [True, False], "unk_id": [-1, 1, 10 ** 9],
               "eos_id": [-1, 0, 10 ** 9], "eos_piece": ["", "x"], "treat_whitespace_as_suffix": [True]}
    normalizer = {"precompiled_charsmap": [b"", b"\0\0\1\0", b"\xff" * 40], "add_dummy_prefix": [False],
                  "escape_whitespaces": [False], "remove_extra_whitespaces": [True]}
    tails = [b"\0", b"\x0b", b"\x0a\0", b"\x0a" + b"\xff" * 12, b"\x0a\xff\xff\xff\xff\x0f", b"\x1a\x02\x18"]

    def attempt(rng):
        root, action = sentencepiece_model_pb2.ModelProto.FromString(good), rng.randrange(6)
        at, other = rng.sample(range(len(root.pieces)), 2)
        if action == 0:
            del root.pieces[at]
        elif action == 1:
            root.pieces.insert(at, root.pieces[other])
        elif action in (2, 3):
            part, values = rng.choice(((root.pieces[at], piece), (root.trainer_spec, trainer),
                                       (root.normalizer_spec, normalizer)))
            key = rng.choice(list(values))
            setattr(part, key, rng.choice(values[key]))
        content = root.SerializeToString() + rng.choice(tails) * (action == 4)
        path.write_bytes(damage_bytes(rng, content) if action == 5 else content)
        return [path], lambda: use_tokenizer(folder)
    return attempt


REGEXES = ["x*", "(?=x)", "^", "|a", r"\b", "(x+x+)+(?!x)y", r"(((x*)*)*)*\1y", r"\K", r"\G", "(", "\0",
           "(?:(?:(?:x{100}){100}){100})", r"\w+|(?<!x)", r"\p{Nothing}", "(?R)", "x" * 10 ** 6]


def tokenizer_json_kind(folder):
    plain = json.loads(tiny.byte_level_json(300))
    split = copy.deepcopy(plain)         # as Llama 3's: a regex, BOS from a template, and NFC
    split["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": LLAMA3_WORDS}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}
    split["normalizer"] = {"type": "NFC"}
    split["model"]["ignore_merges"] = True
    split["post_processor"] = {"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": "<|padding|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}
    path = folder / "tokenizer.json"
    for root in (plain, split):          # both are good as they stand
        path.write_text(json.dumps(root))
        use_tokenizer(folder)

    def attempt(rng):
        root = copy.deepcopy(rng.choice((plain, split)))
        action, vocab, merges = rng.randrange(6), root["model"]["vocab"], root["model"]["merges"]
        a, b = rng.sample(list(vocab), 2)
        if action == 0:
            vocab[a] = rng.choice((vocab[b], 299.0, *JUNK))
        elif action == 1:
            vocab[a], vocab[b] = vocab[b], vocab[a]
        elif action == 2:
            merges[rng.randrange(len(merges))] = rng.choice([[a, b], [a], [a, b, a], [a, [b]], *JUNK])
        elif action == 3 and root["normalizer"]:
            root["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = rng.choice(REGEXES)
        if action < 4:
            write_json(path, root, rng)
        else:
            damage_json(rng, path, root, 0.5)
        return [path], lambda: use_tokenizer(folder)
    return attempt


def tiktoken_kind(folder):
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", b"in", b"ing", b"xx"]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    words = [b"", b"=", b"AA", b"\xff\xfe", b"A" * 10 ** 6, b"zzzzzz==", b"-1", b"9" * 5000, b"9" * 30, b"x",
             b"1.0", b"1e3", b"\xb2", b"1_0", b"\0", b"\x85", b" " * 1000]
    path = folder / "tokenizer.model"

    def attempt(rng):
        damaged, action = list(lines), rng.randrange(6)
        n, m = rng.sample(range(len(lines)), 2)
        (token, rank), (other, place) = lines[n].split(), lines[m].split()
        if action == 0:
            del damaged[n]
        elif action == 1:
            damaged.insert(m, lines[n])
        elif action == 2:
            damaged[n] = b" ".join((rng.choice([token, other, *words]), rng.choice([rank, place, *words])))
        elif action == 3:
            damaged[n], damaged[m] = token + b" " + place, other + b" " + rank
        elif action == 4:
            damaged[n] = rng.choice([token, lines[n] + b" " + rank, b"\t" + lines[n], *words])
        content = b"\n".join(damaged) + b"\n"
        path.write_bytes(damage_bytes(rng, content) if action == 5 else content)
        return [path], lambda: use_tokenizer(folder)
    return attempt


def companions_kind(folder):
    added = {str(n): {"content": f"<|im_{n}|>", "special": n % 2 == 0} for n in range(420, 424)}
    good = {}
    for family, (bos, eos) in {"llama": ("<s>", "</s>"), "neox": ("<|endoftext|>",) * 2}.items():
        tiny.write_tokenizer(folder / family, family)
        good[folder / family / "tokenizer_config.json"] = dict(
            bos_token={"content": bos}, eos_token=eos, add_bos_token=True, added_tokens_decoder=added)
        good[folder / family / "generation_config.json"] = dict(eos_token_id=[2, 420], temperature=0.7)
        good[folder / family / "config.json"] = dict(model_type="llama", bos_token_id=0, eos_token_id=0)

    def attempt(rng):
        for path, root in good.items():
            path.write_text(json.dumps(root))
        path, root = rng.choice(list(good.items()))
        damage_json(rng, path, root, 0.5)
        return [path, path.parent], lambda: use_tokenizer(path.parent)
    return attempt


def rows_kind(folder):
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    other = {"from": "gpt", "value": "B"}
    records = [{key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in tiny.pairs(3)]
    records += tiny.pairs(3, seed=1)
    records += [{"prompt": "Hi", "chosen": turns[1:], "rejected": [other]}, {"prompt": "Q", "response": "R"},
                {"prompt": turns[:2], "chosen": "A", "rejected": "B", "p": 0.25, "finished": [True, False]},
                {"conversations": turns[:2], "chosen": turns[2], "rejected": other}, {"messages": turns},
                {"instruction": "Add", "input": "1", "output": "3", "rejected": "4"}, {"turns": ["one"]},
                {"text": "Once there was."}, {"prompt": "Ü\u2028", "chosen": "ä", "rejected": "ö", "p": 1}]
    values = [[turns], turns[:1], [dict(turns[1], role="bot")], [{"role": "user"}], other, turns * 2, *JUNK]
    lines = ["[" * 100_000, '{"a":' * 5000, "nul", '{"prompt": "\udcff"}', '{"p": ' + "9" * 5000 + "}"]

    def attempt(rng):
        need = rng.choice(("pairs", "ordered pairs", "judge", "responses", "prompts"))
        path = folder / f"rows{rng.choice(('.jsonl', '.jsonl', '.jsonl.gz', '.json', '.json.gz'))}"
        action, at, changed = rng.randrange(6), rng.randrange(len(records)), copy.deepcopy(records)
        if action == 0:
            change_tree(rng, changed, 0.9)
        elif action == 1:
            changed[at] = rng.choice(JUNK)
        elif action == 2:
            changed[at][rng.choice(list(changed[at]))] = rng.choice(values)
        texts = [nested(rng, json.dumps(record)) for record in changed]
        if action == 3:
            texts[at] = rng.choice(lines)
        text = "\n".join(texts) if ".jsonl" in path.name else "[" + ",\n".join(texts) + "]"
        content = text.encode(errors="surrogateescape")
        content = flip(rng, content) if action == 4 else content
        content = gzip.compress(content, mtime=0) if path.suffix == ".gz" else content
        path.write_bytes(damage_bytes(rng, content) if action == 5 else content)

        def use():
            rows, report = read_rows(path, need)
            assert len(rows) == report.used and str(report).isprintable()
        return [path], use
    return attempt


# -----------------------------------------------------------------------------------------------------------
# The children

KINDS = {       # and how many seeds each has
    "safetensors": (safetensors_kind, 400), "config": (config_kind, 400), "index": (index_kind, 200),
    "sentencepiece": (sentencepiece_kind, 300), "tokenizer_json": (tokenizer_json_kind, 350),
    "tiktoken": (tiktoken_kind, 200), "companions": (companions_kind, 250), "rows": (rows_kind, 500),
}


def listing(place):
    """What stands in a folder: {path: (size, when it was written)}."""
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in sorted(place.rglob("*"))}


def child(kind, seeds):
    """Use the inputs of one kind -> how many were refused."""
    refused = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "folder"
        folder.mkdir()
        os.chdir(place)                      # what is written beside the input would stand here
        attempt = KINDS[kind][0](folder)
        if sys.platform == "linux":          # elsewhere a process is not told its own size
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE_BYTES,) * 2)
        for seed in seeds:
            print("seed", seed, flush=True)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            files, use = attempt(random.Random(f"{kind} {seed}"))
            before = listing(Path(place))
            try:
                use()
            except InputError as error:
                message = str(error)
                refused += 1
                print(message.replace(place, "…"))
                assert any(str(file) in message for file in files), f"names no file: {message}"
                assert message.isprintable() and message.endswith(".") and len(message) < 700, ascii(message)
            assert listing(Path(place)) == before, "reading wrote something"
        faulthandler.cancel_dump_traceback_later()
        os.chdir("/")
    return refused


@pytest.mark.parametrize("share", [4, pytest.param(1, marks=pytest.mark.slow)], ids=["quarter", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input(kind, share):
    count = KINDS[kind][1] // share
    done = subprocess.run([sys.executable, __file__, kind, "0", str(count)], text=True, capture_output=True,
                          errors="replace", env={**os.environ, "OMP_NUM_THREADS": "1"})
    seeds = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("seed ")]
    last = f"test_fuzz.py {kind} {seeds[-1] if seeds else 0} ends with {done.returncode}"
    assert done.returncode == 0, f"{last}:\n{done.stderr[-3000:]}"
    assert len(seeds) == count
    assert 0 < int(done.stdout.split()[-1]) < count, "the damage is all of one sort"


if __name__ == "__main__":
    torch.set_num_threads(1)
    first, stop = int(sys.argv[2]), int((sys.argv[3:] or [int(sys.argv[2]) + 1])[0])
    print(child(sys.argv[1], range(first, stop)))
