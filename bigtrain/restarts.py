"""What happens to a run whose processes have ended: which faults are tried again, and how often. No torch here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bigtrain.checkpoint import manifest
from bigtrain.errors import BigtrainError, DoesNotFit, InputError, Interrupted
from bigtrain.stops import Stopped, Stops

RESTARTS = 3
"""How many faults in a row without a new checkpoint are tried again."""

FINAL = (
    0,
    BigtrainError.exit_code,
    InputError.exit_code,
    DoesNotFit.exit_code,
    Interrupted.exit_code,
)
"""Exit codes of training processes that said what there is to say: the same command would end the same way."""


class Restarts:
    """The faults of a run, counted since its newest checkpoint."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._faults, self._newest = 0, newest_step(run_dir)

    def again(self, what: str, *, hopeful: bool = True) -> bool:
        """Count a fault, say what is done about it, and tell whether to start again.

        One that is not `hopeful`, since it comes from what is computed, is tried again only if there is a checkpoint
        that was not there the last time: else the same would be computed again.
        """
        newest = newest_step(self._run_dir)
        went_on = newest > self._newest
        self._faults = 1 if went_on else self._faults + 1
        self._newest = newest
        if not hopeful and not went_on:
            print(f"error: {what} before a new checkpoint; not tried again", file=sys.stderr)
            return False
        if self._faults > RESTARTS:
            print(f"error: {what}; {RESTARTS} restarts brought no new checkpoint", file=sys.stderr)
            return False
        since = f"from step {newest}" if newest else "from the start"
        print(f"{what.partition(';')[0]}; starting again {since} ({self._faults} of {RESTARTS})", flush=True)
        return True


def newest_step(run_dir: Path) -> int:
    """Return the step of the newest checkpoint in a run folder, verified or not; 0 where there is none."""
    return max(map(manifest.step_of, manifest.step_folders(run_dir)), default=0)


@contextmanager
def stoppable(run_dir: Path) -> Iterator[Stops]:
    """Note signals; one that no process could save for ends the run with what there is.

    Raises Interrupted where there is a checkpoint to go on from, else BigtrainError.
    """
    stops = Stops()
    with stops.noted():
        try:
            yield stops
        except Stopped as stopped:
            raise stopped_early(stopped, run_dir) from None


def stopped_early(stopped: Stopped, run_dir: Path) -> BigtrainError:
    """Return what a run ends with after a signal that no process could save for: earlier checkpoints are there."""
    newest = newest_step(run_dir)
    if not newest:
        return BigtrainError(f"{stopped}: ended before a checkpoint; launch again to start")
    return Interrupted(f"{stopped}: the newest checkpoint is of step {newest}; launch again to go on")
