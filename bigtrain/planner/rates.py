"""What a device really reaches: what was measured here, else what is known of the table's numbers. No torch.

`rates.json` holds the shares, each with its source. What was measured on this machine is kept, in the cache folder, by
`bigtrain.training.peak`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bigtrain import strict_json
from bigtrain.planner.hardware import Hardware, row_of
from bigtrain.processor import processor_field

KEPT_FILE = "rates.json"
"""In the cache folder."""

MEASURES = (
    "product_flops_per_second",
    "thin_product_flops_per_second",
    "memory_bytes_per_second",
    "fresh_bytes_per_second",
    "calls_per_second",
)
"""What is measured on a machine; of each the highest ever seen counts, since others may use the machine too."""

PLAUSIBLE = (1.0, 1e19)
"""A second's worth of anything; a rate outside was not measured, and would make seconds of 0 or without end."""

THIN_ROWS = 64
"""Rows of the thin product that is measured; of the others there are as many as of the square one, rows and columns."""

PRODUCT_SIZES = {"cpu": 960, "cuda": 8192}
"""Rows and columns of the square product that is measured."""


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast a device is at what a step is made of; `source` says where that is from.

    Products reach `product_flops_per_second` when they are large; on a CPU they also pass `operand_passes` times over
    operands and result. What fits into `cache_bytes` is read and written at `cache_bytes_per_second`. Memory of
    `mapped_bytes` or more is mapped anew each time and takes `fresh_seconds_per_byte`. A call is one operation, seen
    from Python. `arithmetic` gives, for pointwise operations, the FLOPs of a product that take as long.
    """

    source: str
    kind: str
    product_flops_per_second: float
    memory_bytes_per_second: float
    call_seconds: float
    attention_share: tuple[float, float]
    arithmetic: Mapping[str, float]
    operand_passes: float = 0.0
    cache_bytes: int = 0
    cache_bytes_per_second: float = 0.0
    mapped_bytes: int = 0
    fresh_seconds_per_byte: float = 0.0
    kernel_seconds: float = 0.0
    multiprocessors: int = 1
    compiled_traffic: float = 1.0
    compiled_calls: float = 1.0


@cache
def constants() -> Mapping[str, Any]:
    """Return what `rates.json` holds."""
    table: dict[str, Any] = json.loads(Path(__file__).with_name("rates.json").read_text(encoding="utf-8"))
    return table


def rates_of(hardware: Hardware, precision: str, threads: int, folder: Path | None = None) -> Rates:
    """Return the rates of a device at a precision, measured ones from the cache folder where there are any.

    `threads` are what torch computes with on a CPU. A device of the table has the table's name, under which nothing is
    ever measured: plans for it are the same everywhere.
    """
    product = "fp32" if precision == "bf16" and hardware.slow_bf16 else precision
    measured = {} if folder is None else kept(folder / KEPT_FILE, hardware, product, threads)
    return _cpu(hardware, product, threads, measured) if hardware.kind == "cpu" else _cuda(hardware, product, measured)


def key(hardware: Hardware, precision: str, threads: int, version: str) -> str:
    """Return under what rates are kept that were measured with so many threads and a version of torch."""
    return f"{_prefix(hardware, precision, threads)}{version}"


def _prefix(hardware: Hardware, precision: str, threads: int) -> str:
    counted = f" / {threads} threads" if hardware.kind == "cpu" else ""
    return f"{hardware.name}{counted} / {precision} / torch "


def kept(path: Path, hardware: Hardware, precision: str, threads: int) -> dict[str, float]:
    """Return the best that was measured, with whatever torch; nothing where the file is absent or damaged."""
    prefix = _prefix(hardware, precision, threads)
    found = [rates for name, rates in read_kept(path).items() if name.startswith(prefix)]
    return {measure: max(rates[measure] for rates in found) for measure in MEASURES} if found else {}


def read_kept(path: Path) -> dict[str, dict[str, float]]:
    """Return all rates that were kept, without those that are damaged."""
    try:
        everything = strict_json.read(path)
    except (OSError, ValueError):
        return {}
    entries = everything.items() if isinstance(everything, dict) else ()
    return {name: rates for name, rates in entries if _is_whole(rates)}


def _is_whole(rates: object) -> bool:
    if not isinstance(rates, dict):
        return False
    numbers = [rates.get(measure) for measure in MEASURES]
    return all(isinstance(number, float) and PLAUSIBLE[0] <= number <= PLAUSIBLE[1] for number in numbers)


def _cpu(hardware: Hardware, product: str, threads: int, measured: Mapping[str, float]) -> Rates:
    known = constants()["cpu"]
    flops, memory, source = _of_processor(hardware, product, threads, known)
    cached = memory * known["cache_speedup"]
    passes, fresh, call = known["operand_passes"], known["fresh_seconds_per_byte"], known["call_seconds"]
    if measured:
        source = "measured here"
        flops, cached = measured["product_flops_per_second"], measured["memory_bytes_per_second"]
        memory = cached / known["cache_speedup"]
        passes = _operand_passes(flops, measured["thin_product_flops_per_second"], cached)
        fresh, call = 1 / measured["fresh_bytes_per_second"], known["call_factor"] / measured["calls_per_second"]
    return Rates(
        source=source,
        kind="cpu",
        product_flops_per_second=flops,
        memory_bytes_per_second=memory,
        call_seconds=call,
        attention_share=(known["attention_share"], known["attention_share"]),
        arithmetic=known["arithmetic"],
        operand_passes=passes,
        cache_bytes=known["cache_bytes_per_core"] * threads,
        cache_bytes_per_second=cached,
        mapped_bytes=known["mapped_bytes"],
        fresh_seconds_per_byte=fresh,
    )


def _of_processor(hardware: Hardware, product: str, threads: int, known: Mapping[str, Any]) -> tuple[float, float, str]:
    """Return FLOP/s, bytes/s of memory and their source: the table's, or by what the processor says of itself."""
    row = hardware.device
    if row is not None:
        cores = min(1.0, threads / row.multiprocessors)
        flops = row.flops_per_second[product] * known["product_share"] * cores
        return flops, row.memory_bytes_per_second * known["memory_share"], "table"
    flags = set(processor_field("flags").split())
    fastest = "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else "other"
    flops = known["default_flops_per_second_per_core"][fastest] * threads * known["product_share"]
    if product == "bf16":
        flops *= max((speedup for flag, speedup in known["default_bf16_speedup"].items() if flag in flags), default=1)
    return flops, known["default_memory_bytes_per_second"], f"default for a processor with {fastest}"


def _operand_passes(flops: float, thin_flops: float, bytes_per_second: float) -> float:
    """Return how often a product passes over its operands, from the rate of a thin one: what it takes beyond its FLOPs.

    Held between 0 and 20: a measurement next to other work may give anything.
    """
    size = PRODUCT_SIZES["cpu"]
    work, moved = 2 * THIN_ROWS * size * size, 4 * (2 * THIN_ROWS * size + size * size)
    return min(20.0, max(0.0, (work / thin_flops - work / flops) * bytes_per_second / moved))


def _cuda(hardware: Hardware, product: str, measured: Mapping[str, float]) -> Rates:
    known, row, shares = constants()["cuda"], row_of(hardware), constants()["cuda"]["attention_share"]
    share = known["product_share"][row.architecture] * (known["fp8_share"] if product == "fp8" else 1)
    # What a device has no instructions for, torch computes in fp32 where it does at all.
    flops = share * row.flops_per_second.get(product, row.flops_per_second["fp32"])
    memory, call = row.memory_bytes_per_second * known["memory_share"], known["call_seconds"]
    source = "table" if hardware.device else f"those of {row.name}, the nearest in the table"
    if measured:
        flops, memory = measured["product_flops_per_second"], measured["memory_bytes_per_second"]
        call, source = known["call_factor"] / measured["calls_per_second"], "measured here"
    return Rates(
        source=source,
        kind="cuda",
        product_flops_per_second=flops,
        memory_bytes_per_second=memory,
        call_seconds=call,
        attention_share=(shares["forward"], shares["backward"]),
        arithmetic={},
        kernel_seconds=known["kernel_seconds"],
        multiprocessors=row.multiprocessors,
        compiled_traffic=known["compiled_traffic"],
        compiled_calls=known["compiled_calls"],
    )
