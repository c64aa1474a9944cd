"""Every method of the paper, as small modules around parts of the AST.

    from ast_model import AST, ASTConfig
    from petl import apply, count

    # Random weights. load_weights.load_ast gives the pretrained ones.
    model = apply(AST(ASTConfig(n_frames=500, n_classes=50)), "houlsby_par")
    count(model)  # {'petl': 497952, 'head': 39986, 'total': 86207570}

A *method* is a row of METHODS: a name and a tuple of parts. A *part* is a dataclass with a function
`insert(model, blocks)`. `model` is the AST. `blocks` is a list of its own Blocks, without wrappers,
that the method changes: all of them, unless Method.blocks names some. `insert` puts modules around
something in these blocks: around a sub-layer (adapters, Hydra) or around a projection (LoRA,
prefixes). Prompts go around the embedding and around whole blocks. Some parts only unfreeze what is
there.

A part may have these marks, attributes that are True. `apply` reads the first and `count` the
second. With the third train.py refuses --keep, with the fourth every --pool but the default. With
the fifth it fits the head (petl_more.fit), and with the sixth it loads no weights.

    needs_all_blocks   the method cannot be kept to some blocks by Method.blocks
    owns_final_norm    the final LayerNorm counts as a part of the method
    needs_all_patches  the method cannot be trained on some of the patches
    pools_itself       the method ignores ASTConfig.pool
    is_fitted          only the head learns, a petl_more.Standardised
    has_no_backbone    the method removes the backbone

A *wrapper* is a module that keeps what it wraps as `self.wrapped`, so `attn.q` may become
`LoRALinear(attn.q)`. Wrappers may nest. `inner` finds the AST's own module at the bottom. The code
of the AST never changes.

To add a method:

 1. Write the module. If it can be written into the layer that it wraps, give it a function
    `merged()`, which returns the new layer: `merge` calls it.
 2. Write the part. `apply` freezes everything but the head and the final LayerNorm, and then calls
    `insert`. So modules made there are trained unless `insert` freezes them, and what is older is
    trained if `insert` unfreezes it. Write `wrap(inner(block.attn), "q", MyWrapper)` around one
    layer whose output keeps its shape: `inner`, because the sub-layer may be wrapped already.
    Assign wrappers of sub-layers, blocks or the embedding, and those that change a length: they
    must be outermost. A whole block is wrapped by `model.blocks[i] = MyBlock(model.blocks[i])`,
    for each i with `inner(model.blocks[i]) in blocks`. A wrapper that reads the weight below it has
    the attribute `reads_weight = True`.
 3. Write the row into ROWS, or in a file of your own `petl.METHODS["name"] = Method("name", ...)`.
    Import that file wherever the method is trained or loaded.
 4. A file of trained tensors describes a part by the name of its class and by its fields. To be
    loaded again, the part must occur in a row of METHODS, the name of its class must be its own,
    and its fields must be numbers, text or truth values. Saved are the trained parameters and the
    persistent buffers of floats. Everything else must follow from the fields, as in
    petl_more.VeRA.
 5. train.py has options for fields named rr, alpha, prompts and kernel. On a backbone narrower than
    384, as in its default run, it trains with other numbers than the row has: see train.run.
 6. What is inserted should change nothing at the start. (Prompts, prefixes, and adapters that
    stand before a sub-layer cannot do that.) So let one of the tensors that are multiplied start
    at zero, but only one: of two zeros neither would ever move (see `Bottleneck`). A factor that
    starts at 1 is stored minus 1, because weight decay pulls every number to zero (see
    petl_more.py).

This file needs torch and ast_model.py. Newer methods are in petl_more.py.
"""

import copy
import difflib
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ast_model import AST, ASTConfig, UserError


def inner(module):
    """The AST's own module at the bottom of all wrappers."""
    while hasattr(module, "wrapped"):
        module = module.wrapped
    return module


def wrap(parent, name, make_wrapper):
    """Put a wrapper directly around the AST's own module `parent.name`, below other wrappers.

    So LoRA after a prefix becomes PrefixLinear(LoRALinear(k)). The other way round, LoRA would add
    tensors of different lengths.

    A wrapper that reads the weight of the Linear below it is marked `reads_weight` (DoRALinear in
    petl_more.py). Nothing comes between the two, so the new wrapper goes around both.
    """
    module = getattr(parent, name)
    while hasattr(module, "wrapped") and not hasattr(module, "reads_weight"):
        parent = module
        name = "wrapped"
        module = module.wrapped
    setattr(parent, name, make_wrapper(module))


def rank_of(dim: int, rr: float) -> int:
    """The size of a bottleneck, r = dim / RR (section III-A), rounded, at least 1."""
    return max(1, round(dim / rr))


def zeros(linear: nn.Linear):
    """Set weight and bias of a Linear to zero, and return it."""
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


def quick_gelu(x):
    """An approximation of GELU, x sigmoid(1.702 x). Convpass takes it."""
    return x * torch.sigmoid(1.702 * x)


# ----------------------------------------------------------------------------------------- adapters


class Bottleneck(nn.Module):
    """The adapter of Houlsby et al. (ICML 2019): down to r numbers, GELU, up to dim numbers.

    The residual path around their adapter is not here, but in `seq_after`.

    The up-projection starts at zero, so A(x) is 0 at the start. With `par_before` and `seq_after`
    the model then starts as the pretrained one. Only one of the two projections may start at zero.
    The gradient of each is a product with the other, so if
    both were zero, neither weight would ever move.
    """

    def __init__(self, dim, rank):
        super().__init__()
        self.down = nn.Linear(dim, rank)
        self.up = zeros(nn.Linear(rank, dim))

    def forward(self, x):  # (batch, tokens, dim)
        return self.up(F.gelu(self.down(x)))


class Convpass(nn.Module):
    """A bottleneck with a convolution over the sequence of tokens (Jie and Deng, 2022).

    Section II-B describes the 3x3 convolution of the original. But the 254K parameters of Table I
    are those of a convolution of width 3 along the tokens, as in the authors' code. That code
    computes the convolution and discards its result, so the accuracies of Table I probably come
    without it. Here the result is used.

    As in the original, the convolution starts as the identity, a QuickGELU stands before and after
    it, and dropout is 0.1.
    """

    convolution = nn.Conv1d

    def __init__(self, dim, rank):
        super().__init__()
        self.down = nn.Linear(dim, rank)
        self.conv = self.convolution(rank, rank, kernel_size=3, padding=1)
        nn.init.dirac_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)
        self.dropout = nn.Dropout(0.1)
        self.up = zeros(nn.Linear(rank, dim))

    def forward(self, x):  # (batch, tokens, dim)
        h = quick_gelu(self.down(x))  # (batch, tokens, rank)
        h = quick_gelu(self.convolve(h))
        return self.up(self.dropout(h))

    def convolve(self, h):  # (batch, tokens, rank)
        return self.conv(h.transpose(1, 2)).transpose(1, 2)


class Convpass2d(Convpass):
    """The original Convpass: a 3x3 convolution over the grid of patches.

    The tokens in front of the patches are convolved as images of one pixel.
    """

    convolution = nn.Conv2d

    def __init__(self, dim, rank, grid):
        super().__init__(dim, rank)
        self.grid = grid  # (n_freq, n_time)

    def convolve(self, h):  # (batch, tokens, rank)
        n_patches = self.grid[0] * self.grid[1]
        front = h[:, :-n_patches]
        patches = h[:, -n_patches:]
        image = patches.transpose(1, 2).unflatten(2, self.grid)  # (batch, rank, n_freq, n_time)
        patches = self.conv(image).flatten(2).transpose(1, 2)  # (batch, n_patches, rank)
        pixels = front.flatten(0, 1)[:, :, None, None]  # (batch * tokens in front, rank, 1, 1)
        front = self.conv(pixels).view_as(front)
        return torch.cat([front, patches], dim=1)


# Five ways to connect an adapter A with a sub-layer S (MHSA or FFN). u is the output of the
# LayerNorm before S. What a function returns takes the place of S(u) in the block.


def par_before(sublayer, adapter, u):
    """S(u) + A(u). Eq. (7) prints A(x), with x before the LayerNorm; the authors' code has A(u)."""
    return sublayer(u) + adapter(u)


def seq_after(sublayer, adapter, u):
    """S(u) + A(S(u)): eq. (6) with a residual path around A.

    Table III has two names for this function, Seq-After and Par-After.
    """
    s = sublayer(u)
    return s + adapter(s)


def seq_before(sublayer, adapter, u):
    """S(A(u)) + A(u), as in the authors' code; Table III gives no formula.

    A(u) is 0 at the start, so S reads zeros: the model does not start as the pretrained one.
    """
    a = adapter(u)
    return sublayer(a) + a


def par_before_residual(sublayer, adapter, u):
    """S(u) + A(u) + u. Table VII shows that a residual path harms a parallel adapter.

    A(u) is 0 at the start, and S(u) + u is not the pretrained function.
    """
    return sublayer(u) + adapter(u) + u


def seq_after_no_residual(sublayer, adapter, u):
    """A(S(u)), eq. (6) as printed. Table VII shows that a sequential adapter needs a residual path.

    A(S(u)) is 0 at the start, so the model does not start as the pretrained one.
    """
    return adapter(sublayer(u))


INSERTIONS = {
    "par_before": par_before,
    "seq_after": seq_after,
    "seq_before": seq_before,
    "par_before_residual": par_before_residual,
    "seq_after_no_residual": seq_after_no_residual,
}


class Adapted(nn.Module):
    """A sub-layer with an adapter. `how` is a key of INSERTIONS."""

    def __init__(self, wrapped, adapter, how: str):
        super().__init__()
        self.wrapped = wrapped
        self.adapter = adapter
        self.how = how

    def forward(self, u):  # (batch, tokens, dim)
        return INSERTIONS[self.how](self.wrapped, self.adapter, u)


@dataclass(frozen=True)
class Adapter:
    """A Bottleneck at the MHSA or at the FFN of every block. A subclass builds another adapter.

    The LayerNorm before the sub-layer is trained, too. Only then a row with one adapter in each
    block has the 249K of Table I: 230,544 + 18,432 parameters.
    """

    at: str  # "attn" or "ffn"
    how: str  # a key of INSERTIONS; text, because files of trained tensors describe it in JSON
    rr: float = 64

    def __post_init__(self):
        if self.at not in ("attn", "ffn") or self.how not in INSERTIONS:
            raise UserError(
                f"no adapter {self.at!r}, {self.how!r}: "
                f"give attn or ffn, and one of {', '.join(INSERTIONS)}"
            )

    def insert(self, model, blocks):
        for block in blocks:
            adapter = self.build(model.config)
            if self.at == "attn":
                block.norm1.requires_grad_(True)
                block.attn = Adapted(block.attn, adapter, self.how)
            else:
                block.norm2.requires_grad_(True)
                block.ffn = Adapted(block.ffn, adapter, self.how)

    def build(self, config):
        return Bottleneck(config.dim, rank_of(config.dim, self.rr))


@dataclass(frozen=True)
class ConvpassAdapter(Adapter):
    """A bottleneck with a convolution along the tokens inside (Convpass)."""

    def build(self, config):
        return Convpass(config.dim, rank_of(config.dim, self.rr))


@dataclass(frozen=True)
class Convpass2dAdapter(Adapter):
    """A bottleneck with a convolution over the grid of patches inside (Convpass2d)."""

    needs_all_patches = True  # a grid with holes cannot be convolved

    def build(self, config):
        return Convpass2d(config.dim, rank_of(config.dim, self.rr), config.grid)


class HydraFFN(nn.Module):
    """S(u) + P(u) + Q(S(u)), P and Q bottlenecks without activation (Hydra, Kim et al., 2023).

    P is parallel to the FFN S, and Q comes after it. The 470K of Table V leave room for one bias
    of the up-projections, so both branches share that of `up_p`.
    """

    def __init__(self, wrapped, dim, rank):
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
    """Hydra at the FFN of every block: two bottlenecks without activation, P and Q.

    The LayerNorm before the FFN is trained, too.
    """

    rr: float = 64

    def insert(self, model, blocks):
        dim = model.config.dim
        for block in blocks:
            block.norm2.requires_grad_(True)
            block.ffn = HydraFFN(block.ffn, dim, rank_of(dim, self.rr))


# --------------------------------------------------------------------------------------------- LoRA


class LoRALinear(nn.Module):
    """LoRA (Hu et al., 2021), eq. (5): W x + bias + s B A x, with W (out, in) frozen.

    A (r, in) starts at random and B (out, r) at zero, so the model starts as the pretrained one.
    Eq. (5) has row vectors, x W + s x A B: its matrices are the transposes of these.
    """

    def __init__(self, wrapped: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.wrapped = wrapped
        self.scale = scale
        linear = inner(wrapped)
        self.a = nn.Linear(linear.in_features, rank, bias=False)
        # B is zero anyway, so skip_init draws no random numbers for it. With nn.Linear whatever is
        # drawn later would get other numbers.
        self.b = zeros(nn.utils.skip_init(nn.Linear, rank, linear.out_features, bias=False))

    def forward(self, x):  # (..., in) -> (..., out)
        return self.wrapped(x) + self.b(self.scale * self.a(x))

    def merged(self) -> nn.Linear:
        """A new Linear with the weight W + s B A."""
        linear = copy.deepcopy(self.wrapped)
        change = self.scale * self.b.weight @ self.a.weight
        linear.weight = nn.Parameter(self.wrapped.weight + change)
        return linear


@dataclass(frozen=True)
class LoRA:
    """LoRA on some projections of every attention.

    The scale is s = alpha / RR = 8 / 128, as in section III-A. Hu et al. have alpha / r instead.
    Section II-B says s >= 1, which contradicts these values. A row with another RR has another s.
    """

    targets: str = "qv"  # any of q, k, v, o
    rr: float = 128
    alpha: float = 8

    def insert(self, model, blocks):
        for block in blocks:
            for name in self.targets:
                wrap(inner(block.attn), name, self.build)

    @property
    def scale(self):
        return self.alpha / self.rr

    def build(self, linear):
        rank = rank_of(inner(linear).in_features, self.rr)  # q, k, v, o read the model's dim
        return LoRALinear(linear, rank, self.scale)


# ----------------------------------------------------------------------------- prompts and prefixes


def prompt_parameter(n: int, config: ASTConfig):
    """n learned rows (n, dim), uniform in +-sqrt(6 / (3 patch^2 + dim)).

    They are tokens in prompt-tuning, and keys or values in prefix-tuning. The authors' code starts
    both in this way. It is the Xavier-uniform start of visual prompt tuning, where a patch has 3
    colour channels. The authors' code keeps the 3, although a spectrogram has one channel.
    """
    bound = (6 / (3 * config.patch**2 + config.dim)) ** 0.5
    return nn.Parameter(torch.empty(n, config.dim).uniform_(-bound, bound))


class PrefixLinear(nn.Module):
    """Prefix-tuning (Li and Liang, 2021): a key or value projection, n learned rows in front.

    The rows (n, dim) are cut into heads like all keys and values.
    """

    def __init__(self, wrapped, prefix: nn.Parameter):
        super().__init__()
        self.wrapped = wrapped
        self.prefix = prefix

    def forward(self, x):  # (batch, tokens, dim) -> (batch, n + tokens, dim)
        y = self.wrapped(x)
        prefix = self.prefix.to(y.dtype)  # y has half precision under autocast
        prefix = prefix.expand(y.shape[0], -1, -1)
        return torch.cat([prefix, y], dim=1)


@dataclass(frozen=True)
class Prefix:
    """Prefix-tuning in every layer: half of the prompts are keys, and the other half are values.

    With 24 prompts there are 12 layers x 24 x 768 = 221K parameters, as in Table I. There are no
    more tokens than before, because a prefix asks no query. So the head sees a prefix only through
    what the tokens have taken from it.

    The rows are keys and values themselves, and the parameters are these rows. Li and Liang train
    a small network that makes the rows; here, as in the authors' code, there is none. Unlike an
    adapter, a prefix changes the model from the start: even with rows of zeros, the softmax would
    give the prefix a share of every token's attention. So the rows start at random.
    """

    prompts: int = 24  # in every layer, keys and values together

    def __post_init__(self):
        if self.prompts % 2:
            raise UserError(
                "prefix-tuning needs an even number of prompts, half keys and half values, "
                f"not {self.prompts}"
            )

    def insert(self, model, blocks):
        for block in blocks:
            attn = inner(block.attn)
            # Assigned, and not by `wrap`: a prefix must be outermost.
            attn.k = PrefixLinear(attn.k, prompt_parameter(self.prompts // 2, model.config))
            attn.v = PrefixLinear(attn.v, prompt_parameter(self.prompts // 2, model.config))


class PromptedEmbedding(nn.Module):
    """Replaces the [distillation] token by n learned prompts, as the authors' code does.

    With pool="cls_dist" the head then averages [CLS] and the first prompt.
    """

    def __init__(self, wrapped, prompts: nn.Parameter):
        super().__init__()
        self.wrapped = wrapped
        self.prompts = prompts

    def forward(self, spectrogram):  # (batch, n_frames, n_mels)
        x = self.wrapped(spectrogram)  # (batch, 2 + patches, dim)
        prompts = self.prompts.expand(x.shape[0], -1, -1)
        return torch.cat([x[:, :1], prompts, x[:, 2:]], dim=1)  # (batch, 1 + n + patches, dim)


class PromptedBlock(nn.Module):
    """Before this block, the n prompt tokens are replaced by new learned prompts."""

    def __init__(self, wrapped, prompts: nn.Parameter):
        super().__init__()
        self.wrapped = wrapped
        self.prompts = prompts

    def forward(self, x):  # (batch, 1 + n + patches, dim)
        prompts = self.prompts.expand(x.shape[0], -1, -1)
        patches = x[:, 1 + prompts.shape[1] :]
        return self.wrapped(torch.cat([x[:, :1], prompts, patches], dim=1))


@dataclass(frozen=True)
class Prompts:
    """Learned tokens before the patches: prompt-tuning (Jia et al., 2022).

    Shallow: prompts before the first block. Deep: other prompts before each block. They start at
    random and replace the [distillation] token, so they change the model from the start.

    The mean of all tokens, which the head reads, contains the prompts.
    """

    prompts: int  # n prompts before the first block, or if deep, n before each block
    deep: bool = False

    needs_all_blocks = True

    def insert(self, model, blocks):
        prompts = prompt_parameter(self.prompts, model.config)
        model.embed = PromptedEmbedding(model.embed, prompts)
        if self.deep:
            for i in range(1, len(model.blocks)):
                prompts = prompt_parameter(self.prompts, model.config)
                model.blocks[i] = PromptedBlock(model.blocks[i], prompts)


# -------------------------------------------------------- methods that only choose what to unfreeze


@dataclass(frozen=True)
class Biases:
    """BitFit (Ben Zaken et al., 2022): the biases of every Linear and LayerNorm of the encoder.

    Of the final LayerNorm only the bias is trained.
    """

    owns_final_norm = True

    def insert(self, model, blocks):
        model.norm.weight.requires_grad_(False)
        model.norm.bias.requires_grad_(True)
        for block in blocks:
            for module in block.modules():
                if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
                    module.bias.requires_grad_(True)


@dataclass(frozen=True)
class Everything:
    """Full fine-tuning: the blocks, and the embedding if the method changes all blocks."""

    owns_final_norm = True

    def insert(self, model, blocks):
        for block in blocks:
            block.requires_grad_(True)
        if len(blocks) == len(model.blocks):
            model.embed.requires_grad_(True)


# ----------------------------------------------------------------------------- the table of methods


@dataclass(frozen=True)
class Method:
    """A row of METHODS.

    The head is trained by every method, and the final LayerNorm by every method but BitFit (its
    bias only), `probe` and `logmel`. Head and LayerNorm together have the 9-40K parameters of Table
    I's row Linear, although section III-A speaks of the head alone.
    """

    name: str
    parts: tuple
    paper: str = "-"  # trained parameters as the paper prints or implies them
    where: str = "-"  # table and row of the paper
    lr: float = 5e-3  # section III-A for adapters and LoRA
    head_lr: float | None = None  # of the head; None: as the method, as in the paper
    blocks: tuple[int, int] | None = None  # first and last block to change, from 1 (not checked)


# fmt: off
# The learning rates of prompts and prefixes are from section III-A. Those of full_ft and linear are
# from the authors' code, which trains BitFit with 5e-3, the default of Method.
ROWS = [
    Method("full_ft", (Everything(),), "85.5M", "Table I, Full FT", lr=5e-5),
    Method("linear", (), "9-40K", "Table I, Linear", lr=1e-3),
    Method("bitfit", (Biases(),), "102K", "Table I, BitFit"),
    Method("spt", (Prompts(300),), "230K", "Table I, SPT-300", lr=1e-2),
    Method("dpt", (Prompts(25, deep=True),), "230K", "Table I, DPT-25", lr=1e-2),
    Method("prefix", (Prefix(24),), "221K", "Table I, Pref-T 24", lr=1e-2),

    # Pfeiffer adapters (PF): one in each block. The paper contradicts itself about the place:
    # section II-B says FFN, section III-A MHSA. The accuracies that Table I shares with Table III
    # decide: "PF par" is parallel to the MHSA, and "PF seq" comes after the FFN.
    Method("pfeiffer_par", (Adapter("attn", "par_before"),), "249K", "Table I, PF par"),
    Method("pfeiffer_seq", (Adapter("ffn", "seq_after"),), "249K", "Table I, PF seq"),
    # Houlsby adapters (HOU): one at the MHSA and one at the FFN of each block.
    Method("houlsby_par", (Adapter("attn", "par_before"), Adapter("ffn", "par_before")),
           "498K", "Table I, HOU par"),
    Method("houlsby_seq", (Adapter("attn", "seq_after"), Adapter("ffn", "seq_after")),
           "498K", "Table I, HOU seq"),
    Method("convpass_pfeiffer_par", (ConvpassAdapter("attn", "par_before"),),
           "254K", "Table I, Conv PF par"),
    Method("convpass_pfeiffer_seq", (ConvpassAdapter("ffn", "seq_after"),),
           "254K", "Table I, Conv PF seq"),
    Method("convpass_houlsby_par",
           (ConvpassAdapter("attn", "par_before"), ConvpassAdapter("ffn", "par_before")),
           "508K", "Table I, Conv HOU par"),
    Method("convpass_houlsby_seq",
           (ConvpassAdapter("attn", "seq_after"), ConvpassAdapter("ffn", "seq_after")),
           "508K", "Table I, Conv HOU seq"),
    Method("lora", (LoRA("qv", rr=128),), "221K", "Table I, LoRA"),

    # The original Convpass, which no table of the paper has.
    Method("convpass2d_pfeiffer_par", (Convpass2dAdapter("attn", "par_before"),)),
    Method("convpass2d_houlsby_par",
           (Convpass2dAdapter("attn", "par_before"), Convpass2dAdapter("ffn", "par_before"))),

    # Table III, where an adapter goes. FFN-Seq/Par-After is pfeiffer_seq, and MHSA-Par-Before is
    # pfeiffer_par.
    Method("adapter_ffn_seq_before", (Adapter("ffn", "seq_before"),),
           "249K", "Table III, FFN-Seq-Before"),
    Method("adapter_ffn_par_before", (Adapter("ffn", "par_before"),),
           "249K", "Table III, FFN-Par-Before"),
    Method("adapter_mhsa_seq_after", (Adapter("attn", "seq_after"),),
           "249K", "Table III, MHSA-Seq/Par-After"),
    Method("adapter_mhsa_seq_before", (Adapter("attn", "seq_before"),),
           "249K", "Table III, MHSA-Seq-Before"),

    # Table IV, which projections LoRA adapts, at a constant number of parameters.
    Method("lora_q", (LoRA("q", rr=64),), "221K", "Table IV, q"),
    Method("lora_qk", (LoRA("qk", rr=128),), "221K", "Table IV, q k"),
    Method("lora_qkvo", (LoRA("qkvo", rr=256),), "221K", "Table IV, q k v o"),

    Method("pfeiffer_seq_x2", (Adapter("ffn", "seq_after", rr=32),),
           "470K", "Table V, PF FFN-Seq-After x2"),
    Method("pfeiffer_par_x2", (Adapter("attn", "par_before", rr=32),),
           "470K", "Table V, PF MHSA-Par-Before x2"),
    Method("houlsby_mixed", (Adapter("attn", "par_before"), Adapter("ffn", "seq_after")),
           "498K", "Table V, HOU mixed"),
    Method("hydra", (Hydra(),), "470K", "Table V, HYDRA FFN"),

    Method("lora_x2", (LoRA("qv", rr=64),), "442K", "Table VI, LoRA"),
    Method("adapter_lora", (Adapter("ffn", "par_before"), LoRA("qv", rr=128)),
           "470K", "Table VI, Adapter + LoRA"),
    Method("adapter_dpt", (Adapter("ffn", "par_before"), Prompts(25, deep=True)),
           "479K", "Table VI, Adapter + DPT-25"),
    Method("adapter_dpt_lora",
           (Adapter("ffn", "par_before"), Prompts(14, deep=True), LoRA("qv", rr=256)),
           "488K", "Table VI, Adapter + DPT-14 + LoRA"),

    # Table VII: the row Seq without the residual path that it needs, and the row Par with one.
    Method("adapter_ffn_seq_no_residual", (Adapter("ffn", "seq_after_no_residual"),),
           "249K", "Table VII, Seq"),
    Method("adapter_ffn_par_residual", (Adapter("ffn", "par_before_residual"),),
           "249K", "Table VII, Par"),
]
# fmt: on

METHODS: dict[str, Method] = {method.name: method for method in ROWS}


def find(name: str) -> Method:
    """The row of METHODS with this name. A UserError suggests the nearest name if there is none."""
    if name in METHODS:
        return METHODS[name]
    nearest = difflib.get_close_matches(name, METHODS, n=1, cutoff=0)[0]
    message = f"unknown method {name!r}: did you mean {nearest!r}?"
    if "petl_more" not in sys.modules:
        message += " The later methods are known after `import petl_more`."
    raise UserError(message)


def apply(model: AST, method: str | Method) -> AST:
    """Give the model a method: a name in METHODS or a Method of your own.

    Everything is frozen, head and final LayerNorm are unfrozen, and then every part inserts its
    modules and unfreezes or freezes what it must. The model is changed and returned, and remembers
    the method as `model.method`.
    """
    if isinstance(method, str):
        method = find(method)
    if hasattr(model, "method"):
        carried = model.method.name
        raise UserError(f"this model already has the method {carried!r}; load a fresh AST")
    blocks = [inner(block) for block in model.blocks]
    if method.blocks:
        first, last = method.blocks
        blocks = blocks[first - 1 : last]
    if len(blocks) < len(model.blocks) and has_mark(method, "needs_all_blocks"):
        raise UserError(f"the method {method.name!r} cannot be kept to some of the blocks")
    device = model.norm.weight.device

    model.requires_grad_(False)
    model.norm.requires_grad_(True)
    model.head.requires_grad_(True)
    for part in method.parts:
        part.insert(model, blocks)
    model.method = method
    return model.to(device)  # the parts were made on the CPU


def has_mark(method, mark):
    """Whether a part of the method has this mark. The docstring of this file lists the marks."""
    return any(getattr(part, mark, False) for part in method.parts)


def count(model: AST) -> dict[str, int]:
    """Numbers of parameters of an adapted model: of the method, of the head, and all there are.

    Method and head count what is trained. The keys are `petl`, `head` (with the final LayerNorm)
    and `total`. Full fine-tuning and BitFit count the final LayerNorm under `petl`, as in Table I.
    """
    head = trained_parameters(model.head)
    if not has_mark(model.method, "owns_final_norm"):
        head += trained_parameters(model.norm)
    total = sum(parameter.numel() for parameter in model.parameters())
    return {"petl": trained_parameters(model) - head, "head": head, "total": total}


def trained_parameters(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def replacement_of(wrapper):
    """The plain module that a wrapper says can replace it; None if it has no function `merged`."""
    if hasattr(wrapper, "merged"):
        return wrapper.merged()
    return None


@torch.no_grad()
def merge(model: AST, replacement_of=replacement_of) -> AST:
    """A plain AST that computes the same as the adapted `model`, which stays as it is.

    LoRA adds s B A to its weight. Adapters, prefixes, prompts and probes raise a UserError.
    (tools/merge.py gives another `replacement_of`, which knows some adapters.)

    The result has no `method`, and no `backbone`, which says where load_ast took the weights from,
    because these are other weights. Save it with `load_weights.save_ast`.
    """
    plain = copy.deepcopy(model)
    # modules() lists a module before what it contains. So the reverse begins with the innermost.
    for parent in reversed(list(plain.modules())):
        for name, module in list(parent.named_children()):
            if not hasattr(module, "wrapped"):
                continue
            replacement = replacement_of(module)
            if replacement is None:
                # For an adapter, name the adapter and not the Adapted around it.
                kind = type(getattr(module, "adapter", module)).__name__
                raise UserError(
                    f"{model.method.name!r} cannot be merged: a plain AST has no layer {kind}"
                )
            setattr(parent, name, replacement)
    plain.requires_grad_(True)
    vars(plain).pop("method", None)
    vars(plain).pop("backbone", None)
    return plain
