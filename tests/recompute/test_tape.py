"""The tape: bitwise the same, exactly the outputs that are needed, and safe against writers and generators."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigtrain.errors import InputError
from bigtrain.recompute import operators
from bigtrain.recompute.tape import Keeping, Tape

Body = Callable[[Tensor, Tensor], Tensor]


def run(body: Body, tape: Tape | None, *, dtype: torch.dtype = torch.float32, retain: int = 0) -> list[Tensor]:
    """Return the output and the gradients of a body, under a tape or plainly."""
    torch.manual_seed(0)
    x = torch.randn(6, 8).to(dtype).requires_grad_()
    weight = torch.randn(8, 8, requires_grad=True)
    if tape is None:
        out = body(x, weight)
    else:
        out = checkpoint(body, x, weight, use_reentrant=False, context_fn=tape.contexts)
        tape.forget(out)
    for _ in range(retain):
        out.float().square().sum().backward(retain_graph=True)
    out.float().square().sum().backward()
    assert x.grad is not None and weight.grad is not None
    return [out.detach(), x.grad, weight.grad]


def check(body: Body, **options: Any) -> Tape:
    """Check that a tape changes nothing; return it as it was written."""
    tape, again = Tape(), Tape()
    plain = run(body, None, **options)
    for one, other in zip(plain, run(body, tape, **options), strict=True):
        assert torch.equal(one, other)
    assert all(entry.output is None for entry in tape.entries[: tape.needed])
    torch.manual_seed(0)
    x = torch.randn(6, 8).to(options.get("dtype", torch.float32)).requires_grad_()
    out = checkpoint(body, x, torch.randn(8, 8, requires_grad=True), use_reentrant=False, context_fn=again.contexts)
    again.forget(out)
    return again


def kept(tape: Tape) -> list[bool]:
    return [entry.output is not None for entry in tape.entries]


def test_products_are_kept_and_the_last_is_not_needed() -> None:
    tape = check(lambda x, w: x + torch.tanh(F.gelu(x @ w) @ w) @ w)
    assert kept(tape) == [True, True, False]


def test_a_product_that_a_later_operation_needs_is_kept() -> None:
    assert kept(check(lambda x, w: torch.tanh(F.gelu(x @ w) @ w))) == [True, True]


def test_dropout_after_a_product() -> None:
    assert kept(check(lambda x, w: F.dropout(F.dropout(F.gelu(x @ w), 0.5) @ w, 0.5))) == [True, True]


def test_an_output_that_is_written_to_is_computed_again() -> None:
    assert kept(check(lambda x, w: (x @ w).add_(1).sigmoid().square() @ w.sin())) == [False, False]
    assert kept(check(lambda x, w: F.gelu(torch.add(x @ w, x @ w.sin())).square())) == [True, True]


def test_reading_by_a_writer_does_not_count() -> None:
    def body(x: Tensor, w: Tensor) -> Tensor:
        h = x @ w
        total = x.sin()
        total.add_(h)
        return total.sigmoid() * h

    assert kept(check(body)) == [True]


def test_the_blocks_own_output_is_not_kept() -> None:
    """Whoever called the block may write to it."""

    def body(x: Tensor, w: Tensor) -> Tensor:
        h = x @ w
        F.gelu(h)
        return h

    assert kept(check(body)) == [False]


def test_twice_through_the_same_graph() -> None:
    check(lambda x, w: torch.tanh(F.gelu(x @ w) @ w), retain=2)


def test_a_product_that_is_rounded_at_once_is_kept_rounded() -> None:
    def body(x: Tensor, w: Tensor) -> Tensor:
        h = F.linear(x.float(), w).to(x.dtype)
        return torch.tanh(F.gelu(h).float() @ w).to(x.dtype)

    tape = check(body, dtype=torch.bfloat16)
    assert kept(tape) == [True, True]
    first, second = tape.entries
    assert first.output.dtype == torch.bfloat16 and first.blank is not None and first.blank.dtype == torch.float32
    assert second.output.dtype == torch.float32 and second.blank is None


def test_rounding_in_more_dims() -> None:
    def body(x: Tensor, w: Tensor) -> Tensor:
        h = F.linear(x.float().view(2, 3, 8), w).to(x.dtype)
        return torch.tanh(h).view(6, 8)

    assert check(body, dtype=torch.bfloat16).entries[0].output.dtype == torch.bfloat16


def test_a_wide_result_that_somebody_has_is_not_replaced() -> None:
    def body(x: Tensor, w: Tensor) -> Tensor:
        wide = x.float() @ w
        narrow = wide.to(x.dtype)
        return (torch.tanh(wide) * torch.sin(narrow)).to(x.dtype)

    assert kept(check(body, dtype=torch.bfloat16)) == [False]


def test_a_wide_result_that_was_read_before_is_kept_wide() -> None:
    def body(x: Tensor, w: Tensor) -> Tensor:
        wide = x.float() @ w
        total = wide.sum()
        narrow = wide.to(x.dtype)
        del wide
        return torch.tanh(narrow) * total.to(x.dtype).sigmoid()

    assert check(body, dtype=torch.bfloat16).entries[0].output.dtype == torch.float32


def test_widening_is_no_rounding() -> None:
    tape = check(lambda x, w: torch.tanh((x @ w.to(x.dtype)).float()), dtype=torch.bfloat16)
    assert tape.entries[0].output.dtype == torch.bfloat16 and tape.entries[0].blank is None


class Squared(torch.autograd.Function):
    """An autograd function of its own with a product inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        h = x @ w
        ctx.save_for_backward(x, w, h)
        return h.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w, h = ctx.saved_tensors
        return (2 * grad * h) @ w.T, x.T @ (2 * grad * h)


def test_products_inside_autograd_functions() -> None:
    assert kept(check(lambda x, w: torch.tanh(Squared.apply(x, w)) @ w)) == [True, False]


def test_attention_with_dropout_leaves_the_generator_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the fused kernels draw; here a stand-in does."""

    @torch.library.custom_op("bigtrain_tests::attention", mutates_args=())
    def attention(x: Tensor, dropout_p: float) -> Tensor:
        return F.dropout(x, dropout_p) * 1.0

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.mask, None

    def keep(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.mask = (output != 0) / (1 - inputs[1])

    attention.register_autograd(differentiate, setup_context=keep)
    monkeypatch.setattr(operators, "ATTENTION", operators.ATTENTION | {"bigtrain_tests::attention"})
    tape = check(lambda x, w: F.dropout(attention(F.dropout(x @ w, 0.5), 0.5), 0.5).tanh())
    assert [entry.random_state is not None for entry in tape.entries] == [False, True]


def test_another_second_run_is_noticed() -> None:
    calls: list[int] = []

    def body(x: Tensor, w: Tensor) -> Tensor:
        calls.append(0)
        return torch.tanh(x @ w if len(calls) == 1 else torch.addmm(x, x, w))

    with pytest.raises(InputError, match="ran aten.addmm.default the second time where it ran aten.mm.default"):
        run(body, Tape())


def test_memory_is_free_as_soon_as_the_graph_is() -> None:
    """No cycle of references waits for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        layer, x = nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True) * 1
        seen = weakref.ref(x.untyped_storage())
        tape = Tape()
        out = checkpoint(lambda x: torch.tanh(layer(x)), x, use_reentrant=False, context_fn=tape.contexts)
        del x
        assert seen() is not None
        out.sum().backward()
        del out
        assert seen() is None
    finally:
        gc.enable()


def test_an_error_inside_leaves_torch_as_it_was() -> None:
    def body(x: Tensor, w: Tensor) -> Tensor:
        raise KeyError(str(x @ w))

    with pytest.raises(KeyError):
        run(body, Tape())
    with pytest.raises(TypeError):
        Keeping(Tape()).__enter__()
    check(lambda x, w: torch.tanh(x @ w))
