"""The user's own sounds: a folder for each class, a table, or Audacity's label tracks.

Both loaders take `group`, the regular expression of --group: see sounds/groups.py.
"""

import os
import re
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np

from sounds.audio import SUFFIXES, files_in, length_of, lengths_of, typical_seconds
from sounds.clip import PARTS, WHOLE, Clip, Listing, fragment, name_of, spelling
from sounds.groups import (
    group_hint,
    parts_of,  # noqa: F401 (for data.py)
    warn_of_spellings,
    with_groups,
    with_stretches,  # noqa: F401 (for data.py)
)
from sounds.tables import folders_in, plain_column, read_table, require_files, require_whole
from sounds.windows import BACKGROUND, cut, cut_labels
from support.command import UserError, first_of, warn
from support.files import path_in, require_file
from support.processes import say

# The columns of a table, and names of other programs for the same, without what is no letter.
COLUMNS = {
    "path": "paths file files filename filepath fname wav audio audiofile audiopath sound clip",
    "label": "labels class classes classname category target species commonname tag",
    "split": "splits set subset part partition usage phase datasplit istrain istest",
    "fold": "folds foldid kfold cv cvfold",
    "group": "groups groupid speaker speakerid subject subjectid participant participantid patient "
    "patientid session sessionid site siteid recording recordingid srcfile fsid clientid",
    "start": "starts startsec startseconds startms starttime starttimes begin begintime begintimes "
    "onset tmin",
    "end": "ends endsec endseconds endms endtime endtimes stop stoptime offset tmax",
}
PROBABILITY = re.compile(r" \([01]\.\d\d\)$")  # of an event, `dog (0.93)`
LIKE_PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}

# ----------------------------------------------------------------------------- a folder of classes


def load(
    kind: str, data_dir: Path | None, group: str | None, windows: float | None, background: bool
) -> Listing:
    """The user's own sounds: those of a `folder`, or of a `csv` table or label tracks."""
    if kind == "folder":
        return folder(data_dir, group, windows)
    return table(data_dir, group, windows, background)


def folder(data_dir: Path | None, group: str | None, windows: float | None) -> Listing:
    """One folder in `data_dir` for each class, with the sounds anywhere beneath it.

    Above the classes there may be train/, test/ and perhaps val/. Otherwise the seed draws the
    parts. `windows` are the seconds of the pieces that the recordings are cut into.
    """
    if data_dir is None or not data_dir.is_dir():
        found = "it was not given" if data_dir is None else f"{data_dir} is no folder"
        raise UserError(
            "--dataset folder needs --data-dir, a folder that holds one folder of sound files "
            f"per class: {found}"
        )
    clips = []
    ignored = []
    for part in parts_in(data_dir):
        place = data_dir / part
        loose = sorted(place.glob("[!.]*"))
        ignored += [file for file in loose if file.suffix.lower() in SUFFIXES]
        for class_folder in folders_in(place):
            sounds, others = files_in(class_folder)
            if not sounds:
                raise UserError(
                    f"{class_folder} holds no sounds ({', '.join(SUFFIXES)}): fill it or remove it"
                )
            ignored += others
            label = name_of(class_folder, place)
            clips += [Clip(sound, label, part) for sound in sounds]
    if ignored:
        names = first_of([name_of(file, data_dir) for file in ignored])
        warn(
            f"{data_dir}: {len(ignored)} files are no {', '.join(SUFFIXES)} in the folder of a "
            f"class, ignored ({names})"
        )
    if windows:
        clips = cut(clips, windows)
    return own_sounds(data_dir, data_dir.resolve().name, clips, group)


def parts_in(data_dir: Path) -> list[str]:
    """The parts that have a folder above those of the classes. [""] if there are none."""
    names = [path.name for path in folders_in(data_dir)]
    of_classes = any(path.is_dir() for path in data_dir.glob("train/[!.]*"))
    if of_classes and set(names) <= set(PARTS):
        return [part for part in PARTS if part in names]
    if of_classes or (names and {name.lower() for name in names} <= LIKE_PARTS):
        raise UserError(
            f"{data_dir}: {first_of(names)} look like parts, not like classes: call them train, "
            "val and test, put a folder for each class into them, and nothing else beside them"
        )
    return [""]


# ------------------------------------------------------------------------ a table, or label tracks


def table(
    data_dir: Path | None, group: str | None, windows: float | None, background: bool
) -> Listing:
    """A CSV file with the columns path and label, or a folder with label tracks.

    More columns may say to which part a clip belongs: split (train, val, test) or fold (a number).
    group keeps clips together. start and end, in seconds, make a clip a piece of a recording. Paths
    are relative to the CSV file.

    Pieces longer than `windows`, in seconds, are cut. With `background`, what they leave of their
    recordings is a class. See sounds/windows.py.
    """
    if data_dir is None or not data_dir.exists():
        found = "it was not given" if data_dir is None else f"{data_dir} is not there"
        raise UserError(
            f"--dataset csv needs --data-dir, a CSV file with the columns path and label: {found}"
        )
    if data_dir.is_dir():
        root = data_dir
        name = data_dir.resolve().name
        clips = label_tracks(root, background)
    else:
        root = data_dir.parent
        name = data_dir.stem
        rows = read_table(data_dir, [])
        check_columns(data_dir, [name for name in rows[0] if name != "where"], group)
        clips = [clip_of(row, root) for row in rows]
    require_each_once(data_dir, clips)
    require_files(root, list(dict.fromkeys(clip.path for clip in clips)))
    return own_sounds(root, name, clips, group, windows, background)


def check_columns(file: Path, header: list[str], group: str | None) -> None:
    """Warn of columns that are not read. UserError for one that looks like one that is missing."""
    names = [plain_column(name) for name in header]
    given = set(names)
    if given & {"split", "fold"}:
        given |= {"split", "fold"}
    if group is not None:  # the option takes the place of the column
        given.add("group")
    for column, others in COLUMNS.items():
        for name in names:
            if column not in given and re.sub("[^a-z]", "", name) in others.split():
                seconds = ", in seconds," if column in ("start", "end") else ""
                raise UserError(
                    f"{file}: the column {name!r} is not read: call it {column!r}{seconds} if that "
                    "is what it says, or else take it out"
                )
    for column in ("path", "label"):
        if column not in names:
            raise UserError(f"{file}: no column {column!r}; its header is {', '.join(header)}")
    unread = [name for name in names if name and name not in COLUMNS]
    if unread:
        warn(f"{file}: columns that are not read: {first_of(unread)}")


def clip_of(row: dict[str, str], root: Path) -> Clip:
    """The clip of a row. Blanks around a name and capitals in a header are no part of it."""
    cells = {plain_column(name): cell.strip() for name, cell in row.items()}
    for name in ("path", "label", "split", "fold", "group"):
        if cells.get(name) == "":
            raise UserError(f"{row['where']}: an empty {name}")
    if "split" in cells and "fold" in cells:
        raise UserError(f"{row['where']}: a split and a fold; only one of them can say what trains")
    span = span_of(cells.get("start"), cells.get("end"), row["where"])
    part = cells.get("split", "")
    if "split" in cells and part not in PARTS:
        raise UserError(f"{row['where']}: split is {part!r}; it must be train, val or test")
    if "fold" in cells:
        require_whole(cells["fold"], "fold", row["where"])
        part = int(cells["fold"])
    path = root / path_in(cells["path"])
    return Clip(path, cells["label"], part, span, cells.get("group", ""))


def require_each_once(origin: Path, clips: list[Clip]) -> None:
    """UserError for a clip that is listed twice, perhaps by another way to its file.

    A file may have the name of a piece of another file. The two count as one clip.
    """
    seen = set()
    for clip in clips:
        key = os.path.realpath(clip.path) + fragment(clip.span)
        if key in seen:
            raise UserError(
                f"{origin}: {clip.path}{fragment(clip.span)} is listed twice: every clip must be "
                "listed once"
            )
        seen.add(key)


def span_of(start: str | None, end: str | None, where: str) -> tuple[float, float]:
    """The span between two texts of seconds. Without them it begins and ends with the file."""
    with suppress(ValueError):
        span = (round(float(start or WHOLE[0]), 6), round(float(end or WHOLE[1]), 6))
        if 0 <= span[0] < span[1]:
            return span
    raise UserError(
        f"{where}: start is {start!r} and end is {end!r}; they must be seconds like 12.5, and the "
        "end after the start"
    )


def label_tracks(root: Path, background: bool) -> list[Clip]:
    """What Audacity's label tracks beneath `root` say of the sounds beside them.

    An empty track says that nothing is to be heard: with `background` its sound is of that class.

    rain.txt is the track of rain.wav. rain.wav.events.txt is none: tools.predict writes such files.
    """
    sounds, others = files_in(root)
    beside = defaultdict(list)  # the sounds by their path without the suffix
    for sound in sounds:
        beside[sound.with_suffix("")].append(sound)
    clips = []
    for track in others:
        if track.suffix.lower() != ".txt" or track.name.endswith(".events.txt"):
            continue
        found = beside.pop(track.with_suffix(""), [])
        if len(found) != 1:
            raise UserError(
                f"{track}: a label track with {len(found)} sounds beside it; there must be one, "
                f"{track.stem}.wav or another of its name"
            )
        labels = labels_in(track, found[0])
        if background and not labels:
            labels = [Clip(found[0], BACKGROUND, span=(0.0, length_of(found[0])))]
        clips += labels
    if beside:
        names = [name_of(sound, root) for sounds in beside.values() for sound in sounds]
        warn(f"{root}: {len(names)} sounds have no label track, ignored ({first_of(names)})")
    return clips


def labels_in(track: Path, sound: Path) -> list[Clip]:
    """The clips of a label track: lines of a start and an end, in seconds, and a label.

    What tools.predict writes is read as well, without its probabilities.
    """
    clips = []
    require_file(track)
    try:
        lines = track.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{track}: a label track must be text in UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("\\"):  # the frequencies of the label above
            continue
        where = f"{track}, line {number}"
        fields = line.split("\t")
        if len(fields) < 3 or not fields[2].strip():
            raise UserError(
                f"{where}: it must be a start, an end and a label, with tabs between them"
            )
        label = PROBABILITY.sub("", fields[2].strip())
        clips.append(Clip(sound, label, span=span_of(*fields[:2], where)))
    return clips


# ---------------------------------------------------------- what cannot be used, and what looks odd


def own_sounds(
    root: Path,
    name: str,
    clips: list[Clip],
    group: str | None,
    windows: float | None = None,
    background: bool = False,
) -> Listing:
    """A Listing of the clips. UserError for what cannot be trained or tested."""
    clips = [clip._replace(label=spelling(clip.label)) for clip in clips]
    has_groups = group is not None or any(clip.group for clip in clips)
    hint = "" if has_groups else group_hint(clips)
    clips = with_groups(root, clips, group)
    clips = cut_labels(clips, windows, background)
    labels = {clip.label for clip in clips}
    warn_of_spellings(root, labels, "classes")
    if "unsure" in labels:
        raise UserError(
            f"{root}: 'unsure' is what tools.predict says of sounds of no class: rename this class"
        )
    if len(labels) < 2:
        raise UserError(f"{root}: {len(labels)} classes; there must be two or more to tell apart")
    groups = {(clip.label, clip.group or clip.path) for clip in clips}
    count = Counter(label for label, _ in groups)
    if background:  # of one recording: it trains, and is not tested
        count.pop(BACKGROUND, None)
    if min(count.values()) == 1 and all(clip.part == "" for clip in clips):
        label = min(sorted(count), key=count.get)
        raise UserError(
            f"{root}: class {label!r} has one clip, or clips of one group only; one to train and "
            "one to test are needed (--group '(.*)': every clip is a group)"
        )
    return Listing(root, clips, name=name, group_hint=hint)


def seconds_of(dataset, seconds: float | None) -> float:
    """`seconds`, or else so many that 95 % of the clips that may train fit. Says what is cut."""
    lengths = lengths_of(dataset.paths, dataset.spans)
    if seconds is None:
        may_train = set().union(*(split.train for split in dataset.folds.values()))
        seconds = typical_seconds(lengths[sorted(may_train) or slice(None)])
    if BACKGROUND in dataset.classes:
        quiet = dataset.labels.count(dataset.classes.index(BACKGROUND))
        say(f"{quiet} of {len(lengths)} clips are {BACKGROUND!r}, which is never an event")
    over = np.nan_to_num(lengths - seconds).clip(0)
    count = int((over > 0.02).sum())  # less is the end of the last frame
    if count:
        total = np.nansum(lengths)
        say(
            f"{count} of {len(lengths)} clips are longer than {seconds:g} s: {over.sum():.1f} s of "
            f"{total:.1f} s ({over.sum() / total:.1%}) are not heard; longer --seconds, a "
            "table with start and end or, of folders, --windows keep them"
        )
    return seconds
