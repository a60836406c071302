"""What a run keeps for its page: some prompts' samples and pairs, and the same few prompts answered again.

    groups.jsonl     the first prompt of a step: its K answers, strengths, pairs, margins before and after
    answers.jsonl    a line per prompt of --show_prompts, at the start, at evaluations and at the end
"""
from support.disk import records

GROUPS = 40            # steps of a run, about, of which a group is kept


def unknown(prompt, response):
    """What is known of a response for certain, {"reward": …, "marks": [(word, its worth)]}: here nothing."""
    return {}


class Shown:
    """Writes both files of one run; `truth` is replaced where more is known than `unknown` says."""

    def __init__(self, out, ranks, steps):
        """out: the run's OutDir; steps: how many the run has, or 0 where no group is to be kept."""
        self.out, self.ranks, self.truth, self.every = out, ranks, unknown, steps and max(steps // GROUPS, 1)
        self.group, self.start = [], {}                # rows to write; {place: text} of the start's answers

    def is_due(self, step):
        """Whether a group of this step is kept."""
        return self.every > 0 and step % self.every == 0

    def keep(self, step, prompt, samples, scores, pairs, verdicts, margins):
        """A prompt's K samples and their scores, its pairs [(i, j, p)], what the judge said of these in both
        orders, and their margins before the update: to be written after it."""
        answers = [{"text": one.text, "finished": one.finished, "strength": p} | self.truth(prompt, one.text)
                   for one, p in zip(samples, scores)]
        orders = zip(verdicts.first_at_a.tolist(), verdicts.first_at_b.tolist())
        asked = [{"first": i, "second": j, "p": p, "at_a": a, "at_b": b, "margin": h}
                 for (i, j, p), (a, b), h in zip(pairs, orders, margins)]
        self.group = [{"step": step + 1, "prompt": prompt, "answers": answers, "pairs": asked}]

    def write_group(self, margins):
        """Write what was kept, with the pairs' margins after the update. All ranks call it."""
        for row in self.group:
            for pair, margin in zip(row["pairs"], margins):
                pair["margin_after"] = margin
        self.ranks.on_first(lambda: self.out.append("groups.jsonl", self.group))
        self.group = []

    def first_answers(self):
        """{place: text} of the start's answers, as all ranks of an earlier process wrote them."""
        rows = [row for file in self.out.path.glob("answers*.jsonl") for _, row in records(file)]
        return {row["place"]: row["text"] for row in rows if row["step"] == 0}

    def answers(self, step, asked, prefer):
        """Write this rank's answers, asked: [(place, prompt, Sample, whether the prompt is held out)].

        prefer([(prompt, new, old)]) -> [p]; None where there is no judge. Returns {"win": [p(new over the
        start's answer)], "reward": …}, each where known.
        """
        rows = [{"place": place, "prompt": prompt, "held_out": held_out, "text": one.text,
                 "finished": one.finished} | self.truth(prompt, one.text)
                for place, prompt, one, held_out in asked]
        # At step 0 the files may hold what other ranks have written already.
        own = {row["place"]: row["text"] for row in rows}
        self.start = self.start or (own if step == 0 else self.first_answers() or own)
        if prefer:
            for row, p in zip(rows, prefer([(row["prompt"], row["text"], self.start[row["place"]])
                                            for row in rows])):
                row["win"] = p
        self.out.write_lines("answers", step, rows)
        return {name: [row[name] for row in rows if name in row] for name in ("win", "reward")}
