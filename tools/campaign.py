"""How cells are trained: --jobs processes at a time, one for each cell.

What a process does for its cell is one run of train.py, whose output goes to log.txt in the cell's
folder. Meanwhile the process holds the claim on the cell, a lock on an open file. The system drops
the lock when the process ends, however it ends. So a killed cell is free at once, and any number of
campaigns may work in one folder.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from filelock import FileLock, Timeout

import petl
import train
from data import DATASETS, frames_for, load_dataset
from load_weights import find_checkpoint, to_dict
from support.command import UserError
from support.processes import say
from support.records import compare_settings, fold_files, read_run
from support.variants import fitted
from tools.cells import Cell, Plan, epochs_of, shape_and_hash, shape_of

CLAIM = ".cell.lock"
BUSY = 75  # the exit code for a cell that another process trains
PAUSE = 0.2  # seconds between two looks at the processes

# ------------------------------------------------------------------------------------- the campaign


def train_cells(cells: list[Cell], plan: Plan) -> tuple[dict[Cell, dict], dict[Cell, str]]:
    """Train what is not finished. Returns the results, and the reasons of the cells without one.

    A cell that another process trains goes to the end of the queue, so that every campaign ends
    with the whole table.
    """
    done = {}
    failed = {}
    left = take_results(cells, done, failed, plan)
    say(f"{len(cells)} cells, {len(done)} finished, {len(left)} to train")
    failed |= without_data(left, plan)
    waiting = deque(cell for cell in left if cell not in failed)
    others = set()  # cells that another process trains
    with closing(outcomes(waiting, done, failed, plan)) as ended:  # it ends its processes
        for cell, code in ended:
            unfinished = take_results([cell], done, failed, plan)
            if cell in done:
                result = f"{done[cell]['accuracy']:.2f} %, {done[cell]['seconds']:.0f} s"
                say(f"[{len(done)}/{len(cells)}] {cell.name}: {result}")
            elif unfinished and code == BUSY:
                waiting.append(cell)
                if cell not in others:
                    say(f"{cell.name}: another process trains it")
                others.add(cell)
            else:
                log = plan.out / cell.name / "log.txt"
                failed.setdefault(cell, reason_of(code, log))
                say(f"FAILED {cell.name}: {failed[cell]} (all of it in {log})")
    return done, failed


def outcomes(waiting: deque[Cell], done, failed, plan: Plan) -> Iterator[tuple[Cell, int]]:
    """Train the waiting cells. Yields each with the exit code of its process, or with BUSY.

    The processes end with this generator, which an interruption ends too.
    """
    running = {}
    try:
        while waiting or running:
            if waiting and len(running) < plan.jobs:
                cell = waiting.popleft()
                if is_claimed(plan.out / cell.name):
                    yield cell, BUSY
                elif take_results([cell], done, failed, plan):  # nobody has finished it meanwhile
                    running[cell] = start(cell, plan)
            time.sleep(PAUSE)
            ended = [cell for cell, process in running.items() if process.poll() is not None]
            for cell in ended:
                yield cell, running.pop(cell).returncode
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def take_results(
    cells: list[Cell], done: dict[Cell, dict], failed: dict[Cell, str], plan: Plan
) -> list[Cell]:
    """Put what is finished into `done`, and what can never be into `failed`. Returns the others."""
    left = []
    for cell in cells:
        if cell in done or cell in failed:
            continue
        try:
            result = result_of(cell, plan)
        except UserError as error:
            failed[cell] = str(error)
            continue
        if result:
            done[cell] = result
        else:
            left.append(cell)
    return left


def without_data(cells: list[Cell], plan: Plan) -> dict[Cell, str]:
    """Fetch datasets and checkpoints, once. Returns the reason for each cell that lacks them."""
    failed = {}
    for dataset, weights in dict.fromkeys((cell.dataset, cell.weights) for cell in cells):
        try:
            if not weights.startswith("random:"):
                find_checkpoint(weights)
            load_dataset(dataset, plan.data_dir.get(dataset), plan.cache_dir)
        except UserError as error:
            say(f"FAILED all cells of {dataset} from {weights}: {error}")
            for cell in cells:
                if (cell.dataset, cell.weights) == (dataset, weights):
                    failed[cell] = str(error)
    return failed


# ---------------------------------------------------------------------------------- a cell's process


def is_claimed(folder: Path) -> bool:
    """Whether another process trains the cell. The folder is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / CLAIM, timeout=0):
            return False
    except Timeout:
        return True


def start(cell: Cell, plan: Plan) -> subprocess.Popen:
    """Start the process of a cell. The processes share the cores.

    For small models single threads are faster than threads that wait for one another.
    """
    threads = max(1, torch.get_num_threads() // plan.jobs)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    folder = plan.out / cell.name
    command = [sys.executable, "-m", "tools.campaign", folder, *options(cell, plan), "--resume"]
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def main(folder: str, *words: str) -> int:
    """What the process of a cell does. Returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the campaign, which ends us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # temporary files are deleted
    sys.argv = ["train.py", *words]  # config.json gives it as the command
    return train_cell(Path(folder), list(words))


def train_cell(folder: Path, words: list[str]) -> int:
    """One run of train.py. Returns its exit code, or BUSY."""
    try:
        with FileLock(folder / CLAIM, timeout=0):
            print("---------- a new attempt", flush=True)
            return train.main(words)
    except Timeout:
        return BUSY


def reason_of(code: int, log: Path) -> str:
    """Why a process that ended with this code has left no result."""
    if code == 0:
        return "it left no result"
    if code == -signal.SIGKILL:
        return "killed by SIGKILL, out of memory?"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    last = log.read_text(encoding="utf-8", errors="replace").strip().split("\n")[-1]
    return last.removeprefix("error: ") or f"exit code {code}"


# ------------------------------------------------------------------------------- a cell and its run


def options(cell: Cell, plan: Plan) -> list[str]:
    """The command line of train.py that is this cell."""
    named = vars(cell) | {
        "epochs": epochs_of(cell, plan),
        "data-dir": plan.data_dir.get(cell.dataset),
        "cache-dir": plan.cache_dir,
        "device": plan.device,
        "dtype": plan.dtype,
        "out": plan.out / cell.variant,
    }
    words = []
    for name, value in named.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return words + plan.passed


def method_of(cell: Cell) -> petl.Method:
    """The method as the cell trains it."""
    args = argparse.Namespace(**vars(cell), alpha=None, keep=None, blocks=None)
    lr = DATASETS[cell.dataset].lr.get(cell.method)
    return fitted(petl.find(cell.method), shape_of(cell.weights), args, lr)


def result_of(cell: Cell, plan: Plan) -> dict | None:
    """The result of a cell whose folds are all finished, else None.

    Raises UserError if another experiment lies there.
    """
    folder = plan.out / cell.name
    if not (folder / "result.json").exists() or not fold_files(folder):
        return None  # result.json is what a run writes at its end
    run = read_run(folder)
    args = train.parse([*options(cell, plan), "--device", "cpu"])  # nothing is computed here
    compare_settings(folder, run.config, expected_settings(cell, plan, args, run.config))
    wanted = set(args.folds or {int(row["fold"]) for row in run.split})
    if not wanted <= run.folds.keys():
        return None
    tested = Counter(int(row["fold"]) for row in run.clips("test"))
    folds = [{**run.folds[fold]["result"], "tested": tested[fold]} for fold in sorted(wanted)]
    return {
        "folds": folds,
        "accuracy": statistics.mean(fold["accuracy"] for fold in folds),
        "seconds": sum(fold["seconds"] for fold in folds),
        "parameters": run.first["parameters"],
    }


def expected_settings(cell: Cell, plan: Plan, run: argparse.Namespace, config: dict) -> dict:
    """What config.json of the cell says if it is the run with these options and nothing else."""
    recipe = DATASETS[cell.dataset]
    expected = {name: getattr(run, name) for name in ("epochs", "pool", "shots", "balance")}
    expected["method"] = to_dict(method_of(cell))
    expected["batch_size"] = run.batch_size or recipe.batch_size
    expected["n_frames"] = config["n_frames"]  # the clips decide, unless the options say it
    expected["choose_by"] = "balanced" if recipe.own else "accuracy"
    if plan.dtype:
        expected["dtype"] = run.dtype
    if run.seconds or recipe.n_frames:
        expected["n_frames"] = frames_for(recipe, None, run.seconds)
    expected["mask_frames"] = recipe.widest_mask(config["n_frames"])
    is_file = cell.weights != "audioset" and not cell.weights.startswith(("hf:", "random:"))
    if is_file:  # which may have changed
        expected["backbone"] = shape_and_hash(cell.weights)[1]
    if recipe.own:
        expected["data_dir"] = run.data_dir and str(run.data_dir.resolve())
    return expected


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
