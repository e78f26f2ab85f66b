"""A profile's words and numbers: every row it prints, and the object that pages and pictures read."""

from __future__ import annotations

import json

import pytest

from bigtrain.memory.profiled import ProfileObject
from bigtrain.memory.record import Recording
from bigtrain.memory.report import MemoryReport
from bigtrain.profiling.result import Predicted, Profile
from bigtrain.profiling.steps import Measured

MIB = 2**20


def recording(blocks: int, size: int) -> Recording:
    """Return a step in which every block adds as much, and what is outside of them twice that."""
    found = Recording()
    found.mark("step 1")
    found.phase = "forward"
    numbers = [found.allocate(size, "activations", f"blocks.{index}") for index in range(blocks)]
    numbers.append(found.allocate(2 * size, "weights", ""))
    for number in numbers:
        found.release(number)
    return found


def profile(predicted: int = 3, measured: int = 2, blocks: int = 11) -> Profile:
    reports = [
        MemoryReport({"weights": 2 * n * MIB, "activations": blocks * n * MIB}, None, n * 100 * MIB, n * 200 * MIB)
        for n in (predicted, measured)
    ]
    sides = [recording(blocks, n * MIB) for n in (predicted, measured)]
    return Profile(
        name="tiny",
        device="a CPU",
        predicted=Predicted(reports[0], sides[0], "step 1", 0.5),
        measured=Measured(reports[1], sides[1], "step 1", 0.25),
        recipe="name: tiny\n",
        changes=[{"change": "recompute.policy=full", "bytes": -MIB, "tokens_per_second": -0.2}],
        versions={"torch": "2"},
    )


def test_the_object_has_every_key_and_is_json() -> None:
    found = profile().as_object()
    assert set(found) == set(ProfileObject.__annotations__)
    assert json.loads(json.dumps(found)) == found
    assert found["predicted"]["allocated_bytes_peak"] == 39 * MIB
    assert found["measured"]["by_cause"]["activations"] == 22 * MIB
    assert found["measured"]["reserved_bytes_peak"] is None
    assert (found["predicted_step_seconds"], found["measured_step_seconds"]) == (0.5, 0.25)
    assert found["changes"][0]["bytes"] == -MIB


@pytest.mark.parametrize(("predicted", "error"), [(3, 0.5), (2, 0.0), (1, -0.5)])
def test_the_error_is_a_share_of_what_was_measured(predicted: int, error: float) -> None:
    assert profile(predicted).relative_error == error


def test_blocks_stand_in_order_and_what_is_outside_last() -> None:
    blocks = profile().blocks()
    assert [block["name"] for block in blocks] == [*(f"blocks.{i}" for i in range(11)), "outside of the blocks"]
    assert blocks[0] == {"name": "blocks.0", "predicted_bytes": 3 * MIB, "measured_bytes": 2 * MIB}
    assert sum(block["measured_bytes"] for block in blocks) == 26 * MIB


def test_a_block_that_one_side_lacks_counts_as_nothing() -> None:
    one, other = profile(blocks=2), profile(blocks=1)
    mixed = Profile("tiny", "a CPU", one.predicted, other.measured)
    assert mixed.blocks()[1] == {"name": "blocks.1", "predicted_bytes": 3 * MIB, "measured_bytes": 0}


def test_timelines_are_of_the_step() -> None:
    timeline = profile(blocks=2).as_object()["timeline"]["measured"]
    assert timeline["label"][0] == "blocks.0 forward"
    assert timeline["causes"]["activations"] == [2 * MIB, 4 * MIB, 4 * MIB, 2 * MIB, 0, 0]
    assert (timeline["time"][0], timeline["time"][-1]) == (0.0, 1.0)


def test_the_table_shows_what_is_there_and_says_what_is_not_known() -> None:
    lines = profile(predicted=1, blocks=2).lines()
    assert lines[0] == "tiny on a CPU: the peak was predicted 50.000% too low"
    rows = {line[:21].strip(): line[21:].split("  ") for line in lines[2:]}
    assert [cell.strip() for cell in rows["weights"] if cell] == ["2.00 MiB", "4.00 MiB"]
    assert [cell.strip() for cell in rows["allocated in all"] if cell] == ["4.00 MiB", "8.00 MiB"]
    assert [cell.strip() for cell in rows["reserved"] if cell] == ["not known", "not known"]
    assert [cell.strip() for cell in rows["seconds per step"] if cell] == ["0.500", "0.250"]
    assert "logits" not in rows
    assert "blocks.1" in rows


def test_a_time_that_was_not_predicted() -> None:
    found = profile()
    silent = Predicted(found.predicted.memory, found.predicted.recording, "step 1", None)
    lines = Profile("tiny", "a CPU", silent, found.measured).lines()
    assert lines[-1].split("  ")[-2:] != lines[1]
    assert "not known" in lines[-1]
