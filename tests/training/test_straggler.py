"""A rank's own time, and when it is long enough to be told."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace
from typing import Any

import pytest

from bigtrain.training import straggler
from bigtrain.training.straggler import OwnTime, Stragglers, row_of, slowest, waits
from bigtrain.world import ALONE, World


class Told(World):
    """A first rank of three whose others take what a test says."""

    others: tuple[float, ...] = ()

    def sum(self, values: Any) -> list[float]:
        own, spreads, step = values[:3], values[3:6], values[6]
        return [*(mine + other for mine, other in zip(own, (0.0, *Told.others), strict=True)), *spreads, step * 3]

    def gather(self, text: str) -> list[str]:
        return [f"host{rank}" for rank in range(self.size)]


class Given:
    """Own times as a test says."""

    seconds = 0.1

    def take(self) -> float:
        return self.seconds


def follow(others: list[tuple[float, float]], own: float = 0.1) -> list[str]:
    """Return what is told after each window in which the others take so long."""
    given: Any = Given()
    given.seconds = own
    found = Stragglers(Told(0, 3, 0, 3), given)
    told = []
    for pair in others:
        Told.others = pair
        told.append("".join(str(found.step() or "") for _ in range(straggler.WINDOW)))
    return told


def test_who_is_slower_in_two_windows_running_is_told_once() -> None:
    named = "straggler: rank 2 on host2 takes 0.200 s a step longer than the others"
    assert follow([(0.1, 0.1), (0.1, 0.3), (0.1, 0.3), (0.1, 0.3)]) == ["", "", named, ""]
    assert follow([(0.1, 0.3), (0.1, 0.1), (0.3, 0.1), (0.1, 0.3)]) == [""] * 4
    assert follow([(0.0, 0.0)] * 2, own=0.06)[1].startswith("straggler: rank 0 on host0 takes 0.060 s")


def test_who_keeps_up_again_and_falls_back_is_told_again() -> None:
    slow, even = (0.1, 0.3), (0.1, 0.1)
    assert len("".join(follow([slow, slow, even, even, slow, slow])).split("straggler")) == 3


def test_all_bounds() -> None:
    assert slowest([0.1, 0.1, 0.14], 0.2) is None
    assert slowest([0.1, 0.1, 0.16], 0.2) == (2, pytest.approx(0.06))
    assert slowest([5.0, 5.2], 5.3) is None
    assert slowest([5.0, 5.7], 5.8) == (1, pytest.approx(0.7))
    assert slowest([0.1, 0.1, 0.3], 0.3, spread=0.1) == (2, pytest.approx(0.2))
    assert slowest([0.1, 0.1, 0.3], 0.3, spread=0.2) is None


def test_noise_alone_names_nobody() -> None:
    draw = random.Random(7)
    for _ in range(500):
        assert slowest([0.1 + abs(draw.gauss(0, 0.01)) for _ in range(8)], 0.12) is None


def test_alone_nobody_is_a_straggler() -> None:
    found = Stragglers(ALONE)
    with found.watched(), found.paused():
        assert not any(found.step() for _ in range(3 * straggler.WINDOW))


def test_own_time_counts_work_and_not_what_is_paused() -> None:
    own = OwnTime()
    own.start()
    try:
        time.sleep(0.3)
        assert own.take() == pytest.approx(0.3, abs=0.15)
        with own.paused():
            time.sleep(0.2)
        assert own.take() < 0.1
    finally:
        own.stop()


def test_a_thread_inside_of_torch_distributed_waits() -> None:
    def frame(file: str, back: Any = None) -> Any:
        return SimpleNamespace(f_code=SimpleNamespace(co_filename=file), f_back=back)

    inside = frame("/x/torch/distributed/distributed_c10d.py")
    assert waits(inside)
    assert waits(frame("/x/torch/distributed/c10d_logger.py", inside))
    assert not waits(frame("model.py"))
    assert not waits(None)
    deep: Any = inside
    for _ in range(straggler.DEPTH):
        deep = frame("loader.py", deep)
    assert not waits(deep)


def test_a_row() -> None:
    found = straggler.Straggler(2, "host", 0.25)
    expected = {"step": 40, "tokens": 9, "straggler": 2, "straggler_host": "host", "straggler_seconds": 0.25}
    assert row_of(found, 40, 9) == expected
