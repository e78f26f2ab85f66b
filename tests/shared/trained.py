"""Small runs in this process, and what they logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bigtrain
from bigtrain.training.metrics import read_metrics

RELEASED = ("optimizer.gradient_release=true", "train.max_grad_norm=null", "train.micro_batch_size=8")


def train(recipe: Path, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    bigtrain.train(bigtrain.plan(bigtrain.load_recipe(recipe, list(overrides))), folder)
    return read_metrics(folder)


def losses(rows: list[dict[str, Any]]) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows if "loss" in row}
