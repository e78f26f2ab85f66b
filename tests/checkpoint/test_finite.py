"""What is not finite is found before it is written."""

from __future__ import annotations

import math

import pytest
import torch

from bigtrain.checkpoint.finite import check_finite, first_not_finite
from bigtrain.errors import BigtrainError
from bigtrain.world import ALONE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_the_first_tensor_that_is_not_finite_is_named(dtype: torch.dtype, number: float) -> None:
    tensors = {"a": torch.ones(3), "codes": torch.full((4,), 255, dtype=torch.uint8), "empty": torch.empty(0)}
    tensors |= {"b": torch.full((5, 7), torch.finfo(dtype).max, dtype=dtype), "step": torch.zeros(())}
    assert first_not_finite(tensors.items()) is None
    tensors["b"].view(-1)[17] = number
    assert first_not_finite(tensors.items()) == "b"


def test_nothing_is_finite() -> None:
    assert first_not_finite([]) is None


def test_a_save_of_such_a_tensor_is_refused() -> None:
    files = {"weights.safetensors": {"w": torch.ones(2)}, "optimizer.safetensors": {"m": torch.tensor([0.0, math.nan])}}
    with pytest.raises(BigtrainError, match=r"^step 7 was not saved: rank 0 on \S+: m holds a number that is not fin"):
        check_finite(7, files, ALONE)
    check_finite(7, {"weights.safetensors": {"w": torch.ones(2)}}, ALONE)
