"""One rank of a profile, started by the launcher: its plan comes on standard input."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from bigtrain.spawner import die_with_parent


def main() -> int:
    """Profile, print what the first rank held, and return the exit code.

    Arguments: the launcher's process id, the options of `output.present` as JSON, its files as text, and `of_time`.
    """
    parent, options = int(sys.argv[1]), json.loads(sys.argv[2])
    die_with_parent(parent)
    from bigtrain.config.load import read_recipe
    from bigtrain.errors import BigtrainError
    from bigtrain.planner.plan import plan
    from bigtrain.profiling.output import present, profiled
    from bigtrain.world import world_of

    try:
        recipe = read_recipe(sys.stdin.buffer.read(), "plan.yaml").with_origins({})
        found = profiled(plan(recipe), of_time=options["of_time"])
        world = world_of(os.environ)
        if world is None or world.first:
            files = {name: Path(options[name]) for name in ("html", "png") if options[name]}
            present(found, as_json=options["as_json"], **files)
    except BigtrainError as error:
        return error.report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
