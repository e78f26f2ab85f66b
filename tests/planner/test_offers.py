"""Prices of choices."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.config.load import load_recipe
from bigtrain.memory.predict import predict
from bigtrain.planner.candidates import mixes, settings
from bigtrain.planner.hardware import Hardware, of_name
from bigtrain.planner.offers import EDGE, Offers, changed, chosen, first_within, least_place
from bigtrain.planner.settle import settled

DEEP = (
    "model.hidden_size=128", "model.num_hidden_layers=6", "model.num_attention_heads=4", "data.vocab_size=512",
    "data.sequence_length=128", "train.global_batch_size=16",
)  # fmt: skip


def laptop() -> Hardware:
    return of_name("cpu-laptop")


def opened(*overrides: str, hardware: Hardware | None = None, world_size: int | None = None) -> tuple[Any, ...]:
    """Return what the search takes."""
    return settled(load_recipe("quickstart_gpt", [*DEEP, *overrides]), hardware or laptop(), world_size)


@pytest.fixture(scope="module")
def offers() -> Offers:
    return Offers(*opened())


def test_an_offer_has_the_peak_of_a_whole_step(offers: Offers) -> None:
    rows = mixes(offers.recipe, 6, offers.hardware)
    for setting in settings(offers.recipe, offers.hardware, 1)[::2]:
        offer = offers.of(chosen(setting, rows[2][1]))
        machine = {"device": "cpu", "slow_bf16": offers.hardware.slow_bf16, "threads": offers.hardware.threads}
        whole = predict(offer.choice.into(offers.recipe), offers.model, **machine)
        assert offer.allocated_bytes == whole.allocated_bytes_peak
        assert offer.seconds == offers.seconds(offer.choice).total


def test_fitting_has_the_fastest_mix_that_fits(offers: Offers) -> None:
    rows = mixes(offers.recipe, 6, offers.hardware)
    for setting in settings(offers.recipe, offers.hardware, 1):
        every = [offers.of(chosen(setting, mix)) for row in rows for mix in row]
        sizes = sorted(offer.allocated_bytes for offer in every)
        limit = sizes[len(sizes) // 2]
        best = min(offer.seconds for offer in every if offer.allocated_bytes <= limit)
        assert min(offer.seconds for offer in offers.fitting(setting, rows, limit)) == pytest.approx(best)
        assert list(offers.fitting(setting, rows, sizes[0] - 1)) == []
        quick = offers.fitting(setting, rows, limit, best)  # too slow ones may be left out
        assert min(offer.seconds for offer in quick) == pytest.approx(best)


def test_a_deep_model_has_the_mix_that_a_scan_of_its_rows_finds() -> None:
    offers = Offers(*opened("model.num_hidden_layers=12", "train.micro_batch_size=4"))
    (setting, *_), rows = settings(offers.recipe, offers.hardware, 1), mixes(offers.recipe, 12, offers.hardware)
    peaks = [[offers.allocated_bytes(setting, mix) for mix in row] for row in rows]
    for limit in sorted({peak for row in peaks for peak in row})[::7]:
        found, lightest = [], 13
        for whole, row in enumerate(peaks):
            part = next((part for part, peak in enumerate(row) if peak <= limit), None)
            if part is not None and whole + part < lightest:
                lightest = whole + part
                found.append(chosen(setting, rows[whole][part]))
        assert [offer.choice for offer in offers.fitting(setting, rows, limit)] == found


@st.composite
def convex_rows(draw: st.DrawFn) -> list[int]:
    """Return numbers that are convex but for those at the edges, which are no higher."""
    length = draw(st.integers(1, 30))
    lines = draw(st.lists(st.tuples(st.integers(-9, 5), st.integers(-50, 50)), min_size=1, max_size=4))
    row = [max(slope * place + height for slope, height in lines) for place in range(length)]
    for place in {*range(EDGE), *range(length - EDGE, length)} & set(range(length)):
        row[place] -= draw(st.integers(0, 60))
    return row


@given(convex_rows(), st.integers(-120, 200), st.integers(0, 30), st.integers(0, 9))
def test_passing_places_over_changes_nothing(row: list[int], limit: int, end: int, below: int) -> None:
    mixes_of_row: list[Any] = list(range(len(row)))
    end = min(end, len(row))
    want = next((place for place in range(end) if row[place] <= limit), None)
    assert first_within(limit, end, mixes_of_row, lambda place: row[place]) == want  # type: ignore[call-overload]
    bounds = [lambda place: row[place] - below, lambda place: row[place]]
    assert first_within(limit, end, mixes_of_row, *bounds) == want
    assert row[least_place(mixes_of_row, lambda place: row[place])] == min(row)  # type: ignore[call-overload]


def test_bounds_are_below_all(offers: Offers) -> None:
    rows = mixes(offers.recipe, 6, offers.hardware)
    for setting in settings(offers.recipe, offers.hardware, 1):
        every = [offers.of(chosen(setting, mix)) for row in rows for mix in row]
        assert offers.least_seconds(setting, rows) == min(offer.seconds for offer in every)
        held, choice = offers.least_bytes(setting, rows)
        assert held == min(offer.allocated_bytes for offer in every) == offers.of(choice).allocated_bytes
        assert offers.state_bytes(setting) <= held
        assert offers.floor_bytes(setting, rows) <= held


def test_another_budget_shares_what_it_can(offers: Offers) -> None:
    same, other = offers.within(offers.budget_bytes - 1), offers.within(2**20)
    assert same.speed is offers.speed
    assert other.speed is not offers.speed
    assert (same.budget_bytes, other.budget_bytes) == (offers.budget_bytes - 1, 2**20)


def test_priced_counts_each_choice_once() -> None:
    offers = Offers(*opened())
    setting, rows = settings(offers.recipe, offers.hardware, 1)[0], mixes(offers.recipe, 6, offers.hardware)
    for _ in range(2):
        offers.allocated_bytes(setting, rows[0][0])
    assert offers.priced == 1


def test_a_changed_recipe_keeps_the_rest(offers: Offers) -> None:
    other = changed(offers.recipe, "optimizer.state", "8bit")
    assert (other.optimizer.state, offers.recipe.optimizer.state) == ("8bit", "fp32")
    assert other.train == offers.recipe.train
