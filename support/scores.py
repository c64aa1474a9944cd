"""What a confusion matrix says beyond accuracy."""

from collections.abc import Iterable

import numpy as np

from support.files import csv_of


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
    total = {name: round(float(value), 4) for name, value in total.items()}
    total["classes"] = {
        name: {
            "support": int(true[i]),
            "precision": round(float(precision[i]), 4),
            "recall": round(float(recall[i]), 4),
            "f1": round(float(f1[i]), 4),
        }
        for i, name in enumerate(classes)
    }
    return total
