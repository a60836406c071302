"""K responses per prompt with one shared prefill.

    python sample.py --model=DIR --prompt="Once upon a time" --k=3
    python sample.py --model=DIR --prompts=prompts.jsonl --k=7 --out=samples.jsonl
    python sample.py --model=DIR --prompts=question.jsonl --format=mt_bench --out=model_answer/ours.jsonl

A sample is a pure function of (seed, step, prompt index, k): its randomness is a table of uniforms made
beforehand, and each token is found by inverting the distribution function. So neither the number of
processes, nor the batches of prompts, nor rows that finish early can change it (up to rounding).

Letters: P prompts, K samples per prompt, R rows (P·K at first), V vocabulary.
"""
import functools
import math
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch

import data
import forest
import model
from support import cli, formats
from support.cli import InputError, setting
from support.ranks import pick_device

NOT_FINITE = ("the model's logits are not finite, so nothing can be sampled: its weights are damaged, or "
              "training has diverged; a lower --lr or --grad_clip may help.")


@dataclass
class Sample:
    """One response."""
    ids: list[int]                 # as sampled, with the stop id if one came
    logprob: float                 # Σ log π of the ids at temperature 1, in nats
    finished: bool                 # whether a stop id came
    text: str = ""                 # as response_text has it, where somebody asked


def uniforms(seed, step, prompt, k, max_tokens):
    """(K, max_tokens) numbers in [0, 1) of this seed, step and prompt index alone: float64 on the CPU."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 2, step, prompt])))
    return torch.from_numpy(generator.random((k, max_tokens)))


def choose(logits, uniform, temperature, top_p):
    """Token ids (R,) from logits (R, V): greedy at temperature 0, else where `uniform` (R,) falls.

    The distribution is softmax(logits / temperature), cut to the fewest most probable tokens that hold top_p
    together. Its tokens stand in falling order of probability, equal ones in the order of their ids.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / max(temperature, 1e-30)).softmax(-1)       # smaller temperatures would give inf
    R, V = probabilities.shape
    # Those of at most (1 - top_p) / 2V hold less than 1 - top_p together, with room for rounding: the fewest
    # that hold top_p are among the others, mostly some hundred of V = 50,000. Only these are sorted.
    row, ids = (probabilities > (1 - top_p) / (2 * V)).nonzero(as_tuple=True)
    counts = row.bincount(minlength=R)
    start = counts.cumsum(0) - counts
    sizes = counts.tolist()
    if not min(sizes):
        raise InputError(NOT_FINITE)
    kept = probabilities.new_zeros(R, max(sizes))
    kept[row, torch.arange(len(row), device=row.device) - start[row]] = probabilities[row, ids]
    falling, order = kept.sort(stable=True, dim=-1, descending=True)
    reached = falling.cumsum(-1)                                   # mass of the 1, 2, … most probable
    last = torch.searchsorted(reached, torch.full_like(reached[:, :1], top_p)).clamp_max(kept.shape[1] - 1)
    mass = reached.gather(-1, last)
    # A uniform next to 1 may round to 1: stay below the mass, and so on a token that has some.
    target = torch.minimum(uniform.to(mass.dtype)[:, None] * mass, mass.nextafter(torch.zeros_like(mass)))
    place = torch.searchsorted(reached, target, right=True)
    return ids[start + order.gather(-1, place)[:, 0]]


def prefill(net, prompts, k, max_tokens):
    """(logits (R, V) of the first tokens, cache) after one forward over the forest of prompts."""
    prompts, cache = forest.pack(prompts), forest.Cache(net.config)
    hidden = net.hidden(prompts, cache)
    cache.open(prompts.paths, k, max_tokens)
    last = torch.stack([path[-1] for path in prompts.paths]).to(hidden.device)
    logits = net.head(hidden[last]).repeat_interleave(k, 0)
    if not logits.isfinite().all():
        raise InputError(NOT_FINITE)
    return logits, cache


@torch.no_grad()
def generate(net, prompts, uniform, stop_ids, allowed, temperature=0.7, top_p=0.9,
             limits=None, on_token=None):
    """K responses to each prompt: a list of P lists of K Samples.

    prompts: P lists of ids; uniform: (P, K, max_tokens); stop_ids: ids that end a response; allowed: (V,)
    bool, ids that may be sampled; limits: P limits of tokens, at most max_tokens each; on_token(row, id) is
    called for each token, which waits for the device.
    """
    P, K, max_tokens = uniform.shape
    logits, cache = prefill(net, prompts, K, max_tokens)
    device, wide = logits.device, torch.float64 if logits.dtype == torch.float64 else torch.float32
    uniform = uniform.reshape(P * K, max_tokens).to(wide).to(device)
    limit = torch.tensor(limits or [max_tokens] * P, device=device).repeat_interleave(K)
    stop = torch.tensor(sorted(stop_ids), device=device)
    banned = torch.zeros(len(allowed), dtype=wide).masked_fill(~torch.as_tensor(allowed), -math.inf)
    banned = banned.to(device)
    rows = torch.arange(P * K, device=device)                      # those still growing
    ids = torch.full((P * K, max_tokens), -1, device=device)
    logprob = torch.zeros(P * K, dtype=wide, device=device)
    finished = torch.zeros(P * K, dtype=torch.bool, device=device)
    for t in range(max_tokens):
        logits = logits.to(wide)
        tokens = choose(logits + banned, uniform[rows, t], temperature, top_p)
        ids[rows, t] = tokens
        logprob[rows] += logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        finished[rows] = stopped = torch.isin(tokens, stop)
        if on_token is not None:
            for row, token in zip(rows.tolist(), tokens.tolist()):
                on_token(row, token)
        growing = (~stopped & (t + 1 < limit[rows])).cpu().nonzero()[:, 0]     # the only wait for the device
        if t + 1 == max_tokens or not len(growing):
            break
        if len(growing) < len(rows):
            cache.keep(growing)
            growing = growing.to(device)
            rows, tokens = rows[growing], tokens[growing]
        logits = net.head(net(tokens[:, None], cache=cache)[:, 0])
    samples = [Sample(row[:n], value, done) for row, n, value, done in
               zip(ids.tolist(), (ids >= 0).sum(-1).tolist(), logprob.tolist(), finished.tolist())]
    return [samples[i * K:(i + 1) * K] for i in range(P)]


def sample_prompts(net, prompts, k, max_tokens, seed, step, stop_ids, allowed, temperature=0.7, top_p=0.9,
                   rooms=None, places=None, at_a_time=8, on_token=None):
    """Yields each prompt's K Samples, in order; `at_a_time` prompts are sampled as one batch.

    prompts: lists of ids; rooms: tokens that fit after each prompt; places: a number for each prompt, 0, 1,
    … unless told, which names its randomness together with seed and step; the others: see generate.
    """
    places = range(len(prompts)) if places is None else places
    limits = [max_tokens if rooms is None else min(max_tokens, rooms[i]) for i in range(len(prompts))]
    for start in range(0, len(prompts), at_a_time):
        batch = slice(start, start + at_a_time)
        table = torch.stack([uniforms(seed, step, place, k, max_tokens) for place in places[batch]])
        yield from generate(net, prompts[batch], table, stop_ids, allowed, temperature, top_p, limits[batch],
                            on_token)


def stopping(tokenizer, chat, config):
    """(ids that end a response, (V,) bool of the ids that may be sampled) for `generate`."""
    stop_ids = {*tokenizer.stop_ids, chat.end}
    return stop_ids, tokenizer.sampling_mask(config.vocab_size)


def response_text(tokenizer, sample):
    """The text of a sample as it stands after its prompt, without the stop id."""
    return tokenizer.decode(sample.ids[:-1] if sample.finished else sample.ids, continues=True)


# ------------------------------------------------------------------------------------------------------------
# Command line

@dataclass
class Settings:
    """Generate responses: a row of JSON per prompt, {"prompt", "responses": [{"text", "ids", …}]}; or as a
    benchmark has its answers."""
    model: str = setting("", "folder with config.json, safetensors and a tokenizer", group="What to read")
    prompt: str | None = setting(None, "one prompt; a user's turn where there is a format, else continued")
    prompts: str | None = setting(None, "or a file of prompts: .jsonl, .json, their .gz, .parquet; as above")
    columns: list[str] | None = setting(None, "its keys of no form known: prompt:my_question")
    format: str | None = setting(None, "--prompts and the rows are those of a benchmark: FastChat's question "
                                 "and model_answer files, AlpacaEval's", choices=tuple(formats.QUESTIONS))
    chat: str | None = setting(None, f"dialogue format ({', '.join(data.CHATS)}); none: the folder's")
    system: str | None = setting(None, "every dialogue's system message, whatever it has; --system= for none")
    k: int = setting(1, "responses per prompt", least=1, group="How to sample")
    temperature: float | None = setting(None, "0 is greedy; none: 0.7, in mt_bench as its categories have it",
                                        least=0)
    top_p: float = setting(0.9, "sample from the fewest tokens that hold this mass", above=0, most=1)
    max_tokens: int = setting(256, "tokens of a response at most", least=1)
    seed: int = setting(0, "same seed, same samples", least=0)
    batch_size: int = setting(8, "prompts at a time", least=1, group="Where to run and write")
    dtype: str = setting("float32", "type of the weights", choices=("float32", "bfloat16", "float64"))
    device: str = setting("auto", "auto, cpu, cuda, mps")
    out: str | None = setting(None, "write the rows here instead of printing them; .json: as one list")
    name: str | None = setting(None, "the model's name in a benchmark's rows; none: its folder")

    def __post_init__(self):
        cli.check(self)
        if not self.model:
            raise InputError("--model: name a model folder.")
        if (self.prompt is None) == (self.prompts is None):
            raise InputError("give either --prompt=TEXT or --prompts=FILE.")
        if self.format and self.prompts is None:
            raise InputError(f"--format={self.format}: name the benchmark's file with --prompts.")
        if self.prompts and self.out and os.path.realpath(self.prompts) == os.path.realpath(self.out):
            raise InputError(f"--out={self.out}: that is the file of --prompts.")


def matching_tokenizer(folder, config):
    """The folder's tokenizer; the model must have a row for each of its ids (more rows are usual)."""
    tokenizer = data.load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but vocab_size "
                         f"in config.json is {config.vocab_size}.")
    return tokenizer


def load_model(folder, dtype, device):
    """(network, tokenizer) of a folder."""
    net = model.load(folder, getattr(torch, dtype), device)
    return net, matching_tokenizer(folder, net.config)


def encode_prompts(tokenizer, chat, context, max_tokens, prompts, all_of_them):
    """Ids of [(prompt, where)]; a file's long prompts lose their front, so that an answer has room. None for
    what a chat template refuses; InputError if all_of_them are asked for, or there is no other."""
    encoded, skipped, long = [], {}, 0
    for prompt, where in prompts:
        row, pair = data.Row(prompt, None, None, None, where), None
        try:
            pair = data.encode_pair(tokenizer, row, chat, context, 1)
            if pair.cut and where == "--prompt":
                raise InputError(f"--prompt leaves no room for an answer in a context of {context} tokens.")
            if pair.cut:
                room = min(max_tokens, context // 2)
                pair, long = data.encode_pair(tokenizer, row, chat, context, 1, max_tokens=room), long + 1
        except data.Unusable as reason:
            skipped.setdefault(str(reason), []).append(where)
        encoded.append(pair and pair.x)
    if skipped and (all_of_them or not any(encoded)):
        why, places = next(iter(skipped.items()))
        raise InputError(f"{places[0]}: {why}.")
    if skipped:
        print(data.Report("encoded", sum(map(bool, encoded)), skipped), file=sys.stderr)
    if long:
        print(f"{long} of {len(prompts)} prompts do not fit the context of {context} and lost their front",
              file=sys.stderr)
    return encoded


def read_prompts(settings, chat, encode):
    """(Questions, ids up to their first answers) of --prompt or --prompts."""
    if settings.prompt is None:
        questions = formats.read_questions(settings.prompts, settings.format, settings.columns)
    else:
        questions = [formats.Question(data.in_turns(settings.prompt, chat), "--prompt")]
    ids = encode([(one.prompt, one.where) for one in questions], settings.format is not None)
    return zip(*((question, one) for question, one in zip(questions, ids) if one))


def main(settings):
    """Write K responses per prompt as rows of JSON; a terminal is shown a single one as it comes."""
    s = settings
    net, tokenizer = load_model(s.model, s.dtype, pick_device(s.device))
    chat, context = data.chat_of(tokenizer, s.chat, s.system), net.config.context
    max_tokens = min(s.max_tokens, context)            # a larger table and cache would never be filled
    encode = functools.partial(encode_prompts, tokenizer, chat, context, max_tokens)
    questions, first = read_prompts(s, chat, encode)
    stop_ids, allowed = stopping(tokenizer, chat, net.config)
    streaming = s.prompt is not None and s.k == 1 and s.out is None and sys.stdout.isatty()
    stream, line = tokenizer.stream(continues=True), cli.StepLine(len(questions), "prompts", bool(s.out))
    cut = 0

    def show(row, token):
        if token not in stop_ids:
            print(stream.push(token), end="", flush=True)

    def ask(talks, k, turn, places):
        """K answers to each talk's next turn, as formats.take_turns asks for them."""
        ids = [first[place] for place in places] if turn == 0 else encode(
            [(question.after(said), question.where) for question, said in talks], True)
        temperature = talks[0][0].temperature if s.temperature is None else s.temperature
        groups = list(sample_prompts(net, ids, k, max_tokens, s.seed, turn, stop_ids, allowed, temperature,
                                     s.top_p, [context - len(one) for one in ids], places, len(ids),
                                     show if streaming else None))
        for one in (one for group in groups for one in group):
            one.text = response_text(tokenizer, one)
        return groups

    with formats.row_writer(s.out) as write:
        for places in formats.batches(questions, s.batch_size):
            batch = [questions[place] for place in places]
            talks = formats.take_turns(batch, places, s.k, ask)
            if streaming:
                print(stream.flush())
                return
            for question, group in zip(batch, talks):
                for row in formats.answer_rows(s.format, question, group, s.name or s.model):
                    write(row)
            cut += sum(not one.finished for group in talks for talk in group for one in talk)
            line.update(places[-1] + 1)
    if s.out:
        ended = f"; {cut} did not end within {max_tokens} tokens" if cut else ""
        print(f"{len(questions)} prompts × {s.k} responses written to {s.out}{ended}")


if __name__ == "__main__":
    cli.run(main, Settings)
