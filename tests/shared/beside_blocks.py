"""What a call holds beside the room in which oneDNN's low-precision products arrange blocks of their operands.

It is there on processors with bf16 instructions only, and its size follows from their caches, their instructions, the
threads and the version of oneDNN (src/cpu/x64/matmul/amx_blocking_heuristics.cpp): no price names it.
"""

from __future__ import annotations

from collections.abc import Callable

from bigtrain.memory.measure import Allocation, Trace, record
from bigtrain.memory.report import Timeline
from bigtrain.processor import has_slow_bf16

PRODUCTS = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
}
"""What runs products of oneDNN; all other room in them is that of a tensor, which an operation inside makes."""


def measure_beside_blocks(run: Callable[[], object]) -> Timeline:
    """Return what a call allocates and releases on the CPU, without that room where the processor has it."""
    return record_beside_blocks(run).timeline


def record_beside_blocks(run: Callable[[], object], *, device: str = "cpu") -> Trace:
    """Record a call as `bigtrain.memory.measure.record` does, without that room where the processor has it."""
    trace = record(run, device=device)
    if device != "cpu" or has_slow_bf16():
        return trace
    kept = [index for index, found in enumerate(trace.allocations) if not _is_room(found)]
    number = {index: new for new, index in enumerate(kept)}
    events = [
        number[event] if event >= 0 else ~number[~event] for event in trace.events if max(event, ~event) in number
    ]
    return Trace([trace.allocations[index] for index in kept], events, trace.operations)


def _is_room(found: Allocation) -> bool:
    """Tell whether a product allocated this itself and let go of it before its end."""
    product = found.operation
    return (
        product is not None and product.name in PRODUCTS and found.end_ns is not None and found.end_ns <= product.end_ns
    )
