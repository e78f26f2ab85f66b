"""A few real steps, measured beside predicted: by cause, by block, over time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bigtrain.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from bigtrain.batch import Batch
    from bigtrain.planner.plan import Plan
    from bigtrain.profiling.result import Profile

__all__ = ["profile"]


def profile(subject: Plan | nn.Module, sample: Batch | None = None, **options: Any) -> Profile:
    """Take a few real steps of a plan, on its recipe's data, or of any model on a sample batch; see what they hold.

    `options` are those of `recipe.profile_recipe` or `model.profile_model`. Raises InputError for a model without a
    sample, and for a sample with a plan, which has data of its own.
    """
    from bigtrain.planner.plan import Plan
    from bigtrain.profiling.model import profile_model
    from bigtrain.profiling.recipe import profile_recipe

    if isinstance(subject, Plan):
        if sample is not None:
            raise InputError("profile: a plan has data of its own; leave out the sample")
        return profile_recipe(subject, **options)
    if sample is None:
        raise InputError(f"profile: {type(subject).__name__} needs a sample: a batch of rows that it is called with")
    return profile_model(subject, sample, **options)
