"""What makes a run faster or smaller and changes nothing in its result but rounding."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from support.command import out_of_memory
from support.onednn_linear import onednn_helps, use_onednn
from support.processes import average, is_first, mean_over_ranks, ranks, shares, sum_over_ranks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Machine:
    """The device and the processes of a run: what decides how fast it is, and nothing of its result."""

    device: torch.device
    micro_batch: int | None = None  # clips at once; None: the whole share of a batch
    compile: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and prints: without torchrun it is."""
        return is_first()

    def prepare(self, model: nn.Module, dtype: str) -> nn.Module:
        """The adapted model on its device, ready for training. Changes `model` and returns it."""
        return prepare(model, dtype, self)

    def autocast(self, dtype: str):
        """A context in which products are computed in `dtype`."""
        return autocast(self.device, dtype)

    def parallel(self, network: nn.Module) -> nn.Module:
        """The network, compiled if asked, and data-parallel if there are several processes."""
        forward = torch.compile(network) if self.compile else network
        if ranks()[1] > 1:
            gpu = [self.device.index] if self.device.type == "cuda" else None
            forward = DistributedDataParallel(forward, device_ids=gpu)
            forward.broadcast_buffers = False  # each process takes its own running statistics, `average` all
        return forward

    def shares(self, n: int) -> Iterator[tuple[slice, int]]:
        """Which of the `n` clips of a batch this process takes, piece by piece, and their weight in the loss."""
        return shares(n, self.micro_batch)

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over all processes."""
        return mean_over_ranks(tensor)

    def average(self, tensors: Iterable[torch.Tensor]) -> None:
        """Each becomes its mean over all processes."""
        average(tensors)

    def in_batches(self, function: Callable, index: torch.Tensor, batch_size: int) -> torch.Tensor:
        """What `function` computes for each of `index`, in pieces, (n, numbers)."""
        return in_batches(function, index, batch_size, self)


def autocast(device: torch.device, dtype: str):
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, DTYPES[dtype])


def near(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor in the memory of a GPU if it takes at most half of what is free there; else where it is."""
    fits = device.type == "cuda" and 2 * tensor.nbytes < torch.cuda.mem_get_info(device)[0]
    return tensor.to(device) if fits else tensor


# ------------------------------------------------------------------------------------------------------- the model


def prepare(model: nn.Module, dtype: str, machine: Machine) -> nn.Module:
    """The adapted model on its device, ready for training. Changes `model` and returns it."""
    model = model.to(machine.device)
    if dtype != "float32":  # autocast would convert frozen weights anew in every step, and gives the same numbers
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
                for parameter in module.parameters():
                    if not parameter.requires_grad:
                        parameter.data = parameter.to(DTYPES[dtype])
    elif machine.device.type == "cpu" and not machine.compile and onednn_helps():
        use_onednn(model)
    return model


# -------------------------------------------------------------------------------------------------- without gradients


def evaluation_batch(batch_size: int, machine: Machine) -> int:
    """Clips at once without gradients. Training keeps a dozen tensors of every block, evaluation those of one block: on
    a GPU four times a process's share takes less memory still. A CPU gains nothing: its caches like small batches."""
    share = machine.micro_batch or math.ceil(batch_size / ranks()[1])
    return share * (4 if machine.device.type == "cuda" else 1)


def in_batches(function: Callable, index: torch.Tensor, batch_size: int, machine: Machine) -> torch.Tensor:
    """Some numbers for each of `index`, float32 (n, numbers): `function` on pieces of it, half as large where memory is
    too small. Every process takes its share, if empty for the number of numbers, and gets all."""
    rank, world = ranks()
    mine, found = index[rank::world], []
    batch, start = evaluation_batch(batch_size, machine), 0
    while start < len(mine) or (len(index) and not found):
        try:
            found.append(function(mine[start : start + batch]).float())
            start += batch
        except (RuntimeError, MemoryError) as error:
            if batch == 1 or not out_of_memory(error):
                raise
            batch //= 2
    found = torch.cat(found or [torch.zeros(0, 1, device=machine.device)])
    rows = found.new_zeros(len(index), found.shape[1])
    rows[rank::world] = found
    return sum_over_ranks(rows)
