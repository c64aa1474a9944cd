"""The vectors that a frozen backbone makes of clips. `linear` and `probe` train on them.

A vector is computed once for all epochs, folds, seeds and later runs, and kept on disk.
"""

import hashlib
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from support.files import locked
from support.progress import Bar
from support.rows import open_rows, row_type, writable_rows
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


def skip_frozen(model, clips, split, settings, machine: Machine):
    """The network that trains, and the clips that it trains on.

    These are the last layers and vectors, if nothing before the last layers learns and if the clips
    are the same in every epoch. Otherwise they are `model` and `clips`.

    A head that standardises its input gets the mean and the standard deviation of the training
    clips here. They are not masked for it.
    """
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    constant = not (settings.mask_frames or settings.keep)
    standardises = hasattr(model.head, "standardise")
    if not trained <= {"norm", "head"} or not (constant or standardises):
        return model, clips

    needed = split.train
    if constant:
        needed = split.train + split.val + split.test
    vectors = near(vectors_of(model, clips, needed, settings, machine), machine.device)
    if standardises:
        model.head.standardise(*mean_and_std(vectors, torch.tensor(split.train)))
    if not constant:
        return model, clips
    labels = clips.labels.to(vectors.device)
    return LastLayers(model), replace(clips, features=vectors, labels=labels)


def mean_and_std(vectors: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation over the vectors `index`, in float64: both are (numbers,)."""
    pieces = index.to(vectors.device).split(256)
    mean = sum(vectors[piece].double().sum(0) for piece in pieces) / len(index)
    square = sum((vectors[piece].double() - mean).square().sum(0) for piece in pieces) / len(index)
    return mean, square.sqrt()


def vectors_of(model, clips, needed: list[int], settings, machine: Machine) -> torch.Tensor:
    """What the last layers read of each clip, (clips, numbers). Rows not `needed` may be 0.

    The batches are blocks of neighbouring clips, whatever the split. Rounding may depend on the
    other clips of a batch, and a resumed run must get the bits of an unbroken one.

    One of several processes or runs computes, and the others wait for it. Clips without a file have
    vectors without one.
    """
    model.eval()
    batch = machine.micro_batch or settings.batch_size
    head = next(module for module in model.head.modules() if isinstance(module, nn.Linear))
    kind = row_type((head.in_features,), "<f4" if model.norm.weight.requires_grad else "<f2")
    count = len(clips.labels)

    def fill(rows):
        missing = sorted({i // batch for i in needed if not rows["key"][i]})
        for number in Bar(missing, "backbone", unit="block"):
            block = torch.arange(number * batch, min((number + 1) * batch, count))
            rows["features"][block] = compute(model, clips, block, settings, machine)
            rows["key"][block] = 1
        return rows

    if clips.file is None:
        rows = fill(np.zeros(count, kind))
    else:
        digest = hash_of(f"{kind}, {batch} at once", model, clips, settings, machine)
        folder = clips.file.parents[1] / "vectors"  # beside the folder of the features
        file = folder / f"{clips.file.stem}-{digest}.rows"
        rows = open_rows(file, kind, count)
        if rows is None or not rows["key"][needed].all():
            folder.mkdir(parents=True, exist_ok=True)
            with locked(file):
                rows = fill(writable_rows(file, kind, count))
    return torch.from_numpy(rows["features"])


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
def compute(model, clips, index: torch.Tensor, settings, machine: Machine) -> np.ndarray:
    """What the head reads of clips or, if the final LayerNorm learns, what `LastLayers` reads."""
    x, _ = clips.batch(index.to(clips.features.device), machine.device)
    with machine.autocast(settings.dtype):
        if model.norm.weight.requires_grad:
            tokens = model.encode(model.embed(x))
            vectors = model.pool(F.layer_norm(tokens, (model.config.dim,), eps=model.norm.eps))
        else:
            vectors = model.vector(x)
    return vectors.float().cpu().numpy()
