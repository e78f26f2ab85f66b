"""Documents out of one file, whatever its format, read in constant memory."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bigtrain import strict_json
from bigtrain.config.paths import DATA_SUFFIXES, LONGEST_DOCUMENT
from bigtrain.data.decoding import COMPRESSIONS, Meter, byte_chunks, data_error, decoded, lines

LARGEST_FIELD = 2**23
"""Characters of a field in a .csv; a quote that is never closed makes a field of the rest of the file."""

FORMATS = DATA_SUFFIXES
KNOWN_SUFFIXES = f"{' '.join(FORMATS)} (+ {' '.join(COMPRESSIONS)})"
TEXT_COLUMN = "data.text_column"
ANOTHER_ROW = "name another column, or leave the row out"
ANOTHER_COLUMN = "name another one as data.text_column"
BROKEN_LINE = "mend the line, or leave it out"

_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
_LEADING_BLANK_LINES = re.compile(r"\A(?:[^\S\n]*\n)+")


def file_format(path: Path) -> str | None:
    """Return which of `FORMATS` a file name stands for, or None."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def read_documents(path: Path, column: str, meter: Meter) -> Iterator[str]:
    """Yield the documents of one file, none of them blank or over `LONGEST_DOCUMENT` characters.

    Raises DataError where the file cannot be read, holds no text, or a row has no text in `column`.
    """
    found = False
    for text in _texts(path, column, meter):
        for document in cut_at_lines(text):
            found = True
            yield document
    if not found:
        what = "the file holds no text" if path.stat().st_size else "the file is empty"
        raise data_error(str(path), f"{what}; leave it out")
    meter.finished_bytes += path.stat().st_size
    meter.present_bytes = 0


def cut_at_lines(text: str, longest: int = LONGEST_DOCUMENT) -> Iterator[str]:
    """Yield a text in pieces of at most `longest` characters, cut after a line end if there is one; no blank ones."""
    start = 0
    while start < len(text):
        end = start + longest
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        piece = text[start:end]
        if not piece.isspace():
            yield piece
        start = end


def text_of(row: object, column: str, where: str) -> str:
    """Return the text in a row's column; raises DataError that names the columns there are, or what stands there."""
    if not isinstance(row, dict):
        raise data_error(
            where,
            f"{json_type(row)} stands where a JSON object with a column {column!r} is needed; mend it, or leave it out",
        )
    if column not in row:
        there = ", ".join(map(str, row)) or "none"
        raise data_error(where, f"no column {column!r}; there are: {there}; {ANOTHER_ROW}", TEXT_COLUMN)
    text = row[column]
    if not isinstance(text, str):
        what = f"column {column!r} holds {json_type(text)}, not text{texts_in(_held_by(row))}; {ANOTHER_ROW}"
        raise data_error(where, what, TEXT_COLUMN)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            what = f"column {column!r} holds half of a surrogate pair; write the whole character"
            raise data_error(where, what, TEXT_COLUMN) from None
    return text


def texts_in(columns: Sequence[str]) -> str:
    """Return "; there is text in: a, b", or nothing where there are no such columns."""
    return f"; there is text in: {', '.join(columns)}" if columns else ""


def _held_by(row: Mapping[Any, object]) -> list[str]:
    return [str(name) for name, value in row.items() if isinstance(value, str)]


def json_type(value: object) -> str:
    """Return what a JSON value is, in words."""
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a text"}
    return names.get(type(value), "an object" if isinstance(value, dict) else "a list")


def _texts(path: Path, column: str, meter: Meter) -> Iterator[str]:
    chosen = file_format(path)
    if chosen is None:
        raise data_error(str(path), f"unknown file type; known are {KNOWN_SUFFIXES}")
    if chosen in (".parquet", ".arrow"):
        from bigtrain.data.tables import table_texts

        return table_texts(path, chosen, column, meter)
    texts = decoded(path, byte_chunks(path, meter))
    if chosen == ".txt":
        return _paragraphs(texts)
    if chosen == ".jsonl":
        return _json_lines(path, texts, column)
    if chosen == ".csv":
        return _csv_rows(path, texts, column)
    from bigtrain.data.json_stream import json_values

    return (text_of(value, column, f"{path}:{line}") for line, value in json_values(path, texts))


def _paragraphs(texts: Iterable[str]) -> Iterator[str]:
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    rest = ""
    for text in texts:
        *finished, rest = _BLANK_LINES.split(rest + newlines.decode(text))
        yield from map(_trimmed, finished)
        while len(rest) > LONGEST_DOCUMENT:
            at = rest.rfind("\n", 0, LONGEST_DOCUMENT) + 1 or LONGEST_DOCUMENT
            yield _trimmed(rest[:at])
            rest = rest[at:]
    yield _trimmed(rest + newlines.decode("", final=True))


def _trimmed(document: str) -> str:
    # A run of blank lines that lies across two chunks leaves some of itself at the head of the next document.
    return _LEADING_BLANK_LINES.sub("", document).rstrip("\n")


def _json_lines(path: Path, texts: Iterable[str], column: str) -> Iterator[str]:
    for number, line in enumerate(lines(path, texts), start=1):
        if line.isspace():
            continue
        where = f"{path}:{number}"
        try:
            strict_json.check_values(line)
            row = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            reason = f"broken JSON: {error.msg.removesuffix(' at')} at column {error.colno}; {BROKEN_LINE}"
            raise data_error(where, reason) from None
        except RecursionError:
            raise data_error(where, f"broken JSON: nested too deeply; {BROKEN_LINE}") from None
        except ValueError as error:  # too many values, or more digits than Python reads of an integer
            reason = "a number of too many digits" if "digits" in str(error) else str(error)
            raise data_error(where, f"broken JSON: {reason}; {BROKEN_LINE}") from None
        yield text_of(row, column, where)


def _csv_rows(path: Path, texts: Iterable[str], column: str) -> Iterator[str]:
    csv.field_size_limit(LARGEST_FIELD)
    rows = csv.DictReader(lines(path, texts), strict=True)
    try:
        names = rows.fieldnames or []
        if names and column not in names:
            raise data_error(
                f"{path}:1", f"no column {column!r}; there are: {', '.join(names)}; {ANOTHER_COLUMN}", TEXT_COLUMN
            )
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if None in row:
                width = f"{len(names) + len(row[None])} fields in a table of {len(names)} columns"
                raise data_error(where, f"{width}; quote text that holds a comma")
            if row[column] is None:
                raise data_error(where, f"the row has no column {column!r}; {ANOTHER_ROW}", TEXT_COLUMN)
            yield row[column]
    except csv.Error as error:
        raise data_error(f"{path}:{rows.reader.line_num}", f"broken CSV: {error}; {BROKEN_LINE}") from None
