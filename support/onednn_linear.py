"""Linear layers through oneDNN. The float32 products are PyTorch's, and faster on some AMD CPUs.

PyTorch multiplies float32 matrices on a CPU with Intel's MKL. On processors that are not Intel's,
MKL keeps to 256-bit instructions. oneDNN, which PyTorch carries as well, uses the full 512 bits of
AVX-512 everywhere. This is a tenth faster on Zen 4, which takes them in two halves, and nearly
twice as fast on Zen 5. `torch.compile` calls oneDNN by the operator below, in frozen models. Here
the operator gets a backward pass, so that training is faster, too.

    use_onednn(model)   # in place: every nn.Linear of the model, for float32 on the CPU
"""

from pathlib import Path

import torch
from torch import nn


def onednn_helps() -> bool:
    """Whether oneDNN multiplies faster than MKL on this processor.

    This is not measured, because two runs could choose differently, and the libraries round
    differently.
    """
    cpuinfo = Path("/proc/cpuinfo")  # on Linux only: PyTorch does not say who made the processor
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and cpuinfo.exists()
        and "AuthenticAMD" in cpuinfo.read_text()
    )


def product(x, weight, bias=None):
    """x (..., in) times the transposed weight (out, in), plus bias (out,). Returns (..., out)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def weight_gradient(g, x):
    """g^T x: (rows, out) and (rows, in) to (out, in).

    Into a bottleneck or out of it, the product is ten times faster with the narrow side in front.
    """
    if g.shape[1] <= x.shape[1]:
        return product(g.t(), x.t())
    return product(x.t(), g.t()).t()


class Product(torch.autograd.Function):
    """`product` with its gradients: g W for the input, g^T x for the weight, sum g for the bias.

    A frozen weight needs no gradient, and then x is not kept.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, g):  # (..., out)
        x, weight = ctx.saved_tensors
        rows = g.flatten(0, -2)  # (batch * tokens, out)
        grad_x = None
        grad_weight = None
        grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = product(g, weight.t())
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(rows, x.flatten(0, -2))
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias


class OneDNNLinear(nn.Linear):
    """nn.Linear with another product."""

    def forward(self, x):
        return Product.apply(x, self.weight, self.bias)


def use_onednn(model: nn.Module) -> nn.Module:
    """Let every nn.Linear multiply float32 through oneDNN. Changes `model` and returns it.

    Names and parameters stay, so saving, merging and exporting see no difference.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear
    return model
