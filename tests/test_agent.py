"""Agents of two nodes, as threads of this process on loopback; their training processes do what a script says."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from signal import SIGTERM
from typing import Any

import pytest

from bigtrain import agent as module
from bigtrain.agent import Agent
from bigtrain.errors import BigtrainError, InputError
from bigtrain.restarts import RESTARTS
from bigtrain.spawner import CRASHED

SHARED = Path(__file__).parent / "shared"

WAIT = "wait"


class Nodes:
    """Nodes that meet in one place; the first is where they do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.agents: list[Agent] = []
        self._pool = ThreadPoolExecutor(4)

    def start(self, nodes: list[int], **changes: Any) -> Future[int]:
        """Start the agent of one more of so many nodes, with a process or two."""
        return self._pool.submit(self.made(nodes, **changes).run)

    def made(self, nodes: list[int], *, timeout_seconds: float = 60, **changes: Any) -> Agent:
        first, port = not self.agents, self.port
        task = {
            "run": "r",
            "run_dir": str(self.folder),
            "nodes": nodes,
            "devices": 1,
            "timeout_seconds": timeout_seconds,
            "place": [f"node1:{port}", "127.0.0.1", port, "127.0.0.1", "lo", self.listener.detach() if first else None],
            "plan": f"plan of node {len(self.agents)}",
            "recipe": "name: a",
            "argv": ["scripted_worker", "parent", str(self.folder)],
            **changes,
        }
        self.agents.append(Agent(task))
        return self.agents[-1]

    def script(self, *acts: list[int | str]) -> None:
        """Say what the process of each rank does in each attempt."""
        (self.folder / "script.json").write_text(json.dumps(acts))

    def attempts(self, rank: int) -> list[dict[str, Any]]:
        path = self.folder / f"attempts-{rank}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def wait(self, what: Callable[[], bool]) -> None:
        end = time.monotonic() + 100
        while not what():
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nodes:
    monkeypatch.setenv("PYTHONPATH", f"{SHARED}{os.pathsep}{Path(module.__file__).parents[1]}")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    return Nodes(tmp_path)


def test_processes_of_all_nodes_have_neighbouring_places_and_one_plan(nodes: Nodes) -> None:
    nodes.script([], [], [], [])
    ended = [nodes.start([2], devices=2) for _ in range(2)]
    assert [one.result() for one in ended] == [0, 0]
    found = [nodes.attempts(rank)[0] for rank in range(4)]
    assert [place["RANK"] for place in found] == ["0", "1", "2", "3"]
    assert [place["LOCAL_RANK"] for place in found] == ["0", "1", "0", "1"]
    assert {place["WORLD_SIZE"] for place in found} == {"4"}
    assert {place["LOCAL_WORLD_SIZE"] for place in found} == {"2"}
    assert len({(place["MASTER_ADDR"], place["MASTER_PORT"]) for place in found}) == 1
    assert [int(place["BIGTRAIN_LISTENER"]) >= 0 for place in found] == [True, False, False, False]
    assert len({place["plan"] for place in found}) == 1
    assert all(place["parent"] for place in found)


@pytest.mark.parametrize("code", [1, 2, 3])
def test_what_is_said_to_be_wrong_ends_the_run_everywhere_and_is_not_tried_again(nodes: Nodes, code: int) -> None:
    nodes.script([code], [code])
    assert [one.result() for one in [nodes.start([2]) for _ in range(2)]] == [code, code]
    assert len(nodes.attempts(0)) == len(nodes.attempts(1)) == 1


def test_wrong_input_that_one_rank_alone_sees_ends_the_other_node(nodes: Nodes, capsys: Any) -> None:
    nodes.script([2], [CRASHED])
    assert [one.result() for one in [nodes.start([2]) for _ in range(2)]] == [2, 2]
    assert "another node has ended the run with 2" in capsys.readouterr().err


def test_another_recipe_is_refused_on_every_node_before_anything_starts(nodes: Nodes) -> None:
    ended = [nodes.start([2]), nodes.start([2], recipe="name: b")]
    for one in ended:
        with pytest.raises(InputError, match=r"^the nodes differ: recipe is name: [ab] on .*\(node 1\) and name: [ab]"):
            one.result()
    assert not nodes.attempts(0)


def test_another_number_of_devices_is_refused(nodes: Nodes) -> None:
    ended = [nodes.start([2]), nodes.start([2], devices=2)]
    for one in ended:
        with pytest.raises(InputError, match=r"devices is [12] on"):
            one.result()


def test_after_a_fault_of_one_process_all_start_again(nodes: Nodes, capsys: Any) -> None:
    nodes.script([CRASHED], [WAIT])
    assert [one.result() for one in [nodes.start([2]) for _ in range(2)]] == [0, 0]
    assert len(nodes.attempts(0)) == len(nodes.attempts(1)) == 2
    assert f"the training process crashed; starting again from the start (1 of {RESTARTS})" in capsys.readouterr().out


def test_without_a_new_checkpoint_the_third_restart_is_the_last(nodes: Nodes, capsys: Any) -> None:
    nodes.script([CRASHED] * 9)
    assert nodes.start([1]).result() == 1
    assert len(nodes.attempts(0)) == 1 + RESTARTS
    assert (
        f"error: the training process crashed; {RESTARTS} restarts brought no new checkpoint" in capsys.readouterr().err
    )


def test_with_new_checkpoints_there_may_be_more(nodes: Nodes, capsys: Any) -> None:
    nodes.script([CRASHED, CRASHED, "save", CRASHED, CRASHED, "save"])
    assert nodes.start([1]).result() == 0
    assert len(nodes.attempts(0)) == 7
    assert "starting again from step 3 (1 of 3)" in capsys.readouterr().out


def test_asked_to_stop_on_one_node_all_save_and_end(nodes: Nodes) -> None:
    nodes.script([WAIT], [WAIT])
    ended = [nodes.start([2]) for _ in range(2)]
    nodes.wait(lambda: bool(nodes.attempts(0) and nodes.attempts(1)))
    nodes.agents[1]._stops.asked.append(SIGTERM)
    nodes.wait(ended[1].done)
    assert ended[1].result() == 75
    nodes.agents[0]._stops.asked.append(
        SIGTERM
    )  # the ranks of the other node agree with it, as those of the script do not
    assert ended[0].result() == 75


def test_a_signal_while_other_nodes_are_waited_for_ends_it(nodes: Nodes) -> None:
    waiting, before = nodes.made([2]), signal.getsignal(SIGTERM)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), SIGTERM))
    timer.start()
    with pytest.raises(BigtrainError, match="^SIGTERM: ended before a checkpoint; launch again to start"):
        waiting.run()
    timer.join()
    assert signal.getsignal(SIGTERM) is before
    assert not nodes.attempts(0)


def test_a_signal_is_passed_on_to_the_processes(nodes: Nodes) -> None:
    nodes.script([WAIT])
    training = nodes.made([1])

    def ask() -> None:
        nodes.wait(lambda: bool(nodes.attempts(0)))
        os.kill(os.getpid(), SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    assert training.run() == 75
    thread.join()


def test_a_process_that_is_killed_is_a_fault(nodes: Nodes, capsys: Any) -> None:
    nodes.script(["kill"])
    assert nodes.start([1]).result() == 0
    said = "the training process was ended by SIGKILL; starting again from the start (1 of 3)"
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_of_a_rank_that_hangs_all_nodes_know(nodes: Nodes, capsys: Any) -> None:
    nodes.script(["hang", 0], ["idle", 0])
    assert [one.result() for one in [nodes.start([2], timeout_seconds=4) for _ in range(2)]] == [0, 0]
    said = capsys.readouterr().err
    assert said.count("rank 0 on") == 2
    assert "is stuck in data of step 6, idle; nothing moved for 4 s" in said
    assert len(list(nodes.folder.glob("stacks-*.txt"))) == 1  # of two agents on one host


def test_too_few_nodes_end_after_the_timeout(nodes: Nodes) -> None:
    text = r"fewer than 2 nodes came to node1:\d+ within 1 s \(cluster.timeout\); launch the same on each"
    with pytest.raises(InputError, match=text):
        nodes.start([2], timeout_seconds=1).result()


def test_a_node_that_comes_is_taken_in_after_a_checkpoint(nodes: Nodes) -> None:
    nodes.script([WAIT], [])
    first = nodes.start([1, 2])
    nodes.wait(lambda: bool(nodes.attempts(0)))
    second = nodes.start([1, 2])
    assert (first.result(), second.result()) == (0, 0)
    assert [attempt["WORLD_SIZE"] for attempt in nodes.attempts(0)] == ["1", "2"]
    assert [attempt["WORLD_SIZE"] for attempt in nodes.attempts(1)] == ["2"]


@pytest.mark.slow
def test_a_node_that_leaves_does_not_end_an_elastic_run(nodes: Nodes) -> None:
    nodes.script([WAIT, 0], [WAIT])
    ended = [nodes.start([1, 2]) for _ in range(2)]
    nodes.wait(lambda: bool(nodes.attempts(0) and nodes.attempts(1)))
    nodes.agents[1]._stops.asked.append(SIGTERM)
    assert ended[1].result() == 75
    nodes.agents[1]._meeting._rendezvous._stop_heartbeats()  # as when its process has ended
    assert ended[0].result() == 0
    assert [attempt["WORLD_SIZE"] for attempt in nodes.attempts(0)] == ["2", "1"]
