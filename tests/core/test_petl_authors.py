"""Our methods against what the paper's published code returned, with the same number in every
tensor.

`reference/authors.npz` (71 kB) was written with github.com/umbertocappellazzo/PETL_AST at 1fe23af
(Convpass, Hydra and the combinations at 94b5889), transformers 4.28.1 and torch 2.13, on a CPU in
float32, for 32 methods that both have. The shape is SHAPE below: 38 tokens, and the ranks that the
methods' own reduction rates give at 192 dimensions. Stored is, for each method: the logits of two
clips; of the gradient of their cross-entropy, the L2 norm and eight entries of every trained
tensor; and the loss of each of 20 steps of the authors' own training loop.

Every tensor is filled from its name, see `fill`. Two things had to be brought together. The
authors' Convpass computes its convolution and drops the result: here the convolution is held at the
identity, and its dropout is off. Their Hydra has an activation in both branches and a second
up-bias: both were taken out of theirs.

Ours and theirs differed by 2e-7 in logits and 2e-6 of a gradient's largest entry when this was
stored.
"""

import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import REFERENCE

import petl_more
from ast_model import AST, ASTConfig
from petl import METHODS, apply

STORED = np.load(REFERENCE / "authors.npz")
SHARED = sorted({key.split("/")[0] for key in STORED})
SHAPE = {
    "n_frames": 36,
    "n_mels": 128,
    "dim": 192,
    "depth": 2,
    "heads": 3,
    "hidden": 768,
    "n_classes": 7,
}


def draws(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def fill(model: AST) -> None:
    """Every tensor, frozen ones too, from a seed that its name gives."""
    for name, parameter in model.named_parameters():
        values = draws(zlib.crc32(name.encode()), *parameter.shape) * (
            0.1 if parameter.ndim == 1 else 0.04
        )
        if name.endswith(("norm1.weight", "norm2.weight", "norm.weight")):
            values += 1
        parameter.data = torch.from_numpy(values).float()


def filled(name: str) -> tuple[AST, dict[str, torch.Tensor]]:
    """The model and the tensors it trains, by name."""
    model = apply(AST(ASTConfig(**SHAPE)), name).eval()
    fill(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv1d):  # of Convpass
            torch.nn.init.dirac_(module.weight)
            torch.nn.init.zeros_(module.bias)
            module.requires_grad_(False)
    return model, {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def test_the_file_holds_all_methods_but_our_own():
    assert len(SHARED) == 32
    own = METHODS.keys() - petl_more.METHODS.keys() - set(SHARED)
    assert own == {"convpass2d_pfeiffer_par", "convpass2d_houlsby_par"}


@pytest.mark.parametrize("name", SHARED)
def test_logits_and_gradients(name):
    """Gradients relative to the tensor's largest entry: some are zero in exact arithmetic, hence
    the floor.
    """
    model, trained = filled(name)
    logits = model(torch.from_numpy(draws(1, 2, 36, 128)).float())
    assert np.abs(logits.detach().numpy() - STORED[f"{name}/logits"]).max() <= 2e-6

    F.cross_entropy(logits, torch.tensor([1, 4])).backward()
    assert sorted(trained) == sorted(STORED[f"{name}/names"])
    gradients = {tensor: parameter.grad.flatten().numpy() for tensor, parameter in trained.items()}
    floor = 1e-4 * max(np.abs(gradient).max() for gradient in gradients.values())
    rows = zip(
        STORED[f"{name}/names"], STORED[f"{name}/norms"], STORED[f"{name}/entries"], strict=True
    )
    for tensor, norm, entries in rows:
        gradient = gradients[tensor]
        largest = max(np.abs(gradient).max(), floor)
        chosen = gradient[np.linspace(0, len(gradient) - 1, 8).astype(int)]
        assert np.abs(chosen - entries).max() <= 5e-5 * largest, tensor
        assert abs(np.linalg.norm(gradient) - norm) <= 5e-5 * max(norm, largest), tensor


@pytest.mark.parametrize("name", SHARED)
def test_losses_of_twenty_steps(name):
    """Batches of two in order, AdamW as in section III-A, and a learning rate that falls to zero
    along a cosine.
    """
    model, trained = filled(name)
    lr = STORED[f"{name}/lr"].item()
    assert METHODS[name].lr == lr
    optimizer = torch.optim.AdamW(
        trained.values(), lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    fbank = torch.from_numpy(draws(2, 40, 36, 128)).float()
    labels = torch.from_numpy(np.random.default_rng(3).integers(0, 7, 40))
    losses = []
    for x, y in zip(fbank.split(2), labels.split(2), strict=True):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert np.abs(np.array(losses) - STORED[f"{name}/losses"]).max() <= 1e-5
