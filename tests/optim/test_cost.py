"""The price of optimizers: predicted is measured, states to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bigtrain.config.schema import OptimizerSection
from bigtrain.errors import InputError
from bigtrain.optim import build_optimizer
from bigtrain.optim.cost import (
    EXCHANGED_ELEMENTS,
    MASTER_WEIGHTS,
    OPTIMIZERS,
    STATES,
    buffer_bytes,
    check,
    exchanged_elements,
    optimizer_state_bytes,
    piece_elements,
    releasable,
    staged_bytes,
    state_bytes,
    step_temporary_bytes,
    supported_states,
)

MODELS = {
    "small": [(3, 6), (6,), (5, 2)],
    "odd": [(67, 97), (97,), (4097,), (3, 5, 7), (64, 64)],
    "large": [(300, 517), (1000, 200), (200,)],
    "vector": [(140000,), (7,)],
}
COMBINATIONS = [(name, state, weights) for name in OPTIMIZERS for state in STATES for weights in MASTER_WEIGHTS]
each = pytest.mark.parametrize(
    ("name", "state", "weights"), [c for c in COMBINATIONS if c[1] in supported_states(c[0])]
)


def measured(name: Any, state: Any, weights: str, shapes: list[tuple[int, ...]]) -> tuple[int, int]:
    """Return the bytes of the states, and the most that two steps, the first included, allocated beyond them."""
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    section = OptimizerSection(name=name, state=state, learning_rate=1e-3)
    optimizer = build_optimizer(parameters, section, master_weights=weights)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        optimizer.step()
        optimizer.step()
    results: Any = recorded.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    tensors = [v for kept in optimizer.state.values() for v in kept.values() if isinstance(v, Tensor)]
    states = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return states, peak - states


@each
@pytest.mark.parametrize("model", ["small", "odd", "large"])
def test_predicted_is_measured(name: str, state: str, weights: str, model: str) -> None:
    shapes = MODELS[model]
    states, temporaries = measured(name, state, weights, shapes)
    assert optimizer_state_bytes(name, state, weights, shapes) == states
    predicted = step_temporary_bytes(name, state, weights, shapes)
    assert temporaries == pytest.approx(predicted, rel=0.01, abs=512)


@pytest.mark.parametrize("name", ["adamw", "lamb", "adafactor"])
def test_a_vector_of_several_pieces(name: str) -> None:
    states, temporaries = measured(name, "fp32", "split24", MODELS["vector"])
    assert optimizer_state_bytes(name, "fp32", "split24", MODELS["vector"]) == states
    predicted = step_temporary_bytes(name, "fp32", "split24", MODELS["vector"])
    assert temporaries == pytest.approx(predicted, rel=0.01, abs=512)


@each
def test_a_rank_without_rows_keeps_what_is_predicted(name: str, state: str, weights: str) -> None:
    shapes = [(0, 6), (0,), (0, 5000), (0, 3, 2)]
    states, _ = measured(name, state, weights, shapes)
    assert optimizer_state_bytes(name, state, weights, shapes) == states


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_ranks_exchange_lies_in_a_buffer(name: str) -> None:
    shapes = MODELS["odd"]
    more = buffer_bytes(name, "fp32", "fp32", shapes, sharded=True) - buffer_bytes(name, "fp32", "fp32", shapes)
    assert more == (4 * EXCHANGED_ELEMENTS if name == "adafactor" else 0)


def test_columns_that_are_exchanged_have_room() -> None:
    assert exchanged_elements([]) == exchanged_elements([(5,), ()]) == 0
    assert exchanged_elements([(5, 7), (3,)]) == EXCHANGED_ELEMENTS
    assert exchanged_elements([(5, 7), (3, 4, EXCHANGED_ELEMENTS)]) == 4 * EXCHANGED_ELEMENTS + 1


def test_only_what_goes_by_element_is_released_on_several_ranks() -> None:
    assert [name for name in OPTIMIZERS if releasable(name, sharded=True)] == ["adamw"]
    assert all(releasable(name, sharded=False) for name in OPTIMIZERS)


def test_fp32_adamw_has_no_temporaries() -> None:
    assert step_temporary_bytes("adamw", "fp32", "fp32", MODELS["large"]) == 0


def test_temporaries_do_not_grow_with_the_tensor() -> None:
    sizes = {step_temporary_bytes("adamw", "8bit", "split24", [(rows, 1024)]) for rows in (1000, 10000, 100000)}
    assert len(sizes) == 1
    assert sizes.pop() < 4 * 2**20


def test_bytes_per_parameter() -> None:
    shape = (1024, 4096)
    per_parameter = {
        (state, weights): optimizer_state_bytes("adamw", state, weights, [shape]) / (1024 * 4096)
        for state in STATES
        for weights in MASTER_WEIGHTS
    }
    assert per_parameter["fp32", "fp32"] == pytest.approx(8, abs=1e-5)
    assert per_parameter["8bit", "split24"] == pytest.approx(3 + 2 * 4 / 256, abs=1e-5)
    assert per_parameter["4bit", "none"] == pytest.approx(1 + 2 * 4 / 128, abs=1e-5)


def test_the_sum_by_counts_is_that_by_shapes() -> None:
    shapes = MODELS["odd"]
    parameters = sum(torch.Size(shape).numel() for shape in shapes)
    for name in ("adamw", "lamb"):
        assert state_bytes(name, parameters, len(shapes)) == optimizer_state_bytes(name, "fp32", "fp32", shapes)


def test_matrices_of_muon_keep_one_moment() -> None:
    shapes = [(10, 10), (20, 10)]
    assert optimizer_state_bytes("muon", "fp32", "fp32", shapes) == 4 * 300 + 8
    assert optimizer_state_bytes("muon", "fp32", "fp32", shapes, matrices=[1]) == 8 * 100 + 4 * 200 + 8
    assert optimizer_state_bytes("muon", "fp32", "fp32", shapes, matrices=[]) == 8 * 300 + 8


def test_states_that_are_supported() -> None:
    assert supported_states("adafactor") == ("fp32",)
    assert all(supported_states(name) == STATES for name in ("adamw", "lamb", "muon"))


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        (("sgd", "fp32", "fp32"), "optimizer.name: 'sgd' is none of adamw, lamb, muon, adafactor"),
        (("adamw", "2bit", "fp32"), "optimizer.state: '2bit' is none of"),
        (("adamw", "fp32", "fp64"), "amp.master_weights: 'fp64' is none of"),
        (("adafactor", "bf16", "none"), "bf16: adafactor keeps rows and columns only; use fp32"),
    ],
)
def test_what_does_not_exist_is_refused(choice: tuple[str, str, str], text: str) -> None:
    with pytest.raises(InputError, match=text):
        check(*choice)


def test_pieces_are_no_larger_than_the_largest_tensor() -> None:
    assert piece_elements("cpu", [(3, 4), (20,)]) == 20
    assert piece_elements("cpu", [(10**6, 10)]) < 10**6
    assert piece_elements("cpu", []) == 1


def test_what_visits_begins_at_whole_multiples() -> None:
    assert [staged_bytes(sizes) for sizes in ([], [0], [1], [512], [513, 1])] == [0, 0, 512, 512, 1536]


def test_narrow_gradients_of_fp32_weights_are_widened() -> None:
    shapes = [(64, 64)]
    plain, narrow, summed = (
        buffer_bytes("adamw", "fp32", "fp32", shapes, **kind)
        for kind in ({}, {"narrow": True}, {"narrow": True, "accumulated": True})
    )
    assert (plain, narrow, summed) == (0, 4 * 4096, 0)
