"""Measure what import and export take of host memory, into benchmarks/export_memory.json.

    python scripts/bench_export.py [--runs 3]

Each run is a process of its own (tests/shared/held_by_folders.py) with a GPT of 54.5 MB of weights in fp32, which it
writes as a Hugging Face folder, imports, and exports: as a folder, as a program of torch.export and as ONNX. `above` is
the highest resident memory in bytes of all runs while that was done, above what the process had before; the bound is
1.1 of the weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from provenance import provenance

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tests" / "shared" / "held_by_folders.py"
RESULT = ROOT / "benchmarks" / "export_memory.json"
PROGRAMS = ("pt2", "onnx")
BOUND = 1.1
"""What may be held, over the weights."""


def measured() -> dict[str, int]:
    """Return the bytes of one run: of the weights, of the largest tensor, and above the process by what was done."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(SCRIPT), folder, *PROGRAMS]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(runs: list[dict[str, int]]) -> dict[str, object]:
    """Return weights and largest tensor, what the worst run held for each thing done, and whether it kept the bound."""
    weights, largest = runs[0]["weights"], runs[0]["largest"]
    above = {name: max(run[name] for run in runs) for name in runs[0] if name not in ("weights", "largest")}
    shares = {name: round(held / weights, 3) for name, held in above.items()}
    within = {name: share <= BOUND for name, share in shares.items()}
    return {"weights": weights, "largest": largest, "above": above, "over_weights": shares, "within_bound": within}


def main() -> None:
    """Measure, print and write the file."""
    arguments = argparse.ArgumentParser(description="Host memory of import and export.")
    arguments.add_argument("--runs", type=int, default=3)
    runs = [measured() for _ in range(arguments.parse_args().runs)]
    result = summary(runs)
    print(json.dumps(result, indent=1))
    RESULT.write_text(json.dumps({**provenance(), "bound": BOUND, **result, "runs": runs}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
