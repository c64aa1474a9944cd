"""Answers that are unsure, events, label tracks, embeddings, and the same from Python; numbers typed by hand."""

import json
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import constant, of_run, save_random, write_sound

import data
from sounds.audio import read_audio
from support.command import UserError
from tools import predict
from tools.answers import Answer, events_of
from tools.predict import load

FACTS = {"temperature": 2.0, "min_confidence": 0.6, "whitening": [[0.0] * 2] * 2, "centres": [[0.0] * 2]}


@pytest.fixture
def answer(capsys):
    """Runs `tools.predict`; returns its lines, and checks its exit code."""

    def call(*words, code: int = 0) -> list[str]:
        capsys.readouterr()
        assert predict.main([str(word) for word in words]) == code
        return capsys.readouterr().out.splitlines()

    return call


@pytest.fixture
def error(capsys):
    """Runs `tools.predict`; returns the one line it ends with."""

    def call(*words) -> str:
        assert predict.main([str(word) for word in words]) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1
        return err

    return call


# ---------------------------------------------------------------------------------------------------------- unsure


def test_unsure_is_the_first_answer_in_every_form(tmp_path, answer):
    """Of 0.8 and 0.2 a temperature of 2 makes 2/3 and 1/3; what is told of a class does not change."""
    fold = constant(tmp_path / "fold1.safetensors", 0.8, 0.2, classes=["a", "b"], calibration=FACTS)
    file = write_sound(tmp_path / "x.wav")
    words = [fold, file, "--min-confidence", 0.7]
    assert answer(fold, file)[0].endswith("0.30 s  a 0.667  b 0.333")  # 0.6 by the header
    assert answer(*words)[0].endswith("0.30 s  unsure 0.667  a 0.667  b 0.333")
    assert [row["class"] for row in json.loads(answer(*words, "--json")[0])["classes"]] == ["unsure", "a", "b"]
    rows = [line.split(",")[4:7] for line in answer(*words, "--csv", "--windows")[1:]]
    window = [["1", "unsure", "0.666667"], ["2", "a", "0.666667"]]
    assert rows == [*window, *window, ["3", "b", "0.333333"]]
    assert answer(*words, "--csv", "--events") == ["file,what,start,end,rank,class,probability,error"]
    assert answer(fold, file, "--csv", "--events")[1:] == [f"{file},event,0.000,0.300,1,a,0.666667,"]


def test_what_is_far_from_every_class_is_unsure(tmp_path):
    """Squared distance d of the logits, log 0.8 and log 0.2, from the only centre: the probability times exp(1 - d)."""
    far = {**FACTS, "whitening": [[1.0, 0.0], [0.0, 1.0]]}
    fold = constant(tmp_path / "fold1.safetensors", 0.8, 0.2, calibration=far)
    found = load(fold)(np.zeros(8000), 16_000)
    d = np.log(0.8) ** 2 + np.log(0.2) ** 2
    assert found.confidence == pytest.approx(2 / 3 * np.exp(1 - d), rel=1e-5)
    assert found.best == "unsure" and found.classes[0][0] == "class 0"


def test_folds_have_their_own_temperatures(tmp_path):
    """Probabilities, confidence and the least confidence are the means of theirs; one without them has 1 and 0."""
    constant(tmp_path / "fold1.safetensors", 0.8, 0.2, classes=["a", "b"], calibration=FACTS, **of_run(1))
    constant(tmp_path / "fold2.safetensors", 0.9, 0.1, classes=["a", "b"], **of_run(2))
    classify = load(tmp_path)
    assert classify.min_confidence == 0.3
    found = classify(np.zeros(8000), 16_000)
    assert dict(found.classes) == {"a": pytest.approx((2 / 3 + 0.9) / 2), "b": pytest.approx((1 / 3 + 0.1) / 2)}


# ------------------------------------------------------------------------------------------------------ from Python


def test_from_python(tmp_path, answer):
    """The same as by the command, from a file and from samples at another rate and with two channels."""
    save_random(tmp_path / "fold1.safetensors", "lora")
    file = write_sound(tmp_path / "x.wav", 3, rate=44_100, seconds=2.0, channels=2)
    classify = load(str(tmp_path / "fold1.safetensors"))
    found, other = classify(str(file)), classify(soundfile.read(file)[0], 44_100)
    (line,) = answer(tmp_path / "fold1.safetensors", file, "--json", "--top", 4)
    told = [(row["class"], row["probability"]) for row in json.loads(line)["classes"]]
    for each in (found, other):
        assert [name for name, _ in each.classes] == [name for name, _ in told] and each.best == told[0][0]
        assert [p for _, p in each.classes] == pytest.approx([p for _, p in told], abs=1e-4)
        assert (each.what, each.start, each.end, each.unsure) == ("file", 0.0, 2.0, False)
        assert each.confidence == each.classes[0][1]
    assert found.file == file and other.file is None
    *windows, whole = classify.listen([str(file)], hop=0.3)
    assert [window.start for window in windows] == pytest.approx([0, 0.3, 0.6, 0.9, 1.2, 1.38])
    assert whole.classes == found.classes[:3]


def test_each_sound_has_its_own_answer(tmp_path):
    """Also arrays, which have no name, and a file that comes twice."""
    save_random(tmp_path / "fold1.safetensors", "lora")
    classify, file = load(tmp_path / "fold1.safetensors"), write_sound(tmp_path / "x.wav", seconds=0.9)
    waves = [read_audio(file), read_audio(write_sound(tmp_path / "y.wav", 3, seconds=0.9))]
    one, two = ([*classify.listen([wave])] for wave in waves)
    assert one[-1].classes != two[-1].classes
    for sounds, expected in ((waves, one + two), ([file, file], 2 * [*classify.listen([file])])):
        found = [*classify.listen(sounds)]
        assert [answer.what for answer in found] == ["window", "window", "file"] * 2
        assert [(a.start, a.end) for a in found] == [(a.start, a.end) for a in expected]
        for answer, alone in zip(found, expected, strict=True):
            assert dict(answer.classes) == pytest.approx(dict(alone.classes), abs=1e-5)


def test_sounds_that_are_none(tmp_path):
    classify = load(constant(tmp_path / "fold1.safetensors", 0.5, 0.5))
    with pytest.raises(ValueError, match=r"absent\.wav: No such file or directory"):
        classify(tmp_path / "absent.wav")
    for samples in (np.zeros(0), [np.nan, 0], np.zeros((2, 2, 2))):
        with pytest.raises(ValueError, match="no sound"):
            classify(samples, 16_000)
    for samples in (np.array([0, 32_767], np.int16), np.ones((2, 16_000))):  # of a 16-bit file; (channels, samples)
        with pytest.raises(ValueError, match=r"no sound: (int16|float64) .*; give floats in \[-1, 1\], \(samples,\)"):
            classify(samples, 16_000)
        (answer,) = classify.listen([samples])
        assert answer.error.startswith("no sound")
    assert classify(np.zeros((3, 2)), 16_000).end == classify(np.zeros((3, 8)), 16_000).end  # short, of many channels
    with pytest.raises(ValueError, match="samples need a rate"):
        classify(np.zeros(16_000))
    for rate in (0, 1e-9, 1e12, np.nan):
        with pytest.raises(ValueError, match="no sound"):
            classify(np.ones(9), rate)
    with pytest.raises(UserError, match="no such run"):
        load(tmp_path / "absent")


# ----------------------------------------------------------------------------------------------------------- events


def windows(text: str, file: str = "x.wav", hop: float = 0.5, length: float = 1.0) -> list[Answer]:
    """A letter for each window: its class, with 0.9; small, with 0.4; ? for one that is unsure. Then the whole."""
    made = [
        Answer(Path(file), "window", i * hop, i * hop + length, ((c.upper(), 0.9 if c.isupper() else 0.4),),
               unsure=c == "?")
        for i, c in enumerate(text)
    ]  # fmt: skip
    return [*made, Answer(Path(file), "file", 0.0, made[-1].end, made[-1].classes)]


def told(answers) -> list[tuple]:
    return [(e.best, e.start, e.end, round(e.classes[0][1], 6)) for e in answers if e.what == "event"]


def test_events_by_hand():
    """Windows of a second every half: each speaks for the half second in its middle, the first and last for more."""
    found = [*events_of(windows("AABbB?CCa"), 0.5, 0.0)]
    assert told(found) == [
        ("A", 0.0, 1.25, 0.9), ("B", 1.25, 1.75, 0.9), ("B", 2.25, 2.75, 0.9), ("C", 3.25, 4.25, 0.9),
    ]  # fmt: skip
    assert found[-1].what == "file" and len(found) == 5
    assert told(events_of(windows("AABbB?CCa"), 0.4, 0.0)) == [
        ("A", 0.0, 1.25, 0.9), ("B", 1.25, 2.75, pytest.approx(2.2 / 3, abs=1e-6)), ("C", 3.25, 4.25, 0.9),
        ("A", 4.25, 5.0, 0.4),
    ]  # fmt: skip
    assert told(events_of(windows("AABbB?CCa"), 0.5, 1.0)) == [("A", 0.0, 1.25, 0.9), ("C", 3.25, 4.25, 0.9)]
    assert told(events_of(windows("A"), 0.5, 1.0)) == [("A", 0.0, 1.0, 0.9)]


def test_events_do_not_cross_files_and_errors_follow():
    broken = Answer(Path("y.wav"), "file", error="is truncated")
    answers = [*windows("BA"), *windows("AA", "y.wav")[:-1], broken, *windows("A", "z.wav")]
    found = [*events_of(answers, 0.5, 0.0)]
    assert [(str(e.file), e.what, e.start, e.end) for e in found] == [
        ("x.wav", "event", 0.0, 0.75), ("x.wav", "event", 0.75, 1.5), ("x.wav", "file", 0.0, 1.5),
        ("y.wav", "event", 0.0, 1.5), ("y.wav", "file", 0.0, 0.0), ("z.wav", "event", 0.0, 1.0),
        ("z.wav", "file", 0.0, 1.0),
    ]  # fmt: skip


def test_events_of_the_same_file_twice():
    once = told(events_of(windows("ABA"), 0.5, 0.0))
    assert told(events_of(windows("ABA") + windows("ABA"), 0.5, 0.0)) == 2 * once


def test_events_come_as_they_are_heard():
    """However long a recording is: an event is told two windows after its end, and only its sums are kept till then."""
    pulled = []

    def forever():
        for i, c in enumerate(cycle("AAAB")):
            pulled.append(i)
            yield Answer(Path("x.wav"), "window", i * 0.5, i * 0.5 + 1, ((c, 0.9),))

    for k, event in enumerate(islice(events_of(forever(), 0.5, 1.0), 1000)):
        assert (event.best, event.start, event.end) == ("A", 2 * k + 0.25 if k else 0.0, 2 * k + 1.75)
        assert len(pulled) <= 4 * k + 5


def test_label_tracks(tmp_path, answer, capsys):
    """Beside each recording that can be read, by a name that no other program uses; a second time over the first."""
    fold = constant(tmp_path / "fold1.safetensors", 0.9, 0.1, classes=["one\tthing", "b"])
    file = write_sound(tmp_path / "sounds" / "a.wav", seconds=2.0)
    cut = write_sound(tmp_path / "sounds" / "b.wav", seconds=20.0)
    cut.write_bytes(cut.read_bytes()[:-400_000])
    (tmp_path / "sounds" / "a.txt").write_text("mine")
    for _ in range(2):
        lines = answer(fold, tmp_path / "sounds", "--events", code=1)
        assert lines == [f"{file}.events.txt: 1 events"]
    assert Path(f"{file}.events.txt").read_text() == "0.000000\t2.000000\tone thing\n"
    found = sorted(path.name for path in (tmp_path / "sounds").iterdir())
    assert found == ["a.txt", "a.wav", "a.wav.events.txt", "b.wav"]
    rows = [json.loads(line) for line in answer(fold, file, "--events", "--json")]
    assert [(row["what"], row["start"], row["end"]) for row in rows] == [("event", 0.0, 2.0)]
    assert answer(fold, file, "--events", "--threshold", 0.95) == [f"{file}.events.txt: 0 events"]
    assert Path(f"{file}.events.txt").read_text() == ""


def test_options_that_cannot_be(tmp_path, error):
    fold, file = constant(tmp_path / "fold1.safetensors", 0.5, 0.5), write_sound(tmp_path / "a.wav")
    assert "--min-confidence: '1.5' is no number from 0 to 1" in error(fold, file, "--min-confidence", 1.5)
    assert "--threshold: 'nan' is no number from 0 to 1" in error(fold, file, "--events", "--threshold", "nan")
    assert "--min-length -1.0: give a number of seconds" in error(fold, file, "--events", "--min-length", -1)
    assert "--events cannot go with --windows" in error(fold, file, "--events", "--windows")
    assert "--events cannot go with --embeddings" in error(fold, file, "--events", "--embeddings", tmp_path / "x.npz")
    (tmp_path / "y.npz").mkdir()
    assert f"{tmp_path / 'y.npz'}: is there and no file" in error(fold, file, "--embeddings", tmp_path / "y.npz")
    content = file.read_bytes()  # where the name was forgotten, a sound stands there
    assert "--embeddings: give the name of a file" in error(fold, "--embeddings", file, file)
    assert file.read_bytes() == content


# ------------------------------------------------------------------------------------------------------- embeddings


def test_embeddings(tmp_path, answer):
    """What the heads of all folds read, of files or of windows, in the order of the output; files that cannot be read
    are left out."""
    files = {fold: tmp_path / "run" / f"fold{fold}.safetensors" for fold in (1, 2)}
    models = [save_random(file, "convpass_houlsby_par", **of_run(fold)) for fold, file in files.items()]
    file, other = write_sound(tmp_path / "a.wav", seconds=0.9), write_sound(tmp_path / "b.wav", seconds=0.4)
    (tmp_path / "bad.wav").write_text("no sound")
    words = [tmp_path / "run", file, tmp_path / "bad.wav", other, "--embeddings", tmp_path / "new" / "vectors.npz"]
    wave, spans = torch.from_numpy(read_audio(file)), [(0, 9840), (4480, 14_400)]
    with torch.no_grad():
        inputs = [data.to_input(data.fbank(wave[None, a:b]), 60) for a, b in spans]
        expected = np.stack([np.concatenate([m.vector(x)[0] for m in models]) for x in inputs])

    answer(*words, code=1)
    found = np.load(tmp_path / "new" / "vectors.npz")
    assert found["names"].tolist() == [str(file), str(other)] and found["vectors"].dtype == np.float32
    np.testing.assert_allclose(found["vectors"][0], expected.mean(0), atol=1e-5)
    assert found["end"].tolist() == [0.9, 0.4] and found["confidence"].shape == (2,)

    answer(*words, "--windows", "--min-confidence", 1, code=1)
    found = np.load(tmp_path / "new" / "vectors.npz")
    np.testing.assert_allclose(found["vectors"][:2], expected, atol=1e-5)
    assert found["start"].tolist() == [0, 0.28, 0] and found["classes"].tolist() == ["unsure"] * 3
    answer(tmp_path / "run", tmp_path / "bad.wav", "--embeddings", tmp_path / "none.npz", code=2)
    assert not (tmp_path / "none.npz").exists()
