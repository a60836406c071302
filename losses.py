"""The formulas of both papers as pure functions: tensors (N,) in, one value per example (N,) out.

Paper 1 is "Direct Alignment of Language Models via Quality-Aware Self-Refinement" (Sr-DPO, Sr-IPO; arXiv
2405.21040), paper 2 "Online Self-Preferring Language Models" (OSP, SPCE; arXiv 2405.14103).

A response's log-probability is the SUM over its tokens, end-of-text included. Everything starts from the

    margin  h = [log π(y⁺|x) - log π_ref(y⁺|x)] - [log π(y⁻|x) - log π_ref(y⁻|x)]        without β

and h_p, the same with the query x after the refinement prompt p. The caller takes the mean over a batch:
only it knows the global batch. How log-probabilities are computed comes last.

Letters: N pairs, M supervised tokens, S sequences, D width, V vocabulary.
"""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# -----------------------------------------------------------------------------------------------------------
# Losses

def margins(policy, reference):
    """h (N,) from the log-probabilities (chosen, rejected), each (N,), of the policy and of the reference."""
    return (policy[0] - reference[0]) - (policy[1] - reference[1])


def sft(logprob):
    """Negative log-likelihood (N,) of a response, summed over tokens; the caller divides by a batch's tokens.

    A response of two tokens with probabilities ½ and ¼: ln 2 + ln 4 = 2.0794.
    """
    return -logprob


def dpo(margin, beta):
    """-log σ(β h): paper 1, eq. 5.

    h = 2, β = ½: -log σ(1) = log(1 + e⁻¹) = 0.3133. h = 0: ln 2.
    """
    return -F.logsigmoid(beta * margin)


def ipo(margin, beta):
    """(h - 1/(2β))²: paper 1, eq. 8.

    h = 2, β = ½: (2 - 1)² = 1. h = 0, β = 0.1: 5² = 25.
    """
    return (margin - 1 / (2 * beta)) ** 2


def refinement(augmented_margin, beta):
    """Δπ(y⁻, y⁺; x) = β h_p, a constant to the optimizer: paper 1, eq. 12.

    β = ½ and log-ratios of +1 for y⁺ and -2 for y⁻ after p⊕x: h_p = 3, Δ = 1.5.
    """
    return beta * augmented_margin.detach()


def sr_dpo(margin, delta, beta, lam):
    """-log σ(β h - λ sg[Δπ]): paper 1, eq. 13 and algorithm 1. The sign is minus, as printed: see the README.

    h = 2, β = ½, λ = ½, Δ = 1: -log σ(½) = log(1 + e^-½) = 0.4741.
    """
    return -F.logsigmoid(beta * margin - lam * delta.detach())


def sr_ipo(margin, delta, beta, lam, delta_scale="printed"):
    """(h - λ sg[Δπ] - 1/(2β))²: paper 1, eq. 15 and algorithm 2.

    delta_scale="exact" uses Δπ/β = h_p, which maximising eq. 14 gives, in place of the printed Δπ.
    h = 2, β = ½, λ = ½, Δ = 1: printed (2 - ½ - 1)² = 0.25, exact (2 - 1 - 1)² = 0.
    """
    scale = {"printed": 1.0, "exact": 1 / beta}[delta_scale]
    return (margin - lam * scale * delta.detach() - 1 / (2 * beta)) ** 2


def spce(margin, strength, beta):
    """-[p log p̂ + (1 - p) log(1 - p̂)] with p̂ = σ(β h): paper 2, eq. 8, printed there without the minus.

    strength (N,) is p, the judge's probability that the first response is better: constant to the optimizer.
    h = 2, β = ½, p = ¾: -(¾ log 0.7311 + ¼ log 0.2689) = 0.5633. The gradient is β (p̂ - p) dh (eq. 9).
    """
    strength = strength.detach().to(margin.dtype)
    return F.binary_cross_entropy_with_logits(beta * margin, strength, reduction="none")


def sr_spce(margin, delta, strength, beta, lam):
    """SPCE with p̂ = σ(β h - λ sg[Δπ]): the two papers joined; in neither.

    h = 2, β = ½, λ = ½, Δ = 1, p = ¾: log(1 + e^½) - ¾·½ = 0.5991.
    """
    logit = beta * margin - lam * delta.detach()
    return F.binary_cross_entropy_with_logits(logit, strength.detach().to(margin.dtype), reduction="none")


# -----------------------------------------------------------------------------------------------------------
# Metrics: per example, natural units

def strength_hat(margin, beta):
    """p̂ = σ(β h), the policy's own strength of preference: paper 2, eq. 7."""
    return torch.sigmoid(beta * margin)


def correct(margin):
    """1 where the pair is ordered as labelled (h > 0), else 0: paper 1, section 4."""
    return (margin > 0).to(margin.dtype)


def refined_margin(margin, delta, beta, lam, delta_scale="logistic"):
    """What the refined losses hold flat: h - λΔ/β (logistic ones, exact Sr-IPO) or h - λΔ (printed Sr-IPO).

    h = 2, Δ = 1, β = ½, λ = ½: 2 - 1 = 1; printed Sr-IPO: 1.5.
    """
    return margin - lam * delta / (1.0 if delta_scale == "printed" else beta)


def pair_metrics(settings, loss, margin, augmented, delta, strength, policy):
    """{name in metrics.jsonl: (N,)} of N pairs.

    augmented: h_p, with its delta; strength: p. Each is None where the loss takes none.
    policy: (log π(y⁺|x), log π(y⁻|x)); settings: beta, lam, delta_scale and recipe of the run.
    """
    s = settings
    found = {"loss": loss, "margin": margin, "accuracy": correct(margin), "chosen_logp": policy[0],
             "rejected_logp": policy[1]}
    if delta is not None:
        scale = s.delta_scale if s.recipes[s.recipe].loss == "sr-ipo" else "logistic"
        found["augmented_accuracy"] = correct(augmented)
        found["refined_margin"] = refined_margin(margin, delta, s.beta, s.lam, scale)
    if strength is not None:
        found |= {"p": strength, "p_hat": strength_hat(margin, s.beta)}
    return found


# -----------------------------------------------------------------------------------------------------------
# Log-probabilities

HEAD_CHUNK = 512       # supervised tokens whose (tokens, V) logits stand in memory at a time


def chunk_logprobs(head, hidden, tokens):
    """log softmax(head(hidden))[token]: hidden (M, D), tokens (M,) -> (M,), in float32 at least."""
    logits = head(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def token_logprobs(head, hidden, tokens):
    """The same for any M in bounded memory: logits exist one chunk at a time, made again for the gradient.

    Those of the last chunk are kept: its gradient comes first, so they never stand beside another chunk's.
    """
    pieces = list(zip(hidden.split(HEAD_CHUNK), tokens.split(HEAD_CHUNK)))
    if not torch.is_grad_enabled():
        return torch.cat([chunk_logprobs(head, h, t) for h, t in pieces])
    values = [checkpoint(chunk_logprobs, head, h, t, use_reentrant=False) for h, t in pieces[:-1]]
    return torch.cat([*values, chunk_logprobs(head, *pieces[-1])])


def logprobs_by_token(net, forest, starts):
    """log π(token | what stands before it) of supervised tokens, one sequence after the other: (M,).

    forest: forest.pack of S sequences; starts: S integers >= 1, the lengths of the prompts. A token that
    several sequences share is computed once; the head runs on supervised positions only.
    """
    device = net.embed.weight.device
    supervised = [path[start:] for path, start in zip(forest.paths, starts)]
    nodes, which = torch.unique(torch.cat(supervised), return_inverse=True)
    hidden = net.hidden(forest)
    before = hidden[forest.parent[nodes].to(device)]
    values = token_logprobs(net.head, before, forest.tokens[nodes].to(device))
    return values[which.to(device)]


def logprobs(net, forest, starts):
    """log π(y|x) (S,): the sums of these over each sequence's supervised tokens, those from `starts` on."""
    values = logprobs_by_token(net, forest, starts)
    lengths = torch.tensor([len(path) - start for path, start in zip(forest.paths, starts)])
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return values.new_zeros(len(lengths)).index_add(0, owner.to(values.device), values)
