"""What a run needs of memory on each rank, about, from config.json and the safetensors headers alone.

    python train.py --recipe=dpo --model=DIR --dry_run                            this machine
    WORLD_SIZE=8 python train.py --recipe=dpo --model=DIR --dry_run --device_memory=80

The sum of the large terms for rows at full length: max_prompt_length for the prompt, the rest for responses.
Measured on a CPU, a run takes 0.8 to 1.2 times as much as is said here. What is refused is clearly too large.

Letters: N tokens of a micro-batch's forest, c and m bytes of a number in the compute type and of a master.
"""
import copy
import os
from dataclasses import dataclass

import torch

from support.cli import InputError
from support.ranks import check_replicas, pick_device, pick_dtype

HEAD_CHUNK = 512               # tokens whose logits stand in memory at a time, as losses.py has it
FOREST_TOKENS = 16384          # tokens that the judge reads at a time, as judge.py has it
QUERY_BLOCK = 256              # tokens that attention reads at a time, as forest.py has it
P_TOKENS = 64                  # of the refinement prompt, which is some forty words
LIBRARIES = 100 << 20          # bytes that are first loaded in a step or a save
HOLES = 0.25                   # of what comes and goes: room that the next step's tensors do not fit into
GIB = 2 ** 30


@dataclass(frozen=True)
class Shape:
    """What a network's memory follows from: numbers of parameters, and numbers per token."""
    whole: int                     # parameters in all
    block: int                     # parameters of a block
    layers: int
    flow: int                      # in and out of a block's linear layers; adapters have rank times as many
    kv: int                        # keys and values of one layer
    width: int
    vocab: int
    context: int                   # tokens that the model was trained for

    @classmethod
    def of(cls, net):
        """Of a Transformer, with memory or without."""
        config, block = net.config, list(net.blocks[0].parameters())
        return cls(whole=sum(weight.numel() for weight in net.parameters()),
                   block=sum(weight.numel() for weight in block), layers=config.layers,
                   flow=sum(sum(weight.shape) for weight in block if weight.dim() == 2),
                   kv=2 * config.kv_heads * config.head_dim, width=config.width, vocab=config.vocab_size,
                   context=config.context)

    def kept(self, length):
        """Numbers per token that a block keeps for its gradient, in sequences of `length` tokens.

        A linear layer keeps its input, what follows its output; norms and products a tenth more. Attention
        gathers keys and values: for each block of queries its own and half of the length on average.
        """
        return 1.1 * self.flow + self.kv * (0.5 + length / 2 / QUERY_BLOCK)


@dataclass(frozen=True)
class Job:
    """A run's sizes in tokens, bytes and parameters; its methods say {what for: bytes on a rank}."""
    policy: Shape
    judge: Shape | None            # where there is one
    adapters: int                  # parameters; 0: all weights are trained
    frozen: int                    # parameters of reference and judge, those of one folder once
    gathered: int                  # parameters of what samples and judges
    online: bool
    micro: int                     # prompts that a rank trains on at a time
    responses: int                 # trained on after each
    prompts: int                   # that a rank samples from in a step
    samples: int                   # of each
    prompt_length: int
    response_length: int
    c: int
    m: int
    states: int                    # that the optimizer keeps for each trained number
    recompute: bool
    ranks: int
    shards: int                    # ranks that share one copy of the weights

    @property
    def trained(self):
        return self.adapters or self.policy.whole

    def stays(self):
        """All the time: weights, the optimizer's state, and the frozen networks."""
        whole = self.policy.whole
        weights = whole * self.c + self.adapters * self.m if self.adapters else whole * self.m
        return {"weights": weights / self.shards,
                "optimizer": self.states * self.trained * self.m / self.shards,
                "reference and judge": self.frozen * self.c / self.shards}

    def phases(self):
        """{phase: what comes and goes in it}"""
        phases = {"update": self.update()}
        if self.online:
            phases["sampling"] = self.sampling()
        if self.judge is not None:
            phases["judging"] = self.judging()
        for sizes in phases.values():
            sizes["holes"] = HOLES * sum(sizes.values())
        return phases

    def update(self):
        """The forward and backward pass of a micro-batch."""
        policy, c, m = self.policy, self.c, self.m
        N = self.micro * (self.prompt_length + self.responses * self.response_length)
        block = policy.kept(self.prompt_length + self.response_length)
        # With recomputation blocks keep their input, one at a time all of it. Half as much goes backwards.
        kept = policy.layers * policy.width + 1.5 * block if self.recompute else (policy.layers + 0.5) * block
        logits = min(self.micro * self.responses * self.response_length, HEAD_CHUNK) * policy.vocab
        sizes = {"gradients": self.trained * m / self.shards, "activations": kept * N * c,
                 "logits": logits * (12 + c * (c < 4))}       # and their softmax and its gradient, in float32
        if not self.adapters:              # of the embedding and the head, before they are added up
            sizes["largest gradients"] = 2 * policy.vocab * policy.width * m
        if self.ranks > 1:                 # embedding, head, two blocks at a time: a buffer and the weights
            root = policy.whole - policy.layers * policy.block
            sizes["gathered"] = 2 * (2 * policy.block + root) * c
            if not self.adapters:          # and their gradients before they are scattered
                sizes["gathered"] += (policy.block + root) * (c + 4)
        elif c < m and not self.adapters:
            sizes["cast weights"] = policy.whole * c
        return sizes

    def sampling(self):
        """As many prompts at a time as train.py takes: their cache takes as much as the weights, or 1 GiB."""
        tokens = self.prompt_length + self.samples * self.response_length
        cache = self.policy.layers * self.policy.kv * self.c
        most = max(self.policy.whole * self.c, GIB)
        prompts = min(self.prompts, max(int(most // (tokens * cache)), 1))
        return {"gathered": self.gathered * self.c if self.ranks > 1 else 0,
                "cache": prompts * (tokens + self.prompt_length) * cache,    # prompts are laid out once more
                "logits": prompts * self.samples * self.policy.vocab * 16}   # sorted, probabilities, sums

    def judging(self):
        """The judge's forward pass over instructions, and its cache."""
        tokens = self.prompts * 2 * self.samples * (self.prompt_length + self.response_length + P_TOKENS)
        tokens = min(FOREST_TOKENS, tokens)
        return {"gathered": self.gathered * self.c if self.ranks > 1 else 0,
                "cache": 2 * tokens * self.judge.layers * self.judge.kv * self.c,
                "activations": tokens * self.judge.flow * self.c}

    def peak(self):
        """(bytes at the worst time, how many of them are holes, the name of that phase)."""
        phases = self.phases()
        worst = max(phases, key=lambda name: sum(phases[name].values()))
        total = sum(self.stays().values()) + sum(phases[worst].values()) + LIBRARIES
        return total, phases[worst]["holes"], worst


def job_of(s, shapes, compute, ranks):
    """The Job of train.py's settings `s`; shapes: {folder: Shape} of s.folders()."""
    recipe, policy = s.recipes[s.recipe], shapes[s.model]
    length, prompt, response = s.lengths(policy.context, P_TOKENS if recipe.is_refined else 0, 1)
    if not recipe.online:
        response = length - min(prompt, length - 1)
    prompts = -(-s.batch_size // ranks)
    masters = torch.float64 if compute == torch.float64 else torch.float32
    reference, judge = s.frozen_folders()
    trained = s.model if s.lora_rank else ""      # the base under adapters is reference and judge, too
    sampler = reference if recipe.responses in ("reference", "rso") else trained if recipe.online else None
    sizes = {None: 0, "": policy.whole} | {folder: shape.whole for folder, shape in shapes.items()}
    frozen = {None if s.reference_cache else reference, judge} - {trained}
    return Job(
        policy=policy, judge=shapes.get(judge), adapters=s.lora_rank * policy.layers * policy.flow,
        frozen=sum(map(sizes.get, frozen)), gathered=sum(map(sizes.get, {sampler, judge})),
        online=recipe.online, micro=min(s.micro_batch_size, prompts), prompts=prompts,
        responses=recipe.examples_per_prompt(s.k) * (1 if recipe.loss == "sft" else 2),
        samples=(s.candidates or s.k) if recipe.online else 1, prompt_length=min(prompt, length - response),
        response_length=response, c=compute.itemsize, m=masters.itemsize,
        states=1 if s.optimizer == "rmsprop" else 2, recompute=s.checkpoint_activations, ranks=ranks,
        shards=ranks // s.replicas)


# From the cheapest to what changes the training.
REMEDIES = [
    {"micro_batch_size": 1},
    {"micro_batch_size": 1, "checkpoint_activations": True},
    {"lora_rank": 64},
    {"lora_rank": 64, "micro_batch_size": 1},
    {"lora_rank": 64, "micro_batch_size": 1, "checkpoint_activations": True}]


def remedy(s, fits):
    """What to change so that it fits; fits: changed settings -> bool."""
    for change in REMEDIES:
        if "lora_rank" in change and (s.lora_rank or (s.iterations or 1) > 1):
            continue
        other = copy.copy(s)
        vars(other).update(change)
        if fits(other):
            return "this would fit: " + " ".join(f"--{name}={value}" for name, value in change.items())
    return "more ranks, shorter texts or a smaller model are needed"


def dry_run(s, network):
    """Print about what a rank needs, of as many as WORLD_SIZE or torchrun says; reads no weights.

    s: train.py's settings; network(folder): a network without memory.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if s.model is None:
        raise InputError("--dry_run needs a model: --model=DIR.")
    if not world.isdigit() or int(world) < 1:
        raise InputError(f"WORLD_SIZE={world}: a number of processes.")
    ranks = int(world)
    check_replicas(s.replicas, ranks)
    if s.device_memory is not None:                   # another machine's
        device, available = "cpu" if s.device == "cpu" else "cuda", s.device_memory * GIB
    else:
        device = pick_device(s.device).split(":")[0]
        here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        available = (torch.cuda.get_device_properties(0).total_memory if device == "cuda" else
                     os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / here)
    compute = torch.bfloat16 if s.dtype == "auto" and device == "cuda" else pick_dtype(s.dtype, device)
    shapes = {folder: Shape.of(network(folder)) for folder in s.folders()}
    if int(os.environ.get("RANK", "0")) == 0:
        report(s, shapes, compute, ranks, device, available)


def report(s, shapes, compute, ranks, device, available):
    """Print the estimate; InputError where it clearly does not fit into `available` bytes."""
    job = job_of(s, shapes, compute, ranks)
    most, holes, worst = job.peak()
    adapters = f" and {job.adapters:,} of adapters" if job.adapters else ""
    replicas = f", {s.replicas} replicas" if s.replicas > 1 else ""
    print(f"{s.model}: {job.policy.whole:,} parameters{adapters}; "
          f"{s.recipe} in {str(compute)[6:]} on {ranks} × {device}{replicas}")
    print(f"{job.micro} × ({job.prompt_length} + {job.responses} × {job.response_length}) tokens at a time\n")
    print("GiB per rank, about")
    for name, size in job.stays().items():
        if size:
            print(f"  {name:<24}{size / GIB:8.2f}")
    for phase, sizes in job.phases().items():
        terms = ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items() if size)
        print(f"  {phase + ', for a while':<24}{sum(sizes.values()) / GIB:8.2f}   {terms}")
    print(f"  {'the most, in ' + worst:<24}{most / GIB:8.2f}   "
          f"of {available / GIB:.1f}, the program itself not counted")
    if most > available:
        advice = remedy(s, lambda other: job_of(other, shapes, compute, ranks).peak()[0] <= available)
        if most - holes > available:
            raise InputError(f"{s.recipe} of {s.model} needs about {most / GIB:.1f} GiB per rank and there "
                             f"are {available / GIB:.1f}; {advice}.")
        print(f"It may not fit; {advice}.")
