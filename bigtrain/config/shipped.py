"""The recipes that come with bigtrain, in a checkout and in an installed package alike."""

from __future__ import annotations

from pathlib import Path

import bigtrain
from bigtrain.errors import RecipeError, did_you_mean


def shipped_recipes() -> dict[str, Path]:
    """Return the shipped recipes by name, sorted."""
    return {file.stem: file for file in sorted(_folder().glob("*.yaml"))}


def recipe_path(name: str) -> Path:
    """Return the file of a shipped recipe.

    Raises RecipeError for a name that none has.
    """
    recipes = shipped_recipes()
    if name not in recipes:
        instead = did_you_mean(name, recipes) or f"; there are {', '.join(recipes)}"
        raise RecipeError(f"no shipped recipe is named {name!r}{instead}")
    return recipes[name]


def headline(recipe: Path) -> str:
    """Return what a recipe says of itself: the first line of its header that is not for editors, or an empty text."""
    for line in recipe.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("# ").rstrip()
        if text and not text.startswith("yaml-language-server:"):
            return text
    return ""


def _folder() -> Path:
    # A wheel carries the recipes inside the package; in a checkout they stand beside it.
    package = Path(next(iter(bigtrain.__path__)))
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"
