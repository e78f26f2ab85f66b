"""prepare() and Engine: everything that happens to a model between its class and its training step, in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bigtrain import amp, recompute, spread
from bigtrain.amp.loss_scale import LossScale
from bigtrain.amp.precision import keep
from bigtrain.batch import Batch
from bigtrain.errors import InputError, NonFiniteGradient
from bigtrain.feed import Feed
from bigtrain.optim.release import Release, global_norm, release
from bigtrain.optim.schedule import learning_rate_factor, warmup_step_count
from bigtrain.placement import find_blocks, place
from bigtrain.planner.plan import Plan
from bigtrain.sharding.part import Part
from bigtrain.sharding.tensor import TensorShared
from bigtrain.static_shapes import StaticShapes, static_shapes
from bigtrain.step_result import StepResult
from bigtrain.weighing import Weighing
from bigtrain.world import ALONE, World, current_world

if TYPE_CHECKING:
    from bigtrain.sharding.apply import Sharded

Schedule = Callable[[int], float]


class Engine:
    """Run training steps: cut a batch into micro-batches, weigh their gradients, clip, update.

    Micro-batches count by their share of the batch's labelled tokens, so the size of a micro-batch does not change
    what is computed; nor does the number of ranks. `steps_taken` counts optimizer steps, skipped ones included. With
    gradient release the update happens inside `backward`. On several ranks all call everything equally often. A step
    of a loss above `highest_loss` changes nothing either, except with gradient release.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        micro_batch_size: int,
        shifted_labels: bool,
        schedule: Schedule,
        loss_scale: LossScale,
        release: Release | None = None,
        sharded: Sharded | None = None,
        shared: TensorShared | None = None,
        world: World = ALONE,
        shapes: StaticShapes | None = None,
    ) -> None:
        self.model = model
        self.world = world
        self.sharded = sharded
        self.spread = spread.Spread(model, world, shared, sharded)
        self.optimizer = optimizer
        self.loss_scale = loss_scale
        self.device = loss_scale.value.device
        self.steps_taken, self.highest_loss = 0, math.inf
        self._micro_batch_size = micro_batch_size
        self._weighing = Weighing(self.device, world, shifted_labels=shifted_labels)
        self._schedule = schedule
        self._feed = Feed(self.device, shapes)
        self._release = release

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what the optimizer holds, by name: this rank's part of each parameter, a plain tensor."""
        return self.spread.parameters

    @property
    def parts(self) -> dict[str, Part]:
        """Return which part of each parameter that is."""
        return self.spread.parts

    @property
    def shards(self) -> int:
        """Return how many ranks have the model between them."""
        return self.spread.shards

    @property
    def shard_rank(self) -> int:
        """Return which of them this rank is."""
        return self.spread.shard_rank

    @property
    def writes(self) -> bool:
        """Tell whether this rank writes its parts down: the first of those that have the same ones does."""
        return self.world.rank < self.shards

    def laid_out(self, *, changed: bool = False) -> AbstractContextManager[None]:
        """Have parameters and states as `parts` say, as only DeepSpeed has not; `changed`: they will be changed."""
        return nullcontext()

    def micro_batches(self, batch: Batch) -> Iterator[Batch]:
        """Yield what each forward pass gets, on the model's device; packed rows come out as one flat row.

        That has no padding; where a recipe's shapes are static, on CUDA, it is filled with documents without a label.
        `batch` holds this rank's rows in host memory. Micro-batches that have no label on any rank are left out.
        Raises DataError if no row has one.
        """
        for rows, last in self._weighing.cut(batch, self._micro_batch_size):
            if self.sharded is not None:
                self.sharded.before_micro_batch(last=last)
            yield self._feed.bring(rows)

    def backward(self, loss: Any) -> None:
        """Add the gradients of a micro-batch, weighted; `loss` is its mean loss or an output that has a `.loss`.

        `PairLosses` count each by its own weight. With gradient release this updates the weights; a loss that is not
        finite changes none.
        """
        weighted = self._weighing.weighted(loss)
        if self._release is not None:
            self._set_learning_rate()
            if not self._may_update(self._agreed(torch.isfinite(self._weighing.loss))):
                return
        torch.autograd.backward(self.loss_scale.scale(weighted))

    def step(self, max_norm: float | None = 1.0) -> StepResult:
        """Clip the gradients to a global norm (None: do not), update the weights and clear the gradients.

        A step whose loss or gradient is not finite changes no weight and no optimizer state. Raises InputError for
        clipping with gradient release: the weights are updated before the norm is known. Raises NonFiniteGradient where
        gradient release has updated some weights before a gradient turned out not to be finite.
        """
        result = self._step(max_norm) if self._release is None else self._finish_release(self._release, max_norm)
        self._weighing.restart()
        self.steps_taken += 1
        return result

    def _step(self, max_norm: float | None) -> StepResult:
        learning_rate, scale = self._set_learning_rate(), self.loss_scale.value.clone()
        if self.sharded is not None:
            self.sharded.hand_over()
        found = {name: p for name, p in self.parameters.items() if p.grad is not None}
        parameters, gradients = list(found.values()), [p.grad for p in found.values() if p.grad is not None]
        overflow = self.loss_scale.unscale_(gradients)
        norm = global_norm(gradients, self.device, [self.spread.copies(name) for name in found])
        loss, norm = self._over_ranks(norm)
        finite = torch.isfinite(norm) & torch.isfinite(loss) & (overflow == 0)
        wanted = finite & (loss <= self.highest_loss)
        if self._may_update(wanted):
            if max_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
            self.optimizer.step()
        self.loss_scale.update(1 - finite.float())
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, norm, wanted, learning_rate, scale, parts=self._weighing.parts)

    def _over_ranks(self, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and the global norm (fp32) from this rank's share of the loss and norm of its gradients."""
        if self.world.size == 1:
            return self._weighing.loss, norm
        square = norm.double().square() / self.spread.replicate
        sums = self.world.all_reduce(torch.stack([*self._weighing.share_of_losses(), square]), "SUM")
        return self._weighing.set_losses(sums[:-1]), sums[-1].sqrt().float()

    def _agreed(self, finite: Tensor) -> Tensor:
        """Return whether something is so on all ranks."""
        return finite if self.world.size == 1 else self.world.all_reduce(finite.float(), "MIN") > 0

    def _may_update(self, finite: Tensor) -> bool:
        """Tell whether to call the optimizer; on a GPU ours is told on the device instead, and nobody waits."""
        if self.device.type == "cuda" and hasattr(self.optimizer, "found_inf"):
            self.optimizer.found_inf = 1 - finite.float()
            return True
        return bool(finite)

    def _finish_release(self, release: Release, max_norm: float | None) -> StepResult:
        if max_norm is not None:
            raise InputError(f"a global norm of {max_norm:g} with gradient release: {CLIPPED_RELEASE}")
        copies = [self.spread.copies(name) for name in self.parameters]
        loss, norm = self._over_ranks(release.take_norm(copies))
        finite = torch.isfinite(loss)
        if bool(finite & ~torch.isfinite(norm)):
            raise NonFiniteGradient(
                f"step {self.steps_taken + 1}: a gradient was not finite, and gradient release had updated other "
                "weights by then; go on from a checkpoint, with optimizer.gradient_release=false to skip such steps"
            )
        rate, parts = self._set_learning_rate(), self._weighing.parts
        return StepResult(loss, norm, finite, rate, self.loss_scale.value, parts=parts)

    def _set_learning_rate(self) -> float:
        factor = self._schedule(self.steps_taken)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        return float(self.optimizer.param_groups[0]["lr"])


CLIPPED_RELEASE = (
    "clipping needs the norm of all gradients before the first update; use train.max_grad_norm=null, or "
    "optimizer.gradient_release=false"
)


def prepare(
    model: nn.Module,
    plan: Plan,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    *,
    blocks: type[nn.Module] | Sequence[nn.Module] | None = None,
    world: World | None = None,
) -> Engine:
    """Return an engine that trains a model as a plan says, on the ranks of a `world` or those that were joined.

    `optimizer` is called with the parameters once they are where they will stay: on several ranks with this rank's part
    of each, plain tensors in the order of the model's parameters. `blocks` are the model's repeated blocks or their
    class; without it, the members of the longest ModuleList are taken. A model on the meta device is initialised here.
    The order: place, share products, precision, recompute, compile, shard, optimizer, offload, gradient release.
    Raises InputError for a model that has no blocks where the plan needs them, a policy list of another length, a plan
    for other ranks than these, and an optimizer that cannot keep master weights as the plan says.
    """
    recipe, world = plan.recipe, world or current_world()
    check_ranks(plan, world)
    device = torch.device(plan.hardware.kind)
    weights, accumulated = recipe.amp.master_weights, plan.accumulation_steps > 1
    mesh, shapes = spread.mesh_of(plan), static_shapes(plan)
    in_parts = find_blocks(model, blocks) if mesh is not None else ()
    rounds = partial(keep, master_weights=weights, accumulated=accumulated)
    cut = spread.cut_of(model, plan, in_parts, mesh)
    spread.make_equal(model, world)
    rows = place(model, device, seed=recipe.seed, keep=rounds, cut=cut)
    shared = spread.share_products(model, plan, in_parts, mesh)  # of the weights of one process
    amp.apply(model, recipe.amp.precision, master_weights=weights, accumulated=accumulated)
    if shared is not None:
        shared.connect()
    if recipe.recompute.policy != "none" or recipe.train.compile:
        how, size = compiled_as(plan) if recipe.train.compile else None, None if shapes is None else shapes.tokens
        recompute.apply(find_blocks(model, blocks), recipe.recompute.policy, device=device, compiled=how, size=size)
    sharded = spread.shard_rows(model, plan, in_parts, mesh, rows)
    parameters = list(model.parameters()) if sharded is None else list(sharded.parameters.values())
    built = optimizer(parameters)
    if weights != "fp32" and getattr(built, "_master_weights", "fp32") != weights:
        raise InputError(
            f"amp.master_weights: {type(built).__name__} cannot keep {weights}; use bigtrain.optim, or fp32"
        )
    if recipe.sharding.offload != "none":
        spread.offload_states(built, plan, model, sharded)
    spread.connect_parts(built, sharded, shared)
    for group in built.param_groups:
        group["initial_lr"] = group["lr"]
    return Engine(
        model,
        built,
        micro_batch_size=plan.micro_batch_size,
        shifted_labels=recipe.train.objective == "clm",
        schedule=schedule_of(plan),
        loss_scale=LossScale(device, precision=recipe.amp.precision),
        release=release(model.parameters(), built, parameters) if recipe.optimizer.gradient_release else None,
        sharded=sharded,
        shared=shared,
        world=world,
        shapes=shapes,
    )


def check_ranks(plan: Plan, world: World) -> None:
    """Raise InputError if a plan is for other ranks than these."""
    if world.size != plan.world_size:
        raise InputError(
            f"the plan is for {plan.world_size} ranks, and here are {world.size}; plan with world_size={world.size}, "
            "or start it with `bigtrain launch`, or with torchrun and inside of `with bigtrain.joined():`"
        )


def compiled_as(plan: Plan) -> Literal["whole", "parts"]:
    """Return whether a plan's blocks compile as one graph: where one kernel attends to all documents.

    Elsewhere attention goes from document to document, which is not compiled and cuts the graph.
    """
    recipe, hardware = plan.recipe, plan.hardware
    fused = hardware.kind == "cuda" and hardware.capability is not None and hardware.capability >= (8, 0)
    low = recipe.amp.precision != "fp32"
    suits = plan.model.head_dim <= 256 and plan.model.head_dim % 8 == 0 and not recipe.train.attention_dropout
    return "whole" if fused and low and suits else "parts"


def schedule_of(plan: Plan) -> Schedule:
    """Return the learning rate's factor as a function of the step. Raises ValueError while the length is in epochs."""
    total, section = plan.total_steps, plan.recipe.optimizer
    if total is None and section.schedule == "constant" and isinstance(section.warmup_steps, int):
        total = 1  # it would only tell when the rate falls
    if total is None:
        raise ValueError("the plan's length is in epochs; call plan.with_rows(rows of the data) first")
    warmup = warmup_step_count(section.warmup_steps, total)
    return partial(learning_rate_factor, section.schedule, total_steps=total, warmup_steps=warmup)
