"""The file of a campaign: the tables made from it are those of its runs, byte for byte."""

import csv
import json
import lzma
import shutil

import pytest
from helpers import SMALL_AST, make_run

from support.records import read_run
from tools import campaign, experiments, finished
from tools.cells import Cell

LETTERS = {
    "linear": "rrrrwwwwww",
    "bitfit": "rrrrrrrrrw",
    "lora": "rrrrrrrrww",
    "dpt": "rwrwrwrwrw",
}


@pytest.fixture
def trained(here, monkeypatch):
    """A campaign of made-up runs, with a search, a figure and claims. Returns its tables."""

    def train(folder, words):
        letters = LETTERS.get(folder.parent.name, "r" * 9 + "w")
        if folder.name == "seed1":
            letters = letters[::-1]
        return make_run(folder, words, letters, validation=float(len(str(folder)) % 7))

    monkeypatch.setattr(campaign, "train_cell", train)
    methods = ["--methods", "linear,bitfit,lora,dpt", "--seeds", "0,1"]
    more = ["--add", "probe", "--random", "linear", "--weights", "demo"]
    assert here("table1", *methods, *more) == 0
    assert here("claims", "fig3", *methods) == 0
    assert here("tune", "table1", *methods) == 0
    return files_in(here.out / "tables") | files_in(here.out / "figures")


def files_in(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_tables_from_the_file_are_those_of_the_runs(here, trained, tmp_path, capsys):
    """All of them, byte for byte, where nothing else of the campaign is left."""
    file = tmp_path / "results" / "campaign.json.xz"
    assert experiments.main(["keep", str(here.out), str(file)]) == 0
    assert f"runs written to {file}" in capsys.readouterr().out
    runs = len(here.started)
    shutil.rmtree(here.out)
    assert experiments.main(["show", str(file)]) == 0
    assert len(here.started) == runs and not here.out.exists()
    shown = files_in(file.parent)
    assert shown.pop(file.name) == file.read_bytes()
    assert {name.split("-")[0] for name in shown} == {"table1", "claims", "fig3"}
    # Two tables with their CSV, the claims, the figure in three kinds:
    assert len(trained) == 4 + 2 + 3
    assert shown.keys() == trained.keys()
    assert [name for name in trained if shown[name] != trained[name]] == []

    for name in shown:
        (file.parent / name).unlink()
    words = ["--datasets", "esc10", "--weights", str(SMALL_AST), "--epochs", "1"]
    words = ["show", str(file), "table1", *words]
    passed = ["--", "--folds", "1", "--seconds", "0.5"]
    assert experiments.main([*words, "--methods", "lora,dpt", *passed]) == 0
    assert "2 cells, 2 finished, 0 missing" in capsys.readouterr().out
    (table,) = file.parent.glob("*.md")  # that of the paper's rates
    assert "**80.00** [" in table.read_text() and "Linear" not in table.read_text()
    assert experiments.main([*words, "--methods", "lora,prefix", *passed]) == 0
    assert "2 cells, 1 finished, 1 missing" in capsys.readouterr().out
    assert "missing" in table.read_text() and len(here.started) == runs  # nothing is trained
    words[words.index("1")] = "2"
    assert experiments.main([*words, "--methods", "lora", *passed]) == 1
    assert "holds a run with epochs 1, not 2" in capsys.readouterr().err
    assert experiments.main([*words[:3], "--datasets", "gsc"]) == 2
    assert "none of these runs is in it" in capsys.readouterr().err
    assert experiments.main(["show", str(file), "tune", "table1"]) == 2
    assert "`show` searches for nothing" in capsys.readouterr().err


def test_show_and_compare_what_the_file_has(here, trained, tmp_path, capsys):
    """A target without options is made as the campaign made it. A run is named as in a folder."""
    file = tmp_path / "results" / "campaign.json.xz"
    experiments.main(["keep", str(here.out), str(file)])
    assert experiments.main(["show", str(file), "claims"]) == 0
    (name,) = [name for name in trained if name.startswith("claims") and name.endswith(".md")]
    shown = files_in(file.parent)
    text = shown.pop(name)
    assert text == trained[name] and b"Only of linear, bitfit, lora, dpt (--methods)" in text
    rows = csv.DictReader(shown[name.replace(".md", ".csv")].decode().splitlines())
    pairs = {(row["better"], row["than"]) for row in rows if row["points"]}
    assert f"correction for all {len(pairs)} pairs that were compared here" in text.decode()
    assert {other.split("-")[0] for other in shown} == {"claims", "campaign.json.xz"}
    assert experiments.main(["show", str(file), "table2"]) == 2
    assert "no command of its campaign made table2; make it from" in capsys.readouterr().err

    pair = [f"esc10/{method}" for method in ("bitfit", "linear")]
    for seed in ("", "/seed1"):  # all seeds, or one
        said = []
        for root in (here.out, file):
            variant = Cell("esc10", "lora", 1, str(SMALL_AST)).variant
            assert (
                experiments.main(["compare", *(f"{root}/{variant}/{x}{seed}" for x in pair)]) == 0
            )
            said.append(capsys.readouterr().out.replace(str(root), "ROOT"))
        assert said[0] == said[1] and "right more often on" in said[0]
    assert experiments.main(["compare", f"{file}/{variant}/esc10/linaer", str(file)]) == 2
    assert f"name a run in it, such as {file}/{variant}/esc10/linear" in capsys.readouterr().err


def test_what_the_file_holds(here, trained, tmp_path):
    """Read without any code of ours: answers to the test clips of a run, what it took, versions,
    the machine and the commands. No path of the disk, and no probability."""
    file = tmp_path / "campaign.json.xz"
    experiments.main(["keep", str(here.out), str(file)])
    text = lzma.decompress(file.read_bytes()).decode()
    kept = json.loads(text)
    name = Cell("esc10", "lora", 1, str(SMALL_AST)).name
    run = kept["runs"][name]
    clips = kept["clips"][run["settings"]["clips"]]
    assert clips == [[1, f"{i}.wav", "bell"] for i in range(10)]
    (fold,) = run["folds"]
    answers = [run["classes"][number] for number in fold["predictions"]]
    expected = [row["prediction"] for row in read_run(here.out / name).tested()]
    assert answers == expected == ["drum"] * 2 + ["bell"] * 8
    assert (fold["accuracy"], fold["epoch"], fold["seconds"]) == (80, 1, 1)
    assert run["parameters"]["petl"] == 1 and run["settings"]["lr"] == 0.02
    assert run["versions"] == {"torch": "2"} and "numpy" in kept["packages"]
    assert kept["machine"]["processor"] and kept["machine"]["cores"] >= 1
    assert set(kept["tuned"]) == set(json.loads((here.out / "tuned.json").read_text()))
    assert sum(command[0] == "claims" for command in kept["commands"].values()) == 1
    assert "data_dir" not in run["settings"]
    assert "cache" not in text and str(here.out) not in text and "millionths" not in text
    assert len(kept["runs"]) == len({folder for folder in here.started})


def without_group(kept):
    del kept["runs"]["seed0"]["settings"]["group"]
    return kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kept: b"no file of ours", "cannot read"),
        (lambda kept: lzma.compress(b"{"), "cannot read"),
        (lambda kept: lzma.compress(b"[" * 100_000), "cannot read"),
        (without_group, "seed0: Object missing required field group"),
        (lambda kept: {**kept, "runs": 3}, "runs: Expected `object`, got `int`".replace("`", "")),
        (lambda kept: {**kept, "clips": {}}, "the clips and answers of"),
    ],
)
def test_a_damaged_file_is_one_line(change, message, tmp_path, capsys):
    words = ["--dataset", "esc10", "--method", "lora", "--weights", str(SMALL_AST)]
    make_run(tmp_path / "runs" / "seed0", [*words, "--seconds", "0.5"], "rw")
    file = tmp_path / "campaign.json.xz"
    assert finished.keep(tmp_path / "runs", file) == 1
    changed = change(json.loads(lzma.decompress(file.read_bytes())))
    if isinstance(changed, dict):
        changed = lzma.compress(json.dumps(changed).encode())
    file.write_bytes(changed)
    assert experiments.main(["show", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(file) in line and message in line
    assert experiments.main(["keep", str(tmp_path / "empty"), str(file)]) == 2
    assert "there is no finished run in it" in capsys.readouterr().err
