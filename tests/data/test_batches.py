from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.config.schema import DataSection
from bigtrain.data import batches as module
from bigtrain.data.batches import batches
from bigtrain.data.reading import Mark, Reading
from bigtrain.data.selection import Selection


def made(tmp_path: Path, mark: Mark | None = None, **keys: object) -> list[module.Batch]:
    (tmp_path / "a.txt").write_text("\n\n".join(["one fox", "two", "three", "one fox", "1234567", "six foxes"]))
    data = DataSection.model_validate({"source": str(tmp_path / "a.txt"), **keys})
    return list(batches(Reading(data, mark=mark or Mark()), Selection(data)))


def test_a_batch_ends_by_characters_or_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [batch.texts for batch in made(tmp_path)] == [["one fox", "two", "three", "one fox", "1234567", "six foxes"]]
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 10)
    by_characters = [["one fox", "two"], ["three", "one fox"], ["1234567", "six foxes"]]
    assert [batch.texts for batch in made(tmp_path)] == by_characters
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 1)
    assert [len(batch.texts) for batch in made(tmp_path)] == [1] * 6


def test_what_is_left_out_counts_for_where_a_batch_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 10)
    found = made(tmp_path, deduplicate=True, min_letters=0.5)
    assert [batch.texts for batch in found] == [["one fox", "two"], ["three"], ["six foxes"]]
    assert [batch.mark for batch in found] == [Mark(2), Mark(4), Mark(6)]
    assert [tuple(batch.left_out.values()) for batch in found] == [(0, 0), (0, 1), (1, 0)]
    assert [batch.texts for batch in made(tmp_path, found[1].mark, min_letters=0.5)] == [["six foxes"]]
