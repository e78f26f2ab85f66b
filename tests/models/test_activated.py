from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from bigtrain import amp
from bigtrain.models import activated as forgetting
from bigtrain.models.activated import Activation, Source, activated, normalized, product
from bigtrain.models.pointwise import GELU, RMSNorm, SwiGLU

N, WIDTH, INNER = 6, 8, 32
EXACT, TANH, GATED = GELU("none"), GELU("tanh"), SwiGLU()


def plainly(activation: Activation, x: Tensor, linear: nn.Module) -> Tensor:
    out: Tensor = linear(activation(x))
    return out


def gradients(
    run: Callable[..., Tensor], activation: Activation, precision: str = "fp32", *, bias: bool = True
) -> list[Tensor]:
    """Return the output and every gradient of two layers with an activation between them."""
    torch.manual_seed(0)
    up = nn.Linear(WIDTH, INNER)
    down = nn.Linear(INNER // 2 if activation is GATED else INNER, WIDTH, bias=bias)
    for layer in (up, down):
        amp.apply(nn.Sequential(layer), precision)
    x = torch.randn(N, WIDTH).to(torch.bfloat16 if precision == "bf16" else torch.float32).requires_grad_()
    out = run(activation, up(x), down)
    out.float().square().sum().backward()  # type: ignore[no-untyped-call]
    found = [x.grad, *(p.grad for layer in (up, down) for p in layer.parameters())]
    return [out.detach(), *(grad for grad in found if grad is not None)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("activation", [TANH, EXACT, GATED], ids=["tanh", "erf", "swiglu"])
def test_gradients_are_those_of_a_kept_activation(activation: Activation, precision: str, bias: bool) -> None:
    found, wanted = (gradients(run, activation, precision, bias=bias) for run in (activated, plainly))
    assert len(found) == len(wanted) == 5 + bias
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


class Noted:
    """An activation that notes what it returns, as long as that lives."""

    def __init__(self) -> None:
        self.made = WeakTensorKeyDictionary()
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        out = F.gelu(x)
        self.made[out] = True
        return out

    def gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        return EXACT.gradient(grad, x)


class Hooked(nn.Linear):
    """A layer with a forward of its own, which is called as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1


@pytest.mark.parametrize("layer", [nn.Linear, Hooked])
def test_the_activation_is_not_kept(layer: Any) -> None:
    def kept(run: Callable[..., Tensor]) -> bool:
        noted = Noted()
        out = run(noted, torch.randn(N, INNER, requires_grad=True) * 1, layer(INNER, WIDTH))
        assert out.requires_grad
        return bool(len(noted.made))

    assert not kept(activated)
    assert kept(plainly)


def test_the_gradient_comes_into_the_activations_room() -> None:
    places: list[int] = []

    class Placed(Noted):
        def __call__(self, x: Tensor) -> Tensor:
            out = super().__call__(x)
            places.append(out.data_ptr())
            return out

        def gradient(self, grad: Tensor, x: Tensor) -> Tensor:
            places.append(grad.data_ptr())
            return super().gradient(grad, x)

    x = torch.randn(N, INNER, requires_grad=True) * 1
    activated(Placed(), x, nn.Linear(INNER, WIDTH)).sum().backward()  # type: ignore[no-untyped-call]
    assert len(places) == 3 and places[1] == places[2]


def test_without_gradients_nothing_is_noted() -> None:
    with torch.no_grad():
        x, linear = torch.randn(N, INNER), nn.Linear(INNER, WIDTH)
        assert not activated(EXACT, x, linear).requires_grad
        normed, source = normalized(nn.LayerNorm(INNER), x)
        assert source is None and not product(linear, normed, source).requires_grad


def test_a_recomputed_block_runs_the_activation_twice_not_three_times() -> None:
    """It is made again with its block; the hooks of recomputation stay on top of the stack."""
    noted, down = Noted(), nn.Linear(INNER, WIDTH)

    def block(x: Tensor) -> Tensor:
        return activated(noted, x * 1, down)

    x = torch.randn(N, INNER, requires_grad=True)
    out = checkpoint(block, x, use_reentrant=False)
    assert isinstance(out, Tensor)
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert noted.calls == 2 and x.grad is not None


@pytest.mark.parametrize("layer", [nn.Linear, Hooked])
def test_the_backward_pass_may_run_again(layer: Any) -> None:
    x = torch.randn(N, INNER, requires_grad=True)
    norm, up, down = nn.LayerNorm(INNER), layer(INNER, INNER), layer(INNER, WIDTH)
    normed, source = normalized(norm, x * 1)
    loss = activated(EXACT, product(up, normed, source), down).sum()
    for weight in (up.weight, down.weight):
        first = torch.autograd.grad(loss, weight, retain_graph=True)
        assert torch.equal(first[0], torch.autograd.grad(loss, weight, retain_graph=True)[0])


def normed_gradients(norm: nn.Module, precision: str, *, kept: bool) -> list[Tensor]:
    """Return the output and every gradient of a layer that reads what a norm returns."""
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, INNER)
    for layer in (norm, linear):
        amp.apply(nn.Sequential(layer), precision)
        layer.zero_grad()
    x = torch.randn(N, WIDTH).to(torch.bfloat16 if precision == "bf16" else torch.float32).requires_grad_()
    normed, source = normalized(norm, x * 2)
    out = linear(normed) if kept else product(linear, normed, source)
    (out.float().square().sum() + normed.float().sum()).backward()
    found = [x.grad, *(p.grad for layer in (norm, linear) for p in layer.parameters())]
    return [out.detach(), *(grad.clone() for grad in found if grad is not None)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", [nn.LayerNorm, RMSNorm])
def test_gradients_are_those_of_a_kept_norm(kind: Any, precision: str) -> None:
    found, wanted = (normed_gradients(kind(WIDTH, eps=1e-6), precision, kept=kept) for kept in (False, True))
    assert len(found) == len(wanted) >= 5
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_a_norm_is_not_kept_by_the_product_that_reads_it() -> None:
    def kept(source_of: Callable[[Source | None], Source | None]) -> bool:
        made = WeakTensorKeyDictionary()
        normed, source = normalized(nn.LayerNorm(WIDTH), torch.randn(N, WIDTH, requires_grad=True) * 1)
        out = product(nn.Linear(WIDTH, INNER), normed, source_of(source))
        made[normed] = True
        del normed
        assert out.requires_grad
        return bool(len(made))

    assert not kept(lambda source: source)
    assert kept(lambda source: None)


@pytest.mark.parametrize(
    "change",
    [
        lambda linear: linear.requires_grad_(False),
        lambda linear: linear.double(),
        lambda linear: linear.register_forward_hook(lambda *_: None),
        lambda linear: linear.register_forward_pre_hook(lambda *_: None),
    ],
    ids=["frozen", "another dtype", "hook", "hook before"],
)
def test_what_is_no_plain_layer_is_called(change: Callable[[nn.Module], Any]) -> None:
    linear, x = nn.Linear(WIDTH, INNER), torch.randn(N, WIDTH)
    assert forgetting._is_plain(linear, x)
    change(linear)
    assert not forgetting._is_plain(linear, x)
