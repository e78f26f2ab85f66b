"""Selective recompute: matrix products and attention outputs are kept, what lies between them is computed again.

A block's forward writes the outputs of the operations that are kept on a tape, in order; when the backward pass runs
the block again, it reads them from the tape. An output that is not on the tape is computed again, so leaving one out
costs time and never correctness. torch's own contexts for this keep outputs that nothing needs, and after attention
with dropout they draw other random numbers than the forward did.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bigtrain.errors import InputError
from bigtrain.recompute.operators import CAST, VIEWS, Contexts, is_draw, is_kept, name_of, tensors, written


@dataclass(eq=False)
class Entry:
    """One kept operation."""

    operator: Any
    output: Any
    """What it returned, until it is taken; or that rounded, where only that is kept."""
    random_state: Tensor | None = None
    """The generator's state after it, if it drew numbers."""
    blank: Tensor | None = None
    """A meta tensor of the layout of what it returned, where `output` is that rounded."""
    rounding: Any = None
    """The operator that rounded it."""


class Tape:
    """The kept outputs of one run of a block, in order."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.needed = 0
        """How many of them come before the last tensor that autograd saved: recomputation stops there."""

    def contexts(self) -> Contexts:
        """Return what writes this tape, for the forward, and what reads it, for the recomputation."""
        return Keeping(self), Replaying(self)

    def forget(self, value: Any) -> None:
        """Drop outputs that share memory with a tensor, or with those in a container: they may change until taken."""
        storages = {_storage(tensor) for tensor in tensors(value)}
        for entry in self.entries if storages else ():
            if any(_storage(tensor) in storages for tensor in tensors(entry.output)):
                entry.output = None


class Product:
    """A product just kept, which may be rounded at once to fewer bytes, as bf16 products are on CPUs without such.

    Then the rounded result alone is kept. That is right if nothing else ever reads the wide one: views aside, rounding
    is the first operation after the product, and its memory is free before the next.
    """

    def __init__(self, entry: Entry, out: Tensor) -> None:
        self.entry, self.storage, self.wide = entry, _storage(out), weakref.ref(out.untyped_storage())

    def rounded(self, operator: Any, args: Any, out: Any) -> bool:
        """Keep the result of an operation instead, if that rounds the product; tell whether it does."""
        entry = self.entry
        if name_of(operator) != CAST or _storage(args[0]) != self.storage or out.nbytes >= entry.output.nbytes:
            return False
        entry.blank, entry.output = torch.empty_like(entry.output, device="meta"), out.detach()
        entry.rounding = operator
        return True

    def settle(self) -> None:
        """Keep nothing, so that the product is computed again, if somebody still has the wide result."""
        if self.wide() is not None:
            self.entry.output = None


class Keeping(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Write the kept outputs of what runs inside on a tape."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = tape
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None
        self._product: Product | None = None
        self._rounded: Product | None = None

    def __enter__(self) -> Any:
        # Checkpointing's own hooks are on top here; ours see on the way how far the tape was at each saved tensor.
        pack, unpack = torch._C._autograd._top_saved_tensors_default_hooks(False)
        tape = self.tape

        def counting(tensor: Tensor) -> Any:
            tape.needed = len(tape.entries)
            return pack(tensor)

        self._hooks = torch.autograd.graph.saved_tensors_hooks(counting, unpack)
        self._hooks.__enter__()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        # Out of this object, or it and checkpointing's frame would hold each other, and the block's input with them.
        hooks, self._hooks = self._hooks, None
        assert hooks is not None
        hooks.__exit__(*error)
        self._settle()
        for entry in self.tape.entries[self.tape.needed :]:
            entry.output = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; keep its output, or forget the outputs that it writes to."""
        kwargs = kwargs or {}
        self._settle()
        out = func(*args, **kwargs)
        product, self._product = self._product, None
        if is_kept(func, args):
            state = _random_state(_device(out)) if is_draw(func, args, kwargs) else None
            entry = Entry(func, _detached(out), state)
            self.tape.entries.append(entry)
            self._product = Product(entry, out) if isinstance(out, Tensor) else None
        elif name_of(func) in VIEWS:
            self._product = product
        elif product is not None and product.rounded(func, args, out):
            self._rounded = product
        else:
            self.tape.forget(written(func, args, kwargs))
        return out

    def _settle(self) -> None:
        if self._rounded is not None:
            self._rounded.settle()
            self._rounded = None


class Replaying(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Give what runs inside the outputs on a tape, each once; compute what is not on it."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = tape
        self._place = 0
        self._rounded: Entry | None = None

    def __enter__(self) -> Any:
        self._place, self._rounded = 0, None
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return what an operation returned, or run it."""
        kwargs = kwargs or {}
        if is_kept(func, args):
            entry = self._advance(func)
            if entry.output is None:
                return func(*args, **kwargs)
            if entry.blank is not None:
                return self._blank(entry, args[0].device)
            return self._take(entry)
        if self._rounded is None or name_of(func) in VIEWS:
            return func(*args, **kwargs)
        entry, self._rounded = self._rounded, None
        _same(func, entry.rounding)
        return self._take(entry)

    def _advance(self, operator: Any) -> Entry:
        entries, place = self.tape.entries, self._place
        _same(operator, entries[place].operator if place < len(entries) else None)
        self._place += 1
        return entries[place]

    def _blank(self, entry: Entry, device: torch.device) -> Tensor:
        """Return memory of a product's layout: the rounding that follows, its only reader, returns what was kept."""
        self._rounded, blank = entry, entry.blank
        assert blank is not None
        return torch.empty_strided(blank.shape, blank.stride(), dtype=blank.dtype, device=device)

    def _take(self, entry: Entry) -> Any:
        """Return an entry's output, and let go of it."""
        out, entry.output = entry.output, None
        if entry.random_state is not None:
            _set_random_state(_device(out), entry.random_state)
        return out


def _same(operator: Any, first: Any) -> None:
    if operator is not first:
        raise InputError(
            f"recompute: a block ran {operator} the second time where it ran {first} the first time; "
            "a block that recomputes must do the same each time, so give it the policy none"
        )


def _storage(tensor: Tensor) -> int:
    """Return what tells storages apart; fake tensors have no address."""
    identity: int = tensor.untyped_storage()._cdata
    return identity


def _detached(value: Any) -> Any:
    """Return an operation's output free of the graph that autograd is about to hang on it."""
    if isinstance(value, Tensor):
        return value.detach()
    return type(value)(map(_detached, value)) if isinstance(value, (tuple, list)) else value


def _device(value: Any) -> torch.device:
    return next(tensors(value)).device


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
