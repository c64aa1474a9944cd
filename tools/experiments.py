"""The paper's experiments: every table and figure by one command, beside the paper's numbers.

    python -m tools.experiments table1 --datasets demo --seeds 0,1,2  # any dataset of train.py
    python -m tools.experiments all --dry-run                         # what would be trained
    python -m tools.experiments tune table1 --datasets demo           # learning rates first
    python -m tools.experiments claims --datasets demo                # do the paper's claims hold?
    python -m tools.experiments compare RUN RUN                       # is one method better?
    python -m tools.experiments keep experiments results/demo.runs.xz # all runs in one small file
    python -m tools.experiments show results/demo.runs.xz             # the same tables from it

This file is the command. cells.py says what is compared, campaign.py trains it, tune.py searches,
finished.py reads what runs leave, evidence.py compares, claims.py concludes, and tables.py and
figures.py show.
"""

import argparse
import signal
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

from filelock import FileLock

import petl
import train
from data import DATASETS
from support.command import (
    Parser,
    UserError,
    exit_code,
    first_of,
    nearest,
    numbers,
    positive,
    printable,
)
from support.files import default_cache_dir, table_of, write_text
from support.processes import say
from support.records import LOCK
from tools import cells, evidence, figures, tune
from tools.campaign import options, train_cells
from tools.cells import FIGURES, PRINTED, TARGETS, Plan, columns_of, lines_of, rated
from tools.finished import keep, read_kept, remember
from tools.tables import file_of, measure, write_table

# -------------------------------------------------------------------------------------- the figures


def write_curves(target, done, plan):
    """Figure 3 or 4 from the cells that are finished, a panel for each dataset."""
    for setting in plan.settings:
        panels = {}
        records = []
        curves = product(columns_of(target, plan), lines_of(target, plan))
        for (dataset, _), (name, method, weights) in curves:
            points = []
            for cell in cells.budgets(dataset, method, 0, weights[dataset]):
                same = [rated(replace(cell, seed=seed), setting, plan) for seed in plan.seeds]
                if m := measure(same, done):
                    points.append((m.trained, m.mean, m.low, m.high))
                    record = {"dataset": dataset, "curve": name, "cell": same[0].name}
                    records.append(record | asdict(m))
            if points:
                panels.setdefault(PRINTED.get(dataset, dataset), {})[name] = points
        if panels:
            path = file_of(target, plan, setting)
            figures.draw_curves(panels, path)
            write_text(Path(f"{path}.csv"), table_of(records[0], records))


# --------------------------------------------------------------------------------- the command line

PASSED = ["--folds", "--batch-size", "--micro-batch", "--seconds", "--pool", "--compile"]
PASSED += ["--skip-bad", "--device", "--dtype"]


def names(text):
    return list(dict.fromkeys(text.split(",")))


def parse(argv: list[str]) -> Plan:
    parser = Parser(
        prog="python -m tools.experiments",
        usage="%(prog)s [tune] TARGET... [options] [-- options of train.py]\n"
        "       %(prog)s compare RUN RUN...\n"
        "       %(prog)s keep FOLDER FILE\n"
        "       %(prog)s show FILE [TARGET... [options]]",
        description="Train what a table or figure of the paper compares, beside its numbers. "
        "With tune, first search a learning rate for each method. compare says which of two "
        "finished runs is better. keep writes all finished runs to one small file, and show makes "
        "the tables and figures from it.",
    )
    add = parser.add_argument
    methods = {"type": names, "default": []}
    add("targets", nargs="+", metavar="TARGET", help=f"{', '.join(TARGETS)}, or all")

    add = parser.add_argument_group("what to train").add_argument
    add("--datasets", type=names, default=[], help="these datasets; default: the paper's")
    add("--methods", **methods, help="only the rows of these methods")
    add("--add", **methods, help="also a row for these methods in every table")
    add("--random", **methods, help="also rows from random weights, for these methods of Table I")
    add(
        "--seeds",
        type=numbers,
        default=[0],
        help="train with each of these, as in 0,1,2; default: 0",
    )
    add("--epochs", type=positive, help="default: the dataset's, in Table II at least 30")
    add("--weights", help="the backbone, as for train.py; default: the dataset's")
    add(
        "--setting",
        choices=["paper", "tuned", "both"],
        help="the paper's learning rates (default), those that `tune` has found, or both",
    )

    add = parser.add_argument_group("machine and files").add_argument
    add("--jobs", type=positive, default=1, help="train so many runs at a time")
    add("--dry-run", action="store_true", help="list the runs and train nothing")
    add("--out", type=Path, default=Path("experiments"), help="results (%(default)s)")
    add(
        "--data-dir",
        action="append",
        default=[],
        metavar="[DATASET=]PATH",
        help="where a dataset is, if not downloaded; may be given once for each dataset",
    )
    add("--cache-dir", type=Path, default=default_cache_dir(), help="downloads (%(default)s)")
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    args.passed = argv[end + 1 :]
    args.tune = args.targets[0] == "tune"
    if args.tune:
        args.targets.pop(0)
    if args.setting is None:
        args.setting = "both" if args.tune else "paper"
    if "all" in args.targets:
        args.targets = [*TARGETS]
    check(args)
    return Plan(**vars(args))


def check(args):
    """UserError for what the options name wrongly. Data folders get the names of their datasets."""
    if not args.targets:
        raise UserError("tune what? Name a table or figure")
    for name in args.targets:
        nearest(name, TARGETS, "target")
    for name in args.datasets:
        nearest(name, DATASETS, "dataset")
    for name in args.methods + args.add + args.random:
        petl.find(name)
    if args.setting != "paper" and tune.SEED in args.seeds:
        raise UserError(f"--seeds: {tune.SEED} chooses the learning rates: report others")
    for word in args.passed:
        if word.startswith("-") and word.split("=")[0] not in PASSED:
            fit = ", ".join(PASSED)
            raise UserError(f"{word} behind --: of train.py's options only {fit} fit all cells")
    folders = {}
    datasets = [dataset for name in args.targets for dataset, _ in columns_of(name, args)]
    for word in args.data_dir:
        name, _, path = word.partition("=")
        if path and name in DATASETS:
            folders[name] = Path(path)
        else:  # that of all datasets
            folders |= dict.fromkeys(datasets, Path(word))
    args.data_dir = folders
    if not any(claim.pairs(args) for claim in cells.CLAIMS):
        args.targets = [name for name in args.targets if name != "claims"]
    args.targets = [name for name in args.targets if lines_of(name, args)]
    if not args.targets:
        raise UserError(
            "--methods: no claim compares these with one another, and no table has them as rows, "
            "which --add makes"
        )


def start(argv):
    if argv[:1] == ["compare"]:
        return evidence.compare(argv[1:])
    if argv[:1] == ["keep"]:
        return keep_runs(argv[1:])
    if argv[:1] == ["show"]:
        return show_runs(argv[1:])
    plan = parse(argv)
    if plan.setting != "paper":
        plan = replace(plan, tuned=tune.read_tuned(plan))
    listed = tune.cells_to_try(plan) if plan.tune else cells.cells_of(plan)
    # Wrong options of train.py are found now, not once for each cell.
    for cell in listed[:1]:
        train.parse(["--device", "cpu", *options(cell, plan)])  # this process needs no GPU
    if plan.dry_run:
        train_cells(listed, plan)
        return 0
    evidence.stats()  # is a package missing? that is said before the training
    if any(target in FIGURES for target in plan.targets):
        figures.pyplot()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the campaign ends its workers
    failed = tune.search(plan) if plan.tune else {}
    if not failed:
        failed = train_and_write(replace(plan, tuned=tune.read_tuned(plan)) if plan.tune else plan)
    return print_failed(failed)


def train_and_write(plan: Plan) -> dict:
    """Train what is not finished, and write tables and figures. Returns the cells that failed."""
    done, failed = train_cells(cells.cells_of(plan), plan)
    if plan.kept and not done and not failed:
        raise UserError(
            f"{plan.out}: none of these runs is in it; say what is by --datasets and so on"
        )
    for target in plan.targets:
        write = write_curves if target in FIGURES else write_table
        write(target, done, plan)
        if not plan.kept:
            with FileLock(plan.out / LOCK):  # another campaign may write down its commands
                remember(plan.out, file_of(target, plan, plan.setting).name, words_of(target, plan))
    return failed


def print_failed(failed):
    """The reasons of the cells without a result. Returns the exit code."""
    for cell, why in failed.items():
        print(f"missing: {cell.name}: {printable(why)}", file=sys.stderr)
    return 1 if failed else 0


# ------------------------------------------------------------------------------- runs that are kept


def words_of(target: str, plan: Plan) -> list[str]:
    """The words that make this table or figure once more, of runs that are finished."""
    words = [target, "--setting", plan.setting]
    for name in ("datasets", "methods", "add", "random", "seeds"):
        if values := getattr(plan, name):
            words += [f"--{name}", ",".join(map(str, values))]
    for name in ("epochs", "weights"):
        if value := getattr(plan, name):
            words += [f"--{name}", str(value)]
    return [*words, "--", *plan.passed]


def keep_runs(argv):
    """The command `keep`: what the tables are made of, in one file."""
    parser = Parser(
        prog="python -m tools.experiments keep",
        description="Write one small file of all finished runs in a folder: settings, results, the "
        "answers to all test clips, versions of packages, the commands that made tables. `show` "
        "makes the tables from it.",
    )
    parser.add_argument("folder", type=Path, help="the --out of the campaign, as experiments")
    parser.add_argument("file", type=Path, help="as results/demo.runs.xz")
    args = parser.parse_args(argv)
    say(f"{keep(args.folder, args.file)} runs written to {args.file}")


def show_runs(argv):
    """The command `show`: tables and figures from the file that `keep` wrote."""
    parser = Parser(
        prog="python -m tools.experiments show",
        usage="%(prog)s [-h] FILE [TARGET... [options]]",
        description="Make tables and figures from a file of runs, beside the file, without the "
        "runs and without training: all that were made before it was written, or of these the "
        "TARGETs. With options of tools.experiments the TARGETs are made as these say.",
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="TARGET")
    args = parser.parse_args(argv)
    kept = read_kept(args.file)
    failed = {}
    commands = [*kept.commands.values()]
    if args.words and set(args.words) <= set(TARGETS):  # without options
        commands = [words for words in commands if words[0] in args.words]
        if missing := set(args.words) - {words[0] for words in commands}:
            raise UserError(
                f"{args.file}: no command of its campaign made {first_of(sorted(missing))}; make "
                "it from the runs that are there, by options such as --datasets and --seeds"
            )
    elif args.words:
        commands = [args.words]
    for words in commands:
        plan = replace(parse(words), kept=kept, out=args.file)
        if plan.tune:
            raise UserError("tune: `show` searches for nothing; --setting shows what was found")
        failed |= train_and_write(replace(plan, tuned=tune.read_tuned(plan)))
    return print_failed(failed)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: start(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
