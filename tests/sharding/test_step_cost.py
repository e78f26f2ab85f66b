"""What is held when, on a ledger, of two blocks and a root whose bytes can be counted by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from bigtrain.ledger import Gradients, Ledger, Storage, Value
from bigtrain.sharding.cost import Layout, Shape
from bigtrain.sharding.step_cost import Alone, Sharding, sharding_of

SHAPES: dict[str, Shape] = {"tokens.weight": (10, 4), "blocks.0.weight": (5, 4), "blocks.1.weight": (5, 4)}
ROOT, BLOCK = 40, 20
"""Elements; a block's five rows are filled up to six on two shards."""
PADDED = 24


def layout(stage: int = 3, **keys: Any) -> Layout:
    chosen = {"shards": 2, "replicate": 1, "number_bytes": 4, "kept_bytes": 4, **keys}
    return Layout(stage, **chosen)


class Run:
    """Micro-batches of a model whose operations hold nothing but gradients, and what was held at each moment."""

    def __init__(self, kind: Layout, device: str = "cuda", micro_batches: int = 1) -> None:
        self.ledger, self.layout = Ledger(), kind
        self.sharding = sharding_of(self.ledger, kind, SHAPES, device=device)
        self.ready: dict[str, Storage] = {}
        self.forward: list[int] = []
        self.backward: list[int] = []
        for index in range(micro_batches):
            self._micro_batch(last=index == micro_batches - 1)

    def _micro_batch(self, *, last: bool) -> None:
        self.sharding.enter(last=last)
        value = self.ledger.made(self.ledger.hold(0), [], self.ledger.keep([]), self._embedding)
        for index in range(2):
            value = self.sharding.block(index, partial(self._block, index), value)
        self.forward.append(self.ledger.now)
        self.ledger.backward(value, self.ledger.hold(0), self.sharding.turn(self._take))
        del value
        self.sharding.finish()

    def _take(self, name: str, gradient: Storage) -> None:
        self.ready.setdefault(name, gradient)

    def _block(self, index: int, value: Value) -> Value:
        self.forward.append(self.ledger.now)

        def backward(grad: Storage, kept: list[Storage]) -> Gradients:
            self.backward.append(self.ledger.now)
            gradient = self.ledger.hold(BLOCK * self.layout.number_bytes, "gradients")
            return Gradients([grad], [(f"blocks.{index}.weight", gradient)])

        return self.ledger.made(self.ledger.hold(0), [value], self.ledger.keep([]), backward)

    def _embedding(self, grad: Storage, kept: list[Storage]) -> Gradients:
        gradient = self.ledger.hold(ROOT * self.layout.number_bytes, "gradients")
        return Gradients([], [("tokens.weight", gradient)])


def test_one_rank_holds_nothing_more() -> None:
    run = Run(layout(shards=1))
    assert isinstance(run.sharding, Alone)
    assert run.forward == [0, 0, 0]
    assert run.ledger.now == 4 * (ROOT + 2 * BLOCK)


def test_stage_3_in_order() -> None:
    run = Run(layout())
    root, block = 4 * ROOT, 4 * PADDED
    # In a block: the root, the block, and the buffer that its all-gather filled, until the next one's is copied.
    assert run.forward == [root + 2 * block, root + 2 * block, root + block]
    # The last block's backward beside the gathered first; the first one's beside the last's reduced and sent gradients.
    assert run.backward == [root + 2 * block, root + block + block + block // 2]
    assert run.ledger.now == root // 2 + 2 * (block // 2)
    assert set(run.ready) == set(SHAPES)


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_1_and_2_keep_what_is_gathered(stage: int) -> None:
    run = Run(layout(stage))
    root, block = 4 * ROOT, 4 * PADDED
    assert run.forward == [root + 2 * block, root + 3 * block, root + 3 * block]
    assert run.backward == [root + 2 * block, root + block + block + block // 2]


def test_stage_1_adds_whole_gradients_up() -> None:
    first = Run(layout(1, accumulated=True), micro_batches=2)
    whole, gathered = 4 * (ROOT + 2 * BLOCK), 4 * (ROOT + 2 * PADDED)
    assert first.forward[3] == gathered + whole  # both wait for the second micro-batch
    assert first.ledger.now == 4 * (ROOT + 2 * PADDED) // 2
    narrow = Run(layout(1, accumulated=True, number_bytes=2), micro_batches=2)
    assert narrow.forward[3] == gathered // 2 + whole  # gathered in bf16, summed in fp32


def test_stage_2_adds_shards_up() -> None:
    run = Run(layout(2, accumulated=True), micro_batches=2)
    assert run.forward[3] == 4 * (ROOT + 2 * PADDED) * 3 // 2


def test_stage_0_copies_what_computes() -> None:
    run = Run(layout(0, shards=1, replicate=2))
    assert run.forward == [4 * (ROOT + BLOCK), 4 * (ROOT + BLOCK), 4 * ROOT]
    assert run.ledger.now == 4 * (ROOT + 2 * BLOCK)


def test_replicas_are_summed_in_the_last_micro_batch() -> None:
    run = Run(layout(3, replicate=2, accumulated=True), micro_batches=2)
    assert run.forward[3] == 4 * ROOT + 8 * PADDED + 4 * (ROOT + 2 * PADDED) // 2
    assert run.ledger.now == 4 * (ROOT + 2 * PADDED) // 2


def test_fp32_sums_of_bf16_gradients_stay_until_the_end() -> None:
    sums, kept = 4 * PADDED // 2, 2 * PADDED // 2
    one = Run(layout(number_bytes=2, kept_bytes=2))
    two = Run(layout(number_bytes=2, kept_bytes=2, replicate=2))
    assert two.backward[1] - one.backward[1] == sums
    assert one.ledger.now == two.ledger.now == ROOT + 2 * kept


def test_gloo_holds_copies() -> None:
    peaks = [Run(layout(number_bytes=2, kept_bytes=2), device).ledger.peak for device in ("cpu", "cuda")]
    assert peaks[0] > peaks[1]


def test_rounding_needs_room_for_the_part_that_is_sent() -> None:
    rounded, plain = (Run(layout(number_bytes=2, kept_bytes=kept)).ledger.peak for kept in (4, 2))
    assert rounded > plain


def test_streamed_blocks_come_and_go() -> None:
    run = Run(layout(stage=0, shards=1, offload="all"))
    assert isinstance(run.sharding, Sharding)
    assert run.forward == [4 * (ROOT + BLOCK), 4 * (ROOT + BLOCK), 4 * ROOT]
    # The first beside the root, the other one beside what its gradients were copied to for the reduction.
    assert run.backward == [4 * (ROOT + BLOCK), 4 * (ROOT + 2 * BLOCK)]
    assert sum(storage.size for storage in run.ready.values()) == 0
    assert set(run.ready) == set(SHAPES)
    run.ready.clear()
    assert run.ledger.now == 0


def test_streamed_weights_are_rounded_on_the_device() -> None:
    plain, rounded = (Run(layout(stage=0, shards=1, offload="all", number_bytes=n)).ledger.peak for n in (4, 2))
    assert plain > rounded


def test_on_the_cpu_gradients_stay_where_they_are_reduced() -> None:
    run = Run(layout(stage=0, shards=1, offload="all"), "cpu")
    assert sum({id(storage): storage.size for storage in run.ready.values()}.values()) == 4 * (ROOT + 2 * BLOCK)


@pytest.mark.parametrize("number_bytes", [4, 2])
def test_streamed_shards_are_gathered(number_bytes: int) -> None:
    here, elsewhere = (Run(layout(offload=kind, number_bytes=number_bytes)) for kind in ("none", "all"))
    assert [run.backward[0] for run in (here, elsewhere)] == [here.backward[0]] * 2
    assert elsewhere.ledger.peak <= here.ledger.peak  # its gradients are gone
