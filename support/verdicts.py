"""Around the judge: response files, and what its verdicts (judge.Verdicts) say of it or of two systems."""
import contextlib
import math

import numpy as np
import torch

from support.cli import InputError
from support.rows import Unusable, json_records, read_prompt


def read_responses(path):
    """[(prompt, [texts], "file, line")] of sample.py's rows, or of rows {"prompt", "response"}."""
    found = []
    for line, record in json_records(path):
        where, prompt, texts = f"{path}, line {line}", None, []
        if isinstance(record, dict):
            several = record.get("responses", [record.get("response")])
            if isinstance(several, list):
                texts = [one.get("text") if isinstance(one, dict) else one for one in several]
            with contextlib.suppress(Unusable):
                prompt = read_prompt(record, answered=True)
        if prompt is None or not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f'{where}: not a row {{"prompt", "responses": [{{"text"}}]}}.')
        found.append((prompt, texts, where))
    if not found:
        raise InputError(f"{path} holds no responses.")
    return found


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


def win_rate(verdicts, groups):
    """Win, tie and lose shares of the first of each pair; a tie: the orders disagree, or p = ½.

    win_rate counts ties half, with Wilson's 95 % interval over the number of `groups`: pairs of one prompt
    are not independent.
    """
    p, tie = verdicts.p.numpy(), flips(verdicts) | (verdicts.p.numpy() == 0.5)
    score = np.where(tie, 0.5, p > 0.5)
    mean = score.mean()
    low, high = wilson(mean, len(set(groups)))
    return {"n": len(p), "win": float((score == 1).mean()), "tie": float(tie.mean()),
            "lose": float((score == 0).mean()), "win_rate": float(mean), "ci_low": low, "ci_high": high}
