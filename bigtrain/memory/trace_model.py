"""Any model traced by its blocks: one of each kind alone, and the model around them with stand-ins that keep nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from bigtrain import batch as batches
from bigtrain.errors import InputError
from bigtrain.memory.blockwise import RECOMPUTE, BlockKind, Kept, ModelTrace, Outside, Span
from bigtrain.memory.trace import Counting, as_fake, fake_like, fakes, holders
from bigtrain.recompute.blocks import follow

Loss = Callable[[Any], Tensor]


def trace_model(
    model: nn.Module,
    sample: Mapping[str, Any] | Sequence[Any],
    *,
    loss: Loss | None = None,
    blocks: type[nn.Module] | Sequence[nn.Module] | None = None,
    rows: int | None = None,
    real: Sequence[str] = ("cu_seqlens",),
) -> ModelTrace:
    """Return what a forward and a backward pass of a model hold on the CPU, without allocating any of it.

    The model may be on the meta device, at any precision, and is not changed. `sample` is what it is called with: named
    tensors, or a sequence of arguments; `rows` gives them another first dim, packed rows (with `document_lengths`) are
    repeated and unpadded. Those named in `real` stay as they are, since the model reads their numbers. `loss` makes a
    scalar of what the model returns: without it, that or its `.loss` is one. `blocks` are the modules that may
    recompute, or their class; without it, the members of the longest ModuleList. Blocks of the same class, settings and
    shapes are traced once. Raises InputError for a model that cannot be traced, naming module and operation.
    """
    places = _places(model, blocks)
    fake = as_fake(model).train()
    args, kwargs = _arguments(sample, rows, real)
    run = partial(_loss_of, fake, args, kwargs, loss)
    session = _Session([fake.get_submodule(place) for place in places])
    session.learn(run)
    kinds = tuple(session.price(kind) for kind in session.kinds)
    outside, accumulating = session.surround(run), session.surround(run)  # the second finds the first one's gradients
    return ModelTrace(
        parameter_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        kinds=kinds,
        calls=tuple(session.kinds.index(call.kind) for call in session.calls),
        outside=outside,
        accumulating=accumulating,
        again=session.again(),
    )


def _places(model: nn.Module, blocks: type[nn.Module] | Sequence[nn.Module] | None) -> list[str]:
    """Return the names of the model's blocks."""
    if isinstance(blocks, type):
        found = [module for module in model.modules() if isinstance(module, blocks)]
    elif blocks is not None:
        found = list(blocks)
    else:
        found = max((list(m) for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=[])
    names = {module: name for name, module in model.named_modules()}
    if not found or not all(module in names for module in found):
        raise InputError(f"{type(model).__name__}: has no such blocks; name their class, or give some of its modules")
    return [names[module] for module in found]


def _arguments(
    sample: Mapping[str, Any] | Sequence[Any], rows: int | None, real: Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not isinstance(sample, Mapping):
        return tuple(_resized(value, rows) for value in sample), {}
    if batches.is_packed(sample):
        count = batches.count_rows(sample)
        index = torch.arange(count if rows is None else rows) % count
        sample, rows = batches.unpad({name: value[index] for name, value in sample.items()}), None
    if rows is not None and any(name in sample for name in real):
        raise InputError(f"rows={rows}: the sample is a flat row; give packed rows with document_lengths instead")
    return (), {name: value if name in real else _resized(value, rows) for name, value in sample.items()}


def _resized(value: Any, rows: int | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    if rows is None or not value.dim():
        return fake_like(value)
    return fake_like(torch.empty((rows, *value.shape[1:]), dtype=value.dtype, device="meta"))


def _loss_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], loss: Loss | None) -> Tensor:
    out = model(*args, **kwargs)
    value = loss(out) if loss is not None else out if isinstance(out, Tensor) else getattr(out, "loss", None)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise InputError(f"{type(model).__name__}: returns no scalar loss but {type(out).__name__}; give loss=...")
    return value


@dataclass(eq=False)
class _Kind:
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
        return [leaf for leaf in self.leaves if _moves(leaf)]

    @property
    def made(self) -> list[Tensor]:
        """The outputs through which gradients come."""
        return [leaf for leaf in self.outs if _moves(leaf)]

    def output(self, made: Sequence[Tensor], leaves: Sequence[Any]) -> Any:
        """Return the output as the block would, of new tensors and the inputs that it hands on."""
        new = iter(made)
        outs = [next(new) if _moves(leaf) else leaves[leaf.place] if isinstance(leaf, _Place) else leaf for leaf in self.outs]
        return tree_unflatten(outs, self.out_spec)


@dataclass(frozen=True)
class _Place:
    """An output that is the input at this place."""

    place: int


@dataclass(eq=False)
class _Call:
    """One run of a block: how long the count's timeline was, and what was alive, as it began and ended, both ways."""

    block: nn.Module
    kind: _Kind
    counting: Counting | None = None
    marks: dict[str, tuple[int, int]] = field(default_factory=dict)
    held: list[Any] = field(default_factory=list)

    def mark(self, moment: str) -> None:
        if self.counting is not None:
            self.marks[moment] = (len(self.counting.timeline), self.counting.live)


class _StandIn(torch.autograd.Function):
    """New tensors in place of others, both ways, and nothing kept: what it stands for is between the marks."""

    @staticmethod
    def forward(ctx: Any, call: _Call, outs: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
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


def _stand_in(call: _Call, outs: list[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return tensors like `outs` that depend on the inputs; none among those still gets a gradient, as of weights."""
    root = torch.empty(0, requires_grad=True)
    made: tuple[Tensor, ...] = _StandIn.apply(call, outs, root, *inputs)  # type: ignore[no-untyped-call]
    return made


class _Session:
    """One model's blocks: which kinds there are, what each holds, and what the model holds around them."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.kinds: list[_Kind] = []
        self.calls: list[_Call] = []
        self._places = {block: place for place, block in enumerate(blocks)}
        for block in blocks:
            follow(block, "none")

    def learn(self, run: Callable[[], Tensor]) -> None:
        """Find the kinds, and what each returns, by running one of each."""
        with Counting().running(), self._replaced(self._met):
            run()
        if not self.calls:
            raise InputError("none of the blocks runs; name those that do with blocks=...")

    def again(self) -> frozenset[int]:
        """Return the places of the calls whose block is called later again."""
        blocks = [call.block for call in self.calls]
        return frozenset(place for place, block in enumerate(blocks) if block in blocks[place + 1 :])

    @contextmanager
    def _replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        plain = {block: vars(block).get("forward") for block in self._places}
        for block in self._places:
            vars(block)["forward"] = partial(forward, block, block.forward)
        try:
            yield
        finally:
            for block, before in plain.items():
                del vars(block)["forward"]
                if before is not None:
                    vars(block)["forward"] = before

    def _met(self, block: nn.Module, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        signature = (_structure(block, self._places[block]), spec, [_described(leaf) for leaf in leaves])
        kind = next((kind for kind in self.kinds if kind.signature == signature), None)
        if kind is None:
            outs, out_spec = tree_flatten(plain(*args, **kwargs))
            numbers = {id(leaf): place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
            outs = [_Place(numbers[id(leaf)]) if id(leaf) in numbers else _bare(leaf) for leaf in outs]
            kind = _Kind(block, signature, [_bare(leaf) for leaf in leaves], spec, outs, out_spec)
            self.kinds.append(kind)
        call = _Call(block, kind)
        self.calls.append(call)
        return kind.output(_stand_in(call, kind.made, [leaf for leaf in leaves if _moves(leaf)]), leaves)

    def price(self, kind: _Kind) -> BlockKind:
        """Trace a block alone under each policy."""
        by_policy, gradients = {}, 0
        for policy in RECOMPUTE:
            follow(kind.block, policy)  # type: ignore[arg-type]
            forward, kept, backward, gradients = _alone(kind)
            by_policy[policy] = Kept(forward, kept, backward, _alone(kind)[2])
            for parameter in kind.block.parameters():
                parameter.grad = None
        follow(kind.block, "none")
        return BlockKind(
            name=type(kind.block).__name__,
            parameter_bytes=sum(parameter.nbytes for parameter in kind.block.parameters()),
            gradient_bytes=gradients,
            input_bytes=sum(tensor.nbytes for tensor in kind.moving),
            output_bytes=sum(tensor.nbytes for tensor in kind.made),
            by_policy=by_policy,
        )

    def surround(self, run: Callable[[], Tensor]) -> Outside:
        """Trace the model around its blocks, which keep nothing but the inputs that all of them share."""
        counting, order = Counting(), iter(self.calls)

        def replay(block: nn.Module, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            call, leaves = next(order), tree_flatten((args, kwargs))[0]
            call.counting = counting
            call.marks.clear()
            call.mark("begun")
            made = _stand_in(call, call.kind.made, [leaf for leaf in leaves if _moves(leaf)])
            call.held = [leaves[place] for place in call.kind.shared]
            call.mark("done")
            return call.kind.output(made, leaves)

        with counting.running(), self._replaced(replay):
            torch.autograd.backward(run())
        return self._spans(counting)

    def _spans(self, counting: Counting) -> Outside:
        marks = [call.marks for call in self.calls]
        ends = [*(m[name] for m in marks for name in ("begun", "done")), *(m.get(name) for m in reversed(marks) for name in ("arrived", "left"))]
        moments = [moment for moment in ends if moment is not None]
        if len(moments) < len(ends) or moments != sorted(moments, key=lambda moment: moment[0]):
            raise InputError("blocks do not run one after the other, forward and back; trace the whole step instead")

        def span(start: tuple[int, int], stop: tuple[int, int]) -> Span:
            return Span(max(counting.timeline[start[0] : stop[0]], default=stop[1]), stop[1])

        last = (len(counting.timeline), counting.live)
        starts = [(0, 0), *(m["done"] for m in marks)]
        back = [last, *(m["arrived"] for m in marks)]
        return Outside(
            forward=tuple(span(start, m["begun"]) for start, m in zip(starts, marks, strict=False)),
            turn=span(starts[-1], back[-1]),
            backward=tuple(span(m["left"], stop) for m, stop in zip(marks, back, strict=False)),
            gradient_bytes=counting.live,
        )


def _alone(kind: _Kind) -> tuple[int, int, int, int]:
    """Trace one block; return F, K and B as `blockwise` defines them, and what is alive in the end: its gradients."""
    counting = Counting()
    before = _Call(kind.block, kind, counting)
    after = _Call(kind.block, kind, counting)
    others = [place for place, leaf in enumerate(kind.leaves) if isinstance(leaf, Tensor) and not _moves(leaf)]
    with counting.running():
        unheld = [holders((kind.leaves[place],)) for place in others]
        inputs = iter(_stand_in(before, kind.moving, []))
        args, kwargs = tree_unflatten([next(inputs) if _moves(leaf) else leaf for leaf in kind.leaves], kind.spec)
        del inputs
        before.mark("begun")
        out = kind.block(*args, **kwargs)
        before.mark("done")
        del args, kwargs
        (scalar,) = _stand_in(after, [torch.empty((), device="meta")], [leaf for leaf in tree_flatten(out)[0] if _moves(leaf)])
        del out
        kept = counting.live - scalar.nbytes
        kind.shared.update(p for p, was in zip(others, unheld, strict=True) if holders((kind.leaves[p],)) != was)
        torch.autograd.backward(scalar)
        del scalar
    begun, done, left, arrived = (before.marks["begun"], before.marks["done"], after.marks["left"], before.marks["arrived"])
    forward = max(counting.timeline[begun[0] : done[0]], default=begun[1]) - begun[1]
    backward = max(counting.timeline[left[0] : arrived[0]], default=left[1]) - left[1]
    return forward, kept, backward, counting.live


def _moves(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _bare(leaf: Any) -> Any:
    """Return a tensor that gets a gradient without the graph that it came from."""
    return leaf.detach().requires_grad_() if _moves(leaf) else leaf


def _described(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.requires_grad
    return leaf if isinstance(leaf, (bool, int, float, str, type(None))) else type(leaf)


def _structure(block: nn.Module, place: int) -> Any:
    """Return what tells blocks apart: classes, settings (but for the block's own number) and shapes."""
    modules = [
        (name, type(module), {k: v for k, v in vars(module).items() if _is_setting(v, place)})
        for name, module in block.named_modules()
    ]
    return modules, [(name, *_described(parameter)) for name, parameter in block.named_parameters()]


def _is_setting(value: Any, place: int) -> bool:
    return isinstance(value, (bool, float, str)) or (isinstance(value, int) and value != place)
