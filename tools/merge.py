"""Merge an adapted model into a plain AST.

`petl.merge` merges LoRA and what else is a change of a weight. This file adds two kinds of adapters
whose work some more hidden units of the FFN can do.
"""

from dataclasses import replace

import torch
from torch import nn

import petl
from ast_model import AST, FFN, UserError
from petl import Adapted, Bottleneck, HydraFFN


@torch.no_grad()
def merge(model: AST) -> AST:
    """A plain AST with the logits of the adapted `model`, which stays as it is.

    A UserError names a method that no weight of an AST can express: most adapters, prompts and
    prefixes.
    """
    plain = petl.merge(model, merged)
    widths = {block.ffn.fc1.out_features for block in plain.blocks}
    if len(widths) > 1:
        raise UserError(
            f"{model.method.name!r} cannot be merged with --blocks: "
            "the FFNs of the other blocks would be narrower"
        )
    plain.config = replace(plain.config, hidden=widths.pop())
    return plain


def merged(module: nn.Module) -> nn.Module | None:
    """What can stand in place of a wrapper; None if nothing can."""
    if isinstance(module, HydraFFN):
        return merged_hydra(module)
    if isinstance(module, Adapted):
        return merged_adapter(module)
    return petl.replacement_of(module)


def merged_adapter(module: Adapted) -> FFN | None:
    """A Bottleneck parallel to the FFN is r more hidden units: both read u and have a GELU.

    None for every other adapter.
    """
    ffn = module.wrapped
    adapter = module.adapter
    if module.how != "par_before" or type(ffn) is not FFN or type(adapter) is not Bottleneck:
        return None
    return ffn_of(
        torch.cat([ffn.fc1.weight, adapter.down.weight]),
        torch.cat([ffn.fc1.bias, adapter.down.bias]),
        torch.cat([ffn.fc2.weight, adapter.up.weight], dim=1),
        ffn.fc2.bias + adapter.up.bias,
    )


def merged_hydra(module: HydraFFN) -> FFN:
    """S(u) + P(u) + Q(S(u)) as one FFN with 2r more hidden units.

    Neither P nor Q has an activation. Q is linear in S(u), so h + Q(h) is one matrix and one bias,
    and both multiply into fc2. P does not pass a GELU, but gelu(z) - gelu(-z) = z. So hidden units
    with z = D u + d and -z, and the output weights U and -U, carry U (D u + d) through the GELU
    unchanged.
    """
    fc1 = module.wrapped.fc1
    fc2 = module.wrapped.fc2
    down = module.down_p
    up = module.up_p.weight
    after = torch.eye(len(up), device=up.device) + module.up_q.weight @ module.down_q.weight
    bias = module.up_q.weight @ module.down_q.bias + module.up_p.bias
    return ffn_of(
        torch.cat([fc1.weight, down.weight, -down.weight]),
        torch.cat([fc1.bias, down.bias, -down.bias]),
        torch.cat([after @ fc2.weight, up, -up], dim=1),
        after @ fc2.bias + bias,
    )


def ffn_of(weight1, bias1, weight2, bias2) -> FFN:
    """An FFN with these tensors in fc1 and fc2."""
    hidden, dim = weight1.shape
    ffn = FFN(dim, hidden)
    state = {"fc1.weight": weight1, "fc1.bias": bias1, "fc2.weight": weight2, "fc2.bias": bias2}
    ffn.load_state_dict(state, assign=True)
    return ffn
