"""How fast it is: beside transformers and peft in one process, against its own arithmetic, and against the clip length.

    python bench.py                  # the table of the README; --quick for a short one, --json FILE for programs
    python bench.py growth           # step time and memory against clip length and batch
    python bench.py esc50            # the whole ESC-50 experiment in shape, on random clips: meant for a GPU

The contestants run in turn, so that a busy machine slows all of them, and the median counts. They have the same random
weights of the base AST with the head of 50 classes, the same batch, optimiser, type, and threads or GPU; before the
clock starts, their logits must agree. `ours` is the model as train.py trains it (`prepare`); `sdpa` and `eager` are
transformers with its two ways of attention, LoRA by peft. peft has no Houlsby adapters: transformers gets ours, added
by forward hooks. With --compile everybody is compiled.

What is counted: the floating-point operations of matrix products, an addition and a multiplication each, as `flops`
says. Their rate is also given as a share of that of one large product, measured in turn with them. Memory is that of
the model, of the optimiser, and of what a step needs at its peak beyond them.
"""

import argparse
import ctypes
import gc
import platform
import re
import statistics
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import petl
import train
from ast_model import ASTConfig, UserError
from export import write_hf
from load_weights import load_ast
from onednn_linear import onednn_helps, product

N_CLASSES = 50


@dataclass(frozen=True)
class Row:
    """One line of the table for each contestant. `method` None: inference with the plain model."""

    name: str
    method: str | None
    n_frames: int
    quick: bool = False  # also with --quick


ROWS = [
    Row("LoRA step", "lora", 500, quick=True),
    Row("Houlsby parallel step", "houlsby_par", 500),
    Row("full fine-tuning step", "full_ft", 500),
    Row("inference", None, 500),
    Row("LoRA step", "lora", 100, quick=True),
    Row("Houlsby parallel step", "houlsby_par", 100, quick=True),
    Row("full fine-tuning step", "full_ft", 100, quick=True),
    Row("inference", None, 100, quick=True),
]


@dataclass(frozen=True)
class Result:
    """Medians over the repeats; `spread` is half the range from the fastest to the slowest, in percent."""

    row: str
    n_frames: int
    contestant: str
    ms_per_clip: float
    spread: float
    memory_mb: float | None = None
    gflops: float | None = None
    share_of_gemm: float | None = None


# -------------------------------------------------------------------------------------------------------- arithmetic


def flops(config: ASTConfig, method: str | None) -> int:
    """Floating-point operations of the matrix products for one clip: a training step, or inference for method None.

    With L tokens, width d, hidden width h: a product of a sequence with an (n, m) matrix takes 2 L n m. So a projection
    P takes 2 L d d, a block 4 P + 4 L d h for its linear layers and A = 4 L L d for its attention (scores and mixing).
    The backward pass needs as much again for the gradient of an input, and as much again for that of a weight. A frozen
    weight needs no weight gradient; and what comes before the first trained weight needs no input gradient: the patches
    never do, with LoRA neither do q, k and v of the first block, nor the scores the part towards k. Attention takes 2 A
    (the product that flash attention computes a second time is no useful work). Adapters of rank r take 4 L d r.
    """
    L, d, h, depth = config.n_tokens, config.dim, config.hidden or 4 * config.dim, config.depth
    patches = 2 * (L - 2) * config.patch**2 * d
    projection, attention = 2 * L * d * d, 4 * L * L * d
    linears = 4 * projection + 4 * L * d * h
    head = 2 * d * config.n_classes
    forward = patches + depth * (linears + attention) + head
    if method is None:
        return forward
    backward = depth * (linears + 2 * attention) + 2 * head
    if method == "full_ft":
        return forward + backward + patches + depth * linears
    if method not in ("houlsby_par", "lora"):
        raise ValueError(f"no formula for {method!r}")
    adapter = 4 * L * d * petl.rank_of(d, petl.METHODS[method].parts[0].rr)
    if method == "houlsby_par":
        return forward + backward + depth * 2 * 3 * adapter
    # LoRA, at q and v: there are two adapters in every block here as well
    return forward + backward + depth * 2 * 3 * adapter - (3 * projection + attention // 2 + adapter)


PRODUCTS = 5  # in one call of `large_product`


def large_product(tokens: int, args: Namespace) -> Callable:
    """Multiplies (tokens, 768) with (768, 3072), PRODUCTS times, in the fastest way this PyTorch has for it."""
    x = torch.randn(tokens, 768, device=args.device, dtype=train.DTYPES[args.dtype])
    weight = torch.randn(3072, 768, device=args.device, dtype=x.dtype)
    multiply = product if args.device.type == "cpu" and args.dtype == "float32" and onednn_helps() else F.linear

    @torch.inference_mode()
    def products():
        for _ in range(PRODUCTS):
            multiply(x, weight)

    return products


# ------------------------------------------------------------------------------------------------------- contestants


class Library(nn.Module):
    """transformers' AST with the signature of ours."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, fbank):
        return self.model(input_values=fbank).logits


def theirs(folder: Path, attention: str, method: str | None, args: Namespace) -> nn.Module:
    """The same model with transformers and peft. UserError where they are not installed."""
    try:
        import transformers
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError(f"the comparison needs {error.name}: pip install -r requirements-dev.txt") from None
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForAudioClassification.from_pretrained(folder, attn_implementation=attention)
    ast = model.audio_spectrogram_transformer
    if method == "lora":
        (lora,) = petl.METHODS["lora"].parts
        rank = petl.rank_of(ast.config.hidden_size, lora.rr)
        model = get_peft_model(model, LoraConfig(
            r=rank, lora_alpha=lora.alpha / lora.rr * rank, target_modules=["q_proj", "v_proj"],
            modules_to_save=["audio_spectrogram_transformer.layernorm", "classifier"],
        ))  # fmt: skip
    elif method != "full_ft":
        model.requires_grad_(False)
        ast.layernorm.requires_grad_(True)
        model.classifier.requires_grad_(True)
    if method == "houlsby_par":
        rank = petl.rank_of(ast.config.hidden_size, petl.METHODS["houlsby_par"].parts[0].rr)
        for layer in ast.layers:
            layer.layernorm_before.requires_grad_(True)
            layer.layernorm_after.requires_grad_(True)
            layer.a, layer.b = (petl.Bottleneck(ast.config.hidden_size, rank) for _ in range(2))
            layer.attention.register_forward_hook(lambda _, u, out, a=layer.a: (out[0] + a(u[0]), *out[1:]))
            layer.mlp.register_forward_hook(lambda _, u, out, b=layer.b: out + b(u[0]))
    return Library(model).to(args.device)


def contestants(method: str | None, n_frames: int, args: Namespace) -> dict[str, nn.Module]:
    """Models with equal logits; `method` None or "linear" leaves the plain model, with the backbone frozen."""
    ours = load_ast(args.weights, n_frames, N_CLASSES, "cls_dist")
    with tempfile.TemporaryDirectory() as folder:
        write_hf(ours, {}, Path(folder))
        models = {"ours": train.prepare(petl.apply(ours, method or "linear"), args)}
        models |= {name: theirs(Path(folder), name, method, args) for name in ("sdpa", "eager")}
    if args.compile:
        torch.compiler.reset()  # torch compiles a function a few times, then gives up: other rows must not count
        models = {name: torch.compile(model) for name, model in models.items()}
    x, _ = batch_of(args.batch, n_frames, args)  # the shape of the steps to come: torch.compile looks at it
    with torch.inference_mode(), train.autocast(args.device, args.dtype):
        logits = {name: model.eval()(x).float() for name, model in models.items()}
    difference = max((logits["ours"] - other).abs().max().item() for other in logits.values())
    if not difference < (1e-3 if args.dtype == "float32" else 0.1):
        raise RuntimeError(f"the contestants do not compute the same: logits differ by {difference:.2g}")
    return models


def batch_of(batch: int, n_frames: int, args: Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, n_frames, data.N_MELS, generator=generator)
    return x.to(args.device), torch.arange(batch, device=args.device) % N_CLASSES


def optimizer_of(model: nn.Module, args: Namespace) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = args.device.type == "cuda"
    return torch.optim.AdamW(trained, 1e-4, train.BETAS, train.EPS, train.WEIGHT_DECAY, fused=fused)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, x, y, args: Namespace) -> None:
    with train.autocast(args.device, args.dtype):
        logits = model(x)
    F.cross_entropy(logits.float(), y).backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.inference_mode()
def inference(model: nn.Module, x, args: Namespace) -> None:
    with train.autocast(args.device, args.dtype):
        model(x)


# --------------------------------------------------------------------------------------------------------- measuring


def in_turn(ways: dict[str, Callable], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each, one after the other in every round.

    In its turn each is called twice and the second call counts. The first one gets back what the others took: it asks
    the kernel for memory, page by page, that a loop of its own would still hold. That can take a tenth of a step.
    """
    seconds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            way()
            wait(device)
            start = time.perf_counter()
            way()
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(times: list[float]) -> float:
    return 100 * (max(times) - min(times)) / 2 / statistics.median(times)


def peak_mb(step: Callable, device: torch.device) -> float | None:
    """Memory that a step takes at its peak beyond what is there before and after it, in MB. None where unknown.

    On Linux the kernel keeps the peak of a process (VmHWM) and forgets it when told to, so the contestants can be
    measured one by one in the same process; memory that was freed is given back first.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        wait(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return None

    def status(name):  # kB
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        step()
        return (status("VmHWM") - before) * 1024 / 1e6
    except (OSError, TypeError):  # a kernel, or a sandbox, without these files or lines
        return None


def kept_mb(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> float:
    """Memory of the weights and of what the optimiser remembers of them, in MB."""
    tensors = [*model.parameters(), *model.buffers()]
    if optimizer is not None:
        tensors += [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    return sum(tensor.nbytes for tensor in tensors) / 1e6


def measure_models(row: Row, args: Namespace) -> list[Result]:
    """One row of ROWS: every contestant's training step or inference, and in turn with them the large product."""
    models = contestants(row.method, row.n_frames, args)
    x, y = batch_of(args.batch, row.n_frames, args)
    ways, optimizers = {}, {}
    for name, model in models.items():
        if row.method is None:
            ways[name] = partial(inference, model, x, args)
        else:
            optimizers[name] = optimizer_of(model.train(), args)
            ways[name] = partial(training_step, model, optimizers[name], x, y, args)
    config = load_config(models["ours"])
    tokens = args.batch * config.n_tokens
    times = in_turn({**ways, "GEMM": large_product(tokens, args)}, args.repeats, args.device)
    gemm = PRODUCTS * 2 * tokens * 768 * 3072 / 1e9 / statistics.median(times["GEMM"])
    work = flops(config, row.method) * args.batch / 1e9
    results = []
    for name, way in ways.items():
        peak, seconds = peak_mb(way, args.device), statistics.median(times[name])
        memory = None if peak is None else peak + kept_mb(models[name], optimizers.get(name))
        results.append(Result(
            row.name, row.n_frames, name, 1e3 * seconds / args.batch, spread(times[name]), memory, work / seconds,
            work / seconds / gemm,
        ))  # fmt: skip
    return results


def load_config(model: nn.Module) -> ASTConfig:
    return getattr(model, "_orig_mod", model).config  # torch.compile keeps the model under that name


def measure_features(args: Namespace) -> list[Result]:
    """Five-second waveforms to 500 frames, one by one on one core: ours, transformers' extractor, torchaudio.

    The extractor uses torchaudio where it is installed, else numpy.
    """
    from transformers import ASTFeatureExtractor

    wave = 0.1 * torch.randn(5 * data.RATE, generator=torch.Generator().manual_seed(0))
    extractor, samples = ASTFeatureExtractor(max_length=500), wave.numpy()
    ways = {
        "ours": lambda: data.to_input(data.fbank(wave[None]), 500),
        "extractor": lambda: extractor(samples, sampling_rate=data.RATE, return_tensors="pt"),
    }
    try:
        from torchaudio.compliance.kaldi import fbank

        options = {"sample_frequency": data.RATE, "window_type": "hanning", "num_mel_bins": data.N_MELS}
        ways["torchaudio"] = lambda: data.to_input(fbank(wave[None], **options)[None], 500)
    except (ImportError, OSError, RuntimeError):  # whatever torchaudio raises beside another PyTorch than its own
        pass
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = in_turn(ways, 10 * args.repeats, torch.device("cpu"))
    torch.set_num_threads(threads)
    return [Result("features", 500, name, 1e3 * statistics.median(t), spread(t)) for name, t in times.items()]


def measure_probe(n_frames: int, args: Namespace) -> list[Result]:
    """The second epoch of a linear probe: ours on pooled tokens, ours without them, and transformers."""
    n = 4 * args.batch
    x, y = batch_of(n, n_frames, args)
    settings = Namespace(batch_size=args.batch, mask=False, dtype=args.dtype)
    models = contestants("linear", n_frames, args)
    plain = train.Clips(x, y, torch.full((n, load_config(models["ours"]).dim), torch.nan, device=args.device))
    split = data.Split(list(range(n)), [], [])
    ours = getattr(models["ours"], "_orig_mod", models["ours"])
    pooled = train.pool_clips(ours, plain, split, settings, args)
    entries = {"ours": (train.Probe(ours), pooled), "ours, plain": (models["ours"], plain)}
    entries |= {name: (models[name], plain) for name in ("sdpa", "eager")}
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.dtype == "float16")

    def epoch(model, optimizer, clips):
        train.train_epoch(model.train(), optimizer, scaler, clips, torch.arange(n), [1e-4] * 4, settings, args)

    ways = {name: partial(epoch, model, optimizer_of(model, args), clips) for name, (model, clips) in entries.items()}
    times = in_turn(ways, args.repeats, args.device)
    return [
        Result("linear probe, epoch 2", n_frames, name, 1e3 * statistics.median(t) / n, spread(t))
        for name, t in times.items()
    ]


# ------------------------------------------------------------------------------------------------------ what is shown


def table(args: Namespace) -> dict:
    """All rows, printed as they come."""
    rows = [row for row in ROWS if row.quick or not args.quick]
    line = "| {:<24}| {:>6} | {:<12}| {:>9} | {:>7} | {:>7} | {:>9} | {:>8} | {:>7} |"
    print(line.format("row", "frames", "contestant", "ms/clip", "+-", "ours is", "MB", "GFLOP/s", "of GEMM"))
    print("|---|--:|---|--:|--:|--:|--:|--:|--:|")
    tasks = [partial(measure_models, row, args) for row in rows]
    tasks += [partial(measure_features, args), partial(measure_probe, 100, args)]
    results = []
    for task in tasks:
        measured = task()
        results += measured
        for r in measured:
            time_now = f"{r.ms_per_clip:,.3g}" if r.ms_per_clip < 100 else f"{r.ms_per_clip:,.0f}"
            faster = f"{r.ms_per_clip / measured[0].ms_per_clip:.2f} x"
            optional = ("" if value is None else f"{value:,.0f}" for value in (r.memory_mb, r.gflops))
            share = "" if r.share_of_gemm is None else f"{r.share_of_gemm:.0%}"
            cells = r.row, r.n_frames, r.contestant, time_now, f"{r.spread:.0f} %", faster, *optional, share
            print(line.format(*cells), flush=True)
    return {"results": [asdict(result) for result in results]}


def growth(args: Namespace) -> dict:
    """A LoRA step of ours against clip length and batch: time, memory, and attention's share, counted and measured.

    Attention grows with the square of the length, everything else with the length: the counted share says how much of
    the products it is, the measured one how much of the time its forward and backward pass take when run alone.
    """
    lengths = (100, 200, 500) if args.quick else (100, 200, 500, 1024, 2048)
    line = "| {:>6} | {:>6} | {:>5} | {:>9} | {:>9} | {:>17} | {:>18} |"
    print(line.format("frames", "tokens", "batch", "ms/clip", "MB", "attention counted", "attention measured"))
    print("|--:|--:|--:|--:|--:|--:|--:|")
    entries = []
    for n_frames in lengths:
        for batch in (1, args.batch):
            torch.compiler.reset()  # see `contestants`
            model = train.prepare(petl.apply(load_ast(args.weights, n_frames, N_CLASSES), "lora"), args)
            config = model.config
            model, optimizer = (torch.compile(model) if args.compile else model).train(), optimizer_of(model, args)
            step = partial(training_step, model, optimizer, *batch_of(batch, n_frames, args), args)
            dtype = train.DTYPES[args.dtype]
            shape = (3, batch, config.heads, config.n_tokens, config.dim // config.heads)
            qkv = torch.randn(shape, device=args.device, dtype=dtype, requires_grad=True)

            def attention(qkv=qkv):
                F.scaled_dot_product_attention(*qkv).sum().backward()

            times = in_turn({"step": step, "attention": attention}, args.repeats, args.device)
            seconds, alone = (statistics.median(times[name]) for name in ("step", "attention"))
            forward = 4 * config.n_tokens**2 * config.dim
            quadratic = 3 * config.depth * forward - forward // 2  # two thirds of it backward; see `flops`
            peak = peak_mb(step, args.device)
            entries.append({
                "n_frames": n_frames, "tokens": config.n_tokens, "batch": batch, "ms_per_clip": 1e3 * seconds / batch,
                "memory_mb": None if peak is None else peak + kept_mb(model, optimizer),
                "attention_counted": quadratic / flops(config, "lora"),
                "attention_measured": config.depth * alone / seconds,
            })  # fmt: skip
            e = entries[-1]
            memory = "" if peak is None else f"{e['memory_mb']:,.0f}"
            shares = f"{e['attention_counted']:.0%}", f"{e['attention_measured']:.0%}"
            print(line.format(n_frames, e["tokens"], batch, f"{e['ms_per_clip']:,.0f}", memory, *shares), flush=True)
            if args.batch == 1:
                break
    return {"results": entries}


def esc50(args: Namespace) -> dict:
    """2,000 random clips, 5 folds, 50 epochs of houlsby_par in batches of 32, masked, validated and tested."""
    clips, epochs = (10, 1) if args.quick else (2000, 50)
    generator = np.random.default_rng(0)
    features = generator.standard_normal((clips, 500, data.N_MELS), dtype=np.float32).astype(np.float16)
    labels = [i % N_CLASSES for i in range(clips)]
    folds = data.splits_of_folds([i % 5 + 1 for i in range(clips)], validate=True)
    names = [f"class {i}" for i in range(N_CLASSES)]
    dataset = data.Dataset("random", Path(), names, [Path()] * clips, labels, folds)
    backbone, method = load_ast(args.weights, 500, N_CLASSES), petl.find("houlsby_par")
    settings = train.Settings(
        dataset="random", method=petl.to_dict(method), weights=args.weights, backbone=backbone.backbone.sha256,
        pool="mean", seed=0, shots=None, clips="", n_frames=500, epochs=epochs, batch_size=32, lr=method.lr, mask=True,
        dtype=args.dtype,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run_args = Namespace(**vars(args), folds=None, resume=False)
        placed = train.to_clips(features, dataset, args.device)
        result = train.run_seed(backbone, method, placed, names, folds, settings, Path(folder), run_args)
        seconds = time.perf_counter() - start
    print(f"{clips:,} clips, 5 folds, {epochs} epochs: {seconds:,.0f} s ({seconds / 60:.1f} minutes), "
          f"peak memory {result['peak_memory_mb']} MB")  # fmt: skip
    return {"seconds": seconds, "peak_memory_mb": result["peak_memory_mb"]}


def machine(args: Namespace) -> str:
    if args.device.type == "cuda":
        where = torch.cuda.get_device_name(args.device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
        where = (
            f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
        )
    compiled = ", compiled" if args.compile else ""
    return f"{where}, {args.dtype}, batch {args.batch}{compiled}, torch {torch.__version__}"


def parse(argv: list[str] | None) -> Namespace:
    parser = train.Parser(description="Measure speed and memory.")
    add = parser.add_argument
    add("what", nargs="?", default="table", choices=["table", "growth", "esc50"])
    add("--quick", action="store_true", help="fewer rows, on a CPU with 2 clips at once: 3 minutes on 2 cores")
    add("--json", type=Path, metavar="FILE", help="write all numbers there too")
    add("--batch", type=train.positive, help="clips at once; default: 32 on a GPU, 4 on a CPU, 2 with --quick")
    add("--repeats", type=train.positive, help="default: 20 on a GPU, 3 on a CPU")
    add("--threads", type=train.positive, help="CPU threads; default: PyTorch's")
    add("--weights", default="random:base", help=argparse.SUPPRESS)  # a small model, for the tests
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", default="auto", choices=["auto", *train.DTYPES], help="of the arithmetic")
    add("--compile", action="store_true", help="torch.compile all contestants")
    args = parser.parse_args(argv)
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: there is no folder {args.json.parent}")
    args.device = train.choose_device(args.device)
    args.dtype = train.choose_dtype(args.dtype, args.device)
    gpu = args.device.type == "cuda"
    args.batch = args.batch or (32 if gpu else 2 if args.quick else 4)
    args.repeats = args.repeats or (20 if gpu else 3)
    args.recompute, args.micro_batch = False, None  # options of train.py that `prepare` and `train_epoch` look at
    return args


def main(argv: list[str] | None = None) -> int:
    def run():
        args = parse(argv)
        if args.threads:
            torch.set_num_threads(args.threads)
        warnings.filterwarnings("ignore", module="transformers")  # of its own next version
        print(machine(args))
        started = time.perf_counter()
        numbers = {"table": table, "growth": growth, "esc50": esc50}[args.what](args)
        print(f"\nmeasured in {time.perf_counter() - started:.0f} s")
        if args.json:
            train.write_json(args.json, {"machine": machine(args), "what": args.what, **numbers})

    return train.exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
