"""From a recipe's optimizer section to an optimizer over the parameters of a model."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from bigtrain.config.schema import OptimizerSection
from bigtrain.errors import InputError
from bigtrain.optim.adafactor import Adafactor
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.cost import check
from bigtrain.optim.kernels import nvidia_apex_present
from bigtrain.optim.lamb import Lamb, fused_lamb
from bigtrain.optim.muon import Muon


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    section: OptimizerSection,
    *,
    master_weights: str = "fp32",
    matrices: Collection[Tensor] | None = None,
    sharded: bool = False,
) -> Optimizer:
    """Return the optimizer that a recipe names, at its peak learning rate.

    `master_weights` is `amp.master_weights`; the parameters already have its dtype. `matrices` are those that Muon
    orthogonalises: the matrices of the repeated blocks. Without it Muon takes all of two dims; embeddings and heads,
    which an optimizer cannot tell from others, should be kept out by giving it. Plain fp32 LAMB on CUDA is NVIDIA
    apex's where that is installed, unless the parameters are `sharded`, this rank's rows of them. Adafactor has no use
    for `betas` and `eps`.

    Raises InputError for a combination that does not exist, before anything is made.
    """
    check(section.name, section.state, master_weights)
    trained = [p for p in parameters if p.requires_grad]
    groups = weight_decay_groups(trained, section.weight_decay)
    formats: dict[str, Any] = {"state": section.state, "master_weights": master_weights}
    options: dict[str, Any] = {"lr": section.learning_rate, "betas": tuple(section.betas), "eps": section.eps}
    if section.name == "adafactor":
        return Adafactor(groups, section.learning_rate, section.weight_decay, master_weights=master_weights)
    if section.name == "muon":
        return Muon(_muon_groups(trained, section.weight_decay, matrices), **options, **formats)
    if section.name == "adamw":
        return AdamW(groups, **options, **formats)
    if section.state == master_weights == "fp32" and not sharded and _suits_apex(trained):
        return fused_lamb(groups, **options)
    return Lamb(groups, **options, **formats)


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


def _muon_groups(
    trained: list[nn.Parameter], weight_decay: float, matrices: Collection[Tensor] | None
) -> list[dict[str, Any]]:
    chosen = {id(p) for p in (trained if matrices is None else matrices) if p.ndim == 2}
    orthogonal = [p for p in trained if id(p) in chosen]
    if not orthogonal:
        raise InputError("optimizer.name: muon: the model has no matrix for it among its blocks; use adamw")
    rest = weight_decay_groups([p for p in trained if id(p) not in chosen], weight_decay)
    return [{"params": orthogonal, "weight_decay": weight_decay, "orthogonal": True}, *rest]


def _suits_apex(trained: list[nn.Parameter]) -> bool:
    on_gpu = all(p.is_cuda and p.dtype.itemsize == 4 for p in trained)
    return bool(trained) and on_gpu and nvidia_apex_present()
