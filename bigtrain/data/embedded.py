"""The embedded corpus: real text that every machine has, the Python standard library's documentation and source."""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = frozenset(
    {"site-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "distutils", "__pycache__", "ensurepip"}
)
"""Folders whose text is not the library's own, or mostly tables."""

TABLES = re.compile(r"(_sysconfigdata.*|topics|stringprep|entities|_nsis)\.py|lextab\.py|.*_data\.py")
"""Files that a program wrote, or that hold little but tables."""

LONGEST = 4096
"""Characters of a document at most: a few rows of a small model."""

SHORTEST = 64
"""What is shorter joins the next piece: an import line teaches nothing by itself."""

_DEFINITION = re.compile(r"^(?=(?:@|def |class |async def ))", re.MULTILINE)


def library_files() -> list[Path]:
    """Return the source files that the corpus is made of, sorted by their path within the library."""
    library = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, names in os.walk(library):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        found += [Path(folder, name) for name in names if name.endswith(".py") and not TABLES.fullmatch(name)]
    return sorted(found, key=lambda file: file.relative_to(library).as_posix())


def library_digest() -> str:
    """Return a digest of the files' names and sizes: distributions of one Python version differ a little."""
    library = Path(sysconfig.get_path("stdlib"))
    listing = [f"{file.relative_to(library).as_posix()} {file.stat().st_size}" for file in library_files()]
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()


def embedded_documents() -> Iterator[str]:
    """Yield the documents, each once, in the same order for one Python version."""
    seen: set[bytes] = set()
    for file in library_files():
        for document in cut(file.read_bytes().decode("utf-8", errors="replace")):
            digest = hashlib.blake2b(document.encode(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                yield document


def cut(source: str) -> list[str]:
    """Return the documents of one source file: what stands before the first definition, then each definition.

    A top-level class or function keeps its decorators; pieces under `SHORTEST` characters join the next one, and
    those over `LONGEST` are cut at a line end, before an indented definition where there is one in the second half.
    """
    documents, pending = [], ""
    for piece in _DEFINITION.split(source):
        pending += piece
        if len(pending.strip()) >= SHORTEST:
            documents += _short_enough(pending)
            pending = ""
    if pending.strip():
        documents += _short_enough(pending)
    return documents


def _short_enough(text: str) -> list[str]:
    pieces = []
    while len(text) > LONGEST:
        at = max(text.rfind("\n    def ", LONGEST // 2, LONGEST), text.rfind("\n    async def ", LONGEST // 2, LONGEST))
        if at < 0:
            at = text.rfind("\n", 1, LONGEST)
        at = at + 1 if at >= 0 else LONGEST
        pieces.append(text[:at])
        text = text[at:]
    return [piece.strip("\n") for piece in (*pieces, text) if piece.strip()]
