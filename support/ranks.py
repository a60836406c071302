"""The processes of a run: what they agree on, and how they end."""
import os

STARTED_BY = os.getppid()          # before torch, whose import takes seconds: by then a torchrun that was killed is not it

import contextlib
import signal
import sys
import threading
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from support import cli
from support.cli import InputError

PATIENCE = 10          # seconds: a longer step is given up when somebody asks to stop, for torchrun kills after 30

# ---------------------------------------------------------------------------------------------------------------------
# Ranks

@dataclass
class Ranks:
    """This process among those that torchrun started; one process alone needs no process group."""
    rank: int
    size: int
    device: str

    @classmethod
    def start(cls, device):
        """Join the process group, where torchrun started more than one process."""
        rank, size, local = (int(os.environ.get(name, default)) for name, default in
                             (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        if size > 1 and "RANK" not in os.environ:
            raise InputError(f"WORLD_SIZE is {size}, but torchrun did not start this process; unset it, or use torchrun.")
        device = pick_device(device)
        if device.startswith("cuda:") and size > 1:
            raise InputError(f"--device={device}: {size} ranks take a card each; use --device=cuda.")
        if device == "cuda" and size > 1:
            device = f"cuda:{local}"
            torch.cuda.set_device(device)
        if size > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                # torchrun keeps one store for all its tries: the second must not find the addresses of the first one's ranks.
                # On several nodes it counts the tries on each for itself, so there is no name that all ranks would know.
                store, *_ = next(dist.rendezvous("env://"))
                store = dist.PrefixStore(f"try {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
                dist.init_process_group(backend, store=store, rank=rank, world_size=size)
            else:
                dist.init_process_group(backend)
        return cls(rank, size, device)

    def sum(self, values):
        """Element-wise sum over the ranks of a list of numbers."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        self.add_up(total)
        return total.tolist()

    def add_up(self, tensor):
        """The sum over the ranks of a tensor on the CPU, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def largest(self, value):
        if self.size == 1:
            return value
        total = torch.tensor(value)
        dist.all_reduce(total, dist.ReduceOp.MAX)
        return total.item()

    def from_first(self, value):
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_first(self, work):
        """What work() returns on the first rank, given to all; where it fails there, all ranks fail with its sentence."""
        value = failed = None
        if self.rank == 0:
            try:
                value = work()
            except (OSError, InputError) as error:
                failed = error
        value, failed = self.from_first((value, failed))
        if failed is not None:
            raise failed
        return value

    def on_all(self, work):
        """What work() returns on this rank; where it fails on one rank, all fail with that one's sentence."""
        value = failed = None
        try:
            value = work()
        except (OSError, InputError) as error:
            failed = error
        found = [failed]
        if self.size > 1:
            found = [None] * self.size
            dist.all_gather_object(found, failed)
        for failed in filter(None, found):
            raise failed
        return value

    def wait(self):
        if self.size > 1:
            dist.barrier()

    def mesh(self, replicas):
        """Which ranks share one copy of the weights: all of them, or (replicas, shards), neighbours together."""
        check_replicas(replicas, self.size)
        shape, names = ((self.size,), ("shard",)) if replicas == 1 else ((replicas, self.size // replicas), ("replica", "shard"))
        return init_device_mesh(self.device.split(":")[0], shape, mesh_dim_names=names)


def pick_device(name):
    """The torch device for a --device setting; auto prefers CUDA."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device={name}: this machine or this build of torch has no such device.") from None
    return name


def check_replicas(replicas, ranks):
    if ranks % replicas:
        raise InputError(f"--replicas={replicas}: the number of processes, {ranks}, is no multiple of it.")


class LostRank(InputError):
    """Not the user's mistake, but one sentence too; the ranks that are left say it at once."""
    urgent = True


class Dropped(Exception):
    """The step under way was given up; the weights are as they were before it."""


class Asked:
    """Whether this process was asked to stop: by which signal, or 0."""
    number = 0

    def __call__(self, number, frame):
        self.number = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)        # a second Ctrl-C stops at once

    def expects(self, step_seconds):
        """Whether a step under way, which takes about so long, should be given up."""
        return self.number and step_seconds > PATIENCE


@contextlib.contextmanager
def asked_to_stop():
    """An Asked that hears of SIGTERM and SIGINT."""
    asked = Asked()
    before = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_with(parent):
    """End this process when `parent`, the torchrun that started it, is gone: an orphan must not go on writing to out_dir."""
    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def leave(status):
    """End this process. A rank does so at once: a thread of gloo may still hold the last tensor that it sent, and to let go of
    it while Python shuts down aborts a run that went well ("terminate called without an active exception", status -6)."""
    if not dist.is_initialized():
        sys.exit(status)
    if status == 0:                    # behind an error the others may be anywhere: nobody to say goodbye to
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def launch(main, settings):
    """What stands in front of a script that torchrun starts: cli.run, and an end that a rank survives."""
    ended = 0
    try:
        cli.run(main, settings)
    except SystemExit as error:
        ended = error.code
    leave(ended)
