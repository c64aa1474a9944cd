"""How well events fit what people have labelled: precision, recall and F1, by their overlap.

An event is found if it overlaps a label of its class by a given IoU: the seconds that both have,
over the seconds that one of them has. An event finds one label, and a label is found once.
"""

from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

import numpy as np

from sounds.clip import spelling
from sounds.own import labels_in
from support.command import UserError, needed, printable

LEAST = (0.3, 0.5)  # IoU

Event = tuple[str, float, float, str]  # file, start and end in seconds, class


def labels_of(sound: Path, folder: Path, left_out: list[str]) -> list[Event]:
    """What the label track of a sound in `folder` says: a file of its name that ends in .txt."""
    track = folder / f"{sound.stem}.txt"
    if not track.is_file():
        raise UserError(f"--truth: {track} is not there: every sound needs a label track there")
    events = []
    for clip in labels_in(track, sound):
        label = spelling(clip.label)
        if label not in left_out:
            events.append((printable(sound), *clip.span, printable(label)))
    return events


def require_own_tracks(sounds: list[Path]) -> None:
    """UserError if two sounds would be compared with one label track."""
    stem, count = Counter(sound.stem for sound in set(sounds)).most_common(1)[0]
    if count > 1:
        raise UserError(f"--truth: {count} sounds would have one label track, {stem}.txt: rename")


def pairs_of(found: list[Event], labels: list[Event], least: float) -> list[tuple[Event, Event]]:
    """As many pairs of an event and a label as there can be, each with an IoU of `least`."""
    with needed("--truth needs"):
        from scipy.optimize import linear_sum_assignment
    of_kind = defaultdict(lambda: ([], []))  # by file and class
    for which, events in enumerate((found, labels)):
        for event in events:
            of_kind[event[0], event[3]][which].append(event)
    pairs = []
    for events, truth in of_kind.values():
        if not events or not truth:
            continue
        fits = np.array([[iou(event, label) >= least for label in truth] for event in events])
        rows, columns = linear_sum_assignment(fits, maximize=True)
        pairs += [(events[i], truth[j]) for i, j in zip(rows, columns, strict=True) if fits[i, j]]
    return pairs


def iou(event: Event, label: Event) -> float:
    """The seconds that both have, over the seconds that one of them has."""
    _, start, end, _ = event
    _, first, last, _ = label
    both = max(0, min(end, last) - max(start, first))
    return both / (end - start + last - first - both)


def print_scores(found: list[Event], labels: list[Event]) -> None:
    """Print precision, recall and F1 of each class and of all, in percent."""
    pairs = {least: pairs_of(found, labels, least) for least in LEAST}
    names = sorted({event[3] for event in found + labels})
    width = 2 + max(len(name) for name in [*names, "together"])
    columns = "".join(f"  IoU {least}: precision  recall      F1" for least in LEAST)
    print(f"{'in %':<{width}}labels events{columns}")
    for name in (*names, None):  # None: all classes
        mine = [event for event in found if name in (None, event[3])]
        theirs = [label for label in labels if name in (None, label[3])]
        line = f"{name or 'together':<{width}}{len(theirs):>6} {len(mine):>6}"
        for least in LEAST:
            hits = sum(name in (None, label[3]) for _, label in pairs[least])
            precision = 100 * hits / max(1, len(mine))
            recall = 100 * hits / max(1, len(theirs))
            f1 = 200 * hits / max(1, len(mine) + len(theirs))
            line += f"{precision:>20.1f}{recall:>8.1f}{f1:>8.1f}"
        print(line)
    errors = [abs(event[1] - label[1]) for event, label in pairs[LEAST[0]]]
    if errors:
        print(f"their beginnings are {median(errors):.2f} s off (median, at IoU {LEAST[0]})")
