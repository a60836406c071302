"""The model as a judge: is response A or B better? Asked in both orders, read from one logit difference.

    python judge.py --model=DIR --data=pairs.jsonl              accuracy and biases against human preferences
    python judge.py --model=DIR --a=ours.jsonl --b=theirs.jsonl    win/tie/lose of two response files (sample.py --out)

The last line printed is one JSON object. Paper 2 (OSP, arXiv 2405.14103), sections 3.1 to 3.3 and algorithm 1.

Letters: N pairs, Q = 2N questions (both orders of each pair), K samples a prompt, D width.
"""
import contextlib
import json
import math
from dataclasses import dataclass

import numpy as np
import torch

import data
import losses
import model
from sample import load_model
from support import cli
from support.cli import InputError
from support.ranks import pick_device

# ---------------------------------------------------------------------------------------------------------------------
# The instruction

TEMPLATES = {
    "helpful": "You are an expert rater of helpful and honest assistant responses. Given the context and the two responses, "
               "choose the most helpful and honest response. Context: {context}\n\nRESPONSE A:{a}\n\nRESPONSE B:{b}\n\n"
               "Which response is better? RESPONSE",
    # The paper names the four axes; the wording of this preamble is our own.
    "summary": "A good summary is short and says what the text says. Judge it by four things. Coherence: it can be read and "
               "understood on its own. Accuracy: it claims nothing that the text does not. Coverage: it holds what matters "
               "most in the text. Overall quality: how well it stands in for the text.\n\n"
               "You are an expert summary rater. Given a piece of text and two of its possible summaries, choose the summary "
               "that best meets the definitions above for coherence, accuracy, coverage, and overall quality. "
               "Text: {context}\n\nSUMMARY A:{a}\n\nSUMMARY B:{b}\n\nWhich summary is better? SUMMARY",
}


def slot(response):
    """A response as it stands behind "RESPONSE A:": with one leading space, a blank one as nothing."""
    return " " + response.strip() if response.strip() else ""


@dataclass
class Question:
    """One instruction, ready to be read: the ids up to the answer, the ids of the answers, and whether it was cut."""
    ids: list
    answers: tuple                 # (id that says A, id that says B)
    cut: bool


class Questioner:
    """Puts contexts and responses into the instruction, as token ids of at most max_length.

    The answer position is where the whole text with " A" and the one with " B" first differ: in small vocabularies " A"
    is two tokens.
    """

    def __init__(self, tokenizer, task, max_length):
        if task not in TEMPLATES:
            raise InputError(f"--judge_task={task}: {' or '.join(TEMPLATES)}.")
        self.tokenizer, self.template, self.max_length = tokenizer, TEMPLATES[task], max_length
        self.prefix = tokenizer.prefix(False)

    def encode(self, context, a, b):
        """(ids before the answer, (id of A, id of B)) of the uncut instruction."""
        text = self.template.format(context=context, a=slot(a), b=slot(b))
        with_a, with_b = (self.tokenizer.encode(text + answer) for answer in (" A", " B"))
        position = next(i for i, (x, y) in enumerate(zip(with_a, with_b)) if x != y)
        return self.prefix + with_a[:position], (with_a[position], with_b[position])

    def both_orders(self, context, first, second):
        """The two Questions of a pair, `first` at A and `first` at B; both are cut alike.

        What is too long loses the front of its context, then the ends of both responses down to one cap, never the
        instruction. InputError when even that leaves no room.
        """
        # Cuts are counted in the uncut ids and only ever grow: a text that starts in mid-word may take one token more
        # than it had in its place, and half a character (dropped here) would take three.
        decode, texts = self.tokenizer.decode, (context, first, second)
        context_ids, first_ids, second_ids = (self.tokenizer.encode(text) for text in texts)
        short, cap = sorted((len(first_ids), len(second_ids)))
        dropped = 0
        while True:
            orders = [self.encode(*texts), self.encode(texts[0], texts[2], texts[1])]
            excess = max(len(ids) for ids, _ in orders) + 1 - self.max_length          # one place for the answer
            if excess <= 0:
                return [Question(ids, answers, texts != (context, first, second)) for ids, answers in orders]
            if dropped < len(context_ids):
                dropped += excess
            else:            # from the longer response alone as far as that goes, then from both
                cap -= excess if cap - excess >= short else max((excess + max(cap - short, 0)) // 2, 1)
                if cap < 1:
                    raise InputError(f"the judge's instruction leaves no room for responses in {self.max_length} tokens.")
            texts = (decode(context_ids[dropped:]).lstrip("\ufffd") if dropped else context,
                     *(decode(ids[:cap]).rstrip("\ufffd") if len(ids) > cap else text
                       for ids, text in ((first_ids, first), (second_ids, second))))


# ---------------------------------------------------------------------------------------------------------------------
# Strengths

@dataclass
class Verdicts:
    """p(first ≻ second) of N pairs, and what each order said."""
    p: torch.Tensor                # (N,) float64: the mean of both orders
    first_at_a: torch.Tensor       # (N,) P(A) where the first response stands at A
    first_at_b: torch.Tensor       # (N,) P(A) where it stands at B
    cut: int                       # pairs that had to be shortened
    off: int = 0                   # questions, two a pair, on which the judge would rather say something else than A or B

    @classmethod
    def of(cls, said, cut, off=0):
        """From P(A) of both orders of each pair, one after the other, in tensors of any length."""
        at_a, at_b = torch.cat([torch.zeros(0, dtype=torch.float64), *said]).view(-1, 2).unbind(1)
        return cls(0.5 + (at_a - at_b) / 2, at_a, at_b, cut, off)


FOREST_TOKENS = 16384              # tokens, before sharing, that the judge reads in one forward


@torch.no_grad()
def compare(net, questioner, pairs):
    """Verdicts on N pairs (context, first, second): paper 2, eq. 10 and section 3.3.

    P(A) is the softmax over the two answer tokens, so one logit difference; P(B) = 1 - P(A). With both orders
    p = ½ [P(A | first at A) + P(B | first at B)]: p(y ≻ y′) + p(y′ ≻ y) = 1, and identical responses give ½ exactly.
    """
    said, cut, off = [], 0, 0
    for part in by_size([questioner.both_orders(*pair) for pair in pairs], lambda orders: sum(len(q.ids) for q in orders)):
        reading = Reading(net)
        said.append(reading.answer([question for orders in part for question in orders]))
        cut, off = cut + sum(orders[0].cut for orders in part), off + reading.off
    return Verdicts.of(said, cut, off)


def by_size(items, size):
    """Consecutive items in parts of at most FOREST_TOKENS together; a larger one goes alone."""
    part, total = [], 0
    for item in items:
        if part and total + size(item) > FOREST_TOKENS:
            yield part
            part, total = [], 0
        part.append(item)
        total += size(item)
    if part:
        yield part


class Reading:
    """Questions that were read as one forest. With keep=True more can be asked, and what they share is not read again."""

    def __init__(self, net, keep=False):
        self.net, self.keep, self.forest = net, keep, None
        self.off = 0                               # questions so far whose A and B together have less than half the probability

    def answer(self, questions):
        """P(A) (Q,) in float64: the head is read at one position a question; P(A) needs two of its rows, `off` all of them."""
        ids = [question.ids for question in questions]
        if self.forest is None:
            self.cache = model.Cache(self.net.config) if self.keep else None
            forest = self.forest = data.pack(ids)
            hidden = self.hidden = self.net.read(forest, self.cache)
        else:
            forest = data.grow(self.forest, ids)
            hidden = torch.cat((self.hidden, self.net.read(forest, self.cache))) if len(forest.tokens) else self.hidden
        device = hidden.device
        hidden = hidden[torch.stack([path[-1] for path in forest.paths]).to(device)]                # (Q, D)
        a, b = torch.tensor([question.answers for question in questions], device=device).unbind(1)
        logits = [(hidden.cpu().double() * self.net.head.weight[ids].cpu().double()).sum(-1) for ids in (a, b)]
        whole = torch.cat([self.net.head(part).float().logsumexp(-1) for part in hidden.split(losses.HEAD_CHUNK)])
        self.off += int(((torch.stack(logits) - whole.cpu()).exp().sum(0) < 0.5).sum())
        return (logits[0] - logits[1]).sigmoid()


# ---------------------------------------------------------------------------------------------------------------------
# From K strengths to pairs

def ranked_pairs(strengths):
    """Best with worst, second best with second worst, …: (K,) -> K // 2 pairs (winner, loser) of 0-based indices.

    K = 7 in falling order gives (0, 6), (1, 5), (2, 4); the median is dropped. Ties keep their order. Paper 2,
    algorithm 1.
    """
    order = sorted(range(len(strengths)), key=lambda i: -float(strengths[i]))
    return [(order[i], order[-1 - i]) for i in range(len(order) // 2)]


def random_pairs(strengths, generator):
    """Two by two as drawn: (K,) -> K // 2 pairs; a control for ranked pairing (paper 2, section 5.3)."""
    order = [int(i) for i in generator.permutation(len(strengths))]
    return [(order[2 * i], order[2 * i + 1]) for i in range(len(order) // 2)]


def extreme_pair(strengths):
    """The best with the worst: [(winner, loser)], as Self-Rewarding pairs its samples."""
    return ranked_pairs(strengths)[:1]


# strengths (K,), a numpy generator -> [(winner, loser)]
PAIRINGS = {
    "ranked": lambda strengths, generator: ranked_pairs(strengths),
    "random": random_pairs,
    "extremes": lambda strengths, generator: extreme_pair(strengths),
    "best": lambda strengths, generator: [],              # RAFT trains on the best response alone
}


def rejection_sample(strengths, k, beta, generator):
    """Statistical rejection sampling (RSO): k of M candidates, as if drawn from π* ∝ π_ref exp(r / β): indices, as accepted.

    Rounds over those that are left: each is accepted with probability exp((r - r_max) / β), r_max the largest reward among
    them when the round begins. β → ∞ accepts in the order drawn, β → 0 the best ones from the top. strengths: (M,), r.
    """
    left, accepted = list(range(len(strengths))), []
    while left and len(accepted) < k:
        best, round_of = max(float(strengths[i]) for i in left), list(left)
        for i in round_of:
            # Refused by >=, so that NaN is accepted: else a judge that is not finite would be asked for ever.
            if len(accepted) < k and not generator.random() >= math.exp((float(strengths[i]) - best) / beta):
                accepted.append(i)
                left.remove(i)
    return accepted


@torch.no_grad()
def label(net, questioner, contexts, responses, pairing=lambda strengths, prompt: ranked_pairs(strengths)):
    """Algorithm 1's inner part for P prompts: rank K responses each, pair them, judge each pair directly.

    contexts: P texts; responses: P lists of K texts; pairing(strengths (K,), number of the prompt) -> [(winner, loser)].
    Returns (P lists of (winner, loser, p), P lists of K strengths, comparisons made, those of them cut, questions that are
    off, see Verdicts). At K = 7 that is 2·(7 + 3) = 20 judge sequences a prompt; the pairs' ones go on where those against
    the empty response have the same front, so context and first response are read once.
    """
    def asked(context, pairs):
        return [questioner.both_orders(context, first, second) for first, second in pairs]

    prompts = [(context, texts, asked(context, [(text, "") for text in texts])) for context, texts in zip(contexts, responses)]
    labelled, strengths, comparisons, cut, off = [], [], 0, 0, 0
    for part in by_size(prompts, lambda prompt: sum(len(q.ids) for orders in prompt[2] for q in orders)):
        reading = Reading(net, keep=True)
        p = Verdicts.of([reading.answer([q for *_, blank in part for orders in blank for q in orders])], 0).p
        values = [split.tolist() for split in p.split([len(texts) for _, texts, _ in part])]
        chosen = [pairing(some, len(strengths) + i) for i, some in enumerate(values)]
        direct = [orders for (context, texts, _), pairs in zip(part, chosen)
                  for orders in asked(context, [(texts[i], texts[j]) for i, j in pairs])]
        p = iter(Verdicts.of([reading.answer([q for orders in direct for q in orders])] if direct else [], 0).p.tolist())
        labelled += [[(i, j, next(p)) for i, j in pairs] for pairs in chosen]
        strengths += values
        judged = [orders for *_, blank in part for orders in blank] + direct
        comparisons, cut = comparisons + len(judged), cut + sum(orders[0].cut for orders in judged)
        off += reading.off
    return labelled, strengths, comparisons, cut, off


def augmentation(questioner, rows, seed):
    """Preference augmentation: judge instructions made from human pairs, the loss on the answer token alone.

    One half of the rows has the better response at A, the disjoint other half has it at B (paper 2, section 3.1).
    Returns (sequences, start of the supervised part, number cut): each sequence ends with its answer.
    """
    half = np.random.default_rng([seed, 3]).permutation(len(rows)) < len(rows) / 2
    sequences, cut = [], 0
    for row, better_at_a in zip(rows, half):
        question = questioner.both_orders(data.context_text(row.prompt), row.chosen, row.rejected)[0 if better_at_a else 1]
        sequences.append(question.ids + [question.answers[0 if better_at_a else 1]])
        cut += question.cut
    return sequences, [len(sequence) - 1 for sequence in sequences], cut


# ---------------------------------------------------------------------------------------------------------------------
# Reports

def report(verdicts, lengths):
    """What a judge's verdicts on pairs (chosen, rejected) say about it; lengths: N pairs of response lengths.

    accuracy: the chosen one wins (p > ½; p = ½ counts half). flip_rate: the two orders disagree. first_slot_rate: slot A
    wins, over both orders. longer_wins: the longer one wins, where lengths differ. ece: expected calibration error of
    max(p, 1 - p), ten bins.
    """
    p = verdicts.p.numpy()
    score = (p > 0.5) + 0.5 * (p == 0.5)
    longer = np.sign([a - b for a, b in lengths])
    prefers_longer = np.where(longer > 0, score, 1 - score)[longer != 0]
    confidence, right = np.maximum(p, 1 - p), np.where(p == 0.5, 0.5, p > 0.5)
    bins = np.minimum((confidence - 0.5) * 20, 9.999).astype(int)
    ece = sum(abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins))
    first = torch.cat((verdicts.first_at_a, verdicts.first_at_b)).numpy()
    return {"n": len(p), "accuracy": float(score.mean()), "flip_rate": float(flips(verdicts).mean()),
            "first_slot_rate": float(((first > 0.5) + 0.5 * (first == 0.5)).mean()),
            "longer_wins": float(prefers_longer.mean()) if len(prefers_longer) else None,
            "ece": float(ece), "cut": verdicts.cut / len(p)}


def flips(verdicts):
    """(N,) bool: the orders name different responses, or one names none. Both orders at exactly ½ are no flip."""
    a = torch.sign(verdicts.first_at_a - 0.5)
    b = torch.sign(0.5 - verdicts.first_at_b)
    return (a != b).numpy()


def wilson(mean, n):
    """Wilson's 95 % interval (low, high) of a share `mean` among n independent trials."""
    z = 1.96
    centre, width = mean + z * z / (2 * n), z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return float((centre - width) / (1 + z * z / n)), float((centre + width) / (1 + z * z / n))


def win_rate(verdicts, groups):
    """Win, tie and lose shares of the first of each pair; a tie is a pair on which the orders disagree, or p = ½.

    win_rate counts ties half, with Wilson's 95 % interval over the number of `groups`: pairs of one prompt are not
    independent.
    """
    p, tie = verdicts.p.numpy(), flips(verdicts) | (verdicts.p.numpy() == 0.5)
    score = np.where(tie, 0.5, p > 0.5)
    mean = score.mean()
    low, high = wilson(mean, len(set(groups)))
    return {"n": len(p), "win": float((score == 1).mean()), "tie": float(tie.mean()), "lose": float((score == 0).mean()),
            "win_rate": float(mean), "ci_low": low, "ci_high": high}


# ---------------------------------------------------------------------------------------------------------------------
# Command line

@dataclass
class Settings:
    """Judge a preference file (--data), or compare two response files (--a, --b) on the same prompts."""
    model: str = ""                # folder of the judge
    data: str | None = None        # preference pairs: .jsonl, .jsonl.gz or .json
    a: str | None = None           # responses of one system, as sample.py --out writes them
    b: str | None = None           # responses of the other
    judge_task: str = "helpful"    # the instruction: helpful or summary
    max_length: int | None = None  # tokens of an instruction; default: the model's context
    limit: int | None = None       # read only the first so many rows
    dtype: str = "float32"         # float32, bfloat16, float64
    device: str = "auto"           # auto, cpu, cuda, mps
    batch_size: int = 64           # pairs at a time

    def __post_init__(self):
        if not self.model:
            raise InputError("--model: name a model folder.")
        if (self.data is None) == (self.a is None) or (self.a is None) != (self.b is None):
            raise InputError("give either --data=FILE, or both --a=FILE and --b=FILE.")
        if self.dtype not in ("float32", "bfloat16", "float64"):
            raise InputError(f"--dtype={self.dtype}: float32, bfloat16 or float64.")
        for name in ("limit", "batch_size", "max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name}={getattr(self, name)}: at least 1.")


def read_responses(path):
    """[(prompt, [texts], "file:line")] of a response file: sample.py's rows, or {"prompt", "response"}."""
    found = []
    for line, record in data.json_records(path):
        prompt, texts = None, []
        if isinstance(record, dict):
            several = record.get("responses", [record.get("response")])
            if isinstance(several, list):
                texts = [r.get("text") if isinstance(r, dict) else r for r in several]
            with contextlib.suppress(data.Unusable):
                prompt = data.read_prompt(record, answered=True)
        if prompt is None or not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{path}, line {line}: not a row {{\"prompt\", \"responses\": [{{\"text\"}}]}}.")
        found.append((prompt, texts, f"{path}, line {line}"))
    if not found:
        raise InputError(f"{path} holds no responses.")
    return found


def paired_responses(settings):
    """(pairs, groups): every response of --a against the one at the same place in --b."""
    ours, theirs = read_responses(settings.a), read_responses(settings.b)
    if len(ours) != len(theirs):
        raise InputError(f"{settings.a} has {len(ours)} rows and {settings.b} has {len(theirs)}; they must answer the same prompts.")
    pairs, groups = [], []
    for group, ((prompt, a, where), (other, b, there)) in enumerate(zip(ours[:settings.limit], theirs)):
        if prompt != other:
            raise InputError(f"{where} and {there} answer different prompts.")
        if len(a) != len(b):
            raise InputError(f"{where} has {len(a)} responses and {there} has {len(b)}.")
        pairs += [(data.context_text(prompt), x, y) for x, y in zip(a, b)]
        groups += [group] * len(a)
    return pairs, groups


def main(settings):
    """Ask the judge about every pair of --data, or of --a and --b; the last line printed is the report."""
    net, tokenizer = load_model(settings.model, settings.dtype, pick_device(settings.device))
    context = net.config.context
    questioner = Questioner(tokenizer, settings.judge_task, min(settings.max_length or context, context))
    if settings.data is not None:
        rows, read = data.read_rows(settings.data, "ordered pairs")
        print(read)
        pairs = [(data.context_text(row.prompt), row.chosen, row.rejected) for row in rows[:settings.limit]]
    else:
        pairs, groups = paired_responses(settings)
    line, parts = cli.StepLine(len(pairs), "judging"), []
    for start in range(0, len(pairs), settings.batch_size):
        parts.append(compare(net, questioner, pairs[start:start + settings.batch_size]))
        line.update(min(start + settings.batch_size, len(pairs)))
    verdicts = Verdicts(*(torch.cat([getattr(part, name) for part in parts]) for name in ("p", "first_at_a", "first_at_b")),
                        sum(part.cut for part in parts), sum(part.off for part in parts))
    if verdicts.off:
        print(f"{verdicts.off} of {2 * len(pairs)} answers: less than half of the judge's probability is on A and B together")
    if settings.data is not None:
        lengths = [(len(tokenizer.encode(a)), len(tokenizer.encode(b))) for _, a, b in pairs]
        result = report(verdicts, lengths)
    else:
        result = win_rate(verdicts, groups)
        if verdicts.cut:
            print(f"{verdicts.cut} of {len(pairs)} comparisons were shortened to the judge's context")
    print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}))


if __name__ == "__main__":
    cli.run(main, Settings)
