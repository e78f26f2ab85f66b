"""Where the time of profiled steps went: sums over what ran, in which every moment is counted once."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bigtrain.planner.by_class import CLASSES, COMMUNICATION, COPIES, DATA, IDLE, OTHER
from bigtrain.profiling.kernels import (
    BACKWARD_MARK,
    BATCH_MARK,
    DATA_MARK,
    FORWARD_MARK,
    STEP_MARK,
    UPDATE_MARK,
    WAIT_MARK,
    class_of_kernel,
    class_of_operator,
)  # fmt: skip
from bigtrain.profiling.spans import Event, Span, nested

PHASES = {BATCH_MARK: "forward", FORWARD_MARK: "forward", BACKWARD_MARK: "backward", UPDATE_MARK: "update"}
OUTSIDE = "outside"

HIDDEN = (COPIES, COMMUNICATION)
"""Where something else runs on the device at the same time, it counts, and not these."""


@dataclass(frozen=True)
class Breakdown:
    """Seconds of one step, the mean of `steps`: by class and by phase, each of which sums to `seconds`.

    Phases are forward, backward, update and what lies outside of them. `others` are the members of the class "other".
    """

    steps: int
    seconds: float
    by_class: dict[str, float]
    phases: dict[str, float]
    others: dict[str, float]


def break_down(events: Sequence[Event]) -> Breakdown:
    """Return where the time of marked steps went: on the device, if any kernels ran there, else on the host."""
    spans = nested(events)
    steps = [span for span in spans if span.event.name == STEP_MARK]
    kernels = [event for event in events if event.on_device]
    return _on_device(kernels, spans, steps) if kernels else _on_host(spans, steps)


class _Sums:
    """Nanoseconds by class, by phase, and by name of what has no class."""

    def __init__(self) -> None:
        self.by_class: Counter[str] = Counter()
        self.phases: Counter[str] = Counter()
        self.others: Counter[str] = Counter()

    def add(self, taken_ns: int, its: str, phase: str, name: str) -> None:
        self.by_class[its] += taken_ns
        self.phases[phase] += taken_ns
        if its == OTHER:
            self.others[name] += taken_ns

    def over(self, steps: int, total_ns: int) -> Breakdown:
        """Return the mean of so many steps, in seconds."""

        def mean(sums: Counter[str], order: Iterable[str]) -> dict[str, float]:
            return {name: sums[name] / steps / 1e9 for name in order if sums[name]}

        names = [name for name, _ in self.others.most_common()]
        phases = ("forward", "backward", "update", OUTSIDE)
        return Breakdown(
            steps, total_ns / steps / 1e9, mean(self.by_class, CLASSES), mean(self.phases, phases),
            mean(self.others, names),
        )  # fmt: skip


def _on_host(spans: Sequence[Span], steps: Sequence[Span]) -> Breakdown:
    """Sum what each operator took by itself, in the thread that took the steps."""
    sums, thread = _Sums(), steps[0].event.thread
    for span in spans:
        names = list(span.names())
        if span.event.thread == thread and STEP_MARK in names:
            phase = next((PHASES[name] for name in names if name in PHASES), OUTSIDE)
            sums.add(span.self_ns, class_of_operator(names), phase, span.event.name)
    return sums.over(len(steps), sum(step.event.end_ns - step.event.begin_ns for step in steps))


def _on_device(kernels: Sequence[Event], spans: Sequence[Span], steps: Sequence[Span]) -> Breakdown:
    """Sum what ran on the device from the first step's begin until it had done all of the last one.

    Nothing may run there when the first one begins.
    """
    begin = steps[0].event.begin_ns
    end = max(span.event.end_ns for span in spans if span.event.name in (STEP_MARK, WAIT_MARK))
    launches = {span.event.number: span for span in spans if span.event.number}
    phases = _Timeline(spans, PHASES)
    waits = [span.event for span in spans if span.event.name == DATA_MARK]
    sums, pieces = _Sums(), []
    for kernel in kernels:
        launch = launches.get(kernel.launched_by)
        its = class_of_kernel(kernel.name, list(launch.names()) if launch else [])
        phase = phases.at(launch.event.begin_ns if launch else kernel.begin_ns)
        pieces.append((max(begin, kernel.begin_ns), min(end, kernel.end_ns), (its, phase, kernel.name)))
    for from_ns, until_ns, what in _seen(pieces, begin, end):
        if what is not None:
            sums.add(until_ns - from_ns, *what)
            continue
        for_data = sum(max(0, min(until_ns, wait.end_ns) - max(from_ns, wait.begin_ns)) for wait in waits)
        sums.add(for_data, DATA, OUTSIDE, "")
        sums.add(until_ns - from_ns - for_data, IDLE, OUTSIDE, "")
    return sums.over(len(steps), end - begin)


What = tuple[str, str, str]
"""Class, phase and name of a kernel."""


def _seen(pieces: Iterable[tuple[int, int, What]], begin: int, end: int) -> Iterator[tuple[int, int, What | None]]:
    """Yield stretches of time and what counts in them: one of those that run, computing before all else; or nothing."""
    changes: dict[int, list[tuple[int, What]]] = defaultdict(list)
    changes[begin], changes[end] = [], []
    for from_ns, until_ns, what in pieces:
        if from_ns < until_ns:
            changes[from_ns].append((1, what))
            changes[until_ns].append((-1, what))
    running: Counter[What] = Counter()
    for now, then in pairwise(sorted(changes)):
        for change, what in changes[now]:
            running[what] += change
        running = +running
        yield now, then, min(running, key=lambda what: what[0] in HIDDEN) if running else None


class _Timeline:
    """Which phase the host was in at a moment."""

    def __init__(self, spans: Iterable[Span], names: dict[str, str]) -> None:
        self._spans = [(span.event, names[span.event.name]) for span in spans if span.event.name in names]
        self._begins = [event.begin_ns for event, _ in self._spans]

    def at(self, moment_ns: int) -> str:
        place = bisect_right(self._begins, moment_ns) - 1
        if place < 0 or self._spans[place][0].end_ns < moment_ns:
            return OUTSIDE
        return self._spans[place][1]
