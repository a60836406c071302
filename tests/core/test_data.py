"""Text to ids: the joints of a sequence, the chats, what is cut, and p in front of it."""
import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece

import data
from support.chats import FORMATS
from support.cli import InputError
from support.rows import ASSISTANT, Row, Unusable, read_rows
from support.template import ChatTemplate
from tiny import assistant, system, user

DATA = Path(os.environ.get("OSPREY_DATA") or Path(__file__).parents[3] / "shared/data")


def shared(path):
    if not (DATA / path).exists():
        pytest.skip(f"{DATA / path} is not here; OSPREY_DATA names the folder of the shared data")
    return DATA / path


class FakeTokenizer:
    """Words with the space before them are ids, given out as they are met; as with sentencepiece a text alone
    gets a space in front. decode shows special ids by name, so that a test can compare strings."""
    chat_template = None
    stop_ids = {2}
    eos_id = 2

    def __init__(self, special=(), bos=True, word_start=True):
        self.words = ["<unk>", "<s>", "</s>", *special]
        self.special_ids = {token: i for i, token in enumerate(self.words)}
        self.ids, self.bos, self.word_start = {}, bos, word_start
        self.adds_bos, self.later_starts = bos, word_start
        self.special_tokens = {"bos_token": "<s>", "eos_token": "</s>"}

    def encode_after(self, text):
        ids = []
        for word in re.findall(r" ?\w+| ?[^\w\s]+|\s", text):
            if word not in self.ids:
                self.ids[word] = len(self.words)
                self.words.append(word)
            ids.append(self.ids[word])
        return ids

    def encode(self, text):
        return self.encode_after(" " * self.word_start + text) if text else []

    def prefix(self, empty):
        return [1] if self.bos else [self.eos_id] if empty else []

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


def prompt_ids(tokenizer, prompt, name):
    return data.prompt_ids(tokenizer, prompt, data.chat_of(tokenizer, name))


def response_ids(tokenizer, prompt, response, name, *more, **options):
    return data.response_ids(tokenizer, prompt, response, data.chat_of(tokenizer, name), *more, **options)


def encode_pair(tokenizer, row, name, *limits, **options):
    return data.encode_pair(tokenizer, row, data.chat_of(tokenizer, name), *limits, **options)


def encode_dataset(tokenizer, rows, name, *limits, **options):
    return data.encode_dataset(tokenizer, rows, data.chat_of(tokenizer, name), *limits, **options)


def in_turns(prompt, name):
    return data.in_turns(prompt, data.chat_of(FakeTokenizer(MARKS), name))


MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


HH = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:"
TALK = [user("Hi"), assistant("Yes?"), user("Bye")]
CHAT = [system(" Be kind. "), user("Hi"), assistant(" Yes?"), user(" Bye")]
SHOWN = {       # what the ids spell; the fake tokenizer puts a space in front of every segment
    "hh": " Be kind. \n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:",
    "zephyr": " <|system|>\nBe kind. </s> \n<|user|>\nHi</s> \n<|assistant|>\nYes?</s> \n<|user|>\nBye</s> "
              "\n<|assistant|>\n",
    "chatml": "<|im_start|> system\nBe kind. <|im_end|> \n<|im_start|> user\nHi<|im_end|> \n"
              "<|im_start|> assistant\nYes?<|im_end|> \n<|im_start|> user\nBye<|im_end|> \n"
              "<|im_start|> assistant\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
              "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
              "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": " [INST] Be kind. \n\nHi [/INST] Yes?</s> [INST] Bye [/INST]",
}


@pytest.mark.parametrize("chat", FORMATS)
def test_chats_spell_their_templates(chat):
    tokenizer = FakeTokenizer(MARKS, word_start=chat != "llama3")
    messages = CHAT if chat != "hh" else [system("Be kind. "), *CHAT[1:]]
    ids = prompt_ids(tokenizer, messages, chat)
    assert tokenizer.decode(ids) == SHOWN[chat]
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(chat, "</s>")
    between = " " if chat in ("hh", "mistral") else ""
    for response in ("Sure thing", " Sure thing"):
        y = response_ids(tokenizer, messages, response, chat)
        assert tokenizer.decode(y) == between + "Sure thing" + end
        assert response_ids(tokenizer, messages, response, chat, complete=False) == y[:-1]
    y = response_ids(tokenizer, messages, "\n- one", chat)      # other white space is the response's own
    assert tokenizer.decode(y) == "\n- one" + end


@pytest.mark.parametrize("chat", FORMATS)
def test_plain_text_is_a_user_turn_where_a_format_was_chosen(chat):
    """Text is encoded as the message it stands for, without a format verbatim; HH texts are dialogues."""
    tokenizer = FakeTokenizer(MARKS, word_start=chat != "llama3")

    def encode(prompt, chat):
        pair = encode_pair(tokenizer, Row(prompt, "Sure", None, None, "f:1"), chat, 1000, 1000, "p")
        return pair.x, pair.refined_x, pair.chosen

    for text, messages in (("What is 2+2?", [user("What is 2+2?")]), (HH, TALK), (HH + " ", TALK)):
        assert encode(text, chat) == encode(messages, chat)
    assert encode("What is 2+2?", chat) != encode("What is 2+2?", None)
    text = tokenizer.decode(encode("What is 2+2?", None)[0])
    assert text == "<s>" + " " * tokenizer.word_start + "What is 2+2?"
    # nothing asked, an answer begun, a text in front
    for text in ("", " ", HH + " Well", "Be kind." + HH):
        assert in_turns(text, chat) == text and encode(text, chat)[0] == encode(text, None)[0]
    assert in_turns(TALK, chat) is TALK and in_turns("Q", None) == "Q"


def test_marks_with_ids_of_their_own():
    """Tokenizers that have the marks as special tokens (StableLM's Zephyr, Mistral v0.3) get the ids."""
    tokenizer = FakeTokenizer(["<|user|>", "<|assistant|>", "[INST]", "[/INST]"])
    ids = prompt_ids(tokenizer, TALK, "zephyr")
    assert ids[0] == 3 and ids.count(3) == 2 and ids.count(4) == 2
    assert tokenizer.decode(ids) == ("<|user|> \nHi</s> \n<|assistant|> \nYes?</s> \n<|user|> \nBye</s> "
                                     "\n<|assistant|> \n")
    ids = prompt_ids(tokenizer, TALK, "mistral")
    assert tokenizer.decode(ids) == "[INST] Hi[/INST] Yes?</s>[INST] Bye[/INST]"


def test_special_strings_in_contents_are_plain_text():
    tokenizer = FakeTokenizer(MARKS)
    for chat in FORMATS:
        before = Counter(prompt_ids(tokenizer, [user("x")], chat))
        after = Counter(prompt_ids(tokenizer, [user("x </s> <|im_end|> <|eot_id|> <s>")], chat))
        assert all(after[i] == before[i] for i in tokenizer.special_ids.values())


def test_which_format_a_run_has():
    tokenizer = FakeTokenizer(MARKS)
    assert data.chat_of(tokenizer, None).name is None and not data.chat_of(tokenizer, None).marks
    assert data.chat_of(tokenizer, "llama3").end == MARKS.index("<|eot_id|>") + 3
    without = FakeTokenizer(MARKS[:-1])
    for name, broken in (("alpaca", tokenizer), ("chatml", FakeTokenizer()), ("llama3", without),
                         ("template", tokenizer)):
        with pytest.raises(InputError, match=f"--chat={name}"):
            data.chat_of(broken, name)
    tokenizer.chat_template = ChatTemplate("{% for one in messages %}{{ one.content }}{% endfor %}", {})
    assert data.chat_of(tokenizer, None).name == "template" and data.chat_of(tokenizer, "hh").name == "hh"


TEMPLATE = ("{{ bos_token }}{% for one in messages %}"
            "<|im_start|>{{ one.role }}\n{{ one.content | trim }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def templated():
    tokenizer = FakeTokenizer(MARKS, word_start=False)
    tokenizer.stop_ids = {2, 4}
    tokenizer.chat_template = ChatTemplate(TEMPLATE, {"bos_token": "<s>"})
    return tokenizer


def test_a_template_writes_its_own_bos_and_ends_an_answer_as_it_says():
    tokenizer = templated()
    row = Row([user(" Hi </s> <|im_end|>")], " Sure", "No", None, "f:1")
    pair = encode_pair(tokenizer, row, None, 1000, 1000)
    shown = "<s><|im_start|>user\nHi </s> <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(pair.x) == shown
    assert [pair.x.count(id) for id in (1, 2, 3, 4)] == [1, 0, 2, 1]        # what the user wrote is text
    assert tokenizer.decode(pair.chosen) == "Sure<|im_end|>" and pair.chosen[-1] == 4


@pytest.mark.parametrize("name", [None, "chatml"])
def test_too_long_a_dialogue_loses_its_oldest_turns_then_the_front_of_its_last_text(name):
    tokenizer = templated()
    talk = [system("Be kind."), user("one two three"), assistant("four"), user("five six seven eight")]
    row = Row(talk, "yes", "no", None, "f:1")
    whole = encode_pair(tokenizer, row, name, 1000, 1000, "p :")
    seen = set()
    with pytest.raises(Unusable, match="no room"):
        for max_length in range(len(whole.x) + 2, 0, -1):
            pair = encode_pair(tokenizer, row, name, max_length, 1, "p :")
            text, refined = (tokenizer.decode(ids).replace("\n ", "\n") for ids in (pair.x, pair.refined_x))
            assert len(pair.x) + 2 <= max_length and pair.cut == (pair.x != whole.x)
            assert "<|im_start|>system\nBe kind.<|im_end|>" in text
            assert text.endswith("eight<|im_end|>\n<|im_start|>assistant\n")
            assert refined.replace("p : ", "", 1) == text          # x is the same, and p in its first turn
            assert refined.index("user\np : ") == text.index("user\n") and pair.chosen == whole.chosen
            seen.add(text)
    assert len(seen) == 5                                # whole, without the old turns, then word by word


def test_a_template_that_refuses_makes_the_row_unusable():
    tokenizer = templated()
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    turns = "{% for one in messages %}{% if one.role != 'tool' %}{{ one.content }}{% endif %}{% endfor %}"
    tokenizer.chat_template = ChatTemplate(refuses + turns, {})
    rows = [Row([system("Be kind."), user("Hi")], "yes", "no", None, "f:1"),
            Row([user("Hi")], "yes", "no", None, "f:2"),
            Row([user("Hi"), {"role": "tool", "content": "7"}], "yes", "no", None, "f:3")]
    pairs, report = encode_dataset(tokenizer, rows, None, 100, 50)
    assert len(pairs) == 1 and "no system turn" in str(report) and "leaves out a turn (tool" in str(report)


def test_trailing_spaces_of_a_plain_prompt_belong_to_the_response():
    tokenizer = FakeTokenizer()
    for text in ("Q:", "Q:  "):
        assert prompt_ids(tokenizer, text, None) == tokenizer.encode("Q:")
    assert tokenizer.decode(response_ids(tokenizer, "Q: ", "a b", None)) == " a b</s>"
    assert response_ids(tokenizer, "Q: ", "a", None) == response_ids(tokenizer, "Q:", " a", None)
    assert tokenizer.decode(prompt_ids(tokenizer, "Q:\n", None)) == " Q:\n"
    # text without a prompt is met alone: it has its word-start
    assert prompt_ids(tokenizer, "", None) == [] and prompt_ids(tokenizer, " ", None) == []
    assert tokenizer.decode(response_ids(tokenizer, "", "Once", None)) == " Once</s>"


def test_context_text():
    text = HH.removesuffix(ASSISTANT)[2:]
    assert data.context_text([user(" Hi"), assistant(" Yes?"), user(" Bye")]) == data.context_text(HH) == text
    assert data.context_text("Q: x") == "Q: x"


@pytest.mark.parametrize("chat", [None, *FORMATS])
@pytest.mark.parametrize("prompt", [TALK, "Q: x", " Q", "", HH], ids="turns text space empty hh".split())
@pytest.mark.parametrize("word_start", [True, False], ids=["sentencepiece", "bytes"])
def test_p_stands_after_bos_and_x_and_y_are_the_same_tokens(chat, prompt, word_start):
    tokenizer = FakeTokenizer(MARKS, word_start=word_start)
    row = Row(prompt, "good one", "bad one", None, "f:1")
    p = tokenizer.encode(data.REFINEMENT_PROMPT)
    pair = encode_pair(tokenizer, row, chat, 1000, 1000, data.REFINEMENT_PROMPT)
    x, refined = tokenizer.decode(pair.x[1:]), tokenizer.decode(pair.refined_x[1:])
    assert pair.x[0] == pair.refined_x[0] == 1 and not pair.cut
    if chat in (None, "hh") or not prompt:
        after = tokenizer.decode(pair.refined_x[1 + len(p):])
        assert pair.refined_x[1:1 + len(p)] == p and after.lstrip(" ") == x.lstrip(" ")
        assert not after or after[0].isspace() and after[:2] != "  "      # one space, as text goes on
    else:                                                                 # in the first user's turn
        assert refined.replace(data.REFINEMENT_PROMPT + " ", "", 1).split() == x.split()
    assert pair.chosen[-1:] == response_ids(tokenizer, in_turns(prompt, chat), "", chat)[-1:]
    empty = encode_pair(tokenizer, row, chat, 1000, 1000, "")
    assert empty.refined_x == empty.x == pair.x and empty.chosen == pair.chosen     # the empty p is no p
    assert encode_pair(tokenizer, row, chat, 1000, 1000).refined_x is None


def test_cut_x_is_the_same_after_p():
    tokenizer = FakeTokenizer()
    row = Row([user("one two three four five six seven")], "good", "bad", None, "f:1")
    p = tokenizer.encode(data.REFINEMENT_PROMPT)
    for max_length in range(2, 20):
        try:
            pair = encode_pair(tokenizer, row, "hh", max_length, 5, data.REFINEMENT_PROMPT)
        except Unusable:
            pytest.fail("the first response tokens differ")
        assert pair.refined_x[:1 + len(p)] == [1] + p
        if len(pair.x) < 1 + len(prompt_ids(tokenizer, row.prompt, "hh")):
            assert pair.cut and pair.refined_x[1 + len(p):] == pair.x[1:]


def test_prefix_without_bos():
    """GPT-NeoX has no BOS, but an empty prompt is <|endoftext|>: the first token needs one before it."""
    tokenizer = FakeTokenizer(bos=False)
    row = Row("", "good", "bad", None, "f:1")
    pair = encode_pair(tokenizer, row, None, 10, 10, "p")
    assert pair.x == [tokenizer.eos_id] and pair.refined_x == tokenizer.encode("p")
    assert encode_pair(tokenizer, row, None, 10, 10, "").refined_x == [tokenizer.eos_id]
    row.prompt = "Q"
    assert encode_pair(tokenizer, row, None, 10, 10).x == tokenizer.encode("Q")


def test_fit_by_hand():
    x, y = list(range(10)), [[20, 21, 22, 2], [30, 2]]
    assert data.fit([1], x, y, 15, 4) == (x, y, False)                           # 1 + 10 + 4
    assert data.fit([1], x, y, 14, 4) == (x[1:], y, True)                        # only as much as needed
    assert data.fit([1], x, y, 9, 4) == (x[6:], y, True)
    assert data.fit([1], x, y, 8, 4) == (x[6:], [[20, 21, 22], [30, 2]], True)   # x is at its least: y is cut
    assert data.fit([1], x, y, 6, 4) == (x[6:], [[20], [30]], True)
    assert data.fit([1], x, y, 5, 4) == (x[7:], [[20], [30]], True)              # one token of y always stays
    assert data.fit([1], x, y, 2, 4) == ([], [[20], [30]], True)
    assert data.fit([], x, y, 2, 0) == data.fit([], x, y, 2, 4) == ([9], [[20], [30]], True)
    assert data.fit([], x, y, 5, 0) == ([9], y, True)
    for prefix in ([1], []):
        with pytest.raises(InputError, match="max_length=1"):
            data.fit(prefix, x, y, 1, 4)


def test_fit_invariants():
    rng = random.Random(0)
    for _ in range(5000):
        prefix = [1] * rng.randint(0, 1)
        x = [rng.randint(10, 99) for _ in range(rng.randint(0, 12))]
        ys = [[*rng.choices(range(10, 99), k=rng.randint(0, 12)), 2] for _ in range(rng.randint(1, 3))]
        x = x if prefix else x + [9]                     # prefix() is not empty when x is
        max_length, max_prompt_length = rng.randint(2, 30), rng.randint(0, 15)
        x_cut, ys_cut, cut = data.fit(prefix, x, ys, max_length, max_prompt_length)
        room = max_length - len(prefix)
        assert x[len(x) - len(x_cut):] == x_cut
        assert all(y_cut and y[:len(y_cut)] == y_cut for y, y_cut in zip(ys, ys_cut, strict=True))
        assert prefix + x_cut and all(len(x_cut) + len(y) <= room for y in ys_cut)
        assert cut == (x_cut != x or ys_cut != ys)
        for y, y_cut in zip(ys, ys_cut):                 # EOS once, and only after a whole y
            assert y_cut.count(2) == (y_cut == y)
        assert len(x_cut) >= min(len(x), max_prompt_length, room - 1)
        if cut:                                          # nothing is given away
            assert max(map(len, ys_cut)) + len(x_cut) == room or len(x_cut) == len(x)
        if ys_cut != ys:
            assert len(x_cut) <= max(max_prompt_length, 1 - len(prefix))


def test_encode_dataset_counts_what_was_cut_and_dropped():
    tokenizer = FakeTokenizer()
    rows = [Row("Q", " a b c d", " a b c e", None, "f:1"), Row("Q", " a", " b", 0.7, "f:2"),
            Row([user("Q")], "a", " a", None, "f:3"), Row("Q", " b b b b b", " a", None, "f:4")]
    pairs, report = encode_dataset(tokenizer, rows, None, 5, 1)
    assert [pair.row.where for pair in pairs] == ["f:2", "f:4"] and pairs[0].strength == 0.7
    assert str(report) == ("encoded: 2 rows used, 1 of them cut to max_length, "
                           "2 skipped (2 identical after encoding and cutting at f:1, f:3)")
    assert pairs[0].chosen[-1] == 2 and 2 not in pairs[1].chosen and pairs[1].rejected[-1] == 2
    with pytest.raises(InputError, match="f:1"):
        encode_dataset(tokenizer, rows[:1], None, 5, 1)
    with pytest.raises(InputError, match="no rows"):
        encode_dataset(tokenizer, [], None, 5, 1)


def test_a_response_that_was_cut_gets_no_end():
    tokenizer = FakeTokenizer()
    for finished in ((True, False), (False, True)):
        pair = encode_pair(tokenizer, Row("Q", " a", " b", None, "f:1", finished), None, 100, 50)
        assert (tokenizer.eos_id in pair.chosen, tokenizer.eos_id in pair.rejected) == finished


def test_encode_responses_and_prompts():
    tokenizer = FakeTokenizer()
    rows = [Row("Q", " a b", None, None, "f:1"), Row("", "a b", None, None, "f:2")]
    pairs, _ = encode_dataset(tokenizer, rows, None, 10, 10)
    assert [tokenizer.decode(pair.x) for pair in pairs] == ["<s> Q", "<s>"]
    assert [tokenizer.decode(pair.chosen) for pair in pairs] == [" a b</s>"] * 2
    assert all(pair.rejected is None for pair in pairs)
    rows = [Row("a b c d e f", None, None, None, "f:1")]
    (pair,), _ = encode_dataset(tokenizer, rows, None, 10, 2, max_tokens=6)
    assert (tokenizer.decode(pair.x), pair.chosen, pair.rejected, pair.cut) == ("<s> d e f", None, None, True)


def test_zephyr_ids_of_a_real_tokenizer():
    """Golden ids of HuggingFaceH4/zephyr-7b-beta, whose tokenizer is Mistral's first."""
    file = shared("tokenizers/mistral-v1/tokenizer.model")
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))

    class Mistral(FakeTokenizer):
        encode = staticmethod(model.encode)
        encode_after = staticmethod(lambda text: model.encode("\n" + text)[2:])

    messages = [system("You are a friendly chatbot who always responds in the style of a pirate"),
                user("How many helicopters can a human eat in one sitting?")]
    ids = prompt_ids(Mistral(), messages, "zephyr")
    assert ids[:6] == [523, 28766, 6574, 28766, 28767, 13] and ids[-10:] == [
        2, 28705, 13, 28789, 28766, 489, 11143, 28766, 28767, 13]
    middle = [2, 28705, 13, 28789, 28766, 1838, 28766, 28767, 13, 5660, 1287, 19624, 410, 1532, 541, 264]
    assert any(ids[i:i + len(middle)] == middle for i in range(len(ids)))
    assert response_ids(Mistral(), messages, "Hello!", "zephyr") == [16230, 28808, 2]
    # v0.2's brackets are text; the answer has a word-start, as mistral-common encodes it alone
    ids = prompt_ids(Mistral(), messages[1:], "mistral")
    assert model.decode(ids) == f"[INST] {messages[1]['content']} [/INST]"
    assert response_ids(Mistral(), messages, "Hello!", "mistral") == model.encode("Hello!") + [2]


def test_hh_pairs_keep_the_limits():
    rows, _ = read_rows(shared("hh-rlhf/harmless-base.test.lines-0001-1312.jsonl.gz"), "pairs")
    pairs, report = encode_dataset(FakeTokenizer(), rows, "hh", 128, 64, data.REFINEMENT_PROMPT)
    for pair in pairs:
        assert max(len(pair.chosen), len(pair.rejected)) + len(pair.x) <= 128
        assert pair.chosen and pair.rejected
        assert pair.chosen.count(2) <= 1 and pair.rejected.count(2) <= 1
    assert 0 < report.cut < len(rows)
    assert report.used + sum(map(len, report.skipped.values())) == len(rows)
