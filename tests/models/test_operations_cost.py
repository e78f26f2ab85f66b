"""Each operation's cost against a profile of the real operation, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain import amp
from bigtrain.ledger import Ledger, Storage, Value
from bigtrain.models.layers import Dropout, rotary_table, rotate
from bigtrain.models.operations_cost import Numbers, Operations
from bigtrain.models.pointwise import RMSNorm, SwiGLU
from bigtrain.processor import has_slow_bf16
from tests.shared.beside_blocks import measure_beside_blocks

N, W, OUT, HEADS, DIM = 256, 96, 160, 6, 16
PRECISIONS = {
    "fp32": ("fp32", "fp32", False),
    "bf16": ("bf16", "fp32", False),
    "split24": ("bf16", "split24", False),
    "accumulated": ("bf16", "split24", True),
}
ROW_AND_COLUMN = 4 * (N + 2 * W)
"""Bytes of what is not counted: sums over rows and columns of the tensors here."""

Run = Callable[[Operations, Value], Value]


def numbers_of(precision: str) -> Numbers:
    name, master_weights, accumulated = PRECISIONS[precision]
    weight = 4 if master_weights == "fp32" else 2
    low = name == "bf16"
    return Numbers(2 if low else 4, weight, 4 if accumulated else weight, widened=low and has_slow_bf16())


def predicted(run: Run, precision: str, width: int) -> int:
    ledger, kept = Ledger(), []
    operations = Operations(ledger, numbers_of(precision), threads=torch.get_num_threads())
    start = ledger.hold(N * width * operations.numbers.activation)
    x = ledger.made(start, [], ledger.keep([]), lambda grad, kept: pytest.fail("the input has no more parents"))
    ledger.nodes.clear()
    before = ledger.now
    out = run(operations, x)
    gradient = ledger.hold(out.size, "temporaries")
    ledger.backward(out, gradient, lambda name, storage: kept.append(storage))
    return ledger.peak - before


def measured(module: Callable[[Tensor], Tensor], precision: str, width: int) -> int:
    name, master_weights, accumulated = PRECISIONS[precision]
    if isinstance(module, nn.Module) and any(True for _ in module.parameters()):
        amp.apply(module, name, master_weights=master_weights, accumulated=accumulated)
    x = torch.randn(N, width, dtype=torch.bfloat16 if name == "bf16" else torch.float32, requires_grad=True)

    def step() -> None:
        out = module(x)
        out.backward(torch.ones_like(out))

    step()
    for tensor in (x, *(module.parameters() if isinstance(module, nn.Module) else ())):
        tensor.grad = None
    return measure_beside_blocks(step).peak_bytes


def rotary(x: Tensor) -> Tensor:
    return rotate(x.unflatten(1, (HEADS, DIM)), TABLE, HEADS - 2).flatten(1)


TABLE = rotary_table(torch.arange(N), DIM, 10000.0)


def rotate_cost(operations: Operations, x: Value) -> Value:
    return operations.rotate(x, [Storage(Ledger(), 0, "activations")], N, HEADS - 2, DIM)


CASES: dict[str, tuple[Callable[[], Any], Run, int]] = {
    "linear": (lambda: nn.Linear(W, OUT), lambda o, x: o.linear(x, "l", N, W, OUT, bias=True), W),
    "linear without bias": (
        lambda: nn.Linear(W, OUT, bias=False),
        lambda o, x: o.linear(x, "l", N, W, OUT, bias=False),
        W,
    ),
    "layer norm": (lambda: nn.LayerNorm(W), lambda o, x: o.layer_norm(x, "n", N, W), W),
    "rms norm": (lambda: RMSNorm(W, eps=1e-6), lambda o, x: o.rms_norm(x, "n", N, W), W),
    "dropout": (lambda: Dropout(0.1), lambda o, x: o.dropout(x, 0.1, N * W), W),
    "gelu": (lambda: F.gelu, lambda o, x: o.gelu(x), W),
    "swiglu": (lambda: SwiGLU(), lambda o, x: o.swiglu(x), 2 * W),
    "rotate": (lambda: rotary, rotate_cost, W),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES)
def test_an_operation_holds_what_is_predicted(case: str, precision: str, torch_seed: int) -> None:
    make, run, width = CASES[case]
    if case == "rotate":
        width = HEADS * DIM
    assert predicted(run, precision, width) == pytest.approx(
        measured(make(), precision, width), rel=0.001, abs=ROW_AND_COLUMN
    )


def test_no_dropout_holds_nothing() -> None:
    ledger = Ledger()
    x = Value(ledger.hold(40), None)
    assert Operations(ledger, Numbers()).dropout(x, 0.0, 10) is x
    assert ledger.peak == 40


def test_on_a_gpu_no_product_is_widened() -> None:
    peaks = []
    for device in ("cpu", "cuda"):
        ledger = Ledger()
        operations = Operations(ledger, Numbers(2, 4, 4, widened=device == "cpu"), device)
        operations.linear(Value(ledger.hold(2 * N * W), None), "l", N, W, OUT, bias=False)
        peaks.append(ledger.peak)
    assert peaks[0] > peaks[1]


def test_numbers_are_low_below_fp32() -> None:
    assert not Numbers().low
    assert Numbers(activation=2).low
