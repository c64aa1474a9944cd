"""Audio as it really comes: every format gives the right features or a place in the list of bad files; the cache."""

import csv
import json
import math
import multiprocessing
import os
import shutil
import signal
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import SMALL_AST

import data
import train
from data import Dataset, build_features, fbank
from sounds.audio import read_audio
from sounds.cache import _read_index
from support.command import UserError

SECONDS = 1.5


def sound(rate: int, seconds: float = SECONDS) -> np.ndarray:
    """A harmonic tone that rises and falls, below 3.5 kHz, the same at every rate: (samples,)."""
    time = np.arange(round(rate * seconds)) / rate
    phase = 2 * np.pi * (220 * time + 30 * np.sin(2 * np.pi * time))
    return sum(0.3 / k * np.sin(k * phase) for k in range(1, 9)) * (0.6 + 0.4 * np.cos(5 * time))


def write(path: Path, rate: int = 44_100, channels: int = 1, seconds: float = SECONDS, **options) -> Path:
    soundfile.write(path, np.stack([sound(rate, seconds)] * channels, axis=1), rate, **options)
    return path


def distance(path: Path, original: Path) -> float:
    """Mean difference of the log-Mel values that are within 40 dB of the loudest one of their frame, in dB."""
    ours, reference = (fbank(torch.from_numpy(read_audio(file))[None])[0].numpy() for file in (path, original))
    assert abs(len(ours) - len(reference)) <= 10  # ADPCM fills its last block of 93 ms
    frames = min(len(ours), len(reference))
    ours, reference = ours[:frames], reference[:frames]
    audible = reference > reference.max(axis=1, keepdims=True) - 40 / 10 * math.log(10)
    return float(np.abs(ours - reference)[audible].mean()) * 10 / math.log(10)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("original") / "original.wav", subtype="PCM_16")


# ------------------------------------------------------------------------------------------------- what can be read


@pytest.mark.parametrize(
    ("name", "subtype", "tolerance"),  # in dB
    [
        ("a.wav", "PCM_U8", 0.5),
        ("a.wav", "PCM_24", 0.01),
        ("a.wav", "PCM_32", 0.01),
        ("a.wav", "FLOAT", 0.01),
        ("a.wav", "DOUBLE", 0.01),
        ("a.wav", "ULAW", 0.3),
        ("a.wav", "ALAW", 0.3),
        ("a.wav", "IMA_ADPCM", 0.3),
        ("a.wav", "MS_ADPCM", 0.3),
        ("a.flac", "PCM_16", 0.01),
        ("a.flac", "PCM_24", 0.01),
        ("a.ogg", "VORBIS", 2.0),
        ("a.mp3", "MPEG_LAYER_III", 1.0),
        ("a.aiff", "PCM_16", 0.01),
    ],
)
def test_formats_have_the_features_of_the_original(tmp_path, original, name, subtype, tolerance):
    assert distance(write(tmp_path / name, subtype=subtype), original) <= tolerance


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 32_000, 48_000, 96_000, 192_000])
def test_rates_have_the_features_of_the_original(tmp_path, original, rate):
    assert distance(write(tmp_path / "a.wav", rate), original) <= 0.01  # dB


@pytest.mark.parametrize(("name", "channels"), [("a.wav", 2), ("a.flac", 6), ("a.wav", 12)])
def test_channels_are_averaged(tmp_path, original, name, channels):
    assert distance(write(tmp_path / name, channels=channels), original) <= 0.01
    waves = np.stack([sound(16_000), np.zeros(len(sound(16_000)))], axis=1)  # one silent channel: half the amplitude
    soundfile.write(tmp_path / "half.wav", waves, 16_000, subtype="FLOAT")
    assert np.abs(read_audio(tmp_path / "half.wav") - sound(16_000) / 2).max() < 1e-6


@pytest.mark.parametrize("name", ["with space.wav", "Vögel & 鳥.wav", "quote'\".wav", os.fsdecode(b"latin-\xe9.wav")])
def test_odd_names(tmp_path, original, name):
    folder = tmp_path / Path(name).stem
    folder.mkdir()
    shutil.copy(original, folder / name)
    dataset = Dataset("odd", tmp_path, ["a", "b"], [folder / name], [0], {})
    features, bad = build_features(dataset, 100, tmp_path / "cache")
    assert not bad and features.std() > 0.1


def test_wav_written_into_a_pipe(tmp_path, original):
    """Such a header claims the greatest length it can: no truncated file."""
    content = bytearray(original.read_bytes())
    size = content.index(b"data") + 4
    content[4:8] = content[size : size + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "pipe.wav").write_bytes(content)
    assert distance(tmp_path / "pipe.wav", original) == 0


def test_only_what_is_needed_is_read(tmp_path):
    """A long recording costs no more than a clip, and what is missing behind the clip does no harm."""
    path = write(tmp_path / "long.wav", rate=16_000, seconds=60)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    assert np.abs(read_audio(path, seconds=2) - sound(16_000, 60)[:32_000]).max() < 1e-4
    with pytest.raises(ValueError, match=r"truncated: it ends after 30\.0"):
        read_audio(path)


# ---------------------------------------------------------------------------------------------- what cannot be read


def make_bad_files(folder: Path) -> dict[str, str]:
    """Sound files that cannot be used, made in `folder`: name to a word of the reason expected."""
    folder.mkdir(parents=True, exist_ok=True)
    reasons = {}
    for name, subtype in [("cut.wav", "PCM_16"), ("cut_adpcm.wav", "MS_ADPCM"), ("cut_float.wav", "FLOAT"),
                          ("cut.aiff", "PCM_16"), ("cut.ogg", "VORBIS"), ("cut.mp3", "MPEG_LAYER_III")]:  # fmt: skip
        path = write(folder / name, subtype=subtype, seconds=5)
        os.truncate(path, path.stat().st_size // 2)
        reasons[name] = "truncated"
    flac = write(folder / "cut.flac", seconds=5)
    os.truncate(flac, flac.stat().st_size // 2)
    reasons["cut.flac"] = "lost sync"
    header = write(folder / "header.wav")
    os.truncate(header, 44)
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is no sound")
    (folder / "noise.mp3").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "data.raw").write_bytes(bytes(1000))
    soundfile.write(folder / "silent.wav", np.zeros(0), 16_000)
    for name, value in (("nan.wav", np.nan), ("infinite.wav", np.inf)):
        soundfile.write(folder / name, np.array([[0.1, value], [0.1, -value]]), 16_000, subtype="FLOAT")
    pipe = bytearray(write(folder / "pipe.flac").read_bytes())
    pipe[21:26] = bytes([pipe[21] & 0xF0, 0, 0, 0, 0])  # the number of samples: unknown
    (folder / "pipe.flac").write_bytes(pipe)
    return reasons | {
        "header.wav": "no samples", "empty.wav": "empty", "text.wav": "no known", "noise.mp3": "no known",
        "data.raw": "samplerate", "silent.wav": "no samples", "nan.wav": "not finite", "infinite.wav": "not finite",
        "pipe.flac": "how long", "absent.wav": "No such file",
    }  # fmt: skip


def test_each_bad_file_has_its_reason(tmp_path):
    for name, reason in make_bad_files(tmp_path).items():
        with pytest.raises(ValueError, match=reason) as error:
            read_audio(tmp_path / name)
        assert "\n" not in str(error.value) and len(str(error.value)) > 8, name


def test_run_lists_bad_files_and_goes_on_without_them(tmp_path, capfd):
    for name in ("high", "low"):
        (tmp_path / "sounds" / name).mkdir(parents=True)
        for i in range(5):
            write(tmp_path / "sounds" / name / f"{i}.wav", seconds=0.3)
    bad = make_bad_files(tmp_path / "sounds" / "low" / "bad")
    (tmp_path / "sounds" / "low" / "bad" / "notes.txt").write_text("recorded on Monday")
    del bad["data.raw"], bad["absent.wav"]

    def run(*options):
        places = ["--data-dir", tmp_path / "sounds", "--cache-dir", tmp_path / "cache", "--out", tmp_path / "runs"]
        model = ["--weights", SMALL_AST, "--method", "linear", "--epochs", 1]
        return train.main([str(word) for word in ("--dataset", "folder", *places, *model, "--seconds", 5, *options)])

    assert run() == 2
    error = capfd.readouterr().err
    assert f"error: {len(bad)} of {10 + len(bad)} sound files cannot be used" in error and "--skip-bad" in error
    for name, reason in bad.items():
        assert any(line.split(": ", 1)[0].endswith(name) and reason in line for line in error.splitlines()), name
    assert "ignored (low/bad/data.raw, low/bad/notes.txt)" in error
    assert not (tmp_path / "runs").exists()

    assert run("--skip-bad") == 0
    assert f"going on without {len(bad)} of {10 + len(bad)} clips" in capfd.readouterr().err
    folder = tmp_path / "runs" / "folder" / "linear" / "seed0"
    skipped = json.loads((folder / "config.json").read_text())["skipped_clips"]
    assert skipped.keys() == {f"low/bad/{name}" for name in bad}
    assert "truncated" in skipped["low/bad/cut.wav"]
    rows = list(csv.DictReader((folder / "split.csv").read_text().splitlines()))
    assert {row["path"] for row in rows if row["split"] == "skipped"} == skipped.keys()
    assert len(rows) == 10 + len(bad)


# --------------------------------------------------------------------------------------------------------- the cache


def make_clips(folder: Path, count: int) -> Dataset:
    """`count` different clips of 0.3 s."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    paths = [folder / f"{i:04d}.wav" for i in range(count)]
    for path in paths:
        soundfile.write(path, 0.1 * rng.standard_normal(4800), 16_000)
    return Dataset("clips", folder, ["a", "b"], paths, [0] * count, {})


def build_slowly(dataset: Dataset, cache: Path) -> None:
    data.read_audio = lambda *args, **options: (time.sleep(0.02), read_audio(*args, **options))[1]
    build_features(dataset, 30, cache)


def test_a_killed_build_goes_on_where_it_was(tmp_path, capsys):
    dataset, cache = make_clips(tmp_path / "clips", 400), tmp_path / "cache"
    process = multiprocessing.get_context("spawn").Process(target=build_slowly, args=(dataset, cache))
    process.start()
    built = 0
    while built < 130:  # more than one block of clips
        time.sleep(0.02)
        assert process.is_alive()
        for partial in (cache / "features").glob("*.partial.npy"):
            index = _read_index(partial, (30, 128))
            built = 0 if index is None else np.count_nonzero(index["key"])
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not [path for path in (cache / "features").glob("*.npy") if "partial" not in path.name]
    features, _ = build_features(dataset, 30, cache)
    output = capsys.readouterr().out
    missing = int(output.split(" of 400 clips are new, changed or unfinished")[0].split()[-1])
    assert 0 < missing <= 400 - built
    assert f"built {missing} of 400 clips" in output and "clips/s" in output
    fresh, _ = build_features(dataset, 30, tmp_path / "other")
    assert np.array_equal(features, fresh)
    assert not list((cache / "features").glob("*.partial.npy"))


def test_only_what_changed_is_built(tmp_path, capsys, monkeypatch):
    dataset, cache = make_clips(tmp_path / "clips", 70), tmp_path / "cache"
    before = np.array(build_features(dataset, 30, cache)[0])
    new = write(dataset.root / "new.wav")
    dataset.paths.insert(0, new)  # every other clip moves by one
    dataset.labels.insert(0, 0)
    capsys.readouterr()
    after, _ = build_features(dataset, 30, cache)
    assert "built 1 of 71 clips" in capsys.readouterr().out
    assert np.array_equal(after[1:], before) and after[0].std() > 0.1
    monkeypatch.setattr(data, "MEAN", 0.0)  # another front end: none of them can stay
    shifted, _ = build_features(dataset, 30, cache)
    assert "71 of 71 clips are new, changed" in capsys.readouterr().out
    assert shifted.astype(np.float32).mean() < after.astype(np.float32).mean() - 0.4


def test_damage_anywhere_in_the_cache_is_mended(tmp_path, capsys):
    dataset, cache = make_clips(tmp_path / "clips", 3), tmp_path / "cache"
    whole = np.array(build_features(dataset, 30, cache)[0])
    (file,) = (cache / "features").glob("*.npy")
    content = file.read_bytes()
    size = (len(content) - 128) // 3  # of a row, behind the header of 128 bytes
    damages = [(0, b"\0"), (9, b"\xff"), (12, b"("), (60, b"'"), (128, b"\1"), (136, b"\1"), (140, b"\1")]
    damages += [(128 + size + 100, b"\0\1\2\3"), (len(content) - 1, b"\1")]
    for position, wrong in damages:
        file.write_bytes(content[:position] + wrong + content[position + len(wrong) :])
        capsys.readouterr()
        assert np.array_equal(build_features(dataset, 30, cache)[0], whole), position
        output = capsys.readouterr()
        assert "built 1 of 3" in output.out or ("not a whole" in output.err and "built 3 of 3" in output.out), position
    for length in (0, 100, 1000, len(content) - 1):
        file.write_bytes(content[:length])
        assert np.array_equal(build_features(dataset, 30, cache)[0], whole), length
        assert "not a whole feature file" in capsys.readouterr().err


def test_a_file_that_can_be_read_again_is_no_longer_bad(tmp_path, monkeypatch):
    dataset, cache = make_clips(tmp_path / "clips", 3), tmp_path / "cache"

    def fails(*args, **options):
        raise ValueError("the disk is away")

    with monkeypatch.context() as patch:
        patch.setattr(data, "read_audio", fails)
        with pytest.raises(UserError, match="3 of 3 sound files"):
            build_features(dataset, 30, cache)
    features, bad = build_features(dataset, 30, cache)
    assert not bad and (features.reshape(3, -1).std(axis=1) > 0.1).all()


def test_clips_of_one_name_keep_their_own_features(tmp_path):
    """In GSC a speaker's files have one name in every word's folder, one size, and one date from the archive."""
    sounds = make_clips(tmp_path / "source", 2)
    paths = [tmp_path / "words" / word / "004ae714_nohash_0.wav" for word in ("bed", "cat")]
    for source, path in zip(sounds.paths, paths, strict=True):
        path.parent.mkdir(parents=True)
        shutil.copy(source, path)
        os.utime(path, (1_500_000_000, 1_500_000_000))
    there = Dataset("gsc", tmp_path / "words", ["bed", "cat"], paths, [0, 1], {})
    back = Dataset("gsc", tmp_path / "words", ["bed", "cat"], paths[::-1], [1, 0], {})
    features = np.array(build_features(there, 30, tmp_path / "cache")[0])
    assert not np.array_equal(features[0], features[1])
    assert np.array_equal(build_features(back, 30, tmp_path / "cache")[0], features[::-1])


def test_a_relative_path_finds_the_same_features(tmp_path, monkeypatch, capsys):
    dataset = make_clips(tmp_path / "clips", 3)
    build_features(dataset, 30, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    relative = Dataset("clips", Path("clips"), ["a", "b"], sorted(Path("clips").iterdir()), [0] * 3, {})
    build_features(relative, 30, Path("cache"))
    assert "built" not in capsys.readouterr().out


def test_memory_does_not_grow_with_the_number_of_clips(tmp_path):
    dataset = make_clips(tmp_path / "clips", 20)
    many = Dataset("many", dataset.root, dataset.classes, dataset.paths * 30, [0] * 600, {})
    tracemalloc.start()
    features, _ = build_features(many, 100, tmp_path / "cache")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert features.nbytes > 15e6 and peak < 6e6
