"""How the agents of several nodes find each other and agree: the rendezvous of torch's elastic agents, and its store.

Torch's own agent is not used: it knows only that processes succeeded or failed, and kills what has not ended in 30 s.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

from bigtrain.errors import BigtrainError, InputError

QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""What torch reads when it is loaded or first used: no warnings about nodes that are gone, and no store of its own."""

BEAT_SECONDS, MISSED_BEATS = 3, 3
"""How often a node tells that it is there, and after how many times without it counts as lost."""

LAST_CALL_SECONDS = 5
"""How long the least number of nodes waits for more of them."""

LOOK_SECONDS = 0.1

PARTING_SECONDS = 15.0
"""How long the node where all meet waits for the others to end, who read there how the run ended."""

BEGUN, ENDED, CODE, LEAVING = "bigtrain/begun", "bigtrain/ended", "bigtrain/code", "bigtrain/leaving"


class Lost(Exception):
    """A node did not answer in time: the one where all meet, or one that was to say something."""


class Over(Exception):
    """The run has ended; `code` is the exit code that the node has told which ended it."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Round(NamedTuple):
    """One composition of nodes: this node's number among them, and where they tell each other things."""

    store: Any
    node: int
    nodes: int

    def tell(self, key: str, text: str) -> None:
        """Tell the other nodes something. Raises Lost."""
        with _lost():
            self.store.set(key, text)

    def told(self, key: str) -> str:
        """Return what a node has told, once it has. Raises Lost."""
        with _lost():
            return str(self.store.get(key).decode())

    def heard(self, key: str) -> bool:
        """Tell whether a node has told something under a key. Raises Lost."""
        with _lost():
            return bool(self.store.check([key]))

    def gather(self, key: str, text: str) -> list[str]:
        """Return what each node tells under a key, in their order. Raises Lost."""
        self.tell(f"{key}/{self.node}", text)
        return [self.told(f"{key}/{node}") for node in range(self.nodes)]


class Meeting:
    """The place where nodes meet. `host` tells whether it is this one, `listener` is then the number of its socket."""

    def __init__(
        self,
        place: str,
        address: str,
        port: int,
        own_address: str,
        listener: int | None,
        *,
        run: str,
        nodes: Sequence[int],
        timeout_seconds: float,
    ) -> None:
        """Connect, as one of so many nodes. Raises InputError if what listens there is no launcher."""
        from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
        from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

        self.host = listener is not None
        self._place, self._least, self._timeout_seconds = place, nodes[0], timeout_seconds
        timeout = timedelta(seconds=timeout_seconds)
        try:
            self._store = _store_at(address, port, listener, timeout)
            own = _drawn_id(self._store, run)
        except Lost:
            text = f"cluster.rendezvous: {place}: what listens there does not answer as a launcher does"
            raise InputError(f"{text} within {timeout_seconds:g} s (cluster.timeout); name another port") from None
        self._rendezvous = DynamicRendezvousHandler.from_backend(
            own,
            self._store,
            C10dRendezvousBackend(self._store, own),
            nodes[0],
            nodes[-1],
            own_address,
            RendezvousTimeout(join=timeout, last_call=timedelta(seconds=LAST_CALL_SECONDS)),
            keep_alive_interval=BEAT_SECONDS,
            keep_alive_max_attempt=MISSED_BEATS,
        )

    def next_round(self, patience_seconds: float) -> Round:
        """Wait for enough nodes; once training has begun so long for those that were lost to come back.

        Raises InputError if they never came, BigtrainError if too few are left, Over, Lost.
        """
        from torch.distributed.elastic.rendezvous import (
            RendezvousClosedError,
            RendezvousGracefulExitError,
            RendezvousTimeoutError,
        )

        end = time.monotonic() + patience_seconds
        while True:
            try:
                with _lost():
                    found = self._rendezvous.next_rendezvous()
                return Round(found.store, found.rank, found.world_size)
            except (RendezvousClosedError, RendezvousGracefulExitError):
                raise Over(self._code()) from None
            except RendezvousTimeoutError:
                self._check_patience(end)

    def begin(self) -> None:
        """Tell who comes later that there is a run to wait for."""
        with _lost():
            self._store.set(BEGUN, "1")

    def changed(self, now: Round) -> str | None:
        """Return whether a node has `come`, or is `gone` without a word; None for neither. Raises Lost."""
        with _lost():
            waiting = self._rendezvous.num_nodes_waiting()
        # Torch drops a node whose beats are missing, and leaves it to the processes to notice.
        if len(self._rendezvous._state_holder.state.participants) < now.nodes:
            return "gone"
        return "come" if waiting else None

    def leave(self, now: Round) -> None:
        """Tell the other nodes of a round that it ends because this one was asked to."""
        try:
            with _lost():
                # Without the node where all meet there is nothing to go on with.
                now.store.add(LEAVING, now.nodes if self.host else 1)
        except Lost:
            return

    def others_stay(self, now: Round) -> bool:
        """Tell whether a round was ended by nodes that leave, and enough others are left."""
        try:
            with _lost():
                leaving = int(now.store.add(LEAVING, 0))
        except Lost:
            return False
        return 0 < leaving <= now.nodes - self._least

    def close(self, code: int, nodes: int) -> None:
        """End the run for all nodes with an exit code; where they meet, wait a moment until so many have read it."""
        try:
            with _lost():
                self._store.set(CODE, str(code))
                self._rendezvous.shutdown()
                self._store.add(ENDED, 1)
                end = time.monotonic() + (PARTING_SECONDS if self.host else 0)
                while time.monotonic() < end and self._store.add(ENDED, 0) < nodes:
                    time.sleep(LOOK_SECONDS)
        except Lost:
            return

    def check_answering(self) -> None:
        """Raise BigtrainError if the node where all meet does not answer any more."""
        try:
            with _lost():
                self._store.check([BEGUN])
        except Lost:
            raise BigtrainError(f"{self._place}, where all nodes meet, is lost; launch again to go on") from None

    def _check_patience(self, end: float) -> None:
        with _lost():
            begun = self._store.check([BEGUN])
        if not begun:
            text = f"cluster.nodes: fewer than {self._least} nodes came to {self._place}"
            within = f"within {self._timeout_seconds:g} s (cluster.timeout)"
            raise InputError(f"{text} {within}; launch the same on each, with the same name and run folder")
        if time.monotonic() > end:
            raise BigtrainError(f"fewer than {self._least} nodes are left; launch again to go on")

    def _code(self) -> int:
        with _lost():
            code = int(self._store.get(CODE))
            self._store.add(ENDED, 1)
        return code


def _drawn_id(store: Any, run: str) -> str:
    """Return what the nodes of this launch meet under: drawn by the first of them, so that no earlier one's fits."""
    with _lost():
        return str(store.compare_set(f"bigtrain/run/{run}", "", secrets.token_hex(16)).decode())


def _store_at(address: str, port: int, listener: int | None, timeout: timedelta) -> Any:
    """Return the store that nodes share. Raises Lost: torch itself would wait for ever for what never answers."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    found: list[Any] = []

    def connect() -> None:
        first = listener is not None
        with suppress(Lost), _lost():
            found.append(
                TCPStore(address, port, None, first, timeout, wait_for_workers=False, master_listen_fd=listener)
            )

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout.total_seconds())
    if not found:
        raise Lost
    return found[0]


@contextmanager
def _lost() -> Iterator[None]:
    """Turn what torch raises where a store does not answer into Lost."""
    from torch.distributed import DistError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError

    try:
        yield
    except (DistError, RendezvousConnectionError) as error:
        raise Lost(str(error)) from error


def meeting_of(task: dict[str, Any]) -> Meeting:
    """Return the meeting that a launcher has written down."""
    keys = {key: task[key] for key in ("run", "nodes", "timeout_seconds")}
    place, address, port, own_address, _, listener = task["place"]
    return Meeting(place, address, port, own_address, listener, **keys)


def place_of(now: Round, address: str, port: int | None) -> tuple[str, int]:
    """Return where the ranks of a round meet: what its first node tells, which listens there."""
    if port is not None:
        now.tell("ranks", json.dumps([address, port]))
    found_address, found_port = json.loads(now.told("ranks"))
    return str(found_address), int(found_port)
