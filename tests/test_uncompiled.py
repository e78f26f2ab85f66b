from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from bigtrain.uncompiled import leave_out, uncompiled


@uncompiled
def doubled(x: Tensor, *, times: int = 2) -> Tensor:
    """Multiply."""
    doubled.graphs.append(torch.compiler.is_compiling())  # type: ignore[attr-defined]
    return x * times


@pytest.fixture(autouse=True)
def _graphs() -> None:
    doubled.graphs = []  # type: ignore[attr-defined]


def test_it_is_the_function_where_nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    assert torch.equal(doubled(torch.ones(2), times=3), torch.full((2,), 3.0))
    assert "torch._dynamo" not in sys.modules
    assert doubled.__name__ == "doubled" and doubled.__doc__ == "Multiply."


def test_compiled_code_calls_it_as_it_is() -> None:
    def around(x: Tensor) -> Tensor:
        return doubled(x + 1) + 1

    leave_out()
    compiled = torch.compile(around, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 5.0))
    assert doubled.graphs == [False]  # type: ignore[attr-defined]


def test_one_graph_cannot_hold_it() -> None:
    leave_out()
    compiled = torch.compile(lambda x: doubled(x), backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError):
        compiled(torch.ones(2))
