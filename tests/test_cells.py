"""The paper's tables and their numbers, and the cells that they need."""

import json
import shutil
from pathlib import Path

from helpers import SMALL_AST

import petl
from data import DATASETS
from tools import campaign, cells, experiments, tables
from tools.cells import TABLES, Cell

PAPER = json.loads(Path(cells.__file__).with_name("paper_results.json").read_text())


def test_the_numbers_are_complete():
    sizes = {name: (len(PAPER[name]["rows"]), len(PAPER[name]["columns"])) for name in TABLES}
    assert sizes == {
        "table1": (15, 6),
        "table2": (4, 8),
        "table3": (6, 5),
        "table4": (4, 6),
        "table5": (8, 4),
        "table6": (6, 4),
        "table7": (4, 2),
        "published1": (11, 6),
        "published2": (4, 8),
        "kernels": (5, 4),
        "scaling": (20, 2),
        "newer": (15, 5),
    }
    for name, table in TABLES.items():
        assert table.rows.keys() == PAPER[name]["rows"].keys()
        assert {words.split()[0] for words, *_ in table.rows.values()} <= petl.METHODS.keys()
        columns = [
            column.split()[0]
            for column in PAPER[name]["columns"]
            if column not in ("params", "rr", "avg")
        ]
        assert tuple(dict.fromkeys(columns)) == table.datasets
        for method, *row in PAPER[name]["rows"].values():
            assert isinstance(method, str) and len(row) == len(PAPER[name]["columns"])
            assert all(
                isinstance(n, str) if c in ("params", "rr") else n is None or 0 < n < 100
                for n, c in zip(row, PAPER[name]["columns"], strict=True)
            )


def test_averages_of_the_paper():
    """The printed averages are those of the columns, up to rounding, but for the row that is named
    here."""
    wrong = {}
    for name in TABLES:
        columns = PAPER[name]["columns"]
        if "avg" in columns:
            for row, (_, *numbers) in PAPER[name]["rows"].items():
                entries = dict(zip(columns, numbers, strict=True))
                if entries["avg"] is None:  # nobody has measured it
                    continue
                mean = sum(entries[dataset] for dataset in TABLES[name].datasets) / len(
                    TABLES[name].datasets
                )
                if abs(mean - entries["avg"]) > 0.011:
                    wrong[name, row] = (entries["avg"], round(mean, 2))
    assert wrong == {(table, "Full FT"): (90.07, 90.60) for table in ("table1", "published1")}
    assert all(
        "90.07" in TABLES[table].note and "90.60" in TABLES[table].note for table, _ in wrong
    )


def test_one_experiment_has_one_number_in_all_tables():
    """A method stands in several tables: the paper prints the same accuracy everywhere, and so do
    its parameters."""
    seen = {}
    for name, table in TABLES.items():
        for row, (method, *_) in table.rows.items():
            for column, number in zip(
                PAPER[name]["columns"], PAPER[name]["rows"][row][1:], strict=True
            ):
                if column in ("avg", "rr"):
                    continue
                if column == "params":
                    assert number == petl.METHODS[method].paper.upper(), row
                assert seen.setdefault((method, column), number) == number, (row, column)


def test_tables_name_the_rows_of_petl():
    """`where` in METHODS is the first place of a method in these tables."""
    tables = {
        "table1": "Table I",
        "table3": "Table III",
        "table4": "Table IV",
        "table5": "Table V",
        "table6": "Table VI",
        "table7": "Table VII",
    }
    first = {}
    for name, table in TABLES.items():
        for row, (method, *_) in table.rows.items():
            if name in tables:
                first.setdefault(method, f"{tables[name]}, {row.split(',')[0]}")
    assert first == {
        method.name: method.where for method in petl.METHODS.values() if method.where != "-"
    }


def test_a_method_is_one_cell_in_all_tables_and_figures():
    plan = experiments.parse(["all", "--datasets", "demo"])
    listed = cells.cells_of(plan)
    assert len(listed) == len(set(listed)) == len({cell.name for cell in listed})
    assert [cell.name for cell in listed if cell.method == "houlsby_par"] == [
        "demo/houlsby_par/seed0",
        *(f"rr{n}/demo/houlsby_par/seed0" for n in (64, 32, 8, 4)),
    ]
    # Twice the parameters of PF par are those of PF par x2 in Table V, and of LoRA those of LoRA in
    # Table VI.
    assert not any(cell.rr == 8 and cell.method == "pfeiffer_par" for cell in listed)
    assert (
        Cell("demo", "pfeiffer_par_x2", 0, "demo") in listed
        and Cell("demo", "lora_x2", 0, "demo") in listed
    )


def test_curves_of_the_base_ast():
    """A quarter to four times the parameters: RR 256 to 16 for adapters, 6 to 100 prompts."""

    def settings(method):
        return [(c.method, c.rr, c.prompts) for c in cells.budgets("esc50", method, 0, "audioset")]

    assert settings("pfeiffer_par") == [
        ("pfeiffer_par", 256, None),
        ("pfeiffer_par", 128, None),
        ("pfeiffer_par", None, None),
        ("pfeiffer_par_x2", None, None),
        ("pfeiffer_par", 16, None),
    ]
    assert [prompts for _, _, prompts in settings("dpt")] == [6, 12, None, 50, 100]
    assert settings("full_ft") == [("full_ft", None, None)]


def test_the_scale_of_lora_is_another_cell():
    """A claim is about alpha; a narrow backbone has the same. alpha 8 is that of METHODS."""
    cell = cells.cell_of("demo", "lora alpha=2", 3, "demo")
    assert cell.name == "alpha2/demo/lora/seed3"
    assert campaign.method_of(cell).parts[0].alpha == 2
    plan = experiments.parse(["claims", "--datasets", "demo"])
    words = campaign.options(cell, plan)
    assert words[words.index("--alpha") + 1] == "2"
    assert cells.cell_of("demo", "lora alpha=8", 3, "demo") == Cell("demo", "lora", 3, "demo")


def test_few_shot_cells():
    listed = cells.cells_of(plan := experiments.parse(["table2"]))
    assert {(c.dataset, c.shots) for c in listed} == {("esc50", k) for k in (1, 2, 4, 8)} | {
        ("gsc", k) for k in (2, 8, 32, 64)
    }
    assert {cells.epochs_of(c, plan) for c in listed} == {50, 75}  # as the paper's datasets have it
    plan = experiments.parse(["table2", "--datasets", "demo"])
    assert {cells.epochs_of(c, plan) for c in cells.cells_of(plan)} == {cells.FEW_SHOT_EPOCHS}
    expected = f"30 epochs instead of {DATASETS['demo'].epochs}: few clips make few steps"
    assert expected in tables.render("table2", {}, plan)[0]


def test_random_weights_are_more_cells():
    plan = experiments.parse(
        ["table1", "--datasets", "demo", "--random", "linear,lora", "--seeds", "0,1"]
    )
    listed = cells.cells_of(plan)
    assert len(listed) == 2 * (15 + 2)
    assert Cell("demo", "lora", 1, "random:demo") in listed
    assert Cell("demo", "lora", 1, "random:demo").name == "weights-random_demo/demo/lora/seed1"


def test_windows_and_sizes_of_the_published_version():
    """The conformer adapter has a window of 8 on ESC-50 and US8K with all clips, else the 31 of
    METHODS."""
    listed = cells.cells_of(experiments.parse(["published1"]))
    windows = {
        cell.dataset: cell.kernel for cell in listed if cell.method == "conformer_pfeiffer_par"
    }
    assert windows == {"esc50": 8, "us8k": 8, "gsc": None, "fsc": None}
    assert {cell.kernel for cell in listed if not cell.method.startswith("conformer")} == {None}
    assert {cell.kernel for cell in cells.cells_of(experiments.parse(["published2"]))} == {None}
    assert (
        cells.cell_of("esc10", "conformer_houlsby_par", 0, "audioset").kernel == 8
    )  # clips of ESC-50
    plan = experiments.parse(["kernels"])
    assert cells.columns_of("kernels", plan) == [
        ("esc50", 4),
        ("esc50", None),
        ("gsc", 32),
        ("gsc", None),
    ]
    sweep = [
        (cell.dataset, cell.shots, cell.kernel)
        for cell in cells.cells_of(plan)
        if cell.dataset == "esc50"
    ]
    assert sweep == [("esc50", shots, k) for shots in (4, None) for k in (1, 3, 8, 15, None)]
    sizes = {
        name: petl.rank_of(768, int(words.split("=")[1]))
        for name, (words, *_) in TABLES["scaling"].rows.items()
        if "rr=" in words
    }
    assert all(name.endswith(f"r = {rank}") for name, rank in sizes.items()) and len(sizes) == 15
    scaling = cells.cells_of(experiments.parse(["scaling", "--datasets", "demo"]))
    assert (
        Cell("demo", "lora", 0, "demo") in scaling
        and Cell("demo", "lora", 0, "demo", rr=192) in scaling
    )
    assert (
        Cell("demo", "lora_x2", 0, "demo") in scaling
        and Cell("demo", "conformer_pfeiffer_par", 0, "demo") in scaling
    )
    assert cells.cells_of(
        experiments.parse(["kernels", "--methods", "conformer_pfeiffer_par"])
    ) == cells.cells_of(plan)
    text = tables.render("newer", {}, experiments.parse(["newer"]))[0]
    assert "missing (91.16)" in text and "| AdaptFormer" in text


def test_a_folder_with_the_name_of_a_size(tmp_path, monkeypatch):
    """It is the folder that `--weights tiny` trains from, as train.py does."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SMALL_AST, "tiny")
    assert (
        cells.shape_of("random:tiny").dim,
        cells.shape_of("demo").dim,
        cells.shape_of("tiny").dim,
    ) == (192, 128, 64)


def test_a_checkpoint_with_a_head_of_its_own():
    """train.py pools by its own option, so methods that pool otherwise fit any checkpoint."""
    words = ["newer", "--datasets", "demo", "--methods", "probe", "--weights", str(SMALL_AST)]
    plan = experiments.parse(words)
    assert "missing" in tables.render("newer", {}, plan)[0]
