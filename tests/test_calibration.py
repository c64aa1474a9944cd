"""support/calibration.py beside other ways to the same numbers, and far from the known."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from helpers import make_folder, train_on
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from sklearn.decomposition import PCA

import petl
from ast_model import AST, ASTConfig
from support import headers
from support.calibration import (
    Calibration,
    calibrated,
    error,
    fit,
    middle_and_vector,
    middle_of,
    parts_of,
    scores_of_parts,
    temperature_of,
    width_of_middle,
)
from support.checkpoints import read_header
from support.headers import checked
from support.records import read_run
from tools import export
from tools.predict import load


def clips(
    count: int, classes: int = 4, far: float = 3.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (count, classes), of each class around a point of its own, labels, and middles.

    One label in ten is that of another class. The middles (count, 64) vary less and less from the
    first number to the last.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    logits = (
        far * np.eye(classes)[labels]
        + rng.standard_normal((count, classes)) * [2, 1, 0.5, 1][:classes]
    )
    wrong = rng.random(count) < 0.1
    labels = np.where(wrong, (labels + 1) % classes, labels)
    hidden = rng.standard_normal((count, 64)) * np.geomspace(8, 0.5, 64)
    mixing = np.linalg.qr(np.random.default_rng(0).standard_normal((64, 64)))[0]
    middle = torch.from_numpy(hidden @ mixing).float()
    return torch.from_numpy(logits).float(), torch.from_numpy(labels), middle


def test_a_group_is_measured_by_the_others():
    """Two speakers, whose middles lie apart: to either of them the other one is strange."""
    logits, _, middle = clips(80)
    speakers = ["a", "b"] * 40
    part = parts_of(speakers, 80)
    assert part.tolist() == [0, 1] * 40
    middle[1::2] += 20 * torch.sign(middle[0])
    apart = scores_of_parts(logits.double(), middle.double(), speakers)
    mixed = scores_of_parts(logits.double(), middle.double())
    assert (apart > 2 * mixed.abs().max()).all()
    for groups in ([], ["a"] * 80, ["a"] * 70 + ["b"] * 10):  # too little beside the one
        assert parts_of(groups, 80).tolist() == list(range(5)) * 16
    assert parts_of([f"{i // 10}" for i in range(80)], 80).tolist() == [
        i // 10 % 5 for i in range(80)
    ]


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
def test_the_temperature_is_that_of_the_least_cross_entropy(scale):
    logits, labels, _ = clips(200)
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


def test_the_score_is_that_of_vim():
    """On standardised middles: scikit-learn's principal directions, and ViM's formula by numpy."""
    logits, labels, middle = clips(400)
    found = fit(logits, labels, middle)
    x = middle.double().numpy()
    z = (x - x.mean(0)) / x.std(0)
    pca = PCA(16).fit(z)
    rest = np.linalg.norm(z - pca.inverse_transform(pca.transform(z)), axis=1)
    alpha = logits.double().numpy().max(1).sum() / rest.sum()
    assert found["alpha"] == pytest.approx(alpha, rel=1e-6)

    _, _, new = clips(50, seed=1)
    far = torch.linspace(1, 9, 50)[:, None] * new
    z = (far.double().numpy() - x.mean(0)) / x.std(0)
    rest = np.linalg.norm(z - pca.inverse_transform(pca.transform(z)), axis=1)
    scores = alpha * rest - logsumexp(logits[:50].double().numpy(), axis=1)
    expected = np.minimum(1, np.exp((found["limit"] - scores) / found["slope"]))
    assert (expected == 1).any() and (expected < 0.1).any()
    known = Calibration(**found).known(logits[:50], far)
    np.testing.assert_allclose(known, expected, rtol=0.05)  # directions in thousandths


def test_limit_and_slope_are_those_of_clips_that_were_not_used():
    """Five parts of the clips, each measured by the other four: by hand, clip by clip."""
    logits, labels, middle = clips(60)
    found = fit(logits, labels, middle)
    scores = []
    for i in range(60):
        others = [j for j in range(60) if j % 5 != i % 5]
        x = middle[others].double().numpy()
        mean, std = x.mean(0), x.std(0)
        z = (x - mean) / std
        pca = PCA(12).fit(z)  # a fifth of the clips
        rest = np.linalg.norm(z - pca.inverse_transform(pca.transform(z)), axis=1)
        alpha = logits[others].double().numpy().max(1).sum() / rest.sum()
        mine = (middle[i].double().numpy()[None] - mean) / std
        outside = np.linalg.norm(mine - pca.inverse_transform(pca.transform(mine)))
        scores.append(alpha * outside - logsumexp(logits[i].double().numpy()))
    assert found["limit"] == pytest.approx(np.quantile(scores, 0.9), rel=1e-6)
    assert found["slope"] == pytest.approx(2 * (found["limit"] - np.median(scores)), rel=1e-6)


@pytest.mark.parametrize("count", [40, 400])
def test_nine_of_ten_right_answers_stay_and_what_is_far_goes(count):
    """On clips that the fit has not seen. Few validation clips do not throw more away."""
    kept, gone = [], []
    for seed in range(10):
        found = Calibration(**fit(*clips(count, seed=seed)))
        logits, labels, middle = clips(1000, seed=100 + seed)
        probability = (logits / found.temperature).softmax(1).amax(1)
        right = logits.argmax(1) == labels
        sure = probability * found.known(logits, middle) >= found.min_confidence
        kept.append(sure[right].double().mean())
        sure = probability * found.known(logits, 3 * middle) >= found.min_confidence
        gone.append(1 - sure.double().mean())
    assert np.mean(kept) == pytest.approx(0.9, abs=0.04) and np.mean(gone) > 0.95


def test_a_familiar_sound_keeps_its_probability():
    """The factor is 1 for nine of ten clips, so it does not reorder them."""
    found = Calibration(**fit(*clips(400)))
    logits, _, middle = clips(1000, seed=1)
    assert (found.known(logits, middle) == 1).double().mean() == pytest.approx(0.9, abs=0.05)


def test_the_middle_is_that_of_half_the_blocks():
    """Whatever a method wraps around blocks. It takes no part of the vector away."""
    spectrogram = torch.randn(3, 60, 128, generator=torch.Generator().manual_seed(0))
    for depth, half in ((1, 0), (2, 0), (4, 1), (5, 2)):
        model = petl.apply(AST(ASTConfig(60, dim=32, depth=depth, heads=2, n_classes=3)), "dpt")
        model.eval()
        with torch.no_grad():
            middle, vector = middle_and_vector(model, spectrogram)
            tokens = model.embed(spectrogram)
            for block in model.blocks[: half + 1]:
                tokens = block(tokens)
            expected = torch.cat([tokens.mean(1), tokens.std(1)], dim=1)
            torch.testing.assert_close(middle, expected, rtol=0, atol=0)
            torch.testing.assert_close(middle_of(model, spectrogram), expected, rtol=0, atol=0)
            torch.testing.assert_close(vector, model.vector(spectrogram), rtol=0, atol=0)
        assert middle.shape[1] == width_of_middle(model)
        assert not any(block._forward_hooks for block in model.blocks)
    model = AST(ASTConfig(60, dim=32, depth=0, heads=2, n_classes=3))  # as a method may leave it
    middle, vector = middle_and_vector(model, spectrogram)
    assert torch.equal(middle, vector) and middle.shape[1] == width_of_middle(model) == 32
    assert torch.equal(middle, middle_of(model, spectrogram))


def test_too_few_clips_and_odd_ones():
    logits, labels, middle = clips(400)
    right = (logits.argmax(1) == labels).nonzero()[:, 0]
    found = [fit(logits[right[:n]], labels[right[:n]], middle[right[:n]]) for n in (0, 9, 10)]
    assert [one is None for one in found] == [True, True, False]
    outcome = {"result": {"accuracy": 50.0}}
    few = (logits[:9], labels[:9], middle[:9])
    assert calibrated(outcome, few, (logits, labels, middle)) == outcome
    assert Calibration().known(logits, middle).tolist() == [1.0] * 400
    odd, odd_middle = logits.clone(), middle.clone()
    odd[0], odd[1] = torch.nan, torch.inf  # of float16
    odd_middle[0], odd_middle[1] = torch.inf, torch.nan
    for some, other in (
        (odd, odd_middle),
        (torch.ones(400, 4), torch.ones(400, 64)),
        (torch.eye(4)[labels] * 1e4, middle),
    ):
        found = Calibration(**fit(some, labels, other))
        assert found.known(some, other).isfinite().all() and 0 <= found.min_confidence <= 1
        checked({**asdict(found)}, headers.Calibration, "a file")


def test_a_run_fits_its_validation_clips(tmp_path, capsys):
    """What is found is in the header, and its errors are in the summary.

    `show` prints it, and other sounds are unsure.
    """
    folder = make_folder(tmp_path / "sounds", count=25)
    assert train_on("folder", folder, tmp_path, "--epochs", 10, "--lr", 1e-2) == 0
    file = tmp_path / "runs/folder/linear/seed0/fold1.safetensors"
    header, out = read_header(file), capsys.readouterr().out
    calibration, result = header["calibration"], header["result"]
    assert len(calibration["mean"]) == len(calibration["directions"][0]) == 2 * 64
    before = f"{result['calibration_error']:.1f} % off (expected calibration error)"
    line = f"{before}, {result['calibrated_error']:.1f} %"
    assert line in out
    assert f"unsure          {result['unsure']:.0f} % of the test clips; " in out
    classify = load(file.parent)
    tested = read_run(file.parent).tested()
    answers = [classify(folder / row["path"]) for row in tested]
    sure = [(a, row) for a, row in zip(answers, tested, strict=True) if not a.unsure]
    assert result["unsure"] == pytest.approx(100 - 100 * len(sure) / len(tested), abs=1e-3)
    right = 100 * np.mean([answer.best == row["label"] for answer, row in sure])
    assert result["sure_accuracy"] == pytest.approx(right, abs=1e-3)
    export.main(["show", str(file)])
    least = calibration["min_confidence"]
    assert (
        f"temperature {calibration['temperature']:.3g}, unsure below {least:.3g}"
        in capsys.readouterr().out
    )
    rng = np.random.default_rng(0)
    noise = [10 ** -rng.uniform(0, 4) * rng.uniform(-1, 1, 4800) for _ in range(20)]
    chirps = [0.3 * np.sin(np.linspace(0, rng.uniform(50, 90), 4800) ** 2) for _ in range(20)]
    unknown = [classify(wave, 16_000).unsure for wave in [np.zeros(4800), *noise, *chirps]]
    assert (
        np.mean(unknown[:21]) >= 0.8 and np.mean(unknown[21:]) >= 0.8
    )  # what it was not trained on
