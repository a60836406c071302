"""A batch as a forest of shared prefixes: its layout by brute force, and its log-probabilities one sequence at a time."""
import dataclasses
import random

import pytest
import torch

import data
import losses
import model
import tiny

EOS, PAD = 2, 0


def random_sequences(seed):
    """1 to 10 sequences over few ids, so that fronts are shared, sequences repeat and some are the front of others."""
    rng = random.Random(seed)
    ids, longest = rng.choice((1, 2, 3, 30)), rng.choice((1, 2, 5, 12))
    sequences = [[rng.randrange(ids) for _ in range(rng.randint(1, longest))] for _ in range(rng.randint(1, 6))]
    sequences += [rng.choice(sequences)[:rng.randint(1, longest)] for _ in range(rng.randint(0, 4))]
    rng.shuffle(sequences)
    return sequences


LONG = list(range(20, 50))
SHAPES = {
    "one": [LONG], "a token": [[5]], "tokens": [[5], [9], [5], [0]],
    "fronts of one another": [LONG[:7], LONG, LONG[:1], LONG[:12] + [3, 3], LONG[:12]],
    "duplicates": [LONG[:9], LONG[:4] + [1], LONG[:9], LONG[:9]],
    "the first token differs": [[1, 2, 3], [2, 2, 3], [3, 2, 3]], "the last token differs": [LONG + [1], LONG + [2]],
    "ids beyond int32 order": [[50000, 7], [-1 + 2 ** 31, 1], [7, 50000]],
}


# ---------------------------------------------------------------------------------------------------------------------
# Layout

def fronts(forest):
    """What stands before and at each token, found by walking up its parents."""
    found = []
    for i in range(len(forest.tokens)):
        walk, j = [], i
        while j >= 0:
            walk.append(int(forest.tokens[j]))
            j = int(forest.parent[j])
        found.append(tuple(reversed(walk)))
    return found


def check(sequences):
    forest = data.pack(sequences)
    N, nodes = len(forest.tokens), fronts(forest)
    distinct = {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}
    assert len(nodes) == len(distinct) and set(nodes) == distinct            # each front stands exactly once
    assert [forest.tokens[path].tolist() for path in forest.paths] == sequences
    for path in forest.paths:
        assert forest.parent[path].tolist() == [-1, *path[:-1].tolist()]
        assert forest.depth[path].tolist() == list(range(len(path)))
    for i, front in enumerate(nodes):
        seen = [j for j in range(N) if j <= i < forest.end[j]]
        assert seen == [j for j, other in enumerate(nodes) if front[:len(other)] == other]
    for tensor in (forest.tokens, forest.depth, forest.end, forest.parent, *forest.paths):
        assert tensor.dtype == torch.int64 and tensor.device.type == "cpu"


@pytest.mark.parametrize("name", SHAPES)
def test_layout(name):
    check(SHAPES[name])


def test_layout_of_random_sequences():
    for seed in range(400):
        check(random_sequences(seed))


def test_sharing_is_the_point():
    """20 judge questions of 300 tokens behind a front of 250: 250 + 20·50 tokens instead of 6,000."""
    forest = data.pack([list(range(250)) + [1000 + i] * 50 for i in range(20)])
    assert len(forest.tokens) == 250 + 20 * 50


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="empty"):
        data.pack([[1, 2], []])


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities

def one_at_a_time(net, sequences, starts):
    """Σ log π of each sequence's tokens from its start on: a plain causal forward a sequence, no forest, no chunks."""
    values = []
    for sequence, start in zip(sequences, starts):
        logs = net.head(net(torch.tensor([sequence])))[0].log_softmax(-1)
        values.append(sum((logs[i - 1, sequence[i]] for i in range(start, len(sequence))), logs.new_zeros(())))
    return torch.stack(values)


def apart(net, found, expected):
    """The largest difference of two vectors of log-probabilities and of the gradients of a weighted sum of them."""
    weights = torch.linspace(-1, 2, len(found), dtype=found.dtype)
    one, other = (torch.autograd.grad((values * weights).sum(), list(net.parameters())) for values in (found, expected))
    return max([(found - expected).abs().max().item()] + [(a - b).abs().max().item() for a, b in zip(one, other)])


def batch(seed):
    """Sequences of at least two tokens and their starts, with several prompts, shared fronts and twins."""
    rng, sequences = random.Random(seed), []
    for _ in range(3):
        prompt = [1] + [rng.randrange(64) for _ in range(rng.randint(0, 9))]
        first = [rng.randrange(64) for _ in range(rng.randint(2, 9))]
        for y in (first, first[:1] + [rng.randrange(64)], [rng.randrange(64)], first):
            sequences.append((prompt + y, len(prompt)))
    rng.shuffle(sequences)
    return [s for s, _ in sequences], [start for _, start in sequences]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logprobs_are_those_of_each_sequence_alone(family, monkeypatch):
    """Several chunks of the head, and for Mistral a window of 4 that must be measured in depth, not in places of the batch."""
    monkeypatch.setattr(losses, "HEAD_CHUNK", 16)
    net = tiny.net(family, **({"sliding_window": 4} if family == "mistral" else {}))
    for seed in range(3):
        sequences, starts = batch(seed)
        found = losses.logprobs(net, data.pack(sequences), starts)
        assert apart(net, found, one_at_a_time(net, sequences, starts)) < 1e-10


def grown(net, first, then):
    """Hidden states of the last token of each sequence of `then`, read behind what was read of `first`; and the forest."""
    cache, past = model.Cache(net.config), data.pack(first)
    hidden = net.read(past, cache)
    forest = data.grow(past, then)
    if len(forest.tokens):
        hidden = torch.cat((hidden, net.read(forest, cache)))
    return hidden[torch.stack([path[-1] for path in forest.paths])], forest


@pytest.mark.parametrize("block", [3, 256])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_a_forest_that_grows_is_the_sequences_alone(family, block, monkeypatch):
    """Sequences that branch off anywhere, that begin anew, that were read before or are the front of one that was."""
    monkeypatch.setattr(model, "QUERY_BLOCK", block)
    net = tiny.net(family, **({"sliding_window": 4} if family == "mistral" else {}))
    for seed in range(4):
        rng = random.Random(seed)
        first, then = batch(seed)[0], batch(seed + 1)[0]
        then += [sequence[:rng.randint(1, len(sequence))] + [rng.randrange(64) for _ in range(rng.randint(0, 5))]
                 for sequence in first] + [first[0], first[1][:2], [63, 63, 63]]
        found, forest = grown(net, first, then)
        expected = torch.stack([net(torch.tensor([sequence]))[0, -1] for sequence in then])
        assert (found - expected).abs().max() < 1e-10
        assert len(forest.tokens) == len(data.pack(first + then).tokens) - len(forest.past.tokens)
        assert all(path.tolist() != [] and len(path) == len(sequence) for path, sequence in zip(forest.paths, then))
    found, forest = grown(net, first, [first[2], first[0][:1]])
    assert len(forest.tokens) == 0 and len(found) == 2


@torch.no_grad()
def test_a_wrong_branch_is_noticed():
    """A token that sees one of the past too many or too few."""
    net, (first, _) = tiny.net("llama"), batch(0)
    then = [first[0][:-1] + [5, 6, 7]]
    expected, _ = grown(net, first, then)
    for shift in (-1, 1):
        cache, past = model.Cache(net.config), data.pack(first)
        net.read(past, cache)
        forest = data.grow(past, then)
        forest.branch += shift
        assert (net.read(forest, cache)[-1] - expected[0]).abs().max() > 1e-6


def test_one_sequence_can_be_scored_from_several_starts():
    """The same tokens twice, as a whole text and behind its prompt: what is shared is computed once and counted for both."""
    net, sequences, starts = tiny.net(), [[1, 5, 6, 7, 8]] * 2 + [[1, 5, 6]], [1, 3, 2]
    assert apart(net, losses.logprobs(net, data.pack(sequences), starts), one_at_a_time(net, sequences, starts)) < 1e-10


FAULTS = {       # each a mistake that still "trains"
    "a token is seen beyond its descendants": lambda forest, starts: (new_end(forest, lambda j, end: len(forest.end)), starts),
    "a token is hidden from its descendants": lambda forest, starts: (new_end(forest, lambda j, end: j + 1), starts),
    "predicted from the token before in the batch": lambda forest, starts: (
        dataclasses.replace(forest, parent=torch.arange(len(forest.tokens)) - 1), starts),
    "predicted from itself": lambda forest, starts: (
        dataclasses.replace(forest, parent=torch.arange(len(forest.tokens))), starts),
    "positions count through the batch": lambda forest, starts: (
        dataclasses.replace(forest, depth=torch.arange(len(forest.tokens))), starts),
    "the response starts a token early": lambda forest, starts: (forest, [max(start - 1, 1) for start in starts]),
    "the response starts a token late": lambda forest, starts: (forest, [start + 1 for start in starts]),
}


def new_end(forest, change):
    """The forest with another `end` for one token: the one with most descendants of those whose subtree the batch outlasts."""
    index, end = torch.arange(len(forest.end)), forest.end.clone()
    j = int(((end - index) * (end < len(end))).argmax())
    end[j] = change(j, int(end[j]))
    return dataclasses.replace(forest, end=end)


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_mask_or_label_is_noticed(name):
    """The control of the two tests above."""
    net, (sequences, starts) = tiny.net(), batch(0)
    found = losses.logprobs(net, *FAULTS[name](data.pack(sequences), starts))
    assert apart(net, found, one_at_a_time(net, sequences, starts)) > 1e-3


def test_what_is_scored_comes_from_lengths_not_from_ids():
    """EOS, padding and BOS ids count wherever they stand behind the start, and nowhere before it."""
    net = tiny.net()
    prompt = [1, 5, EOS, PAD, EOS]
    responses = [[PAD, EOS, 9, EOS, PAD], [EOS], [PAD], [PAD, PAD, PAD], [1, EOS, EOS], [9, EOS, 9]]
    sequences = [prompt + y for y in responses]
    found = losses.logprobs(net, data.pack(sequences), [len(prompt)] * len(responses))
    assert torch.allclose(found, one_at_a_time(net, sequences, [len(prompt)] * len(responses)), atol=1e-10)
    logs = net.head(net(torch.tensor([sequences[0]])))[0].log_softmax(-1)
    by_hand = logs[4, PAD] + logs[5, EOS] + logs[6, 9] + logs[7, EOS] + logs[8, PAD]
    assert torch.allclose(found[0], by_hand, atol=1e-10)
