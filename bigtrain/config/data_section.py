"""The recipe's section `data`: what the model reads, and how it is cut into rows."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from bigtrain.config.mixture import Mixture
from bigtrain.config.section import Section
from bigtrain.config.types import Count, CountOrZero, Fraction, OpenFraction, Text


class DataSection(Section):
    """What the model reads, and how it is cut into rows."""

    source: Text | Annotated[list[Text], Field(min_length=1)] = "embedded"
    """`embedded` (the Python standard library's text), a `datasets` hub id, a folder, a file, or a list of files:
    .txt .jsonl .json .csv .parquet .arrow, each also with .gz or .zst."""
    subset: Text | None = None
    """The configuration of a hub data set, such as `20231101.en`."""
    split: Text = "train"
    """The split of a hub data set."""
    text_column: Text = "text"
    """The column that holds the text."""
    streaming: bool = False
    """Read a hub data set as a stream instead of downloading it first; `max_tokens` says where to stop."""
    mixture: Mixture | None = None
    """Several sources in place of `source`, each `{source: ..., weight: ...}` and where it differs `subset`, `split`,
    `text_column`, `streaming`; a weight is a share of the rows. A source that is read through starts over."""
    min_characters: CountOrZero = 0
    """Leave out documents of fewer characters."""
    max_characters: Count | None = None
    """Leave out documents of more characters; null: none. Documents over 1,048,576 are cut before."""
    min_letters: Fraction = 0.0
    """Leave out documents of which a smaller share of the characters other than white space are letters."""
    deduplicate: bool = False
    """Leave out documents whose whole text stood in the same source before; tokenizing then holds 16 bytes for each."""
    max_tokens: Count | None = None
    """Read no further than the document that makes it so many tokens, of each source; null: read all."""
    tokenizer: Text = "train"
    """`train` (on a bounded sample of the source), a tokenizer.json, a Hugging Face folder, or a hub id."""
    vocab_size: Count = 30522
    """Size of a tokenizer that is trained; unused tokens fill it up."""
    lowercase: bool = False
    """Whether a trained tokenizer folds case and strips accents (BERT's `uncased`)."""
    sequence_length: Count = 512
    """Tokens per row."""
    packing: bool = True
    """Put several documents into one row; attention never crosses from one to another. False: one per row, padded."""
    validation_fraction: OpenFraction = 0.005
    """Share of the documents that are kept for evaluation."""
    cache: Text | None = None
    """Folder of tokenized data; null is `BIGTRAIN_CACHE` or the user's cache folder."""
