"""Which memory mechanisms a recipe asks for, whether they go together and with the device, and what `auto` means."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bigtrain.amp import rules
from bigtrain.config.keys import listed
from bigtrain.config.schema import AmpSection, ClusterSection, Recipe, RecomputeSection, ShardingSection
from bigtrain.config.shape_checks import fault, nearest_divisors
from bigtrain.config.tensor_parallel import data_ranks
from bigtrain.errors import Fault
from bigtrain.optim.cost import releasable, supported_states
from bigtrain.planner.hardware import Hardware
from bigtrain.sharding.deepspeed_config import deepspeed_faults


def mechanism_faults(recipe: Recipe, hardware: Hardware, accumulation_steps: int, world_size: int = 1) -> list[Fault]:
    """Return a fault for each mechanism that the device or the ranks do not have, or that would not be exact."""
    checks = (_precision, _master_weights, _state, _offload, _compiled)
    found = [found for check in checks for found in check(recipe, hardware)]
    groups = _groups(recipe, data_ranks(recipe, world_size))
    return [*deepspeed_faults(recipe), *found, *groups, *_release(recipe, accumulation_steps, world_size)]


def without_mechanisms(recipe: Recipe) -> Recipe:
    """Return a recipe in plain fp32 on one process, for whoever wants a run's model and not its training."""
    optimizer = recipe.optimizer.model_copy(update={"gradient_release": False})
    plain = {"optimizer": optimizer, "amp": AmpSection(), "recompute": RecomputeSection(policy="none")}
    return recipe.model_copy(update={**plain, "sharding": ShardingSection(), "cluster": ClusterSection()})


def release_obstacles(recipe: Recipe, accumulation_steps: int, *, sharded: bool = False) -> Iterator[tuple[str, str]]:
    """Yield the keys that gradient release cannot go with, each with the reason and what to do."""
    if recipe.train.max_grad_norm is not None:
        reason = "clips by the norm of all gradients, which is not known before the first update"
        yield "train.max_grad_norm", f"{recipe.train.max_grad_norm:g} {reason}; use train.max_grad_norm=null"
    if recipe.train.on_spike == "skip":
        reason = "leaves out a whole update, which is under way before the loss of all ranks is known"
        yield "train.on_spike", f"skip {reason}; use rollback"
    if accumulation_steps > 1:
        rows = f"{accumulation_steps} micro-batches a step add their gradients before the update"
        one = _one_micro_batch(recipe, accumulation_steps)
        yield "train.micro_batch_size", f"{rows}; use train.micro_batch_size={one}"
    if recipe.amp.precision == "fp16":
        reason = "finds an overflow only when the gradients are complete, and then leaves the whole step out"
        yield "amp.precision", f"fp16 {reason}; use bf16"
    if not releasable(recipe.optimizer.name, sharded=sharded):
        reason = "updates whole parameters, of which other ranks have rows, and cannot ask them inside of backward"
        yield "optimizer.name", f"{recipe.optimizer.name} {reason}; use adamw, or sharding.zero_stage=0"


def warnings(recipe: Recipe, hardware: Hardware, initializer_range: float, world_size: int = 1) -> Iterator[str]:
    """Yield what is allowed and probably not wanted, each with what to do instead."""
    stage, replicate = recipe.sharding.zero_stage, recipe.sharding.replicate
    world_size = data_ranks(recipe, world_size)
    if stage not in ("auto", 0) and replicate in ("auto", world_size) and (world_size == 1 or replicate != "auto"):
        ranks = "one process" if world_size == 1 else f"{world_size} groups of one process"
        yield f"sharding.zero_stage={stage} does nothing on {ranks}; use 0, or ranks that share a model"
    if hardware.kind == "cpu" and recipe.sharding.offload in ("optimizer", "all"):
        where = f"sharding.offload={recipe.sharding.offload} on the CPU"
        yield f"{where}: the host memory is the device memory there, so it only costs; use none"
    if recipe.amp.precision == "bf16" and hardware.slow_bf16:
        yield (
            f"{hardware.name} has no bf16 instructions: products run in fp32 from rounded weights, which saves memory; "
            "amp.precision=fp32 is faster here"
        )
    if recipe.sharding.engine == "deepspeed":
        yield "sharding.engine=deepspeed: memory and speed are predicted as fsdp2's; DeepSpeed's own buffers are not"
    rate, kept = recipe.optimizer.learning_rate, recipe.amp.master_weights
    if warning := rules.slow_rate_warning(rate, initializer_range, kept):
        yield warning


def _precision(recipe: Recipe, hardware: Hardware) -> Iterator[Fault]:
    if text := rules.device_fault(recipe.amp.precision, hardware.kind, hardware.capability):
        yield fault(recipe, "amp.precision", text, "train.device")


def _master_weights(recipe: Recipe, hardware: Hardware) -> Iterator[Fault]:
    if recipe.amp.master_weights == "auto":
        return
    if text := rules.master_weights_fault(recipe.amp.precision, recipe.amp.master_weights):
        yield fault(recipe, "amp.master_weights", text, "amp.precision")


def _state(recipe: Recipe, hardware: Hardware) -> Iterator[Fault]:
    name, state = recipe.optimizer.name, recipe.optimizer.state
    states = supported_states(name)
    if state not in ("auto", *states):
        text = f"{state}: {name} keeps a row and a column for each matrix only; use {listed(states)}"
        yield fault(recipe, "optimizer.state", text, "optimizer.name")


def _offload(recipe: Recipe, hardware: Hardware) -> Iterator[Fault]:
    if hardware.kind == "cpu" and "offload" in _policies(recipe):
        why = "the host memory is the device memory there"
        yield fault(recipe, "recompute.policy", f"offload on the CPU: {why}; use full", "train.device")


def _groups(recipe: Recipe, world_size: int) -> Iterator[Fault]:
    """Yield what is wrong with the groups of ranks that each hold the whole model."""
    groups, key = recipe.sharding.replicate, "sharding.replicate"
    if groups == "auto":
        return
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    if world_size % groups:
        near = nearest_divisors(world_size, groups)
        yield fault(recipe, key, f"{groups} does not divide {ranks}; nearest that do: {near}", "cluster.nodes")
    elif recipe.sharding.zero_stage == 0 and groups != world_size:
        text = f"{groups}: at zero_stage 0 each of {ranks} holds the whole model; use {world_size}, or auto"
        yield fault(recipe, key, text, "sharding.zero_stage")


def _compiled(recipe: Recipe, hardware: Hardware) -> Iterator[Fault]:
    if recipe.train.compile is True and hardware.kind == "cpu" and "selective" in _policies(recipe):
        text = "selective with train.compile on the CPU: compiled code there does not show which products it holds"
        yield fault(recipe, "recompute.policy", f"{text}; use full, or train.compile=false", "train.compile")


def _release(recipe: Recipe, accumulation_steps: int, world_size: int) -> Iterator[Fault]:
    if recipe.optimizer.gradient_release is True:
        for key, reason in release_obstacles(recipe, accumulation_steps, sharded=_sharded(recipe, world_size)):
            text = f"{key}: {reason}, or optimizer.gradient_release=false"
            yield fault(recipe, "optimizer.gradient_release", text, key)


def _sharded(recipe: Recipe, world_size: int) -> bool:
    """Tell whether a recipe says that ranks have parts of parameters; `auto` is the search's to answer."""
    stage, replicate = recipe.sharding.zero_stage, recipe.sharding.replicate
    groups = 1 if replicate == "auto" else replicate
    return stage not in ("auto", 0) and world_size // recipe.sharding.tensor_parallel > groups


def _policies(recipe: Recipe) -> list[str]:
    policy = recipe.recompute.policy
    return [*policy] if isinstance(policy, list) else [policy]


def _one_micro_batch(recipe: Recipe, accumulation_steps: int) -> int:
    micro = recipe.train.micro_batch_size
    return accumulation_steps * micro if isinstance(micro, int) else recipe.train.global_batch_size


def instead_of_auto(section: Any, **values: Any) -> dict[str, Any]:
    """Return those of the values whose key says `auto` in a section."""
    return {key: value for key, value in values.items() if getattr(section, key) == "auto"}
