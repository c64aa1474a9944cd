"""The command and the tables it prints: marks, averages and numbers of the paper, dry runs, wrong
use."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import SMALL_AST, answered, campaign_words, make_folder, table_of, write_csv

from support.checkpoints import read_header
from tools import experiments, tables
from tools.cells import Cell
from tools.finished import Finished

ROOT = Path(experiments.__file__).parents[1]


def test_marks():
    assert tables.marked(["70.00", "90.00", "80.00", None]) == [
        "70.00",
        "**90.00**",
        "_80.00_",
        "missing",
    ]
    assert tables.marked(["90.00", "90.00", "80.00"]) == [
        "**90.00**",
        "**90.00**",
        "_80.00_",
    ]  # equals are equally good
    assert tables.marked(["9.00", "10.00", "2.00"]) == [
        "_9.00_",
        "**10.00**",
        "2.00",
    ]  # as numbers, not as text
    assert tables.marked(["90.00"]) == ["90.00"] and tables.marked([None]) == [
        "missing"
    ]  # nothing to compare with


def of(*accuracies: float, **more) -> Finished:
    """A run of folds of 400 clips with these accuracies, which are multiples of 0.25."""
    return answered(*("r" * round(4 * n) + "w" * round(400 - 4 * n) for n in accuracies), **more)


def test_a_table_beside_the_paper():
    """Two seeds of five folds on ESC-50, with 78 and 82 %: 80 +- 12.7062 x 2.8284 / sqrt(2), which
    is Student's interval of two; FSC is not there yet."""
    plan = experiments.parse(["table7", "--seeds", "0,1"])
    done = {}
    for method, accuracy in (("pfeiffer_seq", 80), ("adapter_ffn_par_before", 70)):
        for seed in (0, 1):
            folds = [accuracy - 2 + 4 * seed] * 5
            done[Cell("esc50", method, seed, "audioset")] = of(*folds, petl=248_976)
    done[Cell("esc50", "adapter_ffn_par_residual", 1, "audioset")] = of(*[60.0] * 5)
    text, records = tables.render("table7", done, plan)
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "| **80.00** [54.59, 100.00] (86.77) | missing (72.45) |" in re.sub(
        " +", " ", lines["Seq, residual"]
    )
    assert "| _70.00_ [44.59, 95.41] (87.07) |" in re.sub(" +", " ", lines["Par, no residual"])
    # One seed of 2,000 clips: the bootstrap's 1.96 sqrt(0.6 x 0.4 / 2000) = 2.15.
    alone = re.search(
        r"\| 60.00 \[(.*), (.*)\], 1 of 2 seeds \(73.20\) \|",
        re.sub(" +", " ", lines["Par, residual"]),
    )
    low, high = map(float, alone.groups())
    assert (low, high) == pytest.approx((57.85, 62.15), abs=0.15)
    assert "| missing (69.20) | missing (56.48) |" in re.sub(" +", " ", lines["Seq, no residual"])
    assert (
        "248,976" in lines["Seq, residual"]
        and "seeds 0, 1" in text
        and "Not as in the paper" not in text
    )
    assert "fewer dimensions" not in text  # audioset's
    (record,) = [r for r in records if r["row"] == "Seq, residual" and r["dataset"] == "esc50"]
    assert (record["mean"], record["runs"], record["seeds"], record["paper"]) == (
        pytest.approx(80),
        10,
        2,
        "86.77",
    )


def test_averages_beside_the_paper():
    plan = experiments.parse(["table4", "--methods", "lora,lora_q"])
    done = {
        Cell(d, "lora", 0, "audioset"): of(n, petl=221_184)
        for d, n in zip(("esc50", "us8k", "gsc", "fsc"), (80.0, 82.0, 90.0, 70.0), strict=True)
    }
    text, _ = tables.render("table4", done, plan)
    (line,) = [line for line in text.splitlines() if line.startswith("| q v")]
    assert "| 80.50 (84.97) |" in re.sub(" +", " ", line)
    (line,) = [line for line in text.splitlines() if line.startswith("| q  ")]
    assert "missing (79.13)" in line  # no average of three


def test_parameters_beside_the_paper():
    """On the base AST the paper's count stands in parentheses; what `linear` trains depends on the
    classes."""
    plan = experiments.parse(["table1", "--methods", "linear,lora", "--datasets", "esc50,esc10"])
    done = {
        Cell("esc50", "linear", 0, "audioset"): of(70.0, petl=0, head=39_986),
        Cell("esc10", "linear", 0, "audioset"): of(71.0, petl=0, head=9_226),
    }
    text, _ = tables.render("table1", done, plan)
    assert "9,226 - 39,986 (9-40K)" in text and "- (221K)" in text


def test_random_weights_are_a_second_block():
    plan = experiments.parse(
        ["table1", "--datasets", "demo", "--random", "linear,lora", "--seeds", "0,1"]
    )
    text, _ = tables.render("table1", {Cell("demo", "lora", 1, "random:demo"): of(30.0)}, plan)
    assert "| LoRA, random weights" in text and "30.00 [25.72, 34.66], 1 of 2 seeds" in text


def test_dry_run(here, capsys):
    assert here("table1", "--methods", "linear,lora") == 0
    capsys.readouterr()
    assert here("table1", "--methods", "linear,lora,dpt", "--dry-run") == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines() if "seed0" in line]
    lines = {line[0].split("/")[-2]: line for line in lines}
    assert set(lines) == {"linear", "lora", "dpt"}
    assert lines["lora"][1:] == ["finished"] and lines["dpt"][1:] == ["to", "do"]
    assert "3 cells, 2 finished, 1 to train\n" in printed
    assert len(here.started) == 2 and not list(here.out.rglob("dpt"))


def test_dry_run_without_the_data(capsys, tmp_path):
    """Nothing is downloaded."""
    options = ["table5", "--dry-run", "--cache-dir", str(tmp_path), "--out", str(tmp_path)]
    assert experiments.main(options) == 0
    out = capsys.readouterr().out
    assert "16 cells, 0 finished" in out
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(here, capsys, tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert here("table1", "--methods", "linear", out="file") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and str(tmp_path / "file") in error


METHOD = '''
class ScaleShift(nn.Module):
    """gamma * S(u) + beta (SSF, Lian et al., NeurIPS 2022)."""

    def __init__(self, wrapped: nn.Module, dim: int):
        super().__init__()
        self.wrapped = wrapped
        self.gamma, self.beta = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, u):  # (batch, tokens, dim)
        return self.gamma * self.wrapped(u) + self.beta


@dataclass(frozen=True)
class ScaleShifts:
    """A scale and a shift behind every MHSA and FFN."""

    def insert(self, model, blocks):
        for block in blocks:
            block.attn = ScaleShift(block.attn, model.config.dim)
            block.ffn = ScaleShift(block.ffn, model.config.dim)


'''
ROW = '    Method("scale_shift", (ScaleShifts(),)),\n'


def test_a_method_of_your_own(tmp_path, sounds, cache_dir):
    """What docs/reproduce.md says: a module and a part, a row in METHODS, and --add.

    Done in a copy of the repository.
    """
    for file in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("tools/*.json")):
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(file, copy)
    code = (tmp_path / "petl.py").read_text()
    before, after = code.split("# " + "-" * 77 + " the table of methods")
    first = '    Method("full_ft"'
    assert first in after
    (tmp_path / "petl.py").write_text(
        before + METHOD + "# the table of methods" + after.replace(first, ROW + first)
    )
    out = tmp_path / "out"
    targets = [
        "table1",
        "table5",
        "fig4",
        "--methods",
        "hydra",
        "--add",
        "scale_shift",
        "--jobs",
        2,
    ]
    command = [
        sys.executable,
        "-m",
        "tools.experiments",
        *campaign_words(sounds, cache_dir, out, *targets),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for target in ("table1", "table5"):
        line = table_of(out, target)["scale_shift"]
        assert line["trained"] == str(
            2 * 2 * 2 * 64
        )  # gamma and beta, two places, two blocks, 64 dimensions
        assert (
            0 <= float(line["ESC-10"].split()[0].strip("*_")) <= 100
            and line.get("Avg in the paper", "-") == "-"
        )
    (file,) = out.rglob("scale_shift/seed0/fold1.safetensors")
    assert read_header(file)["method"]["parts"] == [{"part": "ScaleShifts"}]
    assert list((out / "figures").glob("fig4-*.png"))


@pytest.mark.parametrize("dataset", ["folder", "csv"])
def test_own_sounds(dataset, here, tmp_path, capsys):
    """Clips of any length: they say how many frames the model reads.

    The second time the results are read back.
    """
    root = make_folder(tmp_path / "mine")
    names = sorted(file.relative_to(tmp_path).as_posix() for file in root.rglob("*.wav"))
    write_csv(tmp_path / "t.csv", "path,label", *(f"{name},{name.split('/')[1]}" for name in names))
    place = tmp_path / "t.csv" if dataset == "csv" else root
    words = [
        "table1",
        "--datasets",
        dataset,
        "--data-dir",
        place,
        "--methods",
        "linear",
        "--weights",
        SMALL_AST,
        "--epochs",
        1,
        "--cache-dir",
        tmp_path / "cache",
        "--out",
        here.out,
    ]
    for _ in range(2):
        assert experiments.main([str(word) for word in words]) == 0
    assert len(here.started) == 1 and "1 cells, 1 finished, 0 to train" in capsys.readouterr().out
    assert 0 <= float(table_of(here.out, "table1")["Linear"][dataset].split()[0]) <= 100


def test_data_folders():
    words = ["table7", "--data-dir", "sounds", "--data-dir", "fsc=speech"]
    assert experiments.parse(words).data_dir == {"esc50": Path("sounds"), "fsc": Path("speech")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["table8"], "unknown target 'table8': did you mean 'table7'?"),
        ([], "arguments are required: TARGET"),
        (["table1", "--datasets", "esc51"], "did you mean 'esc50'?"),
        (["table1", "--methods", "loora"], "did you mean 'lora'?"),
        (["table1", "--methods", "hydra"], "no table has them as rows, which --add makes"),
        (["table1", "--datasets", ""], "unknown dataset ''"),
        (["table1", "--methods", ""], "unknown method ''"),
        (["table1", "--random", "loora"], "did you mean 'lora'?"),
        (["table1", "--seeds", "x"], "no list of whole numbers"),
        (["table1", "--jobs", "0"], "--jobs"),
        (["table1", "--", "--method", "lora"], "--method behind --"),
        (["table1", "--", "--folds", "x"], "no list of whole numbers"),
        (["table1", "--", "--dtype", "float8"], "float8"),
        (["table1", "--", "--device", "quantum"], "--device quantum"),
        (["table1", "--weights", "absent.bin", "--datasets", "demo"], "no weights at absent.bin"),
        (["tune"], "tune what? Name a table or figure"),
        (
            ["table1", "--setting", "tuned", "--datasets", "demo"],
            "no learning rate has been searched for demo/full_ft",
        ),
    ],
)
def test_wrong_use_is_one_line(options, message, capsys, tmp_path, cache_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if options:
        options = [options[0], "--cache-dir", str(cache_dir), *options[1:]]
    assert experiments.main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1 and message in error
    assert not list(tmp_path.rglob("*.json"))
