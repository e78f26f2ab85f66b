"""The CUDA caching allocator, replayed: what it reserves for a sequence of allocations and releases. No torch, no GPU.

Rules and constants: torch 2.11 to 2.13, `c10/cuda/CUDACachingAllocator.cpp` and `c10/core/AllocatorConfig.h`, with the
default settings or `expandable_segments:True`. One stream, no CUDA graph, and a device that is large enough: torch
gives its cached segments back before it fails, so a real run may reserve less than this, never with fewer bytes live.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

ROUNDING_BYTES = 512
"""Sizes are multiples of this; a small block leaves no remainder below it (kMinBlockSize)."""

SMALL_BYTES = 2**20
"""The largest request of the small pool; a large block leaves no remainder up to this (kSmallSize)."""

SMALL_SEGMENT_BYTES = 2 * 2**20
"""What the small pool takes from the driver at a time (kSmallBuffer)."""

LARGE_SEGMENT_BYTES = 20 * 2**20
"""What the large pool takes for a request below `OWN_SEGMENT_BYTES` (large_segment_size, before 2.11 kLargeBuffer)."""

OWN_SEGMENT_BYTES = 10 * 2**20
"""From here a request takes a segment of its own (kMinLargeAlloc), a multiple of `SEGMENT_ROUNDING_BYTES`."""

SEGMENT_ROUNDING_BYTES = 2 * 2**20
"""kRoundLarge."""

Event: TypeAlias = int
"""An allocation of so many bytes; below 0, `~number` of the allocation to release: they are numbered from 0."""

_ADDRESS_BITS = 56
_ADDRESSES = 2**_ADDRESS_BITS - 1
"""A free block is sorted by size, then address, as one integer: size << bits | address."""


class Block:
    """A range of addresses of one segment, in use or free; `before` and `after` are its neighbours there."""

    __slots__ = ("address", "after", "before", "free", "pool", "size")

    def __init__(self, pool: Pool, address: int, size: int, before: Block | None, after: Block | None) -> None:
        self.pool, self.address, self.size, self.before, self.after = pool, address, size, before, after
        self.free = False


class Pool:
    """The free blocks for small or for large requests; `last` ends the one segment where it is expandable."""

    def __init__(self, segment_bytes: int, smallest_remainder: int) -> None:
        self.segment_bytes, self.smallest_remainder = segment_bytes, smallest_remainder
        self.keys: list[int] = []
        self.blocks: dict[int, Block] = {}
        self.last: Block | None = None

    def put(self, block: Block) -> None:
        """Make a block free."""
        block.free = True
        self.blocks[block.address] = block
        insort(self.keys, block.size << _ADDRESS_BITS | block.address)

    def take(self, block: Block) -> None:
        """Make a free block used."""
        block.free = False
        del self.blocks[block.address]
        del self.keys[bisect_left(self.keys, block.size << _ADDRESS_BITS | block.address)]

    def take_best(self, size: int) -> Block | None:
        """Make the smallest free block that is large enough used, of equal ones the first; None where there is none.

        A block at the end of an expandable segment counts as large as it can grow, so any other is taken before it.
        """
        keys = self.keys
        place = bisect_left(keys, size << _ADDRESS_BITS)
        if place == len(keys):
            return None
        if self.last is not None and place + 1 < len(keys) and keys[place] & _ADDRESSES == self.last.address:
            place += 1
        block = self.blocks.pop(keys.pop(place) & _ADDRESSES)
        block.free = False
        return block


NOTHING = Block(Pool(0, 0), 0, 0, None, None)
"""The block of an allocation of no bytes."""


@dataclass(frozen=True)
class Reserved:
    """Peaks of a replay, as torch.cuda.max_memory_allocated and max_memory_reserved give them, and what was left.

    Allocated counts whole blocks: a request rounded up to 512 B, and what of its block was too little to split off.
    """

    allocated_bytes_peak: int
    reserved_bytes_peak: int
    allocated_bytes: int
    reserved_bytes: int

    @property
    def fragmentation(self) -> float:
        """Return the share of the reserved peak that the allocated peak leaves unused, 0 to 1."""
        return 1 - self.allocated_bytes_peak / self.reserved_bytes_peak if self.reserved_bytes_peak else 0.0


class Allocator:
    """The state of the allocator between steps: what one step leaves cached, the next one uses."""

    def __init__(self, *, expandable: bool = False) -> None:
        self._expandable = expandable
        self._small = Pool(SMALL_SEGMENT_BYTES, ROUNDING_BYTES)
        self._large = Pool(LARGE_SEGMENT_BYTES, ROUNDING_BYTES if expandable else SMALL_BYTES + ROUNDING_BYTES)
        self._blocks: list[Block | None] = []
        """Of each allocation, None where it is released."""
        self._next_address = 0
        self.allocated = self.reserved = self.allocated_peak = self.reserved_peak = 0

    def run(self, events: Iterable[Event]) -> Reserved:
        """Replay events and return the peaks since the start, or since `reset_peaks`.

        Raises ValueError at a release of what is not allocated.
        """
        allocate, release = self.allocate, self.release
        for event in events:
            if event >= 0:
                allocate(event)
            else:
                release(~event)
        return Reserved(self.allocated_peak, self.reserved_peak, self.allocated, self.reserved)

    def reset_peaks(self) -> None:
        """Start new peaks from what is held now."""
        self.allocated_peak, self.reserved_peak = self.allocated, self.reserved

    def allocate(self, size: int) -> int:
        """Allocate bytes and return the number of this allocation; none are as good as no block."""
        if size < 0:
            raise ValueError(f"an allocation of {size} bytes")
        blocks = self._blocks
        if size == 0:
            blocks.append(NOTHING)
            return len(blocks) - 1
        size = -(-size // ROUNDING_BYTES) * ROUNDING_BYTES
        pool = self._small if size <= SMALL_BYTES else self._large
        block = pool.take_best(size)
        if block is None:
            block = self._grown(pool, size) if self._expandable else self._segment(pool, size)
        if block.size - size >= pool.smallest_remainder:
            _split(block, size)
        blocks.append(block)
        self.allocated += block.size
        if self.allocated > self.allocated_peak:
            self.allocated_peak = self.allocated
        return len(blocks) - 1

    def release(self, number: int) -> None:
        """Release an allocation: its block joins the free ones beside it and stays cached."""
        block = self._blocks[number] if 0 <= number < len(self._blocks) else None
        if block is None:
            raise ValueError(f"allocation {number} of {len(self._blocks)} is released, but it is not held")
        self._blocks[number] = None
        if block is NOTHING:
            return
        self.allocated -= block.size
        after, before = block.after, block.before
        if after is not None and after.free:
            _join(block, after)
        if before is not None and before.free:
            block = _join(before, block)
        block.pool.put(block)

    def _segment(self, pool: Pool, size: int) -> Block:
        """Return a new segment as one block in use."""
        own = -(-size // SEGMENT_ROUNDING_BYTES) * SEGMENT_ROUNDING_BYTES
        block = Block(pool, self._next_address, own if size >= OWN_SEGMENT_BYTES else pool.segment_bytes, None, None)
        self._next_address += block.size
        self._reserve(block.size)
        return block

    def _grown(self, pool: Pool, size: int) -> Block:
        """Return the end of the pool's one segment as a block in use, after mapping the pages that it lacks."""
        last = pool.last
        if last is not None and last.free:
            pool.take(last)
            block = last
        else:
            block = Block(pool, 0 if last is None else last.address + last.size, 0, last, None)
            if last is not None:
                last.after = block
            pool.last = block
        mapped = -(-(size - block.size) // pool.segment_bytes) * pool.segment_bytes
        block.size += mapped
        self._reserve(mapped)
        return block

    def _reserve(self, size: int) -> None:
        self.reserved += size
        self.reserved_peak = max(self.reserved_peak, self.reserved)


def replay(events: Iterable[Event], *, expandable: bool = False) -> Reserved:
    """Return what a fresh allocator reserves for these events."""
    return Allocator(expandable=expandable).run(events)


def _split(block: Block, size: int) -> None:
    """Cut a block that is in use to a size; the rest becomes free."""
    rest = Block(block.pool, block.address + size, block.size - size, block, block.after)
    if rest.after is not None:
        rest.after.before = rest
    block.after, block.size = rest, size
    if block.pool.last is block:
        block.pool.last = rest
    block.pool.put(rest)


def _join(block: Block, after: Block) -> Block:
    """Return one block in use, made of two neighbours of which one is free."""
    block.pool.take(block if block.free else after)
    block.size, block.after = block.size + after.size, after.after
    if block.after is not None:
        block.after.before = block
    if block.pool.last is after:
        block.pool.last = block
    return block
