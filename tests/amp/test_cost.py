"""The price of weights and gradients: predicted is measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bigtrain import amp
from bigtrain.amp.cost import gradient_bytes, weight_bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_predicted_is_what_a_backward_pass_leaves(precision: str) -> None:
    model = nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9))
    amp.apply(model, precision)
    model(torch.randn(3, 7)).float().sum().backward()
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    assert weight_bytes(count) == sum(p.numel() * p.element_size() for p in parameters)
    assert gradient_bytes(count) == sum(
        p.grad.numel() * p.grad.element_size() for p in parameters if p.grad is not None
    )
