"""A training step's forward and loss on a ledger, operation by operation as in `bert.py`, `gpt.py`, `layers.py`.

Whoever calls an operation names what it hands over, and lets go of it afterwards: whether Python would hold an argument
until a call returns depends on its version and on who watches calls, such as `torch.compile`.

N tokens of the flat row, M labelled positions, W width, V vocabulary, padded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from bigtrain.config.model import ModelConfig
from bigtrain.ledger import Gradients, Ledger, Storage, Value
from bigtrain.models.activated_cost import linear_of_activation, linear_of_norm
from bigtrain.models.attention_cost import Attention
from bigtrain.models.operations_cost import FLOAT, LONG, Operations
from bigtrain.models.shape import NEXT_SENTENCE_CLASSES, SEGMENTS


@dataclass(frozen=True)
class MicroBatch:
    """What a forward pass gets: tokens of the flat row, labels, and the length of its longest document.

    `gathered` says that labels are given with their positions, as where less than half of the tokens have one; `pairs`
    is how many pairs of texts have a label, `documents` for how many documents the flat row has places.
    """

    tokens: int
    labels: int
    longest: int
    gathered: bool
    pairs: int = 0
    documents: int = 1


@dataclass(frozen=True)
class ModelCost:
    """A model of a shape on a ledger; `tensor_ranks` share each product of a block."""

    config: ModelConfig
    operations: Operations
    loss_chunk_tokens: int
    dropout: float = 0.0
    attention_dropout: float = 0.0
    tensor_ranks: int = 1

    @property
    def _ledger(self) -> Ledger:
        return self.operations.ledger

    def batch(self, batch: MicroBatch) -> list[Storage]:
        """Hold the flat batch: ids, positions, and labels with their positions; of pairs segments and labels too."""
        labels = [batch.labels * LONG] * (2 if batch.gathered else 1)
        if batch.pairs:
            labels += [batch.tokens * LONG, batch.pairs * LONG]
        return [self._ledger.hold(size) for size in (batch.tokens * LONG, batch.tokens * LONG, *labels)]

    def loss(
        self, batch: MicroBatch, run_block: Callable[[int, Callable[[Value], Value], Value], Value]
    ) -> tuple[Value, Storage]:
        """Run the forward and the loss; returns the loss and its gradient. `run_block` applies a recompute policy."""
        tables = self._rotary(batch.tokens)
        tied = Tied() if self.config.tie_word_embeddings else None
        x = self._embed(batch.tokens, tied, pairs=bool(batch.pairs))
        for index in range(self.config.num_hidden_layers):
            x = run_block(index, partial(self._block, index=index, batch=batch, tables=tables), x)
        hidden = x if self.config.family == "bert" else self._norm(x, "final_norm", batch.tokens)
        del x
        pairs_loss = self._next_sentence(hidden, batch.pairs) if batch.pairs else None
        labelled = self.operations.gather(hidden, batch.labels, self.config.hidden_size) if batch.gathered else hidden
        last = self._head(labelled, batch.labels)
        loss = self._linear_cross_entropy(last, batch.labels, tied)
        del last
        if pairs_loss is not None:
            loss = self.operations.add(pairs_loss, loss)
            del pairs_loss
        return loss, self._ledger.hold(FLOAT, "temporaries")

    def _rotary(self, n: int) -> list[Storage]:
        if self.config.family != "llama":
            return []
        half = n * self.config.head_dim // 2 * FLOAT
        angles = self._ledger.hold(half, "temporaries")
        tables = [self._ledger.hold(half), self._ledger.hold(half)]
        del angles
        return tables

    def _embed(self, n: int, tied: Tied | None, *, pairs: bool) -> Value:
        family, width = self.config.family, self.config.hidden_size
        x = self._rows(n, "tokens", self.config.padded_vocab_size, tied)
        if family in ("bert", "gpt"):
            positions = self._rows(n, "positions", self.config.max_position_embeddings, None)
            total = self.operations.add(x, positions)
            del positions
            x = total
            del total
        if family == "bert":
            total = self._add_segments(x, n) if pairs else self._add_segment(x)
            x = self.operations.layer_norm(total, "embedding_norm", n, width)
            del total
        return self.operations.dropout(x, self.dropout, n * width)

    def _rows(self, n: int, name: str, rows: int, tied: Tied | None) -> Value:
        """Look up n rows of a table; its gradient is a whole table, for a tied one the head's with rows added."""
        numbers, width, ledger = self.operations.numbers, self.config.hidden_size, self._ledger
        wide = ledger.hold(n * width * numbers.weight, "temporaries") if numbers.weight != numbers.activation else None
        out = ledger.hold(n * width * numbers.activation)
        del wide

        def backward(grad: Storage, kept: list[Storage]) -> Gradients:
            table = ledger.hold(rows * width * numbers.weight, "gradients") if tied is None else tied.take()
            if numbers.weight != numbers.activation:
                ledger.passing(n * width * numbers.weight)
            return Gradients([], [(f"{name}.weight", self._gradient(table))])

        return ledger.made(out, [], ledger.keep([]), backward)

    def _add_segment(self, x: Value) -> Value:
        """Add the first row of the segments' table, whose gradient is a sum over tokens and then a whole table."""
        size, gradient = x.size, self.operations.numbers.gradient
        width, hold = self.config.hidden_size, self._ledger.hold

        def backward(grad: Storage, kept: list[Storage]) -> Gradients:
            return Gradients([grad], [("segments.weight", hold(SEGMENTS * width * gradient, "gradients"))])

        return self._ledger.made(hold(size), [x], self._ledger.keep([]), backward)

    def _add_segments(self, x: Value, n: int) -> Value:
        """Add each token's row of the segments' table."""
        segments = self._rows(n, "segments", SEGMENTS, None)
        return self.operations.add(x, segments)

    def _block(self, x: Value, index: int, batch: MicroBatch, tables: list[Storage]) -> Value:
        name, n = f"blocks.{index}", batch.tokens
        if self.config.family == "bert":
            part = self._attention(x, name, batch, tables)
            total = self._sum(x, part, n)
            del part
            x, source = self._norm(total, f"{name}.attention_norm", n), total.storage
            del total
            part = self._mlp(x, name, n, source)
            del source
            total = self._sum(x, part, n)
            del part
            return self._norm(total, f"{name}.mlp_norm", n)
        normed = self._norm(x, f"{name}.attention_norm", n)
        part = self._attention(normed, name, batch, tables, x.storage)
        del normed
        total = self._sum(x, part, n)
        del part
        x = total
        del total
        normed = self._norm(x, f"{name}.mlp_norm", n)
        part = self._mlp(normed, name, n, x.storage)
        del normed
        return self._sum(x, part, n)

    def _sum(self, x: Value, part: Value, n: int) -> Value:
        dropped = self.operations.dropout(part, self.dropout, n * self.config.hidden_size)
        return self.operations.add(x, dropped)

    def _norm(self, x: Value, name: str, n: int) -> Value:
        norm = self.operations.rms_norm if self.config.family == "llama" else self.operations.layer_norm
        return norm(x, name, n, self.config.hidden_size)

    def _attention(
        self, x: Value, name: str, batch: MicroBatch, tables: list[Storage], source: Storage | None = None
    ) -> Value:
        config, run, n, ranks = self.config, self.operations, batch.tokens, self.tensor_ranks
        heads = config.num_attention_heads // ranks, config.num_key_value_heads // ranks
        (H, K), D, bias = heads, config.head_dim, bool(not tables)
        qkv = self._in(x, f"{name}.attention.qkv", n, (H + 2 * K) * D, bias=bias, source=source)
        if tables:
            qkv = run.rotate(qkv, tables, n, H + K, D)
        attention = Attention(run, (H, K), D, n, batch.longest, config.causal, self.attention_dropout, batch.documents)
        out = attention(qkv)
        del qkv
        width = config.hidden_size
        if ranks == 1:
            return run.linear(out, f"{name}.attention.out", n, width, width, bias=bias)
        part = run.linear(out, f"{name}.attention.out", n, width // ranks, width, bias=False)
        return run.sum_over_ranks(part, f"{name}.attention.out", width, bias=bias)

    def _mlp(self, x: Value, name: str, n: int, source: Storage | None) -> Value:
        run, width, inner = self.operations, self.config.hidden_size, self.config.intermediate_size // self.tensor_ranks
        gated, down = self.config.family == "llama", f"{name}.mlp.down"
        if gated:
            up = self._in(x, f"{name}.mlp.gate_up", n, 2 * inner, bias=False, source=source)
        else:
            up = self._in(x, f"{name}.mlp.up", n, inner, bias=True, source=source)
        if self.tensor_ranks == 1:
            return linear_of_activation(run, up, down, n, inner, width, gated=gated, bias=not gated)
        part = linear_of_activation(run, up, down, n, inner, width, gated=gated, bias=False, plain=False)
        return run.sum_over_ranks(part, down, width, bias=not gated)

    def _in(self, x: Value, name: str, n: int, o: int, *, bias: bool, source: Storage | None) -> Value:
        """Multiply (n, W) by a weight (o, W), of a norm's source where there is one; ranks share what it reads."""
        run, width = self.operations, self.config.hidden_size
        if self.tensor_ranks > 1:
            return run.linear(run.enter(x), name, n, width, o, bias=bias)
        if source is None:
            return run.linear(x, name, n, width, o, bias=bias)
        return linear_of_norm(run, x, source, name, n, width, o, bias=bias)

    def _head(self, x: Value, m: int) -> Value:
        if self.config.family != "bert":
            return x
        width = self.config.hidden_size
        product = self.operations.linear(x, "head_dense", m, width, width, bias=True)
        dense = self.operations.gelu(product)
        del product
        return self._norm(dense, "head_norm", m)

    def _next_sentence(self, hidden: Value, k: int) -> Value:
        """Pool the first token of each of k pairs, and compute two logits and their loss."""
        run, width, hold, keep = self.operations, self.config.hidden_size, self._ledger.hold, self._ledger.keep
        first = run.gather(hidden, k, width)
        dense = run.linear(first, "next_sentence.pooler", k, width, width, bias=True)
        del first
        pooled = run.tanh(dense)
        del dense
        logits = run.linear(pooled, "next_sentence.head", k, width, NEXT_SENTENCE_CLASSES, bias=True)
        del pooled
        size, kept = logits.size, [hold(k * NEXT_SENTENCE_CLASSES * FLOAT), hold(k * LONG)]
        return self._ledger.made(
            hold(FLOAT), [logits], keep(kept), lambda grad, kept: Gradients([hold(size, "temporaries")], [])
        )

    def _linear_cross_entropy(self, x: Value, m: int, tied: Tied | None) -> Value:
        """Hold what the chunked loss does, and afterwards the gradients that it leaves for the backward pass."""
        hold, config = self._ledger.hold, self.config
        rows, width = config.padded_vocab_size, config.hidden_size
        kept = [hold(x.size, "activations"), hold(rows * width * FLOAT, "gradients")]
        if config.family == "bert":
            kept.append(hold(rows * FLOAT, "gradients"))
        self._chunks(m, rows, width)

        def backward(grad: Storage, kept: list[Storage]) -> Gradients:
            made = [self._in_bytes(kept.pop(1), self.operations.numbers.weight) for _ in range(len(kept) - 1)]
            parameters = []
            if tied is None:
                parameters.append(("decoder.weight", self._gradient(made[0])))
            else:
                tied.gradient = made[0]
            return Gradients([kept.pop()], parameters + [("decoder_bias", self._gradient(bias)) for bias in made[1:]])

        return self._ledger.made(hold(FLOAT), [x], self._ledger.keep(kept), backward)

    def _gradient(self, storage: Storage) -> Storage:
        """Convert a gradient from the weights' dtype to that in which gradients are kept."""
        numbers = self.operations.numbers
        size = storage.size // numbers.weight * numbers.gradient
        return storage if size == storage.size else self._ledger.hold(size, "gradients")

    def _in_bytes(self, storage: Storage, number: int) -> Storage:
        """Convert an fp32 gradient to numbers of so many bytes."""
        return storage if number == FLOAT else self._ledger.hold(storage.size // FLOAT * number, "gradients")

    def _chunks(self, m: int, rows: int, width: int) -> None:
        """Hold the room for a chunk's logits, a copy of the weight where products need one, and a chunk's products."""
        numbers, hold = self.operations.numbers, self._ledger.hold
        chunk = -(-m // -(-m // self.loss_chunk_tokens))
        rounding = numbers.weight > numbers.activation
        rounded = hold(rows * width * numbers.activation, "temporaries") if rounding else None
        copy = hold(rows * width * FLOAT, "temporaries") if numbers.widened else rounded
        del rounded
        product = FLOAT if numbers.widened else numbers.activation
        logits = hold(min(m, self.loss_chunk_tokens) * rows * FLOAT, "logits")
        held = [hold(chunk * width * product, "temporaries")] if product != numbers.activation else []
        if product != FLOAT:
            self._ledger.passing(chunk * rows * product, cause="logits")
            held.append(hold(chunk * rows * product, "logits"))
        self._ledger.passing(chunk * width * product)
        if product != FLOAT:
            widened = [rows * width * FLOAT] if self.operations.device == "cpu" else []
            self._ledger.passing(rows * width * product, *widened)
        del held, logits, copy


@dataclass
class Tied:
    """The head's gradient on its way to the lookup in the same matrix."""

    gradient: Storage | None = None

    def take(self) -> Storage:
        """Hand the gradient over."""
        gradient, self.gradient = self.gradient, None
        assert gradient is not None
        return gradient
