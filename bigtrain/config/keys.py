"""The schema as a table: every dotted key, what it accepts in words, and how values are written."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bigtrain import units
from bigtrain.config.schema import Recipe, Section
from bigtrain.config.types import Bytes, Expects, Seconds

LONGEST_SHOWN = 60
"""Characters of a wrong value that an error shows."""


@cache
def sections() -> dict[str, type[Section]]:
    """Return the sections of a recipe in their order."""
    found: dict[str, type[Section]] = {}
    for name, field in Recipe.model_fields.items():
        if isinstance(kind := field.annotation, type) and issubclass(kind, Section):
            found[name] = kind
    return found


@cache
def schema_keys() -> dict[str, FieldInfo]:
    """Return every key that holds a value: `name` and `seed`, then the dotted keys of the sections."""
    keys = {name: field for name, field in Recipe.model_fields.items() if name not in sections()}
    for section, model in sections().items():
        keys |= {f"{section}.{name}": field for name, field in model.model_fields.items()}
    return keys


def words_of(section: str) -> list[str]:
    """Return the keys that may stand in a section, or at the top for an empty text."""
    return list(sections()[section].model_fields if section in sections() else Recipe.model_fields)


def nullable(key: str) -> bool:
    """Return whether null is a value of this key."""
    return types.NoneType in set(_leaves(schema_keys()[key].annotation))


def choices(key: str) -> list[object]:
    """Return the words and numbers that a key names one by one, those inside its lists included."""
    return list(dict.fromkeys(value for leaf in _leaves(schema_keys()[key].annotation) for value in get_args(leaf)))


def takes(key: str, kind: type) -> bool:
    """Return whether values of this plain type are among those that the key accepts."""
    return kind in set(_leaves(schema_keys()[key].annotation))


def expects(key: str) -> str:
    """Return what a key accepts, in words, for messages and the reference alike."""
    field = schema_keys()[key]
    return _described(field.annotation, field.metadata)


def show(key: str, value: object) -> str:
    """Return a value as YAML writes it, with the unit of the key and in one line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, (int, float)) and key in schema_keys():
        unit = _unit(key)
        return unit(value) if unit else repr(value)
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, BaseModel):
        return ", ".join(f"{name} {show(key, held)}" for name, held in value if held is not None)
    text = f"[{', '.join(show(key, item) for item in value[:20])}]" if isinstance(value, list) else quoted(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."


def quoted(value: object) -> str:
    """Return the value's repr, cut short before it is made where it would be long."""
    return repr(value[:LONGEST_SHOWN] if isinstance(value, str) else value)


def listed(words: Iterable[str], last: str = "or") -> str:
    """Return "a, b or c"."""
    *some, final = words
    return f"{', '.join(some)} {last} {final}" if some else final


def _unit(key: str) -> Any:
    # Bytes and Seconds are recognised by their words: pydantic takes an Annotated type apart.
    for kind, write in ((Bytes, units.exact_bytes), (Seconds, units.exact_seconds)):
        if next(item.text for item in get_args(kind) if isinstance(item, Expects)) in expects(key):
            return write
    return None


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _leaves(annotation: Any) -> Iterator[Any]:
    """Yield the plain types and Literals inside an annotation."""
    for member in _members(annotation):
        origin = get_origin(member)
        if origin is Annotated:
            yield from _leaves(get_args(member)[0])
        elif origin in (Union, types.UnionType) or origin is list:
            yield from (leaf for part in get_args(member) for leaf in _leaves(part))
        else:
            yield member


def _described(annotation: Any, metadata: Iterable[object] = ()) -> str:
    for item in metadata:
        if isinstance(item, Expects):
            return item.text
    words: list[str] = []
    literals: list[str] = []
    for member in _members(annotation):
        origin = get_origin(member)
        if origin is Literal:
            literals += [repr(value) for value in get_args(member)]
        elif origin is Annotated:
            words.append(_described(get_args(member)[0], member.__metadata__))
        elif origin is list:
            words.append(f"a list of {_described(get_args(member)[0])}")
        else:
            words.append({bool: "true or false", types.NoneType: "null"}[member])
    return ", or ".join([*([listed(literals)] if literals else []), *words])
