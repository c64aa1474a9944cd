"""Linear layers through oneDNN: the same float32 products as PyTorch's, faster on AMD CPUs with AVX-512.

PyTorch multiplies float32 matrices on a CPU with Intel's MKL, which keeps to 256-bit instructions on processors that
are not Intel's. oneDNN, which PyTorch carries as well, uses the full 512 bits everywhere: a tenth faster on Zen 4,
which takes them in two halves, and nearly twice as fast on Zen 5. `torch.compile` calls it by the operator below in
frozen models; here the same operator gets a backward pass, so that training profits too.

    use_onednn(model)   # in place: every nn.Linear of the model, for float32 on the CPU
"""

from pathlib import Path

import torch
from torch import nn


def onednn_helps() -> bool:
    """Whether this is a processor on which oneDNN multiplies faster than MKL. Not a measurement: that could come out
    either way in two runs, and the two libraries round differently."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere PyTorch does not say who made the processor
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and cpuinfo.exists()
        and "AuthenticAMD" in cpuinfo.read_text()
    )


def product(x, weight, bias=None):  # (..., in), (out, in), (out,) -> (..., out)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def weight_gradient(g, x):  # (rows, out), (rows, in) -> (out, in)
    """g^T x. Into a bottleneck or out of one, the product is ten times faster with the narrow side in front."""
    return product(g.t(), x.t()) if g.shape[1] <= x.shape[1] else product(x.t(), g.t()).t()


class Product(torch.autograd.Function):
    """`product` with its gradients: g W for the input, g^T x for the weight, and sum g for the bias, if they are asked
    for. A frozen weight asks for none, and then x is not kept."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, g):  # (..., out)
        x, weight = ctx.saved_tensors
        grad_x = product(g, weight.t()) if ctx.needs_input_grad[0] else None
        rows = g.flatten(0, -2)  # (batch * tokens, out)
        grad_weight = weight_gradient(rows, x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


class OneDNNLinear(nn.Linear):
    def forward(self, x):
        return Product.apply(x, self.weight, self.bias)


def use_onednn(model: nn.Module) -> nn.Module:
    """Let every nn.Linear of a float32 model on the CPU multiply through oneDNN. Changes `model` and returns it.

    Names and parameters stay as they are, so saving, merging and exporting see no difference.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear
    return model
