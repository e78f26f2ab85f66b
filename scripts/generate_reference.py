"""Write recipes/SCHEMA.json and recipes/REFERENCE.md; with --check, only say whether they are up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from bigtrain.config.reference import reference_files, write_reference

RECIPES = Path(__file__).parent.parent / "recipes"


def main() -> int:
    """Return 1 if --check is given and a file is stale, else 0."""
    if "--check" not in sys.argv[1:]:
        for file in write_reference(RECIPES):
            print(f"written: {file.name}")
        return 0
    files = reference_files().items()
    stale = [name for name, text in files if (RECIPES / name).read_text(encoding="utf-8") != text]
    for name in stale:
        print(f"stale: recipes/{name}; run python scripts/generate_reference.py")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
