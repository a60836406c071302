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
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

try:
    import fcntl
except ImportError:            # Windows
    fcntl = None

import cli
import data
import judge
import losses
import model
import sample
from cli import InputError
from data import REFINEMENT_PROMPT

# ---------------------------------------------------------------------------------------------------------------------
# Recipes: a choice on four axes

# What both papers state, as defaults. Paper 1 clips the gradient but does not say at what norm: 10 and a warm-up of 150
# steps are the public DPO reference code's. Paper 2 names neither: 1.0 and 10 steps are ours.
PAPER_1 = dict(optimizer="rmsprop", lr=5e-7, batch_size=64, warmup_steps=150, grad_clip=10.0, beta=0.1)
PAPER_2 = dict(optimizer="adam", lr=2e-6, batch_size=16, warmup_steps=10, grad_clip=1.0, beta=0.02)
SUPERVISED = dict(optimizer="adam", lr=1e-5, batch_size=64, warmup_steps=10, grad_clip=1.0)


@dataclass(frozen=True)
class Recipe:
    loss: str                      # a key of PAIR_LOSSES, or sft
    responses: str                 # dataset, or policy (fresh samples)
    pairs: str | None              # dataset, or a key of judge.PAIRINGS; None where the loss takes single responses
    labels: str | None             # hard (the winner is named), soft (the judge's strength p), None
    defaults: dict = field(default_factory=dict)

    def __post_init__(self):
        takes_p = self.loss in ("spce", "sr-spce")
        if self.labels == "soft" and not takes_p:
            raise InputError(f"labels: soft needs a loss that takes p (spce, sr-spce), not {self.loss}; change loss or labels.")
        if self.labels == "hard" and takes_p:
            raise InputError(f"labels: {self.loss} takes the judge's strength; change labels to soft, or loss to dpo.")
        if (self.loss == "sft") != (self.labels is None):
            raise InputError(f"labels: {self.labels} does not go with loss {self.loss}; sft takes none, all others need them.")
        if (self.responses == "dataset") != (self.pairs in ("dataset", None)):
            raise InputError(f"pairs: {self.pairs} cannot be made of responses from {self.responses}; change pairs or responses.")


RECIPES = {
    #                loss      responses   pairs      labels
    "sft":    Recipe("sft",    "dataset",  None,      None,   SUPERVISED),
    "judge":  Recipe("sft",    "dataset",  None,      None,   SUPERVISED),      # the responses are judge instructions
    "dpo":    Recipe("dpo",    "dataset",  "dataset", "hard", PAPER_1),
    "ipo":    Recipe("ipo",    "dataset",  "dataset", "hard", PAPER_1),
    "sr-dpo": Recipe("sr-dpo", "dataset",  "dataset", "hard", PAPER_1),
    "sr-ipo": Recipe("sr-ipo", "dataset",  "dataset", "hard", PAPER_1),
    "osp":    Recipe("spce",   "policy",   "ranked",  "soft", PAPER_2),
}

# loss name -> (margin, delta, p, settings) -> (N,); all in losses.py
PAIR_LOSSES = {
    "dpo":     lambda h, delta, p, s: losses.dpo(h, s.beta),
    "ipo":     lambda h, delta, p, s: losses.ipo(h, s.beta),
    "sr-dpo":  lambda h, delta, p, s: losses.sr_dpo(h, delta, s.beta, s.lam),
    "sr-ipo":  lambda h, delta, p, s: losses.sr_ipo(h, delta, s.beta, s.lam, s.delta_scale),
    "spce":    lambda h, delta, p, s: losses.spce(h, p, s.beta),
}


# ---------------------------------------------------------------------------------------------------------------------
# Settings

@dataclass
class Settings:
    """Align a language model. Values left out are the recipe's (the papers'); without --model it runs on the toy world."""
    recipe: str = "osp"                      # sft, judge, dpo, ipo, sr-dpo, sr-ipo, osp
    model: str | None = None                 # folder of the model to train: config.json, safetensors, tokenizer
    reference: str | None = None             # folder of the frozen reference; default: model
    judge: str | None = None                 # folder of the judge of online recipes; default: model (the same copy in memory)
    data: list[str] | None = None            # training files, comma-separated; file:0.1 takes a tenth of it, file:3 thrice
    prompts: list[str] | None = None         # prompt files of online recipes; default: the prompts in data
    eval_data: list[str] | None = None       # held-out files of the same form
    eval_every: int = 0                      # steps between evaluations; 0: only at the end
    out_dir: str = "out"                     # gets config.json, metrics.jsonl, checkpoint/, final/
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
    k: int = 7                               # responses a prompt; papers: 7 (9 at 2 % of the data, 21 with 200 prompts)
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
    sample_every: int = 0                    # online: steps between printing a prompt with its samples and strengths
    toy_family: str = "llama"                # architecture in the toy world: llama (sentencepiece) or neox (tiktoken)

    def __post_init__(self):
        """Fill in the recipe's values and refuse impossible ones."""
        plain = {f.name: f.default_factory() if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(self)}
        self.given = {name: getattr(self, name) for name in plain if getattr(self, name) != plain[name]}     # for the toy world
        if self.recipe not in RECIPES:
            raise InputError(f"--recipe={self.recipe}: choose one of {', '.join(RECIPES)}.")
        for name, value in RECIPES[self.recipe].defaults.items():
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
                    "seed": 0, "lam": 0, "weight_decay": 0, "grad_clip": 0}
        for name, least in at_least.items():
            if getattr(self, name) is not None and not least <= getattr(self, name) < math.inf:
                raise InputError(f"--{name}={getattr(self, name)}: must be at least {least}.")
        for name in ("lr", "beta", "epochs", "temperature"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise InputError(f"--{name}={getattr(self, name)}: must be larger than 0" +
                                 (" (greedy samples would all be one)." if name == "temperature" else "."))
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top_p={self.top_p}: must be in (0, 1].")
        if self.k < 2:
            raise InputError(f"--k={self.k}: pairs need at least 2 responses a prompt.")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise InputError(f"--betas={','.join(map(str, self.betas))}: two numbers in [0, 1).")

    def folders(self):
        """The model folders that the run reads."""
        return list(dict.fromkeys(filter(None, (self.model, self.reference, self.judge))))

    def files(self):
        """The data files that it reads, as they were given: "file" or "file:weight"."""
        return [*(self.data or []), *(self.prompts or []), *(self.eval_data or [])]

    def check_used(self):
        """Refuse what was typed but has no effect in this run: it is a mistake somewhere."""
        recipe = RECIPES[self.recipe]
        online = recipe.responses == "policy"
        users = [("weight_decay", self.optimizer == "adamw", "--optimizer=adamw"),
                 ("betas", self.optimizer != "rmsprop", "--optimizer=adam or adamw"),
                 ("beta reference", recipe.loss != "sft", "a recipe that compares responses"),
                 ("reference_cache", recipe.pairs == "dataset", "a recipe with fixed pairs"),
                 ("lam refinement_prompt", recipe.loss.startswith("sr-"), "a recipe sr-*"),
                 ("delta_scale", recipe.loss == "sr-ipo", "--recipe=sr-ipo"),
                 ("k temperature top_p max_tokens prompts judge sample_every", online, "an online recipe"),
                 ("judge_task", online or self.recipe == "judge", "a recipe with a judge"),
                 ("data", not (online and self.prompts), "to stand alone: an online recipe reads --prompts"),
                 ("eval_every", bool(self.eval_data) or self.model is None, "--eval_data")]
        for names, used, needs in users:
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
        rank, size, local = (int(os.environ.get(name, default)) for name, default in
                             (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        device = sample.pick_device(device)
        if device == "cuda" and size > 1:
            device = f"cuda:{local}"
            torch.cuda.set_device(device)
        if size > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
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

    def wait(self):
        if self.size > 1:
            dist.barrier()


def shard(net, dtype):
    """FSDP2: each block a group, and the root (embedding, norm, head), which stays whole between forward and backward
    because the head is called outside of forward. Masters stay as they are; compute and all-gathers are in `dtype`."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for block in net.blocks:
        fully_shard(block, mp_policy=policy)
    return fully_shard(net, mp_policy=policy, reshard_after_forward=False)


@contextlib.contextmanager
def gathered(*nets):
    """Whole weights on every rank: forwards inside make no collective calls, so ranks may take different numbers of them.

    What was gathered is given back at the end, so the next forward gathers the updated weights.
    """
    sharded = [net for net in nets if isinstance(net, FSDPModule)]
    for net in sharded:
        for module in (*net.blocks, net):
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for net in sharded:
            for module in (*net.blocks, net):
                module.reshard()
                module.set_reshard_after_forward(module is not net, recurse=False)


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
        s, recipe = settings, RECIPES[settings.recipe]
        self.online = recipe.responses == "policy"
        self.hard, self.seed = recipe.labels == "hard", s.seed
        chat = data.check_chat(tokenizer, s.chat)
        refined = s.refinement_prompt if recipe.loss.startswith("sr-") else None
        p_length = len(tokenizer.encode(refined)) if refined else 0
        room = context - p_length
        if s.max_length is not None and s.max_length > room:
            raise InputError(f"--max_length={s.max_length}: the model's context of {context} tokens" +
                             (f" less {p_length} for the refinement prompt" if refined else "") + f" leaves {room}.")
        self.max_length = s.max_length or min(512, room)
        if self.max_length < 3:
            raise InputError(f"the model's context of {context} tokens leaves no room behind a refinement prompt of {p_length}.")
        self.max_prompt_length = s.max_prompt_length or self.max_length // 2
        self.max_tokens = s.max_tokens or self.max_length - min(self.max_prompt_length, self.max_length // 2)
        if self.online:         # a prompt keeps what max_tokens leaves, its BOS included
            room = self.max_length - self.max_tokens - len(tokenizer.prefix(False))
            if room < 1:
                raise InputError(f"--max_tokens={self.max_tokens}: no room for a prompt within --max_length={self.max_length}.")
            self.max_prompt_length = min(self.max_prompt_length, room)
        self.limits = dict(chat=chat, max_length=self.max_length, max_prompt_length=self.max_prompt_length,
                           refinement_prompt=refined)
        if s.recipe == "judge":          # its sequences are the instructions
            judge_context = min(judge_context, s.max_length or judge_context)
        self.questioner = judge.Questioner(tokenizer, s.judge_task, judge_context)
        self.recipe, self.tokenizer = s.recipe, tokenizer
        if self.online:
            files, need = s.prompts or s.data, "prompts"
        else:
            files, need = s.data, {"sft": "responses", "judge": "judge"}.get(s.recipe, "pairs")
        if not files:
            raise InputError(f"--data: name the file to train {s.recipe} on." if not self.online else
                             f"--prompts: name the file with the prompts of {s.recipe}.")
        self.need = need
        self.rows = self.read(files, need, say)
        self.held_out = None
        if s.eval_data:
            self.held_out = self.read(s.eval_data, need if not self.online else "pairs", say)

    def read(self, files, need, say):
        rows, reports = data.read_data(files, need, self.seed)
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
        if need in ("responses", "judge"):
            return instructions + [Sequence(pair.x + pair.chosen, len(pair.x)) for pair in pairs]
        if self.hard:           # where a row has a p (a replayed rollout), that names the winner
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
# What the reference says about a fixed data set is constant

class ReferenceCache:
    """log π_ref of every pair's two responses behind x, and behind p⊕x where the recipe asks: one safetensors file a key.

    The key is a digest of the reference's folder, the compute type and all ids, which follow from data, tokenizer, lengths
    and p. `values` {"x": (N, 2), "px": (N, 2)} in float64, or None as long as nobody has computed them.
    """

    def __init__(self, settings, dtype, pairs, refined):
        self.pairs, self.queries = pairs, ("x", "px") if refined else ("x",)
        folder = Path(settings.reference or settings.model)
        files = sorted({path for path, *_ in model.weight_files(folder).values()})
        key = hashlib.sha256(f"{dtype} {self.queries} {digest(folder / 'config.json', *files)}".encode())
        for pair in pairs:
            for ids in (*(getattr(pair, query) for query in self.queries), pair.chosen, pair.rejected):
                key.update(np.array([len(ids), *ids], dtype=np.int64).tobytes())
        self.path = Path(settings.reference_cache) / f"reference-{key.hexdigest()[:32]}.safetensors"
        self.values = self.read() if os.path.exists(self.path) else None

    def read(self):
        """The values of a file, checked: its name says what they belong to, not that the file is whole."""
        wanted = {query: ("F64", (len(self.pairs), 2)) for query in self.queries}
        if model.read_header(self.path) != wanted:
            raise InputError(f"{self.path} does not hold the log-probabilities of {len(self.pairs)} pairs; remove it.")
        return load_file(self.path)

    def write(self):
        """Aside and renamed: two runs may compute the same file."""
        aside = self.path.with_name(f".writing-{os.getpid()}-{self.path.name}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(self.values, aside)
            os.replace(aside, self.path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"--reference_cache={self.path.parent} cannot be written: {error}.") from None

    def attach(self):
        """Give each pair its values; whoever scores it asks there first."""
        for i, pair in enumerate(self.pairs):
            pair.reference = {query: self.values[query][i].tolist() for query in self.queries}


# ---------------------------------------------------------------------------------------------------------------------
# The trainer

class Trainer:
    """One run: the policy, its frozen reference and judge, the data, the optimizer, and the place on disk."""

    def __init__(self, settings):
        s = self.settings = settings
        self.recipe = RECIPES[s.recipe]
        self.ranks = Ranks.start(s.device)
        self.out = Path(s.out_dir)
        self.before = self.claim_out_dir()
        self.dtype = self.pick_dtype()
        masters = torch.float64 if self.dtype == torch.float64 else torch.float32

        self.policy = model.load(s.model, masters, self.ranks.device)
        self.policy.compute_dtype = self.dtype
        self.tokenizer = sample.matching_tokenizer(s.model, self.policy.config)
        context = self.policy.config.context
        online = self.recipe.responses == "policy"
        judge_context = model.read_config(s.judge or s.model).context if online else context
        self.data = Dataset(s, self.tokenizer, context, judge_context, self.say)
        # The reference is read in the compute type: at step 0 it computes what the policy computes, bit for bit.
        self.reference = self.judge = None
        refined = self.recipe.loss.startswith("sr-")
        cache = (ReferenceCache(s, self.dtype, self.data.rows + (self.data.held_out or []), refined)
                 if s.reference_cache else None)
        if self.recipe.loss != "sft" and (cache is None or self.ranks.sum([cache.values is None])[0]):
            self.reference = self.frozen(s.reference or s.model)
        if online:
            same = (s.judge or s.model) == (s.reference or s.model)
            self.judge = self.reference if same else self.frozen(s.judge or s.model)
        if self.ranks.size > 1:
            for net in {id(n): n for n in (self.policy, self.reference, self.judge) if n is not None}.values():
                shard(net, self.dtype)
        if cache is not None:
            if self.reference is not None:
                self.fill(cache)
            cache.attach()
            self.reference = None

        self.places = s.steps * s.batch_size if s.steps else math.ceil(len(self.data) * s.epochs)
        self.steps = s.steps or math.ceil(self.places / s.batch_size)
        warmup = RECIPES[s.recipe].defaults["warmup_steps"]
        self.warmup = s.warmup_steps if s.warmup_steps is not None else min(warmup, self.steps // 10)
        self.optimizer = self.make_optimizer()

    def pick_dtype(self):
        name = self.settings.dtype
        if name == "auto":
            name = "bfloat16" if self.ranks.device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"
        return getattr(torch, name)

    def frozen(self, folder):
        """A reference or judge: read in the compute type, never trained; it must share the policy's tokenizer."""
        net = model.load(folder, self.dtype, self.ranks.device)
        if folder != self.settings.model and not sample.matching_tokenizer(folder, net.config).same_ids(self.tokenizer):
            raise InputError(f"{folder} and {self.settings.model} have different tokenizers; all models of a run must share one.")
        return net.requires_grad_(False)

    def make_optimizer(self):
        s, parameters = self.settings, list(self.policy.parameters())
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
        """One optimizer step; returns its metrics, the same on every rank."""
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(step)
        share = self.share(step)
        log = Log(self.ranks)
        if self.data.online:
            examples = self.rollout(step, share, log)
        else:
            examples = [row for _, row in share]
        # The mean is over the global batch, so the count comes first; and all ranks make equally many backward passes.
        size = self.settings.micro_batch_size * (self.settings.k // 2 if self.data.online else 1)      # prompts → pairs
        micros = [examples[i:i + size] for i in range(0, len(examples), size)]
        weight, = self.ranks.sum([sum(self.weight(example) for example in examples)])
        update_started = time.perf_counter()
        for i in range(self.ranks.largest(len(micros))):
            loss = self.objective(micros[i], log) if i < len(micros) else self.nothing()
            # FSDP averages gradients over the ranks; we want the sum.
            (loss * self.ranks.size / max(weight, 1)).backward()
        norm = float(full(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.settings.grad_clip or math.inf)))
        if not math.isfinite(norm):
            raise InputError(f"step {step + 1}: the gradient is not finite (norm {norm}); the run stops with what was saved "
                             f"before. A lower --lr or --grad_clip may help.")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        log.value("update_seconds", time.perf_counter() - update_started)
        metrics = {"step": step + 1, **log.means(), "grad_norm": norm, "lr": self.lr_at(step)}
        metrics["tokens_per_second"] = log.totals["tokens"] / (time.perf_counter() - started)
        return metrics

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
        if self.data.online and torch.is_grad_enabled():      # over the fresh samples in a pair; an odd K's median is in none
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
                reference = losses.logprobs(self.reference, forest, starts).view(-1, 2)
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
        with gathered(self.reference):
            for start in range(self.ranks.rank * size, n, self.ranks.size * size):
                part = slice(start, start + size)
                for query, values in cache.values.items():
                    values[part] = losses.logprobs(self.reference, *pack_pairs(pairs[part], query)).view(-1, 2).cpu().double()
                line.update(min(start + self.ranks.size * size, n))
        for values in cache.values.values():
            self.ranks.add_up(values)
        if self.ranks.rank == 0:
            cache.write()

    def nothing(self):
        """A backward pass that adds zero, for a rank with fewer examples than the others: FSDP's collectives must match."""
        if self.recipe.loss == "sft":
            example = Sequence([0, 0], 1)
        else:
            known = {"x": (0.0, 0.0), "px": (0.0, 0.0)} if self.reference is None else None      # else it must run too
            example = data.Pair([0], [0], [0], [0], 0.5, None, False, known)
        return self.objective([example], Log(self.ranks)) * 0

    # -- fresh responses -----------------------------------------------------------------------------------------------

    def rollout(self, step, share, log):
        """K responses to each of this rank's prompts, ranked, paired and judged: a list of Pairs (paper 2, algorithm 1)."""
        s, pairs = self.settings, []
        with gathered(self.policy, self.judge):
            started = time.perf_counter()
            policy, samples = model.cast(self.policy, self.dtype), []
            size = self.prompts_at_a_time(share)
            for i in range(0, len(share), size):
                chunk = share[i:i + size]
                table = torch.stack([sample.uniforms(s.seed, step, place, s.k, self.data.max_tokens) for place, _ in chunk])
                samples += sample.generate(policy, [row.x for _, row in chunk], table, self.stop_ids, self.allowed,
                                           s.temperature, s.top_p)
            del policy
            log.value("sample_seconds", time.perf_counter() - started)
            started = time.perf_counter()
            texts = [[sample.response_text(self.tokenizer, one) for one in group] for group in samples]
            contexts = [data.context_text(pair.row.prompt) for _, pair in share]
            labelled, strengths, asked, cut = judge.label(self.judge, self.data.questioner, contexts, texts, self.recipe.pairs)
            log.value("judge_seconds", time.perf_counter() - started)
        for (_, query), group, chosen in zip(share, samples, labelled):
            pairs += [data.Pair(query.x, query.px, group[i].ids, group[j].ids, p, query.row, False) for i, j, p in chosen]
        log.add("response_length", torch.tensor([float(len(one.ids)) for group in samples for one in group]))
        log.add("finished", torch.tensor([float(one.finished) for group in samples for one in group]))
        log.add("judge_cut", torch.tensor([float(cut)]), weight=asked)
        log.add("prompt_cut", torch.tensor([float(query.cut) for _, query in share]))
        self.write_rollouts(step, share, samples, texts, labelled)
        if s.sample_every and step % s.sample_every == 0 and share:
            self.show_rollout(step, share[0][1], texts[0], strengths[0], labelled[0])
        return pairs

    def prompts_at_a_time(self, share):
        """How many prompts are sampled together: the more, the less often the weights are read for one token a row. Their
        cache may take as much memory as the weights, or 1 GiB where those are small."""
        config, size = self.policy.config, self.dtype.itemsize
        weights = size * sum(weight.numel() for weight in self.policy.parameters())
        tokens = max((len(row.x) for _, row in share), default=0) + self.settings.k * self.data.max_tokens
        return max(max(weights, 1 << 30) // (tokens * 2 * config.layers * config.kv_heads * config.head_dim * size), 1)

    def write_rollouts(self, step, share, samples, texts_of, labelled):
        """Rollouts as data rows, one file a rank, so that the run can be replayed offline."""
        name = f"rollouts.{self.ranks.rank}.jsonl" if self.ranks.rank else "rollouts.jsonl"
        with open(self.out / name, "a", encoding="utf-8") as file:
            for (_, query), group, texts, chosen in zip(share, samples, texts_of, labelled):
                for i, j, p in chosen:
                    row = {"prompt": query.row.prompt, "chosen": texts[i], "rejected": texts[j], "p": round(p, 6),
                           "finished": [group[i].finished, group[j].finished], "step": step + 1}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")

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
        log = Log(self.ranks)
        rows = self.data.held_out[self.ranks.rank::self.ranks.size]
        with gathered(*(net for net in (self.policy, self.reference) if net is not None)):
            for i in range(0, len(rows), self.settings.micro_batch_size):
                self.objective(rows[i:i + self.settings.micro_batch_size], log)
        return {f"eval_{name}": value for name, value in log.means().items()}

    # -- on disk -------------------------------------------------------------------------------------------------------

    def state(self):
        """Everything a run needs to go on, as one flat dict of tensors (the order of data and samples needs no state)."""
        tensors = {f"policy.{name}": weight for name, weight in self.policy.named_parameters()}
        for name, weight in self.policy.named_parameters():
            for key, value in self.optimizer.state[weight].items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def save_checkpoint(self, step):
        """checkpoint/step-N: sharded safetensors, then state.json, written aside and renamed into place."""
        folder = self.out / "checkpoint"
        aside, place = folder / f".writing-step-{step}", folder / f"step-{step}"
        if self.ranks.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.ranks.wait()
        with warnings.catch_warnings():               # one process needs no process group, which DCP warns about
            warnings.simplefilter("ignore", UserWarning)
            dcp.save(self.state(), storage_writer=dcp.HuggingFaceStorageWriter(str(aside), save_distributed=True),
                     no_dist=self.ranks.size == 1)
        self.ranks.wait()
        if self.ranks.rank == 0:
            files = {file.name: file.stat().st_size for file in sorted(aside.iterdir())}
            (aside / "state.json").write_text(json.dumps({"step": step, "ranks": self.ranks.size, "files": files}, indent=2))
            for file in aside.iterdir():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
            shutil.rmtree(place, ignore_errors=True)
            os.replace(aside, place)
            for old in self.checkpoints()[:-self.settings.keep]:
                shutil.rmtree(old)
        self.ranks.wait()

    def checkpoints(self):
        """Complete checkpoints, oldest first."""
        found = [path for path in (self.out / "checkpoint").glob("step-*")
                 if re.fullmatch(r"step-\d+", path.name) and (path / "state.json").exists()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def load_checkpoint(self, folder):
        """Read weights and optimizer state in place, on any number of ranks; returns the step."""
        state = cli.read_json(folder / "state.json")
        remedy = f"remove {folder} to go on from an earlier one, or start over with --resume=never"
        if type(state.get("step")) is not int or state["step"] < 1 or not isinstance(state.get("files"), dict):
            raise InputError(f"{folder / 'state.json'} does not say what the checkpoint holds; {remedy}.")
        for name, size in state["files"].items():
            path = folder / name
            if not path.exists() or path.stat().st_size != size:
                raise InputError(f"{path} is missing or incomplete; {remedy}.")
        for group in self.optimizer.param_groups:       # the state must exist before it can be read into
            group["lr"] = 0.0
            for weight in group["params"]:
                weight.grad = torch.zeros_like(weight)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        tensors = self.state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                reader = dcp.HuggingFaceStorageReader(str(folder))
                more = sorted(reader.read_metadata().state_dict_metadata.keys() - tensors.keys())
                if more:             # dcp reads what it is asked for and does not mind the rest
                    raise ValueError(f"it also holds {more[0]}")
                dcp.load(tensors, storage_reader=reader, no_dist=self.ranks.size == 1)
            except (dcp.api.CheckpointException, RuntimeError, ValueError, KeyError) as error:
                why = str(error).strip().splitlines()[-1]
                raise InputError(f"{folder} does not fit this model and optimizer ({why}); {remedy}.") from None
        return state["step"]

    def save_final(self):
        """final/: a Hugging Face folder with the source's tokenizer files."""
        weights = {}
        for name, weight in self.policy.named_parameters():
            whole = full(weight).detach()
            if self.ranks.rank == 0:
                weights[name] = whole.cpu()
        if self.ranks.rank == 0:
            aside, place = self.out / ".writing-final", self.out / "final"
            shutil.rmtree(aside, ignore_errors=True)
            model.save_weights(self.policy.config, weights, aside)
            self.tokenizer.save(aside)
            shutil.rmtree(place, ignore_errors=True)
            os.replace(aside, place)
        self.ranks.wait()

    def claim_out_dir(self):
        """Refuse an out_dir that is not a run's, or that holds what this run reads: it will be written to and partly cleared.
        Returns the settings of the run it holds, or None."""
        s, out = self.settings, self.out.resolve()

        def is_cleared(path):
            return any(path.is_relative_to(out / name) for name in ("final", "checkpoint"))
        for folder in filter(None, (*s.folders(), s.reference_cache)):
            path = Path(folder).resolve()
            if is_cleared(path) or path == out and folder in s.folders():
                raise InputError(f"--out_dir={self.out} would overwrite {folder}, which this run needs; name another.")
            if out.is_relative_to(path) and folder in s.folders():
                raise InputError(f"--out_dir={self.out} lies in the model folder {folder}; name another.")
        for spec in s.files():
            file = Path(data.split_weight(spec)[0]).resolve()
            if file.parent == out or is_cleared(file):
                raise InputError(f"{file.name} lies in --out_dir={self.out}, which this run writes to; name another out_dir.")
        if any(place.exists() and not place.is_dir() for place in (self.out, *self.out.parents)):
            raise InputError(f"--out_dir={self.out} cannot be written: a file stands in the way.")
        before = cli.read_json(self.out / "config.json", absent={})
        ours = ("config.json", "final", "checkpoint", "metrics.jsonl", "rollouts.jsonl")
        if not isinstance(before.get("settings"), dict) and any((self.out / name).exists() for name in ours):
            raise InputError(f"--out_dir={self.out} holds files of another kind; name an empty or a new folder.")
        return before.get("settings")

    def resolved(self):
        """The settings with every default filled in, as config.json records them."""
        s, d = self.settings, self.data
        return dataclasses.asdict(s) | dict(
            steps=self.steps, warmup_steps=self.warmup, dtype=str(self.dtype).removeprefix("torch."), chat=d.limits["chat"],
            max_length=d.max_length, max_prompt_length=d.max_prompt_length, max_tokens=d.max_tokens,
            reference=s.reference or s.model, judge=s.judge or s.model)

    def inputs(self):
        """{file or model folder: digest of its contents}: a run goes on only with what it began with."""
        s, found = self.settings, {}
        if self.ranks.rank == 0:
            for folder in s.folders():
                files = {path for path, *_ in model.weight_files(folder).values()}
                found[folder] = digest(Path(folder) / "config.json", *sorted(files), sampled=True)
            for spec in s.files():
                found[spec] = digest(data.split_weight(spec)[0])
        return self.ranks.from_first(found)

    def begin(self):
        """The step to go on from, or None when the run is finished; other settings than the run's are refused by name."""
        s, settings = self.settings, json.loads(json.dumps(self.resolved()))
        settings["inputs"] = self.inputs()
        step, last = 0, (last_record(self.out / "metrics.jsonl") or {}).get("step")
        if self.before is not None and s.resume != "never":
            free = {"out_dir", "resume", "keep", "save_every", "sample_every", "eval_every", "device", "micro_batch_size",
                    "reference_cache", "inputs"}
            changed = [f"{key} ({self.before.get(key)} → {value})" for key, value in settings.items()
                       if key not in free and self.before.get(key) != value]
            changed = changed or [f"the contents of {path}" for path, contents in settings["inputs"].items()
                                  if self.before.get("inputs", {}).get(path) != contents]
            if changed and s.resume != "force":
                raise InputError(f"{self.out} holds a run with other settings or data: {', '.join(changed)}; use another "
                                 f"--out_dir, --resume=never to start over or --resume=force to go on all the same.")
            if (self.out / "final").exists() and last == self.steps:
                return None
            found = self.checkpoints()
            if found:
                step = self.load_checkpoint(found[-1])
                if step > self.steps:
                    raise InputError(f"{self.out} has come to step {step} already, behind --steps={self.steps}; use another "
                                     f"--out_dir or --resume=never.")
                self.say(f"going on from {found[-1]}")
        self.ranks.wait()
        if self.ranks.rank == 0:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                for name in ("final",) if step else ("final", "checkpoint"):
                    shutil.rmtree(self.out / name, ignore_errors=True)
                record = {"settings": settings, "versions": versions(), "commit": commit(), "ranks": self.ranks.size}
                (self.out / "config.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
                for path in (self.out / "metrics.jsonl", *self.out.glob("rollouts*.jsonl")):
                    keep_records(path, step)
            except OSError as error:
                raise InputError(f"--out_dir={self.out} cannot be written: {error.strerror}.") from None
        self.ranks.wait()
        return step

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self):
        """Train to the end and write final/. Returns the last metrics.

        SIGTERM and SIGINT end it after the step under way: a checkpoint is saved and the process leaves with 128 + the signal.
        """
        with self.locked(), asked_to_stop() as asked:
            return self.train(asked)

    @contextlib.contextmanager
    def locked(self):
        """out_dir belongs to one run at a time; the first rank holds the lock, and the system frees it whatever happens."""
        if self.ranks.rank:
            yield
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            file = open(self.out / ".lock", "w")
        except OSError as error:
            raise InputError(f"--out_dir={self.out} cannot be written: {error.strerror}.") from None
        with file:
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another run is writing to --out_dir={self.out}; wait for it, or name another.") from None
            except OSError:          # a file system without locks
                pass
            yield

    def train(self, asked):
        """The steps from where begin() says, until the last one or until asked[0] holds a signal."""
        s = self.settings
        start = self.begin()
        if start is None:
            last = last_record(self.out / "metrics.jsonl")
            self.say(f"{self.out} is finished: {json.dumps(last)}")
            return last
        count = sum(weight.numel() for weight in self.policy.parameters())
        self.say(f"{s.recipe}: {count:,} parameters, {len(self.data):,} rows, {self.steps} steps of {s.batch_size}, "
                 f"{str(self.dtype).removeprefix('torch.')} on {self.ranks.size} × {self.ranks.device}")
        if self.data.online:
            self.stop_ids, self.allowed = sample.stopping(self.tokenizer, self.data.limits["chat"], self.policy.config)
        line = cli.StepLine(self.steps, s.recipe, enabled=self.ranks.rank == 0)
        line.resume_at(start)
        metrics = {}
        for step in range(start, self.steps):
            metrics = self.update(step)
            last = step + 1 == self.steps
            if last or s.eval_every and (step + 1) % s.eval_every == 0:
                metrics |= self.evaluate()
            if self.ranks.rank == 0:
                with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps({k: rounded(v) for k, v in metrics.items()}) + "\n")
            line.update(step + 1, summary(metrics))
            signal_number = self.ranks.largest(asked[0])         # ranks hear of it at different times: stop together
            if last or signal_number or s.save_every and (step + 1) % s.save_every == 0:
                self.save_checkpoint(step + 1)
            if signal_number and not last:
                self.say(f"\n{signal.Signals(signal_number).name}: stopped after step {step + 1} of {self.steps} and saved; "
                         f"the same command goes on from there.")
                sys.exit(128 + signal_number)
        self.save_final()
        self.say(f"{s.recipe}: written to {self.out / 'final'}")
        return metrics


@contextlib.contextmanager
def asked_to_stop():
    """A list whose one element is 0, or the signal that asked this process to stop. A second Ctrl-C stops at once."""
    asked = [0]

    def note(number, frame):
        asked[0] = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_with(parent):
    """End this process when `parent`, the torchrun that started it, is gone: an orphan must not go on writing to out_dir."""
    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


class Log:
    """Sums and counts of one step's metrics, per example, over micro-batches and ranks."""

    def __init__(self, ranks):
        self.ranks, self.sums, self.counts, self.totals = ranks, {}, {}, {}

    def add(self, name, values, weight=None):
        """Per-example values of any shape; their mean is over `weight`, by default their number."""
        weight = values.numel() if weight is None else weight
        self.sums[name] = self.sums.get(name, 0.0) + float(values.detach().cpu().double().sum())
        self.counts[name] = self.counts.get(name, 0) + weight

    def value(self, name, number):
        """A figure of this rank; the mean over the ranks is reported."""
        self.sums[name], self.counts[name] = number, 1

    def count(self, name, number):
        """A total over the ranks, kept in `totals`."""
        self.totals[name] = self.totals.get(name, 0) + number

    def means(self):
        """{name: mean over the global batch}; also makes `totals` global. A rank without examples knows no names, so they
        come from METRICS."""
        flat = self.ranks.sum([self.sums.get(name, 0.0) for name in METRICS] + [self.counts.get(name, 0) for name in METRICS] +
                              [self.totals.get("tokens", 0)])
        self.totals["tokens"] = flat[-1]
        return {name: total / count for name, total, count in zip(METRICS, flat, flat[len(METRICS):]) if count}


METRICS = ("loss margin refined_margin accuracy augmented_accuracy kl p p_hat chosen_logp rejected_logp response_length "
           "finished judge_cut prompt_cut sample_seconds judge_seconds update_seconds").split()


def records(path):
    """[(line, its object)] of a jsonl file, up to the first line that a crash left torn or that is no step's."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []:
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, KeyError, TypeError):
            break
        found.append((line, record))
    return found


def last_record(path):
    found = records(path)
    return found[-1][1] if found else None


def keep_records(path, step):
    """Drop what was written after `step`: it will be made again."""
    if path.exists():
        aside = path.with_name(f".writing-{path.name}")
        aside.write_text("".join(line for line, record in records(path) if record["step"] <= step), encoding="utf-8")
        os.replace(aside, path)


def digest(*paths, sampled=False):
    """SHA-256 of the files' contents, in 32 letters; sampled: of their sizes and 64 pieces of each, for files of many GB."""
    total, piece = hashlib.sha256(), 1 << 16
    for path in paths:
        with open(path, "rb") as file:
            size = os.path.getsize(path)
            total.update(str(size).encode())
            step = max(size // 64, piece) if sampled else piece
            for place in range(0, size, step):
                file.seek(place)
                total.update(file.read(piece))
    return total.hexdigest()[:32]


def rounded(value):
    """Floats with eight significant digits: enough to compare float32 runs, short enough to read."""
    return float(f"{value:.8g}") if isinstance(value, float) else value


def summary(metrics):
    """The few figures of a step that a person watches."""
    shown = ("loss", "margin", "refined_margin", "accuracy", "augmented_accuracy", "p", "p_hat", "kl", "response_length",
             "eval_loss", "eval_accuracy")
    return "  ".join(f"{name} {metrics[name]:.4g}" for name in shown if name in metrics)


def versions():
    return {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}


def commit():
    """The commit of the source, where it is a git checkout; else None."""
    try:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True,
                              timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def main(settings):
    """Train on what was named, or run the toy world's whole path where no model was."""
    for name in ("model", "reference", "judge", "out_dir"):
        if getattr(settings, name) == "":
            raise InputError(f"--{name}= is empty.")
    settings.check_used()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        leave_with(os.getppid())
    if settings.model is None:         # an empty one is a mistake (an unset shell variable), not a wish for toys
        for name in ("data", "prompts", "eval_data", "reference", "judge"):
            if getattr(settings, name):
                raise InputError(f"--{name} needs a model: --model=DIR. Without one, train.py runs on its own toy world.")
        import toy
        return toy.main(settings)
    return Trainer(settings).run()


if __name__ == "__main__":
    cli.run(main, Settings)
    if dist.is_initialized():
        dist.destroy_process_group()
