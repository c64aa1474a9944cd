"""support/calibration.py beside other ways to the same numbers, and far from the known."""

import numpy as np
import pytest
import torch
from helpers import make_folder, train_on
from scipy.optimize import minimize_scalar
from scipy.spatial.distance import mahalanobis

from support.calibration import Calibration, calibrated, error, fit, temperature_of
from support.checkpoints import read_header
from tools import export
from tools.predict import load


def clips(
    count: int, classes: int = 4, far: float = 3.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (count, classes), of each class around a point of its own, and labels.

    One label in ten is that of another class.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    logits = (
        far * np.eye(classes)[labels]
        + rng.standard_normal((count, classes)) * [2, 1, 0.5, 1][:classes]
    )
    wrong = rng.random(count) < 0.1
    return torch.from_numpy(logits).float(), torch.from_numpy(
        np.where(wrong, (labels + 1) % classes, labels)
    )


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
def test_the_temperature_is_that_of_the_least_cross_entropy(scale):
    logits, labels = clips(200)
    logits = scale * logits.double()
    smooth = 1 / (len(labels) + 2)
    best = minimize_scalar(
        lambda t: torch.nn.functional.cross_entropy(
            logits / t, labels, label_smoothing=smooth
        ).item(),
        bounds=(0.01, 100),
        method="bounded",
        options={"xatol": 1e-8},
    )
    assert temperature_of(logits, labels) == pytest.approx(best.x, rel=1e-4)
    everything_right = temperature_of(
        20 * torch.eye(4, dtype=torch.double).repeat(5, 1), torch.arange(4).repeat(5)
    )
    assert 1 < everything_right < 10  # not 0


def test_the_calibration_error_by_hand():
    rng = np.random.default_rng(0)
    probabilities = np.concatenate(
        [rng.uniform(0.2, 1, 500), [0.2, 0.4, 1.0]]
    )  # on the edges of bins, too
    right = rng.random(503) < probabilities**2
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (probabilities > low + 1e-12) & (probabilities <= low + 1 / 15 + 1e-12)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - probabilities[inside].mean())
    assert error(torch.from_numpy(probabilities), torch.from_numpy(right)) == pytest.approx(
        100 * expected
    )
    assert error(torch.ones(8), torch.tensor([True] * 6 + [False] * 2)) == 25


def test_distances_are_those_of_mahalanobis():
    """To the nearest mean, by the covariance of all classes.

    Half of the clips that fitted it have 1 or less.
    """
    logits, labels = clips(400)
    x, y = logits.double().numpy(), labels.numpy()
    means = np.stack([x[y == k].mean(0) for k in range(4)])
    rest = x - means[y]
    inverse = np.linalg.inv((rest.T @ rest + np.square(x - x.mean(0)).mean() * np.eye(4)) / 400)
    found = Calibration(**fit(logits, labels))
    new = torch.randn(50, 4, generator=torch.Generator().manual_seed(1)) * 3
    squares = np.array(
        [min(mahalanobis(row, m, inverse) ** 2 for m in means) for row in new.double().numpy()]
    )
    known = found.known(new).double().numpy()
    usual = (squares / (1 - np.log(known)))[known < 0.999]
    assert len(usual) > 20 and usual.std() / usual.mean() < 1e-4  # one number explains all
    assert (known[squares < usual.mean()] == 1).all()
    assert (found.known(logits) == 1).double().mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("count", [40, 400])
def test_nine_of_ten_right_answers_stay_and_what_is_far_goes(count):
    """On clips that the fit has not seen. Few validation clips do not throw more away."""
    kept, gone = [], []
    for seed in range(10):
        found = Calibration(**fit(*clips(count, seed=seed)))
        logits, labels = clips(1000, seed=100 + seed)
        confidence = (logits / found.temperature).softmax(1).amax(1) * found.known(logits)
        kept.append(
            (confidence >= found.min_confidence)[logits.argmax(1) == labels].double().mean()
        )
        away = logits + torch.tensor([8.0, 8, 8, -8])  # as probable, by softmax
        confidence = (away / found.temperature).softmax(1).amax(1) * found.known(away)
        gone.append((confidence < found.min_confidence).double().mean())
    assert np.mean(kept) == pytest.approx(0.9, abs=0.04) and np.mean(gone) > 0.95


def test_too_few_clips_and_odd_ones():
    logits, labels = clips(400)
    right = (logits.argmax(1) == labels).nonzero()[:, 0]
    assert [fit(logits[right[:n]], labels[right[:n]]) is None for n in (0, 9, 10)] == [
        True,
        True,
        False,
    ]
    outcome = {"result": {"accuracy": 50.0}}
    assert calibrated(outcome, (logits[:9], labels[:9]), (logits, labels)) == outcome
    assert Calibration().known(logits).tolist() == [1.0] * 400
    odd = logits.clone()
    odd[0], odd[1] = torch.nan, torch.inf  # of float16
    for some in (odd, torch.ones(400, 4), torch.eye(4)[labels] * 1e4):
        found = Calibration(**fit(some, labels))
        assert found.known(some).isfinite().all() and 0 <= found.min_confidence <= 1


def test_a_run_fits_its_validation_clips(tmp_path, capsys):
    """What is found is in the header, and its errors are in the summary.

    `show` prints it, and other sounds are unsure.
    """
    folder = make_folder(tmp_path / "sounds", count=25)
    assert train_on("folder", folder, tmp_path, "--epochs", 10, "--lr", 1e-2) == 0
    file = tmp_path / "runs/folder/linear/seed0/fold1.safetensors"
    header, out = read_header(file), capsys.readouterr().out
    calibration, result = header["calibration"], header["result"]
    assert len(calibration["centres"]) == len(header["classes"]) == 3
    before = f"{result['calibration_error']:.1f} % off (expected calibration error)"
    line = f"{before}, {result['calibrated_error']:.1f} %"
    assert line in out
    export.main(["show", str(file)])
    least = calibration["min_confidence"]
    assert (
        f"temperature {calibration['temperature']:.3g}, unsure below {least:.3g}"
        in capsys.readouterr().out
    )
    classify, rng = load(file.parent), np.random.default_rng(0)
    noise = [10 ** -rng.uniform(0, 4) * rng.uniform(-1, 1, 4800) for _ in range(20)]
    chirps = [0.3 * np.sin(np.linspace(0, rng.uniform(50, 90), 4800) ** 2) for _ in range(20)]
    unknown = [classify(wave, 16_000).unsure for wave in [np.zeros(4800), *noise, *chirps]]
    assert (
        np.mean(unknown[:21]) >= 0.8 and np.mean(unknown[21:]) >= 0.8
    )  # what it was not trained on
