"""The methods as a table, and the settings of a run.

A method is a choice on four axes: the loss, where responses come from, how they are paired, how pairs are
labelled. train.py knows the axes, not the methods. So a new system is a row of RECIPES, and a new loss is a
function in losses.py and a row that names it: CONTRIBUTING.md shows one.

    loss       a function of losses.py, called with the arguments that it names (margin, delta, strength, …)
    responses  dataset; or fresh samples: of the policy, of the reference, or rso (drawn from both in between)
    pairs      dataset; or of fresh samples: ranked, random, extremes, spin (the data set's over a sample),
               best (that one alone); None where the data set's single responses are learned
    labels     hard (the winner is named), soft (the judge's strength p of the preference), None
"""
import inspect
import os
from dataclasses import dataclass, replace

import numpy as np

import losses
from data import CHATS, REFINEMENT_PROMPT, Pair, Sequence, named_winner
from judge import PAIRINGS, TEMPLATES, rejection_sample
from sample import Sample
from support import cli
from support.cli import InputError, setting

# What both papers state, as defaults. Paper 1 clips the gradient but does not say at what norm: 10 and a
# warm-up of 150 steps are the public DPO reference code's. Paper 2 names neither: 1.0 and 10 steps are ours.
PAPER_1 = dict(optimizer="rmsprop", lr=5e-7, batch_size=64, warmup_steps=150, grad_clip=10.0, beta=0.1)
PAPER_2 = dict(optimizer="adam", lr=2e-6, batch_size=16, warmup_steps=10, grad_clip=1.0, beta=0.02, k=7)
SPIN = PAPER_2 | dict(beta=0.1, k=1, iterations=3)
SUPERVISED = dict(optimizer="adam", lr=1e-5, batch_size=64, warmup_steps=10, grad_clip=1.0)

PAIRS = {      # what can be made of responses
    "dataset": (None, "dataset"),
    "policy": (*PAIRINGS, "spin"),
    "reference": (*PAIRINGS, "spin"),
    "rso": ("ranked", "random", "extremes"),         # best and spin take no notice of what rso accepts
}


@dataclass(frozen=True)
class Recipe:
    """A method: its choice on each axis, as the head of this file has them, and the settings it brings."""
    loss: str
    responses: str
    pairs: str | None
    labels: str | None
    defaults: dict                 # lr, batch_size, warmup_steps, …

    def __post_init__(self):
        """Refuse what does not go together, naming the axis to change."""
        single, soft = self.loss == "sft", "strength" in self.arguments()
        needed = None if single else "soft" if soft else "hard"
        rules = (
            ("loss", self.arguments(), "losses.py has no such function"),
            ("responses", self.responses in PAIRS, f"one of {', '.join(PAIRS)}"),
            ("pairs", self.pairs in PAIRS.get(self.responses, ()), f"not made of {self.responses} responses"),
            ("pairs", single == (self.pairs in (None, "best")), f"loss {self.loss} takes " + (
                "single responses (None, best)" if single else "two responses")),
            ("labels", self.labels == needed, f"loss {self.loss} takes {needed}; change labels or loss"),
            ("labels", not (soft and self.pairs == "spin"), "spin asks no judge; change labels or pairs"))
        for axis, fits, why in rules:
            if not fits:
                raise InputError(f"{axis}: {getattr(self, axis)} does not fit: {why}.")

    def arguments(self):
        """The names of what the loss is a function of; none where losses.py has no such loss."""
        function = getattr(losses, self.loss.replace("-", "_"), None)
        return tuple(inspect.signature(function).parameters) if function else ()

    def loss_of(self, settings, **known):
        """(N,) losses, from what is `known` by name and, for the rest of the arguments, the settings."""
        function = getattr(losses, self.loss.replace("-", "_"))
        return function(**{name: known[name] if name in known else getattr(settings, name)
                           for name in self.arguments()})

    @property
    def online(self):
        return self.responses != "dataset"

    @property
    def is_refined(self):
        """Whether the loss takes Δπ: then each pair is read after p⊕x too (paper 1)."""
        return "delta" in self.arguments()

    @property
    def has_reference(self):
        return self.loss != "sft" or self.responses in ("reference", "rso")

    @property
    def has_judge(self):
        """Whether somebody says during the run how much better a response is than another one."""
        return self.pairs in PAIRINGS or self.labels == "soft"

    def examples_per_prompt(self, k):
        """How many pairs, or single responses, k samples give."""
        return {"ranked": k // 2, "random": k // 2, "spin": k}.get(self.pairs, 1) if self.online else 1


RECIPES = {
    #                        loss       responses    pairs       labels
    "sft":            Recipe("sft",     "dataset",   None,       None,   SUPERVISED),
    "judge":          Recipe("sft",     "dataset",   None,       None,   SUPERVISED),     # instructions
    "dpo":            Recipe("dpo",     "dataset",   "dataset",  "hard", PAPER_1),
    "ipo":            Recipe("ipo",     "dataset",   "dataset",  "hard", PAPER_1),
    "sr-dpo":         Recipe("sr-dpo",  "dataset",   "dataset",  "hard", PAPER_1),
    "sr-ipo":         Recipe("sr-ipo",  "dataset",   "dataset",  "hard", PAPER_1),
    "offline-soft":   Recipe("spce",    "dataset",   "dataset",  "soft", PAPER_2),        # the judge labels
    "osp":            Recipe("spce",    "policy",    "ranked",   "soft", PAPER_2),
    "osp-dpo":        Recipe("dpo",     "policy",    "ranked",   "hard", PAPER_2 | dict(beta=0.1)),
    "osp-ipo":        Recipe("ipo",     "policy",    "ranked",   "hard", PAPER_2 | dict(beta=0.1)),
    "sr-spce":        Recipe("sr-spce", "policy",    "ranked",   "soft", PAPER_2),        # both papers joined
    "random-pairs":   Recipe("spce",    "policy",    "random",   "soft", PAPER_2),
    "self-rewarding": Recipe("dpo",     "policy",    "extremes", "hard", PAPER_2 | dict(beta=0.1)),
    "raft":           Recipe("sft",     "policy",    "best",     None,   PAPER_2 | dict(beta=None)),
    "spin":           Recipe("dpo",     "reference", "spin",     "hard", SPIN),
    "sft-sampling":   Recipe("spce",    "reference", "ranked",   "soft", PAPER_2),
    "rso":            Recipe("spce",    "rso",       "ranked",   "soft", PAPER_2),
}


# ------------------------------------------------------------------------------------------------------------
# What is made of fresh responses: pairs, examples, rows of a file

def paired(settings, step, place, scores):
    """[(winner, loser)] of the samples of the prompt at a place of a step; what is drawn (random pairs, rso's
    acceptance) is a pure function of (seed, step, place)."""
    generator = np.random.default_rng([settings.seed, 4, step, place])
    recipe = settings.recipes[settings.recipe]
    pairing = PAIRINGS[recipe.pairs]
    if recipe.responses != "rso":
        return pairing(scores, generator)
    accepted = rejection_sample(scores, settings.k, settings.rso_beta, generator)
    return [(accepted[i], accepted[j]) for i, j in pairing([scores[i] for i in accepted], generator)]


def fresh_responses(recipe, prompts, samples, judged):
    """[(query, first, second, p(first ≻ second))] of what was sampled: the judge's pairs, of which the first
    need not win. RAFT takes each prompt's best one alone; in SPIN the data set's wins over each sample."""
    if recipe.pairs == "spin":
        own = [Sample(query.chosen, 0.0, query.row.finished[0], query.row.chosen) for query in prompts]
        return [(query, better, one, 1.0)
                for query, better, group in zip(prompts, own, samples) for one in group]
    if recipe.pairs == "best":
        best = [max(range(len(scores)), key=scores.__getitem__) for scores, _ in judged]
        return [(query, group[i], None, None) for query, group, i in zip(prompts, samples, best)]
    return [(query, group[i], group[j], p) for query, group, (_, pairs) in zip(prompts, samples, judged)
            for i, j, p in pairs]


def worth_learning(recipe, examples, log):
    """The examples without pairs of equal responses; for hard labels without p = ½ too, with the winner that
    the direct verdict names in front, and p = 1."""
    if recipe.pairs == "best":
        return examples
    log.add("identical", [pair.chosen == pair.rejected for pair in examples])
    pairs = [pair for pair in examples if pair.chosen != pair.rejected]
    if recipe.labels == "hard":
        log.add("undecided", [pair.strength == 0.5 for pair in pairs])
        decided = [named_winner(pair) for pair in pairs if pair.strength != 0.5]
        pairs = [replace(pair, strength=1.0) for pair in decided]
    return pairs


def example_of(query, first, second, p):
    """A fresh response, or two of them, to be trained on."""
    if second is None:
        return Sequence(query.x + first.ids, len(query.x))
    return Pair(query.x, query.refined_x, first.ids, second.ids, p, query.row, False)


def row_of(query, first, second, p):
    """The same as a row of a data file, so that a run can be replayed offline."""
    if second is None:
        return {"prompt": query.row.prompt, "response": first.text, "finished": [first.finished, True]}
    return {"prompt": query.row.prompt, "chosen": first.text, "rejected": second.text, "p": round(p, 6),
            "finished": [first.finished, second.finished]}


# ------------------------------------------------------------------------------------------------------------
# Settings

@dataclass
class Settings:
    """Align a language model. What is left out is the recipe's; without --model it runs on the toy world."""
    recipe: str = setting("osp", "the method, see the end of this list", group="What is trained, on what")
    model: str | None = setting(None, "folder of the model to train: config.json, safetensors, tokenizer")
    reference: str | None = setting(None, "folder of the frozen reference; default: model")
    judge: str | None = setting(None, "folder of the judge; default: model (one copy with the reference)")
    data: list[str] | None = setting(None, "training files, by commas; file:0.1 takes a tenth, file:3 thrice")
    prompts: list[str] | None = setting(None, "prompt files of online recipes; default: the prompts in data")
    data_fraction: float = setting(1.0, "share of data; shares of one seed are nested", above=0, most=1)
    eval_data: list[str] | None = setting(None, "held-out files of the same form")
    columns: list[str] | None = setting(None, "keys of no form known: prompt:question,chosen:answer_a")
    score_temperature: float = setting(1.0, "differences of scores, ranks d are p = σ(d / this)", above=0)
    chat: str | None = setting(None, f"dialogue format ({', '.join(CHATS)}); none: the folder's")
    system: str | None = setting(None, "every dialogue's system message, whatever it has; --system= for none")
    toy_family: str = setting("llama", "architecture in the toy world", choices=("llama", "neox"))

    steps: int | None = setting(None, "updates; default: epochs over the data", least=1, group="Optimization")
    epochs: float = setting(1.0, "passes over the data when steps is not given (both papers: 1)", above=0)
    batch_size: int | None = setting(None, "pairs, online prompts, per update; papers: 64; 16", least=1)
    micro_batch_size: int | None = setting(None, "of these, how many a rank trains on at a time; "
                                           "default: 8, halved until it fits", least=1)
    lr: float | None = setting(None, "papers: 5e-7; 2e-6 (TinyLlama), 2e-5 (Mistral with LoRA)", above=0,
                               below=3e38)
    optimizer: str | None = setting(None, "paper 1: rmsprop, paper 2: adam",
                                    choices=("rmsprop", "adam", "adamw"))
    betas: list[float] = setting([0.9, 0.999], "of adam and adamw", least=0, below=1)
    weight_decay: float = setting(0.0, "of adamw", least=0)
    lr_schedule: str = setting("constant", "after the warm-up; linear and cosine go to 0",
                               choices=("constant", "linear", "cosine"))
    warmup_steps: int | None = setting(None, "default: the recipe's, at most a tenth of steps", least=0)
    grad_clip: float | None = setting(None, "largest gradient norm; 0: no clipping", least=0)
    seed: int = setting(0, "of data order, initialisation, sampling: three separate streams", least=0)
    lora_rank: int = setting(0, "train adapters of this rank (paper 2: 64, Mistral); 0: all weights", least=0)
    lora_alpha: float = setting(32.0, "adapters add alpha / rank times B A (paper 2: 32)", above=0)

    beta: float | None = setting(None, "strength of the tie to the reference; papers: 0.1; osp 0.001 to 0.1",
                                 above=0, group="The method")
    lam: float = setting(0.3, "weight of the refinement Δπ; paper 1: 0.1, 0.3, 0.5 or 1", least=0)
    refinement_prompt: str = setting(REFINEMENT_PROMPT, "p, put before the query by sr-*")
    delta_scale: str = setting("printed", "sr-ipo: λΔπ (eq. 15) or λΔπ/β", choices=("printed", "exact"))
    judge_task: str = setting("helpful", "the judge's instruction", choices=tuple(TEMPLATES))
    judge_anyway: bool = setting(False, "go on under a judge that gives A and B next to no probability")
    k: int | None = setting(None, "responses per prompt; papers: 7, with little data 9 and 21", least=1)
    temperature: float = setting(0.7, "of sampling (paper 2); greedy ones would all be the same", above=0,
                                 below=3e38)
    top_p: float = setting(0.9, "of sampling (paper 2)", above=0, most=1)
    candidates: int | None = setting(None, "rso: samples of which k are kept; default: 4 k", least=1)
    rso_beta: float = setting(0.1, "rso: towards 0 the best are kept, towards ∞ whatever comes", above=0)
    iterations: int | None = setting(None, "spin: how often policy and reference become equal", least=1)

    max_length: int | None = setting(None, "BOS + x + y; default: 512, or what fits", least=3, group="Tokens")
    max_prompt_length: int | None = setting(None, "x is cut down to no less; default: half", least=1)
    max_tokens: int | None = setting(None, "of a sample; default: what max_length leaves", least=1)

    out_dir: str = setting("out", "gets metrics.jsonl, checkpoint/, final/ …", group="What is written")
    eval_every: int = setting(0, "steps between evaluations; 0: only at the end", least=0)
    keep_best: str | None = setting(None, "of the evaluations: best/ is the one with the best of these",
                                    choices=("eval_loss", "eval_accuracy", "eval_reward"))
    sample_every: int = setting(0, "online: steps between showing a prompt with its samples", least=0)
    show_prompts: int = setting(8, "prompts answered before, after and at evaluations, for the page", least=0)
    report_every: int = setting(0, "steps between writing report.html; 0: only at the end", least=0)
    save_every: int = setting(0, "steps between checkpoints; 0: by time, and at the end", least=0)
    save_dtype: str = setting("auto", "of final/ and best/; auto: as model has it",
                              choices=("auto", "float64", "float32", "bfloat16", "float16"))
    save_minutes: float = setting(10.0, "minutes between checkpoints; 0: by steps alone", least=0)
    keep: int = setting(1, "checkpoints kept", least=1)
    resume: str = setting("auto", "auto: from the checkpoint; never: start over; force: despite changes",
                          choices=("auto", "never", "force"))

    dtype: str = setting("auto", "of the computation; auto: bfloat16 on CUDA",
                         choices=("auto", "float32", "bfloat16", "float64"), group="The machine")
    device: str = setting("auto", "auto, cpu, cuda, mps")
    replicas: int = setting(1, "copies of the sharded weights; 2: gather inside each of two nodes", least=1)
    rank_minutes: float = setting(30.0, "that ranks wait for each other at most", above=0, most=1e6)
    checkpoint_activations: bool = setting(False, "less memory, a third more time")
    reference_cache: str | None = setting(None, "folder that keeps what π_ref says of the data")
    dry_run: bool = setting(False, "only print the memory that each rank needs")
    device_memory: float | None = setting(None, "GiB per rank, for dry_run", above=0)

    recipes = RECIPES                        # no setting: what --recipe chooses from

    def __post_init__(self):
        """Fill in the recipe's values and refuse impossible ones."""
        self.given = cli.given_values(self)
        if self.recipe not in self.recipes:
            raise InputError(f"--recipe={self.recipe}: choose one of {', '.join(self.recipes)}" + (
                "; that one is of experiments.rlhf." if self.recipe in ("reward", "rlhf") else "."))
        recipe = self.recipes[self.recipe]
        for name, value in recipe.defaults.items():
            if getattr(self, name) is None and name != "warmup_steps":     # that waits for the steps
                setattr(self, name, value)
        if recipe.responses == "rso":
            self.candidates = self.candidates or 4 * self.k
        cli.check(self)
        for name in ("model", "reference", "judge"):          # "dir/" is "dir": one copy in memory
            if getattr(self, name):
                setattr(self, name, os.path.normpath(getattr(self, name)))
        strange = [name for name in recipe.arguments()
                   if name not in ("logprob", "margin", "delta", "strength") and not hasattr(self, name)]
        if strange:
            raise InputError(f"losses.py: {recipe.loss} asks for {strange[0]}, which is no setting.")
        iterates = (self.iterations or 1) > 1
        measured = {"sft": ["eval_loss"], "ppo": ["eval_reward"]}.get(
            recipe.loss, ["eval_loss", "eval_accuracy"])
        impossible = (
            ("k", recipe.pairs in PAIRINGS and self.k < 2, "pairs need at least 2 responses per prompt"),
            ("candidates", (self.candidates or self.k or 0) < (self.k or 0), f"fewer than --k={self.k}"),
            ("iterations", iterates and self.lora_rank, "the reference under adapters cannot move"),
            ("reference", iterates and self.reference, "spin's is the policy at the start of each iteration"),
            ("betas", len(self.betas) != 2, "two numbers"),
            ("keep_best", self.keep_best and not self.eval_every, "needs --eval_every"),
            ("keep_best", self.keep_best not in (None, *measured), f"here is only {', '.join(measured)}"))
        for name, wrong, why in impossible:
            if wrong:
                raise InputError(f"--{name}={getattr(self, name)}: {why}.")

    @classmethod
    def help_notes(cls):
        """The recipes and their defaults, as --help prints them."""
        lines = ["Recipes, and the defaults that are theirs:"]
        for name, recipe in cls.recipes.items():
            defaults = " ".join(f"{key}={value}" for key, value in recipe.defaults.items() if value)
            axes = f"{recipe.loss}, {recipe.responses}, {recipe.pairs}, {recipe.labels}"
            lines += [f"  {name:<15} {axes}\n{'':<18}{defaults}"]
        return "\n".join(lines)

    def lengths(self, context, p_length, prefix):
        """(max_length, max_prompt_length, max_tokens) within a model's context.

        p_length: tokens of the refinement prompt; prefix: of BOS. InputError where nothing fits.
        """
        room = context - p_length
        longest = self.max_length or min(512, room)
        if longest > room or longest < 3:
            raise InputError(f"--max_length={longest}: the model's context of {context} tokens, less "
                             f"{p_length} for the refinement prompt, leaves {room}.")
        prompt = self.max_prompt_length or longest // 2
        response = self.max_tokens or longest - min(prompt, longest // 2)
        if self.recipes[self.recipe].online:         # a prompt keeps what max_tokens leaves, its BOS included
            room = longest - response - prefix
            if room < 1:
                raise InputError(f"--max_tokens={response} leaves no room for x in --max_length={longest}.")
            prompt = min(prompt, room)
        return longest, prompt, response

    def frozen_folders(self):
        """(the reference's folder, the judge's), each None where the recipe has none."""
        recipe = self.recipes[self.recipe]
        return (self.reference or self.model) if recipe.has_reference else None, \
            (self.judge or self.model) if recipe.has_judge else None

    def folders(self):
        """The model folders that the run reads."""
        return list(dict.fromkeys(filter(None, (self.model, self.reference, self.judge))))

    def files(self):
        """The data files that it reads, as they were given: "file" or "file:weight"."""
        return [*(self.data or []), *(self.prompts or []), *(self.eval_data or [])]

    def users(self):
        """[(names of a method's settings, whether this run reads them, what they need)]."""
        recipe = self.recipes[self.recipe]
        online = recipe.online
        return [("beta reference", recipe.has_reference, "a recipe that compares responses"),
                ("reference_cache", recipe.pairs == "dataset", "a recipe with fixed pairs"),
                ("lam refinement_prompt", recipe.is_refined, "a recipe sr-*"),
                ("delta_scale", "delta_scale" in recipe.arguments(), "--recipe=sr-ipo"),
                ("k temperature top_p max_tokens prompts", online, "an online recipe"),
                ("data", not (online and self.prompts), "to stand alone: an online recipe reads --prompts"),
                ("judge", recipe.has_judge, "a recipe with a judge"),
                ("score_temperature", recipe.labels == "soft" and (not online or self.eval_data),
                 "pairs for --recipe=offline-soft"),
                ("judge_task", recipe.has_judge or self.recipe == "judge", "a recipe with a judge"),
                ("candidates rso_beta", recipe.responses == "rso", "--recipe=rso"),
                ("iterations", recipe.pairs == "spin", "--recipe=spin"),
                ("eval_every", self.eval_data or self.show_prompts or not self.model, "--eval_data"),
                ("keep_best", self.eval_data or not self.model, "--eval_data")]

    def check_used(self):
        """Refuse what was typed but has no effect in this run: it is a mistake somewhere."""
        for names, used, needs in self.users():
            for name in names.split():
                if name in self.given and not used:
                    raise InputError(f"--{name} would change nothing in this run: it needs {needs}.")
