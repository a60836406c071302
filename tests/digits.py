"""The digits of every recipe, recorded before a change and compared after it.

    python tests/digits.py record OLD.json --root=CHECKOUT --inputs=DIR    all scenarios of some checkout
    python tests/digits.py record NEW.json --inputs=DIR --only=dpo,osp     two scenarios of this one
    python tests/digits.py compare OLD.json NEW.json                       equal, or where they first differ

A recording starts the command lines that a user types, in processes of their own: a few steps of tiny
batches in float32 on one thread, with evaluations and checkpoints in between, for two families, on one rank
and on two. It keeps metrics.jsonl without the times, rollouts.jsonl and a digest of each tensor in final/.
On one machine the same code gives the same recording. On another one, or with another torch, the last digits
differ.

The models and data in --inputs are made where that folder does not exist yet, with the tests/tiny.py of
--root. Both sides of a comparison must read the same ones. Left out: resuming, the embedded world,
accelerators.
"""

import argparse
import concurrent.futures
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FAMILIES = ("llama", "neox")
BASICS = (
    "--model={inputs}/{family} --data={inputs}/pairs.jsonl --eval_data={inputs}/held_out.jsonl "
    "--out_dir={out} --steps=4 --batch_size=4 --micro_batch_size=2 --lr=1e-4 --max_length=256 --eval_every=2 "
    "--save_every=3 --dtype=float32 --device=cpu"
)
ONLINE = "--max_tokens=12 --k=4"

OFFLINE = ("sft", "judge", "dpo", "ipo", "sr-dpo", "sr-ipo", "offline-soft")
SAMPLED = (
    "osp",
    "osp-dpo",
    "osp-ipo",
    "sr-spce",
    "random-pairs",
    "self-rewarding",
    "raft",
    "sft-sampling",
    "rso",
)

# name -> (recipe, further options); the names of recipes alone come first
SCENARIOS = {
    **{name: (name, "") for name in OFFLINE},
    **{name: (name, ONLINE) for name in SAMPLED},
    "spin": ("spin", "--max_tokens=12 --k=2 --iterations=2"),
    "reward": ("reward", "--shift_samples=6"),
    "rlhf": ("rlhf", "--max_tokens=12 --k=2 --ppo_epochs=2 --reward={inputs}/reward-{family}"),
    "sft-checkpointed": ("sft", "--checkpoint_activations"),
    "dpo-adamw": ("dpo", "--optimizer=adamw --weight_decay=0.1 --lr_schedule=cosine --warmup_steps=1"),
    "dpo-replicas": ("dpo", "--replicas={ranks}"),
    "sr-dpo-cache": ("sr-dpo", "--reference_cache={out}/cache"),
    "sr-ipo-exact": ("sr-ipo", "--delta_scale=exact"),
    "offline-soft-judge": ("offline-soft", "--judge={inputs}/judge-{family}"),
    "osp-judge": ("osp", ONLINE + " --judge={inputs}/judge-{family} --reference={inputs}/judge-{family}"),
    "osp-lora": ("osp", ONLINE + " --lora_rank=4 --lora_alpha=8"),
    # no multiple of the ranks; an odd K
    "osp-three": ("osp", ONLINE + " --k=5 --batch_size=3"),
}

# ------------------------------------------------------------------------------------------------------------
# Recording

MAKE_INPUTS = """
import sys
from pathlib import Path
root, inputs = sys.argv[1:]
sys.path[:0] = [root, root + "/tests", root + "/tests/helpers"]
import tiny
for family in {families}:
    tiny.folder(Path(inputs, family), family)
    tiny.folder(Path(inputs, "judge-" + family), family, seed=1, scale=1.0)
tiny.write_jsonl(Path(inputs, "pairs.jsonl"), tiny.pairs(24))
tiny.write_jsonl(Path(inputs, "held_out.jsonl"), tiny.pairs(5, seed=1))
"""


def make_inputs(root, inputs):
    """Models, reward models and data, in a folder that appears only when all of it is there."""
    inputs.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=inputs.parent) as scratch:
        made = Path(scratch, "inputs")
        made.mkdir()
        code = MAKE_INPUTS.format(families=FAMILIES)
        subprocess.run([sys.executable, "-c", code, root, made], check=True, cwd=root)
        for family in FAMILIES:
            out = Path(scratch, family)
            failed = train(root, made, out, "reward", family, 1)
            if failed:
                raise SystemExit(f"no reward model could be made:\n{failed}")
            shutil.copytree(out / "final", made / f"reward-{family}")
        made.rename(inputs)


def command(root, inputs, out, name, family, ranks):
    """The command line of one run, started in `root`."""
    recipe, options = SCENARIOS[name]
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    if recipe not in ("reward", "rlhf"):
        start.append("train.py")
    else:
        start += ["rlhf.py"] if (root / "rlhf.py").exists() else ["-m", "experiments.rlhf"]
    options = f"{BASICS} {options}".format(inputs=inputs, family=family, ranks=ranks, out=out).split()
    table = root / "recipes.py"
    if table.exists() and "judge_anyway" in table.read_text():      # what 0.2 has beyond the digits
        options += ["--judge_anyway", "--show_prompts=0"]
    # A scenario overrides what BASICS says.
    last = {option.partition("=")[0]: option for option in options}
    return [*start, f"--recipe={recipe}", *last.values()]


def train(root, inputs, out, name, family, ranks, seconds=300):
    """Run it to the end; why it failed, or nothing."""
    ours = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "PYTHONPATH")
    }
    process = subprocess.Popen(
        command(root, inputs, out, name, family, ranks),
        cwd=root,
        env=ours | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return f"no end after {seconds} seconds; {process.communicate()[0][-1000:]}"
    if process.returncode == 0:
        return ""
    reasons = [line for line in said.splitlines() if line.startswith("error:") or "Error: " in line]
    return reasons[0] if reasons else said[-1000:] or f"exit status {process.returncode}"


def digest(data):
    return hashlib.sha256(data).hexdigest()[:32]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_run(out):
    """What is kept of a run's folder; of the weights the file's digest, and each tensor's with its norm."""
    from safetensors.torch import load_file

    metrics = {}
    # An evaluation may have a line of its own.
    for row in read_lines(out / "metrics.jsonl"):
        kept = {key: row[key] for key in row if not key.endswith(("_seconds", "tokens_per_second"))}
        metrics.setdefault(str(row["step"]), {}).update(kept)
    weights = out / "final" / "model.safetensors"
    tensors = {
        key: [digest(tensor.numpy().tobytes()), float(tensor.double().norm())]
        for key, tensor in sorted(load_file(weights).items())
    }
    return {
        "metrics": metrics,
        "rollouts": read_lines(out / "rollouts.jsonl"),
        "tensors": tensors,
        "file": digest(weights.read_bytes()),
    }


def record(path, root, inputs, names):
    """Every run of these scenarios into the JSON file `path`, two processes at a time -> failures."""
    if not inputs.exists():
        make_inputs(root, inputs)
    files = sorted(file for file in inputs.rglob("*") if file.is_file())
    found = {"inputs": digest(b"".join(file.read_bytes() for file in files)), "runs": {}}

    def one(name, family, ranks):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch, "run")
            failed = train(root, inputs, out, name, family, ranks)
            run = {"error": failed} if failed else read_run(out)
        label = f"{name} {family} {ranks}"
        print(f"{label:28} {failed or 'done'}, {time.monotonic() - started:.0f} s", flush=True)
        return label, run

    for ranks in (1, 2):
        with concurrent.futures.ThreadPoolExecutor(2 // ranks) as pool:
            jobs = [pool.submit(one, name, family, ranks) for name in names for family in FAMILIES]
            try:
                for job in concurrent.futures.as_completed(jobs):
                    found["runs"].update([job.result()])
                    path.write_text(json.dumps(found, indent=1))
            finally:
                # Ctrl-C waits for the runs under way, not for all of them.
                pool.shutdown(cancel_futures=True)
    return sum("error" in run for run in found["runs"].values())


# ------------------------------------------------------------------------------------------------------------
# Comparing


def relative(old, new):
    """How far two values are apart, of a tensor its norms; infinity where they are no numbers."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = old[-1], new[-1]
    if not all(isinstance(value, (int, float)) for value in (old, new)):
        return math.inf
    return abs(new - old) / (max(abs(old), abs(new)) or 1)


def figures(run):
    """[(where, value)] of one run, in the order in which a difference would show."""
    return [
        *(
            (f"step {step} {key}", value)
            for step in sorted(run["metrics"], key=int)
            for key, value in sorted(run["metrics"][step].items())
        ),
        *(
            (f"rollout {i} {key}", value)
            for i, row in enumerate(run["rollouts"])
            for key, value in sorted(row.items())
        ),
        *((f"final {key}", value) for key, value in run["tensors"].items()),
    ]


def differences(old, new):
    """[(where, old value, new value)] of two runs; what only one of them has is None in the other."""
    before, after = dict(figures(old)), dict(figures(new))
    return [
        (where, before.get(where), after.get(where))
        for where in before | after
        if before.get(where) != after.get(where)
    ]


def describe(old, new):
    """One line on two runs."""
    for side, run in (("old", old), ("new", new)):
        if "error" in run:
            return f"the {side} run FAILED: {run['error']:.300}"
    found = differences(old, new)
    if not found:
        return (
            "equal" if old["file"] == new["file"] else "equal; only the layout of model.safetensors differs"
        )
    where, before, after = found[0]
    sizes = {one[0]: relative(*one[1:]) for one in found}
    largest = max((one for one in sizes if sizes[one] < math.inf), key=sizes.get, default=where)
    keys = list(dict.fromkeys(one.split()[-1] for one in sizes))
    return (
        f"DIFFERS at {where}: {before!s:.60} -> {after!s:.60}, by {sizes[where]:.1e}; most at {largest}, by "
        f"{sizes[largest]:.1e}; {len(found)} values, of {', '.join(keys[:8])}{', …' * (len(keys) > 8)}"
    )


def compare(old, new):
    """Print a line on each run that both recordings have; the number of runs that differ."""
    if old["inputs"] != new["inputs"]:
        print("The two recordings read different --inputs: do not expect equal digits.")
    common = [name for name in old["runs"] if name in new["runs"]]
    lines = {name: describe(old["runs"][name], new["runs"][name]) for name in common}
    for name, line in lines.items():
        print(f"{name:28} {line}")
    differ = sum(not line.startswith("equal") for line in lines.values())
    print(
        f"{len(common)} runs compared, {differ} of them differ; in one recording only: "
        f"{len(old['runs'].keys() ^ new['runs'].keys())}."
    )
    return differ


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run all scenarios and write their digits")
    recording.add_argument("out", type=Path, metavar="OUT.json")
    recording.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the checkout to run")
    recording.add_argument(
        "--inputs", type=Path, required=True, help="models and data; made if there are none"
    )
    recording.add_argument("--only", default=",".join(SCENARIOS), help="scenarios, comma-separated")
    comparing = commands.add_parser("compare", help="say where two recordings differ")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    given = parser.parse_args()
    if given.command == "compare":
        sys.exit(compare(*(json.loads(path.read_text()) for path in (given.old, given.new))) > 0)
    unknown = [name for name in given.only.split(",") if name not in SCENARIOS]
    if unknown:
        parser.error(f"--only: no scenario {', '.join(unknown)}; there are {', '.join(SCENARIOS)}.")
    sys.exit(record(given.out, given.root.resolve(), given.inputs.resolve(), given.only.split(",")) > 0)


if __name__ == "__main__":
    main()
