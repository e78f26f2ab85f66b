"""What attention inside documents holds, forward and backward, on a ledger. No torch.

The order of allocations is that of `attention.py`. N tokens of the flat row, H query heads, K key and value heads,
D numbers per head, L tokens of a document, P places for documents.
"""

from __future__ import annotations

from dataclasses import dataclass

from bigtrain.ledger import Backward, Gradients, Storage, Value
from bigtrain.models.flash_cost import Flash
from bigtrain.models.operations_cost import FLOAT, Operations

PLACE_ROWS = 128
"""Rows that flash attention's backward pass keeps free after each place for a document."""

LEAST_DOCUMENTS, TYPICAL_DOCUMENT = 8, 512
"""Places for documents of packed rows, at least, and the tokens for which there is one more than there are rows."""


def document_places(rows: int, row_length: int, *, packed: bool) -> int:
    """Return for how many documents a flat batch of so many rows has places, before any data asks for more.

    A row that is not packed holds one. Of packed ones, cut from texts of common lengths, some hold several.
    """
    if not packed:
        return rows
    expected = rows + rows * row_length // TYPICAL_DOCUMENT
    return max(LEAST_DOCUMENTS, 1 << (expected - 1).bit_length())


@dataclass(frozen=True)
class Attention:
    """Attention of (H, K) heads of D numbers to the documents of a flat row, the longest with so many tokens."""

    operations: Operations
    heads: tuple[int, int]
    head_dim: int
    tokens: int
    longest: int
    causal: bool
    dropout: float = 0.0
    documents: int = 1

    def __call__(self, x: Value) -> Value:
        """Attend; keeps the input, the output, and an fp32 number for each token and head.

        On a CPU with dropout there is no such kernel, and all probabilities are kept.
        """
        if self.operations.device != "cpu":
            return self._fused(x)
        return Composed(self)(x) if self.dropout else self._in_place(x)

    def _fused(self, x: Value) -> Value:
        """Run one kernel for all documents; its backward pass adds up gradients in fp32, a place after the other."""
        ledger, (H, K), size = self.operations.ledger, self.heads, x.size
        out, sums = ledger.product(self._numbers(self.tokens, H)), ledger.hold(self.tokens * H * FLOAT)

        def backward(grad: Storage, kept: list[Storage]) -> Gradients:
            parts = [ledger.hold(self._numbers(self.tokens, heads), "temporaries") for heads in (H, K, K)]
            ledger.passing(*self._accumulators())
            dx = ledger.hold(size, "temporaries")
            del parts
            return Gradients([dx], [])

        return ledger.made(out, [x], ledger.keep([x.storage, out, sums]), backward)

    def _accumulators(self) -> list[int]:
        """Return the bytes of what the kernel's backward pass adds up in, (N + 128 P) rows of H heads.

        And of the gradients of keys and values for each query head, where heads share them. In fp32, and with dropout,
        that kernel does not run. Source: aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp.
        """
        if not self.operations.numbers.low or self.dropout:
            return []
        (H, K), D = self.heads, self.head_dim
        rows, step = self.tokens + PLACE_ROWS * self.documents, 32 if D <= 128 else 64
        expanded = [self._numbers(self.tokens, H)] * 2 if H != K else []
        return [rows * H * FLOAT, rows * H * (-(-D // step) * step) * FLOAT, *expanded]

    def _in_place(self, x: Value) -> Value:
        """Go from document to document."""
        ledger, size = self.operations.ledger, x.size
        out = ledger.hold(self._numbers(self.tokens, self.heads[0]))
        sums = [part for count, length in self._runs() for part in self._attend_run(count, length)]

        def backward(grad: Storage, kept: list[Storage]) -> Gradients:
            dx = ledger.hold(size, "temporaries")
            for _, length in self._runs():
                self._differentiate(length)
            return Gradients([dx], [])

        return ledger.made(out, [x], ledger.keep([x.storage, out, *sums]), backward)

    def _runs(self) -> list[tuple[int, int]]:
        """Return how many documents of which length fill the row: the longest, and what is left."""
        count, rest = divmod(self.tokens, self.longest)
        return [(count, self.longest)] + ([(1, rest)] if rest else [])

    def _attend_run(self, count: int, length: int) -> list[Storage]:
        """Attend within documents of equal length; what all but the last leave is held at once."""
        before = count - 1
        if not before:
            return [self._attend(length)]
        ledger, (H, _) = self.operations.ledger, self.heads
        if ledger.keeping_products:
            ledger.product(before * self._operand(length, H))
        return [ledger.product(before * length * H * FLOAT), self._attend(length)]

    def _attend(self, length: int) -> Storage:
        """Attend within one document; returns its sums."""
        ledger, (H, K) = self.operations.ledger, self.heads
        inputs = self._widened(length, H, K, K)
        out, sums = ledger.product(self._operand(length, H)), ledger.product(length * H * FLOAT)
        if not ledger.taking_products:
            ledger.passing(self._flash(length).forward())
        del inputs, out
        return sums

    def _differentiate(self, length: int) -> None:
        """Hold what the gradient of one document needs; the result goes to its place in the row's."""
        ledger, (H, K) = self.operations.ledger, self.heads
        copies = self._widened(length, H, K, K, H, H)
        grads = [ledger.hold(self._operand(length, heads), "temporaries") for heads in (H, K, K)]
        ledger.passing(self._flash(length).backward())
        del copies, grads

    def _flash(self, length: int) -> Flash:
        """Return torch's kernel on one document, in bf16 on a processor with tiles unless products are widened."""
        numbers, threads = self.operations.numbers, self.operations.threads
        native = numbers.low and not numbers.widened
        number = numbers.activation if native else FLOAT
        tokens = length, length
        return Flash(1, self.heads, tokens, self.head_dim, number, threads, self.causal, "bf16" if native else None)

    def _widened(self, length: int, *heads: int) -> list[Storage]:
        """Return fp32 copies of a document's tensors of so many heads, where products need them."""
        if not self.operations.numbers.widened:
            return []
        return [self.operations.ledger.hold(self._operand(length, count), "temporaries") for count in heads]

    def _operand(self, length: int, heads: int) -> int:
        """Return the bytes of what the kernel reads and writes for one document."""
        numbers = self.operations.numbers
        return length * heads * self.head_dim * (FLOAT if numbers.widened else numbers.activation)

    def _numbers(self, tokens: int, heads: int) -> int:
        return tokens * heads * self.head_dim * self.operations.numbers.activation


class Composed:
    """Attention as torch composes it on the CPU where it drops probabilities, in fp32, of documents of equal length.

    Source of the order: aten/src/ATen/native/transformers/attention.cpp, torch 2.13.
    """

    def __init__(self, attention: Attention) -> None:
        numbers, (H, K) = attention.operations.numbers, attention.heads
        self._ledger, self._low, self._number = attention.operations.ledger, numbers.low, numbers.activation
        self._causal, self._shared, self._longest = attention.causal, H != K, attention.longest
        self._products_kept = attention.longest <= 2 * attention.head_dim
        """Whether selective recomputation keeps the scores: not where they outnumber the operands."""
        self._scores = attention.tokens * H * attention.longest
        self._rows, self._shared_rows = (attention.tokens * heads * attention.head_dim for heads in (H, K))
        self._several = attention.tokens > attention.longest
        """Of several documents a head's rows do not follow each other, as products want them: they are copied."""

    def __call__(self, x: Value) -> Value:
        """Attend; keeps all probabilities, before and after dropout, and the noise."""
        late: list[Storage] = []
        size = x.size

        def joined(grad: Storage, kept: list[Storage]) -> Gradients:
            self._ledger.passing(self._rows * FLOAT)
            parts = self._hold(size)
            late.clear()
            dx = self._hold(size)
            del parts
            return Gradients([dx], [])

        start = self._ledger.made(x.storage, [x], self._ledger.keep([]), joined)
        scores, values, passing = self._multiply(start, late)
        del x, start
        probabilities = self._normalize(scores)
        del scores
        dropped = self._drop(probabilities)
        del probabilities
        return self._mix(dropped, values, passing, late)

    def _multiply(self, x: Value, late: list[Storage]) -> tuple[Value, Storage, list[Storage]]:
        """Return the scores, the values, and what is held until attention is done."""
        hold, rows = self._hold, self._rows * FLOAT
        wide = [hold(n * FLOAT) for n in (self._rows, self._shared_rows, self._shared_rows)] if self._low else []
        queries = hold(rows)
        mask = hold(self._longest**2 * FLOAT) if self._causal else None
        shared = hold(rows) if self._shared else None
        values = hold(rows) if self._shared else wide[2] if self._low else x.storage
        keys = hold(rows)
        scaled = queries
        if self._several:
            queries = hold(rows)
            keys = keys if self._shared else hold(rows)
        scores = self._ledger.product(self._scores * FLOAT) if self._products_kept else hold(self._scores * FLOAT)

        def backward(grad: Storage, kept: list[Storage]) -> Gradients:
            of_queries = hold(rows)
            late.append(hold(rows))
            return Gradients([of_queries], [])

        out = self._ledger.made(scores, [x], self._ledger.keep([queries, keys]), backward)
        return out, values, [part for part in (*wide, scaled, mask, shared) if part is not None]

    def _normalize(self, scores: Value) -> Value:
        out = self._ledger.hold(scores.size)
        self._ledger.passing(self._scores)
        return self._ledger.made(out, [scores], self._ledger.keep([out]), self._like(scores.size))

    def _drop(self, probabilities: Value) -> Value:
        noise, out = self._ledger.hold(probabilities.size), self._ledger.hold(probabilities.size)
        return self._ledger.made(out, [probabilities], self._ledger.keep([noise]), self._like(out.size))

    def _mix(self, dropped: Value, values: Storage, passing: list[Storage], late: list[Storage]) -> Value:
        """Multiply by the values, round, and bring the heads together."""
        rows, ledger = self._rows * FLOAT, self._ledger
        rounded = self._hold(self._scores * self._number) if self._low else None
        if self._several and not self._shared:
            values = self._hold(rows)
        out = self._hold(rows) if self._low else ledger.product(rows)

        def backward(grad: Storage, kept: list[Storage]) -> Gradients:
            late.append(self._hold(rows))
            return Gradients([self._hold(dropped_size)], [])

        dropped_size = dropped.size
        mixed = ledger.made(out, [dropped], ledger.keep([dropped.storage, values]), backward)
        if self._low:
            mixed = Value(ledger.product(self._rows * self._number), mixed.node)
        del out, dropped, values, rounded
        passing.clear()
        together = ledger.hold(self._rows * self._number)
        copied = self._low or self._several
        return ledger.made(
            together,
            [mixed],
            ledger.keep([]),
            lambda grad, kept: Gradients([self._hold(rows) if copied else grad], []),
        )

    def _like(self, size: int) -> Backward:
        return lambda grad, kept: Gradients([self._hold(size)], [])

    def _hold(self, size: int) -> Storage:
        return self._ledger.hold(size, "temporaries")
