"""Several sources in one recipe, each with a weight."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Annotated, TypeAlias

from pydantic import BeforeValidator, Field

from bigtrain.config.section import Section
from bigtrain.config.types import Expects, NonNegative, Text
from bigtrain.errors import did_you_mean


class MixtureSource(Section):
    """One source of a mixture; null takes the key of the same name below `data`."""

    source: Text | Annotated[list[Text], Field(min_length=1)]
    """As `data.source`."""
    weight: NonNegative
    """Its share of the rows, beside the other sources' weights; 0 leaves it out."""
    subset: Text | None = None
    """The configuration of a hub data set."""
    split: Text | None = None
    """The split of a hub data set."""
    text_column: Text | None = None
    """The column that holds the text."""
    streaming: bool | None = None
    """Whether a hub data set is read as a stream."""


KEYS = tuple(MixtureSource.model_fields)
EXAMPLE = "{source: corpus.txt, weight: 1}"


def _checked(value: object) -> object:
    """Raise ValueError that names the entry of a mixture that is wrong, and how; else return it as it is."""
    if not isinstance(value, list):
        return value
    for number, entry in enumerate(value, start=1):
        if isinstance(entry, Mapping) and (wrong := _wrong(entry)):
            raise ValueError(f"source {number}: {wrong}")
        if not isinstance(entry, (Mapping, MixtureSource)):
            raise ValueError(f"source {number} is no mapping; write {EXAMPLE}")
    total = sum(float(entry["weight"] if isinstance(entry, Mapping) else entry.weight) for entry in value)
    if value and not 0 < total < math.inf:
        raise ValueError(f"the weights sum to {total:g}; give at least one source a weight above 0")
    return value


def _wrong(entry: Mapping[str, object]) -> str:
    if unknown := next((key for key in entry if key not in KEYS), None):
        return f"{unknown!r} is no key of a source{did_you_mean(unknown, KEYS) or '; there are ' + ', '.join(KEYS)}"
    if missing := next((key for key in ("source", "weight") if entry.get(key) is None), None):
        return f"{missing!r} is missing; write {EXAMPLE}"
    weight = entry["weight"]
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= sys.float_info.max:
        return f"weight {weight!r:.60} is not a number of 0 or more"
    source = entry["source"]
    names = source if isinstance(source, list) else [source]
    texts = {"source": names, **{key: [entry.get(key)] for key in ("subset", "split", "text_column")}}
    for key, values in texts.items():
        if not values or any(value is not None and (not isinstance(value, str) or not value) for value in values):
            return f"{key} {entry[key]!r} is not text; write it in quotes"
    if type(entry.get("streaming")) not in (bool, type(None)):
        return f"streaming {entry['streaming']!r} is not true or false"
    return ""


Mixture: TypeAlias = Annotated[
    list[MixtureSource], BeforeValidator(_checked), Field(min_length=1), Expects(f"a list of sources such as {EXAMPLE}")
]
