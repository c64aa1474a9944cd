"""What a run leaves behind: predictions, what is made again from the fold files, and the list by which damage shows."""

import csv
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
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
from safetensors.torch import load_file, save_file

import train
from data import load_dataset
from load_weights import load_trained
from support import console, ledger, records
from support.checkpoints import described, read_header, sha256_of
from support.command import UserError
from support.records import METRICS, Progress, Settings, mend, read_metrics, write_metrics
from tools import export
from tools.campaign import read_run

MADE_AGAIN = ("metrics.csv", "predictions.csv", "confusion.csv", "result.json")


def table(file: Path) -> list[dict[str, str]]:
    with open(file, encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def said(capsys) -> list[str]:
    """What was said on stderr; that the data are a miniature, which is always said, apart."""
    return [line for line in capsys.readouterr().err.splitlines() if "where the release has" not in line]


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (*ledger.FILES, "SHA256SUMS")}


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
    """A copy of that run, and a function that gives the command of its fold 2 and returns what is said on stderr."""
    folder = shutil.copytree(finished, tmp_path / "esc10" / "houlsby_par" / "seed0")

    def call(*options, code=0) -> list[str]:
        capsys.readouterr()
        assert train.main(words("--out", tmp_path, *options)) == code
        return said(capsys)

    return folder, call


# -------------------------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize(
    "options",
    [["--micro-batch", 7], ["--method", "linear", "--no-mask"], ["--dtype", "bfloat16"]],
    ids=lambda words: " ".join(map(str, words)),
)
def test_predictions_are_those_of_the_saved_weights(words, options, tmp_path, esc50_dir, cache_dir):
    """Clip by clip beside the model that is read back; the accuracies of result.json are what the rows give."""
    assert train.main(words("--lr", 1e-2, "--epochs", 3, "--batch-size", 6, "--out", tmp_path, *options)) == 0
    (folder,) = tmp_path.glob("esc10/*/seed0")
    rows, split = table(folder / "predictions.csv"), table(folder / "split.csv")
    assert list(rows[0]) == ["fold", "part", "path", "label", "prediction", "probability"]
    listed = [row for row in split if row["fold"] == "2" and row["split"] in ("val", "test")]
    assert [(r["fold"], r["part"], r["label"], r["path"]) for r in rows] == [(*row.values(),) for row in listed]
    dataset = load_dataset("esc10", esc50_dir, cache_dir)
    features, _ = build_features(dataset, 50, cache_dir)
    index = [dataset.names.index(row["path"]) for row in rows]
    with torch.inference_mode():
        expected = load_trained(folder / "fold2.safetensors")(torch.from_numpy(features[index]).float()).softmax(1)
    exact = "bfloat16" not in options
    for row, probabilities in zip(rows, expected, strict=True):
        number = dataset.classes.index(row["prediction"])
        assert number == probabilities.argmax() or not exact
        assert float(row["probability"]) == pytest.approx(probabilities[number].item(), abs=1e-5 if exact else 0.05)
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
    assert [row["fold"] + row["epoch"] for row in table(finished / "metrics.csv")] == ["21", "22", "31", "32"]


def test_a_fold_file_holds_what_is_needed_and_stays_what_it_was(finished, capsys):
    """Its tensors are those that train. A version that does not know the record finds the digest it expects."""
    file = finished / "fold2.safetensors"
    record = read_header(file)["record"]
    assert [row["epoch"] for row in record["history"]] == [1, 2] and len(record["predictions"]) == 20
    assert load_file(file).keys() == {name for name, p in load_trained(file).named_parameters() if p.requires_grad}
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["ast_petl"])
    known = {name: value for name, value in header.items() if name not in ("record", "digest", "seal")}
    assert header["digest"] == sha256_of([load_file(file), known])
    export.show(file)
    assert "millionths" not in capsys.readouterr().out


def test_a_model_in_another_format_leaves_the_record_behind(tmp_path):
    record = {"history": [{"fold": 1, "epoch": 1}], "predictions": [3, 0], "millionths": [500_000, 10**6]}
    save_random(tmp_path / "fold1.safetensors", "lora", "cls_dist", record=record)
    for to, out in (("merged", "merged.safetensors"), ("hf", "hf"), ("peft", "peft")):
        assert export.main(["export", f"{tmp_path}/fold1.safetensors", "--to", to, "--out", f"{tmp_path}/{out}"]) == 0
    for file in (tmp_path / "merged.safetensors", tmp_path / "hf" / "model.safetensors"):
        with safe_open(file, "pt") as opened:
            assert "history" not in opened.metadata()["ast_petl"]


def test_names_that_the_locale_cannot_show(tmp_path):
    """A table with an emoji in a path and in a class: what is written is UTF-8, what is printed is ASCII."""
    make_folder(tmp_path / "sounds", classes=("\N{DOG FACE}", "low"))
    bad = tmp_path / "sounds" / "low" / "\N{CAT FACE}.wav"
    bad.write_text("no sound")
    names = sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.wav"))
    write_csv(tmp_path / "t.csv", "path,label", *(f"{name},{name.split('/')[1]}" for name in names))
    out = tmp_path / "\N{DOG FACE}"
    words = ["--dataset", "csv", "--data-dir", tmp_path / "t.csv", "--weights", SMALL_AST, "--method", "linear",
             "--epochs", 1, "--skip-bad", "--cache-dir", tmp_path / "cache", "--out", out]  # fmt: skip
    locale = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, train.__file__, *map(str, words)]
    done = subprocess.run(command, env={**os.environ, **locale}, capture_output=True, encoding="ascii", check=True)
    assert "\\udcf0\\udc9f\\udc90\\udcb1.wav: is in no known sound format" in done.stderr
    assert "tools.predict" in done.stdout and "\\udcf0\\udc9f\\udc90\\udcb6/csv/linear/seed0" in done.stdout
    run = out / "csv" / "linear" / "seed0"
    split, rows = table(run / "split.csv"), table(run / "predictions.csv")
    assert sorted(row["path"] for row in split) == names and {row["label"] for row in split} == {"\N{DOG FACE}", "low"}
    assert {row["path"].split("/")[1] for row in rows} == {row["label"] for row in rows} == {"\N{DOG FACE}", "low"}
    assert {(row["path"], row["label"]) for row in rows} <= {(row["path"], row["label"]) for row in split}


# ---------------------------------------------------------------------------------------------------------- made again


def replaced(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


SPOILT = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-30]),
    "no text": lambda file: file.write_bytes(b"\xff\0\n"),
    "another number": lambda file: file.write_bytes(re.sub(rb"\b0(?=[.,])", b"1", file.read_bytes(), count=1)),
}


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("name", MADE_AGAIN)
def test_what_is_damaged_is_said_and_made_again(again, name, how, capsys):
    """By the same command, and by whoever reads a finished run."""
    folder, call = again
    before = contents(folder)
    SPOILT[how](folder / name)
    (line,) = call()
    assert line.startswith(f"warning: {folder / name} is ") and line.endswith(" made again from the fold files")
    after = contents(folder)
    assert {n: after[n] for n in MADE_AGAIN} == {n: before[n] for n in MADE_AGAIN} and call() == []
    SPOILT[how](folder / name)
    read_run(folder)
    assert capsys.readouterr().err.count("\n") == 1 and contents(folder) == after


@pytest.mark.parametrize("name", MADE_AGAIN)
def test_damage_shows_in_a_run_without_a_list_where_it_can(again, name, capsys):
    """As earlier versions left it: what cannot be read is made again, the rest is believed."""
    folder, call = again
    before = contents(folder)
    (folder / "SHA256SUMS").unlink()
    SPOILT["cut"](folder / name)
    assert len(call()) == (name not in ("predictions.csv", "confusion.csv"))  # which are never read
    after = contents(folder)
    assert {n: after[n] for n in MADE_AGAIN} == {n: before[n] for n in MADE_AGAIN}


def test_a_run_of_an_earlier_version_goes_on(again):
    """No list, no predictions, and fold files that remember nothing."""
    folder, call = again
    rows = table(folder / "metrics.csv")
    for name in ("SHA256SUMS", "predictions.csv"):
        (folder / name).unlink()
    for fold in (2, 3):
        file = folder / f"fold{fold}.safetensors"
        header = read_header(file)
        del header["record"]
        digest = sha256_of([load_file(file), described(header)])
        save_file(load_file(file), file, {"ast_petl": json.dumps({**header, "digest": digest})})
    read_run(folder)
    assert call("--folds", "2,4") == [f"warning: {folder}: of an earlier version, without predictions: fold 2, 3"]
    assert {row["fold"] for row in table(folder / "predictions.csv")} == {"4"}
    assert table(folder / "metrics.csv")[:4] == rows and len(read_metrics(folder)) == 6
    assert len(json.loads((folder / "result.json").read_text())["folds"]) == 3 and not ledger.wrong(folder)


def test_a_fold_that_an_earlier_version_began(again, monkeypatch):
    """Its state has no predictions of the best epoch, which here stays the best: those of the test clips are all."""
    folder, call = again
    save = records.save_progress

    def interrupted(file, *rest):
        save(file, *rest)
        state = torch.load(file)
        del state["best"]["predicted"], state["best"]["answered"], state["best"]["score"], state["digest"]
        torch.save(state, file)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(records, "save_progress", interrupted)
        call("--folds", 4, "--lr", 1e-9, "--out", folder / "later", code=130)
    assert call("--folds", 4, "--lr", 1e-9, "--out", folder / "later", "--resume") == []
    rows = table(folder / "later/esc10/houlsby_par/seed0/predictions.csv")
    assert [(row["fold"], row["part"]) for row in rows] == [("4", "test")] * 10


def test_epochs_of_an_unfinished_fold_stay(again):
    """metrics.csv also holds what no fold file has yet."""
    folder, call = again
    before = (folder / "metrics.csv").read_bytes()
    (folder / "fold3.safetensors").unlink()
    assert call() == [] and (folder / "metrics.csv").read_bytes() == before
    assert {row["fold"] for row in table(folder / "predictions.csv")} == {"2"}


def test_metrics_epoch_by_epoch(tmp_path, capsys):
    """Folds that are trained at the same time, each of which writes all its epochs; damage costs those of others."""
    rows = [dict.fromkeys(METRICS, "0") | {"fold": fold, "epoch": epoch} for fold in (1, 2) for epoch in (1, 2)]
    write_metrics(tmp_path, 2, rows[2:3])
    for epochs in (rows[:1], rows[:2]):
        write_metrics(tmp_path, 1, epochs)
        assert read_metrics(tmp_path) == [*epochs, rows[2]]
    for text in ("fold,epoch\nx,1\n", "\0\0", "nothing\n1\n", ",".join(METRICS) + "\n1\n"):
        ledger.write_files(tmp_path, {"metrics.csv": text})  # as a run of an earlier version may have it, unlisted
        write_metrics(tmp_path, 2, rows[2:])
        assert read_metrics(tmp_path) == rows[2:]
    (tmp_path / "metrics.csv").write_text("".join((tmp_path / "metrics.csv").read_text().splitlines(True)[:-1]))
    assert capsys.readouterr().err.count("metrics.csv is damaged or missing: it is made again") == 4
    assert read_metrics(tmp_path) == [] and "metrics.csv is damaged" in capsys.readouterr().err


def test_seconds_of_a_fold(monkeypatch):
    """From its beginning to the end of its last epoch, and those before an interruption."""
    times = iter([6.5, 8.0, 21.0])
    monkeypatch.setattr(records, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    progress, nothing = Progress(1, clock=5.0), (None, torch.zeros(0, 2), (), {}, "accuracy")
    for seconds in (1.5, 3.0):
        progress.validated(*nothing)
        assert progress.seconds == seconds
    progress = Progress(1, [], progress.best, progress.seconds, clock=20.0)
    progress.validated(*nothing)
    assert progress.seconds == 4.0


def test_of_two_experiments_that_start_together_one_is_refused(finished, tmp_path, monkeypatch):
    settings = Settings(**read_header(finished / "fold2.safetensors")["settings"])
    dataset, options = SimpleNamespace(names=[]), dict.fromkeys(records.SOURCE)
    both, settings_in = Barrier(2), records.settings_in

    def compared(folder):
        known = settings_in(folder)
        with suppress(BrokenBarrierError):
            both.wait(0.5)  # for the other one to have read as much
        return known

    def start(lr):
        with suppress(UserError):
            records.start_run(tmp_path, replace(settings, lr=lr), "fold,split,label,path\n", dataset, {}, options)
            return lr

    monkeypatch.setattr(records, "settings_in", compared)
    with ThreadPoolExecutor() as pool:
        (started,) = set(pool.map(start, (0.1, 0.2))) - {None}
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == started


def test_the_state_of_a_finished_fold_goes_at_the_next_start(again):
    """A kill between writing the fold file and removing its state leaves both."""
    folder, call = again
    for fold in (2, 4):
        (folder / f"fold{fold}.resume.pt").touch()
    assert call() == [] and [file.name for file in folder.glob("*.pt")] == ["fold4.resume.pt"]


def test_the_command_that_is_printed_can_be_copied(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "my runs" / "seed0")
    console.summarise(folder, Settings(**read_header(folder / "fold2.safetensors")["settings"]), 0.0)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "python -m tools.predict" in line]
    assert shlex.split(line)[-2:] == [str(folder), "SOUND.wav"]


def test_folds_in_the_order_of_their_numbers(tmp_path):
    for name in ("fold10", "fold2", "fold1", "foldx"):
        (tmp_path / f"{name}.safetensors").touch()
    assert list(records.fold_files(tmp_path).items()) == [(k, tmp_path / f"fold{k}.safetensors") for k in (1, 2, 10)]


def test_a_damaged_fold_file_is_not_averaged(again):
    folder, call = again
    content = bytearray((folder / "fold3.safetensors").read_bytes())
    content[content.index(b"millionths") + 16] ^= 1  # a digit
    (folder / "fold3.safetensors").write_bytes(content)
    (line,) = call(code=2)
    assert line.startswith(f"error: {folder / 'fold3.safetensors'} is no whole file") and "its SHA-256" in line


@pytest.mark.parametrize("key", [b"record", b"digest", b"settings"])
def test_a_key_that_is_damaged_is_not_a_missing_key(again, key):
    folder, call = again
    file = folder / "fold2.safetensors"
    file.write_bytes(file.read_bytes().replace(key, key[:-1] + b"_"))
    (line,) = call(code=2)
    assert line.startswith(f"error: {file} is no whole file of trained parts (it is damaged")


# ----------------------------------------------------------------------------------------------------------- SHA256SUMS


def test_the_list_is_that_of_sha256sum(finished):
    lines = [f"{hashlib.sha256((finished / name).read_bytes()).hexdigest()}  {name}\n" for name in ledger.FILES]
    assert sorted((finished / "SHA256SUMS").read_text().splitlines(keepends=True)) == sorted(lines)
    done = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=finished, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == 6, done.stderr


@pytest.mark.parametrize("name", ["config.json", "split.csv"])
def test_settings_and_splits_that_are_damaged_are_refused(again, name):
    """By the same command, and by whoever reads the run; where they are missing they are written again."""
    folder, call = again
    before = contents(folder)
    replaced(folder / name, *{"config.json": ('"lr": 0.00', '"lr": 0.01'), "split.csv": ("3,test,", "3,val,")}[name])
    (line,) = call(code=2)
    assert line == (f"error: {folder / name} is damaged, SHA256SUMS lists another: delete it, and the same command of "
                    "train.py writes it again")  # fmt: skip
    with pytest.raises(UserError, match=f"{name} is damaged"):
        read_run(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"is no finished run of train.py: there is no {name}"):
        read_run(folder)
    assert call() == [f"warning: {folder / name} is missing: the same command of train.py writes it again"]
    assert contents(folder)["split.csv"] == before["split.csv"] and not ledger.wrong(folder)
    read_run(folder)


def test_without_config_json_the_fold_files_say_what_was_trained(again):
    folder, call = again
    (folder / "config.json").unlink()
    _, line = call("--epochs", 3, code=2)
    assert line == f"error: {folder} holds a run with epochs 2, not 3: give another --out, or delete it"
    (folder / "fold4.resume.pt").touch()
    _, line = call(code=2)
    assert line.startswith(f"error: {folder / 'fold4.resume.pt'}: nothing says of which settings it is")


def test_predictions_of_other_clips_are_never_written(again):
    """split.csv of another run, in a folder without a list."""
    folder, _ = again
    (folder / "SHA256SUMS").unlink()
    (folder / "result.json").write_text("")
    replaced(folder / "split.csv", "3,test,", "3,val,")
    with pytest.raises(UserError, match=r"split\.csv is not what fold 2 was trained on"):
        mend(folder)


@pytest.mark.parametrize(
    "text",
    ["", "\n", "x", "# \n", f"{'0' * 63}  config.json\n", f"{'0' * 64}  other.json\n", f"{'0' * 64}  split.csv\nx\n"],
)
def test_a_damaged_list_is_refused(again, text):
    folder, call = again
    (folder / "SHA256SUMS").write_text(text)
    (line,) = call(code=2)
    assert line == (f"error: {folder / 'SHA256SUMS'} is damaged: delete it, and the same command of train.py writes it "
                    "again")  # fmt: skip
    (folder / "SHA256SUMS").unlink()
    assert call() == [] and len(ledger.read_sums(folder)[0]) == 6


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


def test_a_kill_between_two_writes_is_no_damage(words, tmp_path, monkeypatch, capsys):
    """A run that is killed at each file it writes, and then goes on: nothing looks damaged, and the end is the same."""
    run = words("--method", "linear", "--no-mask", "--resume", "--out")
    assert train.main([*run, str(tmp_path / "whole")]) == 0
    whole, writes = tmp_path / "whole" / "esc10" / "linear" / "seed0", 0
    capsys.readouterr()
    while killed(monkeypatch, writes, train.main, [*run, str(tmp_path / str(writes))]):
        folder = tmp_path / str(writes) / "esc10" / "linear" / "seed0"
        assert ledger.wrong(folder) == [] and mend(folder) is None
        assert train.main([*run, str(tmp_path / str(writes))]) == 0
        assert said(capsys) == []
        assert (folder / "predictions.csv").read_bytes() == (whole / "predictions.csv").read_bytes()
        listed, announced = ledger.read_sums(folder)
        assert listed == {name: ledger.sum_of(folder / name) for name in ledger.FILES} and announced == {}
        writes += 1
    assert writes > 15


def test_damage_after_a_kill_is_damage(again, monkeypatch, capsys):
    """A file that is neither what it was nor what it was to be."""
    folder, call = again
    for writes in range(4):
        assert killed(monkeypatch, writes, ledger.write_files, folder, dict.fromkeys(MADE_AGAIN[1:], "new"))
        assert ledger.wrong(folder) == []
        SPOILT["cut"](folder / "result.json")
        assert ledger.wrong(folder) == ["result.json"]
        assert len(call()) == 1
        assert ledger.wrong(folder) == []


def test_who_reads_while_another_writes_waits_for_the_list(again, monkeypatch, capsys):
    """A file that is new while the list that was read is old looks damaged, until one holds the lock."""
    folder, _ = again
    wrong, asked = ledger.wrong, []

    def first_too_early(folder):
        asked.append(folder)
        return ["config.json", *MADE_AGAIN] if len(asked) == 1 else wrong(folder)

    monkeypatch.setattr(ledger, "wrong", first_too_early)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert mend(folder) is None and len(asked) > 1 and said(capsys) == []
    assert all(file.stat().st_mtime_ns == before[file] for file in folder.iterdir() if file.name in ledger.FILES)
