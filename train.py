"""Adapt an Audio Spectrogram Transformer to a dataset, test it, and write down what came out.

    python train.py                                        # sounds made here, backbone in weights/
    python train.py --method houlsby_par --dataset esc50

`train_epoch` is the training loop, `train_fold` trains and tests one fold, `run` goes over seeds
and folds, and `parse` reads the command line. AdamW, the weight decay and the cosine rate are those
of section III-A. Cross-entropy and the missing warm-up are those of the authors' code.

The test clips are classified once, with the weights of the epoch that was best on the validation
clips. A dataset without validation clips takes the last epoch.

What makes a run robust is in `support/`, behind two objects. A `Machine` knows the device and the
processes of torchrun. A `Recorder` writes files, shows progress and resumes an interrupted fold.
"""

import argparse
import copy
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import petl
from ast_model import AST, POOL, ASTConfig, make_head
from data import (
    DATASETS, Clips, Split, folds_of, frames_for, load_clips, load_dataset, spec_augment,
)  # fmt: skip
from load_weights import (
    live_tensors, load_ast, load_tensors, save_trained, to_dict, trained_tensors,
)  # fmt: skip
from petl_more import Patchout, patchout
from support import command
from support.files import default_cache_dir
from support.recorder import Recorder, protected
from support.speed import Machine
from support.variants import fitted, override
from support.vectors import probed

BETAS = (0.9, 0.98)  # of AdamW, as in the authors' code
EPS = 1e-6  # of AdamW, as in the authors' code
WEIGHT_DECAY = 0.1  # section III-A


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a run. Runs with equal settings are one experiment."""

    dataset: str
    weights: str  # the backbone as the user named it
    backbone: str  # its SHA-256, which identifies it
    method: dict  # as load_weights.to_dict returns it
    pool: str
    seed: int
    shots: int | None  # training clips per class; None: all
    clips: str  # SHA-256 of split.csv, which says what every clip is used for
    n_frames: int
    epochs: int
    batch_size: int
    lr: float
    mask: bool  # SpecAugment
    dtype: str
    keep: float | None = None  # the share of the patches in training; None: all
    mask_frames: int = 80  # the widest time mask
    balance: bool = False  # the loss weighs all classes alike
    best: str = "accuracy"  # what chooses the best epoch: "accuracy" or "balanced" accuracy


# ------------------------------------------------------------------------------------ the training


class Learner:
    """A network, the optimizer of what trains in it, and the scaler that float16 gradients need."""

    def __init__(self, network: nn.Module, settings: Settings, machine: Machine):
        self.network = network
        self.forward = machine.parallel(network)  # the network, compiled or distributed if asked
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        fused = machine.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            trained, settings.lr, BETAS, EPS, WEIGHT_DECAY, fused=fused
        )
        self.first_rates = [group["lr"] for group in self.optimizer.param_groups]
        is_half = settings.dtype == "float16"  # small gradients would vanish: they are scaled
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=is_half)

    def state(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def cosine(lr: float, step: int, steps: int) -> float:
    """Cosine annealing from `lr` at step 0 to zero at `steps`."""
    return lr * 0.5 * (1 + math.cos(math.pi * step / steps))


def seed_epoch(seed: int, fold: int, epoch: int) -> None:
    """Seed all random numbers of an epoch, so that a resumed run draws the same ones."""
    torch.manual_seed((seed * 1000 + fold) * 100_000 + epoch)


def train_epoch(
    learner: Learner,
    clips: Clips,
    indices: list[int],
    epoch: int,
    settings: Settings,
    machine: Machine,
) -> list[float]:
    """One pass over the training clips `indices`, in random order. Returns the loss of each step.

    --micro-batch and several GPUs cut a batch into pieces; else it is one piece. Random numbers are
    drawn for the whole batch, so the masks do not depend on the pieces. The gradients of the pieces
    add up, and `weight` undoes the mean that is taken over several GPUs.
    """
    optimizer = learner.optimizer
    learner.network.train()
    indices = torch.tensor(indices)
    order = indices[torch.randperm(len(indices))].to(clips.features.device)
    batches = order.split(settings.batch_size)
    class_weights = None
    if settings.balance:
        class_weights = weights_of_classes(clips.labels, indices).to(machine.device)
    losses = torch.zeros(len(batches), device=machine.device)
    for step, batch in enumerate(batches):
        # The learning rate of this step, for every group of parameters.
        step_of_all = (epoch - 1) * len(batches) + step
        for group, first_rate in zip(optimizer.param_groups, learner.first_rates, strict=True):
            group["lr"] = cosine(first_rate, step_of_all, settings.epochs * len(batches))

        draws = torch.rand(len(batch), 4, device=machine.device)
        if settings.keep:
            n_patches = learner.network.model.config.n_patches
            kept = patchout(torch.rand(len(batch), n_patches, device=machine.device), settings.keep)

        for piece, weight in machine.pieces(len(batch)):
            x, y = clips.batch(batch[piece], machine.device)
            if settings.mask:
                x = spec_augment(x, draws[piece], max_frames=settings.mask_frames)
            inputs = (x, kept[piece]) if settings.keep else (x,)
            with machine.autocast(settings.dtype):
                logits = learner.forward(*inputs)
            loss = F.cross_entropy(logits.float(), y, class_weights, reduction="sum") / len(batch)
            loss = loss * weight
            learner.scaler.scale(loss).backward()
            losses[step] += loss.detach()

        learner.scaler.step(optimizer)
        learner.scaler.update()
        optimizer.zero_grad()
    return machine.mean(losses).tolist()


def weights_of_classes(labels: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Weights (classes,) inverse to the counts of the classes among the clips `indices`.

    The mean of the weights over these clips is 1.
    """
    counts = labels[indices].bincount(minlength=int(labels.max()) + 1)
    return len(indices) / (counts.count_nonzero() * counts.clamp(1))


def train_fold(
    network: nn.Module,
    clips: Clips,
    split: Split,
    fold: int,
    settings: Settings,
    machine: Machine,
    log,
) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Train on split.train, choose the epoch on split.val, test on split.test.

    `log` is told about every epoch and may return the state of an interrupted fold; `Log` is the
    simplest one. Returns the best epoch, and the logits and labels of the test clips. The network
    ends with the weights of the best epoch.
    """
    learner = Learner(Patchout(network) if settings.keep else network, settings, machine)
    best = {"score": -1.0}
    done = 0
    state = log.start(learner, split)
    if state:
        load_tensors(network, state["tensors"])
        learner.load_state(state)
        best = state["best"]
        done = state["epoch"]

    for epoch in range(done + 1, settings.epochs + 1):
        seed_epoch(settings.seed, fold, epoch)
        started = time.perf_counter()
        losses = train_epoch(learner, clips, split.train, epoch, settings, machine)
        seconds = time.perf_counter() - started
        for step, loss in enumerate(losses, start=1):
            if not math.isfinite(loss):
                where = f"fold {fold}, epoch {epoch}, step {step} of {len(losses)}"
                mend = f"choose a --lr smaller than {settings.lr:g}, or --dtype float32"
                raise ValueError(f"the loss is {loss} in {where}: {mend}")

        # BatchNorm has running statistics: each of several processes has seen its own clips.
        machine.average(t for t in live_tensors(network).values() if not t.requires_grad)
        logits, labels = evaluate(network, clips, split.val, settings, machine)
        tensors = trained_tensors(network)  # a copy
        accuracy = score_of(logits, labels, "accuracy")
        score = score_of(logits, labels, settings.best)
        if score is None or score > best["score"]:  # the first of equals; None: no validation clips
            best = {
                "epoch": epoch,
                "score": score,
                "accuracy": accuracy,
                "tensors": tensors,
                "answered": (logits, labels),
            }
        log.epoch(epoch, losses, seconds, accuracy)
        log.save({**learner.state(), "tensors": tensors, "best": best})

    load_tensors(network, best["tensors"])
    return best, *evaluate(network, clips, split.test, settings, machine)


class Log:
    """What `train_fold` talks to. This one prints; the one in support/recorder.py also saves."""

    def start(self, learner: Learner, split: Split) -> dict | None:
        """Called before the first epoch. Returns the state of an interrupted fold, if any."""

    def epoch(self, epoch: int, losses: list, seconds: float, accuracy: float | None) -> None:
        print(f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}, accuracy {accuracy}")

    def save(self, state: dict) -> None:
        """Called with everything that the next epochs need."""


@torch.inference_mode()
def evaluate(
    network: nn.Module, clips: Clips, indices: list[int], settings: Settings, machine: Machine
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (clips, classes) and labels (clips,) of the clips `indices`, both on the CPU."""
    network.eval()

    def logits_of(index):
        x, _ = clips.batch(index, machine.device)
        with machine.autocast(settings.dtype):
            return network(x)

    index = torch.tensor(indices, dtype=torch.long, device=clips.features.device)
    logits = machine.in_batches(logits_of, index, settings.batch_size)
    return logits.cpu(), clips.labels[index].cpu()


def score_of(logits: torch.Tensor, labels: torch.Tensor, by: str) -> float | None:
    """The percentage of right answers; None without clips.

    by: "accuracy" counts all clips alike, "balanced" is the mean over the classes.
    """
    if len(labels) == 0:
        return None
    right = (logits.argmax(1) == labels).double()
    if by == "balanced":
        recalls = [right[labels == label].mean() for label in labels.unique()]
        return 100 * torch.stack(recalls).mean().item()
    return 100 * right.sum().item() / len(labels)


# ----------------------------------------------------------------------------------------- the run


def run(args: argparse.Namespace) -> dict:
    """Train and test all folds that are not finished. Returns what result.json holds."""
    recipe = DATASETS[args.dataset]
    weights = args.weights or recipe.weights
    machine = Machine(args.device, args.micro_batch, args.compile, args.recompute)
    changes = {"rr": args.rr, "alpha": args.alpha, "prompts": args.prompts, "kernel": args.kernel}
    override(petl.find(args.method), **changes)  # its errors come before a download
    dataset = load_dataset(args.dataset, args.data_dir, args.cache_dir, args.group, args.windows)
    recorder = Recorder(args, dataset, machine)
    n_frames = frames_for(recipe, dataset, args.seconds)
    pretrained = load_ast(weights, n_frames, len(dataset.classes), args.pool)
    method = fitted(  # a narrow backbone gets smaller numbers than the table has
        petl.find(args.method),
        pretrained.config,
        args.lr or recipe.lr.get(args.method),
        blocks=args.blocks,
        keep=args.keep,
        **changes,
    )
    clips, bad = load_clips(dataset, n_frames, args.device, args.cache_dir, args.skip_bad)

    for seed in args.seed:
        folds = folds_of(dataset, seed, bad, args.shots)
        settings = Settings(
            dataset=args.dataset,
            weights=weights,
            backbone=pretrained.backbone.sha256,
            method=to_dict(method),
            pool=args.pool,
            seed=seed,
            shots=args.shots,
            clips=recorder.describe_clips(folds, bad),
            n_frames=n_frames,
            epochs=args.epochs or recipe.epochs,
            batch_size=args.batch_size or recipe.batch_size,
            lr=method.lr,
            dtype=args.dtype,
            keep=args.keep,
            balance=args.balance,
            best="balanced" if recipe.own else "accuracy",
            **recipe.masks(n_frames, not args.no_mask),
        )
        recorder.start(settings)
        for fold in recorder.folds:
            if not recorder.file(fold).exists():
                model = adapted(pretrained, method, fold, settings, machine)
                # `linear` and `probe` train on what the frozen backbone makes of the clips.
                network, inputs = probed(model, clips, folds[fold], settings, machine)
                outcome = train_fold(
                    network, inputs, folds[fold], fold, settings, machine, recorder.log(fold)
                )
                finish_fold(model, recorder.file(fold), recorder.header(*outcome), machine)
            recorder.tell(fold)
        recorder.finish()
    return recorder.results()


def adapted(
    pretrained: AST, method: petl.Method, fold: int, settings: Settings, machine: Machine
) -> AST:
    """A copy of the pretrained model with a new head and the parts of the method."""
    seed_epoch(settings.seed, fold, epoch=0)
    model = copy.deepcopy(pretrained)
    model.head = make_head(model.config)  # load_ast has drawn its head without the seed
    return machine.prepare(petl.apply(model, method), settings.dtype)


def finish_fold(model: AST, file: Path, header: dict, machine: Machine) -> None:
    """Write the trained tensors. With this file the fold counts as finished."""
    if machine.is_first:
        save_trained(model, file, {**header, "parameters": petl.count(model)})
        file.with_suffix(".resume.pt").unlink(missing_ok=True)


# -------------------------------------------------------------------------------- the command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    description = "Adapt an Audio Spectrogram Transformer to a dataset and test it."
    parser = command.Parser(description=description)
    number = {"type": command.positive}
    switch = {"action": "store_true"}

    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="demo", help=", ".join(DATASETS))
    add("--data-dir", type=Path, help="the dataset or its archive, or your sounds; else a download")
    add("--folds", type=command.numbers, metavar="1,2", help="only these folds")
    add("--seconds", type=float, help="cut or pad clips to this; default: the dataset's length")
    add("--group", metavar="REGEX", help="own sounds: the first parenthesis keeps paths together")
    add("--windows", **switch, help="own sounds: cut recordings into windows of --seconds")
    add("--shots", **number, metavar="K", help="train on K clips per class only")
    add("--skip-bad", **switch, help="go on without sound files that cannot be read")

    add = parser.add_argument_group("model and method").add_argument
    add("--method", default="houlsby_par", help="a name that --list-methods prints")
    add("--weights", help="audioset, demo, hf:owner/name, a path, random:base|small|tiny|demo")
    add("--pool", default="mean", choices=POOL, help="how tokens become one vector; paper: mean")
    add("--rr", **number, help="reduction rate: the bottleneck is dim / RR wide")
    add("--alpha", type=float, help="LoRA scales its update by alpha / RR")
    add("--prompts", **number, help="number of prompts or prefixes")
    add("--kernel", **number, help="tokens in the window of a conformer adapter")
    add("--blocks", type=command.span, metavar="9-12", help="change these blocks only: faster")

    add = parser.add_argument_group("training").add_argument
    add("--seed", type=command.numbers, default=[0], metavar="0,1,2", help="one run for each seed")
    add("--epochs", **number, help="default: the dataset's")
    add("--batch-size", **number, help="over all processes; default: the dataset's")
    add("--lr", type=float, help="first learning rate; default: the method's")
    add("--balance", **switch, help="weigh the loss so that all classes count alike")
    add("--no-mask", **switch, help="no SpecAugment where the dataset's protocol has it")
    add("--keep", type=float, metavar="0.4", help="train on this share of the patches: faster")

    add = parser.add_argument_group("machine and files").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--micro-batch", **number, help="clips at once; changes only dropout and BatchNorm")
    add("--compile", **switch, help="torch.compile the model for training")
    add("--recompute", **switch, help="save memory: compute the forward pass twice")
    add("--resume", **switch, help="continue an interrupted fold after its last finished epoch")
    add("--out", type=Path, default=Path("runs"), help="results: OUT/DATASET/METHOD/seedS")
    add("--cache-dir", type=Path, default=default_cache_dir(), help="default: %(default)s")
    add("--list-methods", **switch, help="print all methods with their parameter counts")

    args = parser.parse_args(argv)
    command.nearest(args.dataset, DATASETS, "dataset")
    command.check_options(args, DATASETS[args.dataset].own)  # --windows becomes seconds
    args.device = command.choose_device(args.device)
    args.dtype = command.choose_dtype(args.dtype, args.device)
    return args


def list_methods() -> None:
    """Print all methods with the parameters that each trains in AST-Base."""

    def counted(name, n_frames, n_classes):
        with torch.device("meta"):  # shapes without numbers
            model = AST(ASTConfig(n_frames=n_frames, n_classes=n_classes))
            return petl.count(petl.apply(model, name))

    print(f"{'method':<30}{'trained':>12}{'paper':>8}   {'lr':<8}{'row of the paper'}")
    for name, method in petl.METHODS.items():
        count = counted(name, 500, 50)
        trained = count["petl"] or count["head"]
        print(f"{name:<30}{trained:>12,}{method.paper:>8}   {method.lr:<8g}{method.where}")
    heads = " / ".join(f"{counted('linear', 500, n)['head']:,}" for n in (50, 10, 35, 31))
    print(
        f"\nBase AST at 500 frames. On top come final LayerNorm and head, {heads}\n"
        "for 50 / 10 / 35 / 31 classes: all of linear. full_ft and bitfit count this LayerNorm "
        "already, probe its head.\n"
        f"At 100 frames full_ft has {counted('full_ft', 100, 35)['petl']:,}."
    )


def start(argv: list[str] | None) -> None:
    args = parse(argv)
    if args.list_methods:
        return list_methods()
    with protected(args, DATASETS[args.dataset].batch_size):
        run(args)


def main(argv: list[str] | None = None) -> int:
    return command.exit_code(lambda: start(argv))


if __name__ == "__main__":
    sys.exit(main())
