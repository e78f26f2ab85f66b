"""JSON out of files that anybody may have written: bounded in bytes, values and depth, no key twice, finite numbers."""

from __future__ import annotations

import gc
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LARGEST_BYTES = 8 * 2**20
"""Of a file, unless its reader knows better."""

MOST_VALUES = 1_000_000
"""Of a text; a value of three characters takes up to 72 bytes of memory, so the length of a text bounds little."""

SHORT = 2**16
"""Characters; a text of so few holds few values, which need not be counted."""


def read(path: Path, largest_bytes: int = LARGEST_BYTES, most_values: int = MOST_VALUES) -> Any:
    """Return what a JSON file holds. Raises ValueError, saying why, for a file that holds none, and OSError."""
    with path.open("rb") as file:
        content = file.read(largest_bytes + 1)
    if len(content) > largest_bytes:
        raise ValueError(f"larger than {largest_bytes // 2**20} MiB")
    return parse(content, most_values)


def parse(content: bytes | str, most_values: int = MOST_VALUES) -> Any:
    """Return what a JSON text says. Raises ValueError, saying why, for what is not strictly JSON or absurd."""
    if isinstance(content, bytes):
        content = content.decode("utf-8")
    check_values(content, most_values)
    try:
        with _uncollected():
            return json.loads(content, object_pairs_hook=_once, parse_float=_finite, parse_constant=_refused)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_values(text: str, most_values: int = MOST_VALUES) -> None:
    """Raise ValueError where a text may hold more values than fit into the memory that reading may take."""
    if len(text) > SHORT and _marks(text) > most_values and _marks(_STRING.sub("", text)) > most_values:
        raise ValueError(f"more than {most_values:,} values")


def _marks(text: str) -> int:
    return sum(map(text.count, ",:[{"))


_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
"""A string, or what is left of a text where one does not end; it never looks at a character twice."""


@contextmanager
def _uncollected() -> Iterator[None]:
    """Look for no garbage meanwhile: with a million new values that takes several times as long as reading them."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} stands there twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large for a number")
    return number


def _refused(text: str) -> float:
    raise ValueError(f"{text} is not a number of JSON")
