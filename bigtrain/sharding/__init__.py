"""Sharding: which rank holds which part of weights, gradients and optimizer states."""

from __future__ import annotations

from typing import Any

__all__ = ["Sharded", "hand_over_gradients", "local_parameters", "shard"]


def __getattr__(name: str) -> Any:
    """Import what needs torch on first use only, so that planning does not."""
    if name in __all__:
        from bigtrain.sharding import apply

        return getattr(apply, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
