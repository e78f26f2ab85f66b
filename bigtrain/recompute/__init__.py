"""Activation recomputation: what each block keeps for the backward pass, and what it computes again instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bigtrain.recompute.policy import POLICIES, resolve

if TYPE_CHECKING:
    from bigtrain.recompute.blocks import apply

__all__ = ["POLICIES", "apply", "resolve"]


def __getattr__(name: str) -> Any:
    """Import what needs torch on first use only, so that planning does not."""
    if name == "apply":
        from bigtrain.recompute.blocks import apply

        return apply
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
