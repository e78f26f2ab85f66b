"""Sums over what a profiler heard: every moment once, on a CPU and on a GPU, by class and by phase."""

from __future__ import annotations

import pytest

from bigtrain.planner.by_class import (
    ATTENTION,
    CALLS,
    COMMUNICATION,
    COPIES,
    DATA,
    ELEMENTWISE,
    IDLE,
    MATRIX,
    OPTIMIZER,
    OTHER,
)  # fmt: skip
from bigtrain.profiling.breakdown import Breakdown, break_down
from bigtrain.profiling.spans import Event

US = 1000
"""Nanoseconds."""


def host(name: str, begin: int, end: int, number: int = 0, thread: int = 1) -> Event:
    return Event(name, begin * US, end * US, thread, number)


def kernel(name: str, begin: int, end: int, launched_by: int = 0) -> Event:
    return Event(name, begin * US, end * US, 7, 0, launched_by, on_device=True)


def us(seconds: dict[str, float]) -> dict[str, int]:
    return {name: round(1e6 * value) for name, value in seconds.items()}


def adds_up(found: Breakdown) -> bool:
    sums = sum(found.by_class.values()), sum(found.phases.values())
    return sums == (pytest.approx(found.seconds), pytest.approx(found.seconds))


def step_on_a_host(begin: int) -> list[Event]:
    events = [
        host("bigtrain::step", 0, 100), host("bigtrain::data", 0, 5), host("aten::copy_", 1, 2),
        host("bigtrain::batch", 5, 10), host("aten::cat", 6, 9), host("bigtrain::forward", 10, 40),
        host("aten::linear", 12, 30), host("aten::addmm", 15, 28), host("bigtrain::backward", 40, 80),
        host("AddmmBackward0", 42, 70), host("aten::mm", 45, 65), host("bigtrain::update", 80, 98),
        host("aten::_fused_adamw_", 82, 97), host("somewhere::unheard_of", 30, 34),
        host("aten::mm", 0, 100, thread=2),
    ]  # fmt: skip
    return [Event(e.name, e.begin_ns + begin * US, e.end_ns + begin * US, e.thread) for e in events]


def test_on_a_host_every_moment_of_the_steps_counts_once() -> None:
    outside = [host("aten::mm", 200, 300)]
    found = break_down([*step_on_a_host(0), *outside, *step_on_a_host(1000)])
    assert (found.steps, us({"": found.seconds})) == (2, {"": 100})
    assert us(found.by_class) == {MATRIX: 33, OPTIMIZER: 15, COPIES: 3, OTHER: 4, CALLS: 40, DATA: 5}
    assert us(found.phases) == {"forward": 35, "backward": 40, "update": 18, "outside": 7}
    assert us(found.others) == {"somewhere::unheard_of": 4}
    assert adds_up(found)


def on_a_gpu() -> list[Event]:
    """Return a step of a host that runs ahead, and what it launches on two streams; the backward in its own thread."""
    return [
        host("bigtrain::step", 0, 60), host("bigtrain::data", 0, 10), host("bigtrain::forward", 10, 30),
        host("aten::mm", 11, 12, number=1), host("aten::gelu", 13, 14, number=2),
        host("torch_attn::_varlen_attn", 15, 16, number=3), host("bigtrain::backward", 30, 50),
        host("aten::mm", 31, 32, number=4, thread=2), host("c10d::allreduce_", 33, 34, number=5, thread=2),
        host("bigtrain::update", 50, 58), host("aten::_fused_adamw_", 51, 52, number=6),
        host("bigtrain::wait", 60, 200),
        kernel("nvjet_tst", 20, 60, 1), kernel("vectorized_elementwise_kernel", 60, 70, 2),
        kernel("flash_fwd_kernel", 70, 90, 3), kernel("nvjet_tst", 95, 145, 4),
        kernel("ncclDevKernel_AllReduce", 120, 160, 5), kernel("multi_tensor_apply_kernel", 160, 190, 6),
        kernel("Memcpy HtoD (Pinned -> Device)", 85, 95), kernel("unheard_of", 190, 192),
    ]  # fmt: skip


def test_on_a_gpu_what_is_hidden_behind_computing_does_not_count() -> None:
    found = break_down(on_a_gpu())
    assert us(found.by_class) == {
        MATRIX: 90, ATTENTION: 20, ELEMENTWISE: 10, OPTIMIZER: 30, COPIES: 5, COMMUNICATION: 15, OTHER: 2, IDLE: 18,
        DATA: 10,
    }  # fmt: skip
    assert us({"": found.seconds}) == {"": 200}
    assert us(found.others) == {"unheard_of": 2}
    assert adds_up(found)


def test_on_a_gpu_phases_are_those_that_launched() -> None:
    assert us(break_down(on_a_gpu()).phases) == {"forward": 70, "backward": 65, "update": 30, "outside": 35}


def test_what_began_before_counts_from_the_first_step_on() -> None:
    found = break_down([host("bigtrain::step", 10, 30), kernel("nvjet", 0, 20), kernel("nvjet", 15, 50)])
    assert us(found.by_class) == {MATRIX: 20}
    assert adds_up(found)
