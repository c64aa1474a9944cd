"""The search for learning rates: for every method five rates, 0.1 to 10 times the paper's.

    python -m tools.experiments tune table1 --datasets demo --seeds 0,1,2

The validation clips judge, in runs with a seed that is not reported. The test clips have no say.
What was tried and found is in tuned.json, which `--setting tuned` reads. The runs are cells like
all others, so a search goes on where it was stopped. In cross-validation, a validation clip of one
fold is a test clip of another, so the choice has seen it, for every method alike.
"""

import math
import statistics
from dataclasses import replace

from filelock import FileLock
from msgspec import Struct, to_builtins

from data import folds_of, load_dataset
from support.checkpoints import read_json
from support.command import UserError
from support.files import write_json
from support.headers import checked
from support.processes import say
from support.records import LOCK
from tools.campaign import method_of, train_cells
from tools.cells import Cell, Plan, cells_of, is_fitted
from tools.finished import TUNED

# Of the paper's rate, or on a narrow backbone of that in support/variants.py.
FACTORS = (0.1, 0.3, 1, 3, 10)
SEED = 1000  # of the search
DIVERGED = "the loss is "  # what train.py says where a rate is too high


class Search(Struct):
    """What was tried and found for a cell, in percent of the validation clips."""

    usual: float  # the paper's rate, but on narrow backbones
    best: float
    tried: list[tuple[float, float | None]]  # rate and accuracy; None: the loss was not finite
    options: list[str]  # of train.py


def best_of(tried, usual):
    """The rate with the highest accuracy, of equals the nearest to the usual. None: all diverge."""
    ranked = []
    for lr, accuracy in tried:
        if accuracy is not None:
            ranked.append((accuracy, -abs(math.log(lr / usual)), lr))
    return max(ranked)[2] if ranked else None


def read_tuned(plan: Plan) -> dict[str, Search]:
    """tuned.json: the searches by the names of their cells, but with seed 0. Empty without it."""
    if plan.kept:
        return checked(plan.kept.tuned, dict[str, Search], plan.out)
    file = plan.out / TUNED
    if not file.exists():
        return {}
    return read_json(file, dict[str, Search], "delete it: `tune` makes it again from the runs")


def rates_of(cell):
    """The cells of a search by their learning rates. The `cell` itself has the usual rate."""
    usual = method_of(cell).lr
    rates = {}
    for factor in FACTORS:
        lr = float(f"{factor * usual:.3g}")
        if factor == 1:
            rates[usual] = cell
        elif lr <= 1:
            rates[lr] = replace(cell, lr=lr)
    return rates


def searches_of(plan):
    """For each cell of the targets the cells of its search. A fitted method has no rate."""
    cells = cells_of(replace(plan, seeds=[SEED], setting="paper"))
    return {cell: rates_of(cell) for cell in cells if not is_fitted(cell)}


def cells_to_try(plan: Plan) -> list[Cell]:
    return [cell for rates in searches_of(plan).values() for cell in rates.values()]


def search(plan: Plan) -> dict[Cell, str]:
    """Try the rates of all cells, and write to tuned.json what is found.

    Returns the cells that failed, with the reasons. UserError where there are no validation clips.
    """
    wanted = searches_of(plan)
    for name in dict.fromkeys(cell.dataset for cell in wanted):
        dataset = load_dataset(name, plan.data_dir.get(name), plan.cache_dir)
        if not all(split.val for split in folds_of(dataset, SEED).values()):
            raise UserError(
                f"{name} has no validation clips to judge learning rates by: "
                "leave it out, --datasets"
            )
    done, failed = train_cells(cells_to_try(plan), plan)
    failed = {cell: why for cell, why in failed.items() if not why.startswith(DIVERGED)}
    found = {}
    for cell, rates in wanted.items():
        if failed.keys() & {*rates.values()}:
            continue
        tried = [(lr, judged(done[one]) if one in done else None) for lr, one in rates.items()]
        usual = method_of(cell).lr
        best = best_of(tried, usual)
        if best is None:
            failed[cell] = "the loss is not finite at any learning rate"
            continue
        found[replace(cell, seed=0).name] = Search(usual, best, tried, plan.passed)
        say(f"{cell.name}: best {best:g}, without search {usual:g}; validation accuracy {tried}")
    plan.out.mkdir(parents=True, exist_ok=True)
    with FileLock(plan.out / LOCK):  # another search may have ended meanwhile
        write_json(plan.out / TUNED, to_builtins(read_tuned(plan) | found))
    return failed


def judged(run):
    """The accuracy on validation clips, over all folds."""
    return round(statistics.mean(fold.validation_accuracy for fold in run.folds), 4)


def note_of(cells: list[Cell], plan: Plan) -> str:
    """What a reader must know of tuned numbers. `cells`: of a table, with the paper's rates."""
    options = set()
    edge = set()
    for cell in cells:
        if is_fitted(cell):
            continue
        found = plan.tuned[replace(cell, seed=0).name]
        options.add(f"`{' '.join(found.options)}`")
        if found.best in (found.tried[0][0], found.tried[-1][0]):
            edge.add(f"{cell.method} on {cell.dataset}")
    note = (
        f"Tuned: of {', '.join(f'{f:g}' for f in FACTORS)} times the method's learning rate the "
        f"one with the best validation accuracy, by seed {SEED}: the same search for every "
        "method; a fitted one has no rate. In cross-validation the validation clips of a fold are "
        "test clips of another."
    )
    options.discard("``")
    if options:
        note += f" The search had the options {', '.join(sorted(options))}."
    if edge:
        note += f" Best at its edge, so that another may be better: {', '.join(sorted(edge))}."
    return note
