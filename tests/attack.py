"""Not a test: hostile inputs, kills, signals, full disks, interruptions, drawn from seeds; what came of it.

    python tests/attack.py PLACE                 all of it: about 20 minutes of one core's time
    python tests/attack.py PLACE inputs 0 50     a part; what PLACE/results.jsonl has is not done again

    inputs    400  settings, data, model folders, paths, environment, an out_dir: one or two of them hostile
    kills      46  SIGKILL for either of two ranks at each of 23 places
    signals    20  TERM, INT, USR1, HUP, QUIT while loading, filling the reference cache, learning, saving
    disks       7  a disk that becomes full (PLACE/small, where a small one is mounted)
    configs   200  a valid configuration, interrupted and gone on with, against the same one in one piece

forks.py has what may come of a case. Here also: lost (what was there before, or other bits in the end).
"""
import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import forks  # noqa: E402
import model  # noqa: E402
import recipes  # noqa: E402
import tiny  # noqa: E402
import train  # noqa: E402
from forks import ended, finished, in_one_piece, settings, training, when  # noqa: E402
from support import cli, disk, ranks, reference_cache  # noqa: E402
from support.checkpoint import OutDir  # noqa: E402

# ------------------------------------------------------------------------------------------------------------
# Kinds: (place, a generator of random numbers, the case's number) -> verdict

CACHE, LOOP = reference_cache.ReferenceCache, "checkpoints recorded lock inputs clear append save write_state"
PLACES = [*((OutDir, name) for name in f"{LOOP} write_folder drop_old written_aside".split()),
          *((disk, name) for name in "sync put_in_place discard checksum keep_records start_folder".split()),
          (CACHE, "compute"), (CACHE, "write"), (model, "load"), (train.Trainer, "learn"),
          (train.Trainer, "evaluate"), (ranks.Ranks, "largest")]


def happens(place, name, owner, function, nth, act, size=2, out=None):
    """A training to which act([pid, …]) happens at the nth call of owner.function; then the same command."""
    out, said = out or place / name, place / f"{name}.said"
    came = training(settings(place, out), size, said,
                    lambda pids: when(owner, function, nth, lambda: act(pids)))
    (place / "small/filler").unlink(missing_ok=True)
    return ended(came, settings(place, out), size, said, in_one_piece(place, size))


def kills(place, rng, number):
    nth = rng.choice((1, 1, 2, 3))
    return happens(place, f"kill-{number}", *PLACES[number // 2], nth,
                   lambda pids: os.kill(pids[number % 2], signal.SIGKILL))


def signals(place, rng, number):
    where = ((model, "load"), (CACHE, "write"), (train.Trainer, "learn"), (OutDir, "save"))[number // 5]
    sign, nth, first = (15, 2, 10, 1, 3)[number % 5], rng.choice((1, 2)), rng.randrange(2)
    return happens(place, f"signal-{number}", *where, nth,
                   lambda pids: [os.kill(pid, sign) for pid in pids[first:]])


def disks(place, rng, number):
    small, out = place / "small", place / f"small/disk-{number}"
    function = ("clear", "append", "save", "write_state", "write_folder", "write", "keep_records")[number]
    owner, leave = {"write": CACHE, "keep_records": disk}.get(function, OutDir), rng.choice((0, 4096, 30_000))

    def fill(pids):
        free = os.statvfs(small)
        (small / "filler").write_bytes(bytes(max(free.f_bavail * free.f_frsize - leave, 0)))
    came = happens(place, out.name, owner, function, 1, fill, 1 + number % 2, out)
    shutil.rmtree(out, ignore_errors=True)
    return came


def configs(place, rng, number):
    recipe, size = rng.choice(list(recipes.RECIPES)), rng.choice((1, 2))
    out = place / f"config-{number}"
    draws = dict(steps=rng.randint(2, 5), batch_size=rng.randint(1, 6), micro_batch_size=rng.randint(1, 4),
                 optimizer=rng.choice(("adam", "adamw", "rmsprop")), lora_rank=rng.choice((0, 0, 2)),
                 dtype=rng.choice(("float64", "float32", "bfloat16")), seed=rng.randrange(100),
                 lr_schedule=rng.choice(("constant", "cosine")), save_every=rng.choice((0, 1, 2)),
                 eval_every=rng.choice((0, 1, 3)), keep=rng.choice((1, 2)), k=rng.choice((2, 3, 4)),
                 checkpoint_activations=rng.random() < 0.3, grad_clip=rng.choice((0.0, 0.1, 10.0)))
    whole, broken = (settings(place, f"{out}-{name}", recipe=recipe, **draws) for name in "ab")
    said = place / f"{out.name}.said"
    came = training(whole, size, said)
    for _ in range(rng.choice((1, 2)) if came == "ok" else 0):
        sign, nth, who = rng.choice((9, 15, 2, 10)), rng.randint(1, 3), rng.randrange(size)
        where = rng.choice(((OutDir, "save"), (train.Trainer, "update")))
        came = training(broken, size, said, lambda pids, where=where, nth=nth, sign=sign, who=who:
                        when(*where, nth, lambda: os.kill(pids[who], sign)))
        if came in ("hang", "traceback", "zero"):
            return came
    if finished(Path(f"{out}-a"), draws["steps"]):
        came = ended("ok", broken, size, said, Path(f"{out}-a"))
    for path in place.glob(f"{out.name}-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return came


# ------------------------------------------------------------------------------------------------------------
# Hostile inputs

VALUES = ["0", "-1", "1e300", "-1e300", "nan", "inf", "1e-320", "", "none", "x", "ü", ",", "true",
          "1000000000", "1" + "0" * 30, "0.5", "3,4", "/dev/null/x", "\n", "a:b", "--"]
STAY = ("steps", "epochs", "model", "data", "out_dir")              # what a case needs, so as to end
LINES = ["{", "[]", "null", '{"prompt": 3}', '{"prompt": "a", "chosen": "b", "rejected": "b"}', "\0",
         "[" * 10 ** 5, '{"prompt": "a", "chosen": "' + "b " * 10 ** 5 + '", "rejected": "c"}',
         '{"p": NaN, "prompt": "a"}', "\ud800"]


def harm(rng, path):
    """Damage a file, or put something else in its place."""
    content, how = path.read_bytes(), rng.randrange(8)
    at = rng.randrange(max(len(content), 1))
    if how < 3:
        path.write_bytes(content[:at] + bytes([rng.randrange(256)]) + content[at + 1:])
    elif how < 5:
        path.write_bytes(content[:at * (how - 3)])
    else:
        path.unlink()
        (path.mkdir, lambda: path.symlink_to(path), lambda: None)[how - 5]()


def bad_setting(rng, home, program, given, prepare):
    names = [name for name in cli.described(forks.PROGRAMS[program][1]) if name not in STAY]
    given[rng.choice(names)] = rng.choice(VALUES)


def bad_data(rng, home, program, given, prepare):
    file = home / "pairs.jsonl"
    rows = file.read_text().splitlines()[:3] * rng.randrange(2)
    rows += [rng.choice(LINES) for _ in range(rng.randrange(3))]
    file.write_text("\n".join(rows), errors="surrogatepass")
    if rng.random() < 0.3:
        harm(rng, file)
    elif rng.random() < 0.2:
        (home / "long.jsonl.gz").write_bytes(gzip.compress(b" " * (1 << 24), 1) * 128)      # a line of 2 GiB
        given["data"] = home / "long.jsonl.gz"


def bad_folder(rng, home, program, given, prepare):
    harm(rng, rng.choice(sorted((home / "model").iterdir())))


def bad_path(rng, home, program, given, prepare):
    (home / "loop").symlink_to(home / "loop")
    (home / "file").write_text("mine")
    given[rng.choice(("model", "data", "out_dir", "out", "reference_cache", "reference"))] = rng.choice(
        [home / "loop", home / ("x" * 300), f"{home}/\udcff", "/proc/1", "/dev/null", "/dev/full",
         home / "file", home / "file/below", home / "model/below", f"{home}/a\nb", "", home, "x/" * 3000,
         home / "nowhere"])


def bad_environment(rng, home, program, given, prepare):
    name = rng.choice("RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_PORT TORCHELASTIC_RESTART_COUNT "
                      "TORCHELASTIC_ERROR_FILE TMPDIR HOME PATH COLUMNS".split())
    value, limit = rng.choice(("", "x", "-1", "0", "5", "1e9")), rng.choice((4, 8, 16))
    prepare.append(rng.choice((
        lambda: os.environ.update({name: value}), lambda: os.environ.update({name: value}),
        lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000 * limit, 10_000 * limit)),
        lambda: (os.mkdir("gone"), os.chdir("gone"), os.rmdir("../gone")), lambda: os.umask(0o777),
        lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 1), lambda: os.close(0))))


def bad_out_dir(rng, home, program, given, prepare):
    shutil.copytree(home.parent / "whole-1", home / "out", symlinks=True)
    shutil.rmtree(home / "out/final")
    given |= {"steps": rng.choice((4, 6)), "resume": rng.choice(("auto", "force", "never"))}
    harm(rng, rng.choice([path for path in sorted((home / "out").rglob("*")) if path.is_file()]))


def inputs(place, rng, number):
    home, prepare = place / f"input-{number}", []
    in_one_piece(place, 1)
    shutil.copytree(place / "world", home)
    program = rng.choice(("train", "train", "train", "sample", "judge"))
    given = {"model": home / "model", "data": home / "pairs.jsonl"}
    if program == "train":
        given = settings(place, home / "out", recipe=rng.choice(list(recipes.RECIPES)), steps=2) | given
    elif program == "sample":
        given = {"model": home / "model", "prompts": home / "pairs.jsonl", "max_tokens": 4, "out": "ours"}
    kinds = rng.sample((bad_setting, bad_data, bad_folder, bad_path, bad_environment, bad_out_dir),
                       rng.choice((1, 2)))
    for kind in kinds:
        if program == "train" or kind is not bad_out_dir:
            kind(rng, home, program, given, prepare)
    said, files = place / f"{home.name}.said", [*home.glob("model/*"), *home.glob("pairs.jsonl")]
    before = {path: path.read_bytes() for path in files if path.is_file()}
    command = [f"--{name}={cli.typed(value)}" for name, value in given.items()]
    prepare.insert(0, lambda: os.chdir(home))
    codes = forks.wait([forks.fork(program, command, said, {}, lambda: [act() for act in prepare])])
    came = forks.verdict(codes, said)
    with open(said, "a", errors="replace") as file:
        file.write(f"{program} {command} -> {codes}\n")
    if any(not path.exists() or path.read_bytes() != content for path, content in before.items()):
        came = "lost: an input"
    lines = None if bad_out_dir in kinds else int(given.get("steps", 0))       # metrics.jsonl may be damaged
    usual = program == "train" and "--dry_run=true" not in command and str(given["out_dir"]) == f"{home}/out"
    if came == "ok" and usual and not finished(home / "out", lines):
        came = "zero"
    shutil.rmtree(home)
    return came


KINDS = {"inputs": (inputs, 400), "kills": (kills, 46), "signals": (signals, 20), "disks": (disks, 7),
         "configs": (configs, 200)}


def attack(place, kind, first, stop):
    """{what came of it: how often} of the cases of a kind."""
    if not (place / "world").exists():
        (place / "world").mkdir(parents=True)
        tiny.world(place / "world")
    results, counts = place / "results.jsonl", Counter()
    results.touch()
    done = {(row["kind"], row["number"]): row["came"] for row in map(json.loads, open(results))}
    for number in range(first, stop):
        came = done.get((kind, number))
        if came is None:
            came = KINDS[kind][0](place, random.Random(f"{kind} {number}"), number)
            with open(results, "a") as file:
                file.write(json.dumps({"kind": kind, "number": number, "came": came}) + "\n")
        counts[came] += 1
        if came not in ("ok", "handled"):
            print(kind, number, came, flush=True)
    return counts


def main(place, kind=None, first=0, stop=None):
    place = Path(place).resolve()
    for name in [kind] if kind else KINDS:
        if name == "disks" and not os.path.ismount(place / "small"):
            (place / "small").mkdir(parents=True, exist_ok=True)
            script = f"mount -t tmpfs -o size=6m none '{place}/small' && exec '{sys.executable}' '{__file__}'"
            subprocess.run(["unshare", "-rm", "sh", "-c", f"{script} '{place}' disks"])
        else:
            print(name, attack(place, name, int(first), int(stop or KINDS[name][1])), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
