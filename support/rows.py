"""Data files. Whatever form a row has, it becomes Row(prompt, chosen, rejected, p, where, finished).

    {"prompt": "Hi", "chosen": "Yes?", "rejected": "No.", "p": 0.8}                     ┐
    {"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Yes?", "rejected": "\\n\\nHuman: Hi…"}   ├─>  Row
    {"conversations": [{"from": "human", "value": "Hi"}], "chosen": …, "rejected": …}   ┘

A form says where a row has its prompt. An answer is text, one turn, or a dialogue that brings its prompt.
`need` says what a row must have. A row that cannot be used is skipped, and counted by its reason.
"""
import gzip
import json
import os
import random
import re
import zlib
from dataclasses import dataclass, field

from support.cli import InputError

BOM = b"\xef\xbb\xbf"
ASSISTANT = "\n\nAssistant:"      # where an HH prompt ends and its response begins
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ANSWERS = ("chosen", "response", "completion", "output")    # keys of the better response, or of the only one


class Unusable(ValueError):
    """One row that cannot be used; the message is the reason under which the readers count it."""


@dataclass
class Row:
    prompt: str | list[dict]      # verbatim text, or messages [{"role": system|user|assistant, "content"}]
    chosen: str | None            # the response; None in a prompt-only row
    rejected: str | None          # the worse response; None outside pairs
    p: float | None               # strength p(chosen > rejected) where the file gives it, as rollouts do
    where: str                    # file:line; in a JSON list file:number of the entry
    finished: tuple = (True, True)      # whether chosen and rejected ended; one that was cut gets no EOS


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
        for reason, where in self.skipped.items():           # lines of its own file: without the file's name
            places = [os.path.basename(place).removeprefix(self.name + ":") for place in where[:3]]
            reasons.append(f"{len(where):,} {reason} at {', '.join(places + ['…'] * (len(where) > 3))}")
        total = sum(map(len, self.skipped.values()))
        skipped = f", {total:,} skipped ({'; '.join(reasons)})" if reasons else ""
        return f"{self.name}: {self.used:,} rows used{cut}{skipped}"


def hh_text(messages):
    """Messages as HH-RLHF writes a dialogue, without the last "\\n\\nAssistant:"; system turns are plain.

    A message from an HH file keeps its leading space, so this gives its text back verbatim.
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
    """The messages of an HH dialogue that stops before "\\n\\nAssistant:"; other text stays verbatim."""
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    messages = [{"role": "user" if name == "Human" else "assistant", "content": content}
                for name, content in zip(parts[::2], parts[1::2], strict=True)]
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


# -----------------------------------------------------------------------------------------------------------
# Forms. Each takes a JSON object without its nulls and returns what it finds: the prompt as text or messages,
# and chosen, rejected, p where they do not stand under these names. None: not this form.

def prompt_and_answers(row, answered):
    """UltraFeedback, TRL, replayed rollouts, {prompt, response}. UltraChat's answer is in its messages."""
    if "prompt" in row and (answered or dialogue(row) is None):
        return {"prompt": row["prompt"] if isinstance(row["prompt"], str) else read_messages(row["prompt"])}


def alpaca(row, answered):
    if "instruction" in row:
        parts = [part for part in (row["instruction"], row.get("input", "")) if part.strip()]
        return {"prompt": [{"role": "user", "content": "\n\n".join(parts)}]}


def chat(row, answered):
    """ShareGPT and {messages}. A list under "chosen" brings the whole dialogue itself."""
    if dialogue(row) and not isinstance(row.get("chosen"), list):
        return {"prompt": read_messages(dialogue(row))}


def mt_bench(row, answered):
    """The first turn alone: a later one needs an answer to it."""
    if isinstance(row.get("turns"), list):
        return {"prompt": read_messages([{"role": "user", "content": turn} for turn in row["turns"][:1]])}


def dialogue(row):
    return row.get("conversations") or row.get("messages")


FORMS = (prompt_and_answers, alpaca, chat, mt_bench)        # the first that fits is taken


def recognise(record, answered=False):
    """What one JSON object has: prompt (None: only the answer can bring it), chosen, rejected, p, finished.

    answered: there is an answer, though under no key of ANSWERS. Raises Unusable.
    """
    row = {key: value for key, value in record.items() if value is not None}
    chosen = next((row[key] for key in ANSWERS if key in row), None)
    answered = answered or chosen is not None
    named = {"prompt": None, "chosen": chosen, "rejected": row.get("rejected"), "p": row.get("p"),
             "finished": row.get("finished", [True, True])}
    try:
        found = named | next(filter(None, (form(row, answered) for form in FORMS)), {})
    except (AttributeError, LookupError, TypeError):
        raise Unusable("a field is missing or has the wrong type") from None
    last = found["prompt"][-1:] if isinstance(found["prompt"], list) else None
    if last == [] or last and last[0]["role"] == "user" and not last[0]["content"].strip():
        raise Unusable("empty prompt")
    return found


def read_prompt(record, answered):
    """The prompt of one JSON object, as text or messages, or None; raises Unusable."""
    return recognise(record, answered)["prompt"]


def read_answer(value, prompt):
    """(prompt, response) of an answer: text, one turn, or a dialogue that repeats its prompt or brings it."""
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
    if not isinstance(record, dict):
        raise record if isinstance(record, Unusable) else Unusable("not a JSON object")
    prompt, chosen, rejected, p, finished = recognise(record).values()
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
    p = None if rejected is None else p                        # a strength is one of two responses
    if p is not None and (type(p) not in (int, float) or not 0 <= p <= 1):               # NaN fails too
        raise Unusable("p is not a number from 0 to 1")
    if not isinstance(finished, list) or [type(ended) for ended in finished] != [bool, bool]:
        raise Unusable("finished is not a list of two booleans")
    return serve(Row(query, chosen, rejected, p, where, tuple(finished)), need)


def serve(row, need):
    """The row as `need` asks for it; raises Unusable where it cannot serve."""
    if row.chosen is None:
        raise Unusable("no chosen response")
    if need != "pairs" and row.p is not None and row.p <= 0.5:                 # p says which one is better
        if row.p == 0.5:
            raise Unusable("p is exactly ½")
        row.chosen, row.rejected = row.rejected, row.chosen
        row.p, row.finished = 1 - row.p, row.finished[::-1]
    if need == "responses":
        row.rejected = None
    blank = [not text.strip() for text in (row.chosen, row.rejected) if text is not None]
    if all(blank) or any(blank) and need != "judge":
        raise Unusable("empty response")
    if row.rejected is None and need in ("pairs", "ordered pairs"):
        raise Unusable("no rejected response")
    if row.chosen == row.rejected:
        raise Unusable("identical responses")
    return row


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


def read_rows(path, need):
    """A .jsonl or .json file (or .gz) of preference, instruction or prompt rows -> (list[Row], Report).

    The form is recognised row by row (FORMS).
    need: "pairs" (chosen and rejected as they stand, and p where the row has one), "ordered pairs" (chosen is
    the better one), "judge" (ordered pairs of which one may be blank, or a response alone), "responses" (the
    better one alone) or "prompts". The better one is chosen, unless the row has a p below ½.
    Unusable rows are counted by reason. InputError: the file cannot be read, or has no usable row.
    """
    path = str(path)
    if path.lower().endswith(".parquet"):
        code = f"pandas.read_parquet('{path}').to_json('{path[:-8]}.jsonl', orient='records', lines=True)"
        raise InputError(f'{path}: parquet is not read; convert it with: python -c "import pandas; {code}"')
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
        firsts = [f"{os.path.basename(where[0])}: {reason}" for reason, where in skipped.items()]
        raise InputError(f"{path}: no row can be used for {need}; {[*firsts, 'it is empty'][0]}.")
    return rows, Report(os.path.basename(path), len(rows), skipped)


def split_weight(spec):
    """("file", 0.1) of "file:0.1"; a file that is really called so keeps its name."""
    match = not os.path.exists(spec) and re.fullmatch(r"(.+):([-+]?\d*\.?\d+(?:e[-+]?\d+)?)", spec)
    return (match[1], float(match[2])) if match else (spec, 1.0)


def read_data(specs, need, seed, fraction=1.0):
    """Rows of several files, each `file` or `file:weight` -> (list[Row], list[Report]).

    Weight w repeats the file's rows floor(w) times and adds a seeded draw for the rest: 0.1 takes a tenth.
    Draws are nested: a smaller one is part of a larger one. All weights are multiplied by `fraction`.
    """
    rows, reports = [], []
    for position, spec in enumerate(specs):
        path, weight = split_weight(spec)
        weight *= fraction
        if not 0 < weight <= 1000:
            raise InputError(f"{spec}: the weight of a data file is a number above 0 and not above 1000.")
        found, report = read_rows(path, need)
        drawn = max(round(weight % 1 * len(found)), int(weight < 1))
        order = random.Random(f"{seed} {position}").sample(range(len(found)), len(found))
        rows += found * int(weight) + [found[i] for i in sorted(order[:drawn])]
        reports.append(report)
    return rows, reports
