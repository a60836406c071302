"""A run's page: its numbers are those of the files, and no text of a model or of data is more than text."""
import html.parser
import json
import re
import shutil
import subprocess

import pytest

import tiny
from support import report
from support.cli import InputError

HOSTILE = ["<script>document.title='planted'</script>", "'\" onload='x",
           "</svg></table><img src=x onerror=\"document.title='planted'\">",
           "\u202eright to left\u2066", "a" * 100_000, "lone \ud800 surrogate", "\x00 \x1b[31m"]


def answer(text, strength, **known):
    return {"text": text, "finished": True, "strength": strength, **known}


def group(step, texts=("good", "bad", "fair")):
    """K = 3 answers, of which the first wins over the second; the third is the median."""
    answers = [answer(text, p, reward=r) for text, p, r in zip(texts, (0.9, 0.1, 0.5), (0.8, -0.2, 0.1))]
    return {"step": step, "prompt": texts[0], "answers": answers, "pairs": [
        {"first": 0, "second": 1, "p": 0.75, "at_a": 0.9, "at_b": 0.4, "margin": 0.0, "margin_after": 0.125}]}


def write_run(folder, metrics=(), groups=(), answers=(), steps=4, finished=True):
    """The files of a run in a folder."""
    folder.mkdir(parents=True)
    config = {"settings": {"recipe": "osp", "model": "m", "steps": steps}, "versions": {"torch": "2"},
              "command": "train.py --recipe=osp", "given": {"k": 3}}
    (folder / "config.json").write_text(json.dumps(config))
    for name, rows in (("metrics", metrics), ("groups", groups), ("answers", answers)):
        text = "".join(json.dumps(row) + "\n" for row in rows)           # \ud800 is written as an escape
        (folder / f"{name}.jsonl").write_text(text)
    if finished:
        (folder / "final").mkdir()
    return folder


class Reader(html.parser.HTMLParser):
    """The tables of a page as lists of cells, the elements, attributes and scripts that are there."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.tags, self.attributes, self.scripts, self.inside = [], [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.inside.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, text):
        if "script" in self.inside:
            self.scripts.append(text)
        elif "td" in self.inside or "th" in self.inside:
            self.rows[-1][-1] += text


def read(folder, *others):
    page = report.write([folder, *others]).read_bytes()
    return Reader(page.decode("utf-8")), page


def test_numbers_are_those_of_the_files(tmp_path):
    """Every figure of metrics.jsonl stands in the table behind its curve, with three digits; a held-out one
    beside it; a group's p in both orders, its margins and its true gap beside the pair."""
    metrics = [{"step": step, "loss": 0.7 - step / 100, "p": 0.5 + step / 50} for step in (1, 2, 3, 4)]
    metrics.append({"step": 4, "eval_loss": 0.625})
    page, _ = read(write_run(tmp_path / "run", metrics, [group(1)]))
    behind = page.rows[page.rows.index(["step", "loss", "loss, held out"]) + 1:][:4]
    assert behind == [["1", "0.69", "–"], ["2", "0.68", "–"], ["3", "0.67", "–"], ["4", "0.66", "0.625"]]
    behind = page.rows[page.rows.index(["step", "p"]) + 1:][:4]
    assert [row[1] for row in behind] == ["0.52", "0.54", "0.56", "0.58"]
    assert ["1 ≻ 3", "0.750", "0.900", "0.600", "0 → 0.125", "+1.00"] in page.rows
    # The judge: A is preferred in one of two questions, the orders agree, "good" is longer than "bad".
    facts = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert facts["the first slot, A, is preferred"] == "50 % of 2"
    assert facts["the two orders disagree"] == "0 % of 1"
    assert facts["the longer answer is preferred"] == "100 % of 1"
    assert facts["right, where the truth is known"] == "100 % of 1"
    assert json.dumps(3) in facts["k"]


def test_a_curve_goes_through_its_points(tmp_path):
    """The path of a straight line has one slope throughout, and its ends lie on the frame."""
    page, text = read(write_run(tmp_path / "run", [{"step": s, "loss": 3.0 - s} for s in (1, 2, 3, 4)]))
    path = re.search(r'd="(M[^"]*)" class="line c0"', text.decode())[1]
    points = [tuple(map(float, point.split(","))) for point in path[1:].split("L")]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(points, points[1:])]
    assert len(points) == 4 and max(slopes) - min(slopes) < 0.01 and slopes[0] > 0       # y grows downwards
    assert report.ticks(0, 1) == [0, 0.5, 1] and report.ticks(-0.3, 7.2) == [0, 2, 4, 6]


def test_texts_stay_texts(tmp_path):
    """Whatever a text holds: one script, ours, named by its hash; no element, attribute or address more."""
    rows = [{"step": step, "place": i, "prompt": text, "held_out": True, "text": text + str(step),
             "finished": True, "marks": [[text, 0.5]] if step else None}
            for i, text in enumerate(HOSTILE) for step in (0, 4)]
    groups = [group(i + 1, (text, text + "x", "y")) for i, text in enumerate(HOSTILE)]
    page, raw = read(write_run(tmp_path / "<b>run", [], groups, rows))
    assert len(page.scripts) == 1 and page.scripts[0].strip() == report.SCRIPT.strip()
    assert not {"img", "b>run"} & set(page.tags) and page.tags.count("script") == 1
    assert not any(name.startswith("on") or name in ("src", "href") for name, _ in page.attributes)
    assert "http:" not in raw.decode() and "https:" not in raw.decode() and len(raw) < 200_000
    assert any("document.title" in cell for row in page.rows for cell in row)            # it is there as text


def test_pages_of_little_and_of_much(tmp_path):
    """No step yet; a run under way loads itself again; 2,000 groups stay below 5 MB; two runs overlaid."""
    empty, _ = read(write_run(tmp_path / "empty", finished=False))
    assert ("http-equiv", "refresh") in empty.attributes
    long = ["word " * 200 + str(i) for i in range(3)]
    metrics = [{"step": step, "loss": 1.0} for step in range(1, 2001)]
    groups = [group(step, long) for step in range(1, 2001)]
    _, raw = read(write_run(tmp_path / "much", metrics, groups, steps=2000))
    assert len(raw) < 5_000_000
    both, _ = read(tmp_path / "much", write_run(tmp_path / "other", [{"step": 1, "loss": 2.0}]))
    assert ["step", "much: loss", "other: loss"] in both.rows
    with pytest.raises(InputError, match="holds no run"):
        report.write([tmp_path])


def test_a_run_keeps_what_its_page_shows(tmp_path):
    """groups.jsonl has the step's pairs: best with worst by strength; h is 0 before the first update and has
    moved after it. answers.jsonl has the same prompts at the start and the end, and both orders of an answer
    against itself give ½. What is kept does not change the run."""
    world = tiny.world(tmp_path / "world")
    plain = tiny.run(world, tmp_path / "plain", recipe="osp")
    shown = tiny.run(world, tmp_path / "shown", recipe="osp", show_prompts=3)
    assert [{k: v for k, v in row.items() if k != "eval_win"} for row in shown[1:]] == plain
    run = report.Run(tmp_path / "shown")
    rollouts = tiny.rollouts(tmp_path / "shown")
    assert [row["step"] for row in run.groups] == [1, 2, 3]
    for row in run.groups:
        strengths = [one["strength"] for one in row["answers"]]
        order = sorted(range(4), key=lambda i: -strengths[i])
        assert [(pair["first"], pair["second"]) for pair in row["pairs"]] == [
            (order[0], order[3]), (order[1], order[2])]
        for pair in row["pairs"]:
            assert pair["p"] == pytest.approx(0.5 + (pair["at_a"] - pair["at_b"]) / 2)
            texts = [row["answers"][pair[side]]["text"] for side in ("first", "second")]
            assert any(texts == [one["chosen"], one["rejected"]] and one["p"] == round(pair["p"], 6)
                       for one in rollouts)
    first = run.groups[0]["pairs"]
    assert all(pair["margin"] == 0 for pair in first) and any(pair["margin_after"] for pair in first)
    assert [(row["step"], row["place"]) for row in run.answers] == [(s, i) for s in (0, 3) for i in range(3)]
    assert [row["win"] for row in run.answers[:3]] == [0.5] * 3 and shown[0] == {"step": 0, "eval_win": 0.5}
    assert (tmp_path / "shown" / "report.html").exists()


@pytest.mark.parametrize("recipe", ["sft", "dpo", "osp"])
def test_the_page_asks_the_adapted_policy(recipe, tmp_path):
    """Under adapters the answers move with them, though reference and judge are the same network."""
    tiny.run(tiny.world(tmp_path), tmp_path / "out", recipe=recipe, show_prompts=4, lora_rank=4, lr=0.1)
    texts = {step: [row["text"] for row in report.Run(tmp_path / "out").answers if row["step"] == step]
             for step in (0, 3)}
    assert len(texts[0]) == 4 and texts[0] != texts[3]


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here, which is no Python package")
def test_a_browser_runs_nothing_of_theirs(tmp_path):
    """Chromium renders the hostile page: its title stays ours, and its console has no error."""
    groups = [group(i + 1, (text, text + "x", "y")) for i, text in enumerate(HOSTILE)]
    folder = write_run(tmp_path / "run", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}], groups)
    path = report.write([folder])
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
                           "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120)
    assert "<title>run</title>" in done.stdout and "planted</title>" not in done.stdout
    assert 'class="step now"' in done.stdout and "CONSOLE" not in done.stderr
