"""What each operation of the models holds, forward and backward, on a ledger. No torch.

The order of allocations is that of the operations in `layers.py`, `pointwise.py` and `amp/`: the price test holds
every one of them against a profile of a real step. Attention is in `attention_cost.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bigtrain.ledger import Gradients, Ledger, Storage, Value

FLOAT, LONG = 4, 8
"""Bytes of a number in fp32, and of an index."""


@dataclass(frozen=True)
class Numbers:
    """Bytes of a number: of activations, of weights as they are kept, of their gradients.

    `widened` says that products of low-precision operands run in fp32, as on processors without instructions for them.
    """

    activation: int = FLOAT
    weight: int = FLOAT
    gradient: int = FLOAT
    widened: bool = False

    @property
    def low(self) -> bool:
        """Whether activations are narrower than fp32, so that products run through the low-precision linear layer."""
        return self.activation < FLOAT


class Remade(NamedTuple):
    """What a tensor is made of, and what holds it once it is made again."""

    source: Storage
    again: Callable[[], Storage]


@dataclass(frozen=True)
class Operations:
    """Operations on a ledger, for one choice of numbers and one kind of device, a CPU with so many threads."""

    ledger: Ledger
    numbers: Numbers
    device: str = "cpu"
    threads: int = 1
    compiled: bool = False

    def linear(self, x: Value, name: str, n: int, i: int, o: int, *, bias: bool, remade: Remade | None = None) -> Value:
        """Multiply (n, i) by a weight (o, i).

        Where x is remade for the backward pass, what it is made of is kept instead, as in `activated.py`.
        """
        numbers, product = self.numbers, self._low_product if self.numbers.low else self.product
        again = remade.again if remade is not None and self.forgets else None
        source = remade.source if remade is not None and again is not None else x.storage
        kept = None if numbers.low else self.ledger.keep([source])
        out = product(n, i, o, kept=True)

        def backward(grad: Storage, kept: list[Storage]) -> Gradients:
            made = again() if again is not None else None
            dx = product(n, o, i)
            dw = self.weight_gradient(n, i, o)
            parameters = [(f"{name}.weight", dw)]
            if bias:
                if numbers.low and numbers.gradient == FLOAT and self.device == "cpu":
                    self.ledger.passing(n * o * FLOAT)
                parameters.insert(0, (f"{name}.bias", self.ledger.hold(o * numbers.gradient, "gradients")))
            del made
            return Gradients([dx], parameters)

        return self.ledger.made(out, [x], kept or self.ledger.keep([source]), backward)

    @property
    def forgets(self) -> bool:
        """Whether activations before a product are computed again, rather than kept."""
        return self.device == "cpu" and not self.compiled and self.ledger.region is None

    def product(self, n: int, i: int, o: int, *, kept: bool = False) -> Storage:
        """Hold the (n, o) of a plain product."""
        size = n * o * self.numbers.activation
        return self.ledger.product(size) if kept else self.ledger.hold(size, "temporaries")

    def _low_product(self, n: int, i: int, o: int, *, kept: bool = False) -> Storage:
        """Multiply by a weight that is rounded first, and with widened operands."""
        numbers, hold = self.numbers, self.ledger.hold
        operands = [hold(n * i * FLOAT, "temporaries")] if numbers.widened else []
        rounded = hold(i * o * numbers.activation, "temporaries") if numbers.weight != numbers.activation else None
        if not numbers.widened:
            return self.product(n, i, o, kept=kept)
        operands.append(hold(i * o * FLOAT, "temporaries"))
        del rounded
        wide = hold(n * o * FLOAT, "temporaries")
        del operands
        size = n * o * numbers.activation
        out = self.ledger.product(size) if kept else hold(size, "temporaries")
        del wide
        return out

    def weight_gradient(self, n: int, i: int, o: int) -> Storage:
        """Hold the gradient of a weight (o, i), and what its product needs."""
        numbers, hold = self.numbers, self.ledger.hold
        if not numbers.low:
            return hold(i * o * numbers.gradient, "gradients")
        if numbers.widened:
            operands = [hold(n * o * FLOAT, "temporaries"), hold(n * i * FLOAT, "temporaries")]
            wide = hold(i * o * FLOAT, "gradients" if numbers.gradient == FLOAT else "temporaries")
            del operands
        else:
            wide = hold(i * o * (FLOAT if self.device == "cuda" else numbers.activation), "gradients")
        return wide if wide.size == i * o * numbers.gradient else hold(i * o * numbers.gradient, "gradients")

    def enter(self, x: Value) -> Value:
        """Let ranks read what they share; backward adds up what each of them has of its gradient."""
        size = x.size
        hold, keep = self.ledger.hold, self.ledger.keep
        return self.ledger.made(x.storage, [x], keep([]), lambda grad, kept: Gradients([hold(size, "temporaries")], []))

    def sum_over_ranks(self, x: Value, name: str, w: int, *, bias: bool) -> Value:
        """Add up (n, w) over ranks, and a bias to the sum."""
        numbers, hold = self.numbers, self.ledger.hold
        out = hold(x.size)
        if bias and numbers.weight != numbers.activation:
            self.ledger.passing(w * numbers.activation)

        def backward(grad: Storage, kept: list[Storage]) -> Gradients:
            made = [(f"{name}.bias", hold(w * numbers.gradient, "gradients"))] if bias else []
            return Gradients([grad], made)

        return self.ledger.made(out, [x], self.ledger.keep([]), backward)

    def layer_norm(self, x: Value, name: str, n: int, w: int) -> Value:
        """Normalize; keeps the input and two fp32 numbers a token."""
        return self._norm(x, name, n, w, statistics=2, parameters=("weight", "bias"))

    def rms_norm(self, x: Value, name: str, n: int, w: int) -> Value:
        """Normalize; keeps the input and an fp32 number a token. On the CPU our own operations pass through fp32."""
        return self._norm(x, name, n, w, statistics=1, parameters=("weight",))

    def _norm(self, x: Value, name: str, n: int, w: int, *, statistics: int, parameters: Sequence[str]) -> Value:
        numbers, composed = self.numbers, statistics == 1 and self.device == "cpu"
        if composed:
            self.rms_norm_statistics(n, w)
        kept = [x.storage] + [self.ledger.hold(n * FLOAT) for _ in range(statistics)]
        wide = self.ledger.hold(n * w * FLOAT) if composed and numbers.low else None
        out = self.ledger.hold(n * w * numbers.activation)
        del wide

        def backward(grad: Storage, kept: list[Storage]) -> Gradients:
            dx = self._rms_norm_backward(n, w) if composed else self.ledger.hold(x_size, "temporaries")
            made = [(f"{name}.{p}", self.ledger.hold(w * numbers.gradient, "gradients")) for p in parameters]
            if statistics == 2 and self.device == "cpu":
                self.ledger.passing(self.threads * 2 * w * FLOAT)
            return Gradients([dx], made)

        x_size = n * w * numbers.activation
        return self.ledger.made(out, [x], self.ledger.keep(kept), backward)

    def rms_norm_statistics(self, n: int, w: int) -> None:
        """Pass through what our own root mean square holds."""
        wide = [n * w * FLOAT] * (2 if self.numbers.low else 1)
        self.ledger.passing(*wide)

    def _rms_norm_backward(self, n: int, w: int) -> Storage:
        """Hold three fp32 tensors of the input's size, for low inputs a fourth; the first becomes the result."""
        hold = self.ledger.hold
        scaled, slope = hold(n * w * FLOAT, "temporaries"), hold(n * w * FLOAT, "temporaries")
        self.ledger.passing(*[n * w * FLOAT] * (2 if self.numbers.low else 1))
        del slope
        return hold(n * w * self.numbers.activation, "temporaries") if self.numbers.low else scaled

    def dropout(self, x: Value, p: float, elements: int) -> Value:
        """Zero a share; keeps a byte a number."""
        if not p:
            return x
        size = elements * self.numbers.activation
        mask = self.ledger.hold(elements)
        as_number = self.ledger.hold(size, "temporaries") if self.device == "cpu" else None
        out = self.ledger.hold(size)
        del as_number

        def backward(grad: Storage, kept: list[Storage]) -> Gradients:
            if self.device != "cpu":
                return Gradients([self.ledger.hold(size, "temporaries")], [])
            as_number = self.ledger.hold(size, "temporaries")
            masked = self.ledger.hold(size, "temporaries")
            del as_number
            dx = self.ledger.hold(size, "temporaries")
            del masked
            return Gradients([dx], [])

        return self.ledger.made(out, [x], self.ledger.keep([mask]), backward)

    def gelu(self, x: Value) -> Value:
        """Apply GELU; keeps the input."""
        size = x.size
        return self.ledger.made(
            self.ledger.hold(size),
            [x],
            self.ledger.keep([x.storage]),
            lambda grad, kept: Gradients([self.ledger.hold(size, "temporaries")], []),
        )

    def tanh(self, x: Value) -> Value:
        """Apply tanh; keeps the output."""
        out = self.ledger.hold(x.size)
        size = x.size
        return self.ledger.made(
            out, [x], self.ledger.keep([out]), lambda grad, kept: Gradients([self.ledger.hold(size, "temporaries")], [])
        )

    def swiglu(self, x: Value) -> Value:
        """Gate one half by the other; keeps the input."""
        size = x.size

        def backward(grad: Storage, kept: list[Storage]) -> Gradients:
            dx = self.ledger.hold(size, "temporaries")
            self.ledger.passing(size // 2, size // 2)
            return Gradients([dx], [])

        return self.ledger.made(self.ledger.hold(size // 2), [x], self.ledger.keep([x.storage]), backward)

    def add(self, x: Value, y: Value) -> Value:
        """Add two tensors of the same size; their gradients are one and the same."""
        out = self.ledger.hold(x.size)
        return self.ledger.made(out, [x, y], self.ledger.keep([]), lambda grad, kept: Gradients([grad, grad], []))

    def rotate(self, x: Value, tables: Sequence[Storage], n: int, heads: int, head_dim: int) -> Value:
        """Turn the first heads; keeps the angles only, which all blocks share."""
        size, half, angles = x.size, n * heads * head_dim // 2 * FLOAT, n * head_dim // 2 * FLOAT
        products = [half] * (3 if self.numbers.low else 2)  # of low numbers with fp32 ones, a copy is made first

        def backward(grad: Storage, kept: list[Storage]) -> Gradients:
            dx = self.ledger.hold(size, "temporaries")
            self.ledger.passing(angles, *products)
            return Gradients([dx], [])

        out = self.ledger.hold(size)
        self.ledger.passing(*products)
        return self.ledger.made(out, [x], self.ledger.keep(tables), backward)

    def gather(self, x: Value, m: int, w: int) -> Value:
        """Pick m rows of x; its gradient is as large as x."""
        size = x.size
        return self.ledger.made(
            self.ledger.hold(m * w * self.numbers.activation),
            [x],
            self.ledger.keep([]),
            lambda grad, kept: Gradients([self.ledger.hold(size, "temporaries")], []),
        )
