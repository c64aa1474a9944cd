"""Decoding: every format, rate and name gives the right samples, or a reason why not; how long
sounds are."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from helpers import build_features, make_bad_files, save_random, write_sound

from data import Dataset, fbank
from sounds.audio import (
    DENSE,
    files_in,
    length_of,
    lengths_of,
    read_audio,
    stream_audio,
    typical_seconds,
)
from tools import predict

SECONDS = 1.5


def sound(rate: int, seconds: float = SECONDS) -> np.ndarray:
    """A harmonic tone that rises and falls, below 3.5 kHz, the same at every rate: (samples,)."""
    time = np.arange(round(rate * seconds)) / rate
    phase = 2 * np.pi * (220 * time + 30 * np.sin(2 * np.pi * time))
    return sum(0.3 / k * np.sin(k * phase) for k in range(1, 9)) * (0.6 + 0.4 * np.cos(5 * time))


def write(
    path: Path, rate: int = 44_100, channels: int = 1, seconds: float = SECONDS, **options
) -> Path:
    soundfile.write(path, np.stack([sound(rate, seconds)] * channels, axis=1), rate, **options)
    return path


def distance(path: Path, original: Path) -> float:
    """Mean difference of the log-Mel values that are within 40 dB of the loudest one of their
    frame, in dB."""
    ours, reference = (
        fbank(torch.from_numpy(read_audio(file))[None])[0].numpy() for file in (path, original)
    )
    assert abs(len(ours) - len(reference)) <= 10  # ADPCM fills its last block of 93 ms
    frames = min(len(ours), len(reference))
    ours, reference = ours[:frames], reference[:frames]
    audible = reference > reference.max(axis=1, keepdims=True) - 40 / 10 * math.log(10)
    return float(np.abs(ours - reference)[audible].mean()) * 10 / math.log(10)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("original") / "original.wav", subtype="PCM_16")


# --------------------------------------------------------------------------------- what can be read


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
    waves = np.stack(
        [sound(16_000), np.zeros(len(sound(16_000)))], axis=1
    )  # one silent channel: half the amplitude
    soundfile.write(tmp_path / "half.wav", waves, 16_000, subtype="FLOAT")
    assert np.abs(read_audio(tmp_path / "half.wav") - sound(16_000) / 2).max() < 1e-6


def test_read_audio_mixes_down_and_resamples(tmp_path):
    time = np.arange(44_100) / 44_100
    stereo = np.stack([np.sin(2 * np.pi * 440 * time), np.zeros(44_100)], axis=1)
    soundfile.write(tmp_path / "a.flac", stereo, 44_100)
    wave = read_audio(tmp_path / "a.flac")
    assert wave.dtype == np.float32 and len(wave) == 16_000
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert np.abs(wave - expected)[200:-200].max() < 1e-3
    assert len(read_audio(tmp_path / "a.flac", seconds=0.25)) == 4000


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.aiff"])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_a_piece_is_what_is_there_in_the_whole(tmp_path, name, rate):
    """But for its ends, where the resampling filter has heard no more."""
    soundfile.write(tmp_path / name, sound(rate, 3), rate)
    whole, piece = read_audio(tmp_path / name), read_audio(tmp_path / name, 0.75, 1.5)
    assert len(piece) == 12_000
    assert np.abs(piece - whole[24_000:36_000])[100:-100].max() < 2e-3
    assert len(read_audio(tmp_path / name, start=2.5)) == pytest.approx(
        8000, abs=4000 if name == "a.mp3" else 1
    )
    with pytest.raises(ValueError, match=r"ends after 3\.\d\d s, and its clip starts at 4 s"):
        read_audio(tmp_path / name, 1, 4)


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_blocks_of_an_mp3_join(tmp_path, rate):
    """Ten seconds are read at a time."""
    soundfile.write(tmp_path / "a.mp3", sound(rate, 21), rate)
    expected = soundfile.read(tmp_path / "a.mp3", dtype="float32")[0]
    expected = expected if rate == 16_000 else soxr.resample(expected, rate, 16_000)
    assert np.abs(read_audio(tmp_path / "a.mp3") - expected).max() < 2e-3


def test_five_formats(tmp_path, capsys):
    """The same sound in each, through `tools.predict`; lossy ones come close."""
    formats = {
        "wav": "PCM_16",
        "flac": "PCM_24",
        "ogg": "VORBIS",
        "mp3": "MPEG_LAYER_III",
        "aiff": "FLOAT",
    }
    save_random(tmp_path / "fold1.safetensors", "convpass_houlsby_par")
    files = [
        write(tmp_path / f"sound.{suffix}", channels=2, seconds=1, subtype=formats[suffix])
        for suffix in formats
    ]
    assert (
        predict.main(
            [str(word) for word in (tmp_path / "fold1.safetensors", *files, "--top", 4, "--json")]
        )
        == 0
    )
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(row["file"]).suffix[1:] for row in found] == list(formats)
    scores = [{entry["class"]: entry["probability"] for entry in row["classes"]} for row in found]
    for row, tolerance in zip(scores, (0.02, 1e-3, 0.2, 0.2, 1e-3), strict=True):
        assert len(row) == 4 and max(abs(row[name] - scores[1][name]) for name in row) <= tolerance


@pytest.mark.parametrize(
    "name", ["with space.wav", "Vögel & 鳥.wav", "quote'\".wav", os.fsdecode(b"latin-\xe9.wav")]
)
def test_odd_names(tmp_path, original, name):
    folder = tmp_path / Path(name).stem
    folder.mkdir()
    shutil.copy(original, folder / name)
    dataset = Dataset("odd", tmp_path, ["a", "b"], [folder / name], [0], {})
    features, bad = build_features(dataset, 100, tmp_path / "cache")
    assert not bad and features.std() > 0.1


def test_sounds_in_folders_that_are_linked_to(tmp_path):
    """Each once, by the first way to it; links that lead in a circle and hidden ones lead
    nowhere."""
    for name in (
        "my/a/1.wav",
        "my/z/2.wav",
        "my/z/.old/3.wav",
        "disk/4.wav",
        "disk/deep/5.txt",
        "6.wav",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    links = {
        "b": "my/z",
        "more": "disk",
        "again": "disk/deep",
        "a/back": "my/a",
        "z/up": "my",
        ".hidden": "disk",
    }
    for name, target in links.items():
        (tmp_path / "my" / name).symlink_to(tmp_path / target)
    names = [
        [file.relative_to(tmp_path / "my").as_posix() for file in files]
        for files in files_in(tmp_path / "my")
    ]
    assert names == [["a/1.wav", "b/2.wav", "more/4.wav"], ["again/5.txt"]]


def test_wav_written_into_a_pipe(tmp_path, original):
    """Such a header claims the greatest length it can: no truncated file."""
    content = bytearray(original.read_bytes())
    size = content.index(b"data") + 4
    content[4:8] = content[size : size + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "pipe.wav").write_bytes(content)
    assert distance(tmp_path / "pipe.wav", original) == 0


# --------------------------------------------------------------------------------- how much is read


def test_only_what_is_needed_is_read(tmp_path):
    """A long recording costs no more than a clip, and what is missing behind it does no harm."""
    path = write(tmp_path / "long.wav", rate=16_000, seconds=60)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    assert np.abs(read_audio(path, seconds=2) - sound(16_000, 60)[:32_000]).max() < 1e-4
    with pytest.raises(ValueError, match=r"truncated: it ends after 30\.0"):
        read_audio(path)


@pytest.mark.parametrize("rate", [16_000, 44_100, 8_000])
def test_reading_in_blocks_changes_nothing(rate, tmp_path):
    """Three blocks against the whole file at once, bit for bit."""
    file = write(tmp_path / "long.wav", rate, 2, 25.3)
    samples, _ = soundfile.read(file, dtype="float32")
    blocks = list(stream_audio(file))
    assert len(blocks) >= 3 and all(len(block) <= 160_100 for block in blocks)
    expected = (
        samples.mean(axis=1)
        if rate == 16_000
        else soxr.resample(samples.mean(axis=1), rate, 16_000)
    )
    assert np.array_equal(np.concatenate(blocks), expected)


@pytest.mark.parametrize(("missing", "whole"), [(0.09, True), (0.11, False)])
def test_a_tenth_of_a_second_may_be_missing(tmp_path, missing, whole):
    path = write_sound(tmp_path / "cut.wav", seconds=1)
    os.truncate(path, path.stat().st_size - 2 * round(missing * 16_000))
    if whole:
        assert len(read_audio(path)) == 16_000 - round(missing * 16_000)
    else:
        with pytest.raises(
            ValueError, match=r"is truncated: it ends after 0\.89 s, before it should"
        ):
            read_audio(path)
    assert len(read_audio(path, 0.95)) == min(
        15_200, 16_000 - round(missing * 16_000)
    )  # 0.06 s of these are missing


# --------------------------------------------------------------------------- what the numbers mean


@pytest.mark.parametrize("peak", [1e-4, 1, 1.5, 4, 60.5])
def test_floats_may_exceed_1(tmp_path, peak):
    """As the sum of several sounds does."""
    wave = peak * sound(16_000) / np.abs(sound(16_000)).max()
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype="FLOAT")
    assert np.abs(read_audio(tmp_path / "a.wav")).max() == pytest.approx(peak)


@pytest.mark.parametrize("samples", [[0, 1, 2, -3], [0.5, 100.5], [-1000.25, 0]])
def test_numbers_that_are_no_samples(tmp_path, samples):
    """Whole numbers of a quiet sound, or any far above 1. They may come late in the file."""
    late = np.concatenate([np.zeros(11 * 8000), np.tile(samples, 100)])
    soundfile.write(tmp_path / "a.wav", late, 8000, subtype="FLOAT")
    assert not read_audio(tmp_path / "a.wav", 5).any()
    with pytest.raises(ValueError, match=rf"peak of {max(map(abs, samples)):,.0f}, but"):
        read_audio(tmp_path / "a.wav")


def test_channels_that_cancel_each_other(tmp_path):
    """One is the other upside down. A weaker one, or noise of its own, leaves sound enough."""
    wave = sound(16_000)
    noise = np.random.default_rng(0).standard_normal((2, len(wave)))
    for channels, is_refused in (
        ((wave, -wave), True),
        ((wave, -0.99 * wave), True),
        ((wave, -0.9 * wave), False),
        ((wave, -wave, 0.5 * wave), False),
        (0.1 * noise, False),
        (1e-4 * np.stack([wave, -wave]), False),  # as good as silent
    ):
        soundfile.write(tmp_path / "a.wav", np.stack(channels, axis=1), 16_000, subtype="FLOAT")
        if is_refused:
            with pytest.raises(ValueError, match="cancel each other"):
                read_audio(tmp_path / "a.wav")
        else:
            mean = np.mean(channels, axis=0)
            assert np.abs(read_audio(tmp_path / "a.wav") - mean).max() < 1e-6


# ------------------------------------------------------------------------------ what cannot be read


def test_each_bad_file_has_its_reason(tmp_path):
    for name, reason in make_bad_files(tmp_path).items():
        with pytest.raises(ValueError, match=reason) as error:
            read_audio(tmp_path / name)
        assert "\n" not in str(error.value) and len(str(error.value)) > 8, name


# ------------------------------------------------------------------------------ how long sounds are


def test_a_sound_that_does_not_say_its_length_does_not_count(tmp_path):
    """A FLAC file written into a pipe has a zero where others have the number of their samples."""
    paths = [write_sound(tmp_path / name, seconds=1) for name in ("a.wav", "pipe.flac")]
    content = bytearray(paths[1].read_bytes())
    content[21:26] = bytes([content[21] & 0xF0, 0, 0, 0, 0])
    paths[1].write_bytes(content)
    assert typical_seconds(lengths_of(paths, {})) == pytest.approx(1.0)


def test_the_typical_length(tmp_path):
    """The 95th percentile, which lies between the neighbours; 10.24 s where no file says how long
    it is."""
    paths = [
        write_sound(tmp_path / f"{i}.wav", seconds=seconds) for i, seconds in enumerate((0.1, 0.2))
    ]
    assert typical_seconds(lengths_of(paths, {})) == pytest.approx(0.195)
    assert typical_seconds(lengths_of([tmp_path / "absent.wav"], {})) == 10.24


def test_a_header_of_years(tmp_path):
    """A damaged FLAC header may say years, which would be millions of windows. Silence is as dense.

    The number of samples is the last 36 bits of the first 26 bytes.
    """
    file = tmp_path / "a.flac"
    soundfile.write(file, np.zeros(160_000), 16_000)
    assert DENSE * file.stat().st_size < 160_000
    assert length_of(file) == 10
    assert len(read_audio(file)) == 160_000
    content = bytearray(file.read_bytes())
    content[21] |= 15
    file.write_bytes(content)
    assert math.isnan(length_of(file))
    with pytest.raises(ValueError, match=r"is damaged: its header says 4,026,542 s"):
        read_audio(file)
