"""support/hf.py: shards and index there and back, transformers as the oracle; damaged folders refused."""
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef

import model
import tiny
from support import hf
from support.cli import InputError

INDEX = "model.safetensors.index.json"
VOCAB, TOKENS = 64, torch.randint(64, (2, 30), generator=torch.Generator().manual_seed(0))
TIED = dict(tie_word_embeddings=True)


@torch.no_grad()
def our_logits(net):
    net = net if isinstance(net, model.Transformer) else model.load(net)
    return net.head(net(TOKENS))


@torch.no_grad()
def their_logits(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")(TOKENS).logits


def small(folder, family="llama", **changes):
    """A folder of a random network in one file; its index, where SHARD_BYTES is small, has more."""
    model.save(tiny.net(family, dtype=torch.float32, **changes), folder)
    return folder


def rewrite(file, change):
    """Change the tensors of a safetensors file in place."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refused(folder, *words):
    """Loading the folder is one InputError that holds all the words."""
    with pytest.raises(InputError) as caught:
        model.load(folder)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{caught.value!s} does not say {missing}"
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700


@pytest.fixture
def shards(monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 12_000)


# -----------------------------------------------------------------------------------------------------------
# There and back

@pytest.mark.parametrize("family, changes", [("llama", {}), ("llama", TIED), ("neox", {}), ("neox", TIED)])
def test_shards(family, changes, tmp_path, shards):
    from transformers import AutoModelForCausalLM
    net = tiny.net(family, dtype=torch.float32, **changes)
    model.save(net, tmp_path / "ours")
    files = [load_file(path) for path in (tmp_path / "ours").glob("model-*-of-*.safetensors")]
    assert len(files) > 2
    assert all(len(file) == 1 or sum(weight.nbytes for weight in file.values()) <= 12_000 for file in files)
    assert torch.equal(our_logits(tmp_path / "ours"), our_logits(net))
    assert (their_logits(tmp_path / "ours") - our_logits(net)).abs().max() < 1e-4
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="12KB")
    assert len(list((tmp_path / "theirs").glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(our_logits(tmp_path / "theirs"), our_logits(net))


def test_files_of_an_earlier_save_are_removed(tmp_path, monkeypatch):
    """From many files to fewer, to one and back, over the source: what the index names is all there is."""
    net, counts = model.load(small(tmp_path)), []
    for limit in (6_000, 20_000, 10 ** 9, 12_000):
        monkeypatch.setattr(hf, "SHARD_BYTES", limit)
        with torch.no_grad():
            net.norm.weight.mul_(2)
        model.save(net, tmp_path)
        files = {path.name for path in tmp_path.iterdir()} - {"config.json", INDEX}
        index = tmp_path / INDEX
        many = limit < 10 ** 9
        assert index.exists() == many
        named = json.loads(index.read_text())["weight_map"].values() if many else ["model.safetensors"]
        assert files == set(named)
        counts.append(len(files))
        assert torch.equal(our_logits(tmp_path), our_logits(net))
        assert (their_logits(tmp_path) - our_logits(net)).abs().max() < 1e-3
    assert counts[0] > counts[1] > counts[2] == 1 < counts[3]


def test_saving_holds_one_file_at_a_time(tmp_path, shards):
    """Weights are asked for one by one, and those of a file are gone when the next file's are."""
    net, given, most = tiny.net(dtype=torch.float32), [], []

    def weights():
        for name, weight in net.named_parameters():
            copy = weight.detach().clone()
            given.append((StorageWeakRef(copy.untyped_storage()), copy.nbytes))
            most.append(sum(size for storage, size in given if not storage.expired()))
            yield name, copy
            del copy
    model.save_weights(net.config, weights(), tmp_path)
    largest = max(weight.nbytes for weight in net.parameters())
    assert max(most) <= 12_000 + 2 * largest < sum(weight.nbytes for weight in net.parameters()) / 2
    assert torch.equal(our_logits(tmp_path), our_logits(net))


BUFFERS = {
    "neox": {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril(),
             "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
             "gpt_neox.layers.1.attention.rotary_emb.inv_freq": torch.ones(4)},
    "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
}


@pytest.mark.parametrize("family", BUFFERS)
def test_published_buffers_are_passed_over(family, tmp_path):
    expected = our_logits(small(tmp_path, family))
    rewrite(tmp_path / "model.safetensors", lambda tensors: tensors.update(BUFFERS[family]))
    assert torch.equal(our_logits(tmp_path), expected)


def test_rows_are_read_alone(tmp_path):
    """Each rank reads its own rows: those that `rows` names, of each tensor."""
    tensors = hf.tensors_in(small(tmp_path))
    for name, tensor in hf.read_tensors(tensors, lambda name: slice(1, 3)):
        assert torch.equal(tensor, load_file(tmp_path / "model.safetensors")[name][1:3])
        assert tensors[name][1:] == ("F32", load_file(tmp_path / "model.safetensors")[name].shape)


# -----------------------------------------------------------------------------------------------------------
# Damaged folders: one sentence that names the file

def test_damaged_files_are_refused(tmp_path):
    """Cut anywhere, or 300 times with a few wrong bytes in the header: loaded or refused, mostly refused."""
    file, rng, refusals = small(tmp_path) / "model.safetensors", random.Random(0), 0
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    claims = [length.to_bytes(8, "little") + b"{}" for length in (100, 2 ** 31, 2 ** 63, 2 ** 64 - 1)]
    cuts = [content[:length] for length in (0, 5, 8, header - 1, header, len(content) - 1)]
    for damaged in (*cuts, *claims, content + b"x", content[:8] + b"[" * 10 ** 5):
        file.write_bytes(damaged)
        refused(tmp_path, str(file))
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 4))):
            wrong = rng.choice((rng.randrange(256), ord(rng.choice('0123456789{}[],:" F'))))
            damaged[rng.randrange(header)] = wrong
        file.write_bytes(damaged)
        try:
            model.load(tmp_path)
        except InputError as error:
            refusals += str(tmp_path) in str(error)
    assert refusals > 250


UP = "model.layers.1.mlp.up_proj.weight"
BAD_WEIGHTS = {     # what the message names: what is done to the tensors
    "model.norm.weight": lambda t: t.pop("model.norm.weight"),
    "model.layers.1.": lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name],
    "lm_head.weight": lambda t: t.pop("lm_head.weight"),
    "model.layers.2.mlp.up_proj.weight": lambda t: t.update({UP.replace("1", "2"): t[UP].clone()}),
    "lora_A": lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)}),
    "q_proj.bias": lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
    "inv_freq2": lambda t: t.update({"model.rotary_emb.inv_freq2": torch.ones(4)}),
    "[32, 48]": lambda t: t.update({UP: t[UP].T.contiguous()}),
    "model.embed_tokens.weight": lambda t: t.update({"model.embed_tokens.weight": torch.ones(60, 32)}),
    "[1, 48, 32]": lambda t: t.update({UP: t[UP][None].clone()}),
    "I32": lambda t: t.update({UP: t[UP].int()}),
    "F8": lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}),
}


@pytest.mark.parametrize("word", BAD_WEIGHTS)
def test_tensors_that_config_does_not_ask_for(word, tmp_path):
    rewrite(small(tmp_path) / "model.safetensors", BAD_WEIGHTS[word])
    refused(tmp_path, str(tmp_path), word)


@pytest.mark.parametrize("target", [
    "../x.safetensors", "/etc/passwd", "a\\b.safetensors", "a/b.safetensors", "..", ".", "", 3, None,
    "x" * 5000, "a\nb", "\0", "model-00009-of-00009.safetensors"])
def test_an_index_stays_in_its_folder(target, tmp_path, shards):
    index = small(tmp_path / "folder") / INDEX
    shutil.copy(next(index.parent.glob("*.safetensors")), tmp_path / "x.safetensors")
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.norm.weight"] = target
    index.write_text(json.dumps(raw))
    refused(index.parent, str(index), "not a file of this folder")


def test_bad_shards(tmp_path, shards):
    index = small(tmp_path) / INDEX
    first, second = sorted(tmp_path.glob("model-*"))[:2]
    whole, text = second.read_bytes(), index.read_text()
    for broken in ("{", "[]", '{"weight_map": []}', "{}"):
        index.write_text(broken)
        refused(tmp_path, str(index))
    index.write_text(text)
    second.write_bytes(whole[:-4])
    refused(tmp_path, str(second))
    second.write_bytes(whole)
    rewrite(second, lambda tensors: tensors.update({"model.embed_tokens.weight": torch.ones(VOCAB, 32)}))
    refused(tmp_path, first.name, second.name, "model.embed_tokens.weight")
    second.unlink()
    refused(tmp_path, str(index), second.name)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused(name, tmp_path):
    (small(tmp_path) / name).write_bytes(b"never read")
    assert our_logits(tmp_path).isfinite().all()             # beside safetensors they are ignored
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, str(tmp_path), name, "save_pretrained")
    (tmp_path / name).unlink()
    refused(tmp_path, str(tmp_path), "model.safetensors")


# -----------------------------------------------------------------------------------------------------------
# Rounding

def test_what_rounding_leaves_of_a_change(tmp_path):
    """bfloat16 has steps of 2⁻⁷ from 1 to 2. 1 + 2⁻⁷ survives, 1 + 2⁻⁹ falls back to 1, and 1 + 3·2⁻⁹ goes on
    to 1 + 2⁻⁷, a third too far: of 2⁻⁷ + 2⁻⁹ + 3·2⁻⁹ the errors 0, 2⁻⁹ and 2⁻⁹ leave 1 - 2/8."""
    save_file({"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(2)}, tmp_path / "model.safetensors")
    moved = torch.tensor([1 + 2 ** -7, 1 + 2 ** -9, 1 + 3 * 2 ** -9])
    rounding, given = hf.Rounding(tmp_path), [("a", moved), ("b", torch.full((2,), 1 + 2 ** -20))]
    found = dict(rounding(given))
    assert rounding.kept == 0.75 and rounding.name == "bfloat16"
    assert found["a"].tolist() == [1 + 2 ** -7, 1, 1 + 2 ** -7] and found["b"].dtype == torch.float32
    assert dict(rounding([("a", moved - 1 + 3)]))["a"].dtype == torch.bfloat16 and rounding.kept > 0.99
    wide = hf.Rounding(tmp_path, "float32")
    assert torch.equal(dict(wide(given))["a"], moved) and wide.kept == 1
    # next to nothing, on a start that is no bfloat16 itself: rounding moves it further than training has
    save_file({"a": torch.full((3,), 1 + 2 ** -9)}, tmp_path / "model.safetensors")
    rounding = hf.Rounding(tmp_path, "bfloat16")
    assert list(rounding([("a", torch.full((3,), 1 + 2 ** -9 + 2 ** -20))])) and rounding.kept == 0
    with pytest.raises(InputError, match="float16.*too large"):
        list(hf.Rounding(tmp_path, "float16")([("a", torch.tensor([1e5]))]))
    (tmp_path / "model.safetensors").unlink()           # nobody can say, and the weights are written
    assert list(rounding([("a", torch.ones(3))])) and not rounding.kept < 0.995


@pytest.mark.parametrize("rank", [0, 2])
def test_final_has_the_type_of_its_source(rank, tmp_path, capsys):
    """bfloat16 in, bfloat16 out; the steps of a small learning rate do not survive that, and the run says so.
    --save_dtype=float32 keeps them: final/ is then the checkpoint's weights, adapters merged."""
    world = tiny.world(tmp_path)
    source = load_file(world / "model/model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in source.items()}, world / "model/model.safetensors")
    start = load_file(world / "model/model.safetensors")
    for dtype, kind in (("auto", torch.bfloat16), ("float32", torch.float32)):
        out = tmp_path / dtype
        tiny.run(world, out, recipe="sft", steps=1, dtype="float32", lr=1e-6, save_dtype=dtype,
                 lora_rank=rank)
        final, said = tiny.final(out), capsys.readouterr().out
        assert {tensor.dtype for tensor in final.values()} == {kind}
        assert json.loads((out / "final/config.json").read_text())["torch_dtype"] == str(kind)[6:]
        moved = sum(int((tensor != start[name]).sum()) for name, tensor in final.items())
        whole = sum(tensor.numel() for tensor in final.values())
        assert ("% of the change" in said) == (moved < 0.05 * whole) == (dtype == "auto")
