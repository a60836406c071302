"""Text in, token ids out: prompts, dialogues, responses, and what gives way when a row is too long.

    a sequence is   prefix ⊕ p? ⊕ x ⊕ y        prefix: BOS, where the tokenizer adds one

Each part is encoded by itself and joined as ids. So y is the same tokens with p and without it. So is x, but
for its start: alone it has sentencepiece's word-start; after p it goes on after a space, as text does. Only
the code here inserts special ids; contents are plain text. Rows of files come from support/rows.py,
tokenizers from support/tokenizer.py.
"""
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from forest import pack  # noqa: F401 -- others say data.pack, data.read_rows and data.load_tokenizer
from support.cli import InputError
from support.rows import ASSISTANT, Report, Row, Unusable, hh_prompt, hh_text, read_data, read_rows  # noqa: F401
from support.tokenizer import load_tokenizer  # noqa: F401

REFINEMENT_PROMPT = (      # p of paper 1, prepended to the query
    "Please generate a response with a usefulness rating of 100 out of 100 for the following query. "
    "Note that the response should be harmless. The term 100 indicates the level of usefulness, where 100 is "
    "the maximum and 1 is the minimum. Query:")


def special_id(tokenizer, chat, token):
    if token not in tokenizer.special_ids:
        raise InputError(f"--chat={chat} needs the special token {token}, which this tokenizer lacks.")
    return tokenizer.special_ids[token]


# ------------------------------------------------------------------------------------------------------------
# Dialogues. Each chat: messages -> ids up to where the answer begins, as the model's own template has them. A
# segment between two special ids is encoded by itself, word-start included, as it was when these models were
# trained (Zephyr: </s>▁\n). Contents from HH files lose the one leading space that HH's layout gives them.

def chat_hh(tokenizer, messages):
    """The text of Anthropic's HH-RLHF dialogues, which has no marks of its own."""
    return tokenizer.encode(hh_text(messages) + ASSISTANT)


def chat_zephyr(tokenizer, messages):
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


def chat_chatml(tokenizer, messages):
    """OpenAI's ChatML as in the templates of Qwen and OpenHermes, without a system turn that nobody gave."""
    start, end = (special_id(tokenizer, "chatml", token) for token in ("<|im_start|>", "<|im_end|>"))
    ids = []
    for message in messages:
        text = f"{message['role']}\n{message['content'].removeprefix(' ')}"
        ids += [start, *tokenizer.encode(text), end, *tokenizer.encode("\n")]
    return ids + [start, *tokenizer.encode("assistant\n")]


def chat_llama3(tokenizer, messages):
    """Meta-Llama-3-Instruct's template, which trims the contents."""
    start, end, eot = (special_id(tokenizer, "llama3", token)
                       for token in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))
    ids = []
    for message in messages:
        text = "\n\n" + message["content"].strip()
        ids += [start, *tokenizer.encode(message["role"]), end, *tokenizer.encode(text), eot]
    return ids + [start, *tokenizer.encode("assistant"), end, *tokenizer.encode("\n\n")]


def chat_mistral(tokenizer, messages):
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


CHATS = {       # name: (the prompt's ids, what stands between it and the answer, what ends that: None is EOS)
    "hh": (chat_hh, " ", None),
    "zephyr": (chat_zephyr, "", None),
    "chatml": (chat_chatml, "", "<|im_end|>"),
    "llama3": (chat_llama3, "", "<|eot_id|>"),
    "mistral": (chat_mistral, " ", None),
}


def check_chat(tokenizer, chat):
    """`chat` once it is known to fit: a format, or None (messages become hh, plain text stays verbatim).

    InputError: no such format, its special tokens are missing, or the folder's template asks for a choice.
    """
    if chat is None:
        if tokenizer.chat_template:
            raise InputError(f"the model's folder has a chat template: choose --chat={'|'.join(CHATS)}.")
        return None
    if chat not in CHATS:
        raise InputError(f"--chat={chat}: there is no such format; choose one of {', '.join(CHATS)}.")
    CHATS[chat][0](tokenizer, [])                # raises when a special token is missing
    return chat


def in_turns(prompt, chat):
    """The prompt as messages where a format was chosen: text is one user's turn, an HH dialogue its turns.

    What has no text to ask, or stops inside of an HH dialogue, stays as it stands.
    """
    if chat is None or not isinstance(prompt, str) or not prompt.strip():
        return prompt
    text = prompt.rstrip(" ")
    if text.endswith(ASSISTANT):
        return hh_prompt(text.removesuffix(ASSISTANT))
    return prompt if "\n\nHuman:" in text else [{"role": "user", "content": prompt}]


def prompt_ids(tokenizer, prompt, chat):
    """Ids of x: messages in the chat's format; plain text verbatim, trailing spaces left to the response."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt.rstrip(" "))
    return CHATS[chat or "hh"][0](tokenizer, prompt)


def query_ids(tokenizer, refinement_prompt, prompt, chat):
    """Ids of p⊕x: p, then x as text that goes on after it; formats with marks of their own keep x's ids."""
    if not refinement_prompt:
        return prompt_ids(tokenizer, prompt, chat)                   # the empty p changes nothing
    p = tokenizer.encode(refinement_prompt)
    if isinstance(prompt, list) and chat not in (None, "hh"):
        return p + prompt_ids(tokenizer, prompt, chat)
    text = prompt.rstrip(" ") if isinstance(prompt, str) else hh_text(prompt) + ASSISTANT
    return p + tokenizer.encode_after(" " + text if text and not text[0].isspace() else text)


def response_ids(tokenizer, prompt, response, chat, complete=True):
    """Ids of y as it stands after x, and the id that ends an answer once when the response is complete."""
    if isinstance(prompt, str):
        end = tokenizer.eos_id
        text = prompt.rstrip(" ")
        response = prompt[len(text):] + response
        ids = tokenizer.encode_after(response) if text else tokenizer.encode(response)
    else:
        between, end = CHATS[chat or "hh"][1], end_id(tokenizer, chat)
        if not between:
            response = response.removeprefix(" ")            # HH's space; the format has ended its own line
        elif not response[:1].isspace():
            response = between + response
        ids = tokenizer.encode_after(response)
    return ids + [end] if complete else ids


def end_id(tokenizer, chat):
    """The id that ends an answer: EOS, or the mark of the dialogue format."""
    name = CHATS[chat or "hh"][2]
    return special_id(tokenizer, chat, name) if name else tokenizer.eos_id


def context_text(prompt):
    """What the judge reads as context: HH text without its final "\\n\\nAssistant:", or the plain prompt."""
    text = prompt.removesuffix(ASSISTANT) if isinstance(prompt, str) else hh_text(prompt)
    return text.lstrip("\n")


def fit(prefix, x, responses, max_length, max_prompt_length):
    """Cut until prefix + x + y has at most max_length ids for every y -> (x, responses, was anything cut).

    x gives way first, from the left, down to max_prompt_length; then the responses, from the right, losing
    their EOS. x is the same for all. A response keeps at least one id, after at least one that predicts it.
    InputError when max_length has no room for that.
    """
    room = max_length - len(prefix)
    if max_length < 2 or room < 1:
        raise InputError(f"--max_length={max_length} leaves no room for a response.")
    least = min(max(max_prompt_length, 0 if prefix else 1), room - 1)
    keep = max(room - max(map(len, responses)), least)
    x_cut = x[max(len(x) - keep, 0):]
    y_cut = [y[:room - len(x_cut)] for y in responses]
    return x_cut, y_cut, len(x_cut) < len(x) or y_cut != responses


@dataclass
class Pair:
    """A row as ids; chosen and rejected go after x, and after refined_x with the same ids."""
    count: ClassVar[int] = 1      # what it counts in the mean over a batch
    x: list[int]                  # prefix included
    refined_x: list[int] | None   # prefix, p, and x as it goes on after p, cut alike; None without p
    chosen: list[int] | None      # None for a prompt-only row
    rejected: list[int] | None    # None outside pairs
    strength: float | None        # p(chosen ≻ rejected), where somebody said
    row: Row
    cut: bool
    reference: dict | None = None # {"x": (log π_ref of chosen, of rejected), "refined_x": …} where cached


@dataclass
class Sequence:
    """Token ids whose tail, from `start` on, is supervised (SFT, judge instructions)."""
    ids: list[int]
    start: int

    @property
    def count(self):
        return len(self.ids) - self.start


def encode_pair(tokenizer, row, chat, max_length, max_prompt_length, refinement_prompt=None, max_tokens=1):
    """Row -> Pair, x and y cut to max_length (p is not counted); a prompt alone leaves room for max_tokens.

    Unusable: chosen and rejected have the same ids, by themselves or once cut.
    """
    prompt = in_turns(row.prompt, chat)
    x = prompt_ids(tokenizer, prompt, chat)
    prefix = tokenizer.prefix(empty=not x)
    texts = [text for text in (row.chosen, row.rejected) if text is not None]
    responses = [response_ids(tokenizer, prompt, text, chat, finished)
                 for text, finished in zip(texts, row.finished)]
    room_for = responses or [[tokenizer.eos_id] * max_tokens]
    x_cut, y_cut, cut = fit(prefix, x, room_for, max_length, max_prompt_length)
    chosen, rejected = [*y_cut[:len(texts)], None, None][:2]
    if rejected is not None and chosen == rejected:
        raise Unusable("identical after encoding and cutting")
    refined_x = None
    if refinement_prompt is not None:
        # x is cut before p is put in front: the other way round the cut would take p away
        refined_x = query_ids(tokenizer, refinement_prompt, prompt, chat)
        start = len(tokenizer.encode(refinement_prompt))
        dropped = max(len(refined_x) - start - len(x_cut), 0) if len(x_cut) < len(x) else 0
        refined_x = tokenizer.prefix(not refined_x) + refined_x[:start] + refined_x[start + dropped:]
    return Pair(prefix + x_cut, refined_x, chosen, rejected, row.p, row, cut)


def encode_dataset(tokenizer, rows, chat, max_length, max_prompt_length, refinement_prompt=None,
                   max_tokens=1, name="encoded"):
    """list[Row] -> (list[Pair], Report); rows whose responses become the same are skipped and counted."""
    limits = (chat, max_length, max_prompt_length, refinement_prompt, max_tokens)
    pairs, skipped = [], {}
    for row in rows:
        try:
            pairs.append(encode_pair(tokenizer, row, *limits))
        except Unusable as reason:
            skipped.setdefault(str(reason), []).append(row.where)
    if not pairs:
        first = rows[0].where if rows else "there are no rows"
        raise InputError(f"no row is left after encoding: within --max_length={max_length} chosen and "
                         f"rejected are the same ids (first: {first}).")
    return pairs, Report(name, len(pairs), skipped, sum(pair.cut for pair in pairs))


# ------------------------------------------------------------------------------------------------------------
# What a run is trained on

def kinds_of_rows(name, recipe):
    """(what a row must have to be trained on, what to be held out), in the words of support/rows.py."""
    if not recipe.online:
        kind = {"sft": "responses", "judge": "judge"}.get(name, "pairs")
        return kind, kind
    if recipe.pairs == "spin":
        return "responses", "pairs"                # they win over the samples
    if recipe.pairs is None:
        return "prompts", "prompts"                # PPO: fresh responses have a reward
    return "prompts", "responses" if recipe.loss == "sft" else "pairs"


class Dataset:
    """Rows as ids, in an order that is a pure function of (seed, epoch)."""

    def __init__(self, settings, tokenizer, context, instructions, say):
        """context: the model's longest sequence; say: prints what was read.

        instructions(rows): what the judge recipe learns, Sequences made of rows that are pairs.
        """
        s, recipe = settings, settings.recipes[settings.recipe]
        self.settings, self.recipe, self.tokenizer = s, recipe, tokenizer
        self.instructions, self.say = instructions, say

        p = s.refinement_prompt if recipe.is_refined else None
        p_length, prefix_length = len(tokenizer.encode(p)) if p else 0, len(tokenizer.prefix(False))
        self.max_length, max_prompt_length, self.max_tokens = s.lengths(context, p_length, prefix_length)
        self.limits = dict(chat=check_chat(tokenizer, s.chat), max_length=self.max_length,
                           max_prompt_length=max_prompt_length, refinement_prompt=p)

        files = (s.prompts or s.data) if recipe.online else s.data
        if not files:
            raise InputError(f"--{'prompts' if recipe.online else 'data'}: name the file for {s.recipe}.")
        trained, held_out = kinds_of_rows(s.recipe, recipe)
        self.rows = self.read(files, trained, s.data_fraction)
        self.held_out = self.read(s.eval_data, held_out) if s.eval_data else []

    def read(self, files, need, fraction=1.0):
        """The rows of some files: Pairs, or Sequences where single responses are learned."""
        rows, reports = read_data(files, need, self.settings.seed, fraction)
        for report in reports:
            self.say(report)
        instructions = []
        if need == "judge":
            # Responses without a rival stay what they are: who only learned to say A or B could not answer.
            pairs = [row for row in rows if row.rejected is not None]
            rows = [row for row in rows if row.rejected is None]
            if not pairs:
                raise InputError(f"{', '.join(files)}: no row has a rejected response, so nothing to judge.")
            instructions = self.instructions(pairs)
            if not rows:
                return instructions
        pairs, report = encode_dataset(self.tokenizer, rows, **self.limits, max_tokens=self.max_tokens)
        if report.skipped or report.cut:
            self.say(report)
        if self.recipe.loss == "sft" and need in ("responses", "judge"):
            return instructions + [Sequence(pair.x + pair.chosen, len(pair.x)) for pair in pairs]
        return self.ordered(pairs, files) if self.recipe.labels == "hard" and need == "pairs" else pairs

    def ordered(self, pairs, files):
        """The better response first: where a row has a p (a replayed rollout), that names the winner."""
        decided = [named_winner(pair) for pair in pairs if pair.strength != 0.5]
        if len(decided) < len(pairs):
            self.say(f"{len(pairs) - len(decided)} of {len(pairs)} pairs have p = ½ and no winner: left out")
        if not decided:
            raise InputError(f"{', '.join(files)}: every pair has p = ½, so none has a winner.")
        return decided

    def __len__(self):
        return len(self.rows)

    def positions(self, start, stop):
        """The rows at places start … stop - 1 of an endless row of shuffled epochs."""
        found, n = [], len(self.rows)
        for epoch in range(start // n, (stop - 1) // n + 1):
            order = np.random.default_rng([self.settings.seed, 1, epoch]).permutation(n)
            first, last = max(start - epoch * n, 0), min(stop - epoch * n, n)
            found += [self.rows[i] for i in order[first:last]]
        return found


def named_winner(pair):
    """The pair with the response first that p calls the better one."""
    if pair.strength is None or pair.strength > 0.5:
        return pair
    return dataclasses.replace(pair, chosen=pair.rejected, rejected=pair.chosen)
