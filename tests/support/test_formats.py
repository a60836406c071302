"""Benchmark files, in and out: every row's own keys stay, turns follow the answers given, files are whole."""
import json
import os

import pytest

import tiny
from sample import Sample
from support import formats
from support.cli import InputError

QUESTIONS = [{"question_id": 81, "category": "writing", "turns": ["Which river?", "And which tree?"]},
             {"question_id": 7, "category": "math", "turns": ["1 + 1?", "Twice that?", "Again?"]},
             {"question_id": "x", "category": "math", "turns": ["2 + 2?"]},
             {"question_id": 82, "turns": ["A bird?", "Two?"], "reference": ["r"]}]


@pytest.fixture
def questions(tmp_path):
    return formats.read_questions(tiny.write_jsonl(tmp_path / "question.jsonl", QUESTIONS), "mt_bench")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# ------------------------------------------------------------------------------------------------------------
# Questions

def test_questions_of_mt_bench(questions):
    """FastChat's temperatures: 0.7 for writing and for no category, 0 for math; batches hold one alone."""
    assert [one.record for one in questions] == QUESTIONS
    assert [one.temperature for one in questions] == [0.7, 0, 0, 0.7]
    assert questions[1].prompt == [user("1 + 1?")]
    assert questions[1].later == [user("Twice that?"), user("Again?")]
    assert questions[1].after([" 2 ", "4"]) == [
        user("1 + 1?"), assistant("2"), user("Twice that?"), assistant("4"), user("Again?")]
    assert list(formats.batches(questions, 8)) == [[0], [1, 2], [3]]
    assert list(formats.batches(questions[1:3] * 2, 3)) == [[0, 1, 2], [3]]


def test_questions_of_alpaca_eval(tmp_path):
    """A JSON list, as AlpacaEval has it; an input stands below its instruction."""
    rows = [{"instruction": "Name a river.", "output": "theirs", "generator": "other", "dataset": "d"},
            {"instruction": "Shorten:", "input": "A long text"}]
    (tmp_path / "eval.json").write_text(json.dumps(rows))
    found = formats.read_questions(str(tmp_path / "eval.json"), "alpaca_eval")
    assert [one.record for one in found] == rows and not any(one.later for one in found)
    assert [one.prompt for one in found] == [[user("Name a river.")], [user("Shorten:\n\nA long text")]]


NO_QUESTIONS = {      # form, rows (bytes: as they are): words of the message
    "no id": ("mt_bench", [{"turns": ["a"]}], ["q.jsonl, line 1", "question_id"]),
    "no turns": ("mt_bench", [QUESTIONS[0], {"question_id": 1}], ["q.jsonl, line 2", "turns"]),
    "no list": ("mt_bench", [{"question_id": 1, "turns": "abc"}], ["q.jsonl, line 1"]),
    "an empty list": ("mt_bench", [{"question_id": 1, "turns": []}], ["q.jsonl, line 1"]),
    "numbers": ("mt_bench", [{"question_id": 1, "turns": ["a", 3]}], ["q.jsonl, line 1"]),
    "blank": ("mt_bench", [{"question_id": 1, "turns": [" "]}], ["q.jsonl, line 1"]),
    "a prompt": ("alpaca_eval", [{"prompt": "a"}], ["q.jsonl, line 1", "instruction"]),
    "a number": ("alpaca_eval", [{"instruction": 3}], ["q.jsonl, line 1"]),
    "broken": ("alpaca_eval", b'{"instruction"\n', ["q.jsonl, line 1"]),
    "empty": ("alpaca_eval", b"", ["q.jsonl"]), "absent": ("mt_bench", None, ["q.jsonl"]),
}


@pytest.mark.parametrize("name", NO_QUESTIONS)
def test_what_is_no_question_is_named(name, tmp_path):
    form, rows, words = NO_QUESTIONS[name]
    path = tmp_path / "q.jsonl"
    if isinstance(rows, bytes):
        path.write_bytes(rows)
    elif rows is not None:
        tiny.write_jsonl(path, rows)
    with pytest.raises(InputError) as error:
        formats.read_questions(str(path), form)
    assert all(word in str(error.value) for word in words), error.value


# ------------------------------------------------------------------------------------------------------------
# Answers

def echo(seen):
    """Answers that say which turn and place they have, and what they were asked after."""
    def ask(talks, k, turn, places):
        seen.append((turn, k, list(places), [said for _, said in talks]))
        return [[Sample([], 0.0, True, f" {turn}.{place}.{i}") for i in range(k)] for place in places]
    return ask


def test_turns_follow_the_answers_that_were_given(questions):
    """K = 2. Each answer has its own dialogue; one of one turn is through, one of three goes on alone."""
    seen = []
    talks = formats.take_turns(questions[1:3], [1, 2], 2, echo(seen))
    assert [[[one.text for one in talk] for talk in group] for group in talks] == [
        [[" 0.1.0", " 1.2.0", " 2.2.0"], [" 0.1.1", " 1.3.0", " 2.3.0"]], [[" 0.2.0"], [" 0.2.1"]]]
    assert seen == [(0, 2, [1, 2], [[], []]), (1, 1, [2, 3], [[" 0.1.0"], [" 0.1.1"]]),
                    (2, 1, [2, 3], [[" 0.1.0", " 1.2.0"], [" 0.1.1", " 1.3.0"]])]
    row, = formats.answer_rows("mt_bench", questions[1], talks[0], "ours")
    assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
    assert (row["question_id"], row["model_id"]) == (7, "ours")
    assert row["choices"] == [{"index": 0, "turns": ["0.1.0", "1.2.0", "2.2.0"]},
                              {"index": 1, "turns": ["0.1.1", "1.3.0", "2.3.0"]}]


def test_rows_of_alpaca_eval():
    """One per sample; the row's own keys stay, another system's output does not."""
    question = formats.Question("", "", record={"instruction": "a", "output": "theirs", "dataset": "d"})
    talks = [[Sample([], 0.0, True, text)] for text in (" x", "y")]
    rows = formats.answer_rows("alpaca_eval", question, talks, "ours")
    assert rows == [question.record | {"output": text, "generator": "ours"} for text in "xy"]


def test_answers_are_read_back(questions, tmp_path):
    """MT-Bench's, two choices of two turns: the first answer, then all that was said after the first
    question."""
    talks = [formats.take_turns([one], [i], 2, echo([]))[0] for i, one in enumerate(questions)]
    rows = [formats.answer_rows("mt_bench", one, talk, "n")[0] for one, talk in zip(questions, talks)]
    path = tiny.write_jsonl(tmp_path / "ours.jsonl", rows)
    found = formats.read_responses(path, str(tmp_path / "question.jsonl"))
    assert [prompt for prompt, _, _ in found] == [one.prompt for one in questions]
    second = "\n\nHuman: And which tree?\n\nAssistant: 1."
    assert found[0][1] == [" 0.0.0", f" 0.0.0{second}0.0", " 0.0.1", f" 0.0.1{second}1.0"]
    assert [len(texts) for _, texts, _ in found] == [4, 6, 2, 4]


ANSWERS = {      # rows that are read: prompt, texts
    "sample.py": ({"prompt": "a", "responses": [{"text": " x", "ids": [1]}, {"text": ""}]}, "a", [" x", ""]),
    "texts": ({"prompt": "a", "responses": ["x"]}, "a", ["x"]),
    "prompt, response": ({"prompt": "a", "response": "x"}, "a", ["x"]),
    "a blank one": ({"prompt": "a", "response": ""}, "a", [""]),
    "prompt, completion": ({"prompt": [user("a")], "completion": [assistant("x")]}, [user("a")], ["x"]),
    "instruction, output": ({"instruction": "a", "output": "x", "generator": "g"}, [user("a")], ["x"]),
    "a pair's better one": ({"prompt": "a", "chosen": "x", "rejected": "y"}, "a", ["x"]),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_rows_with_answers(name, tmp_path):
    record, prompt, texts = ANSWERS[name]
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [record])
    assert formats.read_responses(path) == [(prompt, texts, f"{path}, line 1")]


CHOICES = {"question_id": 81, "choices": [{"index": 0, "turns": ["x", "y"]}]}
NO_ANSWERS = {      # a row: words of the message
    "questions are not told": (CHOICES, ["--questions"]), "no answer": ({"prompt": "a"}, []),
    "no id": ({"choices": []}, []), "no choices": (CHOICES | {"choices": []}, []),
    "a number": (CHOICES | {"choices": [{"turns": [3]}]}, []),
    "other choices": (CHOICES | {"choices": [{}]}, []),
}


@pytest.mark.parametrize("name", NO_ANSWERS)
def test_what_is_no_answer_is_named(name, tmp_path):
    record, words = NO_ANSWERS[name]
    path, asked = (tiny.write_jsonl(tmp_path / file, rows) for file, rows in
                   (("a.jsonl", [record]), ("q.jsonl", QUESTIONS)))
    with pytest.raises(InputError) as error:
        formats.read_responses(path, None if words else asked)
    assert all(word in str(error.value) for word in [f"{path}, line 1", *words]), error.value


def test_one_prompt_in_several_forms():
    """Text, a user's turn and an HH dialogue that say the same are one prompt."""
    assert formats.as_asked("a") == formats.as_asked([user("a")]) == "a"
    turns = [user("a"), assistant("x"), user("b")]
    assert formats.as_asked(turns) == "\n\nHuman: a\n\nAssistant: x\n\nHuman: b\n\nAssistant:"


# ------------------------------------------------------------------------------------------------------------
# Files

ROWS = [{"text": "é\u2028"}, {"text": "\ud800"}, {}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_file_is_there_once_it_is_whole(name, tmp_path):
    """Until then the old one stays; one that was interrupted leaves it, and its rows beside it. A link keeps
    pointing to its file. Half a surrogate pair is escaped."""
    path, target = tmp_path / name, tmp_path / "target"
    target.write_text("old")
    path.symlink_to(target)
    with pytest.raises(KeyboardInterrupt), formats.row_writer(str(path)) as write:
        write(ROWS[0])
        raise KeyboardInterrupt
    assert target.read_text() == "old" and "é" in (tmp_path / "target.part").read_text(encoding="utf-8")
    with formats.row_writer(str(path)) as write:
        for row in ROWS:
            write(row)
            assert target.read_text() == "old"
    text = target.read_text(encoding="utf-8")
    assert sorted(os.listdir(tmp_path)) == sorted([name, "target"]) and path.is_symlink() and "é" in text
    lines = text if name.endswith(".json") else "[" + ",".join(text.split("\n")[:-1]) + "]"
    assert json.loads(lines) == ROWS


def test_what_cannot_be_written_is_one_sentence(tmp_path):
    """A folder; a folder that is not there; a full disk. /dev/null is written to and stays what it is."""
    for path, reason in ((tmp_path, "directory"), (tmp_path / "no/a.jsonl", "No such file"),
                         ("/dev/full", "No space left")):
        with pytest.raises(InputError, match=f"{path}: cannot be written.*{reason}"):
            with formats.row_writer(str(path)) as write:
                write(ROWS[0])
    with pytest.raises(KeyboardInterrupt), formats.row_writer(str(tmp_path / "a.jsonl")):
        raise KeyboardInterrupt                               # before the first row: nothing stays
    with formats.row_writer(os.devnull) as write:
        write(ROWS[0])
    assert not os.path.isfile(os.devnull) and os.listdir(tmp_path) == []
