"""The recording of a step: numbers as the replay wants them, timelines that keep the peak."""

from __future__ import annotations

import gc
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.ledger import Ledger
from bigtrain.memory.allocator import replay
from bigtrain.memory.record import END, Events, Recording, thinned
from bigtrain.memory.report import CAUSES


def recorded() -> tuple[Recording, Ledger]:
    """Return two blocks' worth of allocations: 10 kept weights, then 30 and 5 activations of which 30 go first."""
    recording = Recording()
    ledger = Ledger(recording)
    weights = ledger.hold(10, "weights")
    recording.mark("step")
    recording.phase, ledger.place = "forward", "blocks.0"
    first = ledger.hold(30)
    ledger.place = "blocks.1"
    second = ledger.hold(5)
    recording.phase, ledger.place = "backward", "blocks.0"
    del first
    ledger.passing(7, 3)
    del second, weights
    gc.collect()
    return recording, ledger


def test_events_are_what_the_replay_reads() -> None:
    recording, _ = recorded()
    assert recording.events == [10, 30, 5, ~1, 7, 3, ~4, ~3, ~2, ~0] or sorted(recording.events) == sorted(
        [10, 30, 5, ~1, 7, 3, ~4, ~3, ~2, ~0]
    )
    assert replay(recording.events).allocated_bytes == 0
    assert recording.sizes == [10, 30, 5, 7, 3]
    assert recording.causes == ["weights", "activations", "activations", "temporaries", "temporaries"]
    assert recording.places == ["", "blocks.0", "blocks.1", "blocks.0", "blocks.0"]
    assert recording.phases == ["", "forward", "forward", "backward", "backward"]


def test_events_alone_are_those_of_a_recording() -> None:
    recording, events = Recording(), Events()
    for recorder in (recording, events):
        for size in (10, 30):
            recorder.allocate(size, "weights", "blocks.0")
        recorder.mark("middle")
        recorder.release(0)
        assert recorder.allocate(5, "activations", "") == 2
    assert events.events == recording.events == [10, 30, ~0, 5]
    assert events.marks == recording.marks == {"middle": 2}
    assert events.allocations == len(recording.sizes) == 3


def test_the_ledger_counts_the_same_with_and_without_a_recorder() -> None:
    recording, ledger = recorded()
    assert ledger.peak == max(accumulate(signed(recording))) == 45
    plain = Ledger()
    held = [plain.hold(10, "weights"), plain.hold(30), plain.hold(5)]
    plain.passing(7, 3)
    assert plain.peak == 55 and held


def signed(recording: Recording) -> list[int]:
    return [event if event >= 0 else -recording.sizes[~event] for event in recording.events]


def test_a_timeline_begins_at_its_mark_with_what_is_held_then() -> None:
    line = recorded()[0].timeline("step")
    causes = line["causes"]
    assert isinstance(causes, dict) and set(causes) == set(CAUSES)
    assert causes["weights"][0] == 10 and causes["activations"][:2] == [30, 35]
    assert line["label"][:2] == ["blocks.0 forward", "blocks.1 forward"]  # type: ignore[index]
    assert line["time"][0] == 0 and line["time"][-1] == 1  # type: ignore[index]
    assert {len(column) for column in causes.values()} == {len(line["time"])}  # type: ignore[arg-type]


def test_a_timeline_ends_where_the_step_ends() -> None:
    recording = Recording()
    ledger = Ledger(recording)
    recording.mark("step")
    held = [ledger.hold(size) for size in (4, 5)]
    recording.mark(END)
    held.clear()
    causes = recording.timeline("step")["causes"]
    assert isinstance(causes, dict) and causes["activations"] == [4, 9]


def test_a_mark_that_is_not_there_is_an_error() -> None:
    with pytest.raises(KeyError):
        recorded()[0].timeline("no such step")


def test_the_places_at_the_peak_add_up_to_it() -> None:
    recording, ledger = recorded()
    found = recording.places_at_peak("step")
    assert found == {"": 10, "blocks.0": 30, "blocks.1": 5}
    assert sum(found.values()) == ledger.peak


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=400), st.integers(1, 50))
def test_thinning_keeps_the_greatest(totals: list[int], points: int) -> None:
    kept = thinned(totals, points)
    assert len(kept) <= max(points, 1) or len(totals) <= points
    assert kept == sorted(set(kept))
    assert max(totals) == max(totals[index] for index in kept)


def test_a_peak_that_starts_again_is_of_what_is_held() -> None:
    ledger = Ledger()
    kept = ledger.hold(10, "weights")
    ledger.passing(100)
    ledger.restart_peak()
    assert ledger.peak == 10 and ledger.causes_at_peak() == {"weights": 10, "temporaries": 0}
    ledger.passing(5)
    assert ledger.peak == 15 and ledger.causes_at_peak() == {"weights": 10, "temporaries": 5}
    assert kept.size == 10
