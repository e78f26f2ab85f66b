"""Rows of tokens continued by a decoder, as far as is asked for or until their document ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from bigtrain.generation.choice import Choice, choose
from bigtrain.generation.reader import Reader
from bigtrain.models.language_model import LanguageModel


@dataclass(frozen=True)
class Continued:
    """Rows with what follows; `kept` is how many tokens of a full row were read anew, None where none became full."""

    rows: list[list[int]]
    kept: int | None


def continue_rows(
    model: LanguageModel, rows: Sequence[Sequence[int]], *, tokens: int, choice: Choice, ends: Collection[int] = ()
) -> Continued:
    """Continue each row by so many tokens, or up to one of `ends`, which is left out.

    Rows have one token or more, and no more than the model has positions for. A row that fills them all goes on from
    its later half, which is read anew: the model then sees between half of its positions and all of them.
    """
    longest = model.config.max_position_embeddings
    half = max(1, longest // 2)
    reader = Reader(model, len(rows), min(longest, max(map(len, rows)) + tokens))
    texts, starts, generator = [list(row) for row in rows], [0] * len(rows), choice.generator()
    lengths: list[int | None] = [None] * len(rows)
    logits_BV = reader.read(texts)
    for left in reversed(range(tokens)):
        chosen = choose(logits_BV, choice, generator)
        for number, token in enumerate(chosen):
            if token in ends and lengths[number] is None:
                lengths[number] = len(texts[number])
            texts[number].append(token)
        if not left or None not in lengths:
            break
        full = [len(text) - start > longest for text, start in zip(texts, starts, strict=True)]
        if any(full):
            starts = [
                len(text) - half if over else start for text, start, over in zip(texts, starts, full, strict=True)
            ]
            logits_BV = reader.read([text[start:] for text, start in zip(texts, starts, strict=True)])
        else:
            logits_BV = reader.add(chosen)
    ended = [text[:length] for text, length in zip(texts, lengths, strict=True)]
    return Continued(ended, half if any(starts) else None)
