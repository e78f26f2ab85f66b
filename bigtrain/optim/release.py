"""Gradient release: each weight is updated inside the backward pass, and its gradient freed at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from bigtrain.distributed_tensors import local_part
from bigtrain.errors import InputError
from bigtrain.optim.cost import NORM_CHUNK_ELEMENTS
from bigtrain.optim.pieces import split
from bigtrain.optim.piecewise import Piecewise

NORM_ROW_ELEMENTS = 2**12
"""Of a long gradient on a CPU, so many squares are added up at a time."""


class Release:
    """What `release` set up: the norms of this step's gradients, until they are taken, and the hooks."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], optimizer: Optimizer, held: Iterable[nn.Parameter] | None = None
    ) -> None:
        self.optimizer = optimizer
        pairs = _pairs(parameters, held)
        self._held = list(pairs.values())
        self._norms: dict[int, Tensor] = {}
        _check_held(self._held, optimizer)
        _check_alone(optimizer)
        update = _update_of(optimizer)
        self._hooks: list[RemovableHandle] = []
        for place, (parameter, own) in enumerate(pairs.items()):
            hook: Any = parameter.register_post_accumulate_grad_hook  # torch has no types for it
            self._hooks.append(hook(self._hook(place, own, update)))

    def take_norm(self, copies: Sequence[int] = ()) -> Tensor:
        """Return the norm of all gradients since the last call, an fp32 scalar, and begin the next step.

        It is not finite where a gradient was not. The norm is zero before any backward pass. Of sharded parameters it
        is that of this rank's rows; the root of the sum over ranks of its square is the global one, where `copies` say
        how many ranks have the same rows of each parameter.
        """
        places = sorted(self._norms)
        norms = [self._norms[place] for place in places]
        self._norms.clear()
        if not norms:
            device = self._held[0].device if self._held else None
            return torch.zeros((), dtype=torch.float32, device=device)
        return norm_of([norm.to(norms[0].device) for norm in norms], [copies[place] for place in places if copies])

    def remove(self) -> None:
        """Take the hooks away: gradients are kept from now on."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(
        self, place: int, own: nn.Parameter, update: Callable[[Tensor, Tensor], None]
    ) -> Callable[[Tensor], None]:
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
            gradient, parameter.grad = local_part(parameter.grad), None
            if not gradient.is_cuda and torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()  # older torch calls hooks while the copy is under way
            self._norms[place] = norm = gradient_norm(gradient)
            own.grad = gradient
            del gradient
            update(own, norm)
            own.grad = None

        return released


def release(
    parameters: Iterable[nn.Parameter], optimizer: Optimizer, held: Iterable[nn.Parameter] | None = None
) -> Release:
    """Update each of these parameters, and free its gradient, as soon as backward has all of its gradient.

    A shared parameter is updated once, when the gradients of all its uses have been added. Set the learning rate before
    backward; clipping by the global norm is impossible, since that is known only afterwards. Only one backward pass may
    run between two calls of `take_norm`; the second raises InputError.

    `held` are what the optimizer has instead of sharded parameters, in their order: this rank's rows of each, in the
    same memory. Their hooks are run by torch's `fully_shard` when it has reduced a block's gradients, of which
    each goes when it was used, and the memory that they share with the block's last.

    Raises InputError for a parameter that the optimizer does not have: its gradient would be lost; and for an optimizer
    which would have to ask other ranks about their rows inside the backward pass.

    bigtrain's optimizers leave a parameter whose gradient is not finite as it is (others may have been changed by
    then), and all of them where their `found_inf` was set to 1 before. Any other torch optimizer is stepped while the
    parameter is the only one with a gradient, unguarded: the same update wherever it treats parameters one by one.
    """
    return Release(parameters, optimizer, held)


def global_norm(gradients: Sequence[Tensor], device: torch.device, copies: Sequence[int] = ()) -> Tensor:
    """Return the 2-norm of all gradients together, fp32, whatever their dtypes; `copies` as in `norm_of`."""
    if not gradients:
        return torch.zeros((), device=device)
    if gradients[0].is_cuda:  # a kernel for many tensors, where one for each would keep the host busy
        norms = torch._foreach_norm(list(gradients), 2, torch.float32)
    else:
        norms = tuple(gradient_norm(gradient) for gradient in gradients)
    return norm_of(norms, copies).to(device)


def gradient_norm(gradient: Tensor) -> Tensor:
    """Return a gradient's norm as an fp32 scalar on its device, without a copy of the whole."""
    if gradient.dtype == torch.float32 or not gradient.numel():
        return _norm_by_rows(gradient.float())
    parts = split(gradient.contiguous(), NORM_CHUNK_ELEMENTS)
    return _norm(torch.stack([_norm_by_rows(part.float()) for part in parts]))


def norm_of(norms: Sequence[Tensor], copies: Sequence[int] = ()) -> Tensor:
    """Return the norm of gradients from theirs, each divided by the root of how many ranks have the same one."""
    together = torch.stack(list(norms))
    if any(count > 1 for count in copies):
        together = together * torch.tensor([count**-0.5 for count in copies], device=together.device)
    return _norm(together)


def _norm_by_rows(gradient: Tensor) -> Tensor:
    """Return the norm from those of short rows.

    A CPU's fp32 sum of 31 million squares is off by 0.2%, and otherwise on other ranks; of short rows' by 1e-7.
    """
    if gradient.is_cuda or gradient.numel() <= NORM_ROW_ELEMENTS:
        return _norm(gradient)
    flat = gradient.contiguous().view(-1)
    whole = len(flat) // NORM_ROW_ELEMENTS * NORM_ROW_ELEMENTS
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_ROW_ELEMENTS), dim=1)
    return _norm(torch.cat([rows, _norm(flat[whole:])[None]]))


def _pairs(parameters: Iterable[nn.Parameter], held: Iterable[nn.Parameter] | None) -> dict[nn.Parameter, nn.Parameter]:
    """Return what the optimizer has of each parameter that is trained, a shared one once."""
    parameters = list(parameters)
    pairs = zip(parameters, parameters if held is None else held, strict=True)
    return {parameter: own for parameter, own in pairs if parameter.requires_grad}


def _check_alone(optimizer: Optimizer) -> None:
    if getattr(optimizer, "exchange", None) is not None and not getattr(optimizer, "elementwise", True):
        name = type(optimizer).__name__
        raise InputError(
            f"optimizer.gradient_release: {name} needs what other ranks have of a parameter, which are not asked "
            "inside backward; use optimizer.gradient_release=false, optimizer.name=adamw, or sharding.zero_stage=0"
        )


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
