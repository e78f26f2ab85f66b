"""Ranks: what environments say of them; alone they tell themselves. Several are met in other tests, over gloo."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.errors import InputError
from bigtrain.world import ALONE, World, current_world, joined, world_of

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "n[1-2]",
}


def test_no_launcher_no_place() -> None:
    assert world_of({}) is None
    assert world_of({"RANK": "0"}) is None
    assert world_of({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None


def test_what_torchrun_sets() -> None:
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert world_of(environment) == World(5, 8, 1, 4)
    assert world_of({"RANK": "5", "WORLD_SIZE": "8"}) == World(5, 8, 5, 8)


def test_what_slurm_sets_in_a_step() -> None:
    assert world_of(STEP) == World(3, 4, 1, 2)


def test_a_launcher_in_a_step_counts_more_than_the_step() -> None:
    assert world_of({**STEP, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}) == World(
        0, 2, 0, 2
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"RANK": "x"}, r"invalid literal for int\(\) with base 10: 'x'"),
        ({"RANK": "4"}, "RANK=4, WORLD_SIZE=4, LOCAL_RANK=None, LOCAL_WORLD_SIZE=None: no such rank"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "no such rank"),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}, "no such rank"),
    ],
)
def test_what_contradicts_itself(changes: dict[str, str], text: str) -> None:
    with pytest.raises(InputError, match=f"^environment: .*{text}; let a launcher set them, or unset them|{text}"):
        world_of({"RANK": "0", "WORLD_SIZE": "4", **changes})


@given(st.integers(1, 16), st.integers(1, 8), st.data())
def test_every_rank_of_every_world_is_read(nodes: int, local: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, nodes * local - 1))
    numbers = {"RANK": rank, "WORLD_SIZE": nodes * local, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}
    world = world_of({name: str(number) for name, number in numbers.items()})
    assert world == World(rank, nodes * local, rank % local, local)
    assert world is not None and world.first == (rank == 0)


def test_alone_what_is_told_comes_back() -> None:
    assert ALONE.first
    assert ALONE.sum([1, 2.5]) == [1.0, 2.5]
    assert ALONE.max([3]) == [3.0]
    assert ALONE.sum_on_host(7) == 7
    assert ALONE.any(True) and not ALONE.any(False)
    assert ALONE.gather("a") == ["a"]
    assert ALONE.broadcast("b") == "b"


def test_alone_nobody_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with joined(kind="cpu", timeout_seconds=1) as world:
        assert world is ALONE
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined(kind="cpu", timeout_seconds=1) as world:
        assert world == current_world() == ALONE
