"""What `fully_shard` holds along a step, on a ledger: gathered parameters, buffers, reduced gradients. No torch.

The order is that of torch's `_fsdp_param_group.py` and `_fsdp_collectives.py`; the price test holds it against profiles
of real steps over gloo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bigtrain.ledger import GradientReady, Gradients, Ledger, Storage, Value
from bigtrain.sharding.cost import Layout, Shape, padded_elements

COPYING = ("cpu",)
"""Devices whose collectives copy what they gather and reduce: gloo's. Its threads may let go of the copies late."""

ROOT = -1
"""The place of the group that holds what is outside of the blocks."""


@dataclass
class Group:
    """Parameters that are gathered and reduced together, and what exists of them now."""

    place: str
    elements: dict[str, int] = field(default_factory=dict)
    """Of each parameter, its rows filled up to a multiple of the shards."""
    gathered: Storage | None = None
    """What the ranks sent, one after another, until it is copied to the parameters."""
    whole: list[Storage] = field(default_factory=list)
    gradients: dict[str, Storage] = field(default_factory=dict)
    """As autograd made them, or as fp32 sums over micro-batches where those are not reduced yet."""
    sums: dict[str, Storage] = field(default_factory=dict)
    partial: Storage | None = None
    """The part of this rank, summed over its replica and over micro-batches, not over replicas yet."""
    reduced: Storage | None = None
    """What was summed over replicas: torch keeps it to the end of the backward pass."""


class Around:
    """What happens around a step's passes and those of each block, as nodes on a ledger: nothing, unless overridden."""

    _ledger: Ledger

    def enter(self, *, last: bool) -> None:
        """Begin the forward pass of a micro-batch, the step's last or another."""

    def turn(self, ready: GradientReady) -> GradientReady:
        """Go from the forward to the backward pass; returns what gets gradients."""
        return ready

    def finish(self) -> None:
        """End the backward pass."""

    def before_forward(self, index: int) -> None:
        """Have a block's parameters."""

    def after_forward(self, index: int) -> None:
        """Be done with them for now."""

    def before_backward(self, index: int) -> None:
        """Have a block's parameters again: the gradient of its output has arrived."""

    def after_backward(self, index: int) -> None:
        """Be done with them, and have all of the block's gradients."""

    def left(self, index: int) -> list[Storage]:
        """Return what a micro-batch leaves of a block here."""
        return []

    def block(self, index: int, run: Callable[[Value], Value], value: Value) -> Value:
        """Run a block's forward; note on the ledger what happens around its backward."""
        made, keep = self._ledger.made, self._ledger.keep

        def leave(grad: Storage, kept: list[Storage]) -> Gradients:
            self.after_backward(index)
            return Gradients([grad], [])

        def enter(grad: Storage, kept: list[Storage]) -> Gradients:
            self.before_backward(index)
            return Gradients([grad], [])

        self.before_forward(index)
        out = run(made(value.storage, [value], keep([]), leave))
        self.after_forward(index)
        return made(out.storage, [out], keep([]), enter)


class Alone(Around):
    """A model that is not sharded, along a step."""

    def block(self, index: int, run: Callable[[Value], Value], value: Value) -> Value:
        """Run a block's forward."""
        return run(value)


def sharding_of(ledger: Ledger, layout: Layout, shapes: Mapping[str, Shape], *, device: str) -> Alone | Sharding:
    """Return what a layout does along a step, to parameters of these whole shapes."""
    return Alone() if layout.alone else Sharding(ledger, layout, shapes, device=device)


class Sharding(Around):
    """The groups of a model through a step."""

    def __init__(self, ledger: Ledger, layout: Layout, shapes: Mapping[str, Shape], *, device: str) -> None:
        self._ledger, self._layout = ledger, layout
        self._copying = device in COPYING
        self._fetching = layout.streaming and device != "cpu"
        """Whether parts come from the host, which on the CPU they are in already."""
        self._groups: dict[int, Group] = {}
        self._group_of: dict[str, Group] = {}
        for name, shape in shapes.items():
            index = _place_of(name)
            group = self._groups.setdefault(index, Group("" if index == ROOT else f"blocks.{index}"))
            self._group_of[name] = group
            group.elements[name] = padded_elements(shape, layout.shards)
        self._copied: Storage | None = None
        """The all-gather before: freed after the next one is copied, so that both may be under way."""
        self._input: Storage | None = None
        """The reduce-scatter before."""
        self._last = True
        self._ready: GradientReady | None = None

    def enter(self, *, last: bool) -> None:
        """Begin the forward pass of a micro-batch."""
        self._last = last
        self._before_forward(self._groups[ROOT])

    def turn(self, ready: GradientReady) -> GradientReady:
        """Go from the forward to the backward pass; returns what gets each whole gradient.

        `ready` gets this rank's part of it when it is complete, that of a group in one storage.
        """
        self._ready, self._copied = ready, None
        self.before_backward(ROOT)
        return self._gradient

    def finish(self) -> None:
        """End the backward pass: reduce what is outside of the blocks."""
        self.after_backward(ROOT)
        self._ready = self._input = None
        for group in self._groups.values():
            group.reduced = None

    def before_forward(self, index: int) -> None:
        """Gather a block, unless it is there."""
        self._before_forward(self._groups[index])

    def after_forward(self, index: int) -> None:
        """Let go of a block where it is gathered again for the backward pass."""
        if self._layout.resharding:
            self._groups[index].whole.clear()

    def before_backward(self, index: int) -> None:
        """Copy a block's parameters out and gather those of the one that comes next."""
        group = self._groups[index]
        if not group.whole:
            self._gather(group)
            self._copy_out(group)
            group.gathered = None
        following = self._groups.get(len(self._groups) - 2 if index == ROOT else index - 1)
        if index != 0 and following is not None and not following.whole:
            here, self._ledger.place = self._ledger.place, following.place
            self._gather(following)
            self._ledger.place = here

    def after_backward(self, index: int) -> None:
        """Reduce a block's gradients."""
        self._after_backward(self._groups[index])

    def left(self, index: int) -> list[Storage]:
        """Return what waits for the next micro-batch: gathered parameters, gradients or this rank's part of sums."""
        group = self._groups[index]
        partial = [group.partial] if group.partial is not None else []
        return [*group.whole, *group.gradients.values(), *group.sums.values(), *partial]

    def _gradient(self, name: str, storage: Storage) -> None:
        """Take a whole gradient, as autograd hands it over, or add it in place to the one that is there."""
        self._group_of[name].gradients.setdefault(name, storage)

    def _before_forward(self, group: Group) -> None:
        if not group.whole:
            self._gather(group)
            before, self._copied = self._copied, None
            self._copy_out(group)
            self._copied = group.gathered if self._layout.shards > 1 else None
            group.gathered = None
            del before

    def _gather(self, group: Group) -> None:
        layout, hold = self._layout, self._ledger.hold
        if layout.shards == 1 or group.gathered is not None:
            return
        size = sum(group.elements.values()) * layout.number_bytes
        part = hold(size // layout.shards, "communication") if layout.converting or self._fetching else None
        if layout.converting and self._fetching:  # each as it is kept, until it is rounded
            self._ledger.passing(max(group.elements.values()) // layout.shards * layout.kept_bytes)
        group.gathered = hold(size, "communication")
        del part
        if self._copying:
            self._ledger.passing(size, cause="communication")

    def _copy_out(self, group: Group) -> None:
        """Hold each parameter; a shard of one is copied, after it came from the host and was rounded, if it is."""
        layout, hold, part = self._layout, self._ledger.hold, None
        for elements in group.elements.values():
            size = elements * layout.number_bytes
            if layout.shards == 1 and (self._fetching or layout.converting):
                sent = hold(elements * layout.kept_bytes, "communication") if self._fetching else None
                part = hold(size, "communication") if layout.converting else sent
                del sent
            group.whole.append(hold(size, "communication"))
        del part

    def _after_backward(self, group: Group) -> None:
        """Reduce a group's gradients; at stage 1 only the last micro-batch's, to which the others' sums were added."""
        if group.sums:
            group.gradients.clear()
        if self._last or self._layout.resharding:
            group.whole.clear()
        if self._layout.zero_stage == 1 and not self._last:
            self._widen(group)
            return
        self._input = None
        self._reduce(group)

    def _widen(self, group: Group) -> None:
        """Make sums of the first micro-batch's gradients where these are narrower; else they are the sums."""
        layout, narrow = self._layout, None
        if group.sums or layout.number_bytes == layout.reduce_bytes:
            return
        for name in list(group.gradients):
            narrow = group.gradients.pop(name)
            size = narrow.size // layout.number_bytes * layout.reduce_bytes
            group.sums[name] = self._ledger.hold(size, "gradients")
        del narrow

    def _reduce(self, group: Group) -> None:
        """Hold what goes into a reduce-scatter and what comes out, and hand that over."""
        layout, hold, replicated = self._layout, self._ledger.hold, len(self._layout.mesh) == 2
        elements = sum(group.elements.values())
        size = elements * layout.reduce_bytes
        self._input = hold(size, "communication")
        group.gradients.clear()
        group.sums.clear()
        waiting, narrowed = replicated and not self._last, layout.kept_bytes != layout.reduce_bytes
        out = hold(size // layout.shards, "gradients" if waiting or not narrowed else "communication")
        if self._copying and layout.shards > 1:
            self._ledger.passing(size, cause="communication")
        if waiting:
            group.partial = group.partial or out
            return
        if replicated:
            group.reduced = out
        if narrowed:
            out = hold(elements // layout.shards * layout.kept_bytes, "gradients")
        if self._fetching:
            out = hold(0, "gradients")  # it is sent to the host
        self._hand_over(group, out)
        group.partial = None

    def _hand_over(self, group: Group, storage: Storage) -> None:
        assert self._ready is not None
        for name in group.elements:
            self._ready(name, storage)


def _place_of(name: str) -> int:
    first, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if first == "blocks" else ROOT
