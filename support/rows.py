"""Data files: rows of any form (support/forms.py) become Row(prompt, chosen, rejected, p, where, finished).

`need` says what a row must have. A row that cannot be used is skipped, and counted by its reason; a key that
carries text and is not used is counted by its name.
"""
import gzip
import json
import math
import os
import random
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field

from support import forms
from support.cli import InputError
from support.forms import ASSISTANT, Keys, Unusable, hh_prompt, hh_text, read_messages  # noqa: F401

FORMS = [(keys.split(), getattr(forms, name)) for keys, name in forms.FORMS.items()]
BOM = b"\xef\xbb\xbf"


@dataclass
class Row:
    prompt: str | list[dict]      # verbatim text, or messages [{"role": as in forms.ROLES, "content"}]
    chosen: str | None            # the response; None in a prompt-only row
    rejected: str | None          # the worse response; None outside pairs
    p: float | None               # strength p(chosen > rejected) where the file gives it, as rollouts do
    where: str                    # file:line; in a list or a parquet file file:number of the entry
    finished: tuple = (True, True)      # whether chosen and rejected ended; one that was cut gets no EOS


@dataclass
class Report:
    """What became of the rows of one file, for printing."""
    name: str
    used: int
    skipped: dict[str, list[str]] = field(default_factory=dict)      # reason -> where
    cut: int = 0                                                     # rows that lost tokens to max_length
    unused: dict[str, int] = field(default_factory=dict)             # key that carries text -> rows

    def __str__(self):
        cut = f", {self.cut:,} of them cut to max_length" if self.cut else ""
        reasons = []
        for reason, where in self.skipped.items():           # lines of its own file: without the file's name
            places = [os.path.basename(place).removeprefix(self.name + ":") for place in where[:3]]
            reasons.append(f"{len(where):,} {reason} at {', '.join(places + ['…'] * (len(where) > 3))}")
        total = sum(map(len, self.skipped.values()))
        skipped = f", {total:,} skipped ({'; '.join(reasons)})" if reasons else ""
        unused = ", ".join(f"{key} ({rows:,})" for key, rows in self.unused.items())
        unused = f"; text that is not used: {unused}" if unused else ""
        return printable(f"{self.name}: {self.used:,} rows used{cut}{skipped}{unused}")


def printable(text):
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def recognise(record, answered=False):
    """What one JSON object has, as forms.found says it. Raises Unusable.

    answered: there is an answer, though under no key of ANSWERS.
    """
    row = record if isinstance(record, Keys) else Keys(record)
    try:
        for names, form in FORMS:
            if all(name in row for name in names):
                if found := form(row, *(row[name] for name in names)):
                    return found
                row.read.difference_update(names)
        return forms.standard(row, answered)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise error if isinstance(error, Unusable) else Unusable(
            "a field is missing or has the wrong type") from None


def read_answer(value, prompt):
    """(prompt, response) of an answer: text, one turn, or a dialogue that repeats its prompt or brings it."""
    if isinstance(value, str):
        before, mark, response = value.rpartition(ASSISTANT)
        if prompt is None:
            return hh_prompt(before) if mark else None, response
        if mark and isinstance(prompt, str) and prompt.rstrip(" ") == before + mark:      # it is repeated
            return prompt, response
        return prompt, value
    *before, last = read_messages([value] if isinstance(value, dict) else value) or [None]
    if not last or last["role"] != "assistant":
        raise Unusable("a response does not end with an assistant turn")
    if isinstance(prompt, str) or not prompt:
        prompt = before or ([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
    elif before[:len(prompt)] == prompt:
        prompt = before
    elif before != prompt[len(prompt) - len(before):]:
        if prompt[-1]["role"] == "user":
            raise Unusable("the prompt is not the one that the answer's dialogue has")
        prompt = prompt + before
    return prompt, last["content"]


def implicit(row, chosen, rejected):
    """TRL's implicit prompt of two texts: the words that both begin with; None where another key has text."""
    if ASSISTANT in chosen + rejected:
        return None
    shared = os.path.commonprefix([chosen, rejected])
    shared = shared[:len(shared) - len(re.split(r"\s", shared)[-1])].rstrip(" ")
    return shared if shared.strip() and not any(row.unused()) else None


def read_row(row, need, where, temperature=1.0):
    """Keys -> Row, whatever its form; raises Unusable. `need` and temperature as in read_rows."""
    prompt, chosen, rejected, p, margin, unfit, finished = recognise(row).values()
    if isinstance(prompt, list) and prompt and prompt[-1]["role"] == "assistant":
        if chosen is not None:
            raise Unusable("the prompt ends with an answer")
        prompt, chosen = prompt[:-1], prompt[-1:]              # a dialogue that ends with its answer
    elif (chosen, prompt) == (None, None) and need == "responses" and "text" in row and "role" not in row:
        prompt, chosen, unfit = "", row["text"], ""            # pre-training text
    elif prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt = implicit(row, chosen, rejected)
        chosen, rejected = (text[len(prompt or ""):] for text in (chosen, rejected))
    if p is None and margin is not None:                       # σ, where math.exp would overflow
        p = (1 + math.tanh(margin / temperature / 2)) / 2
    p = None if None in (chosen, rejected) or need == "prompts" else p       # it is one of two responses
    if p is not None and (type(p) not in (int, float) or not 0 <= p <= 1):               # NaN fails too
        raise Unusable("p is not a number from 0 to 1")
    if p is not None and p <= 0.5 and need != "pairs":         # p says which one is better
        if p == 0.5:
            raise Unusable("p is exactly ½")
        chosen, rejected, p, finished = rejected, chosen, 1 - p, finished[::-1]
    rejected = None if need in ("responses", "prompts") else rejected
    if unfit and rejected is None and need in ("responses", "judge"):
        raise Unusable(unfit)
    query = prompt
    if chosen is not None:
        query, chosen = read_answer(chosen, prompt)
        if rejected is not None:
            other, rejected = read_answer(rejected, prompt)
            if other != query:
                raise Unusable("prompts differ")
    if query is None or query and {"system"} == {turn["role"] for turn in query if isinstance(turn, dict)}:
        raise lacks("prompt", row, (*forms.PROMPTS, *forms.DIALOGUES))
    if isinstance(query, list):
        if not query or query[-1]["role"] == "user" and not query[-1]["content"].strip():
            raise Unusable("empty prompt")
        if isinstance(prompt, str) and not any(prompt.strip() in turn["content"] for turn in query):
            row.read.discard("prompt")                         # the answer's dialogue has another one
    if need == "prompts":
        return Row(query, None, None, None, where)
    if chosen is None:
        raise lacks("chosen response", row, forms.ANSWERS)
    return serve(Row(query, chosen, rejected, p, where, tuple(finished)), need)


def serve(row, need):
    """The Row, where it is what `need` asks for; raises Unusable."""
    blank = [not text.strip() for text in (row.chosen, row.rejected) if text is not None]
    if all(blank) or any(blank) and need != "judge":
        raise Unusable("empty response")
    if row.rejected is None and need in ("pairs", "ordered pairs"):
        raise Unusable("no rejected response")
    if row.chosen == row.rejected:
        raise Unusable("identical responses")
    return row


def lacks(what, row, names):
    """Unusable, saying what is lacking, which keys the row has, and which would be read."""
    keys = printable(", ".join(row))[:200] or "none"
    return Unusable(f"no {what}: its keys are {keys}; {', '.join(names)} would be read, and what "
                    f"--columns={what.split()[0]}:KEY names")


# -----------------------------------------------------------------------------------------------------------
# Files

def json_records(path):
    """Yields (line number, JSON value or Unusable); for a .json file that is one list (entry number, value).

    InputError: the file cannot be read.
    """
    try:
        with (gzip.open if path.lower().endswith(".gz") else open)(path, "rb") as lines:
            if path.lower().removesuffix(".gz").endswith(".json"):
                content = lines.read()
                if content.lstrip(BOM + b" \t\r\n").startswith(b"["):
                    yield from enumerate(json.loads(content.decode("utf-8-sig")), 1)
                    return
                lines = content.split(b"\n")                   # JSON lines under the name .json
            for number, line in enumerate(lines, 1):         # bytes break at \n only, not at U+2028
                if line.strip():
                    yield number, json_line(line)
    except (OSError, EOFError, zlib.error) as error:         # EOFError: a gzip file that stops in the middle
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}.") from None


def json_line(line):
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:      # nested too deeply and too many digits are among them
        return Unusable("broken UTF-8" if isinstance(error, UnicodeDecodeError) else "broken JSON")


def parquet_records(path):
    """Yields (number, row) of a parquet file. InputError: it cannot be read, or there is no pyarrow."""
    try:
        from pyarrow import parquet
    except ImportError:
        code = f"pandas.read_parquet('{path}').to_json('{path[:-8]}.jsonl', orient='records', lines=True)"
        raise InputError(f'{path}: parquet needs pyarrow: pip install ".[parquet]"; or convert it, where '
                         f'there is one, with: python -c "import pandas; {code}"') from None
    try:
        batches = parquet.ParquetFile(path).iter_batches(1000)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except (OSError, ValueError) as error:                     # pyarrow's own errors are among them
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}.") from None


def read_rows(path, need, columns=None, score_temperature=1.0):
    """A .jsonl, .json (or .gz) or .parquet file of preferences, answers or prompts -> (list[Row], Report).

    The form is recognised row by row (support/forms.py). columns: ["prompt:their_key", …], what no form says.
    need: "pairs" (chosen and rejected as they stand, and p where the row has one), "ordered pairs" (chosen is
    the better one), "judge" (ordered pairs of which one may be blank, or a response alone), "responses" (the
    better one alone) or "prompts". The better one is chosen, unless the row has a p below ½.
    A difference d of scores becomes p = σ(d / score_temperature). Unusable rows are counted by reason.
    InputError: the file cannot be read, or has no usable row.
    """
    path, columns = str(path), dict(spec.partition(":")[::2] for spec in columns or ())
    if not all(columns.values()):
        raise InputError(f"--columns={','.join(columns)}: write prompt:THEIR_KEY,chosen:THEIR_KEY.")
    if not path.lower().endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")):
        raise InputError(f"{path}: not a data file: .jsonl, .json, their .gz and .parquet are read.")
    records = parquet_records(path) if path.lower().endswith(".parquet") else json_records(path)
    rows, skipped, unused = [], {}, Counter()
    for number, record in records:
        where = f"{path}:{number}"
        try:
            if not isinstance(record, dict):
                raise record if isinstance(record, Unusable) else Unusable("not a JSON object")
            given = {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
            row = Keys({key: record[key] for key in record if key not in columns.values()} | given)
            rows.append(read_row(row, need, where, score_temperature))
            unused.update([*dict.fromkeys(row.unused())])
        except (Unusable, RecursionError) as error:
            reason = str(error) if isinstance(error, Unusable) else "nested too deeply"
            skipped.setdefault(reason, []).append(where)
    if not rows:
        firsts = [f"{os.path.basename(where[0])}: {reason}" for reason, where in skipped.items()]
        raise InputError(f"{path}: no row can be used for {need}; {[*firsts, 'it is empty'][0]}.")
    return rows, Report(os.path.basename(path), len(rows), skipped, unused=dict(unused))


def split_weight(spec):
    """("file", 0.1) of "file:0.1"; a file that is really called so keeps its name."""
    match = not os.path.exists(spec) and re.fullmatch(r"(.+):([-+]?\d*\.?\d+(?:e[-+]?\d+)?)", spec)
    return (match[1], float(match[2])) if match else (spec, 1.0)


def read_data(specs, need, seed, fraction=1.0, **reading):
    """Rows of several files, each `file` or `file:weight` -> (list[Row], list[Report]); reading: read_rows's.

    Weight w repeats the file's rows floor(w) times and adds a seeded draw for the rest: 0.1 takes a tenth.
    Draws are nested: a smaller one is part of a larger one. All weights are multiplied by `fraction`.
    """
    rows, reports = [], []
    for position, spec in enumerate(specs):
        path, weight = split_weight(spec)
        weight *= fraction
        if not 0 < weight <= 1000:
            raise InputError(f"{spec}: the weight of a data file is a number above 0 and not above 1000.")
        found, report = read_rows(path, need, **reading)
        drawn = max(round(weight % 1 * len(found)), int(weight < 1))
        order = random.Random(f"{seed} {position}").sample(range(len(found)), len(found))
        rows += found * int(weight) + [found[i] for i in sorted(order[:drawn])]
        reports.append(report)
    return rows, reports
