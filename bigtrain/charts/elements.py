"""What pages are made of: figures, legends, tables, data that a script reads. Every text is escaped here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from string import Template

from bigtrain.charts import palette


def fill(template: str, **parts: str) -> str:
    """Return a template with its parts put in, and `$style` and `$script`, which every page has."""
    style = f"{palette.variables()}\n{_own('style.css')}"
    return Template(template).substitute(parts, style=style, script=_own("pointing.js"))


def json_in_html(data: object) -> str:
    """Return JSON that can stand in a script element: no text in it can end the element or begin another."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def figure(name: str, value: object, text: str, note: str) -> str:
    """Return one headline figure; `value` is exact, `text` is what people read."""
    return (
        f'<div class="figure"><h3>{escape(name)}</h3>'
        f'<p><data value="{escape(str(value))}">{escape(text)}</data></p>'
        f"<small>{escape(note)}</small></div>"
    )


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Return a legend from pairs of a CSS class and a name."""
    return "".join(f'<span><i class="{style}"></i>{escape(name)}</span>' for style, name in entries)


def table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Return a table whose first column names the rows; without `header` it has no head."""
    return html_table(([escape(text) for text in row] for row in rows), header)


def html_table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Return such a table from cells that are HTML already."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in header)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in others)}</tr>\n'
        for first, *others in rows
    )
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if head else ''}<tbody>\n{body}</tbody></table>"


def details(title: str, text: str | None) -> str:
    """Return a text that opens on a click; nothing for None."""
    return "" if text is None else f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>\n"


def words(name: str) -> str:
    """Return a name of code as people write it."""
    return name.replace("_", " ")


def _own(name: str) -> str:
    return resources.files("bigtrain.charts").joinpath(name).read_text(encoding="utf-8")
