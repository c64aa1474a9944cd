"""Several processes of one run. torchrun starts them, and each takes its share of every batch."""

import os
import signal
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from support.command import UserError, printable

# How long a process waits for another. If that one dies on the same machine, it shows at once.
PATIENCE = timedelta(minutes=10)


def ranks() -> tuple[int, int]:
    """The number of this process, and how many there are. Without torchrun (0, 1)."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return ranks()[0] == 0


def say(*words) -> None:
    """Print in the first process only. Control characters in names become escapes."""
    if is_first():
        print(*map(printable, words), flush=True)


def say_lines(text: str) -> None:
    """Say each line of a text in which a name has none: they are escaped already."""
    for line in text.split("\n"):
        say(line)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes. Changes `tensor` and returns it."""
    if ranks()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def process_group(device: torch.device):
    """Joins the processes that torchrun started. Without torchrun nothing happens."""
    try:
        if "RANK" in os.environ:
            signal.signal(signal.SIGTERM, lost_process)
            join(device)
        yield
        if dist.is_initialized():
            dist.destroy_process_group()  # after an error it might wait for lost processes
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            lost_process()
        raise


def join(device: torch.device) -> None:
    """Meet the other processes. UserError if the environment does not say where they are."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except ValueError as error:
        raise UserError(f"{error}: start by torchrun, or unset RANK") from None


def lost_process(*_) -> None:
    """Raise the UserError of a process that cannot go on without the others.

    torchrun sends SIGTERM to all processes when one has died. That signal calls this function, too,
    as it may come before the next exchange of numbers fails.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # saying it once is enough
    raise UserError(
        f"process {os.environ.get('RANK')} stops: another process of this run has ended or does "
        "not answer; where no line above says why, it was killed; the same command with --resume "
        "goes on after the last finished epoch"
    )
