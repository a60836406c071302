"""What a run keeps on disk, so that whatever happens to it nothing older than the last save is lost.

    out_dir/config.json             the resolved settings, digests of what was read, versions, commit
    out_dir/metrics.jsonl           one object a step
    out_dir/checkpoint/step-N/      sharded safetensors (torch.distributed.checkpoint) and state.json
    out_dir/rollouts.jsonl          online: each judged pair as a data row; one file a rank
    out_dir/final/                  a Hugging Face folder
    out_dir/adapter/                with --lora_rank: what was trained of it, as PEFT loads it

Every file that matters is written aside, synced and renamed: at any moment its place holds the old one or the new one.
A checkpoint counts when its state.json does, which is written last and lists all other files with their sizes. There is no
pickle. Random numbers need no state: every draw in train.py is a pure function of (seed, step, row).
"""
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError

try:
    import fcntl
except ImportError:            # Windows
    fcntl = None

from support import cli, hf
from support.cli import InputError
from support.rows import split_weight

FILE_BYTES = 1 << 28           # of a checkpoint's files: torch makes two copies of a file in memory before it writes it
WRITE_ERRORS = (OSError, SafetensorError, dcp.api.CheckpointException)


def reason(error):
    """Why a write failed, in a few words: torch wraps what the system said in several layers."""
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    said = getattr(error, "strerror", None) or str(error).strip().splitlines()[-1]
    found = re.search(r"I/O error: (.+) \(os error", said)            # as safetensors says it
    return found[1] if found else said


# ---------------------------------------------------------------------------------------------------------------------
# out_dir

class OutDir:
    """The place of one run. All methods are called by all ranks; the first writes, and where it fails all of them fail."""

    def __init__(self, settings, ranks):
        """Refuse an out_dir that is not a run's, or that holds what this run reads: it will be written to and partly
        cleared. `before` is the settings of the run it holds, or None."""
        s, self.settings, self.ranks, self.path, self.lock_file = settings, settings, ranks, Path(settings.out_dir), None
        out = self.path.resolve()

        def is_cleared(path):
            return any(path.is_relative_to(out / name) for name in ("final", "adapter", "checkpoint"))
        for folder in filter(None, (*s.folders(), s.reference_cache)):
            path = Path(folder).resolve()
            if is_cleared(path) or path == out and folder in s.folders():
                raise InputError(f"--out_dir={self.path} would overwrite {folder}, which this run needs; name another.")
            if out.is_relative_to(path) and folder in s.folders():
                raise InputError(f"--out_dir={self.path} lies in the model folder {folder}; name another.")
        for spec in s.files():
            file = Path(split_weight(spec)[0]).resolve()
            if file.parent == out or is_cleared(file):
                raise InputError(f"{file.name} lies in --out_dir={self.path}, which this run writes to; name another out_dir.")
        if any(place.exists() and not place.is_dir() for place in (self.path, *self.path.parents)):
            raise InputError(f"--out_dir={self.path} cannot be written: a file stands in the way.")
        self.before = self.recorded()

    def recorded(self):
        """The settings of the run that out_dir holds, or None."""
        before = cli.read_json(self.path / "config.json", absent={})
        ours = ("config.json", "final", "adapter", "checkpoint", "metrics.jsonl", "rollouts.jsonl")
        if not isinstance(before.get("settings"), dict) and any((self.path / name).exists() for name in ours):
            raise InputError(f"--out_dir={self.path} holds files of another kind; name an empty or a new folder.")
        return before.get("settings")

    @contextlib.contextmanager
    def locked(self):
        """out_dir belongs to one run at a time. The first rank takes the lock, then shares it with the others: it is free when
        the last of them is gone, who may outlive the first for a while. The system frees it whatever happens."""
        with contextlib.ExitStack() as stack:
            self.ranks.wait()                        # where this process made another run before: all ranks have left that
            self.ranks.on_first(lambda: self.lock(stack))
            if self.ranks.size > 1:
                self.ranks.on_first(lambda: self.lock(stack, shared=True))        # which the others can only do after it
                self.ranks.on_all(lambda: self.lock(stack, shared=True))
            yield

    def lock(self, stack, shared=False):
        """Hold .lock until `stack` is closed, alone or with the other ranks; InputError where another run holds it."""
        try:
            if self.lock_file is None or self.lock_file.closed:
                self.path.mkdir(parents=True, exist_ok=True)
                self.lock_file = stack.enter_context(open(self.path / ".lock", "w"))
        except OSError as error:
            raise InputError(f"--out_dir={self.path} cannot be written: {error.strerror}.") from None
        try:
            if fcntl is not None:
                fcntl.flock(self.lock_file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is writing to --out_dir={self.path}; wait for it, or name another.") from None
        except OSError:          # a file system without locks
            pass

    def inputs(self):
        """{file or model folder: digest of its contents}: a run goes on only with what it began with."""
        found = {}
        for folder in self.settings.folders():
            files = {path for path, *_ in hf.weight_files(folder).values()}
            found[folder] = digest(Path(folder) / "config.json", *sorted(files), sampled=True)
        for spec in self.settings.files():
            found[spec] = digest(split_weight(spec)[0])
        return found

    def begin(self, settings, steps, tensors):
        """Where to go on: a checkpoint's state, read into `tensors`, {"step": 0, …} at the start, None behind the end.

        settings: the resolved ones; other settings or inputs than those of the run that out_dir holds are refused by name.
        tensors(state): {name: tensor} to read a checkpoint into, asked for only when there is one.
        """
        s, state = self.settings, {"step": 0, "skipped": 0, "in_a_row": 0}
        self.before = self.ranks.on_first(self.recorded)      # again: before the lock was ours, another run may have been here
        settings = json.loads(json.dumps(settings)) | {"inputs": self.ranks.on_first(self.inputs)}
        if self.before is not None and s.resume != "never":
            self.refuse_changes(settings)
            last = (last_record(self.path / "metrics.jsonl") or {}).get("step")
            if self.ranks.on_first(lambda: (self.path / "final").exists() and last == steps):
                return None
            found = self.newest_sound()
            if found:
                state = self.load(found, tensors)
                if state["step"] > steps:
                    raise InputError(f"{self.path} has come to step {state['step']} already, behind --steps={steps}; use another "
                                     f"--out_dir or --resume=never.")
                self.say(f"going on from {found}")
        self.settings_record = settings
        self.ranks.on_first(lambda: self.clear(state))
        return state

    def say(self, text):
        if self.ranks.rank == 0:
            print(text, flush=True)

    def refuse_changes(self, settings):
        """Name the settings and inputs that are not those of the run that out_dir holds."""
        # What may change without changing what is computed, but for rounding.
        free = {"out_dir", "resume", "keep", "save_every", "sample_every", "eval_every", "device", "micro_batch_size",
                "reference_cache", "checkpoint_activations", "replicas", "dry_run", "device_memory", "inputs"}
        plain = {field.name: field.default for field in dataclasses.fields(self.settings)}      # for what is newer than the run
        changed = [f"{key} ({self.before.get(key)} → {value})" for key, value in settings.items()
                   if key not in free and self.before.get(key, plain.get(key)) != value]
        changed = changed or [f"the contents of {path}" for path, contents in settings["inputs"].items()
                              if self.before.get("inputs", {}).get(path) != contents]
        if changed and self.settings.resume != "force":
            raise InputError(f"{self.path} holds a run with other settings or data: {', '.join(changed)}; use another "
                             f"--out_dir, --resume=never to start over or --resume=force to go on all the same.")

    def clear(self, state):
        """Leave what was made up to the state's step, write config.json, and remove what a killed run left half written."""
        step = state["step"]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in ("final", "adapter") if step else ("final", "adapter", "checkpoint"):
                discard(self.path / name)
            for damaged in [path for path in self.checkpoints() if number(path) > step]:      # they would count as kept ones
                discard(damaged)
            self.drop_old()                          # a run killed just before it did that at its end saves no more
            for folder in (self.path, self.path / "checkpoint"):
                for left in (*folder.glob(".writing-*"), *folder.glob(".removing-*")):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            record = {"settings": self.settings_record, "versions": versions(), "commit": commit(), "ranks": self.ranks.size}
            write_text(self.path / "config.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
            for path in self.path.glob("rollouts*.jsonl"):
                keep_records(path, step)
            keep_records(self.path / "metrics.jsonl", step - ("unmeasured" in state))     # that step's line is still to come
        except OSError as error:
            raise InputError(f"--out_dir={self.path} cannot be written: {error.strerror}.") from None

    def append(self, name, rows):
        """Add JSON objects to a file of lines; each rank may have files of its own."""
        try:
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        except OSError as error:
            raise InputError(f"{self.path / name} cannot be written: {error.strerror}; {self.kept()}") from None

    def kept(self):
        """What is left to go on from, for the sentence of an error."""
        kept = self.checkpoints()
        return (f"{kept[-1].name} is kept, and the same command goes on from there." if kept else
                "there is no checkpoint yet, and the same command starts again.")

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def save(self, tensors, state):
        """checkpoint/step-N: `tensors` {name: tensor}, sharded or whole, and `state`, a JSON object with the "step"."""
        folder = self.path / "checkpoint"
        aside, place = folder / f".writing-step-{state['step']}", folder / f"step-{state['step']}"

        def put_in_place():
            for lines in (*self.path.glob("metrics.jsonl"), *self.path.glob("rollouts*.jsonl")):      # a resume counts on them
                sync(lines)
            files = {file.name: file.stat().st_size for file in sorted(aside.iterdir())}
            record = state | {"ranks": self.ranks.size, "settings": self.settings_record, "files": files}
            (aside / "state.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
            for file in aside.iterdir():
                sync(file)
            sync(aside)
            discard(place)                                    # only a damaged one can stand there
            os.replace(aside, place)
            sync(folder)
            self.drop_old()
        try:
            self.ranks.on_first(lambda: start_folder(aside))
            with warnings.catch_warnings():               # one process needs no process group, which DCP warns about
                warnings.simplefilter("ignore", UserWarning)
                writer = dcp.HuggingFaceStorageWriter(str(aside), save_distributed=True,
                                                      fqn_to_index_mapping=in_files(tensors, self.ranks.size))
                dcp.save(tensors, storage_writer=writer, no_dist=self.ranks.size == 1)
            self.ranks.on_first(put_in_place)
        except WRITE_ERRORS as error:
            if self.ranks.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise InputError(f"the checkpoint {place} cannot be written: {reason(error)}; {self.kept()}") from None

    def drop_old(self):
        """Remove the checkpoints behind the last --keep ones."""
        for old in self.checkpoints()[:-self.settings.keep]:
            discard(old)

    def checkpoints(self):
        """Complete checkpoints, oldest first."""
        found = [path for path in (self.path / "checkpoint").glob("step-*")
                 if re.fullmatch(r"step-\d+", path.name) and (path / "state.json").exists()]
        return sorted(found, key=number)

    def newest_sound(self):
        """The newest checkpoint whose files are what its state.json lists, or None; damaged ones behind it are named.
        Where every one is damaged, that is an error: starting over would remove them."""
        def look():
            damage = []
            for folder in reversed(self.checkpoints()):
                try:
                    read_state(folder)
                except InputError as error:
                    damage.append(str(error))
                    continue
                return str(folder), damage
            if damage:
                raise InputError(damage[0])
            return None, []
        folder, damage = self.ranks.on_first(look)
        for text in damage:
            self.say(f"note: {text}")
        return folder and Path(folder)

    def load(self, folder, tensors):
        """Read a checkpoint into tensors(state) in place, on any number of ranks; returns its state."""
        state = read_state(folder)
        tensors = tensors(state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                reader = dcp.HuggingFaceStorageReader(str(folder))
                more = sorted(reader.read_metadata().state_dict_metadata.keys() - tensors.keys())
                if more:             # dcp reads what it is asked for and does not mind the rest
                    raise ValueError(f"it also holds {more[0]}")
                dcp.load(tensors, storage_reader=reader, no_dist=self.ranks.size == 1)
            except (dcp.api.CheckpointException, RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
                raise InputError(f"{folder} does not fit this model and optimizer ({reason(error)}); {remedy(folder)}.") from None
        return state

    def write_folder(self, name, write, weights):
        """out_dir/name, made aside by write(folder, weights) on the first rank, synced and renamed.

        weights: an iterator that gathers tensors from all ranks; those that do not write take part all the same.
        """
        aside, place, failed = self.path / f".writing-{name}", self.path / name, []

        def put_in_place():
            for error in failed:
                raise OSError(reason(error))          # one that all ranks can be told of
            for file in aside.iterdir():
                sync(file)
            sync(aside)
            discard(place)
            os.replace(aside, place)
            sync(self.path)
        try:
            self.ranks.on_first(lambda: start_folder(aside))
            try:
                if self.ranks.rank == 0:
                    write(aside, weights)
            except WRITE_ERRORS as error:
                failed.append(error)
            for _ in weights:
                pass
            self.ranks.on_first(put_in_place)
        except WRITE_ERRORS as error:
            if self.ranks.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise InputError(f"{place} cannot be written: {reason(error)}; {self.kept()}") from None


def in_files(tensors, ranks):
    """{name: number of its file, from 1}: tensors in order, about FILE_BYTES in each of a rank's files."""
    files, total = {}, 0
    for name, tensor in tensors.items():
        total += tensor.numel() * tensor.element_size() // ranks
        files[name] = 1 + total // FILE_BYTES
    return files


def start_folder(path):
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def number(path):
    """The N of a folder step-N."""
    return int(path.name.removeprefix("step-"))


def discard(path):
    """Remove a folder, where there is one; its name first, so that none that is half removed ever counts."""
    aside = path.with_name(f".removing-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        os.replace(path, aside)
        shutil.rmtree(aside)


def sync(path):
    """Have the system write a file or a folder's list of files to the disk."""
    with contextlib.suppress(PermissionError):        # Windows opens no folders
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def write_text(path, text):
    """A whole small file: aside, synced and renamed."""
    aside = path.with_name(f".writing-{path.name}")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    os.replace(aside, path)


def remedy(folder):
    return f"remove {folder} to go on from an earlier one, or start over with --resume=never"


def read_state(folder):
    """A checkpoint's state.json, after a look at whether all files that it lists are there and whole: torch reads a missing
    rank's file as zeros, in silence."""
    state = cli.read_json(folder / "state.json")
    numbers = ("step", "skipped", "in_a_row")
    whole = isinstance(state.get("files"), dict) and all(type(state.get(name, 0)) is int for name in numbers)
    if not whole or state.get("step", 0) < 1:
        raise InputError(f"{folder / 'state.json'} does not say what the checkpoint holds; {remedy(folder)}.")
    for name, size in state["files"].items():
        path = folder / os.path.basename(name)
        if not path.exists() or path.stat().st_size != size:
            raise InputError(f"{path} is missing or incomplete; {remedy(folder)}.")
    return {"skipped": 0, "in_a_row": 0} | state


# ---------------------------------------------------------------------------------------------------------------------
# Lines, digests, versions

def records(path):
    """[(line, its object)] of a jsonl file, up to the first line that a crash left torn or that is no step's. A line ends
    with a newline and nothing else: a text may hold U+2028 or U+0085, and a last line without its newline is torn."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else []:
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, KeyError, TypeError):
            break
        found.append((line + "\n", record))
    return found


def last_record(path):
    found = records(path)
    return found[-1][1] if found else None


def keep_records(path, step):
    """Drop what was written after `step`: it will be made again."""
    if path.exists():
        write_text(path, "".join(line for line, record in records(path) if record["step"] <= step))


def digest(*paths, sampled=False):
    """SHA-256 of the files' contents, in 32 letters; sampled: of their sizes and 64 pieces of each, for files of many GB."""
    total, piece = hashlib.sha256(), 1 << 16
    for path in paths:
        with open(path, "rb") as file:
            size = os.path.getsize(path)
            total.update(str(size).encode())
            step = max(size // 64, piece) if sampled else piece
            for place in range(0, size, step):
                file.seek(place)
                total.update(file.read(piece))
    return total.hexdigest()[:32]


def versions():
    return {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}


def commit():
    """The commit of the source, where it is a git checkout; else None."""
    try:
        return subprocess.run(["git", "-C", str(Path(__file__).parent.parent), "rev-parse", "HEAD"], capture_output=True, text=True,
                              timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None
