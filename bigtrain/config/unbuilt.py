"""What the recipe language has and this version does not do: refused with one line instead of ignored."""

from __future__ import annotations

from collections.abc import Mapping

from bigtrain.config.keys import listed, show
from bigtrain.config.schema import Recipe
from bigtrain.errors import Fault, RecipeError

BUILT: dict[str, tuple[object, ...]] = {
    "train.objective": ("mlm", "clm"),
    "train.on_spike": ("ignore",),
    "checkpoint.asynchronous": (False,),
    "logging.sample_every": (None,),
    "logging.trackers": ("tensorboard",),
}
"""Keys of which only these values work; of a list, these entries. A key without a row works whole."""

RUNNABLE: dict[str, tuple[object, ...]] = {}
"""Keys that can be planned whole, and of a plan that is to run only with these values."""


def check_runnable(plan: Recipe) -> None:
    """Raise RecipeError, with a fault for each key, where a plan's recipe can be planned and not yet run."""
    if faults := unbuilt_faults(plan, RUNNABLE):
        raise RecipeError(*faults)


def unbuilt_faults(recipe: Recipe, built_values: Mapping[str, tuple[object, ...]] = BUILT) -> list[Fault]:
    """Return a fault for each key whose value this version does not do."""
    faults = []
    for key, built in built_values.items():
        section, _, name = key.partition(".")
        value = getattr(getattr(recipe, section), name)
        wrong = [item for item in (value if isinstance(value, list) else [value]) if item not in built]
        if wrong:
            use = listed(show(key, item) for item in built)
            faults.append(Fault(recipe.origin(key), key, f"{show(key, wrong[0])} is not in this version; use {use}"))
    return faults
