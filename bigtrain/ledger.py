"""A forward and backward pass on tensors that have a size and nothing else: what a step holds, to the byte, no torch.

A `Storage` counts as long as something refers to it, as a tensor's memory does. Operations leave nodes on the ledger;
the backward pass runs them from the last to the first, which is the order of torch's autograd engine: by sequence
number, highest first. A node keeps what it was told to keep until it has run.
"""

from __future__ import annotations

import sys
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator


class Storage:
    """Bytes of a tensor, held from here until nothing refers to this object."""

    __slots__ = ("_ledger", "cause", "number", "size")

    def __init__(self, ledger: Ledger, size: int, cause: str) -> None:
        self.size, self.cause, self._ledger = size, cause, ledger
        if ledger.recorder is not None:
            self.number = ledger.recorder.allocate(size, cause, ledger.place)
        ledger.held[cause] += size
        now = ledger.now = ledger.now + size
        if now > ledger.peak:
            ledger.peak, ledger.at_peak = now, None

    def __del__(self) -> None:
        ledger = self._ledger
        if ledger.at_peak is None:
            ledger.at_peak = dict(ledger.held)
        ledger.held[self.cause] -= self.size
        ledger.now -= self.size
        if ledger.recorder is not None:
            ledger.recorder.release(self.number)


class Recorder(Protocol):
    """Who writes down each allocation, where in the model it is made, and its release."""

    def allocate(self, size: int, cause: str, place: str) -> int:
        """Note an allocation and return its number."""

    def release(self, number: int) -> None:
        """Note the release of an allocation."""


class Value(NamedTuple):
    """A tensor of a forward pass: its storage, and the operation that made it (None: no gradient goes there)."""

    storage: Storage
    node: Node | None

    @property
    def size(self) -> int:
        return self.storage.size


class Gradients(NamedTuple):
    """What a node's backward makes: gradients of its inputs, None where there is none, and of parameters by name.

    Both lists are emptied on the way, so that a gradient lives no longer than autograd's would.
    """

    inputs: list[Storage | None]
    parameters: list[tuple[str, Storage]]


Backward: TypeAlias = "Callable[[Storage, list[Storage]], Gradients]"
"""From the gradient of a node's output, and what it kept, to gradients."""

GradientReady: TypeAlias = "Callable[[str, Storage], None]"
"""What happens to the gradient of a parameter: called once the node that made it has let go of everything else."""


class Node:
    """An operation to be differentiated."""

    __slots__ = ("backward", "kept", "parents", "place")

    def __init__(self, parents: list[Node | None], kept: Kept, backward: Backward, place: str) -> None:
        self.parents, self.kept, self.backward, self.place = parents, kept, backward, place


class Kept:
    """What a node keeps; in a recomputed region nothing, until the first of its nodes asks."""

    __slots__ = ("_places", "_region", "_storages")

    def __init__(self, storages: list[Storage], region: Region | None = None, places: range = range(0)) -> None:
        self._storages, self._region, self._places = storages, region, places

    def take(self) -> list[Storage]:
        """Return the tensors, once, after running the region's forward again if that is not done yet."""
        storages, self._storages = self._storages, []
        return storages if self._region is None else self._region.take(self._places)


class Ledger:
    """Bytes held now, their peak, and what held them then, by cause; `place` names what runs now."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder, self.place = recorder, ""
        self.now = self.peak = 0
        self.held: defaultdict[str, int] = defaultdict(int)
        self.at_peak: dict[str, int] | None = {}
        """Written down when the peak is over; None until then."""
        self.nodes: list[Node] = []
        self.region: Region | None = None

    def causes_at_peak(self) -> dict[str, int]:
        """Return the bytes held at the peak by cause."""
        return dict(self.held if self.at_peak is None else self.at_peak)

    def restart_peak(self) -> None:
        """Forget the peak so far: from now on it is that of what is still to come."""
        self.peak, self.at_peak = self.now, None

    def hold(self, size: int, cause: str = "activations") -> Storage:
        """Return new storage."""
        return Storage(self, size, cause)

    def passing(self, *sizes: int, cause: str = "temporaries") -> None:
        """Hold these together and let go of them at once: what an operation needs while it runs."""
        if self.recorder is not None:
            together = [Storage(self, size, cause) for size in sizes]
            del together
        elif self.now + sum(sizes) > self.peak:
            Storage(self, sum(sizes), cause)

    def product(self, size: int) -> Storage:
        """Return the output of a matrix product or of attention, which selective recomputation keeps."""
        return Storage(self, size, "activations") if self.region is None else self.region.product(size)

    @property
    def keeping_products(self) -> bool:
        """Whether products are kept from a region's first run to its second."""
        return self.region is not None and self.region.keep_products

    @property
    def taking_products(self) -> bool:
        """Whether this is such a second run, in which products are not computed."""
        return self.region is not None and self.region.replaying and self.region.keep_products

    def keep(self, storages: Sequence[Storage]) -> Kept:
        """Note what a node keeps. torch's own operations note their inputs before they run."""
        return Kept(list(storages)) if self.region is None else self.region.keep(storages)

    def made(self, storage: Storage, inputs: Sequence[Value], kept: Kept, backward: Backward) -> Value:
        """Return the output of an operation and note how it is differentiated, and what it keeps for that."""
        node = Node([value.node for value in inputs], kept, backward, self.place)
        if self.region is None or not self.region.replaying:
            self.nodes.append(node)
        return Value(storage, node)

    @contextmanager
    def inside(self, region: Region) -> Iterator[None]:
        """Let a region decide what operations keep."""
        outer, self.region = self.region, region
        try:
            yield
        finally:
            self.region = outer

    def backward(self, value: Value, gradient: Storage, ready: GradientReady) -> None:
        """Run the nodes back from a value; `ready` gets each parameter's gradient when autograd would accumulate it."""
        assert value.node is not None
        buffers: dict[Node, Storage] = {value.node: gradient}
        del value, gradient
        while self.nodes:
            node = self.nodes.pop()
            if node in buffers:
                self.place = node.place
                inputs, parameters = _run(node, buffers)
                for parent in reversed(node.parents):
                    storage = inputs.pop()
                    if parent is not None and storage is not None:
                        self._accumulate(buffers, parent, storage)
                    del storage
                parameters.reverse()
                while parameters:
                    ready(*parameters.pop())

    def _accumulate(self, buffers: dict[Node, Storage], node: Node, storage: Storage) -> None:
        """Add a gradient to what has come from elsewhere: in place, if nothing else refers to that."""
        if node not in buffers:
            buffers[node] = storage
        elif sys.getrefcount(buffers[node]) > REFERENCES_OF_A_BUFFER:
            buffers[node] = self.hold(storage.size, "temporaries")


_SAMPLE = {0: object()}
REFERENCES_OF_A_BUFFER = sys.getrefcount(_SAMPLE[0])
"""What Python counts for an object that only a dictionary refers to, asked in this way: versions differ."""


def _run(node: Node, buffers: dict[Node, Storage]) -> Gradients:
    """Run a node on the gradient that waits for it, and let go of that, then of what the node kept."""
    kept, node.kept = node.kept, NOTHING  # a region, and what it holds, lasts until its last node has run
    gradient = buffers.pop(node)
    made = node.backward(gradient, kept.take())
    del gradient
    return made


NOTHING = Kept([])


class Region:
    """A part of a forward pass that keeps its input and is run again when its gradients are wanted.

    `keep_products` says whether the outputs of matrix products and attention are kept as well (selective),
    `input_elsewhere` that the input does not wait here (offload); `state_bytes` are kept, and once more while it runs
    again.
    """

    def __init__(
        self,
        ledger: Ledger,
        forward: Callable[[Value], Value],
        *,
        keep_products: bool = False,
        input_elsewhere: bool = False,
        state_bytes: int = 0,
    ) -> None:
        self._ledger, self._forward, self.keep_products = ledger, forward, keep_products
        self._input_elsewhere, self._state_bytes = input_elsewhere, state_bytes
        self._state = ledger.hold(state_bytes)
        self._products: deque[Storage | None] = deque()
        self._products_wanted = 0
        self._recomputed: dict[int, Storage] = {}
        self._input: Value | None = None
        self._input_size = 0
        self._counter = self._wanted = 0
        self.replaying = False

    def run(self, value: Value) -> Value:
        """Run the forward, keeping the input only."""
        self._input_size = value.size
        if not self._input_elsewhere:
            self._input = Value(value.storage, None)
        with self._ledger.inside(self):
            out = self._forward(value)
        self._wanted = self._counter
        self._forget(out.storage)
        return out

    def _forget(self, out: Storage) -> None:
        """Let go of products that come after the last tensor that is wanted, and of the region's own output."""
        for place, product in enumerate(self._products):
            if place >= self._products_wanted or product is out:
                self._products[place] = None

    def product(self, size: int) -> Storage:
        """Return a product's output: a kept one when the region is run again."""
        if self.replaying and self.keep_products and (kept := self._products.popleft()) is not None:
            return kept
        storage = self._ledger.hold(size)
        if self.keep_products and not self.replaying:
            self._products.append(storage)
        return storage

    def keep(self, kept: Sequence[Storage]) -> Kept:
        """Note what a node would keep; keep it only when run again, which ends with the last that is wanted."""
        if not kept:
            return Kept([])
        first, self._counter = self._counter, self._counter + len(kept)
        if self.replaying:
            self._recomputed.update(enumerate(kept, first))
            if self._counter >= self._wanted:
                raise _AllRecomputed
        else:
            self._products_wanted = len(self._products)
        return Kept([], self, range(first, self._counter))

    def take(self, places: range) -> list[Storage]:
        """Hand over what a node keeps."""
        if not self.replaying:
            self._replay()
        return [self._recomputed.pop(index) for index in places]

    def _replay(self) -> None:
        if self._input is None:
            self._input = Value(self._ledger.hold(self._input_size), None)
        self.replaying, self._counter = True, 0
        state = self._ledger.hold(self._state_bytes, "temporaries")
        with self._ledger.inside(self), suppress(_AllRecomputed):
            self._forward(self._input)
        self._products.clear()
        del state


class _AllRecomputed(Exception):
    """The last tensor that the backward pass wants is there."""
