"""Your own sounds, in folders or in a table: what is found, how it is split, and what is said of mistakes."""

import json
import shutil
import statistics
from collections import Counter

import pytest
from helpers import make_folder, result_of, split_of, train_on, write_csv, write_sound

from data import Split, load_dataset
from sounds.clip import PARTS
from support.command import UserError

# ----------------------------------------------------------------------------------------------------------- folders


def test_folder_is_split_by_seed(tmp_path, capsys):
    root = make_folder(tmp_path / "my sounds", count=10)
    (root / "bell" / "more").mkdir()
    shutil.move(root / "bell" / "0.wav", root / "bell" / "more" / "Glöckchen 0.wav")
    assert train_on("folder", root, tmp_path, "--seed", "0,1,2", "--shots", 4) == 0
    output = capsys.readouterr()
    assert "0.3 s a clip" in output.out and not output.err
    drawn = []
    for seed in (0, 1, 2):
        split = split_of("folder", tmp_path, seed=seed)
        assert {part: len(names) for part, names in split.items()} == {"train": 12, "val": 6, "test": 6}
        for part, count in (("train", 4), ("val", 2), ("test", 2)):
            assert Counter(name.split("/")[0] for name in split[part]) == {"bell": count, "drum": count, "flute": count}
        assert not (split["train"] & split["test"] or split["train"] & split["val"] or split["val"] & split["test"])
        drawn.append(split)
    assert drawn[0]["test"] != drawn[1]["test"] != drawn[2]["test"]

    result = json.loads((tmp_path / "runs" / "folder" / "linear" / "result.json").read_text())
    accuracies = [result_of("folder", tmp_path, f"seed{seed}")["accuracy"] for seed in (0, 1, 2)]
    assert result["accuracy"] == pytest.approx(statistics.mean(accuracies), abs=1e-3)
    assert result["std"] == pytest.approx(statistics.stdev(accuracies), abs=1e-3)
    assert result["seeds"] == {str(seed): accuracy for seed, accuracy in enumerate(accuracies)}
    assert [(fold["seed"], fold["fold"]) for fold in result["folds"]] == [(0, 1), (1, 1), (2, 1)]

    assert train_on("folder", root, tmp_path, "--seed", "1", "--shots", 4) == 0  # finished: nothing is trained again
    assert split_of("folder", tmp_path, seed=1) == drawn[1]
    (root / "bell" / "1.wav").unlink()
    assert train_on("folder", root, tmp_path, "--seed", "1", "--shots", 4) == 2
    assert "holds a run with other clips or splits" in capsys.readouterr().err
    assert train_on("folder", root, tmp_path, "--seed", "1", "--shots", 7, "--out", tmp_path / "new") == 2
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
            load_dataset("folder", root, tmp_path)
        return str(error.value)

    assert "needs --data-dir" in message(None)
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
    shutil.rmtree(tmp_path / "given" / "test" / "horn")
    make_folder(tmp_path / "given" / "valid", 1)
    assert "val/ and test/ only, not valid" in message(tmp_path / "given")
    shutil.rmtree(tmp_path / "given" / "valid")

    capsys.readouterr()
    shutil.copy(tmp_path / "given/train/bell/0.wav", tmp_path / "given/test/bell/copy.wav")
    shutil.rmtree(tmp_path / "given" / "test" / "drum")
    for i in range(1, 5):
        (tmp_path / "given" / "train" / "flute" / f"{i}.wav").unlink()
    load_dataset("folder", tmp_path / "given", tmp_path)
    warnings = capsys.readouterr().err
    assert "train/bell/0.wav = test/bell/copy.wav" in warnings and "in different splits" in warnings
    assert "class 'drum' has no test clips" in warnings and "class 'flute' has one training clip" in warnings


def test_what_a_folder_of_classes_may_hold(tmp_path, capsys):
    """Sounds anywhere beneath a class, of any known format; hidden files are none, other files are named."""
    for name in ("b/1.wav", "b/deep/er/2.WAV", "a/3.flac", "a/4.Flac", "a/.5.wav", ".hidden/6.wav"):
        write_sound(tmp_path / "my" / name)
    for name in ("a/notes.txt", "b/deep/cover.jpg", "readme.md"):
        (tmp_path / "my" / name).touch()
    dataset = load_dataset("folder", tmp_path / "my", tmp_path)
    assert dataset.names() == ["a/3.flac", "a/4.Flac", "b/1.wav", "b/deep/er/2.WAV"]
    assert (dataset.name, dataset.classes, dataset.labels) == ("my", ["a", "b"], [0, 0, 1, 1])
    error = capsys.readouterr().err
    assert error.startswith(f"warning: {tmp_path}/my: 2 files are no .wav, .flac, ")
    assert error.endswith("ignored (a/notes.txt, b/deep/cover.jpg)\n")


# ------------------------------------------------------------------------------------------------------------ tables


def test_csv_with_splits_and_folds(tmp_path, capsys):
    make_folder(tmp_path / "sounds", count=6)
    rows = [[f"sounds/{name}/{i}.wav", name] for name in ("bell", "drum", "flute") for i in range(6)]
    parts = ["train", "train", "train", "val", "test", "test"] * 3
    table = write_csv(tmp_path / "a.csv", "path,label,split", *([*row, p] for row, p in zip(rows, parts, strict=True)))
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
        ("path,class", ["a1.wav,a"], "no column 'label'; its header is path, class"),
        ("path,label,split,fold", ["a1.wav,a,train,1"], "only one of them"),
        ("path,label,split", ["a1.wav,a,train", "a2.wav,a,dev"], "line 3: split is 'dev'"),
        ("path,label,fold", ["a1.wav,a,first"], "line 2: fold is 'first'"),
        ("path,label,split", ["a1.wav,a,train", "./a1.wav,a,test"], "listed in split train and test"),
        (
            "path,label,split",
            ["a1.wav,a,train", "x/../a1.wav,a,test"],
            "/a1.wav = .*/x/../a1.wav is listed in split",
        ),
        ("path,label,fold", ["link.wav,a,1", "a1.wav,a,2"], "/link.wav = .*/a1.wav is listed in fold 1 and 2"),
        ("path,label", ["a1.wav,a", "a1.wav,b"], "listed twice"),
        ("path,label", ["a1.wav,a", "no.wav,a"], r"1 of 2 files are missing \(no\.wav\)"),
        ("path,label,fold", ["a1.wav,a,1", "b1.wav,b,2"], "class 'a' has no training clips in fold 1"),
        ("path,label", ["a1.wav,"], "line 2: an empty label"),
        ("path,label,fold", ["a1.wav,a,1", "a2.wav,a,2", "a1.wav,a,2"], "a1.wav is listed in fold 1 and 2: every clip"),
        ("path,label,fold", ["a1.wav,a,1", "a2.wav,a,2", "a1.wav,a,1"], "a1.wav is listed twice: every clip must be"),
        ("path,label,split", ["a1.wav,a,train", "b1.wav,b,"], "line 3: an empty split"),
        ("path,label,fold", ["a1.wav,a,", "b1.wav,b,1"], "line 2: an empty fold"),
        ("path,label", [",a"], "line 2: an empty path"),
        ("path,label,split", ["a1.wav,a,train", "b1.wav,b,train"], "no clips to test: say which in the data"),
        ("path,label,split", ["a1.wav,a,test", "b1.wav,b,test"], "no clips to train: say which in the data"),
        ("path,label,fold", ["a1.wav,a,1", "b1.wav,b,1"], "no clips to train: say which in the data"),
        ("path,label", ["a1.wav,a", "a2.wav,a", "b1.wav,b"], "class 'b' has one clip; one to train and one to test"),
        ("path,label", ["a1.wav,a", "a2.wav,a"], "1 classes; there must be two or more to tell apart"),
    ],
)
def test_tables_of_ones_own_that_cannot_train(tmp_path, header, rows, message):
    for name in ("a1", "a2", "b1"):
        write_sound(tmp_path / f"{name}.wav")
    (tmp_path / "link.wav").symlink_to("a1.wav")
    with pytest.raises(UserError, match=message) as error:
        load_dataset("csv", write_csv(tmp_path / "t.csv", header, *rows), tmp_path)
    assert str(tmp_path) in str(error.value)


# ---------------------------------------------------------------------------------------------------------- warnings


def test_copies_are_named_where_they_matter(tmp_path, capsys):
    """The same content, not only the same size and middle; in one part of a given split it does no harm."""

    def raw(name: str, start: bytes, end: bytes) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(start + bytes(20_000) + end)

    for name, start, end in (("a1", b"x", b"1"), ("a2", b"x", b"2"), ("a3", b"x", b"1"), ("b1", b"y", b"1"),
                             ("b2", b"x", b"22"), ("b3", b"z", b"2")):  # fmt: skip
        raw(f"{name}.wav", start, end)
    rows = ["a1.wav,a", "a2.wav,a", "a3.wav,a", "b1.wav,b", "b2.wav,b", "b3.wav,b"]

    def said(header: str, parts: list[str]) -> str:
        lines = [row + part for row, part in zip(rows, parts, strict=True)]
        load_dataset("csv", write_csv(tmp_path / "t.csv", header, *lines), tmp_path)
        return capsys.readouterr().err

    copies = f"warning: {tmp_path}: 1 sounds are there more than once "
    assert said("path,label", [""] * 6) == f"{copies}and may come into different splits (a1.wav = a3.wav)\n"
    apart = [",train", ",train", ",test", ",train", ",train", ",test"]
    assert said("path,label,split", apart) == f"{copies}in different splits (a1.wav = a3.wav)\n"
    together = [",train", ",test", ",train", ",train", ",train", ",test"]
    assert said("path,label,split", together) == ""


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
    load_dataset("csv", write_csv(tmp_path / "t.csv", "path,label,split", *rows), tmp_path)
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {tmp_path}: class 'b' has one training clip in fold 1",
        f"warning: {tmp_path}: class 'c' has no test clips in fold 1",
    ]
