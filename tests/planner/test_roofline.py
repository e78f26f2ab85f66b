"""Seconds of single operations: more work never takes less, and what limits each is what should."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.planner.hardware import of_name
from bigtrain.planner.rates import Rates, rates_of
from bigtrain.planner.roofline import NOTHING, Roofline, Work

SIZES = st.integers(1, 20000)
CPU, GPU = rates_of(of_name("cpu-laptop"), "fp32", 4), rates_of(of_name("a100-80gb"), "bf16", 1)
RUNS = st.sampled_from([Roofline(CPU), Roofline(GPU), Roofline(GPU, fused=True)])


def cpu(**changes: Any) -> Roofline:
    return Roofline(dataclasses.replace(CPU, **changes))


def test_work_adds_up() -> None:
    assert Work(1, 2) + Work(3, 4) * 2 == Work(7, 10)
    assert Work(1, 2) + NOTHING == Work(1, 2)


def test_calls_add_on_a_cpu_and_run_ahead_of_a_gpu() -> None:
    for rates, expected in ((CPU, 1 + 1000 * CPU.call_seconds), (GPU, 1.0)):
        assert Roofline(rates).elapsed(Work(1, 1000)) == expected
    assert Roofline(GPU).elapsed(Work(1e-9, 1000)) == 1000 * GPU.call_seconds


@given(RUNS, SIZES, SIZES, SIZES)
def test_a_larger_product_never_takes_less(run: Roofline, n: int, i: int, o: int) -> None:
    once, more = run.product(n, i, o), run.product(8 * n, i, o)
    assert 0 < once.seconds <= more.seconds
    assert once.calls == 1


@given(RUNS, SIZES, SIZES, SIZES)
def test_no_product_is_faster_than_the_device(run: Roofline, n: int, i: int, o: int) -> None:
    flops, size = 2 * n * i * o, 4 * (n * i + i * o + n * o)
    seconds = run.product(n, i, o).seconds
    assert seconds >= flops / run.rates.product_flops_per_second
    assert seconds >= size / run.rates.memory_bytes_per_second


def test_operands_come_from_memory_though_a_measured_product_found_them_in_the_cache() -> None:
    """A product that was measured again and again may show no passes at all; where it shows more, they count."""
    moved, seen = 4 * (128 * 256 + 256 * 1024 + 128 * 1024), {}
    for passes in (0.0, 1.0, 20.0):
        run = cpu(operand_passes=passes, mapped_bytes=2**40)
        arithmetic = 2 * 128 * 256 * 1024 / run.rates.product_flops_per_second
        seen[passes] = (run.product(128, 256, 1024).seconds - arithmetic) * run.rates.memory_bytes_per_second / moved
    assert seen[0.0] == pytest.approx(1)
    assert seen[1.0] == pytest.approx(1)
    assert seen[20.0] == pytest.approx(20 * CPU.memory_bytes_per_second / CPU.cache_bytes_per_second)


def test_large_products_reach_the_rate_and_thin_ones_do_not() -> None:
    for run in (Roofline(CPU), Roofline(GPU)):
        reached = [
            2 * n * 4096**2 / run.product(n, 4096, 4096).seconds / run.rates.product_flops_per_second
            for n in (1, 64, 1024, 16384)
        ]
        assert reached == sorted(reached)
        assert reached[0] < 0.2
        assert reached[-1] > 0.85


def test_tiles_that_do_not_fill_the_last_wave_cost_a_wave() -> None:
    assert GPU.multiprocessors == 4 * 27
    full, over = (Roofline(GPU).product(rows, 8192, 27 * 128).seconds for rows in (4 * 128, 4 * 128 + 1))
    assert over > 1.8 * full


def test_a_long_inner_dimension_fills_multiprocessors() -> None:
    """The gradient of a small weight over many tokens: few tiles, cut along the tokens."""
    run = Roofline(GPU)
    rate = 2 * 768 * 65536 * 768 / run.product(768, 65536, 768).seconds
    assert rate > 0.5 * GPU.product_flops_per_second


def test_fresh_memory_takes_its_time_from_a_mebibyte_on() -> None:
    run = cpu(fresh_seconds_per_byte=1e-9)
    assert run.fresh(2**20 - 1) == 0
    assert run.fresh(2**20) == pytest.approx(2**20 * 1e-9)
    new, old = run.pointwise(2**20, 4, 4), run.pointwise(2**20, 4, 4, in_place=True)
    assert new.seconds - old.seconds == pytest.approx(run.fresh(2**22))
    assert Roofline(GPU).fresh(2**30) == 0


def test_what_fits_the_cache_moves_faster() -> None:
    run = cpu(fresh_seconds_per_byte=0.0, cache_bytes=2**20)
    small, large = (run.pointwise(count, 4, 4).seconds / count for count in (2**16, 2**20))
    assert large == pytest.approx(2 * small)


def test_arithmetic_limits_where_it_is_slower_than_memory() -> None:
    run = Roofline(CPU)
    plain, slow = run.pointwise(1000, 4, 4), run.pointwise(1000, 4, 4, "dropout")
    assert slow.seconds == pytest.approx(1000 * CPU.arithmetic["dropout"] / CPU.product_flops_per_second)
    assert slow.seconds > plain.seconds
    assert Roofline(GPU).pointwise(1000, 4, 4, "dropout") == Roofline(GPU).pointwise(1000, 4, 4)


def test_compiled_pointwise_work_is_less() -> None:
    eager, fused = (Roofline(GPU, fused).pointwise(10**7, 4, 4) for fused in (False, True))
    assert fused.seconds < eager.seconds
    assert fused.calls < eager.calls
    assert Roofline(GPU, True).product(64, 64, 64) == Roofline(GPU).product(64, 64, 64)


def test_attention_grows_with_documents_and_their_square() -> None:
    for run in (Roofline(CPU), Roofline(GPU)):
        one = run.attention(2**17, 4096, 512, causal=False).seconds
        assert run.attention(2**18, 4096, 512, causal=False).seconds == pytest.approx(2 * one, rel=0.01)
        assert run.attention(2**17, 8192, 512, causal=False).seconds == pytest.approx(2 * one, rel=0.01)
        assert run.attention(2**17, 4096, 512, causal=False, backward=True).seconds > 2 * one


def test_a_causal_mask_saves_half_of_long_documents() -> None:
    for run, longest, share in (
        (Roofline(GPU), 4096, 0.5),
        (Roofline(CPU), 512, 1.0),
        (Roofline(CPU), 1024, 0.75),
        (Roofline(CPU), 2**16, 0.5),
    ):
        full, causal = (run.attention(2**20, longest, 512, causal=mask).seconds for mask in (False, True))
        assert causal / full == pytest.approx(share, rel=0.02)


def test_a_document_is_a_few_calls_on_a_cpu_and_no_matter_on_a_gpu() -> None:
    calls = [Roofline(CPU).attention(4096, longest, 64, causal=True).calls for longest in (64, 4096)]
    assert calls[0] == 64 * calls[1]
    assert {Roofline(GPU).attention(4096, longest, 64, causal=True).calls for longest in (64, 4096)} == {3}


def test_rates_are_what_they_say() -> None:
    assert isinstance(CPU, Rates)
    assert CPU.kind == "cpu" and GPU.kind == "cuda"
