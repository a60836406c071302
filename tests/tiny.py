"""Tiny models, tokenizers, data and trainings that the tests share, made from seeds in well under a second.

    folder(tmp_path)                       a model folder of random weights that transformers loads too
    net("neox")                            the same network alone, in float64
    write_jsonl(path, pairs(40))           a preference file
    run(world, out, recipe="dpo")          a short training on world/model and world/pairs.jsonl: its metrics
    trainer(world, out, recipe="dpo")      its Trainer, before the first step
    assert_same_run(one, two, tolerance)   metrics, weights and checkpoints of two out_dirs
    command(sample, …, "--model=DIR")      a command line, without a process of its own
    launch(["--recipe=dpo", …], ranks=2)   a training in processes of its own
"""
import contextlib
import functools
import io
import json
import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import data
import judge
import model
import train
from experiments import toy
from support import cli, disk

ROOT = Path(__file__).parent.parent
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=512)
FAMILIES = {       # biases, grouped heads and partial rotary positions: whatever can be mixed up is there
    "llama": dict(SIZES, model_type="llama", num_key_value_heads=2, rms_norm_eps=1e-5),
    "mistral": dict(SIZES, model_type="mistral", num_key_value_heads=2, rms_norm_eps=1e-5,
                    sliding_window=16),
    "neox": dict(SIZES, model_type="gpt_neox", rotary_pct=0.5, layer_norm_eps=1e-5),
}

# ------------------------------------------------------------------------------------------------------------
# Text

THINGS = "river tree cloud stone bird lamp bread garden train winter".split()
TRAITS = "small old bright quiet heavy kind round cold green slow".split()
ACTS = "moves stands sings waits falls grows sleeps shines turns rests".split()


def sentence(rng):
    return f"The {rng.choice(TRAITS)} {rng.choice(THINGS)} {rng.choice(ACTS)}."


def pairs(n, seed=0):
    """n rows {"prompt", "chosen", "rejected"}: HH dialogues of one or two questions, answers of one to four
    sentences."""
    rng, rows = random.Random(seed), []
    while len(rows) < n:
        before = f"\n\nHuman: What does the {rng.choice(THINGS)} do?\n\nAssistant: {sentence(rng)}"
        prompt = (before * rng.randint(0, 1)
                  + f"\n\nHuman: Tell me about the {rng.choice(TRAITS)} {rng.choice(THINGS)}.\n\nAssistant:")
        chosen, rejected = ("".join(" " + sentence(rng) for _ in range(rng.randint(1, 4))) for _ in range(2))
        if chosen != rejected:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def write_jsonl(path, rows):
    """The rows as a .jsonl file -> str path, as command lines take it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def shared(name):
    """The path of a file or folder of published data; without it, the test is skipped."""
    path = Path(os.environ.get("OSPREY_DATA", ROOT.parent / "shared/data")) / name
    if not path.exists():
        pytest.skip(f"{path} is absent; OSPREY_DATA names the folder that holds {name}")
    return str(path)


def corpus():
    """What the tokenizers learn from: such rows, the judge's instruction and p, so that all stay short."""
    yield from (row[key] for row in pairs(60, seed=-1) for key in row)
    yield from [judge.TEMPLATES["helpful"], data.REFINEMENT_PROMPT] * 20


# ------------------------------------------------------------------------------------------------------------
# Folders

@functools.cache
def sentencepiece_model(vocab_size):
    """The bytes of a tokenizer.model like Llama 2's: BPE with byte fallback, spaces kept as they are."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(), model_writer=trained, model_type="bpe", vocab_size=vocab_size,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, minloglevel=2)
    return trained.getvalue()


def spaced_tokenizer(content, prefix=True, bos=True, first_merges=()):
    """A tokenizer.model's bytes as a tokenizer of `tokenizers`, as transformers 4 converted Llama's.

    prefix: it puts a word-start before a text; bos: and its first token; first_merges: pairs that merge
    before all others, into tokens after the others.
    """
    source = sentencepiece.SentencePieceProcessor(model_proto=content)
    vocab = {source.id_to_piece(id): id for id in range(source.vocab_size())}
    special = [piece for piece, id in vocab.items() if source.is_control(id) or source.is_unknown(id)]
    merges = [*first_merges, *((piece[:i], piece[i:]) for piece in vocab for i in range(1, len(piece))
                               if piece[:i] in vocab and piece[i:] in vocab and not piece.startswith("<"))]
    vocab |= {"".join(pair): len(vocab) + n for n, pair in enumerate(first_merges)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=special[0], fuse_unk=True,
                                                byte_fallback=True))
    tokenizer.add_special_tokens(special)
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    name = source.id_to_piece(source.bos_id())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{name} $A" if bos else "$A", special_tokens=[(name, source.bos_id())])
    return tokenizer


@functools.cache
def sentencepiece_json(vocab_size):
    """The same tokenizer as a tokenizer.json: without protobuf transformers cannot read the other file."""
    return spaced_tokenizer(sentencepiece_model(vocab_size)).to_str()


@functools.cache
def byte_level_json(vocab_size):
    """The text of a tokenizer.json like Pythia's: byte-level BPE whose <|endoftext|> is both BOS and EOS."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>", "<|padding|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer.to_str()


def write_tokenizer(path, family="llama", vocab_size=420):
    """The tokenizer's files in the folder `path`, with what AutoTokenizer needs to load them."""
    path.mkdir(parents=True, exist_ok=True)
    if family == "neox":
        (path / "tokenizer.json").write_text(byte_level_json(vocab_size), encoding="utf-8")
        config = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<|endoftext|>",
                      eos_token="<|endoftext|>")
    else:
        (path / "tokenizer.model").write_bytes(sentencepiece_model(vocab_size))
        (path / "tokenizer.json").write_text(sentencepiece_json(vocab_size), encoding="utf-8")
        config = dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                      legacy=False)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def net(family="llama", seed=0, dtype=torch.float64, scale=1.0, vocab_size=64, **changes):
    """A network with every parameter random, norms and biases too; scale 1 makes predictions sharp."""
    config = dict(FAMILIES[family], vocab_size=vocab_size, **changes)
    return randomise(model.Transformer(model.parse_config(config)).to(dtype), seed, scale)


@torch.no_grad()
def randomise(network, seed=0, scale=1.0):
    """The network, of whatever library, with every parameter random -> the network."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype)
        if weight.dim() == 1:
            weight.copy_(0.3 * scale * noise + name.endswith("weight"))
        else:
            weight.copy_(scale * (noise if "embed" in name else 1.5 * noise / weight.shape[1] ** 0.5))
    return network


def folder(path, family="llama", seed=0, scale=0.3, vocab_size=420, **changes):
    """A model folder in `path` -> path: random weights in float32, a tokenizer, config.json with `changes`.

    The GPT-NeoX one has four rows more than its tokenizer has ids, as Pythia has.
    """
    ends = dict(bos_token_id=0, eos_token_id=0) if family == "neox" else dict(bos_token_id=1, eos_token_id=2)
    rows = vocab_size + 4 * (family == "neox")
    network = net(family, seed, torch.float32, scale, rows, **{**ends, **changes})
    model.save(network, path)
    return write_tokenizer(path, family, vocab_size)


def world(path):
    """The folder `path` with a model and a file of 13 pairs -> path."""
    folder(path / "model")
    write_jsonl(path / "pairs.jsonl", pairs(13, seed=1))
    return path


# ------------------------------------------------------------------------------------------------------------
# Trainings

def settings(world, out, **changes):
    """Settings, as plain values, of a short float64 run whose steps are large enough to see. The folder
    `world` has a model folder `model` and a file pairs.jsonl."""
    return {"model": str(world / "model"), "data": [str(world / "pairs.jsonl")], "out_dir": str(out),
            "steps": 3, "batch_size": 4, "lr": 1e-3, "warmup_steps": 0, "max_length": 96, "max_tokens": 12,
            "k": 4, "dtype": "float64", "device": "cpu", "judge_anyway": True, "show_prompts": 0, **changes}


def typed(given):
    """The same as a command line has them."""
    return [f"--{name}={cli.typed(value)}" for name, value in given.items()]


def trainer(world, out, **changes):
    """The Trainer of such a run, with an out_dir that its rollouts may be written to."""
    made = train.Trainer(train.Settings(**settings(world, out, **changes)))
    made.out.path.mkdir(parents=True, exist_ok=True)
    return made


def run(world, out, **changes):
    """Such a run from end to end; its metrics."""
    train.Trainer(train.Settings(**settings(world, out, **changes))).run()
    return metrics(out)


def timeless(rows):
    """Metrics without times, which differ from run to run."""
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


def metrics(out):
    """[{name: figure}] of an out_dir, one per step, its evaluation included; without times."""
    return timeless(disk.read_metrics(Path(out) / "metrics.jsonl"))


def rollouts(out):
    """The rows that one rank has sampled."""
    return [json.loads(line) for line in (Path(out) / "rollouts.jsonl").read_text().splitlines()]


def final(out):
    """{name: tensor} of final/."""
    return load_file(Path(out) / "final" / "model.safetensors")


def last_checkpoint(out):
    """(step, {name: whole tensor}) of the newest checkpoint, on whatever ranks it was written."""
    folder = max(Path(out).glob("checkpoint/step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    reader = dcp.HuggingFaceStorageReader(str(folder))
    tensors = {name: torch.full(entry.size, torch.nan, dtype=entry.properties.dtype)
               for name, entry in reader.read_metadata().state_dict_metadata.items()}
    with warnings.catch_warnings():               # one process needs no process group, which dcp warns about
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return int(folder.name.removeprefix("step-")), tensors


def assert_close(one, two, tolerance):
    """{name: tensor or figure} of two runs; tolerance 0: the same bits."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.shape == two[name].shape and value.dtype == two[name].dtype, name
            assert (value.double() - two[name].double()).abs().max() <= tolerance, name
        else:
            assert value == pytest.approx(two[name], rel=tolerance, abs=tolerance), name


def assert_same_run(one, two, tolerance, digits=None):
    """The metrics of two runs, within `digits` where that is told; final weights; the last checkpoints."""
    rows = metrics(one)
    for a, b in zip(rows, metrics(two), strict=True):
        assert_close(a, b, tolerance if digits is None else digits)
    assert_close(final(one), final(two), tolerance)
    (step, a), (other, b) = last_checkpoint(one), last_checkpoint(two)
    assert step == other == rows[-1]["step"] > 1 and any(name.startswith("optimizer.") for name in a)
    assert_close(a, b, tolerance)


@contextlib.contextmanager
def stopped_before(step, monkeypatch):
    """Inside, a training ends before this step (from 0) as by Ctrl-C at once; it must come that far."""
    update = train.Trainer.update

    def stop(trainer, now):
        if now == step:
            raise KeyboardInterrupt
        return update(trainer, now)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Trainer, "update", stop)
        yield


# ------------------------------------------------------------------------------------------------------------
# Command lines

def command(script, capsys, monkeypatch, *arguments):
    """(exit code, stdout, stderr) of a command line, run in this process; script is the module."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
    code = 0
    try:
        cli.run(script.main, script.Settings)
    except SystemExit as leaving:
        code = leaving.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# ------------------------------------------------------------------------------------------------------------
# Processes

def launch(arguments, ranks=1, script="train.py", options=(), **environment):
    """A real training process, in a session of its own; `ranks` > 1 through torchrun, with its options."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *options]
    return subprocess.Popen(
        [*start, str(ROOT / script), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, start_new_session=True)


def workers_of(torchrun):
    """{rank: pid} of the processes that a torchrun has started."""
    found = {}
    for tasks in Path(f"/proc/{torchrun.pid}/task").glob("*/children"):
        for pid in tasks.read_text().split():
            with contextlib.suppress(OSError):
                for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    if item.startswith(b"RANK="):
                        found[int(item[5:])] = int(pid)
    return found


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def lines(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def small_world(monkeypatch, steps):
    """The embedded world with few rows, a small model and so many steps a stage."""
    monkeypatch.setattr(toy, "ROWS", dict(texts=64, sft=64, pairs=64, blanks=16, held_out=24, advice=4,
                                          eval=16))
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    monkeypatch.setattr(toy, "SHAPE", toy.SHAPE | small)
    for stage in toy.STAGES.values():
        for name, value in (("steps", steps), ("batch_size", 8), ("warmup_steps", 0)):
            monkeypatch.setitem(stage, name, value)
