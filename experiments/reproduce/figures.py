"""The figures of the report: means over the seeds, with ± one standard deviation as a band or whisker."""
from functools import partial

import numpy as np

from experiments.reproduce.claims import BOTH, accuracy
from experiments.reproduce.measure import DOMAINS
from experiments.reproduce.runs import FRACTIONS, LAMBDAS, TUPLES, sr, tail
from support.cli import InputError

COLOURS = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #444444 #999933".split()


def smooth(values, width=9):
    """Means over a window of steps, shorter at the ends: (steps,) -> (steps,)."""
    width = min(width, max(1, len(values) // 4))
    return np.array([np.mean(values[max(0, i - width // 2):i + width // 2 + 1]) for i in range(len(values))])


def deviation(seeds):
    """± of lines or bars (seeds, n); None of a single seed."""
    return seeds.std(0, ddof=1) if len(seeds) > 1 else None


def draw_line(axes, x, seeds, label, colour, **style):
    """The mean over the seeds [(n,)] as a line, and the deviation as a band."""
    mean, around = np.mean(seeds, 0), deviation(np.array(seeds))
    axes.plot(x, mean, label=label, color=colour, **style)
    if around is not None:
        axes.fill_between(x, mean - around, mean + around, color=colour, alpha=0.15, linewidth=0)


def draw_curve(axes, measured, name, key, colour, **style):
    """What a run wrote down at its steps, smoothed."""
    seeds = [m[name]["curve_" + key.removeprefix("relative_")] for m in measured]
    if key.startswith("relative_"):
        seeds = [values / values[0] for values in seeds]
    draw_line(axes, np.arange(1, len(seeds[0]) + 1), [smooth(one) for one in seeds], name, colour, **style)
    axes.set_xlabel("step")


def means(measured, names, key="prompts_reward"):
    """The mean of an array of each run: (seeds, runs)."""
    return np.array([[m[name][key].mean() for name in names] for m in measured])


def draw_start(axes, measured, name):
    """The true reward of the run that others start from, as a dashed line."""
    axes.axhline(means(measured, [name]).mean(), color="grey", linestyle="--", label=f"start: {name}")


def draw_bars(axes, values, names, i=0, of=1, label=None):
    """Means of (seeds, runs) as bars: the i-th of so many beside one another."""
    place, width = (0.4 * i - 0.2, 0.35) if of == 2 else (0.0, 0.7)
    axes.bar(np.arange(len(names)) + place, values.mean(0), width, yerr=deviation(values), color=COLOURS[i],
             capsize=3, label=label)
    turned = dict(rotation=30, ha="right") if len(names) > 3 else {}
    axes.set_xticks(range(len(names)), names, **turned)


def over_steps(figure, measured, names, grid, panels):
    """A curve per run in each of the panels {key: title}; what has no refined margin shows its margin
    there."""
    for axes, (key, title) in zip(figure.subplots(*grid).flat, panels.items()):
        for name, colour in zip(names, COLOURS):
            refines = key != "refined_margin" or "curve_refined_margin" in measured[0][name]
            known = key if refines else "margin"
            if "curve_" + known.removeprefix("relative_") in measured[0][name]:
                draw_curve(axes, measured, name, known, colour)
        axes.set_title(title)
    figure.axes[0].legend(fontsize=7)


def over_x(figure, measured, names, x, lines, start=None, **labels):
    """True rewards against x, a line for each of {label: runs}."""
    axes = figure.subplots()
    for (label, runs), colour in zip(lines.items(), COLOURS):
        draw_line(axes, x, means(measured, runs), label, colour, marker="o")
    if start:
        draw_start(axes, measured, start)
    axes.set(ylabel="true reward", **labels)
    axes.legend()


def ablations(figure, measured, names):
    for axes, (title, runs) in zip(figure.subplots(1, 3, sharey=True), ABLATIONS.items()):
        draw_bars(axes, means(measured, runs), runs)
        draw_start(axes, measured, "judge")
        axes.set_title(title)
    figure.axes[0].set_ylabel("true reward")
    figure.axes[0].legend(fontsize=8)


def data(figure, measured, names):
    left, right = figure.subplots(1, 2)
    shares = [100 * fraction for fraction in FRACTIONS]

    def accuracies(runs, key):
        return [[100 * accuracy(run, key).of(m, slice(None)) for run in runs] for m in measured]
    for i, (says, run, key) in enumerate((("preference model", "judge", "verdict"),
                                          ("reward model", "reward", "reward_margin"))):
        seeds = accuracies([run + tail(fraction) for fraction in FRACTIONS], key)
        draw_line(left, shares, seeds, says, COLOURS[i], marker="o")
    left.axhline(np.mean(accuracies(["sft"], "verdict")), color="grey", linestyle=":",
                 label="preference model, no data")
    left.set(xscale="log", xlabel="share of the pairs, %", ylabel="accuracy, %")
    left.set_xticks(shares, [f"{share:g}" for share in shares])
    left.minorticks_off()
    for i, name in enumerate(("osp", "rlhf")):
        values = means(measured, [name + "-0.02", name + "-0.1", name])
        draw_bars(right, values, ["2 %", "10 %", "100 %"], i, 2, name)
    right.set(ylabel="true reward", xlabel="share of the pairs")
    for axes in (left, right):
        axes.legend(fontsize=8)


def domains(figure, measured, names):
    left, right = figure.subplots(1, 2)
    for i, (domain, says) in enumerate(zip(DOMAINS, ("trained on", "second domain"))):
        draw_bars(left, means(measured, names, f"{domain}_reward"), names, i, 2, says)
        learned = [means(measured, ["rlhf"], f"{domain}_{who}learned") for who in ("sft_", "")]
        draw_bars(right, np.concatenate(learned, 1), ["sft", "rlhf"], i, 2)
    left.set(title="true reward", ylim=(None, 1))
    left.legend(fontsize=8)
    right.set_title("learned reward")


def recipes(figure, measured, names):
    """Loss on the left and what it is for on the right axis of each recipe's panel."""
    grid = list(figure.subplots(5, 4).flat)
    for axes in grid[len(names):]:
        axes.remove()
    for axes, name in zip(grid, names, strict=False):
        draw_curve(axes, measured, name, "loss", COLOURS[0])
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        key = next((key for key in ("true", "accuracy") if f"curve_{key}" in measured[0][name]), None)
        if key:
            other = axes.twinx()
            draw_curve(other, measured, name, key, COLOURS[1], linewidth=2.5 if key == "true" else 1)
            other.tick_params(labelsize=7, colors=COLOURS[1])


ABLATIONS = {"loss": ["osp", "osp-ipo", "osp-dpo", "sr-spce"],
             "pairing": ["osp", "random-pairs", "self-rewarding", "raft", "spin"],
             "sampling": ["osp", "sft-sampling", "rso", "offline-soft"]}
SR = [name for loss in BOTH for name in (loss, sr(loss))]
OVER_LAMBDA = {f"Sr-{loss.upper()}": [loss, *(sr(loss, lam) for lam in LAMBDAS)] for loss in BOTH}
OVER_TUPLES = {name: [*(f"{name}-{n}" for n in TUPLES[:-1]), name] for name in SR}
OVER_K = {"osp": ["osp-k3", "osp", "osp-k15"]}


def each(lines, *more):
    """The runs of {label: runs} and some more, each once."""
    return list(dict.fromkeys([*more, *(name for runs in lines.values() for name in runs)]))


# file: (what draws it, inches, the runs that it is given, what it shows)
FIGURES = {
    "margins": (partial(over_steps, grid=(2, 2), panels={
        "margin": "margin h", "refined_margin": "refined margin (of dpo, ipo: h)", "accuracy": "accuracy",
        "augmented_accuracy": "augmented accuracy"}),
        (9, 6), ["dpo", sr("dpo"), sr("dpo", 1.0), "ipo", sr("ipo"), sr("ipo", 1.0)],
        "Margins and accuracies over the steps (paper 1, Figure 1)"),
    "lambda": (partial(over_x, x=[0, *LAMBDAS], lines=OVER_LAMBDA, xlabel="λ (0: DPO, IPO)"),
               (5, 3.5), each(OVER_LAMBDA), "True reward against λ"),
    "tuples": (partial(over_x, x=TUPLES, lines=OVER_TUPLES, start="sft", xlabel="training tuples, one epoch"),
               (5, 3.5), each(OVER_TUPLES), "True reward against the number of training tuples"),
    "online": (partial(over_steps, grid=(1, 2), panels={
        "relative_loss": "loss / loss at step 1", "true": "true reward of the samples"}),
        (9, 3.5), ["osp", "osp-ipo", "osp-dpo"], "Losses and true rewards online, over the steps"),
    "ablations": (ablations, (10, 4), each(ABLATIONS, "judge"), "Loss, pairing and sampling"),
    "data": (data, (9, 3.5), [run + tail(fraction) for run in ("judge", "reward") for fraction in FRACTIONS] +
             [run + tail(fraction) for run in ("osp", "rlhf") for fraction in (0.02, 0.1, 1.0)],
             "Preference model and reward model against the share of the data, and what is made of them"),
    "k": (partial(over_x, x=[3, 7, 15], lines=OVER_K, start="judge", xlabel="K"),
          (5, 3.5), each(OVER_K, "judge"), "True reward against K"),
    "domains": (domains, (9, 3.5), ["sft", "dpo", "ipo", "rlhf", "osp"],
                "The domain that was trained on, the second one, and what RLHF's reward model says of both"),
    "rlhf": (partial(over_steps, grid=(1, 3), panels={
        "reward": "learned reward", "true": "true reward", "kl": "KL, nats per response"}),
        (10, 3), ["rlhf", "rlhf-0.02"], "PPO over the steps, of samples at temperature 1"),
    "recipes": (recipes, (12, 12), [
        "sft", "judge", *SR, "offline-soft", "osp", "osp-dpo", "osp-ipo", "sr-spce", "random-pairs",
        "self-rewarding", "raft", "spin", "sft-sampling", "rso", "reward", "rlhf"],
        "Each recipe's loss (left, blue) and accuracy or, bold, its samples' true reward (right, orange)")}


def drawing():
    """matplotlib's Figure; asked for before any run, so that an hour's work is not the first to miss it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("figures are drawn with matplotlib, which is not there: "
                         "pip install -e '.[plot]'") from None
    return Figure


def draw(path, inches, draw_into, *arguments):
    """A PNG file of what draw_into(figure, *arguments) puts into a figure."""
    figure = drawing()(inches, layout="constrained")
    draw_into(figure, *arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def draw_figures(folder, measured):
    """PNG files in a folder; returns {file name: what it shows} of the figures whose runs are all there."""
    drawn = {}
    for name, (draw_into, inches, names, says) in FIGURES.items():
        if all(run in measured[0] for run in names):
            draw(folder / f"{name}.png", inches, draw_into, measured, names)
            drawn[f"{name}.png"] = says
    return drawn
