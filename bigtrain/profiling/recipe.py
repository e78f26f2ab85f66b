"""A profile of a recipe's plan: its own model on its own data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing

import torch

import bigtrain
from bigtrain.batch import Batch
from bigtrain.data.ensure import ensure_prepared
from bigtrain.data.loader import Loader
from bigtrain.errors import InputError
from bigtrain.ledger import Ledger
from bigtrain.memory.predict import SECOND_STEP, Step, torch_threads
from bigtrain.memory.profiled import ChangeObject
from bigtrain.memory.record import Recording
from bigtrain.placement import find_blocks
from bigtrain.planner.choice import Choice
from bigtrain.planner.mechanisms import mechanism_faults
from bigtrain.planner.offers import Offers
from bigtrain.planner.plan import Plan
from bigtrain.planner.price import memory_of
from bigtrain.planner.speed import Speed
from bigtrain.profiling.result import Predicted, Profile
from bigtrain.profiling.steps import LEAST_STEPS, Steps
from bigtrain.training.build import build_engine, build_loader
from bigtrain.training.runtime import runtime
from bigtrain.world import joined


def profile_recipe(plan: Plan, *, steps: int = LEAST_STEPS) -> Profile:
    """Take a few real steps as a plan says, from new weights, and set what they hold beside what was predicted.

    The data are prepared first if need be. No run folder is made. On several ranks each gets what its own steps held.
    Raises InputError for less than three steps, which would not show the peak, RecipeError for a plan on CUDA where
    there is none.
    """
    if steps < LEAST_STEPS:
        raise InputError(f"profile: {steps} steps do not show the peak; take at least {LEAST_STEPS}")
    if plan.recipe.sharding.engine == "deepspeed":
        raise InputError("profile: DeepSpeed's buffers cannot be told apart; use sharding.engine=fsdp2")
    with joined(kind=plan.hardware.kind, timeout_seconds=plan.recipe.cluster.timeout) as world, runtime(plan):
        loader = build_loader(plan, ensure_prepared(plan.recipe, aside=True), world)
        plan = plan.with_rows(loader.rows)
        with closing(loader):
            measured = Steps(
                build=lambda: build_engine(plan),
                batches=_batches(loader),
                blocks=find_blocks,
                device=plan.hardware.kind,
                seed=plan.recipe.seed,
                max_norm=plan.recipe.train.max_grad_norm,
                head=(plan.model.padded_vocab_size, plan.model.hidden_size),
            ).measure(steps)
    return Profile(
        name=plan.recipe.name,
        device=plan.hardware.name,
        predicted=predicted(plan),
        measured=measured,
        recipe=plan.to_yaml(),
        changes=changes(plan),
        versions={"bigtrain": bigtrain.__version__, "torch": torch.__version__},
    )


def predicted(plan: Plan) -> Predicted:
    """Return what a plan predicts of its steps, with everything that the prediction allocates along two of them."""
    recording = Recording()
    device = plan.hardware.device
    Step(
        plan.recipe,
        plan.model,
        Ledger(recording),
        device=plan.hardware.kind,
        slow_bf16=plan.hardware.slow_bf16,
        world_size=plan.world_size,
        threads=plan.hardware.threads or torch_threads(),
        workspace_bytes=device.workspace_bytes if device is not None else 0,
    ).run_twice(recording)
    memory = memory_of(plan.recipe, plan.model, plan.hardware, plan.world_size)
    choice = Choice.of(plan.recipe, plan.model.num_hidden_layers, plan.world_size)
    seconds = Speed(plan.recipe, plan.model, plan.hardware, plan.world_size).seconds(choice)
    return Predicted(memory, recording, SECOND_STEP, seconds.total)


def changes(plan: Plan) -> list[ChangeObject]:
    """Return single changes of the plan that would hold less, with what they are predicted to save and to cost."""
    choice = Choice.of(plan.recipe, plan.model.num_hidden_layers, plan.world_size)
    offers = Offers(plan.recipe, plan.model, plan.hardware, plan.world_size)
    now = offers.of(choice)
    found: list[ChangeObject] = []
    for override, other in _neighbours(choice):
        if mechanism_faults(other.into(plan.recipe), plan.hardware, other.accumulation_steps, plan.world_size):
            continue
        offer = offers.of(other)
        if offer.allocated_bytes < now.allocated_bytes:
            saved, faster = offer.allocated_bytes - now.allocated_bytes, now.seconds / offer.seconds - 1
            found.append({"change": override, "bytes": saved, "tokens_per_second": faster})
    return found


def _neighbours(choice: Choice) -> Iterator[tuple[str, Choice]]:
    """Yield choices that differ in one thing, as an override of the recipe; those that keep the numbers come first."""
    for policy in ("selective", "full"):
        yield f"recompute.policy={policy}", dataclasses.replace(choice, recompute=(policy,) * len(choice.recompute))
    micro = choice.micro_batch_size
    if micro % 2 == 0:
        halved = dataclasses.replace(
            choice, micro_batch_size=micro // 2, accumulation_steps=2 * choice.accumulation_steps
        )
        yield f"train.micro_batch_size={micro // 2}", halved
    yield "optimizer.gradient_release=true", dataclasses.replace(choice, gradient_release=True)
    for state in ("bf16", "8bit", "4bit"):
        yield f"optimizer.state={state}", dataclasses.replace(choice, optimizer_state=state)
    yield "amp.master_weights=split24", dataclasses.replace(choice, master_weights="split24")


def _batches(loader: Loader) -> Iterator[Batch]:
    yield from loader
