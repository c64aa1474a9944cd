"""The datasets of the paper, as their releases lie on disk."""

from functools import partial
from pathlib import Path

from sounds.clip import PARTS, Clip, Listing
from sounds.fetch import Source, locate
from sounds.tables import Row, folders_in, read_table, require_files, warn_of_recordings
from support.command import UserError, warn

ESC50 = Source(
    "ESC-50", "meta/esc50.csv", "meta/esc50.csv and audio/*.wav",
    url="https://github.com/karolpiczak/ESC-50/archive/master.zip",  # packed on request: no checksum
)  # fmt: skip
US8K = Source(
    "UrbanSound8K", "metadata/UrbanSound8K.csv", "metadata/UrbanSound8K.csv and audio/fold1/ to audio/fold10/",
    url="https://zenodo.org/records/1203745/files/UrbanSound8K.tar.gz?download=1",
    checksum="md5:9aa69802bbf37fb986f71ec1483a196e",
)  # fmt: skip
GSC = Source(
    "speech_commands_v0.02", "validation_list.txt", "validation_list.txt, testing_list.txt and WORD/*.wav",
    url="https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
    checksum="sha256:af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
)  # fmt: skip
FSC = Source(
    "fluent_speech_commands_dataset", "data/train_data.csv",
    "data/train_data.csv, valid_data.csv and test_data.csv, and wavs/speakers/SPEAKER/*.wav",
    by_hand="request it from Fluent.ai (https://fluent.ai/fluent-speech-commands-a-dataset-for-spoken-language-"
    "understanding-research/)",
)  # fmt: skip
# What in a clip's path is the recording, of ESC and UrbanSound8K, or else the speaker that it is of: tools/evidence.py.
RECORDING = {
    **dict.fromkeys(("esc50", "esc10"), r"/\d-(\d+)-[A-Z]+-\d+\.wav$"), "us8k": r"/(\d+)-\d+-\d+-\d+\.wav$",
    "gsc": r"/(\w+)_nohash_\d+\.wav$", "fsc": r"speakers/([^/]+)/",
}  # fmt: skip


def esc50(data_dir: Path | None, cache_dir: Path, only_esc10: bool = False) -> Listing:
    """ESC-50 (Piczak, 2015): 2,000 clips of 5 s, 50 classes, 5 folds; ESC-10 is 10 of its classes.

    Fold k tests fold k, validates on fold k-1 (fold 1 on fold 5) and trains on the other three. Clips cut from one
    recording are meant to be in one fold; those of 4 recordings (column `src_file`) are not, and are counted aloud.
    `data_dir` is the unpacked release or its zip; without it the release is downloaded.
    """
    root = locate(ESC50, data_dir, cache_dir)
    table = root / "meta" / "esc50.csv"
    rows = read_table(table, ["filename", "fold", "target", "category", "esc10"], integers=["fold", "target"])
    if only_esc10:
        rows = [row for row in rows if row["esc10"].lower() == "true"]
        if not rows:
            raise UserError(f"{table}: no row has esc10 = True; is it the table of the release?")
    clips = [Clip(root / "audio" / row["filename"], row["category"], int(row["fold"])) for row in rows]
    classes = _in_order(table, rows, "target", "category")
    require_files(root, [clip.path for clip in clips])
    warn_of_recordings(root, rows, "src_file")
    n_classes, n_clips = (10, 400) if only_esc10 else (50, 2000)
    if (len(classes), len(rows)) != (n_classes, n_clips):
        warn(f"{root}: {len(rows)} clips of {len(classes)} classes, where the release has {n_clips} of {n_classes}")
    return Listing(root, clips, classes)


esc10 = partial(esc50, only_esc10=True)


def us8k(data_dir: Path | None, cache_dir: Path) -> Listing:
    """UrbanSound8K (Salamon, Jacoby and Bello, 2014): 8,732 clips of up to 4 s, 10 classes, 10 folds.

    Fold k tests fold k and trains on the other nine, so there are no validation clips. Clips cut from one recording
    are meant to be in one fold; those of 5 recordings (column `fsID`) are not, and are counted aloud.
    """
    root = locate(US8K, data_dir, cache_dir)
    table = root / "metadata" / "UrbanSound8K.csv"
    rows = read_table(table, ["slice_file_name", "fold", "classID", "class"], integers=["fold", "classID"])
    places = [root / "audio" / f"fold{row['fold']}" / row["slice_file_name"] for row in rows]
    clips = [Clip(path, row["class"], int(row["fold"])) for path, row in zip(places, rows, strict=True)]
    require_files(root, [clip.path for clip in clips])
    warn_of_recordings(root, rows, "fsID")
    return Listing(root, clips, _in_order(table, rows, "classID", "class"))


def gsc(data_dir: Path | None, cache_dir: Path) -> Listing:
    """Google Speech Commands V2 (Warden, 2018): 105,829 clips of 1 s, 35 words.

    Two files list the clips that validate and that test; all others train. Speakers do not cross these lists.
    """
    root = locate(GSC, data_dir, cache_dir)
    part_of = {}
    for part, file in (("val", root / "validation_list.txt"), ("test", root / "testing_list.txt")):
        if not file.is_file():
            raise UserError(f"{root} does not hold {file.name}; the dataset has {GSC.layout}")
        for name in file.read_text(encoding="utf-8", errors="replace").split():
            if part_of.setdefault(name, part) != part:
                raise UserError(f"{root}: {name} is in validation_list.txt and in testing_list.txt: mend the lists")
    clips = {}
    for folder in folders_in(root):
        word = folder.name
        for file in () if word.startswith("_") else folder.iterdir():  # _background_noise_ is no word
            name = f"{word}/{file.name}"
            if name.endswith(".wav") and "/." not in name:
                clips[name] = Clip(file, word, part_of.get(name, "train"))
    if not part_of.keys() <= clips.keys():
        require_files(root, [root / name for name in part_of])
    return Listing(root, [clips[name] for name in sorted(clips)])


def fsc(data_dir: Path | None, cache_dir: Path) -> Listing:
    """Fluent Speech Commands (Lugosch et al., 2019): 30,043 utterances, 31 intents, a table for each part.

    An intent is the three columns action, object and location together. Speakers are in one part only.
    """
    root = locate(FSC, data_dir, cache_dir)
    clips = []
    for part, file in zip(PARTS, ("train_data.csv", "valid_data.csv", "test_data.csv"), strict=True):
        for row in read_table(root / "data" / file, ["path", "action", "object", "location"]):
            clips.append(Clip(root / row["path"], f"{row['action']}/{row['object']}/{row['location']}", part))
    require_files(root, [clip.path for clip in clips])
    return Listing(root, clips)


def _in_order(table: Path, rows: list[Row], number: str, name: str) -> list[str]:
    """Classes of a table in the order of their column `number`."""
    names, numbers = {}, {}
    for row in rows:
        n, label = int(row[number]), row[name]
        if names.setdefault(n, label) != label or numbers.setdefault(label, n) != n:
            raise UserError(f"{table}, line {row.line}: {number} {n} is {label!r}, unlike above: download it again")
    if len(names) < 2:
        raise UserError(f"{table}: {len(names)} classes in the column {number}; there must be two or more")
    return [names[n] for n in sorted(names)]
