"""What passes have to do, held against what is known of it: FLOPs, families, recompute policies."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bigtrain.config.model import ModelConfig
from bigtrain.models.cost import MicroBatch
from bigtrain.models.operations_cost import Numbers
from bigtrain.models.shape import flops_per_token
from bigtrain.planner.hardware import of_name
from bigtrain.planner.rates import rates_of
from bigtrain.planner.roofline import Roofline, Work
from bigtrain.planner.work import CHECKPOINT_CALLS, MODULE_CALLS, TAPE_CALLS, ModelWork

CPU = rates_of(of_name("cpu-laptop"), "fp32", 4)
GPU = rates_of(of_name("a100-80gb"), "bf16", 1)
PURE = dataclasses.replace(
    CPU,
    product_flops_per_second=1.0,
    memory_bytes_per_second=float("inf"),
    cache_bytes=0,
    cache_bytes_per_second=float("inf"),
    fresh_seconds_per_byte=0.0,
    arithmetic={},
    attention_share=(1.0, 1.0),
)
"""A CPU on which only the FLOPs of products and attention take time, a second each."""

FAMILIES = ("bert", "gpt", "llama")
LOW = Numbers(activation=2, weight=4, gradient=4)
WIDENED = Numbers(activation=2, weight=4, gradient=4, widened=True)


def config(family: Any, **keys: Any) -> ModelConfig:
    shape = {
        "vocab_size": 1024,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 1024,
        "max_position_embeddings": 256,
        "initializer_range": 0.02,
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": family != "llama",
    }
    return ModelConfig(family=family, **{**shape, **keys})


def batch(rows: int = 4, length: int = 128, *, gathered: bool = False) -> MicroBatch:
    tokens = rows * length
    return MicroBatch(tokens, tokens // 4 if gathered else tokens, length, gathered)


def work(family: str, rates: Any = CPU, numbers: Numbers | None = None, **keys: Any) -> ModelWork:
    return ModelWork(config(family), Roofline(rates), numbers or Numbers(), 4096, **keys)


def total(model: ModelWork, micro: MicroBatch) -> Work:
    block, (first, last) = model.block(micro), model.ends(micro)
    return (block.forward + block.backward) * model.config.num_hidden_layers + first + last


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_of_the_formula(family: str) -> None:
    """Attention's backward pass computes the scores again: 2.5 times its forward pass, where the formula has 2."""
    micro = batch()
    model = work(family, PURE)
    seconds = total(model, micro).seconds
    formula = micro.tokens * flops_per_token(model.config, micro.longest)
    again = 0.5 * 4 * micro.tokens * micro.longest * 256 * 4
    assert seconds == pytest.approx(formula + again, rel=1e-9)


def test_the_head_works_on_labelled_positions_alone() -> None:
    model = work("bert", PURE)
    all_labelled, some = (model.ends(batch(gathered=gathered))[0].seconds for gathered in (False, True))
    assert some == pytest.approx(all_labelled / 4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rates", [CPU, GPU], ids=["cpu", "cuda"])
def test_policies_are_ordered(family: str, rates: Any) -> None:
    """By what the device does; of small blocks on a GPU, Python may take longer and `selective` the most."""
    block = work(family, rates, dropout=0.1).block(batch(64))
    again = {policy: added.seconds for policy, added in block.recompute.items()}
    assert (again["none"] == 0) == (rates.kind == "cuda")
    assert 0 < again["selective"] < again["full"]
    assert again["offload"] == again["full"]


def test_full_recomputation_stops_at_what_is_needed() -> None:
    """Pre-norm blocks without dropout end in a product and a sum that no saved tensor depends on."""
    for family, dropout, complete in (("gpt", 0.0, False), ("gpt", 0.1, True), ("bert", 0.0, True)):
        block = work(family, dropout=dropout).block(batch())
        assert (block.recompute["full"].seconds == block.forward.seconds) is complete


def test_selective_recomputation_repeats_no_product() -> None:
    assert work("gpt", PURE).block(batch()).recompute["selective"].seconds == 0


def test_selective_recomputation_costs_python_for_each_operation() -> None:
    eager = work("gpt", GPU).block(batch(1, 8))
    fused = ModelWork(config("gpt"), Roofline(GPU, True), Numbers(), 4096).block(batch(1, 8))
    operations = eager.forward.calls / (1 + MODULE_CALLS)
    assert eager.recompute["selective"].calls > CHECKPOINT_CALLS + TAPE_CALLS * operations
    assert fused.recompute["selective"].calls < fused.forward.calls


def test_running_a_block_again_costs_python() -> None:
    block = work("bert").block(batch(1, 8))
    assert block.recompute["full"].calls == pytest.approx(block.forward.calls + CHECKPOINT_CALLS)
    assert block.recompute["full"].seconds == pytest.approx(block.forward.seconds)


@pytest.mark.parametrize("family", FAMILIES)
def test_backward_takes_about_twice_as_long(family: str) -> None:
    block = work(family).block(batch(16))
    assert 1.5 < block.backward.seconds / block.forward.seconds < 3


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_costs_time(family: str) -> None:
    plain, dropping = (work(family, dropout=dropout) for dropout in (0.0, 0.1))
    assert dropping.block(batch()).forward.seconds > plain.block(batch()).forward.seconds
    assert dropping.ends(batch())[1].seconds >= plain.ends(batch())[1].seconds


@pytest.mark.parametrize("rates", [CPU, GPU], ids=["cpu", "cuda"])
def test_dropping_probabilities_costs_their_square(rates: Any) -> None:
    extra = [
        work("gpt", rates, attention_dropout=0.1).block(batch(4096 // length, length)).forward.seconds
        - work("gpt", rates).block(batch(4096 // length, length)).forward.seconds
        for length in (128, 1024)
    ]
    assert extra[1] > 4 * extra[0]


def test_widened_products_cost_their_copies() -> None:
    plain, widened = (work("gpt", numbers=numbers).block(batch(16)) for numbers in (Numbers(), WIDENED))
    assert widened.forward.seconds > plain.forward.seconds
    assert widened.backward.seconds > plain.backward.seconds


def test_low_precision_moves_fewer_bytes_on_a_gpu() -> None:
    slow = dataclasses.replace(GPU, memory_bytes_per_second=1e9, product_flops_per_second=1e18)
    wide, low = (work("gpt", slow, numbers).block(batch(64)).forward.seconds for numbers in (Numbers(), LOW))
    assert 0.45 < low / wide < 0.75


def test_weights_are_rounded_where_they_are_kept_wider() -> None:
    kept = Numbers(activation=2, weight=2, gradient=2)
    wide, same = (work("gpt", GPU, numbers).block(batch()).forward for numbers in (LOW, kept))
    assert wide.calls - same.calls == pytest.approx(4 * (1 + MODULE_CALLS))


def test_short_chunks_of_the_loss_read_the_weight_again() -> None:
    many, few = (dataclasses.replace(work("gpt", GPU, LOW), loss_chunk_tokens=chunk) for chunk in (64, 4096))
    assert many.ends(batch(16))[0].seconds > few.ends(batch(16))[0].seconds


def test_untied_embeddings_have_a_gradient_of_their_own() -> None:
    tied, untied = (
        ModelWork(config("llama", tie_word_embeddings=tie), Roofline(CPU), Numbers(), 4096).ends(batch())[1].seconds
        for tie in (True, False)
    )
    assert untied > tied


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rates", [CPU, GPU], ids=["cpu", "cuda"])
def test_more_rows_take_longer_and_are_no_slower_a_token_where_nothing_overflows(family: str, rates: Any) -> None:
    endless = dataclasses.replace(rates, cache_bytes=0, fresh_seconds_per_byte=0.0)
    model, run = work(family, endless), Roofline(endless)
    seconds = [run.elapsed(total(model, batch(rows))) for rows in (1, 4, 32)]
    assert seconds == sorted(seconds)
    a_row = [one / rows for one, rows in zip(seconds, (1, 4, 32), strict=True)]
    assert a_row == sorted(a_row, reverse=True)


def test_bringing_the_batch_is_cheap() -> None:
    model = work("bert")
    assert 0 < model.batch(batch()).seconds < 0.05 * model.block(batch()).forward.seconds
