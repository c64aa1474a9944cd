"""Sizes of splits, draws, recipes, the cache file and its keys, downloads, archives: each held to numbers by hand."""

import csv
import hashlib
import http.server
import io
import json
import os
import shutil
import stat
import struct
import tarfile
import threading
import wave
import zipfile
import zlib
from collections import Counter
from contextlib import redirect_stderr
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import SMALL_AST

import train
from data import (
    DATASETS,
    FRONT_END,
    Dataset,
    Recipe,
    Split,
    build_features,
    fbank,
    few_shot,
    frames_for,
    load_dataset,
    random_split,
)
from sounds.audio import read_audio, typical_seconds
from sounds.clip import Clip, Listing
from sounds.fetch import Source, download, locate, unpack
from sounds.paper import ESC50, FSC, GSC, US8K
from sounds.synth import render
from support.command import UserError
from support.files import default_cache_dir, whole_file


def load(name: str, data_dir: Path | None, cache_dir: Path) -> Dataset:
    """A dataset as train.py loads it."""
    return load_dataset(name, data_dir, cache_dir)


def sound(path: Path, samples: int = 4800, seed: int = 0, rate: int = 16_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(seed).standard_normal(samples), rate)
    return path


def write_csv(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def labelled(counts: list[int]) -> Dataset:
    """Clips that are never opened: counts[i] of class i, one class after the other."""
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    paths = [Path(f"{i}.wav") for i in range(len(labels))]
    return Dataset("labelled", Path("."), [f"class {i}" for i in range(len(counts))], paths, labels, {})


class Terminal(io.StringIO):
    """A stderr on which progress is shown."""

    def isatty(self):
        return True


# ------------------------------------------------------------------------------------------- numbers of the paper


def test_the_front_end():
    assert FRONT_END == {
        "sample_rate": 16000, "window": 400, "hop": 160, "n_fft": 512, "n_mels": 128, "mean": -4.2677393,
        "std": 4.5689974,
    }  # fmt: skip


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
    found = {n: (r.n_frames, r.batch_size, r.epochs, r.mask, r.weights, r.lr) for n, r in DATASETS.items()}
    assert found == RECIPES


def test_where_the_datasets_come_from():
    places = [(source.folder, source.marker, source.url, source.checksum) for source in (ESC50, US8K, GSC, FSC)]
    assert places == [
        ("ESC-50", "meta/esc50.csv", "https://github.com/karolpiczak/ESC-50/archive/master.zip", None),
        (
            "UrbanSound8K", "metadata/UrbanSound8K.csv",
            "https://zenodo.org/records/1203745/files/UrbanSound8K.tar.gz?download=1",
            "md5:9aa69802bbf37fb986f71ec1483a196e",
        ),
        (
            "speech_commands_v0.02", "validation_list.txt",
            "https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
            "sha256:af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
        ),
        ("fluent_speech_commands_dataset", "data/train_data.csv", None, None),
    ]  # fmt: skip


def test_where_downloads_and_features_are_kept():
    assert default_cache_dir().name == "ast-petl"


@pytest.mark.parametrize(
    ("name", "folder", "sizes", "classes"),
    [("demo", "demo-fe5a0b5f", (200, 40, 100), 10), ("demo_source", "demo_source-146f2f13", (200, 10, 10), 68)],
)
def test_sounds_that_were_rendered_before_are_found_again(name, folder, sizes, classes, tmp_path, monkeypatch):
    """The folder has the name it has always had, so neither sounds nor features of a user are made again."""
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    dataset = load(name, None, tmp_path)
    assert dataset.root == tmp_path / folder and dataset.name == name
    assert len(dataset.classes) == classes and dataset.classes == sorted(dataset.classes)
    per_class = sum(sizes)
    assert dataset.names()[per_class - 1] == f"{dataset.classes[0]}/{per_class - 1:03d}.wav"
    assert dataset.labels == [label for label in range(classes) for _ in range(per_class)]
    part = np.repeat(["train", "val", "test"], sizes).tolist() * classes
    assert astuple(dataset.folds[1]) == tuple(
        [i for i, one in enumerate(part) if one == wanted] for wanted in ("train", "val", "test")
    )


# ---------------------------------------------------------------------------------------------------- splits, draws


SIZES = {  # clips of a class: to train, to validate, to test
    2: (1, 0, 1), 3: (1, 1, 1), 4: (2, 1, 1), 5: (3, 1, 1), 6: (4, 1, 1), 7: (5, 1, 1), 8: (4, 2, 2), 9: (5, 2, 2),
    10: (6, 2, 2), 11: (7, 2, 2), 12: (8, 2, 2), 13: (7, 3, 3), 14: (8, 3, 3), 15: (9, 3, 3),
}  # fmt: skip


def test_a_fifth_tests_and_a_fifth_validates():
    dataset = labelled(list(SIZES))
    for seed in range(3):
        split = random_split(dataset, seed)
        assert sorted(split.train + split.val + split.test) == list(range(sum(SIZES)))  # each clip once
        counts = [Counter(dataset.labels[i] for i in part) for part in astuple(split)]
        for label, (size, expected) in enumerate(SIZES.items()):
            assert tuple(count[label] for count in counts) == expected, size


def test_the_random_split_is_a_permutation_of_each_class():
    """Class after class from one generator: the first fifth of a permutation tests, the next validates."""
    dataset = labelled([10, 5, 2])
    for seed in (0, 1, 17):
        rng = np.random.default_rng(seed)
        first, second, third = (rng.permutation(np.arange(*ends)).tolist() for ends in ((0, 10), (10, 15), (15, 17)))
        split = random_split(dataset, seed)
        assert split.test == sorted(first[:2] + second[:1] + third[:1])
        assert split.val == sorted(first[2:4] + second[1:2])
        assert split == random_split(dataset, seed)
    assert len({tuple(random_split(dataset, seed).test) for seed in range(5)}) == 5


def test_few_shot_draws_are_those_of_the_seed():
    """Class after class from one generator, from the training clips alone, in their order; all of them if need be."""
    dataset = labelled([6, 5, 9])
    training = [*range(1, 5), *range(6, 11), *range(12, 20)]
    for seed in (0, 3):
        rng = np.random.default_rng(seed)
        drawn = [rng.choice(part, 3, replace=False) for part in (range(1, 5), range(6, 11), range(12, 20))]
        assert few_shot(dataset, training, 3, seed) == sorted(np.concatenate(drawn).tolist())
    assert few_shot(dataset, training, 4, 0)[:4] == [1, 2, 3, 4]
    with pytest.raises(UserError) as error:
        few_shot(dataset, training, 5, 0)
    assert str(error.value) == "--shots 5: class 'class 0' has only 4 training clips"


def folded(tmp_path: Path, folds: list[int]) -> dict[int, Split]:
    """The splits of a table whose clip i, of two classes in turn, is in folds[i]."""
    for i in range(len(folds)):
        sound(tmp_path / f"{i}.wav", 200, seed=i)
    rows = [f"{i}.wav,{'ab'[i % 2]},{fold}" for i, fold in enumerate(folds)]
    return load("csv", write_csv(tmp_path / "t.csv", "path,label,fold", *rows), tmp_path).folds


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
        1: Split(train=[2, 3], val=[], test=[0, 1]), 2: Split(train=[0, 1], val=[], test=[2, 3]),
    }  # fmt: skip


def test_the_length_of_clips_is_that_of_all_that_ever_train(tmp_path):
    paths = [sound(tmp_path / f"{i}.wav", samples) for i, samples in enumerate((1600, 3200, 160_000, 320_000))]
    dataset = Dataset("lengths", tmp_path, ["a", "b"], paths, [0, 1, 0, 1], {})
    folds = {1: Split([0], [], [3]), 2: Split([1], [2], [3])}

    def frames(dataset, **changes):
        return frames_for(DATASETS["folder"], replace(dataset, **changes), None)

    assert typical_seconds(paths[:2]) == pytest.approx(0.195)  # of 0.1 and 0.2
    assert frames(dataset, folds=folds) == 20  # 0.195 s, rounded
    assert frames(dataset, folds={1: Split([2], [], [3])}) == 1000
    assert frames(dataset, folds={1: Split([3], [], [2])}) == 1024
    assert typical_seconds([tmp_path / "absent.wav"]) == 10.24


def test_a_sound_that_does_not_say_its_length_does_not_count(tmp_path):
    """A FLAC file written into a pipe has a zero where others have the number of their samples."""
    paths = [sound(tmp_path / "a.wav", 16_000), sound(tmp_path / "pipe.flac", 16_000)]
    content = bytearray(paths[1].read_bytes())
    content[21:26] = bytes([content[21] & 0xF0, 0, 0, 0, 0])
    paths[1].write_bytes(content)
    assert typical_seconds(paths) == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------------------- the cache file


ROW = np.dtype([("key", "<u8"), ("crc", "<u4"), ("bad", "<u4"), ("features", "<f2", (30, 128))])


def clips(folder: Path, *names: str, name: str = "clips") -> Dataset:
    paths = [sound(folder / one, seed=i) for i, one in enumerate(names)]
    return Dataset(name, folder, ["a", "b"], paths, [0] * len(names), {})


def cache_of(dataset: Dataset, cache: Path) -> Path:
    """Where the features of 30 frames lie: the name, the length, and a hash of the folder of the sounds."""
    where = hashlib.sha256(str(dataset.root.resolve()).encode()).hexdigest()[:8]
    return cache / "features" / f"{dataset.name}-30-{where}.npy"


def test_the_cache_file_is_what_users_already_have(tmp_path):
    """Its name, its rows, their keys and checksums, from the definition: no update may make them compute it again."""
    dataset = clips(tmp_path / "sounds", "a/one.wav", "a/zwei ö.wav")
    (tmp_path / "sounds" / "bad.wav").write_bytes(b"no sound")
    dataset.paths.append(tmp_path / "sounds" / "bad.wav")
    for i, path in enumerate(dataset.paths):
        os.utime(path, ns=(0, 1_600_000_000_123_456_789 + i))
    features, bad = build_features(dataset, 30, tmp_path / "cache", skip_bad=True)
    assert list(bad) == [2] and features.shape == (3, 30, 128)
    rows = np.load(cache_of(dataset, tmp_path / "cache"))
    assert rows.dtype == ROW and rows.shape == (3,)
    for i, (name, size) in enumerate((("a/one.wav", 9644), ("a/zwei ö.wav", 9644), ("bad.wav", 8))):
        text = (
            "front end 2, 16000 400 160 512 128 -4.2677393 4.5689974, 30 frames, "
            f"{name}, {size} bytes, modified {1_600_000_000_123_456_789 + i}"
        )
        assert int(rows["key"][i]) == struct.unpack("<Q", hashlib.sha256(text.encode()).digest()[:8])[0]
        assert int(rows["crc"][i]) == zlib.crc32(rows["features"][i].tobytes(), i // 2)
    assert rows["bad"].tolist() == [0, 0, 1] and not rows["features"][2].any()
    assert np.array_equal(features, rows["features"]) and features[:2].std() > 0.1
    assert sorted(path.name for path in (tmp_path / "cache/features").iterdir()) == [
        cache_of(dataset, tmp_path / "cache").name, cache_of(dataset, tmp_path / "cache").name + ".lock",
    ]  # fmt: skip


def test_what_a_clip_is_known_by(tmp_path, capsys):
    """Another size, another date, another name, another length: each alone makes the features of a clip anew."""
    dataset, cache = clips(tmp_path / "sounds", "one.wav", "two.wav"), tmp_path / "cache"
    path, date = dataset.paths[0], dataset.paths[0].stat().st_mtime_ns

    def built() -> int:
        capsys.readouterr()
        build_features(dataset, 30, cache)
        out = capsys.readouterr().out
        return int(out.split(": built ")[1].split()[0]) if "built" in out else 0

    assert (built(), built()) == (2, 0)
    sound(path, 4801)
    os.utime(path, ns=(date, date))
    assert (built(), built()) == (1, 0)
    os.utime(path, ns=(date, date + 1))
    assert (built(), built()) == (1, 0)
    dataset.paths[0] = path.rename(path.with_name("three.wav"))
    assert (built(), built()) == (1, 0)
    build_features(dataset, 31, cache)
    other = Dataset("other", dataset.root, dataset.classes, dataset.paths, dataset.labels, {})
    build_features(other, 30, cache)
    shutil.copytree(dataset.root, tmp_path / "copy")
    build_features(clips(tmp_path / "copy", "one.wav", "two.wav"), 30, cache)
    assert len(list((cache / "features").glob("*.npy"))) == 4  # by length, by name, by folder


@pytest.mark.parametrize("other", [np.zeros(2), np.zeros((2, 1), ROW), np.zeros(2, "<u8")])
def test_a_cache_file_of_something_else_is_built_again(tmp_path, other, capsys):
    dataset = clips(tmp_path / "sounds", "one.wav", "two.wav")
    file = cache_of(dataset, tmp_path)
    file.parent.mkdir()
    np.save(file, other)
    features, bad = build_features(dataset, 30, tmp_path)
    assert features.any() and not bad
    out, err = capsys.readouterr()
    assert err == f"{file}: not a whole feature file, building it again\n" and "built 2 of 2 clips" in out


@pytest.mark.parametrize(("samples", "frames"), [(37, 1), (400, 1), (559, 1), (560, 2), (1_000, 4), (9_000, 30)])
def test_features_are_those_of_the_clip_and_then_of_nothing(tmp_path, samples, frames):
    """Rounded to float16; a clip shorter than a frame is padded; after the sound comes (0 + 4.2677393) / 9.1379948."""
    path = sound(tmp_path / "a.wav", samples)
    features, bad = build_features(Dataset("short", tmp_path, ["a", "b"], [path], [0], {}), 30, tmp_path / "cache")
    assert not bad
    samples = torch.from_numpy(soundfile.read(path, dtype="float32")[0])[None]
    expected = (fbank(samples)[0, :30].numpy() + np.float32(4.2677393)) / np.float32(9.1379948)
    assert len(expected) == frames
    np.testing.assert_allclose(features[0, :frames].astype(np.float32), expected, atol=6e-4)  # of float16 near 1
    assert np.all(features[0, frames:] == np.float16(0.467032))


def test_features_are_shared_and_yet_ones_own(tmp_path):
    """Mapped into memory; what is written to the array does not reach the file."""
    dataset = clips(tmp_path / "sounds", "one.wav")
    features, _ = build_features(dataset, 30, tmp_path)
    assert isinstance(features, np.memmap) and features.dtype == np.float16
    before = cache_of(dataset, tmp_path).read_bytes()
    features[:] = 0
    features.flush()
    assert cache_of(dataset, tmp_path).read_bytes() == before
    assert np.array(build_features(dataset, 30, tmp_path)[0]).any()


def test_only_what_the_frames_need_is_decoded(tmp_path):
    """30 frames reach over 30 * 160 + 400 samples, and a tenth of a second more: 6,800. What follows is not seen."""
    wrong = {"inside.wav": 6_795, "beyond.wav": 6_805}
    for name, position in wrong.items():
        samples = np.full(20_000, 0.1)
        samples[position] = np.nan
        soundfile.write(tmp_path / name, samples, 16_000, subtype="FLOAT")
    dataset = Dataset("nan", tmp_path, ["a", "b"], [tmp_path / name for name in wrong], [0, 1], {})
    _, bad = build_features(dataset, 30, tmp_path / "cache", skip_bad=True)
    assert bad == {0: "holds samples that are not finite"}


@pytest.mark.parametrize(("missing", "whole"), [(0.09, True), (0.11, False)])
def test_a_tenth_of_a_second_may_be_missing(tmp_path, missing, whole):
    path = sound(tmp_path / "cut.wav", 16_000)
    os.truncate(path, path.stat().st_size - 2 * round(missing * 16_000))
    if whole:
        assert len(read_audio(path)) == 16_000 - round(missing * 16_000)
    else:
        with pytest.raises(ValueError, match=r"is truncated: it ends after 0\.89 s, before its header says"):
            read_audio(path)
    assert len(read_audio(path, 0.95)) == min(15_200, 16_000 - round(missing * 16_000))  # 0.06 s of these are missing


def test_a_build_that_cannot_be_renamed_leaves_no_half_file(tmp_path, monkeypatch, capsys):
    dataset = clips(tmp_path / "sounds", "one.wav", "two.wav")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            build_features(dataset, 30, tmp_path)
    assert not cache_of(dataset, tmp_path).exists()
    build_features(dataset, 30, tmp_path)
    assert "built 0 of 2 clips" in capsys.readouterr().out  # it had only to be renamed


def test_all_cores_build_and_get_their_threads_back(tmp_path, monkeypatch):
    """Two clips are read at the same time: each waits for the other."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    meeting, opened = threading.Barrier(2, timeout=20), soundfile.SoundFile

    def meet(*args, **kwargs):
        meeting.wait()
        assert torch.get_num_threads() == 1
        return opened(*args, **kwargs)

    monkeypatch.setattr(soundfile, "SoundFile", meet)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        build_features(silent_clips(tmp_path / "sounds"), 30, tmp_path)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def silent_clips(folder: Path) -> Dataset:
    """Two WAV files written without soundfile."""
    folder.mkdir()
    for name in ("one.wav", "two.wav"):
        with wave.open(str(folder / name), "wb") as file:
            file.setparams((1, 2, 16_000, 4800, "NONE", "not compressed"))
            file.writeframes(bytes(9600))
    return Dataset("clips", folder, ["a", "b"], [folder / "one.wav", folder / "two.wav"], [0, 1], {})


def test_building_shows_its_progress(tmp_path):
    with redirect_stderr(Terminal()) as shown:
        build_features(clips(tmp_path / "sounds", "one.wav", "two.wav"), 30, tmp_path)
    assert "features of clips: 100%" in shown.getvalue() and "2/2" in shown.getvalue()


# -------------------------------------------------------------------------------------------------- whole or not at all


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "result.json"
    with whole_file(path) as temporary:
        assert temporary.parent == path.parent and temporary.name.startswith(".") and temporary != path
        temporary.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_text("half of the sec")
        raise KeyboardInterrupt
    assert path.read_text() == "first" and [file.name for file in path.parent.iterdir()] == ["result.json"]
    with whole_file(path) as one, whole_file(path) as other:
        assert one != other  # two processes at once
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"


def test_rendering_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    write, calls = soundfile.write, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return write(*args, **kwargs)

    monkeypatch.setattr(soundfile, "write", interrupted)
    with redirect_stderr(Terminal()) as shown, pytest.raises(KeyboardInterrupt):
        load("demo", None, tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["demo-fe5a0b5f.lock"]
    assert "rendering demo: " in shown.getvalue()
    for index, (path, samples, rate) in enumerate(calls):  # the first clips of the first class, with seed 0
        assert (path.name, rate) == (f"{index:03d}.wav", 16_000)
        assert np.array_equal(samples, render("down_down_up", index, 0))


# ----------------------------------------------------------------------------------------------------------- downloads


@pytest.fixture
def web():
    """A server of this machine: /whole sends 3,000 bytes, /cut says so and sends fewer, /unknown does not say."""
    content = bytes(range(250)) * 12

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/absent":
                return self.send_error(404, "Gone for good")
            self.send_response(200)
            if self.path != "/unknown":
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:2000] if self.path == "/cut" else content)

        def log_message(self, *_):
            """Keeps the tests' output clean."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", content
        server.shutdown()


@pytest.mark.parametrize("checksum", [None, "md5", "sha256"])
@pytest.mark.parametrize("name", ["whole", "unknown"])
def test_a_download_is_kept_if_its_checksum_is_right(web, tmp_path, name, checksum, capsys):
    address, content = web
    right = checksum and f"{checksum}:{hashlib.new(checksum, content).hexdigest()}"
    target = tmp_path / "new" / "file.zip"
    assert download(f"{address}/{name}", target, "by hand", right) == target and target.read_bytes() == content
    assert [path.name for path in target.parent.iterdir()] == ["file.zip"]
    assert capsys.readouterr().err == ""  # no bar where there is no terminal


@pytest.mark.parametrize(
    ("name", "checksum", "reason"),
    [
        ("cut", None, "the connection ended after 2000 of 3000 bytes"),
        ("absent", None, "Gone for good"),
        ("whole", "md5:" + "0" * 32, "its MD5 is {md5}, not " + "0" * 32),
        ("whole", "sha256:" + "f" * 64, "its SHA256 is "),
    ],
)
def test_a_download_that_is_not_right_is_not_kept(web, tmp_path, name, checksum, reason):
    address, content = web
    reason = reason.replace("{md5}", hashlib.md5(content).hexdigest())
    with pytest.raises(UserError) as error:
        download(f"{address}/{name}", tmp_path / "file.zip", "download it by hand", checksum)
    message = str(error.value)
    assert message.startswith(f"cannot download {address}/{name} (") and message.endswith("): download it by hand")
    assert reason in message and "\n" not in message
    assert not list(tmp_path.iterdir())


def test_a_download_shows_its_progress(web, tmp_path):
    with redirect_stderr(Terminal()) as shown:
        download(f"{web[0]}/whole", tmp_path / "file.zip", "by hand")
    assert "file.zip: 100%" in shown.getvalue() and "3.00k/3.00k" in shown.getvalue()


# ------------------------------------------------------------------------------------------------------------ archives


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("/absolute.txt", 0o100644),
        ("inside/../../outside.txt", 0),
        ("device", stat.S_IFCHR | 0o644),
        ("pipe", stat.S_IFIFO | 0o644),
        ("link", stat.S_IFLNK | 0o777),
    ],
)
def test_zip_members_that_are_refused(tmp_path, name, mode):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as zipped:
        zipped.writestr("fine.txt", "fine")
        member = zipfile.ZipInfo(name)
        member.external_attr = mode << 16
        zipped.writestr(member, "fine.txt")
    with pytest.raises(UserError) as error:
        unpack(tmp_path / "evil.zip", tmp_path / "deep" / "target")
    assert str(error.value) == (
        f"{tmp_path}/evil.zip: refusing {name!r}, a link, a device or a path that leaves the folder"
    )
    assert not list((tmp_path / "deep").iterdir()) and not (tmp_path / "outside.txt").exists()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_ordinary_members_are_unpacked(tmp_path, kind):
    """Folders, files with and without a mode of Unix; leftovers of a killed run are none of them."""
    (tmp_path / ".target.unfinished").mkdir()
    (tmp_path / ".target.unfinished" / "stale.txt").touch()
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "archive", "w") as zipped:
            zipped.writestr("folder/", "")
            for name, mode in (("folder/one.txt", 0), ("folder/two.txt", stat.S_IFREG | 0o600)):
                member = zipfile.ZipInfo(name)
                member.external_attr = mode << 16
                zipped.writestr(member, name)
    else:
        with tarfile.open(tmp_path / "archive", "w:gz") as tar:
            for name in ("folder", "folder/one.txt", "folder/two.txt"):
                member = tarfile.TarInfo(name)
                member.type, member.mode = (tarfile.DIRTYPE, 0o777) if name == "folder" else (tarfile.REGTYPE, 0o6777)
                member.size = 0 if name == "folder" else len(name)
                tar.addfile(member, io.BytesIO(name.encode()))
    with redirect_stderr(Terminal()) as shown:
        unpack(tmp_path / "archive", tmp_path / "target")
    assert sorted(path.name for path in (tmp_path / "target").rglob("*")) == ["folder", "one.txt", "two.txt"]
    assert (tmp_path / "target/folder/two.txt").read_text() == "folder/two.txt"
    assert not (tmp_path / "target/folder/one.txt").stat().st_mode & 0o6022  # nobody else's file to write or run as
    assert not list(tmp_path.glob(".*")) and "unpacking archive: " in shown.getvalue()


def test_what_is_no_archive_says_why(tmp_path):
    (tmp_path / "a.zip").write_text("not found, said the server")
    with pytest.raises(UserError) as error:
        unpack(tmp_path / "a.zip", tmp_path / "target")
    assert str(error.value) == (
        f"{tmp_path}/a.zip is not a whole zip or tar archive (file could not be opened successfully): download it again"
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_unpacking_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch, error):
    with zipfile.ZipFile(tmp_path / "archive", "w") as zipped:
        zipped.writestr("one.txt", "one")
        zipped.writestr("two.txt", "two")

    def interrupted(*_):
        raise error

    for owner, name in ((zipfile.ZipFile, "extract"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            with pytest.raises(error):
                unpack(tmp_path / "archive", tmp_path / "target")
        assert [path.name for path in tmp_path.iterdir()] == ["archive"]


def test_where_a_dataset_is_looked_for(tmp_path, web):
    """In the folder, one folder below, in an archive; what is missing is said with the way to get it."""
    source = Source("Sounds", "meta/list.csv", "meta/list.csv and audio/", by_hand="ask for it")
    root = write_csv(tmp_path / "outer" / "release-1" / "meta" / "list.csv", "a").parents[1]
    assert locate(source, root, tmp_path / "cache") == locate(source, root.parent, tmp_path / "cache") == root
    with pytest.raises(UserError, match=r"outer/release-1/meta does not hold meta/list\.csv: ask for it and give"):
        locate(source, root / "meta", tmp_path / "cache")
    with pytest.raises(
        UserError, match=r"Sounds cannot be downloaded: ask for it and give the archive or the unpacked"
    ):
        locate(source, None, tmp_path / "cache")
    with pytest.raises(
        UserError, match=r"absent: no such folder or archive; it should hold meta/list\.csv and audio/$"
    ):
        locate(source, tmp_path / "absent", tmp_path / "cache")
    shutil.make_archive(str(tmp_path / "sounds"), "zip", tmp_path / "outer")
    first = locate(source, tmp_path / "sounds.zip", tmp_path / "cache")
    assert first.name == "release-1" and (first / "meta/list.csv").is_file()
    os.utime(tmp_path / "sounds.zip", ns=(0, 0))  # another archive of that name
    assert locate(source, tmp_path / "sounds.zip", tmp_path / "cache") != first
    shutil.copytree(root, tmp_path / "cache" / "Sounds")  # put there by hand
    assert locate(source, None, tmp_path / "cache") == tmp_path / "cache" / "Sounds"
    with pytest.raises(UserError, match=r"cannot download .* \(the connection ended .*: download it by hand and give"):
        locate(Source("More", "a", "b", url=f"{web[0]}/cut"), None, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("More*[!k]"))  # but the lock


# ------------------------------------------------------------------------------------------- the datasets of the paper


def esc_table(root: Path, rows: list[tuple]) -> Path:
    """The table of an ESC-50 release with empty sound files: (filename, fold, target, category, esc10)."""
    lines = [",".join(map(str, row)) for row in rows]
    write_csv(root / "meta" / "esc50.csv", "filename,fold,target,category,esc10", *lines)
    (root / "audio").mkdir(exist_ok=True)
    for row in rows:
        (root / "audio" / str(row[0])).touch()
    return root


def test_classes_come_in_the_order_of_their_numbers(tmp_path, capsys):
    names = {0: "zebra", 10: "ant", 2: "mule"}
    rows = [(f"{fold}-{n}.wav", fold, n, names[n], n != 2) for n in (10, 0, 2) for fold in (1, 2, 3)]
    dataset = load("esc50", esc_table(tmp_path / "esc", rows), tmp_path)
    assert dataset.classes == ["zebra", "mule", "ant"] and dataset.labels == [2, 2, 2, 0, 0, 0, 1, 1, 1]
    assert (dataset.name, dataset.root, dataset.names()[0]) == ("esc50", tmp_path / "esc", "audio/1-10.wav")
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/esc: 9 clips of 3 classes, where the release has 2000 of 50\n"
    )
    ten = load("esc10", tmp_path / "esc", tmp_path)
    assert ten.classes == ["zebra", "ant"] and ten.labels == [1, 1, 1, 0, 0, 0] and ten.name == "esc10"
    assert "6 clips of 2 classes, where the release has 400 of 10\n" in capsys.readouterr().err
    assert ten.folds[1] == Split([1, 4], [2, 5], [0, 3])

    lines = [f"{fold}-{n}.wav,{fold},{n},{names[n]}" for n in (10, 0, 2) for fold in (1, 2)]
    for line in lines:
        name, fold, *_ = line.split(",")
        sound(tmp_path / "us8k" / "audio" / f"fold{fold}" / name)
    write_csv(tmp_path / "us8k/metadata/UrbanSound8K.csv", "slice_file_name,fold,classID,class", *lines)
    urban = load("us8k", tmp_path / "us8k", tmp_path)
    assert urban.classes == ["zebra", "mule", "ant"] and urban.labels == [2, 2, 0, 0, 1, 1] and urban.name == "us8k"
    assert urban.names()[:2] == ["audio/fold1/1-10.wav", "audio/fold2/2-10.wav"]
    assert urban.folds[2] == Split([0, 2, 4], [], [1, 3, 5])


@pytest.mark.parametrize(
    ("count", "named"), [(5, "0.wav, audio/1.wav, audio/2.wav, audio/3.wav, audio/4.wav"), (6, "0.wav, ...")]
)
def test_five_missing_files_are_named(tmp_path, count, named):
    rows = [(f"{i}.wav", i % 2 + 1, i % 2, f"c{i % 2}", True) for i in range(8)]
    root = esc_table(tmp_path, rows)
    for i in range(count):
        (root / "audio" / f"{i}.wav").unlink()
    named = "audio/" + named.replace("0.wav, ...", ", audio/".join(f"{i}.wav" for i in range(5)) + " and 1 more")
    with pytest.raises(UserError) as error:
        load("esc50", root, tmp_path)
    assert str(error.value) == f"{root}: {count} of 8 files are missing ({named}): complete it"


@pytest.mark.parametrize(("name", "per_class"), [("esc50", 8), ("esc10", 40)])
def test_a_whole_release_raises_no_warning(tmp_path, capsys, name, per_class):
    classes = 400 // per_class
    rows = [(f"{i}.wav", i % 5 + 1, i % classes, f"c{i % classes}", True) for i in range(400)]
    if name == "esc50":
        rows += [(f"{400 + i}.wav", i % 5 + 1, i % 50, f"c{i % 50}", False) for i in range(1600)]
    dataset = load(name, esc_table(tmp_path, rows), tmp_path)
    assert capsys.readouterr().err == "" and len(dataset.paths) == (2000 if name == "esc50" else 400)


def test_what_is_no_clip_of_speech_commands(tmp_path):
    for name in ("yes/a.wav", "yes/._a.wav", "no/b.wav", "no/c.wav", ".git/d.wav", "_background_noise_/e.wav"):
        sound(tmp_path / name)
    (tmp_path / "yes" / "a.txt").touch()
    (tmp_path / "validation_list.txt").write_text("no/b.wav\n")
    with pytest.raises(UserError, match=r"does not hold testing_list\.txt; the dataset has validation_list\.txt, test"):
        load("gsc", tmp_path, tmp_path)
    (tmp_path / "testing_list.txt").write_text("no/c.wav\n")
    dataset = load("gsc", tmp_path, tmp_path)
    assert dataset.names() == ["no/b.wav", "no/c.wav", "yes/a.wav"] and dataset.name == "gsc"
    assert (dataset.classes, dataset.folds) == (["no", "yes"], {1: Split([2], [0], [1])})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"filename,fold,target,category,esc10\n", "no rows beneath the header"),
        (
            b"filename,fold,target,category,esc10\na,1.0,1,x,True\n",
            r"line 2: fold is '1\.0'; it must be a whole number",
        ),
        (b"filename,fold,target,category,esc10\na,1,1,x,True\na,1,-1,x,True\n", "line 3: target is '-1'"),
        (b"filename,fold,target,category,esc10\na,1,1\n", "line 2: too few columns; is the file whole"),
        (b"filename,fold,target,category,esc10\n\xff\xfe,1,1,x,True\n", "it must be a CSV file in UTF-8"),
        (b"filename,fold,target,category,esc10\na,1,1,x,False\n", "no row has esc10 = True"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, content, message):
    write_csv(tmp_path / "meta" / "esc50.csv").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load("esc10", tmp_path, tmp_path)
    assert str(tmp_path / "meta" / "esc50.csv") in str(error.value)


def test_a_table_with_the_mark_that_spreadsheets_write(tmp_path):
    for name in "ab":
        sound(tmp_path / f"{name}1.wav"), sound(tmp_path / f"{name}2.wav", seed=1)
    text = "\ufeffpath,label\r\na1.wav,ä\r\na2.wav,ä\r\nb1.wav,b\r\nb2.wav,b\r\n"
    (tmp_path / "my.csv").write_bytes(text.encode())
    dataset = load("csv", tmp_path / "my.csv", tmp_path)
    assert (dataset.name, dataset.classes, dataset.labels) == ("my", ["b", "ä"], [1, 1, 0, 0])


def test_a_missing_table_is_named(tmp_path):
    write_csv(tmp_path / "data" / "train_data.csv", "path,action,object,location", "a.wav,x,y,z")
    with pytest.raises(UserError, match=r"data/valid_data\.csv: there is no such table"):
        load("fsc", tmp_path, tmp_path)


# ----------------------------------------------------------------------------------------------------- your own sounds


def test_what_a_folder_of_classes_may_hold(tmp_path, capsys):
    """Sounds anywhere beneath a class, of any known format; hidden files are none, other files are named."""
    for i, name in enumerate(("b/1.wav", "b/deep/er/2.WAV", "a/3.flac", "a/4.Flac", "a/.5.wav", ".hidden/6.wav")):
        sound(tmp_path / "my" / name, seed=i)
    for name in ("a/notes.txt", "b/deep/cover.jpg", "readme.md"):
        (tmp_path / "my" / name).touch()
    dataset = load("folder", tmp_path / "my", tmp_path)
    assert dataset.names() == ["a/3.flac", "a/4.Flac", "b/1.wav", "b/deep/er/2.WAV"]
    assert (dataset.name, dataset.classes, dataset.labels) == ("my", ["a", "b"], [0, 0, 1, 1])
    error = capsys.readouterr().err
    assert error.startswith(f"warning: {tmp_path}/my: 2 files are no .wav, .flac, ")
    assert error.endswith("ignored (a/notes.txt, b/deep/cover.jpg)\n")


def test_copies_are_named_where_they_matter(tmp_path, capsys):
    """The same content, not only the same size and middle; in one part of a given split it does no harm."""

    def raw(name: str, start: bytes, end: bytes) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(start + bytes(20_000) + end)

    for name, start, end in (("a1", b"x", b"1"), ("a2", b"x", b"2"), ("a3", b"x", b"1"), ("b1", b"y", b"1"),
                             ("b2", b"x", b"22"), ("b3", b"z", b"2")):  # fmt: skip
        raw(f"{name}.wav", start, end)
    rows = ["a1.wav,a", "a2.wav,a", "a3.wav,a", "b1.wav,b", "b2.wav,b", "b3.wav,b"]

    def said(header: str, parts: list[str]) -> str:
        lines = [row + part for row, part in zip(rows, parts, strict=True)]
        load("csv", write_csv(tmp_path / "t.csv", header, *lines), tmp_path)
        return capsys.readouterr().err

    copies = f"warning: {tmp_path}: 1 sounds are there more than once "
    assert said("path,label", [""] * 6) == f"{copies}and may come into different splits (a1.wav = a3.wav)\n"
    apart = [",train", ",train", ",test", ",train", ",train", ",test"]
    assert said("path,label,split", apart) == f"{copies}in different splits (a1.wav = a3.wav)\n"
    together = [",train", ",test", ",train", ",train", ",train", ",test"]
    assert said("path,label,split", together) == ""


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("path,label,fold", ["a1.wav,a,1", "a2.wav,a,2", "a1.wav,a,2"], "a1.wav is listed in fold 1 and 2: every clip"),
        ("path,label,fold", ["a1.wav,a,1", "a2.wav,a,2", "a1.wav,a,1"], "a1.wav is listed twice: every clip must be"),
        ("path,label,split", ["a1.wav,a,train", "b1.wav,b,"], "line 3: an empty path, label or split"),
        ("path,label,fold", ["a1.wav,a,", "b1.wav,b,1"], "line 2: an empty path, label or fold"),
        ("path,label", [",a"], "line 2: an empty path, label or column"),
        ("path,label,split", ["a1.wav,a,train", "b1.wav,b,train"], "no clips to test: say which in the data"),
        ("path,label,split", ["a1.wav,a,test", "b1.wav,b,test"], "no clips to train: say which in the data"),
        ("path,label,fold", ["a1.wav,a,1", "b1.wav,b,1"], "no clips to train: say which in the data"),
        ("path,label", ["a1.wav,a", "a2.wav,a", "b1.wav,b"], "class 'b' has one clip; one to train and one to test"),
        ("path,label", ["a1.wav,a", "a2.wav,a"], "1 classes; there must be two or more to tell apart"),
    ],
)
def test_tables_of_ones_own_that_cannot_train(tmp_path, header, rows, message):
    for name in ("a1", "a2", "b1"):
        sound(tmp_path / f"{name}.wav", seed=ord(name[0]) + int(name[1]))
    with pytest.raises(UserError, match=message) as error:
        load("csv", write_csv(tmp_path / "t.csv", header, *rows), tmp_path)
    assert str(tmp_path) in str(error.value)


def test_what_is_probably_a_mistake_is_said(tmp_path, capsys):
    for i in range(7):
        sound(tmp_path / f"{i}.wav", seed=i)
    rows = [
        "0.wav,a,train",
        "1.wav,a,train",
        "2.wav,a,test",
        "3.wav,b,train",
        "4.wav,b,test",
        "5.wav,c,train",
        "6.wav,c,train",
    ]
    load("csv", write_csv(tmp_path / "t.csv", "path,label,split", *rows), tmp_path)
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {tmp_path}: class 'b' has one training clip in fold 1",
        f"warning: {tmp_path}: class 'c' has no test clips in fold 1",
    ]


def test_every_number_of_a_row_comes_to_use(tmp_path, monkeypatch):
    """And the options go before it."""
    files = clips(tmp_path / "sounds", *(f"{i}.wav" for i in range(8)), name="mine").paths
    parts = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    listing = Listing(tmp_path / "sounds", [Clip(file, "ab"[i % 2], parts[i]) for i, file in enumerate(files)])
    recipe = Recipe(lambda data_dir, cache_dir: listing, n_frames=31, batch_size=3, epochs=2, mask=True,
                    weights=str(SMALL_AST), lr={"bitfit": 0.125})  # fmt: skip
    monkeypatch.setitem(DATASETS, "mine", recipe)
    options = ["--dataset", "mine", "--cache-dir", str(tmp_path)]

    def config(method: str, *words: str) -> dict:
        assert train.main([*options, "--method", method, "--out", str(tmp_path / "runs"), *words]) == 0
        return json.loads((tmp_path / "runs" / "mine" / method / "seed0" / "config.json").read_text())

    found = config("bitfit")
    assert [found[name] for name in ("n_frames", "batch_size", "epochs", "mask", "lr")] == [31, 3, 2, True, 0.125]
    assert found["weights"] == str(SMALL_AST)
    rows = list(csv.DictReader((tmp_path / "runs/mine/bitfit/seed0/metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["2", "4"]  # four clips in batches of three
    found = config("linear", "--batch-size", "4", "--epochs", "1", "--no-mask", "--lr", "0.25", "--seconds", "0.2")
    assert [found[name] for name in ("n_frames", "batch_size", "epochs", "mask", "lr")] == [20, 4, 1, False, 0.25]
