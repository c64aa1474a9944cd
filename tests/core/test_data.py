"""Features against torchaudio and transformers, masking, recipes, splits and draws."""

import csv
import importlib
import json
import math
import ntpath
import os
from collections import Counter
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import REFERENCE, SMALL_AST, make_clips, make_folder, train_on, write_csv, write_sound

import train
from data import (
    DATASETS,
    FRONT_END,
    Dataset,
    Recipe,
    Split,
    fbank,
    few_shot,
    frames_for,
    load_dataset,
    random_split,
    spec_augment,
    to_input,
)
from sounds import clip
from sounds.clip import Clip, Listing, name_of, names_of
from support.command import UserError

STORED = np.load(REFERENCE / "fbank_torchaudio.npz")
WAVES = [name.removeprefix("wav_") for name in STORED if name.startswith("wav_")]


# ----------------------------------------------------------------------------------------- features


def test_the_front_end():
    assert FRONT_END == {
        "sample_rate": 16000,
        "window": 400,
        "hop": 160,
        "n_fft": 512,
        "n_mels": 128,
        "mean": -4.2677393,
        "std": 4.5689974,
    }


def exact_fbank(wave: np.ndarray) -> np.ndarray:
    """The definition, frame by frame in float64, with a plain DFT: (samples,) to (frames, 128)."""

    def mel(hz):
        return 1127 * np.log(1 + hz / 700)

    edges = np.linspace(mel(20), mel(8000), 130)
    bins = mel(np.arange(256) * 31.25)
    filters = np.array(
        [
            np.maximum(
                0, np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre))
            )
            for left, centre, right in zip(edges[:-2], edges[1:-1], edges[2:], strict=True)
        ]
    )
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
    dft = np.exp(-2j * np.pi * np.outer(np.arange(256), np.arange(400)) / 512)
    rows = []
    for start in range(0, len(wave) - 399, 160):
        frame = wave[start : start + 400].astype(np.float64)
        frame = frame - frame.mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        rows.append(np.log(np.maximum(filters @ np.abs(dft @ (frame * window)) ** 2, 2.0**-23)))
    return np.array(rows)


def torchaudio_fbanks():
    """(name, what torchaudio returned): the stored answers, and live ones where torchaudio can be
    imported.
    """
    answers = [(name, STORED[f"fbank_{name}"]) for name in WAVES]
    try:
        kaldi = importlib.import_module("torchaudio").compliance.kaldi
    except (ImportError, OSError, RuntimeError):  # it is built for one version of torch only
        return answers
    settings = {"sample_frequency": 16_000, "window_type": "hanning", "num_mel_bins": 128}
    for name in WAVES:
        answers.append(
            (name, kaldi.fbank(torch.from_numpy(STORED[f"wav_{name}"])[None], **settings).numpy())
        )
    return answers


def test_fbank_equals_torchaudio():
    """1e-3 within 80 dB of a frame's loudest filter, 1e-5 of that filter's amplitude everywhere.

    Further down there is only the rounding of a float32 FFT, which differs from processor to
    processor: torchaudio itself, on another machine than the one that stored these numbers, is
    0.034 away from them on the chirp.
    """
    for name, reference in torchaudio_fbanks():
        ours = fbank(torch.from_numpy(STORED[f"wav_{name}"])[None])[0].numpy()
        assert ours.shape == reference.shape
        loudest = reference.max(axis=1, keepdims=True)
        audible = reference > loudest - 80 / 10 * math.log(10)
        assert np.abs(ours - reference)[audible].max() <= 1e-3, name
        amplitude = np.abs(np.exp(ours / 2) - np.exp(reference / 2)) / np.exp(loudest / 2)
        assert amplitude.max() <= 1e-5, name
        if name == "noise_2s":
            assert np.abs(ours - reference).max() <= 3e-4


@pytest.mark.parametrize("name", WAVES)
def test_fbank_is_as_exact_as_torchaudio(name):
    """Against the definition in float64, neither is better than the other by more than rounding."""
    wave, reference = STORED[f"wav_{name}"], STORED[f"fbank_{name}"]
    exact = exact_fbank(wave)
    our_error = np.abs(fbank(torch.from_numpy(wave)[None])[0].numpy() - exact).max()
    assert our_error <= 3 * np.abs(reference - exact).max() + 1e-6
    assert our_error <= (0.05 if name == "chirp_1s" else 1e-3)


def test_fbank_is_the_same_in_a_batch():
    waves = torch.randn(3, 5000)
    torch.testing.assert_close(fbank(waves)[1], fbank(waves[1:2])[0])


def test_input_equals_stored_extractor():
    reference = np.load(REFERENCE / "ast_small.npz")["extracted_noise"]
    ours = to_input(fbank(torch.from_numpy(STORED["wav_noise_2s"])[None]), 256)[0].numpy()
    assert np.abs(ours - reference).max() <= 1e-4


@pytest.mark.parametrize("name", WAVES)
@pytest.mark.parametrize("n_frames", [60, 256])
def test_input_equals_live_extractor(name, n_frames):

    from transformers import ASTFeatureExtractor

    wave = STORED[f"wav_{name}"]
    extractor = ASTFeatureExtractor(max_length=n_frames)
    reference = extractor(wave, sampling_rate=16_000, return_tensors="pt").input_values[0]
    ours = to_input(fbank(torch.from_numpy(wave)[None]), n_frames)[0]
    assert ours.shape == reference.shape == (n_frames, 128)
    # The normalisation divides by 9.14, so 0.04 in a filter 80 dB below the loudest is 0.004 here.
    assert (ours - reference).abs().max() <= (5e-3 if name == "chirp_1s" else 1e-4)


def test_padding_comes_before_normalisation():
    padded = to_input(torch.zeros(1, 3, 128), 5)
    assert torch.equal(padded, torch.full((1, 5, 128), 4.2677393 / (2 * 4.5689974)))


# ------------------------------------------------------------------------------------------ masking


def test_masking_sets_one_band_and_one_stretch_to_zero():
    x = torch.ones(1, 500, 128)
    # band: width floor(0.5 * 24) = 12 at floor(0.5 * (128 - 12)) = 58; time: width 40 at floor(0.25
    # * (500 - 40)) = 115
    masked = spec_augment(x, torch.tensor([[0.5, 0.5, 0.5, 0.25]]))[0]
    expected = torch.ones(500, 128)
    expected[:, 58:70] = 0
    expected[115:155] = 0
    assert torch.equal(masked, expected)
    assert torch.equal(spec_augment(x, torch.zeros(1, 4)), x)


def test_masking_is_uniform_and_bounded_and_differs_between_clips():
    torch.manual_seed(0)
    masked = spec_augment(torch.ones(2000, 500, 128), torch.rand(2000, 4))
    band_widths = (masked[:, :, :].amax(1) == 0).sum(1)
    frame_widths = (masked.amax(2) == 0).sum(1)
    assert (band_widths.min(), band_widths.max(), frame_widths.min(), frame_widths.max()) == (
        0,
        23,
        0,
        79,
    )
    assert (
        abs(band_widths.float().mean() - 11.5) < 0.5
        and abs(frame_widths.float().mean() - 39.5) < 1.5
    )


def test_masking_short_clips_leaves_something():
    masked = spec_augment(torch.ones(50, 60, 128), torch.rand(50, 4))
    assert (masked.sum((1, 2)) > 0).all()


def test_masks_of_own_sounds_take_at_most_their_share():
    """80 of 500 frames, and none below 2 s; the paper's datasets have what the paper has, however
    short clips are.
    """
    for n_frames, widest in (
        (16, None),
        (98, None),
        (199, None),
        (200, 32),
        (498, 79),
        (499, 79),
        (500, 80),
        (1024, 80),
    ):
        for name in ("folder", "csv"):
            assert DATASETS[name].widest_mask(n_frames) == (widest or 0)
        masked = {
            name: recipe.widest_mask(n_frames)
            for name, recipe in DATASETS.items()
            if not recipe.own
        }
        assert masked == dict.fromkeys(masked, 0) | dict.fromkeys(("esc50", "esc10", "us8k"), 80)


# ------------------------------------------------------------------------------------------ recipes


RECIPES = {  # frames, batch, epochs, masking, weights, learning rates of its own
    "esc50": (500, 32, 50, True, "audioset", {}),
    "esc10": (500, 32, 50, True, "audioset", {}),
    "us8k": (400, 32, 30, True, "audioset", {}),
    "gsc": (100, 128, 75, False, "audioset", {}),
    "fsc": (400, 32, 75, False, "audioset", {}),
    "folder": (None, 32, 50, True, "audioset", {}),
    "csv": (None, 32, 50, True, "audioset", {}),
    "demo": (98, 16, 4, False, "demo", {}),
    "demo_source": (98, 32, 14, False, "random:demo", {"full_ft": 0.001}),
}


def test_the_recipe_of_every_dataset():
    found = {
        n: (r.n_frames, r.batch_size, r.epochs, r.mask, r.weights, r.lr)
        for n, r in DATASETS.items()
    }
    assert found == RECIPES


def test_every_number_of_a_row_comes_to_use(tmp_path, monkeypatch):
    """And the options go before it."""
    files = make_clips(tmp_path / "sounds", *(f"{i}.wav" for i in range(8)), name="mine").paths
    parts = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    listing = Listing(
        tmp_path / "sounds", [Clip(file, "ab"[i % 2], parts[i]) for i, file in enumerate(files)]
    )
    recipe = Recipe(
        lambda data_dir, cache_dir: listing,
        n_frames=31,
        batch_size=3,
        epochs=2,
        mask=True,
        weights=str(SMALL_AST),
        lr={"bitfit": 0.125},
    )
    monkeypatch.setitem(DATASETS, "mine", recipe)
    options = ["--dataset", "mine", "--cache-dir", str(tmp_path)]

    def config(method: str, *words: str) -> dict:
        assert (
            train.main([*options, "--method", method, "--out", str(tmp_path / "runs"), *words]) == 0
        )
        return json.loads(
            (tmp_path / "runs" / "mine" / method / "seed0" / "config.json").read_text()
        )

    found = config("bitfit")
    assert [found[name] for name in ("n_frames", "batch_size", "epochs", "mask_frames", "lr")] == [
        31,
        3,
        2,
        80,
        0.125,
    ]
    assert found["weights"] == str(SMALL_AST)
    rows = list(
        csv.DictReader((tmp_path / "runs/mine/bitfit/seed0/metrics.csv").read_text().splitlines())
    )
    assert [row["step"] for row in rows] == ["2", "4"]  # four clips in batches of three
    found = config(
        "linear",
        "--batch-size",
        "4",
        "--epochs",
        "1",
        "--no-mask",
        "--lr",
        "0.25",
        "--seconds",
        "0.2",
    )
    assert [found[name] for name in ("n_frames", "batch_size", "epochs", "mask_frames", "lr")] == [
        20,
        4,
        1,
        0,
        0.25,
    ]


def test_the_length_of_clips_is_that_of_all_that_ever_train(tmp_path):
    paths = [
        write_sound(tmp_path / f"{i}.wav", seconds=seconds)
        for i, seconds in enumerate((0.1, 0.2, 10, 20))
    ]
    dataset = Dataset("lengths", tmp_path, ["a", "b"], paths, [0, 1, 0, 1], {})
    folds = {1: Split([0], [], [3]), 2: Split([1], [2], [3])}

    def frames(dataset, **changes):
        return frames_for(DATASETS["folder"], replace(dataset, **changes), None)

    assert frames(dataset, folds=folds) == 20  # 0.195 s, rounded
    assert frames(dataset, folds={1: Split([2], [], [3])}) == 1000
    assert frames(dataset, folds={1: Split([3], [], [2])}) == 1024


def test_length_of_clips(tmp_path, capsys):
    # 0.1 to 2.1 s
    paths = [write_sound(tmp_path / f"{i}.wav", 0, seconds=0.1 * (i + 1)) for i in range(21)]
    (tmp_path / "bad.wav").write_bytes(b"")
    clips = Dataset("lengths", tmp_path, ["a", "b"], [*paths, tmp_path / "bad.wav"], [0] * 22, {})
    frames = partial(frames_for, DATASETS["folder"], seconds=None)
    assert frames(clips) == 200
    folds = {1: Split(train=[0, 1, 2, 21], val=[], test=[20])}
    assert frames(replace(clips, folds=folds)) == 29
    long = write_sound(tmp_path / "long.wav", 0, rate=8000, seconds=12)
    assert frames(replace(clips, paths=[long], labels=[0])) == 1024

    root = make_folder(tmp_path / "sounds", count=3, seconds=0.5)
    assert train_on("folder", root, tmp_path, "--seconds", "0.7") == 0
    assert "clips of 0.7 s" in capsys.readouterr().out
    config = json.loads((tmp_path / "runs/folder/linear/seed0/config.json").read_text())
    assert config["n_frames"] == 70
    assert train_on("folder", root, tmp_path, "--seconds", "0.1") == 2
    assert "--seconds is 0.1" in capsys.readouterr().err
    assert train_on("folder", root, tmp_path, "--seed", "0,-1") == 2
    assert "'0,-1' is no list of whole numbers" in capsys.readouterr().err


# --------------------------------------------------------------------------------- splits and draws


def labelled(counts: list[int]) -> Dataset:
    """Clips that are never opened: counts[i] of class i, one class after the other."""
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    paths = [Path(f"{i}.wav") for i in range(len(labels))]
    return Dataset(
        "labelled", Path("."), [f"class {i}" for i in range(len(counts))], paths, labels, {}
    )


SIZES = {  # clips of a class: to train, to validate, to test
    2: (1, 0, 1),
    3: (1, 1, 1),
    4: (2, 1, 1),
    5: (3, 1, 1),
    6: (4, 1, 1),
    7: (5, 1, 1),
    8: (4, 2, 2),
    9: (5, 2, 2),
    10: (6, 2, 2),
    11: (7, 2, 2),
    12: (8, 2, 2),
    13: (7, 3, 3),
    14: (8, 3, 3),
    15: (9, 3, 3),
}


def test_a_fifth_tests_and_a_fifth_validates():
    dataset = labelled(list(SIZES))
    for seed in range(3):
        split = random_split(dataset, seed)
        # each clip once
        assert sorted(split.train + split.val + split.test) == list(range(sum(SIZES)))
        counts = [Counter(dataset.labels[i] for i in part) for part in astuple(split)]
        for label, (size, expected) in enumerate(SIZES.items()):
            assert tuple(count[label] for count in counts) == expected, size


def test_the_random_split_is_a_permutation_of_each_class():
    """Class after class from one generator: the first fifth of a permutation tests, the next
    validates.
    """
    dataset = labelled([10, 5, 2])
    for seed in (0, 1, 17):
        rng = np.random.default_rng(seed)
        first, second, third = (
            rng.permutation(np.arange(*ends)).tolist() for ends in ((0, 10), (10, 15), (15, 17))
        )
        split = random_split(dataset, seed)
        assert split.test == sorted(first[:2] + second[:1] + third[:1])
        assert split.val == sorted(first[2:4] + second[1:2])
        assert split == random_split(dataset, seed)
    assert len({tuple(random_split(dataset, seed).test) for seed in range(5)}) == 5


def test_few_shot_draws_are_those_of_the_seed():
    """Class after class from one generator, from the training clips alone, in their order; all of
    them if need be.
    """
    dataset = labelled([6, 5, 9])
    training = [*range(1, 5), *range(6, 11), *range(12, 20)]
    for seed in (0, 3):
        rng = np.random.default_rng(seed)
        drawn = [
            rng.choice(part, 3, replace=False)
            for part in (range(1, 5), range(6, 11), range(12, 20))
        ]
        assert few_shot(dataset, training, 3, seed) == sorted(np.concatenate(drawn).tolist())
    assert few_shot(dataset, training, 4, 0)[:4] == [1, 2, 3, 4]
    with pytest.raises(UserError) as error:
        few_shot(dataset, training, 5, 0)
    assert str(error.value) == "--shots 5: class 'class 0' has only 4 training clips"


def folded(tmp_path: Path, folds: list[int]) -> dict[int, Split]:
    """The splits of a table whose clip i, of two classes in turn, is in folds[i]."""
    for i in range(len(folds)):
        write_sound(tmp_path / f"{i}.wav", seconds=0.0125)
    rows = [f"{i}.wav,{'ab'[i % 2]},{fold}" for i, fold in enumerate(folds)]
    return load_dataset(
        "csv", write_csv(tmp_path / "t.csv", "path,label,fold", *rows), tmp_path
    ).folds


def test_folds_of_a_table_take_turns(tmp_path):
    """Numbers with gaps: the fold before validates, before the first the last one."""
    folds = folded(tmp_path, [7, 7, 2, 2, 40, 40, 11, 11])
    assert folds == {
        2: Split(train=[0, 1, 6, 7], val=[4, 5], test=[2, 3]),
        7: Split(train=[4, 5, 6, 7], val=[2, 3], test=[0, 1]),
        11: Split(train=[2, 3, 4, 5], val=[0, 1], test=[6, 7]),
        40: Split(train=[0, 1, 2, 3], val=[6, 7], test=[4, 5]),
    }
    assert list(folds) == [2, 7, 11, 40]


def test_of_two_folds_none_validates(tmp_path):
    assert folded(tmp_path, [1, 1, 2, 2]) == {
        1: Split(train=[2, 3], val=[], test=[0, 1]),
        2: Split(train=[0, 1], val=[], test=[2, 3]),
    }


@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("a/b/c.wav", "a"),
        ("a/b/../c.wav", "a"),
        ("a/c.wav", "a/b"),
        ("ab/c.wav", "a"),
        ("a/x..y.wav", "a"),
        ("../d/e.wav", "../d"),
        ("/r/a.wav", "/r"),
        ("/a.wav", "/"),
        ("b/a.wav", "."),
    ],
)
def test_the_name_of_a_clip_is_its_path_from_the_root(path, root):
    assert names_of([Path(path)], Path(root), {}) == [os.path.relpath(path, root)]


def test_a_clip_has_one_name_however_its_path_is_written():
    root = Path("/data/set")
    for path, name in (
        ("/data/set/dog/a.wav", "dog/a.wav"),
        ("/data/set/cat/../dog/a.wav", "dog/a.wav"),
        ("/data/set2/a.wav", "../set2/a.wav"),
        ("/data/a.wav", "../a.wav"),
    ):
        assert name_of(Path(path), root) == name


def test_a_clip_on_another_drive_has_its_whole_path_as_name(monkeypatch):
    """On Windows there is no way from one to another."""
    monkeypatch.setattr(clip, "os", SimpleNamespace(path=ntpath, fsencode=os.fsencode))
    assert (
        name_of(PureWindowsPath("D:/my sounds/a.wav"), PureWindowsPath("C:/data"))
        == "D:/my sounds/a.wav"
    )
