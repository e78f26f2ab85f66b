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
    """Return the measured FLOP/s of square matrix products at a precision, measured once per device and torch.

    `cache` is the folder that keeps the figure. The best of a few trials is taken, since others share the machine.
    """
    path = cache / "rates.json"
    rates = json.loads(path.read_text()) if path.is_file() else {}
    key = f"{hardware.name} / {torch.get_num_threads()} threads / {precision} / torch {torch.__version__}"
    if key not in rates:
        rates[key] = _measure(hardware.kind, torch.bfloat16 if precision == "bf16" else torch.float32)
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
