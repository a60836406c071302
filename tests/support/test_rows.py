"""Rows of data files: every form by hand-written rows, what is unusable, and all real files we have."""
import gzip
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from support.cli import InputError
from support.rows import ASSISTANT, hh_prompt, hh_text, json_records, read_data, read_rows, recognise
from tiny import assistant, system, user

DATA = Path(os.environ.get("OSPREY_DATA") or Path(__file__).parents[3] / "shared/data")


def shared(path):
    if not (DATA / path).exists():
        pytest.skip(f"{DATA / path} is not here; OSPREY_DATA names the folder of the shared data")
    return DATA / path


def write(path, *records):
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    raw = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


def counts(report):
    return {reason: len(where) for reason, where in report.skipped.items()}


# --- rows ---------------------------------------------------------------------------------------------------

HH = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:"
TALK = [user("Hi"), assistant("Yes?"), user("Bye")]


def test_a_replayed_rollout_keeps_its_strength(tmp_path):
    records = [{"prompt": "Q", "chosen": "a", "rejected": "b", "p": p} for p in (0.75, 0, 1, None)]
    rows, _ = read_rows(write(tmp_path / "a.jsonl", *records), "pairs")
    assert [row.p for row in rows] == [0.75, 0, 1, None]


@pytest.mark.parametrize("need", ["ordered pairs", "judge", "responses"])
def test_p_names_the_better_response(need, tmp_path):
    """Where the better one is asked for, a p below ½ swaps the two with their ends, and ½ tells nothing."""
    pair = {"prompt": "Q", "chosen": "a", "rejected": "b", "finished": [True, False]}
    path = write(tmp_path / "a.jsonl", *(pair | {"p": p} for p in (0.75, 0.25, 0.5, None, 0)))
    rows, report = read_rows(path, need)
    assert [row.chosen for row in rows] == ["a", "b", "a", "b"]
    assert [row.p for row in rows] == [0.75, 0.75, None, 1]
    assert [row.rejected for row in rows] == ([None] * 4 if need == "responses" else ["b", "a", "b", "a"])
    assert [row.finished for row in rows] == [(True, False), (False, True)] * 2
    assert report.skipped == {"p is exactly ½": [f"{path}:3"]}
    rows, report = read_rows(path, "pairs")                  # soft labels take the row as it stands
    assert [row.chosen for row in rows] == ["a"] * 5 and [row.p for row in rows] == [0.75, 0.25, 0.5, None, 0]


def test_p_of_a_blank_or_a_lone_response(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "Q", "chosen": "", "rejected": "b", "p": 0.1},
                 {"prompt": "Q", "response": "a", "p": 0.1})
    rows, _ = read_rows(path, "judge")
    assert [(row.chosen, row.rejected) for row in rows] == [("b", ""), ("a", None)]
    rows, _ = read_rows(path, "responses")
    assert [row.chosen for row in rows] == ["b", "a"]


def test_unusable_rows_are_counted_by_reason_and_named(tmp_path):
    good = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    bad = {
        b'{"prompt": "Q", "chosen": ': "broken JSON",
        b"[" * 100_000: "broken JSON",                               # a RecursionError
        b'{"prompt": "Q\xff", "chosen": "a", "rejected": "b"}': "broken UTF-8",
        b"[1, 2]": "not a JSON object",
        b'"text"': "not a JSON object",
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
        b'{"instruction": 1, "chosen": "a", "rejected": "b"}': "neither text nor a list of messages",
        b'{"prompt": "Q", "system": 1, "chosen": "a", "rejected": "b"}':
            "a field is missing or has the wrong type",
        b'{"prompt": "Q", "chosen": "a", "rejected": "b", "x": %s}' % (b"[" * 900 + b"]" * 900):
            "nested too deeply",
        b'{"prompt": [{"role": "narrator", "content": ""}], "chosen": "a"}': "a turn has an unknown role",
        b'{"prompt": [{"role": [1], "content": ""}], "chosen": "a"}': "a turn has an unknown role",
        b'{"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}': "a turn's content is not text",
        b'{"turns": [7], "chosen": "a", "rejected": "b"}': "neither text nor a list of messages",
        b'{"prompt": "Q", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"}':
            "a response does not end with an assistant turn",
        **{b'{"prompt": "Q", "chosen": "a", "rejected": "b", "p": %s}' % p: "p is not a number from 0 to 1"
           for p in (b"NaN", b"Infinity", b"-0.1", b"1.01", b"true", b'"0.5"', b"1e999", b"[]")},
        b'{"prompt": "Q", "chosen": "a", "rejected": "b", "finished": true}':
            "finished is not a list of two booleans",
        b'{"prompt": "Q", "chosen": "a", "rejected": "b", "p": 1%s}' % (b"0" * 5000): "broken JSON",
    }
    path = write(tmp_path / "a.jsonl", good, *bad)
    rows, report = read_rows(path, "pairs")
    assert len(rows) == report.used == 1
    expected = {}
    for line, reason in enumerate(bad.values(), 2):
        expected.setdefault(reason, []).append(f"{path}:{line}")
    assert report.skipped == expected
    assert f"1 rows used, {len(bad)} skipped (3 broken JSON at 2, 3, 34; 1 broken UTF-8 at 4; " in str(report)
    assert "8 p is not a number from 0 to 1 at 25, 26, 27, …" in str(report)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.JSONL"])
def test_lines(name, tmp_path):
    """Byte order mark, CRLF, blank lines and U+2028 inside a line; JSON lines may also be called .json."""
    text = '{"prompt": "Q\u2028R", "chosen": "a\x85", "rejected": "b"}'
    raw = b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n  \n" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    rows, _ = read_rows(tmp_path / name, "pairs")
    assert [(row.prompt, row.chosen) for row in rows] == [("Q\u2028R", "a\x85")] * 2
    assert rows[1].where.endswith(":4")


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_json_list(name, tmp_path):
    """A list is numbered by entry; what cannot be parsed as a whole is refused as a whole."""
    good = b'{"prompt": "\\udc80", "chosen": "a", "rejected": "b"}'
    path = write(tmp_path / name, b"\xef\xbb\xbf\n[" + b",\n\n".join([good, b"3", good]) + b"]")
    rows, report = read_rows(path, "pairs")
    assert [(row.prompt, row.where) for row in rows] == [("\udc80", f"{path}:{n}") for n in (1, 3)]
    assert report.skipped == {"not a JSON object": [f"{path}:2"]}
    for bad in (b"[{},\n{]", b"[" * 100_000, b"[1" + b"0" * 5000 + b"]", b'["\xff"]'):
        with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path / name))}: not valid JSON: [^\n]+$"):
            read_rows(write(tmp_path / name, bad), "pairs")


def error(path, need="pairs"):
    with pytest.raises(InputError) as caught:
        read_rows(path, need)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)                    # as if it were not installed
    assert "No such file" in error(tmp_path / "none.jsonl")
    (tmp_path / "dir.jsonl").mkdir()
    assert "directory" in error(tmp_path / "dir.jsonl")
    assert f"to_json('{tmp_path}/a.jsonl'" in error(tmp_path / "a.parquet")
    for name in ("a.pkl", "a.pt", "a.csv", "jsonl", "a.jsonl.bz2"):
        assert "not a data file" in error(tmp_path / name)
    for name, content in (("e.jsonl", b"\n\n"), ("e.json", b"\n"), ("list.json", b"[]")):
        assert "it is empty" in error(write(tmp_path / name, content))
    path = write(tmp_path / "bad.jsonl", {"prompt": "Q"}, b"{")
    assert "bad.jsonl:1: no chosen response" in error(path)
    assert "bad.jsonl:1: no chosen response" in error(path, "responses")
    assert "line 2 column 2" in error(write(tmp_path / "bad.json", b"[{},", b"{]"))


def test_gzip_files_that_cannot_be_used(tmp_path):
    raw = gzip.compress(os.urandom(5000).hex().encode() * 3)
    (tmp_path / "cut.jsonl.gz").write_bytes(raw[:-100])
    assert "end-of-stream" in error(tmp_path / "cut.jsonl.gz")
    (tmp_path / "damaged.jsonl.gz").write_bytes(raw[:40] + b"\xff" * 40 + raw[80:])
    error(tmp_path / "damaged.jsonl.gz")
    (tmp_path / "plain.jsonl.gz").write_bytes(b"{}")
    assert "cannot be read" in error(tmp_path / "plain.jsonl.gz")


def test_records_and_prompts_by_themselves(tmp_path):
    """As judge.py reads responses: values by line, a prompt whose answers are under a key of their own."""
    path = write(tmp_path / "a.jsonl", {"prompt": "Q", "messages": TALK, "responses": []}, b"", b"{")
    (first, record), (third, broken) = json_records(path)
    assert (first, third, str(broken)) == (1, 3, "broken JSON")
    assert [recognise(record, answered)["prompt"] for answered in (True, False)] == ["Q", TALK]


def test_weights(tmp_path):
    records = [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(20)]
    path, other = write(tmp_path / "a.jsonl", *records), write(tmp_path / "b.jsonl", records[0])

    def prompts(*specs, seed=0):
        return [row.prompt for row in read_data(specs, "pairs", seed)[0]]

    full = [str(i) for i in range(20)]
    assert prompts(path) == prompts(path + ":1") == full and prompts(path + ":2") == full * 2
    tenth = prompts(path + ":0.1")
    assert len(set(tenth)) == 2 and set(tenth) < set(full) and tenth == prompts(path + ":0.1")
    assert prompts(path + ":0.5") != prompts(path + ":0.5", seed=1)
    assert Counter(prompts(path + ":2.5")).most_common()[0][1] == 3 and len(prompts(path + ":2.5")) == 50
    assert prompts(other + ":0.1") == ["0"]                      # never nothing
    assert prompts(path, other) == full + ["0"]
    assert len(read_data([path, other], "pairs", 0)[1]) == 2
    for weight in ("0", "-1", "1e9"):
        with pytest.raises(InputError, match="weight"):
            prompts(f"{path}:{weight}")
    strange = write(tmp_path / "a.jsonl:3.jsonl", records[0])
    assert prompts(strange) == ["0"]
    with pytest.raises(InputError, match="No such file"):
        prompts(str(tmp_path / "none.jsonl:2"))


# --- the real files -----------------------------------------------------------------------------------------

HH_FILES = ["helpful-rejection-sampled.test.jsonl.gz", "helpful-online.test.jsonl.gz",
            "helpful-base.test.lines-0001-1354.jsonl.gz", "harmless-base.test.lines-0001-1312.jsonl.gz"]


def test_hh_counts_and_verbatim_round_trip():
    """Of 6,414 pairs 12 have prompts that differ, 10 an empty response, 35 one twice; none is two of these.
    All 12,828 responses open with a space (contract.md's 6,402 are the pairs whose prompts agree)."""
    total, used = Counter(), 0
    for name in HH_FILES:
        path = shared("hh-rlhf/" + name)
        rows, report = read_rows(path, "pairs")
        total += Counter(counts(report))
        used += len(rows)
        lines = gzip.open(path).read().split(b"\n")
        for row in rows:
            record = json.loads(lines[int(row.where.rpartition(":")[2]) - 1])
            assert isinstance(row.prompt, list)
            prompt = hh_text(row.prompt) + ASSISTANT
            assert prompt + row.chosen == record["chosen"] and prompt + row.rejected == record["rejected"]
            assert row.chosen[0] == row.rejected[0] == " "
        for line in filter(None, lines):                         # the skipped ones too
            for text in json.loads(line).values():
                before, _, response = text.rpartition(ASSISTANT)
                assert hh_text(hh_prompt(before)) == before and response[0] == " "
    assert total == {"prompts differ": 12, "empty response": 10, "identical responses": 35}
    assert used == 6414 - 57


def test_hh_as_responses_and_prompts():
    used = {need: sum(read_rows(shared("hh-rlhf/" + name), need)[1].used for name in HH_FILES)
            for need in ("responses", "prompts")}
    assert used == {"responses": 6414 - 4, "prompts": 6414}              # 4 chosen responses are empty


def test_hh_texts_that_are_no_dialogue():
    for text in ("", "Human: Hi", "Hi\n\nHuman: Ho", "\n\nHuman:Hi", "\n\nHumans: Hi"):
        assert hh_prompt(text) == text + ASSISTANT     # kept verbatim
    assert hh_prompt("\n\nHuman:") == [user("")]
    assert hh_text([system("Be kind."), user("Hi"), assistant("Ho\n"), system("S"), user("\tX")]) == (
        "Be kind.\n\nHuman: Hi\n\nAssistant: Ho\n\n\nS\n\nHuman:\tX")


def test_preference_files():
    rows, report = read_rows(shared("preferences/dpo_en_demo.json"), "pairs")
    assert len(rows) == 300 and not report.skipped
    assert sum(row.prompt[0]["role"] == "system" for row in rows) == 80
    assert sum(len(row.prompt) > 1 for row in rows) == 186
    rows, report = read_rows(shared("preferences/instruction-data-with-preference.json"), "pairs")
    assert len(rows) == 1094 and counts(report) == {"identical responses": 6}
    assert report.skipped["identical responses"][0].endswith(".json:123")
    assert rows[0].prompt[0]["content"].endswith("given.\n\nfreind --> friend")
    rows, report = read_rows(shared("preferences/instruction-data-with-preference.json"), "responses")
    assert len(rows) == 1100
    for bench in ("mt_bench", "vicuna_bench"):
        rows, report = read_rows(shared(f"benchmarks/{bench}/question.jsonl"), "prompts")
        assert len(rows) == 80 and not report.skipped and all(len(row.prompt) == 1 for row in rows)
    with pytest.raises(InputError, match="no prompt"):
        read_rows(shared("benchmarks/judge_prompts.jsonl"), "pairs")
