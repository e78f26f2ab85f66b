"""What every part of a recipe is: strict types, no unknown keys, immutable."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a recipe: strict types, no unknown keys, immutable."""

    # Built at first use: a section inside the recipe needs no validator of its own, and starting up stays quick.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, defer_build=True)
