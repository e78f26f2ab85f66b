"""What the recipe language has and this version does not do: refused with one line instead of ignored."""

from __future__ import annotations

from bigtrain.config.keys import listed, show
from bigtrain.config.schema import Recipe
from bigtrain.errors import Fault

BUILT: dict[str, tuple[object, ...]] = {}
"""Keys of which only these values work; of a list, these entries. A key without a row works whole."""


def unbuilt_faults(recipe: Recipe) -> list[Fault]:
    """Return a fault for each key whose value this version does not do."""
    faults = []
    for key, built in BUILT.items():
        section, _, name = key.partition(".")
        value = getattr(getattr(recipe, section), name)
        wrong = [item for item in (value if isinstance(value, list) else [value]) if item not in built]
        if wrong:
            use = listed(show(key, item) for item in built)
            faults.append(Fault(recipe.origin(key), key, f"{show(key, wrong[0])} is not in this version; use {use}"))
    return faults
