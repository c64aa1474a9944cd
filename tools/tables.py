"""The tables of tools/experiments.py: finished runs in, Markdown and CSV out, the paper's numbers beside the measured.

An accuracy stands with its interval, and with a mark where it cannot be told apart from the best of its column.
"""

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path

import petl
from data import DATASETS
from support.files import table_of, write_text
from support.processes import say
from tools import cells, claims, evidence, tune
from tools.campaign import method_of
from tools.cells import (
    FIGURES,
    PRINTED,
    TABLES,
    TARGETS,
    Cell,
    Plan,
    cell_of,
    columns_of,
    heading,
    lines_of,
    rated,
)

NARROW = (
    " For a backbone so narrow RR, prompts, s of LoRA and the rates of `full_ft` and `linear` are others, too "
    "(support/variants.py): rows are named as at 768 dimensions."
)


@dataclass(frozen=True)
class Measured:
    """What the runs of one row and column gave, over all folds of all seeds."""

    mean: float  # accuracy in percent
    low: float  # of its 95 % interval
    high: float
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
    folds, count = (
        [fold for result in results for fold in result["folds"]],
        results[0]["parameters"],
    )
    accuracies = [fold["accuracy"] for fold in folds]
    low, high = evidence.interval(accuracies, folds[0]["tested"])
    return Measured(
        mean=statistics.mean(accuracies),
        low=low,
        high=high,
        std=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        runs=len(accuracies),
        seeds=len(results),
        seconds=statistics.mean(result["seconds"] for result in results),
        trained=count["petl"] or count["head"],
        head=count["head"],
    )


def marked(numbers: list[str | None]) -> list[str]:
    """The numbers of a column, None where there is none: the best **bold**, the second best in _italics_."""
    best = sorted({float(number) for number in numbers if number is not None}, reverse=True)[:2]
    marks = dict(zip(best, ("**", "_"), strict=False)) if len(best) > 1 else {}
    return [
        "missing" if n is None else f"{marks.get(float(n), '')}{n}{marks.get(float(n), '')}"
        for n in numbers
    ]


def beside(texts: list[str], numbers: list[str | None]) -> list[str]:
    """Each text with the paper's number in parentheses, where there is one."""
    return [text if n is None else f"{text} ({n})" for text, n in zip(texts, numbers, strict=True)]


def render(target: str, done: dict[Cell, dict], plan: Plan) -> tuple[str, list[dict]]:
    """A table as Markdown, and as one record for each of its cells."""
    table, lines, columns = TABLES[target], lines_of(target, plan), columns_of(target, plan)
    names = [name for name, *_ in lines]
    grid = {
        (setting, dataset, shots): [
            [
                rated(cell_of(dataset, method, seed, weights[dataset], shots), setting, plan)
                for seed in plan.seeds
            ]
            for _, method, weights in lines
        ]
        for setting, (dataset, shots) in product(plan.settings, columns)
    }  # for each column a list of rows, which are cells that differ in the seed
    measured = {column: [measure(same, done) for same in rows] for column, rows in grid.items()}
    means = {column: [m and m.mean for m in numbers] for column, numbers in measured.items()}
    found = [
        [m for m in line if m] for line in zip(*measured.values(), strict=True)
    ]  # a list for each line
    apart, why = evidence.beside_best(grid, means, done, plan)

    text = {"method": names, "trained": [span({m.trained for m in line}) for line in found]}
    if all(cells.shape_of(weights).dim == 768 for _, _, line in lines for weights in line.values()):
        text["trained"] = beside(
            text["trained"], [table.numbers.get((name, "params")) for name in names]
        )
    records = []
    for (setting, dataset, shots), rows in grid.items():
        column = measured[setting, dataset, shots]
        ours = marked([m and f"{m.mean:.2f}" for m in column])
        key = f"{dataset} {shots}" if shots else dataset
        theirs = [table.numbers.get((name, key)) for name in names]
        for j, (m, (name, method, weights)) in enumerate(zip(column, lines, strict=True)):
            lr, (gap, p) = (
                method_of(rows[j][0]).lr,
                apart.get(((setting, dataset, shots), j), (None, None)),
            )
            if m:
                ours[j] += f" [{m.low:.2f}, {m.high:.2f}]" + " ~" * bool(
                    gap and gap.holds(p) != evidence.YES
                )
                ours[j] += f" at {lr:g}" * (setting == "tuned")
                ours[j] += f", {m.seeds} of {len(plan.seeds)} seeds" * (m.seeds < len(plan.seeds))
            records.append(
                {
                    "table": target,
                    "row": name,
                    "method": method,
                    "dataset": dataset,
                    "shots": shots,
                    "weights": weights[dataset],
                    "setting": setting,
                    "lr": lr,
                    **(asdict(m) if m else dict.fromkeys(f.name for f in fields(Measured))),
                    "paper": theirs[j],
                    "behind the best": gap and gap.points,
                    "p": p,
                }
            )
        head = heading(dataset, shots, setting)
        text[head] = beside(ours, theirs) if setting == plan.settings[0] else ours
    theirs = [table.numbers.get((name, "avg")) for name in names]
    datasets = tuple(dict.fromkeys(dataset for dataset, _ in columns))
    if len(datasets) > 1 and not table.few_shot:
        for setting in plan.settings:
            each = zip(*(means[setting, dataset, shots] for dataset, shots in columns), strict=True)
            ours = marked(
                [None if None in line else f"{statistics.mean(line):.2f}" for line in each]
            )
            same = datasets == table.datasets and setting == plan.settings[0]
            text[heading("Avg", None, setting)] = beside(ours, theirs) if same else ours
    if any(theirs) and not set(datasets) & set(
        table.datasets
    ):  # other sounds: at least the order can be compared
        text["Avg in the paper"] = [
            mark if n else "-" for mark, n in zip(marked(theirs), theirs, strict=True)
        ]
    # Of the last setting alone: a cell may be in both.
    last = [numbers for (setting, *_), numbers in measured.items() if setting == plan.settings[-1]]
    seconds = [[m.seconds for m in line if m] for line in zip(*last, strict=True)]
    text["seconds"] = [f"{sum(line):.0f}" if line else "-" for line in seconds]
    notes = notes_of(target, datasets, [m for line in found for m in line], plan)
    if "tuned" in plan.settings:
        notes.append(
            tune.note_of(
                [replace(same[0], lr=None) for rows in grid.values() for same in rows], plan
            )
        )
    notes += [f"Columns without ~: {len(why)}. {why[0]}."] if why else []
    return f"### {table.title}\n\n{markdown(text)}\n\n{listed(notes)}\n", records


def listed(notes: list[str]) -> str:
    return "\n".join(f"- {note}" for note in notes)


def span(numbers: set[int]) -> str:
    """One number, or the smallest and largest of several: what `linear` trains depends on the number of classes."""
    return (
        " - ".join(f"{number:,}" for number in sorted({min(numbers), max(numbers)}))
        if numbers
        else "-"
    )


def markdown(columns: dict[str, list[str]]) -> str:
    """A table of {heading: texts}; the first column to the left, the others to the right."""
    widths = [max(len(text) for text in (head, *texts)) for head, texts in columns.items()]
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    lines = [
        [t.rjust(w) if i else t.ljust(w) for i, (t, w) in enumerate(zip(r, widths, strict=True))]
        for r in rows
    ]
    lines.insert(1, ["-" * (width - 1) + (":" if i else "-") for i, width in enumerate(widths)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_seeds(plan: Plan) -> str:
    return f"seed{'s' * (len(plan.seeds) > 1)} {', '.join(map(str, plan.seeds))}"


def notes_of(
    target: str, datasets: tuple[str, ...], found: list[Measured], plan: Plan
) -> list[str]:
    """What a reader must know of the numbers, above all where the runs are not those of the paper."""
    table = TABLES[target]
    runs = {m.runs for m in found}
    over = [f"Student's t over {span(runs - {1})} runs (folds and seeds)"] if runs - {1} else []
    over += (
        ["Wilson's over the test clips" + " of a single run" * bool(over)]
        if 1 in runs or not runs
        else []
    )
    theirs = ", in parentheses the paper's" if set(datasets) & set(table.datasets) else ""
    notes = [
        f"Test accuracy in percent, {in_seeds(plan)}{theirs}. Best **bold**, second best in _italics_. In brackets the "
        f"95 % interval, {' or '.join(over)}. ~: cannot be told apart from the best of its column on the same clips, "
        "by Holm's correction for all of the table (tools/evidence.py)."
    ]
    for dataset in datasets:
        cell = Cell(
            dataset,
            "linear",
            0,
            plan.weights or DATASETS[dataset].weights,
            1 if table.few_shot else None,
        )
        epochs, usual = cells.epochs_of(cell, plan), DATASETS[dataset].epochs
        text = f"{PRINTED.get(dataset, dataset)}: weights `{cell.weights}`, {epochs} epoch{'s' * (epochs > 1)}"
        if epochs != usual:
            why = "" if plan.epochs else ": few clips make few steps"
            text += f" instead of {usual}{why}"
        others = {
            "dataset": dataset not in table.datasets,
            "weights": cell.weights != "audioset",
            "number of epochs": plan.epochs not in (None, usual),
        }
        others = ", ".join(name for name, other in others.items() if other)
        narrow = method_of(replace(cell, method="lora")).parts != petl.find("lora").parts
        notes.append(
            f"{text}." + (f" Not as in the paper: {others}." if others else "") + NARROW * narrow
        )
    heads = f" ({span({m.head for m in found})})" if found else ""
    return [
        *notes,
        *([table.note] if table.note else []),
        f"Trained: parameters besides the final LayerNorm and head{heads}, which are all of `linear`; Full FT and "
        "BitFit include the LayerNorm, `probe` is a head alone. Seconds: training of one seed, all folds and datasets.",
        *([f"Options of train.py: `{' '.join(plan.passed)}`."] if plan.passed else []),
    ]


def file_of(target: str, plan: Plan, setting: str) -> Path:
    """Where a table or figure goes, without suffix: other datasets, weights or learning rates do not replace those of
    the paper."""
    table = TARGETS[target]
    words = [
        target,
        *(plan.datasets if tuple(plan.datasets or table.datasets) != table.datasets else []),
    ]
    words += [f"weights_{cells.slug(plan.weights)}"] if plan.weights else []
    words += [setting] if setting != "paper" else []
    return plan.out / ("figures" if target in FIGURES else "tables") / "-".join(words)


def write_table(target: str, done: dict[Cell, dict], plan: Plan) -> None:
    content, records = (render_claims if target == "claims" else render)(target, done, plan)
    path = file_of(target, plan, plan.setting)
    write_text(Path(f"{path}.md"), content)
    write_text(Path(f"{path}.csv"), table_of(records[0], records))
    say(f"\n{content}\nwritten to {path}.md and .csv")


def render_claims(target: str, done: dict[Cell, dict], plan: Plan) -> tuple[str, list[dict]]:
    """The table of claims as Markdown, and a record for each of their pairs."""
    records, why = claims.judge(done, plan)
    notes = [
        "A claim is made of pairs. It holds where in all of them the first is better on the same test clips, and does "
        "not where in one the second is (tools/evidence.py), by Holm's correction for all pairs of this table. Points "
        "of accuracy of the weakest pair, with the 95 % interval over clips and, where there are several, seeds.",
        *(
            f"{claim.claim} ({claim.where}): '{claim.sentence}'."
            for claim in cells.CLAIMS
            if claim.pairs(plan)
        ),
        *(f"Missing: {reason}." for reason in why[:1]),
    ]
    if any("=" in record["better"] for record in records):
        notes.append(
            "rr and prompts are those for 768 dimensions; a narrow backbone has fewer (support/variants.py). "
            "With the parameters of LoRA its s = alpha / RR grows, too."
        )
    if "tuned" in plan.settings:
        notes.append(
            tune.note_of(cells.cells_of(replace(plan, targets=["claims"], setting="paper")), plan)
        )
    return (
        f"### {TARGETS[target].title}\n\n{markdown(claims.as_text(records))}\n\n{listed(notes)}\n",
        records,
    )
