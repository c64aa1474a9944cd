"""Merge an adapted model into a plain AST: `petl.merge`, and two kinds of adapters that it does not know."""

from dataclasses import replace

import torch
from torch import nn

import petl
from ast_model import AST, FFN, UserError
from petl import Adapted, Bottleneck, HydraFFN


@torch.no_grad()
def merge(model: AST) -> AST:
    """A plain AST with the logits of the adapted one. `model` stays as it is.

    Raises UserError for methods that no weight of an AST can express (most adapters, prompts, prefixes).
    """
    plain = petl.merge(model, merged)
    hidden = {block.ffn.fc1.out_features for block in plain.blocks}
    if len(hidden) > 1:
        raise UserError(f"{model.method.name!r} cannot be merged with --blocks: FFNs of other blocks would be narrower")
    plain.config = replace(plain.config, hidden=hidden.pop())
    return plain


def merged(module: nn.Module) -> nn.Module | None:
    """A plain module in place of a wrapper; None if there is none."""
    if isinstance(module, HydraFFN):
        return merged_hydra(module)
    if isinstance(module, Adapted):
        return merged_adapter(module)
    return petl.replacement_of(module)


def merged_adapter(module: Adapted) -> FFN | None:
    """A Bottleneck parallel to the FFN is r more hidden units of it: same input, same GELU. No other one merges."""
    ffn, adapter = module.wrapped, module.adapter
    if module.how != "par_before" or type(ffn) is not FFN or type(adapter) is not Bottleneck:
        return None
    into = [(ffn.fc1.weight, ffn.fc1.bias), (adapter.down.weight, adapter.down.bias)]
    return side_by_side(into, [(ffn.fc2.weight, ffn.fc2.bias), (adapter.up.weight, adapter.up.bias)])


def merged_hydra(module: HydraFFN) -> FFN:
    """One plain FFN with the same output, 2r hidden units wider: neither branch has an activation.

    Q is linear in S(u) and multiplies into fc2. P bypasses the GELU, and gelu(z) - gelu(-z) = z: so hidden units
    D u + d and -(D u + d) with output weights U and -U carry U (D u + d) through the activation unchanged.
    """
    fc1, fc2 = module.wrapped.fc1, module.wrapped.fc2
    down, up, q_down, q_up = module.down_p, module.up_p, module.down_q, module.up_q
    after = torch.eye(len(fc2.bias), device=fc2.bias.device) + q_up.weight @ q_down.weight  # h -> h + Q(h), no bias
    bias = after @ fc2.bias + q_up.weight @ q_down.bias + up.bias
    into = [(fc1.weight, fc1.bias), (down.weight, down.bias), (-down.weight, -down.bias)]
    return side_by_side(into, [(after @ fc2.weight, bias), (up.weight, 0), (-up.weight, 0)])


def side_by_side(into: list, out: list) -> FFN:
    """One FFN of all hidden units of several: `into` and `out` hold a (weight, bias) each, before and after GELU."""
    ffn = FFN(into[0][0].shape[1], sum(len(weight) for weight, _ in into))
    ffn.fc1.weight = nn.Parameter(torch.cat([weight for weight, _ in into]))
    ffn.fc1.bias = nn.Parameter(torch.cat([bias for _, bias in into]))
    ffn.fc2.weight = nn.Parameter(torch.cat([weight for weight, _ in out], dim=1))
    ffn.fc2.bias = nn.Parameter(sum(bias for _, bias in out))
    return ffn
