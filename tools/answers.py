"""What tools/predict.py says about sounds: lines of text, events, label tracks, embeddings."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from pathlib import Path
from statistics import mean

import numpy as np

from support.command import printable
from support.files import csv_of, whole_file, write_text

# Of --csv. The last two are the same in all rows of a file.
COLUMNS = ("file", "start", "end", "rank", "class", "probability", "confidence", "unsure")
UNSURE = "unsure"  # the answer where the confidence is too low


@dataclass(frozen=True)
class Answer:
    """What is said about a window, an event or a whole sound."""

    start: float  # seconds
    end: float
    classes: tuple[tuple[str, float], ...]  # with their probabilities, the best first
    confidence: float  # the best probability, less where the sound is unlike those of training
    unsure: bool  # whether the confidence is less than the classifier's `min_confidence`
    vector: np.ndarray | None = field(default=None, repr=False)  # what the head reads, (dim,)

    @property
    def best(self) -> str:
        """The class, or "unsure"."""
        return UNSURE if self.unsure else self.classes[0][0]


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
        if answer.unsure:
            classes = ((UNSURE, answer.confidence), *classes)
        names = "  ".join(f"{name} {p:.3f}" for name, p in classes)
        print(f"{file:<{width}}{answer.end:20.2f} s  {names}")


# ----------------------------------------------------------------------------------------- events


def events_of(windows: list[Answer], threshold: float) -> Iterator[Answer]:
    """Yield the events in the windows of one sound.

    A window speaks for the time that is nearer to its middle than to the middles of its neighbours.
    An event is a row of windows that are sure of one class, each with a probability of `threshold`
    or more. Probability and confidence of the event are the means of theirs.
    """
    edges = [0.0]
    for one, other in pairwise(windows):
        edges.append((one.start + one.end + other.start + other.end) / 4)
    edges.append(windows[-1].end)
    pieces = [
        replace(window, start=start, end=end)
        for window, (start, end) in zip(windows, pairwise(edges), strict=True)
    ]
    for name, row in groupby(pieces, lambda piece: sure_class(piece, threshold)):
        row = list(row)
        if name != UNSURE:
            classes = ((name, mean(piece.classes[0][1] for piece in row)),)
            confidence = mean(piece.confidence for piece in row)
            yield replace(row[0], end=row[-1].end, classes=classes, confidence=confidence)


def sure_class(window: Answer, threshold: float) -> str:
    return window.best if window.classes[0][1] >= threshold else UNSURE


def write_track(path: Path, events: list[Answer]) -> None:
    """Write events as a label track for Audacity, and say so."""
    lines = [f"{event.start:.6f}\t{event.end:.6f}\t{event.best}\n" for event in events]
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
