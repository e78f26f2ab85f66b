"""Learning-rate schedules as pure functions of the step, so that resuming needs no state of them."""

from __future__ import annotations

import math

from bigtrain.config.checks import wsd_decay_steps
from bigtrain.units import parse_share

COSINE_FLOOR = 0.1
"""A cosine ends at this share of the peak, as in GPT-3 (Brown et al. 2020, appendix B)."""


def warmup_step_count(warmup_steps: int | str, total_steps: int) -> int:
    """Return the steps of warm-up that a recipe's `warmup_steps` means in a run of this length."""
    if isinstance(warmup_steps, int):
        return warmup_steps
    return round(parse_share(warmup_steps) * total_steps)


def learning_rate_factor(schedule: str, step: int, *, total_steps: int, warmup_steps: int) -> float:
    """Return the share of the peak learning rate that a step uses.

    `step` counts from 0. The warm-up rises from 1/warmup_steps, not from 0, and no schedule gives the last step a rate
    of 0: a step that changes nothing would be wasted. After `total_steps` the last value holds.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    step = min(step, total_steps - 1)
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return 1 - done
    if schedule == "cosine":
        return COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "wsd":
        return min(1.0, (total_steps - step) / wsd_decay_steps(total_steps))
    assert schedule == "constant", schedule
    return 1.0
