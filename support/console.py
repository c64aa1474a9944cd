"""What a run prints: what it is going to do, how long that takes, what came out."""

import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

import torch

from support.command import first_of
from support.files import write_json
from support.processes import say
from support.progress import in_words
from support.records import Run, mean_and_std
from support.scores import mistakes

ROWS = 10  # of the table of classes

# -------------------------------------------------------------------------------- before and during


def describe(settings, device: torch.device) -> str:
    """What is about to be trained."""
    words = [
        f"{settings.shots} clips per class" if settings.shots else "",
        f"{settings.n_frames / 100:g} s a clip",
        f"{settings.epochs} epochs",
        f"batch {settings.batch_size}",
        f"learning rate {settings.lr:g}",
        "masked" if settings.mask_frames else "unmasked",
        f"{settings.keep:.0%} of the patches" if settings.keep else "",
        "classes weighed alike" if settings.balance else "",
        f"weights {settings.weights}",
        f"seed {settings.seed}",
        settings.dtype,
        str(device),
    ]
    line = f"{settings.method['name']} on {settings.dataset}: {', '.join(filter(None, words))}"
    if settings.keep or any(part["part"] != "Statistics" for part in settings.method["parts"]):
        return line
    if settings.mask_frames:
        return (
            f"{line}\nlinear probe, masked: every epoch masks the clips anew, so each goes through "
            "the backbone in every epoch; with --no-mask it does so once"
        )
    return (
        f"{line}\nlinear probe: each clip goes through the backbone once, the epochs train on what "
        "is kept of it"
    )


def folds_left(home: Path, seeds: Iterable[int], folds: Iterable[int]) -> int:
    """How many folds of these seeds have no file yet. `home` has a folder for each seed."""
    files = [home / f"seed{seed}" / f"fold{fold}.safetensors" for seed in seeds for fold in folds]
    return sum(not file.exists() for file in files)


def forecast(seconds: float, folds: int, settings, device: torch.device) -> list[str]:
    """What a user should know of a run that takes so long. Nothing of a short one."""
    if seconds < 60:
        return []
    lines = [f"this will take about {in_words(seconds)}" + (f", {folds} folds" * (folds > 1))]
    if device.type == "cpu" and seconds > 600:
        ways = [] if settings.shots else ["--shots 8"]
        ways += ["--folds 1"] if folds > 1 else []
        ways += ["fewer --epochs"] if settings.epochs > 5 else []
        lines.append(f"on a CPU; what makes it bearable: {', '.join([*ways, 'a GPU'])}")
    return lines


# ------------------------------------------------------------------------------------------ results


def describe_fold(result: dict, by: str) -> str:
    """The result of a fold. `by` is settings.choose_by, which chose the best epoch."""
    best = result["validation_accuracy"]
    chosen = "last epoch"
    if best is not None:
        chosen = f"best of validation {best:.2f} % in epoch {result['epoch']}"
        chosen += ", by balanced accuracy" if by == "balanced" else ""
    accuracy = f"test accuracy {result['accuracy']:.2f} % ({chosen})"
    return f"fold {result['fold']}: {accuracy}, {result['seconds']:.0f} s"


def summary(run: Run, seconds: float) -> str:
    """What a user wants to know at the end of a run. `seconds`: since the command began."""
    result = run.result()
    name = run.config["method"]["name"]
    n = len(run.folds)
    count = result["parameters"]
    trained = count["petl"] + count["head"]
    spread = "" if result["std"] is None else f" +- {result['std']:.2f}"
    over = f" over {n} folds" if n > 1 else ""
    file = run.file(next(iter(run.folds)))
    baseline = "houlsby_par" if name == "linear" else "linear"  # which shows what a method adds
    lines = [
        "",
        f"  test accuracy   {result['accuracy']:.2f}{spread} %{over}",
        *describe_scores(run.tested(), result["scores"]),
        describe_errors(result["folds"]),
        f"  trained         {trained:,} of {count['total']:,} parameters "
        f"({100 * trained / count['total']:.2f} %): {count['petl']:,} of {name}, "
        f"{count['head']:,} of final LayerNorm and head",
        f"  file            {file}, {file.stat().st_size / 1000:,.0f} kB: "
        "all that has to be kept beside the backbone",
        f"  time            {result['seconds']:.0f} s of training, {seconds:.0f} s in all",
        f"  to use it       python -m tools.predict {shlex.quote(str(run.folder))} SOUND.wav",
        f"  to compare      the same command with --method {baseline}",
        "",
        *describe_classes(result["scores"]["classes"]),
        *describe_mistakes(run.tested()),
        "",
    ]
    return "\n".join(lines)


def describe_scores(tested: list[dict], scores: dict) -> list[str]:
    """What accuracy alone would hide of these rows of predictions.csv."""
    clips = {name: one["support"] for name, one in scores["classes"].items()}
    balanced = f"balanced accuracy {scores['balanced_accuracy']:.2f} %"
    largest = max(clips, key=clips.get)
    lines = [
        f"  in all classes  {balanced}, macro-F1 {scores['macro_f1']:.2f} %",
        f"  to compare with {scores['majority']:.2f} % for always answering {largest!r}",
    ]
    answered = {row["prediction"] for row in tested}
    never = [repr(name) for name in clips if clips[name] and name not in answered]
    if never:
        lines.append(f"  never answered  {first_of(never)}: {len(never)} of {len(clips)} classes")
    pairs = Counter((row["label"], row["prediction"]) for row in tested)
    wrong = Counter({pair: count for pair, count in pairs.items() if pair[0] != pair[1]})
    for (label, answer), count in wrong.most_common(1):
        taken = f"{count} of {clips[label]} clips of {label!r} were taken for {answer!r}"
        lines.append(f"  most confused   {taken}")
    return lines


def describe_classes(classes: dict[str, dict]) -> list[str]:
    """The classes with the lowest F1, ROWS at most."""
    title = "class"
    if len(classes) > ROWS:
        title = f"the {ROWS} of {len(classes)} classes with the lowest F1"
    width = min(40, max(map(len, [title, *classes])))
    lines = [f"  {title:<{width}}  clips  precision  recall     F1   in %"]
    for name, one in sorted(classes.items(), key=lambda item: item[1]["f1"])[:ROWS]:
        rates = f"{one['precision']:>11.2f}{one['recall']:>8.2f}{one['f1']:>7.2f}"
        lines.append(f"  {name[:width]:<{width}}{one['support']:>7}{rates}")
    return lines


def describe_mistakes(tested: list[dict]) -> list[str]:
    lines = []
    for row in mistakes(tested):
        answer = f"{row['prediction']!r}, but it is {row['label']!r}"
        lines.append(f"  {float(row['probability']):7.2%}  {row['path']}: {answer}")
    return ["\n  the most confident mistakes", *lines] if lines else []


def describe_errors(results: list[dict]) -> str:
    """How far probabilities are from the truth: the mean over folds with a temperature."""
    fitted = [result for result in results if "calibrated_error" in result]
    if not fitted:
        why = "that takes ten right answers on validation clips"
        return f"  probabilities   as they are, and never 'unsure': {why}"
    before = mean(result["calibration_error"] for result in fitted)
    after = mean(result["calibrated_error"] for result in fitted)
    what = "expected calibration error"
    return f"  probabilities   {before:.1f} % off ({what}), {after:.1f} % as tools.predict has them"


def summarise_seeds(home: Path, results: dict[int, dict]) -> dict:
    """Mean and standard deviation over all folds of all seeds, in a result.json of their own."""
    folds = []
    for seed, result in results.items():
        folds += [{"seed": seed, **fold} for fold in result["folds"]]
    seeds = {seed: result["accuracy"] for seed, result in results.items()}
    result = {**mean_and_std(folds), "seeds": seeds, "folds": folds}
    write_json(home / "result.json", result)
    accuracy = f"{result['accuracy']:.2f} +- {result['std']:.2f} %"
    say(f"accuracy {accuracy} over {len(seeds)} seeds, {len(folds)} runs in all; written to {home}")
    return result
