"""The types of recipe values: strict, with units, and a text for people of what each accepts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from bigtrain import units

LARGEST = 2**63 - 1
"""Numbers beyond it do not fit the 64 bits of torch and numpy."""


@dataclass(frozen=True)
class Expects:
    """What a value must be, in words; put into an `Annotated` type for error messages and the reference."""

    text: str


def _count(value: object) -> object:
    if isinstance(value, float) and LARGEST < value < math.inf:
        raise ValueError(f"{value} is too large; at most {LARGEST}")
    if isinstance(value, float) and value.is_integer():
        raise ValueError(f"{value} is not a whole number; write {int(value)}")
    return units.parse_count(value) if isinstance(value, str) else value


def _bytes(value: object) -> object:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise ValueError(f"{value} has no unit; write for example '{value}GiB'")
    return units.parse_bytes(value) if isinstance(value, str) else value


def _seconds(value: object) -> object:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise ValueError(f"{value} has no unit; write for example '{value}s'")
    return units.parse_seconds(value) if isinstance(value, str) else value


def _share_or_count(value: object) -> object:
    if isinstance(value, str) and value.strip().endswith("%"):
        units.parse_share(value)
        return value.replace(" ", "")
    return _count(value)


def _stage(value: object) -> object:
    # Literal compares with ==, and True == 1 == 1.0.
    if isinstance(value, (bool, float)):
        raise ValueError(f"{str(value).lower()} is not a stage; write 0, 1, 2 or 3")
    return value


def _written_with(write: Callable[[Any], str]) -> PlainSerializer:
    # In a union with `auto` the serializer meets the other members' values too.
    return PlainSerializer(lambda value: value if isinstance(value, str) else write(value))


def _schema(*types: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": list(types)} if len(types) > 1 else types[0])


_COUNT_TEXT = {"type": "string", "pattern": r"^[0-9][0-9_.]*\s*[kKMBT]?$"}

Auto: TypeAlias = Literal["auto"]
Count = Annotated[
    int, BeforeValidator(_count), Field(ge=1, le=LARGEST),
    Expects("a whole number of 1 or more"),
    _schema({"type": "integer", "minimum": 1}, _COUNT_TEXT),
]  # fmt: skip
CountOrZero = Annotated[
    int, BeforeValidator(_count), Field(ge=0, le=LARGEST),
    Expects("a whole number of 0 or more"),
    _schema({"type": "integer", "minimum": 0}, _COUNT_TEXT),
]  # fmt: skip
Kept = Annotated[
    int, BeforeValidator(_count), Field(ge=2, le=LARGEST),
    Expects("a whole number of 2 or more"),
    _schema({"type": "integer", "minimum": 2}, _COUNT_TEXT),
]  # fmt: skip
Bytes = Annotated[
    int, BeforeValidator(_bytes), Field(ge=1, le=LARGEST), _written_with(units.exact_bytes),
    Expects("bytes with a unit, such as 16GiB or 80GB"),
    _schema({"type": "string", "pattern": r"^[0-9][0-9_.]*\s*([kKMGT]i?)?B$"}),
]  # fmt: skip
Seconds = Annotated[
    float, BeforeValidator(_seconds), Field(ge=0.001, le=1e9), _written_with(units.exact_seconds),
    Expects("a time with a unit, such as 60s or 5min"),
    _schema({"type": "string", "pattern": r"^[0-9][0-9_.]*\s*(ms|s|m|min|h|d)$"}),
]  # fmt: skip
WarmUp = Annotated[
    Annotated[int, Field(ge=0, le=LARGEST)] | str, BeforeValidator(_share_or_count),
    Expects("a whole number of steps, or a share of the run such as 6%"),
    _schema({"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^[0-9][0-9_.]*\s*[kKMBT%]?$"}),
]  # fmt: skip
Stage = Annotated[Literal["auto", 0, 1, 2, 3], BeforeValidator(_stage)]
NodeRange = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,6}:[1-9][0-9]{0,6}$"), Expects("least:most, such as 2:4")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), Expects("a number above 0")]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), Expects("a number of 0 or more")]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), Expects("a number from 0 up to, not including, 1")]
OpenFraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False), Expects("a number above 0 and below 1")]
Text = Annotated[str, Field(min_length=1), Expects("text")]
Word = Annotated[str, Field(pattern=r"^[^\s#]+$"), Expects("text without spaces")]
Betas = Annotated[
    list[Fraction], Field(min_length=2, max_length=2), Expects("a list of two numbers from 0 up to, not including, 1")
]
RunName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"),
    Expects("a name of letters, digits, '.', '_' and '-' that starts with a letter or digit"),
]
