"""Files with one row of numbers for each clip: features, or vectors of a frozen backbone.

A file is the rows and nothing else. A row has a `key`. It is written last, so a program may be
killed at any moment: a row with the right key is whole. Fresh rows have the key 0.

A file that is deleted or replaced while it is mapped into memory stays readable. One that is
shortened does not: the system ends the program.
"""

from pathlib import Path

import numpy as np

from support.files import whole_file


def row_type(shape: tuple[int, ...]) -> np.dtype:
    """One clip."""
    return np.dtype([("key", "<u8"), ("features", "<f2", shape)])


def open_rows(path: Path, kind: np.dtype, count: int) -> np.memmap | None:
    """The rows of a file, mapped into memory. None if the file does not hold so many.

    The file is only read. Changes of the array stay in memory.
    """
    try:
        if not path.stat().st_size == count * kind.itemsize > 0:
            return None
        return np.memmap(path, kind, mode="c", shape=count)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None  # it is not there, or has just been deleted or shortened


def writable_rows(path: Path, kind: np.dtype, count: int) -> np.memmap:
    """The rows of a file, mapped into memory to be filled. Fresh ones if it has not so many."""
    if open_rows(path, kind, count) is None:
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            for _ in range(count):  # an error if the disk is full, and no crash later
                file.write(bytes(kind.itemsize))
    return np.memmap(path, kind, mode="r+")
