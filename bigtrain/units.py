"""Quantities with units, read and written: '16GiB', '300B', '60s', '6%'."""

from __future__ import annotations

import re
from decimal import Decimal

BYTE_UNITS = {
    "B": 1,
    "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
COUNT_UNITS = {"": 1, "K": 10**3, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
TIME_UNITS = {
    "ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60),
    "min": Decimal(60), "h": Decimal(3600), "d": Decimal(86400),
}  # fmt: skip

LONGEST_QUANTITY = 40
"""Characters; a longer text is a slip of the keyboard, and numbers of thousands of digits are slow."""

_COUNTS = "500, 500K, 3M or 32B"
_QUANTITY = re.compile(r"([0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?)\s*([A-Za-z]*)")


class NoQuantityError(ValueError):
    """A text that is no number with a unit at all."""


def parse_bytes(text: str) -> int:
    """Return the bytes that a text such as '16GiB' or '1.5 GB' stands for.

    Raises ValueError without a unit: whether 24 means bytes or GiB is for the writer to say.
    """
    number, unit = _split(text)
    if unit not in BYTE_UNITS:
        raise ValueError(f"{text!r} has no unit of bytes; write for example '{number:f}GiB'")
    return round(number * BYTE_UNITS[unit])


def parse_count(text: str) -> int:
    """Return the whole number that a text such as '32B', '500K' or '1_000' stands for."""
    number, unit = _split(text)
    if unit not in COUNT_UNITS:
        raise ValueError(f"{text!r} is not a count; write for example {_COUNTS}")
    count = number * COUNT_UNITS[unit]
    if count != int(count):
        raise ValueError(f"{text!r} is not a whole number; write for example {_COUNTS}")
    return int(count)


def parse_seconds(text: str) -> float:
    """Return the seconds that a text such as '60s', '5min' or '500ms' stands for."""
    number, unit = _split(text)
    if unit not in TIME_UNITS:
        raise ValueError(f"{text!r} has no unit of time; write for example '{number:f}s'")
    return float(number * TIME_UNITS[unit])


def parse_share(text: str) -> float:
    """Return the fraction in 0..1 that a text such as '6%' stands for."""
    match = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,20})?)\s*%", text.strip())
    if not match or float(match[1]) > 100:
        raise ValueError(f"{text!r} is not a share; write for example 6%")
    return float(match[1]) / 100


def format_bytes(count: int) -> str:
    """Return a short text for people: 1.50 GiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def exact_bytes(count: int) -> str:
    """Return the shortest text that `parse_bytes` reads back to exactly this number."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if count and count % BYTE_UNITS[unit] == 0:
            return f"{count // BYTE_UNITS[unit]}{unit}"
    return f"{count}B"


def exact_seconds(seconds: float) -> str:
    """Return a text that `parse_seconds` reads back to exactly this number."""
    digits = f"{Decimal(repr(seconds)):f}"
    return f"{digits.rstrip('0').rstrip('.') if '.' in digits else digits}s"


def format_count(count: float) -> str:
    """Return a short text for people: 335M, 1.5B, 12.3K."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if abs(count) >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def format_flops(count: float) -> str:
    """Return a short text for people: 22.4 MFLOP, 1.98 GFLOP."""
    for size, unit in ((10**15, "P"), (10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "K")):
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}FLOP"
    return f"{count:.3g} FLOP"


def format_seconds(seconds: float) -> str:
    """Return a short text for people: 45s, 3m20s, 2h05m, 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _split(text: str) -> tuple[Decimal, str]:
    match = _QUANTITY.fullmatch(text.strip())
    if not match or len(text) > LONGEST_QUANTITY:
        raise NoQuantityError(f"{text[:LONGEST_QUANTITY]!r} is not a quantity")
    return Decimal(match[1].replace("_", "")), match[2]
