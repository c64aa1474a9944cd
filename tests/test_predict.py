"""tools.predict as a user runs it: windows, formats, folders, several folds, tags, and what can go
wrong."""

import csv
import io
import json
import math
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import soundfile
import soxr
import torch
import transformers
from helpers import (
    SMALL_AST,
    SMALL_CONFIG,
    SMALL_STATE,
    Terminal,
    constant,
    of_run,
    save_random,
    write_ast,
)

import data
import petl
from load_weights import load_ast, save_trained
from sounds.audio import read_audio
from support.checkpoints import read_header
from support.command import UserError, printable
from tools import export, predict

CLASSES = ["rain", "sea, waves", "dog", "wind"]
WINDOW = 59 * 160 + 400  # samples under 60 frames


@pytest.fixture
def main(capsys):
    """Runs `tools.predict`; returns its exit code and what it printed to stdout and stderr."""

    def call(*words) -> tuple[int, str, str]:
        capsys.readouterr()
        code = predict.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def rows(main):
    """Runs `tools.predict WORDS --json`; returns its lines as dictionaries."""

    def call(*words, code: int = 0) -> list[dict]:
        found, out, _ = main(*words, "--json")
        assert found == code
        return [json.loads(line) for line in out.splitlines()]

    return call


@pytest.fixture
def fold(tmp_path) -> Path:
    """Of a method with dropout, which must be off."""
    save_random(tmp_path / "fold1.safetensors", "convpass_houlsby_par")
    return tmp_path / "fold1.safetensors"


def sound(seconds: float, rate: int = 16_000, channels: int = 1, seed: int = 0) -> np.ndarray:
    """A glide through noise that gets louder: no two windows are alike."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    wave = (
        np.sin(2 * np.pi * (300 + 200 * seed + 400 * time) * time) * (time + 0.1) / (seconds + 0.1)
    )
    return 0.3 * wave[:, None] + 0.05 * rng.standard_normal((len(time), channels))


def write(path: Path, *args, **kwargs) -> Path:
    rate = kwargs.pop("rate", 16_000)
    soundfile.write(path, sound(*args, rate=rate, **kwargs), rate)
    return path


def by_hand(model, wave: np.ndarray) -> torch.Tensor:
    """Probabilities of one clip, the way training sees it: the beginning, padded or cut."""
    n_frames = model.config.n_frames
    with torch.no_grad():
        return model(data.to_input(data.fbank(torch.from_numpy(wave)[None]), n_frames)).softmax(-1)[
            0
        ]


def as_tensor(row: dict) -> torch.Tensor:
    found = {entry["class"]: entry["probability"] for entry in row["classes"]}
    return torch.tensor([found[name] for name in CLASSES])


# ------------------------------------------------------------------------------------------ windows


@pytest.mark.parametrize(
    "length", [0, 1, 399, 400, 700, 999, 1000, 1159, 1160, 1300, 1800, 1959, 1960, 5000, 5077]
)
@pytest.mark.parametrize("hop", [160, 480, 800])
@pytest.mark.parametrize("block", [1, 333, 10_000])
def test_windows_cover_everything(length, hop, block):
    """Windows of 4 frames, 880 samples, come in order and a hop apart.

    The last ends with the sound.
    """
    wave = np.arange(length, dtype=np.float32)
    blocks = [wave[i : i + block] for i in range(0, length, block)]
    windows = list(predict.cut(blocks, n_frames=4, hop=hop))
    starts = [start for start, _ in windows]
    for start, piece in windows:
        assert np.array_equal(piece, wave[start : start + len(piece)])
    assert all(len(piece) == 880 for _, piece in windows[:-1])
    assert starts[-1] + len(windows[-1][1]) == length
    assert starts[:-1] == [hop * i for i in range(len(starts) - 1)]
    if length < 880:
        assert starts == [0]
    else:
        assert 880 <= len(windows[-1][1]) < 880 + 160 and starts[-1] % 160 == 0
        assert len(starts) == 1 or 0 < starts[-1] - starts[-2] <= hop


@pytest.mark.parametrize("seconds", [0.01, 0.2, 0.6, 0.614])
def test_a_short_sound_is_heard_as_in_training(seconds, tmp_path, fold, rows):
    model = save_random(fold, "convpass_houlsby_par")
    short, longer = (
        write(tmp_path / "short.wav", seconds),
        write(tmp_path / "longer.wav", 0.61, seed=1),
    )
    first, second = rows(fold, longer, short, "--top", 4)
    torch.testing.assert_close(
        as_tensor(second), by_hand(model, read_audio(short)), atol=2e-6, rtol=0
    )
    torch.testing.assert_close(
        as_tensor(first), by_hand(model, read_audio(longer)), atol=2e-6, rtol=0
    )
    assert second["end"] == pytest.approx(seconds, abs=1e-3)


def test_a_long_sound_is_the_mean_of_its_windows(tmp_path, fold, rows):
    model = save_random(fold, "convpass_houlsby_par")
    file = write(tmp_path / "long.wav", 3.0, rate=44_100, channels=2)
    wave = read_audio(file)
    starts = [*range(0, len(wave) - WINDOW, 4_800), (len(wave) - 400) // 160 * 160 - 59 * 160]
    expected = [by_hand(model, wave[start:]) for start in starts]
    *windows, _ = predict.load(fold).listen(file)
    (answer,) = rows(fold, file, "--top", 4)
    assert [window.start for window in windows] == [start / 16_000 for start in starts]
    assert (answer["start"], answer["end"]) == (0.0, 3.0)
    for window, scores in zip(windows, expected, strict=True):
        ((name, probability),) = window.classes
        assert name == CLASSES[scores.argmax()]
        assert probability == pytest.approx(scores.max().item(), abs=2e-6)
    torch.testing.assert_close(as_tensor(answer), torch.stack(expected).mean(0), atol=2e-6, rtol=0)
    assert len({round(window.classes[0][1], 4) for window in windows}) > 3  # the windows do differ


def test_windows_point_at_the_events(tmp_path):
    """Three tones in two minutes of noise.

    The head is fitted to a random backbone, which is enough to tell tones.
    """
    rng = np.random.default_rng(0)

    def tone(hz, seconds):  # at 44.1 kHz
        time = np.arange(round(seconds * 44_100)) / 44_100
        return 0.4 * np.sin(2 * np.pi * hz * time) * (hz > 0) + 0.02 * rng.standard_normal(
            len(time)
        )

    pitch = {"nothing": 0, "low": 300, "middle": 1_000, "high": 4_000}
    model = petl.apply(load_ast(SMALL_AST, 60, 4), "linear").eval()
    labels = torch.arange(4).repeat(40)
    hz = np.array(list(pitch.values()))[labels] * rng.uniform(0.98, 1.02, len(labels))
    waves = torch.from_numpy(
        np.stack([soxr.resample(tone(one, 0.7), 44_100, 16_000) for one in hz])
    ).float()
    with torch.no_grad():
        pooled = model.features(data.to_input(data.fbank(waves), 60)).mean(1).double()
        mean, std = pooled.mean(0), pooled.std(0)
        x, target = (pooled - mean) / std, torch.nn.functional.one_hot(labels, 4).double() - 0.25
        weight = (
            torch.linalg.solve(x.T @ x + len(x) * torch.eye(64), x.T @ target).T / std
        )  # ridge regression
        model.head.weight.copy_(10 * weight)
        model.head.bias.copy_(-10 * weight @ mean)
    save_trained(model, tmp_path / "fold1.safetensors", {"classes": list(pitch)})

    events = {20.0: "high", 61.5: "low", 100.3: "middle"}  # seconds; two seconds long
    recording = tone(0, 120)
    for start, name in events.items():
        recording[round(start * 44_100) :][: 2 * 44_100] += tone(pitch[name], 2)
    soundfile.write(tmp_path / "two minutes.flac", np.stack([recording, recording], axis=1), 44_100)
    classify = predict.load(tmp_path / "fold1.safetensors")
    *windows, _ = classify.listen(tmp_path / "two minutes.flac")
    inside = dict.fromkeys(events.values(), 0)
    for window in windows:
        if all(window.end <= start or window.start >= start + 2 for start in events):
            assert window.best == "nothing", window
        for start, name in events.items():
            if start <= window.start and window.end <= start + 2:
                assert window.best == name, window
                inside[name] += 1
    assert len(windows) == 399 and min(inside.values()) >= 4


def test_windows_at_once(tmp_path, fold, monkeypatch):
    """One by one or all together: the same answers."""
    file = write(tmp_path / "long.wav", 2.0)
    classify = predict.load(fold)
    together = list(classify.listen(file, hop=0.1, top=4))
    monkeypatch.setattr(predict, "BATCH", 1)
    one_by_one = list(classify.listen(file, hop=0.1, top=4))
    assert len(together) == 16 and len(list(classify.listen(file))) == 7
    assert [answer.start for answer in together[:4]] == [0, 0.1, 0.2, 0.3]
    for one, other in zip(one_by_one, together, strict=True):
        assert dict(one.classes) == pytest.approx(dict(other.classes), abs=2e-6)


# -------------------------------------------------------------------------- files, folders, formats


def test_folders_are_walked(tmp_path, fold, rows, main):
    root = tmp_path / "sounds"
    (root / "deep" / "er").mkdir(parents=True)
    for name in ("b.WAV", "a.flac", "deep/c.ogg", "deep/er/d.wav", ".hidden.wav"):
        write(root / name, 0.3)
    (root / "notes.txt").write_text("no sound")
    (root / "b.WAV.events.txt").touch()
    found = [Path(row["file"]).relative_to(root).as_posix() for row in rows(fold, root)]
    assert found == ["a.flac", "b.WAV", "deep/c.ogg", "deep/er/d.wav"]
    assert (
        "1 files are no .wav, .flac" in main(fold, root)[2]
        and "ignored (notes.txt)" in main(fold, root)[2]
    )
    (root / "empty").mkdir()
    code, out, err = main(fold, root / "empty")
    assert code == 2 and not out and err.count("\n") == 1 and "holds no sounds (.wav, .flac" in err


def test_bad_files_do_not_stop_the_others(tmp_path, fold, rows, main):
    good = write(tmp_path / "good.wav", 1.0)
    (tmp_path / "text.wav").write_text("no sound")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    soundfile.write(
        tmp_path / "nan.wav", np.array([*sound(12)[:, 0], np.nan]), 16_000, subtype="FLOAT"
    )
    files = ["text.wav", "empty.wav", "good.wav", "nan.wav", "absent.wav", "good2.wav"]
    write(tmp_path / "good2.wav", 0.5)
    paths = [tmp_path / name for name in files]
    code, out, err = main(fold, *paths)
    assert code == 1 and [Path(line.split()[0]).name for line in out.splitlines()] == [
        "good.wav",
        "good2.wav",
    ]
    errors = err.splitlines()
    assert len(errors) == 4 and all(line.startswith(f"error: {tmp_path}") for line in errors)
    assert [line.split(": ")[1] for line in errors] == [
        str(tmp_path / f"{n}.wav") for n in ("text", "empty", "nan", "absent")
    ]
    found = rows(fold, *paths, code=1)
    assert [Path(row["file"]).name for row in found] == ["good.wav", "good2.wav"]
    assert main(fold, good)[0] == 0


def test_the_table(tmp_path, fold, main):
    write(tmp_path / "one.wav", 1.0)
    code, out, _ = main(fold, tmp_path / "one.wav", "--top", 2)
    (line,) = out.splitlines()
    assert code == 0 and line.startswith(f"{tmp_path}/one.wav                  1.00 s  ")
    name, probability, second, other = (
        line.split(" s  ")[1].replace("sea, waves", "sea_waves").split()
    )
    assert 1 >= float(probability) >= float(other) >= 0 and name != second


def test_names_that_are_no_text(tmp_path, fold, rows):
    good, strange = (
        write(tmp_path / "good.wav", 0.3),
        Path(str(tmp_path / "caf") + "\udce9.wav"),
    )  # a Latin-1 byte
    strange.write_bytes(good.read_bytes())
    first, second = rows(fold, strange, good)
    assert first["file"].endswith("caf\\xe9.wav") and first["classes"] == second["classes"]


NAME = "\x1b]0;mine\x07\x9b2J\u202ex\n"  # sets the title of a terminal, clears it, turns the text


@pytest.mark.parametrize("form", [(), ("--json",), ("--csv",), ("--events",)])
def test_a_name_commands_no_terminal(tmp_path, main, form):
    """Names of classes, as someone else's run has them, and of files that are read or not."""
    fold = constant(tmp_path / "fold1.safetensors", 0.9, 0.1, classes=[NAME, "\ud800"])
    folder = tmp_path / "sounds"
    folder.mkdir()
    for name in (f"{NAME}.wav", f"{NAME}2.wav", f"{NAME}.txt"):
        (folder / name).touch()
    write(folder / f"{NAME}.wav", 0.3)
    code, out, err = main(fold, folder, *form)
    assert code == 1 and not any(c in out + err for c in "\x1b\x07\x9b\u202e")
    for text in (out, *err.splitlines()):
        found = json.loads(text)["file"] if form == ("--json",) and text == out else text
        assert r"\x1b]0;mine\x07\x9b2J\u202ex\n" in found
    assert out.count("\n") == (3 if form == ("--csv",) else 1) and err.count("\n") == 2
    assert all(c.isprintable() or c in "\t\n" for c in out + err)
    for track in folder.glob("*.events.txt"):
        line = "0.000000\t0.300000\t\\x1b]0;mine\\x07\\x9b2J\\u202ex\\n (0.90)\n"
        assert form == ("--events",) and track.read_text() == line


def test_names_are_escaped_by_themselves():
    for name in ("rain", "Vögel & 鳥", r"C:\sounds\a.wav", 'it\'s "x"', "=1+2"):
        assert printable(name) == name
    assert printable(Path("a\tb\udce9\x00\x7f.wav")) == r"a\tb\xe9\x00\x7f.wav"


def test_what_follows_in_the_pipe_may_stop_reading(tmp_path, fold):
    (tmp_path / "sounds").mkdir()
    first = write(tmp_path / "sounds" / "0.wav", 0.1)
    for i in range(1, 200):
        (tmp_path / "sounds" / f"{i}.wav").symlink_to(first)
    command = f"{sys.executable} -m tools.predict {fold} {tmp_path}/sounds --json | head -n 1"
    root = Path(predict.__file__).parents[1]
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=root)
    assert done.stdout.count("\n") == 1 and done.stderr == ""


# ------------------------------------------------------------------------------------------- models


def test_a_merged_model_answers_alike(tmp_path, rows):
    facts = {
        "temperature": 0.5,
        "min_confidence": 0.9,
        "mean": [0.5] * 128,
        "std": [2.0] * 128,
        "directions": [[1000] + [0] * 127],
        "alpha": 10.0,
        "limit": 0.0,
        "slope": 100.0,
    }
    save_random(tmp_path / "fold1.safetensors", "lora", "cls", calibration=facts)
    words = [
        "export",
        tmp_path / "fold1.safetensors",
        "--to",
        "merged",
        "--out",
        tmp_path / "m.safetensors",
    ]
    assert export.main([str(word) for word in words]) == 0
    file = write(tmp_path / "sound.wav", 1.0)
    one, other = (
        rows(tmp_path / name, file, "--top", 4)[0]
        for name in ("fold1.safetensors", "m.safetensors")
    )
    torch.testing.assert_close(as_tensor(one), as_tensor(other), atol=1e-5, rtol=0)
    assert (
        read_header(tmp_path / "m.safetensors")["calibration"] == facts
        and one["unsure"] is other["unsure"] is True
    )
    assert 0 < one["confidence"] < 0.9
    assert other["confidence"] == pytest.approx(one["confidence"], abs=1e-5)


@pytest.mark.parametrize(("pool", "method"), [("mean", "linear"), ("cls_dist", "dpt")])
def test_a_trained_run_knows_its_sounds(pool, method, train_main, tmp_path, esc50_dir, rows):
    """train.py --pool, then tools.predict on the test clips of the fold.

    As many answers are right as the accuracy of the fold says.
    """
    assert train_main("--method", method, "--pool", pool, "--epochs", 3, "--lr", 1e-2) == 0
    run = tmp_path / "runs/esc10" / method / "seed0"
    assert read_header(run / "fold1.safetensors")["pool"] == pool
    clips = [
        path
        for path in sorted((esc50_dir / "audio").glob("1-*.wav"))
        if int(path.stem.split("-")[-1]) < 40
    ]
    found = rows(run, *clips)
    right = [
        row["classes"][0]["class"] == f"sound {Path(row['file']).stem.split('-')[-1]}"
        for row in found
    ]
    accuracy = json.loads((run / "result.json").read_text())["accuracy"]
    assert 100 * sum(right) / len(right) == pytest.approx(accuracy)


# --------------------------------------------------------------------------------------- bad models


@pytest.fixture
def fails(main, tmp_path):
    """Runs tools.predict on a good sound; returns the one line it ends with."""
    file = write(tmp_path / "good.wav", 0.3)

    def call(*words) -> str:
        code, out, err = main(*words, file)
        assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return call


def test_wrong_and_damaged_checkpoints(tmp_path, fold, fails):
    assert "was trained on the backbone" in fails(fold, "--weights", "random:tiny")
    content = fold.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    assert "no whole file of trained parts" in fails(tmp_path / "cut.safetensors")
    assert "it has no such header" in fails(SMALL_AST / "model.safetensors")
    assert "absent is no whole file of trained parts (it is no file)" in fails(tmp_path / "absent")
    sound = write(tmp_path / "first.wav", 0.3)  # the run was forgotten: nobody is to delete a sound
    assert fails(sound).endswith("): give a run of train.py or a foldK.safetensors\n")
    (tmp_path / "run").mkdir()
    assert "holds no fold*.safetensors" in fails(tmp_path / "run")


def test_folds_that_do_not_belong_together(tmp_path, fails):
    save_random(tmp_path / "run/fold1.safetensors", "lora", **of_run(1))
    save_random(tmp_path / "run/fold2.safetensors", "lora", **of_run(2, n_frames=100))
    assert "fold2.safetensors is of a run with --seconds 1, not 0.6" in fails(tmp_path / "run")
    save_random(tmp_path / "run/fold2.safetensors", "lora", **of_run(1))
    assert "fold2.safetensors is of a run with fold 1" in fails(tmp_path / "run")
    save_random(tmp_path / "run/fold2.safetensors", "lora")
    assert (
        "fold2.safetensors is no whole file of trained parts (its header has no settings)"
        in fails(tmp_path / "run")
    )


def test_another_front_end(tmp_path, monkeypatch, fails):
    save_random(tmp_path / "fold1.safetensors", "lora")
    monkeypatch.setattr(predict, "FRONT_END", {**data.FRONT_END, "hop": 80})
    assert "was trained with another front end" in fails(tmp_path / "fold1.safetensors")


def test_no_sounds_and_unknown_options(fold, main):
    for words, message in (
        ((fold,), "no sounds to classify"),
        ((fold, "x.wav", "--top", "0"), "--top"),
        ((fold, "x.wav", "--json", "--csv"), "not allowed with"),
        ((), "are required"),
    ):
        code, _, err = main(*words)
        assert code == 2 and message in err and err.count("\n") == 1


# ------------------------------------------------------------------ lines and numbers typed by hand


def glide(path: Path, samples: int, rate: int = 16_000) -> Path:
    """A glide: no two windows are alike."""
    time = np.arange(samples) / rate
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * (300 + 400 * time) * time), rate)
    return path


@pytest.fixture
def answer(capsys):
    """Runs `tools.predict`; returns its lines, and checks its exit code."""

    def call(*words, code: int = 0) -> list[str]:
        capsys.readouterr()
        found = predict.main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert found == code and (bool(err) is bool(code)), err
        return out.splitlines()

    return call


def test_answers_are_sorted_and_three_unless_told(tmp_path, answer):
    fold = constant(tmp_path / "fold1.safetensors", 0.125, 0.5, 0.125, 0.25, classes=CLASSES)
    file = glide(tmp_path / "a.wav", 8000)
    (line,) = answer(fold, file)
    assert (
        line == f"{file}{0.5:22.2f} s  sea, waves 0.500  wind 0.250  rain 0.125"
    )  # of equal ones the first
    (line,) = answer(fold, file, "--json")
    classes = [
        {"class": name, "probability": p}
        for name, p in (("sea, waves", 0.5), ("wind", 0.25), ("rain", 0.125))
    ]
    sure = {"confidence": 0.5, "unsure": False}
    span = {"start": 0.0, "end": 0.5}
    assert json.loads(line) == {"file": str(file), **span, **sure, "classes": classes}
    lines = answer(fold, file, "--csv", "--top", 9)
    assert lines == [
        "file,start,end,rank,class,probability,confidence,unsure",
        f'{file},0.000,0.500,1,"sea, waves",0.500000,0.500000,no',
        f"{file},0.000,0.500,2,wind,0.250000,0.500000,no",
        f"{file},0.000,0.500,3,rain,0.125000,0.500000,no",
        f"{file},0.000,0.500,4,dog,0.125000,0.500000,no",
    ]


def test_a_file_that_cannot_be_read_in_every_form(tmp_path, answer, capsys):
    """Exit code 1, the reason, and the others answered."""
    fold = constant(tmp_path / "fold1.safetensors", 0.75, 0.25)
    good, bad = glide(tmp_path / "a.wav", 4000), tmp_path / "absent.wav"
    (line,) = answer(fold, bad, good, "--json", code=1)
    assert json.loads(line)["classes"] == [
        {"class": "class 0", "probability": 0.75}, {"class": "class 1", "probability": 0.25},
    ]  # fmt: skip
    assert len(answer(fold, bad, good, "--csv", code=1)) == 3
    assert len(answer(fold, bad, good, code=1)) == 1
    assert predict.main([str(fold), str(bad), "--json"]) == 1
    assert capsys.readouterr().err == f"error: {bad}: No such file or directory\n"


def test_the_folds_of_a_run_vote_with_their_probabilities(tmp_path, answer):
    """Not with their logits: the mean of (0.9, 0.1) and (0.2, 0.8) and (0.5, 0.5)."""
    for fold, probabilities in {1: (0.9, 0.1), 2: (0.2, 0.8), 10: (0.5, 0.5)}.items():
        constant(
            tmp_path / "run" / f"fold{fold}.safetensors",
            *probabilities,
            classes=["a", "b"],
            **of_run(fold),
        )
    (line,) = answer(tmp_path / "run", glide(tmp_path / "a.wav", 4000), "--json")
    found = {entry["class"]: entry["probability"] for entry in json.loads(line)["classes"]}
    assert found == {"a": pytest.approx(1.6 / 3, abs=2e-6), "b": pytest.approx(1.4 / 3, abs=2e-6)}


@pytest.mark.parametrize(
    ("hop", "samples", "spans"),  # in samples; a window has 9,840
    [
        (None, 9_840 + 159, [(0, 9_999)]),  # not a frame more than one window
        (None, 9_840 + 160, [(0, 9_840), (160, 10_000)]),
        (None, 20_000, [(0, 9_840), (4_800, 14_640), (9_600, 19_440), (10_080, 20_000)]),  # half
        (0.6, 29_040, [(0, 9_840), (9_600, 19_440), (19_200, 29_040)]),
        (0.456, 20_000, [(0, 9_840), (7_360, 17_200), (10_080, 20_000)]),  # 46 frames
        (0.01, 10_200, [(0, 9_840), (160, 10_000), (320, 10_200)]),
    ],
)
def test_windows_by_hand(tmp_path, answer, hop, samples, spans):
    """Where they lie, and that a file's answer is the mean of theirs."""
    model = save_random(tmp_path / "fold1.safetensors", "convpass_pfeiffer_seq")
    file = glide(tmp_path / "a.wav", samples)
    *windows, _ = predict.load(tmp_path / "fold1.safetensors").listen(file, hop=hop)
    options = () if hop is None else ("--hop", hop)
    (line,) = answer(tmp_path / "fold1.safetensors", file, "--json", *options)
    whole = json.loads(line)
    assert [(window.start, window.end) for window in windows] == [
        (a / 16_000, b / 16_000) for a, b in spans
    ]
    assert (whole["start"], whole["end"]) == (0.0, round(samples / 16_000, 3))
    wave = torch.from_numpy(read_audio(file))
    with torch.no_grad():
        scores = [
            model(data.to_input(data.fbank(wave[None, a:b]), 60)).softmax(-1)[0] for a, b in spans
        ]
    for window, expected in zip(windows, scores, strict=True):
        assert window.classes == (
            (CLASSES[expected.argmax()], pytest.approx(expected.max().item(), abs=3e-6)),
        )
    mean = torch.stack(scores).mean(0)
    assert whole["classes"][0] == {
        "class": CLASSES[mean.argmax()], "probability": pytest.approx(mean.max().item(), abs=3e-6),
    }  # fmt: skip


@pytest.mark.parametrize("hop", ["0", "0.004", "0.61", "-0.3", "nan", "inf"])
def test_hops_that_no_window_has(tmp_path, hop, capsys):
    fold = constant(tmp_path / "fold1.safetensors", 0.5, 0.5)
    assert predict.main([str(fold), str(glide(tmp_path / "a.wav", 4000)), "--hop", hop]) == 2
    assert capsys.readouterr().err == (
        f"error: --hop {float(hop)}: give a hop from 0.01 s to 0.6 s, a whole window\n"
    )


def test_windows_of_zeros_are_silent(tmp_path):
    """Windows of 0.6 s side by side: a tone, zeros with a step of 16 bits, and both."""
    classifier = predict.load(constant(tmp_path / "fold1.safetensors", 0.5, 0.5))
    wave = np.full(2 * 9_600 + 9_840, 2**-15, np.float32)  # a window has 9,840 samples
    wave[:9_600] = 0.1
    wave[-5:] = -0.001
    *each, whole = classifier.listen(wave, 16_000, hop=0.6)
    assert [window.is_silent for window in each] == [False, True, False]
    assert not whole.is_silent


def test_a_long_recording_is_listened_to_as_it_comes(tmp_path, fold, monkeypatch):
    """Reading stays one window and a hop ahead, and a batch of windows is answered before the next
    one is cut."""
    pulled = []

    def blocks(file=None):
        for i in range(1000):
            pulled.append(i)
            yield np.zeros(1000, np.float32)

    windows = predict.cut(blocks(), n_frames=4, hop=160)  # 880 samples
    assert next(windows)[0] == 0 and len(pulled) == 2
    assert next(windows)[0] == 160 and len(pulled) == 2
    pulled.clear()
    monkeypatch.setattr(predict, "BATCH", 5)
    monkeypatch.setattr(predict, "stream_audio", blocks)
    answers = predict.load(fold).listen("a.wav", hop=0.1)  # 1,600 samples
    assert [next(answers).start for _ in range(5)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert len(pulled) == 18  # four hops, a window and the hop after it: 17,840 samples
    next(answers)
    assert len(pulled) == 26  # nine hops


def test_tags_come_from_the_audioset_checkpoint_unless_told(tmp_path, answer, monkeypatch, capsys):
    """Nothing trained: a sigmoid for each tag of its own head, which reads the mean of [CLS] and
    [distillation]."""
    asked = []

    def deliver(repository, name):
        asked.append((repository, name))
        return str(SMALL_AST / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", deliver)
    file = glide(tmp_path / "street.wav", 16_240)  # 100 frames
    (line,) = answer("--tags", file, "--json", "--top", 5)
    assert {repository for repository, _ in asked} == {"MIT/ast-finetuned-audioset-10-10-0.4593"}
    model = load_ast(SMALL_AST, pool="cls_dist").eval()
    with torch.no_grad():
        tokens = model.features(
            data.to_input(data.fbank(torch.from_numpy(read_audio(file))[None]), 100)
        )
        logits = model.head((tokens[:, 0] + tokens[:, 1]) / 2)[0].tolist()
    expected = {
        f"LABEL_{i}": pytest.approx(1 / (1 + math.exp(-logit)), abs=3e-6)
        for i, logit in enumerate(logits)
    }
    found = json.loads(line)["classes"]
    assert {entry["class"]: entry["probability"] for entry in found} == expected
    assert [entry["probability"] for entry in found] == sorted(
        (e["probability"] for e in found), reverse=True
    )
    assert answer("--tags", "--weights", SMALL_AST, file, "--json", "--top", 5) == [line]
    assert predict.main(["--tags", "--weights", "random:tiny", str(file)]) == 2
    assert "no weights at random:tiny" in capsys.readouterr().err


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_a_checkpoint_of_transformers_is_answered_as_there(tmp_path, rows, problem):
    """Its own mean and std, and one label a clip or several, from the waveform to probabilities."""
    folder = write_ast(tmp_path / "ast", SMALL_STATE, {**SMALL_CONFIG, "problem_type": problem})
    extractor = transformers.ASTFeatureExtractor(max_length=100, mean=-10.0, std=2.0)
    extractor.save_pretrained(folder)
    model = transformers.ASTForAudioClassification.from_pretrained(folder).eval()
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 16_240).astype("f4")  # 100 frames
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype="FLOAT")
    with torch.no_grad():
        logits = model(**extractor(wave, sampling_rate=16_000, return_tensors="pt")).logits[0]
    expected = logits.softmax(0) if problem.startswith("single") else logits.sigmoid()
    expected = {f"LABEL_{i}": pytest.approx(p, abs=1e-4) for i, p in enumerate(expected.tolist())}
    (row,) = rows("--tags", "--weights", folder, tmp_path / "a.wav", "--top", 5)
    found = {entry["class"]: entry["probability"] for entry in row["classes"]}
    assert found == expected


def test_a_checkpoint_without_tags(tmp_path, main):
    folder = write_ast(tmp_path, SMALL_STATE, {**SMALL_CONFIG, "problem_type": "regression"})
    code, _, said = main("--tags", "--weights", folder, glide(tmp_path / "a.wav", 4000))
    assert code == 2 and "its config.json says problem_type 'regression'" in said


def test_an_exported_model_answers_as_before(tmp_path, rows):
    """Whoever reads the folder for transformers learns that it has one label a clip."""
    save_random(tmp_path / "fold1.safetensors", "lora", pool="cls_dist")
    words = ["export", tmp_path / "fold1.safetensors", "--to", "hf", "--out", tmp_path / "hf"]
    assert export.main([str(word) for word in words]) == 0
    sound = glide(tmp_path / "a.wav", 9000)
    (before,) = rows(tmp_path / "fold1.safetensors", sound, "--top", 4)
    (after,) = rows("--tags", "--weights", tmp_path / "hf", sound, "--top", 4)
    for old, new in zip(before["classes"], after["classes"], strict=True):
        assert old["class"] == new["class"]
        assert old["probability"] == pytest.approx(new["probability"], abs=1e-5)


def test_names_of_classes_come_in_their_order(tmp_path):
    names = {str(i): f"tag {i}" for i in (10, 2, 0, 1, 3, 5, 4, 6, 9, 8, 7)}
    folder = write_ast(tmp_path, SMALL_STATE, {"id2label": names})
    assert predict.class_names(str(folder), 11) == [f"tag {i}" for i in range(11)]
    with pytest.raises(
        UserError, match=r"its config\.json has 11 names for the 12 classes of its head$"
    ):
        predict.class_names(str(folder), 12)


def test_a_backbone_that_has_moved(tmp_path, answer):
    """Files of trained parts name the place of their backbone; --weights says where it is now."""
    folder = tmp_path / "old"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((SMALL_AST / name).read_bytes())
    model = petl.apply(load_ast(folder, 60, 2), "lora").eval()
    save_trained(model, tmp_path / "fold1.safetensors", {"classes": ["a", "b"]})
    folder.rename(tmp_path / "new")
    file, fold = glide(tmp_path / "a.wav", 4000), tmp_path / "fold1.safetensors"
    assert predict.main([str(fold), str(file)]) == 2
    (line,) = answer(fold, file, "--weights", tmp_path / "new", "--json")
    with torch.no_grad():
        expected = (
            model(data.to_input(data.fbank(torch.from_numpy(read_audio(file))[None]), 60))
            .softmax(-1)
            .max()
            .item()
        )
    assert json.loads(line)["classes"][0]["probability"] == pytest.approx(expected, abs=3e-6)
    words = [
        "export",
        fold,
        "--to",
        "merged",
        "--out",
        tmp_path / "m.safetensors",
        "--weights",
        tmp_path / "new",
    ]
    assert export.main([str(word) for word in words]) == 0
    assert read_header(tmp_path / "m.safetensors")["classes"] == ["a", "b"]


def test_csv_reads_back(tmp_path, answer):
    fold = constant(tmp_path / "fold1.safetensors", 0.25, 0.75, classes=["a", "b"])
    lines = answer(fold, glide(tmp_path / "one, two.wav", 20_000), "--csv")
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
    assert {row["file"] for row in rows} == {str(tmp_path / "one, two.wav")}
    found = [(row["start"], row["end"], row["rank"], row["class"]) for row in rows]
    assert found == [("0.000", "1.250", "1", "b"), ("0.000", "1.250", "2", "a")]


def test_a_terminal_sees_how_far_it_is(tmp_path):
    """For each file how many windows have been heard, and how many a second."""
    fold = constant(tmp_path / "fold1.safetensors", 0.5, 0.5)
    files = [glide(tmp_path / "a.wav", 40_000), glide(tmp_path / "b.wav", 24_000)]
    with redirect_stderr(Terminal()) as shown, redirect_stdout(io.StringIO()):
        assert predict.main([str(fold), *map(str, files)]) == 0
    assert f"{files[0]}: 0window" in shown.getvalue() and "window/s]" in shown.getvalue()
