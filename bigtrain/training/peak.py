"""The rate of matrix products that this device really reaches: what MFU is taken against."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch

from bigtrain.planner.hardware import Hardware

SIZES = {"cpu": 1024, "cuda": 8192}
TRIALS = 7


def peak_flops(hardware: Hardware, precision: str, cache: Path) -> float:
    """Return the best FLOP/s of square matrix products ever measured on this device at a precision.

    Measures anew, for a fraction of a second, at each call: others share the machine, so one measurement may be far
    too low. `cache` is the folder that keeps the best.
    """
    path = cache / "rates.json"
    rates = json.loads(path.read_text()) if path.is_file() else {}
    key = f"{hardware.name} / {torch.get_num_threads()} threads / {precision} / torch {torch.__version__}"
    rate = _measure(hardware.kind, torch.bfloat16 if precision == "bf16" else torch.float32)
    if rate > rates.get(key, 0):
        rates[key] = rate
        cache.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(rates, indent=1))
        aside.replace(path)
    return float(rates[key])


def _measure(kind: str, dtype: torch.dtype) -> float:
    size = SIZES[kind]
    matrix = torch.ones(size, size, device=kind, dtype=dtype)
    seconds = []
    for _ in range(TRIALS):
        begin = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)
