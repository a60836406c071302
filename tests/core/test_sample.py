"""Sampling against a plain loop without cache, batch or early leaving; the choice of a token by hand; the command line."""
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import cli
import data
import losses
import sample
import tiny
from support.cli import InputError

ROOT = Path(sample.__file__).parent
ALMOST_1 = 1 - 2 ** -53                    # the largest number that numpy's random() returns

# ---------------------------------------------------------------------------------------------------------------------
# Randomness


def test_uniforms_belong_to_seed_step_and_prompt():
    table = sample.uniforms(3, 5, 7, k=4, max_tokens=50)
    assert table.shape == (4, 50) and table.dtype == torch.float64 and (0 <= table).all() and (table < 1).all()
    assert torch.equal(table, sample.uniforms(3, 5, 7, 4, 50))                            # whatever was drawn between
    others = [sample.uniforms(seed, step, prompt, 4, 50) for seed, step, prompt in
              [(4, 5, 7), (3, 6, 7), (3, 5, 8), (5, 3, 7), (7, 5, 3), (3, 7, 5), (35, 7, 0), (0, 35, 7), (0, 0, 0)]]
    rows = torch.cat([table, *others])
    assert len(torch.unique(rows)) == rows.numel()                                        # no number comes twice
    assert torch.equal(sample.uniforms(3, 5, 7, 2, 50), table[:2])                        # sample k does not depend on K


def test_uniforms_are_uniform():
    """70,000 numbers: the mean of each tenth of [0, 1) within 5 standard deviations of 7,000, √(70,000·0.1·0.9) = 79."""
    table = torch.stack([sample.uniforms(0, 0, prompt, 7, 100) for prompt in range(100)])
    counts = torch.histc(table, 10, 0, 1)
    assert (counts - 7000).abs().max() < 5 * 79


# ---------------------------------------------------------------------------------------------------------------------
# Choosing a token

def logits_of(*probabilities, dtype=torch.float64):
    return torch.tensor([probabilities], dtype=dtype).log()


def chosen(logits, uniforms, temperature, top_p):
    """The tokens for several uniforms and one row of logits (1, V)."""
    u = torch.tensor(uniforms, dtype=torch.float64)
    return sample.choose(logits.expand(len(u), -1), u, temperature, top_p).tolist()


def test_choose_by_hand():
    """Probabilities 0.4, 0.1, 0.3, 0.2: in falling order the tokens 0, 2, 3, 1, whose sums are 0.4, 0.7, 0.9, 1.

    top_p 1: token 0 below 0.4, 2 below 0.7, 3 below 0.9, then 1.
    top_p 0.8: 0.7 is not enough, so three stay, with 4/9, 3/9 and 2/9: borders at 0.444 and 0.778.
    top_p 0.65: two stay, with 4/7 and 3/7: a border at 0.571. top_p 0.4 and less: one stays.
    T = ½ squares: 16, 1, 9, 4 of 30, borders 0.533, 0.833, 0.967; with top_p 0.8 two stay, a border at 16/25 = 0.64.
    """
    row = logits_of(0.4, 0.1, 0.3, 0.2)
    assert chosen(row, [0, 0.39, 0.41, 0.69, 0.71, 0.89, 0.91, ALMOST_1], 1, 1.0) == [0, 0, 2, 2, 3, 3, 1, 1]
    assert chosen(row, [0, 0.44, 0.45, 0.77, 0.78, ALMOST_1], 1, 0.8) == [0, 0, 2, 2, 3, 3]
    assert chosen(row, [0, 0.57, 0.58, ALMOST_1], 1, 0.65) == [0, 0, 2, 2]
    assert chosen(row, [0, 0.5, ALMOST_1], 1, 0.39) == [0, 0, 0]
    assert chosen(row, [0.53, 0.54, 0.83, 0.84, 0.96, 0.97], 0.5, 1.0) == [0, 2, 2, 3, 3, 1]
    assert chosen(row, [0, 0.63, 0.65, ALMOST_1], 0.5, 0.8) == [0, 0, 2, 2]
    assert chosen(row, [0, 0.5, ALMOST_1], 0, 0.8) == [0, 0, 0]


def test_choose_among_equals():
    """Four equal tokens stand in the order of their ids; top_p ½ keeps exactly two. Greedy takes the first."""
    row = logits_of(1, 1, 1, 1)
    assert chosen(row, [0, 0.24, 0.26, 0.49, 0.51, 0.76, ALMOST_1], 1, 1.0) == [0, 0, 1, 1, 2, 3, 3]
    assert chosen(row, [0, 0.49, 0.51, ALMOST_1], 1, 0.5) == [0, 0, 1, 1]
    assert chosen(row, [0, ALMOST_1], 0, 1.0) == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_choose_stays_among_the_kept(dtype):
    """At u just below 1 (which is 1 in float32) rounding must not step over the last kept token; -inf is never taken."""
    row = torch.full((1, 1000), -math.inf, dtype=dtype)
    row[0, 5:605] = torch.linspace(0, -8, 600, dtype=dtype)
    for top_p in (1.0, 0.9, 0.5, 1e-9):
        for temperature in (1.0, 0.7, 0.01):
            mass = (row[0] / temperature).softmax(-1)
            tokens = chosen(row, [0, 0.5, 0.999999, ALMOST_1], temperature, top_p)
            assert tokens[0] == 5 and all(5 <= token < 605 for token in tokens)
            assert mass[5:tokens[-1]].sum() < top_p + 1e-6
    assert chosen(torch.tensor([[-math.inf, 0.0, -math.inf]], dtype=dtype), [0, ALMOST_1], 1, 1.0) == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_choose_at_the_ends_of_temperature(dtype):
    """Next to 0 it is greedy, however large the logits are over it; very hot, all tokens are alike."""
    row = torch.tensor([[-300.0, 400.0, -math.inf, 399.0]], dtype=dtype)
    assert chosen(row, [0, 0.5, ALMOST_1], 1e-37, 1.0) == [1, 1, 1]
    assert chosen(row, [0.3, 0.4, 0.7], 1e9, 1.0) == [1, 3, 0]


def nucleus(logits, temperature, top_p):
    """[(token, probability)] in falling order, cut to top_p and divided by what is left: the definition, in plain Python."""
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
    """On a grid of M uniforms each token is chosen M times its probability, off by less than one for each of its borders."""
    generator, M = torch.Generator().manual_seed(0), 2000
    for _ in range(5):
        row = 2 * torch.randn(1, 12, generator=generator, dtype=torch.float64)
        tokens = chosen(row, [(i + 0.5) / M for i in range(M)], temperature, top_p)
        expected = dict(nucleus(row[0].tolist(), temperature, top_p))
        assert set(tokens) <= expected.keys() and sum(expected.values()) == pytest.approx(1)
        assert all(abs(tokens.count(token) - M * p) < 2 for token, p in expected.items())


# ---------------------------------------------------------------------------------------------------------------------
# Generation

PROMPTS = [[1, 5, 6, 7, 8, 9, 10, 11, 12, 13], [1], [1, 5, 6, 7], [1, 20, 21], [1, 5, 6, 7], [1, 5]]
K, MAX_TOKENS, V = 3, 12, 64
STOPS = {2, *range(44, 56)}                            # many, so that rows end early, and at different times
ALLOWED = torch.ones(V, dtype=torch.bool)
ALLOWED[[0, 40, 41, 42, 43]] = False
HOW = {"greedy": dict(temperature=0), "sampled": dict(temperature=0.9, top_p=0.95), "flat": dict(temperature=3.0, top_p=1.0)}


def table(prompts=range(len(PROMPTS)), seed=0, k=K, max_tokens=MAX_TOKENS):
    return torch.stack([sample.uniforms(seed, 0, i, k, max_tokens) for i in prompts])


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


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_generation_is_the_plain_loop(family, how):
    """Token by token, for prompts of unlike lengths, some of them equal; Mistral's window of 4 ends inside the prompts."""
    net = tiny.net(family, seed=5, **({"sliding_window": 4} if family == "mistral" else {}))
    samples = sample.generate(net, PROMPTS, table(), STOPS, ALLOWED, **HOW[how])
    expected = [[sample.Sample(*plain_loop(net, prompt, row, **HOW[how])) for row in rows]
                for prompt, rows in zip(PROMPTS, table())]
    assert_same(samples, expected)
    lengths = {len(s.ids) for row in samples for s in row}
    assert len(lengths) > 2                                                 # rows did leave at different times


def test_batching_changes_nothing():
    """All prompts at once, one at a time, and in another order with their own uniforms."""
    net = tiny.net(seed=5)
    together = sample.generate(net, PROMPTS, table(), STOPS, ALLOWED)
    assert_same([sample.generate(net, [p], table([i]), STOPS, ALLOWED)[0] for i, p in enumerate(PROMPTS)], together)
    order = [3, 5, 0, 2, 1, 4]
    shuffled = sample.generate(net, [PROMPTS[i] for i in order], table(order), STOPS, ALLOWED)
    assert_same(shuffled, [together[i] for i in order])


def test_rows_that_finish_leave_the_others_alone():
    """With hardly any stop id the rows only grow longer: what they begin with is the same."""
    net = tiny.net(seed=5)
    some, few = (sample.generate(net, PROMPTS, table(), stops, ALLOWED) for stops in (STOPS, {2}))
    assert sum(s.finished for row in some for s in row) > sum(s.finished for row in few for s in row)
    for short, long in zip(sum(some, []), sum(few, [])):
        assert long.ids[:len(short.ids)] == short.ids


def test_ends():
    """A stop id ends its row, stays in ids and stands nowhere else; a row that never met one has all its tokens."""
    samples = sum(sample.generate(tiny.net(seed=5), PROMPTS, table(), STOPS, ALLOWED), [])
    for s in samples:
        assert not set(s.ids[:-1]) & STOPS and (s.ids[-1] in STOPS) == s.finished
        assert s.finished or len(s.ids) == MAX_TOKENS
    assert {s.finished for s in samples} == {True, False}


def test_limits():
    """A prompt with less room gets fewer tokens, the same ones; a row that is stopped by its limit is not finished."""
    net = tiny.net(seed=5)
    free = sample.generate(net, PROMPTS, table(), STOPS, ALLOWED)
    limits = [sorted(len(s.ids) for s in row)[1] for row in free]           # one row ends by itself just there
    held = sample.generate(net, PROMPTS, table(), STOPS, ALLOWED, limits=limits)
    for limit, long, short in zip(limits, free, held):
        for a, b in zip(long, short):
            assert b.ids == a.ids[:limit] and b.finished == (a.finished and len(a.ids) <= limit)
    ends = {(s.finished, len(s.ids) == limit) for limit, row in zip(limits, held) for s in row}
    assert ends == {(True, True), (True, False), (False, True)}


@pytest.mark.parametrize("how", HOW)
def test_what_may_not_be_sampled_never_is(how):
    """Among ten ids, with the favourite of each row forbidden."""
    net = tiny.net(seed=5)
    allowed = torch.zeros(V, dtype=torch.bool)
    allowed[10:20] = True
    first = sample.generate(net, PROMPTS, table(), STOPS, torch.ones(V, dtype=torch.bool), temperature=0, limits=[1] * 6)
    allowed[[row[0].ids[0] for row in first]] = False
    samples = sum(sample.generate(net, PROMPTS, table(), STOPS, allowed, **HOW[how]), [])
    assert all(allowed[s.ids].all() for s in samples)


@pytest.mark.parametrize("how", HOW)
def test_logprob_is_the_one_that_training_computes(how):
    """Σ log π of the sampled ids, stop id included: at temperature 1, over the whole vocabulary, whatever was sampled with."""
    net = tiny.net("neox", seed=5)
    samples = sample.generate(net, PROMPTS, table(), STOPS, ALLOWED, **HOW[how])
    sequences = [prompt + s.ids for prompt, row in zip(PROMPTS, samples) for s in row]
    expected = losses.logprobs(net, data.pack(sequences), [len(prompt) for prompt in PROMPTS for _ in range(K)])
    assert [s.logprob for row in samples for s in row] == pytest.approx(expected.tolist(), abs=1e-9)


def test_float32_sums_agree_with_training():
    net = tiny.net(seed=5, dtype=torch.float32)
    samples = sample.generate(net, PROMPTS, table(), STOPS, ALLOWED)
    sequences = [prompt + s.ids for prompt, row in zip(PROMPTS, samples) for s in row]
    expected = losses.logprobs(net, data.pack(sequences), [len(prompt) for prompt in PROMPTS for _ in range(K)])
    assert [s.logprob for row in samples for s in row] == pytest.approx(expected.tolist(), abs=1e-3)


def test_bfloat16_is_normalised_in_float32():
    """One token each, so that the logits are the prompt's own: their log-softmax must not be rounded to bfloat16."""
    net = tiny.net(seed=5, dtype=torch.bfloat16)
    for prompt in PROMPTS:
        (samples,) = sample.generate(net, [prompt], table([0], k=7, max_tokens=1), STOPS, ALLOWED, 2.0, 1.0)
        with torch.no_grad():
            expected = net.head(net(torch.tensor([prompt]))[0, -1:])[0].float().log_softmax(-1)
        assert [s.logprob for s in samples] == pytest.approx([expected[s.ids[0]].item() for s in samples], abs=1e-4)


def test_samples_of_a_prompt_differ_from_their_first_token_on():
    """Also where two prompts of a batch are the same text."""
    samples = sample.generate(tiny.net(scale=0.3), PROMPTS, table(k=7), STOPS, ALLOWED, temperature=1.0, top_p=1.0)
    assert all(len({s.ids[0] for s in row}) > 3 for row in samples)
    assert [s.ids for s in samples[2]] != [s.ids for s in samples[4]] and PROMPTS[2] == PROMPTS[4]


def test_samples_follow_the_weights():
    """After an update the same uniforms give other samples: those of the new weights, with nothing left of the old cache."""
    net, other = tiny.net(seed=5), tiny.net(seed=6)
    before = sample.generate(net, PROMPTS, table(), STOPS, ALLOWED)
    net.load_state_dict(other.state_dict())
    after = sample.generate(net, PROMPTS, table(), STOPS, ALLOWED)
    assert_same(after, sample.generate(other, PROMPTS, table(), STOPS, ALLOWED))
    assert [s.ids for row in after for s in row] != [s.ids for row in before for s in row]


def test_seeds_give_different_samples():
    net = tiny.net(scale=0.3)
    one, other = (sample.generate(net, PROMPTS, table(seed=seed), STOPS, ALLOWED) for seed in (0, 1))
    assert [s.ids for row in one for s in row] != [s.ids for row in other for s in row]


@pytest.mark.parametrize("max_tokens", [1, MAX_TOKENS])
def test_every_token_is_reported_as_it_comes(max_tokens):
    rows = {}
    samples = sample.generate(tiny.net(seed=5), PROMPTS, table(max_tokens=max_tokens), STOPS, ALLOWED,
                              on_token=lambda row, token: rows.setdefault(row, []).append(token))
    assert [rows[row] for row in range(len(PROMPTS) * K)] == [s.ids for row in samples for s in row]


def test_where_responses_stop_and_what_they_may_hold(folders):
    """The ends that the folder names; not the padding token, and no row behind the tokenizer's ids (Pythia has such)."""
    net, tokenizer = sample.load_model(folders["neox"], "float32", "cpu")
    stops, allowed = sample.stopping(tokenizer, "hh", net.config)
    end, padding = (tokenizer.special_ids[name] for name in ("<|endoftext|>", "<|padding|>"))
    assert stops == {end} and len(allowed) == 424
    assert [id for id in range(424) if not allowed[id]] == [padding, 420, 421, 422, 423]


def test_text_leaves_the_stop_id_out(tmp_path):
    tokenizer = data.load_tokenizer(tiny.write_tokenizer(tmp_path))
    ids = tokenizer.encode_after(" The river")
    for finished, given in ((True, ids + [tokenizer.eos_id]), (False, ids)):
        assert sample.response_text(tokenizer, sample.Sample(given, 0.0, finished)) == " The river"


# ---------------------------------------------------------------------------------------------------------------------
# Command line

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: str(tiny.folder(root / family, family)) for family in tiny.FAMILIES}


command = functools.partial(tiny.command, sample)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_command_line(family, folders, tmp_path, capsys, monkeypatch):
    """Rows with these fields; the same seed gives the same rows at any batch size, on the screen and in a file."""
    prompts = tiny.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in tiny.pairs(5)])
    arguments = [f"--model={folders[family]}", f"--prompts={prompts}", "--k=3", "--max_tokens=9", "--dtype=float64",
                 "--temperature=1.2", "--seed=4"]
    code, out, err = command(capsys, monkeypatch, *arguments)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["prompt"] for row in rows] == [row["prompt"] for row in tiny.pairs(5)]
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
        assert command(capsys, monkeypatch, *arguments, f"--batch_size={batch_size}")[1] == out
    assert command(capsys, monkeypatch, *arguments[:-1], "--seed=5")[1] != out
    code, said, _ = command(capsys, monkeypatch, *arguments, f"--out={tmp_path / 'out.jsonl'}")
    assert code == 0 and (tmp_path / "out.jsonl").read_text(encoding="utf-8") == out
    assert said.splitlines()[-1].startswith("5 prompts × 3 responses written to")


def test_one_prompt(folders, capsys, monkeypatch):
    """Without --chat the prompt is continued as it stands; with it, it is a user's turn."""
    arguments = [f"--model={folders['llama']}", "--prompt=The old river", "--temperature=0", "--max_tokens=5"]
    plain = json.loads(command(capsys, monkeypatch, *arguments)[1])
    turn = json.loads(command(capsys, monkeypatch, *arguments, "--chat=hh")[1])
    assert plain["prompt"] == "The old river" and turn["prompt"] == [{"role": "user", "content": "The old river"}]
    net, tokenizer = sample.load_model(folders["llama"], "float32", "cpu")
    stops, allowed = sample.stopping(tokenizer, "hh", net.config)
    for row, text in ((plain, "The old river"), (turn, "\n\nHuman: The old river\n\nAssistant:")):
        ids = [tokenizer.bos_id] + tokenizer.encode(text)
        assert row["responses"][0]["ids"] == plain_loop(net, ids, torch.zeros(5), stops, torch.as_tensor(allowed), 0)[0]


@pytest.mark.parametrize("text", ["", "none", "None", "--k=3", "a=b\nc"])
def test_any_text_is_a_prompt(text, folders, capsys, monkeypatch):
    for family in folders:                                 # without a BOS an empty prompt starts from <|endoftext|>
        code, out, _ = command(capsys, monkeypatch, f"--model={folders[family]}", f"--prompt={text}", "--max_tokens=2")
        assert code == 0 and json.loads(out)["prompt"] == text


def test_a_real_process(folders, tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, ROOT / "sample.py", *arguments], capture_output=True, text=True, cwd=tmp_path,
                              env=dict(os.environ, OMP_NUM_THREADS="1"))
    good = run(f"--model={folders['neox']}", "--prompt=The", "--max_tokens=2")
    assert good.returncode == 0 and json.loads(good.stdout)["prompt"] == "The"
    bad = run(f"--model={folders['neox']}", "--prompt=The", "--k=0")
    assert bad.returncode == 1 and bad.stdout == ""
    assert len(bad.stderr.splitlines()) == 1 and "--k=0" in bad.stderr


BAD = {     # arguments behind --model, what the message names
    "no prompt": ([], "--prompt"), "two prompts": (["--prompt=a", "--prompts=b.jsonl"], "--prompts"),
    "k": (["--prompt=a", "--k=0"], "--k=0"), "k text": (["--prompt=a", "--k=many"], "--k=many"),
    "temperature": (["--prompt=a", "--temperature=-1"], "--temperature=-1"),
    "temperature nan": (["--prompt=a", "--temperature=nan"], "--temperature=nan"),
    "temperature inf": (["--prompt=a", "--temperature=inf"], "--temperature=inf"),
    "top_p 0": (["--prompt=a", "--top_p=0"], "--top_p=0"), "top_p 2": (["--prompt=a", "--top_p=2"], "--top_p=2"),
    "max_tokens": (["--prompt=a", "--max_tokens=0"], "--max_tokens=0"),
    "seed": (["--prompt=a", "--seed=-1"], "--seed=-1"), "batch_size": (["--prompt=a", "--batch_size=0"], "--batch_size=0"),
    "dtype": (["--prompt=a", "--dtype=int8"], "--dtype=int8"), "device": (["--prompt=a", "--device=tpu"], "--device=tpu"),
    "chat": (["--prompt=a", "--chat=irc"], "--chat=irc"), "chat tokens": (["--prompt=a", "--chat=chatml"], "<|im_start|>"),
    "no file": (["--prompts=nowhere.jsonl"], "nowhere.jsonl"), "unknown": (["--promt=a"], "--prompt"),
    "out": (["--prompt=a", "--out=nowhere/out.jsonl"], "nowhere/out.jsonl"),
    "no room": (["--prompt=" + "The river " * 600], "512"),
    "no model": (["--prompt=a", "--model=nowhere"], "nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, word = BAD[name]
    model = [] if name == "no model" else [f"--model={folders['llama']}"]
    code, out, err = command(capsys, monkeypatch, *model, *arguments)
    assert code == 1 and out == "" and len(err.splitlines()) == 1 and err.startswith("error: ") and word in err


def test_a_file_of_plain_prompts_with_a_format(folders, tmp_path, capsys, monkeypatch):
    """With --chat a file's texts are asked as --prompt is; the rows keep them as they were given."""
    prompts = tiny.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "The old river"}])
    for chat in ([], ["--chat=hh"], ["--chat=zephyr"]):
        model = [f"--model={folders['llama']}", "--max_tokens=5", *chat]
        one = json.loads(command(capsys, monkeypatch, *model, "--prompt=The old river")[1])
        row = json.loads(command(capsys, monkeypatch, *model, f"--prompts={prompts}")[1])
        assert row["responses"] == one["responses"] and row["prompt"] == "The old river"


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_long_prompts_of_a_file_lose_their_front(family, folders, tmp_path, capsys, monkeypatch):
    """Of a context of 512, max_tokens or at most half are left for the answer; what fits is not touched."""
    net, tokenizer = sample.load_model(folders[family], "float32", "cpu")
    ids = [tokenizer.encode("The" + "!" * n) for n in (5, 2000)]
    prompts = tiny.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "The" + "!" * n} for n in (5, 2000)])
    seen = []
    generate = sample.generate
    monkeypatch.setattr(sample, "generate", lambda net, prompts, *rest: seen.extend(prompts) or generate(net, prompts, *rest))
    for max_tokens, room in ((3, 3), (10 ** 6, 256)):
        seen.clear()
        code, out, err = command(capsys, monkeypatch, f"--model={folders[family]}", f"--prompts={prompts}",
                                 f"--max_tokens={max_tokens}")
        assert code == 0 and len(out.splitlines()) == 2 and "1 of 2 prompts" in err
        bos = tokenizer.prefix(False)
        assert seen == [bos + ids[0], bos + ids[1][-(512 - room - len(bos)):]]


def test_the_context_is_never_left(folders, capsys, monkeypatch):
    """BOS and a prompt of n tokens leave 511 - n, however many are asked for; asking for 10¹² takes no more memory."""
    tokenizer, model = data.load_tokenizer(folders["llama"]), f"--model={folders['llama']}"
    prompts = {len(tokenizer.encode(text)): text for text in ("The" + "!" * n for n in range(520))}
    for n, most in ((508, 3), (510, 1)):
        _, out, _ = command(capsys, monkeypatch, model, f"--prompt={prompts[n]}", "--k=4", "--max_tokens=1e12")
        assert max(len(response["ids"]) for response in json.loads(out)["responses"]) == most
    code, out, err = command(capsys, monkeypatch, model, f"--prompt={prompts[511]}", "--max_tokens=1")
    assert code == 1 and out == "" and "512" in err


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
    """Characters of two to four bytes, each byte a token of its own here: nothing is printed before the last one has come."""
    text = " The é日😀 river"
    tokenizer = data.load_tokenizer(folders[family])
    ids = [*tokenizer.encode_after(text), tokenizer.eos_id]
    assert len(ids) > len("é日😀".encode())

    def rigged(net, prompts, uniform, stop_ids, allowed, temperature, top_p, limits, on_token):
        for token in ids:
            on_token(0, token)
    monkeypatch.setattr(sample, "generate", rigged)
    monkeypatch.setattr(sys, "stdout", Terminal())
    sample.main(sample.Settings(model=folders[family], prompt="Look:"))
    writes = [part for part in sys.stdout.writes if part]
    assert "".join(writes) == text + "\n" and len(writes) > 5
    assert all(char in "".join(writes) and any(char in part for part in writes) for char in "é日😀")
    assert "\ufffd" not in "".join(writes)


# ---------------------------------------------------------------------------------------------------------------------
# What all command lines share (cli.py)

@pytest.mark.parametrize("given, meant", [
    ("--max_new_tokens=5", "max_tokens"), ("--tokens=5", "max_tokens"), ("--promt=a", "prompt"), ("--top-p=1", "top_p"),
    ("--batch-size=2", "batch_size"), ("--K=3", "k"), ("--num_return_sequences=3", "k"), ("--model_path=x", "model"),
    ("--checkpoint=x", None), ("--kl=1", None), ("--lora_rank=4", None), ("--x=1", None)])
def test_did_you_mean(given, meant):
    """A near name is suggested, with _ where - was typed, and none where only single letters agree."""
    with pytest.raises(InputError) as caught:
        cli.parse(sample.Settings, [given])
    assert str(caught.value) == f"there is no setting {given.split('=')[0]}" + (
        f"; did you mean --{meant}?" if meant else "; --help lists them.")
    assert cli.nearest("learning_rate", ["lam", "lr", "beta"]) == "lr"


def test_lists_may_have_spaces():
    assert cli.convert("a.jsonl, b.jsonl:0.1 ,,", list[str]) == ["a.jsonl", "b.jsonl:0.1"]
    assert cli.convert(" 0.9, 0.99", list[float]) == [0.9, 0.99]


def test_a_terminal_that_is_not_utf8(folders, tmp_path):
    """What it lacks is shown as ?, and rows stay whole: JSON escapes it."""
    def run(*arguments):
        return subprocess.run([sys.executable, ROOT / "sample.py", f"--model={folders['neox']}", "--prompt=é", "--max_tokens=2",
                               *arguments], capture_output=True, cwd=tmp_path,
                              env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONIOENCODING="ascii"))
    said = run("--out=out.jsonl")
    assert said.returncode == 0 and b"1 prompts ? 1 responses" in said.stdout, said.stderr
    assert json.loads(run().stdout) == json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
