"""Clips that belong together, of one recording, speaker or site, and stay in one part: what trains is not tested."""

import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from sounds.clip import WHOLE, Clip, fragment, names_of
from support.command import UserError


def grouped(root: Path, clips: list[Clip], pattern: str | None) -> list[Clip]:
    """The clips with their groups: what the first parenthesis of the `pattern` finds in their names; without one what
    the clips say, else the recordings that pieces are cut from. UserError for a clip without, or a group in two parts.
    """
    files = names_of([clip.path for clip in clips], root)
    names = [file + fragment(clip.span) for file, clip in zip(files, clips, strict=True)]
    if pattern is not None:
        groups = [matched(pattern, name) for name in names]
    elif any(clip.span != WHOLE for clip in clips):
        groups = [clip.group or file for file, clip in zip(files, clips, strict=True)]
    else:
        groups = [clip.group for clip in clips]
    first = {}
    for clip, group, name in zip(clips, groups, names, strict=True):
        part, other = first.setdefault(group, (clip.part, name))
        if group and part != clip.part:
            raise UserError(f"{root}: the group {group!r} is in {part} ({other}) and in {clip.part} ({name}): a "
                            "group must be in one part; --group REGEX or a column group says what one is")  # fmt: skip
    return [clip._replace(group=group) for clip, group in zip(clips, groups, strict=True)]


def matched(pattern: str, name: str) -> str:
    option = f"--group {pattern[:100]!r}"
    try:
        expression = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{option} is no regular expression: {error}") from None
    if not expression.groups:
        raise UserError(f"{option}: put the part of the name that is the group into parentheses")
    found = expression.search(name)
    if not found or not found[1]:
        raise UserError(f"{option} finds no group in {name}: every clip must have one")
    return found[1]


def parts_of(labels: list[int], groups: list[str], seed: int) -> list[str]:
    """The part of every clip, whole groups being drawn with the seed: of each class some fifth of the clips tests, some
    fifth validates, the rest trains.

    Class after class, those with the fewest groups first, takes groups in random order while no class in them gets more
    than its fifth; where that leaves a class with nothing, it takes one of its smaller half. The last training clips of
    a class are never taken.
    """
    rng, part_of = np.random.default_rng(seed), dict.fromkeys(groups, "train")
    clips = defaultdict(Counter)  # of each class in each group
    for label, group in zip(labels, groups, strict=True):
        clips[group][label] += 1
    count = {"train": Counter(labels), "val": Counter(), "test": Counter()}  # of each class in each part
    fifth = {label: max(1, round(n / 5)) for label, n in count["train"].items()}
    of_class = {label: [group for group in clips if label in clips[group]] for label in sorted(fifth)}

    def spare(group):
        return part_of[group] == "train" and all(count["train"][label] > n for label, n in clips[group].items())

    def fits(group, part):
        return all(count[part][label] + n <= fifth[label] for label, n in clips[group].items())

    def take(group, part):
        part_of[group] = part
        count["train"].subtract(clips[group])
        count[part].update(clips[group])

    for label, mine in sorted(of_class.items(), key=lambda item: len(item[1])):
        order = [mine[i] for i in rng.permutation(len(mine))]
        for part in ("test", "val"):
            for group in order:
                if spare(group) and fits(group, part):
                    take(group, part)
            if not count[part][label] and (left := [group for group in order if spare(group)]):
                smaller = sorted(left, key=lambda group: clips[group][label])[: (len(left) + 1) // 2]
                take(min(smaller, key=order.index), part)
    return [part_of[group] for group in groups]
