"""What tools/predict.py says about sounds: lines of text, events, label tracks, embeddings."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sounds.windows import BACKGROUND
from support.command import printable
from support.files import csv_of, whole_file, write_text

# Of --csv. The last two are the same in all rows of a file.
COLUMNS = ("file", "start", "end", "rank", "class", "probability", "confidence", "unsure")
EVENT_COLUMNS = ("file", "start", "end", "class", "probability")  # of --csv with --events
UNSURE = "unsure"  # the answer where the confidence is too low


@dataclass(frozen=True)
class Answer:
    """What is said about a window or a whole sound."""

    start: float  # seconds
    end: float
    classes: tuple[tuple[str, float], ...]  # with their probabilities, the best first
    confidence: float  # the best probability, less where the sound is unlike those of training
    unsure: bool  # whether the confidence is less than the classifier's `min_confidence`
    vector: np.ndarray | None = field(default=None, repr=False)  # what the head reads, (dim,)
    # Of a window: those of all classes, in their order, (classes,).
    probabilities: np.ndarray | None = field(default=None, repr=False)
    is_silent: bool = False  # a window of nearly all zeros: no event

    @property
    def best(self) -> str:
        """The class, or "unsure"."""
        return UNSURE if self.unsure else self.classes[0][0]


class Event(NamedTuple):
    """When a class is heard."""

    start: float  # seconds
    end: float
    best: str  # the class
    probability: float  # of the class: the mean over the windows of the event


# ---------------------------------------------------------------------------- answers to the user


def print_answer(file: str, answer: Answer, form: str, width: int) -> None:
    """Print an answer in the form "json", "csv" or "text". The text has `width` columns for the
    file."""
    classes = answer.classes
    if form == "json":
        found = [{"class": name, "probability": round(p, 6)} for name, p in classes]
        span = {"start": round(answer.start, 3), "end": round(answer.end, 3)}
        sure = {"confidence": round(answer.confidence, 6), "unsure": answer.unsure}
        print(json.dumps({"file": file, **span, **sure, "classes": found}))
    elif form == "csv":
        first = (file, f"{answer.start:.3f}", f"{answer.end:.3f}")
        last = (f"{answer.confidence:.6f}", "yes" if answer.unsure else "no")
        rows = [
            (*first, rank, name, f"{p:.6f}", *last) for rank, (name, p) in enumerate(classes, 1)
        ]
        print(csv_of(rows), end="")
    else:
        names = "  ".join(f"{name} {p:.3f}" for name, p in classes)
        if answer.unsure:
            names = f"{UNSURE} (confidence {answer.confidence:.3f})  {names}"
        print(f"{file:<{width}}{answer.end:20.2f} s  {names}")


def print_event(file: str, event: Event, form: str) -> None:
    """Print an event in the form "json" or "csv"."""
    start, end, best, probability = event
    if form == "json":
        cells = (file, round(start, 3), round(end, 3), best, round(probability, 6))
        print(json.dumps(dict(zip(EVENT_COLUMNS, cells, strict=True))))
    else:
        print(csv_of([(file, f"{start:.3f}", f"{end:.3f}", best, f"{probability:.6f}")]), end="")


# ----------------------------------------------------------------------------------------- events


def events_of(
    windows: list[Answer],
    classes: list[str],
    threshold: float = 0.4,
    left_out: Iterable[str] = (BACKGROUND,),
    min_length: float | None = None,
) -> Iterator[Event]:
    """Yield the events in the windows of one sound. `classes` are the names of all classes.

    A window speaks for the time that is nearer to its middle than to the middles of its neighbours.
    With a class BACKGROUND the events are found first and then named, see `named_sounds`. Without
    it, they are windows that agree, see `same_best`. A class in `left_out` is no event. A silent
    window is in none.

    An event lasts as long as a window, which takes two windows or more, or else `min_length`
    seconds. If most of its windows are unsure, it is none. Its probability is the mean over them.
    """
    overlapping = overlaps(windows)
    rows = np.stack([window.probabilities for window in windows])  # (windows, classes)
    is_silent = np.array([window.is_silent for window in windows])
    is_left_out = np.array([name in left_out for name in classes])
    if BACKGROUND in classes:
        rows = np.where(is_left_out, 0, rows)
        rows[is_silent] = 0
        found = named_sounds(rows, threshold, overlapping)
    else:
        rows = means_around(rows, overlapping)
        rows[is_silent] = 0
        found = same_best(rows, threshold, is_left_out)
    edges = edges_of(windows)
    for best, row in found:
        start = edges[row[0]]
        end = edges[row[-1] + 1]
        if min_length is None:
            is_long = len(row) >= min(max(2, overlapping), len(windows))
        else:
            is_long = end - start >= min_length
        unsure = sum(windows[i].unsure for i in row)
        if not is_long or 2 * unsure > len(row):
            continue
        yield Event(start, end, printable(classes[best]), float(rows[row, best].mean()))


def named_sounds(
    rows: np.ndarray, threshold: float, overlapping: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield events as a class and its windows. `rows` are probabilities, (windows, classes).

    The classes that are no event have 0. An event is a row of windows in which the probabilities
    of the other classes add up to `threshold` or more. Its class has the largest mean over the row.

    The row is cut where the best class of the means around the windows changes, if both sides last
    as long as one and a half windows. A shorter side joins the side before it.
    """
    least = round(1.5 * overlapping)
    is_heard = rows.sum(1) >= threshold
    for heard, row in groupby(range(len(rows)), lambda i: is_heard[i]):
        if not heard:
            continue
        row = list(row)
        best = means_around(rows[row], overlapping).argmax(1)
        pieces = []
        for _, pairs in groupby(zip(best, row, strict=True), lambda pair: pair[0]):
            piece = [i for _, i in pairs]
            if pieces and min(len(pieces[-1]), len(piece)) < least:
                pieces[-1] += piece
            else:
                pieces.append(piece)
        for piece in pieces:
            yield int(rows[piece].mean(0).argmax()), piece


def same_best(
    means: np.ndarray, threshold: float, is_left_out: np.ndarray
) -> Iterator[tuple[int, list[int]]]:
    """Yield events as a class and its windows. `means` are those around them, (windows, classes).

    An event is a row of windows with the same best class, each with a probability of `threshold`
    or more.
    """
    best = means.argmax(1)
    is_event = (means.max(1) >= threshold) & ~is_left_out[best]
    for (heard, name), row in groupby(range(len(means)), lambda i: (is_event[i], best[i])):
        if heard:
            yield int(name), list(row)


def means_around(rows: np.ndarray, overlapping: int) -> np.ndarray:
    """Means over the windows that overlap or touch each window, (windows, classes).

    A single window that takes a dog for a rooster cuts no event.
    """
    means = [rows[max(0, i - overlapping) : i + overlapping + 1].mean(0) for i in range(len(rows))]
    return np.stack(means)


def overlaps(windows: list[Answer]) -> int:
    """How many windows lie in the length of one: 2 if a window begins every half window."""
    if len(windows) < 2:
        return 1
    first, second = windows[:2]
    return max(1, round((first.end - first.start) / (second.start - first.start)))


def edges_of(windows: list[Answer]) -> list[float]:
    """Where the time begins and ends that each window speaks for, (windows + 1)."""
    edges = [0.0]
    for one, other in pairwise(windows):
        edges.append((one.start + one.end + other.start + other.end) / 4)
    return [*edges, windows[-1].end]


def write_track(path: Path, events: list[Event]) -> None:
    """Write events as a label track for Audacity, and say so. A label is `dog (0.93)`."""
    lines = []
    for start, end, best, probability in events:
        lines.append(f"{start:.6f}\t{end:.6f}\t{best} ({probability:.2f})\n")
    write_text(path, "".join(lines))
    print(printable(f"{path}: {len(lines)} events"))


# ------------------------------------------------------------------------------------- embeddings


def save_embeddings(path: Path, names: list[str], answers: list[Answer]) -> None:
    """As .npz: vectors float32 (n, dim); names, classes, confidence and unsure, (n,) each."""
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            vectors=np.array([answer.vector for answer in answers]),
            names=names,
            classes=[answer.classes[0][0] for answer in answers],
            confidence=[answer.confidence for answer in answers],
            unsure=[answer.unsure for answer in answers],
        )
