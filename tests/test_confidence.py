"""tools/confidence.py: its numbers by scikit-learn and by hand, its sounds by counting."""

import csv

import numpy as np
import pytest
import torch
from helpers import SMALL_AST
from sklearn.metrics import roc_auc_score

import data
from load_weights import load_ast
from support.calibration import Calibration, fit, scores_of_parts
from tools import confidence


def answers(count: int, scale: float, seed: int) -> tuple[tuple, torch.Tensor]:
    """Logits, middles and vectors of random clips of four classes, and their labels."""
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(0, 4, count))
    logits = torch.nn.functional.one_hot(labels, 4) * 2 + torch.from_numpy(
        rng.normal(size=(count, 4))
    )
    middles = torch.from_numpy(scale * rng.normal(size=(count, 32)))
    return (logits.double(), middles, 2 * middles[:, :8]), labels


def test_auroc_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    higher, lower = rng.integers(2, 9, 50).astype(float), rng.integers(0, 7, 70).astype(float)
    expected = roc_auc_score([1] * 50 + [0] * 70, np.concatenate([higher, lower]))
    found = confidence.auroc(torch.from_numpy(higher), torch.from_numpy(lower))
    assert found == pytest.approx(100 * expected)


def test_the_ways_and_their_numbers_by_hand():
    parts = {}
    labels = {}
    for seed, (part, scale) in enumerate(
        {"val": 1, "test": 1, "foreign": 2, "noise": 9, "silence": 1}.items()
    ):
        parts[part], labels[part] = answers(200, scale, seed)
    found = confidence.confidences(parts, labels["val"])
    logits, middles, vectors = parts["val"]
    by_middle = Calibration(**fit(logits, labels["val"], middles))
    by_head = Calibration(**fit(logits, labels["val"], vectors))
    for part, (logits, middles, vectors) in parts.items():
        p = (logits / by_middle.temperature).softmax(1).amax(1)
        assert torch.equal(found["largest probability"][part], p)
        if part != "val":  # those are measured by fifths
            lowered = found["**probability, lowered by ViM of the middle**"][part]
            torch.testing.assert_close(lowered, p * by_middle.known(logits, middles))
            lowered = found["probability, lowered by ViM of the head's vector"][part]
            torch.testing.assert_close(lowered, p * by_head.known(logits, vectors))
    scores = found["ViM of the middle alone"]
    logits, middles, _ = parts["val"]
    assert torch.equal(scores["val"], -scores_of_parts(logits, middles))
    right = {part: parts[part][0].argmax(1) == labels[part] for part in ("val", "test")}

    row = confidence.measure(scores, right)
    least = sorted(scores["val"][right["val"]].tolist())[right["val"].sum() // 10]
    sure = scores["test"].numpy() >= least
    is_right = right["test"].numpy()
    assert row[0] == pytest.approx(100 * roc_auc_score(is_right, scores["test"]))
    assert row[2] == pytest.approx(100 * sure[is_right].mean())
    assert row[3] == pytest.approx(100 * (~sure[~is_right]).mean())
    assert row[5] == 100 and len(row) == len(confidence.COLUMNS)


def test_answers_are_those_of_the_model():
    model = load_ast(SMALL_AST, 60, 4).eval()
    waves = [np.random.default_rng(i).normal(size=9600) for i in range(3)]
    logits, middles, vectors = confidence.answers_to(model, waves)
    x = [data.to_input(data.fbank(torch.from_numpy(wave).float()), 60) for wave in waves]
    with torch.no_grad():
        torch.testing.assert_close(logits.float(), model(torch.stack(x)), rtol=0, atol=1e-5)
        torch.testing.assert_close(vectors.float(), model.vector(torch.stack(x)), rtol=0, atol=1e-5)
    assert middles.shape == (3, 128)


def test_classes_left_out(tmp_path, monkeypatch, esc50_dir):
    monkeypatch.setattr(confidence, "LEFT_OUT", ("sound 0", "sound 12"))
    foreign = confidence.esc10(esc50_dir, tmp_path / "esc10")
    rows = list(csv.DictReader((tmp_path / "esc10/clips.csv").read_text().splitlines()))
    assert len({row["label"] for row in rows}) == 8
    assert len(foreign) == 10 and len(rows) == 40
