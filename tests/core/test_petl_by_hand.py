"""Every method a second time: a whole small AST as plain functions over a dictionary of tensors, in
float64.

Nothing of `petl.py` or `ast_model.py` computes an expected value here. What a method is stands in
ROWS, typed from the paper's tables and sections III-A and III-C; where its parts sit, how wide they
are and what they train follows from that table alone. All tensors are random, frozen ones too: a
zero would hide what it multiplies.
"""

from math import prod, sqrt
from typing import NamedTuple

import pytest
import torch

import petl_more
from ast_model import AST, ASTConfig
from petl import (
    METHODS,
    Convpass2dAdapter,
    Hydra,
    LoRA,
    Method,
    Prefix,
    Prompts,
    apply,
    count,
)


class Part(NamedTuple):
    at: str  # a sub-layer, the projections of LoRA or of prefixes, or what is unfrozen
    how: str
    kind: str
    size: int  # reduction rate RR, or number of prompts
    rank: int = 0  # r = d / RR at d = 768


class Row(NamedTuple):
    name: str
    parts: tuple[Part, ...]
    # trained at 500 frames and d = 768, without the head and, but for OWN_NORM, the final LayerNorm
    count: int
    lr: float
    paper: str  # the count as the paper prints it
    where: str


MHSA_PAR, MHSA_SEQ = (
    Part("attn", "par before", "bottleneck", 64, 12),
    Part("attn", "seq after", "bottleneck", 64, 12),
)
FFN_PAR, FFN_SEQ = (
    Part("ffn", "par before", "bottleneck", 64, 12),
    Part("ffn", "seq after", "bottleneck", 64, 12),
)
CONV_MHSA_PAR, CONV_MHSA_SEQ = (
    MHSA_PAR._replace(kind="convpass"),
    MHSA_SEQ._replace(kind="convpass"),
)
CONV_FFN_PAR, CONV_FFN_SEQ = FFN_PAR._replace(kind="convpass"), FFN_SEQ._replace(kind="convpass")
CONV2D_MHSA_PAR, CONV2D_FFN_PAR = (
    MHSA_PAR._replace(kind="convpass2d"),
    FFN_PAR._replace(kind="convpass2d"),
)
LORA = Part("qv", "beside", "lora", 128, 6)
LORA_64, LORA_256 = Part("qv", "beside", "lora", 64, 12), Part("qv", "beside", "lora", 256, 3)
DPT_25, DPT_14 = Part("blocks", "deep", "prompts", 25), Part("blocks", "deep", "prompts", 14)
ROWS = [
    Row(
        "full_ft",
        (Part("model", "unfreeze", "everything", 0),),
        85_708_032,
        5e-5,
        "85.5M",
        "Table I, Full FT",
    ),
    Row("linear", (), 0, 1e-3, "9-40K", "Table I, Linear"),
    Row(
        "bitfit",
        (Part("model", "unfreeze", "biases", 0),),
        102_144,
        5e-3,
        "102K",
        "Table I, BitFit",
    ),
    Row(
        "spt",
        (Part("embed", "shallow", "prompts", 300),),
        230_400,
        1e-2,
        "230K",
        "Table I, SPT-300",
    ),
    Row("dpt", (DPT_25,), 230_400, 1e-2, "230K", "Table I, DPT-25"),
    Row(
        "prefix",
        (Part("kv", "in front", "prefix", 24),),
        221_184,
        1e-2,
        "221K",
        "Table I, Pref-T 24",
    ),
    Row("pfeiffer_par", (MHSA_PAR,), 248_976, 5e-3, "249K", "Table I, PF par"),
    Row("pfeiffer_seq", (FFN_SEQ,), 248_976, 5e-3, "249K", "Table I, PF seq"),
    Row("houlsby_par", (MHSA_PAR, FFN_PAR), 497_952, 5e-3, "498K", "Table I, HOU par"),
    Row("houlsby_seq", (MHSA_SEQ, FFN_SEQ), 497_952, 5e-3, "498K", "Table I, HOU seq"),
    Row("convpass_pfeiffer_par", (CONV_MHSA_PAR,), 254_304, 5e-3, "254K", "Table I, Conv PF par"),
    Row("convpass_pfeiffer_seq", (CONV_FFN_SEQ,), 254_304, 5e-3, "254K", "Table I, Conv PF seq"),
    Row(
        "convpass_houlsby_par",
        (CONV_MHSA_PAR, CONV_FFN_PAR),
        508_608,
        5e-3,
        "508K",
        "Table I, Conv HOU par",
    ),
    Row(
        "convpass_houlsby_seq",
        (CONV_MHSA_SEQ, CONV_FFN_SEQ),
        508_608,
        5e-3,
        "508K",
        "Table I, Conv HOU seq",
    ),
    Row("lora", (LORA,), 221_184, 5e-3, "221K", "Table I, LoRA"),
    Row("convpass2d_pfeiffer_par", (CONV2D_MHSA_PAR,), 264_672, 5e-3, "-", "-"),
    Row("convpass2d_houlsby_par", (CONV2D_MHSA_PAR, CONV2D_FFN_PAR), 529_344, 5e-3, "-", "-"),
    Row(
        "adapter_ffn_seq_before",
        (Part("ffn", "seq before", "bottleneck", 64, 12),),
        248_976,
        5e-3,
        "249K",
        "Table III, FFN-Seq-Before",
    ),
    Row("adapter_ffn_par_before", (FFN_PAR,), 248_976, 5e-3, "249K", "Table III, FFN-Par-Before"),
    Row(
        "adapter_mhsa_seq_after",
        (MHSA_SEQ,),
        248_976,
        5e-3,
        "249K",
        "Table III, MHSA-Seq/Par-After",
    ),
    Row(
        "adapter_mhsa_seq_before",
        (Part("attn", "seq before", "bottleneck", 64, 12),),
        248_976,
        5e-3,
        "249K",
        "Table III, MHSA-Seq-Before",
    ),
    Row("lora_q", (Part("q", "beside", "lora", 64, 12),), 221_184, 5e-3, "221K", "Table IV, q"),
    Row("lora_qk", (Part("qk", "beside", "lora", 128, 6),), 221_184, 5e-3, "221K", "Table IV, q k"),
    Row(
        "lora_qkvo",
        (Part("qkvo", "beside", "lora", 256, 3),),
        221_184,
        5e-3,
        "221K",
        "Table IV, q k v o",
    ),
    Row(
        "pfeiffer_seq_x2",
        (Part("ffn", "seq after", "bottleneck", 32, 24),),
        470_304,
        5e-3,
        "470K",
        "Table V, PF FFN-Seq-After x2",
    ),
    Row(
        "pfeiffer_par_x2",
        (Part("attn", "par before", "bottleneck", 32, 24),),
        470_304,
        5e-3,
        "470K",
        "Table V, PF MHSA-Par-Before x2",
    ),
    Row("houlsby_mixed", (MHSA_PAR, FFN_SEQ), 497_952, 5e-3, "498K", "Table V, HOU mixed"),
    Row(
        "hydra",
        (Part("ffn", "both", "hydra", 64, 12),),
        470_304,
        5e-3,
        "470K",
        "Table V, HYDRA FFN",
    ),
    Row("lora_x2", (LORA_64,), 442_368, 5e-3, "442K", "Table VI, LoRA"),
    Row("adapter_lora", (FFN_PAR, LORA), 470_160, 5e-3, "470K", "Table VI, Adapter + LoRA"),
    Row("adapter_dpt", (FFN_PAR, DPT_25), 479_376, 5e-3, "479K", "Table VI, Adapter + DPT-25"),
    Row(
        "adapter_dpt_lora",
        (FFN_PAR, DPT_14, LORA_256),
        488_592,
        5e-3,
        "488K",
        "Table VI, Adapter + DPT-14 + LoRA",
    ),
    Row(
        "adapter_ffn_seq_no_residual",
        (Part("ffn", "seq after without residual", "bottleneck", 64, 12),),
        248_976,
        5e-3,
        "249K",
        "Table VII, Seq",
    ),
    Row(
        "adapter_ffn_par_residual",
        (Part("ffn", "par before with residual", "bottleneck", 64, 12),),
        248_976,
        5e-3,
        "249K",
        "Table VII, Par",
    ),
]
# their counts in Table I hold what they train of the final LayerNorm
OWN_NORM = ("full_ft", "bitfit")
HEAD = {
    "norm.weight",
    "norm.bias",
    "head.weight",
    "head.bias",
    "head.0.weight",
    "head.0.bias",
    "head.1.weight",
    "head.1.bias",
}
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


# ------------------------------------------------------------------------ tensors: names and shapes


def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, dim: int) -> dict[str, tuple]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def plain_shapes(
    dim: int, hidden: int, depth: int, tokens: int, classes: int, pool: str = "mean"
) -> dict[str, tuple]:
    """Every tensor of an AST without a method."""
    shapes = {
        "embed.cls": (1, 1, dim),
        "embed.dist": (1, 1, dim),
        "embed.position": (1, tokens, dim),
    }
    shapes |= {"embed.patches.weight": (dim, 1, 16, 16), "embed.patches.bias": (dim,)}
    for i in range(depth):
        shapes |= norm(f"blocks.{i}.norm1", dim) | norm(f"blocks.{i}.norm2", dim)
        for projection in "qkvo":
            shapes |= linear(f"blocks.{i}.attn.{projection}", dim, dim)
        shapes |= linear(f"blocks.{i}.ffn.fc1", dim, hidden) | linear(
            f"blocks.{i}.ffn.fc2", hidden, dim
        )
    shapes |= norm("norm", dim)
    if pool == "cls_dist":
        return shapes | norm("head.0", dim) | linear("head.1", dim, classes)
    return shapes | linear("head", dim, classes)


def part_shapes(part: Part, dim: int, rank: int, depth: int) -> dict[str, tuple]:
    """What a part trains, inserted or unfrozen, `everything` and `biases` excepted."""
    if part.kind == "prompts":
        later = range(1, depth if part.how == "deep" else 1)
        return {
            name: (part.size, dim)
            for name in ("embed.prompts", *(f"blocks.{i}.prompts" for i in later))
        }
    shapes = {}
    for i in range(depth):
        block = f"blocks.{i}"
        if part.kind == "prefix":
            shapes |= {
                f"{block}.attn.{projection}.prefix": (part.size // 2, dim) for projection in part.at
            }
        elif part.kind == "lora":
            for projection in part.at:
                shapes[f"{block}.attn.{projection}.a.weight"] = (rank, dim)
                shapes[f"{block}.attn.{projection}.b.weight"] = (dim, rank)
        else:
            shapes |= norm(f"{block}.{'norm1' if part.at == 'attn' else 'norm2'}", dim)
            if part.kind == "hydra":
                shapes |= linear(f"{block}.ffn.down_p", dim, rank) | linear(
                    f"{block}.ffn.down_q", dim, rank
                )
                shapes |= linear(f"{block}.ffn.up_p", rank, dim) | {
                    f"{block}.ffn.up_q.weight": (dim, rank)
                }
                continue
            adapter = f"{block}.{part.at}.adapter"
            shapes |= linear(f"{adapter}.down", dim, rank) | linear(f"{adapter}.up", rank, dim)
            if part.kind != "bottleneck":
                window = (3,) if part.kind == "convpass" else (3, 3)
                shapes |= {
                    f"{adapter}.conv.weight": (rank, rank, *window),
                    f"{adapter}.conv.bias": (rank,),
                }
    return shapes


def trained_shapes(
    row: Row, plain: dict[str, tuple], dim: int, depth: int, rank_of
) -> dict[str, tuple]:
    """Every tensor that a method trains."""
    shapes = {name: shape for name, shape in plain.items() if name in HEAD}
    for part in row.parts:
        if part.kind == "everything":
            shapes = dict(plain)
        elif part.kind == "biases":
            shapes |= {
                name: shape
                for name, shape in plain.items()
                if ".bias" in name and "embed" not in name
            }
            del shapes["norm.weight"]
        else:
            shapes |= part_shapes(part, dim, rank_of(part), depth)
    return shapes


def by_plain_name(model: AST) -> dict[str, torch.Tensor]:
    """The tensors of an adapted model under the names they have without the wrappers."""
    named = {name.replace("wrapped.", ""): tensor for name, tensor in model.named_parameters()}
    # AdaptFormer moves it
    named = {name.replace(".ffn.norm.", ".norm2."): tensor for name, tensor in named.items()}
    assert len(named) == len(list(model.parameters())), (
        "a wrapper has a parameter with the name of one that it wraps: call it something else"
    )
    return named


# ---------------------------------------------------------------------------------- the AST by hand


def layer_norm(t, name, x):
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-12) * t[f"{name}.weight"]
        + t[f"{name}.bias"]
    )


def affine(t, name, x):
    return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]


def gelu(x):
    return x * (1 + torch.erf(x / sqrt(2))) / 2


def quick_gelu(x):
    return x / (1 + torch.exp(-1.702 * x))


def front(x, prompts, n_replaced):
    """[CLS], the prompts, and what follows the `n_replaced` tokens they stand for."""
    return torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1 + n_replaced :]], dim=1)


def embedding(t, fbank, grid):
    bands, steps = grid
    kernel = t["embed.patches.weight"][:, 0]  # (dim, 16 bands, 16 frames)
    tokens = [
        t["embed.cls"][0, 0].expand(len(fbank), -1),
        t["embed.dist"][0, 0].expand(len(fbank), -1),
    ]
    for f in range(bands):
        for s in range(steps):
            patch = fbank[:, 10 * s : 10 * s + 16, 10 * f : 10 * f + 16]
            tokens.append(torch.einsum("btf,dft->bd", patch, kernel) + t["embed.patches.bias"])
    return torch.stack(tokens, dim=1) + t["embed.position"]


def projection(t, name, u, parts):
    """One of q, k, v, o: with LoRA beside its weight, eq. (5), and then a prefix in front of its
    output.
    """
    y = affine(t, name, u)
    for part in parts:
        if part.kind == "lora" and name[-1] in part.at:
            y = y + 8 / part.size * (u @ t[f"{name}.a.weight"].T) @ t[f"{name}.b.weight"].T
        if part.kind == "prefix" and name[-1] in part.at:
            y = torch.cat([t[f"{name}.prefix"].expand(len(y), -1, -1), y], dim=1)
    return y


def attention(t, name, u, parts, heads):
    q, k, v = (projection(t, f"{name}.{letter}", u, parts) for letter in "qkv")
    size = q.shape[-1] // heads
    mixed = []
    for h in range(heads):
        of_head = slice(size * h, size * (h + 1))
        weights = torch.exp(q[..., of_head] @ k[..., of_head].transpose(1, 2) / sqrt(size))
        mixed.append(weights / weights.sum(-1, keepdim=True) @ v[..., of_head])
    return projection(t, f"{name}.o", torch.cat(mixed, dim=-1), parts)


def convolve(t, name, h, kind, grid):
    """Sums of shifted tokens: over the sequence, or over the patch grid with the tokens in front as
    1x1 images.
    """
    weight, bias = t[f"{name}.weight"], t[f"{name}.bias"]
    if kind == "convpass":
        empty = torch.zeros_like(h[:, :1])
        wide = torch.cat([empty, h, empty], dim=1)
        return sum(wide[:, i : i + h.shape[1]] @ weight[:, :, i].T for i in range(3)) + bias
    bands, steps = grid
    n_front = h.shape[1] - bands * steps
    wide = h.new_zeros(len(h), bands + 2, steps + 2, h.shape[-1])
    wide[:, 1:-1, 1:-1] = h[:, n_front:].unflatten(1, grid)
    patches = sum(
        wide[:, i : i + bands, j : j + steps] @ weight[:, :, i, j].T
        for i in range(3)
        for j in range(3)
    )
    return torch.cat([h[:, :n_front] @ weight[:, :, 1, 1].T, patches.flatten(1, 2)], dim=1) + bias


def sublayer(t, name, u, parts, heads, grid, masks):
    """MHSA or FFN with what the method puts around it. `masks` holds the dropout's, one for each
    Convpass.
    """

    def S(x):
        if name.endswith("attn"):
            return attention(t, name, x, parts, heads)
        return affine(t, f"{name}.fc2", gelu(affine(t, f"{name}.fc1", x)))

    def A(x):
        h = affine(t, f"{name}.adapter.down", x)
        if part.kind == "bottleneck":
            h = gelu(h)
        else:
            h = quick_gelu(convolve(t, f"{name}.adapter.conv", quick_gelu(h), part.kind, grid))
            h = h * masks.get(f"{name}.adapter.dropout", 1) / (0.9 if masks else 1)
        return affine(t, f"{name}.adapter.up", h)

    part = next((part for part in parts if name.endswith(part.at)), None)
    if part is None:
        return S(u)
    if part.how == "par before":
        return S(u) + A(u)
    if part.how == "seq after":
        return S(u) + A(S(u))
    if part.how == "seq before":
        return S(A(u)) + A(u)
    if part.how == "par before with residual":
        return S(u) + A(u) + u
    if part.how == "seq after without residual":
        return A(S(u))
    assert part.kind == "hydra"
    parallel = affine(t, f"{name}.down_p", u) @ t[f"{name}.up_p.weight"].T
    sequential = affine(t, f"{name}.down_q", S(u)) @ t[f"{name}.up_q.weight"].T
    return S(u) + parallel + sequential + t[f"{name}.up_p.bias"]


def logits_by_hand(t, parts, fbank, pool, depth, heads, grid, masks):
    prompts = next((part for part in parts if part.kind == "prompts"), None)
    x = embedding(t, fbank, grid)
    if prompts:
        x = front(x, t["embed.prompts"], 1)  # in place of [distillation]
    for i in range(depth):
        block = f"blocks.{i}"
        if prompts and prompts.how == "deep" and i > 0:
            x = front(x, t[f"{block}.prompts"], prompts.size)
        x = x + sublayer(
            t, f"{block}.attn", layer_norm(t, f"{block}.norm1", x), parts, heads, grid, masks
        )
        x = x + sublayer(
            t, f"{block}.ffn", layer_norm(t, f"{block}.norm2", x), parts, heads, grid, masks
        )
    x = layer_norm(t, "norm", x)
    if pool == "cls_dist":
        return affine(t, "head.1", layer_norm(t, "head.0", (x[:, 0] + x[:, 1]) / 2))
    return affine(t, "head", x[:, 0] if pool == "cls" else x.sum(1) / x.shape[1])


# -------------------------------------------------------------------------------------------- tests

# 3 x 4 patches; 192 dimensions are a bottleneck of 3 at RR 64, LoRA of 2 at RR 128 (1.5 rounded),
# of 1 at RR 256.
SHAPE = {
    "n_frames": 49,
    "n_mels": 38,
    "dim": 192,
    "depth": 2,
    "heads": 3,
    "hidden": 20,
    "n_classes": 3,
}
GRID, TOKENS = (3, 4), 14


def random_model(method: str | Method, pool: str) -> AST:
    torch.manual_seed(0)
    model = apply(AST(ASTConfig(**SHAPE, pool=pool)), method).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1 if parameter.ndim == 1 else 0.08)
            if name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "head.0.weight")):
                parameter.add_(1)
    return model


def dropped(model: AST) -> dict[str, torch.Tensor]:
    """Where each dropout lets a number through, 1 or 0, filled by the next call of the model."""
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            name = name.replace("wrapped.", "")
            module.register_forward_hook(
                lambda _, __, out, name=name: masks.update({name: (out != 0).double()})
            )
    return masks


def test_the_table_holds_every_method_once():
    """Those of petl_more.py have a table of their own, in test_petl_more.py."""
    assert [row.name for row in ROWS] == [name for name in METHODS if name not in petl_more.METHODS]


@each_row
def test_what_the_table_says_of_a_method(row):
    method = METHODS[row.name]
    assert (method.name, method.lr, method.paper, method.where) == (
        row.name,
        row.lr,
        row.paper,
        row.where,
    )


@pytest.mark.parametrize(
    ("pool", "training"), [("mean", False), ("mean", True), ("cls", False), ("cls_dist", False)]
)
@each_row
def test_logits_and_gradients(row, pool, training):
    """Training differs from evaluation by the dropout of Convpass, rate 0.1, and by nothing
    else.
    """
    model = random_model(row.name, pool).train(training)
    masks = dropped(model) if training else {}
    fbank, weights = (
        torch.randn(2, 49, 38, dtype=torch.float64),
        torch.randn(2, 3, dtype=torch.float64),
    )
    logits = model(fbank)
    (logits * weights).sum().backward()

    tensors = by_plain_name(model)
    t = {name: tensor.detach().clone().requires_grad_(True) for name, tensor in tensors.items()}
    expected = logits_by_hand(
        t, row.parts, fbank, pool, SHAPE["depth"], SHAPE["heads"], GRID, masks
    )
    (expected * weights).sum().backward()
    assert (logits - expected).abs().max() <= 1e-10 * expected.abs().max()

    plain = plain_shapes(
        SHAPE["dim"], SHAPE["hidden"], SHAPE["depth"], TOKENS, SHAPE["n_classes"], pool
    )
    trained = trained_shapes(
        row, plain, SHAPE["dim"], SHAPE["depth"], lambda part: max(1, round(192 / part.size))
    )
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == plain | trained
    assert {name for name, tensor in tensors.items() if tensor.grad is not None} == trained.keys()
    largest = max(t[name].grad.abs().max() for name in trained)
    # relative to the largest entry; that of a key's bias is zero in exact arithmetic
    for name in trained:
        scale = max(t[name].grad.abs().max(), 1e-4 * largest)
        assert (tensors[name].grad - t[name].grad).abs().max() <= 1e-8 * scale, name

    assert len(masks) == (
        SHAPE["depth"] * sum("conv" in part.kind for part in row.parts) if training else 0
    )
    if masks:
        kept = torch.cat([mask.flatten() for mask in masks.values()])
        assert 0.8 < kept.mean() < 0.97


@pytest.mark.parametrize("step", [1, -1])
def test_parts_of_all_kinds_together(step):
    """In either order: LoRA beneath prefixes beneath an adapter, and prompts convolved as 1x1
    images.
    """
    ours = (
        Convpass2dAdapter("attn", "par_before"),
        Hydra(),
        Prompts(5, deep=True),
        Prefix(6),
        LoRA("qvko", rr=64),
    )
    theirs = (
        CONV2D_MHSA_PAR,
        Part("ffn", "both", "hydra", 64),
        Part("blocks", "deep", "prompts", 5),
        Part("qvko", "beside", "lora", 64),
        Part("kv", "in front", "prefix", 6),
    )
    model = random_model(Method("own", ours[::step], "-", "-"), "mean").eval()
    fbank = torch.randn(2, 49, 38, dtype=torch.float64)
    expected = logits_by_hand(
        by_plain_name(model), theirs, fbank, "mean", SHAPE["depth"], SHAPE["heads"], GRID, {}
    )
    assert (model(fbank) - expected).abs().max() <= 1e-10 * expected.abs().max()


@each_row
def test_shapes_and_counts_at_full_size(row):
    """r = d / RR at 768 dimensions, LoRA's s = alpha / RR, and the trained parameters that the
    paper counts.
    """
    with torch.device("meta"):
        model = AST(ASTConfig(n_frames=500, n_classes=50))
    assert apply(model, row.name) is model and model.method is METHODS[row.name]
    plain = plain_shapes(dim=768, hidden=3072, depth=12, tokens=2 + 12 * 49, classes=50)
    trained = trained_shapes(row, plain, dim=768, depth=12, rank_of=lambda part: part.rank)
    tensors = by_plain_name(model)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == plain | trained
    assert {name for name, tensor in tensors.items() if tensor.requires_grad} == trained.keys()
    # parts move to where the model is
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}

    scales = {module.scale for module in model.modules() if hasattr(module, "scale")}
    assert scales == {8 / part.size for part in row.parts if part.kind == "lora"}

    head = HEAD - {"norm.weight", "norm.bias"} if row.name in OWN_NORM else HEAD
    sizes = {name: prod(shape) for name, shape in trained.items()}
    assert row.count == sum(size for name, size in sizes.items() if name not in head)
    assert count(model) == {
        "petl": row.count,
        "head": 38_450 if row.name in OWN_NORM else 39_986,  # 768 x 50 + 50, and twice 768
        "total": 85_746_482 + sum(size for name, size in sizes.items() if name not in plain),
    }
