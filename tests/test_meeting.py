"""Nodes that meet, as threads of this process on loopback."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from torch.distributed import DistNetworkError

from bigtrain import meeting as module
from bigtrain.errors import BigtrainError, InputError
from bigtrain.meeting import Lost, Meeting, Over, Round, place_of

Meet = Callable[..., list[Meeting]]

BEATS, LAST_CALL = module.BEAT_SECONDS, module.LAST_CALL_SECONDS
"""As they are; the tests have shorter ones."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nodes tell every three seconds that they are there, and no store but ours."""
    for name, value in module.QUIET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "BEAT_SECONDS", 3)
    monkeypatch.setattr(module, "LAST_CALL_SECONDS", 1)
    monkeypatch.setattr(module, "PARTING_SECONDS", 0.5)


@pytest.fixture
def meet() -> Iterator[Meet]:
    """Return a function that gives the meetings of so many nodes, of a run of `least:most`; the first is the host."""
    made: list[Meeting] = []

    def nodes(count: int, *between: int, timeout_seconds: float = 30) -> list[Meeting]:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        for index in range(count):
            number = None if index else listener.detach()
            place = ("node1:1", "127.0.0.1", port, "127.0.0.1", number)
            made.append(Meeting(*place, run="r", nodes=between, timeout_seconds=timeout_seconds))
        return made

    yield nodes
    for one in made:
        one._rendezvous._stop_heartbeats()


def together(meetings: list[Meeting]) -> list[Round]:
    with ThreadPoolExecutor(len(meetings)) as pool:
        return list(pool.map(lambda one: one.next_round(60), meetings))


def of_two(meeting: Meeting) -> Round:
    """Go from round to round, as launchers do, to one of two nodes: the last call may end before a slow one comes."""
    while (now := meeting.next_round(60)).nodes < 2:
        until(partial(meeting.changed, now))
    return now


def until(what: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_nodes_meet_under_an_id_that_is_drawn_for_this_launch(meet: Meet) -> None:
    ids = [one._rendezvous.get_run_id() for one in meet(2, 2)]
    other = meet(1, 1)[-1]
    assert ids[0] == ids[1] != other._rendezvous.get_run_id()
    assert len(ids[0]) == 32


def test_a_node_that_is_gone_is_noticed_in_half_of_what_a_run_may_take_to_go_on() -> None:
    assert BEATS * module.MISSED_BEATS + LAST_CALL <= 15


def test_nodes_are_numbered_and_hear_each_other(meet: Meet) -> None:
    rounds = together(meet(2, 2))
    assert sorted((now.node, now.nodes) for now in rounds) == [(0, 2), (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(lambda now: now.gather("name", f"node {now.node}"), rounds))
    assert told == [["node 0", "node 1"]] * 2
    first, second = sorted(rounds, key=lambda now: now.node)
    assert place_of(first, "10.0.0.1", 7) == place_of(second, "10.0.0.2", None) == ("10.0.0.1", 7)


def test_what_nobody_tells_is_lost_after_the_timeout(meet: Meet) -> None:
    (now,) = together(meet(1, 1, timeout_seconds=1))
    with pytest.raises(Lost):
        now.told("nothing")
    now.tell("something", "yes")
    assert now.told("something") == "yes"


def test_too_few_nodes(meet: Meet) -> None:
    (one,) = meet(1, 2, timeout_seconds=1)
    with pytest.raises(InputError, match=r"^cluster.nodes: fewer than 2 nodes came to node1:1 within 1 s \(cluster"):
        one.next_round(60)
    one.begin()
    with pytest.raises(BigtrainError, match="^fewer than 2 nodes are left; launch again to go on") as error:
        one.next_round(0)
    assert not isinstance(error.value, InputError)


def test_what_comes_and_what_goes_is_noticed(meet: Meet) -> None:
    first, second = meet(2, 1, 2)
    (alone,) = together([first])
    assert (alone.node, alone.nodes) == (0, 1)
    assert first.changed(alone) is None
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(of_two, second)
        until(lambda: first.changed(alone) == "come")
        now = of_two(first)
        assert coming.result().nodes == now.nodes == 2
    second._rendezvous._stop_heartbeats()  # as when its power fails
    until(lambda: first.changed(now) == "gone")
    assert first.next_round(60).nodes == 1


def test_those_that_stay_when_others_leave(meet: Meet) -> None:
    first, second = meet(2, 1, 2)
    now, _ = together([first, second])
    assert not first.others_stay(now)
    second.leave(now)
    assert first.others_stay(now) and second.others_stay(now)
    first.leave(now)
    assert not second.others_stay(now)


def test_all_end_where_too_few_would_be_left(meet: Meet) -> None:
    first, second = meet(2, 2)
    now, _ = together([first, second])
    second.leave(now)
    assert not first.others_stay(now)


def test_how_a_run_has_ended_is_told_to_those_who_come_later(meet: Meet) -> None:
    first, second = meet(2, 1, 2)
    together([first])
    begun = time.monotonic()
    first.close(75, 1)
    assert time.monotonic() - begun < 60
    with pytest.raises(Over) as over:
        second.next_round(60)
    assert over.value.code == 75


def test_without_the_host_nothing_is_answered(meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = meet(1, 1)
    one.check_answering()

    class Gone:
        def check(self, *words: object) -> bool:
            raise DistNetworkError("connection reset")

        set = add = check

    monkeypatch.setattr(one, "_store", Gone())
    with pytest.raises(BigtrainError, match="^node1:1, where all nodes meet, is lost; launch again to go on"):
        one.check_answering()
    with pytest.raises(Lost):
        one.begin()
    one.close(0, 2)
    now = Round(Gone(), 0, 2)
    one.leave(now)
    assert not one.others_stay(now)


def test_what_listens_there_may_be_something_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        place = ("node1:1", "127.0.0.1", other.getsockname()[1], "127.0.0.1", None)
        with pytest.raises(InputError, match=r"cluster.rendezvous: node1:1: what listens there does not answer as"):
            Meeting(*place, run="r", nodes=[2], timeout_seconds=1)
