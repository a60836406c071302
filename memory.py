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

import checkpoint
import data
import judge
import losses
import model
from cli import InputError

P_TOKENS = 64                  # of the refinement prompt, which is some forty words
LIBRARIES = 100 << 20          # bytes that are first loaded in a step or a save
# What comes and goes leaves holes that the next step's tensors do not fit into, as a share of it. Fitted to what was measured
# on a CPU, where cli.keep_freed_memory gives nothing back, and half of the gradients' place is lost too; CUDA's is a guess.
HOLES = {"cpu": 0.2, "cpu, sharded": 0.35, "cpu, adapters": 0.5, "cuda": 0.1}


@dataclass
class Shape:
    """What a network's memory follows from: parameters in all, in the largest block, outside of the blocks; bytes a token
    of its activations' gradient needs."""
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
    judged: bool
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


def parts(policy, reference, judge_shape, job, ranks, replicas, device):
    """{name: bytes} of what stands in memory all the time, and {phase: {name: bytes}} of what comes and goes."""
    config, S = policy.config, ranks // replicas
    c, m = job.compute.itemsize, job.masters.itemsize
    lora, sharded = policy.adapters > 0, ranks > 1
    trained = policy.adapters if lora else policy.whole
    states = {"adam": 2, "adamw": 2, "rmsprop": 1}[job.optimizer]
    stays = {
        "weights": (policy.whole * c + policy.adapters * m if lora else policy.whole * m) / S,
        "optimizer": states * trained * m / S,
        "reference": reference.whole * c / S if reference is not None else 0,
        "judge": judge_shape.whole * c / S if judge_shape is not None else 0,
    }

    x, y = job.prompt_length, job.response_length
    N = job.micro * (x + job.responses * y)
    logits = min(job.micro * job.responses * y, losses.HEAD_CHUNK) * config.vocab_size
    per_block = policy.saved_numbers(job.compute, keys_gathered(job))
    # With recomputation each block keeps its input, and one block at a time keeps everything.
    kept = config.layers * config.width + per_block if job.recompute else config.layers * per_block
    tensor = config.vocab_size * config.width                         # numbers of the largest weight
    update = {
        "gradients": trained * m / S,
        "activations": kept * N * c,
        "logits": logits * (4 + 4 + 4 + c * (c < 4)),             # themselves, their softmax, its gradient
        # gradients on their way through an MLP, and the largest weight's before it is added to what stands there
        "backward": 4 * max(config.ffn, config.width) * N * c + 2 * tensor * m * (not lora),
    }
    if sharded:       # two blocks at a time, the root all along: a buffer and the weights that are copied from it; gradients
        update["gathered"] = 2 * (2 * policy.block + policy.root) * c + (policy.block + policy.root) * (c + 4) * (not lora)
    elif c < m and not lora:
        update["cast weights"] = policy.whole * c                 # float32 masters in the compute type
    phases = {"update": update}
    if job.online:
        whole = (policy.whole + (reference.whole if reference is not None else 0)) * c if sharded else 0
        copy = policy.whole * c if not sharded and c < m and not lora else 0
        weights = policy.whole * c
        at_a_time = min(job.prompts, max(int(max(weights, 1 << 30) // ((x + job.k * y) * policy.cache_numbers() * c)), 1))
        rows = at_a_time * job.k
        phases["sampling"] = {
            "gathered": whole, "cast weights": copy,
            "cache": at_a_time * (2 * x + job.k * y) * policy.cache_numbers() * c,      # a prompt's is laid out once more
            "logits": rows * config.vocab_size * 4 * 4,           # themselves, sorted, probabilities, their sums
        }
        asker = judge_shape or reference or policy             # the policy with its adapters off
        tokens = min(judge.FOREST_TOKENS, job.prompts * 2 * job.k * (y + P_TOKENS))
        if job.judged:
            phases["judging"] = {"gathered": whole, "cache": 2 * tokens * asker.cache_numbers() * c,
                                 "activations": tokens * (3 * asker.config.ffn + 6 * asker.config.width) * c}
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


def job_of(s, recipe, compute, context, ranks):
    """The Job of train.Settings `s` with its recipe, as train.Dataset sets lengths."""
    online = recipe.online
    room = context - (P_TOKENS if recipe.loss.startswith("sr-") else 0)
    length = s.max_length or min(512, room)
    prompt = s.max_prompt_length or length // 2
    response = (s.max_tokens or length - min(prompt, length // 2)) if online else length - min(prompt, length - 1)
    prompts = -(-s.batch_size // ranks)
    masters = torch.float64 if compute == torch.float64 else torch.float32
    return Job(online=online, judged=recipe.has_judge, micro=min(s.micro_batch_size, prompts),
               responses=recipe.pairs_a_prompt(s.k) * (1 if recipe.loss == "sft" else 2), prompts=prompts,
               k=s.candidates or s.k or 1, prompt_length=min(prompt, length - response), response_length=response,
               compute=compute, masters=masters, optimizer=s.optimizer, recompute=s.checkpoint_activations)


def estimate(s, recipe, compute, ranks, device):
    """(Shape of the policy, Job, stays, phases) of train.Settings; see `parts`."""
    policy = Shape.of(s.model, s.lora_rank)
    job = job_of(s, recipe, compute, policy.config.context, ranks)

    def other(folder):                  # the base under the adapters is the reference and the judge
        return None if s.lora_rank and folder == s.model else Shape.of(folder)
    reference = other(s.reference or s.model) if recipe.has_reference and not s.reference_cache else None
    judge_shape = other(s.judge) if recipe.has_judge and s.judge not in (None, s.model, s.reference) else None
    return policy, job, *parts(policy, reference, judge_shape, job, ranks, s.replicas, device)


def dry_run(s, recipe, compute, ranks, device, available):
    """Print the estimate; InputError where it does not fit into `available` bytes a rank."""
    policy, job, stays, phases = estimate(s, recipe, compute, ranks, device)
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
        fits = [" ".join(f"--{name}={value}" for name, value in change.items()) for change in REMEDIES
                if peak(*estimate(changed(s, **change), recipe, compute, ranks, device)[2:])[0] <= available]
        raise InputError(f"{s.recipe} of {s.model} needs {most / gib:.1f} GiB a rank and there are {available / gib:.1f}; " + (
            f"this would fit: {' or '.join(fits)}." if fits else "more ranks or a smaller model are needed."))


REMEDIES = [dict(micro_batch_size=1), dict(checkpoint_activations=True), dict(micro_batch_size=1, checkpoint_activations=True),
            dict(lora_rank=64), dict(lora_rank=64, micro_batch_size=1, checkpoint_activations=True)]


def changed(s, **change):
    """A copy of the settings with a few other values, unchecked."""
    other = copy.copy(s)
    for name, value in change.items():
        setattr(other, name, value)
    return other
