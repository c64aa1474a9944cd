"""The vectors that heads read. `linear`, `probe` and `logmel` learn from them alone.

The frozen backbone makes a vector of each clip. The vectors of a dataset are computed once for all
epochs, folds, seeds and later runs, and kept on disk in one file, which is whole or not there.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from support.files import locked, remove_left_behind, whole_file
from support.progress import Bar
from support.speed import Machine, near


class LastLayers(nn.Module):
    """The head of a model, and its final LayerNorm if that learns.

    It reads pooled tokens (batch, dim) that are normalised already. Scale and shift of the
    LayerNorm are the same for all tokens, so they may come after the pooling. The parameters are
    the model's own and have the same names.
    """

    def __init__(self, model):
        super().__init__()
        self.method = model.method
        self.norm = model.norm if model.norm.weight.requires_grad else None
        self.head = model.head

    def forward(self, pooled):
        if self.norm is not None:
            pooled = pooled * self.norm.weight + self.norm.bias
        return self.head(pooled)  # (batch, n_classes)


def skip_frozen(model, clips, settings, machine: Machine):
    """The network that trains, and the clips that it trains on.

    These are the last layers and vectors, if nothing before the last layers learns and if the clips
    are the same in every epoch. Otherwise they are `model` and `clips`.
    """
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    if not trained <= {"norm", "head"} or settings.mask_frames or settings.keep:
        return model, clips
    vectors = near(vectors_of(model, clips, settings, machine), machine.device)
    labels = clips.labels.to(vectors.device)
    return LastLayers(model), replace(clips, features=vectors, labels=labels)


def vectors_of(model, clips, settings, machine: Machine) -> torch.Tensor:
    """What the last layers read of each clip, (clips, numbers), mapped from a file.

    One of several processes or runs computes, and the others wait for it. Clips without a file have
    vectors without one.
    """
    model.eval()
    batch = machine.micro_batch or settings.batch_size
    kind = "<f4" if model.norm.weight.requires_grad else "<f2"
    blocks = compute(model, clips, batch, settings, machine)
    if clips.file is None:
        return torch.from_numpy(np.concatenate(list(blocks)).astype(kind))

    head = next(module for module in model.head.modules() if isinstance(module, nn.Linear))
    shape = (len(clips.labels), head.in_features)
    size = math.prod(shape) * np.dtype(kind).itemsize
    digest = hash_of(f"{kind}, {batch} at once", model, clips, settings, machine)
    file = clips.file.parents[1] / "vectors" / f"{clips.file.stem}-{digest}.vectors"
    if not is_whole(file, size):  # else it is only read, because the folder may be read-only
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file):
            remove_left_behind(file.parent)
            if not is_whole(file, size):  # another process has not made it meanwhile
                with whole_file(file) as temporary, open(temporary, "wb") as out:
                    for rows in blocks:
                        out.write(rows.astype(kind).tobytes())
    return torch.from_numpy(np.memmap(file, kind, mode="c", shape=shape))


def is_whole(file: Path, size: int) -> bool:
    return file.exists() and file.stat().st_size == size


def hash_of(what: str, model, clips, settings, machine: Machine) -> str:
    """A hash of what the vectors are computed from and, for their rounding, of type and device.

    It does not have the version of PyTorch: after an upgrade the old vectors are used.
    """
    what += f", {model.backbone.sha256}, {model.config}, {model.method.parts}"
    digest = hashlib.sha256(f"{what}, {settings.dtype}, {machine.device.type}".encode())
    for features in clips.features.split(64):
        digest.update(features.cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


@torch.inference_mode()
def compute(model, clips, batch: int, settings, machine: Machine) -> Iterator[np.ndarray]:
    """Yield what the last layers read of `batch` clips at a time, (clips, numbers), in their order.

    If the final LayerNorm learns, it is left out: `LastLayers` applies it.
    """
    every = torch.arange(len(clips.labels), device=clips.features.device)
    for index in Bar(every.split(batch), "backbone", unit="block"):
        x, _ = clips.batch(index, machine.device)
        with machine.autocast(settings.dtype):
            if model.norm.weight.requires_grad:
                tokens = model.encode(model.embed(x))
                vectors = model.pool(F.layer_norm(tokens, (model.config.dim,), eps=model.norm.eps))
            else:
                vectors = model.vector(x)
        yield vectors.float().cpu().numpy()
