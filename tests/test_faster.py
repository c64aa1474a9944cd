"""Less to compute: a share of the patches (--keep), the last blocks alone (--blocks)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_ast
from safetensors.torch import load_file

import petl
import train
from load_weights import from_dict, load_trained, to_dict
from petl_more import Patchout, patchout
from support import records
from support.command import UserError
from tools.merge import merge

# ------------------------------------------------------------------------------------------ patches


def test_a_share_of_the_patches_is_drawn_evenly():
    torch.manual_seed(0)
    kept = patchout(torch.rand(4000, 36), 0.4)
    assert kept.shape == (4000, 14)  # 14.4, rounded
    # in order, none twice
    assert (kept.diff(dim=1) > 0).all() and kept.min() == 0 and kept.max() == 35
    share = torch.bincount(kept.flatten(), minlength=36) / 4000
    assert (share - 14 / 36).abs().max() < 0.04
    assert patchout(torch.tensor([[0.1, 0.9, 0.5, 0.8]]), 0.5).tolist() == [[1, 3]]
    assert patchout(torch.rand(2, 5), 0.01).shape == (2, 1)


def test_the_chosen_patches_and_the_tokens_in_front_go_through_the_blocks():
    model = tiny_ast(pool="cls_dist").eval()
    x = torch.randn(2, 36, 36)
    torch.manual_seed(1)
    kept = patchout(torch.rand(2, 9), 0.4)
    tokens = model.embed(x)
    assert kept.shape == (2, 4)
    chosen = torch.stack([tokens[clip, [0, 1, *(2 + kept[clip])]] for clip in (0, 1)])
    for block in model.blocks:
        chosen = block(chosen)
    torch.manual_seed(1)
    torch.testing.assert_close(
        Patchout(model, 0.4)(x), model.head(model.norm(chosen)[:, :2].mean(1))
    )
    torch.testing.assert_close(Patchout(model, 1.0)(x), model(x))


@pytest.mark.parametrize(
    "method", [name for name in petl.METHODS if "2d" not in name and name != "probe"]
)
def test_every_method_trains_on_a_share_of_the_patches(method):
    model = petl.apply(tiny_ast(), method).train()
    out = Patchout(model, 0.4)(torch.randn(2, 36, 36))
    out.sum().backward()
    assert out.isfinite().all() and model.head.weight.grad is not None


def fold(tmp_path: Path, name: str, method: str = "lora") -> dict[str, torch.Tensor]:
    return load_file(tmp_path / name / "esc10" / method / "seed0" / "fold1.safetensors")


def test_only_training_leaves_patches_out(train_main, tmp_path, monkeypatch):
    seen = []
    encode = train.AST.encode
    monkeypatch.setattr(
        train.AST,
        "encode",
        lambda self, x: (
            seen.append((self.training, x.shape[1] < self.config.n_tokens)) or encode(self, x)
        ),
    )
    assert train_main("--method", "lora", "--keep", 0.4) == 0
    assert set(seen) == {(True, True), (False, False)}
    config = json.loads((tmp_path / "runs/esc10/lora/seed0/config.json").read_text())
    assert config["keep"] == 0.4


def test_micro_batches_change_nothing(train_main, tmp_path):
    """Pieces draw one after the other what the whole batch draws at once."""
    words = ["--method", "lora", "--keep", "0.5", "--epochs", "1", "--batch-size", "8"]
    assert train_main(*words, "--out", tmp_path / "whole") == 0
    assert train_main(*words, "--out", tmp_path / "parts", "--micro-batch", 3) == 0
    whole = fold(tmp_path, "whole")
    for name, tensor in fold(tmp_path, "parts").items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-3, atol=1e-5)


def test_an_interrupted_run_goes_on_to_the_same_bits(train_main, tmp_path, monkeypatch):
    words = ["--method", "lora", "--keep", "0.5", "--epochs", "3"]
    assert train_main(*words, "--out", tmp_path / "whole") == 0
    save = records.save_progress

    def once(file, progress, settings, state):
        save(file, progress, settings, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(records, "save_progress", once)
        assert train_main(*words, "--out", tmp_path / "broken") == 130
    assert train_main(*words, "--out", tmp_path / "broken", "--resume") == 0
    whole, broken = fold(tmp_path, "whole"), fold(tmp_path, "broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    runs = [
        records.read_run(tmp_path / out / "esc10/lora/seed0").history()
        for out in ("whole", "broken")
    ]
    # the best epoch may be the first
    assert [row["loss"] for row in runs[0]] == [row["loss"] for row in runs[1]]


# ------------------------------------------------------------------------------------------- blocks


PLACED = [
    n
    for n, m in petl.METHODS.items()
    if m.parts and not any(hasattr(part, "deep") for part in m.parts)
]
PLACED.remove("probe")  # which puts nothing into a block


@pytest.mark.parametrize("method", PLACED)
def test_parts_go_into_the_given_blocks_alone(method):
    row = petl.METHODS[method]
    model = petl.apply(tiny_ast(depth=4), replace(row, blocks=(2, 3)))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    whole = petl.apply(tiny_ast(depth=4), row)
    everywhere = {name for name, p in whole.named_parameters() if p.requires_grad}
    assert trained == {
        n for n in everywhere if n.startswith(("blocks.1.", "blocks.2.", "norm.", "head."))
    }
    assert any(name.startswith("blocks.1.") for name in trained) and len(model.blocks) == 4
    untouched = {
        n
        for n in tiny_ast(depth=4).state_dict()
        if n.startswith(("blocks.0.", "blocks.3.", "embed."))
    }
    assert untouched <= model.state_dict().keys()


def test_nothing_is_kept_of_what_lies_beneath():
    """No gradient is asked for, so none of its tensors waits for the backward pass."""
    model = petl.apply(tiny_ast(depth=4), replace(petl.METHODS["lora"], blocks=(3, 4)))
    needs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: needs.append(out.requires_grad))
    model(torch.randn(2, 36, 36))
    assert needs == [False, False, True, True]


@pytest.mark.parametrize("method", ["spt", "dpt", "adapter_dpt"])
def test_prompts_belong_to_no_block(method):
    with pytest.raises(UserError, match="cannot be kept to some of the blocks"):
        petl.apply(tiny_ast(depth=4), replace(petl.METHODS[method], blocks=(2, 3)))


def test_a_run_on_the_last_block_is_saved_and_loaded(train_main, tmp_path):
    assert train_main("--method", "houlsby_par", "--blocks", "2") == 0
    file = tmp_path / "runs/esc10/houlsby_par/seed0/fold1.safetensors"
    assert {name.split(".")[1] for name in load_file(file) if name.startswith("blocks.")} == {"1"}
    model = load_trained(file)
    assert model.method.blocks == (2, 2)
    assert from_dict(json.loads(json.dumps(to_dict(model.method)))) == model.method


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--blocks", "1-3"], "this backbone has the blocks 1 to 2"),
        (
            ["--blocks", "2-1"],
            "this backbone has the blocks 1 to 2; give the first and the last of them, or one",
        ),
        (["--blocks", "2-"], "argument --blocks: invalid span value: '2-'"),
        (["--blocks", "0-1"], "this backbone has the blocks 1 to 2"),
        (["--blocks", "last"], "--blocks"),
        (
            ["--blocks", "2", "--method", "linear"],
            "'linear' changes what comes before or after the blocks",
        ),
        (
            ["--blocks", "2", "--method", "dpt"],
            "'dpt' changes what comes before or after the blocks",
        ),
        (["--keep", "0"], "it must be a share between 0 and 1"),
        (["--keep", "nan"], "it must be a share between 0 and 1"),
        (["--keep", "1"], "it must be a share between 0 and 1"),
        (
            ["--keep", "0.5", "--method", "convpass2d_pfeiffer_par"],
            "needs the whole grid of patches",
        ),
        (["--keep", "0.5", "--method", "probe"], "'probe' needs the whole grid of patches"),
        (
            ["--blocks", "2", "--method", "probe"],
            "'probe' changes what comes before or after the blocks",
        ),
        (["--pool", "cls", "--method", "probe"], "--pool cls: 'probe' pools in its own way"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(train_main, capsys, words, message):
    assert train_main(*words) == 2
    error = capsys.readouterr().err
    assert (message in error and error.startswith("error: ")) or message in error.splitlines()[-1]


@pytest.mark.parametrize("method", ["hydra", "adapter_ffn_par_before", "adapter_lora"])
def test_blocks_of_unequal_width_are_no_plain_model(method):
    model = petl.apply(tiny_ast(depth=3), replace(petl.METHODS[method], blocks=(2, 3)))
    with pytest.raises(UserError, match="cannot be merged with --blocks"):
        merge(model)
    whole = petl.apply(tiny_ast(depth=3), replace(petl.METHODS[method], blocks=(1, 3)))
    merge(whole)
