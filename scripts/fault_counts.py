"""Run the fault matrix and write what was tried and what passed: benchmarks/faults.json, docs/reliability.md.

    python scripts/fault_counts.py            # what `make test` runs of it
    python scripts/fault_counts.py --nightly  # the long rows as well
    python scripts/fault_counts.py --merge FOLDER

Rows are those of docs/reliability.md. `--merge` runs nothing and takes the counts that tests have left in a folder
(BIGTRAIN_FAULT_COUNTS). With no failure in n cases the rate of failures is below 3/n with 95% confidence: `bound`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from provenance import provenance

ROOT = Path(__file__).parent.parent
WHERE = ROOT / "benchmarks" / "faults.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- fault matrix: scripts/fault_counts.py -->", "<!-- end of fault matrix -->"
TESTS = ("tests/faults", "tests/test_hosts.py")
"""Where rows are counted."""

ROWS = {
    "C1": "SIGKILL at every I/O operation of a save: fresh, over debris, during retention, in the background",
    "C2": "a rank killed in each phase of a step: the run goes on, losses bitwise the same",
    "C3": "power loss: unsynced writes dropped, legal states of a disk",
    "C4": "ENOSPC, EDQUOT, EIO, EROFS at every operation; a real full file system",
    "C5": "a checkpoint with bits flipped, zeroed, cut, files deleted or swapped, steps mixed, stale manifests",
    "C7": "100 random kills of one run on 2 ranks: weights bitwise the same",
    "R1": "resume: {BERT, GPT} x {plain, ZeRO 1, ZeRO 3} x {1, 2} ranks x {fp32, bf16}: bitwise",
    "R2": "4 -> 2 -> 1 -> 4 -> 3 ranks: no bit of the state differs, rows the same, loss within 1e-5",
    "R3": "the row of step 1,000,000 of 1e9 tokens, in under 1 s",
    "P1": "SIGKILL to a worker: noticed within 1 s, stepping again within 10 s",
    "P2": "SIGSTOP, a stuck loader, a stuck collective: out within the timeout + 2 s, culprit named",
    "P3": "SIGTERM, SIGINT, SIGUSR1 to the launcher, a rank, all; a second one; exit 75 within 25 s",
    "P5": "a rank slower by 0.2 s a step is named within 50 steps; no alarm in 500 clean ones",
    "P6": "a crash loop ends after 3 restarts without progress",
    "P7": "two hosts: one is lost, the run goes on; it comes back",
    "P8": "a kill each 120 s for 20 minutes: 90% of the time productive",
    "N1": "NaN or Inf in loss or gradient on one rank: applied on none, in no checkpoint",
    "N2": "spikes: stop, skip, rollback; the same rows left out when replayed",
    "N3": "one bit flipped in one replica: found, rank named; clean checks without alarm",
    "S1": "no unpickling, no code from files, no process from the recipe; every module's code",
    "S2": "hostile files: refused or passed over, nothing run, within 2 s and 200 MB",
    "S3": "listeners of a run on one node: all on loopback",
    "S4": "secrets in the environment: in no file and no output",
    "memory": "a save and a load within the memory of training",
}
"""The matrix; what has no counts yet is shown as such."""


def run(folder: Path, *, nightly: bool) -> bool:
    """Run the tests of the matrix, their counts into a folder; tell whether all passed."""
    environment = {**os.environ, "BIGTRAIN_FAULT_COUNTS": str(folder)}
    argv = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu" if nightly else "not gpu and not nightly", *TESTS]
    return subprocess.run(argv, cwd=ROOT, env=environment, check=False).returncode == 0


def merged(folder: Path) -> list[dict[str, Any]]:
    """Return the counts of a folder as rows, in the order of their names; the tiers and parts of a row stand alone."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    for row in found:
        if row["tried"] and row["passed"] == row["tried"]:
            row["bound"] = float(f"{3 / row['tried']:.2g}")
    return sorted(found, key=lambda row: (row["row"], row["tier"], row["part"]))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the matrix as a table: passed of tried, by tier."""
    lines = ["| row | fault | each time | nightly |", "|---|---|---|---|"]
    for name, fault in ROWS.items():
        cells = [
            told([row for row in rows if row["row"] == name and row["tier"] == tier]) for tier in ("ci", "nightly")
        ]
        lines.append(f"| {name} | {fault} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def told(rows: list[dict[str, Any]]) -> str:
    """Return what of some rows has passed, or that nothing was tried."""
    passed, tried = (sum(row[key] for row in rows) for key in ("passed", "tried"))
    return f"{passed:,} of {tried:,}" if tried else "not run"


def main() -> int:
    """Return 0 if all that was tried has passed."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--nightly", action="store_true", help="the long rows as well")
    asked.add_argument("--merge", type=Path, metavar="FOLDER", help="run nothing, take these counts")
    options = asked.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.merge or Path(temporary)
        passed = options.merge is not None or run(folder, nightly=options.nightly)
        rows = merged(folder)
    for row in rows:
        print(f"{row['row']:4}{row['tier']:9}{row['passed']:>7,} of {row['tried']:,}  {row['part']}")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    WHERE.write_text(json.dumps({**provenance(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0 if passed and all(row["passed"] == row["tried"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
