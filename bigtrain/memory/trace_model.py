"""Any model traced by its blocks: one of each kind alone, and the model around them with stand-ins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from bigtrain import batch as batches
from bigtrain.errors import InputError
from bigtrain.memory.blockwise import RECOMPUTE, BlockKind, Kept, ModelTrace, Outside, Span
from bigtrain.memory.stand_in import Call, Kind, Place, alone, bare, moves, stand_in
from bigtrain.memory.trace import Clock, Counting, as_fake, fake_like, seconds_of
from bigtrain.placement import find_blocks
from bigtrain.recompute.blocks import follow
from bigtrain.recompute.policy import Policy

Forward = Callable[[nn.Module, Any], Any]
"""What a step does with a model and a micro-batch: it returns the loss, or what has a `.loss`."""

REAL = ("cu_seqlens", "attention_mask")
"""Names of tensors whose numbers models read: where documents end, whether a mask masks anything."""


def trace_model(
    model: nn.Module,
    sample: Mapping[str, Any] | Sequence[Any],
    *,
    forward: Forward | None = None,
    blocks: type[nn.Module] | Sequence[nn.Module] | None = None,
    rows: int | None = None,
    real: Sequence[str] = REAL,
    clock: Clock | None = None,
    policies: Sequence[Policy] = RECOMPUTE,
) -> ModelTrace:
    """Return what a forward and a backward pass of a model hold on the CPU, without allocating any of it.

    The model may be on the meta device, at any precision, and is not changed. `sample` is what it is called with: named
    tensors, or a sequence of arguments; `rows` gives them another first dim, packed rows (with `document_lengths`) are
    repeated and unpadded. Those named in `real` stay as they are, since the model reads their numbers. `forward` makes
    a scalar, or what has one as its `.loss`, of model and sample: without it, the model is called with the sample.
    `blocks` are the modules that may recompute, or their class; without it, the members of the longest ModuleList.
    Blocks of the same class, settings and shapes are traced once. A `clock` tells how long it all takes.
    Of the `policies` only those given can be asked for.
    Raises InputError for a model that cannot be traced, naming module and operation.
    """
    names = {module: name for name, module in model.named_modules()}
    places = [names[block] for block in find_blocks(model, blocks)]
    fake = as_fake(model).train()
    micro = fake_sample(sample, rows, real)
    run = partial(_run, fake, micro, forward or called)
    session = _Session(fake, [fake.get_submodule(place) for place in places], clock)
    session.learn(run)
    kinds = tuple(session.price(kind, policies) for kind in session.kinds)
    outside, accumulating = session.surround(run), session.surround(run)  # the second finds the first one's gradients
    return ModelTrace(
        parameter_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        kinds=kinds,
        calls=tuple(session.kinds.index(call.kind) for call in session.calls),
        outside=outside,
        accumulating=accumulating,
        again=session.again(),
        places=session.places(),
    )


def called(model: nn.Module, sample: Any) -> Any:
    """Return what a model returns for named tensors, or for a sequence of arguments."""
    return model(**sample) if isinstance(sample, Mapping) else model(*sample)


def fake_sample(sample: Any, rows: int | None, real: Sequence[str]) -> Any:
    """Return a fake sample of so many rows, without a number of those there are; what is named in `real` stays."""
    if not isinstance(sample, Mapping):
        return tuple(_resized(value, rows) for value in sample)
    if batches.is_packed(sample):
        sample, rows = batches.unpad(resized(sample, rows)), None
    if rows is not None and any(name in sample for name in real):
        kept = resized({name: sample[name] for name in real if name in sample}, rows)
        if "cu_seqlens" in kept:
            raise InputError(f"rows={rows}: the sample is a flat row; give packed rows with document_lengths instead")
        sample = {**sample, **kept}
    return {name: value if name in real else _resized(value, rows) for name, value in sample.items()}


def resized(sample: Mapping[str, Any], rows: int | None) -> dict[str, Any]:
    """Return so many rows of a sample, repeated from its start where it has fewer."""
    if rows is None:
        return dict(sample)
    index = torch.arange(rows) % batches.count_rows(sample)
    return {
        name: value[index] if isinstance(value, Tensor) and value.dim() else value for name, value in sample.items()
    }


def _resized(value: Any, rows: int | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    if rows is None or not value.dim():
        return fake_like(value)
    return fake_like(torch.empty((rows, *value.shape[1:]), dtype=value.dtype, device="meta"))


def _run(model: nn.Module, sample: Any, forward: Forward) -> tuple[Any, Tensor]:
    """Return what the step makes of the model, which whoever calls it holds during the backward pass, and its loss."""
    out = forward(model, sample)
    value = out if isinstance(out, Tensor) else getattr(out, "loss", None)
    if not isinstance(value, Tensor) or value.numel() != 1:
        kind = f"a tensor {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise InputError(f"{type(model).__name__}: returns no scalar loss but {kind}; give forward=...")
    return out, value


def gradient_bytes(module: nn.Module) -> int:
    """Return the bytes of the gradients that the parameters of a module have."""
    return sum(parameter.grad.nbytes for parameter in module.parameters() if parameter.grad is not None)


class _Session:
    """One model's blocks: which kinds there are, what each holds, and what the model holds around them."""

    def __init__(self, model: nn.Module, blocks: list[nn.Module], clock: Clock | None) -> None:
        self._model, self._clock = model, clock
        self.kinds: list[Kind] = []
        self.calls: list[Call] = []
        self._places = {block: place for place, block in enumerate(blocks)}
        self._numbering = set.intersection(*(set(_settings(block, place)) for place, block in enumerate(blocks)))
        """Settings that are each block's own number."""
        for block in blocks:
            follow(block, "none")

    def learn(self, run: Callable[[], tuple[Any, Tensor]]) -> None:
        """Find the kinds, and what each returns, by running one of each."""
        with Counting().running(), self._replaced(self._met):
            run()
        if not self.calls:
            raise InputError("none of the blocks runs; name those that do with blocks=...")

    def again(self) -> frozenset[int]:
        """Return the places of the calls whose block is called later again."""
        blocks = [call.block for call in self.calls]
        return frozenset(place for place, block in enumerate(blocks) if block in blocks[place + 1 :])

    def places(self) -> tuple[int, ...]:
        """Return of each call which of the blocks it is."""
        return tuple(self._places[call.block] for call in self.calls)

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
        settings = {key: value for key, value in _settings(block).items() if key not in self._numbering}
        signature = (settings, _structure(block), spec, [_described(leaf) for leaf in leaves])
        kind = next((kind for kind in self.kinds if kind.signature == signature), None)
        if kind is None:
            outs, out_spec = tree_flatten(plain(*args, **kwargs))
            numbers = {id(leaf): place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
            outs = [Place(numbers[id(leaf)]) if id(leaf) in numbers else bare(leaf) for leaf in outs]
            kind = Kind(block, signature, [bare(leaf) for leaf in leaves], spec, outs, out_spec)
            self.kinds.append(kind)
        call = Call(block, kind)
        self.calls.append(call)
        return kind.output(stand_in(call, kind.made, [leaf for leaf in leaves if moves(leaf)]), leaves)

    def price(self, kind: Kind, policies: Sequence[Policy]) -> BlockKind:
        """Trace a block alone under each policy."""
        by_policy: dict[str, Kept] = {}
        gradients = 0
        for policy in policies:
            follow(kind.block, policy)
            first = alone(kind, self._clock)
            gradients = gradient_bytes(kind.block)
            by_policy[policy] = Kept(*first[:3], alone(kind).backward_bytes, *first[3:])
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

    def surround(self, run: Callable[[], tuple[Any, Tensor]]) -> Outside:
        """Trace the model around its blocks, which keep nothing but the inputs that all of them share."""
        counting, order = Counting(clock=self._clock), iter(self.calls)

        def replay(block: nn.Module, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            call, leaves = next(order), tree_flatten((args, kwargs))[0]
            call.counting = counting
            call.marks.clear()
            call.mark("begun")
            made = stand_in(call, call.kind.made, [leaf for leaf in leaves if moves(leaf)])
            call.held = [leaves[place] for place in call.kind.shared]
            call.mark("done")
            return call.kind.output(made, leaves)

        seconds_of(self._clock)
        with counting.running(), self._replaced(replay):
            out, loss = run()
            forward_seconds = seconds_of(self._clock)
            torch.autograd.backward(loss)
            del out, loss
        return dataclasses.replace(
            self._spans(counting), forward_seconds=forward_seconds, backward_seconds=seconds_of(self._clock)
        )

    def _spans(self, counting: Counting) -> Outside:
        marks = [call.marks for call in self.calls]
        ends = [
            *(m[name] for m in marks for name in ("begun", "done")),
            *(m.get(name) for m in reversed(marks) for name in ("arrived", "left")),
        ]
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
            gradient_bytes=gradient_bytes(self._model),
        )


def _described(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.requires_grad
    return leaf if isinstance(leaf, (bool, int, float, str, type(None))) else type(leaf)


def _structure(block: nn.Module) -> Any:
    """Return the classes of a block's modules and the shapes of its parameters."""
    modules = [(name, type(module)) for name, module in block.named_modules()]
    return modules, [(name, *_described(parameter)) for name, parameter in block.named_parameters()]


def _settings(block: nn.Module, value: int | None = None) -> dict[tuple[str, str], Any]:
    """Return the plain attributes of a block's modules; with a value, only integers that are equal to it."""
    return {
        (name, key): setting
        for name, module in block.named_modules()
        for key, setting in vars(module).items()
        if isinstance(setting, (bool, int, float, str))
        and (value is None or (type(setting) is int and setting == value))
    }
