"""What a run leaves on disk, but for the tensors.

At its start config.json and split.csv, after every epoch metrics.csv and foldK.resume.pt, at its end predictions.csv,
confusion.csv and result.json. These, and metrics.csv for a finished fold, are made from the fold files, at any time
again.
"""

import csv
import ctypes
import gc
import io
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from msgspec import to_builtins

from support import ledger
from support.checkpoints import read_header, read_json, remedy, sha256_of, unpickled
from support.command import UserError, first_of, is_number, warn
from support.files import csv_of, json_of, table_of, whole_file
from support.headers import ResumeState, RunConfig, RunResult, Settings, checked
from support.processes import is_first, say
from support.scores import confusion, confusion_table, scores

SOURCE = ("data_dir", "cache_dir", "group", "windows")  # options of train.py: where and how the clips are found
INPUTS = ("config.json", "split.csv")  # what no fold file holds
METRICS = ("fold", "epoch", "step", "loss", "accuracy", "lr", "clips/s")  # the columns of metrics.csv
PREDICTIONS = ("fold", "part", "path", "label", "prediction", "probability")  # and of predictions.csv

# ----------------------------------------------------------------------------------------------- the start of a run


def split_table(dataset, folds: dict, bad: dict[int, str]) -> str:
    """split.csv: what each clip is used for in each fold. Training clips that --shots has not drawn are left out."""
    rows, names = [["fold", "split", "label", "path"]], dataset.names
    for fold, split in folds.items():
        for part, clips in {**vars(split), "skipped": sorted(bad)}.items():
            rows += [[fold, part, dataset.classes[dataset.labels[i]], names[i]] for i in clips]
    return csv_of(rows)


def start_run(folder: Path, settings: Settings, table: str, dataset, bad: dict[int, str], options: dict) -> None:
    """Write config.json and split.csv; `options`: those of train.py, of which SOURCE are kept.

    UserError if `folder` holds another experiment: its finished folds must not be mixed with these.
    """
    check(folder)
    names = dataset.names
    source = {name: options[name] for name in SOURCE}
    places = {name: str(path.resolve()) for name, path in source.items() if isinstance(path, Path)}
    config = {
        **asdict(settings), "command": sys.argv, "skipped_clips": {names[i]: reason for i, reason in bad.items()},
        **source, **places,
    }  # fmt: skip
    with ledger.lock(folder):  # of two experiments that start together the second one sees what the first one is
        for old in settings_in(folder):
            # `weights` is a name; `backbone` is what counts.
            compare_settings(folder, old, {k: value for k, value in asdict(settings).items() if k != "weights"})
        if is_first():
            ledger.write_files(folder, {"config.json": json_of(config), "split.csv": table})
            for file in fold_files(folder).values():  # a kill may have left the state of a fold that is finished
                file.with_suffix(".resume.pt").unlink(missing_ok=True)
            if source["data_dir"]:
                warn_of_newer(folder, dataset, bad)


def warn_of_newer(folder: Path, dataset, bad: dict[int, str]) -> None:
    """Say which finished folds have not heard the sounds as they are now: they are not trained again."""
    files = fold_files(folder).values()
    times = {i: path.stat().st_mtime for i, path in enumerate(dataset.paths) if i not in bad} if files else {}
    for file in files:
        if newer := [dataset.names[i] for i, time in times.items() if time > file.stat().st_mtime]:
            warn(f"{file} is older than {len(newer)} of the sounds ({first_of(newer)}): delete it to train on these, "
                 "or give another --out")  # fmt: skip


def settings_in(folder: Path) -> list[dict]:
    """The settings of the run there: those of config.json, or where that is missing those of the finished folds."""
    file = folder / "config.json"
    if file.exists():
        return [to_builtins(read_json(file, RunConfig, mend="delete the folder, or give another --out"))]
    if states := [*folder.glob("fold*.resume.pt")]:
        raise UserError(f"{states[0]}: nothing says of which settings it is, as config.json is missing: delete it")
    return [read_header(file, "settings")["settings"] for file in fold_files(folder).values()]


def fold_files(folder: Path) -> dict[int, Path]:
    """Those of the finished folds, by their numbers."""
    files = {file.stem.removeprefix("fold"): file for file in folder.glob("fold*.safetensors")}
    return {int(number): files[number] for number in sorted(filter(is_number, files), key=int)}


def compare_settings(folder: Path, old: dict, new: dict) -> None:
    """UserError that names the first of the `new` settings that differs from the `old` ones, those of the run there."""
    in_words = {
        "clips": "other clips or splits", "method": "other settings of the method",
        "n_frames": f"--seconds {old.get('n_frames', 0) / 100:g}, not {new['n_frames'] / 100:g}",
        "backbone": f"the backbone {old.get('weights')} as it was then ({remedy(old.get('backbone'))})",
    }  # fmt: skip
    later = {field.name: field.default for field in fields(Settings)}  # what the runs before a field had
    for name, value in json.loads(json.dumps(new)).items():  # JSON has no tuples
        before = old.get(name, later.get(name))
        if before != value:
            what = in_words.get(name, f"{name} {before}, not {value}")
            raise UserError(f"{folder} holds a run with {what}: give another --out, or delete it")


# ---------------------------------------------------------------------------------------------------- epoch by epoch


@dataclass
class Progress:
    """What is known of a fold after its last finished epoch. Its clock runs from the start."""

    fold: int
    history: list[dict] = field(default_factory=list)  # the rows of metrics.csv
    best: dict = field(default_factory=dict)  # see train.train_fold
    seconds: float = 0.0
    clock: float = field(default_factory=time.perf_counter)  # when it was last read

    def tick(self) -> None:
        """Add what has passed since the clock was last read."""
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now


def save_progress(file: Path, progress: Progress, state: dict) -> None:
    """metrics.csv, and in `file` the state that --resume goes on from."""
    if is_first():
        write_metrics(file.parent, progress.fold, progress.history)
        known = {"history": progress.history, "best": progress.best, "seconds": progress.seconds}
        state = {**state, **known}  # `best` may be in both
        buffer = io.BytesIO()  # torch would call a full disk something else
        torch.save({**state, "digest": sha256_of(state)}, buffer)
        with whole_file(file) as temporary:
            temporary.write_bytes(buffer.getbuffer())


def read_progress(file: Path, fold: int, resume: bool) -> tuple[Progress, dict | None]:
    """What `save_progress` left of an interrupted fold, if it is to be resumed; else a fresh start and None."""
    if not file.exists():
        return Progress(fold), None
    if not resume:
        say(f"fold {fold}: was interrupted and starts over; --resume would go on where it was")
        return Progress(fold), None
    try:
        state = unpickled(file)
        checked(state, ResumeState, file)
        if state.pop("digest") != sha256_of(state):
            raise ValueError
    except (OSError, ValueError, UserError):
        raise UserError(f"{file} is damaged: delete it, and the fold starts over") from None
    progress = Progress(fold, *(state.pop(name) for name in ("history", "best", "seconds")))
    say(f"fold {fold}: going on after epoch {len(progress.history)}")
    return progress, state


def write_metrics(folder: Path, fold: int, history: list[dict]) -> None:
    """Put the epochs of one fold into metrics.csv, beside those of the others: folds may run in parallel."""
    with ledger.lock(folder):
        rows = [row for row in read_metrics(folder) if row["fold"] != fold]
        ledger.write_files(folder, {"metrics.csv": metrics_of(rows + history)})


def metrics_of(rows: list[dict]) -> str:
    return table_of(METRICS, sorted(rows, key=lambda row: (row["fold"], row["epoch"])))


def read_metrics(folder: Path) -> list[dict]:
    """The rows of metrics.csv. If it is damaged, those that the files of the finished folds hold."""
    path = folder / "metrics.csv"
    try:
        if path.name in ledger.wrong(folder):
            raise ValueError
        if not path.exists():
            return []
        reader = csv.DictReader(path.read_text().splitlines())
        rows = list(reader)
        if reader.fieldnames != [*METRICS] or any(None in row or None in row.values() for row in rows):
            raise ValueError
        return [{**row, "fold": int(row["fold"]), "epoch": int(row["epoch"])} for row in rows]
    except UserError:
        raise
    except (ValueError, csv.Error):
        warn(f"{path} is damaged or missing: it is made again from the fold files")
        records = [read_header(file).get("record", {}) for file in fold_files(folder).values()]
        return [row for record in records for row in record.get("history", [])]


def peak_memory() -> int | None:
    """Most bytes that this process has taken: on the GPU where one is used, else in main memory. None on Windows."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if platform.system() == "Windows":
        return None
    import resource  # not there on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak << 10  # bytes there, KiB on Linux


def forget_peak() -> bool:
    """From now on `peak_memory` is that from now on. False where the system cannot forget it: Linux can."""
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


# ------------------------------------------------------------------------------------------------- made of fold files


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def mean_and_std(results: list[dict]) -> dict:
    """Accuracies in percent, with their sample standard deviation where there are several."""
    accuracies = [result["accuracy"] for result in results]
    std = round(statistics.stdev(accuracies), 4) if len(accuracies) > 1 else None
    return {"accuracy": round(statistics.mean(accuracies), 4), "std": std}


def write_results(folder: Path) -> tuple[dict, list[dict]]:
    """Write metrics.csv, predictions.csv, confusion.csv and result.json from the files of the finished folds. Returns
    the last one and the rows of predictions.csv that test.

    The caller holds the lock. UserError if a fold file is damaged, or split.csv not that of the fold.
    """
    files = fold_files(folder)
    headers = {fold: read_header(file, "result", "parameters", "versions") for fold, file in files.items()}
    new = {fold: header["record"]["history"] for fold, header in headers.items() if "record" in header}
    epochs = [row for row in read_metrics(folder) if row["fold"] not in new]
    epochs += [row for history in new.values() for row in history]
    predictions = predictions_of(folder, {fold: headers[fold] for fold in new})
    tested = [row for row in predictions if row["part"] == "test"]
    contents = {"metrics.csv": metrics_of(epochs), "predictions.csv": table_of(PREDICTIONS, predictions)}
    if old := [fold for fold in files if fold not in new]:
        warn(f"{folder}: of an earlier version, without predictions: fold {', '.join(map(str, old))}")
    if results := [header["result"] for header in headers.values()]:
        first = headers[results[0]["fold"]]
        summary = {
            **mean_and_std(results), "folds": results, "parameters": first["parameters"],
            "seconds": round(sum(result["seconds"] for result in results), 1),
            "peak_memory_mb": max(result["peak_memory_mb"] or 0 for result in results) or None,
            "versions": first["versions"],
        }  # fmt: skip
        if tested:
            classes = headers[min(new)]["classes"]
            counts = confusion(tested, classes)
            contents["confusion.csv"] = confusion_table(counts, classes)
            summary["scores"] = scores(counts, classes)
        contents["result.json"] = json_of(summary)
    ledger.write_files(folder, contents)
    return (summary if results else {}), tested


def predictions_of(folder: Path, headers: dict[int, dict]) -> list[dict]:
    """The rows of predictions.csv for these folds."""
    split, rows = (folder / "split.csv").read_bytes(), []
    clips = list(csv.DictReader(io.StringIO(split.decode("utf-8", "surrogateescape"), newline="")))
    for fold, header in headers.items():
        if header["settings"]["clips"] != ledger.hash_of(split):
            raise UserError(f"{folder / 'split.csv'} is not what fold {fold} was trained on: delete it, and the same "
                            "command of train.py writes it again")  # fmt: skip
        ours = [clip for clip in clips if clip["fold"] == str(fold) and clip["split"] in ("val", "test")]
        record, classes = header["record"], header["classes"]
        ours = ours[-len(record["predictions"]) :]  # those that test, where an earlier version has begun the fold
        rows += [
            {"fold": fold, "part": clip["split"], "path": clip["path"], "label": clip["label"],
             "prediction": classes[number], "probability": f"{millionths / 1e6:.6f}"}
            for clip, number, millionths in zip(ours, record["predictions"], record["millionths"], strict=True)
        ]  # fmt: skip
    return rows


# ----------------------------------------------------------------------------------------------------------- damage


def damaged(folder: Path) -> list[str]:
    """The files of a run that are missing or not what was written; in one of an earlier version as far as it shows."""
    wrong, result = ledger.wrong(folder), folder / "result.json"
    try:
        if result.exists() and result.name not in wrong:
            read_json(result, RunResult)
        return wrong
    except UserError:
        return [*wrong, result.name]


def check(folder: Path) -> list[str]:
    """Say which files of a run are damaged or missing and made again from the fold files; returns their names.

    UserError for config.json and split.csv. `read_metrics` says it of metrics.csv.
    """
    if not damaged(folder):
        return []
    with ledger.lock(folder):  # now nobody is between writing a file and listing it
        wrong = damaged(folder)
    for name in wrong:
        path = folder / name
        if name in INPUTS:
            again = "the same command of train.py writes it again"
            if path.exists():
                raise UserError(f"{path} is damaged, SHA256SUMS lists another: delete it, and {again}")
            if is_first():
                warn(f"{path} is missing: {again}")
        elif name != "metrics.csv" and is_first():
            warn(f"{path} is {'damaged' if path.exists() else 'missing'}: it is made again from the fold files")
    return [name for name in wrong if name not in INPUTS]


def mend(folder: Path) -> None:
    """Make again what is damaged or missing of a run. UserError for config.json and split.csv."""
    if check(folder) and (folder / "split.csv").exists():
        with ledger.lock(folder):
            write_results(folder)
