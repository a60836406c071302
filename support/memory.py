"""What a run needs of memory on each rank, from config.json and the safetensors headers alone, before it costs money.

    python train.py --recipe=dpo --model=DIR --dry_run                            this machine
    WORLD_SIZE=8 python train.py --recipe=dpo --model=DIR --dry_run --device_memory=80

Every term below is one line of arithmetic with its reason beside it, so that it also says where memory goes and what a
setting would save. It is an estimate for rows at full length: prompts of max_prompt_length and responses that fill the rest.

Letters: S ranks that share one copy of the weights, N tokens of a micro-batch's forest, c and m bytes of a number in the
compute type and of a master.
"""
import copy
from dataclasses import dataclass

import torch

import data
import judge
import losses
import model
from support import checkpoint
from support.cli import InputError

P_TOKENS = 64                  # of the refinement prompt, which is some forty words
LIBRARIES = 100 << 20          # bytes that are first loaded in a step or a save
# What comes and goes leaves holes that the next step's tensors do not fit into, as a share of it. Fitted to what was measured
# on a CPU, where cli.keep_freed_memory gives nothing back, and half of the gradients' place is lost too; CUDA's is a guess.
HOLES = {"cpu": 0.2, "cpu, sharded": 0.35, "cpu, adapters": 0.5, "cuda": 0.1}


@dataclass
class Shape:
    """What a network's memory follows from: parameters in all, of a block, outside of the blocks, and of adapters."""
    config: model.Config
    whole: int
    block: int
    root: int
    adapters: int

    @classmethod
    def of(cls, folder, rank=0):
        """From the config and the headers of a model folder; InputError where they disagree."""
        net = model.blank(folder)
        config = net.config
        model.match_weights(config, folder, {name: weight.shape for name, weight in net.named_parameters()})
        whole, block = count(net), count(net.blocks[0])
        if rank:
            model.add_adapters(net, rank, 1, torch.float32)
        return cls(config, whole, block, whole - config.layers * block, count(net) - whole)

    def saved_numbers(self, compute, gathered):
        """Numbers a token that a block keeps for its gradient, where a linear layer keeps its input and a product both
        factors; gathered: keys that attention gathers for each token, see keys_gathered."""
        c = self.config
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        if c.is_neox:
            norms = (3 if c.parallel_residual else 4) * c.width      # both inputs, which may be one, and both outputs
        else:
            norms = 2 * (3 if compute.itemsize > 2 else 4) * c.width     # input (in float32), quotient, output
        attention = 3 * q + gathered * 2 * kv                        # q and the answer in two layouts; keys and values
        mlp = (2 if c.is_neox else 4) * c.ffn                        # before and behind the activation; the product's factors
        return norms + attention + mlp

    def cache_numbers(self):
        """Numbers a token in the cache of keys and values."""
        return 2 * self.config.layers * self.config.kv_heads * self.config.head_dim


def keys_gathered(job):
    """Keys that ForestAttention lays side by side for each token of a prompt with its responses."""
    x, y = job.prompt_length, job.response_length
    forest = data.pack([list(range(x)) + [-1 - i] * y for i in range(job.responses)])
    attention = model.ForestAttention(forest.depth, forest.end, None, "cpu")
    return sum(attention.sizes) / len(forest.tokens)


def count(net):
    return sum(weight.numel() for weight in net.parameters())


@dataclass
class Job:
    """A run's needs that are not the model's: everything in tokens and bytes."""
    online: bool
    off_policy: bool               # samples are the reference's
    cached: bool                   # what the reference says is read from --reference_cache
    micro: int                     # prompts that a rank trains on at a time
    responses: int                 # trained on behind each: 1 (sft), 2 (a pair), the K of an online recipe that are in a pair
    prompts: int                   # that a rank samples from in a step
    k: int                         # samples of each
    prompt_length: int
    response_length: int
    compute: torch.dtype
    masters: torch.dtype
    optimizer: str
    recompute: bool


def update_needs(policy, job, gradients, sharded):
    """{name: bytes} of what comes and goes in a micro-batch's forward and backward pass; gradients: bytes of a rank's."""
    config, lora, c, m = policy.config, policy.adapters > 0, job.compute.itemsize, job.masters.itemsize
    N = job.micro * (job.prompt_length + job.responses * job.response_length)
    logits = min(job.micro * job.responses * job.response_length, losses.HEAD_CHUNK) * config.vocab_size
    per_block = policy.saved_numbers(job.compute, keys_gathered(job))
    # With recomputation each block keeps its input, and one block at a time keeps everything.
    kept = config.layers * config.width + per_block if job.recompute else config.layers * per_block
    update = {
        "gradients": gradients,
        "activations": kept * N * c,
        "logits": logits * (4 + 4 + 4 + c * (c < 4)),             # themselves, their softmax, its gradient
        # gradients on their way through an MLP, and the largest weight's before it is added to what stands there
        "backward": 4 * max(config.ffn, config.width) * N * c + 2 * config.vocab_size * config.width * m * (not lora),
    }
    if sharded:       # two blocks at a time, the root all along: a buffer and the weights that are copied from it; gradients
        update["gathered"] = 2 * (2 * policy.block + policy.root) * c + (policy.block + policy.root) * (c + 4) * (not lora)
    elif c < m and not lora:
        update["cast weights"] = policy.whole * c                 # float32 masters in the compute type
    return update


def parts(policy, reference, judge_shape, job, ranks, replicas, device):
    """{name: bytes} of what stands in memory all the time, and {phase: {name: bytes}} of what comes and goes.

    reference, judge_shape: the Shapes of these networks or None; the policy's own where they are the policy without its
    adapters, and one and the same where they are one network.
    """
    config, S = policy.config, ranks // replicas
    c, m = job.compute.itemsize, job.masters.itemsize
    lora, sharded = policy.adapters > 0, ranks > 1
    trained = policy.adapters if lora else policy.whole
    states = {"adam": 2, "adamw": 2, "rmsprop": 1}[job.optimizer]

    def together(*shapes):                 # parameters of some networks, each counted once
        return sum(shape.whole for shape in {id(shape): shape for shape in shapes if shape is not None}.values())
    frozen = (together(policy, None if job.cached else reference, judge_shape) - policy.whole) * c / S
    stays = {
        "weights": (policy.whole * c + policy.adapters * m if lora else policy.whole * m) / S,
        "optimizer": states * trained * m / S,
        "reference and judge": frozen,
    }

    tensor = config.vocab_size * config.width                         # numbers of the largest weight
    x, y = job.prompt_length, job.response_length
    phases = {"update": update_needs(policy, job, trained * m / S, sharded)}
    if job.cached:          # before the first step of the first such run
        N = job.micro * (x + job.responses * y)
        phases["filling the cache"] = {"reference": (together(policy, reference, judge_shape) - policy.whole) * c / S - frozen,
                                       "activations": 2 * config.ffn * N * c}
    if job.online:
        gathered = together(reference if job.off_policy else policy, judge_shape) * c if sharded else 0
        copy = policy.whole * c if not (sharded or lora or job.off_policy) and c < m else 0
        most = max(policy.whole * c, 1 << 30)                     # as Trainer.prompts_at_a_time has it
        at_a_time = min(job.prompts, max(int(most // ((x + job.k * y) * policy.cache_numbers() * c)), 1))
        phases["sampling"] = {
            "gathered": gathered, "cast weights": copy,
            "cache": at_a_time * (2 * x + job.k * y) * policy.cache_numbers() * c,      # a prompt's is laid out once more
            "logits": at_a_time * job.k * config.vocab_size * 4 * 4,      # themselves, sorted, probabilities, their sums
        }
    if judge_shape is not None:
        questions = job.prompts * 2 * (job.k if job.online else 1)
        tokens = min(judge.FOREST_TOKENS, questions * (x + y + P_TOKENS))
        gathered = together(reference if job.off_policy else policy if job.online else None, judge_shape) * c if sharded else 0
        phases["judging"] = {"gathered": gathered, "cache": 2 * tokens * judge_shape.cache_numbers() * c,
                             "activations": tokens * (3 * judge_shape.config.ffn + 6 * judge_shape.config.width) * c}
    own = stays["weights"] if not lora else policy.adapters * m / S
    state = own + stays["optimizer"]
    phases["saving"] = {"two copies of a file": 2 * min(state, checkpoint.FILE_BYTES) if device == "cpu" else 0}
    merged = policy.whole * (c if lora else m)
    phases["final"] = {"gathered": tensor * (c if lora else m) if sharded else 0,
                       "two copies of a file": 2 * min(merged, model.SHARD_BYTES) if device == "cpu" else 0}
    where = "cuda" if device == "cuda" else "cpu, adapters" if lora else "cpu, sharded" if sharded else "cpu"
    for sizes in phases.values():
        sizes["holes"] = HOLES[where] * sum(sizes.values()) + 0.5 * (device == "cpu") * sizes.get("gradients", 0)
    return stays, phases


def peak(stays, phases):
    """(bytes, phase) of the most memory at a time."""
    worst = max(phases, key=lambda name: sum(phases[name].values()))
    return sum(stays.values()) + sum(phases[worst].values()) + LIBRARIES, worst


def job_of(s, compute, context, ranks):
    """The Job of train.Settings `s`."""
    recipe = s.recipes[s.recipe]
    length, prompt, response = s.lengths(context, P_TOKENS if recipe.loss.startswith("sr-") else 0, 1)
    if not recipe.online:
        response = length - min(prompt, length - 1)
    prompts = -(-s.batch_size // ranks)
    return Job(online=recipe.online, off_policy=recipe.responses in ("reference", "rso"), cached=bool(s.reference_cache),
               micro=min(s.micro_batch_size, prompts),
               responses=recipe.pairs_a_prompt(s.k) * (1 if recipe.loss == "sft" else 2), prompts=prompts,
               k=s.candidates or s.k or 1, prompt_length=min(prompt, length - response), response_length=response,
               compute=compute, masters=torch.float64 if compute == torch.float64 else torch.float32, optimizer=s.optimizer,
               recompute=s.checkpoint_activations)


def estimate(s, compute, ranks, device):
    """(Shape of the policy, Job, stays, phases) of train.Settings; see `parts`."""
    policy = Shape.of(s.model, s.lora_rank)
    shapes = {s.model: policy} if s.lora_rank else {}          # the base under the adapters is the reference and the judge
    for folder in filter(None, s.frozen_folders()):
        shapes.setdefault(folder, Shape.of(folder))
    job = job_of(s, compute, policy.config.context, ranks)
    return policy, job, *parts(policy, *map(shapes.get, s.frozen_folders()), job, ranks, s.replicas, device)


def dry_run(s, compute, ranks, device, available):
    """Print the estimate; InputError where it does not fit into `available` bytes a rank."""
    policy, job, stays, phases = estimate(s, compute, ranks, device)
    most, worst = peak(stays, phases)
    gib = 2 ** 30
    print(f"{s.model}: {policy.whole:,} parameters" + (f" and {policy.adapters:,} of adapters" if policy.adapters else "") +
          f"; {s.recipe} in {str(compute).removeprefix('torch.')} on {ranks} × {device}" +
          (f", {s.replicas} replicas" if s.replicas > 1 else ""))
    print(f"{job.micro} × ({job.prompt_length} + {job.responses} × {job.response_length}) tokens at a time\n\nGiB a rank")
    for name, size in stays.items():
        if not size:
            continue
        print(f"  {name:<24}{size / gib:8.2f}")
    for phase, sizes in phases.items():
        if not sum(sizes.values()):
            continue
        print(f"  {phase + ', for a while':<24}{sum(sizes.values()) / gib:8.2f}   " +
              ", ".join(f"{name} {size / gib:.2f}" for name, size in sizes.items() if size))
    print(f"  {'the most, in ' + worst:<24}{most / gib:8.2f}   of {available / gib:.1f}, the program itself not counted")
    if most > available:
        for change in REMEDIES:
            if "lora_rank" in change and (s.lora_rank or (s.iterations or 1) > 1):
                continue
            if peak(*estimate(changed(s, **change), compute, ranks, device)[2:])[0] <= available:
                remedy = "this would fit: " + " ".join(f"--{name}={value}" for name, value in change.items())
                break
        else:
            remedy = "more ranks, shorter texts or a smaller model are needed"
        raise InputError(f"{s.recipe} of {s.model} needs {most / gib:.1f} GiB a rank and there are {available / gib:.1f}; {remedy}.")


# From the cheapest to what changes the training.
REMEDIES = [dict(micro_batch_size=1), dict(micro_batch_size=1, checkpoint_activations=True), dict(lora_rank=64),
            dict(lora_rank=64, micro_batch_size=1), dict(lora_rank=64, micro_batch_size=1, checkpoint_activations=True)]


def changed(s, **change):
    """A copy of the settings with a few other values, unchecked."""
    other = copy.copy(s)
    for name, value in change.items():
        setattr(other, name, value)
    return other
