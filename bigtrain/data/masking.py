"""BERT's masking of rows: what is hidden is a pure function of the seed, the epoch and the row."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.batch import IGNORED_LABEL
from bigtrain.data.hashing import Integers, mix, random_bits

MASKED_SHARE, REPLACED_SHARE = 0.8, 0.1
"""Of the chosen positions; the rest keep their token (Devlin et al. 2018, arXiv 1810.04805, section 3.1)."""

Ids = NDArray[np.int64]


class Masked(NamedTuple):
    """Rows with tokens hidden, and the original tokens at the chosen positions; both (B, T)."""

    input_ids: Ids
    labels: Ids


def mask_rows(
    input_ids: Ids,
    held: NDArray[np.bool_],
    maskable: NDArray[np.bool_],
    keys: Integers,
    probability: float,
    mask_id: int,
    ordinary: Ids,
    continues: NDArray[np.bool_] | None = None,
) -> Masked:
    """Hide tokens of rows, (B, T), each row by its own key, (B,).

    Of a row that has a token at n positions (`held`) exactly round(probability * n) are chosen among those that are
    maskable, at least one where there is any and never more than there are: full rows have equally many, however many
    documents they hold. 80% become the mask token, 10% one of the `ordinary` tokens, 10% stay. What a row gets does not
    depend on the rows beside it.

    With `continues` (B, T), which tells the tokens that continue a word, words are chosen instead, whole, in random
    order, of which each that would exceed that number is passed over; if all would, as many of the first tokens of the
    first of the shortest are chosen.
    """
    bits = random_bits(keys, input_ids.shape[1])
    if continues is None:
        chosen = _chosen(bits, held, maskable, probability)
    else:
        chosen = _chosen_words(bits, held, maskable, probability, continues)
    labels = np.where(chosen, input_ids, IGNORED_LABEL)
    rows, columns = np.nonzero(chosen)
    drawn = mix(bits[rows, columns])  # those bits are small, or they would not be chosen; hashed again they are not
    share = (drawn >> np.uint64(32)).astype(np.float64) / 2**32
    replacement = ordinary[(drawn & np.uint64(2**32 - 1)) % np.uint64(len(ordinary))]
    tokens = np.where(share < MASKED_SHARE, mask_id, replacement)
    kept = share >= MASKED_SHARE + REPLACED_SHARE
    tokens[kept] = input_ids[rows[kept], columns[kept]]
    masked = input_ids.copy()
    masked[rows, columns] = tokens
    return Masked(masked, labels)


def _chosen(
    bits: Integers, held: NDArray[np.bool_], maskable: NDArray[np.bool_], probability: float
) -> NDArray[np.bool_]:
    """Choose the maskable positions whose random numbers are the row's smallest."""
    width = bits.shape[1]
    place_bits = np.uint64(width.bit_length())
    # The place in the lowest bits makes a row's numbers distinct, so that the count is exact.
    ranks = (bits >> place_bits << place_bits) | np.arange(width, dtype=np.uint64)
    ranks[~maskable] = np.uint64(2**64 - 1)
    available = maskable.sum(axis=1)
    counts = np.minimum(_wanted(held, probability), available)
    # All rows are cut at the largest count, which leaves less to sort than whole rows.
    most = int(counts.max(initial=0))
    if not most:
        return np.zeros_like(maskable)
    smallest = np.sort(np.partition(ranks, most - 1, axis=1)[:, :most], axis=1)
    limits = np.take_along_axis(smallest, np.maximum(counts - 1, 0)[:, None], axis=1)
    chosen: NDArray[np.bool_] = (ranks <= limits) & maskable & (counts > 0)[:, None]
    return chosen


def _chosen_words(
    bits: Integers,
    held: NDArray[np.bool_],
    maskable: NDArray[np.bool_],
    probability: float,
    continues: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Choose the words whose first positions' random numbers are the row's smallest, as many as have room."""
    begins = maskable.copy()
    begins[:, 1:] &= ~(continues[:, 1:] & maskable[:, :-1])
    chosen = np.zeros_like(maskable)
    for row, wanted in enumerate(_wanted(held, probability).tolist()):
        firsts = np.flatnonzero(begins[row])
        if not len(firsts):
            continue
        order = np.argsort(bits[row, firsts], kind="stable")
        words = np.cumsum(begins[row]) - 1
        sizes = np.bincount(words[maskable[row]])
        if fitting := _fitting(sizes[order], wanted):
            picked = np.zeros(len(firsts), np.bool_)
            picked[order[fitting]] = True
            chosen[row] = picked[words] & maskable[row]
        else:
            first = firsts[order[sizes[order].argmin()]]
            chosen[row, first : first + wanted] = True
    return chosen


def _fitting(sizes: Ids, room: int) -> list[int]:
    """Return the places of the sizes that fit into the room, taken in turn."""
    found = []
    for place, size in enumerate(sizes.tolist()):
        if size <= room:
            found.append(place)
            room -= size
            if not room:
                break
    return found


def _wanted(held: NDArray[np.bool_], probability: float) -> Ids:
    """Return how many positions of each row are to be chosen, (B,)."""
    wanted: Ids = np.rint(probability * held.sum(axis=1)).astype(np.int64)
    return np.maximum(wanted, 1)
