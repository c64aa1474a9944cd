"""What makes a run faster or smaller. It changes nothing in the result but rounding."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ast_model import AST
from support.command import out_of_memory
from support.onednn_linear import onednn_helps, use_onednn
from support.processes import is_first, ranks, sum_over_ranks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def near(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a GPU, if it takes at most half of the memory that is free there."""
    if device.type == "cuda" and 2 * tensor.nbytes < torch.cuda.mem_get_info(device)[0]:
        return tensor.to(device)
    return tensor


def bfloat16_helps(network: nn.Module) -> bool:
    """Whether this CPU trains a network faster in bfloat16 than in float32.

    The processor must have units for bfloat16, and the network must be an AST that is wide enough:
    docs/speed.md has the times. It is not measured here. On a busy machine a short measurement says
    anything.
    """
    has = torch.cpu.get_capabilities()
    is_wide = isinstance(network, AST) and network.config.dim >= 384
    return is_wide and bool(has.get("avx512_bf16") or has.get("amx_bf16"))


@dataclass(frozen=True)
class Machine:
    """The device and the processes of a run. They decide how fast it is, and not what comes out."""

    device: torch.device
    micro_batch: int | None = None  # clips at once; None: the whole share of a batch
    compile: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints. Without torchrun there is no other."""
        return is_first()

    def prepare(self, model: nn.Module, dtype: str) -> nn.Module:
        """The adapted model on its device, ready for training. Changes `model` and returns it."""
        model = model.to(self.device)
        if dtype == "float32":
            if self.device.type == "cpu" and not self.compile and onednn_helps():
                use_onednn(model)
            return model
        # Frozen weights are converted once. autocast would do it in every step.
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
                for parameter in module.parameters():
                    if not parameter.requires_grad:
                        parameter.data = parameter.to(DTYPES[dtype])
        return model

    def parallel(self, network: nn.Module) -> nn.Module:
        """The network, compiled if asked, and data-parallel if there are several processes."""
        if self.compile:
            network = torch.compile(network)
        if ranks()[1] > 1:
            gpu = [self.device.index] if self.device.type == "cuda" else None
            network = DistributedDataParallel(network, device_ids=gpu)
            network.broadcast_buffers = False  # the running statistics of BatchNorm: see `average_`
        return network

    def autocast(self, dtype: str):
        """A context in which products are computed in `dtype`."""
        if dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[dtype])

    def shares(self, n: int) -> Iterator[tuple[slice, int]]:
        """Yield which of the `n` clips of a batch this process takes, and the factor of their loss.

        A process without --micro-batch takes its whole share at once. The factor is the number of
        processes, because gradients and losses are averaged over them. All processes run equally
        often, as DistributedDataParallel wants it. One that has no clip left runs another's with
        weight 0.
        """
        rank, world = ranks()
        step = (self.micro_batch or n) * world
        for start in range(0, n, step):
            end = min(start + step, n)
            if start + rank < end:
                yield slice(start + rank, end, world), world
            else:
                yield slice(start, start + 1), 0

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over all processes."""
        return sum_over_ranks(tensor) / ranks()[1]

    def average_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Each tensor becomes its mean over all processes."""
        for tensor in tensors:
            tensor.copy_(self.mean(tensor))

    def evaluation_batch(self, batch_size: int) -> int:
        """Clips at once without gradients.

        Training keeps a dozen tensors of every block, and evaluation those of one block. So a GPU
        takes four times as many clips. A CPU gains nothing, because its caches like small batches.
        """
        share = self.micro_batch or math.ceil(batch_size / ranks()[1])
        return 4 * share if self.device.type == "cuda" else share

    def in_batches(self, function: Callable, index: torch.Tensor, batch_size: int) -> torch.Tensor:
        """What `function` computes for the clips `index`, in batches: float32 (clips, numbers).

        A batch that does not fit into memory is halved. Each process takes its share of the clips,
        and gets the numbers of all.
        """
        rank, world = ranks()
        mine = index[rank::world]
        batch = self.evaluation_batch(batch_size)
        found = []
        start = 0
        while start < len(mine) or (len(index) and not found):  # an empty share: how many numbers
            try:
                found.append(function(mine[start : start + batch]).float())
                start += batch
            except (RuntimeError, MemoryError) as error:
                if batch == 1 or not out_of_memory(error):
                    raise
                batch //= 2
        found = torch.cat(found or [torch.zeros(0, 1, device=self.device)])
        rows = found.new_zeros(len(index), found.shape[1])
        rows[rank::world] = found
        return sum_over_ranks(rows)
