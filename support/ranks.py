"""The processes of a run: what they agree on, how they are asked to stop, how they end."""
import os

STARTED_BY = os.getppid()    # before torch, whose import takes seconds: by then a killed torchrun is not it

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


def pick_device(name):
    """The torch device for a --device setting; auto prefers CUDA."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device={name}: this machine, or this build of torch, has none.") from None
    return name


def pick_dtype(name, device):
    """The torch type of a --dtype setting; auto is bfloat16 where CUDA has it fast."""
    if name == "auto":
        name = "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"
    return getattr(torch, name)


def check_replicas(replicas, ranks):
    if ranks % replicas:
        raise InputError(f"--replicas={replicas}: the number of processes, {ranks}, is no multiple of it.")


@dataclass
class Ranks:
    """This process among those that torchrun started; one process alone needs no process group."""
    rank: int
    size: int
    device: str

    @classmethod
    def start(cls, device):
        """Join the process group, where torchrun started more than one process."""
        device, size = pick_device(device), int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            return cls(0, 1, device)
        if "RANK" not in os.environ:
            raise InputError(f"WORLD_SIZE is {size}, but torchrun did not start this process; unset it.")
        if device.startswith("cuda:"):
            raise InputError(f"--device={device}: {size} ranks take a card each; use --device=cuda.")
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(device)
        rank = int(os.environ["RANK"])
        if not dist.is_initialized():
            join("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", rank, size)
        return cls(rank, size, device)

    def sum(self, values):
        """Element-wise sum over the ranks of a list of numbers, in float64."""
        total = torch.tensor(values, dtype=torch.float64)
        self.add_up(total)
        return total.tolist()

    def add_up(self, tensor):
        """The sum over the ranks of a tensor on the CPU, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def largest(self, value):
        total = torch.tensor(value)
        if self.size > 1:
            dist.all_reduce(total, dist.ReduceOp.MAX)
        return total.item()

    def from_first(self, value):
        """The first rank's value, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_first(self, work):
        """What work() returns on the first rank, told to all; if it fails there, all fail with its words."""
        return self.from_first(self.on_all(lambda: work() if self.rank == 0 else None))

    def on_all(self, work):
        """What work() returns on this rank; where it fails on one rank, all fail with that one's sentence."""
        value, failed = None, [None] * self.size
        try:
            value = work()
        except (OSError, InputError) as error:
            failed[self.rank] = error
        if self.size > 1:
            dist.all_gather_object(failed, failed[self.rank])
        for error in filter(None, failed):
            raise error
        return value

    def wait(self):
        if self.size > 1:
            dist.barrier()

    def mesh(self, replicas):
        """Which ranks share one copy of the weights: all, or (replicas, shards), neighbours together."""
        check_replicas(replicas, self.size)
        shape, names = (self.size,), ("shard",)
        if replicas > 1:
            shape, names = (replicas, self.size // replicas), ("replica", "shard")
        return init_device_mesh(self.device.split(":")[0], shape, mesh_dim_names=names)


def join(backend, rank, size):
    """Join the process group. torchrun keeps one store for all its tries: the second must not find the first
    one's addresses. (On several nodes each counts its own tries: there is no name that all ranks know.)"""
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        dist.init_process_group(backend)
        return
    store, *_ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"try {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


# ------------------------------------------------------------------------------------------------------------
# How a run ends

@contextlib.contextmanager
def lost_rank_named(ranks):
    """Inside, the loss of another rank, which gloo tells in many ways, is one sentence, said at once."""
    try:
        yield
    except RuntimeError as error:
        if ranks.size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        lost = InputError(f"rank {ranks.rank} has lost another rank, which stopped or was killed; what was "
                          f"saved is kept.")
        lost.urgent = True
        raise lost from error


class StopSignal:
    """Whether this process was asked to stop: by which signal, or 0."""
    number = 0

    def __call__(self, number, frame):
        self.number = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)        # a second Ctrl-C stops at once


@contextlib.contextmanager
def stop_signal():
    """A StopSignal that hears of SIGTERM and SIGINT."""
    stop = StopSignal()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_with(parent):
    """End this process once `parent`, the torchrun that started it, is gone: no orphan may go on writing."""
    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def launch(main, settings):
    """cli.run, then an end that a rank survives: at once, for gloo may still hold the last tensor that it
    sent, and letting go of it while Python shuts down aborts a run that went well (status -6)."""
    status = 0
    try:
        cli.run(main, settings)
    except SystemExit as leaving:
        status = leaving.code
    if not dist.is_initialized():
        sys.exit(status)
    if status == 0:                    # after an error the others may be anywhere: nobody to say goodbye to
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
