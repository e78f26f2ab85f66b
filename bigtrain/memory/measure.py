"""What real steps hold: every allocation that torch's profiler records, with its address and what ran.

The profiler hears of the CPU's allocations and of the CUDA caching allocator's alike, on the host and in order.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile

from bigtrain.memory.report import Timeline

MEMORY_EVENT = "[memory]"
MARK = "bigtrain::"
"""How the names of `torch.profiler.record_function` begin that say what a step is doing."""

NODE = "autograd::engine::evaluate_function"
"""How torch names the run of a node of the backward pass, with all that comes with it."""


@dataclass(eq=False, slots=True)
class Operation:
    """Something that ran, inside of something else: an operator, a node of the backward pass, or a mark.

    `sequence` is autograd's number of a node, the same in forward and backward; -1 for what is not differentiated.
    """

    name: str
    parent: Operation | None
    begin_ns: int
    end_ns: int
    sequence: int
    is_backward: bool

    def outwards(self) -> Iterator[Operation]:
        """Yield this, what it is inside of, and so on."""
        found: Operation | None = self
        while found is not None:
            yield found
            found = found.parent


@dataclass(eq=False, slots=True)
class Allocation:
    """Memory from its allocation to its release; `end_ns` is None where it was not released."""

    size: int
    address: int
    operation: Operation | None
    begin_ns: int
    end_ns: int | None = None


@dataclass
class Trace:
    """Allocations of one device in order; `events` holds i for the allocation of the i-th, ~i for its release."""

    allocations: list[Allocation] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)

    @property
    def timeline(self) -> Timeline:
        changes = (self.allocations[i].size if i >= 0 else -self.allocations[~i].size for i in self.events)
        return Timeline(tuple(accumulate(changes)))

    def marks(self, name: str) -> list[Operation]:
        """Return the marks whose name, without MARK, begins like this, in order of time."""
        return [operation for operation in self.operations if operation.name.startswith(MARK + name)]


def measure(run: Callable[[], object]) -> Timeline:
    """Return what a call allocates and releases on the CPU.

    What lies in unreachable cycles is collected first: released inside, it would count against the call.
    """
    return record(run).timeline


def record(run: Callable[[], object], *, device: str = "cpu") -> Trace:
    """Run a call and return its allocations on a kind of device: "cpu" or "cuda", there as the allocator rounds them.

    Releases of what was allocated before are left out.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results = profiler.profiler
    assert results is not None and results.kineto_results is not None
    trace = Trace()
    memory = list(_walk(results.kineto_results.experimental_event_tree(), trace.operations))
    memory.sort(key=lambda found: found[0].start_time_ns)
    trace.operations.sort(key=lambda operation: operation.begin_ns)
    _match(trace, memory, device)
    return trace


def _walk(roots: Iterable[Any], operations: list[Operation]) -> Iterator[tuple[Any, Operation | None]]:
    """Yield the memory events of a profile with what ran, each thread's in order, and note all that ran."""
    waiting: list[tuple[Any, Operation | None]] = [(root, None) for root in reversed(list(roots))]
    while waiting:
        event, parent = waiting.pop()
        if event.name == MEMORY_EVENT:
            yield event, parent
            continue
        fields = event.extra_fields
        sequence = getattr(fields, "sequence_number", -1)
        is_backward = event.name.startswith(NODE) or "BACKWARD" in str(getattr(fields, "scope", ""))
        operation = Operation(event.name, parent, event.start_time_ns, event.end_time_ns, sequence, is_backward)
        operations.append(operation)
        waiting.extend((child, operation) for child in reversed(event.children))


def _match(trace: Trace, memory: Iterable[tuple[Any, Operation | None]], device: str) -> None:
    """Find for each release the allocation that it ends."""
    alive: dict[int, int] = {}
    for event, operation in memory:
        fields = event.extra_fields
        if fields.device.type != device:
            continue
        if fields.alloc_size >= 0:
            alive[fields.ptr] = len(trace.allocations)
            trace.events.append(len(trace.allocations))
            trace.allocations.append(Allocation(fields.alloc_size, fields.ptr, operation, event.start_time_ns))
        elif (index := alive.pop(fields.ptr, None)) is not None:
            trace.events.append(~index)
            trace.allocations[index].end_ns = event.start_time_ns
