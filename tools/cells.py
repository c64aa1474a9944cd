"""What the paper's tables and figures compare, and which runs they are made of.

paper_results.json has the paper's tables, their methods and numbers. paper_claims.json has what the
paper concludes from them. A *cell* is one run of train.py: `cells_of` lists the cells of a Plan.
"""

import json
import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import petl
from ast_model import ASTConfig
from data import DATASETS
from load_weights import RANDOM, fingerprint, read_checkpoint
from support.command import UserError
from support.variants import narrowed, override
from tools.finished import Kept

# Names of datasets as the paper writes them; of others the name stays.
PRINTED = {"esc50": "ESC-50", "esc10": "ESC-10", "us8k": "US8K", "gsc": "GSC", "fsc": "FSC"}


Column = tuple[str, int | None]  # a dataset, and training clips per class; None: all clips


@dataclass(frozen=True)
class Table:
    """A table or figure of the paper, as paper_results.json has it."""

    title: str
    columns: list[str]  # "esc50", "esc50 4" with clips per class, or "params" and the like
    rows: dict[str, list[str]]  # a method, perhaps with settings: "lora rr=64"; then the numbers
    note: str = ""

    @property
    def numbers(self):
        """The paper's numbers, {(row, column)}."""
        found = {}
        for row, (_, *line) in self.rows.items():
            for column, number in zip(self.columns, line, strict=False):
                found[row, column] = number
        return found

    @property
    def places(self):
        found = []
        for column in self.columns:
            name, _, shots = column.partition(" ")
            if name in DATASETS:
                found.append((name, int(shots) if shots else None))
        return found

    @property
    def datasets(self):
        return tuple(dict.fromkeys(dataset for dataset, _ in self.places))

    @property
    def few_shot(self):
        return any(shots for _, shots in self.places)


HERE = Path(__file__).parent
PAPER = json.loads((HERE / "paper_results.json").read_text(encoding="utf-8"), parse_float=str)
TARGETS = {name: Table(**table) for name, table in PAPER.items() if name != "about"}
FIGURES = {name: table for name, table in TARGETS.items() if name.startswith("fig")}
TABLES = {name: table for name, table in TARGETS.items() if name not in FIGURES}


@dataclass(frozen=True)
class Claim:
    """A conclusion of the paper: what `better` and `than` have to do with each other.

    These are words of `cell_of`, or two of them with a minus between: "lora rr=32 - lora rr=512" is
    what LoRA gains.
    """

    sentence: str  # of the paper
    where: str
    targets: list[str]  # whose datasets, and clips per class, it is about
    better: list[str]
    than: list[str]
    test: str = "better"  # or "not worse", "one is better", "one is not worse"
    in_turn: bool = False  # the first against the first, not each against each
    tasks: str = ""  # "audio" or "speech" if it is about such datasets alone

    def pairs(self, plan):
        """The pairs of which --methods leaves both."""
        pairs = []
        for pair in (zip if self.in_turn else product)(self.better, self.than):
            names = {term.split()[0] for side in pair for term in side.split(" - ")}
            if not plan.methods or names <= {*plan.methods}:
                pairs.append(pair)
        return pairs

    def columns(self, plan):
        columns = [column for target in self.targets for column in columns_of(target, plan)]
        if self.tasks:
            is_speech = self.tasks == "speech"
            columns = [column for column in columns if (column[0] in SPEECH) == is_speech]
        return list(dict.fromkeys(columns))


CONCLUSIONS = json.loads((HERE / "paper_claims.json").read_text(encoding="utf-8"))
CLAIMS = [Claim(**claim) for claim in CONCLUSIONS["claims"]]
NOT_TESTED = CONCLUSIONS["not_tested"]  # {sentence: why}
SIDES = [side for claim in CLAIMS for side in claim.better + claim.than]
TERMS = {term: [term] for side in SIDES for term in side.split(" - ")}
TARGETS["claims"] = Table("What the paper concludes", ["esc50", "us8k", "gsc", "fsc"], TERMS)

# In Figures 3 and 4, RR is divided, or the number of prompts multiplied, by each of these:
BUDGETS = (0.25, 0.5, 1, 2, 4)

SPEECH = ("gsc", "fsc")  # the paper's datasets of speech; the others are of audio
SHOTS = {"gsc": (2, 8, 32, 64)}
OTHER_SHOTS = (1, 2, 4, 8)  # of ESC-50, and of every dataset that is not in Table II
# Windows of conformer adapters with all clips. Elsewhere they are 31, as in METHODS.
KERNELS = {"esc50": 8, "esc10": 8, "us8k": 8}
FEW_SHOT_EPOCHS = 30  # at least: with few clips an epoch is a step or two


def heading(dataset: str, shots: int | None, setting: str) -> str:
    """A column's name."""
    words = [PRINTED.get(dataset, dataset), str(shots or ""), setting.removeprefix("paper")]
    return ", ".join(word for word in words if word)


@dataclass(frozen=True)
class Plan:
    """What a command asks for; its options, in tools/experiments.py, say what each of these is."""

    targets: list[str]
    datasets: list[str]  # none: the paper's
    methods: list[str]  # none: all
    add: list[str]
    random: list[str]
    seeds: list[int]
    epochs: int | None
    weights: str | None
    data_dir: dict[str, Path]  # by dataset
    cache_dir: Path
    jobs: int
    dry_run: bool
    out: Path
    setting: str
    passed: list[str]  # options of train.py
    tune: bool  # search for learning rates first
    tuned: dict = field(default_factory=dict)  # what tune.py has found, by names of cells, seed 0
    kept: Kept | None = None  # the file whose runs are shown, in place of those in `out`

    @property
    def settings(self) -> list[str]:
        return ["paper", "tuned"] if self.setting == "both" else [self.setting]


@dataclass(frozen=True)
class Cell:
    """One run of train.py."""

    dataset: str
    method: str
    seed: int
    weights: str
    shots: int | None = None
    rr: int | None = None
    prompts: int | None = None
    kernel: int | None = None
    alpha: int | None = None
    lr: float | None = None  # None: the paper's, see support/variants.py

    @property
    def variant(self) -> str:
        """The folder of all cells that differ from Table I in the same way; empty for Table I."""
        words = []
        if self.weights != DATASETS[self.dataset].weights:
            words.append(f"weights-{slug(self.weights)}")
        for name in ("shots", "rr", "prompts", "kernel", "alpha", "lr"):
            if getattr(self, name) is not None:
                words.append(f"{name}{getattr(self, name)}")
        return "-".join(words)

    @property
    def name(self) -> str:
        return str(Path(self.variant, self.dataset, self.method, f"seed{self.seed}"))


def slug(text: str) -> str:
    return re.sub(r"[^\w.]+", "_", text).strip("_.")


def columns_of(target: str, plan: Plan) -> list[Column]:
    """Dataset and clips per class of each column; without few-shot the latter is None."""
    table = TARGETS[target]
    if not plan.datasets:
        return table.places
    if not table.few_shot:
        return [(dataset, None) for dataset in plan.datasets]
    return [(dataset, n) for dataset in plan.datasets for n in SHOTS.get(dataset, OTHER_SHOTS)]


def lines_of(target: str, plan: Plan) -> list[tuple]:
    """The rows of a table or figure: name, method, weights for each dataset.

    --methods chooses rows, --add puts others below, --random puts a second block below Table I.
    """
    rows = TARGETS[target].rows
    weights = {}
    for dataset, _ in columns_of(target, plan):
        weights[dataset] = plan.weights or DATASETS[dataset].weights
    lines = []
    for name, (method, *_) in rows.items():
        if not plan.methods or method.split()[0] in plan.methods:
            lines.append((name, method, weights))
    known = [method for _, method, _ in lines]
    lines += [(method, method, weights) for method in plan.add if method not in known]
    if target == "table1" and plan.random:
        weights = {dataset: random_like(name) for dataset, name in weights.items()}
        names = {method: name for name, (method, *_) in rows.items()}
        for method in plan.random:
            lines.append((f"{names.get(method, method)}, random weights", method, weights))
    return lines


def cells_of(plan: Plan) -> list[Cell]:
    """All cells of the targets, each once, though several tables may show it.

    They come one seed after the other.
    """
    cells = []
    for seed, target in product(plan.seeds, plan.targets):
        if target == "claims":
            for claim in CLAIMS:
                for pair, column in product(claim.pairs(plan), claim.columns(plan)):
                    for side in terms_of(pair, column, seed, plan):
                        cells += side
            continue
        places = product(columns_of(target, plan), lines_of(target, plan))
        for (dataset, shots), (_, method, weights) in places:
            if target in ("fig3", "fig4"):
                cells += budgets(dataset, method, seed, weights[dataset])
            else:
                cells.append(cell_of(dataset, method, seed, weights[dataset], shots))
    with_rates = [rated(cell, setting, plan) for cell in cells for setting in plan.settings]
    return list(dict.fromkeys(with_rates))


def terms_of(pair, column: Column, seed: int, plan: Plan, setting="paper") -> list[list[Cell]]:
    """The cells of a claim's difference: those that count for it, and those against it."""
    dataset, shots = column
    weights = plan.weights or DATASETS[dataset].weights
    better, than = (
        [
            rated(cell_of(dataset, term, seed, weights, shots), setting, plan)
            for term in side.split(" - ")
        ]
        for side in pair
    )
    return [better[:1] + than[1:], than[:1] + better[1:]]


def rated(cell: Cell, setting: str, plan: Plan) -> Cell:
    """The cell with the paper's learning rate, or with the one that was found.

    A fitted method has no rate. UserError if none was found.
    """
    if setting == "paper" or is_fitted(cell):
        return cell
    found = plan.tuned.get(replace(cell, seed=0).name)
    if found is None:
        raise UserError(
            f"no learning rate has been searched for {cell.name}: `tune` as the first word does so"
        )
    return replace(cell, lr=None if found.best == found.usual else found.best)


def cell_of(dataset: str, words: str, seed: int, weights: str, shots: int | None = None) -> Cell:
    """The cell of a method, or of one with settings as they are for 768 dimensions: "lora rr=64".

    The same experiment as a row of METHODS is that row's cell: PF par with twice the parameters is
    PF par x2. Conformer adapters have the published window of the dataset.
    """
    name, *settings = words.split()
    row = petl.find(name)
    dim = shape_of(weights).dim
    asked = {}
    if not shots and dataset in KERNELS and first(row, "kernel"):
        asked["kernel"] = KERNELS[dataset]
    for setting in settings:
        key, _, value = setting.partition("=")
        asked[key] = int(value)
    method = narrowed(override(row, **asked), dim)
    for known in [row, *petl.METHODS.values()]:
        if narrowed(known, dim).parts == method.parts and known.lr == row.lr:
            return Cell(dataset, known.name, seed, weights, shots)
    return Cell(dataset, name, seed, weights, shots, **{key: first(method, key) for key in asked})


def first(method, setting):
    """The setting of the first part that has it."""
    return next((getattr(part, setting) for part in method.parts if hasattr(part, setting)), None)


def budgets(dataset: str, method: str, seed: int, weights: str) -> list[Cell]:
    """The cells of a curve in Figures 3 and 4: a quarter to four times the method's parameters.

    Methods with neither RR nor prompts have one cell.
    """
    row = petl.find(method)
    cells = []
    for budget in BUDGETS:
        words = method
        for key, factor in (("rr", 1 / budget), ("prompts", budget)):
            number = first(row, key)
            if number is not None and budget != 1:
                words += f" {key}={max(1, round(number * factor))}"
        cells.append(cell_of(dataset, words, seed, weights))
    return list(dict.fromkeys(cells))  # few prompts cannot be halved often


def is_fitted(cell: Cell) -> bool:
    """Whether the method of the cell is fitted, and not trained in epochs with a learning rate."""
    return petl.has_mark(petl.find(cell.method), "is_fitted")


def epochs_of(cell: Cell, plan: Plan) -> int | None:
    """The epochs of a cell. None for a method that is fitted."""
    if is_fitted(cell):
        return None
    epochs = DATASETS[cell.dataset].epochs
    return plan.epochs or (max(epochs, FEW_SHOT_EPOCHS) if cell.shots else epochs)


def random_like(weights):
    """Random weights of the shape of the backbone `weights`. UserError if train.py has none."""
    shape = shape_of(weights)
    for size, its_shape in RANDOM.items():
        if its_shape == (shape.dim, shape.depth, shape.heads):
            return f"random:{size}"
    raise UserError(
        f"--random: there are no random weights of {shape.dim} dimensions in {shape.depth} blocks"
    )


def shape_of(weights: str) -> ASTConfig:
    """The shape of a backbone. That of AudioSet is known without the checkpoint.

    train.py pools in its own way, whatever the checkpoint has.
    """
    if weights == "audioset":
        return ASTConfig()
    return replace(shape_and_hash(weights)[0], pool="mean")


@lru_cache
def shape_and_hash(weights: str) -> tuple[ASTConfig, str]:
    """Shape and SHA-256 of a checkpoint, which is read."""
    state, config = read_checkpoint(weights)
    return config, fingerprint(state, config)
