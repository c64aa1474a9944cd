"""The tables of tools/experiments.py: finished runs in, Markdown and CSV out.

The paper's numbers stand beside the measured ones. An accuracy has its interval, and a mark where
it cannot be told apart from the best of its column.
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
    " For a backbone so narrow RR, prompts, s of LoRA and the rates of `full_ft` and `linear` are "
    "others, too (support/variants.py): rows are named as at 768 dimensions."
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
    folds = [fold for result in results for fold in result["folds"]]
    count = results[0]["parameters"]
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


# ----------------------------------------------------------------------------------------- a table


def render(target: str, done: dict[Cell, dict], plan: Plan) -> tuple[str, list[dict]]:
    """A table as Markdown, and a record for each of its cells."""
    table = TABLES[target]
    lines = lines_of(target, plan)
    columns = columns_of(target, plan)
    datasets = tuple(dict.fromkeys(dataset for dataset, _ in columns))
    names = [name for name, *_ in lines]

    def paper(column: str) -> list[str | None]:
        return [table.numbers.get((name, column)) for name in names]

    grid = {}  # for each column its rows, which are cells that differ in the seed
    for setting, (dataset, shots) in product(plan.settings, columns):
        rows = []
        for _, method, weights in lines:
            cells_ = [cell_of(dataset, method, n, weights[dataset], shots) for n in plan.seeds]
            rows.append([rated(cell, setting, plan) for cell in cells_])
        grid[setting, dataset, shots] = rows
    measured = {column: [measure(same, done) for same in rows] for column, rows in grid.items()}
    means = {column: [m and m.mean for m in numbers] for column, numbers in measured.items()}
    by_line = [[m for m in line if m] for line in zip(*measured.values(), strict=True)]
    apart, why = evidence.beside_best(grid, means, done, plan)

    text = {"method": names, "trained": [span({m.trained for m in line}) for line in by_line]}
    weights = {weights for _, _, line in lines for weights in line.values()}
    if all(cells.shape_of(one).dim == 768 for one in weights):
        text["trained"] = beside(text["trained"], paper("params"))
    records = []
    for column, rows in grid.items():
        setting, dataset, shots = column
        ours = marked([m and f"{m.mean:.2f}" for m in measured[column]])
        theirs = paper(f"{dataset} {shots}" if shots else dataset)
        for j, (name, method, weights) in enumerate(lines):
            m = measured[column][j]
            lr = method_of(rows[j][0]).lr
            gap, p = apart.get((column, j), (None, None))
            if m:
                is_worse = gap is None or gap.holds(p) == evidence.YES
                ours[j] += f" [{m.low:.2f}, {m.high:.2f}]"
                ours[j] += "" if is_worse else " ~"
                ours[j] += f" at {lr:g}" if setting == "tuned" else ""
                if m.seeds < len(plan.seeds):
                    ours[j] += f", {m.seeds} of {len(plan.seeds)} seeds"
            record = {"table": target, "row": name, "method": method, "dataset": dataset}
            record |= {"shots": shots, "weights": weights[dataset], "setting": setting, "lr": lr}
            record |= asdict(m) if m else dict.fromkeys(field.name for field in fields(Measured))
            record |= {"paper": theirs[j], "behind the best": gap and gap.points, "p": p}
            records.append(record)
        head = heading(dataset, shots, setting)
        text[head] = beside(ours, theirs) if setting == plan.settings[0] else ours

    theirs = paper("avg")
    if len(datasets) > 1 and not table.few_shot:
        for setting in plan.settings:
            each = zip(*(means[(setting, *column)] for column in columns), strict=True)
            ours = [None if None in line else f"{statistics.mean(line):.2f}" for line in each]
            ours = marked(ours)
            is_paper = datasets == table.datasets and setting == plan.settings[0]
            text[heading("Avg", None, setting)] = beside(ours, theirs) if is_paper else ours
    if any(theirs) and not set(datasets) & set(table.datasets):  # at least the order is compared
        order = zip(marked(theirs), theirs, strict=True)
        text["Avg in the paper"] = [mark if number else "-" for mark, number in order]
    # A cell may be in both settings: only the last one counts.
    last = [numbers for column, numbers in measured.items() if column[0] == plan.settings[-1]]
    seconds = [[m.seconds for m in line if m] for line in zip(*last, strict=True)]
    text["seconds"] = [f"{sum(line):.0f}" if line else "-" for line in seconds]

    notes = notes_of(target, datasets, [m for line in by_line for m in line], plan)
    if "tuned" in plan.settings:
        untuned = [replace(same[0], lr=None) for rows in grid.values() for same in rows]
        notes.append(tune.note_of(untuned, plan))
    if why:
        notes.append(f"Columns without ~: {len(why)}. {why[0]}.")
    return page(table.title, text, notes), records


def marked(numbers: list[str | None]) -> list[str]:
    """The numbers of a column: the best **bold**, the second best in _italics_, None "missing"."""
    best = sorted({float(number) for number in numbers if number is not None}, reverse=True)[:2]
    marks = dict(zip(best, ("**", "_"), strict=False)) if len(best) > 1 else {}
    texts = []
    for number in numbers:
        mark = "" if number is None else marks.get(float(number), "")
        texts.append("missing" if number is None else f"{mark}{number}{mark}")
    return texts


def beside(texts: list[str], numbers: list[str | None]) -> list[str]:
    """Each text with the paper's number in parentheses, where there is one."""
    return [text if n is None else f"{text} ({n})" for text, n in zip(texts, numbers, strict=True)]


def span(numbers: set[int]) -> str:
    """One number, or the smallest and largest of several.

    What `linear` trains depends on the number of classes.
    """
    ends = sorted({min(numbers), max(numbers)}) if numbers else []
    return " - ".join(f"{number:,}" for number in ends) or "-"


def page(title: str, columns: dict[str, list[str]], notes: list[str]) -> str:
    """A table of {heading: texts} as Markdown: its first column to the left, the others right."""
    widths = [max(len(text) for text in (head, *texts)) for head, texts in columns.items()]
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    lines = []
    for first, *others in rows:
        texts = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append([first.ljust(widths[0]), *texts])
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    listed = "\n".join(f"- {note}" for note in notes)
    return f"### {title}\n\n{table}\n\n{listed}\n"


# ------------------------------------------------------------------------------------- its notes


def notes_of(
    target: str, datasets: tuple[str, ...], found: list[Measured], plan: Plan
) -> list[str]:
    """What a reader must know of the numbers, above all where the runs are not the paper's."""
    table = TABLES[target]
    runs = {m.runs for m in found}
    over = []
    if runs - {1}:
        over.append(f"Student's t over {span(runs - {1})} runs (folds and seeds)")
    if 1 in runs or not runs:
        over.append("Wilson's over the test clips" + (" of a single run" if over else ""))
    seeds = f"seed{'s' * (len(plan.seeds) > 1)} {', '.join(map(str, plan.seeds))}"
    theirs = ", in parentheses the paper's" if set(datasets) & set(table.datasets) else ""
    notes = [
        f"Test accuracy in percent, {seeds}{theirs}. Best **bold**, second best in _italics_. In "
        f"brackets the 95 % interval, {' or '.join(over)}. ~: cannot be told apart from the best "
        "of its column on the same clips, by Holm's correction for all of the table "
        "(tools/evidence.py)."
    ]
    notes += [note_of_dataset(dataset, table, plan) for dataset in datasets]
    notes += [table.note] if table.note else []
    heads = f" ({span({m.head for m in found})})" if found else ""
    notes.append(
        f"Trained: parameters besides the final LayerNorm and head{heads}, which are all of "
        "`linear`; Full FT and BitFit include the LayerNorm, `probe` is a head alone. Seconds: "
        "training of one seed, all folds and datasets."
    )
    if plan.passed:
        notes.append(f"Options of train.py: `{' '.join(plan.passed)}`.")
    return notes


def note_of_dataset(dataset: str, table: cells.Table, plan: Plan) -> str:
    weights = plan.weights or DATASETS[dataset].weights
    cell = Cell(dataset, "lora", 0, weights, 1 if table.few_shot else None)
    epochs = cells.epochs_of(cell, plan)
    usual = DATASETS[dataset].epochs
    name = PRINTED.get(dataset, dataset)
    text = f"{name}: weights `{weights}`, {epochs} epoch{'s' * (epochs > 1)}"
    if epochs != usual:
        text += f" instead of {usual}" + ("" if plan.epochs else ": few clips make few steps")
    others = ["dataset"] if dataset not in table.datasets else []
    others += ["weights"] if weights != "audioset" else []
    others += ["number of epochs"] if plan.epochs not in (None, usual) else []
    text += "."
    text += f" Not as in the paper: {', '.join(others)}." if others else ""
    is_narrow = method_of(cell).parts != petl.find("lora").parts
    return text + (NARROW if is_narrow else "")


# --------------------------------------------------------------------------------------- its files


def file_of(target: str, plan: Plan, setting: str) -> Path:
    """Where a table or figure goes, without suffix.

    Other datasets, weights or learning rates do not replace those of the paper.
    """
    usual = TARGETS[target].datasets
    words = [target]
    if tuple(plan.datasets or usual) != usual:
        words += plan.datasets
    if plan.weights:
        words.append(f"weights_{cells.slug(plan.weights)}")
    if setting != "paper":
        words.append(setting)
    return plan.out / ("figures" if target in FIGURES else "tables") / "-".join(words)


def write_table(target: str, done: dict[Cell, dict], plan: Plan) -> None:
    write = render_claims if target == "claims" else render
    content, records = write(target, done, plan)
    path = file_of(target, plan, plan.setting)
    write_text(Path(f"{path}.md"), content)
    write_text(Path(f"{path}.csv"), table_of(records[0], records))
    say(f"\n{content}\nwritten to {path}.md and .csv")


def render_claims(target: str, done: dict[Cell, dict], plan: Plan) -> tuple[str, list[dict]]:
    """The table of claims as Markdown, and a record for each of their pairs."""
    records, why = claims.judge(done, plan)
    notes = [
        "A claim is made of pairs. It holds where in all of them the first is better on the same "
        "test clips, and does not where in one the second is (tools/evidence.py), by Holm's "
        "correction for all pairs of this table. Points of accuracy of the weakest pair, with the "
        "95 % interval over clips and, where there are several, seeds."
    ]
    for claim in cells.CLAIMS:
        if claim.pairs(plan):
            notes.append(f"{claim.claim} ({claim.where}): '{claim.sentence}'.")
    if why:
        notes.append(f"Missing: {why[0]}.")
    if any("=" in record["better"] for record in records):
        notes.append(
            "rr and prompts are those for 768 dimensions; a narrow backbone has fewer "
            "(support/variants.py). With the parameters of LoRA its s = alpha / RR grows, too."
        )
    if "tuned" in plan.settings:
        untuned = replace(plan, targets=["claims"], setting="paper")
        notes.append(tune.note_of(cells.cells_of(untuned), plan))
    return page(TARGETS[target].title, claims.as_text(records), notes), records
