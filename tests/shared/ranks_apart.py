"""Ranks that are threads, and what each of them has of a model that is cut by rows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bigtrain.amp.loss_scale import LossScale
from bigtrain.sharding.part import Part, Shape
from bigtrain.world import ALONE, World

PATIENCE_SECONDS = 30


class Meeting:
    """Where threads tell each other something; who waits too long fails."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=PATIENCE_SECONDS)
        self._told: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._told[rank] = value
        self._barrier.wait()
        found = list(self._told)
        self._barrier.wait()
        return found


@dataclass(frozen=True, slots=True)
class ThreadWorld(World):
    """A place among threads."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def gather(self, text: str) -> list[str]:
        return self.meeting.exchange(self.rank, text)

    def _reduced(self, values: Sequence[float], how: str) -> list[float]:
        merge = {"SUM": sum, "MAX": max}[how]
        return [float(merge(column)) for column in zip(*self.meeting.exchange(self.rank, values), strict=True)]


def on_ranks(size: int, work: Callable[[World], Any]) -> list[Any]:
    """Return what each rank returned, or what it raised. Fails if one of them hangs."""
    if size == 1:
        return [_outcome(work, ALONE)]
    meeting, outcomes = Meeting(size), [None] * size

    def run(rank: int) -> None:
        outcomes[rank] = _outcome(work, ThreadWorld(rank, size, rank, size, meeting))

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE_SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    return outcomes


def _outcome(work: Callable[[World], Any], world: World) -> Any:
    try:
        return work(world)
    except BaseException as error:
        return error


def succeeded(outcomes: Sequence[Any]) -> list[Any]:
    """Return what ranks returned, or raise what one of them raised."""
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return list(outcomes)


def rows_of(whole: Shape, shards: int, shard: int) -> Part:
    """Return what a rank has of a tensor that torch.chunk cuts."""
    most = -(-whole[0] // shards)
    first = min(shard * most, whole[0])
    return Part(whole, (first, *(0 for _ in whole[1:])), (min(most, whole[0] - first), *whole[1:]))


def cut(tensor: Tensor, part: Part) -> Tensor:
    """Return a part of a tensor in memory of its own."""
    for dim, (start, length) in enumerate(zip(part.start, part.shape, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor.clone(memory_format=torch.contiguous_format)


@dataclass
class CutEngine:
    """What checkpoints need of an engine, for a model that is whole and an optimizer that has rows."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    parts: dict[str, Part]
    optimizer: Optimizer
    world: World
    shards: int
    shard_rank: int
    writes: bool
    steps_taken: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    loss_scale: LossScale = field(default_factory=lambda: LossScale("cpu", precision="fp32"))

    @property
    def spread(self) -> Any:
        """Return what says that no other rank has the same parts, of those that have the model between them."""
        return SimpleNamespace(own=frozenset(self.parameters))

    def laid_out(self, *, changed: bool = False) -> AbstractContextManager[None]:
        """Leave rows as they are."""
        return nullcontext()


def cut_engine(
    model: nn.Module, build: Callable[[list[nn.Parameter]], Optimizer], world: World, shards: int | None = None
) -> CutEngine:
    """Return the engine of a rank; fewer shards than ranks make replicas."""
    shards = shards or world.size
    shard = world.rank % shards
    parts = {name: rows_of(tuple(p.shape), shards, shard) for name, p in model.named_parameters()}
    parameters = {name: nn.Parameter(cut(p.detach(), parts[name])) for name, p in model.named_parameters()}
    optimizer = build(list(parameters.values()))
    return CutEngine(model, parameters, parts, optimizer, world, shards, shard, world.rank < shards)


def step(engine: CutEngine, seed: int) -> None:
    """Take an optimizer step with the same whole gradients on any ranks."""
    for index, (name, parameter) in enumerate(engine.parameters.items()):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        gradient = torch.randn(engine.parts[name].whole, generator=generator)
        parameter.grad = cut(gradient, engine.parts[name]).to(parameter.dtype)
    engine.optimizer.step()
    engine.steps_taken += 1


class Position:
    """A loader that only counts."""

    def __init__(self) -> None:
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"row": self.position, "corpus": "none"}

    def load_state_dict(self, state: dict[str, Any], *, other_data: bool = False) -> None:
        self.position = state["row"]
