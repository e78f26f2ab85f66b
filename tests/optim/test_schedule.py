"""Schedules: pure, warm, and never a wasted step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.optim.schedule import COSINE_FLOOR, learning_rate_factor, warmup_step_count

SCHEDULES = ["linear", "cosine", "wsd", "constant"]


def curve(schedule: str, total: int, warmup: int) -> list[float]:
    return [learning_rate_factor(schedule, step, total_steps=total, warmup_steps=warmup) for step in range(total)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(total=st.integers(1, 500), share=st.floats(0, 1))
def test_factors_lie_above_0_and_reach_at_most_1(schedule: str, total: int, share: float) -> None:
    factors = curve(schedule, total, int(share * total))
    assert all(0 < factor <= 1 for factor in factors)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(total=st.integers(2, 300), warmup=st.integers(1, 299))
def test_it_rises_to_the_peak_and_never_rises_again(schedule: str, total: int, warmup: int) -> None:
    warmup = min(warmup, total - 1)
    factors = curve(schedule, total, warmup)
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup - 1] == 1
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


def test_the_first_step_of_a_warm_up_is_not_wasted() -> None:
    assert curve("linear", 100, 10)[0] == pytest.approx(0.1)


def test_linear_falls_in_a_line_to_one_step_above_zero() -> None:
    factors = curve("linear", 110, 10)
    assert factors[10] == 1
    assert factors[60] == pytest.approx(0.5)
    assert factors[-1] == pytest.approx(0.01)


def test_cosine_ends_near_its_floor() -> None:
    factors = curve("cosine", 1000, 0)
    assert factors[500] == pytest.approx((1 + COSINE_FLOOR) / 2)
    assert factors[-1] == pytest.approx(COSINE_FLOOR, abs=1e-4)


def test_wsd_is_flat_then_falls_over_the_last_fifth() -> None:
    factors = curve("wsd", 100, 10)
    assert factors[10:80] == [1.0] * 70
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.05)


def test_after_the_end_the_last_value_holds() -> None:
    assert learning_rate_factor("linear", 500, total_steps=100, warmup_steps=0) == curve("linear", 100, 0)[-1]


@pytest.mark.parametrize(("written", "steps"), [(0, 0), (7, 7), ("6%", 60), ("28.43%", 284), ("0%", 0)])
def test_warm_up_in_steps_or_as_a_share(written: int | str, steps: int) -> None:
    assert warmup_step_count(written, 1000) == steps
