"""Hugging Face folders: which tensors they hold, read and written without a pickle."""
import json
import math
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from support.cli import InputError, read_json

# Buffers that published files carry and that are no weights: masks and rotary frequencies.
BUFFERS = re.compile(r"(.*\.)?(attention\.(bias|masked_bias)|rotary_emb\.inv_freq)")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHARD_BYTES = 5_000_000_000


def read_header(path):
    """{tensor name: (dtype name, shape)} of a safetensors file, after checking that the file can hold what it says.

    Nothing the header claims is believed before memory is taken: its own length, the offsets and the sizes are checked
    against the file. InputError names the file and the tensor.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= size - 8 else None
    except FileNotFoundError:
        raise InputError(f"{path} is missing.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    if text is None:
        raise InputError(f"{path} is truncated or no safetensors file: its header would take {length:,} bytes of a file of "
                         f"{size:,}.")
    try:
        header = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        at = getattr(error, "start", getattr(error, "pos", None))        # of UnicodeDecodeError, of JSONDecodeError
        place = path if at is None else f"{path}, near byte {8 + at}"
        raise InputError(f"{place}: the safetensors header is not valid JSON.") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: the safetensors header is not an object.")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise InputError(f"{path}: __metadata__ in the header is not an object of texts.")
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, start, stop]
            sound = (all(type(n) is int and 0 <= n < 2 ** 63 for n in numbers) and start <= stop
                     and isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= 64)      # as torch
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise InputError(f"{path}: the header entry of {name!r:.200} is broken.")
        if stop > size - 8 - length:
            raise InputError(f"{path} is truncated: {name!r:.200} would end {stop - (size - 8 - length):,} bytes behind the "
                             f"file.")
        if dtype in DTYPES and stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
            raise InputError(f"{path}: {name!r:.200} has shape {str(shape):.80} in {dtype} but {stop - start:,} bytes.")
        tensors[name] = (dtype, tuple(shape))
        spans.append((start, stop, name))
    here, name = 0, "the header"
    for start, stop, name in sorted(spans):
        if start != here:
            raise InputError(f"{path}: the bytes of {name!r:.200} overlap others or leave a gap.")
        here = stop
    if here != size - 8 - length:
        raise InputError(f"{path}: {size - 8 - length - here:,} bytes behind the last tensor, {name!r:.200}, belong to none.")
    return tensors


def weight_files(folder):
    """{tensor name: (path, dtype name, shape)} of all tensors in a model folder, from the headers alone."""
    folder = Path(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise InputError(f"{index}: weight_map is missing or no object.")
        headers = {}
        for tensor, name in listed.items():
            if not isinstance(name, str) or name != os.path.basename(name) or "\\" in name or name in ("", ".", ".."):
                raise InputError(f"{index}: {tensor!r:.200} points to {name!r:.60}, which is not a file of this folder.")
            if name not in headers:
                if not os.path.isfile(folder / name):             # unlike Path's own, False for a name that no file can have
                    raise InputError(f"{index} names the shard {name!r:.60} for {tensor!r:.200}, which the folder lacks.")
                headers[name] = read_header(folder / name)
            if tensor not in headers[name]:
                raise InputError(f"{folder / name} lacks the tensor {tensor!r:.200} that {index.name} expects there.")
        for name, header in headers.items():
            extra = [tensor for tensor in header if listed.get(tensor) != name and not BUFFERS.fullmatch(tensor)]
            if extra:
                raise InputError(f"{folder / name} holds {extra[0]!r:.200}, which {index.name} does not list for this file.")
        return {tensor: (folder / name, *headers[name][tensor]) for tensor, name in listed.items()}
    if single.exists():
        return {tensor: (single, *entry) for tensor, entry in read_header(single).items()}
    pickled = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        raise InputError(
            f"{folder} holds only pickled weights ({pickled[0]}), which can run code when read; convert them where you "
            f"trust them: python -c \"from transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained('{folder}').save_pretrained('CONVERTED')\".")
    raise InputError(f"{folder} holds no model.safetensors and no model.safetensors.index.json.")


def open_weights(path):
    """The open safetensors file; what its own reader refuses beyond our checks is an InputError too."""
    try:
        return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise InputError(f"{path} is no sound safetensors file: {error}.") from None
