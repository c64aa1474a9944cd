"""Sounds to features, and datasets to clips and folds.

`fbank` and `to_input` turn a waveform into what the AST reads. `spec_augment` masks it in training.
`Dataset` and `Split` say which clips train, validate and test. `load_clips` computes the features
of a dataset once, and `Clips` hands them out batch by batch. DATASETS has one row for each dataset:
a function of `sounds/` that lists its clips, and how it is trained.
"""

import math
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ast_model import ASTConfig, UserError
from sounds import demo, own, paper
from sounds.audio import read_audio
from sounds.cache import cached
from sounds.clip import names_of

RATE = 16_000  # samples per second; read_audio resamples to it
WINDOW = 400  # samples in a frame: 25 ms
HOP = 160  # samples from one frame to the next: 10 ms
N_FFT = 512  # the next power of two
FPS = RATE / HOP  # frames per second
N_MELS = 128
MEAN = -4.2677393  # of the log-Mel values of AudioSet; the checkpoint was trained with it
STD = 4.5689974  # likewise
FRONT_END = {  # save_trained writes it into every header
    "sample_rate": RATE,
    "window": WINDOW,
    "hop": HOP,
    "n_fft": N_FFT,
    "n_mels": N_MELS,
    "mean": MEAN,
    "std": STD,
}

# ----------------------------------------------------------------------------------------- features

FRONT_END_VERSION = 2  # increase it when a formula below changes, so that old features are not used


@lru_cache(maxsize=8)
def hann_window(device: torch.device) -> torch.Tensor:
    """The symmetric Hann window, (400,). It fades a frame out at both ends."""
    return torch.hann_window(WINDOW, periodic=False).to(device)


@lru_cache(maxsize=8)
def mel_filters(device: torch.device) -> torch.Tensor:
    """128 triangular filters between 20 Hz and 8 kHz, one in each column of (257, 128).

    The Mel scale is Kaldi's, 1127 ln(1 + Hz / 700). It follows human hearing, which tells low
    frequencies apart better than high ones: the filters are narrow below and wide above.
    """
    low = 1127 * math.log(1 + 20 / 700)
    high = 1127 * math.log(1 + RATE / 2 / 700)
    step = (high - low) / (N_MELS + 1)
    number = torch.arange(N_MELS)
    left = low + number * step
    centre = low + (number + 1.0) * step
    right = low + (number + 2.0) * step
    bins = 1127 * torch.log(1 + torch.arange(N_FFT // 2 + 1)[:, None] * (RATE / N_FFT) / 700)
    rising = (bins - left) / (centre - left)
    falling = (right - bins) / (right - centre)
    filters = torch.minimum(rising, falling).clamp_min(0)
    filters[-1] = 0  # Kaldi leaves the Nyquist bin out
    return filters.to(device)


def fbank(waveforms: torch.Tensor) -> torch.Tensor:
    """Kaldi's log-Mel filterbank: waveforms (batch, samples) in [-1, 1] to (batch, frames, 128).

    A frame has 400 samples, a new frame starts every 160 samples, and no frame reaches over the
    end. A sound shorter than one frame is padded with zeros. Hearing judges loudness by ratios, and
    the logarithm turns ratios into differences.

    The operations and their order are those of `torchaudio.compliance.kaldi.fbank(waveform,
    sample_frequency=16000, window_type="hanning", num_mel_bins=128)`. Most clips come out equal to
    the last bit.
    """
    waveforms = F.pad(waveforms, (0, max(0, WINDOW - waveforms.shape[-1])))
    frames = waveforms.unfold(-1, WINDOW, HOP)  # (batch, frames, 400)
    power = spectrum(frames).abs().square()  # (batch, frames, 257)
    mel = power @ mel_filters(waveforms.device)  # (batch, frames, 128)
    return mel.clamp_min(2**-23).log()  # the floor is the float32 epsilon, as in Kaldi


def spectrum(frames: torch.Tensor) -> torch.Tensor:
    """Frames (..., 400) to their complex spectrum (..., 257)."""
    frames = frames - frames.mean(-1, keepdim=True)
    previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    frames = frames - 0.97 * previous  # pre-emphasis; the first sample precedes itself
    return torch.fft.rfft(frames * hann_window(frames.device), N_FFT)


def to_input(fb: torch.Tensor, n_frames: int) -> torch.Tensor:
    """Filterbank (..., frames, 128) to what the AST reads, (..., n_frames, 128).

    First pad with zeros or cut, then normalise. The order matters: the padding becomes
    (0 + 4.27) / 9.14 = 0.47, as in the feature extractor of the checkpoint. Dividing by twice the
    standard deviation leaves a standard deviation of 0.5, as in the original AST.
    """
    fb = F.pad(fb, (0, 0, 0, n_frames - fb.shape[-2]))  # negative padding cuts
    return (fb - MEAN) / (2 * STD)


def spec_augment(x: torch.Tensor, draws: torch.Tensor, max_frames: int = 80) -> torch.Tensor:
    """Set one frequency band and one time band of each clip to 0 (SpecAugment; Park et al., 2019).

    x: normalised features (batch, n_frames, n_mels). Their mean over AudioSet is 0.
    draws: (batch, 4), uniform in [0, 1), on the device of x. The caller draws them, so that a clip
    gets the same mask however its batch is cut into pieces.

    The widths are U(0, 24) filters and U(0, max_frames) frames, rounded down.
    """

    def band(size, widest, uniform):  # uniform (batch, 2) -> (batch, size), True where masked
        width = uniform[:, :1] * min(widest, size)
        start = (uniform[:, 1:] * (size - width)).floor()
        position = torch.arange(size, device=x.device)
        return (position >= start) & (position < start + width.floor())

    masked_mels = band(x.shape[2], 24, draws[:, :2])
    masked_frames = band(x.shape[1], max_frames, draws[:, 2:])
    return x.masked_fill(masked_mels[:, None, :] | masked_frames[:, :, None], 0)


# -------------------------------------------------------------------------------- what a dataset is


@dataclass(frozen=True)
class Split:
    """Indices of the clips that train, choose the best epoch, and test. `val` may be empty."""

    train: list[int]
    val: list[int]
    test: list[int]


@dataclass(frozen=True)
class Dataset:
    """Clips with their labels, and one Split for each fold. `labels[i]` is the class of `paths[i]`.

    `folds` is empty if nobody has said which clips train and which test. `random_split` then draws
    one fold from the seed.
    """

    name: str
    root: Path
    classes: list[str]
    paths: list[Path]
    labels: list[int]
    folds: dict[int, Split]
    groups: list[str] = field(default_factory=list)  # a random split does not divide a group
    # Clips that are a piece of a file: by their index, start and end in seconds.
    spans: dict[int, tuple[float, float]] = field(default_factory=dict)
    group_hint: str = ""  # a pattern for --group, if files are named like pieces of recordings

    @cached_property
    def names(self) -> list[str]:
        """Paths relative to `root`, with their spans: the same wherever the dataset lies."""
        return names_of(self.paths, self.root, self.spans)


@dataclass(frozen=True)
class Recipe:
    """One row of DATASETS: how to list the clips of a dataset, and how to train on them.

    Where the paper does not give a value for its four datasets, it is that of the authors' code.
    """

    load: Callable  # (data_dir, cache_dir), own sounds see sounds/own.py: returns a Listing
    n_frames: int | None  # one every 10 ms; None: by the lengths of the clips, see frames_for
    batch_size: int
    epochs: int
    mask: bool  # whether SpecAugment masks the training clips
    validate: bool = True  # in cross-validation one of the folds chooses the epoch
    weights: str = "audioset"  # the backbone to start from
    lr: dict[str, float] = field(default_factory=dict)  # by method, if it is not that of METHODS
    own: bool = False  # the user's own sounds: of any length, in classes of any size

    def widest_mask(self, n_frames: int) -> int:
        """Frames of the widest time mask of SpecAugment; 0 means no masks at all.

        For the datasets of the paper that are masked it is 80, which is 16 % of ESC-50's frames.
        For own sounds it is 16 % of their frames, at most 80. Own sounds below 2 s have no masks,
        because most of such a clip may be padding, and a mask could cover the sound.
        """
        if not self.mask:
            return 0
        if not self.own:
            return 80
        return min(80, n_frames * 80 // 500) if n_frames >= 2 * FPS else 0


def load_dataset(
    name: str, data_dir: Path | None, cache_dir: Path, group=None, windows=None, background=False
) -> Dataset:
    """A dataset of DATASETS, from `data_dir` or `cache_dir`, or else downloaded.

    Three options are for own sounds (see sounds/own.py). `group` is a regular expression that finds
    in a path what must stay together. `windows` are the seconds of the pieces that recordings are
    cut into. With `background`, what is not labelled in recordings is a class.

    The loader of the dataset returns a Listing: root folder, clips, spans, and perhaps class names
    and a name of its own. A clip has a path, a label, and perhaps a group. Its `part` says what it
    is for: train, val, test or the number of a fold.
    """
    if name not in DATASETS:
        raise UserError(f"unknown dataset {name!r}: there are {', '.join(DATASETS)}")
    recipe = DATASETS[name]
    if recipe.own:
        found = recipe.load(name, data_dir, group, windows, background)
    else:
        found = recipe.load(data_dir, cache_dir)
    classes = found.classes or sorted({clip.label for clip in found.clips})
    number = {label: i for i, label in enumerate(classes)}
    return Dataset(
        name=found.name or name,
        root=found.root,
        classes=classes,
        paths=[clip.path for clip in found.clips],
        labels=[number[clip.label] for clip in found.clips],
        folds=splits_of([clip.part for clip in found.clips], recipe.validate),
        groups=[clip.group for clip in found.clips if clip.group],  # of every clip, or of none
        spans=found.spans,
        group_hint=found.group_hint,
    )


def splits_of(parts: list[str | int], validate: bool) -> dict[int, Split]:
    """The Split of every fold. Clip i lies in `parts[i]`: train, val, test or the number of a fold.

    If every part is "", the dataset does not say which clips train. Then there are no folds yet.

    Cross-validation: fold k tests the clips of part k and trains on the others. With `validate`,
    and three folds or more, the part before k (before the first: the last) chooses the epoch.
    """
    if set(parts) == {""}:
        return {}
    if set(parts) <= {"train", "val", "test"}:
        return {1: split_of_parts(parts)}
    folds = sorted(set(parts))
    splits = {}
    for position, test in enumerate(folds):
        roles = dict.fromkeys(folds, "train")
        if validate and len(folds) > 2:
            roles[folds[position - 1]] = "val"
        roles[test] = "test"
        splits[test] = split_of_parts([roles[part] for part in parts])
    return splits


def split_of_parts(parts: list[str]) -> Split:
    """The Split in which clip i belongs to `parts[i]`: train, val or test."""
    indices = {"train": [], "val": [], "test": []}
    for i, part in enumerate(parts):
        indices[part].append(i)
    return Split(**indices)


def random_split(dataset: Dataset, seed: int) -> Split:
    """A fifth of each class tests, a fifth validates, and the rest trains, drawn with the seed.

    At least one clip of each class tests, so a class of one clip does not train. In classes of
    three or more, at least one validates. Groups stay whole. If then nothing validates, as with two
    recordings, a quarter of the pieces that train does.
    """
    if dataset.groups:
        parts = own.parts_of(dataset.labels, dataset.groups, seed)
        if dataset.spans and "val" not in parts:
            parts = own.with_stretches(parts, dataset.labels, dataset.paths, dataset.spans, seed)
        return split_of_parts(parts)
    rng = np.random.default_rng(seed)
    labels = np.array(dataset.labels)
    parts = np.full(len(labels), "train")
    for label in range(len(dataset.classes)):
        clips = rng.permutation(np.flatnonzero(labels == label))
        fifth = max(1, round(len(clips) / 5))
        parts[clips[:fifth]] = "test"
        if len(clips) > 2:
            parts[clips[fifth : 2 * fifth]] = "val"
    return split_of_parts(parts.tolist())


def folds_of(
    dataset: Dataset, seed: int, bad: Container[int] = (), shots: int | None = None
) -> dict[int, Split]:
    """The dataset's folds, or one that the seed draws.

    The clips `bad` are left out, and `shots` clips per class train if it is given.
    """
    folds = {}
    for fold, split in (dataset.folds or {1: random_split(dataset, seed)}).items():
        train = [i for i in split.train if i not in bad]
        val = [i for i in split.val if i not in bad]
        test = [i for i in split.test if i not in bad]
        if shots:
            train = few_shot(dataset, train, shots, seed)
        if not train or not test:
            missing = "test" if train else "train"
            raise UserError(f"{dataset.root}: no clips left to {missing} on")
        folds[fold] = Split(train, val, test)
    return folds


def few_shot(dataset: Dataset, train: list[int], shots: int, seed: int) -> list[int]:
    """`shots` training clips per class, drawn with the seed (Table II)."""
    rng = np.random.default_rng(seed)
    drawn = []
    for label, name in enumerate(dataset.classes):
        available = [i for i in train if dataset.labels[i] == label]
        if len(available) < shots:
            raise UserError(
                f"--shots {shots}: class {name!r} has only {len(available)} training clips"
            )
        drawn += rng.choice(available, shots, replace=False).tolist()
    return sorted(drawn)


# ------------------------------------------------------------------------- features, batch by batch


def frames_for(recipe: Recipe, dataset: Dataset | None, seconds: float | None) -> int:
    """How many frames the model reads.

    `seconds` decides, or else the recipe. The recipe of own sounds has no number. There it is the
    length that 95 % of the clips fit into. Own sounds need `dataset`, and a line is printed about
    what is cut off.
    """
    if seconds is None and recipe.n_frames is not None:
        return recipe.n_frames
    if recipe.own and dataset:
        seconds = own.seconds_of(dataset, seconds)
    return max(ASTConfig.patch, round(seconds * FPS))


@dataclass(frozen=True)
class Clips:
    """What a network reads of each clip, and labels (clips,), both on the same device.

    `features` are those of `load_clips`: (clips, n_frames, n_mels), float16. Last layers that train
    alone (see train.run) get Clips whose features are the vectors that they read, (clips, numbers).
    `file` is where the features are kept, if anywhere.
    """

    features: torch.Tensor
    labels: torch.Tensor
    file: Path | None = None

    def batch(self, index: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Features in float32 and labels of the clips `index`, on `device`.

        `index` lies where the features lie. From main memory to a GPU they go through pinned
        memory. Such a copy does not wait for the GPU, so the next batch is gathered while the GPU
        computes with this one.
        """
        x = self.features[index]
        y = self.labels[index]
        if device.type == "cuda" and x.device.type == "cpu":
            x = x.pin_memory()
            y = y.pin_memory()
        return x.to(device, non_blocking=True).float(), y.to(device, non_blocking=True)


def load_clips(
    dataset: Dataset, n_frames: int, device: torch.device, cache_dir: Path, skip_bad: bool
) -> tuple[Clips, dict[int, str]]:
    """All clips of a dataset, and {index: reason} of the clips that cannot be read.

    The features are computed once, on all cores, and `cached` keeps them in float16. They go to the
    memory of a GPU if they take less than half of what is free there, and else stay on disk.
    Unreadable clips are a UserError unless `skip_bad`.
    """
    longest = (n_frames * HOP + WINDOW) / RATE + 0.1  # seconds to read, with a margin to resample

    def compute(i: int) -> np.ndarray:
        start, end = dataset.spans.get(i, (0.0, math.inf))
        wave = torch.from_numpy(read_audio(dataset.paths[i], min(longest, end - start), start))
        return to_input(fbank(wave[None]), n_frames)[0].numpy()  # (n_frames, 128)

    numbers = f"{RATE} {WINDOW} {HOP} {N_FFT} {N_MELS} {MEAN} {STD}"
    key = f"front end {FRONT_END_VERSION}, {numbers}, {n_frames} frames"
    rows, bad = cached(dataset, (n_frames, N_MELS), key, compute, cache_dir, skip_bad)
    features = torch.from_numpy(rows)
    if device.type == "cuda" and 2 * features.nbytes < torch.cuda.mem_get_info(device)[0]:
        features = features.to(device)
    labels = torch.tensor(dataset.labels, device=features.device)
    return Clips(features, labels, Path(rows.filename)), bad  # rows are mapped from a file


# ---------------------------------------------------------------------------- the table of datasets


DATASETS = {
    "esc50": Recipe(paper.esc50, n_frames=500, batch_size=32, epochs=50, mask=True),
    "esc10": Recipe(paper.esc10, n_frames=500, batch_size=32, epochs=50, mask=True),
    "us8k": Recipe(paper.us8k, n_frames=400, batch_size=32, epochs=30, mask=True, validate=False),
    # One second makes 98 frames. Two more are padding, as in the authors' code.
    "gsc": Recipe(paper.gsc, n_frames=100, batch_size=128, epochs=75, mask=False),
    "fsc": Recipe(paper.fsc, n_frames=400, batch_size=32, epochs=75, mask=False),
    "folder": Recipe(own.load, n_frames=None, batch_size=32, epochs=50, mask=True, own=True),
    "csv": Recipe(own.load, n_frames=None, batch_size=32, epochs=50, mask=True, own=True),
    # No masking: 80 of 98 frames would leave nothing to hear.
    "demo": Recipe(demo.target, n_frames=98, batch_size=16, epochs=4, mask=False, weights="demo"),
    "demo_source": Recipe(  # the demo's task of 68 other kinds of sound, to pretrain on
        demo.source,
        n_frames=98,
        batch_size=32,
        epochs=14,
        mask=False,
        weights="random:demo",
        lr={"full_ft": 1e-3},
    ),
}
