"""Methods with other numbers: those that suit a narrow backbone, and those that were asked for."""

import pytest

import train
from ast_model import ASTConfig
from petl import METHODS, Adapter, Hydra, LoRA, Method, Prefix, Prompts
from support.command import UserError
from support.variants import method_for, narrowed, override

# --------------------------------------------------------------------------------- narrow backbones


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
    def method_for(name):
        return narrowed(METHODS[name], dim).parts

    rates, prompts = FITTED[dim]
    assert [
        method_for(name)[0].rr for name in ("pfeiffer_seq_x2", "hydra", "lora_qk", "lora_qkvo")
    ] == rates
    names = ("spt", "dpt", "prefix")
    assert [
        *(method_for(name)[0].prompts for name in names),
        method_for("adapter_dpt_lora")[1].prompts,
    ] == prompts
    # What else a part says stays, and so does LoRA's alpha: s = alpha / RR grows with the rank.
    assert method_for("adapter_dpt_lora") == (
        Adapter("ffn", "par_before", rr=rates[1]),
        Prompts(prompts[3], deep=True),
        LoRA("qv", rr=rates[3], alpha=8),
    )


def test_learning_rates_on_a_narrow_backbone():
    """Ten times those of the paper for what trains the backbone itself or the head alone, and for
    the others as many times as their bottlenecks are wider.
    """
    narrow = {name: narrowed(method, 256).lr for name, method in METHODS.items()}
    assert (narrow.pop("full_ft"), narrow.pop("linear")) == (5e-4, 1e-2)
    assert (narrow.pop("probe"), narrow.pop("logmel")) == (1, 1)  # which are fitted
    assert all(lr == 2 * METHODS[name].lr for name, lr in narrow.items())
    for dim in (128, 64):
        assert narrowed(METHODS["lora"], dim).lr == 4 * METHODS["lora"].lr
    # The head has the rate of linear, which is a head and has no other.
    head = {name: narrowed(method, 256).head_lr for name, method in METHODS.items()}
    assert head.pop("linear") is None
    assert set(head.values()) == {1e-2}
    assert all(narrowed(method, dim) is method for method in METHODS.values() for dim in (384, 768))


def test_shrink_leaves_at_least_one_rank_and_two_prompts():
    parts = (LoRA(rr=3), Adapter("attn", "seq_after", rr=4), Hydra(rr=5), Prompts(5), Prefix(2))
    shrunk = narrowed(Method("test", parts, "-", "-"), 128).parts
    assert [getattr(part, "rr", None) or part.prompts for part in shrunk] == [1, 1, 1, 2, 2]


# -------------------------------------------------------------------------------- what is asked for


def test_override_reaches_every_part_that_has_the_setting_and_refuses_what_is_no_number():
    parts = override(METHODS["houlsby_par"], rr=8).parts
    assert parts == (Adapter("attn", "par_before", rr=8), Adapter("ffn", "par_before", rr=8))
    assert override(METHODS["hydra"], rr=1).parts == (Hydra(rr=1),)
    assert override(METHODS["lora"], alpha=0.5).parts == (LoRA("qv", rr=128, alpha=0.5),)
    assert override(METHODS["lora"]) is METHODS["lora"] and METHODS["lora"].parts == (
        LoRA("qv", 128, 8),
    )
    for setting in (
        {"rr": 0},
        {"rr": -1},
        {"alpha": 0.0},
        {"alpha": float("inf")},
        {"alpha": float("nan")},
    ):
        with pytest.raises(UserError, match="Expected float"):
            override(METHODS["lora"], **setting)
    for name, setting in (
        ("linear", {"rr": 8}),
        ("houlsby_par", {"alpha": 8}),
        ("lora", {"prompts": 4}),
    ):
        with pytest.raises(UserError, match=f"{name!r} has no setting '{next(iter(setting))}'"):
            override(METHODS[name], **setting)


def test_three_settings_at_once():
    lora = override(METHODS["adapter_dpt_lora"], rr=32, alpha=16, prompts=5)
    assert lora.parts == (
        Adapter("ffn", "par_before", rr=32),
        Prompts(5, deep=True),
        LoRA(rr=32, alpha=16),
    )
    with pytest.raises(UserError, match="even number"):
        override(METHODS["prefix"], prompts=7)


def test_what_is_asked_for_comes_before_what_suits_the_width():
    demo = ASTConfig(dim=128, depth=4, heads=2)
    method = method_for(METHODS["full_ft"], demo, train.parse(["--lr", "1e-3"]))
    assert (method.lr, method.head_lr) == (1e-3, 1e-2)
    method = method_for(METHODS["full_ft"], demo, train.parse(["--head-lr", "1e-3"]))
    assert (method.lr, method.head_lr) == (5e-4, 1e-3)
    args = train.parse(["--method", "dpt", "--prompts", "9"])
    assert method_for(METHODS["dpt"], demo, args).parts == (Prompts(9, deep=True),)
