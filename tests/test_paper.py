"""The datasets of the paper as miniatures with the true layout and tables, some through train.py;
their tables."""

import hashlib
import shutil
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import SMALL_AST, result_of, split_of, train_on, write_csv, write_sound

import train
from data import Split, load_dataset
from sounds import paper
from sounds.clip import PARTS
from sounds.paper import ESC50, FSC, GSC, US8K
from support.command import UserError


def test_where_the_datasets_come_from():
    places = [
        (source.folder, source.marker, source.url, source.checksum)
        for source in (ESC50, US8K, GSC, FSC)
    ]
    assert places == [
        (
            "ESC-50",
            "meta/esc50.csv",
            "https://github.com/karolpiczak/ESC-50/archive/master.zip",
            None,
        ),
        (
            "UrbanSound8K",
            "metadata/UrbanSound8K.csv",
            "https://zenodo.org/records/1203745/files/UrbanSound8K.tar.gz?download=1",
            "md5:9aa69802bbf37fb986f71ec1483a196e",
        ),
        (
            "speech_commands_v0.02",
            "validation_list.txt",
            "https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
            "sha256:af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
        ),
        ("fluent_speech_commands_dataset", "data/train_data.csv", None, None),
    ]


# --------------------------------------------------------------------------------------- miniatures


WORDS = """backward bed bird cat dog down eight five follow forward four go happy house learn left
marvin nine no off on one right seven sheila six stop three tree two up visual wow yes zero"""


INTENTS = """activate lamp none, activate lights bedroom, activate lights kitchen, activate lights
none, activate lights washroom, activate music none, bring juice none, bring newspaper none, bring
shoes none, bring socks none, change language Chinese, change language English, change language
German, change language Korean, change language none, deactivate lamp none, deactivate lights
bedroom, deactivate lights kitchen, deactivate lights none, deactivate lights washroom, deactivate
music none, decrease heat bedroom, decrease heat kitchen, decrease heat none, decrease heat
washroom, decrease volume none, increase heat bedroom, increase heat kitchen, increase heat none,
increase heat washroom, increase volume none"""


def make_all_of_esc50(root: Path) -> Path:
    """50 classes, 5 clips each, one for each fold; the clips of a fold and class pair come from one
    recording."""
    rows = []
    for target in range(50):
        for fold in range(1, 6):
            source = 100_000 + 5 * (target // 2) + fold  # two classes were cut from one recording
            name = f"{fold}-{source}-A-{target}.wav"
            write_sound(root / "audio" / name, target, rate=44_100)
            rows.append([name, fold, target, f"class_{target}", target % 5 == 0, source, "A"])
    write_csv(
        root / "meta" / "esc50.csv", "filename,fold,target,category,esc10,src_file,take", *rows
    )
    return root


US8K_CLASSES = [
    "air_conditioner",
    "car_horn",
    "children_playing",
    "dog_bark",
    "drilling",
    "engine_idling",
    "gun_shot",
    "jackhammer",
    "siren",
    "street_music",
]
US8K_FORMATS = [  # rate, channels, subtype
    (44_100, 2, "PCM_16"),
    (48_000, 2, "PCM_24"),
    (96_000, 1, "PCM_24"),
    (44_100, 1, "FLOAT"),
    (8_000, 1, "PCM_U8"),
    (11_025, 1, "PCM_U8"),
    (44_100, 1, "MS_ADPCM"),
    (22_050, 1, "IMA_ADPCM"),
    (16_000, 1, "ULAW"),
    (192_000, 1, "PCM_16"),
]


def make_us8k(root: Path) -> Path:
    """10 classes, 10 folds, two clips of one recording in each: 200 clips in the formats that users
    have uploaded."""
    rows = []
    for number in range(100):
        label, fold = divmod(number, 10)
        for occurrence in range(2):
            name = f"{7000 + number}-{label}-0-{occurrence}.wav"
            rate, channels, subtype = US8K_FORMATS[number % 10]
            write_sound(
                root / "audio" / f"fold{fold + 1}" / name, label, rate, 0.2, channels, subtype
            )
            rows.append(
                [
                    name,
                    7000 + number,
                    occurrence,
                    occurrence + 0.2,
                    1,
                    fold + 1,
                    label,
                    US8K_CLASSES[label],
                ]
            )
    header = "slice_file_name,fsID,start,end,salience,fold,classID,class"
    write_csv(root / "metadata" / "UrbanSound8K.csv", header, *rows)
    return root


def make_gsc(root: Path) -> Path:
    """35 words, six speakers: one validates, two test."""
    for number, word in enumerate(WORDS.split()):
        for speaker in range(6):
            write_sound(root / word / f"{speaker:08x}_nohash_0.wav", number, seconds=0.4)
    for name in ("doing_the_dishes", "white_noise"):
        write_sound(root / "_background_noise_" / f"{name}.wav", 99, seconds=2)
    (root / "_background_noise_" / "README.md").write_text("no class")
    (root / "validation_list.txt").write_text(
        "".join(f"{word}/00000001_nohash_0.wav\n" for word in WORDS.split())
    )
    tests = [
        f"{word}/0000000{speaker}_nohash_0.wav\n" for word in WORDS.split() for speaker in (2, 4)
    ]
    (root / "testing_list.txt").write_text("".join(tests))
    return root


def make_fsc(root: Path) -> Path:
    """31 intents; in the training part four utterances each, one in the others; speakers in one
    part only."""
    intents = [intent.split() for intent in INTENTS.replace("\n", " ").split(",")]
    speakers = {
        "train": ["2BqVo8kVB2Skwgyb", "4BrX8aDqK2cLZRYl"],
        "valid": ["9mYN2zmq7aTw4Blo"],
        "test": ["4aGjX3AG5xcxeL7a"],
    }
    for part, names in speakers.items():
        rows = []
        for number, intent in enumerate(intents):
            for take in range(4 if part == "train" else 1):
                speaker = names[take % len(names)]
                path = (
                    f"wavs/speakers/{speaker}/{number:04d}{take}440-45f8-11e9-81ce-69b74fd7e64e.wav"
                )
                write_sound(root / path, number)
                rows.append([len(rows), path, speaker, f'Say "{intent[0]}", please', *intent])
        header = (
            ",path,speakerId,transcription,action,object,location"  # the first column has no name
        )
        write_csv(root / "data" / f"{part}_data.csv", header, *rows)
    return root


def test_esc50_miniature(tmp_path):
    root = make_all_of_esc50(tmp_path / "ESC-50-master")
    words = ["--folds", "1,3", "--shots", 1, "--seconds", 1]
    assert train_on("esc50", root, tmp_path, *words) == 0
    assert [fold["fold"] for fold in result_of("esc50", tmp_path)["folds"]] == [1, 3]
    split = split_of("esc50", tmp_path, fold=3)
    assert {name[6] for name in split["test"]} == {"3"} and {name[6] for name in split["val"]} == {
        "2"
    }
    assert {name[6] for name in split["train"]} <= {"1", "4", "5"} and len(split["train"]) == 50
    dataset = load_dataset("esc50", root, tmp_path)
    for fold, split in dataset.folds.items():
        recordings = [
            {dataset.paths[i].name.split("-")[1] for i in getattr(split, part)} for part in PARTS
        ]
        assert not (
            recordings[0] & recordings[1]
            or recordings[0] & recordings[2]
            or recordings[1] & recordings[2]
        )
        assert split.val == dataset.folds[(fold - 2) % 5 + 1].test and len(split.train) == 150


def test_us8k_miniature(tmp_path, capsys):
    root = make_us8k(tmp_path / "UrbanSound8K")
    assert train_on("us8k", root, tmp_path, "--folds", "10", "--shots", 3) == 0
    assert "clips of 4 s" in capsys.readouterr().out
    assert result_of("us8k", tmp_path)["folds"][0]["validation_accuracy"] is None
    dataset = load_dataset("us8k", root, tmp_path)
    assert dataset.classes == US8K_CLASSES and len(dataset.paths) == 200
    assert list(dataset.folds) == list(range(1, 11))
    for fold, split in dataset.folds.items():
        assert not split.val and len(split.train) == 180 and len(split.test) == 20
        assert {dataset.paths[i].parent.name for i in split.test} == {f"fold{fold}"}
        recordings = [
            {dataset.paths[i].name.split("-")[0] for i in part}
            for part in (split.train, split.test)
        ]
        assert not recordings[0] & recordings[1]
        assert sorted(split.train + split.test) == list(range(200))
    assert all(
        path.name.split("-")[1] == str(label)
        for path, label in zip(dataset.paths, dataset.labels, strict=True)
    )


def test_gsc_miniature(tmp_path, capsys):
    root = make_gsc(tmp_path / "speech_commands_v0.02")
    assert train_on("gsc", root, tmp_path) == 0
    assert "clips of 1 s" in capsys.readouterr().out
    dataset, split = load_dataset("gsc", root, tmp_path), split_of("gsc", tmp_path)
    assert (
        dataset.classes == WORDS.split()
        and len(dataset.classes) == 35
        and len(dataset.paths) == 210
    )
    assert split["val"] == set((root / "validation_list.txt").read_text().split())
    assert split["test"] == set((root / "testing_list.txt").read_text().split())
    train_files = [f"0000000{speaker}_nohash_0.wav" for speaker in (0, 3, 5)]
    assert split["train"] == {f"{word}/{file}" for word in dataset.classes for file in train_files}
    assert [path.parent.name for path in dataset.paths] == [
        dataset.classes[label] for label in dataset.labels
    ]

    lines = (root / "validation_list.txt").read_text().split()
    (root / "validation_list.txt").write_text("\ufeff./" + "\n./".join(lines), encoding="utf-8")
    lines = (root / "testing_list.txt").read_text().replace("/", "\\").splitlines()
    (root / "testing_list.txt").write_text("\r\n".join(lines))
    assert load_dataset("gsc", root, tmp_path) == dataset  # made again by other programs
    write_sound(root / "_background_noise_" / "mill.wav")
    for name in ("_background_noise_/mill.wav", root / "bed" / "00000002_nohash_0.wav"):
        (root / "testing_list.txt").write_text(f"{name}\n")
        with pytest.raises(UserError, match=r"1 files of the lists are no WORD/NAME\.wav in .*/"):
            load_dataset("gsc", root, tmp_path)
    (root / "testing_list.txt").write_text("bed/00000001_nohash_0.wav\n")
    with pytest.raises(UserError, match=r"both lists have bed/00000001_nohash_0\.wav"):
        load_dataset("gsc", root, tmp_path)

    (root / "testing_list.txt").write_text("bed/absent.wav\n")
    with pytest.raises(UserError, match=r"1 of 36 files are missing \(bed/absent\.wav\)"):
        load_dataset("gsc", root, tmp_path)
    (root / "testing_list.txt").write_bytes(b"bed/\xff.wav\n")
    with pytest.raises(UserError, match="1 of 36 files are missing"):
        load_dataset("gsc", root, tmp_path)


def test_fsc_miniature(tmp_path, capsys):
    root = make_fsc(tmp_path / "fluent_speech_commands_dataset")
    assert train_on("fsc", root, tmp_path, "--shots", 2) == 0
    assert "clips of 4 s" in capsys.readouterr().out
    dataset, split = load_dataset("fsc", root, tmp_path), split_of("fsc", tmp_path)
    assert (
        len(dataset.classes) == 31
        and "change language Chinese".replace(" ", "/") in dataset.classes
    )
    speakers = {part: {name.split("/")[2] for name in names} for part, names in split.items()}
    assert speakers["val"] == {"9mYN2zmq7aTw4Blo"} and speakers["test"] == {"4aGjX3AG5xcxeL7a"}
    assert (
        len(speakers["train"]) == 2
        and len(split["train"]) == 62
        and len(split["val"]) == len(split["test"]) == 31
    )
    assert Counter(dataset.labels) == dict.fromkeys(range(31), 6)
    table = (root / "data" / "test_data.csv").read_text().replace(",action,", ",verb,")
    (root / "data" / "test_data.csv").write_text(table)
    with pytest.raises(
        UserError, match=r"test_data\.csv: no column 'action'; its header is .*verb"
    ):
        load_dataset("fsc", root, tmp_path)


def test_fsc_must_be_requested(tmp_path, capsys):
    assert (
        train.main(["--dataset", "fsc", "--cache-dir", str(tmp_path), "--weights", str(SMALL_AST)])
        == 2
    )
    message = capsys.readouterr().err
    assert (
        "fluent.ai" in message and "data/train_data.csv" in message and "wavs/speakers/" in message
    )
    assert "--data-dir" in message and message.count("\n") == 1


def test_downloads_check_the_checksum(tmp_path, monkeypatch):
    make_us8k(tmp_path / "UrbanSound8K")
    archive = tmp_path / "UrbanSound8K.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "UrbanSound8K", "UrbanSound8K")
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    source = replace(paper.US8K, url=archive.as_uri(), checksum=f"md5:{'0' * 32}")
    monkeypatch.setattr(paper, "US8K", source)
    with pytest.raises(UserError, match=f"its MD5 is {md5}, not 0000.*by hand.*--data-dir"):
        load_dataset("us8k", None, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    monkeypatch.setattr(paper, "US8K", replace(source, checksum=f"md5:{md5}"))
    assert len(load_dataset("us8k", None, tmp_path / "cache").paths) == 200
    archive.unlink()
    assert (
        len(load_dataset("us8k", None, tmp_path / "cache").paths) == 200
    )  # there is no second download
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [
        "UrbanSound8K"
    ]


@pytest.mark.parametrize("format", ["zip", "tar", "gztar"])
def test_an_archive_as_data_dir(tmp_path, format):
    """With the dataset in a folder of its own, as in FSC's zip, or not, as in GSC's tar."""
    make_fsc(tmp_path / "outer" / "fluent_speech_commands_dataset")
    for folder in (tmp_path / "outer", tmp_path / "outer" / "fluent_speech_commands_dataset"):
        archive = Path(shutil.make_archive(str(tmp_path / "fsc"), format, folder))
        dataset = load_dataset("fsc", archive, tmp_path / "cache")
        assert len(dataset.paths) == 186 and dataset.root.is_relative_to(tmp_path / "cache")
    folders = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(folders) == 2  # another archive, another folder
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(UserError, match="not a whole zip or tar archive") as error:
        load_dataset("fsc", archive, tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.endswith("unfinished")]


# -------------------------------------------------------------------------------- folds and classes


@pytest.mark.parametrize(("name", "n_classes"), [("esc50", 12), ("esc10", 10)])
def test_folds_follow_the_protocol(esc50_dir, tmp_path, name, n_classes):
    dataset = load_dataset(name, esc50_dir, tmp_path)
    assert len(dataset.classes) == n_classes and len(dataset.paths) == 5 * n_classes
    assert list(dataset.folds) == [1, 2, 3, 4, 5]
    fold_of = [int(path.name[0]) for path in dataset.paths]
    for k, split in dataset.folds.items():
        assert {fold_of[i] for i in split.test} == {k}
        assert {fold_of[i] for i in split.val} == {(k - 2) % 5 + 1}
        assert sorted(split.train + split.val + split.test) == list(
            range(5 * n_classes)
        )  # each clip once
        recordings = [
            {dataset.paths[i].name[:8] for i in part}
            for part in (split.train, split.val, split.test)
        ]
        assert not (
            recordings[0] & recordings[1]
            or recordings[0] & recordings[2]
            or recordings[1] & recordings[2]
        )
    for i, path in enumerate(dataset.paths):
        assert dataset.classes[dataset.labels[i]] == f"sound {path.stem.split('-')[-1]}"


def esc_table(root: Path, rows: list[tuple]) -> Path:
    """The table of an ESC-50 release with empty sound files: (filename, fold, target, category,
    esc10)."""
    lines = [",".join(map(str, row)) for row in rows]
    write_csv(root / "meta" / "esc50.csv", "filename,fold,target,category,esc10", *lines)
    (root / "audio").mkdir(exist_ok=True)
    for row in rows:
        (root / "audio" / str(row[0])).touch()
    return root


def test_classes_come_in_the_order_of_their_numbers(tmp_path):
    names = {0: "zebra", 10: "ant", 2: "mule"}
    rows = [
        (f"{fold}-{n}.wav", fold, n, names[n], n != 2) for n in (10, 0, 2) for fold in (1, 2, 3)
    ]
    dataset = load_dataset("esc50", esc_table(tmp_path / "esc", rows), tmp_path)
    assert dataset.classes == ["zebra", "mule", "ant"] and dataset.labels == [
        2,
        2,
        2,
        0,
        0,
        0,
        1,
        1,
        1,
    ]
    assert (dataset.name, dataset.root, dataset.names[0]) == (
        "esc50",
        tmp_path / "esc",
        "audio/1-10.wav",
    )
    ten = load_dataset("esc10", tmp_path / "esc", tmp_path)
    assert (
        ten.classes == ["zebra", "ant"] and ten.labels == [1, 1, 1, 0, 0, 0] and ten.name == "esc10"
    )
    assert ten.folds[1] == Split([1, 4], [2, 5], [0, 3])

    lines = [f"{fold}-{n}.wav,{fold},{n},{names[n]}" for n in (10, 0, 2) for fold in (1, 2)]
    for line in lines:
        name, fold, *_ = line.split(",")
        write_sound(tmp_path / "us8k" / "audio" / f"fold{fold}" / name)
    write_csv(
        tmp_path / "us8k/metadata/UrbanSound8K.csv", "slice_file_name,fold,classID,class", *lines
    )
    urban = load_dataset("us8k", tmp_path / "us8k", tmp_path)
    assert (
        urban.classes == ["zebra", "mule", "ant"]
        and urban.labels == [2, 2, 0, 0, 1, 1]
        and urban.name == "us8k"
    )
    assert urban.names[:2] == ["audio/fold1/1-10.wav", "audio/fold2/2-10.wav"]
    assert urban.folds[2] == Split([0, 2, 4], [], [1, 3, 5])


def test_what_is_no_clip_of_speech_commands(tmp_path):
    for name in (
        "yes/a.wav",
        "yes/._a.wav",
        "no/b.wav",
        "no/c.wav",
        ".git/d.wav",
        "_background_noise_/e.wav",
    ):
        write_sound(tmp_path / name)
    (tmp_path / "yes" / "a.txt").touch()
    (tmp_path / "validation_list.txt").write_text("no/b.wav\n")
    with pytest.raises(FileNotFoundError, match=r"testing_list\.txt"):
        load_dataset("gsc", tmp_path, tmp_path)
    (tmp_path / "testing_list.txt").write_text("no/c.wav\n")
    dataset = load_dataset("gsc", tmp_path, tmp_path)
    assert dataset.names == ["no/b.wav", "no/c.wav", "yes/a.wav"] and dataset.name == "gsc"
    assert (dataset.classes, dataset.folds) == (["no", "yes"], {1: Split([2], [0], [1])})


# ------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("count", "named"),
    [(5, "0.wav, audio/1.wav, audio/2.wav, audio/3.wav, audio/4.wav"), (6, "0.wav, ...")],
)
def test_five_missing_files_are_named(tmp_path, count, named):
    rows = [(f"{i}.wav", i % 2 + 1, i % 2, f"c{i % 2}", True) for i in range(8)]
    root = esc_table(tmp_path, rows)
    for i in range(count):
        (root / "audio" / f"{i}.wav").unlink()
    named = "audio/" + named.replace(
        "0.wav, ...", ", audio/".join(f"{i}.wav" for i in range(5)) + " and 1 more"
    )
    with pytest.raises(UserError) as error:
        load_dataset("esc50", root, tmp_path)
    assert str(error.value) == f"{root}: {count} of 8 files are missing ({named}): complete it"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"filename,fold\na.wav,1\n", "no column 'target'"),
        (b"filename,fold,target,category,esc10\n", "no rows beneath the header"),
        (
            b"filename,fold,target,category,esc10\na,1.0,1,x,True\n",
            r"line 2: fold is '1\.0'; it must be a whole number",
        ),
        (
            b"filename,fold,target,category,esc10\na,1,1,x,True\na,1,-1,x,True\n",
            "line 3: target is '-1'",
        ),
        (
            b'filename,fold,target,category,esc10\n\na,1,1,"\n",True\n\n\na,1,1\n',
            "line 7: its cells",
        ),
        (
            b"filename,fold,target,category,esc10\na,1,1\n",
            "line 2: its cells do not fit the header",
        ),
        (
            b"filename,fold,target,category,esc10\n\xff\xfe,1,1,x,True\n",
            "it must be a CSV file in UTF-8",
        ),
        (b"", "no column .filename.; its header is empty"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, content, message):
    write_csv(tmp_path / "meta" / "esc50.csv").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_dataset("esc10", tmp_path, tmp_path)
    assert str(tmp_path / "meta" / "esc50.csv") in str(error.value)


def test_a_missing_table_is_named(tmp_path):
    write_csv(tmp_path / "data" / "train_data.csv", "path,action,object,location", "a.wav,x,y,z")
    with pytest.raises(FileNotFoundError, match=r"data/valid_data\.csv"):
        load_dataset("fsc", tmp_path, tmp_path)
