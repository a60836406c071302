"""Preference files: whatever form a row has, it becomes a prompt and up to two responses."""
import gzip
import json
import os
import random
import re
import zlib
from dataclasses import dataclass, field

from support.cli import InputError, is_deep

# ---------------------------------------------------------------------------------------------------------------------
# Rows: whatever form a file has, a row is a prompt and up to two responses

BOM = b"\xef\xbb\xbf"
ASSISTANT = "\n\nAssistant:"      # where an HH prompt ends and its response begins
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class Unusable(ValueError):
    """One row that cannot be used; the message is the reason under which the readers count it."""


@dataclass
class Row:
    prompt: str | list[dict]      # verbatim text, or messages [{"role": system|user|assistant, "content": text}]
    chosen: str | None            # the response; None in a prompt-only row
    rejected: str | None          # the worse response; None outside pairs
    p: float | None               # strength p(chosen > rejected) where the file gives it, as replayed rollouts do
    where: str                    # file:line; in a JSON list file:number of the entry
    finished: tuple = (True, True)    # whether chosen and rejected ended; one that was cut gets no EOS


@dataclass
class Report:
    """What became of the rows of one file, for printing."""
    name: str
    used: int
    skipped: dict[str, list[str]] = field(default_factory=dict)      # reason -> where
    cut: int = 0                                                     # rows that lost tokens to max_length

    def __str__(self):
        cut = f", {self.cut:,} of them cut to max_length" if self.cut else ""
        reasons = []
        for reason, where in self.skipped.items():             # lines of its own file go without the file's name
            places = [os.path.basename(place).removeprefix(self.name + ":") for place in where[:3]]
            reasons.append(f"{len(where):,} {reason} at {', '.join(places + ['…'] * (len(where) > 3))}")
        skipped = f", {sum(map(len, self.skipped.values())):,} skipped ({'; '.join(reasons)})" if reasons else ""
        return f"{self.name}: {self.used:,} rows used{cut}{skipped}"


def hh_text(messages):
    """Messages as HH-RLHF writes a dialogue, without the final "\\n\\nAssistant:"; a system turn is text in front.

    A message read from an HH file keeps its raw content with the leading space, so this gives the text back verbatim.
    """
    text = ""
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "system":
            text += ("\n\n" if text else "") + content
        else:
            space = " " if content and not content[0].isspace() else ""
            text += ("\n\nHuman:" if role == "user" else ASSISTANT) + space + content
    return text


def hh_prompt(text):
    """The messages of an HH dialogue that stops before "\\n\\nAssistant:"; what is not one stays verbatim text."""
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    messages = [{"role": "user" if name == "Human" else "assistant", "content": content}
                for name, content in zip(parts[::2], parts[1::2])]
    return messages if messages and hh_text(messages) == text else text + ASSISTANT


def read_messages(turns):
    """Chat messages {role, content} or ShareGPT turns {from, value} -> messages."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Unusable("neither text nor a list of messages")
    messages = []
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise Unusable("a turn has an unknown role")
        if not isinstance(content, str):
            raise Unusable("a turn's content is not text")
        messages.append({"role": ROLES[role], "content": content})
    return messages


def read_prompt(record, answered):
    """The prompt of one JSON object, as text or messages; None where only the answer can carry it."""
    turns = record.get("conversations") or record.get("messages")
    if "prompt" in record and (answered or turns is None):     # else UltraChat: the answer is in messages
        prompt = record["prompt"]
        prompt = prompt if isinstance(prompt, str) else read_messages(prompt)
    elif "instruction" in record:
        parts = [record["instruction"], record.get("input", "")]
        if not all(isinstance(part, str) for part in parts):
            raise Unusable("the instruction is not text")
        prompt = [{"role": "user", "content": "\n\n".join(part for part in parts if part.strip())}]
    elif turns and not isinstance(record.get("chosen"), list):
        prompt = read_messages(turns)
    elif isinstance(record.get("turns"), list):                # MT-Bench: a later turn needs an answer to the first
        prompt = read_messages([{"role": "user", "content": turn} for turn in record["turns"][:1]])
    else:
        return None
    if prompt == [] or isinstance(prompt, list) and prompt[-1]["role"] == "user" and not prompt[-1]["content"].strip():
        raise Unusable("empty prompt")
    return prompt


def read_answer(value, prompt):
    """(prompt, response) of an answer: text, one turn, or a whole dialogue that repeats its prompt or brings it."""
    if isinstance(value, str) and prompt is not None:
        return prompt, value
    if isinstance(value, str):
        before, mark, response = value.rpartition(ASSISTANT)
        return hh_prompt(before) if mark else None, response
    messages = read_messages([value] if isinstance(value, dict) else value)
    if not messages or messages[-1]["role"] != "assistant":
        raise Unusable("a response does not end with an assistant turn")
    *before, last = messages
    if isinstance(prompt, str) and not before:
        prompt = [{"role": "user", "content": prompt}]
    elif before:
        repeats = not isinstance(prompt, list) or before[:len(prompt)] == prompt
        prompt = before if repeats else prompt + before
    return prompt, last["content"]


def read_row(record, need, where):
    """One JSON object -> Row, whatever its form; raises Unusable. `need` as in read_rows."""
    if isinstance(record, Unusable):
        raise record
    if not isinstance(record, dict):
        raise Unusable("not a JSON object")
    record = {key: value for key, value in record.items() if value is not None}
    chosen = next((record[key] for key in ("chosen", "response", "completion", "output") if key in record), None)
    rejected = record.get("rejected")
    p = record.get("p") if rejected is not None else None      # a strength is one of two responses
    prompt = read_prompt(record, chosen is not None)
    if chosen is None and isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        prompt, chosen = prompt[:-1], prompt[-1:]              # a dialogue that ends with its answer
    elif chosen is None and prompt is None and need == "responses":
        prompt, chosen = "", record.get("text")                # pre-training text

    query = prompt
    if chosen is not None:
        query, chosen = read_answer(chosen, prompt)
    if rejected is not None and chosen is not None:
        other, rejected = read_answer(rejected, prompt)
        if other != query:
            raise Unusable("prompts differ")
    if query is None or query == []:
        raise Unusable("no prompt")
    if need == "prompts":
        return Row(query, None, None, None, where)
    if p is not None and (isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1):   # NaN fails too
        raise Unusable("p is not a number from 0 to 1")
    finished = record.get("finished", [True, True])            # in replayed rollouts
    if not isinstance(finished, list) or [type(f) for f in finished] != [bool, bool]:
        raise Unusable("finished is not a list of two booleans")
    if need != "pairs" and p is not None and chosen is not None:                               # p says which one is better
        if p == 0.5:
            raise Unusable("p is exactly ½")
        if p < 0.5:
            chosen, rejected, finished, p = rejected, chosen, finished[::-1], 1 - p
    single = need == "judge" and "rejected" not in record
    for name, text in [("chosen", chosen), ("rejected", rejected)][:1 if need == "responses" or single else 2]:
        if text is None:
            raise Unusable(f"no {name} response")
        if not text.strip() and not (need == "judge" and (chosen + (rejected or "")).strip()):
            raise Unusable("empty response")
    if need == "responses":
        rejected = None
    elif chosen == rejected:
        raise Unusable("identical responses")
    return Row(query, chosen, rejected, p, where, tuple(finished))


def json_records(path):
    """Yields (line number, JSON value or Unusable); for a file that is one JSON list (entry number, value).

    InputError: the file cannot be read.
    """
    number = 0
    try:
        with (gzip.open if path.lower().endswith(".gz") else open)(path, "rb") as file:
            lines = file                                       # bytes break at \n only, so U+2028 stays inside a line
            if path.lower().removesuffix(".gz").endswith(".json"):
                parts = []
                for number, part in enumerate(file, 1):        # by the line, so that an error can name one
                    parts.append(part)
                raw = b"".join(parts)
                if raw.removeprefix(BOM).lstrip().startswith(b"["):
                    yield from enumerate(json_list(raw.removeprefix(BOM), path), 1)
                    return
                lines = raw.split(b"\n")                       # JSON lines under the name .json
            for number, line in enumerate(lines, 1):
                line = line.removeprefix(BOM) if number == 1 else line
                try:
                    record = json.loads(line.decode()) if line.strip() else None
                except (ValueError, RecursionError) as error:
                    record = Unusable("broken UTF-8" if isinstance(error, UnicodeDecodeError) else "broken JSON")
                if line.strip():
                    yield number, record
    except (OSError, EOFError, zlib.error) as error:             # EOFError: a gzip file that stops in the middle
        if getattr(error, "strerror", None):
            raise InputError(f"{path}: cannot be read: {error.strerror}.") from None
        raise InputError(f"{path}: cannot be read from line {number + 1} on: {error}.") from None


def json_list(raw, path):
    """The entries of a JSON list; those with bytes that are no UTF-8 are Unusable. InputError: it is no list."""
    text = raw.decode(errors="surrogateescape")                # bytes that are no UTF-8 spoil only their own entry
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not a JSON list: {error}.") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not a JSON list: it is nested too deeply or has a number of too many digits.") from None
    broken = re.compile("[\udc80-\udcff]").search
    if not broken(text):
        return records
    return [Unusable("broken UTF-8") if is_deep(record) or broken(json.dumps(record, ensure_ascii=False)) else record
            for record in records]


def read_rows(path, need):
    """Reads a .jsonl or .json file (or .gz of one) of preference, instruction or prompt rows -> (list[Row], Report).

    The form is recognised row by row: HH dialogues; prompt/chosen/rejected as text or messages (UltraFeedback, TRL,
    replayed rollouts with p); ShareGPT; Alpaca; prompt/response; messages; text; prompt; MT-Bench turns.
    need: "pairs" (chosen and rejected as they stand, and p where the row has one), "ordered pairs" (chosen is the better
    one), "judge" (ordered pairs of which one may be blank, or a response alone), "responses" (the better one alone) or
    "prompts". The better one is chosen, unless the row has a p below ½.
    Unusable rows are counted by reason. InputError: the file cannot be read, or has no usable row.
    """
    path = str(path)
    if path.lower().endswith(".parquet"):
        raise InputError(f"{path}: parquet is not read; convert it with: python -c \"import pandas; "
                         f"pandas.read_parquet('{path}').to_json('{path[:-8]}.jsonl', orient='records', lines=True)\"")
    if not path.lower().endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz")):
        raise InputError(f"{path}: not a data file: .jsonl, .json and their .gz are read.")
    rows, skipped = [], {}
    for number, record in json_records(path):
        where = f"{path}:{number}"
        try:
            rows.append(read_row(record, need, where))
        except Unusable as reason:
            skipped.setdefault(str(reason), []).append(where)
    if not rows:
        first = next((f"{os.path.basename(where[0])}: {reason}" for reason, where in skipped.items()), "it is empty")
        raise InputError(f"{path}: no row can be used for {need}; {first}.")
    return rows, Report(os.path.basename(path), len(rows), skipped)


def split_weight(spec):
    """("file", 0.1) of "file:0.1"; a file that is really called so keeps its name."""
    match = not os.path.exists(spec) and re.fullmatch(r"(.+):([-+]?\d*\.?\d+(?:e[-+]?\d+)?)", spec)
    return (match[1], float(match[2])) if match else (spec, 1.0)


def read_data(specs, need, seed):
    """Rows of several files, each `file` or `file:weight` -> (list[Row], list[Report]).

    Weight w repeats the file's rows floor(w) times and adds a seeded draw for the rest: 0.1 takes a tenth of them. Draws are
    nested: a smaller share is part of a larger one.
    """
    rows, reports = [], []
    for position, spec in enumerate(specs):
        path, weight = split_weight(spec)
        if not 0 < weight <= 1000:
            raise InputError(f"{spec}: the weight of a data file is a number above 0 and not above 1000.")
        found, report = read_rows(path, need)
        drawn = max(round(weight % 1 * len(found)), int(weight < 1))
        order = random.Random(f"{seed} {position}").sample(range(len(found)), len(found))        # a tenth is part of a fifth
        indices = sorted(order[:drawn])
        rows += found * int(weight) + [found[i] for i in indices]
        reports.append(report)
    return rows, reports
