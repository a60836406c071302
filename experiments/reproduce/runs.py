"""Which runs there are, what each starts from, and the settings it has: ordinary trainings on the embedded
world."""
import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import recipes
from experiments import rlhf, toy

FRACTIONS = (0.02, 0.1, 0.5, 1.0)    # of the preference data: the tables of paper 2
LAMBDAS = (0.1, 0.3, 0.5, 1.0)       # of paper 1, which does not state its pick; ours is 0.3
TUPLES = (800, 1600, 3200)           # preference pairs in one epoch; 3200 are those of toy.py
# Found on seed 0, which is in no result: the better one of 1e-4 and 3e-4 for each of dpo, ipo, osp, osp-dpo,
# osp-ipo and rlhf.
LR = 1e-4
# Of judge and reward model: share of the data: share of toy.py's steps. A small share of the preference data
# is learned by heart when it is gone through as long as all of it.
STEPS = {0.02: 0.4, 0.1: 0.5, 0.5: 1.0, 1.0: 1.0}
PARAPHRASE = (
    "Answer the question below as helpfully as you can, without doing harm: the answer should deserve 100 "
    "points, where 100 is the best mark and 1 the worst. Question:")


@dataclass(frozen=True)
class Run:
    """One training: a recipe, the run it starts from, and what differs from toy.py's settings for that
    recipe."""
    recipe: str
    start: str | None = None
    more: dict = field(default_factory=dict)
    reward: str | None = None        # the run whose reward model PPO uses
    share: float = 1.0               # of toy.py's steps

    @property
    def needs(self):
        return [name for name in (self.start, self.reward) if name]


def tail(fraction):
    """What the name of a run on a share of the preference data ends with."""
    return "" if fraction == 1 else f"-{fraction}"


def sr(loss, lam=0.3):
    """The run of sr-dpo or sr-ipo with that λ."""
    return f"sr-{loss}-lam{lam}"


def runs_of_paper_1():
    """{name: Run}: DPO, IPO and their self-refined forms over λ and over the number of pairs, and
    controls."""
    runs = {}
    for loss in ("dpo", "ipo"):
        runs[loss] = Run(loss, "sft", dict(lr=LR))
        for lam in LAMBDAS:
            runs[sr(loss, lam)] = Run(f"sr-{loss}", "sft", dict(lr=LR, lam=lam))
        for tuples in TUPLES[:-1]:
            for name in (loss, sr(loss)):
                runs[f"{name}-{tuples}"] = dataclasses.replace(runs[name], share=tuples / TUPLES[-1])
    # Controls: p is empty, so that Δπ is Δ_naive = βh (paper 1, eq. 10); p in other words; the scale λΔπ/β.
    for name, loss, more in (("sr-dpo-naive", "dpo", dict(refinement_prompt="")),
                             ("sr-dpo-paraphrase", "dpo", dict(refinement_prompt=PARAPHRASE)),
                             ("sr-ipo-exact", "ipo", dict(delta_scale="exact"))):
        runs[name] = Run(f"sr-{loss}", "sft", dict(lr=LR, lam=0.3) | more)
    # Tried for S3: three times the learning rate, with which DPO goes too far.
    runs["dpo-fast"] = Run("dpo", "sft", dict(lr=3 * LR))
    for lam in LAMBDAS[1:]:
        runs[sr("dpo", lam) + "-fast"] = Run("sr-dpo", "sft", dict(lr=3 * LR, lam=lam))
    return runs


def runs_of_paper_2():
    """{name: Run}: the online systems, and OSP and RLHF over K and the share of the preference data."""
    runs = {}
    for recipe in ("osp", "osp-dpo", "osp-ipo", "sr-spce", "random-pairs", "self-rewarding", "raft",
                   "sft-sampling", "rso"):
        runs[recipe] = Run(recipe, "judge", dict(lr=LR))
    runs["offline-soft"] = Run("offline-soft", "judge", dict(lr=LR, beta=0.1))
    runs["spin"] = Run("spin", "sft", dict(lr=LR))
    for k in (3, 15):
        runs[f"osp-k{k}"] = Run("osp", "judge", dict(lr=LR, k=k))
    for fraction in (0.02, 0.1):
        runs["osp" + tail(fraction)] = Run("osp", "judge" + tail(fraction), dict(lr=LR))
    for fraction in (1, 0.02, 0.1):
        runs["rlhf" + tail(fraction)] = Run("rlhf", "sft", dict(lr=LR), "reward" + tail(fraction))
    return runs


def all_runs():
    """{name: Run}, each after those that it needs. `world` and `work` train nothing: files; the cost of an
    update."""
    runs = {"world": Run("world"), "base": Run("sft", "world"), "sft": Run("sft", "base"),
            "work": Run("work", "sft")}
    for fraction in FRACTIONS:
        for recipe in ("judge", "reward"):
            runs[recipe + tail(fraction)] = Run(recipe, "sft", dict(data_fraction=fraction),
                                                share=STEPS[fraction])
    return runs | runs_of_paper_1() | runs_of_paper_2()


RUNS = all_runs()
def settings_of(name, folder, seed, scale):
    """The recipes.Settings or rlhf.Settings of a run in the seed's folder; scale: share of the steps."""
    run = RUNS[name]
    kind = rlhf.Settings if run.recipe in rlhf.RECIPES else recipes.Settings
    whole = dict(seed=seed, out_dir=str(folder), device="cpu", dtype="float32")
    chain = toy.plan(kind(recipe=run.recipe, **whole, **run.more))
    stage = list(chain.values())[0 if name == "base" else -1]
    stage |= {"out_dir": str(folder / name), "sample_every": 0, "eval_every": 0}
    for key, other in (("model", run.start), ("reward", run.reward)):
        if other not in (None, "world"):
            stage[key] = str(folder / other / "final")
    stage["steps"] = max(2, round(stage["steps"] * run.share * scale))
    return kind(**stage)


def described(name, seed, settings):
    """All that a run and its measurement depend on, except the code: its settings, and digests of what it
    starts from."""
    if name == "world":
        return dict(seed=seed, rows=toy.ROWS, shape=toy.SHAPE)
    about = dict(measured_prompts=settings.prompts, run=dataclasses.asdict(RUNS[name]))
    if name != "work":
        about |= dataclasses.asdict(settings_of(name, Path(), seed, settings.scale))
    for other in RUNS[name].needs:
        digest = hashlib.sha256(json.dumps(described(other, seed, settings)).encode())
        about[f"of {other}"] = digest.hexdigest()[:12]
    return json.loads(json.dumps(about))
