"""Write the key by key tables into docs/coming_from_*.md; with --check, only say whether they are up to date.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; the translations read the same rows.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from bigtrain.translation.tables import DEEPSPEED, NANOGPT, TRAINER, markdown

DOCS = Path(__file__).parent.parent / "docs"
TABLES = {"deepspeed": DEEPSPEED, "trainer": TRAINER, "nanogpt": NANOGPT}
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def filled(text: str) -> str:
    """Return a page with its tables as they are now."""

    def table(found: re.Match[str]) -> str:
        lines = "\n".join(markdown(TABLES[found[2]]))
        return f"{found[1]}\n{lines}\n\n{found[3]}"

    return _TABLE.sub(table, text)


def main() -> int:
    """Return 1 if --check is given and a page is stale, else 0."""
    stale = 0
    for page in sorted(DOCS.glob("coming_from_*.md")):
        text = page.read_text(encoding="utf-8")
        if (new := filled(text)) == text:
            continue
        if "--check" in sys.argv[1:]:
            print(f"stale: docs/{page.name}; run python scripts/generate_tables.py")
            stale = 1
        else:
            page.write_text(new, encoding="utf-8")
            print(f"written: {page.name}")
    return stale


if __name__ == "__main__":
    sys.exit(main())
