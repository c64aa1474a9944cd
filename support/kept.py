"""What a frozen backbone makes of each clip, computed once and kept on disk: what `linear` and `probe` train on."""

import hashlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import nn
from tqdm import tqdm

from support.command import warn
from support.files import whole_file
from support.processes import is_first, ranks, wait_for_all
from support.rows import crc_of, map_rows, row_type, start_rows
from support.speed import Machine, autocast, near


class Probe(nn.Module):
    """Final LayerNorm and head of a model, the parameters themselves, on pooled tokens that are normalised already.

    The scale and shift of the LayerNorm are the same for all tokens, so they may as well come after the pooling.
    """

    def __init__(self, model):
        super().__init__()
        self.norm, self.head = model.norm, model.head

    def forward(self, pooled):  # (batch, dim)
        return self.head(pooled * self.norm.weight + self.norm.bias)  # (batch, n_classes)


def probed(model, clips, split, settings, machine: Machine):
    """What learns and from what: the last layers alone from kept vectors, where nothing before them learns and every
    epoch sees the same clips; else `model` and `clips`.

    A head that standardises what it reads is told here how, from the training clips, without masks.
    """
    learns = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    same, standardises = not (settings.mask or settings.keep), hasattr(model.head, "standardise")
    if not learns <= {"norm", "head"} or not (same or standardises):
        return model, clips
    needed = split.train + split.val + split.test if same else split.train
    vectors = near(kept_vectors(model, clips, needed, "norm" in learns, settings, machine), machine.device)
    if standardises:
        model.head.standardise(*mean_and_std(vectors, torch.tensor(split.train)))
    if not same:
        return model, clips
    network = Probe(model) if "norm" in learns else model.head
    return network, replace(clips, features=vectors, labels=clips.labels.to(vectors.device))


def mean_and_std(vectors: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each number over the vectors `index`, in float64."""
    pieces = index.to(vectors.device).split(256)
    mean = sum(vectors[piece].double().sum(0) for piece in pieces) / len(index)
    square = sum((vectors[piece].double() - mean).square().sum(0) for piece in pieces) / len(index)
    return mean, square.sqrt()


# ----------------------------------------------------------------------------------------------------------- vectors


def kept_vectors(model, clips, needed: list[int], learns_norm: bool, settings, machine: Machine) -> torch.Tensor:
    """What the head of `model` reads of each clip, (clips, numbers), float16; of other clips than `needed` perhaps not.

    Where the final LayerNorm learns, it is what `Probe` reads, in float32: few numbers, and no rounding. A vector is
    computed once for all folds, seeds and later runs, and lies beside the features that it was computed from.
    """
    numbers = next(module for module in model.head.modules() if isinstance(module, nn.Linear)).in_features
    kind, batch = row_type((numbers,), "<f4" if learns_norm else "<f2"), machine.micro_batch or settings.batch_size
    if clips.file is None:
        rows, key, file = np.zeros(len(clips.labels), kind), 1, None
    else:  # rounding, too, depends on device and batch
        what = f"vectors 1, {model.backbone.sha256}, {model.config}, {model.method.parts}, {learns_norm}, "
        digest = hashlib.sha256(f"{what}{settings.dtype}, {machine.device.type}, {batch} at once".encode())
        file = clips.file.parents[1] / "vectors" / f"{clips.file.stem}-{digest.hexdigest()[:8]}.npy"
        for block in clips.features.split(64):
            digest.update(block.cpu().contiguous().numpy())
        key = int.from_bytes(digest.digest()[:8], "little")
        rows = rows_of(file, kind, len(clips.labels), key)

    def vector(x):
        if learns_norm:
            return model.pool(F.layer_norm(model.encode(x), (model.config.dim,), eps=model.norm.eps))
        return model.vector(x)

    model.eval()
    rank, world = ranks()
    for share in (slice(rank, None, world), slice(None)):  # then what the others have not left here, or not whole
        # Of several runs at the same time one computes, and the others wait for it.
        with FileLock(f"{file}.{rank}of{world}.lock") if file else nullcontext():
            missing = [i for i in needed if rows["key"][i] != key or rows["crc"][i] != crc_of(rows[i])]
            damaged = np.count_nonzero(rows["key"][missing])
            if damaged:
                warn(f"{file}: {damaged} damaged rows, computing them again")
            fill(rows, key, missing, batch, share, vector, clips, settings, machine)
        wait_for_all()
    return torch.from_numpy(rows["features"])


def rows_of(file: Path, kind: np.dtype, count: int, key: int) -> np.memmap:
    """The file's rows, mapped into memory to be filled; all of them empty if it had others than those of `key`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        rows = map_rows(file, kind)
        if rows is None or len(rows) != count or np.setdiff1d(rows["key"], [0, key]).size:
            with whole_file(file) as temporary:  # whoever has mapped the old one keeps it
                start_rows(temporary, kind, count)
        return np.load(file, mmap_mode="r+")


@torch.inference_mode()
def fill(rows, key: int, missing: list[int], batch: int, share: slice, vector, clips, settings, machine: Machine):
    """Compute the rows `missing`, or this process's share of them.

    A batch is a block of neighbouring clips, whatever the split: rounding may depend on the company, and a resumed run
    must get the bits of an unbroken one. A row has its checksum, so the program may end at any moment.
    """
    blocks = torch.arange(len(rows)).split(batch)
    blocks = [blocks[i] for i in np.unique(np.array(missing, int) // batch)[share]]
    for index in tqdm(blocks, "backbone", unit="batch", disable=None if blocks and is_first() else True):
        x, _ = clips.batch(index.to(clips.features.device), machine.device)
        with autocast(machine.device, settings.dtype):
            made = vector(x).float().cpu().numpy()
        new = np.zeros(len(index), rows.dtype)
        new["features"], new["key"] = made, key
        new["crc"] = [crc_of(row) for row in new]
        rows[index.numpy()] = new
