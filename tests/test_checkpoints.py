"""Files of tensors from anywhere: damaged, dangerous or fetched."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import SMALL_AST, SMALL_CONFIG, SMALL_STATE, write_ast
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file

from load_weights import fill, load_ast, load_trained
from support.checkpoints import read_header, unusual
from support.command import UserError

ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------------------- damaged and dangerous


class Trap:
    """Unpickling this would make a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_code_in_a_checkpoint_is_executed(tmp_path):
    torch.save({"weight": Trap(tmp_path / "executed")}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match="Python code, which is never executed"):
        load_ast(tmp_path / "trap.pth")
    assert not (tmp_path / "executed").exists()


def test_bytes_that_are_no_checkpoint_are_not_called_code(tmp_path):
    (tmp_path / "noise.pth").write_bytes(bytes(range(256)) * 10)
    with pytest.raises(UserError, match=r"cannot read .*noise\.pth") as error:
        load_ast(tmp_path / "noise.pth")
    assert "Python code" not in str(error.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pth"])
@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_truncated_checkpoints(tmp_path, suffix, keep):
    file = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(SMALL_STATE, file)
    else:
        torch.save(SMALL_STATE, file)
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(UserError, match=f"cannot read .*model{suffix}"):
        load_ast(file)


@pytest.mark.parametrize("text", ["[]", "{"])
def test_a_config_that_is_no_table(tmp_path, text):
    write_ast(tmp_path, SMALL_STATE)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        load_ast(tmp_path, n_classes=3)


def test_tensors_that_fit_no_model():
    """In one line, which names the tensor: torch's own message begins with a line that says
    nothing."""
    with pytest.raises(
        UserError,
        match=r"^x\.bin is no AST: its tensors do not fit together: size mismatch for bias: "
        r".*\[4\].*\[3\]\)\.$",
    ):
        fill(torch.nn.Linear(2, 3), {"weight": torch.ones(3, 2), "bias": torch.ones(4)}, "x.bin")


def test_not_a_file_of_trained_parts(tmp_path):
    with pytest.raises(UserError, match="it has no such header"):
        read_header(SMALL_AST / "model.safetensors")
    for name, mend in (
        ("fold1", "delete it and train it again"),
        ("cut", "give a run of train.py or a fold"),
    ):
        (tmp_path / f"{name}.safetensors").write_bytes(b"\x10\x00")
        with pytest.raises(UserError, match=rf"no whole file of trained parts \(.*\): {mend}"):
            load_trained(tmp_path / f"{name}.safetensors")


# ------------------------------------------------------------------------------------------ the hub


def test_no_network_says_what_to_download(tmp_path):
    """In a process of its own, where nothing else has imported parts of huggingface_hub."""
    code = "from load_weights import load_ast; load_ast('audioset', n_classes=3)"
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=offline, capture_output=True, text=True
    )
    message = done.stderr.strip().splitlines()[-1]
    assert re.search(r"UserError: cannot fetch MIT/ast-finetuned.* by hand.* --weights", message), (
        done.stderr
    )


def test_hub_weights_come_through_the_users_cache(monkeypatch):
    """What the hub would deliver is put in its place; the folder layout and names are the hub's."""
    asked = []

    def deliver(repository, name):
        asked.append((repository, name))
        return str(SMALL_AST / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", deliver)
    huggingface_hub.utils.logging.set_verbosity_warning()
    model = load_ast("hf:somebody/some-ast", pool="cls_dist")
    assert (
        huggingface_hub.utils.logging.get_verbosity() == logging.ERROR
    )  # not a line for each of its five retries
    assert asked == [
        ("somebody/some-ast", "config.json"),
        ("somebody/some-ast", "preprocessor_config.json"),
        ("somebody/some-ast", "model.safetensors"),
    ]
    load_ast("hf:somebody/some-ast", pool="cls_dist")
    assert len(asked) == 3  # the hub is asked once: without a network each time takes half a minute
    expected = load_ast(SMALL_AST, pool="cls_dist").state_dict()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("weights", "repository"),
    [
        ("audioset", "MIT/ast-finetuned-audioset-10-10-0.4593"),
        ("hf:somebody/else", "somebody/else"),
    ],
)
def test_the_hub_is_asked_for_safetensors_first(weights, repository, tmp_path, monkeypatch):
    folder = write_ast(tmp_path, SMALL_STATE, SMALL_CONFIG)
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    torch.save(SMALL_STATE, folder / "pytorch_model.bin")
    asked = []

    def deliver(name, file):
        asked.append((name, file))
        if not (folder / file).exists():
            raise EntryNotFoundError("404")
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", deliver)
    model = load_ast(weights, n_classes=3)
    assert asked == [
        (repository, name)
        for name in (
            "config.json",
            "preprocessor_config.json",  # this model has none
            "model.safetensors",
            "pytorch_model.bin",
        )
    ]
    assert (
        model.backbone.name == weights and model.config.heads == 2
    )  # which only the config.json knows


def test_a_mean_that_nobody_can_ask_for_is_not_assumed_in_silence(tmp_path, monkeypatch, capsys):
    """Without a network the hub's client has a model that another program fetched in part."""
    folder = write_ast(tmp_path / "hub", SMALL_STATE, SMALL_CONFIG)

    def deliver(repository, name):
        if not (folder / name).exists():
            raise LocalEntryNotFoundError("offline")
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", deliver)
    load_ast("hf:somebody/some-ast")
    assert capsys.readouterr().err == (
        "warning: somebody/some-ast lies here without preprocessor_config.json: "
        "taken as AudioSet's\n"
    )
    (folder / "preprocessor_config.json").write_text('{"mean": -6.0}')
    model = load_ast("hf:somebody/some-ast")
    assert not capsys.readouterr().err
    assert model.backbone.sha256 == load_ast(folder).backbone.sha256
    assert model.backbone.sha256 != load_ast(SMALL_AST).backbone.sha256


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_number_that_is_not_finite_is_found_anywhere(kind):
    tensor = torch.linspace(-5, 5, 70, dtype=kind).reshape(7, 10)
    assert unusual(tensor) is None and unusual(tensor[:0]) is None
    for number in (torch.nan, torch.inf, -torch.inf):
        for place in ((0, 0), (3, 4), (6, 9)):
            wrong = tensor.clone()
            wrong[place] = number
            assert unusual(wrong) == "holds a number that is not finite"
