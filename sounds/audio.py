"""Any sound file to mono samples at 16 kHz. The libraries for it are imported where a file is read."""

import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from support.command import UserError

RATE = 16_000  # Hz
SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au")

# How libsndfile's log puts it that a WAV or AIFF file ends before its header says: "data : 88200 (should be 44078)".
_TOO_SHORT = re.compile(r"^ ?(?:data|SSND) *: (\d+) \(should be ([1-9]\d*)\)", re.MULTILINE)
_UNKNOWN_LENGTH = 0x7FFF_F000  # a program that writes into a pipe puts this many bytes or more into the header
_NO_LENGTH = 2**63 - 1  # samples that libsndfile reports for a FLAC file written into a pipe
_MAY_BE_MISSING = 0.1  # seconds: an encoder that rounds the length is no truncated file


def files_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """The sounds anywhere beneath a folder, also by links, and its other files; hidden ones are neither."""
    sounds, others = [], []
    for file in sorted(_beneath(folder)):
        sound = file.suffix.lower() in SUFFIXES
        if file.is_file() or (sound and file.is_symlink()):  # a link that leads nowhere is a sound that cannot be read
            (sounds if sound else others).append(file)
    return sounds, others


def _refuse(error: OSError):
    raise UserError(f"{error.filename}: {error.strerror}; all of a folder must be readable") from None


def _beneath(folder: Path) -> Iterator[Path]:
    """What is no folder beneath a folder, hidden ones left out; a folder that links lead to again comes once."""
    seen = {str(parent) for parent in folder.resolve().parents}  # a link to one of them leads back
    places = [folder]
    for root in places:  # grows by the links: a folder that lies here keeps its own name, whatever leads to it
        for place, folders, names in os.walk(root, onerror=_refuse):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if (real := os.path.realpath(place)) in seen:
                folders.clear()
                continue
            seen.add(real)
            places += [path for name in folders if (path := Path(place, name)).is_symlink()]
            yield from (Path(place, name) for name in names if not name.startswith("."))


def read_audio(path: Path, seconds: float = math.inf, start: float = 0) -> np.ndarray:
    """`seconds` of a sound file from `start` on, mono float32 at 16 kHz, (samples,). Raises as `stream_audio` does."""
    return np.concatenate(list(stream_audio(path, seconds, start)))


def stream_audio(path: Path, seconds: float = math.inf, start: float = 0) -> Iterator[np.ndarray]:
    """What `read_audio` returns, in blocks of ten seconds: a long file takes no more memory than a short one.

    Reads what libsndfile reads: WAV of any kind, FLAC, OGG, MP3, at any rate, with any number of channels. Raises
    ValueError with the reason for a file that is no audio, holds no samples, ends before `start` or, within what is
    asked for, before the header says, or holds values that are not finite.
    """
    import soundfile
    import soxr

    try:
        if never_ends(path):
            raise ValueError("is no file")
        with open(path, "rb") as opened:  # says why a file cannot be opened; libsndfile would say "system error"
            if not opened.read(1):
                raise ValueError("is empty (0 bytes)")
        with soundfile.SoundFile(_name(path)) as file:
            rate = file.samplerate
            first = round(start * rate)
            if 0 < file.frames <= first:
                raise ValueError(f"ends after {file.frames / rate:.2f} s, and its clip starts at {start:g} s")
            wanted = min(_length_in_header(file) - first, seconds * rate)  # samples per channel
            there = math.ceil(min(wanted, file.frames - first))
            resampler, read = soxr.ResampleStream(rate, RATE, num_channels=1), 0
            while len(samples := _samples(file, first + read, min(10 * rate, there - read))):
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
        raise ValueError(f"is truncated: it ends after {(first + read) / rate:.2f} s, before its header says")
    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)  # what the filter still holds back


def _name(path: Path) -> str | bytes:
    """As libsndfile opens it: bytes, as a name need not be UTF-8; on Windows, where bytes mean other letters, text."""
    return str(path) if os.name == "nt" else os.fsencode(path)


def _samples(file, start: int, count: int) -> np.ndarray:
    """(count, channels), less at the end of a file.

    soundfile seeks after every read, and of an MP3 libsndfile then decodes wrongly the frames that need earlier ones:
    half a second before `start` is read as well, and left out.
    """
    lead = min(start, file.samplerate // 2) if file.format == "MP3" else 0
    if file.tell() != start - lead:
        file.seek(start - lead)
    return file.read(lead + count, dtype="float32", always_2d=True)[lead:]


def _length_in_header(file) -> float:
    """Samples per channel that the header promises; for WAV and AIFF `file.frames` counts what is there instead.

    file: an open soundfile.SoundFile.
    """
    claim = _TOO_SHORT.search(file.extra_info)
    if claim and int(claim[1]) < _UNKNOWN_LENGTH:
        return file.frames * int(claim[1]) / int(claim[2])
    if "Ogg: Junk after the last page" in file.extra_info:  # cut inside a page; how much is missing cannot be known
        return math.inf
    if file.frames == _NO_LENGTH:
        raise ValueError("does not say how long it is: write it to a file again, not into a pipe")
    return file.frames


def never_ends(path: Path) -> bool:
    """Whether it is a pipe, a socket or a device: to open one may take forever."""
    return path.exists() and not path.is_file() and not path.is_dir()


def length_of(path: Path) -> float:
    """Seconds of sound in a file, from its header; nan where there is no readable one."""
    import soundfile

    if never_ends(path):
        return math.nan
    try:
        info = soundfile.info(_name(path))
        return info.frames / info.samplerate if info.frames < _NO_LENGTH else math.nan
    except (soundfile.LibsndfileError, TypeError):
        return math.nan


def has_end(path: Path, length: float) -> bool:
    """Whether a sound of so many seconds can be read at its end: of a damaged one a header may promise years."""
    try:
        read_audio(path, start=max(0.0, length - 0.1))
        return True
    except ValueError:
        return False


def lengths_of(paths: list[Path], spans: dict[int, tuple[float, float]]) -> np.ndarray:
    """Seconds of each clip, (clips,): of the file or, by its number, of what lies in its span; nan if unreadable."""
    files = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        of_file = dict(zip(files, pool.map(length_of, files), strict=True))
    seconds = np.array([of_file[path] for path in paths])
    for i, (start, end) in spans.items():
        seconds[i] = np.clip(seconds[i], start, end) - start
    return seconds


def typical_seconds(seconds: np.ndarray) -> float:
    """95th percentile of the lengths of sounds, at most 10.24 s: what the AST was pretrained on."""
    seconds = seconds[np.isfinite(seconds)]
    return min(10.24, float(np.percentile(seconds, 95))) if len(seconds) else 10.24
