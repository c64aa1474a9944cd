"""What a loader says of a dataset: where it lies, and what each clip is and is used for."""

import math
import os
import unicodedata
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PARTS = ("train", "val", "test")
WHOLE = (0.0, math.inf)  # the span of a clip that is a file of its own


class Clip(NamedTuple):
    path: Path
    label: str  # the name of its class
    part: str | int = ""  # one of PARTS, or the number of a fold; "" if nobody has said
    span: tuple[float, float] = WHOLE  # seconds: where it starts and ends in its file
    group: str = ""  # clips of one recording, speaker or site must stay in one part


@dataclass(frozen=True)
class Listing:
    root: Path
    clips: list[Clip]
    classes: list[str] | None = None  # in the order of their numbers; None: alphabetical
    name: str | None = None  # of the user's own sounds; None: that of the row in DATASETS
    group_hint: str = ""  # for --group: files are named like pieces of recordings; sounds/groups.py

    @property
    def spans(self) -> dict[int, tuple[float, float]]:
        """Where the clips that are cut from a file start and end in it, by their index."""
        return {i: clip.span for i, clip in enumerate(self.clips) if clip.span != WHOLE}


def name_of(path: Path, root: Path) -> str:
    """A path relative to `root`, with forward slashes. The whole path if there is no way to it.

    Its bytes are read as UTF-8 whatever the locale says, so a clip has one name everywhere.
    """
    name = str(path)
    folder = f"{root}{os.path.sep}"
    if name.startswith(folder) and ".." not in name:
        name = name.removeprefix(folder)
    else:  # ten times as slow
        with suppress(ValueError):  # on Windows, from one drive to another
            name = os.path.relpath(path, root)
    return os.fsencode(name.replace(os.path.sep, "/")).decode("utf-8", "surrogateescape")


def spelling(text: str) -> str:
    """A name as it is compared: without blanks around it, and with composed letters (NFC).

    A file system or a spreadsheet may hold the accent of a letter as a character of its own.
    """
    return unicodedata.normalize("NFC", text).strip()


def fragment(span: tuple[float, float]) -> str:
    """What follows the path of a piece of a recording: `#12.5-17.5`. Nothing for a whole file."""
    if span == WHOLE:
        return ""

    def seconds(number):
        return "" if number == math.inf else f"{number:.6f}".rstrip("0").rstrip(".")

    return f"#{seconds(span[0])}-{seconds(span[1])}"


def names_of(paths: list[Path], root: Path, spans: dict[int, tuple[float, float]]) -> list[str]:
    """`name_of` each path, with its `fragment`."""
    return [name_of(path, root) + fragment(spans.get(i, WHOLE)) for i, path in enumerate(paths)]
