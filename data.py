"""Sounds to features, and datasets to clips, folds and draws.

Top to bottom: `fbank` and `to_input` turn a waveform into what the AST reads; `spec_augment` and `patchout` thin it out
in training; `Dataset` and `Split` say which clips train and which test; `load_clips` computes all features of a
dataset once and `Clips` hands them out batch by batch. DATASETS, at the end, has one row for each dataset: a function
of `sounds/` that lists its clips, and how it is trained.
"""

import math
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ast_model import ASTConfig
from sounds import demo, own, paper
from sounds.audio import RATE, lengths_of, read_audio, typical_seconds
from sounds.cache import cached
from sounds.clip import PARTS, WHOLE, Listing, fragment, names_of  # PARTS: ("train", "val", "test"), as in Split
from sounds.groups import parts_of
from support.command import UserError, nearest
from support.speed import near

WINDOW, HOP, N_FFT = 400, 160, 512  # samples at RATE: 25 ms, 10 ms, and the next power of two
FPS = RATE / HOP  # frames per second
N_MELS = 128
MEAN, STD = -4.2677393, 4.5689974  # of the log-Mel values of AudioSet; the checkpoint was trained with them
FRONT_END = {  # the constants of the features; travel with every trained model
    "sample_rate": RATE, "window": WINDOW, "hop": HOP, "n_fft": N_FFT, "n_mels": N_MELS, "mean": MEAN, "std": STD,
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------- features


@lru_cache(maxsize=8)
def window_and_filters(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The symmetric Hann window (400,) and the triangular Mel filters (257, 128); cached, as every batch needs both."""
    low, high = (1127 * math.log(1 + hz / 700) for hz in (20, RATE / 2))  # the Kaldi Mel scale
    width = (high - low) / (N_MELS + 1)
    number = torch.arange(N_MELS)
    left, centre, right = low + number * width, low + (number + 1.0) * width, low + (number + 2.0) * width
    bins = 1127 * torch.log(1 + torch.arange(N_FFT // 2 + 1)[:, None] * (RATE / N_FFT) / 700)
    filters = torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp_min(0)
    filters[-1] = 0  # Kaldi leaves the Nyquist bin out
    return torch.hann_window(WINDOW, periodic=False).to(device), filters.to(device)


def fbank(waveforms: torch.Tensor) -> torch.Tensor:
    """Kaldi's log-Mel filterbank: waveforms (batch, samples) at 16 kHz in [-1, 1] to (batch, frames, 128), any device.

    A frame is 400 samples, frames start every 160, none reaches over the edge; less than one frame is padded with
    zeros. Operations, their order and so the rounding of most clips are those of `torchaudio.compliance.kaldi.fbank(
    waveform, sample_frequency=16000, window_type="hanning", num_mel_bins=128)`.
    """
    _, filters = window_and_filters(waveforms.device)
    waveforms = F.pad(waveforms, (0, max(0, WINDOW - waveforms.shape[-1])))
    frames = waveforms.unfold(-1, WINDOW, HOP)  # (batch, frames, 400)
    power = spectrum(frames).abs().square()  # (batch, frames, 257)
    return (power @ filters).clamp_min(2**-23).log()  # the floor is the float32 epsilon, as in Kaldi


def spectrum(frames: torch.Tensor) -> torch.Tensor:
    """The linear part of `fbank`, which an exporter replaces: frames (..., 400) to complex spectrum (..., 257)."""
    hann, _ = window_and_filters(frames.device)
    frames = frames - frames.mean(-1, keepdim=True)
    previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    frames = (frames - 0.97 * previous) * hann  # pre-emphasis, the first sample against itself
    return torch.fft.rfft(frames, N_FFT)


def to_input(fb: torch.Tensor, n_frames: int) -> torch.Tensor:
    """Filterbank (..., frames, 128) to what the AST reads, (..., n_frames, 128): pad with zeros or cut, then normalise.

    The order matters: the padding becomes (0 + 4.27) / 9.14 = 0.47, as in the extractor the checkpoint was trained
    with. The features get the standard deviation 0.5.
    """
    fb = F.pad(fb, (0, 0, 0, n_frames - fb.shape[-2]))  # negative padding cuts
    return (fb - MEAN) / (2 * STD)


def spec_augment(x: torch.Tensor, draws: torch.Tensor, max_frames: int = 80) -> torch.Tensor:
    """Set one frequency band and one time band of each clip to 0 (SpecAugment; Park et al., 2019).

    x: normalised features (batch, n_frames, n_mels), so 0 is their mean. draws: (batch, 4) uniform in [0, 1), on the
    device of x. The frequency band is U(0, 24) filters wide, the time band U(0, max_frames) frames, anywhere.
    """

    def band(size, limit, pair):  # (batch, 2) -> (batch, size), True where masked
        width = pair[:, :1] * min(limit, size)
        start = (pair[:, 1:] * (size - width)).floor()
        position = torch.arange(size, device=x.device)
        return (position >= start) & (position < start + width.floor())

    mels = band(x.shape[2], 24, draws[:, :2])
    frames = band(x.shape[1], max_frames, draws[:, 2:])
    return x.masked_fill(mels[:, None, :] | frames[:, :, None], 0)


def patchout(draws: torch.Tensor, keep: float) -> torch.Tensor:
    """Indices of the patches that a clip keeps in training (PaSST; Koutini et al., 2022), in order.

    draws: (batch, patches) uniform in [0, 1). Returns (batch, n), n being the share `keep` of the patches.
    """
    return draws.topk(max(1, round(keep * draws.shape[1])), dim=1).indices.sort(dim=1).values


# ------------------------------------------------------------------------------------------------- what a dataset is


@dataclass(frozen=True)
class Split:
    """Indices of clips. Without validation clips the last epoch's weights are tested, else the best epoch's."""

    train: list[int]
    val: list[int]
    test: list[int]


@dataclass(frozen=True)
class Dataset:
    """Clips with their labels, and one Split per fold. `labels[i]` is the class index of `paths[i]`.

    `folds` is empty where nobody has said which clips train and which test: `random_split` then draws it by seed.
    """

    name: str
    root: Path
    classes: list[str]
    paths: list[Path]
    labels: list[int]
    folds: dict[int, Split]
    groups: list[str] = field(default_factory=list)  # of all clips: a random split does not divide them; or empty
    spans: dict[int, tuple[float, float]] = field(default_factory=dict)  # of clips cut from a file: seconds

    @cached_property
    def names(self) -> list[str]:
        """Paths relative to `root`, with forward slashes and spans: the same wherever the dataset lies."""
        return [name + fragment(self.spans.get(i, WHOLE)) for i, name in enumerate(names_of(self.paths, self.root))]


@dataclass(frozen=True)
class Recipe:
    """A row of DATASETS: how its clips are listed, how it is trained; what the paper leaves open as in its code."""

    load: Callable[[Path | None, Path], Listing]  # (data_dir, cache_dir)
    n_frames: int | None  # one every 10 ms; None: as many as the clips have, see typical_seconds
    batch_size: int
    epochs: int
    mask: bool  # SpecAugment
    validate: bool = True  # where there are folds: one of them chooses the epoch
    weights: str = "audioset"  # the backbone to start from
    lr: dict[str, float] = field(default_factory=dict)  # by method, where it is not that of METHODS
    own: bool = False  # the user's own sounds: of any length, in classes of any size

    def masks(self, n_frames: int, wanted: bool = True) -> dict[str, bool | int]:
        """SpecAugment: 80 frames; of own sounds 80 in 500, and none below 2 s: it might hide all there is to hear."""
        mask = wanted and self.mask and not (self.own and n_frames < 2 * FPS)
        return {"mask": mask, "mask_frames": min(80, n_frames * 80 // 500) if mask and self.own else 80}


def load_dataset(name: str, data_dir: Path | None, cache_dir: Path, group=None, windows=None) -> Dataset:
    """A dataset of DATASETS, in `data_dir`, else `cache_dir`, else fetched; the rest: see sounds/own.py."""
    recipe = DATASETS[nearest(name, DATASETS, "dataset")]
    found = recipe.load(data_dir, cache_dir, **({"group": group, "windows": windows} if recipe.own else {}))
    number = {label: i for i, label in enumerate(found.classes or sorted({clip.label for clip in found.clips}))}
    labels = [number[clip.label] for clip in found.clips]
    folds = splits_of([clip.part for clip in found.clips], recipe.validate)
    paths = [clip.path for clip in found.clips]
    groups = [clip.group for clip in found.clips if clip.group]  # all clips have one, or none has
    spans = {i: clip.span for i, clip in enumerate(found.clips) if clip.span != WHOLE}
    dataset = Dataset(found.name or name, found.root, list(number), paths, labels, folds, groups, spans)
    if recipe.own:  # can these folds train and test?
        own.check_folds(dataset)
    return dataset


def splits_of(parts: list[str | int], validate: bool) -> dict[int, Split]:
    """The Split of every fold, clip i lying in `parts[i]`: train, val, test or a fold's number; "" for all if unsaid.

    Cross-validation: fold k tests the clips of fold k and trains on the others; with `validate`, and three folds or
    more, the fold before k (before the first: the last) chooses the epoch and does not train.
    """
    if set(parts) == {""}:
        return {}
    if set(parts) <= set(PARTS):
        return {1: split_of_parts(parts)}
    folds, splits = sorted(set(parts)), {}
    for position, test in enumerate(folds):
        val = folds[position - 1] if validate and len(folds) > 2 else None
        splits[test] = split_of_parts(["test" if k == test else "val" if k == val else "train" for k in parts])
    return splits


def split_of_parts(parts: list[str]) -> Split:
    """The Split in which clip i belongs to `parts[i]`: train, val or test."""
    return Split(*([i for i, part in enumerate(parts) if part == wanted] for wanted in PARTS))


def random_split(dataset: Dataset, seed: int) -> Split:
    """Of each class a fifth of the clips tests, a fifth validates, the rest trains, drawn with the seed.

    At least one clip of each class tests and, in classes of three or more, one validates. Groups stay whole.
    """
    if dataset.groups:
        return split_of_parts(parts_of(dataset.labels, dataset.groups, seed))
    rng, labels = np.random.default_rng(seed), np.array(dataset.labels)
    parts = np.full(len(labels), "train")
    for label in range(len(dataset.classes)):
        clips = rng.permutation(np.flatnonzero(labels == label))
        fifth = max(1, round(len(clips) / 5))
        parts[clips[:fifth]] = "test"
        if len(clips) > 2:
            parts[clips[fifth : 2 * fifth]] = "val"
    return split_of_parts(parts.tolist())


def folds_of(dataset: Dataset, seed: int, bad: Container[int] = (), shots: int | None = None) -> dict[int, Split]:
    """The dataset's folds, or one that the seed draws; without the clips `bad`, with `shots` clips per class.

    Raises UserError if nothing is left to train or test on; warns where nothing is left of a class.
    """
    folds = {}
    for fold, split in (dataset.folds or {1: random_split(dataset, seed)}).items():
        train, val, test = ([i for i in part if i not in bad] for part in (split.train, split.val, split.test))
        if shots:
            train = few_shot(dataset, train, shots, seed)
        if not train or not test:
            raise UserError(f"{dataset.root}: no clips left to {'test' if train else 'train'} on")
        folds[fold] = Split(train, val, test)
    return own.tell_of_gaps(dataset, folds)


def few_shot(dataset: Dataset, train: list[int], shots: int, seed: int) -> list[int]:
    """`shots` training clips per class, drawn with the seed (Table II). UserError if a class has fewer."""
    rng = np.random.default_rng(seed)
    drawn = []
    for label, name in enumerate(dataset.classes):
        available = [i for i in train if dataset.labels[i] == label]
        if len(available) < shots:
            raise UserError(f"--shots {shots}: class {name!r} has only {len(available)} training clips")
        drawn += rng.choice(available, shots, replace=False).tolist()
    return sorted(drawn)


# ------------------------------------------------------------------------------------------- features, batch by batch


def frames_for(recipe: Recipe, dataset: Dataset | None, seconds: float | None) -> int:
    """How many frames the model reads: those of `seconds` or of the recipe, else so many that 95 % of the clips fit."""
    if seconds is None and recipe.n_frames is not None:
        return recipe.n_frames
    if recipe.own and dataset:
        lengths = lengths_of(dataset.paths, dataset.spans)
        may_train = set().union(*(split.train for split in dataset.folds.values())) or range(len(lengths))
        seconds = seconds or typical_seconds(lengths[sorted(may_train)])
        own.tell_of_cuts(dataset, lengths, seconds)
    return max(ASTConfig.patch, round(seconds * FPS))


@dataclass(frozen=True)
class Clips:
    """Float16 features (clips, n_frames, n_mels) or a probe's vectors, and labels (clips,): on the device or the CPU.

    `file` has the features, if one does: vectors, what a probe reads of each clip, lie near it (support/vectors.py).
    `check` is called before features of these clips are read: of those in a file it mends the damaged ones.
    """

    features: torch.Tensor
    labels: torch.Tensor
    file: Path | None = None
    check: Callable[[torch.Tensor], None] = lambda index: None

    def batch(self, index: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Clips `index`, which lies where the features lie, on `device` in float32.

        From main memory to a GPU they go through pinned memory: such a copy lets the program run on, so that it gathers
        the next batch while the GPU still computes with this one.
        """
        self.check(index)
        x, y = self.features[index], self.labels[index]
        if device.type == "cuda" and x.device.type == "cpu":
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(device, non_blocking=True).float(), y.to(device, non_blocking=True)


def load_clips(
    dataset: Dataset, n_frames: int, device: torch.device, cache_dir: Path, skip_bad: bool
) -> tuple[Clips, dict[int, str]]:
    """All clips of a dataset; and, by index, why a clip has no features.

    They are computed once, on all cores, and kept under `cache_dir`. On a GPU they lie in its memory if they fit; else
    they stay on disk. Unreadable clips are listed, and a UserError is raised unless `skip_bad`.
    """
    seconds = (n_frames * HOP + WINDOW) / RATE + 0.1  # the rest would be cut

    def compute(i: int) -> np.ndarray:
        start, end = dataset.spans.get(i, WHOLE)
        wave = torch.from_numpy(read_audio(dataset.paths[i], min(seconds, end - start), start))
        return to_input(fbank(wave[None]), n_frames)[0].numpy()  # (n_frames, 128)

    # Raise the 2 when a formula above changes: features kept before are then not found.
    key = f"front end 2, {RATE} {WINDOW} {HOP} {N_FFT} {N_MELS} {MEAN} {STD}, {n_frames} frames"
    rows, bad, check = cached(dataset, (n_frames, N_MELS), key, compute, cache_dir, skip_bad)
    if device.type == "cuda":  # `near` reads all rows, if they fit
        check(torch.arange(len(rows)))
        check = Clips.check  # nothing is left to check
    features = near(torch.from_numpy(rows), device)
    return Clips(features, torch.tensor(dataset.labels, device=features.device), Path(rows.filename), check), bad


# ---------------------------------------------------------------------------------------------- the table of datasets


DATASETS = {
    "esc50": Recipe(paper.esc50, n_frames=500, batch_size=32, epochs=50, mask=True),
    "esc10": Recipe(paper.esc10, n_frames=500, batch_size=32, epochs=50, mask=True),
    "us8k": Recipe(paper.us8k, n_frames=400, batch_size=32, epochs=30, mask=True, validate=False),
    "gsc": Recipe(paper.gsc, n_frames=100, batch_size=128, epochs=75, mask=False),
    "fsc": Recipe(paper.fsc, n_frames=400, batch_size=32, epochs=75, mask=False),
    "folder": Recipe(own.folder, n_frames=None, batch_size=32, epochs=50, mask=True, own=True),
    "csv": Recipe(own.table, n_frames=None, batch_size=32, epochs=50, mask=True, own=True),
    # One-second sounds. No masking: 80 of 98 frames would leave nothing to hear.
    "demo": Recipe(demo.target, n_frames=98, batch_size=16, epochs=4, mask=False, weights="demo"),
    "demo_source": Recipe(
        demo.source, n_frames=98, batch_size=32, epochs=14, mask=False, weights="random:demo", lr={"full_ft": 1e-3}
    ),
}
