"""The embedded world: short texts whose true quality is known, so that everything here can be checked with no download.

    torchrun train.py                       base model → SFT → judge → OSP, then a table: before and after
    torchrun train.py --toy_family=neox     the same with GPT-NeoX and a byte-level tokenizer
    torchrun train.py --recipe=sr-dpo       … → SFT → Sr-DPO; --recipe=sft and --recipe=judge stop there
    torchrun rlhf.py                        … → SFT → reward model → PPO

A prompt joins a wish, a topic and a time ("A calm line about the sea at dawn:"), a response is a handful of words
("calm waves tide shells dawn thanks"), and `reward` says how good it is. Every stage is an ordinary run of train.py
on files written to out_dir/world; its command line is printed, and can be typed.
"""
import dataclasses
import io
import itertools
import json
import math
import re
import shutil
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch

import data
import judge
import losses
import model
import sample
import train
from experiments import rlhf
from support import checkpoint, cli

# ---------------------------------------------------------------------------------------------------------------------
# The world

def table(text):
    """{first word: the other words} of each line."""
    return {line.split(":")[0].strip(): line.split(":")[1].split() for line in text.strip().splitlines()}


TOPICS = table("""
    the sea: waves tide shells sails foam salt
    a forest: pines moss ferns owls bark trails
    the garden: roses bees seeds hedges tulips soil
    a kitchen: bread soup spoons ovens herbs flour
    the market: stalls coins baskets spices fruit traders
    a river: stream trout pebbles reeds bridges banks
    the mountain: peaks cliffs eagles summits slopes ridges
    a city: streets towers trams squares lamps crowds
    the farm: barns hens wheat tractors ponies hay
    a library: books shelves pages readers maps novels
    the workshop: hammers nails planks glue tools sawdust
    a concert: violins drums songs flutes chorus melody
    the desert: dunes sand cactus camels oasis lizards
    a harbour: ships anchors ropes gulls docks nets
    the school: pupils chalk lessons desks teachers bells
    a meadow: clover grass daisies lambs crickets butterflies""")
CRAFTS = table("""
    painting: canvas brushes colours easels portraits sketches
    knitting: wool needles scarves mittens stitches yarn
    pottery: clay kilns bowls glazes jugs wheels
    sewing: thread buttons pockets zips ribbons hems
    chess: pawns rooks knights bishops queens clocks
    cycling: pedals helmets brakes tyres saddles gears
    astronomy: planets comets telescopes moons orbits galaxies
    carpentry: saws chairs tables benches drawers oak""")
TIMES = {"at": "dawn noon dusk night".split(), "in": "spring summer autumn winter".split()}
TIMES = [f"{word} {time}" for word in TIMES for time in TIMES[word]]
WISHES = "calm cheerful grand funny curious tender lively simple".split()
POLITE = "thanks please welcome friend dear cheers".split()
RUDE = "boring whatever meh ugh nonsense yawn".split()

FRAMES = {"lines": ("A {wish} line about {topic} {time}:", TOPICS), "advice": ("{wish} advice on {topic} {time}:", CRAFTS)}


@dataclasses.dataclass(frozen=True)
class Prompt:
    domain: str                    # lines, or advice: the second domain, which alignment never sees
    topic: str
    wish: str
    time: str

    @property
    def text(self):
        text = FRAMES[self.domain][0].format(topic=self.topic, wish=self.wish, time=self.time)
        return text[0].upper() + text[1:]

    @property
    def nouns(self):
        return FRAMES[self.domain][1][self.topic]


PROMPTS = {prompt.text: prompt for domain, (_, topics) in FRAMES.items()
           for prompt in (Prompt(domain, *parts) for parts in itertools.product(topics, WISHES, TIMES))}
BEST = 4.5


def reward(prompt, response):
    """r*(x, y), the true reward in [-1, 1] of a response (text) to one of PROMPTS (text).

    The first three different on-topic nouns count 1 each; a word that fits the wish, one that fits the time, and a
    polite one ½ each, once. A rude word costs 1, any other word ½, a repeated one ½, and each word beyond the sixth ¼.
    So longer is better up to six words, and worse after. The sum is divided by its maximum, 4½, and cut off at -1.
    """
    return max(sum(marks(prompt, response)) / BEST, -1.0)


def marks(prompt, response):
    """What each word adds to the sum."""
    prompt, seen, found = PROMPTS[prompt], set(), []
    room = [[prompt.nouns, 1.0, 3], [[prompt.wish], 0.5, 1], [[prompt.time.split()[1]], 0.5, 1], [POLITE, 0.5, 1]]
    for place, word in enumerate(response.split()):
        value = -1.0 if word in RUDE else -0.5
        for fitting in room:
            if word in fitting[0] and word not in seen:
                value = fitting[1] if fitting[2] else 0.0
                fitting[2] -= fitting[2] > 0
        seen.add(word)
        found.append(value - 0.25 * (place >= 6))
    return found


def write_response(prompt, rng, skill=(0.4, 0.4)):
    """A response as people write them, good or bad: a hidden skill decides how often each word fits, and how many come.

    The skilled write more, so in the data longer responses are better ones.
    """
    skill = rng.beta(*skill)

    def fits():
        return rng.random() < 0.1 + 0.85 * skill

    def other_row(table, own):
        return table[rng.choice([key for key in table if key != own])]

    words = []
    if rng.random() < 0.3 + 0.5 * skill:
        words.append(prompt.wish if fits() else rng.choice(WISHES))
    topics = FRAMES[prompt.domain][1]
    own, astray = list(rng.permutation(prompt.nouns)), list(rng.permutation(other_row(topics, prompt.topic)))
    for _ in range(rng.integers(1, 4) + rng.binomial(2, 0.2 + 0.3 * skill) + (rng.random() < 0.15)):
        words.append((own if fits() else astray).pop())
    if rng.random() < 0.25 * (1 - skill):
        words.append(rng.choice(words))
    if rng.random() < 0.5 * (1 - skill):
        words.append(rng.choice(RUDE))
    if rng.random() < 0.3 + 0.5 * skill:
        words.append((prompt.time if fits() else rng.choice(TIMES)).split()[1])
    if rng.random() < 0.2 + 0.5 * skill:
        words.append(rng.choice(POLITE))
    return " ".join(str(w) for w in words)


CROWD = (0.4, 1.2)                 # the skill of those who wrote the SFT data: most are not good at it


def rate(rewards):
    """Ratings out of 100 of many responses: 1, 25, 50, 75 or 100, for the fifth of them that each one falls into."""
    order = np.argsort(np.argsort(rewards, kind="stable"), kind="stable")
    return np.array([1, 25, 50, 75, 100])[order * 5 // len(rewards)]


def marked(prompt, response):
    """The response with a + or - behind each word."""
    return " ".join(f"{word} {'+' if mark > 0 else '-'}" for word, mark in zip(response.split(), marks(prompt, response)))


# How many rows of each file; what stands in no training file at all are the held-out combinations of wish, topic and time.
ROWS = dict(texts=16000, sft=6000, pairs=8000, blanks=2000, held_out=512, advice=128, eval=512)
SHARPNESS = 5.0                    # of the labellers: P(y ≻ y′) = σ(5 (r − r′)), so about every sixth label is wrong


# Plain, rated, and two responses marked word by word, as a teacher would: a third of the texts each. The marks are what a
# small model learns "fits the prompt" from; without them the judge stays near chance for long.
RATED = ("{x} {y}", "{p} {x} {y}", "{x}\n\n1: {marked}\n\n2: {other}")


def split(seed):
    """(training, held-out, second-domain) prompts; no held-out combination is in a training file."""
    lines = [prompt for prompt in PROMPTS.values() if prompt.domain == "lines"]
    order = np.random.default_rng([seed, 0]).permutation(len(lines))
    held_out = [lines[i] for i in order[:ROWS["held_out"]]]
    return [lines[i] for i in order[ROWS["held_out"]:]], held_out, [p for p in PROMPTS.values() if p.domain == "advice"]


def draw(prompts, number, rng, skill=(0.4, 0.4)):
    """(prompt text, response, reward) of `number` responses to random prompts."""
    found = []
    for i in rng.integers(len(prompts), size=number):
        response = write_response(prompts[i], rng, skill)
        found.append((prompts[i].text, response, reward(prompts[i].text, response)))
    return found


def label_pairs(prompts, number, rng):
    """Human pairs: two responses to a prompt, the label drawn by Bradley–Terry from the true rewards."""
    rows = []
    while len(rows) < number:
        (text, a, r), = draw(prompts, 1, rng)
        b = write_response(PROMPTS[text], rng)
        if a != b:
            a_wins = rng.random() < 1 / (1 + math.exp(-SHARPNESS * (r - reward(text, b))))
            rows.append({"prompt": text, "chosen": " " + (a if a_wins else b), "rejected": " " + (b if a_wins else a)})
    return rows


def label_blanks(prompts, number, rng):
    """The same with one slot empty (silence has the reward 0): the judge is to be asked such questions."""
    rows = []
    for text, a, r in draw(prompts, number, rng):
        a_wins = rng.random() < 1 / (1 + math.exp(-SHARPNESS * r))
        rows.append({"prompt": text, "chosen": " " + a if a_wins else "", "rejected": "" if a_wins else " " + a})
    return rows


def world(seed):
    """{file name: rows}, a pure function of the seed."""
    train, held_out, advice = split(seed)
    rng = [np.random.default_rng([seed, 1, i]) for i in range(9)]
    # What the base model reads, of both domains: what belongs together, and responses, some of them rated, as the web
    # holds reviews: without them p means nothing to it.
    texts = draw(train, ROWS["texts"] * 3 // 4, rng[0]) + draw(advice, ROWS["texts"] // 4, rng[1])
    ratings = rate([r for _, _, r in texts])
    rated = []
    for i, ((x, y, _), n) in enumerate(zip(texts, ratings)):
        p, other = data.REFINEMENT_PROMPT.replace("100", str(n), 1), write_response(PROMPTS[x], rng[8])
        rated.append({"text": RATED[i % 3].format(p=p, x=x, y=y, marked=marked(x, y), other=marked(x, other))})
    kinds = [*TOPICS.items(), *CRAFTS.items(), ("polite", POLITE), ("rude", RUDE)]
    for i in rng[8].integers(len(kinds), size=ROWS["texts"] // 4):
        rated.append({"text": f"{kinds[i][0]}: {' '.join(rng[8].permutation(kinds[i][1]))}"})
    return {
        "texts": rated,
        "sft": [{"prompt": x, "response": " " + y} for x, y, _ in draw(train, ROWS["sft"], rng[2], CROWD)],
        "pairs": label_pairs(train, ROWS["pairs"], rng[3]),
        "blanks": label_blanks(train, ROWS["blanks"], rng[4]),
        "prompts": [{"prompt": prompt.text} for prompt in train],
        "eval_sft": [{"prompt": x, "response": " " + y} for x, y, _ in draw(held_out, ROWS["eval"], rng[5], CROWD)],
        "eval_pairs": label_pairs(held_out, ROWS["eval"], rng[6]),
        "eval_prompts": [{"prompt": prompt.text} for prompt in held_out],
        "eval_advice": [{"prompt": advice[i].text} for i in rng[7].permutation(len(advice))[:ROWS["advice"]]],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and model

VOCABULARY = 1536                  # enough for each word of the world to be one token


def corpus():
    """What the tokenizers learn from: the world's words, its prompts, and the instructions the model will read."""
    words = [w for table in (TOPICS, CRAFTS) for row in table.values() for w in row] + POLITE + RUDE
    texts = ["words: " + " ".join(words)] * 8 + list(PROMPTS)[::8]
    texts += [data.REFINEMENT_PROMPT, " + - + -\n\n1: -\n\n2: +"] * 8 + [f"rating of {n}" for n in range(10, 101, 10)] * 8
    return texts + list(judge.TEMPLATES.values()) * 8


def write_sentencepiece(folder, texts, vocabulary):
    """tokenizer.model with so many pieces of the texts, as Llama has it; byte pieces stand for what the vocabulary lacks."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=content, model_type="bpe", vocab_size=vocabulary, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0, num_threads=1,
        minloglevel=2)
    (folder / "tokenizer.model").write_bytes(content.getvalue())
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return names | dict(tokenizer_class="LlamaTokenizer", add_bos_token=True, add_eos_token=False, legacy=False)


def merge_pairs(words, number):
    """Byte-pair encoding: [(left, right)] of up to `number` merges, the most frequent neighbours first.

    words: {word as tokenizer.json shows its bytes: count}.
    """
    parts, merges = {word: list(word) for word in words}, []
    while len(merges) < number:
        counts = {}
        for word, pieces in parts.items():
            for pair in zip(pieces, pieces[1:]):
                counts[pair] = counts.get(pair, 0) + words[word]
        if not counts:
            break
        merges.append(best := max(counts, key=lambda pair: (counts[pair], pair)))
        for pieces in parts.values():
            i = 0
            while i + 1 < len(pieces):
                if (pieces[i], pieces[i + 1]) == best:
                    pieces[i:i + 2] = ["".join(best)]
                i += 1
    return merges


def write_byte_level(folder, texts, vocabulary):
    """tokenizer.json with so many pieces of the texts, as GPT-NeoX has it: byte-level BPE."""
    shown = {byte: char for char, byte in data.BYTE_OF.items()}
    words = {}
    for word in re.findall(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s", "\n".join(texts)):
        word = "".join(shown[byte] for byte in word.encode())
        words[word] = words.get(word, 0) + 1
    end = "<|endoftext|>"
    vocab = [end, *(shown[byte] for byte in range(256))]
    merges = merge_pairs(words, vocabulary - len(vocab))
    vocab = {piece: id for id, piece in enumerate(dict.fromkeys(vocab + [a + b for a, b in merges]))}
    special = dict(id=0, content=end, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    write_json(folder / "tokenizer.json", dict(
        version="1.0", truncation=None, padding=None, added_tokens=[special], normalizer=None, pre_tokenizer=byte_level,
        post_processor=None, decoder=byte_level,
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                   fuse_unk=False, byte_fallback=False, vocab=vocab, merges=[f"{a} {b}" for a, b in merges])))
    return dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=end, eos_token=end, unk_token=end)


TOKENIZERS = {"llama": write_sentencepiece, "neox": write_byte_level}
SHAPE = dict(hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=256,
             vocab_size=VOCABULARY)


def write_model(folder, family, seed, texts=None, shape=None):
    """An untrained model folder: tokenizer, config.json, weights. texts: what the tokenizer learns from, by default this
    world's; shape: keys of config.json, by default SHAPE."""
    texts, shape = texts or corpus(), shape or SHAPE
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tokenizer_config.json", TOKENIZERS[family](folder, texts, shape["vocab_size"]))
    tokenizer = data.load_tokenizer(folder)
    raw = shape | dict(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    if family == "llama":
        raw |= dict(model_type="llama", architectures=["LlamaForCausalLM"], rms_norm_eps=1e-5, tie_word_embeddings=True)
    else:
        raw |= dict(model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"], hidden_act="gelu", rotary_pct=0.25,
                    intermediate_size=4 * shape["hidden_size"], use_parallel_residual=True)
    model.save(model.Transformer(model.parse_config(raw)).initialise(seed), folder)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_world(folder, family, seed):
    """All files of the job: folder/*.jsonl, the untrained folder/model, and at the end what they were made from, world.json."""
    (folder / "world.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "model", ignore_errors=True)        # the other family's tokenizer must not stay
    for name, rows in world(seed).items():
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / f"{name}.jsonl", rows)
    write_model(folder / "model", family, seed)
    write_json(folder / "world.json", dict(family=family, seed=seed))


# ---------------------------------------------------------------------------------------------------------------------
# The job

# What each stage adds to train.py's defaults: found by trial at this size, the same for all seeds. The papers' learning rates
# are for models a thousand times larger. OSP is fast: its strengths approach ½ after some 40 steps, when samples grow alike.
# PPO's learned reward stops rising after some 25 (64 samples each), and so does its KL.
STAGES = {
    "base":  dict(steps=400, batch_size=64, lr=2e-3, lr_schedule="cosine", warmup_steps=20),
    "sft":   dict(steps=60, batch_size=64, lr=3e-4, lr_schedule="cosine", eval_every=20),
    "judge": dict(steps=500, batch_size=32, lr=5e-4, lr_schedule="cosine", eval_every=100),
    "osp":   dict(steps=80, batch_size=16, lr=3e-4, beta=0.1, max_tokens=16, sample_every=40),
    "dpo":   dict(steps=100, batch_size=32, lr=1e-4, optimizer="adam"),
    "reward": dict(steps=250, batch_size=64, lr=5e-4, lr_schedule="cosine", eval_every=50),
    "rlhf":  dict(steps=40, batch_size=64, lr=3e-4, max_tokens=16, sample_every=20),
}


def plan(settings):
    """{stage name: settings of train.py} in order: what leads to the settings' recipe, and that recipe itself.

    What the user gave goes to the last stage; what concerns the whole job (seed, device, …) to all of them.
    """
    out = Path(settings.out_dir)
    world, final = out / "world", {name: str(out / name / "final") for name in (*train.RECIPES, *rlhf.RECIPES, "base")}

    def files(*names):
        return [str(world / f"{name}.jsonl") for name in names]

    recipe = settings.recipes[settings.recipe]
    chain = {"base": dict(recipe="sft", model=str(world / "model"), data=files("texts")),
             "sft": dict(recipe="sft", model=final["base"], data=files("sft"), eval_data=files("eval_sft"))}
    if settings.recipe == "judge" or recipe.has_judge:
        # A fifth of the SFT rows among the instructions, so that the model does not unlearn to answer.
        chain["judge"] = dict(recipe="judge", model=final["sft"], eval_data=files("eval_pairs"),
                              data=files("pairs", "blanks") + [f"{world / 'sft.jsonl'}:0.2"])
    if recipe.pairs == "spin":
        chain["spin"] = dict(recipe="spin", model=final["sft"], data=files("sft"))
    elif recipe.has_judge:
        chain[settings.recipe] = dict(recipe=settings.recipe, model=final["judge"],
                                      **(dict(prompts=files("prompts")) if recipe.online else dict(data=files("pairs"))))
    elif recipe.pairs == "dataset" or settings.recipe == "rlhf":
        name = "reward" if settings.recipe == "rlhf" else settings.recipe
        chain[name] = dict(recipe=name, model=final["sft"], data=files("pairs"), eval_data=files("eval_pairs"))
    if settings.recipe == "rlhf":
        chain["rlhf"] = dict(recipe="rlhf", model=final["sft"], reward=final["reward"], prompts=files("prompts"),
                             eval_data=files("eval_prompts"))
    for name, stage in chain.items():
        whole = {key: settings.given[key] for key in ("seed", "device", "dtype", "resume", "toy_family")
                 if key in settings.given}
        own = settings.given if name == list(chain)[-1] else whole
        preset = STAGES.get(name, STAGES["osp" if recipe.online else "dpo"])
        # All pairs of a step at once: these models are so small that calls cost more than numbers.
        chain[name] = {"micro_batch_size": 64, **preset, **stage, **own, "out_dir": str(out / name)}
    return chain


def command_line(stage):
    settings = [f"--{key}={','.join(value) if isinstance(value, list) else value}" for key, value in stage.items()]
    return " ".join(["rlhf.py" if stage["recipe"] in rlhf.RECIPES else "train.py", *settings])


def sample_all(net, tokenizer, prompts, settings, stream, k=2):
    """k samples of a network for each prompt (text), with the stage's temperature and top_p: lists of sample.Sample.

    A pure function of the seed: the uniforms belong to (seed, stream, prompt), far from training's streams (its steps).
    """
    stop_ids, allowed = sample.stopping(tokenizer, "hh", net.config)
    found = []
    for start in range(0, len(prompts), 64):
        batch = range(start, min(start + 64, len(prompts)))
        ids = [tokenizer.prefix(False) + tokenizer.encode(prompts[i]) for i in batch]
        uniform = torch.stack([sample.uniforms(settings.seed, 10 ** 6 + stream, i, k, settings.max_tokens or 16)
                               for i in batch])
        found += sample.generate(net, ids, uniform, stop_ids, allowed, settings.temperature, settings.top_p)
    return found


@torch.no_grad()
def divergence(policy, reference, tokenizer, prompts, samples):
    """Mean of Σ log π - log π_ref over the samples, in nats a response: both at temperature 1, as train.py's `kl`."""
    total = []
    for prompt, group in zip(prompts, samples):
        x = tokenizer.prefix(False) + tokenizer.encode(prompt)
        forest, starts = data.pack([x + one.ids for one in group]), [len(x)] * len(group)
        total.append(losses.logprobs(policy, forest, starts) - losses.logprobs(reference, forest, starts))
    return float(torch.cat(total).mean())


def judge_report(folder, world):
    """The judge on held-out pairs with fresh Bradley–Terry labels: judge.report's figures, and `true_order`, how often it
    picks the response whose true reward is higher."""
    net, tokenizer = sample.load_model(folder, "float32", "cpu")
    rows, _ = data.read_rows(world / "eval_pairs.jsonl", "pairs")
    questioner = judge.Questioner(tokenizer, "helpful", net.config.context)
    verdicts = judge.compare(net, questioner, [(row.prompt, row.chosen, row.rejected) for row in rows])
    true = np.array([np.sign(reward(row.prompt, row.chosen) - reward(row.prompt, row.rejected)) for row in rows])
    said = np.sign(verdicts.p.numpy() - 0.5)
    lengths = [(len(row.chosen.split()), len(row.rejected.split())) for row in rows]
    return judge.report(verdicts, lengths) | {"true_order": float((said == true)[true != 0].mean())}


def results(out, stages, settings):
    """The table of the stages' models on held-out prompts, as text."""
    rows, _ = data.read_rows(out / "world" / "eval_prompts.jsonl", "prompts")
    prompts = [row.prompt for row in rows]
    names = [name for name in stages if name not in ("base", "reward")]
    nets, scores, lines = {}, {}, []
    for stream, name in enumerate(names):
        nets[name], tokenizer = sample.load_model(out / name / "final", "float32", "cpu")
        samples = sample_all(nets[name], tokenizer, prompts, settings, stream)
        scores[name] = np.array([[reward(x, sample.response_text(tokenizer, one)) for one in group]
                                 for x, group in zip(prompts, samples)])
        before = names[max(stream - 1, 0)]              # the model this stage started from

        def wins(other):
            won = ((scores[name] > scores[other]) + 0.5 * (scores[name] == scores[other])).mean(1)
            return f"{100 * won.mean():5.1f} ± {196 * won.std(ddof=1) / math.sqrt(len(won)):.1f}"

        kl = divergence(nets[name], nets[before], tokenizer, prompts, samples)
        length = np.mean([len(one.ids) for group in samples for one in group])
        lines.append(f"{name:<8} {scores[name].mean():8.3f}   {wins(before):>15}   {wins('sft'):>15}   {kl:10.2f}   {length:6.1f}")
    data_mean = np.mean([reward(row.prompt, row.chosen) for row in data.read_rows(out / "world" / "sft.jsonl", "responses")[0]])
    text = [f"{len(prompts)} held-out prompts, 2 samples each at temperature {settings.temperature}, top_p {settings.top_p}; "
            f"seed {settings.seed}, {settings.toy_family}",
            f"true reward: floor -1, ceiling 1, the SFT data {data_mean:.3f}; win rates by the true reward, ties half, ± 95 %",
            "", "model    reward    wins % over start   wins % over SFT   KL to start   tokens", *lines]
    if "judge" in names:
        told = {name: judge_report(out / name / "final", out / "world") for name in ("sft", "judge")}
        text += ["", f"judge accuracy on 512 held-out noisy pairs: {100 * told['sft']['accuracy']:.1f} % before augmentation, "
                 f"{100 * told['judge']['accuracy']:.1f} % after ({100 * told['judge']['true_order']:.1f} % by the true reward); "
                 f"the longer one wins {100 * told['judge']['longer_wins']:.0f} %, slot A {100 * told['judge']['first_slot_rate']:.0f} %"]
    if "reward" in stages:
        last = checkpoint.last_record(out / "reward" / "metrics.jsonl")
        text += ["", f"reward model's accuracy on {ROWS['eval']} held-out noisy pairs: {100 * last['eval_accuracy']:.1f} %"]
    curve = [record["eval_loss"] for _, record in checkpoint.records(out / "sft" / "metrics.jsonl") if "eval_loss" in record]
    if curve:
        text.append("SFT's held-out loss, nats a token: " + " → ".join(f"{value:.3f}" for value in curve))
    return "\n".join(text)


def main(settings):
    """The whole path, from texts to the table; `settings` are train.Settings without a model."""
    started, out = time.time(), Path(settings.out_dir)
    ranks = train.Ranks.start(settings.device)
    asked = dict(family=settings.toy_family, seed=settings.seed)
    made = cli.read_json(out / "world" / "world.json", absent={})
    if made and made != asked:
        if settings.resume == "auto":
            raise cli.InputError(f"{out / 'world'} was made with --toy_family={made.get('family')} --seed={made.get('seed')}; "
                                 f"use another --out_dir, or --resume=never to start over.")
        settings.given["resume"] = "never"        # models of another world are nothing to go on from, not even by force
    stages = plan(settings)
    ranks.wait()                                  # all ranks have read world.json
    if ranks.rank == 0 and made != asked:
        write_world(out / "world", settings.toy_family, settings.seed)
    ranks.wait()
    for stage in stages.values():
        if ranks.rank == 0:
            print("\n" + command_line(stage), flush=True)
        if stage["recipe"] in rlhf.RECIPES:
            trainer = rlhf.TRAINERS[stage["recipe"]](rlhf.Settings(**stage))
        else:
            trainer = train.Trainer(train.Settings(**stage))
        trainer.run()
    if ranks.rank == 0:
        place = out / f"result-{settings.recipe}.txt"
        final = out / list(stages)[-1] / "final" / "model.safetensors"
        if not place.exists() or place.stat().st_mtime < final.stat().st_mtime:
            # PPO trains on samples from all of π; the table samples as it does for the other recipes.
            like_others = dict(temperature=0.7, top_p=0.9) if settings.recipe == "rlhf" else {}
            table = results(out, stages, dataclasses.replace(trainer.settings, **like_others))
            place.write_text(table + "\n", encoding="utf-8")
        print("\n" + place.read_text(encoding="utf-8") + f"\nall of it in {cli.duration(time.time() - started)}")
    ranks.wait()
