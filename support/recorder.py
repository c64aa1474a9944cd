"""The objects behind which train.py keeps what makes a run robust.

A `Recorder` is the run: its folders, its files, what is printed. A `FoldLog` is what train_fold
tells of its epochs. It writes the state that --resume goes on from.
"""

import statistics
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from support import command, console, records
from support.calibration import calibrated
from support.processes import process_group, say, wait_for_all
from support.progress import Bar


@contextmanager
def protected(args, batch_size: int):
    """Join the processes of torchrun. What a user can mend becomes one line, no traceback."""
    tried = args.micro_batch or args.batch_size or batch_size
    with (
        command.explained(args.device, tried, args.out, args.cache_dir),
        process_group(args.device),
    ):
        yield


class Recorder:
    """The run: one folder for each seed, in it one file for each fold."""

    def __init__(self, args, dataset, machine):
        self.args = args
        self.dataset = dataset
        self.machine = machine
        self.started = time.perf_counter()
        self.folds = command.chosen_folds(args.folds, list(dataset.folds) or [1], args.dataset)
        self.summaries = {}
        self.to_forecast = None  # folds to train, of all seeds; 0 once the estimate is printed

    def describe_clips(self, folds: dict, bad: dict[int, str]) -> str:
        """The SHA-256 of split.csv, which this makes."""
        self.bad = bad
        self.table = records.split_table(self.dataset, folds, bad)
        return records.hash_of(self.table)

    def start(self, settings) -> None:
        """Begin a seed. UserError if its folder holds another experiment."""
        self.settings = settings
        self.home = self.args.out / self.args.dataset / settings.method["name"]
        self.folder = self.home / f"seed{settings.seed}"
        if self.to_forecast is None:
            self.to_forecast = console.folds_left(self.home, self.args.seed, self.folds)
        names = self.dataset.names
        records.start_run(self.folder, settings, self.table, names, self.bad, vars(self.args))
        say(console.describe(settings, self.args.device))

    def file(self, fold: int) -> Path:
        return self.folder / f"fold{fold}.safetensors"

    def progress(self, fold: int) -> "FoldLog":
        self.current = FoldLog(self, fold)
        return self.current

    def header(self, best: dict, logits: torch.Tensor, labels: torch.Tensor) -> dict:
        """What the fold file says of itself."""
        return {
            **self.current.outcome(best, logits, labels),
            "classes": self.dataset.classes,
            "settings": asdict(self.settings),
            "versions": records.versions(),
        }

    def finish_fold(self, fold: int) -> None:
        """The fold file is there. Print its result, and delete the state to resume from."""
        if self.machine.is_first:
            header = records.read_fold(self.file(fold), fold, records.plain(self.settings))
            self.file(fold).with_suffix(".resume.pt").unlink(missing_ok=True)
            say(console.describe_fold(header["result"], self.settings.choose_by))

    def finish(self) -> None:
        """End a seed: write result.json and the other files that are made of the fold files."""
        wait_for_all()
        if self.machine.is_first:
            run = records.write_results(self.folder)
            seconds = time.perf_counter() - self.started
            say(console.summary(run, seconds))
            self.summaries[self.settings.seed] = run.result()

    def results(self) -> dict:
        """What result.json holds. With several seeds there is another one above their folders."""
        if not self.machine.is_first:
            return {}
        if len(self.summaries) == 1:
            return self.summaries[self.args.seed[0]]
        return console.summarise_seeds(self.home, self.summaries)


class FoldLog:
    """The `log` of train.train_fold, which writes metrics.csv and the state to resume from."""

    def __init__(self, run: Recorder, fold: int):
        self.run = run
        self.fold = fold
        self.state_file = run.file(fold).with_suffix(".resume.pt")

    def start(self, learner, split) -> dict | None:
        run = self.run
        self.learner = learner
        self.split = split
        self.progress, state = records.read_progress(
            self.state_file, self.fold, run.settings, run.args.resume
        )
        done = len(self.progress.history)
        epochs = run.settings.epochs
        self.bar = Bar(desc=f"fold {self.fold}", total=epochs, initial=done, unit="epoch")
        return state

    def trained(self, epoch: int, losses: list[float]) -> None:
        self.losses = losses
        self.trained_at = time.perf_counter()

    def validated(self, epoch: int, accuracy: float | None, state: dict) -> None:
        progress = self.progress
        before = progress.clock
        row = {
            "fold": self.fold,
            "epoch": epoch,
            "step": len(self.losses) * epoch,
            "loss": round(statistics.mean(self.losses), 6),
            "accuracy": "" if accuracy is None else round(accuracy, 4),
            "lr": f"{self.learner.optimizer.param_groups[0]['lr']:.4g}",
            "clips/s": round(len(self.split.train) / (self.trained_at - before), 1),
        }
        progress.history.append(row)
        progress.tick()
        records.save_progress(self.state_file, progress, self.run.settings, state)
        self.forecast(progress.clock - before)
        self.bar.set_postfix(loss=row["loss"], accuracy=row["accuracy"], refresh=False)
        self.bar.update()
        if epoch == self.run.settings.epochs:
            self.bar.close()

    def forecast(self, seconds: float) -> None:
        """Print once how long the run will take. `seconds`: what an epoch took."""
        run = self.run
        folds = run.to_forecast
        run.to_forecast = 0
        epochs = folds * run.settings.epochs - len(self.progress.history)
        lines = console.forecast(seconds * epochs, folds, run.settings, run.machine.device)
        for line in lines:
            with Bar.external_write_mode():  # not into the bar
                say(line)

    def outcome(self, best: dict, logits: torch.Tensor, labels: torch.Tensor) -> dict:
        """What the header of the fold file says of training and testing it."""
        peak = records.peak_memory()
        right = (logits.argmax(1) == labels).sum().item()
        result = {
            "fold": self.fold,
            "accuracy": 100 * right / len(labels),
            "validation_accuracy": best["accuracy"],
            "epoch": best["epoch"],
            "seconds": round(self.progress.seconds, 1),
            "peak_memory_mb": peak and peak >> 20,
        }
        record = {"history": self.progress.history, "predictions": [], "millionths": []}
        for answers, _ in (best["validation"], (logits, labels)):
            probabilities = answers.softmax(1).amax(1).nan_to_num()  # float16 may overflow
            millionths = (1e6 * probabilities.double()).round().int()
            record["predictions"] += answers.argmax(1).tolist()
            record["millionths"] += millionths.tolist()
        outcome = {"result": result, "record": record}
        return calibrated(outcome, best["validation"], (logits, labels))
