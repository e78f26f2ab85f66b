"""The axes of a chart: where a value lies in pixels, which ticks are round, how they read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from bigtrain.units import BYTE_UNITS, format_count

Unit: TypeAlias = Literal["step", "number", "scientific", "count", "bytes", "share"]


@dataclass(frozen=True)
class Axis:
    """A range of values, laid along pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    unit: Unit = "number"
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Return where a value lies, in pixels."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self, count: int) -> list[tuple[float, str]]:
        """Return about so many round values of the range, each with its text."""
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            powers = range(first, last + 1, -(-(last - first + 1) // count))
            return [(10.0**power, scientific(10.0**power)) for power in powers]
        name, size = byte_unit(self.high) if self.unit == "bytes" else ("", 1)
        spacing = round_spacing((self.high - self.low) / size / count)
        if self.unit == "step":
            spacing = max(1.0, spacing)
        lowest = math.ceil(self.low / size / spacing - 1e-9)
        highest = math.floor(self.high / size / spacing + 1e-9)
        values = [index * spacing for index in range(lowest, highest + 1)]
        return [(value * size, self._text(value, spacing, name)) for value in values]

    def _text(self, value: float, spacing: float, byte_name: str) -> str:
        decimals = max(0, -math.floor(math.log10(spacing) + 1e-9))
        if value == 0:
            return "0"
        if self.unit == "step":
            return f"{value:,.0f}"
        if self.unit == "share":
            return f"{value:.{max(0, decimals - 2)}%}"
        if self.unit == "bytes":
            return f"{value:.{decimals}f} {byte_name}"
        if self.unit == "count":
            return format_count(value)
        if self.unit == "scientific" or decimals > 4 or abs(value) >= 1e6:
            return scientific(value)
        return f"{value:.{decimals}f}"


def finite(value: object) -> float | None:
    """Return a metrics value as a number, or None for null, "nan" and "inf"."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def round_spacing(spacing: float) -> float:
    """Return the number nearest to a positive one, by ratio, that is 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(spacing))
    return min((power, 2 * power, 5 * power, 10 * power), key=lambda size: abs(math.log(size / spacing)))


def scientific(value: float) -> str:
    """Return the shortest text of the form 2.5e-4, to four digits; plain from 0.01 up to 10000."""
    if 1e-2 <= abs(value) < 1e4:
        return f"{value:.4g}"
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def byte_unit(size: float) -> tuple[str, int]:
    """Return the largest binary unit that a size has at least one of, and its bytes."""
    names = [name for name in ("TiB", "GiB", "MiB", "KiB") if size >= BYTE_UNITS[name]]
    return (names[0], BYTE_UNITS[names[0]]) if names else ("B", 1)


def short_seconds(seconds: float) -> str:
    """Return a text for people, for the length of a step: 38.1 ms, 2.41 s, 1,207 s."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"
