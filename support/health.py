"""What a run says when it is about to waste an hour: sentences made of a step's figures."""
from support.cli import duration

SKIPS = 5              # updates skipped in a row that end a run
BAD = 0.1              # a share above it is shown in the step line
OFF = 0.9              # with more of its questions off a judge cannot judge,
OFF_STEPS = 5          # and so many such steps in a row end the run
UNFINISHED_STEPS = 3   # in a row without a response that ended, until that is said
PACE_STEPS = 3         # until it is said how long the run will take,
SHORT = 60             # where that is more than so many seconds


def bad_shares(metrics):
    """{name: share} of what should be near 0 (finished: near 1) in a step, and is not."""
    shares = {name: metrics[name] for name in ("judge_off", "judge_cut", "finished", "empty", "identical")
              if name in metrics}
    return {name: share for name, share in shares.items()
            if (1 - share if name == "finished" else share) > BAD}


def opening(settings, weights, rows, steps, dtype, ranks):
    """What a run says first; weights: the policy's parameters, rows, steps: how many."""
    s, weights = settings, list(weights)
    count = sum(weight.numel() for weight in weights)
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    part = f", {trained:,} of them trained" if trained < count else ""
    all_steps = "1 step" if steps == 1 else f"{steps} steps"
    few = f"\nnote: {all_steps}: {rows} rows are less than one batch of {s.batch_size} (--batch_size)"
    return (f"{s.recipe}: {count:,} parameters{part}, {rows:,} rows, {all_steps} of {s.batch_size}, "
            f"{str(dtype)[6:]} on {ranks.size} × {ranks.device}" + few * (rows < s.batch_size))


def no_hope(why_not, checkpoints):
    """Why a run ends after SKIPS updates in a row that were skipped."""
    kept = f" and keeps {checkpoints[-1].name}." if checkpoints else "."
    advice = " A lower --lr or --grad_clip may help." if "finite" in why_not else ""
    return f"{why_not}, for {SKIPS} steps in a row; the run stops{kept}{advice}"


class Health:
    """Looks at a run's steps, one after the other, from its start or from where it goes on."""

    def __init__(self, steps, max_tokens, judge_anyway):
        """steps, max_tokens: the run's; judge_anyway: whether it goes on under any judge."""
        self.steps, self.max_tokens, self.judge_anyway = steps, max_tokens, judge_anyway
        self.seen = self.off = self.unfinished = 0             # steps; the last two: in a row
        self.started = 0.0                                     # after the first step, which is slower
        self.why_stop = None                                   # a sentence: the run must not go on

    def after(self, metrics, now):
        """[sentence] of what a step's metrics, which are the same on all ranks, and the clock tell."""
        self.seen += 1
        self.started = now if self.seen == 1 else self.started
        said = [self.judge(metrics), self.samples(metrics), self.pace(metrics["step"], now)]
        return [f"note: {sentence}" for sentence in said if sentence]

    def judge(self, metrics):
        if "judge_off" not in metrics:                         # in this step nobody was asked
            return ""
        self.off = self.off + 1 if metrics["judge_off"] > OFF else 0
        gives = f"the judge gives A and B {100 * metrics['judge_a_or_b']:.1f} % of its probability"
        if self.off == OFF_STEPS and not self.judge_anyway:
            self.why_stop = (f"{gives}, for {OFF_STEPS} steps in a row: it cannot judge. The run is saved; "
                             f"teach the judge first (--recipe=judge), or go on with --judge_anyway.")
        return (f"{gives}: it cannot judge; teach it first (--recipe=judge)"
                if self.off == self.seen == 1 else "")

    def samples(self, metrics):
        self.unfinished = self.unfinished + 1 if metrics.get("finished") == 0 else 0
        return (f"in {UNFINISHED_STEPS} steps no response has ended within --max_tokens={self.max_tokens}"
                if self.unfinished == UNFINISHED_STEPS else "")

    def pace(self, step, now):
        left = (now - self.started) / max(self.seen - 1, 1) * (self.steps - step)
        return (f"about {duration(left)} to go, evaluations and saves not counted"
                if self.seen == PACE_STEPS and left > SHORT else "")
