"""How cells are trained: in worker processes that live on, --jobs of them, each of them one cell after another.

A worker imports torch once. What a cell then does there is one run of train.py, and its output goes to log.txt in the
cell's folder. Meanwhile the worker holds the claim on the cell, a lock on an open file: the system drops it when the
process ends, however it ends. So a killed cell is free at once, and any number of campaigns may work in one folder.
"""

import csv
import multiprocessing
import os
import signal
import statistics
import sys
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout
from msgspec import to_builtins

import petl
import train
from data import DATASETS, frames_for, load_dataset
from load_weights import find_checkpoint, to_dict
from support.checkpoints import read_json
from support.command import UserError, print_anything
from support.headers import RunConfig, RunResult
from support.processes import say
from support.records import compare_settings, forget_peak, mend
from support.variants import fitted
from tools.cells import Cell, Plan, epochs_of, shape_and_hash, shape_of

BUSY = "another process trains it"
PATIENCE = 1  # seconds that a worker waits for the claim of another to end

# ------------------------------------------------------------------------------------------------------------ a worker


def work(campaign: Connection) -> None:
    """The life of a worker: cells come in as (folder, options of train.py), out goes what `train_cell` returns.

    It ends with the campaign, once its cell is finished, and after a cell that failed: what such a one leaves behind, a
    full memory or a GPU in disorder, would harm the next.
    """
    print_anything()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the campaign, which ends its workers
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and lets them tidy up
    answer = ""
    with suppress(EOFError, BrokenPipeError):  # the campaign is gone
        while answer in ("", BUSY):
            answer = train_cell(*campaign.recv())
            campaign.send(answer)


def train_cell(folder: Path, words: list[str]) -> str:
    """One run of train.py. Returns why it has no result: "" if it has one, BUSY if the cell is another's."""
    claim = folder / ".cell.lock"
    try:
        with FileLock(claim, timeout=0):
            print_to(folder / "log.txt")
            print("---------- a new attempt", flush=True)
            forget_peak()
            if "torch._dynamo" in sys.modules:
                torch.compiler.reset()  # else torch gives up compiling after a few models
            sys.argv = ["train.py", *words]  # what config.json gives as the command
            train.start(words)
            return ""
    except Timeout:
        with suppress(Timeout), FileLock(claim, timeout=PATIENCE):
            pass  # the other has ended: the campaign will see whether with a result
        return BUSY
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return str(error)
    except Exception as error:
        traceback.print_exc()
        return traceback.format_exception_only(error)[-1].strip()


def print_to(log: Path) -> None:
    """From now on everything that this process prints, C libraries too, goes to the end of `log`."""
    with open(log, "ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())


class Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection  # to its `work`


def hire() -> Worker:
    """A new worker."""
    context = multiprocessing.get_context("spawn")  # the same on all systems; a GPU does not survive a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # so that the pipe ends with the worker
    return Worker(process, ours)


def answer_of(worker: Worker) -> str:
    """What the worker says of its cell, or in its place how it ended."""
    try:
        return worker.pipe.recv()
    except (EOFError, ConnectionError):
        worker.process.join()
        code = worker.process.exitcode
    if code >= 0:
        return f"exit code {code}"
    return f"killed by {signal.Signals(-code).name}" + (", out of memory?" if code == -signal.SIGKILL else "")


# -------------------------------------------------------------------------------------------------------- the campaign


def train_cells(cells: list[Cell], plan: Plan) -> tuple[dict[Cell, dict], dict[Cell, str]]:
    """Train what is not finished. Returns the results, and the reasons of the cells without one.

    Any number of these may work in one folder: each takes cells that nobody has claimed, and at the end waits for those
    that others still train, so that every one of them ends with the whole table.
    """
    done, failed, others = {}, {}, set()
    left = take_results(cells, done, failed, plan)
    say(f"{len(cells)} cells, {len(done)} finished, {len(left)} to train")
    failed |= without_data(left, plan)
    waiting = deque(cell for cell in left if cell not in failed)

    def next_cell() -> Cell | None:
        while waiting:
            if cell := take_results([waiting.popleft()], done, failed, plan):  # another campaign may have finished it
                return cell[0]

    for cell, answer in answers(next_cell, plan):
        left = take_results([cell], done, failed, plan)
        if cell in done:
            left = len(cells) - len(done) - len(failed)
            each = statistics.mean(result["seconds"] for result in done.values())
            seconds = each * (left - min(left, plan.jobs - 1) / 2) / plan.jobs  # those that run are half done
            say(f"[{len(done)}/{len(cells)}] {cell.name}: {done[cell]['accuracy']:.2f} %, {done[cell]['seconds']:.0f} s"
                + (f"; about {timedelta(seconds=round(seconds))} left" if left else ""))  # fmt: skip
        elif left and answer == BUSY:
            waiting.append(cell)
            if cell not in others:
                say(f"{cell.name}: another process trains it")
            others.add(cell)
        else:
            failed.setdefault(cell, answer or "it left no result")
            say(f"FAILED {cell.name}: {failed[cell]} (all of it in {plan.out / cell.name / 'log.txt'})")
    take_results(cells, done, failed, plan)  # those that others have finished since
    return done, failed


def take_results(cells: list[Cell], done: dict[Cell, dict], failed: dict[Cell, str], plan: Plan) -> list[Cell]:
    """Put what has been finished, by whomever, into `done`, and what can never be into `failed`. Returns the others."""
    for cell in cells:
        try:
            if cell not in done and cell not in failed and (result := result_of(cell, plan)):
                done[cell] = result
        except UserError as error:
            failed[cell] = str(error)
    return [cell for cell in cells if cell not in done and cell not in failed]


def without_data(cells: list[Cell], plan: Plan) -> dict[Cell, str]:
    """Fetch what cells need, once, before they start. Returns why that fails, for those whose data are not there."""
    failed = {}
    for dataset, weights in dict.fromkeys((cell.dataset, cell.weights) for cell in cells):
        try:
            if not weights.startswith("random:"):
                find_checkpoint(weights)
            load_dataset(dataset, plan.data_dir.get(dataset), plan.cache_dir)
        except UserError as error:
            say(f"FAILED all cells of {dataset} from {weights}: {error}")
            failed |= {cell: str(error) for cell in cells if (cell.dataset, cell.weights) == (dataset, weights)}
    return failed


def answers(next_cell: Callable[[], Cell | None], plan: Plan) -> Iterator[tuple[Cell, str]]:
    """Let `plan.jobs` workers train the cells that `next_cell` gives. Yields each cell with its worker's answer."""
    if plan.jobs > 1:  # they share the cores: for small models single threads beat threads that wait for one another
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // plan.jobs)))  # workers inherit it
    running, idle = {}, []
    try:
        while True:
            while len(running) < plan.jobs and (cell := next_cell()):
                folder = plan.out / cell.name
                folder.mkdir(parents=True, exist_ok=True)
                worker = idle.pop() if idle else hire()
                running[worker] = cell
                with suppress(ConnectionError):  # it was killed: `answer_of` will say so
                    worker.pipe.send((folder, [*options(cell, plan), "--resume"]))
            if not running:
                return
            ready = wait([worker.pipe for worker in running])
            for worker in [worker for worker in running if worker.pipe in ready]:
                answer = answer_of(worker)
                if answer in ("", BUSY):
                    idle.append(worker)
                yield running.pop(worker), answer
    finally:
        for worker in (*running, *idle):  # with cells, if the campaign was interrupted
            worker.process.terminate()


# ------------------------------------------------------------------------------------------------- a cell and its run


def options(cell: Cell, plan: Plan) -> list[str]:
    """The command line of train.py that is this cell."""
    words = {
        "--dataset": cell.dataset, "--method": cell.method, "--seed": cell.seed, "--weights": cell.weights,
        "--shots": cell.shots, "--rr": cell.rr, "--prompts": cell.prompts, "--kernel": cell.kernel, "--lr": cell.lr,
        "--epochs": epochs_of(cell, plan),
        "--data-dir": plan.data_dir.get(cell.dataset), "--cache-dir": plan.cache_dir, "--device": plan.device,
        "--dtype": plan.dtype, "--out": plan.out / cell.variant,
    }  # fmt: skip
    return [str(word) for pair in words.items() if pair[1] is not None for word in pair] + plan.passed


def method_of(cell: Cell) -> petl.Method:
    """The method as the cell trains it."""
    lr = cell.lr or DATASETS[cell.dataset].lr.get(cell.method)
    return fitted(petl.find(cell.method), shape_of(cell.weights), lr, cell.rr, prompts=cell.prompts, kernel=cell.kernel)


def result_of(cell: Cell, plan: Plan) -> dict | None:
    """result.json of a cell whose folds are all finished, else None. UserError if another experiment lies there."""
    folder = plan.out / cell.name
    mend(folder)
    if not (folder / "result.json").exists():
        return None
    config, result, split = read_run(folder)
    run = train.parse([*options(cell, plan), "--device", "cpu"])  # nothing is computed here
    recipe = DATASETS[cell.dataset]
    expected = {
        "method": to_dict(method_of(cell)), "epochs": run.epochs, "pool": run.pool,
        "batch_size": run.batch_size or recipe.batch_size, "shots": cell.shots, "balance": run.balance,
        "best": "balanced" if recipe.own else "accuracy", **recipe.masks(config["n_frames"]),
    }  # fmt: skip
    if plan.dtype:
        expected["dtype"] = run.dtype
    if run.seconds or recipe.n_frames:
        expected["n_frames"] = frames_for(recipe, None, run.seconds)  # the clips have no say
    if cell.weights != "audioset" and not cell.weights.startswith(("hf:", "random:")):  # a file may have changed
        expected["backbone"] = shape_and_hash(cell.weights)[1]
    if recipe.own:
        expected["data_dir"] = run.data_dir and str(run.data_dir.resolve())
    compare_settings(folder, config, expected)
    wanted = set(run.folds or {int(row["fold"]) for row in split})
    tested = Counter(int(row["fold"]) for row in split if row["split"] == "test")
    results = [{**fold, "tested": tested[fold["fold"]]} for fold in result["folds"] if fold["fold"] in wanted]
    if len(results) < len(wanted):
        return None
    accuracy = statistics.mean(fold["accuracy"] for fold in results)
    return {**result, "folds": results, "accuracy": accuracy, "seconds": sum(fold["seconds"] for fold in results)}


def read_run(run: Path) -> tuple[dict, dict, list[dict[str, str]]]:
    """config.json, result.json and the rows of split.csv of a finished run; UserError if it is none.

    What is damaged is made again from the fold files, where that can be.
    """
    mend(run)
    try:
        for name in ("config.json", "result.json"):
            (run / name).stat()
        config = read_json(run / "config.json", RunConfig, mend="delete the folder")
        result = read_json(run / "result.json", RunResult, mend="delete it: the same command makes it again")
        with open(run / "split.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
            return to_builtins(config), to_builtins(result), list(csv.DictReader(file))
    except FileNotFoundError as error:
        raise UserError(f"{run} is no finished run of train.py: there is no {Path(error.filename).name}") from None
