"""Online self-preferring and self-refined alignment: one update, and the loop around it.

    torchrun train.py                                        the embedded world: base, SFT, judge, OSP
    torchrun train.py --recipe=sft --model=DIR --data=FILE --out_dir=out/sft
    torchrun train.py --recipe=sr-dpo --model=out/sft/final --data=FILE --out_dir=out/sr-dpo
    torchrun --nproc-per-node 2 train.py …                   the same on two ranks

Read Trainer.update first, and from there rollout (paper 2, algorithm 1), learn, pair_loss, margin. How
weights are split over ranks (FSDP2) stands before it, the loop over steps after it. The methods: recipes.py.

Left out on purpose: configuration files, trackers (out_dir/metrics.jsonl has one JSON object per step), job
schedulers. Everything random is a pure function of (seed, step, row), so a run can be split over ranks or
resumed without a trace. Letters: N pairs, K samples per prompt.
"""
from support.ranks import STARTED_BY  # noqa: I001 -- first: it notes who started this process

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import data
import forest
import judge
import losses
import model
import sample
from data import Pair, Sequence
from recipes import RECIPES, Settings
from support import cli, memory
from support.checkpoint import START, OutDir
from support.cli import InputError
from support.disk import last_metrics
from support.metrics import Log, rounded, shown, summary
from support.ranks import Ranks, launch, leave_with, lost_rank_named, pick_dtype, stop_signal
from support.reference_cache import ReferenceCache

SKIPS = 5              # updates skipped in a row that end a run


# ------------------------------------------------------------------------------------------------------------
# Weights on many ranks

def shard(net, dtype, mesh):
    """FSDP2: each block a group, and the root (embedding, norm, head), which stays whole between forward and
    backward because the head is called outside of forward. Masters keep their type; compute is in `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide)
    for block in net.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(net, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


@contextlib.contextmanager
def gathered(*nets):
    """Whole weights on every rank: forwards inside make no collective calls, so ranks may make different
    numbers of them. What was gathered is given back at the end: the next forward gathers updated weights."""
    wrapped = [net for net in dict.fromkeys(nets) if isinstance(net, FSDPModule)]   # one may be both
    for net in wrapped:
        for module in (*net.blocks, net):
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for net in wrapped:
            for module in (*reshard(net).blocks, net):
                module.set_reshard_after_forward(module is not net, recurse=False)


def reshard(net):
    """The network with each rank's own rows alone: after a forward without a gradient the root is whole."""
    if isinstance(net, FSDPModule):
        for module in (*net.blocks, net):
            module.reshard()
    return net


def whole_tensor(tensor):
    """A parameter as one whole tensor, gathered where it is sharded (a collective call)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Networks:
    """The policy, its frozen reference and judge: sharded before they have memory, each folder read once.
    A Trainer sets reference, judge and optimizer when it knows its data."""

    def __init__(self, settings):
        s = self.settings = settings
        self.recipe, self.ranks = s.recipes[s.recipe], Ranks.start(s.device)
        self.out = OutDir(s, self.ranks)
        self.dtype = pick_dtype(s.dtype, self.ranks.device)
        self.masters = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.mesh = self.ranks.mesh(s.replicas) if self.ranks.size > 1 or s.replicas > 1 else None
        # Under adapters the base is frozen: it needs no masters.
        self.policy = self.load(s.model, self.dtype if s.lora_rank else self.masters, trained=True)
        self.policy.compute_dtype = self.dtype
        self.frozen = {s.model: self.policy} if s.lora_rank else {}    # with adapters off: the reference
        self.tokenizer = sample.matching_tokenizer(s.model, self.policy.config)

    def say(self, text):
        if self.ranks.rank == 0:
            print(text, flush=True)

    def load(self, folder, dtype, trained=False, reward_head=False):
        """A network of which each rank reads only the rows that it keeps."""
        rank, alpha = (self.settings.lora_rank, self.settings.lora_alpha) if trained else (0, 0)

        def prepare(net):
            net.requires_grad_(trained)
            if rank:
                model.add_adapters(net, rank, alpha, self.masters)
            if self.mesh is not None:
                shard(net, self.dtype, self.mesh)
        net = model.load(folder, dtype, self.ranks.device, prepare, reward_head)
        if rank:
            empty = dict(net.named_parameters())
            model.fill(net, ((name, tensor[model.own_rows(empty[name])].to(self.ranks.device, self.masters))
                             for name, tensor in model.fresh_adapters(net, self.settings.seed)))
        for block in net.blocks:
            block.recompute = trained and self.settings.checkpoint_activations
        return net

    def load_frozen(self, folder):
        """A reference or judge, read in the compute type: at step 0 it computes what the policy computes, bit
        for bit. It must share the policy's tokenizer."""
        if folder not in self.frozen:
            net = self.frozen[folder] = self.load(folder, self.dtype)
            ours = self.settings.model
            if folder != ours and not sample.matching_tokenizer(folder, net.config).same_ids(self.tokenizer):
                raise InputError(f"{folder} and {ours} have different tokenizers; a run's models share one.")
        return self.frozen[folder]

    def networks(self):
        """{name: network} of what is trained and saved."""
        return {"policy": self.policy}

    def trained(self):
        """{network.name: trained weight}."""
        return {f"{network}.{name}": weight for network, net in self.networks().items()
                for name, weight in reshard(net).named_parameters() if weight.requires_grad}

    def make_optimizer(self):
        s, parameters = self.settings, list(self.trained().values())
        if s.optimizer == "rmsprop":
            return torch.optim.RMSprop(parameters, lr=s.lr)
        extra = {"weight_decay": s.weight_decay} if s.optimizer == "adamw" else {}
        kind = torch.optim.AdamW if s.optimizer == "adamw" else torch.optim.Adam
        fused = self.ranks.device.startswith(("cpu", "cuda"))      # one pass over the weights instead of ten
        return kind(parameters, lr=s.lr, betas=tuple(s.betas), fused=fused, **extra)

    @torch.no_grad()
    def reference_from_policy(self):
        """π_t, opponent and reference of SPIN's iteration t, is the policy when that iteration starts."""
        for ours, theirs in zip(reshard(self.reference).parameters(), reshard(self.policy).parameters()):
            ours, theirs = (part.to_local() if hasattr(part, "to_local") else part for part in (ours, theirs))
            ours.copy_(theirs)

    def reference_logprobs(self, packed, starts):
        """log π_ref (N, 2) of both responses of each pair in a forest, see pack_pairs."""
        with torch.no_grad(), model.without_adapters(self.reference):
            values = losses.logprobs(self.reference, packed, starts).view(-1, 2)
        if self.reference is not self.policy:
            reshard(self.reference)                     # its root would stay whole, for no backward follows
        return values

    def state_tensors(self):
        """What a checkpoint holds: {name: tensor} of trained weights and optimizer state. The order of data
        and samples needs no state."""
        trained = self.trained()
        tensors = dict(trained)
        if (self.settings.iterations or 1) > 1:               # then the reference is no folder's any more
            tensors |= {f"reference.{name}": weight
                        for name, weight in reshard(self.reference).named_parameters()}
        for name, weight in trained.items():
            for key, value in self.optimizer.state[weight].items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def allocate_state(self, state):
        """The same, allocated, to read a checkpoint into: an optimizer has its state only after a step."""
        if state["skipped"] < state["step"]:
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0
                for weight in group["params"]:
                    weight.grad = torch.zeros_like(weight)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return self.state_tensors()

    def save_final(self):
        """final/: a Hugging Face folder with its tokenizer; under LoRA also adapter/, as PEFT loads it."""
        def write(folder, weights):
            model.save_weights(self.policy.config, weights, folder)
            self.tokenizer.save(folder)

        def write_adapters(folder, weights):
            model.save_adapters(self.policy, weights, self.settings.model, folder)
        if self.settings.lora_rank:
            adapters = ((name, whole_tensor(weight)) for name, weight in self.policy.named_parameters()
                        if "lora_" in name)
            self.out.write_folder("adapter", write_adapters, adapters)
        self.out.write_folder("final", write, model.merged(self.policy, whole_tensor))


def pack_pairs(pairs, query):
    """(forest of both responses of each pair after its `query`, "x" or "refined_x", their 2N starts)."""
    queries = [getattr(pair, query) for pair in pairs]
    sequences = [x + y for x, pair in zip(queries, pairs) for y in (pair.chosen, pair.rejected)]
    return forest.pack(sequences), [len(x) for x in queries for _ in range(2)]


# ------------------------------------------------------------------------------------------------------------
# The trainer

class Trainer(Networks):
    """One run: the networks, the data, the optimizer, the place on disk; update by update."""

    def __init__(self, settings):
        super().__init__(settings)
        s, context = settings, self.policy.config.context
        reference, judge_folder = s.frozen_folders()
        judge_context = model.read_config(judge_folder).context if judge_folder else context
        if s.recipe == "judge":                         # its sequences are the instructions
            judge_context = min(context, s.max_length or context)
        chat = data.chat_of(self.tokenizer, s.chat)
        self.judge_prompt = judge.JudgePrompt(self.tokenizer, s.judge_task, judge_context, chat)
        self.data = data.Dataset(s, self.tokenizer, chat, context, self.instructions, self.say)
        self.judge = self.load_frozen(judge_folder) if judge_folder else None
        self.reference = None
        if s.reference_cache:
            self.attach_cached(reference)
        elif reference:
            self.reference = self.load_frozen(reference)
        self.sampler = self.policy if self.recipe.responses == "policy" else self.reference

        self.total_rows = s.steps * s.batch_size if s.steps else math.ceil(len(self.data) * s.epochs)
        self.steps = s.steps or math.ceil(self.total_rows / s.batch_size)
        if "iterations" in s.given and s.iterations > self.steps:
            raise InputError(f"--iterations={s.iterations}: more than the run's {self.steps} steps.")
        default = min(self.recipe.defaults["warmup_steps"], self.steps // 10)
        self.warmup = default if s.warmup_steps is None else s.warmup_steps
        self.loss = self.sft_loss if self.recipe.loss == "sft" else self.pair_loss
        self.optimizer, self.state = self.make_optimizer(), dict(START)
        self.log, self.started = self.new_log(), time.perf_counter()
        self.stop_ids, self.allowed = sample.stopping(self.tokenizer, chat, self.policy.config)

    def new_log(self):
        return Log(self.ranks)

    def instructions(self, rows):
        """Judge instructions of rows that are pairs, for the judge recipe."""
        sequences, starts, cut = judge.augmentation(self.judge_prompt, rows, self.settings.seed)
        if cut:
            self.say(f"judge instructions: {cut} of {len(rows)} were shortened to the context")
        return [Sequence(ids, start) for ids, start in zip(sequences, starts)]

    # -- one update --------------------------------------------------------------------------------------

    def update(self, step):
        """One optimizer step on the global batch; returns its metrics, the same on every rank."""
        self.begin_update(step)
        rows = self.batch(step)                                  # this rank's rows, disjoint over the ranks
        examples = self.rollout(step, rows) if self.recipe.online else self.labelled(rows)
        with self.log.timed("update_seconds"):
            norm, why_not = self.learn(examples, self.loss)
        self.count_skip(step, why_not)
        return self.metrics(step, norm)

    def batch(self, step):
        """This rank's part of the global batch; its i-th row stands at place step · B + rank + i · ranks."""
        start = step * self.settings.batch_size
        stop = min(start + self.settings.batch_size, self.total_rows)
        return self.data.positions(start, stop)[self.ranks.rank::self.ranks.size]

    def rollout(self, step, prompts):
        """Paper 2, algorithm 1: fresh pairs, each with the judge's strength of preference. (RAFT and SPIN
        take a part of it: fresh_responses.)"""
        first = step * self.settings.batch_size + self.ranks.rank        # the place of the first prompt
        judged, verdicts = [], []                           # per prompt: (K scores, [(i, j, p)])
        with gathered(self.sampler, self.judge):            # whole weights: forwards need no other rank
            # 1. Sample K responses to each prompt (osp: from the policy).
            with self.log.timed("sample_seconds"):
                samples = self.sample_prompts(self.sampler, step, prompts, first)
            with self.log.timed("judge_seconds"), model.without_adapters(self.judge):
                for judge_pass in self.ranking_passes(prompts, samples):
                    # 2. Rank them by p(y ≻ ∅ | x).
                    scores = judge_pass.rank()
                    # 3. Pair best with worst, second best with second worst, …
                    pairs = [paired(self.settings, step, first + i * self.ranks.size, some)
                             for i, some in zip(judge_pass.prompts, scores)]
                    # 4. Ask about each pair directly, in both orders.
                    judged += zip(scores, judge_pass.ask(pairs))
                    verdicts += judge_pass.verdicts
        # 5. Update the policy on the pairs and their strengths: learn, with what this gives.
        fresh = fresh_responses(self.recipe, prompts, samples, judged)
        self.keep_rollout(step, prompts, samples, judged, verdicts, fresh)
        return worth_learning(self.recipe, [example_of(*one) for one in fresh], self.log)

    def learn(self, examples, loss):
        """One optimizer step; the loss is the mean over the examples (SFT: supervised tokens) of ALL ranks,
        however they were split.

        Returns (norm of the gradient, None or why the weights stay as they are).
        """
        s = self.settings
        size = s.micro_batch_size * self.recipe.examples_per_prompt(s.k)
        micros = [examples[i:i + size] for i in range(0, len(examples), size)]
        total, = self.ranks.sum([sum(example.count for example in examples)])
        rounds = self.ranks.largest(len(micros))        # each is a collective call: as many on all ranks
        for i in range(rounds):
            if s.replicas > 1:                          # replicas add up their own and meet once per step
                for net in self.networks().values():
                    net.set_requires_all_reduce(i == rounds - 1)
            summed = loss(micros[i]).sum() if i < len(micros) else self.zero_loss(loss)
            # FSDP averages gradients over the ranks; we want the sum.
            (summed * self.ranks.size / max(total, 1)).backward()
        trained = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        norm = float(whole_tensor(torch.nn.utils.clip_grad_norm_(trained, s.grad_clip or math.inf)))
        means = self.log.means()
        why_not = None
        if not (math.isfinite(norm) and math.isfinite(means.get("loss", 0.0))):
            why_not = "the loss or its gradient is not finite"
        elif not total:
            undecided = means.get("undecided")
            why_not = "no pair has a winner" if undecided else "both responses of every pair are the same"
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, why_not

    def sft_loss(self, examples):
        """(N,) negative log-likelihoods of the examples' supervised tokens."""
        packed = forest.pack([example.ids for example in examples])
        values = losses.sft(losses.logprobs(self.policy, packed, [example.start for example in examples]))
        self.log.add("loss", values, count=sum(example.count for example in examples))
        self.log.tokens += sum(len(example.ids) for example in examples)
        return values

    def pair_loss(self, pairs):
        """(N,) losses: each a function of the margin h, of Δπ and of the strength p (losses.py)."""
        s, augmented, delta, strength = self.settings, None, None, None
        if self.recipe.is_refined:
            with torch.no_grad():                       # Δπ is a constant, sg[Δπ]: no graph after p⊕x
                augmented, *_ = self.margin(pairs, "refined_x")
            delta = losses.refinement(augmented, s.beta)
        margin, policy, reference = self.margin(pairs, "x")
        if self.recipe.labels == "soft":
            known = [1.0 if pair.strength is None else pair.strength for pair in pairs]
            strength = torch.tensor(known, device=margin.device, dtype=margin.dtype)
        values = self.recipe.loss_of(s, margin=margin, delta=delta, strength=strength)
        self.log.add_all(losses.pair_metrics(s, values, margin, augmented, delta, strength, policy))
        if self.recipe.responses == "policy" and torch.is_grad_enabled():   # log π/π_ref of its own
            self.log.add("kl", torch.cat(policy) - torch.cat(reference))
        if not self.recipe.online:
            self.log.add("response_length", [len(y) for pair in pairs for y in (pair.chosen, pair.rejected)])
        self.log.tokens += sum(2 * len(pair.x) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
        return values

    def margin(self, pairs, query):
        """(h, log π of (y⁺, y⁻), log π_ref of them), each (N,), after x or after p⊕x (`query`).

        Policy and reference read the same forest in the same type: equal weights give h = 0 exactly.
        """
        packed, starts = pack_pairs(pairs, query)
        with torch.no_grad():       # first, as long as no activations of the policy stand in memory
            if pairs[0].reference is not None:
                reference = torch.tensor([pair.reference[query] for pair in pairs], dtype=torch.float64)
            else:
                reference = self.reference_logprobs(packed, starts)
        policy = losses.logprobs(self.policy, packed, starts).view(-1, 2).unbind(1)
        reference = reference.to(policy[0]).unbind(1)
        return losses.margins(policy, reference), policy, reference

    def zero_loss(self, loss):
        """A loss of 0 with a graph, for a rank with fewer examples than the others: it gathers as they do."""
        kept, self.log = self.log, self.new_log()
        value = loss([self.blank_example()]).sum() * 0
        self.log = kept
        return value

    def blank_example(self):
        if self.recipe.loss == "sft":
            return Sequence([0, 0], 1)
        known = None if self.reference is not None else {"x": (0.0, 0.0), "refined_x": (0.0, 0.0)}
        return Pair([0], [0], [0], [0], 0.5, None, False, known)

    # -- around an update --------------------------------------------------------------------------------

    def begin_update(self, step):
        """A fresh log, the step's learning rate and, where SPIN's next iteration begins, its reference."""
        self.log, self.started = self.new_log(), time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, step, self.steps, self.warmup)
        n = self.settings.iterations or 1
        if step in [-(-self.steps * i // n) for i in range(1, n)]:
            self.reference_from_policy()

    def count_skip(self, step, why_not):
        """Count a step whose weights stayed as they were; after SKIPS in a row there is no hope."""
        if why_not is None:
            self.state["consecutive_skips"] = 0
            return
        self.state["skipped"] += 1
        self.state["consecutive_skips"] += 1
        self.say(f"\nstep {step + 1}: {why_not}; the update is skipped")
        if self.state["consecutive_skips"] >= SKIPS:
            kept = [path.name for path in self.out.checkpoints()]
            raise InputError(f"step {step + 1}: {why_not}, for {SKIPS} steps in a row; the run stops" + (
                f" and keeps {kept[-1]}." if kept else ".") + (
                " A lower --lr or --grad_clip may help." if "finite" in why_not else ""))

    def metrics(self, step, norm):
        """One line of metrics.jsonl: means over the global batch."""
        tokens, = self.ranks.sum([self.log.tokens])
        lr, seconds = self.optimizer.param_groups[0]["lr"], time.perf_counter() - self.started
        return {"step": step + 1, **self.log.means(), "grad_norm": norm, "lr": lr,
                "skipped": self.state["skipped"], "tokens_per_second": tokens / seconds}

    # -- fresh responses ---------------------------------------------------------------------------------

    def sample_prompts(self, net, step, prompts, first):
        """A gathered network's K responses (rso: its candidates) to each of this rank's prompts, which stand
        at the places first, first + ranks, …: lists of Samples, a pure function of (seed, step, place)."""
        s, limits = self.settings, self.data
        k, places = s.candidates or s.k, [first + i * self.ranks.size for i in range(len(prompts))]
        longest = max((len(query.x) for query in prompts), default=0) + k * limits.max_tokens
        size = prompts_at_a_time(self.policy, self.dtype.itemsize, longest)
        with model.without_adapters(net if self.recipe.responses != "policy" else None):
            samples = list(sample.sample_prompts(
                model.in_compute_dtype(net, self.dtype), [query.x for query in prompts], k, limits.max_tokens,
                s.seed, step, self.stop_ids, self.allowed, s.temperature, s.top_p,
                rooms=[limits.max_length - len(query.x) for query in prompts], places=places, at_a_time=size))
        for one in (one for group in samples for one in group):
            one.text = sample.response_text(self.tokenizer, one)
        return samples

    def ranking_passes(self, prompts, samples):
        """The judge's passes over all samples, see judge.ranking_passes; none without a judge."""
        if not self.recipe.has_judge:
            return []
        contexts = [data.context_text(query.row.prompt) for query in prompts]
        texts = [[one.text for one in group] for group in samples]
        return judge.ranking_passes(self.judge, self.judge_prompt, contexts, texts)

    def keep_rollout(self, step, prompts, samples, judged, verdicts, fresh):
        """Log what was sampled and judged, write it down, and show some of it."""
        log, drawn = self.log, [one for group in samples for one in group]
        log.add_all({"response_length": [len(one.ids) for one in drawn],
                     "finished": [one.finished for one in drawn],
                     "empty": [not one.text.strip() for one in drawn],
                     "prompt_cut": [query.cut for query in prompts]})
        if verdicts:
            asked = sum(len(some.p) for some in verdicts)
            log.add("judge_cut", [sum(some.cut for some in verdicts)], count=asked)
            log.add("judge_off", [sum(some.not_a_or_b for some in verdicts)], count=2 * asked)
        self.out.write_rollouts(step, [row_of(*one) for one in fresh])
        every = self.settings.sample_every
        if every and step % every == 0 and judged:
            context = data.context_text(prompts[0].row.prompt)
            self.say(shown(step, context, [one.text for one in samples[0]], *judged[0]))

    @torch.no_grad()
    def labelled(self, rows):
        """Rows of a data set; for soft labels the judge, which is frozen, is asked once about each."""
        if self.recipe.labels == "soft":
            # By id: where an epoch ends and the next begins, a row may come twice.
            new = list({id(pair): pair for pair in rows if pair.strength is None}.values())
            texts = [(data.context_text(pair.row.prompt), pair.row.chosen, pair.row.rejected) for pair in new]
            with gathered(self.judge), model.without_adapters(self.judge):
                verdicts = judge.compare(self.judge, self.judge_prompt, texts)
            for pair, p in zip(new, verdicts.p.tolist()):
                pair.strength = p
        return rows

    # -- beside the updates ------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self):
        """{"eval_…": mean over the held-out rows}; a pair without a p of its own counts as p = 1."""
        self.log, size = self.new_log(), self.settings.micro_batch_size
        rows = self.data.held_out[self.ranks.rank::self.ranks.size]
        for i in range(0, self.ranks.largest(len(rows)), size):
            if rows[i:i + size]:
                self.loss(rows[i:i + size])
            else:
                self.zero_loss(self.loss)
        reshard(self.policy)                            # no backward follows that would do so
        return {f"eval_{name}": value for name, value in self.log.means().items()}

    @torch.no_grad()
    def attach_cached(self, folder):
        """Give all fixed pairs what the reference says of them: then nobody needs it in memory."""
        pairs = self.data.rows + self.data.held_out
        cache = ReferenceCache(self.settings, self.dtype, pairs, self.recipe.is_refined)
        if self.ranks.sum([cache.values is None])[0]:
            self.reference = self.load_frozen(folder)
            cache.compute(lambda pairs, query: self.reference_logprobs(*pack_pairs(pairs, query)), self.ranks,
                          self.settings.micro_batch_size)
            self.frozen.pop(folder)
            self.reference = None
        cache.attach()

    def run(self):
        """Train to the end and write final/; returns the last metrics. SIGTERM and SIGINT end it after the
        step under way: a checkpoint is saved and the process leaves with 128 + the signal."""
        with lost_rank_named(self.ranks), self.out.locked(), stop_signal() as stop:
            return Loop(self, stop).run()


def learning_rate(settings, step, steps, warmup):
    """Linear warm-up, then constant, linear or cosine to 0; step counts from 0."""
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    shapes = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
    return settings.lr * shapes[settings.lr_schedule]


def prompts_at_a_time(net, itemsize, tokens):
    """How many prompts of so many tokens, samples included, are sampled together: the more, the less often
    the weights are read for one token per row. Their cache may take as much as the weights, or 1 GiB."""
    config = net.config
    weights = itemsize * sum(weight.numel() for weight in net.parameters())
    cache = itemsize * tokens * 2 * config.layers * config.kv_heads * config.head_dim
    return max(max(weights, 1 << 30) // cache, 1)


# ------------------------------------------------------------------------------------------------------------
# Fresh responses as examples, as rows of a file, as text

def paired(settings, step, place, scores):
    """[(winner, loser)] of the samples of the prompt at a place of a step; what is drawn (random pairs, rso's
    acceptance) is a pure function of (seed, step, place)."""
    generator = np.random.default_rng([settings.seed, 4, step, place])
    recipe = settings.recipes[settings.recipe]
    pairing = judge.PAIRINGS[recipe.pairs]
    if recipe.responses != "rso":
        return pairing(scores, generator)
    accepted = judge.rejection_sample(scores, settings.k, settings.rso_beta, generator)
    return [(accepted[i], accepted[j]) for i, j in pairing([scores[i] for i in accepted], generator)]


def fresh_responses(recipe, prompts, samples, judged):
    """[(query, first, second, p(first ≻ second))] of what was sampled: the judge's pairs, of which the first
    need not win. RAFT takes each prompt's best one alone; in SPIN the data set's wins over each sample."""
    if recipe.pairs == "spin":
        own = [sample.Sample(query.chosen, 0.0, query.row.finished[0], query.row.chosen) for query in prompts]
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
        decided = [data.named_winner(pair) for pair in pairs if pair.strength != 0.5]
        pairs = [dataclasses.replace(pair, strength=1.0) for pair in decided]
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
# The loop

class Loop:
    """The steps of a trainer, from where out_dir was left to final/: evaluation, checkpoints, the way out."""

    def __init__(self, trainer, stop):
        self.trainer, self.settings, self.stop = trainer, trainer.settings, stop
        self.ranks, self.out, self.saved_at = trainer.ranks, trainer.out, time.monotonic()

    def run(self):
        """Train to the end; returns the last metrics."""
        t, metrics = self.trainer, None
        state = self.out.begin(resolved(t), t.steps, t.allocate_state)
        if state is None:
            metrics = last_metrics(self.out.path / "metrics.jsonl")
            t.say(f"{self.out.path} is finished: {json.dumps(metrics)}")
            return metrics
        t.state = state
        t.say(opening(t))
        line = cli.StepLine(t.steps, self.settings.recipe, enabled=self.ranks.rank == 0)
        line.resume_at(state["step"])
        for step in range(state["step"], t.steps):
            metrics = t.update(step)
            t.state["step"] = step + 1
            self.write(metrics)
            metrics |= self.evaluate(step + 1)
            line.update(step + 1, summary(metrics))
            self.save_or_stop(step + 1)
        t.save_final()
        if t.state["skipped"]:
            t.say(f"{t.state['skipped']} of {t.steps} updates were skipped")
        t.say(f"{self.settings.recipe}: written to {self.out.path / 'final'}")
        return metrics or last_metrics(self.out.path / "metrics.jsonl")    # killed before: no step was left

    def write(self, record):
        self.ranks.on_first(lambda: self.out.append("metrics.jsonl", [rounded(record)]))

    def evaluate(self, step):
        """Held-out metrics where they are due, also as a line of their own after the step's."""
        every = self.settings.eval_every
        if not self.trainer.data.held_out or not (step == self.trainer.steps or every and step % every == 0):
            return {}
        measured = self.trainer.evaluate()
        self.write({"step": step} | measured)
        return measured

    def save_or_stop(self, step):
        """Save where it is due: by steps, by time, at the end, on a signal; then leave, if asked to."""
        s, last = self.settings, step == self.trainer.steps
        late = s.save_minutes and time.monotonic() - self.saved_at > 60 * s.save_minutes
        # Ranks hear of a signal at different times, and clocks differ: they save and stop together.
        number, late = (self.ranks.largest(int(value)) for value in (self.stop.number, late))
        if last or number or late or s.save_every and step % s.save_every == 0:
            self.out.save(self.trainer.state_tensors(), self.trainer.state)
            self.saved_at = time.monotonic()
        if number and not last:
            self.trainer.say(f"\n{signal.Signals(number).name}: stopped after step {step} of "
                             f"{self.trainer.steps} and saved; the same command goes on from there.")
            sys.exit(128 + number)


def opening(trainer):
    """What a run says first."""
    t, s = trainer, trainer.settings
    weights = list(t.policy.parameters())
    count = sum(weight.numel() for weight in weights)
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    part = f", {trained:,} of them trained" if trained < count else ""
    return (f"{s.recipe}: {count:,} parameters{part}, {len(t.data):,} rows, "
            f"{t.steps} steps of {s.batch_size}, {str(t.dtype)[6:]} on {t.ranks.size} × {t.ranks.device}")


def resolved(trainer):
    """The settings with every default filled in, as config.json records them."""
    t, s, d = trainer, trainer.settings, trainer.data
    return dataclasses.asdict(s) | dict(
        steps=t.steps, warmup_steps=t.warmup, dtype=str(t.dtype).removeprefix("torch."),
        chat=d.limits["chat"].name, max_length=d.max_length, max_tokens=d.max_tokens,
        max_prompt_length=d.limits["max_prompt_length"],
        reference=s.reference or s.model, judge=s.judge or s.model)


# ------------------------------------------------------------------------------------------------------------
# Command line

def main(settings, trainer=Trainer, world=None):
    """Train on what was named, or run `world`, the embedded one, where no model was."""
    for name in ("model", "reference", "judge", "reward", "out_dir"):
        if getattr(settings, name, None) == "":         # an unset shell variable
            raise InputError(f"--{name}= is empty.")
    settings.check_used()
    if settings.dry_run:
        return memory.dry_run(settings, model.checked_network)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        leave_with(STARTED_BY)
        if settings.resume == "never" and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
            settings.resume = settings.given["resume"] = "auto"    # what the first try made is good
    if settings.model is not None:
        return trainer(settings).run()
    for name in ("data", "prompts", "eval_data", "reference", "judge", "reward"):
        if getattr(settings, name, None):
            raise InputError(f"--{name} needs a model: --model=DIR. Without one, the toy world is run.")
    return world(settings)


def start():
    """torchrun train.py. The embedded world is imported only here: this module stands on none above it."""
    from experiments import toy
    trainers = {name: (Settings, Trainer) for name in RECIPES}
    launch(lambda settings: main(settings, world=lambda settings: toy.main(settings, trainers)), Settings)


if __name__ == "__main__":
    start()
