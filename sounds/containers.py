"""Where the sounds in a file begin and end. libsndfile believes headers, and this looks.

A header promises too much if the file was cut. It promises too little if a recorder never came to
write the length. Joined MP3 or Ogg files are several sounds. An MP3 file need not promise anything:
libsndfile then takes every frame for as large as the first one.
"""

import io
import math
import mmap
import os
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import BinaryIO

JOINED = "is several files in one: make a file of each"
FLAC_START = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")  # the first bytes of a FLAC file


@dataclass
class Part:
    """One sound in a file: `head`, and then the bytes of `spans`. libsndfile reads it as a file."""

    spans: list[tuple[int, int]]
    head: bytes = b""
    missing: float = 0.0  # samples that were promised and are not there. inf: nobody knows how many


def as_file(opened: BinaryIO, part: Part):
    """A Part of an open file, as something that soundfile opens."""
    if part.head or part.spans != [(0, os.fstat(opened.fileno()).st_size)]:
        return io.BufferedReader(Spliced(opened, part), 2**16)
    opened.seek(0)
    if os.name == "nt":
        return opened
    return opened.fileno()  # a third faster, but Windows has no common file descriptors


class Spliced(io.RawIOBase):
    """A Part of an open file, to be read as a file of its own."""

    def __init__(self, opened: BinaryIO, part: Part):
        self.opened = opened
        self.part = part
        self.position = 0
        self.size = len(part.head) + sum(end - start for start, end in part.spans)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_CUR:
            offset += self.position
        elif whence == os.SEEK_END:
            offset += self.size
        self.position = offset
        return offset

    def readinto(self, buffer) -> int:
        """Fill the buffer, but not beyond the end of a span. Returns the number of bytes."""
        content = self.part.head[self.position :][: len(buffer)]
        before = len(self.part.head)  # bytes before a span
        for start, end in self.part.spans:
            first = start + self.position - before
            if not content and start <= first < end:
                self.opened.seek(first)
                content = self.opened.read(min(len(buffer), end - first))
            before += end - start
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)


def parts_of(opened: BinaryIO) -> list[Part]:
    """The sounds that an open file holds, one after the other.

    Raises ValueError if pages are missing in an Ogg file, or if other files than Ogg and MP3 were
    joined.
    """
    size = os.fstat(opened.fileno()).st_size
    head = opened.read(12)
    if head[:4] in (b"RIFF", b"FORM", b".snd"):
        if head[:4] == b".snd":  # AU: the length of its header, and that of its samples
            end = int.from_bytes(head[4:8], "big") + int.from_bytes(head[8:12], "big")
        else:
            end = 8 + int.from_bytes(head[4:8], "little" if head[:4] == b"RIFF" else "big")
        opened.seek(end)
        if end > len(head) and opened.read(4) == head[:4]:
            raise ValueError(JOINED)
        if head[:4] == b"RIFF":
            return wav_parts(opened, end, size)
    is_mp3 = head[:3] == b"ID3" or MP3_SYNC.match(head) or opened.name.lower().endswith(".mp3")
    if head[:4] in (b"OggS", b"fLaC") or (is_mp3 and size):
        return walked(opened, 0, size)
    return [Part([(0, size)])]


def walked(opened: BinaryIO, start: int, end: int) -> list[Part]:
    """The parts of an Ogg, FLAC or MP3 file, or of the MP3 between two bytes of a WAV file."""
    return walk(opened.name, os.fstat(opened.fileno()).st_mtime_ns, start, end)


@lru_cache(maxsize=64)  # clips that are pieces of one recording ask again
def walk(name: str, changed: int, start: int, end: int) -> list[Part]:
    with open(name, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[:4] == b"fLaC":
            if FLAC_START.search(content, 4):
                raise ValueError(JOINED)
            return [Part([(0, end)])]
        is_ogg = content[:4] == b"OggS"
        parts = ogg_parts(content) if is_ogg else mp3_parts(content, start, end)
    return parts or [Part([(0, end)])]


# ---------------------------------------------------------------------------------------------- WAV


def wav_parts(opened: BinaryIO, end: int, size: int) -> list[Part]:
    """The Part of a WAV file of `size` bytes, whose header says that it ends at `end`."""
    at = 12
    kind = b""
    while True:
        opened.seek(at)
        chunk = opened.read(10)
        length = int.from_bytes(chunk[4:8], "little")
        if chunk[:4] == b"fmt ":
            kind = chunk[8:]
        if chunk[:4] in (b"data", bytes(4)) or len(chunk) < 10:
            break
        at += 8 + length + length % 2
    samples = at + 8
    if kind == b"\x55\x00":  # an MP3
        return walked(opened, samples, min(samples + length, size))
    if abs(end - size) > 1 and samples + length < size / 2:
        # The lengths are those of the recording's begin, because it was never ended.
        opened.seek(0)
        return [Part([(samples, size)], opened.read(samples - 4) + b"\xff\xff\xff\xff")]
    return [Part([(0, size)])]


# ---------------------------------------------------------------------------------------------- Ogg


def ogg_parts(content: mmap.mmap) -> list[Part]:
    """The parts of an Ogg file, each one stream of Vorbis or Opus. A page: RFC 3533, section 6.

    ValueError if a page of sound is missing between two others. Between the headers and the first
    page of sound, pages are missing wherever a stream was recorded.
    """
    parts = []
    before = 0  # the number of the last page
    is_sound = False  # whether the last page had sound
    at = content.find(b"OggS")
    while at >= 0:
        page = content[at : at + 27]
        sizes = content[at + 27 : at + 27 + page[-1]]
        end = at + 27 + len(sizes) + sum(sizes)
        if len(page) < 27 or len(sizes) < page[26] or end > len(content):
            if parts:
                parts[-1].missing = math.inf
            break
        if page[5] & 2:  # the first page
            parts.append(Part([], missing=math.inf))
            is_sound = False
        number = int.from_bytes(page[18:22], "little")
        if is_sound and number != before + 1:
            raise ValueError("is damaged: pages in its middle are missing")
        before = number
        is_sound = page[6:14] != bytes(8)
        if parts:
            add(parts[-1].spans, at, end)
            if page[5] & 4:  # the last page
                parts[-1].missing = 0
        at = content.find(b"OggS", end)
    return parts


def add(spans: list[tuple[int, int]], start: int, end: int) -> None:
    """Add a span to `spans`. If it follows on the last one, that becomes longer."""
    if spans and spans[-1][1] == start:
        start = spans.pop()[0]
    spans.append((start, end))


# ---------------------------------------------------------------------------------------------- MP3

MP3_SYNC = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]")  # of Layer III
RATES = (44_100, 48_000, 32_000)  # Hz, of MPEG 1. MPEG 2 has half of that, MPEG 2.5 a quarter
BIT_RATES = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)  # kbit/s, of MPEG 1
BIT_RATES_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
MAY_DIFFER = 4  # frames, because encoders do not count alike


@dataclass
class Frames:
    """Frames of one kind that follow one another in an MP3 file."""

    kind: bytes
    promised: int | None  # how many follow the first one, if it says so
    count: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)


def mp3_parts(content: mmap.mmap, start: int, end: int) -> list[Part]:
    """The parts of an MP3 file. Its tags are left out, and whatever else is no frame."""
    sounds = []
    at = next_frame(content, start, end)
    while at < end:
        size, kind = mp3_frame(content[at : at + 4])
        if size == 0 or at + size > end:
            at = next_frame(content, at + 1, end)
            continue
        promised = frames_promised(content, at, kind)
        if not sounds or promised is not None or kind != sounds[-1].kind:
            sounds.append(Frames(kind, promised))
        sounds[-1].count += 1
        add(sounds[-1].spans, at, at + size)
        at += size
    return [mp3_part(content, frames) for frames in sounds]


@lru_cache(maxsize=4096)
def mp3_frame(header: bytes) -> tuple[int, bytes]:
    """The number of bytes of the frame with this header, (4,), and its kind. 0 if it is no header.

    ISO 11172-3, section 2.4.1.3. Frames of another kind have another version of MPEG, another rate,
    or another number of channels.
    """
    if len(header) < 4 or not MP3_SYNC.match(header):
        return 0, b""
    index = header[2] >> 4
    if index in (0, 15) or header[2] & 0x0C == 0x0C:
        return 0, b""
    rate = RATES[header[2] >> 2 & 3]
    if header[1] & 0x08:  # MPEG 1
        size = 144_000 * BIT_RATES[index] // rate
    elif header[1] & 0x10:  # MPEG 2
        size = 72_000 * BIT_RATES_2[index] // (rate // 2)
    else:
        size = 72_000 * BIT_RATES_2[index] // (rate // 4)
    padding = header[2] >> 1 & 1
    return size + padding, bytes([header[1] & 0xFE, header[2] & 0x0C, header[3] >> 6 == 3])


def next_frame(content: mmap.mmap, start: int, end: int) -> int:
    """Where three frames of one kind follow one another, from `start` on. `end` if nowhere."""
    for sync in MP3_SYNC.finditer(content, start, end):
        at = sync.start()
        kinds = []
        for _ in range(3):
            size, kind = mp3_frame(content[at : at + 4])
            kinds.append(kind)
            at += size
        if kinds[0] and kinds == 3 * kinds[:1]:
            return sync.start()
    return end


def tag_at(kind: bytes) -> int:
    """Where the tag stands in the first frame: behind its header and its side information."""
    is_mono = kind[2]
    if kind[0] & 0x08:
        return 4 + (17 if is_mono else 32)
    return 4 + (9 if is_mono else 17)


def frames_promised(content: mmap.mmap, at: int, kind: bytes) -> int | None:
    """How many frames follow the frame at `at`. 0 if its tag does not say. None without a tag."""
    tag = at + tag_at(kind)
    if content[tag : tag + 4] in (b"Xing", b"Info"):
        return int.from_bytes(content[tag + 8 : tag + 12], "big") if content[tag + 7] & 1 else 0
    return None


def mp3_part(content: mmap.mmap, frames: Frames) -> Part:
    """The Part of these frames. It gets a new tag, unless it has one with their number."""
    (start, end), *others = frames.spans
    header = content[start : start + 4]
    count = frames.count
    if frames.promised is not None:
        count -= 1
        if abs(frames.promised - count) <= MAY_DIFFER:
            return Part(frames.spans)
        start += mp3_frame(header)[0]
    tag = b"Xing" + (1).to_bytes(4, "big") + count.to_bytes(4, "big")
    # Without a checksum, of 128 or 80 kbit/s, and without padding.
    header = bytes([header[0], header[1] | 1, header[2] & 0x0C | 0x90, header[3]])
    size, kind = mp3_frame(header)
    head = (header + bytes(tag_at(kind) - 4) + tag).ljust(size, b"\0")
    samples = 1152 if kind[0] & 0x08 else 576  # of a frame
    missing = samples * max(0, (frames.promised or 0) - count)
    return Part([(start, end), *others], head, missing)
