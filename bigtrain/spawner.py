"""One training process for each device of this machine: started together, ended together. No torch here."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import IO

from bigtrain.errors import BigtrainError
from bigtrain.world import LISTENER, NONE

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

LOOPBACK = "127.0.0.1"

LOOPBACK_NAME = "lo0" if sys.platform == "darwin" else "lo"

POLL_SECONDS = 0.02

GRACE_SECONDS = 3.0
"""What the others have, once one process has failed, before they are killed: they wait for what it does not send."""

SAVING_SECONDS = 600.0
"""What the others have once one has stopped after a checkpoint, which all of them write."""

STOPPED = 75
"""A worker's exit code after a signal and a checkpoint."""


class Workers:
    """Processes that run the same command, each with a place among ranks in its environment.

    The first one writes to this process's terminal; what another writes is shown only if that is the one that fails.
    """

    def __init__(self, argv: Sequence[str], text: str, environment: Mapping[str, str], count: int) -> None:
        self._argv, self._text, self._environment, self._count = argv, text, environment, count
        self._processes: list[subprocess.Popen[str]] = []
        self._outputs: list[IO[str] | None] = []

    def run(self) -> int:
        """Start all, give each the text on its standard input, pass signals on, and return the exit code.

        That is the first one's that is not 0; the others are ended then. Raises BigtrainError for a process that
        something from outside has ended.
        """
        with ExitStack() as held:
            listener = held.enter_context(_listening()) if self._count > 1 else None
            try:
                for index in range(self._count):
                    self._start(index, listener, held)
                with _signals_forwarded_to(self._processes):
                    for process in self._processes:
                        _feed(process, self._text)
                    return self._wait()
            finally:
                self._end(0.0)

    def _start(self, index: int, listener: socket.socket | None, held: ExitStack) -> None:
        environment: dict[str, str] = dict(self._environment)
        passed: tuple[int, ...] = ()
        if listener is not None:
            environment |= places(index, self._count, listener.getsockname()[1])
            passed = () if index else (listener.fileno(),)
            environment[LISTENER] = str(NONE if index else listener.fileno())
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

    def _wait(self) -> int:
        codes = self._ended()
        failed = [index for index, code in enumerate(codes) if code]
        if not failed:
            return 0
        self._end(SAVING_SECONDS if all(codes[index] == STOPPED for index in failed) else GRACE_SECONDS)
        # One that was killed comes first: the others only lost it.
        culprit = min(failed, key=lambda index: codes[index] or 0)
        code = codes[culprit]
        assert code is not None
        self._show(culprit)
        if code < 0:
            raise BigtrainError(_killed(-code, culprit, self._count))
        return code

    def _ended(self) -> list[int | None]:
        """Return the exit codes once one process has failed, or all have ended."""
        while True:
            codes = [process.poll() for process in self._processes]
            if any(codes) or None not in codes:
                return codes
            time.sleep(POLL_SECONDS)

    def _end(self, grace_seconds: float) -> None:
        """Wait so long for those that still run, then kill them."""
        end = time.monotonic() + grace_seconds
        while any(process.poll() is None for process in self._processes) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def _show(self, index: int) -> None:
        output = self._outputs[index]
        if output is not None:
            output.seek(0)
            sys.stderr.write(output.read())
            sys.stderr.flush()


def places(index: int, count: int, port: int) -> dict[str, str]:
    """Return what tells a process of this machine its place among so many, and where they meet: on loopback alone."""
    return {
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": LOOPBACK_NAME,
        "NCCL_SOCKET_IFNAME": LOOPBACK_NAME,
    }


@contextmanager
def _listening() -> Iterator[socket.socket]:
    """Hold a socket on a free port of loopback; torch's own store would listen on every interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen(socket.SOMAXCONN)
        yield listener


@contextmanager
def _aside() -> Iterator[IO[str]]:
    """Hold a file without a name for what a process writes."""
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        yield file


def _feed(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(text)
        process.stdin.close()
    except BrokenPipeError:  # it ended before it read; its exit code says why
        pass


def _killed(number: int, index: int, count: int) -> str:
    hint = "; the system does that when memory runs out: use a smaller train.micro_batch_size" if number == 9 else ""
    which = "the training process" if count == 1 else f"the training process of rank {index}"
    return f"{which} was ended by {signal.Signals(number).name}{hint}; launch again to go on"


@contextmanager
def _signals_forwarded_to(processes: Sequence[subprocess.Popen[str]]) -> Iterator[None]:
    """Pass signals on to the processes, and put the handlers back afterwards; only a main thread may have any."""

    def forward(number: int, _frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
