"""`section.key=value` from the command line, put over what a recipe file says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bigtrain.config.keys import LONGEST_SHOWN, nullable, schema_keys, sections
from bigtrain.config.suggest import suggestion
from bigtrain.config.yaml_reader import Document, read_yaml
from bigtrain.errors import Fault

COMMAND_LINE = "command line"

LENGTHS = ("train.steps", "train.tokens", "train.epochs")
"""A run has one of these; an override of one takes the place of the one in the file."""

SOURCES = ("data.source", "data.mixture")
"""Likewise."""


def apply_overrides(written: Document, overrides: Iterable[str]) -> None:
    """Put each override over the document's values and origins; what is wrong with one is added to its faults.

    The last of repeated ones wins. `key=null` unsets: null where the key may be null, else its default.
    """
    edits: dict[str, Document] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if fault := _fault(key, equals, override):
            written.faults.append(fault)
            continue
        edits.pop(key, None)  # The last one also comes last: a section's override would undo an earlier key's.
        edits[key] = read_yaml(text, lambda _: COMMAND_LINE, root=key)
    given = {key for key, edit in edits.items() if edit.value is not None}
    for alternatives in (LENGTHS, SOURCES):
        if given & {*alternatives}:
            for key in alternatives:
                _unset(written, key)
    for key, edit in edits.items():
        written.faults += edit.faults
        if not edit.faults:
            _set(written, key, edit)


def _fault(key: str, equals: str, override: str) -> Fault | None:
    if not equals or not key:
        shown = override if override.isprintable() else ascii(override)
        return Fault(COMMAND_LINE, shown[:LONGEST_SHOWN], "an override is written key=value, such as train.steps=100")
    if key not in schema_keys() and key not in sections():
        shown = key if key.isprintable() else ascii(key)
        return Fault(COMMAND_LINE, shown[:LONGEST_SHOWN], f"unknown key{suggestion(key, full=True)}")
    return None


def _set(written: Document, key: str, edit: Document) -> None:
    _unset(written, key)
    if edit.value is None and not (key in schema_keys() and nullable(key)):
        return
    *parents, name = key.split(".")
    values: Any = written.value
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            return  # The section is refused as a whole.
    values[name] = edit.value
    written.origins |= {key: COMMAND_LINE, **edit.origins}


def _unset(written: Document, key: str) -> None:
    section, _, name = key.rpartition(".")
    values: Any = written.value
    values = values.get(section) if section else values
    if isinstance(values, dict):
        values.pop(name, None)
    for inner in [place for place in written.origins if place == key or place.startswith(f"{key}.")]:
        del written.origins[inner]
