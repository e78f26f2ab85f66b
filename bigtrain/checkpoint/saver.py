"""The saves of a run: a disk that refuses one stops nothing, and with copies training goes on while one is written."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from bigtrain.checkpoint.manifest import folder_name, step_of
from bigtrain.checkpoint.snapshot import Snapshot
from bigtrain.checkpoint.space import free_bytes
from bigtrain.checkpoint.store import CheckpointStore
from bigtrain.errors import BigtrainError, CheckpointError, InputError, NewerFormat
from bigtrain.heartbeat import left_to
from bigtrain.sharding.part import Part
from bigtrain.units import format_bytes
from bigtrain.world import World


class Saver:
    """Publishes a run's checkpoints in a store: at once, or with `copies` from a copy, in one background thread.

    All ranks call the same methods in the same order. With copies, what the threads tell each other goes by
    `background`, a world of the same ranks that nobody else uses. There are never two saves under way. One that the
    disk refuses is told in one line on standard error and tried again at the next; what else goes wrong is raised, if
    in the background by the next call of `save`, `finish` or `require`.
    """

    def __init__(
        self, store: CheckpointStore, world: World, *, copies: bool = False, background: World | None = None
    ) -> None:
        self._store = store
        store.under_way = self.close
        self._publishing = store if background is None else store.over(background)
        self._world = world
        self._snapshot = Snapshot() if copies else None
        self._thread: threading.Thread | None = None
        self._step: int | None = None
        """Of the newest save that was begun."""
        self._newest: Path | None = None
        self._refused: OSError | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        tensor_files: Mapping[str, Mapping[str, Tensor]],
        texts: Mapping[str, str],
        parts: Mapping[str, Mapping[str, Part]] | None = None,
    ) -> Path:
        """Publish, or begin to publish, a checkpoint as `CheckpointStore.save` does; return what its folder will be.

        The tensors may change when this returns. A save that is under way is waited for first.
        """
        self.finish()
        self._step = step
        copies = self._copied(tensor_files)
        if copies is None:
            self._publish(step, tensor_files, texts, parts)
            self._raise()
        else:
            work = partial(self._publish, step, copies, texts, parts)
            self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
            self._thread.start()
        return self._store.run_dir / folder_name(step)

    def has(self, step: int) -> bool:
        """Tell whether a step is saved, or on its way."""
        if self._thread is None:
            return self._newest is not None and step_of(self._newest) == step
        return self._step == step

    def require(self, step: int) -> Path:
        """Wait until a step is on the disk. Raises BigtrainError if the disk refused it, naming the last good one."""
        self.finish()
        if self._newest is None or step_of(self._newest) != step:
            raise BigtrainError(f"step {step} could not be saved: {self._why()}; {self.last_good()}") from self._refused
        return self._newest

    def last_good(self) -> str:
        """Return which checkpoint is the last good one, as the end of a sentence."""
        self.close()
        try:
            newest = self._newest or self._store.newest()
        except CheckpointError as error:
            return str(error)
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"

    def back_to(self, every: int) -> Path | None:
        """Return the newest checkpoint at a multiple of so many steps, or of any kind; None where there is none.

        Later ones are set aside: the run takes their steps again, in another way.
        """
        self.close()
        found = self._newest_due(every) or self._store.newest()
        if found is not None:
            self._store.set_aside_after(step_of(found))
            self._newest, self._step = found, step_of(found)
        return found

    def _newest_due(self, every: int) -> Path | None:
        try:
            return self._store.newest(every=every)
        except NewerFormat:
            raise
        except CheckpointError:  # of those that were due none verifies
            return None

    def finish(self) -> None:
        """Wait for the save that is under way. Raises what went wrong with it, but for what the disk refused."""
        self.close()
        self._raise()

    def close(self) -> None:
        """Wait for the save that is under way, and raise nothing."""
        if self._thread is not None:
            with left_to(self._thread.ident):
                self._thread.join()
            self._thread = None

    def _copied(self, tensor_files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]] | None:
        """Return copies; None where there are to be none, or the host has no memory for them, which is told."""
        if self._snapshot is None:
            return None
        copies = None
        try:
            copies = self._snapshot.take(tensor_files)
        except (InputError, OSError) as error:
            _warn(f"checkpoints are written while training waits: no host memory for a copy: {error}")
        if self._world.any(copies is None):  # those that go on would wait for the others no longer than the timeout
            self._snapshot = copies = None
        return copies

    def _publish(
        self,
        step: int,
        tensor_files: Mapping[str, Mapping[str, Tensor]],
        texts: Mapping[str, str],
        parts: Mapping[str, Mapping[str, Part]] | None,
    ) -> None:
        self._refused = None
        try:
            self._newest = self._publishing.save(step, tensor_files, texts, parts)
        except OSError as error:
            self._refused = error
            if self._world.first:
                kept = f"{self._newest.name} is the newest" if self._newest else "those before are as they were"
                _warn(f"step {step} is not saved: {self._why()}; {kept}; the next save tries again")
        except BaseException as error:  # of a thread, raised where the run waits for it
            self._error = error

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _why(self) -> str:
        """Return what the disk refused, where, and what it has and would need."""
        error, run_dir = self._refused, self._store.run_dir
        assert error is not None
        free, needed = free_bytes(run_dir), format_bytes(self._publishing.needed_bytes)
        room = "" if free is None else f", and {format_bytes(free)} are free"
        return f"{error.filename or run_dir}: {error.strerror or error}; it needs {needed}{room}"


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
