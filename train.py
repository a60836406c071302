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
from support import ranks  # first: it notes who started this process, before torch takes seconds to import

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import data
import judge
import losses
import model
import sample
from recipes import PAIR_LOSSES, RECIPES, Recipe, Settings
from support import checkpoint, cli, memory
from support.cli import InputError
from support.metrics import METRICS, Log, rounded, summary
from support.ranks import (STARTED_BY, Asked, Dropped, LostRank, Ranks, asked_to_stop, check_replicas, launch, leave,
                           leave_with)
from support.reference_cache import ReferenceCache


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
        cache = (ReferenceCache(s, self.dtype, self.data.rows + (self.data.held_out or []), refined)
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
        from experiments import toy
        return toy.main(settings)
    return trainer(settings).run()


if __name__ == "__main__":
    launch(main, Settings)
