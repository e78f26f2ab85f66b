"""Quantities with units."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain import units


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GiB", 2**34),
        ("80GB", 80 * 10**9),
        ("1.5 GB", 1_500_000_000),
        ("0B", 0),
        ("512 MiB", 2**29),
        ("1_000B", 1000),
    ],
)
def test_parse_bytes(text, size):
    assert units.parse_bytes(text) == size


def test_bytes_need_a_unit_and_the_message_shows_one():
    with pytest.raises(ValueError, match="'24' has no unit of bytes; write for example '24GiB'"):
        units.parse_bytes("24")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("500", 500),
        ("1_000", 1000),
        ("500K", 500_000),
        ("2.3M", 2_300_000),
        ("1.1K", 1100),
        ("32B", 32 * 10**9),
        ("1T", 10**12),
    ],
)
def test_parse_count(text, count):
    assert units.parse_count(text) == count


@pytest.mark.parametrize("text", ["1.5", "1.2345K", "eight", "5GiB", "", "-3", "1e5", "1__0", "٣", "9" * 41])
def test_not_a_count(text):
    with pytest.raises(ValueError, match="is not a"):
        units.parse_count(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("60s", 60.0), ("5min", 300.0), ("2m", 120.0), ("500ms", 0.5), ("1.5h", 5400.0), ("1d", 86400.0)],
)
def test_parse_seconds(text, seconds):
    assert units.parse_seconds(text) == seconds


def test_seconds_need_a_unit():
    with pytest.raises(ValueError, match="'60' has no unit of time; write for example '60s'"):
        units.parse_seconds("60")


@pytest.mark.parametrize(("text", "share"), [("6%", 0.06), ("28.43%", 0.2843), ("100 %", 1.0), ("0%", 0.0)])
def test_parse_share(text, share):
    assert units.parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["6", "101%", "-1%", "6%%", "%", "six%"])
def test_not_a_share(text):
    with pytest.raises(ValueError, match="is not a share"):
        units.parse_share(text)


@given(st.integers(0, 2**63 - 1))
def test_exact_bytes_loses_nothing(size):
    assert units.parse_bytes(units.exact_bytes(size)) == size


@given(st.floats(0.001, 1e9))
def test_exact_seconds_loses_nothing(seconds):
    assert units.parse_seconds(units.exact_seconds(seconds)) == seconds


def test_exact_texts_are_short():
    assert units.exact_bytes(2**34) == "16GiB"
    assert units.exact_bytes(1000) == "1000B"
    assert (units.exact_seconds(60.0), units.exact_seconds(0.5), units.exact_seconds(100.0)) == ("60s", "0.5s", "100s")


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (2**34, "16.00 GiB"), (2**41, "2.00 TiB")]
)
def test_format_bytes(size, text):
    assert units.format_bytes(size) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (12_300, "12.3K"), (335_000_000, "335M"), (1.5e9, "1.5B"), (2e12, "2T")]
)
def test_format_count(count, text):
    assert units.format_count(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(45, "45s"), (200, "3m20s"), (7500, "2h05m"), (273600, "3d04h")])
def test_format_seconds(seconds, text):
    assert units.format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 FLOP"), (22_400_000, "22.4 MFLOP"), (1.98e9, "1.98 GFLOP"), (9.895e14, "990 TFLOP")]
)
def test_flops_have_the_prefixes_of_science(count: float, text: str) -> None:
    assert units.format_flops(count) == text
