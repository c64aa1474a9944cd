"""Windows of recordings: of whole ones, of what is labelled in them, and of what is not."""

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sounds.audio import lengths_of
from sounds.clip import WHOLE, Clip
from support.processes import say

BACKGROUND = "background"  # the class of what no label of a recording covers
PER_LABEL = 10  # windows of background for each window of a label, at most

Span = tuple[float, float]  # start and end, in seconds


def windows_in(span: Span, seconds: float) -> list[Span]:
    """Windows of `seconds`, side by side. The last one ends with the span.

    A span that is no longer than a window is one window, as it is.
    """
    start, end = span
    if end - start <= seconds:
        return [span]
    windows = []
    for i in range(math.ceil((end - start) / seconds - 1e-9)):
        first = min(start + i * seconds, end - seconds)
        windows.append((round(first, 6), round(first + seconds, 6)))
    return windows


def cut(clips: list[Clip], seconds: float) -> list[Clip]:
    """The windows of recordings. A recording that is no longer than a window stays as it is."""
    lengths = lengths_of([clip.path for clip in clips], {}).tolist()
    windows = []
    for clip, length in zip(clips, lengths, strict=True):
        if length > seconds:
            windows += [clip._replace(span=span) for span in windows_in((0.0, length), seconds)]
        else:  # or it is unreadable
            windows.append(clip)
    return windows


def cut_labels(clips: list[Clip], seconds: float | None, background: bool) -> list[Clip]:
    """The windows of clips that are pieces of recordings. Other clips stay as they are.

    With `background`, what no clip of a recording covers becomes windows of the class BACKGROUND.
    They have the part and the group of the clip before them. There are at most PER_LABEL for each
    other window, evenly over all recordings.

    Without `seconds` a window is as long as the shorter labels, see `seconds_of_labels`. Without
    `background` the clips then stay as they are.
    """
    if all(clip.span == WHOLE for clip in clips) or not (seconds or background):
        return clips
    lengths = lengths_of([clip.path for clip in clips], {}).tolist()
    ends = {clip.path: length for clip, length in zip(clips, lengths, strict=True)}
    clips = [end_with_file(clip, ends[clip.path]) for clip in clips]
    seconds = seconds or seconds_of_labels(clips)
    windows = []
    for clip in clips:
        has_end = clip.span[1] < math.inf  # else it is a file of its own, or a bad one
        spans = windows_in(clip.span, seconds) if has_end else [clip.span]
        windows += [clip._replace(span=span) for span in spans]
    if background:
        between = list(windows_between(clips, ends, seconds))
        step = math.ceil(len(between) / (PER_LABEL * len(windows))) or 1
        windows += between[::step]
        if between:
            say(
                f"{len(between[::step])} windows of {BACKGROUND!r} are added: what labels, or "
                "start and end, leave of the recordings; --no-background adds none"
            )
    return windows


def end_with_file(clip: Clip, length: float) -> Clip:
    """The clip, with an end in its file. One that starts after the end stays: it is a bad clip."""
    start, end = clip.span
    if clip.span == WHOLE or not start < length < end:
        return clip
    return clip._replace(span=(start, round(length, 6)))


def seconds_of_labels(clips: list[Clip]) -> float:
    """The length of windows that suits labels: nine of ten labels last as long, or longer."""
    lengths = [clip.span[1] - clip.span[0] for clip in clips if clip.span[1] < math.inf]
    shorter = float(np.percentile(lengths or [1.0], 10))
    return round(min(max(shorter, 0.5), 2.0), 1)


def windows_between(clips: list[Clip], ends: dict[Path, float], seconds: float) -> Iterator[Clip]:
    """Yield the windows of BACKGROUND between the clips of each recording.

    A gap that is shorter than a window is left out. `ends` has the seconds of each recording: nan
    if it is unreadable.
    """
    of_file = defaultdict(list)
    for clip in clips:
        of_file[clip.path].append(clip)
    for path, labels in of_file.items():
        if math.isnan(ends[path]):
            continue
        labels.sort(key=lambda clip: clip.span)
        before = labels[0]
        covered = 0.0  # seconds
        for clip in [*labels, labels[-1]._replace(span=(ends[path], math.inf))]:
            start = min(clip.span[0], ends[path])
            if start - covered >= seconds:
                for span in windows_in((covered, start), seconds):
                    yield before._replace(label=BACKGROUND, span=span)
            before = clip
            covered = max(covered, clip.span[1])
