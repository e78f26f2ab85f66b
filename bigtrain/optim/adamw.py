"""AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) with states of 32 to 4 bits and weights of 32 to 16."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from bigtrain.optim.piecewise import Group, Piecewise
from bigtrain.optim.quantize import Plain, State
from bigtrain.optim.weights import Full


class AdamW(Piecewise):
    """Take AdamW steps.

    All arithmetic is that of torch's fused kernel. With fp32 states, weights and gradients it is called on the tensors
    themselves, and results are bitwise those of `torch.optim.AdamW(fused=True)`; otherwise on fp32 copies of one piece
    after another. States: `step`, `exp_avg`, `exp_avg_sq`, and by format `exp_avg_scale`, `exp_avg_sq_scale`,
    `remainder`.
    """

    elementwise: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state: str = "fp32",
        master_weights: str = "fp32",
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, state=state, master_weights=master_weights)

    def _step_all(self, parameters: list[Tensor], group: Group) -> None:
        whole: dict[torch.device, list[Tensor]] = {}
        rest: list[Tensor] = []
        for parameter in parameters:
            if self._is_whole(parameter, group):
                whole.setdefault(parameter.device, []).append(parameter)
            else:
                rest.append(parameter)
        for together in whole.values():
            self._step_whole(together, group)
        super()._step_all(rest, group)

    def _is_whole(self, parameter: Tensor, group: Group) -> bool:
        """Tell whether a parameter, its gradient and its states are all fp32, and on the device."""
        assert parameter.grad is not None
        moments = self._moments(parameter)
        return (
            self.staging is None
            and isinstance(self.weights, Full)
            and self.weights.dtype == torch.float32 == parameter.grad.dtype
            and all(type(codec) is Plain for codec in moments)
        )

    def _step_whole(self, parameters: list[Tensor], group: Group) -> None:
        states = [self._state_of(parameter, group) for parameter in parameters]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        gradients = [p.grad for p in parameters if p.grad is not None]
        first, second = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        self._kernel(parameters, gradients, first, second, steps, group)
        if self.found_inf is not None:
            torch._foreach_sub_(steps, [self.found_inf] * len(steps))

    def _step_one(self, parameter: Tensor, state: State, group: Group) -> None:
        first_codec, second_codec = codecs = self._moments(parameter)
        work = self._work(parameter)
        steps = [state["step"]]
        for piece in self._pieces(parameter, state, codecs, work):
            first_views, second_views = piece.moments
            with self._restored([*piece.weight, *first_views, *second_views]):
                weight = self.weights.load(piece.weight, work)
                gradient = piece.gradient(work)
                first = first_codec.load(first_views, piece.size, work)
                second = second_codec.load(second_views, piece.size, work)
                self._kernel([weight], [gradient], [first], [second], steps, group)
                self.weights.store(piece.weight, work, piece.window)
                first_codec.store(first_views, piece.size, work, piece.window)
                second_codec.store(second_views, piece.size, work, piece.window)

    def _kernel(
        self,
        weights: list[Tensor],
        gradients: list[Tensor],
        first: list[Tensor],
        second: list[Tensor],
        steps: list[Tensor],
        group: Group,
    ) -> None:
        torch._fused_adamw_(
            weights,
            gradients,
            first,
            second,
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=None,
            found_inf=self.found_inf,
        )

    def _new_state(self, parameter: Tensor, group: Group) -> State:
        first, second = self._moments(parameter)
        return {**first.allocate(parameter), **second.allocate(parameter)}
