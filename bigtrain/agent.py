"""The agent of a node: it meets those of other nodes, and keeps this one's training processes going with theirs.

Started by the launcher. The processes are those of our own spawner: their exit codes tell a stop after a checkpoint,
wrong input and a fault apart.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from bigtrain.checkpoint import manifest
from bigtrain.errors import BigtrainError, DoesNotFit, InputError, Interrupted, NodesChanged
from bigtrain.meeting import LOOK_SECONDS, QUIET, Lost, Over, Round, meeting_of, place_of
from bigtrain.spawner import (
    FORWARDED,
    GRACE_SECONDS,
    SAVING_SECONDS,
    Places,
    Workers,
    die_with_parent,
    killed,
    listening,
)

TELL_SECONDS = 3.0
"""How often processes are told that nodes have come, until they end."""

RESTARTS = 3
"""How many faults in a row without a new checkpoint are tried again."""


class Stopped(Exception):
    """A signal came while no training process was there to be told."""


class Agent:
    """What a node does from its launch to its end. `task` is what the launcher has written down for it.

    A fault of any process ends the processes of all nodes, since they wait for each other; each agent then meets the
    others again, and they go on from the newest checkpoint. A node that comes is taken in after a checkpoint.
    """

    def __init__(self, task: dict[str, Any]) -> None:
        self._task = task
        self._address, self._interface = task["place"][3:5]
        self._run_dir = Path(task["run_dir"])
        self._asked: list[int] = []
        self._forwarded = 0
        self._waiting = False
        self._faults, self._newest = 0, self._newest_step()
        self._nodes = 1
        self._meeting = meeting_of(task)

    def run(self) -> int:
        """Train until the run is over, on whatever nodes there are, and return the exit code."""
        with self._signals_noted():
            code = None
            while code is None:
                try:
                    code = self._train(self._meet())
                except Stopped:
                    return self._stopped_early()
                except Over as over:
                    if over.code:
                        print(f"error: another node has ended the run with {over.code}", file=sys.stderr)
                    return over.code
                except Lost:
                    self._meeting.check_answering()  # then it was another one, while they agreed
            return code

    def _meet(self) -> Round:
        self._waiting = True
        if self._asked:
            raise Stopped
        now = self._meeting.next_round(SAVING_SECONDS)
        self._nodes = now.nodes
        return now

    def _train(self, now: Round) -> int | None:
        """Train on the nodes of a round; return the exit code, or None where the nodes are to meet again."""
        text = self._agreed_plan(now)
        argv = [*self._task["argv"]]
        argv[1] = str(os.getpid())
        environment = {key: value for key, value in os.environ.items() if key not in QUIET}
        workers = Workers([sys.executable, "-P", "-m", *argv], text, environment, self._task["devices"])
        with ExitStack() as held:
            held.enter_context(workers.started(held.enter_context(self._places(now))))
            self._waiting, self._forwarded = False, 0
            self._meeting.begin()
            changed = self._watched(now, workers)
            index, code = workers.finish()
        return self._after(now, index, code, changed=changed)

    def _agreed_plan(self, now: Round) -> str:
        """Return the first node's plan, once all nodes are known to have been launched with the same."""
        from bigtrain.training.alike import refuse_differences
        from bigtrain.training.run_files import versions

        if now.node == 0:
            now.tell("plan", self._task["plan"])
        facts = {**versions(), "recipe": self._task["recipe"], "devices": str(self._task["devices"])}
        told = now.gather("facts", json.dumps([platform.node(), facts]))
        try:
            refuse_differences("node", told)
        except InputError as error:
            self._close(error.exit_code)
            raise
        return now.told("plan")

    @contextmanager
    def _places(self, now: Round) -> Iterator[Places]:
        """Hold the places of this node's processes; the first of all ranks listens for the others."""
        devices = self._task["devices"]
        with ExitStack() as held:
            listener = held.enter_context(listening(self._address)) if now.node == 0 else None
            address, port = place_of(now, self._address, None if listener is None else listener.getsockname()[1])
            interface = None if "GLOO_SOCKET_IFNAME" in os.environ else self._interface
            yield Places(now.node * devices, now.nodes * devices, address, port, listener, interface)

    def _watched(self, now: Round, workers: Workers) -> bool:
        """Return once the processes are over; tell whether they were ended here because the nodes change."""
        watching = True
        change, told = None, -math.inf
        while not workers.over:
            time.sleep(LOOK_SECONDS)
            self._forward(now, workers)
            if change == "come" and not self._asked and time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                workers.send(signal.SIGUSR2)  # again and again: while they start they do not hear it
            if not watching or change is not None:
                continue
            try:
                change = self._meeting.changed(now)
            except Lost:
                watching = False  # the processes tell whether they can go on without the node where all met
            if change == "gone":
                workers.end(GRACE_SECONDS)  # its connections need not be closed, and then the others wait for it
        return change is not None

    def _forward(self, now: Round, workers: Workers) -> None:
        """Pass signals on; the other nodes are told first that it was this one that was asked to end."""
        while self._forwarded < len(self._asked):
            if self._forwarded == 0:
                self._meeting.leave(now)
            workers.send(self._asked[self._forwarded])
            self._forwarded += 1

    def _after(self, now: Round, index: int, code: int, *, changed: bool) -> int | None:
        """Return the exit code of a run whose processes have ended like this; None if it goes on here."""
        if code == Interrupted.exit_code and self._meeting.others_stay(now):
            return code if self._asked else None
        if code not in (0, InputError.exit_code, DoesNotFit.exit_code, Interrupted.exit_code):
            if self._asked:
                if not self._meeting.others_stay(now):
                    self._close(Interrupted.exit_code)
                raise Stopped
            if changed or code == NodesChanged.exit_code or not self._is_last(index, code):
                return None
            code = BigtrainError.exit_code
        self._close(code)
        return code

    def _is_last(self, index: int, code: int) -> bool:
        """Count a fault, say what is done about it, and tell whether it is the last."""
        newest = self._newest_step()
        self._faults = 1 if newest > self._newest else self._faults + 1
        self._newest = newest
        what = killed(-code, index, self._task["devices"]) if code < 0 else f"a training process ended with {code}"
        if self._faults > RESTARTS:
            print(f"error: {what}; {RESTARTS} restarts brought no new checkpoint", file=sys.stderr)
            return True
        since = f"from step {newest}" if newest else "from the start"
        print(f"{what.partition(';')[0]}; starting again {since} ({self._faults} of {RESTARTS})", flush=True)
        return False

    def _close(self, code: int) -> None:
        self._waiting = False
        self._meeting.close(code, self._nodes)

    def _stopped_early(self) -> int:
        """Return the exit code after a signal that no process could save for: earlier checkpoints are what there is."""
        name = signal.Signals(self._asked[0]).name
        if not self._newest_step():
            raise BigtrainError(f"{name}: ended before a checkpoint; launch again to start")
        raise Interrupted(f"{name}: the newest checkpoint is of step {self._newest_step()}; launch again to go on")

    def _newest_step(self) -> int:
        return max(map(manifest.step_of, manifest.step_folders(self._run_dir)), default=0)

    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        def note(number: int, _frame: FrameType | None) -> None:
            self._asked.append(number)
            if self._waiting:
                raise Stopped

        main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, note) for number in FORWARDED} if main else {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def main() -> int:
    """Be a node's agent, and return its exit code. Argument: the launcher's process id; standard input: the task."""
    die_with_parent(int(sys.argv[1]))
    os.environ |= QUIET
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        return Agent(json.load(sys.stdin)).run()
    except BigtrainError as error:
        return error.report()


if __name__ == "__main__":
    sys.exit(main())
