from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bigtrain.batch import IGNORED_LABEL
from bigtrain.data.corpus import Corpus
from bigtrain.data.packing import spans
from bigtrain.data.rows import RowReader, Rows, RowShape, next_tokens
from bigtrain.data.words import continuing_tokens
from bigtrain.errors import DataError


def reader(corpus: Corpus, packing: bool = True, seed: int = 1) -> RowReader:
    return RowReader(corpus, "train", RowShape("mlm" if corpus.family == "bert" else "clm", 32, packing), seed)


def everything(rows: RowReader, epoch: int = 0) -> Rows:
    numbers = np.arange(len(rows))
    return rows.read(numbers, np.full_like(numbers, epoch))


def flat(corpus: Corpus) -> np.ndarray:
    return np.concatenate(list(corpus.documents("train"))).astype(np.int64)


@pytest.mark.parametrize("packing", [True, False])
def test_shapes_and_types(bert_corpus: Corpus, gpt_corpus: Corpus, packing: bool) -> None:
    for corpus in (bert_corpus, gpt_corpus):
        rows = everything(reader(corpus, packing))
        assert rows.input_ids.shape == rows.labels.shape == (len(rows.input_ids), 32)
        assert rows.input_ids.dtype == rows.labels.dtype == np.int64
        assert rows.document_lengths.dtype == np.int32
        used = rows.document_lengths.sum(axis=1)
        assert used.max() <= 32
        assert used.min() >= 2
        alone = sum(len(ids) % 32 == 1 for ids in corpus.documents("train"))  # a last token that has nothing to tell
        assert used.sum() == corpus.counts("train").tokens - alone
        # zero-filled at the end: no length follows a zero
        assert (np.diff((rows.document_lengths > 0).astype(int), axis=1) <= 0).all()
        assert packing or rows.document_lengths.shape[1] == 1


@pytest.mark.parametrize("packing", [True, False])
def test_clm_rows_are_the_pieces_in_order(gpt_corpus: Corpus, packing: bool) -> None:
    read = reader(gpt_corpus, packing)
    rows = everything(read)
    pieces = read.index.pieces(np.arange(len(read)))
    held = np.arange(32) < rows.document_lengths.sum(axis=1)[:, None]
    assert np.array_equal(rows.input_ids[held], flat(gpt_corpus)[spans(pieces.starts, pieces.lengths)])
    assert np.array_equal(rows.document_lengths[rows.document_lengths > 0], pieces.lengths)
    assert (rows.labels[~held] == IGNORED_LABEL).all()


def test_clm_labels_are_the_next_token_of_the_same_piece(gpt_corpus: Corpus) -> None:
    rows = everything(reader(gpt_corpus))
    for ids, labels, lengths in zip(rows.input_ids, rows.labels, rows.document_lengths, strict=True):
        at = 0
        for length in lengths[lengths > 0].tolist():
            assert labels[at : at + length - 1].tolist() == ids[at + 1 : at + length].tolist()
            assert labels[at + length - 1] == IGNORED_LABEL
            at += length
        assert (labels[at:] == IGNORED_LABEL).all()


def test_next_tokens() -> None:
    assert next_tokens(np.array([5, 6, 7, 8, 9]), np.array([3, 1, 1])).tolist() == [6, 7, -100, -100, -100]


def test_mlm_restored_is_the_corpus(bert_corpus: Corpus) -> None:
    read = reader(bert_corpus)
    rows = everything(read)
    pieces = read.index.pieces(np.arange(len(read)))
    held = np.arange(32) < rows.document_lengths.sum(axis=1)[:, None]
    restored = np.where(rows.labels == IGNORED_LABEL, rows.input_ids, rows.labels)
    assert np.array_equal(restored[held], flat(bert_corpus)[spans(pieces.starts, pieces.lengths)])
    assert (restored[~held] == 0).all()


def test_full_rows_have_equally_many_labels(bert_corpus: Corpus) -> None:
    rows = everything(reader(bert_corpus))
    full = rows.document_lengths.sum(axis=1) == 32
    documents = (rows.document_lengths[full] > 0).sum(axis=1)
    assert full.sum() > 10
    assert len(set(documents.tolist())) > 1
    assert set((rows.labels[full] != IGNORED_LABEL).sum(axis=1).tolist()) == {round(0.15 * 32)}


def test_special_tokens_are_never_to_be_predicted(bert_corpus: Corpus) -> None:
    rows = everything(reader(bert_corpus))
    labels = rows.labels[rows.labels != IGNORED_LABEL]
    assert labels.min() >= 5
    assert ((rows.labels != IGNORED_LABEL).sum(axis=1) >= 1).mean() > 0.99


def test_a_row_is_a_pure_function_of_seed_epoch_and_number(bert_corpus: Corpus) -> None:
    read = reader(bert_corpus)
    together = everything(read, epoch=3)
    for row in (0, len(read) // 2, len(read) - 1):
        alone = read.read(np.array([row]), np.array([3]))
        assert np.array_equal(alone.input_ids[0], together.input_ids[row])
        assert np.array_equal(alone.labels[0], together.labels[row])
    assert not np.array_equal(everything(read, epoch=4).labels, together.labels)
    assert not np.array_equal(everything(reader(bert_corpus, seed=2), epoch=3).labels, together.labels)


@pytest.mark.parametrize("length", [3, 4, 5])
def test_every_row_has_something_to_predict(bert_corpus: Corpus, gpt_corpus: Corpus, length: int) -> None:
    for corpus, objective in ((bert_corpus, "mlm"), (gpt_corpus, "clm")):
        shape = RowShape(objective, length, packing=False)  # type: ignore[arg-type]
        labels = everything(RowReader(corpus, "train", shape, 1)).labels
        assert (labels != IGNORED_LABEL).any(axis=1).all()


def test_tokens_beyond_the_vocabulary_are_damage(gpt_corpus: Corpus, tmp_path: Path) -> None:
    corpus = replace(gpt_corpus, folder=tmp_path / "corpus")
    shutil.copytree(gpt_corpus.folder, corpus.folder)
    path = corpus.folder / "train-00000.tokens"
    content = bytearray(path.read_bytes())
    content[1] ^= 0x80
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        everything(reader(corpus))
    text = str(raised.value)
    assert text.startswith(f"{corpus.folder}: data.cache: the tokenized data is damaged: a token id 3")
    assert text.endswith(f"in a vocabulary of 400; delete the folder {corpus.folder} and run bigtrain prepare again")


def test_whole_words_are_masked(bert_corpus: Corpus) -> None:
    """The first token of a piece begins a word, whatever it is; what follows a special token does too."""
    shape = RowShape("mlm", 32, True, whole_word_masking=True)
    read = RowReader(bert_corpus, "train", shape, 1)
    rows = everything(read)
    continues = continuing_tokens(bert_corpus.tokenizer_file, bert_corpus.vocab_size)
    chosen, longer = rows.labels != IGNORED_LABEL, 0
    for row, lengths in enumerate(rows.document_lengths):
        ends = np.cumsum(lengths)
        original = np.where(chosen[row], rows.labels[row], rows.input_ids[row])
        for begin, end in zip(ends - lengths, ends, strict=True):
            for place in range(begin + 1, end):
                if continues[original[place]] and original[place - 1] >= 5 and original[place] >= 5:
                    assert chosen[row, place] == chosen[row, place - 1]
                    longer += bool(chosen[row, place])
    assert longer > 20
    assert not np.array_equal(chosen, everything(reader(bert_corpus)).labels != IGNORED_LABEL)
