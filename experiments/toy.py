"""The embedded world: short texts whose true quality is known, so that everything here can be checked
offline.

    torchrun train.py                       base model → SFT → judge → OSP, then a table: before and after
    torchrun train.py --toy_family=neox     the same with GPT-NeoX and a byte-level tokenizer
    torchrun train.py --recipe=sr-dpo       … → SFT → Sr-DPO; --recipe=sft and --recipe=judge stop there
    torchrun -m experiments.rlhf            … → SFT → reward model → PPO

A prompt joins a wish, a topic and a time ("A calm line about the sea at dawn:"), a response is a handful of
words ("calm waves tide shells dawn thanks"), and `reward` says how good it is. Every stage is an ordinary run
of train.py on files written to out_dir/world; its command line is printed, and can be typed.
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

import forest
import judge
import losses
import model
import sample
from data import REFINEMENT_PROMPT, chat_of
from recipes import RECIPES
from support import cli, disk, report
from support.ranks import Ranks
from support.rows import read_rows
from support.tokenizer import load_tokenizer
from support.tokenizer_json import BYTE_OF

# ------------------------------------------------------------------------------------------------------------
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
TIMES = ([f"at {time}" for time in "dawn noon dusk night".split()] +
         [f"in {season}" for season in "spring summer autumn winter".split()])
WISHES = "calm cheerful grand funny curious tender lively simple".split()
POLITE = "thanks please welcome friend dear cheers".split()
RUDE = "boring whatever meh ugh nonsense yawn".split()
WORDS = [word for row in (*TOPICS.values(), *CRAFTS.values(), POLITE, RUDE) for word in row]

FRAMES = {"lines": ("A {wish} line about {topic} {time}:", TOPICS),
          "advice": ("{wish} advice on {topic} {time}:", CRAFTS)}


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

    The first three different on-topic nouns count 1 each; a word that fits the wish, one that fits the time,
    and a polite one ½ each, once. A rude word costs 1, any other word ½, a repeated one ½, and each word
    after the sixth ¼. So longer is better up to six words, and worse after. The sum is divided by its
    maximum, 4½, and cut off at -1.
    """
    return max(sum(marks(prompt, response)) / BEST, -1.0)


def marks(prompt, response):
    """What each word adds to the sum."""
    prompt, seen, values = PROMPTS[prompt], set(), []
    time = prompt.time.split()[1]
    # [words, what one is worth, how many still count]
    room = [[prompt.nouns, 1.0, 3], [[prompt.wish], 0.5, 1], [[time], 0.5, 1], [POLITE, 0.5, 1]]
    for place, word in enumerate(response.split()):
        value = -1.0 if word in RUDE else -0.5
        for fitting in room:
            if word in fitting[0] and word not in seen:
                value = fitting[1] if fitting[2] else 0.0
                fitting[2] -= fitting[2] > 0
        seen.add(word)
        values.append(value - 0.25 * (place >= 6))
    return values


def write_response(prompt, rng, skill=(0.4, 0.4)):
    """A response as people write them, good or bad: a hidden skill decides how often each word fits, and how
    many come. The skilled write more, so in the data longer responses are better ones."""
    skill = rng.beta(*skill)

    def fits():
        return rng.random() < 0.1 + 0.85 * skill

    words = []
    if rng.random() < 0.3 + 0.5 * skill:
        words.append(prompt.wish if fits() else rng.choice(WISHES))
    topics = FRAMES[prompt.domain][1]
    own = list(rng.permutation(prompt.nouns))
    astray = list(rng.permutation(topics[rng.choice([topic for topic in topics if topic != prompt.topic])]))
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
    return " ".join(str(word) for word in words)


# ------------------------------------------------------------------------------------------------------------
# Its files

# Rows per file. What stands in no training file at all are the held-out combinations of wish, topic and time.
ROWS = dict(texts=16000, sft=6000, pairs=8000, blanks=2000, held_out=512, advice=128, eval=512)
CROWD = (0.4, 1.2)                 # the skill of those who wrote the SFT data: most are not good at it
SHARPNESS = 5.0                    # of the labellers: P(y ≻ y′) = σ(5 (r − r′)); every sixth label is wrong
# Plain, rated, and two responses marked word by word, as a teacher would: a third of the texts each. The
# marks are what a small model learns "fits the prompt" from; without them the judge stays near chance for
# long.
RATED = ("{x} {y}", "{p} {x} {y}", "{x}\n\n1: {marked}\n\n2: {other}")


def split(seed):
    """(training, held-out, second-domain) prompts; no held-out combination is in a training file."""
    lines = [prompt for prompt in PROMPTS.values() if prompt.domain == "lines"]
    order = np.random.default_rng([seed, 0]).permutation(len(lines))
    held_out = [lines[i] for i in order[:ROWS["held_out"]]]
    advice = [prompt for prompt in PROMPTS.values() if prompt.domain == "advice"]
    return [lines[i] for i in order[ROWS["held_out"]:]], held_out, advice


def draw(prompts, number, rng, skill=(0.4, 0.4)):
    """(prompt text, response, reward) of `number` responses to random prompts."""
    drawn = []
    for i in rng.integers(len(prompts), size=number):
        response = write_response(prompts[i], rng, skill)
        drawn.append((prompts[i].text, response, reward(prompts[i].text, response)))
    return drawn


def labelled(text, a, b, difference, rng):
    """A row whose label is drawn by Bradley–Terry from the difference of the true rewards of a and b."""
    if rng.random() >= 1 / (1 + math.exp(-SHARPNESS * difference)):
        a, b = b, a
    return {"prompt": text, "chosen": a and " " + a, "rejected": b and " " + b}


def label_pairs(prompts, number, rng):
    """Human pairs: two responses to a prompt."""
    rows = []
    while len(rows) < number:
        (text, a, r), = draw(prompts, 1, rng)
        b = write_response(PROMPTS[text], rng)
        if a != b:
            rows.append(labelled(text, a, b, r - reward(text, b), rng))
    return rows


def label_blanks(prompts, number, rng):
    """The same with one slot empty (silence has the reward 0): the judge is to be asked such questions."""
    return [labelled(text, a, "", r, rng) for text, a, r in draw(prompts, number, rng)]


def base_texts(train, advice, rng):
    """What the base model reads, of both domains: what belongs together, and responses, some of them rated,
    as the web holds reviews: without them p means nothing to it."""
    def marked(x, y):
        return " ".join(f"{word} {'+' if mark > 0 else '-'}" for word, mark in zip(y.split(), marks(x, y)))

    texts = draw(train, ROWS["texts"] * 3 // 4, rng[0]) + draw(advice, ROWS["texts"] // 4, rng[1])
    # Ratings out of 100: 1, 25, 50, 75 or 100, for the fifth of all rewards that each falls into.
    order = np.argsort(np.argsort([r for _, _, r in texts], kind="stable"), kind="stable")
    ratings, rows = np.array([1, 25, 50, 75, 100])[order * 5 // len(texts)], []
    for i, ((x, y, _), rating) in enumerate(zip(texts, ratings)):
        p, other = REFINEMENT_PROMPT.replace("100", str(rating), 1), write_response(PROMPTS[x], rng[8])
        rows.append({"text": RATED[i % 3].format(p=p, x=x, y=y, marked=marked(x, y), other=marked(x, other))})
    kinds = [*TOPICS.items(), *CRAFTS.items(), ("polite", POLITE), ("rude", RUDE)]
    for i in rng[8].integers(len(kinds), size=ROWS["texts"] // 4):
        rows.append({"text": f"{kinds[i][0]}: {' '.join(rng[8].permutation(kinds[i][1]))}"})
    return rows


def world(seed):
    """{file name: rows}, a pure function of the seed."""
    def responses(drawn):
        return [{"prompt": x, "response": " " + y} for x, y, _ in drawn]

    train, held_out, advice = split(seed)
    rng = [np.random.default_rng([seed, 1, i]) for i in range(9)]
    return {
        "texts": base_texts(train, advice, rng),
        "sft": responses(draw(train, ROWS["sft"], rng[2], CROWD)),
        "pairs": label_pairs(train, ROWS["pairs"], rng[3]),
        "blanks": label_blanks(train, ROWS["blanks"], rng[4]),
        "prompts": [{"prompt": prompt.text} for prompt in train],
        "eval_sft": responses(draw(held_out, ROWS["eval"], rng[5], CROWD)),
        "eval_pairs": label_pairs(held_out, ROWS["eval"], rng[6]),
        "eval_prompts": [{"prompt": prompt.text} for prompt in held_out],
        "eval_advice": [{"prompt": advice[i].text} for i in rng[7].permutation(len(advice))[:ROWS["advice"]]],
    }


# ------------------------------------------------------------------------------------------------------------
# Tokenizer and model

VOCABULARY = 1536                  # enough for each word of the world to be one token


def corpus():
    """What the tokenizers learn from: the world's words, its prompts, and the instructions the model will
    read."""
    often = [REFINEMENT_PROMPT, " + - + -\n\n1: -\n\n2: +"] * 8
    often += [f"rating of {n}" for n in range(10, 101, 10)] * 8 + list(judge.TEMPLATES.values()) * 8
    return ["words: " + " ".join(WORDS)] * 8 + list(PROMPTS)[::8] + often


def write_sentencepiece(folder, texts, vocabulary):
    """tokenizer.model with so many pieces of the texts, as Llama has it; byte pieces stand for what it
    lacks."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=content, model_type="bpe", vocab_size=vocabulary,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        character_coverage=1.0, num_threads=1, minloglevel=2)
    (folder / "tokenizer.model").write_bytes(content.getvalue())
    return dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", tokenizer_class="LlamaTokenizer",
                add_bos_token=True, add_eos_token=False, legacy=False)


def merge_pairs(words, number):
    """Byte-pair encoding: [(left, right)] of up to `number` merges, the most frequent neighbours first.

    words: {word as tokenizer.json shows its bytes: count}.
    """
    parts, merges = {word: list(word) for word in words}, []
    while len(merges) < number:
        counts = {}
        for word, pieces in parts.items():
            for pair in itertools.pairwise(pieces):
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
    shown, words, end = {byte: char for char, byte in BYTE_OF.items()}, {}, "<|endoftext|>"
    for word in re.findall(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s", "\n".join(texts)):
        word = "".join(shown[byte] for byte in word.encode())
        words[word] = words.get(word, 0) + 1
    pieces = [end, *(shown[byte] for byte in range(256))]
    merges = merge_pairs(words, vocabulary - len(pieces))
    pieces = dict.fromkeys(pieces + [a + b for a, b in merges])
    special = dict(id=0, content=end, single_word=False, lstrip=False, rstrip=False, normalized=False,
                   special=True)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    bpe = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
               end_of_word_suffix=None, fuse_unk=False, byte_fallback=False,
               vocab={piece: id for id, piece in enumerate(pieces)}, merges=[f"{a} {b}" for a, b in merges])
    write_json(folder / "tokenizer.json", dict(
        version="1.0", truncation=None, padding=None, added_tokens=[special], normalizer=None,
        pre_tokenizer=byte_level, post_processor=None, decoder=byte_level, model=bpe))
    return dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=end, eos_token=end, unk_token=end)


TOKENIZERS = {"llama": write_sentencepiece, "neox": write_byte_level}
SHAPE = dict(hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
             max_position_embeddings=256, vocab_size=VOCABULARY)


def write_model(folder, family, seed, texts=None, shape=None):
    """An untrained model folder: tokenizer, config.json, weights. texts: what the tokenizer learns from, by
    default this world's; shape: keys of config.json, by default SHAPE."""
    texts, shape = texts or corpus(), shape or SHAPE
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tokenizer_config.json", TOKENIZERS[family](folder, texts, shape["vocab_size"]))
    tokenizer = load_tokenizer(folder)
    raw = shape | dict(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    if family == "llama":
        raw |= dict(model_type="llama", architectures=["LlamaForCausalLM"], rms_norm_eps=1e-5,
                    tie_word_embeddings=True)
    else:
        raw |= dict(model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"], hidden_act="gelu",
                    rotary_pct=0.25, intermediate_size=4 * shape["hidden_size"], use_parallel_residual=True)
    model.save(model.Transformer(model.parse_config(raw)).initialise(seed), folder)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_world(folder, family, seed):
    """All files of the job: folder/*.jsonl, the untrained folder/model, and last what they were made from,
    world.json."""
    (folder / "world.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "model", ignore_errors=True)        # the other family's tokenizer must not stay
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in world(seed).items():
        write_rows(folder / f"{name}.jsonl", rows)
    write_model(folder / "model", family, seed)
    write_json(folder / "world.json", dict(family=family, seed=seed))


# ------------------------------------------------------------------------------------------------------------
# The job

# What each stage adds to train.py's defaults: found by trial at this size, the same for all seeds. The
# papers' learning rates are for models a thousand times larger. OSP is fast: its strengths approach ½ after
# some 40 steps, when samples grow alike. PPO's learned reward stops rising after some 25 (64 samples each),
# and so does its KL.
STAGES = {
    "base":  dict(steps=400, batch_size=64, lr=2e-3, lr_schedule="cosine", warmup_steps=20),
    "sft":   dict(steps=60, batch_size=64, lr=3e-4, lr_schedule="cosine", eval_every=20),
    "judge": dict(steps=500, batch_size=32, lr=5e-4, lr_schedule="cosine", eval_every=100),
    "osp":   dict(steps=80, batch_size=16, lr=3e-4, beta=0.1, max_tokens=16, sample_every=40),
    "dpo":   dict(steps=100, batch_size=32, lr=1e-4, optimizer="adam"),
    "reward": dict(steps=250, batch_size=64, lr=5e-4, lr_schedule="cosine", eval_every=50),
    "rlhf":  dict(steps=40, batch_size=64, lr=3e-4, max_tokens=16, sample_every=20),
}


def stages(settings):
    """{stage name: recipe, model and files} in order: what leads to the settings' recipe, and that recipe
    itself."""
    out, name = Path(settings.out_dir), settings.recipe

    def files(*names):
        return [str(out / "world" / f"{name}.jsonl") for name in names]

    def final(name):
        return str(out / name / "final")

    recipe = RECIPES.get(name)                     # None: reward and rlhf are no rows of that table
    chain = {"base": dict(recipe="sft", model=str(out / "world" / "model"), data=files("texts")),
             "sft": dict(recipe="sft", model=final("base"), data=files("sft"), eval_data=files("eval_sft"))}
    if name == "judge" or recipe and recipe.has_judge:
        # A fifth of the SFT rows among the instructions, so that the model does not unlearn to answer.
        chain["judge"] = dict(recipe="judge", model=final("sft"), eval_data=files("eval_pairs"),
                              data=[*files("pairs", "blanks"), files("sft")[0] + ":0.2"])
    if recipe and recipe.pairs == "spin":
        chain[name] = dict(recipe=name, model=final("sft"), data=files("sft"))
    elif recipe and recipe.has_judge:
        source = dict(prompts=files("prompts")) if recipe.online else dict(data=files("pairs"))
        chain[name] = dict(recipe=name, model=final("judge"), **source)
    elif recipe is None or recipe.pairs == "dataset":
        pairs = "reward" if name == "rlhf" else name
        chain[pairs] = dict(recipe=pairs, model=final("sft"), data=files("pairs"),
                            eval_data=files("eval_pairs"))
    if name == "rlhf":
        chain[name] = dict(recipe=name, model=final("sft"), reward=final("reward"), prompts=files("prompts"),
                           eval_data=files("eval_prompts"))
    return chain


def plan(settings):
    """{stage name: its settings} in order. What the user gave goes to the last stage; what concerns the whole
    job (seed, device, …) to all of them."""
    chain, recipe = stages(settings), RECIPES.get(settings.recipe)
    other = STAGES["osp" if recipe and recipe.online else "dpo"]
    whole = {key: value for key, value in settings.given.items()
             if key in ("seed", "device", "dtype", "resume", "toy_family")}
    for name, stage in chain.items():
        given = settings.given if name == list(chain)[-1] else whole
        # All pairs of a step at once: these models are so small that calls cost more than numbers.
        chain[name] = {"micro_batch_size": 64, **STAGES.get(name, other), **stage, **given,
                       "out_dir": str(Path(settings.out_dir) / name)}
    return chain


def command_line(stage):
    program = "train.py" if stage["recipe"] in RECIPES else "-m experiments.rlhf"
    return " ".join(["torchrun", program, *(f"--{key}={cli.typed(value)}" for key, value in stage.items())])


def sample_all(net, tokenizer, prompts, settings, stream, k=2):
    """k samples of a network for each prompt (text), with the stage's temperature and top_p: lists of
    sample.Sample.

    A pure function of the seed: the uniforms belong to (seed, stream, prompt), far from training's streams
    (its steps).
    """
    ids = [tokenizer.prefix(False) + tokenizer.encode(prompt) for prompt in prompts]
    return list(sample.sample_prompts(
        net, ids, k, settings.max_tokens or 16, settings.seed, 10 ** 6 + stream,
        *sample.stopping(tokenizer, chat_of(tokenizer, "hh"), net.config), settings.temperature,
        settings.top_p, at_a_time=64))


@torch.no_grad()
def divergence(policy, reference, tokenizer, prompts, samples):
    """Mean of Σ log π - log π_ref over the samples, in nats per response: both at temperature 1, as
    train.py's `kl`."""
    differences = []
    for prompt, group in zip(prompts, samples):
        x = tokenizer.prefix(False) + tokenizer.encode(prompt)
        packed, starts = forest.pack([x + one.ids for one in group]), [len(x)] * len(group)
        ours, theirs = (losses.logprobs(net, packed, starts) for net in (policy, reference))
        differences.append(ours - theirs)
    return float(torch.cat(differences).mean())


def judge_report(folder, world):
    """The judge on held-out pairs with fresh Bradley–Terry labels: judge.report's figures, and `true_order`,
    how often it picks the response whose true reward is higher."""
    net, tokenizer = sample.load_model(folder, "float32", "cpu")
    rows, _ = read_rows(world / "eval_pairs.jsonl", "pairs")
    asked = [(row.prompt, row.chosen, row.rejected) for row in rows]
    verdicts = judge.compare(net, judge.JudgePrompt(tokenizer, "helpful", net.config.context), asked)
    true = np.array([np.sign(reward(x, chosen) - reward(x, rejected)) for x, chosen, rejected in asked])
    said = np.sign(verdicts.p.numpy() - 0.5)
    lengths = [(len(chosen.split()), len(rejected.split())) for _, chosen, rejected in asked]
    return judge.report(verdicts, lengths) | {"true_order": float((said == true)[true != 0].mean())}


def stage_lines(out, stages, names, prompts, settings):
    """The table's line of each stage: reward, wins, KL and length of its model's samples."""
    nets, scores, lines, answers = {}, {}, [], []

    def wins(name, other):
        won = ((scores[name] > scores[other]) + 0.5 * (scores[name] == scores[other])).mean(1)
        return f"{100 * won.mean():5.1f} ± {196 * won.std(ddof=1) / math.sqrt(len(won)):.1f}"

    for stream, name in enumerate(names):
        nets[name], tokenizer = sample.load_model(out / name / "final", "float32", "cpu")
        samples = sample_all(nets[name], tokenizer, prompts, settings, stream)
        scores[name] = np.array([[reward(x, sample.response_text(tokenizer, one)) for one in group]
                                 for x, group in zip(prompts, samples)])
        before = names[max(stream - 1, 0)]              # the model this stage started from
        kl = divergence(nets[name], nets[before], tokenizer, prompts, samples)
        length = np.mean([len(one.ids) for group in samples for one in group])
        answers += [{"stage": name, "place": i, "prompt": prompts[i], "text": text} | truth(prompts[i], text)
                    for i, text in enumerate(sample.response_text(tokenizer, one) for one, *_ in samples[:8])]
        lines.append(f"{name:<8} {scores[name].mean():8.3f}   {wins(name, before):>15}   "
                     f"{wins(name, 'sft'):>15}   {kl:10.2f}   {length:6.1f}")
    title = f"From a base model to {settings.recipe}: the embedded world"
    report.write([out / name for name in stages], title=title, place=out, stages=answers)
    return lines


def truth(context, response):
    """What is known of a response for certain, for the run's page: its reward, and each word's worth."""
    if context not in PROMPTS:
        return {}
    worth = [value / BEST for value in marks(context, response)]
    return {"reward": reward(context, response), "marks": list(zip(response.split(), worth))}


def evaluations(folder, key):
    """The values of eval_<key> that a run wrote down, in the order of its steps."""
    steps = disk.read_metrics(folder / "metrics.jsonl")
    return [step[f"eval_{key}"] for step in steps if f"eval_{key}" in step]


def results(out, stages, settings):
    """The table of the stages' models on held-out prompts, as text."""
    prompts = [row.prompt for row in read_rows(out / "world" / "eval_prompts.jsonl", "prompts")[0]]
    responses, _ = read_rows(out / "world" / "sft.jsonl", "responses")
    of_data = np.mean([reward(row.prompt, row.chosen) for row in responses])
    names = [name for name in stages if name not in ("base", "reward")]
    s, text = settings, []
    text.append(f"{len(prompts)} held-out prompts, 2 samples each at temperature {s.temperature}, top_p "
                f"{s.top_p}; seed {s.seed}, {s.toy_family}")
    text.append(f"true reward: floor -1, ceiling 1, the SFT data {of_data:.3f}; win rates by the true "
                "reward, ties half, ± 95 %\n")
    text.append("model    reward    wins % over start   wins % over SFT   KL to start   tokens")
    text += stage_lines(out, stages, names, prompts, s)
    if "judge" in names:
        before, after = (judge_report(out / name / "final", out / "world") for name in ("sft", "judge"))
        text.append(f"\njudge accuracy on 512 held-out noisy pairs: {before['accuracy']:.1%} before "
                    f"augmentation, {after['accuracy']:.1%} after ({after['true_order']:.1%} by the true "
                    f"reward); the longer one wins {after['longer_wins']:.0%}, slot A "
                    f"{after['first_slot_rate']:.0%}".replace("%", " %"))
    if "reward" in stages:
        accuracy = 100 * evaluations(out / "reward", "accuracy")[-1]
        text.append(f"\nreward model's accuracy on {ROWS['eval']} held-out noisy pairs: {accuracy:.1f} %")
    curve = " → ".join(f"{loss:.3f}" for loss in evaluations(out / "sft", "loss"))
    return "\n".join(text + ([f"SFT's held-out loss, nats per token: {curve}"] if curve else []))


def check_world(out, settings):
    """Whether the world of these settings is in out_dir; InputError where another one is, which may stay."""
    asked = dict(family=settings.toy_family, seed=settings.seed)
    made = cli.read_json(out / "world" / "world.json", absent={})
    if made and made != asked:
        if settings.resume == "auto":
            raise cli.InputError(f"{out / 'world'} was made with --toy_family={made.get('family')} --seed="
                                 f"{made.get('seed')}; use another --out_dir, or --resume=never to "
                                 "start over.")
        settings.given["resume"] = "never"    # nothing goes on from another world, not even by force
    return made == asked


def main(settings, trainers):
    """The whole path, from texts to the table; trainers: {recipe: (its settings' class, its trainer's)}."""
    started, out = time.time(), Path(settings.out_dir)
    ranks = Ranks.start(settings.device, settings.rank_minutes)
    made = check_world(out, settings)
    chain = plan(settings)
    ranks.wait()                                  # all ranks have read world.json
    if ranks.rank == 0 and not made:
        write_world(out / "world", settings.toy_family, settings.seed)
    ranks.wait()
    for stage in chain.values():
        if ranks.rank == 0:
            print("\n" + command_line(stage), flush=True)
        settings_class, trainer_class = trainers[stage["recipe"]]
        last = settings_class(**stage)
        trainer = trainer_class(last)
        trainer.shown.truth = truth
        trainer.run()
    if ranks.rank == 0:
        place = out / f"result-{settings.recipe}.txt"
        final = out / list(chain)[-1] / "final" / "model.safetensors"
        if not place.exists() or place.stat().st_mtime < final.stat().st_mtime:
            # PPO trains on samples from all of π; the table samples as it does for the other recipes.
            like_others = dict(temperature=0.7, top_p=0.9) if settings.recipe == "rlhf" else {}
            table = results(out, chain, dataclasses.replace(last, **like_others))
            place.write_text(table + "\n", encoding="utf-8")
        table = place.read_text(encoding="utf-8")
        print(f"\n{table}\nall of it in {cli.duration(time.time() - started)}; to look at: "
              f"{out / 'report.html'}")
    ranks.wait()
