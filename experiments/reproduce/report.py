"""The claims on the embedded world from end to end: the runs that they need, then results.md with tables and
figures."""
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.reproduce import figures, jobs
from experiments.reproduce.claims import CLAIMS, DRAWS
from experiments.reproduce.measure import work_on
from experiments.reproduce.runs import FRACTIONS, RUNS, tail
from experiments.reproduce.tables import (
    claim_rows,
    judge_rows,
    landmark_rows,
    margin_rows,
    over_seeds,
    reward_rows,
    system_rows,
    table,
    work_rows,
)
from support import checkpoint, cli
from support.cli import setting

DOCS = Path(__file__).parents[2] / "docs"


@dataclass
class Settings:
    """Try the claims of both papers on the embedded world, or (hh) draw paper 1's figure on real
    preferences."""
    claims: list[str] | None = setting(None, "S1 … S6, O1 … O8; also typed without --claims; default: all",
                                       choices=tuple(CLAIMS))
    out_dir: str | None = setting(None, "the runs; what is finished is kept; default: out/reproduce…")
    seeds: list[int] | None = setting(None, "worlds with their models; default: 1 to 4, quick: 0", least=0)
    quick: bool = setting(False, "a tenth of the steps, 64 prompts, one seed: shows that all of it works")
    workers: int | None = setting(None, "runs side by side; default: one per core", least=1)

    def __post_init__(self):
        """Fill in what depends on --quick."""
        cli.check(self)
        self.claims = self.claims or list(CLAIMS)
        self.out_dir = self.out_dir or ("out/reproduce-quick" if self.quick else "out/reproduce")
        self.seeds = sorted(set(self.seeds or ([0] if self.quick else [1, 2, 3, 4])))

    @property
    def scale(self):
        return 0.1 if self.quick else 1.0

    @property
    def prompts(self):
        return 64 if self.quick else 512

    @property
    def whole(self):
        """Whether this is what docs/ reports: other seeds, folders or a part of the claims must not replace
        it."""
        return self == Settings(workers=self.workers)

    def names(self):
        """The runs that the claims need, in RUNS' order; with all claims all runs."""
        wanted = set(RUNS if self.claims == list(CLAIMS) else ["sft"])
        wanted.update(*(part.runs for name in self.claims for part in CLAIMS[name].parts))
        for name in reversed(RUNS):
            if name in wanted:
                wanted.update(RUNS[name].needs)
        return [name for name in RUNS if name in wanted]


def load_measured(names, settings):
    """[{run: {name: array}}], one entry per seed."""
    folders = [Path(settings.out_dir) / f"seed{seed}" for seed in settings.seeds]
    return [{name: dict(np.load(folder / name / "measured.npz")) for name in names} for folder in folders]


# What stands between the two marks is written by hand, and kept when the report is made again.
NOTES = "<!-- notes -->\n{}<!-- end of notes -->"
HEADING = """\
# Results

`python -m experiments.reproduce{quick}`, trained at commit {commits}, reported at {commit}: seeds {seeds} of
the embedded world, {prompts} held-out prompts with two samples each (temperature 0.7, top_p 0.9), a Llama of
0.9 M parameters.
"""
QUICK = "\n**A tenth of the steps: this shows that everything works, and says nothing about the papers.**\n"
CLAIMED = """\
The difference that would matter stands beside each part; the interval is a paired bootstrap ({draws} draws)
over seeds and, within each, over prompts or pairs. Rewards are the true ones, from −1 to 1.

Of {claims} claims {holds} hold, {fails} do not, {undecided} are undecided; of {parts} parts {held} hold.
"""
SYSTEMS = """\
For scale: {scale}.

Wins are over `sft`, ties half. The second domain is in no data but the base model's. KL in nats per response.
"""
JUDGES = """\
Accuracy in % on held-out pairs, by the share of the preference data: by the noisy labels, of which the true
reward itself gets {best}, and by the true reward.
"""
FIGURES = """\
Lines and bars are means over the seeds, bands and whiskers ± one standard deviation; curves over steps are of
training batches, smoothed over 9 steps.
"""
TIME = """\
An update over DPO's: multiplications and additions, and seconds (medians of rounds in turn; other runs went
on beside them, so these alone differ from one time to the next).
"""


def heading(measured, settings):
    """What was run, and at which commits."""
    configs = [Path(settings.out_dir) / f"seed{seed}" / name / "config.json"
               for seed in settings.seeds for name in measured[0] if name not in ("world", "work")]
    commits = {str(cli.read_json(path, absent={}).get("commit"))[:12] for path in configs}
    return HEADING.format(quick=" --quick" if settings.quick else "", commits=", ".join(sorted(commits)),
                          commit=str(checkpoint.commit())[:12], seeds=", ".join(map(str, settings.seeds)),
                          prompts=settings.prompts) + (QUICK if settings.quick else "")


def claims_section(measured, settings):
    rows, verdicts, parts = claim_rows(settings.claims, measured)
    holds, fails, undecided = map(list(verdicts.values()).count, ("holds", "does not hold", "cannot tell"))
    says = CLAIMED.format(draws=DRAWS, claims=len(rows), holds=holds, fails=fails, undecided=undecided,
                           parts=len(parts), held=parts.count("holds"))
    here = "here: mean ± deviation over the seeds [95 % interval] · what would matter · verdict"
    return section("Claims", says, ["", "the paper's claim", "its figures", here, "verdict"], rows)


def section(title, says, header, rows):
    """A title, what is said of the table, and the table; nothing where it has no rows."""
    says = says + "\n" if says else ""
    return f"## {title}\n\n{says}{table(header, rows)}\n" if rows else ""


def report(measured, settings, drawn):
    """results.md: a pure function of the measurements, but for the commit and the seconds that it names."""
    scale = "; ".join(f"{says} {value}" for says, value in landmark_rows(measured))
    best = over_seeds([100 * (m["sft"]["gap"] > 0).mean() for m in measured], "{:.1f}")
    judged = all(run + tail(fraction) in measured[0] for run in ("judge", "reward") for fraction in FRACTIONS)
    return "\n".join(filter(None, [
        heading(measured, settings), claims_section(measured, settings), NOTES.format("") + "\n",
        section("Systems", SYSTEMS.format(scale=scale), [
            "run", "true reward", "wins, %", "second domain", "tokens", "KL to its start"],
            system_rows(measured)),
        section("Judge and reward model", JUDGES.format(best=best), [
            "data, %", "judge: labels", "true reward", "reward model: labels", "true reward"],
            judge_rows(measured) if judged else []),
        section("Margins on held-out pairs", "", [
            "run", "h", "refined", "accuracy, %", "augmented accuracy, %", "Pearson", "Spearman", "Kendall"],
            margin_rows(measured)),
        section("PPO", "", [
            "run", "domain", "learned reward: sft", "after PPO", "true reward: sft", "after PPO"],
            reward_rows(measured)),
        f"## Figures\n\n{FIGURES}" if drawn else "",
        *(f"**{says}.**\n\n![{says}](figures/{name})\n" for name, says in drawn.items()),
        section("Time", TIME, ["", "arithmetic", "seconds"],
                work_rows(measured) if "work" in measured[0] else [])]))


def write_report(path, text):
    """The file, with the notes that somebody wrote into it."""
    notes = re.compile(NOTES.format("(.*?)"), re.DOTALL)
    old = notes.search(path.read_text(encoding="utf-8")) if path.exists() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(notes.sub(lambda _: old[0], text) if old else text, encoding="utf-8")


def main(settings):
    """Run what the claims need and is not there yet, measure it, and write the report."""
    started, out, workers = time.time(), Path(settings.out_dir), jobs.cores(settings.workers)
    figures.drawing()
    names = settings.names()
    seconds = 35 * settings.scale * len(settings.seeds) * len(names) / workers      # of a quiet core
    print(f"{', '.join(settings.claims)}: {len(names)} runs for each of {len(settings.seeds)} seeds, "
          f"{workers} at a time: about {cli.duration(seconds)}.\n{', '.join(names)}\n"
          f"What is finished in {out} is not run again.\n", flush=True)
    carried = {f"seed {seed}, {name}": ([f"seed {seed}, {other}" for other in RUNS[name].needs],
                                        (name, seed, settings)) for name in names for seed in settings.seeds}
    jobs.carry_out(carried, work_on, workers)
    measured = load_measured(names, settings)
    place = DOCS if settings.whole else out
    text = report(measured, settings, figures.draw_figures(place / "figures", measured))
    write_report(place / "results.md", text)
    print(f"\n{text}\nwritten to {place / 'results.md'}, in {cli.duration(time.time() - started)}")
