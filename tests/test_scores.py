"""What is told of predictions beside their accuracy, held to scikit-learn, and the weights of
classes."""

import csv
import json
import re
import shlex
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import make_folder, result_of, settings_of, split_of, train_on, write_sound
from scipy import stats
from sklearn import metrics
from sklearn.utils.class_weight import compute_class_weight

import train
from data import Dataset, Split
from support import console
from support.records import Run
from support.scores import balanced_interval, confusion, scores

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


def with_paths(rows: list[dict]) -> list[dict]:
    return [{**row, "path": f"{i}.wav"} for i, row in enumerate(rows)]


@pytest.mark.parametrize("size", [1, 4])
def test_the_interval_is_that_of_scipy(size):
    """Clips are drawn, or recordings of four clips each."""
    true, predicted = drawn(5)
    found = balanced_interval(
        with_paths(rows_of(true, predicted)),
        CLASSES,
        {f"{i}.wav": str(i // size) for i in range(40)},
    )

    def balanced(recordings):
        some = np.concatenate([np.arange(size) + size * one for one in recordings])
        right = true[some] == predicted[some]
        return 100 * np.mean([right[true[some] == label].mean() for label in set(true[some])])

    expected = stats.bootstrap(
        (np.arange(40 // size),),
        balanced,
        n_resamples=2000,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert found == pytest.approx(tuple(expected), abs=1.5)


def test_copies_of_a_recording_tell_no_more_than_one():
    rows = with_paths(rows_of(*drawn(1)))
    twice = [{**row, "path": f"{i}/{row['path']}"} for row in rows for i in range(2)]
    groups = {row["path"]: row["path"][2:] for row in twice}
    alone = balanced_interval(rows, CLASSES, {})
    assert balanced_interval(twice, CLASSES, groups) == pytest.approx(alone)
    narrow = balanced_interval(twice, CLASSES, {})
    assert narrow[1] - narrow[0] < 0.85 * (alone[1] - alone[0])


def test_no_interval_where_draws_are_alike():
    right = with_paths(rows_of([0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]))
    wrong = with_paths(rows_of([0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1]))
    assert balanced_interval(right, CLASSES, {}) is None
    assert balanced_interval(wrong, CLASSES, {}) is not None


def test_no_interval_by_few_recordings():
    rows = with_paths(rows_of([0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1]))
    assert balanced_interval(rows, CLASSES, {f"{i}.wav": str(i % 4) for i in range(6)}) is None
    assert balanced_interval(rows, CLASSES, {f"{i}.wav": str(i % 5) for i in range(6)}) is not None


def test_few_groups_are_named():
    groups = ["b", "a", "b", "c"]
    dataset = Dataset("my", Path("my"), [], [], [], {}, groups=groups)
    expected = "groups that train: a, b; validate: none; test: c"
    assert console.describe_groups(dataset, Split([0, 1, 2], [], [3])) == expected
    many = Dataset("my", Path("my"), [], [], [], {}, groups=[str(i) for i in range(13)])
    expected = "groups that train: 2, such as 0; validate: none; test: 1, such as 2"
    assert console.describe_groups(many, Split([0, 1], [], [2])) == expected
    assert console.describe_groups(NO_HINT, Split([0], [1], [2])) == ""


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


def made_up(answers: dict[str, str], score: str, errors=(), train=()) -> Run:
    """A run whose test clips, the keys, have these answers. The folder of a clip is its class."""
    classes = sorted({path.split("/")[0] for path in answers})
    split = [{"fold": "1", "split": "train", "path": path, "label": path[0]} for path in train]
    for path in answers:
        split.append({"fold": "1", "split": "test", "path": path, "label": path.split("/")[0]})
    numbers = [classes.index(answer) for answer in answers.values()]
    right = sum(path.split("/")[0] == answer for path, answer in answers.items())
    result = {"fold": 1, "accuracy": 100 * right / len(answers), "seconds": 1.0}
    fold = {
        "classes": classes,
        "parameters": {"petl": 1, "head": 1, "total": 9},
        "versions": {},
        "result": {**result, "peak_memory_mb": None, **dict(errors)},
        "record": {"history": [], "predictions": numbers, "millionths": [0] * len(numbers)},
    }
    config = {"choose_by": score, "method": {"name": "lora"}}
    return Run(Path("run"), config, split, {1: fold})


NO_HINT = Dataset("my", Path("my"), [], [], [], {})


def test_what_accuracy_hides():
    """19 of 20 clips are right, but one of three classes is never answered."""
    answers = {f"a/{i}.wav": "a" for i in range(14)} | {f"b/{i}.wav": "b" for i in range(5)}
    run = made_up({**answers, "c/0.wav": "a"}, "balanced")
    assert dict(console.findings(run, NO_HINT)) == {
        "never answered": "c: 1 of 3 classes",
        "few test clips": "c (1): too few to say how good these classes are",
        "most confused": "1 of 1 clips of 'c' were taken for 'a'",
        "probabilities": "as they are, and never 'unsure': that takes ten right answers on "
        "validation clips",
    }
    text = console.balanced_accuracy(run, NO_HINT)
    assert re.fullmatch(
        r"balanced accuracy 66.67 % \(95 % interval \d\d.\d\d to 100.00, over clips\)", text
    )
    paths = [Path("my") / row["path"] for row in run.split]
    whole = Dataset("my", Path("my"), [], paths, [], {}, groups=["one"] * 20)
    assert (
        console.balanced_accuracy(run, whole)
        == "balanced accuracy 66.67 % (groups that test: 1, too few for an interval)"
    )
    right = {path: path[0] for path in answers}
    assert (
        console.balanced_accuracy(made_up(right, "balanced"), NO_HINT)
        == "balanced accuracy 100.00 % (no interval: all draws of clips give the same)"
    )
    assert (
        console.balanced_accuracy(made_up({"a/0.wav": "a", "b/0.wav": "b"}, "balanced"), NO_HINT)
        == "balanced accuracy 100.00 % (clips that test: 2, too few for an interval)"
    )
    plain = made_up({**answers, "c/0.wav": "a"}, "accuracy")
    assert console.balanced_accuracy(plain, NO_HINT) == "balanced accuracy 66.67 %"


def test_what_is_said_of_several_seeds(tmp_path, capsys):
    """The second seed has 9 of 10 clips right, and one of two classes."""
    answers = {f"a/{i}.wav": "a" for i in range(9)} | {"b/0.wav": "b"}
    runs = [made_up(answers, "balanced"), made_up({**answers, "b/0.wav": "a"}, "balanced")]
    console.summarise_seeds(tmp_path, {seed: run.result() for seed, run in enumerate(runs)})
    expected = (
        "accuracy 95.00 % (standard deviation 7.07), balanced accuracy 75.00 %, over 2 seeds, "
        "2 runs in all"
    )
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "after", "end"),
    [
        (3.0, 8.0, "8.0 % as tools.predict has them: worse than without its temperature"),
        (8.0, 3.0, "3.0 % as tools.predict has them"),
        (8.01, 8.04, "8.0 % as tools.predict has them"),
    ],
)
def test_a_worse_calibration_is_said(before, after, end):
    errors = {"calibration_error": before, "calibrated_error": after}
    found = dict(console.findings(made_up({"a/0.wav": "a"}, "balanced", errors), NO_HINT))
    assert found["probabilities"] == f"{before:.1f} % off (expected calibration error), {end}"


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, None),
        ({"unsure": 40.0, "sure_accuracy": 90.0}, "40 % of the test clips; 90 % of the other"),
        ({"unsure": 100.0}, "100 % of the test clips"),
    ],
)
def test_how_many_test_clips_are_unsure(told, expected):
    found = dict(console.findings(made_up({"a/0.wav": "a"}, "balanced", told), NO_HINT))
    assert ("unsure" in found) == (expected is not None)
    if expected:
        assert found["unsure"].startswith(expected)


def test_the_pattern_that_is_printed_keeps_recordings_together(tmp_path, capsys):
    root = tmp_path / "my"
    for name, recordings in (("bell", ("one", "two", "three", "four")), ("drum", ("a", "b", "c"))):
        for recording in recordings:
            for i in range(5):
                write_sound(root / name / f"{recording}_0{i}.wav", 10 * (name == "drum"))
    for i in range(5):
        write_sound(root / "flute" / f"flute-{i}.wav", 20)
    assert train_on("folder", root, tmp_path) == 0
    out = capsys.readouterr().out
    assert out.index("in all classes") < out.index("test accuracy  ")

    def shared():
        """Test clips of the recordings that train, by the names that were made above."""
        parts = split_of("folder", tmp_path)
        training = {path.rsplit("_", 1)[0] for path in parts["train"]}
        return sorted(path for path in parts["test"] if path.rsplit("_", 1)[0] in training)

    tested = len(split_of("folder", tmp_path)["test"])
    (line,) = re.findall("  recordings      (.*)", out)
    count, example = re.match(r"(\d+) of (\d+) test clips, such as (.*), are named", line).group(
        1, 3
    )
    assert int(count) == len(shared()) > 0 and example in shared() and f"of {tested} test" in line
    (hint,) = re.findall("  what to do      (.*) keeps a recording in one part", out)
    (tmp_path / "runs").rename(tmp_path / "old")
    assert train_on("folder", root, tmp_path, *shlex.split(hint)) == 0
    out = capsys.readouterr().out
    assert shared() == [] and "named like pieces" not in out
    assert "groups that train: " in out


def test_parts_of_the_users_own_are_not_drawn_anew():
    answers = {"a/r_1.wav#0-1.5": "a", "b/s_1.wav": "b"}
    run = made_up(answers, "balanced", train=["a/r_2.wav"])
    given = Dataset("my", Path("my"), [], [], [], {1: None}, group_hint=r"/(.)_\d\.wav$")
    found = dict(console.findings(run, given))
    assert found["recordings"].startswith("1 of 2 test clips, such as a/r_1.wav#0-1.5, are")
    assert found["what to do"] == "put all clips of a recording into one part"


def test_the_files_that_are_kept(tmp_path):
    for fold in (2, 5):
        (tmp_path / f"fold{fold}.safetensors").write_bytes(bytes(7_300))
    one = Run(tmp_path, {}, [], {5: {}})
    assert console.describe_files(one) == f"{tmp_path}/fold5.safetensors, 7 kB"
    both = Run(tmp_path, {}, [], {2: {}, 5: {}})
    assert console.describe_files(both) == f"{tmp_path}/fold*.safetensors, 2 of 7 kB"


@pytest.mark.parametrize(
    ("name", "petl", "parts"),
    [
        ("lora", 1200, "1,200 of lora, 34 of final LayerNorm and head"),
        ("linear", 0, "final LayerNorm and head alone"),
        ("probe", 0, "the head alone"),
    ],
)
def test_what_the_trained_parameters_belong_to(name, petl, parts):
    assert console.describe_parts({"petl": petl, "head": 34, "total": 9999}, name) == parts


@pytest.mark.parametrize(
    ("part", "validation", "by", "chosen"),
    [
        ("LoRA", 62.5, "accuracy", "best of validation 62.50 % in epoch 3"),
        ("LoRA", 62.5, "balanced", "best of validation 62.50 % in epoch 3, by balanced accuracy"),
        ("LoRA", None, "balanced", "last epoch"),
        (
            "LogMel",
            62.5,
            "accuracy",
            "best of validation 62.50 % with penalty 3 of 5, from strong to weak",
        ),
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
