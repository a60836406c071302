"""What a run says of itself: the judge cannot judge, no response ends, a batch is larger than the data."""
import json

import pytest
import torch

from recipes import Settings
from support import cli
from support.health import OFF_STEPS, PACE_STEPS, Health, bad_shares, opening
from support.metrics import is_best, summary
from support.ranks import Ranks


def watched(health, figures):
    """[(step, what was said, why to stop)] of steps with these figures, ten seconds apart."""
    return [(step, health.after({"step": step} | some, 10.0 * step), health.why_stop)
            for step, some in enumerate(figures, 1)]


def test_a_judge_that_cannot_judge_ends_the_run():
    """Off in five steps in a row. A step in which it judges breaks the row; one that asks nobody does
    not."""
    off, on, none = dict(judge_off=0.91, judge_a_or_b=0.03), dict(judge_off=0.9, judge_a_or_b=0.4), {}
    steps = [off] * (OFF_STEPS - 1) + [on, none, off, off, none, off, off, off]
    found = watched(Health(99, 16, False), steps)
    step, (said,), _ = found[0]
    assert "gives A and B 3.0 % of its probability" in said and "--recipe=judge" in said
    assert [one[0] for one in found if one[2]] == [len(found)] and "--judge_anyway" in found[-1][2]
    assert not any(why for *_, why in watched(Health(99, 16, True), [off] * 9))
    assert not any("judge" in "".join(said) for _, said, _ in watched(Health(99, 16, False), [on, off, off]))


def test_samples_that_never_end_are_named_once_in_a_row():
    ended, endless = dict(finished=0.01), dict(finished=0.0)
    found = watched(Health(30, 16, False), [endless] * 2 + [ended] + [endless] * 5 + [{}] + [endless] * 3)
    assert [step for step, said, _ in found if any("--max_tokens=16" in one for one in said)] == [6, 12]


@pytest.mark.parametrize("resumed, left", [(0, "0:04:30"), (20, "0:01:10"), (25, None)])
def test_the_time_that_a_run_takes(resumed, left):
    """Ten seconds a step, of 30: after the third one 27 are left. The first, however long, does not count; a
    minute or less is not worth a line."""
    health, clock = Health(30, 16, False), [1000.0 + 10 * i for i in range(9)]
    said = [health.after({"step": resumed + i}, now) for i, now in enumerate(clock, 1)]
    assert [i for i, some in enumerate(said, 1) if some] == [PACE_STEPS] * (left is not None)
    assert left is None or f"about {left} to go" in said[2][0]


def test_bad_shares_are_shown_and_an_accuracy_of_equals_is_not():
    good = dict(loss=0.5, judge_off=0.1, judge_cut=0.0, finished=0.9, identical=0.05, prompt_cut=1.0)
    bad = dict(judge_off=0.95, judge_cut=0.2, finished=0.8, empty=0.5, identical=1.0)
    assert bad_shares(good) == {} and bad_shares(bad) == bad
    assert summary(dict(margin=0.0, accuracy=0.0, augmented_accuracy=0.0, p=0.5)) == "margin 0  p 0.5"
    moved = dict(margin=-1e-9, accuracy=0.0, judge_off=1.0)
    assert summary(moved) == "judge_off 1  margin -1e-09  accuracy 0"       # a narrow terminal cuts the end


@pytest.mark.parametrize("rows, steps, says", [
    (26, 1, "1 step: 26 rows are less than one batch of 64"), (63, 5, "5 steps: 63 rows"), (64, 1, None)])
def test_a_batch_that_is_larger_than_the_data(rows, steps, says):
    weights = torch.nn.Linear(4, 3, bias=False).parameters()
    said = opening(Settings(recipe="dpo", batch_size=64), weights, rows, steps, torch.float32,
                   Ranks(0, 1, "cpu"))
    assert said.startswith(f"dpo: 12 parameters, {rows} rows") and (says or "1 step of 64") in said
    assert ("less than" in said) == (says is not None)


def test_the_best_evaluation(tmp_path):
    """Larger is better, smaller of a loss; a tie goes to the first, and what is not finite is never best."""
    file, found = tmp_path / "metrics.jsonl", []
    for step, value in enumerate((None, 0.5, 0.4, 0.5, 0.6, None, 0.3), 1):
        with open(file, "a") as lines:
            lines.write(json.dumps({"step": step, "loss": 1.0}) + "\n")
            lines.write(json.dumps({"step": step, "eval_loss": value, "eval_accuracy": value}) + "\n")
        found.append([is_best(file, "eval_accuracy"), is_best(file, "eval_loss")])
    accuracy, loss = zip(*found)
    assert accuracy == (False, True, False, False, True, False, False)
    assert loss == (False, True, True, False, False, False, True)


def test_progress_is_shown_of_what_takes_long(monkeypatch, capsys):
    """Three seconds each: shown once ten are over, then every ten, and at the end. Half a second: never."""
    now = [0.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    for seconds in (0.5, 3.0):
        for _ in cli.progress(range(10), "encoding"):
            now[0] += seconds
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["encoding 4/10 [0:00:12 < 0:00:18]", "encoding 8/10 [0:00:24 < 0:00:06]",
                     "encoding 10/10 [0:00:30 < 0:00:00]"]
