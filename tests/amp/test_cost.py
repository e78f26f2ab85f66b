"""The price of weights and gradients: predicted is measured, to the byte."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bigtrain import amp
from bigtrain.amp.cost import gradient_bytes, master_weight_bytes, weight_bytes

KINDS = [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "split24"), ("bf16", "none")]


def size(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(("precision", "master_weights"), KINDS)
@pytest.mark.parametrize("accumulated", [False, True])
def test_predicted_is_what_a_backward_pass_leaves(precision: str, master_weights: str, accumulated: bool) -> None:
    model = nn.Sequential(nn.Embedding(5, 7), nn.Linear(7, 9), nn.LayerNorm(9), nn.RMSNorm(9), nn.Bilinear(9, 9, 1))
    amp.apply(model, precision, master_weights=master_weights, accumulated=accumulated)
    for _ in range(2 if accumulated else 1):
        hidden = model[:4](torch.tensor([1, 2, 1]))
        model[4](hidden, hidden).float().sum().backward()
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    assert weight_bytes(count, master_weights) == size(parameters)
    predicted = gradient_bytes(count, master_weights, accumulated=accumulated)
    assert predicted == size([parameter.grad for parameter in parameters if parameter.grad is not None])


def test_defaults_are_fp32() -> None:
    assert (weight_bytes(10), gradient_bytes(10), master_weight_bytes(10)) == (40, 40, 0)


def test_split24_is_three_bytes_a_parameter() -> None:
    assert weight_bytes(10, "split24") + master_weight_bytes(10, "split24") == 30
    assert weight_bytes(10, "none") + master_weight_bytes(10, "none") == 20


@pytest.mark.parametrize("price", [weight_bytes, master_weight_bytes, gradient_bytes])
def test_another_kind_has_no_price(price: object) -> None:
    with pytest.raises(KeyError):
        price(10, "split16")  # type: ignore[operator]
