"""A copy of a state on the host: the same bits, exactly as large, and apart."""

from __future__ import annotations

import pytest
import torch

from bigtrain.checkpoint.snapshot import ALIGNMENT, Snapshot
from bigtrain.errors import InputError

FILES = {
    "a": {"x": torch.randn(5, 3), "y": torch.arange(3, dtype=torch.uint8), "step": torch.tensor(7.0)},
    "b": {"z": torch.randn(4, 6, dtype=torch.bfloat16).T, "on": torch.tensor([True, False]), "none": torch.empty(0, 3)},
}


def test_the_bits_are_the_same_and_stay_when_the_state_changes() -> None:
    own = {file: {name: tensor.clone() for name, tensor in content.items()} for file, content in FILES.items()}
    found = Snapshot().take(own)
    for content in own.values():
        for tensor in content.values():
            tensor.zero_()
    for file, content in FILES.items():
        assert list(found[file]) == list(content)
        for name, tensor in content.items():
            assert found[file][name].dtype == tensor.dtype
            assert torch.equal(found[file][name], tensor)
            assert found[file][name].is_contiguous()


def test_the_buffer_is_of_the_size_of_the_state_and_stays() -> None:
    snapshot = Snapshot()
    assert snapshot.held_bytes == 0
    first = snapshot.take(FILES)["a"]["x"].data_ptr()
    tensors = [tensor for content in FILES.values() for tensor in content.values()]
    size = sum(tensor.nbytes for tensor in tensors)
    assert size <= snapshot.held_bytes < size + ALIGNMENT * len(tensors)
    assert snapshot.take(FILES)["a"]["x"].data_ptr() == first
    snapshot.take({"a": {"x": torch.ones(1000)}})
    assert snapshot.held_bytes == 4000


def test_nothing_takes_nothing() -> None:
    snapshot = Snapshot()
    assert snapshot.take({}) == {}
    assert snapshot.take({"a": {"none": torch.empty(0)}})["a"]["none"].shape == (0,)
    assert snapshot.held_bytes == 0


def test_a_host_that_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(size_bytes: int, *, registered: bool | None = None) -> torch.Tensor:
        raise InputError("pinned memory: no")

    monkeypatch.setattr("bigtrain.checkpoint.snapshot.allocate", refused)
    with pytest.raises(InputError):
        Snapshot().take(FILES)


@pytest.mark.gpu
def test_a_copy_takes_nothing_on_the_device() -> None:
    held = {"a": {"x": torch.randn(1000, 1000, device="cuda")}}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    copied = Snapshot().take(held)["a"]["x"]
    assert torch.cuda.max_memory_allocated() == before
    assert torch.equal(copied, held["a"]["x"].cpu())
