"""Parameter-efficient transfer learning: every method of the paper as small modules that wrap a part of the AST.

A method is a row of METHODS (below; load_weights.py adds the later ones): a tuple of *parts*. A part is a dataclass
with one function, `insert(model)`, that puts its modules around something in an `ast_model.AST`: a sub-layer (adapters,
Hydra), one projection (LoRA, prefixes), the embedding or a whole block (prompts); some only unfreeze. A wrapper keeps
what it wraps as `wrapped`; the AST's own code is never changed. To add a method: write the module, the part, the row.

    model = apply(load_ast("audioset", n_frames=500, n_classes=50), "houlsby_par")
    count(model)   # {'petl': 497952, 'head': 39986, 'total': 86207570}
"""

import copy
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ast_model import AST, FFN
from support.command import UserError, nearest
from support.headers import Alpha, PromptCount, Rate, Targets  # bounds, checked where files or options give numbers


def inner(module: nn.Module) -> nn.Module:
    """The AST's own module beneath whatever wraps it: prompts wrap blocks, adapters sub-layers, LoRA projections."""
    while hasattr(module, "wrapped"):
        module = module.wrapped
    return module


def rank_of(dim: int, rr: float) -> int:
    """Bottleneck size r = dim / RR (section III-A), rounded, at least 1."""
    return max(1, round(dim / rr))


def put_beneath(parent: nn.Module, name: str, layer) -> None:
    """Replace the module `name` by layer(module), inside what wraps it: LoRA adapts W even if a prefix is around it."""
    # Except DoRA (petl_more.py), which `reads_weight` of the bare Linear it holds: layer goes around that.
    while hasattr(module := getattr(parent, name), "wrapped") and not hasattr(module, "reads_weight"):
        parent, name = module, "wrapped"
    setattr(parent, name, layer(module))


def zeros(linear: nn.Linear) -> nn.Linear:
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


# ---------------------------------------------------------------------------------------------------------- adapters


class Bottleneck(nn.Module):
    """Down to r, GELU, up to dim (Houlsby et al., ICML 2019). Zero at the start, because the up-projection is.

    Only one projection may start at zero: the gradient of each is a product with the other, so with both at zero
    neither weight would ever move.
    """

    def __init__(self, dim: int, rank: int):
        super().__init__()
        self.down = nn.Linear(dim, rank)
        self.up = zeros(nn.Linear(rank, dim))

    def forward(self, x):  # (batch, tokens, dim)
        return self.up(F.gelu(self.down(x)))


class Convpass(nn.Module):
    """A bottleneck with a convolution inside (Jie and Deng, 2022).

    nn.Conv1d slides a window of 3 over the token sequence: section II-B says 3x3, but only this has Table I's 254K.
    nn.Conv2d is the 3x3 convolution over the patch grid of the original Convpass; the tokens in front of the patches
    are convolved as 1x1 images. As there, the convolution starts as the identity, between QuickGELUs; dropout is 0.1.
    """

    def __init__(self, dim: int, rank: int, conv: type, grid: tuple[int, int]):
        super().__init__()
        self.grid, self.down = grid, nn.Linear(dim, rank)
        self.conv = conv(rank, rank, kernel_size=3, padding=1)
        nn.init.dirac_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)
        self.dropout = nn.Dropout(0.1)
        self.up = zeros(nn.Linear(rank, dim))

    def forward(self, x):  # (batch, tokens, dim)
        h = quick_gelu(self.down(x))  # (batch, tokens, rank)
        h = quick_gelu(self.convolve(h))
        return self.up(self.dropout(h))

    def convolve(self, h):  # (batch, tokens, rank), the same shape out
        if isinstance(self.conv, nn.Conv1d):
            return self.conv(h.transpose(1, 2)).transpose(1, 2)
        n_patches = self.grid[0] * self.grid[1]
        front, patches = h[:, :-n_patches], h[:, -n_patches:]
        image = patches.transpose(1, 2).unflatten(2, self.grid)  # (batch, rank, F, T)
        patches = self.conv(image).flatten(2).transpose(1, 2)  # (batch, F * T, rank)
        front = self.conv(front.flatten(0, 1)[:, :, None, None]).view_as(front)
        return torch.cat([front, patches], dim=1)


# Where an adapter A meets a sub-layer S whose input is u, the output of its LayerNorm. What comes out replaces S(u).
INSERTIONS = {
    "par_before": lambda S, A, u: S(u) + A(u),  # eq. (7), where A reads the stream before the LayerNorm
    "seq_after": lambda S, A, u: (h := S(u)) + A(h),  # eq. (6) plus S(u); Seq-After and Par-After of Table III alike
    "seq_before": lambda S, A, u: S(a := A(u)) + a,  # Table III, as the authors' code: S(0) at first, not S(u)
    "par_before_residual": lambda S, A, u: S(u) + A(u) + u,  # Table VII: a parallel adapter needs no residual path
    "seq_after_no_residual": lambda S, A, u: A(S(u)),  # Table VII, eq. (6) as printed: a sequential one needs it
}


class Adapted(nn.Module):
    """A sub-layer (MHSA or FFN) and its adapter, put together as INSERTIONS says."""

    def __init__(self, wrapped: nn.Module, adapter: nn.Module, how: str):
        super().__init__()
        self.wrapped, self.adapter, self.how = wrapped, adapter, how

    def forward(self, u):  # (batch, tokens, dim)
        return INSERTIONS[self.how](self.wrapped, self.adapter, u)

    def merged(self) -> FFN | None:
        """A Bottleneck parallel to the FFN is r more hidden units of it: same input, same GELU. No other one merges."""
        if (self.how, type(self.wrapped), type(self.adapter)) == ("par_before", FFN, Bottleneck):
            (fc1, fc2), (down, up) = self.wrapped.children(), self.adapter.children()
            return side_by_side([fc1.parameters(), down.parameters()], [fc2.parameters(), up.parameters()])


def side_by_side(into: list, out: list) -> FFN:
    """One FFN of all hidden units of several: `into` and `out` hold a (weight, bias) each, before and after GELU."""
    (weights, biases), (outs, out_biases) = zip(*into, strict=True), zip(*out, strict=True)
    tensors = torch.cat(weights), torch.cat(biases), torch.cat(outs, dim=1), sum(out_biases)
    ffn = FFN(tensors[0].shape[1], tensors[0].shape[0])
    ffn.load_state_dict(dict(zip(ffn.state_dict(), tensors, strict=True)), assign=True)
    return ffn


@dataclass(frozen=True)
class Adapter:
    """An adapter at the MHSA or the FFN of every block. Trains its sub-layer's LayerNorm: 249K are 230,544 + 18,432."""

    at: Literal["attn", "ffn"]
    how: Literal[tuple(INSERTIONS)]
    kind: Literal["bottleneck", "convpass", "convpass_2d"] = "bottleneck"
    rr: Rate = 64

    def insert(self, model: AST) -> None:
        dim, rank = model.config.dim, rank_of(model.config.dim, self.rr)
        conv = {"bottleneck": None, "convpass": nn.Conv1d, "convpass_2d": nn.Conv2d}[self.kind]
        for block in map(inner, model.blocks):
            adapter = Convpass(dim, rank, conv, model.config.grid) if conv else Bottleneck(dim, rank)
            setattr(block, self.at, Adapted(getattr(block, self.at), adapter, self.how))
            {"attn": block.norm1, "ffn": block.norm2}[self.at].requires_grad_(True)


class HydraFFN(nn.Module):
    """S(u) + P(u) + Q(S(u)): a parallel and a sequential linear bottleneck (Hydra, Kim et al., 2023; Table V)."""

    def __init__(self, wrapped: nn.Module, dim: int, rank: int):
        super().__init__()
        self.wrapped, self.down_p, self.down_q = wrapped, nn.Linear(dim, rank), nn.Linear(dim, rank)
        self.up_p = zeros(nn.Linear(rank, dim))  # its bias is that of both branches
        self.up_q = zeros(nn.Linear(rank, dim, bias=False))

    def forward(self, u):  # (batch, tokens, dim)
        h = self.wrapped(u)
        return h + self.up_p(self.down_p(u)) + self.up_q(self.down_q(h))

    def merged(self) -> FFN:
        """One plain FFN with the same output, 2r hidden units wider: neither branch has an activation.

        Q is linear in S(u) and multiplies into fc2. P bypasses the GELU, and gelu(z) - gelu(-z) = z: so hidden units
        D u + d and -(D u + d) with output weights U and -U carry U (D u + d) through the activation unchanged.
        """
        fc1, fc2, down, up, q_down, q_up = *self.wrapped.children(), self.down_p, self.up_p, self.down_q, self.up_q
        after = torch.eye(len(fc2.bias), device=fc2.bias.device) + q_up.weight @ q_down.weight  # h -> h + Q(h), no bias
        bias = after @ fc2.bias + q_up.weight @ q_down.bias + up.bias
        into = [(fc1.weight, fc1.bias), (down.weight, down.bias), (-down.weight, -down.bias)]
        return side_by_side(into, [(after @ fc2.weight, bias), (up.weight, 0), (-up.weight, 0)])


@dataclass(frozen=True)
class Hydra:
    """Hydra at the FFN of every block; trains the FFN's LayerNorm."""

    rr: Rate = 64

    def insert(self, model: AST) -> None:
        for block in map(inner, model.blocks):
            block.ffn = HydraFFN(block.ffn, model.config.dim, rank_of(model.config.dim, self.rr))
            block.norm2.requires_grad_(True)


# -------------------------------------------------------------------------------------------------------------- LoRA


class LoRALinear(nn.Module):
    """x W + bias + s x A B, eq. (5) (Hu et al., 2021). B starts at zero: nothing changes before training."""

    def __init__(self, wrapped: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.wrapped, self.scale = wrapped, scale
        self.a = nn.Linear(wrapped.in_features, rank, bias=False)
        self.b = zeros(nn.utils.skip_init(nn.Linear, rank, wrapped.out_features, bias=False))  # no random start

    def forward(self, x):  # (..., in) -> (..., out)
        return self.wrapped(x) + self.b(self.scale * self.a(x))

    def merged(self) -> nn.Linear:
        """One plain Linear. A weight is stored as (out, in), so the A B of eq. (5) is `b.weight @ a.weight` here."""
        self.wrapped.weight = nn.Parameter(self.wrapped.weight + self.scale * self.b.weight @ self.a.weight)
        return self.wrapped


@dataclass(frozen=True)
class LoRA:
    """LoRA on the named projections of every attention. s = alpha / RR as in III-A: 1/16, though II-B has s >= 1."""

    targets: Targets = "qv"  # any of q, k, v, o
    rr: Rate = 128
    alpha: Alpha = 8

    def insert(self, model: AST) -> None:
        for block in map(inner, model.blocks):
            for name in self.targets:
                put_beneath(inner(block.attn), name, self.layer)

    def layer(self, linear: nn.Linear) -> LoRALinear:
        return LoRALinear(linear, rank_of(linear.in_features, self.rr), self.alpha / self.rr)


# ------------------------------------------------------------------------------------------------ prompts and prefixes


def prompt_parameter(n: int, config) -> nn.Parameter:
    """n learned tokens, uniform in +-sqrt(6 / (3 patch^2 + dim)), as in visual prompt tuning, where 3 are colours."""
    bound = (6 / (3 * config.patch**2 + config.dim)) ** 0.5
    return nn.Parameter(torch.empty(n, config.dim).uniform_(-bound, bound))


class PrefixLinear(nn.Module):
    """A key or value projection that yields n learned rows more than it reads (prefix-tuning, Li and Liang, 2021)."""

    def __init__(self, wrapped: nn.Module, prefix: nn.Parameter):
        super().__init__()
        self.wrapped, self.prefix = wrapped, prefix

    def forward(self, x):  # (batch, tokens, dim) -> (batch, n + tokens, dim)
        y = self.wrapped(x)
        return torch.cat([self.prefix.to(y.dtype).expand(y.shape[0], -1, -1), y], dim=1)  # y: half under autocast


@dataclass(frozen=True)
class Prefix:
    """Prefix-tuning: of n prompts a layer, one half are keys and the other half values (221K = 12 x 24 x 768)."""

    prompts: PromptCount = 24

    def __post_init__(self):
        if self.prompts % 2:
            raise UserError(f"prefix-tuning needs an even number of prompts (keys and values), not {self.prompts}")

    def insert(self, model: AST) -> None:
        for attn in (inner(inner(block).attn) for block in model.blocks):
            attn.k = PrefixLinear(attn.k, prompt_parameter(self.prompts // 2, model.config))
            attn.v = PrefixLinear(attn.v, prompt_parameter(self.prompts // 2, model.config))


class PromptedEmbedding(nn.Module):
    """The embedding, [distillation] replaced by n prompts as in the authors' code; `cls_dist` then reads the first."""

    def __init__(self, wrapped: nn.Module, prompts: nn.Parameter):
        super().__init__()
        self.wrapped, self.prompts = wrapped, prompts

    def forward(self, fbank):  # (batch, n_frames, n_mels) -> (batch, 1 + n + patches, dim)
        x = self.wrapped(fbank)
        return torch.cat([x[:, :1], self.prompts.expand(x.shape[0], -1, -1), x[:, 2:]], dim=1)


class PromptedBlock(nn.Module):
    """A block that reads n fresh prompts in place of what the block before made of the last ones (deep prompts)."""

    def __init__(self, wrapped: nn.Module, prompts: nn.Parameter):
        super().__init__()
        self.wrapped, self.prompts = wrapped, prompts

    def forward(self, x):  # (batch, 1 + n + patches, dim)
        fresh = self.prompts.expand(x.shape[0], -1, -1)
        return self.wrapped(torch.cat([x[:, :1], fresh, x[:, 1 + fresh.shape[1] :]], dim=1))


@dataclass(frozen=True)
class Prompts:
    """Prompt-tuning (Jia et al., 2022): shallow adds prompts at the first layer, deep gives every layer its own."""

    prompts: PromptCount
    deep: bool = False

    def insert(self, model: AST) -> None:
        if len(model.blocks) < model.config.depth:
            raise UserError("prompts enter before the first block: they cannot be kept to some of the blocks")
        model.embed = PromptedEmbedding(model.embed, prompt_parameter(self.prompts, model.config))
        for i in range(1, model.config.depth if self.deep else 1):
            model.blocks[i] = PromptedBlock(model.blocks[i], prompt_parameter(self.prompts, model.config))


# ------------------------------------------------------------------------- methods that only choose what to unfreeze


@dataclass(frozen=True)
class Biases:
    """BitFit (Ben Zaken et al., 2022): the biases of every Linear and LayerNorm of the encoder."""

    def insert(self, model: AST) -> None:
        for module in (*model.blocks.modules(), model.norm):
            if isinstance(module, nn.Linear | nn.LayerNorm):
                module.bias.requires_grad_(True)
        model.norm.weight.requires_grad_(False)


@dataclass(frozen=True)
class Everything:
    """Full fine-tuning."""

    def insert(self, model: AST) -> None:
        model.requires_grad_(True)


# ---------------------------------------------------------------------------------------------- the table of methods


@dataclass(frozen=True)
class Method:
    """A row of METHODS. All but `probe` train the final LayerNorm (1,536 of Linear's 9-40K), BitFit only its bias."""

    name: str
    parts: tuple
    paper: str = "-"  # trained parameters as the paper prints them
    where: str = "-"  # the row of the paper's tables
    lr: float = 5e-3  # section III-A; full fine-tuning, linear and BitFit as in the authors' setup
    blocks: tuple[int, int] | None = None  # the first and last block, from 1, that the parts see; None: all


MHSA_PAR, MHSA_SEQ = ("attn", "par_before"), ("attn", "seq_after")
FFN_PAR, FFN_SEQ = ("ffn", "par_before"), ("ffn", "seq_after")


def adapters(*places: tuple[str, str], **options) -> tuple[Adapter, ...]:
    return tuple(Adapter(*place, **options) for place in places)


ALL_THREE = (*adapters(FFN_PAR), Prompts(14, deep=True), LoRA(rr=256))

METHODS: dict[str, Method] = {
    method.name: method
    for method in [
        Method("full_ft", (Everything(),), "85.5M", "Table I, Full FT", lr=5e-5),
        Method("linear", (), "9-40K", "Table I, Linear", lr=1e-3),
        Method("bitfit", (Biases(),), "102K", "Table I, BitFit"),
        Method("spt", (Prompts(300),), "230K", "Table I, SPT-300", lr=1e-2),
        Method("dpt", (Prompts(25, deep=True),), "230K", "Table I, DPT-25", lr=1e-2),
        Method("prefix", (Prefix(24),), "221K", "Table I, Pref-T 24", lr=1e-2),
        # Pfeiffer: one adapter a block, parallel to the MHSA or in sequence after the FFN (Table I's numbers are those
        # rows of Table III; II-B has the FFN alone, III-A the MHSA). Houlsby: one at each.
        Method("pfeiffer_par", adapters(MHSA_PAR), "249K", "Table I, PF par"),
        Method("pfeiffer_seq", adapters(FFN_SEQ), "249K", "Table I, PF seq"),
        Method("houlsby_par", adapters(MHSA_PAR, FFN_PAR), "498K", "Table I, HOU par"),
        Method("houlsby_seq", adapters(MHSA_SEQ, FFN_SEQ), "498K", "Table I, HOU seq"),
        Method("convpass_pfeiffer_par", adapters(MHSA_PAR, kind="convpass"), "254K", "Table I, Conv PF par"),
        Method("convpass_pfeiffer_seq", adapters(FFN_SEQ, kind="convpass"), "254K", "Table I, Conv PF seq"),
        Method("convpass_houlsby_par", adapters(MHSA_PAR, FFN_PAR, kind="convpass"), "508K", "Table I, Conv HOU par"),
        Method("convpass_houlsby_seq", adapters(MHSA_SEQ, FFN_SEQ, kind="convpass"), "508K", "Table I, Conv HOU seq"),
        Method("lora", (LoRA("qv", rr=128),), "221K", "Table I, LoRA"),
        # The original, two-dimensional Convpass: not in the paper.
        Method("convpass2d_pfeiffer_par", adapters(MHSA_PAR, kind="convpass_2d")),
        Method("convpass2d_houlsby_par", adapters(MHSA_PAR, FFN_PAR, kind="convpass_2d")),
        # Where an adapter goes. FFN-Seq/Par-After is pfeiffer_seq, MHSA-Par-Before is pfeiffer_par.
        Method("adapter_ffn_seq_before", adapters(("ffn", "seq_before")), "249K", "Table III, FFN-Seq-Before"),
        Method("adapter_ffn_par_before", adapters(FFN_PAR), "249K", "Table III, FFN-Par-Before"),
        Method("adapter_mhsa_seq_after", adapters(MHSA_SEQ), "249K", "Table III, MHSA-Seq-After"),
        Method("adapter_mhsa_seq_before", adapters(("attn", "seq_before")), "249K", "Table III, MHSA-Seq-Before"),
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
        Method("adapter_dpt", (*adapters(FFN_PAR), Prompts(25, deep=True)), "479K", "Table VI, Adapter + DPT-25"),
        Method("adapter_dpt_lora", ALL_THREE, "488K", "Table VI, Adapter + DPT-14 + LoRA"),
        # Residual connections the wrong way round.
        Method("adapter_ffn_seq_no_residual", adapters(("ffn", "seq_after_no_residual")), "249K", "Table VII, Seq"),
        Method("adapter_ffn_par_residual", adapters(("ffn", "par_before_residual")), "249K", "Table VII, Par"),
    ]
}


def find(name: str) -> Method:
    """The row of METHODS called `name`; a UserError that suggests the nearest name if there is none."""
    return METHODS[nearest(name, METHODS, "method", " (--list-methods shows all of them)")]


def apply(model: AST, method: str | Method) -> AST:
    """Freeze the model, insert the parts of the method, unfreeze what it trains. Changes `model` and returns it.

    `method` is a name in METHODS or a Method of your own. The method stays known as `model.method`.
    Raises UserError for an unknown name and ValueError if a method was applied before.
    """
    method = find(method) if isinstance(method, str) else method
    if hasattr(model, "method"):
        raise ValueError(f"this model already carries the method {model.method.name!r}; load a fresh AST")
    model.requires_grad_(False)
    model.norm.requires_grad_(True)
    model.head.requires_grad_(True)
    device = model.norm.weight.device
    first, last = method.blocks or (1, len(model.blocks))
    beneath, above = model.blocks[: first - 1], model.blocks[last:]
    model.blocks = model.blocks[first - 1 : last]  # the parts see these alone
    for part in method.parts:
        part.insert(model)
    model.blocks = nn.ModuleList([*beneath, *model.blocks, *above])
    if beneath or above:  # full fine-tuning has unfrozen the embedding too
        nn.ModuleList([model.embed, beneath, above]).requires_grad_(False)
    model.method = method
    return model.to(device)  # the parts were made on the CPU


def count(model: AST) -> dict[str, int]:
    """Trained parameters of the method (`petl`) and of the final LayerNorm and classifier (`head`); all in `total`.

    Full fine-tuning and BitFit reach the final LayerNorm themselves, so there it counts under `petl`, as in Table I.
    """
    owns_norm = any(isinstance(part, Everything | Biases) for part in model.method.parts)
    head_modules = [model.head] if owns_norm else [model.norm, model.head]
    head = sum(p.numel() for module in head_modules for p in module.parameters() if p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"petl": trained - head, "head": head, "total": sum(p.numel() for p in model.parameters())}


@torch.no_grad()
def merge(model: AST) -> AST:
    """A plain AST with the logits of the adapted one: what wraps a weight is folded into it. `model` stays as it is.

    It has no `backbone`, as no checkpoint holds its weights: `save_ast` writes it, `save_trained` could not.
    Raises UserError for methods that no weight of an AST can express (most adapters, prompts, prefixes).
    """
    plain = copy.deepcopy(model)
    for parent in reversed(list(plain.modules())):  # from the inside outwards
        for name, module in list(parent.named_children()):
            if hasattr(module, "merged") and (merged := module.merged()) is not None:
                setattr(parent, name, merged)
            elif hasattr(module, "wrapped"):
                kind = type(getattr(module, "adapter", module)).__name__
                raise UserError(f"{model.method.name!r} cannot be merged: {kind} is no linear change of a weight")
    if len({block.ffn.fc1.out_features for block in plain.blocks}) > 1:
        raise UserError(f"{model.method.name!r} cannot be merged with --blocks: FFNs of other blocks would be narrower")
    plain.requires_grad_(True)
    plain.config = replace(plain.config, hidden=plain.blocks[0].ffn.fc1.out_features)
    for name in ("method", "backbone"):  # neither is that of the new weights
        vars(plain).pop(name, None)
    return plain
