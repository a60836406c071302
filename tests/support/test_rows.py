"""Rows and their ids: every form of file by hand-written rows, all real files we have, and the joints of a sequence."""
import gzip
import json
import os
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest


import data
from support.cli import InputError

DATA = Path(os.environ.get("OSPREY_DATA") or Path(__file__).parents[3] / "shared/data")


def shared(path):
    if not (DATA / path).exists():
        pytest.skip(f"{DATA / path} is not here; OSPREY_DATA names the folder of the shared data")
    return DATA / path


class FakeTokenizer:
    """Words with the space in front of them are ids, given out as they are met; as with sentencepiece a text met alone
    gets a space in front. decode shows special ids by name, so that a test can compare strings."""
    chat_template = False
    eos_id = 2

    def __init__(self, special=(), bos=True, word_start=True):
        self.words = ["<unk>", "<s>", "</s>", *special]
        self.special_ids = {token: i for i, token in enumerate(self.words)}
        self.ids, self.bos, self.word_start = {}, bos, word_start

    def encode_after(self, text):
        ids = []
        for word in re.findall(r" ?\w+| ?[^\w\s]+|\s", text):
            if word not in self.ids:
                self.ids[word] = len(self.words)
                self.words.append(word)
            ids.append(self.ids[word])
        return ids

    def encode(self, text):
        return self.encode_after(" " * self.word_start + text) if text else []

    def prefix(self, empty):
        return [1] if self.bos else [self.eos_id] if empty else []

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def write(path, *records):
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    raw = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


def counts(report):
    return {reason: len(where) for reason, where in report.skipped.items()}


# --- forms -----------------------------------------------------------------------------------------------------------

HH = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:"
TALK = [user("Hi"), assistant("Yes?"), user("Bye")]
PAIRS = {
    "hh": ({"chosen": HH + " Good", "rejected": HH + " Bad"},
           [user(" Hi"), assistant(" Yes?"), user(" Bye")], " Good", " Bad"),
    "text": ({"prompt": "Q: ", "chosen": "a", "rejected": "b"}, "Q: ", "a", "b"),
    "empty prompt": ({"prompt": "", "chosen": "a", "rejected": "b"}, "", "a", "b"),
    "messages": ({"prompt": TALK, "chosen": "a", "rejected": "b"}, TALK, "a", "b"),
    "trl explicit": ({"prompt": TALK, "chosen": [assistant("a")], "rejected": [assistant("b")]}, TALK, "a", "b"),
    "trl explicit, chosen in full": ({"prompt": TALK, "chosen": TALK + [assistant("a")], "rejected": [assistant("b")]},
                                     TALK, "a", "b"),
    "trl implicit": ({"chosen": TALK + [assistant("a")], "rejected": TALK + [assistant("b")]}, TALK, "a", "b"),
    "ultrafeedback": ({"prompt": "Hi", "prompt_id": "7", "chosen": [user("Hi"), assistant("a")], "score_chosen": 8.0,
                       "rejected": [user("Hi"), assistant("b")], "messages": [user("Hi"), assistant("a")]},
                      [user("Hi")], "a", "b"),
    "text prompt, one turn": ({"prompt": "Hi", "chosen": [assistant("a")], "rejected": [assistant("b")]},
                              [user("Hi")], "a", "b"),
    "sharegpt": ({"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"}],
                  "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
                 [system("S"), user("Hi")], "a", "b"),
    "alpaca": ({"instruction": "Add", "input": "1 2", "output": "o", "chosen": "a", "rejected": "b"},
               [user("Add\n\n1 2")], "a", "b"),
    "alpaca without input": ({"instruction": "Add", "input": "", "chosen": "a", "rejected": "b"},
                             [user("Add")], "a", "b"),
}
RESPONSES = {
    "prompt, response": ({"prompt": "Q", "response": "a"}, "Q", "a"),
    "prompt, completion": ({"prompt": "Q", "completion": "a"}, "Q", "a"),
    "conversational completion": ({"prompt": TALK, "completion": [assistant("a")]}, TALK, "a"),
    "messages": ({"messages": TALK + [assistant("a")]}, TALK, "a"),
    "ultrachat": ({"prompt": "Hi", "messages": TALK + [assistant("a")]}, TALK, "a"),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "a"}]},
                 [user("Hi")], "a"),
    "alpaca": ({"instruction": "Add", "output": "a"}, [user("Add")], "a"),
    "text": ({"text": "Once upon"}, "", "Once upon"),
    "null rejected": ({"prompt": "Q", "chosen": "a", "rejected": None}, "Q", "a"),
    "same answers": ({"prompt": "Q", "chosen": "a", "rejected": "a"}, "Q", "a"),
}
PROMPTS = {
    "prompt": ({"prompt": "Q"}, "Q"),
    "prompt messages": ({"prompt": TALK}, TALK),
    "messages": ({"messages": TALK}, TALK),
    "answered messages": ({"messages": TALK + [assistant("a")]}, TALK),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Hi"}]}, [user("Hi")]),
    "alpaca": ({"instruction": "Add", "input": "1"}, [user("Add\n\n1")]),
    "mt-bench": ({"question_id": 1, "turns": ["First", "Second"], "reference": ["r", "s"]}, [user("First")]),
    "a pair": (PAIRS["hh"][0], PAIRS["hh"][1]),
}


@pytest.mark.parametrize("form", PAIRS)
def test_pair_forms(form, tmp_path):
    record, *expected = PAIRS[form]
    (row,), report = data.read_rows(write(tmp_path / "a.jsonl", record), "pairs")
    assert [row.prompt, row.chosen, row.rejected, row.p] == [*expected, None]
    assert row.where == f"{tmp_path}/a.jsonl:1" and str(report) == "a.jsonl: 1 rows used"


@pytest.mark.parametrize("form", RESPONSES)
def test_response_forms(form, tmp_path):
    record, *expected = RESPONSES[form]
    (row,), _ = data.read_rows(write(tmp_path / "a.jsonl", record), "responses")
    assert [row.prompt, row.chosen, row.rejected] == [*expected, None]


@pytest.mark.parametrize("form", PROMPTS)
def test_prompt_forms(form, tmp_path):
    record, expected = PROMPTS[form]
    (row,), _ = data.read_rows(write(tmp_path / "a.jsonl", record), "prompts")
    assert [row.prompt, row.chosen, row.rejected] == [expected, None, None]


def test_a_replayed_rollout_keeps_its_strength(tmp_path):
    records = [{"prompt": "Q", "chosen": "a", "rejected": "b", "p": p} for p in (0.75, 0, 1, None)]
    rows, _ = data.read_rows(write(tmp_path / "a.jsonl", *records), "pairs")
    assert [row.p for row in rows] == [0.75, 0, 1, None]


@pytest.mark.parametrize("need", ["ordered pairs", "judge", "responses"])
def test_p_names_the_better_response(need, tmp_path):
    """Where the better response is asked for, a p below ½ swaps the two with their ends, and ½ tells nothing."""
    pair = {"prompt": "Q", "chosen": "a", "rejected": "b", "finished": [True, False]}
    path = write(tmp_path / "a.jsonl", pair | {"p": 0.75}, pair | {"p": 0.25}, pair | {"p": 0.5}, pair, pair | {"p": 0})
    rows, report = data.read_rows(path, need)
    assert [row.chosen for row in rows] == ["a", "b", "a", "b"] and [row.p for row in rows] == [0.75, 0.75, None, 1]
    assert [row.rejected for row in rows] == ([None] * 4 if need == "responses" else ["b", "a", "b", "a"])
    assert [row.finished for row in rows] == [(True, False), (False, True)] * 2
    assert report.skipped == {"p is exactly ½": [f"{path}:3"]}
    tokenizer = FakeTokenizer()                              # a response that was cut gets no end
    pairs, _ = data.encode_dataset(tokenizer, rows, None, 100, 50)
    assert [tokenizer.eos_id in pair.chosen for pair in pairs] == [True, False] * 2
    rows, report = data.read_rows(path, "pairs")             # soft labels take the row as it stands
    assert [(row.chosen, row.p) for row in rows] == [("a", 0.75), ("a", 0.25), ("a", 0.5), ("a", None), ("a", 0)]


def test_p_of_a_blank_or_a_lone_response(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "Q", "chosen": "", "rejected": "b", "p": 0.1},
                 {"prompt": "Q", "response": "a", "p": 0.1})
    rows, _ = data.read_rows(path, "judge")
    assert [(row.chosen, row.rejected) for row in rows] == [("b", ""), ("a", None)]
    rows, _ = data.read_rows(path, "responses")
    assert [row.chosen for row in rows] == ["b", "a"]
    assert counts(data.read_rows(write(tmp_path / "b.jsonl", {"prompt": "Q", "response": "a"}, {
        "prompt": "Q", "response": "a", "finished": True}), "responses")[1]) == {"finished is not a list of two booleans": 1}


def test_unusable_rows_are_counted_by_reason_and_named(tmp_path):
    good = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    bad = {
        b'{"prompt": "Q", "chosen": ': "broken JSON",
        b"[" * 100_000: "broken JSON",                               # nesting must not end in a RecursionError
        b'{"prompt": "Q\xff", "chosen": "a", "rejected": "b"}': "broken UTF-8",
        b"[1, 2]": "not a JSON object",
        b'"text"': "not a JSON object",
        b"{}": "no prompt",
        b'{"chosen": "a", "rejected": "b"}': "no prompt",
        b'{"prompt": "Q"}': "no chosen response",
        b'{"prompt": "Q", "rejected": "b"}': "no chosen response",
        b'{"prompt": "Q", "chosen": "a"}': "no rejected response",
        b'{"prompt": "Q", "chosen": "a", "rejected": " "}': "empty response",
        b'{"prompt": "Q", "chosen": "", "rejected": "b"}': "empty response",
        b'{"prompt": "Q", "chosen": "a", "rejected": "a"}': "identical responses",
        json.dumps({"chosen": HH + " a", "rejected": HH[5:] + " b"}).encode(): "prompts differ",
        b'{"prompt": 5, "chosen": "a", "rejected": "b"}': "neither text nor a list of messages",
        b'{"prompt": "Q", "chosen": 5, "rejected": "b"}': "neither text nor a list of messages",
        b'{"prompt": ["Q"], "chosen": "a", "rejected": "b"}': "neither text nor a list of messages",
        b'{"prompt": [], "chosen": "a", "rejected": "b"}': "empty prompt",
        b'{"instruction": " ", "chosen": "a", "rejected": "b"}': "empty prompt",
        b'{"instruction": 1, "chosen": "a", "rejected": "b"}': "the instruction is not text",
        b'{"prompt": [{"role": "tool", "content": ""}], "chosen": "a", "rejected": "b"}': "a turn has an unknown role",
        b'{"prompt": [{"role": [1], "content": ""}], "chosen": "a", "rejected": "b"}': "a turn has an unknown role",
        b'{"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}': "a turn's content is not text",
        b'{"turns": [7], "chosen": "a", "rejected": "b"}': "a turn's content is not text",
        b'{"prompt": "Q", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"}':
            "a response does not end with an assistant turn",
        **{b'{"prompt": "Q", "chosen": "a", "rejected": "b", "p": %s}' % p: "p is not a number from 0 to 1"
           for p in (b"NaN", b"Infinity", b"-0.1", b"1.01", b"true", b'"0.5"', b"1e999", b"[]")},
        b'{"prompt": "Q", "chosen": "a", "rejected": "b", "p": 1%s}' % (b"0" * 5000): "broken JSON",
    }
    path = write(tmp_path / "a.jsonl", good, *bad)
    rows, report = data.read_rows(path, "pairs")
    assert len(rows) == report.used == 1
    expected = {}
    for line, reason in enumerate(bad.values(), 2):
        expected.setdefault(reason, []).append(f"{path}:{line}")
    assert report.skipped == expected
    assert f"1 rows used, {len(bad)} skipped (3 broken JSON at 2, 3, 35; 1 broken UTF-8 at 4; " in str(report)
    assert "8 p is not a number from 0 to 1 at 27, 28, 29, …" in str(report)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.JSONL"])
def test_lines(name, tmp_path):
    """Byte order mark, CRLF, blank lines and U+2028 inside a line; JSON lines may also be called .json."""
    text = '{"prompt": "Q\u2028R", "chosen": "a\x85", "rejected": "b"}'
    raw = b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n  \n" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    rows, _ = data.read_rows(tmp_path / name, "pairs")
    assert [(row.prompt, row.chosen) for row in rows] == [("Q\u2028R", "a\x85")] * 2
    assert rows[1].where.endswith(":4")


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_json_list(name, tmp_path):
    """A list is numbered by entry, and a broken byte spoils only its own; an escaped lone surrogate is none."""
    good = b'{"prompt": "Q", "chosen": "a", "rejected": "b"}'
    raw = b"\xef\xbb\xbf\n[" + b",\n\n".join([good, good.replace(b"Q", b"\xff"), b"3", good]) + b"]\n"
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    rows, report = data.read_rows(tmp_path / name, "pairs")
    assert counts(report) == {"broken UTF-8": 1, "not a JSON object": 1}
    assert [row.where[-2:] for row in rows] == [":1", ":4"] and report.skipped["broken UTF-8"][0].endswith(":2")
    raw = b"[" + good.replace(b"Q", b"\\udc80") + b"]"
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert data.read_rows(tmp_path / name, "pairs")[0][0].prompt == "\udc80"


def test_files_that_cannot_be_used(tmp_path):
    def error(path, need="pairs"):
        with pytest.raises(InputError) as caught:
            data.read_rows(path, need)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    assert "No such file" in error(tmp_path / "none.jsonl")
    (tmp_path / "dir.jsonl").mkdir()
    assert "directory" in error(tmp_path / "dir.jsonl")
    assert "to_json" in error(tmp_path / "a.parquet") and f"{tmp_path}/a.jsonl" in error(tmp_path / "a.parquet")
    for name in ("a.pkl", "a.pt", "a.csv", "jsonl", "a.jsonl.bz2"):
        assert "not a data file" in error(tmp_path / name)
    for name in ("empty.jsonl", "empty.json"):
        (tmp_path / name).write_bytes(b"\n\n")
        assert "it is empty" in error(tmp_path / name)
    assert "it is empty" in error(write(tmp_path / "e.json", b"[]"))
    path = write(tmp_path / "bad.jsonl", {"prompt": "Q"}, b"{")
    assert "bad.jsonl:1: no chosen response" in error(path)
    assert "bad.jsonl:1: no chosen response" in error(path, "responses")
    assert "line 2 column 2" in error(write(tmp_path / "bad.json", b"[{},", b"{]"))
    assert "not a JSON list" in error(write(tmp_path / "deep.json", b"[" * 100_000))
    raw = gzip.compress(os.urandom(5000).hex().encode() * 3)
    (tmp_path / "cut.jsonl.gz").write_bytes(raw[:-100])
    assert "end-of-stream" in error(tmp_path / "cut.jsonl.gz")
    (tmp_path / "damaged.jsonl.gz").write_bytes(raw[:40] + b"\xff" * 40 + raw[80:])
    error(tmp_path / "damaged.jsonl.gz")
    (tmp_path / "plain.jsonl.gz").write_bytes(b"{}")
    assert "cannot be read" in error(tmp_path / "plain.jsonl.gz")


def test_weights(tmp_path):
    records = [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(20)]
    path, other = write(tmp_path / "a.jsonl", *records), write(tmp_path / "b.jsonl", records[0])

    def prompts(*specs, seed=0):
        return [row.prompt for row in data.read_data(specs, "pairs", seed)[0]]

    full = [str(i) for i in range(20)]
    assert prompts(path) == prompts(path + ":1") == full and prompts(path + ":2") == full * 2
    tenth = prompts(path + ":0.1")
    assert len(set(tenth)) == 2 and set(tenth) < set(full) and tenth == prompts(path + ":0.1")
    assert prompts(path + ":0.5") != prompts(path + ":0.5", seed=1)
    assert Counter(prompts(path + ":2.5")).most_common()[0][1] == 3 and len(prompts(path + ":2.5")) == 50
    assert prompts(other + ":0.1") == ["0"]                      # never nothing
    assert prompts(path, other) == full + ["0"]
    assert len(data.read_data([path, other], "pairs", 0)[1]) == 2
    for weight in ("0", "-1", "1e9"):
        with pytest.raises(InputError, match="weight"):
            prompts(f"{path}:{weight}")
    strange = write(tmp_path / "a.jsonl:3.jsonl", records[0])
    assert prompts(strange) == ["0"]
    with pytest.raises(InputError, match="No such file"):
        prompts(str(tmp_path / "none.jsonl:2"))


# --- the real files --------------------------------------------------------------------------------------------------

HH_FILES = ["helpful-rejection-sampled.test.jsonl.gz", "helpful-online.test.jsonl.gz",
            "helpful-base.test.lines-0001-1354.jsonl.gz", "harmless-base.test.lines-0001-1312.jsonl.gz"]


def test_hh_counts_and_verbatim_round_trip():
    """Of 6,414 pairs 12 have prompts that differ, 10 an empty response, 35 twice the same; none is two of these.
    All 12,828 responses open with a space (contract.md's 6,402 are the pairs whose prompts agree)."""
    total, used = Counter(), 0
    for name in HH_FILES:
        path = shared("hh-rlhf/" + name)
        rows, report = data.read_rows(path, "pairs")
        total += Counter(counts(report))
        used += len(rows)
        lines = gzip.open(path).read().split(b"\n")
        for row in rows:
            record = json.loads(lines[int(row.where.rpartition(":")[2]) - 1])
            assert isinstance(row.prompt, list)
            prompt = data.hh_text(row.prompt) + data.ASSISTANT
            assert prompt + row.chosen == record["chosen"] and prompt + row.rejected == record["rejected"]
            assert row.chosen[0] == row.rejected[0] == " "
        for line in filter(None, lines):                         # the skipped ones too
            for text in json.loads(line).values():
                before, _, response = text.rpartition(data.ASSISTANT)
                assert data.hh_text(data.hh_prompt(before)) == before and response[0] == " "
    assert total == {"prompts differ": 12, "empty response": 10, "identical responses": 35}
    assert used == 6414 - 57


def test_hh_as_responses_and_prompts():
    used = {need: sum(data.read_rows(shared("hh-rlhf/" + name), need)[1].used for name in HH_FILES)
            for need in ("responses", "prompts")}
    assert used == {"responses": 6414 - 12 - 4, "prompts": 6414 - 12}    # 4 chosen responses are empty


def test_hh_texts_that_are_no_dialogue():
    for text in ("", "Human: Hi", "Hi\n\nHuman: Ho", "\n\nHuman:Hi", "\n\nHumans: Hi"):
        assert data.hh_prompt(text) == text + data.ASSISTANT     # kept verbatim
    assert data.hh_prompt("\n\nHuman:") == [user("")]
    assert data.hh_text([system("Be kind."), user("Hi"), assistant("Ho\n"), system("S"), user("\tX")]) == (
        "Be kind.\n\nHuman: Hi\n\nAssistant: Ho\n\n\nS\n\nHuman:\tX")


def test_preference_files():
    rows, report = data.read_rows(shared("preferences/dpo_en_demo.json"), "pairs")
    assert len(rows) == 300 and not report.skipped
    assert sum(row.prompt[0]["role"] == "system" for row in rows) == 80
    assert sum(len(row.prompt) > 1 for row in rows) == 186
    rows, report = data.read_rows(shared("preferences/instruction-data-with-preference.json"), "pairs")
    assert len(rows) == 1094 and counts(report) == {"identical responses": 6}
    assert report.skipped["identical responses"][0].endswith(".json:123")
    assert rows[0].prompt[0]["content"].endswith("given.\n\nfreind --> friend")
    rows, report = data.read_rows(shared("preferences/instruction-data-with-preference.json"), "responses")
    assert len(rows) == 1100
    for bench in ("mt_bench", "vicuna_bench"):
        rows, report = data.read_rows(shared(f"benchmarks/{bench}/question.jsonl"), "prompts")
        assert len(rows) == 80 and not report.skipped and all(len(row.prompt) == 1 for row in rows)
    with pytest.raises(InputError, match="no prompt"):
        data.read_rows(shared("benchmarks/judge_prompts.jsonl"), "pairs")


# --- text to ids -----------------------------------------------------------------------------------------------------

CHAT = [system(" Be kind. "), user("Hi"), assistant(" Yes?"), user(" Bye")]
SHOWN = {       # what the ids spell; the fake tokenizer puts a space in front of every segment, as sentencepiece does
    "hh": " Be kind. \n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:",
    "zephyr": " <|system|>\nBe kind. </s> \n<|user|>\nHi</s> \n<|assistant|>\nYes?</s> \n<|user|>\nBye</s> "
              "\n<|assistant|>\n",
    "chatml": "<|im_start|> system\nBe kind. <|im_end|> \n<|im_start|> user\nHi<|im_end|> \n"
              "<|im_start|> assistant\nYes?<|im_end|> \n<|im_start|> user\nBye<|im_end|> \n<|im_start|> assistant\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
              "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
              "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": " [INST] Be kind. \n\nHi [/INST] Yes?</s> [INST] Bye [/INST]",
}


@pytest.mark.parametrize("chat", data.CHATS)
def test_chats_spell_their_templates(chat):
    tokenizer = FakeTokenizer(MARKS, word_start=chat != "llama3")
    messages = CHAT if chat != "hh" else [system("Be kind. "), *CHAT[1:]]
    ids = data.prompt_ids(tokenizer, messages, chat)
    assert tokenizer.decode(ids) == SHOWN[chat]
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(chat, "</s>")
    between = " " if chat in ("hh", "mistral") else ""
    for response in ("Sure thing", " Sure thing"):
        y = data.response_ids(tokenizer, messages, response, chat)
        assert tokenizer.decode(y) == between + "Sure thing" + end
        assert data.response_ids(tokenizer, messages, response, chat, complete=False) == y[:-1]
    y = data.response_ids(tokenizer, messages, "\n- one", chat)          # other white space is the response's own
    assert tokenizer.decode(y) == "\n- one" + end


@pytest.mark.parametrize("chat", data.CHATS)
def test_plain_text_is_a_user_turn_where_a_format_was_chosen(chat):
    """Text is encoded as the message it stands for, answer included; without a format verbatim. HH texts are dialogues."""
    tokenizer = FakeTokenizer(MARKS, word_start=chat != "llama3")

    def encode(prompt, chat):
        pair = data.encode_pair(tokenizer, data.Row(prompt, "Sure", None, None, "f:1"), chat, 1000, 1000, "p")
        return pair.x, pair.px, pair.chosen

    for text, messages in (("What is 2+2?", [user("What is 2+2?")]), (HH, TALK), (HH + " ", TALK)):
        assert encode(text, chat) == encode(messages, chat)
    assert encode("What is 2+2?", chat) != encode("What is 2+2?", None)
    assert tokenizer.decode(encode("What is 2+2?", None)[0]) == "<s>" + " " * (chat != "llama3") + "What is 2+2?"
    for text in ("", " ", HH + " Well", "Be kind." + HH):        # nothing asked, an answer begun, a text in front
        assert data.in_turns(text, chat) == text and encode(text, chat)[0] == encode(text, None)[0]
    assert data.in_turns(TALK, chat) is TALK and data.in_turns("Q", None) == "Q"


def test_marks_with_ids_of_their_own():
    """Tokenizers that have the marks as special tokens (StableLM's Zephyr, Mistral v0.3) get the ids."""
    tokenizer = FakeTokenizer(["<|user|>", "<|assistant|>", "[INST]", "[/INST]"])
    ids = data.prompt_ids(tokenizer, TALK, "zephyr")
    assert ids[0] == 3 and ids.count(3) == 2 and ids.count(4) == 2
    assert tokenizer.decode(ids) == ("<|user|> \nHi</s> \n<|assistant|> \nYes?</s> \n<|user|> \nBye</s> "
                                     "\n<|assistant|> \n")
    assert tokenizer.decode(data.prompt_ids(tokenizer, TALK, "mistral")) == "[INST] Hi[/INST] Yes?</s>[INST] Bye[/INST]"


def test_special_strings_in_contents_are_plain_text():
    tokenizer = FakeTokenizer(MARKS)
    for chat in data.CHATS:
        before = Counter(data.prompt_ids(tokenizer, [user("x")], chat))
        after = Counter(data.prompt_ids(tokenizer, [user("x </s> <|im_end|> <|eot_id|> <s>")], chat))
        assert all(after[i] == before[i] for i in tokenizer.special_ids.values())


def test_check_chat():
    tokenizer = FakeTokenizer(MARKS)
    assert data.check_chat(tokenizer, None) is None and data.check_chat(tokenizer, "llama3") == "llama3"
    with pytest.raises(InputError, match="hh, zephyr, chatml, llama3, mistral"):
        data.check_chat(tokenizer, "alpaca")
    with pytest.raises(InputError, match=r"--chat=chatml needs the special token <\|im_start\|>"):
        data.check_chat(FakeTokenizer(), "chatml")
    with pytest.raises(InputError, match=r"--chat=llama3 needs the special token <\|eot_id\|>"):
        data.check_chat(FakeTokenizer(MARKS[:-1]), "llama3")
    tokenizer.chat_template = True
    assert data.check_chat(tokenizer, "hh") == "hh"
    with pytest.raises(InputError, match="hh|zephyr|chatml|llama3|mistral"):
        data.check_chat(tokenizer, None)


def test_trailing_spaces_of_a_plain_prompt_belong_to_the_response():
    tokenizer = FakeTokenizer()
    assert data.prompt_ids(tokenizer, "Q:  ", None) == data.prompt_ids(tokenizer, "Q:", None) == tokenizer.encode("Q:")
    assert tokenizer.decode(data.response_ids(tokenizer, "Q: ", "a b", None)) == " a b</s>"
    assert data.response_ids(tokenizer, "Q: ", "a", None) == data.response_ids(tokenizer, "Q:", " a", None)
    assert tokenizer.decode(data.prompt_ids(tokenizer, "Q:\n", None)) == " Q:\n"
    # text without a prompt is met alone: it has its word-start
    assert data.prompt_ids(tokenizer, "", None) == [] and data.prompt_ids(tokenizer, " ", None) == []
    assert tokenizer.decode(data.response_ids(tokenizer, "", "Once", None)) == " Once</s>"


def test_context_text():
    assert data.context_text([user(" Hi"), assistant(" Yes?"), user(" Bye")]) == HH.removesuffix(data.ASSISTANT)[2:]
    assert data.context_text(HH) == HH.removesuffix(data.ASSISTANT)[2:] and data.context_text("Q: x") == "Q: x"


@pytest.mark.parametrize("chat", [None, *data.CHATS])
@pytest.mark.parametrize("prompt", [TALK, "Q: x", " Q", "", HH], ids=["messages", "text", "space", "empty", "hh text"])
@pytest.mark.parametrize("word_start", [True, False], ids=["sentencepiece", "bytes"])
def test_p_stands_behind_bos_and_x_and_y_are_the_same_tokens(chat, prompt, word_start):
    tokenizer = FakeTokenizer(MARKS, word_start=word_start)
    row = data.Row(prompt, "good one", "bad one", None, "f:1")
    p = tokenizer.encode(data.REFINEMENT_PROMPT)
    pair = data.encode_pair(tokenizer, row, chat, 1000, 1000, data.REFINEMENT_PROMPT)
    assert pair.px[:1 + len(p)] == [1] + p and not pair.cut
    x = tokenizer.decode(pair.x[1:])
    behind = tokenizer.decode(pair.px[1 + len(p):])
    assert behind.lstrip(" ") == x.lstrip(" ")
    if chat in (None, "hh") or not prompt:
        assert not behind or behind[0].isspace() and behind[:2] != "  "      # one space, as text goes on
    else:
        assert pair.px[1 + len(p):] == pair.x[1:]
    assert pair.chosen[-1:] == data.response_ids(tokenizer, data.in_turns(prompt, chat), "", chat)[-1:]
    empty = data.encode_pair(tokenizer, row, chat, 1000, 1000, "")
    assert empty.px == empty.x == pair.x and empty.chosen == pair.chosen     # the empty p is no p
    assert data.encode_pair(tokenizer, row, chat, 1000, 1000).px is None


def test_cut_x_is_the_same_behind_p():
    tokenizer = FakeTokenizer()
    row = data.Row([user("one two three four five six seven")], "good", "bad", None, "f:1")
    p = tokenizer.encode(data.REFINEMENT_PROMPT)
    for max_length in range(2, 20):
        try:
            pair = data.encode_pair(tokenizer, row, "hh", max_length, 5, data.REFINEMENT_PROMPT)
        except data.Unusable:
            pytest.fail("the first response tokens differ")
        assert pair.px[:1 + len(p)] == [1] + p
        if len(pair.x) < 1 + len(data.prompt_ids(tokenizer, row.prompt, "hh")):
            assert pair.cut and pair.px[1 + len(p):] == pair.x[1:]


def test_prefix_without_bos():
    """GPT-NeoX has no BOS, but an empty prompt begins with <|endoftext|>: the first token needs something before it."""
    tokenizer = FakeTokenizer(bos=False)
    row = data.Row("", "good", "bad", None, "f:1")
    pair = data.encode_pair(tokenizer, row, None, 10, 10, "p")
    assert pair.x == [tokenizer.eos_id] and pair.px == tokenizer.encode("p")
    assert data.encode_pair(tokenizer, row, None, 10, 10, "").px == [tokenizer.eos_id]
    row.prompt = "Q"
    assert data.encode_pair(tokenizer, row, None, 10, 10).x == tokenizer.encode("Q")


def test_fit_by_hand():
    x, y = list(range(10)), [[20, 21, 22, 2], [30, 2]]
    assert data.fit([1], x, y, 15, 4) == (x, y, False)                           # 1 + 10 + 4
    assert data.fit([1], x, y, 14, 4) == (x[1:], y, True)                        # only as much as needed
    assert data.fit([1], x, y, 9, 4) == (x[6:], y, True)
    assert data.fit([1], x, y, 8, 4) == (x[6:], [[20, 21, 22], [30, 2]], True)   # x is at its least: y loses its EOS
    assert data.fit([1], x, y, 6, 4) == (x[6:], [[20], [30]], True)
    assert data.fit([1], x, y, 5, 4) == (x[7:], [[20], [30]], True)              # one response token always stays
    assert data.fit([1], x, y, 2, 4) == ([], [[20], [30]], True)
    assert data.fit([], x, y, 2, 0) == data.fit([], x, y, 2, 4) == ([9], [[20], [30]], True)
    assert data.fit([], x, y, 5, 0) == ([9], y, True)
    for prefix in ([1], []):
        with pytest.raises(InputError, match="max_length=1"):
            data.fit(prefix, x, y, 1, 4)


def test_fit_invariants():
    rng = random.Random(0)
    for _ in range(5000):
        prefix = [1] * rng.randint(0, 1)
        x = [rng.randint(10, 99) for _ in range(rng.randint(0, 12))]
        ys = [[rng.randint(10, 99) for _ in range(rng.randint(0, 12))] + [2] for _ in range(rng.randint(1, 3))]
        x = x if prefix else x + [9]                                             # prefix() is not empty when x is
        max_length, max_prompt_length = rng.randint(2, 30), rng.randint(0, 15)
        x_cut, ys_cut, cut = data.fit(prefix, x, ys, max_length, max_prompt_length)
        room = max_length - len(prefix)
        assert x[len(x) - len(x_cut):] == x_cut
        assert all(y_cut and y[:len(y_cut)] == y_cut for y, y_cut in zip(ys, ys_cut, strict=True))
        assert prefix + x_cut and all(len(x_cut) + len(y) <= room for y in ys_cut)
        assert cut == (x_cut != x or ys_cut != ys)
        for y, y_cut in zip(ys, ys_cut):                                         # EOS once, and only behind a whole y
            assert y_cut.count(2) == (y_cut == y)
        assert len(x_cut) >= min(len(x), max_prompt_length, room - 1)
        if cut:                                                                  # nothing is given away
            assert max(map(len, ys_cut)) + len(x_cut) == room or len(x_cut) == len(x)
        if ys_cut != ys:
            assert len(x_cut) <= max(max_prompt_length, 1 - len(prefix))


def test_encode_dataset_counts_what_was_cut_and_dropped():
    tokenizer = FakeTokenizer()
    rows = [data.Row("Q", " a b c d", " a b c e", None, "f:1"), data.Row("Q", " a", " b", 0.7, "f:2"),
            data.Row([user("Q")], "a", " a", None, "f:3"), data.Row("Q", " b b b b b", " a", None, "f:4")]
    pairs, report = data.encode_dataset(tokenizer, rows, None, 5, 1)
    assert [pair.row.where for pair in pairs] == ["f:2", "f:4"] and pairs[0].p == 0.7
    assert str(report) == ("encoded: 2 rows used, 1 of them cut to max_length, "
                           "2 skipped (2 identical after encoding and cutting at f:1, f:3)")
    assert pairs[0].chosen[-1] == 2 and 2 not in pairs[1].chosen and pairs[1].rejected[-1] == 2
    with pytest.raises(InputError, match="f:1"):
        data.encode_dataset(tokenizer, rows[:1], None, 5, 1)
    with pytest.raises(InputError, match="no rows"):
        data.encode_dataset(tokenizer, [], None, 5, 1)


def test_encode_responses_and_prompts():
    tokenizer = FakeTokenizer()
    rows = [data.Row("Q", " a b", None, None, "f:1"), data.Row("", "a b", None, None, "f:2")]
    pairs, _ = data.encode_dataset(tokenizer, rows, None, 10, 10)
    assert [tokenizer.decode(pair.x) for pair in pairs] == ["<s> Q", "<s>"]
    assert [tokenizer.decode(pair.chosen) for pair in pairs] == [" a b</s>"] * 2
    assert all(pair.rejected is None for pair in pairs)
    rows = [data.Row("a b c d e f", None, None, None, "f:1")]
    (pair,), _ = data.encode_dataset(tokenizer, rows, None, 10, 2, max_tokens=6)
    assert (tokenizer.decode(pair.x), pair.chosen, pair.rejected, pair.cut) == ("<s> d e f", None, None, True)


def test_zephyr_ids_of_a_real_tokenizer():
    """Golden ids of HuggingFaceH4/zephyr-7b-beta (its tokenizer is Mistral's first): each segment has a word-start."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(shared("tokenizers/mistral-v1/tokenizer.model")))

    class Mistral(FakeTokenizer):
        encode = staticmethod(model.encode)
        encode_after = staticmethod(lambda text: model.encode("\n" + text)[2:])

    messages = [system("You are a friendly chatbot who always responds in the style of a pirate"),
                user("How many helicopters can a human eat in one sitting?")]
    ids = data.prompt_ids(Mistral(), messages, "zephyr")
    assert ids[:6] == [523, 28766, 6574, 28766, 28767, 13] and ids[-10:] == [
        2, 28705, 13, 28789, 28766, 489, 11143, 28766, 28767, 13]
    middle = [2, 28705, 13, 28789, 28766, 1838, 28766, 28767, 13, 5660, 1287, 19624, 410, 1532, 541, 264, 2930, 5310]
    assert any(ids[i:i + len(middle)] == middle for i in range(len(ids)))
    assert data.response_ids(Mistral(), messages, "Hello!", "zephyr") == [16230, 28808, 2]
    # v0.2's brackets are text; the answer's word-start is the one mistral-common gives it by encoding it alone
    ids = data.prompt_ids(Mistral(), messages[1:], "mistral")
    assert model.decode(ids) == f"[INST] {messages[1]['content']} [/INST]"
    assert data.response_ids(Mistral(), messages, "Hello!", "mistral") == model.encode("Hello!") + [2]


def test_hh_pairs_keep_the_limits():
    rows, _ = data.read_rows(shared("hh-rlhf/" + HH_FILES[3]), "pairs")
    pairs, report = data.encode_dataset(FakeTokenizer(), rows, "hh", 128, 64, data.REFINEMENT_PROMPT)
    for pair in pairs:
        assert max(len(pair.chosen), len(pair.rejected)) + len(pair.x) <= 128 and pair.chosen and pair.rejected
        assert pair.chosen.count(2) <= 1 and pair.rejected.count(2) <= 1
    assert 0 < report.cut < len(rows) and report.used + sum(counts(report).values()) == len(rows)
