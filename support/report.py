"""A page for every run: out_dir/report.html, one file without scripts, fonts or pictures from elsewhere.

    python -m support.report out/osp                   writes out/osp/report.html again
    python -m support.report out/osp out/dpo           several runs in the same figures: compare.html

It is made from files of out_dir alone:

    config.json      the settings, the command line, versions
    metrics.jsonl    a line per step, and one per evaluation
    groups.jsonl     online, of some steps: a prompt, its K answers with their strengths, and their pairs
    answers.jsonl    the same few prompts answered at the start, at evaluations and at the end

The embedded world writes one page for its whole chain, and hands over prompts answered by every stage.
"""
import base64
import difflib
import hashlib
import html
import json
import math
import re
import sys
from pathlib import Path

from support import cli, disk
from support.cli import InputError
from support.report_style import SCRIPT, STYLE

LONGEST = 700          # characters of a text that are shown
GROUPS = 40            # steps of which the page shows a group, evenly spread
CURVES = (             # title, names in metrics.jsonl; eval_<name> is drawn beside each
    ("True reward", "reward"),
    ("Wins over the start's answers, by the judge", "win"),
    ("Loss", "loss"),
    ("Margin h, nats", "margin refined_margin"),
    ("Accuracy: pairs ordered as labelled", "accuracy augmented_accuracy"),
    ("Strength p, and the policy's own p̂", "p p_hat"),
    ("KL from the reference, nats per response", "kl"),
    ("Length of responses, tokens", "response_length"),
    ("Log-probability of a response, nats", "chosen_logp rejected_logp"),
    ("Shares of what went wrong", "judge_off judge_cut empty identical undecided"),
    ("Share of responses that ended", "finished"),
    ("Gradient norm", "grad_norm"),
    ("Tokens per second", "tokens_per_second"))
HEADLINE = ("win", "reward", "accuracy", "kl", "response_length", "loss")
LEGEND = "Green words earn reward and red ones cost some; the number is the true reward, at most 1."
WORDS = {"win": "wins over the start", "reward": "true reward", "kl": "KL from the reference",
         "response_length": "tokens per response"}


# ------------------------------------------------------------------------------------------------------------
# Files

class Run:
    """What one out_dir holds."""

    def __init__(self, folder):
        folder = Path(folder)
        if not (folder / "config.json").exists():
            raise InputError(f"{folder} holds no run: there is no config.json.")
        self.folder, self.name = folder, folder.name
        self.about = cli.read_json(folder / "config.json")
        self.config = self.about.get("settings", {})
        self.metrics = disk.read_metrics(folder / "metrics.jsonl")
        self.groups = [row for _, row in disk.records(folder / "groups.jsonl")]
        self.answers = [row for path in sorted(folder.glob("answers*.jsonl"))
                        for _, row in disk.records(path)]
        self.steps = self.config.get("steps") or 0
        self.step = max((line.get("step", 0) for line in self.metrics), default=0)
        self.finished = (folder / "final").exists()

    def series(self, name):
        """[(step, value)] of one name in metrics.jsonl."""
        return [(line["step"], line[name]) for line in self.metrics
                if isinstance(line.get(name), (int, float)) and math.isfinite(line[name])]


# ------------------------------------------------------------------------------------------------------------
# Pieces of HTML

def clean(text):
    """The text, shortened, without what HTML or UTF-8 does not allow; not escaped yet."""
    text = re.sub("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\ufffd", str(text))
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


def esc(text):
    return html.escape(clean(text), quote=True)


def tag(name, content="", **attributes):
    """An element; its content is HTML already, its attributes are escaped here (class_ stands for class)."""
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value), quote=True)}"'
                      for key, value in attributes.items())
    return f"<{name}{written}>{content}</{name}>"


def table(head, rows, **attributes):
    """Cells are HTML already."""
    cells = "".join(tag("th", cell, scope="col") for cell in head)
    body = "".join(tag("tr", "".join(tag("td", cell) for cell in row)) for row in rows)
    return tag("table", tag("thead", tag("tr", cells)) + tag("tbody", body), **attributes)


def figure(value):
    """A number with three digits, as people write it."""
    if value is None:
        return "–"
    if isinstance(value, float) and value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


# ------------------------------------------------------------------------------------------------------------
# Curves

def ticks(low, high, number=4):
    """Round values between low and high, about as many as asked for."""
    step = 10 ** math.floor(math.log10((high - low) / number))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= number + 0.5)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def smoothed(points):
    """Means over a twentieth of the points, so that a trend shows among the noise of single steps."""
    width = max(len(points) // 20, 1)
    values = [value for _, value in points]
    return [(step, sum(part) / len(part)) for i, (step, _) in enumerate(points)
            for part in [values[max(i - width, 0):i + width + 1]]]


def chart(title, lines):
    """A curve with axes, and its numbers as a table; lines: {label: [(step, value)]}."""
    width, height, left, bottom, top = 340, 180, 46, 24, 8
    steps = [step for points in lines.values() for step, _ in points]
    values = [value for points in lines.values() for _, value in points]
    first, last, low, high = min(steps), max(max(steps), min(steps) + 1), min(values), max(values)
    if high - low < 1e-9 * max(abs(high), 1e-3):
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1

    def x(step):
        return left + (step - first) / (last - first) * (width - left - 8)

    def y(value):
        return top + (high - value) / (high - low) * (height - top - bottom)

    def path(points):
        return "M" + "L".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    parts, marks = [], ticks(low, high)
    digits = max(-math.floor(math.log10(marks[1] - marks[0])), 0) if len(marks) > 1 else 3
    for value in marks:
        text = f"{value:,.{digits}f}" if digits < 6 else f"{value:.1e}"
        parts.append(f'<path class="grid" d="M{left},{y(value):.1f}H{width - 8}"/>' + tag(
            "text", text, x=left - 5, y=f"{y(value) + 3:.1f}", text_anchor="end"))
    for step in sorted({int(step) for step in ticks(first, last)} | {first}):
        parts.append(tag("text", f"{step:,.0f}", x=f"{x(step):.1f}", y=height - 8, text_anchor="middle"))
    keys = []
    for number, (label, points) in enumerate(lines.items()):
        colour = f"c{number % 6}"
        if len(points) > 40:
            parts.append(tag("path", d=path(points), class_=f"line faint {colour}"))
            points = smoothed(points)
        parts.append(tag("path", d=path(points), class_=f"line {colour}"))
        if len(points) <= 12:
            parts += [tag("circle", cx=f"{x(step):.1f}", cy=f"{y(value):.1f}", r=2.5, class_=f"dot {colour}")
                      for step, value in points]
        keys.append(tag("span", esc(label), class_=f"key {colour}"))
    drawn = tag("svg", "".join(parts), viewBox=f"0 0 {width} {height}", role="img", aria_label=title)
    return tag("figure", tag("figcaption", esc(title)) + drawn + tag("p", " ".join(keys), class_="keys") +
               numbers(lines))


def numbers(lines):
    """The values behind a curve as a table, at most some thirty of them."""
    values = {label: dict(points) for label, points in lines.items()}
    steps = sorted({step for points in values.values() for step in points})
    steps = steps[::max(len(steps) // 30, 1)] + steps[-1:]
    rows = [[f"{step:,}", *(figure(points.get(step)) for points in values.values())]
            for step in dict.fromkeys(steps)]
    head = ["step", *map(esc, values)]
    return tag("details", tag("summary", "numbers") + table(head, rows))


def curves(runs):
    """Figures of all that the runs measured; one run: a colour per name; several: one per run and name."""
    found = []
    for title, names in CURVES:
        lines = {}
        for run in runs:
            before = f"{run.name}: " if len(runs) > 1 else ""
            for name in names.split():
                measured = name if name in ("win", "reward") else f"{name}, held out"
                for key, words in ((name, name), (f"eval_{name}", measured)):
                    points = run.series(key)
                    if any(value for _, value in points):
                        lines[before + words.replace("_", " ")] = points
        if lines:
            found.append(chart(title, lines))
    return tag("div", "".join(found), class_="charts") if found else tag("p", "No step was measured yet.")


# ------------------------------------------------------------------------------------------------------------
# Sections

def change(run, name):
    """(figure at the start, at the end): of evaluations the first and last, of steps means over a tenth."""
    held_out = run.series(f"eval_{name}")
    if len(held_out) > 1:
        return held_out[0][1], held_out[-1][1]
    points = run.series(name) or held_out
    if name == "accuracy" and len(points) > 1:         # before the first update all margins are 0
        points = points[1:]
    values = [value for _, value in points]
    if not values:
        return None
    n = max(len(values) // 10, 1)
    return sum(values[:n]) / n, sum(values[-n:]) / n


def head(run, note):
    """What was trained on what, and what changed."""
    config, tiles = run.config, []
    for name in HEADLINE:
        both = change(run, name)
        if both:
            asked = len({row["place"] for row in run.answers})
            of = f", {asked} prompts" if name in ("win", "reward") and asked else ""
            tiles.append(tag("div", tag("b", f"{figure(both[0])} → {figure(both[1])}") +
                             tag("span", WORDS.get(name, name) + of), class_="tile"))
    data = config.get("data") or config.get("prompts") or []
    facts = [f"{config.get('recipe')} of {config.get('model')}",
             f"on {', '.join(config.get('prompts') or data)}" if data else "",
             f"step {run.step:,} of {run.steps:,}",
             "" if run.finished else note]
    return tag("p", esc(" · ".join(filter(None, facts)))) + tag("div", "".join(tiles), class_="tiles")


def words(answer):
    """The text of an answer; where the world knows what each word is worth, that too."""
    marks = answer.get("marks")
    if not marks:
        return tag("bdi", esc(answer.get("text", "")), class_="text")
    spans = [tag("span", esc(word), class_="plus" if value > 0 else "minus" if value < 0 else "",
                 title=f"{value:+.2f}") for word, value in marks]
    return tag("bdi", " ".join(spans), class_="text")


ROW = 46               # pixels of an answer in the picture of a group


def group_picture(group):
    """Algorithm 1 on one prompt: its answers from best to worst, arcs between those that make a pair."""
    answers, pairs = group["answers"], group["pairs"]
    order = sorted(range(len(answers)), key=lambda i: -answers[i]["strength"])
    middle = {i: ROW * rank + ROW / 2 for rank, i in enumerate(order)}
    arcs = []
    for number, pair in enumerate(pairs):
        a, b = middle[pair["first"]], middle[pair["second"]]
        bend = 64 - min(abs(a - b) / ROW, 12) * 4.5
        arcs.append(tag("path", d=f"M74,{a:.0f}C{bend:.0f},{a:.0f} {bend:.0f},{b:.0f} 74,{b:.0f}",
                        class_=f"line c{number % 6}"))
    drawn = tag("svg", "".join(arcs), width=78, height=ROW * len(answers), aria_hidden="true")
    lines = []
    for rank, i in enumerate(order, 1):
        answer = answers[i]
        bar = tag("i", "", style=f"width:{100 * min(max(answer['strength'], 0), 1):.0f}%")
        notes = [f"reward {figure(answer['reward'])}"] if "reward" in answer else []
        notes += [] if answer.get("finished", True) else ["did not end"]
        lines.append(tag("div", tag("b", f"{rank}") + tag("span", bar, class_="bar") +
                         tag("span", f"{answer['strength']:.2f}", class_="p") +
                         tag("div", words(answer) + tag("small", " · ".join(notes)), class_="answer",
                             title=clean(answer.get("text", ""))), class_="row"))
    return tag("div", drawn + tag("div", "".join(lines), class_="rows"), class_="group")


def group_section(group):
    """One step's group with its pairs in figures."""
    answers = group["answers"]
    place = {i: rank for rank, i in enumerate(
        sorted(range(len(answers)), key=lambda i: -answers[i]["strength"]), 1)}
    rows = []
    for pair in group["pairs"]:
        moved = " → ".join(figure(pair.get(name)) for name in ("margin", "margin_after"))
        gap = known_gap(group, pair)
        truth = "–" if gap is None else f"{gap:+.2f}"
        rows.append([f"{place[pair['first']]} ≻ {place[pair['second']]}", f"{pair['p']:.3f}",
                     f"{pair['at_a']:.3f}", f"{1 - pair['at_b']:.3f}", moved, truth])
    head = ["pair", "p", "asked first at A", "first at B", "margin h, before → after the update",
            "true gap"]
    asked = tag("p", f"Step {group['step']:,}. " + tag("bdi", esc(group["prompt"]), class_="text"))
    return tag("section", asked + group_picture(group) + table(head, rows), class_="step",
               data_step=group["step"])


def algorithm(run):
    """Sample, rank, pair, ask, update: a slider over the steps."""
    groups = run.groups
    if not groups:
        return ""
    if len(groups) > GROUPS:
        groups = [groups[i * (len(groups) - 1) // (GROUPS - 1)] for i in range(GROUPS)]
    slider = tag("label", "step <output></output> <input type=range min=0 step=1 value=0 "
                 f"max={len(groups) - 1}>", class_="slider")
    text = ("One prompt of a step. Its answers stand in the order of p(y ≻ ∅ | x), the judge's strength of "
            "each against no answer at all. The best is paired with the worst, the second best with the "
            "second worst (arcs). Each pair is asked about in both orders; p is their mean. The update moves "
            "the policy's margin h towards it.")
    return (tag("h2", "How pairs were made") + tag("p", text) + slider +
            "".join(map(group_section, groups)))


def marked_changes(old, new):
    """HTML of the new text, with the words that the old one does not have in the same order marked."""
    before, after = clean(old).split(), clean(new).split()
    parts = []
    for kind, _, _, start, stop in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if start < stop:
            text = html.escape(" ".join(after[start:stop]), quote=True)
            parts.append(text if kind == "equal" else tag("mark", text))
    return tag("bdi", " ".join(parts), class_="text")


def before_and_after(run):
    """The same prompts answered by the start and by the newest weights, with the same random numbers."""
    steps = sorted({line["step"] for line in run.answers})
    if not steps:
        return ""
    found = {(line["step"], line["place"]): line for line in run.answers}
    rows, first, last = [], steps[0], steps[-1]
    for place in sorted({line["place"] for line in run.answers}):
        old, new = found.get((first, place)), found.get((last, place))
        if old is None or new is None:
            continue
        worth = [f"{figure(one['reward'])}" if "reward" in one else "" for one in (old, new)]
        asked = tag("bdi", esc(old["prompt"]), class_="text")
        after = words(new) if "marks" in new else marked_changes(old["text"], new["text"])
        cells = [asked, words(old) + tag("small", worth[0]), after + tag("small", worth[1])]
        rows.append(cells + ([f"{new['win']:.2f}"] if "win" in new else []))
    kind = "held-out prompts" if all(line.get("held_out") for line in run.answers) else \
        "prompts of the training data, for there are no held-out ones"
    judged = ["p(new ≻ old)"] if any("win" in line for line in run.answers) else []
    head = ["prompt", f"step {first:,}", f"step {last:,}, changes marked", *judged]
    legend = f" {LEGEND}" if any("marks" in line for line in run.answers) else ""
    return (tag("h2", "Before and after") +
            tag("p", f"The same {kind}, answered with the same random numbers.{legend}") +
            table(head, rows, class_="answers" if judged else "stages"))


def stages_section(rows):
    """The same prompts answered by the model of every stage of a chain."""
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    found = {(row["stage"], row["place"]): row for row in rows}
    lines = []
    for place in sorted({row["place"] for row in rows}):
        answers = [found[stage, place] for stage in stages]
        lines.append([tag("bdi", esc(answers[0]["prompt"]), class_="text")] + [
            words(one) + tag("small", f"reward {figure(one['reward'])}") for one in answers])
    text = f"The same held-out prompts, answered by the model of each stage. {LEGEND}"
    return tag("h2", "What each stage answers") + tag("p", text) + table(
        ["prompt", *map(esc, stages)], lines, class_="stages")


def judge_section(run):
    """What the judge's own answers say of it; with a known truth, whether its p can be believed."""
    asked = [(group, pair) for group in run.groups for pair in group["pairs"]]
    if not asked:
        return ""
    lengths = [[len(group["answers"][pair[side]]["text"]) for side in ("first", "second")]
               for group, pair in asked]
    longer = [(pair["p"] > 0.5) == (a > b) for (_, pair), (a, b) in zip(asked, lengths)
              if a != b and pair["p"] != 0.5]
    flips = [(pair["at_a"] > 0.5) == (pair["at_b"] > 0.5) for _, pair in asked]
    slot = [value > 0.5 for _, pair in asked for value in (pair["at_a"], pair["at_b"])]
    facts = [["pairs asked about, in both orders", f"{len(asked):,}"],
             ["the first slot, A, is preferred", share(slot)],
             ["the two orders disagree", share(flips)], ["the longer answer is preferred", share(longer)]]
    truth = [(pair["p"], gap > 0) for group, pair in asked
             for gap in [known_gap(group, pair)] if gap]
    if truth:
        facts.append(["right, where the truth is known", share([(p > 0.5) == better for p, better in truth])])
    return (tag("h2", "The judge") + table(["on the pairs shown above and between them", ""], facts) +
            (reliability(truth) if len(truth) >= 20 else ""))


def known_gap(group, pair):
    rewards = [group["answers"][pair[side]].get("reward") for side in ("first", "second")]
    return None if None in rewards else rewards[0] - rewards[1]


def share(values):
    return f"{100 * sum(values) / len(values):.0f} % of {len(values):,}" if values else "–"


def reliability(truth):
    """p in tenths against how often the first answer really was the better one."""
    bins = {}
    for p, better in truth:
        bins.setdefault(min(int(p * 10), 9), []).append((p, better))
    width, points, parts = 220, [], ['<path class="grid" d="M30,190L210,10M30,190H210M30,190V10"/>']
    for _, some in sorted(bins.items()):
        p = sum(p for p, _ in some) / len(some)
        right = sum(better for _, better in some) / len(some)
        points.append([f"{p:.2f}", f"{right:.2f}", f"{len(some):,}"])
        parts.append(tag("circle", cx=f"{30 + 180 * p:.1f}", cy=f"{190 - 180 * right:.1f}", class_="dot c0",
                         r=f"{3 + 5 * math.sqrt(len(some) / len(truth)):.1f}"))
    labels = ((30, 204, "0"), (210, 204, "1"), (120, 204, "p"), (16, 14, "1"))
    parts += [tag("text", text, x=x, y=y, text_anchor="middle") for x, y, text in labels]
    drawn = tag("svg", "".join(parts), viewBox=f"0 0 {width} 212", role="img", class_="small",
                aria_label="reliability of p")
    head = ["mean p", "share in which the first is better", "pairs"]
    return tag("figure", tag("figcaption", "Reliability: p against the truth") + drawn +
               tag("details", tag("summary", "numbers") + table(head, points)), class_="narrow")


def origin(run):
    """What made the run: enough to make it again."""
    about = run.about
    typed = [[esc(key), esc(json.dumps(value, ensure_ascii=False))]
             for key, value in about.get("given", {}).items()]
    made_by = about.get("versions", {}) | {"commit": about.get("commit")}
    versions = ", ".join(f"{name} {value}" for name, value in made_by.items() if value)
    return (tag("h2", "How it was made") + tag("pre", esc(about.get("command", "")), class_="text") +
            (table(["setting that differs from its default", "value"], typed) if typed else "") +
            tag("p", esc(versions)))


# ------------------------------------------------------------------------------------------------------------
# The page

def page(runs, title, note="not finished", stages=()):
    """The whole HTML of some Runs: curves in one place, then what each of them shows. With `stages`, rows of
    answers each with its stage, they are those of a chain, and the last is what it was for."""
    going = [run for run in runs if not run.finished]
    parts = [tag("h1", esc(title))]
    for run in runs[-1:] if stages else runs:
        parts += [tag("h3", esc(run.name)) if len(runs) > 1 else "", head(run, note)]
    if len(runs) == 1:
        run = runs[0]
        parts += [before_and_after(run), algorithm(run), tag("h2", "Curves"), curves(runs),
                  judge_section(run), origin(run)]
    elif stages:
        run = runs[-1]
        parts += [stages_section(stages), algorithm(run), judge_section(run)]
        for stage in reversed(runs):
            parts += [tag("h2", f"Curves: {esc(stage.name)}"), head(stage, note), curves([stage])]
        parts.append(origin(run))
    else:
        parts += [tag("h2", "Curves"), curves(runs)]
        for run in runs:
            inside = before_and_after(run) + algorithm(run) + judge_section(run) + origin(run)
            parts.append(tag("details", tag("summary", esc(run.name)) + inside))
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    refresh = '<meta http-equiv="refresh" content="30">' if going else ""
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">{refresh}'
            f'<meta name="viewport" content="width=device-width"><title>{esc(title)}</title>'
            f"<style>{STYLE}</style></head><body><main>{''.join(parts)}</main>"
            f"<script>{SCRIPT}</script></body></html>\n")


def write(folders, note="not finished", title=None, place=None, stages=()):
    """Write report.html into the run's folder or `place`; of several runs compare.html into the first one's.
    Returns its path."""
    runs = [Run(folder) for folder in folders]
    path = Path(place or runs[0].folder) / ("report.html" if place or len(runs) == 1 else "compare.html")
    disk.write_file(path, page(runs, title or ", ".join(run.name for run in runs), note, stages))
    return path


def main():
    try:
        if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
            raise InputError("python -m support.report out/osp [out/other …]: name the folders of runs.")
        print(write(sys.argv[1:]))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
