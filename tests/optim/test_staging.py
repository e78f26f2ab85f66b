"""Pieces that visit the device: in order, in as little memory as is predicted, whenever the copies really happen."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bigtrain import pinned
from bigtrain.optim import staging
from bigtrain.optim.cost import STAGED_MULTIPLE, STAGES, staged_bytes
from bigtrain.optim.staging import CudaCopies, Pairs, PlainCopies, Staging, host_tensors

CPU = torch.device("cpu")


class LateCopies(PlainCopies):
    """Copies back at the last moment that the order allows, as a slow link would."""

    def __init__(self) -> None:
        self.under_way: list[tuple[int, Tensor, Tensor]] = []
        self.slot = 0
        self.late = 0

    def fetch(self, pairs: Pairs) -> None:
        addresses = {host.data_ptr() for host, _ in pairs}
        self._arrive(lambda slot, host: host.data_ptr() in addresses)
        super().fetch(pairs)

    def send(self, pairs: Pairs) -> None:
        self.under_way += [(self.slot, host, visitor) for host, visitor in pairs]
        self.late = max(self.late, len(self.under_way))

    def enter(self, slot: int) -> None:
        self._arrive(lambda used, host: used == slot)
        self.slot = slot

    def end(self) -> None:
        self._arrive(lambda slot, host: True)

    def _arrive(self, due: Callable[[int, Tensor], bool]) -> None:
        for slot, host, visitor in self.under_way:
            if due(slot, host):
                host.copy_(visitor)
        self.under_way = [entry for entry in self.under_way if not due(*entry[:2])]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateCopies]:
    copies = LateCopies()
    monkeypatch.setattr(staging, "PlainCopies", lambda: copies)
    yield copies
    assert not copies.under_way


def visit(stage: Staging, *views: Tensor) -> tuple[Tensor, ...]:
    stage.begin(views)
    return stage.fetch(views)


def test_what_was_sent_is_there_and_nothing_else() -> None:
    stage, first, second = Staging(CPU), torch.zeros(5), torch.zeros(3)
    one, two = visit(stage, first, second)
    one.fill_(1)
    two.fill_(2)
    stage.send([one, torch.ones(4)])
    stage.close()
    assert first.tolist() == [1] * 5
    assert second.tolist() == [0] * 3


def test_a_piece_keeps_its_slot_while_the_next_one_is_worked_on(late: LateCopies) -> None:
    stage, hosts = Staging(CPU), [torch.full((4,), float(number)) for number in range(7)]
    for host in hosts:
        (here,) = visit(stage, host)
        here.mul_(10)
        stage.send([here])
    stage.close()
    assert [host[0].item() for host in hosts] == [10.0 * number for number in range(7)]
    assert late.late == STAGES


def test_what_is_read_again_was_sent_before(late: LateCopies) -> None:
    stage, host = Staging(CPU), torch.zeros(4)
    for _ in range(5):
        (here,) = visit(stage, host)
        here.add_(1)
        stage.send([here])
    stage.close()
    assert host.tolist() == [5] * 4


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    dtypes=st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.int8]), min_size=12, max_size=12),
)
def test_any_pieces_in_any_order(sizes: list[int], dtypes: list[torch.dtype]) -> None:
    stage = Staging(CPU)
    hosts = [(torch.ones(size, dtype=dtype), torch.ones(1)) for size, dtype in zip(sizes, dtypes, strict=False)]
    for host in (*hosts, *reversed(hosts)):
        for view in visit(stage, *host):
            view.add_(1)
            stage.send([view])
    stage.close()
    assert all((tensor == 3).all() for host in hosts for tensor in host)


def test_slots_are_as_large_as_the_largest_piece_until_the_end() -> None:
    stage, largest = Staging(CPU), 0
    for elements in (10, 200, 30):
        views = torch.zeros(elements), torch.zeros(elements, dtype=torch.int8)
        stage.begin(views)
        largest = max(staged_bytes(view.nbytes for view in views), largest)
        assert {slot.nbytes for slot in stage._slots} == {largest}
        assert len(stage._slots) == STAGES
    assert len({slot.untyped_storage().data_ptr() for slot in stage._slots}) == 1
    stage.close()
    assert stage._slots == []


def test_visitors_begin_where_tensors_of_their_own_would() -> None:
    stage = Staging(CPU)
    visitors = visit(stage, *(torch.zeros(size) for size in (3, 129, 5)))
    first, *others = (visitor.data_ptr() for visitor in visitors)
    assert all((address - first) % STAGED_MULTIPLE == 0 for address in others)


def test_a_piece_of_nothing_on_the_host() -> None:
    stage = Staging(CPU)
    assert visit(stage) == ()
    stage.send([torch.ones(2)])
    stage.close()


def test_one_buffer_of_exactly_their_size() -> None:
    shapes = {"codes": torch.empty(7, dtype=torch.int8), "scale": torch.empty(3), "half": torch.empty(2, 3).bfloat16()}
    made = host_tensors(shapes)
    assert list(made) == list(shapes)
    assert all(made[key].shape == like.shape and made[key].dtype == like.dtype for key, like in shapes.items())
    assert all(not tensor.any() for tensor in made.values())
    (size,) = {tensor.untyped_storage().nbytes() for tensor in made.values()}
    assert size == 7 + 12 + 12
    for number, tensor in enumerate(made.values()):
        tensor.fill_(number + 1)
    assert [tensor.float().mean().item() for tensor in made.values()] == [1, 2, 3]
    assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in made.values())


def test_nothing_to_keep_is_no_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "allocate", None)
    assert host_tensors({"exp_avg": torch.empty(0, 4)})["exp_avg"].shape == (0, 4)
    assert host_tensors({}) == {}


def test_numbers_stay_on_the_device() -> None:
    stage = Staging(CPU)
    like = {"step": torch.zeros(()), "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}
    state = stage.placed({**like, "exp_avg": torch.arange(4.0), "name": "kept"}, ("step",))
    assert list(state) == ["step", "exp_avg", "exp_avg_sq", "name"]
    assert state["exp_avg"].tolist() == [0, 1, 2, 3]
    storages = {key: state[key].untyped_storage().data_ptr() for key in like}
    assert storages["exp_avg"] == storages["exp_avg_sq"] != storages["step"]


@pytest.mark.gpu
def test_copies_run_beside_the_computation() -> None:
    device = torch.device("cuda")
    hosts = [pinned.allocate(1 << 24).view(torch.float32).fill_(number) for number in range(4)]
    stage = Staging(device)
    assert isinstance(stage._copies, CudaCopies)
    streams = {stage._copies.arriving, stage._copies.leaving, torch.cuda.current_stream(device)}
    assert len(streams) == 3
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda._sleep(50_000_000)  # the host is not held up: all is issued while this runs
    for host in (*hosts, *hosts):
        (here,) = visit(stage, host)
        here.add_(1)
        stage.send([here])
    assert not torch.cuda.current_stream(device).query()
    stage.close()
    assert torch.cuda.max_memory_allocated(device) - before == STAGES * (1 << 24)
    torch.cuda.synchronize(device)
    assert [host.unique().tolist() for host in hosts] == [[number + 2.0] for number in range(4)]
