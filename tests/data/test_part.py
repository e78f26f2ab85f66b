from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.data.corpus import SPLITS, Split, SplitCounts
from bigtrain.data.part import Frame, PartWriter, frame_of, held_out, total_counts
from bigtrain.data.vocabulary import SpecialTokens

BERT_FRAME = Frame([2], [3])
NOTHING: dict[Split, SplitCounts] = dict.fromkeys(SPLITS, SplitCounts(0, 0, 0))


class Encoded(NamedTuple):
    """Stands in for an encoding of the tokenizers library."""

    ids: list[int]


def add(writer: PartWriter, contents: Sequence[list[int]], fraction: float = 0.5, frame: Frame = BERT_FRAME) -> int:
    encodings: Any = [Encoded(ids) for ids in contents]
    return writer.add(["\u00e9" * len(ids) for ids in contents], encodings, frame, fraction)


def read(folder: Path, name: str, dtype: str) -> list[int]:
    return np.fromfile(folder / name, dtype).tolist()


def test_frames() -> None:
    special = SpecialTokens(bos=2, eos=3)
    assert frame_of("bert", special) == Frame([2], [3])
    assert frame_of("gpt", special) == frame_of("llama", special) == Frame([], [3])


@settings(max_examples=30, deadline=None)
@given(st.floats(0.001, 0.999))
def test_split_is_pure_and_both_have_a_document(fraction: float) -> None:
    flags = held_out(np.arange(50), fraction).tolist()
    assert flags == [bool(held_out(np.array([number]), fraction)[0]) for number in range(50)]
    assert flags[:2] == [False, True]


@pytest.mark.parametrize("fraction", [0.005, 0.1, 0.5])
def test_share_of_validation(fraction: float) -> None:
    share = held_out(np.arange(20_000), fraction).mean()
    assert abs(share - fraction) < 5 * (fraction / 20_000) ** 0.5 + 1e-4


def test_documents_go_where_they_belong(tmp_path: Path) -> None:
    writer = PartWriter(tmp_path, 0, "uint16", NOTHING)
    assert add(writer, [[10, 11], [20], [], [30]], fraction=0.0) == 4 + 3 + 3
    facts = writer.close()
    assert read(tmp_path, "train-00000.tokens", "uint16") == [2, 10, 11, 3, 2, 30, 3]
    assert read(tmp_path, "train-00000.offsets", "uint64") == [0, 4, 7]
    assert read(tmp_path, "validation-00000.tokens", "uint16") == [2, 20, 3]
    assert facts["splits"]["train"] == {"documents": 2, "tokens": 7, "text_bytes": 6}
    assert facts["splits"]["validation"] == {"documents": 1, "tokens": 3, "text_bytes": 2}


def test_facts_are_those_of_the_files(tmp_path: Path) -> None:
    writer = PartWriter(tmp_path, 3, "uint32", NOTHING)
    for number in range(20):
        add(writer, [[number] * number, [70_000]])
    facts = writer.close()
    assert sorted(facts["files"]) == sorted(file.name for file in tmp_path.iterdir())
    for name, fact in facts["files"].items():
        content = (tmp_path / name).read_bytes()
        assert fact == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_bounds_and_splits_count_from_the_parts_before(tmp_path: Path) -> None:
    contents = [[number] * (1 + number % 3) for number in range(40)]
    whole = PartWriter(tmp_path, 0, "uint16", NOTHING)
    add(whole, contents)
    first = PartWriter(tmp_path, 1, "uint16", NOTHING)
    add(first, contents[:25])
    second = PartWriter(tmp_path, 2, "uint16", total_counts([first.close()]))
    add(second, contents[25:])
    facts = [whole.close(), second.close()]
    assert facts[0]["files"]
    for split in SPLITS:
        tokens = [read(tmp_path, f"{split}-0000{part}.tokens", "uint16") for part in range(3)]
        bounds = [read(tmp_path, f"{split}-0000{part}.offsets", "uint64") for part in range(3)]
        assert tokens[1] + tokens[2] == tokens[0]
        assert bounds[1] + bounds[2][1:] == bounds[0]
        assert bounds[2][0] == bounds[1][-1]


def test_totals_add_up(tmp_path: Path) -> None:
    parts = []
    for number in range(3):
        writer = PartWriter(tmp_path, number, "uint16", total_counts(parts))
        add(writer, [[1, 2], [3]], frame=Frame([], [0]))
        assert writer.tokens == 5
        parts.append(writer.close())
    totals = total_counts(parts)
    assert sum(count.documents for count in totals.values()) == 6
    assert sum(count.tokens for count in totals.values()) == 15
    assert total_counts([]) == NOTHING
