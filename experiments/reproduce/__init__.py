"""The claims of both papers, tried on the embedded world, where the true reward of every response is known.

    python reproduce.py                      all claims, 4 seeds → RESULTS.md, figures/; what is finished is not run again
    python reproduce.py O6 S3                these alone, and the runs that they need
    python reproduce.py --quick              a tenth of the steps, one seed: does all of it work?
    python reproduce.py hh --data=FILES      Sr-DPO and Sr-IPO on real preferences (HH-RLHF), a small model from scratch

A run is an ordinary training (`RUNS`), a measurement of it is arrays over prompts and pairs (`measure`), and a claim is
a few comparisons of those, with the difference that would matter written beside each before anything was run (`CLAIMS`).
"""
import concurrent.futures.process
import contextlib
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import data
import judge
import losses
import model
import sample
import train
from experiments import rlhf, toy
from support import checkpoint, cli
from support.cli import InputError

# ---------------------------------------------------------------------------------------------------------------------
# The runs

ROOT = Path(__file__).parent                          # where RESULTS.md and figures/ lie
FRACTIONS = (0.02, 0.1, 0.5, 1.0)                    # of the preference data: the tables of paper 2
LAMBDAS = (0.1, 0.3, 0.5, 1.0)                       # of paper 1, which does not state its pick; ours is 0.3
TUPLES = (800, 1600, 3200)                           # preference pairs in one epoch; 3200 are those of toy.py
# Found on seed 0, which is in no result: of 1e-4 and 3e-4 the better one for each of dpo, ipo, osp, osp-dpo, osp-ipo and rlhf.
# A small share of the preference data is learned by heart when it is gone through as long as all of it.
LR = 1e-4
STEPS = {0.02: 0.4, 0.1: 0.5, 0.5: 1.0, 1.0: 1.0}    # of judge and reward model: share of the data: share of toy.py's steps
PARAPHRASE = ("Answer the question below as helpfully as you can, without doing harm: the answer should deserve 100 points, "
              "where 100 is the best mark and 1 the worst. Question:")


@dataclass(frozen=True)
class Run:
    """One training: a recipe, the run that it starts from, and what differs from toy.py's settings for that recipe."""
    recipe: str
    start: str | None = None
    more: dict = field(default_factory=dict)
    reward: str | None = None                        # the run whose reward model PPO uses
    share: float = 1.0                               # of toy.py's steps

    @property
    def needs(self):
        return [name for name in (self.start, self.reward) if name]


def tail(fraction):
    """What the name of a run on a share of the preference data ends with."""
    return "" if fraction == 1 else f"-{fraction}"


def sr(loss, lam=0.3):
    """The run of sr-dpo or sr-ipo with that λ."""
    return f"sr-{loss}-lam{lam}"


def runs():
    """{name: Run}, each behind those that it needs."""
    found = {"world": Run("world"), "base": Run("sft", "world"), "sft": Run("sft", "base"), "work": Run("work", "sft")}
    for fraction in FRACTIONS:
        for recipe in ("judge", "reward"):
            found[recipe + tail(fraction)] = Run(recipe, "sft", dict(data_fraction=fraction), share=STEPS[fraction])
    for loss in ("dpo", "ipo"):
        found[loss] = Run(loss, "sft", dict(lr=LR))
        for lam in LAMBDAS:
            found[sr(loss, lam)] = Run(f"sr-{loss}", "sft", dict(lr=LR, lam=lam))
        for tuples in TUPLES[:-1]:
            for name in (loss, sr(loss)):
                found[f"{name}-{tuples}"] = dataclasses.replace(found[name], share=tuples / TUPLES[-1])
    # Controls: p is empty, so that Δπ is Δ_naive = βh (paper 1, eq. 10); p in other words; the scale λΔπ/β.
    for name, loss, more in (("sr-dpo-naive", "dpo", dict(refinement_prompt="")),
                             ("sr-dpo-paraphrase", "dpo", dict(refinement_prompt=PARAPHRASE)),
                             ("sr-ipo-exact", "ipo", dict(delta_scale="exact"))):
        found[name] = Run(f"sr-{loss}", "sft", dict(lr=LR, lam=0.3) | more)
    # Tried for S3: three times the learning rate, with which DPO goes too far.
    found["dpo-fast"] = Run("dpo", "sft", dict(lr=3 * LR))
    for lam in LAMBDAS[1:]:
        found[sr("dpo", lam) + "-fast"] = Run("sr-dpo", "sft", dict(lr=3 * LR, lam=lam))
    for recipe in ("osp", "osp-dpo", "osp-ipo", "sr-spce", "random-pairs", "self-rewarding", "raft", "sft-sampling", "rso",
                   "offline-soft"):
        found[recipe] = Run(recipe, "judge", dict(lr=LR) | (dict(beta=0.1) if recipe == "offline-soft" else {}))
    found["spin"] = Run("spin", "sft", dict(lr=LR))
    for k in (3, 15):
        found[f"osp-k{k}"] = Run("osp", "judge", dict(lr=LR, k=k))
    for fraction in (0.02, 0.1):
        found["osp" + tail(fraction)] = Run("osp", "judge" + tail(fraction), dict(lr=LR))
    for fraction in (1, 0.02, 0.1):
        found["rlhf" + tail(fraction)] = Run("rlhf", "sft", dict(lr=LR), "reward" + tail(fraction))
    return found


RUNS = runs()
# About the seconds that a run of all steps takes on one core, and its measurement, for the plan.
SECONDS = {"world": 3, "work": 8, "judge": 65, "reward": 32, "dpo": 18, "ipo": 18, "sr-dpo": 24, "sr-ipo": 24, "offline-soft": 22,
           "spin": 12, "rlhf": 42, "raft": 34, "rso": 80}


def seconds_of(name, scale):
    """About how long a run takes on one core."""
    run = RUNS[name]
    whole = 70 if name == "base" else 10 if name == "sft" else SECONDS.get(run.recipe, 50) * run.more.get("k", 7) / 7
    return 3 + scale * run.share * whole


def settings_of(name, folder, seed, scale):
    """The train.Settings or rlhf.Settings of a run in the seed's folder; scale: share of the steps."""
    run = RUNS[name]
    kind = rlhf.Settings if run.recipe in rlhf.RECIPES else train.Settings
    chain = toy.plan(kind(recipe=run.recipe, seed=seed, out_dir=str(folder), device="cpu", dtype="float32", **run.more))
    stage = list(chain.values())[0 if name == "base" else -1]
    stage |= {"out_dir": str(folder / name), "sample_every": 0, "eval_every": 0}
    for key, other in (("model", run.start), ("reward", run.reward)):
        if other not in (None, "world"):
            stage[key] = str(folder / other / "final")
    stage["steps"] = max(2, round(stage["steps"] * run.share * scale))
    return kind(**stage)


# ---------------------------------------------------------------------------------------------------------------------
# Measurements

def measure(name, settings, folder, prompts):
    """What is known of a finished run: {name: array}."""
    run, world, place = RUNS[name], folder / "world", Path(settings.out_dir) / "final"
    pairs, _ = data.read_rows(world / "eval_pairs.jsonl", "pairs")
    found = {"gap": np.array([toy.reward(row.prompt, row.chosen) - toy.reward(row.prompt, row.rejected) for row in pairs])}
    found |= curves(Path(settings.out_dir), run.recipe)
    if run.recipe == "reward":
        scores = reward_scores(place, [(row.prompt, text) for row in pairs for text in (row.chosen, row.rejected)])
        return found | {"reward_margin": scores[::2] - scores[1::2]}
    net, tokenizer = sample.load_model(place, "float32", "cpu")
    before, _ = sample.load_model(Path(settings.model), "float32", "cpu")
    found |= measure_samples(net, before, tokenizer, settings, world, prompts)
    if run.reward:
        for domain in DOMAINS:
            x = [row.prompt for row in data.read_rows(world / f"eval_{domain}.jsonl", "prompts")[0]]
            for who, held in (("", found), ("sft_", np.load(folder / "sft" / "measured.npz"))):
                texts = held[f"{domain}_text"]
                scores = reward_scores(Path(settings.reward), [(x[i], y) for i, group in enumerate(texts) for y in group])
                found[f"{domain}_{who}learned"] = scores.reshape(texts.shape)
    if name in ("sft", "spin"):
        found["data_logprob"] = data_logprobs(net, tokenizer, world)
    if run.recipe == "judge" or name == "sft":
        questioner = judge.Questioner(tokenizer, "helpful", net.config.context)
        asked = [(row.prompt, row.chosen, row.rejected) for row in pairs]
        found["verdict"] = judge.compare(net, questioner, asked).p.numpy()
    if run.recipe in ("dpo", "ipo", "sr-dpo", "sr-ipo"):
        found |= margins(net, before, tokenizer, pairs, refinement_prompt=settings.refinement_prompt, max_length=64,
                         max_prompt_length=32)
        assert len(found["margin"]) == len(pairs)              # each belongs to its gap
    return found


DOMAINS = ("prompts", "advice")                      # held-out prompts of the world, and of its second domain


def measure_samples(net, before, tokenizer, settings, world, prompts):
    """Two samples to each of so many held-out prompts, of either domain: texts, true rewards, lengths, all (prompts, 2), and
    the mean divergence from `before` in nats a response."""
    like, found = dataclasses.replace(settings, temperature=0.7, top_p=0.9, max_tokens=16), {}
    for stream, domain in enumerate(DOMAINS):
        texts = [row.prompt for row in data.read_rows(world / f"eval_{domain}.jsonl", "prompts")[0]][:prompts]
        samples = toy.sample_all(net, tokenizer, texts, like, stream)
        answers = [[sample.response_text(tokenizer, one) for one in group] for group in samples]
        found |= {f"{domain}_text": np.array(answers),
                  f"{domain}_reward": np.array([[toy.reward(x, y) for y in group] for x, group in zip(texts, answers)]),
                  f"{domain}_length": np.array([[len(one.ids) for one in group] for group in samples]),
                  f"{domain}_kl": np.array(toy.divergence(net, before, tokenizer, texts, samples))}
    return found


@torch.no_grad()
def data_logprobs(net, tokenizer, world):
    """log π of held-out responses of the SFT data, in nats a token: (N,)."""
    rows, _ = data.read_rows(world / "eval_sft.jsonl", "responses")
    pairs, _ = data.encode_dataset(tokenizer, rows, None, 64, 32)
    forest = data.pack([pair.x + pair.chosen for pair in pairs])
    found = losses.logprobs(net, forest, [len(pair.x) for pair in pairs])
    return (found / torch.tensor([len(pair.chosen) for pair in pairs])).numpy()


CURVES = "loss margin refined_margin accuracy augmented_accuracy kl reward".split()


def curves(out, recipe):
    """What a run wrote down at each step: {"curve_loss": (steps,), …}, and "curve_true", the mean true reward of the responses
    in its rollouts: those it trained on (of the reference for sft-sampling, rso and spin; of raft only the best)."""
    records = [record for _, record in checkpoint.records(out / "metrics.jsonl")]
    found = {f"curve_{key}": np.array([record.get(key) for record in records], dtype=float)
             for key in CURVES if any(key in record for record in records)}
    if (out / "rollouts.jsonl").exists():
        keys = ["rejected"] if recipe == "spin" else ["chosen", "rejected", "response"]      # spin's chosen are the data set's
        rewards = {}
        for _, row in checkpoint.records(out / "rollouts.jsonl"):
            rewards.setdefault(row["step"], []).extend(toy.reward(row["prompt"], row[key]) for key in keys if key in row)
        found["curve_true"] = np.array([np.mean(rewards[step]) for step in sorted(rewards)])
    return found


def landmarks(world):
    """True rewards of what no model wrote, for scale."""
    rows, _ = data.read_rows(world / "eval_sft.jsonl", "responses")
    prompts, answers = [row.prompt for row in rows], [row.chosen for row in rows]
    rng = np.random.default_rng(0)
    words = [word for row in (*toy.TOPICS.values(), *toy.CRAFTS.values()) for word in row] + toy.POLITE + toy.RUDE + toy.WISHES
    texts = {"data": answers, "astray": answers[1:] + answers[:1], "random": [" ".join(rng.choice(words, 6)) for _ in prompts]}
    return {name: np.array([toy.reward(x, y) for x, y in zip(prompts, some)]) for name, some in texts.items()}


# torch counts every matrix product, but not its own attention on a CPU.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)}


def work(folder, seed, rounds=7):
    """The cost of an update under each recipe with pairs, on the same batch: multiplications and additions counted, and
    seconds, the recipes in turn."""
    found, trainers = {}, {}
    with tempfile.TemporaryDirectory() as place:
        for recipe in ("dpo", "ipo", "sr-dpo", "sr-ipo"):
            its = settings_of(recipe if recipe in RUNS else sr(recipe[3:]), folder, seed, 1.0)
            its.out_dir = f"{place}/{recipe}"
            trainers[recipe] = train.Trainer(its)
            with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
                trainers[recipe].update(0)
            found[recipe] = np.array(float(counter.get_total_flops()))
        for _ in range(rounds):
            for recipe, trainer in trainers.items():
                started = time.perf_counter()
                trainer.update(1)
                found.setdefault(f"{recipe}_seconds", []).append(time.perf_counter() - started)
    return found


@torch.no_grad()
def margins(policy, reference, tokenizer, rows, chat=None, refinement_prompt=data.REFINEMENT_PROMPT, **lengths):
    """h and h_p of rows (Row): {"margin", "augmented_margin"}, each (N,); rows that are alike once they are cut are left out."""
    pairs, _ = data.encode_dataset(tokenizer, rows, chat, refinement_prompt=refinement_prompt, **lengths)
    found = {"margin": [], "augmented_margin": []}
    for start in range(0, len(pairs), 64):
        for key, query in (("margin", "x"), ("augmented_margin", "px")):
            forest, starts = train.pack_pairs(pairs[start:start + 64], query)
            ours, theirs = (losses.logprobs(net, forest, starts).view(-1, 2).unbind(1) for net in (policy, reference))
            found[key].append(losses.margins(ours, theirs).numpy())
    return {key: np.concatenate(parts) for key, parts in found.items()}


def refined(found, settings):
    """The refined margins (N,) of margins() under the settings of a run; h itself where there is no Δπ."""
    if not settings.recipe.startswith("sr-"):
        return found["margin"]
    scale = settings.delta_scale if settings.recipe == "sr-ipo" else "logistic"
    return losses.refined_margin(found["margin"], settings.beta * found["augmented_margin"], settings.beta, settings.lam, scale)


@torch.no_grad()
def reward_scores(folder, texts):
    """The reward model's scores of [(prompt, response)], shifted as it asks: (N,)."""
    net = model.load(folder, torch.float32, "cpu", scores=True)
    tokenizer = sample.matching_tokenizer(folder, net.config)
    rows = [tokenizer.prefix(False) + data.prompt_ids(tokenizer, x, None) +
            data.response_ids(tokenizer, x, " " + y.strip(), None) for x, y in texts]
    found = [rlhf.scores(net, data.pack(rows[i:i + 64])).numpy() for i in range(0, len(rows), 64)]
    return np.concatenate(found) - rlhf.reward_shift(net.config, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Running

@dataclass
class Settings:
    """Try the claims of both papers on the embedded world, or (hh) draw paper 1's figure on real preferences."""
    claims: list[str] | None = None          # S1 … S6, O1 … O8; also typed without --claims=; default: all
    out_dir: str | None = None               # the runs; what is finished there is kept; default: out/reproduce, or …-quick
    seeds: list[int] | None = None           # worlds, each with models of its own; default: 1 to 4, with --quick 0
    quick: bool = False                      # a tenth of the steps, 64 prompts, one seed: shows that all of it works, no more
    workers: int | None = field(default=None, compare=False)     # runs side by side, one core each; default: one a core

    def __post_init__(self):
        """Fill in what depends on --quick, and refuse what is no claim."""
        for name in self.claims or []:
            if name not in CLAIMS:
                raise InputError(f"{name} is no claim; choose from {', '.join(CLAIMS)}, or hh.")
        self.claims = self.claims or list(CLAIMS)
        self.out_dir = self.out_dir or ("out/reproduce-quick" if self.quick else "out/reproduce")
        self.seeds = sorted(set(self.seeds or ([0] if self.quick else [1, 2, 3, 4])))
        self.workers = cores(self.workers)
        if min(self.seeds) < 0:
            raise InputError(f"--seeds={min(self.seeds)}: must be at least 0.")

    @property
    def scale(self):
        return 0.1 if self.quick else 1.0

    @property
    def prompts(self):
        return 64 if self.quick else 512

    @property
    def whole(self):
        """Whether this is what RESULTS.md reports: other seeds, folders or a part of the claims must not replace it."""
        return self == Settings()

    def names(self):
        """The runs that the claims need, in RUNS' order; with all claims all runs."""
        wanted = set(RUNS if self.claims == list(CLAIMS) else ["sft"])
        wanted.update(*(part.runs for name in self.claims for part in CLAIMS[name].parts))
        for name in reversed(RUNS):
            if name in wanted:
                wanted.update(RUNS[name].needs)
        return [name for name in RUNS if name in wanted]


def cores(workers):
    """The number of workers that was asked for, or one a core."""
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise InputError(f"--workers={workers}: must be at least 1.")
    return workers


def described(name, seed, settings):
    """All that a run and its measurement depend on, but for the code: its settings, and digests of what it starts from."""
    if name == "world":
        return dict(seed=seed, rows=toy.ROWS, shape=toy.SHAPE)
    about = dict(measured_prompts=settings.prompts, run=dataclasses.asdict(RUNS[name]))
    if name != "work":
        about |= dataclasses.asdict(settings_of(name, Path(), seed, settings.scale))
    for other in RUNS[name].needs:
        about[f"of {other}"] = hashlib.sha256(json.dumps(described(other, seed, settings)).encode()).hexdigest()[:12]
    return json.loads(json.dumps(about))


def is_there(path, about):
    """Whether a file says that its folder holds what is asked for; InputError where it says something else."""
    held = cli.read_json(path, absent={})
    changed = [key for key in about if held and held.get(key) != about[key]]
    if changed:
        raise InputError(f"{path.parent} holds another run ({', '.join(changed)} differ); use another --out_dir, or delete that "
                         f"folder.")
    return bool(held)


def carry(place, about, make):
    """make() -> {name: array}, once: in place/measured.npz, beside what it is `about`, with what it prints in log.txt.

    Returns the seconds that it took, 0 where it was there already; InputError where the folder holds something else.
    """
    started = time.time()
    is_there(place / "run.json", about)
    if (place / "measured.npz").exists():
        return 0.0
    place.mkdir(parents=True, exist_ok=True)
    toy.write_json(place / "run.json", about)
    try:
        with open(place / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            found = make()
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    with open(place / "measured.part", "wb") as file:
        np.savez(file, **found)
    os.replace(place / "measured.part", place / "measured.npz")        # whole or not at all
    return time.time() - started


def work_on(name, seed, settings):
    """One run and its measurement; what is already there is kept. Returns the seconds it took, 0 for none."""
    folder = Path(settings.out_dir) / f"seed{seed}"
    return carry(folder / name, described(name, seed, settings), lambda: run_and_measure(name, seed, folder, settings))


def run_and_measure(name, seed, folder, settings):
    """Carry out a run, from where it stopped, and measure it: {name: array}."""
    if name == "world":
        toy.write_world(folder / name, "llama", seed)
        return landmarks(folder / name)
    if name == "work":
        return work(folder, seed)
    its = settings_of(name, folder, seed, settings.scale)
    trainer = rlhf.TRAINERS[its.recipe] if its.recipe in rlhf.RECIPES else train.Trainer
    trainer(its).run()
    return measure(name, its, folder, settings.prompts)


def start_worker(parent):
    """A worker leaves Ctrl-C to its parent, unless a run is under way, which then saves; and it ends when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    cli.keep_freed_memory()
    train.leave_with(parent)


def in_turn(jobs, work):
    """The jobs one after the other in this process, in one thread, as a worker would: another number rounds differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for label, (_, arguments) in jobs.items():
            yield label, work(*arguments)
    finally:
        torch.set_num_threads(threads)


def side_by_side(jobs, work, workers):
    """As many jobs at a time as there are workers, each as soon as what it needs is done, in the order they finish.

    Ctrl-C or SIGTERM: the runs under way save and stop.
    """
    waiting, done, under_way = dict(jobs), set(), {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, start_worker, (os.getpid(),)) as pool:
        try:
            while waiting or under_way:
                for label in [label for label, (needs, _) in waiting.items() if done.issuperset(needs)]:
                    if len(under_way) < workers:
                        under_way[pool.submit(work, *waiting.pop(label)[1])] = label
                finished, _ = concurrent.futures.wait(under_way, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in finished:
                    label = under_way[future]
                    seconds = future.result()
                    done.add(under_way.pop(future))
                    yield label, seconds
        except concurrent.futures.process.BrokenProcessPool:
            raise InputError(f"one of {'; '.join(under_way.values())} was killed (for want of memory?); the same command goes on "
                             f"from what is there.") from None
        finally:
            for child in multiprocessing.active_children() if under_way else []:
                child.terminate()


def interrupt(number, frame):
    raise KeyboardInterrupt


def carry_out(jobs, work, workers):
    """work(*arguments) for each of the jobs {label: (labels that it needs, arguments)}, each behind those that it needs.

    It returns the seconds that it took, and a line is printed unless they are 0. Ctrl-C or SIGTERM ends this process with 130.
    """
    started, before = time.time(), {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number, (label, seconds) in enumerate(in_turn(jobs, work) if workers == 1 else side_by_side(jobs, work, workers), 1):
            if seconds:
                print(f"{number}/{len(jobs)} [{cli.duration(time.time() - started)}] {label}: {seconds:.0f} s", flush=True)
    except (KeyboardInterrupt, SystemExit):               # a Trainer that was asked to stop leaves by SystemExit
        print("stopped; the same command goes on from there.", flush=True)
        sys.exit(130)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# Claims

class Quantity:
    """A number computed from one seed's measurements m = {run: {name: array}} and pick, the rows (prompts or pairs) that count;
    and the names of the runs that it reads."""

    def __init__(self, of, *runs):
        self.of, self.runs = of, frozenset(runs)

    def __sub__(self, other):
        return Quantity(lambda m, pick: self.of(m, pick) - other.of(m, pick), *self.runs, *other.runs)


@dataclass(frozen=True)
class Part:
    """A difference that a claim rests on: what it is, how it comes about, and how large it must be to matter."""
    says: str
    quantity: Quantity
    least: float                                     # the difference that would matter
    kind: str = "more"                               # more: ≥ least; keeps: not below -least; alike: within ± least
    units: tuple | None = ("sft", "prompts_reward")  # (run, array) whose rows are drawn again; None: there are no rows
    form: str = "{:+.3f}"

    @property
    def runs(self):
        return self.quantity.runs | {run for run in (self.units or ())[:1]}


@dataclass(frozen=True)
class Claim:
    name: str
    says: str                                        # the paper's claim
    paper: str                                       # the paper's figures for it
    parts: tuple


def score(name, domain="prompts", what="reward"):
    """The mean true reward of a run's samples (or their learned one)."""
    return Quantity(lambda m, pick: m[name][f"{domain}_{what}"][pick].mean(), name)


def combined(function, *quantities):
    """function([numbers]) of several quantities."""
    return Quantity(lambda m, pick: function([one.of(m, pick) for one in quantities]),
                    *(run for one in quantities for run in one.runs))


def better(a, b, least=0.03, domain="prompts", **more):
    """That run a scores higher than run b."""
    where = "" if domain == "prompts" else ", second domain"
    return Part(f"{a} − {b}{where}", score(a, domain) - score(b, domain), least, units=("sft", f"{domain}_reward"), **more)


def right(values, labels=1.0):
    """Whether the sign of each value is the label's (N,), a value of 0 counting half: (N,)."""
    return (np.sign(values) == labels) + 0.5 * (values == 0)


JUDGED = {"verdict": 0.5, "reward_margin": 0.0, "margin": 0.0, "augmented_margin": 0.0}    # from where the first one wins


def accuracy(name, key):
    """The share of held-out pairs that a run ranks as their noisy labels say."""
    return Quantity(lambda m, pick: right(m[name][key][pick] - JUDGED[key]).mean(), name)


def correlation(name):
    """Pearson's r between the margins h of a run and the gaps of the true reward."""
    return Quantity(lambda m, pick: np.corrcoef(m[name]["margin"][pick], m[name]["gap"][pick])[0, 1], name)


def quarter(name, what, number):
    """The mean of a curve of a run over a quarter of its steps."""
    return Quantity(lambda m, pick: np.array_split(m[name][f"curve_{what}"], 4)[number].mean(), name)


def lower(a, b):
    """By what share of it the mean margin of run b is larger than that of run a."""
    return Quantity(lambda m, pick: 1 - m[a]["margin"][pick].mean() / m[b]["margin"][pick].mean(), a, b)


def extra_work(a, b):
    """How much more arithmetic an update of recipe a takes than one of recipe b."""
    return Quantity(lambda m, pick: float(m["work"][a] / m["work"][b]) - 1, "work")


def over_lambda(loss):
    """The parts of S3: up from λ = 0, down again at λ = 1, and no λ as bad as 0."""
    middle, first, last = [score(sr(loss, lam)) for lam in LAMBDAS[:-1]], score(loss), score(sr(loss, LAMBDAS[-1]))
    mean = combined(np.mean, *middle)
    return (Part(f"Sr-{loss.upper()}: λ 0.1 to 0.5 − λ 0", mean - first, 0.03), Part("λ 0.1 to 0.5 − λ 1", mean - last, 0.03),
            Part("the worst λ > 0 − λ 0", combined(min, *middle, last) - first, 0.0))


PAIRS = ("sft", "gap")                               # units of what is measured on the 512 held-out pairs
POINTS = dict(units=PAIRS, form="{:+.1%}")
BOTH = ("dpo", "ipo")

CLAIMS = {claim.name: claim for claim in [
    Claim("S1", "Sr-DPO and Sr-IPO have lower margins at comparable accuracy", "Figure 1", (
        *(Part(f"by how much h of {sr(loss)} is lower than {loss}'s", lower(sr(loss), loss), 0.05, **POINTS) for loss in BOTH),
        *(Part(f"accuracy, {sr(loss)} − {loss}", accuracy(sr(loss), "margin") - accuracy(loss, "margin"), 0.02, "keeps", **POINTS)
          for loss in BOTH))),
    Claim("S2", "behind p the policy ranks as many pairs right as without it", "Figure 1", tuple(
        Part(f"augmented accuracy − accuracy, {sr(loss)}", accuracy(sr(loss), "augmented_margin") - accuracy(sr(loss), "margin"),
             0.03, "alike", **POINTS) for loss in BOTH)),
    Claim("S3", "the score first rises, then falls with λ, and λ = 0 is worst", "win rate over λ", (
        *over_lambda("dpo"), *over_lambda("ipo"))),
    Claim("S4", "margins of Sr-* follow the true gaps more closely", "Pearson .21 → .26 (DPO), .11 → .13 (IPO)", tuple(
        Part(f"Pearson's r, {sr(loss)} − {loss}", correlation(sr(loss)) - correlation(loss), 0.02, units=PAIRS) for loss in BOTH)),
    Claim("S5", "Sr-* cost about a quarter more time", "+23.8 %", tuple(
        Part(f"arithmetic of an update, sr-{loss} over {loss}, beyond +23.8 %",
             extra_work(f"sr-{loss}", loss) - Quantity(lambda m, pick: 0.238), 0.1, "alike", None, "{:+.1%}") for loss in BOTH)),
    Claim("S6", "more tuples help Sr-*, while DPO and IPO overfit", "figure", (
        *(better(sr(loss), f"{sr(loss)}-{TUPLES[0]}") for loss in BOTH), *(better(f"{loss}-{TUPLES[0]}", loss) for loss in BOTH))),
    Claim("O1", "OSP > RLHF > IPO > DPO, SFT", "HH: .958 > .932 > .925 > .896, .919; TL;DR: 2.97 > 2.78 > 2.44 > 2.24, 1.93", (
        better("osp", "rlhf"), better("rlhf", "ipo"), better("ipo", "dpo"), better("ipo", "sft"))),
    Claim("O2", "OSP keeps its score with 2 % of the preferences, RLHF does not",
          "HH: OSP .958 → .955, RLHF .932 → .924; TL;DR: 2.97 → 3.01, 2.78 → 1.82", (
              better("osp-0.02", "osp", 0.05, kind="keeps"), better("rlhf", "rlhf-0.02", 0.05), better("osp-0.02", "rlhf-0.02"))),
    Claim("O3", "the preference model beats the reward model at every data size",
          "HH at 2, 10, 50, 100 %: 57, 61, 66, 70 against 53, 56, 62, 62", tuple(
              Part(f"accuracy, judge − reward model, {fraction:.0%}", accuracy("judge" + tail(fraction), "verdict") -
                   accuracy("reward" + tail(fraction), "reward_margin"), 0.02, **POINTS) for fraction in FRACTIONS)),
    Claim("O4", "OSP carries over to another domain, where RLHF over-optimises its reward model", "figure", (
        better("osp", "sft", domain="advice"), better("osp", "rlhf", domain="advice"),
        Part("learned reward, rlhf − sft, second domain",
             score("rlhf", "advice", "learned") - score("rlhf", "advice", "sft_learned"), 0.5, units=("sft", "advice_reward")),
        better("sft", "rlhf", domain="advice"))),
    Claim("O5", "a model that can judge improves itself without preferences, more with larger K, and beats Self-Rewarding",
          "figure, Mistral-7B", (better("osp", "judge"), better("osp-k15", "osp-k3"), better("osp", "self-rewarding"))),
    Claim("O6", "online, SPCE > IPO > DPO; DPO overfits while its loss still falls", "figure", (
        better("osp", "osp-ipo"), better("osp-ipo", "osp-dpo"),
        Part("osp-dpo, true reward, second quarter of the steps − last",
             quarter("osp-dpo", "true", 1) - quarter("osp-dpo", "true", 3), 0.03, units=None),
        Part("osp-dpo, loss, second quarter − last", quarter("osp-dpo", "loss", 1) - quarter("osp-dpo", "loss", 3), 0.01,
             units=None))),
    Claim("O7", "ranked > random > RAFT; SPIN pulls towards its data set", "figure", (
        better("osp", "random-pairs"), better("random-pairs", "raft"),
        Part("log π of held-out SFT data, nats a token, spin − sft",
             score("spin", "data", "logprob") - score("sft", "data", "logprob"), 0.05, units=("sft", "data_logprob")))),
    Claim("O8", "on-policy > SFT sampling, RSO, offline", "figure", (
        better("osp", "sft-sampling"), better("osp", "rso"), better("osp", "offline-soft"))),
]}


# Written when the runs of RESULTS.md were done, and shown with them.
NOTES = {
    "all": "written for seeds 1 to 4 with the figures of these tables; figures of seed 0, on which settings were found, are "
          "from trials that stand in no table or plot. S3, S5 and O7's part about SPIN were reworded, and the intervals "
          "widened by √(n/(n−1)), while the runs went on and before their results were looked at. As first worded SPIN's "
          "part (its mean reward nearer to the data's, +0.164) would have held; no claim's verdict is another. The runs "
          "`…-fast`, `osp-0.1` and `rlhf-0.1` were added when the others were done.",
    "S1": "h rises with λ, as the printed minus sign lets one expect: a pair with Δπ > 0 is pushed harder. Under Sr-DPO the"
          " refined margin falls, under Sr-IPO it stays (see Margins). Accuracy keeps.",
    "S2": "p costs 4 points, and plain DPO and IPO as much: this is no effect of Sr-*. In words that the base model has not"
          " read (`sr-dpo-paraphrase`) it costs 13.5 points, between 4 and 23 by seed.",
    "S3": "Sr-DPO loses more the larger λ is: the gradient is larger, KL and length grow. Tried: three times the learning "
          "rate, with which DPO goes too far (rows `…-fast`): 0.361, 0.158, 0.288 and 0.447 at λ = 0, 0.3, 0.5 and 1, so "
          "there λ = 1 is above DPO, and all below DPO's 0.669. As printed, Sr-IPO subtracts λβh_p, 0.2 on average at λ = 1"
          " where 1/(2β) is 5: it changes next to nothing. On the exact scale it gains 0.03.",
    "S4": "without Δπ r is 0.79 and 0.80 already; with larger λ Sr-DPO's falls to 0.76, Sr-IPO's stays.",
    "S5": "p has 48 tokens here, x and y together 18; though p is read once for all pairs of a batch, x and y are read once"
          " more behind it. In seconds Sr-DPO took 66 % more than DPO and Sr-IPO about a third more than IPO (see Time). On"
          " HH-RLHF's pairs the README measures +50 %, and +32 % where the reference is cached.",
    "S6": "from 1,600 to 3,200 tuples DPO loses 0.06 (0.733 to 0.669, one seed of four does not) and Sr-DPO 0.17; both IPOs"
          " stay. The difference that was written down is that of 800 and 3,200.",
    "O1": "whether OSP or RLHF is ahead depends on the seed. DPO and IPO have the highest means of these: the chosen "
          "responses of their pairs are worth 0.45, the samples that OSP begins with 0.09, and five of six labels are "
          "right. Tried on seed 0: 3e-4 instead of 1e-4 gave OSP 0.43, RLHF 0.54, IPO 0.58, DPO 0.16, against 0.52, 0.62, "
          "0.65, 0.58.",
    "O2": "2 % are 160 pairs here, 1,525 in the paper. With 10 %, 800 pairs, OSP comes to 0.339 and RLHF to 0.432. Tried on"
          " seed 0 at 2 %: 500 steps of augmentation instead of 100 (a judge 65.6 % right instead of 64.8 %); OSP came to "
          "0.035 from there.",
    "O3": "the judge also learns from 25 % more labels (pairs with one slot empty), and still the reward model needs fewer "
          "steps for as much. Tried on seed 0, judge: 500 and 100 steps at 2 % (65.6, 64.8 %), 500 and 250 at 10 % (73.2, "
          "71.7 %); reward model: 250 and 50 steps at 2 % (65.0, 58.6 %), 250 and 125 at 10 % (68.9, 74.2 %).",
    "O4": "both domains ask for the same (fitting nouns, a wish, a time), and what RLHF learns carries over. OSP starts "
          "from the judge, which augmentation has cost 0.22 in the second domain; from there it gains 0.30. With a reward "
          "model from 2 % of the data the learned reward rises by 2.7 and the true one does not follow: 0.12 to 0.04 ± "
          "0.18, in the second domain 0.39 to 0.43 (see PPO).",
    "O5": "the model that can judge is the augmented one: what needs no preferences is everything behind it. K = 3, 7 and "
          "15 end alike.",
    "O6": "the order holds, and DPO's true reward falls from the middle on; but its loss does not go on falling meanwhile.",
    "O7": "pairing at random is as good as ranked. RAFT, the likelihood of its own best samples, collapses, on some seeds "
          "wholly. SPIN lowers the likelihood of its data; its samples go from 0.15 over −0.10 to −0.39 in its three "
          "iterations, those of the last model are worth −0.10, the data −0.09: near it by chance or not.",
    "O8": "fresh samples beat the SFT policy's by 0.2. From the data set's own pairs, labelled by the judge (offline-soft),"
          " no difference is to be seen: their chosen responses are worth 0.45.",
}


def ranks_of(values):
    """Places in sorted order, equal ones sharing their mean place: (N,) -> (N,)."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def kendall(a, b):
    """Kendall's τ-b of two arrays (N,)."""
    x, y = np.sign(a[:, None] - a), np.sign(b[:, None] - b)
    return (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())


@dataclass
class Result:
    values: list                                     # the difference, one a seed
    low: float
    high: float
    verdict: str


DRAWS = 1000                                         # of the bootstrap


def weigh(part, measured):
    """A Result: paired bootstrap over seeds, and within each over prompts or pairs; `measured` has one entry a seed.

    95 % interval [low, high] of the mean over the seeds. n seeds drawn from n spread too little, by √(n/(n-1)): the interval
    is as much wider. What has no rows but one seed has no interval.
    """
    rng, n = np.random.default_rng(0), len(measured)
    values = np.array([float(part.quantity.of(m, slice(None))) for m in measured])
    again = np.empty(DRAWS)
    for i in range(DRAWS):
        seeds = rng.integers(n, size=n)
        if part.units is None:
            again[i] = values[seeds].mean()
        else:
            rows = [len(measured[seed][part.units[0]][part.units[1]]) for seed in seeds]
            again[i] = np.mean([part.quantity.of(measured[seed], rng.integers(size, size=size))
                                for seed, size in zip(seeds, rows)])
    mean = values.mean()
    low, high = mean + (np.percentile(again, [2.5, 97.5]) - mean) * math.sqrt(n / max(n - 1, 1))
    if part.units is None and n == 1:
        low, high = -math.inf, math.inf
    return Result(values.tolist(), float(low), float(high), verdict(part, float(mean), low, high))


def verdict(part, mean, low, high):
    """more: holds where low > 0 and the mean reaches `least`, does not where high < least. keeps: holds where low > -least, does
    not where high < 0 and the mean is below -least. alike: holds where low and high are within ± least, does not where they
    leave out 0 and the mean is beyond `least`. Else nobody can tell."""
    least = part.least
    holds, fails = {"more": (low > 0 and mean >= least, high < least),
                    "keeps": (low > -least, high < 0 and mean < -least),
                    "alike": (-least < low and high < least, abs(mean) > least and (low > 0 or high < 0))}[part.kind]
    return "holds" if holds else "does not hold" if fails else "cannot tell"


def together(verdicts):
    """A claim holds where all its parts do, and does not where one does not."""
    return next((word for word in ("does not hold", "cannot tell") if word in verdicts), "holds")


# ---------------------------------------------------------------------------------------------------------------------
# What is written: tables

def over_seeds(values, form="{:.3f}"):
    """Mean ± standard deviation of one number a seed, as text; the mean alone of a single seed."""
    mean = form.format(np.mean(values))
    return mean if len(values) < 2 else f"{mean} ± {form.replace('+', '').format(np.std(values, ddof=1))}"


def table(header, rows):
    return "\n".join(["| " + " | ".join(header) + " |", "|" + "---|" * len(header)] +
                     ["| " + " | ".join(row) + " |" for row in rows])


SIGNS = {"more": "≥", "keeps": "> −", "alike": "within ±"}


def claim_rows(names, measured):
    """The rows of the table of claims, {claim: verdict}, and the verdicts of all parts."""
    rows, verdicts, parts = [], {}, []
    for name in names:
        claim = CLAIMS[name]
        results = [weigh(part, measured) for part in claim.parts]
        verdicts[name] = together([result.verdict for result in results])
        lines = []
        for part, result in zip(claim.parts, results):
            low, high, least = (part.form.format(value) for value in (result.low, result.high, part.least))
            lines.append(f"{part.says}: {over_seeds(result.values, part.form)} [{low}, {high}] · {SIGNS[part.kind]} "
                         f"{least.lstrip('+')} · {result.verdict}")
        held = sum(result.verdict == "holds" for result in results)
        parts += [result.verdict for result in results]
        rows.append([f"**{name}**", claim.says, claim.paper, "<br>".join(lines),
                     f"**{verdicts[name]}** ({held} of {len(results)} parts hold)"])
    return rows, verdicts, parts


def system_rows(measured):
    """What each policy writes: true reward, wins over SFT, second domain, length, divergence from where it started."""
    rows = []
    for name in (name for name in RUNS if name in measured[0] and "prompts_reward" in measured[0][name]):
        mine, found = [m[name]["prompts_reward"] for m in measured], [m[name] for m in measured]
        wins = [100 * right(ours - m["sft"]["prompts_reward"]).mean() for ours, m in zip(mine, measured)]
        rows.append([f"`{name}`", over_seeds([ours.mean() for ours in mine]), over_seeds(wins, "{:.1f}"),
                     over_seeds([one["advice_reward"].mean() for one in found]),
                     over_seeds([one["prompts_length"].mean() for one in found], "{:.1f}"),
                     over_seeds([one["prompts_kl"] for one in found], "{:.1f}") if name != "base" else ""])
    return rows


def landmark_rows(measured):
    """[(what no model wrote, its true reward)], from the ceiling to the floor."""
    found = [(says, over_seeds([m["world"][key].mean() for m in measured])) for says, key in (
        ("responses of the SFT data", "data"), ("responses to another prompt", "astray"), ("six random words", "random"))]
    return [("the best response", "1.000"), *found, ("the worst", "−1.000")]


def judge_rows(measured):
    """Accuracy of judge and reward model on held-out pairs at each data size: by the noisy labels, and by the true reward."""
    def shares(run, key):
        """Both as text."""
        said = [m[run][key] - JUDGED[key] for m in measured]
        gaps = [m[run]["gap"] for m in measured]
        return (over_seeds([100 * right(values).mean() for values in said], "{:.1f}"),
                over_seeds([100 * right(values, np.sign(gap))[gap != 0].mean() for values, gap in zip(said, gaps)], "{:.1f}"))
    rows = [["0", *shares("sft", "verdict"), "50 (a head of zeros)", ""]]
    return rows + [[f"{100 * fraction:g}", *shares("judge" + tail(fraction), "verdict"),
                    *shares("reward" + tail(fraction), "reward_margin")] for fraction in FRACTIONS]


def margin_rows(measured):
    """Held-out pairs under the systems of paper 1: margins, accuracies, and how they follow the true gaps."""
    rows = []
    for name in (name for name in RUNS if name in measured[0] and "margin" in measured[0][name]):
        its, found = settings_of(name, Path(), 0, 1.0), [m[name] for m in measured]
        rows.append([f"`{name}`", *(over_seeds([values.mean() for values in some], "{:.2f}") for some in (
            [one["margin"] for one in found], [refined(one, its) for one in found])),
            *(over_seeds([100 * right(one[key]).mean() for one in found], "{:.1f}") for key in ("margin", "augmented_margin")),
            *(over_seeds([f(one["margin"], one["gap"]) for one in found], "{:.2f}") for f in (
                lambda a, b: np.corrcoef(a, b)[0, 1], lambda a, b: np.corrcoef(ranks_of(a), ranks_of(b))[0, 1], kendall))])
    return rows


def reward_rows(measured):
    """What PPO's own reward model says of samples before and after, in both domains, beside the true reward."""
    return [[f"`{name}`", says, *(over_seeds([m[run][f"{domain}_{what}"].mean() for m in measured], "{:.2f}") for run, what in (
        (name, "sft_learned"), (name, "learned"), ("sft", "reward"), (name, "reward")))]
        for name in ("rlhf", "rlhf-0.1", "rlhf-0.02") if name in measured[0]
        for domain, says in zip(DOMAINS, ("trained on", "second domain"))]


def work_rows(measured):
    """Arithmetic and seconds of an update over DPO's."""
    return [[f"`{name}`", over_seeds([float(m["work"][name] / m["work"]["dpo"]) for m in measured], "{:.2f}"),
             over_seeds([float(np.median(m["work"][f"{name}_seconds"]) / np.median(m["work"]["dpo_seconds"])) for m in measured],
                        "{:.2f}")] for name in ("dpo", "ipo", "sr-dpo", "sr-ipo")]


# ---------------------------------------------------------------------------------------------------------------------
# What is written: figures

COLOURS = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #444444 #999933".split()


def smooth(values, width=9):
    """Means over a window of steps, shorter at the ends: (steps,) -> (steps,)."""
    width = min(width, max(1, len(values) // 4))
    return np.array([np.mean(values[max(0, i - width // 2):i + width // 2 + 1]) for i in range(len(values))])


def draw_line(axes, x, seeds, label, colour, **style):
    """The mean over the seeds [(steps,)] as a line, and ± one standard deviation as a band."""
    seeds = np.array(seeds)
    axes.plot(x, seeds.mean(0), label=label, color=colour, **style)
    if len(seeds) > 1:
        axes.fill_between(x, seeds.mean(0) - seeds.std(0, ddof=1), seeds.mean(0) + seeds.std(0, ddof=1), color=colour, alpha=0.15,
                          linewidth=0)


def draw_curve(axes, measured, name, key, colour, **style):
    """A figure of a run's steps, smoothed."""
    seeds = [smooth(m[name][key]) for m in measured]
    draw_line(axes, np.arange(1, len(seeds[0]) + 1), seeds, name, colour, **style)
    axes.set_xlabel("step")


def draw_scores(axes, measured, x, names, label, colour):
    """The true reward of some runs, in this order, over x."""
    draw_line(axes, x, [[m[name]["prompts_reward"].mean() for name in names] for m in measured], label, colour, marker="o")


def draw_start(axes, measured, name):
    """The true reward of the run that others start from, as a dashed line."""
    start = np.mean([m[name]["prompts_reward"].mean() for m in measured])
    axes.axhline(start, color="grey", linestyle="--", label=f"start: {name}")


def draw_bars(axes, measured, names, key="prompts_reward", colour=COLOURS[0], shift=0.0, width=0.7, label=None):
    """The mean of an array of each run, and ± one standard deviation over the seeds."""
    values = np.array([[m[name][key].mean() for name in names] for m in measured])
    axes.bar(np.arange(len(names)) + shift, values.mean(0), width, yerr=values.std(0, ddof=1) if len(values) > 1 else None,
             color=colour, capsize=3, label=label)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")


def figure_margins(figure, measured, names):
    """Margins and accuracies over the steps (paper 1, Figure 1); dpo and ipo look at nothing behind p, and the IPO lines
    lie on one another"""
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, (
            ("curve_margin", "margin h"), ("curve_refined_margin", "refined margin (of dpo, ipo: h)"),
            ("curve_accuracy", "accuracy"), ("curve_augmented_accuracy", "augmented accuracy"))):
        for i, name in enumerate(names):
            known = key if key != "curve_refined_margin" or key in measured[0][name] else "curve_margin"
            if known in measured[0][name]:
                draw_curve(axes, measured, name, known, COLOURS[i])
        axes.set_title(title)
    figure.axes[0].legend(fontsize=7)


def figure_lambda(figure, measured, names):
    """True reward against λ"""
    axes = figure.subplots()
    for loss, colour in (("dpo", COLOURS[0]), ("ipo", COLOURS[1])):
        draw_scores(axes, measured, [0, *LAMBDAS], [loss, *(sr(loss, lam) for lam in LAMBDAS)], f"Sr-{loss.upper()}", colour)
    axes.set(xlabel="λ (0: DPO, IPO)", ylabel="true reward")
    axes.legend()


def figure_tuples(figure, measured, names):
    """True reward against the number of training tuples"""
    axes = figure.subplots()
    for i, name in enumerate(SR):
        draw_scores(axes, measured, TUPLES, [*(f"{name}-{n}" for n in TUPLES[:-1]), name], name, COLOURS[i])
    draw_start(axes, measured, "sft")
    axes.set(xlabel="training tuples, one epoch", ylabel="true reward")
    axes.legend()


def figure_online(figure, measured, names):
    """Losses and true rewards online, over the steps"""
    left, right = figure.subplots(1, 2)
    for i, name in enumerate(names):
        seeds = [smooth(m[name]["curve_loss"] / m[name]["curve_loss"][0]) for m in measured]
        draw_line(left, np.arange(1, len(seeds[0]) + 1), seeds, name, COLOURS[i])
        draw_curve(right, measured, name, "curve_true", COLOURS[i])
    left.set(xlabel="step", title="loss / loss at step 1")
    left.legend()
    right.set_title("true reward of the samples")


def figure_ablations(figure, measured, names):
    """Loss, pairing (self-rewarding, raft and spin have another loss too) and sampling; spin starts from sft"""
    for axes, (title, some) in zip(figure.subplots(1, 3, sharey=True), ABLATIONS.items()):
        draw_bars(axes, measured, some)
        draw_start(axes, measured, "judge")
        axes.set_title(title)
    figure.axes[0].set_ylabel("true reward")
    figure.axes[0].legend(fontsize=8)


def figure_data(figure, measured, names):
    """Accuracy of the preference model and of the reward model against the share of the data, and what is made of it"""
    left, right = figure.subplots(1, 2)
    for i, (says, run, key) in enumerate((("preference model", "judge", "verdict"), ("reward model", "reward", "reward_margin"))):
        seeds = [[100 * accuracy(run + tail(fraction), key).of(m, slice(None)) for fraction in FRACTIONS] for m in measured]
        draw_line(left, [100 * fraction for fraction in FRACTIONS], seeds, says, COLOURS[i], marker="o")
    left.axhline(np.mean([100 * accuracy("sft", "verdict").of(m, slice(None)) for m in measured]), color="grey", linestyle=":",
                 label="preference model, no data")
    left.set(xscale="log", xlabel="share of the pairs, %", ylabel="accuracy, %")
    left.set_xticks([100 * fraction for fraction in FRACTIONS], [f"{100 * fraction:g}" for fraction in FRACTIONS])
    left.minorticks_off()
    left.legend(fontsize=8)
    for i, name in enumerate(("osp", "rlhf")):
        draw_bars(right, measured, [name + "-0.02", name + "-0.1", name], "prompts_reward", COLOURS[i], 0.4 * i - 0.2, 0.35, name)
    right.set_xticks([0, 1, 2], ["2 %", "10 %", "100 %"], rotation=0, ha="center")
    right.set(ylabel="true reward", xlabel="share of the pairs")
    right.legend(fontsize=8)


def figure_k(figure, measured, names):
    """True reward against K"""
    axes = figure.subplots()
    draw_scores(axes, measured, [3, 7, 15], names[1:], "osp", COLOURS[0])
    draw_start(axes, measured, names[0])
    axes.set(xlabel="K", ylabel="true reward")
    axes.legend()


def figure_domains(figure, measured, names):
    """The domain that was trained on, beside the second one; and what RLHF's reward model says of both"""
    left, right = figure.subplots(1, 2)
    for i, (domain, says) in enumerate(zip(DOMAINS, ("trained on", "second domain"))):
        draw_bars(left, measured, names, f"{domain}_reward", COLOURS[i], 0.4 * i - 0.2, 0.35, says)
        learned = np.array([[m["rlhf"][f"{domain}_{who}learned"].mean() for who in ("sft_", "")] for m in measured])
        right.bar(np.arange(2) + 0.4 * i - 0.2, learned.mean(0), 0.35, yerr=learned.std(0, ddof=1) if len(measured) > 1 else None,
                  color=COLOURS[i], capsize=3)
    left.set_title("true reward")
    left.set_ylim(top=1)
    left.legend(fontsize=8)
    right.set_xticks([0, 1], ["sft", "rlhf"])
    right.set_title("learned reward")


def figure_rlhf(figure, measured, names):
    """PPO, over the steps, of samples at temperature 1: the learned reward, the true reward, the divergence from the SFT model"""
    for axes, (key, title) in zip(figure.subplots(1, 3), (("curve_reward", "learned reward"), ("curve_true", "true reward"),
                                                          ("curve_kl", "KL, nats a response"))):
        for i, name in enumerate(names):
            draw_curve(axes, measured, name, key, COLOURS[i])
        axes.set_title(title)
    figure.axes[0].legend(fontsize=8)


def figure_recipes(figure, measured, names):
    """A curve for each recipe: its loss (left, blue) and its accuracy or, bold, the true reward of the samples that it trains on
    (right, orange): of the policy; of the reference for sft-sampling, rso and spin; of raft the best of K alone"""
    grid = list(figure.subplots(5, 4).flat)
    assert len(names) <= len(grid)
    for axes in grid[len(names):]:
        axes.remove()
    for axes, name in zip(grid, names):
        draw_curve(axes, measured, name, "curve_loss", COLOURS[0])
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        key = next((key for key in ("curve_true", "curve_accuracy") if key in measured[0][name]), None)
        if key:
            other = axes.twinx()
            draw_curve(other, measured, name, key, COLOURS[1], linewidth=2.5 if key == "curve_true" else 1)
            other.tick_params(labelsize=7, colors=COLOURS[1])


ABLATIONS = {"loss": ["osp", "osp-ipo", "osp-dpo", "sr-spce"],
             "pairing": ["osp", "random-pairs", "self-rewarding", "raft", "spin"],
             "sampling": ["osp", "sft-sampling", "rso", "offline-soft"]}
SR = [name for loss in BOTH for name in (loss, sr(loss))]
FIGURES = {                                          # file: (what draws it, inches, the runs that it is given)
    "margins": (figure_margins, (9, 6), ["dpo", sr("dpo"), sr("dpo", 1.0), "ipo", sr("ipo"), sr("ipo", 1.0)]),
    "lambda": (figure_lambda, (5, 3.5), [*BOTH, *(sr(loss, lam) for loss in BOTH for lam in LAMBDAS)]),
    "tuples": (figure_tuples, (5, 3.5), [*SR, *(f"{name}-{n}" for name in SR for n in TUPLES[:-1])]),
    "online": (figure_online, (9, 3.5), ["osp", "osp-ipo", "osp-dpo"]),
    "ablations": (figure_ablations, (10, 4), ["judge", *dict.fromkeys(name for some in ABLATIONS.values() for name in some)]),
    "data": (figure_data, (9, 3.5), [run + tail(fraction) for run in ("judge", "reward") for fraction in FRACTIONS] +
             [run + tail(fraction) for run in ("osp", "rlhf") for fraction in (0.02, 0.1, 1.0)]),
    "k": (figure_k, (5, 3.5), ["judge", "osp-k3", "osp", "osp-k15"]),
    "domains": (figure_domains, (9, 3.5), ["sft", "dpo", "ipo", "rlhf", "osp"]),
    "rlhf": (figure_rlhf, (10, 3), ["rlhf", "rlhf-0.02"]),
    "recipes": (figure_recipes, (12, 12), [
        "sft", "judge", *SR, "offline-soft", "osp", "osp-dpo", "osp-ipo", "sr-spce", "random-pairs", "self-rewarding", "raft",
        "spin", "sft-sampling", "rso", "reward", "rlhf"])}


def drawing():
    """matplotlib's Figure; asked for before any run, so that an hour's work is not the first to miss it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("figures are drawn with matplotlib, which is not there: pip install -e '.[plot]'") from None
    return Figure


def draw(path, inches, figure_of, *arguments):
    """A PNG file of what figure_of(figure, *arguments) puts into a figure."""
    figure = drawing()(inches, layout="constrained")
    figure_of(figure, *arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def draw_figures(folder, measured):
    """PNG files in a folder; returns {file name: what it shows} of the figures whose runs are all there."""
    drawn = {}
    for name, (figure_of, inches, names) in FIGURES.items():
        if all(run in measured[0] for run in names):
            draw(folder / f"{name}.png", inches, figure_of, measured, names)
            drawn[f"{name}.png"] = " ".join(figure_of.__doc__.split())
    return drawn


# ---------------------------------------------------------------------------------------------------------------------
# The report

def load_measured(names, settings):
    """[{run: {name: array}}], one entry a seed."""
    found = []
    for seed in settings.seeds:
        folder = Path(settings.out_dir) / f"seed{seed}"
        found.append({name: dict(np.load(folder / name / "measured.npz")) for name in names})
    return found


WEIGHING = f"""\
Each claim rests on a few differences between runs. The difference that would matter stands beside each in `CLAIMS`.
The interval is a paired bootstrap ({DRAWS} draws) over seeds and, within each, over prompts or pairs. "≥ d" holds where the
interval is above 0 and the mean reaches d, and does not where the interval is below d: what is surely there but smaller than d
does not count. "> −d" (keeps) holds where the interval is above −d, and does not where it is below 0 and the mean below −d.
"Within ± d" (alike) holds where the interval is, and does not where it leaves out 0 and the mean is beyond d. Else it is
undecided. A claim holds where all its parts do, and does not where one does not. Rewards are the true ones, from −1 to 1.
"""
CONTROLS = """\
`sr-dpo-naive` has an empty p, so that Δπ is βh: DPO at β(1 − λ), its gradient divided by 1 − λ (paper 1, eq. 10).
`sr-dpo-paraphrase` says p in other words, which no text of the base model's had. `sr-ipo-exact` takes λΔπ/β, which maximising
eq. 14 gives, where the paper prints λΔπ. All have λ = 0.3. `sr-spce` joins both papers; it is in neither.
"""


def report(measured, settings, drawn):
    """RESULTS.md: a pure function of the measurements, but for the commit and the seconds that it names."""
    rows, verdicts, parts = claim_rows(settings.claims, measured)
    count = {word: list(verdicts.values()).count(word) for word in ("holds", "does not hold", "cannot tell")}
    commits = {str(cli.read_json(Path(settings.out_dir) / f"seed{seed}" / name / "config.json", absent={}).get("commit"))[:12]
               for seed in settings.seeds for name in measured[0] if name not in ("world", "work")}
    text = ["# Results", "",
            f"`python reproduce.py{' --quick' if settings.quick else ''}`, trained at commit {', '.join(sorted(commits))}, "
            f"reported at {str(checkpoint.commit())[:12]}: seeds {', '.join(map(str, settings.seeds))} of the embedded world, "
            f"{settings.prompts} held-out prompts with two samples each (temperature 0.7, top_p 0.9), "
            f"a Llama of 0.9 M parameters.", ""]
    if settings.quick:
        text += ["**A tenth of the steps: this shows that everything works, and says nothing about the papers.**", ""]
    text += ["## Claims", "", WEIGHING,
             f"Of {len(verdicts)} claims {count['holds']} hold, {count['does not hold']} do not, {count['cannot tell']} are "
             f"undecided; of their {len(parts)} parts {parts.count('holds')} hold.", "",
             table(["", "the paper's claim", "its figures", "here: mean ± deviation over the seeds [95 % interval] · what would "
                    "matter · verdict", "verdict"], rows), ""]
    if settings.whole:
        text += ["What differs here from the papers, and what was tried:", "",
                 *(f"- **{name}**: {said}" for name, said in NOTES.items()), ""]
    text += ["## Systems", "", f"For scale: {'; '.join(f'{says} {value}' for says, value in landmark_rows(measured))}.", "",
             "Wins are over `sft`, ties half. The second domain is in no data but the base model's. KL in nats a response.", "",
             table(["run", "true reward", "wins, %", "second domain", "tokens", "KL to its start"], system_rows(measured)), ""]
    if "sr-dpo-naive" in measured[0]:
        text += [CONTROLS]
    if all(run + tail(fraction) in measured[0] for run in ("judge", "reward") for fraction in FRACTIONS):
        best = over_seeds([100 * (m["sft"]["gap"] > 0).mean() for m in measured], "{:.1f}")
        text += ["## Judge and reward model", "", "Accuracy in % on held-out pairs, by the share of the preference data: by the "
                 f"noisy labels, of which the true reward itself gets {best}, and by the true reward.", "",
                 table(["data, %", "judge: labels", "true reward", "reward model: labels", "true reward"],
                       judge_rows(measured)), ""]
    if margin_rows(measured):
        text += ["## Margins on held-out pairs", "", table(["run", "h", "refined", "accuracy, %", "augmented accuracy, %",
                                                            "Pearson", "Spearman", "Kendall"], margin_rows(measured)), ""]
    if reward_rows(measured):
        text += ["## PPO", "", table(["run", "domain", "learned reward: sft", "after PPO", "true reward: sft", "after PPO"],
                                     reward_rows(measured)), ""]
    if drawn:
        text += ["## Figures", "", "Lines and bars are means over the seeds, bands and whiskers ± one standard deviation; curves "
                 "over steps are of training batches, smoothed over 9 steps.", ""]
        text += [f"**{says}.**\n\n![{says}](figures/{name})\n" for name, says in drawn.items()]
    if "work" in measured[0]:
        text += ["## Time", "", "An update over DPO's: multiplications and additions, and seconds (medians of rounds in turn; "
                 "other runs went on beside them, so these alone differ from one time to the next).", "",
                 table(["", "arithmetic", "seconds"], work_rows(measured)), ""]
    return "\n".join(text).rstrip() + "\n"


def main(settings):
    """Run what the claims need and is not there yet, measure it, and write the report."""
    started, out = time.time(), Path(settings.out_dir)
    drawing()
    names = settings.names()
    budget = len(settings.seeds) * sum(seconds_of(name, settings.scale) for name in names)
    print(f"{', '.join(settings.claims)}: {len(names)} runs for each of {len(settings.seeds)} seeds, {settings.workers} at a "
          f"time: about {cli.duration(budget / settings.workers)} on quiet cores.\n{', '.join(names)}\nWhat is finished in {out} is "
          f"not run again.\n", flush=True)
    carry_out({f"seed {seed}, {name}": ([f"seed {seed}, {other}" for other in RUNS[name].needs], (name, seed, settings))
               for name in names for seed in settings.seeds}, work_on, settings.workers)
    measured = load_measured(names, settings)
    place = ROOT if settings.whole else out
    drawn = draw_figures(place / "figures", measured)
    text = report(measured, settings, drawn)
    (place / "RESULTS.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")
    print(f"written to {place / 'RESULTS.md'}, in {cli.duration(time.time() - started)}")


# ---------------------------------------------------------------------------------------------------------------------
# Real preferences: a small model from scratch on the text of HH-RLHF pairs, SFT on the chosen ones, then paper 1's systems

HH_PAIRS, HH_TEXTS, HH_HELD_OUT = 6144, 12800, 400         # at most, however large the files are
# Found by trial on dpo alone, with seed 0 and half of the pairs, its held-out ones in view; ipo and all Sr-* take dpo's. β, the optimizer, λ and the form of Sr-IPO are the
# paper's; its learning rate is for a model two thousand times larger. One pass over the pairs, like the paper's: in a second
# one DPO knows them by heart (margins of 17), and held-out ones no better.
HH_LENGTHS = dict(max_length=128, max_prompt_length=40)
HH_STAGES = {
    "base":  dict(recipe="sft", steps=400, batch_size=32, lr=3e-3, lr_schedule="cosine", warmup_steps=20, max_length=256),
    "sft":   dict(recipe="sft", steps=96, batch_size=32, lr=5e-4, lr_schedule="cosine", eval_every=24) | HH_LENGTHS,
    "align": dict(batch_size=32, lr=3e-4, warmup_steps=16, eval_every=32) | HH_LENGTHS}
HH_QUICK = dict(steps=4, batch_size=4)
HH_COLUMNS = {"margin": "margin h", "refined_margin": "refined margin", "accuracy": "accuracy",
              "augmented_accuracy": "augmented accuracy"}


@dataclass
class HHSettings:
    """Paper 1's figure on real preferences: DPO, IPO, Sr-DPO and Sr-IPO over λ, from a model trained from scratch."""
    data: list[str] | None = None            # files of preference pairs, HH-RLHF's for instance, comma-separated
    out_dir: str | None = None               # the runs; what is finished there is kept; default: out/hh, or …-quick
    seed: int = 1                            # of everything; settings were found with 0
    quick: bool = False                      # a few steps of a very small model: shows that it works, no more
    width: int = 128                         # of the model
    layers: int = 4                          # of the model
    device: str = "cpu"                      # as of train.py
    workers: int | None = field(default=None, compare=False)     # runs side by side, one core each; default: one a core

    def __post_init__(self):
        """Fill in what depends on --quick, and refuse impossible values."""
        if not self.data:
            raise InputError("--data: name the files of preference pairs, comma-separated.")
        for name, least in (("seed", 0), ("layers", 1), ("width", 32)):
            if getattr(self, name) < least:
                raise InputError(f"--{name}={getattr(self, name)}: must be at least {least}.")
        if self.width % 32:
            raise InputError(f"--width={self.width}: must be a multiple of 32, the width of a head.")
        self.out_dir = self.out_dir or ("out/hh-quick" if self.quick else "out/hh")
        self.workers = cores(self.workers)


def hold_out(rows, seed):
    """(training rows, held-out rows) of list[data.Row], both in a random order: whole groups of dialogues with one opening are
    drawn, so that no prompt, nor the beginning of one, is in both."""
    groups = {}
    for row in rows:
        groups.setdefault(row.prompt if isinstance(row.prompt, str) else row.prompt[0]["content"], []).append(row)
    groups, held_out = list(groups.values()), []
    order = list(np.random.default_rng([seed, 0]).permutation(len(groups)))
    while len(held_out) < min(HH_HELD_OUT, len(rows) // 5):
        held_out += groups[order.pop()]
    if not order:
        raise InputError("all dialogues begin with the same message; there is no way to hold some out.")
    return [row for i in order for row in groups[i]], held_out


def base_texts(rows, seed):
    """What the base model reads, in a random order: each exchange of question and answer, the last one with either answer.

    Half of the last ones are rated out of 100, as reviews on the web would be: the refinement prompt stands in front, with 100
    for chosen and 1 for rejected. Without them p means nothing to a model that has read so little.
    """
    rng, found = np.random.default_rng([seed, 1]), []
    for row in rows:
        turns = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
        starts = [i for i, turn in enumerate(turns) if turn["role"] == "user"] or [0]
        exchanges = [data.hh_text(turns[i:j]) for i, j in zip(starts, starts[1:] + [len(turns)])]
        found += exchanges[:-1]
        for response, rating in ((row.chosen, "100"), (row.rejected, "1")):
            p = data.REFINEMENT_PROMPT.replace("100", rating, 1) if rng.random() < 0.5 else ""
            found.append(p + exchanges[-1] + data.ASSISTANT + response)
    found = list(dict.fromkeys(found))             # dialogues share their first exchanges
    return [found[i] for i in rng.permutation(len(found))]


def write_hh(folder, settings):
    """folder/*.jsonl, the untrained folder/model, and at the end what they were made from, world.json."""
    asked = dict(data=settings.data, seed=settings.seed, quick=settings.quick, width=settings.width, layers=settings.layers)
    if is_there(folder / "world.json", asked):
        return
    rows, reports = data.read_data(settings.data, "ordered pairs", settings.seed)
    for part in reports:
        print(part)
    if len(rows) < 10:
        raise InputError(f"{', '.join(settings.data)}: {len(rows)} pairs are too few to hold some out; 10 are the least.")
    rows, held_out = hold_out(rows, settings.seed)
    texts = base_texts(rows[:HH_TEXTS], settings.seed)[:HH_TEXTS]
    folder.mkdir(parents=True, exist_ok=True)
    toy.write_rows(folder / "texts.jsonl", [{"text": text} for text in texts])
    for name, part in (("pairs", rows[:HH_PAIRS]), ("eval_pairs", held_out)):
        print(f"{name}: {len(part):,} rows")
        toy.write_rows(folder / f"{name}.jsonl",
                       [dict(prompt=row.prompt, chosen=row.chosen, rejected=row.rejected) for row in part])
    width, layers = (32, 1) if settings.quick else (settings.width, settings.layers)
    shape = dict(hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers, num_attention_heads=width // 32,
                 max_position_embeddings=256, vocab_size=640 if settings.quick else 4096)
    toy.write_model(folder / "model", "llama", settings.seed, texts[:4000] + [data.REFINEMENT_PROMPT] * 8, shape)
    toy.write_json(folder / "world.json", asked)


def hh_systems():
    """{name: what differs from the aligning stage}."""
    found = {name: dict(recipe=name) for name in ("dpo", "ipo")}
    return found | {sr(loss, lam): dict(recipe=f"sr-{loss}", lam=lam) for loss in ("dpo", "ipo") for lam in LAMBDAS}


def hh_settings(name, folder, settings):
    """The train.Settings of a run in a folder."""
    stage = HH_STAGES.get(name, HH_STAGES["align"]) | hh_systems().get(name, {}) | (HH_QUICK if settings.quick else {})
    start = {"base": folder / "world" / "model", "sft": folder / "base" / "final"}.get(name, folder / "sft" / "final")
    world = folder / "world"
    files = (dict(data=[str(world / "texts.jsonl")]) if name == "base" else
             dict(data=[str(world / "pairs.jsonl")], eval_data=[str(world / "eval_pairs.jsonl")]))
    return train.Settings(**stage | files | dict(model=str(start), out_dir=str(folder / name), seed=settings.seed,
                                                 device=settings.device, micro_batch_size=32))


def hh_work(name, settings):
    """One run to its end, and h and h_p of what it made on the held-out pairs. Returns the seconds it took, 0 for none."""
    out = Path(settings.out_dir)
    its = hh_settings(name, out, settings)

    def make():
        train.Trainer(its).run()
        if name not in hh_systems():
            return {}
        (policy, tokenizer), (reference, _) = (sample.load_model(folder, "float32", its.device)
                                               for folder in (out / name / "final", Path(its.model)))
        rows, _ = data.read_rows(out / "world" / "eval_pairs.jsonl", "pairs")
        return margins(policy, reference, tokenizer, rows, "hh", **HH_LENGTHS)
    return carry(out / name, dataclasses.asdict(hh_settings(name, Path(), settings)), make)


def hh_ends(out, name, settings):
    """{metric: its values (N,) on the held-out pairs, behind the last step}, for HH_COLUMNS."""
    found = np.load(out / name / "measured.npz")
    h, augmented = found["margin"], found["augmented_margin"]
    return dict(zip(HH_COLUMNS, (h, refined(found, hh_settings(name, out, settings)), h > 0, augmented > 0)))


def hh_report(out, settings):
    """RESULTS-hh.md."""
    rows, config = [], model.read_config(out / "base" / "final")
    for name, more in hh_systems().items():
        ends, plain = (hh_ends(out, run, settings) for run in (name, more["recipe"].removeprefix("sr-")))

        def accuracy(values, sign=""):
            return f"{100 * values.mean():{sign}.1f} ± {196 * values.std() / math.sqrt(len(values)):.1f}"
        difference = ends["accuracy"].astype(float) - plain["accuracy"]
        rows.append([f"`{name}`", f"{ends['margin'].mean():.2f}", f"{ends['refined_margin'].mean():.2f}",
                     accuracy(ends["accuracy"]), accuracy(difference, "+") if more.get("lam") else "",
                     accuracy(ends["augmented_accuracy"])])
    commit = str(cli.read_json(out / "dpo" / "config.json").get("commit"))[:12]
    files = ", ".join(Path(file).name for file in settings.data)
    weights = sum(weight.numel() for weight in model.blank(out / "base" / "final", torch.float32, False).parameters())
    return "\n".join([
        "# Results on real preferences", "",
        f"`python reproduce.py hh` at commit {commit}, seed {settings.seed}, on {files}: {len(ends['margin'])} held-out pairs, "
        f"accuracies in % with ± 95 %. A Llama of {weights / 1e6:.1f} million parameters (width {config.width}, {config.layers} "
        f"layers), from scratch: base on the text of the training pairs, half of it rated behind p (100 for chosen, 1 for rejected "
        f"responses), SFT on the chosen ones, then each system with λ in its name.", "",
        table(["system", "h", "refined margin", "accuracy", "… less dpo's or ipo's", "augmented accuracy"], rows), "",
        "Where the interval of an accuracy holds 50, nothing is known to be learned that carries over to other pairs; the margins show "
        "what λ does all the same.", "", "![margins and accuracies over the steps](figures/hh.png)"]) + "\n"


def figure_hh(figure, out, settings):
    """A row a metric: training and held-out pairs of the dpo family, then of the ipo family.

    dpo and ipo look at no pair behind p while they train: their refined margin is the margin, their augmented accuracy a dot
    behind the last step.
    """
    axes = figure.subplots(len(HH_COLUMNS), 4, sharex=True)
    for name, more in hh_systems().items():
        records = [record for _, record in checkpoint.records(out / name / "metrics.jsonl")]
        lam, ends = more.get("lam"), {key: values.mean() for key, values in hh_ends(out, name, settings).items()}
        style = dict(color=COLOURS[LAMBDAS.index(lam)] if lam else "black", label=f"λ = {lam}" if lam else name)
        for row, metric in zip(axes, HH_COLUMNS):
            left, right = row[:2] if "dpo" in name else row[2:]
            key = metric if lam or metric != "refined_margin" else "margin"
            if any(key in record for record in records):
                left.plot([record["step"] for record in records], smooth([record[key] for record in records]), **style)
                known = [record for record in records if f"eval_{key}" in record]
                right.plot([record["step"] for record in known], [record[f"eval_{key}"] for record in known], ".-", **style)
            else:
                right.plot(records[-1]["step"], ends[metric], "o", **style)
    for row, title in zip(axes, HH_COLUMNS.values()):
        row[0].set_ylabel(title)
        for axis in row if "accuracy" in title else []:
            axis.axhline(0.5, color="grey", linewidth=0.8)
    for axis, title in zip(axes[0], (f"{loss}, {pairs}" for loss in ("DPO", "IPO") for pairs in ("training", "held out"))):
        axis.set_title(title)
        axis.legend(fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("step")


def hh(settings):
    """All of it: the files, the runs, RESULTS-hh.md and figures/hh.png."""
    out = Path(settings.out_dir)
    drawing()
    write_hh(out / "world", settings)
    jobs = {"base": ([], ("base", settings)), "sft": (["base"], ("sft", settings))}
    carry_out(jobs | {name: (["sft"], (name, settings)) for name in hh_systems()}, hh_work, settings.workers)
    place = ROOT if settings == HHSettings(data=settings.data, device=settings.device) else out
    draw(place / "figures" / "hh.png", (15, 11), figure_hh, out, settings)
    text = hh_report(out, settings)
    (place / "RESULTS-hh.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {place / 'RESULTS-hh.md'}")


def command():
    """The command line: words are claims, or hh; the rest is --key=value."""
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    options = [word for word in sys.argv[1:] if word.startswith("-")]
    sys.argv[1:] = options
    if words == ["hh"]:
        cli.run(hh, HHSettings)
    else:
        sys.argv[1:1] = [f"--claims={','.join(words)}"] if words else []
        cli.run(main, Settings)


if __name__ == "__main__":
    command()
