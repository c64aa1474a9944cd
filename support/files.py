"""Files and folders that are whole or not there."""

import csv
import errno
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import platformdirs
from filelock import FileLock, Timeout

from support.command import printable


def default_cache_dir() -> Path:
    return Path(platformdirs.user_cache_dir("ast-petl", appauthor=False))


@contextmanager
def locked(path: Path):
    """Hold the lock of what is, or will be, at `path`. Who has to wait for another run says so."""
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=2)
    except Timeout:
        name = printable(path)
        print(f"waiting for another run, which makes {name}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def require_file(path: Path) -> None:
    """An OSError if `path` is a pipe, a device or a folder: to open a pipe may take forever."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no file", str(path))


@contextmanager
def whole_file(path: Path):
    """Yield a temporary path, whose file takes the place of `path` at the end.

    Readers see all of the file or none of it.
    """
    if path.exists() and not path.is_file():  # a folder, or /dev/full, whose place root could take
        raise FileExistsError(errno.EEXIST, "is there and no file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Process numbers repeat on other machines, random names do not.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:  # a full disk does not say where
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_left_behind(folder):
    """Remove the temporary files of `whole_file` that killed processes have left in a folder.

    One that has changed in the last minute may be that of a living process, so it stays.
    """
    for file in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > 60:
                file.unlink()


@contextmanager
def whole_folder(path: Path):
    """Yield an empty folder, which takes the place of `path` at the end.

    The caller holds a lock, so that there is one such folder. An earlier folder lies aside between
    two renames. If the program is killed there, the next call puts it back.
    """
    temporary = path.with_name(f".{path.name}.unfinished")
    earlier = path.with_name(f".{path.name}.earlier")
    put_back(earlier, path)
    shutil.rmtree(temporary, ignore_errors=True)  # a run that was killed may have left it
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            os.replace(path, earlier)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        put_back(earlier, path)
        shutil.rmtree(temporary, ignore_errors=True)


def put_back(earlier: Path, path: Path) -> None:
    """Rename `earlier` to `path` unless that is there. Then `earlier` is removed."""
    if earlier.exists() and not path.exists():
        os.replace(earlier, path)
    shutil.rmtree(earlier, ignore_errors=True)


def csv_of(rows: Iterable[Iterable]) -> str:
    """Rows as CSV, each on a line that ends with \\n."""
    lines = []
    # A line ends with \r\n at first, so that a name with \r or \n in it gets quotes.
    writer = csv.writer(SimpleNamespace(write=lines.append), lineterminator="\r\n")
    writer.writerows(rows)
    return "".join(line.removesuffix("\r\n") + "\n" for line in lines)


def table_of(columns: Iterable[str], rows: Iterable[dict]) -> str:
    """A table as CSV, with a header line."""
    return csv_of([columns, *([row.get(name) for name in columns] for row in rows)])


def to_bytes(text: str) -> bytes:
    """UTF-8. Bytes of a file's name that are no UTF-8 stay as they were."""
    return text.encode("utf-8", "surrogateescape")


def path_in(text: str) -> Path:
    """The path that a text of a file names: in UTF-8, even if the locale has another encoding."""
    return Path(os.fsdecode(to_bytes(text)))


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, content: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(to_bytes(content))
