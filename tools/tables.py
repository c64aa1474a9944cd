"""The tables of tools/experiments.py: finished runs in, Markdown and CSV out.

The paper's numbers stand beside the measured ones. An accuracy has its interval, and a mark where
it is not clearly worse than the best of its column.
"""

import statistics
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import petl
from data import DATASETS
from support.files import table_of, write_text
from support.processes import say_lines
from tools import cells, claims, evidence, tune
from tools.campaign import method_of
from tools.cells import (
    FIGURES,
    TABLES,
    TARGETS,
    Cell,
    Plan,
    cell_of,
    columns_of,
    heading,
    is_fitted,
    lines_of,
    rated,
)
from tools.finished import Finished

NARROW = (
    " This backbone has fewer dimensions than the paper's. So RR, prompts, s of LoRA and all "
    "learning rates are others, too (support/variants.py). The names of the rows and the paper's "
    "numbers are those at 768 dimensions."
)
SCATTER = 5  # points: seeds that are further apart are listed
ONE_SEED = "One seed: no interval and no mark says anything about other seeds."


@dataclass(frozen=True)
class Measured:
    """What the runs of one row and column gave, over all folds of all seeds."""

    mean: float  # accuracy in percent
    low: float  # of its 95 % interval
    high: float
    runs: int
    seeds: int
    by_seed: str  # the accuracy of each seed, as the CSV has them
    seconds: float  # of training, all folds of one seed
    trained: int  # parameters besides the final LayerNorm and head, unless nothing else trains


def measure(same: list[Cell], done: dict[Cell, Finished]) -> Measured | None:
    """The finished ones of cells that are the `same` but for the seed."""
    runs = [done[cell] for cell in same if cell in done]
    if not runs:
        return None
    mean, low, high = evidence.accuracy([evidence.scores_of(run) for run in runs])
    count = runs[0].parameters
    return Measured(
        mean=mean,
        low=low,
        high=high,
        runs=sum(len(run.folds) for run in runs),
        seeds=len(runs),
        by_seed=" ".join(f"{mean_of(run):.2f}" for run in runs),
        seconds=statistics.mean(sum(fold.seconds for fold in run.folds) for run in runs),
        trained=count["petl"] or count["head"],
    )


def mean_of(run):
    """The accuracy of a run in percent, the mean of its folds."""
    return statistics.mean(fold.accuracy for fold in run.folds)


# ----------------------------------------------------------------------------------------- a table


def render(target: str, done: dict[Cell, Finished], plan: Plan) -> tuple[str, list[dict]]:
    """A table as Markdown, and a record for each of its cells."""
    table = TABLES[target]
    lines = lines_of(target, plan)
    columns = columns_of(target, plan)
    datasets = tuple(dict.fromkeys(dataset for dataset, _ in columns))
    names = [name for name, *_ in lines]

    def paper(column):
        return [table.numbers.get((name, column)) for name in names]

    grid = {}  # for each column its rows, which are cells that differ in the seed
    measured = {}
    pairs = {}  # the best row of each column and another, for each seed
    for setting, (dataset, shots) in product(plan.settings, columns):
        column = (setting, dataset, shots)
        rows = []
        for _, method, weights in lines:
            same = [cell_of(dataset, method, seed, weights[dataset], shots) for seed in plan.seeds]
            rows.append([rated(cell, setting, plan) for cell in same])
        grid[column] = rows
        measured[column] = [measure(same, done) for same in rows]
        means = [m.mean if m else -1 for m in measured[column]]
        best = means.index(max(means))
        for row, same in enumerate(rows):
            if row != best:
                pairs[column, row] = [[[a], [b]] for a, b in zip(rows[best], same, strict=True)]
    gaps, why = evidence.differences(pairs, done)

    by_line = list(zip(*measured.values(), strict=True))
    trained = [span({m.trained for m in line if m}) for line in by_line]
    text = {"method": names, "here": [f"`{method}`" for _, method, _ in lines]}
    text["trained"] = beside(trained, paper("params"))
    records = []
    for column, numbers in measured.items():
        setting, dataset, shots = column
        theirs = paper(f"{dataset} {shots}" if shots else dataset)
        ours = marked([m and f"{m.mean:.2f}" for m in numbers])
        for row, m in enumerate(numbers):
            gap, p = gaps.get((column, row), (None, None))
            first = grid[column][row][0]
            lr = None if is_fitted(first) else method_of(first).lr
            record = {
                "row": names[row],
                "method": lines[row][1],
                "dataset": dataset,
                "shots": shots,
                "weights": first.weights,
                "setting": setting,
                "lr": lr,
                "paper": theirs[row],
                "behind the best": gap and gap.points,
                "p": p,
            }
            records.append(record)
            if not m:
                continue
            record |= asdict(m)
            ours[row] += f" [{m.low:.2f}, {m.high:.2f}]"
            is_worse = gap is not None and gap.holds(p) == evidence.YES
            if (column, row) in pairs and not is_worse:
                ours[row] += " ~"
            if setting == "tuned" and lr:
                ours[row] += f" at {lr:g}"
            if m.seeds < len(plan.seeds):
                ours[row] += f", {m.seeds} of {len(plan.seeds)} seeds"
        head = heading(dataset, shots, setting)
        text[head] = beside(ours, theirs) if setting == plan.settings[0] else ours

    theirs = paper("avg")
    if len(datasets) > 1 and not table.few_shot:
        for setting in plan.settings:
            each = [measured[(setting, *column)] for column in columns]
            ours = marked([average(line) for line in zip(*each, strict=True)])
            if datasets == table.datasets:
                ours = beside(ours, theirs)
            text[heading("Avg", None, setting)] = ours
    if any(theirs) and not set(datasets) & set(table.datasets):  # at least the order is compared
        order = zip(marked(theirs), theirs, strict=True)
        text["Avg in the paper"] = [mark if number else "-" for mark, number in order]
    # A cell may be in both settings: only the last one counts.
    seconds = [sum(m.seconds for m in line[-len(columns) :] if m) for line in by_line]
    text["seconds"] = [f"{number:.0f}" for number in seconds]
    beside_ours = ["params", *(f"{name} {shots}" if shots else name for name, shots in columns)]
    has_theirs = any(number for column in beside_ours for number in paper(column))
    notes = notes_of(table, datasets, plan, has_theirs, len(gaps))
    notes += scattered(names, measured)
    return page(target, text, notes, why, plan), records


def scattered(names, measured):
    """A note of the numbers whose seeds lie far apart. `measured`: those of every column."""
    found = []
    for column in measured.values():
        for name, m in zip(names, column, strict=True):
            each = [float(accuracy) for accuracy in m.by_seed.split()] if m else []
            if each and max(each) - min(each) > SCATTER:
                found.append(f"{name} ({', '.join(m.by_seed.split())})")
    if not found:
        return []
    return [
        f"Seeds more than {SCATTER} points apart: {'; '.join(found)}. Their intervals are wide, so "
        "a ~ of theirs may say no more than that."
    ]


def average(line):
    """The mean of a row of `Measured`, as text. None if one is missing."""
    return f"{statistics.mean(m.mean for m in line):.2f}" if all(line) else None


def marked(numbers: list[str | None]) -> list[str]:
    """The numbers of a column: the best **bold**, the second best in _italics_, None "missing"."""
    marks = dict.fromkeys(numbers, "")
    best = sorted(filter(None, marks), key=float, reverse=True)
    if len(best) > 1:
        marks[best[0]] = "**"
        marks[best[1]] = "_"
    return [f"{marks[text]}{text}{marks[text]}" if text else "missing" for text in numbers]


def beside(texts, numbers):
    """Each text with the paper's number in parentheses, where there is one."""
    return [text if n is None else f"{text} ({n})" for text, n in zip(texts, numbers, strict=True)]


def span(numbers):
    """One number, or the smallest and largest of several.

    What `linear` trains depends on the number of classes.
    """
    ends = sorted({min(numbers), max(numbers)}) if numbers else []
    return " - ".join(f"{number:,}" for number in ends) or "-"


def page(target, columns, notes, why, plan):
    """A table of {heading: texts} as Markdown, with its notes.

    The first column stands to the left, the others to the right. `why`: what was not compared.
    """
    padded = []
    for head, texts in columns.items():
        pad = str.rjust if padded else str.ljust
        width = max(len(text) for text in (head, *texts))
        padded.append([pad(head, width), pad(":", width, "-"), *(pad(t, width) for t in texts)])
    lines = [f"| {' | '.join(line)} |" for line in zip(*padded, strict=True)]
    if "tuned" in plan.settings:
        untuned = replace(plan, targets=[target], setting="paper")
        notes.append(tune.note_of(cells.cells_of(untuned), plan))
    if why:
        notes.append(f"Not compared: {len(why)}. {why[0]}.")
    listed = [f"- {note}" for note in notes if note]
    return "\n".join([f"### {TARGETS[target].title}\n", *lines, "", *listed, ""])


# ------------------------------------------------------------------------------------- its notes


def notes_of(table, datasets, plan, has_theirs, count):
    """What a reader must know of the numbers, above all where the runs are not the paper's.

    has_theirs: numbers of the paper stand beside ours. count: how many comparisons were made.
    """
    notes = [
        f"Test accuracy in percent, seeds {', '.join(map(str, plan.seeds))}. "
        f"{'In parentheses what the paper has. ' * has_theirs}"
        "Best **bold**, second best in _italics_. In brackets the 95 % interval: of a "
        "bootstrap that draws test recordings and seeds together, or where they are wider "
        "Student's over the seeds or Wilson's over the recordings; of a single run Wilson's.",
        "~: not clearly worse than the best of its column on the same clips. Clearly worse is what "
        "has a difference whose 95 % interval, by the same rule, leaves out zero, and p below 5 % "
        f"in a sign test of the recordings, by Holm's correction for all {count} comparisons of "
        "the table (tools/evidence.py): with fewer rows it corrects for fewer. The correction is "
        "for the recordings: how seeds scatter is judged "
        "for each row by itself, so of 20 rows as good as the best one may lack its mark. "
        "The best was chosen by these numbers, which nothing here corrects for: it looks better "
        "than it is.",
        *(note_of_dataset(dataset, table, plan) for dataset in datasets),
        table.note,
        "Trained: parameters besides the final LayerNorm and head, which are all of `linear`; Full "
        "FT and BitFit include the LayerNorm, `probe` is a head alone. Seconds: training of one "
        "seed, all folds and datasets.",
    ]
    if len(plan.seeds) == 1:
        notes.append(ONE_SEED)
    if plan.passed:
        notes.append(f"Options of train.py: `{' '.join(plan.passed)}`.")
    return notes


def note_of_dataset(dataset, table, plan):
    """What a dataset was trained with, and what of it is not as in the paper."""
    weights = plan.weights or DATASETS[dataset].weights
    cell = Cell(dataset, "lora", 0, weights, 1 if table.few_shot else None)
    epochs = cells.epochs_of(cell, plan)
    usual = DATASETS[dataset].epochs
    text = f"{heading(dataset, None, '')}: weights `{weights}`, {epochs} epoch{'s' * (epochs > 1)}"
    others = []
    if dataset not in table.datasets:
        others.append("dataset")
    if weights != "audioset":
        others.append("weights")
    if dataset not in table.datasets:
        others.append("number of epochs (30 to 75 there)")
    elif epochs != usual:
        others.append("number of epochs")
    if epochs != usual:
        text += f" instead of {usual}"
        text += "" if plan.epochs else ": few clips make few steps"
    text += "."
    if others:
        text += f" Not as in the paper: {', '.join(others)}."
    if method_of(cell).parts != petl.find("lora").parts:
        text += NARROW
    return text


# --------------------------------------------------------------------------------------- its files


def file_of(target: str, plan: Plan, setting: str) -> Path:
    """Where a table or figure goes, without suffix: of kept runs, beside their file.

    Other datasets, weights or learning rates do not replace those of the paper.
    """
    words = [target, *plan.datasets]
    if plan.weights:
        words.append(f"weights_{cells.slug(plan.weights)}")
    if setting != "paper":
        words.append(setting)
    if plan.kept:
        return plan.out.with_name("-".join(words))
    return plan.out / ("figures" if target in FIGURES else "tables") / "-".join(words)


def write_table(target: str, done: dict[Cell, Finished], plan: Plan) -> None:
    write = render_claims if target == "claims" else render
    content, records = write(target, done, plan)
    path = file_of(target, plan, plan.setting)
    columns = max(records, key=len)  # the record of a missing cell is shorter
    write_text(Path(f"{path}.md"), content)
    write_text(Path(f"{path}.csv"), table_of(columns, records))
    say_lines(f"\n{content}\nwritten to {path}.md and .csv")


def render_claims(target: str, done: dict[Cell, Finished], plan: Plan) -> tuple[str, list[dict]]:
    """The table of claims as Markdown, and a record for each of their pairs."""
    records, why = claims.judge(done, plan)
    rows = claims.as_text(records)
    compared = {pair_of(record) for record in records if "points" in record}
    notes = claims.notes_of(rows, plan, len(compared))
    return page(target, rows, notes, why, plan), records


def pair_of(record):
    """What is compared with what. Several claims may have the same pair."""
    return tuple(record[name] for name in ("dataset", "shots", "setting", "better", "than"))
