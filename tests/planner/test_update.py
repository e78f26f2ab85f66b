"""What an update has to do: formats that take more arithmetic take longer, shards take less."""

from __future__ import annotations

import math

import pytest

from bigtrain.optim.cost import MASTER_WEIGHTS, OPTIMIZERS, supported_states
from bigtrain.optim.muon import ITERATIONS
from bigtrain.planner.hardware import of_name
from bigtrain.planner.rates import constants, rates_of
from bigtrain.planner.roofline import Roofline
from bigtrain.planner.update import (
    NEWTON_SCHULZ_STEPS,
    PIECE_CALLS,
    PIECE_PASSES,
    TENSOR_CALLS,
    add,
    clip,
    copy,
    update,
)

CPU = Roofline(rates_of(of_name("cpu-laptop"), "fp32", 4))
GPU = Roofline(rates_of(of_name("a100-80gb"), "bf16", 1))
SHAPES = {"tokens.weight": (8192, 512), "blocks.0.mlp.up.weight": (2048, 512), "blocks.0.mlp.up.bias": (2048,)}
PARAMETERS = sum(map(math.prod, SHAPES.values()))


def seconds(run: Roofline, name: str = "adamw", state: str = "fp32", master: str = "fp32") -> float:
    gradient = 4 if master == "fp32" else 2
    return run.elapsed(update(run, name, state, master, SHAPES, gradient_bytes=gradient))


@pytest.mark.parametrize("run", [CPU, GPU], ids=["cpu", "cuda"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_a_time(run: Roofline, name: str) -> None:
    for state in supported_states(name):
        for master in MASTER_WEIGHTS:
            assert seconds(run, name, state, master) > 0


def test_every_optimizer_and_state_has_its_arithmetic() -> None:
    known = constants()["cpu"]["arithmetic"]
    for name in OPTIMIZERS:
        for state in supported_states(name):
            assert known[f"{name} {state}"] > 0


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon"])
def test_fewer_bits_take_longer_on_a_cpu(name: str) -> None:
    times = [seconds(CPU, name, state) for state in ("fp32", "bf16", "8bit", "4bit")]
    assert times == sorted(times)


@pytest.mark.parametrize("run", [CPU, GPU], ids=["cpu", "cuda"])
def test_fused_adamw_in_fp32_is_the_fastest(run: Roofline) -> None:
    best = seconds(run)
    for name in OPTIMIZERS:
        for state in supported_states(name):
            assert seconds(run, name, state) >= best


def test_fused_adamw_is_memory_traffic_on_a_gpu() -> None:
    work = update(GPU, "adamw", "fp32", "fp32", SHAPES, gradient_bytes=4)
    assert work.seconds == pytest.approx(28 * PARAMETERS / GPU.rates.memory_bytes_per_second, rel=0.1)


def test_master_weights_in_few_bits_cost_arithmetic() -> None:
    plain, none, split = (seconds(CPU, "lamb", "fp32", master) for master in ("fp32", "none", "split24"))
    assert plain < none < split


@pytest.mark.parametrize("run", [CPU, GPU], ids=["cpu", "cuda"])
def test_muon_iterates_on_the_blocks_matrices(run: Roofline) -> None:
    assert NEWTON_SCHULZ_STEPS == ITERATIONS
    embeddings = {"tokens.weight": (8192, 512)}
    with_block = {**embeddings, "blocks.0.mlp.up.weight": (2048, 512)}
    without, more = (
        update(run, "muon", "fp32", "fp32", shapes, gradient_bytes=4).seconds for shapes in (embeddings, with_block)
    )
    flops = 2 * ITERATIONS * (2 * 512 * 512 * 2048 + 512**3)
    assert more - without > flops / run.rates.product_flops_per_second


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_shard_is_a_share(name: str) -> None:
    whole = update(CPU, name, "fp32", "fp32", SHAPES, gradient_bytes=4)
    part = update(CPU, name, "fp32", "fp32", SHAPES, gradient_bytes=4, share=0.25)
    assert part.seconds == pytest.approx(whole.seconds / 4)


def test_pieces_are_kernels_on_a_gpu() -> None:
    pieces = 4 + 1 + 1
    calls = update(GPU, "adamw", "8bit", "fp32", SHAPES, gradient_bytes=4).calls
    assert calls >= pieces * PIECE_CALLS["8bit"]
    assert update(GPU, "adamw", "fp32", "fp32", SHAPES, gradient_bytes=4).calls == 1
    assert set(PIECE_CALLS) == set(PIECE_PASSES) == {"fp32", "bf16", "8bit", "4bit"}


@pytest.mark.parametrize("run", [CPU, GPU], ids=["cpu", "cuda"])
def test_clipping_costs_two_more_passes(run: Roofline) -> None:
    norm, clipped = (clip(run, 10**8, 100, 4, clipped=clipping).seconds for clipping in (False, True))
    assert clipped == pytest.approx(3 * norm, rel=0.2)


def test_many_tensors_are_one_call_on_a_gpu() -> None:
    assert clip(CPU, 1000, 100, 4, clipped=False).calls > TENSOR_CALLS * 100
    assert clip(GPU, 1000, 100, 4, clipped=False).calls < 10


def test_adding_gradients_reads_both() -> None:
    assert add(GPU, 10**8, 1, 4).seconds > add(GPU, 10**8, 1, 2).seconds
    assert add(CPU, 10**6, 50, 4).calls > TENSOR_CALLS * 50


@pytest.mark.parametrize("run", [CPU, GPU], ids=["cpu", "cuda"])
def test_copies_are_memory_traffic(run: Roofline) -> None:
    narrow, wide = (copy(run, 10**9, 3, 2, size) for size in (2, 4))
    assert wide.seconds == pytest.approx(1.5 * narrow.seconds, rel=0.01)
    assert narrow.calls >= 3 * TENSOR_CALLS
