"""Finished runs as the tables need them: from their folders, or from one file of a campaign.

    python -m tools.experiments keep experiments results/demo.runs.xz  # writes the file
    python -m tools.experiments show results/demo.runs.xz              # makes every table from it

The file has no tensors, no probabilities and no validation clips. It is compressed JSON, which any
program can read:

    kept = json.load(lzma.open("results/demo.runs.xz"))
    run = kept["runs"]["demo/lora/seed0"]            # settings, parameters, versions, folds
    clips = kept["clips"][run["settings"]["clips"]]  # fold, path and label of each test clip
    fold = run["folds"][0]                           # accuracy, epoch, seconds, ...
    answers = [run["classes"][number] for number in fold["predictions"]]  # of its clips, in order

`packages` and `machine` are those of the machine that wrote the file. The versions of a run are
those that it was trained with. `commands` made the tables. `tuned` is tuned.json.
"""

import json
import lzma
import os
import platform
import re
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct, to_builtins
from msgspec.structs import replace

from support import headers
from support.checkpoints import read_json
from support.command import UserError
from support.files import whole_file, write_json
from support.headers import Count, Text, checked
from support.records import Run, fold_files, read_run

COMMANDS = "commands.json"
TUNED = "tuned.json"


class Fold(headers.Result, kw_only=True):
    """How well a fold answered, and its answers for its test clips: numbers of classes."""

    predictions: list[Count]


class Settings(Struct):
    """What the tables need of the settings of a run."""

    dataset: Text
    clips: Text
    group: Text | None


class Finished(Struct):
    """A run with one finished fold or more."""

    settings: dict[str, Any]  # train.Settings, --group, and in the file no folder of the data
    classes: list[Text]
    parameters: dict[str, Count]
    versions: dict[str, Text]
    folds: list[Fold]
    clips: list[tuple[Count, Text, Text]]  # fold, path and label of the test clips of all folds

    def answers(self) -> list[tuple[int, str, str, str]]:
        """Fold, path, label and answer of the test clips of the finished folds."""
        rows = []
        for fold in self.folds:
            clips = [clip for clip in self.clips if clip[0] == fold.fold]
            for clip, number in zip(clips, fold.predictions, strict=True):
                rows.append((*clip, self.classes[number]))
        return rows


class Kept(Struct):
    """The file of a campaign."""

    machine: dict[str, Any]
    packages: dict[str, Text]
    commands: dict[str, list[Text]]  # of tools.experiments, by the names of tables and figures
    tuned: dict[str, Any]
    clips: dict[str, list[tuple[Count, Text, Text]]]  # Finished.clips by Settings.clips
    runs: dict[str, Finished]  # by their folders; without their clips


def finished(run: Run) -> Finished:
    """What is needed of a run."""
    numbers = {name: number for number, name in enumerate(run.classes)}
    folds = {fold: header["result"] | {"predictions": []} for fold, header in run.folds.items()}
    for row in run.tested():
        folds[row["fold"]]["predictions"].append(numbers[row["prediction"]])
    more = {name: run.config[name] for name in ("group", "data_dir")}
    return Finished(
        settings=run.first["settings"] | more,
        classes=run.classes,
        parameters=run.first["parameters"],
        versions=run.first["versions"],
        folds=[checked(fold, Fold, run.folder) for fold in folds.values()],
        clips=[
            (int(row["fold"]), row["path"], row["label"])
            for row in run.split
            if row["split"] == "test"
        ],
    )


def machine() -> dict[str, Any]:
    """What this machine is."""
    info = Path("/proc/cpuinfo")  # Linux: elsewhere Python may know the processor
    models = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def keep(folder: Path, file: Path) -> int:
    """Write the file of all finished runs in a folder. Returns how many these are.

    UserError if there are none.
    """
    clips = {}
    runs = {}
    for config in sorted(folder.rglob("config.json")):
        if fold_files(config.parent):
            run = finished(read_run(config.parent))
            clips[run.settings["clips"]] = run.clips
            settings = {name: x for name, x in run.settings.items() if name != "data_dir"}
            name = config.parent.relative_to(folder).as_posix()
            runs[name] = replace(run, settings=settings, clips=[])
    if not runs:
        raise UserError(f"{folder}: there is no finished run in it")
    kept = Kept(
        machine=machine(),
        packages=dict(sorted((str(one.name), str(one.version)) for one in distributions())),
        commands=read_table(folder / COMMANDS),
        tuned=read_table(folder / TUNED),
        clips=clips,
        runs=runs,
    )
    text = json.dumps(to_builtins(kept), separators=(",", ":"))
    with whole_file(file) as temporary:
        temporary.write_bytes(lzma.compress(text.encode()))
    return len(runs)


def read_kept(file: Path) -> Kept:
    """What `keep` wrote. UserError if the file is damaged, or another."""
    try:
        content = json.loads(lzma.decompress(file.read_bytes()))
    except (OSError, ValueError, RecursionError, lzma.LZMAError) as error:
        raise UserError(f"cannot read {file} ({error}): `keep` writes such files") from None
    kept = checked(content, Kept, file)
    for name, run in kept.runs.items():
        checked(run.settings, Settings, f"{file}, {name}")
        clips = kept.clips.get(run.settings.get("clips"), [])
        kept.runs[name] = replace(run, clips=clips)
        try:
            kept.runs[name].answers()
        except (ValueError, IndexError):
            raise UserError(f"{file}: the clips and answers of {name} do not fit") from None
    return kept


def read_table(file: Path) -> dict[str, Any]:
    """A table in JSON, or an empty one if the file is not there."""
    return read_json(file, dict[str, Any], "delete it") if file.exists() else {}


def remember(folder: Path, name: str, words: list[str]) -> None:
    """Write down the command that made a table or figure."""
    write_json(folder / COMMANDS, read_table(folder / COMMANDS) | {name: words})
