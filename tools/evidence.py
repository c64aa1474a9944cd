"""How sure is an accuracy, and is one method better than another? From the answers of runs.

    python -m tools.experiments compare experiments/demo/houlsby_par experiments/demo/lora
    python -m tools.experiments compare demo/houlsby_par/seed0 demo/lora/seed0  # of one seed
    python -m tools.experiments compare kept.xz/demo/lora kept.xz/demo/dora  # of kept runs

An accuracy is the mean over folds and seeds. Its interval is that of a bootstrap that draws clips
and seeds together. Where they are wider it is Student's over the seeds, because the bootstrap
hardly sees how two or three seeds scatter, or Wilson's over the clips, because near 100 % the
bootstrap sees no mistakes. A single run, one fold of one seed, has Wilson's interval alone. The
interval of one seed is over the clips: one seed says nothing of others.

Two methods are compared on the same clips, with the same seeds. Their difference has an interval of
the same kind. A sign test asks whether the clips on which one method is right more often are too
many for chance. With one seed that is McNemar's exact test. One method is better where the interval
leaves out zero and p, by Holm's correction for all the comparisons beside it, is below 5 %.

With several seeds Holm's correction is for the clips. How seeds scatter is judged by the interval
alone, and by itself for each pair: of 20 pairs of equal methods one may be called better by chance.

Clips of one recording or speaker count as one, as far as their names or --group say which these
are.
"""

import difflib
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np

from sounds.paper import RECORDING
from support.command import Parser, UserError, needed
from support.processes import say
from support.records import file_of, read_run
from tools.cells import Cell
from tools.finished import Finished, finished, read_kept

LEVEL = 0.95
RESAMPLES = 2_000
YES = "yes"
NO = "no"
UNTOLD = "cannot be told"
BETTER = {YES: "the first is better", NO: "the second is better"}
BETTER[UNTOLD] = "which is better cannot be told"

# {(fold, recording, path and label of a test clip): 1 if the answer was right, 0 if not}; or
# differences of these.
Scores = dict[tuple, int]


def stats():
    """scipy.stats. UserError if scipy is not installed."""
    with needed("intervals need"):
        import scipy.stats
    return scipy.stats


# ----------------------------------------------------------------------------- intervals and tests


def interval(accuracies: list[float], clips: int) -> tuple[float, float]:
    """The 95 % interval of a mean accuracy in percent.

    Of several runs it is Student's t over the runs, of one run Wilson's over its `clips`.
    """
    mean = np.mean(accuracies)
    if len(accuracies) == 1:
        return wilson(round(mean / 100 * clips), clips)
    half = student(accuracies)
    return float(max(mean - half, 0)), float(min(mean + half, 100))


def accuracy(seeds: list[Scores]) -> tuple[float, float, float]:
    """An accuracy in percent, the mean over folds and seeds, and its 95 % interval.

    Of one fold of one seed it is Wilson's over the recordings. Else it is the widest of three: of
    the bootstrap, of Wilson's, and with several seeds of Student's over the seeds.
    """
    sums, clips, weights = by_recording(seeds)
    mean, low, high = bootstrap(sums * weights, clips * weights)
    recordings = sums.shape[1]
    of_recordings = interval([mean], recordings)
    folds = {fold for scores in seeds for fold, *_ in scores}
    if len(seeds) == len(folds) == 1:
        return mean, *of_recordings
    intervals = [(low, high), of_recordings]
    if len(seeds) > 1:
        of_seeds = 100 * (sums * weights).sum(1) / (clips * weights).sum(1)
        intervals.append(interval(of_seeds, recordings))
    return mean, min(low for low, _ in intervals), max(high for _, high in intervals)


def by_recording(seeds: list[Scores]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums of scores, numbers of clips and the weight of a clip, each (seeds, recordings).

    Every fold of every seed weighs the same, as in the mean over folds and seeds. Each seed may
    have drawn other clips.
    """
    recordings = dict.fromkeys(key[:2] for scores in seeds for key in scores)
    places = {recording: place for place, recording in enumerate(recordings)}
    sums = np.zeros((len(seeds), len(places)))
    clips = np.zeros_like(sums)
    weights = np.zeros_like(sums)
    for seed, scores in enumerate(seeds):
        sizes = Counter(fold for fold, *_ in scores)
        for (fold, recording, *_), score in scores.items():
            place = places[fold, recording]
            sums[seed, place] += score
            clips[seed, place] += 1
            weights[seed, place] = 1 / sizes[fold]
    return sums, clips, weights


def student(values: list[float]) -> float:
    """Half the width of Student's 95 % interval of the mean of two values or more."""
    n = len(values)
    return float(stats().t.ppf((1 + LEVEL) / 2, n - 1) * np.std(values, ddof=1) / n**0.5)


def wilson(right: int, clips: int) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy in percent."""
    low, high = stats().binomtest(right, clips).proportion_ci(LEVEL, method="wilson")
    return 100 * low, 100 * high


def holm(p: list[float]) -> list[float]:
    """p-values corrected for being so many (Holm, 1979).

    The k-th smallest of n is multiplied by n - k + 1, and is never below the one before it.
    """
    order = np.argsort(p)
    factors = np.arange(len(p), 0, -1)
    corrected = np.maximum.accumulate(np.sort(p) * factors).clip(max=1)
    return corrected[np.argsort(order)].tolist()


@dataclass(frozen=True)
class Difference:
    """Two methods compared: first - second, in points of accuracy."""

    points: float
    low: float  # of the 95 % interval
    high: float
    more: int  # recordings on which the first is right more often, over the seeds
    less: int
    p: float  # that these two numbers differ so much by chance
    recordings: int  # clips, or what several are pieces of
    seeds: int

    def holds(self, p: float) -> str:
        """Whether the first is better, `p` being corrected: YES, NO if the second is, or UNTOLD.

        Interval and counts must agree: a method may win few clips by much and lose many by little.
        """
        if p < 1 - LEVEL and self.low > 0 and self.more > self.less:
            return YES
        if p < 1 - LEVEL and self.high < 0 and self.more < self.less:
            return NO
        return UNTOLD

    def __str__(self):
        return f"{self.points:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def difference(seeds: list[Scores]) -> Difference:
    """What the `minus` of two methods says, over the seeds. UserError if there is one recording."""
    sums, clips, weights = by_recording(seeds)
    recordings = sums.shape[1]
    if recordings < 2:
        raise UserError(f"test clips of {recordings} recording: nothing to compare")
    points, low, high = bootstrap(sums * weights, clips * weights)
    if len(seeds) > 1:
        half = student(100 * (sums * weights).sum(1) / (clips * weights).sum(1))
        low = min(low, points - half)
        high = max(high, points + half)
    if not sums.any():  # the bootstrap knows no other: exact, for a share of which none was seen
        high = 100 * (1 - (1 - LEVEL) ** (1 / recordings))
        low = -high
    more = (sums.sum(0) > 0).sum()
    less = (sums.sum(0) < 0).sum()
    p = stats().binomtest(more, more + less).pvalue if more + less else 1.0
    return Difference(points, low, high, more, less, p, recordings, len(seeds))


def bootstrap(sums, weights):
    """Mean in points and its 95 % interval, drawing recordings and seeds (Efron, 1979).

    Both are (seeds, recordings): weighted scores, and the weights themselves.
    """
    recordings = draws(sums.shape[1], 0)
    seeds = draws(len(sums), 1)
    total = (recordings @ sums.T * seeds).sum(1)  # of each resample
    weight = (recordings @ weights.T * seeds).sum(1)
    means = 100 * total / np.maximum(weight, 1e-9)  # a seed may have tested none of those drawn
    # The last digits of a matrix product depend on the number of threads.
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).round(9)
    return float(100 * sums.sum() / weights.sum()), float(low), float(high)


@lru_cache(maxsize=4)
def draws(count: int, stream: int) -> np.ndarray:
    """How often each of `count` things is drawn if as many are: (RESAMPLES, count)."""
    rng = np.random.default_rng([count, stream])
    counts = np.empty((RESAMPLES, count))
    for row in counts:
        row[:] = np.bincount(rng.integers(count, size=count), minlength=count)
    return counts


# --------------------------------------------------------------------------------- what runs leave


def scores_of(run: Finished) -> Scores:
    """What the run made of the test clips of its folds."""
    pattern = run.settings["group"] or RECORDING.get(run.settings["dataset"])
    scores = {}
    for fold, path, label, answer in run.answers():
        scores[fold, recording_of(path, pattern), path, label] = int(answer == label)
    return scores


def recording_of(path, pattern):
    """What the first parenthesis of the pattern finds in the path of a clip.

    Without a pattern it is the file that the clip is a piece of.
    """
    file = file_of(path)
    found = re.search(pattern, file) if pattern else None
    return found[1] if found else file


def minus(first, second):
    """The sum of the `first` scores minus the sum of the `second`, clip by clip.

    UserError if they tested different clips.
    """
    if any(scores.keys() != first[0].keys() for scores in first + second):
        raise UserError(
            "these runs tested different clips, or by different labels: nothing to compare"
        )
    return {key: sum(s[key] for s in first) - sum(s[key] for s in second) for key in first[0]}


# --------------------------------------------------------------------------------- tables and runs


def differences(pairs: dict, done: dict[Cell, Finished]) -> tuple[dict, list[str]]:
    """{key: difference and corrected p} of the pairs that are finished.

    pairs: for each key and seed the cells that count for it and those that count against it. The
    second value says why some cannot be compared.
    """

    @cache
    def scores(cell):
        return scores_of(done[cell])

    found = {}
    why = []
    for key, seeds in pairs.items():
        gaps = []
        try:
            for first, second in seeds:
                if all(cell in done for cell in first + second):
                    gaps.append(minus([*map(scores, first)], [*map(scores, second)]))
            if gaps:
                found[key] = difference(gaps)
        except UserError as error:
            why.append(str(error))
    corrected = holm([gap.p for gap in found.values()])
    both = zip(found.items(), corrected, strict=True)
    return {key: (gap, p) for (key, gap), p in both}, why


def scores_in(folder: Path) -> dict[str, Scores]:
    """{seed: Scores} of the runs of a method, or {"": Scores} of the one run that the folder is.

    The folder may be one of a file that `keep` wrote, as in results/demo.runs.xz/demo/lora.
    """
    for file in (folder, *folder.parents):
        if file.is_file():
            runs = kept_runs(file, folder.relative_to(file).as_posix())
            return {seed: scores_of(run) for seed, run in runs.items()}
    seeds = {file.parent.name for file in folder.glob("seed*/fold*.safetensors")}
    if not seeds:
        return {"": scores_of(finished(read_run(folder)))}
    return {seed: scores_of(finished(read_run(folder / seed))) for seed in sorted(seeds)}


def kept_runs(file: Path, name: str) -> dict[str, Finished]:
    """{seed: run} of the method `name` in a file of kept runs, or {"": run} if it is one run."""
    runs = read_kept(file).runs
    if name in runs:
        return {"": runs[name]}
    found = {}
    for run in sorted(runs):
        method, _, seed = run.rpartition("/")
        if method == name:
            found[seed] = runs[run]
    if not found:
        methods = sorted({run.rpartition("/")[0] for run in runs})
        like = difflib.get_close_matches(name, methods, n=3) or methods[:3]
        places = ", ".join(f"{file}/{method}" for method in like)
        raise UserError(f"{file}: name a run in it, such as {places}")
    return found


def compare(argv: list[str]) -> None:
    """The command `compare`: is the first method better than the others?"""
    parser = Parser(
        prog="python -m tools.experiments compare",
        description="Say whether the first of these is better than the others, on the same clips. "
        "Each is a finished run, .../METHOD/seedS, or .../METHOD with all its seeds: in a folder, "
        "or in a file that keep wrote, as FILE/demo/lora.",
    )
    parser.add_argument("first", type=Path, help="is this one better than the others?")
    parser.add_argument("others", type=Path, nargs="+", help="each is compared with the first")
    args = parser.parse_args(argv)
    first = scores_in(args.first)
    found = {}
    by_seed = {}
    for folder in args.others:
        other = scores_in(folder)
        gaps = [minus([first[seed]], [other[seed]]) for seed in first if seed in other]
        if not gaps:
            raise UserError(
                f"{args.first} and {folder} have no seed in common: give a run of each, .../seedS"
            )
        found[folder] = difference(gaps)
        by_seed[folder] = ", ".join(f"{difference([gap]).points:+.2f}" for gap in gaps)
    corrected = holm([one.p for one in found.values()])
    for (folder, one), p in zip(found.items(), corrected, strict=True):
        say(
            f"{args.first} - {folder}: {one} points; {one.recordings:,} recordings, "
            f"seeds: {one.seeds} ({by_seed[folder]}); "
            f"right more often on {one.more}, less on {one.less}, p = {one.p:.2g}, "
            f"by Holm's correction {p:.2g}; {BETTER[one.holds(p)]}"
        )
    if any(one.seeds == 1 for one in found.values()):
        say("With one seed this is about these runs. Other seeds may say something else.")
