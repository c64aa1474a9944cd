"""Sounds that are there twice: which are found, and when that matters."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import build_features, make_clips, make_folder, train_on, write_csv

import data
from data import Dataset, Split
from support import copies

RATE = 44_100


def sounds() -> dict[str, np.ndarray]:
    """One second each: noise of one colour twice, a hum in noise twice, clicks, a short sound."""
    rng = np.random.default_rng(0)
    time = np.arange(RATE) / RATE
    hum = 0.3 * np.sin(2 * np.pi * 440 * time)
    clicks = np.zeros(RATE)
    clicks[rng.integers(0, RATE, 9)] = 0.5
    return {
        "noise": 0.1 * rng.standard_normal(RATE),
        "more noise": 0.1 * rng.standard_normal(RATE),
        "hum": hum + 0.01 * rng.standard_normal(RATE),
        "more hum": hum + 0.01 * rng.standard_normal(RATE),
        "clicks": clicks + 0.001 * rng.standard_normal(RATE),
        "short": 0.2 * rng.standard_normal(RATE // 4),
        "silence": np.zeros(RATE),
        "more silence": np.zeros(RATE),
    }


def features_of(folder: Path, paths: list[Path]) -> torch.Tensor:
    dataset = Dataset("my", folder, ["a"], paths, [0] * len(paths), {})
    return torch.from_numpy(build_features(dataset, 150, folder / "cache")[0])


COPIES = {
    "twice as loud.wav": {"subtype": "FLOAT"},
    "24 bits.flac": {"subtype": "PCM_24"},
    "48 kHz.wav": {},
    "good.mp3": {"compression_level": 0.0},
    "good.ogg": {"compression_level": 0.1},
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_in_another_format_is_found_and_nothing_else(tmp_path, name):
    """Sounds of the same kind are none, nor is silence. The features are padded to 1.5 s."""
    import soxr

    paths = []
    for number, wave in enumerate(sounds().values()):
        soundfile.write(tmp_path / f"{number}.wav", wave, RATE)
        paths.append(tmp_path / f"{number}.wav")
    count = len(paths)
    for number, wave in enumerate(sounds().values()):
        rate = RATE
        if name.startswith("twice"):
            wave = 2 * wave
        if name.startswith("48"):
            rate = 48_000
            wave = soxr.resample(wave, RATE, rate)
        soundfile.write(tmp_path / f"{number}, {name}", wave, rate, **COPIES[name])
        paths.append(tmp_path / f"{number}, {name}")
    levels = copies.levels_of(features_of(tmp_path, paths), list(range(2 * count)))
    pairs = copies.pairs_of(levels)
    assert sorted(map(sorted, pairs)) == [[i, count + i] for i in range(count - 2)]


def test_levels_are_in_decibels():
    """0.7 dB is what two clips may differ by, and 1 in the features is what data.STD says."""
    assert copies.NATS == 2 * data.STD
    rng = np.random.default_rng(1)
    power = np.exp(rng.normal(size=(3, 40, 128)))  # 10 x 16 cells
    features = torch.from_numpy((np.log(power) - data.MEAN) / (2 * data.STD)).float()
    levels = copies.levels_of(features, [0, 2])
    cells = power[[0, 2]].reshape(2, 10, 4, 16, 8).mean((2, 4)).reshape(2, 160)
    expected = 10 * np.log10(cells / cells.max(1, keepdims=True))
    torch.testing.assert_close(levels.double(), torch.from_numpy(expected), atol=1e-3, rtol=0)
    assert (levels > -50).all()
    quiet = features.clone()
    quiet[:, :16] -= 8 / (2 * data.STD) * np.log(10)  # four rows of cells fall by 80 dB
    (half_silent,) = copies.levels_of(quiet, [0])
    assert (half_silent > -50).sum() == 96 and half_silent.min() == -50
    for level in (levels[0], half_silent):  # cells without sound do not count
        for change, alike in ((0.69, True), (0.71, False)):
            other = level + change * (level > -50) * torch.tensor([1.0, -1.0]).repeat(80)
            assert bool(copies.pairs_of(torch.stack([level, other]))) == alike


def test_silent_clips_are_counted_and_are_no_copies(tmp_path, capsys):
    """Noise of one step of 16 bits is silent, also where the floor of the features hides most of
    it. Noise of 30 steps is not silent, and a copy of it is one.
    """
    assert pytest.approx(np.exp(np.log(2**-23) - data.MEAN)) == copies.LEAST
    rng = np.random.default_rng(0)
    names = [f"{number}.wav" for number in range(8)]
    for name in names[:6]:
        steps = rng.integers(-1, 2, RATE, dtype=np.int16)
        soundfile.write(tmp_path / name, steps, RATE, subtype="PCM_16")
    for name in names[6:]:
        wave = np.random.default_rng(1).integers(-30, 31, RATE, dtype=np.int16)
        soundfile.write(tmp_path / name, wave, RATE, subtype="PCM_16")
    features = features_of(tmp_path, [tmp_path / name for name in names])
    dataset = Dataset("my", tmp_path, ["a"], [tmp_path / name for name in names], [0] * 8, {})
    copies.warn_of_copies(dataset, features, {1: Split([0, 2, 4, 6], [], [1, 3, 7])})
    silent, copied = capsys.readouterr().err.splitlines()
    assert "5 of 7 clips are silent, nearly all zeros (0.wav, 1.wav, 2.wav, 3.wav, 4" in silent
    assert "1 pairs of clips" in copied and "(6.wav = 7.wav)" in copied
    assert copies.silent_clips(features) == dict.fromkeys(range(6), "silent")
    assert capsys.readouterr().out == "--skip-silent: going on without 6 of 8 clips\n"


def test_pairs_are_those_of_a_comparison_one_by_one():
    """However many clips there are, and in whatever order."""
    rng = torch.Generator().manual_seed(0)
    levels = torch.randn(150, 1, generator=rng) + 0.5 * torch.randn(150, 12, generator=rng)
    levels[75:] = levels[torch.randperm(75, generator=rng)] + 0.3 * torch.randn(
        75, 12, generator=rng
    )
    expected = []
    for a in range(150):
        for b in range(a + 1, 150):
            if (levels[a] - levels[b]).square().mean().sqrt() < 0.7:
                expected.append([a, b])
    assert 40 < len(expected) < 1000
    assert sorted(map(sorted, copies.pairs_of(levels))) == expected


def test_a_copy_matters_in_another_part_only(tmp_path, capsys):
    dataset = make_clips(tmp_path, "a.wav", "b.wav", "c.wav", "d.wav", "e.wav")
    features = torch.from_numpy(build_features(dataset, 30, tmp_path / "cache")[0]).clone()
    features[3] = features[1]
    features[4] = features[1]

    def said(*folds: Split) -> str:
        copies.warn_of_copies(dataset, features, dict(enumerate(folds, 1)))
        return capsys.readouterr().err

    assert said(Split([0, 1, 3, 4], [], [2])) == ""
    assert said(Split([0, 1], [], [2]), Split([0], [], [3])) == ""  # never both in one fold
    apart = said(Split([0, 1, 4], [2], [3]))
    assert apart.startswith(
        f"warning: {tmp_path}: 2 pairs of clips in different parts are the same"
    )
    assert "(b.wav = d.wav, d.wav = e.wav): the model is tested on" in apart
    assert "1 pairs" in said(Split([1], [3], [0]))  # that chooses the epoch
    assert said(Split([0, 1, 3, 4], [], [2]), Split([0, 1, 4], [2], [3])) == apart
    spans = {0: (0.0, 1.0), 1: (0.0, 1.0)}
    dataset = replace(dataset, spans=spans)
    assert "(b.wav#0-1 = d.wav)" in said(Split([1], [], [3]))


def test_a_run_warns_of_copies(tmp_path, capsys):
    """Of other formats too. Copies in one group stay together. Bad files are no copies."""
    root = make_folder(tmp_path / "my", count=4)
    wave, rate = soundfile.read(root / "bell" / "0.wav")
    soundfile.write(root / "drum" / "of a bell.flac", wave, rate)
    for name in ("x", "y"):
        (root / "flute" / f"{name}.wav").write_bytes(b"no sound")
    files = sorted(path.relative_to(root) for path in root.rglob("*.*"))
    rows = []
    for file in files:
        part = "test" if file.stem in ("3", "of a bell", "x") else "train"
        rows.append([file, file.parent.name, part])
    table = write_csv(root / "t.csv", "path,label,split", *rows)
    assert train_on("csv", table, tmp_path, "--skip-bad") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 1
    assert "1 pairs" in lines[0] and "(bell/0.wav = drum/of a bell.flac)" in lines[0]

    rows = [[*row[:2], "one" if row[0].stem in ("0", "of a bell") else row[0]] for row in rows]
    write_csv(table, "path,label,group", *rows)
    assert train_on("csv", table, tmp_path, "--skip-bad", "--out", tmp_path / "b") == 0
    assert "pairs of clips" not in capsys.readouterr().err
