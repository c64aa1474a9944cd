"""What train.py says before and after its first epoch: what is trained, how long it takes, and what
would help."""

from dataclasses import replace

import torch
from safetensors.torch import load_file

from support import console, records
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
    mask_frames=80,
    dtype="float32",
)


def test_what_is_about_to_be_trained():
    line = "10 epochs, batch 4, learning rate 0.0001, {}, weights demo, seed 0, float32, cpu"
    assert console.describe(SETTINGS, CPU) == "lora on my: 2.5 s a clip, " + line.format("masked")
    odd = replace(SETTINGS, n_frames=500, shots=8, mask_frames=0, keep=0.4, balance=True)
    what = line.format("unmasked, 40% of the patches, classes weighed alike")
    assert console.describe(odd, CPU) == f"lora on my: 8 clips per class, 5 s a clip, {what}"
    probe = replace(SETTINGS, method={"name": "linear", "lr": 1e-2, "parts": []}, mask_frames=0)
    assert (
        console.describe(probe, CPU)
        .splitlines()[1]
        .startswith("linear probe: each clip goes through")
    )


def test_what_makes_a_run_bearable():
    assert console.forecast(59.9, 1, SETTINGS, CPU) == []
    assert len(console.forecast(600, 1, SETTINGS, CPU)) == 1
    gpu = torch.device("cuda")
    assert console.forecast(1e6, 5, SETTINGS, gpu) == ["this will take about 12 days, 5 folds"]
    ways = "--shots 8, --folds 1, fewer --epochs, a GPU"
    assert console.forecast(1e6, 5, SETTINGS, CPU)[1] == f"on a CPU; what makes it bearable: {ways}"
    few = replace(SETTINGS, shots=8, epochs=5)
    assert console.forecast(7000, 1, few, CPU) == [
        "this will take about 117 minutes",
        "on a CPU; what makes it bearable: a GPU",
    ]


def test_a_run_says_it_once_after_its_first_epoch(train_main, monkeypatch, capsys, tmp_path):
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
    asked = []
    monkeypatch.setattr(
        console,
        "forecast",
        lambda seconds, folds, *rest: asked.append((seconds, folds)) or ["so long"] * bool(folds),
    )
    tick, epochs = records.Progress.tick, []

    def slowly(progress):
        tick(progress)
        progress.seconds += 100
        progress.clock += 100
        epochs.append(progress.fold)

    monkeypatch.setattr(records.Progress, "tick", slowly)
    assert train_main(*options, "--seed", "0,1", "--folds", "1,2") == 0
    assert capsys.readouterr().out.count("so long") == 1 and epochs == [1, 1, 1, 1, 2, 2]
    seconds, folds = asked[0]
    assert (
        folds == 3 and 500 < seconds < 520
    )  # 100 s for each of three folds' six epochs but the first
    assert {folds for _, folds in asked[1:]} == {0}
    file = "esc10/houlsby_par/seed0/fold1.safetensors"
    silent, other = load_file(tmp_path / "silent" / file), load_file(tmp_path / "runs" / file)
    assert all(torch.equal(silent[name], other[name]) for name in silent)
