"""The figures of a step, and how they are shown."""
import math

class Log:
    """Sums and counts of one step's metrics, per example, over micro-batches and ranks."""

    def __init__(self, ranks, names):
        self.ranks, self.names, self.sums, self.counts, self.totals = ranks, names, {}, {}, {}

    def add(self, name, values, weight=None):
        """Per-example values of any shape; their mean is over `weight`, by default their number."""
        weight = values.numel() if weight is None else weight
        self.sums[name] = self.sums.get(name, 0.0) + float(values.detach().cpu().double().sum())
        self.counts[name] = self.counts.get(name, 0) + weight

    def value(self, name, number):
        """A figure of this rank; the mean over the ranks is reported."""
        self.sums[name], self.counts[name] = number, 1

    def count(self, name, number):
        """A total over the ranks: `tokens`, behind means()."""
        self.totals[name] = self.totals.get(name, 0) + number

    def means(self):
        """{name: mean over the global batch} so far; also `tokens`, of the global batch. A rank without examples has added no
        names, so they are all known from the start."""
        flat = self.ranks.sum([self.sums.get(name, 0.0) for name in self.names] +
                              [self.counts.get(name, 0) for name in self.names] + [self.totals.get("tokens", 0)])
        self.tokens = flat[-1]
        return {name: total / count for name, total, count in zip(self.names, flat, flat[len(self.names):]) if count}


METRICS = ("loss margin refined_margin accuracy augmented_accuracy kl p p_hat chosen_logp rejected_logp response_length "
           "finished empty identical undecided judge_cut judge_off prompt_cut "
           "sample_seconds judge_seconds update_seconds").split()


def rounded(value):
    """Floats with eight significant digits: enough to compare float32 runs, short enough to read; null if not finite."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.8g}") if math.isfinite(value) else None       # JSON knows no infinity


def summary(metrics):
    """The few figures of a step that a person watches."""
    shown = ("reward", "loss", "margin", "refined_margin", "accuracy", "augmented_accuracy", "p", "p_hat", "kl",
             "response_length", "eval_reward", "eval_loss", "eval_accuracy")
    return "  ".join(f"{name} {metrics[name]:.4g}" for name in shown if name in metrics)
