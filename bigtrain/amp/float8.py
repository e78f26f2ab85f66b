"""fp8 products in the blocks' linear layers, through torchao: its one import."""

from __future__ import annotations

from torch import nn

MULTIPLE = 16
"""Both dims of a matrix must be multiples of it for the fp8 product (torch._scaled_mm)."""


def convert(model: nn.Module) -> None:
    """Replace the linear layers inside a model's module lists by torchao's, whose parameters are the same objects.

    Layers outside the lists, such as the head, and those whose dims are no multiples of 16 stay as they are.
    """
    from torchao.float8 import convert_to_float8_training

    inside = {layer for blocks in model.modules() if isinstance(blocks, nn.ModuleList) for layer in blocks.modules()}
    convert_to_float8_training(model, module_filter_fn=lambda layer, _: layer in inside and convertible(layer))


def convertible(layer: nn.Module) -> bool:
    """Tell whether a module is a plain linear layer whose dims suit the fp8 product."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return False
    return layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0
