"""The paper's experiments: every table and figure by one command, the paper's number beside the measured one.

    python -m tools.experiments table1 --datasets demo --seeds 0,1,2   # offline; any dataset of train.py will do
    python -m tools.experiments all --dry-run                          # what would be trained, and what that takes
    python -m tools.experiments plot experiments/demo/lora/seed0       # confusion matrix and learning curves of a run

cells.py says what is compared, campaign.py trains it, figures.py draws; here are the tables and the command.
"""

import math
import signal
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import petl
import train
from data import DATASETS, Dataset, folds_of, load_dataset
from sounds.paper import ESC50, FSC, GSC, US8K
from support.command import Parser, UserError, choose_device, exit_code, in_words, nearest, numbers, positive
from support.files import default_cache_dir, table_of, write_text
from support.processes import say
from tools import cells, figures
from tools.campaign import options, take_results, train_cells
from tools.cells import FIGURES, PRINTED, TABLES, TARGETS, Cell, Plan, cell_of, columns_of, lines_of

# ---------------------------------------------------------------------------------------------------------- the tables


@dataclass(frozen=True)
class Measured:
    """What the runs of one row and column gave, over all folds of all seeds."""

    mean: float  # accuracy in percent
    std: float | None  # sample standard deviation; None for a single run
    runs: int
    seeds: int
    seconds: float  # of training, all folds of one seed
    trained: int  # parameters besides the final LayerNorm and head, unless nothing else trains
    head: int  # parameters of the final LayerNorm and head


def measure(same: Iterable[Cell], done: dict[Cell, dict]) -> Measured | None:
    """The finished ones of cells that are the `same` but for the seed."""
    results = [done[cell] for cell in same if cell in done]
    if not results:
        return None
    accuracies, count = [f["accuracy"] for result in results for f in result["folds"]], results[0]["parameters"]
    return Measured(
        mean=statistics.mean(accuracies), std=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        runs=len(accuracies), seeds=len(results), seconds=statistics.mean(result["seconds"] for result in results),
        trained=count["petl"] or count["head"], head=count["head"],
    )  # fmt: skip


def marked(numbers: list[str | None]) -> list[str]:
    """The numbers of a column, None where there is none: the best **bold**, the second best in _italics_."""
    best = sorted({float(number) for number in numbers if number is not None}, reverse=True)[:2]
    marks = dict(zip(best, ("**", "_"), strict=False)) if len(best) > 1 else {}
    return ["missing" if n is None else f"{marks.get(float(n), '')}{n}{marks.get(float(n), '')}" for n in numbers]


def beside(texts: list[str], numbers: list[str | None]) -> list[str]:
    """Each text with the paper's number in parentheses, where there is one."""
    return [text if n is None else f"{text} ({n})" for text, n in zip(texts, numbers, strict=True)]


def render(target: str, done: dict[Cell, dict], plan: Plan) -> tuple[str, list[dict]]:
    """A table as Markdown, and as one record for each of its cells."""
    table, lines, columns = TABLES[target], lines_of(target, plan), columns_of(target, plan)
    names = [name for name, *_ in lines]
    measured = [
        [measure([cell_of(d, method, seed, weights[d], shots) for seed in plan.seeds], done) for d, shots in columns]
        for _, method, weights in lines
    ]  # a list for each line
    found = [[m for m in line if m] for line in measured]

    text = {"method": names, "trained": [span({m.trained for m in line}) for line in found]}
    if all(cells.shape_of(weights).dim == 768 for _, _, line in lines for weights in line.values()):
        text["trained"] = beside(text["trained"], [table.numbers.get((name, "params")) for name in names])
    records = []
    for i, (dataset, shots) in enumerate(columns):
        column = [line[i] for line in measured]
        ours = marked([m and f"{m.mean:.2f}" for m in column])
        for j, m in enumerate(column):
            if m and m.std is not None:
                ours[j] += f" +- {m.std:.2f}"
            if m and m.seeds < len(plan.seeds):
                ours[j] += f" [{m.seeds} of {len(plan.seeds)} seeds]"
        key = f"{dataset} {shots}" if shots else dataset
        theirs = [table.numbers.get((name, key)) for name in names]
        text[PRINTED.get(dataset, dataset) + (f", {shots}" if shots else "")] = beside(ours, theirs)
        records += [
            {"table": target, "row": name, "method": method, "dataset": dataset, "shots": shots,
             "weights": weights[dataset], **(asdict(m) if m else dict.fromkeys(f.name for f in fields(Measured))),
             "paper": number}
            for (name, method, weights), m, number in zip(lines, column, theirs, strict=True)
        ]  # fmt: skip
    theirs = [table.numbers.get((name, "avg")) for name in names]
    datasets = tuple(dict.fromkeys(dataset for dataset, _ in columns))
    if len(datasets) > 1 and not table.few_shot:
        ours = marked([None if None in line else f"{statistics.mean(m.mean for m in line):.2f}" for line in measured])
        text["Avg"] = beside(ours, theirs) if datasets == table.datasets else ours
    if any(theirs) and not set(datasets) & set(table.datasets):  # other sounds: at least the order can be compared
        text["Avg in the paper"] = [mark if n else "-" for mark, n in zip(marked(theirs), theirs, strict=True)]
    text["seconds"] = [f"{sum(m.seconds for m in line):.0f}" if line else "-" for line in found]
    everything = [m for line in found for m in line]
    notes = "\n".join(f"- {note}" for note in notes_of(target, datasets, everything, plan))
    return f"### {table.title}\n\n{markdown(text)}\n\n{notes}\n", records


def span(numbers: set[int]) -> str:
    """One number, or the smallest and largest of several: what `linear` trains depends on the number of classes."""
    return " - ".join(f"{number:,}" for number in sorted({min(numbers), max(numbers)})) if numbers else "-"


def markdown(columns: dict[str, list[str]]) -> str:
    """A table of {heading: texts}; the first column to the left, the others to the right."""
    widths = [max(len(text) for text in (head, *texts)) for head, texts in columns.items()]
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    lines = [[t.rjust(w) if i else t.ljust(w) for i, (t, w) in enumerate(zip(r, widths, strict=True))] for r in rows]
    lines.insert(1, ["-" * (width - 1) + (":" if i else "-") for i, width in enumerate(widths)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def notes_of(target: str, datasets: tuple[str, ...], found: list[Measured], plan: Plan) -> list[str]:
    """What a reader must know of the numbers, above all where the runs are not those of the paper."""
    table = TABLES[target]
    seeds = f"seed{'s' * (len(plan.seeds) > 1)} {', '.join(map(str, plan.seeds))}"
    runs = {m.runs for m in found}
    spread = f", +- the sample standard deviation over {span(runs)} runs (folds and seeds)" if runs - {1} else ""
    theirs = ", in parentheses the paper's" if set(datasets) & set(table.datasets) else ""
    notes = [f"Test accuracy in percent, {seeds}{spread}{theirs}. Best **bold**, second best in _italics_."]
    for dataset in datasets:
        cell = Cell(dataset, "linear", 0, plan.weights or DATASETS[dataset].weights, 1 if table.few_shot else None)
        epochs, usual = cells.epochs_of(cell, plan), DATASETS[dataset].epochs
        text = f"{PRINTED.get(dataset, dataset)}: weights `{cell.weights}`, {epochs} epoch{'s' * (epochs > 1)}"
        if epochs != usual:
            why = "" if plan.epochs else ": few clips make few steps"
            text += f" instead of {usual}{why}"
        others = {"dataset": dataset not in table.datasets, "weights": cell.weights != "audioset",
                  "number of epochs": plan.epochs not in (None, usual)}  # fmt: skip
        others = ", ".join(name for name, other in others.items() if other)
        notes.append(f"{text}." + (f" Not as in the paper: {others}." if others else ""))
    heads = f" ({span({m.head for m in found})})" if found else ""
    return [
        *notes,
        *([table.note] if table.note else []),
        f"Trained: parameters besides the final LayerNorm and head{heads}, which every method trains and `linear` "
        "alone. Seconds: training of one seed, all folds and datasets.",
        *([f"Options of train.py: `{' '.join(plan.passed)}`."] if plan.passed else []),
    ]


def file_of(target: str, plan: Plan) -> Path:
    """Where a table or figure goes, without suffix: other datasets or weights do not replace those of the paper."""
    table = TARGETS[target]
    words = [target, *(plan.datasets if tuple(plan.datasets or table.datasets) != table.datasets else [])]
    words += [f"weights_{cells.slug(plan.weights)}"] if plan.weights else []
    return plan.out / ("tables" if target in TABLES else "figures") / "-".join(words)


def write_table(target: str, done: dict[Cell, dict], plan: Plan) -> None:
    content, records = render(target, done, plan)
    path = file_of(target, plan)
    write_text(Path(f"{path}.md"), content)
    write_text(Path(f"{path}.csv"), table_of(records[0], records))
    say(f"\n{content}\nwritten to {path}.md and .csv")


# ---------------------------------------------------------------------------------------------------------- the figures


def write_tokens(target: str, done: dict[Cell, dict], plan: Plan) -> None:
    """Figure 2 from the cells that are finished, one for each dataset."""
    columns, runs = columns_of(target, plan), {}
    for (dataset, _), (name, method, weights) in product(columns, lines_of(target, plan)):
        cell = Cell(dataset, method, plan.seeds[0], weights[dataset])
        if cell in done:
            runs.setdefault(dataset, {})[f"{name}, {done[cell]['accuracy']:.1f} %"] = plan.out / cell.name
    for dataset, _ in columns:
        path = Path(f"{file_of(target, plan)}{f'-{dataset}' if len(columns) > 1 else ''}")
        if dataset in runs:
            data_dir, device = plan.data_dir.get(dataset), choose_device(plan.device)
            figures.draw_tokens(runs[dataset], path, data_dir, plan.cache_dir, device)
        else:
            say(f"{FIGURES[target].title}: no cell of {dataset} is finished, nothing to draw")


def write_curves(target: str, done: dict[Cell, dict], plan: Plan) -> None:
    """Figure 3 or 4 from the cells that are finished, a panel for each dataset."""
    path, panels, records = file_of(target, plan), {}, []
    for (dataset, _), (name, method, weights) in product(columns_of(target, plan), lines_of(target, plan)):
        seeds = [cells.budgets(dataset, method, seed, weights[dataset]) for seed in plan.seeds]
        for same in zip(*seeds, strict=True):  # cells that differ in the seed
            if m := measure(same, done):
                curves = panels.setdefault(PRINTED.get(dataset, dataset), {})
                curves.setdefault(name, []).append((m.trained, m.mean, m.std or 0))
                records.append({"dataset": dataset, "curve": name, "cell": same[0].name, **asdict(m)})
    if not panels:
        return say(f"{FIGURES[target].title}: no cell is finished, nothing to draw")
    figures.draw_curves(panels, "Full FT", path)
    return write_text(Path(f"{path}.csv"), table_of(records[0], records))


# ---------------------------------------------------------------------------------------------- what would be trained


def dry_run(listed: list[Cell], plan: Plan) -> None:
    """List the cells with the numbers of `size_of`, and whether they are finished."""
    done, failed = {}, {}
    left = {*take_results(listed, done, failed, plan), *failed}
    sizes = {cell: size_of(cell, plan) for cell in listed}
    width = max(len(cell.name) for cell in listed)
    say(f"{'cell':<{width}}  {'clips':>11}  {'steps':>9}  state")
    for cell, size in sizes.items():
        clips, steps = (f"{n:,}" for n in size) if size else "--"
        state = f"conflict: {failed[cell]}" if cell in failed else "to do" if cell in left else "finished"
        say(f"{cell.name:<{width}}  {clips:>11}  {steps:>9}  {state}")
    clips, steps = (sum(sizes[cell][i] for cell in left if sizes[cell]) for i in (0, 1))
    unknown = sum(sizes[cell] is None for cell in left)
    without = f"; {unknown} more have no count, their data is not here yet" if unknown else ""
    say(f"{len(listed)} cells, {len(done)} finished; the rest trains on {clips:,} clips in {steps:,} steps{without}")


def size_of(cell: Cell, plan: Plan) -> tuple[int, int] | None:
    """Clips and steps that a cell trains with, over all epochs and folds; None where the data are not here."""
    dataset = local_dataset(cell.dataset, plan.data_dir.get(cell.dataset), plan.cache_dir)
    if dataset is None:
        return None
    run = train.parse([*options(cell, plan), "--device", "cpu"])
    batch, folds = run.batch_size or DATASETS[cell.dataset].batch_size, folds_of(dataset, cell.seed)
    train_on = [len(split.train) for fold, split in folds.items() if fold in (run.folds or folds)]
    train_on = [cell.shots * len(dataset.classes) if cell.shots else n for n in train_on]
    return run.epochs * sum(train_on), run.epochs * sum(math.ceil(n / batch) for n in train_on)


@lru_cache
def local_dataset(name: str, data_dir: Path | None, cache_dir: Path) -> Dataset | None:
    """The dataset, or None if it would have to be fetched."""
    source = {"esc50": ESC50, "esc10": ESC50, "us8k": US8K, "gsc": GSC, "fsc": FSC}.get(name)
    if source and data_dir is None and not (cache_dir / source.folder).exists():
        return None
    return load_dataset(name, data_dir, cache_dir)


# ---------------------------------------------------------------------------------------------------- the command line

PASSED = ("--folds", "--batch-size", "--micro-batch", "--seconds", "--pool", "--compile", "--recompute", "--skip-bad")


def names(text: str) -> list[str]:
    return list(dict.fromkeys(name for name in text.split(",") if name))


def parse(argv: list[str]) -> Plan:
    own, passed = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = Parser(
        prog="python -m tools.experiments",
        usage="%(prog)s TARGET... [options] [-- options of train.py]\n       %(prog)s plot RUN",
        description="Train what a table or figure of the paper compares, and put it beside the paper's numbers.",
    )
    add = parser.add_argument
    add("targets", nargs="+", metavar="TARGET", help=f"{', '.join(TARGETS)}, or all")
    add("--datasets", type=names, default=[], metavar="D,D", help="any of train.py, in place of the paper's")
    add("--methods", type=names, default=[], metavar="M,M", help="only these rows, by the names of --list-methods")
    add("--add", type=names, default=[], metavar="M,M", help="methods that get a row in every table")
    add("--random", type=names, default=[], metavar="M,M", help="Table I also from random weights, for these methods")
    add("--seeds", type=numbers, default=[0], metavar="0,1,2", help="each cell once for each of these")
    add("--epochs", type=positive, help=f"default: the dataset's, in Table II at least {cells.FEW_SHOT_EPOCHS}")
    add("--weights", help="the backbone; default: the dataset's")
    add("--data-dir", action="append", default=[], metavar="[D=]PATH", help="where a dataset is; once for each of them")
    add("--cache-dir", type=Path, default=default_cache_dir(), help="for downloads and features (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", help="of the arithmetic, see train.py")
    add("--jobs", type=positive, default=1, metavar="N", help="train N cells at a time; on a CPU they share the cores")
    add("--dry-run", action="store_true", help="list the cells, their clips and steps; train nothing")
    add("--out", type=Path, default=Path("experiments"), help="runs, tables/ and figures/ go here (%(default)s)")
    plan = Plan(**vars(parser.parse_args(own)), passed=passed)
    for name in plan.targets:
        nearest(name, [*TARGETS, "all"], "target", f" There are {', '.join([*TARGETS, 'all'])}")
    for name in plan.datasets:
        nearest(name, DATASETS, "dataset", f" There are {', '.join(DATASETS)}")
    tables = {name: TARGETS[name] for name in (TARGETS if "all" in plan.targets else plan.targets)}
    for name in [*plan.methods, *plan.add, *plan.random]:
        petl.find(name)
    for name in plan.methods:
        if not any(name in [method.split()[0] for method in table.rows.values()] for table in tables.values()):
            raise UserError(f"--methods {name}: no row of {', '.join(tables)} is that; --add {name} makes one")
    if plan.random and "table1" not in tables:
        raise UserError("--random belongs to table1: add it to the targets, or leave --random out")
    unknown = [word for word in passed if word.startswith("-") and word.split("=")[0] not in PASSED]
    if unknown:
        raise UserError(f"{unknown[0]} behind --: of train.py's options only {', '.join(PASSED)} fit all cells")
    data_dir = data_dirs(plan.data_dir, [d for target in tables for d, _ in columns_of(target, plan)])
    return replace(plan, data_dir=data_dir, targets=[target for target in tables if lines_of(target, plan)])


def data_dirs(words: list[str], datasets: list[str]) -> dict[str, Path]:
    """{dataset: folder} of DATASET=PATH; with one dataset PATH alone is enough."""
    found = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or name not in DATASETS:
            if len(set(datasets)) > 1:
                raise UserError(f"--data-dir {word}: say of which dataset, like {datasets[0]}={word}")
            name, path = datasets[0], word
        found[name] = Path(path)
    return found


def start(argv: list[str]) -> int:
    if argv[:1] == ["plot"]:
        figures.plot(argv[1:])
        return 0
    plan = parse(argv)
    listed = cells.cells_of(plan)
    # Wrong options of train.py or a wrong checkpoint: now, not once for each cell. (This process needs no GPU.)
    train.parse([*options(listed[0], plan), *(["--device", "cpu"] if plan.device == "auto" else [])])
    if plan.weights:
        cells.shape_of(plan.weights)
    if plan.dry_run:
        dry_run(listed, plan)
        return 0
    if any(target in FIGURES for target in plan.targets):
        figures.pyplot()  # missing? now, not after the training
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the campaign ends its workers
    try:
        done, failed = train_cells(listed, plan)
        for target in plan.targets:
            write = write_table if target in TABLES else write_tokens if target == "fig2" else write_curves
            write(target, done, plan)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"{in_words(error, plan.out)}; is --out a folder to write to?") from None
    for cell, why in failed.items():
        print(f"missing: {cell.name}: {why}", file=sys.stderr)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: start(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
