"""The formats in which weights are kept, by the names of `amp.master_weights`.

Each reads a flat piece of a parameter as fp32 and writes it back. Rounding goes up or down by the noise of
`pieces.Workspace`, in proportion to the distance, so that updates smaller than the last bit are not lost.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from bigtrain.errors import InputError
from bigtrain.optim.cost import MASTER_WEIGHTS, check_known
from bigtrain.optim.pieces import Views, Window, Workspace, shift, split
from bigtrain.optim.quantize import State

BUFFER = "weight"
REMAINDER = "remainder"
MASTER = "master"


class WeightFormat(Protocol):
    """How a parameter's weights are kept in it and in its optimizer state."""

    dtype: torch.dtype

    def allocate(self, parameter: Tensor) -> State:
        """Return what the format adds to the state of a parameter whose weights stand in it alone."""

    def split(self, parameter: Tensor, state: State, elements: int) -> list[Views]:
        """Return, for each piece of so many elements, views of all that `store` writes."""

    def load(self, views: Views, work: Workspace) -> Tensor:
        """Return a piece as fp32, to be changed in place: the parameter itself, or the work buffer `weight`."""

    def store(self, views: Views, work: Workspace, window: Window) -> None:
        """Write back the piece that was loaded last, rounded by the noise of a window."""


class Full:
    """`fp32`: the parameter itself."""

    dtype = torch.float32

    def allocate(self, parameter: Tensor) -> State:
        """Return nothing."""
        return {}

    def split(self, parameter: Tensor, state: State, elements: int) -> list[Views]:
        """Return the pieces of the parameter."""
        return [(part,) for part in split(parameter, elements)]

    def load(self, views: Views, work: Workspace) -> Tensor:
        """Return the piece of the parameter."""
        return views[0]

    def store(self, views: Views, work: Workspace, window: Window) -> None:
        """Do nothing: the parameter was changed in place."""


class Rounded(Full):
    """`none`: the bf16 parameter, nothing else."""

    dtype = torch.bfloat16

    def load(self, views: Views, work: Workspace) -> Tensor:
        """Return the piece in the work buffer."""
        return work.floats(BUFFER, len(views[0])).copy_(views[0])

    def store(self, views: Views, work: Workspace, window: Window) -> None:
        """Round the work buffer to bf16."""
        count = len(views[0])
        work.noisy(BUFFER, count).add_(work.noise("weights", 16, window))
        bits = work.integers(BUFFER, count).bitwise_right_shift_(shift(16))
        views[0].view(torch.int16).copy_(bits)


class Split24(Rounded):
    """`split24`: the bf16 parameter is the nearest to a 24-bit weight; an int8 remainder in the state is the rest.

    As integers, weight = bf16 * 2**16 + remainder * 2**8: the upper 24 bits of fp32, 15 of them mantissa.
    """

    def allocate(self, parameter: Tensor) -> State:
        """Return a remainder of zero."""
        return {REMAINDER: torch.zeros_like(parameter, dtype=torch.int8)}

    def split(self, parameter: Tensor, state: State, elements: int) -> list[Views]:
        """Return the pieces of the parameter and of its remainder."""
        return list(zip(split(parameter, elements), split(state[REMAINDER], elements), strict=True))

    def load(self, views: Views, work: Workspace) -> Tensor:
        """Return the piece in the work buffer, joined exactly."""
        upper, remainder = views
        values = super().load(views, work)
        lower = work.integers("spare", len(upper)).copy_(remainder)
        work.integers(BUFFER, len(upper)).add_(lower, alpha=2**8)
        return values

    def store(self, views: Views, work: Workspace, window: Window) -> None:
        """Round the work buffer to 24 bits and split it: the remainder is the lower byte, with its sign."""
        upper, remainder = views
        bits, halves = (work.integers(name, len(upper)) for name in (BUFFER, "spare"))
        work.noisy(BUFFER, len(upper)).add_(work.noise("weights", 8, window))
        torch.add(bits, 2**15, out=halves).bitwise_right_shift_(shift(16))
        upper.view(torch.int16).copy_(halves)
        remainder.copy_(bits.bitwise_right_shift_(shift(8)))


class Mastered(Full):
    """`fp32` with offload: an fp32 master in the state, on the host; the parameter is it, rounded as it computes."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def split(self, parameter: Tensor, state: State, elements: int) -> list[Views]:
        """Return the pieces of the parameter and of its master, which is in the state before the first step."""
        return list(zip(split(parameter, elements), split(state[MASTER], elements), strict=True))

    def load(self, views: Views, work: Workspace) -> Tensor:
        """Return the piece of the master."""
        return views[1]

    def store(self, views: Views, work: Workspace, window: Window) -> None:
        """Round the master to nearest, which is what a layer that reads it would do."""
        parameter, master = views
        parameter.copy_(master)


def weight_format(name: str) -> WeightFormat:
    """Return the format of that name. Raises InputError for another name than those of `amp.master_weights`."""
    formats: dict[str, type[Full]] = {"fp32": Full, "split24": Split24, "none": Rounded}
    check_known("amp.master_weights", name, MASTER_WEIGHTS)
    return formats[name]()


def check_dtype(parameter: Tensor, name: str) -> None:
    """Raise InputError unless a parameter has the dtype that a format of weights keeps."""
    wanted = weight_format(name).dtype
    if parameter.dtype != wanted:
        has = str(parameter.dtype).removeprefix("torch.")
        text = f"a parameter of shape {tuple(parameter.shape)} is {has}; master weights {name} keep {wanted}"
        raise InputError(text.replace("torch.", "") + "; convert the model, or name other master weights")
