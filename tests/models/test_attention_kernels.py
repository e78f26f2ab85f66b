"""Kernels of attention: the ones that are here and right are timed, the fastest is taken."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bigtrain.models import attention_kernels
from bigtrain.models.attention import Call, Documents, attend_varlen, in_use
from bigtrain.models.attention_kernels import GONE, OWN, Case, Found, Kernel, fastest, kernels, try_all, use

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
    assert use("fast", among) == ""
    assert in_use.call is right
    assert use("absent", among) == use("unheard of", among) == GONE
    assert in_use.call is right
    assert use(OWN) == ""
    assert in_use.call is attend_varlen


def test_a_kernel_that_is_wrong_or_fails_in_a_case_is_not_used() -> None:
    among = [kernel("fast", right), kernel("wrong", wrong), kernel("failing", failing)]
    assert use("fast", among, CASE) == ""
    assert use("wrong", among, CASE).startswith("left out: off by")
    assert use("failing", among, CASE) == "left out: RuntimeError: no kernel image"
    assert in_use.call is right


class TorchsAttention:
    """Stands for torch's registry of kernels; notes which one is active."""

    def __init__(self) -> None:
        self.active: str | None = None

    def activate_flash_attention_impl(self, name: str) -> None:
        self.active = name

    def current_flash_attention_impl(self) -> str | None:
        return self.active

    def restore_flash_attention_impl(self) -> None:
        self.active = None


def test_torch_has_its_own_kernel_while_others_are_tried_and_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    torchs, seen = TorchsAttention(), []
    monkeypatch.setattr(attention_kernels.importlib, "import_module", lambda name: torchs)

    def noting(*given: Any) -> Tensor:
        seen.append(torchs.active)
        return right(*given)

    monkeypatch.setattr(attention_kernels, "attend_varlen", noting)
    third = kernels()[1]
    among = [third, kernel("package", noting), third]
    found = try_all(CASE, clock_of(1.0, 1.0, 1.0), among)
    assert [one.fault for one in found] == [""] * 3
    assert [name for name, _ in itertools.groupby(seen)] == ["FA3", None, "FA3"]
    assert torchs.active is None
    assert use(third.name) == ""
    assert torchs.active == "FA3"
    assert use("package", among) == ""
    assert torchs.active is None


def test_another_kernel_of_torch_is_offered_only_where_torch_can_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(activate_flash_attention_impl=pytest.fail)
    monkeypatch.setattr(attention_kernels.importlib, "import_module", lambda name: module)
    assert use("FlashAttention 3 in torch") == GONE


@pytest.mark.parametrize("error", [TypeError, AssertionError, KeyError])
def test_a_broken_kernel_ends_nothing(error: type[Exception]) -> None:
    def broken(*given: Any) -> Any:
        raise error("drifted")

    def clock(run: Callable[[], object]) -> float:
        raise error("drifted")

    fault = f"left out: {error.__name__}: {error('drifted')}"
    among = [Kernel("begin", broken), kernel("call", broken)]
    assert [one.fault for one in try_all(CASE, clock_of(), among)] == [fault] * 2
    assert use("begin", among) == fault
    assert try_all(CASE, clock, [kernel("clock", right)]) == [Found("clock", None, fault)]


def test_nothing_is_copied_to_the_device_while_a_kernel_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    of_lengths = Documents.of_lengths
    monkeypatch.setattr(Documents, "of_lengths", lambda *given: made.append(given) or of_lengths(*given))

    def clock(run: Callable[[], object]) -> float:
        before = len(made)
        run()
        assert len(made) == before
        return 1.0

    assert try_all(CASE, clock, [kernel(OWN, right)])[0].seconds == 1.0
    assert made


def test_after_each_candidate_there_is_a_call() -> None:
    calls: list[int] = []
    try_all(CASE, clock_of(1.0), [Kernel("absent", absent), kernel(OWN, right)], lambda: calls.append(1))
    assert len(calls) == 2


def test_packages_that_are_absent_are_no_kernels_here() -> None:
    for candidate in kernels()[3:]:
        with pytest.raises(attention_kernels.MISSING):
            candidate.begin()
    assert kernels()[0].name == OWN


def test_only_the_first_documents_are_compared() -> None:
    part = attention_kernels._part(CASE._replace(lengths=[4000, 90, 90]))
    assert part.lengths == [4000, 90]
    assert attention_kernels._part(CASE._replace(lengths=[5000])).lengths == [5000]


def test_empty_documents_are_tried_too() -> None:
    assert attention_kernels._part(CASE._replace(lengths=[4000, 90, 90, 0, 0])).lengths == [4000, 90, 0, 0]
    assert attention_kernels._part(CASE._replace(lengths=[5000, 7, 0])).lengths == [5000, 0]

    def counting(*given: Any) -> Tensor:
        assert len(given[3]) == 6
        return right(*given)

    assert not try_all(CASE._replace(lengths=[7, 5, 3, 0, 0]), clock_of(1.0), [kernel(OWN, counting)])[0].fault
