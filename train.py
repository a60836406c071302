"""Online self-preferring and self-refined alignment: one update, in full.

    torchrun train.py                                        the embedded world: base, SFT, judge, OSP
    torchrun train.py --recipe=sft --model=DIR --data=FILE --out_dir=out/sft
    torchrun train.py --recipe=sr-dpo --model=out/sft/final --data=FILE --out_dir=out/sr-dpo
    torchrun --nproc-per-node 2 train.py …                   the same on two ranks

Read Trainer.update first, and from there rollout (paper 2, algorithm 1), learn, pair_loss, margin. How
weights are split over ranks (FSDP2) stands before it. The loop over steps: support/loop.py. The methods, and
what is made of fresh responses: recipes.py.

Left out on purpose: configuration files, trackers (out_dir/metrics.jsonl has one JSON object per step), job
schedulers. Everything random is a pure function of (seed, step, row), so a run can be split over ranks or
resumed without a trace. Letters: N pairs, K samples per prompt.
"""
from support.ranks import Ranks, launch, pick_dtype, stop_signal  # noqa: I001 -- first: see there

import contextlib
import datetime
import math
import time

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import data
import forest
import judge
import losses
import model
import sample
from data import Pair, Sequence
from recipes import RECIPES, Settings, example_of, fresh_responses, paired, row_of, worth_learning
from support import cli, hf, memory
from support.checkpoint import START, OutDir
from support.cli import InputError
from support.health import SKIPS, no_hope
from support.loop import Loop
from support.memory import prompts_at_a_time
from support.metrics import Log, learning_rate, samples_text
from support.reference_cache import ReferenceCache
from support.shown import Shown

ANSWERS = 1 << 31      # the step that names the randomness of the page's answers: no real one


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
    """The policy, its frozen reference and judge: sharded before they have memory, each folder read once. A
    Trainer reads them last: what is wrong with names, tokenizers or data is said before."""

    def __init__(self, settings):
        s = self.settings = settings
        self.recipe, self.ranks = s.recipes[s.recipe], Ranks.start(s.device, s.rank_minutes)
        self.out = OutDir(s, self.ranks)
        self.dtype = pick_dtype(s.dtype, self.ranks.device)
        self.masters = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.mesh = self.ranks.mesh(s.replicas) if self.ranks.size > 1 or s.replicas > 1 else None
        for folder in s.folders():                                     # the policy's is the first
            tokenizer = sample.matching_tokenizer(folder, model.read_config(folder))
            hf.tensors_in(folder)                                      # their headers are sound
            if folder == s.model:
                self.tokenizer = tokenizer
            elif not tokenizer.same_ids(self.tokenizer):
                raise InputError(f"{folder} and {s.model} have different tokenizers; "
                                 f"a run's models share one.")
        if s.micro_batch_size is None:
            fits = memory.micro_batch_size(s, model.checked_network)
            s.micro_batch_size = -self.ranks.largest(-fits)       # evaluation makes as many rounds on all
        if self.tokenizer.chat_template:                               # which may write the date
            self.tokenizer.chat_template.now = datetime.datetime.fromisoformat(self.out.started)
        self.rounding = hf.Rounding(s.model, s.save_dtype)

    def load_policy(self):
        """What is trained. Under adapters its base is frozen: that needs no masters."""
        s = self.settings
        self.policy = self.load(s.model, self.dtype if s.lora_rank else self.masters, trained=True)
        self.policy.compute_dtype = self.dtype
        self.frozen = {s.model: self.policy} if s.lora_rank else {}    # with adapters off: the reference

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
        for bit."""
        if folder not in self.frozen:
            self.frozen[folder] = self.load(folder, self.dtype)
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

    def save_final(self, name="final"):
        """final/, or best/: a Hugging Face folder with its tokenizer and the format that it was trained in;
        with final/, under LoRA, also adapter/, as PEFT loads it."""
        def write(folder, weights):
            model.save_weights(self.policy.config, weights, folder, self.rounding)
            chat = self.data.limits["chat"]
            self.tokenizer.save(folder, chat.served(self.data.has_dialogues), chat.end)

        def write_adapters(folder, weights):
            model.save_adapters(self.policy, weights, self.settings.model, folder)
        if self.settings.lora_rank and name == "final":
            adapters = ((name, whole_tensor(weight)) for name, weight in self.policy.named_parameters()
                        if "lora_" in name)
            self.out.write_folder("adapter", write_adapters, adapters)
        count = sum("lora_" not in name for name, _ in self.policy.named_parameters())
        weights = cli.progress(model.merged(self.policy, whole_tensor), f"saving {name}", count)
        self.out.write_folder(name, write, weights)
        if self.rounding.kept < 0.995 and self.rounding.name != "float32" and name == "final":
            self.say(f"final/ is {self.rounding.name}: {100 * self.rounding.kept:.2g} % of the change since "
                     f"{self.settings.model} survives rounding; to keep it, remove final/ and give the "
                     f"same command with --save_dtype=float32")


def pack_pairs(pairs, query):
    """(forest of both responses of each pair after its `query`, "x" or "refined_x", their 2N starts)."""
    queries = [getattr(pair, query) for pair in pairs]
    sequences = [x + y for x, pair in zip(queries, pairs) for y in (pair.chosen, pair.rejected)]
    return forest.pack(sequences), [len(x) for x in queries for _ in range(2)]


# ------------------------------------------------------------------------------------------------------------
# Fresh responses

class Sampling(Networks):
    """The fresh responses of a run, and what the judge says of them and of rows of a data set."""

    def new_log(self):
        return Log(self.ranks)

    def sample_prompts(self, net, step, prompts, first, k=None):
        """A gathered network's K responses (rso: its candidates) to each of this rank's prompts, which stand
        at the places first, first + ranks, …: lists of Samples, a pure function of (seed, step, place)."""
        s, limits = self.settings, self.data
        k, places = k or s.candidates or s.k, [first + i * self.ranks.size for i in range(len(prompts))]
        longest = max((len(query.x) for query in prompts), default=0) + k * limits.max_tokens
        size = prompts_at_a_time(memory.Shape(self.policy), self.dtype.itemsize, longest)
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
        log.add_verdicts(judge.Verdicts.join(verdicts))
        self.out.write_lines("rollouts", step + 1, [row_of(*one) for one in fresh])
        every = self.settings.sample_every
        if every and step % every == 0 and judged:
            context = data.context_text(prompts[0].row.prompt)
            self.say(samples_text(step, context, [one.text for one in samples[0]], *judged[0]))
        if self.recipe.has_judge and self.shown.is_due(step):
            scores, pairs = judged[0] if judged and self.ranks.rank == 0 else ([], [])
            self.shown_pairs = [example_of(*one) for one in fresh[:len(pairs)]]        # the first prompt's
            margins = self.margins(self.shown_pairs)
            if scores and verdicts:                 # of the first pass: on each answer alone, on the pairs
                self.shown.keep(step, data.context_text(prompts[0].row.prompt), samples[0], scores, pairs,
                                verdicts[1], margins)

    @torch.no_grad()
    def margins(self, pairs):
        """h of some pairs as a list: a rank may have any number of them."""
        with gathered(self.policy, self.reference):
            return self.margin(pairs, "x")[0].tolist() if pairs else []

    @torch.no_grad()
    def labelled(self, rows):
        """Rows of a data set; for soft labels the judge, which is frozen, is asked once about each."""
        if self.recipe.labels == "soft":
            # By id: where an epoch ends and the next begins, a row may come twice.
            new = list({id(pair): pair for pair in data.without_strength(rows)}.values())
            texts = [(data.context_text(pair.row.prompt), pair.row.chosen, pair.row.rejected) for pair in new]
            with gathered(self.judge), model.without_adapters(self.judge):
                verdicts = judge.compare(self.judge, self.judge_prompt, texts)
            self.log.add_verdicts(verdicts)
            for pair, p in zip(new, verdicts.p.tolist()):
                pair.strength = p
        return rows

    @torch.no_grad()
    def answer_prompts(self, step):
        """The first held-out prompts (or training prompts) answered anew, always with the same uniforms, for
        the run's page; {"eval_win": how the judge, if there is one, likes them beside the start's}."""
        rows = [] if self.settings.recipe == "judge" else self.data.held_out or self.data.rows
        rows = [row for row in rows[:self.settings.show_prompts] if len(row.x) > 1]      # no texts without x
        first, size = self.ranks.rank, self.ranks.size
        rows = rows[first::size]
        contexts = [data.context_text(row.row.prompt) if isinstance(row, Pair) else
                    self.tokenizer.decode(row.x) for row in rows]
        with gathered(self.policy, self.judge):
            samples = self.sample_prompts(self.policy, ANSWERS, rows, first, k=1)
            asked = [(first + i * size, context, one, bool(self.data.held_out))
                     for i, (context, (one,)) in enumerate(zip(contexts, samples))]
            known = self.shown.answers(step, asked, self.preferred if self.recipe.has_judge else None)
        self.log = self.new_log()
        self.log.add_all(known)
        return {f"eval_{name}": value for name, value in self.log.means().items()}

    def preferred(self, pairs):
        """[p(first ≻ second)] of (context, first, second), by the judge: its weights are whole."""
        with model.without_adapters(self.judge):
            return judge.compare(self.judge, self.judge_prompt, pairs).p.tolist()


# ------------------------------------------------------------------------------------------------------------
# The trainer

class Trainer(Sampling):
    """One run: the networks, the data, the optimizer, the place on disk; update by update."""

    def __init__(self, settings):
        super().__init__(settings)
        s, config = settings, model.read_config(settings.model)
        context, (reference, judge_folder) = config.context, s.frozen_folders()
        judge_context = model.read_config(judge_folder).context if judge_folder else context
        if s.recipe == "judge":                         # its sequences are the instructions
            judge_context = min(context, s.max_length or context)
        chat = data.chat_of(self.tokenizer, s.chat, s.system)
        self.judge_prompt = judge.JudgePrompt(self.tokenizer, s.judge_task, judge_context, chat)
        self.data = data.Dataset(s, self.tokenizer, chat, context, self.instructions, self.say)
        if judge_folder and not self.recipe.online and not data.without_strength(self.data.rows):
            judge_folder = None                         # the data say how much better: nobody is asked
        if judge_folder:
            self.judge_prompt.both_orders("", "", "")   # has the instruction room?
        self.total_rows = s.steps * s.batch_size if s.steps else math.ceil(len(self.data) * s.epochs)
        self.steps = s.steps or math.ceil(self.total_rows / s.batch_size)
        if "iterations" in s.given and s.iterations > self.steps:
            raise InputError(f"--iterations={s.iterations}: more than the run's {self.steps} steps.")
        if (s.warmup_steps or 0) >= self.steps > 1:
            self.say(f"note: --warmup_steps={s.warmup_steps} of {self.steps} steps: --lr is never reached")
        default = min(self.recipe.defaults["warmup_steps"], self.steps // 10)
        self.warmup = default if s.warmup_steps is None else s.warmup_steps
        self.stop_ids, self.allowed = sample.stopping(self.tokenizer, chat, config)
        self.loss = self.sft_loss if self.recipe.loss == "sft" else self.pair_loss
        # Now the weights.
        self.load_policy()
        self.judge = self.load_frozen(judge_folder) if judge_folder else None
        self.reference = None
        if s.reference_cache:
            self.attach_cached(reference)
        elif reference:
            self.reference = self.load_frozen(reference)
        self.frozen_sampler = None if self.recipe.responses == "policy" else self.reference
        self.sampler = self.frozen_sampler or self.policy
        self.optimizer, self.state = self.make_optimizer(), dict(START)
        self.shown = Shown(self.out, self.ranks, s.show_prompts and self.steps)
        self.log, self.started = self.new_log(), time.perf_counter()

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
        if self.shown_pairs is not None:
            self.shown.write_group(self.margins(self.shown_pairs))
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
            with self.log.timed("sample_seconds"), model.without_adapters(self.frozen_sampler):
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
        self.log, self.shown_pairs, self.started = self.new_log(), None, time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, step, self.steps, self.warmup)
        n = self.settings.iterations or 1
        if step in [-(-self.steps * i // n) for i in range(1, n)]:
            self.reference_from_policy()

    def count_skip(self, step, why_not):
        """Count a step whose weights stayed as they were; after SKIPS in a row there is no hope."""
        state = self.state
        state["consecutive_skips"] = state["consecutive_skips"] + 1 if why_not else 0
        if why_not:
            state["skipped"] += 1
            self.say(f"\nstep {step + 1}: {why_not}; the update is skipped")
        if state["consecutive_skips"] >= SKIPS:
            raise InputError(f"step {step + 1}: {no_hope(why_not, self.out.checkpoints())}")

    def metrics(self, step, norm):
        """One line of metrics.jsonl: means over the global batch."""
        tokens, = self.ranks.sum([self.log.tokens])
        lr, seconds = self.optimizer.param_groups[0]["lr"], time.perf_counter() - self.started
        return {"step": step + 1, **self.log.means(), "grad_norm": norm, "lr": lr,
                "skipped": self.state["skipped"], "tokens_per_second": tokens / seconds}

    # -- beside the updates ------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self):
        """{"eval_…": mean over the held-out rows}; a pair without a p of its own counts as p = 1."""
        self.log, size = self.new_log(), self.settings.micro_batch_size
        rows = self.data.held_out[self.ranks.rank::self.ranks.size]
        for i in cli.progress(range(0, self.ranks.largest(len(rows)), size), "evaluation"):
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
        if self.ranks.largest(len(pairs) - cache.done):
            self.reference = self.load_frozen(folder)
            cache.compute(lambda pairs, query: self.reference_logprobs(*pack_pairs(pairs, query)), self.ranks,
                          self.settings.micro_batch_size)
            self.frozen.pop(folder)
            self.reference = None
        cache.attach()

    def run(self):
        """Train to the end and write final/; returns the last metrics. SIGTERM and SIGINT end it after the
        step under way: a checkpoint is saved and the process leaves with 128 + the signal."""
        with self.out.locked(), stop_signal() as stop:
            return Loop(self, stop).run()


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
    if settings.resume == "never" and cli.environment("TORCHELASTIC_RESTART_COUNT", 0):
        settings.resume = settings.given["resume"] = "auto"        # what the first try made is good
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
