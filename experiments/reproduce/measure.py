"""What is measured of a finished run: arrays over held-out prompts or pairs, or over the steps of the run."""
import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import data
import forest
import judge
import losses
import model
import sample
import train
from experiments import rlhf, toy
from experiments.reproduce import jobs
from experiments.reproduce.runs import RUNS, described, settings_of, sr
from support import disk, rows

DOMAINS = ("prompts", "advice")      # held-out prompts of the world, and of its second domain


def work_on(name, seed, settings):
    """One run and its measurement; what is already there is kept. Returns the seconds it took, 0 for none."""
    folder = Path(settings.out_dir) / f"seed{seed}"
    return jobs.carry(folder / name, described(name, seed, settings),
                      lambda: run_and_measure(name, seed, folder, settings))


def run_and_measure(name, seed, folder, settings):
    """Carry out a run, from where it stopped, and measure it: {name: array}."""
    if name == "world":
        toy.write_world(folder / name, "llama", seed)
        return landmarks(folder / name)
    if name == "work":
        return work(folder, seed)
    its = settings_of(name, folder, seed, settings.scale)
    rlhf.TRAINERS.get(its.recipe, train.Trainer)(its).run()
    return measure(name, its, folder, settings.prompts)


def measure(name, settings, folder, prompts):
    """What is known of a finished run: {name: array}."""
    run, world, place = RUNS[name], folder / "world", Path(settings.out_dir) / "final"
    pairs, _ = rows.read_rows(world / "eval_pairs.jsonl", "pairs")
    gaps = [toy.reward(row.prompt, row.chosen) - toy.reward(row.prompt, row.rejected) for row in pairs]
    arrays = {"gap": np.array(gaps)} | curves(Path(settings.out_dir), run.recipe)
    if run.recipe == "reward":
        texts = [(row.prompt, text) for row in pairs for text in (row.chosen, row.rejected)]
        scores = reward_scores(place, texts)
        return arrays | {"reward_margin": scores[::2] - scores[1::2]}
    net, tokenizer = sample.load_model(place, "float32", "cpu")
    before, _ = sample.load_model(Path(settings.model), "float32", "cpu")
    arrays |= measure_samples(net, before, tokenizer, settings, world, prompts)
    if run.reward:
        arrays |= learned_rewards(arrays, settings.reward, folder)
    if name in ("sft", "spin"):
        arrays["data_logprob"] = data_logprobs(net, tokenizer, world)
    if run.recipe == "judge" or name == "sft":
        prompt = judge.JudgePrompt(tokenizer, "helpful", net.config.context)
        asked = [(row.prompt, row.chosen, row.rejected) for row in pairs]
        arrays["verdict"] = judge.compare(net, prompt, asked).p.numpy()
    if run.recipe in ("dpo", "ipo", "sr-dpo", "sr-ipo"):
        arrays |= margins(net, before, tokenizer, pairs, refinement_prompt=settings.refinement_prompt,
                          max_length=64, max_prompt_length=32)
        assert len(arrays["margin"]) == len(pairs)             # each belongs to its gap
    return arrays


def held_out_prompts(world, domain):
    return [row.prompt for row in rows.read_rows(world / f"eval_{domain}.jsonl", "prompts")[0]]


def measure_samples(net, before, tokenizer, settings, world, prompts):
    """Two samples per held-out prompt, `prompts` of them in each domain: texts, true rewards and lengths, all
    (prompts, 2), and the mean divergence from `before` in nats per response."""
    like, arrays = dataclasses.replace(settings, temperature=0.7, top_p=0.9, max_tokens=16), {}
    for stream, domain in enumerate(DOMAINS):
        texts = held_out_prompts(world, domain)[:prompts]
        samples = toy.sample_all(net, tokenizer, texts, like, stream)
        answers = [[sample.response_text(tokenizer, one) for one in group] for group in samples]
        rewards = [[toy.reward(x, y) for y in group] for x, group in zip(texts, answers)]
        arrays |= {
            f"{domain}_text": np.array(answers), f"{domain}_reward": np.array(rewards),
            f"{domain}_length": np.array([[len(one.ids) for one in group] for group in samples]),
            f"{domain}_kl": np.array(toy.divergence(net, before, tokenizer, texts, samples))}
    return arrays


def learned_rewards(arrays, reward_folder, folder):
    """What PPO's reward model says of a run's samples, and of those of its SFT model, in either domain."""
    learned = {}
    for domain in DOMAINS:
        prompts = held_out_prompts(folder / "world", domain)
        for who, measured in (("", arrays), ("sft_", np.load(folder / "sft" / "measured.npz"))):
            texts = measured[f"{domain}_text"]
            asked = [(prompts[i], y) for i, group in enumerate(texts) for y in group]
            scores = reward_scores(Path(reward_folder), asked)
            learned[f"{domain}_{who}learned"] = scores.reshape(texts.shape)
    return learned


@torch.no_grad()
def reward_scores(folder, texts):
    """The reward model's scores of [(prompt, response)], shifted as it asks: (N,)."""
    net = model.load(folder, torch.float32, "cpu", reward_head=True)
    tokenizer = sample.matching_tokenizer(folder, net.config)
    chat = data.chat_of(tokenizer, None)
    ids = [tokenizer.prefix(False) + data.prompt_ids(tokenizer, x, None) +
           data.response_ids(tokenizer, x, " " + y.strip(), chat) for x, y in texts]
    scores = [rlhf.scores(net, forest.pack(ids[i:i + 64])).numpy() for i in range(0, len(ids), 64)]
    return np.concatenate(scores) - rlhf.reward_shift(net.config, folder)


@torch.no_grad()
def data_logprobs(net, tokenizer, world):
    """log π of held-out responses of the SFT data, in nats per token: (N,)."""
    responses, _ = rows.read_rows(world / "eval_sft.jsonl", "responses")
    pairs, _ = data.encode_dataset(tokenizer, responses, data.chat_of(tokenizer, None), 64, 32)
    packed = forest.pack([pair.x + pair.chosen for pair in pairs])
    logprobs = losses.logprobs(net, packed, [len(pair.x) for pair in pairs])
    return (logprobs / torch.tensor([len(pair.chosen) for pair in pairs])).numpy()


@torch.no_grad()
def margins(policy, reference, tokenizer, pair_rows, chat=None, refinement_prompt=data.REFINEMENT_PROMPT,
            **lengths):
    """h and h_p of rows: {"margin", "augmented_margin"}, each (N,); rows that are alike once they are cut are
    left out."""
    pairs, _ = data.encode_dataset(tokenizer, pair_rows, data.chat_of(tokenizer, chat),
                                   refinement_prompt=refinement_prompt, **lengths)
    parts = {"margin": [], "augmented_margin": []}
    for start in range(0, len(pairs), 64):
        for key, query in (("margin", "x"), ("augmented_margin", "refined_x")):
            packed, starts = train.pack_pairs(pairs[start:start + 64], query)
            ours, theirs = (losses.logprobs(net, packed, starts).view(-1, 2).unbind(1)
                            for net in (policy, reference))
            parts[key].append(losses.margins(ours, theirs).numpy())
    return {key: np.concatenate(values) for key, values in parts.items()}


def refined(arrays, settings):
    """The refined margins (N,) of margins() under the settings of a run; h itself where there is no Δπ."""
    if not settings.recipe.startswith("sr-"):
        return arrays["margin"]
    scale = settings.delta_scale if settings.recipe == "sr-ipo" else "logistic"
    delta = settings.beta * arrays["augmented_margin"]
    return losses.refined_margin(arrays["margin"], delta, settings.beta, settings.lam, scale)


CURVES = "loss margin refined_margin accuracy augmented_accuracy kl reward".split()


def curves(out, recipe):
    """What a run wrote down at each step: {"curve_loss": (steps,), …}, and "curve_true".

    That is the mean true reward of the responses in its rollouts: those it trained on (of the reference for
    sft-sampling, rso and spin; of raft only the best).
    """
    records = disk.read_metrics(out / "metrics.jsonl")
    arrays = {f"curve_{key}": np.array([record.get(key) for record in records], dtype=float)
              for key in CURVES if any(key in record for record in records)}
    if (out / "rollouts.jsonl").exists():
        # SPIN's chosen responses are the data set's.
        keys, rewards = ["rejected"] if recipe == "spin" else ["chosen", "rejected", "response"], {}
        for _, row in disk.records(out / "rollouts.jsonl"):
            marks = [toy.reward(row["prompt"], row[key]) for key in keys if key in row]
            rewards.setdefault(row["step"], []).extend(marks)
        arrays["curve_true"] = np.array([np.mean(rewards[step]) for step in sorted(rewards)])
    return arrays


def landmarks(world):
    """True rewards of what no model wrote, for scale."""
    responses, _ = rows.read_rows(world / "eval_sft.jsonl", "responses")
    prompts, answers = [row.prompt for row in responses], [row.chosen for row in responses]
    rng = np.random.default_rng(0)
    words = [*toy.WORDS, *toy.WISHES]
    texts = {"data": answers, "astray": answers[1:] + answers[:1],
             "random": [" ".join(rng.choice(words, 6)) for _ in prompts]}
    return {name: np.array([toy.reward(x, y) for x, y in zip(prompts, some)]) for name, some in texts.items()}


# torch counts every matrix product, but not its own attention on a CPU.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)}


def work(folder, seed, rounds=7):
    """The cost of an update under each recipe with pairs, on the same batch: multiplications and additions
    counted, and seconds, the recipes in turn."""
    arrays, trainers = {}, {}
    with tempfile.TemporaryDirectory() as place:
        for recipe in ("dpo", "ipo", "sr-dpo", "sr-ipo"):
            its = settings_of(recipe if recipe in RUNS else sr(recipe[3:]), folder, seed, 1.0)
            its.out_dir = f"{place}/{recipe}"
            trainers[recipe] = train.Trainer(its)
            with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
                trainers[recipe].update(0)
            arrays[recipe] = np.array(float(counter.get_total_flops()))
        for _ in range(rounds):
            for recipe, trainer in trainers.items():
                started = time.perf_counter()
                trainer.update(1)
                arrays.setdefault(f"{recipe}_seconds", []).append(time.perf_counter() - started)
    return arrays
