"""Formats in saved folders: transformers finds the ids of training there, and a chain of runs its format."""
import datetime
import json
import os
import random

import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import AddedToken, pre_tokenizers

import data
import tiny
from support.chats import FORMATS, chat_of
from support.cli import InputError
from support.rows import Unusable, read_rows
from support.template import ChatTemplate
from support.tokenizer import load_tokenizer

MARKS = "<|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|>".split()
TALK = [{"role": "user", "content": " What does  the river do?\n"},
        {"role": "assistant", "content": " It waits. "},
        {"role": "user", "content": " And ½ of 12² 😀 clouds?"}]
TALKS = [TALK[:1], TALK, [{"role": "system", "content": "Be kind. "}, *TALK],
         [{"role": "user", "content": "\nx"}, {"role": "assistant", "content": "y"}, *TALK]]
DEFAULT = ("{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
           "You are a helpful AI<|im_end|>\n{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
           "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def with_marks(content, marks=MARKS):
    tokenizer = tokenizers.Tokenizer.from_str(content)
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return tokenizer


def write(path, kind):
    """A folder with a tokenizer of this kind."""
    path.mkdir()
    names = dict(bos_token="<s>", eos_token="</s>", add_bos_token=True)
    if kind == "bytes":
        tokenizer = with_marks(tiny.byte_level_json(420), [*MARKS, "<s>", "</s>"])
    elif kind == "pieces alone":                        # a tokenizer.model and nothing else
        (path / "tokenizer.model").write_bytes(tiny.sentencepiece_model(420))
        return path
    else:
        tokenizer = with_marks(tiny.sentencepiece_json(420), MARKS if kind == "legacy" else [
            *MARKS, "[INST]", "[/INST]"])
        if kind == "first":                             # as transformers 5 saves Mistral v0.3
            tokenizer.normalizer = None
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": DEFAULT}))
    (path / "chat_template.jinja").write_text(DEFAULT)
    return path


def names(folder):
    return {path.name for path in folder.iterdir()}


def whole(tokenizer, chat, messages):
    x = chat.ids(messages)
    return data.prefix_ids(tokenizer, messages, chat, x) + x


KINDS = ["bytes", "legacy", "brackets", "first", "pieces alone"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_saved_folder_renders_what_was_trained(name, kind, tmp_path):
    """And it is of that format by itself: the next run of a chain need not be told."""
    tokenizer = load_tokenizer(write(tmp_path / "source", kind))
    if kind == "pieces alone" and name in ("chatml", "llama3"):
        with pytest.raises(InputError, match=f"--chat={name} needs"):
            chat_of(tokenizer, name)
        return
    chat, final = chat_of(tokenizer, name), tmp_path / "final"
    final.mkdir()
    tokenizer.save(final, chat.served(False), chat.end)
    theirs, again = transformers.AutoTokenizer.from_pretrained(final), load_tokenizer(final)
    found = chat_of(again, None)
    assert (found.name, found.between, found.end, found.marks) == (name, chat.between, chat.end, chat.marks)
    assert found.end in again.stop_ids and found.served(False) == chat.served(False)
    for talk in TALKS:
        plain = [one | {"content": one["content"].removeprefix(" ")} for one in talk]
        ids = whole(tokenizer, chat, talk)
        assert ids == whole(again, found, talk)
        assert ids == list(theirs.apply_chat_template(plain, add_generation_prompt=True, return_dict=False))
    text = "\n".join(one["content"] for one in TALK)
    assert theirs(text).input_ids == tokenizer.prefix(False) + tokenizer.encode(text)
    assert chat_of(tokenizer, None).name == ("template" if kind != "pieces alone" else None)


def test_real_dialogues(tmp_path):
    """HH's test file, as the base model that it is often tried on has it: no chat template of its own."""
    rows, _ = read_rows(tiny.shared("hh-rlhf/helpful-base.test.lines-0001-1354.jsonl.gz"), "prompts")
    (tmp_path / "final").mkdir()
    tokenizer = load_tokenizer(tiny.shared("tokenizers/gpt-neox-20b"))
    chat = chat_of(tokenizer, None)
    tokenizer.save(tmp_path / "final", chat.served(True), chat.end)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "final")
    assert chat_of(load_tokenizer(tmp_path / "final"), None).name == "hh"
    for row in rows[:200]:
        ids = list(theirs.apply_chat_template(row.prompt, add_generation_prompt=True, return_dict=False))
        assert whole(tokenizer, chat, row.prompt) == ids


def test_who_is_saved_with_a_template(tmp_path):
    """Where nobody chose a format, a folder gets hh's if it was trained on dialogues, else stays plain."""
    tokenizer = load_tokenizer(write(tmp_path / "bare", "pieces alone"))
    assert chat_of(tokenizer, None).served(False) is None
    assert chat_of(tokenizer, None).served(True) == chat_of(tokenizer, "hh").served(False)
    templated = load_tokenizer(write(tmp_path / "chat", "bytes"))
    assert chat_of(templated, None).served(True) is None         # it keeps its own
    (tmp_path / "final").mkdir()
    templated.save(tmp_path / "final")
    assert (tmp_path / "final/chat_template.jinja").read_text() == DEFAULT


# ------------------------------------------------------------------------------------------------------------
# The system message

REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" \
           "{% for m in messages %}{{ m.content }}{% endfor %}"
OWN = [{"role": "system", "content": "Be kind."}, *TALK[:1]]


def shown(tokenizer, name, system, messages):
    chat = chat_of(tokenizer, name, system)
    return tokenizer.decode(chat.ids(data.in_turns(messages, chat))), chat


def test_the_system_message_is_set_or_removed(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "a", "bytes"))
    asked = "user\nWhat does  the river do?\nassistant\n"
    for system, text in ((None, "system\nYou are a helpful AI\n"), ("Be fair.", "system\nBe fair.\n"),
                         ("", "system\n\n")):              # an empty turn: else the template writes its own
        assert shown(tokenizer, None, system, TALK[:1])[0] == text + asked.replace("?\n", "?\n\n")
    assert shown(tokenizer, None, "", OWN)[0] == shown(tokenizer, None, "", TALK[:1])[0]
    for name in FORMATS:                                   # here nothing is written of one's own accord
        assert shown(tokenizer, name, "", OWN)[0] == shown(tokenizer, name, None, TALK[:1])[0]
        text = shown(tokenizer, name, "Be fair.", OWN)[0]
        assert "Be fair." in text and "kind" not in text
    tokenizer.chat_template = ChatTemplate(REFUSING, {})
    with pytest.raises(InputError, match="--system: .*no system turn"):
        chat_of(tokenizer, None, "Be fair.")
    text, chat = shown(tokenizer, None, "", OWN)
    assert text == "What does  the river do?\n"
    with pytest.raises(Unusable, match="no system turn"):
        chat.ids(OWN)


def test_p_and_cuts_leave_the_system_message_that_was_given(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "a", "bytes"))
    row = data.Row(TALK, " yes", " no", None, "f:1")
    for name in (None, "hh", "chatml"):
        chat = chat_of(tokenizer, name, "Be fair.")
        whole_pair = data.encode_pair(tokenizer, row, chat, 1000, 1000, "Be good:")
        assert "Be fair." in tokenizer.decode(whole_pair.x)
        assert "Be fair." in tokenizer.decode(whole_pair.refined_x)
        if name != "hh":                                   # whose texts are cut from the left as they are
            cut = data.encode_pair(tokenizer, row, chat, len(whole_pair.x) - 20, 1, "Be good:")
            assert cut.cut and "Be fair." in tokenizer.decode(cut.x)


# ------------------------------------------------------------------------------------------------------------
# The files

def test_links_out_of_the_folder_are_not_followed(tmp_path, capfd):
    """What they name may be anything of the user's. The hub's cache has a snapshot as links to its blobs."""
    source, final = write(tmp_path / "source", "bytes"), tmp_path / "final"
    (tmp_path / "secret.json").write_text(json.dumps({"key": "secret"}))
    (source / "special_tokens_map.json").symlink_to(tmp_path / "secret.json")
    (source / "generation_config.json").symlink_to(source / "tokenizer_config.json")
    final.mkdir()
    load_tokenizer(source).save(final)
    assert "secret" not in "".join(path.read_text() for path in final.iterdir())
    assert (final / "generation_config.json").read_text() == (source / "tokenizer_config.json").read_text()
    assert "special_tokens_map.json is a link" in capfd.readouterr().err
    snapshot = tmp_path / "hub/snapshots/0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub/blobs").mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (source / file).rename(tmp_path / "hub/blobs" / file[-11:])
        (snapshot / file).symlink_to(f"../../blobs/{file[-11:]}")
    (tmp_path / "again").mkdir()
    load_tokenizer(snapshot).save(tmp_path / "again")
    assert names(tmp_path / "again") == {"tokenizer.json", "tokenizer_config.json"}


TRAINED = {       # what sentencepiece may be told, and the ids must follow
    "bpe": {"byte_fallback": True}, "unigram": {"model_type": "unigram", "byte_fallback": True},
    "unknown": {}, "no start": {"byte_fallback": True, "add_dummy_prefix": False},
    "spaces": {"byte_fallback": True, "remove_extra_whitespaces": False}}


@pytest.mark.parametrize("kind", TRAINED)
def test_a_bare_tokenizer_model_gets_a_tokenizer_json_with_its_ids(kind, tmp_path):
    """sentencepiece's ids on 1,500 texts: words, runs of spaces, ▁, digits, emoji, control characters."""
    (tmp_path / "a").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=tiny.corpus(), model_prefix=str(tmp_path / "a/tokenizer"), minloglevel=2,
        **{"model_type": "bpe", "vocab_size": 400 if "byte_fallback" in TRAINED[kind] else 140,
           "normalization_rule_name": "identity"} | TRAINED[kind])
    tokenizer = load_tokenizer(tmp_path / "a")
    (tmp_path / "final").mkdir()
    tokenizer.save(tmp_path / "final")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "final/tokenizer.json"))
    rng, letters = random.Random(0), "   aehlnortu▁\n\t\xa0éß½²😀日\x01<>|1290.,"
    texts = ["".join(rng.choice(letters) for _ in range(rng.randrange(40))) for _ in range(1000)]
    texts += [row["prompt"] + row["chosen"] for row in tiny.pairs(500, seed=3)]
    for text in texts:
        assert theirs.encode(text).ids == [tokenizer.bos_id, *tokenizer.alone.encode(text)], repr(text)


def test_characters_that_sentencepiece_would_change_get_no_tokenizer_json(tmp_path):
    """NFKC makes ﬁ two letters: a table of its own, which is not written out."""
    (tmp_path / "a").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=tiny.corpus(), model_prefix=str(tmp_path / "a/tokenizer"), minloglevel=2,
        model_type="bpe", vocab_size=420, byte_fallback=True, normalization_rule_name="nmt_nfkc")
    (tmp_path / "final").mkdir()
    load_tokenizer(tmp_path / "a").save(tmp_path / "final")
    assert names(tmp_path / "final") == {"tokenizer.model", "tokenizer_config.json"}


def test_files_have_the_mode_of_new_files(tmp_path):
    """Not that of the source's, nor safetensors' 0600."""
    world = tiny.world(tmp_path)
    for file in (world / "model").iterdir():
        file.chmod(0o400)
    before = os.umask(0o027)
    try:
        tiny.run(world, tmp_path / "out", recipe="sft", lora_rank=2, steps=1)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != ".lock"]
    assert len(files) > 9 and {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}


def test_a_resumed_run_keeps_the_date_of_its_start(tmp_path):
    """Llama 3.2's template writes it: else the rows of a run would change at midnight."""
    world = tiny.world(tmp_path)
    (world / "model/chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + DEFAULT)
    out = tmp_path / "out"
    tiny.run(world, out, recipe="sft", steps=1, max_length=256)
    recorded = json.loads((out / "config.json").read_text())
    today = datetime.datetime.fromisoformat(recorded["settings"]["started"])
    assert abs(datetime.datetime.now() - today) < datetime.timedelta(minutes=5)
    recorded["settings"]["started"] = "2024-07-26T12:00:00"
    (out / "config.json").write_text(json.dumps(recorded))
    for resume, date in (("auto", "26 Jul 2024"), ("never", datetime.datetime.now().strftime("%d %b %Y"))):
        trainer = tiny.trainer(world, out, recipe="sft", steps=1, max_length=256, resume=resume)
        assert trainer.tokenizer.chat_template.text(TALK[:1]).startswith(date)
