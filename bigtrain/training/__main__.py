"""One training process, started by the launcher or an agent: its plan comes on standard input."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from traceback import print_exception
from types import TracebackType
from typing import NoReturn

from bigtrain import heartbeat, terminal
from bigtrain.spawner import CRASHED, die_with_parent

REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""What a disk says that takes nothing any more: before the first step there is nothing to go on with."""


def main() -> int:
    """Train, and return the exit code.

    Arguments: the parent's process id, the run folder, the keys that may differ on resume, the user's own command.
    """
    parent, run_dir, allowed = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    sys.argv = sys.argv[4:]
    die_with_parent(parent)
    sys.excepthook = _crash
    heartbeat.begin(os.environ)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback; who started this says what there is to go on from
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # until the loop listens: nodes may come while this starts
    with terminal.working("starting", aside=not _is_first(os.environ)):
        from bigtrain.config.load import read_recipe
        from bigtrain.errors import BigtrainError
        from bigtrain.planner.plan import plan
        from bigtrain.training.loop import train
        from bigtrain.world import world_of

    try:
        # The plan was made by the launcher, so a place in its text would mean nothing to the user.
        recipe = read_recipe(sys.stdin.buffer.read(), "plan.yaml").with_origins({})
        world = world_of(os.environ)
        # Of `least:most` nodes so many are here now.
        ranks = world.size if world is not None and isinstance(recipe.cluster.nodes, str) else None
        train(plan(recipe, world_size=ranks), run_dir, allowed=[key for key in allowed.split(",") if key])
    except BigtrainError as error:
        if terminal.is_verbose():
            print_exception(error)
        return error.report()
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return BigtrainError(f"{where}{error.strerror}; free some space there, or use another --run-dir").report()
    return 0


def _is_first(environment: Mapping[str, str]) -> bool:
    return environment.get("RANK", "0") == "0"


def _crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show an error that is none of ours and end at once: what it left behind may wait for other ranks."""
    # To the real one: torch's own hook calls this one with another, from which it would add the rank to each line.
    print_exception(kind, error, trace, file=sys.__stderr__)
    _end_at_once(CRASHED)


def _end(code: int) -> NoReturn:
    """End this process, at once where a tracker was left behind: everything of the run is done."""
    from bigtrain.training.tracking import are_left_behind

    if are_left_behind():
        _end_at_once(code)
    sys.exit(code)


def _end_at_once(code: int) -> NoReturn:
    """End without what libraries do at the end of an interpreter, which may wait for others."""
    for output in (sys.stdout, sys.__stderr__):
        if output is not None:
            output.flush()
    os._exit(code)


if __name__ == "__main__":
    _end(main())
