"""What a judge's verdicts (judge.Verdicts) say of it, or of two systems."""
import math

import numpy as np
import torch


def report(verdicts, lengths):
    """What a judge's verdicts on pairs (chosen, rejected) say about it; lengths: N pairs of response lengths.

    accuracy: the chosen one wins (p > ½; p = ½ counts half). flip_rate: the two orders disagree.
    first_slot_rate: slot A wins, over both orders. longer_wins: the longer one wins, where lengths differ.
    ece: expected calibration error of max(p, 1 - p), ten bins. cut: share of pairs that were shortened.
    """
    p = verdicts.p.numpy()
    score = (p > 0.5) + 0.5 * (p == 0.5)
    longer = np.sign([a - b for a, b in lengths])
    prefers_longer = np.where(longer > 0, score, 1 - score)[longer != 0]
    confidence, right = np.maximum(p, 1 - p), np.where(p == 0.5, 0.5, p > 0.5)
    bins = np.minimum((confidence - 0.5) * 20, 9.999).astype(int)
    ece = sum(abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean()
              for b in np.unique(bins))
    first = torch.cat((verdicts.first_at_a, verdicts.first_at_b)).numpy()
    return {"n": len(p), "accuracy": float(score.mean()), "flip_rate": float(flips(verdicts).mean()),
            "first_slot_rate": float(((first > 0.5) + 0.5 * (first == 0.5)).mean()),
            "longer_wins": float(prefers_longer.mean()) if len(prefers_longer) else None,
            "ece": float(ece), "cut": verdicts.cut / len(p)}


def flips(verdicts):
    """(N,) bool: the orders name different responses, or one names none. Both at exactly ½ are no flip."""
    a = torch.sign(verdicts.first_at_a - 0.5)
    b = torch.sign(0.5 - verdicts.first_at_b)
    return (a != b).numpy()


def wilson(mean, n):
    """Wilson's 95 % interval (low, high) of a share `mean` among n independent trials."""
    z = 1.96
    centre, width = mean + z * z / (2 * n), z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return float((centre - width) / (1 + z * z / n)), float((centre + width) / (1 + z * z / n))


def length_controlled(score, gap):
    """The win rate that is left where both responses are as long; AlpacaEval 2 (arXiv 2404.04475), section 3.

    P(win) = σ(θ + φ tanh(Δ / s)), with Δ by how many characters the first is longer, s the standard deviation
    of Δ. θ and φ have the least Σ -[w log P + (1 - w) log(1 - P)] + φ² / 200, w the score. Returned is σ(θ).
    AlpacaEval's third term, how hard an instruction is, needs many systems, and its penalty is chosen by
    cross-validation; ours only keeps φ finite where length alone tells who wins.

    score: (N,) 1 for a win, ½ for a tie, 0 for a loss; gap: (N,) Δ.
    """
    if np.ptp(gap) == 0 or score.mean() in (0, 1):        # all gaps or all scores are alike
        return float(score.mean())
    x = np.stack((np.ones_like(gap), np.tanh(gap / gap.std(ddof=1))), axis=1)                    # (N, 2)
    weights, penalty = np.zeros(2), np.diag((0, 0.01))
    for _ in range(50):                                                                # Newton's method
        p = 1 / (1 + np.exp(-x @ weights))
        curvature = (x.T * (p * (1 - p))) @ x + penalty
        weights += np.linalg.solve(curvature, x.T @ (score - p) - penalty @ weights)
    return float(1 / (1 + np.exp(-weights[0])))


def win_rate(verdicts, pairs):
    """Win, tie and lose shares of the first of N pairs (context, response, response).

    A tie: the orders disagree, or p = ½. win_rate counts ties half, with Wilson's 95 % interval over the
    number of contexts: pairs of one prompt are not independent. lc_win_rate: see length_controlled.
    """
    p, tie = verdicts.p.numpy(), flips(verdicts) | (verdicts.p.numpy() == 0.5)
    score = np.where(tie, 0.5, p > 0.5)
    gap, mean = np.array([float(len(a.strip()) - len(b.strip())) for _, a, b in pairs]), score.mean()
    low, high = wilson(mean, len({context for context, *_ in pairs}))
    return {"n": len(p), "win": float((score == 1).mean()), "tie": float(tie.mean()),
            "lose": float((score == 0).mean()), "win_rate": float(mean), "ci_low": low, "ci_high": high,
            "lc_win_rate": length_controlled(score, gap)}
