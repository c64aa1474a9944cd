"""What methods train, how they are counted, merged and refused, their formulas in a block, and LoRA
against peft.
"""

import copy
import re
from ast import literal_eval
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL_AST, tiny_ast

import petl
from ast_model import AST, ASTConfig
from load_weights import load_ast
from petl import METHODS, Adapter, LoRA, Method, Prefix, Prompts, apply, count
from support.command import UserError
from tools.merge import merge

README = Path(__file__).parents[2] / "README.md"


def randomised(model: AST) -> AST:
    """Every trained tensor random: what starts at zero would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model.eval()


def base_ast(n_frames=500, n_classes=50) -> AST:
    with torch.device("meta"):
        return AST(ASTConfig(n_frames=n_frames, n_classes=n_classes))


# ------------------------------------------------------------------------------------------- counts


def test_counts_that_depend_on_the_dataset():
    assert count(apply(base_ast(n_frames=100, n_classes=35), "full_ft"))["petl"] == 85_339_392
    heads = [count(apply(base_ast(n_classes=n), "linear"))["head"] for n in (50, 10, 35, 31)]
    assert heads == [39_986, 9_226, 28_451, 25_375]


def test_the_counts_that_the_readme_shows():
    """Its three lines of Python, on shapes without numbers."""
    shown = re.search(r"print\(petl\.count\(model\)\) +# (.*)", README.read_text(encoding="utf-8"))[
        1
    ]
    with torch.device("meta"):
        model = petl.apply(AST(ASTConfig(n_frames=500, n_classes=50)), "lora")
    assert (
        petl.count(model)
        == literal_eval(shown)
        == {
            "petl": 221_184,
            "head": 39_986,
            "total": 85_967_666,
        }
    )


def test_the_rank_is_rounded_and_at_least_one():
    """3.84 to 4 and 3.2 to 3; 1.5 and 2.5 to the even neighbour, 2, as Python rounds."""
    ranks = {(192, 50): 4, (192, 60): 3, (192, 128): 2, (160, 64): 2, (192, 400): 1}
    assert {arguments: petl.rank_of(*arguments) for arguments in ranks} == ranks


# ------------------------------------------------------------------------------ formulas of a block


def bottleneck(adapter, x):
    down, up = adapter.down, adapter.up
    return F.gelu(x @ down.weight.T + down.bias) @ up.weight.T + up.bias


FORMULAS = {
    "par_before": lambda S, A, u: S(u) + A(u),
    "seq_after": lambda S, A, u: S(u) + A(S(u)),
    "seq_before": lambda S, A, u: S(A(u)) + A(u),
    "par_before_residual": lambda S, A, u: S(u) + A(u) + u,
    "seq_after_no_residual": lambda S, A, u: A(S(u)),
}


@pytest.mark.parametrize("at", ["attn", "ffn"])
@pytest.mark.parametrize("how", FORMULAS)
def test_adapter_in_a_block(at, how):
    plain = tiny_ast()
    model = apply(copy.deepcopy(plain), Method("test", (Adapter(at, how, rr=8),), "-", "-"))
    block, original = randomised(model).blocks[0], plain.blocks[0]
    x = torch.randn(2, 11, 32)

    def adapted(sublayer, name, u):
        if name != at:
            return sublayer(u)
        return FORMULAS[how](sublayer, lambda v: bottleneck(getattr(block, at).adapter, v), u)

    h = x + adapted(original.attn, "attn", block.norm1(x))
    expected = h + adapted(original.ffn, "ffn", block.norm2(h))
    torch.testing.assert_close(block(x), expected)
    assert getattr(block, at).adapter.down.weight.shape == (4, 32)  # r = dim / RR = 32 / 8


@pytest.mark.parametrize("deep", [False, True])
def test_prompts_by_hand(deep):
    plain = tiny_ast(depth=3)
    model = randomised(
        apply(copy.deepcopy(plain), Method("test", (Prompts(4, deep=deep),), "-", "-"))
    )
    fbank = torch.randn(2, 36, 36)
    x = plain.embed(fbank)
    # in place of [distillation]
    x = torch.cat([x[:, :1], model.embed.prompts.expand(2, -1, -1), x[:, 2:]], dim=1)
    x = plain.blocks[0](x)
    for i in (1, 2):
        if deep:
            x = torch.cat([x[:, :1], model.blocks[i].prompts.expand(2, -1, -1), x[:, 5:]], dim=1)
        x = plain.blocks[i](x)
    torch.testing.assert_close(model.features(fbank), model.norm(x))
    assert x.shape[1] == 1 + 4 + 9


@pytest.mark.parametrize("name", ["spt", "dpt", "adapter_dpt"])
def test_pooling_with_prompts(name):
    """`cls_dist` takes [CLS] and the first prompt, which stands where [distillation] was; `mean`
    takes every token.
    """
    for pool, n_pooled in (("mean", None), ("cls", 1), ("cls_dist", 2)):
        model = randomised(apply(tiny_ast(pool=pool), name))
        prompts = model.embed.prompts
        tokens = model.features(torch.randn(2, 36, 36))
        # [CLS], prompts, patches: no distillation token
        assert tokens.shape[1] == 1 + len(prompts) + 9
        fbank = torch.randn(2, 36, 36)
        expected = model.head(model.features(fbank)[:, :n_pooled].mean(1))
        torch.testing.assert_close(model(fbank), expected)
        assert torch.equal(model.embed(fbank)[:, 1], prompts[:1].expand(2, -1))
        model(fbank).sum().backward()
        # each of them is heard by the head or by what it reads
        assert prompts.grad.abs().amax(1).min() > 0


# ---------------------------------------------------------------------------------- names and steps


def test_an_unknown_method_leaves_the_model_as_it_was():
    model = tiny_ast()
    for name, nearest in (
        ("houlsby-par", "houlsby_par"),
        ("Lora", "lora"),
        ("full", "full_ft"),
        ("?", ""),
    ):
        with pytest.raises(
            UserError, match=f"unknown method '{re.escape(name)}': did you mean '{nearest}"
        ):
            apply(model, name)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert apply(model, "linear").method is METHODS["linear"]


def test_applying_twice_is_an_error():
    with pytest.raises(ValueError, match="already has the method 'lora'"):
        apply(apply(tiny_ast(), "lora"), "bitfit")


def test_what_parts_are_unless_told():
    """`lr` is 5e-3, adapters are bottlenecks of RR 64, LoRA is that of Table I, prefixes are 24."""
    own = Method("own", (Adapter("ffn", "seq_after"), LoRA(), Prefix()), "-", "-")
    assert own.lr == 5e-3
    assert own.parts == (Adapter("ffn", "seq_after", 64), LoRA("qv", 128, 8), Prefix(24))


@pytest.mark.parametrize("name", METHODS)
def test_three_steps_move_what_should_move_and_nothing_else(name):
    torch.manual_seed(0)
    model = apply(tiny_ast(), name).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0
    )
    for _ in range(3):
        F.cross_entropy(model(torch.randn(4, 36, 36)), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trained
    head = (
        {"head.wrapped.weight", "head.wrapped.bias"}
        if name in ("probe", "logmel")
        else {"head.weight", "head.bias", "norm.bias"}
    )
    assert head <= trained


# ------------------------------------------------------------------------------------------ merging


MERGEABLE = {
    "full_ft",
    "linear",
    "bitfit",
    "lora",
    "lora_q",
    "lora_qk",
    "lora_qkvo",
    "lora_x2",
    "hydra",
    "adapter_ffn_par_before",
    "adapter_lora",
    "dora",
    "ia3",
    "vera",
    "rslora",
    "ssf",
}


@pytest.mark.parametrize("name", METHODS)
def test_merging_keeps_the_logits_or_is_refused(name):
    """All tensors random, float64; the model itself stays as it is."""
    torch.manual_seed(0)
    model = apply(tiny_ast(depth=3, hidden=40), name).double().eval()
    for parameter in model.parameters():
        if name != "dora" or parameter.requires_grad:  # which has measured its frozen weights
            parameter.data.normal_(std=0.2)
    model.backbone = "of the weights before merging"
    fbank = torch.randn(2, 36, 36, dtype=torch.float64)
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    logits = model(fbank)
    if name in MERGEABLE:
        merged = merge(model)
        assert (merged(fbank) - logits).abs().max() <= 1e-12 * logits.abs().max().clamp_min(1)
        assert merged.state_dict().keys() == AST(merged.config).state_dict().keys()
        assert merged.config.hidden == 40 + {
            "hydra": 2,
            "adapter_ffn_par_before": 1,
            "adapter_lora": 1,
        }.get(name, 0)
        assert all(parameter.requires_grad for parameter in merged.parameters()) and not hasattr(
            merged, "method"
        )
        assert not hasattr(merged, "backbone") and model.backbone
        for parameter in merged.parameters():
            parameter.data.zero_()  # shares no memory with the model
        assert count(apply(merged, "linear"))["petl"] == 0
    else:
        with pytest.raises(UserError, match=f"{name!r} cannot be merged: a plain AST has no"):
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


# ------------------------------------------------------------------------------------- against peft


def test_lora_equals_peft(tmp_path):
    """The same A and B in peft's LoRA on the transformers AST: the same logits and the same
    gradients.
    """

    import transformers
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(
        transformers.AutoModelForAudioClassification.from_pretrained(SMALL_AST),
        LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj", "v_proj"]),
    )
    ours = load_ast(SMALL_AST, pool="cls_dist")
    # both: r = 4, s = 0.5
    ours = apply(ours, Method("test", (LoRA("qv", rr=16, alpha=8),), "-", "-"))
    layers = theirs.base_model.model.audio_spectrogram_transformer.layers
    pairs = []
    for block, layer in zip(ours.blocks, layers, strict=True):
        for lora, reference in (
            (block.attn.q, layer.attention.q_proj),
            (block.attn.v, layer.attention.v_proj),
        ):
            a, b = reference.lora_A["default"].weight, reference.lora_B["default"].weight
            torch.nn.init.normal_(b, std=0.1)
            lora.a.weight.data.copy_(a.detach())
            lora.b.weight.data.copy_(b.detach())
            pairs += [(lora.a.weight, a), (lora.b.weight, b)]
    fbank, labels = torch.randn(2, 100, 128), torch.tensor([0, 3])
    our_logits, their_logits = ours(fbank), theirs(input_values=fbank).logits
    assert (our_logits - their_logits).abs().max() <= 1e-5
    F.cross_entropy(our_logits, labels).backward()
    F.cross_entropy(their_logits, labels).backward()
    for one, other in pairs:
        assert (one.grad - other.grad).abs().max() <= 1e-4 * other.grad.abs().max()
