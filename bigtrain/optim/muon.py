"""Muon: momentum whose matrices are made orthogonal (kellerjordan.github.io/posts/muon), AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from bigtrain.optim.adamw import AdamW
from bigtrain.optim.exchange import Exchange
from bigtrain.optim.pieces import split
from bigtrain.optim.piecewise import Group, rms_scale
from bigtrain.optim.quantize import Codec, State

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the iteration, chosen for a steep slope at 0: most singular values end between 0.7 and 1.2."""

ITERATIONS = 5


class Muon(AdamW):
    """Take Muon steps in groups with `orthogonal: True`, which hold matrices of two dims; AdamW steps in the others.

    The momentum is Nesterov's. The orthogonal direction is multiplied by 0.2 * sqrt(max(rows, columns)), so that
    AdamW's learning rates and weight decays serve (Liu et al. 2025, arXiv 2502.16982). Embeddings and heads belong to
    AdamW. The iteration runs in fp32 on the CPU and in bf16 on a GPU. State of a matrix: `step`, `momentum`, and by
    format `momentum_scale`, `remainder`.

    Of matrices whose rows are on several ranks each rank orthogonalises its share, whole, and sends the rows back.
    """

    elementwise: ClassVar[bool] = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        momentum: float = 0.95,
        *,
        state: str = "fp32",
        master_weights: str = "fp32",
    ) -> None:
        self._momentum = momentum
        super().__init__(params, lr, betas, eps, weight_decay, state=state, master_weights=master_weights)

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters; a group may say `orthogonal` and `momentum`."""
        super().add_param_group({"orthogonal": False, "momentum": self._momentum, **param_group})

    def _is_whole(self, parameter: Tensor, group: Group) -> bool:
        return not group["orthogonal"] and super()._is_whole(parameter, group)

    def _new_state(self, parameter: Tensor, group: Group) -> State:
        if not group["orthogonal"]:
            return super()._new_state(parameter, group)
        return self._momentum_codec(parameter).allocate(parameter)

    def moments(self, parameter: Tensor) -> dict[str, str]:
        """Return the key of the momentum of a matrix, those of AdamW's moments for the rest."""
        orthogonal = self.param_groups[self._groups[parameter]]["orthogonal"]
        return {"momentum": "first"} if orthogonal else super().moments(parameter)

    def _momentum_codec(self, parameter: Tensor) -> Codec:
        return self._codec("momentum", "first", parameter)

    def _step_all(self, parameters: list[Tensor], group: Group) -> None:
        if self.exchange is None or not group["orthogonal"]:
            super()._step_all(parameters, group)
            return
        for hand in self.exchange.hands(parameters):
            self._step_dealt(hand, group, self.exchange)

    def _step_dealt(self, hand: Sequence[Tensor], group: Group, exchange: Exchange) -> None:
        """Step matrices of which each rank has rows, at most one matrix a rank."""
        states = [self._begin(parameter, group) for parameter in hand]
        sizes = [parameter.numel() for parameter in hand]
        rows = torch.empty(sum(sizes), dtype=torch.float32, device=self._device(hand[0]))
        for parameter, state, direction in zip(hand, states, torch.split(rows, sizes), strict=True):
            self._average(parameter, state, group, direction)
        dealt = exchange.deal(hand, rows)
        if dealt is not None:
            dealt = orthogonalised(dealt)
        rows = rows.view(iterated_dtype(rows.device))[: len(rows)]  # the same memory, of which half may do
        exchange.take_back(hand, dealt, rows)
        for parameter, state, update in zip(hand, states, torch.split(rows, sizes), strict=True):
            self._move(parameter, state, group, update, rms_scale(*exchange.whole(parameter)))
            self._end(state)

    def _step_one(self, parameter: Tensor, state: State, group: Group) -> None:
        if not group["orthogonal"]:
            super()._step_one(parameter, state, group)
            return
        direction = torch.empty_like(parameter, dtype=torch.float32, device=self._device(parameter))
        self._average(parameter, state, group, direction)
        self._move(parameter, state, group, orthogonalised(direction), rms_scale(*parameter.shape))

    def _move(self, parameter: Tensor, state: State, group: Group, update: Tensor, scale: float) -> None:
        """Decay the weights and take `scale` times the update from them."""
        work = self._work(parameter)
        decay = 1 - group["lr"] * group["weight_decay"]
        rate = group["lr"] * scale
        parts = split(update, work.elements)
        for piece, part in zip(self._pieces(parameter, state, (), work), parts, strict=True):
            with self._restored(piece.weight):
                weight = self.weights.load(piece.weight, work)
                weight.mul_(decay).add_(part, alpha=-rate)
                self.weights.store(piece.weight, work, piece.window)

    def _average(self, parameter: Tensor, state: State, group: Group, direction: Tensor) -> None:
        """Put the gradient into the momentum; write the direction, fp32."""
        codec, momentum = self._momentum_codec(parameter), group["momentum"]
        work = self._work(parameter)
        parts = split(direction, work.elements)
        for piece, part in zip(self._pieces(parameter, state, (codec,), work), parts, strict=True):
            (views,) = piece.moments
            with self._restored(views):
                average = codec.load(views, piece.size, work)
                gradient = piece.gradient(work)
                average.lerp_(gradient, 1 - momentum)
                torch.lerp(gradient, average, momentum, out=part)
                codec.store(views, piece.size, work, piece.window)


def iterated_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which matrices of a device are orthogonalised."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return U V^T of a matrix U S V^T, nearly: its singular values lie between 0.7 and 1.2 instead of at 1.

    Overwrites an fp32 matrix on the CPU. Of two dims, contiguous; zero stays zero.
    """
    a, b, c = QUINTIC
    matrix = matrix.div_(torch.linalg.vector_norm(matrix).clamp_(min=1e-7))
    working = matrix.to(iterated_dtype(matrix.device))
    tall = matrix.shape[0] > matrix.shape[1]
    current, other = working, torch.empty_like(working)
    gram = torch.empty(min(matrix.shape), min(matrix.shape), dtype=working.dtype, device=working.device)
    factor = torch.empty_like(gram)
    for _ in range(ITERATIONS):
        torch.mm(current.T, current, out=gram) if tall else torch.mm(current, current.T, out=gram)
        torch.addmm(gram, gram, gram, beta=b, alpha=c, out=factor)
        if tall:
            torch.addmm(current, current, factor, beta=a, out=other)
        else:
            torch.addmm(current, factor, current, beta=a, out=other)
        current, other = other, current
    return current
