"""Where a step's predicted seconds go, by the class of what runs: the same roofline, with names on it. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from bigtrain.config.model import ModelConfig
from bigtrain.config.schema import Recipe
from bigtrain.models.cost import MicroBatch
from bigtrain.models.operations_cost import FLOAT
from bigtrain.planner.choice import Choice
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.roofline import Roofline, Work
from bigtrain.planner.speed import Speed
from bigtrain.planner.work import BlockWork, ModelWork, Operation

MATRIX = "matrix_products"
ATTENTION = "attention"
NORMALIZATION = "normalization"
ELEMENTWISE = "elementwise"
FUSED = "fused_elementwise"
LOSS = "loss_and_softmax"
EMBEDDING = "embedding_lookup"
OPTIMIZER = "optimizer"
COPIES = "host_and_device_copies"
COMMUNICATION = "communication"
MEMORY = "fills_and_allocation"
OTHER = "other"
CALLS = "calls"
IDLE = "idle"
DATA = "waiting_for_data"

CLASSES = (
    MATRIX, ATTENTION, NORMALIZATION, ELEMENTWISE, FUSED, LOSS, EMBEDDING, OPTIMIZER, COPIES, COMMUNICATION, MEMORY,
    OTHER, CALLS, IDLE, DATA,
)  # fmt: skip
"""Of a step's time. CALLS, on a CPU, is Python, autograd and dispatch between what computes; IDLE, on a GPU, is all in
which nothing runs on the device; DATA is, of either, the wait for the next batch."""

IN_FUSED = (ELEMENTWISE, NORMALIZATION)
"""What a compiler makes one kernel of."""


ROUNDING = 1e-9
"""Of a step: what a difference of sums may be where it is nothing."""


@dataclass(frozen=True, slots=True)
class NamedWork(Work):
    """Work whose seconds are known by class; `by_class` sums to `seconds`."""

    by_class: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Work) -> NamedWork:
        total = dict(self.by_class)
        for name, seconds in seconds_by_class(other).items():
            total[name] = total.get(name, 0.0) + seconds
        return NamedWork(self.seconds + other.seconds, self.calls + other.calls, total)

    def __radd__(self, other: Work) -> NamedWork:
        return self + other

    def __mul__(self, times: float) -> NamedWork:
        scaled = {name: seconds * times for name, seconds in self.by_class.items()}
        return NamedWork(self.seconds * times, self.calls * times, scaled)

    def called(self, times: float) -> NamedWork:
        """Return the same work, for which Python calls so many times as often."""
        return NamedWork(self.seconds, self.calls * times, self.by_class)


def seconds_by_class(work: Work) -> Mapping[str, float]:
    """Return the seconds of work by class; without a name they are elementwise."""
    return work.by_class if isinstance(work, NamedWork) else {ELEMENTWISE: work.seconds}


def named(name: str, work: Work, renamed: Collection[str] = IN_FUSED) -> NamedWork:
    """Return work under a name, as far as it had one of those that are `renamed`."""
    found: dict[str, float] = {}
    for before, seconds in seconds_by_class(work).items():
        now = name if before in renamed else before
        found[now] = found.get(now, 0.0) + seconds
    return NamedWork(work.seconds, work.calls, found)


class NamedRoofline(Roofline):
    """A roofline that names what it prices."""

    def product(self, n: int, i: int, o: int, *, operand_bytes: int = FLOAT, result_bytes: int | None = None) -> Work:
        """Multiply matrices."""
        return named(MATRIX, super().product(n, i, o, operand_bytes=operand_bytes, result_bytes=result_bytes))

    def attention(self, tokens: int, longest: int, width: int, *, causal: bool, backward: bool = False) -> Work:
        """Attend."""
        return named(ATTENTION, super().attention(tokens, longest, width, causal=causal, backward=backward))


class NamedModelWork(ModelWork):
    """A model's work, with the names of what is not a matrix product."""

    def _attend(self, batch: MicroBatch) -> Operation:
        return _operation(ATTENTION, super()._attend(batch))

    def _layer_norm(self, n: int, width: int) -> Operation:
        return _operation(NORMALIZATION, super()._layer_norm(n, width))

    def _rms_norm(self, n: int) -> Operation:
        return _operation(NORMALIZATION, super()._rms_norm(n))

    def _lookup(self, n: int, rows: int) -> Operation:
        return _operation(EMBEDDING, super()._lookup(n, rows))

    def _loss(self, m: int) -> Operation:
        return _operation(LOSS, super()._loss(m))

    def batch(self, batch: MicroBatch) -> Work:
        """Bring the micro-batch to the device."""
        return named(COPIES, super().batch(batch))


class CompiledModelWork(NamedModelWork):
    """The same of blocks that a compiler makes fused kernels of."""

    def block(self, batch: MicroBatch) -> BlockWork:
        """Return one block's work."""
        found = super().block(batch)
        again: dict[str, Work] = {policy: named(FUSED, work) for policy, work in found.recompute.items()}
        return BlockWork(named(FUSED, found.forward), named(FUSED, found.backward), again)


class SpeedByClass(Speed):
    """Predicts the same steps as `Speed`, and says by class where their seconds go."""

    roofline = NamedRoofline

    def __init__(self, recipe: Recipe, model: ModelConfig, hardware: Hardware, world_size: int) -> None:
        self.model_work = CompiledModelWork if recipe.train.compile else NamedModelWork
        super().__init__(recipe, model, hardware, world_size)

    def accumulation_work(self, choice: Choice) -> Work:
        """Return the work of adding gradients up, which is the optimizer's."""
        return named(OPTIMIZER, super().accumulation_work(choice))

    def by_class(self, choice: Choice) -> dict[str, float]:
        """Return the seconds of a step by class, in their order; they sum to those that `seconds` gives.

        What calls add on a CPU is CALLS; where they are slower than a GPU, that is IDLE.
        """
        forward, backward, block = self.micro_batch_work(choice)
        again = [block.recompute[policy] for policy in choice.recompute]
        found = dict(seconds_by_class(sum(again, forward + backward) * choice.accumulation_steps))
        whole = self.seconds(choice)
        found[OPTIMIZER] = found.get(OPTIMIZER, 0.0) + self.update_work(choice).seconds
        found[COPIES] = found.get(COPIES, 0.0) + whole.offload_seconds
        found[COMMUNICATION] = whole.communication_seconds + sum(self.shard_copies(choice))
        left = whole.total - sum(found.values())
        found[CALLS if self.hardware.kind == "cpu" else IDLE] = left if left > ROUNDING * whole.total else 0.0
        return {name: found[name] for name in CLASSES if found.get(name)}


def _operation(name: str, operation: Operation) -> Operation:
    return Operation(named(name, operation.forward), named(name, operation.backward), operation.kept)
