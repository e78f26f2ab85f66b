"""A configuration file of another library: JSON, its values by dotted key, each checked where it is read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigtrain import strict_json
from bigtrain.config.keys import LONGEST_SHOWN, quoted
from bigtrain.errors import Fault, InputError

AUTO = "auto"
"""What DeepSpeed's files say where the Trainer fills a value in."""

LARGEST = sys.float_info.max
"""Of numbers; a whole one of JSON may be larger."""

LARGEST_FILE = 2**20
"""Bytes; such files have some thousand."""


def read_mapping(file: Path) -> dict[str, Any]:
    """Return what a JSON file holds. Raises InputError, with the line where there is one, for what is no mapping."""
    try:
        values = strict_json.read(file, LARGEST_FILE)
    except OSError as error:
        raise InputError(Fault(str(file), "", f"cannot be read: {error.strerror}; name a JSON file")) from error
    except json.JSONDecodeError as error:
        wrong = f"broken JSON: {error.msg} (column {error.colno}); JSON has no comments and no comma before a bracket"
        raise InputError(Fault(f"{file}:{error.lineno}", "", wrong)) from error
    except UnicodeDecodeError as error:
        raise InputError(Fault(str(file), "", f"not UTF-8 at byte {error.start}; save the file as UTF-8")) from error
    except ValueError as error:
        raise InputError(Fault(str(file), "", f"{error}; give a JSON file as the library reads it")) from error
    if not isinstance(values, dict):
        raise InputError(Fault(str(file), "", f"holds {quoted(values)}; a configuration is a mapping, {{...}}"))
    return values


@dataclass
class Source:
    """A configuration by dotted key. What is read of it is noted, so is what is wrong.

    A section that says `enabled: false` says nothing else.
    """

    where: str
    values: Mapping[str, Any]
    read: set[str] = field(default_factory=set)
    autos: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    @classmethod
    def of(cls, where: str, values: Mapping[str, Any]) -> Source:
        """Return a configuration, its sections taken apart."""
        return cls(where, dict(_leaves(values, "")))

    def has(self, key: str) -> bool:
        """Tell whether a key holds a value, which null is not."""
        return self.values.get(key) is not None

    def get(self, key: str) -> Any:
        """Return a value, or None where there is none, or `auto`, which is noted."""
        self.read.add(key)
        value = self.values.get(key)
        if value == AUTO:
            if key not in self.autos:
                self.autos.append(key)
            return None
        return value

    def number(self, key: str) -> float | None:
        """Return a finite number or None."""
        value = self.get(key)
        if isinstance(value, str):  # as `6e-4` of a command line
            with suppress(ValueError):
                value = float(value)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
            self._wrong(key, value, "a number")
            return None
        return value

    def whole(self, key: str) -> int | None:
        """Return a whole number or None."""
        value = self.number(key)
        if value is None:
            return None
        if isinstance(value, float) and not value.is_integer():
            self._wrong(key, value, "a whole number")
            return None
        return int(value)

    def flag(self, key: str) -> bool:
        """Return whether a key says true."""
        value = self.get(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        self._wrong(key, value, "true or false")
        return False

    def text(self, key: str) -> str | None:
        """Return a text or None."""
        value = self.get(key)
        if value is None or isinstance(value, str):
            return value
        self._wrong(key, value, "a text")
        return None

    def texts(self, key: str) -> list[str] | None:
        """Return the texts of a list, of a text the one, or None."""
        value = self.get(key)
        if value is None or isinstance(value, str):
            return None if value is None else [value]
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            return value
        self._wrong(key, value, "a text or a list of texts")
        return None

    def _wrong(self, key: str, value: object, wanted: str) -> None:
        """Note a fault, once, however often the key is read."""
        shown = quoted(value)[:LONGEST_SHOWN]
        fault = Fault(self.where, key, f"{shown} is not {wanted}; write {wanted}")
        if fault not in self.faults:
            self.faults.append(fault)


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value.get("enabled") is False:
            yield f"{key}.enabled", False
        elif isinstance(value, dict) and value:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value
