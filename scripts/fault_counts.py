"""Run the fault matrix and write what was tried and what passed: benchmarks/faults.json.

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
TESTS = ("tests/faults", "tests/test_nodes.py")
"""Where rows are counted."""


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
    WHERE.write_text(json.dumps({**provenance(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0 if passed and all(row["passed"] == row["tried"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
