"""The states of an optimizer: what a rank writes of them, and reads."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Set
from itertools import groupby
from operator import itemgetter
from typing import Any

from torch import Tensor

from bigtrain.checkpoint.moments import Kind, Moment, kind_of, part_of, read_moment
from bigtrain.checkpoint.stored import StoredTensors
from bigtrain.checkpoint.together import together
from bigtrain.engine import Engine
from bigtrain.errors import CheckpointError
from bigtrain.optim.piecewise import Piecewise
from bigtrain.optim.quantize import State
from bigtrain.optim.weights import MASTER
from bigtrain.sharding.part import Part

Read = tuple[str, State, int]
"""A parameter's name, this rank's part of some of its states, and how many of those were rounded anew."""


def state_format(engine: Engine) -> str:
    """Return the format of an engine's moments; those of other optimizers are as they are."""
    return engine.optimizer.state_format if isinstance(engine.optimizer, Piecewise) else "fp32"


def optimizer_state(engine: Engine) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's states as tensors and as plain values, each under `PARAMETER.KEY`."""
    moments: dict[str, Tensor] = {}
    counters: dict[str, Any] = {}
    for name, parameter in engine.parameters.items():
        for key, value in engine.optimizer.state.get(parameter, {}).items():
            if key != MASTER:  # the weights, which are stored as such
                (moments if isinstance(value, Tensor) else counters)[f"{name}.{key}"] = value
    return moments, counters


def own_states(engine: Engine) -> tuple[dict[str, Tensor], dict[str, Part]]:
    """Return the states that this rank writes, and which are parts; what is the same on all, the first writes."""
    moments, _ = optimizer_state(engine)
    if engine.shards == 1:
        return moments, {}
    parameters, parts, own = engine.parameters, engine.parts, engine.spread.own
    written: dict[str, Tensor] = {}
    found: dict[str, Part] = {}
    for full_name, value in moments.items():
        name, _, key = full_name.rpartition(".")
        kind = kind_of(engine.optimizer, parameters[name], key, tuple(value.shape), tuple(parameters[name].shape))
        part = part_of(kind, parts[name])
        if name in own and (kind != "whole" or engine.shard_rank == 0):
            written[full_name] = value
            if part is not None:
                found[full_name] = part
    return written, found


def load_optimizer(engine: Engine, stored: StoredTensors, counters: Mapping[str, Any], stored_format: str) -> None:
    """Give an optimizer this rank's part of the states of a checkpoint.

    Says on standard error how many moments had to be rounded anew, since the blocks of theirs fell differently. Raises
    CheckpointError for a state of an unknown parameter.
    """
    parameters = engine.parameters
    for full_name in (*counters, *stored.entries):
        name, _, _ = full_name.rpartition(".")
        if name not in parameters:
            raise CheckpointError(f"{stored.files[0]}: a state of {name!r}, which is not in the model")
    _forget(engine, {full_name.rpartition(".")[0] for full_name in (*counters, *stored.entries)})
    for full_name, value in counters.items():
        name, _, key = full_name.rpartition(".")
        engine.optimizer.state[parameters[name]][key] = value
    told = together(engine.world, lambda: {"rounded": _take_states(engine, stored, stored_format)})
    rounded = max(one["rounded"] for one in told)
    if rounded and engine.world.first:
        kept = f"{stored_format} states of {len(stored.files)} shards"
        here = f"{state_format(engine)} states of {engine.shards}"
        print(f"{stored.folder}: {rounded} moments were rounded anew: {kept} to {here}", file=sys.stderr)


def _forget(engine: Engine, kept: Set[str]) -> None:
    """Drop the states of parameters that have none in a checkpoint: of later steps than it is."""
    for name, parameter in engine.parameters.items():
        state = engine.optimizer.state.get(parameter, {})
        if name not in kept:
            for key in [key for key in state if key != MASTER]:
                del state[key]


def _take_states(engine: Engine, stored: StoredTensors, stored_format: str) -> int:
    """Read and give all states, one after another; return how many moments were rounded anew."""
    rounded, states = 0, _read_states(engine, stored, stored_format)
    if getattr(engine.optimizer, "staging", None) is not None:
        states = _by_parameter(states)  # which then lie in one buffer
    for name, state, anew in states:
        _give(engine, engine.parameters[name], state)
        rounded += anew
    return rounded


def _by_parameter(states: Iterable[Read]) -> Iterator[Read]:
    for name, those in groupby(states, itemgetter(0)):
        whole: State = {}
        rounded = 0
        for _, state, anew in those:
            whole |= state
            rounded += anew
        yield name, whole, rounded


def _read_states(engine: Engine, stored: StoredTensors, stored_format: str) -> Iterator[Read]:
    """Yield one state after another."""
    parameters, parts, optimizer = engine.parameters, engine.parts, engine.optimizer
    for full_name in stored.entries:
        name, _, key = full_name.rpartition(".")
        kind = _stored_kind(engine, parameters[name], key, stored.shape(full_name), parts[name])
        if kind == "moment":
            assert isinstance(optimizer, Piecewise)
            moment = Moment(full_name, key, optimizer.moments(parameters[name])[key], stored_format)
            yield name, *read_moment(stored, moment, parts[name], optimizer.state_format)
        elif kind != "scale":
            part = part_of(kind, parts[name]) or Part.of_whole(stored.shape(full_name))
            yield name, {key: stored.read(full_name, part)}, False


def _stored_kind(engine: Engine, parameter: Tensor, key: str, shape: tuple[int, ...], part: Part) -> Kind:
    if isinstance(engine.optimizer, Piecewise) or not part.complete:
        return kind_of(engine.optimizer, parameter, key, shape, part.whole)
    return "whole"  # one rank that has all of it takes it as it is


def _give(engine: Engine, parameter: Tensor, state: State) -> None:
    if isinstance(engine.optimizer, Piecewise):
        engine.optimizer.take_state(parameter, state)
        return
    on_device = any(group.get("fused") or group.get("capturable") for group in engine.optimizer.param_groups)
    for key, value in state.items():
        placed = value.to(parameter.device) if key != "step" or on_device else value
        engine.optimizer.state[parameter][key] = placed
