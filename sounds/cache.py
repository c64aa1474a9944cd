"""The features of a dataset on disk: computed once, on all cores, by whatever function it is given."""

import hashlib
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from sounds.clip import WHOLE, fragment
from support.command import UserError
from support.files import locked
from support.progress import Bar
from support.rows import crc_of, map_rows, row_type, start_rows

_BLOCK = 64  # clips in memory at once while features are built or checked
Compute = Callable[[int], np.ndarray]  # of a clip's number; ValueError, with the reason: it cannot be read


def _row_key(path: Path, name: str, front_end: str) -> int:
    """Changes when the file, the clip's `name` in the dataset, which has its span, or the front end changes."""
    try:
        info = os.stat(path)
    except FileNotFoundError:
        info = os.lstat(path)  # a link that leads nowhere
    source = f"{front_end}, {name}, {info.st_size} bytes, modified {info.st_mtime_ns}"
    return int.from_bytes(hashlib.sha256(os.fsencode(source)).digest()[:8], "little")


def _make_row(i: int, key: int, kind: np.dtype, compute: Compute) -> tuple[np.ndarray, str]:
    """The row of clip `i`, (1,), and why it has no features; "" if it has."""
    row, reason = np.zeros(1, kind), ""
    try:
        row["features"] = compute(i)
    except ValueError as error:
        row["bad"], reason = 1, str(error)
    row["key"], row["crc"] = key, crc_of(row[0])
    return row, reason


def _read_index(path: Path, kind: np.dtype, check: bool = True) -> np.ndarray | None:
    """`key` and `bad` of every row of a feature file, (clips,); a damaged row has key 0. None if there is no such file.

    Reads the file block by block: mapped into memory, all of it would count as memory of this process. Unless `check`,
    damage to features is not looked for, and they are not read.
    """
    rows = map_rows(path, kind)
    if rows is None:
        return None
    index = np.zeros(len(rows), [("key", "<u8"), ("bad", "?")])
    if not check:
        index["key"], index["bad"] = rows["key"], rows["bad"]
        return index
    damaged = 0
    with open(path, "rb") as file:
        file.seek(rows.offset)
        for start in range(0, len(rows), _BLOCK):
            block = np.fromfile(file, rows.dtype, min(_BLOCK, len(rows) - start))
            broken = [bool(row["key"]) and crc_of(row) != row["crc"] for row in block]
            damaged += sum(broken)
            index["key"][start : start + _BLOCK] = np.where(broken, 0, block["key"])
            index["bad"][start : start + _BLOCK] = block["bad"]
    if damaged:
        print(f"{path}: {damaged} damaged rows, building them again", file=sys.stderr)
    return index


def cached(
    dataset, shape: tuple[int, int], front_end: str, compute: Compute, cache_dir: Path, skip_bad: bool = False
) -> tuple[np.ndarray, dict[int, str]]:
    """`compute` of the number of every clip of a `data.Dataset`, float16 (clips, *shape), memory-mapped; and why clips
    have none, by their number. `front_end` is text that changes when `compute` computes something else.

    Built once, with all cores, and kept under `cache_dir`: a second call only checks the file. A build that was killed
    goes on where it was; clips that changed on disk are built again, the others kept. The file lands by one rename
    under a lock, so any number of processes may ask for it at once. Unreadable clips are listed, and a UserError is
    raised unless `skip_bad`.
    """
    where = hashlib.sha256(os.fsencode(dataset.root.resolve())).hexdigest()[:8]
    path = cache_dir / "features" / f"{dataset.name}-{shape[0]}-{where}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    names, kind = dataset.names, row_type(shape)
    named = zip(dataset.paths, names, strict=True)
    keys = np.array([_row_key(clip, name, front_end) for clip, name in named], dtype="<u8")

    def reasons(index):  # read again for the reason: the file knows only that there was one
        return {i: _make_row(i, 0, kind, compute)[1] for i in np.flatnonzero(index["bad"]).tolist()}

    with locked(path):
        index = _read_index(path, kind, check=False)
        whole = index is not None and np.array_equal(index["key"], keys)
        bad = reasons(index) if whole else {}
        if not whole or "" in bad.values():  # a file that can be read by now
            _build_rows(path, None if index is None else _read_index(path, kind), keys, dataset, kind, compute)
            bad = reasons(_read_index(path, kind, check=False))
        rows = np.load(path, mmap_mode="c")  # copy on write: nothing done to the array reaches the file
    if bad:
        for i, reason in bad.items():
            print(f"  {dataset.paths[i]}{fragment(dataset.spans.get(i, WHOLE))}: {reason}", file=sys.stderr)
        if not skip_bad:
            raise UserError(
                f"{len(bad)} of {len(rows)} sound files cannot be used (listed above): mend them, or add --skip-bad to "
                "train without them"
            )
        print(f"--skip-bad: going on without {len(bad)} of {len(rows)} clips", file=sys.stderr)
    return rows["features"], bad


def _build_rows(
    path: Path, index: np.ndarray | None, keys: np.ndarray, dataset, kind: np.dtype, compute: Compute
) -> None:
    """Fill the rows that are missing, in `.partial.npy`; then it takes the place of `path`, whose index is `index`.

    Every row carries its key and checksum, so the partial file may be left at any moment and taken up again.
    """
    partial = path.with_suffix(".partial.npy")
    started = _read_index(partial, kind)
    if started is None or len(started) != len(keys):
        _start_partial(partial, path, index, keys, kind)
        started = _read_index(partial, kind)
    missing = np.flatnonzero((started["key"] != keys) | started["bad"])
    if len(missing) < len(keys) or index is not None:
        print(f"features of {dataset.name}: {len(missing)} of {len(keys)} clips are new, changed or unfinished")
    progress = Bar(total=len(missing), desc=f"features of {dataset.name}")
    start, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)  # one clip is too small to share between cores; each core takes its own
    try:
        with open(partial, "r+b") as file, ThreadPoolExecutor(os.cpu_count()) as pool, progress:
            offset = np.load(partial, mmap_mode="r").offset
            for first in range(0, len(missing), _BLOCK):
                block = missing[first : first + _BLOCK]
                made = pool.map(lambda i: _make_row(i, keys[i], kind, compute), block)
                for i, (row, _) in zip(block.tolist(), made, strict=True):
                    file.seek(offset + i * row.nbytes)
                    file.write(row.tobytes())
                    progress.update()
    finally:
        torch.set_num_threads(threads)
    os.replace(partial, path)
    rate = len(missing) / (time.perf_counter() - start)
    print(f"features of {dataset.name}: built {len(missing)} of {len(keys)} clips, {rate:.0f} clips/s, kept in {path}")


def _start_partial(partial: Path, path: Path, index: np.ndarray | None, keys: np.ndarray, kind: np.dtype) -> None:
    """An empty feature file for `keys`, with the rows that `path` (whose index is `index`) already has."""
    rows = start_rows(partial, kind, len(keys))
    if index is None:
        return
    row_of = {key: row for row, key in enumerate(index["key"].tolist()) if key}
    with open(path, "rb") as old, open(partial, "r+b") as file:
        old_offset = np.load(path, mmap_mode="r").offset
        for i, key in enumerate(keys.tolist()):
            if key in row_of:
                old.seek(old_offset + row_of[key] * rows.itemsize)
                file.seek(rows.offset + i * rows.itemsize)
                file.write(old.read(rows.itemsize))
