"""The time and the FLOPs of single operations, from what a trace shows of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigtrain.planner.clock import Clock, Flops, name_of
from bigtrain.planner.hardware import of_name
from bigtrain.planner.rates import rates_of
from bigtrain.planner.roofline import Roofline


def roofline(device: str = "cpu-laptop") -> Roofline:
    hardware = of_name(device)
    return Roofline(rates_of(hardware, "fp32", hardware.threads or 1))


class Shown(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Show each operation to a clock, as a trace does."""

    def __init__(self, clock: Clock | Flops) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.clock = clock

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.clock.tick(func, args, given, [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)])
        return out


def read(clock: Clock | Flops, run: Callable[[], object]) -> float:
    with Shown(clock):  # type: ignore[no-untyped-call]
        run()
    return clock.read()


def test_a_product_takes_what_the_roofline_says() -> None:
    run, clock = roofline(), Clock(roofline())
    x, w = torch.zeros(64, 32), torch.zeros(32, 16)
    assert read(clock, lambda: x @ w) == pytest.approx(run.elapsed(run.product(64, 32, 16)))
    bias = torch.zeros(16)
    assert read(clock, lambda: torch.addmm(bias, x, w)) == pytest.approx(run.elapsed(run.product(64, 32, 16)))
    many = read(clock, lambda: torch.bmm(torch.zeros(4, 64, 32), torch.zeros(4, 32, 16)))
    single = run.product(64, 32, 16)
    assert many >= 4 * single.seconds


@pytest.mark.parametrize("device", ["cpu-laptop", "h100"])
def test_views_and_what_has_no_numbers_take_no_time(device: str) -> None:
    x, nothing = torch.zeros(8, 8), torch.empty(0)
    clock = Clock(roofline(device))
    assert (
        read(clock, lambda: (x.view(64), x.T, x[2:], x.detach(), torch.empty(4), nothing + 1, nothing @ nothing)) == 0
    )


def test_what_is_not_known_reads_and_writes_once() -> None:
    run, x = roofline(), torch.zeros(1000)
    assert read(Clock(run), lambda: x.exp()) == pytest.approx(run.elapsed(run.pointwise(1, x.nbytes, x.nbytes)))
    in_place = run.pointwise(1, x.nbytes, x.nbytes, in_place=True)
    assert read(Clock(run), lambda: x.exp_()) == pytest.approx(run.elapsed(in_place))


def test_reading_begins_again() -> None:
    clock, x = Clock(roofline()), torch.zeros(100)
    assert read(clock, lambda: x + 1) > 0 and clock.read() == 0


@pytest.mark.parametrize("device", ["cpu-laptop", "h100"])
def test_more_takes_longer(device: str) -> None:
    clock = Clock(roofline(device))
    small, large = (torch.zeros(side, 1024) for side in (512, 4096))
    w = torch.zeros(1024, 1024)
    assert 0 < read(clock, lambda: small @ w) < read(clock, lambda: large @ w)


def test_flops_of_products() -> None:
    x, w = torch.zeros(64, 32), torch.zeros(32, 16)
    assert read(Flops(), lambda: x @ w) == 2 * 64 * 32 * 16
    assert read(Flops(), lambda: torch.addmm(torch.zeros(16), x, w)) == 2 * 64 * 32 * 16
    assert read(Flops(), lambda: torch.bmm(torch.zeros(3, 64, 32), torch.zeros(3, 32, 16))) == 3 * 2 * 64 * 32 * 16
    assert read(Flops(), lambda: x.exp() + 1) == 0


def test_a_linear_layers_backward_has_twice_the_flops() -> None:
    x, w = torch.zeros(8, 32, requires_grad=True), torch.zeros(16, 32, requires_grad=True)
    total = read(Flops(), lambda: torch.autograd.backward(functional.linear(x, w).sum()))
    assert total == 3 * 2 * 8 * 32 * 16


def test_attention_and_its_backward() -> None:
    q = torch.zeros(2, 4, 16, 8, requires_grad=True)
    once = 4 * q.numel() * 16
    run = lambda: torch.autograd.backward(functional.scaled_dot_product_attention(q, q, q).sum())  # noqa: E731
    assert read(Flops(), run) == 3 * once
    assert read(Clock(roofline()), run) > 0


def test_convolutions() -> None:
    x, w = torch.zeros(2, 3, 8, 8, requires_grad=True), torch.zeros(5, 3, 3, 3, requires_grad=True)
    forward = 2 * (2 * 5 * 8 * 8) * 27
    run = lambda: torch.autograd.backward(functional.conv2d(x, w, padding=1).sum())  # noqa: E731
    assert read(Flops(), run) == 3 * forward
    assert read(Clock(roofline()), run) > 0


def test_names_are_without_library_and_overload() -> None:
    assert name_of(torch.ops.aten.add.Tensor) == "add"
    assert name_of(torch.ops.aten.mm.default) == "mm"
