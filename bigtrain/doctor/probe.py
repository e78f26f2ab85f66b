"""What torch says of itself and of its devices, and how fast it multiplies: asked in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bigtrain.data.ensure import child_environment
from bigtrain.planner.hardware import Hardware, this_machine

SECONDS = 2.0
"""How long products are multiplied without a pause."""


class Probe(NamedTuple):
    """What torch says: `cuda` and `nccl` are versions that it was built with, None without; rates are FLOP/s.

    `sees_gpu` is whether it can use one, `varlen` whether it has attention over documents of different lengths in one
    kernel. `best` are the highest rates of products that were ever measured here, by precision; `lasting` is the one of
    `precision` over SECONDS, which is how long it was taken.
    """

    cuda: str | None
    nccl: str | None
    sees_gpu: bool
    varlen: bool
    best: dict[str, float]
    precision: str
    lasting: float


def ask_torch(cache: Path) -> Probe | str:
    """Return what a new process finds, or the last line of what it died of. `cache` keeps the best rates."""
    command = [sys.executable, "-P", "-m", "bigtrain.doctor.probe", str(cache)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=child_environment())
    if ran.returncode:
        return next(reversed(ran.stderr.strip().splitlines()), f"ended with exit code {ran.returncode}")
    return Probe(**json.loads(ran.stdout.splitlines()[-1]))


def look(cache: Path, seconds: float = SECONDS) -> Probe:
    """Look from inside, with torch."""
    import torch

    from bigtrain.models.attention import varlen_available
    from bigtrain.training.peak import peak_flops

    here, sees_gpu = this_machine(), torch.cuda.is_available()
    if here.kind == "cuda" and not sees_gpu:
        return Probe(torch.version.cuda, None, False, False, {}, "", 0.0)
    best = {precision: peak_flops(here, precision, cache) for precision in ("fp32", "bf16")}
    precision = max(best, key=lambda name: best[name])
    device = torch.device(here.kind)
    lasting = lasting_flops(_product(here, precision), seconds)
    return Probe(torch.version.cuda, _nccl(sees_gpu), sees_gpu, varlen_available(device), best, precision, lasting)


def lasting_flops(product: tuple[Callable[[], object], float], seconds: float) -> float:
    """Return the FLOP/s of a product, which has so many, over some seconds."""
    multiply, flops = product
    multiply()
    count, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds or not count:
        multiply()
        count += 1
    return count * flops / elapsed if elapsed else flops


def _product(here: Hardware, precision: str) -> tuple[Callable[[], object], float]:
    import torch

    from bigtrain import products
    from bigtrain.planner.rates import PRODUCT_SIZES

    size = PRODUCT_SIZES[here.kind]
    matrix = torch.ones(size, size, device=here.kind, dtype={"bf16": torch.bfloat16}.get(precision, torch.float32))

    def multiply() -> object:
        return products.mm(matrix, matrix)[0, 0].item()

    return multiply, 2.0 * size**3


def _nccl(sees_gpu: bool) -> str | None:
    import torch

    if not sees_gpu or not torch.distributed.is_nccl_available():
        return None
    nccl: Any = torch.cuda.nccl
    return ".".join(map(str, nccl.version()))


if __name__ == "__main__":
    print(json.dumps(look(Path(sys.argv[1]))._asdict()))
