"""Axes: ticks are round, few and inside; values lie where they should."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings, strategies

from bigtrain.charts.axis import Axis, Unit, byte_unit, finite, round_spacing, scientific, short_seconds

GIB = 2**30
sizes = strategies.floats(1e-12, 1e12)


def texts(low: float, high: float, unit: Unit = "number", *, logarithmic: bool = False) -> list[str]:
    return [text for _, text in Axis(low, high, 0, 100, unit, logarithmic).ticks(5)]


def test_values_lie_between_the_ends() -> None:
    axis = Axis(10, 30, 100, 0)
    assert [axis.at(value) for value in (10, 20, 30)] == [100, 50, 0]


def test_logarithmic_values_lie_by_ratio() -> None:
    axis = Axis(0.1, 1000, 0, 400, logarithmic=True)
    assert [axis.at(value) for value in (0.1, 1, 10, 1000)] == pytest.approx([0, 100, 200, 400])


@pytest.mark.parametrize(
    ("low", "high", "unit", "expected"),
    [
        (4.7, 9.9, "number", ["5", "6", "7", "8", "9"]),
        (-0.1, 1.1, "number", ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (5.881, 5.889, "number", ["5.882", "5.884", "5.886", "5.888"]),
        (0, 1.06e-3, "scientific", ["0", "2e-4", "4e-4", "6e-4", "8e-4", "1e-3"]),
        (0, 12_700, "count", ["0", "2K", "4K", "6K", "8K", "10K", "12K"]),
        (0, 1.06 * GIB, "bytes", ["0", "0.2 GiB", "0.4 GiB", "0.6 GiB", "0.8 GiB", "1.0 GiB"]),
        (0, 600 * 2**20, "bytes", ["0", "100 MiB", "200 MiB", "300 MiB", "400 MiB", "500 MiB", "600 MiB"]),
        (0, 4_000_000, "step", ["0", "1,000,000", "2,000,000", "3,000,000", "4,000,000"]),
        (9, 11, "step", ["9", "10", "11"]),
        (0, 1, "share", ["0", "20%", "40%", "60%", "80%", "100%"]),
        (0, 0.01, "share", ["0", "0.2%", "0.4%", "0.6%", "0.8%", "1.0%"]),
    ],
)
def test_tick_texts(low: float, high: float, unit: Unit, expected: list[str]) -> None:
    assert texts(low, high, unit) == expected


def test_logarithmic_ticks_are_powers_of_ten() -> None:
    assert texts(0.3, 50_000, logarithmic=True) == ["1", "10", "100", "1000", "1e4"]


def test_many_decades_are_thinned() -> None:
    assert 1 < len(texts(1e-30, 1e30, logarithmic=True)) <= 6


@settings(max_examples=50, deadline=None)
@given(sizes, sizes)
def test_ticks_are_few_and_inside(low: float, length: float) -> None:
    high = low + max(length, low * 1e-3)
    ticks = [value for value, _ in Axis(low, high, 0, 100).ticks(5)]
    slack = (high - low) * 1e-6
    assert 1 <= len(ticks) <= 9
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    assert ticks == sorted(set(ticks))


@settings(max_examples=50, deadline=None)
@given(strategies.integers(0, 10**7), strategies.integers(1, 10**7))
def test_ticks_of_steps_are_whole(first: int, length: int) -> None:
    ticks = Axis(first, first + length, 0, 100, "step").ticks(5)
    assert all(value == int(value) for value, _ in ticks)
    assert len({text for _, text in ticks}) == len(ticks)


@settings(max_examples=50, deadline=None)
@given(sizes)
def test_spacing_is_round_and_near(spacing: float) -> None:
    rounded = round_spacing(spacing)
    text = f"{rounded:.0e}"
    assert text[0] in "125"
    assert rounded == pytest.approx(float(text))
    assert 0.6 < rounded / spacing < 1.7


@pytest.mark.parametrize(
    ("value", "number"), [(3, 3.0), (2.5, 2.5), (None, None), ("nan", None), ("inf", None), (math.inf, None)]
)
def test_finite(value: object, number: float | None) -> None:
    assert finite(value) == number


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.5e-4, "2.5e-4"), (1e-3, "1e-3"), (0.05, "0.05"), (1e4, "1e4"), (123.456, "123.5"), (-3e-7, "-3e-7")],
)
def test_scientific(value: float, text: str) -> None:
    assert scientific(value) == text


@pytest.mark.parametrize(
    ("size", "unit"), [(0, ("B", 1)), (1023, ("B", 1)), (1024, ("KiB", 1024)), (3 * GIB, ("GiB", GIB))]
)
def test_byte_unit(size: float, unit: tuple[str, int]) -> None:
    assert byte_unit(size) == unit


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.00412, "4.12 ms"),
        (0.0381, "38.1 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1 s"),
        (2.414, "2.41 s"),
        (59.97, "60 s"),
        (999.4, "999 s"),
        (1206.7, "1,207 s"),
    ],
)
def test_short_seconds(seconds: float, text: str) -> None:
    assert short_seconds(seconds) == text
