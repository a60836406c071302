"""--dry_run: sizes from headers alone, what fits and what does not, and (slow) the truth beside it."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import forest
import judge
import losses
import model
import tiny
import train
from support import memory

LLAMA = dict(model_type="llama", hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
             num_attention_heads=32, num_key_value_heads=4, vocab_size=32000, max_position_embeddings=2048)
MISTRAL = dict(LLAMA, model_type="mistral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
               num_key_value_heads=8, max_position_embeddings=32768)
PYTHIA = dict(model_type="gpt_neox", hidden_size=2560, intermediate_size=10240, num_hidden_layers=32,
              num_attention_heads=32, vocab_size=50304, max_position_embeddings=2048)
PUBLISHED = {"TinyLlama-1.1B": (LLAMA, 1_100_048_384, 7 * 2048 + 2 * (2048 + 256) + 3 * 5632),
             "Mistral-7B": (MISTRAL, 7_241_732_096, 7 * 4096 + 2 * (4096 + 1024) + 3 * 14336),
             "Pythia-2.8B": (PYTHIA, 2_775_208_960, (2560 + 3 * 2560) + 2 * 2560 + 2 * (2560 + 10240))}


def empty(config):
    with torch.device("meta"):
        return model.Transformer(model.parse_config(config))


def hollow(path, config):
    """A model folder with all headers in bfloat16 and nothing in them: a file with a hole takes no space."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    net, header, here = empty(config), {}, 0
    for name, weight in net.named_parameters():
        span = [here, here := here + 2 * weight.numel()]
        name = model.file_name(net.config, name)
        header[name] = dict(dtype="BF16", shape=[*weight.shape], data_offsets=span)
    text = json.dumps(header).encode()
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + here)
    return path


def dry(capsys, monkeypatch, folder, ranks=1, **given):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    given = {"recipe": "dpo", "data": "not-read.jsonl", "model": folder, **given}
    arguments = (f"--{name}={value}" for name, value in given.items())
    return tiny.command(train, capsys, monkeypatch, "--dry_run", *arguments)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name):
    """As their cards say; an adapter of rank r on a layer (out, in) has r (in + out)."""
    config, whole, flow = PUBLISHED[name]
    net = empty(config)
    shape = memory.Shape(net)
    assert (shape.whole, shape.flow) == (whole, flow)
    model.add_adapters(net, 64, 1, torch.float32)
    assert sum(weight.numel() for weight in net.parameters()) - whole == 64 * shape.layers * shape.flow


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_micro_batch_is_the_largest_that_fits(ranks, tmp_path, monkeypatch):
    """TinyLlama under DPO: with more memory 1, 2, 4, 8 in turn; it fits, and twice as many would not."""
    folder = hollow(tmp_path / "m", LLAMA)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))

    def peak(size, settings):
        settings.micro_batch_size = size
        shapes = {str(folder): memory.Shape(model.empty_network(folder))}
        return memory.Job(settings, shapes, torch.bfloat16, ranks).peak()[0] / memory.GIB
    sizes = []
    for available in range(4, 72, 4):
        settings = train.Settings(recipe="dpo", model=str(folder), device_memory=float(available))
        sizes.append(memory.micro_batch_size(settings, model.checked_network))
        if sizes[-1] > 1:
            assert peak(sizes[-1], settings) <= available
        if sizes[-1] < 8:
            assert peak(2 * sizes[-1], settings) > available
    assert sizes == sorted(sizes) and set(sizes) == {1, 2, 4, 8}


def test_sizes_are_those_of_the_core():
    assert memory.HEAD_CHUNK == losses.HEAD_CHUNK
    assert memory.FOREST_TOKENS == judge.FOREST_TOKENS
    assert memory.QUERY_BLOCK == forest.QUERY_BLOCK


def test_a_job_is_what_the_settings_say():
    """Its lengths are a run's. Without adapters the judge is a second network, and the reference too."""
    shapes = {"m": memory.Shape(empty(LLAMA))}
    s = train.Settings("osp", "m", max_length=96, max_tokens=12, replicas=2)
    job, whole = memory.Job(s, shapes, torch.bfloat16, 4), shapes["m"].whole
    assert (job.micro, job.prompts, job.samples, job.responses) == (4, 4, 7, 6)     # 16 prompts on 4 ranks
    assert (job.prompt, job.response) == (s.lengths(2048, 0, 1)[1], 12)
    assert job.stays() == {"weights": whole * 4 / 2, "optimizer": whole * 8 / 2,
                           "reference and judge": whole * 2 / 2}
    s = train.Settings("osp", "m", lora_rank=8)
    assert memory.Job(s, shapes, torch.bfloat16, 1).stays()["reference and judge"] == 0


def test_what_fits_on_one_card_of_80_gib(tmp_path, capsys, monkeypatch):
    """Mistral-7B: masters, gradients and one optimizer state alone are 81 GiB. With adapters it fits, and on
    eight cards. No weight is read, no data file, nothing is written."""
    folder = hollow(tmp_path / "mistral", MISTRAL)
    monkeypatch.chdir(tmp_path)
    code, said, error = dry(capsys, monkeypatch, folder, device_memory=80)
    assert code == 1 and "7,241,732,096 parameters; dpo in bfloat16 on 1 × cuda" in said
    assert error.startswith(f"error: dpo of {folder} needs about ") and error.count("\n") == 1
    assert "there are 80.0; this would fit: --lora_rank=64" in error
    code, said, error = dry(capsys, monkeypatch, folder, device_memory=80, lora_rank=64)
    assert code == 0 and "167,772,160 of adapters" in said and not error and "may not fit" not in said
    for recipe in ("dpo", "osp"):
        code, said, _ = dry(capsys, monkeypatch, folder, recipe=recipe, device_memory=80, ranks=8)
        assert code == 0 and "on 8 × cuda" in said and "may not fit" not in said
    code, _, error = dry(capsys, monkeypatch, folder, device_memory=2)
    assert code == 1 and "more ranks, shorter texts" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mistral"]


def test_what_nearly_fits_may_be_tried(tmp_path, capsys, monkeypatch):
    """It is refused where it takes more than 1.2 times what is there: the estimate is no better."""
    folder = hollow(tmp_path / "llama", LLAMA)
    shapes = {str(folder): memory.Shape(empty(LLAMA))}
    most, _ = memory.Job(train.Settings("dpo", str(folder)), shapes, torch.bfloat16, 1).peak()
    given = dict(micro_batch_size=8)
    code, said, _ = dry(capsys, monkeypatch, folder, **given, device_memory=0.95 * most / 2 ** 30)
    assert code == 0 and said.endswith("It may not fit; this would fit: --micro_batch_size=1.\n")
    assert dry(capsys, monkeypatch, folder, **given, device_memory=0.8 * most / 2 ** 30)[0] == 1


def test_a_headers_mistake_is_found_before_the_job(tmp_path, capsys, monkeypatch):
    folder = hollow(tmp_path / "model", LLAMA)
    (folder / "config.json").write_text(json.dumps({**LLAMA, "intermediate_size": 5000}))
    code, _, error = dry(capsys, monkeypatch, folder)
    assert code == 1 and "model.safetensors" in error and "5632]" in error and "5000]" in error
    assert "--dry_run needs a model" in tiny.command(train, capsys, monkeypatch, "--dry_run")[2]
    assert "--replicas=2: the number of processes, 1," in dry(capsys, monkeypatch, folder, replicas=2)[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "neox"])
def test_a_block_keeps_about_what_is_said(family, dtype):
    """Numbers kept for the gradient by three layers less those by two, over several query blocks."""
    packed = forest.pack([[5] * 200 + [6] * 300, [5] * 200 + [7] * 300])
    sizes = dict(hidden_size=256, intermediate_size=704, num_attention_heads=4)

    def saved(layers):
        net = tiny.net(family, dtype=dtype, vocab_size=400, num_hidden_layers=layers, **sizes)
        own, kept = {weight.untyped_storage().data_ptr() for weight in net.parameters()}, {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = 0 if storage.data_ptr() in own else storage.nbytes() / dtype.itemsize
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = net.hidden(packed)
        return sum(kept.values()) / len(hidden)
    shape = memory.Shape(tiny.net(family, num_hidden_layers=1, **sizes))
    assert shape.kept(500) == pytest.approx(saved(3) - saved(2), rel=0.2)


MEASURE = """
import json, resource, sys
sys.path.insert(0, sys.argv[1])
import train
from support import cli
from support.ranks import Ranks
cli.keep_freed_memory()
ranks = Ranks.start("cpu")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
train.Trainer(train.Settings(**json.loads(sys.argv[2]))).run()
open(f"{sys.argv[3]}.{ranks.rank}", "w").write(str(peak() - before))
"""
OSP = dict(recipe="osp", k=4, max_tokens=128)


@pytest.mark.slow
@pytest.mark.parametrize("ranks, given", [
    (1, dict(recipe="dpo")), (1, dict(recipe="sft", optimizer="adam")), (1, dict(recipe="dpo", lora_rank=16)),
    (1, OSP), (1, dict(recipe="dpo", checkpoint_activations=True)),
    (2, dict(recipe="dpo")), (2, OSP), (2, dict(recipe="dpo", lora_rank=16))])
def test_the_estimate_beside_the_truth(ranks, given, tmp_path):
    """125 M parameters, every row at max_length: a rank's largest resident set, less the interpreter's, is
    0.8 to 1.2 times what is said, the save included."""
    config = dict(LLAMA, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
                  num_attention_heads=12, bos_token_id=1, eos_token_id=2)
    folder = tiny.write_tokenizer(tmp_path / "model")
    model.save(model.Transformer(model.parse_config(config)).initialise(0), folder)
    rows = [{"prompt": row["prompt"] * 20, "chosen": f" {row['chosen'] * 60}{i}",
             "rejected": f" {row['rejected'] * 60}{i}"} for i, row in enumerate(tiny.pairs(8, seed=1))]
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)
    given = dict(model=str(folder), data=[data], out_dir=str(tmp_path / "out"), steps=2, batch_size=4,
                 micro_batch_size=2, max_length=512, warmup_steps=0) | given
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] * (ranks > 1)
    done = subprocess.run([sys.executable, *launch, script, Path(train.__file__).parent, json.dumps(given),
                           tmp_path / "peak"], check=False, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    shapes = {str(folder): memory.Shape(model.empty_network(folder))}
    said, *_ = memory.Job(train.Settings(**given), shapes, torch.float32, ranks).peak()
    measured = [int((tmp_path / f"peak.{rank}").read_text()) / said for rank in range(ranks)]
    print(f"{given['recipe']} on {ranks}: {measured} of {said / 2 ** 30:.2f} GiB")
    assert 0.8 <= min(measured) <= max(measured) <= 1.2
