"""What a profile of torch's heard, as spans inside of each other: what each took by itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

HOST: Any = torch.autograd.DeviceType.CPU  # type: ignore[attr-defined]

NOT_WORK = ("Context Sync", "Event Sync", "Stream Sync", "Stream Wait Event")
"""What is told of a device without that anything runs on it."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that ran: in a thread of the host, or on a device.

    `number` is by which a kernel names what launched it, in `launched_by`; 0 for none.
    """

    name: str
    begin_ns: int
    end_ns: int
    thread: int = 0
    number: int = 0
    launched_by: int = 0
    on_device: bool = False


@dataclass(eq=False, slots=True)
class Span:
    """An event of the host inside of what ran it; `inside_ns` is what others take of it."""

    event: Event
    parent: Span | None
    inside_ns: int = 0

    @property
    def self_ns(self) -> int:
        """Return what it took by itself."""
        return self.event.end_ns - self.event.begin_ns - self.inside_ns

    def names(self) -> Iterator[str]:
        """Yield its name, that of what it is inside of, and so on."""
        found: Span | None = self
        while found is not None:
            yield found.event.name
            found = found.parent


def events_of(profiler: Any) -> list[Event]:
    """Return what a `torch.profiler.profile` heard: operators, marks, and kernels; not the calls of a CUDA runtime."""
    found, heard = [], profiler.profiler.kineto_results.events()
    annotations = {event.name() for event in heard if event.is_user_annotation()}
    for event in heard:
        on_device = event.device_type() != HOST
        launched_by = event.linked_correlation_id()
        if on_device and (event.name() in annotations or event.name() in NOT_WORK):
            continue
        if event.is_async() or (launched_by and not on_device):
            continue
        found.append(
            Event(
                event.name(),
                event.start_ns(),
                event.end_ns(),
                event.start_thread_id(),
                event.correlation_id(),
                launched_by,
                on_device,
            )
        )
    return found


def nested(events: Iterable[Event]) -> list[Span]:
    """Return the events of the host as spans, those of each thread inside of each other, in order of their begin."""
    threads: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        if not event.on_device:
            threads[event.thread].append(event)
    found: list[Span] = []
    for of_thread in threads.values():
        around: Span | None = None
        for event in sorted(of_thread, key=lambda one: (one.begin_ns, -one.end_ns)):
            while around is not None and around.event.end_ns < max(event.end_ns, event.begin_ns + 1):
                around = around.parent
            if around is not None:
                around.inside_ns += event.end_ns - event.begin_ns
            around = Span(event, around)
            found.append(around)
    return sorted(found, key=lambda span: span.event.begin_ns)
