"""Is everything right on this machine? One line for each check: right, wrong, or not there.

    python -m tools.check                                               # fetches the checkpoint
    python -m tools.check --weights FOLDER --data-dir ESC-50-master.zip

transformers reads the same checkpoint, and hears the same sounds, made here. Each check is a
function that returns what it saw. It raises NotThere with what to do about it, or Wrong with what
differs. The exit code is 1 if something is wrong.
"""

import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import petl
import train
from ast_model import UserError
from data import DATASETS, N_MELS, RATE, fbank, load_dataset, to_input
from load_weights import find_checkpoint, load_ast
from sounds.paper import ESC50
from support.command import Parser, choose_device, choose_dtype, exit_code, first_of
from support.files import default_cache_dir
from support.processes import say
from support.progress import Bar, in_words
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


class NotThere(ValueError):
    """What is to be checked, or what it is compared with, is not on this machine."""


class Wrong(ValueError):
    """What a check has found."""


def limit(differences, most, what):
    """What to say of differences between numbers. Raises Wrong if one is larger than `most`."""
    largest = differences.abs().max().item()
    if not largest <= most:
        raise Wrong(f"{what} differ by {largest:.2g}, more than {most:g}")
    return f"{what} differ by {largest:.1g} at most"


def sounds():
    """A 1-kHz tone, white noise and a rising chirp of ten seconds at 16 kHz, (3, samples).

    Noise at -60 dB lies under all of them. 80 dB below the loudest filter of a frame, features
    would be nothing but rounding.
    """
    time = np.arange(10 * RATE) / RATE
    noise = np.random.default_rng(0).standard_normal(len(time))
    tone = 0.3 * np.sin(2 * np.pi * 1000 * time)
    chirp = 0.3 * np.sin(2 * np.pi * (200 + 150 * time) * time)  # 200 to 3200 Hz
    waves = np.stack([tone, 0.1 * noise, chirp]) + 3e-4 * noise
    return waves.astype(np.float32)


# --------------------------------------------------------------------------------- the comparisons


def opens(weights):
    """Fetch the checkpoint, if need be, and read it."""
    if weights == "audioset":
        try:
            find_checkpoint(weights)
        except UserError as error:
            raise NotThere(str(error)) from None
    model = load_ast(weights, pool="cls_dist")
    config = model.config
    if config.n_classes != 527:
        raise Wrong(f"a head of {config.n_classes} classes, where AudioSet has 527")
    sha256 = model.backbone.sha256[:12]
    return f"{config.depth} blocks, {config.dim} wide, 527 classes, SHA-256 {sha256}"


def theirs(weights, n_frames=1024):
    """The checkpoint as transformers reads it.

    For fewer frames its position embeddings are cut as the original AST cuts them, in the middle of
    the time axis. This is written out here, because the loader must not check itself.
    """
    file, _ = find_checkpoint(weights)
    try:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        ast = transformers.ASTForAudioClassification
        model = ast.from_pretrained(file.parent, dtype=torch.float32).eval()
    except (ImportError, OSError) as error:
        needs = "config.json, and pip install -r requirements-dev.txt"
        raise NotThere(f"transformers cannot read {file}, it needs {needs}: {error}") from None
    embeddings = model.audio_spectrogram_transformer.embeddings
    position = embeddings.position_embeddings
    grid = position[:, 2:].unflatten(1, (12, -1))  # (1, F, T, dim)
    steps = (n_frames - 16) // 10 + 1
    grid = grid.narrow(2, grid.shape[2] // 2 - steps // 2, steps)
    position = torch.cat([position[:, :2], grid.flatten(1, 2)], dim=1)
    embeddings.position_embeddings = nn.Parameter(position)
    return model


def tensors(weights):
    """The tensors of both by our names. An AssertionError says which is another."""
    reference = {}
    for name, tensor in theirs(weights).state_dict().items():
        for word, ours in NAMES.items():
            name = name.replace(word, ours)
        reference[name] = tensor
    state = load_ast(weights, pool="cls_dist").state_dict()
    torch.testing.assert_close(dict(state), reference, rtol=0, atol=0)
    return f"{len(state)} tensors are those that transformers reads"


@torch.inference_mode()
def logits(weights, n_frames):
    """Tokens and AudioSet logits of the chirp. Differences beyond 1 are relative."""
    reference = theirs(weights, n_frames)
    ours = load_ast(weights, n_frames, pool="cls_dist").eval()
    x = to_input(fbank(torch.from_numpy(sounds()[2:])), n_frames)
    encoded = reference.audio_spectrogram_transformer(x).last_hidden_state
    expected = reference(x).logits
    tokens = (ours.features(x) - encoded) / encoded.abs().clamp_min(1)
    heads = (ours(x) - expected) / expected.abs().clamp_min(1)
    return f"{limit(tokens, 1e-4, 'tokens')}, {limit(heads, 1e-4, 'logits')}"


@torch.inference_mode()
def tags(weights):
    """What both hear in the three sounds, from the waveform to the names of classes."""
    reference = theirs(weights)
    from transformers import ASTFeatureExtractor

    waves = list(sounds())
    x = ASTFeatureExtractor()(waves, RATE, return_tensors="pt").input_values
    expected = reference(x).logits.sigmoid()
    ours = load_tagger(weights, device="cpu")
    found = torch.from_numpy(probabilities(ours, waves))
    names = [reference.config.id2label[i] for i in range(len(expected[0]))]
    if names != ours.classes:
        raise Wrong(f"called {first_of(ours.classes)}; by transformers {first_of(names)}")
    limit(found - expected, 1e-3, "probabilities")
    best = ", ".join(names[i] for i in found.argmax(1))
    return f"tone, noise and chirp are {best}, as for transformers"


def features():
    """Log-Mel features of the three sounds beside those of torchaudio."""
    try:
        from torchaudio.compliance import kaldi
    except (ImportError, OSError, RuntimeError):  # it is built for one version of torch only
        raise NotThere("a torchaudio that this torch can import, to compare with") from None
    settings = {"sample_frequency": RATE, "window_type": "hanning", "num_mel_bins": N_MELS}
    waves = torch.from_numpy(sounds())
    expected = torch.stack([kaldi.fbank(wave[None], **settings) for wave in waves])
    return limit(fbank(waves) - expected, 1e-3, "log-Mel features")


def esc50(data_dir, cache_dir):
    """The class and the fold of every clip against its name, FOLD-RECORDING-TAKE-CLASS.wav."""
    if data_dir is None and not (cache_dir / ESC50.folder).exists():
        raise NotThere(f"ESC-50, neither as --data-dir nor in {cache_dir}: train.py fetches it")
    dataset = load_dataset("esc50", data_dir, cache_dir)
    targets = sorted({int(path.stem.split("-")[-1]) for path in dataset.paths})
    wrong = []
    for fold, split in dataset.folds.items():
        for i in split.test:
            name = dataset.paths[i].stem
            target = targets[dataset.labels[i]]
            if not (name.startswith(f"{fold}-") and name.endswith(f"-{target}")):
                wrong.append(name)
    if wrong:
        raise Wrong(f"{len(wrong)} clips have another class or fold: {first_of(wrong)}")
    return f"{len(dataset.paths)} clips have the class and the fold that their names say"


# ---------------------------------------------------------------------------------------- training


def moves(name, backbone, bench):
    """Raises Wrong unless a few steps of a method move what is to learn, and nothing else.

    A single step does not: what starts behind a zero has no gradient, adapter_plus may leave out
    all clips, and the scaler of float16 skips steps. Weight decay moves what never gets a gradient.
    """
    count = bench.batch * (10 if bench.dtype == "float16" else 4)
    method = petl.find(name)
    settings = bench.settings(method.lr, mask_frames=80)
    model = train.adapted(backbone, method, 1, settings, bench)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    learner = train.Learner(model, settings, bench)
    losses = train.train_epoch(learner, random_clips(count, bench), list(range(count)), 1)
    if not losses.isfinite().all():
        raise Wrong(f"{name}: the losses are {losses.tolist()}")
    for key, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[key])
        if moved and not parameter.requires_grad:
            raise Wrong(f"{name}: {key} is frozen, and has moved")
        state = learner.optimizer.state[parameter]
        if parameter.requires_grad and not (moved and state["exp_avg"].any()):
            raise Wrong(f"{name}: {key} does not learn")


def methods(bench):
    backbone = load_ast(bench.weights, bench.n_frames, N_CLASSES)
    for name in Bar(petl.METHODS, "methods", unit="method", leave=False):
        moves(name, backbone, bench)
    return f"{len(petl.METHODS)} methods, {bench.dtype}: what is to learn moves, and nothing else"


def time_of(dataset, bench):
    """How long a fold of the dataset takes by houlsby_par."""
    recipe = DATASETS[dataset]
    batch = recipe.batch_size if bench.device.type == "cuda" else bench.batch
    bench = replace(bench, n_frames=recipe.n_frames, batch=batch)
    model = petl.apply(load_ast(bench.weights, bench.n_frames, N_CLASSES), "houlsby_par")
    model = bench.prepare(model, bench.dtype)
    clips = random_clips(batch, bench)
    ways = {
        "train": pass_of("houlsby_par", model, clips, bench),
        "test": pass_of(None, model, clips, bench),
    }
    times = in_turn(ways, bench.repeats)
    step = min(times["train"]) / batch  # seconds a clip
    test = min(times["test"]) / batch
    n_train, n_val, n_test = SIZES[dataset]
    seconds = recipe.epochs * (n_train * step + n_val * test) + n_test * test
    return f"{in_words(seconds)} ({1 / step:,.1f} clips/s in batches of {batch})"


# ------------------------------------------------------------------------------------- the command


def report(name, check, *arguments):
    """Run a check and print its line. Whatever it raises is what is wrong."""
    status = "right"
    try:
        text = check(*arguments)
    except Exception as error:
        status = "not there" if isinstance(error, NotThere) else "wrong"
        is_known = isinstance(error, ValueError | AssertionError)
        text = str(error) if is_known else repr(error)
    say(f"{status:<11}{name:<26}{' '.join(text.split())}")
    return status


def run(argv):
    parser = Parser(
        "python -m tools.check",
        description="Check this installation: one line each, right, wrong or not there.",
    )
    add = parser.add_argument
    add("--weights", default="audioset", help="folder of the checkpoint; default: download")
    add("--data-dir", type=Path, help="ESC-50: its folder or its zip")
    add("--cache-dir", type=Path, default=default_cache_dir(), help="for downloads (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module="transformers")  # the lowest filter is empty
    device = choose_device(args.device)
    dtype = choose_dtype("auto", device)
    bench = Bench(device, dtype=dtype, n_frames=100, batch=2, repeats=1)
    weights = args.weights
    found = [report("checkpoint", opens, weights)]
    checks = []
    if found == ["right"]:
        bench = replace(bench, weights=weights)
        checks += [
            ("tensors", tensors, weights),
            ("logits at 1024 frames", logits, weights, 1024),
            ("logits at 500 frames", logits, weights, 500),
            ("tags", tags, weights),
        ]
    checks += [
        ("features", features),
        ("labels of ESC-50", esc50, args.data_dir, args.cache_dir),
        ("a step of every method", methods, bench),
    ]
    checks += [(f"time for a fold of {name}", time_of, name, bench) for name in SIZES]
    found += [report(*check) for check in checks]
    return 1 if "wrong" in found else 0


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
