"""A step of any model through the engine, on fake tensors: what the very loop that will run allocates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bigtrain import amp
from bigtrain import batch as batches
from bigtrain.batch import Batch
from bigtrain.engine import prepare
from bigtrain.errors import InputError, did_you_mean
from bigtrain.memory.blockwise import RECOMPUTE, ModelTrace
from bigtrain.memory.record import Recording
from bigtrain.memory.trace import Clock, as_fake, fakes
from bigtrain.memory.trace_model import REAL, Forward, called, fake_sample, trace_model
from bigtrain.memory.trace_step import Run, Update, trace_step, trace_update
from bigtrain.placement import find_blocks
from bigtrain.planner.plan import Plan
from bigtrain.recompute.policy import Policy
from bigtrain.world import ALONE

Factory = Callable[[Iterable[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class Subject:
    """A model, what it is called with, and what trains it; nothing of it is changed or allocated."""

    model: nn.Module
    sample: Batch
    optimizer: Factory
    forward: Forward = called
    blocks: type[nn.Module] | Sequence[nn.Module] | None = None
    real: tuple[str, ...] = REAL

    @property
    def name(self) -> str:
        """Return the name of the model's class."""
        return type(self.model).__name__

    def optimizer_name_and_rate(self) -> tuple[str, float]:
        """Return the class of the optimizer, in small letters, and its learning rate."""
        with fakes():
            built = self.optimizer(as_fake(self.model).parameters())
        return type(built).__name__.lower(), float(built.param_groups[0]["lr"])

    @property
    def block_names(self) -> list[str]:
        """Return the names of the blocks in the model."""
        names = {module: name for name, module in self.model.named_modules()}
        return [names[block] for block in find_blocks(self.model, self.blocks)]

    def trace(self, rows: int, precision: str, clock: Clock, policies: Sequence[Policy] = RECOMPUTE) -> ModelTrace:
        """Return the parts of a forward and a backward pass at so many rows."""
        fake = as_fake(self.model)
        places = {name: fake.get_submodule(name) for name in self.block_names}
        with fakes():
            amp.apply(fake, precision)
        return trace_model(
            fake,
            self.sample,
            forward=self.forward,
            blocks=list(places.values()),
            rows=rows,
            real=self.real,
            clock=clock,
            policies=policies,
        )

    @property
    def row_tokens(self) -> int:
        """Return the tokens of a row: what its labels or ids are for, one where there are no such."""
        for name in ("labels", "input_ids"):
            if isinstance(value := self.sample.get(name), Tensor):
                return value[0].numel()
        return 1

    def update(self, plan: Plan, clock: Clock) -> Update:
        """Return what the optimizer holds, and what an update takes."""
        return trace_update(self._run(plan), clock)

    def step(self, plan: Plan) -> Recording:
        """Return every allocation of a step as planned, on one rank. Raises InputError for what cannot be traced."""
        return trace_step(self._run(plan))

    def _run(self, plan: Plan) -> Run:
        """Return the step of an engine that is prepared as a real one, on one rank; CUDA's device is a CPU here."""
        fake = as_fake(self.model).train()
        names = {fake.get_submodule(name): name for name in self.block_names}
        here = dataclasses.replace(plan, hardware=dataclasses.replace(plan.hardware, kind="cpu"), world_size=1)
        with fakes():
            engine = prepare(fake, here, self.optimizer, blocks=list(names), world=ALONE)
        cuda = plan.hardware.kind == "cuda"
        if cuda:
            _batch_updates(engine.optimizer)
        micro = fake_sample(self.sample, plan.micro_batch_size, self.real)
        moved = cuda or batches.is_packed(self.sample)
        device = plan.hardware.device
        return Run(
            model=fake,
            optimizer=engine.optimizer,
            forward=lambda: self.forward(engine.model, micro),
            backward=engine.backward,
            update=engine.step,
            accumulated=plan.accumulation_steps > 1,
            blocks=names,
            held=tuple(value for value in micro.values() if isinstance(value, Tensor)) if moved else (),
            held_bytes=device.workspace_bytes if cuda and device is not None else 0,
        )


def _batch_updates(optimizer: Optimizer) -> None:
    """Make torch's optimizers update many tensors at once, as they do on CUDA unless told otherwise.

    Source: torch.optim.optimizer, _default_to_fused_or_foreach, which asks for the tensors' device.
    """
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True


def factory_of(optimizer: str | Factory) -> Factory:
    """Return the factory, or the class of torch.optim that has this name in small letters. Raises InputError."""
    if not isinstance(optimizer, str):
        return optimizer
    known = {
        name.lower(): found
        for name, found in vars(torch.optim).items()
        if isinstance(found, type) and issubclass(found, Optimizer) and found is not Optimizer
    }
    if optimizer not in known:
        raise InputError(
            f"optimizer: {optimizer!r} is no optimizer of torch.optim{did_you_mean(optimizer, known)}; "
            "or give a function of the parameters, as to prepare"
        )
    return known[optimizer]


def check_sample(sample: Any) -> Batch:
    """Return a sample that is a batch: a mapping of names to tensors of as many rows. Raises InputError."""
    if not isinstance(sample, Mapping):
        raise InputError(f"sample: a {type(sample).__name__} is no batch; give a mapping of names to tensors")
    rows = {name: len(value) for name, value in sample.items() if isinstance(value, Tensor) and value.dim()}
    if not rows:
        raise InputError("sample: holds no tensor with rows; give a mapping of names to tensors, batch first")
    if not all(rows.values()):
        raise InputError("sample: its tensors have no rows; give one at least")
    if len(set(rows.values())) > 1 and not batches.is_packed(sample):
        told = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise InputError(f"sample: its tensors have different numbers of rows ({told}); give as many of each")
    return sample
