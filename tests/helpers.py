"""Models, sounds and tables that several test files share, all of them made on the spot."""

import csv
import io
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.torch import load_file, save_file

import data
import petl
import train
from ast_model import AST, ASTConfig
from data import Dataset
from load_weights import load_ast, save_trained, to_dict
from petl_more import PENALTIES
from support.checkpoints import write_tensors
from support.files import csv_of, write_json, write_text
from support.records import METRICS, Run, hash_of
from support.variants import method_for
from tools import report
from tools.cells import shape_and_hash
from tools.finished import Finished, Fold
from train import Settings

REFERENCE = Path(__file__).parent / "reference"
SMALL_AST = REFERENCE / "ast_small"  # 2 layers, 64 dimensions: fast enough for runs of train.py
SMALL_STATE = load_file(
    SMALL_AST / "model.safetensors"
)  # under the library's legacy names: encoder.layer.N...
SMALL_CONFIG = json.loads((SMALL_AST / "config.json").read_text())


# ------------------------------------------------------------------------------------------- models


def tiny_ast(**config) -> AST:
    """A random AST on a 3 x 3 patch grid, small enough for formulas by hand."""
    return AST(
        ASTConfig(
            **{
                "n_frames": 36,
                "n_mels": 36,
                "dim": 32,
                "depth": 2,
                "heads": 4,
                "n_classes": 3,
                **config,
            }
        )
    )


SETTINGS = {
    "dataset": "folder",
    "weights": "demo",
    "backbone": "0" * 64,
    "method": {"name": "lora", "lr": 0.005, "parts": []},
    "pool": "mean",
    "seed": 0,
    "shots": None,
    "clips": "0" * 64,
    "n_frames": 60,
    "epochs": 1,
    "batch_size": 8,
    "lr": 0.005,
    "head_lr": 0.005,
    "mask_frames": 0,
    "dtype": "float32",
    "keep": None,
    "balance": False,
    "choose_by": "accuracy",
}


def of_run(fold: int, **settings) -> dict:
    """What the header of a fold file says of a run that never was."""
    result = {
        "fold": fold,
        "accuracy": 50.0,
        "validation_accuracy": None,
        "epoch": 1,
        "seconds": 1.0,
        "peak_memory_mb": 5,
    }
    return {
        "settings": SETTINGS | settings,
        "result": result,
        "record": {"history": [], "predictions": [], "millionths": []},
        "parameters": {"petl": 1, "head": 1, "total": 9},
        "versions": {"torch": "2"},
    }


def save_random(path: Path, method: str, pool: str = "mean", n_frames: int = 60, **header) -> AST:
    """A fold file of the small AST in which everything that `method` trains is random.

    Returns the model, in eval().
    """
    torch.manual_seed(0)
    model = petl.apply(load_ast(SMALL_AST, n_frames, 4, pool), method)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        last = [module for module in model.head.modules() if isinstance(module, torch.nn.Linear)][
            -1
        ]
        last.weight.mul_(5)  # answers far from one another
    classes = ["rain", "sea, waves", "dog", "wind"]
    save_trained(model, path, {"classes": classes, **header})
    return model.eval()


def constant(
    path: Path,
    *probabilities: float,
    classes: list[str] | None = None,
    n_frames: int = 60,
    **header,
) -> Path:
    """A fold file that gives every sound these probabilities."""
    model = petl.apply(load_ast(SMALL_AST, n_frames, len(probabilities)), "linear")
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor(probabilities).log())
    save_trained(model, path, {"classes": classes, **header} if classes else header)
    return path


def write_ast(folder: Path, state: dict, config: dict | None = None) -> Path:
    """A folder with the tensors and, unless None, a config.json of these entries."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors")
    if config is not None:
        whole = {"model_type": "audio-spectrogram-transformer", **config}
        (folder / "config.json").write_text(json.dumps(whole))
    return folder


# -------------------------------------------------------------------------------- sounds and tables


def build_features(
    dataset: Dataset, n_frames: int, cache_dir: Path, skip_bad: bool = False
) -> tuple[np.ndarray, dict[int, str]]:
    """What `load_clips` returns, as an array: float16 (clips, n_frames, 128), memory-mapped."""
    clips, bad = data.load_clips(dataset, n_frames, torch.device("cpu"), cache_dir, skip_bad)
    return clips.features.numpy(), bad


def write_csv(path: Path, header: str = "", *rows) -> Path:
    """A table. A row is a list of values, or one text with commas between them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            row.split(",") if isinstance(row, str) else row for row in (header, *rows)
        )
    return path


def write_sound(
    path: Path,
    number: int | None = None,
    rate=16_000,
    seconds=0.3,
    channels=1,
    subtype=None,
    seed=None,
) -> Path:
    """A short noise; with the number of a class, in it a tone whose pitch says which.

    Unless `seed` says what noise it is, no other file has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(os.fsencode(path)) if seed is None else seed)
    wave = rng.standard_normal((round(rate * seconds), channels))
    if number is None:
        wave *= 0.1
    else:
        pitch = np.sin(2 * np.pi * (200 + 60 * number) * np.arange(len(wave)) / rate)
        wave = 0.3 * pitch[:, None] + 0.03 * wave
    soundfile.write(path, wave, rate, subtype=subtype)
    return path


def make_clips(folder: Path, *names: str, name: str = "clips") -> Dataset:
    """A dataset of different clips of 0.3 s, whose files have these names."""
    paths = [write_sound(folder / one, seed=i) for i, one in enumerate(names)]
    return Dataset(name, folder, ["a", "b"], paths, [0] * len(names), {})


def make_folder(
    root: Path, count: int = 5, classes=("bell", "drum", "flute"), seconds: float = 0.3
) -> Path:
    """A folder for each class, with `count` sounds in it."""
    for number, name in enumerate(classes):
        for i in range(count):
            write_sound(root / name / f"{i}.wav", 10 * number, seconds=seconds)
    return root


def make_bad_files(folder: Path) -> dict[str, str]:
    """Sound files that cannot be used, made in `folder`: name to a word of the reason expected."""
    folder.mkdir(parents=True, exist_ok=True)
    reasons = {}
    for name, subtype in [
        ("cut.wav", "PCM_16"),
        ("cut_adpcm.wav", "MS_ADPCM"),
        ("cut_float.wav", "FLOAT"),
        ("cut.aiff", "PCM_16"),
        ("cut.ogg", "VORBIS"),
        ("cut.mp3", "MPEG_LAYER_III"),
    ]:
        path = write_sound(folder / name, 4, 44_100, 5, subtype=subtype)
        os.truncate(path, path.stat().st_size // 2)
        reasons[name] = "truncated"
    flac = write_sound(folder / "cut.flac", 4, 44_100, 5)
    os.truncate(flac, flac.stat().st_size // 2)
    reasons["cut.flac"] = "lost sync"
    header = write_sound(folder / "header.wav")
    os.truncate(header, 44)
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is no sound")
    (folder / "noise.mp3").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "data.raw").write_bytes(bytes(1000))
    soundfile.write(folder / "silent.wav", np.zeros(0), 16_000)
    for name, value in (("nan.wav", np.nan), ("infinite.wav", np.inf)):
        soundfile.write(
            folder / name, np.array([[0.1, value], [0.1, -value]]), 16_000, subtype="FLOAT"
        )
    pipe = bytearray(write_sound(folder / "pipe.flac").read_bytes())
    pipe[21:26] = bytes([pipe[21] & 0xF0, 0, 0, 0, 0])  # the number of samples: unknown
    (folder / "pipe.flac").write_bytes(pipe)
    tone = 0.3 * np.sin(np.arange(16_000) / 5)
    for name, samples in (
        ("integers.wav", np.rint(32_767 * tone)),
        ("scaled.wav", 32_767 * tone),
        ("opposite.wav", np.stack([tone, -tone], axis=1)),
        ("one.wav", tone[:1]),
    ):
        soundfile.write(folder / name, samples, 16_000, subtype="FLOAT")
    return reasons | {
        "header.wav": "no samples",
        "empty.wav": "is empty",
        "text.wav": "not recognised",
        "noise.mp3": "not recognised",
        "data.raw": "not recognised",
        "silent.wav": "no samples",
        "nan.wav": "not finite",
        "infinite.wav": "not finite",
        "pipe.flac": "how long",
        "integers.wav": "peak of 9,830",
        "scaled.wav": "peak of 9,830",
        "opposite.wav": "cancel each other",
        "one.wav": "must last",
        "absent.wav": "No such file",
    }


def make_esc50(root: Path, takes: int = 1, seconds: float = 0.5) -> Path:
    """A miniature of the ESC-50 release: 12 classes, 10 of them ESC-10.

    There are `takes` clips for each class and fold.

    The sound of a class is a tone of its own pitch in noise, so that training can succeed.
    """
    rng, rows = np.random.default_rng(0), []
    (root / "audio").mkdir(parents=True)
    time = np.arange(int(44_100 * seconds)) / 44_100
    for target in range(0, 48, 4):
        for fold in range(1, 6):
            for take in range(takes):
                name = f"{fold}-{100_000 + target}-{chr(65 + take)}-{target}.wav"
                tone = np.sin(2 * np.pi * (200 + 100 * target) * time)
                wave = 0.3 * tone + 0.03 * rng.standard_normal(len(time))
                soundfile.write(root / "audio" / name, wave, 44_100, subtype="PCM_16")
                rows.append(
                    [
                        name,
                        fold,
                        target,
                        f"sound {target}",
                        target < 40,
                        f"{fold}{target}",
                        chr(65 + take),
                    ]
                )
    write_csv(
        root / "meta" / "esc50.csv", "filename,fold,target,category,esc10,src_file,take", *rows
    )
    return root


# --------------------------------------------------------------------------------------------- runs


class Terminal(io.StringIO):
    """A stderr on which progress is shown."""

    def isatty(self):
        return True


def train_on(dataset: str, data_dir: Path, tmp_path: Path, *options) -> int:
    """train.py in this process, with the small AST, the quickest method and one epoch."""
    words = [
        "--dataset",
        dataset,
        "--data-dir",
        data_dir,
        "--weights",
        SMALL_AST,
        "--method",
        "linear",
        "--epochs",
        1,
    ]
    places = ["--cache-dir", tmp_path / "cache", "--out", tmp_path / "runs"]
    return train.main([str(word) for word in (*words, *places, *options)])


def result_of(dataset: str, tmp_path: Path, seed: str = "seed0") -> dict:
    return json.loads((tmp_path / "runs" / dataset / "linear" / seed / "result.json").read_text())


def split_of(dataset: str, tmp_path: Path, fold: int = 1, seed: int = 0) -> dict[str, set[str]]:
    """split.csv of a run: the paths of each part of one fold."""
    file = tmp_path / "runs" / dataset / "linear" / f"seed{seed}" / "split.csv"
    rows = [
        row for row in csv.DictReader(file.read_text().splitlines()) if row["fold"] == str(fold)
    ]
    return {
        part: {row["path"] for row in rows if row["split"] == part}
        for part in {row["split"] for row in rows}
    }


def settings_of(**changes) -> train.Settings:
    """Settings of a run that trains on what a test gives it."""
    known = {
        "dataset": "",
        "weights": "",
        "backbone": "",
        "method": {},
        "pool": "mean",
        "seed": 0,
        "shots": None,
        "clips": "",
        "n_frames": 36,
        "epochs": 1,
        "batch_size": 4,
        "lr": 1e-2,
        "mask_frames": 0,
        "dtype": "float32",
    }
    known |= changes
    return train.Settings(**{"head_lr": known["lr"], **known})


def make_run(run: Path, words: list[str], *folds: str, validation: float | None = 0.0) -> str:
    """What train.py with these options leaves, with made-up answers: for each fold the letters of
    its test clips, r for right or w for wrong. Its validation clips are wrong. Returns the answer
    of a worker, that all went well."""
    args, recipe = train.parse(words), data.DATASETS[words[words.index("--dataset") + 1]]
    weights = args.weights or recipe.weights
    if petl.has_mark(petl.find(args.method), "has_no_backbone"):
        weights = train.NO_BACKBONE
    config, backbone = shape_and_hash(weights)
    config = replace(config, pool=args.pool)
    method = method_for(petl.find(args.method), config, args, recipe.lr.get(args.method))
    epochs = len(PENALTIES) if petl.has_mark(method, "is_fitted") else recipe.epochs
    n_frames = data.frames_for(recipe, None, args.seconds)
    rows = [["fold", "split", "label", "path"]]
    for fold, letters in enumerate(folds, 1):
        rows += [[fold, "train", "bell", "other.wav"], *[[fold, "val", "bell", "v.wav"]] * 2]
        rows += [[fold, "test", "bell", f"{i}.wav"] for i in range(len(letters))]
    settings = Settings(
        dataset=args.dataset,
        weights=args.weights or recipe.weights,
        backbone=backbone,
        method=to_dict(method),
        pool=args.pool,
        seed=args.seed[0],
        shots=args.shots,
        clips=hash_of(csv_of(rows)),
        n_frames=n_frames,
        epochs=args.epochs or epochs,
        batch_size=args.batch_size or recipe.batch_size,
        lr=method.lr,
        head_lr=method.head_lr or method.lr,
        mask_frames=recipe.widest_mask(n_frames),
        dtype=args.dtype,
        choose_by="balanced" if recipe.own else "accuracy",
    )
    source = {
        "cache_dir": "cache",
        "data_dir": None,
        "group": None,
        "windows": None,
        "background": True,
    }
    write_json(run / "config.json", {**asdict(settings), **source})
    write_text(run / "split.csv", csv_of(rows))
    for fold, letters in enumerate(folds, 1):
        answers = [1, 1, *(int(letter == "w") for letter in letters)]
        accuracy = 100 * letters.count("r") / len(letters)
        history = [
            dict(zip(METRICS, (fold, 1, 4, 2.5, validation or "", "0.001", 9.0), strict=True))
        ]
        header = {
            "settings": asdict(settings),
            "method": settings.method,
            "n_frames": n_frames,
            "n_classes": 2,
            "pool": args.pool,
            "backbone": {"name": settings.weights, "sha256": backbone},
            "classes": ["bell", "drum"],
            "result": {
                "fold": fold,
                "accuracy": accuracy,
                "validation_accuracy": validation,
                "epoch": 1,
                "seconds": 1.0,
                "peak_memory_mb": None,
            },
            "record": {
                "history": history,
                "predictions": answers,
                "millionths": [500_000] * len(answers),
            },
            "parameters": {"petl": 1, "head": 1, "total": 9},
            "versions": {"torch": "2"},
        }
        write_tensors(run / f"fold{fold}.safetensors", {"head.bias": torch.zeros(2)}, header)
    write_json(run / "result.json", {"for": "people"})
    return ""


def answered(*folds: str, petl=1000, head=10, seconds=20.0, group=None) -> Finished:
    """A run that never was: for each fold the letters of its test clips, r for right, w for wrong.

    It took so many seconds in all.
    """
    made = []
    for number, letters in enumerate(folds, 1):
        result = {
            "fold": number,
            "accuracy": 100 * letters.count("r") / len(letters),
            "validation_accuracy": 50.0,
            "epoch": 1,
            "seconds": seconds / len(folds),
            "peak_memory_mb": None,
        }
        made.append(Fold(**result, predictions=[int(letter == "w") for letter in letters]))
    return Finished(
        settings={"dataset": "demo", "group": group},
        classes=["bell", "drum"],
        parameters={"petl": petl, "head": head, "total": 9999},
        versions={"torch": "2"},
        folds=made,
        clips=[
            (number, f"{number}/{i}.wav", "bell")
            for number, letters in enumerate(folds, 1)
            for i in range(len(letters))
        ],
    )


def made_up_page(run: Path, classes: list[str], count: int, name: str = "{}.wav") -> str:
    """The page of a run that never was, with `count` clips, one of each class in turn.

    The first two of a class were taken for the next class. Clip i is a tone of 500 + 20 i Hz, and
    the 30th is that of clip 0 again.
    """
    rng, time = np.random.default_rng(0), np.arange(8000) / 16_000
    labels = [i % len(classes) for i in range(count)]
    answers = [(i + (i < 2 * len(classes))) % len(classes) for i in range(count)]
    millionths = [round(1e6 * (0.5 + i / count / 2)) for i in range(count)]
    split = [
        {"fold": "1", "split": "test", "label": classes[label], "path": name.format(i)}
        for i, label in enumerate(labels)
    ]
    values = [(1, 1, 4, 2.5, 50.0, "0.001", 9), (1, 2, 8, 1.5, 70.0, "0.0001", 9)]
    history = [dict(zip(METRICS, row, strict=True)) for row in values]
    accuracy = 100 * sum(map(int.__eq__, labels, answers)) / count
    method = {"name": "lora", "parts": []}
    config = {
        "method": method,
        "dataset": "made up",
        "seed": 0,
        "cache_dir": "/home/me",
        "data_dir": None,
        "group": None,
        "shots": None,
        "epochs": 2,
        "n_frames": 48,
        "mask_frames": 7,
        "balance": False,
        "choose_by": "balanced",
    }
    fold = {
        "settings": config,
        "classes": classes,
        "parameters": {"petl": 12_345, "head": 67},
        "versions": {"torch": "2"},
        "result": {
            "fold": 1,
            "epoch": 2,
            "accuracy": accuracy,
            "validation_accuracy": 70.0,
            "seconds": 1.5,
            "peak_memory_mb": None,
        },
        "record": {"history": history, "predictions": answers, "millionths": millionths},
    }
    made_up = Run(run, config, split, {1: fold})
    media = [
        {
            "picture": report.picture_of(torch.from_numpy(rng.random((48, 128))), 48),
            "sound": report.sound_of(0.5 * np.sin(2 * np.pi * (500 + 20 * i) * time)),
        }
        for i in range(min(count, 30))
    ]
    cards = [
        {**row, **media[i % 30], "told": {row["label"]: 0.4, row["prediction"]: 0.6}}
        for i, row in enumerate(made_up.tested())
    ]
    dataset = data.Dataset("made up", run, classes, [], [], {})
    return report.page_of(made_up, dataset, sorted(cards, key=report.interest))


def campaign_words(sounds: Path, cache_dir: Path, out: Path, *words) -> list[str]:
    """Options of tools.experiments: one epoch of one fold on half a second of ten tones, less than
    importing torch."""
    own = [
        "--datasets",
        "esc10",
        "--data-dir",
        f"esc10={sounds}",
        "--weights",
        SMALL_AST,
        "--epochs",
        1,
    ]
    ours, passed = (
        (words[: (i := words.index("--"))], words[i + 1 :]) if "--" in words else (words, [])
    )
    passed = [
        "--folds",
        1,
        "--seconds",
        0.5,
        *passed,
    ]  # of an option that comes twice the last one counts
    return [str(w) for w in [*own, "--cache-dir", cache_dir, "--out", out, *ours, "--", *passed]]


def table_of(out: Path, target: str) -> dict[str, dict[str, str]]:
    """A Markdown table that tools.experiments wrote, as {row: {heading: text}}."""
    (file,) = (out / "tables").glob(f"{target}-*.md")
    lines = [line for line in file.read_text().splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
