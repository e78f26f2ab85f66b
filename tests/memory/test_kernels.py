"""What kernels hold inside them, against a profile of the kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bigtrain.memory.kernels import corrected, dense, in_place, inner_bytes
from bigtrain.memory.measure import measure
from bigtrain.memory.trace import fake_like

aten = torch.ops.aten
SMALL_BYTES = 64
LOW = torch.bfloat16

CASES: dict[str, tuple[Any, Callable[[], tuple[Any, ...]]]] = {
    "dropout": (aten.native_dropout.default, lambda: (torch.randn(64, 32), 0.1, True)),
    "dropout backward": (
        aten.native_dropout_backward.default,
        lambda: (torch.randn(64, 32), torch.ones(64, 32, dtype=torch.bool), 2.0),
    ),
    "sum of booleans": (aten.sum.default, lambda: (torch.ones(512, dtype=torch.bool),)),
    "sum": (aten.sum.default, lambda: (torch.ones(512),)),
    "attention": (
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        lambda: (torch.randn(2, 4, 48, 8), torch.randn(2, 4, 48, 8), torch.randn(2, 4, 48, 8)),
    ),
    "low attention": (
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        lambda: tuple(torch.randn(1, 2, 300, 8).to(LOW) for _ in range(3)),
    ),
    "safe softmax": (aten._safe_softmax.default, lambda: (torch.randn(4, 32, 32), -1)),
    "clone of a transposed matrix": (
        lambda x: aten.clone.default(x, memory_format=torch.contiguous_format),
        lambda: (torch.randn(96, 64).T,),
    ),
    "clone of a small one": (
        lambda x: aten.clone.default(x, memory_format=torch.contiguous_format),
        lambda: (torch.randn(40, 32).T,),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_inner_bytes_are_what_the_profile_shows(case: str) -> None:
    operator, make = CASES[case]
    args = make()
    out: list[Any] = []
    peak = measure(lambda: out.append(operator(*args))).peak_bytes
    parts = out[0] if isinstance(out[0], tuple) else (out[0],)
    name = operator._schema.name if hasattr(operator, "_schema") else "aten::clone"
    outputs = sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))
    assert outputs + inner_bytes(name, args, {}, out[0]) == pytest.approx(peak, abs=SMALL_BYTES)


def test_most_operations_hold_nothing() -> None:
    assert inner_bytes("aten::mm", (), {}, None) == 0


def test_statistics_of_a_mixed_layer_norm_are_fp32() -> None:
    x, weight = torch.randn(8, 16, dtype=LOW), torch.ones(16)
    real = aten.native_layer_norm.default(x, [16], weight, weight, 1e-5)
    args = [fake_like(x), [16], fake_like(weight), fake_like(weight), 1e-5]
    found = corrected("aten::native_layer_norm", args, aten.native_layer_norm.default(*args))
    assert [part.dtype for part in found] == [part.dtype for part in real] == [LOW, torch.float32, torch.float32]


def test_only_formulas_of_autograd_write_in_place() -> None:
    assert in_place(aten.index_put.default, "IndexBackward0") is aten.index_put_.default
    assert in_place(aten.index_put.default, "MyBackward") is None


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.empty(3, 4), True),
        (torch.empty(3, 4).T, True),
        (torch.empty(1, 4).expand(3, 4), False),
        (torch.empty(3, 8)[:, :4], False),
        (torch.empty(2, 3, 4).permute(1, 2, 0), True),
        (torch.empty(()), True),
    ],
)
def test_dense_is_without_overlap_and_gaps(tensor: torch.Tensor, expected: bool) -> None:
    assert dense(tensor) is expected
