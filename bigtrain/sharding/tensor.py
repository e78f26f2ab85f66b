"""Tensor parallelism: neighbouring ranks share the products of each block (Shoeybi et al. 2019, arXiv 1909.08053).

A layer into a block's inner width is cut by its outputs, the layer out of it by its inputs, so that ranks speak twice
in a forward pass, where what they have of a layer's output is added up, and twice in a backward pass, where what they
have of the gradient of an input is. Activations outside, norms and what is outside of blocks are the same on all of
them. Layers are exchanged by class, not wrapped: parameters stay plain tensors under their names, and whatever rounds,
recomputes or compiles a layer does so here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]
    GroupName,
    _resolve_process_group,
)

from bigtrain.errors import InputError
from bigtrain.sharding.part import Part, Shape

Products = Mapping[str, tuple[int, tuple[int, ...]]]
"""Linear layers of a block by name: the dim of the weight that is cut, 0 for outputs and 1 for inputs, and its
sections, of each of which every rank gets a part.
"""


class TensorShared:
    """A model whose blocks' products are shared, and this rank's part of each parameter that was cut."""

    def __init__(self, blocks: Sequence[nn.Module], products: Products, group: ProcessGroup) -> None:
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.parts: dict[str, Part] = {}
        self._blocks, self._products, self._group = blocks, products, group

    def copies(self, name: str) -> int:
        """Return how many of the ranks have the same numbers of a parameter."""
        return 1 if name in self.parts else self.ranks

    def part(self, name: str, rows: Part) -> Part:
        """Return which part of a parameter are these rows of what this rank has of it."""
        mine = self.parts.get(name)
        return rows if mine is None else mine.narrow(rows.start[0], rows.shape[0])

    def connect(self) -> None:
        """Make the layers speak to each other; what rounds them has been applied before."""
        for block in self._blocks:
            for name, (dim, _) in self._products.items():
                layer: Any = block.get_submodule(name)
                layer.tensor_group = self._group.group_name
                plain: Any = type(layer)
                layer.__class__ = _speaking(_Summing if dim else _Entering, plain)


def share(model: nn.Module, blocks: Sequence[nn.Module], products: Products, group: ProcessGroup) -> TensorShared:
    """Cut the products of a model's blocks, in place, and let go of what other ranks have.

    `connect` is to follow, once precision is applied. Modules of a block that count what they have, as attention counts
    its heads, have a method `share(ranks)`. Raises InputError, before anything is cut, for blocks without these linear
    layers, and for sections that do not divide.
    """
    shared = TensorShared(blocks, products, group)
    for name, (dim, sections) in cuts_of(model, blocks, products, shared.ranks).items():
        parameter, runs = model.get_parameter(name), _runs(sections, shared.rank, shared.ranks)
        shared.parts[name] = _part(tuple(parameter.shape), dim, runs)
        parameter.data = cut(parameter.data, dim, sections, shared.rank, shared.ranks)
    for block in blocks:
        for name in products:
            layer: Any = block.get_submodule(name)
            layer.out_features, layer.in_features = layer.weight.shape
        for module in block.modules():
            count: Any = getattr(module, "share", None)
            if callable(count):
                count(shared.ranks)
    return shared


def cuts_of(model: nn.Module, blocks: Sequence[nn.Module], products: Products, ranks: int) -> Products:
    """Return the dim and the sections of each parameter that so many ranks cut, by its name in the model.

    A layer whose inputs are shared keeps its bias, which is added to the sum. Raises InputError as `share` does.
    """
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, tuple[int, tuple[int, ...]]] = {}
    for block in blocks:
        for name, (dim, sections) in products.items():
            layer = _layer(block, name)
            if any(section % ranks for section in sections):
                raise InputError(f"sharding.tensor_parallel: {ranks} does not divide {name}'s sections, {sections}")
            kinds = [kind for kind, _ in layer.named_parameters() if kind == "weight" or dim == 0]
            found |= {f"{names[block]}.{name}.{kind}".lstrip("."): (dim, sections) for kind in kinds}
    return found


def cut(whole: Tensor, dim: int, sections: Sequence[int], rank: int, ranks: int) -> Tensor:
    """Return a rank's part of each section of a dim, in memory of its own."""
    return torch.cat([whole.narrow(dim, *run) for run in _runs(sections, rank, ranks)], dim)


def _layer(block: nn.Module, name: str) -> nn.Linear:
    try:
        layer = block.get_submodule(name)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        raise InputError(
            f"sharding.tensor_parallel: a {type(block).__name__} has no linear layer {name!r}; it is for the models of "
            "bigtrain.models, others use sharding.zero_stage"
        )
    return layer


def _runs(sections: Sequence[int], rank: int, ranks: int) -> list[tuple[int, int]]:
    """Return where a rank's part of each section begins, and how long it is."""
    ends = zip(accumulate(sections), sections, strict=True)
    return [(end - section + rank * section // ranks, section // ranks) for end, section in ends]


def _part(whole: Shape, dim: int, runs: Sequence[tuple[int, int]]) -> Part:
    if dim == 0:
        return Part.of_rows(whole, runs)
    ((start, count),) = runs
    return Part(whole, (0, start), (whole[0], count))


@torch.library.custom_op("bigtrain::sum_over_ranks", mutates_args=())
def sum_over_ranks(partial: Tensor, bias: Tensor | None, group: str) -> Tensor:
    """Return the sum of a tensor over the ranks of a group, in memory of its own, and a bias added to it once."""
    total = partial.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_resolve_process_group(GroupName(group)))
    return total if bias is None else total.add_(bias.to(total.dtype))


@sum_over_ranks.register_fake
def _(partial: Tensor, bias: Tensor | None, group: str) -> Tensor:
    return torch.empty_like(partial, memory_format=torch.contiguous_format)


class _Entering:
    """A layer that reads what all ranks have, and of whose input's gradient each has a part."""

    tensor_group: str

    def forward(self, x: Tensor) -> Tensor:
        """Compute as the plain layer does."""
        compute: Any = super().forward  # type: ignore[misc]
        out: Tensor = compute(_Enter.apply(x, self.tensor_group))  # type: ignore[no-untyped-call]
        return out


class _Summing:
    """A layer of whose output each rank has a part; its bias is added to their sum."""

    tensor_group: str
    _parameters: dict[str, nn.Parameter | None]

    def forward(self, x: Tensor) -> Tensor:
        """Compute as the plain layer does without a bias, on all ranks together."""
        compute: Any = super().forward  # type: ignore[misc]
        bias, self._parameters["bias"] = self._parameters["bias"], None
        try:
            partial = compute(x)
        finally:
            self._parameters["bias"] = bias
        out: Tensor = _Sum.apply(partial, bias, self.tensor_group)  # type: ignore[no-untyped-call]
        return out


@cache
def _speaking(kind: Any, plain: Any) -> Any:
    """Return the class that computes as `plain` does, with the other ranks."""
    return type(f"Shared{plain.__name__}", (kind, plain), {"__module__": plain.__module__})


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        summed: Tensor = sum_over_ranks(grad, None, ctx.group)
        return summed, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, bias: Tensor | None, group: str) -> Tensor:
        ctx.bias_dtype = None if bias is None else _gradient_dtype(bias)
        total: Tensor = sum_over_ranks(partial, bias, group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        rows = grad.reshape(-1, grad.shape[-1])
        return grad, None if ctx.bias_dtype is None else rows.sum(0, dtype=ctx.bias_dtype), None


def _gradient_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype in which autograd keeps a parameter's gradient, as the layers of `amp` do."""
    if torch.compiler.is_compiling() or not parameter.is_leaf:
        return parameter.dtype
    dtype: torch.dtype | None = parameter.grad_dtype
    return dtype or parameter.dtype
