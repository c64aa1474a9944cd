"""The user's own sounds: a folder for each class, or a table."""

import hashlib
import os
from collections import Counter, defaultdict
from pathlib import Path

from sounds.audio import SUFFIXES, files_in
from sounds.clip import PARTS, Clip, Listing, names_of
from sounds.tables import folders_in, read_table, require_files
from support.command import UserError, first_of, is_number, warn


def folder(data_dir: Path | None, cache_dir: Path) -> Listing:
    """One sub-folder of `data_dir` for each class, with the sounds anywhere beneath it.

    Above the classes there may be train/, test/ and perhaps val/; otherwise `random_split` draws them.
    """
    if data_dir is None or not data_dir.is_dir():
        problem = "needs --data-dir" if data_dir is None else f"--data-dir {data_dir} is no folder"
        raise UserError(f"--dataset folder: {problem}: give the folder that holds one folder of sound files per class")
    given = any(path.is_dir() for path in data_dir.glob("train/[!.]*"))
    if given:
        unknown = [path.name for path in folders_in(data_dir) if path.name not in PARTS]
        if unknown:
            raise UserError(f"{data_dir}: beside train/ there may be val/ and test/ only, not {first_of(unknown)}")
    clips, ignored = [], []
    for part in PARTS if given else ("",):
        for class_folder in folders_in(data_dir / part) if (data_dir / part).is_dir() else []:
            sounds, others = files_in(class_folder)
            if not sounds:
                raise UserError(f"{class_folder} holds no sounds ({', '.join(SUFFIXES)}): fill it or remove it")
            ignored += [os.path.relpath(file, data_dir) for file in others]
            clips += [Clip(sound, class_folder.name, part) for sound in sounds]
    if ignored:
        warn(f"{data_dir}: {len(ignored)} files are no {', '.join(SUFFIXES)}, ignored ({first_of(ignored)})")
    return own_sounds(data_dir, data_dir.resolve().name, clips)


def table(data_dir: Path | None, cache_dir: Path) -> Listing:
    """A CSV file with the columns path and label, and perhaps split (train, val, test) or fold (a number).

    Paths are relative to the file. Fold k tests fold k and, of three or more, validates on the one before it.
    """
    if data_dir is None or not data_dir.is_file():
        problem = "needs --data-dir" if data_dir is None else f"--data-dir {data_dir} is no file"
        raise UserError(f"--dataset csv: {problem}: give a CSV file with the columns path and label")
    rows = read_table(data_dir, ["path", "label"])
    if "split" in rows[0] and "fold" in rows[0]:
        raise UserError(f"{data_dir}: has a column split and a column fold; only one of them can say what trains")
    column = next((column for column in ("split", "fold") if column in rows[0]), None)
    for line, row in enumerate(rows, start=2):
        if not row["path"] or not row["label"] or (column and not row[column]):
            raise UserError(f"{data_dir}, line {line}: an empty path, label or {column or 'column'}")
        if column == "split" and row["split"] not in PARTS:
            raise UserError(f"{data_dir}, line {line}: split is {row['split']!r}; it must be train, val or test")
        if column == "fold" and not is_number(row["fold"]):
            raise UserError(f"{data_dir}, line {line}: fold is {row['fold'][:100]!r}; it must be a whole number")
    part = int if column == "fold" else str
    names = [os.fsdecode(row["path"].encode()) for row in rows]  # where the locale has no UTF-8, too
    clips = [
        Clip(data_dir.parent / name, row["label"], part(row[column]) if column else "")
        for name, row in zip(names, rows, strict=True)
    ]
    first = {}
    for clip in clips:
        other = first.setdefault(os.path.realpath(clip.path), clip)  # a.wav is x/../a.wav
        if other is not clip:
            name = f"{clip.path}" if other.path == clip.path else f"{other.path} = {clip.path}"
            where = f"in {column} {other.part} and {clip.part}" if other.part != clip.part else "twice"
            raise UserError(f"{data_dir}: {name} is listed {where}: every clip must be listed once")
    require_files(data_dir.parent, [clip.path for clip in clips])
    return own_sounds(data_dir.parent, data_dir.stem, clips)


def own_sounds(root: Path, name: str, clips: list[Clip]) -> Listing:
    """A Listing of the clips. Raises UserError for what cannot be trained or tested, warns of likely mistakes."""
    counts = Counter(clip.label for clip in clips)
    if len(counts) < 2:
        raise UserError(f"{root}: {len(counts)} classes; there must be two or more to tell apart")
    if all(clip.part == "" for clip in clips) and 1 in counts.values():
        alone = next(label for label, count in counts.items() if count == 1)
        raise UserError(f"{root}: class {alone!r} has one clip; one to train and one to test are needed")
    warn_of_copies(root, clips)
    return Listing(root, clips, name=name)


def check_folds(dataset) -> None:
    """UserError for a fold that cannot be trained or tested; warnings for classes that are hardly there."""
    for fold, split in dataset.folds.items():
        if not split.train or not split.test:
            raise UserError(f"{dataset.root}: no clips to {'test' if split.train else 'train'}: say which in the data")
        training, testing = (Counter(dataset.labels[i] for i in clips) for clips in (split.train, split.test))
        for label, class_name in enumerate(dataset.classes):
            where = f"{dataset.root}: class {class_name!r} has"
            if not training[label]:
                raise UserError(f"{where} no training clips in fold {fold}: add some")
            if training[label] == 1:
                warn(f"{where} one training clip in fold {fold}")
            if not testing[label]:
                warn(f"{where} no test clips in fold {fold}")


def warn_of_copies(root: Path, clips: list[Clip]) -> None:
    """Warn of files with the same content in different parts: what has been trained on would be tested."""

    def middle(path):  # the ends may be silence that many files share
        with open(path, "rb") as file:
            file.seek(path.stat().st_size // 2)
            return file.read(4096)

    groups = [clips]
    # From quick to slow: hardly any file is read as a whole.
    for key in (lambda path: path.stat().st_size, middle, lambda path: hashlib.sha256(path.read_bytes()).digest()):
        alike = defaultdict(list)
        for number, group in enumerate(groups):
            for clip in group:
                alike[number, key(clip.path)].append(clip)
        groups = [group for group in alike.values() if len(group) > 1]
    where = "and may come into different splits"
    if any(clip.part != "" for clip in clips):
        where, groups = "in different splits", [group for group in groups if len({clip.part for clip in group}) > 1]
    if groups:
        names = (names_of([clip.path for clip in group], root) for group in groups)
        copies = first_of([" = ".join(same) for same in names])
        warn(f"{root}: {len(groups)} sounds are there more than once {where} ({copies})")
