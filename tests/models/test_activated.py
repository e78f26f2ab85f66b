from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from bigtrain import amp
from bigtrain.models.activated import activated
from bigtrain.models.pointwise import swiglu

N, WIDTH, INNER = 6, 8, 32
GELU = partial(F.gelu, approximate="tanh")


def plainly(activate: Callable[[Tensor], Tensor], x: Tensor, linear: nn.Module) -> Tensor:
    out: Tensor = linear(activate(x))
    return out


def gradients(
    run: Callable[..., Tensor], activate: Callable[[Tensor], Tensor], precision: str = "fp32"
) -> list[Tensor]:
    """Return the output and every gradient of two layers with an activation between them."""
    torch.manual_seed(0)
    up, down = nn.Linear(WIDTH, INNER), nn.Linear(INNER if activate is not swiglu else INNER // 2, WIDTH)
    for layer in (up, down):
        amp.apply(nn.Sequential(layer), precision)
    x = torch.randn(N, WIDTH).to(torch.bfloat16 if precision == "bf16" else torch.float32).requires_grad_()
    out = run(activate, up(x), down)
    out.float().square().sum().backward()  # type: ignore[no-untyped-call]
    found = [x.grad, *(p.grad for layer in (up, down) for p in layer.parameters())]
    return [out.detach(), *(grad for grad in found if grad is not None)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("activate", [GELU, F.gelu, swiglu], ids=["tanh", "erf", "swiglu"])
def test_gradients_are_those_of_a_kept_activation(activate: Callable[[Tensor], Tensor], precision: str) -> None:
    found, wanted = gradients(activated, activate, precision), gradients(plainly, activate, precision)
    assert len(found) == len(wanted) == 6
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def kept(run: Callable[..., Tensor]) -> bool:
    """Tell whether the activation lives on once its product is made."""
    made = WeakTensorKeyDictionary()

    def noted(x: Tensor) -> Tensor:
        out = F.gelu(x)
        made[out] = True
        return out

    out = run(noted, torch.randn(N, INNER, requires_grad=True) * 1, nn.Linear(INNER, WIDTH))
    assert out.requires_grad
    return bool(len(made))


def test_the_activation_is_not_kept() -> None:
    assert not kept(activated)
    assert kept(plainly)


def test_without_gradients_nothing_is_noted() -> None:
    with torch.no_grad():
        out = activated(F.gelu, torch.randn(N, INNER), nn.Linear(INNER, WIDTH))
    assert not out.requires_grad


def test_a_recomputed_block_runs_the_activation_twice_not_three_times() -> None:
    """It is made again with its block; the hooks of recomputation stay on top of the stack."""
    runs, down = [], nn.Linear(INNER, WIDTH)

    def counted(x: Tensor) -> Tensor:
        runs.append(1)
        return F.gelu(x)

    def block(x: Tensor) -> Tensor:
        return activated(counted, x * 1, down)

    x = torch.randn(N, INNER, requires_grad=True)
    out = checkpoint(block, x, use_reentrant=False)
    assert isinstance(out, Tensor)
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert len(runs) == 2 and x.grad is not None


def test_the_backward_pass_may_run_again() -> None:
    x = torch.randn(N, INNER, requires_grad=True)
    down = nn.Linear(INNER, WIDTH)
    loss = activated(F.gelu, x * 1, down).sum()
    first = torch.autograd.grad(loss, down.weight, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, down.weight)[0])
