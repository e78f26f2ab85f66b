"""Gradient release: each weight is updated inside the backward pass, and its gradient freed at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from bigtrain.errors import InputError
from bigtrain.optim.cost import NORM_CHUNK_ELEMENTS
from bigtrain.optim.pieces import split
from bigtrain.optim.piecewise import Piecewise


class Release:
    """What `release` set up: the norms of this step's gradients, until they are taken, and the hooks."""

    def __init__(self, parameters: Iterable[nn.Parameter], optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._parameters = [p for p in dict.fromkeys(parameters) if p.requires_grad]
        self._norms: dict[int, Tensor] = {}
        _check_held(self._parameters, optimizer)
        update = _update_of(optimizer)
        self._hooks: list[RemovableHandle] = []
        for place, parameter in enumerate(self._parameters):
            hook: Any = parameter.register_post_accumulate_grad_hook  # torch has no types for it
            self._hooks.append(hook(self._hook(place, update)))

    def take_norm(self) -> Tensor:
        """Return the global norm of the gradients since the last call, an fp32 scalar, and begin the next step.

        It is not finite where a gradient was not. The norm is zero before any backward pass.
        """
        norms = [self._norms[place] for place in sorted(self._norms)]
        self._norms.clear()
        if not norms:
            device = self._parameters[0].device if self._parameters else None
            return torch.zeros((), dtype=torch.float32, device=device)
        return _norm(torch.stack([norm.to(norms[0].device) for norm in norms]))

    def remove(self) -> None:
        """Take the hooks away: gradients are kept from now on."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(self, place: int, update: Callable[[Tensor, Tensor], None]) -> Callable[[Tensor], None]:
        def released(parameter: Tensor) -> None:
            if place in self._norms:
                raise InputError(
                    f"gradient release: a parameter of shape {tuple(parameter.shape)} got a second gradient in one "
                    "step; weights are updated inside backward, so gradients cannot be accumulated: make the "
                    "micro-batch the whole batch, or set optimizer.gradient_release=false"
                )
            if parameter.grad is None:
                raise InputError(
                    f"gradient release: the gradient of a parameter of shape {tuple(parameter.shape)} is already gone: "
                    "release was called twice; call remove() on what it first returned"
                )
            self._norms[place] = norm = gradient_norm(parameter.grad)
            update(parameter, norm)
            parameter.grad = None

        return released


def release(parameters: Iterable[nn.Parameter], optimizer: Optimizer) -> Release:
    """Update each of these parameters, and free its gradient, as soon as backward has all of its gradient.

    A shared parameter is updated once, when the gradients of all its uses have been added. Set the learning rate before
    backward; clipping by the global norm is impossible, since that is known only afterwards. Only one backward pass may
    run between two calls of `take_norm`; the second raises InputError.

    Raises InputError for a parameter that the optimizer does not have: its gradient would be lost.

    bigtrain's optimizers leave a parameter whose gradient is not finite as it is (others may have been changed by
    then), and all of them where their `found_inf` was set to 1 before. Any other torch optimizer is stepped while the
    parameter is the only one with a gradient, unguarded: the same update wherever it treats parameters one by one.
    """
    return Release(parameters, optimizer)


def gradient_norm(gradient: Tensor) -> Tensor:
    """Return a gradient's norm as an fp32 scalar on its device, without a copy of the whole."""
    if gradient.dtype == torch.float32:
        return _norm(gradient)
    parts = split(gradient.contiguous(), NORM_CHUNK_ELEMENTS)
    return _norm(torch.stack([_norm(part.float()) for part in parts]))


def _check_held(parameters: Iterable[nn.Parameter], optimizer: Optimizer) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in parameters:
        if id(parameter) not in held:
            raise InputError(
                f"gradient release: a parameter of shape {tuple(parameter.shape)} is not among those of "
                f"{type(optimizer).__name__}; give both the same parameters, or freeze it with requires_grad_(False)"
            )


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor)
    return norm


def _update_of(optimizer: Optimizer) -> Callable[[Tensor, Tensor], None]:
    if not isinstance(optimizer, Piecewise):

        def step(parameter: Tensor, norm: Tensor) -> None:
            optimizer.step()

        return step

    def update(parameter: Tensor, norm: Tensor) -> None:
        before = optimizer.found_inf
        bad = torch.isfinite(norm).logical_not_().float()
        optimizer.found_inf = bad if before is None else torch.maximum(before.to(bad.device), bad)
        try:
            optimizer.update(parameter)
        finally:
            optimizer.found_inf = before

    return update
