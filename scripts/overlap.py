"""When a traced process sent and when it computed, and how long it did both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Spans = list[tuple[float, float]]


def spans(events: Any) -> tuple[Spans, Spans]:
    """Return when a trace's process sent, and when it computed, in seconds.

    On a GPU these are the kernels of NCCL and all others. On the CPU they are gloo's work, from its begin to its end,
    and whatever operator the process computes outside of a collective's call.
    """
    on_device = [event for event in events if event.device_type.name == "CUDA"]
    if on_device:
        found = [("nccl" in event.name.lower(), event) for event in on_device]
    else:
        waiting = ("c10d::", "gloo:")
        found = [(event.name.startswith("gloo:"), event) for event in events
                 if event.name.startswith("gloo:") or (event.name.startswith("aten::") and not event.cpu_children
                 and not any(parent.startswith(waiting) for parent in parents(event)))]  # fmt: skip
    sides: tuple[Spans, Spans] = ([], [])
    for is_sent, event in found:
        sides[0 if is_sent else 1].append((event.time_range.start / 1e6, event.time_range.end / 1e6))
    return joined_spans(sides[0]), joined_spans(sides[1])


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
