"""Answers that are unsure, events, label tracks, embeddings, and the same from Python.

The numbers are typed by hand.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import constant, of_run, save_random, write_sound

import data
from load_weights import load_trained
from sounds.audio import read_audio
from support.command import UserError
from tools import predict
from tools.answers import Answer, events_of
from tools.predict import load

FACTS = {  # the factor is 1
    "temperature": 2.0,
    "min_confidence": 0.6,
    "mean": [0.0] * 128,
    "std": [1.0] * 128,
    "directions": [[0] * 128],
    "alpha": 0.0,
    "limit": 1.0,
    "slope": 1.0,
}


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


# ------------------------------------------------------------------------------------------- unsure


def test_unsure_is_said_in_every_form(tmp_path, answer):
    """A temperature of 2 makes 2/3 and 1/3 of 0.8 and 0.2. For programs it is no class."""
    fold = constant(tmp_path / "fold1.safetensors", 0.8, 0.2, classes=["a", "b"], calibration=FACTS)
    file = write_sound(tmp_path / "x.wav")
    words = [fold, file, "--min-confidence", 0.7]
    assert answer(fold, file)[0].endswith("0.30 s  a 0.667  b 0.333")  # 0.6 by the header
    assert answer(*words)[0].endswith("0.30 s  unsure (confidence 0.667)  a 0.667  b 0.333")
    found = json.loads(answer(*words, "--json")[0])
    assert [row["class"] for row in found["classes"]] == ["a", "b"]
    assert (found["confidence"], found["unsure"]) == (0.666667, True)
    assert json.loads(answer(fold, file, "--json")[0])["unsure"] is False
    rows = [line.split(",")[3:] for line in answer(*words, "--csv")[1:]]
    assert rows == [
        ["1", "a", "0.666667", "0.666667", "yes"],
        ["2", "b", "0.333333", "0.666667", "yes"],
    ]
    header = "file,start,end,rank,class,probability,confidence,unsure"
    assert answer(*words, "--csv")[0] == header
    header = "file,start,end,class,probability"
    assert answer(*words, "--csv", "--events") == [header]
    expected = [header, f"{file},0.000,0.300,a,0.666667"]
    assert answer(fold, file, "--csv", "--events") == expected


def test_most_files_are_unsure(tmp_path, capsys):
    """One line at the end says how many, and what to do. Not for one file, nor for half of them."""
    fold = constant(tmp_path / "fold1.safetensors", 0.8, 0.2, classes=["a", "b"])
    files = [str(write_sound(tmp_path / f"{i}.wav")) for i in range(3)]

    def last_line(files, least):
        assert predict.main([str(fold), *files, "--min-confidence", least]) == 0
        return capsys.readouterr().err.splitlines()[-1:]

    (line,) = last_line(files, "0.9")
    assert line.startswith("warning: 3 of 3 files are unsure: they are unlike the sounds")
    assert last_line(files[:1], "0.9") == last_line(files, "0.7") == []


def test_what_is_unlike_the_validation_clips_is_unsure(tmp_path):
    """The confidence is the probability times exp((limit - score) / slope).

    The score is alpha times the length of the standardised middle without its first number, which
    is the only direction here, less log(0.8 + 0.2). The middle is that of the first of two blocks.
    """
    first = [[1000] + [0] * 127]
    far = {**FACTS, "std": [2.0] * 128, "directions": first, "alpha": 0.5, "slope": 3.0}
    fold = constant(tmp_path / "fold1.safetensors", 0.8, 0.2, calibration=far)
    wave = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    found = load(fold)(wave, 16_000)
    model = load_trained(fold)
    with torch.no_grad():
        x = data.to_input(data.fbank(torch.from_numpy(wave)[None]), 60)
        tokens = model.blocks[0](model.embed(x))[0].double().numpy()
    middle = np.concatenate([tokens.mean(0), tokens.std(0, ddof=1)])
    score = 0.5 * np.linalg.norm(middle[1:] / 2)
    assert score > 1
    assert found.confidence == pytest.approx(2 / 3 * np.exp((1 - score) / 3), rel=1e-4)
    assert found.best == "unsure" and found.classes[0][0] == "class 0"


def test_a_calibration_of_another_width_is_refused(tmp_path):
    narrow = {**FACTS, "mean": [0.0] * 3, "std": [1.0] * 3, "directions": [[0] * 3]}
    fold = constant(tmp_path / "fold1.safetensors", 0.8, 0.2, calibration=narrow)
    with pytest.raises(UserError, match=r"calibration\.mean: Expected 128 numbers, got 3"):
        load(fold)


def test_folds_have_their_own_temperatures(tmp_path):
    """Probabilities, confidence and the least confidence are the means over the folds.

    A fold without a temperature and a least confidence has 1 and 0.
    """
    constant(
        tmp_path / "fold1.safetensors", 0.8, 0.2, classes=["a", "b"], calibration=FACTS, **of_run(1)
    )
    constant(tmp_path / "fold2.safetensors", 0.9, 0.1, classes=["a", "b"], **of_run(2))
    classify = load(tmp_path)
    assert classify.min_confidence == 0.3
    found = classify(np.zeros(8000), 16_000)
    assert dict(found.classes) == {
        "a": pytest.approx((2 / 3 + 0.9) / 2),
        "b": pytest.approx((1 / 3 + 0.1) / 2),
    }


# -------------------------------------------------------------------------------------- from Python


def test_from_python(tmp_path, answer):
    """The same as by the command, from a file with two channels and from samples at its rate."""
    save_random(tmp_path / "fold1.safetensors", "lora")
    file = write_sound(tmp_path / "x.wav", 3, rate=44_100, seconds=2.0, channels=2)
    classify = load(str(tmp_path / "fold1.safetensors"))
    found, other = classify(str(file)), classify(soundfile.read(file)[0].mean(1), 44_100)
    (line,) = answer(tmp_path / "fold1.safetensors", file, "--json", "--top", 4)
    told = [(row["class"], row["probability"]) for row in json.loads(line)["classes"]]
    for each in (found, other):
        assert [name for name, _ in each.classes] == [
            name for name, _ in told
        ] and each.best == told[0][0]
        assert [p for _, p in each.classes] == pytest.approx([p for _, p in told], abs=1e-4)
        assert (each.start, each.end, each.unsure) == (0.0, 2.0, False)
        assert each.confidence == each.classes[0][1]
    *windows, whole = classify.listen(str(file), hop=0.3)
    assert [window.start for window in windows] == pytest.approx([0, 0.3, 0.6, 0.9, 1.2, 1.38])
    assert whole.classes == found.classes[:3]


def test_sounds_that_are_none(tmp_path):
    classify = load(constant(tmp_path / "fold1.safetensors", 0.5, 0.5))
    with pytest.raises(ValueError, match=r"absent\.wav: No such file or directory"):
        classify(tmp_path / "absent.wav")
    integers = np.array([0, 32_767], np.int16)  # of a 16-bit file
    for samples in (np.zeros(0), [np.nan, 0], np.zeros((2, 2, 2)), integers, np.ones((16_000, 2))):
        wanted = r"no sound: (int16|float64) .* at 16000 Hz; give finite floats .*, \(samples,\)"
        with pytest.raises(ValueError, match=wanted):
            classify(samples, 16_000)
        with pytest.raises(ValueError, match=wanted):
            list(classify.listen(samples, 16_000))
    with pytest.raises(ValueError, match=r"no sound: .* and their rate"):
        classify(np.zeros(16_000))
    for rate in (0, 1e-9, np.nan):
        with pytest.raises(ValueError, match="no sound"):
            classify(np.ones(9), rate)
    tone = 0.3 * np.sin(np.arange(16_000) / 5)
    for samples, reason in (
        (32_767 * tone, "has a peak of 9,830, but"),
        (np.rint(50 * tone), "has a peak of 15, but"),
        (tone[:15], r"holds 0\.0009375 s: a sound must last 0\.001 s"),
    ):
        with pytest.raises(ValueError, match=f"no sound: the array {reason}"):
            classify(samples, 16_000)
    assert classify(13 * tone, 16_000).classes == classify(tone[:16], 16_000).classes
    with pytest.raises(UserError, match="it is no file"):
        load(tmp_path / "absent")


# ------------------------------------------------------------------------------------------- events


CLASSES = ["A", "B", "background"]
NO_BACKGROUND = ["A", "B", "quiet"]


def windows(text: str, hop: float = 0.5) -> list[Answer]:
    """A letter for each window of a second: its class is certain. - is the third class.

    A small letter is an answer that is unsure.
    """
    found = []
    for i, letter in enumerate(text):
        p = np.array([letter.upper() == "A", letter.upper() == "B", letter == "-"], float)
        answer = ((letter.upper(), 1.0),)
        unsure = letter.islower()
        found.append(Answer(i * hop, i * hop + 1, answer, 1.0, unsure, probabilities=p))
    return found


def told(answers) -> list[tuple]:
    return [(e.best, e.start, e.end, round(e.probability, 6)) for e in answers]


def agreeing(rows, left_out=("quiet",), **options):
    """The events without a class `background`."""
    return events_of(rows, NO_BACKGROUND, left_out=left_out, **options)


def test_events_by_hand():
    """Windows of a second, one every half second: the mean is over five of them.

    Each speaks for the half second in its middle, the first and last for more.
    """
    assert told(agreeing(windows("---AAA-----BBBB---"))) == [
        ("A", 1.75, 3.25, 0.6),
        ("B", 5.75, 7.75, 0.7),  # 3/5, 4/5, 4/5, 3/5
    ]
    assert told(agreeing(windows("---A----B--"))) == []
    mean = (1 + 3 / 4 + 4 / 5 + 4 / 5 + 4 / 5 + 3 / 4 + 1) / 7
    assert told(agreeing(windows("AAABAAA"))) == [("A", 0.0, 4.0, round(mean, 6))]
    mean = (1 + 3 / 4 + 3 / 5) / 3
    assert told(agreeing(windows("AAABBB"))) == [
        ("A", 0.0, 1.75, round(mean, 6)),
        ("B", 1.75, 3.5, round(mean, 6)),
    ]
    assert told(agreeing(windows("A"))) == [("A", 0.0, 1.0, 1.0)]  # all of the sound
    assert told(agreeing(windows("-"))) == []


def test_what_is_no_event():
    rows = windows("---AAA---BBBBB---")
    assert [e.best for e in agreeing(rows)] == ["A", "B"]
    assert [e.best for e in agreeing(rows, threshold=0.7)] == ["B"]  # the middle of it
    assert [e.best for e in agreeing(rows, left_out=["quiet", "A"])] == ["B"]
    assert [e.best for e in agreeing(rows, min_length=1.6)] == ["B"]
    # One of the three windows of A is unsure, and three of the five of B.
    assert [e.best for e in agreeing(windows("---AAa---BBbbb---"))] == ["A"]


def test_events_of_other_hops():
    """An event lasts as long as a window: four windows a quarter of a second apart, or else two.

    The mean is over nine windows then, or over three.
    """
    five = windows("-------AAAAA-------", hop=0.25)
    assert told(agreeing(five)) == [("A", 2.125, 3.375, round(5 / 9, 6))]
    seven = windows("-------AAAAAAA-------", hop=0.25)  # three of them have all seven around them
    assert told(agreeing(seven, threshold=0.75)) == []
    assert [e.best for e in agreeing(seven, threshold=0.75, min_length=0.75)] == ["A"]
    beside = windows("AA---", hop=1)
    assert told(agreeing(beside)) == [("A", 0.0, 2.0, round((1 + 2 / 3) / 2, 6))]
    assert told(agreeing(beside, threshold=0.7)) == []
    assert [e.end for e in agreeing(beside, threshold=0.7, min_length=0)] == [1.0]


def mixed(*rows: tuple[float, float], hop: float = 0.5) -> list[Answer]:
    """Windows of a second with the probabilities of A and B. The rest is the background."""
    found = []
    for i, (a, b) in enumerate(rows):
        p = np.array([a, b, 1 - a - b])
        found.append(Answer(i * hop, i * hop + 1, (("A", a),), 1.0, False, probabilities=p))
    return found


def test_with_background_events_are_found_and_then_named():
    """Neither class has 0.4 in the row, but both together have more. Nothing is blurred."""
    quiet = (0.0, 0.0)
    rows = mixed(quiet, quiet, (0.25, 0.35), (0.35, 0.25), (0.2, 0.3), quiet, (0.9, 0.1), quiet)
    assert told(events_of(rows, CLASSES)) == [("B", 1.25, 2.75, 0.3)]
    assert told(events_of(rows, CLASSES, threshold=0.55)) == [("A", 1.25, 2.25, 0.3)]
    found = [("B", 1.25, 2.75, 0.3), ("A", 3.25, 3.75, 0.9)]
    assert told(events_of(rows, CLASSES, min_length=0)) == found
    without = {"left_out": ["background", "A"]}
    assert told(events_of(rows, CLASSES, **without)) == []
    assert told(events_of(rows, CLASSES, threshold=0.25, **without)) == [("B", 1.25, 2.75, 0.3)]
    assert told(events_of(mixed((0.0, 0.4), (0.0, 0.4)), CLASSES)) == [("B", 0.0, 1.5, 0.4)]
    for names in (CLASSES, NO_BACKGROUND):  # the third of five windows is silent
        rows = windows("--AAAAA--")
        rows[4] = replace(rows[4], is_silent=True)
        options = {"left_out": names[2:], "threshold": 0.3}
        spans = [(e.start, e.end) for e in events_of(rows, names, **options)]
        assert len(spans) == 2 and spans[0][1] == 2.25 and spans[1][0] == 2.75
    assert told(events_of(windows("--AAAa--BBbbb--"), CLASSES)) == [("A", 1.25, 3.25, 1.0)]


def test_a_row_is_cut_where_the_class_changes_for_long():
    """A side needs three windows, half a window apart, or fifteen a tenth of a window apart."""
    assert told(events_of(windows("-AAABBB-"), CLASSES)) == [
        ("A", 0.75, 2.25, 1.0),
        ("B", 2.25, 3.75, 1.0),
    ]
    for short, end in (("-AAABB-", 3.25), ("-BBAAA-", 3.25), ("-AAABAA-", 3.75)):
        (event,) = events_of(windows(short), CLASSES)
        assert (event.best, event.start, event.end) == ("A", 0.75, end)
    # What is short joins the side before it, and the next long change cuts.
    ends = [(e.best, e.end) for e in events_of(windows("-AAAAABBAAAAABBBBBB-"), CLASSES)]
    assert ends == [("A", 6.75), ("B", 9.75)]
    for count, classes in ((14, "A"), (15, "AB")):
        text = "-" + "A" * 20 + "B" * count + "-"
        assert "".join(e.best for e in events_of(windows(text, 0.1), CLASSES)) == classes


def test_label_tracks(tmp_path, answer, capsys):
    """A track lies beside each recording that can be read, by a name that no other program uses.

    A second track replaces the first.
    """
    fold = constant(tmp_path / "fold1.safetensors", 0.9, 0.1, classes=["one\tthing", "b"])
    file = write_sound(tmp_path / "sounds" / "a.wav", seconds=2.0)
    cut = write_sound(tmp_path / "sounds" / "b.wav", seconds=20.0)
    cut.write_bytes(cut.read_bytes()[:-400_000])
    (tmp_path / "sounds" / "a.txt").write_text("mine")
    for _ in range(2):
        lines = answer(fold, tmp_path / "sounds", "--events", code=1)
        assert lines == [f"{file}.events.txt: 1 events"]
    assert Path(f"{file}.events.txt").read_text() == "0.000000\t2.000000\tone\\tthing (0.90)\n"
    found = sorted(path.name for path in (tmp_path / "sounds").iterdir())
    assert found == ["a.txt", "a.wav", "a.wav.events.txt", "b.wav"]
    rows = [json.loads(line) for line in answer(fold, file, "--events", "--json")]
    event = {"start": 0.0, "end": 2.0, "class": "one\\tthing", "probability": 0.9}
    assert rows == [{"file": str(file), **event}]
    assert answer(fold, file, "--events", "--threshold", 0.95) == [f"{file}.events.txt: 0 events"]
    assert Path(f"{file}.events.txt").read_text() == ""


def test_label_tracks_in_another_folder(tmp_path, answer, error):
    """Two sounds of one name cannot share a track there, and the track of an hour ago is replaced.

    A folder that is a file is an error, and nothing is written.
    """
    fold = constant(tmp_path / "fold1.safetensors", 0.9, 0.1, classes=["a", "b"])
    file = write_sound(tmp_path / "one" / "a.wav", seconds=2.0)
    out = tmp_path / "new" / "tracks"
    for _ in range(2):
        assert answer(fold, file, "--events", "--out", out) == [
            f"{out / 'a.wav.events.txt'}: 1 events"
        ]
    assert [path.name for path in out.iterdir()] == ["a.wav.events.txt"]
    assert [path.name for path in file.parent.iterdir()] == ["a.wav"]
    other = write_sound(tmp_path / "two" / "a.wav")
    said = error(fold, file, other, "--events", "--out", out)
    assert "--out: two sounds of one name would have one label track" in said
    assert error(fold, file, "--events", "--out", file) == f"error: {file}: File exists\n"
    assert "--out is for the label tracks of --events" in error(fold, file, "--out", out)
    assert "--out is for the label tracks" in error(fold, file, "--events", "--csv", "--out", out)


def test_what_is_unsure_is_an_event_where_there_is_background(tmp_path, answer):
    """Nothing else takes what is no event, unless the user says how sure an event must be."""
    file = write_sound(tmp_path / "a.wav", seconds=2.0)
    facts = {**FACTS, "min_confidence": 0.95}
    for name, count in (("background", 1), ("cat", 0)):
        classes = ["dog", name]
        fold = tmp_path / f"{name}.safetensors"
        constant(fold, 0.8, 0.2, classes=classes, calibration=facts)
        assert answer(fold, file, "--events") == [f"{file}.events.txt: {count} events"]
        assert answer(fold, file, "--events", "--min-confidence", 0.95) == [
            f"{file}.events.txt: 0 events"
        ]
        assert answer(fold, file, "--events", "--min-confidence", 0.5) == [
            f"{file}.events.txt: 1 events"
        ]


def test_embeddings_over_what_is_there(tmp_path, error, capsys):
    fold, file = constant(tmp_path / "fold1.safetensors", 0.5, 0.5), write_sound(tmp_path / "a.wav")
    (tmp_path / "y.npz").mkdir()
    assert predict.main([str(fold), str(file), "--embeddings", str(tmp_path / "y.npz")]) == 2
    message = f"error: {tmp_path / 'y.npz'}: is there and no file\n"
    assert capsys.readouterr().err == message
    content = file.read_bytes()  # where the name was forgotten, a sound stands there
    assert "--embeddings: give the name of a file" in error(fold, "--embeddings", file, file)
    assert file.read_bytes() == content


# --------------------------------------------------------------------------------------- embeddings


def test_embeddings(tmp_path, answer):
    """What the heads of all folds read of each file, in the order of the output; files that cannot
    be read are left out."""
    files = {fold: tmp_path / "run" / f"fold{fold}.safetensors" for fold in (1, 2)}
    models = [
        save_random(file, "convpass_houlsby_par", **of_run(fold)) for fold, file in files.items()
    ]
    file, other = (
        write_sound(tmp_path / "a.wav", seconds=0.9),
        write_sound(tmp_path / "b.wav", seconds=0.4),
    )
    (tmp_path / "bad.wav").write_text("no sound")
    words = [
        tmp_path / "run",
        file,
        tmp_path / "bad.wav",
        other,
        "--embeddings",
        tmp_path / "new" / "vectors.npz",
    ]
    wave, spans = torch.from_numpy(read_audio(file)), [(0, 9840), (4480, 14_400)]
    with torch.no_grad():
        inputs = [data.to_input(data.fbank(wave[None, a:b]), 60) for a, b in spans]
        expected = np.stack([np.concatenate([m.vector(x)[0] for m in models]) for x in inputs])

    answer(*words, code=1)
    found = np.load(tmp_path / "new" / "vectors.npz")
    assert found["names"].tolist() == [str(file), str(other)]
    assert found["vectors"].dtype == np.float32 and found["confidence"].shape == (2,)
    np.testing.assert_allclose(found["vectors"][0], expected.mean(0), atol=1e-5)
    *windows, _ = load(tmp_path / "run").listen(file)
    np.testing.assert_allclose([each.vector for each in windows], expected, atol=1e-5)

    answer(*words, "--min-confidence", 1, code=1)
    found = np.load(tmp_path / "new" / "vectors.npz")
    assert found["unsure"].tolist() == [True, True]
    assert set(found["classes"]) <= {"rain", "sea, waves", "dog", "wind"}
    answer(tmp_path / "run", tmp_path / "bad.wav", *words[4:], code=1)
    assert len(np.load(tmp_path / "new" / "vectors.npz")["vectors"]) == 0
