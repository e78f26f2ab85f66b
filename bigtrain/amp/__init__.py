"""Mixed precision: in which type matrix products run, and what weights, gradients and states are kept in."""

from __future__ import annotations

from typing import Any

__all__ = ["apply", "autocast"]


def __getattr__(name: str) -> Any:
    """Import what needs torch on first use only, so that planning does not."""
    if name in __all__:
        from bigtrain.amp import precision

        return getattr(precision, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
