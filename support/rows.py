"""Files on disk with a row for each clip, which says what it was computed from and shows whether it is whole."""

import os
import sys
import tokenize
import zlib
from pathlib import Path

import numpy as np


def row_type(shape: tuple[int, ...], dtype: str = "<f2") -> np.dtype:
    """One clip. `key` says what it was computed from, `crc` that it is intact; key 0 is an empty row."""
    return np.dtype([("key", "<u8"), ("crc", "<u4"), ("bad", "<u4"), ("features", dtype, shape)])


def crc_of(row: np.void) -> int:
    return zlib.crc32(row["features"], int(row["bad"]))


def map_rows(path: Path, kind: np.dtype) -> np.memmap | None:
    """The rows of a file, mapped into memory; None if there is no such file, or if it holds something else."""
    if not path.exists():
        return None
    try:
        rows = np.lib.format.open_memmap(path, mode="r")  # np.load would take a zip as well
        if rows.dtype != kind or rows.ndim != 1:
            raise ValueError("holds something else")
    except (ValueError, OSError, EOFError, OverflowError, tokenize.TokenError):  # what NumPy raises for a bad header
        print(f"{path}: not a whole feature file, building it again", file=sys.stderr)
        return None
    return rows


def start_rows(path: Path, kind: np.dtype, count: int) -> np.memmap:
    """A file of empty rows, mapped into memory. A full disk is an OSError now; later it would end work of hours."""
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=(count,))
    try:
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:  # it does not say where
        path.unlink()  # what has rows and no place for them would be gone on with
        error.filename = str(path)
        raise
    return rows
