"""Methods that are fitted, in runs of train.py; and what a run on own sounds says of `logmel`."""

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import make_folder, train_on
from safetensors.torch import load_file
from test_forecast import SETTINGS

import load_weights
import train
from load_weights import load_trained
from petl_more import PENALTIES
from sounds.audio import read_audio
from support import console
from support.checkpoints import read_header
from tools import export, predict

FITTED = ["probe", "logmel"]


def run_of(tmp_path: Path, method: str, dataset: str = "folder") -> Path:
    return tmp_path / "runs" / dataset / method / "seed0"


@pytest.mark.parametrize("method", FITTED)
def test_the_penalty_is_chosen_on_the_validation_clips(method, train_main, tmp_path):
    """One row of metrics.csv for each; of equals the strongest is chosen."""
    assert train_main("--method", method) == 0
    run = run_of(tmp_path, method, "esc10")
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert len(rows) == len(PENALTIES) and {row["lr"] for row in rows} == {""}
    scores = [float(row["accuracy"]) for row in rows]
    losses = [float(row["loss"]) for row in rows]
    assert losses == sorted(losses, reverse=True)  # weaker penalties cost less
    header = read_header(run / "fold1.safetensors")
    assert header["result"]["epoch"] == 1 + scores.index(max(scores))
    assert header["result"]["validation_accuracy"] == pytest.approx(max(scores))
    assert header["settings"]["epochs"] == len(PENALTIES)
    assert header["settings"]["mask_frames"] == 0  # ESC-10 has masks in the loop


def test_without_validation_clips_the_last_penalty_counts(tmp_path, capsys):
    root = make_folder(tmp_path / "sounds" / "train")
    make_folder(root.with_name("test"), 2)
    words = ["--method", "probe"]
    assert fit_on(root.parent, tmp_path, *words) == 0
    assert read_header(run_of(tmp_path, "probe") / "fold1.safetensors")["result"]["epoch"] == 5
    assert "(weakest penalty)" in capsys.readouterr().out


def fit_on(folder: Path, tmp_path: Path, *words) -> int:
    """train.py on own sounds without --epochs, which fitted methods refuse."""
    places = ["--cache-dir", tmp_path / "cache", "--out", tmp_path / "runs"]
    own = ["--dataset", "folder", "--data-dir", folder, "--weights", "random:demo"]
    return train.main([str(word) for word in (*own, *places, *words)])


@pytest.mark.parametrize("method", FITTED)
@pytest.mark.parametrize("option", [["--epochs", "3"], ["--lr", "0.1"]])
def test_options_without_effect_are_refused(method, option, train_main, capsys):
    assert train_main("--method", method, *option) == 2
    said = f"error: {option[0]}: {method!r} is fitted and not trained in steps; leave it out"
    assert capsys.readouterr().err.strip() == said


def test_balance_and_few_shots_are_fitted_too(train_main, tmp_path):
    """The heads differ: the weights of the classes, and the clips, are other ones."""
    heads = []
    for name, words in (("plain", []), ("few", ["--shots", 1])):
        assert train_main("--method", "probe", *words, "--out", tmp_path / name) == 0
        file = tmp_path / name / "esc10/probe/seed0/fold1.safetensors"
        heads.append(load_trained(file).head.wrapped.weight)
    assert not torch.equal(*heads)
    assert train_main("--method", "probe", "--balance", "--out", tmp_path / "balance") == 0


# ------------------------------------------------------------------------------------- the baseline


def test_logmel_needs_no_backbone(tmp_path, monkeypatch):
    """Whatever --weights says, the file says what is made anew. predict and ONNX take the file."""
    root = make_folder(tmp_path / "sounds", 6)
    assert fit_on(root, tmp_path, "--method", "logmel", "--weights", "audioset") == 0
    file = run_of(tmp_path, "logmel") / "fold1.safetensors"
    header = read_header(file)
    assert header["backbone"]["name"] == "random:demo"
    assert header["parameters"]["head"] == 12 * 128 * 3 + 3
    monkeypatch.setattr(load_weights, "fetch", lambda name: pytest.fail("fetched"))
    classify = predict.load(file, device="cpu")
    waves = [read_audio(path) for path in sorted(root.rglob("*.wav"))]
    ours = predict.probabilities(replace(classify, calibrations=[predict.Calibration()]), waves)
    assert (ours.argmax(1) == np.repeat([0, 1, 2], 6)).mean() > 0.9  # tones of three pitches
    export.export_onnx(load_trained(file), {}, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    theirs = [session.run(None, {"waveform": wave[None]})[0][0] for wave in waves]
    assert np.abs(theirs - ours).max() < 1e-3


def test_a_run_on_own_sounds_has_the_scores_of_logmel(tmp_path, capsys):
    """Those of a run by logmel itself, on the same clips. Other runs have none."""
    root = make_folder(tmp_path / "sounds", 6)
    assert fit_on(root, tmp_path, "--method", "logmel") == 0
    expected = json.loads((run_of(tmp_path, "logmel") / "result.json").read_text())
    assert "logmel_accuracy" not in expected
    capsys.readouterr()
    assert train_on("folder", root, tmp_path) == 0
    found = json.loads((run_of(tmp_path, "linear") / "result.json").read_text())
    assert found["logmel_accuracy"] == expected["accuracy"]
    assert found["logmel_balanced_accuracy"] == expected["scores"]["balanced_accuracy"]
    said = f"  {expected['accuracy']:.2f} % (balanced {expected['accuracy']:.2f} %) for logmel"
    assert said in capsys.readouterr().out


def test_the_baseline_does_not_change_the_run(tmp_path, monkeypatch):
    """The random numbers of the next seed, and the trained tensors, are as without it."""
    root = make_folder(tmp_path / "sounds", 3)
    words = ["--method", "convpass_pfeiffer_par", "--seed", "0,1"]
    assert train_on("folder", root, tmp_path, *words) == 0
    monkeypatch.setattr(train, "scores_of_logmel", lambda *_: {})
    assert train_on("folder", root, tmp_path, *words, "--out", tmp_path / "without") == 0
    for seed in (0, 1):
        file = f"folder/convpass_pfeiffer_par/seed{seed}/fold1.safetensors"
        one, other = (load_file(tmp_path / out / file) for out in ("runs", "without"))
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", ["linear", "lora"])
def test_a_linear_head_learns_own_sounds_without_masks(method, tmp_path):
    """Clips of two seconds, which the other methods mask."""
    root = make_folder(tmp_path / "sounds", 3, seconds=2.1)
    assert train_on("folder", root, tmp_path, "--method", method) == 0
    settings = read_header(run_of(tmp_path, method) / "fold1.safetensors")["settings"]
    assert (settings["mask_frames"] > 0) == (method == "lora")


OTHERS = {"scores": {"balanced_accuracy": 50.0}}  # of a dataset of the paper
BETTER = {**OTHERS, "logmel_accuracy": 60.0, "logmel_balanced_accuracy": 51.0}
WORSE = {**BETTER, "logmel_balanced_accuracy": 49.0}


@pytest.mark.parametrize(
    ("name", "weights", "device", "result", "step"),
    [
        ("lora", "demo", "cpu", BETTER, "--method logmel"),
        ("linear", "audioset", "cpu", BETTER, "--method logmel"),
        ("linear", "audioset", "cpu", WORSE, "--method houlsby_par: an adapter"),
        ("probe", "demo", "cpu", OTHERS, "--method houlsby_par: an adapter"),
        ("probe", "audioset", "cpu", WORSE, "--method houlsby_par: an adapter"),
        ("probe", "demo", "cpu", WORSE, "--weights audioset --method probe: the large backbone"),
        ("linear", "demo", "cuda", WORSE, "--weights audioset: the large backbone"),
        ("lora", "demo", "cpu", WORSE, "--weights audioset --method probe: the large backbone"),
        ("lora", "demo", "cuda", WORSE, "--weights audioset: the large backbone"),
        ("lora", "random:tiny", "cuda", WORSE, "--weights audioset: the large backbone"),
        ("lora", "audioset", "cuda", WORSE, "--method linear: what the method adds"),
        ("lora", "demo", "cpu", OTHERS, "--method linear: what the method adds"),
        ("logmel", "random:demo", "cpu", OTHERS, "--method probe: what a backbone adds"),
    ],
)
def test_what_to_try_next(name, weights, device, result, step):
    config = {**asdict(SETTINGS), "weights": weights, "method": {"name": name}}
    found = console.next_step(config, result, device)
    assert found.startswith(step)


def test_the_summary_says_where_the_features_alone_are_better():
    lines = console.describe_baseline(BETTER, "lora")
    assert "60.00 % (balanced 51.00 %) for logmel" in lines[0]
    assert "logmel, without a backbone, is better than lora" in lines[1]
    assert len(console.describe_baseline(WORSE, "lora")) == 1
    assert console.describe_baseline(OTHERS, "lora") == []
