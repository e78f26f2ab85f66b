"""What tests have in common that every device must pass: on this machine's CPU always, with `-m gpu` on CUDA too."""

from __future__ import annotations

from typing import Any

import pytest
from small_run import hardware_of

ON_CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
ON_DEVICES = pytest.mark.parametrize("device", ["cpu", ON_CUDA])
COMPILED_TOO = pytest.mark.parametrize(
    ("device", "compiled"),
    [
        pytest.param("cpu", False, id="cpu"),
        pytest.param("cuda", False, marks=pytest.mark.gpu, id="cuda"),
        pytest.param("cuda", True, marks=pytest.mark.gpu, id="cuda-compiled"),
    ],
)
"""On the CPU compiling takes minutes, and tests/test_same_run.py holds it."""

COMPILER_WARNS = pytest.mark.filterwarnings("ignore")  # of what it does itself

FAMILIES = ("bert", "gpt", "llama")
FEW_STEPS = 6
MECHANISMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped by nothing": {"clip": None},
    "accumulated": {"micro": 4},
    "bf16": {"precision": "bf16"},
    "split24": {"precision": "bf16", "master_weights": "split24"},
    "no master weights": {"precision": "bf16", "master_weights": "none"},
    "bf16 state": {"state": "bf16"},
    "8bit state": {"state": "8bit"},
    "4bit state": {"state": "4bit"},
    "released": {"released": True},
    "lamb": {"optimizer": "lamb"},
    "muon": {"optimizer": "muon"},
    "adafactor": {"optimizer": "adafactor"},
    "selective": {"policy": "selective", "precision": "bf16"},
    "full": {"policy": "full", "precision": "bf16"},
    "all": {"policy": "full", "precision": "bf16", "master_weights": "split24", "state": "8bit", "released": True},
}


def cases(names: Any, *, on_cpu: tuple[str, ...] = ()) -> list[Any]:
    """Return the cases of a test: each of the names on CUDA, some also on the CPU, where other tests hold the rest."""
    on_cuda = [pytest.param(name, "cuda", marks=pytest.mark.gpu, id=f"{name}-cuda") for name in names]
    return [*(pytest.param(name, "cpu", id=f"{name}-cpu") for name in on_cpu), *on_cuda]


def small(device: str, **choices: Any) -> dict[str, Any]:
    """Return the choices of a run: on a GPU large enough that its kernels are those of real models."""
    shape = {"width": 512, "length": 256, "learning_rate": 1e-3} if device == "cuda" else {}
    # A kernel attends to all documents where attention drops nothing, and in few bits.
    return {**shape, "attention_dropout": 0.0, "device": hardware_of(device), **choices}
