"""The rate of matrix products that this device really reaches: what MFU is taken against."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import torch

from bigtrain import products
from bigtrain.data.cache import write_json
from bigtrain.planner.hardware import Hardware

SIZES = {"cpu": 1024, "cuda": 8192}
TRIALS = 7
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def peak_flops(hardware: Hardware, precision: str, cache: Path) -> float:
    """Return the best FLOP/s of square matrix products ever measured on this device at a precision.

    Measures anew, for a fraction of a second, at each call: others share the machine, so one measurement may be far
    too low. `cache` is the folder that keeps the best.
    """
    path = cache / "rates.json"
    rates = _kept(path)
    key = f"{hardware.name} / {torch.get_num_threads()} threads / {precision} / torch {torch.__version__}"
    rate = _measure(hardware.kind, DTYPES.get(precision, torch.float32))
    if rate > rates.get(key, 0):
        rates[key] = rate
        with contextlib.suppress(OSError):  # a cache that cannot be written keeps nothing; the rate is known anyway
            write_json(path, rates)
    return float(rates[key])


def _kept(path: Path) -> dict[str, float]:
    """Return the rates that were kept; none where the file is absent or damaged, since they are measured again."""
    try:
        rates = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return rates if isinstance(rates, dict) else {}


def _measure(kind: str, dtype: torch.dtype) -> float:
    size = SIZES[kind]
    matrix = torch.ones(size, size, device=kind, dtype=dtype)
    seconds = []
    for _ in range(TRIALS):
        begin = time.perf_counter()
        product = products.mm(matrix, matrix)
        product[0, 0].item()
        seconds.append(time.perf_counter() - begin)
    if kind == "cuda":  # the peaks of a run are its own
        del matrix, product
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return 2 * size**3 / min(seconds)
