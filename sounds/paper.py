"""The datasets of the paper, as their releases lie on disk."""

import posixpath
from functools import partial
from pathlib import Path

from sounds.clip import PARTS, Clip, Listing
from sounds.fetch import Source, locate
from sounds.tables import folders_in, read_table, require_files
from support.command import UserError, first_of
from support.files import require_file

ESC50 = Source(
    folder="ESC-50",
    marker="meta/esc50.csv",
    layout="meta/esc50.csv and audio/*.wav",
    url="https://github.com/karolpiczak/ESC-50/archive/master.zip",  # no checksum: made on request
)
US8K = Source(
    folder="UrbanSound8K",
    marker="metadata/UrbanSound8K.csv",
    layout="metadata/UrbanSound8K.csv and audio/fold1/ to audio/fold10/",
    url="https://zenodo.org/records/1203745/files/UrbanSound8K.tar.gz?download=1",
    checksum="md5:9aa69802bbf37fb986f71ec1483a196e",
)
GSC = Source(
    folder="speech_commands_v0.02",
    marker="validation_list.txt",
    layout="validation_list.txt, testing_list.txt and WORD/*.wav",
    url="https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
    checksum="sha256:af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
)
FSC = Source(
    folder="fluent_speech_commands_dataset",
    marker="data/train_data.csv",
    layout="data/train_data.csv, valid_data.csv and test_data.csv, and wavs/speakers/SPEAKER/*.wav",
    by_hand="request it from Fluent.ai (https://fluent.ai/"
    "fluent-speech-commands-a-dataset-for-spoken-language-understanding-research/)",
)
# Finds in the path of a clip the recording that it is of (ESC, UrbanSound8K) or the speaker.
# tools/evidence.py uses it.
RECORDING = {
    "esc50": r"/\d-(\d+)-[A-Z]+-\d+\.wav$",
    "esc10": r"/\d-(\d+)-[A-Z]+-\d+\.wav$",
    "us8k": r"/(\d+)-\d+-\d+-\d+\.wav$",
    "gsc": r"/(\w+)_nohash_\d+\.wav$",
    "fsc": r"speakers/([^/]+)/",
}


def esc50(data_dir: Path | None, cache_dir: Path, only_esc10: bool = False) -> Listing:
    """ESC-50 (Piczak, 2015): 2,000 clips of 5 s, 50 classes, 5 folds. ESC-10 is 10 of its classes.

    Fold k tests fold k, validates on fold k-1 (fold 1 on fold 5) and trains on the other three.
    Clips of one recording are meant to be in one fold. Those of 4 recordings (column `src_file`)
    are not. `data_dir` is the unpacked release or its zip. Without it the release is downloaded.
    """
    root = locate(ESC50, data_dir, cache_dir)
    columns = ["filename", "fold", "target", "category", "esc10"]
    rows = read_table(root / "meta" / "esc50.csv", columns, integers=["fold", "target"])
    if only_esc10:
        rows = [row for row in rows if row["esc10"].lower() == "true"]
    clips = [
        Clip(root / "audio" / row["filename"], row["category"], int(row["fold"])) for row in rows
    ]
    require_files(root, [clip.path for clip in clips])
    return Listing(root, clips, classes_in_order(rows, "target", "category"))


esc10 = partial(esc50, only_esc10=True)


def us8k(data_dir: Path | None, cache_dir: Path) -> Listing:
    """UrbanSound8K (Salamon et al., 2014): 8,732 clips of up to 4 s, 10 classes, 10 folds.

    Fold k tests fold k and trains on the other nine, so there are no validation clips. Clips of one
    recording are meant to be in one fold. Those of 5 recordings (column `fsID`) are not.
    """
    root = locate(US8K, data_dir, cache_dir)
    table = root / "metadata" / "UrbanSound8K.csv"
    columns = ["slice_file_name", "fold", "classID", "class"]
    rows = read_table(table, columns, integers=["fold", "classID"])
    clips = []
    for row in rows:
        path = root / "audio" / f"fold{row['fold']}" / row["slice_file_name"]
        clips.append(Clip(path, row["class"], int(row["fold"])))
    require_files(root, [clip.path for clip in clips])
    return Listing(root, clips, classes_in_order(rows, "classID", "class"))


def gsc(data_dir: Path | None, cache_dir: Path) -> Listing:
    """Google Speech Commands V2 (Warden, 2018): 105,829 clips of 1 s, 35 words.

    Two files list the clips that validate and that test. All others train. No speaker is in two
    parts.
    """
    root = locate(GSC, data_dir, cache_dir)
    part_of = {}
    for part, file in (("val", "validation_list.txt"), ("test", "testing_list.txt")):
        require_file(root / file)
        for name in (root / file).read_text(encoding="utf-8-sig", errors="replace").split():
            name = posixpath.normpath(name.replace("\\", "/"))  # of `find .`, or of Windows
            if part_of.setdefault(name, part) != part:
                raise UserError(f"{root}: both lists have {name}: it must validate or test")
    clips = {}
    for folder in folders_in(root):
        if folder.name.startswith("_"):  # _background_noise_ is no word
            continue
        word = folder.name
        for file in folder.iterdir():
            name = file.name
            if name.endswith(".wav") and not name.startswith("."):
                name = f"{word}/{name}"
                clips[name] = Clip(file, word, part_of.get(name, "train"))
    others = sorted(part_of.keys() - clips.keys())
    if others:
        require_files(root, [root / name for name in part_of])
        raise UserError(
            f"{root}: {len(others)} files of the lists are no WORD/NAME.wav in {root} "
            f"({first_of(others)}): write them in this way"
        )
    return Listing(root, [clips[name] for name in sorted(clips)])


def fsc(data_dir: Path | None, cache_dir: Path) -> Listing:
    """Fluent Speech Commands (Lugosch et al., 2019): 30,043 utterances, 31 intents.

    There is a table for each part. An intent is the three columns action, object and location
    together. No speaker is in two parts.
    """
    root = locate(FSC, data_dir, cache_dir)
    tables = ("train_data.csv", "valid_data.csv", "test_data.csv")
    columns = ["path", "action", "object", "location"]
    clips = []
    for part, table in zip(PARTS, tables, strict=True):
        for row in read_table(root / "data" / table, columns):
            intent = f"{row['action']}/{row['object']}/{row['location']}"
            clips.append(Clip(root / row["path"], intent, part))
    require_files(root, [clip.path for clip in clips])
    return Listing(root, clips)


def classes_in_order(rows: list[dict[str, str]], number: str, name: str) -> list[str]:
    """Names of the classes of a table, in the order of the column `number`."""
    names = {int(row[number]): row[name] for row in rows}
    return [names[n] for n in sorted(names)]
