"""What a run prints: what it is going to do, how far it is, how long it takes, what came out."""

import math
import shlex
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm

from support import ledger
from support.command import first_of
from support.files import write_json
from support.headers import Settings
from support.processes import is_first, say
from support.progress import Signs, in_words
from support.records import Progress, mean_and_std, write_results
from support.scores import mistakes


def describe(settings: Settings, seconds: float, device: torch.device) -> str:
    """What is about to be trained, on clips that last `seconds`."""
    shots = f"{settings.shots} clips per class, " if settings.shots else ""
    masked = "masked" if settings.mask_frames else "unmasked"
    masked += f", {settings.keep:.0%} of the patches" if settings.keep else ""
    masked += ", classes weighed alike" if settings.balance else ""
    line = (
        f"{settings.method['name']} on {settings.dataset}: {shots}{seconds:g} s a clip, {settings.epochs} epochs, "
        f"batch {settings.batch_size}, learning rate {settings.lr:g}, {masked}, weights {settings.weights}, seed "
        f"{settings.seed}, {settings.dtype}, {device}"
    )
    probe = "linear probe: each clip goes through the backbone once, the epochs train on what is kept of it"
    if settings.mask_frames:
        probe = ("linear probe, masked: every epoch masks the clips anew, so each goes through the backbone in every "
                 "epoch; with --no-mask it does so once")  # fmt: skip
    probing = {part["part"] for part in settings.method["parts"]} <= {"Statistics"} and not settings.keep
    return f"{line}\n{probe}" if probing else line


def folds_left(folder: Path, seeds: Iterable[int], folds: Iterable[int]) -> int:
    """How many folds of these seeds have no file yet, `folder` being that above the seeds' own."""
    return sum(not (folder / f"seed{seed}" / f"fold{fold}.safetensors").exists() for seed in seeds for fold in folds)


def now(device: torch.device) -> float:
    """Seconds, once the device has done all it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def forecast(optimizer, progress: Progress, split, settings: Settings, device: torch.device, folds: int) -> None:
    """Say after the third step of a fold how long the `folds` will take of which it is the first; and without a terminal every minute how far it is.

    The steps after the first one are timed, which is slower than the others. The clock is read twice, and only then is
    the device waited for. Nothing is said where it is less than a minute.
    """
    batch, done = settings.batch_size, 0
    steps = math.ceil(len(split.train) / batch)  # in an epoch
    before = steps * len(progress.history)
    signs = Signs(steps * settings.epochs, "steps", before)
    last = min(3, steps) if folds and is_first() else 0
    first = min(1, last - 1)  # an epoch of one step is timed from here on
    start = now(device) if last else 0.0

    def after_step(*_):
        nonlocal start, done
        done += 1
        signs(before + done, f"fold {progress.fold}, epoch {1 + (before + done - 1) // steps}")
        if done == first:
            start = now(device)
        elif done == last:
            clips = min(last * batch, len(split.train)) - first * batch
            seconds = (now(device) - start) / clips * clips_left(progress, split, settings, folds)
            with tqdm.external_write_mode():  # not into the progress bar
                for line in forecast_lines(seconds, folds, settings, device):
                    say(line)

    optimizer.register_step_post_hook(after_step)


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


def describe_fold(result: dict, by: str) -> str:
    """`by`: what the best epoch was chosen by, settings.best."""
    best = result["validation_accuracy"]
    chosen = "last epoch" if best is None else f"best of validation {best:.2f} % in epoch {result['epoch']}"
    chosen += ", by balanced accuracy" if best is not None and by == "balanced" else ""
    return f"fold {result['fold']}: test accuracy {result['accuracy']:.2f} % ({chosen}), {result['seconds']:.0f} s"


def summarise(folder: Path, settings: Settings, started: float) -> dict:
    """Collect the finished folds of a run into result.json, and print what a person wants to know at its end.

    `started`: when the command began, on the performance counter.
    """
    if not is_first():
        return {}
    with ledger.lock(folder):  # folds may end at the same time on several machines
        summary, tested = write_results(folder)
    results = summary["folds"]
    name, count, n = settings.method["name"], summary["parameters"], len(results)
    trained = count["petl"] + count["head"]
    spread = "" if summary["std"] is None else f" +- {summary['std']:.2f}"
    file = folder / f"fold{results[0]['fold']}.safetensors"
    baseline = "houlsby_par" if name == "linear" else "linear"  # the comparison that says what a method adds
    say(
        f"\n  test accuracy   {summary['accuracy']:.2f}{spread} %{f' over {n} folds' if n > 1 else ''}"
        f"{describe_scores(tested, summary['scores']) if tested else ''}"
        f"{describe_errors(results)}"
        f"\n  trained         {trained:,} of {count['total']:,} parameters ({100 * trained / count['total']:.2f} %): "
        f"{count['petl']:,} of {name}, {count['head']:,} of final LayerNorm and head"
        f"\n  file            {file}, {file.stat().st_size / 1000:,.0f} kB: all that has to be kept beside the backbone"
        f"\n  time            {summary['seconds']:.0f} s of training, {time.perf_counter() - started:.0f} s in all"
        f"\n  to use it       python -m tools.predict {shlex.quote(str(folder))} SOUND.wav"
        f"\n  to compare      the same command with --method {baseline}\n"
    )
    if tested:
        say(describe_classes(tested, summary["scores"]["classes"]))
    return summary


def describe_scores(tested: list[dict], scores: dict) -> str:
    """What accuracy alone would hide of these rows of predictions.csv."""
    clips = {name: of["support"] for name, of in scores["classes"].items()}
    balanced, f1, majority = (scores[name] for name in ("balanced_accuracy", "macro_f1", "majority"))
    lines = f"\n  in all classes  balanced accuracy {balanced:.2f} %, macro-F1 {f1:.2f} %"
    lines += f"\n  to compare with {majority:.2f} % for always answering {max(clips, key=clips.get)!r}"
    answered = {row["prediction"] for row in tested}
    if never := [repr(name) for name in clips if clips[name] and name not in answered]:
        lines += f"\n  never answered  {first_of(never)}: {len(never)} of {len(clips)} classes"
    wrong = Counter((row["label"], row["prediction"]) for row in tested if row["label"] != row["prediction"])
    for (label, prediction), count in wrong.most_common(1):
        lines += f"\n  most confused   {count} of {clips[label]} clips of {label!r} were taken for {prediction!r}"
    return lines


def describe_classes(tested: list[dict], classes: dict[str, dict], rows: int = 10) -> str:
    """The classes with the lowest F1, `rows` at most, and the most confident mistakes."""
    which = f"the {rows} of {len(classes)} classes with the lowest F1" if len(classes) > rows else "class"
    width = min(40, max(map(len, [which, *classes])))
    lines = [f"  {which:<{width}}  clips  precision  recall     F1   in %"]
    for name, of in sorted(classes.items(), key=lambda item: item[1]["f1"])[:rows]:
        numbers = f"{of['support']:>7}{of['precision']:>11.2f}{of['recall']:>8.2f}{of['f1']:>7.2f}"
        lines.append(f"  {name[:width]:<{width}}{numbers}")
    wrong = [f"  {float(row['probability']):7.2%}  {row['path']}: {row['prediction']!r}, but it is {row['label']!r}"
             for row in mistakes(tested)]  # fmt: skip
    return "\n".join([*lines, *(["\n  the most confident mistakes", *wrong] if wrong else []), ""])


def describe_errors(results: list[dict]) -> str:
    """How far probabilities are from the truth, on average over the folds that have a temperature."""
    told = [result for result in results if "calibrated_error" in result]
    if not told:
        return "\n  probabilities   as they are, and never 'unsure': that takes ten right answers on validation clips"
    before, after = (mean(result[f"{kind}_error"] for result in told) for kind in ("calibration", "calibrated"))
    what = "expected calibration error"
    return f"\n  probabilities   {before:.1f} % off ({what}), {after:.1f} % as tools.predict has them"


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
