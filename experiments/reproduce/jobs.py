"""Jobs, each once: side by side in processes of their own, each after those it needs, and kept on disk when
done."""
import contextlib
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import torch

from experiments import toy
from support import cli, ranks
from support.cli import InputError


def cores(workers):
    """The number of workers that was asked for, or one per core."""
    return workers or os.cpu_count() or 1


def is_there(path, about):
    """Whether a file says that its folder holds what is asked for; InputError where it says something
    else."""
    held = cli.read_json(path, absent={})
    changed = [key for key in about if held and held.get(key) != about[key]]
    if changed:
        raise InputError(f"{path.parent} holds another run ({', '.join(changed)} differ); use another "
                         f"--out_dir, or delete that folder.")
    return bool(held)


def carry(place, about, make):
    """make() -> {name: array}, once: in place/measured.npz, beside what it is `about`, with what it prints in
    log.txt.

    Returns the seconds that it took, 0 where it was there already; InputError where the folder holds
    something else.
    """
    started = time.time()
    is_there(place / "run.json", about)
    if (place / "measured.npz").exists():
        return 0.0
    place.mkdir(parents=True, exist_ok=True)
    toy.write_json(place / "run.json", about)
    try:
        with open(place / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            arrays = make()
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    with open(place / "measured.part", "wb") as file:
        np.savez(file, **arrays)
    os.replace(place / "measured.part", place / "measured.npz")        # whole or not at all
    return time.time() - started


def start_worker(parent):
    """A worker leaves Ctrl-C to its parent, unless a run is under way, which then saves; it ends when the
    parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    cli.keep_freed_memory()
    ranks.leave_with(parent)


def in_turn(jobs, work):
    """The jobs one after the other in this process, in one thread as a worker has: another number rounds
    differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for label, (_, arguments) in jobs.items():
            yield label, work(*arguments)
    finally:
        torch.set_num_threads(threads)


def side_by_side(jobs, work, workers):
    """As many jobs at a time as there are workers, each as soon as what it needs is done, in the order they
    finish.

    Ctrl-C or SIGTERM: the runs under way save and stop.
    """
    waiting, done, under_way = dict(jobs), set(), {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, start_worker, (os.getpid(),)) as pool:
        try:
            while waiting or under_way:
                for label in [label for label, (needs, _) in waiting.items() if done.issuperset(needs)]:
                    if len(under_way) < workers:
                        under_way[pool.submit(work, *waiting.pop(label)[1])] = label
                finished, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in finished:
                    label = under_way[future]
                    seconds = future.result()
                    done.add(under_way.pop(future))
                    yield label, seconds
        except BrokenProcessPool:
            raise InputError(f"one of {'; '.join(under_way.values())} was killed (for want of memory?); the "
                             f"same command goes on from what is there.") from None
        finally:
            for child in multiprocessing.active_children() if under_way else []:
                child.terminate()


def interrupt(number, frame):
    raise KeyboardInterrupt


def carry_out(jobs, work, workers):
    """work(*arguments) for each of the jobs {label: (labels that it needs, arguments)}, each after those that
    it needs.

    It returns the seconds that it took, and a line is printed unless they are 0. Ctrl-C or SIGTERM ends this
    process with 130.
    """
    started = time.time()
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    ended = in_turn(jobs, work) if workers == 1 else side_by_side(jobs, work, workers)
    try:
        for number, (label, seconds) in enumerate(ended, 1):
            if seconds:
                clock = cli.duration(time.time() - started)
                print(f"{number}/{len(jobs)} [{clock}] {label}: {seconds:.0f} s", flush=True)
    except (KeyboardInterrupt, SystemExit):           # a Trainer that was asked to stop leaves by SystemExit
        print("stopped; the same command goes on from there.", flush=True)
        sys.exit(130)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
