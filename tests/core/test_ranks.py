"""One trajectory however many ranks share it: the same losses, weights and checkpoints on 1, 2, 3 and 2 × 2.

All trainings of a number of ranks run one after the other in one group of processes (driver.py); the checks
below read what they left. The figures are compared with all their digits.
"""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import driver
import model
import tiny
from tiny import assert_close, assert_same_run, final, last_checkpoint, metrics

pytestmark = pytest.mark.processes

# name: (settings, on how many ranks). All of them run on one rank too. Where the epoch of 13 rows is not cut
# short by `steps`, its last batch has one row, so that one rank works and the others have none.
RUNS = {
    "dpo": (dict(recipe="dpo", steps=8), (2, 3)),
    "dpo in float32": (dict(recipe="dpo", steps=6, dtype="float32"), (2,)),
    "osp": (dict(recipe="osp", steps=8), (2,)),
    "osp in float32": (dict(recipe="osp", steps=4, dtype="float32"), (2,)),
    "osp, an epoch": (dict(recipe="osp", eval_data=["{world}/few.jsonl"], eval_every=2), (2, 3)),
    "sr-dpo, an epoch": (dict(recipe="sr-dpo", model="{world}/neox", optimizer="adam",
                              eval_data=["{world}/few.jsonl"]), (2, 3)),
    "sr-dpo with a cache": (dict(recipe="sr-dpo", reference="{world}/other", reference_cache="{out}-cache",
                                 eval_data=["{world}/pairs.jsonl"]), (3,)),
    "one row a step": (dict(recipe="sr-ipo", batch_size=1, steps=3), (3,)),
    "sft": (dict(recipe="sft", model="{world}/narrow", optimizer="adamw", weight_decay=0.1), (2, 3)),
    "judge": (dict(recipe="judge", model="{world}/neox-tied", steps=3), (2,)),
    "osp, tied": (dict(recipe="osp", model="{world}/narrow", batch_size=2, steps=3), (3,)),
    "lora": (dict(recipe="sr-dpo", lora_rank=4, optimizer="adam"), (2, 3)),
    "lora, neox": (dict(recipe="dpo", model="{world}/neox", lora_rank=2, checkpoint_activations=True), (2,)),
    "lora, online": (dict(recipe="osp", lora_rank=4, lr=1e-2, steps=3, checkpoint_activations=True), (3,)),
    "recomputed": (dict(recipe="dpo", model="{world}/mistral", checkpoint_activations=True, steps=4), (2,)),
    "replicas": (dict(recipe="dpo", replicas=2, steps=4), (4,)),
    "replicas, an epoch": (dict(recipe="osp", model="{world}/narrow", replicas=2), (2, 4)),
    "replicas, lora": (dict(recipe="sr-dpo", lora_rank=4, replicas=2, steps=3), (2,)),
}
LONG = dict(steps=8, save_every=2, lr_schedule="linear")
RESUMED = {
    "full": dict(LONG, recipe="osp", model="{world}/narrow", optimizer="adam"),
    "lora": dict(LONG, recipe="sr-dpo", model="{world}/neox", lora_rank=4, optimizer="rmsprop",
                 checkpoint_activations=True),
}
BEFORE = {2: 1, 3: 2, 4: 2, 1: 3}              # ranks: on how many the run began that they resume
MICRO = {1: 8, 2: 1, 3: 2, 4: 1}               # one global batch as ranks × accumulation
WRONG = {                                      # what bad input must say; no rank waits for the others
    "shape": (dict(model="{world}/misshapen"), "has shape"),
    "missing": (dict(reference="{world}/halved"), "lacks the tensor"),
    "replicas": (dict(replicas=4), "--replicas=4"),
    "file": (dict(data=["{world}/nowhere.jsonl"]), "nowhere.jsonl"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Sharp models, so that strengths lie apart: where two are equal up to rounding, ranks may order them
    differently, and that is no error. The vocabulary of 421 cannot be split in halves or thirds; the narrow
    model has 4 keys, of which a third rank gets none."""
    path = tmp_path_factory.mktemp("world")
    narrow = dict(num_key_value_heads=1, head_dim=4, tie_word_embeddings=True)
    for name, family, changes in (("model", "llama", {}), ("other", "llama", dict(seed=1)),
                                  ("neox", "neox", {}), ("neox-tied", "neox", dict(tie_word_embeddings=True)),
                                  ("mistral", "mistral", {}), ("narrow", "llama", narrow),
                                  ("misshapen", "llama", {}), ("halved", "llama", {})):
        tiny.folder(path / name, family, scale=1.0, vocab_size=421, **changes)

    def edit(name, change):
        weights = load_file(path / name / "model.safetensors")
        change(weights)
        save_file(weights, path / name / "model.safetensors")
    # A louder end of text, sure in some contexts and out of question in others: samples differ in length.
    edit("model", lambda weights: weights["lm_head.weight"][2].mul_(10))
    edit("misshapen", lambda weights: weights.update({"model.norm.weight": torch.ones(33)}))
    edit("halved", lambda weights: [weights.pop(name) for name in sorted(weights)[::2]])
    tiny.write_jsonl(path / "pairs.jsonl", tiny.pairs(13, seed=1))
    tiny.write_jsonl(path / "few.jsonl", tiny.pairs(4, seed=2))
    return path


def plan(world, base, ranks, again=False):
    """What the driver runs on so many ranks: short float64 trainings whose steps are large enough to see.

    again: what goes on from trainings of more ranks.
    """
    entries = []

    def add(name, changes, **more):
        out = base / f"{name}-{ranks}"
        given = tiny.settings(world, out, **{"steps": None, "micro_batch_size": MICRO[ranks], **changes})
        text = json.dumps(given).replace("{world}", str(world)).replace("{out}", str(out))
        entries.append({"settings": json.loads(text), "exact": True, **more})
    for name, changes in RESUMED.items():
        if ranks > 1 or again:
            add(f"other {name}", changes | {"replicas": 2 if ranks == 4 else 1},
                **{"from": str(base / f"cut {name}-{BEFORE[ranks]}")})
        if ranks < 4 and not again:
            add(f"whole {name}", changes)
            add(f"cut {name}", changes, faults={"interrupt": 6})            # saved after step 4
            add(f"same {name}", changes, **{"from": str(base / f"cut {name}-{ranks}")})
    if again:
        return entries
    for name, (changes, sizes) in RUNS.items():
        if ranks == 1:
            add(name, {k: v for k, v in changes.items() if k not in ("replicas", "checkpoint_activations")})
        elif ranks in sizes:
            add(name, changes)
    if ranks < 4:
        add("half", dict(recipe="dpo", lora_rank=4, dtype="bfloat16", steps=3, lr=1e-4))
    if ranks == 2:
        add("kept", RUNS["recomputed"][0] | {"checkpoint_activations": False})
    if ranks in (2, 3):
        add("at a time", dict(recipe="osp", steps=2), faults={"at_a_time": [9, 1, 1]})
        for name, (changes, _) in WRONG.items():
            add(f"wrong {name}", dict(recipe="dpo", **changes))
    return entries


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    """All trainings -> place(name, ranks), their out_dir."""
    base = tmp_path_factory.mktemp("runs")
    for ranks, again in ((1, False), (2, False), (3, False), (4, False), (1, True)):
        driver.launch(plan(world, base, ranks, again), ranks, base / f"plan-{ranks}.json")
    return lambda name, ranks: base / f"{name}-{ranks}"


def reports(out, ranks):
    return [json.loads(Path(f"{out}.rank{rank}.json").read_text()) for rank in range(ranks)]


# ------------------------------------------------------------------------------------------------------------
# One trajectory

@pytest.mark.parametrize("name, ranks", [(name, n) for name, (_, sizes) in RUNS.items() for n in sizes])
def test_ranks_follow_one(name, ranks, done):
    """Every figure of every step, the final weights and the optimizer: 1e-10 in float64, 1e-4 in float32."""
    assert_same_run(done(name, 1), done(name, ranks), 1e-4 if "float32" in name else 1e-10)
    assert len({row["loss"] for row in metrics(done(name, 1)) if "loss" in row}) > 1


@pytest.mark.parametrize("ranks", [2, 3])
def test_rollouts_of_the_ranks_are_those_of_one(ranks, done):
    """Together, and in files of their own; their strengths to six digits."""
    rows = {}
    for n in (1, ranks):
        files = sorted(done("osp, an epoch", n).glob("rollouts*.jsonl"))
        assert len(files) == n
        rows[n] = sorted((json.loads(line) for file in files for line in file.read_text().splitlines()),
                         key=lambda row: (row["step"], row["prompt"], row["chosen"], row["rejected"]))
    assert len(rows[1]) == 13 * 2
    for a, b in zip(rows[1], rows[ranks], strict=True):
        assert a == b | {"p": pytest.approx(a["p"], abs=2e-6)}


def test_ranks_end_sampling_at_different_steps(done):
    """What the runs above went through: some rank is done with a batch while another still samples."""
    lengths = [[max(sizes) for sizes in report["lengths"]] for report in reports(done("osp", 2), 2)]
    assert len(lengths[0]) == 8 and sum(a != b for a, b in zip(*lengths)) >= 3


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_may_sample_in_different_rounds(ranks, done):
    """How many prompts a rank samples together is its own affair: the first takes all, the others one."""
    assert_close(metrics(done("at a time", ranks))[1], metrics(done("osp", 1))[1], 1e-10)


def test_recomputing_changes_no_bit(done):
    """With sharded weights and a sliding window."""
    assert_same_run(done("recomputed", 2), done("kept", 2), 0)


@pytest.mark.parametrize("ranks", [2, 3])
def test_half_precision_with_adapters(ranks, done):
    """A frozen bfloat16 base and float32 adapters in one sharded group stay near one rank's figures."""
    for a, b in zip(metrics(done("half", 1)), metrics(done("half", ranks)), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=0.05)
        assert a["chosen_logp"] == pytest.approx(b["chosen_logp"], rel=0.02)
    _, saved = last_checkpoint(done("half", ranks))
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert {tensor.dtype for tensor in final(done("half", ranks)).values()} == {torch.float32}


# ------------------------------------------------------------------------------------------------------------
# Resume

@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", RESUMED)
def test_resumed_on_as_many_ranks(name, ranks, done):
    """Interrupted after step 5 of 8 and gone on with from step 4: the bits of the uninterrupted run."""
    cut = done(f"cut {name}", ranks)
    assert last_checkpoint(cut)[0] == 4 and len(metrics(cut)) == 5
    assert_same_run(done(f"whole {name}", ranks), done(f"same {name}", ranks), 0)


@pytest.mark.parametrize("ranks", BEFORE)
@pytest.mark.parametrize("name", RESUMED)
def test_resumed_on_another_number_of_ranks(name, ranks, done):
    """1 → 2, 2 → 3, 2 → 2 × 2 and 3 → 1: four steps later all is as on one rank, never interrupted."""
    assert_same_run(done(f"whole {name}", 1), done(f"other {name}", ranks), 1e-10)
    assert json.loads((done(f"other {name}", ranks) / "config.json").read_text())["ranks"] == ranks


# ------------------------------------------------------------------------------------------------------------
# Who holds what

@pytest.mark.parametrize("name, ranks", [("dpo", 2), ("dpo", 3), ("sr-dpo, an epoch", 3), ("sft", 3),
                                         ("lora", 2), ("lora", 3), ("replicas", 4)])
def test_each_rank_reads_and_keeps_its_own_rows(name, ranks, done):
    """Together they are all rows, and no rank asks the file for another's: of a vocabulary of 421, of norms,
    of 4 keys on 3 ranks, of which the last gets none. Under replicas each half is read once per replica."""
    changes, said = RUNS[name][0], reports(done(name, ranks), ranks)
    shards = ranks // changes.get("replicas", 1)
    shapes = {tensor: list(weight.shape) for tensor, weight in final(done(name, ranks)).items()}
    again = [] if changes["recipe"] == "sft" or "lora_rank" in changes else [1]       # for the reference
    assert said[0]["read"].keys() == shapes.keys()
    for tensor, shape in shapes.items():
        for copy in range(0, ranks, shards):
            at = 0
            for report in said[copy:copy + shards]:
                (start, stop), *more = spans = report["read"][tensor]
                assert start == at and more == [[start, stop] for _ in again], (tensor, spans)
                at = stop
            assert at == shape[0]
    config = model.read_config(done(name, ranks) / "final")
    for ours in said[0]["kept"]:
        kept = [report["kept"][ours] for report in said]
        if "lora_" in ours:
            whole = list(last_checkpoint(done(name, ranks))[1][f"policy.{ours}"].shape)
        else:
            whole = shapes[model.file_name(config, ours)]
            spans = [report["read"][model.file_name(config, ours)][0] for report in said]
            assert [shape[0] for shape in kept] == [stop - start for start, stop in spans]
        assert sum(shape[0] for shape in kept) == whole[0] * ranks // shards
        assert all(shape[1:] == whole[1:] for shape in kept)


def test_some_rank_keeps_nothing(done):
    """The cases above are what they are said to be."""
    for run, name, rows in (("sft", "blocks.0.attention.k.weight", [2, 2, 0]),
                            ("lora", "blocks.0.mlp.up.lora_a", [2, 2, 0]),
                            ("dpo", "embed.weight", [141, 141, 139])):
        assert [report["kept"][name] for report in reports(done(run, 3), 3)] == [[n, 32] for n in rows]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", WRONG)
def test_bad_input_ends_every_rank_in_one_sentence(name, ranks, done):
    """None hangs: the trainings after it ran in the same group."""
    for report in reports(done(f"wrong {name}", ranks), ranks):
        assert WRONG[name][1] in report["error"] and "\n" not in report["error"]
    assert not done(f"wrong {name}", ranks).exists()
