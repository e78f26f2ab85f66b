"""How a data source or a tokenizer is told apart: something on this machine, or a name on the hub."""

from __future__ import annotations

from pathlib import Path

DATA_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".arrow")
"""Kinds of files that hold text; each may also end in one of the COMPRESSED_SUFFIXES."""

COMPRESSED_SUFFIXES = (".gz", ".zst")

LONGEST_DOCUMENT = 2**20
"""Characters; a longer document is cut at a line end, so that one document never needs much memory."""


def is_local(source: str) -> bool:
    """Return whether a source is meant to be a path: it exists, or it looks like one.

    A hub id is `name` or `owner/name`; a known suffix, two slashes, or a start with `.`, `/` or `~` is a path.
    """
    return local_path(source).exists() or looks_like_path(source)


def looks_like_path(source: str) -> bool:
    """Return whether a source is written as a path, whether or not it exists."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or source.lower().endswith(_SUFFIXES)


def local_path(source: str) -> Path:
    """Return the path that a source is written as; `~` is the user's home."""
    path = Path(source)
    try:
        return path.expanduser()
    except RuntimeError:  # `~name` of a user whom this machine does not know.
        return path


_SUFFIXES = (*DATA_SUFFIXES, *COMPRESSED_SUFFIXES)
