"""LAMB: Adam whose step on each tensor is as long as the tensor's own norm says (You et al. 2019, arXiv 1904.00962)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bigtrain.optim.pieces import Workspace
from bigtrain.optim.piecewise import Group, Piece, Piecewise, bias_corrections
from bigtrain.optim.quantize import Codec, State

Corrections = tuple[Tensor, Tensor]
"""What `bias_corrections` returns."""


class Lamb(Piecewise):
    """Take LAMB steps.

    Follows algorithm 2 of the paper with bias correction and decoupled weight decay. Tensors without weight decay
    (biases, normalizations) take plain Adam steps: the authors leave the same tensors out of both. The gradient is not
    normalized here; clip it before, as the published BERT runs do (max_grad_norm 1.0).

    A tensor whose norm, or whose update's norm, is zero takes a step of ratio 1. A tensor is gone through twice, for
    its norms and for its weights; with states below fp32 the second time reads the moments as they were rounded.
    Ranks that have rows of the tensors add up the norms of all of a group's at once.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        state: str = "fp32",
        master_weights: str = "fp32",
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, state=state, master_weights=master_weights)

    def _step_all(self, parameters: list[Tensor], group: Group) -> None:
        if self.exchange is None or not group["weight_decay"] or not parameters:
            super()._step_all(parameters, group)
            return
        states = [self._begin(parameter, group) for parameter in parameters]
        corrections = [bias_corrections(state["step"], group["betas"]) for state in states]
        steps = list(zip(parameters, states, corrections, strict=True))
        squares = torch.stack([self._average(*step, group) for step in steps])
        ratios = _trust_ratio(self.exchange.add(squares))
        for step, ratio in zip(steps, ratios, strict=True):
            self._move(*step, group, group["lr"] * ratio)
        for state in states:
            self._end(state)

    def _step_one(self, parameter: Tensor, state: State, group: Group) -> None:
        step = parameter, state, bias_corrections(state["step"], group["betas"])
        squares = self._average(*step, group)
        scale = group["lr"] * _trust_ratio(squares) if group["weight_decay"] else group["lr"]
        self._move(*step, group, scale)

    def _average(self, parameter: Tensor, state: State, corrections: Corrections, group: Group) -> Tensor:
        """Put the gradient into the moments; return the squared norms of the weights and of their update, fp64."""
        codecs, work = self._moments(parameter), self._work(parameter)
        squares = torch.zeros(2, dtype=torch.float64, device=self._device(parameter))
        for piece in self._pieces(parameter, state, codecs, work):
            with self._restored([view for views in piece.moments for view in views]):
                moments = self._averaged(piece, codecs, work, group)
                weight = self.weights.load(piece.weight, work)
                update = _direction(moments, weight, corrections, group, work)
                squares += torch.stack([torch.dot(weight, weight), torch.dot(update, update)])
                for codec, views in zip(codecs, piece.moments, strict=True):
                    codec.store(views, piece.size, work, piece.window)
        return squares

    def _move(
        self, parameter: Tensor, state: State, corrections: Corrections, group: Group, scale: Tensor | float
    ) -> None:
        """Take `scale` times the update from the weights."""
        codecs, work = self._moments(parameter), self._work(parameter)
        for piece in self._pieces(parameter, state, codecs, work):
            with self._restored(piece.weight):
                moments = self._loaded(piece, codecs, work)
                weight = self.weights.load(piece.weight, work)
                weight.sub_(_direction(moments, weight, corrections, group, work).mul_(scale))
                self.weights.store(piece.weight, work, piece.window)

    def _averaged(self, piece: Piece, codecs: tuple[Codec, Codec], work: Workspace, group: Group) -> list[Tensor]:
        """Return both moments of a piece with its gradient in them."""
        beta1, beta2 = group["betas"]
        first, second = moments = self._loaded(piece, codecs, work)
        gradient = piece.gradient(work)
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        return moments

    @staticmethod
    def _loaded(piece: Piece, codecs: tuple[Codec, Codec], work: Workspace) -> list[Tensor]:
        return [codec.load(views, piece.size, work) for codec, views in zip(codecs, piece.moments, strict=True)]

    def _new_state(self, parameter: Tensor, group: Group) -> State:
        first, second = self._moments(parameter)
        return {**first.allocate(parameter), **second.allocate(parameter)}


def fused_lamb(groups: list[Group], **options: Any) -> Optimizer:
    """Return NVIDIA apex's LAMB, with what `Lamb` does: no clipping of its own, Adam steps without weight decay.

    Only for fp32 on CUDA where `kernels.nvidia_apex_present()`. Its step count, which apex keeps in the group, is
    mirrored in each parameter's state, so that it is saved and a parameter may be stepped by itself.
    `found_inf` works as with `Lamb`, but is waited for.
    """
    from apex.optimizers import FusedLAMB

    class Apex(FusedLAMB):  # type: ignore[misc]
        found_inf: Tensor | None = None
        elementwise = False

        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            loss = closure() if closure is not None else None
            if self.found_inf is not None and bool(self.found_inf):
                return loss
            for group in self.param_groups:
                counts = [self.state[p].get("step", 0) for p in group["params"] if p.grad is not None]
                group["step"] = int(counts[0]) if counts else 0
            super().step()
            for group in self.param_groups:
                for parameter in (p for p in group["params"] if p.grad is not None):
                    self.state[parameter]["step"] = group["step"]
            return loss

    # Infinite, since apex divides by its max_grad_norm whenever the gradient is longer: 0 would not mean off.
    return Apex(groups, **options, adam_w_mode=True, grad_averaging=True, max_grad_norm=float("inf"), use_nvlamb=False)


def _direction(
    moments: list[Tensor], weight: Tensor, corrections: Corrections, group: Group, work: Workspace
) -> Tensor:
    """Return Adam's step of length 1, weight decay added, in the work buffer `update`."""
    first, second = moments
    update = torch.sqrt(second, out=work.floats("update", len(second)))
    update.div_(corrections[1].sqrt()).add_(group["eps"])
    torch.div(first, update, out=update).div_(corrections[0])
    return update.add_(weight, alpha=group["weight_decay"]) if group["weight_decay"] else update


def _trust_ratio(squares: Tensor) -> Tensor:
    """Return |weights| / |update| from squares in the last dim, 1 where either is zero, without the host waiting."""
    weight, update = squares.sqrt().unbind(-1)
    ratio = weight / update
    return torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio))
