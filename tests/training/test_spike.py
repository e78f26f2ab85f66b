"""What counts as a spike of the loss, and what is remembered of it."""

from __future__ import annotations

import json
import math
import random

import pytest

from bigtrain.training import spike
from bigtrain.training.spike import MOST_ROLLBACKS, WINDOW, Spikes


def after(losses: list[float]) -> Spikes:
    spikes = Spikes()
    for step, loss in enumerate(losses, 1):
        assert not spikes.add(loss, step)
    return spikes


def falling(steps: int, seed: int = 0, noise: float = 0.05) -> list[float]:
    """Return losses as of a run: falling from 10 to 3, with noise."""
    draw = random.Random(seed)
    return [3 + 7 * math.exp(-step / 200) + draw.gauss(0, noise) for step in range(steps)]


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    spikes = after([1.0] * (WINDOW - 2) + [50.0])
    assert spikes.limit == math.inf
    assert not spikes.add(1.0, WINDOW)
    assert spikes.limit == 1.5


def test_a_spike_is_above_both_bounds() -> None:
    assert after([2.0] * WINDOW).limit == 2.0 + spike.LEAST_RISE
    wide = after([1.0, 3.0] * (WINDOW // 2)).limit
    assert wide == pytest.approx(2.0 + spike.DEVIATIONS * spike.NORMAL)


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.5])
def test_no_false_alarm_and_each_spike_found(noise: float) -> None:
    for seed in range(5):
        spikes = after(falling(1000, seed, noise))
        assert spikes.add(3 + max(1.0, 15 * noise), 1001)


def test_what_is_no_usual_loss_does_not_count() -> None:
    spikes = after([2.0] * WINDOW)
    for loss in [9.0] * 200:
        assert spikes.add(loss, 300)
    for loss in (math.nan, math.inf, -math.inf):
        assert not spikes.add(loss, 300)
    assert spikes.limit == 2.5


def test_the_state_comes_back_bit_by_bit_through_json() -> None:
    losses = falling(WINDOW + 37)
    spikes = after(losses)
    again = Spikes(json.loads(json.dumps(spikes.state())))
    assert again.limit == spikes.limit
    assert again.state() == spikes.state()
    assert len(spikes.state()["losses"]) == WINDOW


def test_going_back_is_bounded_until_the_spike_is_passed() -> None:
    spikes = after([2.0] * WINDOW)
    kept = spikes.state()
    for round_ in range(MOST_ROLLBACKS):
        assert spikes.may_go_back
        restored = Spikes(kept)
        restored.gone_back(spikes, 120, (8 * round_, 8 * round_ + 7))
        spikes = restored
    assert not spikes.may_go_back
    assert Spikes(spikes.state()).left_out == [[0, 7], [8, 15], [16, 23]]
    spikes.add(2.0, 119)
    assert not spikes.may_go_back
    spikes.add(2.0, 120)
    assert spikes.may_go_back


def test_an_earlier_spike_does_not_make_a_later_one_forgotten() -> None:
    spikes = after([2.0] * WINDOW)
    kept = spikes.state()
    for met in (150, 120, 150):  # each time back to 100
        restored = Spikes(kept)
        restored.gone_back(spikes, met, (0, 7))
        spikes = restored
        spikes.add(2.0, 130)
    assert not spikes.may_go_back
    spikes.add(2.0, 150)
    assert spikes.may_go_back
