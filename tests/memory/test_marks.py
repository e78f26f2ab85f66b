"""Marks: seen in a profile, gone afterwards, and without effect on what a step computes or holds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from bigtrain import optim, recompute
from bigtrain.memory.marks import (
    BLOCK,
    GRADIENT,
    address,
    mark,
    mark_gradients,
    marked,
    place_of,
    tensors_in,
    tensors_kept,
)
from bigtrain.memory.measure import Trace, measure, record
from bigtrain.sharding.apply import hand_over_gradients, local_parameters, shard


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4, bias=False))


def names(trace: Trace, kind: str) -> list[str]:
    return [operation.name.removeprefix(f"bigtrain::{kind}") for operation in trace.marks(kind)]


def backward_of(model: nn.Module, x: Tensor) -> Callable[[], None]:
    return lambda: model(x).sum().backward()


def test_a_mark_is_in_the_profile() -> None:
    def run() -> None:
        with mark("forward"):
            torch.zeros(10)

    trace = record(run)
    assert names(trace, "") == ["forward"]
    (allocation,) = trace.allocations
    assert allocation.operation is not None
    assert [operation.name for operation in allocation.operation.outwards()][-1] == "bigtrain::forward"


def test_blocks_and_gradients_are_marked_by_name() -> None:
    model = small()

    def run() -> None:
        with marked(model, ["0", "2"]):
            backward_of(model, torch.ones(3, 8))()

    trace = record(run)
    assert names(trace, BLOCK) == ["0", "2"]
    arrived = dict(name.split(" ") for name in names(trace, GRADIENT))
    gradients = {str(address(p.grad)): name for name, p in model.named_parameters() if p.grad is not None}
    assert {where: name.split(".")[0] for where, name in gradients.items()} == arrived


def test_nothing_is_marked_afterwards() -> None:
    model = small()
    with marked(model, ["0"]):
        pass
    assert not names(record(backward_of(model, torch.ones(3, 8))), "")
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


def test_marks_hold_nothing(torch_seed: int) -> None:
    model, x = small(), torch.randn(64, 8)
    plain = measure(backward_of(copy.deepcopy(model), x))

    def run() -> None:
        with marked(model, ["0", "2"]):
            backward_of(model, x)()

    assert measure(run).timeline == plain.timeline


def test_a_block_that_fails_leaves_no_mark_open() -> None:
    model = small()

    def run() -> None:
        with marked(model, ["0"]):
            try:
                model(torch.ones(3, 5))
            except RuntimeError:
                torch.zeros(10)

    trace = record(run)
    outside = trace.allocations[-1].operation
    assert outside is not None
    assert not any(operation.name.startswith("bigtrain::") for operation in outside.outwards())


def test_a_compiled_block_is_marked_around_what_it_was_compiled_to() -> None:
    block = nn.Linear(8, 8)
    calls: list[str] = []

    def compiled(x: Tensor) -> Tensor:
        calls.append("compiled")
        return x

    block._compiled_call_impl = compiled
    model = nn.ModuleList([block])

    def run() -> None:
        with marked(model, ["0"]):
            block(torch.ones(2, 8))

    assert names(record(run), BLOCK) == ["0"]
    assert calls == ["compiled"]
    assert block._compiled_call_impl is compiled


def test_recomputation_is_left_as_it_is(torch_seed: int) -> None:
    model = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.GELU())])
    recompute.apply(model, "full")
    x = torch.randn(4, 8, requires_grad=True)

    def run() -> None:
        with marked(model, ["0"]):
            model[0](x).sum().backward()

    assert names(record(run), BLOCK) == ["0"]
    assert model[0][0].weight.grad is not None


def test_gradients_that_are_there_can_be_marked() -> None:
    model = small()
    backward_of(model, torch.ones(3, 8))()
    trace = record(lambda: mark_gradients(model, ["2"]))
    assert [name.partition(" ")[2] for name in names(trace, GRADIENT)] == ["", "", "2"]


def test_a_parameter_belongs_to_the_block_that_its_name_begins_with() -> None:
    assert place_of("blocks.1.mlp.up.weight", ["blocks.0", "blocks.1"]) == "blocks.1"
    assert place_of("blocks.10.weight", ["blocks.1"]) == ""
    assert place_of("tokens.weight", ["blocks.1"]) == ""


def test_what_a_model_and_its_optimizer_keep() -> None:
    model = nn.ModuleDict({"block": nn.BatchNorm1d(4), "out": nn.Linear(4, 600, bias=False).bfloat16()})
    optimizer = optim.AdamW(model["out"].parameters(), master_weights="split24")
    model["out"].weight.grad = torch.ones_like(model["out"].weight)
    optimizer.step()
    kept = tensors_kept(model, optimizer, ["block"])
    state = optimizer.state[model["out"].weight]
    assert kept[address(model["block"].running_mean)] == ("weights", "block")
    assert kept[address(model["out"].weight)] == ("weights", "")
    assert kept[address(state["remainder"])] == ("master_weights", "")
    assert kept[address(state["exp_avg"])] == ("optimizer_state", "")


@pytest.fixture
def sharded() -> Iterator[nn.Sequential]:
    """Return a model cut among one rank, whose parameters are gathered by copying."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = small()
    mesh = init_device_mesh("cpu", (1,))
    shard(model, [model[0]], mesh, zero_stage=3)
    yield model
    dist.destroy_process_group()


def test_of_sharded_models_gathered_parameters_are_marked(sharded: nn.Sequential) -> None:
    x, hooks = torch.ones(3, 8), [len(module._forward_pre_hooks) for module in sharded.modules()]

    def run() -> None:
        with marked(sharded, ["0", "2"]):
            backward_of(sharded, x)()
            backward_of(sharded, x)()

    trace = record(run)
    assert names(trace, BLOCK) == ["0", "2"] * 2
    places = [name.partition(" ")[2] for name in names(trace, GRADIENT)]
    assert sorted(places) == ["0"] * 4 + ["2"] * 2  # weight and bias, and a weight, in each of two passes
    assert [len(module._forward_pre_hooks) for module in sharded.modules()] == hooks
    assert not [name for name in names(record(backward_of(sharded, x)), "") if name.startswith(GRADIENT)]


def test_of_sharded_models_the_parts_are_kept(sharded: nn.Sequential) -> None:
    mine = dict(zip(dict(sharded.named_parameters()), local_parameters(sharded.parameters()), strict=True))
    optimizer = optim.AdamW(mine.values())
    backward_of(sharded, torch.ones(3, 8))()
    trace = record(lambda: mark_gradients(sharded, ["0"]))
    arrived = dict(name.split(" ") for name in names(trace, GRADIENT) if not name.endswith(" "))
    assert set(arrived) == {str(address(p.grad)) for p in sharded[0].parameters() if p.grad is not None}
    hand_over_gradients(sharded.parameters(), mine.values())
    optimizer.step()
    kept = tensors_kept(sharded, optimizer, ["0"], mine)
    assert kept[address(mine["0.weight"])] == ("weights", "0")
    assert kept[address(mine["2.weight"])] == ("weights", "")
    assert kept[address(optimizer.state[mine["0.bias"]]["exp_avg"])] == ("optimizer_state", "0")
    assert {address(parameter) for parameter in sharded.parameters()} <= set(kept)


def test_tensors_at_any_depth() -> None:
    one, two, three = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    assert [len(tensor) for tensor in tensors_in({"a": one, "b": [two, {"c": (three, 5)}], "d": "text"})] == [1, 2, 3]
