"""What train.py says before and after its first epoch: what is trained, and how long it takes."""

from dataclasses import replace

import pytest
import torch
from helpers import make_folder, train_on
from safetensors.torch import load_file

from support import console, recorder
from train import Settings

CPU = torch.device("cpu")
SETTINGS = Settings(
    dataset="my",
    weights="demo",
    backbone="0" * 64,
    method={"name": "lora", "lr": 1e-4, "parts": [{"part": "LoRA"}]},
    pool="mean",
    seed=0,
    shots=None,
    clips="0" * 64,
    n_frames=250,
    epochs=10,
    batch_size=4,
    lr=1e-4,
    head_lr=1e-4,
    mask_frames=80,
    dtype="float32",
)


def test_what_is_about_to_be_trained():
    line = "10 epochs, batch 4, learning rate 0.0001, {}, weights demo, seed 0, float32, cpu"
    assert console.describe(SETTINGS, CPU) == "lora on my: clips of 2.5 s, " + line.format("masked")
    two_rates = console.describe(replace(SETTINGS, head_lr=1e-2), CPU)
    assert "learning rate 0.0001, of the head 0.01, masked" in two_rates
    probe = replace(SETTINGS, method={"name": "linear", "lr": 1e-2, "parts": []}, mask_frames=0)
    assert (
        console.describe(probe, CPU)
        .splitlines()[1]
        .startswith("linear probe: each clip goes through")
    )


def test_a_run_says_it_once_after_its_first_steps(train_main, monkeypatch, capsys, tmp_path):
    """Two seeds of two folds, one of them finished before.

    It trains what a run trains that says nothing.
    """
    options = ["--seconds", 0.5, "--batch-size", 8, "--epochs", 2]
    assert (
        train_main(*options, "--out", tmp_path / "silent")
        == train_main(*options, "--folds", 2)
        == 0
    )
    assert "this will take" not in capsys.readouterr().out  # quick runs need no such line
    times = [0.0, 100.0]  # after the first step and after the fourth
    monkeypatch.setattr(recorder, "now", lambda device: times.pop(0))
    assert train_main(*options, "--seed", "0,1", "--folds", "1,2") == 0
    assert not times
    lines = [line for line in capsys.readouterr().out.splitlines() if "this will take" in line]
    # 100 s for three steps, four steps an epoch, two epochs in each of three folds.
    assert lines == ["this will take about 13 minutes; folds to train: 3"]
    file = "esc10/houlsby_par/seed0/fold1.safetensors"
    silent, other = load_file(tmp_path / "silent" / file), load_file(tmp_path / "runs" / file)
    assert all(torch.equal(silent[name], other[name]) for name in silent)


def test_own_sounds_on_a_cpu_have_a_faster_method(tmp_path, monkeypatch, capsys):
    root = make_folder(tmp_path / "sounds")
    times = [0.0, 100.0]  # of the only step of the only epoch
    monkeypatch.setattr(recorder, "now", lambda device: times.pop(0))
    assert train_on("folder", root, tmp_path, "--method", "lora", "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    line = lines.index("this will take about 100 s; folds to train: 1")
    assert lines[line + 1].startswith("--method probe is faster")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_is_advised_where_it_is_faster(dtype, train_main, monkeypatch, capsys):
    times = [0.0, 100.0]
    monkeypatch.setattr(recorder, "now", lambda device: times.pop(0))
    monkeypatch.setattr(recorder, "bfloat16_helps", lambda network: True)
    assert train_main("--seconds", 0.5, "--device", "cpu", "--dtype", dtype) == 0
    out = capsys.readouterr().out
    assert "this will take" in out
    assert out.count("--dtype bfloat16 is faster") == (1 if dtype == "float32" else 0)
