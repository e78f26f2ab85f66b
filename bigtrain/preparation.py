"""prepare() for either engine: bigtrain's own, on torch's `fully_shard`, or DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn
from torch.optim import Optimizer

from bigtrain import engine
from bigtrain.engine import Engine
from bigtrain.planner.plan import Plan


def prepare(
    model: nn.Module,
    plan: Plan,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    *,
    blocks: type[nn.Module] | Sequence[nn.Module] | None = None,
) -> Engine:
    """Return an engine that trains a model as a plan says, with the library that its `sharding.engine` names.

    Arguments, order and errors are those of `bigtrain.engine.prepare`, for DeepSpeed of
    `bigtrain.deepspeed_engine.prepare`.
    """
    if plan.recipe.sharding.engine == "deepspeed":
        from bigtrain import deepspeed_engine  # imports a library that need not be there

        return deepspeed_engine.prepare(model, plan, optimizer, blocks=blocks)
    return engine.prepare(model, plan, optimizer, blocks=blocks)
