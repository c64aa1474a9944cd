"""The page of a run: what it shows is what the run has left and what its clips sound like, and
nothing on it is markup but its own. What a browser makes of it is tested in browser/."""

import base64
import hashlib
import io
import json
import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
import torch
from helpers import build_features, made_up_page, make_folder, train_on
from PIL import Image

from load_weights import load_trained
from sounds.audio import read_audio
from support.console import findings
from support.records import Run, read_run
from tools import report
from tools.evidence import accuracy, scores_of, wilson
from tools.figures import pyplot
from tools.finished import finished

CPU = torch.device("cpu")


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


def run_and_dataset(folder) -> tuple:
    run = read_run(folder)
    return run, report.dataset_of(run, None, None)


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


def test_a_run_does_not_say_where_files_are_written(run, tmp_path, monkeypatch, capsys):
    """Its config.json comes from anyone: what a dataset has to fetch goes to the user's cache."""
    received = shutil.copytree(run, tmp_path / "received")
    config = json.loads((received / "config.json").read_text())
    config["cache_dir"] = str(tmp_path / "somewhere")
    (received / "config.json").write_text(json.dumps(config))
    folders = []

    def load(name, data_dir, cache_dir, *_):
        folders.append(cache_dir)
        raise report.UserError("that is all")

    monkeypatch.setattr(report, "load_dataset", load)
    assert report.main([str(received)]) == 2
    assert report.main([str(received), "--cache-dir", str(tmp_path / "mine")]) == 2
    assert folders == [report.default_cache_dir(), tmp_path / "mine"]


def test_what_stands_on_the_page(run, capsys):
    assert report.main([str(run)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{run / 'report.html'}: 18 of 18 test clips, ")
    page, result = (
        Page((run / "report.html").read_text()),
        json.loads((run / "result.json").read_text()),
    )
    scores, text = result["scores"], " ".join(page.text.split())
    assert f"Balanced accuracy {scores['balanced_accuracy']:.2f} %" in text
    assert f"{result['accuracy']:.2f} % of 18 test clips are answered right. Always" in text
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
        f"testedepoch{result['folds'][0]['epoch']}of5chosenbybalancedaccuracysecondsofaclip0.3",
        "masksintrainingnoclassesweighalikenodatasetfolder",
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
    temperature = 2.0
    whole_run, dataset = run_and_dataset(run)
    whole_run.folds[1]["calibration"] = {"temperature": temperature}
    cards = report.cards_of(whole_run, dataset, 100, None, CPU)
    paths = {row["path"] for row in read_run(run).tested()}
    assert {card["path"] for card in cards} == paths and len(cards) == 18
    model = load_trained(run / "fold1.safetensors")
    features, _ = build_features(dataset, model.config.n_frames, tmp_path)
    pictures = [data_of(card["picture"]) for card in cards]
    for card, picture in zip(cards, pictures, strict=True):
        i = dataset.names.index(card["path"])
        assert likeness(card["sound"], read_audio(dataset.paths[i])) > 0.97
        expected = features[i].astype(float).T[::-1, :28]  # 0.3 s; two frames more are padding
        like = [np.corrcoef(one[:, :28].ravel(), expected.ravel())[0, 1] for one in pictures]
        assert picture.shape == (128, 30)
        assert pictures[np.argmax(like)] is picture and max(like) > 0.9
        assert picture[:, 29].max() < 10 < 100 < picture.max()  # padding is dark
        with torch.inference_mode():
            logits = model(torch.from_numpy(features[i].astype(np.float32))[None])[0]
            shares = (logits / temperature).softmax(0).tolist()
        assert card["told"] == pytest.approx(
            dict(zip(dataset.classes, shares, strict=True)), abs=1e-5
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
    cards = report.cards_of(*run_and_dataset(run), 100, None, CPU)
    assert sorted(card["fold"] for card in cards) == [1] * 10 + [3] * 10
    trained = {row["path"]: float(row["probability"]) for row in read_run(run).tested()}
    for card in cards:
        assert card["path"].startswith(f"audio/{card['fold']}-")
        probability = pytest.approx(trained[card["path"]], abs=1e-5)  # too few clips to calibrate
        assert card["told"][card["prediction"]] == card["probability"] == probability
    assert report.main([str(run)]) == 0
    scores = scores_of(finished(read_run(run)))
    assert len(scores) == 20
    _, low, high = accuracy([scores])
    text = " ".join(Page((run / "report.html").read_text()).text.split())
    assert (
        f"answered right, on average over 2 folds (95 % interval {low:.2f} to {high:.2f})" in text
    )


def test_what_accuracy_hides_stands_above(run):
    """For own sounds balanced accuracy comes first, for the paper's datasets accuracy does."""
    finished, dataset = run_and_dataset(run)
    text = " ".join(Page(report.page_of(finished, dataset, [])).text.split())
    head = text[: text.index("A row for each true class")]
    assert head.index("Balanced accuracy") < head.index("test clips are answered right")
    found = findings(finished, dataset)
    assert len(found) >= 2 and all(f"{what}{words}" in head for what, words in found)
    paper = replace(finished, config={**finished.config, "choose_by": "accuracy"})
    low, high = wilson(round(0.18 * finished.result()["accuracy"]), 18)
    text = Page(report.page_of(paper, dataset, [])).text
    assert f"answered right (95 % interval {low:.2f} to {high:.2f})" in " ".join(text.split())
    assert "Balanced accuracy" not in text


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


def test_which_clips_are_shown(run):
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
    few = report.cards_of(*run_and_dataset(run), 6, None, CPU)
    assert sorted(card["label"] for card in few) == [
        "bell",
        "bell",
        "drum",
        "drum",
        "flute",
        "flute",
    ]


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
    assert len(sources) == 18 and all(source.startswith("data:") for source in sources)
    assert "http" not in re.sub("http-equiv", "", page.source) and not page.all("img", "style")


def test_learning_curves(monkeypatch):
    """A line for each fold, from epoch 1 on, and a star at the tested epoch.

    What nothing validates has no accuracy.
    """
    figures = []
    plt = pyplot()
    monkeypatch.setattr(plt, "close", figures.append)
    table = [(1, 4.0, 50), (1, 2.0, 75), (1, 3.0, 100), (2, 2.0, 50), (2, 1.0, 50)]
    epochs = (1, 2, 3, 1, 2)
    history = [
        {"fold": k, "epoch": epoch, "loss": loss, "accuracy": share}
        for epoch, (k, loss, share) in zip(epochs, table, strict=True)
    ]
    chosen = {1: 3, 2: 1}
    loss, accuracy = report.charts_of(history, chosen)
    assert (loss["title"], loss["last"]) == ("training loss (nats)", "3, 1")
    assert (accuracy["title"], accuracy["last"]) == ("validation accuracy (%)", "100, 50")
    kind, content = re.fullmatch("data:(.*);base64,(.*)", loss["picture"]).groups()
    assert kind == "image/svg+xml" and b"</svg>" in base64.b64decode(content)
    lines = [[line.get_xydata().tolist() for line in one.axes[0].lines] for one in figures]
    assert lines[0] == [[[1, 4], [2, 2], [3, 3]], [[3, 3]], [[1, 2], [2, 1]], [[1, 2]]]
    assert lines[1] == [[[1, 50], [2, 75], [3, 100]], [[3, 100]], [[1, 50], [2, 50]], [[1, 50]]]
    for figure in figures:
        first, first_star, second, second_star = figure.axes[0].lines
        assert first_star.get_marker() == second_star.get_marker() == "*"
        assert first_star.get_color() == first.get_color() != second.get_color()
        ticks = figure.axes[0].get_xticks()
        assert all(tick == int(tick) for tick in ticks)
    (alone,) = report.charts_of([{**row, "accuracy": ""} for row in history], chosen)
    assert alone == loss
    assert figures[0].axes[0].get_xlabel() == "epoch"
    figures.clear()
    report.charts_of(history, chosen, "penalty")
    assert {figure.axes[0].get_xlabel() for figure in figures} == {"penalty"}
    for strange in ({1: 9}, {}):  # a run of somebody else may have tested what no epoch is
        figures.clear()
        report.charts_of(history, strange)
        assert [len(figure.axes[0].lines) for figure in figures] == [2, 2]


def test_shades_of_the_matrix(run, monkeypatch):
    """Eighths of a row, rounded up. What was never answered has no button."""
    counts = np.array([[7, 1, 0], [2, 0, 0], [0, 0, 0]])
    monkeypatch.setattr(Run, "confusion", lambda self: counts)
    cells = Page(report.page_of(*run_and_dataset(run), [])).all("button", "data-count")
    names = ["data-label", "data-answer", "data-count", "class"]
    assert [[cell[name] for name in names] for cell in cells] == [
        ["bell", "bell", "7", "s7"],
        ["bell", "drum", "1", "s1"],
        ["drum", "bell", "2", "s8"],
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
    options = [str(run), *places, "--out", str(tmp_path / "page.html")]
    assert report.main(options) == 0
    warning = capsys.readouterr().err
    assert re.search(
        r"warning: [1-4] of 18 clips \(.*are not what .* has tested: did they change\?", warning
    )
    (root / tested[0]).write_text("no sound")
    assert report.main(options) == 2
    error = capsys.readouterr().err
    assert f"{root / tested[0]} cannot be read (Format not recognised" in error
    assert "): mend it, or say" in error


def test_a_class_more_than_the_run_knows(tmp_path, capsys):
    """In front of the others, where each gets another number: the answers keep the names that they
    had in the run."""
    root = make_folder(tmp_path / "sounds")
    assert train_on("folder", root, tmp_path, "--seconds", 0.3) == 0
    make_folder(root, classes=("alarm",))
    run = tmp_path / "runs" / "folder" / "linear" / "seed0"
    capsys.readouterr()
    cards = report.cards_of(*run_and_dataset(run), 100, None, CPU)
    assert {*cards[0]["told"]} == {"bell", "drum", "flute"}
    for card in cards:
        assert card["told"][card["prediction"]] == card["probability"]
    assert "warning" not in capsys.readouterr().err


def test_settings_of_the_method(run):
    """Two LoRAs of different rank are not the same."""
    parts = [{"part": "LoRA", "targets": "qv", "rr": 21, "alpha": 8}]
    finished, dataset = run_and_dataset(run)
    config = {**finished.config, "method": {"name": "lora", "lr": 0.005, "parts": parts}}
    cells = Page(report.page_of(replace(finished, config=config), dataset, [])).text
    assert "methodLoRA, targets qv, rr 21, alpha 8" in cells
    assert "seed0" in cells and "shots" not in cells and "\nblocks" not in cells
    config["method"]["blocks"] = [3, 4]
    assert "blocks3-4" in Page(report.page_of(replace(finished, config=config), dataset, [])).text


def test_silence_has_a_picture_and_a_sound():
    _, content = decoded(report.picture_of(torch.zeros(30, 128), 30))
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
    assert re.search(
        f"error: {run}: its clip [a-z]+/.* is not in {other}: give the sounds it was trained on",
        error(run, "--data-dir", other),
    )
    assert "needs its backbone" in error(run, "--weights", tmp_path / "gone.safetensors")
    assert "--clips: invalid positive value" in error(run, "--clips", 0)
    for file in (run / "fold1.safetensors", run / "config.json", tmp_path):
        content = file.read_bytes() if file.is_file() else None
        message = f"error: --out {file}: the name of a page ends in .html\n"
        assert error(run, "--out", file) == message
        assert content is None or file.read_bytes() == content
    for module, what in (
        ("jinja2", "a report needs"),
        ("matplotlib", "figures need"),
        ("scipy.stats", "intervals need"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            name = module.partition(".")[0]
            assert error(run) == f"error: {what} {name}: pip install -r requirements-figures.txt\n"
