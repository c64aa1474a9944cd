"""What makes a run faster or smaller and changes nothing in its result but rounding."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from support.onednn_linear import onednn_helps, use_onednn
from support.processes import ranks, sum_over_ranks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Machine:
    """Everything that decides how fast a run is and how much memory it takes, and nothing of its result."""

    device: torch.device
    micro_batch: int | None = None  # clips at once; None: the whole share of a batch
    compile: bool = False
    recompute: bool = False  # keep less for the backward pass and compute it again
    resume: bool = False  # take up interrupted folds


def autocast(device: torch.device, dtype: str):
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, DTYPES[dtype])


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
    if machine.recompute:
        for module in model.modules():  # sees every batch twice, compiled code once: two short steps make one whole
            if isinstance(module, nn.BatchNorm1d) and not machine.compile:
                module.momentum = 1 - (1 - module.momentum) ** 0.5
        for block in model.blocks:  # keep only the input of each block, and run it again for its gradients
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def for_training(network: nn.Module, machine: Machine) -> nn.Module:
    """`network` as training calls it: compiled if asked, and data-parallel where there are several processes."""
    if machine.recompute:
        torch.compiler.reset()  # its blocks are new code in every fold, and torch gives up compiling after a few
    forward = torch.compile(network) if machine.compile else network
    if ranks()[1] == 1:
        return forward
    gpu = [machine.device.index] if machine.device.type == "cuda" else None
    parallel = DistributedDataParallel(forward, device_ids=gpu)
    parallel.broadcast_buffers = False  # running statistics: each process takes its own, `average` puts them together
    return parallel


# -------------------------------------------------------------------------------------------------- without gradients


def evaluation_batch(batch_size: int, machine: Machine) -> int:
    """Clips at once without gradients. Training keeps a dozen tensors of every block, evaluation those of one block: on
    a GPU four times a process's share takes less memory still. A CPU gains nothing: its caches like small batches."""
    share = machine.micro_batch or math.ceil(batch_size / ranks()[1])
    return share * (4 if machine.device.type == "cuda" else 1)


def sum_in_batches(function: Callable, index: torch.Tensor, batch_size: int, machine: Machine) -> float:
    """The sum over all processes of `function` on pieces of `index`, each half as large where memory is too small."""
    rank, world = ranks()
    index = index[rank::world]
    total = torch.zeros((), device=machine.device)
    batch, start = evaluation_batch(batch_size, machine), 0
    while start < len(index):
        try:
            total += function(index[start : start + batch])
            start += batch
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
    return sum_over_ranks(total).item()


# ------------------------------------------------------------------------------------------------------ linear probes


class Probe(nn.Module):
    """Final LayerNorm and head of a model, the parameters themselves, on what `pool_clips` has kept of each clip.

    The scale and shift of the LayerNorm are the same for all tokens, so they may as well come after the pooling.
    """

    def __init__(self, model):
        super().__init__()
        self.norm, self.head = model.norm, model.head

    def forward(self, pooled):  # (batch, dim)
        return self.head(pooled * self.norm.weight + self.norm.bias)  # (batch, n_classes)


def nothing_pooled(clips, model, device: torch.device) -> torch.Tensor:
    """What `pool_clips` fills: (clips, dim), nan where a clip has not been through the backbone."""
    return torch.full((len(clips.labels), model.config.dim), math.nan, device=device)


@torch.inference_mode()
def pool_clips(model, clips, split, settings, machine: Machine):
    """What a linear probe trains on, in place of the features: `data.Clips` of pooled tokens, (clips, dim).

    The backbone is the same in all folds and seeds, so only what is not there yet goes through it; each process takes
    its share. A batch is a block of neighbouring clips, whatever the split: rounding may depend on the company, and a
    resumed run must get the bits of an unbroken one.
    """
    device, rank, world = machine.device, *ranks()
    model.eval()
    needed = torch.tensor(split.train + split.val + split.test)
    needed = needed[clips.pooled[needed.to(device), 0].isnan().cpu()]
    blocks = torch.arange(len(clips.labels)).split(evaluation_batch(settings.batch_size, machine))
    blocks = [blocks[i] for i in (needed // len(blocks[0])).unique().tolist()]
    new = torch.zeros_like(clips.pooled)
    for index in blocks[rank::world]:
        x, _ = clips.batch(index.to(clips.features.device), device)
        with autocast(device, settings.dtype):
            tokens = F.layer_norm(model.encode(x), (model.config.dim,), eps=model.norm.eps)
            new[index.to(device)] = model.pool(tokens).float()
    if blocks:
        rows = torch.cat(blocks).to(device)
        clips.pooled[rows] = sum_over_ranks(new[rows])
    return replace(clips, features=clips.pooled, labels=clips.labels.to(device), pooled=None)
