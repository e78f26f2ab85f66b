"""Optimizers, learning-rate schedules, and what they cost."""

from __future__ import annotations

from typing import Any

__all__ = ["Lamb", "build_optimizer", "learning_rate_factor"]


def __getattr__(name: str) -> Any:
    """Import what needs torch on first use only, so that planning does not."""
    if name == "build_optimizer":
        from bigtrain.optim.build import build_optimizer

        return build_optimizer
    if name == "Lamb":
        from bigtrain.optim.lamb import Lamb

        return Lamb
    if name == "learning_rate_factor":
        from bigtrain.optim.schedule import learning_rate_factor

        return learning_rate_factor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
