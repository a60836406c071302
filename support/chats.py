"""Dialogue formats: how turns become ids, up to where an answer begins, and what ends it.

    chat = chat_of(tokenizer, None)        the folder's own template; or hh, where it has none
    chat = chat_of(tokenizer, "zephyr")    one of five of our own, whatever the folder has
    chat.ids(messages)                     up to where the answer begins; contents never become special ids

All are Jinja templates: our five are written into the folders of models trained with them, so that others
serve a model as it was trained. A folder whose template is one of the five has that format: a chain of runs
stays one format without being told. Ids are those of transformers' apply_chat_template, but for HH's layout:
contents lose the one leading space that HH's files give them.
"""
from dataclasses import dataclass, replace

from support.cli import InputError
from support.rows import Unusable
from support.template import ChatTemplate


@dataclass(frozen=True)
class Chat:
    """One format, bound to a tokenizer."""
    name: str | None               # None: hh because nobody chose; then a plain text stays what it is
    tokenizer: object
    template: ChatTemplate
    between: str                   # what stands between prompt and answer
    end: int                       # the id that ends an answer
    marks: bool = True             # its turns stand between marks of their own; hh's are plain text
    writes_bos: bool = True        # BOS is there where the template writes it, and never otherwise
    system: list | None = None     # [a turn] or [], in place of a dialogue's own system turn; None: its own

    def ids(self, messages):
        """Ids of a dialogue, with the mark that an answer follows. Unusable: the format does not take it."""
        if self.marks:
            messages = [one | {"content": one["content"].removeprefix(" ")} for one in messages]
        ids = self.template.ids(self.tokenizer, messages)
        return ids if self.writes_bos or not self.tokenizer.adds_bos else ids[1:]

    def served(self, has_dialogues):
        """The Jinja template that a model trained in this format is saved with; None: what its folder has.

        Where nobody chose a format, hh's if there were dialogues among the data: they were written in it.
        """
        return self.template.source if self.name in FORMATS or not self.name and has_dialogues else None

    def with_system(self, messages):
        """The dialogue as it is to be read: with the system message that was given in place of its own."""
        if self.system is None:
            return messages
        return self.system + [one for one in messages if one["role"] not in ("system", "developer")]


def chat_of(tokenizer, name, system=None):
    """The Chat of that name; None: what the folder asks for. InputError: unknown, or marks are missing.

    system: a text that is every dialogue's system message, in place of its own; "": no dialogue has one, and
    where a template writes one of its own accord, an empty one is put in its place.
    """
    own = tokenizer.chat_template
    if name is None and own is not None:
        name = next((ours for ours in FORMATS if own.source == source_of(tokenizer, ours)), "template")
    if name == "template":
        if own is None:
            raise InputError("--chat=template: the model's folder has no chat template.")
        chat = template_chat(tokenizer, own)
    elif name in (None, *FORMATS):
        chat = own_chat(tokenizer, name)
    else:
        raise InputError(f"--chat={name}: there is no such format; choose one of {', '.join(CHATS)}.")
    return chat if system is None else replace(chat, system=system_turn(chat, system))


def own_chat(tokenizer, name):
    """One of the five; None: hh."""
    ours = FORMATS[name or "hh"]
    for token in ours.needs:
        if token not in tokenizer.special_ids:
            raise InputError(f"--chat={name} needs the special token {token}, which this tokenizer lacks.")
    end = tokenizer.special_ids[ours.needs[-1]] if ours.needs else tokenizer.eos_id
    template = ChatTemplate(source_of(tokenizer, name or "hh"), tokenizer.special_tokens, f"--chat={name}")
    return Chat(name, tokenizer, template, ours.between, end, name not in (None, "hh"), writes_bos=False)


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
    return Chat("template", tokenizer, template, between, end)


def system_turn(chat, text):
    """[the system turn that says `text`]; for no text [], or an empty one where that makes a chat shorter."""
    turn, question = [{"role": "system", "content": text}], [{"role": "user", "content": "question"}]
    try:
        plain, given = (chat.template.marked(turns)[0] for turns in (question, turn + question))
    except Unusable as reason:
        if text:
            raise InputError(f"--system: {reason}.") from None
        return []
    return turn if text or len(given) < len(plain) else []


# ------------------------------------------------------------------------------------------------------------
# Five of our own, as the models' own templates have them

@dataclass(frozen=True)
class Format:
    source: str                    # Jinja, without BOS
    between: str = ""              # what stands before an answer
    needs: tuple = ()              # special tokens that it writes; the last one ends an answer, else EOS does


FORMATS = {
    # The text of Anthropic's HH-RLHF dialogues, which has no marks of its own; system turns are plain text.
    "hh": Format(
        r"{% for message in messages %}{% set text = message['content'] %}"
        r"{% set text = ' ' + text if text[:1].strip() else text %}"
        r"{% if message['role'] in ['system', 'developer'] %}"
        r"{{ ('' if loop.first else '\n\n') + message['content'] }}"
        r"{% elif message['role'] == 'user' %}{{ '\n\nHuman:' + text }}"
        r"{% elif message['role'] == 'tool' %}{{ '\n\nTool:' + text }}"
        r"{% else %}{{ '\n\nAssistant:' + text }}{% endif %}"
        r"{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}", between=" "),
    # HuggingFaceH4/zephyr-7b-beta's, where the role marks are plain text; StableLM's have ids.
    "zephyr": Format(
        r"{% for message in messages %}"
        r"{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
        r"{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"),
    # OpenAI's ChatML as Qwen and OpenHermes have it, without a system turn that nobody gave.
    "chatml": Format(
        r"{% for message in messages %}"
        r"{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        r"{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        needs=("<|im_start|>", "<|im_end|>")),
    # Meta-Llama-3-Instruct's, which trims the contents.
    "llama3": Format(
        r"{% for message in messages %}"
        r"{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        r"{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        needs=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    # Mistral-7B-Instruct-v0.2's; a system message stands in front of the next user's text.
    "mistral": Format(
        r"{% set ns = namespace(system='') %}{% for message in messages %}{% set text = message['content'] %}"
        r"{% if message['role'] in ['system', 'developer'] %}{% set ns.system = ns.system + text + '\n\n' %}"
        r"{% elif message['role'] == 'assistant' %}{{ ' ' + text + eos_token }}"
        r"{% elif message['role'] == 'user' %}{{ '[INST] ' + ns.system + text + ' [/INST]' }}"
        r"{% set ns.system = '' %}"
        r"{% else %}{{ raise_exception('there is no turn of the role ' + message['role']) }}{% endif %}"
        r"{% endfor %}", between=" "),
}
CHATS = (*FORMATS, "template")


def source_of(tokenizer, name):
    """A format of our own as a Jinja template for this tokenizer: with BOS, where it adds one."""
    source = FORMATS[name].source
    if name == "mistral" and {"[INST]", "[/INST]"} <= tokenizer.special_ids.keys():    # v0.3: they have ids
        source = source.replace("' [/INST]'", "'[/INST]'")
        if tokenizer.later_starts:             # what follows an id gets its space from the tokenizer
            source = source.replace("'[INST] '", "'[INST]'").replace("' ' + text", "text")
    return "{{ bos_token }}" * tokenizer.adds_bos + source
