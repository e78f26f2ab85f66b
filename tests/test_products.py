"""Products of low-precision operands are products with fp32 sums, however the processor makes them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from bigtrain import products

pytestmark = pytest.mark.usefixtures("torch_seed")
sizes = st.integers(0, 9)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this processor one that has no bf16 instructions."""
    monkeypatch.setattr(products, "SLOW_BF16", True)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SLOW_BF16", False)


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def test_only_bf16_on_a_slow_cpu_is_widened(slow: None) -> None:
    assert products.widened(numbers(1))
    assert not any(products.widened(numbers(1, dtype=d)) for d in (torch.float32, torch.float16, torch.float64))
    assert not products.widened(torch.empty(1, dtype=torch.bfloat16, device="meta"))


def test_nothing_is_widened_on_a_fast_cpu(fast: None) -> None:
    assert not products.widened(numbers(1))


@given(n=sizes, k=sizes, m=sizes)
def test_a_widened_product_is_the_fp32_product_rounded(n: int, k: int, m: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "SLOW_BF16", True)
        a, b, bias = numbers(n, k), numbers(k, m), numbers(m)
        exact = a.float() @ b.float()
        assert torch.equal(products.mm(a, b), exact.bfloat16())
        assert torch.equal(products.mm(a, b, torch.float32), exact)
        expected = torch.nn.functional.linear(a.float(), b.T.float(), bias.float()).bfloat16()
        assert torch.equal(products.linear(a, b.T, bias), expected)


@pytest.mark.parametrize("kind", ["slow", "fast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_second_factor_is_rounded_to_the_first(
    kind: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(kind)
    a, b, bias = numbers(5, 8, dtype=dtype), torch.randn(8, 3), torch.randn(3)
    assert torch.equal(products.mm(a, b), products.mm(a, b.to(dtype)))
    out = products.linear(a, b.T, bias)
    assert out.dtype == dtype
    assert torch.equal(out, products.linear(a, b.T.to(dtype), bias.to(dtype)))


@pytest.mark.parametrize("kind", ["slow", "fast"])
def test_both_kinds_of_processors_agree_with_torch(kind: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(kind)
    x, weight, bias = numbers(2, 3, 16), numbers(5, 16), numbers(5)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(products.linear(x, weight, bias).double(), expected, rtol=2**-8, atol=2**-8)
    torch.testing.assert_close(
        products.mm(x[0], weight.T).double(), x[0].double() @ weight.T.double(), rtol=2**-7, atol=1e-2
    )


def test_a_vector_and_no_bias(slow: None) -> None:
    x, weight = numbers(16), numbers(5, 16)
    assert torch.equal(products.linear(x, weight, None), (weight.float() @ x.float()).bfloat16())


def test_the_rounded_copy_is_gone_when_the_product_starts(slow: None) -> None:
    """A widened product of fp32 weights holds one copy of them, in fp32, and none in bf16."""
    x, weight = numbers(2, 1024), torch.randn(1024, 1024)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        products.linear(x, weight, None)
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak <= (2 + 4) * weight.numel() + 64 * 1024
    assert held < 64 * 1024


@pytest.mark.parametrize(
    ("dtype", "device"),
    [
        (torch.bfloat16, "cpu"),
        pytest.param(torch.bfloat16, "cuda", marks=pytest.mark.gpu),
        pytest.param(torch.float16, "cuda", marks=pytest.mark.gpu),
    ],
)
def test_a_device_keeps_the_fp32_sums(dtype: torch.dtype, device: str) -> None:
    a, b = numbers(64, 128, dtype=dtype).to(device), torch.randn(128, 32, device=device)
    out = products.mm(a, b, torch.float32)
    assert out.dtype == torch.float32
    if not a.is_cuda and not products.widened(a):  # a processor with bf16 instructions rounds them
        assert torch.equal(out, (a @ b.to(dtype)).float())
        return
    torch.testing.assert_close(out.double(), a.double() @ b.to(dtype).double(), rtol=1e-5, atol=1e-4)
    assert products.mm(a, b).dtype == dtype
