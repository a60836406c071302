"""The figures of a step: sums over micro-batches and ranks, and how they are shown."""
import contextlib
import math
import time

from support.disk import records
from support.health import bad_shares

METRICS = ("loss margin refined_margin accuracy augmented_accuracy kl p p_hat chosen_logp rejected_logp "
           "response_length finished empty identical undecided judge_cut judge_off judge_a_or_b prompt_cut "
           "sample_seconds judge_seconds update_seconds win reward").split()
SHOWN = ("eval_win reward loss margin refined_margin accuracy augmented_accuracy p p_hat kl response_length "
         "eval_reward eval_loss eval_accuracy").split()


class Log:
    """Sums and counts of one step's metrics, per example, over micro-batches and ranks."""

    def __init__(self, ranks, names=METRICS):
        """names: all that any rank may add: one without examples adds nothing, and must know them too."""
        self.ranks, self.names, self.sums, self.counts, self.tokens = ranks, names, {}, {}, 0

    def add(self, name, values, count=None):
        """Values, one per example: a tensor of any shape or a list. Their mean is over `count`, if given."""
        if isinstance(values, list):
            total, number = math.fsum(map(float, values)), len(values)
        else:
            total, number = float(values.detach().cpu().double().sum()), values.numel()
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0) + (number if count is None else count)

    def add_all(self, values):
        for name, some in values.items():
            self.add(name, some)

    def add_verdicts(self, verdicts):
        """What the judge's Verdicts say of the judge."""
        asked = len(verdicts.p)
        self.add("judge_cut", [verdicts.cut], asked)
        self.add("judge_off", [verdicts.not_a_or_b], 2 * asked)
        self.add("judge_a_or_b", [verdicts.a_or_b], 2 * asked)

    def value(self, name, number):
        """A figure of this rank; the mean over the ranks is reported."""
        self.sums[name], self.counts[name] = number, 1

    @contextlib.contextmanager
    def timed(self, name):
        """Seconds spent inside, as a figure of this rank."""
        started = time.perf_counter()
        yield
        self.value(name, time.perf_counter() - started)

    def means(self):
        """{name: mean over the global batch} so far. All ranks call it together."""
        flat = self.ranks.sum([self.sums.get(name, 0.0) for name in self.names] +
                              [self.counts.get(name, 0) for name in self.names])
        return {name: total / count
                for name, total, count in zip(self.names, flat, flat[len(self.names):]) if count}


def rounded(record):
    """Floats with eight digits: enough to compare float32 runs, short to read; JSON knows no infinity."""
    return {name: value if not isinstance(value, float) else
            float(f"{value:.8g}") if math.isfinite(value) else None for name, value in record.items()}


def summary(metrics):
    """Those of a step's figures that are bad, and the few that a person watches. Where the policy is still
    the reference no pair has an order: an accuracy of 0 % would say that all are wrong."""
    unordered = ("accuracy", "augmented_accuracy") if metrics.get("margin") == 0 else ()
    seen = {name: metrics[name] for name in SHOWN if name in metrics and name not in unordered}
    return "  ".join(f"{name} {value:.4g}" for name, value in (bad_shares(metrics) | seen).items())


def learning_rate(settings, step, steps, warmup):
    """Linear warm-up, then constant, linear or cosine to 0; step counts from 0."""
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    shapes = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
    return settings.lr * shapes[settings.lr_schedule]


def is_best(path, name):
    """Whether the last evaluation in a metrics.jsonl has the best `name`, a loss or what should be large."""
    *before, last = [record[name] for _, record in records(path) if name in record]
    sign = -1 if name.endswith("loss") else 1
    return last is not None and all(sign * last > sign * value for value in before if value is not None)


def samples_text(step, context, texts, strengths, pairs):
    """A prompt with its samples, from the best down, and the pairs made of them, for people to read."""
    order = sorted(range(len(texts)), key=lambda i: -strengths[i])
    lines = [f"  {rank}. p(y ≻ ∅) = {strengths[i]:.3f}  {texts[i]!r}" for rank, i in enumerate(order, 1)]
    verdicts = ", ".join(f"p({i + 1} ≻ {j + 1}) = {p:.3f}" for i, j, p in pairs)
    last = f"  pairs: {verdicts}  (as numbered when sampled)\n"
    return "\n".join([f"\nstep {step + 1}: {context!r}", *lines, last])
