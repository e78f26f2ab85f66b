"""One block alone, between stand-ins for what comes before and after: tensors that nobody keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from bigtrain.memory.blockwise import Passes
from bigtrain.memory.trace import Clock, Counting, holders, seconds_of


@dataclass(eq=False)
class Kind:
    """Blocks that are alike: the first of them, what it was called with, and what it returned."""

    block: nn.Module
    signature: Any
    leaves: list[Any]
    spec: TreeSpec
    outs: list[Any]
    """The output's leaves: of an input its place, else the leaf."""
    out_spec: TreeSpec
    shared: set[int] = field(default_factory=set)
    """Places of inputs without gradient that its backward waits for."""

    @property
    def moving(self) -> list[Tensor]:
        """The inputs that get a gradient."""
        return [leaf for leaf in self.leaves if moves(leaf)]

    @property
    def made(self) -> list[Tensor]:
        """The outputs through which gradients come."""
        return [leaf for leaf in self.outs if moves(leaf)]

    def output(self, made: Sequence[Tensor], leaves: Sequence[Any]) -> Any:
        """Return the output as the block would, of new tensors and the inputs that it hands on."""
        new = iter(made)
        outs = [
            next(new) if moves(leaf) else leaves[leaf.place] if isinstance(leaf, Place) else leaf for leaf in self.outs
        ]
        return tree_unflatten(outs, self.out_spec)


@dataclass(frozen=True)
class Place:
    """An output that is the input at this place."""

    place: int


@dataclass(eq=False)
class Call:
    """One run of a block: how long the count's timeline was, and what was alive, as it began and ended, both ways."""

    block: nn.Module
    kind: Kind
    counting: Counting | None = None
    marks: dict[str, tuple[int, int]] = field(default_factory=dict)
    held: list[Any] = field(default_factory=list)

    def mark(self, moment: str) -> None:
        """Remember where the count stands."""
        if self.counting is not None:
            self.marks[moment] = (len(self.counting.timeline), self.counting.live)


class _StandIn(torch.autograd.Function):
    """New tensors in place of others, both ways, and nothing kept: what it stands for is between the marks."""

    @staticmethod
    def forward(ctx: Any, call: Call, outs: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.inputs = [tensor.detach().to("meta") if tensor.numel() else None for tensor in inputs]
        return tuple(_blank(tensor, inputs[0].device) for tensor in outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        call, device = ctx.call, grads[0].device
        call.mark("arrived")
        gradients = tuple(None if tensor is None else _blank(tensor, device) for tensor in ctx.inputs)
        call.held.clear()
        call.mark("left")
        return None, None, *gradients


def _blank(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def stand_in(call: Call, outs: list[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return tensors like `outs` that depend on the inputs; none among those still gets a gradient, as of weights."""
    root = torch.empty(0, requires_grad=True)
    made: tuple[Tensor, ...] = _StandIn.apply(call, outs, root, *inputs)  # type: ignore[no-untyped-call]
    return made


def alone(kind: Kind, clock: Clock | None = None) -> Passes:
    """Trace one block; return F, K and B as `blockwise` defines them; gradients of its parameters stay."""
    counting = Counting(clock=clock)
    before = Call(kind.block, kind, counting)
    after = Call(kind.block, kind, counting)
    others = [place for place, leaf in enumerate(kind.leaves) if isinstance(leaf, Tensor) and not moves(leaf)]
    with counting.running():
        unheld = [holders((kind.leaves[place],)) for place in others]
        inputs = iter(stand_in(before, kind.moving, []))
        args, kwargs = tree_unflatten([next(inputs) if moves(leaf) else leaf for leaf in kind.leaves], kind.spec)
        del inputs
        before.mark("begun")
        seconds_of(clock)
        out = kind.block(*args, **kwargs)
        forward_seconds = seconds_of(clock)
        before.mark("done")
        del args, kwargs
        (scalar,) = stand_in(
            after, [torch.empty((), device="meta")], [leaf for leaf in tree_flatten(out)[0] if moves(leaf)]
        )
        del out
        kept = counting.live - scalar.nbytes
        kind.shared.update(p for p, was in zip(others, unheld, strict=True) if holders((kind.leaves[p],)) != was)
        seconds_of(clock)
        torch.autograd.backward(scalar)
        backward_seconds = seconds_of(clock)
        del scalar
    begun, done, left = before.marks["begun"], before.marks["done"], after.marks["left"]
    # Without an input that gets a gradient, the block's backward is the last there is.
    arrived = before.marks.get("arrived", (len(counting.timeline), counting.live))
    forward = max(counting.timeline[begun[0] : done[0]], default=begun[1]) - begun[1]
    backward = max(counting.timeline[left[0] : arrived[0]], default=left[1]) - left[1]
    return Passes(forward, kept, backward, forward_seconds, backward_seconds)


def moves(leaf: Any) -> bool:
    """Tell whether a value is a tensor that gets a gradient."""
    return isinstance(leaf, Tensor) and leaf.requires_grad


def bare(leaf: Any) -> Any:
    """Return a tensor that gets a gradient without the graph that it came from."""
    return leaf.detach().requires_grad_() if moves(leaf) else leaf
