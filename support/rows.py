"""Files with one row of numbers for each clip: features, or vectors of a frozen backbone.

A row has a `key`. It is written last, so a program may be killed at any moment: a row with the
right key is whole. Fresh rows have the key 0.

A file that is deleted or replaced while it is mapped into memory stays readable. One that is
shortened does not: the system ends the program.
"""

import os
import tokenize
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from support.command import warn
from support.files import whole_file


def row_type(shape: tuple[int, ...], dtype: str = "<f2") -> np.dtype:
    """One clip."""
    return np.dtype([("key", "<u8"), ("features", dtype, shape)])


def open_rows(path: Path, kind: np.dtype) -> np.memmap | None:
    """The rows of a file, mapped into memory. None if there is no such file, or no whole one.

    The file is only read. Changes of the array stay in memory.
    """
    if not path.exists():
        return None
    try:
        rows = open_memmap(path, mode="c")
    except (ValueError, EOFError, OverflowError, tokenize.TokenError):
        return None  # a damaged header, or a file that is too short
    return rows if rows.dtype == kind and rows.ndim == 1 else None


def writable_rows(path: Path, kind: np.dtype, count: int) -> np.memmap:
    """The `count` rows of a file, mapped into memory to be filled. Fresh ones if it has none."""
    rows = open_rows(path, kind)
    if rows is None:
        warn_of_damage(path)
    if rows is None or len(rows) != count:
        with whole_file(path) as temporary:
            open_memmap(temporary, mode="w+", dtype=kind, shape=(count,))
            if hasattr(os, "posix_fallocate"):  # an error if the disk is full, and no crash later
                with open(temporary, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
    return open_memmap(path, mode="r+")


def warn_of_damage(path: Path) -> None:
    """To be called before a file is written anew that `open_rows` could not open."""
    if path.exists():
        warn(f"{path} is no whole file of rows: it is built again")
