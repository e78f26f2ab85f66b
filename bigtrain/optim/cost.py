"""What optimizer states weigh, in bytes. No torch."""

from __future__ import annotations

MOMENTS = {"adamw": 2, "lamb": 2}
"""Tensors of a parameter's size that an optimizer keeps for each parameter."""


def state_bytes(name: str, parameters: int, tensors: int) -> int:
    """Return the bytes of an optimizer's fp32 states for so many parameters in so many tensors.

    torch's AdamW also keeps an fp32 step count for each tensor; LAMB's is a plain number.
    """
    counters = 4 * tensors if name == "adamw" else 0
    return MOMENTS[name] * 4 * parameters + counters
