"""Dialogue formats: how turns become ids, up to where an answer begins, and what ends it.

    chat = chat_of(tokenizer, None)        the folder's own template; or hh, where it has none
    chat = chat_of(tokenizer, "zephyr")    one of five of our own
    chat.ids(messages)                     up to where the answer begins; contents never become special ids

A segment between two special ids is encoded by itself, word-start included, as it was when these models were
trained (Zephyr: </s>▁\\n). Contents from HH files lose the one leading space that HH's layout gives them.
"""
from collections.abc import Callable
from dataclasses import dataclass

from support.cli import InputError
from support.rows import ASSISTANT, Unusable, hh_text


@dataclass(frozen=True)
class Chat:
    """One format, bound to a tokenizer."""
    name: str | None               # None: hh because nobody chose; then a plain text stays what it is
    ids: Callable                  # messages -> ids
    between: str                   # what stands between prompt and answer
    end: int                       # the id that ends an answer
    marks: bool = True             # its turns stand between marks of their own; hh's are plain text
    writes_bos: bool = False       # BOS is there where the format writes it, and never otherwise


def chat_of(tokenizer, name):
    """The Chat of that name; None: what the folder asks for. InputError: unknown, or marks are missing."""
    own = tokenizer.chat_template
    if name == "template" or name is None and own is not None:
        if own is None:
            raise InputError("--chat=template: the model's folder has no chat template.")
        return template_chat(tokenizer, own)
    if name not in (None, *FORMATS):
        raise InputError(f"--chat={name}: there is no such format; choose one of {', '.join(CHATS)}.")
    encode, between, end = FORMATS[name or "hh"]
    encode(tokenizer, [])                        # raises when a special token is missing
    end = tokenizer.eos_id if end is None else special_id(tokenizer, name, end)
    return Chat(name, lambda messages: encode(tokenizer, messages), between, end, name not in (None, "hh"))


def template_chat(tokenizer, template):
    """The folder's template as a Chat: how it goes on after a prompt is read off two rendered dialogues."""
    question = {"role": "user", "content": "question"}
    try:
        asked = template.text([question])
        text, spans = template.marked([question, {"role": "assistant", "content": "answer"}], ask=False)
    except Unusable as reason:
        raise InputError(f"--chat=template, on one question and its answer: {reason}.") from None
    start, stop = spans[-1] if spans else (len(text), len(text))
    between = text[len(asked):start] if text.startswith(asked) else ""
    ends = [id for id in template.encode(tokenizer, text[stop:], []) if id in tokenizer.special_ids.values()]
    end = next((id for id in ends if id in tokenizer.stop_ids), (ends or [tokenizer.eos_id])[0])

    def ids(messages):
        without = [one | {"content": one["content"].removeprefix(" ")} for one in messages]     # HH's space
        return template.ids(tokenizer, without)
    return Chat("template", ids, between, end, writes_bos=True)


def special_id(tokenizer, chat, token):
    if token not in tokenizer.special_ids:
        raise InputError(f"--chat={chat} needs the special token {token}, which this tokenizer lacks.")
    return tokenizer.special_ids[token]


# ------------------------------------------------------------------------------------------------------------
# Five of our own: (tokenizer, messages) -> ids, as the models' own templates have them

def hh(tokenizer, messages):
    """The text of Anthropic's HH-RLHF dialogues, which has no marks of its own."""
    return tokenizer.encode(hh_text(messages) + ASSISTANT)


def zephyr(tokenizer, messages):
    """HuggingFaceH4/zephyr-7b-beta's template, where the role marks are plain text; StableLM's have ids."""
    ids, before = [], ""
    for message in [*messages, {"role": "assistant", "content": ""}]:
        mark, text = f"<|{message['role']}|>", "\n" + message["content"].removeprefix(" ")
        if mark in tokenizer.special_ids:
            ids += [*tokenizer.encode(before), tokenizer.special_ids[mark], *tokenizer.encode(text)]
        else:
            ids += tokenizer.encode(before + mark + text)
        ids.append(tokenizer.eos_id)
        before = "\n"
    return ids[:-1]                              # no EOS after the mark that the answer follows


def chatml(tokenizer, messages):
    """OpenAI's ChatML as in the templates of Qwen and OpenHermes, without a system turn that nobody gave."""
    start, end = (special_id(tokenizer, "chatml", token) for token in ("<|im_start|>", "<|im_end|>"))
    ids = []
    for message in messages:
        text = f"{message['role']}\n{message['content'].removeprefix(' ')}"
        ids += [start, *tokenizer.encode(text), end, *tokenizer.encode("\n")]
    return ids + [start, *tokenizer.encode("assistant\n")]


def llama3(tokenizer, messages):
    """Meta-Llama-3-Instruct's template, which trims the contents."""
    start, end, eot = (special_id(tokenizer, "llama3", token)
                       for token in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))
    ids = []
    for message in messages:
        text = "\n\n" + message["content"].strip()
        ids += [start, *tokenizer.encode(message["role"]), end, *tokenizer.encode(text), eot]
    return ids + [start, *tokenizer.encode("assistant"), end, *tokenizer.encode("\n\n")]


def mistral(tokenizer, messages):
    """Mistral-7B-Instruct-v0.2's template; from v0.3 on the brackets have ids."""
    marks = [tokenizer.special_ids[mark] for mark in ("[INST]", "[/INST]") if mark in tokenizer.special_ids]
    ids, system = [], ""
    for message in messages:
        text = message["content"].removeprefix(" ")
        if message["role"] == "system":
            system += text + "\n\n"
        elif message["role"] == "assistant":
            ids += [*tokenizer.encode_after(" " + text), tokenizer.eos_id]
        else:
            text, system = system + text, ""
            ids += ([marks[0], *tokenizer.encode(text), marks[1]] if len(marks) == 2
                    else tokenizer.encode(f"[INST] {text} [/INST]"))
    return ids


FORMATS = {       # name: (prompt's ids, what stands before an answer, what ends one: None is EOS)
    "hh": (hh, " ", None),
    "zephyr": (zephyr, "", None),
    "chatml": (chatml, "", "<|im_end|>"),
    "llama3": (llama3, "", "<|eot_id|>"),
    "mistral": (mistral, " ", None),
}
CHATS = (*FORMATS, "template")
