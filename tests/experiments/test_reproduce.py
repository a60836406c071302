"""experiments.reproduce: verdicts and the bootstrap by hand, the runs that claims ask for, measurements, the
same table twice."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import recipes
import tiny
from experiments import rlhf, toy
from experiments.reproduce import __main__ as script
from experiments.reproduce import claims, figures, hh, jobs, measure, report, runs
from support import disk, rows
from support.cli import InputError

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "experiments.reproduce"]


# ------------------------------------------------------------------------------------------------------------
# Verdicts

@pytest.mark.parametrize("kind, mean, low, high, expected", [
    ("more", 0.05, 0.01, 0.09, "holds"),               # above 0, and large enough
    ("more", 0.02, 0.01, 0.04, "cannot tell"),         # above 0, but perhaps too small
    ("more", 0.02, -0.01, 0.04, "cannot tell"),
    ("more", 0.01, -0.01, 0.02, "does not hold"),      # whatever it is, it is too small
    ("more", -0.2, -0.3, -0.1, "does not hold"),
    ("keeps", 0.0, -0.02, 0.02, "holds"),
    ("keeps", 0.5, 0.4, 0.6, "holds"),
    ("keeps", -0.05, -0.09, -0.01, "does not hold"),
    ("keeps", -0.02, -0.04, 0.01, "cannot tell"),
    ("alike", 0.0, -0.02, 0.02, "holds"),
    ("alike", 0.05, 0.01, 0.09, "does not hold"),
    ("alike", -0.05, -0.09, -0.01, "does not hold"),
    ("alike", 0.02, -0.01, 0.05, "cannot tell"),
])
def test_verdict(kind, mean, low, high, expected):
    part = claims.Part("", None, 0.03, kind)
    assert claims.verdict(part, mean, low, high) == expected


def test_a_claim_is_as_good_as_its_worst_part():
    assert claims.together(["holds", "holds"]) == "holds"
    assert claims.together(["holds", "cannot tell"]) == "cannot tell"
    assert claims.together(["cannot tell", "does not hold", "holds"]) == "does not hold"


def rewards(*means, spread=0.0, n=400):
    """Measurements of two runs, a and sft, one entry a seed: a is better by its mean, prompt by prompt."""
    rng = np.random.default_rng(1)
    found = []
    for mean in means:
        hard = rng.normal(size=(n, 1))                          # prompts differ more than the runs do
        a = hard + mean + spread * rng.normal(size=(n, 1))
        found.append({"sft": {"prompts_reward": hard}, "a": {"prompts_reward": a}})
    return found


def test_bootstrap_is_paired():
    """Prompts of deviation 1 and a constant difference of ¼: the interval is a point; unpaired it would be ±
    0.1 wide."""
    result = claims.weigh(claims.better("a", "sft"), rewards(0.25, 0.25))
    assert [*result.values, result.low, result.high] == pytest.approx([0.25] * 4)
    assert result.verdict == "holds"


def test_bootstrap_has_the_width_of_theory():
    """One seed, differences of deviation 1 over 400 prompts: ± 1.96 / 20. Two seeds half apart: their spread
    is in it."""
    result = claims.weigh(claims.better("a", "sft"), rewards(0.0, spread=1.0))
    assert result.high - result.low == pytest.approx(2 * 1.96 / 20, rel=0.12)
    result = claims.weigh(claims.better("a", "sft"), rewards(0.0, 0.5))
    wide = 0.25 * 2 ** 0.5                                                         # √(n/(n-1)) = √2
    assert [result.low, result.high] == pytest.approx([0.25 - wide, 0.25 + wide])
    assert result.verdict == "cannot tell"


def test_bootstrap_without_rows_draws_seeds():
    part = claims.CLAIMS["S5"].parts[0]
    measured = [{"work": {"dpo": np.array(1.0), "sr-dpo": np.array(1.238 + d)}} for d in (0.0, 0.02)]
    result = claims.weigh(part, measured)
    assert [result.low, result.high] == pytest.approx([0.01 - 0.01 * 2 ** 0.5, 0.01 + 0.01 * 2 ** 0.5])
    assert result.values == pytest.approx([0.0, 0.02]) and result.verdict == "holds"
    assert claims.weigh(part, measured[:1]).verdict == "cannot tell"          # one seed, no rows


def test_rank_correlations_by_hand():
    a, b = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 4.0])
    assert claims.kendall(a, b) == pytest.approx(4 / 6)               # five pairs in order, one not
    spearman = np.corrcoef(claims.ranks_of(a), claims.ranks_of(b))[0, 1]
    assert spearman == pytest.approx(0.8)                                          # 1 - 6·2 / (4·15)
    assert list(claims.ranks_of(np.array([5.0, 1.0, 5.0]))) == [2.5, 1.0, 2.5]
    tied = claims.kendall(np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0]))
    assert tied == pytest.approx(2 / np.sqrt(2 * 3))


# ------------------------------------------------------------------------------------------------------------
# Runs

def test_every_claim_and_every_recipe_is_there():
    assert list(claims.CLAIMS) == [f"S{i}" for i in range(1, 7)] + [f"O{i}" for i in range(1, 9)]
    known = {*recipes.RECIPES, *rlhf.RECIPES}
    assert len({run.recipe for run in runs.RUNS.values()} & known) == 19
    for claim in claims.CLAIMS.values():
        assert all(part.runs <= runs.RUNS.keys() for part in claim.parts)
    assert {name for _, _, names, _ in figures.FIGURES.values() for name in names} <= runs.RUNS.keys()
    panels = [runs.RUNS[name].recipe for name in figures.FIGURES["recipes"][2]]
    assert len(panels) == len(set(panels) & known) == 19


def test_what_would_matter_stays_what_it_was():
    """The thresholds, as they stood before the runs: whoever moves one has to move it here too."""
    found = {name: [(part.kind, part.least) for part in claim.parts] for name, claim in claims.CLAIMS.items()}
    assert found == {
        "S1": [("more", 0.05)] * 2 + [("keeps", 0.02)] * 2, "S2": [("alike", 0.03)] * 2,
        "S3": [("more", 0.03), ("more", 0.03), ("more", 0.0)] * 2, "S4": [("more", 0.02)] * 2,
        "S5": [("alike", 0.1)] * 2, "S6": [("more", 0.03)] * 4, "O1": [("more", 0.03)] * 4,
        "O2": [("keeps", 0.05), ("more", 0.05), ("more", 0.03)], "O3": [("more", 0.02)] * 4,
        "O4": [("more", 0.03)] * 2 + [("more", 0.5), ("more", 0.03)], "O5": [("more", 0.03)] * 3,
        "O6": [("more", 0.03)] * 3 + [("more", 0.01)], "O7": [("more", 0.03)] * 2 + [("more", 0.05)],
        "O8": [("more", 0.03)] * 3}


def test_a_run_stands_behind_what_it_needs():
    names = list(runs.RUNS)
    for name, run in runs.RUNS.items():
        assert all(names.index(other) < names.index(name) for other in run.needs)


def test_a_claim_runs_what_it_needs_and_no_more():
    names = report.Settings(claims=["S2"]).names()
    assert names == ["world", "base", "sft", "sr-dpo-lam0.3", "sr-ipo-lam0.3"]
    assert {"judge-0.02", "reward-0.02"} <= set(report.Settings(claims=["O2"]).names())
    assert report.Settings().names() == list(runs.RUNS)


def test_settings_of_runs(tmp_path):
    of = {name: runs.settings_of(name, tmp_path, 3, 1.0) for name, run in runs.RUNS.items()
          if run.recipe not in ("world", "work")}
    assert of["judge-0.02"].data_fraction == 0.02 and of["judge"].data_fraction == 1.0
    assert of["osp-0.02"].model == str(tmp_path / "judge-0.02/final")
    assert of["osp-0.02"].out_dir == str(tmp_path / "osp-0.02")
    assert of["rlhf-0.02"].reward == str(tmp_path / "reward-0.02/final")
    assert of["rlhf"].model == str(tmp_path / "sft/final")
    assert of["sr-ipo-lam1.0"].lam == 1.0 and of["osp-k3"].k == 3 and {s.seed for s in of.values()} == {3}
    assert of["dpo-800"].steps * of["dpo-800"].batch_size == 800
    assert of["dpo"].steps * of["dpo"].batch_size == 3200
    assert of["sr-dpo-naive"].refinement_prompt == ""
    assert of["sr-dpo-paraphrase"].refinement_prompt == runs.PARAPHRASE
    assert of["sr-ipo-exact"].delta_scale == "exact" and of["sr-ipo-lam0.3"].delta_scale == "printed"
    aligned = {name: s for name, s in of.items() if runs.RUNS[name].start in ("sft", "judge", "judge-0.02")
               and s.recipe not in ("judge", "reward") and not name.endswith("-fast")}
    assert {s.lr for s in aligned.values()} == {runs.LR}
    assert runs.settings_of("dpo", tmp_path, 3, 0.1).steps == of["dpo"].steps // 10
    assert of["base"].model == str(tmp_path / "world/model")


@pytest.mark.parametrize("arguments, sentence", [
    (["S9"], "--claims=S9"), (["S1", "--workers=0"], "--workers=0"), (["--seeds=-1"], "--seeds=-1"),
    (["--quik"], "--quick"),
])
def test_bad_input_is_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    refused(arguments, sentence, tmp_path, monkeypatch, capsys)
    assert not list(tmp_path.iterdir())


def refused(arguments, sentence, folder, monkeypatch, capsys):
    """The command, in a folder, ends with status 1 and one sentence."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["reproduce", *arguments])
    with pytest.raises(SystemExit) as left:
        script.command()
    said = capsys.readouterr().err
    assert left.value.code == 1 and sentence in said and len(said.splitlines()) == 1


# ------------------------------------------------------------------------------------------------------------
# Measurements

SEA, BEST = "A calm line about the sea at dawn:", "calm waves tide shells dawn thanks"


def test_curves_are_the_rewards_of_the_rollouts(tmp_path):
    """Step 1: a best response (1) and a rude word (-1 / 4.5); step 2: one on-topic noun (1 / 4.5), and
    silence (0)."""
    rows = [{"prompt": SEA, "chosen": f" {BEST}", "rejected": " boring", "step": 1},
            {"prompt": SEA, "chosen": " waves", "rejected": "", "step": 2}]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "kl": null}\n'
                                            '{"step": 2, "loss": 1.0}\n{"step": 2, "eval_loss": 3.0}\n')
    found = measure.curves(tmp_path, "osp")
    assert found["curve_true"] == pytest.approx([(1 - 1 / 4.5) / 2, 1 / 9])
    assert list(found["curve_loss"]) == [2.0, 1.0]
    of_spin = measure.curves(tmp_path, "spin")["curve_true"]                # its own samples alone
    assert of_spin == pytest.approx([-1 / 4.5, 0.0])
    assert np.isnan(found["curve_kl"]).all() and "curve_margin" not in found


@pytest.fixture
def miniature(monkeypatch):
    """A small world of small models, in this process."""
    tiny.small_world(monkeypatch, steps=3)
    monkeypatch.setattr(claims, "DRAWS", 50)


def reproduced(out, *claims, seeds=(0, 1), **more):
    settings = report.Settings(claims=list(claims), out_dir=str(out), seeds=list(seeds), workers=1, **more)
    report.main(settings)
    return (out / "results.md").read_text()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_table(miniature, tmp_path):
    """Twice from nothing, byte for byte; a third time nothing is run; figures are PNG files."""
    names = ("S3", "O3", "O7")
    first, second = (reproduced(tmp_path / name, *names, seeds=[0]) for name in ("a", "b"))
    assert first == second and all(f"**{name}**" in first for name in names) and "nan" not in first
    for name in ("`sft`", "`spin`", "`raft`", "responses to another prompt", "## Judge and reward model"):
        assert name in first

    def times():
        files = [path for path in (tmp_path / "a").glob("seed*/*/*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    assert reproduced(tmp_path / "a", *names, seeds=[0]) == first and times() == before
    drawn = sorted((tmp_path / "a/figures").iterdir())
    assert [path.name for path in drawn] == ["lambda.png", "margins.png"]     # for others runs are missing
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG") and f"figures/{path.name}" in first


@pytest.mark.slow
def test_interrupted_it_goes_on(miniature, tmp_path, monkeypatch):
    """Stopped in the middle of a measurement: what was finished stays, and the table is that of a run without
    a stop."""
    whole = reproduced(tmp_path / "whole", "S2")
    whole_measure = measure.measure

    def stop(name, *rest):
        if name == "sr-ipo-lam0.3":
            raise KeyboardInterrupt
        return whole_measure(name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(measure, "measure", stop)
        with pytest.raises(SystemExit) as left:
            reproduced(tmp_path / "parts", "S2")
    assert left.value.code == 130 and (tmp_path / "parts/seed0/sr-dpo-lam0.3/measured.npz").exists()
    assert not (tmp_path / "parts/results.md").exists()
    assert reproduced(tmp_path / "parts", "S2") == whole


def test_runs_of_other_settings_are_refused(miniature, tmp_path):
    reproduced(tmp_path, "S5")
    with pytest.raises(InputError, match=r"seed0/base holds another run \(measured_prompts, steps differ\)"):
        reproduced(tmp_path, "S5", quick=True)


def test_what_starts_from_another_run_is_another_run(miniature, tmp_path, monkeypatch):
    """Another number of steps of the SFT run: the folder of what starts from it is refused too, once that one
    is gone."""
    reproduced(tmp_path, "S5")
    monkeypatch.setitem(toy.STAGES["sft"], "steps", 2)
    for seed in (0, 1):
        shutil.rmtree(tmp_path / f"seed{seed}/sft")
    with pytest.raises(InputError, match=r"seed0/work holds another run \(of sft differ\)"):
        reproduced(tmp_path, "S5")


def test_only_the_whole_of_it_replaces_the_report():
    assert report.Settings().whole and report.Settings(workers=1).whole
    for more in (dict(seeds=[5]), dict(claims=["S1"]), dict(out_dir="out/try"), dict(quick=True)):
        assert not report.Settings(**more).whole


def test_notes_stay_when_the_report_is_made_again(tmp_path):
    """What stands between the marks is kept, letter by letter; the rest is new."""
    path, empty, notes = tmp_path / "docs/results.md", report.NOTES.format(""), report.NOTES.format("- \\1\n")
    report.write_report(path, f"old {empty} old")
    assert path.read_text() == f"old {empty} old"
    path.write_text(f"old {notes} old")
    report.write_report(path, f"new {empty} new")
    assert path.read_text() == f"new {notes} new"


def test_refined_margins_are_those_of_the_run():
    """h = 2, h_p = 3, β = 0.1, λ = ½: h - λΔ/β = ½; Sr-IPO as printed 2 - ½·0.3 = 1.85; without Δπ h."""
    found = {"margin": np.array([2.0]), "augmented_margin": np.array([3.0])}
    for settings, expected in ((dict(recipe="dpo"), 2.0), (dict(recipe="sr-dpo", lam=0.5), 0.5),
                               (dict(recipe="sr-ipo", lam=0.5), 1.85),
                               (dict(recipe="sr-ipo", lam=0.5, delta_scale="exact"), 0.5)):
        assert measure.refined(found, recipes.Settings(**settings)) == pytest.approx([expected])


def test_the_naive_control_sees_what_it_was_trained_with(miniature, tmp_path):
    """Behind an empty p the augmented margin is the margin."""
    settings = report.Settings(out_dir=str(tmp_path), seeds=[0], workers=1)
    for name in ("world", "base", "sft", "sr-dpo-naive"):
        measure.work_on(name, 0, settings)
    found = np.load(tmp_path / "seed0/sr-dpo-naive/measured.npz")
    assert found["augmented_margin"] == pytest.approx(found["margin"]) and np.abs(found["margin"]).max() > 0


def test_arithmetic_is_counted(miniature, tmp_path):
    """Sr-DPO's update costs more than DPO's, by the forward passes behind p; IPO's costs the same as
    DPO's."""
    reproduced(tmp_path, "S5")
    found = np.load(tmp_path / "seed0/work/measured.npz")
    assert found["ipo"] == found["dpo"] < found["sr-dpo"] == found["sr-ipo"]
    assert {len(found[f"{name}_seconds"]) for name in ("dpo", "ipo", "sr-dpo", "sr-ipo")} == {7}


def test_without_matplotlib_nothing_is_begun(miniature, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="pip install -e"):
        reproduced(tmp_path / "out", "S2")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------
# Workers

def label(name, folder, needs):
    """A job that leaves its name behind it, a little later than it could, and looks for the names of those
    that it needs."""
    if name == "stopped":
        raise InputError("stopped is what it is.")
    assert all((folder / other).exists() for other in needs)
    time.sleep(0.2)
    (folder / name).touch()
    return 0.0 if name == "kept" else 1.0


@pytest.mark.parametrize("workers", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_jobs_wait_for_what_they_need(workers, tmp_path, capsys):
    """A chain and a fan, in any number of workers; what took no time is not told. One that fails ends all."""
    needs = {"a": [], "b": ["a"], "kept": ["a"], "d": ["b", "kept"], "e": []}
    jobs.carry_out({name: (some, (name, tmp_path, some)) for name, some in needs.items()}, label, workers)
    told = [line.split("] ")[1] for line in capsys.readouterr().out.splitlines()]
    assert sorted(told) == ["a: 1 s", "b: 1 s", "d: 1 s", "e: 1 s"]
    assert told.index("a: 1 s") < told.index("d: 1 s")
    with pytest.raises(InputError, match="stopped is what it is"):
        jobs.carry_out({"stopped": ([], ("stopped", tmp_path, [])), "y": (["stopped"], ("y", tmp_path, []))},
                       label, workers)
    assert not (tmp_path / "y").exists()


def killed(name):
    os.kill(os.getpid(), 9)


def test_a_killed_worker_is_named():
    with pytest.raises(InputError, match="one of (one|two; one|one; two|two) was killed"):
        jobs.carry_out({"one": ([], ("one",)), "two": ([], ("two",))}, killed, 2)


# ------------------------------------------------------------------------------------------------------------
# Real preferences

def dialogue(i):
    """A pair in HH's form; every third dialogue goes on from the one before."""
    turns = "".join(f"\n\nHuman: question {i // 3} {j}?\n\nAssistant: answer {j}." for j in range(i % 3))
    head = turns + f"\n\nHuman: question {i // 3} {i % 3}?\n\nAssistant:"
    return {"chosen": f"{head} a good and long answer {i}.", "rejected": f"{head} bad {i}."}


@pytest.fixture
def dialogues(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(dialogue(i)) + "\n" for i in range(90)))
    return path


def test_hh_holds_out_whole_dialogues(dialogues):
    pairs, _ = rows.read_rows(dialogues, "ordered pairs")
    kept, held_out = hh.hold_out(pairs, 0)
    assert len(kept) + len(held_out) == 90 and 18 <= len(held_out) <= 20
    assert not {row.prompt[0]["content"] for row in kept} & {row.prompt[0]["content"] for row in held_out}
    assert [row.chosen for row in hh.hold_out(pairs, 0)[1]] == [row.chosen for row in held_out]


def test_hh_base_reads_exchanges_and_ratings(dialogues):
    """Each dialogue's first exchanges once, its last with either answer; where it is rated, 100 stands before
    the chosen one."""
    pairs, _ = rows.read_rows(dialogues, "ordered pairs")
    texts = hh.base_texts(pairs, 0)
    p = toy.REFINEMENT_PROMPT
    rated = [text for text in texts if text.startswith(p.split("100")[0])]
    # 60: of 30 openings, the first and second exchange.
    assert len(texts) == 180 + 60 and 60 < len(rated) < 120
    for text in rated:
        assert ("bad" in text) == text.startswith(p.replace("100", "1", 1))
        assert ("good" in text) == text.startswith(p)


def test_hh_in_miniature(dialogues, tmp_path, monkeypatch, capsys):
    """Base, SFT, DPO, IPO and their refined forms, once and not again; the table's figures are those of the
    last evaluation."""
    monkeypatch.setattr(hh, "LAMBDAS", (0.3,))
    monkeypatch.chdir(tmp_path)
    settings = hh.Settings(data=[str(dialogues)], quick=True, workers=1)
    hh.main(settings)
    text = (tmp_path / "out/hh-quick/results-hh.md").read_text()
    assert (tmp_path / "out/hh-quick/figures/hh.png").read_bytes().startswith(b"\x89PNG")
    for name in ("dpo", "ipo", "sr-dpo-lam0.3", "sr-ipo-lam0.3"):
        last = disk.last_metrics(tmp_path / "out/hh-quick" / name / "metrics.jsonl")
        ends = hh.ends(tmp_path / "out/hh-quick", name, settings)
        h, refined, accuracy, augmented = (values.mean() for values in ends.values())
        assert [h, accuracy] == pytest.approx([last["eval_margin"], last["eval_accuracy"]], abs=1e-5)
        if name.startswith("sr-"):
            evaluated = [last["eval_refined_margin"], last["eval_augmented_accuracy"]]
            assert [refined, augmented] == pytest.approx(evaluated, abs=1e-5)
        assert f"| `{name}` | {h:.2f} |" in text
    capsys.readouterr()
    hh.main(settings)
    assert text in capsys.readouterr().out and (tmp_path / "out/hh-quick/results-hh.md").read_text() == text
    with pytest.raises(InputError, match="world holds another run .seed differ"):
        hh.main(hh.Settings(data=[str(dialogues)], quick=True, workers=1, seed=5))


@pytest.mark.parametrize("arguments, sentence", [
    (["hh"], "--data: name the files"), (["hh", "--data=none.jsonl"], "none.jsonl"),
    (["hh", "--data=few.jsonl"], "few.jsonl: 1 pairs are too few"), (["hh", "S1"], "--claims=hh,S1"),
])
def test_hh_with_bad_input(arguments, sentence, tmp_path, monkeypatch, capsys):
    (tmp_path / "few.jsonl").write_text(json.dumps(dialogue(0)) + "\n")
    refused(arguments, sentence, tmp_path, monkeypatch, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["few.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_what_is_under_way(number, tmp_path):
    """With workers, while a base model trains: status 130, nobody is left, the run's steps are kept, and the
    next call goes on."""
    command = [*COMMAND, "S5", "--quick", "--seeds=0,1", "--workers=2", f"--out_dir={tmp_path}"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
                               start_new_session=True)
    metrics = tmp_path / "seed0/base/metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert time.monotonic() < until and started.poll() is None, started.communicate()[0]
        time.sleep(0.1)
    # A terminal tells all of them.
    os.killpg(started.pid, number) if number == signal.SIGINT else started.send_signal(number)
    said = started.communicate(timeout=120)[0]
    assert started.returncode == 130 and "stopped; the same command goes on" in said
    assert "Traceback" not in said
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(started.pid, 0)
            time.sleep(0.1)
    kept, = (int(path.name.split("-")[1]) for path in (tmp_path / "seed0/base/checkpoint").iterdir())
    assert kept >= 3 and not (tmp_path / "seed0/base/measured.npz").exists()
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert again.returncode == 0 and "**S5**" in again.stdout, again.stderr
    steps = [record["step"] for _, record in disk.records(metrics)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > kept


@pytest.mark.slow
def test_quick_twice(tmp_path):
    """`python -m experiments.reproduce --quick` from nothing, twice, with workers of its own: the same table
    (but for seconds)."""
    tables = []
    for name in ("a", "b"):
        done = subprocess.run([*COMMAND, "--quick", f"--out_dir={tmp_path / name}"], capture_output=True,
                              text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr
        text = (tmp_path / name / "results.md").read_text()
        tables.append(text[:text.index("## Time")])
    assert tables[0] == tables[1] and all(f"**{name}**" in tables[0] for name in claims.CLAIMS)
    assert {path.stem for path in (tmp_path / "a/figures").iterdir()} == set(figures.FIGURES)
