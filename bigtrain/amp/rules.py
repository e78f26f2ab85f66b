"""Which precisions a device has, which go together, and which learning rates they bear. No torch."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Literal, TypeAlias, get_args

Precision: TypeAlias = Literal["fp32", "bf16", "fp16", "fp8"]
MasterWeights: TypeAlias = Literal["fp32", "split24", "none"]
Capability: TypeAlias = "tuple[int, int]"
"""A CUDA device's compute capability, such as (8, 9)."""

NEEDED_CAPABILITY: dict[str, Capability] = {"fp32": (0, 0), "fp16": (5, 3), "bf16": (8, 0), "fp8": (8, 9)}
"""The first compute capability with instructions for it (CUDA C Programming Guide, "Compute Capabilities")."""

CPU_PRECISIONS = ("fp32", "bf16")
BF16_FRACTION_BITS = 7
"""bf16 numbers in [2^e, 2^(e+1)) are 2^(e-7) apart."""


def supported(kind: str, capability: Capability | None = None) -> tuple[str, ...]:
    """Return the precisions that a kind of device has, cpu or cuda; of unknown capability: that any such device has."""
    if kind != "cuda":
        return CPU_PRECISIONS
    return tuple(name for name, needed in NEEDED_CAPABILITY.items() if capability is None or capability >= needed)


def device_fault(precision: str, kind: str, capability: Capability | None = None) -> str | None:
    """Return why a device cannot do this precision and what it can, in one line, or None when it can.

    fp8 also needs torchao: where the device has it and the library is missing, that is the reason.
    """
    if precision not in NEEDED_CAPABILITY:
        return f"{precision!r} is none of {', '.join(get_args(Precision))}"
    can = supported(kind, capability)
    if precision not in can:
        compute = f" of compute capability {capability[0]}.{capability[1]}" if capability else ""
        device = f"a CUDA device{compute}" if kind == "cuda" else f"the {kind.upper()}"
        return f"{precision} does not run on {device}; it can {_listed(can)}"
    if precision == "fp8" and find_spec("torchao") is None:
        return "fp8 needs torchao, which is not installed; install it (pip install torchao) or use bf16"
    return None


def master_weights_fault(precision: str, master_weights: str) -> str | None:
    """Return why weights cannot be kept this way at this precision, in one line, or None when they can."""
    if master_weights not in get_args(MasterWeights):
        return f"{master_weights!r} is none of {', '.join(get_args(MasterWeights))}"
    if master_weights == "fp32" or precision == "bf16":
        return None
    return f"{master_weights} keeps weights in bf16, and amp.precision is {precision}; use fp32, or amp.precision=bf16"


def slow_rate_warning(learning_rate: float, weight_size: float, master_weights: str) -> str | None:
    """Return a warning when bf16 weights of this size are too coarse for the learning rate, with the number, or None.

    Optimizers that normalize, such as AdamW, move a weight by about the learning rate. Rounded to nearest, less than
    half the distance between two bf16 numbers moves nothing; rounded stochastically it moves the weight on average,
    but each move is a jump of the whole distance, and what is learned drowns in them.
    """
    if master_weights != "none" or not weight_size:
        return None
    smallest = smallest_move(weight_size)
    if learning_rate >= smallest:
        return None
    return (
        f"a learning rate of {learning_rate:g} is too small for bf16 weights without master weights: those of size "
        f"{weight_size:g} are {2 * smallest:.2g} apart, so it takes at least {smallest:.2g} to move one other than by "
        "chance; use amp.master_weights=split24"
    )


def smallest_move(weight_size: float) -> float:
    """Return the smallest update that moves a bf16 weight of this size when rounded to nearest: half the distance."""
    exponent = math.frexp(weight_size)[1] - 1
    return 2.0 ** (exponent - BF16_FRACTION_BITS - 1)


def _listed(names: tuple[str, ...]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
