"""Your own sounds, in folders or in a table: what is found, how it is split, and what is said of
mistakes."""

import json
import os
import shutil
import statistics
from collections import Counter
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import soundfile
from helpers import (
    build_features,
    make_folder,
    result_of,
    split_of,
    train_on,
    write_csv,
    write_sound,
)

import train
from data import Dataset, Split, folds_of, load_dataset, random_split
from sounds import audio, windows
from sounds.audio import length_of, lengths_of, read_audio
from sounds.clip import PARTS, WHOLE
from support.command import UserError
from support.records import check_folds, read_run, tell_of_gaps
from tools.report import dataset_of

# ------------------------------------------------------------------------------------------ folders


def test_folder_is_split_by_seed(tmp_path, capsys):
    root = make_folder(tmp_path / "my sounds", count=10)
    (root / "bell" / "more").mkdir()
    shutil.move(root / "bell" / "0.wav", root / "bell" / "more" / "Glöckchen 0.wav")
    assert train_on("folder", root, tmp_path, "--seed", "0,1,2", "--shots", 4) == 0
    output = capsys.readouterr()
    assert "clips of 0.3 s" in output.out and not output.err
    assert "never 'unsure': that takes ten right answers" in output.out  # six clips validate
    drawn = []
    for seed in (0, 1, 2):
        split = split_of("folder", tmp_path, seed=seed)
        assert {part: len(names) for part, names in split.items()} == {
            "train": 12,
            "val": 6,
            "test": 6,
        }
        for part, count in (("train", 4), ("val", 2), ("test", 2)):
            assert Counter(name.split("/")[0] for name in split[part]) == {
                "bell": count,
                "drum": count,
                "flute": count,
            }
        assert not (
            split["train"] & split["test"]
            or split["train"] & split["val"]
            or split["val"] & split["test"]
        )
        drawn.append(split)
    assert drawn[0]["test"] != drawn[1]["test"] != drawn[2]["test"]

    result = json.loads((tmp_path / "runs" / "folder" / "linear" / "result.json").read_text())
    accuracies = [result_of("folder", tmp_path, f"seed{seed}")["accuracy"] for seed in (0, 1, 2)]
    assert result["accuracy"] == pytest.approx(statistics.mean(accuracies), abs=1e-3)
    assert result["std"] == pytest.approx(statistics.stdev(accuracies), abs=1e-3)
    assert result["seeds"] == {str(seed): accuracy for seed, accuracy in enumerate(accuracies)}
    assert [(fold["seed"], fold["fold"]) for fold in result["folds"]] == [(0, 1), (1, 1), (2, 1)]

    assert (
        train_on("folder", root, tmp_path, "--seed", "1", "--shots", 4) == 0
    )  # finished: nothing is trained again
    assert split_of("folder", tmp_path, seed=1) == drawn[1]
    (root / "bell" / "1.wav").unlink()
    assert train_on("folder", root, tmp_path, "--seed", "1", "--shots", 4) == 2
    assert "holds a run with other clips or splits" in capsys.readouterr().err
    assert (
        train_on("folder", root, tmp_path, "--seed", "1", "--shots", 7, "--out", tmp_path / "new")
        == 2
    )
    assert "class 'bell' has only 5 training clips" in capsys.readouterr().err


def test_folder_with_given_splits(tmp_path):
    root = tmp_path / "sounds"
    for part, count in (("train", 3), ("val", 1), ("test", 2)):
        make_folder(root / part, count)
    assert train_on("folder", root, tmp_path) == 0
    split = split_of("folder", tmp_path)
    for part in PARTS:
        expected = {path.relative_to(root).as_posix() for path in (root / part).rglob("*.wav")}
        assert split[part] == expected and expected
    shutil.rmtree(root / "val")
    assert load_dataset("folder", root, tmp_path).folds[1].val == []


def test_mistakes_in_folders(tmp_path, capsys):
    def message(root):
        with pytest.raises(UserError) as error:
            check_folds(load_dataset("folder", root, tmp_path))
        return str(error.value)

    assert "needs --data-dir" in message(None) and "None" not in message(None)
    assert "is no folder" in message(tmp_path / "absent")
    root = make_folder(tmp_path / "sounds")
    (root / "silence").mkdir()
    assert "silence holds no sounds" in message(root)
    write_sound(root / "silence" / "one.wav", 40)
    assert "class 'silence' has one clip" in message(root)
    shutil.rmtree(root / "silence")
    assert "1 classes" in message(make_folder(tmp_path / "single", classes=["bell"]))
    make_folder(tmp_path / "given" / "train")
    assert "no clips to test" in message(tmp_path / "given")
    make_folder(tmp_path / "given" / "test", classes=("bell", "drum", "flute", "horn"))
    assert "class 'horn' has no training clips" in message(tmp_path / "given")
    for parts in (("Train", "Test"), ("training", "validation", "testing"), ("val", "test")):
        assert "look like parts, not like classes" in message(
            make_folder(tmp_path / parts[0], classes=parts)
        )
    shutil.rmtree(tmp_path / "given" / "test" / "horn")
    make_folder(tmp_path / "given" / "valid", 1)
    assert "call them train, val and test" in message(tmp_path / "given")
    shutil.rmtree(tmp_path / "given" / "valid")

    capsys.readouterr()
    shutil.rmtree(tmp_path / "given" / "test" / "drum")
    given = load_dataset("folder", tmp_path / "given", tmp_path)
    tell_of_gaps(given, folds_of(given, seed=0))
    assert "1 classes have no test clips in fold 1 (drum)" in capsys.readouterr().err


def test_what_a_folder_of_classes_may_hold(tmp_path, capsys):
    """Sounds anywhere beneath a class, of any known format; hidden files are none, other files are
    named."""
    named = (
        "b/1.wav",
        "b/deep/er/2.WAV",
        "a/3.flac",
        "a/4.Flac",
        "a/.5.wav",
        ".hidden/6.wav",
        "b/.old/7.wav",
        "8.wav",
    )
    for name in named:
        write_sound(tmp_path / "my" / name)
    for name in ("a/notes.txt", "b/deep/cover, back.jpg", "readme.md"):
        (tmp_path / "my" / name).touch()
    dataset = load_dataset("folder", tmp_path / "my", tmp_path)
    assert dataset.names == ["a/3.flac", "a/4.Flac", "b/1.wav", "b/deep/er/2.WAV"]
    assert (dataset.name, dataset.classes, dataset.labels) == ("my", ["a", "b"], [0, 0, 1, 1])
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {tmp_path}/my: 3 files are no .wav, .flac, ")
    assert warning.endswith(
        "in the folder of a class, ignored (8.wav, a/notes.txt, 'b/deep/cover, back.jpg')"
    )


def test_what_cannot_be_read_is_not_left_out(tmp_path, monkeypatch, capsys):
    """A link that leads nowhere is a sound that cannot be read; a folder that cannot be listed is
    an error."""
    root = make_folder(tmp_path / "my")
    (root / "bell" / "gone.wav").symlink_to(tmp_path / "absent.wav")
    assert train_on("folder", root, tmp_path) == 2
    assert "gone.wav: No such file or directory" in capsys.readouterr().err
    assert train_on("folder", root, tmp_path, "--skip-bad") == 0

    def refused(path, real=os.scandir):
        if Path(path).name == "drum":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(
        UserError, match="drum: Permission denied; all of a folder must be readable"
    ):
        load_dataset("folder", root, tmp_path)


def test_a_backbone_that_cannot_be_fetched_is_said_before_sounds_are_read(
    tmp_path, monkeypatch, capsys
):
    root = make_folder(tmp_path / "my")
    opened = []
    asked = []

    def no_network(repository, name):
        asked.append(name)
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(audio, "readable", opened.append)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    words = ["--dataset", "folder", "--data-dir", str(root), "--cache-dir", str(tmp_path)]
    assert train.main([*words, "--out", str(tmp_path / "runs")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "no route to the hub" in error and "by hand" in error and "--weights demo takes" in error
    assert asked == ["config.json"] and not opened
    (root / "bell" / "0.wav").rename(root / "0.wav")
    assert train.main([*words, "--data-dir", str(root / "bell")]) == 2
    assert "0 classes" in capsys.readouterr().err and len(asked) == 1  # a mistake comes first


# ------------------------------------------------------------------------------------------- tables


def test_csv_with_splits_and_folds(tmp_path, capsys):
    make_folder(tmp_path / "sounds", count=6)
    rows = [
        [f"sounds/{name}/{i}.wav", name] for name in ("bell", "drum", "flute") for i in range(6)
    ]
    parts = ["train", "train", "train", "val", "test", "test"] * 3
    table = write_csv(
        tmp_path / "a.csv",
        "path,label,split",
        *([*row, p] for row, p in zip(rows, parts, strict=True)),
    )
    assert train_on("csv", table, tmp_path) == 0
    test = {f"sounds/{name}/{i}.wav" for name in ("bell", "drum", "flute") for i in (4, 5)}
    assert split_of("csv", tmp_path)["test"] == test

    folds = [[label, path, i % 3 + 1] for i, (path, label) in enumerate(rows)]
    folded = write_csv(tmp_path / "b.csv", "label,path,fold", *folds)
    assert train_on("csv", folded, tmp_path, "--out", tmp_path / "b") == 0
    result = json.loads((tmp_path / "b" / "csv" / "linear" / "seed0" / "result.json").read_text())
    assert [fold["fold"] for fold in result["folds"]] == [1, 2, 3]
    assert load_dataset("csv", folded, tmp_path).folds[2] == Split(
        *([i for i in range(18) if i % 3 == k] for k in (2, 0, 1))
    )

    bare = load_dataset("csv", write_csv(tmp_path / "c.csv", "path,label", *rows), tmp_path)
    assert bare.folds == {} and bare.classes == ["bell", "drum", "flute"]


def test_a_table_with_the_mark_that_spreadsheets_write(tmp_path):
    for name in "ab":
        write_sound(tmp_path / f"{name}1.wav"), write_sound(tmp_path / f"{name}2.wav")
    text = "\ufeffpath,label\r\na1.wav,ä\r\na2.wav,ä\r\nb1.wav,b\r\nb2.wav,b\r\n"
    (tmp_path / "my.csv").write_bytes(text.encode())
    dataset = load_dataset("csv", tmp_path / "my.csv", tmp_path)
    assert (dataset.name, dataset.classes, dataset.labels) == ("my", ["b", "ä"], [1, 1, 0, 0])


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("path,sort", ["a1.wav,a"], "no column 'label'; its header is path, sort"),
        ("path,label,split,fold", ["a1.wav,a,train,1"], "only one of them"),
        ("path,label,split", ["a1.wav,a,train", "a2.wav,a,dev"], "line 3: split is 'dev'"),
        ("path,label,fold", ["a1.wav,a,first"], "line 2: fold is 'first'"),
        (
            "path,label,split",
            ["a1.wav,a,train", "./a1.wav,a,test"],
            "/a1.wav is listed twice",
        ),
        (
            "path,label,split",
            ["a1.wav,a,train", "x/../a1.wav,a,test"],
            "/x/../a1.wav is listed twice",
        ),
        (
            "path,label,fold",
            ["link.wav,a,1", "a1.wav,a,2"],
            "/a1.wav is listed twice",
        ),
        ("path,label", ["a1.wav,a", "a1.wav,b"], "listed twice"),
        ("path,label", ["a1.wav,a", "no.wav,a"], r"1 of 2 files are missing \(no\.wav\)"),
        (
            "path,label,fold",
            ["a1.wav,a,1", "b1.wav,b,2"],
            "class 'a' has no training clips in fold 1",
        ),
        ("path,label", ["a1.wav,"], "line 2: an empty label"),
        (
            "path,label,fold",
            ["a1.wav,a,1", "a2.wav,a,2", "a1.wav,a,2"],
            "a1.wav is listed twice: every clip",
        ),
        (
            "path,label,fold",
            ["a1.wav,a,1", "a2.wav,a,2", "a1.wav,a,1"],
            "a1.wav is listed twice: every clip must be",
        ),
        ("path,label,split", ["a1.wav,a,train", "b1.wav,b,"], "line 3: an empty split"),
        ("path,label,fold", ["a1.wav,a,", "b1.wav,b,1"], "line 2: an empty fold"),
        ("path,label", [",a"], "line 2: an empty path"),
        ("path,label,fold", [[], "a1.wav,a,1", [], ["a2.wav", "a\nb", "x"]], "line 6: fold is 'x'"),
        (
            "path,label,split",
            ["a1.wav,a,train", "b1.wav,b,train"],
            "no clips to test: say which in the data",
        ),
        (
            "path,label,split",
            ["a1.wav,a,test", "b1.wav,b,test"],
            "no clips to train: say which in the data",
        ),
        (
            "path,label,fold",
            ["a1.wav,a,1", "b1.wav,b,1"],
            "no clips to train: say which in the data",
        ),
        (
            "path,label",
            ["a1.wav,a", "a2.wav,a", "b1.wav,b"],
            "class 'b' has one clip, or clips of one group only; one to train and one to test",
        ),
        (
            "path,label",
            ["a1.wav,a", "a2.wav,a"],
            "1 classes; there must be two or more to tell apart",
        ),
        ("path,label,Split", ["a1.wav,a,dev"], "line 2: split is 'dev'"),
        ("path,label, start", ["a1.wav,a,x"], "line 2: start is 'x'"),
        (
            "path,label",
            ["a1.wav,a", "b1.wav,b, loud"],
            "line 3: its cells do not fit the header; put a cell that has a comma",
        ),
        (
            "path,label",
            ["a1.wav,a", "b1.wav,unsure"],
            "'unsure' is what tools.predict says of sounds of no class",
        ),
        ("path,label,split", ["a1.wav,a, ", "b1.wav,b,test"], "line 2: an empty split"),
        ("path,label,split", ["a1.wav,a"], "line 2: its cells do not fit the header"),
        ("path,label,group", ["a1.wav,a,x", "b1.wav,b,"], "line 3: an empty group"),
    ],
)
def test_tables_of_ones_own_that_cannot_train(tmp_path, header, rows, message):
    for name in ("a1", "a2", "b1"):
        write_sound(tmp_path / f"{name}.wav")
    (tmp_path / "link.wav").symlink_to("a1.wav")
    with pytest.raises(UserError, match=message) as error:
        check_folds(load_dataset("csv", write_csv(tmp_path / "t.csv", header, *rows), tmp_path))
    assert str(tmp_path) in str(error.value)


def test_blanks_and_surplus_commas_in_a_table(tmp_path):
    """A blank beside a name makes no class, nor a comma at the end of a line a column."""
    for name in ("a1", "a2", "b1", "b2"):
        write_sound(tmp_path / f"{name}.wav")
    rows = ["a1.wav,a ,train", "a2.wav, a,test ", "b1.wav,b,train,", "b2.wav,b,test"]
    dataset = load_dataset(
        "csv", write_csv(tmp_path / "t.csv", "path,label,split", *rows), tmp_path
    )
    assert (dataset.classes, dataset.labels) == (["a", "b"], [0, 0, 1, 1]) and dataset.folds[
        1
    ].test == [1, 3]


# -------------------------------------------------------------------------- columns of other names


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("filename,label", "'filename' is not read: call it 'path' if"),
        ("path,Scientific name,species", "'species' is not read: call it 'label' if"),
        ("path,label,start_time,end_time", "'start_time' is not read: call it 'start', in sec"),
        ("path,label,Begin Time (s),end", r"'begin time \(s\)' is not read: call it 'start', in"),
        ("path,label,start,endMs", "'endms' is not read: call it 'end', in seconds, if"),
        ("path,label,set", "t.csv: the column 'set' is not read: call it 'split' if"),
        ("path,label,fold_id", "'fold_id' is not read: call it 'fold' if"),
        ("path,label,fold,speaker", "'speaker' is not read: call it 'group' if .* take it out"),
        ("path,label,Speaker_ID ", "'speaker_id' is not read: call it 'group' if"),
        ("path,label,group, Label", "2 columns are called 'label': keep one of them"),
    ],
)
def test_a_column_that_looks_like_one_of_ours_is_no_other(tmp_path, header, message):
    cells = ",".join("1" for _ in header.split(","))
    with pytest.raises(UserError, match=message):
        load_dataset("csv", write_csv(tmp_path / "t.csv", header, cells), tmp_path)


def test_columns_that_are_not_read_are_named(tmp_path, capsys):
    """Those of a table that has ours as well. The option --group is as good as a column."""
    rows = [f"{write_sound(tmp_path / f'{i}.wav').name},{'ab'[i % 2]},x,7,0,1" for i in range(4)]

    def said(header: str, group: str | None = None) -> str:
        table = write_csv(tmp_path / "t.csv", header, *rows)
        assert load_dataset("csv", table, tmp_path, group).classes == ["a", "b"]
        return capsys.readouterr().err

    start = f"warning: {tmp_path}/t.csv: columns that are not read"
    assert said("Path, LABEL,class,filename,start,end") == f"{start}: class, filename\n"
    assert said("path,label,speaker,salience,,", "(.*)") == f"{start}: speaker, salience\n"
    assert said("path,label,set,fold,start,end") == f"{start}: set\n"


# -------------------------------------------------------------------- one name in several spellings


def test_one_class_in_two_spellings_is_one_class(tmp_path, capsys):
    """Accents that are characters of their own, and blanks, in folders, tables and label tracks."""
    composed, decomposed = "Gl\u00f6ckchen", "Glo\u0308ckchen"
    for name in (composed, f"{decomposed} ", "dog"):
        for i in range(2):
            write_sound(tmp_path / "my" / name / f"{i}.wav")
    dataset = load_dataset("folder", tmp_path / "my", tmp_path)
    assert (dataset.classes, dataset.labels) == ([composed, "dog"], [0, 0, 0, 0, 1, 1])
    assert len(set(dataset.paths)) == 6 and all(path.is_file() for path in dataset.paths)

    labels = (composed, f"{decomposed}\u00a0", "dog")
    rows = [[name, label, label] for name, label in zip(dataset.names[::2], labels, strict=True)]
    rows = [[*row, 1] for row in rows]
    table = write_csv(tmp_path / "my" / "t.csv", "path,label,group,fold", *rows)
    dataset = load_dataset("csv", table, tmp_path)
    assert dataset.classes == [composed, "dog"] and dataset.groups == [composed, composed, "dog"]

    staircase(tmp_path / "one.wav", 5), staircase(tmp_path / "two.wav", 5)
    for name in ("one", "two"):
        track = "".join(f"{i}\t{i + 1}\t{label}\n" for i, label in enumerate(labels))
        (tmp_path / f"{name}.txt").write_text(track, encoding="utf-8")
    shutil.rmtree(tmp_path / "my")
    assert load_dataset("csv", tmp_path, tmp_path).classes == [composed, "dog"]
    assert capsys.readouterr().err == ""


def test_what_is_probably_one_name_is_said(tmp_path, capsys):
    """Of classes and of groups. Other names are none of this."""
    names = ["Dog", "dog", "1", "01.0", "grey seal", "grey_seal"]
    names += ["10", "1_0", "-1", "cat", "cats", "100000000000000001", "100000000000000002"]
    rows = [
        [write_sound(tmp_path / f"{i}-{k}.wav").name, name, f"{who}{i}"]
        for i, name in enumerate(names)
        for k, who in enumerate(("ann", "bob"))
    ]
    dataset = load_dataset(
        "csv", write_csv(tmp_path / "t.csv", "path,label,group", *rows), tmp_path
    )
    assert dataset.classes == sorted(names)
    end = "they are kept apart; spell one name in one way"
    pairs = "'01.0' = '1', 'Dog' = 'dog', 'grey seal' = 'grey_seal'"
    warning = f"warning: {tmp_path}: classes that may be one and the same ({pairs}): {end}\n"
    assert capsys.readouterr().err == warning

    rows = [[row[0], "ab"[i % 2], ["Ann", "ann ", "bob"][i % 3]] for i, row in enumerate(rows)]
    table = write_csv(tmp_path / "t.csv", "path,label,group", *rows)
    assert set(load_dataset("csv", table, tmp_path).groups) == {"Ann", "ann", "bob"}
    warning = f"warning: {tmp_path}: groups that may be one and the same ('Ann' = 'ann'): {end}\n"
    assert capsys.readouterr().err == warning
    load_dataset("csv", table, tmp_path, group="^(.*)$")  # every clip is a group
    assert capsys.readouterr().err == ""


def test_a_file_may_not_be_called_as_a_piece_is(tmp_path):
    for name in ("0.wav", "1.wav", "0.wav#0-0.2"):
        write_sound(tmp_path / "a.wav").rename(tmp_path / name)
    rows = ["0.wav,a,0,0.2", "1.wav,b,,", "0.wav#0-0.2,b,,", "1.wav,a,0,0.2"]
    table = write_csv(tmp_path / "t.csv", "path,label,start,end", *rows)
    with pytest.raises(UserError, match=r"/0\.wav#0-0\.2 is listed twice"):
        load_dataset("csv", table, tmp_path)


# ----------------------------------------------------------------------------------------- warnings


def test_what_is_probably_a_mistake_is_said(tmp_path, capsys):
    for i in range(7):
        write_sound(tmp_path / f"{i}.wav")
    rows = [
        "0.wav,a,train",
        "1.wav,a,train",
        "2.wav,a,test",
        "3.wav,b,train",
        "4.wav,b,test",
        "5.wav,c,train",
        "6.wav,c,train",
    ]
    table = write_csv(tmp_path / "t.csv", "path,label,split", *rows)
    dataset = load_dataset("csv", table, tmp_path)
    tell_of_gaps(dataset, folds_of(dataset, seed=0))
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {tmp_path}: 1 classes have no test clips in fold 1 (c)",
    ]


def test_classes_of_which_nothing_is_left_are_said(tmp_path, capsys):
    """By a split that is drawn, in whole groups, or without bad clips, and by the data
    themselves."""

    def said(labels, bad=(), folds=None, groups=()):
        paths = [tmp_path / f"{i}.wav" for i in range(len(labels))]
        data = Dataset(
            "my", tmp_path, ["bell", "drum", "flute"], paths, labels, folds or {}, list(groups)
        )
        drawn = folds_of(data, 0, bad)
        assert drawn.keys() == (folds or {1: 0}).keys()
        tell_of_gaps(data, drawn)
        return capsys.readouterr().err

    labels = [0] * 3 + [1] * 10 + [2] * 2
    train, test = (
        {
            i
            for i in getattr(
                random_split(Dataset("my", tmp_path, [*"abc"], [], labels, {}), 0), part
            )
            if labels[i] != 1
        }
        for part in ("train", "test")
    )
    start = f"warning: {tmp_path}: 2 classes have no"
    assert said(labels) == ""
    assert said(labels, train) == f"{start} training clips in fold 1 (bell, flute)\n"
    assert said(labels, test) == f"{start} test clips in fold 1 (bell, flute)\n"
    alone = f"warning: {tmp_path}: 1 classes have no test clips in fold"
    assert said([0, 0, 1, 1, 2, 2], groups=["x", "y", "y", "z", "x", "z"]).startswith(
        f"{alone} 1 ("
    )
    folds = {2: Split([0, 3, 13], [], [1, 4]), 5: Split([0, 3, 13], [], [1, 4, 14])}
    assert said(labels, folds=folds) == f"{alone} 2 (flute)\n"
    two = f"{start} test clips in fold 2 (bell, flute)\n"
    assert said(labels, {1}, folds) == f"{two}{alone} 5 (bell)\n"


# ----------------------------------------------------------------------------- masks of short clips


def test_masks_fit_the_clips(tmp_path, monkeypatch):
    """2.5 s are 250 frames: masks of at most 40. Clips of 1.99 s are not masked."""
    root, widest, original = make_folder(tmp_path / "my", count=3), set(), train.spec_augment

    def masks(x, draws, max_frames):
        widest.add(max_frames)
        return original(x, draws, max_frames)

    monkeypatch.setattr(train, "spec_augment", masks)
    for seconds, out, mask_frames in (("2.5", "long", 40), ("1.99", "short", 0)):
        assert train_on(
            "folder",
            root,
            tmp_path,
            "--method",
            "lora",
            "--seconds",
            seconds,
            "--out",
            tmp_path / out,
        ) == 0 and widest == {40}
        config = json.loads((tmp_path / out / "folder/lora/seed0/config.json").read_text())
        assert config["mask_frames"] == mask_frames


# ---------------------------------------------------------------------------------- long recordings


def staircase(path, seconds: float, rate=16_000):
    """A recording of noise about the second that it is in, in hundredths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(list(str(path).encode())).uniform(-1, 1, round(rate * seconds))
    soundfile.write(
        path, (np.floor(np.arange(len(noise)) / rate) + 0.1 * noise) / 100, rate, subtype="PCM_16"
    )
    return path


def heard(dataset, i: int) -> np.ndarray:
    start, end = dataset.spans.get(i, WHOLE)
    return read_audio(dataset.paths[i], end - start, start)


def test_pieces_of_recordings_in_a_table(tmp_path):
    """An empty start is the beginning, an empty end the end; the features are those of a file that
    is no longer."""
    staircase(tmp_path / "a.wav", 6), staircase(tmp_path / "b.wav", 3)
    rows = ["a.wav,x,1,2.5", "a.wav,y,2.5,", "a.wav,x,,1", "b.wav,y,,", "b.wav,x,0.123456,2"]
    dataset = load_dataset(
        "csv", write_csv(tmp_path / "t.csv", "path,label,start,end", *rows), tmp_path
    )
    assert dataset.names == ["a.wav#1-2.5", "a.wav#2.5-", "a.wav#0-1", "b.wav", "b.wav#0.123456-2"]
    assert dataset.groups == ["a.wav"] * 3 + ["b.wav"] * 2  # the pieces of a recording
    lengths = [1.5, 3.5, 1, 3, 2 - 0.123456]
    assert lengths_of(dataset.paths, dataset.spans).tolist() == pytest.approx(lengths)
    for i, second in enumerate((1, 2, 0, 0, 0)):
        assert heard(dataset, i)[10] == pytest.approx(second / 100, abs=1.1e-3)
        assert len(heard(dataset, i)) == round(16_000 * lengths[i])
    features, _ = build_features(dataset, 100, tmp_path / "cache")
    (tmp_path / "cut").mkdir()
    for i in range(4):
        soundfile.write(tmp_path / "cut" / f"{i}.wav", heard(dataset, i), 16_000, subtype="PCM_16")
    rows = [f"cut/{i}.wav,{'xy'[i % 2]}" for i in range(4)]
    cut = load_dataset("csv", write_csv(tmp_path / "u.csv", "path,label", *rows), tmp_path)
    assert np.array_equal(build_features(cut, 100, tmp_path / "cache")[0], features[:4])


def test_features_of_a_piece_are_known_by_its_span(tmp_path, capsys):
    staircase(tmp_path / "a.wav", 6)
    table = tmp_path / "t.csv"

    def built(*rows) -> np.ndarray:
        dataset = load_dataset(
            "csv", write_csv(table, "path,label,start,end,group", *rows), tmp_path
        )
        return np.array(build_features(dataset, 30, tmp_path / "cache")[0])

    rows = ["a.wav,x,0,1,p", "a.wav,y,1,2,p", "a.wav,x,2,3,q", "a.wav,y,4,5,q"]
    first = built(*rows)
    assert "built 4 of 4" in capsys.readouterr().out
    second = built(*rows[1:], "a.wav,x,0,1.5,p")  # one of them is new, the others move
    assert "built 1 of 4" in capsys.readouterr().out and np.array_equal(second[:3], first[1:])
    assert not np.array_equal(first[0], first[1])


def test_label_tracks(tmp_path, capsys):
    """As Audacity writes them: tabs, numbers with six digits, a second line for the frequencies of
    a selection."""
    for name in ("one", "two", "deep/three"):
        staircase(tmp_path / "my" / f"{name}.wav", 5)
    (tmp_path / "my" / "one.txt").write_text(
        "0.000000\t1.000000\tdog\n\\\t100.000000\t900.000000\n2.5\t4\tgrey seal\n"
    )
    (tmp_path / "my" / "one.wav.events.txt").write_text("0\t1\twhat a model heard\n")
    (tmp_path / "my" / "deep" / "three.txt").write_bytes(
        "\ufeff1\t2\tgrey seal\r\n\r\n3.25\t4\tdog\r\n".encode()
    )
    dataset = load_dataset("csv", tmp_path / "my", tmp_path)
    names = ["deep/three.wav#1-2", "deep/three.wav#3.25-4", "one.wav#0-1", "one.wav#2.5-4"]
    assert dataset.names == names and dataset.groups == ["deep/three.wav"] * 2 + ["one.wav"] * 2
    assert (
        dataset.classes == ["dog", "grey seal"]
        and dataset.labels == [1, 0, 0, 1]
        and dataset.name == "my"
    )
    assert (
        capsys.readouterr().err
        == f"warning: {tmp_path}/my: 1 sounds have no label track, ignored (two.wav)\n"
    )
    assert train_on("csv", tmp_path / "my", tmp_path, "--no-background") == 0
    split = split_of("csv", tmp_path)
    assert {frozenset(split["train"]), frozenset(split["test"])} == {
        frozenset(names[:2]),
        frozenset(names[2:]),
    }


def tracks(root: Path, **labels: str) -> Path:
    """Recordings of ten seconds. The text of each has its labels, such as `0-2 dog,3-4 cat`."""
    for name, text in labels.items():
        staircase(root / f"{name}.wav", 10)
        lines = [label.replace("-", "\t").replace(" ", "\t") for label in text.split(",") if label]
        (root / f"{name}.txt").write_text("\n".join(lines))
    return root


def test_what_is_not_labelled_is_background(tmp_path):
    """A gap that is shorter than a window is left out. Labels may overlap and may end too late."""
    root = tracks(tmp_path, a="1.5-4 dog,2-3 cat,4.9-5.5 dog,9-11 cat", b="0-9 dog,9-10 cat", c="")

    def names(label, **options):
        dataset = load_dataset("csv", root, tmp_path, **options)
        number = dataset.classes.index(label)
        named = zip(dataset.names, dataset.labels, strict=True)
        return [name for name, label in named if label == number]

    options = {"windows": 1.0, "background": True}
    quiet = ["a.wav#0-1", "a.wav#0.5-1.5", "a.wav#5.5-6.5", "a.wav#6.5-7.5", "a.wav#7.5-8.5"]
    whole = [f"c.wav#{i}-{i + 1}" for i in range(10)]  # nothing is labelled there
    assert sorted(names("background", **options)) == sorted([*quiet, "a.wav#8-9", *whole])
    dogs = ["a.wav#1.5-2.5", "a.wav#2.5-3.5", "a.wav#3-4", "a.wav#4.9-5.5"]
    assert names("dog", **options) == [*dogs, *(f"b.wav#{i}-{i + 1}" for i in range(9))]
    assert names("cat", **options) == ["a.wav#2-3", "a.wav#9-10", "b.wav#9-10"]
    assert names("dog", windows=1.0) == names("dog", **options)  # cut, and nothing between
    assert load_dataset("csv", root, tmp_path, windows=1.0).classes == ["cat", "dog"]
    assert names("dog") == ["a.wav#1.5-4", "a.wav#4.9-5.5", "b.wav#0-9"]


def test_background_ends_with_the_recording(tmp_path):
    """A label after the end is a bad clip, not more background."""
    root = tracks(tmp_path, a="1-2 dog,3-4 cat,12-13 dog", b="0-1 dog,1-10 cat")
    dataset = load_dataset("csv", root, tmp_path, windows=1.0, background=True)
    quiet = dataset.classes.index("background")
    ends = [dataset.spans[i][1] for i, label in enumerate(dataset.labels) if label == quiet]
    assert sorted(ends) == [1, 3, 5, 6, 7, 8, 9, 10]
    assert "a.wav#12-13" in dataset.names


def test_windows_of_labels_suit_the_short_ones(tmp_path):
    labels = ",".join(f"{i * 0.9:g}-{i * 0.9 + 0.8:g} dog" for i in range(9))
    root = tracks(tmp_path, a=f"{labels},8.2-9.9 cat", b="0-8 dog,8-10 cat")
    dataset = load_dataset("csv", root, tmp_path, background=True)
    spans = {round(end - start, 6) for start, end in dataset.spans.values()}
    assert spans == {0.8}  # the tenth of twelve lengths from above


def test_background_of_a_few_labels(tmp_path, monkeypatch):
    """Not all of it: evenly, so many windows for each window of a label."""
    monkeypatch.setattr(windows, "PER_LABEL", 2)
    root = tracks(tmp_path, a="0-1 dog,4-5 cat", b="5-6 dog,9-10 cat")
    dataset = load_dataset("csv", root, tmp_path, windows=1.0, background=True)
    quiet = dataset.classes.index("background")
    found = [
        name for name, label in zip(dataset.names, dataset.labels, strict=True) if label == quiet
    ]
    assert found == [f"a.wav#{i}-{i + 1}" for i in (1, 3, 6, 8)] + [
        f"b.wav#{i}-{i + 1}" for i in (0, 2, 4, 7)
    ]


def test_background_has_the_part_and_the_group_of_the_label_before(tmp_path):
    staircase(tmp_path / "a.wav", 10)
    rows = [
        "a.wav,x,2,3,train,p",
        "a.wav,y,3,4,train,p",
        "a.wav,x,6,7,test,q",
        "a.wav,y,7,8,test,q",
    ]
    table = write_csv(tmp_path / "t.csv", "path,label,start,end,split,group", *rows)
    dataset = load_dataset("csv", table, tmp_path, windows=1.0, background=True)
    group = dict(zip(dataset.names, dataset.groups, strict=True))
    test = {dataset.names[i] for i in dataset.folds[1].test}
    assert test == {f"a.wav#{i}-{i + 1}" for i in (6, 7, 8, 9)}
    assert [group[f"a.wav#{i}-{i + 1}"] for i in range(10)] == ["p"] * 6 + ["q"] * 4


def test_two_labelled_recordings(tmp_path, capsys):
    """One tests. Stretches of the other validate. No label is divided."""
    labels = "0-2 dog,3-4 cat,5-5.5 dog,6-8 cat,8.2-8.4 dog,8.5-8.9 cat,9-9.4 dog,9.5-9.9 cat"
    root = tracks(tmp_path / "my", a=labels, b=labels)
    assert train_on("csv", root, tmp_path, "--seconds", 0.5) == 0
    out = capsys.readouterr().out
    assert "10 of 40 clips are 'background', which is never an event" in out
    split = split_of("csv", tmp_path)
    recording = {part: {name[0] for name in names} for part, names in split.items()}
    assert recording["train"] == recording["val"] != recording["test"]
    (which,) = recording["train"]
    for first, last in ((0, 2), (3, 4), (6, 8)):  # each label has several windows
        count = (last - first) * 2
        names = {f"{which}.wav#{first + i / 2:g}-{first + (i + 1) / 2:g}" for i in range(count)}
        assert names <= split["train"] or names <= split["val"]
    run = read_run(tmp_path / "runs/csv/linear/seed0")
    assert dataset_of(run, None, None).classes == ["background", "cat", "dog"]
    assert train_on("demo", None, tmp_path, "--no-background") == 2
    assert "--no-background is for your own sounds" in capsys.readouterr().err


def test_labels_that_a_model_has_written(tmp_path):
    """An event that was corrected in Audacity is a label, without its probability."""
    root = tracks(tmp_path, a="", b="")
    (root / "a.txt").write_text("1\t2\tdog (0.93)\n3\t4\tcat (1.00)\n")
    (root / "b.txt").write_text("1\t2\tdog\n3\t4\tcat\n5\t6\tdog (2)\n7\t8\tdog (0.5)\n")
    with pytest.raises(UserError, match=r"class 'dog \(0\.5\)' has one clip"):
        load_dataset("csv", root, tmp_path)
    (root / "b.txt").write_text("1\t2\tdog\n3\t4\tcat\n")
    assert load_dataset("csv", root, tmp_path).classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "1\t0.5\tdog",
            r"one\.txt, line 1: start is '1' and end is '0\.5'; .* the end after the start",
        ),
        ("0\t1\tdog\n2\t2\tcat", r"one\.txt, line 2: start is '2' and end is '2'"),
        ("0\tx\tdog", "line 1: .* end is 'x'; they must be seconds like 12.5"),
        ("-1\t1\tdog", "line 1: start is '-1'"),
        ("nan\t1\tdog", "line 1: start is 'nan'"),
        ("inf\t\tdog", "line 1: start is 'inf'"),
        ("0 1 dog", "line 1: it must be a start, an end and a label, with tabs"),
        ("0\t1\t", "line 1: it must be a start, an end and a label, with tabs"),
        ("0\t1\tdog\n0\t1\tcat", r"one\.wav#0-1 is listed twice"),
        ("", "0 classes; there must be two or more"),
        ("0\t1\tdog\n1\t2\tcat", "class 'cat' has one clip, or clips of one group only"),
        (
            "0\t1\tdog\n1\t2\tcat\n2\t3\tcat\n3\t4\tdog",
            "class 'cat' has one clip, or clips of one group only",
        ),
    ],
)
def test_label_tracks_that_cannot_train(tmp_path, text, message):
    staircase(tmp_path / "one.wav", 5)
    (tmp_path / "one.txt").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_dataset("csv", tmp_path, tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_label_track_and_its_sound(tmp_path):
    (tmp_path / "one.txt").write_text("0\t1\tdog\n")
    with pytest.raises(
        UserError, match=r"one\.txt: a label track with 0 sounds beside it; .*, one\.wav or another"
    ):
        load_dataset("csv", tmp_path, tmp_path)
    for suffix in ("wav", "flac"):
        staircase(tmp_path / f"one.{suffix}", 2)
    with pytest.raises(UserError, match="with 2 sounds beside it"):
        load_dataset("csv", tmp_path, tmp_path)


def test_windows_of_recordings(tmp_path, capsys):
    """Side by side, the last one up to the end; a recording that is no longer than a window is one
    clip."""
    for name, seconds in (
        ("a/long", 5.2),
        ("a/short", 1.5),
        ("b/even", 4),
        ("b/other", 2),
        ("b/third", 2.5),
    ):
        staircase(tmp_path / "my" / f"{name}.wav", seconds)
    dataset = load_dataset("folder", tmp_path / "my", tmp_path, windows=2.0)
    assert dataset.names == [
        "a/long.wav#0-2",
        "a/long.wav#2-4",
        "a/long.wav#3.2-5.2",
        "a/short.wav",
        "b/even.wav#0-2",
        "b/even.wav#2-4",
        "b/other.wav",
        "b/third.wav#0-2",
        "b/third.wav#0.5-2.5",
    ]
    assert dataset.groups == [name.partition("#")[0] for name in dataset.names]
    assert [heard(dataset, i)[10] for i in (1, 2, 4)] == pytest.approx([0.02, 0.03, 0], abs=1.1e-3)
    options = ["--windows", "--seconds", 2]
    assert train_on("folder", tmp_path / "my", tmp_path, *options) == 0
    out = capsys.readouterr().out
    assert "are not heard" not in out and "clips of 2 s" in out
    recordings = {
        part: {name.partition("#")[0] for name in names}
        for part, names in split_of("folder", tmp_path).items()
    }
    assert not recordings["train"] & recordings["test"]
    config = json.loads((tmp_path / "runs/folder/linear/seed0/config.json").read_text())
    assert (config["windows"], config["group"]) == (2.0, None)
    run = read_run(tmp_path / "runs/folder/linear/seed0")
    assert dataset_of(run, None, None).names == dataset.names  # a tool finds the windows again
    assert train_on("folder", tmp_path / "my", tmp_path, "--windows") == 2
    assert "--windows: say by --seconds" in capsys.readouterr().err
    assert train_on("csv", tmp_path / "my", tmp_path, *options) == 2
    assert "--windows cuts the recordings of --dataset folder" in capsys.readouterr().err


def test_silent_windows_are_left_out(tmp_path):
    """Two of the four windows of a recording are zeros. Without --skip-silent they are clips."""
    make_folder(tmp_path / "my", count=4, classes=("a", "b"), seconds=0.5)
    wave = np.random.default_rng(0).normal(0, 0.1, 32_000)
    wave[8_000:24_000] = 0
    soundfile.write(tmp_path / "my/a/long.wav", wave, 16_000)
    options = ["--windows", "--seconds", 0.5]
    silent = {"a/long.wav#0.5-1", "a/long.wav#1-1.5"}
    assert train_on("folder", tmp_path / "my", tmp_path, *options) == 0
    split = split_of("folder", tmp_path)
    assert "skipped" not in split and silent <= set().union(*split.values())
    shutil.rmtree(tmp_path / "runs")
    assert train_on("folder", tmp_path / "my", tmp_path, *options, "--skip-silent") == 0
    split = split_of("folder", tmp_path)
    assert split.pop("skipped") == silent and not silent & set().union(*split.values())


def test_windows_of_damaged_recordings(tmp_path, capsys):
    """There are as many as the header says. Those that are not there are refused."""
    for name in ("a/0.wav", "a/1.flac", "b/0.wav", "b/1.wav", "b/2.wav"):
        staircase(tmp_path / "my" / name, 2)
    flac, wav = tmp_path / "my" / "a" / "1.flac", tmp_path / "my" / "b" / "2.wav"
    flac.write_bytes(flac.read_bytes()[:20_000])
    wav.write_bytes(wav.read_bytes()[:40_000])  # 1.25 s
    assert train_on("folder", tmp_path / "my", tmp_path, "--windows", "--seconds", 0.5) == 2
    *listed, error = capsys.readouterr().err.splitlines()
    assert "of 20 sound files cannot be used" in error
    names = [line.split(": ")[0].strip() for line in listed]
    assert f"{flac}#1.5-2" in names and f"{flac}#0-0.5" not in names
    assert [name for name in names if name.startswith(str(wav))] == [f"{wav}#1-1.5", f"{wav}#1.5-2"]


def test_what_is_cut_off_is_said(tmp_path, capsys):
    root = make_folder(tmp_path / "my", count=3, seconds=0.5)
    write_sound(root / "bell" / "long.wav", 0, seconds=2.5)
    assert train_on("folder", root, tmp_path, "--seconds", 0.5) == 0
    assert (
        "1 of 10 clips are longer than 0.5 s: 2.0 s of 7.0 s (28.6%) are not heard"
        in capsys.readouterr().out
    )
    assert train_on("folder", root, tmp_path, "--seconds", 2.5, "--out", tmp_path / "b") == 0
    assert "are not heard" not in capsys.readouterr().out


def test_a_piece_that_starts_after_the_end_is_a_bad_file(tmp_path, capsys):
    for name in ("a", "b"):
        staircase(tmp_path / f"{name}.wav", 3)
    rows = [
        f"{name}.wav,{label},{start}," for name in "ab" for label, start in (("x", 0), ("y", 1))
    ]
    table = write_csv(tmp_path / "t.csv", "path,label,start,end", *rows, "b.wav,y,3,")
    assert train_on("csv", table, tmp_path, "--seconds", 0.5) == 2
    error = capsys.readouterr().err
    assert "warning" not in error
    assert (
        f"{tmp_path}/b.wav#3-: ends after 3.00 s, and its clip starts at 3 s" in error
        and "--skip-bad" in error
    )


def test_a_piece_is_asked_for_its_length_with_its_file(tmp_path, monkeypatch):
    """Once, and not for every one of thousands of labels: of a long MP3 it takes a second."""
    asked, file = [], staircase(tmp_path / "a.wav", 3)
    monkeypatch.setattr(audio, "length_of", lambda path: asked.append(path) or length_of(path))
    spans = {i: (i / 100, i / 100 + 0.5) for i in range(200)}
    assert lengths_of([file] * 201, spans).tolist() == pytest.approx(
        [0.5] * 200 + [3]
    ) and asked == [file]
