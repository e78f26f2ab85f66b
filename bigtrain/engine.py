"""prepare() and Engine: everything that happens to a model between its class and its training step, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bigtrain import amp, recompute
from bigtrain import batch as batches
from bigtrain.amp.loss_scale import LossScale
from bigtrain.amp.precision import keep
from bigtrain.batch import Batch
from bigtrain.errors import DataError, InputError, NonFiniteGradient
from bigtrain.optim.release import Release, gradient_norm, release
from bigtrain.optim.schedule import learning_rate_factor, warmup_step_count
from bigtrain.placement import find_blocks, place
from bigtrain.planner.plan import Plan

Schedule = Callable[[int], float]


class StepResult:
    """What one optimizer step did.

    `loss` (fp64) is the mean over the labelled tokens of the global batch, `grad_norm` (fp32) the global norm before
    clipping, `loss_scale` what the loss was multiplied by: 0-dim tensors on the model's device. `skipped` says that
    loss or gradient was not finite and nothing was changed; reading it waits until a GPU has taken the step.
    """

    def __init__(
        self, loss: Tensor, grad_norm: Tensor, finite: Tensor, learning_rate: float, loss_scale: Tensor
    ) -> None:
        self.loss, self.grad_norm, self.learning_rate, self.loss_scale = loss, grad_norm, learning_rate, loss_scale
        self._finite, self._copied = finite, None
        if finite.is_cuda:
            self._finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            self._copied = torch.cuda.current_stream(finite.device).record_event()

    @property
    def skipped(self) -> bool:
        if self._copied is not None:
            self._copied.synchronize()
        return not self._finite


class Engine:
    """Run training steps: cut a batch into micro-batches, weigh their gradients, clip, update.

    Micro-batches count by their share of the batch's labelled tokens, so the size of a micro-batch does not change
    what is computed. `steps_taken` counts optimizer steps, skipped ones included. With gradient release the update
    happens inside `backward`.
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
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss_scale = loss_scale
        self.device = loss_scale.value.device
        self.steps_taken = 0
        self._micro_batch_size = micro_batch_size
        self._shifted_labels = shifted_labels
        self._schedule = schedule
        self._release = release
        self._share = 0.0
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)

    def micro_batches(self, batch: Batch) -> Iterator[Batch]:
        """Yield what each forward pass gets, on the model's device; packed rows come out unpadded.

        `batch` holds this rank's rows in host memory. Micro-batches without any label are left out.
        Raises DataError if no row has one.
        """
        count = partial(batches.count_labels, shifted=self._shifted_labels and not batches.is_packed(batch))
        total = count(batch)
        if not total:
            raise DataError("a batch has no label that counts; check the data")
        for rows in batches.split(batch, self._micro_batch_size):
            self._share = count(rows) / total
            if self._share:
                yield batches.move(batches.unpad(rows) if batches.is_packed(rows) else rows, self.device)

    def backward(self, loss: Any) -> None:
        """Add the gradients of a micro-batch, weighted; `loss` is its mean loss or an output that has a `.loss`.

        With gradient release this updates the weights; a loss that is not finite changes none.
        """
        mean: Tensor = loss if isinstance(loss, Tensor) else loss.loss
        weighted = mean * self._share
        self._loss += weighted.detach()
        if self._release is not None:
            self._set_learning_rate()
            if not self._may_update(torch.isfinite(self._loss)):
                return
        torch.autograd.backward(self.loss_scale.scale(weighted))

    def step(self, max_norm: float | None = 1.0) -> StepResult:
        """Clip the gradients to a global norm (None: do not), update the weights and clear the gradients.

        A step whose loss or gradient is not finite changes no weight and no optimizer state. Raises InputError for
        clipping with gradient release: the weights are updated before the norm is known. Raises NonFiniteGradient where
        gradient release has updated some weights before a gradient turned out not to be finite.
        """
        result = self._step(max_norm) if self._release is None else self._finish_release(self._release, max_norm)
        self._loss = torch.zeros_like(self._loss)
        self.steps_taken += 1
        return result

    def _step(self, max_norm: float | None) -> StepResult:
        learning_rate, scale = self._set_learning_rate(), self.loss_scale.value.clone()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        overflow = self.loss_scale.unscale_(gradients)
        norm = global_norm(gradients, self.device)
        finite = torch.isfinite(norm) & torch.isfinite(self._loss) & (overflow == 0)
        if self._may_update(finite):
            if max_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
            self.optimizer.step()
        self.loss_scale.update(1 - finite.float())
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(self._loss, norm, finite, learning_rate, scale)

    def _may_update(self, finite: Tensor) -> bool:
        """Tell whether to call the optimizer; on a GPU ours is told on the device instead, and nobody waits."""
        if self.device.type == "cuda" and hasattr(self.optimizer, "found_inf"):
            self.optimizer.found_inf = 1 - finite.float()
            return True
        return bool(finite)

    def _finish_release(self, release: Release, max_norm: float | None) -> StepResult:
        if max_norm is not None:
            raise InputError(f"a global norm of {max_norm:g} with gradient release: {CLIPPED_RELEASE}")
        norm, finite = release.take_norm(), torch.isfinite(self._loss)
        if bool(finite & ~torch.isfinite(norm)):
            raise NonFiniteGradient(
                f"step {self.steps_taken + 1}: a gradient was not finite, and gradient release had updated other "
                "weights by then; go on from a checkpoint, with optimizer.gradient_release=false to skip such steps"
            )
        return StepResult(self._loss, norm, finite, self._set_learning_rate(), self.loss_scale.value)

    def _set_learning_rate(self) -> float:
        factor = self._schedule(self.steps_taken)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        return float(self.optimizer.param_groups[0]["lr"])


CLIPPED_RELEASE = (
    "clipping needs the norm of all gradients before the first update; use train.max_grad_norm=null, or "
    "optimizer.gradient_release=false"
)


def global_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the 2-norm of all gradients together, fp32, whatever their dtypes."""
    if not gradients:
        return torch.zeros((), device=device)
    if device.type == "cuda":  # a kernel for many tensors, where one for each would keep the host busy
        norms = torch._foreach_norm(list(gradients), 2, torch.float32)
    else:
        norms = tuple(gradient_norm(gradient) for gradient in gradients)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def prepare(
    model: nn.Module,
    plan: Plan,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    *,
    blocks: type[nn.Module] | Sequence[nn.Module] | None = None,
) -> Engine:
    """Return an engine that trains a model as a plan says.

    `optimizer` is called with the parameters once they are where they will stay. `blocks` are the model's repeated
    blocks or their class; without it, the members of the longest ModuleList are taken. A model on the meta device is
    initialised here. The order: place, precision, recompute, compile, optimizer, gradient release.
    Raises InputError for a model that has no blocks where the plan needs them, a policy list of another length, and an
    optimizer that cannot keep master weights as the plan says.
    """
    recipe = plan.recipe
    device = torch.device(plan.hardware.kind)
    weights, accumulated = recipe.amp.master_weights, plan.accumulation_steps > 1
    place(model, device, seed=recipe.seed, keep=partial(keep, master_weights=weights, accumulated=accumulated))
    amp.apply(model, recipe.amp.precision, master_weights=weights, accumulated=accumulated)
    if recipe.recompute.policy != "none" or recipe.train.compile:
        compiled = compiled_as(plan) if recipe.train.compile else None
        recompute.apply(find_blocks(model, blocks), recipe.recompute.policy, device=device, compiled=compiled)
    built = optimizer(model.parameters())
    if weights != "fp32" and getattr(built, "_master_weights", "fp32") != weights:
        raise InputError(
            f"amp.master_weights: {type(built).__name__} cannot keep {weights}; use bigtrain.optim, or fp32"
        )
    for group in built.param_groups:
        group["initial_lr"] = group["lr"]
    return Engine(
        model,
        built,
        micro_batch_size=plan.micro_batch_size,
        shifted_labels=recipe.train.objective == "clm",
        schedule=schedule_of(plan),
        loss_scale=LossScale(device, precision=recipe.amp.precision),
        release=release(model.parameters(), built) if recipe.optimizer.gradient_release else None,
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
