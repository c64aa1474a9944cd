"""Files that hold more or less than their headers say: what is more is read, what is less is
refused."""

import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from helpers import write_sound

from sounds.audio import lengths_of, read_audio

DELAY = 576  # samples that an MP3 encoder puts first, as it says in its tag
NAMES = ["a.wav", "a.aiff", "a.au", "a.ogg", "a.opus", "a.mp3"]


def write(path: Path, seconds: float, rate: int = 16_000, **options) -> Path:
    """Noise that grows louder, so that every part of it is unlike every other."""
    if path.suffix == ".opus":
        options = {"format": "OGG", "subtype": "OPUS"}
    samples = round(rate * seconds)
    noise = np.random.default_rng(samples).standard_normal(samples)
    soundfile.write(path, 0.1 * noise * np.linspace(0.1, 1, samples), rate, **options)
    return path


def join(path: Path, *files: Path) -> Path:
    path.write_bytes(b"".join(file.read_bytes() for file in files))
    return path


def length(path: Path) -> float:
    return lengths_of([path], {})[0]


def pages_of(content: bytes) -> list[bytes]:
    return [b"OggS" + page for page in content.split(b"OggS")[1:]]


def untagged(mp3: bytes) -> bytes:
    """Without the first frame, in which its length is."""
    return mp3[mp3.index(mp3[:2], 2) :]


def wav(*chunks: tuple[bytes, bytes], rate: int = 16_000) -> bytes:
    """A WAV file of 16 bits by hand."""
    form = struct.pack("<HHIIHH", 1, 1, rate, 2 * rate, 2, 16)
    body = b"WAVE"
    for name, content in ((b"fmt ", form), *chunks):
        body += name + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(body)) + body


# -------------------------------------------------------------------------------------------- MP3


@pytest.mark.parametrize("is_loud_first", [True, False])
def test_an_mp3_that_does_not_say_its_length(tmp_path, is_loud_first, capfd):
    """Of variable bit rate. libsndfile takes all frames for as large as the first one."""
    noise = 0.3 * np.random.default_rng(0).standard_normal(32_000)
    samples = np.concatenate([noise, np.zeros(160_000)])
    samples = samples if is_loud_first else samples[::-1]
    soundfile.write(tmp_path / "tagged.mp3", samples, 16_000)
    path = tmp_path / "a.mp3"
    path.write_bytes(untagged((tmp_path / "tagged.mp3").read_bytes()))
    guess = soundfile.info(path).duration
    assert guess < 3 or guess > 18
    wave = read_audio(path)
    assert length(path) == pytest.approx(12, abs=0.1) and len(wave) == 16_000 * length(path)
    expected = read_audio(tmp_path / "tagged.mp3")
    assert np.abs(wave[DELAY:][: len(expected)] - expected[: len(wave) - DELAY]).max() < 1e-4
    piece = read_audio(path, 1, 1.5)
    assert np.abs(piece - wave[24_000:40_000])[100:-100].max() < 2e-3
    path.write_bytes(b"\0" * 3000 + path.read_bytes()[5000:])  # the end of a stream
    assert 7 < length(path) < 12 and len(read_audio(path)) == 16_000 * length(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("rate", [8_000, 16_000, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_an_mp3_with_a_tag_is_left_as_it_is(tmp_path, rate, channels):
    path = tmp_path / "a.mp3"
    noise = 0.1 * np.random.default_rng(0).standard_normal((2 * rate, channels))
    soundfile.write(path, noise, rate)
    expected = soundfile.read(path, dtype="float32", always_2d=True)[0].mean(axis=1)
    if rate != 16_000:
        expected = soxr.resample(expected, rate, 16_000)
    assert len(expected) == 32_000 and np.abs(read_audio(path) - expected).max() < 1e-6


def test_joined_mp3s_of_two_rates(tmp_path):
    for name, rate in (("1.mp3", 8_000), ("2.mp3", 48_000)):
        mp3 = write(tmp_path / name, 2, rate).read_bytes()
        (tmp_path / name).write_bytes(untagged(mp3))
    one, other = tmp_path / "1.mp3", tmp_path / "2.mp3"
    expected = np.concatenate([read_audio(one), read_audio(other)])
    assert len(expected) > 63_000
    assert np.array_equal(read_audio(join(tmp_path / "3.mp3", one, other)), expected)


def test_what_is_no_frame_in_an_mp3(tmp_path, capfd):
    """libmpg123 would give up, or write notes to stderr that name no file."""
    mp3 = write(tmp_path / "a.mp3", 2).read_bytes()
    expected = read_audio(tmp_path / "a.mp3")
    rng = np.random.default_rng(0)
    cover = b"ID3\4\0\0\0\1\0\0" + rng.bytes(1 << 14)
    path = tmp_path / "b.mp3"
    for content in (
        cover + mp3,
        mp3 + b"TAG" + bytes(125),
        mp3 + b"APETAGEX" + rng.bytes(3000),
        bytes(3000) + mp3,
        mp3 + bytes(50_000),
    ):
        path.write_bytes(content)
        assert np.array_equal(read_audio(path), expected)
    second = mp3.index(mp3[:2], len(mp3) // 2)
    path.write_bytes(mp3[:second] + cover + mp3[second:])
    assert np.array_equal(read_audio(path), expected)
    path.write_bytes(cover[:10] + b"\xff\xfb" + cover[12:])
    with pytest.raises(ValueError, match="not recognised"):
        read_audio(path)
    assert capfd.readouterr() == ("", "")


def test_a_wav_file_that_holds_an_mp3(tmp_path):
    path = tmp_path / "a.wav"
    mp3 = untagged(write(tmp_path / "a.mp3", 3).read_bytes())
    (tmp_path / "a.mp3").write_bytes(mp3)
    form = struct.pack("<HHIIHHHHIHHH", 0x55, 1, 16_000, 8000, 1, 0, 12, 1, 0, 144, 1, 0)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(mp3))
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body + mp3)) + body + mp3)
    assert np.array_equal(read_audio(path), read_audio(tmp_path / "a.mp3"))
    assert length(path) == pytest.approx(3, abs=0.1) and soundfile.info(path).duration != length(
        path
    )


# ------------------------------------------------------------------------------------- joined files


@pytest.mark.parametrize("name", ["a.ogg", "a.opus", "a.mp3"])
def test_joined_files_are_read_one_after_the_other(tmp_path, name):
    one = write(tmp_path / f"1{name}", 2.5)
    other = write(tmp_path / f"2{name}", 1.5, rate=24_000)
    assert len(read_audio(join(tmp_path / f"3{name}", one, one))) == 80_000
    path = join(tmp_path / name, one, one, other)
    expected = np.concatenate([read_audio(file) for file in (one, one, other)])
    assert np.array_equal(read_audio(path), expected)
    assert len(expected) == 104_000 and length(path) == 6.5
    for start in (0.5, 1.75, 3, 5.125):
        piece = read_audio(path, 1.25, start)
        assert len(piece) == 20_000
        inside = np.abs(piece - expected[round(16_000 * start) :][:20_000])[100:-100]
        assert np.median(inside) < 1e-3  # but where two sounds meet, or an encoder was flushed
    with pytest.raises(ValueError, match=r"ends after 6\.50 s, and its clip starts at 7 s"):
        read_audio(path, 1, 7)


@pytest.mark.parametrize("name", ["a.wav", "a.aiff", "a.au", "a.flac"])
@pytest.mark.parametrize("count", [2, 5])
def test_joined_files_of_samples_are_refused(tmp_path, name, count):
    """libsndfile would hear the first one alone, or headers as samples."""
    one = write(tmp_path / f"1{name}", 1.5)
    path = join(tmp_path / name, *count * [one])
    with pytest.raises(ValueError, match="is several files in one"):
        read_audio(path)
    assert np.isnan(length(path))


# ---------------------------------------------------------------------------------------- cut files


@pytest.mark.parametrize("name", [*NAMES, "a.rf64", "a.w64"])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_half_a_file_is_refused_where_it_ends(tmp_path, name, share):
    """What was asked for may lie before. Its length makes windows beyond its end, to be refused."""
    whole = write(tmp_path / name, 10).read_bytes()
    path = tmp_path / f"cut-{name}"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"truncated|lost sync"):
        read_audio(path)
    expected = read_audio(tmp_path / name, 1, 1)
    piece = read_audio(path, 1, 1)
    assert len(piece) == len(expected)
    if name.endswith(".mp3"):  # the tag that is wrong had the length of the encoder's delay as well
        assert np.abs(piece[DELAY:] - expected[:-DELAY])[100:-100].max() < 2e-3
    else:
        assert np.array_equal(piece, expected)
    with pytest.raises(ValueError, match=r"truncated|lost sync|ends after"):
        read_audio(path, 1, length(path) - 1)
    assert 10 * share - 2 < length(path) < 10


@pytest.mark.parametrize("name", ["a.ogg", "a.opus"])
def test_ogg_files_that_lack_pages(tmp_path, name):
    pages = pages_of(write(tmp_path / name, 10, rate=48_000).read_bytes())
    path = tmp_path / f"cut-{name}"
    path.write_bytes(b"".join(pages[:-2]))  # between two pages
    with pytest.raises(ValueError, match="truncated"):
        read_audio(path)
    path.write_bytes(b"".join(pages[:-3] + pages[-2:]))
    for seconds in (1, 20):
        with pytest.raises(ValueError, match="pages in its middle are missing"):
            read_audio(path, seconds)
    assert np.isnan(length(path))
    path.write_bytes(b"".join(pages[:2] + pages[4:]))  # a recorded stream, heard from then on
    assert 0 < length(path) < 9.5 and len(read_audio(path)) == round(16_000 * length(path))
    path.write_bytes(b"".join([*pages, pages[0][:40]]))  # joined with one of which little is left
    with pytest.raises(ValueError, match="truncated"):
        read_audio(path)
    path.write_bytes(b"".join(pages) + bytes(2000))
    assert np.array_equal(read_audio(path), read_audio(tmp_path / name))


# ----------------------------------------------------------------------------------- wrong headers


def test_a_recorder_that_was_switched_off(tmp_path):
    """It has written all samples, and left the lengths as they were at first."""
    path = tmp_path / "a.wav"
    samples = (10_000 * np.sin(np.arange(32_000) / 5)).astype("<i2")
    content = wav((b"LIST", b"INFO"), (b"data", samples.tobytes()))
    at = content.index(b"data") + 4
    for riff, data in ((0, 0), (36, 0), (at + 3996, 4000)):
        size = struct.pack("<I", riff)
        path.write_bytes(
            content[:4] + size + content[8:at] + struct.pack("<I", data) + content[at + 4 :]
        )
        assert np.array_equal(read_audio(path), samples / np.float32(32_768))
        assert length(path) == 2
    tag = (b"id3 ", bytes(200_000))  # more than the sound, and none
    path.write_bytes(wav((b"data", samples.tobytes()), tag))
    assert len(read_audio(path)) == 32_000 and length(path) == 2
    path.write_bytes(wav((b"data", samples.tobytes())) + bytes(5000))
    assert len(read_audio(path)) == 32_000 and length(path) == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (wav((b"data", bytes(4000)), rate=0), "no sample rate"),
        (wav((b"data", bytes(4000)), (b"data", bytes(4000))), "several chunks of samples"),
        (wav((b"data", bytes(4000)), rate=1), "says 1 samples a second"),
        (wav((b"data", bytes(2))), r"holds 6\.25e-05 s: a sound must last 0\.001 s"),
        (b"\0\0\0\x20ftypM4A ", r"perhaps ffmpeg -i IN OUT\.flac can read it"),
        (b".snd" + bytes(60), "cannot be read"),
        (b"RIFF" + bytes(4) + b"WAVE" + bytes(10**7), "cannot be read"),
        (b"fLaC" + bytes(60), "cannot be read"),
        (b"OggS", "cannot be read"),
    ],
)
def test_headers_that_cannot_be_right(tmp_path, content, reason):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("subtype", ["GSM610", "G721_32", "NMS_ADPCM_16"])
def test_wav_files_that_cannot_seek(tmp_path, subtype):
    path = write(tmp_path / "a.wav", 21, rate=16_000, subtype=subtype)
    expected = soundfile.read(path, 336_000, dtype="float32")[0]
    wave = read_audio(path)
    assert np.array_equal(wave[:336_000], expected) and len(wave) < 336_000 + 320
    assert np.array_equal(read_audio(path, 1, 15.5), wave[248_000:264_000])
    assert length(path) == len(wave) / 16_000


def test_lengths_of_sounds_in_order(tmp_path):
    """The pages and frames of a file are looked at again where it has changed."""
    path = write_sound(tmp_path / "a.mp3", seconds=1, subtype="MPEG_LAYER_III")
    assert length(path) == 1
    write_sound(path, seconds=2, subtype="MPEG_LAYER_III")
    assert length(path) == 2
