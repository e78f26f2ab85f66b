"""LAMB: Adam whose step on each tensor is as long as the tensor's own norm says (You et al. 2019, arXiv 1904.00962)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

BUNCH_ELEMENTS = 2**24
"""Elements that are updated in one call, unless a single tensor has more."""


class Lamb(Optimizer):
    """Take LAMB steps, many tensors in one call.

    Follows algorithm 2 of the paper with bias correction and decoupled weight decay. Tensors without weight decay
    (biases, normalizations) take plain Adam steps: the authors leave the same tensors out of both. The gradient is not
    normalized here; clip it before, as the published BERT runs do (max_grad_norm 1.0).

    A tensor whose norm, or whose update's norm, is zero takes a step of ratio 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; return what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for together in _bunches(parameters):
                self._step_group(together, group)
        return loss

    def _step_group(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        gradients = [p.grad for p in parameters if p.grad is not None]
        states = [self._state_of(p) for p in parameters]
        for state in states:
            state["step"] += 1
        first = [state["exp_avg"] for state in states]
        second = [state["exp_avg_sq"] for state in states]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        updates = self._directions(first, second, states, group)
        if group["weight_decay"]:
            torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
            ratios = _trust_ratios(parameters, updates)
            torch._foreach_mul_(updates, ratios)
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    @staticmethod
    def _directions(
        first: list[Tensor], second: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> list[Tensor]:
        beta1, beta2 = group["betas"]
        roots = list(torch._foreach_sqrt(second))
        torch._foreach_div_(roots, [(1 - beta2 ** state["step"]) ** 0.5 for state in states])
        torch._foreach_add_(roots, group["eps"])
        directions = list(torch._foreach_div(first, roots))
        torch._foreach_div_(directions, [1 - beta1 ** state["step"] for state in states])
        return directions


def _bunches(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in bunches of bounded size: a step's temporaries are twice the size of a bunch."""
    bunch: list[Tensor] = []
    for parameter in parameters:
        if bunch and sum(map(Tensor.numel, bunch)) + parameter.numel() > BUNCH_ELEMENTS:
            yield bunch
            bunch = []
        bunch.append(parameter)
    if bunch:
        yield bunch


def _trust_ratios(parameters: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
    """Return |parameter| / |update| for each tensor, 1 where either is zero, without a host synchronisation."""
    ratios = torch.stack(torch._foreach_norm(parameters)) / torch.stack(torch._foreach_norm(updates))
    usable = torch.isfinite(ratios) & (ratios > 0)
    return list(torch.where(usable, ratios, torch.ones_like(ratios)).unbind())
