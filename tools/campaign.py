"""How cells are trained: --jobs processes at a time, one for each cell.

What a process does for its cell is one run of train.py, whose output goes to log.txt in the cell's
folder. Meanwhile the process holds the claim on the cell, a lock on an open file. The system drops
the lock when the process ends, however it ends. So a killed cell is free at once, and any number of
campaigns may work in one folder.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from msgspec import structs

import petl
import train
from data import DATASETS, frames_for
from load_weights import to_dict
from petl_more import PENALTIES
from support.command import Parser, UserError, exit_code
from support.processes import say
from support.records import compare_settings, fold_files, read_run
from support.variants import narrowed, override
from tools.cells import Cell, Plan, epochs_of, shape_and_hash, shape_of
from tools.finished import Finished, finished

CLAIM = ".cell.lock"
BUSY = 75  # the exit code for a cell that another process trains
PAUSE = 0.2  # seconds between two looks at the processes

# ------------------------------------------------------------------------------------- the campaign


def train_cells(cells: list[Cell], plan: Plan) -> tuple[dict[Cell, Finished], dict[Cell, str]]:
    """Train what is not finished. Returns the runs, and the reasons of the cells without one.

    A cell that another process trains goes to the end of the queue, so that every campaign ends
    with the whole table. The processes end with this function, also when it is interrupted. With
    --dry-run the cells are listed, and none is trained. Of runs that are kept in a file none is
    trained, either.
    """
    done = {}
    failed = {}

    def is_settled(cell):
        """Whether the cell has a result, or a reason why there can be none."""
        try:
            if result := result_of(cell, plan):
                done[cell] = result
        except UserError as error:
            failed[cell] = str(error)
        return cell in done or cell in failed

    waiting = deque(cell for cell in cells if not is_settled(cell))
    rest = "missing" if plan.kept else "to train"
    say(f"{len(cells)} cells, {len(done)} finished, {len(waiting)} {rest}")
    if plan.dry_run:
        for cell in cells:
            say(cell.name, failed.get(cell, "to do" if cell in waiting else "finished"))
    if plan.dry_run or plan.kept:
        waiting.clear()
    running = {}
    try:
        while waiting or running:
            if waiting and len(running) < plan.jobs:
                cell = waiting.popleft()
                if is_claimed(plan.out / cell.name):
                    waiting.append(cell)
                elif not is_settled(cell):  # nobody has finished it meanwhile
                    running[cell] = start(cell, plan)
            time.sleep(PAUSE)
            for cell in [cell for cell, process in running.items() if process.poll() is not None]:
                code = running.pop(cell).returncode
                if code == BUSY:
                    waiting.append(cell)
                    continue
                if not is_settled(cell):
                    failed[cell] = reason_of(code, plan.out / cell.name / "log.txt")
                outcome = failed.get(cell, "finished")
                say(f"{cell.name}: {outcome}, {len(waiting) + len(running)} cells are left")
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return done, failed


# --------------------------------------------------------------------------------- a cell's process


def is_claimed(folder):
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
        say(f"{cell.name}: its output goes to {log.name}")
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def work(argv: list[str]) -> int:
    """What the process of a cell does. Returns the exit code."""
    parser = Parser(
        prog="python -m tools.campaign",
        description="Train one cell. tools.experiments starts this process; it is not for people.",
    )
    parser.add_argument("folder", type=Path, help="of the cell")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="options of train.py")
    args = parser.parse_args(argv)
    if not args.words:
        raise UserError("train what? tools.experiments gives each cell the options of train.py")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the campaign, which ends us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # temporary files are deleted
    sys.argv = ["train.py", *args.words]  # config.json gives it as the command
    return train_cell(args.folder, args.words)


def train_cell(folder: Path, words: list[str]) -> int:
    """One run of train.py. Returns its exit code, or BUSY."""
    try:
        with FileLock(folder / CLAIM, timeout=0):
            print("---------- a new attempt", flush=True)
            return train.main(words)
    except Timeout:
        return BUSY


def reason_of(code, log):
    """Why a process that ended with this code has left no result."""
    reason = log.read_text(encoding="utf-8", errors="replace").strip().split("\n")[-1]
    if code < 0:
        reason = f"killed by {signal.Signals(-code).name}, out of memory?"
    return f"{reason.removeprefix('error: ')} (all of it in {log})"


# ------------------------------------------------------------------------------- a cell and its run


def options(cell: Cell, plan: Plan) -> list[str]:
    """The command line of train.py that is this cell."""
    named = vars(cell) | {
        "epochs": epochs_of(cell, plan),
        "data-dir": plan.data_dir.get(cell.dataset),
        "cache-dir": plan.cache_dir,
        "out": plan.out / cell.variant,
    }
    words = []
    for name, value in named.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return words + plan.passed


def method_of(cell: Cell) -> petl.Method:
    """The method as the cell trains it."""
    method = narrowed(petl.find(cell.method), shape_of(cell.weights).dim)
    lr = cell.lr or DATASETS[cell.dataset].lr.get(cell.method) or method.lr
    numbers = {name: getattr(cell, name) for name in ("rr", "prompts", "kernel", "alpha")}
    return override(replace(method, lr=lr), **numbers)


def result_of(cell: Cell, plan: Plan) -> Finished | None:
    """The run of a cell with the folds that are asked for, if they are all finished.

    UserError if another experiment lies there: its config.json has other settings.
    """
    folder = plan.out / cell.name
    if plan.kept:
        run = plan.kept.runs.get(Path(cell.name).as_posix())
    else:
        run = finished(read_run(folder)) if fold_files(folder) else None
    if run is None:
        return None
    args = train.parse([*options(cell, plan), "--device", "cpu"])  # nothing is computed here
    recipe = DATASETS[cell.dataset]
    expected = {"epochs": args.epochs or len(PENALTIES), "pool": args.pool}
    method = method_of(cell)
    expected["method"] = to_dict(method)
    expected["batch_size"] = args.batch_size or recipe.batch_size
    if not plan.kept:  # a kept run is shown where its backbone is not
        has_none = petl.has_mark(method, "has_no_backbone")
        expected["backbone"] = shape_and_hash(train.NO_BACKBONE if has_none else cell.weights)[1]
    if "--dtype" in plan.passed:  # else the device decides
        expected["dtype"] = args.dtype
    if args.seconds or recipe.n_frames:  # else the clips decide
        expected["n_frames"] = frames_for(recipe, None, args.seconds)
    if recipe.own:
        expected["data_dir"] = args.data_dir and str(args.data_dir.resolve())
    compare_settings(folder, run.settings, expected)
    there = {fold.fold: fold for fold in run.folds}
    wanted = set(args.folds or (fold for fold, _, _ in run.clips))
    if not wanted <= there.keys():
        return None
    return structs.replace(run, folds=[there[fold] for fold in sorted(wanted)])


if __name__ == "__main__":
    sys.exit(exit_code(lambda: work(sys.argv[1:])))
