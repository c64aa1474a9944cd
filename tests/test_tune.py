"""The search for learning rates: what is tried, what is chosen, and that the file of it is read
back."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers import SMALL_AST, answered, make_folder, make_run, table_of

import data
import petl
import train
from support.command import UserError
from tools import campaign, cells, experiments, tables, tune
from tools.cells import Cell


def test_the_rates(monkeypatch):
    """Five, a factor of about 3 apart, the same for every method; the paper's is the cell that all
    tables share."""
    for method, paper in (("lora", 0.005), ("dpt", 0.01)):
        cell = Cell("esc50", method, 1000, "audioset")
        rates = tune.rates_of(cell)
        assert list(rates) == pytest.approx(
            [0.1 * paper, 0.3 * paper, paper, 3 * paper, 10 * paper]
        )
        ratios = [b / a for a, b in zip(list(rates), list(rates)[1:], strict=False)]
        assert all(2.9 < ratio < 3.4 for ratio in ratios)
        assert rates.pop(paper) == cell and all(
            campaign.method_of(one).lr == lr for lr, one in rates.items()
        )
    assert (
        tune.rates_of(Cell("esc50", "lora", 1000, "audioset"))[0.0005].name
        == "lr0.0005/esc50/lora/seed1000"
    )
    monkeypatch.setattr(tune, "method_of", lambda cell: replace(petl.find("lora"), lr=0.2))
    assert list(tune.rates_of(cell)) == [0.02, 0.06, 0.2, 0.6]  # train.py takes none above 1


@pytest.mark.parametrize(
    ("tried", "best"),
    [
        ([(0.001, 70.0), (0.003, 71.0), (0.01, 70.5)], 0.003),
        ([(0.001, 71.0), (0.003, 70.0), (0.01, 71.0), (0.03, 71.0)], 0.01),  # equals: the paper's
        (
            [(0.001, 71.0), (0.003, 71.0), (0.01, 70.0), (0.03, 71.0)],
            0.03,
        ),  # times 3 is nearer than times 0.3
        ([(0.001, 0.0), (0.01, None), (0.1, None)], 0.001),  # what diverged is never chosen
        ([(0.001, None), (0.01, None)], None),
    ],
)
def test_the_best(tried, best):
    assert tune.best_of(tried, usual=0.01) == best


@pytest.fixture
def made_up(here, monkeypatch) -> dict[tuple[str, float], float]:
    """Validation accuracies by method and learning rate, for a campaign that trains nothing: 50
    where there is none. Of the test clips a run with the best of them tells one, others nine of
    ten."""
    accuracies = {}

    def train_cell(folder, words):
        args = train.parse(words)
        accuracy = accuracies.get((args.method, args.lr), 50.0)
        return make_run(
            folder, words, "r" + "w" * 9 if accuracy > 50 else "r" * 9 + "w", validation=accuracy
        )

    monkeypatch.setattr(campaign, "train_cell", train_cell)
    return accuracies


def test_a_search(here, made_up, capsys):
    """Of two methods: validation clips judge, whatever the test clips say.

    Then all is read back.
    """
    words = ["table1", "--methods", "linear,bitfit", "--seeds", "0,1"]
    made_up["linear", 0.03] = 60.0  # of bitfit all are equal
    assert here("tune", *words) == 0
    printed = capsys.readouterr().out
    tried = "[(0.001, 50.0), (0.003, 50.0), (0.01, 50.0), (0.03, 60.0), (0.1, 50.0)]"
    found = f"best 0.03, without search 0.01; validation accuracy {tried}"
    assert f"linear/seed1000: {found}\n" in printed
    variants = [
        Cell("esc10", "linear", 0, str(SMALL_AST), lr=lr).variant
        for lr in (0.001, 0.003, None, 0.03, 0.1)
    ]
    linear = [str(run.relative_to(here.out)) for run in here.started if run.parent.name == "linear"]
    search, reported = linear[:5], linear[5:]
    assert search == [f"{variant}/esc10/linear/seed1000" for variant in variants]
    assert reported == [f"{variants[i]}/esc10/linear/seed{seed}" for seed in (0, 1) for i in (2, 3)]
    assert len(here.started) == 9 + 5 + 2  # of bitfit the paper's rate is the best
    searches = json.loads((here.out / "tuned.json").read_text())
    assert {name: (s["usual"], s["best"]) for name, s in searches.items()} == {
        Cell("esc10", "linear", 0, str(SMALL_AST)).name: (0.01, 0.03),
        # four times that of METHODS, because this backbone is narrow
        Cell("esc10", "bitfit", 0, str(SMALL_AST)).name: (0.02, 0.02),
    }
    table = table_of(here.out, "table1")
    # Two seeds with ten clips and the same answers: Wilson's of 9 of 10, and the bootstrap's end.
    assert table["Linear"]["ESC-10"] == "90.00 [59.58, 100.00]"
    assert table["BitFit"]["ESC-10"] == "90.00 [59.58, 100.00] ~"
    assert table["Linear"]["ESC-10, tuned"] == "_10.00_ [0.00, 40.42] at 0.03"
    assert table["BitFit"]["ESC-10, tuned"] == "**90.00** [59.58, 100.00] at 0.02"
    assert "by seed 1000: the same search" in printed and "Best at its edge" not in printed

    for setting, heads in (
        ("paper", ["ESC-10"]),
        ("tuned", ["ESC-10, tuned"]),
        ("both", ["ESC-10", "ESC-10, tuned"]),
    ):
        shutil.rmtree(here.out / "tables")
        assert here(*words, "--setting", setting) == 0
        assert [
            head for head in table_of(here.out, "table1")["Linear"] if head.startswith("ESC")
        ] == heads
    shutil.rmtree(here.out / "tables")
    assert here("table1", "--methods", "linear") == 0  # Wilson's of 9 in 10
    assert table_of(here.out, "table1")["Linear"]["ESC-10"] == "90.00 [59.58, 98.21]"
    capsys.readouterr()
    (here.out / "tuned.json").unlink()
    assert (
        here("tune", *words) == 0 and "10 cells, 10 finished, 0 to train" in capsys.readouterr().out
    )
    assert json.loads((here.out / "tuned.json").read_text()) == searches and len(here.started) == 16
    assert here("tune", "table1", "--methods", "linear,lora") == 0  # one more is put beside them
    assert len(json.loads((here.out / "tuned.json").read_text())) == 3


def test_train_py_gets_the_rate_that_was_found(here):
    here.out.mkdir()
    tried = [[0.001, 50.0], [0.01, 50.0], [0.03, 60.0]]
    found = searches("linear", usual=0.01, best=0.03, tried=tried)
    (here.out / "tuned.json").write_text(json.dumps(found))
    for _ in range(2):
        assert here("table1", "--methods", "linear", "--setting", "tuned") == 0
    (run,) = here.started
    assert json.loads((run / "config.json").read_text())[
        "lr"
    ] == 0.03 and "lr0.03/esc10/linear" in str(run)


def test_a_fitted_method_is_not_searched_for(here, made_up, capsys):
    """It has no rate: both settings are the same run, and the search trains none of its own."""
    words = ["table1", "--methods", "linear", "--add", "probe,logmel", "--random", "probe"]
    words += ["--weights", "demo"]
    made_up["linear", 0.03] = 60.0
    assert here("tune", *words) == 0
    probes = [run for run in here.started if run.parent.name in ("probe", "logmel")]
    assert len(probes) == 3 and {run.name for run in probes} == {"seed0"}
    assert len(here.started) == 3 + 5 + 2
    assert list(json.loads((here.out / "tuned.json").read_text())) == [
        Cell("esc10", "linear", 0, "demo").name
    ]
    table = table_of(here.out, "table1")
    for row in ("probe", "logmel", "probe, random weights"):
        line = table[row]
        both = [line[head].strip("*_~ ") for head in ("ESC-10", "ESC-10, tuned")]
        assert both[0].startswith("90.00") and " at " not in str(line)
        assert both[0].replace("*", "") == both[1].replace("*", "")
    capsys.readouterr()
    assert here("tune", "table1", "--methods", "lora", "--add", "probe", "--dry-run") == 0
    assert "5 cells" in capsys.readouterr().out


def test_no_validation_clips(here, monkeypatch, capsys):
    recipe = replace(data.DATASETS["esc10"], validate=False)
    monkeypatch.setitem(data.DATASETS, "esc10", recipe)
    assert here("tune", "table1", "--methods", "linear") == 2 and not here.started
    assert "esc10 has no validation clips to judge learning rates by" in capsys.readouterr().err


def test_own_sounds_without_validation_clips(here, tmp_path, capsys):
    """Of two clips of a class one trains and one tests.

    That is said before the search, not after it.
    """
    root = make_folder(tmp_path / "mine", 2)
    words = [
        "tune",
        "table1",
        "--methods",
        "linear",
        "--datasets",
        "folder",
        "--data-dir",
        f"folder={root}",
    ]
    assert here(*words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (
        line == "error: folder has no validation clips to judge learning rates by: "
        "leave it out, --datasets"
    )
    assert not here.started
    make_folder(root, 5)
    assert here(*words, "--dry-run") == 0 and "5 cells, 0 finished" in capsys.readouterr().out


def entry(**changes) -> dict:
    tried = [[0.0005, 60.0], [0.0015, 61.0], [0.005, 62.0], [0.015, 63.0], [0.05, 63.5]]
    options = ["--folds", "1", "--seconds", "0.5"]
    return {"options": options, "usual": 0.005, "tried": tried, "best": 0.05, **changes}


def searches(method: str, **changes) -> dict:
    """tuned.json with one search."""
    return {Cell("esc10", method, 0, str(SMALL_AST)).name: entry(**changes)}


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ("{", [], "tuned.json (Expecting property name"),
        (searches("lora", best="x"), [], ".best: Expected"),
        (searches("lora", tried=[[0.1]]), [], ".tried[0]: Expected"),
        (searches("lora"), ["--seeds", "0,1000"], "--seeds: 1000 chooses the learning rates"),
        (searches("dpt"), [], "no learning rate has been searched for"),
        ({}, ["tune", "--seeds", "1000"], "--seeds: 1000 chooses the learning rates"),
    ],
)
def test_what_cannot_be_used_is_one_line(content, words, message, here, capsys):
    here.out.mkdir()
    (here.out / "tuned.json").write_text(
        content if isinstance(content, str) else json.dumps(content)
    )
    start = ["tune", "table1"] if "tune" in words else ["table1", "--setting", "tuned"]
    assert here(*start, "--methods", "lora", *[word for word in words if word != "tune"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line and not here.started
    assert (
        content != "{" or here("table1", "--methods", "lora", "--dry-run") == 0
    )  # which does not ask for it


def test_a_tuned_table_of_results_by_hand(tmp_path):
    """Both settings side by side, the paper's numbers beside its own; the edge of the search is
    told."""
    plan = experiments.parse(
        ["table1", "--methods", "lora", "--datasets", "esc50,gsc", "--setting", "both"]
    )
    plan.tuned["esc50/lora/seed0"] = tune.Search(**entry())
    with pytest.raises(
        UserError, match="searched for gsc/lora/seed0: `tune` as the first word does so"
    ):
        cells.cells_of(plan)
    gsc = tune.Search(**entry(tried=[[0.001, 1.0], [0.005, 2.0]], best=0.005))
    plan.tuned["gsc/lora/seed0"] = gsc
    tuned = Cell("esc50", "lora", 0, "audioset", lr=0.05)
    assert cells.cells_of(plan) == [
        Cell("esc50", "lora", 0, "audioset"),
        tuned,
        Cell("gsc", "lora", 0, "audioset"),
    ]
    done = {cell: answered("r" * 20 + "w" * 20, seconds=2.0) for cell in cells.cells_of(plan)}
    text, records = tables.render("table1", done, plan)
    head, _, line = (row.split("|") for row in text.splitlines() if row.startswith("|"))
    assert line[-2].strip() == "4"  # seconds of the tuned cells alone
    assert [word.strip() for word in head[4:-2]] == [
        "ESC-50",
        "GSC",
        "ESC-50, tuned",
        "GSC, tuned",
        "Avg",
        "Avg, tuned",
    ]
    assert (
        "(86.45)" in line[4]
        and "at 0.05" in line[6]
        and "(" not in line[6]
        and "at 0.005" in line[7]
    )
    assert (
        "test clips of another. The search had the options `--folds 1 --seconds 0.5`. Best at"
        in text
    )
    assert "Best at its edge, so that another may be better: lora on esc50, lora on gsc." in text
    assert [(r["setting"], r["lr"]) for r in records] == [
        ("paper", 0.005),
        ("paper", 0.005),
        ("tuned", 0.05),
        ("tuned", 0.005),
    ]


def test_a_rate_that_diverges_and_a_run_that_fails(here, made_up, monkeypatch, capsys):
    """The first is a finding, null in the file; the second leaves the search open, and the table
    unmade."""
    with pytest.raises(UserError) as error:
        train.check_losses([1.0, math.nan], SimpleNamespace(lr=0.1), "fold 1, epoch 1")
    train_cell, broken = campaign.train_cell, {0.1: str(error.value), 0.003: "a bug"}

    def train_some(folder, words):
        return broken.get(train.parse(words).lr) or train_cell(folder, words)

    monkeypatch.setattr(campaign, "train_cell", train_some)
    words = ["tune", "table1", "--methods", "linear"]
    assert here(*words) == 1
    assert "seed1000: a bug (all of it in " in capsys.readouterr().err
    assert json.loads((here.out / "tuned.json").read_text()) == {}
    assert not (here.out / "tables").exists()
    del broken[0.003]
    assert here(*words) == 0
    (search,) = json.loads((here.out / "tuned.json").read_text()).values()
    assert search["tried"] == [
        [0.001, 50.0],
        [0.003, 50.0],
        [0.01, 50.0],
        [0.03, 50.0],
        [0.1, None],
    ]
    monkeypatch.setattr(campaign, "train_cell", lambda folder, words: str(error.value))
    assert here("tune", "table1", "--methods", "bitfit") == 1
    assert "bitfit/seed1000: the loss is not finite at any learning rate" in capsys.readouterr().err


def test_a_dry_run_lists_the_search(here, made_up, capsys):
    """Once it has been made, --setting lists what is to be reported."""
    words = ["tune", "table1", "--methods", "linear", "--dry-run"]
    assert here(*words) == 0
    printed = capsys.readouterr().out
    assert "5 cells, 0 finished" in printed and not here.started and not here.out.exists()
    made_up["linear", 0.1] = 60.0
    assert here(*words[:-1]) == 0
    capsys.readouterr()
    assert here(*words[1:], "--setting", "both", "--seeds", "0,1") == 0
    assert "4 cells, 2 finished" in capsys.readouterr().out
