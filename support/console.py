"""What a run prints: what it is going to do, and what came out."""

import re
import shlex
from collections import Counter
from statistics import mean

from support.command import first_of, printable
from support.files import write_json
from support.processes import say
from support.records import file_of, mean_and_std
from support.scores import ENOUGH, balanced_interval

ROWS = 10  # of the table of classes
GROUPS = 12  # so many are named
FEW = 5  # test clips; with fewer the recall of a class is in steps of 25 % or more
FITTED = ("Statistics", "LogMel")  # parts of petl_more.py that are fitted

# ------------------------------------------------------------------------------------------- before


def describe(settings, device):
    """What is about to be trained."""
    words = [
        f"{settings.shots} clips per class" if settings.shots else "",
        f"clips of {settings.n_frames / 100:g} s",
        *describe_training(settings),
        f"{settings.keep:.0%} of the patches" if settings.keep else "",
        "classes weighed alike" if settings.balance else "",
        "no backbone" if settings.method["name"] == "logmel" else f"weights {settings.weights}",
        f"seed {settings.seed}",
        settings.dtype,
        str(device),
    ]
    what = ", ".join(filter(None, words))
    line = printable(f"{settings.method['name']} on {settings.dataset}: {what}")
    if settings.keep or settings.method["parts"]:
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


def describe_groups(dataset, split):
    """Which groups of own sounds train, validate and test, in one line. Of many groups how many."""
    if not dataset.groups:
        return ""
    parts = []
    for part, clips in (("train", split.train), ("validate", split.val), ("test", split.test)):
        names = sorted({dataset.groups[i] for i in clips})
        listed = ", ".join(names)
        if len(set(dataset.groups)) > GROUPS and names:
            listed = f"{len(names)}, such as {names[0]}"
        parts.append(f"{part}: {listed or 'none'}")
    return "groups that " + "; ".join(parts)


def describe_training(settings):
    if is_fitted(settings.method):
        return [f"fitted with {settings.epochs} penalties"]
    head = ""
    if settings.head_lr != settings.lr:
        head = f", of the head {settings.head_lr:g}"
    return [
        f"{settings.epochs} epochs",
        f"batch {settings.batch_size}",
        f"learning rate {settings.lr:g}{head}",
        "masked" if settings.mask_frames else "unmasked",
    ]


def is_fitted(method):
    """Whether a method, as load_weights.to_dict has it, is fitted in place of being trained."""
    return any(part["part"] in FITTED for part in method["parts"])


# ------------------------------------------------------------------------------------------ results


def describe_fold(result, settings):
    """The result of a fold."""
    best = result["validation_accuracy"]
    chosen = "weakest penalty" if is_fitted(settings.method) else "last epoch"
    if best is not None:
        step = f"in epoch {result['epoch']}"
        if is_fitted(settings.method):
            step = f"with penalty {result['epoch']} of {settings.epochs}, from strong to weak"
        chosen = f"best of validation {best:.2f} % {step}"
        chosen += ", by balanced accuracy" if settings.choose_by == "balanced" else ""
    accuracy = f"test accuracy {result['accuracy']:.2f} % ({chosen})"
    return f"fold {result['fold']}: {accuracy}, {result['seconds']:.0f} s"


def summary(run, dataset, device="cpu"):
    """What a user wants to know at the end of a run.

    `dataset` is the data.Dataset of its clips. `device` is the type of the device it was on.
    """
    result = run.result()
    scores = result["scores"]
    count = result["parameters"]
    trained = count["petl"] + count["head"]
    spread = "" if result["std"] is None else f", standard deviation {result['std']:.2f}"
    name = run.config["method"]["name"]
    headline = [
        f"  test accuracy   {result['accuracy']:.2f} %, folds: {len(run.folds)}{spread}",
        f"  in all classes  {balanced_accuracy(run, dataset)}, macro-F1 {scores['macro_f1']:.2f} %",
    ]
    if is_balanced(run):
        headline.reverse()
    lines = [
        "",
        *headline,
        f"  to compare with {scores['majority']:.2f} % for always answering the largest class",
        *describe_baseline(result, name),
        *[f"  {what:<15} {text}" for what, text in findings(run, dataset)],
        f"  trained         {trained:,} of {count['total']:,} parameters "
        f"({trained / count['total']:.2%}): {describe_parts(count, name)}",
        f"  file            {describe_files(run)}: all that has to be kept"
        + ("" if name == "logmel" else " beside the backbone"),
        f"  time            {result['seconds']:.0f} s of training",
        f"  to use it       python -m tools.predict {shlex.quote(str(run.folder))} SOUND.wav",
        f"  to try next     the same command with {next_step(run.config, result, device)}",
        "",
        *describe_classes(scores["classes"]),
        "",
    ]
    return "\n".join(printable(line) for line in lines)


def describe_files(run):
    """The files of trained tensors, one for each fold, and their size."""
    files = [run.file(fold) for fold in run.folds]
    size = f"{files[0].stat().st_size / 1000:,.0f} kB"
    if len(files) == 1:
        return f"{files[0]}, {size}"
    return f"{run.folder / 'fold*.safetensors'}, {len(files)} of {size}"


def describe_parts(count, name):
    """What the trained parameters belong to."""
    if name in ("probe", "logmel"):
        return "the head alone"
    if not count["petl"]:
        return "final LayerNorm and head alone"
    return f"{count['petl']:,} of {name}, {count['head']:,} of final LayerNorm and head"


def describe_baseline(result, name):
    """What a linear classifier makes of the features alone. Of own sounds it is known."""
    if "logmel_accuracy" not in result:
        return []
    accuracy = result["logmel_accuracy"]
    balanced = result["logmel_balanced_accuracy"]
    lines = [
        f"                  {accuracy:.2f} % (balanced {balanced:.2f} %) for logmel, a linear "
        "classifier of the features alone"
    ]
    if logmel_is_better(result):
        lines.append(f"  note            logmel, without a backbone, is better than {name} here")
    return lines


def logmel_is_better(result):
    balanced = result.get("logmel_balanced_accuracy", 0)
    return balanced > result["scores"]["balanced_accuracy"]


def next_step(config, result, device):
    """The options to try after this run, by what came out of it."""
    name = config["method"]["name"]
    backbone_is_small = config["weights"] == "demo" or config["weights"].startswith("random:")
    is_own = "logmel_accuracy" in result
    if logmel_is_better(result):
        return "--method logmel"
    if name == "logmel":
        return "--method probe: what a backbone adds"
    if is_own and backbone_is_small and device == "cpu":
        return "--weights audioset --method probe: the large backbone, once per clip"
    if is_own and backbone_is_small:
        return "--weights audioset: the large backbone"
    if name in ("linear", "probe"):
        return "--method houlsby_par: an adapter"
    return "--method linear: what the method adds"


def is_balanced(run):
    """Whether the score of a run is balanced accuracy, as for own sounds. Else it is accuracy."""
    return run.config["choose_by"] == "balanced"


def balanced_accuracy(run, dataset):
    """Balanced accuracy, with its interval if it is the score of the run."""
    text = f"balanced accuracy {run.result()['scores']['balanced_accuracy']:.2f} %"
    if not is_balanced(run):
        return text
    groups = dict(zip(dataset.names, dataset.groups, strict=False))  # perhaps there are none
    interval = balanced_interval(run.tested(), run.classes, groups)
    tested = {groups[row["path"]] for row in run.tested()} if groups else ()
    if 0 < len(tested) < ENOUGH:
        return f"{text} (groups that test: {len(tested)}, too few for an interval)"
    drawn = "groups" if groups else "clips"
    if len(run.tested()) < ENOUGH:
        return f"{text} (clips that test: {len(run.tested())}, too few for an interval)"
    if interval is None:
        return f"{text} (no interval: all draws of {drawn} give the same)"
    return f"{text} (95 % interval {interval[0]:.2f} to {interval[1]:.2f}, over {drawn})"


def findings(run, dataset):
    """What accuracy alone would hide, as pairs of a heading and a sentence."""
    result = run.result()
    classes = result["scores"]["classes"]
    tested = run.tested()
    answered = {row["prediction"] for row in tested}
    never = [name for name, one in classes.items() if one["support"] and name not in answered]
    few = [f"{k} ({one['support']})" for k, one in classes.items() if one["support"] < FEW]
    pairs = Counter((row["label"], row["prediction"]) for row in tested)
    wrong = Counter({pair: count for pair, count in pairs.items() if pair[0] != pair[1]})
    found = []
    if never:
        found.append(
            ("never answered", f"{first_of(never)}: {len(never)} of {len(classes)} classes")
        )
    if few:
        found.append(
            ("few test clips", f"{first_of(few)}: too few to say how good these classes are")
        )
    found += shared_recordings(run, dataset)
    for (label, answer), count in wrong.most_common(1):
        clips = f"{count} of {classes[label]['support']} clips of {label!r}"
        found.append(("most confused", f"{clips} were taken for {answer!r}"))
    found.append(("probabilities", describe_errors(result["folds"])))
    unsure = [fold["unsure"] for fold in result["folds"] if "unsure" in fold]
    right = [fold["sure_accuracy"] for fold in result["folds"] if "sure_accuracy" in fold]
    if unsure:
        others = f"; {mean(right):.0f} % of the other answers are right" if right else ""
        found.append(("unsure", f"{mean(unsure):.0f} % of the test clips{others}"))
    return found


def shared_recordings(run, dataset):
    """Whether test clips are named like pieces of recordings of which other pieces train."""
    if not dataset.group_hint:
        return []

    def recording(row):
        return row["fold"], re.search(dataset.group_hint, file_of(row["path"]))[1]

    training = {recording(row) for row in run.clips("train")}
    tested = run.clips("test")
    shared = [row["path"] for row in tested if recording(row) in training]
    if not shared:
        return []
    clips = f"{len(shared)} of {len(tested)} test clips, such as {shared[0]},"
    text = "are named like pieces of recordings that also train: the scores may be too high"
    what_to_do = f"--group {shlex.quote(dataset.group_hint)} keeps a recording in one part"
    if dataset.folds:  # the user has said what is in which part
        what_to_do = "put all clips of a recording into one part"
    return [("recordings", f"{clips} {text}"), ("what to do", what_to_do)]


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
    worse = ": worse than without its temperature" if round(after, 1) > round(before, 1) else ""
    return (
        f"{before:.1f} % off (expected calibration error), {after:.1f} % as tools.predict has them"
        + worse
    )


def summarise_seeds(home, results):
    """Mean and standard deviation over all folds of all seeds, in a result.json of their own."""
    folds = []
    for seed, result in results.items():
        folds += [{"seed": seed, **fold} for fold in result["folds"]]
    seeds = {seed: result["accuracy"] for seed, result in results.items()}
    result = {**mean_and_std(folds), "seeds": seeds, "folds": folds}
    write_json(home / "result.json", result)
    accuracy = f"{result['accuracy']:.2f} % (standard deviation {result['std']:.2f})"
    balanced = mean(result["scores"]["balanced_accuracy"] for result in results.values())
    say(
        f"accuracy {accuracy}, balanced accuracy {balanced:.2f} %, over {len(seeds)} seeds, "
        f"{len(folds)} runs in all; written to {home}"
    )
    return result
