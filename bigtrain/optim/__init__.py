"""Optimizers, learning-rate schedules, gradient release (in `release`), and what they cost."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PLACES = {
    "Adafactor": "adafactor",
    "AdamW": "adamw",
    "Lamb": "lamb",
    "Muon": "muon",
    "build_optimizer": "build",
    "learning_rate_factor": "schedule",
}

__all__ = ["Adafactor", "AdamW", "Lamb", "Muon", "build_optimizer", "learning_rate_factor"]


def __getattr__(name: str) -> Any:
    """Import what needs torch on first use only, so that planning does not."""
    if name in _PLACES:
        return getattr(import_module(f"bigtrain.optim.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
