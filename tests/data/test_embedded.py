from __future__ import annotations

import sysconfig
from itertools import islice
from pathlib import Path

import pytest

from bigtrain.data import embedded
from bigtrain.data.embedded import LONGEST, SHORTEST, cut, embedded_documents, library_digest, library_files

SOURCE = '''"""What the module is for, said at some length so that it stands as a document of its own."""

import os


@decorated
def first(number):
    """Return the number, unchanged, which is enough for a definition that is long enough."""
    return number


class Second:
    """A class with a documentation string of more than sixty-four characters in all."""

    def method(self):
        return 2
'''


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(embedded_documents())


def test_cut_at_definitions() -> None:
    pieces = cut(SOURCE)
    assert [piece.split("\n")[0][:14] for piece in pieces] == ['"""What the mo', "@decorated", "class Second:"]


def test_cut_loses_nothing_but_empty_lines() -> None:
    squeezed = [line for line in SOURCE.splitlines() if line]
    assert [line for piece in cut(SOURCE) for line in piece.splitlines() if line] == squeezed


def test_short_pieces_join_the_next() -> None:
    assert cut("x = 1\ndef f(): pass\ndef g(): pass\n") == ["x = 1\ndef f(): pass\ndef g(): pass"]


def test_long_pieces_are_cut_at_line_ends() -> None:
    source = "".join(f"value_{number} = {number}\n" for number in range(2000))
    pieces = cut(source)
    assert max(map(len, pieces)) <= LONGEST
    assert "\n".join(pieces) + "\n" == source


def test_long_classes_are_cut_before_a_method() -> None:
    method = "    def method(self):\n" + "        pass\n" * 100
    pieces = cut("class Long:\n" + method * 8)
    assert len(pieces) > 1
    assert all(piece.startswith("    def method") for piece in pieces[1:])


def test_a_line_longer_than_a_document() -> None:
    assert [len(piece) for piece in cut("x" * (2 * LONGEST + 5))] == [LONGEST, LONGEST, 5]


def test_nothing_in_nothing() -> None:
    assert cut("") == []
    assert cut("\n\n") == []


def test_files_are_the_library_alone() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    names = [file.relative_to(library).as_posix() for file in library_files()]
    assert names == sorted(names)
    assert {"abc.py", "argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if {"test", "tests"} & set(name.split("/")) or "site-packages" in name]


def test_size(documents: list[str]) -> None:
    assert 6e6 < sum(map(len, documents)) < 14e6
    assert max(map(len, documents)) <= LONGEST
    assert sum(len(text) >= SHORTEST for text in documents) > 0.97 * len(documents)


def test_each_document_once_and_none_blank(documents: list[str]) -> None:
    assert len(set(documents)) == len(documents)
    assert not [text for text in documents if not text.strip()]


def test_the_same_every_time(documents: list[str]) -> None:
    assert list(islice(embedded_documents(), 50)) == documents[:50]
    assert library_digest() == library_digest()


def test_digest_sees_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    before, files = library_digest(), library_files()
    monkeypatch.setattr(embedded, "library_files", lambda: files[:-1])
    assert library_digest() != before
