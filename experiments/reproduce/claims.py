"""The claims of both papers, each as a few differences between runs, and how they are weighed.

The difference that would matter stands beside each; it was written down before anything was run.
"""
import math
from dataclasses import dataclass

import numpy as np

from experiments.reproduce.runs import FRACTIONS, LAMBDAS, TUPLES, sr, tail


class Quantity:
    """A number computed from one seed's measurements m = {run: {name: array}} and pick, the rows (prompts or
    pairs) that count; and the names of the runs that it reads."""

    def __init__(self, of, *runs):
        self.of, self.runs = of, frozenset(runs)

    def __sub__(self, other):
        return Quantity(lambda m, pick: self.of(m, pick) - other.of(m, pick), *self.runs, *other.runs)


@dataclass(frozen=True)
class Part:
    """A difference that a claim rests on: what it is, how it comes about, and how large it must be to
    matter."""
    says: str
    quantity: Quantity
    least: float                      # the difference that would matter
    kind: str = "more"                # more: ≥ least; keeps: not below -least; alike: within ± least
    units: tuple | None = ("sft", "prompts_reward")      # (run, array) of the rows drawn again, if any
    form: str = "{:+.3f}"

    @property
    def runs(self):
        return self.quantity.runs | {run for run in (self.units or ())[:1]}


@dataclass(frozen=True)
class Claim:
    name: str
    says: str                         # the paper's claim
    paper: str                        # the paper's figures for it
    parts: tuple


def mean_of(name, key):
    """The mean of an array of a run."""
    return Quantity(lambda m, pick: m[name][key][pick].mean(), name)


def score(name, domain="prompts", what="reward"):
    """The mean true reward of a run's samples (or their learned one)."""
    return mean_of(name, f"{domain}_{what}")


def combined(function, *quantities):
    """function([numbers]) of several quantities."""
    return Quantity(lambda m, pick: function([one.of(m, pick) for one in quantities]),
                    *(run for one in quantities for run in one.runs))


def better(a, b, least=0.03, domain="prompts", **more):
    """That run a scores higher than run b."""
    where = "" if domain == "prompts" else ", second domain"
    difference = score(a, domain) - score(b, domain)
    return Part(f"{a} − {b}{where}", difference, least, units=("sft", f"{domain}_reward"), **more)


def right(values, labels=1.0):
    """Whether the sign of each value is the label's (N,), a value of 0 counting half: (N,)."""
    return (np.sign(values) == labels) + 0.5 * (values == 0)


# From where on the first one of a pair wins.
JUDGED = {"verdict": 0.5, "reward_margin": 0.0, "margin": 0.0, "augmented_margin": 0.0}


def accuracy(name, key):
    """The share of held-out pairs that a run ranks as their noisy labels say."""
    return Quantity(lambda m, pick: right(m[name][key][pick] - JUDGED[key]).mean(), name)


def correlation(name):
    """Pearson's r between the margins h of a run and the gaps of the true reward."""
    return Quantity(lambda m, pick: np.corrcoef(m[name]["margin"][pick], m[name]["gap"][pick])[0, 1], name)


def quarter(name, what, number):
    """The mean of a curve of a run over a quarter of its steps."""
    return Quantity(lambda m, pick: np.array_split(m[name][f"curve_{what}"], 4)[number].mean(), name)


def lower(a, b):
    """By what share of it the mean margin of run b is larger than that of run a."""
    return combined(lambda means: 1 - means[0] / means[1], mean_of(a, "margin"), mean_of(b, "margin"))


def extra_work(a, b):
    """How much more arithmetic an update of recipe a takes than one of recipe b."""
    return Quantity(lambda m, pick: float(m["work"][a] / m["work"][b]) - 1, "work")


def over_lambda(loss):
    """The parts of S3: up from λ = 0, down again at λ = 1, and no λ as bad as 0."""
    first, *middle, last = score(loss), *(score(sr(loss, lam)) for lam in LAMBDAS)
    mean = combined(np.mean, *middle)
    return (Part(f"Sr-{loss.upper()}: λ 0.1 to 0.5 − λ 0", mean - first, 0.03),
            Part("λ 0.1 to 0.5 − λ 1", mean - last, 0.03),
            Part("the worst λ > 0 − λ 0", combined(min, *middle, last) - first, 0.0))


PAIRS = ("sft", "gap")                               # units of what is measured on the 512 held-out pairs
POINTS = dict(units=PAIRS, form="{:+.1%}")
BOTH = ("dpo", "ipo")

PAPER_1 = [
    Claim("S1", "Sr-DPO and Sr-IPO have lower margins at comparable accuracy", "Figure 1", (
        *(Part(f"by how much h of {sr(loss)} is lower than {loss}'s", lower(sr(loss), loss), 0.05, **POINTS)
          for loss in BOTH),
        *(Part(f"accuracy, {sr(loss)} − {loss}", accuracy(sr(loss), "margin") - accuracy(loss, "margin"),
               0.02, "keeps", **POINTS) for loss in BOTH))),
    Claim("S2", "behind p the policy ranks as many pairs right as without it", "Figure 1", tuple(
        Part(f"augmented accuracy − accuracy, {sr(loss)}",
             accuracy(sr(loss), "augmented_margin") - accuracy(sr(loss), "margin"), 0.03, "alike", **POINTS)
        for loss in BOTH)),
    Claim("S3", "the score first rises, then falls with λ, and λ = 0 is worst", "win rate over λ", (
        *over_lambda("dpo"), *over_lambda("ipo"))),
    Claim("S4", "margins of Sr-* follow the true gaps more closely",
          "Pearson .21 → .26 (DPO), .11 → .13 (IPO)", tuple(
              Part(f"Pearson's r, {sr(loss)} − {loss}", correlation(sr(loss)) - correlation(loss), 0.02,
                   units=PAIRS) for loss in BOTH)),
    Claim("S5", "Sr-* cost about a quarter more time", "+23.8 %", tuple(
        Part(f"arithmetic of an update, sr-{loss} over {loss}, beyond +23.8 %",
             extra_work(f"sr-{loss}", loss) - Quantity(lambda m, pick: 0.238), 0.1, "alike", None, "{:+.1%}")
        for loss in BOTH)),
    Claim("S6", "more tuples help Sr-*, while DPO and IPO overfit", "figure", (
        *(better(sr(loss), f"{sr(loss)}-{TUPLES[0]}") for loss in BOTH),
        *(better(f"{loss}-{TUPLES[0]}", loss) for loss in BOTH)))]

PAPER_2 = [
    Claim("O1", "OSP > RLHF > IPO > DPO, SFT",
          "HH: .958 > .932 > .925 > .896, .919; TL;DR: 2.97 > 2.78 > 2.44 > 2.24, 1.93", (
              better("osp", "rlhf"), better("rlhf", "ipo"), better("ipo", "dpo"), better("ipo", "sft"))),
    Claim("O2", "OSP keeps its score with 2 % of the preferences, RLHF does not",
          "HH: OSP .958 → .955, RLHF .932 → .924; TL;DR: 2.97 → 3.01, 2.78 → 1.82", (
              better("osp-0.02", "osp", 0.05, kind="keeps"), better("rlhf", "rlhf-0.02", 0.05),
              better("osp-0.02", "rlhf-0.02"))),
    Claim("O3", "the preference model beats the reward model at every data size",
          "HH at 2, 10, 50, 100 %: 57, 61, 66, 70 against 53, 56, 62, 62", tuple(
              Part(f"accuracy, judge − reward model, {fraction:.0%}",
                   accuracy("judge" + tail(fraction), "verdict") -
                   accuracy("reward" + tail(fraction), "reward_margin"), 0.02, **POINTS)
              for fraction in FRACTIONS)),
    Claim("O4", "OSP carries over to another domain, where RLHF over-optimises its reward model", "figure", (
        better("osp", "sft", domain="advice"), better("osp", "rlhf", domain="advice"),
        Part("learned reward, rlhf − sft, second domain",
             score("rlhf", "advice", "learned") - score("rlhf", "advice", "sft_learned"), 0.5,
             units=("sft", "advice_reward")),
        better("sft", "rlhf", domain="advice"))),
    Claim("O5", "a model that can judge improves itself without preferences, more with larger K, and beats "
          "Self-Rewarding", "figure, Mistral-7B", (
              better("osp", "judge"), better("osp-k15", "osp-k3"), better("osp", "self-rewarding"))),
    Claim("O6", "online, SPCE > IPO > DPO; DPO overfits while its loss still falls", "figure", (
        better("osp", "osp-ipo"), better("osp-ipo", "osp-dpo"),
        *(Part(says, quarter("osp-dpo", what, 1) - quarter("osp-dpo", what, 3), least, units=None)
          for says, what, least in (
              ("osp-dpo, true reward, second quarter of the steps − last", "true", 0.03),
              ("osp-dpo, loss, second quarter − last", "loss", 0.01))))),
    Claim("O7", "ranked > random > RAFT; SPIN pulls towards its data set", "figure", (
        better("osp", "random-pairs"), better("random-pairs", "raft"),
        Part("log π of held-out SFT data, nats per token, spin − sft",
             score("spin", "data", "logprob") - score("sft", "data", "logprob"), 0.05,
             units=("sft", "data_logprob")))),
    Claim("O8", "on-policy > SFT sampling, RSO, offline", "figure", (
        better("osp", "sft-sampling"), better("osp", "rso"), better("osp", "offline-soft")))]

CLAIMS = {claim.name: claim for claim in PAPER_1 + PAPER_2}


@dataclass
class Result:
    values: list                      # the difference, one per seed
    low: float
    high: float
    verdict: str


DRAWS = 1000                                         # of the bootstrap


def weigh(part, measured):
    """A Result: paired bootstrap over seeds, and within each over prompts or pairs; `measured` has one entry
    per seed.

    95 % interval [low, high] of the mean over the seeds. n seeds drawn from n spread too little, by
    √(n/(n-1)): the interval is as much wider. What has no rows but one seed has no interval.
    """
    rng, n = np.random.default_rng(0), len(measured)
    values = np.array([float(part.quantity.of(m, slice(None))) for m in measured])
    again = np.empty(DRAWS)
    for i in range(DRAWS):
        seeds = rng.integers(n, size=n)
        if part.units is None:
            again[i] = values[seeds].mean()
        else:
            run, array = part.units
            sizes = [len(measured[seed][run][array]) for seed in seeds]
            again[i] = np.mean([part.quantity.of(measured[seed], rng.integers(size, size=size))
                                for seed, size in zip(seeds, sizes)])
    mean = values.mean()
    low, high = mean + (np.percentile(again, [2.5, 97.5]) - mean) * math.sqrt(n / max(n - 1, 1))
    if part.units is None and n == 1:
        low, high = -math.inf, math.inf
    return Result(values.tolist(), float(low), float(high), verdict(part, float(mean), low, high))


def verdict(part, mean, low, high):
    """holds, does not hold, or cannot tell.

    more: holds where low > 0 and the mean reaches `least`, does not where high < least. keeps: holds where
    low > -least, does not where high < 0 and the mean is below -least. alike: holds where low and high are
    within ± least, does not where they leave out 0 and the mean is beyond `least`.
    """
    least, is_sure = part.least, low > 0 or high < 0
    holds, fails = {"more": (low > 0 and mean >= least, high < least),
                    "keeps": (low > -least, high < 0 and mean < -least),
                    "alike": (-least < low and high < least, abs(mean) > least and is_sure)}[part.kind]
    return "holds" if holds else "does not hold" if fails else "cannot tell"


def together(verdicts):
    """A claim holds where all its parts do, and does not where one does not."""
    return next((word for word in ("does not hold", "cannot tell") if word in verdicts), "holds")


def ranks_of(values):
    """Places in sorted order, equal ones sharing their mean place: (N,) -> (N,)."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def kendall(a, b):
    """Kendall's τ-b of two arrays (N,)."""
    x, y = np.sign(a[:, None] - a), np.sign(b[:, None] - b)
    return (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())
