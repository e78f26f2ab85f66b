"""From a recipe's optimizer section to an optimizer over the parameters of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from bigtrain.config.schema import OptimizerSection
from bigtrain.optim.lamb import Lamb


def build_optimizer(parameters: Iterable[nn.Parameter], section: OptimizerSection) -> Optimizer:
    """Return the optimizer that a recipe names, at its peak learning rate.

    AdamW is torch's fused one, on the CPU too: one pass over memory for each tensor.
    """
    groups = weight_decay_groups(parameters, section.weight_decay)
    betas = (section.betas[0], section.betas[1])
    if section.name == "adamw":
        return torch.optim.AdamW(groups, lr=section.learning_rate, betas=betas, eps=section.eps, fused=True)
    assert section.name == "lamb", section.name
    return Lamb(groups, lr=section.learning_rate, betas=betas, eps=section.eps)


def weight_decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups: matrices, which decay, and biases and normalization weights, which do not.

    The second kind are the tensors of fewer than two dims.
    """
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
