"""The paper's experiments: every table and figure by one command, beside the paper's numbers.

    python -m tools.experiments table1 --datasets demo --seeds 0,1,2  # any dataset of train.py
    python -m tools.experiments all --dry-run                         # what would be trained
    python -m tools.experiments tune table1 --datasets demo           # learning rates first
    python -m tools.experiments claims --datasets demo                # do the paper's claims hold?
    python -m tools.experiments compare RUN RUN                       # is one method better?

This file is the command. cells.py says what is compared, campaign.py trains it, tune.py searches,
evidence.py compares, claims.py concludes, and tables.py and figures.py show.
"""

import signal
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import petl
import train
from data import DATASETS
from support.command import (
    Parser,
    UserError,
    exit_code,
    nearest,
    no_place,
    numbers,
    positive,
    reason_of,
)
from support.files import default_cache_dir, table_of, write_text
from support.processes import say
from tools import cells, evidence, figures, tune
from tools.campaign import options, take_results, train_cells
from tools.cells import FIGURES, PRINTED, TARGETS, Cell, Plan, columns_of, lines_of, rated
from tools.tables import file_of, measure, write_table

# -------------------------------------------------------------------------------------- the figures


def write_curves(target: str, done: dict[Cell, dict], plan: Plan) -> None:
    """Figure 3 or 4 from the cells that are finished, a panel for each dataset."""
    for setting in plan.settings:
        path = file_of(target, plan, setting)
        panels = {}
        records = []
        curves = product(columns_of(target, plan), lines_of(target, plan))
        for (dataset, _), (name, method, weights) in curves:
            seeds = [cells.budgets(dataset, method, seed, weights[dataset]) for seed in plan.seeds]
            for same in zip(*seeds, strict=True):  # cells that differ in the seed
                same = [rated(cell, setting, plan) for cell in same]
                if m := measure(same, done):
                    panel = panels.setdefault(PRINTED.get(dataset, dataset), {})
                    panel.setdefault(name, []).append((m.trained, m.mean, m.low, m.high))
                    record = {"dataset": dataset, "curve": name, "cell": same[0].name}
                    records.append(record | asdict(m))
        if panels:
            figures.draw_curves(panels, path)
            write_text(Path(f"{path}.csv"), table_of(records[0], records))
        else:
            say(f"{FIGURES[target].title}: no cell is finished, nothing to draw")


# ---------------------------------------------------------------------------- what would be trained


def dry_run(listed: list[Cell], plan: Plan) -> None:
    """List the cells, and whether they are finished."""
    done = {}
    failed = {}
    left = take_results(listed, done, failed, plan)
    width = max(len(cell.name) for cell in listed)
    for cell in listed:
        state = "to do" if cell in left else "finished"
        if cell in failed:
            state = f"conflict: {failed[cell]}"
        say(f"{cell.name:<{width}}  {state}")
    say(f"{len(listed)} cells, {len(done)} finished")


# --------------------------------------------------------------------------------- the command line

PASSED = (
    "--folds",
    "--batch-size",
    "--micro-batch",
    "--seconds",
    "--pool",
    "--compile",
    "--skip-bad",
)


def names(text: str) -> list[str]:
    return list(dict.fromkeys(name for name in text.split(",") if name))


def parse(argv: list[str]) -> Plan:
    own, passed = (
        (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    )
    parser = Parser(
        prog="python -m tools.experiments",
        usage="%(prog)s [tune] TARGET... [options] [-- options of train.py]\n"
        "       %(prog)s compare RUN RUN...",
        description="Train what a table or figure of the paper compares, beside its numbers.",
    )
    add = parser.add_argument
    add("targets", nargs="+", metavar="TARGET", help=f"{', '.join(TARGETS)}, or all")
    add(
        "--datasets",
        type=names,
        default=[],
        metavar="D,D",
        help="any of train.py, in place of the paper's",
    )
    add(
        "--methods",
        type=names,
        default=[],
        metavar="M,M",
        help="only these rows, by the names of --list-methods",
    )
    add(
        "--add", type=names, default=[], metavar="M,M", help="methods that get a row in every table"
    )
    add(
        "--random",
        type=names,
        default=[],
        metavar="M,M",
        help="Table I also from random weights, for these methods",
    )
    add(
        "--seeds",
        type=numbers,
        default=[0],
        metavar="0,1,2",
        help="each cell once for each of these",
    )
    add(
        "--epochs",
        type=positive,
        help=f"default: the dataset's, in Table II at least {cells.FEW_SHOT_EPOCHS}",
    )
    add("--weights", help="the backbone; default: the dataset's")
    add(
        "--data-dir",
        action="append",
        default=[],
        metavar="[D=]PATH",
        help="where a dataset is; once for each of them",
    )
    add(
        "--cache-dir",
        type=Path,
        default=default_cache_dir(),
        help="for downloads and features (%(default)s)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", help="of the arithmetic, see train.py")
    add(
        "--jobs",
        type=positive,
        default=1,
        metavar="N",
        help="train N cells at a time; on a CPU they share the cores",
    )
    add("--dry-run", action="store_true", help="list the cells; train nothing")
    add(
        "--out",
        type=Path,
        default=Path("experiments"),
        help="runs, tables/ and figures/ go here (%(default)s)",
    )
    add(
        "--setting",
        choices=["paper", "tuned", "both"],
        help="the paper's learning rates, those that `tune TARGET...` "
        "has found, or both, the default after a search",
    )
    add(
        "--search-seed",
        type=positive,
        default=1000,
        help="of `tune`: none of those to report (%(default)s)",
    )
    plan = Plan(**vars(parser.parse_args(own)), passed=passed)
    if tuning := plan.targets[0] == "tune":
        plan = replace(
            plan,
            tune=True,
            targets=plan.targets[1:] or parser.error("tune what? Name a table or figure"),
        )
    plan = replace(plan, setting=plan.setting or ("both" if tuning else "paper"))
    for name in plan.targets:
        nearest(name, [*TARGETS, "all"], "target")
    for name in plan.datasets:
        nearest(name, DATASETS, "dataset")
    tables = {name: TARGETS[name] for name in (TARGETS if "all" in plan.targets else plan.targets)}
    for name in [*plan.methods, *plan.add, *plan.random]:
        petl.find(name)
    for name in plan.methods:
        if not any(
            name in [method.split()[0] for method in table.rows.values()]
            for table in tables.values()
        ):
            raise UserError(
                f"--methods {name}: no row of {', '.join(tables)} is that; --add {name} makes one"
            )
    if plan.random and "table1" not in tables:
        raise UserError("--random belongs to table1: add it to the targets, or leave --random out")
    unknown = [word for word in passed if word.startswith("-") and word.split("=")[0] not in PASSED]
    if unknown:
        raise UserError(
            f"{unknown[0]} behind --: of train.py's options only {', '.join(PASSED)} fit all cells"
        )
    datasets = [dataset for target in tables for dataset, _ in columns_of(target, plan)]
    data_dir = data_dirs(plan.data_dir, datasets)
    targets = [target for target in tables if lines_of(target, plan)]
    if "claims" in targets and not any(claim.pairs(plan) for claim in cells.CLAIMS):
        targets.remove("claims")
    if not targets:
        raise UserError("--methods: no claim compares these with one another")
    return replace(plan, data_dir=data_dir, targets=targets)


def data_dirs(words: list[str], datasets: list[str]) -> dict[str, Path]:
    """{dataset: folder} of DATASET=PATH; with one dataset PATH alone is enough."""
    found = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or name not in DATASETS:
            if len(set(datasets)) > 1:
                raise UserError(
                    f"--data-dir {word}: say of which dataset, like {datasets[0]}={word}"
                )
            name = datasets[0]
            path = word
        found[name] = Path(path)
    return found


def start(argv: list[str]) -> int | None:
    if argv and argv[0] == "compare":
        return evidence.compare(argv[1:])
    plan = parse(argv)
    if plan.tune or plan.setting != "paper":
        plan = replace(plan, tuned=tune.read_tuned(plan))
    left = tune.cells_to_try(plan) if plan.tune else {}
    listed = [cell for rates in left.values() for cell in rates.values()] or cells.cells_of(plan)
    # Wrong options of train.py or a wrong checkpoint are found now, not once for each cell.
    words = options(listed[0], plan)
    if plan.device == "auto":  # this process needs no GPU
        words += ["--device", "cpu"]
    train.parse(words)
    if plan.weights:
        cells.shape_of(plan.weights)
    if plan.dry_run:
        return dry_run(listed, plan)
    evidence.stats()  # missing? now, not after the training
    if any(target in FIGURES for target in plan.targets):
        figures.pyplot()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the campaign ends its workers
    try:
        failed = tune.search(plan) if plan.tune else {}
        if not failed:
            plan = replace(plan, tuned=tune.read_tuned(plan))
            done, failed = train_cells(cells.cells_of(plan), plan)
            for target in plan.targets:
                if target in FIGURES:
                    write_curves(target, done, plan)
                else:
                    write_table(target, done, plan)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(reason_of(error, plan.out) + no_place(error, {"--out": plan.out})) from None
    for cell, why in failed.items():
        print(f"missing: {cell.name}: {why}", file=sys.stderr)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: start(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
