"""The features on disk: what is kept, what is computed again, and by whom."""

import hashlib
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import threading
import time
import tracemalloc
import wave
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import Terminal, build_features, make_bad_files, make_clips, make_esc50, write_sound

import data
from data import Dataset, fbank, load_clips, load_dataset, to_input
from sounds.audio import read_audio
from support.command import UserError
from support.rows import open_rows, row_type, writable_rows

ROW = np.dtype([("key", "<u8"), ("features", "<f2", (30, 128))])


def numbered(count: int) -> list[str]:
    return [f"{i:04d}.wav" for i in range(count)]


def cache_of(dataset: Dataset, cache: Path) -> Path:
    """Where the features of 30 frames lie: name, length, and a hash of the folder of the sounds."""
    where = hashlib.sha256(str(dataset.root.resolve()).encode()).hexdigest()[:8]
    return cache / "features" / f"{dataset.name}-30-{where}.rows"


# ------------------------------------------------------------------------------------- what is kept


def test_features_are_those_of_the_files_and_built_once(esc50_dir, tmp_path, capsys):
    dataset = load_dataset("esc10", esc50_dir, tmp_path)
    features, bad = build_features(dataset, 500, tmp_path)
    assert features.shape == (50, 500, 128) and features.dtype == np.float16 and not bad
    expected = to_input(fbank(torch.from_numpy(read_audio(dataset.paths[7]))[None]), 500)[0]
    assert np.abs(features[7] - expected.numpy()).max() < 1e-3
    assert "built 50 of 50" in capsys.readouterr().out
    again, _ = build_features(dataset, 500, tmp_path)
    assert np.array_equal(again, features)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("samples", "frames"), [(37, 1), (400, 1), (559, 1), (560, 2), (1_000, 4), (9_000, 30)]
)
def test_features_are_those_of_the_clip_and_then_of_nothing(tmp_path, samples, frames):
    """Rounded to float16. A clip shorter than a frame is padded. After the sound comes
    (0 + 4.2677393) / 9.1379948."""
    path = write_sound(tmp_path / "a.wav", seconds=samples / 16_000, seed=0)
    features, bad = build_features(
        Dataset("short", tmp_path, ["a", "b"], [path], [0], {}), 30, tmp_path / "cache"
    )
    assert not bad
    samples = torch.from_numpy(soundfile.read(path, dtype="float32")[0])[None]
    expected = (fbank(samples)[0, :30].numpy() + np.float32(4.2677393)) / np.float32(9.1379948)
    assert len(expected) == frames
    np.testing.assert_allclose(
        features[0, :frames].astype(np.float32), expected, atol=6e-4
    )  # of float16 near 1
    assert np.all(features[0, frames:] == np.float16(0.467032))


def test_only_what_the_frames_need_is_decoded(tmp_path):
    """30 frames and a tenth of a second are 30 * 160 + 400 + 1600 = 6,800 samples."""
    wrong = {"inside.wav": 6_795, "beyond.wav": 6_805}
    for name, position in wrong.items():
        samples = np.full(20_000, 0.1)
        samples[position] = np.nan
        soundfile.write(tmp_path / name, samples, 16_000, subtype="FLOAT")
    dataset = Dataset("nan", tmp_path, ["a", "b"], [tmp_path / name for name in wrong], [0, 1], {})
    _, bad = build_features(dataset, 30, tmp_path / "cache", skip_bad=True)
    assert bad == {0: "holds samples that are not finite"}


def test_features_are_shared_and_yet_ones_own(tmp_path):
    """Mapped into memory; what is written to the array does not reach the file."""
    dataset = make_clips(tmp_path / "sounds", "one.wav")
    clips, _ = load_clips(dataset, 30, torch.device("cpu"), tmp_path, skip_bad=False)
    assert clips.file == cache_of(dataset, tmp_path) and clips.features.dtype == torch.float16
    before = clips.file.read_bytes()
    clips.features.zero_()
    assert clips.file.read_bytes() == before
    assert np.array(build_features(dataset, 30, tmp_path)[0]).any()


def test_what_a_row_holds(tmp_path):
    """The name of the file, its rows and their keys, from the definition. A bad clip has no key."""
    dataset = make_clips(tmp_path / "sounds", "a/one.wav", "a/zwei ö.wav")
    (tmp_path / "sounds" / "bad.wav").write_bytes(b"no sound")
    dataset.paths.append(tmp_path / "sounds" / "bad.wav")
    for i, path in enumerate(dataset.paths):
        os.utime(path, ns=(0, 1_600_000_000_123_456_789 + i))
    features, bad = build_features(dataset, 30, tmp_path / "cache", skip_bad=True)
    assert list(bad) == [2] and features.shape == (3, 30, 128)
    rows = np.fromfile(cache_of(dataset, tmp_path / "cache"), ROW)
    assert rows.shape == (3,)
    for i, (name, size) in enumerate((("a/one.wav", 9644), ("a/zwei ö.wav", 9644), ("bad.wav", 8))):
        text = (
            "front end 2, 16000 400 160 512 128 -4.2677393 4.5689974, 30 frames, "
            f"{name}, {size} bytes, modified {1_600_000_000_123_456_789 + i}"
        )
        key = struct.unpack("<Q", hashlib.sha256(text.encode()).digest()[:8])[0]
        assert int(rows["key"][i]) == (0 if name == "bad.wav" else key)
    assert not rows["features"][2].any()
    assert np.array_equal(features, rows["features"]) and features[:2].std() > 0.1
    assert sorted(path.name for path in (tmp_path / "cache/features").iterdir()) == [
        cache_of(dataset, tmp_path / "cache").name,
        cache_of(dataset, tmp_path / "cache").name + ".lock",
    ]


# --------------------------------------------------------------------------- what is computed again


def test_what_a_clip_is_known_by(tmp_path, capsys):
    """Another size, date, name or length: each alone makes the features of a clip anew."""
    dataset, cache = make_clips(tmp_path / "sounds", "one.wav", "two.wav"), tmp_path / "cache"
    path, date = dataset.paths[0], dataset.paths[0].stat().st_mtime_ns

    def built() -> int:
        capsys.readouterr()
        build_features(dataset, 30, cache)
        out = capsys.readouterr().out
        return int(out.split(": built ")[1].split()[0]) if "built" in out else 0

    assert (built(), built()) == (2, 0)
    write_sound(path, seconds=4801 / 16_000)
    os.utime(path, ns=(date, date))
    assert (built(), built()) == (1, 0)
    os.utime(path, ns=(date, date + 1))
    assert (built(), built()) == (1, 0)
    dataset = replace(dataset, paths=[path.rename(path.with_name("three.wav")), *dataset.paths[1:]])
    assert (built(), built()) == (1, 0)
    build_features(dataset, 31, cache)
    other = Dataset("other", dataset.root, dataset.classes, dataset.paths, dataset.labels, {})
    build_features(other, 30, cache)
    shutil.copytree(dataset.root, tmp_path / "copy")
    build_features(make_clips(tmp_path / "copy", "one.wav", "two.wav"), 30, cache)
    assert len(list((cache / "features").glob("*.rows"))) == 4  # by length, by name, by folder


def test_a_changed_clip_alone_has_other_features(tmp_path, capsys):
    dataset = load_dataset("esc10", make_esc50(tmp_path / "data"), tmp_path)
    features, _ = build_features(dataset, 100, tmp_path)
    original = np.array(features)
    soundfile.write(dataset.paths[3], np.random.default_rng(1).uniform(-1, 1, 44_100), 44_100)
    capsys.readouterr()
    changed = np.array(build_features(dataset, 100, tmp_path)[0])
    assert "built 1 of 50" in capsys.readouterr().out
    assert [i for i in range(50) if not np.array_equal(changed[i], original[i])] == [3]


def test_only_what_changed_is_built(tmp_path, capsys, monkeypatch):
    dataset, cache = make_clips(tmp_path / "clips", *numbered(70)), tmp_path / "cache"
    before = np.array(build_features(dataset, 30, cache)[0])
    new = write_sound(dataset.root / "new.wav")
    dataset = replace(
        dataset, paths=[new, *dataset.paths], labels=[0, *dataset.labels]
    )  # every other clip moves by one
    capsys.readouterr()
    after, _ = build_features(dataset, 30, cache)
    assert "built 1 of 71 clips" in capsys.readouterr().out
    assert np.array_equal(after[1:], before) and after[0].std() > 0.1
    monkeypatch.setattr(data, "MEAN", 0.0)  # another front end: none of them can stay
    shifted, _ = build_features(dataset, 30, cache)
    assert "built 71 of 71 clips" in capsys.readouterr().out
    assert shifted.astype(np.float32).mean() < after.astype(np.float32).mean() - 0.4


def test_clips_of_one_name_keep_their_own_features(tmp_path):
    """In GSC the files of a speaker have one name for every word, one size and one date."""
    sounds = make_clips(tmp_path / "source", *numbered(2))
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
    dataset = make_clips(tmp_path / "clips", *numbered(3))
    build_features(dataset, 30, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    relative = Dataset(
        "clips", Path("clips"), ["a", "b"], sorted(Path("clips").iterdir()), [0] * 3, {}
    )
    build_features(relative, 30, Path("cache"))
    assert "built" not in capsys.readouterr().out


def test_a_file_that_is_not_whole_is_built_again(tmp_path, capsys):
    dataset, cache = make_clips(tmp_path / "clips", *numbered(3)), tmp_path / "cache"
    whole = np.array(build_features(dataset, 30, cache)[0])
    file = cache_of(dataset, cache)
    content = file.read_bytes()
    for length in (0, 100, 1000, len(content) - 1):
        file.write_bytes(content[:length])
        capsys.readouterr()
        assert np.array_equal(build_features(dataset, 30, cache)[0], whole)
        assert "built 3 of 3" in capsys.readouterr().out and file.read_bytes() == content


def test_a_row_without_its_key_is_built_again(tmp_path, capsys):
    """The key is written last: what was killed before has no key, or an old one."""
    dataset, cache = make_clips(tmp_path / "clips", *numbered(3)), tmp_path / "cache"
    build_features(dataset, 30, cache)
    file = cache_of(dataset, cache)
    content = file.read_bytes()
    for key in (0, 1):
        rows = writable_rows(file, row_type((30, 128)), 3)
        rows["key"][1] = key
        rows["features"][1] = 7
        del rows
        capsys.readouterr()
        build_features(dataset, 30, cache)
        assert "built 1 of 3" in capsys.readouterr().out and file.read_bytes() == content


def test_a_complete_file_is_only_read(tmp_path, monkeypatch, capsys):
    """Somebody else's cache may be read-only: there is nothing to lock and nothing to write."""
    dataset, cache = make_clips(tmp_path / "clips", *numbered(3)), tmp_path / "cache"
    whole = np.array(build_features(dataset, 30, cache)[0])
    file = cache_of(dataset, cache)
    file.with_name(file.name + ".lock").unlink()
    file.chmod(0o444)
    file.parent.chmod(0o555)
    monkeypatch.setattr("sounds.cache.locked", lambda path: pytest.fail("locked"))
    features, bad = build_features(dataset, 30, cache)
    assert np.array_equal(features, whole) and not bad
    file.parent.chmod(0o755)
    file.unlink()  # what has been mapped stays
    assert np.array_equal(features, whole)


@pytest.mark.parametrize("length", [None, 0, 100])
def test_a_file_that_changes_while_it_is_opened_is_built_again(
    tmp_path, monkeypatch, capsys, length
):
    """Deleted or shortened by another program, after it was asked for its size."""
    dataset, cache = make_clips(tmp_path / "clips", *numbered(3)), tmp_path / "cache"
    whole = np.array(build_features(dataset, 30, cache)[0])
    file = cache_of(dataset, cache)
    memmap = np.memmap

    def change_and_map(path, *args, **options):
        if path == file and length is None:
            file.unlink(missing_ok=True)
        elif path == file:
            os.truncate(file, length)
        return memmap(path, *args, **options)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(np, "memmap", change_and_map)
        with pytest.raises(UserError, match="was deleted as soon as it was written"):
            build_features(dataset, 30, cache)
    assert "built 3 of 3" in capsys.readouterr().out
    assert np.array_equal(build_features(dataset, 30, cache)[0], whole)


def test_a_disk_that_is_full_leaves_no_file_of_rows(tmp_path):
    """It would be gone on with, and have no place for its rows; and the error says which disk."""

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))  # bytes
    try:
        with pytest.raises(OSError, match="File too large") as error:
            writable_rows(tmp_path / "x.rows", row_type((3,)), 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.filename == str(tmp_path / "x.rows") and not list(tmp_path.iterdir())


def test_a_cache_file_of_something_else_is_built_again(tmp_path, capsys):
    dataset = make_clips(tmp_path / "sounds", "one.wav", "two.wav")
    file = cache_of(dataset, tmp_path)
    file.parent.mkdir()
    for count in (99, 2 * ROW.itemsize):
        file.write_bytes(b"x" * count)
        features, bad = build_features(dataset, 30, tmp_path)
        assert features.any() and not bad
        assert "built 2 of 2 clips" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- bad clips


def test_bad_clips_are_all_listed_or_left_out(tmp_path, capsys):
    dataset = load_dataset("esc10", make_esc50(tmp_path / "data"), tmp_path)
    make_bad_files(tmp_path / "bad")
    for path, name in zip(
        dataset.paths, ("silent.wav", "nan.wav", "empty.wav", "text.wav"), strict=False
    ):
        (tmp_path / "bad" / name).replace(path)
    with pytest.raises(UserError, match="4 of 50 sound files cannot be used"):
        build_features(dataset, 100, tmp_path)
    listing = capsys.readouterr().err
    assert all(str(path) in listing for path in dataset.paths[:4]) and "not finite" in listing
    _, bad = build_features(dataset, 100, tmp_path, skip_bad=True)
    assert bad.keys() == {0, 1, 2, 3} and "not finite" in bad[1]


def test_a_file_that_can_be_read_again_is_no_longer_bad(tmp_path, monkeypatch):
    dataset, cache = make_clips(tmp_path / "clips", *numbered(3)), tmp_path / "cache"

    def fails(*args, **options):
        raise ValueError("the disk is away")

    with monkeypatch.context() as patch:
        patch.setattr(data, "read_audio", fails)
        with pytest.raises(UserError, match="3 of 3 sound files"):
            build_features(dataset, 30, cache)
    features, bad = build_features(dataset, 30, cache)
    assert not bad and (features.reshape(3, -1).std(axis=1) > 0.1).all()


# ---------------------------------------------------------------------------------- how it is built


def build_slowly(dataset: Dataset, cache: Path) -> None:
    data.read_audio = lambda *args, **options: (time.sleep(0.02), read_audio(*args, **options))[1]
    build_features(dataset, 30, cache)


def test_a_killed_build_goes_on_where_it_was(tmp_path, capsys):
    dataset, cache = make_clips(tmp_path / "clips", *numbered(400)), tmp_path / "cache"
    process = multiprocessing.get_context("spawn").Process(
        target=build_slowly, args=(dataset, cache)
    )
    process.start()
    built = 0
    while built < 130:
        time.sleep(0.02)
        assert process.is_alive()
        for partial in (cache / "features").glob("*.partial"):
            built = np.count_nonzero(open_rows(partial, row_type((30, 128)), 400)["key"])
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not list((cache / "features").glob("*.rows"))
    features, _ = build_features(dataset, 30, cache)
    output = capsys.readouterr().out
    missing = int(output.split(" of 400 clips")[0].split("built ")[-1])
    assert 0 < missing <= 400 - built
    fresh, _ = build_features(dataset, 30, tmp_path / "other")
    assert np.array_equal(features, fresh)
    assert not list((cache / "features").glob("*.partial"))


def test_a_build_that_cannot_be_renamed_leaves_no_half_file(tmp_path, monkeypatch, capsys):
    dataset = make_clips(tmp_path / "sounds", "one.wav", "two.wav")
    rename = os.replace

    def full(source, target):
        if target == cache_of(dataset, tmp_path):
            raise OSError(28, "No space left on device")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            build_features(dataset, 30, tmp_path)
    assert not cache_of(dataset, tmp_path).exists()
    build_features(dataset, 30, tmp_path)
    assert "built 0 of 2 clips" in capsys.readouterr().out  # it had only to be renamed


def build_in_process(root, cache, results):
    features, _ = build_features(load_dataset("esc10", root, cache), 100, cache)
    results.put(float(np.abs(np.array(features, dtype=np.float64)).sum()))


def test_two_processes_build_one_cache(esc50_dir, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=build_in_process, args=(esc50_dir, tmp_path, results))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    sums = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sums[0] == sums[1] and [worker.exitcode for worker in workers] == [0, 0]
    assert len(list((tmp_path / "features").glob("*.rows"))) == 1


def silent_clips(folder: Path) -> Dataset:
    """Two WAV files written without soundfile."""
    folder.mkdir()
    for name in ("one.wav", "two.wav"):
        with wave.open(str(folder / name), "wb") as file:
            file.setparams((1, 2, 16_000, 4800, "NONE", "not compressed"))
            file.writeframes(bytes(9600))
    return Dataset(
        "clips", folder, ["a", "b"], [folder / "one.wav", folder / "two.wav"], [0, 1], {}
    )


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


def test_building_shows_its_progress(tmp_path):
    with redirect_stderr(Terminal()) as shown:
        build_features(make_clips(tmp_path / "sounds", "one.wav", "two.wav"), 30, tmp_path)
    assert "features of clips: 100%" in shown.getvalue() and "2/2" in shown.getvalue()


def test_memory_does_not_grow_with_the_number_of_clips(tmp_path):
    dataset = make_clips(tmp_path / "clips", *numbered(20))
    many = Dataset("many", dataset.root, dataset.classes, dataset.paths * 30, [0] * 600, {})
    tracemalloc.start()
    features, _ = build_features(many, 100, tmp_path / "cache")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert features.nbytes > 15e6 and peak < 6e6
