"""Lines of a job file: comments that cannot end early, YAML scalars, a text inside of YAML."""

from __future__ import annotations

import json
import textwrap

WIDTH = 110


def comments(*texts: str) -> list[str]:
    """Return texts as lines of comments, wrapped; what is not printable is escaped: a line break would end one."""
    printable = (text if text.isprintable() else ascii(text)[1:-1] for text in texts)
    return [f"# {line}" for text in printable for line in _wrapped(text)]


def scalar(text: str) -> str:
    """Return a text as a double-quoted YAML scalar; JSON's strings are (YAML 1.2.2, section 1.2)."""
    return json.dumps(text, ensure_ascii=False)


def block(text: str, indent: int) -> str:
    """Return the lines of a text for a literal block scalar, after its `|`, so far to the right."""
    return textwrap.indent(text.rstrip("\n"), " " * indent)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False) or [""]
