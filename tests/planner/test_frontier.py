"""The frontier: every budget has its line, choices are said where they change, the picture is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.errors import InputError
from bigtrain.planner.choice import Choice
from bigtrain.planner.frontier import LONGEST_TEXT, choices, frontier_lines, frontier_picture
from bigtrain.planner.search import Point
from bigtrain.planner.words import short_choice

GIB = 2**30


def choice(micro: int, recompute: str = "none", **keys: object) -> Choice:
    return Choice(micro, 32 // micro, (recompute,) * 12, **keys)  # type: ignore[arg-type]


POINTS = [
    Point(8 * GIB, choice(1, "full"), 4100.0),
    Point(4 * GIB, None, None),
    Point(12 * GIB, choice(2, "selective"), 5200.4),
    Point(16 * GIB, choice(4), 8200.0),
    Point(24 * GIB, choice(4), 8200.0),
]


def test_lines_are_in_the_order_of_budgets() -> None:
    lines = list(frontier_lines(POINTS))
    assert lines[0].split() == ["budget", "tokens/s", "choice"]
    assert [line.split()[0] for line in lines[1:]] == ["4.00", "8.00", "12.00", "16.00", "24.00"]
    assert len({line.index("GiB") for line in lines[1:]}) == 1


def test_a_budget_in_which_nothing_fits_says_so() -> None:
    assert list(frontier_lines(POINTS))[1].endswith("nothing fits")
    assert list(frontier_lines([Point(GIB, None, None)]))[1].split()[2] == "-"


def test_a_choice_is_said_where_it_changes() -> None:
    lines = list(frontier_lines(POINTS))
    assert lines[2].endswith("micro-batch 1, recompute full")
    assert lines[4].endswith("micro-batch 4, recompute none")
    assert lines[5].endswith('  "')


def test_bars_are_of_the_best() -> None:
    lines = list(frontier_lines(POINTS))
    assert [line.count("█") for line in lines[2:]] == [12, 15, 24, 24]
    assert "5,200" in lines[3]


def test_no_points_are_a_heading() -> None:
    assert len(list(frontier_lines([]))) == 1


def test_choices_are_named_once() -> None:
    assert choices(POINTS) == [choice(1, "full"), choice(2, "selective"), choice(4)]


def test_picture_is_written(tmp_path: Path) -> None:
    frontier_picture(POINTS, tmp_path / "frontier.png", title="bert_large on h100")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("points", [[], [Point(GIB, None, None)], POINTS[:1]], ids=["none", "nothing fits", "one"])
def test_picture_of_little(tmp_path: Path, points: list[Point]) -> None:
    frontier_picture(points, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 1000


def test_picture_of_long_choices(tmp_path: Path) -> None:
    long = choice(4, zero_stage=3, replicate=8, offload="optimizer", optimizer_state="8bit", gradient_release=True)
    assert len(short_choice(long)) > LONGEST_TEXT
    frontier_picture([*POINTS, Point(32 * GIB, long, 9000.0)], tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 1000


def test_picture_that_cannot_be_written_is_the_users_fault(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name another file"):
        frontier_picture(POINTS, tmp_path / "absent" / "frontier.png")
