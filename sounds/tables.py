"""Tables of clips, and whether the files that they name are there."""

import csv
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from sounds.clip import name_of
from support.command import UserError, first_of, is_number
from support.files import require_file


def read_table(
    path: Path, columns: Iterable[str], integers: Iterable[str] = ()
) -> list[dict[str, str]]:
    """The rows of a CSV file with a header line. Their key `where` has the file and the line.

    UserError if one of the `columns` is missing, if a column is there twice, or if one of the
    `integers` is no whole number.
    """
    require_file(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            rows = [row | {"where": f"{path}, line {reader.line_num}"} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path} ({error}): it must be a CSV file in UTF-8") from None
    for column in columns:
        if column not in header:
            found = ", ".join(header) or "empty"
            raise UserError(f"{path}: no column {column!r}; its header is {found}")
    for column, count in Counter(map(plain_column, header)).items():
        if column and count > 1:
            raise UserError(f"{path}: {count} columns are called {column!r}: keep one of them")
    if not rows:
        raise UserError(f"{path}: no rows beneath the header")
    for row in rows:
        surplus = row.pop(None, [])
        if any(surplus) or None in row.values():
            raise UserError(
                f"{row['where']}: its cells do not fit the header; put a cell that has a comma in "
                "it into quotes"
            )
        for column in integers:
            require_whole(row[column], column, row["where"])
    return rows


def plain_column(name: str) -> str:
    """The name of a column of the user's own table: without blanks around it and capitals."""
    return name.strip().lower()


def require_whole(text: str, column: str, where: str) -> None:
    if not is_number(text):
        raise UserError(f"{where}: {column} is {text[:100]!r}; it must be a whole number")


def require_files(root: Path, paths: list[Path]) -> None:
    """UserError that counts the missing files and names the first five."""
    missing = [name_of(path, root) for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{root}: {len(missing)} of {len(paths)} files are missing ({first_of(missing)}): "
            "complete it"
        )


def folders_in(root: Path) -> list[Path]:
    """The folders in a folder, in order, without hidden ones."""
    return sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
