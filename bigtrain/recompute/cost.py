"""What each policy keeps of a block, on a ledger. No torch."""

from __future__ import annotations

from collections.abc import Callable

from bigtrain.ledger import Ledger, Region, Value

RANDOM_STATE_BYTES = 5056
"""torch's generator state on the CPU, of which each recomputed block keeps a copy."""


def run_block(ledger: Ledger, policy: str, forward: Callable[[Value], Value], value: Value) -> Value:
    """Run a block's forward under a policy: `none` keeps what its operations keep, the others its input.

    `selective` keeps the outputs of matrix products and attention as well; under `offload` the input is on the host.
    """
    if policy == "none":
        return forward(value)
    region = Region(
        ledger,
        forward,
        keep_products=policy == "selective",
        input_elsewhere=policy == "offload",
        state_bytes=RANDOM_STATE_BYTES,
    )
    return region.run(value)
