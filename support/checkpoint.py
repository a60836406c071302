"""What a run keeps on disk, so that whatever happens to it, nothing older than the last save is lost.

    out_dir/config.json          the resolved settings, digests of what was read, versions, commit
    out_dir/log.txt              what the run has printed
    out_dir/metrics.jsonl        a line per step; after it one of the step's evaluation, if there was one
    out_dir/rollouts.jsonl       online: each judged pair as a data row; one file per rank
    out_dir/groups.jsonl, answers.jsonl, report.html     the run's page and what it is made of
    out_dir/checkpoint/step-N/   sharded safetensors (torch.distributed.checkpoint) and state.json
    out_dir/final/               a Hugging Face folder
    out_dir/best/                with --keep_best: the same, of the step with the best evaluation so far
    out_dir/adapter/             with --lora_rank: what was trained of it, as PEFT loads it

The rule: write aside, sync, rename. Each place holds the old file or the new one, never half of one.
A checkpoint counts when its state.json does: it is written last and lists all other files with their
sizes and checksums. Lines are added in place; those of steps after the last save are dropped and made again.
What is not finite is not saved. There is no pickle. Random numbers need no state: every draw is a pure
function of (seed, step, row).
"""
import contextlib
import dataclasses
import datetime
import functools
import json
import math
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

try:
    import fcntl
except ImportError:            # Windows
    fcntl = None

from support import cli, disk, hf
from support.cli import InputError
from support.disk import last_metrics, reason
from support.rows import split_weight

FILE_BYTES = 1 << 28           # per file of a checkpoint: torch holds two copies of a file to write it
VERSIONS = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
START = {"step": 0, "skipped": 0, "consecutive_skips": 0}
# Settings that may change without changing what is computed, but for rounding.
FREE = set("out_dir resume keep save_every save_minutes sample_every eval_every device micro_batch_size "
           "reference_cache checkpoint_activations replicas dry_run device_memory inputs "
           "judge_anyway keep_best save_dtype started rank_minutes report_every".split())
# One process needs no process group.
warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)")


class OutDir:
    """The place of one run. All ranks call all methods. The first one writes; where it fails, all fail."""

    def __init__(self, settings, ranks):
        self.settings, self.ranks, self.path = settings, ranks, Path(settings.out_dir)
        self.lock_file = None
        self.refuse_inputs()
        self.before = self.recorded()
        kept = self.before if settings.resume != "never" else None
        now = datetime.datetime.now().isoformat(timespec="seconds")
        self.started = ranks.from_first((kept or {}).get("started") or now)     # a resumed run keeps its own

    def refuse_inputs(self):
        """out_dir is written to and partly cleared, so nothing that the run reads may lie there."""
        def real(path):                          # Path.resolve() fails on links in a circle
            return Path(os.path.realpath(path))
        s, out = self.settings, real(self.path)
        files = [real(split_weight(spec)[0]) for spec in s.files()]
        for path in files:                       # before others are read for minutes
            if not path.exists():
                raise InputError(f"{path}: cannot be read: No such file or directory.")
        models = [real(folder) for folder in s.folders()]
        cache = [real(s.reference_cache)] if s.reference_cache else []
        cleared = {out / name for name in ("final", "best", "adapter", "checkpoint")}
        for path in (*files, *models, *cache):
            if path in models and out.is_relative_to(path):
                raise InputError(f"--out_dir={self.path} lies in the model folder {path}; name another.")
            if path in files and path.parent == out or not cleared.isdisjoint((path, *path.parents)):
                raise InputError(f"--out_dir={self.path} would overwrite {path}, which is read; "
                                 f"name another.")

    def recorded(self):
        """The settings of the run that out_dir holds, or None."""
        before = cli.read_json(self.path / "config.json", absent={}).get("settings")
        ours = ("config.json", "final", "adapter", "checkpoint", "metrics.jsonl", "rollouts.jsonl")
        if not isinstance(before, dict) and any((self.path / name).exists() for name in ours):
            raise InputError(f"--out_dir={self.path} holds files of another kind; name a new folder.")
        return before

    @contextlib.contextmanager
    def locked(self):
        """out_dir belongs to one run at a time. The first rank takes the lock, then shares it with the
        others: it is free when the last of them is gone, for the system frees it whatever happens."""
        with contextlib.ExitStack() as stack:
            self.ranks.wait()        # where this process made another run before: all ranks have left that
            self.ranks.on_first(lambda: self.lock(stack))
            self.ranks.on_first(lambda: self.lock(stack, shared=True))       # else the others cannot
            self.ranks.on_all(lambda: self.lock(stack, shared=True))
            yield

    def lock(self, stack, shared=False):
        """Hold .lock until `stack` is closed, alone or with the other ranks."""
        try:
            if self.lock_file is None or self.lock_file.closed:
                self.path.mkdir(parents=True, exist_ok=True)
                self.lock_file = stack.enter_context(open(self.path / ".lock", "w"))
            if fcntl is not None:
                fcntl.flock(self.lock_file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is writing to --out_dir={self.path}; wait for it, or name "
                             f"another.") from None
        except OSError as error:
            if self.lock_file is None or self.lock_file.closed:
                raise self.unwritable(error) from None             # else a file system without locks

    # -- where to go on -------------------------------------------------------------------------------

    def begin(self, settings, steps, tensors):
        """A checkpoint's state, read into tensors(state); START for a new run; None for a finished one.

        settings: the resolved ones; InputError names what is not as in the run that out_dir holds.
        """
        state = dict(START)
        self.before = self.ranks.on_first(self.recorded)      # again: another run may have been here before
        self.record = json.loads(json.dumps(settings)) | {"inputs": self.ranks.on_first(self.inputs)}
        if self.before is not None and self.settings.resume != "never":
            self.refuse_changes()
            if self.ranks.on_first(lambda: self.is_finished(steps)):
                return None
            newest, sound = self.newest_sound()
            if newest:
                state = self.load(newest, sound, tensors)
                if state["step"] > steps:
                    raise InputError(f"{self.path} has come to step {state['step']} already, after "
                                     f"--steps={steps}; use another --out_dir or --resume=never.")
                if self.ranks.rank == 0:
                    print(f"going on from {newest}", flush=True)
        self.ranks.on_first(lambda: self.clear(state["step"]))
        return state

    def inputs(self):
        """{file or model folder: digest of its contents}: a run goes on only with what it began with."""
        digests = {spec: disk.digest(split_weight(spec)[0]) for spec in self.settings.files()}
        for folder in self.settings.folders():
            files = sorted({path for path, *_ in hf.tensors_in(folder).values()})
            digests[folder] = disk.digest(Path(folder) / "config.json", *files, sampled=True)
        return digests

    def refuse_changes(self):
        """Name the settings and inputs that are not those of the run that out_dir holds."""
        defaults = {field.name: field.default for field in dataclasses.fields(self.settings)}   # for new ones
        changed = [f"{key} ({self.before.get(key)} → {value})" for key, value in self.record.items()
                   if key not in FREE and self.before.get(key, defaults.get(key)) != value]
        changed = changed or [f"the contents of {path}" for path, contents in self.record["inputs"].items()
                              if self.before.get("inputs", {}).get(path) != contents]
        if changed and self.settings.resume != "force":
            raise InputError(f"{self.path} holds a run with other settings or data: {', '.join(changed)}; "
                             f"use another --out_dir, --resume=never to start over or --resume=force to go "
                             f"on all the same.")

    def is_finished(self, steps):
        last = last_metrics(self.path / "metrics.jsonl") or START
        return (self.path / "final").exists() and last["step"] == steps

    def newest_sound(self):
        """The newest checkpoint whose files are what its state.json lists, and its state, or (None, None);
        prints which ones are damaged. Where all are, that is an error: starting over would remove them."""
        damage, part = [], slice(self.ranks.rank, None, self.ranks.size)
        for folder in self.ranks.on_first(self.checkpoints)[::-1]:
            try:
                return folder, self.ranks.on_all(functools.partial(read_state, folder, part))
            except InputError as error:
                if self.ranks.rank == 0:
                    print(f"note: {error}", flush=True)
                damage.append(error)
        for error in damage:
            raise error
        return None, None

    def load(self, folder, state, tensors):
        """Read a checkpoint into tensors(state) in place, on any number of ranks; returns its state."""
        tensors = tensors(state)
        try:
            reader = dcp.HuggingFaceStorageReader(str(folder))
            more = sorted(reader.read_metadata().state_dict_metadata.keys() - tensors.keys())
            if more:                 # dcp reads what it is asked for and does not mind the rest
                raise ValueError(f"it also holds {more[0]}")
            dcp.load(tensors, storage_reader=reader, no_dist=self.ranks.size == 1)
        except (*disk.WRITE_ERRORS, RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"{folder} does not fit this model and optimizer ({reason(error)}); "
                             f"{remedy(folder)}.") from None
        return state

    def clear(self, step):
        """Keep what was made up to this step, write config.json, remove what a killed run left half done."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in ("final", "adapter") if step else ("final", "adapter", "best", "checkpoint"):
                disk.discard(self.path / name)
            for path in self.checkpoints():
                if number(path) > step:          # damaged: it must not count as one that is kept
                    disk.discard(path)
            self.drop_old()                      # a run killed just before it did so at its end saves no more
            for folder in (self.path, self.path / "checkpoint"):
                for left in (*folder.glob(".writing-*"), *folder.glob(".removing-*")):
                    disk.remove(left)
            config = json.dumps({"settings": self.record, "versions": VERSIONS, "commit": commit(),
                                 "command": " ".join(sys.argv), "given": self.settings.given,
                                 "ranks": self.ranks.size}, indent=2, ensure_ascii=False)
            disk.write_file(self.path / "config.json", config + "\n")
            for lines in line_files(self.path):
                disk.keep_records(lines, step or -1)
            if isinstance(sys.stdout, cli.Stdout):
                sys.stdout.log_to(self.path / "log.txt")
        except OSError as error:
            raise self.unwritable(error) from None

    # -- what is written ------------------------------------------------------------------------------

    def append(self, name, rows):
        """Add JSON objects, each with its "step", to a file of lines; a rank may have files of its own."""
        try:
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        except OSError as error:
            raise self.unwritable(error, self.path / name) from None

    def write_lines(self, name, step, rows):
        """Rows of a step in files of lines, one file per rank: rollouts (data rows, so that the run can be
        replayed offline) or answers."""
        name = f"{name}.{self.ranks.rank}.jsonl" if self.ranks.rank else f"{name}.jsonl"
        self.ranks.on_all(lambda: self.append(name, [row | {"step": step} for row in rows]))

    def save(self, tensors, state):
        """checkpoint/step-N: {name: tensor}, sharded or whole, and `state`, JSON with the "step"."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        with (self.written_aside(self.path / "checkpoint" / f"step-{state['step']}") as aside,
              cli.watched(aside, size, "saving")):
            writer = dcp.HuggingFaceStorageWriter(
                str(aside), save_distributed=True, fqn_to_index_mapping=in_files(tensors, self.ranks.size))
            self.ranks.on_all(lambda: list(finite(tensors.items())))
            dcp.save(tensors, storage_writer=writer, no_dist=self.ranks.size == 1)
            own = self.ranks.on_all(lambda: {file.name: disk.checksum(file) for file in sorted(
                aside.iterdir())[self.ranks.rank::self.ranks.size]})
            parts = self.ranks.gather(own)
            self.ranks.on_first(lambda: self.write_state(aside, state, parts))

    def write_state(self, folder, state, parts):
        for lines in line_files(self.path):      # a resumed run counts on the lines up to here
            disk.sync(lines)
        files = {name: sums for part in parts for name, sums in part.items()}
        content = state | {"ranks": self.ranks.size, "settings": self.record, "files": files}
        (folder / "state.json").write_text(json.dumps(content, indent=2), encoding="utf-8")

    def write_folder(self, name, write, weights):
        """out_dir/name, made by write(folder, weights) on the first rank.

        weights: an iterator that gathers tensors from all ranks. So those that do not write take part in
        it too, as does the first one after it has failed.
        """
        def work():
            try:
                if self.ranks.rank == 0:
                    write(aside, finite(weights))
            except disk.WRITE_ERRORS as error:
                raise OSError(reason(error)) from None
            finally:
                for _ in weights:
                    pass
        with self.written_aside(self.path / name) as aside:
            self.ranks.on_all(work)

    @contextlib.contextmanager
    def written_aside(self, place):
        """A new folder to write to, which then takes its place; InputError where writing fails."""
        aside = place.with_name(f".writing-{place.name}")
        try:
            self.ranks.on_first(lambda: disk.start_folder(aside))
            yield aside
            self.ranks.on_first(lambda: disk.put_in_place(aside, place))
            self.ranks.on_first(self.drop_old)
        except disk.WRITE_ERRORS as error:
            if self.ranks.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise self.unwritable(error, place) from None

    def checkpoints(self):
        """Complete checkpoints, oldest first."""
        found = [path for path in self.path.glob("checkpoint/step-*")
                 if re.fullmatch(r"step-\d+", path.name) and (path / "state.json").exists()]
        return sorted(found, key=number)

    def drop_old(self):
        """Remove the checkpoints before the last --keep ones."""
        for old in self.checkpoints()[:-self.settings.keep]:
            disk.discard(old)

    def unwritable(self, error, place=None):
        """The InputError for out_dir, or for a place in it: then with what is left to go on from."""
        if place is None:
            return InputError(f"--out_dir={self.path} cannot be written: {reason(error)}.")
        kept = self.checkpoints()
        return InputError(f"{place} cannot be written: {reason(error)}; " + (
            f"{kept[-1].name} is kept, and the same command goes on from there." if kept else
            "there is no checkpoint yet, and the same command starts again."))


def line_files(out):
    names = "metrics", "rollouts*", "groups", "answers*"
    return [path for name in names for path in out.glob(f"{name}.jsonl")]


def finite(tensors):
    """Yield (name, tensor); OSError for one of which this rank's part is not finite: that is never saved."""
    for name, tensor in tensors:
        own = getattr(tensor, "to_local", tensor.detach)().detach()
        if own.numel() and not all(map(math.isfinite, own.aminmax())):           # NaN is both
            raise OSError(f"{name} is not finite (a lower --lr or --grad_clip may help)")
        yield name, tensor


def read_state(folder, part=slice(None)):
    """A checkpoint's state.json, once the files that it lists, or a part of them, are what was written: torch
    reads a missing rank's file as zeros, in silence."""
    state = START | cli.read_json(folder / "state.json")
    files = state.get("files")
    sound = files and isinstance(files, dict) and all(type(state[name]) is int for name in START)
    if not sound or state["step"] != number(folder):
        raise InputError(f"{folder / 'state.json'} does not say what the checkpoint holds; {remedy(folder)}.")
    for name in sorted(files)[part]:
        path = folder / os.path.basename(name)
        found = path.is_file() and disk.checksum(path)
        if not found or files[name] not in (found, found[0]):          # 0.1 wrote sizes alone
            raise InputError(f"{path} is missing, incomplete or damaged; {remedy(folder)}.")
    return state


def remedy(folder):
    return f"remove {folder} to go on from an earlier one, or start over with --resume=never"


def number(path):
    """The N of a folder step-N."""
    return int(path.name.removeprefix("step-"))


def in_files(tensors, ranks):
    """{name: number of its file, from 1}: tensors in order, about FILE_BYTES in each of a rank's files."""
    files, total = {}, 0
    for name, tensor in tensors.items():
        total += tensor.numel() * tensor.element_size() // ranks
        files[name] = 1 + total // FILE_BYTES
    return files


def commit():
    """The commit of the source, where it is a git checkout; else None."""
    command = ["git", "-C", str(Path(__file__).parents[1]), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=10).strip()
    return None
