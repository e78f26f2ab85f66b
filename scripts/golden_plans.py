"""Write tests/planner/golden: each shipped recipe planned for a few devices, so that a changed prediction is a diff.

With --check, only say which files differ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bigtrain.config.load import load_recipe
from bigtrain.config.shipped import recipe_path, shipped_recipes
from bigtrain.errors import BigtrainError
from bigtrain.planner.hardware import of_name
from bigtrain.planner.plan import plan
from bigtrain.planner.show import plan_lines

GOLDEN = Path(__file__).parent.parent / "tests" / "planner" / "golden"

DEVICES = {"t4": 1, "rtx4090": 1, "a100-80gb": 1, "h100": 8, "cpu-laptop": 1}
"""Devices of the table, since the rates of those are the same everywhere, with how many ranks."""

OVERRIDES = {"t4": ["amp.precision=fp16"]}
"""What a device needs that has no bf16."""


def cases() -> dict[str, tuple[str, str]]:
    """Return a recipe and a device for each file name."""
    return {f"{name}.{device}.txt": (name, device) for name in shipped_recipes() for device in DEVICES}


def golden_text(name: str, device: str) -> str:
    """Return what `bigtrain plan` prints, and the exact bytes; for a recipe that does not fit, why."""
    ranks = DEVICES[device]
    changes = OVERRIDES.get(device, [])
    words = [
        "$ bigtrain plan",
        name,
        *changes,
        "--device",
        device,
        *(["--world-size", str(ranks)] if ranks > 1 else []),
    ]
    lines = [" ".join(words)]
    try:
        planned = plan(load_recipe(name, changes), of_name(device), world_size=ranks)
    except BigtrainError as error:
        folder = str(recipe_path(name).parent)
        lines += [f"error: {line.replace(folder, 'recipes')}" for line in str(error).splitlines()]
        return "\n".join([*lines, f"exit code {error.exit_code}"]) + "\n"
    lines += [*plan_lines(planned), "", json.dumps(planned.memory.as_object(), indent=1)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def main() -> int:
    """Return 1 if --check is given and a file differs, else 0."""
    texts = {file: golden_text(*case) for file, case in cases().items()}
    if "--check" not in sys.argv[1:]:
        GOLDEN.mkdir(exist_ok=True)
        for stale in set(GOLDEN.glob("*.txt")) - {GOLDEN / file for file in texts}:
            stale.unlink()
        for file, text in texts.items():
            (GOLDEN / file).write_text(text, encoding="utf-8")
        print(f"written: {len(texts)} plans")
        return 0
    paths = {file: GOLDEN / file for file in texts}
    differing = [file for file, path in paths.items() if not path.is_file() or path.read_text("utf-8") != texts[file]]
    for file in differing:
        print(f"differs: {file}; run python scripts/golden_plans.py and look at the diff")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
