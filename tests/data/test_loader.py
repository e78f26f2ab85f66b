from __future__ import annotations

import threading
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.batch import IGNORED_LABEL, Batch
from bigtrain.data import loader as module
from bigtrain.data.corpus import Corpus
from bigtrain.data.loader import Loader, evaluation_batches
from bigtrain.data.order import stream_rows
from bigtrain.data.rows import RowReader, RowShape
from bigtrain.errors import DataError


def loader(corpus: Corpus, size: int = 8, seed: int = 1, **keys: Any) -> Loader:
    objective = "mlm" if corpus.family == "bert" else "clm"
    return Loader(corpus, objective=objective, sequence_length=32, global_batch_size=size, seed=seed, **keys)  # type: ignore[arg-type]


def take(loaded: Loader, count: int) -> list[Batch]:
    found = list(islice(loaded, count))
    loaded.close()
    return found


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(one[name], other[name]) for name in ("input_ids", "labels"))


def joined(parts: list[Batch], name: str) -> torch.Tensor:
    width = max(part[name].shape[1] for part in parts)
    padded = [torch.nn.functional.pad(part[name], (0, width - part[name].shape[1])) for part in parts]
    return torch.cat(padded)


def test_batches_are_host_tensors(bert_corpus: Corpus) -> None:
    (batch,) = take(loader(bert_corpus), 1)
    assert set(batch) == {"input_ids", "labels", "document_lengths"}
    assert batch["input_ids"].shape == batch["labels"].shape == (8, 32)
    assert [batch[name].dtype for name in ("input_ids", "labels", "document_lengths")] == [
        torch.int64,
        torch.int64,
        torch.int32,
    ]


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 2**63 - 1), st.integers(0, 10**9))
def test_order_does_not_depend_on_world_size(bert_corpus: Corpus, world_size: int, seed: int, position: int) -> None:
    ranks = [loader(bert_corpus, 12, seed, rank=rank, world_size=world_size) for rank in range(world_size)]
    alone = loader(bert_corpus, 12, seed)
    for one in (*ranks, alone):
        one.seek(position)
    parts = [take(one, 2) for one in ranks]
    for whole, *shares in zip(take(alone, 2), *parts, strict=True):
        for name in ("input_ids", "labels", "document_lengths"):
            assert torch.equal(joined(shares, name), whole[name])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_an_epoch_has_every_row_once(rows: int, seed: int, epoch: int) -> None:
    numbers, epochs = stream_rows(np.arange(rows) + epoch * rows, rows, seed)
    assert sorted(numbers.tolist()) == list(range(rows))
    assert set(epochs.tolist()) == {epoch}


def test_epochs_and_seeds_have_their_own_order() -> None:
    orders = [stream_rows(np.arange(100) + epoch * 100, 100, seed)[0].tolist() for epoch in (0, 1) for seed in (1, 2)]
    assert len({tuple(order) for order in orders}) == 4


def test_a_batch_may_lie_across_two_epochs(gpt_corpus: Corpus) -> None:
    loaded = loader(gpt_corpus, 7)
    across = loaded.rows // 7
    loaded.seek(across)
    (batch,) = take(loaded, 1)
    numbers, epochs = stream_rows(np.arange(7) + across * 7, loaded.rows, 1)
    assert set(epochs.tolist()) == {0, 1} or loaded.rows % 7 == 0
    assert torch.equal(batch["input_ids"], torch.from_numpy(loaded._reader.read(numbers, epochs).input_ids))


def test_same_seed_same_batches(bert_corpus: Corpus) -> None:
    one, other = take(loader(bert_corpus), 5), take(loader(bert_corpus), 5)
    assert all(map(same, one, other))
    assert not same(one[0], take(loader(bert_corpus, seed=2), 1)[0])


def test_seek_is_the_same_as_going_there(bert_corpus: Corpus) -> None:
    walked = take(loader(bert_corpus), 9)
    sought = loader(bert_corpus)
    sought.seek(6)
    assert all(map(same, take(sought, 3), walked[6:]))
    assert sought.position == 9


def test_seek_within_an_iteration(bert_corpus: Corpus) -> None:
    walked = take(loader(bert_corpus), 4)
    loaded = loader(bert_corpus)
    batches = iter(loaded)
    assert same(next(batches), walked[0])
    loaded.seek(3)
    assert same(next(batches), walked[3])
    loaded.seek(1)
    assert same(next(batches), walked[1])
    loaded.close()


def test_iterating_again_goes_on(bert_corpus: Corpus) -> None:
    walked = take(loader(bert_corpus), 3)
    loaded = loader(bert_corpus)
    found = [next(iter(loaded)) for _ in range(3)]
    assert all(map(same, found, walked))
    assert loaded.position == 3
    loaded.close()


def test_what_was_read_ahead_does_not_count(bert_corpus: Corpus) -> None:
    loaded = loader(bert_corpus)
    batches = iter(loaded)
    next(batches)
    assert loaded.position == 1
    assert loaded.state_dict()["row"] == 8
    loaded.close()


def test_state_goes_on_with_another_world_size(bert_corpus: Corpus) -> None:
    walked = take(loader(bert_corpus), 5)
    first = loader(bert_corpus, rank=1, world_size=2)
    take(first, 3)
    second = loader(bert_corpus)
    second.load_state_dict(first.state_dict())
    assert all(map(same, take(second, 2), walked[3:]))


def test_state_is_a_position_in_a_corpus(bert_corpus: Corpus) -> None:
    state = loader(bert_corpus).state_dict()
    assert state == {"row": 0, "corpus": bert_corpus.folder.name}
    changed = loader(bert_corpus, 4, seed=2)  # whether these may change is for the recipe to say; rows are what counts
    changed.load_state_dict({**state, "row": 12})
    assert changed.position == 3


def test_state_of_other_data_is_refused_unless_allowed(bert_corpus: Corpus, gpt_corpus: Corpus) -> None:
    first, second = loader(bert_corpus), loader(gpt_corpus)
    first.seek(2)
    with pytest.raises(DataError) as raised:
        second.load_state_dict(first.state_dict())
    corpora = f"corpus {bert_corpus.folder.name}, now {gpt_corpus.folder.name}"
    text = f"the data are not those that the checkpoint was reading ({corpora})"
    assert str(raised.value) == f"data: {text}; use another --run-dir, or --allow data"
    assert second.position == 0
    second.load_state_dict(first.state_dict(), other_data=True)
    assert second.position == 2


def test_close_ends_the_thread_and_the_iteration(bert_corpus: Corpus) -> None:
    before = threading.active_count()
    loaded = loader(bert_corpus)
    batches = iter(loaded)
    next(batches)
    assert threading.active_count() == before + 1
    loaded.close()
    assert threading.active_count() == before
    assert list(batches) == []
    assert list(loaded) == []


def test_faults_while_reading_ahead_reach_the_reader(bert_corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise DataError("a shard went away")

    monkeypatch.setattr(RowReader, "read", read)
    with pytest.raises(DataError, match="a shard went away"):
        next(iter(loader(bert_corpus)))


@pytest.mark.parametrize("objective", ["mlm", "mlm_nsp"])
@pytest.mark.parametrize("tokens", [8 * 32 * 3, 2**16])
def test_batches_made_together_are_those_made_alone(
    bert_corpus: Corpus, monkeypatch: pytest.MonkeyPatch, objective: Any, tokens: int
) -> None:
    def batches(at_once: int) -> list[Batch]:
        monkeypatch.setattr(module, "TOKENS_AT_ONCE", at_once)
        loaded = Loader(bert_corpus, objective=objective, sequence_length=32, global_batch_size=8, seed=5)
        loaded.seek(7)
        return take(loaded, 10)

    for together, alone in zip(batches(tokens), batches(1), strict=True):
        assert {name: values.shape for name, values in together.items()} == {n: v.shape for n, v in alone.items()}
        assert all(torch.equal(values, alone[name]) and values.is_contiguous() for name, values in together.items())


def test_too_few_rows_for_a_batch(bert_corpus: Corpus) -> None:
    rows = loader(bert_corpus).rows
    loader(bert_corpus, rows)
    with pytest.raises(DataError) as raised:
        loader(bert_corpus, rows + 1)
    text = str(raised.value)
    assert text.startswith(f"train.global_batch_size: the data gives {rows} rows of 32 tokens, fewer than one batch of")
    assert f"at most {rows}" in text
    assert "data.sequence_length" in text


def test_ranks_that_do_not_divide_the_batch(bert_corpus: Corpus) -> None:
    with pytest.raises(DataError, match="8 rows cannot be shared equally by 3 ranks"):
        loader(bert_corpus, 8, world_size=3)


def evaluate(corpus: Corpus, micro: int = 4, limit: int | None = None, **keys: Any) -> list[Batch]:
    return list(
        evaluation_batches(
            corpus, objective="mlm", sequence_length=32, rows_limit=limit, micro_batch_size=micro, **keys
        )
    )


def labels_of(batches: list[Batch]) -> list[int]:
    labels = torch.cat([batch["labels"].reshape(-1) for batch in batches])
    return sorted(labels[labels != IGNORED_LABEL].tolist())


def test_evaluation_is_finite_and_always_the_same(bert_corpus: Corpus) -> None:
    one, other = evaluate(bert_corpus), evaluate(bert_corpus)
    assert len(one) > 1
    assert all(map(same, one, other))


def test_evaluation_reads_every_row_once(bert_corpus: Corpus) -> None:
    whole = evaluate(bert_corpus)
    tokens = sum(int(batch["document_lengths"].sum()) for batch in whole)
    alone = sum(len(ids) % 32 == 1 for ids in bert_corpus.documents("validation"))
    assert tokens == bert_corpus.counts("validation").tokens - alone


def test_evaluation_does_not_depend_on_the_micro_batch(bert_corpus: Corpus) -> None:
    assert (
        labels_of(evaluate(bert_corpus, 4))
        == labels_of(evaluate(bert_corpus, 7))
        == labels_of(evaluate(bert_corpus, 1))
    )


def test_evaluation_limit(bert_corpus: Corpus) -> None:
    limited = evaluate(bert_corpus, 4, limit=6)
    assert [len(batch["input_ids"]) for batch in limited] == [4, 2]
    assert len(labels_of(evaluate(bert_corpus, limit=10**6))) == len(labels_of(evaluate(bert_corpus)))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("limit", [1, 5, 7, None])
def test_ranks_evaluate_equally_many_batches_and_each_label_once(
    bert_corpus: Corpus, world_size: int, limit: int | None
) -> None:
    ranks = [evaluate(bert_corpus, 2, limit, rank=rank, world_size=world_size) for rank in range(world_size)]
    shapes = [[batch["input_ids"].shape for batch in batches] for batches in ranks]
    assert all(shape == shapes[0] for shape in shapes)
    assert labels_of([batch for batches in ranks for batch in batches]) == labels_of(evaluate(bert_corpus, 2, limit))
    # what fills up is a real row, so that a model always has tokens
    assert all((batch["document_lengths"].sum(dim=1) > 0).all() for batches in ranks for batch in batches)


def test_evaluation_rows_are_drawn_from_the_whole_split(bert_corpus: Corpus) -> None:
    rows = len(RowReader(bert_corpus, "validation", RowShape("mlm", 32, True), 0))
    drawn = stream_rows(np.arange(6), rows, module.EVALUATION_SEED)[0]
    assert drawn.max() >= rows // 2
    assert drawn.min() < rows // 2
