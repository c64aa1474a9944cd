"""The synthesiser: every class is a healthy sound of its own, and sounds the way it always has."""

import numpy as np
import pytest
import torch

from data import fbank
from sounds import demo, synth
from sounds.synth import CLASSES, SAMPLES, SOURCE, TARGET, render

FRESH = 1  # a seed of sounds that nothing was trained on
# Two numbers of clip 0 of every class. The first is the mean absolute value. The second is the mean
# absolute step from sample to sample in the first half.
RENDERED = {
    "demo-fe5a0b5f": {
        "rise_fall_rise": (0.030464, 0.026821), "fall_rise_fall": (0.19331, 0.12954),
        "up_up_down": (0.051445, 0.041744), "down_down_up": (0.058991, 0.050686),
        "plucks_low_high_middle": (0.022835, 0.017972),
        "plucks_high_low_middle": (0.040524, 0.039451), "tone_noise_tone": (0.11674, 0.078855),
        "noise_tone_noise": (0.029168, 0.019405), "eoe": (0.043244, 0.019134),
        "oeo": (0.10185, 0.056808),
    },
    "demo_source-146f2f13": {
        "rise": (0.092392, 0.041021), "fall": (0.10790, 0.065737), "hill": (0.071994, 0.068491),
        "valley": (0.035418, 0.020107), "late_jump": (0.094479, 0.063101),
        "early_drop": (0.068880, 0.070893), "chirps_up": (0.10056, 0.095068),
        "chirps_down": (0.026324, 0.019485), "slow_vibrato": (0.10302, 0.055179),
        "fast_vibrato": (0.10314, 0.060468), "slow_tremolo": (0.053859, 0.040715),
        "fast_tremolo": (0.17269, 0.081009), "two_tone_siren": (0.060822, 0.011617),
        "wailing_siren": (0.15667, 0.088380), "whistle": (0.14313, 0.040288),
        "organ": (0.049232, 0.018325), "clarinet": (0.033854, 0.022356),
        "fifth": (0.090350, 0.069754), "minor_second": (0.020662, 0.020058),
        "triad": (0.052929, 0.040975), "vowel_i": (0.098180, 0.069722),
        "vowel_a": (0.039527, 0.030813), "vowel_u": (0.039847, 0.025853),
        "vowel_er": (0.10569, 0.069526), "ai": (0.093006, 0.040124), "ia": (0.088748, 0.041866),
        "iu": (0.11193, 0.058793), "ui": (0.073241, 0.021616), "bell": (0.037518, 0.040274),
        "gong": (0.016694, 0.0065903), "wood_block": (0.0067676, 0.0052366),
        "pluck": (0.066354, 0.057546), "plucks_up": (0.032806, 0.023723),
        "plucks_down": (0.063153, 0.063951), "slow_clicks": (0.019187, 0.020110),
        "fast_clicks": (0.012556, 0.013051), "clicks_faster": (0.019876, 0.020510),
        "clicks_slower": (0.041957, 0.062365), "gallop": (0.051588, 0.052162),
        "crackle": (0.0092722, 0.0096718), "rain": (0.024016, 0.017478),
        "drips": (0.0089165, 0.0056955), "low_noise": (0.10708, 0.083622),
        "high_noise": (0.080429, 0.12556), "noise_up": (0.10527, 0.051533),
        "noise_down": (0.046035, 0.063551), "noise_pulses": (0.0080921, 0.012636),
        "noise_grows": (0.030219, 0.023787), "noise_fades": (0.070828, 0.065456),
        "engine_runs": (0.075108, 0.026661), "engine_starts": (0.025298, 0.015853),
        "engine_stops": (0.034263, 0.013750), "cricket": (0.028034, 0.038841),
        "frog": (0.071455, 0.036104), "cuckoo": (0.025152, 0.020655),
        "doorbell": (0.042780, 0.036900), "yodel": (0.038581, 0.018871),
        "dip": (0.029583, 0.0089198), "arpeggio_up": (0.028650, 0.020166),
        "arpeggio_down": (0.055462, 0.054149), "dark_bright": (0.013718, 0.015550),
        "bright_dark": (0.067821, 0.059698), "tone_noise": (0.010908, 0.013473),
        "noise_tone": (0.017270, 0.010906), "click_tone": (0.043471, 0.031908),
        "tone_click": (0.014138, 0.0097759), "dash_dot_dot": (0.043159, 0.042513),
        "dot_dot_dash": (0.033793, 0.033190),
    },
}  # fmt: skip


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


@pytest.mark.parametrize(("name", "classes"), [("demo", TARGET), ("demo_source", SOURCE)])
def test_a_changed_recipe_takes_a_folder_of_another_name(name, classes):
    """A folder that exists is used again. Change these numbers together with FOLDERS only."""
    expected = RENDERED[demo.FOLDERS[name]]
    assert classes.keys() == expected.keys()
    for kind, numbers in expected.items():
        wave = render(kind, 0, demo.SEED).astype(np.float64)
        found = abs(wave).mean(), abs(np.diff(wave[: SAMPLES // 2])).mean()
        assert found == pytest.approx(numbers, rel=1e-3), kind


def test_no_two_classes_are_the_same():
    assert len(SOURCE) == 68 and len(TARGET) == 10 and not SOURCE.keys() & TARGET.keys()
    same_state = [synth.sound(name, np.random.default_rng(0)).tobytes() for name in CLASSES]
    assert len(set(same_state)) == len(CLASSES)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("rise_fall_rise", "fall_rise_fall"),
        ("plucks_low_high_middle", "plucks_high_low_middle"),
        ("up_up_down", "down_down_up"),
    ],
)
def test_order_is_all_that_tells_some_classes_apart(one, other):
    """From one random state the average spectra are equal. The spectra of the frames are not."""

    def power(name):  # (frames, 128)
        wave = synth.sound(name, np.random.default_rng(0))
        second = np.pad(wave, (0, SAMPLES - len(wave))).astype(np.float32)
        return fbank(torch.from_numpy(second)[None])[0].exp()

    one, other = power(one), power(other)
    assert torch.cosine_similarity(one.mean(0), other.mean(0), dim=0) > 0.98
    assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) < 0.7
