"""Sound files to mono samples at 16 kHz. The libraries for it are imported where a file is read."""

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

# In libsndfile's log of a WAV or AIFF file that is too short: "data : 88200 (should be 44078)".
TOO_SHORT = re.compile(r"^ ?(?:data|SSND) *: (\d+) \(should be ([1-9]\d*)\)", re.MULTILINE)
UNKNOWN_LENGTH = 0x7FFF_F000  # bytes: such a header, or a larger one, was written into a pipe
NO_LENGTH = 2**63 - 1  # samples: what libsndfile reports for a FLAC file written into a pipe
MAY_BE_MISSING = 0.1  # seconds, because some encoders round the length


def files_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """The sounds anywhere beneath a folder, also by links, and its other files. No hidden ones."""
    sounds = []
    others = []
    for file in sorted(files_beneath(folder)):
        if file.suffix.lower() not in SUFFIXES:
            if file.is_file():
                others.append(file)
        elif file.is_file() or file.is_symlink():  # a link to nothing is a sound that is not read
            sounds.append(file)
    return sounds, others


def refuse(error: OSError):
    raise UserError(f"{error.filename}: {error.strerror}; all of a folder must be readable")


def files_beneath(folder: Path) -> Iterator[Path]:
    """Yield all that is no folder and not hidden. A folder that links lead to comes once."""
    seen = {str(parent) for parent in folder.resolve().parents}  # a link to one of them leads back
    roots = [folder]
    for root in roots:  # links are followed last, so a folder that lies here keeps its own name
        for place, folders, names in os.walk(root, onerror=refuse):
            real = os.path.realpath(place)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            roots += [Path(place, name) for name in folders if Path(place, name).is_symlink()]
            yield from (Path(place, name) for name in names if not name.startswith("."))


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
    import soundfile
    import soxr

    try:
        if never_ends(path):
            raise ValueError("is no file")
        with open(path, "rb") as file:  # says why it cannot; libsndfile would say "system error"
            if not file.read(1):
                raise ValueError("is empty (0 bytes)")
        with soundfile.SoundFile(name_for_libsndfile(path)) as file:
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
    # TypeError: a name in .raw, of unknown rate. MemoryError: a damaged header promises too much.
    except (soundfile.LibsndfileError, OSError, TypeError, MemoryError) as error:
        reason = getattr(error, "error_string", None) or getattr(error, "strerror", None)
        reason = reason or str(error)
        if "not recognised" in reason or "does not exist" in reason:  # it has just been opened
            reason = "is in no known sound format"
        raise ValueError(reason.removeprefix("Error : ")) from None
    if not read:
        raise ValueError("holds no samples")
    if read < wanted - MAY_BE_MISSING * rate:
        end = (first + read) / rate
        raise ValueError(f"is truncated: it ends after {end:.2f} s, before its header says")
    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)  # the rest in the filter


def name_for_libsndfile(path: Path) -> str | bytes:
    """Bytes, as a name need not be UTF-8. On Windows text, as bytes mean other letters there."""
    return str(path) if os.name == "nt" else os.fsencode(path)


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


def never_ends(path: Path) -> bool:
    """Whether it is a pipe, a socket or a device. To open one may take forever."""
    return path.exists() and not path.is_file() and not path.is_dir()


def length_of(path: Path) -> float:
    """Seconds of sound in a file, by its header. nan if there is no readable one."""
    import soundfile

    if never_ends(path):
        return math.nan
    try:
        info = soundfile.info(name_for_libsndfile(path))
    except (soundfile.LibsndfileError, TypeError):
        return math.nan
    return info.frames / info.samplerate if info.frames < NO_LENGTH else math.nan


def has_end(path: Path, length: float) -> bool:
    """Whether a sound of so many seconds can be read at its end. A damaged header may lie."""
    try:
        read_audio(path, start=max(0.0, length - 0.1))
    except ValueError:
        return False
    return True


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
