"""Every method of the paper, as small modules around parts of the AST.

    model = apply(AST(ASTConfig(n_frames=500, n_classes=50)), "houlsby_par")
    count(model)  # {'petl': 497952, 'head': 39986, 'total': 86207570}

A *method* is a row of METHODS: a name and a tuple of parts. A *part* is a dataclass with one
function, `insert(model)`, which puts modules around something in the AST: around a sub-layer
(adapters, Hydra), a projection (LoRA, prefixes), the embedding or a block (prompts). Some parts
only unfreeze what is there. To add a method, write the module, the part and the row.

A *wrapper* is a module that keeps what it wraps as `self.wrapped`. Wrappers may nest. `inner` finds
the AST's own module at the bottom, and `put_beneath` inserts a new wrapper at the bottom. The code
of the AST never changes.

This file imports torch and ast_model. Errors of its users are ValueErrors.
"""

import difflib
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ast_model import AST, ASTConfig


def inner(module: nn.Module) -> nn.Module:
    """The AST's own module at the bottom of all wrappers."""
    while hasattr(module, "wrapped"):
        module = module.wrapped
    return module


def put_beneath(parent: nn.Module, name: str, layer) -> None:
    """Replace `parent.name` by layer(parent.name), beneath all wrappers that are there already.

    LoRA thereby adapts W itself, even if a prefix is around W. A wrapper that `reads_weight` of
    what it wraps (DoRA in petl_more.py) is not opened: the layer goes around it.
    """
    module = getattr(parent, name)
    while hasattr(module, "wrapped") and not hasattr(module, "reads_weight"):
        parent = module
        name = "wrapped"
        module = module.wrapped
    setattr(parent, name, layer(module))


def rank_of(dim: int, rr: float) -> int:
    """The size of a bottleneck, r = dim / RR (section III-A), rounded, at least 1."""
    return max(1, round(dim / rr))


def zeros(linear: nn.Linear) -> nn.Linear:
    """The same Linear, with weight and bias set to zero."""
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


# ----------------------------------------------------------------------------------------- adapters


class Bottleneck(nn.Module):
    """The adapter of Houlsby et al. (ICML 2019): down to r numbers, GELU, up to dim numbers.

    The up-projection starts at zero, so that the model starts as the pretrained one. Only one of
    the two may start at zero: the gradient of each is a product with the other, so if both were
    zero, neither weight would ever move.
    """

    def __init__(self, dim: int, rank: int):
        super().__init__()
        self.down = nn.Linear(dim, rank)
        self.up = zeros(nn.Linear(rank, dim))

    def forward(self, x):  # (batch, tokens, dim)
        return self.up(F.gelu(self.down(x)))


class Convpass(nn.Module):
    """A bottleneck with a convolution over the sequence of tokens (Jie and Deng, 2022).

    Section II-B says 3x3, but only a one-dimensional window of 3 gives the 254K parameters of
    Table I. As in the original Convpass, the convolution starts as the identity, a QuickGELU stands
    before and after it, and dropout is 0.1.
    """

    convolution = nn.Conv1d

    def __init__(self, dim: int, rank: int):
        super().__init__()
        self.down = nn.Linear(dim, rank)
        self.conv = self.convolution(rank, rank, kernel_size=3, padding=1)
        nn.init.dirac_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)
        self.dropout = nn.Dropout(0.1)
        self.up = zeros(nn.Linear(rank, dim))

    def forward(self, x):  # (batch, tokens, dim)
        h = quick_gelu(self.down(x))
        h = quick_gelu(self.convolve(h))
        return self.up(self.dropout(h))

    def convolve(self, h):  # (batch, tokens, rank)
        return self.conv(h.transpose(1, 2)).transpose(1, 2)


class Convpass2d(Convpass):
    """The original Convpass, which the paper does not have: a 3x3 window over the patch grid.

    The tokens in front of the patches are convolved as images of one pixel.
    """

    convolution = nn.Conv2d

    def __init__(self, dim: int, rank: int, grid: tuple[int, int]):
        super().__init__(dim, rank)
        self.grid = grid

    def convolve(self, h):  # (batch, tokens, rank)
        n_patches = self.grid[0] * self.grid[1]
        front = h[:, :-n_patches]
        patches = h[:, -n_patches:]
        image = patches.transpose(1, 2).unflatten(2, self.grid)  # (batch, rank, F, T)
        patches = self.conv(image).flatten(2).transpose(1, 2)  # (batch, F T, rank)
        pixels = front.flatten(0, 1)[:, :, None, None]  # (batch * tokens in front, rank, 1, 1)
        front = self.conv(pixels).view_as(front)
        return torch.cat([front, patches], dim=1)


class Adapted(nn.Module):
    """A sub-layer S (MHSA or FFN) with an adapter A.

    The input u is the output of the LayerNorm before S. What comes out replaces S(u) in the block,
    which adds it to its residual stream.
    """

    def __init__(self, wrapped: nn.Module, adapter: nn.Module, how: str):
        super().__init__()
        self.wrapped = wrapped
        self.adapter = adapter
        self.how = how

    def forward(self, u):  # (batch, tokens, dim)
        if self.how == "par_before":  # S(u) + A(u): eq. (7), where A reads x before the LayerNorm
            return self.wrapped(u) + self.adapter(u)
        if self.how == "seq_after":  # S(u) + A(S(u)): eq. (6) and Table III, where Par-After is it
            s = self.wrapped(u)
            return s + self.adapter(s)
        if (
            self.how == "seq_before"
        ):  # S(A(u)) + A(u): Table III. At first A(u) = 0, so S sees zeros
            a = self.adapter(u)
            return self.wrapped(a) + a
        if self.how == "par_before_residual":  # S(u) + A(u) + u: Table VII, one residual too many
            return self.wrapped(u) + self.adapter(u) + u
        if self.how == "seq_after_no_residual":  # A(S(u)): Table VII and eq. (6) as printed
            return self.adapter(self.wrapped(u))
        raise ValueError(f"there is no adapter {self.how!r}")


def put_adapter(block: nn.Module, at: str, adapter: nn.Module, how: str) -> None:
    """Give an adapter to the MHSA ("attn") or FFN ("ffn") of a block, and train its LayerNorm.

    Only with this LayerNorm does one adapter a block have 249K: 230,544 + 18,432 parameters.
    """
    norm = block.norm1 if at == "attn" else block.norm2
    norm.requires_grad_(True)
    setattr(block, at, Adapted(getattr(block, at), adapter, how))


@dataclass(frozen=True)
class Adapter:
    """One adapter in every block, at its MHSA or its FFN."""

    at: Literal["attn", "ffn"]
    how: str  # a case of Adapted.forward
    kind: Literal["bottleneck", "convpass", "convpass_2d"] = "bottleneck"
    rr: float = 64

    def insert(self, model: AST) -> None:
        for block in map(inner, model.blocks):
            put_adapter(block, self.at, self.adapter(model.config), self.how)

    def adapter(self, config: ASTConfig) -> nn.Module:
        rank = rank_of(config.dim, self.rr)
        if self.kind == "convpass":
            return Convpass(config.dim, rank)
        if self.kind == "convpass_2d":
            return Convpass2d(config.dim, rank, config.grid)
        return Bottleneck(config.dim, rank)


class HydraFFN(nn.Module):
    """S(u) + P(u) + Q(S(u)): two bottlenecks without activation (Hydra, Kim et al., 2023).

    P is parallel to the FFN S, and Q comes after it. Table V has 470K parameters, so both branches
    share the bias of `up_p`.
    """

    def __init__(self, wrapped: nn.Module, dim: int, rank: int):
        super().__init__()
        self.wrapped = wrapped
        self.down_p = nn.Linear(dim, rank)
        self.down_q = nn.Linear(dim, rank)
        self.up_p = zeros(nn.Linear(rank, dim))
        self.up_q = zeros(nn.Linear(rank, dim, bias=False))

    def forward(self, u):  # (batch, tokens, dim)
        s = self.wrapped(u)
        return s + self.up_p(self.down_p(u)) + self.up_q(self.down_q(s))


@dataclass(frozen=True)
class Hydra:
    """Hydra at the FFN of every block. Trains the LayerNorm before the FFN."""

    rr: float = 64

    def insert(self, model: AST) -> None:
        dim = model.config.dim
        for block in map(inner, model.blocks):
            block.ffn = HydraFFN(block.ffn, dim, rank_of(dim, self.rr))
            block.norm2.requires_grad_(True)


# --------------------------------------------------------------------------------------------- LoRA


class LoRALinear(nn.Module):
    """LoRA (Hu et al., 2021), eq. (5): W x + bias + s B A x. B starts at zero."""

    def __init__(self, wrapped: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.wrapped = wrapped
        self.scale = scale
        self.a = nn.Linear(wrapped.in_features, rank, bias=False)
        self.b = nn.utils.skip_init(nn.Linear, rank, wrapped.out_features, bias=False)
        zeros(self.b)

    def forward(self, x):  # (..., in) -> (..., out)
        return self.wrapped(x) + self.b(self.scale * self.a(x))

    def merged(self) -> nn.Linear:
        """One plain Linear with the weight W + s B A. PyTorch keeps weights as (out, in)."""
        change = self.scale * self.b.weight @ self.a.weight
        self.wrapped.weight = nn.Parameter(self.wrapped.weight + change)
        return self.wrapped


@dataclass(frozen=True)
class LoRA:
    """LoRA on some projections of every attention.

    s = alpha / RR as in section III-A, that is 1/16, although section II-B has s >= 1.
    """

    targets: str = "qv"  # any of q, k, v, o
    rr: float = 128
    alpha: float = 8

    def insert(self, model: AST) -> None:
        for block in map(inner, model.blocks):
            for name in self.targets:
                put_beneath(inner(block.attn), name, self.layer)

    def layer(self, linear: nn.Linear) -> LoRALinear:
        return LoRALinear(linear, rank_of(linear.in_features, self.rr), self.alpha / self.rr)


# ----------------------------------------------------------------------------- prompts and prefixes


def prompt_parameter(n: int, config: ASTConfig) -> nn.Parameter:
    """n learned tokens, uniform in +-sqrt(6 / (3 patch^2 + dim)), as in visual prompt tuning.

    The 3 are the colours of an image; the authors' code keeps them.
    """
    bound = (6 / (3 * config.patch**2 + config.dim)) ** 0.5
    return nn.Parameter(torch.empty(n, config.dim).uniform_(-bound, bound))


class PrefixLinear(nn.Module):
    """Prefix-tuning (Li and Liang, 2021): a key or value projection, n learned rows in front."""

    def __init__(self, wrapped: nn.Module, prefix: nn.Parameter):
        super().__init__()
        self.wrapped = wrapped
        self.prefix = prefix

    def forward(self, x):  # (batch, tokens, dim) -> (batch, n + tokens, dim)
        y = self.wrapped(x)
        prefix = self.prefix.to(y.dtype).expand(y.shape[0], -1, -1)  # autocast gives a half y
        return torch.cat([prefix, y], dim=1)


@dataclass(frozen=True)
class Prefix:
    """Prefix-tuning in every layer: half of the prompts are keys, and the other half are values.

    24 prompts make the 221K of Table I: 12 layers x 24 x 768.
    """

    prompts: int = 24

    def __post_init__(self):
        if self.prompts % 2:
            need = "prefix-tuning needs an even number of prompts (keys and values)"
            raise ValueError(f"{need}, not {self.prompts}")

    def insert(self, model: AST) -> None:
        for block in map(inner, model.blocks):
            attn = inner(block.attn)
            attn.k = PrefixLinear(attn.k, prompt_parameter(self.prompts // 2, model.config))
            attn.v = PrefixLinear(attn.v, prompt_parameter(self.prompts // 2, model.config))


class PromptedEmbedding(nn.Module):
    """The embedding with n prompts in place of [distillation], as in the authors' code.

    With the pool `cls_dist` the head then reads [CLS] and the first prompt.
    """

    def __init__(self, wrapped: nn.Module, prompts: nn.Parameter):
        super().__init__()
        self.wrapped = wrapped
        self.prompts = prompts

    def forward(self, fbank):  # (batch, n_frames, n_mels) -> (batch, 1 + n + patches, dim)
        x = self.wrapped(fbank)
        prompts = self.prompts.expand(x.shape[0], -1, -1)
        return torch.cat([x[:, :1], prompts, x[:, 2:]], dim=1)


class PromptedBlock(nn.Module):
    """A block with n prompts of its own in place of those that the block before it returns."""

    def __init__(self, wrapped: nn.Module, prompts: nn.Parameter):
        super().__init__()
        self.wrapped = wrapped
        self.prompts = prompts

    def forward(self, x):  # (batch, 1 + n + patches, dim)
        prompts = self.prompts.expand(x.shape[0], -1, -1)
        patches = x[:, 1 + prompts.shape[1] :]
        return self.wrapped(torch.cat([x[:, :1], prompts, patches], dim=1))


@dataclass(frozen=True)
class Prompts:
    """Prompt-tuning (Jia et al., 2022). Shallow: prompts before the first layer. Deep: in each."""

    prompts: int
    deep: bool = False

    def insert(self, model: AST) -> None:
        if len(model.blocks) < model.config.depth:
            where = "prompts enter before the first block"
            raise ValueError(f"{where}: they cannot be kept to some of the blocks")
        prompts = prompt_parameter(self.prompts, model.config)
        model.embed = PromptedEmbedding(model.embed, prompts)
        if self.deep:
            for i in range(1, model.config.depth):
                prompts = prompt_parameter(self.prompts, model.config)
                model.blocks[i] = PromptedBlock(model.blocks[i], prompts)


# -------------------------------------------------------- methods that only choose what to unfreeze


@dataclass(frozen=True)
class Biases:
    """BitFit (Ben Zaken et al., 2022): the biases of every Linear and LayerNorm of the encoder."""

    def insert(self, model: AST) -> None:
        for module in [*model.blocks.modules(), model.norm]:
            if isinstance(module, nn.Linear | nn.LayerNorm):
                module.bias.requires_grad_(True)
        model.norm.weight.requires_grad_(False)


@dataclass(frozen=True)
class Everything:
    """Full fine-tuning."""

    def insert(self, model: AST) -> None:
        model.requires_grad_(True)


# ----------------------------------------------------------------------------- the table of methods


@dataclass(frozen=True)
class Method:
    """A row of METHODS.

    All methods train the head, and all but BitFit and `probe` the whole final LayerNorm. Both
    together are the 9-40K of Table I's row Linear.
    """

    name: str
    parts: tuple
    paper: str = "-"  # trained parameters as the paper prints them
    where: str = "-"  # the row of the paper's tables
    lr: float = 5e-3  # section III-A; for full fine-tuning, linear and BitFit the authors' setup
    blocks: tuple[int, int] | None = None  # first and last block to change, from 1; None: all


MHSA_PAR = ("attn", "par_before")
MHSA_SEQ = ("attn", "seq_after")
FFN_PAR = ("ffn", "par_before")
FFN_SEQ = ("ffn", "seq_after")
MHSA_SEQ_BEFORE = ("attn", "seq_before")
FFN_SEQ_BEFORE = ("ffn", "seq_before")


def adapters(*places: tuple[str, str], **options) -> tuple[Adapter, ...]:
    return tuple(Adapter(at, how, **options) for at, how in places)


def convpass(*places: tuple[str, str]) -> tuple[Adapter, ...]:
    return adapters(*places, kind="convpass")


ALL_THREE = (*adapters(FFN_PAR), Prompts(14, deep=True), LoRA(rr=256))

ROWS = [
    Method("full_ft", (Everything(),), "85.5M", "Table I, Full FT", lr=5e-5),
    Method("linear", (), "9-40K", "Table I, Linear", lr=1e-3),
    Method("bitfit", (Biases(),), "102K", "Table I, BitFit"),
    Method("spt", (Prompts(300),), "230K", "Table I, SPT-300", lr=1e-2),
    Method("dpt", (Prompts(25, deep=True),), "230K", "Table I, DPT-25", lr=1e-2),
    Method("prefix", (Prefix(24),), "221K", "Table I, Pref-T 24", lr=1e-2),
    # Pfeiffer: one adapter a block, parallel to the MHSA or in sequence after the FFN. Houlsby: one
    # at each. Table I repeats these rows of Table III; section II-B names the FFN, III-A the MHSA.
    Method("pfeiffer_par", adapters(MHSA_PAR), "249K", "Table I, PF par"),
    Method("pfeiffer_seq", adapters(FFN_SEQ), "249K", "Table I, PF seq"),
    Method("houlsby_par", adapters(MHSA_PAR, FFN_PAR), "498K", "Table I, HOU par"),
    Method("houlsby_seq", adapters(MHSA_SEQ, FFN_SEQ), "498K", "Table I, HOU seq"),
    Method("convpass_pfeiffer_par", convpass(MHSA_PAR), "254K", "Table I, Conv PF par"),
    Method("convpass_pfeiffer_seq", convpass(FFN_SEQ), "254K", "Table I, Conv PF seq"),
    Method("convpass_houlsby_par", convpass(MHSA_PAR, FFN_PAR), "508K", "Table I, Conv HOU par"),
    Method("convpass_houlsby_seq", convpass(MHSA_SEQ, FFN_SEQ), "508K", "Table I, Conv HOU seq"),
    Method("lora", (LoRA("qv", rr=128),), "221K", "Table I, LoRA"),
    # The original, two-dimensional Convpass: not in the paper.
    Method("convpass2d_pfeiffer_par", adapters(MHSA_PAR, kind="convpass_2d")),
    Method("convpass2d_houlsby_par", adapters(MHSA_PAR, FFN_PAR, kind="convpass_2d")),
    # Where an adapter goes. FFN-Seq/Par-After is pfeiffer_seq, MHSA-Par-Before is pfeiffer_par.
    Method("adapter_ffn_seq_before", adapters(FFN_SEQ_BEFORE), "249K", "Table III, FFN-Seq-Before"),
    Method("adapter_ffn_par_before", adapters(FFN_PAR), "249K", "Table III, FFN-Par-Before"),
    Method("adapter_mhsa_seq_after", adapters(MHSA_SEQ), "249K", "Table III, MHSA-Seq-After"),
    Method(
        "adapter_mhsa_seq_before", adapters(MHSA_SEQ_BEFORE), "249K", "Table III, MHSA-Seq-Before"
    ),
    # Which projections LoRA adapts, at a constant number of parameters.
    Method("lora_q", (LoRA("q", rr=64),), "221K", "Table IV, q"),
    Method("lora_qk", (LoRA("qk", rr=128),), "221K", "Table IV, q k"),
    Method("lora_qkvo", (LoRA("qkvo", rr=256),), "221K", "Table IV, q k v o"),
    Method("pfeiffer_seq_x2", adapters(FFN_SEQ, rr=32), "470K", "Table V, PF FFN-Seq-After x2"),
    Method("pfeiffer_par_x2", adapters(MHSA_PAR, rr=32), "470K", "Table V, PF MHSA-Par-Before x2"),
    Method("houlsby_mixed", adapters(MHSA_PAR, FFN_SEQ), "498K", "Table V, HOU mixed"),
    Method("hydra", (Hydra(),), "470K", "Table V, HYDRA FFN"),
    Method("lora_x2", (LoRA("qv", rr=64),), "442K", "Table VI, LoRA"),
    Method("adapter_lora", (*adapters(FFN_PAR), LoRA()), "470K", "Table VI, Adapter + LoRA"),
    Method(
        "adapter_dpt",
        (*adapters(FFN_PAR), Prompts(25, deep=True)),
        "479K",
        "Table VI, Adapter + DPT-25",
    ),
    Method("adapter_dpt_lora", ALL_THREE, "488K", "Table VI, Adapter + DPT-14 + LoRA"),
    # Residual connections the wrong way round.
    Method(
        "adapter_ffn_seq_no_residual",
        adapters(("ffn", "seq_after_no_residual")),
        "249K",
        "Table VII, Seq",
    ),
    Method(
        "adapter_ffn_par_residual",
        adapters(("ffn", "par_before_residual")),
        "249K",
        "Table VII, Par",
    ),
]

METHODS: dict[str, Method] = {method.name: method for method in ROWS}


def find(name: str) -> Method:
    """The row of METHODS with this name. If there is none, a ValueError suggests the nearest."""
    if name not in METHODS:
        nearest = difflib.get_close_matches(name, METHODS, n=1, cutoff=0)[0]
        hint = "(--list-methods shows all of them)"
        raise ValueError(f"unknown method {name!r}: did you mean {nearest!r}? {hint}")
    return METHODS[name]


def apply(model: AST, method: str | Method) -> AST:
    """Freeze the model, insert the parts of the method, unfreeze what it trains.

    `method` is a name in METHODS or a Method of your own. The model is changed, remembers the
    method as `model.method`, and is returned.
    """
    if isinstance(method, str):
        method = find(method)
    if hasattr(model, "method"):
        has = f"this model already carries the method {model.method.name!r}"
        raise ValueError(f"{has}; load a fresh AST")
    model.requires_grad_(False)
    model.norm.requires_grad_(True)
    model.head.requires_grad_(True)
    device = model.norm.weight.device

    first, last = method.blocks or (1, len(model.blocks))
    below = model.blocks[: first - 1]
    above = model.blocks[last:]
    model.blocks = model.blocks[first - 1 : last]  # the parts see these blocks only
    for part in method.parts:
        part.insert(model)
    model.blocks = nn.ModuleList([*below, *model.blocks, *above])
    if below or above:  # full fine-tuning has unfrozen the embedding
        nn.ModuleList([model.embed, below, above]).requires_grad_(False)

    model.method = method
    return model.to(device)  # the parts were made on the CPU


def count(model: AST) -> dict[str, int]:
    """Trained parameters of the method (`petl`) and of final LayerNorm and head (`head`); `total`.

    Full fine-tuning and BitFit unfreeze the final LayerNorm themselves. There it counts under
    `petl`, as in Table I.
    """
    owns_norm = any(isinstance(part, Everything | Biases) for part in model.method.parts)
    head_modules = [model.head] if owns_norm else [model.norm, model.head]
    head = sum(trained_parameters(module) for module in head_modules)
    total = sum(parameter.numel() for parameter in model.parameters())
    return {"petl": trained_parameters(model) - head, "head": head, "total": total}


def trained_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
