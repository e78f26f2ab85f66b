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
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bigtrain.errors import BigtrainError, InputError, Interrupted, NodesChanged
from bigtrain.hang import Stuck, told
from bigtrain.meeting import LOOK_SECONDS, QUIET, Lost, Over, Round, meeting_of, place_of
from bigtrain.restarts import FINAL, Restarts, stopped_early
from bigtrain.spawner import (
    GRACE_SECONDS,
    SAVING_SECONDS,
    Places,
    Workers,
    die_with_parent,
    ended_by,
    listening,
)
from bigtrain.stops import Stopped, Stops

TELL_SECONDS = 3.0
"""How often processes are told that nodes have come, until they end."""

COMPARE_SECONDS = 1.5
"""How long the agents have to tell each other what they know of a hang, which they all see at about the same time."""


class Agent:
    """What a node does from its launch to its end. `task` is what the launcher has written down for it.

    A fault of any process ends the processes of all nodes, since they wait for each other; each agent then meets the
    others again, and they go on from the newest checkpoint. A node that comes is taken in after a checkpoint.
    """

    def __init__(self, task: dict[str, Any]) -> None:
        self._task = task
        self._address, self._interface = task["place"][3:5]
        self._run_dir = Path(task["run_dir"])
        self._stops = Stops()
        self._stops.waiting = False
        self._forwarded = 0
        self._restarts = Restarts(self._run_dir)
        self._nodes = 1
        self._meeting = meeting_of(task)

    def run(self) -> int:
        """Train until the run is over, on whatever nodes there are, and return the exit code."""
        with self._stops.noted():
            code = None
            while code is None:
                try:
                    code = self._train(self._meet())
                except Stopped as stopped:
                    raise stopped_early(stopped, self._run_dir) from None
                except Over as over:
                    if over.code:
                        print(f"error: another node has ended the run with {over.code}", file=sys.stderr)
                    return over.code
                except Lost:
                    self._meeting.check_answering()  # then it was another one, while they agreed
            return code

    def _meet(self) -> Round:
        self._stops.waiting = True
        self._stops.check()
        now = self._meeting.next_round(SAVING_SECONDS)
        self._nodes = now.nodes
        return now

    def _train(self, now: Round) -> int | None:
        """Train on the nodes of a round; return the exit code, or None where the nodes are to meet again."""
        text = self._agreed_plan(now)
        argv = [*self._task["argv"]]
        argv[1] = str(os.getpid())
        environment = {key: value for key, value in os.environ.items() if key not in QUIET}
        command, timeout_seconds = [sys.executable, "-P", "-m", *argv], self._task["timeout_seconds"]
        workers = Workers(command, text, environment, self._task["devices"], timeout_seconds=timeout_seconds)
        with ExitStack() as held:
            held.enter_context(workers.started(held.enter_context(self._places(now))))
            self._stops.waiting, self._forwarded = False, 0
            self._meeting.begin()
            changed, hang = self._watched(now, workers)
            index, code = workers.finish()
        what = hang or ended_by(code, now.node * self._task["devices"] + index, workers.count, platform.node())
        return self._after(now, code, what, changed=changed)

    def _agreed_plan(self, now: Round) -> str:
        """Return the first node's plan, once all nodes are known to have been launched with the same."""
        from bigtrain.training.alike import refuse_differences
        from bigtrain.training.run_files import versions

        if now.node == 0:
            now.tell("plan", self._task["plan"])
        facts = {**versions(), "recipe": self._task["recipe"], "devices": str(self._task["devices"])}
        facts_of_all = now.gather("facts", json.dumps([platform.node(), facts]))
        try:
            refuse_differences("node", facts_of_all)
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

    def _watched(self, now: Round, workers: Workers) -> tuple[bool, str]:
        """Return once the processes are over: whether they were ended since the nodes change, and who has hung."""
        watching = True
        change, told_at = None, -math.inf
        while not workers.over:
            time.sleep(LOOK_SECONDS)
            self._forward(now, workers)
            hang = self._hang(now, workers, asked=watching and now.nodes > 1)
            if hang:
                workers.end(0.0)
                return False, hang
            if change == "come" and not self._stops.asked and time.monotonic() - told_at > TELL_SECONDS:
                told_at = time.monotonic()
                workers.send(signal.SIGUSR2)  # again and again: while they start they do not hear it
            if not watching or change is not None:
                continue
            try:
                change = self._meeting.changed(now)
            except Lost:
                watching = False  # the processes tell whether they can go on without the node where all met
            if change == "gone":
                workers.end(GRACE_SECONDS)  # its connections need not be closed, and then the others wait for it
        return change is not None, ""

    def _hang(self, now: Round, workers: Workers, *, asked: bool) -> str:
        """Say which rank of all nodes hangs, if one does; the stacks of those here are in the run folder then."""
        elsewhere = False
        with suppress(Lost):
            elsewhere = asked and now.heard("stuck")
        hang = workers.look(now=elsewhere)
        if hang is None:
            return ""
        ranks = hang.ranks
        with suppress(Lost):
            now.tell("stuck", "")
            now.tell(f"stuck/{now.node}", json.dumps([asdict(rank) for rank in ranks]))
            keys, end = [f"stuck/{node}" for node in range(now.nodes)], time.monotonic() + COMPARE_SECONDS
            while time.monotonic() < end and not all(map(now.heard, keys)):
                time.sleep(LOOK_SECONDS)
            heard = [now.told(key) for key in filter(now.heard, keys)]
            ranks = [Stuck(**one) for text in heard for one in json.loads(text)]
        text = told(ranks, hang.timeout_seconds, hang.write(self._run_dir))
        print(f"error: {text}", file=sys.stderr, flush=True)
        return text.partition("\n")[0]

    def _forward(self, now: Round, workers: Workers) -> None:
        """Pass signals on; the other nodes are told first that it was this one that was asked to end."""
        while self._forwarded < len(self._stops.asked):
            if self._forwarded == 0:
                self._meeting.leave(now)
            workers.send(self._stops.asked[self._forwarded])
            self._forwarded += 1

    def _after(self, now: Round, code: int, what: str, *, changed: bool) -> int | None:
        """Return the exit code of a run whose processes have ended like this; None if it goes on here."""
        if code == Interrupted.exit_code and self._meeting.others_stay(now):
            return code if self._stops.asked else None
        if code not in FINAL:
            if self._stops.asked:
                if not self._meeting.others_stay(now):
                    self._close(Interrupted.exit_code)
                self._stops.check()
            if changed or code == NodesChanged.exit_code or self._restarts.again(what):
                return None
            code = BigtrainError.exit_code
        self._close(code)
        return code

    def _close(self, code: int) -> None:
        self._stops.waiting = False
        self._meeting.close(code, self._nodes)


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
