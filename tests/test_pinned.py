"""Host buffers: exact sizes, registered and unregistered in pairs, handed out again."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigtrain import pinned
from bigtrain.errors import InputError
from bigtrain.pinned import Pool, allocate


class Runtime:
    """What pinned.py uses of the CUDA runtime."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.registered: dict[int, int] = {}
        self.waits: list[int] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert flags == 1
        if not self.error:
            self.registered[address] = size
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: runtime.waits.append(len(runtime.registered)))
    yield runtime
    assert not runtime.registered


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 3_000_001])
def test_exact_sizes_at_the_start_of_a_page(runtime: Runtime, size: int) -> None:
    buffer = allocate(size, registered=True)
    assert buffer.dtype == torch.uint8 and buffer.shape == (size,)
    assert buffer.data_ptr() % mmap.PAGESIZE == 0
    assert runtime.registered == {buffer.data_ptr(): size}
    buffer.fill_(7)
    assert int(buffer[-1]) == 7


def test_a_view_keeps_the_buffer_registered(runtime: Runtime) -> None:
    buffer = allocate(64, registered=True)
    view = buffer[:32].view(torch.float32)
    del buffer
    assert len(runtime.registered) == 1
    view.fill_(1.5)
    del view
    assert not runtime.registered
    assert runtime.waits == [1], "a copy may be under way when the last view dies"


def test_without_cuda_it_is_plain_memory(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    buffer = allocate(64)
    assert not runtime.registered
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    buffer = allocate(64)
    assert len(runtime.registered) == 1
    del buffer


def test_a_refusal_names_size_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(error=2))
    with pytest.raises(InputError, match=r"cudaHostRegister of 3\.00 MiB failed with CUDA error 2; .*`ulimit -l`"):
        allocate(3 << 20, registered=True)
    pool = Pool(registered=True)
    with pytest.raises(InputError):
        pool.take(4)
    assert pool.held_bytes == 0


@pytest.mark.parametrize("size", [0, -1])
def test_no_empty_buffers(size: int) -> None:
    with pytest.raises(ValueError, match=f"a host buffer of {size} bytes"):
        allocate(size)


def test_the_runtime_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    marker = SimpleNamespace()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: marker)
    assert pinned._runtime() is marker


def test_the_smallest_that_is_large_enough(runtime: Runtime) -> None:
    pool = Pool(registered=True)
    buffers = [pool.take(size) for size in (10, 30, 20)]
    for buffer in buffers:
        pool.give_back(buffer)
    assert pool.take(15) is buffers[2]
    assert pool.take(15) is buffers[1]
    assert pool.take(10) is buffers[0]
    assert pool.held_bytes == 60
    assert pool.take(5).nbytes == 5


def test_a_buffer_grows_rather_than_that_one_is_added(runtime: Runtime) -> None:
    pool = Pool(registered=True)
    for size in (100, 90, 110, 105, 120):
        pool.give_back(pool.take(size))
    assert pool.held_bytes == 120
    assert list(runtime.registered.values()) == [120]


@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=5), min_size=1, max_size=8))
def test_never_more_buffers_than_were_out_at_once(steps: list[list[int]]) -> None:
    pool = Pool(registered=False)
    for sizes in steps:
        out = [pool.take(size) for size in sizes]
        assert len({buffer.data_ptr() for buffer in out}) == len(out)
        assert all(buffer.nbytes >= size for buffer, size in zip(out, sizes, strict=True))
        for buffer in out:
            pool.give_back(buffer)
        assert pool.held_bytes == sum(buffer.nbytes for buffer in pool._free)
    assert len(pool._free) <= max(map(len, steps))
    assert pool.held_bytes <= max(map(len, steps)) * max(max(sizes) for sizes in steps)


def test_steps_of_one_size_allocate_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(pinned, "allocate", lambda size, registered: made.append(size) or allocate(size))
    pool = Pool()
    for _ in range(5):
        for buffer in [pool.take(48), pool.take(64)]:
            pool.give_back(buffer)
    assert made == [48, 64]


@pytest.mark.gpu
def test_cuda_takes_it_for_pinned_and_no_more_than_asked() -> None:
    before = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    buffer = allocate((1 << 20) + 1)
    assert buffer.is_pinned()
    assert torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) == before
    source = torch.randint(0, 255, buffer.shape, dtype=torch.uint8, device="cuda")
    buffer.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(buffer, source.cpu())
