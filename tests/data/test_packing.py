from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.config.schema import Family, Recipe
from bigtrain.data import packing
from bigtrain.data.build import prepare
from bigtrain.data.corpus import SPLITS, Corpus, Split
from bigtrain.data.packing import Counts, RowIndex, check_rows, cut, pack, spans
from bigtrain.errors import DataError

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=80)


def bounds(sizes: list[int]) -> np.ndarray:
    return np.concatenate([[5], 5 + np.cumsum(sizes)]).astype(np.int64)


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(1, 20))
def test_pieces_are_the_documents(sizes: list[int], length: int) -> None:
    starts, lengths = cut(bounds(sizes), length)
    assert spans(starts, lengths).tolist() == list(range(5, 5 + sum(sizes)))
    assert lengths.min() >= 1
    assert lengths.max() <= length
    assert set(bounds(sizes)[:-1].tolist()) <= set(starts.tolist())


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(1, 20), st.booleans())
def test_every_useful_token_lies_in_one_row_and_none_is_too_long(sizes: list[int], length: int, packed: bool) -> None:
    starts, lengths = cut(bounds(sizes), length)
    useful = lengths > 1
    pieces = packing._packed(bounds(sizes), length, packed)
    held = spans(starts[useful], lengths[useful]).tolist()
    assert sorted(spans(pieces.starts, pieces.lengths).tolist()) == held
    if not held:
        assert len(pieces.per_row) == 0
        return
    ends = np.cumsum(pieces.per_row)
    assert ends[-1] == len(pieces.starts)
    assert pieces.per_row.min() >= 1
    assert np.add.reduceat(pieces.lengths, ends - pieces.per_row).max() <= length
    if not packed:
        assert set(pieces.per_row.tolist()) == {1}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 16), max_size=60))
def test_best_fit_leaves_no_two_rows_that_fit_into_one(lengths: list[int]) -> None:
    rows = pack(np.array(lengths, np.int64), 16)
    filled = np.bincount(rows, weights=lengths) if lengths else np.zeros(0)
    assert (filled <= 16).all()
    assert (filled > 0).all()
    lowest = np.sort(filled)[:2]
    assert len(lowest) < 2 or lowest.sum() > 16


def test_best_fit_takes_the_fullest_row_with_room() -> None:
    assert pack(np.array([6, 7, 4, 3]), 10).tolist() == [1, 0, 1, 0]


def test_rows_are_full_on_ordinary_lengths() -> None:
    sizes = np.maximum(2, np.random.default_rng(0).lognormal(5.5, 1.2, 8000)).astype(np.int64)
    pieces = packing._packed(np.concatenate([[0], np.cumsum(sizes)]), 512, True)
    assert sizes.sum() / (len(pieces.per_row) * 512) > 0.98


def test_spans() -> None:
    assert spans(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]


def useful_tokens(corpus: Corpus, split: Split, sequence_length: int) -> Counts:
    """Places of all tokens, without the one that a document may leave alone behind its last whole row."""
    sizes = np.array([len(ids) for ids in corpus.documents(split)])
    alone = np.cumsum(sizes)[sizes % sequence_length == 1] - 1
    return np.setdiff1d(np.arange(sizes.sum()), alone)


@pytest.mark.parametrize("packed", [True, False])
def test_a_single_token_is_no_piece(packed: bool) -> None:
    pieces = packing._packed(np.array([0, 9, 12]), 4, packed)
    assert sorted(zip(pieces.starts.tolist(), pieces.lengths.tolist(), strict=True)) == [(0, 4), (4, 4), (9, 3)]
    assert pieces.per_row.tolist() == [1, 1, 1]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("packed", [True, False])
def test_index_of_a_corpus(bert_corpus: Corpus, split: str, packed: bool) -> None:
    index = RowIndex.open(bert_corpus, split, 32, packed)  # type: ignore[arg-type]
    every = index.pieces(np.arange(len(index)))
    tokens = useful_tokens(bert_corpus, split, 32)  # type: ignore[arg-type]
    assert np.array_equal(np.sort(spans(every.starts, every.lengths)), tokens)
    assert index.fill == len(tokens) / (len(index) * 32)
    assert index.fill > (0.95 if packed else 0.1)


def test_rows_are_reached_in_any_order(bert_corpus: Corpus) -> None:
    index = RowIndex.open(bert_corpus, "train", 32, True)
    one, other = index.pieces(np.array([7])), index.pieces(np.array([3]))
    both = index.pieces(np.array([7, 3]))
    assert both.starts.tolist() == [*one.starts, *other.starts]
    assert both.per_row.tolist() == [len(one.starts), len(other.starts)]


def copy_of(corpus: Corpus, folder: Path) -> Corpus:
    shutil.copytree(corpus.folder, folder)
    shutil.rmtree(folder / "rows")
    return replace(corpus, folder=folder)


def test_small_windows_keep_memory_constant_and_lose_nothing(
    bert_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "WINDOW_DOCUMENTS", 7)
    index = RowIndex.open(copy_of(bert_corpus, tmp_path / "corpus"), "train", 32, True)
    every = index.pieces(np.arange(len(index)))
    assert np.array_equal(np.sort(spans(every.starts, every.lengths)), useful_tokens(bert_corpus, "train", 32))


def test_written_once_and_whole(bert_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = copy_of(bert_corpus, tmp_path / "corpus")
    fail: Callable[..., None] = lambda *_: pytest.fail("packed again")  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_packed", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            RowIndex.open(corpus, "train", 32, True)
    made = RowIndex.open(corpus, "train", 32, True)
    monkeypatch.setattr(packing, "_packed", fail)
    assert np.array_equal(RowIndex.open(corpus, "train", 32, True).starts, made.starts)


def test_rows_of_a_recipe(make_recipe: Callable[..., Recipe], bert_corpus: Corpus) -> None:
    recipe = make_recipe("bert")
    rows = len(RowIndex.open(bert_corpus, "train", 32, True))
    for size in (1, rows):
        train = recipe.train.model_copy(update={"global_batch_size": size})
        assert check_rows(recipe.model_copy(update={"train": train}), bert_corpus) == rows
    large = recipe.model_copy(update={"train": recipe.train.model_copy(update={"global_batch_size": rows + 1})})
    large._origins = {"train": "recipe.yaml:9"}
    with pytest.raises(DataError) as raised:
        check_rows(large, bert_corpus)
    begin = f"recipe.yaml:9: train.global_batch_size: the data gives {rows} rows of 32 tokens, fewer than one batch of"
    assert str(raised.value).startswith(f"{begin} {rows + 1}; use at most {rows}, ")


@pytest.mark.parametrize(("family", "least"), [("bert", 3), ("gpt", 2), ("llama", 2)])
def test_rows_without_anything_to_predict(
    make_recipe: Callable[..., Recipe], bert_corpus: Corpus, family: Family, least: int
) -> None:
    packing.require_length(family, least)
    recipe = make_recipe(family, sequence_length=least - 1)
    recipe._origins = {"data": "recipe.yaml:5", "data.sequence_length": "recipe.yaml:8"}
    what = f"rows of {least - 1} tokens leave nothing to predict for {family}; use at least {least}"
    for refuse in (lambda: check_rows(recipe, bert_corpus), lambda: prepare(recipe, show_progress=False)):
        with pytest.raises(DataError) as raised:
            refuse()
        assert str(raised.value) == f"recipe.yaml:8: data.sequence_length: {what}"


def test_index_of_rows_without_anything_to_predict(bert_corpus: Corpus) -> None:
    with pytest.raises(DataError, match=r"^data.sequence_length: rows of 2 tokens leave nothing"):
        RowIndex.open(bert_corpus, "train", 2, True)


@pytest.mark.parametrize("left", [0, 20, -8])
@pytest.mark.parametrize("part", ["starts", "lengths", "offsets"])
def test_damaged(bert_corpus: Corpus, tmp_path: Path, part: str, left: int) -> None:
    corpus = copy_of(bert_corpus, tmp_path / "corpus")
    RowIndex.open(corpus, "train", 32, True)
    damaged = next((corpus.folder / "rows").glob(f"train*/{part}.npy"))
    damaged.write_bytes(damaged.read_bytes()[:left])
    with pytest.raises(DataError, match=r"the row index is damaged; delete the folder .* and run again"):
        RowIndex.open(corpus, "train", 32, True)
