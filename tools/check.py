"""Is everything right on this machine? One line for each thing that can go wrong: right, wrong, or not there.

    python -m tools.check                                               # the checkpoint is fetched
    python -m tools.check --weights FOLDER --data-dir ESC-50-master.zip
    python -m tools.check --esc50                                       # then trains a fold, linear and houlsby_par

The machine, the checkpoint and ESC-50 (see comparisons.py), then training by the loop of train.py: a step of every
method, the same steps twice, an interrupted run, and how long the paper's experiments will take. Each check is a
function of plain values that returns what it saw or raises what is wrong. The exit code is 1 if something is wrong.
"""

import argparse
import importlib.metadata
import io
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import soundfile
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file

import petl
import train
from data import DATASETS, RATE, Clips, fbank, to_input
from load_weights import load_ast
from support import records
from support.command import Parser, UserError, choose_device, choose_dtype, exit_code
from support.files import default_cache_dir
from support.progress import Bar, in_words
from support.speed import DTYPES, prepare
from support.variants import fitted
from tools import comparisons
from tools.bench import Bench, in_turn, memory_mb, pass_of, random_clips
from tools.cells import TABLES
from tools.comparisons import KINDS, NotThere, Wrong, limit, sound

ROOT = Path(__file__).parents[1]
SIZES = {  # clips of a fold that train, validate and test
    "esc50": (1200, 400, 400), "esc10": (240, 80, 80), "us8k": (7859, 0, 873), "gsc": (84_843, 9_981, 11_005),
    "fsc": (23_132, 3_118, 3_793),
}  # fmt: skip
CAUSES = (
    "position embeddings that are not the checkpoint's (see 'logits at 500 frames'), features or labels that are not "
    "the release's (see the lines of ESC-50), or training that did not learn (see loss and accuracy in metrics.csv)"
)


# ------------------------------------------------------------------------------------------------------ the machine


def versions() -> str:
    """All that requirements.txt asks for; the pin of torch is that of the tests."""
    wrong, seen = [], [f"python {platform.python_version()}"]
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        wanted = Requirement(line.split("#")[0].strip())
        version = importlib.metadata.version(wanted.name)
        wanted = Requirement("torch>=2.11") if wanted.name == "torch" else wanted
        seen.append(f"{wanted.name} {version}")
        wrong += [] if wanted.specifier.contains(version, prereleases=True) else [f"{wanted}, not {version}"]
    if wrong:
        raise Wrong(f"wanted: {', '.join(wrong)}; pip install -r requirements.txt")
    return ", ".join(seen)


def device(bench: Bench) -> str:
    """A product in the type that `auto` chooses, against the same in float64, and the memory there is."""
    a, b = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)).to(bench.device) for seed in (0, 1))
    exact = a.double().cpu() @ b.double().cpu()
    half = (a.to(DTYPES[bench.dtype]) @ b.to(DTYPES[bench.dtype])).double().cpu()
    limit(((half - exact).abs().max() / exact.abs().max()).item(), 0.02, f"products in {bench.dtype} and float64")
    name, memory = f"CPU, {torch.get_num_threads()} threads", ""
    if bench.device.type == "cuda":
        name = torch.cuda.get_device_name(bench.device)
        memory = ", {:.0f} of {:.0f} GB free".format(*(n / 1e9 for n in torch.cuda.mem_get_info(bench.device)))
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB of memory"
    return f"{name}, {bench.dtype}{memory}"


# ----------------------------------------------------------------------------------------------------------- training


def clips_of(n: int, n_frames: int, bench: Bench) -> Clips:
    """Features of one-second sounds of KINDS, as the cache holds them."""
    waves = np.stack([sound(KINDS[i % 3], 1.0, take=i // 3) for i in range(n)])
    features = to_input(fbank(torch.from_numpy(waves)), n_frames).half().to(bench.device)
    return Clips(features, torch.arange(n, device=bench.device) % 3)


def steps(name: str, n: int, backbone, bench: Bench):
    """The model before and after `n` steps of a method, its optimiser, and the losses."""
    method, n_frames = fitted(petl.find(name), backbone.config), backbone.config.n_frames
    settings = bench.settings(method={"name": name}, n_frames=n_frames, lr=method.lr, mask=True, epochs=10**9)
    model = train.adapted(backbone, method, 1, settings, bench)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    learner, clips = train.Learner(model, settings, bench), clips_of(n * bench.batch, n_frames, bench)
    train.seed_epoch(0, 1, 1)
    losses = train.train_epoch(learner, clips, [*range(n * bench.batch)], 1, settings, bench)
    return model, before, learner.optimizer, losses


def moves(name: str, backbone, bench: Bench) -> None:
    """Four steps: in the first, what starts behind a zero has no gradient, and adapter_plus may leave out all clips of
    another. A scaler of float16 skips some at first.

    Weight decay moves a tensor that never gets a gradient, so what the optimiser has seen of it counts as well.
    """
    model, before, optimizer, losses = steps(name, 10 if bench.dtype == "float16" else 4, backbone, bench)
    if not all(map(math.isfinite, losses)):
        raise Wrong(f"{name}: the losses are {losses}")
    for parameter_name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[parameter_name])
        if parameter.requires_grad and not (moved and optimizer.state[parameter]["exp_avg"].any()):
            raise Wrong(f"{name}: {parameter_name} does not learn")
        if moved and not parameter.requires_grad:
            raise Wrong(f"{name}: {parameter_name} is frozen, and has moved")


def methods(weights: str, bench: Bench) -> str:
    backbone = load_ast(weights, 100, 3)
    for name in Bar(petl.METHODS, "methods", unit="method", leave=False):
        moves(name, backbone, bench)
    return f"{len(petl.METHODS)} methods, {bench.dtype}: finite losses; what is to learn moves, and nothing else"


def same(one: dict, other: dict, bench: Bench, what: str) -> str:
    """On a CPU every bit. A GPU may add up in another order each time: there to a tenth of the length, as vectors."""
    if one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one):
        return f"{what} give the same, bit for bit"
    a, b = (torch.cat([run[name].flatten() for name in sorted(run)]) for run in (one, other))
    return limit(((a - b).norm() / b.norm()).item(), 0 if bench.device.type == "cpu" else 0.1, what)


def repeats(weights: str, bench: Bench) -> str:
    backbone, runs = load_ast(weights, 100, 3), []
    for _ in range(2):
        model, *_, losses = steps("houlsby_par", 3, backbone, bench)
        runs.append({"loss": torch.tensor(losses), **train.trained_tensors(model)})
    return same(*runs, bench, "three steps and once more the same")


def resumes(weights: str, bench: Bench) -> str:
    """train.py unbroken, and train.py that is interrupted after its first epoch and then resumed."""
    save = records.save_progress

    def interrupted(*args):
        save(*args)
        raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as folder:
        for kind, take in product(KINDS, range(5)):  # no clips to validate: what the last epoch leaves is compared
            file = Path(folder, "sounds", "train" if take else "test", kind, f"{take}.wav")
            file.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(file, sound(kind, 1.0, take), RATE)

        def run(out, *more):
            words = ("--dataset", "folder", "--data-dir", f"{folder}/sounds", "--weights", weights, "--epochs", 2,
                     "--batch-size", 4, "--device", bench.device, "--dtype", bench.dtype, "--cache-dir", folder,
                     "--out", f"{folder}/{out}", *more)  # fmt: skip
            with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()) as errors:
                code = train.main([str(word) for word in words])
            return code, said.getvalue() + errors.getvalue()

        first = run("unbroken")
        with mock.patch.object(records, "save_progress", interrupted):
            broken = run("resumed")
        last = run("resumed", "--resume")
        if (first[0], broken[0], last[0]) != (0, 130, 0) or "going on after epoch 1" not in last[1]:
            raise Wrong(f"train.py ended with {first[0]}, {broken[0]}, {last[0]}: {last[1].strip()[-300:]}")
        file = "folder/houlsby_par/seed0/fold1.safetensors"
        trained = (load_file(Path(folder, out, file)) for out in ("unbroken", "resumed"))
        return same(*trained, bench, "an unbroken run and a resumed one")


@lru_cache
def speed(weights: str, n_frames: int, bench: Bench) -> tuple[float, float, float | None]:
    """Seconds a clip of training and of evaluation, and MB of memory, of houlsby_par."""
    model = prepare(petl.apply(load_ast(weights, n_frames, 50), "houlsby_par"), bench.dtype, bench)
    clips = random_clips(bench.batch, n_frames, bench)
    (step, learner), (test, _) = (pass_of(what, model, clips, bench) for what in ("houlsby_par", None))
    seconds = in_turn({"step": step, "test": test}, bench.repeats)
    step_s, test_s = (min(seconds[what]) / bench.batch for what in ("step", "test"))
    return step_s, test_s, memory_mb(step, learner)


def fold_of(dataset: str, weights: str, bench: Bench) -> str:
    recipe = DATASETS[dataset]
    batch = recipe.batch_size if bench.device.type == "cuda" else bench.batch
    step, test, memory = speed(weights, recipe.n_frames, replace(bench, batch=batch))
    n_train, n_val, n_test = SIZES[dataset]
    seconds = recipe.epochs * (n_train * step + n_val * test) + n_test * test
    used = "" if memory is None else f", {memory:,.0f} MB"
    return f"{in_words(seconds)} ({1 / step:,.1f} clips/s in batches of {batch}{used})"


def accuracy(method: str, weights: str | None, data_dir: Path | None, cache_dir: Path, device: str, out: Path) -> str:
    """Train fold 1 of ESC-50, or go on with it, and compare with what was published."""
    if weights is None:
        raise NotThere("the checkpoint, see above")
    comparisons.find_esc50(data_dir, cache_dir, True)
    words = ["--dataset", "esc50", "--method", method, "--folds", "1", "--weights", weights, "--device", device]
    words += ["--data-dir", str(data_dir)] if data_dir else []
    with redirect_stdout(sys.stderr):
        code = train.main([*words, "--cache-dir", str(cache_dir), "--out", str(out), "--resume"])
    if code:
        raise Wrong(f"train.py ended with {code}, see what it says")
    result = json.loads((out / "esc50" / method / "seed0" / "result.json").read_text())
    return verdict(method, result["accuracy"])


def verdict(method: str, percent: float) -> str:
    table = TABLES["table1"]
    paper = next(table.numbers[row, "esc50"] for row, name in table.rows.items() if name == method)
    text = f"{percent:.2f} % (published: {paper} with its position embeddings at zero; full fine-tuning with them 95.6)"
    if method == "houlsby_par" and percent < 85:
        raise Wrong(f"{text}. What makes it less than 85 is likely {CAUSES}")
    return text


# ------------------------------------------------------------------------------------------------------- the command


def report(name: str, check: Callable[[], str]) -> str:
    """Run a check and print its line. Whatever it raises is what is wrong."""
    try:
        status, text = "right", check()
    except NotThere as error:
        status, text = "not there", str(error)
    except Exception as error:
        known = isinstance(error, Wrong | UserError)
        status, text = "wrong", str(error) if known else f"{type(error).__name__}: {error}"
    print(f"{status:<11}{name:<26}{' '.join(text.split())}", flush=True)
    return status


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("python -m tools.check", description="Say what is right, wrong or not there on this machine.")
    add = parser.add_argument
    add("--weights", default="audioset", help="the checkpoint's folder, if it cannot be fetched")
    add("--data-dir", type=Path, help="ESC-50 or its archive")
    add("--esc50", action="store_true", help="then train fold 1 of ESC-50 with linear and with houlsby_par")
    add("--out", type=Path, default=Path("runs/check"), help="for these two folds (%(default)s)")
    add("--cache-dir", type=Path, default=default_cache_dir(), help="for downloads and features (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--stand-in", default="random:base", help=argparse.SUPPRESS)  # trains where there is no checkpoint
    args = parser.parse_args(argv)
    args.device = choose_device(args.device)
    return args


def run(args: argparse.Namespace) -> int:
    gpu = args.device.type == "cuda"
    bench = Bench(args.device, dtype=choose_dtype("auto", args.device), batch=2, repeats=5 if gpu else 1)
    data = (args.data_dir, args.cache_dir, args.esc50)
    found = [report("versions", versions), report("device", partial(device, bench))]
    opened = report("checkpoint", partial(comparisons.opens, args.weights))
    weights = None if opened == "not there" else args.weights
    usable = args.weights if opened == "right" else args.stand_in
    checks = {
        "front end": partial(comparisons.front_end, weights), "tensors": partial(comparisons.tensors, weights),
        "logits at 1024 frames": partial(comparisons.logits, weights, 1024),
        "logits at 500 frames": partial(comparisons.logits, weights, 500),
        "tags": partial(comparisons.tags, weights),
        "tags on the device": partial(comparisons.tags_on, bench.device, bench.dtype, weights),
        "ESC-50, labels": partial(comparisons.esc50_labels, *data),
        "ESC-50, features": partial(comparisons.esc50_features, *data),
        "a step of every method": partial(methods, usable, bench), "repeating": partial(repeats, usable, bench),
        "resuming": partial(resumes, usable, bench),
        **{f"time for a fold of {name}": partial(fold_of, name, usable, bench) for name in SIZES},
    }  # fmt: skip
    if args.esc50:
        where = (weights, args.data_dir, args.cache_dir, str(args.device), args.out)
        checks |= {f"ESC-50, {name}": partial(accuracy, name, *where) for name in ("linear", "houlsby_par")}
    found += [opened, *(report(name, check) for name, check in checks.items())]
    print(f"{found.count('right')} right, {found.count('wrong')} wrong, {found.count('not there')} not there")
    return 1 if "wrong" in found else 0


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
