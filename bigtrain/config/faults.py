"""What pydantic finds, as faults that people can act on: one for each key, with the value and what to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from bigtrain.config.keys import choices, expects, listed, schema_keys, sections, show, takes, words_of
from bigtrain.config.suggest import meant_key, suggestion
from bigtrain.errors import Fault, did_you_mean
from bigtrain.units import NoQuantityError

_BOOLEAN_WORDS = {"yes": "true", "on": "true", "y": "true", "1": "true"}
_BOOLEAN_WORDS |= {"no": "false", "off": "false", "n": "false", "0": "false"}


def schema_faults(error: ValidationError, values: Mapping[str, Any], origins: Mapping[str, str]) -> list[Fault]:
    """Return one fault for each key that the schema refuses.

    A union gives several errors for one key; they become one line. A required key is not reported as missing where an
    unknown one stands that was probably meant for it.
    """
    grouped: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        grouped.setdefault(_key(detail), []).append(detail)
    unknown = [key for key, details in grouped.items() if details[0]["type"] == "extra_forbidden"]
    meant = {meant_key(key) for key in unknown}
    faults = []
    for key, details in grouped.items():
        text = _text(key, details, _value(values, details[0]["loc"]))
        if details[0]["type"] != "missing" or key not in meant:
            faults.append(Fault(_place(key, origins), key, text))
    return faults


def _key(detail: ErrorDetails) -> str:
    """Return the dotted recipe key of an error: what follows it in `loc` are members of a union and list indices."""
    first, *rest = map(str, detail["loc"])
    return f"{first}.{rest[0]}" if first in sections() and rest else first


def _value(values: Mapping[str, Any], loc: tuple[int | str, ...]) -> object:
    found: object = values
    for part in loc[:2]:
        found = found.get(str(part)) if isinstance(found, dict) and part in found else found
    return found


def _place(key: str, origins: Mapping[str, str]) -> str:
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return origins.get(key, "")


def _text(key: str, details: Iterable[ErrorDetails], value: object) -> str:
    first, *_ = details
    if first["type"] == "extra_forbidden":
        section, _, name = key.rpartition(".")
        known = key in schema_keys()
        return f"unknown key; write {name!r} below {section!r}" if known else f"unknown key{suggestion(key)}"
    if key in sections():
        return _section_text(key, first["type"] == "missing", value)
    if first["type"] == "missing":
        return f"missing; write {expects(key)}"
    return _wrong_value(key, details, value)


def _section_text(section: str, missing: bool, value: object) -> str:
    required = [name for name, field in sections()[section].model_fields.items() if field.is_required()]
    if missing:
        return f"missing section; it needs {listed(map(repr, required), 'and')}"
    return f"{show(section, value)} is not a section; write its keys below it, such as {words_of(section)[0]!r}"


def _wrong_value(key: str, details: Iterable[ErrorDetails], value: object) -> str:
    if too_large := next((d for d in details if d["type"] == "less_than_equal"), None):
        return f"{show(key, value)} is too large; at most {too_large['ctx']['le']}"
    explained = next((d["ctx"]["error"] for d in details if d["type"] == "value_error"), None)
    # Where a text is no quantity at all, the sentence about what the key takes says more.
    if explained and not isinstance(explained, NoQuantityError):
        return str(explained)
    return f"{show(key, value)} is not {expects(key)}{_hint(key, value)}"


def _hint(key: str, value: object) -> str:
    words = [choice for choice in choices(key) if isinstance(choice, str)]
    wrong = [item for item in (value if isinstance(value, list) else [value]) if item not in words]
    if wrong and isinstance(wrong[0], str):
        if takes(key, bool) and (word := _BOOLEAN_WORDS.get(wrong[0].lower())):
            return f"; write {word}"
        return did_you_mean(wrong[0], words)
    if isinstance(value, (int, float)) and expects(key).startswith(("text", "a name")):
        return f"; write it in quotes: {str(value)!r}"
    return ""
