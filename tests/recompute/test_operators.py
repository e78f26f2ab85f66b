"""Which operations are kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from bigtrain.recompute import operators
from bigtrain.recompute.operators import is_draw, is_kept, name_of, tensors, written

aten = torch.ops.aten
SQUARE = torch.ones(4, 4)


@pytest.mark.parametrize(
    ("operator", "args", "kept"),
    [
        (aten.mm.default, (SQUARE, SQUARE), True),
        (aten.addmm.default, (SQUARE[0], SQUARE, SQUARE), True),
        (aten.addmm_.default, (SQUARE, SQUARE, SQUARE), False),
        (aten.mm.out, (SQUARE, SQUARE), False),
        (aten.gelu.default, (SQUARE,), False),
        (aten.native_layer_norm.default, (SQUARE, [4], None, None, 1e-5), False),
        (aten.embedding.default, (SQUARE, SQUARE), False),
        (aten._scaled_dot_product_flash_attention_for_cpu.default, (SQUARE,) * 3, True),
        (aten._scaled_dot_product_efficient_attention.default, (SQUARE,) * 3, True),
        (aten._scaled_dot_product_flash_attention_backward.default, (SQUARE,) * 3, False),
    ],
    ids=str,
)
def test_products_and_attention_are_kept(operator: object, args: tuple[object, ...], kept: bool) -> None:
    assert is_kept(operator, args) is kept


@pytest.mark.parametrize(
    ("rows", "inner", "columns", "kept"), [(8, 4, 8, True), (9, 4, 9, False), (512, 512, 64, True)]
)
def test_batched_products_that_spread_out_are_not(rows: int, inner: int, columns: int, kept: bool) -> None:
    left, right = torch.empty(2, rows, inner), torch.empty(2, inner, columns)
    assert is_kept(aten.bmm.default, (left, right)) is kept
    assert is_kept(aten.baddbmm.default, (torch.empty(2, rows, columns), left, right)) is kept


def test_every_name_that_is_kept_exists() -> None:
    """A renamed operator must not be dropped unseen."""
    import torch.nn.attention.varlen

    for name in operators.PRODUCTS | operators.BATCHED_PRODUCTS | operators.ATTENTION | operators.VIEWS:
        space, _, operator = name.partition("::")
        assert hasattr(getattr(torch.ops, space), operator), name


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_torch_runs_for_linear_and_attention_is_recognized(causal: bool, dtype: torch.dtype) -> None:
    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.seen += [name_of(func)] if is_kept(func, args) else []
            return func(*args, **(kwargs or {}))

    x = torch.randn(1, 2, 8, 8, dtype=dtype, requires_grad=True)
    with Names() as names:
        F.linear(x, torch.randn(8, 8, dtype=dtype))
        assert len(names.seen) == 1
        F.linear(x, torch.randn(8, 8, dtype=dtype), torch.randn(8, dtype=dtype))
        assert len(names.seen) == 2
        F.scaled_dot_product_attention(x, x, x, is_causal=causal)
        assert names.seen[2:] == ["aten::_scaled_dot_product_flash_attention_for_cpu"]


def test_attention_with_dropout_draws() -> None:
    attention = aten._scaled_dot_product_flash_attention.default
    assert is_draw(attention, (SQUARE, SQUARE, SQUARE, 0.1), {})
    assert is_draw(attention, (SQUARE, SQUARE, SQUARE), {"dropout_p": 0.1})
    assert not is_draw(attention, (SQUARE, SQUARE, SQUARE, 0.0), {})
    assert not is_draw(attention, (SQUARE, SQUARE, SQUARE), {})
    assert not is_draw(aten.mm.default, (SQUARE, SQUARE), {})


def test_what_is_written_to() -> None:
    other = torch.zeros(4, 4)
    assert written(aten.add.Tensor, (SQUARE, other), {}) == []
    assert [each is SQUARE for each in written(aten.add_.Tensor, (SQUARE, other), {})] == [True]
    assert [each is other for each in written(aten.mm.out, (SQUARE, SQUARE), {"out": other})] == [True]


def test_tensors_are_found_in_containers() -> None:
    a, b, c = (torch.ones(1) for _ in range(3))
    assert [id(t) for t in tensors((a, [b, None, 3], {"x": c}))] == [id(a), id(b), id(c)]


def test_the_compiled_rule_is_the_same() -> None:
    rule, full = operators._selective_rule, operators._full_rule
    assert rule(None, aten.mm.default, SQUARE, SQUARE) is CheckpointPolicy.MUST_SAVE
    assert rule(None, aten.gelu.default, SQUARE) is CheckpointPolicy.PREFER_RECOMPUTE
    assert full(None, aten.mm.default, SQUARE, SQUARE) is CheckpointPolicy.PREFER_RECOMPUTE
    for policy in ("selective", "full"):
        assert len(operators.compiled_contexts(policy)) == 2
