"""The memory of any model, block by block: each kind of block is traced once, and the rest of the model without them.

The parts add up to the trace of the whole. With e(i) what is alive when block i begins in a model whose blocks keep
nothing, F(i) the most that its forward adds to that, K(i) what its backward waits for (its input, if it saves that, and
what of its output it saves; nothing for who else holds them), a(i) what is alive when the gradient of its output
arrives, B(i) the most that its backward adds to that and to its K, G(i) the gradients of its parameters:

    forward of block i      e(i) + K(0) + ... + K(i-1) + F(i)
    backward of block i     a(i) + K(0) + ... + K(i) + B(i) + G(i+1) + ... + G(last)

and so for what runs between blocks, before the first, and from the last one's output to its gradient (head and loss).
F, K and B depend on the block's policy, the rest does not. An input that all blocks share (a mask, rotary angles) is
held from the first one's forward to its backward, and counts once, with what is outside of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple

from bigtrain.recompute.policy import Policy

RECOMPUTE: tuple[Policy, ...] = ("none", "selective", "full")
"""The policies that are traced: `offload` needs CUDA."""


@dataclass(frozen=True)
class Span:
    """The most bytes alive outside of blocks during a stretch, the stretch's end, and where a block then starts."""

    peak_bytes: int
    end_bytes: int


class Passes(NamedTuple):
    """One block's forward and backward pass: F, K and B above, and how long each takes, if a clock was shown it."""

    forward_bytes: int
    kept_bytes: int
    backward_bytes: int
    forward_seconds: float
    backward_seconds: float


@dataclass(frozen=True)
class Kept:
    """What a block adds under one policy: F, K and B above; B too where gradients of its parameters exist already.

    Recomputation is part of the backward pass.
    """

    forward_bytes: int
    kept_bytes: int
    backward_bytes: int
    accumulating_bytes: int
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0


class Seconds(NamedTuple):
    """How long a forward pass takes, a backward pass that computes nothing again, and what is computed again."""

    forward: float
    backward: float
    again: float


@dataclass(frozen=True)
class BlockKind:
    """A kind of block: bytes of its parameters, their gradients, input and output, and what each policy holds."""

    name: str
    parameter_bytes: int
    gradient_bytes: int
    input_bytes: int
    output_bytes: int
    by_policy: dict[str, Kept]


@dataclass(frozen=True)
class Outside:
    """The model without blocks: stretches before each call of a block and to the loss, and back again.

    `forward` has one for each call; `turn` goes from the last block's output to its gradient; `backward` has one after
    each call, in the order of forward: the first one's is what ends the step.
    """

    forward: tuple[Span, ...]
    turn: Span
    backward: tuple[Span, ...]
    gradient_bytes: int
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0


@dataclass(frozen=True)
class ModelTrace:
    """The bytes of a forward and a backward pass of a model, in parts that add up; all are plain integers.

    `calls` names the kind of each block that runs, in order, `places` which of the model's blocks it is.
    `parameter_bytes` counts shared parameters once; `outside` has no gradients before its pass, `accumulating` those of
    an earlier one.
    """

    parameter_bytes: int
    buffer_bytes: int
    kinds: tuple[BlockKind, ...]
    calls: tuple[int, ...]
    outside: Outside
    accumulating: Outside
    again: frozenset[int] = field(default_factory=frozenset)
    """Calls whose block runs once more later, so that its gradients exist when their backward comes.

    Autograd adds up the gradients of all runs before it hands them over, so that here, and only here, the sum of the
    parts is near the trace of the whole, and not equal to it.
    """
    places: tuple[int, ...] = ()

    def seconds(self, policies: Sequence[str]) -> Seconds:
        """Return how long the passes take with a policy for each call, by the clock that the trace was made with."""
        policies_of = [self.kinds[kind].by_policy for kind in self.calls]
        plain = [kinds["none"] for kinds in policies_of]
        chosen = [kinds[policy] for kinds, policy in zip(policies_of, policies, strict=True)]
        forward = sum(part.forward_seconds for part in plain)
        backward = sum(part.backward_seconds for part in plain)
        whole = sum(part.forward_seconds + part.backward_seconds for part in chosen)
        return Seconds(
            self.outside.forward_seconds + forward,
            self.outside.backward_seconds + backward,
            max(0.0, whole - forward - backward),
        )

    def peak_bytes(self, policies: str | Sequence[str], *, accumulated: bool = False) -> int:
        """Return the most bytes alive beyond parameters and buffers; `accumulated`: and beyond gradients, which exist.

        `policies` is one for all calls or a list of one for each. Raises ValueError for another number.
        """
        chosen = [policies] * len(self.calls) if isinstance(policies, str) else list(policies)
        if len(chosen) != len(self.calls):
            raise ValueError(f"{len(chosen)} policies for {len(self.calls)} blocks")
        return max(self._moments(chosen, accumulated=accumulated))

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of all parameters."""
        own = (self.kinds[kind].gradient_bytes for place, kind in enumerate(self.calls) if place not in self.again)
        return self.outside.gradient_bytes + sum(own)

    def _moments(self, policies: Sequence[str], *, accumulated: bool) -> Iterator[int]:
        """Yield what is alive at the worst moment of each part."""
        outside = self.accumulating if accumulated else self.outside
        blocks = [self.kinds[kind] for kind in self.calls]
        parts = [block.by_policy[policy] for block, policy in zip(blocks, policies, strict=True)]
        held = 0
        for span, part in zip(outside.forward, parts, strict=True):
            yield held + span.peak_bytes
            yield held + span.end_bytes + part.forward_bytes
            held += part.kept_bytes
        yield held + outside.turn.peak_bytes
        arrival = outside.turn.end_bytes
        for place in reversed(range(len(parts))):
            part, exists = parts[place], accumulated or place in self.again
            yield held + arrival + (part.accumulating_bytes if exists else part.backward_bytes)
            held += (0 if exists else blocks[place].gradient_bytes) - part.kept_bytes
            span = outside.backward[place]
            yield held + span.peak_bytes
            arrival = span.end_bytes


def between(low: ModelTrace, high: ModelTrace, share: float) -> ModelTrace:
    """Return the trace at a size of the input between those of two others, or beyond: share 0 is `low`, 1 is `high`.

    Every number is taken to grow evenly with the size. That is exact but for what kernels hold inside, and for a peak
    whose place changes. Raises ValueError if the two do not run the same blocks.
    """
    found: ModelTrace = _between(low, high, share)
    return found


def _between(low: Any, high: Any, share: float) -> Any:
    if is_dataclass(low) and not isinstance(low, type):
        parts = {f.name: _between(getattr(low, f.name), getattr(high, f.name), share) for f in fields(low)}
        return type(low)(**parts)
    if isinstance(low, tuple) and len(low) == len(high):
        return tuple(_between(a, b, share) for a, b in zip(low, high, strict=True))
    if isinstance(low, dict) and low.keys() == high.keys():
        return {key: _between(value, high[key], share) for key, value in low.items()}
    if isinstance(low, (int, float)):
        value = low + (high - low) * share
        return round(value) if isinstance(low, int) else value
    if low != high:
        raise ValueError(f"traces of different models: {low} and {high}")
    return low
