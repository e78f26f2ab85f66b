"""Parameters and FLOPs of a model's shape, as plain integers; nothing here needs torch."""

from __future__ import annotations

from bigtrain.config.model import ModelConfig

SEGMENTS = 2
"""Rows of BERT's segment embedding, as published; single-segment text reads the first only."""

NEXT_SENTENCE_CLASSES = 2
"""Logits of the next-sentence head: the second text follows the first, or it does not."""

LOSS_CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 128 * 2**20}
"""Most bytes of one chunk of fp32 logits. A GPU needs the larger one: each chunk reads and writes the whole gradient
of the vocabulary's matrix, which takes longer than the products of a short chunk."""

LOSS_CHUNK_SHARE = 64
"""A chunk of logits takes at most one part in so many of the memory budget."""

LEAST_LOSS_CHUNK = 64
"""Fewest positions in a chunk of logits, however large the vocabulary."""


def parameters(config: ModelConfig) -> int:
    """Count the parameters, tied ones once and without the vocabulary's padding, as transformers counts them."""
    table = parameter_table(config)
    return sum(table.values()) + (config.num_hidden_layers - 1) * table["block"]


def stored_parameters(config: ModelConfig) -> int:
    """Count the parameters that the built model holds: as `parameters`, with the vocabulary padded."""
    rows = config.padded_vocab_size - config.vocab_size
    matrices = 1 if config.tie_word_embeddings else 2
    return parameters(config) + rows * (config.hidden_size * matrices + (config.family == "bert"))


def stored_tensors(config: ModelConfig) -> int:
    """Count the tensors that the built model's parameters are, tied ones once."""
    per_block = 6 if config.family == "llama" else 12
    embeddings_and_norms = {"bert": 5, "gpt": 4, "llama": 2}[config.family]
    head = (0 if config.tie_word_embeddings else 1) + (5 if config.family == "bert" else 0)
    head += 4 if config.next_sentence else 0
    return per_block * config.num_hidden_layers + embeddings_and_norms + head


def parameter_table(config: ModelConfig) -> dict[str, int]:
    """Count the parameters of each part: `embeddings`, `block` (one of them), `final_norm` and `head`, unpadded."""
    width = config.hidden_size
    vocabulary = config.vocab_size * width
    head = 0 if config.tie_word_embeddings else vocabulary
    if config.family == "bert":
        embeddings = vocabulary + (config.max_position_embeddings + SEGMENTS) * width + _norm(config)
        head += width * width + width + _norm(config) + config.vocab_size + _next_sentence(config)
        final_norm = 0
    else:
        positions = config.max_position_embeddings if config.family == "gpt" else 0
        embeddings = vocabulary + positions * width
        final_norm = _norm(config)
    return {"embeddings": embeddings, "block": _block(config), "final_norm": final_norm, "head": head}


def parameter_shapes(config: ModelConfig, tensor_ranks: int = 1) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter of the built model by name, in its order, tied ones once.

    Of a model whose products so many ranks share, it is that of what each of them has.
    """
    width, rows = config.hidden_size, config.padded_vocab_size
    shapes: dict[str, tuple[int, ...]] = {}
    if config.family == "bert":
        shapes["decoder_bias"] = (rows,)
    shapes["tokens.weight"] = (rows, width)
    if config.family != "llama":
        shapes["positions.weight"] = (config.max_position_embeddings, width)
    if config.family == "bert":
        shapes["segments.weight"] = (SEGMENTS, width)
        shapes |= _norm_shapes(config, "embedding_norm")
    for index in range(config.num_hidden_layers):
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in _block_shapes(config, tensor_ranks).items()}
    if config.family == "bert":
        shapes |= _linear_shapes("head_dense", width, width, bias=True) | _norm_shapes(config, "head_norm")
    else:
        shapes |= _norm_shapes(config, "final_norm")
    if not config.tie_word_embeddings:
        shapes["decoder.weight"] = (rows, width)
    if config.next_sentence:
        shapes |= _linear_shapes("next_sentence.pooler", width, width, bias=True)
        shapes |= _linear_shapes("next_sentence.head", width, NEXT_SENTENCE_CLASSES, bias=True)
    return shapes


def shared_products(config: ModelConfig) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return the linear layers of a block that ranks may share: the dim of the weight that is cut, and its sections.

    Each rank gets its part of each section: of queries, keys and values its heads, of gate and value its columns.
    """
    inner, head = config.intermediate_size, config.head_dim
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    up, wide = ("mlp.gate_up", (inner, inner)) if config.family == "llama" else ("mlp.up", (inner,))
    return {
        "attention.qkv": (0, tuple(count * head for count in heads)),
        "attention.out": (1, (config.hidden_size,)),
        up: (0, wide),
        "mlp.down": (1, (inner,)),
    }


def _block_shapes(config: ModelConfig, ranks: int) -> dict[str, tuple[int, ...]]:
    width, inner, bias = config.hidden_size, config.intermediate_size // ranks, config.family != "llama"
    up, wide = ("mlp.gate_up", 2 * inner) if config.family == "llama" else ("mlp.up", inner)
    return (
        _linear_shapes("attention.qkv", width, _qkv_rows(config) // ranks, bias=bias)
        | _linear_shapes("attention.out", width // ranks, width, bias=bias)
        | _norm_shapes(config, "attention_norm")
        | _linear_shapes(up, width, wide, bias=bias)
        | _linear_shapes("mlp.down", inner, width, bias=bias)
        | _norm_shapes(config, "mlp_norm")
    )


def _linear_shapes(name: str, inputs: int, outputs: int, *, bias: bool) -> dict[str, tuple[int, ...]]:
    weight: dict[str, tuple[int, ...]] = {f"{name}.weight": (outputs, inputs)}
    return weight | ({f"{name}.bias": (outputs,)} if bias else {})


def _norm_shapes(config: ModelConfig, name: str) -> dict[str, tuple[int, ...]]:
    weight: dict[str, tuple[int, ...]] = {f"{name}.weight": (config.hidden_size,)}
    return weight if config.family == "llama" else weight | {f"{name}.bias": (config.hidden_size,)}


def reads_its_end(config: ModelConfig, dropout: float) -> bool:
    """Tell whether a block's backward pass needs what its last product gave, so that recomputation goes that far.

    A norm after it keeps its input; dropout keeps its mask, which is drawn anew with the numbers that it drops.
    """
    return config.family == "bert" or dropout > 0


def flops_per_token(config: ModelConfig, sequence_length: int, labelled_fraction: float = 1.0) -> int:
    """Count a training step's model FLOPs for one token: forward, and a backward of twice that; no recompute.

    6 x (weights of the blocks' matrix products) + 12 x layers x sequence_length x width for attention, not halved when
    causal, + 6 x width x vocabulary for the head at the share of tokens that have a label, to which BERT's head adds
    6 x width^2, and the pooler and its head as much again for the first token of each row. The vocabulary counts
    unpadded; embeddings, norms and biases count nothing.
    Source: Chowdhery et al. 2022 (PaLM), arXiv 2204.02311, appendix B.
    """
    width = config.hidden_size
    blocks = 6 * config.num_hidden_layers * _block_matrices(config)
    attention = 12 * config.num_hidden_layers * sequence_length * width
    head = 6 * width * (config.vocab_size + (width if config.family == "bert" else 0))
    pair = 6 * width * (width + NEXT_SENTENCE_CLASSES) if config.next_sentence else 0
    return blocks + attention + round(head * labelled_fraction + pair / sequence_length)


def loss_chunk_tokens(padded_vocab_size: int, device: str = "cpu", budget_bytes: int | None = None) -> int:
    """Return how many positions' logits the loss holds at a time on a kind of device, within a memory budget."""
    limit = LOSS_CHUNK_BYTES.get(device, LOSS_CHUNK_BYTES["cuda"])
    if budget_bytes is not None:
        limit = min(limit, budget_bytes // LOSS_CHUNK_SHARE)
    return max(LEAST_LOSS_CHUNK, limit // (4 * padded_vocab_size))


def _next_sentence(config: ModelConfig) -> int:
    width = config.hidden_size
    return (width + 1) * (width + NEXT_SENTENCE_CLASSES) if config.next_sentence else 0


def _block(config: ModelConfig) -> int:
    return _block_matrices(config) + _block_biases(config) + 2 * _norm(config)


def _block_matrices(config: ModelConfig) -> int:
    width = config.hidden_size
    attention = width * _qkv_rows(config) + width * width
    return attention + (3 if config.family == "llama" else 2) * width * config.intermediate_size


def _block_biases(config: ModelConfig) -> int:
    if config.family == "llama":
        return 0
    return _qkv_rows(config) + config.intermediate_size + 2 * config.hidden_size


def _qkv_rows(config: ModelConfig) -> int:
    return (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim


def _norm(config: ModelConfig) -> int:
    return config.hidden_size if config.family == "llama" else 2 * config.hidden_size
