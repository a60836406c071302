"""What the command lines share: settings typed as --key=value, one sentence for bad input, a step line.

A script declares one dataclass. Each field says its default, what it is and which values it takes; --help,
types and checks follow from that. There is no configuration language besides it.
"""
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import errno
import functools
import inspect
import json
import math
import operator
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import types
import typing
from pathlib import Path


class InputError(ValueError):
    """Something the user gave us cannot be used. The message is one sentence with the file, key or line."""

    def __init__(self, message, urgent=False):
        """urgent: each rank says it at once, though it may not be the first."""
        super().__init__(message)
        self.urgent = urgent


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


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@functools.cache
def note(text):
    """Say it on stderr, once however often a file is read."""
    print(f"note: {text}", file=sys.stderr)


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
        print(help_text(cls), flush=True)
        sys.exit(0)
    fields, given, words = described(cls), {}, list(arguments)
    for word in words:
        if re.search("[\ud800-\udfff]", word):       # as Python reads bytes that are no UTF-8
            raise InputError(f"the argument {word!r} is not UTF-8.")
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


def environment(name, default, least=0):
    """A whole number that torchrun has set, or who stands in for it."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise InputError(f"the environment has {name}={text}: must be a whole number, at least {least}.")
    return int(text)


class Stdout:
    """What is printed. A training does not depend on it: where nobody reads it (a reader that left, a full
    disk) the run goes on, and its log.txt has all of it. Another command ends then."""

    def __init__(self, stream, is_training):
        self.stream, self.is_training, self.log, self.lines, self.line = stream, is_training, None, [], ""
        if sys.__stdout__ is None:
            self.note("note: standard output is closed; all that is said is here.")

    def __getattr__(self, name):                   # isatty, fileno, encoding, …
        return getattr(self.stream, name)

    def write(self, text):
        self.keep(text)
        self.pass_on(self.stream.write, text)

    def flush(self):
        self.pass_on(self.stream.flush)

    def pass_on(self, work, *given):
        """Do it on the stream itself; the first time that fails, /dev/null takes the stream's place."""
        try:
            work(*given)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if self.is_training:
                self.note(f"note: standard output cannot be written ({error.strerror}); the run goes on, and "
                          f"all that it says is here.")
            elif isinstance(error, BrokenPipeError):    # `sample.py … | head`: nothing is wrong
                sys.exit(0)
            else:
                raise InputError(f"standard output cannot be written: {error.strerror}.") from None

    def keep(self, text):
        """Add to the log what a terminal would still show: lines, without what was written over in them."""
        *lines, self.line = (self.line + text).split("\n")
        self.note(*(line.rpartition("\r")[2].rstrip() for line in lines))

    def note(self, *lines):
        """Add lines to the log alone, or to what it will get."""
        if self.is_training:
            self.lines += [line + "\n" for line in lines]
        if self.log and self.lines:
            with contextlib.suppress(OSError), open(self.log, "ab") as file:
                file.write("".join(self.lines).encode(errors="replace"))
                self.lines = []

    def log_to(self, path):
        """Add what is printed, and what was, to that file too."""
        self.log = path
        self.note()


def fail(sentence, status=1):
    """Leave with one sentence: on stderr, in the run's log, in torchrun's report (as torch's @record does,
    but without a traceback)."""
    if isinstance(sys.stdout, Stdout) and sys.stdout.is_training:
        if sys.stdout.line:
            print(flush=True)                      # a terminal's step line has no end yet
        sys.stdout.note(f"error: {sentence}")
    with contextlib.suppress(OSError):             # stderr may be closed or full too
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError, KeyError):
        more = {"py_callstack": f"{sentence}", "timestamp": f"{int(time.time())}"}
        report = json.dumps({"message": {"message": f"{sentence}", "extraInfo": more}})
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(report)
    sys.exit(status)


SIZES = "k candidates batch_size micro_batch_size max_length max_tokens lora_rank".split()   # ask for memory


def no_memory(error, settings):
    """For memory that could not be had: who asked for how much and what to lower. Else None."""
    said = str(error)
    if not (isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
            or re.search("allocate memory|out of memory", said)):
        return None
    root = Path(__file__).parents[1]
    ours = [frame for frame in traceback.extract_tb(error.__traceback__)
            if root in Path(frame.filename).parents and "site-packages" not in frame.filename]
    asked = re.search(r"allocate ([\d.]+ \w+)", said)
    place = Path(ours[-1].filename)
    sizes = [f"--{name}={value}" for name in SIZES if (value := getattr(settings, name, None))
             and place.parent != root / "support"]               # there, files are read
    return (f"no memory: {ours[-1].name} in {place.name} asked for {asked[1] if asked else 'more'}, which "
            f"is not there; lower {' or '.join(sizes) or 'the size of what is read'}.")


def unforeseen(error):
    """For an error that nobody foresaw: where its traceback is. OSPREY_TRACEBACK=1 prints it. What the system
    says of a file is clear enough."""
    text, place = "".join(traceback.format_exception(error)), None
    if not os.environ.get("OSPREY_TRACEBACK"):
        if isinstance(error, OSError) and error.filename:
            return f"{os.fsdecode(error.filename)}: {error.strerror}."
        with (contextlib.suppress(OSError), tempfile.NamedTemporaryFile(
                "w", prefix="osprey-", suffix=".txt", delete=False, errors="replace") as file):
            file.write(text)
            place = f"in {file.name}"
    if place is None:
        print(text, file=sys.stderr)
    first = (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
    return f"{type(error).__name__}: {first}; this was not foreseen, its traceback is {place or 'above'}."


def end_with(error, settings=None):
    """Leave because of an error, whatever it is, with a sentence."""
    if isinstance(error, KeyboardInterrupt):
        fail("stopped at once by Ctrl-C.", 128 + signal.SIGINT)
    # Mostly all ranks meet the same error: let the first say it.
    if isinstance(error, InputError) and not error.urgent and os.environ.get("RANK", "0") != "0":
        time.sleep(2)
    fail(error if isinstance(error, InputError) else no_memory(error, settings) or unforeseen(error))


def run(main, cls, is_training=False):
    """The body of every script: parse the settings, call main(settings). What goes wrong is one sentence, and
    exit status 1."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:                  # closed, as by >&-
            setattr(sys, name, open(os.devnull, "w"))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):        # a terminal that is not UTF-8 shows ? for what it lacks
            stream.reconfigure(errors="replace")
    keep_freed_memory()
    settings = None
    with contextlib.redirect_stdout(Stdout(sys.stdout, is_training)):
        try:
            settings = parse(cls, sys.argv[1:])
            main(settings)
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as error:
            end_with(error, settings)


# ------------------------------------------------------------------------------------------------------------
# Progress

def duration(seconds):
    """1:02:03, with days before it where they are due."""
    return str(datetime.timedelta(seconds=int(seconds)))


class StepLine:
    """Progress of long work: rewritten in place on a terminal, printed now and then elsewhere."""

    def __init__(self, total, label, enabled=True, after=0):
        """after: seconds until anything is shown; what is done by then shows nothing."""
        self.enabled = enabled and os.environ.get("RANK", "0") == "0"
        self.total, self.label, self.after = total, label, after
        self.start, self.last, self.first = time.monotonic(), None, 0

    def resume_at(self, done):
        """Steps before `done` were not made in this run: they say nothing about its speed."""
        self.first = done

    def update(self, done, text=""):
        """Show that `done` of the total are finished; `text` is put after the count."""
        now, on_terminal = time.monotonic(), sys.stdout.isatty()
        elapsed = now - self.start
        if not self.enabled or (elapsed < self.after if self.last is None else
                                done < self.total and now - self.last < (0.2 if on_terminal else 10)):
            return
        self.last = now
        left = elapsed / max(done - self.first, 1) * (self.total - done)
        line = f"{self.label} {done}/{self.total} [{duration(elapsed)} < {duration(left)}] {text}".rstrip()
        if not on_terminal:
            print(line, flush=True)
            return
        columns = max(shutil.get_terminal_size().columns - 1, 20)
        print("\r" + line[:columns].ljust(columns), end="\n" if done >= self.total else "", flush=True)


def progress(items, label, total=None):
    """Yield the items and, once that takes longer than ten seconds, show how many of `total` are through."""
    line = StepLine(len(items) if total is None else total, label, after=10)
    for done, item in enumerate(items, 1):
        yield item
        line.update(done)


@contextlib.contextmanager
def watched(folder, size, label):
    """Inside, once that takes longer than ten seconds, show how much of `size` bytes the folder holds."""
    line, over = StepLine(max(size >> 20, 1), label, after=10), threading.Event()

    def watch():
        while not over.wait(1):
            with contextlib.suppress(OSError):                     # a file that was renamed meanwhile
                held = sum(path.stat().st_size for path in folder.iterdir()) >> 20
                line.update(min(held, line.total - 1), "MiB")
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()
