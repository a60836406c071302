"""Chat templates: transformers' apply_chat_template is the oracle, for texts and for ids."""
import json
import os
from pathlib import Path

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer

import tiny
from support.chats import chat_of
from support.cli import InputError
from support.rows import Unusable, read_rows
from support.template import ChatTemplate, read_template
from support.tokenizer import load_tokenizer

DATA = Path(os.environ.get("OSPREY_DATA") or Path(__file__).parents[3] / "shared/data")
SPECIAL = "<|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <s> </s>".split()
TEMPLATES = {       # as published models have them, written in our own way
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
              "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "trims": "{{ bos_token }}{% for m in messages %}"
             "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
             "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
             "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    "strips": "{% for m in messages %}{% if m.role == 'user' %}"
              "{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
              "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
}
TALK = [{"role": "user", "content": "What does  the river do?\n"},
        {"role": "assistant", "content": " It waits. "},
        {"role": "user", "content": " And \u00bd of 12\u00b2 \U0001f600 clouds?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level tokenizer with the special tokens of several chat models."""
    path = tmp_path_factory.mktemp("chat")
    tokenizer = Tokenizer.from_str(tiny.byte_level_json(420))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    (path / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    return path


def written(folder, template):
    config = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>",
                  chat_template=template)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def reference(folder):
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def ids_of(fast, messages, **options):
    return list(fast.apply_chat_template(messages, return_dict=False, **options))


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_and_ids_are_transformers(name, folder):
    tokenizer, fast = load_tokenizer(written(folder, TEMPLATES[name])), reference(folder)
    for n in (1, 2, 3):
        for ask in (True, False):
            talk = TALK[:n]
            text = fast.apply_chat_template(talk, tokenize=False, add_generation_prompt=ask)
            assert tokenizer.chat_template.text(talk, ask) == text
            ids = ids_of(fast, talk, add_generation_prompt=ask)
            assert tokenizer.chat_template.ids(tokenizer, talk, ask) == ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_special_strings_in_a_message_stay_text(name, folder):
    """Which transformers does not promise: there they become ids."""
    tokenizer, fast = load_tokenizer(written(folder, TEMPLATES[name])), reference(folder)
    marks = "".join(map(chr, range(0xE000, 0xF900)))              # those of the rendering would be among them
    plain, odd = ([{"role": "user", "content": text}] for text in (
        "x y", f"x </s><|im_end|> <|eot_id|> y{marks}"))
    special = set(tokenizer.special_ids.values())
    ids = [tokenizer.chat_template.ids(tokenizer, one) for one in (plain, odd)]
    counts = [[id for id in one if id in special] for one in ids]
    assert counts[0] == counts[1] and len(ids_of(fast, odd)) < len(ids[1])
    assert tokenizer.decode(tokenizer.encode("x </s><|im_end|>")) == "x </s><|im_end|>"


@pytest.mark.parametrize("name, between, end", [
    ("chatml", "", "<|im_end|>"), ("trims", "", "<|eot_id|>"), ("strips", " ", "</s>")])
def test_how_an_answer_begins_and_ends_is_read_off_the_template(name, between, end, folder):
    chat = chat_of(load_tokenizer(written(folder, TEMPLATES[name])), None)
    assert (chat.name, chat.between, chat.marks, chat.writes_bos) == ("template", between, True, True)
    assert chat.end == load_tokenizer(folder).special_ids[end]


def test_where_a_folder_has_its_template(folder, tmp_path):
    assert read_template(tmp_path) is None
    assert read_template(written(folder, [{"name": "tool", "template": "x"},
                                          {"name": "default", "template": "y"}])).source == "y"
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert read_template(tmp_path).source == "{{ messages }}"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(InputError, match="chat template"):
        read_template(tmp_path)


def test_a_template_that_takes_no_question_is_one_sentence(folder):
    with pytest.raises(InputError, match="chat=template.*system first"):
        chat_of(load_tokenizer(written(folder, "{{ raise_exception('system first') }}")), None)


def test_a_template_runs_in_a_sandbox():
    """It neither reaches Python's internals nor changes what it is given; a refusal is a row's reason."""
    for source in ("{{ ''.__class__.__mro__ }}{{ messages.__init__.__globals__ }}",
                   "{{ messages.append(1) }}",
                   "{{ raise_exception('no') }}", "{{ nothing.there }}"):
        with pytest.raises(Unusable):
            ChatTemplate(source, {}).text([{"role": "user", "content": "x"}])


def test_marks_that_a_template_would_notice_are_left_out():
    """Where marking changes more than the marks, the plain rendering is taken."""
    template = ChatTemplate("{{ messages[0].content ~ messages[0].content | length }}", {})
    assert template.marked([{"role": "user", "content": "four"}]) == ("four4", [])
    backwards = ChatTemplate("{{ messages[0].content | reverse }}", {})
    assert backwards.marked([{"role": "user", "content": "abc"}])[0] == "cba"


@pytest.mark.parametrize("name", ["llama-2-chat", "llama-3.2-instruct", "mistral-instruct-v0.2",
                                  "openhermes-chatml", "zephyr-and-tinyllama-chat"])
def test_published_templates_on_real_dialogues(name, folder):
    path = DATA / "templates" / f"{name}.jinja"
    if not path.exists():
        pytest.skip(f"{path} is not here; OSPREY_DATA names the folder of the shared data")
    tokenizer, fast = load_tokenizer(written(folder, path.read_text())), reference(folder)
    rows, _ = read_rows(str(DATA / "hh-rlhf/helpful-base.test.lines-0001-1354.jsonl.gz"), "prompts")
    refused = 0
    for row in rows[:100]:
        messages = [one | {"content": one["content"].removeprefix(" ")} for one in row.prompt]
        try:
            ids = chat_of(tokenizer, None).ids(row.prompt)
        except Unusable:
            refused += 1
            continue
        assert ids == ids_of(fast, messages, add_generation_prompt=True)
    assert refused < 5
