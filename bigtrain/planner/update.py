"""What an optimizer step has to do: the norm of the gradients, clipping, and the update itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from bigtrain.amp.cost import weight_bytes
from bigtrain.models.operations_cost import FLOAT
from bigtrain.optim.cost import PIECE_ELEMENTS, moment_bytes
from bigtrain.planner.roofline import NOTHING, Roofline, Work

NEWTON_SCHULZ_STEPS = 5
"""Of Muon's iteration, as in `optim/muon.py`."""

PIECE_CALLS = {"fp32": 12, "bf16": 24, "8bit": 40, "4bit": 48}
"""Operations on a piece of a parameter, by the format of the moments: what a GPU runs as kernels one by one."""

SMALL_OPERATION = 0.2
"""What an operation without autograd and modules takes, of a call."""

TENSOR_CALLS = 0.5
"""Calls' worth of Python for each tensor that is scaled, added to or updated: many go through one call of Python."""

PIECE_PASSES = {"fp32": 12, "bf16": 24, "8bit": 36, "4bit": 44}
"""Passes of such a piece over fp32 numbers, read or written, in work buffers that a GPU's cache mostly holds."""


def clip(run: Roofline, parameters: int, tensors: int, gradient_bytes: int, *, clipped: bool) -> Work:
    """Take the gradients' norm, and scale them where they are clipped."""
    norm = run.pointwise(parameters, gradient_bytes, 0)
    scaled = run.pointwise(parameters, gradient_bytes, gradient_bytes, in_place=True) if clipped else NOTHING
    several = 1 if run.rates.kind == "cuda" else tensors
    return norm + scaled + Work(0.0, TENSOR_CALLS * several * (2 if clipped else 1))


def add(run: Roofline, parameters: int, tensors: int, made_bytes: int) -> Work:
    """Add a further micro-batch's gradients, of so many bytes a number, to those in fp32."""
    return run.pointwise(parameters, FLOAT + made_bytes, FLOAT, in_place=True) + Work(0.0, TENSOR_CALLS * tensors)


def copy(run: Roofline, parameters: int, tensors: int, from_bytes: int, to_bytes: int) -> Work:
    """Copy all parameters or gradients between their own tensors and the one that is sent."""
    return run.pointwise(parameters, from_bytes, to_bytes, in_place=True) + Work(0.0, TENSOR_CALLS * tensors)


def update(
    run: Roofline,
    name: str,
    state: str,
    master_weights: str,
    shapes: Mapping[str, Sequence[int]],
    *,
    gradient_bytes: int,
    share: float = 1.0,
) -> Work:
    """Change the weights: this rank's `share` of them, of parameters of these shapes by name."""
    elements = sum(map(math.prod, shapes.values()))
    moments = (1 if name == "muon" else 0 if name == "adafactor" else 2) * moment_bytes(state, elements) / elements
    weight = weight_bytes(1, master_weights) + (master_weights == "split24")
    work = run.pointwise(elements, gradient_bytes + weight + moments, weight + moments, in_place=True)
    arithmetic = _arithmetic(run, name, state, master_weights) * elements
    fused = (name, state, master_weights) == ("adamw", "fp32", "fp32")
    if run.rates.kind == "cpu":
        each = TENSOR_CALLS if fused else SMALL_OPERATION * PIECE_CALLS[state]
        work = Work(max(work.seconds, arithmetic), each * len(shapes))
    elif not fused:
        work = work + _pieces(run, state, shapes)
    if name == "muon":
        work = work + _orthogonalise(run, shapes)
    return work * share


def _arithmetic(run: Roofline, name: str, state: str, master_weights: str) -> float:
    """Return seconds for each parameter."""
    known = run.rates.arithmetic
    rounding = {"split24": "split24", "none": "no master weights"}.get(master_weights, "")
    return (known.get(f"{name} {state}", 0.0) + known.get(rounding, 0.0)) / run.rates.product_flops_per_second


def _pieces(run: Roofline, state: str, shapes: Mapping[str, Sequence[int]]) -> Work:
    """Run kernel after kernel on a piece after another, as every optimizer but fused AdamW does on a GPU."""
    pieces = sum(-(-math.prod(shape) // PIECE_ELEMENTS["cuda"]) for shape in shapes.values())
    elements = sum(map(math.prod, shapes.values()))
    moved = run.pointwise(elements, FLOAT * PIECE_PASSES[state] / 2, 0)
    calls = pieces * PIECE_CALLS[state]
    return moved + Work(calls * run.rates.kernel_seconds, calls)


def _orthogonalise(run: Roofline, shapes: Mapping[str, Sequence[int]]) -> Work:
    """Iterate on the blocks' matrices: two products of the short with the long side and one of the short, each time."""
    work, number = NOTHING, FLOAT if run.rates.kind == "cpu" else 2
    for name, shape in shapes.items():
        if len(shape) == 2 and name.startswith("blocks."):
            short, long = sorted(shape)
            once = run.product(short, long, short, operand_bytes=number, result_bytes=0)
            once += run.product(short, short, short, operand_bytes=number, result_bytes=0)
            once += run.product(short, short, long, operand_bytes=number, result_bytes=0)
            work += once * NEWTON_SCHULZ_STEPS
    return work
