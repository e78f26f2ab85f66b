"""What weights, master weights and gradients weigh, in bytes. No torch.

Low-precision copies of fp32 weights are not here: each lives only while its module computes.
"""

from __future__ import annotations

WEIGHT_BYTES = {"fp32": 4, "split24": 2, "none": 2}
"""Bytes of each parameter itself, by how master weights are kept."""

REMAINDER_BYTES = {"fp32": 0, "split24": 1, "none": 0}
"""Bytes of each parameter beside it: the low 8 of its 24 bits, which lie in the optimizer's state."""


def weight_bytes(parameters: int, master_weights: str = "fp32") -> int:
    """Return the bytes of so many parameters."""
    return WEIGHT_BYTES[master_weights] * parameters


def master_weight_bytes(parameters: int, master_weights: str = "fp32") -> int:
    """Return the bytes that master weights take beside the parameters: none where those are fp32 themselves."""
    return REMAINDER_BYTES[master_weights] * parameters


def gradient_bytes(parameters: int, master_weights: str = "fp32", *, accumulated: bool = False) -> int:
    """Return the bytes of so many parameters' gradients; `accumulated` over several micro-batches they are fp32."""
    return (4 if accumulated else WEIGHT_BYTES[master_weights]) * parameters
