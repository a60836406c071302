"""The judge: its instruction word for word, both orders, cutting, pairs, labels and reports worked by
hand."""
import json
import math
import os
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import judge
import sample
import tiny
from experiments.bench import label
from support.verdicts import length_controlled

DATA = Path(os.environ.get("OSPREY_DATA", Path(__file__).parents[3] / "shared" / "data"))
ROOM = 10 ** 6           # a context in which nothing is cut


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Four tokenizers; " A" is one token in the larger two and a space and an A in the smaller two."""
    root, sizes = tmp_path_factory.mktemp("tokenizers"), {"llama": (420, 600), "neox": (420, 500)}
    made = {f"{family}-{size}": tiny.write_tokenizer(root / f"{family}-{size}", family, size)
            for family in sizes for size in sizes[family]}
    return {name: data.load_tokenizer(path) for name, path in made.items()}


ANSWER_TOKENS = {"llama-420": (b"A", b"B"), "llama-600": (b" A", b" B"),
                 "neox-420": (b"A", b"B"), "neox-500": (b" A", b" B")}
every_tokenizer = pytest.mark.parametrize("name", ANSWER_TOKENS)


def prompt_of(tokenizer, task="helpful", max_length=ROOM):
    return judge.JudgePrompt(tokenizer, task, max_length)


# ------------------------------------------------------------------------------------------------------------
# The instruction

HELPFUL = """You are an expert rater of helpful and honest assistant responses. Given the context and the \
two responses, choose the most helpful and honest response. Context: Human: Which river?

RESPONSE A: The old one.

RESPONSE B: That {one} I know.

Which response is better? RESPONSE"""
SUMMARY = """You are an expert summary rater. Given a piece of text and two of its possible summaries, \
choose the summary that best meets the definitions above for coherence, accuracy, coverage, and overall \
quality. Text: Human: Which river?

SUMMARY A: The old one.

SUMMARY B: That {one} I know.

Which summary is better? SUMMARY"""
PAIR = ("Human: Which river?", " The old one.", "That {one} I know. \n")


@every_tokenizer
def test_instructions_word_for_word(name, tokenizers):
    """As the paper has them, in both orders; braces in a response are plain text. The ids are the whole text
    with its answer, encoded once, up to the token in which the two answers differ."""
    tokenizer, space = tokenizers[name], " " * (ANSWER_TOKENS[name][0] == b"A")      # then the answer's first
    at_a, at_b = prompt_of(tokenizer).both_orders(*PAIR)
    assert tokenizer.decode(at_a.ids) == HELPFUL + space
    swapped = HELPFUL.replace("A: The old one.", "A: That {one} I know.")
    swapped = swapped.replace("B: That {one} I know.", "B: The old one.")
    assert tokenizer.decode(at_b.ids) == swapped + space
    assert not at_a.cut and not at_b.cut
    assert tuple(tokenizer.pieces[id] for id in at_a.answers) == ANSWER_TOKENS[name]
    for answer, id in zip((" A", " B"), at_a.answers):
        assert [*at_a.ids, id] == tokenizer.prefix(False) + tokenizer.encode(HELPFUL + answer)
    assert (at_a.ids[0] == tokenizer.bos_id) == name.startswith("llama")
    summary = prompt_of(tokenizer, "summary").both_orders(*PAIR)[0]
    preamble, mark, rest = tokenizer.decode(summary.ids).partition("You are")
    assert mark + rest == SUMMARY + space
    assert all(axis in preamble.lower() for axis in ("coherence", "accuracy", "coverage", "overall quality"))


def test_a_chat_model_is_asked_in_a_turn_and_its_own_begins_with_the_last_word(tokenizers):
    """The zephyr format writes its marks as text, so that the whole question can be spelt."""
    tokenizer = tokenizers["llama-600"]
    chat = data.chat_of(tokenizer, "zephyr")
    asked = judge.JudgePrompt(tokenizer, "helpful", ROOM, chat)
    first, second = asked.both_orders("Human: Which river?", "The old one.", "That {one} I know.")
    question = HELPFUL.removesuffix(" RESPONSE")
    turn = chat.ids([{"role": "user", "content": question}])
    word = tokenizer.encode_after("RESPONSE A")
    assert first.ids == tokenizer.prefix(False) + turn + word[:-1] and first.answers[0] == word[-1]
    assert second.answers == first.answers and len(second.ids) == len(first.ids)
    plain = judge.JudgePrompt(tokenizer, "helpful", ROOM, data.chat_of(tokenizer, "hh"))     # hh has no marks
    assert plain.both_orders("x", "y", "z") == prompt_of(tokenizer).both_orders("x", "y", "z")


def test_slot():
    """One leading space, none after; a blank response is nothing at all."""
    assert [judge.slot(text) for text in ("x", " x", "  x \n", "\nx\n\ny", "", " ", "\n\t ")] == [
        " x", " x", " x", " x\n\ny", "", "", ""]
    text = judge.TEMPLATES["helpful"].format(context="c", a=judge.slot("x"), b=judge.slot(" "))
    assert "RESPONSE B:\n\nWhich" in text


# ------------------------------------------------------------------------------------------------------------
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
    return max(len(question.ids) for question in prompt_of(tokenizer).both_orders(*texts)) + 1


@every_tokenizer
@pytest.mark.parametrize("swapped", [False, True])
def test_order_of_cutting(name, swapped, tokenizers):
    """From the widest room down: first the context alone, from its front; then, with no context left, the
    longer response down to the length of the shorter; then both to one cap. Both orders read the same texts,
    and no room is wasted. With exactly enough room, the answer's token included, nothing is cut; with one
    less, something is."""
    tokenizer = tokenizers[name]
    first, second = (SHORT_ONE, LONG_ONE) if swapped else (LONG_ONE, SHORT_ONE)
    ids = [tokenizer.encode(text) for text in (first, second)]
    capped = [tuple(tokenizer.decode(side[:cap]).strip() for side in ids)
              for cap in range(1, max(map(len, ids)) + 1)]
    whole, least = (whole_length(tokenizer, *texts) for texts in ((CONTEXT, first, second), ("", "x", "x")))
    kept, stages = (CONTEXT, first, second), []
    for room in (whole, whole - 1, *range(whole - 5, least, -7)):
        at_a, at_b = prompt_of(tokenizer, max_length=room).both_orders(CONTEXT, first, second)
        context, a, b = parts(tokenizer, at_a)
        assert parts(tokenizer, at_b) == (context, b, a) and at_a.cut == at_b.cut == (room < whole)
        tokens = max(len(at_a.ids), len(at_b.ids)) + 1
        assert room - 6 <= tokens <= room
        assert CONTEXT.endswith(context) and first.startswith(a.strip()) and second.startswith(b.strip())
        assert all(len(now.strip()) <= len(before.strip()) for now, before in zip((context, a, b), kept))
        kept = (context, a, b)
        assert not context or (a.strip(), b.strip()) == (first, second)      # responses only when it is gone
        assert (a.strip(), b.strip()) in capped                              # one cap explains both
        stages.append("context" if context else "longer" if SHORT_ONE in (a.strip(), b.strip()) else "both")
    assert stages == sorted(stages, key=["context", "longer", "both"].index) and len(set(stages)) == 3
    room = whole_length(tokenizer, "", "", "") - 1
    with pytest.raises(judge.InputError, match=f"no room.*{room} tokens"):
        prompt_of(tokenizer, max_length=room).both_orders(CONTEXT, first, second)


POOLS = ["abc def ", "The river. ", "é日本語", "😀👍🏽👨‍👩‍👧", "\n\n\t ", "\u0301\u200b\ufffd", "{}[]:",
         "</s><|endoftext|>", "0123456789"]


@every_tokenizer
def test_cutting_always_ends(name, tokenizers):
    """Random texts, most of them hard to cut, in every room: what comes out fits and is whole, or there is
    none."""
    tokenizer, rng, start = tokenizers[name], random.Random(0), time.monotonic()
    least = whole_length(tokenizer, "", "", "")
    refused = cut = 0
    for _ in range(150):
        texts = ["".join(rng.choices(rng.choice(POOLS), k=rng.choice((0, 1, 3, 20, 150)))) for _ in range(3)]
        room = least + rng.choice((-30, 0, 1, 2, 5, 20, 100))
        try:
            at_a, at_b = prompt_of(tokenizer, max_length=room).both_orders(*texts)
        except judge.InputError:
            refused += 1
            assert room < least + 30
            continue
        context, a, b = parts(tokenizer, at_a)
        assert max(len(at_a.ids), len(at_b.ids)) + 1 <= room and parts(tokenizer, at_b) == (context, b, a)
        given = (texts[0], judge.slot(texts[1]), judge.slot(texts[2]))
        broken = ["\ufffd" in now and "\ufffd" not in was for now, was in zip((context, a, b), given)]
        assert not any(broken)
        assert at_a.cut == at_b.cut == ((context, a, b) != given)
        cut += at_a.cut
    assert refused > 20 and cut > 20 and time.monotonic() - start < 60


@every_tokenizer
def test_no_half_characters(name, tokenizers):
    """A cut through the four tokens of an emoji drops the rest of it, at a context's front and a response's
    end."""
    tokenizer, texts = tokenizers[name], ("😀" * 10, "🐢" * 10, "🌍" * 10)
    whole = whole_length(tokenizer, *texts)
    for room in (*range(whole - 30, whole), *range(whole - 80, whole - 60)):
        context, a, b = parts(tokenizer, prompt_of(tokenizer, max_length=room).both_orders(*texts)[0])
        assert set(a) == {" ", "🐢"} and set(b) == {" ", "🌍"} and len(a) == len(b)
        assert set(context) == {"😀"} if room > whole - 40 else context == "" and len(a) < 11


class Merging:
    """Letters are tokens, and so is "A: z": a response that begins with z takes fewer tokens at A than at
    B."""
    words = ["A: z", *map(chr, range(32, 127)), "\n"]

    def encode(self, text):
        return [self.words.index(word) for word in re.findall(r"A: z|[\s\S]", text)]

    def decode(self, ids):
        return "".join(self.words[id] for id in ids)

    def prefix(self, empty):
        return []


def test_the_longer_order_decides():
    """One order takes three tokens less; in a room that only that one would fit, both are cut."""
    tokenizer, (context, z, h) = Merging(), ("context", "zebra", "horse")
    lengths = [len(question.ids) for question in prompt_of(tokenizer).both_orders(context, z, h)]
    assert lengths[1] - lengths[0] == 3
    for pair in ((z, h), (h, z)):
        for room, cut in ((lengths[1] + 1, False), (lengths[1], True)):
            for question in prompt_of(tokenizer, max_length=room).both_orders(context, *pair):
                assert question.cut == cut and len(question.ids) + 1 <= room


# ------------------------------------------------------------------------------------------------------------
# Strengths

TEXTS = [("Human: Which river?", "The old one.", "That one I know."),
         ("Human: Which river?", "The bright tree.", ""),
         ("Human: Hello", " The slow train sings.", "The slow train sings."),
         ("", "a", "bb"), ("Human: Hello", "", "")]


@pytest.fixture(scope="module")
def judges(tokenizers):
    return {name: tiny.net(name.split("-")[0], seed=3, vocab_size=640) for name in tokenizers}


@every_tokenizer
@torch.no_grad()
def test_strengths_are_a_softmax_over_two_logits(name, tokenizers, judges, monkeypatch):
    """Each question alone, through the whole head: P(A), the mean over both orders, and how often A and B
    have less than half the probability. One question in a forward, a few, or all in one give the same."""
    net, tokenizer = judges[name], tokenizers[name]
    expected, beside, mass = torch.zeros(3, len(TEXTS), dtype=torch.float64), 0, 0.0
    for i, (context, first, second) in enumerate(TEXTS):
        for order, (a, b) in enumerate(((first, second), (second, first)), 1):
            text = judge.TEMPLATES["helpful"].format(context=context, a=judge.slot(a), b=judge.slot(b))
            says = [tokenizer.prefix(False) + tokenizer.encode(text + answer) for answer in (" A", " B")]
            assert says[0][:-1] == says[1][:-1]
            logits, answers = net.head(net(torch.tensor(says[:1])))[0, -2], [ids[-1] for ids in says]
            expected[order, i] = logits[answers].softmax(-1)[0]
            beside += bool(logits.softmax(-1)[answers].sum() < 0.5)
            mass += float(logits.softmax(-1)[answers].sum())
    expected[0] = (expected[1] + 1 - expected[2]) / 2
    assert (expected[1] - expected[2]).abs().max() > 1e-4         # a mix-up of orders or rows would show
    for tokens in (judge.FOREST_TOKENS, 300, 1):
        monkeypatch.setattr(judge, "FOREST_TOKENS", tokens)
        found = judge.compare(net, prompt_of(tokenizer, max_length=512), TEXTS)
        assert found.p.dtype == torch.float64 and (found.cut, found.not_a_or_b) == (0, beside)
        assert found.a_or_b == pytest.approx(mass, rel=1e-5)
        said = torch.stack((found.p, found.first_at_a, found.first_at_b))
        assert torch.allclose(said, expected, atol=1e-10)
    assert len(judge.compare(net, prompt_of(tokenizer), []).p) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_orders(dtype, tokenizers):
    """Identical responses give exactly ½, and p(a ≻ b) + p(b ≻ a) is exactly 1, in float32 and bfloat16 too;
    strengths are finer than the network's own type, or ranks would tie."""
    net = tiny.net("neox", seed=3, vocab_size=640, dtype=dtype)
    swapped = [(context, second, first) for context, first, second in TEXTS]
    found = judge.compare(net, prompt_of(tokenizers["neox-420"], max_length=512), TEXTS + swapped)
    p, said = found.p, found.first_at_a
    assert (said != said.to(dtype).double()).all()
    assert p.dtype == torch.float64 and p[2] == p[4] == 0.5
    assert (p[:5] + p[5:] == 1).all() and (p[:2] != 0.5).all()


# ------------------------------------------------------------------------------------------------------------
# Pairs

def test_pairings():
    """Best with worst, second best with second worst, …; the median of an odd number is left out; ties keep
    their order. The extremes are the first of these."""
    for strengths, pairs in (
            ([7, 6, 5, 4, 3, 2, 1], [(0, 6), (1, 5), (2, 4)]),
            ([0.1, 0.9, 0.5, 0.7, 0.3, 0.2, 0.8], [(1, 0), (6, 5), (3, 4)]),       # 2 is the median
            ([1, 4, 2, 3], [(1, 0), (3, 2)]), ([0.2, 0.4], [(1, 0)]), ([0.4], []), ([], []),
            ([0.5] * 5, [(0, 4), (1, 3)]), ([0.5, 0.9, 0.5, 0.9], [(1, 2), (3, 0)]),
            (torch.tensor([0.1, 0.9, 0.5], dtype=torch.float64), [(1, 0)])):
        assert judge.ranked_pairs(strengths) == judge.PAIRINGS["ranked"](strengths, None) == pairs
        assert judge.PAIRINGS["extremes"](strengths, None) == pairs[:1]
        assert judge.PAIRINGS["best"](strengths, None) == []
        drawn = judge.PAIRINGS["random"](strengths, np.random.default_rng(0))
        assert len(set(sum(drawn, ()))) == 2 * len(drawn) == 2 * len(pairs)


@pytest.mark.parametrize("tokens", [1, 10 ** 9])
@pytest.mark.parametrize("family", ["llama", "mistral", "neox"])
def test_what_was_read_for_the_ranking_is_not_read_again(family, tokens, tokenizers, monkeypatch):
    """Labels are those of separate comparisons, and fewer tokens are read: the pairs share context and first
    response with the questions against nothing. One response is blank: its pair's questions have all been
    asked before."""
    net = tiny.net(family, seed=3, vocab_size=644)
    judge_prompt = prompt_of(tokenizers["neox-500" if family == "neox" else "llama-600"], max_length=512)
    contexts = ["Human: Hello", "Human: Which river?"]
    responses = [["The old one.", "", "The slow train sings.", "It waits."],
                 ["The cold river.", "A stone.", "No."]]
    monkeypatch.setattr(judge, "FOREST_TOKENS", tokens)
    read, plain = [], net.hidden
    monkeypatch.setattr(net, "hidden", lambda forest, cache=None: (
        read.append(len(forest.tokens)) or plain(forest, cache)))
    strengths, pairs, _ = label(net, judge_prompt, contexts, responses)
    once = sum(read)
    for context, texts, chosen, values in zip(contexts, responses, pairs, strengths):
        alone = judge.compare(net, judge_prompt, [(context, text, "") for text in texts]).p
        assert values == pytest.approx(alone.tolist(), abs=1e-10)
        assert [(i, j) for i, j, _ in chosen] == judge.ranked_pairs(alone)
        direct = judge.compare(net, judge_prompt, [(context, texts[i], texts[j]) for i, j, _ in chosen])
        assert [p for *_, p in chosen] == pytest.approx(direct.p.tolist(), abs=1e-10)
    if tokens > 1:
        assert once < 0.8 * (sum(read) - once)


class Rigged:
    """A judge who prefers the longer response, and A a little where they are alike; it notes what it is
    asked."""

    def __init__(self, tokenizer, monkeypatch, score=len):
        self.asked, self.tokenizer, self.score = [], tokenizer, score
        monkeypatch.setattr(judge.JudgePass, "answer", lambda judge_pass, questions: self.answer(questions))
        monkeypatch.setattr(judge.forest, "Cache", lambda config: None)

    def answer(self, questions):
        texts = [parts(self.tokenizer, question) for question in questions]
        self.asked += texts
        gaps = torch.tensor([self.score(a) - self.score(b) + 0.5 for _, a, b in texts], dtype=torch.float64)
        return gaps.sigmoid(), torch.ones(len(texts))


NOBODY = tiny.net()                        # a network for judges who are rigged


def test_labels_of_a_rigged_judge(tokenizers, monkeypatch):
    """Responses of 1 to 7 words: 20 questions per prompt, 14 of them against nothing; the longer one wins."""
    tokenizer = tokenizers["neox-420"]
    rigged, contexts = Rigged(tokenizer, monkeypatch), ["Human: one", "Human: two"]
    responses = [["word" + " more" * (n - 1) for n in (3, 7, 1, 5, 2, 6, 4)], ["a", "a b", "a b c"]]
    strengths, pairs, verdicts = label(NOBODY, prompt_of(tokenizer), contexts, responses)
    assert [[(i, j) for i, j, _ in group] for group in pairs] == [[(1, 2), (5, 4), (3, 0)], [(2, 0)]]
    assert sorted(range(7), key=lambda i: -strengths[0][i]) == [1, 5, 3, 6, 0, 4, 2]
    assert len(strengths[1]) == 3
    asked = [[ask for ask in rigged.asked if ask[0] == context] for context in contexts]
    assert [len(group) for group in asked] == [20, 8] and len(verdicts.p) == 14 and verdicts.cut == 0
    assert sum(a == "" or b == "" for _, a, b in asked[0]) == 14 and len(set(asked[0])) == 20
    for group, texts in zip(pairs, responses):
        for i, j, p in group:
            gap = len(texts[i]) - len(texts[j])
            expected = 0.5 / (1 + math.exp(-gap - 0.5)) + 0.5 / (1 + math.exp(0.5 - gap))
            assert p == pytest.approx(expected, abs=1e-6) and p > 0.5


def test_a_pair_whose_direct_judgement_is_below_half_is_kept(tokenizers, monkeypatch):
    """A judge who likes long responses but, of two, the short one: ranks stay, and p says what it thinks."""
    Rigged(tokenizers["neox-420"], monkeypatch, score=lambda text: -len(text) if text else -100)
    _, pairs, _ = label(NOBODY, prompt_of(tokenizers["neox-420"]), ["Human: one"], [["a b c d", "a"]])
    (i, j, p), = pairs[0]
    assert (i, j) == (0, 1) and p < 0.01


def test_labels_count_what_was_cut(tokenizers, monkeypatch):
    """Three against nothing fit; the best against the worst is cut."""
    tokenizer, x = tokenizers["neox-420"], "x" * 20
    Rigged(tokenizer, monkeypatch)
    judge_prompt = prompt_of(tokenizer, max_length=whole_length(tokenizer, "Human: one", x, ""))
    _, _, verdicts = label(NOBODY, judge_prompt, ["Human: one"], [[x, "y", "z"]])
    assert (len(verdicts.p), verdicts.cut) == (4, 1)


# ------------------------------------------------------------------------------------------------------------
# Preference augmentation

def rows(n):
    return [data.Row(f"\n\nHuman: question {i}\n\nAssistant:", f"better {i}", f"worse {i}", None, f"row {i}")
            for i in range(n)]


@pytest.mark.parametrize("n", [1, 11, 40])
@pytest.mark.parametrize("name", ["llama-600", "neox-420"])
def test_augmentation(n, name, tokenizers):
    """Each row once, one half (not the file's) with its better response at A, the other half at B, as the
    seed has it; the answer token alone is supervised."""
    judge_prompt, tokenizer = prompt_of(tokenizers[name]), tokenizers[name]
    sequences, starts, cut = judge.augmentation(judge_prompt, rows(n), seed=0)
    assert len(sequences) == n and cut == 0 and starts == [len(ids) - 1 for ids in sequences]
    at_a = []
    for i, ids in enumerate(sequences):
        text = tokenizer.decode(ids)
        assert text[-2:] in (" A", " B")
        at_a.append(text[-1] == "A")
        a, b = (f" better {i}", f" worse {i}") if at_a[-1] else (f" worse {i}", f" better {i}")
        assert text[:-2] == judge.TEMPLATES["helpful"].format(context=f"Human: question {i}", a=a, b=b)
    assert sum(at_a) == math.ceil(n / 2)
    assert n < 40 or at_a not in (sorted(at_a), sorted(at_a, reverse=True))
    assert judge.augmentation(judge_prompt, rows(n), 0)[0] == sequences
    assert n < 40 or judge.augmentation(judge_prompt, rows(n), 1)[0] != sequences


def test_augmentation_with_a_blank_slot(tokenizers, tmp_path):
    """Rows with one blank response become instructions with an empty slot that end with the better one's
    name."""
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [
        {"prompt": "Q", "chosen": "a" * (i % 2), "rejected": "a" * (1 - i % 2)} for i in range(8)])
    given, tokenizer, seen = data.read_rows(path, "judge")[0], tokenizers["llama-600"], set()
    sequences, starts, _ = judge.augmentation(prompt_of(tokenizer), given, 0)
    for row, ids, start in zip(given, sequences, starts, strict=True):
        text, answer = tokenizer.decode(ids[1:start]), tokenizer.decode(ids[start:]).strip()
        a, b = (re.search(f"RESPONSE {name}:(.*)", text)[1].strip() for name in "AB")
        assert {a, b} == {"a", ""} and {"A": a, "B": b}[answer] == row.chosen
        seen.add((answer, row.chosen))
    assert len(seen) == 4


def test_augmentation_counts_what_was_cut(tokenizers):
    tokenizer, given = tokenizers["neox-420"], rows(6)
    given[2].prompt = "\n\nHuman: " + "long " * 100 + "\n\nAssistant:"
    room = whole_length(tokenizer, "Human: question 0", "better 0", "worse 0") + 4
    sequences, _, cut = judge.augmentation(prompt_of(tokenizer, max_length=room), given, 0)
    assert cut == 1 and all(len(ids) <= room for ids in sequences)


# ------------------------------------------------------------------------------------------------------------
# Reports

def verdicts(*said, cut=0):
    """Verdicts from pairs (P(A) with the first at A, P(A) with the first at B)."""
    a, b = torch.tensor(said, dtype=torch.float64).unbind(1)
    return judge.Verdicts(0.5 + (a - b) / 2, a, b, cut)


def test_report_by_hand():
    """   P(A): first at A, at B   p     right  orders           slots won by A   chosen is   confidence, bin
    1     0.94   0.20         0.87     1    agree                 1, 0         longer: 1   0.87 in [0.85, 0.9)
    2     0.80   0.66         0.57     1    disagree              1, 1         shorter: 0  0.57 in [0.55, 0.6)
    3     0.12   0.84         0.14     0    agree                 0, 1         longer: 0   0.86 in [0.85, 0.9)
    4     0.50   0.50         0.50     ½    both undecided        ½, ½         as long     0.50 in [0.5, 0.55)
    5     0.98   0.02         0.98     1    agree                 1, 0         shorter: 0  0.98 in [0.95, 1]

    Accuracy 3.5/5, flips 1/5, slot A (3½ + 2½)/10, longer wins 1/4. Calibration: bin 0.85 has two, of mean
    confidence 0.865, mean right ½: 2/5·0.365; the others have 1/5·|0.57 - 1|, 0 and 1/5·|0.98 - 1|:
    0.146 + 0.086 + 0.004 = 0.236.
    """
    said = verdicts((0.94, 0.20), (0.80, 0.66), (0.12, 0.84), (0.5, 0.5), (0.98, 0.02), cut=1)
    found = judge.report(said, [(5, 3), (2, 4), (3, 1), (2, 2), (1, 2)])
    assert found == pytest.approx({"n": 5, "accuracy": 0.7, "flip_rate": 0.2, "first_slot_rate": 0.6,
                                   "longer_wins": 0.25, "ece": 0.236, "cut": 0.2})
    assert list(found) == DATA_KEYS
    joined = judge.Verdicts.join([verdicts((0.94, 0.20), (0.80, 0.66)), verdicts((0.12, 0.84), cut=1), said])
    assert joined.cut == 2 and joined.p.tolist() == [*said.p[:3].tolist(), *said.p.tolist()]


def test_report_at_its_ends():
    """Who always says A flips always and has chance accuracy; confidence 1 falls into the last bin: always
    right is calibrated, always wrong is off by 1."""
    found = judge.report(verdicts((0.9, 0.8), (0.8, 0.9), (0.7, 0.7)), [(1, 1)] * 3)
    assert (found["flip_rate"], found["first_slot_rate"], found["accuracy"]) == (1, 1, 0.5)
    assert found["longer_wins"] is None
    assert judge.report(verdicts((1.0, 0.0), (1.0, 0.0)), [(1, 2)] * 2)["ece"] == 0
    assert judge.report(verdicts((0.0, 1.0), (0.0, 1.0)), [(1, 2)] * 2)["ece"] == 1


WIN, LOSE, FLIP, HALF = (0.9, 0.2), (0.3, 0.6), (0.8, 0.7), (0.5, 0.5)


def win_rate(said, contexts):
    """judge.win_rate of responses that are all as long."""
    return judge.win_rate(verdicts(*said), [(context, "x", "y") for context in contexts])


def test_win_rate_by_hand():
    """Four prompts with two pairs each, of which 2 won, 2 lost and 4 tied: the win rate is (2 + 4·½)/8 = ½.

    Wilson's interval over n = 4 prompts, with z² = 1.96² = 3.8416: ½ ± √(z²/4n + z⁴/4n²) / (1 + z²/n)
    = ½ ± √(0.2401 + 0.23059) / 1.9604 = ½ ± 0.34996. Over eight pairs it would be ½ ± 0.2848.
    """
    found = win_rate((WIN, LOSE, FLIP, HALF, WIN, FLIP, LOSE, HALF), [0, 0, 1, 1, 2, 2, 3, 3])
    assert list(found) == COMPARE_KEYS and found.pop("lc_win_rate") == 0.5
    ends = {key: found.pop(key) for key in ("ci_low", "ci_high")}
    assert found == {"n": 8, "win": 0.25, "tie": 0.5, "lose": 0.25, "win_rate": 0.5}
    assert ends == pytest.approx({"ci_low": 0.5 - 0.34996, "ci_high": 0.5 + 0.34996}, abs=1e-5)
    found = win_rate(((0.9, 0.9), (0.2, 0.2), HALF), [0, 1, 2])                    # biased, the same texts
    assert (found["tie"], found["win_rate"]) == (1, 0.5)


def test_win_rate_at_its_ends():
    """All won: the interval is from n/(n + z²) to 1, wide for a single prompt; lost ones mirror it."""
    for n in (1, 3, 100):
        sure, lost = (list(win_rate([one] * n, range(n)).values()) for one in (WIN, LOSE))
        assert sure[1:] == pytest.approx([1, 0, 0, 1, n / (n + 3.8416), 1, 1])
        assert lost[1:] == pytest.approx([0, 0, 1, 0, 0, 3.8416 / (n + 3.8416), 0], abs=1e-12)
    assert win_rate((WIN, WIN, WIN), [0, 0, 0])["ci_low"] == pytest.approx(1 / 4.8416)


def test_length_controlled_by_hand():
    """Half of the pairs have Δ = d and are won in 80 %, half have Δ = -d and are won in 50 %. Two rates, two
    parameters: θ + φt = logit 0.8 = ln 4 and θ - φt = 0, so θ = ln 2 and σ(θ) = ⅔, where the plain rate is
    0.65. Won in 90 % when longer and 10 % when shorter, longer in three of four: plain 0.7, controlled ½.
    """
    def found(*groups):
        score, gap = (np.concatenate(part) for part in zip(*(
            (np.repeat((1.0, 0.0), (wins, n - wins)), np.full(n, d)) for n, wins, d in groups)))
        return score.mean(), length_controlled(score, gap)
    assert found((2000, 1600, 70.0), (2000, 1000, -70.0)) == pytest.approx((0.65, 2 / 3), abs=1e-4)
    assert found((3000, 2700, 9.0), (1000, 100, -9.0)) == pytest.approx((0.7, 0.5), abs=1e-4)


def test_length_controlled_is_a_logistic_regression():
    """Scores that follow σ(0.4 + 1.3 tanh(Δ/s)) give σ(0.4) back. Ten pairs: as scikit-learn 1.9's
    LogisticRegression(C=100) fits them, whose intercept has no penalty. The other side has the rest."""
    gap = np.random.default_rng(0).normal(40, 300, 5000)
    score = 1 / (1 + np.exp(-0.4 - 1.3 * np.tanh(gap / gap.std(ddof=1))))
    assert length_controlled(score, gap) == pytest.approx(1 / (1 + math.exp(-0.4)), abs=1e-5)
    score = np.array([1, 1, 1, 0, 0.5, 0, 1, 0.5, 0, 1])
    gap = np.array([120, 300, 40, -80, 10, 60, 500, -20, -150, -30.0])
    assert length_controlled(score, gap) == pytest.approx(0.5272618216, abs=1e-9)
    assert length_controlled(score, gap) + length_controlled(1 - score, -gap) == pytest.approx(1, abs=1e-12)


def test_length_controlled_at_its_ends():
    """Where lengths do not differ, or differ alike, it is the plain win rate; so it is where all is won.
    Where length alone tells who wins, with as many of each, it is ½ and finite."""
    score = np.array([1.0, 0.0, 1.0, 0.5])
    for gap in (np.zeros(4), np.full(4, 30.0)):
        assert length_controlled(score, gap) == score.mean()
    assert length_controlled(np.ones(3), np.array([5.0, -2.0, 900.0])) == 1
    assert length_controlled(np.array([1.0]), np.array([5.0])) == 1
    assert length_controlled(np.array([1.0, 0, 1, 0]), np.array([5.0, -5, 8, -8])) == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------------------
# Command line

DATA_KEYS = ["n", "accuracy", "flip_rate", "first_slot_rate", "longer_wins", "ece", "cut"]
COMPARE_KEYS = ["n", "win", "tie", "lose", "win_rate", "ci_low", "ci_high", "lc_win_rate"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return str(tiny.folder(tmp_path_factory.mktemp("model"), "neox", scale=0.5))


@pytest.fixture
def ask(model_folder, capsys, monkeypatch):
    """ask("--data=FILE") -> (exit code, lines of stdout, of stderr) of judge.py with the small model, or
    another."""
    def run(*arguments):
        named = any(argument.startswith("--model=") for argument in arguments)
        model = [] if named else [f"--model={model_folder}"]
        code, out, err = tiny.command(judge, capsys, monkeypatch, *model, *arguments)
        return code, out.splitlines(), err.splitlines()
    return run


@pytest.fixture
def result(ask):
    """The JSON object in the last line."""
    return lambda *arguments: json.loads(ask(*arguments)[1][-1])


def test_judging_a_preference_file(model_folder, ask, result, tmp_path):
    """The last line is the report on a direct comparison, whatever the batch. Rows with p = 0.1 are judged as
    the swapped rows are; p = ½ is left out and said."""
    given = tiny.pairs(12)
    path = tiny.write_jsonl(tmp_path / "pairs.jsonl", given)
    code, out, err = ask(f"--data={path}")
    found = json.loads(out[-1])
    assert code == 0 and not err and list(found) == DATA_KEYS
    assert found["n"] == 12 and "12 rows used" in out[0]
    assert result(f"--data={path}", "--batch_size=5") == found
    net, tokenizer = judge.load_model(model_folder, "float32", "cpu")
    contexts = [row["prompt"].removesuffix("\n\nAssistant:").lstrip() for row in given]
    direct = judge.compare(net, prompt_of(tokenizer, max_length=512),
                           [(text, row["chosen"], row["rejected"]) for text, row in zip(contexts, given)])
    expected = judge.report(direct, [(len(row["chosen"]), len(row["rejected"])) for row in given])
    expected["longer_wins"] = found["longer_wins"]                                 # that one counts tokens
    assert found == pytest.approx(expected, abs=1e-3) and found["accuracy"] != 0.5
    few = result(f"--data={path}", "--limit=3", "--max_length=140")
    assert few["n"] == 3 and few["cut"] > 0
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"], "p": 0.1} for row in given]
    path = tiny.write_jsonl(tmp_path / "p.jsonl", [*swapped, given[0] | {"p": 0.5}])
    assert result(f"--data={path}") == found
    assert "1 p is exactly ½ at 13" in ask(f"--data={path}")[1][0]


def responses(*texts):
    return {"responses": [{"text": text} for text in texts]}


def test_comparing_two_response_files(model_folder, ask, result, tmp_path):
    """Every response of --a meets the one at its place in --b, judged as in a direct call; prompts may be
    messages. {"prompt", "response"} and a list of texts do as well; a file against itself is all ties."""
    prompts = ["\n\nHuman: Which river?\n\nAssistant:", [{"role": "user", "content": "Which tree?"}], "Plain"]
    ours = [(" The old one.", "The bright tree."), ("The slow train sings.", "The cloud"), ("a", "b")]
    theirs = [("That one I know.", "A small bird."), ("The slow train sings.", "A lamp."), ("c d", "The")]
    a, b = (tiny.write_jsonl(tmp_path / name, [{"prompt": prompt, **responses(*texts)}
                                               for prompt, texts in zip(prompts, side)])
            for name, side in (("ours.jsonl", ours), ("theirs.jsonl", theirs)))
    code, out, err = ask(f"--a={a}", f"--b={b}")
    found = json.loads(out[-1])
    assert code == 0 and not err and list(found) == COMPARE_KEYS and found["n"] == 6
    net, tokenizer = judge.load_model(model_folder, "float32", "cpu")
    contexts = ["Human: Which river?", "Human: Which tree?", "Plain"]
    pairs = [(c, x, y) for c, xs, ys in zip(contexts, ours, theirs) for x, y in zip(xs, ys)]
    direct = judge.compare(net, prompt_of(tokenizer, max_length=512), pairs)
    assert found == pytest.approx(judge.win_rate(direct, pairs), abs=1e-4) and direct.p[2] == 0.5
    assert out[-2] == "win/tie/lose: " + "/".join(
        f"{100 * found[key]:.1f}" for key in ("win", "tie", "lose")) + " %"
    assert result(f"--a={a}", f"--b={b}", "--limit=2")["n"] == 4             # rows, as with --data, not pairs
    back = result(f"--a={b}", f"--b={a}")
    assert (back["win"], back["tie"], back["lose"]) == (found["lose"], found["tie"], found["win"])
    path = tiny.write_jsonl(tmp_path / "simple.jsonl", [{"prompt": "x", "response": "y"},
                                                        {"prompt": "z", "responses": ["u", "v"]}])
    found = result(f"--a={path}", f"--b={path}")
    assert (found["n"], found["tie"], found["win_rate"]) == (3, 1, 0.5)


def test_mt_bench_is_judged_turn_by_turn(model_folder, ask, result, tmp_path):
    """Two turns are two pairs of one prompt; the second is judged with all that was said after the first
    question. The interval is that of two prompts. Without the questions nothing is judged. AlpacaEval's rows
    meet plain ones that answer the same."""
    asked = [{"question_id": i, "category": "math", "turns": [f"Which {thing}?", "And then?"]}
             for i, thing in enumerate(("river", "tree"))]
    answers = {"a": ("The old one.", "It moves."), "b": ("A stone.", "It waits and waits.")}
    for name, turns in answers.items():
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", [
            {"question_id": i, "model_id": name, "choices": [{"index": 0, "turns": turns}]} for i in (0, 1)])
    questions = tiny.write_jsonl(tmp_path / "question.jsonl", asked)
    sides = [f"--a={tmp_path}/a.jsonl", f"--b={tmp_path}/b.jsonl"]
    found = result(*sides, f"--questions={questions}")
    net, tokenizer = judge.load_model(model_folder, "float32", "cpu")
    pairs = [(f"Human: {one['turns'][0]}", *texts) for one in asked for texts in (
        [turns[0] for turns in answers.values()],
        ["{}\n\nHuman: And then?\n\nAssistant: {}".format(*turns) for turns in answers.values()])]
    direct = judge.compare(net, prompt_of(tokenizer, max_length=512), pairs)
    assert found == pytest.approx(judge.win_rate(direct, pairs), abs=1e-4) and found["n"] == 4
    code, _, err = ask(*sides)
    assert code == 1 and "a.jsonl, line 1" in err[0] and "--questions" in err[0]
    plain = [{"instruction": one["turns"][0], "output": "y", "generator": "g"} for one in asked]
    path = tiny.write_jsonl(tmp_path / "alpaca.jsonl", plain)
    other = tiny.write_jsonl(tmp_path / "c.jsonl", [{"prompt": row["instruction"], "response": "x"}
                                                    for row in plain])
    assert result(f"--a={path}", f"--b={other}")["n"] == 2


@pytest.mark.parametrize("name", ["final_layer_norm.weight", "dense.weight", "embed_out.weight"])
def test_a_judge_that_is_not_finite_says_so(name, ask, tmp_path):
    """One Inf in its weights is no accuracy of 0 %. In the head it is one of each sign, for one of the two is
    no more than a token that never comes."""
    folder = tiny.folder(tmp_path / "model", "neox", scale=0.5)
    tensors = load_file(folder / "model.safetensors")
    damaged = next(tensor for key, tensor in sorted(tensors.items()) if key.endswith(name))
    damaged.view(-1)[0] = math.inf
    if name == "embed_out.weight":
        damaged[1, 0] = -math.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.pairs(3))
    code, out, err = ask(f"--model={folder}", f"--data={path}")
    assert code == 1 and not out[1:] and len(err) == 1 and "not finite" in err[0]


def test_samples_can_be_judged_as_they_were_written(model_folder, ask, tmp_path):
    """sample.py --out of two seeds, with messages as prompts, goes straight into judge.py --a --b."""
    given = [{"prompt": row["prompt"]} for row in tiny.pairs(3)]
    prompts = tiny.write_jsonl(tmp_path / "prompts.jsonl",
                               [*given, {"prompt": [{"role": "user", "content": "Hello"}]}])
    for seed in (0, 1):
        sample.main(sample.Settings(model=model_folder, prompts=prompts, k=2, max_tokens=5, seed=seed,
                                    out=str(tmp_path / f"{seed}.jsonl")))
    code, out, _ = ask(f"--a={tmp_path}/0.jsonl", f"--b={tmp_path}/1.jsonl")
    assert code == 0 and json.loads(out[-1])["n"] == 8


GOOD = [{"prompt": "x", **responses("y")}, {"prompt": "z", **responses("u")}]
BAD_FILES = {    # rows of --a against GOOD (None: no such file; bytes: as they are), words of the message
    "fewer rows": (GOOD[:1], ["1 rows", "has 2"]),
    "another prompt": ([GOOD[0], {"prompt": "q", **responses("u")}], ["a.jsonl, line 2", "b.jsonl, line 2"]),
    "more responses": ([GOOD[0], {"prompt": "z", **responses("u", "v")}], ["a.jsonl, line 2", "2 resp"]),
    "no responses": ([{"prompt": "x", "responses": []}], ["a.jsonl, line 1"]),
    "no list": ([{"prompt": "x", "responses": "abc"}], ["a.jsonl, line 1"]),
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


BAD = {     # arguments: what the message names
    "": "--data", "--a=a.jsonl": "--b", "--a=a --b=b --data=c": "--data",
    "--data=p.jsonl --judge_task=short": "--judge_task=short",
    "--data=p.jsonl --limit=0": "--limit=0", "--data=p.jsonl --dtype=half": "--dtype=half",
    "--data=p.jsonl --batch_size=0": "--batch_size=0", "--data=nowhere.jsonl": "nowhere",
    "--data=prompts.jsonl": "prompts.jsonl", "--data=p.jsonl --max_length=20": "20 tokens",
    "--data=p.jsonl --model=": "--model", "--data=p.jsonl --model=nowhere": "nowhere",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_settings_are_one_line(arguments, ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_jsonl(tmp_path / "p.jsonl", tiny.pairs(2))
    tiny.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "x"}])
    code, _, err = ask(*arguments.split())
    assert code == 1 and len(err) == 1 and err[0].startswith("error: ") and BAD[arguments] in err[0]


def test_a_real_model_judges_real_rows(ask):
    """stories260K, whose context of 512 is too short for most of HH, on 40 rows of it."""
    folder, file = DATA / "models/stories260K", DATA / "hh-rlhf/helpful-base.test.lines-0001-1354.jsonl.gz"
    if not (folder.is_dir() and file.exists()):
        pytest.skip(f"{DATA} lacks {folder.name} or {file.name}; OSPREY_DATA names another folder")
    code, out, _ = ask(f"--model={folder}", f"--data={file}", "--limit=40")
    found = json.loads(out[-1])
    assert code == 0 and list(found) == DATA_KEYS and found["n"] == 40 and found["cut"] > 0.3
    assert all(0 <= found[key] <= 1 for key in DATA_KEYS[1:])
