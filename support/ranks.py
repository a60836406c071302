"""The processes of a run: what they agree on, how they are asked to stop, how they end."""
import os

STARTED_BY = os.getppid()    # before torch, whose import takes seconds: by then a killed torchrun is not it

import sys
from pathlib import Path

from support import cli

MAIN = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve()
if MAIN.parent in (Path(__file__).parents[1], Path(__file__).parents[1] / "experiments"):
    # One of our programs: until cli.run takes over an error, or Ctrl-C, is a sentence too.
    sys.excepthook = lambda kind, error, trace: cli.end_with(error)

import contextlib
import datetime
import signal
import threading
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

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
    def start(cls, device, minutes=30):
        """Join the process group, where torchrun started more than one process. No rank waits longer for
        another one than so many minutes."""
        rank, size = cli.environment("RANK", 0), cli.environment("WORLD_SIZE", 1, least=1)
        if rank >= size or size > 1 and "RANK" not in os.environ:
            raise InputError(f"the environment has RANK={os.environ.get('RANK', '')} and WORLD_SIZE={size}, "
                             f"which torchrun sets together; unset both.")
        device = pick_device(device)
        if size == 1:
            return cls(0, 1, device)
        if device.startswith("cuda:"):
            raise InputError(f"--device={device}: {size} ranks take a card each; use --device=cuda.")
        if device == "cuda":
            device = f"cuda:{cli.environment('LOCAL_RANK', 0)}"
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            try:
                join("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", rank, size, minutes)
            except (ValueError, RuntimeError, OverflowError) as error:      # no address, or a wrong one
                raise InputError(f"rank {rank} cannot meet the others: {str(error).splitlines()[0]}; "
                                 f"torchrun says where.", urgent=True) from None
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
        return self.gather(value)[0]

    def on_first(self, work):
        """What work() returns on the first rank, told to all; if it fails there, all fail with its words."""
        return self.from_first(self.on_all(lambda: work() if self.rank == 0 else None))

    def gather(self, value):
        """Every rank's value, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def on_all(self, work):
        """What work() returns on this rank; where it fails on one rank, all fail with that one's sentence."""
        value = failed = None
        try:
            value = work()
        except (OSError, InputError) as error:
            failed = error
        for error in filter(None, self.gather(failed)):
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


def join(backend, rank, size, minutes):
    """Join the process group. torchrun keeps one store for all its tries: the second must not find the first
    one's addresses. (On several nodes each counts its own tries: there is no name that all ranks know.)"""
    timeout = datetime.timedelta(minutes=minutes)
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        dist.init_process_group(backend, timeout=timeout)
        return
    store, *_ = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"try {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)


# ------------------------------------------------------------------------------------------------------------
# How a run ends

@contextlib.contextmanager
def lost_rank_named():
    """Inside, the loss of another rank, which gloo tells in many ways, is one sentence, said at once."""
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized() or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise InputError(f"rank {dist.get_rank()} has lost another rank, which stopped or was killed, or did "
                         f"not answer for --rank_minutes; what was saved is kept.", urgent=True) from error


class StopSignal:
    """Whether this process was asked to stop: by which signal, or 0."""
    number = 0

    def __call__(self, number, frame):
        if number == getattr(signal, "SIGQUIT", None):
            cli.fail("SIGQUIT: stopped at once; what was saved is kept.", 128 + number)
        self.number = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)        # a second Ctrl-C stops at once


@contextlib.contextmanager
def stop_signal():
    """A StopSignal that hears of all that asks a process to stop; after nohup not of SIGHUP."""
    stop, names = StopSignal(), ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGQUIT")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]       # Windows has two
    before = {number: signal.signal(number, stop) for number in numbers
              if signal.Signals(number).name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN}
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
    if "TORCHELASTIC_RUN_ID" in os.environ:
        leave_with(STARTED_BY)
    try:
        cli.run(lost_rank_named()(main), settings, is_training=True)
    except SystemExit as leaving:
        status = leaving.code
    if not dist.is_initialized():
        sys.exit(status)
    if status == 0:                    # after an error the others may be anywhere: nobody to say goodbye to
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
