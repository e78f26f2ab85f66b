"""Adafactor (Shazeer & Stern 2018, arXiv 1804.04235): second moments of matrices from those of rows and columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bigtrain.optim.cost import adafactor_piece, row_piece
from bigtrain.optim.pieces import Workspace
from bigtrain.optim.piecewise import Group, Piece, Piecewise
from bigtrain.optim.quantize import Plain, State

LEAST_SQUARE = 1e-30
"""Added to squared gradients (epsilon 1 of the paper)."""

CLIP = 1.0
"""The largest root mean square of an update."""

DECAY_POWER = -0.8
"""The second moment decays by 1 - step**-0.8."""


class Adafactor(Piecewise):
    """Take Adafactor steps: no first moment, and a factored second one.

    The learning rate is the schedule's, as it is: neither relative to the step nor scaled by the weights (sections 8
    and 9 of the paper are left out), so AdamW's rates serve. Weight decay is decoupled. A tensor of three or more dims
    counts as a matrix, its first dim the rows. State: `step`, and `row` and `column` (means of squared gradients), or
    `variance` for tensors of fewer than two dims.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0, *, master_weights: str = "fp32"
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(params, defaults, state="fp32", master_weights=master_weights)

    def _piece_elements(self, device: str) -> int:
        return adafactor_piece(device, [p.shape for group in self.param_groups for p in group["params"]])

    def _new_state(self, parameter: Tensor, group: Group) -> State:
        if parameter.ndim < 2:
            return Plain("variance").allocate(parameter)
        rows, columns = parameter.shape[0], parameter.shape[1:].numel()
        return {
            "row": torch.zeros(rows, dtype=torch.float32, device=parameter.device),
            "column": torch.zeros(columns, dtype=torch.float32, device=parameter.device),
        }

    def _step_one(self, parameter: Tensor, state: State, group: Group) -> None:
        moments = [tensor for key, tensor in state.items() if key in ("row", "column", "variance")]
        with self._restored(moments):
            self._average(parameter, state)
            self._apply(parameter, state, group)

    def _parts(self, parameter: Tensor, state: State, work: Workspace) -> Iterable[tuple[slice, Piece]]:
        """Yield pieces of whole rows, or elements of a vector, each with its place among them."""
        elements = row_piece(parameter.device.type, parameter.shape)
        width = parameter.shape[1:].numel() if parameter.ndim >= 2 else 1
        start = 0
        for piece in self._pieces(parameter, state, (), work, elements):
            stop = start + piece.size // width
            yield slice(start, stop), piece
            start = stop

    def _average(self, parameter: Tensor, state: State) -> None:
        """Put the squared gradient into the averages."""
        work = self._work(parameter)
        share = torch.pow(state["step"], DECAY_POWER)
        if parameter.ndim < 2:
            for part, piece in self._parts(parameter, state, work):
                state["variance"].view(-1)[part].lerp_(_squares(piece, work), share)
            return
        row = torch.empty_like(state["row"])
        column = torch.zeros_like(state["column"])
        for part, piece in self._parts(parameter, state, work):
            squares = _squares(piece, work).view(-1, len(column))
            torch.mean(squares, 1, out=row[part])
            column += squares.sum(0)
        state["row"].lerp_(row, share)
        state["column"].lerp_(column.div_(len(row)), share)

    def _apply(self, parameter: Tensor, state: State, group: Group) -> None:
        work = self._work(parameter)
        square = torch.zeros((), dtype=torch.float64, device=parameter.device)
        for part, piece in self._parts(parameter, state, work):
            update = _update(part, piece, state, work)
            square += torch.dot(update, update)
        length = torch.sqrt(square / parameter.numel()).clamp_(min=CLIP) / CLIP
        for part, piece in self._parts(parameter, state, work):
            with self._restored(piece.weight):
                update = _update(part, piece, state, work).mul_(group["lr"] / length)
                weight = self.weights.load(piece.weight, work)
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update)
                self.weights.store(piece.weight, work, piece.window)


def _squares(piece: Piece, work: Workspace) -> Tensor:
    gradient = piece.gradient(work)
    return torch.mul(gradient, gradient, out=work.floats("update", piece.size)).add_(LEAST_SQUARE)


def _update(part: slice, piece: Piece, state: State, work: Workspace) -> Tensor:
    """Return gradient / sqrt(second moment) in the work buffer `update`."""
    update = work.floats("update", piece.size)
    if "variance" in state:
        torch.rsqrt(state["variance"].view(-1)[part], out=update)
        return update.mul_(piece.gradient(work))
    row, column = state["row"], state["column"]
    matrix = update.view(-1, len(column))
    torch.mul(piece.gradient(work).view_as(matrix), column.rsqrt(), out=matrix)
    matrix.mul_((row.mean() / row[part]).sqrt_()[:, None])
    return update
