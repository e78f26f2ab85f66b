"""A run on this machine alone: its training processes, started again after a fault. No torch here."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

from bigtrain.errors import BigtrainError, NodesChanged
from bigtrain.restarts import FINAL, Restarts
from bigtrain.spawner import Workers, ended_by
from bigtrain.stops import FORWARDED, Stopped, Stops


def keep_running(started: Callable[[], Workers], run_dir: Path, stops: Stops) -> int:
    """Run processes until the run is over, starting all again where one was killed or crashed; return the exit code.

    `started` makes them for each attempt. Raises BigtrainError for a hang, with its stacks in the run folder, and
    Stopped for a signal that no process could save for.
    """
    restarts = Restarts(run_dir)
    while True:
        code = _attempt(started(), run_dir, stops, restarts)
        if code is not None:
            return code


def _attempt(workers: Workers, run_dir: Path, stops: Stops, restarts: Restarts) -> int | None:
    """Return the exit code, or None where the run is to be started again."""
    sent = len(stops.asked)

    def pass_on() -> None:
        nonlocal sent
        while sent < len(stops.asked):
            workers.send(stops.asked[sent])
            sent += 1

    stops.check()
    stops.waiting = False
    index, code = workers.alone(pass_on, run_dir)
    stops.waiting = True
    if code in (*FINAL, NodesChanged.exit_code):
        return code
    stops.check()
    if -code in FORWARDED:  # sent to the processes alone, before they could listen
        raise Stopped(-code)
    if restarts.again(ended_by(code, index, workers.count, platform.node()), hopeful=code < 0):
        return None
    return BigtrainError.exit_code
