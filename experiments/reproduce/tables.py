"""The tables of the report, as rows of text; `measured` is [{run: {name: array}}], one entry per seed."""
from pathlib import Path

import numpy as np

from experiments.reproduce.claims import CLAIMS, JUDGED, kendall, ranks_of, right, together, weigh
from experiments.reproduce.measure import DOMAINS, refined
from experiments.reproduce.runs import FRACTIONS, RUNS, settings_of, tail


def over_seeds(values, form="{:.3f}"):
    """Mean ± standard deviation of one number per seed, as text; the mean alone of a single seed."""
    mean = form.format(np.mean(values))
    return mean if len(values) < 2 else f"{mean} ± {form.replace('+', '').format(np.std(values, ddof=1))}"


def table(header, rows):
    head, *body = (f"| {' | '.join(line)} |" for line in (header, *rows))
    return "\n".join([head, "|" + "---|" * len(header), *body])


def rows_of(measured, names, columns):
    """A row per run: its name, and over the seeds each of the columns [(number, digits)].

    number: an array's name, for its mean; or a function of (a seed's measurements, the run's name).
    """
    def cell(name, number, digits):
        values = [m[name][number].mean() if isinstance(number, str) else number(m, name) for m in measured]
        return over_seeds(values, f"{{:.{digits}f}}")
    return [[f"`{name}`", *(cell(name, *column) for column in columns)] for name in names]


def having(measured, key):
    """The runs that were measured and have that array, in RUNS' order."""
    return [name for name in RUNS if key in measured[0].get(name, {})]


SIGNS = {"more": "≥", "keeps": "> −", "alike": "within ±"}


def claim_rows(names, measured):
    """The rows of the table of claims, {claim: verdict}, and the verdicts of all parts."""
    rows, verdicts, parts = [], {}, []
    for name in names:
        claim, lines = CLAIMS[name], []
        results = [weigh(part, measured) for part in claim.parts]
        said = [result.verdict for result in results]
        verdicts[name] = together(said)
        parts += said
        for part, result in zip(claim.parts, results):
            low, high, least = (part.form.format(value) for value in (result.low, result.high, part.least))
            lines.append(f"{part.says}: {over_seeds(result.values, part.form)} [{low}, {high}] · "
                         f"{SIGNS[part.kind]} {least.lstrip('+')} · {result.verdict}")
        rows.append([f"**{name}**", claim.says, claim.paper, "<br>".join(lines),
                     f"**{verdicts[name]}** ({said.count('holds')} of {len(said)} parts hold)"])
    return rows, verdicts, parts


def system_rows(measured):
    """What each policy writes: true reward, wins over SFT, second domain, length, divergence from its
    start."""
    def wins(m, name):
        return 100 * right(m[name]["prompts_reward"] - m["sft"]["prompts_reward"]).mean()
    rows = rows_of(measured, having(measured, "prompts_reward"), [
        ("prompts_reward", 3), (wins, 1), ("advice_reward", 3), ("prompts_length", 1), ("prompts_kl", 1)])
    # The base model starts from random weights.
    return [row[:-1] + [""] if row[0] == "`base`" else row for row in rows]


def landmark_rows(measured):
    """[(what no model wrote, its true reward)], from the ceiling to the floor."""
    names = {"data": "responses of the SFT data", "astray": "responses to another prompt",
             "random": "six random words"}
    return [("the best response", "1.000"),
            *((says, over_seeds([m["world"][key].mean() for m in measured])) for key, says in names.items()),
            ("the worst", "−1.000")]


def judge_rows(measured):
    """Accuracy of judge and reward model on held-out pairs at each data size: by the noisy labels, by the
    truth."""
    def by_label(m, run, key):
        return 100 * right(m[run][key] - JUDGED[key]).mean()

    def by_truth(m, run, key):
        gap = m[run]["gap"]
        return 100 * right(m[run][key] - JUDGED[key], np.sign(gap))[gap != 0].mean()

    def shares(run, key):
        return [over_seeds([share(m, run, key) for m in measured], "{:.1f}")
                for share in (by_label, by_truth)]
    rows = [[f"{100 * fraction:g}", *shares("judge" + tail(fraction), "verdict"),
             *shares("reward" + tail(fraction), "reward_margin")] for fraction in FRACTIONS]
    return [["0", *shares("sft", "verdict"), "50 (a head of zeros)", ""], *rows]


def margin_rows(measured):
    """Held-out pairs under the systems of paper 1: margins, accuracies, and how they follow the true gaps."""
    def refined_margin(m, name):
        return refined(m[name], settings_of(name, Path(), 0, 1.0)).mean()

    def percent(key):
        return lambda m, name: 100 * right(m[name][key]).mean()

    def follows(correlation):
        return lambda m, name: correlation(m[name]["margin"], m[name]["gap"])

    def pearson(a, b):
        return np.corrcoef(a, b)[0, 1]

    def spearman(a, b):
        return pearson(ranks_of(a), ranks_of(b))
    return rows_of(measured, having(measured, "margin"), [
        ("margin", 2), (refined_margin, 2), (percent("margin"), 1), (percent("augmented_margin"), 1),
        (follows(pearson), 2), (follows(spearman), 2), (follows(kendall), 2)])


def reward_rows(measured):
    """What PPO's own reward model says of samples before and after, in both domains, beside the true
    reward."""
    rows = []
    for name in [name for name in ("rlhf", "rlhf-0.1", "rlhf-0.02") if name in measured[0]]:
        for domain, says in zip(DOMAINS, ("trained on", "second domain")):
            (_, *cells), = rows_of(measured, [name], [
                (f"{domain}_sft_learned", 2), (f"{domain}_learned", 2),
                (lambda m, _, key=f"{domain}_reward": m["sft"][key].mean(), 2), (f"{domain}_reward", 2)])
            rows.append([f"`{name}`", says, *cells])
    return rows


def work_rows(measured):
    """Arithmetic and seconds of an update over DPO's."""
    def arithmetic(m, name):
        return float(m["work"][name] / m["work"]["dpo"])

    def seconds(m, name):
        return float(np.median(m["work"][f"{name}_seconds"]) / np.median(m["work"]["dpo_seconds"]))
    return rows_of(measured, ["dpo", "ipo", "sr-dpo", "sr-ipo"], [(arithmetic, 2), (seconds, 2)])
