"""What memory that was measured is held for: a cause and a place for every allocation of real steps.

Three things are known. Tensors that are still there afterwards, or that a mark names while they are, have an address:
weights, optimizer states, gradients. Marks of phases and blocks say when and where all else was allocated. And torch
numbers the nodes of the backward pass as the forward operations that made them, which gives each its block.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile

from bigtrain.memory.marks import BLOCK, GRADIENT, PHASES, STEP
from bigtrain.memory.measure import MARK, NODE, Allocation, Operation, Trace
from bigtrain.memory.record import Recording
from bigtrain.memory.report import CAUSES

LOSS = "LinearCrossEntropy"
"""What the name of the operation holds that makes logits, chunk by chunk."""
SHARDING = "FSDP::"
"""How the names begin of what `fully_shard` does around a block, but for waiting for it."""
SUMMING = "FSDP::post_backward_reshard"
"""Of where it makes wider sums of gradients that wait for those of other micro-batches."""
REDUCING = "FSDP::post_backward_reduce"
"""Of where it reduces gradients: what outlives the backward pass waits for those of other micro-batches, too."""
SCALAR_BYTES = 8


def attribute(trace: Trace, kept: Mapping[int, tuple[str, str]], *, head: tuple[int, int] | None = None) -> Recording:
    """Return a trace with a cause and a place for each allocation, and a mark where each step begins: `step 0`, ...

    `kept` says what lies where at the end of the trace. `head` is the shape of the matrix onto the vocabulary, padded:
    it tells logits among what the chunked loss allocates; without it there are none. Temporaries live within one
    operation of the forward pass, or are gradients of activations.
    """
    return _Attribution(trace, kept, head).recording()


def causes_at_peak(recording: Recording, since: str | None = None) -> dict[str, int]:
    """Return the bytes held at the peak of a recording, or at that since a mark, by cause."""
    held = dict.fromkeys(CAUSES, 0)
    found, most, now = dict(held), 0, 0
    begin = 0 if since is None else recording.marks[since]
    for index, (number, change) in enumerate(_changes(recording)):
        held[recording.causes[number]] += change
        now += change
        if index >= begin and now > most:
            most, found = now, dict(held)
    return found


def until_peak(recording: Recording) -> tuple[Recording, str]:
    """Return a recording up to the end of the step that has the peak, and the mark of that step, or of the first."""
    now = most = peak = 0
    for index, (_, change) in enumerate(_changes(recording)):
        now += change
        if now > most:
            most, peak = now, index
    begins = sorted((begin, name) for name, begin in recording.marks.items())
    place = max(0, bisect_right(begins, peak, key=lambda pair: pair[0]) - 1)
    end = begins[place + 1][0] if place + 1 < len(begins) else len(recording.events)
    return replace(recording, events=recording.events[:end]), begins[place][1]


def _changes(recording: Recording) -> Iterator[tuple[int, int]]:
    """Yield for each event the number of its allocation, and what it adds or takes away."""
    number = -1
    for event in recording.events:
        if event >= 0:
            number += 1
            yield number, event
        else:
            yield ~event, -recording.sizes[~event]


class _Attribution:
    """The marks of a trace, and what follows from them for an allocation."""

    def __init__(self, trace: Trace, kept: Mapping[int, tuple[str, str]], head: tuple[int, int] | None) -> None:
        self._trace, self._head = trace, head
        self._phases = sorted((m for phase in PHASES for m in trace.marks(phase)), key=lambda m: m.begin_ns)
        self._begins = [operation.begin_ns for operation in self._phases]
        self._blocks = _blocks_of_nodes(trace.operations)
        self._known = _known(trace, kept)
        self._room: dict[Operation, int] = {}
        """The bytes for a chunk's logits, which each loss allocates before all else of its chunks."""

    def recording(self) -> Recording:
        """Return what was asked for."""
        recording = Recording()
        steps = self._trace.marks(STEP)[::-1]
        for event in self._trace.events:
            allocation = self._trace.allocations[event if event >= 0 else ~event]
            now = allocation.begin_ns if event >= 0 else allocation.end_ns
            while steps and now is not None and now >= steps[-1].begin_ns:
                recording.mark(steps.pop().name.removeprefix(MARK))
            if event < 0:
                recording.release(~event)
            else:
                recording.phase = self._phase(allocation)
                recording.allocate(allocation.size, *self._cause_and_place(event, allocation))
        return recording

    def _phase(self, allocation: Allocation) -> str:
        """Return what the step was doing; an empty text outside of steps."""
        phase = self._phase_mark(allocation)
        return "" if phase is None else phase.name.removeprefix(MARK)

    def _phase_mark(self, allocation: Allocation) -> Operation | None:
        index = bisect_right(self._begins, allocation.begin_ns) - 1
        return None if index < 0 or allocation.begin_ns > self._phases[index].end_ns else self._phases[index]

    def _outlives_phase(self, allocation: Allocation) -> bool:
        phase = self._phase_mark(allocation)
        return phase is not None and not _ends_within(allocation, phase)

    def _cause_and_place(self, number: int, allocation: Allocation) -> tuple[str, str]:
        above = [] if allocation.operation is None else list(allocation.operation.outwards())
        return self._known.get(number) or (self._cause(allocation, above), self._place(above))

    def _cause(self, allocation: Allocation, above: Sequence[Operation]) -> str:
        if allocation.end_ns is None:  # a library's workspace, for good
            return "temporaries"
        sharding = next((operation.name for operation in above if operation.name.startswith(SHARDING)), None)
        if sharding is not None:
            waiting = sharding.startswith(REDUCING) and self._outlives_phase(allocation)
            waiting = waiting and allocation.size > SCALAR_BYTES  # gradient release leaves norms there
            return "gradients" if waiting or sharding.startswith(SUMMING) else "communication"
        phase, operations = self._phase(allocation), _forward_operations(above)
        again = any(operation.sequence >= 0 for operation in operations)
        if phase != "forward" and not (phase == "backward" and again):
            return "temporaries"
        outermost = operations[-1] if operations else None
        if outermost is not None and LOSS in outermost.name:
            return self._cause_in_loss(allocation, operations)
        return "temporaries" if _ends_within(allocation, outermost) else "activations"

    def _cause_in_loss(self, allocation: Allocation, operations: Sequence[Operation]) -> str:
        """Tell apart what the chunked loss holds: it leaves gradients of weights, which begin as zeros."""
        made_by = operations[-2].name if len(operations) > 1 else ""
        if not _ends_within(allocation, operations[-1]):
            return "gradients" if made_by == "aten::zeros_like" and allocation.size > SCALAR_BYTES else "activations"
        if made_by == "aten::empty" and self._head is not None:
            self._room[operations[-1]] = allocation.size
            return "logits"
        return "logits" if self._holds_logits(allocation.size, self._room.get(operations[-1])) else "temporaries"

    def _holds_logits(self, size: int, room: int | None) -> bool:
        """Tell by its size whether something has a number for each of a chunk's positions and the whole vocabulary.

        Chunks fill at least half of the room that is made for their logits in fp32, and copies may have half its bytes.
        """
        if self._head is None or room is None:
            return False
        rows, width = self._head
        return (
            size % (2 * rows) == 0 and size >= room / 4 and size not in (rows * width * 2, rows * width * 4, rows * 4)
        )

    def _place(self, above: Sequence[Operation]) -> str:
        node = -1
        for operation in above:
            if operation.is_backward and operation.sequence >= 0:
                node = operation.sequence  # that of hooks' nodes is not on what surrounds them
            if operation.name.startswith(MARK + BLOCK):
                return operation.name.removeprefix(MARK + BLOCK)
            if operation.name.startswith(SHARDING) and operation.name.endswith(")"):
                return operation.name.rpartition("(")[2].rstrip(")")
            if operation.name.startswith(NODE):
                return self._blocks.get(node, "")
        return ""


def _forward_operations(above: Sequence[Operation]) -> list[Operation]:
    """Return the operations around an allocation, the innermost first, as far as a mark or a node of the backward."""
    return list(takewhile(lambda o: not o.is_backward and not o.name.startswith(MARK), above))


def _ends_within(allocation: Allocation, operation: Operation | None) -> bool:
    return operation is not None and allocation.end_ns is not None and allocation.end_ns <= operation.end_ns


def _blocks_of_nodes(operations: Iterable[Operation]) -> dict[int, str]:
    """Return the block of each node of the backward pass by its number.

    An operation without a node shows the number that the next node gets, so the last one to show it is the one.
    """
    found: dict[int, str] = {}
    for operation in operations:
        if operation.sequence < 0 or any(outer.is_backward for outer in operation.outwards()):
            continue
        marks = (outer.name for outer in operation.outwards() if outer.name.startswith(MARK + BLOCK))
        found[operation.sequence] = next(marks, "").removeprefix(MARK + BLOCK)
    return found


def _known(trace: Trace, kept: Mapping[int, tuple[str, str]]) -> dict[int, tuple[str, str]]:
    """Return cause and place of the allocations whose address is known, by their numbers."""
    at: dict[int, list[int]] = {}
    for number, allocation in enumerate(trace.allocations):
        at.setdefault(allocation.address, []).append(number)
    found: dict[int, tuple[str, str]] = {}
    for gradient in trace.marks(GRADIENT):
        where, _, place = gradient.name.removeprefix(MARK + GRADIENT).partition(" ")
        for number in at.get(int(where), []):
            if _is_alive(trace.allocations[number], gradient.begin_ns):
                found[number] = ("gradients", place)
    for where_kept, cause_and_place in kept.items():
        last = at.get(where_kept, [])[-1:]
        found |= {number: cause_and_place for number in last if trace.allocations[number].end_ns is None}
    return found


def _is_alive(allocation: Allocation, time_ns: int) -> bool:
    return allocation.begin_ns <= time_ns and (allocation.end_ns is None or time_ns < allocation.end_ns)
