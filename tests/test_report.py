"""The page of a run: what it shows is what the run has left and what its clips sound like, and
nothing on it is markup but its own. What a browser makes of it is tested in browser/."""

import base64
import hashlib
import io
import json
import re
import shutil
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
import torch
from helpers import build_features, made_up_page, make_folder, train_on
from PIL import Image

from data import load_dataset
from load_weights import load_trained
from sounds.audio import read_audio
from support.records import read_run
from tools import report
from tools.figures import clips_of_run


class Page(HTMLParser):
    """The elements of a page in order, (name, attributes), and all its text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.text, self.source = [], "", text
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag, *attributes):
        return [
            found for name, found in self.elements if name == tag and found.keys() >= {*attributes}
        ]


def decoded(uri: str) -> tuple[str, bytes]:
    kind, content = re.fullmatch(r"data:([a-z]+/[a-z]+);base64,(.*)", uri).groups()
    return kind, base64.b64decode(content)


def data_of(uri: str) -> np.ndarray:
    """A picture's brightness, (n_mels, n_frames): magma grows brighter."""
    kind, content = decoded(uri)
    assert kind == "image/webp"
    return np.asarray(Image.open(io.BytesIO(content)).convert("L")).astype(float)


def likeness(uri: str, wave: np.ndarray) -> float:
    """The highest correlation of an MP3 with a wave, both at 16 kHz; an encoder may add silence in
    front."""
    kind, content = decoded(uri)
    heard, rate = soundfile.read(io.BytesIO(content))
    assert (kind, rate) == ("audio/mpeg", 16_000) and abs(len(heard) - len(wave)) < 3000
    heard, wave = heard / np.linalg.norm(heard), wave / np.linalg.norm(wave)
    return np.correlate(heard, wave, "full").max()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on 0.3 s of 90 sounds in three folders, each of its own pitch; 18 of them test."""
    tmp_path = tmp_path_factory.mktemp("report")
    root, time, sure = (
        make_folder(tmp_path / "my sounds", 30),
        np.arange(4800) / 16_000,
        ("--epochs", 5, "--lr", 0.1),
    )
    for i, file in enumerate(sorted(root.rglob("*.wav"))):
        soundfile.write(file, 0.5 * np.sin(2 * np.pi * (300 + 70 * i) * time), 16_000)
    assert (
        train_on("folder", root, tmp_path, "--seconds", 0.3, "--out", tmp_path / "my runs", *sure)
        == 0
    )
    return tmp_path / "my runs" / "folder" / "linear" / "seed0"


def test_what_stands_on_the_page(run, capsys):
    assert report.main([str(run)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{run / 'report.html'}: 18 of 18 test clips, ")
    page, result = (
        Page((run / "report.html").read_text()),
        json.loads((run / "result.json").read_text()),
    )
    scores, text = result["scores"], " ".join(page.text.split())
    low, high = report.interval([result["accuracy"]], 18)
    assert (
        f"{result['accuracy']:.2f} % of 18 test clips are told right "
        f"(95 % interval {low:.2f} to {high:.2f})" in text
    )
    assert (
        "the largest class would be right on 33.33 %" in text and "linear on folder, seed 0" in text
    )
    cells = re.sub(r"\s", "", page.text)
    for name, one in scores["classes"].items():
        assert f"{name}6{one['precision']:.1f}{one['recall']:.1f}{one['f1']:.1f}" in cells
    header, *lines = (run / "confusion.csv").read_text().splitlines()
    counts = {
        (row.split(",")[0], answer): count
        for row in lines
        for answer, count in zip(header.split(",")[1:], row.split(",")[1:], strict=True)
    }
    shown = {
        (cell["data-label"], cell["data-answer"]): cell["data-count"]
        for cell in page.all("button", "data-count")
    }
    assert shown == {key: count for key, count in counts.items() if count != "0"}
    settings = json.loads((run / "config.json").read_text())
    for told in (
        f"n_frames{settings['n_frames']}epochs5",
        f"andinthehead{result['parameters']['head']:,}seconds",
    ):
        assert told in cells
    assert settings["backbone"] not in page.source
    assert "18 of 18 test clips, evenly" in text
    assert (
        f"python -m tools.predict '{run}' recording.wav" in text
        and f"show '{run}'/fold1.safetensors" in text
    )
    for where in ("cache_dir", "data_dir"):  # nothing of the machine but what was asked for
        assert settings[where] not in page.source


def test_each_clip_is_that_clip(run, tmp_path):
    """Its sound, its picture, what was answered and how surely: by the model itself."""
    cards = report.cards_of(read_run(run), 100, None, None, None, torch.device("cpu"))
    paths = {row["path"] for row in read_run(run).tested()}
    assert {card["path"] for card in cards} == paths and len(cards) == 18
    dataset, _, _ = clips_of_run(read_run(run), None, None)
    model = load_trained(run / "fold1.safetensors")
    features, _ = build_features(dataset, model.config.n_frames, tmp_path)
    pictures = [data_of(card["picture"]) for card in cards]
    for card, picture in zip(cards, pictures, strict=True):
        i = dataset.names.index(card["path"])
        assert likeness(card["sound"], read_audio(dataset.paths[i])) > 0.97
        expected = features[i].astype(float).T[::-1]
        like = [np.corrcoef(one.ravel(), expected.ravel())[0, 1] for one in pictures]
        assert (
            picture.shape == expected.shape
            and pictures[np.argmax(like)] is picture
            and max(like) > 0.9
        )
        with torch.inference_mode():
            shares = (
                model(torch.from_numpy(features[i].astype(np.float32))[None]).softmax(1)[0].tolist()
            )
        assert card["told"] == pytest.approx(
            dict(zip(dataset.classes, shares, strict=True)), abs=1e-5
        )
        assert card["told"][card["prediction"]] == pytest.approx(
            float(card["probability"]), abs=1e-5
        )
        assert card["label"] == card["path"].split("/")[0]
    right = [card["label"] == card["prediction"] for card in cards]
    sure = [
        float(card["probability"]) * (1 if ok else -1)
        for card, ok in zip(cards, right, strict=True)
    ]
    assert right == sorted(right) and all(
        sure[i] <= sure[i + 1] or right[i] != right[i + 1] for i in range(17)
    )


def test_each_fold_speaks_for_its_clips(train_main, tmp_path, capsys):
    assert train_main("--method", "full_ft", "--folds", "1,3", "--lr", 1e-3) == 0
    run = tmp_path / "runs" / "esc10" / "full_ft" / "seed0"
    folds = json.loads((run / "result.json").read_text())["folds"]
    cards = report.cards_of(read_run(run), 100, None, None, None, torch.device("cpu"))
    assert sorted(card["fold"] for card in cards) == [1] * 10 + [3] * 10
    for card in cards:
        assert card["path"].startswith(f"audio/{card['fold']}-")
        assert card["told"][card["prediction"]] == pytest.approx(
            float(card["probability"]), abs=1e-5
        )
    assert report.main([str(run)]) == 0
    low, high = report.interval([fold["accuracy"] for fold in folds], 20)
    text = " ".join(Page((run / "report.html").read_text()).text.split())
    assert f"told right, on average over 2 folds (95 % interval {low:.2f} to {high:.2f})" in text


def test_a_piece_of_a_recording_is_heard_alone(tmp_path):
    """And not another piece of its file: each has another pitch."""
    root, time = (
        make_folder(tmp_path / "long", 3, classes=("bell", "drum")),
        np.arange(8000) / 16_000,
    )
    for i, file in enumerate(sorted(root.rglob("*.wav"))):
        tones = [
            0.5 * np.sin(2 * np.pi * (300 + 100 * i + 1000 * piece) * time) for piece in range(3)
        ]
        soundfile.write(file, np.concatenate(tones), 16_000)
    assert train_on("folder", root, tmp_path, "--windows", "--seconds", 0.5) == 0
    run = tmp_path / "runs" / "folder" / "linear" / "seed0"
    assert report.main([str(run), "--out", str(tmp_path / "page.html")]) == 0
    page = Page((tmp_path / "page.html").read_text())
    names = [audio["aria-label"] for audio in page.all("audio")]
    assert len(names) == 6 and any(name.endswith("#0.5-1") for name in names)
    for audio in page.all("audio"):
        path, start, end = re.fullmatch(r"(.*)#(.*)-(.*)", audio["aria-label"]).groups()
        wave = read_audio(root / path, float(end) - float(start), float(start))
        assert likeness(audio["src"], wave) > 0.97


def row(path: str, label: str, answer: str, probability: float) -> dict:
    return {"path": path, "label": label, "prediction": answer, "probability": str(probability)}


def test_which_clips_are_shown(run, monkeypatch):
    """One of each class in turn, of a class one of each answer: surest mistakes, least sure right
    answers."""
    rows = [
        row("a", "x", "x", 0.9),
        row("b", "x", "x", 0.6),
        row("c", "x", "y", 0.5),
        row("d", "x", "y", 0.8),
        row("e", "y", "y", 0.7),
        row("f", "y", "y", 0.55),
        row("g", "x", "z", 0.7),
    ]
    assert [one["path"] for one in report.evenly(rows)] == list("dfgebca")
    assert [one["path"] for one in sorted(rows, key=report.interest)] == list("dgcfbea")
    few = report.cards_of(read_run(run), 6, None, None, None, torch.device("cpu"))
    assert sorted(card["label"] for card in few) == [
        "bell",
        "bell",
        "drum",
        "drum",
        "flute",
        "flute",
    ]
    size = max(len(card["picture"]) + len(card["sound"]) for card in few) + 1000  # and its text
    monkeypatch.setattr(report, "BUDGET", 3 * size)  # no more than mail takes
    assert 3 <= len(report.cards_of(read_run(run), 6, None, None, None, torch.device("cpu"))) < 6


def test_names_are_text(tmp_path):
    """Of classes and files, whatever they hold: no element, attribute or entity of the page comes
    from them."""
    evil = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b &lt; 'c'"]
    path = '{}"onload="alert(1)<b>.wav\udcff'
    plain, page = (
        Page(made_up_page(tmp_path, ["x", "y", "z"], 9)),
        Page(made_up_page(tmp_path, evil, 9, path)),
    )
    shape = [[(tag, sorted(found)) for tag, found in one.elements] for one in (plain, page)]
    assert shape[0] == shape[1]
    assert {cell["data-label"] for cell in page.all("button", "data-label")} == {*evil}
    assert (
        page.all("audio")[-1]["aria-label"] == '8"onload="alert(1)<b>.wav\N{REPLACEMENT CHARACTER}'
    )
    assert all(name in page.text for name in evil)


def test_it_fetches_nothing_and_runs_nothing_else(tmp_path):
    page = Page(made_up_page(tmp_path, ["x", "y"], 8))
    (policy,) = (meta["content"] for meta in page.all("meta", "content") if "http-equiv" in meta)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == rules["media-src"] == "data:"
    for kind, tag in (("style-src", "style"), ("script-src", "script")):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page.source, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert rules[kind] == f"'sha256-{digest}'" and len(page.all(tag)) == 1
    sources = [found["src"] for _, found in page.elements if "src" in found]
    assert len(sources) == 16 and all(source.startswith("data:") for source in sources)
    assert "http" not in re.sub("http-equiv", "", page.source) and not page.all("img", "style")


def test_learning_curves():
    """By hand: an SVG's y grows downwards, the highest value is at 0, the first epoch at x = 0."""
    metrics = [
        {"fold": k, "loss": loss, "accuracy": accuracy}
        for k, loss, accuracy in [
            (1, "4.0", "50"),
            (1, "2.0", "75"),
            (1, "3.0", "100"),
            (2, "2.0", "50"),
            (2, "1.0", "50"),
        ]
    ]
    loss, accuracy = report.charts_of(metrics)
    assert loss["paths"] == ["M0.0,0.0 160.0,93.3 320.0,46.7", "M0.0,93.3 160.0,140.0"]
    assert (loss["low"], loss["high"], loss["epochs"], loss["last"]) == ("1", "4", 3, "3, 1")
    assert accuracy["paths"] == ["M0.0,140.0 160.0,70.0 320.0,0.0", "M0.0,140.0 160.0,140.0"]
    (alone,) = report.charts_of([{**one, "accuracy": ""} for one in metrics])  # nothing validates
    assert alone == loss
    assert report.charts_of([{"fold": 1, "loss": "2", "accuracy": "9"}])[0]["paths"] == ["M0.0,0.0"]


def test_shades_of_the_matrix():
    counts = np.array([[7, 1, 0], [2, 0, 0], [0, 0, 0]])
    assert report.matrix_of(counts, ["x", "y", "z"]) == [
        ("x", [("x", 7, 7), ("y", 1, 1), ("z", 0, 0)]),
        ("y", [("x", 2, 8), ("y", 0, 0), ("z", 0, 0)]),
        ("z", [("x", 0, 0), ("y", 0, 0), ("z", 0, 0)]),
    ]


def test_sounds_that_changed_are_told(run, tmp_path, capsys):
    """A page that shows other sounds than those that were tested says so; one that cannot be read
    is an error."""
    root = tmp_path / "my sounds"
    shutil.copytree(run.parents[3] / "my sounds", root)
    tested = [
        line.split(",")[3]
        for line in (run / "split.csv").read_text().splitlines()
        if ",test," in line
    ]
    for seed, path in enumerate(tested[:4]):
        soundfile.write(root / path, np.random.default_rng(seed).uniform(-1, 1, 4800), 16_000)
    places = ["--data-dir", str(root), "--cache-dir", str(tmp_path / "cache")]
    options = [str(run), *places, "--out", str(tmp_path / "page")]
    assert report.main(options) == 0
    warning = capsys.readouterr().err
    assert re.search(
        r"warning: [1-4] of 18 clips \(.*are not what .* has tested: did they change\?", warning
    )
    (root / tested[0]).write_text("no sound")
    assert report.main(options) == 2
    assert (
        f"{root / tested[0]} is in no known sound format: mend it, or say"
        in capsys.readouterr().err
    )


def test_many_classes_have_a_list(tmp_path):
    """A matrix of hundreds could not be read; the list leads to clips as its cells do."""
    page = Page(made_up_page(tmp_path, [f"class {k:03}" for k in range(61)], 183))
    cells = page.all("button", "data-count")
    assert len(cells) == 60 and not [
        table for table in page.all("table", "class") if table["class"] == "matrix"
    ]
    assert {cell["data-count"] for cell in cells} == {"2"}
    assert cells[0]["data-label"] == "class 000" and cells[0]["data-answer"] == "class 001"
    assert report.mistakes_of(
        [("x", [("x", 9, 8), ("y", 1, 1)]), ("y", [("x", 3, 5), ("y", 0, 0)])]
    ) == [
        ("y", "x", 3),
        ("x", "y", 1),
    ]


def test_settings_of_the_method():
    """Two LoRAs of different rank are not the same."""
    parts = [{"part": "LoRA", "targets": "qv", "rr": 21, "alpha": 8}]
    config = {
        "method": {"name": "lora", "parts": parts},
        "lr": 0.005,
        "shots": None,
        "clips": "1234",
    }
    result = {"parameters": {"petl": 1, "head": 2}, "seconds": 3, "versions": {"torch": "2"}}
    told = report.settings_of(config, result)
    assert told["part 1"] == "targets qv, rr 21, alpha 8" and told["lr"] == 0.005
    assert not told.keys() & {"shots", "clips", "method", "blocks"}
    config["method"]["blocks"] = [3, 4]
    assert report.settings_of(config, result)["blocks"] == "3-4"


def test_silence_has_a_picture_and_a_sound():
    _, content = decoded(report.picture_of(torch.zeros(30, 128)))
    assert np.asarray(Image.open(io.BytesIO(content))).std() < 3
    assert soundfile.read(io.BytesIO(decoded(report.sound_of(np.zeros(4000)))[1]))[0].max() < 1e-3


def test_wrong_use(run, tmp_path, monkeypatch, capsys):
    def error(*words):
        assert report.main([str(word) for word in words]) == 2
        return capsys.readouterr().err

    expected = (
        f"error: {tmp_path / 'absent'} is no finished run of train.py: there is no config.json\n"
    )
    assert error(tmp_path / "absent") == expected
    other = make_folder(tmp_path / "other", 3, classes=("x", "y", "z"))
    assert "of its test clips (bell/" in error(run, "--data-dir", other) and load_dataset(
        "folder", other, tmp_path
    )
    assert "needs its backbone" in error(run, "--weights", tmp_path / "gone.safetensors")
    assert "--clips: invalid positive value" in error(run, "--clips", 0)
    assert (
        error(run, "--out", tmp_path)
        == f"error: {tmp_path} is a folder: --out is the name of a file\n"
    )
    for module, what in (
        ("jinja2", "a report needs"),
        ("PIL", "a report needs"),
        ("scipy.stats", "intervals need"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            name = module.partition(".")[0]
            assert error(run) == f"error: {what} {name}: pip install -r requirements-figures.txt\n"
