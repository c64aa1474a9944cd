"""Checkpoints of every format, position embeddings, the file of trained parts, and files that are none of these."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from helpers import SMALL_AST
from safetensors.torch import load_file, save_file

import load_weights
from ast_model import AST
from load_weights import load_ast, load_trained, read_header, resize_positions, save_ast, save_trained
from petl import METHODS, apply
from support.command import UserError
from tools import export

ROOT = Path(load_weights.__file__).parent
HF_STATE = load_file(SMALL_AST / "model.safetensors")  # the library's legacy names: encoder.layer.N...


def same_weights(one: AST, other: AST) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def original_names(state: dict) -> dict:
    """The small checkpoint as the original AST repository would have saved it: fused qkv, ImageNet heads, `module.`"""
    prefix = "audio_spectrogram_transformer."
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    out = {
        "v.cls_token": state["embeddings.cls_token"],
        "v.dist_token": state["embeddings.distillation_token"],
        "v.pos_embed": state["embeddings.position_embeddings"],
        "v.head.weight": torch.randn(1000, 64), "v.head.bias": torch.randn(1000),
        "v.head_dist.weight": torch.randn(1000, 64), "v.head_dist.bias": torch.randn(1000),
    }  # fmt: skip
    for kind in ("weight", "bias"):
        out[f"v.patch_embed.proj.{kind}"] = state[f"embeddings.patch_embeddings.projection.{kind}"]
        out[f"v.norm.{kind}"] = state[f"layernorm.{kind}"]
        out[f"mlp_head.0.{kind}"] = state[f"classifier.layernorm.{kind}"]
        out[f"mlp_head.1.{kind}"] = state[f"classifier.dense.{kind}"]
        for n in range(2):
            layer, block = f"encoder.layer.{n}", f"v.blocks.{n}"
            qkv = [state[f"{layer}.attention.attention.{name}.{kind}"] for name in ("query", "key", "value")]
            out[f"{block}.attn.qkv.{kind}"] = torch.cat(qkv)
            out[f"{block}.attn.proj.{kind}"] = state[f"{layer}.attention.output.dense.{kind}"]
            out[f"{block}.mlp.fc1.{kind}"] = state[f"{layer}.intermediate.dense.{kind}"]
            out[f"{block}.mlp.fc2.{kind}"] = state[f"{layer}.output.dense.{kind}"]
            out[f"{block}.norm1.{kind}"] = state[f"{layer}.layernorm_before.{kind}"]
            out[f"{block}.norm2.{kind}"] = state[f"{layer}.layernorm_after.{kind}"]
    return {f"module.{name}": tensor for name, tensor in out.items()}


def small_config(folder) -> None:
    """The small AST has heads of 32 dimensions, which no tensor shows: its config.json does."""
    (folder / "config.json").write_bytes((SMALL_AST / "config.json").read_bytes())


def test_every_format_gives_the_same_model(tmp_path):
    small_config(tmp_path)
    without_prefix = {name.removeprefix("audio_spectrogram_transformer."): t for name, t in HF_STATE.items()}
    internal = {
        name.replace("encoder.layer", "layers").replace("attention.attention.query", "attention.q_proj")
        .replace("attention.attention.key", "attention.k_proj").replace("attention.attention.value", "attention.v_proj")
        .replace("attention.output.dense", "attention.o_proj").replace("intermediate.dense", "mlp.fc1")
        .replace("output.dense", "mlp.fc2"): tensor
        for name, tensor in HF_STATE.items()
    }  # fmt: skip
    assert "audio_spectrogram_transformer.layers.1.mlp.fc2.weight" in internal
    torch.save(HF_STATE, tmp_path / "legacy.bin")
    save_file(without_prefix, tmp_path / "without_prefix.safetensors")
    save_file(internal, tmp_path / "internal.safetensors")
    torch.save(original_names(HF_STATE), tmp_path / "original.pth")
    reference = load_ast(SMALL_AST, pool="cls_dist")
    for file in ("legacy.bin", "without_prefix.safetensors", "internal.safetensors", "original.pth"):
        model = load_ast(tmp_path / file, pool="cls_dist")
        assert same_weights(model, reference), file
        assert model.backbone.sha256 == reference.backbone.sha256  # of the values, not of the file
        assert model.config == reference.config


def test_heads_of_64_dimensions_without_a_config(tmp_path):
    torch.save(original_names(HF_STATE), tmp_path / "original.pth")
    config = load_ast(tmp_path / "original.pth", pool="cls_dist").config
    assert (config.heads, config.hidden, config.depth, config.grid) == (1, 128, 2, (12, 9))


def test_a_new_head_and_the_old_one():
    torch.manual_seed(0)
    new = load_ast(SMALL_AST, n_classes=9)
    assert new.head.weight.shape == (9, 64) and new.config.n_classes == 9
    old = load_ast(SMALL_AST, pool="cls_dist")
    assert torch.equal(old.head[1].weight, HF_STATE["classifier.dense.weight"])
    with pytest.raises(UserError, match="its own head needs pool 'cls_dist'"):
        load_ast(SMALL_AST)


def test_random_weights_are_the_same_every_time():
    torch.manual_seed(1)
    one = load_ast("random:tiny", n_frames=100, n_classes=3)
    torch.manual_seed(2)
    drawn = torch.rand(1)
    torch.manual_seed(2)
    other = load_ast("random:tiny", n_frames=100, n_classes=527, pool="cls_dist")
    assert one.backbone == other.backbone and torch.equal(one.blocks[3].attn.q.weight, other.blocks[3].attn.q.weight)
    torch.manual_seed(2)
    load_ast("random:tiny", pool="cls_dist")
    assert torch.equal(torch.rand(1), drawn)  # loading draws nothing from the caller's random numbers
    for size, (dim, depth, heads) in load_weights.RANDOM.items():
        with torch.device("meta"):
            config = load_weights.random_checkpoint(f"random:{size}")[1]
        assert (config.dim, config.depth, config.heads) == (dim, depth, heads) and dim == 64 * heads


# ----------------------------------------------------------------------------------------------- position embeddings


def positions(bands: int, steps: int) -> torch.Tensor:
    """Two extra tokens, then a grid whose entry at (f, t) is (f, t)."""
    grid = torch.stack(torch.meshgrid(torch.arange(bands), torch.arange(steps), indexing="ij"), dim=-1)
    return torch.cat([torch.tensor([[-1, -1], [-2, -2]]), grid.reshape(-1, 2)])[None].float()


@pytest.mark.parametrize(("n_frames", "steps"), [(100, 9), (400, 39), (500, 49), (1024, 101)])
def test_fewer_frames_keep_the_middle_columns(n_frames, steps):
    resized = resize_positions(positions(12, 101), (12, 101), (12, steps))
    assert resized[0, :2].tolist() == [[-1, -1], [-2, -2]]
    start = 101 // 2 - steps // 2
    grid = resized[0, 2:].reshape(12, steps, 2)
    assert torch.equal(grid[..., 0], torch.arange(12.0)[:, None].expand(12, steps))
    assert torch.equal(grid[..., 1], torch.arange(start, start + steps).float().expand(12, steps))


def test_more_frames_are_interpolated():
    """2048 frames make 204 columns: column j lies at (j + 0.5) * 101 / 204 - 0.5 of the old ones."""
    grid = resize_positions(positions(12, 101), (12, 101), (12, 204))[0, 2:].reshape(12, 204, 2)
    where = ((torch.arange(204) + 0.5) * 101 / 204 - 0.5).clamp(0, 100)
    torch.testing.assert_close(grid[..., 1], where.expand(12, 204))
    torch.testing.assert_close(grid[..., 0], torch.arange(12.0)[:, None].expand(12, 204))


def test_frequency_is_cut_and_interpolated_too():
    grid = resize_positions(positions(12, 5), (12, 5), (6, 5))[0, 2:].reshape(6, 5, 2)
    assert grid[:, 0, 0].tolist() == [3, 4, 5, 6, 7, 8]
    grid = resize_positions(positions(4, 5), (4, 5), (8, 5))[0, 2:].reshape(8, 5, 2)
    torch.testing.assert_close(grid[:, 0, 0], ((torch.arange(8) + 0.5) / 2 - 0.5).clamp(0, 3))


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


# ---------------------------------------------------------------------------------------------------- trained parts


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
        assert not any("fc1.weight" in tensor for tensor in load_file(tmp_path / "adapter.safetensors"))


def test_another_backbone_is_refused(tmp_path):
    save_trained(apply(load_ast(SMALL_AST, n_classes=4), "lora"), tmp_path / "adapter.safetensors", {})
    with pytest.raises(UserError, match=r"trained on the backbone .*ast_small .*not on random:tiny"):
        load_trained(tmp_path / "adapter.safetensors", weights="random:tiny")


def test_tensors_that_do_not_fit_the_method(tmp_path):
    model = apply(load_ast(SMALL_AST, n_classes=4), "lora")
    tensors = load_weights.trained_tensors(model)
    tensors.pop("blocks.1.attn.v.b.weight")
    with pytest.raises(UserError, match=r"does not fit the method 'lora': blocks.1.attn.v.b.weight"):
        load_weights.load_tensors(model, tensors, tmp_path)


def test_remembered_tensors_are_copies():
    model = apply(load_ast(SMALL_AST, n_classes=4), "lora")
    remembered = load_weights.trained_tensors(model)
    with torch.no_grad():
        model.head.weight.add_(1)
    assert not torch.equal(remembered["head.weight"], model.head.weight)


# ------------------------------------------------------------------------------------------------------- bad files


class Trap:
    """Unpickling this would make a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_trained_parts_are_no_backbone(tmp_path):
    save_trained(apply(load_ast(SMALL_AST, n_classes=4), "pfeiffer_par"), tmp_path / "adapter.safetensors", {})
    with pytest.raises(UserError, match="holds trained parts, whose backbone is wanted"):
        load_ast(tmp_path / "adapter.safetensors", n_classes=4)


def test_bytes_that_are_no_checkpoint_are_not_called_code(tmp_path):
    (tmp_path / "noise.pth").write_bytes(bytes(range(256)) * 10)
    with pytest.raises(UserError, match=r"cannot read .*noise\.pth") as error:
        load_ast(tmp_path / "noise.pth")
    assert "Python code" not in str(error.value)


def test_no_code_in_a_checkpoint_is_executed(tmp_path):
    torch.save({"weight": Trap(tmp_path / "executed")}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match="Python code, which is never executed"):
        load_ast(tmp_path / "trap.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pth"])
@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_truncated_checkpoints(tmp_path, suffix, keep):
    file = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(HF_STATE, file)
    else:
        torch.save(HF_STATE, file)
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(UserError, match=f"cannot read .*model{suffix}"):
        load_ast(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("audio_spectrogram_transformer.encoder.layer.1.output.dense.bias"),
         r"missing blocks\.1\.ffn\.fc2\.bias; unknown nothing"),
        (lambda state: state.update({"decoder.weight": torch.zeros(3)}), r"missing nothing; unknown decoder\.weight"),
        (lambda state: state.pop("audio_spectrogram_transformer.embeddings.position_embeddings"), "embed.position"),
        (lambda state: state.update({"audio_spectrogram_transformer.layernorm.weight": torch.ones(7)}), "one shape"),
        (lambda state: (state.clear(), state.update({"conv.weight": torch.ones(2, 2)})), "no AST checkpoint"),
    ],
)  # fmt: skip
def test_other_architectures(tmp_path, change, message):
    small_config(tmp_path)
    state = dict(HF_STATE)
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_ast(tmp_path, n_classes=3)


def test_other_configs(tmp_path):
    save_file(HF_STATE, tmp_path / "model.safetensors")
    config = json.loads((SMALL_AST / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(UserError, match="exact GELU"):
        load_ast(tmp_path, n_classes=3)
    for name, value in {"max_length": 500, "num_attention_heads": "x", "frequency_stride": 0}.items():
        changed = {**config, name: value, **({"time_stride": 0} if value == 0 else {})}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match="do not make an AST" if name == "max_length" else f"{name}: Expected int"):
            load_ast(tmp_path, n_classes=3)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json"):
        load_ast(tmp_path, n_classes=3)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        load_ast(tmp_path, n_classes=3)


def test_not_a_file_of_trained_parts(tmp_path):
    with pytest.raises(UserError, match="it has no such header"):
        read_header(SMALL_AST / "model.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(UserError, match="no whole file of trained parts"):
        load_trained(tmp_path / "cut.safetensors")


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(UserError, match="no weights at"):
        load_ast(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="the random sizes are base, small, tiny"):
        load_ast("random:huge")


def test_no_network_says_what_to_download(tmp_path):
    """In a process of its own, where nothing else has imported parts of huggingface_hub."""
    code = "from load_weights import load_ast; load_ast('audioset', n_classes=3)"
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=offline, capture_output=True, text=True)
    message = done.stderr.strip().splitlines()[-1]
    assert re.search(r"UserError: cannot fetch MIT/ast-finetuned.* by hand.* --weights", message), done.stderr


def test_hub_weights_come_through_the_users_cache(monkeypatch):
    """What the hub would deliver is put in its place; the folder layout and names are the hub's."""
    asked = []

    def deliver(repository, name):
        asked.append((repository, name))
        return str(SMALL_AST / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", deliver)
    model = load_ast("hf:somebody/some-ast", pool="cls_dist")
    assert asked == [("somebody/some-ast", "config.json"), ("somebody/some-ast", "model.safetensors")]
    assert same_weights(model, load_ast(SMALL_AST, pool="cls_dist"))


def test_fingerprint_changes_with_any_value():
    state, config = load_weights.read_checkpoint(str(SMALL_AST))
    before = load_weights.fingerprint(state, config)
    state["blocks.1.norm2.bias"][5] += np.spacing(np.float32(0.1))
    assert load_weights.fingerprint(state, config) != before


# -------------------------------------------------------------------------------------------------- a whole model out


@pytest.mark.parametrize("pool", ["mean", "cls_dist"])
def test_save_ast_and_load_ast_are_inverse(tmp_path, pool):
    model = load_ast(SMALL_AST, n_frames=60, n_classes=3, pool=pool)
    file = tmp_path / "whole.safetensors"
    save_ast(model, file, {"classes": ["a", "b", "c"]})
    again = load_ast(file, pool=pool)
    assert same_weights(again, model) and read_header(file)["classes"] == ["a", "b", "c"]
    if pool == "cls_dist":
        assert load_file(file).keys() == HF_STATE.keys()  # nothing is left under our names
    save_ast(model, file, {}, torch.float16)
    assert all(tensor.dtype == torch.float16 for tensor in load_file(file).values())
    again = load_ast(file, pool=pool).state_dict()
    assert all(torch.allclose(again[name], tensor, atol=1e-3) for name, tensor in model.state_dict().items())


def test_export_merged(tmp_path, capsys):
    model = apply(load_ast("random:tiny", n_frames=60, n_classes=3), "lora").eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".b.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    save_trained(model, tmp_path / "lora.safetensors", {"classes": ["a", "b", "c"]})
    options = ["export", "", "--to", "merged", "--out", str(tmp_path / "plain.safetensors")]
    options[1] = str(tmp_path / "lora.safetensors")
    assert export.main(options) == 0
    plain, x = load_ast(tmp_path / "plain.safetensors", n_frames=60).eval(), torch.randn(2, 60, 128)
    with torch.inference_mode():
        assert torch.allclose(plain(x), model(x), atol=1e-5)
    save_trained(apply(load_ast("random:tiny", 60, 3), "pfeiffer_par"), tmp_path / "adapter.safetensors", {})
    options[1] = str(tmp_path / "adapter.safetensors")
    assert export.main(options) == 2
    assert "cannot be merged" in capsys.readouterr().err
