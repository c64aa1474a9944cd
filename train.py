"""Adapt an Audio Spectrogram Transformer to a dataset, test it, write down what came out.

    python train.py                                         # sounds made here, the small backbone in weights/
    python train.py --method houlsby_par --dataset esc50

`main` reads the command line, `run` goes over the folds, `train_fold` is the training loop, `evaluate` the test. The
protocol is that of section III-A: AdamW, cosine annealing without warm-up, cross-entropy; with validation clips the
weights of the best validation epoch are tested, otherwise those of the last epoch, and the test clips are seen once.
"""

import argparse
import copy
import csv
import difflib
import errno
import hashlib
import io
import json
import math
import os
import pickle
import platform
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import petl
from ast_model import AST, POOL, ASTConfig, UserError, make_head
from data import (
    DATASETS,
    HOP,
    RATE,
    Dataset,
    Split,
    build_features,
    default_cache_dir,
    few_shot,
    random_split,
    spec_augment,
    typical_seconds,
    whole_file,
)
from load_weights import load_ast, load_tensors, read_header, save_trained, trained_tensors
from onednn_linear import onednn_helps, use_onednn

BETAS, EPS, WEIGHT_DECAY = (0.9, 0.98), 1e-6, 0.1  # of AdamW
PATIENCE = timedelta(minutes=10)  # of a process that waits for another; a dead one on the same node shows at once
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a run: two runs with the same settings are the same experiment."""

    dataset: str
    weights: str  # as the user named it; what counts is `backbone`
    backbone: str  # SHA-256
    method: dict  # petl.to_dict, fitted to the width of the backbone
    pool: str
    seed: int
    shots: int | None
    clips: str  # SHA-256 of split.csv: which clips train, validate and test
    n_frames: int
    epochs: int
    batch_size: int
    lr: float
    mask: bool
    dtype: str


@dataclass(frozen=True)
class Clips:
    """Features (clips, n_frames, n_mels) and labels (clips,) of a dataset, both on the device or both on the CPU.

    `pooled` (clips, dim) is for a linear probe: see `pool_clips`. It starts as nan.
    """

    features: torch.Tensor
    labels: torch.Tensor
    pooled: torch.Tensor | None = None

    def batch(self, index: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Clips `index`, which lies where the features lie, on `device` in float32.

        From main memory to a GPU they go through pinned memory: such a copy lets the program run on, so that it gathers
        the next batch while the GPU still computes with this one.
        """
        x, y = self.features[index], self.labels[index]
        if device.type == "cuda" and x.device.type == "cpu":
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(device, non_blocking=True).float(), y.to(device, non_blocking=True)


# ------------------------------------------------------------------------------------------------------ the training


def cosine(lr: float, step: int, steps: int) -> float:
    """Cosine annealing from `lr` at step 0 to zero at `steps`."""
    return lr * 0.5 * (1 + math.cos(math.pi * step / steps))


def seed_epoch(seed: int, fold: int, epoch: int) -> None:
    """All random numbers of an epoch follow from these three, so a resumed run draws what an unbroken one would."""
    torch.manual_seed((seed * 1000 + fold) * 100_000 + epoch)


def train_epoch(
    forward: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clips: Clips,
    train: torch.Tensor, learning_rates: list[float], settings: Settings, args: argparse.Namespace,
) -> list[float]:  # fmt: skip
    """One pass over the clips `train`, in random order, one step per learning rate. Returns the loss of every step.

    A batch is shared out between the processes, and each takes its share in equally many micro-batches, as
    DistributedDataParallel wants it. Where there are more processes than clips, some run another's clip for nothing.
    Masks are drawn for the whole batch everywhere, so the number of processes does not change them. (The dropout of
    Convpass does depend on it, and on micro-batches.)
    """
    device, rank, world = args.device, *ranks()
    micro_batch = (args.micro_batch or settings.batch_size) * world
    losses = []
    order = train[torch.randperm(len(train))].to(clips.features.device)
    for index, lr in zip(order.split(settings.batch_size), learning_rates, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        draws = torch.rand(len(index), 4, device=device)
        total = torch.zeros((), device=device)
        for clips_now, draws_now in zip(index.split(micro_batch), draws.split(micro_batch), strict=True):
            idle = rank >= len(clips_now)
            share = slice(0, 1) if idle else slice(rank, None, world)
            x, y = clips.batch(clips_now[share], device)
            if settings.mask:
                x = spec_augment(x, draws_now[share])
            with autocast(device, settings.dtype):
                logits = forward(x)
            loss = F.cross_entropy(logits.float(), y, reduction="sum") / len(index) * (not idle)
            scaler.scale(loss * world).backward()  # DistributedDataParallel averages over processes: this undoes it
            total += loss.detach()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(total)
    return sum_over_ranks(torch.stack(losses)).tolist()  # with features in its memory, the only wait for the device


def train_fold(
    model: AST, clips: Clips, split: Split, fold: int, settings: Settings, state_file: Path, args: argparse.Namespace
) -> dict:
    """Train one fold and test it; `model` ends with the tested weights. Returns its accuracy and how it went.

    `state_file` holds the state after the last finished epoch; with `--resume` training goes on from there.
    Raises UserError when the loss is not finite.
    """
    device, rank, world = args.device, *ranks()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings.lr, BETAS, EPS, WEIGHT_DECAY, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=settings.dtype == "float16")
    network, start = model, time.perf_counter()
    if clips.pooled is not None:
        network, clips = Probe(model), pool_clips(model, clips, split, settings, args)
    seconds = time.perf_counter() - start
    if args.recompute:
        torch.compiler.reset()  # its blocks are new code in every fold, and torch gives up compiling after a few
    forward = torch.compile(network) if args.compile else network
    if world > 1:
        forward = DistributedDataParallel(forward, device_ids=[device.index] if device.type == "cuda" else None)

    history, best = [], {"accuracy": -1.0, "epoch": 0, "tensors": {}}
    if args.resume and state_file.exists():
        state = read_state(state_file)
        load_tensors(model, state["tensors"], state_file)
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        history, best, seconds = state["history"], state["best"], state["seconds"] + seconds
        say(f"fold {fold}: going on after epoch {len(history)}")
    elif state_file.exists():
        say(f"fold {fold}: was interrupted and starts over; --resume would go on where it was")

    train = torch.tensor(split.train)
    steps = math.ceil(len(train) / settings.batch_size)  # in an epoch
    epochs = range(len(history) + 1, settings.epochs + 1)
    hidden = True if rank else None  # None leaves it to tqdm: no bar where the output is no terminal
    bar = tqdm(epochs, f"fold {fold}", settings.epochs, initial=len(history), unit="epoch", disable=hidden)
    for epoch in bar:
        start = time.perf_counter()
        seed_epoch(settings.seed, fold, epoch)
        learning_rates = [cosine(settings.lr, steps * (epoch - 1) + i, steps * settings.epochs) for i in range(steps)]
        model.train()
        losses = train_epoch(forward, optimizer, scaler, clips, train, learning_rates, settings, args)
        for i, (loss, lr) in enumerate(zip(losses, learning_rates, strict=True), start=1):
            if not math.isfinite(loss):
                where = f"fold {fold}, epoch {epoch}, step {i} of {steps}, learning rate {lr:.2g}"
                raise UserError(f"the loss is {loss} in {where}: choose a smaller --lr, or --dtype float32")
        rate = len(train) / (time.perf_counter() - start)

        accuracy = evaluate(network, clips, split.val, settings, args) if split.val else None
        if accuracy is None or accuracy > best["accuracy"]:
            best = {"accuracy": accuracy, "epoch": epoch, "tensors": trained_tensors(model)}
        history.append({
            "fold": fold, "epoch": epoch, "step": steps * epoch, "loss": round(statistics.mean(losses), 6),
            "accuracy": "" if accuracy is None else round(accuracy, 4), "lr": f"{lr:.4g}", "clips/s": round(rate, 1),
        })  # fmt: skip
        seconds += time.perf_counter() - start
        bar.set_postfix(loss=history[-1]["loss"], accuracy=history[-1]["accuracy"])
        if rank == 0:
            write_metrics(state_file.parent / "metrics.csv", fold, history)
            with whole_file(state_file) as temporary:
                torch.save({
                    "tensors": trained_tensors(model), "optimizer": optimizer.state_dict(), "best": best,
                    "scaler": scaler.state_dict(), "history": history, "seconds": seconds,
                }, temporary)  # fmt: skip

    load_tensors(model, best["tensors"], state_file)
    return {
        "fold": fold, "accuracy": evaluate(network, clips, split.test, settings, args),
        "validation_accuracy": best["accuracy"], "epoch": best["epoch"], "seconds": round(seconds, 1),
        "peak_memory_mb": peak_memory_mb(),
    }  # fmt: skip


def read_state(file: Path) -> dict:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError):
        raise UserError(f"{file} is damaged: delete it, and the fold starts over") from None


@torch.inference_mode()
def evaluate(model: nn.Module, clips: Clips, indices: list[int], settings: Settings, args: argparse.Namespace) -> float:
    """Accuracy in percent on the given clips; every rank takes its share, in batches as large as its memory allows."""
    device, rank, world = args.device, *ranks()
    model.eval()
    correct = torch.zeros((), device=device)
    index = torch.tensor(indices, device=clips.features.device)[rank::world]
    batch, start = evaluation_batch(settings, args), 0
    while start < len(index):
        try:
            x, y = clips.batch(index[start : start + batch], device)
            with autocast(device, settings.dtype):
                correct += (model(x).argmax(1) == y).sum()
            start += batch
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
    return 100 * sum_over_ranks(correct).item() / len(indices)


def evaluation_batch(settings: Settings, args: argparse.Namespace) -> int:
    """Clips at once without gradients. Training keeps a dozen tensors of every block, evaluation those of one block: on
    a GPU four times a process's share takes less memory still. A CPU gains nothing: its caches like small batches."""
    share = args.micro_batch or math.ceil(settings.batch_size / ranks()[1])
    return share * (4 if args.device.type == "cuda" else 1)


def autocast(device: torch.device, dtype: str):
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, DTYPES[dtype])


# --------------------------------------------------------------------------------- what makes it fast, or saves memory


def prepare(model: AST, args: argparse.Namespace) -> AST:
    """The adapted model on its device, ready for training. Changes `model` and returns it."""
    model = model.to(args.device)
    if args.dtype != "float32":  # autocast would convert frozen weights anew in every step, and gives the same numbers
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
                for parameter in module.parameters():
                    if not parameter.requires_grad:
                        parameter.data = parameter.to(DTYPES[args.dtype])
    elif args.device.type == "cpu" and not args.compile and onednn_helps():
        use_onednn(model)
    if args.recompute:
        for block in model.blocks:  # keep only the input of each block, and run it again for its gradients
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


class Probe(nn.Module):
    """Final LayerNorm and head of a model, the parameters themselves, on what `pool_clips` has kept of each clip.

    The scale and shift of the LayerNorm are the same for all tokens, so they may as well come after the pooling.
    """

    def __init__(self, model: AST):
        super().__init__()
        self.norm, self.head = model.norm, model.head

    def forward(self, pooled):  # (batch, dim)
        return self.head(pooled * self.norm.weight + self.norm.bias)  # (batch, n_classes)


@torch.inference_mode()
def pool_clips(model: AST, clips: Clips, split: Split, settings: Settings, args: argparse.Namespace) -> Clips:
    """What a linear probe trains on, in place of the features: normalised, pooled tokens, (clips, dim).

    The backbone is the same in all folds and seeds, so only what is not there yet goes through it; each process takes
    its share. A batch is a block of neighbouring clips, whatever the split: rounding may depend on the company, and a
    resumed run must get the bits of an unbroken one.
    """
    device, rank, world = args.device, *ranks()
    model.eval()
    needed = torch.tensor(split.train + split.val + split.test)
    needed = needed[clips.pooled[needed.to(device), 0].isnan().cpu()]
    blocks = torch.arange(len(clips.labels)).split(evaluation_batch(settings, args))
    blocks = [blocks[i] for i in (needed // len(blocks[0])).unique().tolist()]
    new = torch.zeros_like(clips.pooled)
    for index in blocks[rank::world]:
        x, _ = clips.batch(index.to(clips.features.device), device)
        with autocast(device, settings.dtype):
            tokens = F.layer_norm(model.encode(x), (model.config.dim,), eps=model.norm.eps)
            new[index.to(device)] = POOL[model.config.pool](tokens).float()
    if blocks:
        rows = torch.cat(blocks).to(device)
        clips.pooled[rows] = sum_over_ranks(new[rows])
    return Clips(clips.pooled, clips.labels.to(device))


# ------------------------------------------------------------------------------------------------ several processes


def ranks() -> tuple[int, int]:
    """Rank of this process and number of processes: (0, 1) unless started by torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    if ranks()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def lost_process(*_) -> None:
    """Raises the UserError of a process that cannot go on without the others. Also what torchrun's SIGTERM calls: it
    ends all processes when one has died, and may do so before the next exchange of numbers fails."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # saying it once is enough
    raise UserError(
        f"process {os.environ.get('RANK')} stops: another process of this run has ended or does not answer; where no "
        "line above says why, it was killed; the same command with --resume goes on after the last finished epoch"
    )


def say(*words) -> None:
    if ranks()[0] == 0:
        print(*words, flush=True)


# ---------------------------------------------------------------------------------------------------------- the run


def run(args: argparse.Namespace) -> dict:
    """Train and test every fold of every seed that is not finished yet. Returns what it writes to result.json."""
    started = time.perf_counter()
    recipe = DATASETS[args.dataset]
    petl.override(petl.find(args.method), args.rr, args.alpha, args.prompts)  # errors now, not after a download
    weights = args.weights or recipe.weights
    dataset = recipe.load(args.data_dir, args.cache_dir)
    splits = {seed: dataset.folds or {1: random_split(dataset, seed)} for seed in args.seed}
    known = splits[args.seed[0]]
    unknown = set(args.folds or []) - known.keys()
    if unknown:
        raise UserError(f"--folds {min(unknown)}: {args.dataset} has the folds {', '.join(map(str, known))}")
    n_frames = frames_for(args, dataset)
    backbone = load_ast(weights, n_frames, len(dataset.classes), args.pool)
    method = method_for(args, backbone.config.dim)
    features, bad = build_features(dataset, n_frames, args.cache_dir, args.skip_bad)
    clips = to_clips(features, dataset, args.device)
    mask = recipe.mask and not args.no_mask
    if not method.parts and not mask:  # a linear probe of clips that are the same in every epoch
        clips = replace(clips, pooled=torch.full((len(features), backbone.config.dim), math.nan, device=args.device))
    names = dataset.names()

    results = {}
    for seed in args.seed:
        folds = {fold: usable(dataset, split, bad, args.shots, seed) for fold, split in splits[seed].items()}
        table = split_table(dataset, names, folds, bad)
        settings = Settings(
            dataset=args.dataset, weights=weights, backbone=backbone.backbone.sha256,
            method=petl.to_dict(method), pool=args.pool, seed=seed, shots=args.shots,
            clips=hashlib.sha256(os.fsencode(table)).hexdigest(), n_frames=n_frames,
            epochs=args.epochs or recipe.epochs, batch_size=args.batch_size or recipe.batch_size, lr=method.lr,
            mask=mask, dtype=args.dtype,
        )  # fmt: skip
        folder = args.out / args.dataset / method.name / f"seed{seed}"
        check_same_run(folder, settings)
        if ranks()[0] == 0:
            skipped = {names[i]: reason for i, reason in bad.items()}
            write_json(folder / "config.json", {
                **asdict(settings), "command": sys.argv, "skipped_clips": skipped,
                "data_dir": args.data_dir and str(args.data_dir.resolve()),
                "cache_dir": str(args.cache_dir.resolve()),
            })  # fmt: skip
            write_text(folder / "split.csv", table)
        say(f"{method.name} on {args.dataset}: {describe(settings)}, {args.device}")
        if not method.parts:
            say(
                "linear probe, masked: every epoch masks the clips anew, so each goes through the backbone in every "
                "epoch; with --no-mask it does so once"
                if mask
                else "linear probe: each clip goes through the backbone once, the epochs train on its pooled tokens"
            )
        results[seed] = run_seed(backbone, method, clips, dataset.classes, folds, settings, folder, args)
        if ranks()[0] == 0:
            print_summary(results[seed], folder, settings, started)
    return next(iter(results.values())) if len(results) == 1 else summarise_seeds(folder.parent, results)


def frames_for(args: argparse.Namespace, dataset: Dataset) -> int:
    """How many frames the model reads: those of --seconds or of the dataset, else as many as most clips have."""
    n_frames = DATASETS[args.dataset].n_frames
    if args.seconds or n_frames is None:
        n_frames = max(ASTConfig.patch, round((args.seconds or typical_seconds(dataset)) * RATE / HOP))
    return n_frames


def method_for(args: argparse.Namespace, dim: int) -> petl.Method:
    """The method that `args` ask for, for a backbone of `dim` dimensions."""
    method = petl.fit(petl.find(args.method), dim)
    method = replace(method, lr=args.lr or DATASETS[args.dataset].lr.get(method.name, method.lr))
    return petl.override(method, args.rr, args.alpha, args.prompts)


def run_seed(
    backbone: AST, method: petl.Method, clips: Clips, classes: list[str], folds: dict[int, Split], settings: Settings,
    folder: Path, args: argparse.Namespace,
) -> dict:  # fmt: skip
    """Train and test the folds of one seed. Returns what it writes to result.json."""
    for fold in args.folds or folds:
        fold_file = folder / f"fold{fold}.safetensors"
        if not fold_file.exists():
            seed_epoch(settings.seed, fold, epoch=0)  # of the new head and the method's parts
            model = copy.deepcopy(backbone)
            model.head = make_head(model.config)
            model = prepare(petl.apply(model, method), args)
            state_file = folder / f"fold{fold}.resume.pt"
            result = train_fold(model, clips, folds[fold], fold, settings, state_file, args)
            if ranks()[0] == 0:
                header = {"result": result, "classes": classes, "settings": asdict(settings),
                          "parameters": petl.count(model), "versions": versions()}  # fmt: skip
                save_trained(model, fold_file, header)
                state_file.unlink(missing_ok=True)
            del model
        if ranks()[0] == 0:
            result = read_header(fold_file)["result"]
            best = result["validation_accuracy"]
            chosen = "last epoch" if best is None else f"best of validation {best:.2f} % in epoch {result['epoch']}"
            say(f"fold {fold}: test accuracy {result['accuracy']:.2f} % ({chosen}), {result['seconds']:.0f} s")
    if dist.is_initialized():
        dist.barrier()
    return summarise(folder, folds) if ranks()[0] == 0 else {}


def to_clips(features: np.ndarray, dataset: Dataset, device: torch.device) -> Clips:
    """On a GPU the features lie in its memory if they take at most half of what is free; else they stay on disk."""
    features = torch.from_numpy(features)
    if device.type == "cuda" and 2 * features.nbytes < torch.cuda.mem_get_info(device)[0]:
        features = features.to(device)
    return Clips(features, torch.tensor(dataset.labels, device=features.device))


def usable(dataset: Dataset, split: Split, bad: dict[int, str], shots: int | None, seed: int) -> Split:
    """The split without bad clips, its training part cut down to `shots` per class."""
    train, val, test = ([i for i in part if i not in bad] for part in (split.train, split.val, split.test))
    if shots:
        train = few_shot(dataset, train, shots, seed)
    if not train or not test:
        raise UserError(f"{dataset.root}: no clips left to {'test' if train else 'train'} on")
    return Split(train, val, test)


def split_table(dataset: Dataset, names: list[str], folds: dict[int, Split], bad: dict[int, str]) -> str:
    """split.csv: what each clip is used for in each fold. Training clips that --shots has not drawn are left out."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["fold", "split", "label", "path"])
    for fold, split in folds.items():
        parts = {**asdict(split), "skipped": sorted(bad)}
        for part, clips in parts.items():
            writer.writerows([fold, part, dataset.classes[dataset.labels[i]], names[i]] for i in clips)
    return text.getvalue()


def check_same_run(folder: Path, settings: Settings) -> None:
    """UserError if `folder` holds another experiment: its finished folds must not be mixed with these."""
    file = folder / "config.json"
    if not file.exists():
        return
    try:
        old = dict(json.loads(file.read_text()))
    except (ValueError, TypeError):
        raise UserError(f"{file} is damaged: delete the folder, or give another --out") from None
    new = asdict(settings)
    del new["weights"]  # a name; `backbone` is what counts
    compare_settings(folder, old, new)


def compare_settings(folder: Path, old: dict, new: dict) -> None:
    """UserError that names the first of the `new` settings that differs from the `old` ones, those of the run there."""
    in_words = {
        "clips": "other clips or splits", "method": "other settings of the method",
        "backbone": f"the backbone {old.get('weights')} as it was then",
    }  # fmt: skip
    for name, value in json.loads(json.dumps(new)).items():  # JSON has no tuples
        if old.get(name) != value:
            what = in_words.get(name, f"{name} {old.get(name)}, not {value}")
            raise UserError(f"{folder} holds a run with {what}: give another --out, or delete it")


def summarise(folder: Path, folds: Iterable[int]) -> dict:
    """Collect the finished folds of a run into result.json. Accuracies in percent, sample standard deviation."""
    with FileLock(folder / ".result.lock"):  # folds may end at the same time on several machines
        files = [folder / f"fold{fold}.safetensors" for fold in folds]
        headers = [read_header(file) for file in files if file.exists()]
        results = [header["result"] for header in headers]
        accuracies = [result["accuracy"] for result in results]
        summary = {
            "accuracy": round(statistics.mean(accuracies), 4),
            "std": round(statistics.stdev(accuracies), 4) if len(results) > 1 else None,
            "folds": results,
            "parameters": headers[0]["parameters"],
            "seconds": round(sum(result["seconds"] for result in results), 1),
            "peak_memory_mb": max(result["peak_memory_mb"] or 0 for result in results) or None,
            "versions": headers[0]["versions"],
        }
        write_json(folder / "result.json", summary)
    return summary


def summarise_seeds(folder: Path, results: dict[int, dict]) -> dict:
    """Mean and sample standard deviation over all folds of all seeds, into the result.json above their folders."""
    if ranks()[0] != 0:
        return {}
    folds = [{"seed": seed, **fold} for seed, result in results.items() for fold in result["folds"]]
    accuracies = [fold["accuracy"] for fold in folds]
    result = {
        "accuracy": round(statistics.mean(accuracies), 4),
        "std": round(statistics.stdev(accuracies), 4),
        "seeds": {seed: result["accuracy"] for seed, result in results.items()},
        "folds": folds,
    }
    write_json(folder / "result.json", result)
    say(f"accuracy {result['accuracy']:.2f} +- {result['std']:.2f} % over {len(results)} seeds, {len(folds)} runs in "
        f"all; written to {folder}")  # fmt: skip
    return result


def print_summary(result: dict, folder: Path, settings: Settings, started: float) -> None:
    """What a person wants to know at the end of a run that began at `started` on the performance counter."""
    name, count, folds = settings.method["name"], result["parameters"], len(result["folds"])
    trained = count["petl"] + count["head"]
    spread = "" if result["std"] is None else f" +- {result['std']:.2f}"
    over = f" over {folds} folds" if folds > 1 else ""
    file = folder / f"fold{result['folds'][0]['fold']}.safetensors"
    baseline = "houlsby_par" if name == "linear" else "linear"  # the comparison that says what a method adds
    say(
        f"\n  test accuracy   {result['accuracy']:.2f}{spread} %{over}"
        f"\n  trained         {trained:,} of {count['total']:,} parameters ({100 * trained / count['total']:.2f} %): "
        f"{count['petl']:,} of {name}, {count['head']:,} of final LayerNorm and head"
        f"\n  file            {file}, {file.stat().st_size / 1000:,.0f} kB: all that has to be kept beside the backbone"
        f"\n  time            {result['seconds']:.0f} s of training, {time.perf_counter() - started:.0f} s in all"
        f"\n  to use it       python predict.py {folder} SOUND.wav"
        f"\n  to compare      the same command with --method {baseline}\n"
    )


def describe(settings: Settings) -> str:
    shots = f"{settings.shots} clips per class, " if settings.shots else ""
    masked = "masked" if settings.mask else "unmasked"
    return (f"{shots}{settings.n_frames * HOP / RATE:g} s a clip, {settings.epochs} epochs, batch "
            f"{settings.batch_size}, learning rate {settings.lr:g}, {masked}, weights {settings.weights}, seed "
            f"{settings.seed}, {settings.dtype}")  # fmt: skip


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, content: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(os.fsencode(content))  # UTF-8, and whatever else names of files hold


def write_metrics(path: Path, fold: int, history: list[dict]) -> None:
    """Put the epochs of one fold into metrics.csv, beside those of the others: folds may run in parallel."""
    with FileLock(path.with_name(".metrics.lock")):
        rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
        rows = [row for row in rows if int(row["fold"]) != fold] + history
        rows.sort(key=lambda row: (int(row["fold"]), int(row["epoch"])))
        with whole_file(path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, history[0])
            writer.writeheader()
            writer.writerows(rows)


def peak_memory_mb() -> int | None:
    """Peak memory of this process: on the GPU where one is used, else in main memory. None on Windows."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() >> 20
    if platform.system() == "Windows":
        return None
    import resource  # not there on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if platform.system() == "Darwin" else 10)  # bytes there, KiB on Linux


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


# ------------------------------------------------------------------------------------------------ the command line


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print its whole usage
        raise UserError(f"{message} (--help shows all options)")


def numbers(text: str) -> list[int]:
    if not all(word.isdecimal() for word in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers like 0,1,2")
    return list(dict.fromkeys(int(word) for word in text.split(",")))  # each of them once


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Adapt an Audio Spectrogram Transformer to a dataset and test it.")
    add = parser.add_argument
    add("--dataset", default="demo", help=", ".join(DATASETS))
    add("--method", default="houlsby_par", help="a name that --list-methods prints")
    add("--data-dir", type=Path, help="the dataset or its archive, else it is downloaded; or your own sounds")
    add("--weights", help="audioset, demo, hf:owner/name, a file or folder, random:base|small|tiny|demo; default: the "
        "dataset's")  # fmt: skip
    add("--pool", default="mean", choices=POOL, help="how tokens become one vector; the paper takes the mean")
    add("--folds", type=numbers, metavar="1,2", help="only these folds")
    add("--seed", type=numbers, default=[0], metavar="0,1,2", help="one run for each of these seeds")
    add("--seconds", type=float, help="cut or pad clips to this; default: the dataset's, or that of most of your clips")
    add("--shots", type=positive, metavar="K", help="train on K clips per class only")
    add("--epochs", type=positive, help="default: the dataset's")
    add("--batch-size", type=positive, help="over all processes; default: the dataset's")
    add("--micro-batch", type=positive, help="clips at once on a device; the result stays that of --batch-size")
    add("--lr", type=float, help="first learning rate; default: the method's")
    add("--rr", type=positive, help="reduction rate: the bottleneck is dim / RR wide")
    add("--alpha", type=float, help="LoRA scales its update by alpha / RR")
    add("--prompts", type=positive, help="number of prompts or prefixes")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="of the arithmetic; trained tensors stay float32")
    add("--compile", action="store_true", help="torch.compile the model for training")
    add("--recompute", action="store_true", help="keep less for the backward pass and compute it again: saves memory")
    add("--no-mask", action="store_true", help="leave SpecAugment out where the dataset's protocol has it")
    add("--skip-bad", action="store_true", help="go on without sound files that cannot be read")
    add("--resume", action="store_true", help="continue an interrupted fold after its last finished epoch")
    add("--out", type=Path, default=Path("runs"), help="results go to OUT/DATASET/METHOD/seedS")
    add("--cache-dir", type=Path, default=default_cache_dir(), help="for downloads and features (%(default)s)")
    add("--list-methods", action="store_true", help="print all methods with their parameter counts")
    args = parser.parse_args(argv)
    if args.dataset not in DATASETS:
        nearest = difflib.get_close_matches(args.dataset, DATASETS, n=1, cutoff=0)[0]
        raise UserError(f"unknown dataset {args.dataset!r}: did you mean {nearest!r}? There are {', '.join(DATASETS)}")
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise UserError(f"--lr is {args.lr}; it must be positive")
    if args.seconds is not None and not 0.16 <= args.seconds <= 60:
        raise UserError(f"--seconds is {args.seconds}; a clip must last 0.16 s (one patch) to 60 s")
    if max(args.seed) >= 2**31:
        raise UserError(f"--seed {max(args.seed)} is too large; choose numbers below {2**31}")
    args.device = choose_device(args.device)
    args.dtype = choose_dtype(args.dtype, args.device)
    return args


def choose_device(name: str) -> torch.device:
    """The device of this process; under torchrun each has its own GPU. UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if not re.fullmatch(r"cpu|mps|cuda:\d+", name):
        raise UserError(f"--device {name}: choose auto, cpu, cuda, cuda:1, ... or mps")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: there is none that this PyTorch ({torch.__version__}) can use") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def choose_dtype(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def list_methods() -> None:
    """The table of methods with the parameters that each trains in the base AST, head and final LayerNorm apart."""

    def counted(name, n_frames, n_classes):
        with torch.device("meta"):  # shapes without numbers
            return petl.count(petl.apply(AST(ASTConfig(n_frames=n_frames, n_classes=n_classes)), name))

    print(f"{'method':<30}{'trained':>12}{'paper':>8}   {'lr':<8}{'row of the paper'}")
    for name, method in petl.METHODS.items():
        count = counted(name, 500, 50)
        print(f"{name:<30}{count['petl'] or count['head']:>12,}{method.paper:>8}   {method.lr:<8g}{method.where}")
    heads = " / ".join(f"{counted('linear', 500, n)['head']:,}" for n in (50, 10, 35, 31))
    print(
        f"\nBase AST at 500 frames, without the final LayerNorm and head, which every method trains as well: {heads} "
        "for 50 / 10 / 35 / 31 classes.\nThese are what `linear` trains. full_ft at 100 frames: "
        f"{counted('full_ft', 100, 35)['petl']:,}."
    )


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command. What the user can mend becomes one line and the exit code 2, here and in the other commands."""
    try:
        return command() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def start(argv: list[str] | None) -> int | None:
    args = parse(argv)
    if args.list_methods:
        return list_methods()
    try:
        if "RANK" in os.environ:  # set by torchrun
            signal.signal(signal.SIGTERM, lost_process)
            dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo", timeout=PATIENCE)
        run(args)
        if dist.is_initialized():  # only now: after an error it might wait for processes that are lost
            dist.destroy_process_group()
    except torch.OutOfMemoryError:
        tried = args.micro_batch or args.batch_size or DATASETS[args.dataset].batch_size
        raise UserError(f"out of memory on {args.device}: choose a --micro-batch smaller than {tried}") from None
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            lost_process()
        raise
    except OSError as error:
        where = error.filename or args.out
        if error.errno == errno.ENOSPC:
            raise UserError(f"the disk is full ({where}): free some space, then add --resume to go on") from None
        raise UserError(f"{where}: {error.strerror or error}; is --out or --cache-dir a folder to write to?") from None
    except KeyboardInterrupt:
        print("interrupted: the same command with --resume goes on after the last finished epoch", file=sys.stderr)
        return 130


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: start(argv))


if __name__ == "__main__":
    sys.exit(main())
