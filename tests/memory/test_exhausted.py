"""Out of memory in words: sizes, places, what was asked for, and how far off the prediction was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bigtrain import optim
from bigtrain.memory.exhausted import Exhausted, exhausted, grouped, is_out_of_memory, requested_bytes
from bigtrain.memory.report import MemoryReport

CPU = (
    "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "67108864 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.2 GiB is free."
)
MIB = 2**20
PREDICTED = MemoryReport({"weights": 60 * MIB, "activations": 40 * MIB}, 110 * MIB, 200 * MIB, 300 * MIB)


@pytest.mark.parametrize(
    ("text", "size"),
    [(CPU, 64 * MIB), (CUDA, 2.5 * 2**30), ("CUDA out of memory. Tried to allocate 20.00 MiB.", 20 * MIB), ("?", 0)],
)
def test_what_was_asked_for_is_read(text: str, size: int) -> None:
    assert requested_bytes(text) == size


def test_only_the_allocators_errors_count() -> None:
    assert is_out_of_memory(RuntimeError(CPU))
    assert is_out_of_memory(torch.OutOfMemoryError(CUDA))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_equal_neighbours_are_one() -> None:
    places = [("blocks.0", 5), ("blocks.1", 5), ("blocks.2", 5), ("blocks.3", 7), ("outside", 5)]
    assert grouped(places) == [("blocks.0 to blocks.2, each", 5), ("blocks.3", 7), ("outside", 5)]
    assert grouped([]) == []


class Net(nn.Module):
    """Two blocks, of which one asks for more than any machine has."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8, bias=False), Greedy()])
        self.out = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Greedy(nn.Linear):
    """A block that cannot be run."""

    def __init__(self) -> None:
        super().__init__(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.empty(2**60 // 4)[0]


class Engine:
    """Stands in for the engine by its name: the phase is told by the function that was running."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self.model(torch.ones(2, 8))


def caught(model: nn.Module, call: object) -> Exhausted:
    optimizer = optim.AdamW(model.parameters())
    weight = model.blocks[0].weight
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(RuntimeError) as found:
        call()
    assert is_out_of_memory(found.value)
    blocks = ["blocks.0", "blocks.1"]
    return exhausted(found.value, model, optimizer, blocks, device="cpu", resident_bytes=1000)


def test_who_holds_what_and_where_it_was() -> None:
    model = Net()
    found = caught(model, lambda: model(torch.ones(2, 8)))
    assert found.requested_bytes == 2**60
    assert found.where == "forward of blocks.1"
    assert found.known == {
        ("weights", "blocks.0"): 256,
        ("optimizer_state", "blocks.0"): 516,
        ("weights", "blocks.1"): 256,
        ("weights", ""): 128,
        ("gradients", "blocks.0"): 256,
    }


def test_the_phase_is_that_of_the_engine() -> None:
    model = Net()
    loss = model.out(torch.ones(2, 8)).sum()
    assert caught(model, lambda: Engine(model).backward(loss)).where == "backward of blocks.1"


KNOWN = {("weights", "blocks.0"): 40 * MIB, ("weights", ""): 20 * MIB, ("gradients", "blocks.0"): 10 * MIB}


def test_a_prediction_that_was_too_low() -> None:
    found = Exhausted(KNOWN, 90 * MIB, 30 * MIB, "backward of blocks.0", "cuda")
    first, causes, blocks, beside = found.lines(PREDICTED)
    assert first == "out of memory in the backward of blocks.0: 30.00 MiB more were asked for with 90.00 MiB allocated"
    assert causes == (
        "held by cause: weights 60.00 MiB, gradients 10.00 MiB, the rest (activations, logits, temporaries) 20.00 MiB"
    )
    assert blocks == "held by block, for good: blocks.0 50.00 MiB, outside of the blocks 20.00 MiB"
    assert beside == (
        "predicted: a peak of 100.00 MiB (weights 60.00 MiB, activations 40.00 MiB); "
        "too low by at least 20.00 MiB (20.0%)"
    )


def test_memory_that_was_not_there() -> None:
    found = Exhausted(KNOWN, 70 * MIB, 5 * MIB, "forward", "cuda")
    assert found.needed_bytes == 75 * MIB
    assert "not reached: less was there than the budget" in found.lines(PREDICTED)[-1]


def test_on_a_cpu_the_process_counts() -> None:
    found = Exhausted({}, 250 * MIB, 0, "update", "cpu")
    assert found.predicted_bytes(PREDICTED) == 300 * MIB
    first, causes, blocks, _ = found.lines(PREDICTED)
    assert first == "out of memory in the update: more was asked for with 250.00 MiB resident"
    assert "libraries) 250.00 MiB" in causes
    assert blocks == "held by block, for good: nothing"


def test_without_resident_bytes_tensors_are_compared() -> None:
    found = Exhausted({}, 250 * MIB, 0, "update", "cpu")
    assert found.predicted_bytes(MemoryReport({"weights": 7})) == 7
