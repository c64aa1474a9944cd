"""Adapt an Audio Spectrogram Transformer to a dataset, test it, and write down what came out.

    python train.py                                        # makes sounds, adapts the small backbone
    python train.py --method houlsby_par --dataset esc50

Read from top to bottom: `train_epoch` is the training loop, `train_fold` chooses the best epoch and
tests it, `run` goes over seeds and folds, and `parse` reads the command line. Two methods do not
need the loop: `probe` and `logmel` are fitted by `petl_more.fit`.

AdamW, the weight decay and the cosine annealing of the learning rate are those of section III-A. As
in the authors' code, the loss is cross-entropy and there is no warm-up. The test clips are
classified once, with the weights of the epoch that was best on the validation clips. A dataset
without validation clips uses the last epoch.

Two objects of `support/` make a run fast and robust. A `Recorder` writes files, prints progress,
and with --resume continues an interrupted fold. A `Machine` knows the device and the processes of
torchrun. This is what it does in one process, without options, on a CPU:

    machine.prepare(model, dtype)       the model, on the device
    machine.parallel(network)           the network
    machine.autocast(dtype)             a context in which nothing changes
    machine.shares(n)                   yields one slice, all n clips of a batch, and the factor 1
    machine.mean(tensor)                the tensor
    machine.average_(tensors)           nothing
    machine.in_batches(f, index, n)     f of n indices at a time, one below the other, in float32;
                                        no rows if there are no indices
    machine.is_first                    True
"""

import argparse
import copy
import inspect
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from support import command  # isort: skip, before torch, because of Ctrl-C

import torch
import torch.nn.functional as F
from torch import nn

import petl
from ast_model import AST, POOL, ASTConfig, UserError, make_head
from data import (
    DATASETS,
    Clips,
    Split,
    folds_of,
    frames_for,
    load_clips,
    load_dataset,
    spec_augment,
)
from load_weights import (
    find_checkpoint,
    live_tensors,
    load_ast,
    load_tensors,
    save_trained,
    to_dict,
    trained_tensors,
)
from petl_more import PENALTIES, Patchout, fit
from support.copies import silent_clips
from support.files import default_cache_dir
from support.recorder import Recorder, protected
from support.speed import Machine
from support.variants import check_method, method_for
from support.vectors import skip_frozen

BETAS = (0.9, 0.98)  # of AdamW, as in the authors' code
EPS = 1e-6  # of AdamW, as in the authors' code
WEIGHT_DECAY = 0.1  # section III-A
NO_BACKBONE = "random:demo"  # weights for a method that removes the backbone, quickly made


@dataclass(frozen=True)
class Settings:
    """The options that decide the result of a run.

    Some things that change it a little are not here. --device and --compile give other random
    numbers or other rounding. --micro-batch and the number of processes change dropout, BatchNorm
    and --keep.

    The Recorder compares all fields with those of an earlier run in the same folder. If one
    differs, that is an error. If none does, a finished fold is not trained again. So if you change
    how training works, give another --out. For an option of your own add a field here, and set it
    in `run`.
    """

    dataset: str
    weights: str  # the backbone as the user named it
    backbone: str  # the SHA-256 of its weights
    method: dict  # as load_weights.to_dict returns it
    pool: str
    seed: int
    shots: int | None  # training clips per class; None: all
    clips: str  # the SHA-256 of split.csv, which says what every clip is used for
    n_frames: int
    epochs: int  # of a fitted method the number of penalties
    batch_size: int
    lr: float  # of the method
    head_lr: float
    mask_frames: int  # the widest time mask of SpecAugment; 0: no masks in time or frequency
    dtype: str
    keep: float | None = None  # the share of the patches in training; None: all
    balance: bool = False  # the loss weighs all classes alike; it does not choose the epoch
    choose_by: str = "accuracy"  # what chooses the best epoch; `run` sets "balanced" for own sounds


# ------------------------------------------------------------------------------------ the training


class Learner:
    """A network with what trains it: an optimizer, and a scaler for the gradients of float16.

    `network` is the adapted AST, or only its last layers (see `run`).
    `train_network` is what a training step calls: the network itself, unless it is wrapped to read
    some of the patches only (--keep), to be compiled (--compile) or to work in several processes
    (torchrun). Its parameters are those of `network`.
    """

    def __init__(self, network: nn.Module, settings: Settings, machine: Machine):
        self.network = network
        self.settings = settings
        self.machine = machine
        train_network = Patchout(network, settings.keep) if settings.keep else network
        self.train_network = machine.parallel(train_network)  # compiled, distributed
        fused = machine.device.type == "cuda"
        groups = parameter_groups(network, settings)
        self.optimizer = torch.optim.AdamW(
            groups, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=fused
        )
        # The optimizer's own rates change in every step, and in `load_state`.
        self.first_rates = [group["lr"] for group in self.optimizer.param_groups]
        # Small gradients vanish in float16, so they are scaled. With other types scaler.scale
        # returns the loss as it is, and scaler.step(optimizer) only calls optimizer.step().
        is_float16 = settings.dtype == "float16"
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=is_float16)

    def state(self) -> dict:
        """What the next epochs need. The optimizer's state is no copy: the next step changes it."""
        return {
            "tensors": trained_tensors(self.network),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: dict) -> None:
        load_tensors(self.network, state["tensors"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def parameter_groups(network: nn.Module, settings: Settings) -> list[dict]:
    """The trained parameters as two groups for AdamW, each with its first learning rate.

    The second group is the head. Every group is annealed from its own first rate.
    """
    method = []  # with the final LayerNorm
    head = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            group = head if name.startswith("head.") else method
            group.append(parameter)
    return [{"params": method, "lr": settings.lr}, {"params": head, "lr": settings.head_lr}]


def cosine(first_rate: float, step: int, steps: int) -> float:
    """Cosine annealing, from `first_rate` at step 0 to zero at `steps`."""
    return first_rate * 0.5 * (1 + math.cos(math.pi * step / steps))


def seed_epoch(seed: int, fold: int, epoch: int) -> None:
    """Seed PyTorch's random numbers, so that a resumed run draws the same ones.

    Epochs count from 1. Epoch 0 is the making of the new head and of the method's modules.
    """
    torch.manual_seed((seed * 1000 + fold) * 100_000 + epoch)


def train_epoch(
    learner: Learner,
    clips: Clips,
    indices: list[int],
    epoch: int,
    class_weights: torch.Tensor | None = None,
    watch=iter,
) -> torch.Tensor:
    """Train once on every clip of `indices`, in random order. Epochs count from 1.

    `watch` yields the batches that it is given, and may show how far it is, as tqdm does.

    Returns the loss of each step, (steps,), on the device. Asking a GPU for a number would stop the
    loop until the GPU has computed it, so nothing here does.
    """
    settings = learner.settings
    machine = learner.machine
    optimizer = learner.optimizer
    scaler = learner.scaler
    learner.network.train()

    shuffled = torch.tensor(indices)[torch.randperm(len(indices))]
    batches = shuffled.to(clips.features.device).split(settings.batch_size)  # of indices
    steps_of_fold = settings.epochs * len(batches)
    losses = torch.zeros(len(batches), device=machine.device)
    for step, batch in enumerate(watch(batches)):
        # Every group of parameters gets the learning rate of this step.
        step_of_fold = (epoch - 1) * len(batches) + step
        for group, first_rate in zip(optimizer.param_groups, learner.first_rates, strict=True):
            group["lr"] = cosine(first_rate, step_of_fold, steps_of_fold)

        # `pieces` also masks the clips. Usually the batch is one piece, with the factor 1.
        for x, y, factor in pieces(batch, clips, settings, machine):
            with machine.autocast(settings.dtype):
                logits = learner.train_network(x)  # (clips of the piece, classes)
            loss = F.cross_entropy(logits.float(), y, weight=class_weights, reduction="sum")
            # Divide by the clips of the batch, not by those of the piece or by their weights.
            loss = loss / len(batch) * factor
            scaler.scale(loss).backward()  # adds to the gradients
            losses[step] += loss.detach()

        # Now the gradients are those of the batch. To clip them, first scaler.unscale_(optimizer).
        scaler.step(optimizer)  # optimizer.step(), unless gradients of float16 overflowed
        scaler.update()
        optimizer.zero_grad()

    # Each process of torchrun has seen other clips. So buffers become the means over all processes:
    # the running statistics of BatchNorm. So do the losses.
    machine.average_(t for t in live_tensors(learner.network).values() if not t.requires_grad)
    return machine.mean(losses)


def pieces(batch: torch.Tensor, clips: Clips, settings: Settings, machine: Machine):
    """Yield the clips of a batch as (x, y, factor): inputs, labels, and a factor for the loss.

    batch: indices of clips. x: (clips, n_frames, n_mels), masked by SpecAugment if there are masks;
    or (clips, numbers), the vectors that last layers read. y: (clips,).

    There is one piece, with the factor 1, without --micro-batch and torchrun. --micro-batch cuts
    the batch into several pieces, so that less memory is needed at once. With torchrun every
    process gets its own pieces. PyTorch then takes the mean of the gradients over the processes,
    but their sum is wanted, so the factor is the number of processes. All processes must do the
    same number of pieces. One that has no clip left gets a clip of another with the factor 0.
    """
    # Drawn for the whole batch, so that a clip gets the same mask in any piece. Drawn even without
    # masks, so that --no-mask leaves the other random numbers as they are.
    draws = torch.rand(len(batch), 4, device=machine.device)
    for piece, factor in machine.shares(len(batch)):  # a slice
        x, y = clips.batch(batch[piece], machine.device)
        if settings.mask_frames:
            x = spec_augment(x, draws[piece], settings.mask_frames)
        yield x, y, factor


def weights_of_classes(labels: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Weights (classes,) for the loss, inverse to the counts of the classes among `indices`.

    The mean of the weights over these clips is 1. A class that does not occur gets some number.
    """
    counts = labels[indices].bincount(minlength=int(labels.max()) + 1)
    return len(indices) / (counts.count_nonzero() * counts.clamp(min=1))


def train_fold(
    learner: Learner, clips: Clips, split: Split, fold: int, progress
) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Train on split.train, choose the best epoch on split.val, and test on split.test.

    A fitted method has a path of penalties in place of epochs, from strong to weak. Each fit starts
    from what the one before it has found.

    `progress` is told what happens, and its `start` may return the state of an interrupted fold,
    see `Progress`. Returns the best epoch, a dict, and logits (clips, classes) and labels (clips,)
    of the test clips. The network keeps the weights of the best epoch.
    """
    settings = learner.settings
    class_weights = None
    if settings.balance:
        class_weights = weights_of_classes(clips.labels, torch.tensor(split.train))
        class_weights = class_weights.to(learner.machine.device)
    best = None
    first_epoch = 1
    interrupted = progress.start(learner, split)
    if interrupted:
        learner.load_state(interrupted)
        best = interrupted["best"]
        first_epoch = interrupted["epoch"] + 1

    for epoch in range(first_epoch, settings.epochs + 1):
        seed_epoch(settings.seed, fold, epoch)
        if petl.has_mark(learner.network.method, "is_fitted"):
            index = torch.tensor(split.train, device=clips.labels.device)
            vectors = clips.features[index]
            labels = clips.labels[index]
            penalty = PENALTIES[epoch - 1]
            losses = [fit(learner.network.head, vectors, labels, penalty, class_weights)]
        else:
            losses = train_epoch(learner, clips, split.train, epoch, class_weights, progress.watch)
            losses = losses.tolist()
        check_losses(losses, settings, f"fold {fold}, epoch {epoch}")
        progress.trained(epoch, losses)

        logits, labels = evaluate(learner, clips, split.val)
        accuracy = score_of(logits, labels, "accuracy")
        score = score_of(logits, labels, settings.choose_by)
        state = learner.state()
        if is_better(score, best):
            best = {
                "epoch": epoch,
                "score": score,
                "accuracy": accuracy,
                "tensors": state["tensors"],
                "validation": (logits, labels),  # the header of the fold file is made of it
            }
        progress.validated(epoch, accuracy, {**state, "best": best, "epoch": epoch})

    load_tensors(learner.network, best["tensors"])
    return best, *evaluate(learner, clips, split.test)


class Progress:
    """What `train_fold` tells of its progress. This one prints it, for scripts of your own.

    `run` takes the one of support/recorder.py. It also writes files, and with --resume it returns
    the state of an interrupted fold.
    """

    say = print  # another function may take its place

    def start(self, learner: Learner, split: Split) -> dict | None:
        """Called before the first epoch. Returns the last state of an interrupted fold, or None."""

    def watch(self, batches):
        """Yields the batches of an epoch, one for each step."""
        return iter(batches)

    def trained(self, epoch: int, losses: list[float]) -> None:
        """Called when the training clips of an epoch are through, with the loss of each step."""
        self.say(f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}")

    def validated(self, epoch: int, accuracy: float | None, state: dict) -> None:
        """Called at the end of an epoch. `accuracy` is for printing.

        What chose the best epoch is state["best"]["score"], which may be another number.

        `state` is all that the next epochs need, and the best epoch so far under "best". Save it at
        once, because the next epoch changes it.
        """
        self.say(f"epoch {epoch}: validation accuracy {accuracy}")


def check_losses(losses: list[float], settings: Settings, where: str) -> None:
    """Raise a UserError if a loss is not a finite number."""
    for step, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} in {where}, step {step} of {len(losses)}: "
                f"choose a --lr smaller than {settings.lr:g}, or --dtype float32"
            )


def is_better(score: float | None, best: dict | None) -> bool:
    """Whether an epoch with this score is better than the best one before it. Higher is better.

    Of equal epochs the first one stays. Without validation clips the score is None, and every epoch
    counts as better than those before it. So the last one is used.
    """
    if best is None or score is None:
        return True
    return score > best["score"]


@torch.inference_mode()
def evaluate(
    learner: Learner, clips: Clips, indices: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (clips, classes) and labels (clips,) of the clips `indices`, both on the CPU.

    Without indices there are no rows, as for the validation clips of a dataset that has none.
    """
    settings = learner.settings
    machine = learner.machine
    learner.network.eval()

    def logits_of(some):
        x, _ = clips.batch(some, machine.device)
        with machine.autocast(settings.dtype):
            return learner.network(x)

    index = torch.tensor(indices, dtype=torch.long, device=clips.features.device)
    logits = machine.in_batches(logits_of, index, settings.batch_size)
    return logits.cpu(), clips.labels[index].cpu()


def score_of(logits: torch.Tensor, labels: torch.Tensor, by: str) -> float | None:
    """The percentage of right answers; None without clips.

    by: "accuracy" counts all clips alike. "balanced" is the mean of the percentages of the classes
    that occur. For another score add a case here; higher must be better.
    """
    if len(labels) == 0:
        return None
    right = (logits.argmax(1) == labels).double()
    if by == "accuracy":
        return 100 * right.sum().item() / len(labels)
    if by == "balanced":
        recalls = [right[labels == label].mean() for label in labels.unique()]
        return 100 * torch.stack(recalls).mean().item()
    raise ValueError(f"there is no score {by!r}")


# ----------------------------------------------------------------------------------------- the run


def run(args: argparse.Namespace) -> dict:
    """Train and test all folds that are not finished. Returns what result.json holds."""
    recipe = DATASETS[args.dataset]
    machine = Machine(args.device, args.micro_batch, args.compile)
    own_options = args.group, args.windows, args.background
    dataset = load_dataset(args.dataset, args.data_dir, args.cache_dir, *own_options)
    recorder = Recorder(args, dataset, machine)
    weights = args.weights or recipe.weights
    row = petl.find(args.method)
    if petl.has_mark(row, "has_no_backbone"):
        weights = NO_BACKBONE
    if not weights.startswith("random:"):
        find_checkpoint(weights)  # if it cannot be had, say so before any sound is read
    n_frames = frames_for(recipe, dataset, args.seconds)
    pretrained = load_ast(weights, n_frames, len(dataset.classes), args.pool)
    lr = args.lr or recipe.lr.get(args.method)  # None: that of METHODS, perhaps changed as below
    # The method with the numbers of the command line and the dataset, which are taken as they are,
    # or else with those of METHODS. The latter were chosen for 768 dimensions. On a backbone
    # narrower than 384 each RR and number of prompts of METHODS is divided by round(512 / dim), by
    # 4 in the default run, and rounded down, prompts to an even number. (LoRA's s = alpha / RR
    # grows by that.) The learning rates of METHODS are multiplied by the same number, but at most
    # by 4, those of full_ft and linear by 10, and with every method the head has linear's rate.
    method = method_for(row, pretrained.config, args, lr)
    is_fitted = petl.has_mark(method, "is_fitted")
    # Own sounds: a linear head learns from what the backbone makes of each clip once, unmasked.
    unmasked = args.no_mask or is_fitted or (recipe.own and not method.parts)
    clips, bad = load_clips(dataset, n_frames, machine.device, args.cache_dir, args.skip_bad)
    if args.skip_silent:
        bad |= silent_clips(clips.features)

    for seed in args.seed:
        folds = folds_of(dataset, seed, bad, args.shots)
        if recipe.own:  # the datasets of the paper are what they are
            recorder.warn_of_copies(folds, clips.features)
        split_hash = recorder.describe_clips(folds, bad)  # kept to be written as split.csv
        settings = Settings(
            dataset=args.dataset,
            weights=weights,
            backbone=pretrained.backbone.sha256,
            method=to_dict(method),
            pool=args.pool,
            seed=seed,
            shots=args.shots,
            clips=split_hash,
            n_frames=n_frames,
            epochs=len(PENALTIES) if is_fitted else args.epochs or recipe.epochs,
            batch_size=args.batch_size or recipe.batch_size,
            lr=method.lr,
            head_lr=method.head_lr or method.lr,
            mask_frames=0 if unmasked else recipe.widest_mask(n_frames),
            dtype=args.dtype,
            keep=args.keep,
            balance=args.balance,
            choose_by="balanced" if recipe.own else "accuracy",
        )
        recorder.start(settings)  # opens the folder of this seed, and writes split.csv and settings
        for fold in recorder.folds:  # the numbers of --folds, or all of the dataset
            if not recorder.file(fold).exists():
                model = adapted(pretrained, method, fold, settings, machine)
                # `network` is `model`, and `inputs` are `clips`, with one exception. If only the
                # head and perhaps the final LayerNorm train, and there is neither SpecAugment nor
                # --keep, the frozen part computes each clip once: its tokens, normalised, pooled.
                # Then `network` is weight and bias of the LayerNorm, which may as well follow the
                # mean, and the head. `model` still contains them. `inputs` are these vectors.
                network, inputs = skip_frozen(model, clips, settings, machine)
                learner = Learner(network, settings, machine)
                progress = recorder.progress(fold)
                best, logits, labels = train_fold(learner, inputs, folds[fold], fold, progress)
                middles = recorder.middles(model, clips, folds[fold])
                baseline = {}
                if recipe.own and method.name != "logmel":
                    baseline = scores_of_logmel(clips, folds[fold], fold, settings, machine)
                if machine.is_first:
                    header = recorder.header(best, middles, logits, labels, baseline)
                    header["parameters"] = petl.count(model)
                    save_trained(model, recorder.file(fold), header)
            recorder.finish_fold(fold)
        recorder.finish()
    return recorder.results()


def scores_of_logmel(
    clips: Clips, split: Split, fold: int, settings: Settings, machine: Machine
) -> dict[str, float]:
    """The scores of `logmel` on the test clips, in percent: a baseline without a backbone."""
    method = petl.find("logmel")
    pretrained = load_ast(NO_BACKBONE, settings.n_frames, int(clips.labels.max()) + 1)
    settings = replace(
        settings, method=to_dict(method), epochs=len(PENALTIES), mask_frames=0, keep=None
    )
    model = adapted(pretrained, method, fold, settings, machine)
    network, inputs = skip_frozen(model, clips, settings, machine)
    learner = Learner(network, settings, machine)
    progress = Progress()
    progress.say = lambda text: None
    _, logits, labels = train_fold(learner, inputs, split, fold, progress)
    return {
        "logmel_accuracy": score_of(logits, labels, "accuracy"),
        "logmel_balanced_accuracy": score_of(logits, labels, "balanced"),
    }


def adapted(
    pretrained: AST, method: petl.Method, fold: int, settings: Settings, machine: Machine
) -> AST:
    """A copy of the pretrained model with a new head and the parts of the method.

    On the device, and if `dtype` is not float32, its frozen weights are in that type.
    """
    seed_epoch(settings.seed, fold, epoch=0)
    model = copy.deepcopy(pretrained)
    model.head = make_head(model.config)  # the head of load_ast does not depend on the seed
    model = petl.apply(model, method)
    return machine.prepare(model, settings.dtype)


# -------------------------------------------------------------------------------- the command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    description = "Adapt an Audio Spectrogram Transformer to a dataset and test it."
    parser = command.Parser(description=description)
    number = {"type": command.positive}
    switch = {"action": "store_true"}

    add = parser.add_argument_group("sounds").add_argument
    add("--dataset", default="demo", help=f"one of {', '.join(DATASETS)}; default: %(default)s")
    add("--data-dir", type=Path, help="your sounds, or the dataset or its archive if it is here")
    add("--folds", type=command.numbers, metavar="1,2", help="train only these folds")
    add(
        "--seconds",
        type=float,
        help="cut or pad clips to this length; default: the dataset's, "
        "of your own sounds what 95 %% of the clips fit into",
    )
    add("--shots", **number, metavar="K", help="train on K clips of each class only (few-shot)")
    add("--skip-bad", **switch, help="go on without sound files that cannot be read")

    add = parser.add_argument_group("your own sounds, --dataset folder or csv").add_argument
    add(
        "--group",
        metavar="REGEX",
        help="keep clips in one part whose names have the same text in the first parenthesis",
    )
    add("--windows", **switch, help="cut long recordings into windows of --seconds")
    add(
        "--no-background",
        dest="background",
        action="store_false",
        help="make no class of what no label, or no start and end, of a recording covers",
    )
    add("--skip-silent", **switch, help="leave out clips that are nearly all zeros")

    add = parser.add_argument_group("model and method").add_argument
    add("--method", default="houlsby_par", help="a name of --list-methods; default: %(default)s")
    add(
        "--weights",
        help="the pretrained model: audioset, demo, hf:owner/name, a path, or "
        "random:base|small|tiny|demo; default: the dataset's",
    )
    add(
        "--pool",
        default="mean",
        choices=POOL,
        help="what the head reads: the mean of all tokens (default), [CLS], or [CLS] and "
        "[distillation]",
    )
    add("--rr", **number, help="reduction rate: a bottleneck is dim / RR wide")
    add("--alpha", type=float, help="LoRA's update is multiplied by alpha / RR")
    add("--prompts", **number, help="number of prompts; of a prefix: keys and values together")
    add("--kernel", **number, help="width in tokens of the convolution of a conformer adapter")
    add("--blocks", type=command.span, metavar="9-12", help="change only these blocks: faster")
    add("--list-methods", **switch, help="print all methods and how much they train, and exit")
    add("--markdown", **switch, help="with --list-methods: print the page docs/methods.md")

    add = parser.add_argument_group("training").add_argument
    add("--seed", type=command.numbers, default=[0], metavar="0,1,2", help="one run for each seed")
    add("--epochs", **number, help="passes over the training clips; default: the dataset's")
    add("--batch-size", **number, help="clips in a step, over all GPUs; default: the dataset's")
    add("--lr", type=float, help="learning rate at the start; default: the method's")
    add("--head-lr", type=float, help="of the head; default: --lr, on a small backbone 0.01")
    add("--balance", **switch, help="weigh the loss so that all classes count alike")
    add("--no-mask", **switch, help="no masks (SpecAugment) where the dataset has them")
    add("--keep", type=float, metavar="0.4", help="train on this share of the patches: faster")

    add = parser.add_argument_group("machine and files").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="number format; auto: float32 on a CPU, bfloat16 on a GPU that has it",
    )
    add("--micro-batch", **number, help="clips at once, for less memory; changes dropout a little")
    add("--compile", **switch, help="compile the model for training (torch.compile)")
    add("--resume", **switch, help="continue an interrupted fold after its last finished epoch")
    add("--out", type=Path, default=Path("runs"), help="results go to OUT/DATASET/METHOD/seedS")
    add(
        "--cache-dir",
        type=Path,
        default=default_cache_dir(),
        help="folder for downloads and features; default: %(default)s",
    )

    args = parser.parse_args(argv)
    command.nearest(args.dataset, DATASETS, "dataset")
    command.check_options(args, DATASETS[args.dataset].own)
    is_cut = args.windows or args.dataset == "csv"  # labels of recordings are cut in any case
    args.windows = args.seconds if is_cut else None  # from here on a length, or None
    check_method(petl.find(args.method), args)
    args.device = command.choose_device(args.device)
    args.dtype = command.choose_dtype(args.dtype, args.device)
    return args


METHODS_PAGE = """# All methods

`--method` takes a name of the first column. The second column says what the parts of the method
are, and has these parts as METHODS has them: `at` is the sub-layer, `how` a key of
`petl.INSERTIONS`, and `rr` the reduction rate (a bottleneck is dim / rr wide). `rate` is the
learning rate of the method and of the head. A backbone narrower than 384 dimensions, as in the
demo, has other rates, reduction rates and numbers of prompts (`support/variants.py`).
`python train.py --list-methods --markdown` prints this page.

| method | what is trained | trained | in the paper | rate | row of the paper |
|---|---|--:|--:|--:|---|"""


def list_methods(markdown: bool) -> None:
    """Print all methods with the parameters that each trains in AST-Base.

    In Markdown it is the page docs/methods.md, which also says what is trained.
    """

    def counted(name, n_frames=500, n_classes=50):
        with torch.device("meta"):  # shapes without numbers
            model = AST(ASTConfig(n_frames=n_frames, n_classes=n_classes))
            return petl.count(petl.apply(model, name))

    if markdown:
        print(METHODS_PAGE)
    else:
        print(f"{'method':<30}{'trained':>12}{'paper':>8}   {'lr':<8}{'row of the paper'}")
    for name, method in petl.METHODS.items():
        count = counted(name)
        trained = f"{count['petl'] or count['head']:,}"
        lr = f"{method.lr:g}"
        if markdown:
            cells = [f"`{name}`", what_trains(method), trained, method.paper, lr, method.where]
            print(f"| {' | '.join(cells)} |")
        else:
            print(f"{name:<30}{trained:>12}{method.paper:>8}   {lr:<8}{method.where}")
    heads = [f"{counted('linear', n_classes=n)['head']:,}" for n in (50, 10, 35, 31)]
    short = counted("full_ft", 100, 35)["petl"]
    print()
    print(f"Base AST at 500 frames. full_ft has {short:,} at 100 frames.")
    print("Final LayerNorm and head are trained, too, but not counted in these rows.")
    print(f"They have {' / '.join(heads)} parameters for 50 / 10 / 35 / 31 classes.")
    print("Exceptions: the row of linear has both, full_ft and bitfit count the LayerNorm,")
    print("and probe and logmel have a larger head, which they count.")


def what_trains(method: petl.Method) -> str:
    """What the parts of a method are: the first sentence of their docstrings, and their numbers."""
    if not method.parts:
        return "Nothing but the final LayerNorm and the head"
    sentences = []
    for part in method.parts:
        sentence = re.split(r"\.(?:\s|$)", inspect.getdoc(part) or "")[0]
        sentences.append(" ".join(sentence.split()))
    numbers = ", ".join(f"`{part}`" for part in method.parts)
    return f"{'. '.join(dict.fromkeys(sentences))}: {numbers}"


def start(argv: list[str] | None) -> None:
    args = parse(argv)
    if args.markdown and not args.list_methods:
        raise UserError("--markdown is for --list-methods: give both")
    if args.list_methods:
        list_methods(args.markdown)
        return
    # Joins the processes of torchrun, and makes one line of what a machine cannot do: a full disk,
    # too little memory for the batch.
    with protected(args, DATASETS[args.dataset].batch_size):
        run(args)


def main(argv: list[str] | None = None) -> int:
    return command.exit_code(lambda: start(argv))


if __name__ == "__main__":
    sys.exit(main())
