"""The objects behind which train.py keeps what makes a run robust.

A `Recorder` is the run: its folders, its files, what is printed. A `FoldLog` is what train_fold
tells of its epochs. It writes the state that --resume goes on from.
"""

import math
import statistics
import time
from contextlib import contextmanager
from dataclasses import asdict

import torch

from ast_model import UserError
from support import command, console, records
from support.calibration import calibrated, middles_of
from support.copies import warn_of_copies
from support.processes import process_group, say, say_lines, wait_for_all
from support.progress import Bar, in_words
from support.speed import bfloat16_helps
from support.variants import has


@contextmanager
def protected(args, batch_size):
    """Join the processes of torchrun. What the machine has too little of becomes a UserError."""
    try:
        with process_group(args.device):
            yield
    except (RuntimeError, MemoryError) as error:
        if not command.out_of_memory(error):
            raise
        tried = args.micro_batch or args.batch_size or batch_size
        raise UserError(
            f"out of memory on {args.device}: choose a --micro-batch smaller than {tried}"
        ) from None
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        reason = command.reason_of(error, args.out, mend=", then add --resume to go on")
        hint = command.no_place(error, {"--out": args.out, "--cache-dir": args.cache_dir})
        raise UserError(reason + hint) from None
    except KeyboardInterrupt:
        hint = "interrupted: the same command with --resume goes on after the last finished epoch"
        raise KeyboardInterrupt(hint) from None


class Recorder:
    """The run: one folder for each seed, in it one file for each fold."""

    def __init__(self, args, dataset, machine):
        self.args = args
        self.dataset = dataset
        self.machine = machine
        self.folds = command.chosen_folds(args.folds, list(dataset.folds) or [1], args.dataset)
        self.home = args.out / args.dataset / args.method
        self.to_forecast = 0  # folds to train, of all seeds; 0 again once the estimate is printed
        for seed in args.seed:
            for fold in self.folds:
                file = self.home / f"seed{seed}" / f"fold{fold}.safetensors"
                self.to_forecast += not file.exists()
        self.summaries = {}
        records.check_folds(dataset)

    def describe_clips(self, folds, bad):
        """The SHA-256 of split.csv, which this makes."""
        records.tell_of_gaps(self.dataset, folds)
        for fold, split in folds.items():
            groups = console.describe_groups(self.dataset, split)
            if groups:
                say(f"fold {fold}: {groups}" if len(folds) > 1 else groups)
        self.bad = bad
        self.table = records.split_table(self.dataset, folds, bad)
        return records.hash_of(self.table)

    def warn_of_copies(self, folds, features):
        """Warn of sounds that are in two parts of a fold. The clips have these `features`."""
        if self.machine.is_first:
            warn_of_copies(self.dataset, features, folds)

    def start(self, settings):
        """Begin a seed. UserError if its folder holds another experiment."""
        self.settings = settings
        self.folder = self.home / f"seed{settings.seed}"
        names = self.dataset.names
        options = vars(self.args)
        self.rows = records.start_run(self.folder, settings, self.table, names, self.bad, options)
        say_lines(console.describe(settings, self.args.device))

    def file(self, fold):
        return self.folder / f"fold{fold}.safetensors"

    def progress(self, fold):
        self.current = FoldLog(self, fold)
        return self.current

    def middles(self, model, clips, split):
        """What the network makes of clips half-way: it tells how sure answers are.

        First of the validation clips, and then of the test clips.
        """
        return [
            middles_of(model, clips, indices, self.settings, self.machine)
            for indices in (split.val, split.test)
        ]

    def header(self, best, middles, logits, labels, baseline):
        """What the fold file says of itself.

        `middles` are those of `self.middles`. `baseline` are scores of logmel, or nothing.
        """
        progress = self.current.progress
        self.rows += progress.history
        peak = records.peak_memory()
        right = (logits.argmax(1) == labels).sum().item()
        result = {
            "fold": progress.fold,
            "accuracy": 100 * right / len(labels),
            "validation_accuracy": best["accuracy"],
            "epoch": best["epoch"],
            "seconds": round(progress.seconds, 1),
            "peak_memory_mb": peak and peak >> 20,
            **baseline,
        }
        record = {"history": progress.history, "predictions": [], "millionths": []}
        validation = best["validation"]
        for some in (validation[0], logits):
            for name, answers in answers_of(some).items():
                record[name] += answers
        header = {
            "result": result,
            "record": record,
            "classes": self.dataset.classes,
            "settings": asdict(self.settings),
            "versions": records.versions(),
        }
        groups = []
        if self.dataset.groups:
            groups = [self.dataset.groups[i] for i in self.current.split.val]
        return calibrated(header, (*validation, middles[0], groups), (logits, labels, middles[1]))

    def finish_fold(self, fold):
        """The fold file is there. Print its result, and delete the state to resume from."""
        if self.machine.is_first:
            header = records.read_fold(self.file(fold), fold, records.plain(self.settings))
            self.file(fold).with_suffix(".resume.pt").unlink(missing_ok=True)
            say(console.describe_fold(header["result"], self.settings))

    def finish(self):
        """End a seed: write result.json and the other files that are made of the fold files."""
        wait_for_all()
        if self.machine.is_first:
            run = records.write_results(self.folder)
            say_lines(console.summary(run, self.dataset, self.machine.device.type))
            self.summaries[self.settings.seed] = run.result()

    def results(self):
        """What result.json holds. With several seeds there is another one above their folders."""
        if not self.machine.is_first:
            return {}
        if len(self.summaries) == 1:
            return self.summaries[self.args.seed[0]]
        return console.summarise_seeds(self.home, self.summaries)


def now(device):
    """Seconds, once the device has done all that it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def answers_of(logits):
    """The classes that logits (clips, classes) answer, and their probabilities in millionths."""
    probabilities = logits.softmax(1).amax(1).nan_to_num()  # float16 may overflow
    millionths = (1e6 * probabilities.double()).round().int()
    return {"predictions": logits.argmax(1).tolist(), "millionths": millionths.tolist()}


class FoldLog:
    """The train.Progress that shows a bar, and writes metrics.csv and the state to resume from."""

    def __init__(self, run, fold):
        self.run = run
        self.fold = fold
        self.state_file = run.file(fold).with_suffix(".resume.pt")

    def start(self, learner, split):
        run = self.run
        self.learner = learner
        self.split = split
        self.progress, state = records.read_progress(
            self.state_file, self.fold, run.settings, run.args.resume
        )
        done = len(self.progress.history)
        # A fitted method has no steps, so the bar counts its penalties.
        self.is_fitted = has(learner.network.method, "is_fitted")
        steps = 1 if self.is_fitted else math.ceil(len(split.train) / run.settings.batch_size)
        unit = "penalty" if self.is_fitted else "step"
        total = steps * run.settings.epochs
        self.bar = Bar(desc=f"fold {self.fold}", total=total, initial=steps * done, unit=unit)
        return state

    def watch(self, batches):
        """Yield the batches of an epoch and move the bar. The estimate comes after four steps.

        The first step is not timed, because it is slower than the others.
        """
        device = self.run.machine.device
        last = min(3, len(batches) - 1)
        started = 0.0
        for step, batch in enumerate(batches):
            yield batch
            self.bar.update()
            if self.run.to_forecast and step == 0:
                started = now(device)
            if self.run.to_forecast and step == last:
                self.forecast((now(device) - started) / max(1, last) * len(batches))

    def trained(self, epoch, losses):
        seconds = time.perf_counter() - self.progress.clock
        lr = f"{self.learner.optimizer.param_groups[0]['lr']:.4g}"
        if self.is_fitted:
            self.bar.update()
            lr = ""
        self.row = {
            "fold": self.progress.fold,
            "epoch": epoch,
            "step": len(losses) * epoch,
            "loss": round(statistics.mean(losses), 6),
            "lr": lr,
            "clips/s": round(len(self.split.train) / seconds, 1),
        }

    def validated(self, epoch, accuracy, state):
        run = self.run
        progress = self.progress
        row = self.row
        row["accuracy"] = "" if accuracy is None else round(accuracy, 4)
        progress.history.append(row)
        progress.tick()
        if run.machine.is_first:
            records.save_progress(self.state_file, progress, run.settings, state)
            records.write_metrics(run.folder, run.rows + progress.history)
        self.bar.set_postfix(loss=row["loss"], accuracy=row["accuracy"], refresh=False)
        if epoch == run.settings.epochs:
            self.bar.close()

    def forecast(self, seconds):
        """Print once how long the run will take, if that is long. An epoch takes `seconds`."""
        run = self.run
        seconds *= run.to_forecast * run.settings.epochs - len(self.progress.history)
        if seconds >= 60:
            with Bar.external_write_mode():  # not into the bar
                say(f"this will take about {in_words(seconds)}; folds to train: {run.to_forecast}")
                on_cpu = run.machine.device.type == "cpu"
                is_own = run.settings.choose_by == "balanced"
                if on_cpu and is_own:
                    say("--method probe is faster: each clip goes through the backbone once")
                in_float32 = run.settings.dtype == "float32"
                if on_cpu and in_float32 and bfloat16_helps(self.learner.network):
                    say("--dtype bfloat16 is faster: this CPU has units for it; it rounds more")
        run.to_forecast = 0
