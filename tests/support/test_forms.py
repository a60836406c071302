"""The table of published forms of data: each as a file of three rows, and what becomes of it.

A row of a table is a published row with the names of its fields, short texts, and § where the three rows
differ. What it is read for, and what it becomes, stands after it.
"""
import contextlib
import copy
import json
import math
import random
import re

import pytest

import tiny
from support.cli import InputError
from support.forms import ROLES, Keys, Unusable
from support.rows import read_data, read_row, read_rows
from tiny import assistant, system, user


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def sigma(d):
    return 1 / (1 + math.exp(-d))


def dialogue(*texts):
    return [(user, assistant)[i % 2](text) for i, text in enumerate(texts)]


def parts(text):
    return [{"type": "text", "text": text, "image": None, "mimeType": None}]


HH = "\n\nHuman: Hi §\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:"
TALK = dialogue("Hi §", "Yes?", "Bye")
TLDR = "SUBREDDIT: r/aww\n\nTITLE: Cat §\n\nPOST: It sat.\n\nTL;DR:"
RATED = {"helpfulness": {"Rating": "5", "Rationale": "r"}, "honesty": {"Rating": "N/A", "Rationale": "r"},
         "truthfulness": {"Rating": "4", "Rationale": "r"}}
Q = "Why §?"
ASKED = [user(Q)]

# name: (a published row, prompt, chosen, rejected, p)
PAIRS = {
    "Anthropic/hh-rlhf": (
        {"chosen": HH + " a", "rejected": HH + " b"}, dialogue(" Hi §", " Yes?", " Bye"), " a", " b", None),
    "Dahoas/full-hh-rlhf": (
        {"prompt": HH, "response": " a", "chosen": " a", "rejected": " b"}, HH, " a", " b", None),
    "hh-rlhf whose answers repeat the prompt": (
        {"prompt": HH, "chosen": HH + " a", "rejected": HH + " b"}, HH, " a", " b", None),
    "CarperAI/openai_summarize_comparisons": (
        {"prompt": TLDR, "chosen": " a", "rejected": " b"}, TLDR, " a", " b", None),
    "TRL, explicit prompt": ({"prompt": "The sky § is", "chosen": " blue.", "rejected": " green."},
                             "The sky § is", " blue.", " green.", None),
    "TRL, implicit prompt": ({"chosen": "The sky § is blue.", "rejected": "The sky § is black."},
                             "The sky § is", " blue.", " black.", None),
    "TRL, conversational": ({"prompt": TALK, "chosen": [assistant("a")], "rejected": [assistant("b")]},
                            TALK, "a", "b", None),
    "TRL, conversational, implicit": (
        {"chosen": [*TALK, assistant("a")], "rejected": [*TALK, assistant("b")]}, TALK, "a", "b", None),
    "TRL's margin, trl-lib/ultrafeedback_binarized": (
        {"chosen": dialogue(Q, "a"), "rejected": dialogue(Q, "b"), "score_chosen": 8.0,
         "score_rejected": 7.5},
        ASKED, "a", "b", sigma(0.5)),
    "HuggingFaceH4/ultrafeedback_binarized (Zephyr)": (
        {"prompt": Q, "prompt_id": "§", "chosen": dialogue(Q, "a"), "rejected": dialogue(Q, "b"),
         "messages": dialogue(Q, "a"), "score_chosen": 9.0, "score_rejected": 6.0},
        ASKED, "a", "b", sigma(3)),
    "argilla/ultrafeedback-binarized-preferences-cleaned": (
        {"source": "s", "prompt": Q, "chosen": dialogue(Q, "a"), "chosen-rating": 5, "chosen-model": "m",
         "rejected": dialogue(Q, "b"), "rejected-rating": 4.75, "rejected-model": "n"},
        ASKED, "a", "b", sigma(0.25)),
    "openbmb/UltraFeedback": (
        {"source": "s", "instruction": Q, "models": ["m", "n", "o"], "completions": [
            {"model": "m", "response": "c", "annotations": {"honesty": {"Rating": "3"}},
             "overall_score": 5.0},
            {"model": "n", "response": "b", "annotations": {"honesty": {"Rating": "2"}},
             "overall_score": 10.0},
            {"model": "o", "response": "a", "annotations": RATED, "critique": "c", "overall_score": 8.0}],
         "correct_answers": ["None"], "incorrect_answers": ["None"]}, ASKED, "a", "b", sigma(2.5)),
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": (
        {"id": "§", "source": "s", "prompt": Q, "chosen": dialogue(Q, "a"), "rejected": dialogue(Q, "b"),
         "chosen_rating": 5.0, "rejected_rating": 1.0, "chosen_model": "m", "rejected_model": "n"},
        ASKED, "a", "b", sigma(4)),
    "Skywork/Skywork-Reward-Preference-80K": (
        {"chosen": dialogue(Q, "a"), "rejected": dialogue(Q, "b"), "source": "s"}, ASKED, "a", "b", None),
    "OpenRLHF/preference_dataset_mixture2_and_safe_pku": (
        {"rejected": dialogue(Q, "b"), "chosen": dialogue(Q, "a"), "rejected_score": 1, "chosen_score": 2.5},
        ASKED, "a", "b", sigma(1.5)),
    "allenai/reward-bench": (
        {"prompt": Q, "chosen": "a", "chosen_model": "m", "rejected": "b", "rejected_model": "n",
         "subset": "s", "id": 7}, Q, "a", "b", None),
    "mlabonne/orpo-dpo-mix-40k": (
        {"source": "s", "chosen": dialogue(Q, "a"), "rejected": dialogue(Q, "b"), "prompt": Q, "question": Q},
        ASKED, "a", "b", None),
    "Intel/orca_dpo_pairs, Axolotl's chatml.intel": (
        {"system": "Be kind.", "question": Q, "chosen": "a", "rejected": "b"},
        [system("Be kind."), user(Q)], "a", "b", None),
    "argilla/distilabel-intel-orca-dpo-pairs, chatml.icr": (
        {"system": "", "input": Q, "chosen": "a", "rejected": "b", "generations": ["b", "a"],
         "order": ["r", "c"], "labelling_model": "gpt-4", "rating": [9.0, 9.0], "chosen_score": 9.0},
        ASKED, "a", "b", None),
    "jondurbin/truthy-dpo-v0.1": (
        {"id": "§", "source": "s", "system": "S", "prompt": Q, "chosen": "a", "rejected": "b"},
        [system("S"), user(Q)], "a", "b", None),
    "Axolotl's llama3.argilla": (
        {"system": "S", "instruction": Q, "chosen_response": "a", "rejected_response": "b"},
        [system("S"), user(Q)], "a", "b", None),
    "argilla/distilabel-math-preference-dpo": (
        {"metadata": "{}", "instruction": Q, "chosen_response": "a", "chosen_rating": 9, "rejected_rating": 7,
         "rejected_response": "b"}, ASKED, "a", "b", sigma(2)),
    "argilla/distilabel-capybara-dpo-7k-binarized": (
        {"source": "s", "conversation": [{"input": Q, "output": "o"}], "original_response": "o", "prompt": Q,
         "chosen": dialogue(Q, "a"), "rejected": dialogue(Q, "b"), "rating_chosen": 5, "rating_rejected": 4},
        ASKED, "a", "b", sigma(1)),
    "distilabel's generations": (
        {"instruction": Q, "generations": ["c", "a", "b"], "ratings": [3, 5, 1],
         "rationales": ["r", "s", "t"]},
        ASKED, "a", "b", sigma(4)),
    "snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset": (
        {"prompt_id": "§", "prompt": Q, "all_generated_responses": ["a", "b"], "all_rm_scores": [0.1, -0.2],
         "chosen": dialogue(Q, "a"), "rejected": dialogue(Q, "b")}, ASKED, "a", "b", None),
    "Axolotl's chat_template.default": (
        {"messages": TALK, "chosen": assistant("a"), "rejected": assistant("b")}, TALK, "a", "b", None),
    "LLaMA-Factory, ShareGPT preferences": (
        {"conversations": [{"from": "system", "value": "S"}, human(Q)], "chosen": gpt("a"),
         "rejected": gpt("b")},
        [system("S"), user(Q)], "a", "b", None),
    "LLaMA-Factory, Alpaca preferences": (
        {"instruction": "Add", "input": "§ 2", "chosen": "a", "rejected": "b", "system": "S",
         "history": [["Hi", "Yes?"]]},
        [system("S"), *dialogue("Hi", "Yes?", "Add\n\n§ 2")], "a", "b", None),
    "LLaMA-Factory's ranking, comparison_gpt4_data": (
        {"instruction": "Add", "input": "§", "output": ["a", "b"]}, [user("Add\n\n§")], "a", "b", None),
    "stanfordnlp/SHP": (
        {"post_id": "§", "domain": "d", "history": Q, "human_ref_A": "b", "human_ref_B": "a", "labels": 0,
         "score_A": 2, "score_B": 8, "score_ratio": 4.0}, ASKED, "a", "b", 0.8),
    "berkeley-nest/Nectar": (
        {"prompt": "\n\nHuman: Hi § \n\nAssistant: ", "answers": [
            {"answer": "c", "model": "m", "rank": 2.0}, {"answer": "b", "model": "n", "rank": 3.0},
            {"answer": "a", "model": "o", "rank": 1.0}], "turns": 1, "num_responses": 3, "source": ["s"]},
        "\n\nHuman: Hi § \n\nAssistant: ", "a", "b", sigma(2)),
    "lvwerra/stack-exchange-paired": (
        {"qid": 7, "question": Q, "date": "d", "metadata": ["url"], "response_j": "a", "response_k": "b"},
        ASKED, "a", "b", None),
    "HuggingFaceH4/stack-exchange-preferences": (
        {"qid": 7, "question": Q, "answers": [
            {"answer_id": 1, "author": "x", "pm_score": 1, "selected": False, "text": "b"},
            {"answer_id": 2, "author": "y", "pm_score": 4, "selected": True, "text": "a"}],
         "metadata": ["url"]}, ASKED, "a", "b", sigma(3)),
    "openai/summarize_from_feedback, comparisons": (
        {"info": {"id": "7", "subreddit": "aww", "title": "Cat §", "post": "It sat.", "article": None},
         "summaries": [{"text": " b", "policy": "sup"}, {"text": " a", "policy": "ref"}], "choice": 1,
         "worker": "w", "split": "train", "extra": {"confidence": 8}}, TLDR, " a", " b", None),
    "openai/webgpt_comparisons": (
        {"question": {"dataset": "eli5", "id": "§", "full_text": Q}, "quotes_0": {"title": ["t"]},
         "answer_0": "b", "score_0": -0.5, "quotes_1": {"title": ["t"]}, "answer_1": "a", "score_1": 0.5},
        ASKED, "a", "b", sigma(1)),
    "UCLA-AGI/SPIN_iter0": ({"real": dialogue(Q, "a"), "generated": dialogue(Q, "b")}, ASKED, "a", "b", None),
    "nvidia/HelpSteer3": (
        {"domain": "general", "language": "english", "context": TALK, "response1": "a", "response2": "b",
         "overall_preference": -2, "individual_preference": [{"score": -2, "reasoning": "r"}]},
        TALK, "a", "b", sigma(2)),
    "nvidia/HelpSteer2, preferences": (
        {"split": "train", "prompt": Q, "response_1": "b", "response_2": "a", "preference_strength": 3,
         "preference_statement": "s"}, Q, "a", "b", sigma(3)),
    "PKU-Alignment/PKU-SafeRLHF": (
        {"prompt": Q, "response_0": "b", "response_1": "a", "is_response_0_safe": True,
         "is_response_1_safe": False, "better_response_id": 1, "safer_response_id": 0}, Q, "a", "b", None),
    "lmsys/chatbot_arena_conversations": (
        {"question_id": "§", "model_a": "m", "model_b": "n", "winner": "model_b", "judge": "arena_user_9",
         "conversation_a": dialogue(Q, "b"), "conversation_b": dialogue(Q, "a"), "turn": 1,
         "language": "English"},
        ASKED, "b", "a", 0.0),
    "lmarena-ai/arena-human-preference-140k": (
        {"id": "§", "model_a": "m", "model_b": "n", "winner": "both_bad",
         **{f"conversation_{x}": [{"role": "user", "content": parts(Q)},
                                  {"role": "assistant", "content": parts(x)}] for x in "ab"}},
        ASKED, "a", "b", 0.5),
    "lmsys/lmsys-arena-human-preference-55k, votes added up": (
        {"id": 7, "model_a": "m", "model_b": "n", "prompt": '["Why §?"]', "response_a": '["a"]',
         "response_b": '["b"]', "winner_model_a": 2, "winner_model_b": 1, "winner_tie": 1},
        ASKED, "a", "b", 0.625),
    "lmsys/mt_bench_human_judgments": (
        {"question_id": 81, "model_a": "m", "model_b": "n", "winner": "model_a", "turn": 1,
         "conversation_a": dialogue(Q, "a", "More?", "c"), "conversation_b": dialogue(Q, "b", "More?", "d")},
        ASKED, "a", "b", 1.0),
    "lmarena-ai/PPE-Human-Preference-V1": (
        {"question_id": "§", "model_a": "m", "winner": "tie", "prompt": Q, "response_1": "a",
         "response_2": "b"},
        Q, "a", "b", 0.5),
    "response_a, response_b, chosen": (
        {"prompt": Q, "response_a": "b", "response_b": "a", "chosen": "B"}, Q, "b", "a", 0.0),
    "prometheus-eval/Preference-Collection": (
        {"orig_instruction": Q, "orig_response_A": "b", "orig_response_B": "a", "orig_score_A": "2",
         "orig_score_B": "5", "orig_preference": "B", "orig_criteria": "c", "instruction": "###Task",
         "output": "[RESULT] B"}, ASKED, "a", "b", sigma(3)),
    "xinlai/Math-Step-DPO-10K": (
        {"dataset": "d", "prompt": Q, "initial_reason_steps": "Step 1: go. ", "chosen": "a", "rejected": "b",
         "full_chosen": "a c", "full_rejected": "b d", "answer": "7"},
        Q, "Step 1: go. a", "Step 1: go. b", None),
    "openbmb/UltraInteract_pair": (
        {"task": "Math", "trajectory": [{"from": "user", "value": Q}], "chosen": "a", "rejected": "b"},
        ASKED, "a", "b", None),
    "Osprey's rollouts": ({"prompt": Q, "chosen": "a", "rejected": "b", "p": 0.3, "finished": [True, False]},
                          Q, "a", "b", 0.3),
    "messages, and text": ({"prompt": TALK, "chosen": "a", "rejected": "b"}, TALK, "a", "b", None),
    "messages, and dialogues that repeat them": (
        {"prompt": TALK, "chosen": [*TALK, assistant("a")], "rejected": [assistant("b")]},
        TALK, "a", "b", None),
    "text, and a turn": ({"prompt": Q, "chosen": [assistant("a")], "rejected": [assistant("b")]},
                         ASKED, "a", "b", None),
    "an empty prompt": ({"prompt": "", "chosen": "a§", "rejected": "b"}, "", "a§", "b", None),
    "a developer's turn, a tool's": (
        {"prompt": [{"role": "developer", "content": "D"}, user(Q), assistant("I look."),
                    {"role": "tool", "content": "§"}], "chosen": "a", "rejected": "b"},
        [{"role": "developer", "content": "D"}, user(Q), assistant("I look."),
         {"role": "tool", "content": "§"}], "a", "b", None),
}

# name: (a published row, prompt, answer)
ANSWERS = {
    "TRL, prompt and completion": ({"prompt": "The sky § is", "completion": " blue."}, "The sky § is",
                                    " blue."),
    "TRL's KTO, trl-lib/kto-mix-14k": (
        {"prompt": ASKED, "completion": [assistant("a")], "label": True}, ASKED, "a"),
    "LLaMA-Factory's KTO": ({"messages": dialogue(Q, "a"), "label": True}, ASKED, "a"),
    "tatsu-lab/alpaca": (
        {"instruction": "Add", "input": "§", "output": "a", "text": "Below is …"}, [user("Add\n\n§")], "a"),
    "databricks/databricks-dolly-15k": (
        {"instruction": Q, "context": "It rains.", "response": "a", "category": "closed_qa"},
        [user("Why §?\n\nIt rains.")], "a"),
    "Open-Orca/OpenOrca": ({"id": "§", "system_prompt": "S", "question": Q, "response": "a"},
                           [system("S"), user(Q)], "a"),
    "OpenHermes-2.5, SlimOrca, ShareGPT": (
        {"conversations": [{"from": "system", "value": "S"}, human(Q), gpt("a")], "source": "s"},
        [system("S"), user(Q)], "a"),
    "HuggingFaceH4/ultrachat_200k, no_robots": (
        {"prompt": "Hi §", "prompt_id": "7", "messages": [*TALK, assistant("a")]}, TALK, "a"),
    "stingning/ultrachat": ({"id": "§", "data": ["Hi §", "Yes?", "Bye", "a"]}, TALK, "a"),
    "GAIR/lima": ({"conversations": [Q, "a"], "source": "s"}, ASKED, "a"),
    "LDJnr/Capybara": ({"source": "s", "conversation": [{"input": "Hi §", "output": "Yes?"},
                                                        {"input": "Bye", "output": "a"}]}, TALK, "a"),
    "lmsys/lmsys-chat-1m, allenai/WildChat": (
        {"conversation_id": "§", "model": "m", "conversation": dialogue(Q, "a"), "language": "English"},
        ASKED, "a"),
    "openai/gsm8k": ({"question": Q, "answer": "a"}, ASKED, "a"),
    "AI-MO/NuminaMath-CoT": ({"source": "s", "problem": Q, "solution": "a", "messages": dialogue(Q, "a")},
                             ASKED, "a"),
    "CohereForAI/aya_dataset, FLAN": ({"inputs": Q, "targets": "a", "language": "English"}, ASKED, "a"),
    "nvidia/HelpSteer": (
        {"prompt": Q, "response": "a", "helpfulness": 4, "correctness": 4, "verbosity": 1}, Q, "a"),
    "PKU-Alignment/BeaverTails": (
        {"prompt": Q, "response": "a", "category": {"violence": False}, "is_safe": True}, Q, "a"),
    "prometheus-eval/Feedback-Collection": (
        {"orig_instruction": Q, "orig_response": "a", "orig_score": 4, "instruction": "###Task",
         "output": "4"},
        ASKED, "a"),
    "plain text": ({"text": "Once § upon"}, "", "Once § upon"),
    "the winner of a multi-turn battle": (
        {"winner": "model_b", "turn": 2, "conversation_a": dialogue("Hi §", "No.", "Bye", "b"),
         "conversation_b": [*TALK, assistant("a")]}, TALK, "a"),
    "no rival, for it is null": ({"prompt": Q, "chosen": "a", "rejected": None}, Q, "a"),
    "the same twice": ({"prompt": Q, "chosen": "a", "rejected": "a"}, Q, "a"),
    "prompts that differ": ({"chosen": HH + " a", "rejected": HH.replace("Bye", "Ciao") + " b"},
                            dialogue(" Hi §", " Yes?", " Bye"), " a"),
}

# name: (a published row, prompt)
PROMPTS = {
    "TRL, prompts": ({"prompt": Q}, Q),
    "OpenRLHF/prompt-collection-v0.1": ({"dataset": "d", "context_messages": TALK, "id": "§"}, TALK),
    "allenai/RLVR": ({"messages": ASKED, "ground_truth": "7", "dataset": "d"}, ASKED),
    "MT-Bench's questions": ({"question_id": 1, "turns": [Q, "More?"], "reference": ["r"]}, ASKED),
    "prompts of a system": ({"system": "S", "prompt": Q}, [system("S"), user(Q)]),
    "text parts": ({"prompt": [{"role": "user", "content": parts(Q)}]}, ASKED),
}

# name: (a published row, what it is read for, why it is refused)
REFUSED = {
    "tatsu-lab/alpaca_farm, alpaca_eval's annotations": (
        {"instruction": Q, "output_1": "a", "generator_1": "m", "output_2": "b", "preference": 1.75}, "pairs",
        "no chosen response: its keys are instruction, output_1, generator_1, output_2, preference; chosen"),
    "OpenAssistant's trees": (
        {"prompt": {"text": Q, "replies": [{"text": "b", "rank": 1}, {"text": "a", "rank": 0}]}}, "pairs",
        "a field is missing or has the wrong type"),
    "Anthropic's red-team-attempts": (
        {"transcript": HH, "rating": 4.0, "tags": ["t"]}, "pairs",
        "no prompt: its keys are transcript, rating, tags; orig_instruction, prompt, instruction, "),
    "OpenAssistant/oasst1, one message per row": (
        {"message_id": "§", "parent_id": "7", "text": Q, "role": "prompter"},
        "responses", "no prompt: its keys"),
    "Anthropic's model-written-evals": (
        {"question": Q, "answer_matching_behavior": " (A)", "answer_not_matching_behavior": " (B)"}, "pairs",
        "no chosen response: its keys are question, answer_matching_behavior"),
    "trl-lib/math_shepherd": (
        {"prompt": Q, "completions": ["a", "b"], "labels": [True, False]}, "responses", "no chosen response"),
    "KTO, label: false": ({"prompt": ASKED, "completion": [assistant("a")], "label": False}, "responses",
                          "label is False"),
    "KTO, label: a text": ({"prompt": Q, "completion": "a", "label": "False"}, "responses", "label is False"),
    "KTO as pairs": ({"prompt": Q, "completion": "a", "label": True}, "pairs", "no rejected response"),
    "BeaverTails, unsafe": ({"prompt": Q, "response": "a", "is_safe": False}, "responses",
                             "is_safe is False"),
    "HelpSteer, rated low": ({"prompt": Q, "response": "a", "helpfulness": 1}, "responses",
                              "helpfulness is 1"),
    "UltraFeedback, all rated low": (
        {"instruction": Q, "completions": [{"response": text, "annotations": {"honesty": {"Rating": rating}}}
                                           for text, rating in (("a", "2"), ("b", "1"))]}, "responses",
        "rated 2 or lower"),
    "PKU-SafeRLHF, the better one is unsafe": (
        {"prompt": Q, "response_0": "a", "response_1": "b", "is_response_0_safe": False,
         "better_response_id": 0},
        "responses", "the better one is unsafe"),
    "Arena, a tie as an example": (
        {"winner": "tie (bothbad)", "conversation_a": dialogue(Q, "a"), "conversation_b": dialogue(Q, "b")},
        "responses", "p is exactly ½"),
    "Arena, more than one turn": (
        {"winner": "model_b", "turn": 2, "conversation_a": dialogue("Hi §", "No.", "Bye", "b"),
         "conversation_b": [*TALK, assistant("a")]}, "pairs", "prompts differ"),
    "a winner that is no vote": ({"prompt": Q, "response_a": "a", "response_b": "b", "winner": "c"}, "pairs",
                                 "the winner is neither"),
    "answers alone": ({"chosen": "No, §.", "rejected": "Yes, §."}, "pairs", "no prompt"),
    "two texts beside a key of no form": (
        {"my_question": Q, "chosen": "It does §.", "rejected": "It is §."}, "pairs", "my_question, chosen"),
    "scores that say the opposite": (
        {"prompt": Q, "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2}, "pairs",
        "the chosen answer has the lower score"),
    "a dialogue that has an answer already": (
        {"messages": dialogue(Q, "a"), "chosen": "a", "rejected": "b"}, "pairs", "ends with an answer"),
    "a dialogue with another prompt": (
        {"prompt": ASKED, "chosen": dialogue("Who?", "a"), "rejected": dialogue("Who?", "b")}, "pairs",
        "the prompt is not the one"),
    "pictures": ({"messages": [{"role": "user", "content": [{"type": "image"}]}, assistant("a")]},
                  "responses",
                 "a turn's content is not text"),
    "a tool that is called": (
        {"messages": [user(Q), {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]},
        "responses", "a turn calls a tool"),
    "token ids": ({"query": [1, 2], "sample0": [3], "sample1": [4], "best": 0}, "pairs",
                  "neither text nor a list of messages"),
}


def write(path, record):
    """Three rows; they differ where § stands."""
    text = json.dumps(record, ensure_ascii=False)
    path.write_text("".join(text.replace("§", str(i)) + "\n" for i in range(3)), encoding="utf-8")
    return str(path)


def numbered(value, i):
    return json.loads(json.dumps(value, ensure_ascii=False).replace("§", str(i)))


def check(path, need, prompt, chosen=None, rejected=None, p=None):
    rows, report = read_rows(path, need)
    assert report.used == 3 and not report.skipped
    for i, row in enumerate(rows):
        assert [row.prompt, row.chosen, row.rejected] == numbered([prompt, chosen, rejected], i)
        assert row.p == (p if p is None else pytest.approx(p, abs=1e-12)) or need == "responses"


@pytest.mark.parametrize("form", PAIRS)
def test_pairs(form, tmp_path):
    """What a pair is, and its prompt alone; as ordered pairs its better answer is the first one."""
    record, prompt, chosen, rejected, p = PAIRS[form]
    path = write(tmp_path / "a.jsonl", record)
    check(path, "pairs", prompt, chosen, rejected, p)
    check(path, "prompts", prompt)
    if p is not None and p < 0.5:
        chosen, rejected, p = rejected, chosen, 1 - p
    if p != 0.5:
        check(path, "ordered pairs", prompt, chosen, rejected, p)


@pytest.mark.parametrize("form", ANSWERS)
def test_answers(form, tmp_path):
    record, prompt, chosen = ANSWERS[form]
    check(write(tmp_path / "a.jsonl", record), "responses", prompt, chosen)


@pytest.mark.parametrize("form", PROMPTS)
def test_prompts(form, tmp_path):
    record, prompt = PROMPTS[form]
    check(write(tmp_path / "a.jsonl", record), "prompts", prompt)


@pytest.mark.parametrize("form", REFUSED)
def test_refused(form, tmp_path):
    record, need, reason = REFUSED[form]
    with pytest.raises(InputError, match=f"no row can be used for {need}; a.jsonl:1: .*{re.escape(reason)}"):
        read_rows(write(tmp_path / "a.jsonl", record), need)


@pytest.mark.parametrize("temperature", [0.5, 1, 2])
def test_score_temperature(temperature, tmp_path):
    """d = 3: p = σ(3 / T), σ(d / T) + σ(-d / T) = 1, and d of a thousand is no overflow."""
    record, *_ = PAIRS["nvidia/HelpSteer2, preferences"]
    for strength, d in ((3, 3), (-3, 3), (0, 0), (1e6, 1e6)):
        path = write(tmp_path / "a.jsonl", record | {"preference_strength": strength})
        rows, _ = read_rows(path, "pairs", score_temperature=temperature)
        assert rows[0].p == pytest.approx(sigma(min(d / temperature, 700)))
        assert rows[0].chosen == ("b" if strength < 0 else "a" if strength > 0 else "b")


def test_text_that_is_not_used_is_counted_and_named(tmp_path):
    """By key, of what is used too: a critique inside of the answers, a thought inside of a turn."""
    record, *_ = PAIRS["openbmb/UltraFeedback"]
    _, report = read_rows(write(tmp_path / "a.jsonl", record), "pairs")
    assert report.unused == {key: 3 for key in (
        "source", "models", "completions.model", "completions.critique", "correct_answers",
        "incorrect_answers")}
    turns = [user(Q), assistant("a") | {"thinking": "hm"}]
    _, report = read_rows(write(tmp_path / "a.jsonl", {"messages": turns, "n": 7, "none": None, "x": " "}),
                          "responses")
    assert report.unused == {"messages.thinking": 3}
    assert str(report) == "a.jsonl: 3 rows used; text that is not used: messages.thinking (3)"
    _, report = read_rows(write(tmp_path / "a.jsonl", {
        "prompt": "Be kind.", "chosen": dialogue(Q, "a"), "rejected": dialogue(Q, "b")}), "pairs")
    assert report.unused == {"prompt": 3}                # the answers' own dialogue has another one


def test_columns(tmp_path):
    """What no form knows gets our names; other files stay as they are."""
    record = {"q": Q, "good": "a", "bad": "b", "prompt": "no", "s": 1}
    path = write(tmp_path / "a.jsonl", record)
    columns = ["prompt:q", "chosen:good", "rejected:bad"]
    rows, report = read_rows(path, "pairs", [*columns, "p:no_such_key"])
    assert [(row.prompt, row.chosen, row.rejected) for row in rows] == [(f"Why {i}?", "a",
    "b") for i in range(3)]
    assert str(report) == "a.jsonl: 3 rows used"                           # prompt was given away
    other = write(tmp_path / "b.jsonl", PAIRS["lvwerra/stack-exchange-paired"][0])
    rows, _ = read_data([path, other], "pairs", 0, columns=columns)
    assert [row.chosen for row in rows] == ["a"] * 6
    with pytest.raises(InputError, match="its keys are q, good, bad, prompt, s; .*--columns=chosen:KEY"):
        read_rows(path, "pairs")
    for bad in ("prompt", "prompt:"):
        with pytest.raises(InputError, match=f"--columns={bad}"):
            read_rows(path, "pairs", [bad])


def test_parquet(tmp_path):
    """The same rows as from JSON lines, with the nulls that a table fills in."""
    import pyarrow
    from pyarrow import parquet
    record, prompt, chosen, rejected, p = PAIRS["berkeley-nest/Nectar"]
    records = [numbered(record, i) for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    check(tmp_path / "a.parquet", "pairs", prompt, chosen, rejected, p)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(InputError, match="b.parquet: cannot be read: "):
        read_rows(tmp_path / "b.parquet", "pairs")


JUNK = [None, 0, -1, True, "", " ", "x", [], {}, [1], ["a", "b"], [["a"]], [{"a": 1}], {"text": "x"},
        math.nan, 10**400, "tie", assistant("x"), [user("x")], [user([1])]]
NEEDS = ["pairs", "ordered pairs", "judge", "responses", "prompts"]


def places(value, path=()):
    """Yields the paths to all that is inside of a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def test_a_damaged_row_is_a_row_or_unusable():
    """With junk anywhere in a published row: a Row of texts, turns and a p, or a reason."""
    rng, read = random.Random(0), 0
    records = [row[0] for table in (PAIRS, ANSWERS, PROMPTS, REFUSED) for row in table.values()]
    for _ in range(3000):
        record = copy.deepcopy(rng.choice(records))
        *path, last = rng.choice([*places(record)])
        inner = record
        for key in path:
            inner = inner[key]
        inner[last] = rng.choice(JUNK)
        with contextlib.suppress(Unusable):
            row = read_row(Keys(record), rng.choice(NEEDS), "a:1")
            turns = [user(row.prompt)] if isinstance(row.prompt, str) else row.prompt
            assert turns and all(isinstance(turn["content"], str) and turn["role"] in ROLES for turn in turns)
            assert all(text is None or isinstance(text, str) for text in (row.chosen, row.rejected))
            assert row.p is None or 0 <= row.p <= 1
            read += 1
    assert 500 < read < 2500


def test_strengths_reach_the_loss_and_no_judge_is_loaded(tmp_path):
    """SHP p = 4/5, HelpSteer2 d = 3 at T = 2, Arena p = 0: SPCE learns these, DPO has the winner in front."""
    world, files = tiny.world(tmp_path), []
    for name in ("stanfordnlp/SHP", "nvidia/HelpSteer2, preferences", "lmsys/chatbot_arena_conversations"):
        files.append(write(tmp_path / f"{len(files)}.jsonl", PAIRS[name][0]))
    soft = tiny.trainer(world, tmp_path / "soft", recipe="offline-soft", data=files, score_temperature=2.0)
    assert [pair.strength for pair in soft.data.rows] == pytest.approx([0.8] * 3 + [sigma(1.5)] * 3 + [0] * 3)
    assert soft.judge is None and soft.update(0)["skipped"] == 0
    hard = tiny.trainer(world, tmp_path / "hard", recipe="dpo", data=files)
    assert [pair.chosen for pair in hard.data.rows[6:]] == [pair.rejected for pair in soft.data.rows[6:]]
