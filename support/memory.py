"""What a run needs of memory on each rank, about, from config.json and the safetensors headers alone.

    python train.py --recipe=dpo --model=DIR --dry_run                            this machine
    WORLD_SIZE=8 python train.py --recipe=dpo --model=DIR --dry_run --device_memory=80

The sum of the large terms for rows at full length: max_prompt_length for the prompt, the rest for responses.
Measured on a CPU, a run takes 0.8 to 1.2 times as much as is said here. What is refused is clearly too large.

Letters: N tokens of a micro-batch's forest, c and m bytes of a number in the compute type and of a master.
"""
import copy
import os

import torch

from support.cli import InputError, environment
from support.ranks import check_replicas, pick_device, pick_dtype

HEAD_CHUNK = 512               # tokens whose logits stand in memory at a time, as losses.py has it
FOREST_TOKENS = 16384          # tokens that the judge reads at a time, as judge.py has it
QUERY_BLOCK = 256              # tokens that attention reads at a time, as forest.py has it
P_TOKENS = 64                  # of the refinement prompt, which is some forty words
MICRO_BATCH_SIZE = 8           # the default
LIBRARIES = 100 << 20          # bytes that are first loaded in a step or a save
HOLES = 0.25                   # of what comes and goes: room that the next step's tensors do not fit into
SURE = 1.2                     # times what is there: more than that is refused
GIB = 2 ** 30


class Shape:
    """What a Transformer's memory follows from; the network itself need not have any."""

    def __init__(self, net):
        block = list(net.blocks[0].parameters())
        self.whole = sum(weight.numel() for weight in net.parameters())
        self.block = sum(weight.numel() for weight in block)             # parameters of a block
        # In and out of a block's linear layers; adapters have rank times as many parameters.
        self.flow = sum(sum(weight.shape) for weight in block if weight.dim() == 2)
        self.layers, self.width = net.config.layers, net.config.width
        self.kv = 2 * net.config.kv_heads * net.config.head_dim          # keys and values of one layer
        self.vocab, self.context = net.config.vocab_size, net.config.context

    def kept(self, length):
        """Numbers per token that a block keeps for its gradient, in sequences of `length` tokens.

        A linear layer keeps its input, what follows its output; norms and products a tenth more. Attention
        gathers keys and values: for each block of queries its own and half of the length on average.
        """
        return 1.1 * self.flow + self.kv * (0.5 + length / 2 / QUERY_BLOCK)


class Job:
    """A run's sizes in tokens, bytes and parameters; its methods say {what for: bytes on a rank}."""

    def __init__(self, s, shapes, compute, ranks):
        """s: train.py's settings; shapes: {folder: Shape} of s.folders()."""
        recipe, policy = s.recipes[s.recipe], shapes[s.model]
        self.s, self.online, self.policy = s, recipe.online, policy
        self.ranks, self.shards = ranks, ranks // s.replicas             # which share a copy of the weights
        self.c = compute.itemsize
        self.m = 8 if compute == torch.float64 else 4

        length, prompt, response = s.lengths(policy.context, P_TOKENS if recipe.is_refined else 0, 1)
        self.response = response if recipe.online else length - min(prompt, length - 1)
        self.prompt = min(prompt, length - self.response)
        self.prompts = -(-s.batch_size // ranks)                         # that a rank samples from in a step
        self.samples = (s.candidates or s.k) if recipe.online else 1     # of each
        self.micro = min(s.micro_batch_size or MICRO_BATCH_SIZE, self.prompts)
        self.responses = recipe.examples_per_prompt(s.k) * (1 if recipe.loss == "sft" else 2)

        self.adapters = s.lora_rank * policy.layers * policy.flow        # parameters; 0: all are trained
        reference, judge = s.frozen_folders()
        self.judge = shapes.get(judge)
        trained = s.model if s.lora_rank else ""      # the base under adapters is reference and judge, too
        sampler = {"dataset": None, "policy": trained}.get(recipe.responses, reference)
        sizes = {None: 0, "": policy.whole} | {folder: shape.whole for folder, shape in shapes.items()}
        frozen = {None if s.reference_cache else reference, judge} - {trained}
        self.frozen = sum(map(sizes.get, frozen))                        # parameters, of one folder once
        self.gathered = sum(map(sizes.get, {sampler, judge})) if ranks > 1 else 0     # to sample and to judge

    def stays(self):
        """All the time: weights, the optimizer's state, and the frozen networks."""
        whole, states = self.policy.whole, 1 if self.s.optimizer == "rmsprop" else 2
        weights = whole * self.c + self.adapters * self.m if self.adapters else whole * self.m
        return {"weights": weights / self.shards,
                "optimizer": states * (self.adapters or whole) * self.m / self.shards,
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
        N = self.micro * (self.prompt + self.responses * self.response)
        block, layers = policy.kept(self.prompt + self.response), policy.layers
        # With recomputation blocks keep their input, one at a time all of it. Half as much goes backwards.
        kept = (layers + 0.5) * block
        if self.s.checkpoint_activations:
            kept = layers * policy.width + 1.5 * block
        logits = min(self.micro * self.responses * self.response, HEAD_CHUNK) * policy.vocab
        sizes = {"gradients": (self.adapters or policy.whole) * m / self.shards, "activations": kept * N * c,
                 "logits": logits * (12 + c * (c < 4))}       # and their softmax and its gradient, in float32
        if not self.adapters:              # of the embedding and the head, before they are added up
            sizes["largest gradients"] = 2 * policy.vocab * policy.width * m
        if self.ranks > 1:                 # embedding, head, two blocks at a time: a buffer and the weights
            root = policy.whole - layers * policy.block
            sizes["gathered"] = 2 * (2 * policy.block + root) * c
            if not self.adapters:          # and their gradients before they are scattered
                sizes["gathered"] += (policy.block + root) * (c + 4)
        elif c < m and not self.adapters:
            sizes["cast weights"] = policy.whole * c
        return sizes

    def sampling(self):
        """The cache and the logits of as many prompts as are sampled together."""
        tokens = self.prompt + self.samples * self.response
        cache = self.policy.layers * self.policy.kv * self.c
        prompts = min(self.prompts, prompts_at_a_time(self.policy, self.c, tokens))
        return {"gathered": self.gathered * self.c,
                "cache": prompts * (tokens + self.prompt) * cache,           # prompts are laid out once more
                "logits": prompts * self.samples * self.policy.vocab * 16}   # sorted, probabilities, sums

    def judging(self):
        """The judge's forward pass over instructions, and its cache."""
        asked = self.prompts * 2 * self.samples
        tokens = min(FOREST_TOKENS, asked * (self.prompt + self.response + P_TOKENS))
        return {"gathered": self.gathered * self.c,
                "cache": 2 * tokens * self.judge.layers * self.judge.kv * self.c,
                "activations": tokens * self.judge.flow * self.c}

    def peak(self):
        """(bytes at the worst time, the name of that phase)."""
        sums = {phase: sum(sizes.values()) for phase, sizes in self.phases().items()}
        worst = max(sums, key=sums.get)
        return sum(self.stays().values()) + sums[worst] + LIBRARIES, worst


def prompts_at_a_time(shape, itemsize, tokens):
    """How many prompts of so many tokens, samples included, are sampled together: the more, the less often
    the weights are read for one token per row. Their cache may take as much as the weights, or 1 GiB."""
    return max(max(itemsize * shape.whole, GIB) // (itemsize * tokens * shape.layers * shape.kv), 1)


# From the cheapest to what changes the training.
REMEDIES = [
    {"micro_batch_size": 1},
    {"micro_batch_size": 1, "checkpoint_activations": True},
    {"lora_rank": 64},
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
    if s.model is None:
        raise InputError("--dry_run needs a model: --model=DIR.")
    ranks, device, available, compute = machine(s)
    check_replicas(s.replicas, ranks)
    if s.micro_batch_size is None:
        s.micro_batch_size = micro_batch_size(s, network)
    shapes = {folder: Shape(network(folder)) for folder in s.folders()}
    if environment("RANK", 0) == 0:
        report(s, shapes, compute, ranks, device, available)


def machine(s):
    """(number of ranks, kind of device, bytes that each has, type of the computation)."""
    ranks = environment("WORLD_SIZE", 1, least=1)
    if s.device_memory is not None:                   # another machine's
        device, available = "cpu" if s.device == "cpu" else "cuda", s.device_memory * GIB
    else:
        device = pick_device(s.device).split(":")[0]
        here = environment("LOCAL_WORLD_SIZE", ranks, least=1)
        available = (torch.cuda.get_device_properties(0).total_memory if device == "cuda" else
                     os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / here)
    compute = torch.bfloat16 if s.dtype == "auto" and device == "cuda" else pick_dtype(s.dtype, device)
    return ranks, device, available, compute


def micro_batch_size(s, network):
    """The default, halved until the estimate fits: how a batch is split changes no result."""
    ranks, _, available, compute = machine(s)
    shapes = {folder: Shape(network(folder)) for folder in s.folders()}
    other, size = copy.copy(s), MICRO_BATCH_SIZE
    while size > 1:
        other.micro_batch_size = size
        if Job(other, shapes, compute, ranks).peak()[0] <= available:
            break
        size //= 2
    return size


def report(s, shapes, compute, ranks, device, available):
    """Print the estimate; InputError where it clearly does not fit into `available` bytes."""
    job = Job(s, shapes, compute, ranks)
    most, worst = job.peak()
    adapters = f" and {job.adapters:,} of adapters" if job.adapters else ""
    replicas = f", {s.replicas} replicas" if s.replicas > 1 else ""
    print(f"{s.model}: {job.policy.whole:,} parameters{adapters}; "
          f"{s.recipe} in {str(compute)[6:]} on {ranks} × {device}{replicas}")
    print(f"{job.micro} × ({job.prompt} + {job.responses} × {job.response}) tokens at a time\n")
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
        advice = remedy(s, lambda other: Job(other, shapes, compute, ranks).peak()[0] <= available)
        if most > SURE * available:
            raise InputError(f"{s.recipe} of {s.model} needs about {most / GIB:.1f} GiB per rank and there "
                             f"are {available / GIB:.1f}; {advice}.")
        print(f"It may not fit; {advice}.")
