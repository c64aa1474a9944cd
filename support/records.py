"""What a run leaves on disk: config.json, split.csv, metrics.csv, foldK.resume.pt, result.json; and what it prints."""

import csv
import ctypes
import gc
import hashlib
import io
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from msgspec import to_builtins
from tqdm import tqdm

from support.checkpoints import read_header, read_json, sha256_of, unpickled
from support.command import UserError, warn
from support.files import whole_file, write_json, write_text
from support.headers import ResumeState, RunConfig, Settings, checked
from support.processes import is_first, say

# ----------------------------------------------------------------------------------------------- the start of a run


def split_table(dataset, folds: dict, bad: dict[int, str]) -> str:
    """split.csv: what each clip is used for in each fold. Training clips that --shots has not drawn are left out."""
    text, names = io.StringIO(), dataset.names()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["fold", "split", "label", "path"])
    for fold, split in folds.items():
        parts = {**asdict(split), "skipped": sorted(bad)}
        for part, clips in parts.items():
            writer.writerows([fold, part, dataset.classes[dataset.labels[i]], names[i]] for i in clips)
    return text.getvalue()


def hash_of(table: str) -> str:
    return hashlib.sha256(os.fsencode(table)).hexdigest()


def start_run(
    folder: Path, settings: Settings, table: str, dataset, bad: dict[int, str], data_dir: Path | None, cache_dir: Path
) -> None:
    """Write config.json and split.csv. UserError if `folder` holds another experiment: its finished folds must not be
    mixed with these."""
    file = folder / "config.json"
    if file.exists():
        old = to_builtins(read_json(file, RunConfig, mend="delete the folder, or give another --out"))
        # `weights` is a name; `backbone` is what counts.
        compare_settings(folder, old, {k: value for k, value in asdict(settings).items() if k != "weights"})
    if is_first():
        names = dataset.names()
        write_json(file, {
            **asdict(settings), "command": sys.argv, "skipped_clips": {names[i]: reason for i, reason in bad.items()},
            "data_dir": data_dir and str(data_dir.resolve()), "cache_dir": str(cache_dir.resolve()),
        })  # fmt: skip
        write_text(folder / "split.csv", table)


def compare_settings(folder: Path, old: dict, new: dict) -> None:
    """UserError that names the first of the `new` settings that differs from the `old` ones, those of the run there."""
    in_words = {
        "clips": "other clips or splits", "method": "other settings of the method",
        "backbone": f"the backbone {old.get('weights')} as it was then",
    }  # fmt: skip
    later = {field.name: field.default for field in fields(Settings)}  # what the runs before a field had
    for name, value in json.loads(json.dumps(new)).items():  # JSON has no tuples
        before = old.get(name, later.get(name))
        if before != value:
            what = in_words.get(name, f"{name} {before}, not {value}")
            raise UserError(f"{folder} holds a run with {what}: give another --out, or delete it")


def describe(settings: Settings, seconds: float, device: torch.device) -> str:
    """What is about to be trained, on clips that last `seconds`."""
    shots = f"{settings.shots} clips per class, " if settings.shots else ""
    masked = "masked" if settings.mask else "unmasked"
    masked += f", {settings.keep:.0%} of the patches" if settings.keep else ""
    line = (
        f"{settings.method['name']} on {settings.dataset}: {shots}{seconds:g} s a clip, {settings.epochs} epochs, "
        f"batch {settings.batch_size}, learning rate {settings.lr:g}, {masked}, weights {settings.weights}, seed "
        f"{settings.seed}, {settings.dtype}, {device}"
    )
    probe = "linear probe: each clip goes through the backbone once, the epochs train on what is kept of it"
    if settings.mask:
        probe = ("linear probe, masked: every epoch masks the clips anew, so each goes through the backbone in every "
                 "epoch; with --no-mask it does so once")  # fmt: skip
    probing = {part["part"] for part in settings.method["parts"]} <= {"Statistics"}  # or nothing at all
    return f"{line}\n{probe}" if probing else line


# ---------------------------------------------------------------------------------------------------- epoch by epoch


@dataclass
class Progress:
    """What is known of a fold after its last finished epoch. Its clock runs from the start."""

    fold: int
    history: list[dict] = field(default_factory=list)  # the rows of metrics.csv
    best: dict = field(default_factory=lambda: {"accuracy": -1.0, "epoch": 0, "tensors": {}})
    seconds: float = 0.0
    clock: float = field(default_factory=time.perf_counter)  # when it was last read
    begin: float = 0.0  # of the present epoch

    def trained(self, losses: list[float], rates: list[float], clips: int) -> None:
        """The steps of one more epoch, on so many clips. UserError if a loss is not finite."""
        epoch, steps = len(self.history) + 1, len(rates)
        for i, (loss, lr) in enumerate(zip(losses, rates, strict=True), start=1):
            if not math.isfinite(loss):
                where = f"fold {self.fold}, epoch {epoch}, step {i} of {steps}, learning rate {lr:.2g}"
                raise UserError(f"the loss is {loss} in {where}: choose a smaller --lr, or --dtype float32")
        self.history.append({
            "fold": self.fold, "epoch": epoch, "step": steps * epoch, "loss": round(statistics.mean(losses), 6),
            "accuracy": "", "lr": f"{rates[-1]:.4g}", "clips/s": round(clips / (time.perf_counter() - self.begin), 1),
        })  # fmt: skip

    def validated(self, accuracy: float | None, tensors: dict[str, torch.Tensor]) -> None:
        """The end of the epoch. The best has the highest accuracy, the first of equals; without validation clips
        (None) it is the last."""
        if accuracy is None or accuracy > self.best["accuracy"]:
            self.best = {"accuracy": accuracy, "epoch": len(self.history), "tensors": tensors}
        if accuracy is not None:
            self.history[-1]["accuracy"] = round(accuracy, 4)
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def result(self, accuracy: float) -> dict:
        """What result.json says of the fold, `accuracy` being that on the test clips."""
        peak = peak_memory()
        return {
            "fold": self.fold, "accuracy": accuracy, "validation_accuracy": self.best["accuracy"],
            "epoch": self.best["epoch"], "seconds": round(self.seconds, 1), "peak_memory_mb": peak and peak >> 20,
        }  # fmt: skip


def epochs_left(progress: Progress, epochs: int) -> Iterator[int]:
    """The epochs still to train, with a progress bar that shows the last loss and accuracy."""
    done = len(progress.history)
    hidden = None if is_first() else True  # None leaves it to tqdm: no bar where the output is no terminal
    numbers = range(done + 1, epochs + 1)
    bar = tqdm(numbers, f"fold {progress.fold}", epochs, initial=done, unit="epoch", disable=hidden)
    for epoch in bar:
        progress.begin = time.perf_counter()
        yield epoch
        bar.set_postfix(loss=progress.history[-1]["loss"], accuracy=progress.history[-1]["accuracy"])


def folds_left(folder: Path, seeds: Iterable[int], folds: Iterable[int]) -> int:
    """How many folds of these seeds have no file yet, `folder` being that above the seeds' own."""
    return sum(not (folder / f"seed{seed}" / f"fold{fold}.safetensors").exists() for seed in seeds for fold in folds)


def now(device: torch.device) -> float:
    """Seconds, once the device has done all it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def forecast(learner, progress: Progress, split, settings: Settings, machine) -> None:
    """Say after the third step of a fold how long the `machine.forecast` folds will take of which it is the first.

    The steps after the first one are timed, which is slower than the others. The clock is read twice, and only then is
    the device waited for. Nothing is said where it is less than a minute.
    """
    if machine.forecast == 0 or not is_first():
        return
    batch, done = settings.batch_size, 0
    last = min(3, math.ceil(len(split.train) / batch))
    first = min(1, last - 1)  # an epoch of one step is timed from here on
    start = now(machine.device)

    def after_step(*_):
        nonlocal start, done
        done += 1
        if done == first:
            start = now(machine.device)
        elif done == last:
            clips = min(last * batch, len(split.train)) - first * batch
            seconds = (now(machine.device) - start) / clips * clips_left(progress, split, settings, machine.forecast)
            with tqdm.external_write_mode():  # not into the progress bar
                for line in forecast_lines(seconds, machine.forecast, settings, machine.device):
                    say(line)

    learner.optimizer.register_step_post_hook(after_step)


def clips_left(progress: Progress, split, settings: Settings, folds: int) -> float:
    """Clips still to train in `folds` folds like this one; one to validate or test counts half, as it takes half."""
    epoch, test = len(split.train) + len(split.val) / 2, len(split.test) / 2
    return folds * (settings.epochs * epoch + test) - len(progress.history) * epoch


def forecast_lines(seconds: float, folds: int, settings: Settings, device: torch.device) -> list[str]:
    """What a person should know of a run that takes so long; nothing of a short one."""
    if seconds < 60:
        return []
    lines = [f"this will take about {in_words(seconds)}{f', {folds} folds' if folds > 1 else ''}"]
    if device.type == "cpu" and seconds > 600:
        ways = {"--shots 8": not settings.shots, "--folds 1": folds > 1, "fewer --epochs": settings.epochs > 5}
        ways = [way for way, helps in ways.items() if helps]
        lines.append(f"on a CPU; what makes it bearable: {', '.join([*ways, 'a GPU'])}")
    return lines


def in_words(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            number = seconds / length
            return f"{number:.{1 if number < 10 else 0}f} {unit}"
    return f"{seconds:.0f} s"


def save_progress(file: Path, progress: Progress, state: dict) -> None:
    """metrics.csv, and in `file` the state that --resume goes on from."""
    if is_first():
        write_metrics(file.parent / "metrics.csv", progress.fold, progress.history)
        known = {"history": progress.history, "best": progress.best, "seconds": progress.seconds}
        state = {**state, **known}
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
        digest = state.pop("digest", None)
        if digest is not None and digest != sha256_of(state):
            raise ValueError
    except (OSError, ValueError, UserError):
        raise UserError(f"{file} is damaged: delete it, and the fold starts over") from None
    progress = Progress(fold, *(state.pop(name) for name in ("history", "best", "seconds")))
    say(f"fold {fold}: going on after epoch {len(progress.history)}")
    return progress, state


def write_metrics(path: Path, fold: int, history: list[dict]) -> None:
    """Put the epochs of one fold into metrics.csv, beside those of the others: folds may run in parallel."""
    with FileLock(path.with_name(".metrics.lock")):
        try:
            rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
            rows = [row for row in rows if int(row["fold"]) != fold and None not in {*row, *row.values()}] + history
            rows.sort(key=lambda row: (int(row["fold"]), int(row["epoch"])))
            if any(row.keys() != history[0].keys() for row in rows):
                raise ValueError
        except (ValueError, KeyError, TypeError, csv.Error):
            warn(f"{path} is damaged: it is written anew, without the epochs of other folds")
            rows = history
        with whole_file(path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, history[0])
            writer.writeheader()
            writer.writerows(rows)


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


# --------------------------------------------------------------------------------------------------------- the results


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def describe_fold(result: dict) -> str:
    best = result["validation_accuracy"]
    chosen = "last epoch" if best is None else f"best of validation {best:.2f} % in epoch {result['epoch']}"
    return f"fold {result['fold']}: test accuracy {result['accuracy']:.2f} % ({chosen}), {result['seconds']:.0f} s"


def mean_and_std(results: list[dict]) -> dict:
    """Accuracies in percent, with their sample standard deviation where there are several."""
    accuracies = [result["accuracy"] for result in results]
    std = round(statistics.stdev(accuracies), 4) if len(accuracies) > 1 else None
    return {"accuracy": round(statistics.mean(accuracies), 4), "std": std}


def summarise(folder: Path, folds: Iterable[int], settings: Settings, started: float) -> dict:
    """Collect the finished ones of a run's folds into result.json, and print what a person wants to know at its end.

    `started`: when the command began, on the performance counter.
    """
    if not is_first():
        return {}
    with FileLock(folder / ".result.lock"):  # folds may end at the same time on several machines
        files = [folder / f"fold{fold}.safetensors" for fold in folds]
        headers = [read_header(file, "result", "parameters", "versions") for file in files if file.exists()]
        results = [header["result"] for header in headers]
        summary = {
            **mean_and_std(results), "folds": results, "parameters": headers[0]["parameters"],
            "seconds": round(sum(result["seconds"] for result in results), 1),
            "peak_memory_mb": max(result["peak_memory_mb"] or 0 for result in results) or None,
            "versions": headers[0]["versions"],
        }  # fmt: skip
        write_json(folder / "result.json", summary)
    name, count, n = settings.method["name"], summary["parameters"], len(results)
    trained = count["petl"] + count["head"]
    spread = "" if summary["std"] is None else f" +- {summary['std']:.2f}"
    file = folder / f"fold{results[0]['fold']}.safetensors"
    baseline = "houlsby_par" if name == "linear" else "linear"  # the comparison that says what a method adds
    say(
        f"\n  test accuracy   {summary['accuracy']:.2f}{spread} %{f' over {n} folds' if n > 1 else ''}"
        f"\n  trained         {trained:,} of {count['total']:,} parameters ({100 * trained / count['total']:.2f} %): "
        f"{count['petl']:,} of {name}, {count['head']:,} of final LayerNorm and head"
        f"\n  file            {file}, {file.stat().st_size / 1000:,.0f} kB: all that has to be kept beside the backbone"
        f"\n  time            {summary['seconds']:.0f} s of training, {time.perf_counter() - started:.0f} s in all"
        f"\n  to use it       python -m tools.predict {folder} SOUND.wav"
        f"\n  to compare      the same command with --method {baseline}\n"
    )
    return summary


def summarise_seeds(folder: Path, results: dict[int, dict]) -> dict:
    """Mean and standard deviation over all folds of all seeds, into the result.json above their folders."""
    if not is_first():
        return {}
    folds = [{"seed": seed, **fold} for seed, result in results.items() for fold in result["folds"]]
    seeds = {seed: result["accuracy"] for seed, result in results.items()}
    result = {**mean_and_std(folds), "seeds": seeds, "folds": folds}
    write_json(folder / "result.json", result)
    say(f"accuracy {result['accuracy']:.2f} +- {result['std']:.2f} % over {len(results)} seeds, {len(folds)} runs in "
        f"all; written to {folder}")  # fmt: skip
    return result
