from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bigtrain import amp
from bigtrain.ledger import Ledger, Storage, Value
from bigtrain.models.activated import activated
from bigtrain.models.activated_cost import linear_of_activation, linear_of_norm
from bigtrain.models.operations_cost import Numbers, Operations
from bigtrain.models.pointwise import GELU, SwiGLU
from bigtrain.processor import has_slow_bf16
from tests.shared.beside_blocks import measure_beside_blocks

N, W, INNER = 256, 96, 160
ROW_AND_COLUMN = 4 * (2 * N + 2 * INNER)
"""Bytes of what is not counted: sums over rows and columns of the tensors here."""


class Activated(nn.Module):
    """An activation and the product that reads it."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.activation = SwiGLU() if gated else GELU("tanh")
        self.down = nn.Linear(INNER, W, bias=not gated)

    def forward(self, x: Tensor) -> Tensor:
        return activated(self.activation, x, self.down)


def of_activation(run: Operations, x: Value, special: bool) -> Value:
    return linear_of_activation(run, x, "down", N, INNER, W, gated=special, bias=not special)


def of_norm(run: Operations, x: Value, special: bool) -> Value:
    normed = run.rms_norm(x, "norm", N, W) if special else run.layer_norm(x, "norm", N, W)
    return linear_of_norm(run, normed, x.storage, "up", N, W, INNER, bias=not special)


def numbers(precision: str) -> Numbers:
    return Numbers() if precision == "fp32" else Numbers(2, 4, 4, widened=has_slow_bf16())


def predicted(cost: Callable[..., Value], special: bool, width: int, precision: str) -> int:
    """Return the most that a forward and a backward pass hold beside the input."""
    ledger, kept = Ledger(), []
    run = Operations(ledger, numbers(precision), threads=torch.get_num_threads())
    start = ledger.hold(N * width * run.numbers.activation)
    x = ledger.made(start, [], ledger.keep([]), lambda grad, kept: pytest.fail("the input has no more parents"))
    ledger.nodes.clear()
    before = ledger.now
    out = cost(run, x, special)
    ledger.backward(out, ledger.hold(out.size, "temporaries"), lambda name, storage: kept.append(storage))
    return ledger.peak - before


def measured(module: nn.Module, width: int, precision: str) -> int:
    amp.apply(module, precision)
    x = torch.randn(N, width, dtype=torch.bfloat16 if precision == "bf16" else torch.float32, requires_grad=True)

    def step() -> None:
        out = module(x)
        out.backward(torch.ones_like(out))

    step()
    for tensor in (x, *module.parameters()):
        tensor.grad = None
    return measure_beside_blocks(step).peak_bytes


@pytest.mark.parametrize(("special", "precision"), [(False, "fp32"), (True, "fp32"), (False, "bf16")])
def test_holds_what_is_predicted(special: bool, precision: str, torch_seed: int) -> None:
    """Norms and their products are held against whole steps, in tests/test_price.py."""
    width = 2 * INNER if special else INNER
    expected = measured(Activated(special), width, precision)
    assert predicted(of_activation, special, width, precision) == pytest.approx(expected, rel=0.001, abs=ROW_AND_COLUMN)


def held(run_of: Callable[[Operations, Value], Value], width: int, device: str = "cpu") -> int:
    """Return what is held between the forward and the backward pass beside the input and the output."""
    ledger = Ledger()
    x = Value(ledger.hold(N * width * 4), None)
    out = run_of(Operations(ledger, Numbers(), device), x)
    return ledger.now - x.size - out.size


def test_neither_the_activation_nor_what_a_norm_returns_is_held() -> None:
    assert held(lambda run, x: of_activation(run, x, False), INNER) == 0
    assert held(lambda run, x: of_activation(run, x, False), INNER, "cuda") == N * INNER * 4
    statistics = 2 * N * 4
    assert held(lambda run, x: of_norm(run, x, False), W) == statistics
    assert held(lambda run, x: of_norm(run, x, False), W, "cuda") == statistics + N * W * 4


def test_a_layer_that_is_not_plain_forgets_the_activation_too() -> None:
    def shared(run: Operations, x: Value) -> Value:
        return linear_of_activation(run, x, "down", N, INNER, W, gated=False, bias=False, plain=False)

    assert held(shared, INNER) == 0


def test_gradients_come_in_autograds_order() -> None:
    ledger = Ledger()
    found: list[str] = []
    x = ledger.made(ledger.hold(N * INNER * 4), [], ledger.keep([]), lambda grad, kept: pytest.fail("no more parents"))
    ledger.nodes.clear()
    out = of_activation(Operations(ledger, Numbers()), x, False)

    def note(name: str, storage: Storage) -> None:
        found.append(name)

    ledger.backward(out, ledger.hold(out.size, "temporaries"), note)
    assert found == ["down.bias", "down.weight"]
