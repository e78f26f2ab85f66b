"""Kernels of attention: the ones that are here and right are timed, the fastest is taken."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bigtrain.models import attention_kernels
from bigtrain.models.attention import Call, attend_varlen, in_use
from bigtrain.models.attention_kernels import OWN, Case, Found, Kernel, fastest, kernels, try_all, use

CASE = Case([7, 5, 3], (4, 2), 8, True, torch.float32, torch.device("cpu"))


@pytest.fixture(autouse=True)
def kernel_before() -> Iterator[None]:
    yield
    in_use.call = attend_varlen


def right(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, causal: bool) -> Tensor:
    return attention_kernels._reference(q, k, v, cu_seqlens, longest, causal)


def wrong(*given: Any) -> Tensor:
    return right(*given) * 1.1


def failing(*given: Any) -> Tensor:
    raise RuntimeError("no kernel image\nis available")


def uneven() -> Call:
    """A kernel whose results differ in their last bits from call to call."""
    calls = itertools.count()
    return lambda *given: right(*given) * (1 + 1e-7 * (next(calls) % 2 * 4))


def absent() -> Call:
    raise ImportError("not here")


def kernel(name: str, call: Call) -> Kernel:
    return Kernel(name, lambda: call)


def clock_of(*seconds: float) -> Callable[[Callable[[], object]], float]:
    left = list(seconds)

    def clock(run: Callable[[], object]) -> float:
        run()
        return left.pop(0)

    return clock


def test_the_fastest_that_is_right_is_taken() -> None:
    among = [kernel(OWN, right), Kernel("absent", absent), kernel("wrong", wrong), kernel("fast", right)]
    found = try_all(CASE, clock_of(2.0, 1.0), among)
    assert [one.name for one in found] == [OWN, "wrong", "fast"]
    assert found[1].fault.startswith("left out: off by 1.0e-01")
    best = fastest(found)
    assert best is not None
    assert best.name == "fast"
    assert str(best) == "fast 1000.00 ms"


def test_one_that_fails_is_left_out_with_the_reason() -> None:
    (found,) = try_all(CASE, clock_of(), [kernel("new", failing)])
    assert found == Found("new", None, "left out: RuntimeError: no kernel image")
    assert fastest([found]) is None


def test_one_that_does_not_repeat_itself_is_left_out_where_the_first_one_does() -> None:
    found = try_all(CASE, clock_of(2.0), [kernel(OWN, right), kernel("uneven", uneven())])
    assert found[1].fault == "left out: its gradients differ from call to call"
    found = try_all(CASE, clock_of(2.0, 1.0), [kernel(OWN, uneven()), kernel("other", uneven())])
    assert all(one.seconds for one in found)


def test_a_kernel_is_used_from_now_on() -> None:
    among = [kernel("fast", right), Kernel("absent", absent)]
    assert use("fast", among)
    assert in_use.call is right
    assert not use("absent", among)
    assert not use("unheard of", among)
    assert in_use.call is right
    assert use(OWN)
    assert in_use.call is attend_varlen


def test_packages_that_are_absent_are_no_kernels_here() -> None:
    for candidate in kernels()[3:]:
        with pytest.raises(attention_kernels.MISSING):
            candidate.begin()
    assert kernels()[0].name == OWN


def test_only_the_first_documents_are_compared() -> None:
    part = attention_kernels._part(CASE._replace(lengths=[4000, 90, 90]))
    assert part.lengths == [4000, 90]
    assert attention_kernels._part(CASE._replace(lengths=[5000])).lengths == [5000]
