"""Online self-preferring and self-refined alignment: settings, sharding, the loop, checkpoints.

    torchrun train.py                                        the whole path on the embedded world: base, SFT, judge, OSP
    torchrun train.py --recipe=sft --model=DIR --data=FILE --out_dir=out/sft
    torchrun train.py --recipe=sr-dpo --model=out/sft/final --data=FILE --out_dir=out/sr-dpo
    torchrun --nproc-per-node 2 train.py …                   the same on two ranks

The mechanism knows four axes, not recipes: which loss, where responses come from, how they are paired, how pairs are
labelled. A recipe is a row in the table below; to try a new method, add a row, and a loss if it needs one.

Left out on purpose: configuration files, trackers (out_dir/metrics.jsonl has one JSON object a step), schedulers of jobs.
Everything random is a pure function of (seed, step, row), so a run can be split over ranks or resumed without a trace.

Letters: N pairs, S sequences, K samples a prompt.
"""
import os

STARTED_BY = os.getppid()          # before torch, whose import takes seconds: by then a torchrun that was killed is not it

import contextlib
import dataclasses
import json
import math
import signal
import sys
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import checkpoint
import cli
import data
import judge
import losses
import memory
import model
import sample
from cli import InputError
from data import REFINEMENT_PROMPT

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


# ---------------------------------------------------------------------------------------------------------------------
# Ranks

@dataclass
class Ranks:
    """This process among those that torchrun started; one process alone needs no process group."""
    rank: int
    size: int
    device: str

    @classmethod
    def start(cls, device):
        """Join the process group, where torchrun started more than one process."""
        rank, size, local = (int(os.environ.get(name, default)) for name, default in
                             (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        if size > 1 and "RANK" not in os.environ:
            raise InputError(f"WORLD_SIZE is {size}, but torchrun did not start this process; unset it, or use torchrun.")
        device = sample.pick_device(device)
        if device.startswith("cuda:") and size > 1:
            raise InputError(f"--device={device}: {size} ranks take a card each; use --device=cuda.")
        if device == "cuda" and size > 1:
            device = f"cuda:{local}"
            torch.cuda.set_device(device)
        if size > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                # torchrun keeps one store for all its tries: the second must not find the addresses of the first one's ranks.
                # On several nodes it counts the tries on each for itself, so there is no name that all ranks would know.
                store, *_ = next(dist.rendezvous("env://"))
                store = dist.PrefixStore(f"try {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
                dist.init_process_group(backend, store=store, rank=rank, world_size=size)
            else:
                dist.init_process_group(backend)
        return cls(rank, size, device)

    def sum(self, values):
        """Element-wise sum over the ranks of a list of numbers."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        self.add_up(total)
        return total.tolist()

    def add_up(self, tensor):
        """The sum over the ranks of a tensor on the CPU, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def largest(self, value):
        if self.size == 1:
            return value
        total = torch.tensor(value)
        dist.all_reduce(total, dist.ReduceOp.MAX)
        return total.item()

    def from_first(self, value):
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_first(self, work):
        """What work() returns on the first rank, given to all; where it fails there, all ranks fail with its sentence."""
        value = failed = None
        if self.rank == 0:
            try:
                value = work()
            except (OSError, InputError) as error:
                failed = error
        value, failed = self.from_first((value, failed))
        if failed is not None:
            raise failed
        return value

    def on_all(self, work):
        """What work() returns on this rank; where it fails on one rank, all fail with that one's sentence."""
        value = failed = None
        try:
            value = work()
        except (OSError, InputError) as error:
            failed = error
        found = [failed]
        if self.size > 1:
            found = [None] * self.size
            dist.all_gather_object(found, failed)
        for failed in filter(None, found):
            raise failed
        return value

    def wait(self):
        if self.size > 1:
            dist.barrier()

    def mesh(self, replicas):
        """Which ranks share one copy of the weights: all of them, or (replicas, shards), neighbours together."""
        check_replicas(replicas, self.size)
        shape, names = ((self.size,), ("shard",)) if replicas == 1 else ((replicas, self.size // replicas), ("replica", "shard"))
        return init_device_mesh(self.device.split(":")[0], shape, mesh_dim_names=names)


def check_replicas(replicas, ranks):
    if ranks % replicas:
        raise InputError(f"--replicas={replicas}: the number of processes, {ranks}, is no multiple of it.")


def shard(net, dtype, mesh):
    """FSDP2: each block a group, and the root (embedding, norm, head), which stays whole between forward and backward
    because the head is called outside of forward. Masters stay as they are; compute and all-gathers are in `dtype`."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for block in net.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(net, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


@contextlib.contextmanager
def gathered(*nets):
    """Whole weights on every rank: forwards inside make no collective calls, so ranks may take different numbers of them.

    What was gathered is given back at the end, so the next forward gathers the updated weights.
    """
    wrapped = [net for net in dict.fromkeys(nets) if isinstance(net, FSDPModule)]      # one may be policy and judge
    for net in wrapped:
        for module in (*net.blocks, net):
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for net in wrapped:
            for module in (*sharded(net).blocks, net):
                module.set_reshard_after_forward(module is not net, recurse=False)


def sharded(net):
    """The network with each rank's own rows alone in its parameters: after a forward without a gradient the root is whole."""
    if isinstance(net, FSDPModule):
        for module in (*net.blocks, net):
            module.reshard()
    return net


def full(tensor):
    """A parameter as one whole tensor, gathered where it is sharded (a collective call)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# ---------------------------------------------------------------------------------------------------------------------
# What is trained on

@dataclass
class Sequence:
    """Token ids whose tail, from `start` on, is supervised (SFT, judge augmentation)."""
    ids: list
    start: int


def pack_pairs(pairs, query):
    """(the forest of chosen and rejected of each pair behind pair.x or pair.px, where the 2N responses start)."""
    queries = [getattr(pair, query) for pair in pairs]
    forest = data.pack([x + y for x, pair in zip(queries, pairs) for y in (pair.chosen, pair.rejected)])
    return forest, [len(x) for x in queries for _ in range(2)]


class Dataset:
    """Rows as ids, in an order that is a pure function of (seed, epoch)."""

    def __init__(self, settings, tokenizer, context, judge_context, say):
        s, recipe = settings, settings.recipes[settings.recipe]
        self.online = recipe.online
        self.hard, self.seed = recipe.labels == "hard", s.seed
        chat = data.check_chat(tokenizer, s.chat)
        refined = s.refinement_prompt if recipe.loss.startswith("sr-") else None
        p_length = len(tokenizer.encode(refined)) if refined else 0
        self.max_length, self.max_prompt_length, self.max_tokens = s.lengths(context, p_length, len(tokenizer.prefix(False)))
        self.limits = dict(chat=chat, max_length=self.max_length, max_prompt_length=self.max_prompt_length,
                           refinement_prompt=refined)
        if s.recipe == "judge":          # its sequences are the instructions
            judge_context = min(judge_context, s.max_length or judge_context)
        self.questioner = judge.Questioner(tokenizer, s.judge_task, judge_context)
        self.recipe, self.tokenizer = s.recipe, tokenizer
        if self.online:
            files, need = s.prompts or s.data, "responses" if recipe.pairs == "spin" else "prompts"
        else:
            files, need = s.data, {"sft": "responses", "judge": "judge"}.get(s.recipe, "pairs")
        if not files:
            raise InputError(f"--data: name the file to train {s.recipe} on." if not self.online else
                             f"--prompts: name the file with the prompts of {s.recipe}.")
        self.rows = self.read(files, need, say, s.data_fraction, supervised=not self.online)
        self.held_out = None
        if s.eval_data:
            if self.online and recipe.pairs:
                need = "responses" if recipe.loss == "sft" else "pairs"
            self.held_out = self.read(s.eval_data, need, say)

    def read(self, files, need, say, fraction=1.0, supervised=True):
        """The rows of some files: Pairs, or Sequences where single responses are to be `supervised`."""
        parts = [data.split_weight(file) for file in files] if fraction < 1 else []
        rows, reports = data.read_data([f"{path}:{weight * fraction}" for path, weight in parts] or files, need, self.seed)
        for report in reports:
            say(report)
        instructions = []
        if need == "judge":
            # Responses without a rival stay what they are: a model that only learned to say A or B could not answer.
            pairs, rows = [row for row in rows if row.rejected is not None], [row for row in rows if row.rejected is None]
            if not pairs:
                raise InputError(f"{', '.join(files)}: no row has a rejected response; there is nothing to judge.")
            sequences, starts, cut = judge.augmentation(self.questioner, pairs, self.seed)
            if cut:
                say(f"judge instructions: {cut} of {len(pairs)} were shortened to the context")
            instructions = [Sequence(ids, start) for ids, start in zip(sequences, starts)]
            if not rows:
                return instructions
        pairs, report = data.encode_dataset(self.tokenizer, rows, **self.limits, max_tokens=self.max_tokens)
        if report.skipped or report.cut:
            say(report)
        if need in ("responses", "judge") and supervised:
            return instructions + [Sequence(pair.x + pair.chosen, len(pair.x)) for pair in pairs]
        if self.hard and need == "pairs":           # where a row has a p (a replayed rollout), that names the winner
            undecided = sum(pair.p == 0.5 for pair in pairs)
            if undecided:
                say(f"{undecided} of {len(pairs)} pairs have p = ½ and no winner: left out")
            if undecided == len(pairs):
                raise InputError(f"{', '.join(files)}: every pair has p = ½; {self.recipe} needs a winner.")
            pairs = [dataclasses.replace(pair, chosen=pair.rejected, rejected=pair.chosen) if pair.p is not None and pair.p < 0.5
                     else pair for pair in pairs if pair.p != 0.5]
        return pairs

    def __len__(self):
        return len(self.rows)

    def positions(self, start, stop):
        """The rows at places start … stop - 1 of an endless row of shuffled epochs: [(place, row)]."""
        found, n = [], len(self.rows)
        for epoch in range(start // n, (stop - 1) // n + 1):
            order = np.random.default_rng([self.seed, 1, epoch]).permutation(n)
            found += [(place, self.rows[order[place - epoch * n]])
                      for place in range(max(start, epoch * n), min(stop, (epoch + 1) * n))]
        return found


# ---------------------------------------------------------------------------------------------------------------------
# The trainer

SKIPS = 5              # updates skipped in a row that end a run
PATIENCE = 10          # seconds: a longer step is given up when somebody asks to stop, for torchrun kills after 30


class Trainer:
    """One run: the policy, its frozen reference and judge, the data, the optimizer, and the place on disk."""

    def __init__(self, settings):
        s = self.settings = settings
        self.recipe = s.recipes[s.recipe]
        self.ranks = Ranks.start(s.device)
        self.out = checkpoint.OutDir(s, self.ranks)
        self.dtype = pick_dtype(s.dtype, self.ranks.device)
        self.masters = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.mesh = self.ranks.mesh(s.replicas) if self.ranks.size > 1 or s.replicas > 1 else None

        # Under adapters the base is frozen: it needs no masters.
        self.policy = self.load(s.model, self.dtype if s.lora_rank else self.masters, trained=True)
        self.policy.compute_dtype = self.dtype
        self.tokenizer = sample.matching_tokenizer(s.model, self.policy.config)
        context = self.policy.config.context
        reference, judge_folder = s.frozen_folders()
        judge_context = model.read_config(judge_folder).context if judge_folder else context
        self.data = Dataset(s, self.tokenizer, context, judge_context, self.say)
        # The reference is read in the compute type: at step 0 it computes what the policy computes, bit for bit.
        refined = self.recipe.loss.startswith("sr-")
        cache = (checkpoint.ReferenceCache(s, self.dtype, self.data.rows + (self.data.held_out or []), refined)
                 if s.reference_cache else None)
        self.frozen = {s.model: self.policy} if s.lora_rank else {}        # with its adapters off it is the reference
        needed = reference and (cache is None or self.ranks.sum([cache.values is None])[0])
        self.reference = self.load_frozen(reference) if needed else None
        self.judge = self.load_frozen(judge_folder) if judge_folder else None
        if cache is not None:
            if self.reference is not None:
                self.fill(cache)
            cache.attach()
            self.reference, self.frozen = None, {}

        self.places = s.steps * s.batch_size if s.steps else math.ceil(len(self.data) * s.epochs)
        self.steps = s.steps or math.ceil(self.places / s.batch_size)
        if "iterations" in s.given and s.iterations > self.steps:
            raise InputError(f"--iterations={s.iterations}: more than the run's {self.steps} steps.")
        warmup = self.recipe.defaults["warmup_steps"]
        self.warmup = s.warmup_steps if s.warmup_steps is not None else min(warmup, self.steps // 10)
        self.optimizer = self.make_optimizer()
        self.samples = s.candidates or s.k
        self.state = {"step": 0, "skipped": 0, "in_a_row": 0}
        self.asked, self.step_seconds = Asked(), math.inf

    def load(self, folder, dtype, trained=False, scores=False):
        """A network, sharded over the ranks before it has memory: each rank reads only what it keeps. scores: model.load's."""
        rank, alpha = (self.settings.lora_rank, self.settings.lora_alpha) if trained else (0, 0)

        def prepare(net):
            net.requires_grad_(trained)
            if rank:
                model.add_adapters(net, rank, alpha, self.masters)
            if self.mesh is not None:
                shard(net, self.dtype, self.mesh)
        net = model.load(folder, dtype, self.ranks.device, prepare, scores)
        if rank:
            places = dict(net.named_parameters())
            model.fill(net, ((name, tensor[model.own_rows(places[name])].to(self.ranks.device, self.masters))
                             for name, tensor in model.fresh_adapters(net, self.settings.seed)))
        for block in net.blocks:
            block.recompute = trained and self.settings.checkpoint_activations
        return net

    def load_frozen(self, folder):
        """A reference or judge: read once, in the compute type, never trained; it must share the policy's tokenizer."""
        if folder not in self.frozen:
            net = self.frozen[folder] = self.load(folder, self.dtype)
            if folder != self.settings.model and not sample.matching_tokenizer(folder, net.config).same_ids(self.tokenizer):
                raise InputError(f"{folder} and {self.settings.model} have different tokenizers; all models of a run must "
                                 f"share one.")
        return self.frozen[folder]

    def networks(self):
        """{name: network} of what is trained and saved."""
        return {"policy": self.policy}

    def trained(self):
        """{network.name: trained weight}."""
        return {f"{network}.{name}": weight for network, net in self.networks().items()
                for name, weight in sharded(net).named_parameters() if weight.requires_grad}

    def make_optimizer(self):
        s, parameters = self.settings, list(self.trained().values())
        if s.optimizer == "rmsprop":
            return torch.optim.RMSprop(parameters, lr=s.lr)
        kind, extra = (torch.optim.AdamW, {"weight_decay": s.weight_decay}) if s.optimizer == "adamw" else (torch.optim.Adam, {})
        # Fused: one pass over the weights where the plain one makes ten.
        return kind(parameters, lr=s.lr, betas=tuple(s.betas), fused=self.ranks.device.startswith(("cpu", "cuda")), **extra)

    def say(self, text):
        if self.ranks.rank == 0:
            print(text, flush=True)

    # -- one update ----------------------------------------------------------------------------------------------------

    def lr_at(self, step):
        """Linear warm-up, then constant, linear or cosine to 0; step counts from 0."""
        s = self.settings
        if step < self.warmup:
            return s.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return s.lr * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[s.lr_schedule]

    def share(self, step):
        """This rank's part of the global batch: [(place, row)], disjoint over the ranks."""
        b = self.settings.batch_size
        return self.data.positions(step * b, min((step + 1) * b, self.places))[self.ranks.rank::self.ranks.size]

    def update(self, step):
        """One step; returns its metrics, the same on every rank."""
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(step)
        if step in self.new_iterations():
            self.reference_from_policy()
        share = self.share(step)
        log = self.new_log()
        if self.data.online:
            examples = self.rollout(step, share, log)
        else:
            examples = [row for _, row in share]
            if self.recipe.labels == "soft":
                self.ask_judge(examples)
        update_started = time.perf_counter()
        norm = self.learn(step, examples, log)
        log.value("update_seconds", time.perf_counter() - update_started)
        metrics = {"step": step + 1, **log.means(), "grad_norm": norm, "lr": self.lr_at(step), "skipped": self.state["skipped"]}
        self.step_seconds = time.perf_counter() - started
        metrics["tokens_per_second"] = log.tokens / self.step_seconds
        return metrics

    def micro_batches(self, examples):
        """This rank's examples in the parts that it trains on one after the other."""
        size = self.settings.micro_batch_size * self.recipe.pairs_a_prompt(self.settings.k)      # prompts → pairs
        return [examples[i:i + size] for i in range(0, len(examples), size)]

    def learn(self, step, examples, log):
        """One optimizer step on the examples of all ranks; returns the norm of the gradient."""
        # The mean is over the global batch, so the count comes first; and all ranks make equally many backward passes.
        micros = self.micro_batches(examples)
        weight, = self.ranks.sum([sum(self.weight(example) for example in examples)])
        rounds = self.ranks.largest(len(micros))
        for i in range(rounds):
            self.go_on()
            if self.settings.replicas > 1:                # replicas meet once a step: until then each adds up its own
                for net in self.networks().values():
                    net.set_requires_all_reduce(i == rounds - 1)
            loss = self.objective(micros[i], log) if i < len(micros) else self.nothing()
            # FSDP averages gradients over the ranks; we want the sum.
            (loss * self.ranks.size / max(weight, 1)).backward()
        trained = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        norm = float(full(torch.nn.utils.clip_grad_norm_(trained, self.settings.grad_clip or math.inf)))
        finite = math.isfinite(norm) and math.isfinite(log.means().get("loss", 0.0))
        if finite and weight:
            self.optimizer.step()
            self.state["in_a_row"] = 0
        else:
            undecided = log.means().get("undecided", 0.0)
            self.skip(step, "the loss or its gradient is not finite" if not finite else
                      "no pair has a winner" if undecided else "all samples of a prompt are the same")
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def new_log(self):
        return Log(self.ranks, METRICS)

    def skip(self, step, why):
        """Leave the weights as they are in a step with nothing to learn from; after SKIPS in a row there is no hope."""
        self.state["skipped"] += 1
        self.state["in_a_row"] += 1
        self.say(f"\nstep {step + 1}: {why}; the update is skipped")
        if self.state["in_a_row"] >= SKIPS:
            kept = [path.name for path in self.out.checkpoints()]
            raise InputError(f"step {step + 1}: {why}, for {SKIPS} steps in a row; the run stops" + (
                f" and keeps {kept[-1]}." if kept else ".") + (
                " A lower --lr or --grad_clip may help." if "finite" in why else ""))

    def go_on(self):
        """Between two parts of a step: raise Dropped on all ranks when one of them was asked to stop and whoever asked will
        not wait for the step's end."""
        if self.ranks.largest(int(self.asked.expects(self.step_seconds))):
            raise Dropped

    def weight(self, example):
        """What an example counts in the mean: supervised tokens (SFT) or pairs."""
        return len(example.ids) - example.start if isinstance(example, Sequence) else 1

    def objective(self, examples, log):
        """The summed loss of some examples, with a graph; their metrics go into the log."""
        if isinstance(examples[0], Sequence):
            forest = data.pack([e.ids for e in examples])
            starts = [e.start for e in examples]
            values = losses.sft(losses.logprobs(self.policy, forest, starts))
            log.add("loss", values, weight=sum(self.weight(e) for e in examples))
            log.count("tokens", sum(len(e.ids) for e in examples))
            return values.sum()
        return self.pair_objective(examples, log)

    def pair_objective(self, pairs, log):
        s, delta, p = self.settings, None, None
        if self.recipe.loss.startswith("sr-"):
            # Behind p the policy is a constant too: Δπ carries no gradient, so this pass needs none.
            _, _, augmented = self.score(pairs, "px", grad=False)
            delta = losses.refinement(augmented, s.beta)
            log.add("augmented_accuracy", losses.correct(augmented))
        policy, reference, margin = self.score(pairs, "x", grad=True)
        if delta is not None:
            scale = s.delta_scale if self.recipe.loss == "sr-ipo" else "logistic"
            log.add("refined_margin", losses.refined_margin(margin, delta, s.beta, s.lam, scale))
        if self.recipe.labels == "soft":
            p = torch.tensor([1.0 if pair.p is None else pair.p for pair in pairs], device=margin.device, dtype=margin.dtype)
            log.add("p", p)
            log.add("p_hat", losses.strength_hat(margin, s.beta))
        if self.recipe.responses == "policy" and torch.is_grad_enabled():      # samples in a pair: an odd K's median is in none
            log.add("kl", torch.cat(policy) - torch.cat(reference))
        values = PAIR_LOSSES[self.recipe.loss](margin, delta, p, s)
        for name, value in (("loss", values), ("margin", margin), ("accuracy", losses.correct(margin)),
                            ("chosen_logp", policy[0]), ("rejected_logp", policy[1])):
            log.add(name, value)
        if not self.data.online:
            log.add("response_length", torch.tensor([float(len(y)) for pair in pairs for y in (pair.chosen, pair.rejected)]))
        log.count("tokens", sum(2 * len(pair.x) + len(pair.chosen) + len(pair.rejected) for pair in pairs))
        return values.sum()

    def score(self, pairs, query, grad):
        """(policy's, reference's) log-probabilities of (chosen, rejected) behind pair.x or pair.px, and the margins (N,).

        Both score the same forest in the same type, so they are equal as long as their weights are.
        """
        forest, starts = pack_pairs(pairs, query)
        with torch.no_grad():       # first, as long as no activations of the policy stand in memory
            if pairs[0].reference is not None:
                reference = torch.tensor([pair.reference[query] for pair in pairs], dtype=torch.float64)
            else:
                with model.without_adapters(self.reference):
                    reference = losses.logprobs(self.reference, forest, starts).view(-1, 2)
                if self.reference is not self.policy:
                    sharded(self.reference)                # its root would stay whole, for no backward follows
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            policy = losses.logprobs(self.policy, forest, starts).view(-1, 2).unbind(1)
        reference = reference.to(policy[0]).unbind(1)
        return policy, reference, losses.margins(policy, reference)

    @torch.no_grad()
    def fill(self, cache):
        """Compute the reference's values of all pairs, each rank a part of them, and write them down."""
        pairs, size, n = cache.pairs, self.settings.micro_batch_size, len(cache.pairs)
        line = cli.StepLine(n, "reference", enabled=self.ranks.rank == 0)
        cache.values = {query: torch.zeros(n, 2, dtype=torch.float64) for query in cache.queries}
        with model.without_adapters(self.reference):
            for start in range(0, n, self.ranks.size * size):
                first = start + self.ranks.rank * size
                part = slice(first, first + size)
                for query, values in cache.values.items():       # a rank without pairs takes part in gathering all the same
                    found = losses.logprobs(self.reference, *pack_pairs(pairs[part] or pairs[:1], query)).view(-1, 2)
                    values[part] = found.cpu().double()[:len(pairs[part])]
                line.update(min(start + self.ranks.size * size, n))
            sharded(self.reference)
        for values in cache.values.values():
            self.ranks.add_up(values)
        self.ranks.on_first(cache.write)

    def nothing(self):
        """A backward pass that adds zero, for a rank with fewer examples than the others: FSDP's collectives must match."""
        if self.recipe.loss == "sft":
            example = Sequence([0, 0], 1)
        else:
            known = {"x": (0.0, 0.0), "px": (0.0, 0.0)} if self.reference is None else None      # else it must run too
            example = data.Pair([0], [0], [0], [0], 0.5, None, False, known)
        return self.objective([example], self.new_log()) * 0

    # -- fresh responses -----------------------------------------------------------------------------------------------

    def rollout(self, step, share, log):
        """Fresh responses to this rank's prompts as examples: Pairs or (RAFT) Sequences. For osp: K responses, ranked, paired
        and judged (paper 2, algorithm 1)."""
        s, recipe = self.settings, self.recipe
        on_policy = recipe.responses == "policy"
        sampler = self.policy if on_policy else self.reference          # which under adapters are the same network
        with gathered(sampler, *filter(None, [self.judge])):
            started = time.perf_counter()
            with model.without_adapters(None if on_policy else sampler):
                samples = self.respond(sampler, step, share)
            log.value("sample_seconds", time.perf_counter() - started)
            self.go_on()
            started = time.perf_counter()
            texts = [[sample.response_text(self.tokenizer, one) for one in group] for group in samples]
            contexts = [data.context_text(pair.row.prompt) for _, pair in share]
            if recipe.has_judge:
                drawn = [self.pairing(step, place) for place, _ in share]
                with model.without_adapters(self.judge):
                    labelled, strengths, asked, cut, off = judge.label(
                        self.judge, self.data.questioner, contexts, texts, lambda some, prompt: drawn[prompt](some))
                log.add("judge_cut", torch.tensor([float(cut)]), weight=asked)
                log.add("judge_off", torch.tensor([float(off)]), weight=2 * asked)
                log.value("judge_seconds", time.perf_counter() - started)
        queries = [query for _, query in share]
        if recipe.pairs == "best":
            best = [max(range(len(some)), key=some.__getitem__) for some in strengths]
            examples = [Sequence(query.x + group[i].ids, len(query.x)) for query, group, i in zip(queries, samples, best)]
            rows = [{"prompt": query.row.prompt, "response": some[i], "finished": [group[i].finished, True]}
                    for query, group, some, i in zip(queries, samples, texts, best)]
        elif recipe.pairs == "spin":       # the data set's response wins over the opponent's
            examples = [data.Pair(query.x, query.px, query.chosen, one.ids, 1.0, query.row, False)
                        for query, group in zip(queries, samples) for one in group]
            rows = [{"prompt": query.row.prompt, "chosen": query.row.chosen, "rejected": text, "p": 1.0,
                     "finished": [query.row.finished[0], one.finished]}
                    for query, group, some in zip(queries, samples, texts) for one, text in zip(group, some)]
        else:
            examples = [data.Pair(query.x, query.px, group[i].ids, group[j].ids, p, query.row, False)
                        for query, group, chosen in zip(queries, samples, labelled) for i, j, p in chosen]
            rows = [{"prompt": query.row.prompt, "chosen": some[i], "rejected": some[j], "p": round(p, 6),
                     "finished": [group[i].finished, group[j].finished]}
                    for query, group, some, chosen in zip(queries, samples, texts, labelled) for i, j, p in chosen]
        self.write_rollouts(step, rows)
        if recipe.pairs != "best":
            examples = self.worth_learning(examples, log)
        log.add("response_length", torch.tensor([float(len(one.ids)) for group in samples for one in group]))
        log.add("finished", torch.tensor([float(one.finished) for group in samples for one in group]))
        log.add("empty", torch.tensor([float(not text.strip()) for group in texts for text in group]))
        log.add("prompt_cut", torch.tensor([float(query.cut) for _, query in share]))
        if s.sample_every and step % s.sample_every == 0 and share:
            self.show_rollout(step, share[0][1], texts[0], strengths[0], labelled[0])
        return examples

    def pairing(self, step, place):
        """How the samples of the prompt at a place of a step are paired: strengths -> [(winner, loser)]; what is drawn is a
        pure function of (seed, step, place)."""
        s, pairs = self.settings, judge.PAIRINGS[self.recipe.pairs]

        def choose(strengths):
            generator = np.random.default_rng([s.seed, 4, step, place])
            if self.recipe.responses != "rso":
                return pairs(strengths, generator)
            accepted = judge.rejection_sample(strengths, s.k, s.rso_beta, generator)
            return [(accepted[i], accepted[j]) for i, j in pairs([strengths[i] for i in accepted], generator)]
        return choose

    def worth_learning(self, pairs, log):
        """The pairs that teach something, with hard labels made of p where the recipe has them: the judge's direct verdict
        names the winner, and p = ½ names none. Two times the same response teaches nothing."""
        alike = [pair.chosen == pair.rejected for pair in pairs]
        log.add("identical", torch.tensor([float(same) for same in alike]))
        pairs = [pair for pair, same in zip(pairs, alike) if not same]
        if self.recipe.labels == "hard":
            log.add("undecided", torch.tensor([float(pair.p == 0.5) for pair in pairs]))
            pairs = [dataclasses.replace(pair, p=1.0) if pair.p > 0.5 else
                     dataclasses.replace(pair, p=1.0, chosen=pair.rejected, rejected=pair.chosen)
                     for pair in pairs if pair.p != 0.5]
        return pairs

    @torch.no_grad()
    def ask_judge(self, pairs):
        """Soft labels for rows of a data set that bring none: the judge is frozen, so each row is asked about once."""
        # By id: where an epoch ends and the next begins, a row may come twice.
        new = list({id(pair): pair for pair in pairs if pair.p is None}.values())
        with gathered(self.judge), model.without_adapters(self.judge):
            verdicts = judge.compare(self.judge, self.data.questioner, [(data.context_text(pair.row.prompt), pair.row.chosen,
                                                                        pair.row.rejected) for pair in new])
        for pair, p in zip(new, verdicts.p.tolist()):
            pair.p = p

    def new_iterations(self):
        """The steps at which SPIN's next iteration begins."""
        n = self.settings.iterations or 1
        return [-(-self.steps * i // n) for i in range(1, n)]

    @torch.no_grad()
    def reference_from_policy(self):
        """π_t, the opponent and the reference of SPIN's iteration t, is the policy at its start."""
        for ours, theirs in zip(sharded(self.reference).parameters(), sharded(self.policy).parameters()):
            ours, theirs = (part.to_local() if hasattr(part, "to_local") else part for part in (ours, theirs))
            ours.copy_(theirs)

    def respond(self, net, step, share):
        """A gathered network's K responses (for rso: its candidates) to each of this rank's prompts [(place, row)]: lists of K
        sample.Sample, a pure function of (seed, step, place)."""
        s, samples = self.settings, []
        net = model.cast(net, self.dtype)
        size = -self.ranks.largest(-self.prompts_at_a_time(share))        # prompts differ: the ranks must go on together
        for i in range(0, self.ranks.largest(len(share)), size):
            self.go_on()
            chunk = share[i:i + size]
            if not chunk:
                continue
            table = torch.stack([sample.uniforms(s.seed, step, place, self.samples, self.data.max_tokens) for place, _ in chunk])
            room = [min(self.data.max_tokens, self.data.max_length - len(row.x)) for _, row in chunk]
            samples += sample.generate(net, [row.x for _, row in chunk], table, self.stop_ids, self.allowed, s.temperature,
                                       s.top_p, room)
        return samples

    def prompts_at_a_time(self, share):
        """How many prompts are sampled together: the more, the less often the weights are read for one token a row. Their
        cache may take as much memory as the weights, or 1 GiB where those are small."""
        config, size = self.policy.config, self.dtype.itemsize
        weights = size * sum(weight.numel() for weight in self.policy.parameters())
        tokens = max((len(row.x) for _, row in share), default=0) + self.samples * self.data.max_tokens
        return max(max(weights, 1 << 30) // (tokens * 2 * config.layers * config.kv_heads * config.head_dim * size), 1)

    def write_rollouts(self, step, rows):
        """Rollouts as data rows, one file a rank, so that the run can be replayed offline."""
        name = f"rollouts.{self.ranks.rank}.jsonl" if self.ranks.rank else "rollouts.jsonl"
        self.ranks.on_all(lambda: self.out.append(name, [row | {"step": step + 1} for row in rows]))

    def show_rollout(self, step, query, texts, strengths, labelled):
        self.say(f"\nstep {step + 1}: {data.context_text(query.row.prompt)!r}")
        for rank, i in enumerate(sorted(range(len(texts)), key=lambda i: -strengths[i]), 1):
            self.say(f"  {rank}. p(y ≻ ∅) = {strengths[i]:.3f}  {texts[i]!r}")
        self.say("  pairs: " + ", ".join(f"p({i + 1} ≻ {j + 1}) = {p:.3f}" for i, j, p in labelled) +
                 "  (numbers in the order sampled)\n")

    # -- evaluation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self):
        """Metrics on held-out rows, prefixed eval_; none without eval_data. For online recipes these are pairs, with p = 1."""
        if not self.data.held_out:
            return {}
        log = self.new_log()
        rows = self.data.held_out[self.ranks.rank::self.ranks.size]
        size = self.settings.micro_batch_size
        for i in range(0, self.ranks.largest(len(rows)), size):
            self.go_on()
            if rows[i:i + size]:
                self.objective(rows[i:i + size], log)
            else:
                self.nothing()
        sharded(self.policy)               # no backward follows that would do so
        return {f"eval_{name}": value for name, value in log.means().items()}

    # -- on disk -------------------------------------------------------------------------------------------------------

    def saved(self):
        """What a checkpoint holds, as one flat dict of tensors: trained weights and optimizer state (the order of data and
        samples needs no state)."""
        trained = self.trained()
        tensors = dict(trained)
        if self.new_iterations():             # then the reference is no folder's any more
            tensors |= {f"reference.{name}": weight for name, weight in sharded(self.reference).named_parameters()}
        for name, weight in trained.items():
            for key, value in self.optimizer.state[weight].items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def room_for_saved(self, state):
        """The same to be read into: an optimizer has its state only after a first step that was not skipped."""
        if state["skipped"] == state["step"]:
            return self.saved()
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
            for weight in group["params"]:
                weight.grad = torch.zeros_like(weight)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.saved()

    def save_final(self):
        """final/: a Hugging Face folder with the source's tokenizer files; and adapter/, what was trained of it, for PEFT."""
        def write(folder, weights):
            model.save_weights(self.policy.config, weights, folder)
            self.tokenizer.save(folder)

        def write_adapters(folder, weights):
            model.save_adapters(self.policy, weights, self.settings.model, folder)
        if self.settings.lora_rank:
            self.out.write_folder("adapter", write_adapters, ((name, full(weight)) for name, weight in
                                                              self.policy.named_parameters() if "lora_" in name))
        self.out.write_folder("final", write, model.merged(self.policy, full))

    def resolved(self):
        """The settings with every default filled in, as config.json records them."""
        s, d = self.settings, self.data
        return dataclasses.asdict(s) | dict(
            steps=self.steps, warmup_steps=self.warmup, dtype=str(self.dtype).removeprefix("torch."), chat=d.limits["chat"],
            max_length=d.max_length, max_prompt_length=d.max_prompt_length, max_tokens=d.max_tokens,
            reference=s.reference or s.model, judge=s.judge or s.model)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self):
        """Train to the end and write final/. Returns the last metrics.

        SIGTERM and SIGINT end it behind the step under way, or before it where that would take too long: a checkpoint is
        saved and the process leaves with 128 + the signal.
        """
        try:
            with self.out.locked(), asked_to_stop() as self.asked:
                return self.train()
        except RuntimeError as error:
            if self.ranks.size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise LostRank(f"rank {self.ranks.rank} has lost another rank, which stopped or was killed; what was saved is "
                               f"kept.") from error
            raise

    def begin(self):
        """Go on from the last checkpoint, or from the start; False behind the end."""
        state = self.out.begin(self.resolved(), self.steps, self.room_for_saved)
        self.state = state or self.state
        return state is not None

    def train(self):
        """The steps from where begin() says, until the last one or until somebody asks to stop."""
        s = self.settings
        if not self.begin():
            last = checkpoint.last_record(self.out.path / "metrics.jsonl")
            self.say(f"{self.out.path} is finished: {json.dumps(last)}")
            return last
        trained, count = (sum(weight.numel() for weight in self.policy.parameters() if weight.requires_grad or not only)
                          for only in (True, False))
        self.say(f"{s.recipe}: {count:,} parameters" + (f", {trained:,} of them trained" if trained < count else "") +
                 f", {len(self.data):,} rows, {self.steps} steps of {s.batch_size}, "
                 f"{str(self.dtype).removeprefix('torch.')} on {self.ranks.size} × {self.ranks.device}")
        if self.data.online:
            self.stop_ids, self.allowed = sample.stopping(self.tokenizer, self.data.limits["chat"], self.policy.config)
        line = cli.StepLine(self.steps, s.recipe, enabled=self.ranks.rank == 0)
        line.resume_at(self.state["step"])
        metrics = checkpoint.last_record(self.out.path / "metrics.jsonl")       # of a run that was killed behind its last step
        on_disk = self.state["step"]
        for step in range(on_disk - ("unmeasured" in self.state), self.steps):
            last = step + 1 == self.steps
            with contextlib.suppress(Dropped):
                if "unmeasured" not in self.state:
                    self.state |= {"unmeasured": self.update(step), "step": step + 1}
                metrics = self.state["unmeasured"]
                if last or s.eval_every and (step + 1) % s.eval_every == 0:
                    metrics |= self.evaluate()               # where this is given up, a resumed run begins with it
                self.ranks.on_first(lambda: self.out.append("metrics.jsonl", [{k: rounded(v) for k, v in metrics.items()}]))
                del self.state["unmeasured"]
                line.update(step + 1, summary(metrics))
            number = self.ranks.largest(self.asked.number)        # ranks hear of it at different times: stop together
            if last or number or s.save_every and (step + 1) % s.save_every == 0:
                if self.state["step"] > on_disk:
                    self.out.save(self.saved(), self.state)
                    on_disk = self.state["step"]
            if number and (self.state["step"] < self.steps or "unmeasured" in self.state):
                self.optimizer.zero_grad(set_to_none=True)
                self.say(f"\n{signal.Signals(number).name}: stopped after step {on_disk} of {self.steps}" + (
                    " and saved; the same command goes on from there." if on_disk else "; the same command starts again."))
                sys.exit(128 + number)
        self.save_final()
        if self.state["skipped"]:
            self.say(f"{self.state['skipped']} of {self.steps} updates were skipped")
        self.say(f"{s.recipe}: written to {self.out.path / 'final'}")
        return metrics


class LostRank(InputError):
    """Not the user's mistake, but one sentence too; the ranks that are left say it at once."""
    urgent = True


class Dropped(Exception):
    """The step under way was given up; the weights are as they were before it."""


class Asked:
    """Whether this process was asked to stop: by which signal, or 0."""
    number = 0

    def __call__(self, number, frame):
        self.number = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)        # a second Ctrl-C stops at once

    def expects(self, step_seconds):
        """Whether a step under way, which takes about so long, should be given up."""
        return self.number and step_seconds > PATIENCE


@contextlib.contextmanager
def asked_to_stop():
    """An Asked that hears of SIGTERM and SIGINT."""
    asked = Asked()
    before = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pick_dtype(name, device):
    """The torch type of a --dtype setting; auto is bfloat16 where CUDA has it fast."""
    if name == "auto":
        name = "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"
    return getattr(torch, name)


def dry_run(settings):
    """Say what a rank needs of memory, with as many ranks as WORLD_SIZE or torchrun says; no process group, no weights."""
    s, given = settings, os.environ.get("WORLD_SIZE", "1")
    if s.model is None:
        raise InputError("--dry_run needs a model: --model=DIR.")
    if not given.isdigit() or int(given) < 1:
        raise InputError(f"WORLD_SIZE={given}: a number of processes.")
    ranks = int(given)
    check_replicas(s.replicas, ranks)
    if s.device_memory is not None:                   # another machine's
        device, available = "cpu" if s.device == "cpu" else "cuda", s.device_memory * 2 ** 30
    else:
        device = sample.pick_device(s.device).split(":")[0]
        here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        available = (torch.cuda.get_device_properties(0).total_memory if device == "cuda" else
                     os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / here)
    compute = torch.bfloat16 if s.dtype == "auto" and device == "cuda" else pick_dtype(s.dtype, device)
    if int(os.environ.get("RANK", 0)) == 0:
        memory.dry_run(s, compute, ranks, device, available)


def leave_with(parent):
    """End this process when `parent`, the torchrun that started it, is gone: an orphan must not go on writing to out_dir."""
    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


class Log:
    """Sums and counts of one step's metrics, per example, over micro-batches and ranks."""

    def __init__(self, ranks, names):
        self.ranks, self.names, self.sums, self.counts, self.totals = ranks, names, {}, {}, {}

    def add(self, name, values, weight=None):
        """Per-example values of any shape; their mean is over `weight`, by default their number."""
        weight = values.numel() if weight is None else weight
        self.sums[name] = self.sums.get(name, 0.0) + float(values.detach().cpu().double().sum())
        self.counts[name] = self.counts.get(name, 0) + weight

    def value(self, name, number):
        """A figure of this rank; the mean over the ranks is reported."""
        self.sums[name], self.counts[name] = number, 1

    def count(self, name, number):
        """A total over the ranks: `tokens`, behind means()."""
        self.totals[name] = self.totals.get(name, 0) + number

    def means(self):
        """{name: mean over the global batch} so far; also `tokens`, of the global batch. A rank without examples has added no
        names, so they are all known from the start."""
        flat = self.ranks.sum([self.sums.get(name, 0.0) for name in self.names] +
                              [self.counts.get(name, 0) for name in self.names] + [self.totals.get("tokens", 0)])
        self.tokens = flat[-1]
        return {name: total / count for name, total, count in zip(self.names, flat, flat[len(self.names):]) if count}


METRICS = ("loss margin refined_margin accuracy augmented_accuracy kl p p_hat chosen_logp rejected_logp response_length "
           "finished empty identical undecided judge_cut judge_off prompt_cut "
           "sample_seconds judge_seconds update_seconds").split()


def rounded(value):
    """Floats with eight significant digits: enough to compare float32 runs, short enough to read; null if not finite."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.8g}") if math.isfinite(value) else None       # JSON knows no infinity


def summary(metrics):
    """The few figures of a step that a person watches."""
    shown = ("reward", "loss", "margin", "refined_margin", "accuracy", "augmented_accuracy", "p", "p_hat", "kl",
             "response_length", "eval_reward", "eval_loss", "eval_accuracy")
    return "  ".join(f"{name} {metrics[name]:.4g}" for name in shown if name in metrics)


def main(settings, trainer=Trainer):
    """Train on what was named, or run the toy world's whole path where no model was."""
    for name in ("model", "reference", "judge", "reward", "out_dir"):
        if getattr(settings, name, None) == "":
            raise InputError(f"--{name}= is empty.")
    settings.check_used()
    if settings.dry_run:
        return dry_run(settings)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        leave_with(STARTED_BY)
        if settings.resume == "never" and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
            settings.resume = settings.given["resume"] = "auto"        # torchrun --max-restarts: what the first try made is good
    if settings.model is None:         # an empty one is a mistake (an unset shell variable), not a wish for toys
        for name in ("data", "prompts", "eval_data", "reference", "judge", "reward"):
            if getattr(settings, name, None):
                raise InputError(f"--{name} needs a model: --model=DIR. Without one, the toy world is run.")
        import toy
        return toy.main(settings)
    return trainer(settings).run()


def leave(status):
    """End this process. A rank does so at once: a thread of gloo may still hold the last tensor that it sent, and to let go of
    it while Python shuts down aborts a run that went well ("terminate called without an active exception", status -6)."""
    if not dist.is_initialized():
        sys.exit(status)
    if status == 0:                    # behind an error the others may be anywhere: nobody to say goodbye to
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def launch(main, settings):
    """What stands in front of a script that torchrun starts: cli.run, and an end that a rank survives."""
    ended = 0
    try:
        cli.run(main, settings)
    except SystemExit as error:
        ended = error.code
    leave(ended)


if __name__ == "__main__":
    launch(main, Settings)
