"""Sounds to features, and datasets to clips, folds and draws (section III-A of the paper).

Top to bottom: `fbank` and `to_input` turn a waveform into what the AST reads; `spec_augment` masks it in training;
`read_audio` decodes any file; `Dataset` and `Split` say which clips train and which test; `build_features` computes
the features of a dataset once and keeps them on disk; `download` and `unpack` fetch a dataset. The datasets themselves
are at the end, one function and one row of DATASETS each: those of the paper, then your own sounds.
"""

import csv
import gzip
import hashlib
import http.client
import math
import os
import re
import secrets
import shutil
import stat
import sys
import tarfile
import tempfile
import time
import tokenize
import urllib.request
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import platformdirs
import soundfile
import soxr
import torch
from filelock import FileLock
from tqdm import tqdm

import demo_sounds
from ast_model import UserError

RATE = 16_000  # Hz
WINDOW, HOP, N_FFT = 400, 160, 512  # samples: 25 ms, 10 ms, and the next power of two
N_MELS = 128
MEAN, STD = -4.2677393, 4.5689974  # of the log-Mel values of AudioSet; the checkpoint was trained with them
FRONT_END = {  # all that decides the features of a sound; travels with every trained model
    "sample_rate": RATE, "window": WINDOW, "hop": HOP, "n_fft": N_FFT, "n_mels": N_MELS, "mean": MEAN, "std": STD,
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------- features


@lru_cache(maxsize=8)
def window_and_filters(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The symmetric Hann window (400,) and the triangular Mel filters (257, 128), made once per device."""
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
    zeros. The operations and their order are those of `torchaudio.compliance.kaldi.fbank(waveform,
    sample_frequency=16000, window_type="hanning", num_mel_bins=128)`, so that even the rounding is the same.
    """
    _, filters = window_and_filters(waveforms.device)
    waveforms = torch.nn.functional.pad(waveforms, (0, max(0, WINDOW - waveforms.shape[-1])))
    frames = waveforms.unfold(-1, WINDOW, HOP)  # (batch, frames, 400)
    power = spectrum(frames).abs().square()  # (batch, frames, 257)
    return (power @ filters).clamp_min(2**-23).log()  # the floor is the float32 epsilon, as in Kaldi


def spectrum(frames: torch.Tensor) -> torch.Tensor:
    """The linear part of `fbank`: frames (..., 400) to their complex spectrum (..., 257)."""
    hann, _ = window_and_filters(frames.device)
    frames = frames - frames.mean(-1, keepdim=True)
    previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    frames = (frames - 0.97 * previous) * hann  # pre-emphasis, the first sample against itself
    return torch.fft.rfft(frames, N_FFT)


def to_input(fb: torch.Tensor, n_frames: int) -> torch.Tensor:
    """Filterbank (..., frames, 128) to what the AST reads, (..., n_frames, 128): pad with zeros or cut, then normalise.

    The order matters: the padding becomes (0 + 4.27) / 9.14, as in the extractor the checkpoint was trained with.
    """
    fb = torch.nn.functional.pad(fb, (0, 0, 0, n_frames - fb.shape[-2]))  # negative padding cuts
    return (fb - MEAN) / (2 * STD)


def spec_augment(x: torch.Tensor, draws: torch.Tensor, max_mels: int = 24, max_frames: int = 80) -> torch.Tensor:
    """Set one frequency band and one time band of each clip to 0 (SpecAugment; Park et al., 2019).

    x: normalised features (batch, n_frames, n_mels). draws: (batch, 4) uniform in [0, 1), on the device of x. The band
    is U(0, 24) filters wide and the other U(0, 80) frames, each at a uniform position.
    """

    def band(size, limit, width, start):  # draws (batch, 1) -> (batch, size), True where masked
        width = width * min(limit, size)
        start = (start * (size - width)).floor()
        position = torch.arange(size, device=x.device)
        return (position >= start) & (position < start + width.floor())

    mel_width, mel_start, frame_width, frame_start = draws.unsqueeze(-1).unbind(1)
    mels = band(x.shape[2], max_mels, mel_width, mel_start)
    frames = band(x.shape[1], max_frames, frame_width, frame_start)
    return x.masked_fill(mels[:, None, :] | frames[:, :, None], 0)


# How libsndfile's log puts it that a WAV or AIFF file ends before its header says: "data : 88200 (should be 44078)".
_TOO_SHORT = re.compile(r"^ ?(?:data|SSND) *: (\d+) \(should be ([1-9]\d*)\)", re.MULTILINE)
_UNKNOWN_LENGTH = 0x7FFF_F000  # a program that writes into a pipe puts this many bytes or more into the header
_NO_LENGTH = 2**63 - 1  # samples that libsndfile reports for a FLAC file written into a pipe
_MAY_BE_MISSING = 0.1  # seconds: an encoder that rounds the length is no truncated file


def read_audio(path: Path, seconds: float = math.inf) -> np.ndarray:
    """The first `seconds` of a sound file as mono float32 at 16 kHz, (samples,). Raises as `stream_audio` does."""
    return np.concatenate(list(stream_audio(path, seconds)))


def stream_audio(path: Path, seconds: float = math.inf) -> Iterator[np.ndarray]:
    """What `read_audio` returns, in blocks of ten seconds: a long file takes no more memory than a short one.

    Reads what libsndfile reads: WAV of any kind, FLAC, OGG, MP3, at any rate, with any number of channels. Raises
    ValueError with the reason for a file that is no audio, holds no samples, ends before the header says (within the
    first `seconds`), or holds values that are not finite.
    """
    try:
        with open(path, "rb") as opened:  # says why a file cannot be opened; libsndfile would say "system error"
            if not opened.read(1):
                raise ValueError("is empty (0 bytes)")
        with soundfile.SoundFile(os.fsencode(path)) as file:  # bytes: a name need not be UTF-8
            rate = file.samplerate
            wanted = min(_length_in_header(file), seconds * rate)  # samples per channel
            there = math.ceil(min(wanted, file.frames))
            resampler, read = soxr.ResampleStream(rate, RATE, num_channels=1), 0
            while len(samples := file.read(min(10 * rate, there - read), dtype="float32", always_2d=True)):
                read += len(samples)
                wave = samples.mean(axis=1)  # (samples,)
                if not np.isfinite(wave).all():
                    raise ValueError("holds samples that are not finite")
                yield resampler.resample_chunk(wave)
    # TypeError: a name in .raw, of unknown rate. MemoryError: a damaged header promises more than any memory holds.
    except (soundfile.LibsndfileError, OSError, TypeError, MemoryError) as error:
        reason = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
        if "not recognised" in reason or "does not exist" in reason:  # it exists, it has just been opened
            reason = "is in no known sound format"
        raise ValueError(reason.removeprefix("Error : ")) from None
    if not read:
        raise ValueError("holds no samples")
    if read < wanted - _MAY_BE_MISSING * rate:
        raise ValueError(f"is truncated: it ends after {read / rate:.2f} s, before its header says")
    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)  # what the filter still holds back


def _length_in_header(file: soundfile.SoundFile) -> float:
    """Samples per channel that the header promises; for WAV and AIFF `file.frames` counts what is there instead."""
    claim = _TOO_SHORT.search(file.extra_info)
    if claim and int(claim[1]) < _UNKNOWN_LENGTH:
        return file.frames * int(claim[1]) / int(claim[2])
    if "Ogg: Junk after the last page" in file.extra_info:  # cut inside a page; how much is missing cannot be known
        return math.inf
    if file.frames == _NO_LENGTH:
        raise ValueError("does not say how long it is: write it to a file again, not into a pipe")
    return file.frames


def length_of(path: Path) -> float:
    """Seconds of sound in a file, from its header; nan where there is no readable one."""
    try:
        info = soundfile.info(os.fsencode(path))
        return info.frames / info.samplerate if info.frames < _NO_LENGTH else math.nan
    except (soundfile.LibsndfileError, TypeError):
        return math.nan


# ------------------------------------------------------------------------------------------------- what a dataset is

PARTS = ("train", "val", "test")


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

    def names(self) -> list[str]:
        """Paths relative to `root`, with forward slashes: the same wherever the dataset lies."""
        return [Path(os.path.relpath(path, self.root)).as_posix() for path in self.paths]


def splits_of_folds(fold_of: list[int], validate: bool) -> dict[int, Split]:
    """Cross-validation: fold k tests the clips of fold k and trains on the others, clip i lying in `fold_of[i]`.

    With `validate` the fold before k (before the first: the last) chooses the epoch and does not train.
    """
    folds = sorted(set(fold_of))
    splits = {}
    for position, test in enumerate(folds):
        val = folds[position - 1] if validate else None
        parts = ["test" if fold == test else "val" if fold == val else "train" for fold in fold_of]
        splits[test] = split_of_parts(parts)
    return splits


def split_of_parts(parts: list[str]) -> Split:
    """The Split in which clip i belongs to `parts[i]`: train, val or test."""
    return Split(*([i for i, part in enumerate(parts) if part == wanted] for wanted in PARTS))


def random_split(dataset: Dataset, seed: int) -> Split:
    """Of each class a fifth of the clips tests, a fifth validates, the rest trains, drawn with the seed.

    At least one clip of each class tests and, in classes of three or more, one validates.
    """
    rng = np.random.default_rng(seed)
    parts = np.full(len(dataset.labels), "train")
    for label in range(len(dataset.classes)):
        clips = rng.permutation(np.flatnonzero(np.array(dataset.labels) == label))
        fifth = max(1, round(len(clips) / 5))
        parts[clips[:fifth]] = "test"
        if len(clips) > 2:
            parts[clips[fifth : 2 * fifth]] = "val"
    return split_of_parts(parts.tolist())


def typical_seconds(dataset: Dataset) -> float:
    """95th percentile of the lengths of the clips that may train, at most 10.24 s: what the AST was pretrained on."""
    training = set().union(*(split.train for split in dataset.folds.values())) or range(len(dataset.paths))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        seconds = np.array(list(pool.map(length_of, (dataset.paths[i] for i in sorted(training)))))
    seconds = seconds[np.isfinite(seconds)]
    return min(10.24, float(np.percentile(seconds, 95))) if len(seconds) else 10.24


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


# -------------------------------------------------------------------------------------------------------- the cache


def default_cache_dir() -> Path:
    return Path(platformdirs.user_cache_dir("ast-petl", appauthor=False))


@contextmanager
def whole_file(path: Path):
    """Yields a temporary path beside `path` that takes its place at the end: readers see all of the file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # process numbers repeat on other machines
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


_BLOCK = 64  # clips in memory at once while features are built or checked


def _row_type(n_frames: int) -> np.dtype:
    """One clip in the cache. `key` says what it was built from, `crc` that it is intact; key 0 is an empty row."""
    features = ("features", "<f2", (n_frames, N_MELS))
    return np.dtype([("key", "<u8"), ("crc", "<u4"), ("bad", "<u4"), features])


def _row_key(path: Path, name: str, n_frames: int) -> int:
    """Changes when the file, its `name` in the dataset or the front end changes; the number 2 is for new formulas."""
    info = path.stat()
    front_end = f"front end 2, {RATE} {WINDOW} {HOP} {N_FFT} {N_MELS} {MEAN} {STD}, {n_frames} frames"
    source = f"{front_end}, {name}, {info.st_size} bytes, modified {info.st_mtime_ns}"
    return int.from_bytes(hashlib.sha256(os.fsencode(source)).digest()[:8], "little")


def _read_clip(path: Path, n_frames: int) -> np.ndarray:
    return read_audio(path, seconds=(n_frames * HOP + WINDOW) / RATE + 0.1)  # the rest would be cut


def _make_row(path: Path, key: int, n_frames: int) -> np.ndarray:
    row = np.zeros(1, _row_type(n_frames))
    try:
        wave = torch.from_numpy(_read_clip(path, n_frames))
        row["features"] = to_input(fbank(wave[None]), n_frames).numpy()
    except ValueError:
        row["bad"] = 1
    row["key"], row["crc"] = key, _crc(row[0])
    return row


def _crc(row: np.void) -> int:
    return zlib.crc32(row["features"], int(row["bad"]))


def _read_index(path: Path, n_frames: int) -> np.ndarray | None:
    """`key` and `bad` of every row of a feature file, (clips,); a damaged row has key 0. None if there is no such file.

    Reads the file block by block: mapped into memory, all of it would count as memory of this process.
    """
    if not path.exists():
        return None
    try:
        rows = np.load(path, mmap_mode="r")
        if rows.dtype != _row_type(n_frames) or rows.ndim != 1:
            raise ValueError("holds something else")
    except (ValueError, OSError, EOFError, OverflowError, tokenize.TokenError):  # what NumPy raises for a bad header
        print(f"{path}: not a whole feature file, building it again", file=sys.stderr)
        return None
    index = np.zeros(len(rows), [("key", "<u8"), ("bad", "?")])
    damaged = 0
    with open(path, "rb") as file:
        file.seek(rows.offset)
        for start in range(0, len(rows), _BLOCK):
            block = np.fromfile(file, rows.dtype, min(_BLOCK, len(rows) - start))
            broken = [bool(row["key"]) and _crc(row) != row["crc"] for row in block]
            damaged += sum(broken)
            index["key"][start : start + _BLOCK] = np.where(broken, 0, block["key"])
            index["bad"][start : start + _BLOCK] = block["bad"]
    if damaged:
        print(f"{path}: {damaged} damaged rows, building them again", file=sys.stderr)
    return index


def build_features(
    dataset: Dataset, n_frames: int, cache_dir: Path, skip_bad: bool = False
) -> tuple[np.ndarray, dict[int, str]]:
    """Features of all clips, float16 (clips, n_frames, 128), memory-mapped; and why clips have none, by their index.

    Built once, with all cores, and kept under `cache_dir`: a second call only checks the file. A build that was killed
    goes on where it was; clips that changed on disk are built again, the others kept. The file lands by one rename
    under a lock, so any number of processes may ask for it at once. Unreadable clips are listed, and a UserError is
    raised unless `skip_bad`.
    """
    where = hashlib.sha256(os.fsencode(dataset.root.resolve())).hexdigest()[:8]
    path = cache_dir / "features" / f"{dataset.name}-{n_frames}-{where}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    named = zip(dataset.paths, dataset.names(), strict=True)
    keys = np.array([_row_key(clip, name, n_frames) for clip, name in named], dtype="<u8")

    def reasons(index):  # read again for the reason: the file knows only that there was one
        return {i: _why_bad(dataset.paths[i], n_frames) for i in np.flatnonzero(index["bad"]).tolist()}

    with FileLock(f"{path}.lock"):
        index = _read_index(path, n_frames)
        whole = index is not None and np.array_equal(index["key"], keys)
        bad = reasons(index) if whole else {}
        if not whole or "" in bad.values():  # a file that can be read by now
            _build_rows(path, index, keys, dataset, n_frames)
            bad = reasons(_read_index(path, n_frames))
        rows = np.load(path, mmap_mode="c")  # copy on write: nothing done to the array reaches the file
    if bad:
        for i, reason in bad.items():
            print(f"  {dataset.paths[i]}: {reason}", file=sys.stderr)
        if not skip_bad:
            raise UserError(
                f"{len(bad)} of {len(rows)} sound files cannot be used (listed above): mend them, or add --skip-bad to "
                "train without them"
            )
        print(f"--skip-bad: going on without {len(bad)} of {len(rows)} clips", file=sys.stderr)
    return rows["features"], bad


def _build_rows(path: Path, index: np.ndarray | None, keys: np.ndarray, dataset: Dataset, n_frames: int) -> None:
    """Fill the rows that are missing, in `.partial.npy`; then it takes the place of `path`, whose index is `index`.

    Every row carries its key and checksum, so the partial file may be left at any moment and taken up again.
    """
    partial = path.with_suffix(".partial.npy")
    started = _read_index(partial, n_frames)
    if started is None or len(started) != len(keys):
        _start_partial(partial, path, index, keys, n_frames)
        started = _read_index(partial, n_frames)
    missing = np.flatnonzero((started["key"] != keys) | started["bad"])
    if len(missing) < len(keys) or index is not None:
        print(f"features of {dataset.name}: {len(missing)} of {len(keys)} clips are new, changed or unfinished")
    progress = tqdm(total=len(missing), desc=f"features of {dataset.name}", unit="clip", disable=None)
    start, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)  # one clip is too small to share between cores; each core takes its own
    try:
        with open(partial, "r+b") as file, ThreadPoolExecutor(os.cpu_count()) as pool, progress:
            offset = np.load(partial, mmap_mode="r").offset
            for first in range(0, len(missing), _BLOCK):
                block = missing[first : first + _BLOCK]
                made = pool.map(lambda i: _make_row(dataset.paths[i], keys[i], n_frames), block)
                for i, row in zip(block.tolist(), made, strict=True):
                    file.seek(offset + i * row.nbytes)
                    file.write(row.tobytes())
                    progress.update()
    finally:
        torch.set_num_threads(threads)
    os.replace(partial, path)
    rate = len(missing) / (time.perf_counter() - start)
    print(f"features of {dataset.name}: built {len(missing)} of {len(keys)} clips, {rate:.0f} clips/s, kept in {path}")


def _start_partial(partial: Path, path: Path, index: np.ndarray | None, keys: np.ndarray, n_frames: int) -> None:
    """An empty feature file for `keys`, with the rows that `path` (whose index is `index`) already has."""
    rows = np.lib.format.open_memmap(partial, mode="w+", dtype=_row_type(n_frames), shape=(len(keys),))
    with open(partial, "r+b") as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is an OSError now; later it would end a build of hours
            os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        if index is None:
            return
        row_of = {key: row for row, key in enumerate(index["key"].tolist()) if key}
        with open(path, "rb") as old:
            old_offset = np.load(path, mmap_mode="r").offset
            for i, key in enumerate(keys.tolist()):
                if key in row_of:
                    old.seek(old_offset + row_of[key] * rows.itemsize)
                    file.seek(rows.offset + i * rows.itemsize)
                    file.write(old.read(rows.itemsize))


def _why_bad(path: Path, n_frames: int) -> str:
    try:
        _read_clip(path, n_frames)
    except ValueError as error:
        return str(error)
    return ""


# ------------------------------------------------------------------------------------------------ download and unpack


@dataclass(frozen=True)
class Source:
    """What a published dataset looks like on disk, and where it comes from."""

    folder: str  # its name under the cache folder
    marker: str  # a file by which its root is recognised
    layout: str  # what else the root holds, for messages
    url: str | None = None  # None: its owners hand it out on request
    by_hand: str = "download it by hand"
    checksum: str | None = None  # of the archive, "md5:..." or "sha256:..."


def locate(source: Source, data_dir: Path | None, cache_dir: Path) -> Path:
    """The root of a dataset: in `data_dir` (a folder or an archive), else under `cache_dir`, downloaded when absent."""
    by_hand = f"{source.by_hand} and give the archive or the unpacked folder as --data-dir (it holds {source.layout})"
    folder = data_dir
    if data_dir is None or data_dir.is_file():
        folder = cache_dir / source.folder
        if data_dir is not None:  # another archive is unpacked into another folder
            info = data_dir.stat()
            identity = f"{data_dir.resolve()} {info.st_size} {info.st_mtime_ns}"
            folder = cache_dir / f"{source.folder}-{hashlib.sha256(os.fsencode(identity)).hexdigest()[:8]}"
        elif source.url is None and not folder.exists():
            raise UserError(f"{source.folder} cannot be downloaded: {by_hand}")
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # two runs that start together download once
            if not folder.exists():
                download_to = cache_dir / f"{source.folder}.archive"
                unpack(data_dir or download(source.url, download_to, by_hand, source.checksum), folder)
                download_to.unlink(missing_ok=True)
    elif not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir}: no such folder or archive; it should hold {source.layout}")
    # An archive may add a folder of its own, and the user may point at the folder that holds the dataset.
    found = sorted(folder.glob(source.marker)) + sorted(folder.glob(f"*/{source.marker}"))
    if not found:
        raise UserError(f"{folder} does not hold {source.marker}: {by_hand}")
    return found[0].parents[len(Path(source.marker).parts) - 1]


def download(url: str, target: Path, by_hand: str, checksum: str | None = None) -> Path:
    """Fetch `url` into the file `target`, with a progress bar. `by_hand` ends the error message: the way without it.

    `checksum` is "md5:..." or "sha256:...", in hexadecimal digits; a file with another one is not kept.
    """
    algorithm, _, expected = (checksum or "sha256:").partition(":")
    digest = hashlib.new(algorithm)
    try:
        with urllib.request.urlopen(url, timeout=30) as response, whole_file(target) as temporary:
            size = int(response.headers.get("Content-Length") or 0)
            bar = tqdm(total=size or None, desc=target.name, unit="B", unit_scale=True, disable=None)
            with open(temporary, "wb") as file, bar:
                while block := response.read(1 << 20):
                    file.write(block)
                    digest.update(block)
                    bar.update(len(block))
            if size and temporary.stat().st_size != size:
                raise OSError(f"the connection ended after {temporary.stat().st_size} of {size} bytes")
            if expected and digest.hexdigest() != expected:
                raise OSError(f"its {algorithm.upper()} is {digest.hexdigest()}, not {expected}")
    except (OSError, http.client.HTTPException) as error:  # OSError is what urllib raises, too
        raise UserError(f"cannot download {url} ({getattr(error, 'reason', error)}): {by_hand}") from None
    return target


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or a tar (compressed or not) into the new folder `folder`, whole or not at all.

    Raises UserError for a damaged archive and for members that would land outside the folder, links and devices.
    """
    temporary = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir(parents=True)

    def refuse(name, ordinary):
        if not ordinary or not (temporary / name).resolve().is_relative_to(temporary.resolve()):
            raise UserError(f"{archive}: refusing {name!r}, a link, a device or a path that leaves the folder")

    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                for member in _progress(zipped.infolist(), archive):
                    kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where the archive was not made on Unix
                    refuse(member.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
                    zipped.extract(member, temporary)
        else:
            with tarfile.open(archive) as tar:
                for member in _progress(tar, archive):
                    refuse(member.name, member.isreg() or member.isdir())
                    tar.extract(member, temporary, filter="data")  # drops owners and odd permissions as well
        os.replace(temporary, folder)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = str(error).splitlines()[0].rstrip(":") if str(error) else "it ends too early"
        raise UserError(f"{archive} is not a whole zip or tar archive ({reason}): download it again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _progress(members: Iterable, archive: Path) -> Iterable:
    return tqdm(members, desc=f"unpacking {archive.name}", unit="file", disable=None)


# ------------------------------------------------------------------------------------------- the datasets of the paper

ESC50 = Source(
    "ESC-50", "meta/esc50.csv", "meta/esc50.csv and audio/*.wav",
    url="https://github.com/karolpiczak/ESC-50/archive/master.zip",  # packed on request: no checksum
)  # fmt: skip
US8K = Source(
    "UrbanSound8K", "metadata/UrbanSound8K.csv", "metadata/UrbanSound8K.csv and audio/fold1/ to audio/fold10/",
    url="https://zenodo.org/records/1203745/files/UrbanSound8K.tar.gz?download=1",
    checksum="md5:9aa69802bbf37fb986f71ec1483a196e",
)  # fmt: skip
GSC = Source(
    "speech_commands_v0.02", "validation_list.txt", "validation_list.txt, testing_list.txt and WORD/*.wav",
    url="https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
    checksum="sha256:af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
)  # fmt: skip
FSC = Source(
    "fluent_speech_commands_dataset", "data/train_data.csv",
    "data/train_data.csv, valid_data.csv and test_data.csv, and wavs/speakers/SPEAKER/*.wav",
    by_hand="request it from Fluent.ai (https://fluent.ai/fluent-speech-commands-a-dataset-for-spoken-language-"
    "understanding-research/)",
)  # fmt: skip


def esc50(data_dir: Path | None, cache_dir: Path, only_esc10: bool = False) -> Dataset:
    """ESC-50 (Piczak, 2015): 2,000 clips of 5 s, 50 classes, 5 folds; ESC-10 is 10 of its classes.

    Fold k tests fold k, validates on fold k-1 (fold 1 on fold 5) and trains on the other three. Clips cut from one
    recording are in one fold. `data_dir` is the unpacked release or its zip; without it the release is downloaded.
    """
    root = locate(ESC50, data_dir, cache_dir)
    table = root / "meta" / "esc50.csv"
    rows = read_table(table, ["filename", "fold", "target", "category", "esc10"], integers=["fold", "target"])
    if only_esc10:
        rows = [row for row in rows if row["esc10"].lower() == "true"]
        if not rows:
            raise UserError(f"{table}: no row has esc10 = True; is it the table of the release?")
    classes, labels = _numbered(rows, "target", "category")
    paths = [root / "audio" / row["filename"] for row in rows]
    require_files(root, paths)
    folds = splits_of_folds([int(row["fold"]) for row in rows], validate=True)
    expected = (10, 400) if only_esc10 else (50, 2000)
    if (len(classes), len(rows)) != expected:
        warn(f"{root}: {len(rows)} clips of {len(classes)} classes, where the release has %d of %d" % expected[::-1])
    return Dataset("esc10" if only_esc10 else "esc50", root, classes, paths, labels, folds)


def esc10(data_dir: Path | None, cache_dir: Path) -> Dataset:
    """The ten ESC-10 classes of ESC-50, with its folds."""
    return esc50(data_dir, cache_dir, only_esc10=True)


def us8k(data_dir: Path | None, cache_dir: Path) -> Dataset:
    """UrbanSound8K (Salamon, Jacoby and Bello, 2014): 8,732 clips of up to 4 s, 10 classes, 10 folds.

    Fold k tests fold k and trains on the other nine, so there are no validation clips. Clips cut from one recording
    (`fsID`) are in one fold.
    """
    root = locate(US8K, data_dir, cache_dir)
    table = root / "metadata" / "UrbanSound8K.csv"
    rows = read_table(table, ["slice_file_name", "fold", "classID", "class"], integers=["fold", "classID"])
    classes, labels = _numbered(rows, "classID", "class")
    paths = [root / "audio" / f"fold{row['fold']}" / row["slice_file_name"] for row in rows]
    require_files(root, paths)
    folds = splits_of_folds([int(row["fold"]) for row in rows], validate=False)
    return Dataset("us8k", root, classes, paths, labels, folds)


def gsc(data_dir: Path | None, cache_dir: Path) -> Dataset:
    """Google Speech Commands V2 (Warden, 2018): 105,829 clips of 1 s, 35 words.

    Two files list the clips that validate and that test; all others train. Speakers do not cross these lists.
    """
    root = locate(GSC, data_dir, cache_dir)
    part_of = {}
    for part, file in (("val", root / "validation_list.txt"), ("test", root / "testing_list.txt")):
        if not file.is_file():
            raise UserError(f"{root} does not hold {file.name}; the dataset has {GSC.layout}")
        for name in file.read_text(encoding="utf-8").split():
            if part_of.setdefault(name, part) != part:
                raise UserError(f"{root}: {name} is in validation_list.txt and in testing_list.txt: mend the lists")
    require_files(root, [root / name for name in part_of])
    clips = root.glob("[!._]*/[!.]*.wav")  # _background_noise_ is no word
    names = sorted(f"{path.parent.name}/{path.name}" for path in clips)
    words = sorted({name.split("/")[0] for name in names})
    labels = [words.index(name.split("/")[0]) for name in names]
    split = split_of_parts([part_of.get(name, "train") for name in names])
    return Dataset("gsc", root, words, [root / name for name in names], labels, {1: split})


def fsc(data_dir: Path | None, cache_dir: Path) -> Dataset:
    """Fluent Speech Commands (Lugosch et al., 2019): 30,043 utterances, 31 intents, a table for each part.

    An intent is the three columns action, object and location together. Speakers are in one part only.
    """
    root = locate(FSC, data_dir, cache_dir)
    paths, intents, parts = [], [], []
    for part, file in zip(PARTS, ("train_data.csv", "valid_data.csv", "test_data.csv"), strict=True):
        for row in read_table(root / "data" / file, ["path", "action", "object", "location"]):
            paths.append(root / row["path"])
            intents.append(f"{row['action']}/{row['object']}/{row['location']}")
            parts.append(part)
    require_files(root, paths)
    classes = sorted(set(intents))
    return Dataset("fsc", root, classes, paths, [classes.index(i) for i in intents], {1: split_of_parts(parts)})


def _numbered(rows: list[dict[str, str]], number: str, name: str) -> tuple[list[str], list[int]]:
    """Classes in the order of their column `number`, and the class index of each row; ESC-10 has 10 of 50 numbers."""
    names = {int(row[number]): row[name] for row in rows}
    numbers = sorted(names)
    return [names[n] for n in numbers], [numbers.index(int(row[number])) for row in rows]


def read_table(path: Path, columns: Iterable[str], integers: Iterable[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV file with a header line; UserError if one of `columns` is missing or no whole number."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [column for column in columns if column not in (reader.fieldnames or [])]
            rows = [] if missing else list(reader)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such table") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path} ({error}): it must be a CSV file in UTF-8") from None
    if missing:
        raise UserError(f"{path}: no column {missing[0]!r}; its header is {', '.join(reader.fieldnames or ['empty'])}")
    if not rows:
        raise UserError(f"{path}: no rows beneath the header")
    for line, row in enumerate(rows, start=2):
        if any(row[column] is None for column in columns):
            raise UserError(f"{path}, line {line}: too few columns; is the file whole?")
        for column in integers:
            if not row[column].isdecimal():
                raise UserError(f"{path}, line {line}: {column} is {row[column]!r}; it must be a whole number")
    return rows


def require_files(root: Path, paths: list[Path]) -> None:
    """UserError that counts the missing files and names the first five."""
    missing = [os.path.relpath(path, root) for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{root}: {len(missing)} of {len(paths)} files are missing ({_first(missing)}): complete it")


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


# ----------------------------------------------------------------------------------------------------- your own sounds

SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au")


def folder(data_dir: Path | None, cache_dir: Path) -> Dataset:
    """One sub-folder of `data_dir` for each class, with the sounds anywhere beneath it.

    Above the classes there may be train/, test/ and perhaps val/; otherwise `random_split` draws them.
    """
    if data_dir is None or not data_dir.is_dir():
        problem = "needs --data-dir" if data_dir is None else f"--data-dir {data_dir} is no folder"
        raise UserError(f"--dataset folder: {problem}: give the folder that holds one folder of sound files per class")
    given = any(path.is_dir() for path in data_dir.glob("train/[!.]*"))
    if given:
        unknown = [path.name for path in _folders(data_dir) if path.name not in PARTS]
        if unknown:
            raise UserError(f"{data_dir}: beside train/ there may be val/ and test/ only, not {_first(unknown)}")
    paths, names, parts, ignored = [], [], [], []
    for part in PARTS if given else ("",):
        for class_folder in _folders(data_dir / part) if (data_dir / part).is_dir() else []:
            files = sorted(file for file in class_folder.rglob("[!.]*") if file.is_file())
            sounds = [file for file in files if file.suffix.lower() in SUFFIXES]
            if not sounds:
                raise UserError(f"{class_folder} holds no sounds ({', '.join(SUFFIXES)}): fill it or remove it")
            ignored += [os.path.relpath(file, data_dir) for file in files if file.suffix.lower() not in SUFFIXES]
            paths, names = paths + sounds, names + [class_folder.name] * len(sounds)
            parts += [part] * len(sounds)
    if ignored:
        warn(f"{data_dir}: {len(ignored)} files are no {', '.join(SUFFIXES)}, ignored ({_first(ignored)})")
    return own_sounds(data_dir, data_dir.resolve().name, paths, names, parts)


def table(data_dir: Path | None, cache_dir: Path) -> Dataset:
    """A CSV file with the columns path and label, and perhaps split (train, val, test) or fold (a number).

    Paths are relative to the file. Fold k tests fold k and, of three or more, validates on the one before it.
    """
    if data_dir is None or not data_dir.is_file():
        problem = "needs --data-dir" if data_dir is None else f"--data-dir {data_dir} is no file"
        raise UserError(f"--dataset csv: {problem}: give a CSV file with the columns path and label")
    rows = read_table(data_dir, ["path", "label"])
    if "split" in rows[0] and "fold" in rows[0]:
        raise UserError(f"{data_dir}: has a column split and a column fold; only one of them can say what trains")
    column = next((column for column in ("split", "fold") if column in rows[0]), None)
    for line, row in enumerate(rows, start=2):
        if not row["path"] or not row["label"] or (column and not row[column]):
            raise UserError(f"{data_dir}, line {line}: an empty path, label or {column or 'column'}")
        if column == "split" and row["split"] not in PARTS:
            raise UserError(f"{data_dir}, line {line}: split is {row['split']!r}; it must be train, val or test")
        if column == "fold" and not row["fold"].isdecimal():
            raise UserError(f"{data_dir}, line {line}: fold is {row['fold']!r}; it must be a whole number")
    paths = [data_dir.parent / row["path"] for row in rows]
    parts = [row[column] if column else "" for row in rows]
    first = {}
    for path, part in zip(paths, parts, strict=True):
        if path in first:
            where = f"in {column} {first[path]} and {part}" if column and first[path] != part else "twice"
            raise UserError(f"{data_dir}: {path} is listed {where}: every clip must be listed once")
        first[path] = part
    require_files(data_dir.parent, paths)
    return own_sounds(data_dir.parent, data_dir.stem, paths, [row["label"] for row in rows], parts)


def own_sounds(root: Path, name: str, paths: list[Path], names: list[str], parts: list[str]) -> Dataset:
    """A Dataset of the user's clips: `names[i]` is the class of `paths[i]`, `parts[i]` train, val, test, a fold or "".

    Raises UserError for what cannot be trained or tested and warns of what is probably a mistake.
    """
    classes = sorted(set(names))
    if len(classes) < 2:
        raise UserError(f"{root}: {len(classes)} classes; there must be two or more to tell apart")
    labels = [classes.index(name) for name in names]
    folds = {}
    if set(parts) <= set(PARTS):
        folds = {1: split_of_parts(parts)}
    elif set(parts) != {""}:
        folds = splits_of_folds([int(part) for part in parts], validate=len(set(parts)) > 2)
    for fold, split in folds.items():
        if not split.train or not split.test:
            raise UserError(f"{root}: no clips to {'test' if split.train else 'train'}: say which in the data")
        training, testing = (Counter(names[i] for i in clips) for clips in (split.train, split.test))
        for class_name in classes:
            if not training[class_name]:
                raise UserError(f"{root}: class {class_name!r} has no training clips in fold {fold}: add some")
            if training[class_name] == 1:
                warn(f"{root}: class {class_name!r} has one training clip in fold {fold}")
            if not testing[class_name]:
                warn(f"{root}: class {class_name!r} has no test clips in fold {fold}")
    alone = [class_name for class_name, count in Counter(names).items() if count == 1]
    if alone and not folds:
        raise UserError(f"{root}: class {alone[0]!r} has one clip; one to train and one to test are needed")
    dataset = Dataset(name, root, classes, paths, labels, folds)
    warn_of_copies(dataset, parts)
    return dataset


def warn_of_copies(dataset: Dataset, parts: list[str]) -> None:
    """Warn of files with the same content in different parts: what has been trained on would be tested."""

    def middle(path):  # the ends may be silence that many files share
        with open(path, "rb") as file:
            file.seek(path.stat().st_size // 2)
            return file.read(4096)

    groups = [list(range(len(dataset.paths)))]
    # From quick to slow: hardly any file is read as a whole.
    for key in (lambda path: path.stat().st_size, middle, lambda path: hashlib.sha256(path.read_bytes()).digest()):
        alike = defaultdict(list)
        for number, group in enumerate(groups):
            for i in group:
                alike[number, key(dataset.paths[i])].append(i)
        groups = [group for group in alike.values() if len(group) > 1]
    if dataset.folds:
        groups = [group for group in groups if len({parts[i] for i in group}) > 1]
    if groups:
        names = dataset.names()
        where = "in different splits" if dataset.folds else "and may come into different splits"
        copies = _first([" = ".join(names[i] for i in group) for group in groups])
        warn(f"{dataset.root}: {len(groups)} sounds are there more than once {where} ({copies})")


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


DEMO_SEED = 0  # of the sounds; the seed of a run decides how it learns, not what it hears


def demo(data_dir: Path | None, cache_dir: Path) -> Dataset:
    """The ten target classes of `demo_sounds`: 200 clips each to train, 40 to validate, 100 to test."""
    return rendered("demo", demo_sounds.TARGET, (200, 40, 100), data_dir, cache_dir)


def demo_source(data_dir: Path | None, cache_dir: Path) -> Dataset:
    """The source classes of `demo_sounds`, on which the backbone `--weights demo` was pretrained: 200 + 10 + 10."""
    return rendered("demo_source", demo_sounds.SOURCE, (200, 10, 10), data_dir, cache_dir)


def rendered(
    name: str, classes: Iterable[str], sizes: tuple[int, int, int], data_dir: Path | None, cache_dir: Path
) -> Dataset:
    """Sounds that `demo_sounds` makes, rendered once to 16-bit WAV files. One fold, as in Speech Commands.

    sizes: clips per class to train, to validate and to test. The name of the folder carries a hash of the synthesiser,
    so that changed recipes are rendered anew.
    """
    if data_dir is not None:
        raise UserError(f"--data-dir {data_dir}: {name} makes its own sounds; leave --data-dir out")
    classes, per_class = sorted(classes), range(sum(sizes))
    recipe = f"{Path(demo_sounds.__file__).read_text(encoding='utf-8')} {sizes} {DEMO_SEED}"
    root = cache_dir / f"{name}-{zlib.crc32(recipe.encode()):08x}"
    wanted = [(kind, index) for kind in classes for index in per_class]
    paths = [root / kind / f"{index:03d}.wav" for kind, index in wanted]
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{root}.lock"):  # two runs that start together render once
        if not all(path.is_file() for path in paths):
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root.parent) as temporary:
                for kind, index in tqdm(wanted, desc=f"rendering {name}", unit="clip", disable=None):
                    path = Path(temporary, root.name, kind, f"{index:03d}.wav")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    soundfile.write(path, demo_sounds.render(kind, index, DEMO_SEED), RATE, subtype="PCM_16")
                shutil.rmtree(root, ignore_errors=True)  # some of its files were deleted
                os.replace(Path(temporary, root.name), root)
    parts = [part for part, size in zip(PARTS, sizes, strict=True) for _ in range(size)]  # of the clips of a class
    split = split_of_parts([parts[index] for _, index in wanted])
    return Dataset(name, root, classes, paths, [classes.index(kind) for kind, _ in wanted], {1: split})


@dataclass(frozen=True)
class Recipe:
    """How the paper trains on a dataset; every number can be changed on the command line."""

    load: Callable[[Path | None, Path], Dataset]  # (data_dir, cache_dir)
    n_frames: int | None  # of 10 ms; None: as many as the clips have, see typical_seconds
    batch_size: int
    epochs: int
    mask: bool  # SpecAugment
    weights: str = "audioset"  # the backbone to start from
    lr: dict[str, float] = field(default_factory=dict)  # by method, where it is not that of METHODS


DATASETS = {
    "esc50": Recipe(esc50, n_frames=500, batch_size=32, epochs=50, mask=True),
    "esc10": Recipe(esc10, n_frames=500, batch_size=32, epochs=50, mask=True),
    "us8k": Recipe(us8k, n_frames=400, batch_size=32, epochs=30, mask=True),
    "gsc": Recipe(gsc, n_frames=100, batch_size=128, epochs=75, mask=False),
    "fsc": Recipe(fsc, n_frames=400, batch_size=32, epochs=75, mask=False),
    "folder": Recipe(folder, n_frames=None, batch_size=32, epochs=50, mask=True),
    "csv": Recipe(table, n_frames=None, batch_size=32, epochs=50, mask=True),
    # One-second sounds. No masking: 80 of 98 frames would leave nothing to hear.
    "demo": Recipe(demo, n_frames=98, batch_size=16, epochs=4, mask=False, weights="demo"),
    "demo_source": Recipe(
        demo_source, n_frames=98, batch_size=32, epochs=14, mask=False, weights="random:demo", lr={"full_ft": 1e-3},
    ),
}
