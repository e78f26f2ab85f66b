"""What a real step on the CPU holds: every allocation that torch's profiler records."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile

from bigtrain.memory.report import Timeline

MEMORY_EVENT = "[memory]"


def measure(run: Callable[[], object]) -> Timeline:
    """Return what a call allocates and releases on the CPU.

    What lies in unreachable cycles is collected first: released inside, it would count against the call.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results = profiler.profiler
    assert results is not None and results.kineto_results is not None
    events = [event for event in results.kineto_results.events() if event.name() == MEMORY_EVENT]
    events.sort(key=lambda event: event.start_ns())
    return Timeline(tuple(accumulate(event.nbytes() for event in events)))
