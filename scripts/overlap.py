"""When a traced process sent and when it computed, and how long it did both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Spans = list[tuple[float, float]]


def spans(events: Any) -> tuple[Spans, Spans]:
    """Return when a trace's process sent, and when it computed, in seconds.

    On a GPU these are the kernels of NCCL and all others. On the CPU they are gloo's work, from its begin to its end,
    and whatever operator runs outside of a collective's call and of the threads that gloo works in.
    """
    on_device = [event for event in events if event.device_type.name == "CUDA"]
    sent = [event for event in on_device or events if event.name.lower().startswith(("nccl", "gloo:"))]
    if on_device:
        computed = [event for event in on_device if "nccl" not in event.name.lower()]
    else:
        threads = {event.thread for event in sent}
        operators = (event for event in events if event.name.startswith("aten::") and event.thread not in threads)
        computed = [event for event in operators if not event.cpu_children and not _is_in_collective(event)]
    both = ([(event.time_range.start / 1e6, event.time_range.end / 1e6) for event in side] for side in (sent, computed))
    sending, computing = map(joined_spans, both)
    return sending, computing


def _is_in_collective(event: Any) -> bool:
    return any(name.startswith("c10d::") for name in parents(event))


def parents(event: Any) -> Iterator[str]:
    """Yield the names of what an event is inside of."""
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event.name


def joined_spans(found: Spans) -> Spans:
    """Return the union of spans, in order."""
    merged: Spans = []
    for begin, end in sorted(found):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def crossed(one: Spans, other: Spans) -> Spans:
    """Return when both are so."""
    pairs = ((max(a[0], b[0]), min(a[1], b[1])) for a in one for b in other)
    return [span for span in pairs if span[0] < span[1]]


def length(found: Spans) -> float:
    """Return the seconds of spans together."""
    return sum(end - begin for begin, end in found)
