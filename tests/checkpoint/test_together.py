"""What ranks do together: all get all results, or all fail."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
from ranks_apart import on_ranks

from bigtrain.checkpoint import together as module
from bigtrain.checkpoint.together import together
from bigtrain.errors import CheckpointError
from bigtrain.world import ALONE, World


def test_alone_it_is_just_done() -> None:
    assert together(ALONE, lambda: {"a": 1}) == [{"a": 1}]
    with pytest.raises(KeyError):
        together(ALONE, partial(failing, KeyError("x")))


def failing(error: BaseException) -> dict[str, Any]:
    raise error


@pytest.mark.parametrize("size", [2, 3, 5])
def test_all_ranks_have_all_results_in_their_order(size: int) -> None:
    found = on_ranks(size, lambda world: together(world, lambda: {"rank": world.rank}))
    assert found == [[{"rank": rank} for rank in range(size)]] * size


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_full_disk_on_one_rank_is_one_on_all(bad: int) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "runs/x/weights")

    def work(world: World) -> Any:
        return together(world, partial(failing, full) if world.rank == bad else dict)

    found = on_ranks(3, work)
    assert found[bad] is full
    others = [error for rank, error in enumerate(found) if rank != bad]
    assert all(isinstance(error, OSError) and error.errno == errno.ENOSPC for error in others)
    assert all(f"rank {bad} on " in str(error) and "runs/x/weights: No space left" in str(error) for error in others)


@pytest.mark.parametrize("error", [CheckpointError("bad.json: damaged"), KeyError("name"), SystemExit(3)])
def test_whatever_is_raised_on_one_rank_ends_it_on_all(error: BaseException) -> None:
    found = on_ranks(2, lambda world: together(world, partial(failing, error) if world.rank else dict))
    assert found[1] is error
    assert isinstance(found[0], CheckpointError)
    named = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
    assert str(found[0]).startswith("rank 1 on ")
    assert str(found[0]).endswith(named)


def test_the_first_of_several_faults_is_named_on_the_ranks_that_have_none() -> None:
    def work(world: World) -> Any:
        return together(world, partial(failing, ValueError(f"of {world.rank}")) if world.rank else dict)

    found = on_ranks(3, work)
    assert str(found[0]).startswith("rank 1 on ")
    assert [str(error) for error in found[1:]] == ["of 1", "of 2"]


def test_what_is_no_json_hangs_no_rank() -> None:
    found = on_ranks(2, lambda world: together(world, lambda: {"a": object() if world.rank else "\u00e4"}))
    assert isinstance(found[1], TypeError)
    assert "rank 1 on" in str(found[0])
    with pytest.raises(TypeError):
        json.dumps({"a": object()})


def test_a_rank_that_takes_long_says_so_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PULSE_SECONDS", 0.02)
    heard: list[int] = []

    def work(world: World) -> Any:
        real = type(world).any

        class Counting(type(world)):  # type: ignore[misc]
            def any(self, flag: bool) -> bool:
                heard.append(self.rank)
                return real(self, flag)

        counting = Counting(world.rank, world.size, world.local_rank, world.local_size, world.meeting)
        return together(counting, lambda: until(lambda: world.rank == 0 or len(heard) > 6) or {"rank": world.rank})

    assert on_ranks(2, work) == [[{"rank": 0}, {"rank": 1}]] * 2
    assert heard.count(0) == heard.count(1) > 3


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.001)


@pytest.mark.parametrize("refused", [0, 1])
def test_what_is_no_refusal_of_a_disk_outweighs_one_that_is(refused: int) -> None:
    errors: list[BaseException] = [CheckpointError("not there"), CheckpointError("not there")]
    errors[refused] = OSError(errno.ENOSPC, "No space left on device")
    found = on_ranks(2, lambda world: together(world, partial(failing, errors[world.rank])))
    assert all(isinstance(error, CheckpointError) for error in found)  # else one rank would go on
    assert found[1 - refused] is errors[1 - refused]
    assert f"rank {1 - refused} on " in str(found[refused])


def test_an_error_of_a_disk_without_a_number_is_one_on_all_ranks() -> None:
    found = on_ranks(2, lambda world: together(world, partial(failing, OSError("odd")) if world.first else dict))
    assert all(isinstance(error, OSError) for error in found)
    assert "odd" in str(found[1])


def test_a_rank_at_work_shows_no_life_by_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pulses say that it is there; only what it does tells whether it goes on."""
    left: list[tuple[int, object]] = []
    monkeypatch.setattr(module, "PULSE_SECONDS", 0.02)

    def work(world: World) -> Any:
        def noted(thread: int | None) -> Any:
            left.append((world.rank, thread))
            return nullcontext()

        monkeypatch.setattr(module, "left_to", noted)
        return together(world, lambda: time.sleep(0.1) or {})

    on_ranks(1, work)
    assert not left
    task: Future[str] = Future()
    assert module._any_at_work(World(0, 1), task)
    assert left == [(0, None)]
    task.set_result("{}")
    assert not module._any_at_work(World(0, 1), task)
    assert left == [(0, None)]
