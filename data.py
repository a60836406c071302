"""Text in, token ids out: prompts, dialogues, responses, and what gives way when a row is too long.

    a sequence is   prefix ⊕ p? ⊕ x ⊕ y        prefix: BOS, where the tokenizer adds one

Each part is encoded by itself and joined as ids. So y is the same tokens with p and without it. So is x, but
for its start: alone it has sentencepiece's word-start; after p it goes on after a space, as text does. Only
the code here inserts special ids; contents are plain text. Rows of files come from support/rows.py,
tokenizers from support/tokenizer.py.
"""
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from forest import pack  # noqa: F401 -- others say data.pack, data.read_rows and data.load_tokenizer
from support.chats import CHATS, Chat, chat_of  # noqa: F401
from support.cli import InputError, progress
from support.rows import ASSISTANT, Report, Row, Unusable, hh_prompt, hh_text, read_data, read_rows  # noqa
from support.tokenizer import load_tokenizer  # noqa: F401

REFINEMENT_PROMPT = (      # p of paper 1, prepended to the query
    "Please generate a response with a usefulness rating of 100 out of 100 for the following query. "
    "Note that the response should be harmless. The term 100 indicates the level of usefulness, where 100 is "
    "the maximum and 1 is the minimum. Query:")


def in_turns(prompt, chat):
    """The prompt as messages where a format was chosen: text is one user's turn, an HH dialogue its turns.

    Blank text, and HH text that does not end with "Assistant:", stays as it stands. All messages come under
    the system message that was given.
    """
    if isinstance(prompt, str) and prompt.strip() and chat.name is not None:
        text = prompt.rstrip(" ")
        if text.endswith(ASSISTANT):
            prompt = hh_prompt(text.removesuffix(ASSISTANT))
        elif "\n\nHuman:" not in text:
            prompt = [{"role": "user", "content": prompt}]
    return prompt if isinstance(prompt, str) else chat.with_system(prompt)


def prompt_ids(tokenizer, prompt, chat):
    """Ids of x: messages in the chat's format; plain text verbatim, trailing spaces left to the response."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt.rstrip(" "))
    return chat.ids(prompt)


def refined_ids(tokenizer, refinement_prompt, prompt, chat, room):
    """Ids of prefix ⊕ p ⊕ x; of x the last `room` ids, where it was cut (None: it was not).

    Between marks p stands in the first user's turn, before its text; else after BOS, and x goes on as text
    does. There the turns were cut already.
    """
    if isinstance(prompt, list) and chat.marks:
        first = next((i for i, turn in enumerate(prompt) if turn["role"] == "user"), None)
        if refinement_prompt and first is not None:
            text = f"{refinement_prompt} {prompt[first]['content'].removeprefix(' ')}"
            prompt = [*prompt[:first], prompt[first] | {"content": text}, *prompt[first + 1:]]
        x = chat.ids(prompt)
        return prefix_ids(tokenizer, prompt, chat, x) + x
    p = tokenizer.encode(refinement_prompt)
    if p:
        text = prompt.rstrip(" ") if isinstance(prompt, str) else hh_text(prompt) + ASSISTANT
        x = tokenizer.encode_after(" " + text if text and not text[0].isspace() else text)
    else:
        x = prompt_ids(tokenizer, prompt, chat)                  # the empty p changes nothing
    before = tokenizer.prefix(empty=not p + x)
    return before + p + (x if room is None else x[max(len(x) - room, 0):])


def response_ids(tokenizer, prompt, response, chat, complete=True):
    """Ids of y as it stands after x, and the id that ends an answer once when the response is complete."""
    if isinstance(prompt, str):
        end = tokenizer.eos_id
        text = prompt.rstrip(" ")
        response = prompt[len(text):] + response
        ids = tokenizer.encode_after(response) if text else tokenizer.encode(response)
    else:
        end = chat.end
        if not chat.between:
            response = response.removeprefix(" ")            # HH's space; the format has ended its own line
        elif not response[:1].isspace():
            response = chat.between + response
        ids = tokenizer.encode_after(response)
    return ids + [end] if complete else ids


def prefix_ids(tokenizer, prompt, chat, x):
    """The ids before x: BOS, where the tokenizer adds one. What a template writes has it already."""
    return [] if isinstance(prompt, list) and chat.writes_bos else tokenizer.prefix(empty=not x)


def context_text(prompt):
    """What the judge reads as context: HH text without its final "\\n\\nAssistant:", or the plain prompt."""
    if isinstance(prompt, str):
        text = prompt.rstrip(" ")                                # Nectar has one after the mark
        return (text.removesuffix(ASSISTANT) if text.endswith(ASSISTANT) else prompt).lstrip("\n")
    return hh_text(prompt).lstrip("\n")


def prompt_room(prefix, responses, max_length, max_prompt_length):
    """How many ids of x fit between prefix and the longest of the responses, at least max_prompt_length.

    A response keeps at least one id, after at least one that predicts it. InputError where that cannot be.
    """
    room = max_length - len(prefix)
    if max_length < 2 or room < 1:
        raise InputError(f"--max_length={max_length} leaves no room for a response.")
    least = min(max(max_prompt_length, 0 if prefix else 1), room - 1)
    return max(room - max(map(len, responses)), least)


def fit(prefix, x, responses, max_length, max_prompt_length):
    """Cut until prefix + x + y has at most max_length ids for every y -> (x, responses, was anything cut).

    x gives way first, from the left, down to max_prompt_length; then the responses, from the right, losing
    their EOS. x is the same for all.
    """
    x_cut = x[max(len(x) - prompt_room(prefix, responses, max_length, max_prompt_length), 0):]
    y_cut = [y[:max_length - len(prefix) - len(x_cut)] for y in responses]
    return x_cut, y_cut, len(x_cut) < len(x) or y_cut != responses


def cut_turns(tokenizer, chat, messages, room):
    """The messages, less what is too much for `room` ids: the oldest turns after the system turn, whole; then
    the front of the last user's text. Marks and system turn stay. Unusable: they alone are longer."""
    while (excess := len(chat.ids(messages)) - room) > 0:
        start = int(messages[0]["role"] in ("system", "developer"))
        later = [i for i, turn in enumerate(messages) if turn["role"] == "user" and i > start]
        if later:
            messages = messages[:start] + messages[later[0]:]
            continue
        *before, last = messages
        kept = tokenizer.decode(tokenizer.encode(last["content"])[excess:]).lstrip("\ufffd")
        if not kept.strip():
            raise Unusable("the marks of its turns leave no room for a text")
        messages = [*before, last | {"content": kept}]
    return messages


@dataclass
class Pair:
    """A row as ids: a pair, one response, or a prompt. Responses go after x and after refined_x alike."""
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

    @property
    def x(self):
        return self.ids[:self.start]


def encode_pair(tokenizer, row, chat, max_length, max_prompt_length, refinement_prompt=None, max_tokens=1):
    """Row -> Pair, x and y cut to max_length (p is not counted); a prompt alone leaves room for max_tokens.

    Unusable: chosen and rejected have the same ids, by themselves or once cut.
    """
    prompt = in_turns(row.prompt, chat)
    x = prompt_ids(tokenizer, prompt, chat)
    prefix = prefix_ids(tokenizer, prompt, chat, x)
    texts = [text for text in (row.chosen, row.rejected) if text is not None]
    responses = [response_ids(tokenizer, prompt, text, chat, finished)
                 for text, finished in zip(texts, row.finished)]
    room_for = responses or [[tokenizer.eos_id] * max_tokens]        # the room of a sample
    kept = prompt
    if isinstance(prompt, list) and chat.marks:
        room = prompt_room(prefix, room_for, max_length, max_prompt_length)
        kept = cut_turns(tokenizer, chat, prompt, room)
        x = chat.ids(kept)
    x_cut, y_cut, cut = fit(prefix, x, room_for, max_length, max_prompt_length)
    chosen, rejected = [*y_cut[:len(texts)], None, None][:2]
    if rejected is not None and chosen == rejected:
        raise Unusable("identical after encoding and cutting")
    refined_x = None
    if refinement_prompt is not None:
        # x is cut before p is put in front: the other way round the cut would take p away
        room = len(x_cut) if len(x_cut) < len(x) else None
        refined_x = refined_ids(tokenizer, refinement_prompt, kept, chat, room)
    return Pair(prefix + x_cut, refined_x, chosen, rejected, row.p, row, cut or kept is not prompt)


def encode_dataset(tokenizer, rows, chat, max_length, max_prompt_length, refinement_prompt=None,
                   max_tokens=1):
    """list[Row] -> (list[Pair], Report); rows whose responses become the same are skipped and counted."""
    limits = (chat, max_length, max_prompt_length, refinement_prompt, max_tokens)
    pairs, skipped = [], {}
    for row in progress(rows, "encoding"):
        try:
            pairs.append(encode_pair(tokenizer, row, *limits))
        except Unusable as reason:
            skipped.setdefault(str(reason), []).append(row.where)
    if not pairs:
        first = next((f"{where[0]}: {why}" for why, where in skipped.items()), "there are no rows")
        raise InputError(f"no row is left after encoding within --max_length={max_length} ({first}).")
    return pairs, Report("encoded", len(pairs), skipped, sum(pair.cut for pair in pairs))


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

    def __init__(self, settings, tokenizer, chat, context, instructions, say):
        """context: the model's longest sequence; say(text): prints what was read; instructions(rows): what
        the judge recipe learns, Sequences made of rows that are pairs."""
        s, recipe = settings, settings.recipes[settings.recipe]
        self.settings, self.recipe, self.tokenizer = s, recipe, tokenizer
        self.instructions, self.say, self.has_dialogues = instructions, say, False
        p = s.refinement_prompt if recipe.is_refined else None
        p_length, prefix_length = len(tokenizer.encode(p)) if p else 0, len(tokenizer.prefix(False))
        self.max_length, max_prompt_length, self.max_tokens = s.lengths(context, p_length, prefix_length)
        self.limits = dict(chat=chat, max_length=self.max_length,
                           max_prompt_length=max_prompt_length, refinement_prompt=p)
        files = (s.prompts or s.data) if recipe.online else s.data
        if not files:
            raise InputError(f"--{'prompts' if recipe.online else 'data'}: name the file for {s.recipe}.")
        trained, held_out = kinds_of_rows(s.recipe, recipe)
        self.held_out = self.read(s.eval_data, held_out) if s.eval_data else []      # mostly the shorter ones
        self.rows = self.read(files, trained, s.data_fraction)

    def read(self, files, need, fraction=1.0):
        """The rows of some files: Pairs, or Sequences where single responses are learned."""
        s = self.settings
        rows, reports = read_data(files, need, s.seed, fraction, columns=s.columns,
                                  score_temperature=s.score_temperature)
        for report in reports:
            self.say(report)
        self.has_dialogues |= any(not isinstance(row.prompt, str) or row.prompt.rstrip().endswith(ASSISTANT)
                                  for row in rows)
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


def without_strength(pairs):
    return [pair for pair in pairs if pair.strength is None]


def named_winner(pair):
    """The pair with the response first that p calls the better one."""
    if pair.strength is None or pair.strength > 0.5:
        return pair
    return replace(pair, chosen=pair.rejected, rejected=pair.chosen, strength=1 - pair.strength)
