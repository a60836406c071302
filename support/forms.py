"""Forms of data: where a published row has its prompt and its answers, and how much better one of them is.

The first form below whose keys a row has is taken; a row that fits none is `standard`. A form is a name in
this table and a function of the row and of what stands under those keys. d is a difference of scores: then
p = σ(d / --score_temperature). Of more than two answers the best meets the worst.
"""
import json
import math
import re

FORMS = {
    "initial_reason_steps chosen rejected": "step_dpo",                   # steps, which have no end
    "history human_ref_A human_ref_B labels score_ratio": "shp",          # p = s / (1 + s)
    "answer_0 answer_1 score_0 score_1": "graded",                        # WebGPT: d of the scores
    "orig_response_A orig_response_B orig_score_A orig_score_B": "graded",          # Prometheus: the same
    "response1 response2 overall_preference": "graded",                   # HelpSteer3: d = -3 … 3
    "response_1 response_2 preference_strength": "graded",                # HelpSteer2: the same
    "response_0 response_1 better_response_id": "pku",
    "info summaries choice": "tldr",
    "prompt response_a response_b winner_model_a winner_model_b winner_tie": "votes",    # (wins + ½ ties) / n
    "conversation_a conversation_b winner": "vote",                       # Arena, MT-Bench: p = 1, ½ or 0
    "response_a response_b winner": "vote",
    "response_a response_b chosen": "vote",
    "response_1 response_2 winner": "vote",
    "completions scores": "several",                                      # lists: d of scores, ratings, ranks
    "responses scores": "several",
    "generations ratings": "several",
    "generations rating": "several",
    "all_generated_responses all_rm_scores": "several",
    "completions": "several",                                             # UltraFeedback
    "answers": "several",                                                 # Nectar, StackExchange
    "output": "ranking",                                                  # [better, worse]
    "turns": "mt_bench",
}
ASSISTANT = "\n\nAssistant:"      # where an HH prompt ends and its response begins
ROLES = {"human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant",
         "bot": "assistant", "chatbot": "assistant", "model": "assistant", "system": "system",
         "developer": "developer", "tool": "tool", "function": "tool", "observation": "tool"}
PROMPTS = ("orig_instruction", "prompt", "instruction", "question", "query", "problem", "inputs", "input")
DIALOGUES = ("conversations", "messages", "conversation", "trajectory", "context_messages", "context", "data")
SYSTEMS = ("system", "system_prompt", "system_message")
ANSWERS = {       # the better answer, or the only one: the worse one
    "chosen": "rejected", "chosen_response": "rejected_response", "response_j": "response_k",
    "real": "generated"} | dict.fromkeys(
        ("orig_response", "response", "completion", "output", "answer", "solution", "generated_solution",
         "targets"), "rejected")
SCORES = ("score_chosen score_rejected", "chosen_score rejected_score", "rating_chosen rating_rejected",
          "chosen_rating rejected_rating", "chosen-rating rejected-rating")
LOW = 2         # of ratings 1 … 5 or 0 … 4 this and less is a bad answer, and no example to learn from
BAD = {"label": 0, "kto_tag": 0, "is_safe": 0, "is_correct": 0, "helpfulness": LOW, "rating": LOW,
       "orig_score": LOW}


class Unusable(ValueError):
    """One row that cannot be used; the message is the reason under which the readers count it."""


class Keys(dict):
    """A JSON object without its nulls, which notes what of it is read; so do the objects inside of it."""

    def __init__(self, record):
        super().__init__((key, noting(value)) for key, value in record.items() if value is not None)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        return self[key] if key in self else default

    peek = dict.get                                         # notes nothing

    def first(self, *names):
        return next((name for name in names if name in self), None)

    def unused(self, inside=True):
        """Yields the keys that carry text and were not read; of an object that was, outer.inner."""
        for key, value in self.items():
            within = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, Keys)]
            if key in self.read:
                yield from (f"{key}.{name}" for one in within * inside for name in one.unused(False))
            elif has_text(value):
                yield key


def noting(value):
    if isinstance(value, dict):
        return Keys(value)
    return [noting(one) for one in value] if isinstance(value, list) else value


def has_text(value):
    if isinstance(value, (dict, list)):
        return any(map(has_text, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and bool(value.strip())


# -----------------------------------------------------------------------------------------------------------
# Prompts

def hh_text(messages):
    """Messages as HH-RLHF writes a dialogue, without the last "\\n\\nAssistant:"; system turns are plain.

    A message from an HH file keeps its leading space, so this gives its text back verbatim.
    """
    text = ""
    for message in messages:
        role, content = message["role"], message["content"]
        if role in ("system", "developer"):
            text += ("\n\n" if text else "") + content
        else:
            space = " " if content and not content[0].isspace() else ""
            text += {"user": "\n\nHuman:", "tool": "\n\nTool:"}.get(role, ASSISTANT) + space + content
    return text


def hh_prompt(text):
    """The messages of an HH dialogue that stops before "\\n\\nAssistant:"; other text stays verbatim."""
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    messages = [{"role": "user" if name == "Human" else "assistant", "content": content}
                for name, content in zip(parts[::2], parts[1::2], strict=True)]
    return messages if messages and hh_text(messages) == text else text + ASSISTANT


def as_turns(text):
    """A text as messages: an HH dialogue that stops before an answer as its turns, else one user's turn."""
    text = text.rstrip(" ") if text.rstrip(" ").endswith(ASSISTANT) else text
    turns = hh_prompt(text.removesuffix(ASSISTANT)) if text.endswith(ASSISTANT) else text
    return [{"role": "user", "content": text}] if isinstance(turns, str) else turns


def read_messages(turns):
    """Chat messages {role, content}, of text or text parts, or ShareGPT turns {from, value} -> messages."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Unusable("neither text nor a list of messages")
    messages = []
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise Unusable("a turn has an unknown role")
        if turn.get("tool_calls") or turn.get("function_call"):
            raise Unusable("a turn calls a tool")
        parts = content if isinstance(content, list) else []
        texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
        if texts and len(texts) == len(parts) and all(isinstance(text, str) for text in texts):
            content = "\n".join(texts)
        if not isinstance(content, str):
            raise Unusable("a turn's content is not text")
        messages.append({"role": ROLES[role.lower()], "content": content})
    return messages


def read_turns(turns):
    """The same; or texts, of which the first is the user's; or pairs [question, answer], {input, output}."""
    if all(isinstance(turn, dict) and "input" in turn and "output" in turn for turn in turns):
        turns = [[turn["input"], turn["output"]] for turn in turns]
    if all(isinstance(turn, list) for turn in turns):
        turns = [text for turn in turns for text in turn]
    if all(isinstance(turn, str) for turn in turns):
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return read_messages(turns)


def ask(row, answered=True, brings=False):
    """A row's prompt, or None: a text under `prompt` that stands alone verbatim, all else as messages.

    answered: there is an answer beside it, so no dialogue needs to hold one. brings: that is a dialogue.
    """
    key, system, before = row.first(*PROMPTS), row.first(*SYSTEMS), row.get("history", [])
    talk = next((name for name in DIALOGUES if isinstance(row.peek(name), list) and row.peek(name)), None)
    if key and talk == "context":
        before, talk = row["context"], None
    text = row[key] if key else None
    if isinstance(text, Keys):                              # WebGPT's question
        text = text["full_text"]
    if talk and not (brings or key and answered):
        messages = read_turns(row[talk])
    elif isinstance(text, str):
        more = [row[name] for name in ("input", "context") if name != key and has_text(row.peek(name))]
        if key == "prompt" and not (more or before or system):
            return text
        messages = as_turns("\n\n".join(dict.fromkeys(part for part in (text, *more) if part.strip())))
    else:
        messages = read_messages(text) if key else []
    if before:
        messages = (as_turns(before) if isinstance(before, str) else read_turns(before)) + messages
    if system and row[system].strip() and not (messages and messages[0]["role"] == "system"):
        messages = [{"role": "system", "content": row[system]}, *messages]
    return messages if messages or key else None


# -----------------------------------------------------------------------------------------------------------
# Forms: the row, and the values of the keys that FORMS names -> found(…), or None: it is not of this form

def found(prompt, chosen=None, rejected=None, p=None, margin=None, unfit="", finished=(True, True)):
    """prompt: text or messages; None: an answer brings it. chosen: the better answer, but for p below ½.
    margin: d, in place of p. unfit: why chosen alone is no example to learn from."""
    return dict(prompt=prompt, chosen=chosen, rejected=rejected, p=p, margin=margin, unfit=unfit,
                finished=finished)


def number(value):
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise Unusable("a score is not a number")
    return float(value)


def best_and_worst(prompt, answers, scores, rated=False):
    """The first with the highest score, and the last with the lowest. rated: on a scale of 1 … 5."""
    if len(answers) != len(scores):
        raise Unusable("not as many scores as answers")
    scores = [number(score) for score in scores]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    best, worst = order[0], order[-1]
    low = f"rated {LOW} or lower" if rated and scores[best] <= LOW else ""
    rejected = answers[worst] if worst != best else None
    return found(prompt, answers[best], rejected, None, scores[best] - scores[worst], low)


def named(index, first, second):
    """(better, worse), where `index`, 0 or 1, names the better one."""
    if index not in (0, 1):
        raise Unusable("neither answer is named as the better one")
    return (second, first) if index else (first, second)


def standard(row, answered=False):
    """HH, TRL, UltraFeedback binarized, Orca DPO, Tulu, Skywork, KTO, HelpSteer, Alpaca, ShareGPT, Dolly …"""
    key = next((name for name in ANSWERS if name in row and (name != "real" or "generated" in row)), None)
    chosen, rejected = (row[key], row.get(ANSWERS[key])) if key else (None, None)
    prompt = ask(row, answered or key is not None, isinstance(chosen, list) and len(chosen) > 1)
    scores = next(([row[name] for name in pair.split()] for pair in SCORES
                   if row.keys() >= set(pair.split())), None)
    margin = number(scores[0]) - number(scores[1]) if scores else None
    if scores and margin < 0 and "p" not in row:
        raise Unusable("the chosen answer has the lower score")
    bad = [f"{name} is {row[name]}" for name, low in BAD.items() if str(row.peek(name)).lower() == "false"
           or isinstance(row.peek(name), (int, float)) and row[name] <= low]
    finished = row.get("finished", [True, True])
    if not isinstance(finished, list) or [*map(type, finished)] != [bool, bool]:
        raise Unusable("finished is not a list of two booleans")
    return found(prompt, chosen, rejected, row.get("p"), margin, "".join(bad[:1]), finished)


def step_dpo(row, before, chosen, rejected):
    """xinlai/Math-Step-DPO-10K: both answers are the steps so far and one more."""
    return found(ask(row), before + chosen, before + rejected, finished=(False, False))


def shp(row, history, a, b, label, s):
    """stanfordnlp/SHP, SHP-2: label 1 where A is the better one, with s times the votes."""
    return found(as_turns(history), *named(label, b, a), p=s / (1 + s))


def several(row, answers, scores=None):
    """openbmb/UltraFeedback, berkeley-nest/Nectar, HuggingFaceH4/stack-exchange-preferences; distilabel's
    generations, Snorkel's all_generated_responses and other lists with their scores beside them."""
    if "chosen" in row or not isinstance(answers, list):
        return None
    if isinstance(scores, list):
        return best_and_worst(ask(row), answers, scores)
    scores = [score(one) if isinstance(one, Keys) else None for one in answers]
    if scores and None not in scores:
        texts = [one[one.first("response", "answer", "text")] for one in answers]
        return best_and_worst(ask(row), texts, scores, "annotations" in answers[0])


def score(answer):
    """How good one of several answers is, or None. UltraFeedback's overall_score is wrong in places."""
    if "annotations" in answer:
        ratings = [answer["annotations"][name]["Rating"] for name in answer["annotations"]]
        ratings = [number(rating) for rating in ratings if rating != "N/A"]
        return sum(ratings) / len(ratings)
    return -number(answer["rank"]) if "rank" in answer else answer.get(answer.first("pm_score", "score"))


def graded(row, first, second, *scores):
    """openai/webgpt_comparisons, prometheus-eval/Preference-Collection; nvidia/HelpSteer3 and HelpSteer2's
    preferences have one score for both: above 0 the second is the better one."""
    scores = scores if len(scores) == 2 else (0, *scores)
    return best_and_worst(ask(row), [first, second], scores, "orig_score_A" in row)


def pku(row, first, second, better):
    """PKU-Alignment/PKU-SafeRLHF: the more helpful one; which may be unsafe, and then no example."""
    unsafe = row.get(f"is_response_{better}_safe") is False
    return found(ask(row), *named(better, first, second), unfit="the better one is unsafe" * unsafe)


def tldr(row, info, summaries, choice):
    """openai/summarize_from_feedback, comparisons: the question as that paper has it."""
    names = {"subreddit": "SUBREDDIT: r/", "title": "TITLE: ", "post": "POST: ", "article": ""}
    parts = [mark + info[name] for name, mark in names.items() if has_text(info.peek(name))]
    return found("\n\n".join([*parts, "TL;DR:"]), *named(choice, *(one["text"] for one in summaries)))


def vote(row, first, second, winner):
    """lmsys/chatbot_arena_conversations, mt_bench_human_judgments, arena-human-preference-100k, -140k, PPE.
    `turn` says how many turns of a dialogue were judged."""
    if "rejected" in row:
        return None
    name = winner.lower().removeprefix("model_")
    if name not in ("a", "b", "tie", "tie (bothbad)", "both_bad", "bothbad"):
        raise Unusable("the winner is neither model_a nor model_b nor is it a tie")
    p = {"a": 1.0, "b": 0.0}.get(name, 0.5)
    if isinstance(first, str):
        return found(ask(row), first, second, p)
    talks = [read_messages(talk) for talk in (first, second)]
    ends = [2 * row.get("turn", len(talk)) + (talk[0]["role"] == "system") for talk in talks]
    return found(None, *(talk[:end] for talk, end in zip(talks, ends)), p)


def votes(row, questions, *rest):
    """lmsys/lmsys-arena-human-preference-55k: JSON lists of turns, and counts of votes."""
    questions, *answers = map(json.loads, (questions, *rest[:2]))
    talks = [read_turns([list(pair) for pair in zip(questions, talk, strict=True)]) for talk in answers]
    wins, losses, ties = map(number, rest[2:])
    return found(None, *talks, (wins + ties / 2) / (wins + losses + ties))


def ranking(row, answers):
    """LLaMA-Factory's comparison_gpt4_data: the better one first."""
    if isinstance(answers, list) and len(answers) == 2:
        return found(ask(row), *answers)


def mt_bench(row, turns):
    """The first turn alone: a later one needs an answer to it."""
    if isinstance(turns, list) and not row.first(*PROMPTS, *DIALOGUES):
        return found(read_turns(turns[:1]))

