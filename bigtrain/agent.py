"""The agent of a node: it meets those of other nodes, and keeps this one's training processes going with theirs.

Started by the launcher. Nodes meet through the rendezvous of torch's elastic agents; the processes are those of our own
spawner, whose exit codes say what torch's agent does not tell apart: stopped after a checkpoint, wrong input, a fault.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from bigtrain.checkpoint import manifest
from bigtrain.errors import BigtrainError, DoesNotFit, InputError, Interrupted, NodesChanged
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

QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""What torch reads when it is loaded or first used: no warnings about nodes that are gone, and no store of its own."""

BEAT_SECONDS, MISSED_BEATS = 3, 3
"""How often a node tells that it is there, and after how many times without it counts as lost."""

LAST_CALL_SECONDS = 5
"""How long the least number of nodes waits for more of them."""

RESTARTS = 3
"""How many faults in a row without a new checkpoint are tried again."""

LOOK_SECONDS = 0.1

PARTING_SECONDS = 15.0
"""How long the node where all meet waits for the others to end, who read there how the run ended."""

BEGUN, ENDED, CODE, LEAVING = "bigtrain/begun", "bigtrain/ended", "bigtrain/code", "bigtrain/leaving"


class Stopped(Exception):
    """A signal came while no training process was there to be told."""


class Round(NamedTuple):
    """One composition of nodes: this node's number among them, and where they tell each other things."""

    store: Any
    node: int
    nodes: int


class Agent:
    """What a node does from its launch to its end. `task` is what the launcher has written down for it.

    A fault of any process ends the processes of all nodes, since they wait for each other; each agent then meets the
    others again, and they go on from the newest checkpoint. A node that comes is taken in after a checkpoint.
    """

    def __init__(self, task: Mapping[str, Any]) -> None:
        self._task = task
        self._place, address, port, self._address, self._interface, self._listener = task["place"]
        self._run_dir = Path(task["run_dir"])
        self._least, self._most = task["nodes"][0], task["nodes"][-1]
        self._asked: list[int] = []
        self._forwarded = 0
        self._waiting = False
        self._faults, self._newest = 0, self._newest_step()
        self._round: Round | None = None
        self._store, self._rendezvous = self._joined(address, port)

    def run(self) -> int:
        """Train until the run is over, on whatever nodes there are, and return the exit code."""
        with self._signals_noted():
            code = None
            while code is None:
                try:
                    self._round = self._meet()
                    code = self._train(self._round)
                except Stopped:
                    return self._stopped_early()
                except _closed_errors():
                    return self._ended_elsewhere()
                except _lost_errors() as error:
                    self._check_answering(error)  # then it was one of the others that was lost, while they agreed
            self._end(code)
            return code

    def _joined(self, address: str, port: int) -> tuple[Any, Any]:
        from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
        from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
        from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

        timeout = timedelta(seconds=self._task["timeout_seconds"])
        first = self._listener is not None
        try:
            store = TCPStore(
                address, port, None, first, timeout, wait_for_workers=False, master_listen_fd=self._listener
            )
        except DistError as error:
            text = f"cluster.rendezvous: {self._place}: what listens there is no launcher of this run"
            raise InputError(f"{text} ({str(error).splitlines()[0]}); name another port") from None
        run = self._task["run"]
        return store, DynamicRendezvousHandler.from_backend(
            run,
            store,
            C10dRendezvousBackend(store, run),
            self._least,
            self._most,
            self._address,
            RendezvousTimeout(join=timeout, last_call=timedelta(seconds=LAST_CALL_SECONDS)),
            keep_alive_interval=BEAT_SECONDS,
            keep_alive_max_attempt=MISSED_BEATS,
        )

    def _meet(self) -> Round:
        """Wait for enough nodes. A run that has begun waits for a lost one as long as saving may take.

        Raises InputError if they never came, BigtrainError if too few are left.
        """
        from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

        end = time.monotonic() + SAVING_SECONDS
        self._waiting = True
        while True:
            if self._asked:
                raise Stopped
            try:
                found = self._rendezvous.next_rendezvous()
                return Round(found.store, found.rank, found.world_size)
            except RendezvousTimeoutError:
                begun = self._store.check([BEGUN])
                if not begun:
                    text = f"fewer than {self._least} nodes came to {self._place}"
                    use = "launch the same on each, with the same name and run folder"
                    seconds = f"{self._task['timeout_seconds']:g} s (cluster.timeout)"
                    raise InputError(f"cluster.nodes: {text} within {seconds}; {use}") from None
                if time.monotonic() > end:
                    raise BigtrainError(f"fewer than {self._least} nodes are left; launch again to go on") from None

    def _train(self, now: Round) -> int | None:
        """Train on the nodes of a round; return the exit code, or None where the nodes are to meet again."""
        try:
            text = self._agreed_plan(now)
        except InputError as error:
            self._close(error.exit_code)
            raise
        argv = [*self._task["argv"]]
        argv[1] = str(os.getpid())
        environment = {key: value for key, value in os.environ.items() if key not in QUIET}
        workers = Workers([sys.executable, "-P", "-m", *argv], text, environment, self._task["devices"])
        with ExitStack() as held:
            held.enter_context(workers.started(held.enter_context(self._places(now))))
            self._waiting, self._forwarded = False, 0
            self._store.set(BEGUN, "1")
            changed = self._watched(now, workers)
            index, code = workers.finish()
        return self._after(now, index, code, changed=changed)

    def _agreed_plan(self, now: Round) -> str:
        """Return the first node's plan, once all nodes are known to have been launched with the same."""
        from bigtrain.training.alike import refuse_differences
        from bigtrain.training.run_files import versions

        facts = {**versions(), "recipe": self._task["recipe"], "devices": str(self._task["devices"])}
        now.store.set(f"facts/{now.node}", json.dumps([platform.node(), facts]))
        if now.node == 0:
            now.store.set("plan", self._task["plan"])
        refuse_differences("node", [now.store.get(f"facts/{node}").decode() for node in range(now.nodes)])
        return str(now.store.get("plan").decode())

    @contextmanager
    def _places(self, now: Round) -> Iterator[Places]:
        """Hold the places of this node's processes; the first of all ranks listens for the others."""
        devices = self._task["devices"]
        size, first = now.nodes * devices, now.node * devices
        with ExitStack() as held:
            listener = held.enter_context(listening(self._address)) if now.node == 0 else None
            if listener is not None:
                now.store.set("meeting", json.dumps([self._address, listener.getsockname()[1]]))
            address, port = json.loads(now.store.get("meeting"))
            interface = None if "GLOO_SOCKET_IFNAME" in os.environ else self._interface
            yield Places(first, size, address, port, listener, interface)

    def _watched(self, now: Round, workers: Workers) -> bool:
        """Return once the processes are over, or have been ended because the nodes change; tell which."""
        watching, changed = True, False
        while not workers.over:
            time.sleep(LOOK_SECONDS)
            self._forward(now, workers)
            if not watching or changed:
                continue
            try:
                waiting = self._rendezvous.num_nodes_waiting()
            except _lost_errors():
                watching = False  # the processes tell whether the run can go on without the node where all met
                continue
            if len(self._rendezvous._state_holder.state.participants) < now.nodes:
                # A node that is gone without a word: the connections of its processes are not closed.
                workers.end(GRACE_SECONDS)
                changed = True
            elif waiting:
                workers.send(signal.SIGUSR2)
                changed = True
        return changed

    def _forward(self, now: Round, workers: Workers) -> None:
        """Pass signals on; the other nodes are told first that it was this one's wish to end."""
        while self._forwarded < len(self._asked):
            if self._forwarded == 0:
                self._tell_leaving(now)
            workers.send(self._asked[self._forwarded])
            self._forwarded += 1

    def _tell_leaving(self, now: Round) -> None:
        """Count this node out; without the one where all meet there is nothing to go on with."""
        count = now.nodes if self._listener is not None else 1
        try:
            now.store.add(LEAVING, count)
        except _lost_errors():
            return

    def _after(self, now: Round, index: int, code: int, *, changed: bool) -> int | None:
        """Return the exit code of a run whose processes have ended like this; None if it goes on."""
        if code in (0, InputError.exit_code, DoesNotFit.exit_code):
            return code
        if self._asked:
            return code if code == Interrupted.exit_code else self._stopped_early()
        if code == Interrupted.exit_code:
            return None if self._others_stay(now) else code
        if changed or code == NodesChanged.exit_code:
            return None
        return self._after_fault(index, code)

    def _others_stay(self, now: Round) -> bool:
        """Tell whether other nodes ended this, and enough are left."""
        try:
            leaving = int(now.store.add(LEAVING, 0))
        except _lost_errors():
            return False
        return 0 < leaving <= now.nodes - self._least

    def _after_fault(self, index: int, code: int) -> int | None:
        newest = self._newest_step()
        self._faults = 1 if newest > self._newest else self._faults + 1
        self._newest = newest
        what = killed(-code, index, self._task["devices"]) if code < 0 else f"a training process ended with {code}"
        if self._faults > RESTARTS:
            print(f"error: {what}; {RESTARTS} restarts brought no new checkpoint", file=sys.stderr)
            return BigtrainError.exit_code
        since = f"from step {newest}" if newest else "from the start"
        print(f"{what.partition(';')[0]}; starting again {since} ({self._faults} of {RESTARTS})", flush=True)
        return None

    def _end(self, code: int) -> None:
        """Tell the other nodes how the run has ended, unless they go on without this one."""
        if not (self._asked and self._round is not None and self._others_stay(self._round)):
            self._close(code)

    def _close(self, code: int) -> None:
        self._waiting = False
        try:
            self._store.set(CODE, str(code))
            self._rendezvous.shutdown()
            self._store.add(ENDED, 1)
            end = time.monotonic() + (PARTING_SECONDS if self._listener is not None else 0)
            nodes = 1 if self._round is None else self._round.nodes
            while self._store.add(ENDED, 0) < nodes and time.monotonic() < end:
                time.sleep(LOOK_SECONDS)
        except _lost_errors():
            return

    def _ended_elsewhere(self) -> int:
        """Return the exit code with which another node has ended the run."""
        self._waiting = False
        try:
            code = int(self._store.get(CODE))
            self._store.add(ENDED, 1)
        except _lost_errors():
            code = BigtrainError.exit_code
        if code:
            print(f"error: another node has ended the run with {code}; see what it says", file=sys.stderr)
        return code

    def _check_answering(self, error: Exception) -> None:
        """Raise BigtrainError if the node where all meet does not answer any more."""
        try:
            self._store.check([BEGUN])
        except _lost_errors():
            raise BigtrainError(f"{self._place}, where all nodes meet, is lost; launch again to go on") from error

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

        before = {number: signal.signal(number, note) for number in FORWARDED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _lost_errors() -> tuple[type[Exception], ...]:
    """Return what is raised where the node at which all meet does not answer."""
    from torch.distributed import DistError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError

    return RendezvousConnectionError, DistError


def _closed_errors() -> tuple[type[Exception], ...]:
    """Return what is raised where the run has ended."""
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousGracefulExitError

    return RendezvousClosedError, RendezvousGracefulExitError


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
