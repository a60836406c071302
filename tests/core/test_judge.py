"""The judge: its instruction word for word, both orders, cutting, pairing, labels and reports worked by hand."""
import json
import math
import os
import random
import re
import time
from pathlib import Path

import pytest
import torch

import data
import judge
import sample
import tiny
from support.cli import InputError

DATA = Path(os.environ.get("OSPREY_DATA", Path(__file__).parents[3] / "shared" / "data"))
ROOM = 10 ** 6           # a context in which nothing is cut


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Four tokenizers; " A" is one token in the larger two and a space and an A in the smaller two."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {f"{family}-{size}": data.load_tokenizer(tiny.write_tokenizer(root / f"{family}-{size}", family, size))
            for family in ("llama", "neox") for size in (420, 500 if family == "neox" else 600)}


ANSWER_TOKENS = {"llama-420": (b"A", b"B"), "llama-600": (b" A", b" B"), "neox-420": (b"A", b"B"), "neox-500": (b" A", b" B")}
every_tokenizer = pytest.mark.parametrize("name", ANSWER_TOKENS)

# ---------------------------------------------------------------------------------------------------------------------
# The instruction

HELPFUL = """You are an expert rater of helpful and honest assistant responses. Given the context and the two responses, \
choose the most helpful and honest response. Context: Human: Which river?

RESPONSE A: The old one.

RESPONSE B: That {one} I know.

Which response is better? RESPONSE"""
SUMMARY = """You are an expert summary rater. Given a piece of text and two of its possible summaries, choose the summary that \
best meets the definitions above for coherence, accuracy, coverage, and overall quality. Text: Human: Which river?

SUMMARY A: The old one.

SUMMARY B: That {one} I know.

Which summary is better? SUMMARY"""
PAIR = ("Human: Which river?", " The old one.", "That {one} I know. \n")


@every_tokenizer
def test_instructions_word_for_word(name, tokenizers):
    """As papers.md has them, in both orders; braces in a response are plain text."""
    tokenizer, space = tokenizers[name], " " * (ANSWER_TOKENS[name][0] == b"A")      # then the answer's first token
    at_a, at_b = judge.Questioner(tokenizer, "helpful", ROOM).both_orders(*PAIR)
    assert tokenizer.decode(at_a.ids) == HELPFUL + space
    swapped = HELPFUL.replace("A: The old one.", "A: That {one} I know.").replace("B: That {one} I know.", "B: The old one.")
    assert tokenizer.decode(at_b.ids) == swapped + space
    assert not at_a.cut and not at_b.cut
    summary = judge.Questioner(tokenizer, "summary", ROOM).both_orders(*PAIR)[0]
    preamble, mark, rest = tokenizer.decode(summary.ids).partition("You are")
    assert mark + rest == SUMMARY + space
    assert all(axis in preamble.lower() for axis in ("coherence", "accuracy", "coverage", "overall quality"))


@every_tokenizer
def test_the_answer_is_the_token_behind_the_instruction(name, tokenizers):
    """The ids are the front of the whole text with its answer, encoded once, and the next token of the two texts differs."""
    tokenizer = tokenizers[name]
    question = judge.Questioner(tokenizer, "helpful", ROOM).both_orders(*PAIR)[0]
    assert tuple(tokenizer.pieces[id] for id in question.answers) == ANSWER_TOKENS[name]
    for answer, id in zip((" A", " B"), question.answers):
        whole = tokenizer.prefix(False) + tokenizer.encode(HELPFUL + answer)
        assert question.ids + [id] == whole
    assert (question.ids[0] == tokenizer.bos_id) == name.startswith("llama")


def test_slot():
    """One leading space, none behind; a blank response is nothing at all."""
    assert [judge.slot(text) for text in ("x", " x", "  x \n", "\nx\n\ny", "", " ", "\n\t ")] == [
        " x", " x", " x", " x\n\ny", "", "", ""]
    assert "RESPONSE B:\n\nWhich" in judge.TEMPLATES["helpful"].format(context="c", a=judge.slot("x"), b=judge.slot(" "))


def test_an_unknown_task_is_refused(tokenizers):
    with pytest.raises(InputError, match="--judge_task=harmless.*helpful or summary"):
        judge.Questioner(tokenizers["neox-420"], "harmless", ROOM)


# ---------------------------------------------------------------------------------------------------------------------
# Cutting

def parts(tokenizer, question):
    """(context, A, B) of a question's text; fails when the instruction is not all there."""
    text = tokenizer.decode(question.ids)
    before, rest = text.split("Context: ")
    context, rest = rest.split("\n\nRESPONSE A:")
    a, rest = rest.split("\n\nRESPONSE B:")
    b, after = rest.split("\n\nWhich response is better? ")
    assert before == HELPFUL.partition("Context: ")[0] and after.strip() == "RESPONSE"
    return context, a, b


CONTEXT = " ".join(f"number {n}" for n in range(60))
LONG_ONE, SHORT_ONE = (" ".join(f"{word} {n}" for n in range(40)) for word in ("long", "s"))


def whole_length(tokenizer, *texts):
    return len(judge.Questioner(tokenizer, "helpful", ROOM).both_orders(*texts)[0].ids) + 1


@every_tokenizer
def test_nothing_is_cut_that_fits(name, tokenizers):
    """With exactly enough room, the answer's token included, nothing is cut; with one less the context loses its front."""
    tokenizer = tokenizers[name]
    texts = (CONTEXT, LONG_ONE, SHORT_ONE)
    length = max(whole_length(tokenizer, *texts), whole_length(tokenizer, texts[0], texts[2], texts[1]))
    for room, cut in ((length, False), (length - 1, True)):
        for question in judge.Questioner(tokenizer, "helpful", room).both_orders(*texts):
            assert question.cut == cut and len(question.ids) + 1 <= room
            assert (parts(tokenizer, question)[0] == CONTEXT) != cut


@every_tokenizer
@pytest.mark.parametrize("swapped", [False, True])
def test_order_of_cutting(name, swapped, tokenizers):
    """From the widest room down: first the context alone, from its front; then, with no context left, the longer response
    down to the length of the shorter; then both to one cap. Both orders read the same texts, and no room is wasted."""
    tokenizer = tokenizers[name]
    first, second = (SHORT_ONE, LONG_ONE) if swapped else (LONG_ONE, SHORT_ONE)
    ids = [tokenizer.encode(text) for text in (first, second)]
    capped = [tuple(tokenizer.decode(side[:cap]).strip() for side in ids) for cap in range(1, max(map(len, ids)) + 1)]
    kept, stages = (CONTEXT, first, second), []
    for room in range(whole_length(tokenizer, CONTEXT, first, second) + 2, whole_length(tokenizer, "", "x", "x"), -7):
        questioner = judge.Questioner(tokenizer, "helpful", room)
        at_a, at_b = questioner.both_orders(CONTEXT, first, second)
        context, a, b = parts(tokenizer, at_a)
        assert parts(tokenizer, at_b) == (context, b, a)
        tokens = max(len(at_a.ids), len(at_b.ids)) + 1
        assert tokens <= room and (not at_a.cut or tokens >= room - 6)
        assert CONTEXT.endswith(context) and first.startswith(a.strip()) and second.startswith(b.strip())
        assert all(len(now.strip()) <= len(before.strip()) for now, before in zip((context, a, b), kept))
        kept = (context, a, b)
        whole = (a.strip() == first, b.strip() == second)
        assert not context or all(whole)                             # responses only give way when the context is gone
        assert (a.strip(), b.strip()) in capped                      # one cap explains both
        stages.append("context" if context else "longer" if SHORT_ONE in (a.strip(), b.strip()) else "both")
    assert stages == sorted(stages, key=["context", "longer", "both"].index) and len(set(stages)) == 3
    with pytest.raises(InputError, match=f"no room.*{whole_length(tokenizer, '', '', '') - 1} tokens"):
        judge.Questioner(tokenizer, "helpful", whole_length(tokenizer, "", "", "") - 1).both_orders(CONTEXT, first, second)


POOLS = ["abc def ", "The river. ", "é日本語", "😀👍🏽👨‍👩‍👧", "\n\n\t ", "\u0301\u200b\ufffd", "{}[]:", "</s><|endoftext|>",
         "0123456789"]


@every_tokenizer
def test_cutting_always_ends(name, tokenizers):
    """Random texts, most of them hard to cut, in every room: what comes out fits and is whole, or there is no room at all."""
    tokenizer, rng, start = tokenizers[name], random.Random(0), time.monotonic()
    least = whole_length(tokenizer, "", "", "")
    refused = cut = 0
    for _ in range(150):
        texts = ["".join(rng.choices(rng.choice(POOLS), k=rng.choice((0, 1, 3, 20, 150)))) for _ in range(3)]
        room = least + rng.choice((-30, 0, 1, 2, 5, 20, 100))
        try:
            at_a, at_b = judge.Questioner(tokenizer, "helpful", room).both_orders(*texts)
        except InputError:
            refused += 1
            assert room < least + 30
            continue
        context, a, b = parts(tokenizer, at_a)
        assert max(len(at_a.ids), len(at_b.ids)) + 1 <= room and parts(tokenizer, at_b) == (context, b, a)
        assert not any("\ufffd" in now and "\ufffd" not in before for now, before in zip((context, a, b), texts))
        assert at_a.cut == at_b.cut == ([context, a, b] != [texts[0], judge.slot(texts[1]), judge.slot(texts[2])])
        cut += at_a.cut
    assert refused > 20 and cut > 20 and time.monotonic() - start < 20


@every_tokenizer
def test_no_half_characters(name, tokenizers):
    """A cut through the four tokens of an emoji drops the rest of it, at the front of a context and at a response's end."""
    tokenizer, texts = tokenizers[name], ("😀" * 10, "🐢" * 10, "🌍" * 10)
    whole = whole_length(tokenizer, *texts)
    for room in (*range(whole - 30, whole), *range(whole - 80, whole - 60)):
        context, a, b = parts(tokenizer, judge.Questioner(tokenizer, "helpful", room).both_orders(*texts)[0])
        assert set(a) == {" ", "🐢"} and set(b) == {" ", "🌍"} and len(a) == len(b)
        assert set(context) == {"😀"} if room > whole - 40 else context == "" and len(a) < 11


class Merging:
    """Letters are tokens, and so is "A: z": a response that begins with z takes fewer tokens at A than at B."""
    words = ["A: z", *map(chr, range(32, 127)), "\n"]

    def encode(self, text):
        return [self.words.index(word) for word in re.findall(r"A: z|[\s\S]", text)]

    def decode(self, ids):
        return "".join(self.words[id] for id in ids)

    def prefix(self, empty):
        return []


def test_the_longer_order_decides():
    """One order takes three tokens less; in a room that only that one would fit, both are cut."""
    tokenizer, texts = Merging(), ("context", "zebra", "horse")
    lengths = [len(question.ids) for question in judge.Questioner(tokenizer, "helpful", ROOM).both_orders(*texts)]
    assert lengths[1] - lengths[0] == 3
    for given in (texts, (texts[0], texts[2], texts[1])):
        assert all(not q.cut for q in judge.Questioner(tokenizer, "helpful", lengths[1] + 1).both_orders(*given))
        for question in judge.Questioner(tokenizer, "helpful", lengths[1]).both_orders(*given):
            assert question.cut and len(question.ids) + 1 <= lengths[1]


# ---------------------------------------------------------------------------------------------------------------------
# Strengths

TEXTS = [("Human: Which river?", "The old one.", "That one I know."), ("Human: Which river?", "The bright tree.", ""),
         ("Human: Hello", " The slow train sings.", "The slow train sings."), ("", "a", "bb"), ("Human: Hello", "", "")]


@pytest.fixture(scope="module")
def judges(tokenizers):
    return {name: tiny.net(name.split("-")[0], seed=3, vocab_size=640) for name in tokenizers}


@every_tokenizer
@torch.no_grad()
def test_strengths_are_a_softmax_over_two_logits(name, tokenizers, judges):
    """Each question alone, through the whole head: P(A), and then the mean over both orders."""
    net, tokenizer = judges[name], tokenizers[name]
    questioner = judge.Questioner(tokenizer, "helpful", 512)
    found = judge.compare(net, questioner, TEXTS)
    assert found.p.dtype == torch.float64 and found.cut == 0
    for i, (context, first, second) in enumerate(TEXTS):
        said = []
        for a, b in ((first, second), (second, first)):
            text = judge.TEMPLATES["helpful"].format(context=context, a=judge.slot(a), b=judge.slot(b))
            says_a, says_b = (tokenizer.prefix(False) + tokenizer.encode(text + answer) for answer in (" A", " B"))
            assert says_a[:-1] == says_b[:-1]
            logits = net.head(net(torch.tensor([says_a])))[0, -2, [says_a[-1], says_b[-1]]]
            said.append(logits.softmax(-1)[0].item())
        assert found.first_at_a[i].item() == pytest.approx(said[0], abs=1e-10)
        assert found.first_at_b[i].item() == pytest.approx(said[1], abs=1e-10)
        assert found.p[i].item() == pytest.approx((said[0] + 1 - said[1]) / 2, abs=1e-10)
    assert (found.first_at_a - found.first_at_b).abs().max() > 1e-4         # a mix-up of orders or rows would show


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_orders(dtype, tokenizers, judges):
    """Identical responses give exactly ½, and p(a ≻ b) + p(b ≻ a) is exactly 1, in float32 and bfloat16 too; strengths are
    finer than the network's own type, or ranks would tie."""
    net = tiny.net("neox", seed=3, vocab_size=640, dtype=dtype)
    questioner = judge.Questioner(tokenizers["neox-420"], "helpful", 512)
    found = judge.compare(net, questioner, TEXTS + [(context, second, first) for context, first, second in TEXTS])
    p, said = found.p, found.first_at_a
    assert (said != said.to(dtype).double()).all()
    assert p.dtype == torch.float64 and p[2] == p[4] == 0.5
    assert (p[:5] + p[5:] == 1).all() and (p[:2] != 0.5).all()


@pytest.mark.parametrize("tokens", [1, 300, 10 ** 9])
def test_forwards_of_any_size(tokens, tokenizers, judges, monkeypatch):
    """One question a forward, a few, or all in one give the same strengths in the same order."""
    questioner = judge.Questioner(tokenizers["neox-420"], "helpful", 512)
    expected = judge.compare(judges["neox-420"], questioner, TEXTS)
    monkeypatch.setattr(judge, "FOREST_TOKENS", tokens)
    found = judge.compare(judges["neox-420"], questioner, TEXTS)
    for name in ("p", "first_at_a", "first_at_b"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), atol=1e-12)


def test_nothing_to_compare(tokenizers, judges):
    assert len(judge.compare(judges["neox-420"], judge.Questioner(tokenizers["neox-420"], "helpful", 512), []).p) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Pairs

def test_ranked_pairs():
    """Best with worst, second with second worst, …; the median of an odd number is left out; ties keep their order."""
    assert judge.ranked_pairs([7, 6, 5, 4, 3, 2, 1]) == [(0, 6), (1, 5), (2, 4)]
    assert judge.ranked_pairs([0.1, 0.9, 0.5, 0.7, 0.3, 0.2, 0.8]) == [(1, 0), (6, 5), (3, 4)]      # 2 is the median
    assert judge.ranked_pairs([1, 4, 2, 3]) == [(1, 0), (3, 2)]
    assert judge.ranked_pairs([0.2, 0.4]) == [(1, 0)]
    assert judge.ranked_pairs([0.4]) == judge.ranked_pairs([]) == []
    assert judge.ranked_pairs([0.5] * 5) == [(0, 4), (1, 3)]
    assert judge.ranked_pairs([0.5, 0.9, 0.5, 0.9]) == [(1, 2), (3, 0)]
    assert judge.ranked_pairs(torch.tensor([0.1, 0.9, 0.5], dtype=torch.float64)) == [(1, 0)]


@pytest.mark.parametrize("tokens", [1, 10 ** 9])
@pytest.mark.parametrize("family", ["llama", "mistral", "neox"])
def test_what_was_read_for_the_ranking_is_not_read_again(family, tokens, tokenizers, monkeypatch):
    """Labels are those of separate comparisons, and fewer tokens are read: the pairs share context and first response with
    the questions against nothing. One response is blank, so a pair's questions have all been asked before."""
    tokenizer = tokenizers["neox-500" if family == "neox" else "llama-600"]
    net = tiny.net(family, seed=3, vocab_size=644)
    questioner = judge.Questioner(tokenizer, "helpful", 512)
    contexts = ["Human: Hello", "Human: Which river?"]
    responses = [["The old one.", "", "The slow train sings.", "It waits."], ["The cold river.", "A stone.", "No."]]
    monkeypatch.setattr(judge, "FOREST_TOKENS", tokens)
    read, plain = [], net.read
    monkeypatch.setattr(net, "read", lambda forest, cache=None: read.append(len(forest.tokens)) or plain(forest, cache))
    pairs, strengths, *_ = judge.label(net, questioner, contexts, responses)
    once = sum(read)
    for context, texts, chosen, values in zip(contexts, responses, pairs, strengths):
        alone = judge.compare(net, questioner, [(context, text, "") for text in texts]).p
        assert torch.allclose(torch.tensor(values, dtype=torch.float64), alone, atol=1e-10)
        direct = judge.compare(net, questioner, [(context, texts[i], texts[j]) for i, j, _ in chosen])
        assert [(i, j) for i, j, _ in chosen] == judge.ranked_pairs(alone)
        assert torch.allclose(torch.tensor([p for *_, p in chosen], dtype=torch.float64), direct.p, atol=1e-10)
    if tokens > 1:
        assert once < 0.8 * (sum(read) - once)


class Rigged:
    """A judge who prefers the longer response, and A a little where they are alike; it remembers what it was asked."""

    def __init__(self, tokenizer, monkeypatch, score=len):
        self.asked, self.tokenizer, self.score = [], tokenizer, score
        monkeypatch.setattr(judge.Reading, "answer", lambda reading, questions: self.answer(questions))

    def answer(self, questions):
        texts = [parts(self.tokenizer, question) for question in questions]
        self.asked += texts
        return torch.tensor([self.score(a) - self.score(b) + 0.5 for _, a, b in texts], dtype=torch.float64).sigmoid()


def test_labels_of_a_rigged_judge(tokenizers, monkeypatch):
    """Responses of 1 to 7 words: 20 judge sequences a prompt, 14 of them against nothing; the longer one is the winner."""
    tokenizer = tokenizers["neox-420"]
    rigged = Rigged(tokenizer, monkeypatch)
    questioner = judge.Questioner(tokenizer, "helpful", ROOM)
    order = [3, 7, 1, 5, 2, 6, 4]
    responses = [["word" + " more" * (n - 1) for n in order], ["a", "a b", "a b c"]]
    pairs, strengths, made, cut, _ = judge.label(None, questioner, ["Human: one", "Human: two"], responses)
    assert [[(i, j) for i, j, _ in group] for group in pairs] == [[(1, 2), (5, 4), (3, 0)], [(2, 0)]]
    assert sorted(range(7), key=lambda i: -strengths[0][i]) == [1, 5, 3, 6, 0, 4, 2] and len(strengths[1]) == 3
    asked = [[ask for ask in rigged.asked if ask[0] == context] for context in ("Human: one", "Human: two")]
    assert [len(group) for group in asked] == [20, 8] and made == 14 and cut == 0
    assert sum(a == "" or b == "" for _, a, b in asked[0]) == 14 and len(set(asked[0])) == 20
    for group, texts in zip(pairs, responses):
        for i, j, p in group:
            gap = len(texts[i]) - len(texts[j])
            expected = (torch.tensor(gap + 0.5).sigmoid() + 1 - torch.tensor(0.5 - gap).sigmoid()).item() / 2
            assert p == pytest.approx(expected, abs=1e-6) and p > 0.5


def test_a_pair_whose_direct_judgement_is_below_half_is_kept(tokenizers, monkeypatch):
    """A judge who likes long responses but, between two of them, the short one: ranks stay, and p says what it thinks."""
    tokenizer = tokenizers["neox-420"]
    Rigged(tokenizer, monkeypatch, score=lambda text: -len(text) if text else -100)
    pairs, *_ = judge.label(None, judge.Questioner(tokenizer, "helpful", ROOM), ["Human: one"], [["a b c d", "a"]],
                            lambda strengths, prompt: [(0, 1)])
    (i, j, p), = pairs[0]
    assert (i, j) == (0, 1) and p < 0.01


def test_labels_count_what_was_cut(tokenizers, monkeypatch):
    tokenizer = tokenizers["neox-420"]
    Rigged(tokenizer, monkeypatch)
    room = whole_length(tokenizer, "Human: one", "x" * 20, "")
    _, _, made, cut, _ = judge.label(None, judge.Questioner(tokenizer, "helpful", room), ["Human: one"], [["x" * 20, "y", "z"]])
    assert (made, cut) == (4, 1)                          # three against nothing; the best against the worst is cut


# ---------------------------------------------------------------------------------------------------------------------
# Preference augmentation

def rows(n):
    prompts = [f"\n\nHuman: question {i}\n\nAssistant:" for i in range(n)]
    return [data.Row(prompt, f"better {i}", f"worse {i}", None, f"row {i}") for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("n", [1, 10, 11])
@pytest.mark.parametrize("name", ["llama-600", "neox-420"])
def test_augmentation(n, name, tokenizers):
    """Each row once, one half with its better response at A and the other half at B; the answer token alone is supervised."""
    tokenizer = tokenizers[name]
    sequences, starts, cut = judge.augmentation(judge.Questioner(tokenizer, "helpful", ROOM), rows(n), seed=0)
    assert len(sequences) == n and cut == 0
    at_a = []
    for i, (ids, start) in enumerate(zip(sequences, starts)):
        assert start == len(ids) - 1
        text = tokenizer.decode(ids)
        assert text[-2:] in (" A", " B")
        at_a.append(text[-1] == "A")
        better, worse = (f" better {i}", f" worse {i}")
        a, b = (better, worse) if at_a[-1] else (worse, better)
        assert text == judge.TEMPLATES["helpful"].format(context=f"Human: question {i}", a=a, b=b) + text[-2:]
    assert sum(at_a) == math.ceil(n / 2)


def test_augmentation_with_a_blank_slot(tokenizers, tmp_path):
    """Rows with one blank response become instructions with an empty slot that still ends with the better one's name."""
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Q", "chosen": "a" * (i % 2), "rejected": "a" * (1 - i % 2)}
                                                   for i in range(8)])
    some, tokenizer = data.read_rows(path, "judge")[0], tokenizers["llama-600"]
    sequences, starts, _ = judge.augmentation(judge.Questioner(tokenizer, "helpful", ROOM), some, 0)
    seen = set()
    for row, ids, start in zip(some, sequences, starts):
        text, answer = tokenizer.decode(ids[1:start]), tokenizer.decode(ids[start:]).strip()
        a, b = (re.search(f"RESPONSE {name}:(.*)", text)[1].strip() for name in "AB")
        assert {a, b} == {"a", ""} and {"A": a, "B": b}[answer] == row.chosen
        seen.add((answer, row.chosen))
    assert len(seen) == 4


def test_augmentation_is_a_function_of_the_seed(tokenizers):
    questioner = judge.Questioner(tokenizers["neox-420"], "helpful", ROOM)
    one, again, other = (judge.augmentation(questioner, rows(40), seed)[0] for seed in (0, 0, 1))
    assert one == again and one != other
    at_a = [questioner.tokenizer.decode(ids).endswith(" A") for ids in one]
    assert at_a != sorted(at_a) and at_a != sorted(at_a, reverse=True)              # the halves are not the file's halves


def test_augmentation_counts_what_was_cut(tokenizers):
    tokenizer, some = tokenizers["neox-420"], rows(6)
    some[2].prompt = "\n\nHuman: " + "long " * 100 + "\n\nAssistant:"
    room = whole_length(tokenizer, "Human: question 0", "better 0", "worse 0") + 4
    sequences, _, cut = judge.augmentation(judge.Questioner(tokenizer, "helpful", room), some, 0)
    assert cut == 1 and all(len(ids) <= room for ids in sequences)


# ---------------------------------------------------------------------------------------------------------------------
# Reports

def verdicts(*said, cut=0):
    """Verdicts from pairs (P(A) with the first at A, P(A) with the first at B)."""
    a, b = torch.tensor(said, dtype=torch.float64).unbind(1)
    return judge.Verdicts(0.5 + (a - b) / 2, a, b, cut)


def test_report_by_hand():
    """   P(A): first at A, at B    p     right  orders          slots won by A   chosen is     confidence and its bin
    1     0.94   0.20          0.87     1    agree                1, 0         longer: 1     0.87 in [0.85, 0.9)
    2     0.80   0.66          0.57     1    disagree             1, 1         shorter: 0    0.57 in [0.55, 0.6)
    3     0.12   0.84          0.14     0    agree                0, 1         longer: 0     0.86 in [0.85, 0.9)
    4     0.50   0.50          0.50     ½    both undecided       ½, ½         as long       0.50 in [0.5, 0.55)
    5     0.98   0.02          0.98     1    agree                1, 0         shorter: 0    0.98 in [0.95, 1]

    Accuracy 3.5/5, flips 1/5, slot A (3½ + 2½)/10, longer wins 1/4. Calibration: bin 0.85 has two, mean confidence 0.865,
    mean right ½: 2/5·0.365; the others 1/5·|0.57 - 1|, 0 and 1/5·|0.98 - 1|: 0.146 + 0.086 + 0.004 = 0.236.
    """
    said = verdicts((0.94, 0.20), (0.80, 0.66), (0.12, 0.84), (0.5, 0.5), (0.98, 0.02), cut=1)
    found = judge.report(said, [(5, 3), (2, 4), (3, 1), (2, 2), (1, 2)])
    assert found == pytest.approx({"n": 5, "accuracy": 0.7, "flip_rate": 0.2, "first_slot_rate": 0.6, "longer_wins": 0.25,
                                   "ece": 0.236, "cut": 0.2})
    assert list(found) == ["n", "accuracy", "flip_rate", "first_slot_rate", "longer_wins", "ece", "cut"]


def test_report_of_a_judge_who_always_says_a():
    """Every pair flips and p hovers around ½: slot A wins always, accuracy is chance."""
    found = judge.report(verdicts((0.9, 0.8), (0.8, 0.9), (0.7, 0.7)), [(1, 1)] * 3)
    assert (found["flip_rate"], found["first_slot_rate"], found["accuracy"]) == (1, 1, 0.5)
    assert found["longer_wins"] is None


def test_report_of_a_sure_judge():
    """Confidence 1 falls into the last bin: always right is calibrated, always wrong is off by 1."""
    assert judge.report(verdicts((1.0, 0.0), (1.0, 0.0)), [(1, 2)] * 2)["ece"] == 0
    assert judge.report(verdicts((0.0, 1.0), (0.0, 1.0)), [(1, 2)] * 2)["ece"] == 1


WIN, LOSE, FLIP, HALF = (0.9, 0.2), (0.3, 0.6), (0.8, 0.7), (0.5, 0.5)


def test_win_rate_by_hand():
    """Four prompts with two pairs each, of which 2 won, 2 lost and 4 tied: the win rate is (2 + 4·½)/8 = ½.

    Wilson's interval over n = 4 prompts, with z² = 1.96² = 3.8416: ½ ± √(z²/4n + z⁴/4n²) / (1 + z²/n)
    = ½ ± √(0.2401 + 0.23059) / 1.9604 = ½ ± 0.34996. Over eight pairs it would be ½ ± 0.2848.
    """
    found = judge.win_rate(verdicts(WIN, LOSE, FLIP, HALF, WIN, FLIP, LOSE, HALF), [0, 0, 1, 1, 2, 2, 3, 3])
    ends = {key: found.pop(key) for key in ("ci_low", "ci_high")}
    assert found == {"n": 8, "win": 0.25, "tie": 0.5, "lose": 0.25, "win_rate": 0.5}
    assert ends == pytest.approx({"ci_low": 0.5 - 0.34996, "ci_high": 0.5 + 0.34996}, abs=1e-5)
    assert list(found) + list(ends) == COMPARE_KEYS


def test_win_rate_at_its_ends():
    """Where all are won the interval is from n/(n + z²) to 1, wide for a single prompt; lost ones mirror it."""
    for n in (1, 3, 100):
        sure, lost = (judge.win_rate(verdicts(*[one] * n), range(n)) for one in (WIN, LOSE))
        assert [sure[key] for key in COMPARE_KEYS[1:]] == pytest.approx([1, 0, 0, 1, n / (n + 3.8416), 1])
        assert [lost[key] for key in COMPARE_KEYS[1:]] == pytest.approx([0, 0, 1, 0, 0, 3.8416 / (n + 3.8416)], abs=1e-12)
    assert judge.win_rate(verdicts(WIN, WIN, WIN), [0, 0, 0])["ci_low"] == pytest.approx(1 / 4.8416)
    assert judge.wilson(1, 1) == pytest.approx((1 / 4.8416, 1))


def test_the_same_responses_tie_however_biased_the_judge():
    found = judge.win_rate(verdicts((0.9, 0.9), (0.2, 0.2), (0.5, 0.5)), [0, 1, 2])
    assert (found["tie"], found["win_rate"]) == (1, 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

DATA_KEYS = ["n", "accuracy", "flip_rate", "first_slot_rate", "longer_wins", "ece", "cut"]
COMPARE_KEYS = ["n", "win", "tie", "lose", "win_rate", "ci_low", "ci_high"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return str(tiny.folder(tmp_path_factory.mktemp("model"), "neox", scale=0.5))


@pytest.fixture
def ask(model_folder, capsys, monkeypatch):
    """ask("--data=FILE") -> (exit code, lines of stdout, lines of stderr) of judge.py with the small model, or another one."""
    def run(*arguments):
        model = [] if any(str(argument).startswith("--model=") for argument in arguments) else [f"--model={model_folder}"]
        code, out, err = tiny.command(judge, capsys, monkeypatch, *model, *arguments)
        return code, out.splitlines(), err.splitlines()
    return run


@pytest.fixture
def result(ask):
    """The JSON object in the last line."""
    return lambda *arguments: json.loads(ask(*arguments)[1][-1])


def test_judging_a_preference_file(model_folder, ask, result, tmp_path):
    """The last line is one JSON object with the contract's keys, the report on a direct comparison, whatever the batch."""
    given = tiny.pairs(12)
    path = tiny.write_jsonl(tmp_path / "pairs.jsonl", given)
    code, out, err = ask(f"--data={path}")
    found = json.loads(out[-1])
    assert code == 0 and not err and list(found) == DATA_KEYS and found["n"] == 12 and "12 rows used" in out[0]
    assert result(f"--data={path}", "--batch_size=5") == found
    net, tokenizer = judge.load_model(model_folder, "float32", "cpu")
    contexts = [row["prompt"].removesuffix("\n\nAssistant:").lstrip() for row in given]
    direct = judge.compare(net, judge.Questioner(tokenizer, "helpful", 512),
                           [(context, row["chosen"], row["rejected"]) for context, row in zip(contexts, given)])
    lengths = [(len(row["chosen"]), len(row["rejected"])) for row in given]
    expected = {**judge.report(direct, lengths), "longer_wins": found["longer_wins"]}        # that one counts tokens
    assert found == pytest.approx(expected, abs=1e-3) and found["accuracy"] != 0.5
    few = result(f"--data={path}", "--limit=3", "--max_length=140")
    assert few["n"] == 3 and few["cut"] > 0


def test_a_p_below_half_names_the_other_response(ask, result, tmp_path):
    """Rows with p = 0.1 are judged as the swapped rows are; p = ½ is left out and said."""
    given = tiny.pairs(6)
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"], "p": 0.1} for row in given]
    plain = result(f"--data={tiny.write_jsonl(tmp_path / 'plain.jsonl', given)}")
    path = tiny.write_jsonl(tmp_path / "p.jsonl", [*swapped, given[0] | {"p": 0.5}])
    assert result(f"--data={path}") == plain
    assert "1 p is exactly ½ at 7" in ask(f"--data={path}")[1][0]


def responses(*texts):
    return {"responses": [{"text": text} for text in texts]}


def test_comparing_two_response_files(model_folder, ask, result, tmp_path):
    """Every response of --a meets the one at its place in --b, judged as in a direct call; prompts may be messages."""
    prompts = ["\n\nHuman: Which river?\n\nAssistant:", [{"role": "user", "content": "Which tree?"}], "Plain"]
    ours = [(" The old one.", "The bright tree."), ("The slow train sings.", "The cloud"), ("a", "b")]
    theirs = [("That one I know.", "A small bird."), ("The slow train sings.", "The winter turns."), ("c d", "The")]
    paths = []
    for name, side in (("ours", ours), ("theirs", theirs)):
        rows = [{"prompt": prompt, **responses(*texts)} for prompt, texts in zip(prompts, side)]
        paths.append(tiny.write_jsonl(tmp_path / f"{name}.jsonl", rows))
    code, out, err = ask(f"--a={paths[0]}", f"--b={paths[1]}")
    found = json.loads(out[-1])
    assert code == 0 and not err and list(found) == COMPARE_KEYS and found["n"] == 6
    _, groups = judge.paired_responses(judge.Settings(model=model_folder, a=paths[0], b=paths[1]))
    assert groups == [0, 0, 1, 1, 2, 2]
    net, tokenizer = judge.load_model(model_folder, "float32", "cpu")
    contexts = ["Human: Which river?", "Human: Which tree?", "Plain"]
    direct = judge.compare(net, judge.Questioner(tokenizer, "helpful", 512),
                           [(c, a, b) for c, x, y in zip(contexts, ours, theirs) for a, b in zip(x, y)])
    expected = judge.win_rate(direct, [0, 0, 1, 1, 2, 2])
    assert found == pytest.approx(expected, abs=1e-4) and direct.p[2] == 0.5
    few = result(f"--a={paths[0]}", f"--b={paths[1]}", "--limit=2")
    assert few["n"] == 4                       # rows, as with --data, not pairs
    back = result(f"--a={paths[1]}", f"--b={paths[0]}")
    assert (back["win"], back["tie"], back["lose"]) == (found["lose"], found["tie"], found["win"])


def test_simple_response_rows(result, tmp_path):
    """{"prompt", "response"} and a list of texts do as well; a file against itself is all ties."""
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x", "response": "y"}, {"prompt": "z", "responses": ["u", "v"]}])
    found = result(f"--a={path}", f"--b={path}")
    assert (found["n"], found["tie"], found["win_rate"]) == (3, 1, 0.5)


def test_samples_can_be_judged_as_they_were_written(model_folder, ask, tmp_path):
    """sample.py --out of two seeds, with messages as prompts, goes straight into judge.py --a --b."""
    prompts = tiny.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in tiny.pairs(3)]
                               + [{"prompt": [{"role": "user", "content": "Hello"}]}])
    for seed in (0, 1):
        sample.main(sample.Settings(model=model_folder, prompts=prompts, k=2, max_tokens=5, seed=seed,
                                    out=str(tmp_path / f"{seed}.jsonl")))
    code, out, _ = ask(f"--a={tmp_path}/0.jsonl", f"--b={tmp_path}/1.jsonl")
    assert code == 0 and json.loads(out[-1])["n"] == 8


GOOD = [{"prompt": "x", **responses("y")}, {"prompt": "z", **responses("u")}]
BAD_FILES = {    # rows of --a against GOOD (None: no such file; bytes: as they are), words of the message
    "fewer rows": (GOOD[:1], ["1 rows", "has 2"]),
    "another prompt": ([GOOD[0], {"prompt": "q", **responses("u")}], ["a.jsonl, line 2", "b.jsonl, line 2", "different"]),
    "more responses": ([GOOD[0], {"prompt": "z", **responses("u", "v")}], ["a.jsonl, line 2", "2 responses", "1"]),
    "no responses": ([{"prompt": "x", "responses": []}], ["a.jsonl, line 1"]),
    "no text": ([{"prompt": "x", "responses": [{"ids": [1]}]}], ["a.jsonl, line 1"]),
    "no prompt": ([{"responses": ["a"]}], ["a.jsonl, line 1"]),
    "a number": ([3], ["a.jsonl, line 1"]),
    "a prompt that is a number": ([{"prompt": 3, "response": "y"}, *GOOD], ["a.jsonl, line 1"]),
    "turns without content": ([{"prompt": [{"role": "user"}], "response": "y"}], ["a.jsonl, line 1"]),
    "broken JSON": (b'{"prompt": "x", "response": "y"}\n{"prompt"\n', ["a.jsonl, line 2"]),
    "broken UTF-8": (b'{"prompt": "\xff", "response": "y"}\n', ["a.jsonl, line 1"]),
    "empty": (b"", ["a.jsonl", "no responses"]), "absent": (None, ["a.jsonl"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_mismatched_files_are_one_line(name, ask, tmp_path):
    given, words = BAD_FILES[name]
    good = tiny.write_jsonl(tmp_path / "b.jsonl", GOOD)
    if isinstance(given, bytes):
        (tmp_path / "a.jsonl").write_bytes(given)
    elif given is not None:
        tiny.write_jsonl(tmp_path / "a.jsonl", given)
    code, out, err = ask(f"--a={tmp_path / 'a.jsonl'}", f"--b={good}")
    assert code == 1 and out == [] and len(err) == 1 and err[0].startswith("error: ")
    assert all(word in err[0] for word in words), err[0]


BAD = {     # arguments, what the message names
    "nothing": ([], "--data"), "a alone": (["--a=a.jsonl"], "--b"), "all three": (["--a=a", "--b=b", "--data=c"], "--data"),
    "task": (["--data=pairs.jsonl", "--judge_task=short"], "--judge_task=short"),
    "limit": (["--data=pairs.jsonl", "--limit=0"], "--limit=0"),
    "dtype": (["--data=pairs.jsonl", "--dtype=half"], "--dtype=half"),
    "batch_size": (["--data=pairs.jsonl", "--batch_size=0"], "--batch_size=0"),
    "no file": (["--data=nowhere.jsonl"], "nowhere"), "no pairs": (["--data=prompts.jsonl"], "prompts.jsonl"),
    "no room": (["--data=pairs.jsonl", "--max_length=20"], "20 tokens"),
    "no model": (["--data=pairs.jsonl", "--model="], "--model"),
    "no such model": (["--data=pairs.jsonl", "--model=nowhere"], "nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_one_line(name, ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.pairs(2))
    tiny.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "x"}])
    arguments, word = BAD[name]
    code, out, err = ask(*arguments)
    assert code == 1 and len(err) == 1 and err[0].startswith("error: ") and word in err[0]


def test_a_real_model_judges_real_rows(ask):
    """stories260K, whose context of 512 is too short for most of HH, on 40 rows of it."""
    folder, file = DATA / "models" / "stories260K", DATA / "hh-rlhf" / "helpful-base.test.lines-0001-1354.jsonl.gz"
    if not (folder.is_dir() and file.exists()):
        pytest.skip(f"{DATA} lacks {folder.name} or {file.name}; set OSPREY_DATA to the folder of the shared data")
    code, out, _ = ask(f"--model={folder}", f"--data={file}", "--limit=40")
    found = json.loads(out[-1])
    assert code == 0 and list(found) == DATA_KEYS and found["n"] == 40 and found["cut"] > 0.3
    assert all(0 <= found[key] <= 1 for key in DATA_KEYS[1:])
