"""What tools/predict.py says of sounds, and what becomes of it: lines of text, events, label tracks, embeddings.

Answers come one by one, as a recording is heard, and go through here one by one.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.command import UserError
from support.files import csv_of, to_bytes, whole_file

COLUMNS = "file,what,start,end,rank,class,probability,error"  # of --csv
UNSURE = "unsure"  # the answer where the confidence is too low


@dataclass(frozen=True)
class Answer:
    """What is said about a window, an event or a whole sound."""

    file: Path | None  # None: an array
    what: str  # "window", "event" or "file"
    start: float = 0.0  # seconds
    end: float = 0.0
    classes: tuple[tuple[str, float], ...] = ()  # with their probabilities, the best first
    confidence: float = 0.0  # the best probability, less where the sound is unlike those of training
    unsure: bool = False  # whether the confidence is less than the classifier's `min_confidence`
    vector: np.ndarray | None = field(default=None, compare=False, repr=False)  # what the head reads, (dim,)
    error: str | None = None  # why it could not be read

    @property
    def best(self) -> str:
        """The class, or "unsure"."""
        return UNSURE if self.unsure else self.classes[0][0]

    @property
    def told(self) -> tuple[tuple[str, float], ...]:
        """The classes; before them, where it is so, "unsure" with the confidence."""
        return ((UNSURE, self.confidence), *self.classes) if self.unsure else self.classes


# ----------------------------------------------------------------------------------------------- answers to the user


def printable(path: Path) -> str:
    """A file name may hold bytes that are no text; they are shown as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def shown(answer: Answer, form: str | None, width: int) -> str:
    """An answer as one line for people, its file in `width` columns; as one JSON object, so that a program can read the
    output line by line while it is being written; or as CSV with the columns COLUMNS, a row for each of the classes."""
    file = printable(answer.file)
    if form == "json":
        best = [{"class": name, "probability": round(p, 6)} for name, p in answer.told]
        found = {"start": round(answer.start, 3), "end": round(answer.end, 3), "classes": best}
        return json.dumps({"file": file, "what": answer.what, **({"error": answer.error} if answer.error else found)})
    if form == "csv":
        first, span = (file, answer.what), (f"{answer.start:.3f}", f"{answer.end:.3f}")
        rows = [(*first, *span, rank, name, f"{p:.6f}", "") for rank, (name, p) in enumerate(answer.told, 1)]
        return csv_of(rows or [(*first, *[""] * 5, answer.error)]).rstrip("\n")
    span = f"{answer.end:20.2f} s" if answer.what == "file" else f"{answer.start:9.2f} -{answer.end:9.2f} s"
    return f"{file:<{width}}{span}  {'  '.join(f'{name} {p:.3f}' for name, p in answer.told)}"


# ------------------------------------------------------------------------------------------------------------- events


def events_of(answers: Iterable[Answer], threshold: float, min_length: float) -> Iterator[Answer]:
    """Answers of classify.listen to Answers on events, each at its end; those on whole files, and errors, follow as
    they are.

    A window speaks for what is nearer to its middle than to those of its neighbours. An event is a row of windows that
    are sure of one class, with `threshold` or more, and lasts `min_length` seconds or more. Its probability is the mean
    of theirs.
    """
    for _, of_file in groupby(answers, key=lambda answer: answer.file):
        for name, windows in groupby(middles(of_file), key=lambda window: heard_in(window, threshold)):
            total, n, first = 0.0, 0, None
            for window in windows:
                if window.what == "file":  # the whole, or an error
                    yield window
                    continue
                first, last = first or window, window
                total, n = total + window.classes[0][1], n + 1
            if name and last.end - first.start >= min_length - 1e-9:
                yield replace(first, what="event", end=last.end, classes=((name, total / n),))


def heard_in(answer: Answer, threshold: float) -> str | None:
    sure = answer.what == "window" and not answer.unsure and answer.classes[0][1] >= threshold
    return answer.best if sure else None


def middles(answers: Iterable[Answer]) -> Iterator[Answer]:
    """Answers on the windows of a sound, or of several, without their overlap: each but the first and last of a sound
    begins and ends half-way between its middle and those of its neighbours."""
    before, begin = None, 0.0
    for answer in answers:
        if before is not None:
            edge = before.end
            if answer.what == "window":
                edge = (before.start + before.end + answer.start + answer.end) / 4
            yield replace(before, start=begin, end=edge)
            begin, before = edge, None
        if answer.what == "window":
            before = answer
        else:  # the last of its sound; the next may have the same file, or none either
            begin = 0.0
            yield answer


def write_tracks(answers: Iterable[Answer]) -> Iterator[Answer]:
    """Write the events of each file beside it, as a label track for Audacity, and say so. Only errors are handed on:
    their files get no track."""
    for file, of_file in groupby(answers, key=lambda answer: answer.file):
        track, count = Path(f"{file}.events.txt"), 0
        try:
            with whole_file(track) as temporary, open(temporary, "wb") as lines:
                for answer in of_file:
                    if answer.error is not None:
                        raise ValueError
                    if answer.what == "event":
                        name, count = " ".join(answer.best.split()), count + 1  # a tab would end it
                        lines.write(to_bytes(f"{answer.start:.6f}\t{answer.end:.6f}\t{name}\n"))
        except ValueError:
            yield answer
        else:
            tqdm.write(f"{printable(track)}: {count} events")


# --------------------------------------------------------------------------------------------------------- embeddings


def save_embeddings(answers: list[Answer], path: Path) -> None:
    """As .npz: vectors float32 (n, dim); names, start, end (seconds), classes and confidence, (n,) each."""
    if not answers:
        raise UserError("--embeddings: no sound could be read, so there are none")
    with open(path, "wb") as file:
        np.savez(
            file, vectors=np.stack([a.vector for a in answers]), names=[printable(a.file) for a in answers],
            start=[a.start for a in answers], end=[a.end for a in answers], classes=[a.best for a in answers],
            confidence=[a.confidence for a in answers],
        )  # fmt: skip
