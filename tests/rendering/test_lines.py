"""Lines of a job file: nothing that is put into one changes what stands around it."""

from __future__ import annotations

import yaml
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.rendering.lines import WIDTH, block, comments, scalar

printable = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cf", "Cs", "Zl", "Zp", "Co", "Cn")))


@given(st.lists(st.text()))
def test_comments_stay_comments(texts: list[str]) -> None:
    lines = comments(*texts)
    assert all(line.startswith("# ") for line in lines)
    assert "\n".join(lines).splitlines() == lines


def test_a_long_comment_is_wrapped_at_words() -> None:
    lines = comments("word " * 60)
    assert len(lines) > 1
    assert all(len(line) <= WIDTH + 2 for line in lines)
    assert all(line.startswith("#     word") for line in lines[1:])
    assert " ".join(line.lstrip("# ") for line in lines).split() == ["word"] * 60


def test_what_is_one_word_is_not_broken() -> None:
    assert comments("x" * 300) == ["# " + "x" * 300]
    assert comments("--run-dir=" + "a-" * 100) == ["# --run-dir=" + "a-" * 100]


def test_a_line_break_is_escaped() -> None:
    assert comments("a\nrm -rf b") == ["# a\\nrm -rf b"]


@given(printable)
def test_a_scalar_reads_as_its_text(text: str) -> None:
    assert yaml.safe_load(f"key: {scalar(text)}") == {"key": text}


@given(st.lists(printable.filter(lambda line: line.strip() == line), min_size=1))
def test_a_block_reads_as_its_text(lines: list[str]) -> None:
    text = "\n".join(["first", *lines]).rstrip("\n") + "\n"
    assert yaml.safe_load(f"a:\n  b: |\n{block(text, 4)}\n  c: 1\n") == {"a": {"b": text, "c": 1}}


def test_a_block_is_put_to_the_right() -> None:
    assert block("a\n  b\n\nc\n", 2) == "  a\n    b\n\n  c"
