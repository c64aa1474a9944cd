"""Sounds that are there twice, under other names or in other formats; and silent sounds."""

import math

import torch
import torch.nn.functional as F

from support.command import first_of, warn
from support.processes import say

CELL = (4, 8)  # frames and bands whose power is averaged
FLOOR = -50.0  # dB: cells that are so far below the loudest one hold no sound
ALIKE = 0.7  # dB; see `pairs_of`
NATS = 2 * 4.5689974  # what 1 is in the features: data.to_input divides by twice data.STD
LEAST = 2**-23 * math.exp(4.2677393)  # power: the floor of data.fbank, less data.MEAN
SILENT = 100  # times LEAST, or 20 dB: noise with a peak of about 2e-4, six steps of 16 bits


def warn_of_copies(dataset, features: torch.Tensor, folds: dict) -> None:
    """Warn of sounds that are in two parts of a fold: the model is tested on what it has learned.

    A second warning says how many clips are silent. They are no copies of each other.

    features: those of `data.load_clips`. folds: the Split of every fold, by its number.
    """
    parts = []  # for each fold: what its clips are used for
    for split in folds.values():
        parts.append({i: part for part, clips in vars(split).items() for i in clips})
    used = sorted(set().union(*parts))
    apart = []
    levels = levels_of(features, used)
    silent = [dataset.names[used[i]] for i in silent_of(levels)]
    if silent:
        warn(
            f"{dataset.root}: {len(silent)} of {len(used)} clips are silent, nearly all zeros "
            f"({first_of(silent)}): each trains or tests as its class, --skip-silent leaves them "
            "out"
        )
    for a, b in pairs_of(levels):
        i, j = sorted((used[a], used[b]))
        if any(i in part_of and j in part_of and part_of[i] != part_of[j] for part_of in parts):
            apart.append((i, j))
    if apart:
        names = [f"{dataset.names[i]} = {dataset.names[j]}" for i, j in sorted(apart)]
        warn(
            f"{dataset.root}: {len(names)} pairs of clips in different parts are the same sound "
            f"({first_of(names)}): the model is tested on what it has learned; remove one of each "
            "pair, or keep both in one part, by your split or by --group"
        )


def silent_clips(features: torch.Tensor) -> dict[int, str]:
    """{clip: why it is left out} of the clips that are nearly all zeros. Says how many."""
    levels = levels_of(features, list(range(len(features))))
    found = dict.fromkeys(silent_of(levels), "silent")
    say(f"--skip-silent: going on without {len(found)} of {len(features)} clips")
    return found


def silent_of(levels: torch.Tensor) -> list[int]:
    """The rows of levels (clips, cells) of clips without sound."""
    return (levels.amax(1) == FLOOR).nonzero()[:, 0].tolist()


def levels_of(features: torch.Tensor, clips: list[int]) -> torch.Tensor:
    """The levels (clips, cells) of some clips, in dB of the loudest cell of each, FLOOR or more.

    They are relative to that cell because a copy may be louder. A silent clip has FLOOR in all
    cells: what little the floor of the features leaves of its noise would look like a copy.
    """
    levels = []
    for some in torch.tensor(clips).split(32):
        x = features[some.to(features.device)].cpu().float()  # (some, frames, bands)
        is_silent = x.amax(2) == x.amin(2)  # frames of padding, or of zeros
        power = x.mul_(NATS).exp_()
        power[is_silent] = 0
        cells = F.avg_pool2d(power[:, None], CELL).flatten(1)  # (some, cells)
        loudest = cells.amax(1, keepdim=True)
        cells[loudest[:, 0] < SILENT * LEAST] = 0
        cells /= loudest.clamp_min(LEAST)
        levels.append((10 * cells.log10()).clamp_min(FLOOR))
    return torch.cat(levels)


def pairs_of(levels: torch.Tensor) -> list[tuple[int, int]]:
    """The pairs of clips whose levels differ by less than ALIKE.

    The difference is the root of the mean square over the cells that hold sound. It is zero for
    copies in WAV and FLAC, and small for MP3, Ogg Vorbis and Opus of a good quality. Copies of a
    low quality are not found. Two pieces of one steady noise differ by about twice ALIKE.

    The clips are sorted by their mean level, because that of copies differs by less than ALIKE.
    """
    means, order = levels.mean(1).sort()
    levels = levels[order]
    limits = ALIKE * (levels > FLOOR).sum(1).sqrt()
    pairs = []
    for first in range(0, len(order), 64):
        block = slice(first, first + 64)
        end = int(torch.searchsorted(means, means[block][-1] + ALIKE))
        distances = torch.cdist(levels[block], levels[first:end])  # (64, clips)
        for a, b in (distances < limits[block, None]).nonzero().tolist():
            if a < b:
                pairs.append((int(order[first + a]), int(order[first + b])))
    return pairs
