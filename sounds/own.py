"""The user's own sounds: a folder for each class, a table, or Audacity's label tracks.

Both loaders take `group`, the regular expression of --group: see sounds/groups.py.
"""

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from sounds.audio import SUFFIXES, files_in, has_end, lengths_of, typical_seconds
from sounds.clip import PARTS, WHOLE, Clip, Listing, fragment, name_of, names_of
from sounds.groups import parts_of, with_groups  # noqa: F401 (parts_of is for data.py)
from sounds.tables import Row, folders_in, read_table, require_files, require_whole
from support.command import UserError, first_of, warn
from support.processes import is_first, say

COLUMNS = ("path", "label", "split", "fold", "group", "start", "end")  # of a table
LIKE_PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}

# ----------------------------------------------------------------------------- a folder of classes


def folder(
    data_dir: Path | None, cache_dir: Path, group: str | None = None, windows: float | None = None
) -> Listing:
    """One folder in `data_dir` for each class, with the sounds anywhere beneath it.

    Above the classes there may be train/, test/ and perhaps val/. Otherwise the seed draws the
    parts. `windows` are the seconds of the pieces that the recordings are cut into.
    """
    if data_dir is None or not data_dir.is_dir():
        problem = "needs --data-dir" if data_dir is None else f"--data-dir {data_dir} is no folder"
        raise UserError(
            f"--dataset folder: {problem}: give the folder that holds one folder of sound files "
            "per class"
        )
    clips = []
    ignored = []
    loose = []
    for part in parts_in(data_dir):
        place = data_dir / part
        files = [file for file in place.glob("[!.]*") if file.suffix.lower() in SUFFIXES]
        loose += [file.name for file in files if file.is_file()]
        for class_folder in folders_in(place):
            sounds, others = files_in(class_folder)
            if not sounds:
                raise UserError(
                    f"{class_folder} holds no sounds ({', '.join(SUFFIXES)}): fill it or remove it"
                )
            ignored += [name_of(file, data_dir) for file in others]
            clips += [Clip(sound, class_folder.name, part) for sound in sounds]
    if ignored:
        kinds = ", ".join(SUFFIXES)
        warn(f"{data_dir}: {len(ignored)} files are no {kinds}, ignored ({first_of(ignored)})")
    if loose:
        names = first_of(sorted(loose))
        warn(f"{data_dir}: {len(loose)} sounds are in no folder of a class, ignored ({names})")
    if windows:
        clips = cut(data_dir, clips, windows)
    return own_sounds(data_dir, data_dir.resolve().name, clips, group)


def parts_in(data_dir: Path) -> list[str]:
    """The parts that have a folder above those of the classes. [""] if there are none."""
    names = [path.name for path in folders_in(data_dir)]
    if any(path.is_dir() for path in data_dir.glob("train/[!.]*")):
        unknown = [name for name in names if name not in PARTS]
        if unknown:
            raise UserError(
                f"{data_dir}: beside train/ there may be val/ and test/ only, "
                f"not {first_of(unknown)}"
            )
        return [part for part in PARTS if part in names]
    if names and {name.lower() for name in names} <= LIKE_PARTS:
        raise UserError(
            f"{data_dir}: {first_of(names)} look like parts, not like classes: call them train, "
            "val and test, and put a folder for each class into them"
        )
    return [""]


def cut(data_dir: Path, clips: list[Clip], seconds: float) -> list[Clip]:
    """The windows of recordings. Those of one recording are a group."""
    lengths = lengths_of([clip.path for clip in clips], {}).tolist()
    windows = []
    for clip, length in zip(clips, lengths, strict=True):
        recording = name_of(clip.path, data_dir)
        for span in windows_of(clip.path, length, seconds):
            windows.append(clip._replace(span=span, group=recording))
    return windows


def windows_of(path: Path, length: float, seconds: float) -> list[tuple[float, float]]:
    """Spans of so many seconds, one after the other. The last one ends with the recording."""
    if math.isnan(length) or length <= seconds:
        return [WHOLE]
    if not has_end(path, length):  # damaged: one clip, which is refused when it is read
        return [(length - 0.1, math.inf)]
    count = math.ceil(length / seconds - 1e-9)
    starts = [min(i * seconds, length - seconds) for i in range(count)]
    return [(round(start, 6), round(start + seconds, 6)) for start in starts]


# ------------------------------------------------------------------------ a table, or label tracks


def table(
    data_dir: Path | None, cache_dir: Path, group: str | None = None, windows: float | None = None
) -> Listing:
    """A CSV file with the columns path and label, or a folder with label tracks.

    More columns may say to which part a clip belongs: split (train, val, test) or fold (a number).
    group keeps clips together. start and end, in seconds, make a clip a piece of a recording. Paths
    are relative to the CSV file.
    """
    if windows:
        raise UserError(
            "--windows cuts the recordings of --dataset folder; for csv the columns start and end "
            "do"
        )
    if data_dir is None or not data_dir.exists():
        problem = "needs --data-dir" if data_dir is None else f"--data-dir {data_dir} is not there"
        raise UserError(
            f"--dataset csv: {problem}: give a CSV file with the columns path and label"
        )
    if data_dir.is_dir():
        return own_sounds(data_dir, data_dir.resolve().name, label_tracks(data_dir), group)
    rows = read_table(data_dir, ["path", "label"])
    header = rows[0]
    for name in header:
        meant = name.strip().lower()
        if meant in COLUMNS and meant != name:
            raise UserError(f"{data_dir}: the column {name!r} would not be seen: call it {meant!r}")
    if "split" in header and "fold" in header:
        raise UserError(
            f"{data_dir}: has a column split and a column fold; only one of them can say what "
            "trains"
        )
    if "group" in header and group:
        raise UserError(
            f"{data_dir}: has a column group, and there is --group: only one of them can say what "
            "belongs together"
        )
    clips = [clip_of(row, data_dir) for row in rows]
    require_each_once(data_dir, clips)
    require_files(data_dir.parent, list(dict.fromkeys(clip.path for clip in clips)))
    return own_sounds(data_dir.parent, data_dir.stem, clips, group)


def clip_of(row: Row, table: Path) -> Clip:
    """The clip of a row. Blanks around a name are no part of it."""
    where = f"{table}, line {row.line}"
    cells = {name: (cell or "").strip() for name, cell in row.items()}
    for name in ("path", "label", "split", "fold", "group"):
        if cells.get(name) == "":
            raise UserError(f"{where}: an empty {name}")
    span = span_of(cells.get("start"), cells.get("end"), where)
    part = cells.get("split", "")
    if "split" in cells and part not in PARTS:
        raise UserError(f"{where}: split is {part!r}; it must be train, val or test")
    if "fold" in cells:
        require_whole(cells["fold"], "fold", where)
        part = int(cells["fold"])
    return Clip(table.parent / row["path"], cells["label"], part, span, cells.get("group", ""))


def require_each_once(origin: Path, clips: list[Clip]) -> None:
    """UserError for a clip that is listed twice, perhaps by another way to its file."""
    real = {path: os.path.realpath(path) for path in {clip.path for clip in clips}}
    first = {}
    for clip in clips:
        other = first.setdefault((real[clip.path], clip.span), clip)
        if other is clip:
            continue
        name = f"{clip.path}" if other.path == clip.path else f"{other.path} = {clip.path}"
        where = "twice"
        if other.part != clip.part:
            kind = "split" if isinstance(clip.part, str) else "fold"
            where = f"in {kind} {other.part} and {clip.part}"
        raise UserError(
            f"{origin}: {name}{fragment(clip.span)} is listed {where}: every clip must be listed "
            "once"
        )


def span_of(start: str | None, end: str | None, where: str) -> tuple[float, float]:
    """The span between two texts of seconds. Without them it begins and ends with the file."""
    span = (
        seconds_in(start, "start", where) if start else WHOLE[0],
        seconds_in(end, "end", where) if end else WHOLE[1],
    )
    if span[1] <= span[0]:
        raise UserError(
            f"{where}: it ends at {span[1]:g} s, which is not after its start at {span[0]:g} s"
        )
    return span


def seconds_in(text: str, name: str, where: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) <= 1e9:
            return round(float(text), 6)
    raise UserError(f"{where}: {name} is {text[:100]!r}; it must be seconds like 12.5")


def label_tracks(root: Path) -> list[Clip]:
    """What Audacity's label tracks beneath `root` say of the sounds beside them.

    rain.txt is the track of rain.wav. rain.wav.events.txt is none: tools.predict writes such files.
    A line is a start and an end, in seconds, and a label, with tabs between them.
    """
    sounds, others = files_in(root)
    beside = defaultdict(list)  # the sounds by their path without the suffix
    for sound in sounds:
        beside[sound.with_suffix("")].append(sound)
    tracks = [file for file in others if file.suffix.lower() == ".txt"]
    tracks = [file for file in tracks if not file.name.endswith(".events.txt")]
    clips = []
    for track in tracks:
        found = beside.pop(track.with_suffix(""), [])
        if len(found) != 1:
            what = "more than one sound" if found else "no sound"
            raise UserError(
                f"{track}: a label track with {what} beside it "
                f"({track.stem}.wav or another of its name)"
            )
        clips += labels_in(track, found[0])
    if not clips:
        raise UserError(
            f"{root}: no labels in {len(tracks)} label tracks (.txt beside the sounds): export some"
        )
    require_each_once(root, clips)
    if beside:
        names = [name_of(sound, root) for sounds in beside.values() for sound in sounds]
        warn(f"{root}: {len(names)} sounds have no label track, ignored ({first_of(names)})")
    return clips


def labels_in(track: Path, sound: Path) -> list[Clip]:
    try:
        lines = track.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{track}: a label track must be text in UTF-8") from None
    clips = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("\\"):  # the frequencies of the label above
            continue
        where = f"{track}, line {number}"
        fields = line.split("\t")
        if len(fields) < 3 or not fields[2].strip():
            raise UserError(
                f"{where}: it must be a start, an end and a label, with tabs between them"
            )
        clips.append(Clip(sound, fields[2].strip(), span=span_of(*fields[:2], where)))
    return clips


# ---------------------------------------------------------- what cannot be used, and what looks odd


def own_sounds(root: Path, name: str, clips: list[Clip], group: str | None) -> Listing:
    """A Listing of the clips. UserError for what cannot be trained or tested."""
    clips = with_groups(root, clips, group)
    counts = Counter(clip.label for clip in clips)
    if "unsure" in counts:
        raise UserError(
            f"{root}: 'unsure' is what tools.predict says of sounds of no class: rename this class"
        )
    if len(counts) < 2:
        raise UserError(f"{root}: {len(counts)} classes; there must be two or more to tell apart")
    if all(clip.part == "" for clip in clips):
        groups = defaultdict(set)
        for clip in clips:
            groups[clip.label].add(clip.group)
        for label, count in counts.items():
            where = f"{root}: class {label!r} has"
            needed = "one to train and one to test are needed"
            if count == 1:
                raise UserError(f"{where} one clip; {needed}")
            if len(groups[label]) == 1 and "" not in groups[label]:
                raise UserError(
                    f"{where} clips of one group only, {min(groups[label])!r}; {needed} "
                    "(--group '(.*)': every clip is one)"
                )
    warn_of_copies(root, clips)
    return Listing(root, clips, name=name)


def check_folds(dataset) -> None:
    """UserError for a fold without clips to train or test. Warnings for classes that have few."""
    for fold, split in dataset.folds.items():
        if not split.train or not split.test:
            missing = "test" if split.train else "train"
            raise UserError(f"{dataset.root}: no clips to {missing}: say which in the data")
        training = Counter(dataset.labels[i] for i in split.train)
        testing = Counter(dataset.labels[i] for i in split.test)
        for label, class_name in enumerate(dataset.classes):
            where = f"{dataset.root}: class {class_name!r} has"
            if not training[label]:
                raise UserError(f"{where} no training clips in fold {fold}: add some")
            if training[label] == 1:
                warn(f"{where} one training clip in fold {fold}")
            if not testing[label]:
                warn(f"{where} no test clips in fold {fold}")


def tell_of_gaps(dataset, folds: dict) -> None:
    """Warn of classes that a drawn split or --skip-bad leaves without training or test clips.

    `check_folds` warns of what the data say themselves.
    """
    for fold, split in folds.items():
        for part, what in (("train", "training"), ("test", "test")):
            clips = range(len(dataset.labels))  # a drawn split chooses from all of them
            if fold in dataset.folds:
                clips = getattr(dataset.folds[fold], part)
            before = {dataset.labels[i] for i in clips}
            gone = before - {dataset.labels[i] for i in getattr(split, part)}
            if gone and is_first():
                names = first_of([dataset.classes[label] for label in sorted(gone)])
                warn(
                    f"{dataset.root}: {len(gone)} classes have no {what} clips in fold {fold} "
                    f"({names})"
                )


def seconds_of(dataset, seconds: float | None) -> float:
    """`seconds`, or else so many that 95 % of the clips that may train fit. Says what is cut."""
    lengths = lengths_of(dataset.paths, dataset.spans)
    if seconds is None:
        may_train = set().union(*(split.train for split in dataset.folds.values()))
        seconds = typical_seconds(lengths[sorted(may_train) or slice(None)])
    tell_of_cuts(dataset, lengths, seconds)
    return seconds


def tell_of_cuts(dataset, lengths: np.ndarray, seconds: float) -> None:
    """Say how much of the clips is left out if the model reads so many seconds.

    `lengths` (clips,) are in seconds. Also warns of pieces that are not all there.
    """
    short = []
    for i, (start, end) in dataset.spans.items():
        if 0 < lengths[i] < end - start - 0.1 < math.inf:
            short.append(dataset.names[i])
    if short:
        warn(
            f"{dataset.root}: {len(short)} pieces end after their recordings ({first_of(short)}): "
            "what is there is used"
        )
    over = np.nan_to_num(lengths - seconds).clip(0)
    count = int((over > 0.02).sum())  # less is the end of the last frame
    if count:
        total = np.nansum(lengths)
        say(
            f"{count} of {len(lengths)} clips are longer than {seconds:g} s: {over.sum():.1f} s of "
            f"{total:.1f} s ({over.sum() / total:.1%}) are not heard; longer --seconds, a "
            "table with start and end or, of folders, --windows keep them"
        )


def warn_of_copies(root: Path, clips: list[Clip]) -> None:
    """Warn of files with the same content in different parts: the model is tested on them."""
    copies = [list({clip.path: clip for clip in clips}.values())]  # one piece of each recording
    for key in (middle_of, hash_of):  # few files are read as a whole
        copies = [alike for group in copies for alike in copies_by(group, key)]
    where = "and may come into different splits"
    if any(clip.part != "" for clip in clips):
        where = "in different splits"
        copies = [alike for alike in copies if len({clip.part for clip in alike}) > 1]
    copies = [
        alike for alike in copies if not alike[0].group or len({clip.group for clip in alike}) > 1
    ]
    if copies:
        names = [" = ".join(names_of([clip.path for clip in alike], root)) for alike in copies]
        warn(f"{root}: {len(copies)} sounds are there more than once {where} ({first_of(names)})")


def copies_by(clips: list[Clip], key: Callable[[Path], object]) -> list[list[Clip]]:
    """Lists of clips whose files have the same key. A clip that is alone is left out."""
    alike = defaultdict(list)
    for clip in clips:
        with suppress(OSError):  # is a bad clip later
            alike[key(clip.path)].append(clip)
    return [group for group in alike.values() if len(group) > 1]


def middle_of(path: Path) -> tuple[int, bytes]:
    """The size, and 4 kB from the middle. The ends may be silence, which many files share."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(size // 2)
        return size, file.read(4096)


def hash_of(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()
