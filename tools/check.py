"""Is everything right on this machine? One line for each check: right, wrong, or not there.

    python -m tools.check                                               # fetches the checkpoint
    python -m tools.check --weights FOLDER --data-dir ESC-50-master.zip

transformers reads the same checkpoint, and hears the same sounds, made here. Each check is a
function that returns what it saw. It raises NotThere with what to do about it, or Wrong with what
differs. The exit code is 1 if something is wrong.
"""

import math
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import petl
import train
from data import DATASETS, N_MELS, RATE, fbank, load_dataset, to_input
from load_weights import AUDIOSET, find_checkpoint, load_ast
from sounds.paper import ESC50
from support.command import Parser, choose_device, choose_dtype, exit_code, first_of
from support.files import default_cache_dir
from support.progress import Bar, in_words
from support.variants import fitted
from tools.bench import N_CLASSES, Bench, in_turn, pass_of, random_clips
from tools.predict import load_tagger, probabilities

SIZES = {  # clips of a fold that train, validate and test
    "esc50": (1200, 400, 400), "esc10": (240, 80, 80), "us8k": (7859, 0, 873),
    "gsc": (84_843, 9_981, 11_005), "fsc": (23_132, 3_118, 3_793),
}  # fmt: skip
NAMES = {  # parts of the names that transformers gives, and ours in their place
    "audio_spectrogram_transformer.": "", "patch_embeddings.projection": "patches",
    "embeddings.": "embed.", "cls_token": "cls", "distillation_token": "dist",
    "position_embeddings": "position", "layers.": "blocks.", "attention.": "attn.", "_proj": "",
    "mlp.": "ffn.", "layernorm_before": "norm1", "layernorm_after": "norm2",
    "classifier.layernorm": "head.0", "classifier.dense": "head.1", "layernorm": "norm",
}  # fmt: skip


class NotThere(Exception):
    """What is to be checked, or what it is compared with, is not on this machine."""


class Wrong(Exception):
    """What a check has found."""


def limit(difference: float, most: float, what: str) -> str:
    if not difference <= most:
        raise Wrong(f"{what} differ by {difference:.2g}, more than {most:g}")
    return f"{what} differ by {difference:.1g} at most"


def sounds() -> dict[str, np.ndarray]:
    """Three sounds of ten seconds, at 16 kHz. Noise at -60 dB lies under all of them.

    80 dB below the loudest filter of a frame, features would be nothing but rounding.
    """
    time = np.arange(10 * RATE) / RATE
    noise = np.random.default_rng(0).standard_normal(len(time))
    waves = {
        "1-kHz tone": 0.3 * np.sin(2 * np.pi * 1000 * time),
        "white noise": 0.1 * noise,
        "rising chirp": 0.3 * np.sin(2 * np.pi * (200 + 150 * time) * time),  # 200 to 3200 Hz
    }
    return {kind: (wave + 3e-4 * noise).astype(np.float32) for kind, wave in waves.items()}


# --------------------------------------------------------------------------------- the comparisons


def opens(weights: str) -> str:
    """Fetch the checkpoint, if need be, and read it."""
    if weights in ("audioset", f"hf:{AUDIOSET}"):
        try:
            find_checkpoint(weights)
        except ValueError as error:
            raise NotThere(str(error)) from None
    model = load_ast(weights, pool="cls_dist")
    config = model.config
    if config.n_classes != 527:
        raise Wrong(f"a head of {config.n_classes} classes, where AudioSet has 527")
    sha256 = model.backbone.sha256[:12]
    return f"{config.depth} blocks, {config.dim} wide, 527 classes, SHA-256 {sha256}"


def theirs(weights: str | None, n_frames: int | None = None) -> nn.Module:
    """The checkpoint as transformers reads it.

    For fewer frames its position embeddings are cut as the original AST cuts them, in the middle of
    the time axis. This is written out here, because the loader must not check itself.
    """
    if weights is None:
        raise NotThere("the checkpoint, see above")
    try:
        import transformers
    except ImportError:
        raise NotThere("transformers: pip install -r requirements-dev.txt") from None
    file, config = find_checkpoint(weights)
    if not config.is_file() or file.name not in ("model.safetensors", "pytorch_model.bin"):
        raise NotThere(f"a model.safetensors and config.json beside {file.name}, for transformers")
    transformers.utils.logging.disable_progress_bar()
    ast = transformers.ASTForAudioClassification
    model = ast.from_pretrained(file.parent, dtype=torch.float32).eval()
    old = (model.config.max_length - 16) // 10 + 1
    new = ((n_frames or model.config.max_length) - 16) // 10 + 1
    begin = old // 2 - new // 2
    embeddings = model.audio_spectrogram_transformer.embeddings
    position = embeddings.position_embeddings
    grid = position[:, 2:].unflatten(1, (-1, old))[:, :, begin : begin + new]  # (1, F, T, dim)
    position = torch.cat([position[:, :2], grid.flatten(1, 2)], dim=1)
    embeddings.position_embeddings = nn.Parameter(position)
    return model


def tensors(weights: str | None) -> str:
    reference = {}
    for name, tensor in theirs(weights).state_dict().items():
        for word, ours in NAMES.items():
            name = name.replace(word, ours)
        reference[name] = tensor
    state = load_ast(weights, pool="cls_dist").state_dict()
    both = reference.keys() & state.keys()
    differ = sorted(reference.keys() ^ state.keys())
    differ += [name for name in sorted(both) if not torch.equal(state[name], reference[name])]
    if differ:
        which = f"{len(differ)} of {len(state)} tensors"
        raise Wrong(f"{which} are not those that transformers reads: {first_of(differ)}")
    return f"{len(state)} tensors are those that transformers reads"


@torch.inference_mode()
def logits(weights: str | None, n_frames: int) -> str:
    """Tokens and AudioSet logits of the chirp. Differences beyond 1 are relative."""
    reference = theirs(weights, n_frames)
    ours = load_ast(weights, n_frames, pool="cls_dist").eval()
    x = to_input(fbank(torch.from_numpy(sounds()["rising chirp"])[None]), n_frames)
    encoded = reference.audio_spectrogram_transformer(x).last_hidden_state
    pairs = {"tokens": (ours.features(x), encoded), "logits": (ours(x), reference(x).logits)}
    found = []
    for what, (one, other) in pairs.items():
        difference = (one - other).abs() / other.abs().clamp_min(1)
        found.append(limit(difference.max().item(), 1e-4, what))
    return ", ".join(found)


def tags(weights: str | None) -> str:
    """What both hear in the three sounds, from the waveform to the names of classes."""
    reference = theirs(weights)
    from transformers import ASTFeatureExtractor

    waves = list(sounds().values())
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # the lowest filter is empty, in Kaldi as well
        extractor = ASTFeatureExtractor()
        if Path(reference.name_or_path, "preprocessor_config.json").exists():
            extractor = extractor.from_pretrained(reference.name_or_path)
        x = extractor(waves, sampling_rate=RATE, return_tensors="pt").input_values
        expected = reference(x).logits.sigmoid()
    ours = load_tagger(weights, device="cpu")
    found = torch.from_numpy(probabilities(ours, waves))
    names = [reference.config.id2label[i] for i in range(len(expected[0]))]
    if names != ours.classes:
        raise Wrong(f"called {first_of(ours.classes)}; by transformers {first_of(names)}")
    limit((found - expected).abs().max().item(), 1e-3, "probabilities")
    best = ", ".join(names[i] for i in found.argmax(1))
    return f"{', '.join(sounds())} are {best}, as for transformers"


def features() -> str:
    """Log-Mel features of the three sounds beside those of torchaudio."""
    try:
        from torchaudio.compliance import kaldi
    except (ImportError, OSError, RuntimeError):  # it is built for one version of torch only
        raise NotThere("a torchaudio that this torch can import, to compare with") from None
    settings = {"sample_frequency": RATE, "window_type": "hanning", "num_mel_bins": N_MELS}
    waves = torch.from_numpy(np.stack(list(sounds().values())))
    expected = torch.stack([kaldi.fbank(wave[None], **settings) for wave in waves])
    return limit((fbank(waves) - expected).abs().max().item(), 1e-3, "log-Mel features")


def esc50(data_dir: Path | None, cache_dir: Path) -> str:
    """The class and the fold of every clip against its name, FOLD-RECORDING-TAKE-CLASS.wav."""
    if data_dir is None and not (cache_dir / ESC50.folder).exists():
        raise NotThere(f"ESC-50, neither as --data-dir nor in {cache_dir}: train.py fetches it")
    dataset = load_dataset("esc50", data_dir, cache_dir)
    names = [path.name for path in dataset.paths]
    matches = [re.fullmatch(r"(\d)-.*-(\d+)\.wav", name) for name in names]
    if None in matches:
        raise Wrong(f"{names[matches.index(None)]} is no name of the release")
    targets = [int(match[2]) for match in matches]
    parts = [int(match[1]) for match in matches]
    classes = sorted(set(targets))
    shifted = [i for i, label in enumerate(dataset.labels) if classes[label] != targets[i]]
    folds = dataset.folds.items()
    moved = [i for fold, split in folds for i in split.test if parts[i] != fold]
    if shifted or moved:
        what = f"{len(shifted)} clips have another class, {len(moved)} another fold"
        raise Wrong(f"{what} than their names say: {names[(shifted + moved)[0]]}")
    return f"{len(names)} clips, {len(classes)} classes, {len(folds)} folds as their names say"


# ---------------------------------------------------------------------------------------- training


def moves(name: str, backbone: nn.Module, bench: Bench) -> None:
    """Raises Wrong unless a few steps of a method move what is to learn, and nothing else.

    A single step does not: what starts behind a zero has no gradient, adapter_plus may leave out
    all clips, and the scaler of float16 skips steps. Weight decay moves what never gets a gradient.
    """
    count = bench.batch * (10 if bench.dtype == "float16" else 4)
    method = fitted(petl.find(name), backbone.config)
    settings = bench.settings(lr=method.lr, mask=True)
    model = train.adapted(backbone, method, 1, settings, bench)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    learner = train.Learner(model, settings, bench)
    clips = random_clips(count, bench)
    train.seed_epoch(0, 1, 1)
    losses = train.train_epoch(learner, clips, list(range(count)), 1, settings, bench)
    if not all(map(math.isfinite, losses)):
        raise Wrong(f"{name}: the losses are {losses}")
    for key, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[key])
        if moved and not parameter.requires_grad:
            raise Wrong(f"{name}: {key} is frozen, and has moved")
        state = learner.optimizer.state[parameter]
        if parameter.requires_grad and not (moved and state["exp_avg"].any()):
            raise Wrong(f"{name}: {key} does not learn")


def methods(bench: Bench) -> str:
    backbone = load_ast(bench.weights, bench.n_frames, N_CLASSES)
    for name in Bar(petl.METHODS, "methods", unit="method", leave=False):
        moves(name, backbone, bench)
    return f"{len(petl.METHODS)} methods, {bench.dtype}: what is to learn moves, and nothing else"


@lru_cache
def speed(bench: Bench) -> tuple[float, float]:
    """Seconds a clip of training and of evaluation, by houlsby_par."""
    model = petl.apply(load_ast(bench.weights, bench.n_frames, N_CLASSES), "houlsby_par")
    model = bench.prepare(model, bench.dtype)
    clips = random_clips(bench.batch, bench)
    ways = {method: pass_of(method, model, clips, bench) for method in ("houlsby_par", None)}
    times = in_turn(ways, bench.repeats)
    return min(times["houlsby_par"]) / bench.batch, min(times[None]) / bench.batch


def time_of(dataset: str, bench: Bench) -> str:
    """How long a fold of the dataset takes by houlsby_par."""
    recipe = DATASETS[dataset]
    batch = recipe.batch_size if bench.device.type == "cuda" else bench.batch
    step, test = speed(replace(bench, n_frames=recipe.n_frames, batch=batch))
    n_train, n_val, n_test = SIZES[dataset]
    seconds = recipe.epochs * (n_train * step + n_val * test) + n_test * test
    return f"{in_words(seconds)} ({1 / step:,.1f} clips/s in batches of {batch})"


# ------------------------------------------------------------------------------------- the command


def report(name: str, check: Callable[[], str]) -> str:
    """Run a check and print its line. Whatever it raises is what is wrong."""
    try:
        text = check()
        status = "right"
    except NotThere as error:
        text = str(error)
        status = "not there"
    except Exception as error:
        known = isinstance(error, Wrong | ValueError)
        text = str(error) if known else f"{type(error).__name__}: {error}"
        status = "wrong"
    print(f"{status:<11}{name:<26}{' '.join(text.split())}", flush=True)
    return status


def run(argv: list[str] | None) -> int:
    parser = Parser("python -m tools.check", description="Say what is right, wrong or not there.")
    add = parser.add_argument
    add("--weights", default="audioset", help="the checkpoint's folder, if it cannot be fetched")
    add("--data-dir", type=Path, help="ESC-50 or its archive")
    add("--cache-dir", type=Path, default=default_cache_dir(), help="default: %(default)s")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    dtype = choose_dtype("auto", device)
    opened = report("checkpoint", partial(opens, args.weights))
    weights = None if opened == "not there" else args.weights
    usable = args.weights if opened == "right" else "random:base"
    sizes = {"n_frames": 100, "batch": 2, "repeats": 5 if device.type == "cuda" else 1}
    bench = Bench(device, dtype=dtype, weights=usable, **sizes)
    checks = {
        "tensors": partial(tensors, weights),
        "logits at 1024 frames": partial(logits, weights, 1024),
        "logits at 500 frames": partial(logits, weights, 500),
        "tags": partial(tags, weights),
        "features": features,
        "labels of ESC-50": partial(esc50, args.data_dir, args.cache_dir),
        "a step of every method": partial(methods, bench),
    }
    for name in SIZES:
        checks[f"time for a fold of {name}"] = partial(time_of, name, bench)
    found = [opened, *(report(name, check) for name, check in checks.items())]
    counts = [f"{found.count(status)} {status}" for status in ("right", "wrong", "not there")]
    print(", ".join(counts))
    return 1 if "wrong" in found else 0


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
