"""--dry_run: parameters and bytes from headers alone, what fits and what does not, and (slow) the estimate beside the truth."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
from support import memory
import model
import tiny
import train

ROOT = Path(__file__).parents[2]
LLAMA = dict(model_type="llama", hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
             num_key_value_heads=4, vocab_size=32000, max_position_embeddings=2048)
PUBLISHED = {
    "TinyLlama-1.1B": (LLAMA, 1_100_048_384),
    "Mistral-7B": (dict(model_type="mistral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                        num_attention_heads=32, num_key_value_heads=8, vocab_size=32000, max_position_embeddings=32768), 7_241_732_096),
    "Pythia-2.8B": (dict(model_type="gpt_neox", hidden_size=2560, intermediate_size=10240, num_hidden_layers=32,
                         num_attention_heads=32, vocab_size=50304, max_position_embeddings=2048), 2_775_208_960),
}


def hollow(path, config):
    """A model folder with the headers of all weights in bfloat16 and nothing in them: a file with a hole takes no space."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    parsed = model.parse_config(config)
    with torch.device("meta"):
        net = model.Transformer(parsed)
    header, here = {}, 0
    for name, weight in net.named_parameters():
        header[model.file_name(parsed, name)] = dict(dtype="BF16", shape=list(weight.shape), data_offsets=[here, here + 2 * weight.numel()])
        here += 2 * weight.numel()
    text = json.dumps(header).encode()
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + here)
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name, tmp_path):
    """As their cards say; an adapter of rank r on a layer (out, in) has r (in + out)."""
    config, expected = PUBLISHED[name]
    shape = memory.Shape.of(hollow(tmp_path / name, config), rank=64)
    assert shape.whole == expected
    assert shape.config.layers * shape.block + shape.root == expected
    D, ffn = shape.config.width, shape.config.ffn
    kv = shape.config.kv_heads * shape.config.head_dim
    each = (3 * D + D) + 2 * D + 2 * (D + ffn) if shape.config.is_neox else 4 * D + 2 * (D + kv) + 3 * (D + ffn)
    assert shape.adapters == 64 * shape.config.layers * each


def dry(capsys, monkeypatch, folder, ranks=1, **given):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    return tiny.command(train, capsys, monkeypatch, f"--model={folder}", "--dry_run", "--data=not-read.jsonl",
                        *(f"--{name}={value}" for name, value in given.items()))


def test_what_fits_on_one_card_of_80_gib(tmp_path, capsys, monkeypatch):
    """Mistral-7B: float32 masters, gradients and one optimizer state alone are 81 GiB; with adapters it fits, and on eight
    cards too. No weight is read, no data file, nothing is written."""
    folder = hollow(tmp_path / "mistral", PUBLISHED["Mistral-7B"][0])
    monkeypatch.setattr(model, "open_weights", lambda path: pytest.fail("a weight was read"))
    monkeypatch.chdir(tmp_path)
    code, said, error = dry(capsys, monkeypatch, folder, recipe="dpo", device_memory=80)
    assert code == 1 and "7,241,732,096 parameters" in said
    assert error.startswith(f"error: dpo of {folder} needs ") and "there are 80.0" in error and "--lora_rank=64" in error
    assert error.count("\n") == 1
    code, said, error = dry(capsys, monkeypatch, folder, recipe="dpo", device_memory=80, lora_rank=64)
    assert code == 0 and "167,772,160 of adapters" in said and not error
    assert dry(capsys, monkeypatch, folder, recipe="dpo", device_memory=80, ranks=8)[0] == 0
    assert dry(capsys, monkeypatch, folder, recipe="osp", device_memory=80, ranks=8)[0] == 0
    code, _, error = dry(capsys, monkeypatch, folder, recipe="dpo", device_memory=2)
    assert code == 1 and "more ranks, shorter texts" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mistral"]


def test_a_headers_mistake_is_found_before_the_job(tmp_path, capsys, monkeypatch):
    folder = hollow(tmp_path / "model", LLAMA)
    (folder / "config.json").write_text(json.dumps({**LLAMA, "intermediate_size": 5000}))
    code, _, error = dry(capsys, monkeypatch, folder, recipe="dpo")
    assert code == 1 and "model.safetensors" in error and "[5632, 2048]" in error and "[5000, 2048]" in error
    code, _, error = tiny.command(train, capsys, monkeypatch, "--dry_run")
    assert code == 1 and "--dry_run needs a model" in error
    assert dry(capsys, monkeypatch, folder, recipe="dpo", replicas=2)[2].startswith("error: --replicas=2: the number of processes, 1,")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "neox"])
def test_a_block_keeps_what_the_estimate_says(family, dtype):
    """Bytes saved for the gradient by three layers less those by two, over one forest of several query blocks; within 5 %."""
    forest = data.pack([[5] * 200 + [6] * 300, [5] * 200 + [7] * 300])
    job = memory.Job(False, False, False, 1, 2, 1, 7, 200, 300, dtype, torch.float32, "adam", False)
    sizes = dict(hidden_size=256, intermediate_size=704, num_attention_heads=4)

    def saved(layers):
        net = tiny.net(family, dtype=dtype, vocab_size=400, num_hidden_layers=layers, **sizes)
        own = {weight.untyped_storage().data_ptr() for weight in net.parameters()}
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = net.read(forest)
        assert hidden.requires_grad
        return sum(kept.values())
    config = tiny.net(family, num_hidden_layers=1, **sizes).config
    shape = memory.Shape(config, 0, 0, 0, 0)
    measured = (saved(3) - saved(2)) / len(forest.tokens) / dtype.itemsize
    assert shape.saved_numbers(dtype, memory.keys_gathered(job)) == pytest.approx(measured, rel=0.05)


def test_lengths_are_those_of_a_run(tmp_path):
    """The estimate's prompt and response lengths, and the micro-batch, equal what train.Dataset settles on."""
    folder = str(tiny.folder(tmp_path / "model"))
    file = tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.pairs(6))
    for given in (dict(recipe="dpo"), dict(recipe="dpo", max_length=96), dict(recipe="osp", max_length=96, max_tokens=12),
                  dict(recipe="osp"), dict(recipe="dpo", max_length=96, max_prompt_length=20)):
        s = train.Settings(model=folder, data=[file], out_dir=str(tmp_path / "out"), **given)
        ours = train.Trainer(s).data
        job = memory.job_of(s, torch.float32, 512, 1)
        if ours.online:
            assert job.response_length == ours.max_tokens
            assert job.prompt_length + job.response_length <= ours.max_length
        else:
            assert (job.prompt_length, job.prompt_length + job.response_length) == (ours.max_prompt_length, ours.max_length)
    assert memory.job_of(s, torch.float32, 512, 16).micro == 4       # 64 pairs on 16 ranks


MEASURE = """
import json, resource, sys
sys.path.insert(0, sys.argv[1])
import cli, train
cli.keep_freed_memory()
ranks = train.Ranks.start("cpu")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
train.Trainer(train.Settings(**json.loads(sys.argv[2]))).run()
open(f"{sys.argv[3]}.{ranks.rank}", "w").write(str(peak() - before))
"""
JOBS = [(1, dict(recipe="dpo")), (1, dict(recipe="sft", optimizer="adam")), (1, dict(recipe="dpo", lora_rank=16)),
        (1, dict(recipe="osp", k=4, max_tokens=128)), (1, dict(recipe="dpo", checkpoint_activations=True)),
        (2, dict(recipe="dpo")), (2, dict(recipe="osp", k=4, max_tokens=128)), (2, dict(recipe="dpo", lora_rank=16))]


@pytest.mark.slow
@pytest.mark.parametrize("ranks, given", JOBS, ids=lambda value: str(value) if isinstance(value, int) else "-".join(map(str, value.values())))
def test_the_estimate_beside_the_truth(ranks, given, tmp_path):
    """125 M parameters, every row at max_length: the largest resident set of a rank, less the interpreter's own, is within
    0.8 and 1.1 of what --dry_run says, the save included."""
    config = dict(LLAMA, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, bos_token_id=1,
                  eos_token_id=2)
    folder = tiny.write_tokenizer(tmp_path / "model")
    model.save(model.Transformer(model.parse_config(config)).initialise(0), folder)
    rows = [{"prompt": row["prompt"] * 20, "chosen": f" {row['chosen'] * 60}{i}", "rejected": f" {row['rejected'] * 60}{i}"}
            for i, row in enumerate(tiny.pairs(8, seed=1))]
    given = dict(model=str(folder), data=[tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)], out_dir=str(tmp_path / "out"), steps=2,
                 batch_size=4, micro_batch_size=2, max_length=512, warmup_steps=0, **given)
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    done = subprocess.run([sys.executable, *start, str(script), str(ROOT), json.dumps(given), str(tmp_path / "peak")],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    s = train.Settings(**given)
    *_, stays, phases = memory.estimate(s, torch.float32, ranks, "cpu")
    said, _ = memory.peak(stays, phases)
    for rank in range(ranks):
        measured = int((tmp_path / f"peak.{rank}").read_text())
        print(f"{given['recipe']}, rank {rank} of {ranks}: {measured / said:.3f} of {said / 2 ** 30:.2f} GiB")
        assert 0.8 <= measured / said <= 1.1
