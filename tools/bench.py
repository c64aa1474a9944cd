"""How fast training is and how much memory it takes, beside transformers and peft in one process.

    python -m tools.bench   # clips of five seconds, as in docs/speed.md; --quick: of one second
    python -m tools.bench --rows lora full_ft --batch-size 32 128

A row is a training step of a method, or something else of ROWS. The contestants run in turn, so a
busy machine slows all of them, and the median counts. They have the same random weights of the base
AST with a head of 50 classes, the same batch, optimizer, type, and threads or GPU. Their logits
must agree before the clock starts. The loop of train.py trains both. peft adds LoRA to
transformers. It has no Houlsby adapter, so that row is ours alone. --compile compiles both for
training, as in train.py.

The memory is that of the weights, of the optimizer, and of what a step needs beyond them.
"""

import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

import data
import petl
import train
from load_weights import load_ast
from support.command import (
    Parser,
    choose_device,
    choose_dtype,
    exit_code,
    needed,
    out_of_memory,
    positive,
    warn,
)
from support.files import write_json
from support.records import check_not_of_run, forget_peak, peak_memory
from support.speed import DTYPES, Machine
from support.vectors import skip_frozen
from tools.export import write_hf

N_CLASSES = 50
# The row `linear` is a step of the second epoch, when our backbone has nothing to do any more.
ROWS = ("lora", "houlsby_par", "full_ft", "inference", "linear", "features")
COLUMNS = ("row", "batch", "contestant", "ms_per_clip", "spread", "ratio", "memory_mb")
LINE = "| {:<11} | {:>5} | {:<10} | {:>11} | {:>6} | {:>5} | {!s:>9} |"


@dataclass(frozen=True)
class Bench(Machine):
    """The machine, and what all measurements of one command have in common."""

    dtype: str = "float32"
    n_frames: int = 500
    batch: int = 4  # clips at once
    repeats: int = 3
    weights: str = "random:base"

    def settings(self, lr: float = 1e-4, mask_frames: int = 0) -> train.Settings:
        """The settings of a run on random clips."""
        return train.Settings(
            dataset="random",
            weights=self.weights,
            backbone="",
            method={},
            pool="mean",
            seed=0,
            shots=None,
            clips="",
            n_frames=self.n_frames,
            epochs=10**9,
            batch_size=self.batch,
            lr=lr,
            head_lr=lr,
            mask_frames=mask_frames,
            dtype=self.dtype,
        )


# ------------------------------------------------------------------------------------- contestants


def theirs(folder, method):
    """The same model with transformers and peft. UserError where they are not installed."""
    with needed("the comparison needs", "-r requirements-dev.txt"):
        import peft
        import transformers
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForAudioClassification.from_pretrained(folder)
    last = ["audio_spectrogram_transformer.layernorm", "classifier"]
    if method == "lora":
        (lora,) = petl.METHODS["lora"].parts
        rank = petl.rank_of(model.config.hidden_size, lora.rr)
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=lora.alpha / lora.rr * rank,
            target_modules=["q_proj", "v_proj"],
            modules_to_save=last,
        )
        model = peft.get_peft_model(model, config)
    elif method != "full_ft":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(tuple(last)))
    # A call returns the logits alone, as a call of our model does.
    model.register_forward_hook(lambda model, inputs, output: output.logits)
    return model


def contestants(method, bench):
    """Our model and theirs by name, or ours alone. Their logits are equal.

    Without a method, final LayerNorm and head alone are trained.
    """
    torch.compiler.reset()  # torch compiles a function a few times only: other rows must not count
    ours = load_ast(bench.weights, bench.n_frames, N_CLASSES, "cls_dist")
    with tempfile.TemporaryDirectory() as folder:
        write_hf(ours, {}, Path(folder))
        other = None if method == "houlsby_par" else theirs(Path(folder), method)
    ours = bench.prepare(petl.apply(ours, method or "linear"), bench.dtype)
    if other is None:
        return {"ours": ours}
    other = other.to(bench.device)
    x = random_clips(bench.batch, bench).features.float()
    with torch.inference_mode(), bench.autocast(bench.dtype):
        difference = (ours.eval()(x) - other.eval()(x)).abs().max().item()
    if not difference < (1e-3 if bench.dtype == "float32" else 0.1):
        raise RuntimeError(f"they do not compute the same: logits differ by {difference:.2g}")
    return {"ours": ours, "theirs": other}


def random_clips(n, bench):
    """Clips of noise, on the device."""
    torch.manual_seed(0)
    features = torch.randn(n, bench.n_frames, data.N_MELS).half()
    labels = torch.arange(n, device=bench.device) % N_CLASSES
    return data.Clips(features.to(bench.device), labels)


def pass_of(method, network, clips, bench):
    """A function that trains an epoch by the loop of train.py. Without a method it evaluates."""
    learner = train.Learner(network, bench.settings(), bench)
    every = list(range(len(clips.labels)))
    if method is None:
        return lambda: train.evaluate(learner, clips, every)
    return lambda: train.train_epoch(learner, clips, every, 1).tolist()


# --------------------------------------------------------------------------------------- measuring


def in_turn(ways, repeats):
    """Seconds of `repeats` calls of each function by its name, one after the other in every round.

    All calls end by reading a number, which waits for the device. In its turn each is called twice,
    and the second call counts. The first call gets back the memory that the others have taken.
    """
    seconds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            way()
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def memory_mb(step, network):
    """Memory of the weights, of the optimizer, and of a step at its peak, in MB. None if unknown.

    AdamW keeps two numbers for each trained one.
    """
    if not forget_peak():
        return None
    before = peak_memory()
    step()
    taken = peak_memory() - before
    for tensor in [*network.parameters(), *network.buffers()]:
        taken += tensor.nbytes * (3 if tensor.requires_grad else 1)
    return round(taken / 1e6)


def measure(row, bench):
    """A row of the table for every contestant, which is printed.

    The time is the median. `spread` is half the range from the fastest to the slowest, in percent
    of it. `ratio` is how much faster ours is. Our linear probe trains on vectors that its first
    epoch has kept.
    """
    models = {}
    if row == "features":
        ways = features(bench)
    else:
        method = None if row == "inference" else row
        models = contestants(method, bench)
        clips = random_clips(bench.batch, bench)
        ways = {name: pass_of(method, model, clips, bench) for name, model in models.items()}
        if method == "linear":
            network, vectors = skip_frozen(models["ours"], clips, bench.settings(), bench)
            ways["ours"] = pass_of(method, network, vectors, bench)
    times = in_turn(ways, bench.repeats)
    results = []
    for name, seconds in times.items():
        middle = median(seconds)
        ms = round(1e3 * middle / bench.batch, 3)
        spread = round(50 * (max(seconds) - min(seconds)) / middle, 1)
        ratio = round(middle / median(times["ours"]), 2)
        memory = memory_mb(ways[name], models[name]) if models else None
        values = (row, bench.batch, name, ms, spread, ratio, memory)
        print(LINE.format(*values), flush=True)
        results.append(dict(zip(COLUMNS, values, strict=True)))
    return results


def features(bench):
    """Waveforms to features, one by one: ours, and the extractor of transformers.

    The extractor uses torchaudio where that is installed.
    """
    from transformers import ASTFeatureExtractor

    waves = 0.1 * torch.randn(bench.batch, bench.n_frames * data.HOP)
    extractor = ASTFeatureExtractor(max_length=bench.n_frames)
    return {
        "ours": lambda: [data.to_input(data.fbank(wave[None]), bench.n_frames) for wave in waves],
        "theirs": lambda: [extractor(wave.numpy(), data.RATE) for wave in waves],
    }


# ------------------------------------------------------------------------------------- the command


def describe(bench):
    """The machine and what else the numbers depend on."""
    where = f"CPU, {torch.get_num_threads()} threads"
    if bench.device.type == "cuda":
        where = torch.cuda.get_device_name(bench.device)
    compiled = "compiled, " if bench.compile else ""
    frames = f"clips of {bench.n_frames} frames"
    return f"{where}, {bench.dtype}, {compiled}{frames}, torch {torch.__version__}"


def run(argv):
    parser = Parser(
        "python -m tools.bench",
        description="Measure speed and memory of training, inference and features.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="clips of one second instead of five")
    add("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW", help=", ".join(ROWS))
    add("--batch-size", nargs="+", type=positive, metavar="N", help="one or more; default: 4 or 32")
    add("--compile", action="store_true", help="compile all models for training (torch.compile)")
    add("--json", type=Path, metavar="FILE", help="also write all numbers to this file")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", default="auto", choices=["auto", *DTYPES])
    add("--weights", default="random:base", help="the model, as for train.py (%(default)s)")
    args = parser.parse_args(argv)
    if args.json:
        check_not_of_run(args.json)
    device = choose_device(args.device)
    on_gpu = device.type == "cuda"
    bench = Bench(
        device,
        compile=args.compile,
        dtype=choose_dtype(args.dtype, device),
        n_frames=100 if args.quick else 500,
        repeats=20 if on_gpu else 3,
        weights=args.weights,
    )
    warnings.filterwarnings("ignore", module="transformers")  # of its own next version
    print(describe(bench))
    print(LINE.format(*COLUMNS))
    print("|---|--:|---|--:|--:|--:|--:|")
    results = []
    for batch in args.batch_size or [32 if on_gpu else 4]:
        for row in args.rows:
            try:
                results += measure(row, replace(bench, batch=batch))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                warn(f"out of memory: {row}, {batch} clips at once")
    if args.json:
        write_json(args.json, {"machine": describe(bench), "results": results})


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
