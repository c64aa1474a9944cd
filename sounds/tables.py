"""Tables of clips, and whether the files that they name are there."""

import csv
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from sounds.clip import name_of
from support.command import UserError, first_of, is_number, warn


class Row(dict[str, str]):
    """A row of a table, and the line of the file on which it ends."""

    def __init__(self, cells: dict[str, str], line: int):
        super().__init__(cells)
        self.line = line


def read_table(path: Path, columns: Iterable[str], integers: Iterable[str] = ()) -> list[Row]:
    """The rows of a CSV file with a header line.

    UserError if one of the `columns` is missing, or one of the `integers` is no whole number.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            rows = [Row(row, reader.line_num) for row in reader]
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such table") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path} ({error}): it must be a CSV file in UTF-8") from None
    for column in columns:
        if column not in header:
            found = ", ".join(header) or "empty"
            raise UserError(f"{path}: no column {column!r}; its header is {found}")
    if not rows:
        raise UserError(f"{path}: no rows beneath the header")
    for row in rows:
        where = f"{path}, line {row.line}"
        if any(row[column] is None for column in columns):
            raise UserError(f"{where}: too few columns; is the file whole?")
        if any(row.pop(None, [])):
            raise UserError(
                f"{where}: too many columns; put a cell that has a comma in it into quotes"
            )
        for column in integers:
            require_whole(row[column], column, where)
    return rows


def require_whole(text: str, column: str, where: str) -> None:
    """UserError if it is no whole number, or larger than the header of a fold file can have."""
    if not is_number(text) or int(text) >= 2**31:
        raise UserError(
            f"{where}: {column} is {text[:100]!r}; it must be a whole number below {2**31}"
        )


def require_files(root: Path, paths: list[Path]) -> None:
    """UserError that counts the missing files and names the first five."""
    missing = [name_of(path, root) for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{root}: {len(missing)} of {len(paths)} files are missing ({first_of(missing)}): "
            "complete it"
        )


def warn_of_recordings(root: Path, rows: list[Row], column: str) -> None:
    """Say how many clips are of recordings that have clips in several folds.

    `column` names the recording. A table without it says nothing.
    """
    folds = defaultdict(set)
    for row in rows:
        folds[row.get(column)].add(row["fold"])
    folds.pop(None, None)
    crossing = sum(len(folds[row[column]]) > 1 for row in rows) if folds else 0
    if crossing:
        warn(
            f"{root}: {crossing} of {len(rows)} clips are of recordings ({column}) that have clips "
            "in several folds: what is tested was in part heard in training"
        )


def folders_in(root: Path) -> list[Path]:
    """The folders in a folder, in order, without hidden ones."""
    return sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
