"""Load pretrained checkpoints; save and load what a method trained.

`load_ast` reads an AST checkpoint from the hub or from disk: a .safetensors or .bin with the names
of Hugging Face, or a .pth of the original AST repository. `save_trained` writes the tensors that a
method trained, 1 to 2 MB for adapters and LoRA, with a header that describes them. `load_trained`
rebuilds the adapted model from that file. `save_ast` writes a whole model, which `load_ast` reads.

Files are read and written by support/checkpoints.py. It checks that a file is whole and that all
numbers are finite. It reads .bin and .pth with `weights_only`, so no code in them is executed.
"""

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import petl
import petl_more  # noqa: F401, adds the later methods to petl.METHODS
from ast_model import AST, ASTConfig, UserError, make_head
from data import FRONT_END, MEAN, STD
from support.checkpoints import (
    fetch,
    read_hf_config,
    read_mean_and_std,
    read_metadata,
    read_tensors,
    write_tensors,
)  # fmt: skip

AUDIOSET = "MIT/ast-finetuned-audioset-10-10-0.4593"
DEMO = Path(__file__).with_name("weights") / "ast_demo.safetensors"  # see weights/README.md
RANDOM = {  # dim, depth, heads
    "base": (768, 12, 12),
    "small": (384, 12, 6),
    "tiny": (192, 12, 3),
    "demo": (128, 4, 2),
}

# Each row translates a part of tensor names. First comes our name, then the one in files of Hugging
# Face. After it come other spellings: those of the modules inside newer versions of transformers,
# and those of the original AST (github.com/YuanGongND/ast), which begin with `v.` or `mlp_head.`.
# The rows are applied from top to bottom, so `.attention.output.dense.` must stand before
# `.output.dense.`.
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


@dataclass(frozen=True)
class Backbone:
    """Where the pretrained weights of a model came from, kept as `model.backbone`."""

    name: str
    sha256: str  # their `fingerprint`, the same in every file format


def load_ast(
    weights: str = "audioset",
    n_frames: int | None = None,
    n_classes: int | None = None,
    pool: str | None = None,
) -> AST:
    """An AST with pretrained weights.

    weights: one of
      - "audioset", the checkpoint of the paper, and "hf:owner/name", another AST of the hub
      - "demo", the small backbone in weights/
      - a path: a file, or a folder with config.json and model.safetensors
      - "random:base", "random:small", "random:tiny" or "random:demo". The seed is fixed, so an
        adapter that was trained on random weights can be loaded again.
    n_frames: length of the spectrograms; None: the length that the checkpoint was trained with.
    n_classes: the classes of a new head; None: the checkpoint's own head.
    pool: how tokens become one vector; None: the checkpoint's pool, and "mean" for a new head.

    A UserError says what is missing, damaged or not an AST. Names, shapes and finite numbers are
    checked. Wrong numbers cannot be noticed, such as those of a square matrix that was transposed.
    """
    weights = str(weights)
    state, config = read_checkpoint(weights)
    backbone = Backbone(origin_of(weights), fingerprint(state, config))
    old_grid = config.grid
    if n_classes is None:
        check_head(state, config, pool, weights)
    else:
        config = replace(config, n_classes=n_classes, pool=pool or "mean")
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        for name, tensor in make_head(config).state_dict().items():
            state[f"head.{name}"] = tensor
    config = replace(config, n_frames=n_frames or config.n_frames)
    state["embed.position"] = resize_positions(state["embed.position"], old_grid, config.grid)

    with torch.device("meta"):  # no start at random: the checkpoint has every tensor
        model = AST(config)
    fill(model, state, weights)
    model.backbone = backbone
    return model


def check_head(state: dict, config: ASTConfig, pool: str | None, weights: str) -> None:
    """Raise a UserError unless the checkpoint has a head, and `pool` is None or its own pool."""
    if "head.bias" not in state and "head.1.bias" not in state:
        raise UserError(f"{weights} has no head: give n_classes, and it gets a new one")
    if pool not in (None, config.pool):
        raise UserError(
            f"{weights}: its own head needs pool {config.pool!r}, not {pool!r}; "
            "give n_classes, and it gets a new one"
        )


def origin_of(weights: str) -> str:
    """The name of the weights, or the absolute path of their file."""
    if weights in ("audioset", "demo") or weights.startswith(("hf:", "random:")):
        return weights
    return str(Path(weights).expanduser().resolve())


def fill(model: nn.Module, state: dict[str, torch.Tensor], origin: str) -> None:
    """Give the model the tensors of `state`. A UserError unless they are exactly those it needs."""
    try:
        missing, unknown = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{origin} is no AST: its tensors do not fit together: {reason}") from None
    if missing or unknown:
        raise UserError(
            f"{origin} is no AST checkpoint: missing {some_of(missing)}; unknown {some_of(unknown)}"
        )


def some_of(names: list[str]) -> str:
    """The first five of a list, for a message."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(name[:100] for name in names[:5]) + more or "nothing"


# ------------------------------------------------------------------------------------ reading files


def read_checkpoint(weights: str) -> tuple[dict[str, torch.Tensor], ASTConfig]:
    """Tensors under our names in float32, and the shape of the model they make."""
    if weights.startswith("random:"):
        return random_checkpoint(weights)
    path, config_path = find_checkpoint(weights)
    state = to_our_names(read_tensors(path))
    config = read_config(state, config_path, path)
    return for_our_features(state, *read_mean_and_std(path)), config


def find_checkpoint(weights: str) -> tuple[Path, Path]:
    """The file of weights, downloaded if necessary, and where its config.json is, if it has one."""
    if weights == "audioset":
        return fetch(AUDIOSET)
    if weights.startswith("hf:"):
        return fetch(weights.removeprefix("hf:"))
    path = DEMO if weights == "demo" else Path(weights).expanduser()
    if path.is_dir():
        safe = path / "model.safetensors"
        pickled = path / "pytorch_model.bin"
        path = pickled if pickled.is_file() and not safe.is_file() else safe
    if not path.is_file():
        raise UserError(
            f"no weights at {weights}: "
            "give a file, a folder, hf:owner/name, audioset, demo or random:tiny"
        )
    return path, path.parent / "config.json"


def random_checkpoint(weights: str) -> tuple[dict[str, torch.Tensor], ASTConfig]:
    """Weights as an untrained AST has them, drawn with the seed 0."""
    size = weights.removeprefix("random:")
    if size not in RANDOM:
        raise UserError(f"unknown weights {weights!r}: the random sizes are {', '.join(RANDOM)}")
    dim, depth, heads = RANDOM[size]
    config = ASTConfig(dim=dim, depth=depth, heads=heads, pool="cls_dist")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AST(config).state_dict(), config


def to_our_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors in float32 under our names.

    Files of the original repository also have ImageNet heads, which nothing uses, and one matrix
    for query, key and value, which is cut in three. A dot before and after every name lets
    `replace` find whole parts of names only.
    """
    original = any(name.endswith("v.pos_embed") for name in state)
    translated = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.").removeprefix("audio_spectrogram_transformer.")
        name = f".{name}."
        if original and name.startswith((".v.head.", ".v.head_dist.")):
            continue
        for ours, *others in NAMES:
            for theirs in others:
                name = name.replace(theirs, ours)
        if ".attn.qkv." in name and tensor.dim():  # a lone number is refused later
            for letter, part in zip("qkv", tensor.float().chunk(3), strict=False):
                translated[name.replace(".qkv.", f".{letter}.").strip(".")] = part.clone()
        else:
            translated[name.strip(".")] = tensor.float()
    return translated


def for_our_features(state: dict, mean: float, std: float) -> dict:
    """The tensors of a model that reads other features, changed so that it reads ours.

    It was trained on (fb - mean) / (2 std). This is a x + b, where x are the features of
    `data.to_input`. The patch embedding is linear. So a becomes a factor of its weights, and b
    times the sum of the weights is added to its bias.
    """
    if (mean, std) == (MEAN, STD):
        return state
    a = STD / std
    b = (MEAN - mean) / (2 * std)
    weight = state["embed.patches.weight"]
    bias = state["embed.patches.bias"] + b * weight.flatten(1).sum(1)
    return {**state, "embed.patches.weight": a * weight, "embed.patches.bias": bias}


def to_hugging_face(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under Hugging Face's names. A head of one layer keeps its name."""
    translated = {}
    for name, tensor in state.items():
        prefix = "" if name.startswith("head.") else ".audio_spectrogram_transformer"
        name = f"{prefix}.{name}."
        for ours, theirs, *_ in NAMES:
            name = name.replace(ours, theirs)
        translated[name.strip(".")] = tensor
    return translated


def read_config(state: dict[str, torch.Tensor], config_path: Path, path: Path) -> ASTConfig:
    """The shape of the model that the tensors of the file `path` make.

    A file of `save_ast` has the whole shape in its header. Other files show the sizes by their
    tensors, and config.json says the rest. A UserError if tensors and description disagree.
    """
    header = read_metadata(path) if path.suffix == ".safetensors" else {}
    try:
        sizes, n_tokens = sizes_of(state)
    except (KeyError, ValueError, IndexError) as error:
        message = f"{path} is no AST checkpoint: {error} is missing or of another shape"
        if "method" in header:
            message += "; it holds trained parts, whose backbone is wanted here"
        raise UserError(message) from None
    problem = f"{path} and its config.json do not make an AST"
    try:
        if "config" in header:
            config = ASTConfig(**header["config"])
            config = replace(config, hidden=config.hidden or 4 * config.dim)
        else:
            # The AudioSet head, LayerNorm and Linear, reads cls_dist. Other heads say nothing.
            pool = "cls_dist" if "head.1.bias" in state else "mean"
            config = complete(sizes, n_tokens, pool, config_path)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{problem}: {error}") from error
    for name, size in sizes.items():
        described = getattr(config, name)
        if described != size:
            raise UserError(
                f"{problem}: config.{name}: Expected {size} as its tensors have it, got {described}"
            )
    if config.n_tokens != n_tokens:
        raise UserError(
            f"{problem}: a grid of {config.grid} patches does not have {n_tokens} positions"
        )
    return config


def sizes_of(state: dict[str, torch.Tensor]) -> tuple[dict[str, int], int]:
    """Fields of ASTConfig that tensors show, and the number of tokens."""
    dim, _, patch, _ = state["embed.patches.weight"].shape
    _, n_tokens, _ = state["embed.position"].shape
    no_head = torch.zeros(1)  # it counts as one class
    head_bias = state.get("head.1.bias", state.get("head.bias", no_head))
    sizes = {
        "dim": dim,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "hidden": state["blocks.0.ffn.fc1.weight"].shape[0],
        "patch": patch,
        "n_classes": head_bias.numel(),
    }
    return sizes, n_tokens


def complete(sizes: dict[str, int], n_tokens: int, pool: str, config_path: Path) -> ASTConfig:
    """The `sizes` of the tensors, and heads, stride, bands, epsilon and length of config.json.

    If the file or an entry is missing, `read_hf_config` gives the value of AST-Base. For heads and
    length it gives None. Then heads are 64 wide, and the length follows from the number of tokens.
    """
    hf = read_hf_config(config_path)
    if hf.time_stride != hf.frequency_stride or hf.hidden_act != "gelu" or not hf.qkv_bias:
        raise UserError(
            f"{config_path}: only ASTs with equal strides, exact GELU and biases are supported"
        )
    patch = sizes["patch"]
    stride = hf.frequency_stride
    n_frequency = (hf.num_mel_bins - patch) // stride + 1
    n_time = (n_tokens - 2) // n_frequency
    return ASTConfig(
        n_frames=hf.max_length or (n_time - 1) * stride + patch,
        n_mels=hf.num_mel_bins,
        stride=stride,
        heads=hf.num_attention_heads or sizes["dim"] // 64,
        eps=hf.layer_norm_eps,
        pool=pool,
        **sizes,
    )


def resize_positions(
    position: torch.Tensor, old: tuple[int, int], new: tuple[int, int]
) -> torch.Tensor:
    """Position embeddings (1, 2 + F T, dim) for another patch grid, as the original AST does it.

    `old` and `new` are (F, T). The time axis is resized first, then the frequency axis. A smaller
    size keeps the middle, and a larger one is interpolated. The rows of [CLS] and [distillation]
    stay.
    """
    front = position[:, :2]
    grid = position[:, 2:].transpose(1, 2).unflatten(2, old)  # (1, dim, F, T)
    grid = crop_or_stretch(grid, new[1])
    grid = crop_or_stretch(grid.mT, new[0]).mT  # (1, dim, F', T')
    return torch.cat([front, grid.flatten(2).transpose(1, 2)], dim=1)


def crop_or_stretch(grid: torch.Tensor, size: int) -> torch.Tensor:
    """Resize the last axis of (1, dim, rows, columns): its middle, or an interpolation."""
    rows, columns = grid.shape[-2:]
    if size <= columns:
        start = columns // 2 - size // 2
        return grid[..., start : start + size]
    return F.interpolate(grid, size=(rows, size), mode="bilinear", align_corners=False)


def fingerprint(state: dict[str, torch.Tensor], config: ASTConfig) -> str:
    """SHA-256 of heads, stride, and the names and float32 values of all tensors but the head's."""
    digest = hashlib.sha256(f"{config.heads} heads, stride {config.stride}".encode())
    for name in sorted(state):
        if not name.startswith("head."):
            digest.update(name.encode())
            digest.update(state[name].contiguous().numpy())
    return digest.hexdigest()


# ----------------------------------------------------------------------------- trained parts, alone


def to_dict(method: petl.Method) -> dict:
    """The method without `paper` and `where`, in JSON's types if its parts have them."""
    parts = [{"part": type(part).__name__, **asdict(part)} for part in method.parts]
    entry = {"name": method.name, "lr": method.lr, "parts": parts}
    if method.head_lr:
        entry["head_lr"] = method.head_lr
    if method.blocks:
        entry["blocks"] = list(method.blocks)
    return entry


def from_dict(entry: dict, origin: Path | str = "method") -> petl.Method:
    """The Method that `to_dict` made this dict of. `origin` is the file it was read from.

    Every part must occur in a row of METHODS. A UserError names a part or a field that is unknown.
    """
    kinds = {}
    for method in petl.METHODS.values():
        for part in method.parts:
            kinds[type(part).__name__] = type(part)
    parts = []
    for part in entry["parts"]:
        options = dict(part)
        name = options.pop("part")
        if name not in kinds:
            raise UserError(
                f"{origin}: {entry['name']!r} has the part {name!r}, which no row of METHODS has; "
                "import the file that adds it first, or put it into petl_more.py"
            )
        try:
            parts.append(kinds[name](**options))
        except (TypeError, UserError) as error:  # a field is missing, unknown or of no known kind
            raise UserError(f"{origin}: the part {name!r}: {error}") from None
    blocks = tuple(entry["blocks"]) if entry.get("blocks") else None
    return petl.Method(
        entry["name"],
        tuple(parts),
        lr=entry["lr"],
        head_lr=entry.get("head_lr"),
        blocks=blocks,
    )


def live_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that a fold leaves changed, by name: the model's own, not copies.

    These are the trained parameters, and all persistent buffers of floats: running statistics of
    BatchNorm, and mean and deviation of a fitted head.
    """
    changed = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter):
            changes = tensor.requires_grad
        else:
            changes = tensor.is_floating_point()
        if changes:
            changed[name] = tensor
    return changed


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the `live_tensors`, on the CPU, which further training does not change."""
    live = live_tensors(model)
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in live.items()}


def save_trained(model: AST, path: Path | str, metadata: dict) -> None:
    """Write what the method trained as safetensors, with a header that describes it.

    The header has `metadata` (class names, accuracy, ...) and what the model knows itself: method,
    shape and backbone.
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
    write_tensors(Path(path), trained_tensors(model), header)


def load_trained(path: Path | str, weights: str | None = None) -> AST:
    """The model of a file of `save_trained` or `save_ast`, in evaluation mode.

    `weights` says where the backbone is, if it is not where the header says. A file of `save_ast`
    needs none. If the backbone found is not the one trained on, a UserError names both.
    """
    path = Path(path)
    header = read_metadata(path)
    if "config" in header:  # a whole model, which needs no backbone
        return load_ast(path).eval()
    if not header:
        raise UserError(f"{path} is no whole file of trained parts (it has no such header)")
    wanted = Backbone(**header["backbone"])
    shape = (header["n_frames"], header["n_classes"], header["pool"])
    try:
        model = load_ast(weights or wanted.name, *shape)
    except UserError as error:
        raise UserError(
            f"{path} needs its backbone: {error}; --weights says where it is"
        ) from error
    if model.backbone.sha256 != wanted.sha256:
        raise UserError(
            f"{path} was trained on the backbone {wanted.name} (SHA-256 {wanted.sha256[:12]}), "
            f"not on {model.backbone.name} ({model.backbone.sha256[:12]}): "
            "give the right one as weights"
        )
    petl.apply(model, from_dict(header["method"], path))
    load_tensors(model, read_tensors(path), path)
    return model.eval()


def load_tensors(model: nn.Module, tensors: dict[str, torch.Tensor], origin="the state") -> None:
    """Copy `tensors` into the `live_tensors` of a model. A UserError unless they fit exactly."""
    expected = live_tensors(model)
    wrong = sorted(expected.keys() ^ tensors.keys())
    for name, tensor in expected.items():
        if name in tensors and tensor.shape != tensors[name].shape:
            wrong.append(name)
    if wrong:
        method = model.method.name
        raise UserError(f"{origin} does not fit the method {method!r}: {some_of(wrong)}")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])


# ------------------------------------------------------------------------------- a whole model out


def save_ast(
    model: AST, path: Path | str, metadata: dict, dtype: torch.dtype = torch.float32
) -> None:
    """Write a plain AST as safetensors under Hugging Face names. Its header has its shape.

    float16 halves the file. `load_ast` computes in float32 either way.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor.detach().cpu().to(dtype).contiguous()
    header = {**metadata, "config": asdict(model.config)}
    write_tensors(Path(path), to_hugging_face(state), header, format="pt")  # for transformers
