"""Methods that came after the paper, in the manner of `petl.py`: modules, parts, and their rows of METHODS.

The conformer adapter of the paper's published version, its authors' mixtures of adapters, three relatives of LoRA,
(IA)3, and three methods from vision. All start at the pretrained function. AdamW's weight decay pulls every trained
number to zero: so a factor around frozen layers is trained as its distance from where it starts, and decays to the
pretrained function; those of LayerNorm and BatchNorm are trained as they are. The last one, `probe`, changes nothing
but what the head reads. `load_weights.py` puts the rows beside those of `petl.py`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ast_model import AST, ASTConfig
from petl import Adapted, Bottleneck, LoRA, LoRALinear, Method, inner, put_beneath, rank_of, zeros
from support.headers import Rate, Seed, Size, Targets


def offset(*shape: int) -> nn.Parameter:
    """The distance of something trained from where it starts."""
    return nn.Parameter(torch.zeros(shape))


# ------------------------------------------------------------------------------------------------- parallel adapters


@dataclass(frozen=True)
class Parallel:
    """Adapters parallel to the MHSA (`at="attn"`) or the FFN (`at="ffn"`) of every block; trains their LayerNorm."""

    at: Literal["attn", "ffn"] = "attn"
    rr: Rate = 128  # of a mixture: that of each expert

    def insert(self, model: AST) -> None:
        dim = model.config.dim
        for block in map(inner, model.blocks):
            adapter = self.adapter(dim, rank_of(dim, self.rr))
            setattr(block, self.at, Adapted(getattr(block, self.at), adapter, "par_before"))
            {"attn": block.norm1, "ffn": block.norm2}[self.at].requires_grad_(True)


class ConformerModule(nn.Module):
    """The convolution module of the Conformer (Gulati et al., Interspeech 2020) as a bottleneck of r channels.

    LayerNorm, down to 2r, a gate that leaves r, a window over the token sequence for each channel, BatchNorm, swish, up
    (Cappellazzo et al., MLSP 2024, arXiv 2312.03694v4). The paper's text lacks this LayerNorm, its counts do not.
    The window runs along time within a band of frequencies, and over the ends of the bands.
    """

    def __init__(self, dim: int, rank: int, kernel: int, own_norm: bool):
        super().__init__()
        self.norm = nn.LayerNorm(dim) if own_norm else nn.Identity()
        self.down = nn.Linear(dim, 2 * rank)
        self.conv = nn.Conv1d(rank, rank, kernel, groups=rank)
        self.batch_norm = nn.BatchNorm1d(rank)
        self.up = zeros(nn.Linear(rank, dim))

    def forward(self, u):  # (batch, tokens, dim)
        h = F.glu(self.down(self.norm(u))).transpose(1, 2)  # (batch, rank, tokens): z[:r] sigmoid(z[r:])
        k = self.conv.kernel_size[0]
        h = self.conv(F.pad(h, ((k - 1) // 2, k // 2)))  # as many tokens as before, for even windows too
        return self.up(F.silu(self.batch_norm(h)).transpose(1, 2))


@dataclass(frozen=True)
class Conformer(Parallel):
    rr: Rate = 96
    kernel: Size = 31  # the paper's for speech; 8 for ESC-50 and US8K
    own_norm: bool = True

    def adapter(self, dim: int, rank: int) -> nn.Module:
        return ConformerModule(dim, rank, self.kernel, self.own_norm)


class Experts(nn.Module):
    """n bottlenecks of r: the weights of all, one below the other into the GELU, side by side out of it."""

    def __init__(self, dim: int, rank: int, experts: int):
        super().__init__()
        self.down = nn.Linear(dim, experts * rank)
        self.up = zeros(nn.Linear(experts * rank, dim, bias=False))
        self.up_bias = offset(experts, dim)


class SoftMoA(Experts):
    """Soft mixture of adapters (Cappellazzo et al., Interspeech 2024, arXiv 2402.00828), after Soft MoE.

    Each expert has p slots. A slot reads a weighted mean of the tokens, a token gets such a mean of the answers.
    """

    def __init__(self, dim: int, rank: int, experts: int, slots: int):
        super().__init__(dim, rank, experts)
        self.slots = nn.Parameter(nn.init.xavier_normal_(torch.empty(dim, experts, slots)))

    def forward(self, u):  # (batch, tokens, dim)
        n, p = self.slots.shape[1:]
        logits = u @ self.slots.flatten(1)  # (batch, tokens, n p)
        x = (logits.softmax(1).transpose(1, 2) @ u).unflatten(1, (n, p))  # (batch, n, p, dim): what the slots read
        h = torch.einsum("bnpd,nrd->bnpr", x, self.down.weight.unflatten(0, (n, -1)))
        h = F.gelu(h + self.down.bias.view(n, 1, -1))
        y = torch.einsum("bnpr,dnr->bnpd", h, self.up.weight.unflatten(1, (n, -1))) + self.up_bias[:, None]
        return logits.softmax(2) @ y.flatten(1, 2)


class DenseMoA(Experts):
    """Dense mixture of adapters (the same paper): a token gets a weighted mean of what the experts E make of it.

    sum_i P_i E_i(u), P = softmax(router(u)), is one bottleneck n times as wide, whose hidden units P weighs.
    """

    def __init__(self, dim: int, rank: int, experts: int):
        super().__init__(dim, rank, experts)
        self.router = nn.Linear(dim, experts)

    def forward(self, u):  # (batch, tokens, dim)
        weights = self.router(u).softmax(-1)  # (batch, tokens, n)
        h = F.gelu(self.down(u)).unflatten(-1, (weights.shape[-1], -1)) * weights[..., None]  # (batch, tokens, n, r)
        return self.up(h.flatten(2)) + weights @ self.up_bias


@dataclass(frozen=True)
class SoftMixture(Parallel):
    experts: Size = 7
    slots: Size = 1  # of each expert

    def adapter(self, dim: int, rank: int) -> nn.Module:
        return SoftMoA(dim, rank, self.experts, self.slots)


@dataclass(frozen=True)
class DenseMixture(Parallel):
    experts: Size = 7

    def adapter(self, dim: int, rank: int) -> nn.Module:
        return DenseMoA(dim, rank, self.experts)


# -------------------------------------------------------------------------------------------------- relatives of LoRA


class DoRALinear(LoRALinear):
    """g * (V x) + bias with V = W + s B A, g = m / |V| (Liu et al., ICML 2024): lengths and directions of rows apart.

    |V| holds the lengths of V's rows, one for each output (the paper says columns, all code takes rows), and counts as
    constant in the gradient. m starts at |W|.
    """

    reads_weight = True  # nothing may come between: see put_beneath

    def __init__(self, wrapped: nn.Linear, rank: int, scale: float):
        super().__init__(wrapped, rank, scale)
        self.register_buffer("square", wrapped.weight.detach().square().sum(1), persistent=False)  # |W|^2, in float32
        self.magnitude = offset(wrapped.out_features)  # m - |W|

    def gain(self):  # (out,)
        """g. |V_i|^2 = |W_i|^2 + 2 s (W A^T)_i B_i + s^2 B_i (A A^T) B_i, without computing V."""
        weight, b = self.wrapped.weight, self.b.weight
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            a = self.scale * self.a.weight
            square = self.square + ((2 * weight.to(a.dtype) @ a.T + b @ (a @ a.T)) * b).sum(1)
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
    """LoRA with s = alpha / sqrt(r) (Kalajdzievski, 2023), for comparing ranks: at one rank it is LoRA's alpha."""

    def layer(self, linear: nn.Linear) -> LoRALinear:
        rank = rank_of(linear.in_features, self.rr)
        return LoRALinear(linear, rank, self.alpha / rank**0.5)


class VeRALinear(nn.Module):
    """W x + bias + lambda_b * B (lambda_d * A x), A and B random and frozen (Kopiczko et al., ICLR 2024).

    `a` and `b` are the same two modules in all projections. lambda_d starts at 0.1, lambda_b at zero.
    """

    def __init__(self, wrapped: nn.Linear, a: nn.Linear, b: nn.Linear):
        super().__init__()
        self.wrapped, self.a, self.b = wrapped, a, b
        self.scale_d, self.scale_b = offset(a.out_features), offset(b.out_features)  # lambda_d - 0.1, lambda_b

    def forward(self, x):  # (..., in) -> (..., out)
        return self.wrapped(x) + self.scale_b * self.b((0.1 + self.scale_d) * self.a(x))

    def merged(self) -> nn.Linear:
        change = self.scale_b[:, None] * self.b.weight @ ((0.1 + self.scale_d)[:, None] * self.a.weight)
        self.wrapped.weight = nn.Parameter(self.wrapped.weight + change)
        return self.wrapped


@dataclass(frozen=True)
class VeRA:
    """VeRA on the named projections. `seed` draws A and B, so that no file needs to hold them."""

    targets: Targets = "qv"  # any of q, k, v, o
    rr: Rate = 3
    seed: Seed = 0

    def insert(self, model: AST) -> None:
        dim, rank, random = model.config.dim, rank_of(model.config.dim, self.rr), np.random.RandomState(self.seed)
        layer = partial(VeRALinear, a=frozen_linear(random, dim, rank), b=frozen_linear(random, rank, dim))
        for block in map(inner, model.blocks):
            for name in self.targets:
                put_beneath(inner(block.attn), name, layer)


def frozen_linear(random: np.random.RandomState, inputs: int, outputs: int) -> nn.Linear:
    """Uniform in +-sqrt(6 / inputs). NumPy promises the same numbers from this generator for ever; PyTorch does not."""
    linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False)
    values = (2 * random.random_sample((outputs, inputs)) - 1) * (6 / inputs) ** 0.5
    linear.weight = nn.Parameter(torch.from_numpy(values).float(), requires_grad=False)
    return linear


# -------------------------------------------------------------------------------------------------- scales and shifts


class Scaled(nn.Module):
    """scale * S(x) + shift for each channel, S a Linear, LayerNorm or Conv2d; or W (scale * x) + bias."""

    def __init__(self, wrapped: nn.Module, shift: bool = False, of_input: bool = False):
        super().__init__()
        self.wrapped, self.of_input = wrapped, of_input
        channels = inner(wrapped).weight.shape[1 if of_input else 0]
        self.scale = offset(channels)  # scale - 1
        self.shift = offset(channels) if shift else None

    def forward(self, x):
        if self.of_input:
            return self.wrapped((1 + self.scale) * x)
        shape = (-1, 1, 1) if isinstance(self.wrapped, nn.Conv2d) else (-1,)  # (batch, channels, F, T) or (..., out)
        y = (1 + self.scale).view(shape) * self.wrapped(x)
        return y if self.shift is None else y + self.shift.view(shape)

    def merged(self) -> nn.Module:
        """The same layer with other weights."""
        layer, scale = self.wrapped, 1 + self.scale
        if self.of_input:
            layer.weight = nn.Parameter(layer.weight * scale)
        else:
            layer.weight = nn.Parameter(layer.weight * scale.view(-1, *[1] * (layer.weight.ndim - 1)))
            layer.bias = nn.Parameter(layer.bias * scale + (0 if self.shift is None else self.shift))
        return layer


@dataclass(frozen=True)
class IA3:
    """(IA)3 (Liu et al., NeurIPS 2022): a factor for each key, each value, and each number that fc2 reads."""

    def insert(self, model: AST) -> None:
        for block in map(inner, model.blocks):
            for name in "kv":
                put_beneath(inner(block.attn), name, Scaled)
            put_beneath(inner(block.ffn), "fc2", partial(Scaled, of_input=True))


@dataclass(frozen=True)
class SSF:
    """Scale and shift (Lian et al., NeurIPS 2022) behind every layer that computes: y -> scale * y + shift.

    Behind the patches too, before their positions are added, where all blocks are changed. The final LayerNorm is
    trained anyway. Its code draws both with a deviation of 0.02; here they start at 1 and 0.
    """

    def insert(self, model: AST) -> None:
        places = [(inner(model.embed), ["patches"])] if len(model.blocks) == model.config.depth else []
        for block in map(inner, model.blocks):
            places += [(block, ["norm1", "norm2"]), (inner(block.attn), "qkvo"), (inner(block.ffn), ["fc1", "fc2"])]
        for parent, names in places:
            for name in names:
                put_beneath(parent, name, partial(Scaled, shift=True))


# ----------------------------------------------------------------------------------------------- adapters from vision


class NormAndInput(nn.Module):
    """A LayerNorm that hands on what it reads as well, for AdaptFormerFFN."""

    def __init__(self, wrapped: nn.Module):
        super().__init__()
        self.wrapped = wrapped

    def forward(self, x):  # (batch, tokens, dim), two of them out
        return self.wrapped(x), x


class AdaptFormerFFN(nn.Module):
    """FFN(u) + 0.1 up(dropout(ReLU(down(x)))), x before the LayerNorm, u after it (Chen et al., NeurIPS 2022).

    The paper has a LayerNorm before `down`; its code has none, and its author says the code is right.
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

    rr: Rate = 12

    def insert(self, model: AST) -> None:
        for block in map(inner, model.blocks):
            block.norm2 = NormAndInput(block.norm2)
            block.ffn = AdaptFormerFFN(block.ffn, model.config.dim, rank_of(model.config.dim, self.rr))


class AdapterPlusBlock(nn.Module):
    """y + scale * bottleneck(y), y = block(x) (Adapter+, Steitz and Roth, CVPR 2024), without it for 1 of 10 clips.

    Its code starts both projections small and off zero; here `down` starts as there and `up` at zero. There whole
    frozen blocks are left out, too (stochastic depth); here they are not.
    """

    def __init__(self, wrapped: nn.Module, dim: int, rank: int):
        super().__init__()
        self.wrapped, self.adapter = wrapped, Bottleneck(dim, rank)
        nn.init.trunc_normal_(self.adapter.down.weight, std=0.01, a=-0.02, b=0.02)
        nn.init.zeros_(self.adapter.down.bias)
        self.scale = offset(dim)  # scale - 1

    def forward(self, x):  # (batch, tokens, dim)
        y = self.wrapped(x)
        kept = F.dropout(torch.ones_like(y[:, :1, :1]), 0.1, self.training)  # (batch, 1, 1): 0 or 1 / 0.9
        return y + kept * (1 + self.scale) * self.adapter(y)


@dataclass(frozen=True)
class AdapterPlus:
    """Adapter+ behind every block; no LayerNorm of a block is trained."""

    rr: Rate = 96

    def insert(self, model: AST) -> None:
        for i, block in enumerate(model.blocks):
            model.blocks[i] = AdapterPlusBlock(block, model.config.dim, rank_of(model.config.dim, self.rr))


# ------------------------------------------------------------------------------------------------ all layers, probed


class AllLayers(AST):
    """An AST whose head reads statistics of the embedding and of every block in place of the last one's mean."""

    def vector(self, fbank, kept=None):  # all patches: support/variants.py refuses --keep
        return torch.cat([statistics(tokens, self.config) for tokens in self.states(fbank)], dim=1)


def statistics(tokens, config: ASTConfig):  # (batch, tokens, dim) -> (batch, 4 dim)
    """Means of the normalised patches over each third of the time, and their standard deviation."""
    patches = F.layer_norm(tokens[:, -config.n_patches :], (config.dim,), eps=config.eps)
    grid, steps = patches.unflatten(1, config.grid), config.grid[1]  # (batch, F, T, dim), T
    ends = [(i * steps // 3, max(i * steps // 3 + 1, (i + 1) * steps // 3)) for i in range(3)]  # one step at least
    means = [grid[:, :, start:end].mean((1, 2)) for start, end in ends]
    return torch.cat([*means, patches.std(1, correction=0)], dim=1)


class Standardised(nn.Module):
    """W (x - mean) / std + b, each number of x standardised as it is spread over the training clips."""

    def __init__(self, wrapped: nn.Linear):
        super().__init__()
        self.wrapped = wrapped
        self.register_buffer("mean", torch.zeros(wrapped.in_features))
        self.register_buffer("std", torch.ones(wrapped.in_features))

    def standardise(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """What hardly differs between clips stays small: it may be rounding."""
        self.mean.copy_(mean)
        self.std.copy_(std.clamp_min(1e-3))

    def forward(self, x):  # (batch, inputs) -> (batch, n_classes)
        return self.wrapped((x - self.mean) / self.std)


@dataclass(frozen=True)
class Statistics:
    """A linear layer on statistics of all layers, standardised; the final LayerNorm is not used."""

    kind = "statistics"  # for support/variants.py

    def insert(self, model: AST) -> None:
        config = model.config
        model.__class__ = AllLayers  # the same modules and tensors, read otherwise
        model.head = Standardised(nn.Linear(4 * config.dim * (config.depth + 1), config.n_classes))
        model.norm.requires_grad_(False)


# ---------------------------------------------------------------------------------------------- the table of methods

# Learning rates of the conformers, mixtures, ia3 (there of Adafactor), ssf and adapter_plus are those of the sources;
# of the others proposals: ten times as much suits rslora, adaptformer and adapter_plus on the demo, that of probe did
# best on its validation clips.
METHODS: dict[str, Method] = {
    method.name: method for method in [
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
}  # fmt: skip
