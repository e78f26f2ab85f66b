"""plan_model(): the fastest way to train any model within a budget, found on tensors that have shapes and no memory.

The model is traced block by block at two sizes of micro-batch, its optimizer's update once, and of what the search
chooses a whole step through the engine, which is what the plan says of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from torch import nn

from bigtrain import units
from bigtrain.amp.rules import device_fault
from bigtrain.batch import Batch
from bigtrain.config.model import ModelConfig
from bigtrain.config.schema import Recipe
from bigtrain.data.cache import cache_folder
from bigtrain.errors import InputError, did_you_mean
from bigtrain.memory.attribute import causes_at_peak
from bigtrain.memory.blockwise import ModelTrace
from bigtrain.memory.predict import SECOND_STEP, reserved_bytes, torch_threads
from bigtrain.memory.record import Recording
from bigtrain.memory.report import MemoryReport
from bigtrain.memory.trace_model import REAL, Forward, called
from bigtrain.model_step import Factory, Subject, check_sample, factory_of
from bigtrain.planner import hardware as hardware_module
from bigtrain.planner.candidates import divisors
from bigtrain.planner.choice import Choice
from bigtrain.planner.clock import Clock, Flops
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.links import communication, links_of
from bigtrain.planner.module_plan import ModulePlan, Undescribed, module_recipe
from bigtrain.planner.module_search import STAGES, TRACED_ROWS, FoundModule, Module, search_module
from bigtrain.planner.price import budget_bytes
from bigtrain.planner.rates import Rates, rates_of
from bigtrain.planner.roofline import Roofline
from bigtrain.planner.speed import StepSeconds
from bigtrain.recompute.policy import resolve
from bigtrain.sharding.cost import collectives
from bigtrain.terminal import working

PRECISIONS = ("fp32", "bf16", "fp16")
"""What `precision` may say: fp8 exchanges layers, which are not traced."""


def plan_model(
    model: nn.Module,
    sample: Batch,
    *,
    global_batch_size: int,
    memory_budget: str = "auto",
    optimizer: str | Factory = "adamw",
    precision: str = "fp32",
    device: str | Hardware | None = None,
    world_size: int = 1,
    micro_batch_size: int | None = None,
    recompute: str | Sequence[str] | None = None,
    zero_stage: int | None = None,
    blocks: type[nn.Module] | Sequence[nn.Module] | None = None,
    forward: Forward = called,
    causal: bool = False,
    real: Sequence[str] = (),
    seed: int = 0,
) -> ModulePlan:
    """Plan the training of any model: micro-batch, recomputation by block, and with several ranks the ZeRO stage.

    The model may be on the meta device; nothing of it is allocated or changed. `sample` is a batch of any number of
    rows, of the lengths that training will have. `memory_budget` is a size such as "24GiB", or what the device has.
    `optimizer` is what `prepare` will be given, or a class of torch.optim by its name in small letters. `device` is a
    name of the table, "cpu" or "cuda" of this machine, or what this machine has. `micro_batch_size`, `recompute` (a
    policy, or one for each block) and `zero_stage` are chosen if not given. `blocks` are the modules that may
    recompute, or their class: give `prepare` the same. `forward` returns the loss of model and micro-batch, without it
    `model(**micro_batch)`, whose result or its `.loss` is one. `causal` says that the model moves labels by one
    itself, as transformers' causal models do. `real` names tensors of the sample whose numbers the model reads, beside
    `attention_mask`: of a mask that masks nothing, transformers makes none for attention, so let the sample's be one
    that training will have.

    The plan is for one run of `prepare`, not a recipe: it has no model section, and the learning rate is constant.
    Memory on one rank is that of a traced step; what ZeRO takes off and adds is computed, from a model's bytes.
    Raises InputError for a model that cannot be traced, naming module and operation; DoesNotFit.
    """
    hardware = _hardware(device)
    _check_asked(model, sample, real, zero_stage)
    subject = Subject(model, check_sample(sample), factory_of(optimizer), forward, blocks, (*REAL, *real))
    _check_precision(precision, hardware)
    _check_rows(global_batch_size, world_size, micro_batch_size)
    policies = None if recompute is None else tuple(resolve(recompute, len(subject.block_names)))
    if "offload" in (policies or ()):
        raise InputError("recompute: 'offload' cannot be traced for a model of your own; use full")
    budget = _budget(memory_budget, hardware)
    name, rate = subject.optimizer_name_and_rate()
    recipe = module_recipe(
        subject.name,
        hardware,
        global_batch_size=global_batch_size,
        budget_bytes=budget,
        precision=precision,
        seed=seed,
        causal=causal,
        optimizer=name,
        learning_rate=rate,
    )
    planning = _Planning(subject, recipe, hardware, world_size, micro_batch_size, policies, zero_stage)
    found = search_module(planning.module(), budget, name=subject.name)
    return planning.plan(found.choice, found)


def _check_asked(model: nn.Module, sample: Batch, real: Sequence[str], zero_stage: int | None) -> None:
    """Raise InputError where there is nothing to train, and for names and stages that there are not."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"{type(model).__name__} has no parameter to train; unfreeze some")
    missing = [name for name in real if name not in sample]
    if missing:
        raise InputError(f"real: {missing[0]!r} is not in the sample{did_you_mean(missing[0], list(sample))}")
    if zero_stage not in (None, *STAGES):
        raise InputError(f"zero_stage: {zero_stage!r} is no stage; use 0, 1, 2 or 3, or None for the fastest that fits")


def _check_precision(precision: str, hardware: Hardware) -> None:
    if precision not in PRECISIONS:
        raise InputError(
            f"precision: {precision!r} is none of {', '.join(PRECISIONS)}{did_you_mean(precision, PRECISIONS)}"
        )
    if fault := device_fault(precision, hardware.kind, hardware.capability):
        raise InputError(f"precision: {fault}")


def _check_rows(global_batch_size: int, world_size: int, micro_batch_size: int | None) -> None:
    if not isinstance(global_batch_size, int):
        raise InputError(f"global_batch_size: {global_batch_size!r} is no whole number of rows")
    if global_batch_size < 1 or world_size < 1 or global_batch_size % world_size:
        raise InputError(f"global_batch_size: {global_batch_size} rows do not divide into {world_size} ranks")
    rows = global_batch_size // world_size
    if micro_batch_size is not None and (micro_batch_size < 1 or rows % micro_batch_size):
        near = ", ".join(map(str, divisors(rows)))
        raise InputError(
            f"micro_batch_size: {micro_batch_size} does not divide a rank's {rows} rows; use one of {near}"
        )


def _budget(written: str, hardware: Hardware) -> int:
    if not isinstance(written, str):
        raise InputError(f"memory_budget: {written!r} is no size; write a text such as '16GiB'")
    if written != "auto":
        try:
            return units.parse_bytes(written)
        except ValueError as error:
            raise InputError(f"memory_budget: {error}") from error
    if hardware.memory_bytes <= 0:
        raise InputError(f"memory_budget: the memory of {hardware.name} cannot be read; give a size, such as '16GiB'")
    return budget_bytes(hardware)


@dataclass(frozen=True)
class _Planning:
    """One model on one kind of device, and the plan that a choice makes of it."""

    subject: Subject
    recipe: Recipe
    hardware: Hardware
    world_size: int
    micro_batch_size: int | None = None
    recompute: tuple[str, ...] | None = None
    zero_stage: int | None = None

    def module(self) -> Module:
        """Return the model as the search sees it."""
        rows = self.recipe.train.global_batch_size // self.world_size
        blocks = len(self.subject.block_names)
        update = self.subject.update(self.plan(Choice(rows, 1, ("none",) * blocks)), self._clock)
        return Module(
            rows=rows,
            blocks=blocks,
            world_size=self.world_size,
            weight_bytes=update.weight_bytes,
            state_bytes=update.held_bytes - update.weight_bytes,
            gradient_bytes=sum(p.nbytes for p in self.subject.model.parameters() if p.requires_grad),
            update_bytes=update.peak_bytes,
            update_seconds=update.seconds,
            hardware=self.hardware,
            trace=self._trace,
            exact=self._memory,
            sending=self._sending,
            micro_batch_size=self.micro_batch_size,
            recompute=self.recompute,
            zero_stage=self.zero_stage,
        )

    def plan(self, choice: Choice, found: FoundModule | None = None) -> ModulePlan:
        """Return the plan of a choice; without `found`, one whose prices are not known yet."""
        subject, hardware = self.subject, self.hardware
        seconds = StepSeconds(0.0, 0.0, 0.0, 0.0) if found is None else found.seconds
        flops = 0 if found is None else self._flops_of_row
        row = hardware.device
        peak = self._rates.product_flops_per_second
        if row is not None:
            peak = row.flops_per_second.get(self.recipe.amp.precision, row.flops_per_second["fp32"])
        rows = self.recipe.train.global_batch_size / self.world_size
        return ModulePlan(
            recipe=choice.into(self.recipe),
            model=cast(ModelConfig, Undescribed(subject.name)),
            hardware=hardware,
            world_size=self.world_size,
            choice=choice,
            memory=MemoryReport({}) if found is None else found.memory,
            seconds=seconds,
            parameters=self._parameters,
            flops_per_token=flops // subject.row_tokens,
            mfu=flops * rows / seconds.total / peak if found is not None else 0.0,
            rates_source=self._rates.source,
            rejected=() if found is None else found.rejected,
            row_tokens=subject.row_tokens,
            recording=self._recordings.get(choice),
            changes=() if found is None else found.changes,
        )

    def _trace(self, rows: int) -> ModelTrace:
        with working(f"bigtrain: tracing {self.subject.name} by blocks, micro-batches of {rows}", aside=True):
            return self.subject.trace(rows, self.recipe.amp.precision, self._clock)

    def _memory(self, choice: Choice) -> MemoryReport:
        doing = f"bigtrain: tracing a step of {self.subject.name}, micro-batches of {choice.micro_batch_size}"
        with working(doing, aside=True):
            recording = self._recordings[choice] = self.subject.step(self.plan(choice))
        reserved = reserved_bytes(recording) if self.hardware.kind == "cuda" else None
        return MemoryReport(causes_at_peak(recording, SECOND_STEP), reserved_bytes_peak=reserved)

    @cached_property
    def _recordings(self) -> dict[Choice, Recording]:
        return {}

    @cached_property
    def _rates(self) -> Rates:
        threads = self.hardware.threads or torch_threads()
        return rates_of(self.hardware, self.recipe.amp.precision, threads, cache_folder(self.recipe.data))

    @cached_property
    def _clock(self) -> Clock:
        return Clock(Roofline(self._rates))

    @cached_property
    def _parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.subject.model.parameters())

    @cached_property
    def _flops_of_row(self) -> int:
        rows = min(self.recipe.train.global_batch_size, min(TRACED_ROWS))
        trace = self.subject.trace(rows, self.recipe.amp.precision, Flops(), ("none",))
        flops: float = sum(trace.seconds(("none",) * len(trace.calls)))
        return round(flops / rows)

    def _sending(self, choice: Choice, forward_seconds: float, backward_seconds: float) -> float:
        if self.world_size == 1:
            return 0.0
        shards = self.world_size // choice.replicate if choice.zero_stage else 1
        sent = collectives(
            self._parameters,
            choice.zero_stage,
            shards,
            choice.replicate,
            choice.accumulation_steps,
            4 if self.recipe.amp.precision == "fp32" else 2,
            4,
            groups=len(choice.recompute) + 1,
        )
        return communication(
            links_of(self.hardware, self.recipe),
            sent,
            world_size=self.world_size,
            accumulation_steps=choice.accumulation_steps,
            forward_seconds=forward_seconds,
            backward_seconds=backward_seconds,
        )


def _hardware(device: str | Hardware | None) -> Hardware:
    if isinstance(device, Hardware):
        return device
    if device == "cuda":
        found = hardware_module.cuda_devices()
        if found is None:
            raise InputError("device: 'cuda': this machine has no CUDA device; use cpu, or a device of the table")
        return found
    return hardware_module.this_machine() if device is None else hardware_module.of_name(device)
