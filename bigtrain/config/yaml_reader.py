"""YAML as recipes use it: the core schema of YAML 1.2, and nothing that can surprise.

PyYAML follows YAML 1.1, where `no` is false, `1:30` is 90, `010` is 8 and `6e-4` is text, and of two equal keys it
keeps the last. Here its parser gives the events only; what they mean is decided by the rules of YAML 1.2.2, section
10.3. Anchors, aliases, tags and merge keys are refused: a recipe reads from top to bottom.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

import yaml
from yaml.reader import ReaderError

from bigtrain.errors import Fault

Value: TypeAlias = "bool | int | float | str | list[Value] | dict[str, Value] | None"

DEEPEST = 32
"""Levels of nesting; a recipe has three, and Python's own stack ends near 1,000."""

MOST_EVENTS = 10_000
"""Values, keys and brackets of a text; a recipe has some hundred, and PyYAML takes 60 microseconds for each."""

MOST_KEYS, MOST_FAULTS = 500, 100
"""Beyond these a text is no recipe, and is read no further."""

_CORE_TAG = "tag:yaml.org,2002:"
_NO_WORD = "a key must be a word; write one before the ':'"
_UNCLOSED = ("'<stream end>'", "unexpected end of stream", "expected ',' or")
_MEANINGS = {
    "'\\t'": "a tab cannot indent; use spaces",
    "'<block mapping start>'": "broken YAML: indented unlike the lines above; give keys of a section the same indent",
    "mapping values are not allowed": "broken YAML: a ':' too many, or a wrong indent; quote text with ': '",
    **dict.fromkeys(_UNCLOSED, "broken YAML: a bracket or quote that is not closed; close it"),
    "but found ':'": _NO_WORD,
}
"""What some of PyYAML's sentences mean to those who wrote the text."""

_NULLS = {"", "~", "null", "Null", "NULL"}
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]{1,40}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass
class Document:
    """What a text says: its value, the place of each dotted key, and all that is wrong with it.

    `broken` means that the text could not be read to its end, or holds an alias, so that keys may be missing.
    """

    value: Value = None
    origins: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    broken: bool = False


class _Stop(Exception):
    """Reading on makes no sense; the fault is noted."""


def read_yaml(text: str, place: Callable[[int], str], root: str = "") -> Document:
    """Read one YAML document; `place` names a line (from 1), `root` is the dotted key that the text is the value of."""
    reader = _Reader(place, root)
    try:
        reader.read(text)
    except _Stop:
        reader.document.broken = True
    return reader.document


def plain_value(text: str) -> Value:
    """Return what an unquoted YAML scalar stands for."""
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text


class _Reader:
    def __init__(self, place: Callable[[int], str], root: str) -> None:
        self.place, self.root, self.line = place, root, 1
        self.document = Document()
        self.indirect = False

    def read(self, text: str) -> None:
        events = self.events(text)
        next(events)  # the start of the stream
        if isinstance(next(events), yaml.StreamEndEvent):
            return
        self.document.value = self.value(events, next(events), self.root, 0)
        next(events)  # the end of the document
        if not isinstance(next(events), yaml.StreamEndEvent):
            self.fault("", "a second document starts here; a recipe is one document")

    def events(self, text: str) -> Iterator[Any]:
        try:
            for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
                if number == MOST_EVENTS:
                    self.give_up(f"more than {MOST_EVENTS:,} values and keys")
                if event.start_mark:
                    self.line = event.start_mark.line + 1
                yield event
        except ReaderError as error:
            self.line = text.count("\n", 0, error.position) + 1
            self.fault(self.root, f"the character {chr(error.character)!r} cannot be used; leave it out")
        except yaml.MarkedYAMLError as error:
            mark = _mark(error)
            self.line = mark.line + 1 if mark else self.line
            self.fault(self.root, _explain(error))
        except (ValueError, OverflowError):
            # PyYAML checks neither the range of "\U00110000" nor the length of numbers in a %YAML line.
            self.fault(self.root, "broken YAML: a number that is out of range")
        raise _Stop

    def value(self, events: Iterator[Any], event: Any, key: str, depth: int) -> Value:
        if depth > DEEPEST:
            self.fault(key[:80], f"nested more than {DEEPEST} levels deep")
            raise _Stop
        self.refuse_indirection(event, key)
        if isinstance(event, yaml.MappingStartEvent):
            return self.mapping(events, key, depth)
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Value] = []
            while not isinstance(event := next(events), yaml.SequenceEndEvent):
                items.append(self.value(events, event, key, depth + 1))
            return items
        return self.scalar(event, key) if isinstance(event, yaml.ScalarEvent) else None

    def mapping(self, events: Iterator[Any], key: str, depth: int) -> Value:
        found: dict[str, Value] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            line, name = self.line, self.key(events, event, key, depth)
            inner = f"{key}.{name}" if key else name
            if name in lines:
                self.fault(inner, f"given twice, first in line {lines[name]}; keep one")
            else:
                lines[name] = line
                self.document.origins.setdefault(inner, self.place(line))
                if len(self.document.origins) > MOST_KEYS:
                    self.give_up(f"more than {MOST_KEYS} keys")
            known, broken, indirect = len(self.document.faults), self.document.broken, self.indirect
            value = self.value(events, next(events), inner, depth + 1)
            if name == "<<":  # one fault is enough: what it merges is nearly always an alias
                del self.document.faults[known:]
                self.document.broken, self.indirect = broken, indirect
                continue
            found.setdefault(name, value)
        return found

    def key(self, events: Iterator[Any], event: Any, parent: str, depth: int) -> str:
        if not isinstance(event, yaml.ScalarEvent):
            self.fault(parent, _NO_WORD)
            self.value(events, event, parent, depth + 1)
            return ""
        if not event.value:
            self.fault(parent, _NO_WORD)
        self.refuse_indirection(event, parent)
        if event.value == "<<":
            self.fault(parent, "merge keys (<<) are not understood; write the keys out")
        return str(event.value) if event.value.isprintable() else ascii(event.value)

    def scalar(self, event: Any, key: str) -> Value:
        text = str(event.value)
        if unusable := next((c for c in text if unicodedata.category(c) in ("Cc", "Cs")), None):
            self.fault(key, f"the text holds the character {unusable!r}; write it on one line, without")
            return None
        return plain_value(text) if event.style is None else text

    def refuse_indirection(self, event: Any, key: str) -> None:
        """Note tags, and the first anchor or alias: what the others stand for follows from it."""
        alias = isinstance(event, yaml.AliasEvent)
        self.document.broken |= alias
        if event.anchor is not None and not self.indirect:
            self.indirect = True
            self.refuse(key, f"aliases (*{event.anchor})" if alias else f"anchors (&{event.anchor})")
        if tag := getattr(event, "tag", None):
            self.refuse(key, f"tags ({tag.replace(_CORE_TAG, '!!')})")

    def refuse(self, key: str, what: str) -> None:
        self.fault(key, f"{what} are not understood; write the value itself, or quote it if it is text")

    def give_up(self, what: str) -> NoReturn:
        """Say why reading on makes no sense, and stop."""
        self.document.faults = [Fault(self.place(self.line), "", f"{what}; this is not a recipe")]
        raise _Stop

    def fault(self, key: str, text: str) -> None:
        self.document.faults.append(Fault(self.place(self.line), key, text))
        if len(self.document.faults) > MOST_FAULTS:
            self.give_up(f"more than {MOST_FAULTS} faults")


def _explain(error: yaml.MarkedYAMLError) -> str:
    """Return what is wrong in words of the recipe's writer, and what to write instead."""
    problem = " ".join((error.problem or error.context or "").split())
    for sign, meaning in _MEANINGS.items():
        if sign in problem:
            return meaning
    return f"broken YAML: {problem}; text with special characters must stand in quotes"


def _mark(error: yaml.MarkedYAMLError) -> yaml.Mark | None:
    """Return the place of an error: of a bracket or quote that is never closed, where it was opened."""
    unclosed = any(sign in (error.problem or "") for sign in _UNCLOSED) and error.context_mark
    return unclosed or error.problem_mark or error.context_mark
