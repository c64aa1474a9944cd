"""The paper's numbers, the tables and figures, and campaigns that are killed, shared, or fail in part."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import experiments
import figures
import pytest
from experiments import TABLES, Cell, marked
from filelock import FileLock
from helpers import SMALL_AST, make_esc50

import petl
import train
from load_weights import read_header

ROOT = Path(experiments.__file__).parent
PAPER = json.loads((ROOT / "paper_results.json").read_text())

# -------------------------------------------------------------------------------------------------- the paper's numbers


def test_the_numbers_are_complete():
    sizes = {name: (len(PAPER[name]["rows"]), len(PAPER[name]["columns"])) for name in TABLES}
    assert sizes == {
        "table1": (15, 6), "table2": (4, 8), "table3": (6, 5), "table4": (4, 6), "table5": (8, 4), "table6": (6, 4),
        "table7": (4, 2),
    }  # fmt: skip
    for name, table in TABLES.items():
        assert table.rows.keys() == PAPER[name]["rows"].keys()
        assert set(table.rows.values()) <= petl.METHODS.keys()
        columns = [column.split()[0] for column in PAPER[name]["columns"] if column not in ("params", "rr", "avg")]
        assert tuple(dict.fromkeys(columns)) == table.datasets
        for row in PAPER[name]["rows"].values():
            assert len(row) == len(PAPER[name]["columns"])
            assert all(isinstance(n, str) if c in ("params", "rr") else 0 < n < 100
                       for n, c in zip(row, PAPER[name]["columns"], strict=True))  # fmt: skip


def test_averages_of_the_paper():
    """The printed averages are those of the columns, up to rounding, but for the row that is named here."""
    wrong = {}
    for name in TABLES:
        columns = PAPER[name]["columns"]
        if "avg" in columns:
            for row, numbers in PAPER[name]["rows"].items():
                entries = dict(zip(columns, numbers, strict=True))
                mean = sum(entries[dataset] for dataset in TABLES[name].datasets) / len(TABLES[name].datasets)
                if abs(mean - entries["avg"]) > 0.011:
                    wrong[name, row] = (entries["avg"], round(mean, 2))
    assert wrong == {("table1", "Full FT"): (90.07, 90.60)}


def test_one_experiment_has_one_number_in_all_tables():
    """A method stands in several tables: the paper prints the same accuracy everywhere, and so do its parameters."""
    seen = {}
    for name, table in TABLES.items():
        for row, method in table.rows.items():
            for column, number in zip(PAPER[name]["columns"], PAPER[name]["rows"][row], strict=True):
                if column in ("avg", "rr"):
                    continue
                if column == "params":
                    assert number == petl.METHODS[method].paper.upper(), row
                assert seen.setdefault((method, column), number) == number, (row, column)


def test_tables_name_the_rows_of_petl():
    """`where` in METHODS is the first place of a method in these tables."""
    tables = {"table1": "Table I", "table3": "Table III", "table4": "Table IV", "table5": "Table V",
              "table6": "Table VI", "table7": "Table VII"}  # fmt: skip
    first = {}
    for name, table in TABLES.items():
        for row, method in table.rows.items():
            if name in tables:
                first.setdefault(method, f"{tables[name]}, {row.split(',')[0].replace('Seq/Par', 'Seq')}")
    assert first == {method.name: method.where for method in petl.METHODS.values() if method.where != "-"}


# ----------------------------------------------------------------------------------------------- campaigns to try out


@pytest.fixture(scope="session")
def sounds(tmp_path_factory) -> Path:
    return make_esc50(tmp_path_factory.mktemp("data") / "ESC", takes=2)


def words(sounds, cache_dir, out, *targets) -> list[str]:
    """One epoch of one fold on half a second of ten tones: a run takes less than importing torch."""
    own = ["--datasets", "esc10", "--data-dir", f"esc10={sounds}", "--weights", SMALL_AST, "--epochs", 1]
    ours, passed = (targets[: (i := targets.index("--"))], targets[i + 1 :]) if "--" in targets else (targets, [])
    passed = ["--folds", 1, "--seconds", 0.5, *passed]  # of an option that comes twice the last one counts
    return [str(w) for w in [*own, "--cache-dir", cache_dir, "--out", out, *ours, "--", *passed]]


class Here:
    """Stands for subprocess.Popen: the cell runs in this process, while it is being started."""

    started = []  # noqa: RUF012  the folders of all cells, in order

    def __init__(self, command, stdout=None, **_):
        assert command[:3] == [sys.executable, experiments.__file__, "cell"]
        self.started.append(Path(command[3]))
        log = io.TextIOWrapper(stdout, write_through=True)
        with redirect_stdout(log), redirect_stderr(log):
            self.returncode = experiments.main(command[2:])
        log.detach()

    def poll(self):
        return self.returncode


@pytest.fixture
def here(monkeypatch, sounds, cache_dir, tmp_path):
    """Runs a campaign without processes of its own. `here.started` is the folders of the cells that were started."""
    monkeypatch.setattr(experiments.subprocess, "Popen", Here)
    monkeypatch.setattr(experiments.time, "sleep", lambda _: None)
    monkeypatch.setattr(Here, "started", [])
    monkeypatch.setattr(sys, "argv", ["experiments.py"])

    def call(*options, out="out") -> int:
        own = words(sounds, cache_dir, tmp_path / out, *(str(option) for option in options))
        return experiments.main(own)

    call.started, call.out = Here.started, tmp_path / "out"
    return call


def table_of(out: Path, target: str) -> dict[str, dict[str, str]]:
    """A written Markdown table as {row: {heading: text}}."""
    (file,) = (out / "tables").glob(f"{target}-*.md")
    lines = [line for line in file.read_text().splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def times_of(out: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in out.rglob("fold*.safetensors")}


# -------------------------------------------------------------------------------------------------------------- tables


def test_marks():
    assert marked(["70.00", "90.00", "80.00", None]) == ["70.00", "**90.00**", "_80.00_", "missing"]
    assert marked(["90.00", "90.00", "80.00"]) == ["**90.00**", "**90.00**", "_80.00_"]  # equals are equally good
    assert marked(["9.00", "10.00", "2.00"]) == ["_9.00_", "**10.00**", "2.00"]  # as numbers, not as text
    assert marked(["90.00"]) == ["90.00"] and marked([None]) == ["missing"]  # nothing to compare with


def finished(accuracies: list[float], petl=1000, head=10) -> dict:
    folds = [{"fold": k, "accuracy": accuracy} for k, accuracy in enumerate(accuracies, 1)]
    return {"folds": folds, "seconds": 20.0, "parameters": {"petl": petl, "head": head, "total": 99}}


def test_a_table_beside_the_paper():
    """Two seeds of five folds on ESC-50: mean and sample standard deviation over ten runs; FSC is not there yet."""
    args = experiments.parse(["table7", "--seeds", "0,1"])
    done = {}
    for method, accuracy in (("pfeiffer_seq", 80), ("adapter_ffn_par_before", 90)):
        for seed in (0, 1):
            folds = [accuracy - 2 + 4 * seed] * 5
            done[Cell("esc50", method, seed, "audioset")] = finished(folds, petl=248_976)
    done[Cell("esc50", "adapter_ffn_par_residual", 1, "audioset")] = finished([60.0] * 5)
    text, records = experiments.render("table7", done, args)
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "| _80.00_ +- 2.11 (86.77) | missing (72.45) |" in re.sub(" +", " ", lines["Seq, residual"])
    assert "| **90.00** +- 2.11 (87.07) |" in re.sub(" +", " ", lines["Par, no residual"])
    assert "| 60.00 +- 0.00 [1 of 2 seeds] (73.20) |" in re.sub(" +", " ", lines["Par, residual"])
    assert "| missing (69.20) | missing (56.48) |" in re.sub(" +", " ", lines["Seq, no residual"])
    assert "248,976" in lines["Seq, residual"] and "seeds 0, 1" in text and "Not as in the paper" not in text
    (record,) = [r for r in records if r["row"] == "Seq, residual" and r["dataset"] == "esc50"]
    assert (record["mean"], record["runs"], record["seeds"], record["paper"]) == (80, 10, 2, "86.77")


def test_averages_beside_the_paper():
    args = experiments.parse(["table4", "--methods", "lora,lora_q"])
    done = {Cell(d, "lora", 0, "audioset"): finished([n], petl=221_184) for d, n in
            zip(("esc50", "us8k", "gsc", "fsc"), (80.0, 82.0, 90.0, 70.0), strict=True)}  # fmt: skip
    text, _ = experiments.render("table4", done, args)
    (line,) = [line for line in text.splitlines() if line.startswith("| q v")]
    assert "| 80.50 (84.97) |" in re.sub(" +", " ", line)
    (line,) = [line for line in text.splitlines() if line.startswith("| q  ")]
    assert "missing (79.13)" in line  # no average of three


def test_parameters_beside_the_paper():
    """On the base AST the paper's count stands in parentheses; what `linear` trains depends on the classes."""
    args = experiments.parse(["table1", "--methods", "linear,lora", "--datasets", "esc50,esc10"])
    done = {Cell("esc50", "linear", 0, "audioset"): finished([70.0], petl=0, head=39_986),
            Cell("esc10", "linear", 0, "audioset"): finished([71.0], petl=0, head=9_226)}  # fmt: skip
    text, _ = experiments.render("table1", done, args)
    assert "9,226 - 39,986 (9-40K)" in text and "- (221K)" in text


def test_a_method_is_one_cell_in_all_tables_and_figures():
    args = experiments.parse(["all", "--datasets", "demo"])
    cells = experiments.cells_of(args)
    assert len(cells) == len(set(cells)) == len({cell.name for cell in cells})
    assert [cell.name for cell in cells if cell.method == "houlsby_par"] == [
        "demo/houlsby_par/seed0", *(f"rr{n}/demo/houlsby_par/seed0" for n in (64, 32, 8, 4)),
    ]  # fmt: skip
    # Twice the parameters of PF par are those of PF par x2 in Table V, and of LoRA those of LoRA in Table VI.
    assert not any(cell.rr == 8 and cell.method == "pfeiffer_par" for cell in cells)
    assert Cell("demo", "pfeiffer_par_x2", 0, "demo") in cells and Cell("demo", "lora_x2", 0, "demo") in cells


def test_curves_of_the_base_ast():
    """A quarter to four times the parameters: RR 256 to 16 for adapters, 6 to 100 prompts."""

    def settings(method):
        return [(c.method, c.rr, c.prompts) for c in experiments.budgets("esc50", method, 0, "audioset")]

    assert settings("pfeiffer_par") == [
        ("pfeiffer_par", 256, None), ("pfeiffer_par", 128, None), ("pfeiffer_par", None, None),
        ("pfeiffer_par_x2", None, None), ("pfeiffer_par", 16, None),
    ]  # fmt: skip
    assert [prompts for _, _, prompts in settings("dpt")] == [6, 12, None, 50, 100]
    assert settings("full_ft") == [("full_ft", None, None)]


def test_few_shot_cells():
    cells = experiments.cells_of(args := experiments.parse(["table2"]))
    assert {(c.dataset, c.shots) for c in cells} == {("esc50", k) for k in (1, 2, 4, 8)} | {
        ("gsc", k) for k in (2, 8, 32, 64)
    }
    assert {experiments.epochs_of(c, args) for c in cells} == {50, 75}  # as the paper's datasets have it
    args = experiments.parse(["table2", "--datasets", "demo"])
    assert {experiments.epochs_of(c, args) for c in experiments.cells_of(args)} == {experiments.FEW_SHOT_EPOCHS}
    expected = f"30 epochs instead of {experiments.DATASETS['demo'].epochs}: few clips make few steps"
    assert expected in experiments.render("table2", {}, args)[0]


# ----------------------------------------------------------------------------------------------------------- campaigns


def test_a_campaign(here, capsys):
    """Two tables of which one shows a cell of the other: every cell once; then all is read back."""
    options = ["table1", "table3", "--methods", "linear,pfeiffer_par", "--seeds", "0,1"]
    assert here(*options) == 0
    names = [str(folder.relative_to(here.out)) for folder in here.started]
    weights = Cell("esc10", "linear", 0, str(SMALL_AST)).variant
    assert names == [f"{weights}/esc10/{m}/seed{s}" for s in (0, 1) for m in ("linear", "pfeiffer_par")]
    results = [json.loads((folder / "result.json").read_text())["accuracy"] for folder in here.started]
    for target, row in (("table1", "PF par"), ("table3", "MHSA-Par-Before")):
        line = table_of(here.out, target)[row]
        assert f"{(results[1] + results[3]) / 2:.2f}" in line["ESC-10"] and "+-" in line["ESC-10"]
        assert line["Avg in the paper"].strip("*_") == "84.09"
    (file,) = (here.out / "tables").glob("table1-*.csv")
    records = list(csv.DictReader(file.read_text().splitlines()))
    assert [(r["row"], r["seeds"], r["runs"]) for r in records] == [("Linear", "2", "2"), ("PF par", "2", "2")]
    out = capsys.readouterr().out
    assert "1 epoch instead of 50. Not as in the paper: dataset, weights, number of epochs." in out
    assert "--folds 1 --seconds 0.5" in out

    before = times_of(here.out)
    assert here(*options) == 0 and len(here.started) == 4 and times_of(here.out) == before
    assert "4 cells, 4 finished, 0 to train" in capsys.readouterr().out
    assert here(*options, "--epochs", "2") == 1  # these are other experiments
    assert "holds a run with epochs 1, not 2: give another --out" in capsys.readouterr().err
    assert len(here.started) == 4 and times_of(here.out) == before


def test_other_options_of_train_are_other_experiments(here, capsys):
    folds = ["table1", "--methods", "linear", "--", "--folds"]
    assert here(*folds, "1,2") == 0
    assert here(*folds, "2") == 0 and len(here.started) == 1  # of two finished folds, one
    two = json.loads((here.started[0] / "result.json").read_text())["folds"][1]
    assert table_of(here.out, "table1")["Linear"]["ESC-10"] == f"{two['accuracy']:.2f}"
    assert here(*folds, "1,2,3") == 0 and len(here.started) == 2  # the third is missing
    capsys.readouterr()
    assert here(*folds, "1", "--seconds", "1") == 1
    assert "holds a run with n_frames 50, not 100" in capsys.readouterr().err
    assert here("table1", "--methods", "linear", "--dtype", "bfloat16") == 1
    assert "holds a run with dtype float32, not bfloat16" in capsys.readouterr().err
    config = here.started[0] / "config.json"  # as train.py --no-mask would leave it there
    config.write_text(config.read_text().replace('"mask": true', '"mask": false'))
    assert here("table1", "--methods", "linear") == 1
    assert "holds a run with mask False, not True" in capsys.readouterr().err
    assert len(here.started) == 2


def test_results_of_other_weights_or_sounds_are_not_read_back(here, sounds, capsys):
    tables = [sounds / "one.csv", sounds / "other.csv"]
    for table in tables:
        clips = sorted((sounds / "audio").glob("1-*"))
        rows = [f"audio/{clip.name},{'low' if clip.stem.endswith('-0') else 'high'}" for clip in clips]
        table.write_text("\n".join(["path,label", *rows, *(row.replace("1-", "2-", 1) for row in rows)]))
    options = ["table1", "--methods", "linear", "--datasets", "csv", "--data-dir"]
    assert here(*options, tables[0]) == 0
    assert here(*options, tables[1]) == 1
    assert f"holds a run with data_dir {tables[0]}, not {tables[1]}" in capsys.readouterr().err
    config = here.started[0] / "config.json"
    config.write_text(config.read_text().replace('"backbone": "', '"backbone": "other'))
    assert here(*options, tables[0]) == 1
    assert f"holds a run with the backbone {SMALL_AST} as it was then" in capsys.readouterr().err
    assert len(here.started) == 1


def test_a_campaign_waits_for_cells_of_others(here, capsys, monkeypatch):
    """What another process trains is left to it; when that process dies, the cell is free."""
    folder = here.out / Cell("esc10", "linear", 0, str(SMALL_AST)).name
    folder.mkdir(parents=True)
    lock = FileLock(folder / ".cell.lock")
    lock.acquire()
    naps = []

    def sleep(seconds):
        naps.append(len(here.started))
        if len(naps) == 5:
            lock.release()

    monkeypatch.setattr(experiments.time, "sleep", sleep)
    assert here("table1", "--methods", "linear,bitfit") == 0
    assert [f.parent.name for f in here.started] == ["bitfit", "linear"]
    assert naps[:5] == [1] * 5 and "waiting for 1 cells that other processes train" in capsys.readouterr().out


def test_a_cell_that_is_claimed_is_not_trained_twice(tmp_path):
    with FileLock(tmp_path / ".cell.lock"):
        assert experiments.main(["cell", str(tmp_path), "--method", "absent"]) == experiments.BUSY


def test_shards_make_the_table_of_one_process(here, tmp_path):
    options = ["table7", "--seeds", "0"]
    assert here(*options, "--shard", "2/2") == 0
    assert [f.parent.name for f in here.started] == ["adapter_ffn_seq_no_residual", "adapter_ffn_par_residual"]
    assert table_of(here.out, "table7")["Seq, residual"]["ESC-10"] == "missing"
    assert here(*options, "--shard", "1/2") == 0  # the second to end has the whole table
    assert [f.parent.name for f in here.started[2:]] == ["pfeiffer_seq", "adapter_ffn_par_before"]
    assert here(*options, out="one") == 0

    def accuracies(out):
        return {row: line["ESC-10"] for row, line in table_of(out, "table7").items()}

    assert accuracies(here.out) == accuracies(tmp_path / "one")
    assert "missing" not in str(accuracies(here.out))


def test_a_shard_shows_what_others_finish_meanwhile(here, tmp_path, monkeypatch):
    options = ["table7", "--seeds", "0"]
    assert here(*options, out="other") == 0
    popen = Here.__init__

    def init(self, *args, **rest):
        popen(self, *args, **rest)
        shutil.copytree(tmp_path / "other", here.out, dirs_exist_ok=True)  # all cells are finished now

    monkeypatch.setattr(Here, "__init__", init)
    assert here(*options, "--shard", "1/2") == 0 and len(here.started) == 5
    assert "missing" not in str(table_of(here.out, "table7"))


def test_a_failing_cell_does_not_stop_the_others(here, capsys, monkeypatch):
    original = train.run

    def run(args):
        if args.method == "linear":
            raise RuntimeError("a bug in one cell")
        return original(args)

    monkeypatch.setattr(train, "run", run)
    popen = Here.__init__

    def init(self, command, **options):
        try:
            popen(self, command, **options)
        except RuntimeError as error:  # as an uncaught error ends a process
            options["stdout"].write(f"Traceback\nRuntimeError: {error}\n".encode())
            self.returncode = 1

    monkeypatch.setattr(Here, "__init__", init)
    assert here("table1", "--methods", "linear,bitfit") == 1
    printed = capsys.readouterr()
    assert "linear/seed0: RuntimeError: a bug in one cell (all of it in " in printed.out
    assert "RuntimeError: a bug in one cell" in printed.err.splitlines()[-1]
    table = table_of(here.out, "table1")
    assert table["Linear"]["ESC-10"] == "missing" and float(table["BitFit"]["ESC-10"]) >= 0
    monkeypatch.setattr(train, "run", original)
    assert here("table1", "--methods", "linear,bitfit") == 0  # tried again
    assert "missing" not in str(table_of(here.out, "table1"))


def test_a_dataset_that_is_not_there_fails_its_cells(here, capsys, sounds):
    assert here("table1", "--methods", "linear", "--datasets", "esc10,folder", "--data-dir", f"folder={sounds / 'no'}",
                "--data-dir", f"esc10={sounds}") == 1  # fmt: skip
    assert f"FAILED all cells of folder from {SMALL_AST}: --dataset folder:" in capsys.readouterr().out
    assert len(here.started) == 1 and table_of(here.out, "table1")["Linear"]["folder"] == "missing"


def test_a_place_that_cannot_be_written(here, capsys, tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert here("table1", "--methods", "linear", out="file") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "is --out a folder to write to" in error


def test_dry_run(here, capsys):
    assert here("table1", "--methods", "linear,lora") == 0
    capsys.readouterr()
    assert here("table1", "--methods", "linear,lora,dpt", "--dry-run") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "seed0" in line]
    lines = {line[0].split("/")[-2]: line for line in lines}
    assert set(lines) == {"linear", "lora", "dpt"}
    counted = json.loads((here.started[1] / "result.json").read_text())["parameters"]
    assert lines["lora"][1] == f"{counted['petl']:,}" and lines["lora"][-1] == "finished"
    assert lines["dpt"][-2:] == ["to", "do"] and lines["dpt"][3] == "s" and int(lines["dpt"][1].replace(",", "")) > 0
    assert len(here.started) == 2 and not list(here.out.rglob("dpt"))


def test_dry_run_without_the_data(capsys, tmp_path):
    """Nothing is downloaded: parameters of the base AST, no estimate."""
    options = ["table5", "--dry-run", "--cache-dir", str(tmp_path), "--out", str(tmp_path)]
    assert experiments.main(options) == 0
    out = capsys.readouterr().out
    assert "16 cells, 0 finished" in out and "16 more have no estimate" in out
    assert "497,952" in out and not list(tmp_path.iterdir())


def test_random_weights_are_a_second_block(tmp_path):
    args = experiments.parse(["table1", "--datasets", "demo", "--random", "linear,lora", "--seeds", "0,1"])
    cells = experiments.cells_of(args)
    assert len(cells) == 2 * (15 + 2)
    assert Cell("demo", "lora", 1, "random:demo") in cells
    assert Cell("demo", "lora", 1, "random:demo").name == "weights-random_demo/demo/lora/seed1"
    text, _ = experiments.render("table1", {Cell("demo", "lora", 1, "random:demo"): finished([30.0])}, args)
    assert "| LoRA, random weights" in text and "30.00 [1 of 2 seeds]" in text


# ------------------------------------------------------------------------------------------ in processes of their own


def test_killed_campaigns_repeat_nothing(tmp_path, sounds, cache_dir):
    """Kill everything in the middle of a cell, then only the campaign, not the cell it started; then let it finish."""
    out = tmp_path / "out"
    command = [sys.executable, experiments.__file__]
    command += words(sounds, cache_dir, out, "table1", "--methods", "linear,bitfit,lora")
    for finished_before_the_kill, kill in ((1, lambda p: os.killpg(p.pid, signal.SIGKILL)), (2, lambda p: p.kill())):
        process = subprocess.Popen(command, start_new_session=True, cwd=tmp_path)
        while len(times_of(out)) < finished_before_the_kill or not len(list(out.rglob("log.txt"))) > len(times_of(out)):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        kill(process)
        process.wait()
    before = times_of(out)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = times_of(out)
    assert len(after) == 3 and before.items() <= after.items()
    assert "missing" not in str(table_of(out, "table1"))


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

    def insert(self, model: AST) -> None:
        for block in map(inner, model.blocks):
            block.attn = ScaleShift(block.attn, model.config.dim)
            block.ffn = ScaleShift(block.ffn, model.config.dim)


'''
ROW = '        Method("scale_shift", (ScaleShifts(),), "-", "-"),\n'


def test_a_method_of_your_own(tmp_path, sounds, cache_dir):
    """What the README says: a module and a part, a row in METHODS, and --add. Done in a copy of the repository."""
    for file in (*ROOT.glob("*.py"), *ROOT.glob("*.json")):
        shutil.copy(file, tmp_path)
    code = (tmp_path / "petl.py").read_text()
    before, after = code.split("# " + "-" * 94 + " the table of methods")
    first = '        Method("full_ft"'
    (tmp_path / "petl.py").write_text(before + METHOD + "# the table of methods" + after.replace(first, ROW + first))
    out = tmp_path / "out"
    options = words(sounds, cache_dir, out, "table1", "table5", "fig4", "--methods", "hydra", "--add", "scale_shift",
                    "--jobs", 2)  # fmt: skip
    done = subprocess.run([sys.executable, "experiments.py", *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for target in ("table1", "table5"):
        line = table_of(out, target)["scale_shift"]
        assert line["trained"] == str(2 * 2 * 2 * 64)  # gamma and beta, two places, two blocks, 64 dimensions
        assert 0 <= float(line["ESC-10"].strip("*_")) <= 100 and line.get("Avg in the paper", "-") == "-"
    (file,) = out.rglob("scale_shift/seed0/fold1.safetensors")
    assert read_header(file)["method"]["parts"] == [{"part": "ScaleShifts"}]
    assert list((out / "figures").glob("fig4-*.png"))


# ------------------------------------------------------------------------------------------------------------- figures


def test_figures_of_a_campaign(here):
    assert here("fig2", "fig3", "--methods", "dpt,full_ft,linear") == 0
    for stem in ("fig2-*", "fig3-*"):
        (png,), (svg,) = ((here.out / "figures").glob(f"{stem}.{kind}") for kind in ("png", "svg"))
        assert png.read_bytes()[:4] == b"\x89PNG" and b"</svg>" in svg.read_bytes()
    (file,) = (here.out / "figures").glob("fig3-*.csv")
    records = list(csv.DictReader(file.read_text().splitlines()))
    dpt = [int(r["trained"]) for r in records if r["curve"] == "DPT"]
    assert len(dpt) >= 3 and dpt == sorted(set(dpt)) and records[-1]["curve"] == "Full FT"


def test_plot_of_a_run(here, cache_dir, monkeypatch, capsys):
    """All folds in one matrix, whose diagonal is the accuracy that train.py reported."""
    assert here("table1", "--methods", "full_ft", "--epochs", "3", "--", "--folds", "1,3") == 0
    (run,) = here.started
    counted = []
    original = figures.draw_confusion
    monkeypatch.setattr(figures, "draw_confusion", lambda first, *rest: counted.append(first) or original(first, *rest))
    assert experiments.main(["plot", str(run)]) == 0  # it finds the sounds where the run did
    (counts,) = counted
    assert counts.sum() == 40 and (counts.sum(1) == 4).all()  # 2 folds, 10 classes, 2 clips of each
    accuracy = json.loads((run / "result.json").read_text())["accuracy"]
    assert 100 * counts.trace() / 40 == pytest.approx(accuracy)
    for name in ("confusion", "curves"):
        assert (run / f"{name}.png").exists() and (run / f"{name}.svg").exists()
    capsys.readouterr()
    other = make_esc50(run / "other")
    assert experiments.main(["plot", str(run), "--data-dir", str(other)]) == 2
    assert "of its test clips (audio/" in capsys.readouterr().err


def test_matplotlib_is_asked_for_before_anything_is_trained(here, monkeypatch, capsys):
    for module in ("matplotlib", "sklearn.manifold"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            assert here("table1", "fig3", "--methods", "full_ft") == 2
            name = module.partition(".")[0]
            expected = f"error: figures need {name}: pip install -r requirements-figures.txt\n"
            assert capsys.readouterr().err == expected
    assert not here.started


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["table8"], "unknown target 'table8': did you mean 'table7'?"),
        ([], "arguments are required: TARGET"),
        (["table1", "--datasets", "esc51"], "did you mean 'esc50'?"),
        (["table1", "--methods", "loora"], "did you mean 'lora'?"),
        (["table1", "--methods", "hydra"], "no row of table1 is that; --add hydra makes one"),
        (["table1", "--random", "loora"], "did you mean 'lora'?"),
        (["table2", "--random", "lora"], "--random belongs to table1"),
        (["table1", "--seeds", "x"], "no list of whole numbers"),
        (["table1", "--shard", "3/2"], "no share like 1/2"),
        (["table1", "--jobs", "0"], "--jobs"),
        (["table1", "--data-dir", "here"], "say of which dataset, like esc50=here"),
        (["table1", "--", "--method", "lora"], "--method behind --"),
        (["table1", "--", "--folds", "x"], "no list of whole numbers"),
        (["table1", "--dtype", "float8"], "float8"),
        (["table1", "--device", "quantum"], "--device quantum"),
        (["table1", "--weights", "absent.bin", "--datasets", "demo"], "no weights at absent.bin"),
        (["table1", "--datasets", "folder", "--dry-run"], "--dataset folder: needs --data-dir"),
        (["plot"], "arguments are required: RUN"),
        (["plot", "absent"], "absent is no finished run of train.py"),
    ],
)
def test_wrong_use_is_one_line(options, message, capsys, tmp_path, cache_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if options and options[0] != "plot":
        options = [options[0], "--cache-dir", str(cache_dir), *options[1:]]
    assert experiments.main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1 and message in error
    assert not list(tmp_path.rglob("*.json"))
