"""What the command lines share: settings typed as --key=value, one clear sentence for bad input, and a step line that
rewrites itself on a terminal.

A script declares one dataclass; the comment on each field is its documentation and what --help prints. There is no
configuration language besides it.
"""
import contextlib
import ctypes
import dataclasses
import difflib
import inspect
import json
import os
import re
import sys
import time
import types
import typing


class InputError(ValueError):
    """Something the user gave us cannot be used. The message is one sentence that names the file, key or line."""
    urgent = False           # whether each rank says it at once, though it may not be the first


def read_json(path, absent=None):
    """The JSON object in a file, or `absent` where there is no file; InputError names the file and the line that is broken."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        value = json.loads(content.decode())
    except FileNotFoundError:
        if absent is not None:
            return absent
        raise InputError(f"{path} is missing.") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line {content[:error.start].count(10) + 1}: not valid JSON (no UTF-8).") from None
    except RecursionError:
        raise InputError(f"{path} is not valid JSON text: it is nested too deeply.") from None
    except ValueError:
        raise InputError(f"{path} is not valid JSON text: a number in it has too many digits.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object.")
    for key, inner in value.items():
        if is_deep(inner):
            raise InputError(f"{path}: {key!r:.60} is nested more than {DEEPEST} deep.")
    return value


DEEPEST = 100       # far more than any file that is read here, far less than where Python gives up


def is_deep(value):
    """Whether a JSON value is nested so deeply that showing or writing it could fail where reading it did not."""
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level if isinstance(outer, (dict, list))
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return bool(level)


def number(text):
    """A number as people type it: 1e3 is an integer when an integer is asked for, but 1.5 is not."""
    value = float(text)
    if value != int(value):
        raise ValueError(text)
    return int(value)


def convert(text, kind):
    """The value of `text` for an annotation: int, float, bool, str, list[str] (comma-separated), or one of these | None."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    kind = next(k for k in options if k is not type(None))
    if type(None) in options and kind is not str and text.lower() == "none":
        return None
    if kind is bool:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
    if typing.get_origin(kind) is list:
        item = typing.get_args(kind)[0]
        return [convert(part.strip(), item) for part in text.split(",") if part.strip()]
    return number(text) if kind is int else kind(text)


def fields_with_comments(cls):
    """[(field, its comment)] in order, read from the source: the comment behind a field, or the lines above it."""
    comments, above = {}, []
    classes = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]       # inherited ones first
    for line in "".join(map(inspect.getsource, classes)).splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            above.append(stripped.lstrip("# "))
            continue
        match = re.match(r"(\w+)\s*:[^#]*(?:#\s*(.*))?$", stripped)
        if match:
            comments[match[1]] = match[2] or " ".join(above)
        above = []
    return [(field, comments.get(field.name, "")) for field in dataclasses.fields(cls)]


def kind_name(kind):
    return kind.__name__ if isinstance(kind, type) and typing.get_origin(kind) is None else str(kind)


ELSEWHERE = {      # what transformers and PEFT call them
    "learning_rate": "lr", "max_grad_norm": "grad_clip", "max_steps": "steps", "num_train_epochs": "epochs",
    "per_device_train_batch_size": "micro_batch_size", "eval_steps": "eval_every", "save_steps": "save_every",
    "gradient_checkpointing": "checkpoint_activations", "lora_r": "lora_rank", "num_return_sequences": "k"}


def nearest(key, names):
    """The one of `names` that whoever typed `key` may have meant, or None. One or two letters alone say nothing."""
    key = key.replace("-", "_").lower()
    close = [name for name in names if name == ELSEWHERE.get(key)] + difflib.get_close_matches(key, names, 1, cutoff=0.7)
    close += [name for name in names if min(len(name), len(key)) >= 3 and (name in key or key in name)]
    return close[0] if close else None


def parse(cls, arguments):
    """An instance of the dataclass `cls` from ['--key=value', …]; --help prints the fields and leaves.

    Fields without a value keep their default. An unknown key or a value of the wrong type raises InputError.
    """
    kinds = typing.get_type_hints(cls)
    given = {}
    for argument in arguments:
        if argument in ("-h", "--help"):
            print((inspect.getdoc(cls) or "").strip() + "\n")
            for field, comment in fields_with_comments(cls):
                default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
                shown = ",".join(map(str, default)) if isinstance(default, list) else default
                print(f"  --{field.name}={shown}"
                      f"  ({kind_name(kinds[field.name])})" + (f"\n        {comment}" if comment else ""))
            sys.exit(0)
        match = re.fullmatch(r"--([A-Za-z_][\w-]*)(?:=(.*))?", argument, re.DOTALL)
        if not match:
            raise InputError(f"cannot read the argument {argument!r}: write --key=value.")
        key, text = match[1], match[2]
        if key not in kinds:
            near = nearest(key, kinds)
            raise InputError(f"there is no setting --{key}" + (f"; did you mean --{near}?" if near else "; --help lists them."))
        if key in given:
            raise InputError(f"--{key} is given twice.")
        if text is None and kinds[key] is not bool:
            raise InputError(f"--{key} needs a value: --{key}=….")
        try:
            given[key] = True if text is None else convert(text, kinds[key])
        except (ValueError, KeyError, OverflowError):
            raise InputError(f"--{key}={text}: not a value of type {kind_name(kinds[key])}.") from None
    settings = cls(**given)
    settings.given = {**getattr(settings, "given", {}), **given}      # what was typed, though it be equal to the default
    return settings


def keep_freed_memory():
    """Have glibc keep what is freed. It gives large blocks back to the system, which clears them again for the next tensor:
    measured, a tenth of the time of sampling and a twentieth of a training step. Elsewhere this does nothing."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)              # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)        # M_TRIM_THRESHOLD


def run(main, cls):
    """The body of every script: parse the settings, call main(settings), and turn bad input into one line and exit 1."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):        # a terminal that is not UTF-8 shows ? for what it lacks
            stream.reconfigure(errors="replace")
    keep_freed_memory()
    try:
        return main(parse(cls, sys.argv[1:]))
    except InputError as error:
        if int(os.environ.get("RANK", 0)) and not error.urgent:      # mostly all meet the same error: let the first say it
            time.sleep(2)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except BrokenPipeError:                       # `sample.py … | head`: the reader has left, nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def duration(seconds):
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class StepLine:
    """Progress of long work: rewritten in place on a terminal, printed now and then elsewhere (logs stay short)."""

    def __init__(self, total, label, every=10.0, enabled=True):
        self.total, self.label, self.every, self.enabled = total, label, every, enabled
        self.start, self.last, self.first, self.width = time.monotonic(), -1e9, 0, 0

    def resume_at(self, done):
        """Steps before `done` were not made in this run: they say nothing about its speed."""
        self.first = done

    def update(self, done, text=""):
        """Show that `done` of the total are finished; `text` is put behind the count."""
        now = time.monotonic()
        on_terminal = sys.stdout.isatty()
        if not self.enabled or (done < self.total and now - self.last < (0.2 if on_terminal else self.every)):
            return
        self.last = now
        elapsed = now - self.start
        left = elapsed / max(done - self.first, 1) * (self.total - done)
        clock = f"{duration(elapsed)} < {duration(left)}" if done < self.total else duration(elapsed)
        line = f"{self.label} {done}/{self.total} [{clock}] {text}"
        if on_terminal:
            columns = os.get_terminal_size().columns if hasattr(os, "get_terminal_size") else 80
            line = line[:max(columns - 1, 20)]
            print("\r" + line.ljust(self.width), end="\n" if done >= self.total else "", flush=True)
            self.width = len(line)
        else:
            print(line, flush=True)
