"""Policies: one for each block, unknown names and wrong devices refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain import recompute
from bigtrain.errors import InputError
from bigtrain.recompute.policy import POLICIES, check_device, resolve


@given(st.lists(st.sampled_from(POLICIES), max_size=50))
def test_a_list_is_what_it_says(policies: list[str]) -> None:
    assert resolve(policies, len(policies)) == policies
    assert resolve(tuple(policies), len(policies)) == policies


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("blocks", [0, 1, 24])
def test_one_word_serves_all(policy: str, blocks: int) -> None:
    assert resolve(policy, blocks) == [policy] * blocks


@given(st.lists(st.sampled_from(POLICIES), max_size=9), st.integers(0, 9))
def test_a_list_of_another_length_is_refused_with_both_numbers(policies: list[str], blocks: int) -> None:
    if len(policies) == blocks:
        return
    with pytest.raises(InputError, match=f"a list of {len(policies)} for {blocks} blocks"):
        resolve(policies, blocks)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="'ful' is none of none, selective, full, offload; did you mean 'full'?"):
        resolve("ful", 0)
    with pytest.raises(InputError, match="'always'"):
        resolve(["full", "always"], 2)


def test_offload_is_for_cuda() -> None:
    check_device(["offload", "none"], "cuda")
    check_device(["full", "none", "selective"], "cpu")
    with pytest.raises(InputError, match="'cpu': the host memory is the device memory there; use full"):
        check_device(["none", "offload"], "cpu")
    with pytest.raises(InputError, match="'mps': its copies run on CUDA streams; use full"):
        check_device(["offload"], "mps")


def test_public_names() -> None:
    import bigtrain.recompute.blocks

    assert recompute.apply is bigtrain.recompute.blocks.apply
    assert all(hasattr(recompute, name) for name in recompute.__all__)
    with pytest.raises(AttributeError, match="no attribute 'wrap'"):
        recompute.wrap  # noqa: B018
