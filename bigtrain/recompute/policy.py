"""The names of the policies, and one for each block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, cast, get_args

from bigtrain.errors import InputError, did_you_mean

Policy: TypeAlias = Literal["none", "selective", "full", "offload"]
"""What a block does between its forward and its backward pass.

none: keep everything. selective: keep matrix products and attention outputs, compute the rest again. full: keep the
block's input, compute all of it again. offload: as full, with the input in host memory.
"""

POLICIES: tuple[Policy, ...] = get_args(Policy)


def resolve(policy: str | Sequence[str], blocks: int) -> list[Policy]:
    """Return one policy for each of so many blocks, from a name for all or a list with one name per block.

    Raises InputError for a list of another length, and for a name that is no policy.
    """
    names = [policy] * blocks if isinstance(policy, str) else list(policy)
    if len(names) != blocks:
        raise InputError(
            f"recompute.policy: a list of {len(names)} for {blocks} blocks; "
            "write one entry a block, or one word for all"
        )
    for name in dict.fromkeys([policy] if isinstance(policy, str) else names):
        if name not in POLICIES:
            known = ", ".join(POLICIES)
            raise InputError(f"recompute.policy: {name!r} is none of {known}{did_you_mean(str(name), POLICIES)}")
    return cast("list[Policy]", names)


def check_device(policies: Sequence[str], device_type: str) -> None:
    """Raise InputError if one of the policies makes no sense on this type of device: `offload` needs CUDA."""
    if "offload" not in policies or device_type == "cuda":
        return
    if device_type == "cpu":
        reason = "the host memory is the device memory there"
    else:
        reason = "its copies run on CUDA streams"
    raise InputError(f"recompute.policy: 'offload' on the device {device_type!r}: {reason}; use full")
