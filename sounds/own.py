"""The user's own sounds: a folder for each class, a table, or Audacity's label tracks.

Both loaders take `group`, the regular expression of --group, see sounds/groups.py.
"""

import hashlib
import math
import os
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np

from sounds.audio import SUFFIXES, files_in, has_end, lengths_of, typical_seconds
from sounds.clip import PARTS, WHOLE, Clip, Listing, fragment, name_of, names_of
from sounds.groups import grouped, parts_of  # noqa: F401 (parts_of is for data.py)
from sounds.tables import folders_in, read_table, require_files, require_whole
from support.command import UserError, first_of, warn
from support.processes import is_first, say

COLUMNS = ("path", "label", "split", "fold", "group", "start", "end")  # of a table
LIKE_PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


def folder(data_dir: Path | None, cache_dir: Path, group: str | None = None, windows: float | None = None) -> Listing:
    """One sub-folder of `data_dir` for each class, with the sounds anywhere beneath it, cut into `windows` of so many
    seconds, if that is said.

    Above the classes there may be train/, test/ and perhaps val/; otherwise `random_split` draws them.
    """
    if data_dir is None or not data_dir.is_dir():
        problem = "needs --data-dir" if data_dir is None else f"--data-dir {data_dir} is no folder"
        raise UserError(f"--dataset folder: {problem}: give the folder that holds one folder of sound files per class")
    given = any(path.is_dir() for path in data_dir.glob("train/[!.]*"))
    names = [path.name for path in folders_in(data_dir)]
    if given and (unknown := [name for name in names if name not in PARTS]):
        raise UserError(f"{data_dir}: beside train/ there may be val/ and test/ only, not {first_of(unknown)}")
    if names and not given and {name.lower() for name in names} <= LIKE_PARTS:
        raise UserError(f"{data_dir}: {first_of(names)} look like parts, not like classes: call them train, val and "
                        "test, and put a folder for each class into them")  # fmt: skip
    clips, ignored, loose = [], [], []
    for part in PARTS if given else ("",):
        place = data_dir / part
        loose += [file.name for file in place.glob("[!.]*") if file.suffix.lower() in SUFFIXES and file.is_file()]
        for class_folder in folders_in(place) if place.is_dir() else []:
            sounds, others = files_in(class_folder)
            if not sounds:
                raise UserError(f"{class_folder} holds no sounds ({', '.join(SUFFIXES)}): fill it or remove it")
            ignored += [name_of(file, data_dir) for file in others]
            clips += [Clip(sound, class_folder.name, part) for sound in sounds]
    if ignored:
        warn(f"{data_dir}: {len(ignored)} files are no {', '.join(SUFFIXES)}, ignored ({first_of(ignored)})")
    if loose:
        warn(f"{data_dir}: {len(loose)} sounds are in no folder of a class, ignored ({first_of(sorted(loose))})")
    if windows:
        lengths = lengths_of([clip.path for clip in clips], {}).tolist()
        clips = [
            clip._replace(span=span, group=name_of(clip.path, data_dir))
            for clip, length in zip(clips, lengths, strict=True)
            for span in windows_of(clip.path, length, windows)
        ]
    return own_sounds(data_dir, data_dir.resolve().name, clips, group)


def windows_of(path: Path, length: float, seconds: float) -> list[tuple[float, float]]:
    """Spans of so many seconds, one after the other; the last one ends with the recording, and overlaps if need be."""
    if not length > seconds:  # or nobody knows how long it is
        return [WHOLE]
    if not has_end(path, length):  # one piece, and none of those before it: it is refused when it is read
        return [(length - 0.1, math.inf)]
    starts = [min(i * seconds, length - seconds) for i in range(math.ceil(length / seconds - 1e-9))]
    return [(round(start, 6), round(start + seconds, 6)) for start in starts]


def table(data_dir: Path | None, cache_dir: Path, group: str | None = None, windows: float | None = None) -> Listing:
    """A CSV file with the columns path and label, and perhaps split (train, val, test) or fold (a number), group, and
    start and end, in seconds, of a piece of a recording. Or a folder with label tracks.

    Paths are relative to the file. Fold k tests fold k and, of three or more, validates on the one before it.
    """
    if windows:
        raise UserError("--windows cuts the recordings of --dataset folder; for csv the columns start and end do")
    if data_dir is None or not data_dir.exists():
        problem = "needs --data-dir" if data_dir is None else f"--data-dir {data_dir} is not there"
        raise UserError(f"--dataset csv: {problem}: give a CSV file with the columns path and label")
    if data_dir.is_dir():
        return own_sounds(data_dir, data_dir.resolve().name, label_tracks(data_dir), group)
    rows = read_table(data_dir, ["path", "label"])
    for name in rows[0]:
        if name not in COLUMNS and (meant := name.strip().lower()) in COLUMNS:
            raise UserError(f"{data_dir}: the column {name!r} would not be seen: call it {meant!r}")
    if "split" in rows[0] and "fold" in rows[0]:
        raise UserError(f"{data_dir}: has a column split and a column fold; only one of them can say what trains")
    column = next((column for column in ("split", "fold") if column in rows[0]), None)
    needed = ["path", "label", *(name for name in (column, "group") if name in rows[0])]
    if group and "group" in needed:
        raise UserError(f"{data_dir}: has a column group, and there is --group: only one of them can say what belongs "
                        "together")  # fmt: skip
    clips = []
    for row in rows:
        row.update({name: (row[name] or "").strip() for name in needed[1:]})  # a blank is no part of a name
        where, part = f"{data_dir}, line {row.line}", row[column] if column else ""
        if empty := [name for name in needed if not row[name]]:
            raise UserError(f"{where}: an empty {empty[0]}")
        span = span_of(row.get("start"), row.get("end"), where)
        if column == "split" and part not in PARTS:
            raise UserError(f"{where}: split is {part!r}; it must be train, val or test")
        if column == "fold":
            require_whole(part, "fold", where)
            part = int(part)
        if "\0" in row["path"]:
            raise UserError(f"{where}: path is {row['path'][:100]!r}; no file has a NUL byte in its name")
        path = data_dir.parent / os.fsdecode(row["path"].encode())  # where the locale has no UTF-8, too
        clips.append(Clip(path, row["label"], part, span, row.get("group", "")))
    require_each_once(data_dir, clips)
    require_files(data_dir.parent, list(dict.fromkeys(clip.path for clip in clips)))
    return own_sounds(data_dir.parent, data_dir.stem, clips, group)


def require_each_once(origin: Path, clips: list[Clip]) -> None:
    first, real = {}, {path: os.path.realpath(path) for path in {clip.path for clip in clips}}  # a.wav is x/../a.wav
    for clip in clips:
        other = first.setdefault((real[clip.path], clip.span), clip)
        if other is not clip:
            name = f"{clip.path}" if other.path == clip.path else f"{other.path} = {clip.path}"
            kind = "split" if isinstance(clip.part, str) else "fold"
            where = f"in {kind} {other.part} and {clip.part}" if other.part != clip.part else "twice"
            raise UserError(f"{origin}: {name}{fragment(clip.span)} is listed {where}: every clip must be listed once")


def span_of(start: str | None, end: str | None, where: str) -> tuple[float, float]:
    """The texts of two seconds, of which each may be empty, as numbers. UserError if they are no span."""
    span = []
    for name, text, otherwise in (("start", start, WHOLE[0]), ("end", end, WHOLE[1])):
        try:
            span.append(round(float(text), 6) if text else otherwise)
        except ValueError:
            span.append(math.nan)
        if not 0 <= span[-1] <= (1e9 if text else math.inf):
            raise UserError(f"{where}: {name} is {text[:100]!r}; it must be seconds like 12.5")
    if span[1] <= span[0]:
        raise UserError(f"{where}: it ends at {span[1]:g} s, which is not after its start at {span[0]:g} s")
    return tuple(span)


def label_tracks(root: Path) -> list[Clip]:
    """What Audacity's label tracks beneath `root` say of the sounds beside them, rain.txt of rain.wav; not those that
    tools.predict wrote, rain.wav.events.txt.

    A line is a start and an end, in seconds, and a label, with tabs between them.
    """
    sounds, others = files_in(root)
    tracks = [file for file in others if file.suffix.lower() == ".txt" and not file.name.endswith(".events.txt")]
    beside, clips = defaultdict(list), []
    for sound in sounds:
        beside[sound.with_suffix("")].append(sound)
    for track in tracks:
        if len(found := beside.pop(track.with_suffix(""), [])) != 1:
            what = "more than one sound" if found else "no sound"
            raise UserError(f"{track}: a label track with {what} beside it ({track.stem}.wav or another of its name)")
        try:
            lines = track.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{track}: a label track must be text in UTF-8") from None
        for number, line in enumerate(lines, start=1):
            if not line.strip() or line.startswith("\\"):  # the second line of a label that has frequencies
                continue
            where, fields = f"{track}, line {number}", line.split("\t")
            if len(fields) < 3 or not fields[2].strip():
                raise UserError(f"{where}: it must be a start, an end and a label, with tabs between them")
            clips.append(Clip(found[0], fields[2].strip(), span=span_of(*fields[:2], where)))
    if not clips:
        raise UserError(f"{root}: no labels in {len(tracks)} label tracks (.txt beside the sounds): export some")
    require_each_once(root, clips)
    if beside:
        names = [name_of(sound, root) for sounds in beside.values() for sound in sounds]
        warn(f"{root}: {len(names)} sounds have no label track, ignored ({first_of(names)})")
    return clips


def own_sounds(root: Path, name: str, clips: list[Clip], group: str | None) -> Listing:
    """A Listing of the clips. Raises UserError for what cannot be trained or tested, warns of likely mistakes."""
    clips = grouped(root, clips, group)
    counts = Counter(clip.label for clip in clips)
    if long := [label for label in counts if len(label) > 1000]:  # the header of a fold file would not take it
        raise UserError(f"{root}: a label of {len(long[0])} characters, {long[0][:50]!r}...: give it 1000 or less")
    paths = names_of([clip.path for clip in clips], root)
    if broken := [text for text in (*counts, *paths) if "\r" in text]:  # the tables of a run would not take it
        raise UserError(f"{root}: {broken[0][:100]!r}: a carriage return in a label or a path: give it another name")
    if "unsure" in counts:
        raise UserError(f"{root}: 'unsure' is what tools.predict says of sounds of no class: rename this class")
    if len(counts) < 2:
        raise UserError(f"{root}: {len(counts)} classes; there must be two or more to tell apart")
    if all(clip.part == "" for clip in clips) and 1 in counts.values():
        alone = next(label for label, count in counts.items() if count == 1)
        raise UserError(f"{root}: class {alone!r} has one clip; one to train and one to test are needed")
    if all(clip.part == "" and clip.group for clip in clips):
        groups = defaultdict(set)
        for clip in clips:
            groups[clip.label].add(clip.group)
        if alone := [label for label in groups if len(groups[label]) == 1]:
            where = f"{root}: class {alone[0]!r} has clips of one group only, {min(groups[alone[0]])!r}"
            raise UserError(f"{where}; one to train and one to test are needed (--group '(.*)': every clip is one)")
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


def tell_of_gaps(dataset, folds: dict) -> None:
    """A warning for classes that a drawn split or --skip-bad leaves no clips to
    train or to test; what the data say themselves is for `check_folds`."""
    for fold, split in folds.items():
        for part, what in (("train", "training"), ("test", "test")):
            before = getattr(dataset.folds.get(fold), part, range(len(dataset.labels)))  # a drawn one: of all clips
            gone = {dataset.labels[i] for i in before} - {dataset.labels[i] for i in getattr(split, part)}
            if gone and is_first():
                names = first_of([dataset.classes[label] for label in sorted(gone)])
                warn(f"{dataset.root}: {len(gone)} classes have no {what} clips in fold {fold} ({names})")


def seconds_of(dataset, seconds: float | None) -> float:
    """`seconds`, or else so many that 95 % of the clips that may train fit; says what is cut."""
    lengths = lengths_of(dataset.paths, dataset.spans)
    may_train = set().union(*(split.train for split in dataset.folds.values())) or range(len(lengths))
    seconds = seconds or typical_seconds(lengths[sorted(may_train)])
    tell_of_cuts(dataset, lengths, seconds)
    return seconds


def tell_of_cuts(dataset, lengths: np.ndarray, seconds: float) -> None:
    """Say how many clips of a dataset, so many seconds long, (clips,), are longer than the model hears, and how much of
    them is left out; and which pieces are not all there."""
    if short := [i for i, (start, end) in dataset.spans.items() if 0 < lengths[i] < end - start - 0.1 < math.inf]:
        names = first_of([dataset.names[i] for i in short])
        warn(f"{dataset.root}: {len(short)} pieces end after their recordings ({names}): what is there is used")
    over = np.nan_to_num(lengths - seconds).clip(0)
    if count := int((over > 0.02).sum()):  # less is the end of the last frame
        say(f"{count} of {len(lengths)} clips are longer than {seconds:g} s: {over.sum():.1f} s of "
            f"{np.nansum(lengths):.1f} s ({over.sum() / np.nansum(lengths):.1%}) are not heard; longer --seconds, a "
            "table with start and end or, of folders, --windows keep them")  # fmt: skip


def warn_of_copies(root: Path, clips: list[Clip]) -> None:
    """Warn of files with the same content in different parts: what has been trained on would be tested."""

    def middle(path):  # the ends may be silence that many files share
        with open(path, "rb") as file:
            file.seek(path.stat().st_size // 2)
            return file.read(4096)

    groups = [list({clip.path: clip for clip in clips}.values())]  # of the pieces of a recording one
    # From quick to slow: hardly any file is read as a whole.
    for key in (lambda path: path.stat().st_size, middle, lambda path: hashlib.sha256(path.read_bytes()).digest()):
        alike = defaultdict(list)
        for number, group in enumerate(groups):
            for clip in group:
                with suppress(OSError):  # those that cannot be read are told when they are
                    alike[number, key(clip.path)].append(clip)
        groups = [group for group in alike.values() if len(group) > 1]
    where = "and may come into different splits"
    if any(clip.part != "" for clip in clips):
        where, groups = "in different splits", [group for group in groups if len({clip.part for clip in group}) > 1]
    groups = [group for group in groups if not group[0].group or len({clip.group for clip in group}) > 1]
    if groups:
        names = (names_of([clip.path for clip in group], root) for group in groups)
        copies = first_of([" = ".join(same) for same in names])
        warn(f"{root}: {len(groups)} sounds are there more than once {where} ({copies})")
