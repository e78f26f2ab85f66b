"""The model of a run that starts from the weights of another: its shape comes with them."""

from __future__ import annotations

from bigtrain.config.overrides import COMMAND_LINE
from bigtrain.config.presets import PRESETS
from bigtrain.config.schema import ModelSection, Recipe

PLAN_FILE = "plan.yaml"
"""The resolved recipe of a run, a checkpoint or an imported folder, which has every key of the shape."""


def shaped_as(recipe: Recipe, there: ModelSection, place: str) -> Recipe:
    """Return a recipe with the model section of the weights that it starts from, as far as it leaves that open.

    `place` is the file that says so, and becomes the origin of the keys that are taken over. What stands where
    `train.init_from` itself stands is meant, and stays: in the file if that is in the file, else on the command line.
    Keys that contradict the weights are not judged here, nor is another family. A typed `train.init_from` goes over
    the whole model of the file.
    """
    typed = recipe.origin("train.init_from") == COMMAND_LINE
    meant = {key for key, value in recipe.model if value != "auto" and _is_meant(recipe, f"model.{key}", typed)}
    if there.hidden_size is None or ("family" in meant and recipe.model.family != there.family):
        return recipe
    preset = recipe.model.preset if "preset" in meant else None
    meant |= {"preset", *PRESETS.get(preset or "", {})}
    taken = {key: value for key, value in there if key not in meant}
    origins = dict(recipe._origins)
    origins |= {f"model.{key}": place for key in taken}
    model = recipe.model.model_copy(update={**taken, "preset": preset})
    return recipe.model_copy(update={"model": model}).with_origins(origins)


def _is_meant(recipe: Recipe, key: str, typed: bool) -> bool:
    return recipe.writes(key) and (not typed or recipe.origin(key) == COMMAND_LINE)
