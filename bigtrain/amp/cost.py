"""What weights and gradients weigh, in bytes. No torch."""

from __future__ import annotations

WEIGHT_BYTES = 4
"""Weights are kept in fp32 at every precision of this version; bf16 copies exist during a step only."""

GRADIENT_BYTES = 4


def weight_bytes(parameters: int) -> int:
    """Return the bytes of so many weights."""
    return WEIGHT_BYTES * parameters


def gradient_bytes(parameters: int) -> int:
    """Return the bytes of the gradients of so many weights."""
    return GRADIENT_BYTES * parameters
