"""forest.py against brute force and the same sequences one at a time: layout, attention, growth, the cache.

Where a test says "equal", a control beside it shows that its comparison notices the mistakes it is there for.
"""
import dataclasses
import random

import pytest
import torch

import forest
import losses
import tiny

EOS, PAD = 2, 0
LONG = list(range(20, 50))
SHAPES = {
    "one": [LONG], "a token": [[5]], "tokens": [[5], [9], [5], [0]],
    "prefixes of one another": [LONG[:7], LONG, LONG[:1], LONG[:12] + [3, 3], LONG[:12]],
    "duplicates": [LONG[:9], LONG[:4] + [1], LONG[:9], LONG[:9]],
    "the first token differs": [[1, 2, 3], [2, 2, 3], [3, 2, 3]],
    "the last token differs": [LONG + [1], LONG + [2]],
}


def random_sequences(seed):
    """1 to 10 sequences over few ids: they share prefixes, repeat, and some are prefixes of others."""
    rng = random.Random(seed)
    ids, longest = rng.choice((1, 2, 3, 30)), rng.choice((1, 2, 5, 12))
    sequences = [[rng.randrange(ids) for _ in range(rng.randint(1, longest))]
                 for _ in range(rng.randint(1, 6))]
    sequences += [rng.choice(sequences)[:rng.randint(1, longest)] for _ in range(rng.randint(0, 4))]
    rng.shuffle(sequences)
    return sequences


def batch(seed):
    """Sequences of at least two tokens and their starts, with several prompts, shared prefixes and twins."""
    rng, sequences = random.Random(seed), []
    for _ in range(3):
        prompt = [1] + [rng.randrange(64) for _ in range(rng.randint(0, 9))]
        first = [rng.randrange(64) for _ in range(rng.randint(2, 9))]
        for y in (first, first[:1] + [rng.randrange(64)], [rng.randrange(64)], first):
            sequences.append((prompt + y, len(prompt)))
    rng.shuffle(sequences)
    return [s for s, _ in sequences], [start for _, start in sequences]


def windowed(family, **changes):
    """A float64 network; Mistral's window of 4 must be measured in depth, not in places of the forest."""
    return tiny.net(family, **({"sliding_window": 4} if family == "mistral" else {}), **changes)


families = pytest.mark.parametrize("family", tiny.FAMILIES)
blocks = pytest.mark.parametrize("block", [3, forest.QUERY_BLOCK])


@pytest.fixture
def query_block(block, monkeypatch):
    monkeypatch.setattr(forest, "QUERY_BLOCK", block)


# -----------------------------------------------------------------------------------------------------------
# Layout

def prefixes(packed):
    """What stands before and at each token, found by walking up its parents."""
    found = []
    for i in range(len(packed.tokens)):
        walk, j = [], i
        while j >= 0:
            walk.append(int(packed.tokens[j]))
            j = int(packed.parent[j])
        found.append(tuple(reversed(walk)))
    return found


def check(packed, sequences):
    nodes = prefixes(packed)
    assert [packed.tokens[path].tolist() for path in packed.paths] == sequences
    for path in packed.paths:
        assert packed.parent[path].tolist() == [-1, *path[:-1].tolist()]
        assert packed.depth[path].tolist() == list(range(len(path)))
    for i, prefix in enumerate(nodes):               # the rule
        seen = [j for j in range(len(nodes)) if j <= i < packed.end[j]]
        assert [nodes[j] for j in seen] == [prefix[:n + 1] for n in range(len(prefix))]
    for tensor in (packed.tokens, packed.depth, packed.end, packed.parent, *packed.paths):
        assert tensor.dtype == torch.int64 and tensor.device.type == "cpu"
    return nodes


def test_layout():
    beyond_int32_order = [[50000, 7], [-1 + 2 ** 31, 1], [7, 50000]]
    for sequences in (*SHAPES.values(), beyond_int32_order, *map(random_sequences, range(400))):
        nodes = check(forest.pack(sequences), sequences)
        once = {tuple(sequence[:n]) for sequence in sequences for n in range(1, len(sequence) + 1)}
        assert len(nodes) == len(set(nodes)) == len(once)


def test_the_picture_of_the_docstring():
    packed = forest.pack([[ord(letter) for letter in word] for word in ("abc", "abde", "af", "g")])
    assert "".join(map(chr, packed.tokens)) == "abcdefg" and packed.depth.tolist() == [0, 1, 2, 2, 3, 1, 0]
    assert packed.end.tolist() == [6, 5, 3, 5, 5, 6, 7] and packed.parent.tolist() == [-1, 0, 1, 1, 3, 0, -1]


def test_rows_are_trees_of_one_branch():
    rows = [[1, 2, 3], [1, 2, 3], [7, 7, 7]]
    check(forest.rows(torch.tensor(rows)), rows)


def test_sharing_is_the_point():
    """20 judge questions of 300 tokens after a common 250: 250 + 20·50 tokens instead of 6,000."""
    packed = forest.pack([list(range(250)) + [1000 + i] * 50 for i in range(20)])
    assert len(packed.tokens) == 250 + 20 * 50


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="empty"):
        forest.pack([[1, 2], []])


# -----------------------------------------------------------------------------------------------------------
# Attention: values and gradients of the sequences alone

def values_and_gradients(net, hidden):
    """Hidden states (T, D) of each sequence and the gradients of a random scalar of them."""
    generator, hidden = torch.Generator().manual_seed(3), list(hidden)
    loss = sum((h * torch.randn(h.shape, generator=generator, dtype=h.dtype)).sum() for h in hidden)
    weights = [weight for name, weight in net.named_parameters() if name != "head.weight"]
    return hidden, torch.autograd.grad(loss, weights)


def as_forest(net, packed):
    hidden = net.hidden(packed)
    return values_and_gradients(net, (hidden[path] for path in packed.paths))


def one_at_a_time(net, sequences):
    return values_and_gradients(net, (net(torch.tensor([sequence]))[0] for sequence in sequences))


def difference(one, other):
    """The largest difference of values, and that of gradients."""
    return [max((a - b).abs().max().item() for a, b in zip(x, y, strict=True))
            for x, y in zip(one, other, strict=True)]


@blocks
@pytest.mark.parametrize("name", [*SHAPES, "batch"])
@families
def test_a_forest_is_its_sequences(family, name, block, query_block):
    net, sequences = windowed(family), SHAPES.get(name) or batch(0)[0]
    assert max(difference(as_forest(net, forest.pack(sequences)), one_at_a_time(net, sequences))) < 1e-10


@blocks
@families
def test_a_wrong_forest_is_noticed(family, block, query_block):
    """The control: each wrong mask or position is far off in values or gradients."""
    net, sequences = windowed(family), batch(0)[0]
    expected, packed = one_at_a_time(net, sequences), forest.pack(sequences)
    N, index, end = len(packed.tokens), torch.arange(len(packed.tokens)), packed.end
    parent = int(((end < N) & (end > index + 1)).nonzero()[-1])      # its subtree ends before the forest does
    wrong = {
        "every end is N": dict(end=torch.full_like(end, N)),
        "one end too late": dict(end=end + (index == parent)),
        "one end too early": dict(end=end - (index == parent).long()),
        "position is the index": dict(depth=index),
    }
    for name, change in wrong.items():
        found = as_forest(net, dataclasses.replace(packed, **change))
        assert max(difference(found, expected)) > 1e-3, name


@families
@torch.no_grad()
def test_rows_of_a_batch_are_the_rows_alone(family):
    net, tokens = windowed(family), torch.randint(64, (3, 40), generator=torch.Generator().manual_seed(0))
    assert (net(tokens) - torch.cat([net(row[None]) for row in tokens])).abs().max() < 1e-10


@blocks
@families
def test_recomputing_activations_changes_no_bit(family, block, query_block, monkeypatch):
    """Values and gradients, on several query blocks; without a gradient nothing is computed twice."""
    net, calls, attend = windowed(family), [], forest.ForestAttention.__call__
    monkeypatch.setattr(forest.ForestAttention, "__call__", lambda *given: calls.append(1) or attend(*given))
    results = []
    for recompute in (False, True):
        for layer in net.blocks:
            layer.recompute = recompute
        results.append(as_forest(net, forest.pack(batch(1)[0])))
        assert len(calls) == 2 * (1 + recompute)
        calls.clear()
    assert difference(*results) == [0, 0] and max(gradient.abs().max() for gradient in results[0][1]) > 1e-3
    with torch.no_grad():
        net(torch.arange(9)[None])
    assert len(calls) == 2


@families
def test_recomputing_activations_keeps_less(family):
    """What stands in memory between forward and backward: with it each block's input, less than a tenth."""
    net, tokens, kept = windowed(family, num_hidden_layers=6), torch.arange(60)[None], {}
    weights = {weight.untyped_storage().data_ptr() for weight in net.parameters()}
    for recompute in (False, True):
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor
        for layer in net.blocks:
            layer.recompute = recompute
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            net(tokens)
        kept[recompute] = sum(storage.nbytes() for place, storage in storages.items() if place not in weights)
    inputs = 6 * 60 * 32 * 8
    assert inputs <= kept[True] < inputs * 2 and kept[True] < kept[False] / 10


# -----------------------------------------------------------------------------------------------------------
# Log-probabilities on a forest

def logprobs_alone(net, sequences, starts):
    """Σ log π of each sequence's tokens from its start on: a causal forward each, no forest, no chunks."""
    values = []
    for sequence, start in zip(sequences, starts):
        logs = net.head(net(torch.tensor([sequence])))[0].log_softmax(-1)
        scored = [logs[i - 1, sequence[i]] for i in range(start, len(sequence))]
        values.append(sum(scored, logs.new_zeros(())))
    return torch.stack(values)


def apart(net, found, expected):
    """The largest difference of two vectors of log-probabilities and of a weighted sum's gradients."""
    weights = torch.linspace(-1, 2, len(found), dtype=found.dtype)
    one, other = (torch.autograd.grad((values * weights).sum(), list(net.parameters()))
                  for values in (found, expected))
    return max(difference([[found], one], [[expected], other]))


@families
def test_logprobs_are_those_of_each_sequence_alone(family, monkeypatch):
    """In several chunks of the head; one text is scored from two starts."""
    monkeypatch.setattr(losses, "HEAD_CHUNK", 16)
    net = windowed(family)
    for seed in range(3):
        sequences, starts = batch(seed)
        sequences, starts = [*sequences, sequences[0]], [*starts, starts[0] + 1]
        found = losses.logprobs(net, forest.pack(sequences), starts)
        assert apart(net, found, logprobs_alone(net, sequences, starts)) < 1e-10


FAULTS = {       # each a mistake that still "trains"
    "predicted from the token before in the forest": lambda packed, starts: (
        dataclasses.replace(packed, parent=torch.arange(len(packed.tokens)) - 1), starts),
    "predicted from itself": lambda packed, starts: (
        dataclasses.replace(packed, parent=torch.arange(len(packed.tokens))), starts),
    "the response starts a token early": lambda packed, starts: (
        packed, [max(start - 1, 1) for start in starts]),
    "the response starts a token late": lambda packed, starts: (packed, [start + 1 for start in starts]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_label_is_noticed(name):
    net, (sequences, starts) = tiny.net(), batch(0)
    found = losses.logprobs(net, *FAULTS[name](forest.pack(sequences), starts))
    assert apart(net, found, logprobs_alone(net, sequences, starts)) > 1e-3


def test_what_is_scored_comes_from_lengths_not_from_ids():
    """EOS, padding and BOS ids count wherever they stand after the start, and nowhere before it."""
    net, prompt = tiny.net(), [1, 5, EOS, PAD, EOS]
    responses = [[PAD, EOS, 9, EOS, PAD], [EOS], [PAD], [PAD, PAD, PAD], [1, EOS, EOS], [9, EOS, 9]]
    sequences, starts = [prompt + y for y in responses], [len(prompt)] * len(responses)
    found = losses.logprobs(net, forest.pack(sequences), starts)
    assert torch.allclose(found, logprobs_alone(net, sequences, starts), atol=1e-10)
    logs = net.head(net(torch.tensor([sequences[0]])))[0].log_softmax(-1)
    by_hand = logs[4, PAD] + logs[5, EOS] + logs[6, 9] + logs[7, EOS] + logs[8, PAD]
    assert torch.allclose(found[0], by_hand, atol=1e-10)


# -----------------------------------------------------------------------------------------------------------
# A forest that grows

def grown(net, first, then, shift=0):
    """Hidden states of each last token of `then`, read after what was read of `first`; and the forest."""
    cache, past = forest.Cache(net.config), forest.pack(first)
    hidden = net.hidden(past, cache)
    packed = forest.grow(past, then)
    packed.branch += shift
    if len(packed.tokens):
        hidden = torch.cat((hidden, net.hidden(packed, cache)))
    return hidden[torch.stack([path[-1] for path in packed.paths])], packed


@blocks
@families
@torch.no_grad()
def test_a_forest_that_grows_is_the_sequences_alone(family, block, query_block):
    """Sequences that branch off anywhere, begin anew, were read before or are prefixes of one that was."""
    net = windowed(family)
    for seed in range(4):
        rng = random.Random(seed)
        first, then = batch(seed)[0], batch(seed + 1)[0]
        for sequence in first:
            fresh = [rng.randrange(64) for _ in range(rng.randint(0, 5))]
            then.append(sequence[:rng.randint(1, len(sequence))] + fresh)
        then += [first[0], first[1][:2], [63, 63, 63]]
        found, packed = grown(net, first, then)
        expected = torch.stack([net(torch.tensor([sequence]))[0, -1] for sequence in then])
        assert (found - expected).abs().max() < 1e-10
        assert len(packed.tokens) == len(forest.pack(first + then).tokens) - len(packed.past.tokens)
        assert list(map(len, packed.paths)) == list(map(len, then))
    found, packed = grown(net, first, [first[2], first[0][:1]])
    assert len(packed.tokens) == 0 and len(found) == 2
    with pytest.raises(ValueError, match="grown"):
        forest.grow(packed, then)


@torch.no_grad()
def test_a_wrong_branch_is_noticed():
    """A token that sees one of the past too many or too few."""
    net, (first, _) = tiny.net("llama"), batch(0)
    then = [first[0][:-1] + [5, 6, 7]]
    for shift in (-1, 1):
        assert (grown(net, first, then, shift)[0] - grown(net, first, then)[0]).abs().max() > 1e-6


# -----------------------------------------------------------------------------------------------------------
# The cache

PROMPTS = [LONG[:14], [7], LONG[:6], LONG[:6] + [1, 2], LONG[:6], [8, 9, 10]]
DROPS = {        # step -> the rows that go on
    "all-rows-stay": {},
    "some-rows-leave": {2: [0, 2, 3, 4, 5, 8, 9, 13, 14, 16, 17], 5: [1, 2, 4, 9]},
    "prompts-leave": {1: [0, 1, 2, 6, 7, 8, 9, 11, 12, 17], 3: [1, 4, 5, 8, 9], 6: [3]},
    "before-the-first-token": {0: [4, 5, 10, 17]},
}


@torch.no_grad()
def decode(net, prompts, k, drops, steps=8):
    """Largest difference between decoding random rows with the cache and without."""
    generator, packed = torch.Generator().manual_seed(0), forest.pack(prompts)
    cache, worst = forest.Cache(net.config), 0.0
    net.hidden(packed, cache)
    cache.open(packed.paths, k, steps)
    rows = [list(prompt) for prompt in prompts for _ in range(k)]
    for step in range(steps):
        if step in drops:
            cache.keep(torch.tensor(drops[step]))
            rows = [rows[i] for i in drops[step]]
        new = torch.randint(64, (len(rows), 1), generator=generator)
        rows = [row + token for row, token in zip(rows, new.tolist())]
        for row, h in zip(rows, net(new, cache=cache)):
            worst = max(worst, (h[-1] - net(torch.tensor([row]))[0, -1]).abs().max().item())
    return worst


@pytest.mark.parametrize("drops", DROPS)
@families
def test_decoding_with_a_cache_is_the_full_forward(family, drops):
    assert decode(windowed(family), PROMPTS, 3, DROPS[drops]) < 1e-10
    assert decode(windowed(family), [LONG], 1, {}) < 1e-10


@pytest.mark.parametrize("fault", ["length", "window", "owner"])
def test_a_wrong_cache_is_noticed(fault, monkeypatch):
    opened = forest.Cache.open

    def open_wrongly(cache, *arguments):
        opened(cache, *arguments)
        if fault == "length":
            cache.length = cache.length + 1
        if fault == "window":
            cache.config = dataclasses.replace(cache.config, sliding_window=5)
        if fault == "owner":
            cache.prompt = [tuple(part.flip(0) for part in pair) for pair in cache.prompt]
    monkeypatch.setattr(forest.Cache, "open", open_wrongly)
    assert decode(windowed("mistral"), PROMPTS, 3, {}, steps=3) > 1e-3
