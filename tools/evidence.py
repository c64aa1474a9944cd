"""Is one method better than another? Intervals and paired tests of the predictions of runs.

    python -m tools.experiments compare experiments/demo/houlsby_par experiments/demo/lora
    python -m tools.experiments compare demo/houlsby_par/seed0 demo/lora/seed0  # of one seed

Two methods are compared on the same clips, with the same seeds. They differ by so many points. The
interval is that of a bootstrap that draws clips and seeds, or Student's over the seeds where that
is wider: the bootstrap hardly sees how two or three seeds scatter. A sign test asks whether the
clips on which one method is right more often are too many for chance. With one seed that is
McNemar's exact test. One method is better where the interval leaves out zero and p, by Holm's
correction for all the comparisons beside it, is below 5 %. Clips of one recording or speaker count
as one, as far as their names or --group say which these are.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from sounds.paper import RECORDING
from support.command import Parser, UserError, needed
from support.processes import say
from support.records import Run, read_run
from tools.cells import Cell, Plan

LEVEL = 0.95
RESAMPLES = 5_000
YES = "yes"
NO = "no"
UNTOLD = "cannot be told"
PIECE = re.compile(r"#[\d.]+-[\d.]*$")  # behind the path of a recording: sounds.clip.fragment

# {(fold, recording, path and label of a test clip): 1 if the answer was right, 0 if not}; or
# differences of these.
Scores = dict[tuple[int, str, str, str], int]


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
    """Of two methods: first - second, in points of accuracy."""

    points: float
    low: float  # of the 95 % interval
    high: float
    more: int  # recordings on which the first is right more often, over the seeds
    less: int
    p: float  # that these two numbers differ so much by chance
    recordings: int  # clips, or what several are pieces of
    seeds: int

    def holds(self, p: float) -> str:
        """Whether the first is better, `p` being corrected: YES, NO if the second is, or UNTOLD."""
        opposed = (self.low > 0) != (self.more > self.less)  # few clips by much, many by little
        if p >= 1 - LEVEL or self.low <= 0 <= self.high or opposed:
            return UNTOLD
        return YES if self.low > 0 else NO

    def __str__(self):
        return f"{self.points:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def difference(seeds: list[Scores]) -> Difference:
    """What the `minus` of two methods says, over the seeds. UserError if there is one recording."""
    number = {}
    places = []
    for seed, scores in enumerate(seeds):  # each may have drawn its own clips
        for (fold, recording, *_), score in scores.items():
            places.append((seed, number.setdefault((fold, recording), len(number)), score))
    if len(number) < 2:
        raise UserError(f"test clips of {len(number)} recording: nothing to compare")
    table = np.zeros((len(seeds), len(number)), int)  # scores (seeds, recordings)
    tested = np.zeros_like(table)  # clips
    for seed, recording, score in places:
        table[seed, recording] += score
        tested[seed, recording] += 1
    points, low, high = bootstrap(table, tested)
    if len(seeds) > 1:
        half = student(100 * table.sum(1) / tested.sum(1))
        low = min(low, points - half)
        high = max(high, points + half)
    over_seeds = table.sum(0)
    more = int((over_seeds > 0).sum())
    less = int((over_seeds < 0).sum())
    p = stats().binomtest(more, more + less).pvalue if more + less else 1.0
    return Difference(points, low, high, more, less, float(p), len(number), len(seeds))


def bootstrap(table: np.ndarray, tested: np.ndarray) -> tuple[float, float, float]:
    """Mean in points and its 95 % interval, drawing recordings and seeds.

    table: scores (seeds, recordings). tested: numbers of clips (seeds, recordings).
    """

    def mean(recordings, seeds=None, axis=-1):  # (..., recordings), (..., seeds)
        # By the drawn recordings, (..., seeds):
        points = np.moveaxis(table[:, recordings].sum(-1), 0, -1)
        count = np.moveaxis(tested[:, recordings].sum(-1), 0, -1)
        if seeds is not None:
            points = np.take_along_axis(points, seeds, -1)
            count = np.take_along_axis(count, seeds, -1)
        return 100 * points.sum(-1) / count.sum(-1).clip(1)

    places = [np.arange(n) for n in table.shape[::-1] if n > 1]
    options = {"n_resamples": RESAMPLES, "confidence_level": LEVEL, "method": "percentile"}
    drawn = stats().bootstrap(places, mean, batch=100, rng=np.random.default_rng(0), **options)
    interval = drawn.confidence_interval
    return float(mean(*places)), float(interval.low), float(interval.high)


# --------------------------------------------------------------------------------- what runs leave


def scores_of(run: Run, folds: Iterable[int] | None = None) -> Scores:
    """What the run made of the test clips of these folds, or of all."""
    dataset = run.config["dataset"]
    pattern = run.config["group"] or RECORDING.get(dataset)
    scores = {}
    for row in run.tested():
        if folds is None or row["fold"] in folds:
            recording = recording_of(row["path"], pattern)
            is_right = int(row["label"] == row["prediction"])
            scores[row["fold"], recording, row["path"], row["label"]] = is_right
    return scores


def recording_of(path: str, pattern: str | None) -> str:
    """What the first parenthesis of the pattern finds in the path of a clip.

    Without a pattern it is the file that the clip is a piece of.
    """
    file = PIECE.sub("", path)
    found = re.search(pattern, file) if pattern else None
    return found[1] if found else file


def minus(first: list[Scores], second: list[Scores]) -> Scores:
    """The sum of the `first` minus the sum of the `second`, clip by clip.

    UserError if they tested different clips.
    """
    if any(scores.keys() != first[0].keys() for scores in first + second):
        raise UserError(
            "these runs tested different clips, or by different labels: nothing to compare"
        )
    return {key: sum(s[key] for s in first) - sum(s[key] for s in second) for key in first[0]}


def reader(
    done: dict[Cell, dict], plan: Plan
) -> Callable[[list[list[list[Cell]]]], Difference | None]:
    """A function that returns the difference of cells, given for each seed two lists of them.

    The first list counts for it, the second against it. None if no seed has all its cells.
    """

    @cache
    def scores(cell: Cell) -> Scores:
        folds = [fold["fold"] for fold in done[cell]["folds"]]
        return scores_of(read_run(plan.out / cell.name), folds)

    def compared(seeds: list[list[list[Cell]]]) -> Difference | None:
        gaps = []
        for first, second in seeds:
            if all(cell in done for cell in first + second):
                gaps.append(minus([*map(scores, first)], [*map(scores, second)]))
        return difference(gaps) if gaps else None

    return compared


# --------------------------------------------------------------------------------- tables and runs


def beside_best(
    grid: dict[tuple, list[list[Cell]]],
    means: dict[tuple, list[float | None]],
    done: dict[Cell, dict],
    plan: Plan,
) -> tuple[dict[tuple, tuple[Difference, float]], list[str]]:
    """The best of each column against the others: {(column, row): difference and corrected p}.

    The second value are the reasons of the columns that have none. grid: for each column the rows,
    each a cell for each seed. means: their accuracies.
    """
    compared = reader(done, plan)
    found = {}
    why = []
    for column, rows in grid.items():
        measured = {row: mean for row, mean in enumerate(means[column]) if mean is not None}
        best = max(measured, key=measured.get, default=None)
        try:
            others = {}
            for row in measured:
                if row == best:
                    continue
                seeds = [[[a], [b]] for a, b in zip(rows[best], rows[row], strict=True)]
                if gap := compared(seeds):
                    others[column, row] = gap
            found |= others
        except UserError as error:
            why.append(str(error))
    corrected = holm([one.p for one in found.values()])
    gaps = zip(found.items(), corrected, strict=True)
    return {key: (gap, p) for (key, gap), p in gaps}, why


def runs_in(folder: Path) -> dict[str, Path]:
    """All runs of a method by the names of their seeds, or the one run that the folder is."""
    runs = {file.parent for file in folder.glob("seed*/fold*.safetensors")}
    return {run.name: run for run in sorted(runs)} or {folder.name: folder}


def compare(argv: list[str]) -> None:
    """The command `compare`: is the first method better than the others?"""
    parser = Parser(
        prog="python -m tools.experiments compare",
        description="Say whether the first of these is better than the others, on the same clips.",
    )
    help_ = "finished runs, .../METHOD/seedS, or .../METHOD with all its seeds"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=help_)
    folders = parser.parse_args(argv).runs
    if len(folders) < 2:
        raise UserError("compare needs two runs, or more")
    first, *others = [
        {seed: scores_of(read_run(run)) for seed, run in runs_in(folder).items()}
        for folder in folders
    ]
    found = []
    for folder, other in zip(folders[1:], others, strict=True):
        seeds = [(first[seed], other[seed]) for seed in first if seed in other]
        if len(first) == len(other) == 1:
            seeds = [(*first.values(), *other.values())]
        if not seeds:
            raise UserError(
                f"{folders[0]} and {folder} have no seed in common: give a run of each, .../seedS"
            )
        found.append(difference([minus([a], [b]) for a, b in seeds]))
    for folder, one, p in zip(folders[1:], found, holm([one.p for one in found]), strict=True):
        words = {
            YES: "the first is better",
            NO: "the second is better",
            UNTOLD: "they cannot be told apart",
        }
        corrected = f", for {len(found)} comparisons {p:.2g}" if len(found) > 1 else ""
        say(
            f"{folders[0]} - {folder}: {one} points; {one.recordings:,} recordings, "
            f"seeds: {one.seeds}; right more often on {one.more}, less on {one.less}, "
            f"p = {one.p:.2g}{corrected}: {words[one.holds(p)]}"
        )
    if any(one.seeds == 1 for one in found):
        say("The intervals of one seed are over the clips alone: one seed says nothing of others.")
