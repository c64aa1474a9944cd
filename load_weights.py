"""Pretrained checkpoints in, trained parts out and in again.

`load_ast` reads an AST checkpoint in any of its formats: Hugging Face names in .safetensors or .bin, the original AST
repository's .pth, from the hub or from disk. `save_trained` writes what a method trained, 1 or 2 MB, with a header
that says what it belongs to; `load_trained` rebuilds the adapted model from it. `save_ast` writes a whole model, which
any `load_ast` reads. No pickle is ever executed.
"""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F

import petl
import petl_more
from ast_model import AST, ASTConfig, make_head
from data import FRONT_END
from support.checkpoints import fetch, fill, read_header, read_metadata, read_names, read_tensors, remedy, write_tensors
from support.command import UserError, first_of
from support.headers import Backbone, HuggingFace, checked

AUDIOSET = "MIT/ast-finetuned-audioset-10-10-0.4593"
DEMO = Path(__file__).with_name("weights") / "ast_demo.safetensors"  # weights/README.md: how it was made
RANDOM = {"base": (768, 12, 12), "small": (384, 12, 6), "tiny": (192, 12, 3), "demo": (128, 4, 2)}  # dim, depth, heads

# Parts of tensor names: ours, as Hugging Face's files have it, then inside its library or in the original,
# github.com/YuanGongND/ast. Replaced from top to bottom: `.attention.output.dense.` must come before `.output.dense.`.
NAMES = [
    (".embed.patches.", ".embeddings.patch_embeddings.projection.", ".v.patch_embed.proj."),
    (".embed.cls.", ".embeddings.cls_token.", ".v.cls_token."),
    (".embed.dist.", ".embeddings.distillation_token.", ".v.dist_token."),
    (".embed.position.", ".embeddings.position_embeddings.", ".v.pos_embed."),
    (".blocks.", ".encoder.layer.", ".layers.", ".v.blocks."),
    (".attn.q.", ".attention.attention.query.", ".attention.q_proj."),
    (".attn.k.", ".attention.attention.key.", ".attention.k_proj."),
    (".attn.v.", ".attention.attention.value.", ".attention.v_proj."),
    (".attn.o.", ".attention.output.dense.", ".attention.o_proj.", ".attn.proj."),
    (".ffn.fc1.", ".intermediate.dense.", ".mlp.fc1."),
    (".ffn.fc2.", ".output.dense.", ".mlp.fc2."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".head.0.", ".classifier.layernorm.", ".mlp_head.0."),
    (".head.1.", ".classifier.dense.", ".mlp_head.1."),
    (".norm.", ".layernorm.", ".v.norm."),
]

petl.METHODS |= petl_more.METHODS  # the later ones; here, as they import petl, and every program imports this file


def load_ast(
    weights: str = "audioset", n_frames: int | None = None, n_classes: int | None = None, pool: str | None = None
) -> AST:
    """An AST with pretrained weights, for spectrograms of `n_frames` and with a new head for `n_classes`.

    weights: "audioset", "demo" (the small backbone in weights/), "hf:owner/name", the path of a file or of a Hugging
    Face folder, or "random:base|small|tiny|demo" (by one version of PyTorch always the same random numbers, so that an
    adapter finds its backbone again). `n_frames=None` keeps the length of the checkpoint; `n_classes=None` keeps its
    head, if it has one (demo has none), and the pool of that; a new head reads the mean of all tokens unless `pool`, a
    name in POOL, says otherwise. The result knows its origin as `model.backbone`.
    Raises UserError for whatever is missing, damaged or not an AST: names, shapes and finite numbers are checked, not
    their meaning. A square matrix that somebody transposed has the right shape.
    """
    weights, keep_head = str(weights), n_classes is None
    state, config = read_checkpoint(weights)
    if keep_head and not any(name.startswith("head.") for name in state):
        raise UserError(f"{weights} has no head: n_classes makes one")
    pool = pool or (config.pool if keep_head else "mean")
    if keep_head and pool != config.pool:
        raise UserError(f"{weights}: its own head needs pool {config.pool!r}, not {pool!r}; n_classes makes a new one")
    named = weights in ("audioset", "demo") or weights.startswith(("hf:", "random:"))  # the same everywhere
    origin = weights if named else str(Path(weights).expanduser().resolve())
    backbone, old_grid = Backbone(origin, fingerprint(state, config)), config.grid
    config = replace(config, n_frames=n_frames or config.n_frames, n_classes=n_classes or config.n_classes, pool=pool)
    state["embed.position"] = resize_positions(state["embed.position"], old_grid, config.grid)
    if not keep_head:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        state |= {f"head.{name}": tensor for name, tensor in make_head(config).state_dict().items()}

    with torch.device("meta"):  # no time spent on random numbers that the checkpoint replaces
        model = AST(config)
    fill(model, state, weights)
    model.backbone = backbone
    return model


# ---------------------------------------------------------------------------------------------------- reading files


def read_checkpoint(weights: str) -> tuple[dict[str, torch.Tensor], ASTConfig]:
    """Tensors under our names in float32, and the shape of the model they make."""
    if weights.startswith("random:"):
        return random_checkpoint(weights)
    path, config_path = find_checkpoint(weights)
    state = to_our_names(read_tensors(path))
    return state, read_config(state, config_path, path)


def find_checkpoint(weights: str) -> tuple[Path, Path]:
    """The file of weights, fetched if need be, and where its config.json is if it has one."""
    if weights == "audioset" or weights.startswith("hf:"):
        return fetch(AUDIOSET if weights == "audioset" else weights.removeprefix("hf:"))
    path = DEMO if weights == "demo" else Path(weights).expanduser()
    if path.is_dir():
        candidates = [path / name for name in ("model.safetensors", "pytorch_model.bin")]
        path = next((candidate for candidate in candidates if candidate.is_file()), candidates[0])
    if not path.is_file():
        raise UserError(f"no weights at {weights}: give a file, a folder, hf:owner/name, audioset, demo or random:tiny")
    return path, path.parent / "config.json"


def random_checkpoint(weights: str) -> tuple[dict[str, torch.Tensor], ASTConfig]:
    size = weights.removeprefix("random:")
    if size not in RANDOM:
        raise UserError(f"unknown weights {weights!r}: the random sizes are {', '.join(RANDOM)}")
    dim, depth, heads = RANDOM[size]
    config = ASTConfig(dim=dim, depth=depth, heads=heads, pool="cls_dist")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AST(config).state_dict(), config


def to_our_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors in float32 under our names. The original's files carry ImageNet heads, used by nothing."""
    translated, original = {}, any(name.endswith("v.pos_embed") for name in state)
    for name, tensor in state.items():
        name = f".{name.removeprefix('module.').removeprefix('audio_spectrogram_transformer.')}."
        if original and name.startswith((".v.head.", ".v.head_dist.")):
            continue
        for ours, *others in NAMES:
            for theirs in others:
                name = name.replace(theirs, ours)
        if ".attn.qkv." in name and tensor.dim():  # of the original: three projections in one
            for letter, part in zip("qkv", tensor.float().chunk(3), strict=False):
                translated[name.replace(".qkv.", f".{letter}.").strip(".")] = part.clone()
        else:
            translated[name.strip(".")] = tensor.float()
    return translated


def to_hugging_face(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors with our names under those of Hugging Face's files. A head on the mean of all tokens keeps its name."""
    translated = {}
    for name, tensor in state.items():
        prefix = "" if name.startswith("head.") else ".audio_spectrogram_transformer"
        name = f"{prefix}.{name}."
        for ours, theirs, *_ in NAMES:
            name = name.replace(ours, theirs)
        translated[name.strip(".")] = tensor
    return translated


def read_config(state: dict[str, torch.Tensor], config_path: Path, path: Path) -> ASTConfig:
    """The shape of the model: from its tensors, and from config.json what no tensor shows."""
    header = read_metadata(path) if path.suffix == ".safetensors" else {}
    try:
        dim, _, patch, _ = state["embed.patches.weight"].shape
        _, n_tokens, _ = state["embed.position"].shape
        hidden = state["blocks.0.ffn.fc1.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        hint = "; it holds trained parts, whose backbone is wanted here" if "method" in header else ""
        raise UserError(f"{path} is no AST checkpoint: {error} is missing or of another shape{hint}") from None
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    n_classes = next((state[name].numel() for name in ("head.1.bias", "head.bias") if name in state), 1)
    shown = {"dim": dim, "depth": depth, "hidden": hidden, "patch": patch, "n_classes": n_classes}  # by the tensors
    try:
        if "config" in header:  # of save_ast
            config = ASTConfig(**header["config"])
        else:
            config = complete(shown, n_tokens, "cls_dist" if "head.1.bias" in state else "mean", config_path)
        config = replace(config, hidden=config.hidden or 4 * config.dim)
        for name, size in shown.items():
            if getattr(config, name) != size:
                raise ValueError(f"config.{name}: Expected {size} as its tensors have it, got {getattr(config, name)}")
        if config.n_tokens != n_tokens:
            raise ValueError(f"a grid of {config.grid} patches does not have {n_tokens} positions")
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} and its config.json do not make an AST: {error}") from None
    return config


def complete(shown: dict[str, int], n_tokens: int, pool: str, config_path: Path) -> ASTConfig:
    """The shape that tensors show, with what only Hugging Face's config.json tells: heads, stride, bands, epsilon."""
    names = read_names(config_path)
    told = names if isinstance(names, HuggingFace) else HuggingFace()  # none, or another program's: the defaults
    if told.time_stride != told.frequency_stride or told.hidden_act != "gelu" or not told.qkv_bias:
        raise UserError(f"{config_path}: only ASTs with equal strides, exact GELU and biases are supported")
    stride, n_mels = told.frequency_stride, told.num_mel_bins
    steps = (n_tokens - 2) // ((n_mels - shown["patch"]) // stride + 1)
    return ASTConfig(
        n_frames=told.max_length or (steps - 1) * stride + shown["patch"], n_mels=n_mels, stride=stride, pool=pool,
        heads=told.num_attention_heads or shown["dim"] // 64, eps=told.layer_norm_eps, **shown,
    )  # fmt: skip


def resize_positions(position: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Position embeddings (1, 2 + F T, dim) for another patch grid, as the original AST does it.

    Time first, then frequency: fewer steps keep the middle ones, more are interpolated bilinearly. The rows of [CLS]
    and [distillation] stay.
    """
    front, grid = position[:, :2], position[:, 2:]
    grid = grid.transpose(1, 2).unflatten(2, old)  # (1, dim, F, T)
    grid = crop_or_stretch(grid, new[1])
    grid = crop_or_stretch(grid.mT, new[0]).mT  # (1, dim, F', T')
    return torch.cat([front, grid.flatten(2).transpose(1, 2)], dim=1)


def crop_or_stretch(grid: torch.Tensor, size: int) -> torch.Tensor:
    """Last dimension of (1, dim, rows, columns) to `size`: the middle columns, or a bilinear interpolation."""
    rows, columns = grid.shape[-2:]
    if size <= columns:
        start = columns // 2 - size // 2
        return grid[..., start : start + size]
    return F.interpolate(grid, size=(rows, size), mode="bilinear", align_corners=False)


def fingerprint(state: dict[str, torch.Tensor], config: ASTConfig) -> str:
    """SHA-256 over heads, stride, and the names and float32 values of all tensors but the head's."""
    digest = hashlib.sha256(f"{config.heads} heads, stride {config.stride}".encode())
    for name in sorted(state):
        if not name.startswith("head."):
            digest.update(name.encode())
            digest.update(state[name].contiguous().numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- trained parts, alone


def to_dict(method: petl.Method) -> dict:
    """The method as plain JSON types; `from_dict` is the way back."""
    parts = [{"part": type(part).__name__, **asdict(part)} for part in method.parts]
    blocks = {"blocks": list(method.blocks)} if method.blocks else {}
    return {"name": method.name, "lr": method.lr, "parts": parts, **blocks}


def from_dict(entry: dict, origin: Path | str = "method") -> petl.Method:
    """The Method of such a dict, `origin` being where it is from. UserError for a part that no row of METHODS has."""
    known = {type(part).__name__: type(part) for method in petl.METHODS.values() for part in method.parts}
    unknown = [part["part"] for part in entry["parts"] if part["part"] not in known]
    if unknown:
        raise UserError(f"{origin}: {entry['name']!r} has the part {unknown[0]!r}, which no row of METHODS has")
    parts = tuple(checked(part, known[part["part"]], f"{origin}: {part['part']}") for part in entry["parts"])
    blocks = tuple(entry["blocks"]) if entry.get("blocks") else None
    return petl.Method(entry["name"], parts, lr=entry["lr"], blocks=blocks)


def live_tensors(model: AST) -> dict[str, torch.Tensor]:
    """The model's own tensors that training changes: trained parameters, float buffers (of BatchNorm, of `probe`)."""
    state = model.state_dict(keep_vars=True).items()
    return {n: t for n, t in state if (t.requires_grad if isinstance(t, torch.nn.Parameter) else t.is_floating_point())}


def trained_tensors(model: AST) -> dict[str, torch.Tensor]:
    """Copies of what training changes, on the CPU."""
    return {name: t.detach().cpu().clone().contiguous() for name, t in live_tensors(model).items()}


def save_trained(model: AST, path: Path, metadata: dict) -> None:
    """Write only what the method trained, as safetensors whose header describes it.

    `metadata` (class names, accuracy, ...) joins the method, the shape and the backbone, which the model knows itself.
    """
    header = {
        **metadata,
        "method": to_dict(model.method),
        "n_frames": model.config.n_frames,
        "n_classes": model.config.n_classes,
        "pool": model.config.pool,
        "front_end": FRONT_END,
        "backbone": asdict(model.backbone),
    }
    write_tensors(path, trained_tensors(model), header)


def load_trained(path: Path, weights: str | None = None) -> AST:
    """The adapted model of a file of `save_trained`: backbone, method and trained tensors; or that of `save_ast`.

    `weights` says where the backbone is now, if not where the header has it. Another backbone is a UserError. The model
    comes back in evaluation mode.
    """
    header = read_header(path)
    if "config" in header:  # a whole model: it needs no backbone
        return load_ast(path).eval()
    wanted = Backbone(**header["backbone"])
    try:
        model = load_ast(weights or wanted.name, header["n_frames"], header["n_classes"], header["pool"])
    except UserError as error:
        raise UserError(f"{path} needs its backbone: {error}; --weights says where it is") from None
    if model.backbone.sha256 != wanted.sha256:
        raise UserError(
            f"{path} was trained on the backbone {wanted.name} (SHA-256 {wanted.sha256[:12]}), not on "
            f"{model.backbone.name} ({model.backbone.sha256[:12]}): {remedy(wanted.sha256)}"
        )
    petl.apply(model, from_dict(header["method"], path))
    load_tensors(model, read_tensors(path), path)
    return model.eval()


def load_tensors(model: AST, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Put trained tensors back into an adapted model; UserError unless they are exactly what its method trains."""
    expected = live_tensors(model)
    wrong = sorted(expected.keys() ^ tensors.keys())
    wrong += [name for name, t in expected.items() if name in tensors and t.shape != tensors[name].shape]
    if wrong:
        raise UserError(f"{path} does not fit the method {model.method.name!r}: {first_of(wrong)}")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(tensors[name])


# ------------------------------------------------------------------------------------------------ a whole model out


def save_ast(model: AST, path: Path, metadata: dict, dtype: torch.dtype = torch.float32) -> None:
    """Write a plain AST as safetensors under Hugging Face names, with its shape and `metadata` in the header.

    float16 halves the file; `load_ast` computes in float32 either way.
    """
    state = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    header = {**metadata, "config": asdict(model.config)}
    write_tensors(path, to_hugging_face(state), header, format="pt")  # transformers asks for the format
