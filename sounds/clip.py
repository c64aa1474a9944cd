"""What a loader says of a dataset: where it lies, and for each clip its class and what it is used for."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PARTS = ("train", "val", "test")


class Clip(NamedTuple):
    path: Path
    label: str  # name of its class
    part: str | int = ""  # one of PARTS, the number of a fold, or "": nobody has said


@dataclass(frozen=True)
class Listing:
    root: Path
    clips: list[Clip]
    classes: list[str] | None = None  # in the order of their numbers; None: in that of the alphabet
    name: str | None = None  # of the user's own sounds; None: that of the row in DATASETS


def name_of(path: Path, root: Path) -> str:
    """A clip's path relative to `root`, with forward slashes."""
    return Path(os.path.relpath(path, root)).as_posix()


def names_of(paths: list[Path], root: Path) -> list[str]:
    """`name_of` each; for paths beneath `root`, without '..', thirty times as fast."""
    start = str(root) + os.sep
    return [
        text[len(start) :].replace(os.sep, "/")
        if (text := str(path)).startswith(start) and ".." not in text
        else name_of(path, root)
        for path in paths
    ]
