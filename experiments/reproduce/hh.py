"""Real preferences: a small model from scratch on the text of HH-RLHF pairs, SFT on the chosen, then paper
1's systems."""
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data
import recipes
import sample
import train
from experiments import toy
from experiments.reproduce import figures, jobs
from experiments.reproduce.measure import margins, refined
from experiments.reproduce.report import DOCS
from experiments.reproduce.runs import LAMBDAS, sr
from experiments.reproduce.tables import table
from support import cli, disk, rows
from support.cli import InputError, setting

PAIRS, TEXTS, HELD_OUT = 6144, 12800, 400         # at most, however large the files are
# Found by trial on dpo alone, with seed 0 and half of the pairs, its held-out ones in view; ipo and all Sr-*
# take dpo's. β, the optimizer, λ and the form of Sr-IPO are the paper's; its learning rate is for a model two
# thousand times larger. One pass over the pairs, like the paper's: in a second one DPO knows them by heart
# (margins of 17), and held-out ones no better.
LENGTHS = dict(max_length=128, max_prompt_length=40)
STAGES = {
    "base":  dict(recipe="sft", steps=400, batch_size=32, lr=3e-3, lr_schedule="cosine", warmup_steps=20,
                  max_length=256),
    "sft":   dict(recipe="sft", steps=96, batch_size=32, lr=5e-4, lr_schedule="cosine",
                  eval_every=24) | LENGTHS,
    "align": dict(batch_size=32, lr=3e-4, warmup_steps=16, eval_every=32) | LENGTHS}
QUICK = dict(steps=4, batch_size=4)


@dataclass
class Settings:
    """Paper 1's figure on real preferences: DPO, IPO, Sr-DPO and Sr-IPO over λ, from a model trained from
    scratch."""
    data: list[str] | None = setting(None, "files of preference pairs, HH-RLHF's for instance")
    out_dir: str | None = setting(None, "the runs; what is finished is kept; default: out/hh, or …-quick")
    seed: int = setting(1, "of everything; settings were found with 0", least=0)
    quick: bool = setting(False, "a few steps of a very small model: shows that it works, no more")
    width: int = setting(128, "of the model", least=32)
    layers: int = setting(4, "of the model", least=1)
    device: str = setting("cpu", "as of train.py")
    workers: int | None = setting(None, "runs side by side; default: one per core", least=1)

    def __post_init__(self):
        cli.check(self)
        if not self.data:
            raise InputError("--data: name the files of preference pairs, comma-separated.")
        if self.width % 32:
            raise InputError(f"--width={self.width}: must be a multiple of 32, the width of a head.")
        self.out_dir = self.out_dir or ("out/hh-quick" if self.quick else "out/hh")


def hold_out(pairs, seed):
    """(training rows, held-out rows) of list[Row], both in a random order: whole groups of dialogues with one
    opening are drawn, so that no prompt, nor the beginning of one, is in both."""
    groups = {}
    for row in pairs:
        opening = row.prompt if isinstance(row.prompt, str) else row.prompt[0]["content"]
        groups.setdefault(opening, []).append(row)
    groups, held_out = list(groups.values()), []
    order = list(np.random.default_rng([seed, 0]).permutation(len(groups)))
    while len(held_out) < min(HELD_OUT, len(pairs) // 5):
        held_out += groups[order.pop()]
    if not order:
        raise InputError("all dialogues begin with the same message; there is no way to hold some out.")
    return [row for i in order for row in groups[i]], held_out


def base_texts(pairs, seed):
    """What the base model reads, in a random order: each exchange of question and answer, the last with
    either answer.

    Half of the last ones are rated out of 100, as reviews on the web would be: the refinement prompt stands
    in front, with 100 for chosen and 1 for rejected. Without them p means nothing to a model that has read so
    little.
    """
    rng, texts = np.random.default_rng([seed, 1]), []
    for row in pairs:
        turns = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
        starts = [i for i, turn in enumerate(turns) if turn["role"] == "user"] or [0]
        exchanges = [rows.hh_text(turns[i:j]) for i, j in zip(starts, starts[1:] + [len(turns)])]
        texts += exchanges[:-1]
        for response, rating in ((row.chosen, "100"), (row.rejected, "1")):
            p = data.REFINEMENT_PROMPT.replace("100", rating, 1) if rng.random() < 0.5 else ""
            texts.append(p + exchanges[-1] + rows.ASSISTANT + response)
    texts = list(dict.fromkeys(texts))             # dialogues share their first exchanges
    return [texts[i] for i in rng.permutation(len(texts))]


def write_world(folder, settings):
    """folder/*.jsonl, the untrained folder/model, and at the end what they were made from, world.json."""
    s = settings
    asked = dict(data=s.data, seed=s.seed, quick=s.quick, width=s.width, layers=s.layers)
    if jobs.is_there(folder / "world.json", asked):
        return
    pairs, reports = rows.read_data(s.data, "ordered pairs", s.seed)
    print(*reports, sep="\n")
    if len(pairs) < 10:
        raise InputError(f"{', '.join(s.data)}: {len(pairs)} pairs are too few to hold some out; "
                         "10 are the least.")
    pairs, held_out = hold_out(pairs, s.seed)
    texts = base_texts(pairs[:TEXTS], s.seed)[:TEXTS]
    folder.mkdir(parents=True, exist_ok=True)
    toy.write_rows(folder / "texts.jsonl", [{"text": text} for text in texts])
    for name, part in (("pairs", pairs[:PAIRS]), ("eval_pairs", held_out)):
        print(f"{name}: {len(part):,} rows")
        toy.write_rows(folder / f"{name}.jsonl",
                       [dict(prompt=row.prompt, chosen=row.chosen, rejected=row.rejected) for row in part])
    width, layers = (32, 1) if s.quick else (s.width, s.layers)
    shape = dict(hidden_size=width, intermediate_size=8 * width // 3, num_attention_heads=width // 32,
                 num_hidden_layers=layers, max_position_embeddings=256, vocab_size=640 if s.quick else 4096)
    toy.write_model(folder / "model", "llama", s.seed, texts[:4000] + [data.REFINEMENT_PROMPT] * 8, shape)
    toy.write_json(folder / "world.json", asked)


def systems():
    """{name: what differs from the aligning stage}."""
    plain = {name: dict(recipe=name) for name in ("dpo", "ipo")}
    return plain | {sr(loss, lam): dict(recipe=f"sr-{loss}", lam=lam)
                    for loss in plain for lam in LAMBDAS}


def settings_of(name, folder, settings):
    """The recipes.Settings of a run in a folder."""
    stage = STAGES.get(name, STAGES["align"]) | systems().get(name, {}) | (QUICK if settings.quick else {})
    world = folder / "world"
    start = {"base": world / "model", "sft": folder / "base" / "final"}.get(name, folder / "sft" / "final")
    files = (dict(data=[str(world / "texts.jsonl")]) if name == "base" else
             dict(data=[str(world / "pairs.jsonl")], eval_data=[str(world / "eval_pairs.jsonl")]))
    return recipes.Settings(**stage, **files, model=str(start), out_dir=str(folder / name),
                            seed=settings.seed, device=settings.device, micro_batch_size=32)


def work_on(name, settings):
    """One run to its end, and h and h_p of what it made on the held-out pairs. Returns the seconds, 0 for
    none."""
    out = Path(settings.out_dir)
    its = settings_of(name, out, settings)

    def make():
        train.Trainer(its).run()
        if name not in systems():
            return {}
        (policy, tokenizer), (reference, _) = (sample.load_model(folder, "float32", its.device)
                                               for folder in (out / name / "final", Path(its.model)))
        pairs, _ = rows.read_rows(out / "world" / "eval_pairs.jsonl", "pairs")
        return margins(policy, reference, tokenizer, pairs, "hh", **LENGTHS)
    return jobs.carry(out / name, dataclasses.asdict(settings_of(name, Path(), settings)), make)


COLUMNS = {"margin": "margin h", "refined_margin": "refined margin", "accuracy": "accuracy",
           "augmented_accuracy": "augmented accuracy"}


REPORT = """\
# Results on real preferences

`python -m experiments.reproduce hh` at commit {commit}, seed {seed}, on {files}: {pairs} held-out pairs,
accuracies in % with ± 95 %. A Llama of {weights:.1f} million parameters (width {config.width},
{config.layers} layers), from scratch; λ is in the systems' names.

{table}

![margins and accuracies over the steps](figures/hh.png)
"""


def ends(out, name, settings):
    """{metric: its values (N,) on the held-out pairs, after the last step}, for COLUMNS."""
    arrays = np.load(out / name / "measured.npz")
    h, augmented = arrays["margin"], arrays["augmented_margin"]
    return dict(zip(COLUMNS, (h, refined(arrays, settings_of(name, out, settings)), h > 0, augmented > 0)))


def report(out, settings):
    """results-hh.md."""
    def percent(values, sign=""):
        return f"{100 * values.mean():{sign}.1f} ± {196 * values.std() / math.sqrt(len(values)):.1f}"
    lines = []
    for name, more in systems().items():
        its, plain = (ends(out, run, settings) for run in (name, more["recipe"].removeprefix("sr-")))
        difference = its["accuracy"].astype(float) - plain["accuracy"]
        lines.append([f"`{name}`", f"{its['margin'].mean():.2f}", f"{its['refined_margin'].mean():.2f}",
                      percent(its["accuracy"]), percent(difference, "+") if more.get("lam") else "",
                      percent(its["augmented_accuracy"])])
    net, _ = sample.load_model(out / "base" / "final", "float32", "cpu")
    return REPORT.format(
        commit=str(cli.read_json(out / "dpo" / "config.json").get("commit"))[:12], seed=settings.seed,
        files=", ".join(Path(file).name for file in settings.data), pairs=len(its["margin"]),
        weights=sum(weight.numel() for weight in net.parameters()) / 1e6, config=net.config,
        table=table(["system", "h", "refined margin", "accuracy", "… less dpo's or ipo's",
                     "augmented accuracy"], lines))


def figure(canvas, out, settings):
    """A row per metric: training and held-out pairs of the dpo family, then of the ipo family.

    dpo and ipo look at no pair behind p while they train: their refined margin is the margin, their augmented
    accuracy a dot after the last step.
    """
    axes = canvas.subplots(len(COLUMNS), 4, sharex=True)
    for name, more in systems().items():
        steps, lam = disk.read_metrics(out / name / "metrics.jsonl"), more.get("lam")
        style = dict(color=figures.COLOURS[LAMBDAS.index(lam)] if lam else "black",
                     label=f"λ = {lam}" if lam else name)
        for row, metric in zip(axes, COLUMNS):
            left, right = row[:2] if "dpo" in name else row[2:]
            key = metric if lam or metric != "refined_margin" else "margin"
            if key in steps[0]:
                smooth = figures.smooth([step[key] for step in steps])
                left.plot([step["step"] for step in steps], smooth, **style)
                known = {step["step"]: step[f"eval_{key}"] for step in steps if f"eval_{key}" in step}
                right.plot(list(known), list(known.values()), ".-", **style)
            else:
                right.plot(steps[-1]["step"], ends(out, name, settings)[metric].mean(), "o", **style)
    for row, title in zip(axes, COLUMNS.values()):
        row[0].set_ylabel(title)
        for axis in row if "accuracy" in title else []:
            axis.axhline(0.5, color="grey", linewidth=0.8)
    titles = [f"{loss}, {pairs}" for loss in ("DPO", "IPO") for pairs in ("training", "held out")]
    for top, bottom, title in zip(axes[0], axes[-1], titles):
        top.set_title(title)
        top.legend(fontsize=7)
        bottom.set_xlabel("step")


def main(settings):
    """All of it: the files, the runs, results-hh.md and figures/hh.png."""
    out, names = Path(settings.out_dir), list(systems())
    figures.drawing()
    write_world(out / "world", settings)
    needs = {"base": [], "sft": ["base"]} | {name: ["sft"] for name in names}
    jobs.carry_out({name: (some, (name, settings)) for name, some in needs.items()}, work_on,
                   jobs.cores(settings.workers))
    whole = settings == Settings(data=settings.data, device=settings.device, workers=settings.workers)
    place = DOCS if whole else out
    figures.draw(place / "figures" / "hh.png", (15, 11), figure, out, settings)
    text = report(out, settings)
    (place / "results-hh.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {place / 'results-hh.md'}")
