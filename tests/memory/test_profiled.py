"""Timelines as they are shown: thinned without losing the peak, phases found."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies

from bigtrain.charts.lines import LONGEST_LINE
from bigtrain.memory.profiled import STACKED, TimelineObject, bands, peak_place, thin_timeline, totals
from bigtrain.memory.report import CAUSES


def timeline(*rows: tuple[str, int, int]) -> TimelineObject:
    """Return rows of a label, bytes of weights and bytes of activations, at equal distances from 0 to 1."""
    return {
        "time": [place / max(1, len(rows) - 1) for place in range(len(rows))],
        "causes": {"weights": [row[1] for row in rows], "activations": [row[2] for row in rows]},
        "label": [row[0] for row in rows],
    }


def test_every_cause_has_its_place_in_a_stack() -> None:
    assert sorted(STACKED) == sorted(CAUSES)


def test_what_stays_is_below_what_comes_and_goes() -> None:
    assert STACKED.index("optimizer_state") < STACKED.index("gradients") < STACKED.index("temporaries")


def test_totals_are_of_all_causes() -> None:
    assert totals(timeline(("", 3, 4), ("", 3, 9))) == [7, 12]


def test_short_timelines_stay_as_they_are() -> None:
    given_rows = timeline(*(("forward", 3, size) for size in range(LONGEST_LINE)))
    assert thin_timeline(given_rows) == given_rows


@settings(max_examples=25, deadline=None)
@given(strategies.integers(601, 5000), strategies.integers(0, 10**6))
def test_thinned_timelines_keep_the_peak_and_the_ends(count: int, seed: int) -> None:
    sizes = [(place * 7919 + seed) % 104_729 for place in range(count)]
    whole = timeline(*((f"blocks.{place} forward", 5, size) for place, size in enumerate(sizes)))
    kept = thin_timeline(whole)
    assert len(kept["time"]) == len(kept["label"]) == len(kept["causes"]["weights"]) <= LONGEST_LINE
    assert max(totals(kept)) == max(totals(whole))
    assert peak_place(kept) == peak_place(whole)
    assert (kept["time"][0], kept["time"][-1]) == (0.0, 1.0)
    rows = set(zip(whole["time"], whole["label"], totals(whole), strict=True))
    assert set(zip(kept["time"], kept["label"], totals(kept), strict=True)) <= rows


def test_bands_are_the_phases_in_order() -> None:
    names = ["blocks.0 forward"] * 30 + ["blocks.1 forward"] * 30 + ["blocks.1 backward"] * 60 + ["update"] * 30
    found = bands(timeline(*((name, 1, 1) for name in names)))
    assert [name for _, name in found] == ["forward", "backward", "update"]
    assert [begin for begin, _ in found] == pytest.approx([0, 60 / 149, 120 / 149])


def test_micro_batches_have_their_own_bands() -> None:
    names = (["forward"] * 20 + ["backward"] * 20) * 2
    assert [name for _, name in bands(timeline(*((name, 1, 1) for name in names)))] == ["forward", "backward"] * 2


def test_updates_within_a_backward_pass_are_no_bands() -> None:
    names = (["blocks.3 backward"] * 40 + ["blocks.3 update"]) * 10
    assert [name for _, name in bands(timeline(*((name, 1, 1) for name in names)))] == ["backward"]


def test_peak_is_the_first_of_the_highest() -> None:
    assert peak_place(timeline(("a", 1, 1), ("b", 1, 9), ("c", 9, 1), ("d", 1, 1))) == (1 / 3, "b")


def test_one_row_is_a_timeline() -> None:
    one = timeline(("forward", 5, 5))
    assert thin_timeline(one) == one
    assert bands(one) == [(0.0, "forward")]
    assert peak_place(one) == (0.0, "forward")
