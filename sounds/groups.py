"""Groups of clips that stay in one part, because they are of one recording, speaker or site.

Otherwise a model would be tested on what it was trained on.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path

import numpy as np

from sounds.clip import WHOLE, Clip, fragment, name_of, spelling
from support.command import UserError, first_of, warn

PIECE = r"([-_. ]([Pp]art)?\d{1,4})?(\.\w+)?$"  # the end of rec1_03.wav, a-001.wav, talk.part2.wav
TAKE = r"([-_. ][A-Z]([-_. ]\w+)?)?(\.\w+)?$"  # the end of rec1_A.wav, 1-211527-B-20.wav
EVERY_CLIP = "(.*)"  # the pattern that makes also every piece of a recording a group

STRETCHES = 8  # of time, where a recording trains and validates: every fourth validates


def with_groups(root: Path, clips: list[Clip], pattern: str | None) -> list[Clip]:
    """The clips with their groups.

    A group is what the first parenthesis of the `pattern` finds in the name of a file. So pieces of
    a recording stay together, unless the pattern is EVERY_CLIP. Without a pattern a group is what
    the clip says, or the recording that pieces are cut from. UserError for a clip without a group,
    and for a group in two parts.
    """
    files = [name_of(clip.path, root) for clip in clips]
    names = [file + fragment(clip.span) for file, clip in zip(files, clips, strict=True)]
    groups = [spelling(clip.group) for clip in clips]
    if pattern is not None:
        groups = groups_in(names if pattern == EVERY_CLIP else files, pattern)
    warn_of_spellings(root, groups, "groups")
    if pattern is None and any(clip.span != WHOLE for clip in clips):
        groups = [group or file for group, file in zip(groups, files, strict=True)]
    first = {}
    for clip, group, name in zip(clips, groups, names, strict=True):
        part, other = first.setdefault(group, (clip.part, name))
        if group and part != clip.part:
            raise UserError(
                f"{root}: the group {group!r} is in {part} ({other}) and in {clip.part} ({name}): "
                "a group must be in one part; --group REGEX or a column group says what one is"
            )
    return [clip._replace(group=group) for clip, group in zip(clips, groups, strict=True)]


def warn_of_spellings(root: Path, names: Iterable[str], what: str) -> None:
    """Warn of names of classes or groups that are probably one name, spelt in several ways."""
    spellings = defaultdict(list)
    for name in sorted(set(names)):
        spellings[likeness(name)].append(name)
    several = [" = ".join(map(repr, alike)) for alike in spellings.values() if len(alike) > 1]
    if several:
        warn(
            f"{root}: {what} that may be one and the same ({first_of(several)}): they are kept "
            "apart; spell one name in one way"
        )


def likeness(name: str) -> object:
    """Equal for names that differ in capitals, or in blanks, hyphens and underscores.

    Of a number it is the value: 1, 01 and 1.0 are alike.
    """
    if re.fullmatch(r"-?\d+(\.\d*)?", name):
        return Decimal(name)
    folded = unicodedata.normalize("NFKC", name).casefold()
    return re.sub(r"[\s_-]+", " ", folded).strip()


def expression_of(option: str, pattern: str) -> re.Pattern:
    """The regular expression of an option. UserError if it is none, or has no parentheses."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{option} '{pattern}' is no regular expression: {error}") from None
    if not expression.groups:
        raise UserError(
            f"{option} '{pattern}': put the part of the name that is the group into parentheses"
        )
    return expression


def groups_in(names: list[str], pattern: str) -> list[str]:
    """The group that the regular expression of --group finds in each name."""
    expression = expression_of("--group", pattern)
    groups = []
    for name in names:
        found = expression.search(name)
        if not found or not found[1]:
            raise UserError(
                f"--group '{pattern}' finds no group in {name}: every clip must have one"
            )
        groups.append(spelling(found[1]) or found[1])
    return groups


def group_hint(clips: list[Clip]) -> str:
    """A pattern for --group, if files are named like pieces of recordings. Otherwise "".

    What stands before the number of a piece names its recording: rec1_03.wav is of rec1. A name
    without such a number is a recording of its own. Names give no hint if most of their class begin
    alike, because then the number may only count the clips: dog_01.wav, dog_02.wav. If all names of
    a class begin alike, the pattern makes each clip of it a group, so that the class has several.

    A capital letter also counts pieces, if the names of a recording go on alike behind it:
    1-211527-A-20.wav and 1-211527-B-20.wav. In ann_B_1.wav and ann_C_2.wav it may be a name.
    """
    clips = {(clip.path, clip.label): clip for clip in clips}.values()  # one piece of a recording
    names = [clip.path.name for clip in clips]
    labels = [clip.label for clip in clips]
    hint = hint_by(PIECE, names, labels)
    if hint:
        return hint
    takes = {}  # of a recording in a class: what its names have behind the letter
    for name, label in zip(names, labels, strict=True):
        recording, _, rest, _ = re.search(f"(.+?){TAKE}", name).groups()
        if takes.setdefault((label, recording), rest) != rest:
            return ""
    return hint_by(TAKE, names, labels)


def hint_by(piece: str, names: list[str], labels: list[str]) -> str:
    """The pattern of `group_hint` for names that end in `piece`, a regular expression."""
    recordings = groups_in(names, f"(.+?){piece}")
    counts = defaultdict(Counter)  # of each class: how many clips a recording has
    for label, recording in zip(labels, recordings, strict=True):
        counts[label][recording] += 1
    alike = [next(iter(count)) for count in counts.values() if len(count) == 1]
    starts = [f"{re.escape(start)}[-_. ].+" for start in sorted(set(alike))]
    for count in counts.values():
        if any(1 < n <= count.total() / 2 for n in count.values()):
            first = "|".join([*starts, "[^/]+?"])
            return f"({first}){piece}"
    return ""


def parts_of(labels: list[int], groups: list[str], seed: int) -> list[str]:
    """The part of every clip, drawn with the seed. Groups are not divided.

    About a fifth of the clips of each class tests, another fifth validates, and the rest trains.
    The classes take their turn, and those with the fewest groups come first. A class takes groups
    in random order, as long as no class in them gets more than its fifth. A class that has got
    nothing takes one of the smaller half of its groups. The last training clips of a class are
    never taken.
    """
    rng = np.random.default_rng(seed)
    part_of = dict.fromkeys(groups, "train")
    clips = defaultdict(Counter)  # how many of each class are in a group
    for label, group in zip(labels, groups, strict=True):
        clips[group][label] += 1
    count = {"train": Counter(labels), "val": Counter(), "test": Counter()}  # of each class
    fifth = {label: max(1, round(n / 5)) for label, n in count["train"].items()}

    def is_spare(group):
        trains = count["train"]
        return part_of[group] == "train" and all(trains[k] > n for k, n in clips[group].items())

    def fits(group, part):
        return all(count[part][label] + n <= fifth[label] for label, n in clips[group].items())

    def take(group, part):
        part_of[group] = part
        count["train"].subtract(clips[group])
        count[part].update(clips[group])

    of_class = {label: [group for group in clips if label in clips[group]] for label in fifth}
    for label in sorted(fifth, key=lambda label: (len(of_class[label]), label)):
        order = [of_class[label][i] for i in rng.permutation(len(of_class[label]))]
        for part in ("test", "val"):
            for group in order:
                if is_spare(group) and fits(group, part):
                    take(group, part)
            left = [group for group in order if is_spare(group)]
            if left and not count[part][label]:
                by_size = sorted(left, key=lambda group: clips[group][label])
                smaller = by_size[: (len(left) + 1) // 2]
                take(min(smaller, key=order.index), part)
    return [part_of[group] for group in groups]


def with_stretches(
    parts: list[str],
    labels: list[int],
    paths: list[Path],
    spans: dict[int, tuple[float, float]],
    seed: int,
) -> list[str]:
    """The parts, with about a quarter of the training pieces in "val", drawn with the seed.

    The training pieces are divided into eight stretches of time, of which two validate. The pieces
    of one label are in one stretch. A stretch without which a class could not train stays.
    """
    parts = list(parts)
    train = [i for i in range(len(parts)) if parts[i] == "train" and i in spans]
    train.sort(key=lambda i: (paths[i], spans[i]))
    rows = []  # each has pieces of one class that follow each other without a gap
    before = None  # path, label and end of the last piece
    for i in train:
        start, end = spans[i]
        if before is None or before[:2] != (paths[i], labels[i]) or before[2] < start:
            rows.append([])
        rows[-1].append(i)
        before = (paths[i], labels[i], end)
    stretches = [[] for _ in range(STRETCHES)]
    for number, row in enumerate(rows):
        stretches[number * STRETCHES // len(rows)] += row
    count = Counter(labels[i] for i in train)
    taken = 0
    for k in np.random.default_rng(seed).permutation(STRETCHES):
        stretch = stretches[k]
        here = Counter(labels[i] for i in stretch)
        if taken < STRETCHES // 4 and stretch and all(count[k] > n for k, n in here.items()):
            for i in stretch:
                parts[i] = "val"
            count.subtract(here)
            taken += 1
    return parts
