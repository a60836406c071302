"""Sampling against a plain loop without cache or batch; choosing a token by hand; the command line."""
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import forest
import losses
import sample
import tiny

ROOT = Path(sample.__file__).parent
ALMOST_1 = 1 - 2 ** -53                    # the largest number that numpy's random() returns

# ------------------------------------------------------------------------------------------------------------
# Randomness


def test_uniforms_belong_to_seed_step_and_prompt():
    table = sample.uniforms(3, 5, 7, k=4, max_tokens=50)
    assert table.shape == (4, 50) and table.dtype == torch.float64
    assert (0 <= table).all() and (table < 1).all() and torch.equal(table, sample.uniforms(3, 5, 7, 4, 50))
    others = [(4, 5, 7), (3, 6, 7), (3, 5, 8), (5, 3, 7), (7, 5, 3), (3, 7, 5), (35, 7, 0), (0, 35, 7)]
    rows = torch.cat([table, *(sample.uniforms(*other, 4, 50) for other in others)])
    assert len(torch.unique(rows)) == rows.numel()                           # no number comes twice
    assert torch.equal(sample.uniforms(3, 5, 7, 2, 50), table[:2])           # sample k does not depend on K


def test_uniforms_are_uniform():
    """70,000 numbers: each tenth of [0, 1) has 7,000 within 5 standard deviations, √(70,000·0.1·0.9) = 79."""
    table = torch.stack([sample.uniforms(0, 0, prompt, 7, 100) for prompt in range(100)])
    assert (torch.histc(table, 10, 0, 1) - 7000).abs().max() < 5 * 79


# ------------------------------------------------------------------------------------------------------------
# Choosing a token

def logits_of(*probabilities):
    return torch.tensor([probabilities], dtype=torch.float64).log()


def chosen(logits, uniforms, temperature, top_p):
    """The tokens for several uniforms and one row of logits (1, V)."""
    u = torch.tensor(uniforms, dtype=torch.float64)
    return sample.choose(logits.expand(len(u), -1), u, temperature, top_p).tolist()


def test_choose_by_hand():
    """Probabilities 0.4, 0.1, 0.3, 0.2: in falling order tokens 0, 2, 3, 1, their sums 0.4, 0.7, 0.9, 1.

    top_p 1: token 0 below 0.4, 2 below 0.7, 3 below 0.9, then 1.
    top_p 0.8: 0.7 is not enough, so three stay, with 4/9, 3/9 and 2/9: borders at 0.444 and 0.778.
    top_p 0.65: two stay, with 4/7 and 3/7: a border at 0.571. top_p 0.4 and less: one stays.
    T = ½ squares: 16, 1, 9, 4 of 30, borders 0.533, 0.833, 0.967; with top_p 0.8 two stay, a border at 0.64.
    Equal tokens stand in the order of their ids; top_p ½ keeps two of four, and greedy takes the first.
    """
    row, alike = logits_of(0.4, 0.1, 0.3, 0.2), logits_of(1, 1, 1, 1)
    assert chosen(row, [0, 0.39, 0.41, 0.69, 0.71, 0.89, 0.91, ALMOST_1], 1, 1.0) == [0, 0, 2, 2, 3, 3, 1, 1]
    assert chosen(row, [0, 0.44, 0.45, 0.77, 0.78, ALMOST_1], 1, 0.8) == [0, 0, 2, 2, 3, 3]
    assert chosen(row, [0, 0.57, 0.58, ALMOST_1], 1, 0.65) == [0, 0, 2, 2]
    assert chosen(row, [0, 0.5, ALMOST_1], 1, 0.39) == [0, 0, 0]
    assert chosen(row, [0.53, 0.54, 0.83, 0.84, 0.96, 0.97], 0.5, 1.0) == [0, 2, 2, 3, 3, 1]
    assert chosen(row, [0, 0.63, 0.65, ALMOST_1], 0.5, 0.8) == [0, 0, 2, 2]
    assert chosen(row, [0, 0.5, ALMOST_1], 0, 0.8) == [0, 0, 0]
    assert chosen(alike, [0, 0.24, 0.26, 0.49, 0.51, 0.76, ALMOST_1], 1, 1.0) == [0, 0, 1, 1, 2, 3, 3]
    assert chosen(alike, [0, 0.49, 0.51, ALMOST_1], 1, 0.5) == [0, 0, 1, 1]
    assert chosen(alike, [0, ALMOST_1], 0, 1.0) == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_choose_at_its_ends(dtype):
    """At u just below 1 (1 in float32) rounding must not step over the last kept token; -inf is never taken.
    A temperature next to 0 is greedy, however large logits get; very hot, all tokens are alike."""
    row = torch.full((1, 1000), -math.inf, dtype=dtype)
    row[0, 5:605] = torch.linspace(0, -8, 600, dtype=dtype)
    for top_p in (1.0, 0.9, 0.5, 1e-9):
        for temperature in (1.0, 0.7, 0.01):
            mass = (row[0] / temperature).softmax(-1)
            tokens = chosen(row, [0, 0.5, 0.999999, ALMOST_1], temperature, top_p)
            assert tokens[0] == 5 and all(5 <= token < 605 for token in tokens)
            assert mass[5:tokens[-1]].sum() < top_p + 1e-6
    one = torch.tensor([[-math.inf, 0.0, -math.inf]], dtype=dtype)
    assert chosen(one, [0, ALMOST_1], 1, 1.0) == [1, 1]
    row = torch.tensor([[-300.0, 400.0, -math.inf, 399.0]], dtype=dtype)
    assert chosen(row, [0, 0.5, ALMOST_1], 1e-37, 1.0) == [1, 1, 1]
    assert chosen(row, [0.3, 0.4, 0.7], 1e9, 1.0) == [1, 3, 0]


def nucleus(logits, temperature, top_p):
    """The definition in plain Python: [(token, probability)] in falling order, cut to top_p, adding to 1."""
    highest = max(logits)
    weights = [math.exp((value - highest) / temperature) for value in logits]
    total, kept, held = sum(weights), [], 0.0
    for token in sorted(range(len(logits)), key=lambda i: -weights[i]):
        if held >= top_p or weights[token] == 0:
            break
        kept.append((token, weights[token] / total))
        held += weights[token] / total
    return [(token, probability / held) for token, probability in kept]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [0.2, 0.9, 1.0])
def test_frequencies_are_probabilities(temperature, top_p):
    """On a grid of M uniforms a token is chosen M times its probability, off by less than one per border."""
    generator, M = torch.Generator().manual_seed(0), 2000
    for _ in range(5):
        row = 2 * torch.randn(1, 12, generator=generator, dtype=torch.float64)
        tokens = chosen(row, [(i + 0.5) / M for i in range(M)], temperature, top_p)
        expected = dict(nucleus(row[0].tolist(), temperature, top_p))
        assert set(tokens) <= expected.keys() and sum(expected.values()) == pytest.approx(1)
        assert all(abs(tokens.count(token) - M * p) < 2 for token, p in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999999, 1.0])
def test_choose_equals_a_full_sort(top_p, dtype):
    """Only tokens that may be in the nucleus are sorted: for rows from flat to peaked, half of their logits
    equal to others and a third impossible, the tokens are those of sorting the whole vocabulary."""
    generator = torch.Generator().manual_seed(1)
    for scale in (0, 0.3, 2, 12):
        rows = (scale * torch.randn(40, 700, generator=generator, dtype=dtype)).mul(2).round() / 2
        rows[:, 350:] += scale * torch.rand(40, 350, generator=generator, dtype=dtype)
        rows[:, ::3] = -math.inf
        uniform = torch.rand(40, generator=generator, dtype=dtype)
        for temperature in (0.3, 0.7, 2.0):
            falling, ids = (rows / temperature).softmax(-1).sort(stable=True, dim=-1, descending=True)
            held = falling.cumsum(-1)
            mass = held.masked_fill(held < top_p, math.inf).amin(-1, keepdim=True).minimum(held[:, -1:])
            place = (held <= uniform[:, None] * mass).sum(-1, keepdim=True)
            assert sample.choose(rows, uniform, temperature, top_p).equal(ids.gather(-1, place)[:, 0])


# ------------------------------------------------------------------------------------------------------------
# Generation

PROMPTS = [[1, 5, 6, 7, 8, 9, 10, 11, 12, 13], [1], [1, 5, 6, 7], [1, 20, 21], [1, 5, 6, 7], [1, 5]]
K, MAX_TOKENS, V = 3, 12, 64
STOPS = {2, *range(44, 56)}                            # many, so that rows end early, and at different times
ALLOWED = torch.ones(V, dtype=torch.bool)
ALLOWED[[0, 40, 41, 42, 43]] = False
HOW = {"greedy": dict(temperature=0), "sampled": dict(temperature=0.9, top_p=0.95),
       "flat": dict(temperature=3.0, top_p=1.0)}


def table(prompts=range(len(PROMPTS)), seed=0, k=K, max_tokens=MAX_TOKENS):
    return torch.stack([sample.uniforms(seed, 0, i, k, max_tokens) for i in prompts])


def generate(net, uniform=None, stops=STOPS, allowed=ALLOWED, **how):
    return sample.generate(net, PROMPTS, table() if uniform is None else uniform, stops, allowed, **how)


@torch.no_grad()
def plain_loop(net, prompt, uniforms, stops=STOPS, allowed=ALLOWED, temperature=1.0, top_p=1.0):
    """One response, all of it computed anew for each token: (ids, Σ log π, finished)."""
    ids, logprob = [], 0.0
    for u in uniforms.tolist():
        logits = net.head(net(torch.tensor([prompt + ids])))[0, -1]
        row = logits.masked_fill(~allowed, -math.inf).tolist()
        candidates = nucleus(row, temperature, top_p) if temperature else [(row.index(max(row)), 1.0)]
        token, below = candidates[-1][0], 0.0
        for candidate, probability in candidates:
            below += probability
            if u < below:
                token = candidate
                break
        ids.append(token)
        logprob += logits.log_softmax(-1)[token].item()
        if token in stops:
            return ids, logprob, True
    return ids, logprob, False


def assert_same(samples, expected):
    for one, other in zip(samples, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.ids == b.ids and a.finished == b.finished
            assert a.logprob == pytest.approx(b.logprob, abs=1e-9)


def ids_of(samples):
    return [one.ids for group in samples for one in group]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_generation_is_the_plain_loop(family, how):
    """Token by token, for prompts of unlike lengths, some equal; Mistral's window of 4 ends inside of them.
    A stop id ends its row and stands nowhere else."""
    net = tiny.net(family, seed=5, **({"sliding_window": 4} if family == "mistral" else {}))
    samples = generate(net, **HOW[how])
    expected = [[sample.Sample(*plain_loop(net, prompt, row, **HOW[how])) for row in rows]
                for prompt, rows in zip(PROMPTS, table())]
    assert_same(samples, expected)
    assert len(set(map(len, ids_of(samples)))) > 2                 # rows did leave at different times


def test_batching_changes_nothing():
    """All prompts at once, one at a time, and in another order with their own uniforms."""
    net = tiny.net(seed=5)
    together = generate(net)
    alone = [sample.generate(net, [p], table([i]), STOPS, ALLOWED)[0] for i, p in enumerate(PROMPTS)]
    assert_same(alone, together)
    order = [3, 5, 0, 2, 1, 4]
    shuffled = sample.generate(net, [PROMPTS[i] for i in order], table(order), STOPS, ALLOWED)
    assert_same(shuffled, [together[i] for i in order])


@pytest.mark.parametrize("at_a_time", [1, 4, 100])
def test_the_loop_over_prompts(at_a_time, monkeypatch):
    """A prompt's samples belong to (seed, step, its place), whatever is beside it; rooms are limits."""
    net, places, rooms, sizes = tiny.net(seed=5), [4, 9, 2, 0, 7, 5], [3, 99, 5, 99, 1, 99], []
    plain = sample.generate
    monkeypatch.setattr(sample, "generate", lambda *given: sizes.append(len(given[1])) or plain(*given))
    samples = list(sample.sample_prompts(net, PROMPTS, K, MAX_TOKENS, 8, 3, STOPS, ALLOWED, 0.9, 0.95,
                                         rooms, places, at_a_time))
    assert sizes == {1: [1] * 6, 4: [4, 2], 100: [6]}[at_a_time]
    for group, prompt, place, room in zip(samples, PROMPTS, places, rooms, strict=True):
        uniform = sample.uniforms(8, 3, place, K, MAX_TOKENS)[:, :room]
        assert_same([group], [[sample.Sample(*plain_loop(net, prompt, u, temperature=0.9, top_p=0.95))
                               for u in uniform]])
    monkeypatch.undo()
    counted = list(sample.sample_prompts(net, PROMPTS, K, MAX_TOKENS, 0, 0, STOPS, ALLOWED))
    assert_same(counted, generate(net))                                      # the places count from 0


def test_rows_that_finish_leave_the_others_alone():
    """With hardly any stop id the rows only grow longer: what they begin with is the same."""
    net = tiny.net(seed=5)
    some, few = (sum(generate(net, stops=stops), []) for stops in (STOPS, {2}))
    assert sum(s.finished for s in some) > sum(s.finished for s in few)
    for short, long in zip(some, few):
        assert long.ids[:len(short.ids)] == short.ids


def test_limits():
    """A prompt with less room gets fewer tokens, the same ones; a row cut by its limit is not finished."""
    net = tiny.net(seed=5)
    free = generate(net)
    limits = [sorted(len(s.ids) for s in row)[1] for row in free]       # one row ends by itself just there
    held = generate(net, limits=limits)
    for limit, long, short in zip(limits, free, held):
        for a, b in zip(long, short):
            assert b.ids == a.ids[:limit] and b.finished == (a.finished and len(a.ids) <= limit)
    ends = {(s.finished, len(s.ids) == limit) for limit, row in zip(limits, held) for s in row}
    assert ends == {(True, True), (True, False), (False, True)}


@pytest.mark.parametrize("how", HOW)
def test_what_may_not_be_sampled_never_is(how):
    """Among ten ids, with the favourite of each row forbidden."""
    net, allowed = tiny.net(seed=5), torch.zeros(V, dtype=torch.bool)
    allowed[10:20] = True
    first = generate(net, allowed=torch.ones(V, dtype=torch.bool), temperature=0, limits=[1] * 6)
    allowed[[row[0].ids[0] for row in first]] = False
    assert all(allowed[ids].all() for ids in ids_of(generate(net, allowed=allowed, **HOW[how])))


@pytest.mark.parametrize("how, dtype", [*((how, torch.float64) for how in HOW), ("sampled", torch.float32)])
def test_logprob_is_the_one_that_training_computes(how, dtype):
    """Σ log π of the sampled ids, stop id included: at temperature 1, over the whole vocabulary."""
    net = tiny.net("neox", seed=5, dtype=dtype)
    samples = generate(net, **HOW[how])
    sequences = [prompt + s.ids for prompt, row in zip(PROMPTS, samples) for s in row]
    starts = [len(prompt) for prompt in PROMPTS for _ in range(K)]
    expected = losses.logprobs(net, forest.pack(sequences), starts).tolist()
    found = [s.logprob for row in samples for s in row]
    assert found == pytest.approx(expected, abs=1e-9 if dtype == torch.float64 else 1e-3)


def test_bfloat16_is_normalised_in_float32():
    """One token each, so that the logits are the prompt's own: they must not be rounded once more."""
    net = tiny.net(seed=5, dtype=torch.bfloat16)
    for prompt in PROMPTS:
        samples, = sample.generate(net, [prompt], table([0], k=7, max_tokens=1), STOPS, ALLOWED, 2.0, 1.0)
        with torch.no_grad():
            expected = net.head(net(torch.tensor([prompt]))[0, -1:])[0].float().log_softmax(-1)
        for one in samples:
            assert one.logprob == pytest.approx(expected[one.ids[0]].item(), abs=1e-4)


def test_samples_differ():
    """Those of a prompt from their first token on; those of two equal prompts; those of two seeds."""
    net = tiny.net(scale=0.3)
    samples, other = (generate(net, table(seed=seed, k=7), temperature=1.0, top_p=1.0) for seed in (0, 1))
    assert all(len({s.ids[0] for s in row}) > 3 for row in samples)
    assert PROMPTS[2] == PROMPTS[4] and [s.ids for s in samples[2]] != [s.ids for s in samples[4]]
    assert ids_of(samples) != ids_of(other)


def test_samples_follow_the_weights():
    """After an update the same uniforms give the samples of the new weights: no old cache is left."""
    net, other = tiny.net(seed=5), tiny.net(seed=6)
    before = generate(net)
    net.load_state_dict(other.state_dict())
    after = generate(net)
    assert_same(after, generate(other))
    assert ids_of(after) != ids_of(before)


@pytest.mark.parametrize("max_tokens", [1, MAX_TOKENS])
def test_every_token_is_reported_as_it_comes(max_tokens):
    rows = {}
    samples = generate(tiny.net(seed=5), table(max_tokens=max_tokens),
                       on_token=lambda row, token: rows.setdefault(row, []).append(token))
    assert [rows[row] for row in range(len(PROMPTS) * K)] == ids_of(samples)


def test_where_responses_stop_and_what_they_may_hold(folders):
    """The ends that the folder names; no padding token, no row after the tokenizer's ids, as Pythia has."""
    net, tokenizer = sample.load_model(folders["neox"], "float32", "cpu")
    stops, allowed = sample.stopping(tokenizer, sample.data.chat_of(tokenizer, "hh"), net.config)
    end, padding = (tokenizer.special_ids[name] for name in ("<|endoftext|>", "<|padding|>"))
    assert stops == {end} and len(allowed) == 424
    assert [id for id in range(424) if not allowed[id]] == [padding, 420, 421, 422, 423]


def test_text_leaves_the_stop_id_out(folders):
    tokenizer = data.load_tokenizer(folders["llama"])
    ids = tokenizer.encode_after(" The river")
    for finished, given in ((True, [*ids, tokenizer.eos_id]), (False, ids)):
        assert sample.response_text(tokenizer, sample.Sample(given, 0.0, finished)) == " The river"


# ------------------------------------------------------------------------------------------------------------
# Command line

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: str(tiny.folder(root / family, family)) for family in tiny.FAMILIES}


@pytest.fixture
def command(capsys, monkeypatch):
    """command("--model=DIR", …) -> (exit code, stdout, stderr) of sample.py."""
    return functools.partial(tiny.command, sample, capsys, monkeypatch)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_command_line(family, folders, tmp_path, command):
    """Rows with these fields; one seed gives the same rows at any batch size, on the screen and in a file."""
    given = [{"prompt": row["prompt"]} for row in tiny.pairs(5)]
    path = tiny.write_jsonl(tmp_path / "prompts.jsonl", given)
    arguments = [f"--model={folders[family]}", f"--prompts={path}", "--k=3", "--max_tokens=9",
                 "--dtype=float64", "--temperature=1.2", "--seed=4"]
    code, out, err = command(*arguments)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["prompt"] for row in rows] == [row["prompt"] for row in given]
    assert "5 rows used" in err
    tokenizer = data.load_tokenizer(folders[family])
    for row in rows:
        assert list(row) == ["prompt", "responses"] and len(row["responses"]) == 3
        for response in row["responses"]:
            assert list(response) == ["text", "ids", "logprob", "finished"]
            assert 1 <= len(response["ids"]) <= 9 and response["logprob"] < 0
            shown = response["ids"][:-1] if response["finished"] else response["ids"]
            assert response["finished"] == (response["ids"][-1] in tokenizer.stop_ids)
            assert response["text"] == tokenizer.decode(shown, continues=True)
    for batch_size in (1, 2):
        assert command(*arguments, f"--batch_size={batch_size}")[1] == out
    assert command(*arguments[:-1], "--seed=5")[1] != out
    code, said, _ = command(*arguments, f"--out={tmp_path / 'out.jsonl'}")
    assert code == 0 and (tmp_path / "out.jsonl").read_text(encoding="utf-8") == out
    assert said.splitlines()[-1].startswith("5 prompts × 3 responses written to")


def test_one_prompt(folders, tmp_path, command):
    """Without --chat a prompt is continued as it stands, with it it is a user's turn; so are a file's texts,
    whose rows keep them as they were given."""
    file = tiny.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "The old river"}])
    net, tokenizer = sample.load_model(folders["llama"], "float32", "cpu")
    stops, allowed = sample.stopping(tokenizer, sample.data.chat_of(tokenizer, "hh"), net.config)
    turn = [{"role": "user", "content": "The old river"}]
    for chat, prompt, text in (([], "The old river", "The old river"), (["--chat=zephyr"], turn, None),
                               (["--chat=hh"], turn, "\n\nHuman: The old river\n\nAssistant:")):
        arguments = [f"--model={folders['llama']}", "--temperature=0", "--max_tokens=5", *chat]
        one = json.loads(command(*arguments, "--prompt=The old river")[1])
        row = json.loads(command(*arguments, f"--prompts={file}")[1])
        assert one["prompt"] == prompt and row["prompt"] == "The old river"
        assert row["responses"] == one["responses"]
        if text is not None:
            ids = [tokenizer.bos_id, *tokenizer.encode(text)]
            expected = plain_loop(net, ids, torch.zeros(5), stops, torch.as_tensor(allowed), 0)[0]
            assert one["responses"][0]["ids"] == expected


@pytest.mark.parametrize("text", ["", "--k=3", "a=b\nc"])
def test_any_text_is_a_prompt(text, folders, command):
    for folder in folders.values():              # without a BOS an empty prompt starts from <|endoftext|>
        code, out, _ = command(f"--model={folder}", f"--prompt={text}", "--max_tokens=2")
        assert code == 0 and json.loads(out)["prompt"] == text


BAD = {     # arguments after --model: what the message names
    "": "--prompt", "--prompt=a --prompts=b.jsonl": "--prompts", "--prompt=a --k=0": "--k=0",
    "--prompt=a --temperature=-1": "--temperature=-1", "--prompt=a --temperature=nan": "--temperature=nan",
    "--prompt=a --top_p=0": "--top_p=0", "--prompt=a --top_p=2": "--top_p=2",
    "--prompt=a --max_tokens=0": "--max_tokens=0", "--prompt=a --seed=-1": "--seed=-1",
    "--prompt=a --batch_size=0": "--batch_size=0", "--prompt=a --dtype=int8": "--dtype=int8",
    "--prompt=a --device=tpu": "--device=tpu", "--prompt=a --chat=irc": "--chat=irc",
    "--prompt=a --chat=chatml": "<|im_start|>", "--prompts=nowhere.jsonl": "nowhere.jsonl",
    "--prompt=a --format=mt_bench": "--prompts", "--prompts=a.jsonl --format=arena": "mt_bench",
    "--promt=a": "--prompt", "--prompt=a --out=nowhere/out.jsonl": "nowhere/out.jsonl",
    "--prompt=" + "The_river_" * 600: "512", "--prompt=a --model=nowhere": "nowhere",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line(arguments, folders, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = [] if "--model" in arguments else [f"--model={folders['llama']}"]
    code, out, err = command(*model, *arguments.split())
    assert code == 1 and out == "" and len(err.splitlines()) == 1
    assert err.startswith("error: ") and BAD[arguments] in err


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_long_prompts_of_a_file_lose_their_front(family, folders, tmp_path, command, monkeypatch):
    """Of a context of 512, max_tokens or at most half are left for the answer; what fits is not touched."""
    tokenizer = data.load_tokenizer(folders[family])
    texts = ["The" + "!" * n for n in (5, 2000)]
    ids = [tokenizer.encode(text) for text in texts]
    prompts = tiny.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in texts])
    seen, generate = [], sample.generate
    monkeypatch.setattr(sample, "generate",
                        lambda net, prompts, *rest: seen.extend(prompts) or generate(net, prompts, *rest))
    for max_tokens, room in ((3, 3), (10 ** 6, 256)):
        seen.clear()
        code, out, err = command(f"--model={folders[family]}", f"--prompts={prompts}",
                                 f"--max_tokens={max_tokens}")
        assert code == 0 and len(out.splitlines()) == 2 and "1 of 2 prompts" in err
        bos = tokenizer.prefix(False)
        assert seen == [bos + ids[0], bos + ids[1][-(512 - room - len(bos)):]]


def test_the_context_is_never_left(folders, command):
    """BOS and a prompt of n tokens leave 511 - n, however many are asked for; 10¹² take no more memory."""
    tokenizer, model = data.load_tokenizer(folders["llama"]), f"--model={folders['llama']}"
    prompts = {len(tokenizer.encode(text)): text for text in ("The" + "!" * n for n in range(520))}
    for n, most in ((508, 3), (510, 1)):
        _, out, _ = command(model, f"--prompt={prompts[n]}", "--k=4", "--max_tokens=1e12")
        assert max(len(response["ids"]) for response in json.loads(out)["responses"]) == most
    code, out, err = command(model, f"--prompt={prompts[511]}", "--max_tokens=1")
    assert code == 1 and out == "" and "512" in err


def test_mt_bench(folders, tmp_path, command):
    """K = 2: the first turns are those of the same prompts without a format, and the second is what the model
    says after its own first answer, at the temperature that FastChat has for the category, or at ours.
    Neither batches nor the questions beside one matter."""
    asked = [{"question_id": i, "category": category, "turns": ["The old river", "And the tree?"][:i]}
             for i, category in ((2, "writing"), (1, "math"), (2, "math"))]
    path, out = tiny.write_jsonl(tmp_path / "question.jsonl", asked), tmp_path / "ours.jsonl"
    arguments = [f"--model={folders['llama']}", "--max_tokens=6", "--dtype=float64", "--k=2", "--top_p=1"]

    def rows(*given):
        code, said, _ = command(*arguments, "--format=mt_bench", f"--prompts={path}", f"--out={out}", *given)
        assert code == 0 and said.splitlines()[-1].startswith("3 prompts × 2 responses")
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]

    def texts(prompt, *given):
        file = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": prompt}])
        row = json.loads(command(*arguments, f"--prompts={file}", *given)[1])
        return [one["text"].strip() for one in row["responses"]]
    found = rows("--name=ours")
    turns = [[choice["turns"] for choice in row["choices"]] for row in found]
    assert [(row["question_id"], row["model_id"]) for row in found] == [(2, "ours"), (1, "ours"), (2, "ours")]
    question = [{"role": "user", "content": "The old river"}]
    assert [first for first, _ in turns[0]] == texts(question, "--temperature=0.7")
    assert turns[1] == [[text] for text in texts(question, "--temperature=0")]
    for first, second in turns[2]:
        dialogue = [*question, {"role": "assistant", "content": first},
                    {"role": "user", "content": "And the tree?"}]
        assert second == texts(dialogue, "--temperature=0")[0]
    assert turns[0][0] != turns[0][1] and turns[2][0][0] == turns[1][0][0]
    for given in (["--batch_size=1"], ["--batch_size=2"]):
        assert [[choice["turns"] for choice in row["choices"]] for row in rows(*given)] == turns
    assert {row["model_id"] for row in rows("--temperature=0")} == {folders["llama"]}
    assert rows("--temperature=0")[0]["choices"][0]["turns"] == turns[2][0]


def test_alpaca_eval(folders, tmp_path, command):
    """A list in, a list out: the outputs are the texts of the same prompts without a format."""
    given = [{"instruction": text, "output": "theirs", "dataset": "d"} for text in ("The river", "A tree")]
    (tmp_path / "eval.json").write_text(json.dumps(given))
    arguments = [f"--model={folders['neox']}", f"--prompts={tmp_path / 'eval.json'}", "--max_tokens=6"]
    plain = [json.loads(line)["responses"][0]["text"] for line in command(*arguments)[1].splitlines()]
    assert command(*arguments, "--format=alpaca_eval", f"--out={tmp_path / 'ours.json'}")[0] == 0
    assert json.loads((tmp_path / "ours.json").read_text()) == [
        row | {"output": text.strip(), "generator": folders["neox"]} for row, text in zip(given, plain)]


def test_prompts_are_never_overwritten(folders, tmp_path, command):
    """Nor by another name of the same file; and a file of rows stays where a prompt cannot be used."""
    path = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": "The river"}])
    (tmp_path / "link").symlink_to(path)
    old = (tmp_path / "p.jsonl").read_text()
    for out in (path, tmp_path / "link", f"{tmp_path}/../{tmp_path.name}/p.jsonl"):
        code, _, err = command(f"--model={folders['llama']}", f"--prompts={path}", f"--out={out}")
        assert code == 1 and err.startswith(f"error: --out={out}")
        assert (tmp_path / "p.jsonl").read_text() == old
    (tmp_path / "out").write_text("old")
    code, _, err = command(f"--model={folders['llama']}", f"--prompts={path}", "--format=mt_bench",
                           f"--out={tmp_path / 'out'}")
    assert code == 1 and "p.jsonl, line 1" in err and (tmp_path / "out").read_text() == "old"
    code, _, err = command(f"--model={folders['llama']}", f"--prompts={path}", "--out=/dev/full")
    assert code == 1 and "/dev/full: cannot be written (No space left on device)" in err.splitlines()[-1]


class Terminal:
    """Standard output that claims to be a terminal and remembers each write."""
    def __init__(self):
        self.writes = []

    def write(self, text):
        self.writes.append(text)

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_streaming_prints_whole_characters(family, folders, monkeypatch):
    """Characters of two to four bytes, each byte a token: nothing is printed before the last one has come."""
    text = " The é日😀 river"
    tokenizer = data.load_tokenizer(folders[family])
    ids = [*tokenizer.encode_after(text), tokenizer.eos_id]
    assert len(ids) > len("é日😀".encode())

    def rigged(net, prompts, uniform, stop_ids, allowed, temperature, top_p, limits, on_token):
        for token in ids:
            on_token(0, token)
        return [[sample.Sample(ids, 0.0, True)]]
    monkeypatch.setattr(sample, "generate", rigged)
    monkeypatch.setattr(sys, "stdout", Terminal())
    sample.main(sample.Settings(model=folders[family], prompt="Look:"))
    writes = [part for part in sys.stdout.writes if part]
    assert "".join(writes) == text + "\n" and len(writes) > 5
    assert all(any(char in part for part in writes) for char in "é日😀") and "\ufffd" not in "".join(writes)


@pytest.mark.processes
def test_a_real_process(folders, tmp_path):
    """A terminal that is not UTF-8 is shown ? for what it lacks, and rows stay whole: JSON escapes it."""
    def run(*arguments):
        start = [sys.executable, ROOT / "sample.py", f"--model={folders['neox']}", "--max_tokens=2"]
        return subprocess.run([*start, "--prompt=é", *arguments], capture_output=True, cwd=tmp_path,
                              env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONIOENCODING="ascii"))
    said = run("--out=out.jsonl")
    assert said.returncode == 0 and b"1 prompts ? 1 responses" in said.stdout, said.stderr
    assert json.loads(run().stdout) == json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
