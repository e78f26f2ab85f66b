"""What a forward and a backward pass of our models have to do, operation by operation as in `bigtrain/models`.

N tokens of the flat row, M labelled positions, W width, V vocabulary, padded. Shapes and what is kept are those of
`models/cost.py`, which prices the same operations in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bigtrain.config.model import ModelConfig
from bigtrain.models.cost import MicroBatch
from bigtrain.models.operations_cost import FLOAT, LONG, Numbers
from bigtrain.models.shape import NEXT_SENTENCE_CLASSES, SEGMENTS, reads_its_end
from bigtrain.planner.roofline import NOTHING, Roofline, Work

MODULE_CALLS = 0.7
"""Calls' worth of Python around each operation of a forward pass: modules, and autograd's notes."""

DROPOUT_CALLS = 2
"""Calls' worth of what torch's dropout on a CPU is made of, beyond the first."""

CHECKPOINT_CALLS, TAPE_CALLS = 80, 6
"""Calls' worth of Python to run a block again, and for each operation that runs under selective recomputation's tape.

Measured on a CPU as what policies add to a step of six blocks on 8 tokens: 2.3 to 2.9 ms a block for `full`, 4.4 to 6.7
for `selective` (benchmarks/recompute_cpu.json), where a call is 21e-6 s."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a block: `kept` says that selective recomputation keeps its output."""

    forward: Work
    backward: Work
    kept: bool = False


@dataclass(frozen=True, slots=True)
class BlockWork:
    """A block's passes, and what each recompute policy adds to them."""

    forward: Work
    backward: Work
    recompute: dict[str, Work]


@dataclass(frozen=True)
class ModelWork:
    """A model of a shape on a device, at one choice of numbers; `tensor_ranks` share each product of a block."""

    config: ModelConfig
    run: Roofline
    numbers: Numbers
    loss_chunk_tokens: int
    dropout: float = 0.0
    attention_dropout: float = 0.0
    tensor_ranks: int = 1

    def block(self, batch: MicroBatch) -> BlockWork:
        """Return one block's work."""
        operations, left, fused = list(self._block(batch)), self._unneeded(), self.run.fused
        forward, backward = _forward(operations), _total(o.backward for o in operations)
        between = _forward(o for o in operations if not o.kept)
        extra = NOTHING if fused else Work(0.0, CHECKPOINT_CALLS)
        tape = NOTHING if fused else Work(0.0, TAPE_CALLS * sum(o.forward.calls for o in operations))
        full, none = _forward(operations[: len(operations) - left]) + extra, self._made_again(batch.tokens)
        again = {"none": none, "selective": between + tape + extra, "full": full, "offload": full}
        return BlockWork(forward, backward, again)

    def _made_again(self, n: int) -> Work:
        """Return what is computed again without recomputation: activations, and what plain layers read of a norm."""
        norms = 0 if self.numbers.low or self.tensor_ranks > 1 else 1 if self.config.family == "bert" else 2
        made = self._activation(n).forward + self._norm(n).forward * norms
        return NOTHING if self.run.rates.kind == "cuda" else made

    def _unneeded(self) -> int:  # operations at a block's end that nothing in its backward pass needs
        return 0 if reads_its_end(self.config, self.dropout) else 2

    def _block(self, batch: MicroBatch) -> Iterator[Operation]:
        config, n = self.config, batch.tokens
        ranks, width, bias = self.tensor_ranks, config.hidden_size, config.family != "llama"
        inner = config.intermediate_size // ranks
        yield self._norm(n)
        yield self._linear(n, width, self._heads * config.head_dim, bias=bias)
        if config.family == "llama":
            yield self._rotate(n)
        yield self._attend(batch)
        yield self._linear(n, width // ranks, width, bias=bias)
        yield from self._residual(n)
        yield self._norm(n)
        yield self._linear(n, width, inner if bias else 2 * inner, bias=bias)
        yield self._activation(n)
        yield self._linear(n, inner, width, bias=bias)
        yield from self._residual(n)

    def _activation(self, n: int) -> Operation:
        activation = self._swiglu if self.config.family == "llama" else self._gelu
        return activation(n * self.config.intermediate_size // self.tensor_ranks)

    @property
    def _heads(self) -> int:
        """Return how many heads a rank has, of queries, keys and values."""
        return (self.config.num_attention_heads + 2 * self.config.num_key_value_heads) // self.tensor_ranks

    def _linear(self, n: int, i: int, o: int, *, bias: bool) -> Operation:
        """Multiply (N, i) by a weight (o, i); backward by its transpose, and transposed by the input."""
        forward, into, weight = self._product(n, i, o), self._product(n, o, i), self._weight_product(n, i, o)
        summed = self.run.pointwise(n * o, self.numbers.activation, 0) if bias else NOTHING
        return Operation(forward, into + weight + summed, kept=True)

    def _product(self, n: int, i: int, o: int) -> Work:
        """Multiply by a weight, rounded first where it is kept wider than products are."""
        numbers, run = self.numbers, self.run
        rounded = run.pointwise(i * o, numbers.weight, numbers.activation) if self._rounds else NOTHING
        if not numbers.widened:
            return rounded + run.product(n, i, o, operand_bytes=numbers.activation)
        wide = run.pointwise(n * i + i * o, numbers.activation, FLOAT)
        return rounded + wide + run.product(n, i, o) + run.pointwise(n * o, FLOAT, numbers.activation)

    def _weight_product(self, n: int, i: int, o: int) -> Work:
        numbers, run = self.numbers, self.run
        if not numbers.widened:
            return run.product(i, n, o, operand_bytes=numbers.activation, result_bytes=numbers.gradient)
        wide = run.pointwise(n * i + n * o, numbers.activation, FLOAT)
        narrowed = run.pointwise(i * o, FLOAT, numbers.gradient) if numbers.gradient < FLOAT else NOTHING
        return wide + run.product(i, n, o) + narrowed

    @property
    def _rounds(self) -> bool:
        return self.numbers.weight != self.numbers.activation

    def _attend(self, batch: MicroBatch) -> Operation:
        config, n = self.config, batch.tokens
        width = config.num_attention_heads * config.head_dim // self.tensor_ranks
        dense = self.attention_dropout > 0
        forward, backward = (
            self.run.attention(n, batch.longest, width, causal=config.causal, backward=back) for back in (False, True)
        )
        if self.run.rates.kind == "cpu":
            wide = FLOAT if self.numbers.widened else self.numbers.activation
            forward += self.run.pointwise(n * width, wide, self.numbers.activation)
            backward += self.run.pointwise(3 * n * width, wide, self.numbers.activation)
        if self.run.rates.kind == "cpu" and self.numbers.widened:
            forward += self.run.pointwise(3 * n * width, self.numbers.activation, FLOAT)
            backward += self.run.pointwise(5 * n * width, self.numbers.activation, FLOAT)
        if dense:
            forward, backward = forward + self._probabilities(batch, 1), backward + self._probabilities(batch, 2)
        return Operation(forward, backward, kept=True)

    def _probabilities(self, batch: MicroBatch, passes: int) -> Work:
        """Write all probabilities, normalize them and drop some of them, as attention with dropout does."""
        scores = batch.tokens * self.config.num_attention_heads * batch.longest
        softmax = self.run.pointwise(scores, FLOAT, FLOAT, "exp")
        return (softmax + self._drop(scores, FLOAT, backward=passes > 1)) * passes

    def _norm(self, n: int) -> Operation:
        return self._rms_norm(n) if self.config.family == "llama" else self._layer_norm(n, self.config.hidden_size)

    def _layer_norm(self, n: int, width: int) -> Operation:
        a = self.numbers.activation
        forward = self.run.pointwise(n * width, a, a, "layer norm")
        return Operation(forward, self.run.pointwise(n * width, 2 * a, a, "layer norm backward"))

    def _rms_norm(self, n: int) -> Operation:
        """Normalize: a kernel on CUDA, on the CPU our own operations in fp32."""
        elements, a = n * self.config.hidden_size, self.numbers.activation
        if self.run.rates.kind == "cpu":
            step = self.run.pointwise(elements, FLOAT, FLOAT)
            low = NOTHING if a == FLOAT else self.run.pointwise(elements, a, FLOAT)
            return Operation(step * 3 + low * 2, step * 7 + low * 3)
        return Operation(self.run.pointwise(elements, a, a), self.run.pointwise(elements, 2 * a, a))

    def _residual(self, n: int) -> Iterator[Operation]:
        """Drop, and add to the residual stream, whose gradient is what comes, or the sum of two that come."""
        elements, a = n * self.config.hidden_size, self.numbers.activation
        if self.dropout:
            forward, backward = self._drop(elements, a), self._drop(elements, a, backward=True)
            yield Operation(forward, backward)
        yield Operation(self.run.pointwise(elements, 2 * a, a), self.run.pointwise(elements, 2 * a, a))

    def _drop(self, elements: int, a: int, *, backward: bool = False) -> Work:
        """Drop: on the CPU the mask becomes a tensor of numbers, in the backward pass as well."""
        run = self.run
        if run.rates.kind != "cpu":
            return run.pointwise(elements, a + backward, a + (not backward))
        passes, kind = 3 if backward else 2, "dropout backward" if backward else "dropout"
        return run.pointwise(elements, passes * a, passes * a + (not backward), kind) + Work(0.0, DROPOUT_CALLS)

    def _gelu(self, elements: int) -> Operation:
        a, kind = self.numbers.activation, "gelu" if self.config.family == "bert" else "gelu tanh"
        forward = self.run.pointwise(elements, a, a, kind)
        return Operation(forward, self.run.pointwise(elements, 2 * a, a, f"{kind} backward"))

    def _swiglu(self, elements: int) -> Operation:
        """Gate: on the CPU the parts are operations of their own."""
        run, a = self.run, self.numbers.activation
        if run.rates.kind != "cpu":
            return Operation(run.pointwise(elements, 2 * a, a), run.pointwise(elements, 3 * a, 2 * a))
        forward = run.pointwise(elements, a, a, "silu") + run.pointwise(elements, 2 * a, a, in_place=True)
        return Operation(forward, forward * 2 + run.pointwise(elements, 2 * a, 2 * a))

    def _rotate(self, n: int) -> Operation:
        a, elements = self.numbers.activation, n * self._heads * self.config.head_dim
        moved = self.run.pointwise(elements, a, a)
        turned = self.run.pointwise(elements // 2, a + FLOAT, FLOAT) * 4
        return Operation(moved + turned, moved + turned)

    def ends(self, batch: MicroBatch) -> tuple[Work, Work]:
        """Return forward and backward of all that is not in a block: embeddings, last norm, head and loss."""
        pairs = self._next_sentence(batch) if batch.pairs else ()
        operations = [*self._embed(batch), *pairs, *self._finish(batch), self._loss(batch.labels)]
        return _forward(operations), _total(o.backward for o in operations)

    def _embed(self, batch: MicroBatch) -> Iterator[Operation]:
        config, a, w, n = self.config, self.numbers.activation, self.numbers.weight, batch.tokens
        width = config.hidden_size
        yield self._lookup(n, 0 if config.tie_word_embeddings else config.padded_vocab_size)
        if config.family != "llama":
            yield self._lookup(n, config.max_position_embeddings)
            yield Operation(self.run.pointwise(n * width, 2 * a, a), NOTHING)
        if config.family == "bert":
            if batch.pairs:
                yield self._lookup(n, SEGMENTS)
            segments = self.run.pointwise(n * width, a, 0) + self.run.pointwise(SEGMENTS * width, 0, w)
            yield Operation(self.run.pointwise(n * width, a, a), segments)
            yield self._layer_norm(n, width)
        if self.dropout:
            yield Operation(self._drop(n * width, a), self._drop(n * width, a, backward=True))

    def _lookup(self, n: int, rows: int) -> Operation:
        """Read rows of a table; its gradient is a new table of so many `rows`, to which those are added."""
        a, w, width = self.numbers.activation, self.numbers.weight, self.config.hidden_size
        table = self.run.pointwise(rows * width, 0, w) if rows else NOTHING
        added = self.run.pointwise(n * width, a + w, w, in_place=True)
        return Operation(self.run.pointwise(n * width, w, a), table + added)

    def _next_sentence(self, batch: MicroBatch) -> Iterator[Operation]:
        """Pool the first token of each pair, and compute its two logits; the loss of those is nothing beside it."""
        k, a, width = batch.pairs, self.numbers.activation, self.config.hidden_size
        scattered = self.run.pointwise(batch.tokens * width, 2 * a, 2 * a)
        yield Operation(self.run.pointwise(k * width, a, a), scattered)
        yield self._linear(k, width, width, bias=True)
        yield Operation(self.run.pointwise(k * width, a, a), self.run.pointwise(k * width, 2 * a, a))
        yield self._linear(k, width, NEXT_SENTENCE_CLASSES, bias=True)

    def _finish(self, batch: MicroBatch) -> Iterator[Operation]:
        config, a, width = self.config, self.numbers.activation, self.config.hidden_size
        if config.family != "bert":
            yield self._norm(batch.tokens)
        if batch.gathered:
            scattered = self.run.pointwise(batch.tokens * width, 0, a)
            yield Operation(self.run.pointwise(batch.labels * width, a, a), scattered)
        if config.family == "bert":
            yield self._linear(batch.labels, width, width, bias=True)
            yield self._gelu(batch.labels * width)
            yield self._layer_norm(batch.labels, width)

    def _loss(self, m: int) -> Operation:
        """Compute logits, loss and gradients chunk by chunk, in the forward pass; then scale what was left."""
        rows, width, numbers, run = self.config.padded_vocab_size, self.config.hidden_size, self.numbers, self.run
        chunks = -(-m // self.loss_chunk_tokens)
        work = run.pointwise(rows * width, 0, FLOAT)
        if self._rounds or numbers.widened:
            work += run.pointwise(rows * width, numbers.weight, FLOAT if numbers.widened else numbers.activation)
        work += Work(run.fresh(FLOAT * rows * -(-m // chunks)))
        work += self._chunk(-(-m // chunks)) * chunks
        scaled = run.pointwise(rows * width, FLOAT, FLOAT, in_place=True)
        narrowed = run.pointwise(rows * width, FLOAT, numbers.weight) if numbers.weight < FLOAT else NOTHING
        return Operation(work, scaled + narrowed + run.pointwise(m * width, FLOAT, FLOAT, in_place=True))

    def _chunk(self, c: int) -> Work:
        """Compute the logits of so many positions, their softmax in place, and three products."""
        rows, width, run = self.config.padded_vocab_size, self.config.hidden_size, self.run
        number = FLOAT if self.numbers.widened else self.numbers.activation
        logits = run.product(c, width, rows, operand_bytes=number, result_bytes=0)
        slopes = run.product(c, rows, width, operand_bytes=number)
        weight = run.product(rows, c, width, operand_bytes=number, result_bytes=0)
        added = run.pointwise(rows * width, 2 * FLOAT, FLOAT, in_place=True)
        read = run.pointwise(c * rows, FLOAT, 0)
        changed = run.pointwise(c * rows, FLOAT, FLOAT, in_place=True)
        exponential = run.pointwise(c * rows, FLOAT, FLOAT, "exp", in_place=True)
        bias = read + changed if self.config.family == "bert" else NOTHING
        rounded = run.pointwise(c * rows, FLOAT, number) + run.pointwise(c * rows, number, FLOAT) + added
        low = rounded if number < FLOAT else NOTHING
        return logits + slopes + weight + read * 2 + changed * 2 + exponential + bias + low

    def batch(self, batch: MicroBatch) -> Work:
        """Bring the micro-batch to the device."""
        segments = batch.tokens if batch.pairs else 0
        return self.run.pointwise(2 * batch.tokens + 2 * batch.labels + segments, LONG, LONG)


def _forward(operations: Iterable[Operation]) -> Work:
    return _total(operation.forward for operation in operations).called(1 + MODULE_CALLS)


def _total(works: Iterable[Work]) -> Work:
    return sum(works, NOTHING)
