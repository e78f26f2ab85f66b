"""Mixed precision: in which type modules compute, and what weights and gradients are kept in."""

from __future__ import annotations

from typing import Any

__all__ = ["LossScale", "apply"]


def __getattr__(name: str) -> Any:
    """Import what needs torch on first use only, so that planning does not."""
    if name == "apply":
        from bigtrain.amp.precision import apply

        return apply
    if name == "LossScale":
        from bigtrain.amp.loss_scale import LossScale

        return LossScale
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
