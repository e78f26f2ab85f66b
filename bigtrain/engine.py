"""prepare() and Engine: everything that happens to a model between its class and its training step, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bigtrain import amp
from bigtrain import batch as batches
from bigtrain.batch import Batch
from bigtrain.errors import DataError, InputError
from bigtrain.optim.schedule import learning_rate_factor, warmup_step_count
from bigtrain.planner.plan import Plan

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    `loss` (fp64) is the mean over the labelled tokens of the global batch, `grad_norm` the global norm before clipping,
    both 0-dim tensors on the model's device; `skipped` says that one of them was not finite and no weight was changed.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: bool
    learning_rate: float


class Engine:
    """Run training steps: cut a batch into micro-batches, weigh their gradients, clip, update.

    Micro-batches count by their share of the batch's labelled tokens, so the size of a micro-batch does not change
    what is computed. `steps_taken` counts optimizer steps, skipped ones included.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        micro_batch_size: int,
        shifted_labels: bool,
        schedule: Schedule,
        device: torch.device,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.device = device
        self.steps_taken = 0
        self._micro_batch_size = micro_batch_size
        self._shifted_labels = shifted_labels
        self._schedule = schedule
        self._share = 0.0
        self._loss = torch.zeros((), dtype=torch.float64, device=device)

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
        """Add the gradients of a micro-batch, weighted; `loss` is its mean loss or an output that has a `.loss`."""
        mean: Tensor = loss if isinstance(loss, Tensor) else loss.loss
        weighted = mean * self._share
        self._loss += weighted.detach()
        torch.autograd.backward(weighted)

    def step(self, max_norm: float | None = 1.0) -> StepResult:
        """Clip the gradients to a global norm (None: do not), update the weights and clear the gradients.

        A step whose loss or gradient is not finite changes no weight and no optimizer state.
        """
        learning_rate = self._set_learning_rate()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = bool(torch.isfinite(norm) & torch.isfinite(self._loss))
        if finite:
            if max_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        result = StepResult(self._loss, norm, not finite, learning_rate)
        self._loss = torch.zeros_like(self._loss)
        self.steps_taken += 1
        return result

    def _set_learning_rate(self) -> float:
        factor = self._schedule(self.steps_taken)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        return float(self.optimizer.param_groups[0]["lr"])


def prepare(
    model: nn.Module,
    plan: Plan,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    *,
    blocks: type[nn.Module] | None = None,
) -> Engine:
    """Return an engine that trains a model as a plan says.

    `optimizer` is called with the parameters once they are where they will stay. `blocks` is the class of the model's
    repeated block; without it, the members of the longest ModuleList are taken. A model on the meta device is
    initialised here. The order: place, precision, compile, optimizer.
    """
    recipe = plan.recipe
    device = torch.device(plan.hardware.kind)
    place(model, device, seed=recipe.seed)
    amp.apply(model, recipe.amp.precision)
    if recipe.train.compile:
        for block in find_blocks(model, blocks):
            block.compile(dynamic=True)
    built = optimizer(model.parameters())
    for group in built.param_groups:
        group["initial_lr"] = group["lr"]
    return Engine(
        model,
        built,
        micro_batch_size=plan.micro_batch_size,
        shifted_labels=recipe.train.objective == "clm",
        schedule=schedule_of(plan),
        device=device,
    )


def schedule_of(plan: Plan) -> Schedule:
    """Return the learning rate's factor as a function of the step. Raises ValueError while the length is in epochs."""
    total = plan.total_steps
    if total is None:
        raise ValueError("the plan's length is in epochs; call plan.with_rows(rows of the data) first")
    section = plan.recipe.optimizer
    warmup = warmup_step_count(section.warmup_steps, total)
    return partial(learning_rate_factor, section.schedule, total_steps=total, warmup_steps=warmup)


def place(model: nn.Module, device: torch.device, *, seed: int) -> None:
    """Move a model to a device; parameters on the meta device are created there and initialised from the seed.

    Modules are initialised by their `reset_parameters`, or by the `_init_weights` of a transformers model.
    Raises InputError naming the first module that has parameters or buffers and neither.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if not any(tensor.is_meta for tensor in tensors):
        model.to(device)
        return
    if not all(tensor.is_meta for tensor in tensors):
        raise InputError("the model is partly on the meta device; build all of it there, or all on a real device")
    tied = _tied_parameters(model)
    model.to_empty(device=device)
    for first, *others in tied:
        for name in others:
            _set_parameter(model, name, model.get_parameter(first))
    torch.manual_seed(seed)
    for name, module in model.named_modules():
        _initialise(model, name, module)


def _initialise(model: nn.Module, name: str, module: nn.Module) -> None:
    of_transformers: Any = getattr(model, "_init_weights", None)
    its_own: Any = getattr(module, "reset_parameters", None)
    if callable(of_transformers):
        of_transformers(module)
    elif callable(its_own):
        its_own()
    elif [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        raise InputError(
            f"{name or 'the model'}: {type(module).__name__} is on the meta device and has no reset_parameters(); "
            "add one, or build the model on a real device"
        )


def _tied_parameters(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that stands in several places."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, parameter)


def find_blocks(model: nn.Module, blocks: type[nn.Module] | None = None) -> list[nn.Module]:
    """Return a model's repeated blocks: all modules of the class, or the members of its longest ModuleList.

    Raises InputError if there are none.
    """
    if blocks is not None:
        found = [module for module in model.modules() if isinstance(module, blocks)]
    else:
        lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
        found = max(lists, key=len, default=[])
    if not found:
        wanted = f"module of class {blocks.__name__}" if blocks else "ModuleList of blocks"
        raise InputError(f"{type(model).__name__}: has no {wanted}; name the class in prepare(..., blocks=...)")
    return found
