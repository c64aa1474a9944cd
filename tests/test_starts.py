"""What a model holds before the first step, and how methods are fitted, merged and refused.

Distributions are statements in numbers: `ast_model.py` and `petl.py` draw, what it must look like stands here.
"""

import re

import pytest
import torch
from helpers import tiny_ast

import petl
from ast_model import AST, ASTConfig
from petl import METHODS, Adapter, Hydra, LoRA, Method, Prefix, Prompts, apply, merge
from support.command import UserError
from support.variants import narrowed, override, shrink

# 192 dimensions, and ranks wide enough (48 at RR 4) for a mean and a spread.
SHAPE = {"n_frames": 66, "n_mels": 66, "dim": 192, "depth": 2, "heads": 3, "hidden": 400, "n_classes": 60}
INPUTS = {"patches": 256, "q": 192, "k": 192, "v": 192, "o": 192, "fc1": 192, "fc2": 400, "head": 192,
          "down": 192, "down_p": 192, "down_q": 192, "a": 192}  # fmt: skip
ZERO = r"(up|up_p|up_q|b)\.weight|(up|up_p|conv|norm|norm1|norm2|head\.0)\.bias"  # all that is exactly zero
EXAMPLES = {
    "bottleneck": (Adapter("attn", "par_before", rr=4), Adapter("ffn", "seq_after", rr=4)),
    "convpass": (Adapter("attn", "par_before", "convpass", rr=4), Adapter("ffn", "seq_after", "convpass_2d", rr=4)),
    "hydra": (Hydra(rr=4),),
    "lora": (LoRA("qkvo", rr=4),),
    "prefix": (Prefix(24),),
    "prompts": (Prompts(24, deep=True),),
    "nothing": (),
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
        elif layer == "conv":  # the identity: one at the middle of the window, from each channel to itself
            middle = value[(..., *(1 for _ in value.shape[2:]))]
            assert torch.equal(middle, torch.eye(48)) and value.count_nonzero() == 48, name
        elif name.endswith(("prompts", "prefix")):
            is_uniform(value, 0.0790569)  # sqrt(6 / (3 x 16 x 16 + 192))
        elif name.endswith(("cls", "dist", "position")):
            is_normal(value, 0.02)
        else:  # torch's own: +-1 / sqrt(inputs), for weights and biases
            is_uniform(value, INPUTS["head" if layer == "1" else layer] ** -0.5)
            assert not any(value.shape == other.shape and torch.equal(value, other) for other in seen), name
            seen.append(value)


def test_prompts_of_the_base_model():
    """sqrt(6 / (3 x 16 x 16 + 768)) = 0.0625 at 768 dimensions; every layer, keys and values draw their own."""
    torch.manual_seed(0)
    for parts, n in (((Prompts(25, deep=True),), 2), ((Prefix(24),), 4)):
        model = apply(AST(ASTConfig(n_frames=36, depth=2, hidden=8)), Method("test", parts, "-", "-"))
        tensors = [value for name, value in model.named_parameters() if name.endswith(("prompts", "prefix"))]
        assert len(tensors) == len({value[0, 0].item() for value in tensors}) == n
        for value in tensors:
            is_uniform(value, 0.0625)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_exactly_zero_at_the_start(name):
    """Of an adapter one side, never both: then neither would move. Everything else is drawn, or one."""
    model = apply(tiny_ast(pool="cls_dist"), name)
    zero = {n for n, p in model.named_parameters() if not p.any()}
    assert zero == {n for n, _ in model.named_parameters() if re.search(rf"\b({ZERO})$", n)}


@pytest.mark.parametrize("name", METHODS)
def test_dropout_and_layer_norms(name):
    """The AST has no dropout, Convpass one of 0.1 after its convolution; no LayerNorm has torch's own eps."""
    model = apply(tiny_ast(pool="cls_dist"), name)
    dropouts = {n: m.p for n, m in model.named_modules() if "drop" in type(m).__name__.lower()}
    expected = {"pfeiffer": 2, "houlsby": 4}[name.split("_")[1]] if "convpass" in name else 0
    assert list(dropouts.values()) == [0.1] * expected
    assert all(n.endswith("adapter.dropout") for n in dropouts)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [1e-12] * 6  # two in each of two blocks, the final one, that of the head


def test_the_base_model():
    """The AST of the checkpoint: 1024 frames, 128 bands, 16 x 16 patches at stride 10, 12 blocks, 527 classes."""
    config = ASTConfig()
    assert (config.n_frames, config.n_mels, config.patch, config.stride) == (1024, 128, 16, 10)
    assert (config.dim, config.depth, config.heads, config.eps) == (768, 12, 12, 1e-12)
    assert (config.n_classes, config.pool, config.hidden, config.n_tokens) == (527, "mean", None, 1214)
    with torch.device("meta"):
        model = AST(config)
    assert [block.ffn.fc1.out_features for block in model.blocks] == [3072] * 12
    assert {module.eps for module in tiny_ast(eps=1e-5, pool="cls_dist").modules() if hasattr(module, "eps")} == {1e-5}


@pytest.mark.parametrize("wrong", [{"n_mels": 15}, {"n_frames": 15}, {"heads": 0}, {"heads": -4}, {"heads": 3}])
def test_shapes_that_cannot_be(wrong):
    with pytest.raises(ValueError):
        ASTConfig(**{"dim": 32, "heads": 4, **wrong})


def test_the_smallest_shape_has_one_patch():
    model = tiny_ast(n_frames=16, n_mels=16, dim=4, heads=1)
    assert model.config.grid == (1, 1) and model.features(torch.randn(2, 16, 16)).shape == (2, 3, 4)
    for shape in ((2, 17, 16), (2, 16, 17)):
        with pytest.raises(ValueError, match=r"reads \(batch, 16, 16\)"):
            model(torch.randn(shape))


def test_what_the_head_reads():
    """The average of [CLS] and [distillation], not their sum: the LayerNorm behind it would hide the difference."""
    model, read = tiny_ast(pool="cls_dist"), []
    model.head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    fbank = torch.randn(2, 36, 36)
    model(fbank)
    tokens = model.features(fbank)
    torch.testing.assert_close(read[0], 0.5 * tokens[:, 0] + 0.5 * tokens[:, 1])


# ------------------------------------------------------------------------------------------------ narrow backbones


# Dimensions, and what is left there of RR 32, 64, 128 and 256, and of 300, 25, 24 and 14 prompts.
FITTED = {
    64: ([4, 8, 16, 32], [36, 2, 2, 2]),
    128: ([8, 16, 32, 64], [74, 6, 6, 2]),
    192: ([10, 21, 42, 85], [100, 8, 8, 4]),
    256: ([16, 32, 64, 128], [150, 12, 12, 6]),
    384: ([32, 64, 128, 256], [300, 25, 24, 14]),
    768: ([32, 64, 128, 256], [300, 25, 24, 14]),
    1024: ([32, 64, 128, 256], [300, 25, 24, 14]),
}


@pytest.mark.parametrize("dim", FITTED)
def test_reduction_rates_and_prompts_fit_the_width(dim):
    def fitted(name):
        return narrowed(METHODS[name], dim).parts

    rates, prompts = FITTED[dim]
    assert [fitted(name)[0].rr for name in ("pfeiffer_seq_x2", "hydra", "lora_qk", "lora_qkvo")] == rates
    names = ("spt", "dpt", "prefix")
    assert [*(fitted(name)[0].prompts for name in names), fitted("adapter_dpt_lora")[1].prompts] == prompts
    # What else a part says stays, and so does LoRA's alpha: s = alpha / RR grows with the rank.
    assert fitted("adapter_dpt_lora") == (
        Adapter("ffn", "par_before", rr=rates[1]), Prompts(prompts[3], deep=True), LoRA("qv", rr=rates[3], alpha=8),
    )  # fmt: skip


def test_learning_rates_on_a_narrow_backbone():
    """Ten times those of the paper for what trains the backbone itself or the head alone; the others keep theirs."""
    narrow = {name: narrowed(method, 256).lr for name, method in METHODS.items()}
    assert (narrow.pop("full_ft"), narrow.pop("linear")) == (5e-4, 1e-2)
    assert all(lr == METHODS[name].lr for name, lr in narrow.items())
    assert all(narrowed(method, 384).lr == method.lr for method in METHODS.values())


def test_shrink_leaves_at_least_one_rank_and_two_prompts():
    parts = (LoRA(rr=3), Adapter("attn", "seq_after", rr=4), Hydra(rr=5), Prompts(5), Prefix(2))
    shrunk = shrink(Method("test", parts, "-", "-"), 4).parts
    assert [getattr(part, "rr", None) or part.prompts for part in shrunk] == [1, 1, 1, 2, 2]


def test_override_reaches_every_part_that_has_the_setting_and_refuses_what_is_no_number():
    parts = override(METHODS["houlsby_par"], rr=8).parts
    assert parts == (Adapter("attn", "par_before", rr=8), Adapter("ffn", "par_before", rr=8))
    assert override(METHODS["hydra"], rr=1).parts == (Hydra(rr=1),)
    assert override(METHODS["lora"], alpha=0.5).parts == (LoRA("qv", rr=128, alpha=0.5),)
    assert override(METHODS["lora"]) is METHODS["lora"] and METHODS["lora"].parts == (LoRA("qv", 128, 8),)
    for setting in ({"rr": 0}, {"rr": -1}, {"alpha": 0.0}, {"alpha": float("inf")}, {"alpha": float("nan")}):
        with pytest.raises(UserError, match="must be a positive number"):
            override(METHODS["lora"], **setting)
    for name, setting in (("linear", {"rr": 8}), ("houlsby_par", {"alpha": 8}), ("lora", {"prompts": 4})):
        with pytest.raises(UserError, match=f"{name!r} has no setting '{next(iter(setting))}'"):
            override(METHODS[name], **setting)


def test_the_rank_is_rounded_and_at_least_one():
    """3.84 to 4 and 3.2 to 3; 1.5 and 2.5 to the even neighbour, 2, as Python rounds."""
    ranks = {(192, 50): 4, (192, 60): 3, (192, 128): 2, (160, 64): 2, (192, 400): 1}
    assert {arguments: petl.rank_of(*arguments) for arguments in ranks} == ranks


# ----------------------------------------------------------------------------------------------- names and merging


def test_an_unknown_method_leaves_the_model_as_it_was():
    model = tiny_ast()
    for name, nearest in (("houlsby-par", "houlsby_par"), ("Lora", "lora"), ("full", "full_ft"), ("?", "")):
        with pytest.raises(UserError, match=f"unknown method '{re.escape(name)}': did you mean '{nearest}"):
            apply(model, name)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert apply(model, "linear").method is METHODS["linear"]


def test_a_method_of_your_own():
    """Unless given, `lr` is 5e-3, adapters are bottlenecks of RR 64, LoRA is that of Table I, prefixes are 24."""
    own = Method("own", (Adapter("ffn", "seq_after"), LoRA(), Prefix()), "-", "-")
    assert own.lr == 5e-3
    assert own.parts == (Adapter("ffn", "seq_after", "bottleneck", 64), LoRA("qv", 128, 8), Prefix(24))
    model = apply(tiny_ast(), own)
    assert model.method is own
    assert petl.count(model)["head"] == 64 + 96 + 3  # the final LayerNorm and the head at 32 dimensions, 3 classes


MERGEABLE = {"full_ft", "linear", "bitfit", "lora", "lora_q", "lora_qk", "lora_qkvo", "lora_x2", "hydra"}


@pytest.mark.parametrize("name", METHODS)
def test_merging_keeps_the_logits_or_is_refused(name):
    """All tensors random, float64; the model itself stays as it is."""
    torch.manual_seed(0)
    model = apply(tiny_ast(depth=3, hidden=40), name).double().eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    fbank = torch.randn(2, 36, 36, dtype=torch.float64)
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    logits = model(fbank)
    if name in MERGEABLE:
        merged = merge(model)
        assert (merged(fbank) - logits).abs().max() <= 1e-12 * logits.abs().max().clamp_min(1)
        assert merged.state_dict().keys() == AST(merged.config).state_dict().keys()
        assert merged.config.hidden == (40 + 2 * 1 if name == "hydra" else 40)
        assert all(parameter.requires_grad for parameter in merged.parameters()) and not hasattr(merged, "method")
        for parameter in merged.parameters():
            parameter.data.zero_()  # shares no memory with the model
    else:
        with pytest.raises(UserError, match=f"{name!r} cannot be merged: .* is no linear change"):
            merge(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and model.method is METHODS[name]
    for n, (value, trained) in before.items():
        assert torch.equal(after[n], value) and after[n].requires_grad == trained, n
    assert torch.equal(model(fbank), logits)


def test_merging_a_model_without_a_method_copies_it():
    model = tiny_ast()
    merged = merge(model)
    fbank = torch.randn(1, 36, 36)
    assert merged is not model and torch.equal(merged(fbank), model(fbank))
