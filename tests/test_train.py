"""train.py as a user runs it: whole runs, interruption, several processes, and everything that can
go wrong.
"""

import csv
import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    SMALL_AST,
    SMALL_CONFIG,
    SMALL_STATE,
    build_features,
    make_bad_files,
    make_esc50,
    make_folder,
    write_ast,
)
from safetensors.torch import load_file

import petl
import train
from data import load_dataset
from load_weights import load_ast, load_trained
from sounds import paper
from support import records
from support.checkpoints import read_header
from support.variants import narrowed

ROOT = Path(train.__file__).parent


def rows_of(run: Path) -> list[dict]:
    return list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))


def without_times(result: dict) -> dict:
    result = {
        **result,
        "folds": [{**fold, "seconds": 0, "peak_memory_mb": 0} for fold in result["folds"]],
    }
    return {
        name: value for name, value in result.items() if name not in ("seconds", "peak_memory_mb")
    }


# --------------------------------------------------------------------------------------- whole runs


def test_a_run_leaves_everything_behind(train_main, tmp_path, capsys):
    assert train_main("--method", "lora", "--folds", "1,2,3,4,5") == 0
    run = tmp_path / "runs" / "esc10" / "lora" / "seed0"
    files = {f"fold{k}.safetensors" for k in range(1, 6)}
    files |= {
        "config.json",
        "split.csv",
        "metrics.csv",
        "predictions.csv",
        "confusion.csv",
        "result.json",
    }
    assert {path.name for path in run.iterdir() if not path.name.startswith(".")} == files
    rows = rows_of(run)
    assert [(row["fold"], row["epoch"]) for row in rows] == [
        (str(k), str(e)) for k in range(1, 6) for e in (1, 2)
    ]
    assert list(rows[0]) == ["fold", "epoch", "step", "loss", "accuracy", "lr", "clips/s"]
    result = json.loads((run / "result.json").read_text())
    accuracies = [fold["accuracy"] for fold in result["folds"]]
    assert (
        result["accuracy"] == pytest.approx(sum(accuracies) / 5, abs=1e-3)
        and result["std"] is not None
    )
    model = petl.apply(load_ast(SMALL_AST, 100, 10), narrowed(petl.METHODS["lora"], 64))
    assert result["parameters"] == petl.count(model)
    assert {"seconds", "peak_memory_mb"} <= result.keys()
    assert result["versions"] == dict(
        python=platform.python_version(), torch=torch.__version__, numpy=np.__version__
    )
    config = json.loads((run / "config.json").read_text())
    assert (config["epochs"], config["lr"], config["batch_size"], config["mask_frames"]) == (
        2,
        2e-2,
        32,
        80,
    )
    assert "fold 5: test accuracy" in capsys.readouterr().out
    trained = load_file(run / "fold3.safetensors")
    assert trained.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_saved_fold_gives_the_reported_accuracy(train_main, tmp_path, esc50_dir, cache_dir):
    train_main("--method", "houlsby_par", "--epochs", 4, "--lr", 1e-2)
    file = tmp_path / "runs" / "esc10" / "houlsby_par" / "seed0" / "fold1.safetensors"
    dataset = load_dataset("esc10", esc50_dir, cache_dir)
    features, _ = build_features(dataset, 100, cache_dir)
    model = load_trained(file).eval()
    test = dataset.folds[1].test
    predicted = model(torch.from_numpy(features[test]).float()).argmax(1)
    accuracy = 100 * (predicted == torch.tensor(dataset.labels)[test]).float().mean().item()
    assert accuracy == pytest.approx(read_header(file)["result"]["accuracy"])


def test_training_learns(train_main, tmp_path):
    """Ten tones of different pitch, 60 clips to train on: at least four times the 10 % of
    chance.
    """
    tones = make_esc50(tmp_path / "tones", takes=2, seconds=2)
    words = ["--data-dir", tones, "--epochs", 10, "--batch-size", 6, "--seconds", 2]
    assert train_main(*words, "--lr", 5e-3) == 0
    run = tmp_path / "runs/esc10/houlsby_par/seed0"
    assert json.loads((run / "result.json").read_text())["accuracy"] >= 40
    losses = [float(row["loss"]) for row in rows_of(run)]
    assert losses[-1] < losses[0] - 0.2


def test_the_documented_command_on_random_tiny_weights(train_main, tmp_path):
    assert (
        train_main(
            "--method", "houlsby_par", "--weights", "random:tiny", "--shots", 1, "--epochs", 1
        )
        == 0
    )
    header = read_header(tmp_path / "runs/esc10/houlsby_par/seed0/fold1.safetensors")
    assert header["backbone"]["name"] == "random:tiny" and header["settings"]["shots"] == 1


def test_a_finished_fold_is_not_trained_again(train_main, tmp_path, monkeypatch):
    assert train_main("--folds", "1") == 0
    file = tmp_path / "runs/esc10/houlsby_par/seed0/fold1.safetensors"
    before = file.read_bytes()
    trained = []
    original = train.train_fold
    monkeypatch.setattr(
        train, "train_fold", lambda *args: trained.append(args[3]) or original(*args)
    )
    assert train_main("--folds", "1,2") == 0
    assert trained == [2] and file.read_bytes() == before
    assert len(json.loads((file.parent / "result.json").read_text())["folds"]) == 2


def test_cosine_schedule():
    assert train.cosine(0.5, 0, 100) == 0.5
    assert train.cosine(0.5, 50, 100) == pytest.approx(0.25)
    assert train.cosine(0.5, 100, 100) == pytest.approx(0)


def test_micro_batches_change_nothing(train_main, tmp_path):
    results = []
    for n in (30, 7):
        assert train_main("--micro-batch", n, "--out", tmp_path / str(n)) == 0
        results.append(load_file(tmp_path / str(n) / "esc10/houlsby_par/seed0/fold1.safetensors"))
    for name, tensor in results[0].items():
        assert (tensor - results[1][name]).abs().max() <= 1e-4, name


def test_bfloat16_runs_and_keeps_trained_tensors_in_float32(train_main, tmp_path):
    assert train_main("--dtype", "bfloat16", "--method", "adapter_dpt_lora") == 0
    tensors = load_file(tmp_path / "runs/esc10/adapter_dpt_lora/seed0/fold1.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


# ------------------------------------------------------------------ interruption, several processes


def command(tmp_path, esc50_dir, cache_dir, out, *options) -> list[str]:
    """A run of train.py in a process of its own."""
    words = [
        "--dataset",
        "esc10",
        "--data-dir",
        esc50_dir,
        "--weights",
        SMALL_AST,
        "--cache-dir",
        cache_dir,
        "--method",
        "convpass_houlsby_par",
        "--epochs",
        5,
        "--folds",
        "2,4",
        "--batch-size",
        7,
        "--seconds",
        1,
        "--out",
        tmp_path / out,
        *options,
    ]
    return [sys.executable, str(ROOT / "train.py"), *map(str, words)]


def test_a_killed_run_resumes_to_the_same_bits(tmp_path, esc50_dir, cache_dir, capsys):
    """SIGKILL once in the first fold and once in the second; dropout, masking and order must all be
    redrawn alike. The whole run and the last attempt are in this process.
    """
    assert train.main(command(tmp_path, esc50_dir, cache_dir, "whole")[2:]) == 0
    killed = tmp_path / "killed" / "esc10" / "convpass_houlsby_par" / "seed0"
    resume = command(tmp_path, esc50_dir, cache_dir, "killed", "--resume")
    for rows_before_the_kill in (2, 7):
        process = subprocess.Popen(resume, cwd=tmp_path)
        while process.poll() is None:
            if (killed / "metrics.csv").exists() and len(rows_of(killed)) >= rows_before_the_kill:
                break
            time.sleep(0.002)
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert train.main(resume[2:]) == 0
    assert "fold 4: going on after epoch" in capsys.readouterr().out
    whole = tmp_path / "whole" / "esc10" / "convpass_houlsby_par" / "seed0"
    for fold in (2, 4):
        one, other = (load_file(run / f"fold{fold}.safetensors") for run in (whole, killed))
        assert one.keys() == other.keys() and all(
            torch.equal(one[name], other[name]) for name in one
        )
    results = [json.loads((run / "result.json").read_text()) for run in (whole, killed)]
    assert without_times(results[0]) == without_times(results[1])
    histories = [[{**row, "clips/s": ""} for row in rows_of(run)] for run in (whole, killed)]
    assert histories[0] == histories[1]


@pytest.mark.parametrize(
    "method", [["houlsby_par"], ["linear", "--no-mask"]], ids=["houlsby_par", "linear"]
)
def test_two_processes_train_like_one(method, tmp_path, esc50_dir, cache_dir):
    """Batches of 29 and then 1 clip, which leaves nothing for the second process; and in
    micro-batches of 8 or 7 each, 29 = 8 + 7 + 7 + 7.
    """
    options = ["--method", *method, "--folds", "1", "--epochs", "2", "--batch-size", "29"]
    options += ["--seconds", "5"]
    one = command(tmp_path, esc50_dir, cache_dir, "one", *options)
    two = command(tmp_path, esc50_dir, cache_dir, "two", *options, "--micro-batch", "8")
    assert train.main(one[2:]) == 0
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    subprocess.run(
        [*torchrun, *two[1:]], check=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    runs = [tmp_path / name / "esc10" / method[0] / "seed0" for name in ("one", "two")]
    first, second = (load_file(run / "fold1.safetensors") for run in runs)
    for name in first:
        assert (first[name] - second[name]).abs().max() <= 1e-5, name
    histories = [[(row["epoch"], row["accuracy"]) for row in rows_of(run)] for run in runs]
    assert histories[0] == histories[1]
    predicted = [csv.DictReader((run / "predictions.csv").read_text().splitlines()) for run in runs]
    for one, other in zip(*predicted, strict=True):
        assert (
            abs(float(one.pop("probability")) - float(other.pop("probability"))) < 1e-5
            and one == other
        )


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_with_a_message(victim, tmp_path, esc50_dir, cache_dir):
    train_command = command(tmp_path, esc50_dir, cache_dir, "runs", "--epochs", 10_000)[1:]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *train_command,
    ]
    process = subprocess.Popen(
        torchrun,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 100
        while not list((tmp_path / "runs").rglob("metrics.csv")) and time.monotonic() < deadline:
            time.sleep(0.1)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(workers[victim]), signal.SIGKILL)
        _, printed = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert (
        f"process {1 - victim} stops: another process of this run has ended" in line
        and "--resume" in line
    )
    assert f'{ROOT}/train.py", line' not in printed  # no traceback through our own code


# ---------------------------------------------------------------------------------------- bad input


@pytest.fixture
def fails(train_main, capsys):
    """Runs train.py and returns the one line it ended with; exit code 2, no traceback."""

    def call(*options, lines=1) -> str:
        capsys.readouterr()
        assert train_main(*options) == 2
        # warnings: the miniature is not whole
        printed = capsys.readouterr().err.strip().splitlines()
        error = "\n".join(line for line in printed if not line.startswith("warning: "))
        assert len(error.splitlines()) == lines and "Traceback" not in error, error
        assert error.splitlines()[-1].startswith("error: ")
        return error

    return call


def nothing_written(tmp_path) -> bool:
    return not list((tmp_path / "runs").rglob("*.safetensors")) and not list(
        (tmp_path / "runs").rglob("*.json")
    )


def test_unknown_names_and_numbers(fails, tmp_path):
    assert "did you mean 'lora'" in fails("--method", "loora")
    assert "did you mean 'esc50'" in fails("--dataset", "esc5")
    assert "--help shows all options" in fails("--epoch", "many")
    assert "--epochs" in fails("--epochs", "0")
    assert "esc10 has the folds 1, 2, 3, 4, 5" in fails("--folds", "6")
    assert "has no setting 'alpha'" in fails("--method", "dpt", "--alpha", "3")
    assert "--lr is -1.0" in fails("--lr", "-1")
    assert "--alpha is nan" in fails("--method", "lora", "--alpha", "nan")
    assert "no list of whole numbers like 0,1,2, below 2**31" in fails("--seed", 10**11)
    assert "0.16 s (one patch) to 60 s" in fails("--seconds", "100000")
    assert "--device meta" in fails("--device", "meta")
    assert "--device quantum" in fails("--device", "quantum")
    assert nothing_written(tmp_path)


def test_missing_cuda_is_named(fails):
    if not torch.cuda.is_available():
        assert "--device cuda" in fails("--device", "cuda")
    assert "--device cuda:99" in fails("--device", "cuda:99")


def test_missing_and_incomplete_folders(fails, tmp_path):
    assert "no such folder" in fails("--data-dir", tmp_path / "absent")
    root = make_esc50(tmp_path / "data")
    (root / "audio" / "1-100000-A-0.wav").unlink()
    assert "1 of 50 files are missing (audio/1-100000-A-0.wav)" in fails("--data-dir", root)
    assert nothing_written(tmp_path)


def test_bad_sounds_are_listed_or_skipped(tmp_path, capfd):
    make_folder(tmp_path / "sounds", classes=("high", "low"))
    bad = make_bad_files(tmp_path / "sounds" / "low" / "bad")
    (tmp_path / "sounds" / "low" / "bad" / "notes.txt").write_text("recorded on Monday")
    del bad["data.raw"], bad["absent.wav"]

    def run(*options):
        places = [
            "--data-dir",
            tmp_path / "sounds",
            "--cache-dir",
            tmp_path / "cache",
            "--out",
            tmp_path / "runs",
        ]
        model = ["--weights", SMALL_AST, "--method", "linear", "--epochs", 1]
        return train.main(
            [
                str(word)
                for word in ("--dataset", "folder", *places, *model, "--seconds", 5, *options)
            ]
        )

    assert run() == 2
    error = capfd.readouterr().err
    assert (
        f"error: {len(bad)} of {10 + len(bad)} sound files cannot be used" in error
        and "--skip-bad" in error
    )
    for name, reason in bad.items():
        assert any(
            line.split(": ", 1)[0].endswith(name) and reason in line for line in error.splitlines()
        ), name
    ours = [line for line in error.splitlines() if line.startswith(("  ", "warning: ", "error: "))]
    assert len(ours) == len(bad) + 2 and ours[-1].startswith("error: ") and "Traceback" not in error
    assert "ignored (low/bad/data.raw, low/bad/notes.txt)" in error
    assert not (tmp_path / "runs").exists()

    assert run("--skip-bad") == 0
    assert f"going on without {len(bad)} of {10 + len(bad)} clips" in capfd.readouterr().err
    folder = tmp_path / "runs" / "folder" / "linear" / "seed0"
    skipped = json.loads((folder / "config.json").read_text())["skipped_clips"]
    assert skipped.keys() == {f"low/bad/{name}" for name in bad}
    assert "truncated" in skipped["low/bad/cut.wav"]
    rows = list(csv.DictReader((folder / "split.csv").read_text().splitlines()))
    assert {row["path"] for row in rows if row["split"] == "skipped"} == skipped.keys()
    assert len(rows) == 10 + len(bad)


def test_bad_weights(fails, tmp_path):
    content = (SMALL_AST / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:1000])
    assert "cannot read" in fails("--weights", tmp_path / "cut.safetensors")
    torch.save({"conv1.weight": torch.zeros(3, 3)}, tmp_path / "resnet.pth")
    assert "no AST checkpoint" in fails("--weights", tmp_path / "resnet.pth")
    assert "no weights at" in fails("--weights", "absent.pth")
    folder = write_ast(tmp_path / "mel", SMALL_STATE, {**SMALL_CONFIG, "num_mel_bins": 64})
    said = fails("--weights", folder, "--cache-dir", tmp_path / "cache")
    assert "mel/config.json: it reads 64 Mel bands, the features here have 128" in said
    assert not (tmp_path / "cache").exists()  # before the features are computed
    assert nothing_written(tmp_path)


def test_no_network(fails, monkeypatch, tmp_path):
    monkeypatch.setattr(paper, "ESC50", replace(paper.ESC50, url="http://127.0.0.1:9/master.zip"))
    defaults = [
        "--dataset",
        "esc10",
        "--weights",
        "random:tiny",
        "--cache-dir",
        tmp_path,
        "--out",
        tmp_path / "runs",
    ]
    assert train.main([str(word) for word in defaults]) == 2
    assert nothing_written(tmp_path)


def test_a_loss_that_is_not_finite(fails, tmp_path, monkeypatch):
    loss = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional,
        "cross_entropy",
        lambda *a, **options: loss(*a, **options) * float("nan"),
    )
    message = fails("--method", "lora", "--batch-size", 10)
    assert "in fold 1, epoch 1, step" in message and "--lr" in message
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


def test_another_experiment_in_the_same_folder(fails, train_main):
    assert train_main("--epochs", 1) == 0
    assert "holds a run with epochs 1, not 2" in fails("--epochs", 2)
    assert "holds a run with the backbone" in fails("--epochs", 1, "--weights", "random:demo")
    relative = os.path.relpath(SMALL_AST)
    # the same backbone by another name
    assert train_main("--epochs", 1, "--weights", relative) == 0


def test_a_damaged_state_is_named(fails, train_main, tmp_path, monkeypatch):
    run = tmp_path / "runs" / "esc10" / "houlsby_par" / "seed0"
    monkeypatch.setattr(train, "train_epoch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_main()
    (run / "fold1.resume.pt").write_bytes(b"PK nothing")
    assert "fold1.resume.pt is damaged: delete it" in fails("--resume")


def test_a_place_that_cannot_be_written(fails, tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert "is --out a folder to write to?" in fails("--out", tmp_path / "file")
    assert "is --cache-dir a folder to write to?" in fails("--cache-dir", tmp_path / "file")


def test_a_full_disk(fails, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "metrics.csv")

    monkeypatch.setattr(records, "write_metrics", full)
    assert "the disk is full (metrics.csv)" in fails()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory(fails, monkeypatch, tmp_path, error):
    def out_of_memory(*_):
        raise error

    monkeypatch.setattr(train, "train_fold", out_of_memory)
    for options, tried in (
        ([], 32),
        (["--batch-size", 9], 9),
        (["--batch-size", 9, "--micro-batch", 4], 4),
    ):
        assert f"choose a --micro-batch smaller than {tried}" in fails(
            *options, "--out", tmp_path / str(tried)
        )


def test_interruption_by_the_user(train_main, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_fold", interrupted)
    assert train_main() == 130
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["train.py"], 130),
        (["-m", "tools.predict"], 130),
        (["-c", "import support, torch"], -signal.SIGINT),  # a program of one's own
    ],
)
def test_interruption_while_torch_is_imported(words, code, tmp_path):
    """A torch that is interrupted, in the place of the real one."""
    interrupted = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise ImportError"
    (tmp_path / "torch.py").write_text(interrupted)
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert done.stderr == "interrupted\n" or code < 0


# ------------------------------------------------------------------------- the list, the repository


def test_what_touches_no_sound_and_no_hub_starts_without_their_libraries():
    """Their import costs as long as a quarter of torch's."""
    code = (
        "import contextlib, sys, train\n"
        "for words in (['--help'], ['--wrong'], ['--method', 'unknown'], ['--list-methods']):\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        train.main(words)\n"
        "print({'huggingface_hub', 'soundfile', 'soxr', 'onnx', 'matplotlib'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()", done.stdout + done.stderr
    assert "'unknown'" in done.stderr and "--wrong" in done.stderr


def test_list_methods_prints_every_row(capsys):
    assert train.main(["--list-methods"]) == 0
    printed = capsys.readouterr().out
    for name, method in petl.METHODS.items():
        (line,) = [line for line in printed.splitlines() if line.split()[:1] == [name]]
        assert method.where in line and method.paper in line
    assert [
        line.split()[1] for line in printed.splitlines() if line.startswith(("linear ", "probe "))
    ] == ["39,986", "1,996,850"]
    for number in ("85,708,032", "497,952", "39,986 / 9,226 / 28,451 / 25,375", "85,339,392"):
        assert number in printed
