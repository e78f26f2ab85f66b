"""How long the operations of any model take, one by one as a trace shows them. No torch: tensors only tell sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from bigtrain.planner.roofline import NOTHING, Roofline, Work

FREE = ("empty", "detach", "_local_scalar_dense", "alias", "lift_fresh", "set_")
"""How the names of operations begin that move nothing."""

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
CONVOLUTIONS = ("convolution", "convolution_backward")
ATTENTION = "scaled_dot_product"


class Clock:
    """Add up operations at a device's rates, by a roofline for each; `memory.trace` calls it.

    Matrix products, convolutions and attention are known by name; whatever else reads its inputs and writes its outputs
    once. Attention counts as in full documents of a row's length.
    """

    def __init__(self, run: Roofline) -> None:
        self._run = run
        self._work = NOTHING

    def tick(self, operator: Any, args: Sequence[Any], given: Sequence[Any], made: Sequence[Any]) -> None:
        """Add an operation of torch's: its overload, its arguments, the tensors among them, those that it returns."""
        name = name_of(operator)
        if operator.is_view or name.startswith(FREE) or operator.namespace == "prim":
            return
        if not any(tensor.nbytes for tensor in given):
            return
        rule = _attention if ATTENTION in name else _RULES.get(name, _pointwise)
        self._work += rule(self._run, name, args, given, made)

    def read(self) -> float:
        """Return the seconds since the last reading, and begin again."""
        seconds, self._work = self._run.elapsed(self._work), NOTHING
        return seconds


class Flops:
    """Count the FLOPs of matrix products, convolutions and attention, as a clock whose seconds they are.

    The backward pass of attention counts twice the forward pass, as model FLOPs do: without what it computes again.
    """

    def __init__(self) -> None:
        self._flops = 0.0

    def tick(self, operator: Any, args: Sequence[Any], given: Sequence[Any], made: Sequence[Any]) -> None:
        """Add an operation."""
        name = name_of(operator)
        if name in PRODUCTS:
            self._flops += 2 * math.prod(given[-2].shape) * given[-1].shape[-1]
        elif name in CONVOLUTIONS:
            positions, inner, channels, times = _unfolded(name, args, made)
            self._flops += 2 * positions * inner * channels * times
        elif ATTENTION in name:
            query, key = _attended(name, args)
            self._flops += 4 * math.prod(query.shape) * key.shape[2] * (2 if "backward" in name else 1)

    def read(self) -> float:
        """Return the FLOPs since the last reading, and begin again."""
        flops, self._flops = self._flops, 0.0
        return flops


def name_of(operator: Any) -> str:
    """Return the name of an operation of torch's without its library and overload."""
    name: str = operator.name()
    return name.partition("::")[2].partition(".")[0]


Rule: TypeAlias = "Callable[[Roofline, str, Sequence[Any], Sequence[Any], Sequence[Any]], Work]"


def _product(run: Roofline, name: str, args: Sequence[Any], given: Sequence[Any], made: Sequence[Any]) -> Work:
    """Time the last two matrices among the tensors: (n, i) by (i, o), or a batch of such."""
    left, right = given[-2:]
    times = left.shape[0] if len(left.shape) == 3 else 1
    rows, inner = left.shape[-2:]
    outer = right.shape[-1]
    work = run.product(rows, inner, outer, operand_bytes=left.itemsize, result_bytes=made[0].itemsize)
    return Work(work.seconds * times, work.calls)


def _convolution(run: Roofline, name: str, args: Sequence[Any], given: Sequence[Any], made: Sequence[Any]) -> Work:
    """Time the product of a convolution's unfolded input with its weight; in a backward pass there are two such."""
    positions, inner, channels, times = _unfolded(name, args, made)
    return run.product(positions, inner, channels, operand_bytes=made[0].itemsize) * times


def _unfolded(name: str, args: Sequence[Any], made: Sequence[Any]) -> tuple[int, int, int, int]:
    """Return a convolution as products: positions, numbers that one is made of, channels, and how many products."""
    backward = name == "convolution_backward"
    out, weight = (args[0], args[2]) if backward else (made[0], args[1])
    channels = weight.shape[0]
    return math.prod(out.shape) // channels, math.prod(weight.shape[1:]), channels, 2 if backward else 1


def _attention(run: Roofline, name: str, args: Sequence[Any], given: Sequence[Any], made: Sequence[Any]) -> Work:
    query, key = _attended(name, args)
    rows, heads, length, size = query.shape
    causal = any(argument is True for argument in args)
    return run.attention(rows * length, key.shape[2], heads * size, causal=causal, backward="backward" in name)


def _attended(name: str, args: Sequence[Any]) -> tuple[Any, Any]:
    """Return queries and keys, of (rows, heads, length, size); a backward pass has the gradient before them."""
    return (args[1], args[2]) if "backward" in name else (args[0], args[1])


def _pointwise(run: Roofline, name: str, args: Sequence[Any], given: Sequence[Any], made: Sequence[Any]) -> Work:
    in_place = name.endswith("_") or name.startswith("_foreach")
    written = sum(tensor.nbytes for tensor in (made or given[:1]))
    return run.pointwise(1, sum(tensor.nbytes for tensor in given), written, in_place=in_place)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(PRODUCTS, _product),
    **dict.fromkeys(CONVOLUTIONS, _convolution),
}
