"""Which packages a tracker of metrics needs, and that they are here. Nothing of them is imported."""

from __future__ import annotations

from importlib.util import find_spec

from bigtrain.config.schema import Recipe
from bigtrain.errors import Fault, RecipeError

TENSORBOARD = "tensorboard"
"""The one that is written without another library in between."""

CONNECTOR = "accelerate"
"""The library through which all others are reached."""

MODULES = {"comet": "comet_ml"}
"""What is imported for a tracker, where that is not its own name; packages are called the same."""


def check_trackers(recipe: Recipe) -> None:
    """Raise RecipeError for each tracker of a recipe whose packages are not installed, with the command that does."""
    faults = []
    for tracker in dict.fromkeys(recipe.logging.trackers):
        needed = [MODULES.get(tracker, tracker)]
        if tracker != TENSORBOARD:
            needed.append(CONNECTOR)
        if absent := [name for name in needed if find_spec(name) is None]:
            text = f"'{tracker}' needs what is not installed: pip install {' '.join(absent)}; or leave it out"
            faults.append(Fault(recipe.origin("logging.trackers"), "logging.trackers", text))
    if faults:
        raise RecipeError(*faults)
