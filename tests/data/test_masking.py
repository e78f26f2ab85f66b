from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.batch import IGNORED_LABEL
from bigtrain.data.hashing import key_of
from bigtrain.data.masking import Masked, mask_rows

MASK = 4
ORDINARY = np.arange(5, 1000)


def rows_of(count: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ordinary tokens whose first is special, and whose end is padding here and there."""
    generator = np.random.default_rng(seed)
    ids = generator.choice(ORDINARY, (count, width))
    ends = generator.integers(width // 2, width + 1, count)
    ids[np.arange(width) >= ends[:, None]] = 0
    ids[:, 0] = 2
    return ids, ids >= 5


def mask(ids: np.ndarray, maskable: np.ndarray, probability: float = 0.15, epoch: int = 0, first: int = 0) -> Masked:
    """Mask rows in which every token but 0 is held."""
    keys = key_of(1, epoch, np.arange(first, first + len(ids), dtype=np.uint64))
    return mask_rows(ids, ids != 0, maskable, keys, probability, MASK, ORDINARY)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(2, 70), st.floats(0.01, 0.99))
def test_exactly_the_share_of_each_row(count: int, width: int, probability: float) -> None:
    ids, maskable = rows_of(count, width)
    chosen = mask(ids, maskable, probability).labels != IGNORED_LABEL
    tokens, available = (ids != 0).sum(axis=1).tolist(), maskable.sum(axis=1).tolist()
    expected = [min(most, max(1, round(probability * n))) for n, most in zip(tokens, available, strict=True)]
    assert chosen.sum(axis=1).tolist() == expected
    assert not (chosen & ~maskable).any()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 39), max_size=8), min_size=1, max_size=6), st.floats(0.01, 0.7))
def test_full_rows_have_equally_many_whatever_their_documents(special: list[list[int]], probability: float) -> None:
    """A row of many documents holds more special tokens, which are never chosen."""
    ids = np.full((len(special), 40), 7)
    for row, places in zip(ids, special, strict=True):
        row[places] = 2
    chosen = mask(ids, ids >= 5, probability).labels != IGNORED_LABEL
    assert set(chosen.sum(axis=1).tolist()) == {max(1, round(40 * probability))}
    assert not chosen[ids == 2].any()


def test_never_more_are_chosen_than_may_be() -> None:
    ids = np.array([[2, 7, 3, 2, 8, 3, 2, 9, 3, 2], [2, 7, 3, 2, 3, 2, 3, 2, 3, 2], [2, 7, 8, 9, 7, 8, 9, 7, 8, 9]])
    chosen = mask(ids, ids >= 5, 0.5).labels != IGNORED_LABEL
    assert chosen.sum(axis=1).tolist() == [3, 1, 5]


def test_labels_are_the_original_tokens_and_the_rest_is_untouched() -> None:
    ids, maskable = rows_of(20, 64)
    before = ids.copy()
    masked = mask(ids, maskable)
    chosen = masked.labels != IGNORED_LABEL
    assert np.array_equal(masked.labels[chosen], ids[chosen])
    assert np.array_equal(masked.input_ids[~chosen], ids[~chosen])
    assert np.array_equal(ids, before)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    ids, maskable = rows_of(12, 64)
    together = mask(ids, maskable)
    for row in range(12):
        alone = mask(ids[row : row + 1], maskable[row : row + 1], first=row)
        assert np.array_equal(alone.input_ids[0], together.input_ids[row])
        assert np.array_equal(alone.labels[0], together.labels[row])


def test_epochs_hide_other_tokens() -> None:
    ids, maskable = rows_of(50, 128)
    one, other = (mask(ids, maskable, epoch=epoch).labels != IGNORED_LABEL for epoch in (0, 1))
    assert 0.08 < (one & other).sum() / one.sum() < 0.22
    assert np.array_equal(mask(ids, maskable).input_ids, mask(ids, maskable).input_ids)


@pytest.fixture(scope="module")
def many() -> tuple[np.ndarray, Masked]:
    ids = np.random.default_rng(3).choice(ORDINARY, (3000, 128))
    return ids, mask(ids, np.ones_like(ids, bool))


def test_eighty_ten_ten(many: tuple[np.ndarray, Masked]) -> None:
    ids, masked = many
    chosen = masked.labels != IGNORED_LABEL
    count = chosen.sum()
    hidden, kept = (masked.input_ids[chosen] == MASK).mean(), (masked.input_ids[chosen] == ids[chosen]).mean()
    for share, expected in ((hidden, 0.8), (kept, 0.1), (1 - hidden - kept, 0.1)):
        # One of 995 replacements is the token itself.
        assert abs(share - expected) < 4 * (expected * (1 - expected) / count) ** 0.5 + 0.001


def test_replacements_are_even_and_never_special(many: tuple[np.ndarray, Masked]) -> None:
    ids, masked = many
    replaced = masked.input_ids[(masked.input_ids != ids) & (masked.input_ids != MASK)]
    assert replaced.min() >= 5
    assert replaced.max() < 1000
    halves = np.bincount((replaced - 5) * 10 // 995, minlength=10) / len(replaced)
    assert abs(halves - 0.1).max() < 0.02


def test_positions_are_even(many: tuple[np.ndarray, Masked]) -> None:
    _, masked = many
    by_position = (masked.labels != IGNORED_LABEL).mean(axis=0)
    share = 19 / 128
    assert abs(by_position - share).max() < 5 * (share * (1 - share) / 3000) ** 0.5


def test_rows_without_a_maskable_token() -> None:
    ids = np.array([[2, 3, 0], [2, 7, 3]])
    masked = mask(ids, ids >= 5)
    assert masked.labels.tolist() == [[IGNORED_LABEL] * 3, [IGNORED_LABEL, 7, IGNORED_LABEL]]
    nothing = mask(ids[:1], ids[:1] >= 5)
    assert nothing.labels.tolist() == [[IGNORED_LABEL] * 3]
    assert nothing.input_ids.tolist() == ids[:1].tolist()


def words_of(ids: np.ndarray, maskable: np.ndarray, continues: np.ndarray) -> list[list[list[int]]]:
    """Return, for each row, the positions of each word."""
    rows = []
    for row in range(len(ids)):
        words: list[list[int]] = []
        for place in np.flatnonzero(maskable[row]).tolist():
            if continues[row, place] and words and words[-1][-1] == place - 1:
                words[-1].append(place)
            else:
                words.append([place])
        rows.append(words)
    return rows


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(4, 70), st.floats(0.05, 0.9), st.floats(0.0, 0.9), st.integers(0, 99))
def test_words_are_chosen_whole(count: int, width: int, probability: float, continuing: float, seed: int) -> None:
    ids, maskable = rows_of(count, width, seed)
    continues = np.random.default_rng(seed).random(ids.shape) < continuing
    keys = key_of(1, 0, np.arange(len(ids), dtype=np.uint64))
    masked = mask_rows(ids, ids != 0, maskable, keys, probability, MASK, ORDINARY, continues)
    chosen = masked.labels != IGNORED_LABEL
    assert np.array_equal(np.where(chosen, masked.labels, masked.input_ids), ids)
    for row, words in enumerate(words_of(ids, maskable, continues)):
        picked = [word for word in words if chosen[row, word].any()]
        wanted, total = max(1, round(probability * int((ids[row] != 0).sum()))), int(chosen[row].sum())
        left = [len(word) for word in words if word not in picked]
        assert total <= wanted
        if min(map(len, words)) > wanted:  # so the beginning of one of the shortest is chosen
            assert len(picked) == 1 and chosen[row, picked[0][:wanted]].all() and total == wanted
            assert len(picked[0]) == min(map(len, words))
        else:
            assert all(chosen[row, word].all() for word in picked)
            assert all(size > wanted - total for size in left)  # nothing more fits
    alone = mask_rows(ids[-1:], ids[-1:] != 0, maskable[-1:], keys[-1:], probability, MASK, ORDINARY, continues[-1:])
    assert np.array_equal(alone.input_ids[0], masked.input_ids[-1])


def test_each_word_is_chosen_as_often_as_its_share() -> None:
    ids = np.full((4000, 40), 7)
    continues = np.tile(np.array([False, True, False, False]), (4000, 10))  # words of two tokens, one, and one
    keys = key_of(1, 0, np.arange(4000, dtype=np.uint64))
    chosen = mask_rows(ids, ids > 0, ids > 0, keys, 0.25, MASK, ORDINARY, continues).labels != IGNORED_LABEL
    assert (chosen.sum(axis=1) == 10).all()  # filled up by words of one token
    assert np.abs(chosen.reshape(4000, 10, 4).mean(axis=(0, 1)) - 0.25).max() < 0.02
    assert np.array_equal(chosen[:, ::4], chosen[:, 1::4])


def test_text_without_spaces_is_not_masked_as_a_whole() -> None:
    ids = np.full((1, 40), 7)
    continues = np.ones((1, 40), np.bool_)
    masked = mask_rows(ids, ids > 0, ids > 0, key_of(1, 0, np.arange(1)), 0.15, MASK, ORDINARY, continues)
    assert (masked.labels != IGNORED_LABEL).sum() == 6
