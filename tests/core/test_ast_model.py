"""The AST against transformers: stored outputs of a small model, and live ones, small and at full
size; its shapes.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import REFERENCE, SMALL_AST, tiny_ast
from make_reference import outputs_and_gradients, random_hf_ast

from ast_model import AST, ASTConfig
from load_weights import load_ast, to_our_names


def our_outputs_and_gradients(model, fbank, labels):
    tokens = model.features(fbank)
    logits = model.head(model.pool(tokens))
    F.cross_entropy(logits, labels).backward()
    return {"tokens": tokens, "logits": logits, **{n: p.grad for n, p in model.named_parameters()}}


def compare(ours: dict, reference: dict, tolerance: float) -> None:
    """Outputs absolutely; each gradient relative to its largest entry."""
    for name in ("tokens", "logits"):
        assert (ours.pop(name) - reference.pop(name)).abs().max() <= tolerance, name
    gradients = to_our_names(
        {name.removeprefix("gradient "): value for name, value in reference.items()}
    )
    assert gradients.keys() == ours.keys()
    # The key bias shifts all logits of a softmax alike: its true gradient is zero, what is there is
    # rounding.
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        scale = largest if name.endswith("k.bias") else gradient.abs().max()
        assert (ours[name] - gradient).abs().max() <= 10 * tolerance * scale, name


def test_small_ast_equals_stored_reference():
    stored = np.load(REFERENCE / "ast_small.npz")
    reference = {name: torch.from_numpy(stored[name]) for name in stored if name != "transformers"}
    fbank, labels = reference.pop("fbank"), reference.pop("labels")
    reference.pop("extracted_noise")
    model = load_ast(SMALL_AST, pool="cls_dist")
    ours = our_outputs_and_gradients(model, fbank, labels)
    assert torch.equal(model(fbank), ours["logits"])
    compare(ours, reference, tolerance=1e-5)


def test_small_ast_equals_live_transformers(tmp_path):
    """From both kinds of file that the library and its users write."""
    theirs = random_hf_ast(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, max_length=130, num_labels=7
    )
    theirs.save_pretrained(tmp_path)
    fbank, labels = torch.randn(3, 130, 128), torch.tensor([0, 6, 3])
    model = load_ast(tmp_path, pool="cls_dist")
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")  # the library's internal names
    from_bin = load_ast(tmp_path / "pytorch_model.bin", pool="cls_dist")
    for one, other in zip(model.parameters(), from_bin.parameters(), strict=True):
        assert torch.equal(one, other)
    ours = our_outputs_and_gradients(model, fbank, labels)
    compare(ours, outputs_and_gradients(theirs, fbank, labels), tolerance=1e-5)


def test_full_size_ast_equals_live_transformers(tmp_path):
    """12 layers, 768 wide, 1024 frames."""
    theirs = random_hf_ast(num_labels=527)
    fbank, labels = torch.randn(1, 1024, 128), torch.tensor([17])
    reference = outputs_and_gradients(theirs, fbank, labels)

    theirs.save_pretrained(tmp_path)
    ours = our_outputs_and_gradients(load_ast(tmp_path, pool="cls_dist"), fbank, labels)
    compare(ours, reference, tolerance=1e-4)


@pytest.mark.parametrize(
    ("n_frames", "grid"), [(100, (12, 9)), (400, (12, 39)), (500, (12, 49)), (1024, (12, 101))]
)
def test_patch_grid(n_frames, grid):
    assert ASTConfig(n_frames=n_frames).grid == grid


def test_patches_are_frequency_major():
    """Patch f * T + t covers bands 10 f ... and frames 10 t ...: a mark in one corner reaches that
    token only.
    """
    model = tiny_ast()
    silence, mark = torch.zeros(1, 36, 36), torch.zeros(1, 36, 36)
    mark[0, 35, 0] = 1  # last frame, lowest band: f = 0, t = 2
    changed = (model.embed(mark) - model.embed(silence)).abs().sum(-1)[0] > 0
    assert changed.nonzero().tolist() == [[2 + 0 * 3 + 2]]


@pytest.mark.parametrize("pool", ["mean", "cls", "cls_dist"])
def test_pooling(pool):
    model = tiny_ast(pool=pool)
    fbank = torch.randn(2, 36, 36)
    tokens = model.features(fbank)
    pooled = {"mean": tokens.mean(1), "cls": tokens[:, 0], "cls_dist": tokens[:, :2].mean(1)}[pool]
    torch.testing.assert_close(model(fbank), model.head(pooled))


def test_what_the_blocks_make_of_the_embedding():
    """The last state is `encode`, and the head reads `vector`."""
    model, fbank = tiny_ast(depth=3).eval(), torch.randn(2, 36, 36)
    states = [model.embed(fbank)]
    for block in model.blocks:
        states.append(block(states[-1]))
    assert torch.equal(model.encode(states[0]), states[-1])
    assert torch.equal(model.vector(fbank), model.norm(states[-1]).mean(1))
    assert torch.equal(model.head(model.vector(fbank)), model(fbank))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"reads \(batch, 36, 36\), not \(1, 40, 36\)"):
        tiny_ast()(torch.randn(1, 40, 36))
    for wrong, message in (
        ({"pool": "max"}, "pool is 'max'; choose one of mean, cls, cls_dist"),
        ({"dim": 32, "heads": 5}, "dim 32 is not a multiple of heads 5"),
        ({"n_frames": 10, "n_mels": 36}, "10 frames x 36 bands do not hold one patch of 16 x 16"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_ast(**wrong)


def test_the_base_model():
    """The AST of the checkpoint: 1024 frames, 128 bands, 16 x 16 patches at stride 10, 12 blocks,
    527 classes.
    """
    config = ASTConfig()
    assert (config.n_frames, config.n_mels, config.patch, config.stride) == (1024, 128, 16, 10)
    assert (config.dim, config.depth, config.heads, config.eps) == (768, 12, 12, 1e-12)
    assert (config.n_classes, config.pool, config.hidden, config.n_tokens) == (
        527,
        "mean",
        None,
        1214,
    )
    with torch.device("meta"):
        model = AST(config)
    assert [block.ffn.fc1.out_features for block in model.blocks] == [3072] * 12
    assert {
        module.eps
        for module in tiny_ast(eps=1e-5, pool="cls_dist").modules()
        if hasattr(module, "eps")
    } == {1e-5}


@pytest.mark.parametrize(
    "wrong", [{"n_mels": 15}, {"n_frames": 15}, {"heads": 0}, {"heads": -4}, {"heads": 3}]
)
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
    """The average of [CLS] and [distillation], not their sum: the LayerNorm behind it would hide
    the difference.
    """
    model, read = tiny_ast(pool="cls_dist"), []
    model.head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    fbank = torch.randn(2, 36, 36)
    model(fbank)
    tokens = model.features(fbank)
    torch.testing.assert_close(read[0], 0.5 * tokens[:, 0] + 0.5 * tokens[:, 1])
