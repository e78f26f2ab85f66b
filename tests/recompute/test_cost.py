"""Policies on a ledger: each keeps less than the one before, and the peak of a deep model falls."""

from __future__ import annotations

import pytest

from bigtrain.ledger import Gradients, Ledger, Storage, Value
from bigtrain.recompute.cost import RANDOM_STATE_BYTES, run_block
from bigtrain.recompute.policy import POLICIES

SIZE, BLOCKS = 10**6, 12


def block(ledger: Ledger, value: Value) -> Value:
    """A product, then cheap work that keeps twice its input."""
    for product in (True, False):
        out = ledger.product(SIZE) if product else ledger.hold(SIZE)
        mask = ledger.hold(SIZE)

        def backward(grad: Storage, kept: list[Storage]) -> Gradients:
            return Gradients([ledger.hold(SIZE, "temporaries")], [])

        value = ledger.made(out, [value], ledger.keep([value.storage, mask]), backward)
    return value


def run(policies: list[str]) -> tuple[int, int]:
    """Return what is held between forward and backward, and the peak."""
    ledger = Ledger()
    x = ledger.made(ledger.hold(SIZE), [], ledger.keep([]), lambda grad, kept: Gradients([], []))
    for policy in policies:
        x = run_block(ledger, policy, lambda value: block(ledger, value), x)
    held = ledger.now
    ledger.backward(x, ledger.hold(SIZE, "temporaries"), lambda name, gradient: None)
    del x
    assert ledger.now == 0
    return held, ledger.peak


def test_each_policy_keeps_less() -> None:
    found = {policy: run([policy] * BLOCKS) for policy in POLICIES}
    held = [found[policy][0] for policy in ("none", "selective", "full", "offload")]
    peaks = [found[policy][1] for policy in ("none", "selective", "full", "offload")]
    assert held == sorted(held, reverse=True)
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(held)) == len(set(peaks)) == len(POLICIES)


def test_what_each_policy_keeps_of_a_block() -> None:
    assert run(["none"] * BLOCKS)[0] == SIZE * (1 + 4 * BLOCKS)
    assert run(["selective"] * BLOCKS)[0] == SIZE * (1 + 2 * BLOCKS) + RANDOM_STATE_BYTES * BLOCKS
    assert run(["full"] * BLOCKS)[0] == SIZE * (1 + BLOCKS) + RANDOM_STATE_BYTES * BLOCKS
    assert run(["offload"] * BLOCKS)[0] == SIZE + RANDOM_STATE_BYTES * BLOCKS


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_a_mixture_lies_between(policy: str) -> None:
    mixed = run(["none", policy] * (BLOCKS // 2))
    for place in (0, 1):
        assert run([policy] * BLOCKS)[place] < mixed[place] < run(["none"] * BLOCKS)[place]
