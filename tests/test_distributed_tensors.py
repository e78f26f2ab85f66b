from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from bigtrain.distributed_tensors import is_distributed, is_sharded, local_part


class Local(torch.Tensor):
    """Stands for a distributed tensor."""

    def to_local(self) -> torch.Tensor:
        return torch.zeros(1)


class Module:
    """Stands for torch's modules of both."""

    DTensor = Local
    FSDPModule = nn.Identity


def test_plain_tensors_and_modules_are_neither() -> None:
    tensor = torch.ones(2)
    assert not is_distributed(tensor) and not is_distributed(None) and not is_sharded(nn.Linear(1, 1))
    assert local_part(tensor) is tensor


def test_where_their_module_is_loaded_they_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch.distributed.tensor", "torch.distributed.fsdp"):
        monkeypatch.setitem(sys.modules, name, Module)
    tensor = torch.ones(2).as_subclass(Local)
    assert is_distributed(tensor) and local_part(tensor).tolist() == [0.0]
    assert is_sharded(nn.Identity()) and not is_sharded(nn.Linear(1, 1))


def test_without_it_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.distributed.fsdp", raising=False)
    assert not is_sharded(nn.Identity())
    assert "torch.distributed.fsdp" not in sys.modules
