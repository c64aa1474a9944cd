"""The datasets made of rendered sounds, and the small backbone that was pretrained on them."""

import csv
import hashlib
import json
from contextlib import redirect_stderr
from dataclasses import astuple, replace

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from helpers import Terminal

import train
from data import DATASETS, fbank, load_dataset, to_input
from load_weights import DEMO, load_ast
from sounds import demo
from sounds.audio import read_audio
from sounds.demo import listing
from sounds.synth import SOURCE, TARGET, render
from support.checkpoints import read_header
from support.command import UserError
from support.variants import NARROW_LR


def test_rendered_datasets(tmp_path, monkeypatch):
    def few(data_dir, cache_dir):
        return listing("demo", ["eoe", "bell"], (3, 2, 4), data_dir, cache_dir)

    monkeypatch.setitem(DATASETS, "demo", replace(DATASETS["demo"], load=few))
    dataset = load_dataset("demo", None, tmp_path)
    assert dataset.classes == ["bell", "eoe"] and len(dataset.paths) == 18
    split = dataset.folds[1]
    parts = [set(split.train), set(split.val), set(split.test)]
    assert [len(part) for part in parts] == [6, 4, 8] and set().union(*parts) == set(range(18))
    for part in parts:
        labels = [dataset.labels[i] for i in part]
        assert labels.count(0) == labels.count(1)
    wave = read_audio(dataset.paths[9])
    assert np.allclose(wave, render("eoe", 0, demo.SEED), atol=1e-4)  # 16 bits
    before = dataset.paths[0].stat().st_mtime_ns
    assert load_dataset("demo", None, tmp_path).paths[0].stat().st_mtime_ns == before
    assert not list(tmp_path.glob(".demo*"))  # nothing half-made stays
    with pytest.raises(UserError, match="makes its own sounds"):
        listing("demo", ["eoe"], (1, 1, 1), tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("name", "folder", "sizes", "classes"),
    [
        ("demo", "demo-fe5a0b5f", (200, 40, 100), 10),
        ("demo_source", "demo_source-146f2f13", (200, 10, 10), 68),
    ],
)
def test_sounds_that_were_rendered_before_are_found_again(
    name, folder, sizes, classes, tmp_path, monkeypatch
):
    """The folder has the name it has always had, so neither sounds nor features of a user are made
    again."""
    (tmp_path / folder).mkdir()
    monkeypatch.setattr(soundfile, "write", None)  # nothing is rendered
    dataset = load_dataset(name, None, tmp_path)
    assert dataset.root == tmp_path / folder and dataset.name == name
    assert len(dataset.classes) == classes and dataset.classes == sorted(dataset.classes)
    per_class = sum(sizes)
    assert dataset.names[per_class - 1] == f"{dataset.classes[0]}/{per_class - 1:03d}.wav"
    assert dataset.labels == [label for label in range(classes) for _ in range(per_class)]
    part = np.repeat(["train", "val", "test"], sizes).tolist() * classes
    assert astuple(dataset.folds[1]) == tuple(
        [i for i, one in enumerate(part) if one == wanted] for wanted in ("train", "val", "test")
    )


def test_rendering_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    write, calls = soundfile.write, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return write(*args, **kwargs)

    monkeypatch.setattr(soundfile, "write", interrupted)
    with redirect_stderr(Terminal()) as shown, pytest.raises(KeyboardInterrupt):
        load_dataset("demo", None, tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["demo-fe5a0b5f.lock"]
    assert "rendering demo: " in shown.getvalue()
    for index, (_, samples, rate) in enumerate(
        calls
    ):  # the first clips of the first class, with seed 0
        assert rate == 16_000
        assert np.array_equal(samples, render("down_down_up", index, 0))


def test_python_train_py_alone(tmp_path, monkeypatch, capsys):
    """The defaults: ten target classes, the shipped backbone, Houlsby adapters; few clips and one
    epoch here."""

    def few(data_dir, cache_dir):
        return listing("demo", TARGET, (2, 1, 1), data_dir, cache_dir)

    monkeypatch.setitem(DATASETS, "demo", replace(DATASETS["demo"], load=few, epochs=1))
    options = ["--cache-dir", str(tmp_path), "--out", str(tmp_path / "runs")]
    assert train.main(options) == 0
    run = tmp_path / "runs" / "demo" / "houlsby_par" / "seed0"
    config = json.loads((run / "config.json").read_text())
    assert (config["weights"], config["mask_frames"], config["n_frames"]) == ("demo", 0, 98)
    assert {part["rr"] for part in config["method"]["parts"]} == {16}
    out = capsys.readouterr().out
    for word in (
        "test accuracy",
        "parameters (",
        "kB",
        "s of training",
        "--method linear",
        "python -m tools.predict",
    ):
        assert word in out
    assert train.main([*options, "--method", "linear"]) == 0
    config = json.loads((run.parent.parent / "linear" / "seed0" / "config.json").read_text())
    assert config["lr"] == config["method"]["lr"] == NARROW_LR["linear"]
    assert "--method houlsby_par" in capsys.readouterr().out


def test_settings_of_a_dataset_give_way_to_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setitem(
        DATASETS,
        "demo",
        replace(
            DATASETS["demo"], load=lambda d, c: listing("demo", TARGET, (2, 1, 1), d, c), epochs=1
        ),
    )
    options = [
        "--cache-dir",
        tmp_path,
        "--out",
        tmp_path,
        "--lr",
        0.002,
        "--rr",
        8,
        "--weights",
        "random:demo",
    ]
    assert train.main([str(option) for option in options]) == 0
    config = json.loads((tmp_path / "demo" / "houlsby_par" / "seed0" / "config.json").read_text())
    assert (config["lr"], config["weights"]) == (0.002, "random:demo")
    assert {part["rr"] for part in config["method"]["parts"]} == {8}


def test_the_shipped_backbone_is_the_one_that_is_described():
    assert DEMO.stat().st_size <= 2_000_000
    assert (
        read_header(DEMO)["pretrained"] == "22607 recordings, 5000 steps, from former.safetensors"
    )
    with open(DEMO.with_name("sources.csv"), encoding="utf-8") as file:
        sources = list(csv.DictReader(file))
    told = DEMO.with_name("README.md").read_text(encoding="utf-8")
    recordings = sum(int(row["recordings"]) for row in sources)
    minutes = sum(float(row["minutes"]) for row in sources)
    assert f"{recordings:,} recordings ({minutes:.0f} minutes)" in told
    assert f"from {len(sources)} Debian packages" in told and "--steps 5000" in told
    assert all(row["licence"] and row["copyright"] for row in sources)
    assert all(len(row["sha256"]) == 64 for row in sources)
    assert hashlib.sha256(DEMO.read_bytes()).hexdigest() in told
    with pytest.raises(UserError, match="demo has no head: give n_classes"):
        load_ast("demo")


def test_the_shipped_backbone_tells_made_sounds_apart():
    """The nearest of 68 classes by the mean of three sounds each, in the direction of what the last
    block says."""
    waves = np.stack([render(name, i, 1) for name in sorted(SOURCE) for i in range(6)])
    x = to_input(fbank(torch.from_numpy(waves)), 98)
    right = {}
    for weights in ("demo", "random:demo"):
        with torch.inference_mode():
            model = load_ast(weights, 98, 68).eval()
            vectors = model.encode(model.embed(x)).mean(1).unflatten(0, (68, 6))
        vectors = vectors - vectors[:, :3].mean((0, 1))
        means = F.normalize(vectors[:, :3].mean(1), dim=-1)
        nearest = (F.normalize(vectors[:, 3:], dim=-1) @ means.T).argmax(-1)
        right[weights] = (nearest == torch.arange(68)[:, None]).float().mean().item()
    assert right["demo"] > 0.25 > 3 * right["random:demo"], right
