"""What the profiler shows of a call: peak, end, and nothing of what was there before."""

from __future__ import annotations

import torch
from torch import Tensor

from bigtrain.memory.measure import measure
from bigtrain.memory.report import Timeline


def test_the_peak_and_the_end_of_a_call() -> None:
    kept: list[Tensor] = []

    def run() -> None:
        first = torch.zeros(1000, dtype=torch.float32)
        second = torch.zeros(500, dtype=torch.float32)
        del first
        kept.append(second)

    found = measure(run)
    assert found.peak_bytes == 6000
    assert found.end_bytes == 2000
    assert found.timeline == (4000, 6000, 2000)


def test_operations_hold_what_they_return() -> None:
    x = torch.ones(64, 64)
    found = measure(lambda: x @ x)
    assert found.peak_bytes == 64 * 64 * 4
    assert found.end_bytes == 0


def test_garbage_from_before_does_not_count() -> None:
    cycle: list[object] = [torch.zeros(1000)]
    cycle.append(cycle)
    del cycle
    assert measure(lambda: torch.zeros(10)).timeline == (40, 0)


def test_a_call_that_holds_nothing() -> None:
    found = measure(lambda: None)
    assert (found.timeline, found.peak_bytes, found.end_bytes) == ((), 0, 0)


def test_a_measurement_without_events() -> None:
    assert Timeline(()).peak_bytes == Timeline(()).end_bytes == 0
