"""What sharding costs, in bytes held and bytes sent. No torch.

Every stage is `fully_shard` on a mesh of `replicate` x `shards` ranks: stage 0 has shards of one rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from bigtrain.config.schema import Recipe

Shape = Sequence[int]
Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]
Scope = Literal["shard", "replicate", "tensor"]

STAGES = (0, 1, 2, 3)
"""Nothing is sharded; optimizer states; gradients too; parameters too."""

REDUCE_BYTES = {"fp32": 4, "bf16": 2}
"""Bytes of a gradient as it is summed, by `amp.reduce`."""

RESHARDING_STAGES = (0, 3)
"""Stages in which a block lets go of its gathered parameters after each pass. At stage 0 those are a copy."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model lies on its ranks: a mesh of `replicate` x `shards`, and the bytes of a number in each role.

    `number_bytes` as parameters compute, `kept_bytes` as they are kept, `reduce_bytes` as gradients are summed.
    """

    zero_stage: int
    shards: int
    replicate: int
    number_bytes: int
    kept_bytes: int
    reduce_bytes: int = 4
    accumulated: bool = False
    offload: str = "none"

    @classmethod
    def of(cls, recipe: Recipe, world_size: int, kept_bytes: int) -> Layout:
        """Return the layout of a recipe without `auto`, whose weights are kept in numbers of so many bytes.

        With `optimizer` offloaded the device has the weights as they compute; masters wider than that are on the host.
        `nvme`, DeepSpeed's, is as `all`: what its buffers hold is not predicted.
        """
        section, micro = recipe.sharding, recipe.train.micro_batch_size
        stage, replicate = (0, 1) if world_size == 1 else (section.zero_stage, section.replicate)
        assert stage != "auto" and replicate != "auto" and micro != "auto"
        replicate = replicate if stage else world_size
        number_bytes = 4 if recipe.amp.precision == "fp32" else 2
        return cls(
            zero_stage=stage,
            shards=world_size // replicate,
            replicate=replicate,
            number_bytes=number_bytes,
            kept_bytes=number_bytes if section.offload == "optimizer" else kept_bytes,
            reduce_bytes=REDUCE_BYTES[recipe.amp.reduce],
            accumulated=recipe.train.global_batch_size // world_size > micro,
            offload="all" if section.offload == "nvme" else section.offload,
        )

    @property
    def alone(self) -> bool:
        """Whether the weights just lie there: on one rank nothing is sharded, whatever the stage."""
        return self.shards == self.replicate == 1 and not self.streaming

    @property
    def streaming(self) -> bool:
        """Whether blocks fetch their weights from the host, and send their gradients there."""
        return self.offload == "all"

    @property
    def converting(self) -> bool:
        """Whether parameters are rounded when they are gathered."""
        return self.number_bytes != self.kept_bytes

    @property
    def resharding(self) -> bool:
        """Whether a block lets go of its whole parameters after each pass."""
        return self.zero_stage in RESHARDING_STAGES

    @property
    def mesh(self) -> tuple[int, ...]:
        """Return the dims of the mesh, (replicate, shards) or (shards,).

        On two dims torch sums gradients over micro-batches in `reduce_bytes`, on one in those of the weights: too few
        where these are bf16, so that a dim of one replica is there for that alone.
        """
        narrow = self.accumulated and self.kept_bytes < self.reduce_bytes
        two = self.replicate > 1 or narrow
        return (self.replicate, self.shards) if two else (self.shards,)


def local_shape(shape: Shape, shards: int) -> tuple[int, ...]:
    """Return what the first rank holds of a parameter, and so the most: rows, rounded up."""
    return (-(-shape[0] // shards), *shape[1:]) if shape else ()


def padded_elements(shape: Shape, shards: int) -> int:
    """Return the elements of a parameter whose rows are filled up to a multiple of the shards."""
    return shards * math.prod(local_shape(shape, shards))


def shard_bytes(shapes: Iterable[Shape], shards: int, number_bytes: int) -> int:
    """Return the bytes of the parts that one rank keeps; every rank has room for as much as the first."""
    return number_bytes * sum(math.prod(local_shape(shape, shards)) for shape in shapes)


@dataclass(frozen=True, slots=True)
class Collective:
    """Collectives of one kind in a step: what each rank sends in all of them together.

    `ranks` take part in each; `scope` says whether they share the parts of one model (neighbours, in a node where they
    fit), hold the same part of several (`replicate`), or share products and wait for the sum (`tensor`); of those of
    one model, each is `apart` from the next. Each block has `times` of them in a step; `calls` counts all.
    `forward_share` of the bytes are sent in forward passes, the rest in backward ones.
    """

    kind: Kind
    sent_bytes: int
    ranks: int
    scope: Scope
    times: int
    calls: int
    forward_share: float = 0.0
    apart: int = 1


def collectives(
    parameters: int,
    stage: int,
    shards: int,
    replicate: int,
    accumulation_steps: int,
    number_bytes: int,
    reduce_bytes: int,
    *,
    groups: int = 1,
    outside: int = 0,
    apart: int = 1,
) -> list[Collective]:
    """Return what each rank sends in a step; nothing where a collective would have one rank.

    `parameters` are elements with the padding of their rows, in so many `groups`; of them `outside` are those of the
    group outside of the blocks, which stay gathered from a forward pass to its backward pass. `number_bytes` are those
    of a parameter as it computes, `reduce_bytes` those of a gradient as it is summed. Ring algorithms send (n-1)/n of
    the whole in an all-gather or a reduce-scatter and twice that in an all-reduce, which for one micro-batch are the
    1x, 1x and 1.5x of Rajbhandari et al. 2020, arXiv 1910.02054, section 7. With several, stage 1 reduces the last
    one's only, stage 2 each one's, and stage 3 gathers blocks for each one's forward and backward pass.
    """
    found = []
    if stage and shards > 1:
        gathers = 2 * accumulation_steps if stage == 3 else 1
        reductions = 1 if stage == 1 else accumulation_steps
        gathered, reduced = (_ring(parameters * size, shards) for size in (number_bytes, reduce_bytes))
        kept = accumulation_steps if stage == 3 and outside else 0
        sent = gathers * gathered - kept * _ring(outside * number_bytes, shards)
        share = accumulation_steps * gathered / sent if stage == 3 else 1.0
        found.append(Collective("all_gather", sent, shards, "shard", gathers, gathers * groups - kept, share, apart))
        calls = reductions * groups
        found.append(Collective("reduce_scatter", reductions * reduced, shards, "shard", reductions, calls, 0.0, apart))
    if replicate > 1:
        part = -(-parameters // shards) * reduce_bytes
        found.append(Collective("all_reduce", 2 * _ring(part, replicate), replicate, "replicate", 1, groups))
    return found


def tensor_sums(
    ranks: int, activation_bytes: int, blocks: int, repeated: int, accumulation_steps: int
) -> list[Collective]:
    """Return what ranks that share products send in a step: each sums activations of so many bytes with the others.

    Every block does so twice in a forward pass and twice in a backward pass, where all blocks together repeat so many
    more to have their activations again (Shoeybi et al. 2019, arXiv 1909.08053, section 3).
    """
    if ranks == 1:
        return []
    forward, backward = 2 * blocks, 2 * blocks + repeated
    calls = accumulation_steps * (forward + backward)
    sent = calls * 2 * _ring(activation_bytes, ranks)
    times = accumulation_steps * ROUNDS
    return [Collective("all_reduce", sent, ranks, "tensor", times, calls, forward / (forward + backward))]


ROUNDS = 4
"""Sums of a block over the ranks that share its products, in a forward and a backward pass."""


def _ring(whole_bytes: int, ranks: int) -> int:
    return whole_bytes * (ranks - 1) // ranks
