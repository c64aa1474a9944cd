"""Adapt an Audio Spectrogram Transformer to a dataset, test it, write down what came out.

    python train.py                                         # sounds made here, the small backbone in weights/
    python train.py --method houlsby_par --dataset esc50

`train_epoch` is the training loop, `train_fold` trains and tests a fold, `run` goes over seeds and folds, `parse` reads
the command line. From section III-A: AdamW, weight decay, cosine annealing. From the authors' code: cross-entropy, no
warm-up. Tested are the weights of the best epoch by the validation clips, else of the last. Test clips are seen once.
"""

import argparse
import copy
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import petl
from ast_model import AST, POOL, ASTConfig, make_head
from data import DATASETS, FPS, Clips, Split, folds_of, frames_for, load_clips, load_dataset, patchout, spec_augment
from load_weights import live_tensors, load_ast, load_tensors, read_header, save_trained, to_dict, trained_tensors
from support import command, console, ledger, records, speed
from support.files import default_cache_dir
from support.processes import average, is_first, mean_over_ranks, process_group, say, shares, wait_for_all
from support.records import Settings
from support.scores import class_weights
from support.speed import Learner, Machine, autocast
from support.variants import fitted, override
from support.vectors import probed

BETAS, EPS, WEIGHT_DECAY = (0.9, 0.98), 1e-6, 0.1  # of AdamW; the first two as in the authors' code

# ------------------------------------------------------------------------------------------------------ the training


def make_learner(network: nn.Module, settings: Settings, machine: Machine) -> Learner:
    """AdamW on all that trains in `network`: the model or, of a probe, its last layers alone.

    Of the Learner, `backward` adds to the gradients; `step` sets the learning rate, steps and clears them. No clipping.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    fused = machine.device.type == "cuda"
    optimizer = torch.optim.AdamW(trained, settings.lr, BETAS, EPS, WEIGHT_DECAY, fused=fused)
    return Learner(network, optimizer, settings.dtype, machine)


def cosine(lr: float, step: int, steps: int) -> float:
    """Cosine annealing from `lr` at step 0 to zero at `steps`."""
    return lr * 0.5 * (1 + math.cos(math.pi * step / steps))


def seed_epoch(seed: int, fold: int, epoch: int) -> None:
    """All random numbers of an epoch follow from these three, so a resumed run draws what an unbroken one would."""
    torch.manual_seed((seed * 1000 + fold) * 100_000 + epoch)


def train_epoch(
    learner: Learner, clips: Clips, indices: torch.Tensor, rates: list[float], settings: Settings, machine: Machine
) -> list[float]:
    """One pass over the clips `indices` in random order, one step for each of the learning rates. Returns the losses.

    `shares` deals a batch out to micro-batches and processes; its weight undoes the mean over processes (alone:
    weight 1). Order, masks and kept patches are drawn for the whole batch, so dealing it out does not change them;
    dropout and BatchNorm see the share alone.
    """
    learner.network.train()
    of_class = class_weights(clips.labels, indices, machine.device) if settings.balance else None
    order = indices[torch.randperm(len(indices))].to(clips.features.device)
    losses = torch.zeros(len(rates), device=machine.device)
    for step, batch in enumerate(order.split(settings.batch_size)):
        draws, kept = torch.rand(len(batch), 4, device=machine.device), None
        if settings.keep:
            n_patches = learner.network.config.n_patches
            kept = patchout(torch.rand(len(batch), n_patches, device=machine.device), settings.keep)
        for share, weight in shares(len(batch), machine.micro_batch):
            x, y = clips.batch(batch[share], machine.device)
            if settings.mask:
                x = spec_augment(x, draws[share], max_frames=settings.mask_frames)
            logits = learner.logits(x) if kept is None else learner.logits(x, kept[share])  # a probe takes x alone
            loss = F.cross_entropy(logits, y, of_class, reduction="sum") / len(batch) * weight
            learner.backward(loss)
            losses[step] += loss.detach()
        learner.step(rates[step])
    return mean_over_ranks(losses).tolist()


def train_fold(
    model: AST, clips: Clips, split: Split, fold: int, settings: Settings, state_file: Path, machine: Machine
) -> dict:
    """Train one fold and test it; `model` ends with the tested weights. Returns what the header of its file says of it.

    `state_file` holds the state after the last finished epoch; with `machine.resume` training goes on from there.
    Raises UserError when the loss is not finite.
    """
    progress, state = records.read_progress(state_file, fold, machine.resume)
    network, clips = probed(model, clips, split, settings, machine)  # if only the head learns: it, on vectors
    learner = make_learner(network, settings, machine)
    if state:
        load_tensors(model, state["tensors"], state_file)
        learner.load_state(state)
    console.forecast(learner, progress, split, settings, machine)  # after three steps it says how long it will take
    steps = math.ceil(len(split.train) / settings.batch_size)  # in an epoch
    for epoch in console.epochs_left(progress, settings.epochs):
        seed_epoch(settings.seed, fold, epoch)
        rates = [cosine(settings.lr, steps * (epoch - 1) + i, steps * settings.epochs) for i in range(steps)]
        losses = train_epoch(learner, clips, torch.tensor(split.train), rates, settings, machine)
        average(tensor for tensor in live_tensors(model).values() if not tensor.requires_grad)  # BatchNorm's
        progress.trained(losses, rates, len(split.train))
        validated = evaluate(network, clips, split.val, settings, machine)
        tensors = trained_tensors(model)
        progress.validated(*validated, tensors, settings.best)  # remembers the best epoch, or the last
        records.save_progress(state_file, progress, {"tensors": tensors, **learner.state()})
    load_tensors(model, progress.best["tensors"], state_file)
    return progress.outcome(*evaluate(network, clips, split.test, settings, machine))


@torch.inference_mode()
def evaluate(network: nn.Module, clips: Clips, indices: list[int], settings: Settings, machine: Machine) -> tuple:
    """Accuracy in percent, None without clips; class and probability of each answer, (clips, 2); and logits (clips,
    classes) with labels (clips,). Processes take shares, batches what memory allows."""
    network.eval()

    def logits_of(index):
        with autocast(machine.device, settings.dtype):
            return network(clips.batch(index, machine.device)[0])

    index = torch.tensor(indices, dtype=torch.long, device=clips.features.device)
    logits = speed.in_batches(logits_of, index, settings.batch_size, machine).cpu()
    labels, probability = clips.labels[index].cpu(), logits.softmax(1).amax(1).nan_to_num()  # float16 may overflow
    right = (logits.argmax(1) == labels).sum().item()
    predicted = torch.stack([logits.argmax(1), probability], dim=1)
    return 100 * right / len(indices) if indices else None, predicted, (logits, labels)


# ----------------------------------------------------------------------------------------------------------- the run


def run(args: argparse.Namespace) -> dict:
    """Train and test every fold of every seed that is not finished yet. Returns what it writes to result.json."""
    started, recipe = time.perf_counter(), DATASETS[args.dataset]
    weights = args.weights or recipe.weights
    changes = {"rr": args.rr, "alpha": args.alpha, "prompts": args.prompts, "kernel": args.kernel}
    override(petl.find(args.method), **changes)  # errors now, not after a download
    dataset = load_dataset(args.dataset, args.data_dir, args.cache_dir, args.group, args.windows)
    ahead = command.chosen_folds(args.folds, list(dataset.folds) or [1], args.dataset)
    n_frames = frames_for(recipe, dataset, args.seconds)
    pretrained = load_ast(weights, n_frames, len(dataset.classes), args.pool)
    lr = args.lr or recipe.lr.get(args.method)
    # On a narrow backbone other RR, prompts and, for full_ft and linear, rates than in METHODS: support/variants.py.
    method = fitted(petl.find(args.method), pretrained.config, lr, **changes, blocks=args.blocks, keep=args.keep)
    clips, bad = load_clips(dataset, n_frames, args.device, args.cache_dir, args.skip_bad)
    home = args.out / args.dataset / method.name
    left = console.folds_left(home, args.seed, ahead)
    machine = Machine(args.device, args.micro_batch, args.compile, args.recompute, args.resume, forecast=left)

    results = {}
    for seed in args.seed:
        folds = folds_of(dataset, seed, bad, args.shots)
        table = records.split_table(dataset, folds, bad)
        settings = Settings(
            dataset=args.dataset, weights=weights, backbone=pretrained.backbone.sha256, method=to_dict(method),
            pool=args.pool, seed=seed, shots=args.shots, clips=ledger.hash_of(table), n_frames=n_frames,
            epochs=args.epochs or recipe.epochs, batch_size=args.batch_size or recipe.batch_size, lr=method.lr,
            dtype=args.dtype, keep=args.keep, balance=args.balance, best="balanced" if recipe.own else "accuracy",
            **recipe.masks(n_frames, not args.no_mask),
        )  # fmt: skip
        folder = home / f"seed{seed}"
        records.start_run(folder, settings, table, dataset, bad, vars(args))
        say(console.describe(settings, n_frames / FPS, args.device))
        for fold in ahead:
            file = folder / f"fold{fold}.safetensors"
            if not file.exists():
                model = adapted(pretrained, method, fold, settings, machine)
                outcome = train_fold(model, clips, folds[fold], fold, settings, file.with_suffix(".resume.pt"), machine)
                finish_fold(model, file, {**outcome, "classes": dataset.classes, "settings": asdict(settings)})
                machine = replace(machine, forecast=0)  # once is enough
            if is_first():
                say(console.describe_fold(read_header(file, "result")["result"], settings.best))
        wait_for_all()
        results[seed] = console.summarise(folder, settings, started)
    return results[args.seed[0]] if len(results) == 1 else console.summarise_seeds(home, results)


def adapted(pretrained: AST, method: petl.Method, fold: int, settings: Settings, machine: Machine) -> AST:
    """A copy of the pretrained model with a new head and the method's parts, drawn by seed and fold."""
    seed_epoch(settings.seed, fold, epoch=0)
    model = copy.deepcopy(pretrained)
    model.head = make_head(model.config)  # that of load_ast was drawn without the seed
    return speed.prepare(petl.apply(model, method), settings.dtype, machine)


def finish_fold(model: AST, file: Path, header: dict) -> None:
    """Write the trained tensors; with that file the fold counts as finished."""
    if is_first():
        save_trained(model, file, {**header, "parameters": petl.count(model), "versions": records.versions()})
        file.with_suffix(".resume.pt").unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ the command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command.Parser(description="Adapt an Audio Spectrogram Transformer to a dataset and test it.")
    add = parser.add_argument
    add("--dataset", default="demo", help=", ".join(DATASETS))
    add("--method", default="houlsby_par", help="a name that --list-methods prints")
    add("--data-dir", type=Path, help="the dataset or its archive, else it is downloaded; or your own sounds")
    add("--weights", help="audioset, demo, hf:owner/name, a file or folder, random:base|small|tiny|demo; default: the "
        "dataset's")  # fmt: skip
    add("--pool", default="mean", choices=POOL, help="how tokens become one vector; the paper takes the mean")
    add("--folds", type=command.numbers, metavar="1,2", help="only these folds")
    add("--seed", type=command.numbers, default=[0], metavar="0,1,2", help="one run for each of these seeds")
    add("--seconds", type=float, help="cut or pad clips to this; default: the dataset's, or that of most of your clips")
    add("--group", metavar="REGEX", help="of own sounds: its first parenthesis finds in a path what stays in one part")
    add("--windows", action="store_true", help="cut the recordings of --dataset folder into windows of --seconds")
    add("--shots", type=command.positive, metavar="K", help="train on K clips per class only")
    add("--epochs", type=command.positive, help="default: the dataset's")
    add("--batch-size", type=command.positive, help="over all processes; default: the dataset's")
    add("--micro-batch", type=command.positive, help="clips at once on a device; all but dropout and BatchNorm stays")
    add("--lr", type=float, help="first learning rate; default: the method's")
    add("--rr", type=command.positive, help="reduction rate: the bottleneck is dim / RR wide")
    add("--alpha", type=float, help="LoRA scales its update by alpha / RR")
    add("--prompts", type=command.positive, help="number of prompts or prefixes")
    add("--kernel", type=command.positive, help="of a conformer adapter: tokens in its window (31; paper, ESC-50: 8)")
    add("--blocks", type=command.span, metavar="9-12", help="the method changes these blocks alone: faster")
    add("--keep", type=float, metavar="0.4", help="train on this random share of the patches only: faster")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", default="auto", choices=["auto", *speed.DTYPES], help="of the arithmetic; trained tensors: float32")
    add("--compile", action="store_true", help="torch.compile the model for training")
    add("--recompute", action="store_true", help="keep less for the backward pass and compute it again: saves memory")
    add("--balance", action="store_true", help="weigh the loss so that every class counts alike, however few its clips")
    add("--no-mask", action="store_true", help="leave SpecAugment out where the dataset's protocol has it")
    add("--skip-bad", action="store_true", help="go on without sound files that cannot be read")
    add("--resume", action="store_true", help="continue an interrupted fold after its last finished epoch")
    add("--out", type=Path, default=Path("runs"), help="results go to OUT/DATASET/METHOD/seedS")
    add("--cache-dir", type=Path, default=default_cache_dir(), help="for downloads and features (%(default)s)")
    add("--list-methods", action="store_true", help="print all methods with their parameter counts")
    args = parser.parse_args(argv)
    command.nearest(args.dataset, DATASETS, "dataset")
    command.check_options(args, DATASETS[args.dataset].own)  # --windows becomes seconds
    args.device = command.choose_device(args.device)
    args.dtype = command.choose_dtype(args.dtype, args.device)
    return args


def list_methods() -> None:
    """The table of methods with the parameters that each trains in the base AST, as `petl.count` tells them apart."""

    def counted(name, n_frames, n_classes):
        with torch.device("meta"):  # shapes without numbers
            return petl.count(petl.apply(AST(ASTConfig(n_frames=n_frames, n_classes=n_classes)), name))

    print(f"{'method':<30}{'trained':>12}{'paper':>8}   {'lr':<8}{'row of the paper'}")
    for name, method in petl.METHODS.items():
        count = counted(name, 500, 50)
        print(f"{name:<30}{count['petl'] or count['head']:>12,}{method.paper:>8}   {method.lr:<8g}{method.where}")
    heads = " / ".join(f"{counted('linear', 500, n)['head']:,}" for n in (50, 10, 35, 31))
    print(f"\nBase AST at 500 frames. On top come final LayerNorm and head, {heads}\nfor 50 / 10 / 35 / 31 classes: "
          "all of linear. full_ft and bitfit count this LayerNorm already, probe its head.\nAt 100 frames full_ft has "
          f"{counted('full_ft', 100, 35)['petl']:,}.")  # fmt: skip


def start(argv: list[str] | None) -> None:
    args = parse(argv)
    if args.list_methods:
        return list_methods()
    tried = args.micro_batch or args.batch_size or DATASETS[args.dataset].batch_size
    with command.explained(args.device, tried, args.out, args.cache_dir), process_group(args.device):
        run(args)


def main(argv: list[str] | None = None) -> int:
    return command.exit_code(lambda: start(argv))


if __name__ == "__main__":
    sys.exit(main())
