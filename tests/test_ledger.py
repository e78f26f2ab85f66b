"""The ledger: storages live as tensors do, gradients add as in autograd, regions run again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.ledger import Gradients, Ledger, Region, Storage, Value


def unary(ledger: Ledger, x: Value, size: int = 100, *, name: str = "", product: bool = False) -> Value:
    """An operation that keeps its input and makes a gradient of its size, and one of a parameter."""
    out = ledger.product(size) if product else ledger.hold(size)

    def backward(grad: Storage, kept: list[Storage]) -> Gradients:
        dx = ledger.hold(kept[0].size, "temporaries")
        return Gradients([dx], [(name, ledger.hold(7, "gradients"))] if name else [])

    return ledger.made(out, [x], ledger.keep([x.storage]), backward)


def leaf(ledger: Ledger, size: int = 100) -> Value:
    return ledger.made(
        ledger.hold(size),
        [],
        ledger.keep([]),
        lambda grad, kept: Gradients([], [("leaf", ledger.hold(1, "gradients"))]),
    )


def backward(ledger: Ledger, value: Value) -> list[str]:
    """Run the backward pass; returns the parameters in the order in which their gradients came.

    Python may or may not keep a caller's reference to an argument, so the first gradient is kept here in any case.
    """
    names: list[str] = []
    first = ledger.hold(value.size, "temporaries")
    ledger.backward(value, first, lambda name, gradient: names.append(name))
    assert first.size == value.size
    return names


def test_storage_counts_while_it_is_referred_to() -> None:
    ledger = Ledger()
    first = ledger.hold(10, "weights")
    other = first
    second = ledger.hold(5)
    assert (ledger.now, ledger.peak) == (15, 15)
    del first, second
    assert (ledger.now, ledger.peak) == (10, 15)
    del other
    assert (ledger.now, ledger.peak) == (0, 15)
    assert ledger.causes_at_peak() == {"weights": 10, "activations": 5}


def test_the_causes_at_a_peak_that_is_not_over() -> None:
    ledger = Ledger()
    held = ledger.hold(3, "weights"), ledger.hold(4, "logits")
    assert ledger.causes_at_peak() == {"weights": 3, "logits": 4}
    assert len(held) == 2


def test_what_passes_counts_together_and_once() -> None:
    ledger = Ledger()
    held = ledger.hold(10)
    ledger.passing(20, 30)
    ledger.passing(40)
    assert (ledger.now, ledger.peak) == (10, 60)
    assert ledger.causes_at_peak() == {"activations": 10, "temporaries": 50}
    assert held.size == 10


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1000)), max_size=40))
def test_the_causes_at_the_peak_sum_to_it(changes: list[tuple[int, int]]) -> None:
    ledger = Ledger()
    places: dict[int, Storage] = {}
    for place, size in changes:
        places.pop(place, None)
        places[place] = ledger.hold(size, f"cause {place}")
    assert sum(ledger.causes_at_peak().values()) == ledger.peak
    assert ledger.now == sum(storage.size for storage in places.values())
    places.clear()
    assert ledger.now == 0


def test_a_chain_keeps_inputs_until_each_node_has_run() -> None:
    ledger = Ledger()
    x = leaf(ledger)
    for _ in range(3):
        x = unary(ledger, x)
    assert ledger.now == 400
    assert backward(ledger, x) == ["leaf"]
    # All four, the gradient of the last, and the one that its node makes.
    assert ledger.peak == 600
    del x
    assert ledger.now == 0


def test_parameters_come_in_the_order_of_autograd() -> None:
    ledger = Ledger()
    x = unary(ledger, unary(ledger, leaf(ledger), name="first"), name="second")
    assert backward(ledger, x) == ["second", "first", "leaf"]


def both(ledger: Ledger, x: Value, y: Value, *, shared: bool) -> Value:
    def backward(grad: Storage, kept: list[Storage]) -> Gradients:
        return Gradients([grad, grad if shared else ledger.hold(grad.size)], [])

    return ledger.made(ledger.hold(x.size), [x, y], ledger.keep([]), backward)


def test_a_gradient_that_nothing_else_refers_to_is_added_to_in_place() -> None:
    ledger = Ledger()
    x = leaf(ledger)
    out = unary(ledger, both(ledger, x, unary(ledger, x), shared=True))
    backward(ledger, out)
    # x, the output and its gradient; one gradient for both, and one that is added to it in place.
    assert ledger.peak == 500


def test_a_gradient_that_is_in_use_elsewhere_is_added_to_in_a_new_place() -> None:
    ledger = Ledger()
    x = leaf(ledger)
    out = both(ledger, x, x, shared=True)
    peak = ledger.peak
    backward(ledger, out)
    # The output, x, the gradient of both and their sum; and the one byte that the leaf makes of that.
    assert (peak, ledger.peak) == (200, 401)


def test_gradients_that_nobody_wants_are_dropped() -> None:
    ledger = Ledger()
    out = unary(ledger, Value(ledger.hold(100), None), name="weight")
    assert backward(ledger, out) == ["weight"]
    del out
    assert ledger.now == 0


def three(ledger: Ledger, x: Value, runs: list[bool] | None = None) -> Value:
    """A block: an operation, a product and an operation whose input alone is wanted."""
    if runs is not None:
        runs.append(ledger.taking_products)
    return unary(ledger, unary(ledger, unary(ledger, x, name="a"), name="b", product=True), name="c")


def in_region(keep_products: bool, **options: bool | int) -> tuple[Ledger, Value, list[bool]]:
    ledger, runs = Ledger(), list[bool]()
    forward: Callable[[Value], Value] = partial(three, ledger, runs=runs)
    out = Region(ledger, forward, keep_products=keep_products, **options).run(leaf(ledger))  # type: ignore[arg-type]
    return ledger, out, runs


@pytest.mark.parametrize(("keep_products", "held"), [(False, 200), (True, 300)])
def test_a_region_keeps_its_input_and_perhaps_products(keep_products: bool, held: int) -> None:
    ledger, out, runs = in_region(keep_products)
    assert (ledger.now, runs) == (held, [False])
    assert backward(ledger, out) == ["c", "b", "a", "leaf"]
    assert runs == [False, keep_products]
    del out
    assert ledger.now == 0


def test_running_again_stops_with_the_last_tensor_that_is_wanted() -> None:
    ledger, out, _ = in_region(False)
    backward(ledger, out)
    # Input and output; again the outputs of the first two, not that of the third, whose input comes last; the gradient
    # of the output and those that the third makes.
    assert ledger.peak == 100 + 100 + 200 + 200 + 7


def test_a_kept_product_is_not_held_twice() -> None:
    ledger, out, _ = in_region(True)
    backward(ledger, out)
    assert ledger.peak == 607


def test_an_input_that_is_elsewhere_comes_back_for_the_second_run() -> None:
    ledger, out, _ = in_region(False, input_elsewhere=True)
    assert ledger.now == 100
    backward(ledger, out)
    assert ledger.peak == 607


def test_the_state_of_a_region_lasts_until_its_last_node_has_run() -> None:
    ledger, out, _ = in_region(False, state_bytes=10)
    assert ledger.now == 210
    late: list[int] = []
    ledger.backward(out, ledger.hold(100), lambda name, gradient: late.append(ledger.now))
    plain, plain_out, _ = in_region(False)
    plainly: list[int] = []
    plain.backward(plain_out, plain.hold(100), lambda name, gradient: plainly.append(plain.now))
    assert [with_state - without for with_state, without in zip(late, plainly, strict=True)] == [10, 10, 0, 0]


def test_a_product_that_is_the_output_of_its_region_is_not_kept() -> None:
    ledger = Ledger()
    region = Region(ledger, lambda x: unary(ledger, unary(ledger, x), product=True), keep_products=True)
    out = region.run(leaf(ledger))
    assert ledger.now == 200
    del out
    assert ledger.now == 100


def test_outside_of_regions_products_are_plain_storage() -> None:
    ledger = Ledger()
    assert not ledger.keeping_products
    assert not ledger.taking_products
    assert ledger.product(5).size == 5
