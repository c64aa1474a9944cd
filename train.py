"""Adapt an Audio Spectrogram Transformer to a dataset, test it, and write down what came out.

    python train.py                                        # sounds made here, backbone in weights/
    python train.py --method houlsby_par --dataset esc50

Read from top to bottom: `train_epoch` is the training loop, `train_fold` chooses the best epoch and
tests it, `run` goes over seeds and folds, and `parse` reads the command line.

AdamW, the weight decay and the cosine annealing of the learning rate are those of section III-A.
Cross-entropy and the missing warm-up are those of the authors' code. The test clips are classified
once, with the weights of the epoch that was best on the validation clips. A dataset without
validation clips uses the last epoch.

Two objects of `support/` make a run fast and robust. A `Machine` knows the device and the processes
of torchrun. A `Recorder` writes files, prints progress, and continues an interrupted fold.
"""

import argparse
import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path

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
    live_tensors,
    load_ast,
    load_tensors,
    save_trained,
    to_dict,
    trained_tensors,
)
from petl_more import Patchout
from support import command
from support.files import default_cache_dir
from support.recorder import Recorder, protected
from support.speed import Machine
from support.variants import check_method, fitted
from support.vectors import skip_frozen

BETAS = (0.9, 0.98)  # of AdamW, as in the authors' code
EPS = 1e-6  # of AdamW, as in the authors' code
WEIGHT_DECAY = 0.1  # section III-A


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a run.

    A finished fold is not trained again while the settings are the same. So if you change how
    training works, add a field here, or give another --out.
    """

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
    mask_frames: int  # the widest time mask of SpecAugment; 0: no masks
    dtype: str
    keep: float | None = None  # the share of the patches in training; None: all
    balance: bool = False  # the loss weighs all classes alike
    best: str = "accuracy"  # what chooses the best epoch, see score_of


# ------------------------------------------------------------------------------------ the training


class Learner:
    """A network with what trains it: an optimizer, and a scaler for the gradients of float16.

    `network` is the adapted AST. `forward` computes the same in training: on some of the patches
    only (--keep), compiled (--compile) or in several processes (torchrun), if that is asked for.
    """

    def __init__(self, network: nn.Module, settings: Settings, machine: Machine):
        self.network = network
        self.settings = settings
        self.machine = machine
        self.forward = Patchout(network, settings.keep) if settings.keep else network
        self.forward = machine.parallel(self.forward)
        fused = machine.device.type == "cuda"
        groups = parameter_groups(network, settings)
        self.optimizer = torch.optim.AdamW(
            groups, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=fused
        )
        self.first_rates = [group["lr"] for group in self.optimizer.param_groups]
        is_half = settings.dtype == "float16"  # small gradients would vanish, so they are scaled
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=is_half)

    def state(self) -> dict:
        """What the next epochs need, beside the random seed."""
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
    """The trained parameters with their first learning rate, as groups for AdamW.

    There is one group. With several, each is annealed from its own first rate.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return [{"params": trained, "lr": settings.lr}]


def cosine(first_rate: float, step: int, steps: int) -> float:
    """Cosine annealing, from `first_rate` at step 0 to zero at `steps`."""
    return first_rate * 0.5 * (1 + math.cos(math.pi * step / steps))


def seed_epoch(seed: int, fold: int, epoch: int) -> None:
    """Seed all random numbers of an epoch, so that a resumed run draws the same ones."""
    torch.manual_seed((seed * 1000 + fold) * 100_000 + epoch)


def train_epoch(learner: Learner, clips: Clips, indices: list[int], epoch: int) -> torch.Tensor:
    """Train on the clips `indices` once, in random order. Epochs count from 1.

    Returns the loss of each step, (steps,), on the device. Nothing here waits for a GPU.
    """
    settings = learner.settings
    machine = learner.machine
    optimizer = learner.optimizer
    scaler = learner.scaler
    learner.network.train()

    indices = torch.tensor(indices)
    class_weights = None
    if settings.balance:
        class_weights = weights_of_classes(clips.labels, indices).to(machine.device)
    order = indices[torch.randperm(len(indices))].to(clips.features.device)
    batches = order.split(settings.batch_size)
    losses = torch.zeros(len(batches), device=machine.device)
    for step, batch in enumerate(batches):
        # Every group of parameters gets the learning rate of this step.
        steps_before = (epoch - 1) * len(batches) + step
        for group, first_rate in zip(optimizer.param_groups, learner.first_rates, strict=True):
            group["lr"] = cosine(first_rate, steps_before, settings.epochs * len(batches))

        # Usually the batch is one piece, and its weight is 1.
        for x, y, weight in pieces(batch, clips, settings, machine):
            with machine.autocast(settings.dtype):
                logits = learner.forward(x)  # (clips of the piece, classes)
            loss = F.cross_entropy(logits.float(), y, class_weights, reduction="sum") / len(batch)
            loss = loss * weight
            scaler.scale(loss).backward()  # the gradients of the pieces add up
            losses[step] += loss.detach()

        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    # BatchNorm has running statistics, and each of several processes has seen its own clips.
    machine.average(t for t in live_tensors(learner.network).values() if not t.requires_grad)
    return machine.mean(losses)


def pieces(batch: torch.Tensor, clips: Clips, settings: Settings, machine: Machine):
    """Yield the clips of a batch as (x, y, weight): features, labels, and a factor for the loss.

    x: (clips, n_frames, n_mels), masked by SpecAugment. y: (clips,).

    Without torchrun and --micro-batch there is one piece of weight 1. --micro-batch cuts the batch,
    so that less memory is needed at once. torchrun starts several processes, and each gets its own
    pieces. PyTorch then takes the mean of the gradients over the processes, where their sum is
    wanted. So the weight is the number of processes. (It is 0 for a process that gets no clip.)

    The masks are drawn for the whole batch, so they do not depend on how it is cut.
    """
    draws = torch.rand(len(batch), 4, device=machine.device)
    for piece, weight in machine.shares(len(batch)):
        x, y = clips.batch(batch[piece], machine.device)
        if settings.mask_frames:
            x = spec_augment(x, draws[piece], settings.mask_frames)
        yield x, y, weight


def weights_of_classes(labels: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Weights (classes,) for the loss, inverse to the counts of the classes among `indices`.

    The mean of the weights over these clips is 1.
    """
    counts = labels[indices].bincount(minlength=int(labels.max()) + 1)
    return len(indices) / (counts.count_nonzero() * counts.clamp(1))


def train_fold(
    learner: Learner, clips: Clips, split: Split, fold: int, log
) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Train on split.train, choose the best epoch on split.val, and test on split.test.

    `log` hears of every epoch, see `Log`. Returns the best epoch, and logits (clips, classes) and
    labels (clips,) of the test clips. The network keeps the weights of the best epoch.
    """
    settings = learner.settings
    best = None
    first_epoch = 1
    state = log.start(learner, split)
    if state:  # an interrupted fold goes on
        learner.load_state(state)
        best = state["best"]
        first_epoch = state["epoch"] + 1

    for epoch in range(first_epoch, settings.epochs + 1):
        seed_epoch(settings.seed, fold, epoch)
        losses = train_epoch(learner, clips, split.train, epoch).tolist()
        check_losses(losses, settings, f"fold {fold}, epoch {epoch}")
        log.trained(epoch, losses)

        logits, labels = evaluate(learner, clips, split.val)
        state = learner.state()
        score = score_of(logits, labels, settings.best)
        if is_better(score, best):
            best = {
                "epoch": epoch,
                "score": score,
                "accuracy": score_of(logits, labels, "accuracy"),
                "tensors": state["tensors"],  # copies, which the next epochs do not change
                "validation": (logits, labels),
            }
        log.validated(epoch, score_of(logits, labels, "accuracy"), {**state, "best": best})

    load_tensors(learner.network, best["tensors"])
    return best, *evaluate(learner, clips, split.test)


class Log:
    """What `train_fold` tells of its progress. This one prints it.

    support/recorder.py has one that also writes files and continues an interrupted fold.
    """

    def start(self, learner: Learner, split: Split) -> dict | None:
        """Called before the first epoch. Returns the state of an interrupted fold, if there is one.

        The state is what `validated` was given, and the number of its epoch under "epoch".
        """

    def trained(self, epoch: int, losses: list[float]) -> None:
        """Called when the training clips of an epoch are through."""
        print(f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}")

    def validated(self, epoch: int, accuracy: float | None, state: dict) -> None:
        """Called at the end of an epoch, with everything that the next epochs need."""
        print(f"epoch {epoch}: validation accuracy {accuracy}")


def check_losses(losses: list[float], settings: Settings, where: str) -> None:
    """Raise a UserError if a loss is not a finite number."""
    for step, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} in {where}, step {step} of {len(losses)}: "
                f"choose a --lr smaller than {settings.lr:g}, or --dtype float32"
            )


def is_better(score: float | None, best: dict | None) -> bool:
    """Whether an epoch with this score is better than the best one before it.

    Of equal epochs the first one stays. Without validation clips there is no score, and every epoch
    is better than those before it, so that the last one is used.
    """
    if best is None or score is None:
        return True
    return score > best["score"]


@torch.inference_mode()
def evaluate(
    learner: Learner, clips: Clips, indices: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (clips, classes) and labels (clips,) of the clips `indices`, both on the CPU."""
    settings = learner.settings
    machine = learner.machine
    learner.network.eval()

    def logits_of(index):
        x, _ = clips.batch(index, machine.device)
        with machine.autocast(settings.dtype):
            return learner.network(x)

    index = torch.tensor(indices, dtype=torch.long, device=clips.features.device)
    logits = machine.in_batches(logits_of, index, settings.batch_size)
    return logits.cpu(), clips.labels[index].cpu()


def score_of(logits: torch.Tensor, labels: torch.Tensor, by: str) -> float | None:
    """The percentage of right answers; None without clips.

    by: "accuracy" counts all clips alike. "balanced" is the mean of the percentages of the classes.
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
    machine = Machine(args.device, args.micro_batch, args.compile)
    dataset = load_dataset(args.dataset, args.data_dir, args.cache_dir, args.group, args.windows)
    recorder = Recorder(args, dataset, machine)
    n_frames = frames_for(recipe, dataset, args.seconds)
    weights = args.weights or recipe.weights
    pretrained = load_ast(weights, n_frames, len(dataset.classes), args.pool)
    # The method with the numbers of the command line. A narrow backbone gets smaller bottlenecks.
    method = fitted(petl.find(args.method), pretrained.config, args, recipe.lr.get(args.method))
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
            mask_frames=0 if args.no_mask else recipe.widest_mask(n_frames),
            dtype=args.dtype,
            keep=args.keep,
            balance=args.balance,
            best="balanced" if recipe.own else "accuracy",
        )
        recorder.start(settings)
        for fold in recorder.folds:
            if not recorder.file(fold).exists():
                model = adapted(pretrained, method, fold, settings, machine)
                # If only the head learns, and no mask changes the clips from epoch to epoch, the
                # frozen part computes a vector of each clip once, and the head trains on vectors.
                network, inputs = skip_frozen(model, clips, folds[fold], settings, machine)
                learner = Learner(network, settings, machine)
                outcome = train_fold(learner, inputs, folds[fold], fold, recorder.log(fold))
                if machine.is_first:
                    header = {**recorder.header(*outcome), "parameters": petl.count(model)}
                    save_trained(model, recorder.file(fold), header)
            recorder.finish_fold(fold)
        recorder.finish()
    return recorder.results()


def adapted(
    pretrained: AST, method: petl.Method, fold: int, settings: Settings, machine: Machine
) -> AST:
    """A copy of the pretrained model with a new head and the parts of the method."""
    seed_epoch(settings.seed, fold, epoch=0)
    model = copy.deepcopy(pretrained)
    model.head = make_head(model.config)  # the head of load_ast was drawn without the seed
    return machine.prepare(petl.apply(model, method), settings.dtype)


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
    add("--resume", **switch, help="continue an interrupted fold after its last finished epoch")
    add("--out", type=Path, default=Path("runs"), help="results: OUT/DATASET/METHOD/seedS")
    add("--cache-dir", type=Path, default=default_cache_dir(), help="default: %(default)s")
    add("--list-methods", **switch, help="print all methods with their parameter counts")

    args = parser.parse_args(argv)
    command.nearest(args.dataset, DATASETS, "dataset")
    command.check_options(args, DATASETS[args.dataset].own)  # --windows becomes seconds
    check_method(petl.find(args.method), args)
    args.device = command.choose_device(args.device)
    args.dtype = command.choose_dtype(args.dtype, args.device)
    return args


def list_methods() -> None:
    """Print all methods with the parameters that each trains in AST-Base."""

    def counted(name, n_frames=500, n_classes=50):
        with torch.device("meta"):  # shapes without numbers
            model = AST(ASTConfig(n_frames=n_frames, n_classes=n_classes))
            return petl.count(petl.apply(model, name))

    print(f"{'method':<30}{'trained':>12}{'paper':>8}   {'lr':<8}{'row of the paper'}")
    for name, method in petl.METHODS.items():
        count = counted(name)
        trained = count["petl"] or count["head"]
        print(f"{name:<30}{trained:>12,}{method.paper:>8}   {method.lr:<8g}{method.where}")
    heads = [f"{counted('linear', n_classes=n)['head']:,}" for n in (50, 10, 35, 31)]
    short = counted("full_ft", 100, 35)["petl"]
    print()
    print(f"Base AST at 500 frames. full_ft has {short:,} at 100 frames.")
    print("Final LayerNorm and head are trained, too, but not counted.")
    print(f"They have {' / '.join(heads)} parameters for 50 / 10 / 35 / 31 classes.")
    print("Exceptions: the row of linear has both, full_ft and bitfit count the LayerNorm,")
    print("and probe has a larger head, which it counts.")


def start(argv: list[str] | None) -> None:
    args = parse(argv)
    if args.list_methods:
        list_methods()
        return
    with protected(args, DATASETS[args.dataset].batch_size):
        run(args)


def main(argv: list[str] | None = None) -> int:
    return command.exit_code(lambda: start(argv))


if __name__ == "__main__":
    sys.exit(main())
