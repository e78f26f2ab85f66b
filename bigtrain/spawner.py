"""One training process for each device of this machine: started together, ended together. No torch here."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bigtrain.activity import is_known
from bigtrain.errors import BigtrainError, Interrupted, NodesChanged
from bigtrain.hang import Hang, told
from bigtrain.stops import FORWARDED
from bigtrain.watchdog import Watched
from bigtrain.world import LISTENER, NONE

LOOPBACK, LOOPBACK_NAME = "127.0.0.1", "lo0" if sys.platform == "darwin" else "lo"

POLL_SECONDS = 0.02

GRACE_SECONDS = 3.0
"""What the others have, once one process has failed, before they are killed: they wait for what it does not send."""

SAVING_SECONDS = 600.0
"""What the others have once one has stopped after a checkpoint, which all of them write."""

SAVED = (Interrupted.exit_code, NodesChanged.exit_code)
"""A worker's exit codes after a signal and a checkpoint."""

CRASHED = 70
"""That of one that raised an error which is none of ours, after its traceback (EX_SOFTWARE of sysexits(3))."""


@dataclass(frozen=True)
class Places:
    """Where the processes of this machine are among all ranks, and where all of them meet.

    `listener` is an open socket at that address where the very first rank is one of them. Without an `interface` gloo
    and NCCL look for one.
    """

    first: int
    world_size: int
    address: str
    port: int
    listener: socket.socket | None = None
    interface: str | None = None

    def environment(self, index: int, count: int) -> dict[str, str]:
        """Return what tells one of so many processes here its place."""
        found = {
            "RANK": str(self.first + index),
            "LOCAL_RANK": str(index),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
            LISTENER: str(NONE if index or self.listener is None else self.listener.fileno()),
        }
        if self.interface is not None:
            found |= {"GLOO_SOCKET_IFNAME": self.interface}
            found |= {"NCCL_SOCKET_IFNAME": self.interface} if self.interface == LOOPBACK_NAME else {}
        return found


class Workers:
    """Processes that run the same command, each with a place among ranks in its environment.

    The first one writes to this process's terminal; what another writes is shown only if that is the one that fails.
    """

    def __init__(
        self,
        argv: Sequence[str],
        text: str,
        environment: Mapping[str, str],
        count: int,
        passed: Sequence[int] = (),
        *,
        timeout_seconds: float | None = None,
    ) -> None:
        """Take the text that each gets on its standard input, and numbers of files that each inherits.

        With a timeout they are expected to beat (`heartbeat`), and one that does nothing for so long hangs.
        """
        self.count = count
        self._argv, self._text, self._environment = argv, text, environment
        self._passed = tuple(passed)
        self._timeout_seconds = timeout_seconds if is_known() else None
        self._watched: Watched | None = None
        self._saved_at: float | None = None
        self._processes: list[subprocess.Popen[str]] = []
        self._outputs: list[IO[str] | None] = []

    def run(self) -> int:
        """Run all on this machine alone, pass signals on, and return the exit code.

        That is the first one's that is not 0; the others are ended then. Raises BigtrainError for a process that
        something from outside has ended.
        """
        with _signals_forwarded_to(self):
            index, code = self.alone()
        if code < 0:
            raise BigtrainError(f"{ended_by(code, index, self.count)}; launch again to go on")
        return BigtrainError.exit_code if code == CRASHED else code

    def alone(self, meanwhile: Callable[[], None] = lambda: None, run_dir: Path | None = None) -> tuple[int, int]:
        """Run all on this machine alone, and return what `finish` does; `meanwhile` is called again and again.

        Raises BigtrainError for a hang; the stacks are in the run folder then.
        """
        with ExitStack() as held:
            places = held.enter_context(_alone(self.count)) if self.count > 1 else None
            held.enter_context(self.started(places))
            while not self.over:
                time.sleep(POLL_SECONDS)
                meanwhile()
                hang = self.look()
                if hang is not None:
                    raise BigtrainError(told(hang.ranks, hang.timeout_seconds, run_dir and hang.write(run_dir)))
            return self.finish()

    @contextmanager
    def started(self, places: Places | None) -> Iterator[None]:
        """Start all, and kill those that are left at the end; one process alone needs no place."""
        with ExitStack() as held:
            if self._timeout_seconds is not None:
                self._watched = Watched(self.count, self._timeout_seconds)
                held.callback(self._watched.close)
            try:
                for index in range(self.count):
                    self._start(index, places, held)
                for process in self._processes:
                    _feed(process, self._text)
                if self._watched is not None:
                    self._watched.begin([process.pid for process in self._processes], places.first if places else 0)
                yield
            finally:
                self.end(0.0)

    def look(self, *, now: bool = False) -> Hang | None:
        """Return what is known of a hang, if there is one; `now`: of all processes as they are, hang or not."""
        return None if self._watched is None else self._watched.look(now=now)

    @property
    def over(self) -> bool:
        """Tell whether one has failed, or all have ended; where one has stopped after a checkpoint, others may yet."""
        codes = [process.poll() for process in self._processes]
        failed = [code for code in codes if code]
        if None not in codes or any(code not in SAVED for code in failed):
            return True
        if failed and self._saved_at is None:
            self._saved_at = time.monotonic()
        return self._saved_at is not None and time.monotonic() - self._saved_at > SAVING_SECONDS

    def send(self, number: int) -> None:
        """Send a signal to those that run."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def finish(self) -> tuple[int, int]:
        """Wait for those that still run, however it ended, show what the culprit wrote, and return its index and code.

        The code is 0 only where all are, and negative for one that a signal has ended.
        """
        if not any(process.poll() for process in self._processes):
            return 0, 0
        self._wait(GRACE_SECONDS)
        codes = [process.poll() for process in self._processes]  # one that was killed may take longer than its victims
        failed = [index for index, code in enumerate(codes) if code]
        self.end(0.0)
        # One that was killed comes first, then one that says what is wrong: the others only lost it.
        culprit = min(failed, key=lambda index: (codes[index] == CRASHED, codes[index] or 0))
        if codes[culprit] not in SAVED:  # all of them have saved, and the first says so
            self._show(culprit)
        return culprit, codes[culprit] or 0

    def end(self, grace_seconds: float) -> None:
        """Wait so long for those that still run, then kill them."""
        self._wait(grace_seconds)
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                with suppress(subprocess.TimeoutExpired):  # in a sleep that only a device ends: it goes when that does
                    process.wait(GRACE_SECONDS)

    def _wait(self, most_seconds: float) -> None:
        end = time.monotonic() + most_seconds
        while any(process.poll() is None for process in self._processes) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)

    def _start(self, index: int, places: Places | None, held: ExitStack) -> None:
        environment: dict[str, str] = dict(self._environment)
        passed = self._passed
        if self._watched is not None:
            told_it, files = self._watched.inherited(index)
            environment |= told_it
            passed = (*passed, *files)
        if places is not None:
            environment |= places.environment(index, self.count)
            if places.listener is not None and index == 0:
                passed = (*passed, places.listener.fileno())
        output = held.enter_context(_aside()) if index else None
        self._outputs.append(output)
        # A process group of its own: what a terminal or a scheduler sends to the whole group must not reach it twice.
        self._processes.append(
            subprocess.Popen(
                self._argv,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                text=True,
                env=environment,
                process_group=0,
                pass_fds=passed,
            )
        )

    def _show(self, index: int) -> None:
        output = self._outputs[index]
        if output is not None:
            output.seek(0)
            sys.stderr.write(output.read())
            sys.stderr.flush()


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its launcher ends, however that ends (Linux)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def _alone(count: int) -> Iterator[Places]:
    """Hold places for processes that are all on this machine, which meet on loopback alone."""
    with listening(LOOPBACK) as listener:
        yield Places(0, count, LOOPBACK, listener.getsockname()[1], listener, LOOPBACK_NAME)


@contextmanager
def listening(address: str) -> Iterator[socket.socket]:
    """Hold a socket on a free port of an address; torch's own store would listen on every interface."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family, backlog=socket.SOMAXCONN) as listener:
        yield listener


@contextmanager
def _aside() -> Iterator[IO[str]]:
    """Hold a file without a name for what a process writes."""
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        yield file


def _feed(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it ended before it read; its exit code says why
        process.stdin.write(text)
        process.stdin.close()


def ended_by(code: int, rank: int, count: int, host: str = "") -> str:
    """Say how one of so many processes has ended: by a signal, for a negative exit code, or by itself."""
    where = f" on {host}" if host else ""
    which = "the training process" if count == 1 else f"the training process of rank {rank}{where}"
    if code == CRASHED:
        return f"{which} crashed"
    if code >= 0:
        return f"{which} ended with {code}"
    hint = "; the system does that when memory runs out: use a smaller train.micro_batch_size" if code == -9 else ""
    return f"{which} was ended by {signal.Signals(-code).name}{hint}"


@contextmanager
def _signals_forwarded_to(workers: Workers) -> Iterator[None]:
    """Pass signals on to the processes, and put the handlers back afterwards; only a main thread may have any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda number, _frame: workers.send(number)) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
