"""The features of a dataset on disk. They are computed once, on all cores, by any function."""

import hashlib
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from support.command import UserError, printable
from support.files import locked, to_bytes
from support.progress import Bar
from support.rows import open_rows, row_type, writable_rows

Compute = Callable[[int], np.ndarray]  # of the number of a clip; ValueError: it cannot be read


def cached(
    dataset,
    shape: tuple[int, int],
    front_end: str,
    compute: Compute,
    cache_dir: Path,
    skip_bad: bool,
) -> tuple[np.memmap, dict[int, str]]:
    """Features of all clips of a `data.Dataset`, float16 (clips, *shape), mapped into memory.

    `compute(i)` returns those of clip i. `front_end` is a text that changes when `compute` computes
    something else. Also returns why clips have no features, by their index. Such clips are a
    UserError unless `skip_bad`.

    The features are kept under `cache_dir`. A build that was killed goes on where it was. Clips
    that have changed on disk are computed again, and the others stay. The file lands by one rename
    under a lock, so any number of processes may ask for it at once. A file that is complete is only
    read, so the folder may be read-only.
    """
    where = hashlib.sha256(os.fsencode(dataset.root.resolve())).hexdigest()[:8]
    path = cache_dir / "features" / f"{dataset.name}-{shape[0]}-{where}.rows"
    kind = row_type(shape)
    named = zip(dataset.paths, dataset.names, strict=True)
    keys = np.array([key_of(clip, name, front_end) for clip, name in named], "<u8")

    found = complete(path, kind, keys, compute)
    if found is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            found = complete(path, kind, keys, compute)  # by another process, meanwhile
            if found is None:
                partial = path.with_suffix(".partial")
                bad = fill(partial, path, kind, keys, compute, dataset.name)
                os.replace(partial, path)
                found = open_rows(path, kind, len(keys)), bad
    rows, bad = found
    if rows is None:
        raise UserError(
            f"{path} was deleted as soon as it was written: give a --cache-dir that is left alone"
        )

    for i, reason in bad.items():
        name = printable(dataset.root / dataset.names[i])
        print(f"  {name}: {printable(reason)}", file=sys.stderr)
    if bad and not skip_bad:
        raise UserError(
            f"{len(bad)} of {len(rows)} sound files cannot be used (listed above): "
            "mend them, or add --skip-bad to train without them"
        )
    if bad:
        print(f"--skip-bad: going on without {len(bad)} of {len(rows)} clips", file=sys.stderr)
    return rows["features"], bad


def key_of(path: Path, name: str, front_end: str) -> int:
    """A number that changes with `front_end`, the file, and the name of the clip with its span."""
    try:
        info = os.stat(path)
    except OSError:  # a link that leads nowhere
        info = os.lstat(path)
    source = f"{front_end}, {name}, {info.st_size} bytes, modified {info.st_mtime_ns}"
    return int.from_bytes(hashlib.sha256(to_bytes(source)).digest()[:8], "little")


def complete(
    path: Path, kind: np.dtype, keys: np.ndarray, compute: Compute
) -> tuple[np.memmap, dict[int, str]] | None:
    """The rows of a file that has all clips, and why some are bad. None if there is work to do.

    Bad clips are read again, because they may have been mended.
    """
    rows = open_rows(path, kind, len(keys))
    if rows is None:
        return None
    bad = {}
    for i in np.flatnonzero(rows["key"] != keys).tolist():
        try:
            compute(i)
            return None
        except ValueError as error:
            bad[i] = str(error)
    return rows, bad


def fill(
    partial: Path, path: Path, kind: np.dtype, keys: np.ndarray, compute: Compute, name: str
) -> dict[int, str]:
    """Fill the rows of `partial` that are missing, and return why clips are bad.

    `path` is the file that it will replace. Rows that can be found there are copied.
    """
    rows = writable_rows(partial, kind, len(keys))
    rows["key"][rows["key"] != keys] = 0
    old = None
    if path.exists():
        old = open_rows(path, kind, path.stat().st_size // kind.itemsize)
    if old is not None:  # a clip may have had another number
        row_of = {key: row for row, key in enumerate(old["key"].tolist())}
        for i, key in enumerate(keys.tolist()):
            if not rows["key"][i] and key in row_of:
                rows["features"][i] = old["features"][row_of[key]]
                rows["key"][i] = key
    missing = np.flatnonzero(rows["key"] == 0).tolist()
    bad = {}

    def make(i: int) -> None:
        try:
            rows["features"][i] = compute(i)
            rows["key"][i] = keys[i]
        except ValueError as error:
            bad[i] = str(error)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one clip is too small to share between cores: each takes its own
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in Bar(pool.map(make, missing), f"features of {name}", total=len(missing)):
                pass
    finally:
        torch.set_num_threads(threads)
    kept = printable(f"of {len(keys)} clips, kept in {path}")
    print(f"features of {printable(name)}: built {len(missing)} {kept}")
    return dict(sorted(bad.items()))
