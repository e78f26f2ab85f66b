"""What ranks tell each other in an optimizer's step, where each of them has some rows of every parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from bigtrain.errors import InputError

Shape = tuple[int, ...]

WHOLE_TENSORS = (torch.optim.Adafactor, torch.optim.LBFGS, torch.optim.Muon)
"""Of torch's optimizers, those whose update of an element depends on the others."""


class Exchange:
    """Tell the ranks of a group apart by their rows, and bring together what they know of whole parameters.

    `wholes` has the whole shape of each parameter that this rank keeps rows of. The rows are cut as torch.chunk cuts
    them: as many for each rank, rounded up, so that the last ranks may have fewer, or none; a 0-dim parameter is the
    first rank's. `group` is that of the ranks which have the parameters together, None for all ranks. Each call is one
    collective, which all of them make in the same order, also for parameters of which they have no row.

    Raises InputError for a parameter that has other rows.
    """

    def __init__(self, group: dist.ProcessGroup | None, wholes: Mapping[Tensor, Shape]) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._wholes = {parameter: tuple(whole) for parameter, whole in wholes.items()}
        for parameter, whole in self._wholes.items():
            if self._rows(whole, self.rank) != (math.prod(parameter.shape[:1]), *parameter.shape[1:]):
                raise InputError(
                    f"rank {self.rank} of {self.size} has rows of shape {tuple(parameter.shape)} of a parameter of "
                    f"shape {whole}; cut it by rows, as torch.chunk does"
                )

    def whole(self, parameter: Tensor) -> Shape:
        """Return the whole shape of a parameter. Raises InputError for one that this was not told of."""
        if parameter not in self._wholes:
            raise InputError(
                f"a parameter of shape {tuple(parameter.shape)} was added to the optimizer after its rows were told; "
                "give the exchange the whole shapes of all parameters"
            )
        return self._wholes[parameter]

    def add(self, sums: Tensor) -> Tensor:
        """Add up a tensor over the ranks, in place, and return it."""
        dist.all_reduce(sums, group=self._group)
        return sums

    def hands(self, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Yield parameters by as many as there are ranks, those of like size together, the largest first."""
        ordered = sorted(parameters, key=lambda parameter: -math.prod(self.whole(parameter)))
        for start in range(0, len(ordered), self.size):
            yield ordered[start : start + self.size]

    def deal(self, hand: Sequence[Tensor], rows: Tensor) -> Tensor | None:
        """Return all of the parameter whose place in a hand is this rank's; None where the hand has no such place.

        `rows` is flat: what this rank has of each parameter of the hand, one after another.
        """
        whole = self.whole(hand[self.rank]) if self.rank < len(hand) else None
        dealt = rows.new_empty(math.prod(whole) if whole else 0)
        dist.all_to_all_single(dealt, rows, self._dealt_sizes(whole), self._sizes(hand), group=self._group)
        return dealt.view(whole) if whole else None

    def take_back(self, hand: Sequence[Tensor], dealt: Tensor | None, rows: Tensor) -> None:
        """Fill `rows` as it was for `deal` with this rank's rows of what each rank has made of its parameter."""
        whole = self.whole(hand[self.rank]) if self.rank < len(hand) else None
        flat = rows.new_empty(0) if dealt is None else dealt.view(-1)
        dist.all_to_all_single(rows, flat, self._sizes(hand), self._dealt_sizes(whole), group=self._group)

    def _sizes(self, hand: Sequence[Tensor]) -> list[int]:
        return [parameter.numel() for parameter in hand] + [0] * (self.size - len(hand))

    def _dealt_sizes(self, whole: Shape | None) -> list[int]:
        return [math.prod(self._rows(whole, rank)) if whole else 0 for rank in range(self.size)]

    def _rows(self, whole: Shape, rank: int) -> Shape:
        """Return the shape of a rank's rows; 0-dim parameters count as one row."""
        rows, *width = whole or (1,)
        most = -(-rows // self.size)
        return (min(most, max(0, rows - rank * most)), *width)


def connect(optimizer: Optimizer, exchange: Exchange) -> None:
    """Let an optimizer of rows update them as whole parameters are updated.

    Raises InputError for one that would take the rows for all there is. An optimizer of someone else's is taken for one
    that goes element by element, as most do.
    """
    found: Any = optimizer
    if hasattr(found, "exchange"):
        found.exchange = exchange
    else:
        check_elementwise(optimizer, "sharding.zero_stage", "0")


def check_elementwise(optimizer: Optimizer, key: str, instead: str) -> None:
    """Raise InputError for an optimizer that needs whole parameters where a recipe key gives ranks parts of them."""
    if isinstance(optimizer, WHOLE_TENSORS) or not getattr(optimizer, "elementwise", True):
        raise InputError(
            f"{key}: {type(optimizer).__name__} needs whole parameters, and a rank has parts of them; use "
            f"{'bigtrain.optim.AdamW' if instead == '1' else 'an optimizer of bigtrain.optim'}, or {key}={instead}"
        )
