"""The sum of the parts of a model, by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.memory.blockwise import BlockKind, Kept, ModelTrace, Outside, Span, between


def model(none: Kept, full: Kept, *, calls: int = 2, again: frozenset[int] = frozenset()) -> ModelTrace:
    spans = tuple(Span(5, 3) for _ in range(calls))
    kind = BlockKind("Block", 100, 10, 1, 1, {"none": none, "full": full})
    outside = Outside(forward=spans, turn=Span(40, 20), backward=spans, gradient_bytes=7)
    return ModelTrace(200, 0, (kind,), (0,) * calls, outside, outside, again)


QUIET = Kept(0, 1, 0, 0)


def test_the_forward_of_the_last_block_comes_on_top_of_what_the_others_keep() -> None:
    assert model(Kept(1000, 100, 0, 0), QUIET).peak_bytes("none") == 100 + 3 + 1000


def test_the_backward_of_the_last_block_finds_everything_kept_and_no_gradient() -> None:
    assert model(Kept(0, 100, 1000, 0), QUIET).peak_bytes("none") == 2 * 100 + 20 + 1000


def test_the_backward_of_the_first_block_finds_the_gradients_of_the_others() -> None:
    assert model(QUIET, Kept(0, 0, 1000, 0)).peak_bytes(["full", "none"]) == 10 + 3 + 1000


def test_the_loss_finds_everything_kept() -> None:
    assert model(Kept(0, 100, 0, 0), QUIET).peak_bytes("none") == 2 * 100 + 40


def test_gradients_that_exist_do_not_count_again() -> None:
    found = model(Kept(0, 100, 1000, 500), QUIET)
    assert found.peak_bytes("none", accumulated=True) == 2 * 100 + 20 + 500


def test_a_block_that_runs_twice_has_one_gradient() -> None:
    assert model(QUIET, QUIET).gradient_bytes == 2 * 10 + 7
    assert model(QUIET, QUIET, again=frozenset({0})).gradient_bytes == 10 + 7


@given(st.integers(1, 6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_what_keeps_less_never_needs_more(calls: int, forward: int, kept: int) -> None:
    found = model(Kept(forward, kept, 0, 0), Kept(forward, kept // 2, 0, 0), calls=calls)
    assert found.peak_bytes("full") <= found.peak_bytes("none")
    mixed = ["full"] + ["none"] * (calls - 1)
    assert found.peak_bytes("full") <= found.peak_bytes(mixed) <= found.peak_bytes("none")


def test_seconds_are_those_of_all_calls_and_of_what_is_around_them() -> None:
    none, full = Kept(0, 1, 0, 0, 1.0, 2.0), Kept(0, 0, 0, 0, 1.0, 3.0)
    found = model(none, full)
    outside = Outside(found.outside.forward, found.outside.turn, found.outside.backward, 7, 10.0, 20.0)
    found = ModelTrace(200, 0, found.kinds, found.calls, outside, outside)
    assert found.seconds(["none", "none"]) == (12.0, 24.0, 0.0)
    assert found.seconds(["full", "none"]) == (12.0, 24.0, 1.0)


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.integers(2, 40))
def test_sizes_between_two_lie_on_a_line(base: int, slope: int, rows: int) -> None:
    def at(size: int) -> ModelTrace:
        return model(Kept(base + slope * size, slope * size, 0, 0, 0.5 * size, 0.0), QUIET)

    found = between(at(2), at(4), (rows - 2) / 2)
    assert found.kinds[0].by_policy["none"].kept_bytes == slope * rows
    assert found.peak_bytes("none") == at(rows).peak_bytes("none")
    assert found.kinds[0].by_policy["none"].forward_seconds == 0.5 * rows


def test_traces_of_other_blocks_are_not_mixed() -> None:
    with pytest.raises(ValueError, match="traces of different models"):
        between(model(QUIET, QUIET, calls=2), model(QUIET, QUIET, calls=3), 0.5)
    with pytest.raises(ValueError, match="traces of different models"):
        between(model(QUIET, QUIET), model(QUIET, QUIET, again=frozenset({0})), 0.5)
