"""Sounds to features, and datasets to clips, folds and draws (section III-A of the paper).

Top to bottom: `fbank` and `to_input` turn a waveform into what the AST reads; `spec_augment` masks it in training;
`read_audio` decodes any file; `build_features` does all of it once for a dataset and keeps the result on disk; the
datasets themselves are at the end, one function and one row of DATASETS each.
"""

import csv
import hashlib
import math
import os
import re
import shutil
import stat
import sys
import time
import tokenize
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import platformdirs
import soundfile
import soxr
import torch
from filelock import FileLock
from tqdm import tqdm

from ast_model import UserError

RATE = 16_000  # Hz
WINDOW, HOP, N_FFT = 400, 160, 512  # samples: 25 ms, 10 ms, and the next power of two
N_MELS = 128
MEAN, STD = -4.2677393, 4.5689974  # of the log-Mel values of AudioSet; the checkpoint was trained with them

# ---------------------------------------------------------------------------------------------------------- features


@lru_cache(maxsize=8)
def _window_and_filters(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
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
    hann, filters = _window_and_filters(waveforms.device)
    waveforms = torch.nn.functional.pad(waveforms, (0, max(0, WINDOW - waveforms.shape[-1])))
    frames = waveforms.unfold(-1, WINDOW, HOP)  # (batch, frames, 400)
    frames = frames - frames.mean(-1, keepdim=True)
    previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    frames = (frames - 0.97 * previous) * hann  # pre-emphasis, the first sample against itself
    power = torch.fft.rfft(frames, N_FFT).abs().square()  # (batch, frames, 257)
    return (power @ filters).clamp_min(2**-23).log()  # the floor is the float32 epsilon, as in Kaldi


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
    """The first `seconds` of a sound file as mono float32 at 16 kHz, (samples,).

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
            samples = file.read(math.ceil(min(wanted, file.frames)), dtype="float32", always_2d=True)
    # TypeError: a name in .raw, of unknown rate. MemoryError: a damaged header promises more than any memory holds.
    except (soundfile.LibsndfileError, OSError, TypeError, MemoryError) as error:
        reason = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
        if "not recognised" in reason or "does not exist" in reason:  # it exists, it has just been opened
            reason = "is in no known sound format"
        raise ValueError(reason.removeprefix("Error : ")) from None
    if not len(samples):
        raise ValueError("holds no samples")
    if len(samples) < wanted - _MAY_BE_MISSING * rate:
        raise ValueError(f"is truncated: it ends after {len(samples) / rate:.2f} s, before its header says")
    wave = samples.mean(axis=1)  # (samples,)
    if not np.isfinite(wave).all():
        raise ValueError("holds samples that are not finite")
    return wave if rate == RATE else soxr.resample(wave, rate, RATE)


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


# ------------------------------------------------------------------------------------------------- what a dataset is

@dataclass(frozen=True)
class Split:
    """Indices of clips. Without validation clips the last epoch's weights are tested, else the best epoch's."""

    train: list[int]
    val: list[int]
    test: list[int]


@dataclass(frozen=True)
class Dataset:
    """Clips with their labels, and one Split per fold. `labels[i]` is the class index of `paths[i]`."""

    name: str
    root: Path
    classes: list[str]
    paths: list[Path]
    labels: list[int]
    folds: dict[int, Split]

    def names(self) -> list[str]:
        """Paths relative to `root`, with forward slashes: the same wherever the dataset lies."""
        return [Path(os.path.relpath(path, self.root)).as_posix() for path in self.paths]


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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


def download(url: str, target: Path, by_hand: str) -> Path:
    """Fetch `url` into the file `target`, with a progress bar. `by_hand` ends the error message: the way without it."""
    try:
        with urllib.request.urlopen(url, timeout=30) as response, whole_file(target) as temporary:
            size = int(response.headers.get("Content-Length") or 0)
            bar = tqdm(total=size or None, desc=target.name, unit="B", unit_scale=True, disable=None)
            with open(temporary, "wb") as file, bar:
                while block := response.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
            if size and temporary.stat().st_size != size:
                raise OSError(f"the connection ended after {temporary.stat().st_size} of {size} bytes")
    except (urllib.error.URLError, OSError) as error:
        raise UserError(f"cannot download {url} ({getattr(error, 'reason', error)}): {by_hand}") from None
    return target


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip into the new folder `folder`, whole or not at all.

    Raises UserError for a damaged archive and for members that are links or would land outside the folder.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(archive) as zipped:
            for member in tqdm(zipped.infolist(), desc=f"unpacking {archive.name}", unit="file", disable=None):
                inside = (temporary / member.filename).resolve().is_relative_to(temporary.resolve())
                if not inside or stat.S_ISLNK(member.external_attr >> 16):
                    raise UserError(f"{archive}: refusing {member.filename!r}, a link or a path that leaves the folder")
                zipped.extract(member, temporary)
        os.replace(temporary, folder)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise UserError(f"{archive} is not a whole zip archive ({error}): download it again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------ the datasets

ESC50_URL = "https://github.com/karolpiczak/ESC-50/archive/master.zip"  # of no known size: GitHub packs it on request


def esc50(data_dir: Path | None, cache_dir: Path, only_esc10: bool = False) -> Dataset:
    """ESC-50 (Piczak, 2015): 2,000 clips of 5 s, 50 classes, 5 folds; ESC-10 is 10 of its classes.

    Fold k tests fold k, validates on fold k-1 (fold 1 on fold 5) and trains on the other three. Clips cut from one
    recording are in one fold. `data_dir` is the unpacked release or its zip; without it the release is downloaded.
    """
    root = locate(data_dir, cache_dir / "ESC-50", "meta/esc50.csv", "meta/esc50.csv and audio/*.wav", ESC50_URL)
    rows = read_table(root / "meta" / "esc50.csv", ["filename", "fold", "target", "category", "esc10"])
    if only_esc10:
        rows = [row for row in rows if row["esc10"] == "True"]
    names = {int(row["target"]): row["category"] for row in rows}
    targets = sorted(names)  # ESC-10 keeps 10 of the 50 target numbers
    labels = [targets.index(int(row["target"])) for row in rows]
    paths = [root / "audio" / row["filename"] for row in rows]
    require_files(root, paths)

    def clips(*folds):
        return [i for i, row in enumerate(rows) if int(row["fold"]) in folds]

    folds = {}
    for test in range(1, 6):
        val = (test - 2) % 5 + 1
        folds[test] = Split(train=clips(*{1, 2, 3, 4, 5} - {val, test}), val=clips(val), test=clips(test))
    return Dataset("esc10" if only_esc10 else "esc50", root, [names[t] for t in targets], paths, labels, folds)


def esc10(data_dir: Path | None, cache_dir: Path) -> Dataset:
    """The ten ESC-10 classes of ESC-50, with its folds."""
    return esc50(data_dir, cache_dir, only_esc10=True)


def locate(data_dir: Path | None, default: Path, marker: str, layout: str, url: str) -> Path:
    """The folder that holds `marker`: `data_dir` (a folder or an archive), else `default`, downloaded when absent."""
    by_hand = f"download it by hand and give the archive or the unpacked folder as --data-dir (it holds {layout})"
    if data_dir is None or data_dir.is_file():
        archive = data_dir or default.with_suffix(".zip")
        default.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{default}.lock"):  # two runs that start together download once
            if not default.exists():
                unpack(data_dir or download(url, archive, by_hand), default)
                if data_dir is None:
                    archive.unlink()
        data_dir = default
    elif not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir}: no such folder or archive; it should hold {layout}")
    found = sorted(data_dir.glob(marker)) + sorted(data_dir.glob(f"*/{marker}"))  # archives add a folder of their own
    if not found:
        raise UserError(f"{data_dir} does not hold {marker}; the dataset has {layout}")
    return found[0].parents[len(Path(marker).parts) - 1]


def read_table(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a CSV file with a header line; UserError if one of `columns` is missing."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or [])]
        if missing:
            raise UserError(f"{path}: no column {missing[0]!r}; its header is {reader.fieldnames}")
        rows = list(reader)
    if not rows:
        raise UserError(f"{path}: no rows beneath the header")
    return rows


def require_files(root: Path, paths: list[Path]) -> None:
    """UserError that counts the missing files and names the first five."""
    missing = [str(path.relative_to(root)) for path in paths if not path.is_file()]
    if missing:
        names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(f"{root}: {len(missing)} of {len(paths)} files are missing ({names}): complete the dataset")


@dataclass(frozen=True)
class Recipe:
    """How the paper trains on a dataset; every number can be changed on the command line."""

    load: Callable[[Path | None, Path], Dataset]  # (data_dir, cache_dir)
    n_frames: int
    batch_size: int
    epochs: int
    mask: bool  # SpecAugment


DATASETS = {
    "esc50": Recipe(esc50, n_frames=500, batch_size=32, epochs=50, mask=True),
    "esc10": Recipe(esc10, n_frames=500, batch_size=32, epochs=50, mask=True),
}
