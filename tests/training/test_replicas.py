"""The hash of a tensor's bits, and who is told to hold other ones."""

from __future__ import annotations

import random

import pytest
import torch

from bigtrain.training.injected import flip_bit
from bigtrain.training.replicas import ROW_WORDS, Odd, hash_of, hashes_of, odd_ones

SIZES = [0, 1, 2, 3, 7, 8, 1000, 2 * ROW_WORDS, 2 * ROW_WORDS + 1, 5 * ROW_WORDS + 12345]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("size", SIZES)
def test_each_flipped_bit_changes_the_hash(torch_seed: int, dtype: torch.dtype, size: int) -> None:
    tensor = (torch.rand(size) * 2).to(dtype)
    before = int(hash_of(tensor))
    assert int(hash_of(tensor.clone())) == before
    bits = 8 * tensor.nbytes
    places = range(bits) if bits <= 64 else random.Random(torch_seed).sample(range(bits), 64)
    for index in places:
        flip_bit([tensor], index)
        assert int(hash_of(tensor)) != before
        flip_bit([tensor], index)
    assert int(hash_of(tensor)) == before


def test_where_numbers_stand_counts(torch_seed: int) -> None:
    tensor = torch.rand(4 * ROW_WORDS)
    halves = tensor.view(2, -1)
    assert int(hash_of(tensor)) != int(hash_of(halves.flip(0)))
    assert int(hash_of(torch.zeros(5))) == int(hash_of(torch.zeros(5)))


@pytest.mark.parametrize("offset", range(4))
def test_any_place_in_memory_and_any_layout(torch_seed: int, offset: int) -> None:
    whole = torch.rand(9_000)
    part = whole[offset : offset + 8_000]
    assert int(hash_of(part)) == int(hash_of(part.clone()))
    turned = part.view(80, 100).t()
    assert int(hash_of(turned)) == int(hash_of(turned.contiguous()))
    assert int(hash_of(torch.tensor(3.0))) == int(hash_of(torch.tensor([3.0])))


def test_hashes_come_by_name() -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(4, dtype=torch.int64)}
    assert hashes_of(tensors) == {name: int(hash_of(tensor)) for name, tensor in tensors.items()}
    assert list(hashes_of(tensors)) == ["b", "a"]
    assert hashes_of({}) == {}


@pytest.mark.parametrize(
    ("hashes", "expected"),
    [
        ([5, 5], None),
        ([5], None),
        ([5, 6], Odd([0, 1], sure=False)),
        ([5, 6, 5], Odd([1], sure=True)),
        ([5, 6, 7], Odd([0, 1, 2], sure=False)),
        ([5, 5, 6, 6], Odd([0, 1, 2, 3], sure=False)),
        ([5, 5, 6, 5, 7], Odd([2, 4], sure=True)),
    ],
)
def test_the_majority_decides(hashes: list[int], expected: Odd | None) -> None:
    assert odd_ones(hashes) == expected
