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
    """Train, and return the exit code; arguments: the launcher's process id, the run folder."""
    parent, run_dir = int(sys.argv[1]), Path(sys.argv[2])
    die_with_parent(parent)
    from bigtrain.config.load import read_recipe
    from bigtrain.errors import BigtrainError
    from bigtrain.planner.plan import plan
    from bigtrain.training.loop import train

    try:
        train(plan(read_recipe(sys.stdin.buffer.read(), "plan.yaml")), run_dir)
    except BigtrainError as error:
        return error.report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
