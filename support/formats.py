"""Files that others read and write: questions of a benchmark, a system's answers to them.

    mt_bench      FastChat    {"question_id", "category", "turns": [text, text]}
                              -> {"question_id", "model_id", "choices": [{"index", "turns": [text, text]}], …}
    alpaca_eval   AlpacaEval  {"instruction", …}  ->  {"instruction", …, "output", "generator"}
    neither                   any row with a prompt  ->  {"prompt", "responses": [{"text", "ids", …}]}

A question is asked turn by turn, each after the model's own answers to those before it.
"""
import codecs
import contextlib
import itertools
import json
import os
import sys
import time
import uuid
from dataclasses import dataclass, field

from support import rows
from support.cli import InputError
from support.rows import ASSISTANT, Unusable, hh_text

QUESTIONS = {"mt_bench": ("question_id", "turns"), "alpaca_eval": ("instruction",)}      # keys of a row
# At which FastChat has a category answered.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0,
                "reasoning": 0.0, "stem": 0.1, "humanities": 0.1, "arena-hard-200": 0.0}


@dataclass
class Question:
    """What a model is asked, in one turn or several."""
    prompt: str | list[dict]                   # text, or messages
    where: str                                 # file and line
    later: list[dict] = field(default_factory=list)      # the user's turn after each answer
    record: dict | None = None                 # the row of the benchmark
    temperature: float = 0.7                   # at which it is answered

    def after(self, answers):
        """The messages that ask for the next answer; answers: texts of those so far."""
        said = [{"role": "assistant", "content": text.strip()} for text in answers]
        return [*self.prompt, *itertools.chain.from_iterable(zip(said, self.later))]


# ------------------------------------------------------------------------------------------------------------
# Questions in, answers out

def read_questions(path, form, columns=None):
    """The Questions of a file; of a benchmark's (form) each row must be one, for no answer may be missing."""
    if form is None:
        found, report = rows.read_rows(path, "prompts", columns)
        print(report, file=sys.stderr)
        return [Question(row.prompt, row.where) for row in found]
    questions = []
    for line, record in rows.json_records(path):
        where = f"{path}, line {line}"
        if not isinstance(record, dict) or not all(key in record for key in QUESTIONS[form]):
            raise InputError(f"{where}: a row of {form} has {' and '.join(QUESTIONS[form])}.")
        try:
            prompt = rows.read_row(rows.Keys(record), "prompts", where).prompt
            question = Question(prompt, where, record=record)
            if form == "mt_bench":
                turns = [{"role": "user", "content": text} for text in record["turns"]]
                question.later = rows.read_messages(turns)[1:]
                question.temperature = TEMPERATURES.get(str(record.get("category")), 0.7)
        except Unusable as reason:
            raise InputError(f"{where}: {reason}.") from None
        questions.append(question)
    if not questions:
        raise InputError(f"{path} holds no questions.")
    return questions


def batches(questions, size):
    """Yields the places of at most `size` consecutive questions of one temperature."""
    for _, places in itertools.groupby(range(len(questions)), lambda place: questions[place].temperature):
        while batch := list(itertools.islice(places, size)):
            yield batch


def take_turns(questions, places, k, ask):
    """(P, K, turns) Samples: K answers to each question's first turn, and to each its own next turns.

    ask: ([(question, texts of its answers)], K, turn, places) -> K Samples, with their texts, for each.
    `places` name the randomness of a turn: those of the questions, after the first turn place · K + k.
    """
    groups = ask([(question, []) for question in questions], k, 0, places)
    talks = [[[one] for one in group] for group in groups]
    going, turn = [(question, talk, place * k + i) for question, group, place in zip(questions, talks, places)
                   for i, talk in enumerate(group)], 0
    while going := [one for one in going if len(one[0].later) > turn]:
        turn += 1
        said = [(question, [one.text for one in talk]) for question, talk, _ in going]
        for (_, talk, _), (answer,) in zip(going, ask(said, 1, turn, [place for *_, place in going])):
            talk.append(answer)
    return talks


def answer_rows(form, question, talks, name):
    """The rows of K samples; talks: K lists of sample.Samples, one for each turn; name: the model's."""
    if form == "mt_bench":
        choices = [{"index": i, "turns": [one.text.strip() for one in talk]} for i, talk in enumerate(talks)]
        return [{"question_id": question.record["question_id"], "answer_id": uuid.uuid4().hex,
                 "model_id": name, "choices": choices, "tstamp": time.time()}]
    if form == "alpaca_eval":
        return [question.record | {"output": one.text.strip(), "generator": name} for one, in talks]
    return [{"prompt": question.prompt, "responses": [
        {"text": one.text, "ids": one.ids, "logprob": round(one.logprob, 4), "finished": one.finished}
        for one, in talks]}]


@contextlib.contextmanager
def row_writer(path):
    """write(row): JSON that is printed, or goes to a file that takes the place of `path` once it is whole.

    A name that ends in .json gets one list, any other a row per line. What an interrupted run had is in
    path.part. InputError: it cannot be written.
    """
    if path is None:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        escape = codecs.lookup(encoding).name != "utf-8"                             # rows stay whole
        yield lambda row: print(json.dumps(row, ensure_ascii=escape), flush=True)
        return
    as_list, written = path.endswith(".json"), itertools.count()
    ordinary = os.path.isfile(path) or not os.path.exists(path)            # not a pipe, not /dev/null
    part = os.path.realpath(path) + ".part" if ordinary else path

    def put(act, *given):
        try:
            return act(*given)
        except OSError as error:
            raise InputError(f"--out={path}: cannot be written ({error.strerror}).") from None

    def write(row):
        text = json.dumps(row, ensure_ascii=False)
        before = ",\n" if next(written) else "[\n"
        put(out.write, before + text if as_list else text + "\n")
        put(out.flush)
    out = put(open, part, "w", -1, "utf-8", "backslashreplace")       # half a surrogate pair, as JSON has it
    try:
        yield write
    finally:
        if ordinary and not next(written):
            os.remove(part)
    put(out.write, "\n]\n" if as_list else "")
    put(out.close)
    if ordinary:
        put(os.replace, part, os.path.realpath(path))


# ------------------------------------------------------------------------------------------------------------
# Answers of two systems

def read_responses(path, questions=None):
    """[(prompt, [texts], "file, line")] of sample.py's rows, of rows with one answer in any form that
    support/rows.py knows, or of FastChat's model_answer files, which answer `questions`, a question.jsonl.
    """
    asked = read_questions(questions, "mt_bench") if questions else []
    asked, found = {str(question.record["question_id"]): question for question in asked}, []
    for line, record in rows.json_records(path):
        where = f"{path}, line {line}"
        try:
            prompt, texts = read_answers(record, asked)
        except Unusable as reason:
            raise InputError(f"{where}: {reason}.") from None
        except (LookupError, TypeError, AttributeError):
            prompt, texts = None, []
        if prompt is None or not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f'{where}: not a row {{"prompt", "responses": [{{"text"}}]}}.')
        found.append((prompt, texts, where))
    if not found:
        raise InputError(f"{path} holds no responses.")
    return found


def read_answers(record, asked):
    """(prompt, [texts]) of one JSON object; asked: {question_id: Question}. Raises Unusable, LookupError, ….

    MT-Bench: the prompt is the first question. A text is what follows up to an answer: for the first turn the
    first answer, for the second the first answer, the second question and the second answer.
    """
    if not isinstance(record, dict):
        raise record if isinstance(record, Unusable) else Unusable("not a JSON object")
    if "choices" in record:
        question = asked.get(str(record["question_id"]))
        if question is None:
            raise Unusable(f"question {record['question_id']} must be told: --questions=question.jsonl")
        texts = []
        for turns in [choice["turns"] for choice in record["choices"]]:
            for n, answer in enumerate(turns[:len(question.later) + 1]):
                dialogue = [*question.after(turns[:n]), {"role": "assistant", "content": answer}]
                texts.append(hh_text(dialogue[1:]).removeprefix(ASSISTANT))
        return question.prompt, texts
    found = rows.recognise(record, answered=True)
    if isinstance(record.get("responses"), list):
        several = record["responses"]
        return found["prompt"], [one.get("text") if isinstance(one, dict) else one for one in several]
    prompt, text = rows.read_answer(found["chosen"], found["prompt"])
    return prompt, [text]


def as_asked(prompt):
    """A prompt as one text, whether it came as text, as a user's turn or as a dialogue."""
    if isinstance(prompt, str):
        return prompt
    return prompt[0]["content"] if len(prompt) == 1 else hh_text(prompt) + ASSISTANT
