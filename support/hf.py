"""Hugging Face folders: safetensors in and out, in one file or several, and PEFT's layout. Never a pickle.

Tensors are named here as in the files; model.py knows whose names they are.
"""
import contextlib
import math
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.cli import InputError, read_json, write_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What published files hold besides weights: masks and rotary frequencies.
BUFFERS = re.compile(r"(.*\.)?(attention\.(bias|masked_bias)|rotary_emb\.inv_freq)")
SHARD_BYTES = 5_000_000_000        # a folder with more weights gets several files and an index


# -----------------------------------------------------------------------------------------------------------
# In

@contextlib.contextmanager
def opened(path):
    """The open safetensors file. Its reader checks the header against the file; its reason is passed on."""
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read as safetensors: {reason:.200}.") from None


def header(path):
    """{tensor name: (dtype name, shape)} of a safetensors file."""
    with opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def files_of(folder):
    """The safetensors files of a model folder: those that its index names, or the single one."""
    index, single = folder / INDEX, folder / SINGLE
    if index.exists():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise InputError(f"{index}: weight_map is missing or no object.")
        here = [path.name for path in folder.iterdir() if path.is_file()]         # a pipe would be waited for
        for name in listed.values():
            if name not in here:
                raise InputError(f"{index}: weight_map has {name!r:.60}, which is not a file of this folder.")
        return [folder / name for name in dict.fromkeys(listed.values())]
    if single.exists():
        return [single]
    pickled = [path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickled:
        raise InputError(
            f"{folder} holds only pickled weights ({pickled[0]}), which can run code when read; convert them "
            f"where you trust them: python -c \"from transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained('{folder}').save_pretrained('CONVERTED')\".")
    raise InputError(f"{folder} holds neither {SINGLE} nor {INDEX}.")


def tensors_in(folder):
    """{tensor name: (path, dtype name, shape)} of a model folder, from its headers; errors name the file."""
    tensors = {}
    for path in files_of(Path(folder)):
        for name, (dtype, shape) in header(path).items():
            if name in tensors and not BUFFERS.fullmatch(name):
                raise InputError(f"{path} and {tensors[name][0].name} both hold the tensor {name!r:.200}.")
            tensors[name] = path, dtype, shape
    return tensors


def check(tensors, wanted, spare, folder):
    """InputError unless tensors_in(folder) are those of `wanted` {name: shape}, of a type that can be read.

    Buffers, and what has a name in `spare`, may be there too.
    """
    for name, (path, dtype, shape) in tensors.items():
        if name not in wanted:
            if name not in spare and not BUFFERS.fullmatch(name):
                raise InputError(f"{path}: config.json asks for no tensor {name!r:.200}.")
        elif shape != tuple(wanted[name]):
            raise InputError(f"{path}: {name!r} has shape {str(list(shape)):.80}; config.json asks for "
                             f"{list(wanted[name])}.")
        elif dtype not in DTYPES:
            raise InputError(f"{path}: {name!r} is stored as {dtype}; {', '.join(DTYPES)} can be read.")
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise InputError(f"{folder} lacks the tensor {missing[0]!r}, which config.json asks for "
                         f"({len(missing)} of {len(wanted)} are missing).")


def read_tensors(tensors, rows=lambda name: slice(None)):
    """Yield (name, tensor) for `tensors` as tensors_in gives them, one at a time and file by file.

    rows(name): the slice of its first dimension that is read.
    """
    for path in dict.fromkeys(path for path, *_ in tensors.values()):
        with opened(path) as file:
            for name in (name for name, (its, *_) in tensors.items() if its == path):
                yield name, file.get_slice(name)[rows(name)]


# -----------------------------------------------------------------------------------------------------------
# Out

class Rounding:
    """Gives weights the types that they have in the folder where training began, or `dtype`.

    kept: what rounding leaves of the change since then, 1 - Σ|r - w| / Σ|w - w0| over all weights w that are
    rounded, to r, from w0 in that folder: 1 is all of it; 0 is nothing, for rounding moved them as far as
    training had (and where it moved them further). NaN, where the folder can no longer be read.
    """

    def __init__(self, folder, dtype="auto"):
        self.start, self.kept, self.name = tensors_in(folder), 1.0, None
        self.dtype = None if dtype == "auto" else getattr(torch, dtype)
        self.usual = DTYPES[next(iter(self.start.values()))[1]]       # of what is new: a reward model's head

    def __call__(self, named):
        """Yield (name, weight in its type) of all weights, and set `kept`."""
        lost = moved = 0.0
        for name, weight in named:
            dtype = self.dtype or (DTYPES[self.start[name][1]] if name in self.start else self.usual)
            rounded, self.name = weight.to(dtype), self.name or str(dtype).removeprefix("torch.")
            if dtype.itemsize < weight.dtype.itemsize and name in self.start:
                parts = (tensor.flatten().split(1 << 24) for tensor in (weight, rounded, self.read(name)))
                for exact, near, start in zip(*parts):            # in pieces: they may lie on a full card
                    lost += float((near.to(exact) - exact).abs().sum(dtype=torch.float64))
                    moved += float((start.to(exact) - exact).abs().sum(dtype=torch.float64))
                if lost == math.inf:
                    raise InputError(f"--save_dtype={self.name}: {name} has values that are too large.")
            yield name, rounded
        self.kept = max(1 - lost / moved, 0.0) if moved else 1.0

    def read(self, name):
        try:
            (_, start), = read_tensors({name: self.start[name]})
            return start
        except InputError:
            return torch.full(self.start[name][2], math.nan)


def save_tensors(tensors, path):
    """A safetensors file with the mode that new files have here; save_file would make it 0600."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def write_weights(weights, folder):
    """Write (name, tensor) one by one, above SHARD_BYTES as several files and an index -> the first's dtype.

    Memory holds one file's tensors at a time. What an earlier save left in the folder is removed first, for
    a part of it might be read instead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("model-*-of-*.safetensors"), folder / SINGLE, folder / INDEX):
        old.unlink(missing_ok=True)
    shard, size, total, files, dtype = {}, 0, 0, [], None          # files: the names in each

    def write():
        save_tensors(shard, folder / f".part-{len(files)}")
        files.append(list(shard))
        shard.clear()

    for name, weight in weights:
        if size and size + weight.nbytes > SHARD_BYTES:
            write()
            size = 0
        shard[name] = weight.detach().cpu().contiguous()
        size, total, dtype = size + weight.nbytes, total + weight.nbytes, dtype or weight.dtype
    write()
    weight_map = {}
    for number, names in enumerate(files):         # their number is known only now, and part of their names
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else SINGLE
        os.replace(folder / f".part-{number}", folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return dtype


def write_adapters(adapters, folder, rank, alpha, base):
    """PEFT's adapter_config.json and adapter_model.safetensors from (layer's name, "a" or "b", tensor).

    base: the folder of the model that the adapters were trained on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors, targets = {}, set()
    for layer, side, tensor in adapters:
        tensors[f"base_model.model.{layer}.lora_{side.upper()}.weight"] = tensor.detach().cpu().contiguous()
        targets.add(layer.split(".")[-1])
    save_tensors(tensors, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base), r=rank, lora_alpha=alpha,
        bias="none", lora_dropout=0.0, target_modules=sorted(targets), inference_mode=True))
