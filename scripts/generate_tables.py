"""Write generated tables into README.md and docs/*.md; with --check, only say whether they are up to date.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`. Those of keys have the rows that translations
read, those of speed come from what is measured under benchmarks/.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import speed_tables

from bigtrain.translation.tables import DEEPSPEED, NANOGPT, TRAINER, markdown

ROOT = Path(__file__).parent.parent
TABLES: dict[str, Callable[[], Iterable[str]]] = {
    "deepspeed": partial(markdown, DEEPSPEED),
    "trainer": partial(markdown, TRAINER),
    "nanogpt": partial(markdown, NANOGPT),
    **speed_tables.TABLES,
}
_TABLE = re.compile(r"(<!-- table: ([\w ]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def filled(text: str) -> str:
    """Return a page with its tables as they are now."""

    def table(found: re.Match[str]) -> str:
        lines = "\n".join(TABLES[found[2]]())
        return f"{found[1]}\n{lines}\n\n{found[3]}"

    return _TABLE.sub(table, text)


def main() -> int:
    """Return 1 if --check is given and a page is stale, else 0."""
    stale = 0
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        if (new := filled(text)) == text:
            continue
        if "--check" in sys.argv[1:]:
            print(f"stale: {page.name}; run python scripts/generate_tables.py")
            stale = 1
        else:
            page.write_text(new, encoding="utf-8")
            print(f"written: {page.name}")
    return stale


if __name__ == "__main__":
    sys.exit(main())
