"""ast_model.py, petl.py and petl_more.py can be copied into another project, and work there."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("ast_model.py", "petl.py", "petl_more.py")

TRAIN_EVERYTHING = """
import sys
import torch
import torch.nn.functional as F
import petl_more
import petl
from ast_model import AST, ASTConfig

SHAPE = {"n_frames": 36, "n_mels": 36, "dim": 32, "depth": 2, "heads": 4, "n_classes": 3}
fbank = torch.randn(4, 36, 36)
labels = torch.tensor([0, 1, 2, 0])
assert {"lora", "dora"} <= petl.METHODS.keys()
for name in petl.METHODS:
    model = petl.apply(AST(ASTConfig(**SHAPE)), name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    F.cross_entropy(model(fbank), labels).backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved and moved <= trained, name
    assert any(n.startswith("head.") for n in moved), name
    if name == "lora":
        lora = model.eval()

plain = petl.merge(lora)
assert not any(hasattr(module, "wrapped") for module in plain.modules())
assert not torch.equal(plain.blocks[0].attn.q.weight, lora.blocks[0].attn.q.wrapped.weight)
torch.testing.assert_close(plain(fbank), lora(fbank), rtol=1e-4, atol=1e-5)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""

ASK_FOR_A_LATER_METHOD = """
import petl
try:
    petl.find("dora")
except ValueError as error:
    print(error)
import petl_more
print(petl.find("dora").name)
"""


@pytest.fixture
def copied(tmp_path):
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run(script: str, folder: Path) -> str:
    """What a Python script prints that runs in `folder` and finds modules there."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_method_trains_in_an_empty_folder(copied):
    modules = run(TRAIN_EVERYTHING, copied).split()
    assert {"ast_model", "petl", "petl_more", "torch"} <= set(modules)
    assert not {"support", "sounds", "data", "train", "load_weights", "msgspec"} & set(modules)


def test_petl_says_which_import_is_missing(copied):
    message, name = run(ASK_FOR_A_LATER_METHOD, copied).splitlines()
    assert "unknown method 'dora'" in message and "`import petl_more`" in message
    assert name == "dora"


@pytest.mark.parametrize("name", FILES)
def test_what_the_three_files_import(name):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    ours = {file.removesuffix(".py") for file in FILES}
    assert imported - set(sys.stdlib_module_names) <= ours | {"torch", "numpy"}
