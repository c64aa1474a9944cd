"""The files of a run, but for the tensors.

A run is what its fold files hold: settings, history, predictions and a digest. config.json and
split.csv are written at its start, foldK.resume.pt after every epoch. metrics.csv, predictions.csv,
confusion.csv and result.json are made of the fold files, for people. No program reads them.
"""

import csv
import ctypes
import gc
import hashlib
import io
import json
import platform
import re
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from ast_model import UserError
from support.checkpoints import read_header, read_json, sha256_of, unpickled, write_state
from support.command import first_of, warn
from support.files import (
    csv_of,
    remove_left_behind,
    table_of,
    to_bytes,
    write_json,
    write_text,
)
from support.headers import RunConfig, checked
from support.processes import is_first, say
from support.scores import confusion, confusion_table, scores

# Options of train.py that find the clips.
SOURCE = ("data_dir", "cache_dir", "group", "windows", "background")
SPLIT = ("fold", "split", "label", "path")  # columns of split.csv
METRICS = ("fold", "epoch", "step", "loss", "accuracy", "lr", "clips/s")  # columns of metrics.csv
AGAIN = "the same command of train.py writes it again"
PIECE = re.compile(r"#[\d.]+-[\d.]*$")  # what sounds.clip.fragment puts behind a path
LOCK = ".run.lock"  # who writes the text files of a run holds it: several machines may train it

# ------------------------------------------------------------------------------ the start of a run


def check_folds(dataset):
    """UserError for a fold without clips to train or test, or a class without clips to train."""
    for fold, split in dataset.folds.items():
        if not split.train or not split.test:
            missing = "test" if split.train else "train"
            raise UserError(f"{dataset.root}: no clips to {missing}: say which in the data")
        training = {dataset.labels[i] for i in split.train}
        for label, name in enumerate(dataset.classes):
            if label not in training:
                where = f"{dataset.root}: class {name!r}"
                raise UserError(f"{where} has no training clips in fold {fold}: add some")


def tell_of_gaps(dataset, folds):
    """Warn of classes without training or test clips."""
    for fold, split in folds.items():
        for what, clips in (("training", split.train), ("test", split.test)):
            there = {dataset.labels[i] for i in clips}
            gone = [name for label, name in enumerate(dataset.classes) if label not in there]
            if gone and is_first():
                warn(
                    f"{dataset.root}: {len(gone)} classes have no {what} clips in fold {fold} "
                    f"({first_of(gone)})"
                )


def split_table(dataset, folds, bad):
    """split.csv: what each clip is used for in each fold.

    Training clips that --shots has not drawn are left out.
    """
    names = dataset.names

    def rows():
        yield SPLIT
        for fold, split in folds.items():
            for part, clips in {**vars(split), "skipped": sorted(bad)}.items():
                for i in clips:
                    yield fold, part, dataset.classes[dataset.labels[i]], names[i]

    return csv_of(rows())


def file_of(name):
    """The file in the name of a clip, which may be a piece of a recording."""
    return PIECE.sub("", name)


def hash_of(text):
    return hashlib.sha256(to_bytes(text)).hexdigest()


def start_run(folder, settings, table, names, bad, options):
    """Write config.json and split.csv. Returns the rows of metrics.csv of the finished folds.

    `options` are those of train.py, of which SOURCE are kept. `names` are those of the clips.
    A UserError if `folder` holds another experiment, whose folds must not be mixed with these.
    """
    source = {}
    for name in SOURCE:
        value = options[name]
        source[name] = str(value.resolve()) if isinstance(value, Path) else value
    skipped = {names[i]: reason for i, reason in bad.items()}
    config = {**asdict(settings), "command": sys.argv, "skipped_clips": skipped, **source}
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(
        folder / LOCK
    ):  # of two experiments that start together the second sees the first
        if (folder / "config.json").exists():
            compare_settings(folder, read_config(folder), plain(settings))
        rows = []
        for fold, file in fold_files(folder).items():
            rows += read_fold(file, fold, plain(settings))["record"]["history"]
        if is_first():
            remove_left_behind(folder)
            write_json(folder / "config.json", config)
            write_text(folder / "split.csv", table)
    return rows


def plain(settings):
    """Settings as JSON has them."""
    return json.loads(json.dumps(asdict(settings)))


def read_config(folder: Path) -> dict:
    """config.json: the settings, and where the clips were found."""
    path = folder / "config.json"
    config = read_json(path, dict[str, Any], mend=f"delete it, and {AGAIN}")
    checked(config, RunConfig, path)
    return config


def fold_files(folder: Path) -> dict[int, Path]:
    """The files of the finished folds by their numbers. Only train.py's own names count."""
    files = {}
    for file in folder.glob("fold*.safetensors"):
        if found := re.fullmatch(r"fold(0|[1-9][0-9]{0,8})\.safetensors", file.name):
            files[int(found[1])] = file
    return dict(sorted(files.items()))


def check_not_of_run(out: Path) -> None:
    """UserError if `out`, which another command writes, would be a file of the run there."""
    names = ("fold*.safetensors", "config.json", "result.json")
    if (out.parent / "config.json").is_file() and any(out.match(name) for name in names):
        raise UserError(f"{out} would be a file of the run there: give another name")


def difference(old, new):
    """The first of the `new` settings that is another in the `old` ones, in words."""
    for name, value in new.items():
        before = old.get(name)
        if before == value or name == "weights":  # a name; the backbone is what counts
            continue
        if name == "clips":
            return "other clips or splits"
        if name == "n_frames":
            return f"--seconds {before / 100:g}, not {value / 100:g}"
        if name == "backbone":
            return f"the backbone {old['weights']} as it was then (give the right one as --weights)"
        return f"{name} {before!s:.200}, not {value!s:.200}"
    return None


def compare_settings(folder: Path, old: dict, new: dict) -> None:
    """UserError if the run in `folder`, with the `old` settings, is not one with the `new` ones."""
    if what := difference(old, new):
        raise UserError(f"{folder} holds a run with {what}: give another --out, or delete it")


def read_folds(folder: Path) -> dict[int, dict]:
    """The headers of the finished folds. UserError if they are not all of one run."""
    headers = {}
    settings = {}
    for fold, file in fold_files(folder).items():
        headers[fold] = read_fold(file, fold, settings)
        settings = headers[fold]["settings"]
        if headers[fold]["classes"] != next(iter(headers.values()))["classes"]:
            raise UserError(f"{file} has other classes than the first fold: delete it, and {AGAIN}")
    return headers


def check_run(file, fold, settings, wanted_fold, wanted):
    """UserError if a file, of this fold and these settings, is not of the wanted ones."""
    what = difference(settings, wanted)
    if fold != wanted_fold:
        what = f"fold {fold}"
    if what:
        raise UserError(f"{file} is of a run with {what}: delete it, or give another --out")


def read_fold(file, fold, settings):
    """The header of a fold file. UserError if it is damaged, or of another fold or settings."""
    header = read_header(file, "settings", "result", "record", "classes", "parameters", "versions")
    check_run(file, header["result"]["fold"], header["settings"], fold, settings)
    return header


# ----------------------------------------------------------------------------------- epoch by epoch


@dataclass
class Progress:
    """What is known of a fold after its last finished epoch. Its clock runs from the start."""

    fold: int
    history: list[dict] = field(default_factory=list)  # the rows of metrics.csv
    seconds: float = 0.0
    clock: float = field(default_factory=time.perf_counter)  # when it was last read

    def tick(self):
        """Add what has passed since the clock was last read."""
        now = time.perf_counter()
        self.seconds += now - self.clock
        self.clock = now


def save_progress(file, progress, settings, state):
    """Write the state that --resume goes on from."""
    state = {
        **state,
        "fold": progress.fold,
        "settings": plain(settings),
        "history": progress.history,
        "seconds": progress.seconds,
    }
    write_state(file, {**state, "digest": sha256_of(state)})


def read_progress(file, fold, settings, resume):
    """The interrupted fold that `save_progress` left, if it is to be resumed; else a fresh start.

    UserError if the state is damaged, or of another fold or settings.
    """
    if not file.exists():
        return Progress(fold), None
    if not resume:
        say(f"fold {fold}: was interrupted and starts over; --resume would go on where it was")
        return Progress(fold), None
    try:
        state = unpickled(file)
        is_whole = state.pop("digest") == sha256_of(state)
    except Exception:  # the bytes may be anything
        is_whole = False
    if not is_whole:
        raise UserError(f"{file} is damaged: delete it, and the fold starts over")
    check_run(file, state["fold"], state["settings"], fold, plain(settings))
    say(f"fold {fold}: going on after epoch {state['epoch']}")
    return Progress(fold, state["history"], state["seconds"]), state


def write_metrics(folder, rows):
    """Write metrics.csv."""
    write_text(folder / "metrics.csv", table_of(METRICS, rows))


def peak_memory() -> int | None:
    """Most bytes that this process has taken, on the GPU if one is used. None on Windows."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if platform.system() == "Windows":
        return None
    import resource  # not there on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak << 10  # bytes there, KiB on Linux


def forget_peak() -> bool:
    """Let `peak_memory` begin anew. False where the system cannot do so: Linux can."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed is given back
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, TypeError, AttributeError):  # another system, or a sandbox without these
        return False
    return True


# ----------------------------------------------------------------------------------- a finished run


@dataclass(frozen=True)
class Run:
    """A run with one finished fold or more, for programs."""

    folder: Path
    config: dict  # config.json
    split: list[dict[str, str]]  # the rows of split.csv
    folds: dict[int, dict]  # the headers of the fold files

    @property
    def first(self) -> dict:
        return next(iter(self.folds.values()))

    @property
    def classes(self) -> list[str]:
        return self.first["classes"]

    def file(self, fold: int) -> Path:
        return self.folder / f"fold{fold}.safetensors"

    def history(self) -> list[dict]:
        """The rows of metrics.csv."""
        return [row for header in self.folds.values() for row in header["record"]["history"]]

    def clips(self, *parts: str) -> list[dict[str, str]]:
        """The rows of split.csv in these parts of the finished folds."""
        folds = [str(fold) for fold in self.folds]
        return [row for row in self.split if row["split"] in parts and row["fold"] in folds]

    def predictions(self) -> list[dict]:
        """The rows of predictions.csv."""
        rows = []
        clips = self.clips("val", "test")
        for fold, header in self.folds.items():
            record = header["record"]
            ours = [clip for clip in clips if clip["fold"] == str(fold)]
            answers = zip(ours, record["predictions"], record["millionths"], strict=True)
            for clip, number, millionths in answers:
                row = {"fold": fold, "part": clip["split"], "path": clip["path"]}
                row |= {"label": clip["label"], "prediction": self.classes[number]}
                row["probability"] = f"{millionths / 1e6:.6f}"
                rows.append(row)
        return rows

    def tested(self) -> list[dict]:
        """The rows of predictions.csv that test."""
        return [row for row in self.predictions() if row["part"] == "test"]

    def confusion(self) -> np.ndarray:
        """Counts of the test clips, (classes, classes)."""
        return confusion(self.tested(), self.classes)

    def result(self) -> dict:
        """What result.json holds."""
        results = [header["result"] for header in self.folds.values()]
        return {
            **mean_and_std(results),
            "folds": results,
            "parameters": self.first["parameters"],
            "seconds": round(sum(result["seconds"] for result in results), 1),
            "peak_memory_mb": max(result["peak_memory_mb"] or 0 for result in results) or None,
            "versions": self.first["versions"],
            "scores": scores(self.confusion(), self.classes),
            **means_of_logmel(results),
        }


def read_run(folder: Path) -> Run:
    """The run in a folder. UserError if it has no finished fold, or files of another run."""
    missing = [name for name in ("config.json", "split.csv") if not (folder / name).is_file()]
    missing += [] if fold_files(folder) else ["foldK.safetensors"]
    if missing:
        raise UserError(f"{folder} is no finished run of train.py: there is no {missing[0]}")
    config = read_config(folder)
    folds = read_folds(folder)
    compare_settings(folder, config, next(iter(folds.values()))["settings"])
    table = (folder / "split.csv").read_bytes().decode("utf-8", "surrogateescape")
    if hash_of(table) != config["clips"]:
        raise UserError(f"{folder / 'split.csv'} is not that of the run: delete it, and {AGAIN}")
    try:
        rows = list(csv.DictReader(io.StringIO(table, newline="")))
    except csv.Error:  # a cell is too long
        rows = []
    is_whole = all(row.keys() == set(SPLIT) and None not in row.values() for row in rows)
    if not is_whole or not all(answers_fit(header, rows) for header in folds.values()):
        raise UserError(
            f"{folder}: split.csv and the fold files do not fit: delete it, and {AGAIN}"
        )
    return Run(folder, config, rows, folds)


def answers_fit(header: dict, rows: list[dict]) -> bool:
    """Whether a fold file answers its clips in split.csv, some of which test. See `Record`."""
    fold = str(header["result"]["fold"])
    labels = defaultdict(list)
    for row in rows:
        if row["fold"] == fold:
            labels[row["split"]].append(row["label"])
    answered = labels["val"] + labels["test"]
    record = header["record"]
    is_complete = len(answered) == len(record["predictions"]) == len(record["millionths"])
    return is_complete and bool(labels["test"]) and set(answered) <= set(header["classes"])


def write_results(folder):
    """Write the files that are made of the fold files: they are for people. Returns the run."""
    with FileLock(folder / LOCK):  # folds may end at the same time on several machines
        run = read_run(folder)
        write_metrics(folder, run.history())
        rows = run.predictions()
        write_text(folder / "predictions.csv", table_of(rows[0], rows))
        write_text(folder / "confusion.csv", confusion_table(run.confusion(), run.classes))
        write_json(folder / "result.json", run.result())
    return run


def versions():
    python = platform.python_version()
    return {"python": python, "torch": torch.__version__, "numpy": np.__version__}


def means_of_logmel(results):
    """The accuracies of `logmel`, where all folds have them: their means over the folds."""
    names = ("logmel_accuracy", "logmel_balanced_accuracy")
    if not all(name in result for name in names for result in results):
        return {}
    return {name: round(statistics.mean(result[name] for result in results), 4) for name in names}


def mean_and_std(results):
    """Accuracies in percent; their sample standard deviation where there are several."""
    accuracies = [result["accuracy"] for result in results]
    std = round(statistics.stdev(accuracies), 4) if len(accuracies) > 1 else None
    return {"accuracy": round(statistics.mean(accuracies), 4), "std": std}
