"""The synthesiser: every class is a healthy sound of its own."""

import numpy as np
import pytest
import torch

from data import fbank
from sounds import synth
from sounds.synth import CLASSES, SAMPLES, SOURCE, TARGET, render

FRESH = 1  # a seed of sounds that nothing was trained on


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_renders_one_healthy_second(name):
    for index in range(3):
        wave = render(name, index, FRESH)
        assert wave.shape == (SAMPLES,) and wave.dtype == np.float32 and np.isfinite(wave).all()
        assert 0.1 <= abs(wave).max() <= 0.9  # -20 to -1 dB
        assert wave.std() > 0.003


def test_a_sound_follows_from_class_index_and_seed():
    first = render("bell", 3, seed=5)
    np.random.default_rng().standard_normal()
    render("gong", 3, seed=5)
    assert np.array_equal(render("bell", 3, seed=5), first)
    for other in (render("bell", 4, seed=5), render("bell", 3, seed=6), render("gong", 3, seed=5)):
        assert not np.array_equal(other, first)


def test_no_two_classes_are_the_same():
    assert len(SOURCE) >= 40 and len(TARGET) >= 10 and not SOURCE.keys() & TARGET.keys()
    sounds = {name: make(np.random.default_rng(0)).tobytes() for name, make in CLASSES.items()}  # from one random state
    assert len(set(sounds.values())) == len(CLASSES)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("rise_fall_rise", "fall_rise_fall"),
        ("plucks_low_high_middle", "plucks_high_low_middle"),
        ("up_up_down", "down_down_up"),
    ],
)
def test_order_is_all_that_tells_some_classes_apart(one, other):
    """From one random state the average spectra are the same; the spectra frame by frame are not."""

    def power(name):  # (frames, 128)
        wave = CLASSES[name](np.random.default_rng(0))
        return fbank(torch.from_numpy(np.pad(wave, (0, SAMPLES - len(wave))).astype(np.float32))[None])[0].exp()

    one, other = power(one), power(other)
    assert torch.cosine_similarity(one.mean(0), other.mean(0), dim=0) > 0.98
    assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) < 0.7


def test_listening(tmp_path, monkeypatch):
    """The module is a command, too, and names its classes when asked for one that it does not have."""
    monkeypatch.chdir(tmp_path)
    assert synth.main(["bell"]) == 0
    assert len(list(tmp_path.glob("bell*.wav"))) == 5
    assert synth.main(["bel"]) == 2
