"""What a confusion matrix says beyond accuracy."""

from collections.abc import Iterable

import numpy as np

from support.files import csv_of

DRAWS = 2000  # of the bootstrap
ENOUGH = 5  # recordings; the draws of fewer say too little


def confusion(rows: Iterable[dict], classes: list[str]) -> np.ndarray:
    """Counts (classes, classes) of rows with label and prediction.

    A row of the matrix is a true class, a column a predicted class.
    """
    number = {name: i for i, name in enumerate(classes)}
    counts = np.zeros((len(classes), len(classes)), int)
    for row in rows:
        counts[number[row["label"]], number[row["prediction"]]] += 1
    return counts


def confusion_table(counts, classes):
    """confusion.csv: a row for each true class, a column for each predicted one."""
    rows = [[name, *row] for name, row in zip(classes, counts.tolist(), strict=True)]
    return csv_of([["true / predicted", *classes], *rows])


def scores(counts: np.ndarray, classes: list[str]) -> dict:
    """The scores of `sklearn.metrics`, in percent. A score of 0 / 0 is 0.

    Of all clips: accuracy; balanced accuracy, the mean recall of the classes that have clips;
    macro-F1, the mean over the classes that have clips or answers; majority, the accuracy of always
    answering the largest class. Of each class: its clips (support), precision, recall and F1.
    """
    right = counts.diagonal()
    true = counts.sum(1)
    answered = counts.sum(0)
    # Where a divisor is 0, nothing is right either.
    precision = 100 * right / answered.clip(1)
    recall = 100 * right / true.clip(1)
    f1 = 100 * right / ((true + answered) / 2).clip(1)
    total = {
        "accuracy": 100 * right.sum() / true.sum(),
        "balanced_accuracy": recall[true > 0].mean(),
        "macro_f1": f1[true + answered > 0].mean(),
        "majority": 100 * true.max() / true.sum(),
    }
    of_class = {}
    for i, name in enumerate(classes):
        rates = {"precision": precision[i], "recall": recall[i], "f1": f1[i]}
        of_class[name] = {"support": int(true[i]), **rounded(rates)}
    return {**rounded(total), "classes": of_class}


def rounded(numbers: dict) -> dict[str, float]:
    return {name: round(float(number), 4) for name, number in numbers.items()}


def balanced_interval(
    rows: list[dict], classes: list[str], groups: dict[str, str]
) -> tuple[float, float] | None:
    """The 95 % interval of balanced accuracy in percent: a percentile bootstrap (Efron, 1979).

    rows: test clips with path, label and prediction. groups: {path: recording}, empty if every clip
    is one. A draw takes as many recordings as there are, some of them several times. None if there
    are fewer than ENOUGH recordings, or if all draws are alike, because nothing is wrong.
    """
    recordings = [groups.get(row["path"], row["path"]) for row in rows]
    place = {recording: i for i, recording in enumerate(dict.fromkeys(recordings))}
    if len(place) < ENOUGH:
        return None
    number = {name: i for i, name in enumerate(classes)}
    clips = np.zeros((len(place), len(classes)))
    right = np.zeros_like(clips)
    for row, recording in zip(rows, recordings, strict=True):
        cell = place[recording], number[row["label"]]
        clips[cell] += 1
        right[cell] += row["label"] == row["prediction"]
    rng = np.random.default_rng(0)
    found = []
    for _ in range(DRAWS):
        drawn = rng.integers(len(place), size=len(place))
        times = np.bincount(drawn, minlength=len(place))
        true = times @ clips
        found.append(100 * ((times @ right)[true > 0] / true[true > 0]).mean())
    low, high = np.percentile(found, [2.5, 97.5])
    return (float(low), float(high)) if low < high else None
