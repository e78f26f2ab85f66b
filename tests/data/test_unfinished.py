from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bigtrain.data.batches import Batch
from bigtrain.data.corpus import SPLITS, SplitCounts
from bigtrain.data.part import PartWriter
from bigtrain.data.reading import START, Mark
from bigtrain.data.seen import digests_of
from bigtrain.data.unfinished import STATE, State, files_of, finish, forget, resumed, seen_before

FRESH = {"mark": START, "parts": [], "left_out": {"filtered": 0, "duplicate": 0}}


def two_parts(folder: Path) -> State:
    state = resumed(folder)
    for number, text in enumerate(("one", "two")):
        part = PartWriter(folder, number, "uint16", dict.fromkeys(SPLITS, SplitCounts(0, 0, 0)))
        left_out = {"filtered": number, "duplicate": 1}
        batch = Batch([], left_out, digests_of([text]).tobytes(), Mark(number, 7, {"shard": number}))
        finish(part, [batch, batch], state, folder)
    return state


def test_what_is_kept_is_found_again(tmp_path: Path) -> None:
    assert resumed(tmp_path) == FRESH
    state = two_parts(tmp_path)
    assert state["left_out"] == {"filtered": 2, "duplicate": 4}
    found = resumed(tmp_path)
    assert found == json.loads(json.dumps(state)) and Mark(*found["mark"]) == Mark(1, 7, {"shard": 1})
    assert len(files_of(found)) == 8
    seen = seen_before(tmp_path, found)
    assert len(seen) == 2
    assert seen.add(digests_of(["two", "one", "three"])).tolist() == [False, False, True]


def test_what_nobody_needs_any_more(tmp_path: Path) -> None:
    two_parts(tmp_path)
    forget(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == sorted([".tokens", ".offsets"] * 4)


@pytest.mark.parametrize("name", ["00001.seen", "train-00000.offsets", STATE])
def test_a_damaged_file_begins_anew(tmp_path: Path, name: str) -> None:
    two_parts(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(b"x" + content[1:])
    assert resumed(tmp_path) == FRESH
    (tmp_path / name).unlink()
    assert resumed(tmp_path) == FRESH


@pytest.mark.parametrize(
    "change", [{"mark": [-1, 0, None]}, {"mark": None}, {"left_out": {}}, {"parts": [{}]}, {"parts": 3}]
)
def test_a_state_of_another_form_begins_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    state = two_parts(tmp_path)
    (tmp_path / STATE).write_text(json.dumps({**state, **change}))
    assert resumed(tmp_path) == FRESH
