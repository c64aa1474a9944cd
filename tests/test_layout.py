"""The house: what lies where, which way imports run, and that a new dataset or method touches
nothing else.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
from helpers import SMALL_AST
from torch import nn

import data
import petl
import train
from load_weights import load_ast
from sounds.clip import Clip, Listing

ROOT = Path(train.__file__).parent
FIVE = ["ast_model", "petl", "data", "load_weights", "train"]  # in the order in which they are read
# What each room may import, besides itself. ast_model.py defines the error that all of them raise.
MAY_IMPORT = {
    "support": {"ast_model"},
    "sounds": {"ast_model", "support"},
    "ast_model": set(),
    "petl": {"ast_model"},
    "data": {"ast_model", "sounds", "support"},
    "petl_more": {"ast_model", "petl"},
    "load_weights": {"ast_model", "petl", "petl_more", "data", "support"},
    "train": {"ast_model", "petl", "petl_more", "data", "load_weights", "support"},
    "tools": {*FIVE, "petl_more", "sounds", "support"},
}


def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    files = [
        *ROOT.glob("*.py"),
        *(file for room in ("sounds", "support", "tools") for file in (ROOT / room).glob("*.py")),
    ]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}


def imports_of(file: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & known.keys()


def test_imports_run_down():
    known = modules()
    assert {name.split(".")[0] for name in known} == MAY_IMPORT.keys()
    for name, file in known.items():
        room = name.split(".")[0]
        others = {other.split(".")[0] for other in imports_of(file, known)} - {room}
        assert others <= MAY_IMPORT[room], f"{name} imports {others - MAY_IMPORT[room]}"


def test_no_circle():
    known = modules()
    arrows = {name: imports_of(file, known) for name, file in known.items()}
    while free := {name for name, targets in arrows.items() if not targets & arrows.keys()}:
        arrows = {name: targets for name, targets in arrows.items() if name not in free}
    assert not arrows, f"these import each other in a circle: {sorted(arrows)}"


def test_top_level():
    for room in ("sounds", "support", "tools"):
        docstring = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text()))
        assert docstring and len(docstring.splitlines()) == 2
    # What can be imported in place of something else: not a reader's own folders, such as venv/.
    names = {
        path.stem
        for path in ROOT.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert {*FIVE, "sounds", "support", "tools"} <= names
    # a top-level ast.py would be imported in place of Python's own
    assert not names & sys.stdlib_module_names
    assert not names & {"datasets", "transformers", "peft", "torchaudio"}


def test_modules_import_from_the_repository_root():
    code = "import ast_model, petl, data, load_weights, train; print('fine')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "fine\n" and done.stderr == ""


def test_a_dataset_of_ones_own_is_a_function_and_a_row(tmp_path, monkeypatch):
    """Clips with a part, or with the number of a fold; the rest of the program takes the new
    name.
    """
    for label, name in enumerate(["low", "high"]):
        for i in range(6):
            wave = np.sin(2 * np.pi * (200 + 800 * label) * np.arange(4000) / 16_000 + i)
            (tmp_path / "sounds").mkdir(exist_ok=True)
            soundfile.write(tmp_path / "sounds" / f"{name}{i}.wav", 0.1 * wave, 16_000)

    def mine(data_dir, cache_dir):
        files = sorted(data_dir.glob("*.wav"))
        return Listing(
            data_dir, [Clip(file, file.stem[:-1], int(file.stem[-1]) % 3) for file in files]
        )

    monkeypatch.setitem(
        data.DATASETS, "mine", data.Recipe(mine, n_frames=30, batch_size=4, epochs=1, mask=False)
    )
    options = [
        "--dataset",
        "mine",
        "--data-dir",
        tmp_path / "sounds",
        "--weights",
        SMALL_AST,
        "--method",
        "lora",
    ]
    places = ["--cache-dir", tmp_path / "cache", "--out", tmp_path / "runs"]
    assert train.main([str(word) for word in (*options, *places)]) == 0
    files = {file.name for file in (tmp_path / "runs" / "mine" / "lora" / "seed0").glob("fold*")}
    assert files == {"fold0.safetensors", "fold1.safetensors", "fold2.safetensors"}
    result = json.loads((tmp_path / "runs/mine/lora/seed0/result.json").read_text())
    assert [fold["fold"] for fold in result["folds"]] == [0, 1, 2]
    dataset = data.load_dataset("mine", tmp_path / "sounds", tmp_path / "cache")
    assert dataset.classes == ["high", "low"] and dataset.folds[1].test == [1, 4, 7, 10]
    assert dataset.folds[1].val == [0, 3, 6, 9] and dataset.folds[1].train == [2, 5, 8, 11]


class Gain(nn.Module):
    """What it wraps, times one learned number for each dimension."""

    def __init__(self, wrapped, dim):
        super().__init__()
        self.wrapped, self.gain = wrapped, nn.Parameter(torch.ones(dim))

    def forward(self, u):
        return self.wrapped(u) * self.gain


class Gains:
    """A part is anything with `insert`."""

    def insert(self, model, blocks):
        for block in blocks:
            block.ffn = Gain(block.ffn, model.config.dim)


def test_a_method_of_ones_own_is_a_module_a_part_and_a_row():
    method = petl.Method("gains", (Gains(),), "-", "-")
    plain = load_ast(SMALL_AST, n_frames=60, n_classes=3).eval()
    x = torch.randn(2, 60, 128)
    expected = plain(x)
    model = petl.apply(plain, method)
    assert petl.count(model)["petl"] == 2 * 64
    torch.testing.assert_close(model(x), expected)
