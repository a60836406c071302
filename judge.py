"""The model as a judge: is response A or B better? Asked in both orders, read from one logit difference.

    python judge.py --model=DIR --data=pairs.jsonl                 accuracy and biases on human preferences
    python judge.py --model=DIR --a=ours.jsonl --b=theirs.jsonl    win, tie, lose of two response files

The last line printed is one JSON object. Paper 2 (OSP, arXiv 2405.14103), sections 3.1-3.3, algorithm 1.

Letters: N pairs, Q = 2N questions (both orders of each pair), P prompts, K samples per prompt, D width.
"""
import json
import math
from dataclasses import dataclass

import numpy as np
import torch

import data
import forest
import losses
from sample import load_model
from support import cli
from support.chats import CHATS
from support.cli import InputError, setting
from support.formats import as_asked, read_responses
from support.ranks import pick_device
from support.verdicts import report, win_rate

# ------------------------------------------------------------------------------------------------------------
# The instruction

TEMPLATES = {
    "helpful":
        "You are an expert rater of helpful and honest assistant responses. Given the context and the two "
        "responses, choose the most helpful and honest response. Context: {context}\n\n"
        "RESPONSE A:{a}\n\nRESPONSE B:{b}\n\nWhich response is better? RESPONSE",
    # The paper names the four axes; the wording of this preamble is our own.
    "summary":
        "A good summary is short and says what the text says. Judge it by four things. Coherence: it can be "
        "read and understood on its own. Accuracy: it claims nothing that the text does not. Coverage: it "
        "holds what matters most in the text. Overall quality: how well it stands in for the text.\n\n"
        "You are an expert summary rater. Given a piece of text and two of its possible summaries, choose "
        "the summary that best meets the definitions above for coherence, accuracy, coverage, and overall "
        "quality. Text: {context}\n\nSUMMARY A:{a}\n\nSUMMARY B:{b}\n\nWhich summary is better? SUMMARY",
}


def slot(response):
    """A response as it stands after "RESPONSE A:": with one leading space, a blank one as nothing."""
    return " " + response.strip() if response.strip() else ""


@dataclass
class Question:
    """One instruction, up to where the answer begins."""
    ids: list[int]
    answers: tuple[int, int]       # the id that says A, the id that says B
    cut: bool                      # whether it was shortened


class JudgePrompt:
    """Puts contexts and responses into the instruction, as token ids of at most max_length.

    A model whose chats have marks is asked in a user's turn, and its own turn begins with the instruction's
    last word; another model goes on with the text. The answer is read where the ids with " A" and those with
    " B" first differ: in small vocabularies " A" is two tokens.
    """

    def __init__(self, tokenizer, task, max_length, chat=None):
        if task not in TEMPLATES:
            raise InputError(f"--judge_task={task}: {' or '.join(TEMPLATES)}.")
        self.tokenizer, self.template, self.max_length = tokenizer, TEMPLATES[task], max_length
        self.chat = chat if chat is not None and chat.marks else None

    def encode(self, context, a, b):
        """(ids before the answer, (id of A, id of B)) of the uncut instruction."""
        text = self.template.format(context=context, a=slot(a), b=slot(b))
        if self.chat:
            question, _, word = text.rpartition(" ")              # … better? | RESPONSE
            turn = self.chat.with_system([{"role": "user", "content": question}])
            before = self.chat.ids(turn)
            before = data.prefix_ids(self.tokenizer, turn, self.chat, before) + before
            word = self.chat.between + word
            with_a, with_b = (self.tokenizer.encode_after(word + answer) for answer in (" A", " B"))
        else:
            before = self.tokenizer.prefix(False)
            with_a, with_b = (self.tokenizer.encode(text + answer) for answer in (" A", " B"))
        position = next(i for i, (x, y) in enumerate(zip(with_a, with_b)) if x != y)
        return before + with_a[:position], (with_a[position], with_b[position])

    def both_orders(self, context, first, second):
        """The two Questions of a pair, `first` at A and `first` at B; both are cut alike.

        What is too long loses the front of its context, then the ends of both responses down to one cap,
        never the instruction. InputError when even that leaves no room.
        """
        # Cuts are counted in the uncut ids and only ever grow: a text that starts in mid-word may take one
        # token more than it had in its place, and half a character (dropped here) would take three.
        decode, texts = self.tokenizer.decode, (context, first, second)
        context_ids, first_ids, second_ids = (self.tokenizer.encode(text) for text in texts)
        short, cap = sorted((len(first_ids), len(second_ids)))
        dropped = 0
        while True:
            orders = [self.encode(*texts), self.encode(texts[0], texts[2], texts[1])]
            excess = max(len(ids) for ids, _ in orders) + 1 - self.max_length          # 1 for the answer
            if excess <= 0:
                cut = texts != (context, first, second)
                return [Question(ids, answers, cut) for ids, answers in orders]
            if dropped < len(context_ids):
                dropped += excess
            else:            # from the longer response alone as far as that goes, then from both
                cap -= excess if cap - excess >= short else max((excess + max(cap - short, 0)) // 2, 1)
                if cap < 1:
                    raise InputError(f"the judge's instruction leaves no room for responses in "
                                     f"{self.max_length} tokens.")
            texts = (decode(context_ids[dropped:]).lstrip("\ufffd") if dropped else context,
                     *(decode(ids[:cap]).rstrip("\ufffd") if len(ids) > cap else text
                       for ids, text in ((first_ids, first), (second_ids, second))))


# ------------------------------------------------------------------------------------------------------------
# Strengths

@dataclass
class Verdicts:
    """What the judge says of N pairs, asked about in both orders."""
    p: torch.Tensor                # (N,) p(first ≻ second), the mean of both orders; all in float64
    first_at_a: torch.Tensor       # (N,) P(A) where the first response stands at A
    first_at_b: torch.Tensor       # (N,) P(A) where it stands at B
    cut: int                       # pairs that had to be shortened
    not_a_or_b: int = 0            # questions, two per pair, on which P(A) + P(B) is below half
    a_or_b: float = 0.0            # the sum of P(A) + P(B) over the questions

    @classmethod
    def join(cls, parts):
        """The pairs of a list of Verdicts, in order."""
        none = torch.zeros(0, dtype=torch.float64)
        tensors = [torch.cat([none, *(getattr(part, name) for part in parts)])
                   for name in ("p", "first_at_a", "first_at_b")]
        return cls(*tensors, *(sum(getattr(part, name) for part in parts)
                               for name in ("cut", "not_a_or_b", "a_or_b")))


class JudgePass:
    """Questions read as one forest. More may be asked if `keep`: what they share is not read again."""

    def __init__(self, net, keep=False):
        self.net, self.forest, self.cache = net, None, forest.Cache(net.config) if keep else None

    @torch.no_grad()
    def answer(self, questions):
        """(P(A) among A and B, P(A) + P(B) among all tokens), both (Q,) in float64."""
        ids = [question.ids for question in questions]
        if self.forest is None:
            asked = self.forest = forest.pack(ids)
            hidden = self.hidden = self.net.hidden(asked, self.cache)
        else:
            asked, hidden = forest.grow(self.forest, ids), self.hidden
            if len(asked.tokens):
                hidden = torch.cat((hidden, self.net.hidden(asked, self.cache)))
        hidden = hidden[torch.stack([path[-1] for path in asked.paths]).to(hidden.device)]       # (Q, D)
        answers = torch.tensor([question.answers for question in questions], device=hidden.device)
        head, double = self.net.head, hidden.cpu().double()
        a, b = ((double * head.weight[ids].cpu().double()).sum(-1) for ids in answers.unbind(1))
        whole = torch.cat([head(part).float().logsumexp(-1) for part in hidden.split(losses.HEAD_CHUNK)])
        if not (whole.isfinite().all() and (a - b).isfinite().all()):
            raise InputError("the judge's logits are not finite: its weights are damaged.")
        return (a - b).sigmoid(), (torch.stack((a, b)) - whole.cpu()).exp().sum(0)

    def compare(self, pairs):
        """Verdicts on N pairs of Questions."""
        if not pairs:
            return Verdicts.join([])
        p_a, p_a_or_b = self.answer([question for pair in pairs for question in pair])
        at_a, at_b = p_a.view(-1, 2).unbind(1)
        cut = sum(question.cut for question, _ in pairs)
        return Verdicts(0.5 + (at_a - at_b) / 2, at_a, at_b, cut, int((p_a_or_b < 0.5).sum()),
                        float(p_a_or_b.sum()))


FOREST_TOKENS = 16384              # tokens, before sharing, that the judge reads in one forward


def by_size(groups):
    """Ranges of consecutive groups of pairs of Questions, each of at most FOREST_TOKENS or one group."""
    start = total = 0
    for i, pairs in enumerate(groups):
        size = sum(len(question.ids) for pair in pairs for question in pair)
        if i > start and total + size > FOREST_TOKENS:
            yield range(start, i)
            start, total = i, 0
        total += size
    if groups:
        yield range(start, len(groups))


def compare(net, judge_prompt, pairs):
    """Verdicts on N pairs (context, first, second): paper 2, eq. 10 and section 3.3.

    P(A) is the softmax over the two answer tokens, so one logit difference; P(B) = 1 - P(A). With both orders
    p = ½ [P(A | first at A) + P(B | first at B)]: p(y ≻ y′) + p(y′ ≻ y) = 1, and p(y ≻ y) = ½ exactly.
    """
    asked = [judge_prompt.both_orders(*pair) for pair in pairs]
    return Verdicts.join([JudgePass(net).compare([asked[i] for i in part])
                          for part in by_size([[pair] for pair in asked])])


# ------------------------------------------------------------------------------------------------------------
# From K strengths to pairs

def ranked_pairs(strengths):
    """Best with worst, second best with second worst, …: (K,) -> K // 2 pairs (winner, loser) of indices.

    K = 7 in falling order gives (0, 6), (1, 5), (2, 4); the median is dropped. Ties keep their order.
    """
    order = sorted(range(len(strengths)), key=lambda i: -float(strengths[i]))
    return [(order[i], order[-1 - i]) for i in range(len(order) // 2)]


def random_pairs(strengths, generator):
    """Two by two as drawn: (K,) -> K // 2 pairs; a control for ranked pairing (paper 2, section 5.3)."""
    order = [int(i) for i in generator.permutation(len(strengths))]
    return [(order[2 * i], order[2 * i + 1]) for i in range(len(order) // 2)]


# strengths (K,), a numpy generator -> [(winner, loser)]
PAIRINGS = {
    "ranked": lambda strengths, generator: ranked_pairs(strengths),
    "random": random_pairs,
    "extremes": lambda strengths, generator: ranked_pairs(strengths)[:1],      # as Self-Rewarding does
    "best": lambda strengths, generator: [],                       # RAFT trains on the best response alone
}


def rejection_sample(strengths, k, beta, generator):
    """Statistical rejection sampling (RSO): k of M candidates, as if drawn from π* ∝ π_ref exp(r / β).

    Rounds over those that are left: each is accepted with probability exp((r - r_max) / β), r_max the largest
    reward among them when the round begins. β → ∞ accepts in the order drawn, β → 0 the best from the top.
    strengths: (M,), r. Returns their indices, as accepted.
    """
    left, accepted = list(range(len(strengths))), []
    while left and len(accepted) < k:
        best, this_round = max(float(strengths[i]) for i in left), list(left)
        for i in this_round:
            # Refused by >=, so that NaN is accepted: else a judge that is not finite would be asked for ever.
            if len(accepted) < k and not generator.random() >= math.exp((float(strengths[i]) - best) / beta):
                accepted.append(i)
                left.remove(i)
    return accepted


class RankingPass(JudgePass):
    """Some prompts with K responses each, judged in one forest: each response alone, then pairs of them.

    At K = 7 that is 2·(7 + 3) = 20 questions per prompt. Those about a pair go on where those against the
    empty response have the same prefix, so context and first response are read once.
    """

    def __init__(self, net, judge_prompt, prompts, contexts, responses, alone):
        """prompts: their indices in the lists that follow; alone: K pairs of Questions for each prompt."""
        super().__init__(net, keep=True)
        self.judge_prompt, self.prompts, self.verdicts = judge_prompt, prompts, []
        self.contexts, self.responses, self.alone = contexts, responses, alone

    def rank(self):
        """Strengths p(y ≻ ∅ | x): for each prompt of the pass a list of K floats."""
        self.verdicts.append(self.compare([pair for i in self.prompts for pair in self.alone[i]]))
        p = self.verdicts[-1].p.split([len(self.alone[i]) for i in self.prompts])
        return [strengths.tolist() for strengths in p]

    def ask(self, pairs):
        """For each prompt of the pass [(i, j)] -> [(i, j, p(y_i ≻ y_j | x))], asked directly."""
        texts = [(self.contexts[prompt], self.responses[prompt][i], self.responses[prompt][j])
                 for prompt, chosen in zip(self.prompts, pairs) for i, j in chosen]
        self.verdicts.append(self.compare([self.judge_prompt.both_orders(*one) for one in texts]))
        p = iter(self.verdicts[-1].p.tolist())
        return [[(i, j, next(p)) for i, j in chosen] for chosen in pairs]


def ranking_passes(net, judge_prompt, contexts, responses):
    """Yields RankingPasses over P contexts with K responses each: as many prompts as fit one forest."""
    alone = [[judge_prompt.both_orders(context, text, "") for text in texts]
             for context, texts in zip(contexts, responses)]
    for prompts in by_size(alone):
        yield RankingPass(net, judge_prompt, prompts, contexts, responses, alone)


def augmentation(judge_prompt, rows, seed):
    """Preference augmentation: judge instructions made from human pairs, the loss on the answer token alone.

    One half of the rows has the better response at A, the other half has it at B (paper 2, section 3.1).
    Returns (sequences, start of the supervised part, number cut): each sequence ends with its answer.
    """
    half = np.random.default_rng([seed, 3]).permutation(len(rows)) < len(rows) / 2
    sequences, cut = [], 0
    for row, better_at_a in zip(cli.progress(rows, "encoding"), half):
        order = 0 if better_at_a else 1
        context = data.context_text(row.prompt)
        question = judge_prompt.both_orders(context, row.chosen, row.rejected)[order]
        sequences.append([*question.ids, question.answers[order]])
        cut += question.cut
    return sequences, [len(sequence) - 1 for sequence in sequences], cut


# ------------------------------------------------------------------------------------------------------------
# Command line

@dataclass
class Settings:
    """Judge a preference file (--data), or compare two response files (--a, --b) on the same prompts."""
    model: str = setting("", "folder of the judge", group="What to judge")
    data: str | None = setting(None, "preference pairs: .jsonl, .jsonl.gz, .json or .parquet")
    columns: list[str] | None = setting(None, "its keys of no form known: prompt:question,chosen:answer_a")
    a: str | None = setting(None, "responses of one system: sample.py's, or rows {prompt, response}")
    b: str | None = setting(None, "responses of the other, to the same prompts")
    questions: str | None = setting(None, "MT-Bench's question.jsonl, where --a and --b are answers to it")
    limit: int | None = setting(None, "read only the first so many rows", least=1)
    judge_task: str = setting("helpful", "the instruction", choices=tuple(TEMPLATES), group="How to judge")
    max_length: int | None = setting(None, "tokens of an instruction; none: the model's context", least=1)
    chat: str | None = setting(None, f"dialogue format ({', '.join(CHATS)}); none: the folder's")
    system: str | None = setting(None, "system message that a chat model is asked under; --system= for none")
    batch_size: int = setting(64, "pairs at a time", least=1)
    dtype: str = setting("float32", "type of the weights", choices=("float32", "bfloat16", "float64"))
    device: str = setting("auto", "auto, cpu, cuda, mps")

    def __post_init__(self):
        cli.check(self)
        if not self.model:
            raise InputError("--model: name a model folder.")
        if (self.data is None) == (self.a is None) or (self.a is None) != (self.b is None):
            raise InputError("give either --data=FILE, or both --a=FILE and --b=FILE.")


def paired_responses(settings):
    """Pairs (context, response, response): every response of --a and the one at the same place in --b."""
    ours, theirs = (read_responses(path, settings.questions) for path in (settings.a, settings.b))
    if len(ours) != len(theirs):
        raise InputError(f"{settings.a} has {len(ours)} rows and {settings.b} has {len(theirs)}; they must "
                         f"answer the same prompts.")
    pairs = []
    for (prompt, a, where), (other, b, there) in zip(ours[:settings.limit], theirs):
        if as_asked(prompt) != as_asked(other):
            raise InputError(f"{where} and {there} answer different prompts.")
        if len(a) != len(b):
            raise InputError(f"{where} has {len(a)} responses and {there} has {len(b)}.")
        pairs += [(data.context_text(prompt), x, y) for x, y in zip(a, b)]
    return pairs


def main(settings):
    """Ask the judge about every pair of --data, or of --a and --b; the last line is the report."""
    net, tokenizer = load_model(settings.model, settings.dtype, pick_device(settings.device))
    room = min(settings.max_length or net.config.context, net.config.context)
    chat = data.chat_of(tokenizer, settings.chat, settings.system)
    if settings.system is not None and not chat.marks:
        raise InputError("--system would change nothing: this model is asked in plain text, not in turns.")
    judge_prompt = JudgePrompt(tokenizer, settings.judge_task, room, chat)
    if settings.data is not None:
        rows, read = data.read_rows(settings.data, "ordered pairs", settings.columns)
        print(read)
        pairs = [(data.context_text(row.prompt), row.chosen, row.rejected) for row in rows[:settings.limit]]
    else:
        pairs = paired_responses(settings)
    starts = cli.progress(range(0, len(pairs), settings.batch_size), "batches judged")
    verdicts = Verdicts.join([compare(net, judge_prompt, pairs[start:start + settings.batch_size])
                              for start in starts])
    if verdicts.not_a_or_b:
        print(f"{verdicts.not_a_or_b} of {2 * len(pairs)} answers: less than half of the judge's probability "
              f"is on A and B together")
    if settings.data is not None:
        result = report(verdicts, [(len(tokenizer.encode(a)), len(tokenizer.encode(b))) for _, a, b in pairs])
    else:
        result = win_rate(verdicts, pairs)
        print("win/tie/lose:", "/".join(f"{100 * result[key]:.1f}" for key in ("win", "tie", "lose")), "%")
        if verdicts.cut:
            print(f"{verdicts.cut} of {len(pairs)} comparisons were shortened to the judge's context")
    result = {key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main, Settings)
