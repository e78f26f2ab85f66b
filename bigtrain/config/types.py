"""The types of recipe values: strict, with units, and a text for people of what each accepts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, WithJsonSchema

from bigtrain import units


@dataclass(frozen=True)
class Expects:
    """What a value must be, in words; put into an `Annotated` type for error messages and the reference."""

    text: str


def _from_text(parse: Callable[[str], Any]) -> BeforeValidator:
    def read(value: object) -> object:
        return parse(value) if isinstance(value, str) else value

    return BeforeValidator(read)


def _bytes(value: object) -> object:
    if isinstance(value, str):
        return units.parse_bytes(value)
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(f"{value} has no unit; write for example '{value}GiB'")
    return value


def _share_or_count(value: object) -> object:
    if isinstance(value, str) and value.strip().endswith("%"):
        units.parse_share(value)
        return value.replace(" ", "")
    return units.parse_count(value) if isinstance(value, str) else value


def _schema(*types: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": list(types)} if len(types) > 1 else types[0])


_QUANTITY_SCHEMA = {"type": "string", "pattern": r"^[0-9][0-9_.]*\s*[A-Za-z%]*$"}

Auto: TypeAlias = Literal["auto"]
Count = Annotated[
    int, _from_text(units.parse_count), Field(ge=1),
    Expects("a whole number of 1 or more (32B and 500K are understood)"),
    _schema({"type": "integer", "minimum": 1}, _QUANTITY_SCHEMA),
]  # fmt: skip
CountOrZero = Annotated[
    int, _from_text(units.parse_count), Field(ge=0),
    Expects("a whole number of 0 or more"),
    _schema({"type": "integer", "minimum": 0}, _QUANTITY_SCHEMA),
]  # fmt: skip
Bytes = Annotated[
    int, BeforeValidator(_bytes), Field(ge=1),
    Expects("bytes with a unit, such as 16GiB or 80GB"),
    _schema({"type": "string", "pattern": r"^[0-9][0-9_.]*\s*([kKMGT]i?)?B$"}),
]  # fmt: skip
Seconds = Annotated[
    float, _from_text(units.parse_seconds), Field(gt=0),
    Expects("a time with a unit, such as 60s or 5min"),
    _schema({"type": "string", "pattern": r"^[0-9][0-9.]*\s*(ms|s|m|min|h|d)$"}),
]  # fmt: skip
WarmUp = Annotated[
    int | str, BeforeValidator(_share_or_count),
    Expects("steps, or a share of the run such as 6%"),
    _schema({"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^[0-9.]+\s*%$"}),
]  # fmt: skip
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), Expects("a number above 0")]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), Expects("a number of 0 or more")]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), Expects("a number from 0 up to, not including, 1")]
OpenFraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False), Expects("a number above 0 and below 1")]
Text = Annotated[str, Field(min_length=1), Expects("text")]
