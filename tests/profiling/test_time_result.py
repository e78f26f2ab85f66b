"""Where a step's time goes, in words and numbers: the table, the sentence, the object."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from bigtrain.planner.by_class import CALLS, COPIES, IDLE, MATRIX, OTHER
from bigtrain.profiling.breakdown import Breakdown
from bigtrain.profiling.time_result import TimeProfile, milliseconds

MEASURED = Breakdown(
    steps=5,
    seconds=0.0125,
    by_class={MATRIX: 0.006, COPIES: 0.0005, OTHER: 0.001, CALLS: 0.005},
    phases={"forward": 0.005, "backward": 0.005, "update": 0.002, "outside": 0.0005},
    others={"somewhere::unheard_of": 0.0009, "somewhere::else": 0.0001},
)
PROFILE = TimeProfile(
    name="tiny",
    device="a CPU",
    rates="measured here",
    predicted={MATRIX: 0.0045, COPIES: 0.00002, CALLS: 0.002},
    predicted_phases={"forward": 0.003, "backward": 0.003, "update": 0.0005, "outside": 0.0},
    measured=MEASURED,
    step_seconds=(0.011, 0.01, 0.03),
    recipe="name: tiny\n",
    versions={"torch": "2"},
)


@pytest.fixture(scope="module")
def profile() -> TimeProfile:
    return PROFILE


def test_the_table(profile: TimeProfile) -> None:
    assert [" ".join(line.split()) for line in profile.lines()] == [
        "tiny on a CPU: a step takes 11 ms (median of 3), predicted 6.52 ms, a gap of 4.48 ms (rates: measured here); "
        "under the profiler 12.5 ms",
        "",
        "measured share predicted gap of roofline",
        "matrix products 6.00 ms 48.0% 4.50 ms +1.50 ms 75%",
        "host and device copies 0.50 ms 4.0% 0.020 ms +0.48 ms 4%",
        "other 1.00 ms 8.0% 0.000 ms +1.00 ms",
        "calls 5.00 ms 40.0% 2.00 ms +3.00 ms 40%",
        "in all 12.5 ms 100.0% 6.52 ms +5.98 ms 52%",
        "",
        "phases: forward 5.00 ms (predicted 3.00 ms), backward 5.00 ms (predicted 3.00 ms), update 2.00 ms (predicted "
        "0.50 ms); outside of them 0.50 ms, 4.0%",
        "under the profiler a step takes 1.50 ms longer, 14%; the classes sum to that step and are not scaled",
        "other: somewhere::unheard_of 0.90 ms, somewhere::else 0.10 ms",
        "next to look at: calls (Python, autograd and dispatch between what computes), 3.00 ms above the predicted "
        "2.00 ms",
    ]
    table = profile.lines()[2:8]
    assert len({len(line) for line in table}) == 1


def test_the_object_is_json(profile: TimeProfile) -> None:
    found = profile.as_object()
    assert json.loads(json.dumps(found)) == found
    assert found["gap_seconds"] == pytest.approx(found["median_step_seconds"] - found["predicted_step_seconds"])
    assert sum(row["measured_seconds"] for row in found["classes"]) == pytest.approx(found["profiled_step_seconds"])
    assert sum(row["share"] for row in found["classes"]) == pytest.approx(1)
    assert sum(row["predicted_seconds"] for row in found["classes"]) == pytest.approx(found["predicted_step_seconds"])
    products = found["classes"][0]
    assert (products["name"], products["of_roofline"]) == (MATRIX, pytest.approx(0.75))
    assert found["classes"][2]["of_roofline"] is None
    assert found["next_to_look_at"] == CALLS
    assert set(found["phases"]["measured"]) == set(found["phases"]["predicted"])


def test_nothing_is_next_where_all_is_faster_than_predicted(profile: TimeProfile) -> None:
    fast = dataclasses.replace(profile, predicted={MATRIX: 1.0, COPIES: 1.0, OTHER: 1.0, CALLS: 1.0, IDLE: 1.0})
    assert fast.sentence() == "next to look at: nothing; no class takes longer than predicted"
    assert " ".join(fast.lines()[8].split()) == "in all 12.5 ms 100.0% 5,000.0 ms -4,987.5 ms 40000%"


def test_a_profiler_that_adds_nothing_is_not_mentioned(profile: TimeProfile) -> None:
    assert len(dataclasses.replace(profile, step_seconds=[0.02]).notes()) == 2


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.000 ms"), (1.23e-5, "0.012 ms"), (0.00123, "1.23 ms"), (1.5, "1,500.0 ms")]
)
def test_milliseconds(seconds: float, text: str) -> None:
    assert milliseconds(seconds) == text


def test_where_it_may_be_shown(profile: TimeProfile, tmp_path: Path) -> None:
    profile.picture(tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "tiny: time of one step" in profile.page()
