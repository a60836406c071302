"""The figures of a step: sums over micro-batches and ranks, and how they are shown."""
import contextlib
import math
import time

METRICS = ("loss margin refined_margin accuracy augmented_accuracy kl p p_hat chosen_logp rejected_logp "
           "response_length finished empty identical undecided judge_cut judge_off prompt_cut "
           "sample_seconds judge_seconds update_seconds").split()
SHOWN = ("reward loss margin refined_margin accuracy augmented_accuracy p p_hat kl response_length "
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
    """The few figures of a step that a person watches."""
    return "  ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics)


def shown(step, context, texts, strengths, pairs):
    """A prompt with its samples, from the best down, and the pairs made of them, for people to read."""
    order = sorted(range(len(texts)), key=lambda i: -strengths[i])
    lines = [f"  {rank}. p(y ≻ ∅) = {strengths[i]:.3f}  {texts[i]!r}" for rank, i in enumerate(order, 1)]
    verdicts = ", ".join(f"p({i + 1} ≻ {j + 1}) = {p:.3f}" for i, j, p in pairs)
    last = f"  pairs: {verdicts}  (as numbered when sampled)\n"
    return "\n".join([f"\nstep {step + 1}: {context!r}", *lines, last])
