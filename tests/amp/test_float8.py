"""fp8 is torchao's business: which layers it gets, and what they stand in."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import nn

from bigtrain import amp
from bigtrain.amp import float8, precision
from bigtrain.errors import InputError


class Float8Linear(nn.Linear):
    """What torchao's layer is to the code that calls it: another forward on the same parameters."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        assert input.dtype == self.weight.dtype == torch.bfloat16
        return nn.functional.linear(input, self.weight, self.bias)


def convert_to_float8_training(
    module: nn.Module, *, module_filter_fn: Callable[[nn.Module, str], bool] | None = None, config: object = None
) -> nn.Module:
    """Stand in for torchao's function, as its documentation describes it."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear) and (module_filter_fn is None or module_filter_fn(layer, name)):
            layer.__class__ = Float8Linear
    return module


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("torchao.float8")
    library.convert_to_float8_training = convert_to_float8_training
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", library)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 24), nn.Linear(24, 16)) for _ in "ab"
        )
        self.head = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def converted(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, Float8Linear)]


@pytest.mark.usefixtures("torchao")
def test_layers_of_the_blocks_whose_dims_suit() -> None:
    model = Net()
    float8.convert(model)
    assert converted(model) == ["blocks.0.0", "blocks.1.0"]
    float8.convert(model)
    assert converted(model) == ["blocks.0.0", "blocks.1.0"]


@pytest.mark.usefixtures("torchao")
def test_they_read_bf16_and_leave_fp32_masters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "device_fault", lambda *_: None)
    model = Net()
    parameters, keys = list(model.parameters()), list(model.state_dict())
    amp.apply(model, "fp8")
    amp.apply(model, "fp8")
    assert converted(model) == ["blocks.0.0", "blocks.1.0"]
    model(torch.randn(4, 16)).float().sum().backward()
    assert [*map(id, model.parameters())] == [*map(id, parameters)]
    assert list(model.state_dict()) == keys
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters)


def test_a_layer_with_another_forward_is_not_touched() -> None:
    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    assert float8.convertible(nn.Linear(16, 32))
    assert not float8.convertible(Own(16, 32))
    assert not float8.convertible(nn.Linear(16, 31))
    assert not float8.convertible(nn.Bilinear(16, 16, 16))


def test_the_cpu_refuses_it_and_names_what_it_can() -> None:
    with pytest.raises(InputError, match="amp.precision: fp8 does not run on the CPU; it can fp32 and bf16"):
        amp.apply(Net(), "fp8")


def test_without_torchao_a_device_that_could_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "device_fault", lambda name, kind, _: amp.rules.device_fault(name, "cuda", (9, 0)))
    monkeypatch.setattr(amp.rules, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="fp8 needs torchao, which is not installed; .* or use bf16"):
        amp.apply(Net(), "fp8")
