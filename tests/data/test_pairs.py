"""Pairs of texts: what the second one is, and that a pair depends on nothing but its key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtrain.batch import IGNORED_LABEL
from bigtrain.config.schema import Recipe
from bigtrain.data.build import prepare
from bigtrain.data.corpus import Corpus, open_corpus
from bigtrain.data.hashing import key_of
from bigtrain.data.loader import Loader, evaluation_batches
from bigtrain.data.packing import PAIR_FRAME, RowIndex
from bigtrain.data.pairs import FOLLOWS, RANDOM, Pairs, Texts, framed, pair_keys
from bigtrain.data.rows import RowReader, RowShape
from bigtrain.data.vocabulary import SpecialTokens
from bigtrain.errors import DataError

LENGTH = 32


@pytest.fixture(scope="module")
def pairs(bert_corpus: Corpus) -> Pairs:
    return Pairs(bert_corpus, "train")


@pytest.fixture(scope="module")
def pieces(bert_corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """Return starts and lengths of every piece, those of the three special tokens included."""
    index = RowIndex.open(bert_corpus, "train", LENGTH, True, pairs=True)
    found = index.pieces(np.arange(len(index)))
    return found.starts, found.lengths


def keys_of(count: int, seed: int = 1) -> np.ndarray:
    return key_of(seed, np.arange(count, dtype=np.uint64))


@pytest.fixture(scope="module")
def drawn(pairs: Pairs, pieces: tuple[np.ndarray, np.ndarray]) -> Texts:
    starts, lengths = pieces
    return pairs.draw(starts, lengths - PAIR_FRAME, keys_of(len(starts)))


def test_a_second_text_follows_or_is_of_another_document(
    drawn: Texts, pieces: tuple[np.ndarray, np.ndarray], bert_corpus: Corpus
) -> None:
    bounds = bert_corpus.shards("train")[0].offsets.astype(np.int64)
    of_a, of_b = (np.searchsorted(bounds, starts, side="right") - 1 for starts in (drawn.starts_a, drawn.starts_b))
    sizes, follows = pieces[1] - PAIR_FRAME, drawn.labels == FOLLOWS
    assert np.array_equal(drawn.starts_b[follows], (drawn.starts_a + drawn.lengths_a)[follows])
    assert np.array_equal((drawn.lengths_a + drawn.lengths_b)[follows], sizes[follows])
    assert np.array_equal(of_a == of_b, follows)
    assert (drawn.lengths_a >= 1).all() and (drawn.lengths_b >= 1).all()
    assert (drawn.lengths_a + drawn.lengths_b <= sizes).all()
    # Within a document's content: its [CLS] and [SEP] are in no text.
    assert (drawn.starts_b > bounds[of_b]).all()
    assert (drawn.starts_b + drawn.lengths_b < bounds[of_b + 1]).all()


def test_half_of_them_follow(pairs: Pairs, pieces: tuple[np.ndarray, np.ndarray]) -> None:
    starts, sizes = pieces[0][:1].repeat(20_000), (pieces[1][:1] - PAIR_FRAME).repeat(20_000)
    many = pairs.draw(starts, sizes, keys_of(20_000))
    assert abs((many.labels == RANDOM).mean() - 0.5) < 0.015  # four standard deviations
    # A piece is cut anywhere between its tokens.
    assert set(many.lengths_a.tolist()) == set(range(1, int(sizes[0])))


def test_a_text_of_another_document_comes_from_any_of_them(pairs: Pairs, bert_corpus: Corpus) -> None:
    bounds = bert_corpus.shards("train")[0].offsets.astype(np.int64)
    count = len(bounds) - 1
    starts = np.full(40 * count, bounds[7] + 1)
    many = pairs.draw(starts, np.full(len(starts), 2), keys_of(len(starts)))
    documents = np.searchsorted(bounds, many.starts_b[many.labels == RANDOM], side="right") - 1
    assert set(documents.tolist()) == set(range(count)) - {7}


def test_a_pair_is_a_pure_function_of_its_key(
    pairs: Pairs, drawn: Texts, pieces: tuple[np.ndarray, np.ndarray]
) -> None:
    some = np.array([5, 0, 40])
    again = pairs.draw(pieces[0][some], pieces[1][some] - PAIR_FRAME, keys_of(len(pieces[0]))[some])
    assert all(np.array_equal(one, whole[some]) for one, whole in zip(again, drawn, strict=True))
    other = pairs.draw(pieces[0], pieces[1] - PAIR_FRAME, keys_of(len(pieces[0]), seed=2))
    assert not np.array_equal(other.labels, drawn.labels)


def test_pair_keys_differ_within_a_row() -> None:
    keys = pair_keys(keys_of(3), np.array([2, 1, 3]))
    assert len(set(keys.tolist())) == 6
    assert np.array_equal(pair_keys(keys_of(3)[2:], np.array([3])), keys[3:])


def test_texts_stand_between_special_tokens() -> None:
    texts = Texts(*(np.array(column) for column in ([0, 9], [2, 1], [2, 5], [1, 3], [FOLLOWS, RANDOM])))
    found = framed(np.array([10, 11, 12, 20, 30, 31, 32]), texts, SpecialTokens(bos=2, eos=3))
    assert found.tokens.tolist() == [2, 10, 11, 3, 12, 3, 2, 20, 3, 30, 31, 32, 3]
    assert found.segments.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1]
    assert found.lengths.tolist() == [6, 7]
    with pytest.raises(DataError, match="the tokenized data is damaged"):
        framed(np.array([10, 11]), texts, SpecialTokens(bos=2, eos=3))


@pytest.mark.parametrize("packing", [True, False])
def test_rows_hold_pairs(bert_corpus: Corpus, packing: bool) -> None:
    reader = RowReader(bert_corpus, "train", RowShape("mlm_nsp", LENGTH, packing), 1)
    numbers = np.arange(len(reader))
    rows = reader.read(numbers, np.zeros_like(numbers))
    assert rows.segment_ids is not None and rows.next_sentence_labels is not None
    present = rows.document_lengths > 0
    assert np.array_equal(rows.next_sentence_labels != IGNORED_LABEL, present)
    assert packing == bool((present.sum(axis=1) > 1).any())
    assert rows.document_lengths.sum(axis=1).max() <= LENGTH
    restored = np.where(rows.labels == IGNORED_LABEL, rows.input_ids, rows.labels)
    special = bert_corpus.special_tokens
    for ids, segments, lengths in zip(restored, rows.segment_ids, rows.document_lengths, strict=True):
        at = 0
        for length in lengths[lengths > 0].tolist():
            pair, of = ids[at : at + length], segments[at : at + length]
            middle = int((of == 0).sum()) - 1
            assert pair[0] == special.bos and pair[middle] == pair[-1] == special.eos
            assert (pair == special.eos).sum() == 2 and np.array_equal(of, np.arange(length) > middle)
            at += length
        assert not segments[at:].any()
    alone = reader.read(numbers[3:4], np.zeros(1, np.int64))
    for one, whole in zip(alone, rows, strict=True):
        assert np.array_equal(one[0], whole[3][: one.shape[1]])


def test_the_stream_does_not_depend_on_ranks_and_is_reached_at_once(bert_corpus: Corpus) -> None:
    def batches(count: int, skip: int = 0, **ranks: int) -> list[dict[str, np.ndarray]]:
        shape: dict[str, Any] = {"objective": "mlm_nsp", "sequence_length": LENGTH, "packing": False}
        loader = Loader(bert_corpus, **shape, global_batch_size=8, seed=3, **ranks)
        loader.load_state_dict({"row": 8 * skip, "corpus": bert_corpus.folder.name})
        found = [{name: value.numpy() for name, value in batch.items()} for batch in islice(loader, count)]
        loader.close()
        return found

    whole = batches(6)
    halves = [batches(6, rank=rank, world_size=2) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        for name, values in batch.items():
            assert np.array_equal(np.concatenate([half[step][name] for half in halves]), values)
    for batch, again in zip(whole[4:], batches(2, skip=4), strict=True):
        assert all(np.array_equal(batch[name], again[name]) for name in batch)


def test_an_evaluation_counts_each_pair_once(bert_corpus: Corpus) -> None:
    shape: dict[str, Any] = {"objective": "mlm_nsp", "sequence_length": LENGTH, "packing": False}

    def pairs_of(micro: int) -> int:
        here: dict[str, int] = {"rows_limit": 11, "micro_batch_size": micro, "rank": 1, "world_size": 2}
        batches = evaluation_batches(bert_corpus, **shape, **here)
        return sum(int((batch["next_sentence_labels"] != IGNORED_LABEL).sum()) for batch in batches)

    assert pairs_of(2) == pairs_of(4) == 5  # of the eleven, the other rank has six


def test_one_document_makes_no_pairs(bert_corpus: Corpus) -> None:
    counts = {"documents": 1, "tokens": 9, "text_bytes": 9}
    one = replace(bert_corpus, manifest={**bert_corpus.manifest, "splits": {"train": counts, "validation": counts}})
    with pytest.raises(DataError) as raised:
        Pairs(one, "train")
    assert str(raised.value) == (
        "train.objective: 'mlm_nsp' pairs texts of different documents, and the train split has 1 document; "
        "give more, or use 'mlm'"
    )


def test_a_recipe_whose_data_make_no_pairs(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """The validation split needs two documents only where it is evaluated on."""
    source = tmp_path / "few.txt"
    source.write_text(
        "\n\n".join(f"the {word} fox runs under the old house again and again." for word in ("red", "old", "small"))
    )
    recipe = make_recipe(source=str(source), objective="mlm_nsp", validation_fraction=0.01)
    assert prepare(recipe, show_progress=False).counts("validation").documents == 1
    evaluated = recipe.model_copy(update={"train": recipe.train.model_copy(update={"eval_every": 5})})
    with pytest.raises(DataError, match="the validation split has 1 document; raise data.validation_fraction"):
        open_corpus(evaluated)


def test_both_texts_of_a_mixtures_pair_are_of_one_source(
    make_recipe: Callable[..., Recipe], story: Callable[..., list[str]], text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "small.txt").write_text("\n\n".join(text.upper() for text in story(60, 2)))
    (tmp_path / "one.txt").write_text("the red fox runs under the old house again.\n\nand again and again and again.")

    def mixture(*files: Path) -> Recipe:
        entries = [{"source": str(file), "weight": 1} for file in files]
        return make_recipe(source="embedded", mixture=entries, objective="mlm_nsp")

    corpus = prepare(mixture(text_file, tmp_path / "small.txt"), show_progress=False)
    first = corpus.sources[0].corpus.counts("train")
    offsets = np.concatenate([shard.offsets[:-1] for shard in corpus.shards("train")]).astype(np.int64)
    assert offsets[first.documents] == first.tokens
    for document in (0, first.documents - 1, first.documents, len(offsets) - 1):
        starts = np.full(4000, offsets[document] + 1)
        drawn = Pairs(corpus, "train").draw(starts, np.full(4000, 2), keys_of(4000))
        begins = drawn.starts_b[drawn.labels == RANDOM]
        others = set((np.searchsorted(offsets, begins, side="right") - 1).tolist())
        own = range(first.documents) if document < first.documents else range(first.documents, len(offsets))
        assert others < set(own) and document not in others
        assert len(others) > 0.9 * (len(own) - 1)
    with pytest.raises(DataError) as raised:
        Pairs(prepare(mixture(text_file, tmp_path / "one.txt"), show_progress=False), "train")
    assert str(raised.value) == (
        "train.objective: 'mlm_nsp' pairs texts of different documents of a source, and the train split of source 2, "
        f"{tmp_path / 'one.txt'}, has 1 document; give more, or use 'mlm'"
    )
