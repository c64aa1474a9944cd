"""The methods of petl_more.py by hand in float64, against peft and transformers, and what they ask
of the rest.

What a method is stands in ROWS and in `logits_by_hand`, loops and sums over a dictionary of
tensors. What all rows have in common with those of petl.py is tested there, over all of METHODS.
"""

import copy
import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import SMALL_AST, save_random, settings_of, tiny_ast
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from test_petl_by_hand import GRID, SHAPE, affine, by_plain_name, embedding, gelu, layer_norm
from torch import nn

import petl
import petl_more
import train
from ast_model import AST, ASTConfig
from data import Clips
from load_weights import (
    live_tensors,
    load_ast,
    load_tensors,
    load_trained,
    save_trained,
    trained_tensors,
)
from petl import METHODS, Adapter, Hydra, LoRA, Method, Prefix, Prompts, apply, count
from petl_more import (
    IA3,
    SSF,
    AdapterPlus,
    AdaptFormer,
    Conformer,
    DenseMixture,
    DoRA,
    LogMel,
    RsLoRA,
    SoftMixture,
    Statistics,
    VeRA,
)
from support import records
from support.speed import Machine
from support.variants import narrowed
from tools import export
from tools.merge import merge

CPU = torch.device("cpu")


class Row(NamedTuple):
    count: int  # trained at d = 768, without final LayerNorm and head
    lr: float
    parts: tuple
    zero: tuple  # the ends of the names of what is inserted and exactly zero at the start
    paper: str = "-"
    frozen: int = 0  # inserted and not trained; of `probe` the final LayerNorm
    thawed: int = 0  # of `count`, what the pretrained model has, too: trained LayerNorms
    head: int = 39_986  # final LayerNorm and head, 50 classes


CONFORMER_ZERO = ("up.weight", "up.bias", "norm.bias", "batch_norm.bias")
ROWS = {
    "conformer_pfeiffer_par": Row(
        270_720,
        5e-3,
        (Conformer("attn", "par_before", 96, 31),),
        CONFORMER_ZERO,
        "271K",
        thawed=12 * 1536,
    ),
    "conformer_houlsby_par": Row(
        541_440,
        5e-3,
        (Conformer("attn", "par_before", 96, 31), Conformer("ffn", "par_before", 96, 31)),
        CONFORMER_ZERO,
        "542K",
        thawed=2 * 12 * 1536,
    ),
    "soft_moa": Row(
        922_104,
        5e-3,
        (SoftMixture("attn", "par_before", 128, experts=7, slots=1),),
        ("up.weight", "up_bias"),
        thawed=12 * 1536,
    ),
    "dense_moa": Row(
        922_188,
        5e-3,
        (DenseMixture("attn", "par_before", 128, experts=7),),
        ("up.weight", "up_bias"),
        thawed=12 * 1536,
    ),
    "dora": Row(239_616, 5e-3, (DoRA("qv", 128, 8),), ("b.weight", "magnitude")),
    "ia3": Row(55_296, 3e-3, (IA3(),), ("scale",)),
    "vera": Row(
        24_576, 5e-3, (VeRA("qv", 3, seed=0),), ("scale_d", "scale_b"), frozen=2 * 256 * 768
    ),
    "rslora": Row(221_184, 5e-3, (RsLoRA("qv", 128, 8, lora_rr=128),), ("b.weight",)),
    "ssf": Row(204_288, 5e-3, (SSF(),), ("scale", "shift")),
    "adaptformer": Row(1_189_632, 5e-3, (AdaptFormer(12),), ("up.weight", "up.bias", "down.bias")),
    "adapter_plus": Row(
        165_984, 1e-3, (AdapterPlus(96),), ("up.weight", "up.bias", "down.bias", "scale")
    ),
    "probe": Row(0, 1, (Statistics(),), (), frozen=1_536, head=4 * 768 * 13 * 50 + 50),
    # Of the backbone, 85,708,032 parameters, only the final LayerNorm is left.
    "logmel": Row(0, 1, (LogMel(),), (), frozen=2 * 1_536 - 85_708_032, head=12 * 128 * 50 + 50),
}
each = pytest.mark.parametrize("name", ROWS)


def base_ast() -> AST:
    with torch.device("meta"):
        return AST(ASTConfig(n_frames=500, n_classes=50))


def test_the_table_holds_every_row():
    assert list(ROWS) == list(petl_more.METHODS) and list(METHODS)[-len(ROWS) :] == list(ROWS)


@each
def test_what_the_table_says_of_a_method(name):
    method, row = METHODS[name], ROWS[name]
    assert (method.name, method.parts, method.lr, method.paper) == (
        name,
        row.parts,
        row.lr,
        row.paper,
    )
    # The head has the rate of the method, which is nowhere below that of `linear`.
    assert method.head_lr is None and method.lr >= METHODS["linear"].lr
    model = apply(base_ast(), name)
    both = row.count + row.head - 39_986
    assert count(model) == {
        "petl": row.count,
        "head": row.head,
        "total": 85_746_482 + row.frozen + both - row.thawed,
    }
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (Conformer("attn", "par_before", kernel=8), 268_512),
        (Conformer("ffn", "par_before"), 270_720),
        # r = 1, 2, 16, 32: the x-values of the published scaling figure
        (Conformer("attn", "par_before", rr=768), 74_160),
        (Conformer("attn", "par_before", rr=384), 102_240),
        (Conformer("attn", "par_before", rr=48), 495_360),
        (Conformer("attn", "par_before", rr=24), 944_640),
        (SoftMixture("attn", "par_before", slots=2), 12 * (7 * 9_990 + 2 * 5_376 + 1_536)),
        (SoftMixture("attn", "par_before", experts=2), 12 * (2 * 9_990 + 2 * 768 + 1_536)),
        (DenseMixture("attn", "par_before", experts=2), 12 * (2 * 9_990 + 2 * 769 + 1_536)),
        (DoRA("qkvo"), 2 * 239_616),
        (VeRA("q"), 12_288),
        (VeRA(rr=6), 12 * 2 * (768 + 128)),
    ],
)
def test_counts_of_other_settings(part, expected):
    assert count(apply(base_ast(), Method("own", (part,), "-", "-")))["petl"] == expected


def test_what_fits_a_narrow_backbone():
    """A quarter of RR at 128 dimensions, so that conformer keeps 5 channels, a mixture 4, VeRA
    everything.
    """
    ranks = {
        "conformer_pfeiffer_par": 5,
        "conformer_houlsby_par": 5,
        "soft_moa": 4,
        "dense_moa": 4,
        "dora": 4,
        "vera": 128,
        "rslora": 4,
        "adaptformer": 43,
        "adapter_plus": 5,
    }
    for name, rank in ranks.items():
        assert petl.rank_of(128, narrowed(METHODS[name], 128).parts[0].rr) == rank


# --------------------------------------------------------------------------- the whole AST, by hand


def layer(t, name, x, method):
    """One of q, k, v, o, fc1 and fc2, with what the method does to it."""
    weight, bias, last = t[f"{name}.weight"], t[f"{name}.bias"], name.split(".")[-1]
    if last in "qv" and method in ("dora", "rslora"):
        s = 8 / 128
        v = weight + s * t[f"{name}.b.weight"] @ t[f"{name}.a.weight"]
        if method == "dora":
            length = torch.stack([row.square().sum().sqrt() for row in v]).detach()
            start = torch.stack([row.square().sum().sqrt() for row in weight]).detach()
            v = ((start + t[f"{name}.magnitude"]) / length)[:, None] * v
        weight = v
    if last in "qv" and method == "vera":
        a, b = t["blocks.0.attn.q.a.weight"], t["blocks.0.attn.q.b.weight"]
        weight = (
            weight
            + torch.diag(t[f"{name}.scale_b"]) @ b @ torch.diag(0.1 + t[f"{name}.scale_d"]) @ a
        )
    if method == "ia3" and last == "fc2":
        x = x * (1 + t[f"{name}.scale"])
    y = x @ weight.T + bias
    if method == "ia3" and last in "kv":
        y = y * (1 + t[f"{name}.scale"])
    return changed(t, name, y, method)


def changed(t, name, y, method):
    """What SSF does to the output of every layer and LayerNorm."""
    if method == "ssf":
        y = y * (1 + t[f"{name}.scale"]) + t[f"{name}.shift"]
    return y


def attention(t, name, u, method):
    q, k, v = (
        layer(t, f"{name}.{letter}", u, method).unflatten(-1, (SHAPE["heads"], -1))
        for letter in "qkv"
    )
    weights = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    mixed = torch.einsum("bhij,bjhd->bihd", weights.softmax(-1), v).flatten(2)
    return layer(t, f"{name}.o", mixed, method)


def conformer(t, name, u, training):
    """Every window by itself; batch statistics in training, running ones otherwise."""
    centred = u - u.mean(-1, keepdim=True)
    v = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    z = affine(t, f"{name}.down", v * t[f"{name}.norm.weight"] + t[f"{name}.norm.bias"])
    r = z.shape[-1] // 2
    h = z[..., :r] / (1 + torch.exp(-z[..., r:]))
    kernel, tokens = t[f"{name}.conv.weight"], h.shape[1]
    k, rows = kernel.shape[2], []
    for i in range(tokens):
        inside = [(j, i + j - (k - 1) // 2) for j in range(k) if 0 <= i + j - (k - 1) // 2 < tokens]
        rows.append(sum(kernel[:, 0, j] * h[:, at] for j, at in inside) + t[f"{name}.conv.bias"])
    h = torch.stack(rows, dim=1)
    mean, variance = t[f"{name}.batch_norm.running_mean"], t[f"{name}.batch_norm.running_var"]
    if training:
        mean, variance = h.mean((0, 1)), h.var((0, 1), correction=0)
    h = (h - mean) / torch.sqrt(variance + 1e-5) * t[f"{name}.batch_norm.weight"] + t[
        f"{name}.batch_norm.bias"
    ]
    return affine(t, f"{name}.up", h / (1 + torch.exp(-h)))


def expert(t, name, i, x):
    """E_i(x) with its own rows and columns of what all experts hold."""
    n = len(t[f"{name}.up_bias"])
    down, bias = t[f"{name}.down.weight"].chunk(n)[i], t[f"{name}.down.bias"].chunk(n)[i]
    return (
        gelu(x @ down.T + bias) @ t[f"{name}.up.weight"].chunk(n, dim=1)[i].T
        + t[f"{name}.up_bias"][i]
    )


def soft(t, name, u, training):
    """Over clips, tokens, experts and slots; of a token the softmax runs over all slots of all
    experts.
    """
    phi, out = t[f"{name}.slots"], []
    for x in u:
        to_slot = torch.stack(
            [
                torch.stack([x @ phi[:, n, p] for p in range(phi.shape[2])])
                for n in range(phi.shape[1])
            ]
        )
        read, write = torch.exp(to_slot), torch.exp(to_slot)  # (experts, slots, tokens)
        read, write = read / read.sum(2, keepdim=True), write / write.sum((0, 1))
        y = 0
        for n in range(phi.shape[1]):
            for p in range(phi.shape[2]):
                seen = sum(read[n, p, i] * x[i] for i in range(len(x)))
                y = y + write[n, p][:, None] * expert(t, name, n, seen)
        out.append(y)
    return torch.stack(out)


def dense(t, name, u, training):
    weights = torch.exp(affine(t, f"{name}.router", u))
    weights = weights / weights.sum(-1, keepdim=True)
    return sum(weights[..., i : i + 1] * expert(t, name, i, u) for i in range(weights.shape[-1]))


PARALLEL = {
    "conformer_pfeiffer_par": ("attn",),
    "conformer_houlsby_par": ("attn", "ffn"),
    "soft_moa": ("attn",),
    "dense_moa": ("attn",),
}


def sublayer(t, name, u, x, method, training, masks):
    """MHSA or FFN of u = norm(x), and what runs beside it."""
    if name.endswith("attn"):
        y = attention(t, name, u, method)
    else:
        y = layer(t, f"{name}.fc2", gelu(layer(t, f"{name}.fc1", u, method)), method)
    if name.split(".")[-1] in PARALLEL.get(method, ()):
        beside = {"conformer": conformer, "soft": soft, "dense": dense}[method.split("_")[0]]
        return y + beside(t, f"{name}.adapter", u, training)
    if method == "adaptformer" and name.endswith("ffn"):
        h = affine(t, f"{name}.down", x).clamp(min=0) * masks.get(name, 1)
        return y + 0.1 * affine(t, f"{name}.up", h)
    return y


def four_of_each(tokens):
    """Of the 3 x 4 patches behind two tokens, each without its mean and over its spread: the means
    of column 0, of column 1, of columns 2 and 3, and how far the 12 are spread.
    """
    patches = tokens[:, 2:] - tokens[:, 2:].mean(-1, keepdim=True)
    patches = patches / torch.sqrt(patches.square().mean(-1, keepdim=True) + 1e-12)
    columns = [(patches[:, t] + patches[:, 4 + t] + patches[:, 8 + t]) / 3 for t in range(4)]
    mean = sum(columns) / 4
    spread = torch.sqrt(sum((patches[:, i] - mean) ** 2 for i in range(12)) / 12)
    return [columns[0], columns[1], (columns[2] + columns[3]) / 2, spread]


def numbers_of_bands(fbank):
    """Mean and spread of each band over all 49 frames, and over frames 0-9, 10-19, ..., 40-48."""
    numbers = []
    for frames in (range(49), *(range(start, min(start + 10, 49)) for start in range(0, 50, 10))):
        mean = sum(fbank[:, frame] for frame in frames) / len(frames)
        square = sum((fbank[:, frame] - mean) ** 2 for frame in frames) / len(frames)
        numbers += [mean, torch.sqrt(square)]
    return torch.cat(numbers, dim=1)


def logits_by_hand(t, method, fbank, training, masks):
    if method == "logmel":
        return affine(t, "head", (numbers_of_bands(fbank) - t["head.mean"]) / t["head.std"])
    tokens = embedding(t, fbank, GRID)
    seen = four_of_each(tokens)
    if method == "ssf":
        plain = tokens[:, 2:] - t["embed.position"][:, 2:]
        tokens = torch.cat(
            [tokens[:, :2], changed(t, "embed.patches", plain, "ssf") + t["embed.position"][:, 2:]],
            dim=1,
        )
    for i in range(SHAPE["depth"]):
        for norm, at in (("norm1", "attn"), ("norm2", "ffn")):
            name = f"blocks.{i}.{norm}"
            u = changed(t, name, layer_norm(t, name, tokens), method if method == "ssf" else "")
            tokens = tokens + sublayer(t, f"blocks.{i}.{at}", u, tokens, method, training, masks)
        if method == "adapter_plus":
            h = affine(
                t, f"blocks.{i}.adapter.up", gelu(affine(t, f"blocks.{i}.adapter.down", tokens))
            )
            tokens = tokens + masks.get(f"blocks.{i}", 1) * (1 + t[f"blocks.{i}.scale"]) * h
        seen += four_of_each(tokens)
    if method == "probe":
        return affine(t, "head", (torch.cat(seen, dim=1) - t["head.mean"]) / t["head.std"])
    return affine(t, "head", layer_norm(t, "norm", tokens).mean(1))


def random_model(method: str | Method, shape: dict = SHAPE) -> AST:
    """Everything random, frozen tensors and running statistics too; and |W| measured anew."""
    torch.manual_seed(0)
    model = apply(AST(ASTConfig(**shape)), method).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1 if parameter.ndim == 1 else 0.08)
            if name.endswith("norm.weight") or "norm1.w" in name or "norm2.w" in name:
                parameter.add_(1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.01, 0.1)
            if isinstance(module, petl_more.Standardised):
                module.mean.normal_(std=0.3)
                module.std.uniform_(0.2, 0.5)
            if hasattr(module, "w_square"):
                module.w_square = module.wrapped.weight.square().sum(1)
    return model


def masks_of(model: AST, batch: int) -> dict[str, torch.Tensor]:
    """What the next forward pass of a model in training keeps, filled by it; draws what Adapter+
    will draw next.
    """
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            where = name.removesuffix(".dropout").replace("wrapped.", "")
            module.register_forward_hook(
                lambda _, __, out, w=where: masks.update({w: (out != 0).double() / 0.9})
            )
    state = torch.get_rng_state()
    if model.method.name == "adapter_plus":
        draws = [F.dropout(torch.ones(batch, 1, 1, dtype=torch.float64), 0.1) for _ in model.blocks]
        masks = {f"blocks.{i}": draw for i, draw in enumerate(draws)}
    torch.set_rng_state(state)
    return masks


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@each
def test_logits_and_gradients(name, training):
    model = random_model(name).train(training)
    fbank, weights = (
        torch.randn(2, 49, 38, dtype=torch.float64),
        torch.randn(2, 3, dtype=torch.float64),
    )
    masks = masks_of(model, 2) if training else {}
    before = {n: b.clone() for n, b in model.named_buffers()}
    logits = model(fbank)
    (logits * weights).sum().backward()

    tensors = by_plain_name(model)
    t = {n: tensor.detach().clone().requires_grad_(True) for n, tensor in tensors.items()}
    t |= {n.replace("wrapped.", ""): buffer for n, buffer in before.items()}
    expected = logits_by_hand(t, name, fbank, training, masks)
    (expected * weights).sum().backward()
    assert (logits - expected).abs().max() <= 1e-10 * expected.abs().max()
    trained = {n for n, tensor in tensors.items() if tensor.requires_grad}
    assert {n for n, tensor in tensors.items() if tensor.grad is not None} == trained
    largest = max(t[n].grad.abs().max() for n in trained)
    # relative to the largest entry; those of a key's bias and of one before a BatchNorm are zero
    for n in trained:
        scale = max(t[n].grad.abs().max(), 1e-4 * largest)
        assert (tensors[n].grad - t[n].grad).abs().max() <= 1e-8 * scale, n


def test_two_slots_each():
    """The softmax of a token runs over slots and experts together; slots of one expert lie beside
    each other.
    """
    part = SoftMixture("attn", "par_before", rr=64, experts=3, slots=2)
    model = random_model(Method("soft_moa", (part,), "-", "-")).eval()
    fbank = torch.randn(2, 49, 38, dtype=torch.float64)
    expected = logits_by_hand(by_plain_name(model), "soft_moa", fbank, False, {})
    assert (model(fbank) - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize(
    ("steps", "thirds"),
    [
        (1, [{0}, {0}, {0}]),
        (2, [{0}, {0}, {1}]),
        (3, [{0}, {1}, {2}]),
        (5, [{0}, {1, 2}, {3, 4}]),
        (9, [{0, 1, 2}, {3, 4, 5}, {6, 7, 8}]),
        (49, [set(range(16)), set(range(16, 32)), set(range(32, 49))]),
    ],
)
def test_thirds_of_the_time(steps, thirds):
    """Which patches a mean is over: those whose change alone changes it. One band, with a prompt in
    front.
    """
    config = ASTConfig(n_frames=16 + 10 * (steps - 1), n_mels=16, dim=4, heads=1)
    tokens = torch.randn(1, 3 + steps, 4)
    before, seen = petl_more.statistics(tokens, config)[0].chunk(4), [set(), set(), set(), set()]
    for step in range(-3, steps):
        other = tokens.clone()
        other[0, 3 + step] += torch.tensor([1.0, -2.0, 0.5, 0.0])
        for i, numbers in enumerate(petl_more.statistics(other, config)[0].chunk(4)):
            if not torch.allclose(numbers, before[i]):
                seen[i].add(step)
    assert seen == [*thirds, set(range(steps)) if steps > 1 else set()]


@pytest.mark.parametrize("kernel", [1, 2, 5, 8, 31])
def test_windows_of_the_conformer(kernel):
    """Odd and even, and wider than the sequence, too."""
    torch.manual_seed(0)
    module = petl_more.ConformerModule(dim=12, rank=3, kernel=kernel).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    t = {f"m.{n}": tensor for n, tensor in module.state_dict().items()}
    u = torch.randn(2, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(module(u), conformer(t, "m", u, True), rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_the_conformer_module_of_transformers(training):
    """Their r is d, their window odd, and they have no biases; running statistics too."""
    from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import (
        Wav2Vec2ConformerConvolutionModule,
    )

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "conv_depthwise_kernel_size": 5}
    config = transformers.Wav2Vec2ConformerConfig(
        **sizes, hidden_act="swish", conformer_conv_dropout=0
    )
    theirs = Wav2Vec2ConformerConvolutionModule(config).double().train(training)
    ours = petl_more.ConformerModule(8, 8, 5).double().train(training)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.5)
        theirs.batch_norm.running_mean.normal_()
        theirs.batch_norm.running_var.uniform_(0.5, 2)
    state = theirs.state_dict()
    names = {
        "norm": "layer_norm",
        "down": "pointwise_conv1",
        "conv": "depthwise_conv",
        "batch_norm": "batch_norm",
        "up": "pointwise_conv2",
    }
    for n, tensor in ours.state_dict().items():
        name, kind = n.split(".")
        value = state.get(f"{names[name]}.{kind}", torch.zeros_like(tensor))
        tensor.copy_(value.squeeze(-1) if name in ("down", "up") else value)
    u = torch.randn(3, 11, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(u), theirs(u), rtol=0, atol=1e-12)
    for kind in ("running_mean", "running_var"):
        torch.testing.assert_close(
            getattr(ours.batch_norm, kind), getattr(theirs.batch_norm, kind), rtol=0, atol=1e-12
        )


def test_how_often_clips_go_without_their_adapter():
    """Adapter+: a tenth of the clips in training, all tokens, and 1 / 0.9 of it otherwise.
    AdaptFormer: numbers.
    """
    torch.manual_seed(0)
    block = petl_more.AdapterPlusBlock(nn.Identity(), dim=4, rank=2)
    nn.init.ones_(block.adapter.up.bias)
    added = block(torch.zeros(2000, 3, 4))
    kept = added[:, 0, 0] > 0
    assert (
        0.87 < kept.float().mean() < 0.93
        and (added == torch.where(kept, 1 / 0.9, 0.0)[:, None, None]).all()
    )
    assert (block.eval()(torch.zeros(2000, 3, 4)) == 1).all()
    ffn = petl_more.AdaptFormerFFN(nn.Identity(), nn.Identity(), dim=4, rank=3)
    assert ffn.dropout.p == 0.1


# --------------------------------------------------------------------------------------- the fit


def clips_to_fit(count: int = 90, inputs: int = 7, classes: int = 3):
    """Vectors whose numbers have different means and spreads, and labels that depend on them."""
    draws = torch.Generator().manual_seed(0)
    vectors = torch.randn(count, inputs, generator=draws, dtype=torch.float64)
    chance = vectors[:, :classes] + torch.rand(count, classes, generator=draws)
    vectors = vectors * torch.arange(1, inputs + 1) + torch.arange(inputs)
    return vectors.float(), chance.argmax(1)


@pytest.mark.parametrize("count", [90, 2500])  # in one piece, in three
@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 3.0, 0.5])])
def test_the_fit_is_that_of_scikit_learn(count, weights):
    """Also after another penalty: the minimum does not depend on where the search starts."""
    vectors, labels = clips_to_fit(count)
    head = petl_more.Standardised(petl.zeros(nn.Linear(7, 3)))
    for penalty in (1e-1, 1e-4):
        petl_more.fit(head, vectors, labels, penalty, weights)
    x = StandardScaler().fit_transform(vectors.double().numpy())
    weighed = None if weights is None else weights[labels].numpy()
    theirs = LogisticRegression(C=1 / (count * 7 * 1e-4), tol=1e-10, max_iter=10_000)
    theirs.fit(x, labels.numpy(), sample_weight=weighed)
    expected = theirs.predict_proba(x)
    found = head(vectors).softmax(1).detach().numpy()
    assert abs(found - expected).max() < 2e-3
    assert head.wrapped.weight.dtype == torch.float32


def test_the_loss_of_the_fit_and_its_bits():
    """Mean cross-entropy + penalty / 2 * inputs * |W|^2."""
    vectors, labels = clips_to_fit()
    heads = [petl_more.Standardised(petl.zeros(nn.Linear(7, 3))) for _ in range(2)]
    losses = [petl_more.fit(head, vectors, labels, 1e-2) for head in heads]
    assert losses[0] == losses[1]
    assert torch.equal(heads[0].wrapped.weight, heads[1].wrapped.weight)
    weight = heads[0].wrapped.weight.double()
    expected = F.cross_entropy(heads[0](vectors), labels) + 1e-2 / 2 * 7 * (weight**2).sum()
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)


def test_what_hardly_differs_is_not_blown_up():
    head = petl_more.Standardised(petl.zeros(nn.Linear(2, 3)))
    head.standardise(torch.tensor([[1.0, 5.0], [1.0, 7.0]]))
    assert head.mean.tolist() == [1, 6] and head.std.tolist() == [pytest.approx(1e-3), 1]


# --------------------------------------------------------------------------- start and weight decay


@each
def test_what_is_exactly_zero_at_the_start(name):
    torch.manual_seed(0)
    plain = {n for n, _ in tiny_ast().named_parameters()}
    model = apply(AST(ASTConfig(**SHAPE)), name)
    inserted = {n: p for n, p in by_plain_name(model).items() if n not in plain}
    zero = {n for n, p in inserted.items() if not p.any()}
    ends = tuple(f".{end}" for end in ROWS[name].zero)
    assert zero == {n for n in inserted if n.endswith(ends)}


@pytest.mark.parametrize("name", ["dora", "ia3", "vera", "ssf", "rslora", "adapter_plus"])
def test_the_start_is_the_pretrained_function_to_the_bit(name):
    plain = load_ast(SMALL_AST, 60, 4).eval()
    fbank = torch.randn(2, 60, 128)
    assert torch.equal(apply(copy.deepcopy(plain), name).eval()(fbank), plain(fbank))


def test_starting_values():
    """What is drawn, as statements in numbers: d = 192."""
    torch.manual_seed(0)

    def first(name):
        return petl.inner(apply(AST(ASTConfig(**{**SHAPE, "depth": 1})), name).blocks[0])

    soft = first("soft_moa").attn.adapter
    assert abs(soft.slots.std() - (2 / (7 + 192)) ** 0.5) < 0.005 and soft.slots.shape == (
        192,
        7,
        1,
    )
    for module, bound in (
        (soft.down, 192**-0.5),
        (first("conformer_pfeiffer_par").attn.adapter.conv, 31**-0.5),
    ):
        assert (
            0.8 * bound < module.weight.abs().max() <= bound
            and 0 < module.bias.abs().max() <= bound
        )
    module = first("conformer_pfeiffer_par").attn.adapter
    assert (module.batch_norm.momentum, module.batch_norm.eps, module.norm.eps) == (0.1, 1e-5, 1e-5)
    assert (module.batch_norm.running_var == 1).all() and not module.batch_norm.running_mean.any()
    down = first("adaptformer").ffn.down.weight
    assert 0.9 * 192**-0.5 < down.abs().max() <= 192**-0.5
    model = apply(AST(ASTConfig(**SHAPE)), "adapter_plus")
    # a normal of 0.01 cut at twice that has a spread of 0.0088
    down = model.blocks[0].adapter.down.weight
    assert 0.018 < down.abs().max() <= 0.02 and abs(down.std() - 0.0088) < 0.001


def test_the_frozen_pair_of_vera():
    """NumPy's frozen generator, A before B; one pair for all projections, in copies too, and in no
    file.
    """
    model = apply(AST(ASTConfig(n_frames=36, depth=2, hidden=8)), "vera")
    a, b = model.blocks[0].attn.q.a.weight, model.blocks[0].attn.q.b.weight
    assert a.shape == (256, 768) and b.shape == (768, 256) and a.dtype == b.dtype == torch.float32
    torch.testing.assert_close(
        a[0, :3], torch.tensor([0.00862909, 0.03804047, 0.01816617]), rtol=0, atol=5e-9
    )
    torch.testing.assert_close(
        b[0, :3], torch.tensor([-0.12126983, -0.09199615, -0.0673991]), rtol=0, atol=5e-9
    )
    for matrix, bound in ((a, (6 / 768) ** 0.5), (b, (6 / 256) ** 0.5)):
        assert 0.999 * bound < matrix.abs().max() <= bound and not matrix.requires_grad
    for m in (model, copy.deepcopy(model), model.to(torch.float64)):
        assert len({id(block.attn.__getattr__(x).a) for block in m.blocks for x in "qv"}) == 1
    assert not any(".a." in n or n.endswith(".b.weight") for n in trained_tensors(model))
    other = apply(
        AST(ASTConfig(n_frames=36, depth=2, hidden=8)), Method("own", (VeRA(seed=1),), "-", "-")
    )
    assert not torch.equal(other.blocks[0].attn.q.a.weight, model.blocks[0].attn.q.a.weight.float())


@pytest.mark.parametrize(
    "name", ["dora", "ia3", "vera", "rslora", "ssf", "adaptformer", "adapter_plus"]
)
def test_weight_decay_pulls_towards_the_pretrained_function(name):
    """Steps without gradients shrink what is trained: in the end the model answers as it did before
    training.
    """
    plain = load_ast(SMALL_AST, 60, 4).eval()
    model = apply(copy.deepcopy(plain), name).eval()
    inserted = [
        p
        for n, p in by_plain_name(model).items()
        if p.requires_grad and not n.startswith(("norm", "head"))
    ]
    for parameter in inserted:
        nn.init.normal_(parameter, std=0.3)
    optimizer, fbank = torch.optim.AdamW(inserted, lr=0.5, weight_decay=1), torch.randn(2, 60, 128)
    with torch.no_grad():
        away = [(model(fbank) - plain(fbank)).abs().max().item()]
        for _ in range(60):
            for parameter in inserted:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            away.append((model(fbank) - plain(fbank)).abs().max().item())
    assert away[0] > 1e-3 and away[-1] < 1e-5


def test_ssf_in_all_blocks_by_number_is_ssf():
    everywhere = Method("own", (SSF(),), "-", "-", blocks=(1, 2))
    assert count(apply(tiny_ast(), everywhere)) == count(apply(tiny_ast(), "ssf"))
    places = [
        name
        for name, tensor in apply(tiny_ast(), everywhere).named_parameters()
        if tensor.requires_grad
    ]
    assert "embed.patches.scale" in places


# ------------------------------------------------------------------------------ merging, in company


@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize(
    "parts",
    [
        (SSF(), LoRA("qkvo", rr=8), Adapter("ffn", "par_before", rr=8)),
        (IA3(), Hydra(rr=8), DoRA("qk", rr=8)),
        (VeRA("vo"), RsLoRA("vo", rr=8), SSF()),
    ],
)
def test_merging_goes_from_the_inside_outwards(parts, step):
    """Several wrappers on one weight, put there in either order."""
    shape = {"n_frames": 36, "n_mels": 36, "dim": 32, "depth": 2, "heads": 4, "n_classes": 3}
    model = random_model(Method("own", parts[::step], "-", "-"), shape).eval()
    fbank = torch.randn(2, 36, 36, dtype=torch.float64)
    merged = merge(model)
    assert not any(hasattr(module, "wrapped") for module in merged.modules())
    assert merged.state_dict().keys() == AST(merged.config).state_dict().keys()
    assert (merged(fbank) - model(fbank)).abs().max() <= 1e-12 * model(fbank).abs().max().clamp_min(
        1
    )


@pytest.mark.parametrize("step", [1, -1])
def test_beneath_other_wrappers(step):
    """What changes a weight lies beneath prefixes and inside of prompted blocks, whoever came
    first.
    """
    parts = (
        Prompts(3, deep=True),
        Adapter("attn", "par_before", rr=8),
        Prefix(4),
        DoRA("qkv", rr=8),
        IA3(),
        SSF(),
        VeRA(),
    )
    model = apply(tiny_ast(), Method("test", parts[::step], "-", "-"))
    attn = petl.inner(petl.inner(model.blocks[1]).attn)
    assert isinstance(attn.k, petl.PrefixLinear) and isinstance(attn.k.wrapped.wrapped, nn.Module)
    prefix, inside = attn.v.prefix, []
    module = attn.v.wrapped
    while hasattr(module, "wrapped"):
        inside.append(type(module).__name__)
        module = module.wrapped
    assert sorted(inside) == ["DoRALinear", "Scaled", "Scaled", "VeRALinear"] and prefix.shape == (
        2,
        32,
    )
    assert model(torch.randn(2, 36, 36)).shape == (2, 3)


# ------------------------------------------------------------------------------------- against peft


def peft_model(name: str, base=SMALL_AST, **changes):
    """The method on transformers' AST with peft's own code, everything it trains random."""
    import peft

    torch.manual_seed(3)
    saved = {"modules_to_save": ["classifier", "audio_spectrogram_transformer.layernorm"]}
    qv = {"target_modules": ["q_proj", "v_proj"], **saved}
    config = {
        "dora": lambda: peft.LoraConfig(
            **{"r": 4, "lora_alpha": 2, "use_dora": True, **qv, **changes}
        ),
        "rslora": lambda: peft.LoraConfig(
            **{"r": 4, "lora_alpha": 3, "use_rslora": True, **qv, **changes}
        ),
        "vera": lambda: peft.VeraConfig(**{"r": 8, **qv, **changes}),
        "ia3": lambda: peft.IA3Config(
            **{
                "target_modules": ["k_proj", "v_proj", "fc2"],
                "feedforward_modules": ["fc2"],
                **saved,
                **changes,
            }
        ),
    }[name]()
    theirs = peft.get_peft_model(
        transformers.AutoModelForAudioClassification.from_pretrained(base), config
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return theirs.eval()


OURS = {
    "dora": DoRA("qv", rr=16, alpha=8),
    "rslora": RsLoRA(
        "qv", rr=16, alpha=192, lora_rr=64
    ),  # s = 192 / 64 sqrt(16 / 64) = 3 / sqrt(4)
    "vera": VeRA("qv", rr=8),
    "ia3": IA3(),
}
SAME = {  # our tensor, peft's, and where peft's starts
    "dora": [
        ("a.weight", "lora_A.default.weight", 0),
        ("b.weight", "lora_B.default.weight", 0),
        ("magnitude", "lora_magnitude_vector.default.weight", "length"),
    ],
    "rslora": [("a.weight", "lora_A.default.weight", 0), ("b.weight", "lora_B.default.weight", 0)],
    "vera": [("scale_b", "vera_lambda_b.default", 0), ("scale_d", "vera_lambda_d.default", 0.1)],
    "ia3": [("scale", "ia3_l.default", 1)],
}


@pytest.mark.parametrize("name", OURS)
def test_logits_and_gradients_of_peft(name):
    """Ours are distances from where theirs start; float64."""
    theirs = peft_model(name).double()
    ours = load_ast(SMALL_AST, pool="cls_dist").double()
    ours = apply(ours, Method("test", (OURS[name],), "-", "-")).double().eval()
    layers, pairs = theirs.base_model.model.audio_spectrogram_transformer.layers, []
    for block, layer in zip(ours.blocks, layers, strict=True):
        places = [
            (getattr(block.attn, x), getattr(layer.attention, f"{x}_proj"))
            for x in ("kv" if name == "ia3" else "qv")
        ]
        for module, reference in places + (
            [(block.ffn.fc2, layer.mlp.fc2)] if name == "ia3" else []
        ):
            for own, other, start in SAME[name]:
                p, q = module.get_parameter(own), reference.get_parameter(other)
                start = module.wrapped.weight.norm(dim=1) if start == "length" else start
                p.data.copy_(q.detach().reshape(p.shape) - start)
                pairs.append((p, q))
            if name == "vera":
                module.a.weight.data.copy_(reference.vera_A["default"])
                module.b.weight.data.copy_(reference.vera_B["default"])
    for own, other in (
        (ours.norm, theirs.base_model.model.audio_spectrogram_transformer.layernorm),
        (ours.head, theirs.base_model.model.classifier),
    ):
        for p, q in zip(
            own.parameters(), other.modules_to_save["default"].parameters(), strict=True
        ):
            p.data.copy_(q)
            pairs.append((p, q))
    fbank = torch.randn(2, 100, 128, dtype=torch.float64)
    our_logits, their_logits = ours(fbank), theirs(input_values=fbank).logits
    assert (our_logits - their_logits).abs().max() <= 1e-11
    for logits in (our_logits, their_logits):
        F.cross_entropy(logits, torch.tensor([0, 3])).backward()
    for p, q in pairs:
        assert (p.grad.flatten() - q.grad.flatten()).abs().max() <= 1e-10 * q.grad.abs().max()


def run_export(*words) -> int:
    return export.main([str(word) for word in words])


@pytest.mark.parametrize("name", ["dora", "rslora"])
def test_peft_opens_our_files_and_we_open_theirs(name, tmp_path):
    """Out to peft, its answers, its own copy of the file, and back: the same method and the same
    answers.
    """
    import peft

    ours = save_random(tmp_path / "fold1.safetensors", name, "cls_dist")
    assert (
        run_export(
            "export", tmp_path / "fold1.safetensors", "--to", "peft", "--out", tmp_path / "peft"
        )
        == 0
    )
    base = json.loads((tmp_path / "peft/adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]
    config = transformers.AutoConfig.from_pretrained(tmp_path / "peft")
    plain = transformers.AutoModelForAudioClassification.from_pretrained(
        base, config=config, ignore_mismatched_sizes=True
    )
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
    fbank = torch.randn(3, 60, 128)
    with torch.no_grad():
        assert (theirs(input_values=fbank).logits - ours(fbank)).abs().max() <= 1e-5
    theirs.save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "config.json").write_bytes(
        (tmp_path / "peft" / "config.json").read_bytes()
    )
    for folder in ("peft", "again"):
        assert run_export("import", tmp_path / folder, "--out", tmp_path / "back.safetensors") == 0
        back = load_trained(tmp_path / "back.safetensors")
        assert back.method.name == name and back.method.lr == ROWS[name].lr
        for n, tensor in trained_tensors(ours).items():
            torch.testing.assert_close(trained_tensors(back)[n], tensor, rtol=0, atol=2e-6)
        with torch.no_grad():
            assert (back(fbank) - ours(fbank)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dora", {}),
        ("dora", {"r": 5, "use_rslora": True, "target_modules": ["k_proj"]}),
        ("rslora", {"r": 5}),
    ],
)
def test_what_peft_trained_opens_here(name, changes, tmp_path):
    theirs = peft_model(name, **changes)
    theirs.save_pretrained(tmp_path / "peft")
    assert run_export("import", tmp_path / "peft", "--out", tmp_path / "fold.safetensors") == 0
    ours, fbank = load_trained(tmp_path / "fold.safetensors"), torch.randn(2, 100, 128)
    with torch.no_grad():
        assert (theirs(input_values=fbank).logits - ours(fbank)).abs().max() <= 1e-5


# ------------------------------------------------------------------------- buffers that are trained


def statistics(tensors: dict) -> dict[str, torch.Tensor]:
    return {n: tensor for n, tensor in tensors.items() if "running" in n}


@pytest.mark.parametrize("name", METHODS)
def test_what_training_changes(name):
    """Trained parameters, and of BatchNorm both running statistics; not how many batches it has
    seen. Of `probe`, what its numbers are standardised by.
    """
    model = apply(tiny_ast(depth=3), name)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    places = {"conformer_pfeiffer_par": ["attn"], "conformer_houlsby_par": ["attn", "ffn"]}.get(
        name, []
    )
    running = {
        f"blocks.{i}.{at}.adapter.batch_norm.running_{kind}"
        for i in range(3)
        for at in places
        for kind in ("mean", "var")
    } | ({"head.mean", "head.std"} if name in ("probe", "logmel") else set())
    assert live_tensors(model).keys() == trained_tensors(model).keys() == trained | running


def test_running_statistics_are_remembered_and_put_back(tmp_path):
    """Copies, that later batches leave alone; and a file has them."""
    model = save_random(tmp_path / "fold1.safetensors", "conformer_houlsby_par").train()
    fbank = torch.randn(4, 60, 128)
    before = trained_tensors(model)
    model(fbank)
    changed = statistics(trained_tensors(model))
    assert len(changed) == 8 and all(not torch.equal(changed[n], before[n]) for n in changed)
    load_tensors(model, before, tmp_path)
    assert all(torch.equal(tensor, before[n]) for n, tensor in trained_tensors(model).items())
    assert statistics(load_file(tmp_path / "fold1.safetensors")).keys() == changed.keys()
    model.train()(fbank)
    save_trained(model, tmp_path / "fold2.safetensors", {})
    with torch.no_grad():
        assert torch.equal(load_trained(tmp_path / "fold2.safetensors")(fbank), model.eval()(fbank))


def test_a_resumed_run_has_the_statistics_of_an_unbroken_one(train_main, tmp_path, monkeypatch):
    options = ["--method", "conformer_houlsby_par", "--epochs", 3, "--batch-size", 9, "--no-mask"]
    assert train_main(*options, "--out", tmp_path / "whole") == 0
    save_progress = records.save_progress

    def interrupted(file, progress, settings, state):
        save_progress(file, progress, settings, state)
        assert len(statistics(state["tensors"])) == 8
        if len(progress.history) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(records, "save_progress", interrupted)
    assert train_main(*options, "--out", tmp_path / "broken") == 130
    monkeypatch.setattr(records, "save_progress", save_progress)
    assert train_main(*options, "--out", tmp_path / "broken", "--resume") == 0
    one, two = (
        load_file(next((tmp_path / out).rglob("fold1.safetensors"))) for out in ("whole", "broken")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    assert len(statistics(one)) == 8 and all(
        tensor.abs().max() > 0 for tensor in statistics(one).values()
    )


def test_compiled_code_moves_running_statistics_once(monkeypatch):
    """Traced as for the default compiler, without the minutes that it takes to write code."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend="aot_eager"))
    clips = Clips(torch.randn(12, 36, 36), torch.tensor([0, 1, 2] * 4))
    results = []
    for machine in (Machine(CPU), Machine(CPU, compile=True)):
        torch.manual_seed(0)
        model = machine.prepare(apply(tiny_ast(), "conformer_pfeiffer_par"), "float32")
        learner = train.Learner(model, settings_of(batch_size=4), machine)
        train.train_epoch(learner, clips, list(range(12)), 1)
        results.append(statistics(trained_tensors(model)))
    for n, tensor in results[0].items():
        torch.testing.assert_close(results[1][n], tensor, rtol=0.02, atol=2e-3)


TWO = """
import json, sys, torch
sys.path.insert(0, sys.argv[1] + "/tests")
from helpers import settings_of, tiny_ast
import load_weights, petl, train
from data import Clips, Split
from support.processes import process_group, ranks
from support.speed import Machine
from pathlib import Path
cpu, out = torch.device("cpu"), Path(sys.argv[2])
torch.set_num_threads(1)
with process_group(cpu):
    rank = ranks()[0]
    torch.manual_seed(0)
    model, machine = petl.apply(tiny_ast(), "conformer_pfeiffer_par").train(), Machine(cpu)
    clips = torch.randn(4, 3, 36, 36)
    settings = settings_of(epochs=2, batch_size=4)
    learner = train.Learner(model, settings, machine)
    for i in range(2):
        learner.train_network(clips[2 * i + rank]).sum().backward()
    steps = {"own": load_weights.trained_tensors(model)}
    machine.average_(t for t in load_weights.live_tensors(model).values() if not t.requires_grad)
    steps["mean"] = load_weights.trained_tensors(model)
    labels = torch.tensor([0, 1, 2] * 4)
    split = Split(list(range(8)), [], list(range(8, 12)))
    settings = settings_of(epochs=2, batch_size=4, keep=0.5)
    learner = train.Learner(model, settings, machine)
    train.train_fold(learner, Clips(clips.flatten(0, 1), labels), split, 1, train.Progress())
    steps["run"] = load_weights.trained_tensors(model)
    torch.save(steps, out / f"{rank}.pt")
"""


def test_statistics_are_averaged_over_processes(tmp_path):
    """Each process takes its own, from its own clips alone; their mean is what is evaluated and
    written. The processes leave out other patches, and still leave the same tensors.
    """
    root = os.path.dirname(petl.__file__)
    (tmp_path / "two.py").write_text(TWO)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": root,
        "PYTHONWARNINGS": "error::FutureWarning",
    }
    words = [*torchrun, tmp_path / "two.py", root, tmp_path]
    done = subprocess.run(
        list(map(str, words)), env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    torch.manual_seed(0)
    model = apply(tiny_ast(), "conformer_pfeiffer_par").train()
    clips = torch.randn(4, 3, 36, 36)
    alone = []
    for rank in (0, 1):
        copied = copy.deepcopy(model)
        for i in range(2):
            copied(clips[2 * i + rank])
        alone.append(statistics(trained_tensors(copied)))
        for n, tensor in alone[rank].items():
            torch.testing.assert_close(ranks[rank]["own"][n], tensor, rtol=1e-4, atol=1e-6)
    for n in alone[0]:
        assert (alone[0][n] - alone[1][n]).abs().max() > 1e-4
        torch.testing.assert_close(
            ranks[0]["mean"][n], (alone[0][n] + alone[1][n]) / 2, rtol=1e-4, atol=1e-6
        )
    for when in ("mean", "run"):
        assert all(
            torch.equal(tensor, ranks[1][when][n]) for n, tensor in ranks[0][when].items()
        ), when
    assert any(not torch.equal(ranks[0]["run"][n], ranks[0]["mean"][n]) for n in alone[0])


# ----------------------------------------------------------------------------------------- bfloat16


@each
def test_bfloat16(name):
    """Frozen weights are kept in bfloat16, gradients are float32 and finite; close to float32 at
    the start.
    """
    torch.manual_seed(0)
    plain = apply(load_ast(SMALL_AST, 60, 4), name)
    model = Machine(CPU).prepare(copy.deepcopy(plain), "bfloat16")
    fbank = torch.randn(2, 60, 128)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.train()(fbank)
    F.cross_entropy(logits.float(), torch.tensor([0, 1])).backward()
    for n, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), n
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert (model.eval()(fbank).float() - plain.eval()(fbank)).abs().max() < 0.1


def test_lengths_of_dora_are_those_of_float32():
    """Of the weights before they were rounded, computed in float32: exactly 1 at the start, and
    hardly moved later.
    """
    torch.manual_seed(0)
    plain = apply(load_ast(SMALL_AST, 60, 4), "dora")
    rounded = Machine(CPU).prepare(copy.deepcopy(plain), "bfloat16")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert (rounded.blocks[0].attn.q.gain() == 1).all()
    for model in (plain, rounded):
        torch.manual_seed(1)
        nn.init.normal_(model.blocks[0].attn.q.b.weight, std=0.5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        exact, near = plain.blocks[0].attn.q.gain(), rounded.blocks[0].attn.q.gain()
    assert exact.dtype == near.dtype == torch.float32 and (exact - 1).abs().max() > 1e-3
    assert (exact - near).abs().max() < 2e-4
