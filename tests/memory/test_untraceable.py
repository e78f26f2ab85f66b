"""An operation that needs numbers is told with the module that it is in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bigtrain.memory.trace import as_fake, fake_like
from bigtrain.memory.untraceable import UNTRACEABLE, explained


class Counts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


class Reads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sum().item()


@pytest.mark.parametrize(("module", "operation"), [(Counts, "aten.nonzero"), (Reads, "aten._local_scalar_dense")])
def test_module_and_operation_are_named(module: type[nn.Module], operation: str) -> None:
    model = as_fake(nn.Sequential(nn.Linear(4, 4), module()))
    with pytest.raises(UNTRACEABLE) as caught:
        model(fake_like(torch.empty(2, 4)))
    text = explained(caught.value)
    assert text.startswith(f"1 ({module.__name__}): {operation}") and "real=" in text and "\n" not in text


def test_outside_of_modules_there_is_no_name() -> None:
    with pytest.raises(UNTRACEABLE) as caught:
        fake_like(torch.empty(4)).nonzero()
    assert explained(caught.value).startswith("the traced call: aten.nonzero")


def test_the_model_itself_is_named_by_its_class() -> None:
    with pytest.raises(UNTRACEABLE) as caught:
        as_fake(Reads())(fake_like(torch.empty(4)))
    assert explained(caught.value).startswith("Reads: ")
