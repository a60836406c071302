"""A folder's own chat template: messages to text as Jinja renders it, and to ids, contents as plain text.

    template = read_template(folder)                          None where the folder has none
    template.text(messages, ask=True)                         what transformers' apply_chat_template renders
    template.ids(tokenizer, messages, ask=True)               its ids; `</s>` inside of a message stays text

To know which special strings are the template's and which a message's, each content is rendered between two
private-use characters, which are taken out again. jinja2 comes with torch.
"""
import datetime
import functools
import json
import re

from support.cli import InputError, read_json
from support.rows import Unusable

OPEN, CLOSE = "\ue0f5", "\ue0f6"        # private-use characters: a text that holds one is rendered unmarked


def read_template(folder):
    """The ChatTemplate of a folder, from chat_template.jinja or tokenizer_config.json; None: it has none."""
    config = read_json(folder / "tokenizer_config.json", absent={})
    source, path = config.get("chat_template"), folder / "chat_template.jinja"
    if path.is_file():
        source = path.read_text(encoding="utf-8")
    if isinstance(source, list):        # several by name: [{"name": "default", "template": …}, …]
        source = next((one.get("template") for one in source if one.get("name") == "default"), None)
    if not source:
        return None
    special = read_json(folder / "special_tokens_map.json", absent={}) | config
    tokens = {name: value.get("content") if isinstance(value, dict) else value
              for name, value in special.items() if name.endswith("_token")}
    tokens = {name: text for name, text in tokens.items() if isinstance(text, str)}      # not add_bos_token
    return ChatTemplate(source, tokens, str(folder))


class ChatTemplate:
    """A Jinja chat template, rendered in jinja2's sandbox with what transformers gives it."""

    def __init__(self, source, special_tokens, where="the chat template", now=None):
        """special_tokens: {"bos_token": text, …}; now: a datetime for strftime_now, fixed for a whole run."""
        try:
            import jinja2
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise InputError(f"{where} needs jinja2, which torch requires: pip install jinja2.") from None
        self.source, self.special_tokens = source, special_tokens
        self.errors = jinja2.exceptions.TemplateError
        self.now = now or datetime.datetime.now()
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        env.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        env.globals |= {"raise_exception": self.refuse, "strftime_now": self.now.strftime}
        try:
            self.template = env.from_string(source)
        except self.errors as error:
            raise InputError(f"{where}: the chat template is no Jinja template ({error}).") from None

    @staticmethod
    def refuse(reason):
        raise Unusable(reason)

    def text(self, messages, ask=True):
        """The rendered text; ask: with the mark that an answer follows. Unusable: it does not take them."""
        try:
            return self.template.render(messages=messages, add_generation_prompt=ask, **self.special_tokens)
        except (self.errors, TypeError, ValueError, LookupError) as error:
            raise Unusable(f"the chat template refuses it: {error}") from None

    def marked(self, messages, ask=True):
        """(text, [(start, end)] of the contents in it); no spans where marks change more than themselves."""
        plain = self.text(messages, ask)
        if any(OPEN in one["content"] or CLOSE in one["content"] for one in messages):
            return plain, []
        found, spans, text, start = self.text([enclosed(one) for one in messages], ask), [], "", 0
        for part in re.split(f"([{OPEN}{CLOSE}])", found):
            if part == OPEN:
                start = len(text)
            elif part == CLOSE:
                spans.append((start, len(text)))
            else:
                text += part
        return plain, spans if text == plain else []

    def ids(self, tokenizer, messages, ask=True):
        """Token ids of the rendered text: special strings are ids where the template wrote them alone."""
        text, spans = self.marked(messages, ask)
        return self.encode(tokenizer, text, spans)

    @staticmethod
    def encode(tokenizer, text, spans):
        """Ids of a text whose special strings count as such only outside of the spans."""
        names = sorted((name for name in tokenizer.special_ids if name), key=len, reverse=True)
        ids, done = [], 0
        for match in re.finditer("|".join(map(re.escape, names)), text) if names else ():
            if any(start < match.end() and match.start() < end for start, end in spans):
                continue
            if match.start() > done:
                ids += tokenizer.encode(text[done:match.start()])
            ids.append(tokenizer.special_ids[match[0]])
            done = match.end()
        return ids + (tokenizer.encode(text[done:]) if done < len(text) else [])


def enclosed(message):
    """The message with marks around its content, inside the white space that a template may trim."""
    content = message["content"]
    inner = content.strip()
    if not inner:
        return message
    start = content.index(inner)
    return message | {"content": content[:start] + OPEN + inner + CLOSE + content[start + len(inner):]}
