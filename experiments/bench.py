"""Osprey beside what one would otherwise use: the same weights, tokens, type and optimizer, a step of each in
turn.

    make bench                                                     in an environment of its own (the bench
    extra)
    python -m experiments.bench --data=hh.jsonl.gz --tokenizer=DIR --rows=dpo,sampling --rounds=5

Each side is a process that waits for its turn, so that weather on the machine meets both. A row is checked
before it is timed (both sides must compute the same numbers on the same tokens), and gives medians over the
rounds. Memory is the largest resident set of the whole process while it steps; on CUDA what torch had
allocated. Peers run without gradient checkpointing, with scaled-dot-product attention, at each micro-batch
that --peer_micro_batch_sizes lists: a line each.

Nothing here is imported by the rest. Letters: P prompts, K samples per prompt.
"""
import base64
import contextlib
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import random
import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import forest
import judge
import losses
import model
import recipes
import sample
import train
from support import cli, rows
from support.cli import InputError, setting
from support.ranks import pick_device
from support.tokenizer import load_tokenizer

ROWS = "dpo dpo-cached sampling judging online sft k length size".split()


@dataclass
class Settings:
    """Measure Osprey beside TRL and transformers."""
    rows: list[str] = setting(ROWS, "what to measure", choices=ROWS)
    rounds: int = setting(5, "turns of each side that count; one more warms up", least=1)
    dtype: str = setting("float32", "of the computation", choices=("float32", "bfloat16"))
    data: str | None = setting(None, "preference pairs; default: made-up texts of HH-RLHF's lengths")
    tokenizer: str | None = setting(None, "folder of the tokenizer; default: a made-up byte-pair vocabulary")
    width: int = setting(512, "of the model, a Llama with fresh weights", least=1)
    layers: int = setting(8, "of the model", least=1)
    heads: int = setting(8, "of the model", least=1)
    ffn: int = setting(1408, "width of its feed-forward layers", least=1)
    batch_size: int = setting(8, "pairs or prompts per step", least=1)
    micro_batch_size: int = setting(2, "of ours", least=1)
    peer_micro_batch_sizes: list[int] = setting([8, 1], "of the peer, each measured", least=1)
    max_length: int = setting(512, "tokens of prompt and response", least=3)
    max_tokens: int = setting(64, "tokens of a sampled response", least=1)
    k: int = setting(7, "samples per prompt", least=1)
    threads: int = setting(0, "of each side; 0: as torch finds", least=0)
    device: str = setting("auto", "auto, cpu, cuda")
    out: str | None = setting(None, "also write the figures here, as JSON")

    def __post_init__(self):
        cli.check(self)
        if any(self.batch_size % size for size in self.peer_micro_batch_sizes):
            sizes = cli.typed(self.peer_micro_batch_sizes)
            raise InputError(f"--peer_micro_batch_sizes={sizes}: must be divisors of --batch_size.")


# ------------------------------------------------------------------------------------------------------------
# The work: a model folder and a preference file

def made_up_rows(n, seed=0):
    """Pairs whose lengths are spread like HH-RLHF's (log-normal; tokens here: prompt median 110, responses 45
    and 34)."""
    rng = random.Random(seed)

    def text(median, sigma, least):
        words = max(least, round(rng.lognormvariate(0, sigma) * median / 3.6))
        return "".join(" " + "".join(rng.choice("aeioubcdfglmnprst") for _ in range(rng.randint(2, 7)))
                       for _ in range(words))
    for _ in range(n):
        yield {"prompt": f"\n\nHuman:{text(110, 0.85, 5)}\n\nAssistant:", "chosen": text(45, 0.9, 2),
               "rejected": text(34, 0.9, 2)}


def made_up_tokenizer(folder):
    """A byte-pair vocabulary of 32,000 in tiktoken's format: all bytes and as many pairs of bytes, letters
    first."""
    order = sorted(range(256), key=lambda byte: (not chr(byte).isalpha() or byte > 127, byte != 32, byte))
    pairs = [bytes([a, b]) for a in order for b in order]
    tokens = [bytes([byte]) for byte in range(256)] + pairs[:32000 - 256 - 256]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_text("".join(lines))


def prepare(settings, folder):
    """folder/model (fresh weights, seed 0) and folder/pairs.jsonl.

    Returns (number of parameters, flops of a forward per token in the blocks, the same in the head);
    attention is not counted.
    """
    s, place = settings, folder / "model"
    if s.tokenizer:
        place.mkdir(parents=True)
        load_tokenizer(s.tokenizer).save(place)
    else:
        made_up_tokenizer(place)
    config = model.parse_config(dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=load_tokenizer(place).vocab_size,
        hidden_size=s.width, intermediate_size=s.ffn, num_hidden_layers=s.layers, num_attention_heads=s.heads,
        num_key_value_heads=s.heads, max_position_embeddings=2048, rms_norm_eps=1e-5, hidden_act="silu",
        bos_token_id=1, eos_token_id=2))
    net = model.Transformer(config).initialise(0)
    model.save(net, place)
    pairs = made_up_rows(1000)
    if s.data:
        found, report = rows.read_rows(s.data, "pairs")
        print(report)
        pairs = [{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in found]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    blocks = sum(weight.numel() for weight in net.blocks.parameters())
    return sum(weight.numel() for weight in net.parameters()), 2 * blocks, 2 * net.head.weight.numel()


# ------------------------------------------------------------------------------------------------------------
# Turns

class Done(Exception):
    """The other end has seen enough."""


class Turns:
    """A side's end of the pipe: tell what was computed, then make one step each time it is asked to."""

    def __init__(self, pipe, device):
        self.pipe, self.device, self.ready = pipe, device, False

    def say(self, **facts):
        """Facts for the other side and for the check; then stepping begins, and memory is counted from
        here."""
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
        status = Path("/proc/self/status")
        if status.exists():
            return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
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
    device = pick_device(settings.device)
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
        self.process = context.Process(target=side, args=(work, settings, folder, theirs, self.log),
                                       kwargs=more, daemon=True)
        self.process.start()
        theirs.close()
        self.facts = self.hear()
        if "flags" in self.facts:
            print(f"  {name}:", *(f"{key}={value}" for key, value in self.facts["flags"].items()), flush=True)

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
    """Both sides must have computed the same, relative to the size of the numbers: sums over many tokens."""
    for key in ours.facts["check"]:
        a, b = (torch.tensor(x.facts["check"][key], dtype=torch.float64) for x in (ours, peer))
        if a.shape != b.shape or ((a - b).abs() > tolerance * b.abs().clamp_min(1)).any():
            first, second = (x.flatten()[:4].tolist() for x in (a, b))
            raise InputError(f"{ours.name} and {peer.name} disagree on {key}: {first} and {second}.")


# ------------------------------------------------------------------------------------------------------------
# Training steps

FOREVER = 10_000             # steps; whoever takes turns ends it before


def our_trainer(s, folder, device, recipe, **more):
    """A Trainer on the pairs of the folder, its next step 0."""
    trainer = train.Trainer(recipes.Settings(
        recipe=recipe, model=str(folder / "model"), data=[str(folder / "pairs.jsonl")],
        out_dir=str(folder / f"out-{os.getpid()}"), steps=FOREVER, batch_size=s.batch_size,
        micro_batch_size=s.micro_batch_size, max_length=s.max_length, optimizer="adamw", lr=1e-6,
        grad_clip=1.0, warmup_steps=0, dtype=s.dtype, device=device, chat="hh", show_prompts=0, **more))
    trainer.out.path.mkdir(parents=True, exist_ok=True)         # as its run would
    return trainer


def step_in_turn(turns, step):
    """step(0), step(1), …, each when it is this side's turn."""
    for number in range(FOREVER):
        with turns:
            step(number)


def our_pairs(s, folder, device, turns, recipe, cached=False):
    """A DPO or Sr-DPO step of train.py."""
    more = {"reference_cache": str(folder / "cache")} if cached else {}
    trainer = our_trainer(s, folder, device, recipe, **more)
    batches = [trainer.batch(step) for step in range(s.rounds + 1)]
    with torch.no_grad():
        logprobs = losses.logprobs(trainer.policy, *train.pack_pairs(batches[0], "x"))
    tokens = [len(pair.x + y) for pair in batches[0] for y in (pair.chosen, pair.rejected)]
    turns.say(batches=[[(pair.x, pair.chosen, pair.rejected) for pair in batch] for batch in batches],
              check={"log-probabilities": logprobs.tolist(), "tokens": tokens})
    step_in_turn(turns, trainer.update)


def words(folder):
    """A tokenizer for transformers that reads "17 5 9" as the ids 17, 5, 9: both sides get the same
    tokens."""
    import tokenizers
    import transformers
    vocab = {str(id): id for id in range(model.read_config(folder / "model").vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="2", pad_token="0",
                                                unk_token="0")


def peer_model(folder, device, dtype="float32"):
    import transformers
    transformers.logging.set_verbosity_error()
    net = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, dtype),
                                                            attn_implementation="sdpa")
    return net.to(device)


def padded_left(sequences, device):
    """(ids, mask) of sequences that end together, with 0 in front."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[0] * (longest - len(one)) + one for one in sequences], device=device)
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in sequences], device=device)
    return ids, mask


def trl_arguments(s, folder, micro, **more):
    """Every flag of the peer that is not its default."""
    return dict(
        output_dir=str(folder / f"trl-{os.getpid()}"), per_device_train_batch_size=micro,
        gradient_accumulation_steps=s.batch_size // micro, max_steps=FOREVER, max_length=s.max_length,
        beta=0.1, optim="adamw_torch_fused", learning_rate=1e-6, weight_decay=0.0, max_grad_norm=1.0,
        lr_scheduler_type="constant", bf16=s.dtype == "bfloat16", gradient_checkpointing=False,
        logging_strategy="no", save_strategy="no", report_to=[], dataloader_num_workers=0, disable_tqdm=True,
        **more)


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
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    found = [dict(zip(keys, pair)) for batch in batches for pair in batch]
    arguments = trl_arguments(s, folder, micro, precompute_ref_log_probs=cached)

    class Prepared(trl.DPOTrainer):
        """The rows are ids already, in the order in which the other side takes them."""
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = Prepared(
        model=peer_model(folder, device), ref_model=None if cached else peer_model(folder, device),
        args=trl.DPOConfig(**arguments, use_cpu=device == "cpu"), processing_class=words(folder),
        train_dataset=datasets.Dataset.from_list(found), callbacks=[in_turn(turns)])
    first = found[:s.batch_size]
    batch = {key: value.to(device) for key, value in trainer.data_collator(first).items()}
    logprobs = torch.stack(trainer.compute_ref_log_probs(trainer.model, batch), 1)
    turns.say(flags=arguments,
              check={"log-probabilities": logprobs.flatten().float().tolist(),
                     "tokens": [len(row["prompt_ids"]) + len(row[name]) for row in first
                                for name in ("chosen_ids", "rejected_ids")]})
    trainer.train()


def our_sft(s, folder, device, turns):
    """An SFT step of train.py on the chosen responses."""
    trainer = our_trainer(s, folder, device, "sft")
    batches = [trainer.batch(step) for step in range(s.rounds + 1)]
    with torch.no_grad():
        logprobs = losses.logprobs(trainer.policy, forest.pack([row.ids for row in batches[0]]),
                                   [row.start for row in batches[0]])
    turns.say(batches=[[(row.ids, row.start) for row in batch] for batch in batches],
              amount=statistics.mean(sum(len(row.ids) for row in batch) for batch in batches),
              check={"log-probability": [logprobs.sum().item()]})
    step_in_turn(turns, trainer.update)


def peer_sft(s, folder, device, turns, micro, batches):
    """transformers and the plain loop: padded rows, labels -100 in front, AdamW."""
    net = peer_model(folder, device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6, weight_decay=0.0, fused=True)

    def loss(part):
        longest = max(len(ids) for ids, _ in part)

        def padded(values):
            return torch.tensor(values, device=device)
        tokens = padded([ids + [0] * (longest - len(ids)) for ids, _ in part])
        mask = padded([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in part])
        labels = padded([[-100] * start + ids[start:] + [-100] * (longest - len(ids)) for ids, start in part])
        with torch.autocast(device, torch.bfloat16, enabled=s.dtype == "bfloat16"):      # a sum:
            return net(input_ids=tokens, attention_mask=mask, labels=labels, num_items_in_batch=1).loss

    def update(step):
        batch = batches[step % len(batches)]
        total = sum(len(ids) - start for ids, start in batch)
        for i in range(0, len(batch), micro):
            (loss(batch[i:i + micro]) / total).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with torch.no_grad():
        turns.say(check={"log-probability": [-loss(batches[0]).item()]})
    step_in_turn(turns, update)


# ------------------------------------------------------------------------------------------------------------
# Sampling, judging, an online step

def prompts_of(s, folder, longest):
    """The first prompts as ids, cut from the left to `longest`."""
    tokenizer = load_tokenizer(folder / "model")
    found, _ = rows.read_rows(folder / "pairs.jsonl", "prompts")
    chat = data.chat_of(tokenizer, "hh")
    return [data.encode_pair(tokenizer, row, chat, longest, longest - 1).x for row in found[:s.batch_size]]


def sampled(net, prompts, k, max_tokens, temperature=0.7):
    """sample.generate, no stop ids, so that both sides make equally many tokens: P lists of K samples."""
    allowed = torch.ones(net.config.vocab_size, dtype=torch.bool)
    return list(sample.sample_prompts(net, prompts, k, max_tokens, 0, 0, set(), allowed, temperature, 0.9,
                                      at_a_time=len(prompts)))


def our_sampling(s, folder, device, turns):
    net = model.load(folder / "model", getattr(torch, s.dtype), device)
    prompts = prompts_of(s, folder, 300)
    check = {"tokens": [s.max_tokens] * len(prompts) * s.k}
    if s.dtype == "float32":           # in bfloat16 the best two tokens may be a rounding apart
        check["greedy tokens"] = [one.ids for (one,) in sampled(net, prompts, 1, 8, temperature=0)]
    turns.say(prompts=prompts, amount=len(prompts) * s.k * s.max_tokens, check=check)
    step_in_turn(turns, lambda _: sampled(net, prompts, s.k, s.max_tokens))


def peer_sampling(s, folder, device, turns, prompts):
    """transformers' generate, prompts padded on the left."""
    net = peer_model(folder, device, s.dtype).eval()
    tokens, mask = padded_left(prompts, device)

    @torch.no_grad()
    def generate(n, **how):
        ids = net.generate(input_ids=tokens, attention_mask=mask, pad_token_id=0, use_cache=True,
                           min_new_tokens=n, max_new_tokens=n, **how)
        return ids[:, tokens.shape[1]:]
    how = dict(do_sample=True, temperature=0.7, top_p=0.9, top_k=0, num_return_sequences=s.k)
    turns.say(flags=how, check={"greedy tokens": generate(8, do_sample=False).tolist(),
                                "tokens": [len(row) for row in generate(s.max_tokens, **how)]})
    step_in_turn(turns, lambda _: generate(s.max_tokens, **how))


def label(net, judge_prompt, contexts, responses):
    """Algorithm 1 after sampling, as in train.Trainer.rollout, for P prompts with K responses each.

    Returns P lists of K strengths, P lists of (winner, loser, p), the Verdicts of all.
    """
    strengths, pairs, verdicts = [], [], []
    for judge_pass in judge.ranking_passes(net, judge_prompt, contexts, responses):
        ranked = judge_pass.rank()
        pairs += judge_pass.ask([judge.ranked_pairs(one) for one in ranked])
        strengths += ranked
        verdicts += judge_pass.verdicts
    return strengths, pairs, judge.Verdicts.join(verdicts)


def our_judging(s, folder, device, turns):
    """label() for K responses of max_tokens tokens to each prompt: the baseline, the ranking, the pairs, both
    orders; from text to strengths."""
    net, tokenizer = sample.load_model(folder / "model", s.dtype, device)
    found, _ = rows.read_rows(folder / "pairs.jsonl", "pairs")
    judge_prompt = judge.JudgePrompt(tokenizer, "helpful", net.config.context)
    long = [ids[:s.max_tokens] for ids in map(tokenizer.encode, (row.chosen for row in found))
            if len(ids) >= s.max_tokens]
    contexts = [data.context_text(row.prompt) for row in found[:s.batch_size]]
    responses = [[tokenizer.decode(ids) for ids in long[i * s.k:(i + 1) * s.k]] for i in range(len(contexts))]
    asked, answers, answer = [], [], judge.JudgePass.answer

    def recorded(self, questions):
        said = answer(self, questions)
        asked.extend((question.ids, question.answers) for question in questions)
        answers.extend(said[0].tolist())
        return said
    judge.JudgePass.answer = recorded
    # One by one, so that the peer has a prompt's instructions side by side.
    for context, texts in zip(contexts, responses):
        label(net, judge_prompt, [context], [texts])
    judge.JudgePass.answer = answer
    turns.say(asked=asked, amount=len(asked),
              check={"P(A)": answers, "tokens": [sum(len(ids) for ids, _ in asked)]})
    step_in_turn(turns, lambda _: label(net, judge_prompt, contexts, responses))


def peer_judging(s, folder, device, turns, asked, logits_to_keep):
    """The same instructions through transformers, those of a prompt padded to one batch; logits_to_keep=0: at
    all positions, as transformers does unless told otherwise."""
    net = peer_model(folder, device, s.dtype).eval()
    size = len(asked) // s.batch_size

    @torch.no_grad()
    def read():
        said = []
        for i in range(0, len(asked), size):
            part = asked[i:i + size]
            tokens, mask = padded_left([ids for ids, _ in part], device)
            position = (mask.cumsum(-1) - 1).clamp_min(0)
            logits = net(input_ids=tokens, attention_mask=mask, position_ids=position, use_cache=False,
                         logits_to_keep=logits_to_keep).logits[:, -1].float()
            said += [(row[a] - row[b]).sigmoid().item() for row, (_, (a, b)) in zip(logits, part)]
        return said
    turns.say(check={"P(A)": read(), "tokens": [sum(len(ids) for ids, _ in asked)]})
    step_in_turn(turns, lambda _: read())


class ConstantPass:
    """Stands for judge.RankingPass: the first of two responses always wins."""

    def __init__(self, prompts):
        self.prompts, self.verdicts = prompts, []

    def rank(self):
        return [[1.0, 0.0] for _ in self.prompts]

    def ask(self, pairs):
        return [[(0, 1, 1.0)] for _ in pairs]


def our_online(s, folder, device, turns):
    """An online step of train.py at K = 2 with a constant reward: the first response wins, and SPCE at p = 1
    is DPO."""
    trainer = our_trainer(s, folder, device, "osp", k=2, beta=0.1, max_tokens=s.max_tokens, temperature=0.7,
                          top_p=0.9, prompts=[str(folder / "pairs.jsonl")])
    judge.ranking_passes = lambda net, prompt, contexts, texts: [ConstantPass(range(len(contexts)))]
    trainer.stop_ids = set()
    trainer.allowed = torch.ones(trainer.policy.config.vocab_size, dtype=torch.bool)
    prompts = [row.x for step in range(s.rounds + 1) for row in trainer.batch(step)]
    with torch.no_grad():
        check = losses.logprobs(trainer.policy, forest.pack(prompts[:4]), [1] * 4)
    turns.say(prompts=prompts, amount=2 * s.batch_size * s.max_tokens,
              check={"log-probabilities": check.tolist()})
    step_in_turn(turns, trainer.update)


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
        model=net, ref_model=peer_model(folder, device), processing_class=words(folder),
        reward_funcs=lambda prompts, completions, **more: [0.0] * len(completions),
        args=OnlineDPOConfig(**arguments, use_cpu=device == "cpu"), callbacks=[in_turn(turns)],
        train_dataset=datasets.Dataset.from_list([{"prompt": " ".join(map(str, ids))} for ids in prompts]))
    check = []
    with torch.no_grad():
        for ids in prompts[:4]:
            ids = torch.tensor([ids], device=device)
            logprobs = net(ids).logits[0, :-1].float().log_softmax(-1)
            check.append(logprobs.gather(-1, ids[0, 1:, None]).sum().item())
    turns.say(flags=arguments, check={"log-probabilities": check})
    trainer.train()


# ------------------------------------------------------------------------------------------------------------
# Rows of the table

@dataclass
class Line:
    """What is printed of two sides: `units` of work per step, so that a rate can stand beside the ratio."""
    what: str
    ours: Side
    peer: Side
    units: float
    unit: str

    def figures(self):
        ours, peer = self.ours, self.peer
        return {"what": self.what, "ours_s": ours.median, "peer_s": peer.median,
                "ratio": peer.median / ours.median,
                "spread": [bound(side.seconds) for side in (ours, peer) for bound in (min, max)],
                "rate": self.units / ours.median, "peer_rate": self.units / peer.median, "unit": self.unit,
                "ours_bytes": ours.peak, "peer_bytes": peer.peak, "memory": ours.peak / peer.peak}


COLUMNS = "{:<44} {:>8} {:>8} {:>7}  {:>9} {:>9} {:<15} {:>6} {:>6} {:>6}"
HEADER = COLUMNS.format("", "ours s", "peer s", "ratio", "ours", "peer", "per second", "GiB", "peer", "share")


def show(lines):
    found = [line.figures() for line in lines]
    for f in found:
        ours, peer = (f"{f[key] / 2 ** 30:.2f}" for key in ("ours_bytes", "peer_bytes"))
        print(COLUMNS.format(
            f["what"], f"{f['ours_s']:.2f}", f"{f['peer_s']:.2f}", f"{f['ratio']:.2f}x", f"{f['rate']:.1f}",
            f"{f['peer_rate']:.1f}", f["unit"], ours, peer, f"{f['memory']:.2f}"), flush=True)
    return found


def row_pairs(s, folder, cached=False):
    """DPO and Sr-DPO beside TRL's DPO at each of its micro-batches, and Sr-DPO beside our own DPO."""
    note = ", cached" if cached else ""
    dpo = Side(f"our DPO{note}", our_pairs, s, folder, recipe="dpo", cached=cached)
    refined = Side(f"our Sr-DPO{note}", our_pairs, s, folder, recipe="sr-dpo", cached=cached)
    peers = []
    for micro in s.peer_micro_batch_sizes:
        peers.append(Side(f"TRL DPO, micro {micro}{note}", peer_pairs, s, folder, micro=micro,
                          batches=dpo.facts["batches"], cached=cached))
        agree(dpo, peers[-1], TOLERANCE[s.dtype])
    alternate([dpo, refined, *peers], s.rounds)
    n = s.batch_size
    return [*(Line(f"DPO step / {peer.name}", dpo, peer, n, "pairs") for peer in peers),
            Line(f"Sr-DPO step / {peers[0].name}", refined, peers[0], n, "pairs"),
            Line(f"Sr-DPO step{note} / our DPO", refined, dpo, n, "pairs")]


def row_simple(what, ours, peer, unit, passes, name=None, variants=None):
    """A row of one kind of work beside variants of a peer, {name: arguments}; or beside `name` at each of its
    micro-batches. `passes`: which of our facts the peer is given, so that it works on the same."""
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


# ------------------------------------------------------------------------------------------------------------
# Ours alone: cost against K, the prompt's length, the number of rows

def timed(work, rounds):
    """Median seconds of work(), after once to warm up."""
    work()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def row_k(s, folder):
    """Seconds of sampling and of judging K responses per prompt, and how many times those of one."""
    net, tokenizer = sample.load_model(folder / "model", s.dtype, pick_device(s.device))
    found, _ = rows.read_rows(folder / "pairs.jsonl", "pairs")
    judge_prompt = judge.JudgePrompt(tokenizer, "helpful", net.config.context)
    prompts = prompts_of(s, folder, 300)[:2]
    texts, lines = [text for row in found for text in (row.chosen, row.rejected)], []
    contexts = [data.context_text(row.prompt) for row in found[:len(prompts)]]
    print(f"\n{len(prompts)} prompts, {s.max_tokens} tokens per sample{'':>10} sampling   judging   "
          "(seconds; in brackets: over K = 1)")
    for k in (1, 3, 7, 15):
        responses = [texts[i * k:(i + 1) * k] for i in range(len(prompts))]
        sampling = functools.partial(sampled, net, prompts, k, s.max_tokens)
        judging = functools.partial(label, net, judge_prompt, contexts, responses)
        lines.append({"K": k, "sampling": timed(sampling, s.rounds), "judging": timed(judging, s.rounds)})
        print(f"K = {k:<40}", *(f"{lines[-1][key]:8.2f} ({lines[-1][key] / lines[0][key]:.2f})"
                                for key in ("sampling", "judging")), flush=True)
    return lines


def row_length(s, folder):
    """Seconds of a DPO step against the prompt's length, responses of 64 tokens: beside separate sequences
    the shared prompt is computed once."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = our_trainer(s, folder, pick_device(s.device), "dpo")
    generator, lines = random.Random(0), []

    def ids(n):
        return [generator.randrange(10, 30000) for _ in range(n)]
    print(f"\nDPO step, {s.batch_size} pairs, responses of 64 tokens{'':>6} seconds")
    for length in (32, 128, 256, 448):
        trainer.data.rows = [data.Pair(ids(length), None, ids(64), ids(64), None, None, False)
                             for _ in range(s.batch_size)]
        lines.append({"prompt": length, "seconds": timed(lambda: trainer.update(0), s.rounds)})
        print(f"prompt of {length:<40} {lines[-1]['seconds']:8.2f}", flush=True)
    return lines


def row_size(s, folder):
    """Seconds until a data set is read, encoded and ready."""
    tokenizer, lines = load_tokenizer(folder / "model"), []
    print(f"\nreading and encoding{'':<32} seconds   rows per second")
    source = (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for n in (1_000, 10_000, 50_000):
        path = folder / f"rows-{n}.jsonl"
        path.write_text("".join((source * (n // len(source) + 1))[:n]), encoding="utf-8")

        def read(path=path):
            pairs, _ = rows.read_rows(path, "pairs")
            chat = data.chat_of(tokenizer, "hh")
            data.encode_dataset(tokenizer, pairs, chat, s.max_length, s.max_length // 2)
        lines.append({"rows": n, "seconds": timed(read, 1)})
        print(f"{n:<50,} {lines[-1]['seconds']:8.2f} {n / lines[-1]['seconds']:12.0f}", flush=True)
    return lines


# ------------------------------------------------------------------------------------------------------------
# All of it

MEASURES = dict(zip(ROWS, (
    row_pairs, functools.partial(row_pairs, cached=True),
    row_simple("sampling", our_sampling, peer_sampling, "tokens", ["prompts"], variants={"generate": {}}),
    row_simple("judging", our_judging, peer_judging, "instructions", ["asked"], variants={
        "padded forward": {"logits_to_keep": 0}, "padded, last logits only": {"logits_to_keep": 1}}),
    row_simple("online step", our_online, peer_online, "sampled tokens", ["prompts"], "TRL"),
    row_simple("SFT step", our_sft, peer_sft, "tokens", ["batches"], "plain loop"),
    row_k, row_length, row_size), strict=True))


def machine(dtype, device):
    """Measured flops per second of a large matrix product: the floor under every time here."""
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
    device = pick_device(s.device)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        parameters, blocks, head = prepare(s, folder)
        speed = machine(s.dtype, device)
        where = torch.cuda.get_device_name() if device == "cuda" else device
        print(f"{parameters / 1e6:.1f} M parameters, {s.dtype} on {where}, {torch.get_num_threads()} "
              f"threads, a matrix product runs at {speed / 1e9:.0f} Gflop/s; a forward takes "
              f"{blocks / 1e6:.0f} Mflop per token in the blocks and {head / 1e6:.0f} in the head; "
              f"{s.rounds} rounds\n{HEADER}", flush=True)
        for row in s.rows:
            found = MEASURES[row](s, folder)
            results[row] = show(found) if found and isinstance(found[0], Line) else found
    if s.out:
        report = {"settings": dataclasses.asdict(s), "gflops": speed / 1e9, "rows": results}
        Path(s.out).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    cli.run(main, Settings)
