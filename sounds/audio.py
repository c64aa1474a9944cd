"""Sound files to mono samples at 16 kHz. The libraries for it are imported where a file is read."""

import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from support.command import UserError

RATE = 16_000  # Hz
SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au")

# In libsndfile's log of a WAV or AIFF file that is too short: "data : 88200 (should be 44078)".
TOO_SHORT = re.compile(r"^ ?(?:data|SSND) *: (\d+) \(should be ([1-9]\d*)\)", re.MULTILINE)
UNKNOWN_LENGTH = 0x7FFF_F000  # bytes: such a header, or a larger one, was written into a pipe
NO_LENGTH = 2**63 - 1  # samples: what libsndfile reports for a FLAC file written into a pipe
MAY_BE_MISSING = 0.1  # seconds, because some encoders round the length


def files_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """The sounds anywhere beneath a folder, also by links, and its other files. No hidden ones."""
    sounds = []
    others = []
    seen = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link leads here again, perhaps in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in [Path(place, name) for name in names if not name.startswith(".")]:
            if file.suffix.lower() not in SUFFIXES:
                others.append(file)
            elif file.is_file() or file.is_symlink():  # a link to nothing is a sound, a bad one
                sounds.append(file)
    return sorted(sounds), sorted(others)


def refuse(error: OSError):
    raise UserError(f"{error.filename}: {error.strerror}; all of a folder must be readable")


def read_audio(path: Path, seconds: float = math.inf, start: float = 0) -> np.ndarray:
    """`seconds` of a sound file from `start` on, mono float32 at 16 kHz, (samples,).

    Raises ValueError as `stream_audio` does.
    """
    return np.concatenate(list(stream_audio(path, seconds, start)))


def stream_audio(path: Path, seconds: float = math.inf, start: float = 0) -> Iterator[np.ndarray]:
    """Yield what `read_audio` returns, in blocks of ten seconds, so that little memory is needed.

    Reads what libsndfile reads: WAV of any kind, FLAC, OGG and MP3, with any rate and channels.
    Raises ValueError with the reason if the file is no audio, holds no samples, holds values that
    are not finite, ends before `start`, or ends before its header says within what is asked for.
    """
    import soxr

    with open_sound(path) as file:
        rate = file.samplerate
        first = round(start * rate)
        if 0 < file.frames <= first:
            length = file.frames / rate
            raise ValueError(f"ends after {length:.2f} s, and its clip starts at {start:g} s")
        wanted = min(length_in_header(file) - first, seconds * rate)  # samples per channel
        there = math.ceil(min(wanted, file.frames - first))
        resampler = soxr.ResampleStream(rate, RATE, num_channels=1)
        read = 0
        while True:
            samples = read_samples(file, first + read, min(10 * rate, there - read))
            if len(samples) == 0:
                break
            read += len(samples)
            wave = samples.mean(axis=1)  # (samples,)
            if not np.isfinite(wave).all():
                raise ValueError("holds samples that are not finite")
            yield resampler.resample_chunk(wave)
    if not read:
        raise ValueError("holds no samples")
    if read < wanted - MAY_BE_MISSING * rate:
        end = (first + read) / rate
        raise ValueError(f"is truncated: it ends after {end:.2f} s, before its header says")
    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)  # the rest in the filter


@contextmanager
def open_sound(path: Path):
    """Yield an open soundfile.SoundFile. ValueError with the reason if it cannot be read."""
    import soundfile

    if path.exists() and not path.is_file():
        raise ValueError("is no file")  # to open a pipe may take forever
    try:
        # Opened by Python, because soundfile cannot open a name that is not UTF-8.
        with open(path, "rb") as opened, soundfile.SoundFile(opened) as file:
            yield file
    # TypeError: a name in .raw, of unknown rate. MemoryError: a damaged header promises too much.
    except (soundfile.LibsndfileError, OSError, TypeError, MemoryError) as error:
        if isinstance(error, OSError):
            raise ValueError(error.strerror or str(error)) from None
        reason = getattr(error, "error_string", str(error)).removeprefix("Error : ").rstrip(".")
        raise ValueError(f"cannot be read ({reason})") from None


def read_samples(file, start: int, count: int) -> np.ndarray:
    """Samples (count, channels) of an open soundfile.SoundFile. Fewer at the end of the file.

    soundfile seeks after every read. In an MP3 libsndfile then decodes wrongly the frames that need
    earlier ones. So half a second before `start` is read as well, and left out.
    """
    lead = min(start, file.samplerate // 2) if file.format == "MP3" else 0
    if file.tell() != start - lead:
        file.seek(start - lead)
    return file.read(lead + count, dtype="float32", always_2d=True)[lead:]


def length_in_header(file) -> float:
    """Samples per channel that the header of an open soundfile.SoundFile promises.

    For WAV and AIFF `file.frames` is the number of samples that are there.
    """
    claim = TOO_SHORT.search(file.extra_info)
    if claim and int(claim[1]) < UNKNOWN_LENGTH:
        return file.frames * int(claim[1]) / int(claim[2])
    if "Ogg: Junk after the last page" in file.extra_info:  # cut inside a page; nobody knows where
        return math.inf
    if file.frames == NO_LENGTH:
        raise ValueError("does not say how long it is: write it to a file again, not into a pipe")
    return file.frames


def length_of(path: Path) -> float:
    """Seconds of sound in a file, by its header. nan if there is no readable one."""
    try:
        with open_sound(path) as file:
            length = length_in_header(file) / file.samplerate
    except ValueError:
        return math.nan
    return length if length < math.inf else math.nan


def lengths_of(paths: list[Path], spans: dict[int, tuple[float, float]]) -> np.ndarray:
    """Seconds of each clip, (clips,): of its file, or of its span there. nan if unreadable."""
    files = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        length = dict(zip(files, pool.map(length_of, files), strict=True))
    seconds = np.array([length[path] for path in paths])
    for i, (start, end) in spans.items():
        seconds[i] = np.clip(seconds[i], start, end) - start
    return seconds


def typical_seconds(seconds: np.ndarray) -> float:
    """95th percentile of the lengths, at most 10.24 s, which is what the AST was pretrained on."""
    seconds = seconds[np.isfinite(seconds)]
    if len(seconds) == 0:
        return 10.24
    return min(10.24, float(np.percentile(seconds, 95)))
