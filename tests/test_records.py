"""What a run leaves behind: fold files, which are all that programs read, and tables for people,
made of them."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from types import SimpleNamespace

import pytest
import torch
from helpers import SMALL_AST, build_features, make_folder, save_random, write_csv
from safetensors import safe_open
from safetensors.torch import load_file

import train
from data import Dataset, load_dataset
from load_weights import load_trained
from support import console, records
from support.checkpoints import read_header, sha256_of, write_tensors
from support.command import UserError
from support.records import METRICS, Progress, check_not_of_run, read_run, write_metrics
from tools import bench, export, predict, pretrain
from train import Settings

MADE_AGAIN = ("metrics.csv", "predictions.csv", "confusion.csv", "result.json")


def table(file: Path) -> list[dict[str, str]]:
    with open(file, encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def said(capsys) -> list[str]:
    """What was said on stderr; that the data are a miniature, which is always said, apart."""
    return [
        line for line in capsys.readouterr().err.splitlines() if "where the release has" not in line
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / name).read_bytes() for name in ("config.json", "split.csv", *MADE_AGAIN)
    }


@pytest.fixture(scope="module")
def words(esc50_dir, cache_dir, tmp_path_factory):
    """A command of train.py: two epochs of fold 2."""
    out = tmp_path_factory.mktemp("runs")
    model = ["--weights", SMALL_AST, "--epochs", 2, "--folds", 2, "--seconds", 0.5]
    places = ["--dataset", "esc10", "--data-dir", esc50_dir, "--cache-dir", cache_dir, "--out", out]
    return lambda *options: [str(word) for word in (*model, *places, *options)]


@pytest.fixture(scope="module")
def finished(words) -> Path:
    """A run with two folds, the second one by a command of its own."""
    assert train.main(words("--folds", 3)) == train.main(words()) == 0
    return Path(words()[-1], "esc10", "houlsby_par", "seed0")


@pytest.fixture
def again(finished, words, tmp_path, capsys):
    """A copy of that run, and a function that gives the command of its fold 2 and returns what is
    said on stderr."""
    folder = shutil.copytree(finished, tmp_path / "esc10" / "houlsby_par" / "seed0")

    def call(*options, code=0) -> list[str]:
        capsys.readouterr()
        assert train.main(words("--out", tmp_path, *options)) == code
        return said(capsys)

    return folder, call


# -------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize(
    "options",
    [["--micro-batch", 7], ["--method", "linear", "--no-mask"], ["--dtype", "bfloat16"]],
    ids=lambda words: " ".join(map(str, words)),
)
def test_predictions_are_those_of_the_saved_weights(words, options, tmp_path, esc50_dir, cache_dir):
    """Clip by clip beside the model that is read back; the accuracies of result.json are what the
    rows give."""
    assert (
        train.main(
            words("--lr", 1e-2, "--epochs", 3, "--batch-size", 6, "--out", tmp_path, *options)
        )
        == 0
    )
    (folder,) = tmp_path.glob("esc10/*/seed0")
    rows, split = table(folder / "predictions.csv"), table(folder / "split.csv")
    assert list(rows[0]) == ["fold", "part", "path", "label", "prediction", "probability"]
    listed = [row for row in split if row["fold"] == "2" and row["split"] in ("val", "test")]
    assert [(r["fold"], r["part"], r["label"], r["path"]) for r in rows] == [
        (*row.values(),) for row in listed
    ]
    dataset = load_dataset("esc10", esc50_dir, cache_dir)
    features, _ = build_features(dataset, 50, cache_dir)
    index = [dataset.names.index(row["path"]) for row in rows]
    with torch.inference_mode():
        expected = load_trained(folder / "fold2.safetensors")(
            torch.from_numpy(features[index]).float()
        ).softmax(1)
    exact = "bfloat16" not in options
    for row, probabilities in zip(rows, expected, strict=True):
        number = dataset.classes.index(row["prediction"])
        assert number == probabilities.argmax() or not exact
        assert float(row["probability"]) == pytest.approx(
            probabilities[number].item(), abs=1e-5 if exact else 0.05
        )
        assert len(row["probability"]) == len("0.123456")
    (result,) = json.loads((folder / "result.json").read_text())["folds"]
    for part, name in (("val", "validation_accuracy"), ("test", "accuracy")):
        right = [row["prediction"] == row["label"] for row in rows if row["part"] == part]
        assert result[name] == 100 * sum(right) / len(right)
    assert len({row["prediction"] for row in rows}) > 2


def test_folds_that_are_finished_apart_share_the_files(finished):
    rows = table(finished / "predictions.csv")
    assert [(row["fold"], row["part"]) for row in rows] == [
        (fold, part) for fold in "23" for part in ("val", "test") for _ in range(10)
    ]
    assert [row["fold"] + row["epoch"] for row in table(finished / "metrics.csv")] == [
        "21",
        "22",
        "31",
        "32",
    ]


def test_a_fold_file_holds_what_is_needed(finished, capsys):
    """Its tensors are those that train, and its header says what came out. `export show` leaves out
    the record."""
    file = finished / "fold2.safetensors"
    header = read_header(file)
    record = header["record"]
    assert [row["epoch"] for row in record["history"]] == [1, 2] and len(
        record["predictions"]
    ) == 20
    assert load_file(file).keys() == {
        name for name, p in load_trained(file).named_parameters() if p.requires_grad
    }
    assert (
        header["settings"] == json.loads(json.dumps(header["settings"]))
        and header["result"]["fold"] == 2
    )
    export.show(file)
    assert "millionths" not in capsys.readouterr().out


def test_a_model_in_another_format_leaves_the_record_behind(tmp_path):
    record = {
        "history": [{"fold": 1, "epoch": 1, "loss": 0.5, "accuracy": ""}],
        "predictions": [3, 0],
        "millionths": [500_000, 10**6],
    }
    save_random(tmp_path / "fold1.safetensors", "lora", "cls_dist", record=record)
    for to, out in (("merged", "merged.safetensors"), ("hf", "hf"), ("peft", "peft")):
        assert (
            export.main(
                [
                    "export",
                    f"{tmp_path}/fold1.safetensors",
                    "--to",
                    to,
                    "--out",
                    f"{tmp_path}/{out}",
                ]
            )
            == 0
        )
    for file in (tmp_path / "merged.safetensors", tmp_path / "hf" / "model.safetensors"):
        with safe_open(file, "pt") as opened:
            assert "history" not in opened.metadata()["ast_petl"]


def test_names_that_the_locale_cannot_show(tmp_path):
    """A table with an emoji in a path and in a class: what is written is UTF-8, what is printed is
    ASCII."""
    make_folder(tmp_path / "sounds", classes=("\N{DOG FACE}", "low"))
    bad = tmp_path / "sounds" / "low" / "\N{CAT FACE}.wav"
    bad.write_text("no sound")
    names = sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.wav"))
    write_csv(tmp_path / "t.csv", "path,label", *(f"{name},{name.split('/')[1]}" for name in names))
    out = tmp_path / "\N{DOG FACE}"
    words = [
        "--dataset",
        "csv",
        "--data-dir",
        tmp_path / "t.csv",
        "--weights",
        SMALL_AST,
        "--method",
        "linear",
        "--epochs",
        1,
        "--skip-bad",
        "--cache-dir",
        tmp_path / "cache",
        "--out",
        out,
    ]
    locale = {
        "LC_ALL": "C",
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    command = [sys.executable, train.__file__, *map(str, words)]
    done = subprocess.run(
        command, env={**os.environ, **locale}, capture_output=True, encoding="ascii", check=True
    )
    assert "\\U0001f431.wav: cannot be read (Format not recognised" in done.stderr
    assert "tools.predict" in done.stdout
    assert "\\xf0\\x9f\\x90\\xb6/csv/linear/seed0" in done.stdout  # a byte after the other
    run = out / "csv" / "linear" / "seed0"
    split, rows = table(run / "split.csv"), table(run / "predictions.csv")
    assert sorted(row["path"] for row in split) == names and {row["label"] for row in split} == {
        "\N{DOG FACE}",
        "low",
    }
    assert (
        {row["path"].split("/")[1] for row in rows}
        == {row["label"] for row in rows}
        == {"\N{DOG FACE}", "low"}
    )
    assert {(row["path"], row["label"]) for row in rows} <= {
        (row["path"], row["label"]) for row in split
    }


def test_a_clip_has_one_name_in_every_locale(tmp_path):
    """Else the clips of a run are denied where another locale reads the folder. So for a class."""
    make_folder(tmp_path / "dé", 2, classes=("lów", "mid"))
    code = (
        "import json, sys, torch, data\n"
        "from support.files import path_in\n"
        "sounds, cache = map(path_in, json.loads(sys.argv[1]))\n"
        "dataset = data.load_dataset('folder', sounds, None)\n"
        "data.load_clips(dataset, 16, torch.device('cpu'), cache, False)\n"
        "print(json.dumps([dataset.classes, dataset.names]))"
    )
    for utf8 in "01":
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps([str(tmp_path / "dé"), str(tmp_path / utf8)])],
            env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": utf8, "PYTHONCOERCECLOCALE": "0"},
            cwd=Path(train.__file__).parent,
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
        classes, names = json.loads(done.stdout.splitlines()[-1])
        assert classes == ["lów", "mid"]
        assert names == ["lów/0.wav", "lów/1.wav", "mid/0.wav", "mid/1.wav"]


@pytest.mark.parametrize("name", ["fold2.safetensors", "config.json", "result.json"])
def test_other_commands_write_over_no_file_of_a_run(tmp_path, name, capsys):
    """Also not where a file is not there yet. Elsewhere any name will do."""
    check_not_of_run(tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    check_not_of_run(tmp_path / "mine.json")
    out = str(tmp_path / name)
    commands = {"config.json": (bench, ["--json", out]), "result.json": (bench, ["--json", out])}
    command, words = commands.get(name, (pretrain, [str(tmp_path), "--out", out]))
    assert command.main(words) == 2
    assert capsys.readouterr().err == (
        f"error: {out} would be a file of the run there: give another name\n"
    )
    assert (tmp_path / "config.json").read_text() == "{}"


# --------------------------------------------------------------------------------- files for people

SPOILT = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "no text": lambda file: file.write_bytes(b"\xff\0\n"),
    "another number": lambda file: file.write_bytes(
        re.sub(rb"\b0(?=[.,])", b"1", file.read_bytes(), count=1)
    ),
}


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("name", MADE_AGAIN)
def test_what_is_written_for_people_is_never_read(again, name, how):
    """Whoever reads the run reads the same as before, and the same command of train.py makes the
    file again."""
    folder, call = again
    before, run = contents(folder), read_run(folder)
    SPOILT[how](folder / name)
    assert read_run(folder) == run
    assert call() == []
    assert {n: contents(folder)[n] for n in MADE_AGAIN} == {n: before[n] for n in MADE_AGAIN}


def test_metrics_epoch_by_epoch(again, capsys):
    """The epochs of the current fold stand beside those of the finished ones."""
    folder, _ = again
    old = [row for header in read_run(folder).folds.values() for row in header["record"]["history"]]
    rows = table(folder / "metrics.csv")
    now = [dict.fromkeys(METRICS, "0") | {"fold": 1, "epoch": epoch} for epoch in (1, 2)]
    for epochs in (now[:1], now):
        write_metrics(folder, old + epochs)
        assert table(folder / "metrics.csv") == rows + [
            {k: str(v) for k, v in row.items()} for row in epochs
        ]


def test_seconds_of_a_fold(monkeypatch):
    """From its beginning to the end of its last epoch, and those before an interruption."""
    times = iter([6.5, 8.0, 21.0])
    monkeypatch.setattr(records, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    progress = Progress(1, clock=5.0)
    for seconds in (1.5, 3.0):
        progress.tick()
        assert progress.seconds == seconds
    progress = Progress(1, [], progress.seconds, clock=20.0)
    progress.tick()
    assert progress.seconds == 4.0


def test_the_command_that_is_printed_can_be_copied(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "my runs" / "seed0")
    text = console.summary(read_run(folder), Dataset("my", folder, [], [], [], {}))
    (line,) = [line for line in text.splitlines() if "python -m tools.predict" in line]
    assert shlex.split(line)[-2:] == [str(folder), "SOUND.wav"]


# -------------------------------------------------------------------------- settings and the splits


def test_a_config_that_is_missing_is_written_again(again):
    """The fold files say which settings it must have."""
    folder, call = again
    (folder / "config.json").unlink()
    with pytest.raises(
        UserError, match=r"is no finished run of train\.py: there is no config\.json"
    ):
        read_run(folder)
    (line,) = call("--epochs", 3, code=2)
    assert line.startswith(
        f"error: {folder / 'fold2.safetensors'} is of a run with epochs 2, not 3: delete it"
    )
    assert call() == [] and read_run(folder).config["epochs"] == 2


def test_a_config_that_is_damaged_or_another_is_refused(again):
    folder, call = again
    file, text = folder / "config.json", (folder / "config.json").read_text()
    for content, message in (
        (text[:-30], f"cannot read {file} ("),
        (text.replace('"n_frames": 5', '"n_frames": 0.5'), f"{file}: n_frames: Expected int"),
        (
            text.replace('"epochs": 2', '"epochs": 3'),
            f"{folder} holds a run with epochs 3, not 2: give another --out",
        ),
    ):
        assert content != text
        file.write_text(content)
        (line,) = call(code=2)
        assert line.startswith(f"error: {message}")
        with pytest.raises(UserError, match=re.escape(message)):
            read_run(folder)


def test_other_splits_are_never_used(again):
    """The settings have the SHA-256 of split.csv. The same command of train.py writes it again."""
    folder, call = again
    file = folder / "split.csv"
    before = file.read_text()
    for spoil in (
        lambda: file.write_text(before.replace("3,test,", "3,val,")),
        lambda: file.write_text(before[:-3]),
    ):
        spoil()
        with pytest.raises(
            UserError, match=r"split\.csv is not that of the run: delete it, and the same command"
        ):
            read_run(folder)
        assert call() == [] and file.read_text() == before
    file.unlink()
    with pytest.raises(UserError, match=r"there is no split\.csv"):
        read_run(folder)
    assert call() == [] and file.read_text() == before


def test_of_two_experiments_that_start_together_one_is_refused(finished, tmp_path, monkeypatch):
    settings = Settings(**read_header(finished / "fold2.safetensors")["settings"])
    options = {**dict.fromkeys(records.SOURCE), "cache_dir": "cache"}
    both, exists = Barrier(2), Path.exists

    def looked(path):
        known = exists(path)
        if path.name == "config.json":
            with suppress(BrokenBarrierError):
                both.wait(0.5)  # for the other one to have read as much
        return known

    def start(lr):
        with suppress(UserError):
            records.start_run(
                tmp_path, replace(settings, lr=lr), "fold,split,label,path\n", [], {}, options
            )
            return lr

    monkeypatch.setattr(Path, "exists", looked)
    with ThreadPoolExecutor() as pool:
        (started,) = set(pool.map(start, (0.1, 0.2))) - {None}
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == started


# ----------------------------------------------------------------------------- files of another run


def changed(file: Path, new: Path, **settings) -> None:
    """A copy of a fold file, whole and with its digest, of a run with other settings."""
    header = read_header(file)
    header["settings"] |= settings
    write_tensors(new, load_file(file), header)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"lr": 0.1}, "lr 0.1, not 0.02"),
        ({"seed": 7}, "seed 7, not 0"),
        ({"clips": "0" * 64}, "other clips or splits"),
    ],
)
def test_a_fold_of_other_settings_is_never_averaged(again, settings, what):
    """By train.py, by whoever reads the run, and by tools.predict, also where config.json is
    missing."""
    folder, call = again
    file = folder / "fold3.safetensors"
    changed(file, file, **settings)
    message = f"{file} is of a run with {what}: delete it, or give another --out"
    (line,) = call(code=2)
    assert line == f"error: {message}"
    with pytest.raises(UserError, match=re.escape(message)):
        read_run(folder)
    for _ in range(2):
        with pytest.raises(UserError, match=re.escape(message)):
            predict.load(folder)
        (folder / "config.json").unlink(missing_ok=True)


def test_a_setting_of_ones_own_is_compared(again):
    """A field that somebody has added to train.Settings."""
    folder, _ = again
    first, other = (folder / f"fold{fold}.safetensors" for fold in (2, 3))
    changed(first, first, warm_up=5)
    for settings, shown in (({}, "None"), ({"warm_up": "x" * 10_000}, "x" * 200)):
        changed(other, other, **settings)
        with pytest.raises(UserError, match=f"{other} is of a run with warm_up {shown}, not 5: de"):
            read_run(folder)


def test_a_fold_under_another_name_is_refused(again):
    folder, call = again
    shutil.copy(folder / "fold3.safetensors", folder / "fold1.safetensors")
    (line,) = call("--folds", 1, code=2)
    assert (
        line == f"error: {folder / 'fold1.safetensors'} is of a run with fold 3: delete it, "
        "or give another --out"
    )
    for read in (read_run, predict.load):
        with pytest.raises(UserError, match=r"fold1\.safetensors is of a run with fold 3"):
            read(folder)


def with_split(folder: Path, text: str) -> None:
    """Another split.csv, as somebody else may write it: the settings have its hash."""
    (folder / "split.csv").write_text(text)
    config = json.loads((folder / "config.json").read_text())
    config["clips"] = records.hash_of(text)
    (folder / "config.json").write_text(json.dumps(config))
    for file in folder.glob("fold*.safetensors"):
        changed(file, file, clips=config["clips"])


STRANGE_SPLITS = {
    "as it is": lambda text: text,
    "a clip less": lambda text: re.sub("3,test,.*\n", "", text, count=1),
    "nothing": lambda text: "",
    "another header": lambda text: text.replace("label", "class", 1),
    "a cell less": lambda text: text + "2,train,dog\n",
    "a cell more": lambda text: text + "2,train,dog,a.wav,1\n",
    "a long cell": lambda text: text + f"2,train,dog,{'a' * 200_000}\n",
    "another class": lambda text: re.sub("3,test,[^,]+,", "3,test,unheard,", text, count=1),
    "nothing to test": lambda text: text.replace("3,test,", "3,val,"),
}


@pytest.mark.parametrize("how", STRANGE_SPLITS)
def test_a_split_that_the_answers_do_not_fit(again, how):
    folder, _ = again
    with_split(folder, STRANGE_SPLITS[how]((folder / "split.csv").read_text()))
    if how == "as it is":
        assert read_run(folder).tested()
        return
    with pytest.raises(UserError, match=r"split\.csv and the fold files do not fit: delete it"):
        read_run(folder)


@pytest.mark.parametrize("name", ["predictions", "millionths"])
def test_a_record_that_does_not_fit_the_split(again, name):
    folder, _ = again
    file = folder / "fold2.safetensors"
    header = read_header(file)
    header["record"][name].pop()
    write_tensors(file, load_file(file), header)
    with pytest.raises(UserError, match=r"split\.csv and the fold files do not fit: delete it"):
        read_run(folder)


def test_folds_of_other_classes_are_refused(again):
    folder, _ = again
    file = folder / "fold3.safetensors"
    header = read_header(file)
    header["classes"].reverse()
    write_tensors(file, load_file(file), header)
    with pytest.raises(
        UserError, match=r"fold3\.safetensors has other classes than the first fold"
    ):
        read_run(folder)
    with pytest.raises(
        UserError, match=r"fold3\.safetensors has other classes than the first fold"
    ):
        predict.load(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [("windows", 1e-9), ("epochs", None), ("choose_by", 3), ("seed", "0"), ("mask_frames", "a")],
)
def test_what_is_read_of_a_config_has_bounds(again, name, value):
    """Windows of a nanosecond would fill the memory."""
    folder, _ = again
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(UserError, match=rf"config\.json: {name}: Expected"):
        read_run(folder)


def test_names_of_folds_are_matched_exactly(again, tmp_path):
    """fold02 and a fold with an Arabic two are not fold 2. A user's folds may begin with 0.

    Folds come in the order of their numbers.
    """
    for name in (
        "fold10",
        "fold2",
        "fold1",
        "foldx",
        "fold01",
        "fold0",
        "fold\u0662",
        "fold1234567890",
        "xfold3",
    ):
        (tmp_path / f"{name}.safetensors").touch()
    assert list(records.fold_files(tmp_path).items()) == [
        (k, tmp_path / f"fold{k}.safetensors") for k in (0, 1, 2, 10)
    ]
    folder, call = again
    before = read_run(folder)
    for name in ("fold02", "fold\u0662"):
        changed(folder / "fold2.safetensors", folder / f"{name}.safetensors", lr=0.1)
    assert read_run(folder) == before and len(predict.load(folder).models) == 2 and call() == []


@pytest.fixture
def interrupted(words, tmp_path, monkeypatch, capsys):
    """A function that trains two folds until the second epoch of the second one, and returns the
    folder."""
    write = records.write_metrics

    def call(*options) -> Path:
        saved = []

        def stop(folder, rows):
            write(folder, rows)
            saved.append(folder)
            if len(saved) == 3:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(records, "write_metrics", stop)
            options = (
                "--method",
                "linear",
                "--no-mask",
                "--folds",
                "1,2",
                "--out",
                tmp_path / "runs",
                *options,
            )
            assert train.main(words(*options)) == 130
        capsys.readouterr()
        return saved[-1]

    return call


def resume(words, folder: Path, capsys, code: int, *options) -> list[str]:
    options = (
        "--method",
        "linear",
        "--no-mask",
        "--folds",
        "1,2",
        "--out",
        folder.parents[2],
        *options,
    )
    assert train.main(words("--resume", *options)) == code
    return said(capsys)


@pytest.mark.parametrize(
    ("change", "what"),
    [({"seed": 3}, "seed 3, not 0"), ({"lr": 0.1}, "lr 0.1, not 0.01"), ({"fold": 1}, "fold 1")],
)
def test_a_state_of_another_run_is_never_resumed(interrupted, words, change, what, capsys):
    folder = interrupted()
    state = torch.load(folder / "fold2.resume.pt")
    del state["digest"]
    state = {**state, **{name: value for name, value in change.items() if name == "fold"}}
    state["settings"] = {
        **state["settings"],
        **{name: value for name, value in change.items() if name != "fold"},
    }
    torch.save({**state, "digest": sha256_of(state)}, folder / "fold2.resume.pt")
    (line,) = resume(words, folder, capsys, 2)
    file = folder / "fold2.resume.pt"
    assert line == f"error: {file} is of a run with {what}: delete it, or give another --out"


def test_the_state_of_one_seed_is_not_that_of_another(interrupted, words, capsys):
    """Where somebody has moved it."""
    folder = interrupted("--seed", 1)
    other = folder.parent / "seed2"
    other.mkdir()
    shutil.move(folder / "fold2.resume.pt", other)
    (line,) = resume(words, folder, capsys, 2, "--seed", 2)
    assert (
        "fold2.resume.pt is of a run with seed 1, not 2: delete it, or give another --out" in line
    )


def test_epochs_of_the_interrupted_fold_are_in_metrics_csv(interrupted):
    folder = interrupted()
    assert [row["fold"] + row["epoch"] for row in table(folder / "metrics.csv")] == [
        "11",
        "12",
        "21",
    ]


# --------------------------------------------------------------------------------- kills and damage


def test_the_state_of_a_finished_fold_goes_at_the_next_start(again):
    """A kill between writing the fold file and removing its state leaves both."""
    folder, call = again
    for fold in (2, 4):
        (folder / f"fold{fold}.resume.pt").touch()
    assert call() == [] and [file.name for file in folder.glob("*.pt")] == ["fold4.resume.pt"]


def test_what_a_kill_left_unfinished_goes_at_the_next_start(again):
    """A minute later. A younger file may be that of a process that writes now."""
    folder, call = again
    old = folder / ".fold2.resume.pt.0123abcd.tmp"
    young = folder / ".metrics.csv.89abcdef.tmp"
    for file in (old, young):
        file.write_bytes(b"half of it")
    os.utime(old, (time.time() - 61, time.time() - 61))
    assert call() == [] and not old.exists() and young.exists()


def test_a_damaged_fold_file_is_not_averaged(again):
    folder, call = again
    content = bytearray((folder / "fold3.safetensors").read_bytes())
    content[content.index(b"millionths") + 16] ^= 1  # a digit
    (folder / "fold3.safetensors").write_bytes(content)
    (line,) = call(code=2)
    assert (
        line.startswith(f"error: {folder / 'fold3.safetensors'} is no whole file")
        and "its SHA-256" in line
    )


@pytest.mark.parametrize("key", [b"record", b"digest", b"settings"])
def test_a_key_that_is_damaged_is_not_a_missing_key(again, key):
    folder, call = again
    file = folder / "fold2.safetensors"
    file.write_bytes(file.read_bytes().replace(key, key[:-1] + b"_"))
    (line,) = call(code=2)
    assert line.startswith(f"error: {file}") and (
        "it is damaged" in line or "missing required field digest" in line
    )


class Killed(BaseException):
    pass


def killed(monkeypatch, writes: int, action, *arguments) -> bool:
    """Whether `action` is stopped before it puts the file in its place that follows on so many."""
    count = 0

    def replace(*paths, replace=os.replace):
        nonlocal count
        count += 1
        if count > writes:
            raise Killed
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        try:
            action(*arguments)
        except Killed:
            return True
    return False


def test_a_kill_between_two_writes_loses_nothing(words, tmp_path, monkeypatch, capsys):
    """A run that is killed at each file it writes, and then goes on: nothing is said, and the end
    is the same."""
    run = words("--method", "linear", "--no-mask", "--resume", "--out")
    assert train.main([*run, str(tmp_path / "whole")]) == 0
    whole, writes = tmp_path / "whole" / "esc10" / "linear" / "seed0", 0
    capsys.readouterr()
    while killed(monkeypatch, writes, train.main, [*run, str(tmp_path / str(writes))]):
        folder = tmp_path / str(writes) / "esc10" / "linear" / "seed0"
        assert train.main([*run, str(tmp_path / str(writes))]) == 0
        assert said(capsys) == []
        assert (folder / "predictions.csv").read_bytes() == (whole / "predictions.csv").read_bytes()
        assert read_run(folder).result()["accuracy"] == read_run(whole).result()["accuracy"]
        assert sorted(file.name for file in folder.iterdir()) == sorted(
            file.name for file in whole.iterdir()
        )
        writes += 1
    assert writes > 9
