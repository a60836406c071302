"""What the command lines share: settings typed as --key=value, one sentence for bad input, a step line.

A script declares one dataclass. Each field says its default, what it is and which values it takes; --help,
types and checks follow from that. There is no configuration language besides it.
"""
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import inspect
import json
import math
import operator
import os
import re
import shutil
import sys
import time
import types
import typing
from pathlib import Path


class InputError(ValueError):
    """Something the user gave us cannot be used. The message is one sentence with the file, key or line."""
    urgent = False           # whether each rank says it at once, though it may not be the first


def read_json(path, absent=None):
    """The JSON object in a file, or `absent` where there is no file; InputError names the file."""
    try:
        value = json.loads(Path(path).read_bytes().decode())
    except FileNotFoundError:
        if absent is None:
            raise InputError(f"{path} is missing.") from None
        return absent
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:       # also: no UTF-8, nested too deeply, too many digits
        raise InputError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object.")
    return value


# ------------------------------------------------------------------------------------------------------------
# Settings

def setting(default, text, least=None, above=None, most=None, choices=None, group=None, below=None):
    """A dataclass field: its default, what it is, and the range or choices of its value (a list: of each).

    group: its heading in --help, which also holds for the fields after it.
    """
    said = dict(text=text, least=least, above=above, most=most, below=below, choices=choices, group=group)
    said = {key: value for key, value in said.items() if value is not None}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=said)
    return dataclasses.field(default=default, metadata=said)


def described(cls):
    """{name: {default, kind, optional, and what `setting` was told}} of a dataclass's fields, in order.

    kind is the type of an annotation `type` or `type | None`. What a subclass leaves unsaid, its parent says.
    """
    found, hints = {}, typing.get_type_hints(cls)
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        for field in dataclasses.fields(base):
            hint, plain = hints[field.name], field.default_factory is dataclasses.MISSING
            optional = isinstance(hint, types.UnionType)
            found[field.name] = {
                **found.get(field.name, {}), **field.metadata, "optional": optional,
                "kind": typing.get_args(hint)[0] if optional else hint,
                "default": field.default if plain else field.default_factory()}
    return found


def given_values(settings):
    """{name: value} of the fields that differ from their default, before a __post_init__ fills in others."""
    return {name: getattr(settings, name) for name, said in described(type(settings)).items()
            if getattr(settings, name) != said["default"]}


RANGES = {"least": ("at least", operator.ge), "above": ("larger than", operator.gt),
          "most": ("at most", operator.le), "below": ("less than", operator.lt)}


def limits(said):
    """What a setting asks of its value, in words."""
    if "choices" in said:
        return "one of " + ", ".join(map(str, said["choices"]))
    return " and ".join(f"{words} {said[key]}" for key, (words, _) in RANGES.items() if key in said)


def check(settings):
    """InputError for a value that its field does not allow, or a float that is not finite. None may be."""
    for name, said in described(type(settings)).items():
        value = getattr(settings, name)
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(item, float) and not math.isfinite(item):
                raise InputError(f"--{name}={typed(value)}: must be a finite number.")
            fits = all(holds(item, said[key]) for key, (_, holds) in RANGES.items() if key in said)
            if not fits or item not in said.get("choices", [item]):
                raise InputError(f"--{name}={typed(value)}: must be {limits(said)}.")


# ------------------------------------------------------------------------------------------------------------
# The command line

def typed(value):
    """A value as it is typed."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def kind_name(kind):
    items = typing.get_args(kind)
    return f"{items[0].__name__},{items[0].__name__},…" if items else kind.__name__


def convert(text, kind, optional=False):
    """The value of `text` for a type: int, float, bool, str, list[…] (a,b,…); optional: "none" is None."""
    if optional and text.lower() == "none":
        return None
    if kind is bool:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
    if typing.get_origin(kind) is list:
        return [convert(part.strip(), typing.get_args(kind)[0]) for part in text.split(",") if part.strip()]
    if kind is int and re.search("[.eE]", text) and float(text).is_integer():       # 1e3 is a whole number
        return int(float(text))
    return kind(text)


ELSEWHERE = {      # what transformers, TRL and PEFT call them
    "model_name_or_path": "model", "model_path": "model", "learning_rate": "lr", "max_grad_norm": "grad_clip",
    "max_steps": "steps", "num_train_epochs": "epochs", "per_device_train_batch_size": "micro_batch_size",
    "eval_steps": "eval_every", "save_steps": "save_every", "num_return_sequences": "k",
    "gradient_checkpointing": "checkpoint_activations", "lora_r": "lora_rank"}


def nearest(key, names):
    """[the one of `names` that `key` may have meant], or []."""
    key = key.replace("-", "_").lower()
    if ELSEWHERE.get(key) in names:
        return [ELSEWHERE[key]]
    return difflib.get_close_matches(key, names, 1, cutoff=0.7)


def help_text(cls):
    """What --help prints: the class's docstring, its settings by group, and its help_notes()."""
    group, groups = "Settings", {}
    for name, said in described(cls).items():
        group = said.get("group", group)
        takes = ", ".join(filter(None, [kind_name(said["kind"]), limits(said)]))
        lines = groups.setdefault(group, [f"{group}:"])
        lines.append(f"  --{name}={typed(said['default'])}  ({takes})")
        lines += [f"        {said['text']}"] if "text" in said else []
    parts = [inspect.getdoc(cls) or "", *("\n".join(lines) for lines in groups.values())]
    return "\n\n".join(parts + ([cls.help_notes()] if hasattr(cls, "help_notes") else []))


def parse(cls, arguments):
    """An instance of the dataclass `cls` from --key=value, --key value or, for a bool, --key; or --help.

    Its `given` is {name: value} of what was typed, though it be equal to the default. InputError: an unknown
    key, one that is given twice, a value of the wrong type.
    """
    if "-h" in arguments or "--help" in arguments:
        print(help_text(cls))
        sys.exit(0)
    fields, given, words = described(cls), {}, list(arguments)
    while words:
        word = words.pop(0)
        match = re.fullmatch(r"--([A-Za-z_][\w-]*)(=.*)?", word, re.DOTALL)
        if not match:
            raise InputError(f"cannot read the argument {word!r}: write --key=value.")
        name, text = match[1], match[2] and match[2][1:]
        if name not in fields:
            hints = [f"did you mean --{near}?" for near in nearest(name, fields)] or ["--help lists them."]
            raise InputError(f"there is no setting --{name}; {hints[0]}")
        if name in given:
            raise InputError(f"--{name} is given twice.")
        kind, optional = fields[name]["kind"], fields[name]["optional"]
        if text is None and words and not words[0].startswith("--"):
            text = words.pop(0)
        if text is None and kind is not bool:
            raise InputError(f"--{name} needs a value: --{name}=….")
        try:
            given[name] = True if text is None else convert(text, kind, optional)
        except (ValueError, KeyError, OverflowError):
            raise InputError(f"--{name}={text}: not a value of type {kind_name(kind)}.") from None
    settings = cls(**given)
    settings.given = {**getattr(settings, "given", {}), **given}
    return settings


def keep_freed_memory():
    """Have glibc, where there is one, keep what is freed. Else large blocks go back to the system, which
    clears them anew: measured, a tenth of the time of sampling and a twentieth of a training step."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)              # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)        # M_TRIM_THRESHOLD


def run(main, cls):
    """The body of every script: parse the settings, call main(settings); bad input is one line and exit 1."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):        # a terminal that is not UTF-8 shows ? for what it lacks
            stream.reconfigure(errors="replace")
    keep_freed_memory()
    try:
        return main(parse(cls, sys.argv[1:]))
    except InputError as error:
        # Mostly all ranks meet the same error: let the first say it.
        if int(os.environ.get("RANK", "0")) and not error.urgent:
            time.sleep(2)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except BrokenPipeError:                 # `sample.py … | head`: the reader has left, nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


# ------------------------------------------------------------------------------------------------------------
# Progress

def duration(seconds):
    """1:02:03, with days before it where they are due."""
    return str(datetime.timedelta(seconds=int(seconds)))


class StepLine:
    """Progress of long work: rewritten in place on a terminal, printed now and then elsewhere."""

    def __init__(self, total, label, enabled=True):
        self.total, self.label, self.enabled = total, label, enabled
        self.start, self.last, self.first, self.width = time.monotonic(), -1e9, 0, 0

    def resume_at(self, done):
        """Steps before `done` were not made in this run: they say nothing about its speed."""
        self.first = done

    def update(self, done, text=""):
        """Show that `done` of the total are finished; `text` is put after the count."""
        now, on_terminal = time.monotonic(), sys.stdout.isatty()
        if not self.enabled or done < self.total and now - self.last < (0.2 if on_terminal else 10):
            return
        self.last, elapsed = now, now - self.start
        left = elapsed / max(done - self.first, 1) * (self.total - done)
        line = f"{self.label} {done}/{self.total} [{duration(elapsed)} < {duration(left)}] {text}"
        if not on_terminal:
            print(line, flush=True)
            return
        line = line[:max(shutil.get_terminal_size().columns - 1, 20)]
        print("\r" + line.ljust(self.width), end="\n" if done >= self.total else "", flush=True)
        self.width = len(line)
