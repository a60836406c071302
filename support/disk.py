"""Files that survive a crash: written aside, synced, renamed; lines up to the first torn one; digests."""
import contextlib
import hashlib
import json
import os
import re
import shutil
import zlib
from pathlib import Path

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError

WRITE_ERRORS = (OSError, SafetensorError, dcp.api.CheckpointException)


def reason(error):
    """Why reading or writing failed, in a few words: torch wraps what the system said in several layers."""
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    said = getattr(error, "strerror", None) or (str(error).strip().splitlines() or ["no reason given"])[-1]
    found = re.search(r"I/O error: (.+) \(os error", said)            # as safetensors says it
    return found[1] if found else said


def write_file(path, text):
    """A whole small file in the place of `path`."""
    aside = path.with_name(f".writing-{path.name}")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    os.replace(aside, path)


def start_folder(path):
    remove(path)
    path.mkdir(parents=True)


def put_in_place(aside, path):
    """A whole folder in the place of `path`."""
    for file in (*aside.iterdir(), aside):
        sync(file)
    discard(path)
    os.replace(aside, path)
    sync(path.parent)


def discard(path):
    """Remove a folder, if there is one; its name first, so that none that is half removed ever counts."""
    aside = path.with_name(f".removing-{path.name}")
    remove(aside)
    if os.path.lexists(path):
        os.replace(path, aside)
        remove(aside)


def remove(path):
    """Remove a folder or file, if there is one. Of a link the link alone: somebody has moved the folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path):
    """Have the system write a file or a folder's list of files to the disk."""
    with contextlib.suppress(PermissionError):        # Windows opens no folders
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def records(path):
    """[(line, its object)] of a jsonl file, up to the first line that is torn or that is no step's."""
    found = []
    # Only \n ends a line: a text may hold U+2028, which str.splitlines takes for an end.
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n")[:-1]:
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, KeyError, TypeError):
            break
        found.append((line + "\n", record))
    return found


def keep_records(path, step):
    """Drop what was written after `step`: it will be made again."""
    write_file(path, "".join(line for line, record in records(path) if record["step"] <= step))


def read_metrics(path):
    """[{name: figure}] of a metrics.jsonl, one per step; a step's evaluation has a line of its own there."""
    steps = {}
    for _, record in records(Path(path)):
        steps[record["step"]] = steps.get(record["step"], {}) | record
    return list(steps.values())


def last_metrics(path):
    """The last step's figures, with its evaluation's if it was evaluated; None before the first."""
    return (read_metrics(path) or [None])[-1]


def checksum(path):
    """[size, CRC-32] of a file: what chance changes shows, at several times the speed of SHA-256."""
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            crc = zlib.crc32(piece, crc)
        return [file.tell(), crc]


def digest(*paths, sampled=False):
    """SHA-256 of contents, in 32 letters; sampled: of sizes and 64 pieces of each file, for many GB."""
    total, piece = hashlib.sha256(), 1 << 16
    for path in paths:
        with open(path, "rb") as file:
            size = os.path.getsize(path)
            total.update(str(size).encode())
            for place in range(0, size, max(size // 64, piece) if sampled else piece):
                file.seek(place)
                total.update(file.read(piece))
    return total.hexdigest()[:32]
