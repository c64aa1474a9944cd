"""The search for learning rates: for every method five rates, 0.1 to 10 times the paper's.

    python -m tools.experiments tune table1 --datasets demo --seeds 0,1,2

The validation clips judge, in runs with a seed that is not reported. The test clips have no say.
What was tried and found is in tuned.json, which `--setting tuned` reads. The runs are cells like
all others, so a search goes on where it was stopped. In cross-validation, a validation clip of one
fold is a test clip of another, so the choice has seen it, for every method alike.
"""

import math
import statistics
from dataclasses import asdict, replace
from pathlib import Path

from filelock import FileLock
from msgspec import Struct, to_builtins

from data import DATASETS, folds_of, load_dataset
from support.checkpoints import read_json
from support.command import UserError
from support.files import write_json
from support.headers import Count, LearningRate, Name, Percent, Seed, Size, Text
from support.processes import say
from tools.campaign import method_of, train_cells
from tools.cells import Cell, Plan, cells_of, columns_of, epochs_of

FACTORS = (
    0.1,
    0.3,
    1,
    3,
    10,
)  # of the paper's rate, or on a narrow backbone of that in support/variants.py
DIVERGED = "the loss is "  # what train.py says where a rate is too high


class Search(Struct):
    """What was tried and found for a cell, in percent of the validation clips.

    The accuracy is null where the loss was not finite.
    """

    dataset: Name
    method: Name
    weights: Text
    shots: Count | None
    rr: Size | None
    prompts: Size | None
    kernel: Size | None
    seed: Seed
    epochs: Count
    options: list[Name]  # of train.py
    usual: LearningRate  # the paper's, but on narrow backbones
    tried: list[tuple[LearningRate, Percent | None]]
    best: LearningRate

    def __post_init__(self):
        if self.best != best_of(self.tried, self.usual):
            raise ValueError(f"best: Expected the best of those tried, got {self.best:g}")

    def at_the_edge(self) -> bool:
        return self.best in (self.tried[0][0], self.tried[-1][0])


class Searches(Struct):
    """tuned.json."""

    searches: list[Search]

    def by_cell(self) -> dict[Cell, Search]:
        return {
            Cell(s.dataset, s.method, 0, s.weights, s.shots, s.rr, s.prompts, s.kernel): s
            for s in self.searches
        }


def best_of(tried: list[tuple[float, float | None]], usual: float) -> float | None:
    """The rate with the highest accuracy, of equals the nearest to the usual. None: all diverge."""
    ranked = []
    for lr, accuracy in tried:
        if accuracy is not None:
            ranked.append((accuracy, -abs(math.log(lr / usual)), lr))
    return max(ranked)[2] if ranked else None


def file_of(plan: Plan) -> Path:
    return plan.out / "tuned.json"


def read_tuned(plan: Plan) -> dict[Cell, Search]:
    """tuned.json, by the cells with the paper's rates and seed 0. UserError if it is damaged.

    Empty if there is none yet.
    """
    file = file_of(plan)
    if not file.exists():
        return {}
    return read_json(
        file, Searches, mend="delete it: `tune` makes it again from the runs"
    ).by_cell()


def rates_of(cell: Cell) -> dict[float, Cell]:
    """The cells of a search by their learning rates. The `cell` itself has the usual rate."""
    usual = method_of(cell).lr
    rates = {usual if factor == 1 else float(f"{factor * usual:.3g}"): factor for factor in FACTORS}
    return {
        lr: replace(cell, lr=None if factor == 1 else lr) for lr, factor in rates.items() if lr <= 1
    }


def cells_to_try(plan: Plan) -> dict[Cell, dict[float, Cell]]:
    """For each cell of the targets the cells of its search; without those that tuned.json has.

    UserError where there are no validation clips, or where tuned.json has another search.
    """
    if plan.search_seed in plan.seeds:
        raise UserError(f"--search-seed {plan.search_seed} is one of those to report: give another")
    for dataset in dict.fromkeys(
        dataset for target in plan.targets for dataset, _ in columns_of(target, plan)
    ):
        if not (
            own_validates(dataset, plan) if DATASETS[dataset].own else DATASETS[dataset].validate
        ):
            raise UserError(
                f"{dataset} has no validation clips to judge learning rates by: "
                "leave it out, --datasets"
            )
    left = {}
    for cell in cells_of(replace(plan, seeds=[plan.search_seed], setting="paper")):
        now = {"seed": plan.search_seed, "epochs": epochs_of(cell, plan), "options": plan.passed}
        if old := plan.tuned.get(replace(cell, seed=0)):
            for name, value in now.items():
                if getattr(old, name) != value:
                    raise UserError(
                        f"{file_of(plan)} has a search for {cell.method} on "
                        f"{cell.dataset} with {name} "
                        f"{getattr(old, name)}, not {value}: give another --out, or delete it"
                    )
        else:
            left[cell] = rates_of(cell)
    return left


def own_validates(name: str, plan: Plan) -> bool:
    """Whether the user's own sounds have validation clips in every fold of the search."""
    dataset = load_dataset(name, plan.data_dir.get(name), plan.cache_dir)
    return all(split.val for split in folds_of(dataset, plan.search_seed).values())


def search(plan: Plan) -> dict[Cell, str]:
    """Try the rates of all cells that tuned.json does not have yet, and write there what is found.

    Returns the cells that failed, with the reasons.
    """
    wanted = cells_to_try(plan)
    done, failed = train_cells([cell for rates in wanted.values() for cell in rates.values()], plan)
    failed = {cell: why for cell, why in failed.items() if not why.startswith(DIVERGED)}
    found = []
    for cell, rates in wanted.items():
        if failed.keys() & {*rates.values()}:
            continue
        tried = [(lr, judged(done[one]) if one in done else None) for lr, one in rates.items()]
        usual = method_of(cell).lr
        if (best := best_of(tried, usual)) is None:
            failed[cell] = "the loss is not finite at any learning rate"
            continue
        entry = {key: value for key, value in asdict(cell).items() if key != "lr"}
        entry |= {"epochs": epochs_of(cell, plan), "options": plan.passed}
        found.append(Search(**entry, usual=usual, tried=tried, best=best))
        shown = ", ".join(
            f"{lr:g} {'-' if accuracy is None else f'{accuracy:.2f}'}" for lr, accuracy in tried
        )
        say(
            f"{cell.name}: validation accuracy by learning rate {shown}; "
            f"best {best:g}, without search {usual:g}"
        )
    plan.out.mkdir(parents=True, exist_ok=True)
    with FileLock(plan.out / ".tuned.lock"):  # another search may have ended meanwhile
        known = read_tuned(plan) | Searches(found).by_cell()
        write_json(file_of(plan), to_builtins(Searches(list(known.values()))))
    return failed


def judged(result: dict) -> float:
    """The accuracy on validation clips, over all folds. UserError if there are none."""
    accuracies = [fold["validation_accuracy"] for fold in result["folds"]]
    if None in accuracies:
        raise UserError(
            "there are no validation clips to judge learning rates by: give the dataset some"
        )
    return round(statistics.mean(accuracies), 4)


def note_of(cells: list[Cell], plan: Plan) -> str:
    """What a reader must know of tuned numbers. `cells`: of a table, with the paper's rates."""
    found = {cell: plan.tuned[replace(cell, seed=0)] for cell in cells}
    seeds = ", ".join(sorted({str(one.seed) for one in found.values()}))
    options = sorted({" ".join(one.options) for one in found.values() if one.options})
    edge = sorted(
        {f"{cell.method} on {cell.dataset}" for cell, one in found.items() if one.at_the_edge()}
    )
    return (
        f"Tuned: of {', '.join(f'{f:g}' for f in FACTORS)} times the method's learning rate the "
        f"one with the best validation accuracy, by seed {seeds}: the same search for every "
        "method. In cross-validation the validation clips of a fold are test clips of another."
        + (
            f" The search had the options {', '.join(f'`{words}`' for words in options)}."
            if options
            else ""
        )
        + (f" Best at its edge, so that another may be better: {', '.join(edge)}." if edge else "")
    )
