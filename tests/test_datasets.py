"""Every dataset as a miniature with the true layout and metadata, through train.py; your own sounds; archives."""

import csv
import hashlib
import io
import json
import shutil
import statistics
import tarfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers import SMALL_AST

import train
from data import DATASETS, Dataset, Split, frames_for, load_dataset, random_split
from sounds import paper
from sounds.clip import PARTS
from sounds.fetch import unpack
from support.command import UserError

NAMES = ("esc50", "us8k", "gsc", "fsc", "folder", "csv")
esc50, us8k, gsc, fsc, from_folder, from_csv = (partial(load_dataset, name) for name in NAMES)
WORDS = """backward bed bird cat dog down eight five follow forward four go happy house learn left marvin nine no off
on one right seven sheila six stop three tree two up visual wow yes zero"""
INTENTS = """activate lamp none, activate lights bedroom, activate lights kitchen, activate lights none,
activate lights washroom, activate music none, bring juice none, bring newspaper none, bring shoes none,
bring socks none, change language Chinese, change language English, change language German, change language Korean,
change language none, deactivate lamp none, deactivate lights bedroom, deactivate lights kitchen,
deactivate lights none, deactivate lights washroom, deactivate music none,
decrease heat bedroom, decrease heat kitchen, decrease heat none,
decrease heat washroom, decrease volume none, increase heat bedroom, increase heat kitchen, increase heat none,
increase heat washroom, increase volume none"""


def tone(path: Path, number: int, rate: int = 16_000, seconds: float = 0.3, channels: int = 1, subtype=None) -> Path:
    """A tone whose pitch says its class, in noise that no other file has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(list(path.as_posix().encode())).standard_normal((round(rate * seconds), channels))
    pitch = np.sin(2 * np.pi * (200 + 60 * number) * np.arange(len(noise)) / rate)
    soundfile.write(path, 0.3 * pitch[:, None] + 0.03 * noise, rate, subtype=subtype)
    return path


def write_csv(path: Path, header: str, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path


def run(dataset: str, data_dir: Path, tmp_path: Path, *options) -> int:
    """train.py in this process, with the small AST, the quickest method and one epoch."""
    words = ["--dataset", dataset, "--data-dir", data_dir, "--weights", SMALL_AST, "--method", "linear", "--epochs", 1]
    places = ["--cache-dir", tmp_path / "cache", "--out", tmp_path / "runs"]
    return train.main([str(word) for word in (*words, *places, *options)])


def result_of(dataset: str, tmp_path: Path, seed: str = "seed0") -> dict:
    return json.loads((tmp_path / "runs" / dataset / "linear" / seed / "result.json").read_text())


def split_of(dataset: str, tmp_path: Path, fold: int = 1, seed: int = 0) -> dict[str, set[str]]:
    """split.csv of a run: the paths of each part of one fold."""
    file = tmp_path / "runs" / dataset / "linear" / f"seed{seed}" / "split.csv"
    rows = [row for row in csv.DictReader(file.read_text().splitlines()) if row["fold"] == str(fold)]
    return {part: {row["path"] for row in rows if row["split"] == part} for part in {row["split"] for row in rows}}


# ------------------------------------------------------------------------------------------- the datasets of the paper


def make_esc50(root: Path) -> Path:
    """50 classes, 5 clips each, one for each fold; the clips of a fold and class pair come from one recording."""
    rows = []
    for target in range(50):
        for fold in range(1, 6):
            source = 100_000 + 5 * (target // 2) + fold  # two classes were cut from one recording
            name = f"{fold}-{source}-A-{target}.wav"
            tone(root / "audio" / name, target, rate=44_100)
            rows.append([name, fold, target, f"class_{target}", target % 5 == 0, source, "A"])
    write_csv(root / "meta" / "esc50.csv", "filename,fold,target,category,esc10,src_file,take", rows)
    return root


US8K_CLASSES = [
    "air_conditioner", "car_horn", "children_playing", "dog_bark", "drilling", "engine_idling", "gun_shot",
    "jackhammer", "siren", "street_music",
]  # fmt: skip
US8K_FORMATS = [  # rate, channels, subtype
    (44_100, 2, "PCM_16"), (48_000, 2, "PCM_24"), (96_000, 1, "PCM_24"), (44_100, 1, "FLOAT"), (8_000, 1, "PCM_U8"),
    (11_025, 1, "PCM_U8"), (44_100, 1, "MS_ADPCM"), (22_050, 1, "IMA_ADPCM"), (16_000, 1, "ULAW"),
    (192_000, 1, "PCM_16"),
]  # fmt: skip


def make_us8k(root: Path) -> Path:
    """10 classes, 10 folds, two clips of one recording in each: 200 clips in the formats that users have uploaded."""
    rows = []
    for number in range(100):
        label, fold = divmod(number, 10)
        for occurrence in range(2):
            name = f"{7000 + number}-{label}-0-{occurrence}.wav"
            rate, channels, subtype = US8K_FORMATS[number % 10]
            tone(root / "audio" / f"fold{fold + 1}" / name, label, rate, 0.2, channels, subtype)
            rows.append([name, 7000 + number, occurrence, occurrence + 0.2, 1, fold + 1, label, US8K_CLASSES[label]])
    header = "slice_file_name,fsID,start,end,salience,fold,classID,class"
    write_csv(root / "metadata" / "UrbanSound8K.csv", header, rows)
    return root


def make_gsc(root: Path) -> Path:
    """35 words, six speakers: one validates, two test."""
    for number, word in enumerate(WORDS.split()):
        for speaker in range(6):
            tone(root / word / f"{speaker:08x}_nohash_0.wav", number, seconds=0.4)
    for name in ("doing_the_dishes", "white_noise"):
        tone(root / "_background_noise_" / f"{name}.wav", 99, seconds=2)
    (root / "_background_noise_" / "README.md").write_text("no class")
    (root / "validation_list.txt").write_text("".join(f"{word}/00000001_nohash_0.wav\n" for word in WORDS.split()))
    tests = [f"{word}/0000000{speaker}_nohash_0.wav\n" for word in WORDS.split() for speaker in (2, 4)]
    (root / "testing_list.txt").write_text("".join(tests))
    return root


def make_fsc(root: Path) -> Path:
    """31 intents; in the training part four utterances each, one in the others; speakers in one part only."""
    intents = [intent.split() for intent in INTENTS.replace("\n", " ").split(",")]
    speakers = {
        "train": ["2BqVo8kVB2Skwgyb", "4BrX8aDqK2cLZRYl"], "valid": ["9mYN2zmq7aTw4Blo"], "test": ["4aGjX3AG5xcxeL7a"],
    }  # fmt: skip
    for part, names in speakers.items():
        rows = []
        for number, intent in enumerate(intents):
            for take in range(4 if part == "train" else 1):
                speaker = names[take % len(names)]
                path = f"wavs/speakers/{speaker}/{number:04d}{take}440-45f8-11e9-81ce-69b74fd7e64e.wav"
                tone(root / path, number)
                rows.append([len(rows), path, speaker, f'Say "{intent[0]}", please', *intent])
        header = ",path,speakerId,transcription,action,object,location"  # the first column has no name
        write_csv(root / "data" / f"{part}_data.csv", header, rows)
    return root


def test_esc50_miniature(tmp_path):
    root = make_esc50(tmp_path / "ESC-50-master")
    assert run("esc50", root, tmp_path, "--folds", "1,3", "--shots", 1) == 0
    assert [fold["fold"] for fold in result_of("esc50", tmp_path)["folds"]] == [1, 3]
    split = split_of("esc50", tmp_path, fold=3)
    assert {name[6] for name in split["test"]} == {"3"} and {name[6] for name in split["val"]} == {"2"}
    assert {name[6] for name in split["train"]} <= {"1", "4", "5"} and len(split["train"]) == 50
    dataset = esc50(root, tmp_path)
    for fold, split in dataset.folds.items():
        recordings = [{dataset.paths[i].name.split("-")[1] for i in getattr(split, part)} for part in PARTS]
        assert not (recordings[0] & recordings[1] or recordings[0] & recordings[2] or recordings[1] & recordings[2])
        assert split.val == dataset.folds[(fold - 2) % 5 + 1].test and len(split.train) == 150


def test_us8k_miniature(tmp_path, capsys):
    root = make_us8k(tmp_path / "UrbanSound8K")
    assert run("us8k", root, tmp_path, "--folds", "10", "--shots", 3) == 0
    assert "4 s a clip" in capsys.readouterr().out
    assert result_of("us8k", tmp_path)["folds"][0]["validation_accuracy"] is None
    dataset = us8k(root, tmp_path)
    assert dataset.classes == US8K_CLASSES and len(dataset.paths) == 200
    assert list(dataset.folds) == list(range(1, 11))
    for fold, split in dataset.folds.items():
        assert not split.val and len(split.train) == 180 and len(split.test) == 20
        assert {dataset.paths[i].parent.name for i in split.test} == {f"fold{fold}"}
        recordings = [{dataset.paths[i].name.split("-")[0] for i in part} for part in (split.train, split.test)]
        assert not recordings[0] & recordings[1]
        assert sorted(split.train + split.test) == list(range(200))
    assert all(path.name.split("-")[1] == str(label) for path, label in zip(dataset.paths, dataset.labels, strict=True))


def test_gsc_miniature(tmp_path, capsys):
    root = make_gsc(tmp_path / "speech_commands_v0.02")
    assert run("gsc", root, tmp_path) == 0
    assert "1 s a clip" in capsys.readouterr().out
    dataset, split = gsc(root, tmp_path), split_of("gsc", tmp_path)
    assert dataset.classes == WORDS.split() and len(dataset.classes) == 35 and len(dataset.paths) == 210
    assert split["val"] == set((root / "validation_list.txt").read_text().split())
    assert split["test"] == set((root / "testing_list.txt").read_text().split())
    train_files = [f"0000000{speaker}_nohash_0.wav" for speaker in (0, 3, 5)]
    assert split["train"] == {f"{word}/{file}" for word in dataset.classes for file in train_files}
    assert [path.parent.name for path in dataset.paths] == [dataset.classes[label] for label in dataset.labels]

    with open(root / "testing_list.txt", "a") as file:
        file.write("bed/00000001_nohash_0.wav\n")
    with pytest.raises(UserError, match=r"bed/00000001_nohash_0\.wav is in validation_list\.txt and in test"):
        gsc(root, tmp_path)
    (root / "testing_list.txt").write_text("bed/absent.wav\n")
    with pytest.raises(UserError, match=r"1 of 36 files are missing \(bed/absent\.wav\)"):
        gsc(root, tmp_path)


def test_fsc_miniature(tmp_path, capsys):
    root = make_fsc(tmp_path / "fluent_speech_commands_dataset")
    assert run("fsc", root, tmp_path, "--shots", 2) == 0
    assert "4 s a clip" in capsys.readouterr().out
    dataset, split = fsc(root, tmp_path), split_of("fsc", tmp_path)
    assert len(dataset.classes) == 31 and "change language Chinese".replace(" ", "/") in dataset.classes
    speakers = {part: {name.split("/")[2] for name in names} for part, names in split.items()}
    assert speakers["val"] == {"9mYN2zmq7aTw4Blo"} and speakers["test"] == {"4aGjX3AG5xcxeL7a"}
    assert len(speakers["train"]) == 2 and len(split["train"]) == 62 and len(split["val"]) == len(split["test"]) == 31
    assert Counter(dataset.labels) == dict.fromkeys(range(31), 6)
    table = (root / "data" / "test_data.csv").read_text().replace(",action,", ",verb,")
    (root / "data" / "test_data.csv").write_text(table)
    with pytest.raises(UserError, match=r"test_data\.csv: no column 'action'; its header is .*verb"):
        fsc(root, tmp_path)


def test_recipes_are_those_of_the_paper():
    recipes = {name: (r.n_frames, r.batch_size, r.epochs, r.mask) for name, r in DATASETS.items()}
    assert recipes["esc50"] == recipes["esc10"] == (500, 32, 50, True)
    assert recipes["us8k"] == (400, 32, 30, True)
    assert recipes["gsc"] == (100, 128, 75, False)
    assert recipes["fsc"] == (400, 32, 75, False)


def test_fsc_must_be_requested(tmp_path, capsys):
    assert train.main(["--dataset", "fsc", "--cache-dir", str(tmp_path), "--weights", str(SMALL_AST)]) == 2
    message = capsys.readouterr().err
    assert "fluent.ai" in message and "data/train_data.csv" in message and "wavs/speakers/" in message
    assert "--data-dir" in message and message.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------- archives


def test_downloads_check_the_checksum(tmp_path, monkeypatch):
    make_us8k(tmp_path / "UrbanSound8K")
    archive = tmp_path / "UrbanSound8K.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "UrbanSound8K", "UrbanSound8K")
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    source = replace(paper.US8K, url=archive.as_uri(), checksum=f"md5:{'0' * 32}")
    monkeypatch.setattr(paper, "US8K", source)
    with pytest.raises(UserError, match=f"its MD5 is {md5}, not 0000.*by hand.*--data-dir"):
        us8k(None, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    monkeypatch.setattr(paper, "US8K", replace(source, checksum=f"md5:{md5}"))
    assert len(us8k(None, tmp_path / "cache").paths) == 200
    archive.unlink()
    assert len(us8k(None, tmp_path / "cache").paths) == 200  # there is no second download
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == ["UrbanSound8K"]


@pytest.mark.parametrize("format", ["zip", "tar", "gztar"])
def test_an_archive_as_data_dir(tmp_path, format):
    """With the dataset in a folder of its own, as in FSC's zip, or not, as in GSC's tar."""
    make_fsc(tmp_path / "outer" / "fluent_speech_commands_dataset")
    for folder in (tmp_path / "outer", tmp_path / "outer" / "fluent_speech_commands_dataset"):
        archive = Path(shutil.make_archive(str(tmp_path / "fsc"), format, folder))
        dataset = fsc(archive, tmp_path / "cache")
        assert len(dataset.paths) == 186 and dataset.root.is_relative_to(tmp_path / "cache")
    folders = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(folders) == 2  # another archive, another folder
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(UserError, match="not a whole zip or tar archive") as error:
        fsc(archive, tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.endswith("unfinished")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../outside.txt", tarfile.REGTYPE),
        ("/outside.txt", tarfile.REGTYPE),
        ("inside/../../outside.txt", tarfile.REGTYPE),
        ("link", tarfile.SYMTYPE),
        ("hard", tarfile.LNKTYPE),
        ("device", tarfile.CHRTYPE),
        ("pipe", tarfile.FIFOTYPE),
    ],
)
def test_tar_members_that_are_refused(tmp_path, name, kind):
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as tar:
        fine = tarfile.TarInfo("fine.txt")
        fine.size = 4
        tar.addfile(fine, io.BytesIO(b"fine"))
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "fine.txt"  # even a link that stays inside
        tar.addfile(member)
    with pytest.raises(UserError, match=f"refusing '{name}'"):
        unpack(tmp_path / "evil.tar.gz", tmp_path / "deep" / "target")
    assert not list((tmp_path / "deep").iterdir()) and not (tmp_path / "outside.txt").exists()


# ----------------------------------------------------------------------------------------------------- your own sounds


def make_folder(root: Path, count: int = 5, classes=("bell", "drum", "flute"), seconds: float = 0.3) -> Path:
    for number, name in enumerate(classes):
        for i in range(count):
            tone(root / name / f"{i}.wav", 10 * number, seconds=seconds)
    return root


def test_folder_is_split_by_seed(tmp_path, capsys):
    root = make_folder(tmp_path / "my sounds", count=10)
    (root / "bell" / "more").mkdir()
    shutil.move(root / "bell" / "0.wav", root / "bell" / "more" / "Glöckchen 0.wav")
    assert run("folder", root, tmp_path, "--seed", "0,1,2", "--shots", 4) == 0
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

    assert run("folder", root, tmp_path, "--seed", "1", "--shots", 4) == 0  # finished: nothing is trained again
    assert split_of("folder", tmp_path, seed=1) == drawn[1]
    (root / "bell" / "1.wav").unlink()
    assert run("folder", root, tmp_path, "--seed", "1", "--shots", 4) == 2
    assert "holds a run with other clips or splits" in capsys.readouterr().err
    assert run("folder", root, tmp_path, "--seed", "1", "--shots", 7, "--out", tmp_path / "new") == 2
    assert "class 'bell' has only 5 training clips" in capsys.readouterr().err


def test_folder_with_given_splits(tmp_path):
    root = tmp_path / "sounds"
    for part, count in (("train", 3), ("val", 1), ("test", 2)):
        make_folder(root / part, count)
    assert run("folder", root, tmp_path) == 0
    split = split_of("folder", tmp_path)
    for part in PARTS:
        expected = {path.relative_to(root).as_posix() for path in (root / part).rglob("*.wav")}
        assert split[part] == expected and expected
    shutil.rmtree(root / "val")
    assert from_folder(root, tmp_path).folds[1].val == []


def test_mistakes_in_folders(tmp_path, capsys):
    def message(root):
        with pytest.raises(UserError) as error:
            from_folder(root, tmp_path)
        return str(error.value)

    assert "needs --data-dir" in message(None)
    assert "is no folder" in message(tmp_path / "absent")
    root = make_folder(tmp_path / "sounds")
    (root / "silence").mkdir()
    assert "silence holds no sounds" in message(root)
    tone(root / "silence" / "one.wav", 40)
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
    from_folder(tmp_path / "given", tmp_path)
    warnings = capsys.readouterr().err
    assert "train/bell/0.wav = test/bell/copy.wav" in warnings and "in different splits" in warnings
    assert "class 'drum' has no test clips" in warnings and "class 'flute' has one training clip" in warnings


def test_csv_with_splits_and_folds(tmp_path, capsys):
    make_folder(tmp_path / "sounds", count=6)
    rows = [[f"sounds/{name}/{i}.wav", name] for name in ("bell", "drum", "flute") for i in range(6)]
    parts = ["train", "train", "train", "val", "test", "test"] * 3
    table = write_csv(tmp_path / "a.csv", "path,label,split", [[*row, p] for row, p in zip(rows, parts, strict=True)])
    assert run("csv", table, tmp_path) == 0
    test = {f"sounds/{name}/{i}.wav" for name in ("bell", "drum", "flute") for i in (4, 5)}
    assert split_of("csv", tmp_path)["test"] == test

    folds = [[label, path, i % 3 + 1] for i, (path, label) in enumerate(rows)]
    folded = write_csv(tmp_path / "b.csv", "label,path,fold", folds)
    assert run("csv", folded, tmp_path, "--out", tmp_path / "b") == 0
    result = json.loads((tmp_path / "b" / "csv" / "linear" / "seed0" / "result.json").read_text())
    assert [fold["fold"] for fold in result["folds"]] == [1, 2, 3]
    assert from_csv(folded, tmp_path).folds[2] == Split(*([i for i in range(18) if i % 3 == k] for k in (2, 0, 1)))

    bare = from_csv(write_csv(tmp_path / "c.csv", "path,label", rows), tmp_path)
    assert bare.folds == {} and bare.classes == ["bell", "drum", "flute"]
    assert random_split(bare, 0) != random_split(bare, 1)


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("path,class", [["a.wav", "x"]], "no column 'label'; its header is path, class"),
        ("path,label", [], "no rows"),
        ("path,label", [["a.wav", "x"], ["b.wav"]], "line 3: too few columns"),
        ("path,label,split,fold", [["a.wav", "x", "train", 1]], "only one of them"),
        ("path,label,split", [["a.wav", "x", "train"], ["b.wav", "x", "dev"]], "line 3: split is 'dev'"),
        ("path,label,fold", [["a.wav", "x", "first"]], "line 2: fold is 'first'"),
        ("path,label", [["a.wav", ""]], "line 2: an empty path, label"),
        ("path,label,split", [["a.wav", "x", "train"], ["./a.wav", "x", "test"]], "listed in split train and test"),
        ("path,label", [["a.wav", "x"], ["a.wav", "y"]], "listed twice"),
        ("path,label", [["a.wav", "x"], ["no.wav", "x"]], r"1 of 2 files are missing \(no\.wav\)"),
        ("path,label", [["a.wav", "x"], ["b.wav", "y"]], "class 'x' has one clip"),
        ("path,label,fold", [["a.wav", "x", 1], ["b.wav", "y", 2]], "class 'x' has no training clips in fold 1"),
    ],
)
def test_mistakes_in_csv_files(tmp_path, header, rows, message):
    for name in "ab":
        tone(tmp_path / f"{name}.wav", 0)
    with pytest.raises(UserError, match=message):
        from_csv(write_csv(tmp_path / "my.csv", header, rows), tmp_path)


def test_length_of_clips(tmp_path, capsys):
    paths = [tone(tmp_path / f"{i}.wav", 0, seconds=0.1 * (i + 1)) for i in range(21)]  # 0.1 to 2.1 s
    (tmp_path / "bad.wav").write_bytes(b"")
    clips = Dataset("lengths", tmp_path, ["a", "b"], [*paths, tmp_path / "bad.wav"], [0] * 22, {})
    frames = partial(frames_for, DATASETS["folder"], seconds=None)
    assert frames(clips) == 200
    folds = {1: Split(train=[0, 1, 2, 21], val=[], test=[20])}
    assert frames(replace(clips, folds=folds)) == 29
    long = tone(tmp_path / "long.wav", 0, rate=8000, seconds=12)
    assert frames(replace(clips, paths=[long], labels=[0])) == 1024

    root = make_folder(tmp_path / "sounds", count=3, seconds=0.5)
    assert run("folder", root, tmp_path, "--seconds", "0.7") == 0
    assert "0.7 s a clip" in capsys.readouterr().out
    config = json.loads((tmp_path / "runs/folder/linear/seed0/config.json").read_text())
    assert config["n_frames"] == 70
    assert run("folder", root, tmp_path, "--seconds", "0.1") == 2
    assert "--seconds is 0.1" in capsys.readouterr().err
    assert run("folder", root, tmp_path, "--seed", "0,-1") == 2
    assert "'0,-1' is no list of whole numbers" in capsys.readouterr().err
