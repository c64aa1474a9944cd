"""The paper's experiments: every table and figure by one command, the paper's number beside the measured one.

    python experiments.py table1 --datasets demo --seeds 0,1,2        # offline; any dataset of train.py will do
    python experiments.py all --dry-run                               # what would be trained, and for how long
    python experiments.py plot experiments/demo/lora/seed0            # confusion matrix and learning curves of a run

TABLES and FIGURES say what the paper compares; its numbers are in paper_results.json. A *cell* is one run of train.py
in a folder and a process of its own, so that one that fails or is killed harms no other. `cells_of` lists them,
`train_cells` trains those that are not finished, `render` makes the tables, figures.py draws.
"""

import argparse
import csv
import difflib
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

import figures
import petl
import train
from ast_model import AST, ASTConfig, UserError
from data import DATASETS, ESC50, FSC, GSC, US8K, Dataset, default_cache_dir, random_split
from load_weights import RANDOM, find_checkpoint, fingerprint, read_checkpoint
from train import Parser, exit_code, numbers, positive, write_text

# ------------------------------------------------------------------------------------- what the paper's tables compare

ALL_FOUR, ESC50_AND_FSC = ("esc50", "us8k", "gsc", "fsc"), ("esc50", "fsc")
PRINTED = {"esc50": "ESC-50", "esc10": "ESC-10", "us8k": "US8K", "gsc": "GSC", "fsc": "FSC"}


@dataclass(frozen=True)
class Table:
    """A table of the paper. Its numbers have the same row names in paper_results.json."""

    title: str
    datasets: tuple[str, ...]
    rows: dict[str, str]  # name of the row: method in petl.METHODS
    few_shot: bool = False  # a column for each number of clips per class


TABLES = {
    "table1": Table("Table I. All methods", ALL_FOUR, {
        "Full FT": "full_ft", "Linear": "linear", "BitFit": "bitfit", "SPT-300": "spt", "DPT-25": "dpt",
        "Pref-T 24": "prefix", "PF par": "pfeiffer_par", "PF seq": "pfeiffer_seq", "HOU par": "houlsby_par",
        "HOU seq": "houlsby_seq", "Conv PF par": "convpass_pfeiffer_par", "Conv PF seq": "convpass_pfeiffer_seq",
        "Conv HOU par": "convpass_houlsby_par", "Conv HOU seq": "convpass_houlsby_seq", "LoRA": "lora",
    }),
    "table2": Table("Table II. Few-shot learning, clips per class", ("esc50", "gsc"), {
        "DPT-25": "dpt", "LoRA": "lora", "Bottle": "pfeiffer_par", "Conv": "convpass_pfeiffer_par",
    }, few_shot=True),
    "table3": Table("Table III. Where an adapter goes", ALL_FOUR, {
        "FFN-Seq/Par-After": "pfeiffer_seq", "FFN-Seq-Before": "adapter_ffn_seq_before",
        "FFN-Par-Before": "adapter_ffn_par_before", "MHSA-Seq/Par-After": "adapter_mhsa_seq_after",
        "MHSA-Seq-Before": "adapter_mhsa_seq_before", "MHSA-Par-Before": "pfeiffer_par",
    }),
    "table4": Table("Table IV. Which projections LoRA adapts", ALL_FOUR, {
        "q": "lora_q", "q k": "lora_qk", "q v": "lora", "q k v o": "lora_qkvo",
    }),
    "table5": Table("Table V. How adapters spend a given number of parameters", ESC50_AND_FSC, {
        "PF FFN-Seq-After": "pfeiffer_seq", "PF MHSA-Par-Before": "pfeiffer_par",
        "PF FFN-Seq-After x2": "pfeiffer_seq_x2", "PF MHSA-Par-Before x2": "pfeiffer_par_x2",
        "HOU seq": "houlsby_seq", "HOU par": "houlsby_par", "HOU mixed": "houlsby_mixed", "HYDRA FFN": "hydra",
    }),
    "table6": Table("Table VI. Several methods at once", ESC50_AND_FSC, {
        "PF MHSA-Par-Before x2": "pfeiffer_par_x2", "HOU par": "houlsby_par", "LoRA": "lora_x2",
        "Adapter + LoRA": "adapter_lora", "Adapter + DPT-25": "adapter_dpt",
        "Adapter + DPT-14 + LoRA": "adapter_dpt_lora",
    }),
    "table7": Table("Table VII. Residual connections of adapters", ESC50_AND_FSC, {
        "Seq, residual": "pfeiffer_seq", "Seq, no residual": "adapter_ffn_seq_no_residual",
        "Par, no residual": "adapter_ffn_par_before", "Par, residual": "adapter_ffn_par_residual",
    }),
}  # fmt: skip

CURVES = {"HOU par": "houlsby_par", "PF par": "pfeiffer_par", "LoRA": "lora", "DPT": "dpt", "Full FT": "full_ft"}
FIGURES = {
    "fig2": Table("Figure 2. What the methods make of the test clips", ("fsc",), {
        "Linear": "linear", "DPT-25": "dpt", "HOU par": "houlsby_par", "Full FT": "full_ft",
    }),
    "fig3": Table("Figure 3. Accuracy against trained parameters", ("gsc", "fsc"), CURVES),
    "fig4": Table("Figure 4. Accuracy against trained parameters", ("esc50",), CURVES),
}  # fmt: skip
TARGETS = {**TABLES, **FIGURES}
BUDGETS = (0.25, 0.5, 1, 2, 4)  # Figures 3 and 4: RR divided, or the number of prompts multiplied, by each of these

SHOTS = {"gsc": (2, 8, 32, 64)}
OTHER_SHOTS = (1, 2, 4, 8)  # of ESC-50, and of every dataset that is not in Table II
FEW_SHOT_EPOCHS = 30  # at least: with few clips an epoch is a step or two


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

    @property
    def variant(self) -> str:
        """The folder of everything that differs from Table I in the same way; empty for Table I itself."""
        weights = None if self.weights == DATASETS[self.dataset].weights else slug(self.weights)
        settings = {"weights-": weights, "shots": self.shots, "rr": self.rr, "prompts": self.prompts}
        return "-".join(f"{name}{value}" for name, value in settings.items() if value is not None)

    @property
    def name(self) -> str:
        return str(Path(self.variant, self.dataset, self.method, f"seed{self.seed}"))


def slug(text: str) -> str:
    return re.sub(r"[^\w.]+", "_", text).strip("_.")


# ------------------------------------------------------------------------------------------------------------ the cells


def rows_of(table: Table, args: argparse.Namespace) -> dict[str, str]:
    """The rows of a table that --methods leaves, and those that --add puts below them."""
    rows = {name: method for name, method in table.rows.items() if not args.methods or method in args.methods}
    return {**rows, **{method: method for method in args.add if method not in rows.values()}}


def columns_of(table: Table, args: argparse.Namespace) -> list[tuple[str, int | None]]:
    """Dataset and clips per class of each column; without few-shot the latter is None."""
    datasets = args.datasets or table.datasets
    return [(d, shots) for d in datasets for shots in (SHOTS.get(d, OTHER_SHOTS) if table.few_shot else (None,))]


def weights_of(dataset: str, args: argparse.Namespace) -> str:
    return args.weights or DATASETS[dataset].weights


def shape_of(weights: str) -> ASTConfig:
    """The shape of a backbone; for names that tell it, without reading the checkpoint."""
    if weights == "audioset":
        return ASTConfig()
    if weights.removeprefix("random:") in RANDOM:
        dim, depth, heads = RANDOM[weights.removeprefix("random:")]
        return ASTConfig(dim=dim, depth=depth, heads=heads)
    return _read(weights)[0]


@lru_cache
def _read(weights: str) -> tuple[ASTConfig, str]:
    """Shape and SHA-256 of a checkpoint."""
    state, config = read_checkpoint(weights)
    return config, fingerprint(state, config)


def random_like(weights: str) -> str:
    """Random weights of the same shape as the backbone `weights`. UserError if train.py has none."""
    shape = shape_of(weights)
    for size, its_shape in RANDOM.items():
        if its_shape == (shape.dim, shape.depth, shape.heads):
            return f"random:{size}"
    raise UserError(f"--random: there are no random weights of {shape.dim} dimensions in {shape.depth} blocks")


def budgets(dataset: str, method: str, seed: int, weights: str) -> list[Cell]:
    """The cells of a curve in Figures 3 and 4: a method with a quarter to four times its parameters.

    What is the same experiment as a row of METHODS becomes that row's cell: PF par with twice the parameters is PF par
    x2. Methods with neither RR nor prompts have one cell.
    """
    dim = shape_of(weights).dim
    row = petl.find(method)

    def first(parts, setting):  # of the parts that have it
        return next((getattr(part, setting) for part in parts if hasattr(part, setting)), None)

    rr, prompts = first(row.parts, "rr"), first(row.parts, "prompts")
    if rr is None and prompts is None:
        return [Cell(dataset, method, seed, weights)]
    known = {(petl.fit(other, dim).parts, other.lr): other.name for other in [*petl.METHODS.values(), row]}
    cells = []
    for budget in BUDGETS:
        resized = petl.override(row, rr and max(1, round(rr / budget)), prompts=prompts and round(prompts * budget))
        parts = petl.fit(row if budget == 1 else resized, dim).parts
        if (parts, row.lr) in known:
            cells.append(Cell(dataset, known[parts, row.lr], seed, weights))
        else:  # train.py is told the number for this backbone
            cells.append(replace(Cell(dataset, method, seed, weights), rr=first(parts, "rr"),
                                 prompts=first(parts, "prompts")))  # fmt: skip
    return list(dict.fromkeys(cells))  # few prompts cannot be halved often


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """All cells of the targets, each once, though several tables may show it; one seed after the other."""
    cells = []
    for seed in args.seeds:
        for target in args.targets:
            table = TARGETS[target]
            for dataset, shots in columns_of(table, args):
                for method in rows_of(table, args).values():
                    if target in ("fig3", "fig4"):
                        cells += budgets(dataset, method, seed, weights_of(dataset, args))
                    else:
                        cells.append(Cell(dataset, method, seed, weights_of(dataset, args), shots))
                if target == "table1":
                    weights = random_like(weights_of(dataset, args)) if args.random else ""
                    cells += [Cell(dataset, method, seed, weights) for method in args.random]
    return list(dict.fromkeys(cells))


def epochs_of(cell: Cell, args: argparse.Namespace) -> int:
    epochs = DATASETS[cell.dataset].epochs
    return args.epochs or (max(epochs, FEW_SHOT_EPOCHS) if cell.shots else epochs)


def options(cell: Cell, args: argparse.Namespace) -> list[str]:
    """The command line of train.py that is this cell."""
    words = {
        "--dataset": cell.dataset, "--method": cell.method, "--seed": cell.seed, "--weights": cell.weights,
        "--shots": cell.shots, "--rr": cell.rr, "--prompts": cell.prompts, "--epochs": epochs_of(cell, args),
        "--data-dir": args.data_dir.get(cell.dataset), "--cache-dir": args.cache_dir, "--device": args.device,
        "--dtype": args.dtype, "--out": args.out / cell.variant,
    }  # fmt: skip
    return [str(word) for pair in words.items() if pair[1] is not None for word in pair] + args.passed


def result_of(cell: Cell, args: argparse.Namespace) -> dict | None:
    """result.json of a cell whose folds are all finished, else None. UserError if another experiment lies there."""
    folder = args.out / cell.name
    if not (folder / "result.json").exists():
        return None
    config, result, split = figures.read_run(folder)
    run = train.parse([*options(cell, args), "--device", "cpu"])  # nothing is computed here
    recipe, method = DATASETS[cell.dataset], train.method_for(run, shape_of(cell.weights).dim)
    expected = {
        "method": petl.to_dict(method), "epochs": run.epochs, "pool": run.pool,
        "batch_size": run.batch_size or recipe.batch_size, "shots": cell.shots, "mask": recipe.mask,
    }  # fmt: skip
    if args.dtype:
        expected["dtype"] = run.dtype
    if run.seconds or recipe.n_frames:
        expected["n_frames"] = train.frames_for(run, None)
    if cell.weights != "audioset" and not cell.weights.startswith(("hf:", "random:")):  # a file may have changed
        expected["backbone"] = _read(cell.weights)[1]
    if cell.dataset in ("folder", "csv"):
        expected["data_dir"] = str(run.data_dir.resolve())
    train.compare_settings(folder, config, expected)
    wanted = set(run.folds or {int(row["fold"]) for row in split})
    results = [fold for fold in result["folds"] if fold["fold"] in wanted]
    if len(results) < len(wanted):
        return None
    accuracy = statistics.mean(fold["accuracy"] for fold in results)
    return {**result, "folds": results, "accuracy": accuracy, "seconds": sum(fold["seconds"] for fold in results)}


# --------------------------------------------------------------------------------------------------------- the campaign

BUSY = 75  # exit code of a cell that another process is training
ATTEMPT = "---------- a new attempt\n"  # in its log.txt


def train_cell(folder: Path, words: list[str]) -> int:
    """The command `cell`: one run of train.py, in a process of its own that holds the claim on `folder`.

    The claim is a lock on an open file. The system drops it when this process ends, however it ends, so a killed cell
    is free at once; it lives on when only the campaign that started it was killed.
    """
    lock = FileLock(folder / ".cell.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return BUSY
    sys.argv = ["train.py", *words]  # what config.json gives as the command
    return train.main(words)


def claimed(folder: Path) -> bool:
    """Whether some process is training in `folder` now."""
    try:
        with FileLock(folder / ".cell.lock", timeout=0):
            return False
    except Timeout:
        return True


def start_cell(cell: Cell, args: argparse.Namespace) -> subprocess.Popen:
    folder = args.out / cell.name
    environment = dict(os.environ)
    if args.jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(threads_of_job(args)))
    words = [sys.executable, __file__, "cell", str(folder), *options(cell, args), "--resume"]
    with open(folder / "log.txt", "ab") as log:
        log.write(ATTEMPT.encode())
        log.flush()
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)


def threads_of_job(args: argparse.Namespace) -> int:
    """The cells share the cores: for small models several single threads beat threads that wait for one another."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // args.jobs)


def reason(code: int, log: Path) -> str:
    """Why the last attempt at a cell ended without a result, in one line."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}" + (", out of memory?" if code == -signal.SIGKILL else "")
    attempt = log.read_text(errors="replace").rpartition(ATTEMPT)[2]
    lines = [line for line in attempt.splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else f"exit code {code}"


def take_results(cells: list[Cell], done: dict[Cell, dict], failed: dict[Cell, str], args: argparse.Namespace) -> None:
    """Move what has been finished, by whomever, into `done`; what can never be into `failed`."""
    for cell in cells:
        try:
            if (result := result_of(cell, args)) is not None:
                done[cell] = result
        except UserError as error:
            failed[cell] = str(error)


def train_cells(cells: list[Cell], args: argparse.Namespace) -> tuple[dict[Cell, dict], dict[Cell, str]]:
    """Train what is not finished, --jobs cells at a time. Returns the results and the reasons of those without one.

    Any number of these may work in one folder: each takes cells that nobody has claimed, and at the end waits for those
    that others still train, so that every one of them ends with the whole table. With --shard a process leaves all
    cells but its own to others and waits for none.
    """
    done, failed, running = {}, {}, {}
    take_results(cells, done, failed, args)
    mine = cells if args.shard is None else cells[args.shard[0] - 1 :: args.shard[1]]
    waiting = [cell for cell in mine if cell not in done and cell not in failed]
    say(f"{len(cells)} cells, {len(done)} finished, {len(waiting)} to train")
    for dataset, weights in dict.fromkeys((cell.dataset, cell.weights) for cell in waiting):
        why = not_there(dataset, weights, args)
        if why:
            say(f"FAILED all cells of {dataset} from {weights}: {why}")
            failed |= {cell: why for cell in waiting if (cell.dataset, cell.weights) == (dataset, weights)}
    waiting = [cell for cell in waiting if cell not in failed]
    told = False
    try:
        while waiting or running:
            for process in [process for process in running if process.poll() is not None]:
                cell = running.pop(process)
                take_results([cell], done, failed, args)
                if cell in done:
                    r, each = done[cell], statistics.mean(result["seconds"] for result in done.values())
                    left = each * (len(waiting) + len(running) / 2) / args.jobs  # those that run are half done
                    say(f"[{len(done)}/{len(cells)}] {cell.name}: {r['accuracy']:.2f} %, {r['seconds']:.0f} s"
                        + (f"; about {minutes(left)} left" if left else ""))  # fmt: skip
                elif process.returncode == BUSY:
                    waiting.append(cell)
                else:
                    log = args.out / cell.name / "log.txt"
                    failed.setdefault(cell, reason(process.returncode, log))
                    say(f"FAILED {cell.name}: {failed[cell]} (all of it in {log})")
            for cell in list(waiting) if len(running) < args.jobs else []:
                (args.out / cell.name).mkdir(parents=True, exist_ok=True)
                if len(running) == args.jobs or claimed(args.out / cell.name):
                    continue
                waiting.remove(cell)
                take_results([cell], done, failed, args)  # another process may have finished it
                if cell not in done and cell not in failed:
                    running[start_cell(cell, args)] = cell
            if waiting and not running and not told:
                say(f"waiting for {len(waiting)} cells that other processes train")
                told = True
            time.sleep(0.2 if running else 1)
    finally:
        for process in running:  # this campaign was interrupted; --resume takes them up again
            process.terminate()
    take_results([cell for cell in cells if cell not in done and cell not in failed], done, failed, args)  # of others
    return done, failed


def not_there(dataset: str, weights: str, args: argparse.Namespace) -> str | None:
    """Fetches what all cells of a dataset and a backbone need, once, before they start. Returns why it cannot."""
    try:
        if not weights.startswith("random:"):
            find_checkpoint(weights)
        DATASETS[dataset].load(args.data_dir.get(dataset), args.cache_dir)
    except UserError as error:
        return str(error)


def say(text: str) -> None:
    print(text, flush=True)


def minutes(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------------------------------------- what would be trained


def dry_run(cells: list[Cell], args: argparse.Namespace) -> None:
    """List the cells, the parameters they train beside the final LayerNorm and head, and how long they would take.

    A finished cell has its time in result.json. For the others a training step and a test step on noise are timed on
    this machine, once for each dataset and kind of method. No dataset is downloaded: there is then no estimate.
    """
    if args.jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_of_job(args))
    done, failed = {}, {}
    take_results(cells, done, failed, args)
    mine = set(cells if args.shard is None else cells[args.shard[0] - 1 :: args.shard[1]])
    speeds, total, unknown, lines = {}, 0.0, 0, []
    for cell in tqdm(cells, "timing first steps", unit="cell", leave=False, disable=None):
        if cell in done:
            result = done[cell]
            lines.append((cell.name, trained_of(result["parameters"]), "finished", minutes(result["seconds"])))
            continue
        dataset = local_dataset(cell.dataset, args.data_dir.get(cell.dataset), args.cache_dir)
        trained, seconds = estimate(cell, dataset, speeds, args)
        state = f"conflict: {failed[cell]}" if cell in failed else "to do" if cell in mine else "of another shard"
        lines.append((cell.name, trained, state, "-" if seconds is None else minutes(seconds)))
        if cell in mine:
            total, unknown = total + (seconds or 0), unknown + (seconds is None)
    width = max(len(line[0]) for line in lines)
    say(f"{'cell':<{width}}  {'trained':>11}  {'time':>7}  state")
    for name, trained, state, seconds in lines:
        say(f"{name:<{width}}  {f'{trained:,}' if trained else '-':>11}  {seconds:>7}  {state}")
    jobs = f" in {args.jobs} jobs, if they do not slow one another down" if args.jobs > 1 else ""
    without = f"; {unknown} more have no estimate, their data is not here yet" if unknown else ""
    say(f"{len(cells)} cells, {len(done)} finished; the rest, from the first steps timed on this machine, about "
        f"{minutes(total / args.jobs)}{jobs}, and a few seconds to start each{without}")  # fmt: skip


def trained_of(parameters: dict[str, int]) -> int:
    """Trained parameters as the paper counts them: without the final LayerNorm and head, unless nothing else trains."""
    return parameters["petl"] or parameters["head"]


@lru_cache
def local_dataset(name: str, data_dir: Path | None, cache_dir: Path) -> Dataset | None:
    """The dataset, or None if it would have to be fetched."""
    source = {"esc50": ESC50, "esc10": ESC50, "us8k": US8K, "gsc": GSC, "fsc": FSC}.get(name)
    if source and data_dir is None and not (cache_dir / source.folder).exists():
        return None
    return DATASETS[name].load(data_dir, cache_dir)


def estimate(
    cell: Cell, dataset: Dataset | None, speeds: dict, args: argparse.Namespace
) -> tuple[int | None, float | None]:
    """Parameters and seconds of a cell, None where only the data would tell. `speeds` keeps what was timed."""
    run, recipe = train.parse(options(cell, args)), DATASETS[cell.dataset]
    n_frames = train.frames_for(run, dataset) if dataset else recipe.n_frames
    config = replace(
        shape_of(cell.weights), n_frames=n_frames, n_classes=len(dataset.classes) if dataset else 2, pool=run.pool
    )
    method = train.method_for(run, config.dim)
    with torch.device("meta"):  # shapes without numbers
        parameters = petl.count(petl.apply(AST(config), method))
    if dataset is None:
        return parameters["petl"] or None, None
    batch = run.batch_size or recipe.batch_size
    kinds = {(type(part).__name__, getattr(part, "kind", None), getattr(part, "deep", None)) for part in method.parts}
    key = (frozenset(kinds), config)  # sizes of bottlenecks and the like hardly matter
    if key not in speeds:
        speeds[key] = clips_per_second(config, method, batch, run)
    training, testing = speeds[key]
    folds = dataset.folds or {1: random_split(dataset, cell.seed)}
    seconds = 0.0
    for split in [folds[k] for k in run.folds or folds]:
        n_train = cell.shots * len(dataset.classes) if cell.shots else len(split.train)
        n_val, n_test = len(split.val), len(split.test)
        if method.parts or recipe.mask:
            seconds += run.epochs * (n_train / training + n_val / testing) + n_test / testing
        else:  # a linear probe: see train.pool_clips
            seconds += (n_train + n_val + n_test) / testing
    return trained_of(parameters), seconds


def clips_per_second(
    config: ASTConfig, method: petl.Method, batch: int, run: argparse.Namespace
) -> tuple[float, float]:
    """Speed of one training step and of one test step, on noise, up to 8 clips at once on a CPU."""
    batch = batch if run.device.type == "cuda" else min(batch, 8)
    model = train.prepare(petl.apply(AST(config), method), run).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-6)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == "float16")
    noise = torch.randn(batch, config.n_frames, config.n_mels)
    clips = train.Clips(noise.to(run.device), torch.zeros(batch, dtype=torch.long, device=run.device))
    settings = SimpleNamespace(batch_size=batch, mask=False, dtype=run.dtype)

    def training():
        train.train_epoch(model, optimizer, scaler, clips, torch.arange(batch), [1e-6], settings, run)

    def testing():
        train.evaluate(model, clips, list(range(batch)), settings, run)

    speeds = []
    for step in (training, testing):
        for _ in range(3):  # the first one also allocates memory
            start = time.perf_counter()
            step()
            seconds = time.perf_counter() - start
            if seconds > 2:  # memory hardly matters then
                break
        speeds.append(batch / seconds)
    return tuple(speeds)


# ----------------------------------------------------------------------------------------------------------- the tables


@lru_cache
def paper_tables() -> dict[str, dict]:
    """paper_results.json; numbers are text there, with the digits the paper prints."""
    return json.loads(Path(__file__).with_name("paper_results.json").read_text(encoding="utf-8"), parse_float=str)


def paper_numbers(target: str) -> dict[tuple[str, str], str]:
    """A table of the paper as {(row, column): number}."""
    columns, rows = paper_tables()[target]["columns"], paper_tables()[target]["rows"]
    return {(row, column): n for row in rows for column, n in zip(columns, rows[row], strict=True)}


@dataclass(frozen=True)
class Measured:
    """What the runs of one row and column gave, over all folds of all seeds."""

    mean: float  # accuracy in percent
    std: float | None  # sample standard deviation; None for a single run
    runs: int
    seeds: int
    seconds: float  # of training, all folds of one seed
    trained: int  # parameters, see trained_of
    head: int  # parameters of the final LayerNorm and head


def measure(cells: list[Cell], done: dict[Cell, dict]) -> Measured | None:
    """The finished ones of `cells`, which differ in nothing but the seed."""
    results = [done[cell] for cell in cells if cell in done]
    if not results:
        return None
    accuracies = [fold["accuracy"] for result in results for fold in result["folds"]]
    return Measured(
        mean=statistics.mean(accuracies), std=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        runs=len(accuracies), seeds=len(results), seconds=statistics.mean(result["seconds"] for result in results),
        trained=trained_of(results[0]["parameters"]), head=results[0]["parameters"]["head"],
    )  # fmt: skip


def marked(numbers: list[str | None]) -> list[str]:
    """The numbers of a column, None where there is none: the best **bold**, the second best in _italics_."""
    best = sorted({float(number) for number in numbers if number is not None}, reverse=True)[:2]
    marks = dict(zip(best, ("**", "_"), strict=False)) if len(best) > 1 else {}
    return ["missing" if n is None else f"{marks.get(float(n), '')}{n}{marks.get(float(n), '')}" for n in numbers]


def beside(texts: list[str], numbers: list[str | None]) -> list[str]:
    """Each text with the paper's number in parentheses, where there is one."""
    return [text if n is None else f"{text} ({n})" for text, n in zip(texts, numbers, strict=True)]


def lines_of(target: str, args: argparse.Namespace) -> list[tuple[str, str, dict[str, str]]]:
    """The rows to print: name, method, weights for each dataset. --random puts a second block below Table I."""
    table = TABLES[target]
    weights = {dataset: weights_of(dataset, args) for dataset, _ in columns_of(table, args)}
    lines = [(name, method, weights) for name, method in rows_of(table, args).items()]
    if target == "table1" and args.random:
        weights = {dataset: random_like(name) for dataset, name in weights.items()}
        names = {method: name for name, method in table.rows.items()}
        lines += [(f"{names.get(method, method)}, random weights", method, weights) for method in args.random]
    return lines


def render(target: str, done: dict[Cell, dict], args: argparse.Namespace) -> tuple[str, list[dict]]:
    """A table as Markdown, and as one record for each of its cells."""
    table, paper, lines = TABLES[target], paper_numbers(target), lines_of(target, args)
    columns = columns_of(table, args)
    names = [name for name, *_ in lines]
    measured = [
        [measure([Cell(d, method, seed, weights[d], shots) for seed in args.seeds], done) for d, shots in columns]
        for _, method, weights in lines
    ]  # a list for each line
    found = [[m for m in line if m] for line in measured]

    text = {"method": names, "trained": [span({m.trained for m in line}) for line in found]}
    if all(shape_of(weights).dim == 768 for _, _, line in lines for weights in line.values()):
        text["trained"] = beside(text["trained"], [paper.get((name, "params")) for name in names])
    records = []
    for i, (dataset, shots) in enumerate(columns):
        column = [line[i] for line in measured]
        cells = marked([m and f"{m.mean:.2f}" for m in column])
        for j, m in enumerate(column):
            if m and m.std is not None:
                cells[j] += f" +- {m.std:.2f}"
            if m and m.seeds < len(args.seeds):
                cells[j] += f" [{m.seeds} of {len(args.seeds)} seeds]"
        key = f"{dataset} {shots}" if shots else dataset
        theirs = [paper.get((name, key)) for name in names]
        text[PRINTED.get(dataset, dataset) + (f", {shots}" if shots else "")] = beside(cells, theirs)
        records += [
            {"table": target, "row": name, "method": method, "dataset": dataset, "shots": shots,
             "weights": weights[dataset], **(asdict(m) if m else dict.fromkeys(f.name for f in fields(Measured))),
             "paper": number}
            for (name, method, weights), m, number in zip(lines, column, theirs, strict=True)
        ]  # fmt: skip
    theirs = [paper.get((name, "avg")) for name in names]
    datasets = tuple(dict.fromkeys(dataset for dataset, _ in columns))
    if len(datasets) > 1 and not table.few_shot:
        ours = marked([None if None in line else f"{statistics.mean(m.mean for m in line):.2f}" for line in measured])
        text["Avg"] = beside(ours, theirs) if datasets == table.datasets else ours
    if any(theirs) and not set(datasets) & set(table.datasets):  # other sounds: at least the order can be compared
        text["Avg in the paper"] = [mark if n else "-" for mark, n in zip(marked(theirs), theirs, strict=True)]
    text["seconds"] = [f"{sum(m.seconds for m in line):.0f}" if line else "-" for line in found]
    everything = [m for line in found for m in line]
    notes = "\n".join(f"- {note}" for note in notes_of(target, datasets, everything, args))
    return f"### {table.title}\n\n{markdown(text)}\n\n{notes}\n", records


def span(numbers: set[int]) -> str:
    """One number, or the smallest and largest of several: what `linear` trains depends on the number of classes."""
    return " - ".join(f"{number:,}" for number in sorted({min(numbers), max(numbers)})) if numbers else "-"


def markdown(columns: dict[str, list[str]]) -> str:
    """A table of {heading: texts}; the first column to the left, the others to the right."""
    widths = [max(len(text) for text in (head, *texts)) for head, texts in columns.items()]
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    lines = [[t.rjust(w) if i else t.ljust(w) for i, (t, w) in enumerate(zip(r, widths, strict=True))] for r in rows]
    lines.insert(1, ["-" * (width - 1) + (":" if i else "-") for i, width in enumerate(widths)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def notes_of(target: str, datasets: tuple[str, ...], found: list[Measured], args: argparse.Namespace) -> list[str]:
    """What a reader must know of the numbers, above all where the runs are not those of the paper."""
    table = TABLES[target]
    seeds = f"seed{'s' * (len(args.seeds) > 1)} {', '.join(map(str, args.seeds))}"
    runs = {m.runs for m in found}
    spread = f", +- the sample standard deviation over {span(runs)} runs (folds and seeds)" if runs - {1} else ""
    theirs = ", in parentheses the paper's" if set(datasets) & set(table.datasets) else ""
    notes = [f"Test accuracy in percent, {seeds}{spread}{theirs}. Best **bold**, second best in _italics_."]
    for dataset in datasets:
        cell = Cell(dataset, "linear", 0, weights_of(dataset, args), 1 if table.few_shot else None)
        epochs, usual = epochs_of(cell, args), DATASETS[dataset].epochs
        text = f"{PRINTED.get(dataset, dataset)}: weights `{cell.weights}`, {epochs} epoch{'s' * (epochs > 1)}"
        if epochs != usual:
            why = "" if args.epochs else ": few clips make few steps"
            text += f" instead of {usual}{why}"
        others = {"dataset": dataset not in table.datasets, "weights": cell.weights != "audioset",
                  "number of epochs": args.epochs not in (None, usual)}  # fmt: skip
        others = ", ".join(name for name, other in others.items() if other)
        notes.append(f"{text}." + (f" Not as in the paper: {others}." if others else ""))
    if "note" in paper_tables()[target]:
        notes.append(paper_tables()[target]["note"])
    heads = f" ({span({m.head for m in found})})" if found else ""
    notes.append(
        f"Trained: parameters besides the final LayerNorm and head{heads}, which every method trains and `linear` "
        "alone. Seconds: training of one seed, all folds and datasets."
    )
    if args.passed:
        notes.append(f"Options of train.py: `{' '.join(args.passed)}`.")
    return notes


def file_of(target: str, args: argparse.Namespace) -> Path:
    """Where a table or figure goes, without suffix: other datasets or weights do not replace those of the paper."""
    table = TARGETS[target]
    words = [target, *(args.datasets if tuple(args.datasets or table.datasets) != table.datasets else [])]
    words += [f"weights_{slug(args.weights)}"] if args.weights else []
    return args.out / ("tables" if target in TABLES else "figures") / "-".join(words)


def write_table(target: str, done: dict[Cell, dict], args: argparse.Namespace) -> None:
    content, records = render(target, done, args)
    path = file_of(target, args)
    write_text(Path(f"{path}.md"), content)
    write_csv(Path(f"{path}.csv"), records)
    say(f"\n{content}\nwritten to {path}.md and .csv")


def write_csv(path: Path, records: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, records[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_text(path, text.getvalue())


# ---------------------------------------------------------------------------------------------------------- the figures


def write_figure(target: str, done: dict[Cell, dict], args: argparse.Namespace) -> None:
    """One of FIGURES from the cells that are finished."""
    table, path = FIGURES[target], file_of(target, args)
    datasets = [dataset for dataset, _ in columns_of(table, args)]
    if target == "fig2":
        for dataset in datasets:
            runs = {}
            for name, method in rows_of(table, args).items():
                cell = Cell(dataset, method, args.seeds[0], weights_of(dataset, args))
                if cell in done:
                    runs[f"{name}, {done[cell]['accuracy']:.1f} %"] = args.out / cell.name
            one = path if len(datasets) == 1 else Path(f"{path}-{dataset}")
            if runs:
                figures.draw_tokens(runs, one, args)
            else:
                say(f"{table.title}: no cell of {dataset} is finished, nothing to draw")
        return None
    panels, records = {}, []
    for dataset in datasets:
        curves = {}
        for name, method in rows_of(table, args).items():
            seeds = [budgets(dataset, method, seed, weights_of(dataset, args)) for seed in args.seeds]
            for same in zip(*seeds, strict=True):  # cells that differ in the seed
                if m := measure(same, done):
                    curves.setdefault(name, []).append((m.trained, m.mean, m.std or 0))
                    records.append({"dataset": dataset, "curve": name, "cell": same[0].name, **asdict(m)})
        if curves:
            panels[PRINTED.get(dataset, dataset)] = curves
    if not panels:
        return say(f"{table.title}: no cell is finished, nothing to draw")
    figures.draw_curves(panels, "Full FT", path)
    return write_csv(Path(f"{path}.csv"), records)


# ---------------------------------------------------------------------------------------------------- the command line


def names(text: str) -> list[str]:
    return list(dict.fromkeys(name for name in text.split(",") if name))


def shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no share like 1/2 or 2/2")
    return int(match[1]), int(match[2])


def parse(argv: list[str]) -> argparse.Namespace:
    own, passed = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = Parser(
        usage="%(prog)s TARGET... [options] [-- options of train.py]\n       %(prog)s plot RUN",
        description="Train what a table or figure of the paper compares, and put it beside the paper's numbers.",
    )
    add = parser.add_argument
    add("targets", nargs="+", metavar="TARGET", help=f"{', '.join(TARGETS)}, or all")
    add("--datasets", type=names, metavar="D,D", help="any of train.py, in place of the paper's")
    add("--methods", type=names, default=[], metavar="M,M", help="only these rows, by the names of --list-methods")
    add("--add", type=names, default=[], metavar="M,M", help="methods that get a row in every table")
    add("--random", type=names, default=[], metavar="M,M", help="Table I also from random weights, for these methods")
    add("--seeds", type=numbers, default=[0], metavar="0,1,2", help="each cell once for each of these")
    add("--epochs", type=positive, help=f"default: the dataset's, in Table II at least {FEW_SHOT_EPOCHS}")
    add("--weights", help="the backbone; default: the dataset's")
    add("--data-dir", action="append", default=[], metavar="[D=]PATH", help="where a dataset is; once for each of them")
    add("--cache-dir", type=Path, default=default_cache_dir(), help="for downloads and features (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", help="of the arithmetic, see train.py")
    add("--jobs", type=positive, default=1, metavar="N", help="train N cells at a time; on a CPU they share the cores")
    add("--shard", type=shard, metavar="I/N", help="only share I of N; for machines whose shared folder has no locks")
    add("--dry-run", action="store_true", help="list the cells, their parameters and their times; train nothing")
    add("--out", type=Path, default=Path("experiments"), help="runs, tables/ and figures/ go here (%(default)s)")
    args = parser.parse_args(own)
    for name in args.targets:
        require(name, [*TARGETS, "all"], "target")
    for name in args.datasets or []:
        require(name, DATASETS, "dataset")
    args.targets = list(TARGETS) if "all" in args.targets else list(dict.fromkeys(args.targets))
    tables = [TARGETS[target] for target in args.targets]
    for name in [*args.methods, *args.add, *args.random]:
        petl.find(name)
    for name in args.methods:
        if not any(name in table.rows.values() for table in tables):
            raise UserError(f"--methods {name}: no row of {', '.join(args.targets)} is that; --add {name} makes one")
    if args.random and "table1" not in args.targets:
        raise UserError("--random belongs to table1: add it to the targets, or leave --random out")
    args.data_dir = data_dirs(args.data_dir, [d for table in tables for d, _ in columns_of(table, args)])
    args.passed = passed
    unknown = [word for word in passed if word.startswith("-") and word.split("=")[0] not in PASSED]
    if unknown:
        raise UserError(f"{unknown[0]} behind --: of train.py's options only {', '.join(PASSED)} fit all cells")
    args.targets = [
        target for target, table in zip(args.targets, tables, strict=True)
        if rows_of(table, args) or (target == "table1" and args.random)
    ]  # fmt: skip
    return args


PASSED = ("--folds", "--batch-size", "--micro-batch", "--seconds", "--pool", "--compile", "--recompute", "--skip-bad")


def require(name: str, known, what: str) -> None:
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise UserError(f"unknown {what} {name!r}: did you mean {nearest!r}? There are {', '.join(known)}")


def data_dirs(words: list[str], datasets: list[str]) -> dict[str, Path]:
    """{dataset: folder} of DATASET=PATH; with one dataset PATH alone is enough."""
    found = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or name not in DATASETS:
            if len(set(datasets)) > 1:
                raise UserError(f"--data-dir {word}: say of which dataset, like {datasets[0]}={word}")
            name, path = datasets[0], word
        found[name] = Path(path)
    return found


def start(argv: list[str]) -> int:
    if argv[:1] == ["cell"]:
        return train_cell(Path(argv[1]), argv[2:])
    if argv[:1] == ["plot"]:
        figures.plot(argv[1:])
        return 0
    args = parse(argv)
    cells = cells_of(args)
    # Wrong options of train.py or a wrong checkpoint: now, not once for each cell. (No process of cells needs a GPU.)
    train.parse([*options(cells[0], args), *(["--device", "cpu"] if args.device == "auto" else [])])
    if args.weights:
        shape_of(args.weights)
    if args.dry_run:
        dry_run(cells, args)
        return 0
    if any(target in FIGURES for target in args.targets):
        figures.pyplot()  # missing? now, not after the training
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends the cells
    try:
        done, failed = train_cells(cells, args)
        for target in args.targets:
            write = write_table if target in TABLES else write_figure
            write(target, done, args)
    except OSError as error:
        raise UserError(f"{error.filename or args.out}: {error.strerror or error}; is --out a folder to write to, and "
                        "is there space?") from None  # fmt: skip
    for cell, why in failed.items():
        print(f"missing: {cell.name}: {why}", file=sys.stderr)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: start(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
