"""Set what several ranks compute, hold and send beside one process and beside the prediction: benchmarks/ranks.json.

    python scripts/bench_ranks.py

The cases are those of tests/test_same_run_ranks.py and tests/test_price_ranks.py, over gloo on this machine.
`same_run`: the largest relative difference of the losses, and of the norms, of 30 steps from those of one process.
`price`: the largest difference, in bytes and of any rank, of weights, masters and states, and of gradients, from what
is predicted, that of the first rank's peak, and what a rank sends in a step over what is predicted.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from provenance import provenance

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "shared")]


def same_run(folder: Path) -> dict[str, dict[str, float]]:
    """Return the largest differences from one process, by case."""
    tests: Any = import_module("test_same_run_ranks")
    found = {}
    for world, layouts in tests.LAYOUTS.items():
        cases = [(family, name) for family in tests.FAMILIES for name in layouts]
        recipes = [tests.recipe_of(family, world, layouts[name]) for family, name in cases]
        for (family, name), told in zip(cases, tests.on_ranks(recipes, world, folder, steps=tests.STEPS), strict=True):
            alone = tests.alone(family)
            found[f"{family}, {world} ranks, {name}"] = {
                key: tests.worst(told[key], alone[key]) for key in ("losses", "norms")
            }
    return found


def price(folder: Path) -> dict[str, dict[str, Any]]:
    """Return how far what ranks hold and send is from the prediction, by case."""
    tests: Any = import_module("test_price_ranks")
    corpus = folder / "long.jsonl"
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(3, 6))) for _ in range(300)]
    texts = (" ".join(draw.choices(words, k=8000)) for _ in range(6))
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = {}
    for group in ("two", "four", "nightly"):
        world = 2 if group == "two" else 4
        for name, ranks in tests.found(group, corpus, folder).items():
            first = ranks[0]
            _, sent = tests.sent_in_a_step(tests.recipe_of(world, tests.CASES[world][name], corpus), world)
            found[f"{world} ranks, {name}"] = {
                "state_bytes_off": max(
                    abs(first["measured"][cause] - first["predicted"][cause]) for cause in tests.KEPT
                ),
                "gradient_bytes_off": abs(first["gradients"]["measured"] - first["gradients"]["predicted"]),
                "state_bytes_above": max(
                    rank["measured"][cause] - first["predicted"][cause] for rank in ranks for cause in tests.KEPT
                ),
                "peak_error": first["error"],
                "sent": {kind: first["bytes"][kind] / size for kind, size in sent.items() if kind in first["bytes"]},
            }
    return found


def main() -> None:
    """Run all cases and write the file."""
    with tempfile.TemporaryDirectory() as folder:
        result = {**provenance(), "same_run": same_run(Path(folder)), "price": price(Path(folder))}
    worst = {key: max(case[key] for case in result["same_run"].values()) for key in ("losses", "norms")}
    off = max(max(case["state_bytes_off"], case["gradient_bytes_off"]) for case in result["price"].values())
    peak = max(abs(case["peak_error"]) for case in result["price"].values())
    print(f"losses within {worst['losses']:.1e}, norms {worst['norms']:.1e}; {off} bytes off, the peak {peak:.3%}")
    (ROOT / "benchmarks" / "ranks.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
