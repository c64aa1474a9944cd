"""What a loader says of a dataset: where it lies, and for each clip its class and what it is used for."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PARTS = ("train", "val", "test")
WHOLE = (0.0, math.inf)  # the span of a clip that is a file of its own


class Clip(NamedTuple):
    path: Path
    label: str  # name of its class
    part: str | int = ""  # one of PARTS, the number of a fold, or "": nobody has said
    span: tuple[float, float] = WHOLE  # seconds: where it starts and ends in its file
    group: str = ""  # of clips that must stay in one part, as they are of one recording, speaker or site


@dataclass(frozen=True)
class Listing:
    root: Path
    clips: list[Clip]
    classes: list[str] | None = None  # in the order of their numbers; None: in that of the alphabet
    name: str | None = None  # of the user's own sounds; None: that of the row in DATASETS

    @property
    def spans(self) -> dict[int, tuple[float, float]]:
        """Of the clips that are cut from a file, by their numbers."""
        return {i: clip.span for i, clip in enumerate(self.clips) if clip.span != WHOLE}


def name_of(path: Path, root: Path) -> str:
    """A path relative to `root`, with forward slashes; the whole path where there is no way from one to the other."""
    try:
        return Path(os.path.relpath(path, root)).as_posix()
    except ValueError:  # on Windows, from one drive to another
        return path.as_posix()


def fragment(span: tuple[float, float]) -> str:
    """Of a piece of a recording, behind its path: `#12.5-17.5`, in seconds; nothing where it is a whole file."""
    if span == WHOLE:
        return ""
    start, end = (f"{seconds:.6f}".rstrip("0").rstrip(".") if seconds < math.inf else "" for seconds in span)
    return f"#{start}-{end}"


def names_of(paths: list[Path], root: Path, spans: dict[int, tuple[float, float]] | None = None) -> list[str]:
    """`name_of` each, with its `fragment`; for paths beneath `root`, without '..', thirty times as fast."""
    start, spans = str(root) + os.sep, spans or {}
    names = [
        text[len(start) :].replace(os.sep, "/")
        if (text := str(path)).startswith(start) and ".." not in text
        else name_of(path, root)
        for path in paths
    ]
    return [name + fragment(spans.get(i, WHOLE)) for i, name in enumerate(names)] if spans else names
