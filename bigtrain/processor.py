"""What the processor of this machine can do, found without torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def has_slow_bf16() -> bool:
    """Tell whether this is an x86 processor that has no bf16 instructions; of other kinds nothing is known."""
    flags = processor_field("flags").split()
    return bool(flags) and not {"avx512_bf16", "amx_bf16"} & set(flags)


@cache
def has_tiles(precision: str) -> bool:
    """Tell whether this processor multiplies tiles of "bf16" or "fp16" numbers (AMX)."""
    return f"amx_{precision}" in processor_field("flags").split()


def processor_field(name: str) -> str:
    """Return a field of the first processor that Linux lists, or an empty text."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for field, _, value in fields if field.strip() == name), "")
