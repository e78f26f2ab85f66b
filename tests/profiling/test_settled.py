"""Collectives whose callers wait until they alone know the copies; on real ranks tests/test_price_ranks.py holds it."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

from bigtrain.optim import exchange
from bigtrain.profiling import settled
from bigtrain.profiling.settled import COLLECTIVES, collectives_settled


class Work:
    """A collective that is under way."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def wait(self) -> None:
        self.log.append("waited")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what a collective notes that is there in place of torch's."""
    noted: list[str] = []

    def all_reduce(tensor: Any, op: Any = None, group: Any = None, async_op: bool = False) -> Work | None:
        noted.append(f"all_reduce {tensor} {op} {async_op}")
        return Work(noted) if tensor != "alone" else None

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(settled.time, "sleep", lambda seconds: noted.append(f"slept {seconds > 0}"))
    return noted


def test_the_caller_waits_and_leaves_the_threads_time(log: list[str]) -> None:
    with collectives_settled():
        assert dist.all_reduce("sums", op="SUM") is None
    assert log == ["all_reduce sums SUM True", "waited", "slept True"]


def test_a_caller_that_waits_itself_gets_what_it_waits_for(log: list[str]) -> None:
    with collectives_settled():
        work = dist.all_reduce("sums", async_op=True)
    assert isinstance(work, Work)
    assert log == ["all_reduce sums None True"]


def test_of_one_rank_there_is_nothing_to_wait_for(log: list[str]) -> None:
    with collectives_settled():
        assert dist.all_reduce("alone") is None
    assert log == ["all_reduce alone None True"]


def test_torch_is_as_before_afterwards_also_after_an_error() -> None:
    before = {name: getattr(dist, name, None) for name in COLLECTIVES}
    with pytest.raises(ZeroDivisionError), collectives_settled():
        assert all(getattr(dist, name) is not plain for name, plain in before.items() if plain is not None)
        _ = 1 / 0
    assert {name: getattr(dist, name, None) for name in COLLECTIVES} == before


def test_a_name_that_this_torch_lacks_is_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(dist, COLLECTIVES[0])
    with collectives_settled():
        assert not hasattr(dist, COLLECTIVES[0])


@pytest.mark.parametrize("module", [_fsdp_collectives, exchange], ids=lambda module: module.__name__)
def test_every_collective_of_a_step_is_known(module: Any) -> None:
    called = set(re.findall(r"\bdist\.(all_\w+|reduce\w*|broadcast\w*|scatter\w*)\(", inspect.getsource(module)))
    assert called and called <= set(COLLECTIVES)
