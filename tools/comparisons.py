"""The checkpoint and ESC-50 against what is known of them, and against transformers: the comparisons of tools.check.

Each is a function of plain values that returns what it saw, or raises: NotThere with what to do about it, Wrong with
what differs, and for a file that cannot be read whatever its reader raises. transformers reads the same checkpoint and
hears the same sounds, which are made here; it is needed for nothing else.
"""

import io
import math
import re
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import soundfile
import soxr
import torch

from data import DATASETS, FRONT_END, RATE, Dataset, fbank, load_clips, load_dataset, to_input
from load_weights import AUDIOSET, find_checkpoint, load_ast
from sounds.paper import ESC50
from support.checkpoints import read_json
from support.command import UserError, first_of
from tools.predict import class_names, load_tagger, placed, probabilities

KINDS = ("1-kHz tone", "white noise", "rising chirp")
ANCHORS = {0: "Speech", 137: "Music", 526: "Field recording"}  # of AudioSet's 527 classes


class NotThere(Exception):
    """What is to be checked, or what it is to be compared with, is not on this machine."""


class Wrong(Exception):
    """What a check has found."""


def sound(kind: str, seconds: float = 10.0, take: int = 0) -> np.ndarray:
    """A sound of KINDS, (samples,) at 16 kHz; takes differ in pitch or chance. Noise at -60 dB lies under all of them:
    80 dB below the loudest filter the features are the rounding of whoever computes them."""
    time, rng = np.arange(int(seconds * RATE)) / RATE, np.random.default_rng(take)
    noise, pitch = rng.standard_normal(len(time)), 1 + take / 20
    wave = {
        "1-kHz tone": 0.3 * np.sin(2 * np.pi * 1000 * pitch * time),
        "white noise": 0.1 * rng.standard_normal(len(time)),
        "rising chirp": 0.3 * np.sin(2 * np.pi * pitch * (200 + 1500 * time / seconds) * time),  # 200 to 3200 Hz
    }[kind]
    return (wave + 3e-4 * noise).astype(np.float32)


def transformers():
    """The library, which is needed here only."""
    try:
        import transformers
    except ImportError:
        raise NotThere("transformers, to compare with: pip install -r requirements-dev.txt") from None
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def folder_of(weights: str | None) -> Path:
    if weights is None:
        raise NotThere("the checkpoint, see above")
    file, config = find_checkpoint(weights)
    if not config.is_file() or file.name not in ("model.safetensors", "pytorch_model.bin"):
        raise NotThere(f"a config.json beside {file.name}: transformers reads a folder with it and model.safetensors")
    return file.parent


def theirs(weights: str | None, n_frames: int | None = None) -> torch.nn.Module:
    """The checkpoint as transformers reads it. For fewer frames its position embeddings are cut as the original AST
    cuts them, in the middle of the time axis; written out here, so that it is no call of what is to be checked."""
    library, folder = transformers(), folder_of(weights)
    model = library.ASTForAudioClassification.from_pretrained(folder, dtype=torch.float32).eval()
    if n_frames in (None, model.config.max_length):
        return model
    bands, old = (128 - 16) // 10 + 1, (model.config.max_length - 16) // 10 + 1
    new = (n_frames - 16) // 10 + 1
    state, name = model.state_dict(), "audio_spectrogram_transformer.embeddings.position_embeddings"
    front, grid = state[name][:, :2], state[name][:, 2:].unflatten(1, (bands, old))
    begin = old // 2 - new // 2
    state[name] = torch.cat([front, grid[:, :, begin : begin + new].flatten(1, 2)], dim=1)
    with torch.device("meta"):  # no time spent on random numbers
        shorter = library.ASTForAudioClassification(library.ASTConfig.from_pretrained(folder, max_length=n_frames))
    shorter.load_state_dict(state, assign=True)
    return shorter.eval()


def extracted(make: Callable, waves: list[np.ndarray]) -> torch.Tensor:
    """What the extractor that `make` makes gives for sounds at 16 kHz, (sounds, frames, 128)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "At least one mel filter")  # the lowest is empty, in Kaldi as well
        return make()(waves, sampling_rate=RATE, return_tensors="pt").input_values


def limit(difference: float, most: float, what: str) -> str:
    if not difference <= most:
        raise Wrong(f"{what} differ by {difference:.2g}, more than {most:g}")
    return f"{what} differ by {difference:.1g} at most"


# ----------------------------------------------------------------------------------------------------- the checkpoint


def opens(weights: str) -> str:
    """What a checkpoint that opens could still have wrong: its head, the names of its classes, empty tensors."""
    if weights in ("audioset", f"hf:{AUDIOSET}"):
        try:
            find_checkpoint(weights)
        except UserError as error:
            raise NotThere(str(error)) from None
    model = load_ast(weights, pool="cls_dist")
    config, weighs = model.config, {n: t for n, t in model.state_dict().items() if not n.endswith("bias")}
    empty = [name for name, tensor in weighs.items() if not tensor.any()]
    if empty:
        raise Wrong(f"nothing but zeros in {first_of(empty)}")
    if config.n_classes != 527:
        raise Wrong(f"a head of {config.n_classes} classes, where AudioSet has 527")
    names = class_names(weights, config.n_classes)
    if len(names) != 527 or any(names[i] != name for i, name in ANCHORS.items()):
        seen = [name for i, name in enumerate(names) if i in ANCHORS]
        raise Wrong(f"its classes 0, 137, 526 of {len(names)} are {first_of(seen)}, not {', '.join(ANCHORS.values())}")
    return f"{config.depth} blocks, {config.dim} wide, 527 classes, SHA-256 {model.backbone.sha256[:12]}"


def front_end(weights: str | None) -> str:
    """preprocessor_config.json of the checkpoint against the constants of data.py."""
    file = folder_of(weights) / "preprocessor_config.json"
    if weights == "audioset" and not file.exists():
        try:
            file = Path(huggingface_hub.hf_hub_download(AUDIOSET, file.name))
        except Exception as error:  # as in support.checkpoints.fetch
            raise NotThere(f"{file.name} of the checkpoint ({type(error).__name__})") from None
    if not file.exists():
        raise NotThere(f"{file.name} beside the checkpoint")
    names = {"mean": "mean", "std": "std", "num_mel_bins": "n_mels", "sampling_rate": "sample_rate"}
    written = {"do_normalize": True, **read_json(file, dict)}
    ours = {**{name: FRONT_END[our] for name, our in names.items()}, "do_normalize": True, "padding_value": 0.0}
    wrong = [f"{name} {written.get(name)}, not {value}" for name, value in ours.items() if written.get(name) != value]
    if wrong:
        raise Wrong(f"the checkpoint was trained on other features: {', '.join(wrong)}")
    return f"mean {written['mean']}, std {written['std']}"


WORDS = {  # of transformers' names, one by one
    "audio_spectrogram_transformer": "", "embeddings": "embed", "patch_embeddings": "patches", "projection": "",
    "cls_token": "cls", "distillation_token": "dist", "position_embeddings": "position", "layers": "blocks",
    "layernorm_before": "norm1", "layernorm_after": "norm2", "attention": "attn", "mlp": "ffn", "layernorm": "norm",
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o",
}  # fmt: skip


def tensors(weights: str | None) -> str:
    reference = {}
    for name, tensor in theirs(weights).state_dict().items():
        name = name.replace("classifier.layernorm", "head.0").replace("classifier.dense", "head.1")
        reference[".".join(filter(None, (WORDS.get(word, word) for word in name.split("."))))] = tensor
    ours = load_ast(weights, pool="cls_dist").state_dict()
    differ = [name for name in ours if name not in reference or not torch.equal(ours[name], reference[name])]
    if differ or len(ours) != len(reference):
        raise Wrong(f"{len(differ)} of {len(ours)} tensors are not those that transformers reads: {first_of(differ)}")
    return f"{len(ours)} tensors are those that transformers reads"


@torch.inference_mode()
def logits(weights: str | None, n_frames: int) -> str:
    """Tokens and AudioSet logits of the chirp; differences beyond 1 are relative."""
    reference, ours = theirs(weights, n_frames), load_ast(weights, n_frames, pool="cls_dist").eval()
    x = to_input(fbank(torch.from_numpy(sound(KINDS[2]))[None]), n_frames)
    encoded, tokens = reference.audio_spectrogram_transformer(x), ours.features(x)
    pairs = {"tokens": (tokens, encoded.last_hidden_state), "logits": (
        ours.head(ours.pool(tokens)), reference.classifier(encoded.pooler_output))}  # fmt: skip
    return ", ".join(
        limit(((one - other).abs() / other.abs().clamp_min(1)).max().item(), 1e-4, what)
        for what, (one, other) in pairs.items()
    )


def tags(weights: str | None) -> str:
    """What is heard in the three sounds, from the waveform to the names of classes, by both."""
    reference, ours, folder = theirs(weights), load_tagger(str(weights), device="cpu"), folder_of(weights)
    library, waves = transformers().ASTFeatureExtractor, [sound(kind) for kind in KINDS]
    known = (folder / "preprocessor_config.json").exists()
    x = extracted(lambda: library.from_pretrained(folder) if known else library(), waves)
    with torch.inference_mode():
        expected = reference(x).logits.sigmoid()
    found = torch.from_numpy(probabilities(ours, waves))
    names = [reference.config.id2label[i] for i in range(reference.config.num_labels)]
    if names != ours.classes:
        raise Wrong(f"the classes are called {first_of(ours.classes)}; by transformers {first_of(names)}")
    limit((found - expected).abs().max().item(), 1e-3, "probabilities")
    best = [(kind, names[int(p.argmax())], p.max()) for kind, p in zip(KINDS, found, strict=True)]
    return ", ".join(f"{kind}: {name} {p:.2f}" for kind, name, p in best) + ", as transformers hears them"


def tags_on(device: torch.device, dtype: str, weights: str | None) -> str:
    """The same on the device and in the type of training; half precision moves probabilities by a few hundredths."""
    folder_of(weights)
    tagger, waves = load_tagger(str(weights), device="cpu"), [sound(kind) for kind in KINDS]
    expected = probabilities(tagger, waves)
    found = probabilities(placed(tagger, device, dtype), waves)
    return limit(np.abs(found - expected).max(), 0.05, f"probabilities in {dtype} on {device} and on the CPU")


# ------------------------------------------------------------------------------------------------------------- ESC-50


def find_esc50(data_dir: Path | None, cache_dir: Path, fetch: bool) -> Dataset:
    absent = data_dir is None and not (cache_dir / ESC50.folder).exists()
    if absent and not fetch:
        raise NotThere(f"ESC-50, neither as --data-dir nor in {cache_dir}; --esc50 downloads it")
    try:
        return load_dataset("esc50", data_dir, cache_dir)
    except UserError as error:
        raise NotThere(str(error)) if absent else error from None


def esc50_labels(data_dir: Path | None, cache_dir: Path, fetch: bool) -> str:
    """The class and the fold that a clip gets against its name, FOLD-RECORDING-TAKE-CLASS.wav."""
    dataset = find_esc50(data_dir, cache_dir, fetch)
    named = [re.fullmatch(r"(\d)-.*-(\d+)\.wav", path.name) for path in dataset.paths]
    if None in named:
        raise Wrong(f"{dataset.paths[named.index(None)].name} is no name of the release")
    number = {target: i for i, target in enumerate(sorted({int(match[2]) for match in named}))}
    shifted = [i for i, match in enumerate(named) if number[int(match[2])] != dataset.labels[i]]
    moved = [i for fold, split in dataset.folds.items() for i in split.test if int(named[i][1]) != fold]
    if shifted or moved:
        first = dataset.paths[(shifted + moved)[0]].name
        raise Wrong(f"{len(shifted)} clips have another class, {len(moved)} another fold than their names say: {first}")
    return f"{len(named)} clips, {len(number)} classes, {len(dataset.folds)} folds as their names say"


def esc50_features(data_dir: Path | None, cache_dir: Path, fetch: bool) -> str:
    """Ten clips as training reads them, in float16, against the extractor's, down to 80 dB below a frame's loudest."""
    dataset, extractor = find_esc50(data_dir, cache_dir, fetch), transformers().ASTFeatureExtractor
    ten = dataset.paths[:: max(1, len(dataset.paths) // 10)][:10]
    n_frames = DATASETS["esc50"].n_frames
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        ten_clips = replace(dataset, paths=ten, labels=[0] * len(ten), folds={})
        clips, _ = load_clips(ten_clips, n_frames, torch.device("cpu"), Path(folder), skip_bad=False)
        rows = clips.features.float().numpy()
    waves = []
    for path in ten:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
        waves.append(soxr.resample(wave.mean(1), rate, RATE))
    expected = extracted(lambda: extractor(max_length=n_frames), waves).numpy()
    loud = expected > expected.max(2, keepdims=True) - 8 * math.log(10) / (2 * FRONT_END["std"])
    return limit(np.abs(rows - expected)[loud].max(), 5e-3, f"features of {len(ten)} clips")
