"""reproduce.py: verdicts and the bootstrap by hand, the runs that claims ask for, measurements, and the same table twice."""
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

from experiments import reproduce
from experiments import rlhf
import tiny
from experiments import toy
import train
from support.cli import InputError

REPRODUCE = Path(reproduce.__file__)


# ---------------------------------------------------------------------------------------------------------------------
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
    part = reproduce.Part("", None, 0.03, kind)
    assert reproduce.verdict(part, mean, low, high) == expected


def test_a_claim_is_as_good_as_its_worst_part():
    assert reproduce.together(["holds", "holds"]) == "holds"
    assert reproduce.together(["holds", "cannot tell"]) == "cannot tell"
    assert reproduce.together(["cannot tell", "does not hold", "holds"]) == "does not hold"


def rewards(*means, spread=0.0, n=400):
    """Measurements of two runs, a and sft, one entry a seed: a is better by its mean, prompt by prompt."""
    rng = np.random.default_rng(1)
    found = []
    for mean in means:
        hard = rng.normal(size=(n, 1))                          # prompts differ more than the runs do
        found.append({"sft": {"prompts_reward": hard}, "a": {"prompts_reward": hard + mean + spread * rng.normal(size=(n, 1))}})
    return found


def test_bootstrap_is_paired():
    """Prompts of deviation 1 and a constant difference of ¼: the interval is a point; unpaired it would be ± 0.1 wide."""
    result = reproduce.weigh(reproduce.better("a", "sft"), rewards(0.25, 0.25))
    assert result.values == pytest.approx([0.25, 0.25]) and result.low == pytest.approx(0.25) == pytest.approx(result.high)
    assert result.verdict == "holds"


def test_bootstrap_has_the_width_of_theory():
    """One seed, differences of deviation 1 over 400 prompts: ± 1.96 / 20. Two seeds half apart: their spread is in it."""
    result = reproduce.weigh(reproduce.better("a", "sft"), rewards(0.0, spread=1.0))
    assert result.high - result.low == pytest.approx(2 * 1.96 / 20, rel=0.12)
    result = reproduce.weigh(reproduce.better("a", "sft"), rewards(0.0, 0.5))
    assert [result.low, result.high] == pytest.approx([0.25 - 0.25 * 2 ** 0.5, 0.25 + 0.25 * 2 ** 0.5])     # √(n/(n-1)) = √2
    assert result.verdict == "cannot tell"


def test_bootstrap_without_rows_draws_seeds():
    part = reproduce.CLAIMS["S5"].parts[0]
    measured = [{"work": {"dpo": np.array(1.0), "sr-dpo": np.array(1.238 + d)}} for d in (0.0, 0.02)]
    result = reproduce.weigh(part, measured)
    assert [result.low, result.high] == pytest.approx([0.01 - 0.01 * 2 ** 0.5, 0.01 + 0.01 * 2 ** 0.5])
    assert result.values == pytest.approx([0.0, 0.02]) and result.verdict == "holds"
    assert reproduce.weigh(part, measured[:1]).verdict == "cannot tell"                # one seed, no rows: nothing to draw


def test_rank_correlations_by_hand():
    a, b = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 4.0])
    assert reproduce.kendall(a, b) == pytest.approx(4 / 6)               # five pairs in order, one not
    assert np.corrcoef(reproduce.ranks_of(a), reproduce.ranks_of(b))[0, 1] == pytest.approx(0.8)       # 1 - 6·2 / (4·15)
    assert list(reproduce.ranks_of(np.array([5.0, 1.0, 5.0]))) == [2.5, 1.0, 2.5]
    assert reproduce.kendall(np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(2 / np.sqrt(2 * 3))


# ---------------------------------------------------------------------------------------------------------------------
# Runs

def test_every_claim_and_every_recipe_is_there():
    assert list(reproduce.CLAIMS) == [f"S{i}" for i in range(1, 7)] + [f"O{i}" for i in range(1, 9)]
    assert {run.recipe for run in reproduce.RUNS.values()} >= {*train.RECIPES, *rlhf.RECIPES}
    for claim in reproduce.CLAIMS.values():
        assert all(part.runs <= reproduce.RUNS.keys() for part in claim.parts)
    assert {name for *_, names in reproduce.FIGURES.values() for name in names} <= reproduce.RUNS.keys()
    panels = [reproduce.RUNS[name].recipe for name in reproduce.FIGURES["recipes"][2]]
    assert sorted(panels) == sorted([*train.RECIPES, *rlhf.RECIPES])                     # each recipe has its curve, once


def test_what_would_matter_stays_what_it_was():
    """The thresholds, as they stood before the runs: whoever moves one has to move it here too."""
    assert {name: [(part.kind, part.least) for part in claim.parts] for name, claim in reproduce.CLAIMS.items()} == {
        "S1": [("more", 0.05)] * 2 + [("keeps", 0.02)] * 2, "S2": [("alike", 0.03)] * 2,
        "S3": [("more", 0.03), ("more", 0.03), ("more", 0.0)] * 2, "S4": [("more", 0.02)] * 2, "S5": [("alike", 0.1)] * 2,
        "S6": [("more", 0.03)] * 4, "O1": [("more", 0.03)] * 4, "O2": [("keeps", 0.05), ("more", 0.05), ("more", 0.03)],
        "O3": [("more", 0.02)] * 4, "O4": [("more", 0.03)] * 2 + [("more", 0.5), ("more", 0.03)], "O5": [("more", 0.03)] * 3,
        "O6": [("more", 0.03)] * 3 + [("more", 0.01)], "O7": [("more", 0.03)] * 2 + [("more", 0.05)], "O8": [("more", 0.03)] * 3}


def test_a_run_stands_behind_what_it_needs():
    names = list(reproduce.RUNS)
    for name, run in reproduce.RUNS.items():
        assert all(names.index(other) < names.index(name) for other in run.needs)


def test_a_claim_runs_what_it_needs_and_no_more():
    assert reproduce.Settings(claims=["S2"]).names() == ["world", "base", "sft", "sr-dpo-lam0.3", "sr-ipo-lam0.3"]
    assert {"judge-0.02", "reward-0.02"} <= set(reproduce.Settings(claims=["O2"]).names())
    assert reproduce.Settings().names() == list(reproduce.RUNS)


def test_settings_of_runs(tmp_path):
    of = {name: reproduce.settings_of(name, tmp_path, 3, 1.0) for name, run in reproduce.RUNS.items()
          if run.recipe not in ("world", "work")}
    assert of["judge-0.02"].data_fraction == 0.02 and of["judge"].data_fraction == 1.0
    assert of["osp-0.02"].model == str(tmp_path / "judge-0.02/final") and of["osp-0.02"].out_dir == str(tmp_path / "osp-0.02")
    assert of["rlhf-0.02"].reward == str(tmp_path / "reward-0.02/final") and of["rlhf"].model == str(tmp_path / "sft/final")
    assert of["sr-ipo-lam1.0"].lam == 1.0 and of["osp-k3"].k == 3 and {s.seed for s in of.values()} == {3}
    assert of["dpo-800"].steps * of["dpo-800"].batch_size == 800 and of["dpo"].steps * of["dpo"].batch_size == 3200
    assert of["sr-dpo-naive"].refinement_prompt == "" and of["sr-dpo-paraphrase"].refinement_prompt == reproduce.PARAPHRASE
    assert of["sr-ipo-exact"].delta_scale == "exact" and of["sr-ipo-lam0.3"].delta_scale == "printed"
    assert {s.lr for name, s in of.items() if reproduce.RUNS[name].start in ("sft", "judge", "judge-0.02") and s.recipe not in
            ("judge", "reward") and not name.endswith("-fast")} == {reproduce.LR}
    assert reproduce.settings_of("dpo", tmp_path, 3, 0.1).steps == of["dpo"].steps // 10
    assert of["base"].model == str(tmp_path / "world/model")


@pytest.mark.parametrize("arguments, sentence", [
    (["S9"], "S9 is no claim"), (["S1", "--workers=0"], "--workers=0"), (["--seeds=-1"], "--seeds=-1"), (["--quik"], "--quick"),
])
def test_bad_input_is_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    refused(arguments, sentence, tmp_path, monkeypatch, capsys)
    assert not list(tmp_path.iterdir())


def refused(arguments, sentence, folder, monkeypatch, capsys):
    """The command, in a folder, ends with status 1 and one sentence."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    with pytest.raises(SystemExit) as left:
        reproduce.command()
    said = capsys.readouterr().err
    assert left.value.code == 1 and sentence in said and len(said.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Measurements

SEA, BEST = "A calm line about the sea at dawn:", "calm waves tide shells dawn thanks"


def test_curves_are_the_rewards_of_the_rollouts(tmp_path):
    """Step 1: a best response (1) and a rude word (-1 / 4.5); step 2: one on-topic noun (1 / 4.5), and silence (0)."""
    rows = [{"prompt": SEA, "chosen": f" {BEST}", "rejected": " boring", "step": 1},
            {"prompt": SEA, "chosen": " waves", "rejected": "", "step": 2}]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "kl": null}\n{"step": 2, "loss": 1.0}\n')
    found = reproduce.curves(tmp_path, "osp")
    assert found["curve_true"] == pytest.approx([(1 - 1 / 4.5) / 2, 1 / 9]) and list(found["curve_loss"]) == [2.0, 1.0]
    assert reproduce.curves(tmp_path, "spin")["curve_true"] == pytest.approx([-1 / 4.5, 0.0])        # its own samples alone
    assert np.isnan(found["curve_kl"]).all() and "curve_margin" not in found


@pytest.fixture
def miniature(monkeypatch):
    """A small world of small models, in this process."""
    tiny.small_world(monkeypatch, steps=3)
    monkeypatch.setattr(reproduce, "DRAWS", 50)


def reproduced(out, *claims, seeds=(0, 1), **more):
    settings = reproduce.Settings(claims=list(claims), out_dir=str(out), seeds=list(seeds), workers=1, **more)
    reproduce.main(settings)
    return (out / "RESULTS.md").read_text()


def test_the_same_seed_gives_the_same_table(miniature, tmp_path):
    """Twice from nothing, byte for byte; a third time nothing is run; figures are PNG files."""
    claims = ("S3", "O3", "O7")
    first, second = (reproduced(tmp_path / name, *claims, seeds=[0]) for name in ("a", "b"))
    assert first == second and all(f"**{name}**" in first for name in claims) and "nan" not in first
    for name in ("`sft`", "`spin`", "`raft`", "responses to another prompt", "## Judge and reward model"):
        assert name in first
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("seed*/*/*") if path.is_file()}
    assert reproduced(tmp_path / "a", *claims, seeds=[0]) == first
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("seed*/*/*") if path.is_file()}
    drawn = sorted((tmp_path / "a/figures").iterdir())
    assert [path.name for path in drawn] == ["lambda.png", "margins.png"]              # all runs of the others are not there
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG") and f"figures/{path.name}" in first


def test_interrupted_it_goes_on(miniature, tmp_path, monkeypatch):
    """Stopped in the middle of a measurement: what was finished stays, and the table is that of a run without a stop."""
    whole = reproduced(tmp_path / "whole", "S2")
    measure = reproduce.measure

    def stop(name, *rest):
        if name == "sr-ipo-lam0.3":
            raise KeyboardInterrupt
        return measure(name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(reproduce, "measure", stop)
        with pytest.raises(SystemExit) as left:
            reproduced(tmp_path / "parts", "S2")
    assert left.value.code == 130 and (tmp_path / "parts/seed0/sr-dpo-lam0.3/measured.npz").exists()
    assert not (tmp_path / "parts/RESULTS.md").exists()
    assert reproduced(tmp_path / "parts", "S2") == whole


def test_runs_of_other_settings_are_refused(miniature, tmp_path):
    reproduced(tmp_path, "S5")
    with pytest.raises(InputError, match=r"seed0/base holds another run \(measured_prompts, steps differ\)"):
        reproduced(tmp_path, "S5", quick=True)


def test_what_starts_from_another_run_is_another_run(miniature, tmp_path, monkeypatch):
    """Another number of steps of the SFT run: the folder of what starts from it is refused too, once that one is gone."""
    reproduced(tmp_path, "S5")
    monkeypatch.setitem(toy.STAGES["sft"], "steps", 2)
    for seed in (0, 1):
        shutil.rmtree(tmp_path / f"seed{seed}/sft")
    with pytest.raises(InputError, match=r"seed0/work holds another run \(of sft differ\)"):
        reproduced(tmp_path, "S5")


def test_only_the_whole_of_it_replaces_the_report():
    assert reproduce.Settings().whole and reproduce.Settings(workers=1).whole
    for more in (dict(seeds=[5]), dict(claims=["S1"]), dict(out_dir="out/try"), dict(quick=True)):
        assert not reproduce.Settings(**more).whole


def test_refined_margins_are_those_of_the_run():
    """h = 2, h_p = 3, β = 0.1, λ = ½: h - λΔ/β = ½; Sr-IPO as printed 2 - ½·0.3 = 1.85; without Δπ h."""
    found = {"margin": np.array([2.0]), "augmented_margin": np.array([3.0])}
    for settings, expected in ((dict(recipe="dpo"), 2.0), (dict(recipe="sr-dpo", lam=0.5), 0.5),
                               (dict(recipe="sr-ipo", lam=0.5), 1.85), (dict(recipe="sr-ipo", lam=0.5, delta_scale="exact"), 0.5)):
        assert reproduce.refined(found, train.Settings(**settings)) == pytest.approx([expected])


def test_the_naive_control_sees_what_it_was_trained_with(miniature, tmp_path):
    """Behind an empty p the augmented margin is the margin."""
    settings = reproduce.Settings(out_dir=str(tmp_path), seeds=[0], workers=1)
    for name in ("world", "base", "sft", "sr-dpo-naive"):
        reproduce.work_on(name, 0, settings)
    found = np.load(tmp_path / "seed0/sr-dpo-naive/measured.npz")
    assert found["augmented_margin"] == pytest.approx(found["margin"]) and np.abs(found["margin"]).max() > 0


def test_arithmetic_is_counted(miniature, tmp_path):
    """Sr-DPO's update costs more than DPO's, by the forward passes behind p; IPO's costs the same as DPO's."""
    reproduced(tmp_path, "S5")
    found = np.load(tmp_path / "seed0/work/measured.npz")
    assert found["ipo"] == found["dpo"] < found["sr-dpo"] == found["sr-ipo"]
    assert all(len(found[f"{name}_seconds"]) == len(found["dpo_seconds"]) > 2 for name in ("dpo", "ipo", "sr-dpo", "sr-ipo"))


def test_without_matplotlib_nothing_is_begun(miniature, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="pip install -e"):
        reproduced(tmp_path / "out", "S2")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Workers

def label(name, folder, needs):
    """A job that leaves its name behind it, a little later than it could, and looks for the names of those that it needs."""
    if name == "stopped":
        raise InputError("stopped is what it is.")
    assert all((folder / other).exists() for other in needs)
    time.sleep(0.2)
    (folder / name).touch()
    return 0.0 if name == "kept" else 1.0


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_jobs_wait_for_what_they_need(workers, tmp_path, capsys):
    """A chain and a fan, in any number of workers; what took no time is not told. One that fails ends all."""
    needs = {"a": [], "b": ["a"], "kept": ["a"], "d": ["b", "kept"], "e": []}
    reproduce.carry_out({name: (some, (name, tmp_path, some)) for name, some in needs.items()}, label, workers)
    told = [line.split("] ")[1] for line in capsys.readouterr().out.splitlines()]
    assert sorted(told) == ["a: 1 s", "b: 1 s", "d: 1 s", "e: 1 s"] and told.index("a: 1 s") < told.index("d: 1 s")
    with pytest.raises(InputError, match="stopped is what it is"):
        reproduce.carry_out({"stopped": ([], ("stopped", tmp_path, [])), "y": (["stopped"], ("y", tmp_path, []))}, label, workers)
    assert not (tmp_path / "y").exists()


def killed(name):
    os.kill(os.getpid(), 9)


def test_a_killed_worker_is_named():
    with pytest.raises(InputError, match="one of (one|two; one|one; two|two) was killed"):
        reproduce.carry_out({"one": ([], ("one",)), "two": ([], ("two",))}, killed, 2)


# ---------------------------------------------------------------------------------------------------------------------
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
    rows, _ = reproduce.data.read_rows(dialogues, "ordered pairs")
    kept, held_out = reproduce.hold_out(rows, 0)
    assert len(kept) + len(held_out) == 90 and 18 <= len(held_out) <= 20
    assert not {row.prompt[0]["content"] for row in kept} & {row.prompt[0]["content"] for row in held_out}
    assert [row.chosen for row in reproduce.hold_out(rows, 0)[1]] == [row.chosen for row in held_out]


def test_hh_base_reads_exchanges_and_ratings(dialogues):
    """Each dialogue's first exchanges once, its last with either answer; where it is rated, 100 stands before the chosen one."""
    rows, _ = reproduce.data.read_rows(dialogues, "ordered pairs")
    texts = reproduce.base_texts(rows, 0)
    p = reproduce.data.REFINEMENT_PROMPT
    rated = [text for text in texts if text.startswith(p.split("100")[0])]
    assert len(texts) == 180 + 60 and 60 < len(rated) < 120               # of 30 openings, the first and the second exchange
    for text in rated:
        assert ("bad" in text) == text.startswith(p.replace("100", "1", 1)) and ("good" in text) == text.startswith(p)


def test_hh_in_miniature(dialogues, tmp_path, monkeypatch, capsys):
    """Base, SFT, DPO, IPO and their refined forms, once and not again; the table's figures are those of the last evaluation."""
    monkeypatch.setattr(reproduce, "LAMBDAS", (0.3,))
    monkeypatch.chdir(tmp_path)
    settings = reproduce.HHSettings(data=[str(dialogues)], quick=True, workers=1)
    reproduce.hh(settings)
    text = (tmp_path / "out/hh-quick/RESULTS-hh.md").read_text()
    assert (tmp_path / "out/hh-quick/figures/hh.png").read_bytes().startswith(b"\x89PNG")
    for name in ("dpo", "ipo", "sr-dpo-lam0.3", "sr-ipo-lam0.3"):
        last = reproduce.checkpoint.last_record(tmp_path / "out/hh-quick" / name / "metrics.jsonl")
        ends = reproduce.hh_ends(tmp_path / "out/hh-quick", name, settings)
        h, refined, accuracy, augmented = (values.mean() for values in ends.values())
        assert [h, accuracy] == pytest.approx([last["eval_margin"], last["eval_accuracy"]], abs=1e-5)
        if name.startswith("sr-"):
            assert [refined, augmented] == pytest.approx([last["eval_refined_margin"], last["eval_augmented_accuracy"]], abs=1e-5)
        assert f"| `{name}` | {h:.2f} |" in text
    capsys.readouterr()
    reproduce.hh(settings)
    assert text in capsys.readouterr().out and (tmp_path / "out/hh-quick/RESULTS-hh.md").read_text() == text
    with pytest.raises(InputError, match="world holds another run .seed differ"):
        reproduce.hh(reproduce.HHSettings(data=[str(dialogues)], quick=True, workers=1, seed=5))


@pytest.mark.parametrize("arguments, sentence", [
    (["hh"], "--data: name the files"), (["hh", "--data=none.jsonl"], "none.jsonl"),
    (["hh", "--data=few.jsonl"], "few.jsonl: 1 pairs are too few"), (["hh", "S1"], "hh is no claim"),
])
def test_hh_with_bad_input(arguments, sentence, tmp_path, monkeypatch, capsys):
    (tmp_path / "few.jsonl").write_text(json.dumps(dialogue(0)) + "\n")
    refused(arguments, sentence, tmp_path, monkeypatch, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["few.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_what_is_under_way(number, tmp_path):
    """With workers, while a base model trains: status 130, nobody is left, the run's steps are kept, and the next call goes on."""
    command = [sys.executable, REPRODUCE, "S5", "--quick", "--seeds=0,1", "--workers=2", f"--out_dir={tmp_path}"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    metrics = tmp_path / "seed0/base/metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert time.monotonic() < until and started.poll() is None, started.communicate()[0]
        time.sleep(0.1)
    os.killpg(started.pid, number) if number == signal.SIGINT else started.send_signal(number)      # a terminal tells all of them
    said = started.communicate(timeout=120)[0]
    assert started.returncode == 130 and "stopped; the same command goes on" in said and "Traceback" not in said
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(started.pid, 0)
            time.sleep(0.1)
    kept, = (int(path.name.split("-")[1]) for path in (tmp_path / "seed0/base/checkpoint").iterdir())
    assert kept >= 3 and not (tmp_path / "seed0/base/measured.npz").exists()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "**S5**" in again.stdout, again.stderr
    steps = [record["step"] for _, record in reproduce.checkpoint.records(metrics)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > kept


@pytest.mark.slow
def test_quick_twice(tmp_path):
    """`python reproduce.py --quick` from nothing, twice, with workers of its own: the same table (but for seconds)."""
    tables = []
    for name in ("a", "b"):
        done = subprocess.run([sys.executable, REPRODUCE, "--quick", f"--out_dir={tmp_path / name}"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        text = (tmp_path / name / "RESULTS.md").read_text()
        tables.append(text[:text.index("## Time")])
    assert tables[0] == tables[1] and all(f"**{name}**" in tables[0] for name in reproduce.CLAIMS)
    assert {path.stem for path in (tmp_path / "a/figures").iterdir()} == set(reproduce.FIGURES)
