"""Ranks: what an environment says of them, and what real ones tell each other over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from group import free_ports, told_by_all

from bigtrain.errors import InputError
from bigtrain.world import ALONE, LISTENER, NONE, World, current_world, joined, world_of

PLACE = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}

TALK = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from bigtrain.world import World, current_world, joined
import torch
with joined(kind="cpu", timeout_seconds=60) as world:
    assert current_world() == world
    with joined(kind="cpu", timeout_seconds=60) as again:  # a group that is there is left as it is
        assert again == world
    assert world.broadcast("of the first" if world.first else "of another") == "of the first"
    other = world.for_thread(60)
    with ThreadPoolExecutor(1) as pool:
        apart = pool.submit(lambda: [other.gather(f"apart {other.rank}") for _ in range(50)])
        assert all(world.gather(str(world.rank)) == ["0", "1", "2"][: world.size] for _ in range(50))
        assert apart.result() == [[f"apart {rank}" for rank in range(world.size)]] * 50
    assert other == world and World().for_thread(60) == World()
    print(json.dumps({
        "rank": world.rank, "first": world.first,
        "sum": world.sum([world.rank, 0.5]), "max": world.max([world.rank, -world.rank]),
        "any": [world.any(world.rank == 1), world.any(False)],
        "texts": world.gather("é" * world.rank), "here": world.sum_on_host(10 ** world.rank),
        "tensor": world.all_reduce(torch.tensor([float(world.rank)]), "SUM").item(),
        "least": world.all_reduce(torch.tensor([float(world.rank)]), "MIN").item(),
    }))
assert current_world().size == 1
"""


def test_an_environment_says_which_rank_this_is() -> None:
    assert world_of(PLACE) == World(5, 8, 1, 4)
    assert world_of({}) is None
    assert world_of({"RANK": "5"}) is None


def test_without_local_names_all_ranks_are_here() -> None:
    assert world_of({"RANK": "1", "WORLD_SIZE": "2"}) == World(1, 2, 1, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "8"),
        ("RANK", "-1"),
        ("RANK", "one"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_RANK", "4"),
        ("LOCAL_WORLD_SIZE", "9"),
        ("LOCAL_WORLD_SIZE", ""),
    ],
)
def test_what_contradicts_itself_is_refused(name: str, value: str) -> None:
    with pytest.raises(InputError, match=f"environment: .*{name}.*; let a launcher set them, or unset them"):
        world_of({**PLACE, name: value})


def test_alone_what_is_told_comes_back() -> None:
    assert ALONE.first and ALONE.size == 1
    assert ALONE.sum([1, 2.5]) == [1.0, 2.5] and ALONE.max([-1]) == [-1.0]
    assert ALONE.any(True) and not ALONE.any(False)
    assert ALONE.gather("text") == ["text"] and ALONE.broadcast("text") == "text"
    assert ALONE.sum_on_host(3) == 3
    tensor = torch.tensor([2.0])
    assert ALONE.all_reduce(tensor, "SUM") is tensor and tensor.item() == 2


def test_before_joining_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    assert current_world() == ALONE


def test_where_nothing_tells_of_others_nobody_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PLACE:
        monkeypatch.delenv(name, raising=False)
    with joined(kind="cpu", timeout_seconds=1) as world:
        assert world == ALONE
        assert not torch.distributed.is_initialized()


def start(rank: int, size: int, port: int, **more: str) -> subprocess.Popen[str]:
    places = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", **more}
    return subprocess.Popen(
        [sys.executable, "-c", TALK],
        env={**os.environ, **places, **where},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[int(more[LISTENER])] if more.get(LISTENER, str(NONE)) != str(NONE) else [],
    )


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    """Return what three ranks on two machines of two devices say, which meet at a socket of this process's."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        port, number = listener.getsockname()[1], listener.fileno()
        ranks = [start(rank, 3, port, **{LISTENER: str(NONE if rank else number)}) for rank in range(3)]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(error for _, error in outputs)[-3000:]
    return [json.loads(out) for out, _ in outputs]


def test_ranks_agree(told: list[dict[str, Any]]) -> None:
    assert [one["rank"] for one in told] == [0, 1, 2]
    assert [one["first"] for one in told] == [True, False, False]
    for one in told:
        assert one["sum"] == [3.0, 1.5] and one["max"] == [2.0, 0.0]
        assert one["any"] == [True, False]
        assert one["texts"] == ["", "é", "éé"]
        assert one["tensor"] == 3.0 and one["least"] == 0.0


def test_a_host_sums_its_own_ranks(told: list[dict[str, Any]]) -> None:
    assert [one["here"] for one in told] == [11, 11, 100]


def test_a_rank_that_does_not_come_is_an_error(tmp_path: Path) -> None:
    code = 'from bigtrain.world import joined\nwith joined(kind="cpu", timeout_seconds=1): pass'
    (port,) = free_ports(1)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "2"}
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **where}, capture_output=True, text=True, timeout=120
    )
    assert found.returncode and "imed out" in found.stderr


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


def test_slurm_says_it_in_a_step_unless_a_launcher_in_the_step_does() -> None:
    assert world_of(STEP) == World(3, 4, 1, 2)
    assert world_of({**STEP, **PLACE}) == World(5, 8, 1, 4)
    assert world_of({name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"}) is None


def test_neighbours_that_share_products_read_the_same_rows() -> None:
    assert [World(rank, 8).reading(2) for rank in (0, 1, 2, 7)] == [(0, 4), (0, 4), (1, 4), (3, 4)]
    assert World(5, 8).reading(1) == (5, 8)
    assert ALONE.reading(1) == (0, 1)


MEETINGS = """
import json, time
from bigtrain.world import joined
for meeting in range(3):
    with joined(kind="cpu", timeout_seconds=20) as world:
        print(json.dumps({"sum": world.sum([float(world.rank + meeting)])}))
        if world.first:
            time.sleep(1)  # the other is at its next meeting before this one ends here
"""


@pytest.mark.slow
def test_a_rank_that_is_early_at_the_next_meeting_waits_there() -> None:
    assert told_by_all(["-c", MEETINGS], 2, seconds=120) == [[{"sum": [1.0]}, {"sum": [3.0]}, {"sum": [5.0]}]] * 2


PARTS = """
import json, os, sys
from bigtrain.world import joined
rank = int(os.environ["RANK"])
for size, port in zip((2, 3, 2), sys.argv[1:]):
    if rank < size:
        os.environ.update(WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), MASTER_PORT=port)
        with joined(kind="cpu", timeout_seconds=20) as world:
            print(json.dumps({"sum": world.sum([float(world.rank)])}))
"""


@pytest.mark.slow
def test_a_rank_that_was_not_at_the_last_meeting_comes_to_the_next() -> None:
    two, three = {"sum": [1.0]}, {"sum": [3.0]}
    by_rank = told_by_all(["-c", PARTS, *map(str, free_ports(3))], 3, seconds=120)
    assert by_rank == [[two, three, two], [two, three, two], [three]]
