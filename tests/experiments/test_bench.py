"""bench.py: both sides of a row compute the same (transformers is the oracle), and they take turns fairly."""
import contextlib
import statistics
import time

import pytest
import torch

import data
from experiments import bench
from support.cli import InputError
from support.rows import read_rows
from support.tokenizer import load_tokenizer

SMALL = dict(width=32, layers=2, heads=2, ffn=64, batch_size=4, micro_batch_size=2, k=3, max_tokens=12,
             rounds=1, peer_micro_batch_sizes=[4])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Settings of a small model, and the folder in which it was made ready."""
    settings, folder = bench.Settings(**SMALL), tmp_path_factory.mktemp("bench")
    bench.prepare(settings, folder)
    return settings, folder


class FirstWord:
    """Stands for Turns: takes a side's facts and sends it home."""

    def say(self, **facts):
        self.facts = facts
        raise bench.Done

    @classmethod
    def of(cls, side, settings, folder, **more):
        heard = cls()
        heard.name = side.__name__
        with contextlib.suppress(bench.Done):
            side(settings, folder, "cpu", heard, **more)
        return heard


def test_made_up_work(work):
    """32,000 ids, text that comes back whole, and HH-RLHF's lengths: a median prompt of 110 tokens or so."""
    _, folder = work
    tokenizer = load_tokenizer(folder / "model")
    assert tokenizer.vocab_size == 32000
    rows, _ = read_rows(folder / "pairs.jsonl", "pairs")
    for row in rows[:20]:
        assert tokenizer.decode(tokenizer.encode(row.chosen)) == row.chosen
    pairs, _ = data.encode_dataset(tokenizer, rows, data.chat_of(tokenizer, "hh"), 512, 256)
    assert 80 < statistics.median(len(pair.x) for pair in pairs) < 150
    assert 30 < statistics.median(len(pair.chosen) for pair in pairs) < 65
    assert 20 < statistics.median(len(pair.rejected) for pair in pairs) < 50


def test_sampling_is_what_transformers_generates(work):
    ours = FirstWord.of(bench.our_sampling, *work)
    peer = FirstWord.of(bench.peer_sampling, *work, prompts=ours.facts["prompts"])
    assert ours.facts["check"] == peer.facts["check"] and ours.facts["amount"] == 4 * 3 * 12


@pytest.mark.parametrize("logits_to_keep", [0, 1])
def test_judging_is_what_transformers_says(work, logits_to_keep):
    """K = 3: 2·(3 + 1) = 8 instructions a prompt."""
    ours = FirstWord.of(bench.our_judging, *work)
    peer = FirstWord.of(bench.peer_judging, *work, asked=ours.facts["asked"], logits_to_keep=logits_to_keep)
    bench.agree(ours, peer, tolerance=1e-5)
    assert ours.facts["amount"] == len(peer.facts["check"]["P(A)"]) == 4 * 8


def test_sft_is_what_transformers_trains_on(work):
    ours = FirstWord.of(bench.our_sft, *work)
    peer = FirstWord.of(bench.peer_sft, *work, micro=4, batches=ours.facts["batches"])
    bench.agree(ours, peer, tolerance=1e-5)


@pytest.mark.parametrize("side, more", [(bench.our_pairs, dict(recipe="sr-dpo")), (bench.our_online, {})])
def test_our_sides_step(work, side, more, monkeypatch):
    """The sides whose peers are not installed here: a step of each."""
    monkeypatch.setattr(bench.judge, "ranking_passes", bench.judge.ranking_passes)     # it is replaced

    class OneStep(FirstWord):
        def say(self, **facts):
            self.facts = facts

        def __enter__(self):
            if hasattr(self, "stepped"):
                raise bench.Done
            self.stepped = True

        def __exit__(self, *problem):
            pass
    assert OneStep.of(side, *work, **more).stepped


def test_sides_that_disagree_are_not_timed(work):
    ours, peer = FirstWord(), FirstWord()
    ours.name, ours.facts = "ours", {"check": {"P(A)": [0.5, 0.4]}}
    peer.name, peer.facts = "theirs", {"check": {"P(A)": [0.5, 0.41]}}
    with pytest.raises(InputError, match=r"ours and theirs disagree on P\(A\)"):
        bench.agree(ours, peer, 1e-3)
    peer.facts["check"]["P(A)"] = [0.5]
    with pytest.raises(InputError, match="disagree"):
        bench.agree(ours, peer, 1e-3)
    peer.facts["check"]["P(A)"] = [0.5, 0.4005]
    bench.agree(ours, peer, 1e-3)


def noted(settings, folder, device, turns, letter, size):
    """A side that writes down when it begins and ends, and takes some memory."""
    turns.say(check={})
    while True:
        with turns, open(folder / "turns", "a") as file:
            print(letter, file=file, flush=True)
            torch.ones(size).sum()
            time.sleep(0.02)
            print(letter, file=file, flush=True)


def test_sides_take_turns(tmp_path):
    """Never two at once (each name stands twice in a row: it began and ended); who is first changes from
    round to round after the one that warms up; and b holds 40 MB more than a."""
    sides = [bench.Side(name, noted, bench.Settings(**SMALL), tmp_path, letter=name, size=size)
             for name, size in (("a", 1), ("b", 10 ** 7))]
    bench.alternate(sides, 3)
    assert "".join((tmp_path / "turns").read_text().split()) == "aabb" + "aabb" + "bbaa" + "aabb"
    assert [len(side.seconds) for side in sides] == [3, 3]
    assert sides[1].peak - sides[0].peak > 20_000_000
    figures = bench.Line("a / b", *sides, units=2, unit="steps").figures()
    assert figures["ratio"] == sides[1].median / sides[0].median and figures["rate"] == 2 / sides[0].median


def test_a_side_that_fails_is_named(tmp_path):
    with pytest.raises(InputError, match="unlucky ended early"):
        bench.Side("unlucky", bench.our_sampling, bench.Settings(**SMALL), tmp_path)       # no model there


@pytest.mark.parametrize("changes, word", [
    (dict(rows=["dpo", "tpo"]), "tpo"), (dict(dtype="int8"), "--dtype=int8"),
    (dict(peer_micro_batch_sizes=[3]), "divisors"), (dict(rounds=0), "--rounds=0")])
def test_bad_settings_are_named(changes, word):
    with pytest.raises(InputError, match=word):
        bench.Settings(**changes)
