"""Adafactor (Shazeer & Stern 2018, arXiv 1804.04235): second moments of matrices from those of rows and columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bigtrain.optim.cost import adafactor_piece, exchanged_elements, row_piece
from bigtrain.optim.exchange import Exchange
from bigtrain.optim.pieces import Workspace
from bigtrain.optim.piecewise import Group, Piece, Piecewise
from bigtrain.optim.quantize import Plain, State

LEAST_SQUARE = 1e-30
"""Added to squared gradients (epsilon 1 of the paper)."""

CLIP = 1.0
"""The largest root mean square of an update."""

DECAY_POWER = -0.8
"""The second moment decays by 1 - step**-0.8."""


Step = tuple[Tensor, State]
"""A parameter that is to be updated, and its state."""


class Adafactor(Piecewise):
    """Take Adafactor steps: no first moment, and a factored second one.

    The learning rate is the schedule's, as it is: neither relative to the step nor scaled by the weights (sections 8
    and 9 of the paper are left out), so AdamW's rates serve. Weight decay is decoupled. A tensor of three or more dims
    counts as a matrix, its first dim the rows. State: `step`, and `row` and `column` (means of squared gradients), or
    `variance` for tensors of fewer than two dims. Ranks that have rows of the tensors keep `row` of these, and `column`
    whole; they add up the columns of as many matrices at a time as `cost.EXCHANGED_ELEMENTS` hold.
    """

    whole_keys = ("step", "column")
    row_keys = ("row",)

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0, *, master_weights: str = "fp32"
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(params, defaults, state="fp32", master_weights=master_weights)

    def moments(self, parameter: Tensor) -> dict[str, str]:
        """Return nothing: there is one format."""
        return {}

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

    def _step_all(self, parameters: list[Tensor], group: Group) -> None:
        if self.exchange is None or not parameters:
            super()._step_all(parameters, group)
            return
        steps = [(parameter, self._begin(parameter, group)) for parameter in parameters]
        means: dict[Tensor, Tensor] = {}
        for step in (step for step in steps if step[0].ndim < 2):
            self._average(*step)
        for bucket in _buckets([step for step in steps if step[0].ndim >= 2], self._exchanged_elements()):
            means.update(self._average_bucket(bucket, self.exchange))
        squares = torch.stack([self._square(*step, means.get(step[0])) for step in steps])
        for (parameter, state), square in zip(steps, self.exchange.add(squares), strict=True):
            mean_square = square / math.prod(self.exchange.whole(parameter))
            self._apply(parameter, state, group, means.get(parameter), mean_square)
            self._end(state)

    def _step_one(self, parameter: Tensor, state: State, group: Group) -> None:
        mean = None
        if parameter.ndim < 2:
            self._average(parameter, state)
        else:
            column = torch.zeros_like(state["column"])
            self._add_rows(parameter, state, column)
            self._set_column(state, column.div_(len(state["row"])))
            mean = state["row"].mean()
        square = self._square(parameter, state, mean)
        self._apply(parameter, state, group, mean, square / parameter.numel())

    def _exchanged_elements(self) -> int:
        return exchanged_elements([p.shape for group in self.param_groups for p in group["params"]])

    def _average_bucket(self, bucket: Sequence[Step], exchange: Exchange) -> Iterator[tuple[Tensor, Tensor]]:
        """Put squared gradients into the averages of matrices whose columns are added up together over the ranks.

        Yields each matrix with the mean of all its rows' averages.
        """
        sizes = [1 + len(state["column"]) for _, state in bucket]
        sums = self._work(bucket[0][0]).room("columns", self._exchanged_elements())[: sum(sizes)].zero_()
        parts = torch.split(sums, sizes)
        for (parameter, state), part in zip(bucket, parts, strict=True):
            self._add_rows(parameter, state, part[1:])
            torch.sum(state["row"], 0, out=part[0])
        exchange.add(sums)
        for (parameter, state), part in zip(bucket, parts, strict=True):
            means = part.div_(exchange.whole(parameter)[0])
            self._set_column(state, means[1:])
            yield parameter, means[0].clone()

    def _parts(self, parameter: Tensor, state: State, work: Workspace) -> Iterable[tuple[slice, Piece]]:
        """Yield pieces of whole rows, or elements of a vector, each with its place among them."""
        elements = row_piece(self._device(parameter).type, parameter.shape)
        width = parameter.shape[1:].numel() if parameter.ndim >= 2 else 1
        start = 0
        for piece in self._pieces(parameter, state, (), work, elements):
            stop = start + piece.size // width
            yield slice(start, stop), piece
            start = stop

    def _average(self, parameter: Tensor, state: State) -> None:
        """Put the squared gradient of a vector into its average."""
        work, share = self._work(parameter), _share(state)
        with self._restored([state["variance"]]):
            for part, piece in self._parts(parameter, state, work):
                state["variance"].view(-1)[part].lerp_(_squares(piece, work), share)

    def _add_rows(self, parameter: Tensor, state: State, column: Tensor) -> None:
        """Put the squared gradient of a matrix into the averages of its rows, and add it up into `column`."""
        work = self._work(parameter)
        row = torch.empty_like(state["row"])
        for part, piece in self._parts(parameter, state, work):
            squares = _squares(piece, work).view(-1, len(column))
            torch.mean(squares, 1, out=row[part])
            column += squares.sum(0)
        with self._restored([state["row"]]):
            state["row"].lerp_(row, _share(state))

    def _set_column(self, state: State, means: Tensor) -> None:
        """Put the means of all rows into the averages of the columns."""
        with self._restored([state["column"]]):
            state["column"].lerp_(means, _share(state))

    def _square(self, parameter: Tensor, state: State, mean: Tensor | None) -> Tensor:
        """Return the sum of the update's squares, fp64; `mean` is that of a matrix's rows."""
        work = self._work(parameter)
        square = torch.zeros((), dtype=torch.float64, device=self._device(parameter))
        for part, piece in self._parts(parameter, state, work):
            update = _update(part, piece, state, work, mean)
            square += torch.dot(update, update)
        return square

    def _apply(self, parameter: Tensor, state: State, group: Group, mean: Tensor | None, mean_square: Tensor) -> None:
        """Take the update from the weights, shortened where its mean square is above that of `CLIP`."""
        work = self._work(parameter)
        length = torch.sqrt(mean_square).clamp_(min=CLIP) / CLIP
        for part, piece in self._parts(parameter, state, work):
            with self._restored(piece.weight):
                update = _update(part, piece, state, work, mean).mul_(group["lr"] / length)
                weight = self.weights.load(piece.weight, work)
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update)
                self.weights.store(piece.weight, work, piece.window)


def _buckets(steps: Sequence[Step], elements: int) -> Iterator[list[Step]]:
    """Yield matrices by as many as have their columns, and one number more, in so many elements."""
    bucket: list[Step] = []
    left = elements
    for step in steps:
        size = 1 + len(step[1]["column"])
        if size > left:
            yield bucket
            bucket, left = [], elements
        bucket.append(step)
        left -= size
    if bucket:
        yield bucket


def _share(state: State) -> Tensor:
    """Return the weight of this step's squares in the averages."""
    return torch.pow(state["step"], DECAY_POWER)


def _squares(piece: Piece, work: Workspace) -> Tensor:
    gradient = piece.gradient(work)
    return torch.mul(gradient, gradient, out=work.floats("update", piece.size)).add_(LEAST_SQUARE)


def _update(part: slice, piece: Piece, state: State, work: Workspace, mean: Tensor | None) -> Tensor:
    """Return gradient / sqrt(second moment) in the work buffer `update`; `mean` is that of a matrix's rows."""
    update = work.floats("update", piece.size)
    if mean is None:
        torch.rsqrt(state["variance"].view(-1)[part], out=update)
        return update.mul_(piece.gradient(work))
    row, column = state["row"], state["column"]
    matrix = update.view(-1, len(column))
    torch.mul(piece.gradient(work).view_as(matrix), column.rsqrt(), out=matrix)
    matrix.mul_((mean / row[part]).sqrt_()[:, None])
    return update
