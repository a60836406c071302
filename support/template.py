"""A folder's own chat template: messages to text as Jinja renders it, and to ids, contents as plain text.

    template = read_template(folder)                          None where the folder has none
    template.text(messages, ask=True)                         what transformers' apply_chat_template renders
    template.ids(tokenizer, messages, ask=True)               its ids; `</s>` inside of a message stays text

To know which special strings are the template's and which a message's, each content is rendered between two
private-use characters, which are taken out again. jinja2 comes with torch.
"""
import datetime
import functools
import itertools
import json
import operator
import re
import sys

from support.cli import InputError, read_json
from support.rows import Unusable


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

    def __init__(self, source, special_tokens, where="the chat template"):
        """special_tokens: {"bos_token": text, …}. `now`, for strftime_now, may be set for a whole run."""
        try:
            import jinja2
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise InputError(f"{where} needs jinja2, which torch requires: pip install jinja2.") from None
        self.source, self.special_tokens, self.where, self.noted = source, special_tokens, where, False
        self.errors = jinja2.exceptions.TemplateError
        self.now = datetime.datetime.now()
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        env.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        env.globals |= {"raise_exception": self.refuse, "strftime_now": lambda form: self.now.strftime(form)}
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
            raise Unusable(f"the chat template refuses it: {error}".rstrip(".")) from None

    def marked(self, messages, ask=True):
        """(text, [(start, end)] of the contents in it); no spans where marks change more than themselves.

        Unusable: it does not take the messages, or leaves one out.
        """
        plain = self.text(messages, ask)
        contents = "".join(one["content"] for one in messages)
        private = (chr(code) for code in itertools.count(0xE000) if chr(code) not in contents)
        opening, closing = next(private), next(private)
        inside = [enclosed(one, opening, closing) for one in messages]
        found, spans, text, start = self.text(inside, ask), [], "", None
        turns = sum(map(operator.ne, inside, messages))
        if max(found.count(opening), found.count(closing)) < turns:
            roles = sorted({one["role"] for one in messages})
            raise Unusable(f"the chat template leaves out a turn ({', '.join(roles)})")
        for part in re.split(f"([{opening}{closing}])", found):
            if part == opening:
                start = len(text) if start is None else start
            elif part == closing and start is not None:
                spans, start = [*spans, (start, len(text))], None
            else:
                text += part
        same = text == plain and len(spans) == turns
        if not same and not self.noted:
            self.noted = True
            print(f"note: {self.where}: the chat template changes contents; special tokens that stand in "
                  "them count as such.", file=sys.stderr)
        return plain, spans if same else []

    def ids(self, tokenizer, messages, ask=True):
        """Token ids of the rendered text: special strings are ids where the template wrote them alone."""
        text, spans = self.marked(messages, ask)
        return self.encode(tokenizer, text, spans)

    @staticmethod
    def encode(tokenizer, text, spans):
        """Ids of a text whose special strings count as such only outside of the spans."""
        ids, done, encode = [], 0, tokenizer.encode
        for match in special_strings(tuple(tokenizer.special_ids)).finditer(text):
            if any(start < match.end() and match.start() < end for start, end in spans):
                continue
            if match.start() > done:
                ids += encode(text[done:match.start()])
            ids.append(tokenizer.special_ids[match[0]])
            done, encode = match.end(), tokenizer.encode if tokenizer.later_starts else tokenizer.encode_after
        return ids + (encode(text[done:]) if done < len(text) else [])


@functools.cache
def special_strings(names):
    """A pattern of the leftmost, longest of these names; it never matches where there are none."""
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def enclosed(message, opening, closing):
    """The message with marks around its content, inside the white space that a template may trim.

    Where a template may cut its reasoning off, another opening mark stands after that.
    """
    content = message["content"]
    inner = content.strip()
    if not inner:
        return message
    start = content.index(inner)
    marked = opening + re.sub(r"</think>\s*", rf"\g<0>{opening}", inner) + closing
    return message | {"content": content[:start] + marked + content[start + len(inner):]}
