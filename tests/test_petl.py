"""Every method: its parameter count, its formula by hand, its start, what it trains, and merging."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL_AST, tiny_ast

import petl
from ast_model import AST, ASTConfig
from load_weights import from_dict, to_dict
from petl import METHODS, Adapter, LoRA, Method, Prefix, Prompts, apply, count, merge
from support.command import UserError
from support.variants import override

COUNTS = {  # trained parameters of the base AST without the final LayerNorm and the head, at 500 frames
    "full_ft": 85_708_032, "linear": 0, "bitfit": 102_144, "spt": 230_400, "dpt": 230_400, "prefix": 221_184,
    "pfeiffer_par": 248_976, "pfeiffer_seq": 248_976, "houlsby_par": 497_952, "houlsby_seq": 497_952,
    "houlsby_mixed": 497_952, "convpass_pfeiffer_par": 254_304, "convpass_pfeiffer_seq": 254_304,
    "convpass_houlsby_par": 508_608, "convpass_houlsby_seq": 508_608, "convpass2d_pfeiffer_par": 264_672,
    "convpass2d_houlsby_par": 529_344, "lora": 221_184, "lora_q": 221_184, "lora_qk": 221_184, "lora_qkvo": 221_184,
    "lora_x2": 442_368, "pfeiffer_par_x2": 470_304, "pfeiffer_seq_x2": 470_304, "hydra": 470_304,
    "adapter_lora": 470_160, "adapter_dpt": 479_376, "adapter_dpt_lora": 488_592, "adapter_ffn_seq_before": 248_976,
    "adapter_ffn_par_before": 248_976, "adapter_mhsa_seq_after": 248_976, "adapter_mhsa_seq_before": 248_976,
    "adapter_ffn_seq_no_residual": 248_976, "adapter_ffn_par_residual": 248_976,
    "conformer_pfeiffer_par": 270_720, "conformer_houlsby_par": 541_440, "soft_moa": 922_104, "dense_moa": 922_188,
    "dora": 239_616, "ia3": 55_296, "vera": 24_576, "rslora": 221_184, "ssf": 204_288, "adaptformer": 1_189_632,
    "adapter_plus": 165_984,
}  # fmt: skip
# These replace part of the pretrained function from the first step on, or cut a path: Tables III and VII show the harm.
NOT_IDENTITY = {"adapter_ffn_seq_before", "adapter_mhsa_seq_before", "adapter_ffn_seq_no_residual",
                "adapter_ffn_par_residual", "spt", "dpt", "prefix", "adapter_dpt", "adapter_dpt_lora"}  # fmt: skip


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


# ------------------------------------------------------------------------------------------------------------ counts


def test_every_method_has_a_count():
    assert COUNTS.keys() == METHODS.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count_at_full_size(name):
    counted = count(apply(base_ast(), name))
    assert counted["petl"] == COUNTS[name]
    assert counted["head"] == (38_450 if name in ("full_ft", "bitfit") else 39_986)


def test_counts_that_depend_on_the_dataset():
    assert count(apply(base_ast(n_frames=100, n_classes=35), "full_ft"))["petl"] == 85_339_392
    heads = [count(apply(base_ast(n_classes=n), "linear"))["head"] for n in (50, 10, 35, 31)]
    assert heads == [39_986, 9_226, 28_451, 25_375]


def test_counts_agree_with_the_paper():
    """The paper prints thousands, most of them rounded, 508,608 and 488,592 cut off."""
    for method in METHODS.values():
        if method.paper.endswith("K") and method.name != "linear":
            assert abs(COUNTS[method.name] / 1000 - int(method.paper[:-1])) < 1, method.name


# ----------------------------------------------------------------------------------------- formulas, written by hand


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


def quick_gelu(x):
    return x / (1 + torch.exp(-1.702 * x))


def test_convpass_1d_by_hand():
    adapter = randomised(petl.Convpass(dim=8, rank=3, conv="1d", grid=(2, 2)))
    x = torch.randn(1, 6, 8)
    h = quick_gelu(adapter.down(x))[0]
    padded = torch.cat([torch.zeros(1, 3), h, torch.zeros(1, 3)])
    kernel, bias = adapter.conv.weight, adapter.conv.bias
    convolved = torch.stack([sum(kernel[:, :, i] @ padded[token + i] for i in range(3)) + bias for token in range(6)])
    torch.testing.assert_close(adapter(x)[0], adapter.up(quick_gelu(convolved)))


def test_convpass_2d_by_hand():
    bands, steps = 3, 2
    adapter = randomised(petl.Convpass(dim=8, rank=3, conv="2d", grid=(bands, steps)))
    x = torch.randn(1, 2 + bands * steps, 8)
    h = quick_gelu(adapter.down(x))[0]
    rows = [adapter.conv.weight[:, :, 1, 1] @ h[token] + adapter.conv.bias for token in range(2)]  # 1x1 images
    for f in range(bands):
        for t in range(steps):
            total = adapter.conv.bias
            for df in (-1, 0, 1):
                for dt in (-1, 0, 1):
                    if 0 <= f + df < bands and 0 <= t + dt < steps:
                        token = 2 + (f + df) * steps + t + dt
                        total = total + adapter.conv.weight[:, :, 1 + df, 1 + dt] @ h[token]
            rows.append(total)
    torch.testing.assert_close(adapter(x)[0], adapter.up(quick_gelu(torch.stack(rows))))


def test_convpass_drops_only_in_training():
    adapter = randomised(petl.Convpass(dim=8, rank=30, conv="1d", grid=(2, 2)))
    x = torch.randn(1, 6, 8)
    torch.testing.assert_close(adapter(x), adapter(x))
    adapter.train()
    assert not torch.equal(adapter(x), adapter(x))


def test_lora_by_hand():
    model = randomised(apply(tiny_ast(), Method("test", (LoRA("qo", rr=16, alpha=8),), "-", "-")))
    x = torch.randn(2, 11, 32)
    for name in "qo":
        lora = getattr(model.blocks[1].attn, name)
        ba = lora.b.weight @ lora.a.weight
        expected = x @ lora.wrapped.weight.T + lora.wrapped.bias + 8 / 16 * x @ ba.T  # eq. (5)
        torch.testing.assert_close(lora(x), expected)
        assert lora.a.weight.shape == (2, 32)
    assert isinstance(model.blocks[1].attn.k, torch.nn.Linear)


def test_prefix_by_hand():
    model = randomised(apply(tiny_ast(), Method("test", (Prefix(6),), "-", "-")))
    attn = model.blocks[0].attn
    u = torch.randn(1, 11, 32)
    q = attn.q(u)[0]
    k = torch.cat([attn.k.prefix, attn.k.wrapped(u)[0]])
    v = torch.cat([attn.v.prefix, attn.v.wrapped(u)[0]])
    assert k.shape == (3 + 11, 32)
    heads = []
    for h in range(4):
        columns = slice(8 * h, 8 * h + 8)
        heads.append((q[:, columns] @ k[:, columns].T / 8**0.5).softmax(-1) @ v[:, columns])  # eq. (2)
    torch.testing.assert_close(attn(u)[0], attn.o(torch.cat(heads, dim=1)))  # eq. (3)


@pytest.mark.parametrize("deep", [False, True])
def test_prompts_by_hand(deep):
    plain = tiny_ast(depth=3)
    model = randomised(apply(copy.deepcopy(plain), Method("test", (Prompts(4, deep=deep),), "-", "-")))
    fbank = torch.randn(2, 36, 36)
    x = plain.embed(fbank)
    x = torch.cat([x[:, :1], model.embed.prompts.expand(2, -1, -1), x[:, 2:]], dim=1)  # in place of [distillation]
    x = plain.blocks[0](x)
    for i in (1, 2):
        if deep:
            x = torch.cat([x[:, :1], model.blocks[i].prompts.expand(2, -1, -1), x[:, 5:]], dim=1)
        x = plain.blocks[i](x)
    torch.testing.assert_close(model.features(fbank), model.norm(x))
    assert x.shape[1] == 1 + 4 + 9


def test_hydra_by_hand():
    plain = tiny_ast()
    model = randomised(apply(copy.deepcopy(plain), Method("test", (petl.Hydra(rr=8),), "-", "-")))
    hydra = model.blocks[0].ffn
    u = torch.randn(2, 11, 32)
    s = plain.blocks[0].ffn(u)
    p = (u @ hydra.down_p.weight.T + hydra.down_p.bias) @ hydra.up_p.weight.T
    q = (s @ hydra.down_q.weight.T + hydra.down_q.bias) @ hydra.up_q.weight.T
    torch.testing.assert_close(hydra(u), s + p + q + hydra.up_p.bias)


def test_parts_find_their_place_under_any_wrapping():
    """LoRA beneath an adapter and a prefix, everything under deep prompts, in either order."""
    parts = (Prompts(3, deep=True), Adapter("attn", "par_before", rr=8), Prefix(4), LoRA("qkv", rr=8))
    fbank = torch.randn(2, 36, 36)
    for order in (parts, parts[::-1]):
        model = apply(tiny_ast(), Method("test", order, "-", "-"))
        attn = petl.inner(petl.inner(model.blocks[1]).attn)
        assert isinstance(attn.k, petl.PrefixLinear) and isinstance(attn.k.wrapped, petl.LoRALinear)
        assert isinstance(attn.q, petl.LoRALinear)
        assert model(fbank).shape == (2, 3)


# -------------------------------------------------------------------------------------- start, training, what moves


@pytest.mark.parametrize("name", METHODS)
def test_start_is_the_pretrained_function(name):
    plain = tiny_ast().eval()
    model = apply(copy.deepcopy(plain), name).eval()
    fbank = torch.randn(2, 36, 36)
    if name in NOT_IDENTITY:
        assert (model(fbank) - plain(fbank)).abs().max() > 1e-4
    else:
        torch.testing.assert_close(model(fbank), plain(fbank))


@pytest.mark.parametrize("name", METHODS)
def test_three_steps_move_what_should_move_and_nothing_else(name):
    torch.manual_seed(0)
    model = apply(tiny_ast(), name).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0)
    for _ in range(3):
        F.cross_entropy(model(torch.randn(4, 36, 36)), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trained
    assert {"head.weight", "head.bias", "norm.bias"} <= trained


def trained_names(name: str) -> set[str]:
    return {n for n, p in apply(tiny_ast(depth=1), name).named_parameters() if p.requires_grad}


def test_what_methods_without_modules_train():
    head = {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert trained_names("linear") == head
    assert trained_names("full_ft") == {n for n, _ in tiny_ast(depth=1).named_parameters()}
    linears = ["attn.q", "attn.k", "attn.v", "attn.o", "ffn.fc1", "ffn.fc2", "norm1", "norm2"]
    assert trained_names("bitfit") == head - {"norm.weight"} | {f"blocks.0.{name}.bias" for name in linears}


def test_adapters_train_the_layer_norm_that_feeds_them():
    assert {n for n in trained_names("pfeiffer_par") if "norm1" in n or "norm2" in n} == {
        "blocks.0.norm1.weight", "blocks.0.norm1.bias",
    }  # fmt: skip
    assert {n for n in trained_names("hydra") if "norm1" in n or "norm2" in n} == {
        "blocks.0.norm2.weight", "blocks.0.norm2.bias",
    }  # fmt: skip
    assert not {n for n in trained_names("lora") if "norm1" in n or "norm2" in n}


# ----------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("name", ["lora", "lora_qkvo", "hydra", "bitfit", "linear", "full_ft", "adapter_lora"])
def test_merged_model_is_plain_and_has_the_same_logits(name):
    model = randomised(apply(tiny_ast(), name))
    fbank = torch.randn(2, 36, 36)
    before = model(fbank)
    merged = merge(model)
    assert not any(hasattr(module, "wrapped") for module in merged.modules())
    plain = AST(merged.config)  # an AST that never saw a method takes the merged weights
    plain.load_state_dict(merged.state_dict())
    assert (plain(fbank) - before).abs().max() <= 1e-5 * before.abs().max().clamp_min(1)
    torch.testing.assert_close(model(fbank), before)  # the original stays adapted
    assert count(apply(merged, "linear"))["petl"] == 0


@pytest.mark.parametrize("name", ["houlsby_par", "convpass_pfeiffer_par", "dpt", "spt", "prefix", "pfeiffer_par"])
def test_what_no_weight_can_express_is_not_merged(name):
    with pytest.raises(UserError, match="cannot be merged"):
        merge(apply(tiny_ast(), name))


# ----------------------------------------------------------------------------------------- the table and its errors


def test_applying_twice_and_unknown_names_are_errors():
    with pytest.raises(ValueError, match="already carries the method 'lora'"):
        apply(apply(tiny_ast(), "lora"), "bitfit")
    with pytest.raises(UserError, match="did you mean 'pfeiffer_par'"):
        apply(tiny_ast(), "pfeifer_par")


def test_override():
    lora = override(METHODS["adapter_dpt_lora"], rr=32, alpha=16, prompts=5)
    assert lora.parts == (Adapter("ffn", "par_before", rr=32), Prompts(5, deep=True), LoRA(rr=32, alpha=16))
    with pytest.raises(UserError, match="'houlsby_par' has no setting 'prompts'"):
        override(METHODS["houlsby_par"], prompts=3)
    with pytest.raises(UserError, match="even number"):
        override(METHODS["prefix"], prompts=7)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_survives_json(name):
    restored = from_dict(to_dict(METHODS[name]))
    assert (restored.name, restored.parts, restored.lr) == (name, METHODS[name].parts, METHODS[name].lr)


def test_a_part_that_is_not_known():
    with pytest.raises(UserError, match="'mine' has the part 'Gate', which no row"):
        from_dict({"name": "mine", "lr": 1e-3, "parts": [{"part": "Gate", "width": 3}]})


def test_a_bottleneck_is_at_least_one_wide():
    assert [petl.rank_of(768, 64), petl.rank_of(192, 128), petl.rank_of(192, 1000)] == [12, 2, 1]


# ----------------------------------------------------------------------------------------------- prompts and pooling


@pytest.mark.parametrize("name", ["spt", "dpt", "adapter_dpt"])
def test_pooling_with_prompts(name):
    """`cls_dist` takes [CLS] and the first prompt, which stands where [distillation] was; `mean` takes every token."""
    for pool, n_pooled in (("mean", None), ("cls", 1), ("cls_dist", 2)):
        model = randomised(apply(tiny_ast(pool=pool), name))
        prompts = model.embed.prompts
        tokens = model.features(torch.randn(2, 36, 36))
        assert tokens.shape[1] == 1 + len(prompts) + 9  # [CLS], prompts, patches: no distillation token
        fbank = torch.randn(2, 36, 36)
        expected = model.head(model.features(fbank)[:, :n_pooled].mean(1))
        torch.testing.assert_close(model(fbank), expected)
        assert torch.equal(model.embed(fbank)[:, 1], prompts[:1].expand(2, -1))
        model(fbank).sum().backward()
        assert prompts.grad.abs().amax(1).min() > 0  # each of them is heard by the head or by what it reads


# ---------------------------------------------------------------------------------------------------- against peft


def test_lora_equals_peft(tmp_path):
    """The same A and B in peft's LoRA on the transformers AST: the same logits and the same gradients."""
    import transformers
    from peft import LoraConfig, get_peft_model

    from load_weights import load_ast

    theirs = get_peft_model(
        transformers.AutoModelForAudioClassification.from_pretrained(SMALL_AST),
        LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj", "v_proj"]),
    )
    ours = load_ast(SMALL_AST, pool="cls_dist")
    ours = apply(ours, Method("test", (LoRA("qv", rr=16, alpha=8),), "-", "-"))  # both: r = 4, s = 0.5
    layers = theirs.base_model.model.audio_spectrogram_transformer.layers
    pairs = []
    for block, layer in zip(ours.blocks, layers, strict=True):
        for lora, reference in ((block.attn.q, layer.attention.q_proj), (block.attn.v, layer.attention.v_proj)):
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
