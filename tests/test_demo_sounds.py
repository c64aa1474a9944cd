"""The synthesiser, the datasets made of it, and the small backbone that was pretrained on it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import petl
import train
from ast_model import ASTConfig
from data import DATASETS, fbank, load_dataset, to_input
from load_weights import DEMO, load_ast, read_header
from sounds import demo, synth
from sounds.audio import read_audio
from sounds.demo import rendered
from sounds.synth import CLASSES, SAMPLES, SOURCE, TARGET, render
from support.command import UserError
from support.variants import NARROW_LR, fitted, narrowed, shrink

FRESH = 1  # a seed of sounds that nothing was trained on
BAR = 0.7  # of the shipped backbone on new source sounds


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_renders_one_healthy_second(name):
    for index in range(3):
        wave = render(name, index, FRESH)
        assert wave.shape == (SAMPLES,) and wave.dtype == np.float32 and np.isfinite(wave).all()
        assert 0.1 <= abs(wave).max() <= 0.9  # -20 to -1 dB
        assert wave.std() > 0.003


def test_a_sound_follows_from_class_index_and_seed():
    first = render("bell", 3, seed=5)
    np.random.default_rng().standard_normal()
    render("gong", 3, seed=5)
    assert np.array_equal(render("bell", 3, seed=5), first)
    for other in (render("bell", 4, seed=5), render("bell", 3, seed=6), render("gong", 3, seed=5)):
        assert not np.array_equal(other, first)


def test_no_two_classes_are_the_same():
    assert len(SOURCE) >= 40 and len(TARGET) >= 10 and not SOURCE.keys() & TARGET.keys()
    sounds = {name: synth.sound(name, np.random.default_rng(0)).tobytes() for name in CLASSES}  # from one random state
    assert len(set(sounds.values())) == len(CLASSES)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("rise_fall_rise", "fall_rise_fall"),
        ("plucks_low_high_middle", "plucks_high_low_middle"),
        ("up_up_down", "down_down_up"),
    ],
)
def test_order_is_all_that_tells_some_classes_apart(one, other):
    """From one random state the average spectra are the same; the spectra frame by frame are not."""

    def power(name):  # (frames, 128)
        wave = synth.sound(name, np.random.default_rng(0))
        return fbank(torch.from_numpy(np.pad(wave, (0, SAMPLES - len(wave))).astype(np.float32))[None])[0].exp()

    one, other = power(one), power(other)
    assert torch.cosine_similarity(one.mean(0), other.mean(0), dim=0) > 0.98
    assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) < 0.7


def test_rendered_datasets(tmp_path, monkeypatch):
    def few(data_dir, cache_dir):
        return rendered("demo", ["eoe", "bell"], (3, 2, 4), data_dir, cache_dir)

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
    dataset.paths[3].unlink()
    assert all(path.is_file() for path in load_dataset("demo", None, tmp_path).paths)
    assert not list(tmp_path.glob(".demo*"))  # nothing half-made stays
    with pytest.raises(UserError, match="makes its own sounds"):
        rendered("demo", ["eoe"], (1, 1, 1), tmp_path, tmp_path)


def test_python_train_py_alone(tmp_path, monkeypatch, capsys):
    """The defaults: ten target classes, the shipped backbone, Houlsby adapters; few clips and one epoch here."""

    def few(data_dir, cache_dir):
        return rendered("demo", TARGET, (2, 1, 1), data_dir, cache_dir)

    monkeypatch.setitem(DATASETS, "demo", replace(DATASETS["demo"], load=few, epochs=1))
    options = ["--cache-dir", str(tmp_path), "--out", str(tmp_path / "runs")]
    assert train.main(options) == 0
    run = tmp_path / "runs" / "demo" / "houlsby_par" / "seed0"
    config = json.loads((run / "config.json").read_text())
    assert (config["weights"], config["mask"], config["n_frames"]) == ("demo", False, 98)
    assert {part["rr"] for part in config["method"]["parts"]} == {16}
    out = capsys.readouterr().out
    for word in ("test accuracy", "parameters (", "kB", "s in all", "--method linear", "python -m tools.predict"):
        assert word in out
    assert train.main([*options, "--method", "linear"]) == 0
    config = json.loads((run.parent.parent / "linear" / "seed0" / "config.json").read_text())
    assert config["lr"] == config["method"]["lr"] == NARROW_LR["linear"]
    assert "--method houlsby_par" in capsys.readouterr().out


def test_settings_of_a_dataset_give_way_to_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setitem(
        DATASETS, "demo",
        replace(DATASETS["demo"], load=lambda d, c: rendered("demo", TARGET, (2, 1, 1), d, c), epochs=1),
    )  # fmt: skip
    options = ["--cache-dir", tmp_path, "--out", tmp_path, "--lr", 0.002, "--rr", 8, "--weights", "random:demo"]
    assert train.main([str(option) for option in options]) == 0
    config = json.loads((tmp_path / "demo" / "houlsby_par" / "seed0" / "config.json").read_text())
    assert (config["lr"], config["weights"]) == (0.002, "random:demo")
    assert {part["rr"] for part in config["method"]["parts"]} == {8}


def test_shrink_keeps_even_numbers_and_at_least_one():
    assert [part.rr for part in shrink(petl.METHODS["adapter_lora"], 4).parts] == [16, 32]
    assert shrink(petl.METHODS["spt"], 4).parts[0].prompts == 74
    assert shrink(petl.METHODS["prefix"], 4).parts[0].prompts == 6
    assert shrink(petl.METHODS["lora"], 1000).parts[0].rr == 1
    assert shrink(petl.METHODS["dpt"], 1) is petl.METHODS["dpt"]


def test_methods_fit_the_width_of_the_backbone():
    """The base AST takes the paper's numbers, the demo backbone a quarter of RR and prompts, whatever the dataset."""
    for method in petl.METHODS.values():
        assert narrowed(method, 768) is method and narrowed(method, 384) is method
        assert narrowed(method, 128).parts == shrink(method, 4).parts
    assert petl.rank_of(128, narrowed(petl.METHODS["houlsby_par"], 128).parts[0].rr) == 8
    rates = {name: narrowed(petl.METHODS[name], 128).lr for name in ("full_ft", "linear", "lora")}
    assert rates == {"full_ft": 5e-4, "linear": 1e-2, "lora": 5e-3}
    narrow = ASTConfig(dim=128, depth=4, heads=2)
    assert fitted(petl.METHODS["full_ft"], narrow, lr=1e-3).lr == 1e-3 == DATASETS["demo_source"].lr["full_ft"]
    assert fitted(petl.METHODS["dpt"], narrow, prompts=9).parts == (petl.Prompts(9, deep=True),)


def test_the_shipped_backbone_knows_the_source_sounds():
    """On new sounds of the classes it was trained on; guessing gives 1.5 %."""
    assert DEMO.stat().st_size <= 3_000_000
    header = read_header(DEMO)
    assert header["classes"] == sorted(SOURCE) and header["settings"]["dataset"] == "demo_source"
    model = load_ast("demo", n_frames=98, pool="mean").eval()
    clips, labels = [], []
    for label, name in enumerate(header["classes"]):
        clips += [render(name, index, FRESH) for index in range(4)]
        labels += [label] * 4
    with torch.inference_mode():
        logits = model(to_input(fbank(torch.from_numpy(np.stack(clips))), 98))
    accuracy = (logits.argmax(1) == torch.tensor(labels)).float().mean()
    assert accuracy > BAR, f"{100 * accuracy:.1f} %"
