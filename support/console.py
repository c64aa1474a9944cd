"""What a run prints: what it is going to do, and what came out."""

import shlex
from collections import Counter
from statistics import mean

from support.command import first_of
from support.files import write_json
from support.processes import say
from support.records import mean_and_std

ROWS = 10  # of the table of classes

# ------------------------------------------------------------------------------------------- before


def describe(settings, device):
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


# ------------------------------------------------------------------------------------------ results


def describe_fold(result, by):
    """The result of a fold. `by` is settings.choose_by, which chose the best epoch."""
    best = result["validation_accuracy"]
    chosen = "last epoch"
    if best is not None:
        chosen = f"best of validation {best:.2f} % in epoch {result['epoch']}"
        chosen += ", by balanced accuracy" if by == "balanced" else ""
    accuracy = f"test accuracy {result['accuracy']:.2f} % ({chosen})"
    return f"fold {result['fold']}: {accuracy}, {result['seconds']:.0f} s"


def summary(run):
    """What a user wants to know at the end of a run."""
    result = run.result()
    scores = result["scores"]
    count = result["parameters"]
    trained = count["petl"] + count["head"]
    spread = "" if result["std"] is None else f" +- {result['std']:.2f}"
    file = run.file(result["folds"][0]["fold"])
    name = run.config["method"]["name"]
    baseline = "houlsby_par" if name == "linear" else "linear"  # which shows what a method adds
    lines = [
        "",
        f"  test accuracy   {result['accuracy']:.2f}{spread} %, folds: {len(run.folds)}",
        f"  in all classes  balanced accuracy {scores['balanced_accuracy']:.2f} %, "
        f"macro-F1 {scores['macro_f1']:.2f} %",
        f"  to compare with {scores['majority']:.2f} % for always answering the largest class",
        *describe_confusion(run.tested(), scores["classes"]),
        f"  probabilities   {describe_errors(result['folds'])}",
        f"  trained         {trained:,} of {count['total']:,} parameters "
        f"({trained / count['total']:.2%}): {count['petl']:,} of {name}, "
        f"{count['head']:,} of final LayerNorm and head",
        f"  file            {file}, {file.stat().st_size / 1000:,.0f} kB: "
        "all that has to be kept beside the backbone",
        f"  time            {result['seconds']:.0f} s of training",
        f"  to use it       python -m tools.predict {shlex.quote(str(run.folder))} SOUND.wav",
        f"  to compare      the same command with --method {baseline}",
        "",
        *describe_classes(scores["classes"]),
        "",
    ]
    return "\n".join(lines)


def describe_confusion(tested, classes):
    """What accuracy alone would hide: classes that are never answered, and the worst confusion."""
    answered = {row["prediction"] for row in tested}
    never = [name for name, one in classes.items() if one["support"] and name not in answered]
    lines = []
    if never:
        lines.append(f"  never answered  {first_of(never)}: {len(never)} of {len(classes)} classes")
    pairs = Counter((row["label"], row["prediction"]) for row in tested)
    wrong = Counter({pair: count for pair, count in pairs.items() if pair[0] != pair[1]})
    for (label, answer), count in wrong.most_common(1):
        clips = f"{count} of {classes[label]['support']} clips of {label!r}"
        lines.append(f"  most confused   {clips} were taken for {answer!r}")
    return lines


def describe_classes(classes):
    """The classes with the lowest F1, ROWS at most."""
    lines = ["  classes with the lowest F1      clips  precision  recall     F1   in %"]
    for name, one in sorted(classes.items(), key=lambda item: item[1]["f1"])[:ROWS]:
        rates = f"{one['precision']:>11.2f}{one['recall']:>8.2f}{one['f1']:>7.2f}"
        lines.append(f"  {name[:30]:<30}{one['support']:>7}{rates}")
    return lines


def describe_errors(results):
    """How far probabilities are from the truth: the mean over folds with a temperature."""
    fitted = [result for result in results if "calibrated_error" in result]
    if not fitted:
        return "as they are, and never 'unsure': that takes ten right answers on validation clips"
    before = mean(result["calibration_error"] for result in fitted)
    after = mean(result["calibrated_error"] for result in fitted)
    return (
        f"{before:.1f} % off (expected calibration error), {after:.1f} % as tools.predict has them"
    )


def summarise_seeds(home, results):
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
