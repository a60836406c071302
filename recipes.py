"""The methods: a choice on four axes, the losses by name, and the settings of a run."""
import dataclasses
import math
import os
from dataclasses import dataclass, field

import judge
import losses
from data import REFINEMENT_PROMPT
from support.cli import InputError

# ---------------------------------------------------------------------------------------------------------------------
# Recipes: a choice on four axes

# What both papers state, as defaults. Paper 1 clips the gradient but does not say at what norm: 10 and a warm-up of 150
# steps are the public DPO reference code's. Paper 2 names neither: 1.0 and 10 steps are ours.
PAPER_1 = dict(optimizer="rmsprop", lr=5e-7, batch_size=64, warmup_steps=150, grad_clip=10.0, beta=0.1)
PAPER_2 = dict(optimizer="adam", lr=2e-6, batch_size=16, warmup_steps=10, grad_clip=1.0, beta=0.02, k=7)
SUPERVISED = dict(optimizer="adam", lr=1e-5, batch_size=64, warmup_steps=10, grad_clip=1.0)


@dataclass(frozen=True)
class Recipe:
    loss: str                      # a key of PAIR_LOSSES, or sft
    responses: str                 # dataset; or fresh samples: of the policy, of the reference, or rso (of both in between)
    pairs: str | None              # dataset, a key of judge.PAIRINGS, or spin; None where the loss takes single responses
    labels: str | None             # hard (the winner is named), soft (the judge's strength p), None
    defaults: dict = field(default_factory=dict)

    @property
    def online(self):
        return self.responses != "dataset"

    @property
    def has_reference(self):
        return self.loss != "sft" or self.responses in ("reference", "rso")

    @property
    def has_judge(self):
        """Whether somebody says while it runs how much better a response is: of fresh ones, or (soft) of the data set's."""
        return self.pairs in judge.PAIRINGS or self.labels == "soft"

    def pairs_a_prompt(self, k):
        """How many pairs, or single responses, k samples give."""
        return {"ranked": k // 2, "random": k // 2, "spin": k}.get(self.pairs, 1) if self.online else 1

    def __post_init__(self):
        known = {"responses": ("dataset", "policy", "reference", "rso"), "pairs": (None, "dataset", "spin", *judge.PAIRINGS),
                 "labels": (None, "hard", "soft")}
        for axis, values in known.items():
            if getattr(self, axis) not in values:
                raise InputError(f"{axis}: {getattr(self, axis)} is none of {', '.join(map(str, values))}.")
        takes_p = self.loss in ("spce", "sr-spce")
        if self.labels == "soft" and not takes_p:
            raise InputError(f"labels: soft needs a loss that takes p (spce, sr-spce), not {self.loss}; change loss or labels.")
        if self.labels == "hard" and takes_p:
            raise InputError(f"labels: {self.loss} takes the judge's strength; change labels to soft, or loss to dpo.")
        if (self.loss == "sft") != (self.labels is None):
            raise InputError(f"labels: {self.labels} does not go with loss {self.loss}; sft takes none, all others need them.")
        if self.online == (self.pairs in ("dataset", None)):
            raise InputError(f"pairs: {self.pairs} cannot be made of responses from {self.responses}; change one of "
                             "them.")
        if self.pairs == "spin" and self.labels == "soft":
            raise InputError("labels: soft needs a judge, and in spin the data set's response wins; change labels or pairs.")
        if self.responses == "rso" and self.pairs in ("best", "spin"):
            raise InputError(f"pairs: {self.pairs} takes no notice of what rso accepts; change pairs or responses.")
        if (self.loss == "sft" and self.online) != (self.pairs == "best"):
            raise InputError(f"pairs: {self.pairs} does not go with loss {self.loss} on fresh samples; sft takes the best one, "
                             f"all others need pairs.")


RECIPES = {
    #                        loss       responses    pairs       labels
    "sft":            Recipe("sft",     "dataset",   None,       None,   SUPERVISED),
    "judge":          Recipe("sft",     "dataset",   None,       None,   SUPERVISED),       # on judge instructions
    "dpo":            Recipe("dpo",     "dataset",   "dataset",  "hard", PAPER_1),
    "ipo":            Recipe("ipo",     "dataset",   "dataset",  "hard", PAPER_1),
    "sr-dpo":         Recipe("sr-dpo",  "dataset",   "dataset",  "hard", PAPER_1),
    "sr-ipo":         Recipe("sr-ipo",  "dataset",   "dataset",  "hard", PAPER_1),
    "offline-soft":   Recipe("spce",    "dataset",   "dataset",  "soft", PAPER_2),          # the judge labels the data set
    "osp":            Recipe("spce",    "policy",    "ranked",   "soft", PAPER_2),
    "osp-dpo":        Recipe("dpo",     "policy",    "ranked",   "hard", PAPER_2 | dict(beta=0.1)),
    "osp-ipo":        Recipe("ipo",     "policy",    "ranked",   "hard", PAPER_2 | dict(beta=0.1)),
    "sr-spce":        Recipe("sr-spce", "policy",    "ranked",   "soft", PAPER_2),          # both papers joined; in neither
    "random-pairs":   Recipe("spce",    "policy",    "random",   "soft", PAPER_2),
    "self-rewarding": Recipe("dpo",     "policy",    "extremes", "hard", PAPER_2 | dict(beta=0.1)),
    "raft":           Recipe("sft",     "policy",    "best",     None,   PAPER_2 | dict(beta=None)),
    "spin":           Recipe("dpo",     "reference", "spin",     "hard", PAPER_2 | dict(beta=0.1, k=1, iterations=3)),
    "sft-sampling":   Recipe("spce",    "reference", "ranked",   "soft", PAPER_2),
    "rso":            Recipe("spce",    "rso",       "ranked",   "soft", PAPER_2),
}

# loss name -> (margin, delta, p, settings) -> (N,); all in losses.py
PAIR_LOSSES = {
    "dpo":     lambda h, delta, p, s: losses.dpo(h, s.beta),
    "ipo":     lambda h, delta, p, s: losses.ipo(h, s.beta),
    "sr-dpo":  lambda h, delta, p, s: losses.sr_dpo(h, delta, s.beta, s.lam),
    "sr-ipo":  lambda h, delta, p, s: losses.sr_ipo(h, delta, s.beta, s.lam, s.delta_scale),
    "spce":    lambda h, delta, p, s: losses.spce(h, p, s.beta),
    "sr-spce": lambda h, delta, p, s: losses.sr_spce(h, delta, p, s.beta, s.lam),
}


# ---------------------------------------------------------------------------------------------------------------------
# Settings

@dataclass
class Settings:
    """Align a language model. Values left out are the recipe's (the papers'); without --model it runs on the toy world."""
    recipe: str = "osp"                      # a row of RECIPES: sft, judge, dpo, ipo, sr-dpo, sr-ipo, osp, …
    model: str | None = None                 # folder of the model to train: config.json, safetensors, tokenizer
    reference: str | None = None             # folder of the frozen reference; default: model
    judge: str | None = None                 # folder of the judge; default: model (one copy in memory with the reference)
    data: list[str] | None = None            # training files, comma-separated; file:0.1 takes a tenth of it, file:3 thrice
    prompts: list[str] | None = None         # prompt files of online recipes; default: the prompts in data
    data_fraction: float = 1.0               # share of data to train on; shares of one seed are nested
    eval_data: list[str] | None = None       # held-out files of the same form
    eval_every: int = 0                      # steps between evaluations; 0: only at the end
    out_dir: str = "out"                     # gets config.json, metrics.jsonl, rollouts.jsonl, checkpoint/, final/, adapter/
    steps: int | None = None                 # updates; default: epochs over the data
    epochs: float = 1.0                      # passes over the data when steps is not given (both papers: 1)
    batch_size: int | None = None            # pairs (offline) or prompts (online) an update, over all ranks; papers: 64; 16
    micro_batch_size: int = 8                # of these, how many one rank trains on at a time
    lr: float | None = None                  # papers: 5e-7; 2e-6 (TinyLlama), 2e-5 (Mistral with LoRA)
    optimizer: str | None = None             # rmsprop (paper 1), adam (paper 2), adamw
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])     # of adam and adamw
    weight_decay: float = 0.0                # of adamw
    lr_schedule: str = "constant"            # after the warm-up: constant, linear, cosine (both to 0)
    warmup_steps: int | None = None          # linear warm-up; default: the recipe's, but at most a tenth of the steps
    grad_clip: float | None = None           # largest gradient norm; 0: no clipping
    beta: float | None = None                # strength of the tie to the reference; papers: 0.1; osp 0.001 to 0.1
    lam: float = 0.3                         # weight of the refinement Δπ; paper 1: 0.1, 0.3, 0.5 or 1
    refinement_prompt: str = REFINEMENT_PROMPT           # p, put before the query by sr-*
    delta_scale: str = "printed"             # sr-ipo: printed (λΔπ, paper 1 eq. 15) or exact (λΔπ/β)
    k: int | None = None                     # responses a prompt; papers: 7 (9 at 2 % of the data, 21 with 200 prompts)
    candidates: int | None = None            # rso: samples a prompt of which k are accepted; default: 4 k
    rso_beta: float = 0.1                    # rso: towards 0 only the best are accepted, towards ∞ whatever comes
    iterations: int | None = None            # spin: how often policy and reference start as equals, evenly over the steps
    temperature: float = 0.7                 # of sampling (paper 2)
    top_p: float = 0.9                       # of sampling (paper 2)
    max_tokens: int | None = None            # tokens of a sampled response; default: what max_length leaves
    max_length: int | None = None            # tokens of BOS + x + y, without p; default: 512, or what the context holds
    max_prompt_length: int | None = None     # x gives way down to this; default: half of max_length
    chat: str | None = None                  # dialogue format: hh, zephyr, chatml, llama3, mistral; text is then a user's turn
    judge_task: str = "helpful"              # the judge's instruction: helpful or summary
    dtype: str = "auto"                      # of the computation: float32, bfloat16, float64; auto: bfloat16 on CUDA
    device: str = "auto"                     # auto, cpu, cuda, mps
    seed: int = 0                            # of data order, initialisation and sampling, three separate streams
    save_every: int = 0                      # steps between checkpoints; 0: only at the end
    keep: int = 1                            # checkpoints kept
    resume: str = "auto"                     # auto: go on from out_dir's checkpoint; never: start over; force: despite changes
    reference_cache: str | None = None       # folder that keeps π_ref of the data: computed once for all runs it holds for
    lora_rank: int = 0                       # train adapters of this rank (paper 2: 64, Mistral); 0: train all weights
    lora_alpha: float = 32.0                 # adapters add alpha / rank times B A (paper 2: 32)
    checkpoint_activations: bool = False     # keep only each block's input for the gradient: less memory, a third more time
    replicas: int = 1                        # copies of the sharded weights: 2 on two nodes keeps the gathering inside a node
    dry_run: bool = False                    # only print the memory that each rank needs, from config and headers alone
    device_memory: float | None = None       # GiB a rank has, for dry_run (80: on a GPU); default: what this machine has
    sample_every: int = 0                    # online: steps between printing a prompt with its samples and strengths
    toy_family: str = "llama"                # architecture in the toy world: llama (sentencepiece) or neox (tiktoken)

    recipes = RECIPES                        # no setting: what --recipe chooses from

    def __post_init__(self):
        """Fill in the recipe's values and refuse impossible ones."""
        plain = {f.name: f.default_factory() if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(self)}
        self.given = {name: getattr(self, name) for name in plain if getattr(self, name) != plain[name]}     # for the toy world
        if self.recipe not in self.recipes:
            raise InputError(f"--recipe={self.recipe}: choose one of {', '.join(self.recipes)}" + (
                "; that one is rlhf.py's." if self.recipe in ("reward", "rlhf") else "."))
        for name, value in self.recipes[self.recipe].defaults.items():
            if getattr(self, name) is None and name != "warmup_steps":     # that one waits for the number of steps
                setattr(self, name, value)
        choices = {"optimizer": ("rmsprop", "adam", "adamw"), "lr_schedule": ("constant", "linear", "cosine"),
                   "delta_scale": ("printed", "exact"), "dtype": ("auto", "float32", "bfloat16", "float64"),
                   "resume": ("auto", "never", "force"), "toy_family": ("llama", "neox"),
                   "judge_task": tuple(judge.TEMPLATES)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"--{name}={getattr(self, name)}: choose one of {', '.join(allowed)}.")
        at_least = {"steps": 1, "batch_size": 1, "micro_batch_size": 1, "keep": 1, "max_tokens": 1, "max_length": 3,
                    "max_prompt_length": 1, "eval_every": 0, "save_every": 0, "sample_every": 0, "warmup_steps": 0,
                    "seed": 0, "k": 1, "iterations": 1, "candidates": 1, "lam": 0, "weight_decay": 0, "grad_clip": 0,
                    "lora_rank": 0, "replicas": 1}
        for name, least in at_least.items():
            if getattr(self, name) is not None and not least <= getattr(self, name) < math.inf:
                raise InputError(f"--{name}={getattr(self, name)}: must be at least {least}.")
        for name in ("lr", "beta", "epochs", "temperature", "lora_alpha", "device_memory", "rso_beta", "data_fraction"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise InputError(f"--{name}={getattr(self, name)}: must be larger than 0" +
                                 (" (greedy samples would all be one)." if name == "temperature" else "."))
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top_p={self.top_p}: must be in (0, 1].")
        if self.k is not None and self.k < 2 and self.recipes[self.recipe].pairs in judge.PAIRINGS:
            raise InputError(f"--k={self.k}: pairs need at least 2 responses a prompt.")
        if self.recipes[self.recipe].responses == "rso":
            self.candidates = self.candidates or 4 * self.k
            if self.candidates < self.k:
                raise InputError(f"--candidates={self.candidates}: fewer than the --k={self.k} that are to be accepted.")
        if self.lora_rank and (self.iterations or 1) > 1:
            raise InputError(f"--iterations={self.iterations}: the reference under adapters cannot move; use 1, or no "
                             f"--lora_rank.")
        if (self.iterations or 1) > 1 and self.reference is not None:
            raise InputError("--reference: spin's reference is the policy at the start of each iteration; leave it out, or use "
                             "--iterations=1.")
        for name in ("model", "reference", "judge"):          # "dir/" is "dir": one copy in memory
            if getattr(self, name):
                setattr(self, name, os.path.normpath(getattr(self, name)))
        if self.data_fraction > 1:
            raise InputError(f"--data_fraction={self.data_fraction}: a share, at most 1.")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise InputError(f"--betas={','.join(map(str, self.betas))}: two numbers in [0, 1).")

    def lengths(self, context, p_length, prefix):
        """(max_length, max_prompt_length, max_tokens) for a model's context, with a refinement prompt of p_length tokens and a
        prefix (BOS) of so many."""
        room = context - p_length
        if self.max_length is not None and self.max_length > room:
            raise InputError(f"--max_length={self.max_length}: the model's context of {context} tokens" +
                             (f" less {p_length} for the refinement prompt" if p_length else "") + f" leaves {room}.")
        longest = self.max_length or min(512, room)
        if longest < 3:
            raise InputError(f"the model's context of {context} tokens leaves no room behind a refinement prompt of {p_length}.")
        prompt = self.max_prompt_length or longest // 2
        response = self.max_tokens or longest - min(prompt, longest // 2)
        if self.recipes[self.recipe].online:         # a prompt keeps what max_tokens leaves, its BOS included
            room = longest - response - prefix
            if room < 1:
                raise InputError(f"--max_tokens={response}: no room for a prompt within --max_length={longest}.")
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
        """[(names of settings, whether this run reads them, what they need)]; settings without an entry are always read."""
        recipe = self.recipes[self.recipe]
        online = recipe.online
        return [("weight_decay", self.optimizer == "adamw", "--optimizer=adamw"),
                 ("betas", self.optimizer != "rmsprop", "--optimizer=adam or adamw"),
                 ("beta reference", recipe.has_reference, "a recipe that compares responses"),
                 ("reference_cache", recipe.pairs == "dataset", "a recipe with fixed pairs"),
                 ("lam refinement_prompt", recipe.loss.startswith("sr-"), "a recipe sr-*"),
                 ("delta_scale", recipe.loss == "sr-ipo", "--recipe=sr-ipo"),
                 ("lora_alpha", self.lora_rank > 0, "--lora_rank"),
                 ("device_memory", self.dry_run, "--dry_run"),
                 ("epochs", self.steps is None, "the number of --steps to follow from it; leave one of them out"),
                 ("toy_family", self.model is None, "the toy world, which runs without --model"),
                 ("k temperature top_p max_tokens prompts", online, "an online recipe"),
                 ("sample_every", online and recipe.has_judge, "an online recipe with a judge"),
                 ("judge", recipe.has_judge, "a recipe with a judge"),
                 ("judge_task", recipe.has_judge or self.recipe == "judge", "a recipe with a judge"),
                 ("candidates rso_beta", recipe.responses == "rso", "--recipe=rso"),
                 ("iterations", recipe.pairs == "spin", "--recipe=spin"),
                 ("data", not (online and self.prompts), "to stand alone: an online recipe reads --prompts"),
                 ("data_fraction", self.data is not None or self.model is None, "--data"),
                 ("eval_every", bool(self.eval_data) or self.model is None, "--eval_data")]

    def check_used(self):
        """Refuse what was typed but has no effect in this run: it is a mistake somewhere."""
        for names, used, needs in self.users():
            for name in names.split():
                if name in self.given and not used:
                    raise InputError(f"--{name} would change nothing in this run: it needs {needs}.")
