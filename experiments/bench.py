"""Osprey beside what one would otherwise use: the same weights, tokens, type and optimizer, one step of each in turn.

    make bench                                                     in an environment of its own (the bench extra)
    python bench.py --data=hh.jsonl.gz --tokenizer=DIR --rows=dpo,sampling --rounds=5

Each side is a process that waits for its turn, so that weather on the machine meets both; a row is checked (both sides must
compute the same numbers on the same tokens) before it is timed, and gives medians over the rounds. Memory is the largest
resident set of the whole process while it steps; on CUDA what torch had allocated. Peers run without gradient
checkpointing, with scaled-dot-product attention, at each micro-batch that --peer_micro_batch_sizes lists: a line each.

Nothing here is imported by the rest. Letters: P prompts, K samples a prompt.
"""
import base64
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import random
import re
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import data
import judge
import losses
import model
import sample
import train
from support import cli
from support.cli import InputError


@dataclass
class Settings:
    """Measure Osprey beside TRL and transformers."""
    rows: list[str] = field(default_factory=lambda: [*ROWS])       # what to measure; default: all
    rounds: int = 5                # turns of each side that count; one more warms up
    dtype: str = "float32"         # of the computation: float32 or bfloat16
    data: str | None = None        # preference pairs; default: made-up texts with the lengths of HH-RLHF's helpful-base
    tokenizer: str | None = None   # folder of the tokenizer; default: a made-up byte-pair vocabulary
    width: int = 512               # of the model, a Llama with fresh weights
    layers: int = 8
    heads: int = 8
    ffn: int = 1408
    batch_size: int = 8            # pairs or prompts a step
    micro_batch_size: int = 2      # of ours
    peer_micro_batch_sizes: list[int] = field(default_factory=lambda: [8, 1])     # of the peer, each measured
    max_length: int = 512          # tokens of prompt and response
    max_tokens: int = 64           # tokens of a sampled response
    k: int = 7                     # samples a prompt
    threads: int = 0               # of each side; 0: as torch finds
    device: str = "auto"           # auto, cpu, cuda
    out: str | None = None         # also write the figures here, as JSON

    def __post_init__(self):
        for row in self.rows:
            if row not in ROWS:
                raise InputError(f"--rows={row}: choose among {', '.join(ROWS)}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"--dtype={self.dtype}: float32 or bfloat16.")
        for name in ("rounds", "batch_size", "micro_batch_size", "max_tokens", "k", "width", "layers", "heads", "ffn"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name}={getattr(self, name)}: at least 1.")
        if any(size < 1 or self.batch_size % size for size in self.peer_micro_batch_sizes):
            raise InputError(f"--peer_micro_batch_sizes={self.peer_micro_batch_sizes}: divisors of --batch_size={self.batch_size}.")


# ---------------------------------------------------------------------------------------------------------------------
# The work: a model folder and a preference file

def made_up_rows(n, seed=0):
    """Pairs whose lengths are spread like HH-RLHF's (log-normal; tokens here: prompt median 110, responses 45 and 34)."""
    rng = random.Random(seed)

    def text(median, sigma, least):
        words = max(least, round(rng.lognormvariate(0, sigma) * median / 3.6))
        return "".join(" " + "".join(rng.choice("aeioubcdfglmnprst") for _ in range(rng.randint(2, 7))) for _ in range(words))
    for _ in range(n):
        yield {"prompt": f"\n\nHuman:{text(110, 0.85, 5)}\n\nAssistant:", "chosen": text(45, 0.9, 2), "rejected": text(34, 0.9, 2)}


def made_up_tokenizer(folder):
    """A byte-pair vocabulary of 32,000 in tiktoken's format: all bytes and as many pairs of bytes, letters first."""
    order = sorted(range(256), key=lambda byte: (not chr(byte).isalpha() or byte > 127, byte != 32, byte))
    ranks = [bytes([byte]) for byte in range(256)] + [bytes([a, b]) for a in order for b in order][:32000 - 256 - 256]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n"
                                                    for rank, token in enumerate(ranks)))


def prepare(settings, folder):
    """folder/model (fresh weights, seed 0) and folder/pairs.jsonl -> (number of parameters, flops of a forward a token in the
    blocks, the same in the head); attention not counted."""
    s, place = settings, folder / "model"
    if s.tokenizer:
        place.mkdir(parents=True)
        data.load_tokenizer(s.tokenizer).save(place)
    else:
        made_up_tokenizer(place)
    tokenizer = data.load_tokenizer(place)
    config = model.parse_config(dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=tokenizer.vocab_size, hidden_size=s.width,
        intermediate_size=s.ffn, num_hidden_layers=s.layers, num_attention_heads=s.heads, num_key_value_heads=s.heads,
        max_position_embeddings=2048, rms_norm_eps=1e-5, hidden_act="silu", bos_token_id=1, eos_token_id=2))
    net = model.Transformer(config).initialise(0)
    model.save(net, place)
    if s.data:
        rows, report = data.read_rows(s.data, "pairs")
        print(report)
        rows = [{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in rows]
    else:
        rows = made_up_rows(1000)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    blocks = sum(weight.numel() for weight in net.blocks.parameters())
    return sum(weight.numel() for weight in net.parameters()), 2 * blocks, 2 * net.head.weight.numel()


# ---------------------------------------------------------------------------------------------------------------------
# Turns

class Done(Exception):
    """The other end has seen enough."""


class Turns:
    """A side's end of the pipe: tell what was computed, then make one step each time it is asked to."""

    def __init__(self, pipe, device):
        self.pipe, self.device, self.ready = pipe, device, False

    def say(self, **facts):
        """Facts for the other side and for the check; then stepping begins, and memory is counted from here."""
        self.pipe.send(facts)
        self.ready = True
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif os.path.exists("/proc/self/clear_refs"):
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")

    def __enter__(self):
        if not self.pipe.recv():
            raise Done
        self.started = time.perf_counter()

    def __exit__(self, *problem):
        if problem[0] is None:
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.pipe.send(time.perf_counter() - self.started)

    def peak(self):
        """Bytes, the largest so far."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        if os.path.exists("/proc/self/status"):
            return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def side(work, settings, folder, pipe, log, **more):
    """What runs in a side's process; what it prints goes into `log`."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if work.__name__.startswith("our"):
        cli.keep_freed_memory()                # as the command lines of this project do
    device = sample.pick_device(settings.device)
    turns = Turns(pipe, device)
    try:
        work(settings, folder, device, turns, **more)
    except Done:
        pipe.send(turns.peak())


class Side:
    """The parent's end: a process that has been asked to make ready, or to make one step."""

    def __init__(self, name, work, settings, folder, **more):
        self.name, self.seconds = name, []
        self.log = folder / (re.sub(r"\W+", "-", name) + ".log")
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=side, args=(work, settings, folder, theirs, self.log), kwargs=more, daemon=True)
        self.process.start()
        theirs.close()
        self.facts = self.hear()
        if "flags" in self.facts:
            print(f"  {name}: {' '.join(f'{key}={value}' for key, value in self.facts['flags'].items())}", flush=True)

    def hear(self):
        try:
            return self.pipe.recv()
        except EOFError:
            raise InputError(f"{self.name} ended early:\n{self.log.read_text()[-3000:]}") from None

    def step(self, counts=True):
        self.pipe.send(True)
        seconds = self.hear()
        if counts:
            self.seconds.append(seconds)

    def stop(self):
        self.pipe.send(False)
        self.peak = self.hear()
        self.process.join()
        self.median = statistics.median(self.seconds)


def alternate(sides, rounds):
    """Warm up, then let all take turns in an order that turns too; then stop them."""
    for one in sides:
        one.step(counts=False)
    for i in range(rounds):
        for one in sides[i % len(sides):] + sides[:i % len(sides)]:
            one.step()
    for one in sides:
        one.stop()


TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


def agree(ours, peer, tolerance):
    """Both sides must have computed the same; relative to the size of the numbers, which are sums over many tokens."""
    for key in ours.facts["check"]:
        a, b = (torch.tensor(x.facts["check"][key], dtype=torch.float64) for x in (ours, peer))
        if a.shape != b.shape or ((a - b).abs() > tolerance * b.abs().clamp_min(1)).any():
            raise InputError(f"{ours.name} and {peer.name} disagree on {key}: {a.flatten()[:4].tolist()} and "
                             f"{b.flatten()[:4].tolist()}.")


# ---------------------------------------------------------------------------------------------------------------------
# Training steps

def our_settings(s, folder, device, recipe, **more):
    return train.Settings(recipe=recipe, model=str(folder / "model"), data=[str(folder / "pairs.jsonl")], device=device,
                          out_dir=str(folder / f"out-{os.getpid()}"), steps=10_000, batch_size=s.batch_size,
                          micro_batch_size=s.micro_batch_size, max_length=s.max_length, optimizer="adamw", lr=1e-6,
                          grad_clip=1.0, warmup_steps=0, dtype=s.dtype, chat="hh", **more)


def our_pairs(s, folder, device, turns, recipe, cached=False):
    """A DPO or Sr-DPO step of train.py."""
    more = {"reference_cache": str(folder / "cache")} if cached else {}
    trainer = train.Trainer(our_settings(s, folder, device, recipe, **more))
    trainer.begin()
    batches = [[row for _, row in trainer.share(step)] for step in range(s.rounds + 1)]
    with torch.no_grad():
        logprobs = losses.logprobs(trainer.policy, *train.pack_pairs(batches[0], "x"))
    turns.say(batches=[[(pair.x, pair.chosen, pair.rejected) for pair in batch] for batch in batches],
              check={"log-probabilities": logprobs.tolist(),
                     "tokens": [len(pair.x + y) for pair in batches[0] for y in (pair.chosen, pair.rejected)]})
    for step in range(10_000):
        with turns:
            trainer.update(step)


def words(folder):
    """A tokenizer for transformers that reads "17 5 9" as the ids 17, 5, 9: both sides get the same tokens."""
    import tokenizers
    import transformers
    vocab = {str(id): id for id in range(model.read_config(folder / "model").vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="2", pad_token="0", unk_token="0")


def peer_model(folder, device, dtype="float32"):
    import transformers
    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, dtype),
                                                             attn_implementation="sdpa").to(device)


def trl_arguments(s, folder, micro, **more):
    """Every flag of the peer that is not its default."""
    return dict(output_dir=str(folder / f"trl-{os.getpid()}"), per_device_train_batch_size=micro,
                gradient_accumulation_steps=s.batch_size // micro, gradient_checkpointing=False, bf16=s.dtype == "bfloat16",
                max_steps=10_000, learning_rate=1e-6, weight_decay=0.0, max_grad_norm=1.0, lr_scheduler_type="constant",
                optim="adamw_torch_fused", beta=0.1, max_length=s.max_length, logging_strategy="no", save_strategy="no",
                report_to=[], dataloader_num_workers=0, disable_tqdm=True, **more)


def in_turn(turns):
    """A callback for transformers' Trainer that makes each optimizer step wait for its turn."""
    import transformers

    class InTurn(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            turns.__enter__()

        def on_step_end(self, *args, **kwargs):
            turns.__exit__(None)
    return InTurn()


def peer_pairs(s, folder, device, turns, micro, batches, cached=False):
    """A DPO step of TRL's DPOTrainer."""
    import datasets
    import trl
    rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pair)) for batch in batches for pair in batch]
    arguments = trl_arguments(s, folder, micro, precompute_ref_log_probs=cached)

    class Prepared(trl.DPOTrainer):
        """The rows are ids already, in the order in which the other side takes them."""
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = Prepared(model=peer_model(folder, device), ref_model=None if cached else peer_model(folder, device),
                       args=trl.DPOConfig(**arguments, use_cpu=device == "cpu"), train_dataset=datasets.Dataset.from_list(rows),
                       processing_class=words(folder), callbacks=[in_turn(turns)])
    batch = trainer.data_collator(rows[:s.batch_size])
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, {k: v.to(device) for k, v in batch.items()})
    turns.say(flags=arguments,
              check={"log-probabilities": torch.stack((chosen, rejected), 1).flatten().float().tolist(),
                     "tokens": [len(row["prompt_ids"]) + len(row[name]) for row in rows[:s.batch_size]
                                for name in ("chosen_ids", "rejected_ids")]})
    trainer.train()


def our_sft(s, folder, device, turns):
    """An SFT step of train.py on the chosen responses."""
    trainer = train.Trainer(our_settings(s, folder, device, "sft"))
    trainer.begin()
    batches = [[row for _, row in trainer.share(step)] for step in range(s.rounds + 1)]
    with torch.no_grad():
        logprobs = losses.logprobs(trainer.policy, data.pack([e.ids for e in batches[0]]), [e.start for e in batches[0]])
    turns.say(batches=[[(e.ids, e.start) for e in batch] for batch in batches],
              amount=statistics.mean(sum(len(e.ids) for e in batch) for batch in batches),
              check={"log-probability": [logprobs.sum().item()]})
    for step in range(10_000):
        with turns:
            trainer.update(step)


def peer_sft(s, folder, device, turns, micro, batches):
    """transformers and the plain loop: padded rows, labels -100 in front, AdamW."""
    net = peer_model(folder, device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6, weight_decay=0.0, fused=True)

    def padded(rows):
        longest = max(len(ids) for ids, _ in rows)
        tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows], device=device)
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows], device=device)
        labels = torch.tensor([[-100] * start + ids[start:] + [-100] * (longest - len(ids)) for ids, start in rows], device=device)
        with torch.autocast(device, torch.bfloat16, enabled=s.dtype == "bfloat16"):
            return net(input_ids=tokens, attention_mask=mask, labels=labels, num_items_in_batch=1).loss     # the sum

    with torch.no_grad():
        turns.say(check={"log-probability": [-padded(batches[0]).item()]})
    for step in range(10_000):
        rows = batches[step % len(batches)]
        total = sum(len(ids) - start for ids, start in rows)
        with turns:
            for i in range(0, len(rows), micro):
                (padded(rows[i:i + micro]) / total).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


# ---------------------------------------------------------------------------------------------------------------------
# Sampling, judging, an online step

def prompts_of(s, folder, longest):
    """The first prompts as ids, cut from the left to `longest`."""
    tokenizer = data.load_tokenizer(folder / "model")
    rows, _ = data.read_rows(folder / "pairs.jsonl", "prompts")
    return [data.encode_pair(tokenizer, row, "hh", longest, longest - 1).x for row in rows[:s.batch_size]]


def our_sampling(s, folder, device, turns):
    """sample.generate, no stop ids, so that both sides make equally many tokens."""
    net = model.load(folder / "model", getattr(torch, s.dtype), device)
    prompts = prompts_of(s, folder, 300)
    allowed = torch.ones(net.config.vocab_size, dtype=torch.bool)
    table = torch.stack([sample.uniforms(0, 0, i, s.k, s.max_tokens) for i in range(len(prompts))])
    greedy = sample.generate(net, prompts, table[:, :1, :8], set(), allowed, temperature=0)
    check = {"tokens": [s.max_tokens] * len(prompts) * s.k}
    if s.dtype == "float32":           # in bfloat16 the best two tokens may be a rounding apart
        check["greedy tokens"] = [one.ids for (one,) in greedy]
    turns.say(prompts=prompts, amount=len(prompts) * s.k * s.max_tokens, check=check)
    while True:
        with turns:
            sample.generate(net, prompts, table, set(), allowed, 0.7, 0.9)


def peer_sampling(s, folder, device, turns, prompts):
    """transformers' generate, prompts padded on the left."""
    net = peer_model(folder, device, s.dtype).eval()
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)

    def generate(n, **how):
        with torch.no_grad():
            return net.generate(input_ids=tokens, attention_mask=mask, pad_token_id=0, min_new_tokens=n, max_new_tokens=n,
                                use_cache=True, **how)[:, longest:]
    sampled = dict(do_sample=True, temperature=0.7, top_p=0.9, top_k=0, num_return_sequences=s.k)
    turns.say(flags=sampled, check={"greedy tokens": generate(8, do_sample=False).tolist(),
                     "tokens": [len(row) for row in generate(s.max_tokens, **sampled)]})
    while True:
        with turns:
            generate(s.max_tokens, **sampled)


def our_judging(s, folder, device, turns):
    """judge.label for K responses of max_tokens tokens to each prompt: the baseline, the ranking, the pairs, both orders; from
    text to strengths."""
    net, tokenizer = sample.load_model(folder / "model", s.dtype, device)
    rows, _ = data.read_rows(folder / "pairs.jsonl", "pairs")
    questioner = judge.Questioner(tokenizer, "helpful", net.config.context)
    long = [ids[:s.max_tokens] for row in rows for ids in [tokenizer.encode(row.chosen)] if len(ids) >= s.max_tokens]
    contexts = [data.context_text(row.prompt) for row in rows[:s.batch_size]]
    responses = [[tokenizer.decode(ids) for ids in long[i * s.k:(i + 1) * s.k]] for i in range(len(contexts))]
    asked, answers, answer = [], [], judge.Reading.answer

    def recorded(self, questions):
        said = answer(self, questions)
        asked.extend((question.ids, question.answers) for question in questions)
        answers.extend(said.tolist())
        return said
    judge.Reading.answer = recorded
    for context, texts in zip(contexts, responses):        # so that the peer has a prompt's instructions side by side
        judge.label(net, questioner, [context], [texts])
    judge.Reading.answer = answer
    turns.say(asked=asked, amount=len(asked), check={"P(A)": answers, "tokens": [sum(len(ids) for ids, _ in asked)]})
    while True:
        with turns:
            judge.label(net, questioner, contexts, responses)


def peer_judging(s, folder, device, turns, asked, logits_to_keep):
    """The same instructions through transformers, those of a prompt padded to one batch; logits_to_keep=0: at all positions, as
    transformers does unless told otherwise."""
    net = peer_model(folder, device, s.dtype).eval()
    size = len(asked) // s.batch_size

    @torch.no_grad()
    def read():
        said = []
        for i in range(0, len(asked), size):
            part = asked[i:i + size]
            longest = max(len(ids) for ids, _ in part)
            tokens = torch.tensor([[0] * (longest - len(ids)) + ids for ids, _ in part], device=device)
            mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in part], device=device)
            position = (mask.cumsum(-1) - 1).clamp_min(0)
            logits = net(input_ids=tokens, attention_mask=mask, position_ids=position, use_cache=False,
                         logits_to_keep=logits_to_keep).logits[:, -1].float()
            said += [(row[a] - row[b]).sigmoid().item() for row, (_, (a, b)) in zip(logits, part)]
        return said
    turns.say(check={"P(A)": read(), "tokens": [sum(len(ids) for ids, _ in asked)]})
    while True:
        with turns:
            read()


def our_online(s, folder, device, turns):
    """An online step of train.py at K = 2 with a constant reward: the first response wins, and SPCE at p = 1 is DPO."""
    settings = our_settings(s, folder, device, "osp", k=2, beta=0.1, max_tokens=s.max_tokens, temperature=0.7, top_p=0.9,
                            prompts=[str(folder / "pairs.jsonl")])
    trainer = train.Trainer(settings)
    trainer.begin()
    judge.label = lambda net, questioner, contexts, texts, pairing: ([[(0, 1, 1.0)]] * len(texts), [[1.0, 0.0]] * len(texts), 1, 0, 0)
    trainer.stop_ids, trainer.allowed = set(), torch.ones(trainer.policy.config.vocab_size, dtype=torch.bool)
    prompts = [row.x for step in range(s.rounds + 1) for _, row in trainer.share(step)]
    with torch.no_grad():
        check = losses.logprobs(trainer.policy, data.pack(prompts[:4]), [1] * 4)
    turns.say(prompts=prompts, amount=2 * s.batch_size * s.max_tokens, check={"log-probabilities": check.tolist()})
    for step in range(10_000):
        with turns:
            trainer.update(step)


def peer_online(s, folder, device, turns, micro, prompts):
    """TRL's OnlineDPOTrainer with a constant reward."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import datasets
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
    arguments = trl_arguments(s, folder, micro, max_new_tokens=s.max_tokens, temperature=0.7, top_p=0.9,
                              generation_kwargs={"min_new_tokens": s.max_tokens})
    net = peer_model(folder, device)

    class InOrder(OnlineDPOTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)
    trainer = InOrder(
        model=net, ref_model=peer_model(folder, device), reward_funcs=lambda prompts, completions, **more: [0.0] * len(completions),
        args=OnlineDPOConfig(**arguments, use_cpu=device == "cpu"), processing_class=words(folder), callbacks=[in_turn(turns)],
        train_dataset=datasets.Dataset.from_list([{"prompt": " ".join(map(str, ids))} for ids in prompts]))
    with torch.no_grad():
        check = [net(torch.tensor([ids], device=device)).logits[0, :-1].float().log_softmax(-1)
                 .gather(-1, torch.tensor(ids[1:], device=device)[:, None]).sum().item() for ids in prompts[:4]]
    turns.say(flags=arguments, check={"log-probabilities": check})
    trainer.train()


# ---------------------------------------------------------------------------------------------------------------------
# Rows of the table

@dataclass
class Line:
    """What is printed of two sides: `units` of work a step, so that a rate can stand beside the ratio."""
    what: str
    ours: Side
    peer: Side
    units: float
    unit: str

    def figures(self):
        return {"what": self.what, "ours_s": self.ours.median, "peer_s": self.peer.median,
                "ratio": self.peer.median / self.ours.median,
                "spread": [min(self.ours.seconds), max(self.ours.seconds), min(self.peer.seconds), max(self.peer.seconds)],
                "rate": self.units / self.ours.median, "peer_rate": self.units / self.peer.median, "unit": self.unit,
                "ours_bytes": self.ours.peak, "peer_bytes": self.peer.peak, "memory": self.ours.peak / self.peer.peak}


def show(lines):
    found = [line.figures() for line in lines]
    for f in found:
        print(f"{f['what']:<44} {f['ours_s']:8.2f} {f['peer_s']:8.2f} {f['ratio']:6.2f}x  {f['rate']:9.1f} {f['peer_rate']:9.1f} "
              f"{f['unit']:<15} {f['ours_bytes'] / 2**30:6.2f} {f['peer_bytes'] / 2**30:6.2f} {f['memory']:6.2f}", flush=True)
    return found


HEADER = (f"{'':<44} {'ours s':>8} {'peer s':>8} {'ratio':>7}  {'ours':>9} {'peer':>9} {'a second':<15} {'GiB':>6} {'peer':>6} "
          f"{'share':>6}")


def row_pairs(s, folder, cached):
    """DPO and Sr-DPO beside TRL's DPO at each of its micro-batches, and Sr-DPO beside our own DPO."""
    note = ", cached" if cached else ""
    dpo = Side(f"our DPO{note}", our_pairs, s, folder, recipe="dpo", cached=cached)
    refined = Side(f"our Sr-DPO{note}", our_pairs, s, folder, recipe="sr-dpo", cached=cached)
    peers = []
    for micro in s.peer_micro_batch_sizes:
        peers.append(Side(f"TRL DPO, micro {micro}{note}", peer_pairs, s, folder, micro=micro, batches=dpo.facts["batches"],
                          cached=cached))
        agree(dpo, peers[-1], TOLERANCE[s.dtype])
    alternate([dpo, refined, *peers], s.rounds)
    n = s.batch_size
    return [*(Line(f"DPO step / {peer.name}", dpo, peer, n, "pairs") for peer in peers),
            Line(f"Sr-DPO step / {peers[0].name}", refined, peers[0], n, "pairs"),
            Line(f"Sr-DPO step{note} / our DPO", refined, dpo, n, "pairs")]


def row_simple(what, ours, peer, unit, passes, name=None, variants=None):
    """A row of one kind of work beside variants of a peer, {name: arguments}; or beside `name` at each of its micro-batches.
    `passes`: which of our facts the peer is given, so that it works on the same."""
    def row(s, folder):
        left = Side(f"our {what}", ours, s, folder)
        given = {key: left.facts[key] for key in passes}
        kinds = variants or {f"{name}, micro {size}": {"micro": size} for size in s.peer_micro_batch_sizes}
        rights = []
        for kind, arguments in kinds.items():
            rights.append(Side(f"{what} / {kind}", peer, s, folder, **given, **arguments))
            agree(left, rights[-1], TOLERANCE[s.dtype])
        alternate([left, *rights], s.rounds)
        return [Line(right.name, left, right, left.facts["amount"], unit) for right in rights]
    return row


# ---------------------------------------------------------------------------------------------------------------------
# Ours alone: cost against K, the prompt's length, the number of rows

def timed(work, rounds):
    work()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def row_k(s, folder):
    """Seconds of sampling and of judging K responses a prompt, and how many times those of one."""
    device = sample.pick_device(s.device)
    net, tokenizer = sample.load_model(folder / "model", s.dtype, device)
    rows, _ = data.read_rows(folder / "pairs.jsonl", "pairs")
    questioner, prompts = judge.Questioner(tokenizer, "helpful", net.config.context), prompts_of(s, folder, 300)[:2]
    allowed, found = torch.ones(net.config.vocab_size, dtype=torch.bool), []
    texts = [text for row in rows for text in (row.chosen, row.rejected)]
    print(f"\n{len(prompts)} prompts, {s.max_tokens} tokens a sample{'':>10} sampling   judging   (seconds; in brackets: "
          f"over K = 1)")
    for k in (1, 3, 7, 15):
        table = torch.stack([sample.uniforms(0, 0, i, k, s.max_tokens) for i in range(len(prompts))])
        contexts = [data.context_text(row.prompt) for row in rows[:len(prompts)]]
        responses = [texts[i * k:(i + 1) * k] for i in range(len(prompts))]
        one = {"K": k, "sampling": timed(lambda: sample.generate(net, prompts, table, set(), allowed, 0.7, 0.9), s.rounds),
               "judging": timed(lambda: judge.label(net, questioner, contexts, responses), s.rounds)}
        found.append(one)
        print(f"K = {k:<40} {one['sampling']:8.2f} ({one['sampling'] / found[0]['sampling']:.2f}) "
              f"{one['judging']:8.2f} ({one['judging'] / found[0]['judging']:.2f})", flush=True)
    return found


def row_length(s, folder):
    """Seconds of a DPO step against the prompt's length, responses of 64 tokens: beside separate sequences the shared prompt
    is computed once."""
    device, found = sample.pick_device(s.device), []
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = train.Trainer(our_settings(s, folder, device, "dpo"))
        trainer.begin()
    generator = random.Random(0)
    print(f"\nDPO step, {s.batch_size} pairs, responses of 64 tokens{'':>6} seconds")
    for length in (32, 128, 256, 448):
        ids = lambda n: [generator.randrange(10, 30000) for _ in range(n)]           # noqa: E731
        trainer.data.rows = [data.Pair(ids(length), None, ids(64), ids(64), None, None, False) for _ in range(s.batch_size)]
        found.append({"prompt": length, "seconds": timed(lambda: trainer.update(0), s.rounds)})
        print(f"prompt of {length:<40} {found[-1]['seconds']:8.2f}", flush=True)
    return found


def row_size(s, folder):
    """Seconds until a data set is read, encoded and ready."""
    tokenizer, found = data.load_tokenizer(folder / "model"), []
    print(f"\nreading and encoding{'':<32} seconds   rows a second")
    source = (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for n in (1_000, 10_000, 50_000):
        path = folder / f"rows-{n}.jsonl"
        path.write_text("".join((source * (n // len(source) + 1))[:n]), encoding="utf-8")

        def read():
            rows, _ = data.read_rows(path, "pairs")
            data.encode_dataset(tokenizer, rows, "hh", s.max_length, s.max_length // 2)
        found.append({"rows": n, "seconds": timed(read, 1)})
        print(f"{n:<50,} {found[-1]['seconds']:8.2f} {n / found[-1]['seconds']:12.0f}", flush=True)
    return found


ROWS = {
    "dpo": lambda s, folder: row_pairs(s, folder, cached=False),
    "dpo-cached": lambda s, folder: row_pairs(s, folder, cached=True),
    "sampling": row_simple("sampling", our_sampling, peer_sampling, "tokens", ["prompts"], variants={"generate": {}}),
    "judging": row_simple("judging", our_judging, peer_judging, "instructions", ["asked"],
                          variants={"padded forward": {"logits_to_keep": 0}, "padded, last logits only": {"logits_to_keep": 1}}),
    "online": row_simple("online step", our_online, peer_online, "sampled tokens", ["prompts"], "TRL"),
    "sft": row_simple("SFT step", our_sft, peer_sft, "tokens", ["batches"], "plain loop"),
    "k": row_k, "length": row_length, "size": row_size,
}


def machine(dtype, device):
    """Measured flops a second of a large matrix product: the floor under every time here."""
    a = torch.randn(2048, 2048, device=device, dtype=getattr(torch, dtype))

    def product():
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
    return 2 * 2048 ** 3 / min(timed(product, 1) for _ in range(8))


def main(settings):
    """Make the work, then measure and print row after row."""
    s, results = settings, {}
    if s.threads:
        torch.set_num_threads(s.threads)
    device = sample.pick_device(s.device)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        parameters, blocks, head = prepare(s, folder)
        speed = machine(s.dtype, device)
        print(f"{parameters / 1e6:.1f} M parameters, {s.dtype} on {torch.cuda.get_device_name() if device == 'cuda' else device}, "
              f"{torch.get_num_threads()} threads, a matrix product runs at {speed / 1e9:.0f} Gflop/s; a forward takes "
              f"{blocks / 1e6:.0f} Mflop a token in the blocks and {head / 1e6:.0f} in the head; "
              f"{s.rounds} rounds\n{HEADER}", flush=True)
        for row in s.rows:
            found = ROWS[row](s, folder)
            results[row] = show(found) if found and isinstance(found[0], Line) else found
    if s.out:
        Path(s.out).write_text(json.dumps({"settings": dataclasses.asdict(s), "gflops": speed / 1e9, "rows": results}, indent=1))


if __name__ == "__main__":
    cli.run(main, Settings)
