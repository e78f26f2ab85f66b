"""Products whose input is made again for the backward pass, on a ledger, as in `activated.py`. No torch.

N tokens of the flat row, I features in, O features out.
"""

from __future__ import annotations

from bigtrain.ledger import Gradients, Storage, Value
from bigtrain.models.operations_cost import FLOAT, Operations, Remade


def linear_of_norm(
    run: Operations, x: Value, source: Storage, name: str, n: int, i: int, o: int, *, bias: bool
) -> Value:
    """Multiply a normalized tensor (n, i), which a plain layer makes again of the norm's input."""
    if run.numbers.low or not run.forgets:
        return run.linear(x, name, n, i, o, bias=bias)
    out = run.product(n, i, o, kept=True)

    def backward(grad: Storage, kept: list[Storage]) -> Gradients:
        again = _normalized_again(run, n, i, rms=not bias)
        dw = run.weight_gradient(n, i, o)
        del again
        dx = run.product(n, o, i)
        return Gradients([dx], _with_bias(run, name, dw, o, bias=bias))

    return run.ledger.made(out, [x], run.ledger.keep([source]), backward)


def linear_of_activation(
    run: Operations, x: Value, name: str, n: int, i: int, o: int, *, gated: bool, bias: bool, plain: bool = True
) -> Value:
    """Multiply the activation (n, i) of x, which is made again; its gradient comes into the room of it.

    A layer that is not `plain` makes it again too, but is differentiated as any other.
    """
    ledger, size = run.ledger, n * i * FLOAT
    if run.numbers.low or not run.forgets or not plain:
        activation = run.swiglu(x) if gated else run.gelu(x)
        again = Remade(x.storage, lambda: ledger.hold(n * i * run.numbers.activation, "temporaries"))
        return run.linear(activation, name, n, i, o, bias=bias, remade=again)
    hidden = ledger.hold(size, "temporaries")
    out = run.product(n, i, o, kept=True)
    del hidden

    def backward(grad: Storage, kept: list[Storage]) -> Gradients:
        dx = ledger.hold(size, "temporaries")
        dw = run.weight_gradient(n, i, o)
        if gated:
            hidden, dx = dx, ledger.hold(2 * size, "temporaries")
            ledger.passing(size, size)
            del hidden
        return Gradients([dx], _with_bias(run, name, dw, o, bias=bias))

    return ledger.made(out, [x], ledger.keep([x.storage]), backward)


def _with_bias(run: Operations, name: str, dw: Storage, o: int, *, bias: bool) -> list[tuple[str, Storage]]:
    """Return the gradients of a plain layer's parameters, in autograd's order."""
    found = [(f"{name}.bias", run.ledger.hold(o * FLOAT, "gradients"))] if bias else []
    return [*found, (f"{name}.weight", dw)]


def _normalized_again(run: Operations, n: int, w: int, *, rms: bool) -> Storage:
    """Hold what a norm returns; its statistics pass."""
    if rms:
        run.rms_norm_statistics(n, w)
    statistics = [run.ledger.hold(n * FLOAT, "temporaries") for _ in range(1 if rms else 2)]
    out = run.ledger.hold(n * w * FLOAT, "temporaries")
    del statistics
    return out
