"""Processes that are started together and ended together; here they run a few lines of Python and no torch."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from bigtrain import spawner
from bigtrain.errors import BigtrainError
from bigtrain.spawner import CRASHED, Places, Workers, ended_by, listening
from bigtrain.world import LISTENER

PLACE = "import os, sys, json; rank = int(os.environ.get('RANK', 0)); text = sys.stdin.read(); "


def workers(script: str, count: int, text: str = "", passed: Sequence[int] = ()) -> Workers:
    return Workers([sys.executable, "-c", PLACE + script], text, os.environ, count, passed)


def told(folder: Path) -> list[Mapping[str, str]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def test_each_gets_the_text_and_its_place(tmp_path: Path) -> None:
    script = f"open(f'{tmp_path}/{{rank}}.json', 'w').write(json.dumps(dict(os.environ, text=text)))"
    assert workers(script, 3, "the plan").run() == 0
    found = told(tmp_path)
    assert [place["RANK"] for place in found] == [place["LOCAL_RANK"] for place in found] == ["0", "1", "2"]
    assert {(p["text"], p["WORLD_SIZE"], p["LOCAL_WORLD_SIZE"], p["MASTER_ADDR"]) for p in found} == {
        ("the plan", "3", "3", "127.0.0.1")
    }
    assert [int(place[LISTENER]) < 0 for place in found] == [False, True, True]


def test_the_first_of_all_ranks_has_a_socket_that_listens_on_loopback(tmp_path: Path) -> None:
    script = (
        "import socket; fd = int(os.environ['BIGTRAIN_LISTENER']); "
        "assert rank or socket.socket(fileno=fd).getsockname() == ('127.0.0.1', int(os.environ['MASTER_PORT']))"
    )
    assert workers(script, 2).run() == 0


def test_one_alone_has_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert workers("sys.exit('RANK' in os.environ)", 1).run() == 0


def test_places_go_on_from_those_of_other_nodes() -> None:
    places = Places(8, 16, "10.0.0.1", 29500, None, "eth1")
    assert places.environment(3, 4) == {
        "RANK": "11",
        "LOCAL_RANK": "3",
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
        LISTENER: "-1",
        "GLOO_SOCKET_IFNAME": "eth1",
    }
    assert "GLOO_SOCKET_IFNAME" not in Places(0, 2, "10.0.0.1", 1).environment(0, 1)
    with listening("127.0.0.1") as listener:
        first = Places(0, 2, "127.0.0.1", 1, listener, spawner.LOOPBACK_NAME)
        assert first.environment(0, 2)[LISTENER] == str(listener.fileno())
        assert first.environment(1, 2)[LISTENER] == "-1"
        assert first.environment(1, 2)["NCCL_SOCKET_IFNAME"] == spawner.LOOPBACK_NAME


@pytest.mark.parametrize("failing", [0, 1])
def test_the_code_of_the_one_that_fails_is_returned_and_what_it_wrote_is_shown(
    failing: int, capfd: pytest.CaptureFixture[str]
) -> None:
    script = f"print('by', rank, file=sys.stderr); sys.exit(2 if rank == {failing} else 0)"
    assert workers(script, 2).run() == 2
    shown = capfd.readouterr().err
    assert f"by {failing}" in shown
    assert ("by 1" in shown) == (failing == 1)


def test_the_others_are_ended_with_the_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawner, "GRACE_SECONDS", 0.1)
    begun = time.monotonic()
    assert workers("import time; time.sleep(0 if rank else 60); sys.exit(3)", 2).run() == 3
    assert time.monotonic() - begun < 50


def test_after_a_checkpoint_of_one_the_others_finish_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawner, "GRACE_SECONDS", 0.0)
    script = f"import time; time.sleep(rank / 2); open('{tmp_path}/' + str(rank), 'w'); sys.exit(75)"
    assert workers(script, 2).run() == 75
    assert (tmp_path / "1").is_file()


def test_one_that_is_killed_is_named() -> None:
    script = "os.kill(os.getpid(), 9) if rank else __import__('time').sleep(60)"
    with pytest.raises(BigtrainError, match=r"^the training process of rank 1 was ended by SIGKILL; the system does"):
        workers(script, 2).run()


def test_how_a_signal_is_told() -> None:
    assert ended_by(-9, 0, 1).startswith("the training process was ended by SIGKILL; the system does that when memory")
    assert ended_by(-15, 3, 4, "n1") == "the training process of rank 3 on n1 was ended by SIGTERM"
    assert ended_by(CRASHED, 1, 2) == "the training process of rank 1 crashed"
    assert ended_by(9, 0, 1) == "the training process ended with 9"


def test_the_error_that_says_what_is_wrong_comes_before_a_crash(capfd: pytest.CaptureFixture[str]) -> None:
    script = f"print('by', rank, file=sys.stderr); sys.exit(1 if rank else {CRASHED})"
    started = workers(script, 2)
    with listening("127.0.0.1") as listener, started.started(Places(0, 2, "127.0.0.1", 1, listener)):
        while not all(process.poll() is not None for process in started._processes):
            time.sleep(0.01)
        assert started.finish() == (1, 1)
    assert workers(f"sys.exit({CRASHED})", 1).run() == 1


def test_while_they_run_something_else_may_be_done() -> None:
    seen: list[int] = []
    assert workers("import time; time.sleep(0.3)", 1).alone(lambda: seen.append(1)) == (0, 0)
    assert seen


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_one_that_hangs_is_an_error(tmp_path: Path) -> None:
    script = "from bigtrain import heartbeat; heartbeat.begin(os.environ); heartbeat.enter('data', 6); "
    script += (
        "__import__('time').sleep(60 if rank else 0.1); heartbeat.enter('forward', 6); __import__('time').sleep(60)"
    )
    hanging = Workers([sys.executable, "-c", PLACE + script], "", os.environ, 2, timeout_seconds=2)
    with pytest.raises(BigtrainError, match=r"^rank 1 on .* is stuck in data of step 7, idle; nothing moved for 2 s"):
        hanging.alone(run_dir=tmp_path)
    assert hanging.over
    (path,) = tmp_path.glob("stacks-00000006-*.txt")
    assert "forward of step 7" in path.read_text()


def test_signals_are_passed_on_and_handlers_put_back(tmp_path: Path) -> None:
    script = (
        "import signal, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); "
        f"open(f'{tmp_path}/{{rank}}', 'w')\n"
        f"while len(os.listdir('{tmp_path}')) < 2: time.sleep(0.01)\n"
        "os.kill(os.getppid(), signal.SIGUSR1) if rank else None; time.sleep(60)"
    )
    before = signal.getsignal(signal.SIGUSR1)
    assert workers(script, 2).run() == 75
    assert signal.getsignal(signal.SIGUSR1) is before


def test_another_thread_has_no_signals_to_pass_on() -> None:
    codes = []
    thread = threading.Thread(target=lambda: codes.append(workers("sys.exit(2)", 1).run()))
    thread.start()
    thread.join()
    assert codes == [2]


def test_files_are_inherited_by_number() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert workers(f"os.fstat({listener.fileno()})", 1, passed=[listener.fileno()]).run() == 0


def test_none_is_left_when_starting_is_broken_off() -> None:
    started = workers("import time; time.sleep(60)", 2)
    with pytest.raises(KeyError), started.started(Places(0, 2, "127.0.0.1", 1)):
        raise KeyError
    assert started.over
    assert started.finish() == (0, -signal.SIGKILL)


def test_a_process_ends_with_its_parent() -> None:
    script = (
        "from bigtrain.spawner import die_with_parent; import time; die_with_parent(os.getppid() + rank); "
        "sys.exit(2 if rank == 0 else 0)"
    )
    assert workers(script, 1).run() == 2
    other = "from bigtrain.spawner import die_with_parent; die_with_parent(1); sys.exit(2)"
    assert workers(other, 1).run() == 1
