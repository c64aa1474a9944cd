"""What makes a run of train.py robust, behind two objects: files, --resume, progress, a forecast, several processes."""

import statistics
import time
from contextlib import contextmanager
from dataclasses import asdict

import torch
from tqdm import tqdm

from support import command, console, ledger, records
from support.calibration import calibrated
from support.checkpoints import read_header
from support.processes import is_first, process_group, say, wait_for_all


@contextmanager
def protected(args, batch_size: int):
    """Processes of torchrun joined, and one line in place of a traceback for what a person can mend."""
    tried = args.micro_batch or args.batch_size or batch_size
    with command.explained(args.device, tried, args.out, args.cache_dir), process_group(args.device):
        yield


class Recorder:
    """The run: one folder for each seed, in it one file for each fold."""

    def __init__(self, args, dataset, machine):
        self.args, self.dataset, self.machine, self.started = args, dataset, machine, time.perf_counter()
        self.folds = command.chosen_folds(args.folds, list(dataset.folds) or [1], args.dataset)
        self.ahead, self.summaries = None, {}

    def describe_clips(self, folds: dict, bad: dict[int, str]) -> str:
        """SHA-256 of split.csv, which this makes."""
        self.bad, self.table = bad, records.split_table(self.dataset, folds, bad)
        return ledger.hash_of(self.table)

    def start(self, settings) -> None:
        """Begin a seed. UserError if its folder holds another experiment."""
        self.settings, self.home = settings, self.args.out / self.args.dataset / settings.method["name"]
        self.folder = self.home / f"seed{settings.seed}"
        if self.ahead is None:
            self.ahead = console.folds_left(self.home, self.args.seed, self.folds)
        records.start_run(self.folder, settings, self.table, self.dataset, self.bad, vars(self.args))
        say(console.describe(settings, settings.n_frames / 100, self.args.device))

    def file(self, fold: int):
        return self.folder / f"fold{fold}.safetensors"

    def progress(self, fold: int) -> "FoldLog":
        self.current, self.ahead = FoldLog(self, fold, self.ahead), 0  # saying how long it takes once is enough
        return self.current

    def header(self, best: dict, logits: torch.Tensor, labels: torch.Tensor) -> dict:
        """What the fold file says of itself."""
        outcome = self.current.outcome(best, logits, labels)
        known = {"classes": self.dataset.classes, "settings": asdict(self.settings), "versions": records.versions()}
        return {**outcome, **known}

    def finish_fold(self, fold: int) -> None:
        """The fold file is there: its state is not needed any more, and its result is printed."""
        if is_first():
            self.file(fold).with_suffix(".resume.pt").unlink(missing_ok=True)
            say(console.describe_fold(read_header(self.file(fold), "result")["result"], self.settings.best))

    def finish(self) -> None:
        """End a seed: result.json and the other files that are made of the fold files."""
        wait_for_all()
        self.summaries[self.settings.seed] = console.summarise(self.folder, self.settings, self.started)

    def results(self) -> dict:
        summaries = self.summaries
        return summaries[self.args.seed[0]] if len(summaries) == 1 else console.summarise_seeds(self.home, summaries)


class FoldLog:
    """The `log` of train.train_fold that writes metrics.csv and the state that --resume goes on from."""

    def __init__(self, run: Recorder, fold: int, ahead: int):
        self.run, self.fold, self.ahead = run, fold, ahead
        self.state_file = run.file(fold).with_suffix(".resume.pt")

    def start(self, learner, split) -> dict | None:
        run, self.learner, self.split = self.run, learner, split
        self.progress, state = records.read_progress(self.state_file, self.fold, run.args.resume)
        device, done = run.machine.device, len(self.progress.history)
        console.forecast(learner.optimizer, self.progress, split, run.settings, device, self.ahead)
        hidden = None if is_first() else True  # None leaves it to tqdm: no bar where the output is no terminal
        self.bar = tqdm(None, f"fold {self.fold}", run.settings.epochs, initial=done, unit="epoch", disable=hidden)
        return state and {**state, "best": self.progress.best, "epoch": done}

    def trained(self, epoch: int, losses: list[float]) -> None:
        self.losses, self.trained_at = losses, time.perf_counter()

    def validated(self, epoch: int, accuracy: float | None, state: dict) -> None:
        progress, losses = self.progress, self.losses
        progress.history.append({
            "fold": self.fold, "epoch": epoch, "step": len(losses) * epoch, "loss": round(statistics.mean(losses), 6),
            "accuracy": "" if accuracy is None else round(accuracy, 4),
            "lr": f"{self.learner.optimizer.param_groups[0]['lr']:.4g}",
            "clips/s": round(len(self.split.train) / (self.trained_at - progress.clock), 1),
        })  # fmt: skip
        progress.best = state["best"]
        progress.tick()
        records.save_progress(self.state_file, progress, state)
        last = progress.history[-1]
        self.bar.set_postfix(loss=last["loss"], accuracy=last["accuracy"], refresh=False)
        self.bar.update()
        if len(progress.history) == self.run.settings.epochs:
            self.bar.close()

    def outcome(self, best: dict, logits: torch.Tensor, labels: torch.Tensor) -> dict:
        """Of the header of the fold file what comes from training and testing it."""
        peak, validation = records.peak_memory(), best["validation"]
        answers = torch.cat([predicted(validation[0]), predicted(logits)]) if len(validation[0]) else predicted(logits)
        right = (logits.argmax(1) == labels).sum().item()
        outcome = {
            "result": {
                "fold": self.fold, "accuracy": 100 * right / len(labels), "validation_accuracy": best["accuracy"],
                "epoch": best["epoch"], "seconds": round(self.progress.seconds, 1),
                "peak_memory_mb": peak and peak >> 20,
            },
            "record": {
                "history": self.progress.history, "predictions": answers[:, 0].int().tolist(),
                "millionths": (1e6 * answers[:, 1].double()).round().int().tolist(),
            },
        }  # fmt: skip
        return calibrated(outcome, validation, (logits, labels))


def predicted(logits: torch.Tensor) -> torch.Tensor:
    """Class and probability of each answer, (clips, 2)."""
    probability = logits.softmax(1).amax(1).nan_to_num()  # float16 may overflow
    return torch.stack([logits.argmax(1), probability], dim=1)
