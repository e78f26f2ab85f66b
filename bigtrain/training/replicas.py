"""Ranks that hold the same numbers are compared bit by bit, through a hash; who holds others is named."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bigtrain.engine import Engine
from bigtrain.errors import BigtrainError
from bigtrain.planner.plan import Plan

WORD = 8
"""Bytes that are added up as one number, modulo 2**64."""
ROW_WORDS = 4096
"""Words that are added up to one sum; the sums are weighted by where they stand."""
_FACTOR = 0x2545F4914F6CDD1D
"""An odd number: products with odd numbers modulo 2**64 are one to one."""


class Group(NamedTuple):
    """Tensors by name that all ranks of the same `key` hold alike."""

    key: str
    tensors: Mapping[str, Tensor]


def hash_of(tensor: Tensor) -> Tensor:
    """Return 64 bits of all bits of a tensor, int64 on its device: one pass, no copy of what is contiguous.

    A change inside of one word, such as a flipped bit, always changes them: the word's sum changes, and with it that
    sum's product with an odd number.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = flat.numel() // WORD * WORD
    words = (flat[:whole].clone() if flat.storage_offset() % WORD else flat[:whole]).view(torch.int64)
    rows = words.numel() // ROW_WORDS
    sums = [words[: rows * ROW_WORDS].view(rows, ROW_WORDS).sum(1)] if rows else []
    sums += [words[rows * ROW_WORDS :].sum()[None]] if words.numel() % ROW_WORDS else []
    sums += [_as_number(flat[whole:])] if whole < flat.numel() else []
    if len(sums) == 1 and len(sums[0]) == 1:
        return sums[0][0]
    together = torch.cat(sums) if sums else words
    weights = torch.arange(len(together), device=flat.device).mul_(_FACTOR).bitwise_or_(1)
    return (together * weights).sum()


def _as_number(left: Tensor) -> Tensor:
    """Return fewer than eight bytes as one number, (1,) int64."""
    shifts = torch.arange(0, 8 * left.numel(), 8, device=left.device)
    return torch.bitwise_left_shift(left.to(torch.int64), shifts).sum()[None]


def hashes_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the hash of each tensor; all of a device come to the host at once."""
    by_device: dict[torch.device, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        by_device[tensor.device].append(name)
    found: dict[str, int] = {}
    for names in by_device.values():
        found |= zip(names, torch.stack([hash_of(tensors[name]) for name in names]).tolist(), strict=True)
    return {name: found[name] for name in tensors}


def groups_of(engine: Engine) -> list[Group]:
    """Return what this rank holds, by which other ranks hold the same.

    A part of the parameters, with its states, is on one rank of each replica; of ranks that share products some
    parameters are on all of them; buffers are on all ranks.
    """
    own: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    for name, parameter in engine.parameters.items():
        into = own if engine.spread.copies(name) == 1 else shared
        into[name] = parameter.detach()
        states = engine.optimizer.state.get(parameter, {})
        into |= {f"{name}.{key}": value for key, value in states.items() if isinstance(value, Tensor)}
    rows = 0 if engine.sharded is None else engine.sharded.shard_rank
    groups = [Group(f"part {engine.shard_rank}", own), Group(f"rows {rows}", shared)]
    return [*groups, Group("buffers", dict(engine.model.named_buffers()))]


class Odd(NamedTuple):
    """Ranks whose numbers differ from those of the others that should have the same; `sure` that it is these."""

    ranks: list[int]
    sure: bool


def odd_ones(hashes: Sequence[int | None]) -> Odd | None:
    """Return which of the ranks that should agree do not, by their places; None if all agree. More than half decide."""
    counts = Counter(hashes)
    if len(counts) == 1:
        return None
    usual, times = counts.most_common(1)[0]
    if 2 * times <= len(hashes):
        return Odd(list(range(len(hashes))), sure=False)
    return Odd([place for place, found in enumerate(hashes) if found != usual], sure=True)


class Replicas:
    """Compare what ranks hold alike, and stop where it differs.

    Of three replicas or more the majority tells who is wrong. Of two a rank knows that it is itself if its numbers have
    changed between a check and the next update, while nothing was to change them; else both are named.
    """

    def __init__(self, plan: Plan, engine: Engine, last_good: Callable[[], str]) -> None:
        """All ranks call this together; `last_good` ends an error with the last good checkpoint, on all of them too."""
        self._engine, self._world, self._last_good = engine, engine.world, last_good
        self._every = plan.recipe.sharding.check_replicas_every
        self._on = engine.world.size > 1 and plan.recipe.sharding.engine != "deepspeed"
        self._released = bool(plan.recipe.optimizer.gradient_release)
        self.flipped = False
        """Whether this rank's own numbers have changed where nothing was to change them."""
        self._checked_at: int | None = None
        self._kept: dict[str, int] | None = None
        self._most = self._largest_group() if self._on else 1

    def lines(self) -> list[str]:
        """Return what there is to say of it before the first step; alone, nothing."""
        if self._world.size == 1:
            return []
        if not self._on:
            return ["replicas are not compared: DeepSpeed's layout is its own"]
        if self._most == 1:
            return ["replicas: none to compare, each part of a parameter is on one rank alone"]
        when = f"each {self._every} steps and " if self._every else ""
        return [f"replicas: parameters are on up to {self._most} ranks, compared bit by bit {when}before a checkpoint"]

    def check_if_due(self) -> None:
        """Check where it is time."""
        if self._every and self._engine.steps_taken % self._every == 0:
            self.check()

    def check(self) -> None:
        """Compare all ranks, which call this together, after an update. Raises BigtrainError naming who differs."""
        step = self._engine.steps_taken
        if not self._on or self._checked_at == step:
            return
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)  # what is on its way to the host is read there
        groups = groups_of(self._engine)
        own = {group.key: hashes_of(group.tensors) for group in groups}
        told = [json.loads(text) for text in self._world.gather(json.dumps([_short(found) for found in own.items()]))]
        if any(len(set(found)) > 1 for found in _by_key(told).values()):
            self._tell_apart(own)
        self._checked_at = step
        self._kept = own[groups[0].key] if self._most == 2 and not self._released else None

    def forget(self) -> None:
        """After a return to an earlier state: nothing of it has been compared."""
        self._checked_at = self._kept = None

    def before_update(self) -> None:
        """Where two replicas cannot outvote each other: see whether this rank's numbers are still what they were."""
        if self._kept is not None:
            self.flipped = hashes_of(groups_of(self._engine)[0].tensors) != self._kept
            self._kept = None

    def tell_flipped(self) -> None:
        """Raise BigtrainError naming the ranks that are `flipped`; all call this if any is."""
        ranks = [rank for rank, text in enumerate(self._world.gather(str(int(self.flipped)))) if text == "1"]
        raise BigtrainError(
            f"{self._places(ranks)}: weights or optimizer states changed by themselves after step {self._checked_at}, "
            f"before the next update: memory that cannot be trusted; {self._last_good()}"
        )

    def _tell_apart(self, own: Mapping[str, Mapping[str, int]]) -> None:
        """Raise BigtrainError with who differs, where, and since when. Ranks tell each other all hashes."""
        told = [json.loads(text) for text in self._world.gather(json.dumps(own))]
        for key in dict.fromkeys(key for found in told for key in found):
            ranks = [rank for rank, found in enumerate(told) if key in found]
            for name in told[ranks[0]][key]:
                odd = odd_ones([told[rank][key].get(name) for rank in ranks])
                if odd is not None:
                    raise BigtrainError(self._describe(name, [ranks[place] for place in odd.ranks], odd.sure, ranks))
        raise BigtrainError(
            f"step {self._engine.steps_taken}: replicas hold tensors of other names; {self._last_good()}"
        )

    def _describe(self, name: str, odd: list[int], sure: bool, ranks: list[int]) -> str:
        since = "the start" if self._checked_at is None else f"step {self._checked_at}"
        when = f"step {self._engine.steps_taken}: {name} was alike on its ranks at {since} and is not now"
        others = " and ".join(str(rank) for rank in ranks if rank not in odd)
        why = "no majority tells which of them is wrong"
        if sure:
            why = f"against ranks {others}: memory or arithmetic that cannot be trusted"
        return f"{when}: {self._places(odd)}, {why}; {self._last_good()}"

    def _places(self, ranks: list[int]) -> str:
        hosts = self._world.gather(platform.node())
        return " and ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)

    def _largest_group(self) -> int:
        """Return how many ranks at most hold a parameter alike."""
        mine = json.dumps([group.key for group in groups_of(self._engine)[:2] if group.tensors])
        return max(Counter(key for text in self._world.gather(mine) for key in json.loads(text)).values(), default=1)


def _short(found: tuple[str, Mapping[str, int]]) -> tuple[str, str]:
    key, hashes = found
    return key, hashlib.blake2b(json.dumps(hashes).encode(), digest_size=8).hexdigest()


def _by_key(told: Iterable[Iterable[tuple[str, str]]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for rank in told:
        for key, short in rank:
            found[key].append(short)
    return found
