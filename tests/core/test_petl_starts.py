"""What a model holds before the first step.

Distributions are statements in numbers: `ast_model.py` and `petl.py` draw, what it must look like
stands here.
"""

import copy
import re

import pytest
import torch
from helpers import tiny_ast

import petl_more
from ast_model import AST, ASTConfig
from petl import (
    METHODS,
    Adapter,
    Convpass2dAdapter,
    ConvpassAdapter,
    Hydra,
    LoRA,
    Method,
    Prefix,
    Prompts,
    apply,
)

PAPERS = [name for name in METHODS if name not in petl_more.METHODS]  # those have test_petl_more.py

# 192 dimensions, and ranks wide enough (48 at RR 4) for a mean and a spread.
SHAPE = {
    "n_frames": 66,
    "n_mels": 66,
    "dim": 192,
    "depth": 2,
    "heads": 3,
    "hidden": 400,
    "n_classes": 60,
}
INPUTS = {
    "patches": 256,
    "q": 192,
    "k": 192,
    "v": 192,
    "o": 192,
    "fc1": 192,
    "fc2": 400,
    "head": 192,
    "down": 192,
    "down_p": 192,
    "down_q": 192,
    "a": 192,
}
# all that is exactly zero
ZERO = r"(up|up_p|up_q|b)\.weight|(up|up_p|conv|norm|norm1|norm2|head\.0)\.bias"
EXAMPLES = {
    "bottleneck": (Adapter("attn", "par_before", rr=4), Adapter("ffn", "seq_after", rr=4)),
    "convpass": (
        ConvpassAdapter("attn", "par_before", rr=4),
        Convpass2dAdapter("ffn", "seq_after", rr=4),
    ),
    "hydra": (Hydra(rr=4),),
    "lora": (LoRA("qkvo", rr=4),),
    "prefix": (Prefix(24),),
    "prompts": (Prompts(24, deep=True),),
    "nothing": (),
}
# These replace part of the pretrained function from the first step on, or cut a path: Tables III
# and VII show the harm.
NOT_IDENTITY = {
    "adapter_ffn_seq_before",
    "adapter_mhsa_seq_before",
    "adapter_ffn_seq_no_residual",
    "adapter_ffn_par_residual",
    "spt",
    "dpt",
    "prefix",
    "adapter_dpt",
    "adapter_dpt_lora",
    "probe",
    "logmel",
}


def is_uniform(values: torch.Tensor, bound: float) -> None:
    """Within +-bound and up to it; mean and spread within four of their own standard errors."""
    values, n = values.detach().flatten(), values.numel()
    assert 0.9 * bound < values.abs().max() <= bound
    assert abs(values.mean()) < 4 * bound / (3 * n) ** 0.5
    assert abs(values.std() / bound * 3**0.5 - 1) < 4 * (0.2 / n) ** 0.5


def is_normal(values: torch.Tensor, std: float) -> None:
    values, n = values.detach().flatten(), values.numel()
    assert abs(values.mean()) < 4 * std / n**0.5
    assert abs(values.std() / std - 1) < 4 * (0.5 / n) ** 0.5
    assert 2.3 * std < values.abs().max() < 6 * std


@pytest.mark.parametrize("pool", ["mean", "cls_dist"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_every_tensor_starts_as_it_should(example, pool):
    torch.manual_seed(0)
    model = apply(AST(ASTConfig(**SHAPE, pool=pool)), Method("test", EXAMPLES[example], "-", "-"))
    seen = []
    for name, value in model.named_parameters():
        layer = name.replace(".wrapped", "").split(".")[-2]
        if re.search(rf"\b({ZERO})$", name):
            assert not value.any(), name
        elif re.search(r"norm\d?\.weight$|head\.0\.weight$", name):
            assert (value == 1).all(), name
        # the identity: one at the middle of the window, from each channel to itself
        elif layer == "conv":
            middle = value[(..., *(1 for _ in value.shape[2:]))]
            assert torch.equal(middle, torch.eye(48)) and value.count_nonzero() == 48, name
        elif name.endswith(("prompts", "prefix")):
            is_uniform(value, 0.0790569)  # sqrt(6 / (3 x 16 x 16 + 192))
        elif name.endswith(("cls", "dist", "position")):
            is_normal(value, 0.02)
        else:  # torch's own: +-1 / sqrt(inputs), for weights and biases
            is_uniform(value, INPUTS["head" if layer == "1" else layer] ** -0.5)
            assert not any(
                value.shape == other.shape and torch.equal(value, other) for other in seen
            ), name
            seen.append(value)


def test_prompts_of_the_base_model():
    """sqrt(6 / (3 x 16 x 16 + 768)) = 0.0625 at 768 dimensions; every layer, keys and values draw
    their own.
    """
    torch.manual_seed(0)
    for parts, n in (((Prompts(25, deep=True),), 2), ((Prefix(24),), 4)):
        model = apply(
            AST(ASTConfig(n_frames=36, depth=2, hidden=8)), Method("test", parts, "-", "-")
        )
        tensors = [
            value
            for name, value in model.named_parameters()
            if name.endswith(("prompts", "prefix"))
        ]
        assert len(tensors) == len({value[0, 0].item() for value in tensors}) == n
        for value in tensors:
            is_uniform(value, 0.0625)


@pytest.mark.parametrize("name", PAPERS)
def test_what_is_exactly_zero_at_the_start(name):
    """Of an adapter one side, never both: then neither would move. Everything else is drawn, or
    one.
    """
    model = apply(tiny_ast(pool="cls_dist"), name)
    zero = {n for n, p in model.named_parameters() if not p.any()}
    assert zero == {n for n, _ in model.named_parameters() if re.search(rf"\b({ZERO})$", n)}


@pytest.mark.parametrize("name", PAPERS)
def test_dropout_and_layer_norms(name):
    """The AST has no dropout, Convpass one of 0.1 after its convolution; no LayerNorm has torch's
    own eps.
    """
    model = apply(tiny_ast(pool="cls_dist"), name)
    dropouts = {n: m.p for n, m in model.named_modules() if "drop" in type(m).__name__.lower()}
    expected = {"pfeiffer": 2, "houlsby": 4}[name.split("_")[1]] if "convpass" in name else 0
    assert list(dropouts.values()) == [0.1] * expected
    assert all(n.endswith("adapter.dropout") for n in dropouts)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    # two in each of two blocks, the final one, that of the head
    assert [norm.eps for norm in norms] == [1e-12] * 6


@pytest.mark.parametrize("name", METHODS)
def test_start_is_the_pretrained_function(name):
    plain = tiny_ast().eval()
    model = apply(copy.deepcopy(plain), name).eval()
    fbank = torch.randn(2, 36, 36)
    if name in NOT_IDENTITY:
        assert (model(fbank) - plain(fbank)).abs().max() > 1e-4
    else:
        torch.testing.assert_close(model(fbank), plain(fbank))
