"""What is told of predictions beside their accuracy, held to scikit-learn, and the weights of
classes."""

import csv
import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import make_folder, result_of, settings_of, train_on, write_sound
from sklearn import metrics
from sklearn.utils.class_weight import compute_class_weight

import train
from support import console
from support.scores import confusion, scores

CLASSES = ["a", "b", "c", "d", "e"]


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted classes of 40 clips; 'd' is never there, 'e' never predicted."""
    rng = np.random.default_rng(seed)
    return rng.choice([0, 1, 2, 4], 40, p=[0.6, 0.2, 0.1, 0.1]), rng.choice([0, 1, 2, 3], 40)


def rows_of(true, predicted) -> list[dict]:
    return [
        {"label": CLASSES[t], "prediction": CLASSES[p]}
        for t, p in zip(true, predicted, strict=True)
    ]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_are_those_of_scikit_learn(seed):
    true, predicted = drawn(seed)
    counts = confusion(rows_of(true, predicted), CLASSES)
    assert np.array_equal(counts, metrics.confusion_matrix(true, predicted, labels=range(5)))
    found = scores(counts, CLASSES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that 'd' is not there
        balanced = metrics.balanced_accuracy_score(true, predicted)
    assert found["accuracy"] == pytest.approx(100 * metrics.accuracy_score(true, predicted))
    assert found["balanced_accuracy"] == pytest.approx(100 * balanced, abs=1e-4)
    f1 = metrics.f1_score(true, predicted, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(100 * f1, abs=1e-4)
    assert found["majority"] == pytest.approx(100 * (true == 0).mean())
    each = metrics.precision_recall_fscore_support(
        true, predicted, labels=range(5), zero_division=0
    )
    for name, precision, recall, f1, support in zip(CLASSES, *each, strict=True):
        of = found["classes"][name]
        assert list(of) == ["support", "precision", "recall", "f1"] and of["support"] == support
        assert [of["precision"], of["recall"], of["f1"]] == pytest.approx(
            [100 * precision, 100 * recall, 100 * f1], abs=1e-4
        )
    assert train.score_of(
        torch.eye(len(CLASSES))[torch.tensor(predicted)], torch.tensor(true), "balanced"
    ) == pytest.approx(100 * balanced)


def test_macro_f1_leaves_out_classes_that_nobody_names():
    counts = confusion(rows_of([0, 0, 1], [0, 1, 1]), CLASSES)
    expected = metrics.f1_score([0, 0, 1], [0, 1, 1], average="macro")
    assert scores(counts, CLASSES)["macro_f1"] == pytest.approx(100 * expected, abs=1e-4)


def test_weights_of_classes_are_balanced():
    labels = torch.tensor(
        [0, 0, 0, 0, 1, 1, 2, 3, 0]
    )  # the last clip does not train, and class 3 has none that does
    clips = torch.tensor([0, 1, 2, 3, 4, 5, 6])
    weights = train.weights_of_classes(labels, clips)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels[clips].numpy())
    assert weights[:3].tolist() == pytest.approx(expected.tolist())
    assert weights[labels[clips]].mean().item() == pytest.approx(1)


def test_the_score_of_own_sounds_is_balanced_accuracy():
    labels = torch.tensor([0, 0, 0, 0, 1])
    always, mixed = (torch.eye(2)[torch.tensor(answers)] for answers in ([0] * 5, [0, 0, 1, 1, 1]))
    assert [train.score_of(x, labels, "accuracy") for x in (always, mixed)] == [80.0, 60.0]
    assert [train.score_of(x, labels, "balanced") for x in (always, mixed)] == [50.0, 75.0]


# --------------------------------------------------------------------------------------------- runs


def test_a_run_says_what_accuracy_hides(tmp_path, capsys):
    root = make_folder(tmp_path / "my", count=5)
    for i in range(15):
        write_sound(root / "drum" / f"more{i}.wav", 10)
    assert train_on("folder", root, tmp_path, "--epochs", 2) == 0
    out = capsys.readouterr().out
    run, result = tmp_path / "runs/folder/linear/seed0", result_of("folder", tmp_path)
    rows = [
        row
        for row in csv.DictReader((run / "predictions.csv").read_text().splitlines())
        if row["part"] == "test"
    ]
    true, said = [row["label"] for row in rows], [row["prediction"] for row in rows]
    names = ["bell", "drum", "flute"]
    counts = metrics.confusion_matrix(true, said, labels=names)
    table = list(csv.reader((run / "confusion.csv").read_text().splitlines()))
    assert table == [
        ["true / predicted", *names],
        *([n, *map(str, r)] for n, r in zip(names, counts, strict=True)),
    ]
    assert (
        result["scores"] == scores(counts, names)
        and result["scores"]["accuracy"] == result["accuracy"]
    )
    assert "66.67 % for always answering the largest class" in out
    assert "by balanced accuracy" in out
    config = json.loads((run / "config.json").read_text())
    assert (config["choose_by"], config["balance"]) == ("balanced", False)


def test_what_the_summary_names(monkeypatch):
    rows = rows_of([0, 0, 0, 1, 1, 2], [0, 1, 1, 0, 1, 0])
    rows = [{**row, "path": f"{i}.wav", "probability": f"0.{9 - i}"} for i, row in enumerate(rows)]
    counts = confusion(rows, CLASSES[:3])
    classes = scores(counts, CLASSES[:3])["classes"]
    title = console.describe_classes(classes)[0]
    assert title.startswith("  classes with the lowest F1      clips  precision")
    monkeypatch.setattr(console, "ROWS", 2)
    said = console.describe_classes(classes)
    assert [line.split()[0] for line in said[1:]] == ["c", "a"]


@pytest.mark.parametrize(
    ("part", "validation", "by", "chosen"),
    [
        ("LoRA", 62.5, "accuracy", "best of validation 62.50 % in epoch 3"),
        ("LoRA", 62.5, "balanced", "best of validation 62.50 % in epoch 3, by balanced accuracy"),
        ("LoRA", None, "balanced", "last epoch"),
        ("LogMel", 62.5, "accuracy", "best of validation 62.50 % with penalty 3 of 5"),
        ("Statistics", None, "accuracy", "weakest penalty"),
    ],
)
def test_what_is_said_of_a_fold(part, validation, by, chosen):
    result = {
        "fold": 2,
        "accuracy": 50.0,
        "validation_accuracy": validation,
        "epoch": 3,
        "seconds": 4.4,
    }
    settings = settings_of(method={"parts": [{"part": part}]}, epochs=5, choose_by=by)
    said = console.describe_fold(result, settings)
    assert said == f"fold 2: test accuracy 50.00 % ({chosen}), 4 s"


def test_a_balanced_loss(tmp_path, monkeypatch):
    """What the loop asks of cross-entropy; without --balance it is what it was."""
    root, asked, original = make_folder(tmp_path / "my", count=5), [], F.cross_entropy
    for i in range(5):
        write_sound(root / "drum" / f"more{i}.wav", 10)

    def cross_entropy(logits, y, weight=None, **options):
        if logits.dtype == torch.float:  # not those of logmel, which is fitted in float64
            asked.append(weight)
        return original(logits, y, weight=weight, **options)

    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    assert (
        train_on("folder", root, tmp_path)
        == train_on("folder", root, tmp_path, "--balance", "--out", tmp_path / "b")
        == 0
    )
    plain, balanced = asked
    assert plain is None and balanced.tolist() == pytest.approx(
        [12 / 9, 12 / 18, 12 / 9]
    )  # 3, 6 and 3 clips train
    assert (
        json.loads((tmp_path / "b/folder/linear/seed0/config.json").read_text())["balance"] is True
    )
    assert train_on("folder", root, tmp_path, "--balance") == 2  # another experiment
