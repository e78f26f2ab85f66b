"""The price of optimizer states: predicted is measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bigtrain.config.schema import OptimizerSection
from bigtrain.optim import build_optimizer
from bigtrain.optim.cost import state_bytes


@pytest.mark.parametrize("name", ["adamw", "lamb"])
@pytest.mark.parametrize("width", [3, 16])
def test_predicted_is_what_a_step_leaves(name: str, width: int) -> None:
    model = nn.Sequential(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.Linear(2 * width, 5, bias=False))
    optimizer = build_optimizer(model.parameters(), OptimizerSection(name=name, learning_rate=1e-3))
    model(torch.randn(2, width)).sum().backward()
    optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    measured = sum(tensor.numel() * tensor.element_size() for tensor in held)
    parameters = list(model.parameters())
    assert measured == state_bytes(name, sum(p.numel() for p in parameters), len(parameters))
