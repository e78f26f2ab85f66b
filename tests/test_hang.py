"""What is said of a hang: the stacks that processes write, and which of them the others wait for."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bigtrain import hang
from bigtrain.activity import is_known
from bigtrain.hang import Hang, Stuck, culprit, examine, main_stack, told
from bigtrain.heartbeat import Beat

EXCHANGE = 'File "/lib/torch/distributed/distributed_c10d.py", line 4394 in all_reduce'
OWN = 'File "/lib/bigtrain/data/background.py", line 38 in __iter__'
MAIN = 'File "/lib/bigtrain/training/__main__.py", line 40 in main'

DUMP = f"""Thread 0x00007fc81f7fe6c0 (most recent call first):
  File "/lib/threading.py", line 982 in run

Current thread 0x00007fc8523dcb80 (most recent call first):
  {OWN}
  {MAIN}
"""


def stuck(rank: int, **changes: Any) -> Stuck:
    plain = {"host": "n1", "beats": 7, "step": 3, "place": "forward of step 4", "stopped": False, "quiet_seconds": 60.0}
    return Stuck(rank, **{**plain, "stack": [EXCHANGE, MAIN], **changes})


def test_the_main_thread_is_the_one_that_trains() -> None:
    assert main_stack(DUMP) == [OWN, MAIN]
    assert main_stack("") == []


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([stuck(0), stuck(1, stopped=True, stack=[]), stuck(2, stack=[OWN])], 1),
        ([stuck(0), stuck(1), stuck(2, stack=[OWN], beats=9)], 2),
        ([stuck(0), stuck(1, beats=6), stuck(2)], 1),
        ([stuck(1), stuck(0)], 0),
    ],
)
def test_the_culprit_is_stopped_or_waits_for_none_or_is_behind(ranks: list[Stuck], expected: int) -> None:
    assert culprit(ranks).rank == expected


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"stopped": True}, "stopped by a signal"),
        ({}, "waiting for other ranks"),
        ({"stack": [OWN]}, "idle"),
        ({"stack": [OWN], "quiet_seconds": 0.4}, "computing"),
    ],
)
def test_what_it_does_is_named(changes: dict[str, Any], state: str) -> None:
    assert stuck(1, **changes).described() == f"forward of step 4, {state}"


def test_one_line_names_it_and_its_stack_follows(tmp_path: Path) -> None:
    first, *frames = told([stuck(0), stuck(1, stack=[OWN] * 20)], 60, tmp_path / "stacks").splitlines()
    assert first == (
        "rank 1 on n1 is stuck in forward of step 4, idle; nothing moved for 60 s (cluster.timeout); "
        f"all stacks: {tmp_path / 'stacks'}"
    )
    assert frames == [f"  {OWN}"] * hang.SHOWN_FRAMES
    assert "stacks" not in told([stuck(0)], 60, None)


def test_all_stacks_are_in_one_file(tmp_path: Path) -> None:
    found = Hang([stuck(0), stuck(1, stack=[OWN])], ["a stack\n", DUMP], 60)
    path = found.write(tmp_path)
    assert path == tmp_path / f"stacks-00000003-{platform.node()}.txt"
    text = path.read_text()
    assert "rank 0 on n1: forward of step 4, waiting for other ranks, no sign of life for 60.0 s\na stack" in text
    assert "rank 1 on n1: forward of step 4, idle" in text
    assert OWN in text
    assert found.write(tmp_path / "absent") is None


@pytest.mark.skipif(not is_known(), reason="needs /proc")
def test_processes_write_their_stacks_and_stopped_ones_do_not() -> None:
    script = (
        "import faulthandler, sys, time; faulthandler.register(3, file=1); print(end='', flush=True); time.sleep(60)"
    )
    with ExitStack() as held:
        files = [held.enter_context(tempfile.TemporaryFile()) for _ in range(2)]
        started = [
            held.enter_context(subprocess.Popen([sys.executable, "-c", script], stdout=file, text=True))
            for file in files
        ]
        for process in started:
            held.callback(process.kill)
        os.kill(started[1].pid, signal.SIGSTOP)
        end = time.monotonic() + 60
        while "sleep" not in hang.waits_in(started[0].pid) or "stop" not in hang.waits_in(started[1].pid):
            assert time.monotonic() < end
            time.sleep(0.05)
        beats = [Beat(5, 3, "forward"), Beat(4, 3, "data")]
        ranks, texts = examine([one.pid for one in started], 2, beats, [9.0, 8.0], [file.fileno() for file in files])
    assert [(one.rank, one.beats, one.place, one.stopped) for one in ranks] == [
        (2, 5, "forward of step 4", False),
        (3, 4, "data of step 4", True),
    ]
    assert "line 1 in <module>" in texts[0]
    assert "line 1" not in texts[1]
