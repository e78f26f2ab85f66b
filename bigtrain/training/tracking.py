"""Dashboards besides TensorBoard, through Accelerate's tracking: they see every row, and no training waits for them.

Each has a thread of its own: it starts, writes and ends its tracker there, so that a server that answers late or never
holds up nothing, and a tracker cannot replace what signals do, which only a main thread may.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from queue import Full, Queue
from typing import Any

from bigtrain.config.trackers import TENSORBOARD
from bigtrain.heartbeat import beat
from bigtrain.training.dashboard import Story, open_dashboard

MOST_WAITING = 10_000
"""Rows that a tracker has not taken yet; later ones are lost to it, and are in metrics.jsonl."""

CLOSE_SECONDS = 60.0
"""So long the end of a run waits for trackers, all together."""

BEAT_SECONDS = 0.25

THREAD = "tracker "
"""How the names of trackers' threads begin."""

Row = Mapping[str, Any]


class Trackers:
    """Pass the rows of a run on to trackers by name; TensorBoard is not among them."""

    def __init__(self, names: Iterable[str], story: Story) -> None:
        self._feeds = [
            Feed(name, partial(open_dashboard, name, story)) for name in dict.fromkeys(names) if name != TENSORBOARD
        ]

    def write(self, row: Row) -> None:
        """Pass a row on; returns at once."""
        for feed in self._feeds:
            feed.put(row)

    def close(self) -> None:
        """End all of them, or leave behind those that take too long."""
        until = time.monotonic() + CLOSE_SECONDS
        for feed in self._feeds:
            feed.end()
        for feed in self._feeds:
            feed.join(until)


class Feed:
    """One tracker in its thread. Whatever fails is told once on standard error, and the run goes on."""

    def __init__(self, name: str, start: Callable[[], Any]) -> None:
        self._name, self._start = name, start
        self._rows: Queue[Row | None] = Queue(MOST_WAITING)
        self._warned = False
        self._thread = threading.Thread(target=self._serve, name=f"{THREAD}{name}", daemon=True)
        self._thread.start()

    def put(self, row: Row) -> None:
        """Have a row written when its turn comes."""
        if not self._thread.is_alive():  # it did not start, and has said so
            return
        try:
            self._rows.put_nowait(row)
        except Full:
            self._warn(f"takes rows too slowly; those from step {row['step']} on are lost to it")

    def end(self) -> None:
        """Have the tracker ended after the rows that wait."""
        with suppress(Full):
            self._rows.put_nowait(None)

    def join(self, until: float) -> None:
        """Wait for the end until some time of the monotonic clock; who watches this process sees that it lives."""
        while self._thread.is_alive() and time.monotonic() < until:
            beat()
            self._thread.join(BEAT_SECONDS)
        if self._thread.is_alive():
            waiting = sum(row is not None for row in list(self._rows.queue))
            self._warn(f"did not end in time; {waiting} rows may be lost to it")

    def _serve(self) -> None:
        tracker = None
        with self._told("the run goes on without it"):
            tracker = self._start()
        if tracker is None:
            return
        while (row := self._rows.get()) is not None:
            with self._told("rows may be lost to it"):
                tracker.log(numbers(row), step=row["step"])
        with self._told("its last rows may be lost"):
            tracker.finish()

    @contextmanager
    def _told(self, then: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:  # of a library of others: nothing of it may end the run
            self._warn_of(error, then)

    def _warn_of(self, error: BaseException, then: str) -> None:
        said = str(error).strip().splitlines() or [type(error).__name__]
        self._warn(f"{said[0]}; {then}")

    def _warn(self, text: str) -> None:
        if not self._warned:
            print(f"warning: {self._name}: {text}", file=sys.stderr, flush=True)
        self._warned = True


def are_left_behind() -> bool:
    """Tell whether a tracker has not ended: its library may wait for its server when the interpreter ends."""
    return any(thread.name.startswith(THREAD) for thread in threading.enumerate())


def numbers(row: Row) -> dict[str, float]:
    """Return what of a metrics row can be drawn over its steps."""
    return {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
