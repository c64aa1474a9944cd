"""Methods that came after the paper, written like those of `petl.py`: modules, parts, rows.

The file holds the conformer adapter of the paper's published version, its authors' mixtures of
adapters, three relatives of LoRA, (IA)3, SSF, and two adapters from vision. All of them start at
the pretrained function. Scaling factors are stored as offsets from their start, because AdamW's
weight decay pulls every trained number to zero: a factor thereby decays to the pretrained function.
The factors of LayerNorm and BatchNorm are trained as they are.

`probe` changes nothing but what the head reads. `Patchout` is no method: it trains on some of the
patches. To import this file adds its rows to `petl.METHODS`. It needs torch, numpy, ast_model and
petl.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import petl
from ast_model import AST, ASTConfig
from petl import (
    Bottleneck,
    LoRA,
    LoRALinear,
    Method,
    inner,
    put_adapter,
    put_beneath,
    rank_of,
    zeros,
)


def offset(*shape: int) -> nn.Parameter:
    """A trained distance from where something starts."""
    return nn.Parameter(torch.zeros(shape))


# -------------------------------------------------------------------------------- parallel adapters


@dataclass(frozen=True)
class Parallel:
    """An adapter parallel to the MHSA or the FFN of every block. A subclass says which one."""

    at: Literal["attn", "ffn"] = "attn"
    rr: float = 128  # in a mixture the reduction rate of each expert

    def insert(self, model: AST) -> None:
        dim = model.config.dim
        for block in map(inner, model.blocks):
            adapter = self.adapter(dim, rank_of(dim, self.rr))
            put_adapter(block, self.at, adapter, "par_before")


class ConformerModule(nn.Module):
    """The convolution module of the Conformer (Gulati et al., Interspeech 2020), r channels wide.

    The steps are LayerNorm, down to 2r, a gate that leaves r, a window over the token sequence for
    each channel, BatchNorm, swish, up (Cappellazzo et al., MLSP 2024, arXiv 2312.03694v4). The text
    of that paper lacks the LayerNorm, but its parameter counts contain it. The window runs along
    time within a band of frequencies, and over the ends of the bands.
    """

    def __init__(self, dim: int, rank: int, kernel: int, own_norm: bool):
        super().__init__()
        self.norm = nn.LayerNorm(dim) if own_norm else nn.Identity()
        self.down = nn.Linear(dim, 2 * rank)
        self.conv = nn.Conv1d(rank, rank, kernel, groups=rank)
        self.batch_norm = nn.BatchNorm1d(rank)
        self.up = zeros(nn.Linear(rank, dim))

    def forward(self, u):  # (batch, tokens, dim)
        h = F.glu(self.down(self.norm(u)))  # z[:r] sigmoid(z[r:])
        h = h.transpose(1, 2)  # (batch, rank, tokens)
        k = self.conv.kernel_size[0]
        h = F.pad(
            h, ((k - 1) // 2, k // 2)
        )  # an even window, too, returns as many tokens as it reads
        h = F.silu(self.batch_norm(self.conv(h)))
        return self.up(h.transpose(1, 2))


@dataclass(frozen=True)
class Conformer(Parallel):
    """Conformer adapters."""

    rr: float = 96
    kernel: int = 31  # that paper takes 31 tokens for speech, and 8 for ESC-50 and US8K
    own_norm: bool = True

    def adapter(self, dim: int, rank: int) -> nn.Module:
        return ConformerModule(dim, rank, self.kernel, self.own_norm)


class Experts(nn.Module):
    """n bottlenecks of size r in three tensors.

    The rows of `down` are those of all experts, one expert below the other; so are the columns of
    `up`, side by side.
    """

    def __init__(self, dim: int, rank: int, experts: int):
        super().__init__()
        self.down = nn.Linear(dim, experts * rank)
        self.up = zeros(nn.Linear(experts * rank, dim, bias=False))
        self.up_bias = offset(experts, dim)


class SoftMoA(Experts):
    """Soft mixture of adapters (Cappellazzo et al., Interspeech 2024, arXiv 2402.00828).

    Each of the n experts has p slots, as in Soft MoE. A slot reads a weighted mean of the tokens,
    and a token gets a weighted mean of the slots' answers.
    """

    def __init__(self, dim: int, rank: int, experts: int, slots: int):
        super().__init__(dim, rank, experts)
        self.slots = nn.Parameter(nn.init.xavier_normal_(torch.empty(dim, experts, slots)))

    def forward(self, u):  # (batch, tokens, dim)
        n, p = self.slots.shape[1:]
        logits = u @ self.slots.flatten(1)  # (batch, tokens, n p)
        x = logits.softmax(1).transpose(1, 2) @ u  # (batch, n p, dim): what the slots read
        x = x.unflatten(1, (n, p))
        down = self.down.weight.unflatten(0, (n, -1))  # (n, r, dim)
        up = self.up.weight.unflatten(1, (n, -1))  # (dim, n, r)
        h = torch.einsum("bnpd,nrd->bnpr", x, down)
        h = F.gelu(h + self.down.bias.view(n, 1, -1))
        y = torch.einsum("bnpr,dnr->bnpd", h, up) + self.up_bias[:, None]
        return logits.softmax(2) @ y.flatten(1, 2)


class DenseMoA(Experts):
    """Dense mixture of adapters (the same paper): sum_i P_i E_i(u) with P = softmax(router(u)).

    It is computed as one bottleneck n times as wide, whose hidden units are multiplied by P.
    """

    def __init__(self, dim: int, rank: int, experts: int):
        super().__init__(dim, rank, experts)
        self.router = nn.Linear(dim, experts)

    def forward(self, u):  # (batch, tokens, dim)
        weights = self.router(u).softmax(-1)  # (batch, tokens, n)
        h = F.gelu(self.down(u)).unflatten(-1, (weights.shape[-1], -1))  # (batch, tokens, n, r)
        h = h * weights[..., None]
        return self.up(h.flatten(2)) + weights @ self.up_bias


@dataclass(frozen=True)
class SoftMixture(Parallel):
    """Soft mixtures of adapters."""

    experts: int = 7
    slots: int = 1  # of each expert

    def adapter(self, dim: int, rank: int) -> nn.Module:
        return SoftMoA(dim, rank, self.experts, self.slots)


@dataclass(frozen=True)
class DenseMixture(Parallel):
    """Dense mixtures of adapters."""

    experts: int = 7

    def adapter(self, dim: int, rank: int) -> nn.Module:
        return DenseMoA(dim, rank, self.experts)


# -------------------------------------------------------------------------------- relatives of LoRA


class DoRALinear(LoRALinear):
    """DoRA (Liu et al., ICML 2024): g * (V x) + bias, with V = W + s B A and g = m / |V|.

    m learns the length of every row of the weight, and V its direction. |V| is the length of V's
    rows, one for each output; the paper says columns, but all code takes rows. |V| is a constant in
    the gradient. m starts at |W|.
    """

    reads_weight = True  # petl.put_beneath puts nothing between this module and its Linear

    def __init__(self, wrapped: nn.Linear, rank: int, scale: float):
        super().__init__(wrapped, rank, scale)
        square = wrapped.weight.detach().square().sum(1)
        self.register_buffer("square", square, persistent=False)  # |W|^2, in float32
        self.magnitude = offset(wrapped.out_features)  # m - |W|

    def gain(self):  # (out,)
        """g, without computing V: |V_i|^2 = |W_i|^2 + 2 s (W A^T)_i B_i + s^2 B_i (A A^T) B_i."""
        weight = self.wrapped.weight
        b = self.b.weight
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            a = self.scale * self.a.weight
            change = 2 * weight.to(a.dtype) @ a.T + b @ (a @ a.T)
            square = self.square + (change * b).sum(1)
        return (self.square.sqrt() + self.magnitude) / square.sqrt()

    def forward(self, x):  # (..., in) -> (..., out)
        g = self.gain()
        return g * super().forward(x) + (1 - g) * self.wrapped.bias

    def merged(self) -> nn.Linear:
        """One plain Linear with the weight g * (W + s B A)."""
        g = self.gain()
        linear = super().merged()
        linear.weight = nn.Parameter(g[:, None] * linear.weight)
        return linear


@dataclass(frozen=True)
class DoRA(LoRA):
    """DoRA on the named projections of every attention."""

    def layer(self, linear: nn.Linear) -> DoRALinear:
        return DoRALinear(linear, rank_of(linear.in_features, self.rr), self.alpha / self.rr)


@dataclass(frozen=True)
class RsLoRA(LoRA):
    """LoRA with s = alpha / sqrt(r) (Kalajdzievski, 2023), which compares ranks fairly."""

    def layer(self, linear: nn.Linear) -> LoRALinear:
        rank = rank_of(linear.in_features, self.rr)
        return LoRALinear(linear, rank, self.alpha / rank**0.5)


class VeRALinear(nn.Module):
    """VeRA (Kopiczko et al., ICLR 2024): W x + bias + lambda_b * B (lambda_d * A x).

    A and B are random and frozen, and all projections share the two modules `a` and `b`. Only the
    vectors lambda_d, from 0.1, and lambda_b, from zero, are trained.
    """

    def __init__(self, wrapped: nn.Linear, a: nn.Linear, b: nn.Linear):
        super().__init__()
        self.wrapped = wrapped
        self.a = a
        self.b = b
        self.scale_d = offset(a.out_features)  # lambda_d - 0.1
        self.scale_b = offset(b.out_features)  # lambda_b

    def forward(self, x):  # (..., in) -> (..., out)
        return self.wrapped(x) + self.scale_b * self.b((0.1 + self.scale_d) * self.a(x))

    def merged(self) -> nn.Linear:
        a = (0.1 + self.scale_d)[:, None] * self.a.weight
        change = self.scale_b[:, None] * self.b.weight @ a
        self.wrapped.weight = nn.Parameter(self.wrapped.weight + change)
        return self.wrapped


@dataclass(frozen=True)
class VeRA:
    """VeRA on some projections of every attention. `seed` draws A and B, so no file holds them."""

    targets: str = "qv"  # any of q, k, v, o
    rr: float = 3
    seed: int = 0

    def insert(self, model: AST) -> None:
        dim = model.config.dim
        rank = rank_of(dim, self.rr)
        random = np.random.RandomState(self.seed)
        a = frozen_linear(random, dim, rank)
        b = frozen_linear(random, rank, dim)
        layer = partial(VeRALinear, a=a, b=b)
        for block in map(inner, model.blocks):
            for name in self.targets:
                put_beneath(inner(block.attn), name, layer)


def frozen_linear(random: np.random.RandomState, inputs: int, outputs: int) -> nn.Linear:
    """A weight uniform in +-sqrt(6 / inputs).

    NumPy promises that this generator gives the same numbers for ever; PyTorch promises nothing.
    """
    linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False)
    values = (2 * random.random_sample((outputs, inputs)) - 1) * (6 / inputs) ** 0.5
    linear.weight = nn.Parameter(torch.from_numpy(values).float(), requires_grad=False)
    return linear


# -------------------------------------------------------------------------------- scales and shifts


class Scaled(nn.Module):
    """A layer S (Linear, LayerNorm or Conv2d) with a factor, and perhaps a shift, for each channel.

    It returns scale * S(x) + shift or, if `of_input`, S(scale * x).
    """

    def __init__(self, wrapped: nn.Module, shift: bool = False, of_input: bool = False):
        super().__init__()
        self.wrapped = wrapped
        self.of_input = of_input
        channels = inner(wrapped).weight.shape[1 if of_input else 0]
        self.scale = offset(channels)  # scale - 1
        self.shift = offset(channels) if shift else None

    def forward(self, x):
        if self.of_input:
            return self.wrapped((1 + self.scale) * x)
        is_image = isinstance(self.wrapped, nn.Conv2d)
        shape = (-1, 1, 1) if is_image else (-1,)  # (batch, channels, F, T) or (..., channels)
        y = (1 + self.scale).view(shape) * self.wrapped(x)
        if self.shift is None:
            return y
        return y + self.shift.view(shape)

    def merged(self) -> nn.Module:
        """The same layer with other weights."""
        layer = self.wrapped
        scale = 1 + self.scale
        if self.of_input:
            layer.weight = nn.Parameter(layer.weight * scale)
            return layer
        of_rows = scale.view(-1, *[1] * (layer.weight.ndim - 1))
        layer.weight = nn.Parameter(layer.weight * of_rows)
        shift = 0 if self.shift is None else self.shift
        layer.bias = nn.Parameter(layer.bias * scale + shift)
        return layer


@dataclass(frozen=True)
class IA3:
    """(IA)3 (Liu et al., NeurIPS 2022): a factor for each key, value and number that fc2 reads."""

    def insert(self, model: AST) -> None:
        for block in map(inner, model.blocks):
            for name in "kv":
                put_beneath(inner(block.attn), name, Scaled)
            put_beneath(inner(block.ffn), "fc2", partial(Scaled, of_input=True))


@dataclass(frozen=True)
class SSF:
    """SSF (Lian et al., NeurIPS 2022): y -> scale * y + shift behind every layer that computes.

    The final LayerNorm is trained anyway. The patches are scaled and shifted before their positions
    are added, but only if the method changes all blocks. The authors' code draws scale and shift
    with a deviation of 0.02; here they start at 1 and 0.
    """

    def insert(self, model: AST) -> None:
        layer = partial(Scaled, shift=True)
        if len(model.blocks) == model.config.depth:
            put_beneath(inner(model.embed), "patches", layer)
        for block in map(inner, model.blocks):
            put_beneath(block, "norm1", layer)
            put_beneath(block, "norm2", layer)
            for name in "qkvo":
                put_beneath(inner(block.attn), name, layer)
            put_beneath(inner(block.ffn), "fc1", layer)
            put_beneath(inner(block.ffn), "fc2", layer)


# ----------------------------------------------------------------------------- adapters from vision


class NormAndInput(nn.Module):
    """A LayerNorm that also returns what it reads, for AdaptFormerFFN."""

    def __init__(self, wrapped: nn.Module):
        super().__init__()
        self.wrapped = wrapped

    def forward(self, x):  # (batch, tokens, dim), two of them out
        return self.wrapped(x), x


class AdaptFormerFFN(nn.Module):
    """AdaptFormer (Chen et al., NeurIPS 2022): FFN(u) + 0.1 up(dropout(ReLU(down(x)))).

    x comes before the LayerNorm and u after it. That paper has a LayerNorm before `down`; its code
    has none, and its author says the code is right.
    """

    def __init__(self, wrapped: nn.Module, dim: int, rank: int):
        super().__init__()
        self.wrapped = wrapped
        self.down = nn.Linear(dim, rank)
        nn.init.zeros_(self.down.bias)
        self.dropout = nn.Dropout(0.1)
        self.up = zeros(nn.Linear(rank, dim))

    def forward(self, both):  # twice (batch, tokens, dim), one out
        u, x = both
        return self.wrapped(u) + 0.1 * self.up(self.dropout(F.relu(self.down(x))))


@dataclass(frozen=True)
class AdaptFormer:
    """AdaptFormer at the FFN of every block; the LayerNorm stays frozen."""

    rr: float = 12

    def insert(self, model: AST) -> None:
        dim = model.config.dim
        for block in map(inner, model.blocks):
            block.norm2 = NormAndInput(block.norm2)
            block.ffn = AdaptFormerFFN(block.ffn, dim, rank_of(dim, self.rr))


class AdapterPlusBlock(nn.Module):
    """Adapter+ (Steitz and Roth, CVPR 2024): y + scale * bottleneck(y), with y = block(x).

    In training one clip of ten goes without the adapter. `down` starts as in the authors' code.
    `up` starts at zero here, and small in their code, which also leaves out whole frozen blocks
    (stochastic depth).
    """

    def __init__(self, wrapped: nn.Module, dim: int, rank: int):
        super().__init__()
        self.wrapped = wrapped
        self.adapter = Bottleneck(dim, rank)
        nn.init.trunc_normal_(self.adapter.down.weight, std=0.01, a=-0.02, b=0.02)
        nn.init.zeros_(self.adapter.down.bias)
        self.scale = offset(dim)  # scale - 1

    def forward(self, x):  # (batch, tokens, dim)
        y = self.wrapped(x)
        ones = torch.ones_like(y[:, :1, :1])
        kept = F.dropout(ones, 0.1, self.training)  # (batch, 1, 1): 0 or 1 / 0.9
        return y + kept * (1 + self.scale) * self.adapter(y)


@dataclass(frozen=True)
class AdapterPlus:
    """Adapter+ behind every block; no LayerNorm of a block is trained."""

    rr: float = 96

    def insert(self, model: AST) -> None:
        dim = model.config.dim
        for i, block in enumerate(model.blocks):
            model.blocks[i] = AdapterPlusBlock(block, dim, rank_of(dim, self.rr))


# ------------------------------------------------------------------------------- all layers, probed


class AllLayers(AST):
    """An AST whose head reads statistics of the embedding and of every block."""

    def vector(self, fbank):
        tokens = self.embed(fbank)
        vectors = [statistics(tokens, self.config)]
        for block in self.blocks:
            tokens = block(tokens)
            vectors.append(statistics(tokens, self.config))
        return torch.cat(vectors, dim=1)


def statistics(tokens, config: ASTConfig):  # (batch, tokens, dim) -> (batch, 4 dim)
    """Means of the normalised patches over each third of the time, and their standard deviation."""
    patches = F.layer_norm(tokens[:, -config.n_patches :], (config.dim,), eps=config.eps)
    grid = patches.unflatten(1, config.grid)  # (batch, F, T, dim)
    steps = config.grid[1]
    numbers = []
    for third in range(3):
        start = third * steps // 3
        end = max(start + 1, (third + 1) * steps // 3)  # at least one step
        numbers.append(grid[:, :, start:end].mean((1, 2)))
    numbers.append(patches.std(1, correction=0))
    return torch.cat(numbers, dim=1)


class Standardised(nn.Module):
    """W (x - mean) / std + b, with mean and std of every number of x over the training clips."""

    def __init__(self, wrapped: nn.Linear):
        super().__init__()
        self.wrapped = wrapped
        self.register_buffer("mean", torch.zeros(wrapped.in_features))
        self.register_buffer("std", torch.ones(wrapped.in_features))

    def standardise(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Set mean and std. A number that hardly varies may be rounding, so it is not enlarged."""
        self.mean.copy_(mean)
        self.std.copy_(std.clamp_min(1e-3))

    def forward(self, x):  # (batch, inputs) -> (batch, n_classes)
        return self.wrapped((x - self.mean) / self.std)


@dataclass(frozen=True)
class Statistics:
    """A linear layer on standardised statistics of all layers, without the final LayerNorm."""

    kind = "statistics"  # needs all patches and all blocks

    def insert(self, model: AST) -> None:
        config = model.config
        model.__class__ = AllLayers  # the same modules and tensors, but another `vector`
        numbers = 4 * config.dim * (config.depth + 1)
        model.head = Standardised(nn.Linear(numbers, config.n_classes))
        model.norm.requires_grad_(False)


# ------------------------------------------------------------------------ fewer patches in training


def patchout(draws: torch.Tensor, keep: float) -> torch.Tensor:
    """Indices of the patches that a clip keeps, in order (PaSST; Koutini et al., 2022).

    draws: (batch, patches), uniform in [0, 1). Returns (batch, n), where n / patches = keep.
    """
    n = max(1, round(keep * draws.shape[1]))
    return draws.topk(n, dim=1).indices.sort(dim=1).values


class Patchout(nn.Module):
    """A model that sends only some of the patches through its blocks: faster training."""

    def __init__(self, model: AST):
        super().__init__()
        self.model = model

    def forward(self, fbank, kept):  # kept: indices of patches, (batch, n)
        model = self.model
        n_patches = model.config.n_patches  # counted from the end: prompts may stand in front
        tokens = model.embed(fbank)
        front = tokens[:, :-n_patches]
        patches = tokens[:, -n_patches:].take_along_dim(kept[:, :, None], dim=1)
        tokens = model.encode(torch.cat([front, patches], dim=1))
        return model.head(model.pool(model.norm(tokens)))


# ----------------------------------------------------------------------------- the table of methods

# The learning rates of the conformers, mixtures, ia3 (for Adafactor), ssf, adapter_plus come from
# the sources. The others are proposals. On the demo ten times as much suits rslora, adaptformer and
# adapter_plus, and the rate of probe did best on the demo's validation clips.
ROWS = [
    Method("conformer_pfeiffer_par", (Conformer("attn"),), "271K"),
    Method("conformer_houlsby_par", (Conformer("attn"), Conformer("ffn")), "542K"),
    Method("soft_moa", (SoftMixture(),)),
    Method("dense_moa", (DenseMixture(),)),
    Method("dora", (DoRA(),)),
    Method("ia3", (IA3(),), lr=3e-3),
    Method("vera", (VeRA(),)),
    Method("rslora", (RsLoRA(),), lr=1e-4),
    Method("ssf", (SSF(),)),
    Method("adaptformer", (AdaptFormer(),), lr=1e-3),
    Method("adapter_plus", (AdapterPlus(),), lr=1e-3),
    Method("probe", (Statistics(),), lr=2e-3),
]

METHODS: dict[str, Method] = {method.name: method for method in ROWS}
petl.METHODS |= METHODS
