"""Checkpoints of every format, their configs and positions, and files of trained parts: held to
statements by hand.
"""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SMALL_AST, SMALL_CONFIG, SMALL_STATE, write_ast
from safetensors import safe_open
from safetensors.torch import load_file

import petl
from ast_model import AST, ASTConfig
from data import FRONT_END
from load_weights import (
    fingerprint,
    from_dict,
    load_ast,
    load_trained,
    random_checkpoint,
    resize_positions,
    save_ast,
    save_trained,
    to_dict,
    trained_tensors,
)
from petl import METHODS, apply
from support.checkpoints import read_header, write_tensors
from support.command import UserError

PREFIX = "audio_spectrogram_transformer."


def make_state(
    dim=64, depth=1, hidden=8, grid=(12, 3), patch=16, head=5
) -> dict[str, torch.Tensor]:
    """Random tensors of an AST under the names that Hugging Face writes; head=0 leaves the head
    out.
    """
    torch.manual_seed(7)
    shapes = {
        "embeddings.cls_token": (1, 1, dim),
        "embeddings.distillation_token": (1, 1, dim),
        "embeddings.position_embeddings": (1, 2 + grid[0] * grid[1], dim),
        "embeddings.patch_embeddings.projection.weight": (dim, 1, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (dim,),
        "layernorm.weight": (dim,),
        "layernorm.bias": (dim,),
    }
    for n in range(depth):
        layers = {
            "attention.attention.query": (dim, dim),
            "attention.attention.key": (dim, dim),
            "attention.attention.value": (dim, dim),
            "attention.output.dense": (dim, dim),
            "intermediate.dense": (hidden, dim),
            "output.dense": (dim, hidden),
            "layernorm_before": (dim,),
            "layernorm_after": (dim,),
        }
        for name, shape in layers.items():
            shapes[f"encoder.layer.{n}.{name}.weight"], shapes[f"encoder.layer.{n}.{name}.bias"] = (
                shape,
                shape[:1],
            )
    shapes = {PREFIX + name: shape for name, shape in shapes.items()}
    if head:
        shapes |= {"classifier.layernorm.weight": (dim,), "classifier.layernorm.bias": (dim,)}
        shapes |= {"classifier.dense.weight": (head, dim), "classifier.dense.bias": (head,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def small(folder: Path, state: dict = SMALL_STATE, **config) -> AST:
    """The small checkpoint with other tensors or another config.json, as `load_ast` reads it with
    its own head.
    """
    return load_ast(write_ast(folder, state, {**SMALL_CONFIG, **config}), pool="cls_dist")


# ------------------------------------------------------------------------------- what a config says


def test_a_config_is_honoured(tmp_path):
    """Everything at once that no tensor shows, each with a value that is nobody's default."""
    config = {
        "layer_norm_eps": 0.25,
        "num_attention_heads": 4,
        "time_stride": 7,
        "frequency_stride": 7,
        "max_length": 50,
    }
    # (128 - 16) // 7 + 1, (50 - 16) // 7 + 1
    folder = write_ast(tmp_path, make_state(depth=2, grid=(17, 5)), config)
    for options in ({"pool": "cls_dist"}, {"pool": "cls_dist", "n_classes": 3}, {"n_classes": 3}):
        model = load_ast(folder, **options)
        assert (
            model.config.n_frames,
            model.config.n_mels,
            model.config.stride,
            model.config.grid,
        ) == (
            50,
            128,
            7,
            (17, 5),
        )
        norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
        assert [norm.eps for norm in norms] == [0.25] * (6 if "pool" in options else 5)
        assert [block.attn.heads for block in model.blocks] == [4, 4]
        assert model.embed.patches.stride == (7, 7)
        assert model(torch.randn(1, 50, 128)).shape == (1, options.get("n_classes", 5))


def test_eps_reaches_the_numbers(tmp_path):
    """The final LayerNorm written out, with an eps that no rounding hides."""
    model = small(tmp_path, layer_norm_eps=0.5)
    with torch.no_grad():
        x = model.encode(model.embed(torch.randn(1, 100, 128)))
        centred = x - x.mean(-1, keepdim=True)
        expected = centred / (centred.square().mean(-1, keepdim=True) + 0.5).sqrt()
        expected = (
            expected * SMALL_STATE[f"{PREFIX}layernorm.weight"]
            + SMALL_STATE[f"{PREFIX}layernorm.bias"]
        )
        torch.testing.assert_close(model.norm(x), expected)


@pytest.mark.parametrize(
    "config", [None, {"model_type": "wav2vec2", "num_attention_heads": 8, "layer_norm_eps": 1.0}]
)
def test_without_a_config_of_its_own(tmp_path, config):
    """Heads of 64 dimensions, stride 10, eps 1e-12; everything else is read off the tensors, eleven
    layers too.
    """
    model = load_ast(
        write_ast(tmp_path, make_state(128, 11, 24, (12, 9), head=6), config), pool="cls_dist"
    )
    expected = ASTConfig(
        n_frames=96,
        n_mels=128,
        patch=16,
        stride=10,
        dim=128,
        depth=11,
        heads=2,
        eps=1e-12,
        n_classes=6,
        pool="cls_dist",
        hidden=24,
    )
    assert model.config == expected


def test_heads_of_64_dimensions_without_a_config(tmp_path):
    torch.save(original(SMALL_STATE), tmp_path / "original.pth")
    config = load_ast(tmp_path / "original.pth", pool="cls_dist").config
    assert (config.heads, config.hidden, config.depth, config.grid) == (1, 128, 2, (12, 9))


def test_the_patch_size_is_read_off_the_tensors(tmp_path):
    model = load_ast(
        write_ast(tmp_path, make_state(patch=8, grid=(13, 4))), pool="cls_dist"
    )  # (128 - 8) // 10 + 1 = 13
    assert (model.config.patch, model.config.n_frames) == (8, 38)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_stride": 5}, "equal strides"),
        ({"frequency_stride": 16}, "equal strides"),
        ({"hidden_act": "gelu_new"}, "exact GELU"),
        ({"hidden_act": "quick_gelu"}, "exact GELU"),
        ({"qkv_bias": False}, "biases"),
        (
            {"time_stride": 5, "frequency_stride": 5},
            "do not make an AST: .* does not have 110 positions",
        ),
        ({"num_mel_bins": 64}, "it reads 64 Mel bands, the features here have 128: give another"),
        ({"max_length": 300}, "do not make an AST: .* does not have 110 positions"),
        ({"num_attention_heads": "x"}, "num_attention_heads: Expected int"),
        ({"time_stride": 0, "frequency_stride": 0}, "_stride: Expected int >= 1"),
        ({"num_attention_heads": 3}, "do not make an AST: dim 64 is not a multiple of heads 3"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message) as error:
        small(tmp_path, **change)
    assert str(tmp_path) in str(error.value)


# --------------------------------------------------------------- features with another mean and std


def write_extractor(folder: Path, **extractor) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(extractor))
    return folder


@pytest.mark.parametrize(
    ("extractor", "mean", "std"),
    [
        ({"mean": -10.0, "std": 2.0}, -10, 2),
        ({"mean": 3}, 3, 4.5689974),
        ({"do_normalize": False, "mean": -10.0}, 0, 0.5),  # (fb - 0) / (2 * 0.5) is fb
    ],
)
@pytest.mark.parametrize("options", [{"pool": "cls_dist"}, {"n_classes": 3, "n_frames": 60}])
def test_a_checkpoint_hears_through_its_own_mean_and_std(tmp_path, extractor, mean, std, options):
    """The same log-Mel values, normalised by its numbers for it and by ours for load_ast."""
    folder = write_extractor(write_ast(tmp_path, SMALL_STATE, SMALL_CONFIG), **extractor)
    model = load_ast(folder, **options)
    reference = load_ast(SMALL_AST, **options)
    reference.head.load_state_dict(model.head.state_dict())
    fb = 3 * torch.randn(2, options.get("n_frames", 100), 128) - 5
    with torch.no_grad():
        expected = reference((fb - mean) / (2 * std))
        found = model((fb + 4.2677393) / (2 * 4.5689974))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    assert model.backbone.sha256 != reference.backbone.sha256  # what is trained on it needs it


def test_the_numbers_of_audioset_change_nothing(tmp_path):
    folder = write_extractor(
        write_ast(tmp_path, SMALL_STATE, SMALL_CONFIG),
        feature_extractor_type="ASTFeatureExtractor",
        sampling_rate=16_000,
        num_mel_bins=128,
        max_length=100,
        mean=-4.2677393,
        std=4.5689974,
        do_normalize=True,
    )
    assert load_ast(folder).backbone.sha256 == load_ast(SMALL_AST).backbone.sha256


def test_a_file_of_ours_reads_our_features_whatever_lies_beside_it(tmp_path):
    """For example a merged model in the folder of its backbone."""
    folder = write_extractor(write_ast(tmp_path, SMALL_STATE, SMALL_CONFIG), mean=-10, std=2)
    model = load_ast(folder)
    save_ast(model, folder / "merged.safetensors", {})
    again = load_ast(folder / "merged.safetensors").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize(
    ("extractor", "message"),
    [
        ({"sampling_rate": 8000}, "sampling_rate: Expected 16000, got 8000"),
        ({"num_mel_bins": 64}, "num_mel_bins: Expected 128, got 64"),
        ({"max_length": 512}, "max_length: Expected 100, got 512"),
        (
            {"feature_extractor_type": "Wav2Vec2FeatureExtractor"},
            "feature_extractor_type: Expected ASTFeatureExtractor, got Wav2Vec2FeatureExtractor",
        ),
        ({"std": 0}, "std: Expected float >= 1e-09"),
        ({"mean": None}, "mean: Expected float, got null"),
    ],
)
def test_features_that_cannot_be_made_here_are_refused(tmp_path, extractor, message):
    folder = write_extractor(write_ast(tmp_path, SMALL_STATE, SMALL_CONFIG), **extractor)
    for options in ({}, {"n_classes": 3}):
        with pytest.raises(UserError, match=rf"preprocessor_config\.json: {message}$"):
            load_ast(folder, **options)


# -------------------------------------------------------------------------------------- the tensors


CURRENT_NAMES = {  # of transformers 5, as its modules are called
    "encoder.layer": "layers",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
OUR_NAMES = {
    "embeddings.patch_embeddings.projection": "embed.patches",
    "embeddings.cls_token": "embed.cls",
    "embeddings.distillation_token": "embed.dist",
    "embeddings.position_embeddings": "embed.position",
    "encoder.layer": "blocks",
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.o",
    "intermediate.dense": "ffn.fc1",
    "output.dense": "ffn.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "classifier.layernorm": "head.0",
    "classifier.dense": "head.1",
    "layernorm": "norm",
    PREFIX: "",
}
ORIGINAL_NAMES = {  # github.com/YuanGongND/ast, where q, k and v are one
    "embeddings.patch_embeddings.projection": "v.patch_embed.proj",
    "embeddings.cls_token": "v.cls_token",
    "embeddings.distillation_token": "v.dist_token",
    "embeddings.position_embeddings": "v.pos_embed",
    "encoder.layer": "v.blocks",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "classifier.layernorm": "mlp_head.0",
    "classifier.dense": "mlp_head.1",
    "layernorm": "v.norm",
    PREFIX: "",
}


def rename(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name


OURS = {rename(name, OUR_NAMES): name for name in SMALL_STATE}  # our name to that of the file


def original(state: dict) -> dict:
    """The tensors as the original AST saves them: q, k and v on top of one another, and heads that
    nothing uses.
    """
    out = {
        "v.head.weight": torch.ones(2, 64),
        "v.head.bias": torch.ones(2),
        "v.head_dist.bias": torch.ones(2),
    }
    out["v.head_dist.weight"] = torch.ones(2, 64)
    for name, tensor in state.items():
        if ".query." in name:
            parts = [
                tensor,
                state[name.replace("query", "key")],
                state[name.replace("query", "value")],
            ]
            out[rename(name, ORIGINAL_NAMES).replace("attention.attention.query", "attn.qkv")] = (
                torch.cat(parts)
            )
        elif ".attention.attention." not in name:
            out[rename(name, ORIGINAL_NAMES)] = tensor
    return out


@pytest.mark.parametrize(
    "naming", ["legacy", "without a prefix", "current", "original", "original, parallel"]
)
def test_every_tensor_finds_its_place(tmp_path, naming):
    state = {
        "legacy": SMALL_STATE,
        "without a prefix": {
            name.removeprefix(PREFIX): tensor for name, tensor in SMALL_STATE.items()
        },
        "current": {rename(name, CURRENT_NAMES): tensor for name, tensor in SMALL_STATE.items()},
        "original": original(SMALL_STATE),
        "original, parallel": {
            f"module.{name}": tensor for name, tensor in original(SMALL_STATE).items()
        },
    }[naming]
    file = tmp_path / "ast.pth"
    torch.save(state, file)
    (tmp_path / "config.json").write_text(json.dumps(SMALL_CONFIG))
    model, reference = load_ast(file, pool="cls_dist"), load_ast(SMALL_AST, pool="cls_dist")
    assert model.backbone.sha256 == reference.backbone.sha256  # of the values, not of the file
    assert model.config == reference.config
    found = model.state_dict()
    assert found.keys() == OURS.keys() and len(found) == 43
    for name, theirs in OURS.items():
        assert torch.equal(found[name], SMALL_STATE[theirs]), name


def test_no_tensor_may_be_missing_and_none_unknown(tmp_path):
    """Each is named; of many, five and their number."""
    for ours, theirs in OURS.items():
        if ours == "head.1.bias":
            continue  # without it the rest of the head is no head of an AST
        less = {name: tensor for name, tensor in SMALL_STATE.items() if name != theirs}
        with pytest.raises(UserError, match=ours.replace(".", r"\.")):
            small(tmp_path, less)
    blocks = [
        name
        for name in SMALL_STATE
        if "layer.1.layernorm" in name or "layer.1.attention.attention.q" in name
    ]
    less = {
        name: tensor
        for name, tensor in SMALL_STATE.items()
        if name not in blocks and "layer.0.out" not in name
    }
    with pytest.raises(
        UserError,
        match=r"no AST checkpoint: missing (blocks\S+, ){4}blocks\S+ and 3 more; unknown n",
    ):
        small(tmp_path, less)
    with pytest.raises(UserError, match=r"missing nothing; unknown blocks\.0\.attn\.qk\.weight"):
        small(tmp_path, {**SMALL_STATE, "blocks.0.attn.qk.weight": torch.ones(1)})
    # an ImageNet head, but not of an original AST
    with pytest.raises(UserError, match=r"unknown v\.head\.weight"):
        small(tmp_path, {**SMALL_STATE, "v.head.weight": torch.ones(1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.update(
                {"audio_spectrogram_transformer.layernorm.weight": torch.ones(7)}
            ),
            "do not fit together",
        ),
        (
            lambda state: (state.clear(), state.update({"conv.weight": torch.ones(2, 2)})),
            "no AST checkpoint",
        ),
    ],
)
def test_other_architectures(tmp_path, change, message):
    state = dict(SMALL_STATE)
    change(state)
    with pytest.raises(UserError, match=message):
        load_ast(write_ast(tmp_path, state, SMALL_CONFIG), n_classes=3)


@pytest.mark.parametrize(
    ("method", "pool"), [("pfeiffer_par", "mean"), ("lora", "cls_dist"), ("probe", "mean")]
)
def test_trained_parts_are_no_backbone(tmp_path, method, pool):
    model = apply(load_ast(SMALL_AST, n_classes=4, pool=pool), method)
    save_trained(model, tmp_path / "adapter.safetensors", {})
    with pytest.raises(UserError, match="holds trained parts, whose backbone is wanted"):
        load_ast(tmp_path / "adapter.safetensors", n_classes=4)


def test_a_backbone_without_a_head(tmp_path):
    folder = write_ast(tmp_path, make_state(head=0))
    assert load_ast(folder, n_classes=4).head.weight.shape == (4, 64)
    for pool in ("mean", "cls_dist"):
        with pytest.raises(UserError, match="has no head: give n_classes"):
            load_ast(folder, pool=pool)
    with pytest.raises(UserError, match="its own head needs pool 'cls_dist'"):
        load_ast(SMALL_AST, pool="mean")


def test_a_head_that_stays_brings_its_pool(tmp_path):
    assert (
        load_ast(SMALL_AST).config.pool == "cls_dist"
        and load_ast(SMALL_AST, n_classes=4).config.pool == "mean"
    )
    save_ast(load_ast(SMALL_AST, n_classes=4, pool="cls"), tmp_path / "whole.safetensors", {})
    assert load_ast(tmp_path / "whole.safetensors").config.pool == "cls"


@pytest.mark.parametrize("pool", ["mean", "cls", "cls_dist"])
def test_a_new_head_is_new_also_where_it_is_as_wide(pool):
    """Five classes as in the file: everything but the head is that of the file, and the head
    nowhere.
    """
    state = load_ast(SMALL_AST, n_classes=5, pool=pool).state_dict()
    assert {name for name in state if name.startswith("head.")} == (
        {"head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"}
        if pool == "cls_dist"
        else {"head.weight", "head.bias"}
    )
    for name, tensor in state.items():
        if name.startswith("head."):
            assert (
                name.startswith("head.0")
                or not torch.isin(tensor, SMALL_STATE["classifier.dense.weight"]).any()
            )
        else:
            assert torch.equal(tensor, SMALL_STATE[OURS[name]]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_any_precision_are_computed_in_float32(tmp_path, dtype):
    model = small(tmp_path, {name: tensor.to(dtype) for name, tensor in SMALL_STATE.items()})
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(
            tensor, SMALL_STATE[OURS[name]].to(dtype).float()
        ), name


# ----------------------------------------------------------------------------------- random weights


@pytest.mark.parametrize(
    ("size", "dim", "depth", "hidden"),
    [("base", 768, 12, 3072), ("small", 384, 12, 1536), ("tiny", 192, 12, 768)],
)
def test_sizes_of_random_weights(size, dim, depth, hidden):
    with torch.device("meta"):  # shapes without numbers
        state, config = random_checkpoint(f"random:{size}")
    assert config == ASTConfig(1024, 128, 16, 10, dim, depth, dim // 64, 1e-12, 527, "cls_dist")
    assert state["embed.position"].shape == (1, 1214, dim) and state["head.1.weight"].shape == (
        527,
        dim,
    )
    assert state[f"blocks.{depth - 1}.ffn.fc1.weight"].shape == (hidden, dim)


def test_random_weights_are_those_of_seed_zero():
    """An adapter trained on them finds its backbone again, whatever was drawn before."""
    torch.manual_seed(0)
    expected = AST(ASTConfig(dim=128, depth=4, heads=2, pool="cls_dist")).state_dict()
    found = load_ast("random:demo", pool="cls_dist").state_dict()
    assert (
        all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        and found.keys() == expected.keys()
    )


def test_random_weights_are_the_same_every_time():
    torch.manual_seed(1)
    one = load_ast("random:tiny", n_frames=100, n_classes=3)
    torch.manual_seed(2)
    drawn = torch.rand(1)
    torch.manual_seed(2)
    other = load_ast("random:tiny", n_frames=100, n_classes=527, pool="cls_dist")
    assert one.backbone == other.backbone and torch.equal(
        one.blocks[3].attn.q.weight, other.blocks[3].attn.q.weight
    )
    torch.manual_seed(2)
    load_ast("random:tiny", pool="cls_dist")
    # loading draws nothing from the caller's random numbers
    assert torch.equal(torch.rand(1), drawn)


# -------------------------------------------------------------------------- where weights come from


def test_folders_paths_and_names(tmp_path, monkeypatch):
    """A folder gives its safetensors, else its .bin; a backbone is known by its whole path, or by
    its name.
    """
    folder = write_ast(tmp_path / "ast", SMALL_STATE, SMALL_CONFIG)
    other = {**SMALL_STATE, "classifier.dense.bias": torch.ones(5)}
    torch.save(other, folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").touch()
    assert not load_ast(folder, pool="cls_dist").head[1].bias.eq(1).any()
    (folder / "model.safetensors").unlink()
    assert load_ast(folder, pool="cls_dist").head[1].bias.eq(1).all()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for words in ("ast", "~/ast", "./ast/../ast"):
        assert load_ast(words, pool="cls_dist").backbone.name == str(folder.resolve())
    assert load_ast("random:demo", 36, 2).backbone.name == "random:demo"
    assert load_ast("demo", 98, 2).backbone.name == "demo"
    with pytest.raises(
        UserError, match="no weights at absent: give a file, a folder, hf:owner/name, audioset"
    ):
        load_ast("absent")


def test_random_weights_of_an_unknown_size():
    with pytest.raises(UserError, match="the random sizes are base, small, tiny"):
        load_ast("random:huge")


# ------------------------------------------------------------------------------ position embeddings


@pytest.mark.parametrize(
    ("old", "new", "start"), [(10, 4, 3), (10, 3, 4), (9, 4, 2), (9, 3, 3), (9, 9, 0), (9, 1, 4)]
)
@pytest.mark.parametrize("axis", ["time", "frequency"])
def test_positions_are_cut_in_the_middle(old, new, start, axis):
    """Odd and even numbers: what stays begins at old // 2 - new // 2, in both directions."""
    torch.manual_seed(0)
    before, after = ((old, 5), (new, 5)) if axis == "frequency" else ((5, old), (5, new))
    position = torch.randn(1, 2 + 5 * old, 3)
    resized = resize_positions(position, before, after)
    grid = position[0, 2:].reshape(*before, 3)
    kept = grid[start : start + new] if axis == "frequency" else grid[:, start : start + new]
    assert torch.equal(resized[0], torch.cat([position[0, :2], kept.reshape(-1, 3)]))


def stretched(values: np.ndarray, size: int) -> np.ndarray:
    """The first axis at `size` points, linear between neighbours: point i lies at (i + 1/2) n /
    size - 1/2.
    """
    rows = []
    for i in range(size):
        where = min(max((i + 0.5) * len(values) / size - 0.5, 0), len(values) - 1)
        low = math.floor(where)
        high = min(low + 1, len(values) - 1)
        rows.append(values[low] * (low + 1 - where) + values[high] * (where - low))
    return np.array(rows)


@pytest.mark.parametrize("after", [(4, 9), (4, 6), (7, 5), (7, 9), (3, 11), (9, 2)])
def test_positions_are_interpolated(after):
    """Random numbers, so that neither nearest nor cubic neighbours would do; one direction may be
    cut meanwhile.
    """
    position = torch.randn(1, 2 + 4 * 5, 3, generator=torch.Generator().manual_seed(0))
    grid = position[0, 2:].reshape(4, 5, 3).double().numpy()
    bands, steps = after
    grid = (
        stretched(grid.transpose(1, 0, 2), steps).transpose(1, 0, 2)
        if steps > 5
        else grid[:, 2 - steps // 2 :][:, :steps]
    )
    grid = stretched(grid, bands) if bands > 4 else grid[2 - bands // 2 :][:bands]
    resized = resize_positions(position, (4, 5), after)
    assert torch.equal(resized[:, :2], position[:, :2])
    np.testing.assert_allclose(resized[0, 2:].numpy(), grid.reshape(-1, 3), atol=1e-6)


@pytest.mark.parametrize(
    ("n_frames", "start", "steps"), [(96, 0, 9), (76, 1, 7), (86, 0, 8), (66, 1, 6), (16, 4, 1)]
)
def test_a_checkpoint_for_shorter_sounds(n_frames, start, steps):
    """Nine columns at 100 frames: of frequency nothing is lost, of time the middle stays, and [CLS]
    and the other.
    """
    old = SMALL_STATE[f"{PREFIX}embeddings.position_embeddings"][0]
    new = load_ast(SMALL_AST, n_frames, 2).embed.position[0]
    grid = old[2:].reshape(12, 9, 64)[:, start : start + steps]
    assert torch.equal(new, torch.cat([old[:2], grid.reshape(-1, 64)]))


@pytest.mark.parametrize("n_frames", [100, 400, 500, 1024, 2048])
def test_a_full_checkpoint_at_another_length(n_frames):
    full = load_ast("random:tiny", pool="cls_dist")
    model = load_ast("random:tiny", n_frames=n_frames, n_classes=2)
    f, t = model.config.grid
    assert model.embed.position.shape == (1, 2 + f * t, 192)
    old = full.embed.position[0, 2:].reshape(12, 101, 192)
    new = model.embed.position[0, 2:].reshape(f, t, 192)
    assert torch.equal(model.embed.position[:, :2], full.embed.position[:, :2])
    if t <= 101:
        assert torch.equal(new, old[:, 50 - t // 2 : 50 - t // 2 + t])  # the middle, not zeros
    assert new.abs().amax(-1).min() > 0
    assert model(torch.randn(1, n_frames, 128)).shape == (1, 2)


# ---------------------------------------------------------------------------------- the fingerprint


def pattern() -> dict[str, torch.Tensor]:
    """A checkpoint whose every number follows from its place: eighths, which float32 holds
    exactly.
    """
    state = make_state(depth=1, hidden=8, grid=(12, 1))
    return {
        name: (torch.arange(tensor.numel()) % 97 - 48.0 + i).reshape(tensor.shape) / 8
        for i, (name, tensor) in enumerate(state.items())
    }


def test_the_fingerprint_is_what_files_already_carry(tmp_path):
    """Two values as they were when the first files of trained parts were written, and the rule that
    makes them.
    """
    assert (
        load_ast(SMALL_AST, n_classes=2).backbone.sha256
        == "afdbe74769c46f9cafa50e9c2ccaed1d14ca1df42b25d1c1a9bdb5c91017a261"
    )
    state = pattern()
    found = load_ast(write_ast(tmp_path, state), pool="cls_dist").backbone.sha256
    digest = hashlib.sha256(b"1 heads, stride 10")
    ours = {rename(name, OUR_NAMES): tensor for name, tensor in state.items()}
    for name in sorted(name for name in ours if not name.startswith("head.")):
        digest.update(name.encode() + ours[name].numpy().astype("<f4").tobytes())
    assert found == digest.hexdigest()
    assert found == "534dddfbbe130a4d89173ec917efe65b0183d1e07b2299000d7b62053a23da6f"


def test_the_fingerprint_changes_with_every_tensor_but_the_heads(tmp_path):
    before = small(tmp_path).backbone.sha256
    for name, tensor in SMALL_STATE.items():
        changed = tensor.clone()
        last = changed.view(-1)[-1:]
        last.copy_(torch.nextafter(last, last + 1))
        now = small(tmp_path, {**SMALL_STATE, name: changed}).backbone.sha256
        assert (now == before) is name.startswith("classifier."), name


def test_the_fingerprint_changes_with_names_heads_and_stride(tmp_path):
    before = small(tmp_path).backbone.sha256
    one, other = (
        f"{PREFIX}encoder.layer.0.layernorm_{where}.weight" for where in ("before", "after")
    )
    swapped = {**SMALL_STATE, one: SMALL_STATE[other], other: SMALL_STATE[one] + 1}
    changes = [
        small(tmp_path, swapped),
        small(tmp_path, num_attention_heads=4),
        small(tmp_path, num_attention_heads=1),
        small(tmp_path, layer_norm_eps=1e-12),
    ]
    found = [model.backbone.sha256 for model in changes]
    assert len({*found[:3], before}) == 4 and found[3] == before
    state = {"a": torch.ones(2), "b": torch.ones(3)}
    config = ASTConfig()
    renamed = {"a": torch.ones(2), "c": torch.ones(3)}
    values = [
        fingerprint(state, config),
        fingerprint(renamed, config),
        fingerprint(state, ASTConfig(stride=16)),
        fingerprint(state, ASTConfig(heads=6)),
    ]
    assert len(set(values)) == 4
    # what a method trains anew
    assert fingerprint({**state, "head.weight": torch.ones(3)}, config) == values[0]
    assert fingerprint(dict(reversed(state.items())), config) == values[0]


def test_the_fingerprint_does_not_change_with_the_length(tmp_path):
    values = {load_ast(SMALL_AST, n_frames, 2).backbone.sha256 for n_frames in (36, 100, 200)}
    assert len(values) == 1


# --------------------------------------------------------------------------- files of trained parts


def adapted(weights=SMALL_AST, method="lora", n_frames=60, pool="cls_dist") -> AST:
    torch.manual_seed(0)
    return petl.apply(load_ast(weights, n_frames, 3, pool), method)


RESULT = {
    "fold": 1,
    "accuracy": 12.5,
    "validation_accuracy": None,
    "epoch": 1,
    "seconds": 2.0,
    "peak_memory_mb": 9,
}


def test_a_file_of_trained_parts_says_all_about_itself(tmp_path):
    """The header, entry by entry, and the tensors, name by name."""
    file = tmp_path / "new folder" / "fold1.safetensors"
    model = adapted()
    save_trained(model, file, {"classes": ["ä", "b", "c"], "result": RESULT})
    with safe_open(file, "pt") as opened:
        assert list(opened.metadata()) == ["ast_petl"]
        header = json.loads(opened.metadata()["ast_petl"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    read = read_header(file)
    assert len(header.pop("digest")) == 64
    read.pop("digest", None)
    assert (
        header
        == read
        == {
            "classes": ["ä", "b", "c"],
            "result": RESULT,
            "method": {
                "name": "lora",
                "lr": 0.005,
                "parts": [{"part": "LoRA", "targets": "qv", "rr": 128, "alpha": 8}],
            },
            "n_frames": 60,
            "n_classes": 3,
            "pool": "cls_dist",
            "front_end": FRONT_END,
            "backbone": {
                "name": str(SMALL_AST),
                "sha256": "afdbe74769c46f9cafa50e9c2ccaed1d14ca1df42b25d1c1a9bdb5c91017a261",
            },
        }
    )
    names = {
        f"blocks.{n}.attn.{letter}.{side}.weight"
        for n in (0, 1)
        for letter in "qv"
        for side in "ab"
    }
    names |= {
        "norm.weight",
        "norm.bias",
        "head.0.weight",
        "head.0.bias",
        "head.1.weight",
        "head.1.bias",
    }
    assert tensors.keys() == names
    for name, tensor in tensors.items():
        assert torch.equal(tensor, model.state_dict()[name]) and tensor.dtype == torch.float32
    assert sorted(path.name for path in file.parent.iterdir()) == ["fold1.safetensors"]


@pytest.mark.parametrize("name", METHODS)
def test_trained_parts_round_trip(name, tmp_path):
    model = apply(load_ast(SMALL_AST, n_frames=60, n_classes=4), name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    save_trained(model, tmp_path / "adapter.safetensors", {"classes": ["ä", "b", "c", "d"]})
    restored = load_trained(tmp_path / "adapter.safetensors")
    assert not restored.training  # or the dropout of Convpass would go on
    fbank = torch.randn(2, 60, 128)
    assert torch.equal(model.eval()(fbank), restored(fbank))
    header = read_header(tmp_path / "adapter.safetensors")
    assert header["classes"] == ["ä", "b", "c", "d"] and header["method"]["name"] == name
    if name != "full_ft":
        assert not any(
            "fc1.weight" in tensor for tensor in load_file(tmp_path / "adapter.safetensors")
        )


@pytest.mark.parametrize("name", METHODS)
def test_a_method_survives_json(name):
    restored = from_dict(to_dict(METHODS[name]))
    assert (restored.name, restored.parts, restored.lr) == (
        name,
        METHODS[name].parts,
        METHODS[name].lr,
    )


def test_a_part_that_is_not_known():
    with pytest.raises(UserError, match="'mine' has the part 'Gate', which no row"):
        from_dict({"name": "mine", "lr": 1e-3, "parts": [{"part": "Gate", "width": 3}]})


def test_another_backbone_is_refused_and_the_same_one_elsewhere_is_not(tmp_path):
    """Of the same shape, one number apart; both are named, with the beginning of their
    fingerprints.
    """
    model = adapted()
    save_trained(model, tmp_path / "fold1.safetensors", {})
    copy = write_ast(
        tmp_path / "copy", {**SMALL_STATE, "classifier.dense.bias": torch.zeros(5)}, SMALL_CONFIG
    )
    restored = load_trained(tmp_path / "fold1.safetensors", str(copy))
    x = torch.randn(2, 60, 128)
    assert torch.equal(restored(x), model.eval()(x))
    name = f"{PREFIX}encoder.layer.1.output.dense.bias"
    other = write_ast(
        tmp_path / "other", {**SMALL_STATE, name: SMALL_STATE[name] + 1}, SMALL_CONFIG
    )
    sha256 = load_ast(other, n_classes=2).backbone.sha256
    with pytest.raises(UserError) as error:
        load_trained(tmp_path / "fold1.safetensors", str(other))
    assert (
        str(error.value)
        == f"{tmp_path}/fold1.safetensors was trained on the backbone {SMALL_AST} (SHA-256"
        f" afdbe74769c4), not on {other} ({sha256[:12]}): give the right one as weights"
    )
    with pytest.raises(
        UserError,
        match=r"fold1\.safetensors needs its backbone: no weights at .*--weights says where",
    ):
        load_trained(tmp_path / "fold1.safetensors", str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda tensors: tensors.update(extra=torch.ones(1)), "extra"),
        (lambda tensors: tensors.pop("norm.bias"), "norm.bias"),
        # which would broadcast
        (lambda tensors: tensors.update({"head.1.bias": torch.ones(1)}), "head.1.bias"),
        (
            lambda tensors: tensors.update({"blocks.0.attn.q.a.weight": torch.ones(2, 64)}),
            "blocks.0.attn.q.a.weight",
        ),
    ],
)
def test_trained_parts_must_be_exactly_those_of_the_method(tmp_path, change, wrong):
    save_trained(adapted(), tmp_path / "fold1.safetensors", {})
    tensors = load_file(tmp_path / "fold1.safetensors")
    change(tensors)
    header = read_header(tmp_path / "fold1.safetensors")
    write_tensors(tmp_path / "changed.safetensors", tensors, header)
    with pytest.raises(
        UserError, match=f"changed.safetensors does not fit the method 'lora': {wrong}$"
    ):
        load_trained(tmp_path / "changed.safetensors")


def test_trained_parts_keep_length_classes_and_pool(tmp_path):
    for pool, n_frames in (("mean", 36), ("cls", 60), ("cls_dist", 100)):
        save_trained(adapted(n_frames=n_frames, pool=pool), tmp_path / "f.safetensors", {})
        config = load_trained(tmp_path / "f.safetensors").config
        assert (config.pool, config.n_frames, config.n_classes, config.heads) == (
            pool,
            n_frames,
            3,
            2,
        )


def test_remembered_tensors_are_copies():
    model = apply(load_ast(SMALL_AST, n_classes=4), "lora")
    remembered = trained_tensors(model)
    with torch.no_grad():
        model.head.weight.add_(1)
    assert not torch.equal(remembered["head.weight"], model.head.weight)


# -------------------------------------------------------------------------------- a whole model out


def test_a_whole_model_says_all_about_itself(tmp_path):
    """The header, transformers' word for the format, and its names with a head of ours."""
    model = load_ast(
        write_ast(tmp_path / "ast", SMALL_STATE, {**SMALL_CONFIG, "layer_norm_eps": 0.125}),
        60,
        3,
        "cls",
    )
    save_ast(model, tmp_path / "ast.safetensors", {"classes": ["a", "b", "c"], "pool": "cls"})
    with safe_open(tmp_path / "ast.safetensors", "pt") as opened:
        metadata, names = opened.metadata(), set(opened.keys())
    header = json.loads(metadata["ast_petl"])
    assert len(header.pop("digest")) == 64 and metadata["format"] == "pt"
    assert header == {
        "classes": ["a", "b", "c"],
        "pool": "cls",
        "config": {
            "n_frames": 60,
            "n_mels": 128,
            "patch": 16,
            "stride": 10,
            "dim": 64,
            "depth": 2,
            "heads": 2,
            "eps": 0.125,
            "n_classes": 3,
            "pool": "cls",
            "hidden": 128,
        },
    }
    backbone = {name for name in SMALL_STATE if name.startswith(PREFIX)}
    assert names == backbone | {"head.weight", "head.bias"} and len(backbone) == 39
    again = load_trained(tmp_path / "ast.safetensors")
    assert (
        again.config == model.config and again.blocks[0].norm1.eps == 0.125 and not again.training
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def same_weights(one: AST, other: AST) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("pool", ["mean", "cls_dist"])
def test_save_ast_and_load_ast_are_inverse(tmp_path, pool):
    model = load_ast(SMALL_AST, n_frames=60, n_classes=3, pool=pool)
    file = tmp_path / "whole.safetensors"
    save_ast(model, file, {"classes": ["a", "b", "c"]})
    again = load_ast(file, pool=pool)
    assert same_weights(again, model) and read_header(file)["classes"] == ["a", "b", "c"]
    if pool == "cls_dist":
        assert load_file(file).keys() == SMALL_STATE.keys()  # nothing is left under our names
    save_ast(model, file, {}, torch.float16)
    assert all(tensor.dtype == torch.float16 for tensor in load_file(file).values())
    again = load_ast(file, pool=pool).state_dict()
    assert all(
        torch.allclose(again[name], tensor, atol=1e-3)
        for name, tensor in model.state_dict().items()
    )


def test_a_run_of_another_backbone_says_so(tmp_path):
    model = adapted()
    model.backbone = replace(model.backbone, sha256="0" * 64)
    save_trained(model, tmp_path / "fold1.safetensors", {})
    with pytest.raises(
        UserError, match=r"was trained on the backbone .* \(SHA-256 000000000000\), not on"
    ):
        load_trained(tmp_path / "fold1.safetensors")
