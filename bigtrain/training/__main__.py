"""One training process, started by the launcher: its plan comes on standard input."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its launcher ends, however that ends (Linux)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def main() -> int:
    """Train, and return the exit code.

    Arguments: the launcher's process id, the run folder, the keys that may differ on resume, the user's own command.
    """
    parent, run_dir, allowed = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    sys.argv = sys.argv[4:]
    die_with_parent(parent)
    from bigtrain.config.load import read_recipe
    from bigtrain.errors import BigtrainError
    from bigtrain.planner.plan import plan
    from bigtrain.training.loop import train

    try:
        # The plan was made by the launcher, so a place in its text would mean nothing to the user.
        recipe = read_recipe(sys.stdin.buffer.read(), "plan.yaml").with_origins({})
        train(plan(recipe), run_dir, allowed=[key for key in allowed.split(",") if key])
    except BigtrainError as error:
        return error.report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
