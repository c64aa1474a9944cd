"""Several processes: torchrun starts them, each takes its share of every batch."""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from support.command import UserError, is_number

PATIENCE = timedelta(minutes=10)  # of a process that waits for another; a dead one on the same node shows at once


def ranks() -> tuple[int, int]:
    """Rank of this process and number of processes: (0, 1) unless started by torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return ranks()[0] == 0


def say(*words) -> None:
    if is_first():
        print(*words, flush=True)


def shares(n: int, micro_batch: int | None) -> Iterator[tuple[slice, int]]:
    """Which of the `n` clips of a batch this process takes now, and what they weigh in the loss.

    Alone: all of them, at once, with weight 1. With several processes or micro-batches the clips are dealt out so that
    each process runs equally often, as DistributedDataParallel wants it; where there are more processes than clips,
    some run another's clip with weight 0. The weight is the number of processes otherwise, because gradients and losses
    are averaged over them.
    """
    rank, world = ranks()
    step = (micro_batch or n) * world
    for start in range(0, n, step):
        end = min(start + step, n)
        if start + rank < end:
            yield slice(start + rank, end, world), world
        else:
            yield slice(start, start + 1), 0


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    if ranks()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    return sum_over_ranks(tensor) / ranks()[1]


def average(tensors: Iterable[torch.Tensor]) -> None:
    """Each becomes its mean over all processes: statistics that every one of them took of its own clips."""
    for tensor in tensors:
        tensor.copy_(mean_over_ranks(tensor))


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def process_group(device: torch.device):
    """The processes that torchrun started, joined while this lasts; nothing without torchrun."""
    try:
        if "RANK" in os.environ:
            signal.signal(signal.SIGTERM, lost_process)
            join(device)
        yield
        if dist.is_initialized():  # only now: after an error it might wait for processes that are lost
            dist.destroy_process_group()
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            lost_process()
        raise


def join(device: torch.device) -> None:
    """Meet the other processes. UserError unless the environment says where and how many they are."""
    for name, most in {"RANK": 10**6, "WORLD_SIZE": 10**6, "MASTER_PORT": 65_535}.items():
        if not is_number(os.environ.get(name, "")) or int(os.environ[name]) > most:
            raise UserError(f"{name} is {os.environ.get(name)!r} where RANK is set: start by torchrun, or unset RANK")
    if not os.environ.get("MASTER_ADDR") or int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        raise UserError("MASTER_ADDR is missing, or RANK is not below WORLD_SIZE: start by torchrun, or unset RANK")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)


def lost_process(*_) -> None:
    """Raises the UserError of a process that cannot go on without the others. Also what torchrun's SIGTERM calls: it
    ends all processes when one has died, and may do so before the next exchange of numbers fails."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # saying it once is enough
    raise UserError(
        f"process {os.environ.get('RANK')} stops: another process of this run has ended or does not answer; where no "
        "line above says why, it was killed; the same command with --resume goes on after the last finished epoch"
    )
