"""What a frozen backbone makes of each clip, computed once and kept on disk: what `linear` and `probe` train on."""

import hashlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from support.command import warn
from support.files import locked, whole_file
from support.processes import ranks, wait_for_all
from support.progress import Bar
from support.rows import crc_of, map_rows, row_type, start_rows
from support.speed import Machine, autocast, near


class LastLayers(nn.Module):
    """The head of a model, and its final LayerNorm if that learns, on pooled tokens that are normalised already. The
    parameters are the model's own, and have the same names.

    The scale and shift of the LayerNorm are the same for all tokens, so they may as well come after the pooling.
    """

    def __init__(self, model):
        super().__init__()
        self.method = model.method
        if model.norm.weight.requires_grad:
            self.norm = model.norm
        self.head = model.head

    def forward(self, pooled):  # (batch, dim)
        if not hasattr(self, "norm"):
            return self.head(pooled)
        return self.head(pooled * self.norm.weight + self.norm.bias)  # (batch, n_classes)


def skip_frozen(model, clips, split, settings, machine: Machine):
    """What learns and from what: the last layers alone and from vectors, where nothing before them learns and the clips
    are the same in every epoch; else `model` and `clips`.

    A head that standardises what it reads is told here how, by the training clips, without masks.
    """
    learns = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    same, standardises = not (settings.mask_frames or settings.keep), hasattr(model.head, "standardise")
    if not learns <= {"norm", "head"} or not (same or standardises):
        return model, clips
    needed = split.train + split.val + split.test if same else split.train
    vectors = near(vectors_of(model, clips, needed, settings, machine), machine.device)
    if standardises:
        model.head.standardise(*mean_and_std(vectors, torch.tensor(split.train)))
    if not same:
        return model, clips
    return LastLayers(model), replace(clips, features=vectors, labels=clips.labels.to(vectors.device))


def mean_and_std(vectors: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each number over the vectors `index`, in float64."""
    pieces = index.to(vectors.device).split(256)
    mean = sum(vectors[piece].double().sum(0) for piece in pieces) / len(index)
    square = sum((vectors[piece].double() - mean).square().sum(0) for piece in pieces) / len(index)
    return mean, square.sqrt()


# ------------------------------------------------------------------------------------------------------------ the file


def vectors_of(model, clips, needed: list[int], settings, machine: Machine) -> torch.Tensor:
    """What the last layers read of each clip, (clips, numbers); rows that are not `needed` may be empty.

    float16, but float32 for `LastLayers`, whose vectors are short. A vector is computed once for all folds, seeds and
    later runs. A batch is a block of neighbouring clips, whatever the split: rounding may depend on the company, and a
    resumed run must get the bits of an unbroken one.
    """
    batch, (rank, world) = machine.micro_batch or settings.batch_size, ranks()
    rows, key, file = open_rows(model, clips, batch, settings, machine)
    blocks = torch.arange(len(rows)).split(batch)
    model.eval()
    for shares in (world, 1):  # one of them is mine; then what the others have not left here, or not whole
        # Of several runs at the same time one computes, and the others wait for it.
        with locked(file.with_name(f"{file.name}.{rank}of{world}")) if file else nullcontext():
            missing = [i for i in needed if rows["key"][i] != key or rows["crc"][i] != crc_of(rows[i])]
            if damaged := np.count_nonzero(rows["key"][missing]):
                warn(f"{file}: {damaged} damaged rows, computing them again")
            mine = [i for i in np.unique(np.array(missing, int) // batch) if i % shares == rank % shares]
            for i in mine and Bar(mine, "backbone", unit="block"):
                new = np.zeros(len(blocks[i]), rows.dtype)
                new["features"], new["key"] = compute(model, clips, blocks[i], settings, machine), key
                new["crc"] = [crc_of(row) for row in new]  # so that the program may end at any moment
                rows[blocks[i].numpy()] = new
        wait_for_all()
    return torch.from_numpy(rows["features"])


@torch.inference_mode()
def compute(model, clips, index: torch.Tensor, settings, machine: Machine) -> np.ndarray:
    """The vectors of some clips: what the head reads or, where the final LayerNorm learns, `LastLayers`."""
    x, _ = clips.batch(index.to(clips.features.device), machine.device)
    with autocast(machine.device, settings.dtype):
        if model.norm.weight.requires_grad:
            vectors = model.pool(F.layer_norm(model.encode(model.embed(x)), (model.config.dim,), eps=model.norm.eps))
        else:
            vectors = model.vector(x)
    return vectors.float().cpu().numpy()


def open_rows(model, clips, batch: int, settings, machine: Machine) -> tuple[np.ndarray, int, Path | None]:
    """Rows for the vectors of all clips, mapped into memory to be filled, the key of those that are, and their file.

    The file is known by what a vector is computed from and, for its rounding, by type, device and batch; it lies beside
    the folder of the features. It is not known by the version of PyTorch, nor by who multiplies on a CPU
    (support/onednn_linear.py): after an upgrade, or on CPUs that share it, it may have rows of either rounding. Clips
    without a file have rows without one.
    """
    numbers = next(module for module in model.head.modules() if isinstance(module, nn.Linear)).in_features
    kind = row_type((numbers,), "<f4" if model.norm.weight.requires_grad else "<f2")
    if clips.file is None:
        return np.zeros(len(clips.labels), kind), 1, None
    what = f"vectors 1, {kind}, {model.backbone.sha256}, {model.config}, {model.method.parts}, {settings.dtype}"
    digest = hashlib.sha256(f"{what}, {machine.device.type}, {batch} at once".encode())
    file = clips.file.parents[1] / "vectors" / f"{clips.file.stem}-{digest.hexdigest()[:8]}.npy"
    for block in clips.features.split(64):
        digest.update(block.cpu().contiguous().numpy())
    key = int.from_bytes(digest.digest()[:8], "little")
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file):
        rows = map_rows(file, kind)
        if rows is None or len(rows) != len(clips.labels) or not np.isin(rows["key"], np.array([0, key], "<u8")).all():
            with whole_file(file) as temporary:  # whoever has mapped the old one keeps it
                start_rows(temporary, kind, len(clips.labels))
        return np.load(file, mmap_mode="r+"), key, file
