"""How fast it is, beside transformers and peft in one process, and against its own arithmetic.

    python -m tools.bench        # the table of tools/README.md; --quick for a short one, --json FILE for programs
    python -m tools.bench fold   # a fold end to end, see bench_fold.py

The contestants run in turn, so that a busy machine slows all of them, and the median counts. They have the same random
weights of the base AST with the head of 50 classes, the same batch, optimiser, type, and threads or GPU; before the
clock starts, their logits must agree. All are trained by the loop of train.py. `sdpa` and `eager` are transformers with
its two ways of attention, LoRA by peft. peft has no Houlsby adapters: transformers gets ours, added by forward hooks.
With --compile everybody is compiled. Memory is that of the model, of the optimiser, and of what a step needs beyond
them. The rate of operations (see `flops`) is also given as a share of that of one large product, measured in turn.
"""

import argparse
import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import petl
import train
from petl_more import Patchout
from ast_model import AST, ASTConfig
from load_weights import load_ast
from support.command import Parser, UserError, choose_device, choose_dtype, exit_code, positive
from support.files import write_json
from support.records import Settings, forget_peak, peak_memory
from support.speed import DTYPES, Machine, autocast, prepare
from support.vectors import probed
from tools import bench_fold
from tools.export import write_hf

N_CLASSES = 50
STEPS = {"LoRA step": "lora", "Houlsby parallel step": "houlsby_par", "full fine-tuning step": "full_ft",
         "inference": None}  # fmt: skip
ROWS = [(step, n_frames) for n_frames in (500, 100) for step in STEPS]
QUICK = [(step, n_frames) for step, n_frames in ROWS if n_frames == 100 or step == "LoRA step"]


@dataclass(frozen=True)
class Bench(Machine):
    """The machine, and what else all measurements of one command have in common."""

    dtype: str = "float32"
    batch: int = 4  # clips at once
    repeats: int = 3
    weights: str = "random:base"
    quick: bool = False

    def settings(self, **changes) -> Settings:
        """What a run on random clips looks at, and placeholders for the rest."""
        return replace(Settings(
            dataset="random", weights=self.weights, backbone="", method={}, pool="mean", seed=0, shots=None, clips="",
            n_frames=500, epochs=1, batch_size=self.batch, lr=1e-4, mask=False, dtype=self.dtype,
        ), **changes)  # fmt: skip


# -------------------------------------------------------------------------------------------------------- arithmetic


def flops(config: ASTConfig, method: str | None) -> int:
    """Floating-point operations of the matrix products for one clip: a training step, or inference for method None.

    PyTorch counts them, on the meta device, where nothing is computed: two for each multiplication with its addition,
    forward and backward, of all linear layers and convolutions, and of attention's scores and mixing as plain products
    (what flash attention computes a second time is no useful work). Gradients that no trained weight asks for are not
    counted, as they are not computed.
    """
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model = petl.apply(AST(config), method or "linear")
        logits = model(torch.empty(1, config.n_frames, config.n_mels))
        if method is not None:
            logits.sum().backward()
    return counter.get_total_flops()


def large_product(tokens: int, bench: Bench) -> tuple[Callable, float]:
    """Multiplies (tokens, 768) with (768, 3072) five times, in the fastest way this PyTorch has; and GFLOP of that."""
    linear = prepare(nn.Linear(768, 3072, bias=False).requires_grad_(False), bench.dtype, replace(bench, compile=False))
    x = torch.randn(tokens, 768, device=bench.device, dtype=DTYPES[bench.dtype])

    @torch.inference_mode()
    def products():
        for _ in range(5):
            y = linear(x)
        return y[0, 0].item()

    return products, 5 * 2 * tokens * 768 * 3072 / 1e9


# ------------------------------------------------------------------------------------------------------- contestants


def theirs(folder: Path, attention: str, method: str | None) -> nn.Module:
    """The same model with transformers and peft. UserError where they are not installed."""
    library = bench_fold.transformers()
    model = library.AutoModelForAudioClassification.from_pretrained(folder, attn_implementation=attention)
    ast, dim = model.audio_spectrogram_transformer, model.config.hidden_size
    if method == "lora":
        model = bench_fold.with_lora(model, *petl.METHODS["lora"].parts)
    elif method != "full_ft":
        trained = "classifier|layernorm" if method == "houlsby_par" else r"classifier|transformer\.layernorm"
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(bool(re.search(trained, name)))
    if method == "houlsby_par":
        rank = petl.rank_of(dim, petl.METHODS["houlsby_par"].parts[0].rr)
        for layer in ast.layers:
            layer.a, layer.b = petl.Bottleneck(dim, rank), petl.Bottleneck(dim, rank)
            layer.attention.register_forward_hook(lambda _, u, out, a=layer.a: (out[0] + a(u[0]), *out[1:]))
            layer.mlp.register_forward_hook(lambda _, u, out, b=layer.b: out + b(u[0]))
    model.forward = lambda fbank, forward=model.forward: forward(input_values=fbank).logits  # called as ours is
    return model


def contestants(method: str | None, n_frames: int, bench: Bench) -> dict[str, nn.Module]:
    """Models with equal logits; `method` None or "linear" leaves the plain model, with the backbone frozen."""
    torch.compiler.reset()  # torch compiles a function a few times, then gives up: other rows must not count
    ours = load_ast(bench.weights, n_frames, N_CLASSES, "cls_dist")
    with tempfile.TemporaryDirectory() as folder:
        write_hf(ours, {}, Path(folder))
        models = {"ours": prepare(petl.apply(ours, method or "linear"), bench.dtype, bench)}
        models |= {name: theirs(Path(folder), name, method).to(bench.device) for name in ("sdpa", "eager")}
    x, _ = random_clips(bench.batch, n_frames, bench).batch(slice(None), bench.device)
    with torch.inference_mode(), autocast(bench.device, bench.dtype):
        logits = {name: model.eval()(x).float() for name, model in models.items()}
    difference = max((logits["ours"] - other).abs().max().item() for other in logits.values())
    if not difference < (1e-3 if bench.dtype == "float32" else 0.1):
        raise RuntimeError(f"the contestants do not compute the same: logits differ by {difference:.2g}")
    return models


def random_clips(n: int, n_frames: int, bench: Bench) -> data.Clips:
    features = torch.randn(n, n_frames, data.N_MELS, generator=torch.Generator().manual_seed(0))
    features = features.half()  # as the cache keeps them
    return data.Clips(features.to(bench.device), torch.arange(n, device=bench.device) % N_CLASSES)


def pass_of(
    method: str | None, network: nn.Module, clips: data.Clips, bench: Bench, keep: float | None = None
) -> tuple[Callable, train.Learner]:
    """An epoch over all the clips by the loop of train.py, one step where they are one batch; for None their test."""
    settings, every = bench.settings(keep=keep, epochs=10**9), torch.arange(len(clips.labels))
    learner = train.Learner(Patchout(network) if keep else network, settings, bench)
    if method is None:
        return partial(train.evaluate, learner.forward, clips, every.tolist(), settings, bench), learner
    return partial(train.train_epoch, learner, clips, every.tolist(), 1, settings, bench), learner


# --------------------------------------------------------------------------------------------------------- measuring


def in_turn(ways: dict[str, Callable], repeats: int, clock: Callable = time.perf_counter) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each, one after the other in every round; all end by reading a number, which waits
    for the device. In its turn each is called twice and the second call counts: the first gets back what the others
    took, memory that it asks of the kernel page by page and that a loop of its own would hold: a tenth of a step."""
    seconds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            way()
            start = clock()
            way()
            seconds[name].append(clock() - start)
    return seconds


def results_of(row: str, n_frames: int, times: dict[str, list[float]], clips: int) -> list[dict]:
    """Of each contestant the median over the repeats, in ms per clip; `spread` is half the range from the fastest to
    the slowest, in percent. `measure_models` fills in the rest."""
    return [{
        "row": row, "n_frames": n_frames, "contestant": name, "ms_per_clip": 1e3 * median(seconds) / clips,
        "spread": 50 * (max(seconds) - min(seconds)) / median(seconds),
        "memory_mb": None, "gflops": None, "share_of_gemm": None,
    } for name, seconds in times.items()]  # fmt: skip


def peak_mb(step: Callable) -> float | None:
    """Memory that a step takes at its peak beyond what is there before and after it, in MB. None where unknown."""
    if not forget_peak():
        return None
    before = peak_memory()
    step()
    return (peak_memory() - before) / 1e6


def memory_mb(step: Callable, learner: train.Learner) -> float | None:
    """Memory of the weights, of what the optimiser remembers of them, and of a step at its peak, in MB."""
    states = (tensor for state in learner.optimizer.state.values() for tensor in state.values())
    kept = sum(t.nbytes for t in (*learner.network.parameters(), *learner.network.buffers(), *states))
    peak = peak_mb(step)
    return None if peak is None else peak + kept / 1e6


def measure_models(step: str, n_frames: int, bench: Bench) -> list[dict]:
    """One of ROWS: every contestant's training step or inference, and in turn with them the large product."""
    method, clips = STEPS[step], random_clips(bench.batch, n_frames, bench)
    models = contestants(method, n_frames, bench)
    passes = {name: pass_of(method, model, clips, bench) for name, model in models.items()}
    config = models["ours"].config
    large, gflop = large_product(bench.batch * config.n_tokens, bench)
    times = in_turn({**{name: way for name, (way, _) in passes.items()}, "GEMM": large}, bench.repeats)
    gemm, mflop = gflop / median(times.pop("GEMM")), flops(config, method) / 1e6
    results = results_of(step, n_frames, times, bench.batch)
    for result in results:
        rate = mflop / result["ms_per_clip"]  # GFLOP/s
        memory = memory_mb(*passes[result["contestant"]])
        result |= {"memory_mb": memory, "gflops": rate, "share_of_gemm": rate / gemm}
    return results


def measure_features(bench: Bench) -> list[dict]:
    """Five-second waveforms to 500 frames, one by one on one core: ours, and transformers' extractor, which uses
    torchaudio where it is installed, else numpy."""
    from transformers import ASTFeatureExtractor

    wave = 0.1 * torch.randn(5 * data.RATE, generator=torch.Generator().manual_seed(0))
    extractor, samples = ASTFeatureExtractor(max_length=500), wave.numpy()
    ways = {"ours": lambda: data.to_input(data.fbank(wave[None]), 500),
            "extractor": lambda: extractor(samples, sampling_rate=data.RATE, return_tensors="pt")}  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = in_turn(ways, 10 * bench.repeats)
    torch.set_num_threads(threads)
    return results_of("features", 500, times, 1)


def measure_probe(n_frames: int, bench: Bench) -> list[dict]:
    """The second epoch of a linear probe: ours on pooled tokens, ours without them, and transformers."""
    n, models = 4 * bench.batch, contestants("linear", n_frames, bench)
    clips = random_clips(n, n_frames, bench)
    kept = probed(models["ours"], clips, data.Split(list(range(n)), [], []), bench.settings(), bench)
    entries = {"ours": kept, "ours, plain": (models["ours"], clips)}
    entries |= {name: (models[name], clips) for name in ("sdpa", "eager")}
    ways = {name: pass_of("linear", *entry, bench)[0] for name, entry in entries.items()}
    return results_of("linear probe, epoch 2", n_frames, in_turn(ways, bench.repeats), n)


# ------------------------------------------------------------------------------------------------------ what is shown


def table(bench: Bench) -> list[dict]:
    """All rows, printed as they come."""
    line = "| {:<24}| {:>6} | {:<12}| {:>9} | {:>7} | {:>7} | {:>9} | {:>8} | {:>7} |"
    print(line.format("row", "frames", "contestant", "ms/clip", "+-", "ours is", "MB", "GFLOP/s", "of GEMM"))
    print("|---|--:|---|--:|--:|--:|--:|--:|--:|")
    tasks = [partial(measure_models, *row, bench) for row in (QUICK if bench.quick else ROWS)]
    results, forms = [], ("{:,.0f}", "{:,.0f}", "{:.0%}")
    for task in [*tasks, partial(measure_features, bench), partial(measure_probe, 100, bench)]:
        measured = task()
        results += measured
        for row, n_frames, contestant, ms, spread, *rest in (result.values() for result in measured):
            time_now = f"{ms:,.3g}" if ms < 100 else f"{ms:,.0f}"
            faster = f"{ms / measured[0]['ms_per_clip']:.2f} x"
            rest = ("" if value is None else form.format(value) for form, value in zip(forms, rest, strict=True))
            print(line.format(row, n_frames, contestant, time_now, f"{spread:.0f} %", faster, *rest), flush=True)
    return results


def methods(names: list[str], bench: Bench) -> list[dict]:
    """A training step on 100 frames of each of these methods, in turn with one of LoRA; the fastest of each counts.

    On a CPU it is the time that the process itself has computed, which others on the machine hardly change.
    """
    clock = time.perf_counter if bench.device.type == "cuda" else time.process_time
    line, results = "| {:<24}| {:>9} | {:>7} | {:>7} |", []
    print(line.format("method", "ms/clip", "of LoRA", "MB") + "\n|---|--:|--:|--:|")
    clips = random_clips(bench.batch, 100, bench)
    for name in names:
        passes = {}
        for method in dict.fromkeys([name, "lora"]):
            model = prepare(petl.apply(load_ast(bench.weights, 100, N_CLASSES), method), bench.dtype, bench)
            passes[method] = pass_of(method, model, clips, bench)
        times = in_turn({method: way for method, (way, _) in passes.items()}, bench.repeats, clock)
        ms, of_lora = 1e3 * min(times[name]) / bench.batch, min(times[name]) / min(times["lora"])
        mb = memory_mb(*passes[name])
        print(line.format(name, f"{ms:.0f}", f"{of_lora:.2f} x", "" if mb is None else f"{mb:,.0f}"), flush=True)
        results.append({"method": name, "ms_per_clip": ms, "of_lora": of_lora, "memory_mb": mb})
    return results


def less(bench: Bench) -> list[dict]:
    """A LoRA step on 500 frames as it is, with --keep 0.4, and with --blocks for the last third: time and memory as
    above."""
    clock = time.perf_counter if bench.device.type == "cuda" else time.process_time
    clips, passes = random_clips(bench.batch, 500, bench), {}
    for words in ("", "--keep 0.4", "--blocks"):
        backbone, lora = load_ast(bench.weights, 500, N_CLASSES), petl.METHODS["lora"]
        if words == "--blocks":
            last = backbone.config.depth
            lora, words = replace(lora, blocks=(last * 2 // 3 + 1, last)), f"--blocks {last * 2 // 3 + 1}-{last}"
        model = prepare(petl.apply(backbone, lora), bench.dtype, bench)
        passes[f"LoRA {words}"] = pass_of("lora", model, clips, bench, 0.4 if "keep" in words else None)
    times, results = in_turn({name: way for name, (way, _) in passes.items()}, bench.repeats, clock), []
    for name, seconds in times.items():
        faster, mb = min(times["LoRA "]) / min(seconds), memory_mb(*passes[name])
        memory = "" if mb is None else f"{mb:8,.0f} MB"
        print(f"{name:<20}{min(seconds):8.2f} s a step{faster:8.2f} x as fast{memory}", flush=True)
        results.append({"step": name, "seconds": min(seconds), "memory_mb": mb})
    return results


def describe(bench: Bench) -> str:
    """The machine and what else the numbers depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    known = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    cpu = f"{known[1] if known else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else cpu
    compiled = ", compiled" if bench.compile else ""
    return f"{where}, {bench.dtype}, batch {bench.batch}{compiled}, torch {torch.__version__}"


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Bench]:
    parser = Parser("python -m tools.bench", description="Measure speed and memory.")
    add = parser.add_argument
    add("what", nargs="?", choices=["fold"], help="time a fold end to end, on the CPU, beside transformers' Trainer")
    add("--data-dir", type=Path, help="ESC-50 or its zip, for `fold`; without it the sounds are made here")
    add("--quick", action="store_true", help="fewer rows, on a CPU with 2 clips at once: 3 minutes on 2 cores")
    add("--methods", metavar="M,M", help="time a training step of each of these instead, or of all")
    add("--less", action="store_true", help="time a LoRA step with fewer patches and in fewer blocks")
    add("--json", type=Path, metavar="FILE", help="write all numbers there too")
    add("--batch", type=positive, help="clips at once; default: 32 on a GPU, 4 on a CPU, 2 with --quick, 8 for `fold`")
    add("--repeats", type=positive, help="default: 20 on a GPU, 3 on a CPU")
    add("--weights", default="random:base", help=argparse.SUPPRESS)  # a small model, for the tests
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="of the arithmetic")
    add("--compile", action="store_true", help="torch.compile all contestants")
    args = parser.parse_args(argv)
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: there is no folder {args.json.parent}")
    if args.data_dir and not args.what:
        raise UserError(f"--data-dir {args.data_dir}: only `fold` reads sounds; add it, or leave the option out")
    if args.what:  # bench_fold knows nothing else: what is printed and written must be what was measured
        args.device, args.dtype, args.compile = "cpu", "float32", False
    device = choose_device(args.device)
    gpu, dtype = device.type == "cuda", choose_dtype(args.dtype, device)
    batch = args.batch or (8 if args.what else 32 if gpu else 2 if args.quick else 4)
    repeats = args.repeats or (20 if gpu else 3)
    own = {"dtype": dtype, "batch": batch, "repeats": repeats, "weights": args.weights, "quick": args.quick}
    return args, Bench(device, compile=args.compile, **own)


def main(argv: list[str] | None = None) -> int:
    def run():
        args, bench = parse(argv)
        warnings.filterwarnings("ignore", module="transformers")  # of its own next version
        print(describe(bench))
        started = time.perf_counter()
        names = list(petl.METHODS) if args.methods == "all" else (args.methods or "").split(",")
        if args.what:
            results = bench_fold.table(args.data_dir, bench.batch, bench.repeats, args.quick)
        elif args.less:
            results = less(bench)
        else:
            results = methods([petl.find(name).name for name in names], bench) if args.methods else table(bench)
        print(f"\nmeasured in {time.perf_counter() - started:.0f} s")
        if args.json:
            write_json(args.json, {"machine": describe(bench), "results": results})

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
