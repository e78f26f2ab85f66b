"""The rates that this device really reaches: what MFU is taken against, and what `bigtrain plan` predicts from."""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bigtrain import products
from bigtrain.data.cache import write_json
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.rates import KEPT_FILE, MEASURES, PRODUCT_SIZES, THIN_ROWS, key, read_kept

TRIALS = 7

CLOCK = time.perf_counter
"""What is timed with; a benchmark beside other work counts the seconds of its own thread instead."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}

ADDED_BYTES = {"cpu": 6 * 2**20, "cuda": 256 * 2**20}
"""Bytes of each of the two tensors whose sum measures bandwidth: on the CPU all buffers stay below 13 MiB together,
since the run's resident peak is compared with the prediction."""

SEED = 1

FRESH_BYTES = 8 * 2**20
CALLS = 200


def peak_flops(hardware: Hardware, precision: str, cache: Path) -> float:
    """Return the best FLOP/s of square matrix products ever measured on this device at a precision.

    Measures anew, for a fraction of a second, at each call, with all that a prediction of speed needs: others share the
    machine, so one measurement may be far too low. `cache` is the folder that keeps the best of each. Where bf16
    products run in fp32, their operands widened, both are measured: predictions count the widening themselves.
    """
    best = _best(hardware, precision, cache)
    if precision == "bf16" and hardware.kind == "cpu" and hardware.slow_bf16:
        _best(hardware, "fp32", cache)
    return best["product_flops_per_second"]


def _best(hardware: Hardware, precision: str, cache: Path) -> dict[str, float]:
    """Measure, and keep the best."""
    path = cache / KEPT_FILE
    rates = read_kept(path)
    name = key(hardware, precision, torch.get_num_threads(), torch.__version__)
    now, before = measure(hardware.kind, precision), rates.get(name, {})
    best = {measured: max(now[measured], before.get(measured, 0.0)) for measured in MEASURES}
    if best != before:
        rates[name] = best
        with contextlib.suppress(OSError):  # a cache that cannot be written keeps nothing; the rates are known anyway
            write_json(path, rates)
    return best


def measure(kind: str, precision: str) -> dict[str, float]:
    """Return the rates of this moment on a kind of device, cpu or cuda."""
    dtype, size = DTYPES.get(precision, torch.float32), PRODUCT_SIZES[kind]
    found = dict(
        zip(
            MEASURES,
            (_products(kind, dtype, size, size), _products(kind, dtype, THIN_ROWS, size), *_memory(kind)),
            strict=True,
        )
    )
    if kind == "cuda":  # the peaks of a run are its own
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return found


def _products(kind: str, dtype: torch.dtype, rows: int, size: int) -> float:
    """Return the FLOP/s of (rows, size) by (size, size)."""
    fill = _drawn if kind == "cuda" else _ones
    left = fill(kind, dtype, rows, size)
    right = left if rows == size else fill(kind, dtype, size, size)

    def multiply() -> None:
        products.mm(left, right)[0, 0].item()

    return 2 * rows * size**2 / _least_seconds(multiply)


def _ones(kind: str, dtype: torch.dtype, rows: int, size: int) -> torch.Tensor:
    return torch.ones(rows, size, device=kind, dtype=dtype)


def _drawn(kind: str, dtype: torch.dtype, rows: int, size: int) -> torch.Tensor:
    """Return normal numbers: a GPU draws less power for constant ones, and is faster than it ever is in training.

    They come from a generator of their own, so that training draws what it would without.
    """
    generator = torch.Generator(device=kind).manual_seed(SEED)
    return torch.randn(rows, size, device=kind, dtype=dtype, generator=generator)


def _memory(kind: str) -> tuple[float, float, float]:
    """Return bytes/s of a sum in place, bytes/s at which new memory is had, and calls/s of a tiny operation."""
    return _sums(kind), _fresh(), _calls(kind)


def _sums(kind: str) -> float:
    first, second = (torch.ones(ADDED_BYTES[kind] // 4, device=kind) for _ in range(2))

    def add() -> None:
        first.add_(second)
        if kind == "cuda":
            first[0].item()

    return 3 * ADDED_BYTES[kind] / _least_seconds(add)


def _fresh() -> float:
    """Return the bytes/s at which the system hands out pages, beyond what writing to them takes."""

    def fill(buffer: mmap.mmap) -> float:
        tensor = torch.frombuffer(buffer, dtype=torch.uint8)
        begin = CLOCK()
        tensor.fill_(1)
        return CLOCK() - begin

    least = []
    for _ in range(TRIALS):
        with mmap.mmap(-1, FRESH_BYTES) as buffer:
            if hasattr(mmap, "MADV_HUGEPAGE"):  # as torch asks for its tensors in a run
                buffer.madvise(mmap.MADV_HUGEPAGE)
            least.append((fill(buffer), fill(buffer)))
    first, again = (min(seconds) for seconds in zip(*least, strict=True))
    return float(FRESH_BYTES / max(first - again, 1e-9))


def _calls(kind: str) -> float:
    tiny = torch.ones(4, device=kind)

    def call() -> None:
        for _ in range(CALLS):
            tiny.add(tiny)
        if kind == "cuda":
            torch.cuda.synchronize()

    return CALLS / _least_seconds(call)


def _least_seconds(run: Callable[[], None]) -> float:
    seconds = []
    for _ in range(TRIALS):
        begin = CLOCK()
        run()
        seconds.append(CLOCK() - begin)
    return max(min(seconds), 1e-9)
