"""Real steps of a plan's engine, with and without torch's profiler: what they take, and on what."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import bigtrain
from bigtrain.batch import Batch
from bigtrain.checkpoint.state import TrainState
from bigtrain.data.cache import cache_folder
from bigtrain.data.ensure import ensure_prepared
from bigtrain.engine import Engine
from bigtrain.errors import InputError
from bigtrain.memory.marks import mark
from bigtrain.planner.by_class import SpeedByClass
from bigtrain.planner.plan import Plan
from bigtrain.profiling.breakdown import break_down
from bigtrain.profiling.spans import events_of
from bigtrain.profiling.time_result import TimeProfile
from bigtrain.training.attention_choice import choose_attention
from bigtrain.training.build import build_engine, build_loader
from bigtrain.training.peak import peak_flops
from bigtrain.training.runtime import runtime, seed_step
from bigtrain.world import joined

WARM_UP = 3
"""Steps before any that counts: compilation, the optimizer's states, kernels that are chosen at their first call."""

STEPS = 5
"""Steps that are timed without the profiler, and as many with it."""


def time_recipe(plan: Plan, *, steps: int = STEPS) -> TimeProfile:
    """Take real steps as a plan says, from new weights, and tell where their time goes, beside what was predicted.

    The device's rates are measured first, as before a run, and the prediction goes by them. The data are prepared if
    need be. No run folder is made. Of several ranks each gets its own time. Raises InputError for less than one step
    and for DeepSpeed, RecipeError for a plan on CUDA where there is none.
    """
    if steps < 1:
        raise InputError(f"profile: {steps} steps take no time; take at least 1")
    if plan.recipe.sharding.engine == "deepspeed":
        raise InputError("profile: the time of DeepSpeed's steps cannot be told apart; use sharding.engine=fsdp2")
    with joined(kind=plan.hardware.kind, timeout_seconds=plan.recipe.cluster.timeout) as world, runtime(plan):
        if world.first:
            peak_flops(plan.hardware, plan.recipe.amp.precision, cache_folder(plan.recipe.data))
        world.any(False)  # all wait until it has been measured
        loader = build_loader(plan, ensure_prepared(plan.recipe, aside=True), world)
        plan = plan.with_rows(loader.rows)
        with closing(loader):
            engine = build_engine(plan)
            choose_attention(plan, TrainState(engine, loader), world)
            taken = _Taken(plan, engine, iter(loader))
            taken.warm_up()
            seconds = taken.timed(steps)
            breakdown = break_down(taken.profiled(steps))
    speed = SpeedByClass(plan.recipe, plan.model, plan.hardware, plan.world_size)
    return TimeProfile(
        name=plan.recipe.name,
        device=plan.hardware.name,
        rates=speed.source,
        predicted=speed.by_class(plan.choice),
        predicted_phases=_phases(speed, plan),
        measured=breakdown,
        step_seconds=seconds,
        recipe=plan.to_yaml(),
        versions={"bigtrain": bigtrain.__version__, "torch": torch.__version__},
    )


def _phases(speed: SpeedByClass, plan: Plan) -> dict[str, float]:
    """Return what was predicted of forward, backward and update; what nothing hides of sending counts as outside."""
    seconds = speed.seconds(plan.choice)
    return {
        "forward": seconds.forward_seconds,
        "backward": seconds.backward_seconds + seconds.recompute_seconds,
        "update": seconds.optimizer_seconds,
        "outside": seconds.communication_seconds + seconds.offload_seconds,
    }


class _Taken:
    """Steps of an engine, one after the other."""

    def __init__(self, plan: Plan, engine: Engine, batches: Iterator[Batch]) -> None:
        self._plan, self._engine, self._batches = plan, engine, batches
        self._on_cuda = plan.hardware.kind == "cuda"
        self._number = 0

    def warm_up(self) -> None:
        """Take steps that do not count."""
        for _ in range(WARM_UP):
            self._take()
        self._wait()

    def timed(self, count: int) -> list[float]:
        """Return the seconds of each of so many steps, without a profiler; a GPU runs through them without a stop."""
        moments = [self._moment()]
        for _ in range(count):
            self._take()
            moments.append(self._moment())
        self._wait()
        if self._on_cuda:
            return [first.elapsed_time(then) / 1000 for first, then in pairwise(moments)]
        return [then - first for first, then in pairwise(moments)]

    def profiled(self, count: int) -> list[Any]:
        """Return what the profiler hears of so many steps; a first one, in which it sets itself up, is not marked."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_cuda else [])]
        with profile(activities=activities) as profiler:
            self._take()
            self._wait()
            for _ in range(count):
                with mark("step"):
                    self._take()
            with mark("wait"):
                self._wait()
        return events_of(profiler)

    def _take(self) -> None:
        """Take a step as the shipped loop does, without what that does every so many steps."""
        engine, recipe = self._engine, self._plan.recipe
        with mark("data"):
            batch = next(self._batches)
        seed_step(recipe.seed, self._number, engine.spread.reader)
        self._number += 1
        micro_batches = engine.micro_batches(batch)
        while (micro := self._next(micro_batches)) is not None:
            with mark("forward"):
                output = engine.model(**micro)
            with mark("backward"):
                engine.backward(output)
            del output
        with mark("update"):
            engine.step(recipe.train.max_grad_norm)

    def _next(self, micro_batches: Iterator[Batch]) -> Batch | None:
        with mark("batch"):
            return next(micro_batches, None)

    def _moment(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _wait(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()
