"""What a confusion matrix says beyond accuracy, and which clips it is most surely wrong about."""

from collections.abc import Iterable

import numpy as np

from support.files import csv_of


def confusion(rows: Iterable[dict], classes: list[str]) -> np.ndarray:
    """Rows with label and prediction to counts (classes, classes); row: true class, column: predicted class."""
    number, counts = {name: i for i, name in enumerate(classes)}, np.zeros((len(classes), len(classes)), int)
    for row in rows:
        counts[number[row["label"]], number[row["prediction"]]] += 1
    return counts


def confusion_table(counts: np.ndarray, classes: list[str]) -> str:
    """confusion.csv: a row for each true class, a column for each predicted one."""
    rows = [[name, *row] for name, row in zip(classes, counts.tolist(), strict=True)]
    return csv_of([["true / predicted", *classes], *rows])


def scores(counts: np.ndarray, classes: list[str]) -> dict:
    """In percent, as `sklearn.metrics` has them, 0 for 0 / 0: accuracy; balanced accuracy, the mean recall of the
    classes that there are; macro-F1, over those and the predicted ones; majority, the accuracy of always answering the
    largest class. And of each class its clips (support), precision, recall and F1."""
    right, true, said = counts.diagonal(), counts.sum(1), counts.sum(0)
    # Where nothing is divided by 0, nothing is right either.
    precision, recall, f1 = (100 * right / of.clip(1) for of in (said, true, (true + said) / 2))
    total = {"accuracy": 100 * right.sum() / true.sum(), "balanced_accuracy": recall[true > 0].mean(),
             "macro_f1": f1[true + said > 0].mean(), "majority": 100 * true.max() / true.sum()}  # fmt: skip
    of_class = {
        name: {"support": int(n), "precision": round(p, 4), "recall": round(r, 4), "f1": round(f, 4)}
        for name, n, p, r, f in zip(classes, true, precision.tolist(), recall.tolist(), f1.tolist(), strict=True)
    }
    return {**{name: round(float(value), 4) for name, value in total.items()}, "classes": of_class}


def mistakes(rows: Iterable[dict], count: int = 5) -> list[dict]:
    """The most confident wrong answers among rows with label, prediction and probability, the surest first."""
    wrong = [row for row in rows if row["label"] != row["prediction"]]
    return sorted(wrong, key=lambda row: -float(row["probability"]))[:count]
