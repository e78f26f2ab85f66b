"""Scripts as the ranks of a group over gloo on this machine, and what they print."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

SHARED = Path(__file__).parent
RANK = "{rank}"
"""Stands among a script's arguments for the number of each rank."""
SECONDS = 580
"""What a group has; two idle cores take a fraction of it."""


class Ended(NamedTuple):
    """What is left of a rank: its exit code, and what it wrote."""

    code: int
    out: str
    errors: str

    @property
    def told(self) -> list[Any]:
        """Return the lines of JSON objects that it printed."""
        return [json.loads(line) for line in self.out.splitlines() if line.startswith("{")]


def run_group(arguments: Sequence[object], world_size: int, *, seconds: float = SECONDS) -> list[Ended]:
    """Run Python with these arguments as each of so many ranks, whose places are in the environment; one has none."""
    (port,) = free_ports(1)
    common = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(SHARED)}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    ranks = []
    for rank in range(world_size):
        place = {**where, "RANK": rank, "LOCAL_RANK": rank} if world_size > 1 else {}
        ranks.append(
            subprocess.Popen(
                [sys.executable, *(str(rank) if argument == RANK else str(argument) for argument in arguments)],
                env={**os.environ, **common, **{name: str(value) for name, value in place.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    written = [rank.communicate(timeout=seconds) for rank in ranks]
    return [Ended(rank.returncode, *both) for rank, both in zip(ranks, written, strict=True)]


def told_by_all(arguments: Sequence[object], world_size: int, *, seconds: float = SECONDS) -> list[list[Any]]:
    """Return what each rank of a group prints, lines of JSON objects; all must end well."""
    ranks = run_group(arguments, world_size, seconds=seconds)
    assert not any(rank.code for rank in ranks), "\n".join(rank.errors[-4000:] for rank in ranks)
    return [rank.told for rank in ranks]


def free_ports(count: int) -> list[int]:
    """Return so many ports of this machine at which nobody listens."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]
