"""The child process of `bigtrain.data.ensure`: prepares the recipe that comes on standard input."""

from __future__ import annotations

import json
import os
import sys
import threading

from bigtrain.data.build import prepare
from bigtrain.data.ensure import FAULTS_FD, recipe_told
from bigtrain.errors import DataError


def main() -> int:
    """Prepare; return 0, or 2 after writing the faults as JSON to the descriptor that the parent waits on."""
    recipe = recipe_told(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        prepare(recipe)
    except DataError as error:
        with os.fdopen(int(os.environ[FAULTS_FD]), "w") as pipe:
            json.dump(error.faults, pipe)
        return DataError.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _end_with_parent() -> None:
    # The descriptor itself: a thread that waits in a buffered reader holds its lock when Python shuts down.
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
