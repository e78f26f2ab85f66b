"""The report: its peak is the sum of its causes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bigtrain.memory.report import CAUSES, MemoryReport


@given(st.dictionaries(st.sampled_from(CAUSES), st.integers(0, 2**50)))
def test_the_peak_is_the_sum_of_its_causes(by_cause: dict[str, int]) -> None:
    assert MemoryReport(by_cause).allocated_bytes_peak == sum(by_cause.values())


def test_causes_are_distinct() -> None:
    assert len(set(CAUSES)) == len(CAUSES)
