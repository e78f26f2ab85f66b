"""A recipe as text again: every key, in the order of the schema, such that reading it gives an equal recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from bigtrain.config.keys import schema_keys, sections
from bigtrain.config.schema import Recipe
from bigtrain.config.yaml_reader import plain_value

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/%+-]*")


def to_yaml(recipe: Recipe, comments: Mapping[str, str] | None = None) -> str:
    """Return the recipe as YAML with every key written out.

    `comments` holds text to put above a section, by its name, and above everything, under "". Bytes and seconds get
    units that lose nothing. Of a mapping in a list, what is null is left out.
    """
    comments = comments or {}
    values = recipe.model_dump()
    lines = [*_comment(comments.get("", ""))]
    lines += [f"{key}: {write_value(values[key])}" for key in schema_keys() if "." not in key]
    for section in sections():
        lines += ["", *_comment(comments.get(section, "")), f"{section}:"]
        lines += [f"  {key}: {write_value(value)}" for key, value in values[section].items()]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> Iterator[str]:
    for line in text.splitlines():
        # A comment cannot hold what YAML does not allow anywhere, quoted or not.
        yield "# ".rstrip() if not line else f"# {line if line.isprintable() else ascii(line)}"


def write_value(value: object) -> str:
    """Return a value as YAML writes it in a line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(write_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {write_value(held)}' for key, held in value.items() if held is not None)}}}"
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and plain_value(value) == value else _quoted(value)
    return repr(value)


def _quoted(text: str) -> str:
    """Return a double-quoted scalar (YAML 1.2.2, section 7.3.1) in printable characters."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
