"""Campaigns that are killed, shared, or fail in part, and the processes that train their cells."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers import SMALL_AST, campaign_words, make_folder, table_of
from safetensors.torch import load_file

import train
from support.checkpoints import read_header, write_tensors
from tools import campaign, experiments
from tools.cells import Cell

ROOT = Path(train.__file__).parent


def times_of(out: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in out.rglob("fold*.safetensors")}


def rewrite(run: Path, **settings) -> None:
    """Make it a run with other settings."""
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | settings))
    for file in run.glob("fold*.safetensors"):
        header = read_header(file)
        write_tensors(file, load_file(file), header | {"settings": header["settings"] | settings})


@pytest.fixture
def processes(here, monkeypatch) -> list:
    """`here` with processes after all; the list gets every one that is started."""
    started = []

    def start(cell, plan):
        started.append(here.start(cell, plan))
        return started[-1]

    monkeypatch.setattr(campaign, "start", start)
    monkeypatch.chdir(ROOT)
    return started


def test_a_campaign(here, capsys):
    """Two tables of which one shows a cell of the other: every cell once; then all is read back."""
    options = ["table1", "table3", "--methods", "linear,pfeiffer_par", "--seeds", "0,1"]
    assert here(*options) == 0
    names = [str(folder.relative_to(here.out)) for folder in here.started]
    weights = Cell("esc10", "linear", 0, str(SMALL_AST)).variant
    assert names == [
        f"{weights}/esc10/{m}/seed{s}" for s in (0, 1) for m in ("linear", "pfeiffer_par")
    ]
    results = [
        json.loads((folder / "result.json").read_text())["accuracy"] for folder in here.started
    ]
    for target, row in (("table1", "PF par"), ("table3", "MHSA-Par-Before")):
        line = table_of(here.out, target)[row]
        assert (
            line["ESC-10"].strip("*_").startswith(f"{(results[1] + results[3]) / 2:.2f}")
            and "[" in line["ESC-10"]
        )
        assert line["Avg in the paper"].strip("*_") == "84.09"
    (file,) = (here.out / "tables").glob("table1-*.csv")
    records = list(csv.DictReader(file.read_text().splitlines()))
    assert [(r["row"], r["seeds"], r["runs"]) for r in records] == [
        ("Linear", "2", "2"),
        ("PF par", "2", "2"),
    ]
    out = capsys.readouterr().out
    assert (
        "1 epoch instead of 50. Not as in the paper: dataset, weights, "
        "number of epochs (30 to 75 there). "
        "This backbone has fewer dimensions" in out
    )
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
    assert table_of(here.out, "table1")["Linear"]["ESC-10"].split()[0] == f"{two['accuracy']:.2f}"
    assert here(*folds, "1,2,3") == 0 and len(here.started) == 2  # the third is missing
    capsys.readouterr()
    assert here(*folds, "1", "--seconds", "1") == 1
    assert "holds a run with --seconds 0.5, not 1" in capsys.readouterr().err
    assert here(*folds, "1", "--dtype", "bfloat16") == 1
    assert "holds a run with dtype float32, not bfloat16" in capsys.readouterr().err
    rewrite(here.started[0], batch_size=7)
    assert here("table1", "--methods", "linear") == 1
    assert "holds a run with batch_size 7, not " in capsys.readouterr().err
    assert len(here.started) == 2


def test_results_of_other_weights_or_sounds_are_not_read_back(here, sounds, capsys):
    tables = [sounds / "one.csv", sounds / "other.csv"]
    for table in tables:
        clips = sorted((sounds / "audio").glob("1-*"))
        rows = [
            f"audio/{clip.name},{'low' if clip.stem.endswith('-0') else 'high'}" for clip in clips
        ]
        table.write_text(
            "\n".join(["path,label", *rows, *(row.replace("1-", "2-", 1) for row in rows)])
        )
    options = ["table1", "--methods", "linear", "--datasets", "csv", "--data-dir"]
    assert here(*options, tables[0]) == 0
    assert here(*options, tables[1]) == 1
    assert f"holds a run with data_dir {tables[0]}, not {tables[1]}" in capsys.readouterr().err
    assert here(*options[:-1]) == 1  # nothing says where they are
    assert f"holds a run with data_dir {tables[0]}, not None" in capsys.readouterr().err
    rewrite(here.started[0], backbone="0" * 64)
    assert here(*options, tables[0]) == 1
    assert f"holds a run with the backbone {SMALL_AST} as it was then" in capsys.readouterr().err
    assert len(here.started) == 1


def test_own_sounds_of_any_length_are_read_back(here, tmp_path, cache_dir, capsys):
    """Without --seconds the clips say how many frames the model reads."""
    places = [
        "--data-dir",
        make_folder(tmp_path / "mine"),
        "--cache-dir",
        cache_dir,
        "--out",
        here.out,
    ]
    words = [
        "table1",
        "--methods",
        "linear",
        "--datasets",
        "folder",
        "--weights",
        SMALL_AST,
        "--epochs",
        1,
        *places,
    ]
    for _ in range(2):
        assert experiments.main([str(word) for word in words]) == 0
    assert len(here.started) == 1 and "1 cells, 1 finished, 0 to train" in capsys.readouterr().out


def test_a_campaign_waits_for_cells_of_others(here, monkeypatch):
    """What another process trains is left to it; when that process dies, the cell is free."""
    folder = here.out / Cell("esc10", "linear", 0, str(SMALL_AST)).name
    folder.mkdir(parents=True)
    lock = FileLock(folder / ".cell.lock")
    lock.acquire()
    asked, is_claimed = [], campaign.is_claimed

    def ask(folder):
        asked.append(folder.parent.name)
        if len(asked) == 5:
            lock.release()
        return is_claimed(folder)

    monkeypatch.setattr(campaign, "is_claimed", ask)
    assert here("table1", "--methods", "linear,bitfit") == 0
    assert [f.parent.name for f in here.started] == ["bitfit", "linear"]
    assert asked == ["linear", "bitfit", "linear", "linear", "linear"]


def test_a_cell_that_is_claimed_is_not_trained_twice(tmp_path):
    with FileLock(tmp_path / ".cell.lock"):
        assert campaign.train_cell(tmp_path, ["--method", "absent"]) == campaign.BUSY
    assert [file.name for file in tmp_path.iterdir()] == [".cell.lock"]


def test_a_campaign_shows_what_others_finish_meanwhile(here, tmp_path, monkeypatch):
    options = ["table7", "--seeds", "0"]
    assert here(*options, out="other") == 0 and len(here.started) == 4
    train_cell = campaign.train_cell

    def train(folder, words):
        answer = train_cell(folder, words)
        shutil.copytree(
            tmp_path / "other", here.out, dirs_exist_ok=True
        )  # all cells are finished now
        return answer

    monkeypatch.setattr(campaign, "train_cell", train)
    assert here(*options) == 0 and len(here.started) == 5
    assert "missing" not in str(table_of(here.out, "table7"))


def test_a_failing_cell_does_not_stop_the_others(here, capsys, monkeypatch):
    original = train.run

    def run(args):
        if args.method == "linear":
            raise RuntimeError("a bug in one cell")
        return original(args)

    monkeypatch.setattr(train, "run", run)
    assert here("table1", "--methods", "linear,bitfit") == 1
    printed = capsys.readouterr()
    assert "linear/seed0: RuntimeError: a bug in one cell (all of it in " in printed.out
    assert "RuntimeError: a bug in one cell" in printed.err.splitlines()[-1]
    assert "Traceback" in (here.started[0] / "log.txt").read_text()
    table = table_of(here.out, "table1")
    assert (
        table["Linear"]["ESC-10"] == "missing" and float(table["BitFit"]["ESC-10"].split()[0]) >= 0
    )
    monkeypatch.setattr(train, "run", original)
    assert here("table1", "--methods", "linear,bitfit") == 0  # tried again
    assert "missing" not in str(table_of(here.out, "table1"))


def test_a_dataset_that_is_not_there_fails_its_cells(here, capsys, sounds):
    words = ["table1", "--methods", "linear", "--datasets", "esc10,folder"]
    words += ["--data-dir", f"folder={sounds / 'no'}", "--data-dir", f"esc10={sounds}"]
    assert here(*words) == 1
    assert "folder/linear/seed0: --dataset folder needs --data-dir" in capsys.readouterr().err
    assert len(here.started) == 2 and table_of(here.out, "table1")["Linear"]["folder"] == "missing"


def test_killed_campaigns_repeat_nothing(here, processes, sounds, cache_dir):
    """Kill everything in the middle of a cell, then only the campaign, not the cell it started.

    Then let it finish, in this process.
    """
    out = here.out
    words = ["table1", "--methods", "linear,bitfit,lora"]
    command = [sys.executable, "-m", "tools.experiments"]
    command += campaign_words(sounds, cache_dir, out, *words)
    for finished_before_the_kill, kill in (
        (1, lambda p: os.killpg(p.pid, signal.SIGKILL)),
        (2, lambda p: p.kill()),
    ):
        process = subprocess.Popen(command, start_new_session=True, cwd=ROOT)
        while len(times_of(out)) < finished_before_the_kill or not len(
            list(out.rglob("log.txt"))
        ) > len(times_of(out)):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        kill(process)
        process.wait()
    before = times_of(out)
    assert here(*words) == 0
    after = times_of(out)
    assert len(after) == 3 and before.items() <= after.items()
    assert "missing" not in str(table_of(out, "table1"))


def test_processes_train_as_train_py_does(
    here, monkeypatch, sounds, cache_dir, tmp_path, processes
):
    """Each cell has the tensors, bit for bit, and the log of a run of its own."""
    assert here("table1", "--methods", "linear,lora") == 0
    assert len(processes) == 2
    for run in sorted(here.out.rglob("seed0")):
        options = json.loads((run / "config.json").read_text())["command"]
        assert options[0] == "train.py"
        assert train.main([*options[1:], "--out", str(tmp_path / "alone")]) == 0
        ours, alone = (
            load_file(f / "fold1.safetensors")
            for f in (run, tmp_path / "alone" / Path(*run.parts[-3:]))
        )
        assert ours.keys() == alone.keys() and all(
            torch.equal(ours[name], alone[name]) for name in ours
        )
        log = (run / "log.txt").read_text()
        assert log.count("a new attempt") == 1 and log.count("test accuracy ") == 2
        assert f"{run.parts[-2]} on esc10" in log


def test_the_peak_of_memory_is_that_of_the_cell():
    if not Path(
        "/proc/self/clear_refs"
    ).exists():  # only Linux tells the peak of memory anew; elsewhere it is said
        return
    code = (
        "import torch; from support.records import forget_peak, peak_memory; "
        "torch.ones(2**27).sum(); high = peak_memory(); forget_peak(); "
        "print((high - peak_memory()) >> 20)"
    )
    # A process begins with the peak of the one that started it: here the shell's.
    done = subprocess.run(
        f"{sys.executable} -c '{code}'; true", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert int(done.stdout) > 400, done.stderr  # of 512 MB that are no longer there


def test_a_killed_process_costs_its_cell_alone(here, monkeypatch, capsys):
    """The cells after it are trained in this process."""
    start = campaign.start

    def kill_the_first(cell, plan):
        monkeypatch.setattr(campaign, "start", start)
        process = here.start(cell, plan)
        process.kill()
        return process

    monkeypatch.setattr(campaign, "start", kill_the_first)
    monkeypatch.chdir(ROOT)
    assert here("table1", "--methods", "linear,bitfit,lora") == 1
    printed = capsys.readouterr()
    assert "linear/seed0: killed by SIGKILL, out of memory? (all of it in " in printed.out
    assert "linear/seed0: killed by SIGKILL, out of memory?" in printed.err.splitlines()[-1]
    table = table_of(here.out, "table1")
    assert table["Linear"]["ESC-10"] == "missing" and "missing" not in str(
        [table["BitFit"], table["LoRA"]]
    )
    assert len(here.started) == 2
    assert here("table1", "--methods", "linear,bitfit,lora") == 0  # tried again
    assert len(here.started) == 3


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--help"], 0, "it is not for people"),
        ([], 2, "the following arguments are required: folder"),
        (["somewhere"], 2, "train what? tools.experiments gives each cell"),
    ],
)
def test_a_worker_without_a_cell_trains_nothing(words, code, message, tmp_path):
    command = [sys.executable, "-m", "tools.campaign", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == code and message in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


def test_two_campaigns_share_a_folder(tmp_path, sounds, cache_dir):
    command = [sys.executable, "-m", "tools.experiments"]
    words = ["table1", "--methods", "linear,bitfit,lora", "--jobs", 2]
    command += campaign_words(sounds, cache_dir, tmp_path, *words)
    two = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate()[0] for process in two]
    assert [process.returncode for process in two] == [0, 0]
    logs = [log.read_text() for log in tmp_path.rglob("log.txt")]
    attempts = sum(log.count("a new attempt") for log in logs)
    assert (
        len(logs) == 3 and attempts <= 4
    )  # once each, but one may be asked for while it comes to its end
    tables = [[line for line in text.splitlines() if line.startswith("|")] for text in printed]
    assert len(tables[0]) == 5 and tables[0] == tables[1] and "missing" not in str(tables)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interruption_ends_the_processes(tmp_path, sounds, cache_dir, number, code):
    """And lets them tidy up: no temporary file stays."""
    command = [sys.executable, "-m", "tools.experiments"]
    command += campaign_words(
        sounds, cache_dir, tmp_path, "table1", "--methods", "bitfit", "--epochs", 1000
    )
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not list(tmp_path.rglob("fold1.resume.pt")):
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.05)
    process.send_signal(number)
    printed = process.communicate()[0]  # until everybody has closed it
    assert process.returncode == code and "Traceback" not in printed and "leaked" not in printed
    (lock,) = tmp_path.rglob(".cell.lock")
    with FileLock(lock, timeout=0):
        assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("fold1.safetensors"))
