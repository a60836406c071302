"""K responses a prompt with one shared prefill.

    python sample.py --model=DIR --prompt="Once upon a time" --k=3
    python sample.py --model=DIR --prompts=prompts.jsonl --k=7 --out=samples.jsonl

A sample is a pure function of (seed, step, prompt index, k): the randomness is a table of uniforms made beforehand, and
each token is found by inverting the distribution function. So neither the number of processes, nor how prompts are
batched, nor rows that finish early can change a sample.

Letters: P prompts, K samples a prompt, R rows (P·K at first), V vocabulary.
"""
import codecs
import json
import math
import sys
from dataclasses import dataclass

import numpy as np
import torch

import data
import model
from support import cli
from support.cli import InputError
from support.ranks import pick_device


@dataclass
class Sample:
    """One response: the sampled ids (with the stop id, when it came), Σ log π at temperature 1, and whether it stopped."""
    ids: list
    logprob: float
    finished: bool


def uniforms(seed, step, prompt, k, max_tokens):
    """(K, max_tokens) numbers in [0, 1) that belong to this seed, step and prompt index alone, float64 on the CPU."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 2, step, prompt])))
    return torch.from_numpy(generator.random((k, max_tokens)))


def choose(logits, uniform, temperature, top_p):
    """Token ids (R,) from logits (R, V): greedy at temperature 0, else the inverse distribution function at `uniform` (R,).

    The distribution is softmax(logits / temperature) cut to the fewest most probable tokens that hold top_p together.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / max(temperature, 1e-30)).softmax(-1)       # smaller ones, greedy long since, would give inf
    rising = sort(probabilities)
    reached, V = rising.flip(-1).cumsum(-1), rising.shape[-1]      # the mass of the first so many tokens, falling
    last = torch.searchsorted(reached, torch.full_like(reached[:, :1], top_p)).clamp_max(V - 1)
    mass = reached.gather(-1, last)
    # A uniform next to 1 may round to 1: stay below the mass, and so on a token that has some.
    target = torch.minimum(uniform.to(mass.dtype)[:, None] * mass, mass.nextafter(torch.zeros_like(mass)))
    place = torch.searchsorted(reached, target, right=True)
    # Only values were sorted. Of several tokens with the value at this place it is the one that has as many equals of
    # smaller id as there are equals in front of the place.
    value = rising.gather(-1, V - 1 - place)
    tied = place - (V - torch.searchsorted(rising, value, right=True))
    return torch.searchsorted((probabilities == value).cumsum(-1, dtype=torch.int32), (tied + 1).int())[:, 0]


def sort(values):
    """Each row of (R, V) from small to large. On a CPU numpy sorts with vector instructions: 5 ms for 56 rows of 32,000
    where torch takes 144."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(dim=-1).values


@torch.no_grad()
def generate(net, prompts, uniform, stop_ids, allowed, temperature=0.7, top_p=0.9, limits=None, on_token=None):
    """K responses to each prompt: a list of P lists of K Samples.

    prompts: P lists of ids; uniform: (P, K, max_tokens); stop_ids: ids that end a response; allowed: (V,) bool, ids that
    may be sampled; limits: P token limits where a prompt has less room than max_tokens; on_token(row, id) is called for
    each token (for streaming; it waits for the device).
    """
    device = net.embed.weight.device
    P, K, max_tokens = uniform.shape
    forest = data.pack(prompts)
    cache = model.Cache(net.config)
    hidden = net.read(forest, cache)
    cache.open(forest.paths, K, max_tokens)
    last = torch.stack([path[-1] for path in forest.paths]).to(device)
    logits = net.head(hidden[last]).repeat_interleave(K, 0)        # (R, V)
    if not logits.isfinite().all():
        raise InputError("the model's logits are not finite, so nothing can be sampled: its weights are damaged, or training "
                         "has diverged; a lower --lr or --grad_clip may help.")

    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    uniform = uniform.reshape(P * K, max_tokens).to(wide).to(device)
    limit = torch.tensor(limits or [max_tokens] * P, device=device).repeat_interleave(K)
    stop = torch.tensor(sorted(stop_ids), device=device)
    banned = torch.zeros(len(allowed), dtype=wide).masked_fill(~torch.as_tensor(allowed), -math.inf).to(device)
    rows = torch.arange(P * K, device=device)                      # the rows still growing
    ids = torch.full((P * K, max_tokens), -1, device=device)
    logprob = torch.zeros(P * K, dtype=wide, device=device)
    finished = torch.zeros(P * K, dtype=torch.bool, device=device)
    for t in range(max_tokens):
        logits = logits.to(wide)
        tokens = choose(logits + banned, uniform[rows, t], temperature, top_p)
        ids[rows, t] = tokens
        logprob[rows] += logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        stopped = torch.isin(tokens, stop)
        finished[rows] = stopped
        if on_token is not None:
            for row, token in zip(rows.tolist(), tokens.tolist()):
                on_token(row, token)
        live = (~stopped & (t + 1 < limit[rows])).cpu().nonzero()[:, 0]      # the only wait for the device in a step
        if t + 1 == max_tokens or not len(live):
            break
        if len(live) < len(rows):
            cache.keep(live)
            live = live.to(device)
            rows, tokens = rows[live], tokens[live]
        logits = net.head(net(tokens[:, None], cache=cache)[:, 0])

    samples = [Sample(row[:n], value, done) for row, n, value, done in
               zip(ids.tolist(), (ids >= 0).sum(-1).tolist(), logprob.tolist(), finished.tolist())]
    return [samples[i * K:(i + 1) * K] for i in range(P)]


def stopping(tokenizer, chat, config):
    """(ids that end a response, (V,) bool of the ids that may be sampled) for `generate`."""
    return set(tokenizer.stop_ids) | {data.end_id(tokenizer, chat)}, tokenizer.sampling_mask(config.vocab_size)


def response_text(tokenizer, sample):
    """The text of a sample as it stands behind its prompt, without the stop id."""
    return tokenizer.decode(sample.ids[:-1] if sample.finished else sample.ids, continues=True)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

@dataclass
class Settings:
    """Generate responses from a checkpoint: one line of JSON a prompt, {"prompt", "responses": [{"text", "ids", …}]}."""
    model: str = ""                # folder with config.json, safetensors and a tokenizer
    prompt: str | None = None      # one prompt; with --chat text becomes a user's turn, without it is continued as it stands
    prompts: str | None = None     # or a file of prompts: .jsonl, .jsonl.gz or .json; text as above
    k: int = 1                     # responses a prompt
    temperature: float = 0.7       # 0 is greedy
    top_p: float = 0.9             # sample from the fewest tokens that hold this much probability
    max_tokens: int = 256          # tokens a response at most
    seed: int = 0                  # same seed, same samples
    chat: str | None = None        # dialogue format: hh, zephyr, chatml, llama3, mistral
    batch_size: int = 8            # prompts at a time
    dtype: str = "float32"         # float32, bfloat16, float64
    device: str = "auto"           # auto, cpu, cuda, mps
    out: str | None = None         # write the rows here instead of printing them

    def __post_init__(self):
        for name, fits, says in (
                ("model", self.model, "name a model folder"), ("k", self.k >= 1, "at least 1"),
                ("temperature", 0 <= self.temperature < math.inf, "0 or larger"), ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
                ("max_tokens", self.max_tokens >= 1, "at least 1"), ("batch_size", self.batch_size >= 1, "at least 1"),
                ("seed", self.seed >= 0, "0 or larger"),
                ("dtype", self.dtype in ("float32", "bfloat16", "float64"), "float32, bfloat16 or float64")):
            if not fits:
                raise InputError(f"--{name}={getattr(self, name)}: {says}.")
        if (self.prompt is None) == (self.prompts is None):
            raise InputError("give either --prompt=TEXT or --prompts=FILE.")


def matching_tokenizer(folder, config):
    """The folder's tokenizer, after checking that the model has a row for each of its ids (more rows are usual)."""
    tokenizer = data.load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but vocab_size in config.json is "
                         f"{config.vocab_size}.")
    return tokenizer


def load_model(folder, dtype, device):
    """(network, tokenizer) of a folder."""
    net = model.load(folder, getattr(torch, dtype), device)
    return net, matching_tokenizer(folder, net.config)


def main(settings):
    """Write k responses to each prompt as rows of JSON; one response to one --prompt on a terminal is streamed as text."""
    device = pick_device(settings.device)
    net, tokenizer = load_model(settings.model, settings.dtype, device)
    chat = data.check_chat(tokenizer, settings.chat)
    if settings.prompt is not None:
        rows = [data.Row(data.in_turns(settings.prompt, chat), None, None, None, "--prompt")]
    else:
        rows, report = data.read_rows(settings.prompts, "prompts")
        print(report, file=sys.stderr)
    prompts = [data.prompt_ids(tokenizer, data.in_turns(row.prompt, chat), chat) for row in rows]
    prompts = [tokenizer.prefix(not ids) + ids for ids in prompts]
    context, cut = net.config.context, 0
    max_tokens = min(settings.max_tokens, context)                 # a larger table and cache would never be filled
    for i, ids in enumerate(prompts):
        if len(ids) >= context and settings.prompt is not None:
            raise InputError(f"--prompt takes {len(ids)} tokens; the model's context of {context} has no room for an answer.")
        if len(ids) >= context:        # the front gives way, as in training, so that max_tokens or half the context are left
            prefix = tokenizer.prefix(False)
            keep = context - len(prefix) - max(1, min(max_tokens, context // 2))
            prompts[i], cut = prefix + ids[len(ids) - keep:], cut + 1
    if cut:
        print(f"{cut} of {len(rows)} prompts do not fit the context of {context} and lost their front", file=sys.stderr)
    room = [context - len(ids) for ids in prompts]
    stop_ids, allowed = stopping(tokenizer, chat, net.config)
    streaming = settings.prompt is not None and settings.k == 1 and settings.out is None and sys.stdout.isatty()
    stream = tokenizer.stream(continues=True) if streaming else None

    def show(row, token):
        if token not in stop_ids:
            print(stream.push(token), end="", flush=True)

    try:
        out = open(settings.out, "w", encoding="utf-8") if settings.out else sys.stdout
    except OSError as error:
        raise InputError(f"--out={settings.out}: cannot be written ({error.strerror}).") from None
    escape = codecs.lookup(getattr(out, "encoding", None) or "utf-8").name != "utf-8"      # rows stay whole
    line = cli.StepLine(len(rows), "prompts", enabled=bool(settings.out))
    for start in range(0, len(rows), settings.batch_size):
        batch = range(start, min(start + settings.batch_size, len(rows)))
        table = torch.stack([uniforms(settings.seed, 0, i, settings.k, max_tokens) for i in batch])
        responses = generate(net, [prompts[i] for i in batch], table, stop_ids, allowed, settings.temperature, settings.top_p,
                             [min(max_tokens, room[i]) for i in batch],
                             show if streaming else None)
        if streaming:
            print(stream.flush())
            return
        for i, samples in zip(batch, responses):
            print(json.dumps({"prompt": rows[i].prompt, "responses": [
                {"text": response_text(tokenizer, s), "ids": s.ids, "logprob": round(s.logprob, 4), "finished": s.finished}
                for s in samples]}, ensure_ascii=escape), file=out, flush=True)
        line.update(batch[-1] + 1)
    if settings.out:
        out.close()
        print(f"{len(rows)} prompts × {settings.k} responses written to {settings.out}")


if __name__ == "__main__":
    cli.run(main, Settings)
