"""Counts of the fault matrix: what was tried and what passed, by its row, for benchmarks/faults.json."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VARIABLE = "BIGTRAIN_FAULT_COUNTS"
"""A folder into which each row's counts are written, a file a row; without it they are only asserted."""


@dataclass
class Counts:
    """What was tried of a row. `figures` are measured numbers worth keeping, such as the longest time."""

    row: str
    tier: str
    tried: int = 0
    failed: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def add(self, passed: object, what: str) -> None:
        """Count one case, named if it failed."""
        self.tried += 1
        if not passed:
            self.failed.append(what)

    def longest(self, name: str, value: float) -> None:
        """Keep the largest of a figure."""
        self.figures[name] = max(self.figures.get(name, value), value)

    def within(self, name: str, value: float, most: float) -> bool:
        """Keep a time, and tell whether it is within its bound; longer where nobody counts is no failure."""
        self.longest(name, round(value, 2))
        return value <= most or VARIABLE not in os.environ


@contextmanager
def counted(row: str, tier: str, part: str = "") -> Iterator[Counts]:
    """Count a row's cases, write the counts, and fail unless all passed; `part` where several tests make a row."""
    found, begun = Counts(row, tier), time.monotonic()
    yield found
    folder = os.environ.get(VARIABLE)
    if folder:
        name = "-".join(filter(None, (row, tier, part)))
        content = {"row": row, "tier": tier, "part": part, "tried": found.tried}
        content |= {"passed": found.tried - len(found.failed), "failed": found.failed[:20], "figures": found.figures}
        content |= {"seconds": round(time.monotonic() - begun, 1), "commit": _commit(), "cores": os.cpu_count()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    assert found.tried, f"{row}: nothing was tried"
    assert not found.failed, f"{row}: {len(found.failed)} of {found.tried} failed: {found.failed[:5]}"


def _commit() -> str:
    """Return the revision that is tested, with a plus where files differ from it."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    edited = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "bigtrain"], check=False).returncode
    return commit + "+" * bool(edited)
