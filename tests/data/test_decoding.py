from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.data import decoding
from bigtrain.data.decoding import CHUNK_BYTES, Meter, byte_chunks, decoded, lines
from bigtrain.errors import DataError

HERE = Path("some/file.txt")


def pieces(content: bytes, size: int) -> list[bytes]:
    return [content[start : start + size] for start in range(0, len(content), size)]


@settings(max_examples=50, deadline=None)
@given(st.text(), st.integers(1, 7))
def test_decoding_is_that_of_the_whole(text: str, size: int) -> None:
    assert "".join(decoded(HERE, pieces(text.encode(), size))) == text.removeprefix("\ufeff")


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="a\n\r\u00e9", max_size=40), st.integers(1, 5))
def test_lines_are_those_of_the_whole(text: str, size: int) -> None:
    found = list(lines(Path("x"), (text[start : start + size] for start in range(0, len(text), size))))
    assert "".join(found).removesuffix("\n") == text.removesuffix("\n")
    assert all(line.count("\n") == 1 for line in found[:-1])


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("content", "offset", "byte"),
    [(b"abc\xff", 3, "ff"), ("é".encode() * 5 + b"\xe9abc", 10, "e9"), (b"ab\xe2\x82", 2, "e2"), (b"\x80", 0, "80")],
)
def test_first_wrong_byte_is_named(content: bytes, offset: int, byte: str, size: int) -> None:
    with pytest.raises(DataError) as raised:
        list(decoded(HERE, pieces(content, size)))
    place = f"byte 0x{byte} at offset {offset}"
    assert str(raised.value) == f"some/file.txt: data.source: not UTF-8 text: {place}; save the file as UTF-8"


def test_chunks_are_bounded_and_counted(tmp_path: Path) -> None:
    path, meter = tmp_path / "file", Meter(finished_bytes=10)
    path.write_bytes(b"x" * (CHUNK_BYTES + 5))
    assert [len(chunk) for chunk in byte_chunks(path, meter)] == [CHUNK_BYTES, 5]
    assert meter.read_bytes == CHUNK_BYTES + 15


def compressed(suffix: str, content: bytes) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content)
    return pyarrow.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed(tmp_path: Path, suffix: str) -> None:
    content = b"some text, " * 300_000
    path = tmp_path / f"file.txt{suffix}"
    path.write_bytes(compressed(suffix, content))
    assert b"".join(byte_chunks(path, Meter())) == content


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_several_frames_in_one_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file.txt{suffix}"
    path.write_bytes(compressed(suffix, b"one ") + compressed(suffix, b"two"))
    assert b"".join(byte_chunks(path, Meter())) == b"one two"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_not_compressed_after_all(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file.txt{suffix}"
    path.write_bytes(b"plain text")
    with pytest.raises(DataError, match=rf"^{path}: data.source: cannot be read: \S"):
        list(byte_chunks(path, Meter()))


def test_truncated_gzip(tmp_path: Path) -> None:
    path = tmp_path / "file.txt.gz"
    path.write_bytes(gzip.compress(bytes(range(256)) * 100)[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        list(byte_chunks(path, Meter()))


def test_truncated_zstandard(tmp_path: Path) -> None:
    path = tmp_path / "file.txt.zst"
    path.write_bytes(compressed(".zst", bytes(range(256)) * 100)[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        list(byte_chunks(path, Meter()))


def test_absent(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file or directory; make it readable"):
        list(byte_chunks(tmp_path / "none", Meter()))


def test_a_line_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "LARGEST_LINE", 100)
    taken = []
    with pytest.raises(DataError, match=r"x:2: data\.source: a line of more than 100 characters"):
        list(lines(Path("x"), (taken.append(text) or text for text in ["a\nb", *["b" * 30] * 9])))
    assert len(taken) < 7
