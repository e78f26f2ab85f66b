"""What torch's flash attention for CPUs holds inside, by numbers that follow from its source."""

from __future__ import annotations

import dataclasses

import pytest

from bigtrain.models.flash_cost import Flash, flash_split

SMALL = Flash(1, (2, 2), (300, 300), 8, number=2, threads=2)
"""64 queries at once and all 300 keys: 5 blocks of queries for each of 2 heads."""

WIDE, ROUNDED = 2 * (64 * 300 + 64 * (2 + 8)) * 4, 2 * 64 * 300 * 2


@pytest.mark.parametrize(
    ("length", "split"), [(20, (20, 400)), (100, (32, 3200)), (200, (64, 12800)), (1024, (256, 256 * 512))]
)
def test_how_the_kernel_splits_a_document(length: int, split: tuple[int, int]) -> None:
    assert flash_split(length) == split


def test_low_scores_are_rounded_and_others_are_not() -> None:
    assert SMALL.forward() == WIDE + ROUNDED
    assert dataclasses.replace(SMALL, number=4).forward() == WIDE
    assert (SMALL.backward(), dataclasses.replace(SMALL, number=4).backward()) == (4 * 64 * 300 * 6, 4 * 64 * 300 * 4)


@pytest.mark.parametrize(
    ("changes", "measured"),
    [
        ({}, [158720, 76800, 9600, 9600, 9600]),
        ({"tokens": (301, 301), "head_dim": 7}, [158720, 77312, 9632, 8456, 2048, 8428]),
        (
            {"tokens": (1301, 1301), "head_dim": 7, "causal": True},
            [1067008, 524288, 41632, 36456, 8192, 14336],
        ),
        ({"batch": 2, "tokens": (63, 63)}, [18688, 8064]),
        ({"heads": (1, 1), "tokens": (64, 64), "causal": True}, [18944, 8192, 1024, 1024, 2048]),
        ({"heads": (32, 32), "threads": 160}, [80 * 158720, 80 * 76800]),
    ],
)
def test_with_tiles_keys_and_values_are_packed_where_products_outnumber_them(
    changes: dict[str, object], measured: list[int]
) -> None:
    flash = dataclasses.replace(SMALL, packs="bf16", **changes)  # type: ignore[arg-type]
    assert flash.forward() == sum(measured)


def test_other_precisions_are_packed_from_other_sizes_on() -> None:
    bf16, fp16 = (dataclasses.replace(SMALL, tokens=(32, 32), packs=name) for name in ("bf16", "fp16"))
    assert fp16.forward() - bf16.forward() == 2 * 2 * 32 * 8 * 2 + 2 * 32 * 8 * 2


def test_shared_keys_are_packed_once() -> None:
    own, shared = (dataclasses.replace(SMALL, heads=(4, K), packs="bf16") for K in (4, 2))
    assert own.forward() - shared.forward() == 2 * 2 * 300 * 8 * 2
