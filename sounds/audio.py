"""Sound files to mono samples at 16 kHz. The libraries for it are imported where a file is read."""

import math
import os
import re
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sounds.containers import as_file, parts_of
from support.command import UserError

RATE = 16_000  # Hz
SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au")

# In libsndfile's log of a file that is too short: "data : 88200 (should be 44078)" in a WAV file.
# It is SSND in an AIFF, Data Size in an AU, riff in a W64 and Riff size in a RF64 file.
TOO_SHORT = re.compile(
    r"^ *(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be ([1-9]\d*)\)", re.MULTILINE
)
UNKNOWN_LENGTH = 0x7FFF_F000  # bytes: such a header, or a larger one, was written into a pipe
NO_LENGTH = 2**63 - 1  # samples: what libsndfile reports for a FLAC file written into a pipe
DENSE = 20  # samples a byte: in a FLAC file of silence or of a damaged header, which may say years
MAY_BE_MISSING = 0.1  # seconds, because some encoders round the length
SHORTEST = 0.001  # seconds of a sound
LOWEST_RATE = 100  # Hz
LOUDEST = 100.0  # a peak 40 dB above full scale: mixed sounds may well be above it, but not so far
AUDIBLE = 1e-3  # a peak
CANCELLED = 1e-3  # of the power of the channels, in their mean


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
    Joined MP3 or Ogg files are read one after the other. Raises ValueError with the
    reason if the file is no audio, holds less than SHORTEST or what `mono` refuses, ends before
    `start`, or ends before its header says within what is asked for.
    """
    import soxr

    passed = 0.0  # seconds of the sounds that came before this one in the file
    heard = 0.0  # seconds
    end = 0.0  # seconds: where the last sound ends
    with readable(path) as opened:
        for file, promised in sounds_in(opened):
            rate = file.samplerate
            first = max(0, round((start - passed) * rate))
            end = passed + file.frames / rate
            wanted = min(promised - first, (seconds - heard) * rate)  # samples per channel
            starts_later = 0 < file.frames <= first
            if wanted > 0 and not starts_later:
                resampler = soxr.ResampleStream(rate, RATE, num_channels=1)
                read = 0
                for samples in blocks_of(file, first, math.ceil(min(wanted, file.frames - first))):
                    read += len(samples)
                    yield resampler.resample_chunk(mono(samples))
                if read < wanted - MAY_BE_MISSING * rate:
                    end = passed + (first + read) / rate
                    raise ValueError(f"is truncated: it ends after {end:.2f} s, before it should")
                yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)  # the rest
                heard += read / rate
            passed += promised / rate
            if heard > seconds - 1 / RATE:
                break
    if heard == 0 and end > 0:
        raise ValueError(f"ends after {end:.2f} s, and its clip starts at {start:g} s")
    check_length(heard)


def check_length(seconds: float) -> None:
    """ValueError if a sound is too short to be one."""
    if seconds < SHORTEST:
        found = f"holds {seconds:g} s" if seconds else "holds no samples"
        raise ValueError(f"{found}: a sound must last {SHORTEST} s")


def mono(samples: np.ndarray) -> np.ndarray:
    """The mean over the channels, (samples,), of samples (samples, channels).

    Raises ValueError if they are not finite, can be no sound in [-1, 1], or cancel each other.
    """
    peak = max(samples.max(), -samples.min())
    if not np.isfinite(peak):
        raise ValueError("holds samples that are not finite")
    if peak > LOUDEST or (peak > 1 and (samples == np.rint(samples)).all()):
        raise ValueError(
            f"has a peak of {peak:,.0f}, but samples are numbers from -1 to 1: divide them by the "
            "largest number that they can be, by 32768 if they had 16 bits"
        )
    wave = samples.mean(axis=1)
    is_audible = peak > AUDIBLE and samples.shape[1] > 1
    if is_audible and np.square(wave).mean() < CANCELLED * np.square(samples).mean():
        raise ValueError(
            "has channels that cancel each other, because one is the other upside down: keep one "
            "(ffmpeg -i IN -af 'pan=mono|c0=c0' OUT.flac)"
        )
    return wave


@contextmanager
def readable(path: Path):
    """Yield an open sound file. Whatever it is that cannot be read becomes a ValueError."""
    import soundfile

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("is no file")  # to open a pipe may take forever
        if os.stat(path).st_size == 0:
            raise ValueError("is empty: it has 0 bytes")
        # Opened by Python, because soundfile cannot open a name that is not UTF-8.
        with open(path, "rb", buffering=0) as opened:
            yield opened
    # TypeError: a name in .raw, of unknown rate. MemoryError: a damaged header promises too much.
    except (soundfile.LibsndfileError, OSError, TypeError, MemoryError) as error:
        if isinstance(error, OSError):
            raise ValueError(error.strerror or str(error)) from None
        reason = getattr(error, "error_string", str(error)).removeprefix("Error : ").rstrip(".")
        if reason.startswith("Internal error"):
            reason = "its header has no sample rate, or several chunks of samples"
        raise ValueError(
            f"cannot be read ({reason}; perhaps ffmpeg -i IN OUT.flac can read it)"
        ) from None


def sounds_in(opened: BinaryIO) -> Iterator[tuple]:
    """Yield each sound in an open file: a soundfile.SoundFile, and the samples that it promises.

    The samples are those of one channel. A file that was cut promises at most a second more than
    it holds, because a damaged header may promise years. ValueError if the header cannot be right.
    """
    import soundfile

    for part in parts_of(opened):
        with soundfile.SoundFile(as_file(opened, part), closefd=False) as file:
            if file.samplerate < LOWEST_RATE:
                raise ValueError(f"has a header that says {file.samplerate} samples a second")
            promised = length_in_header(file) + part.missing
            size = os.fstat(opened.fileno()).st_size
            if file.format == "FLAC" and promised > DENSE * size and not has_end(file):
                raise ValueError(f"is damaged: its header says {promised / file.samplerate:,.0f} s")
            yield file, min(promised, file.frames + file.samplerate)


def has_end(file) -> bool:
    """Whether an open soundfile.SoundFile has its last sample, to which it seeks."""
    import soundfile

    try:
        file.seek(file.frames - 1)
    except soundfile.LibsndfileError:
        return False
    return True


def blocks_of(file, start: int, count: int) -> Iterator[np.ndarray]:
    """Yield `count` samples of a soundfile.SoundFile from `start` on, (samples, channels).

    A block has ten seconds. Some kinds of WAV file cannot seek: what comes before is read as well.
    """
    position = start if file.seekable() else 0
    end = start + count
    while position < end:
        goal = start if position < start else end
        samples = read_samples(file, position, min(10 * file.samplerate, goal - position))
        if len(samples) == 0:
            break
        position += len(samples)
        if position > start:
            yield samples


def read_samples(file, start: int, count: int) -> np.ndarray:
    """Samples (count, channels) of an open soundfile.SoundFile. Fewer at the end of the file.

    soundfile seeks after every read. In an MP3 libsndfile then decodes wrongly the frames that need
    earlier ones. So half a second before `start` is read as well, and left out.
    """
    lead = min(start, file.samplerate // 2) if file.format == "MP3" else 0
    if file.seekable() and file.tell() != start - lead:
        file.seek(start - lead)
    return file.read(lead + count, dtype="float32", always_2d=True)[lead:]


def length_in_header(file) -> float:
    """Samples per channel that the header of an open soundfile.SoundFile promises.

    For WAV, AIFF and AU `file.frames` is the number of samples that are there.
    """
    log = "" if file.format in ("FLAC", "OGG", "MP3") else file.extra_info
    claim = TOO_SHORT.search(log)
    if claim and 0 < int(claim[1]) < UNKNOWN_LENGTH:
        return file.frames * int(claim[1]) / int(claim[2])
    if file.frames == NO_LENGTH:
        raise ValueError("does not say how long it is: write it to a file again, not into a pipe")
    return file.frames


def length_of(path: Path) -> float:
    """Seconds of sound in a file, as it promises. nan if it cannot be read."""
    try:
        with readable(path) as opened:
            sounds = sounds_in(opened)
            return sum(promised / file.samplerate for file, promised in sounds)
    except ValueError:
        return math.nan


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
