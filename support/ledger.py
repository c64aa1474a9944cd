"""The text files of a run, and SHA256SUMS beside them, by which damage to them shows; `sha256sum -c` reads it too."""

import hashlib
import re
from pathlib import Path

from filelock import FileLock

from support.command import UserError
from support.files import to_bytes, write_text

FILES = ("config.json", "split.csv", "metrics.csv", "predictions.csv", "confusion.csv", "result.json")
LINE = re.compile(f"(# )?([0-9a-f]{{64}})  ({'|'.join(map(re.escape, FILES))})")


def lock(folder: Path) -> FileLock:
    """Who writes into the folder of a run holds it: folds may be trained at the same time, on several machines."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / ".run.lock")


def hash_of(content: str | bytes) -> str:
    return hashlib.sha256(content if isinstance(content, bytes) else to_bytes(content)).hexdigest()


def write_files(folder: Path, contents: dict[str, str]) -> None:
    """Write text files, whole, and list them in SHA256SUMS. The caller holds the lock.

    First the list announces, in comments, what the files will be; at the end it says that they are. Wherever the writer
    is killed, each file is what is listed or what is announced, and only something else is damage.
    """
    listed, announced = read_sums(folder)
    for name, digest in announced.items():  # by a writer that was killed
        if sum_of(folder / name) == digest:
            listed[name] = digest
    new = {name: hash_of(content) for name, content in contents.items()}
    write_sums(folder, listed, new)
    for name, content in contents.items():
        write_text(folder / name, content)
    write_sums(folder, {**listed, **new}, {})


def wrong(folder: Path) -> list[str]:
    """The files that are not what SHA256SUMS lists or announces; one that is only announced may be missing.

    None in a run of an earlier version, which has no such list.
    """
    listed, announced = read_sums(folder)
    sums = {name: sum_of(folder / name) for name in FILES if name in listed or name in announced}
    return [name for name, digest in sums.items() if digest not in (listed.get(name), announced.get(name, "none"))]


def sum_of(file: Path) -> str | None:
    """None if there is no such file."""
    return hash_of(file.read_bytes()) if file.exists() else None


def read_sums(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """What SHA256SUMS lists, and what it announces: {name: SHA-256}. UserError if it is something else."""
    file, sums = folder / "SHA256SUMS", {"": {}, "# ": {}}
    if file.exists():
        matches = [LINE.fullmatch(line) for line in file.read_bytes().decode("latin-1").splitlines()] or [None]
        if None in matches:
            raise UserError(f"{file} is damaged: delete it, and the same command of train.py writes it again")
        for match in matches:
            mark, digest, name = match.groups("")
            sums[mark][name] = digest
    return sums[""], sums["# "]


def write_sums(folder: Path, listed: dict[str, str], announced: dict[str, str]) -> None:
    lines = [f"{digest}  {name}\n" for name, digest in listed.items()]
    lines += [f"# {digest}  {name}\n" for name, digest in announced.items()]
    write_text(folder / "SHA256SUMS", "".join(lines))
