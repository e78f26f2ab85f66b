"""An engine whose model DeepSpeed trains: the same loop, the same result of a step, the same checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from bigtrain import amp, recompute
from bigtrain.amp.loss_scale import LossScale
from bigtrain.amp.precision import keep
from bigtrain.engine import Engine, Schedule, check_ranks, schedule_of
from bigtrain.errors import RecipeError
from bigtrain.placement import find_blocks, place
from bigtrain.planner.plan import Plan
from bigtrain.sharding.deepspeed import DeepSpeed, start
from bigtrain.sharding.deepspeed_config import deepspeed_config, deepspeed_faults
from bigtrain.spread import make_equal
from bigtrain.step_result import StepResult
from bigtrain.world import World, current_world

if TYPE_CHECKING:
    from bigtrain.sharding.apply import Sharded


class DeepSpeedEngine(Engine):
    """Run training steps as `Engine` does, weighted by labels as there, where DeepSpeed sums, clips and updates.

    `parameters`, and the optimizer's states of them, are there inside of `sharded.laid_out` alone.
    """

    def __init__(
        self,
        held: DeepSpeed,
        *,
        micro_batch_size: int,
        shifted_labels: bool,
        schedule: Schedule,
        loss_scale: LossScale,
        world: World,
    ) -> None:
        super().__init__(
            held.model,
            held.optimizer,
            micro_batch_size=micro_batch_size,
            shifted_labels=shifted_labels,
            schedule=schedule,
            loss_scale=loss_scale,
            sharded=cast("Sharded", held),  # of which it has what an engine asks for
            world=world,
        )
        self._held = held

    def laid_out(self, *, changed: bool = False) -> AbstractContextManager[None]:
        """Turn DeepSpeed's flat cuts into rows, as long as this lasts."""
        return self._held.laid_out(changed=changed)

    def backward(self, loss: Any) -> None:
        """Add the gradients of a micro-batch, weighted; `loss` is its mean loss or an output that has a `.loss`."""
        weighted = self._weighing.weighted(loss)
        self._held.backward(weighted, self.loss_scale.value.item() if self.loss_scale.dynamic else None)

    def _step(self, max_norm: float | None) -> StepResult:
        learning_rate, scale = self._set_learning_rate(), self.loss_scale.value.clone()
        norm, finite = self._held.step(max_norm)
        loss, _ = self._over_ranks(norm)
        self.loss_scale.update(1 - finite.float())
        return StepResult(loss, norm, finite, learning_rate, scale, parts=self._weighing.parts)


def prepare(
    model: nn.Module,
    plan: Plan,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    *,
    blocks: type[nn.Module] | Sequence[nn.Module] | None = None,
) -> DeepSpeedEngine:
    """Return an engine that trains a model as a plan for DeepSpeed says; as `bigtrain.engine.prepare` in all else.

    The order: place, precision, recompute, DeepSpeed with the optimizer in it. Raises RecipeError for what DeepSpeed
    cannot do, InputError for what `sharding.deepspeed.start` refuses.
    """
    recipe, world = plan.recipe, current_world()
    if faults := deepspeed_faults(recipe):
        raise RecipeError(*faults)
    check_ranks(plan, world)
    device = torch.device(plan.hardware.kind)
    make_equal(model, world)
    place(model, device, seed=recipe.seed, keep=partial(keep, master_weights="fp32", accumulated=False))
    amp.apply(model, recipe.amp.precision)
    if recipe.recompute.policy != "none":
        recompute.apply(find_blocks(model, blocks), recipe.recompute.policy, device=device)
    config = deepspeed_config(
        recipe,
        micro_batch_size=plan.micro_batch_size,
        accumulation_steps=plan.accumulation_steps,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        pinned=device.type == "cuda",
    )
    held = start(model, optimizer, config, kind=device.type, local_rank=world.local_rank)
    for group in held.optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return DeepSpeedEngine(
        held,
        micro_batch_size=plan.micro_batch_size,
        shifted_labels=recipe.train.objective == "clm",
        schedule=schedule_of(plan),
        loss_scale=LossScale(device, precision=recipe.amp.precision),
        world=world,
    )
