"""Precision of the forward pass; weights and gradients stay fp32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bigtrain import amp
from bigtrain.errors import InputError


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def test_fp32_changes_nothing() -> None:
    model = small()
    forward = model.forward
    amp.apply(model, "fp32")
    assert model.forward == forward


def test_bf16_computes_in_bf16_and_keeps_fp32() -> None:
    model = small()
    reference = copy.deepcopy(model)
    amp.apply(model, "bf16")
    x = torch.randn(5, 8)
    out = model(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(
        p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters()
    )
    torch.testing.assert_close(out.float(), reference(x), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_is_the_context_alone(precision: str, dtype: torch.dtype) -> None:
    with amp.autocast(precision, "cpu"):
        assert small()(torch.randn(2, 8)).dtype == dtype


def test_another_precision_is_refused() -> None:
    with pytest.raises(InputError, match="'fp7' is not in this version; use fp32 or bf16"):
        amp.autocast("fp7", "cpu")


def test_nothing_stays_switched_on_after_an_error() -> None:
    model = small()
    amp.apply(model, "bf16")
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 9))
    assert not torch.is_autocast_enabled("cpu")
