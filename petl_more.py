"""Methods that came after the paper, written like those of petl.py: modules, parts and rows.

There are the conformer adapter of the paper's published version, its authors' mixtures of adapters,
three relatives of LoRA, (IA)3, SSF, and two adapters from vision. All of them start at the
pretrained function. `probe` fits a linear layer to what all blocks compute, and `logmel` fits one
to the spectrogram alone. `Patchout` is no method: it trains on some of the patches.

AdamW's weight decay pulls every trained number towards zero. A factor should be pulled towards the
value that it starts with instead: 1 for most, |W| in DoRA, 0.1 for lambda_d and 0 for lambda_b in
VeRA. So what is stored is the factor minus its start. (`scale` of LoRA is no trained factor.)
Of the factors, only the weights of LayerNorm and BatchNorm are stored as they are.

`import petl_more` adds the rows to `petl.METHODS`. This file needs torch, numpy, ast_model.py and
petl.py. Where the sources train a method in another way, docs/differences.md says so.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import MethodType

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import petl
from ast_model import AST, ASTConfig
from petl import Adapter, Bottleneck, LoRA, LoRALinear, Method, inner, rank_of, wrap, zeros


def offset(*shape: int) -> nn.Parameter:
    """A trained offset from the value at the start, so it starts at zero."""
    return nn.Parameter(torch.zeros(shape))


# ------------------------------------------------------------------ adapters in place of Bottleneck


class ConformerModule(nn.Module):
    """The convolution module of the Conformer (Gulati et al., Interspeech 2020), r channels wide.

    Cappellazzo et al. (MLSP 2024, arXiv 2312.03694v4) use it as an adapter: LayerNorm, down to 2r,
    a gate that leaves r, a convolution along the tokens for each channel, BatchNorm, swish, up.
    Their text does not mention the LayerNorm, but their parameter counts contain it. Their code
    computes it and drops its result; here the result is used.

    Tokens are in the order of `AST`: band after band, and along time within a band. So the window
    of the convolution runs along time, and at the end of a band it reaches into the next band.
    """

    def __init__(self, dim: int, rank: int, kernel: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.down = nn.Linear(dim, 2 * rank)
        self.conv = nn.Conv1d(rank, rank, kernel, groups=rank)
        self.batch_norm = nn.BatchNorm1d(rank)
        self.up = zeros(nn.Linear(rank, dim))

    def forward(self, u):  # (batch, tokens, dim)
        h = F.glu(self.down(self.norm(u)))  # z[:r] sigmoid(z[r:]), with z of size 2r
        h = h.transpose(1, 2)  # (batch, rank, tokens)
        k = self.conv.kernel_size[0]
        h = F.pad(h, ((k - 1) // 2, k // 2))  # as many tokens out as in, for an even window, too
        h = F.silu(self.batch_norm(self.conv(h)))
        return self.up(h.transpose(1, 2))


@dataclass(frozen=True)
class Conformer(Adapter):
    """A bottleneck with the convolution module of the Conformer inside (ConformerModule)."""

    rr: float = 96
    kernel: int = 31  # tokens; arXiv 2312.03694v4 has 31 for speech, 8 for ESC-50 and UrbanSound8K

    def build(self, config):
        return ConformerModule(config.dim, rank_of(config.dim, self.rr), self.kernel)


class Experts(nn.Module):
    """n bottlenecks of size r, the experts of a mixture, side by side in the same tensors.

    Expert i owns the rows i r to (i + 1) r of `down`, the same columns of `up`, and row i of
    `up_bias`.
    """

    def __init__(self, dim: int, rank: int, experts: int):
        super().__init__()
        self.down = nn.Linear(dim, experts * rank)
        self.up = zeros(nn.Linear(experts * rank, dim, bias=False))
        self.up_bias = offset(experts, dim)  # the biases themselves


class SoftMoA(Experts):
    """Soft mixture of adapters (Cappellazzo et al., Interspeech 2024, arXiv 2402.00828).

    Each of the n experts has p slots, as in Soft MoE. A slot reads a weighted mean of the tokens,
    and a token gets a weighted mean of what the experts make of the slots.
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
        return logits.softmax(2) @ y.flatten(1, 2)  # (batch, tokens, dim)


class DenseMoA(Experts):
    """Dense mixture of adapters (the same source): sum_i P_i E_i(u), with P = softmax(router(u)).

    E_i is expert i. The sum is computed as one bottleneck n times as wide, whose hidden units are
    multiplied by P.
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
class SoftMixture(Adapter):
    """A soft mixture of bottlenecks in place of one (SoftMoA)."""

    rr: float = 128  # of each expert
    experts: int = 7
    slots: int = 1  # of each expert

    def build(self, config):
        return SoftMoA(config.dim, rank_of(config.dim, self.rr), self.experts, self.slots)


@dataclass(frozen=True)
class DenseMixture(Adapter):
    """A dense mixture of bottlenecks in place of one (DenseMoA)."""

    rr: float = 128  # of each expert
    experts: int = 7

    def build(self, config):
        return DenseMoA(config.dim, rank_of(config.dim, self.rr), self.experts)


# -------------------------------------------------------------------------------- relatives of LoRA


def without_autocast(device: torch.device):
    """A context in which autocast is off: products of float32 matrices stay in float32."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class DoRALinear(LoRALinear):
    """DoRA (Liu et al., ICML 2024): g V x + bias, with V = W + s B A and g = m / |V|.

    |V| (out,) has the length of each row of V, which is V.norm(dim=1). So V learns the direction of
    each row, and m (out,) its length. m starts at |W|. The DoRA paper says columns; all code takes
    rows. |V| is treated as a constant in the gradient, as that paper proposes.
    """

    reads_weight = True  # petl.wrap puts nothing between this module and its Linear

    def __init__(self, wrapped: nn.Linear, rank: int, scale: float):
        super().__init__(wrapped, rank, scale)
        w_square = wrapped.weight.detach().square().sum(1)
        self.register_buffer("w_square", w_square, persistent=False)  # |W|^2, in float32
        self.magnitude = offset(wrapped.out_features)  # m - |W|

    def gain(self):  # (out,)
        """g = m / |V|. Computing V would take longer than the layer, so |V|^2 is expanded:

        |V_i|^2 = |W_i|^2 + 2 s (W A^T)_i B_i + s^2 B_i (A A^T) B_i for row i.
        """
        weight = self.wrapped.weight
        b = self.b.weight
        with torch.no_grad(), without_autocast(weight.device):
            sa = self.scale * self.a.weight  # s A, so that s and s^2 are in the products
            change = 2 * weight.to(sa.dtype) @ sa.T + b @ (sa @ sa.T)
            v_square = self.w_square + (change * b).sum(1)
        return (self.w_square.sqrt() + self.magnitude) / v_square.sqrt()

    def forward(self, x):  # (..., in) -> (..., out)
        g = self.gain()
        y = super().forward(x)  # V x + bias
        return g * y + (1 - g) * self.wrapped.bias  # g V x + bias: the bias is not scaled

    def merged(self) -> nn.Linear:
        """A new Linear with the weight g V."""
        linear = super().merged()
        linear.weight = nn.Parameter(self.gain()[:, None] * linear.weight)
        return linear


@dataclass(frozen=True)
class DoRA(LoRA):
    """DoRA on some projections of every attention: LoRA, and the length of each row apart."""

    def build(self, linear):
        rank = rank_of(inner(linear).in_features, self.rr)
        return DoRALinear(linear, rank, self.scale)


@dataclass(frozen=True)
class RsLoRA(LoRA):
    """LoRA whose scale changes with the rank as 1 / sqrt(r) (Kalajdzievski, 2023).

    That paper has s = alpha / sqrt(r). Here s is that of LoRA, alpha / RR, where RR is `lora_rr`.
    So the row `rslora` is the row `lora`, and other reduction rates make the difference: LoRA's s
    grows with r, and this one becomes smaller.
    """

    lora_rr: float = 128

    @property
    def scale(self):  # r = dim / RR, so 1 / sqrt(r) changes as sqrt(RR)
        return self.alpha / self.lora_rr * (self.rr / self.lora_rr) ** 0.5


class VeRALinear(nn.Module):
    """VeRA (Kopiczko et al., ICLR 2024): W x + bias + lambda_b * B (lambda_d * A x).

    A and B are random and frozen, and all projections share the two modules `a` and `b`. Only the
    vectors lambda_d and lambda_b are trained. lambda_d starts at 0.1, and lambda_b at zero.
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
        """A new Linear with the weight W + diag(lambda_b) B diag(lambda_d) A."""
        linear = copy.deepcopy(self.wrapped)
        a = (0.1 + self.scale_d)[:, None] * self.a.weight
        change = self.scale_b[:, None] * self.b.weight @ a
        linear.weight = nn.Parameter(linear.weight + change)
        return linear


@dataclass(frozen=True)
class VeRA:
    """VeRA on some projections of every attention: factors around two frozen random matrices."""

    targets: str = "qv"  # any of q, k, v, o
    rr: float = 3
    seed: int = 0  # draws A and B, so that no file needs to hold them; not the seed of the run

    def insert(self, model, blocks):
        dim = model.config.dim
        rank = rank_of(dim, self.rr)
        random = np.random.RandomState(self.seed)
        a = frozen_linear(random, dim, rank)
        b = frozen_linear(random, rank, dim)
        for block in blocks:
            for name in self.targets:
                wrap(inner(block.attn), name, partial(VeRALinear, a=a, b=b))


def frozen_linear(random: np.random.RandomState, inputs: int, outputs: int) -> nn.Linear:
    """A frozen weight (outputs, inputs), uniform in +-sqrt(6 / inputs).

    NumPy promises that RandomState gives the same numbers for ever. PyTorch promises nothing.
    """
    linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False)
    values = (2 * random.random_sample((outputs, inputs)) - 1) * (6 / inputs) ** 0.5
    linear.weight = nn.Parameter(torch.from_numpy(values).float(), requires_grad=False)
    return linear


# -------------------------------------------------------------------------------- scales and shifts


class Scaled(nn.Module):
    """factor * S(x) + shift for each output channel of a layer S: a Linear, LayerNorm or Conv2d."""

    def __init__(self, wrapped, shift: bool = False):
        super().__init__()
        self.wrapped = wrapped
        channels = inner(wrapped).weight.shape[0]
        self.scale = offset(channels)  # factor - 1
        self.shift = offset(channels) if shift else None  # the shift itself

    def forward(self, x):
        is_image = isinstance(self.wrapped, nn.Conv2d)  # (batch, channels, height, width)
        shape = (-1, 1, 1) if is_image else (-1,)
        y = (1 + self.scale).view(shape) * self.wrapped(x)
        if self.shift is None:
            return y
        return y + self.shift.view(shape)

    def merged(self) -> nn.Module:
        """A new layer of the same kind, whose weight and bias are scaled and shifted."""
        layer = copy.deepcopy(self.wrapped)
        factor = 1 + self.scale
        factor_of_rows = factor.view(-1, *[1] * (layer.weight.ndim - 1))
        layer.weight = nn.Parameter(layer.weight * factor_of_rows)
        shift = 0 if self.shift is None else self.shift
        layer.bias = nn.Parameter(layer.bias * factor + shift)
        return layer


class ScaledInput(nn.Module):
    """W (factor * x) + bias: a factor for each number that a Linear reads."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped
        self.scale = offset(inner(wrapped).in_features)  # factor - 1

    def forward(self, x):  # (..., in) -> (..., out)
        return self.wrapped((1 + self.scale) * x)

    def merged(self) -> nn.Module:
        """A new Linear with the weight W diag(factor)."""
        linear = copy.deepcopy(self.wrapped)
        linear.weight = nn.Parameter(linear.weight * (1 + self.scale))
        return linear


@dataclass(frozen=True)
class IA3:
    """(IA)3 (Liu et al., NeurIPS 2022): factors for keys, values, and what fc2 reads."""

    def insert(self, model, blocks):
        for block in blocks:
            attn = inner(block.attn)
            wrap(attn, "k", Scaled)
            wrap(attn, "v", Scaled)
            wrap(inner(block.ffn), "fc2", ScaledInput)


@dataclass(frozen=True)
class SSF:
    """SSF (Lian et al., NeurIPS 2022): y -> factor * y + shift behind every Linear and LayerNorm.

    The final LayerNorm is trained anyway. The patches, which a Conv2d makes, are scaled and shifted
    before their positions are added, but only if the method changes all blocks. The authors' code
    draws factor and shift with a deviation of 0.02 around 1 and 0; here they start at 1 and 0.
    """

    def insert(self, model, blocks):
        layer = partial(Scaled, shift=True)
        if len(blocks) == len(model.blocks):
            wrap(inner(model.embed), "patches", layer)
        for block in blocks:
            wrap(block, "norm1", layer)
            wrap(block, "norm2", layer)
            for name in "qkvo":
                wrap(inner(block.attn), name, layer)
            wrap(inner(block.ffn), "fc1", layer)
            wrap(inner(block.ffn), "fc2", layer)


# ----------------------------------------------------------------------------- adapters from vision


class AdaptFormerFFN(nn.Module):
    """AdaptFormer (Chen et al., NeurIPS 2022): FFN(norm(x)) + 0.1 up(dropout(ReLU(down(x)))).

    The AdaptFormer paper has a LayerNorm before `down`. Its code has none, and its author says that
    the code is right.
    """

    def __init__(self, wrapped, norm: nn.Module, dim: int, rank: int):
        super().__init__()
        self.wrapped = wrapped
        self.norm = norm
        self.down = nn.Linear(dim, rank)
        nn.init.zeros_(self.down.bias)
        self.dropout = nn.Dropout(0.1)
        self.up = zeros(nn.Linear(rank, dim))

    def forward(self, x):  # (batch, tokens, dim), before the LayerNorm
        return self.wrapped(self.norm(x)) + 0.1 * self.up(self.dropout(F.relu(self.down(x))))


@dataclass(frozen=True)
class AdaptFormer:
    """AdaptFormer: a bottleneck parallel to LayerNorm and FFN of every block.

    The LayerNorm before the FFN stays frozen. It moves into AdaptFormerFFN, which needs x before
    it. So no other part may adapt this FFN.
    """

    rr: float = 12

    def insert(self, model, blocks):
        dim = model.config.dim
        for block in blocks:
            block.ffn = AdaptFormerFFN(block.ffn, block.norm2, dim, rank_of(dim, self.rr))
            block.norm2 = nn.Identity()


class AdapterPlusBlock(nn.Module):
    """Adapter+ (Steitz and Roth, CVPR 2024): y + factor * bottleneck(y), with y = block(x).

    In training one clip of ten goes without the adapter. `down` starts as in the authors' code.
    `up` starts at zero here; in their code it starts at small random numbers. Their code also
    leaves out whole frozen blocks at random (stochastic depth); this one does not.
    """

    def __init__(self, wrapped, dim: int, rank: int):
        super().__init__()
        self.wrapped = wrapped
        self.adapter = Bottleneck(dim, rank)
        nn.init.trunc_normal_(self.adapter.down.weight, std=0.01, a=-0.02, b=0.02)
        nn.init.zeros_(self.adapter.down.bias)
        self.scale = offset(dim)  # factor - 1

    def forward(self, x):  # (batch, tokens, dim)
        y = self.wrapped(x)
        ones = torch.ones_like(y[:, :1, :1])
        kept = F.dropout(ones, 0.1, self.training)  # (batch, 1, 1): 0 or 1 / 0.9
        return y + kept * (1 + self.scale) * self.adapter(y)


@dataclass(frozen=True)
class AdapterPlus:
    """Adapter+: a bottleneck behind every block. The LayerNorms of the blocks stay frozen."""

    rr: float = 96

    def insert(self, model, blocks):
        dim = model.config.dim
        for i, block in enumerate(model.blocks):
            if inner(block) in blocks:
                model.blocks[i] = AdapterPlusBlock(block, dim, rank_of(dim, self.rr))


# ------------------------------------------------------------------- linear probes that are fitted


def vector_of_all_layers(model: AST, spectrogram):
    """What the head of `probe` reads: `statistics` of the embedding and of every block's output.

    spectrogram: (batch, n_frames, n_mels). Returns (batch, 4 dim (depth + 1)).
    """
    tokens = model.embed(spectrogram)
    vectors = [statistics(tokens, model.config)]
    for block in model.blocks:
        tokens = block(tokens)
        vectors.append(statistics(tokens, model.config))
    return torch.cat(vectors, dim=1)


def statistics(tokens, config: ASTConfig):  # (batch, tokens, dim) -> (batch, 4 dim)
    """Four numbers for each dimension, taken over the normalised patches of a clip.

    Three are the means over the first, second and last third of the time. The fourth is the
    standard deviation over all patches.
    """
    patches = F.layer_norm(tokens[:, -config.n_patches :], (config.dim,), eps=config.eps)
    grid = patches.unflatten(1, config.grid)  # (batch, n_freq, n_time, dim)
    steps = config.grid[1]
    vectors = []  # each (batch, dim)
    for third in range(3):
        start = third * steps // 3
        end = max(start + 1, (third + 1) * steps // 3)  # at least one step
        vectors.append(grid[:, :, start:end].mean((1, 2)))
    vectors.append(patches.std(1, correction=0))
    return torch.cat(vectors, dim=1)


def vector_of_log_mel(model: AST, spectrogram):
    """What the head of `logmel` reads: mean and standard deviation of every log-Mel band.

    They are taken over the whole clip and over each fifth of it. No backbone is used.
    spectrogram: (batch, n_frames, n_mels). Returns (batch, 12 n_mels).
    """
    vectors = []  # each (batch, n_mels)
    for part in (spectrogram, *spectrogram.tensor_split(5, dim=1)):
        vectors.append(part.mean(1))
        vectors.append(part.std(1, correction=0))
    return torch.cat(vectors, dim=1)


class Standardised(nn.Module):
    """W ((x - mean) / std) + bias, with mean and std of every number of x over the training clips.

    `fit` sets all four.
    """

    def __init__(self, wrapped: nn.Linear):
        super().__init__()
        self.wrapped = wrapped
        self.register_buffer("mean", torch.zeros(wrapped.in_features))
        self.register_buffer("std", torch.ones(wrapped.in_features))

    def standardise(self, vectors: torch.Tensor) -> None:
        """Set mean and std to those of the vectors (clips, inputs), computed in float64.

        A std below 1e-3 is raised to it, because it may be rounding.
        """
        pieces = vectors.split(1024)  # float64 of all clips might not fit into memory
        mean = sum(piece.double().sum(0) for piece in pieces) / len(vectors)
        square = sum((piece.double() - mean).square().sum(0) for piece in pieces) / len(vectors)
        self.mean.copy_(mean)
        self.std.copy_(square.sqrt().clamp_min(1e-3))

    def forward(self, x):  # (batch, inputs) -> (batch, n_classes)
        return self.wrapped((x - self.mean) / self.std)


# From strong to weak. The one that is best on the validation clips is used, or without such clips
# the last. With n clips and d inputs a penalty p is scikit-learn's C = 1 / (n d p).
PENALTIES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def fit(
    head: Standardised,
    vectors: torch.Tensor,
    labels: torch.Tensor,
    penalty: float,
    class_weights: torch.Tensor | None = None,
) -> float:
    """Fit a linear head: multinomial logistic regression by L-BFGS, in float64 on the CPU.

    vectors: (clips, inputs), what the head reads. labels: (clips,). class_weights: (classes,).

    The loss is the mean cross-entropy + penalty / 2 * inputs * |W|^2. Returns it at the minimum,
    where it leaves the head. The search starts from what the head has. So a path of penalties, from
    strong to weak, takes few steps each. The same start and clips give the same bits.
    """
    vectors = vectors.cpu().float()
    labels = labels.cpu()
    if class_weights is not None:
        class_weights = class_weights.cpu().double()
    head.standardise(vectors)
    mean = head.mean.cpu().double()
    std = head.std.cpu().double()
    weight = head.wrapped.weight.detach().cpu().double().requires_grad_()
    bias = head.wrapped.bias.detach().cpu().double().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=100,
        history_size=10,
        tolerance_grad=1e-4,
        line_search_fn="strong_wolfe",
    )

    def loss_and_gradients():
        optimizer.zero_grad()
        loss = penalty / 2 * weight.shape[1] * weight.square().sum()
        loss.backward()
        total = loss.detach()
        for x, y in zip(vectors.split(1024), labels.split(1024), strict=True):
            # W ((x - mean) / std) + bias. It is faster to divide the small W.
            scaled = weight / std
            logits = F.linear(x.double(), scaled, bias - scaled @ mean)
            loss = F.cross_entropy(logits, y, weight=class_weights, reduction="sum") / len(labels)
            loss.backward()  # adds to the gradients
            total += loss.detach()
        return total

    optimizer.step(loss_and_gradients)
    with torch.no_grad():
        head.wrapped.weight.copy_(weight)
        head.wrapped.bias.copy_(bias)
    return loss_and_gradients().item()


@dataclass(frozen=True)
class Statistics:
    """A linear head, fitted to statistics of all layers. The final LayerNorm is not used.

    This is more than the paper's linear probing, which is the row `linear`.
    """

    is_fitted = True
    needs_all_patches = True
    needs_all_blocks = True
    pools_itself = True

    def insert(self, model, blocks):
        config = model.config
        model.vector = MethodType(vector_of_all_layers, model)  # this model's own, not AST.vector
        inputs = 4 * config.dim * (config.depth + 1)
        model.head = Standardised(zeros(nn.Linear(inputs, config.n_classes)))
        model.norm.requires_grad_(False)


@dataclass(frozen=True)
class LogMel:
    """A linear head, fitted to statistics of the spectrogram. It replaces the whole backbone.

    This is the baseline that says what a backbone is worth.
    """

    is_fitted = True
    has_no_backbone = True
    needs_all_patches = True
    needs_all_blocks = True
    pools_itself = True

    def insert(self, model, blocks):
        config = model.config
        model.vector = MethodType(vector_of_log_mel, model)
        model.embed = nn.Identity()
        model.blocks = nn.ModuleList()
        model.head = Standardised(zeros(nn.Linear(12 * config.n_mels, config.n_classes)))
        model.norm.requires_grad_(False)


# ------------------------------------------------------------------------ fewer patches in training


def patchout(draws: torch.Tensor, keep: float) -> torch.Tensor:
    """Indices (batch, n) of the patches that each clip keeps, in order, with n = keep * patches.

    draws: (batch, patches), uniform in [0, 1). Source: PaSST (Koutini et al., 2022).
    """
    n = max(1, round(keep * draws.shape[1]))
    return draws.topk(n, dim=1).indices.sort(dim=1).values


class Patchout(nn.Module):
    """A model that sends a random share `keep` of the patches through its blocks.

    Training is faster with fewer tokens. The wrapped model itself still reads all patches.
    """

    def __init__(self, model: AST, keep: float):
        super().__init__()
        self.model = model
        self.keep = keep

    def forward(self, spectrogram):  # (batch, n_frames, n_mels) -> (batch, n_classes)
        model = self.model
        n_patches = model.config.n_patches
        tokens = model.embed(spectrogram)
        front = tokens[:, :-n_patches]  # [CLS], and [distillation] or prompts
        patches = tokens[:, -n_patches:]
        draws = torch.rand(len(spectrogram), n_patches, device=spectrogram.device)
        kept = patchout(draws, self.keep)
        patches = patches.take_along_dim(kept[:, :, None], dim=1)  # (batch, n, dim)
        tokens = model.encode(torch.cat([front, patches], dim=1))
        return model.head(model.pool(model.norm(tokens)))


# ----------------------------------------------------------------------------- the table of methods

# Behind each row: where its learning rate is from. 5e-3 is the default of Method. All are trained
# with AdamW and a weight decay of 0.1, as the paper's methods are. That is not what the authors of
# these methods have: SSF has AdamW with a decay of 5e-5 to 0.05, Adapter+ AdamW with 1e-4, (IA)3
# Adafactor without decay, and AdaptFormer SGD without decay, at a rate that says nothing about
# AdamW. The numbers of parameters of the conformers are those of their paper.
# fmt: off
ROWS = [
    Method("conformer_pfeiffer_par", (Conformer("attn", "par_before"),), "271K"),  # its paper
    Method("conformer_houlsby_par",
           (Conformer("attn", "par_before"), Conformer("ffn", "par_before")), "542K"),  # its paper
    Method("soft_moa", (SoftMixture("attn", "par_before"),)),  # its paper
    Method("dense_moa", (DenseMixture("attn", "par_before"),)),  # its paper
    Method("dora", (DoRA(),)),  # as `lora`; its code has 1e-4 to 2e-4 with s = 2, for LLaMA
    Method("ia3", (IA3(),), lr=3e-3),  # its paper, with Adafactor
    Method("vera", (VeRA(),)),  # our choice
    Method("rslora", (RsLoRA(),)),  # as `lora`
    Method("ssf", (SSF(),)),  # its code, for most tasks; 2e-4 to 5e-2 for some
    Method("adaptformer", (AdaptFormer(),)),  # our choice, as other adapters
    Method("adapter_plus", (AdapterPlus(),), lr=1e-3),  # its code
    Method("probe", (Statistics(),), lr=1),  # fitted: L-BFGS has no other
    Method("logmel", (LogMel(),), lr=1),  # likewise
]
# fmt: on

METHODS = {method.name: method for method in ROWS}  # the later methods alone
petl.METHODS |= METHODS
