"""What the profiler shows of a call: peak, end, and nothing of what was there before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bigtrain.memory.measure import measure, record
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


def test_a_trace_pairs_releases_with_allocations() -> None:
    def run() -> None:
        first = torch.zeros(1000)
        second = torch.zeros(500)
        del first
        del second

    trace = record(run)
    assert trace.events == [0, 1, ~0, ~1]
    assert [allocation.size for allocation in trace.allocations] == [4000, 2000]
    first, second = trace.allocations
    assert first.end_ns is not None
    assert second.begin_ns <= first.end_ns
    assert trace.timeline.timeline == (4000, 6000, 2000, 0)


def test_what_is_kept_has_an_address_and_no_end() -> None:
    kept: list[Tensor] = []
    (allocation,) = record(lambda: kept.append(torch.zeros(1000))).allocations
    assert allocation.end_ns is None
    assert allocation.address == kept[0].untyped_storage().data_ptr()


def test_an_address_used_again_is_another_allocation() -> None:
    def run() -> None:
        for _ in range(3):
            torch.zeros(4096)

    trace = record(run)
    assert trace.events == [0, ~0, 1, ~1, 2, ~2]


def test_releases_of_what_was_there_before_do_not_count() -> None:
    before: list[Tensor] = []
    record(lambda: before.append(torch.zeros(1000)))  # from here on the profiler knows its size
    trace = record(before.clear)
    assert not trace.events


def test_operations_are_nested_and_numbered() -> None:
    x = torch.ones(8, 8, requires_grad=True)
    trace = record(lambda: (x @ x).sum().backward())
    forward = next(operation for operation in trace.operations if operation.name == "aten::mm")
    backward = [o for o in trace.operations if o.is_backward and o.sequence == forward.sequence]
    assert {operation.name for operation in backward} >= {"MmBackward0"}
    inside = [a for a in trace.allocations if a.operation and any(o in backward for o in a.operation.outwards())]
    assert sum(allocation.size for allocation in inside) >= 2 * 8 * 8 * 4


def test_events_of_another_device_are_left_out() -> None:
    assert not record(lambda: torch.zeros(10), device="cuda").allocations


@pytest.mark.gpu
def test_cuda_is_measured_as_its_allocator_counts() -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    def run() -> None:
        first = torch.zeros(1000, device="cuda")
        second = first + 1
        del first, second

    trace = record(run, device="cuda")
    assert trace.timeline.peak_bytes == torch.cuda.max_memory_allocated() - before == 2 * 4096
    assert trace.timeline.end_bytes == 0
