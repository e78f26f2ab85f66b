"""The tokenizer of a corpus, trained or loaded, and what is derived from it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from bigtrain.config.schema import Recipe
from bigtrain.data.cache import cache_folder, fingerprint, locked, written_aside
from bigtrain.data.corpus import FORMAT_VERSION, TOKENIZER, tokenizer_facts
from bigtrain.data.part import Frame, frame_of
from bigtrain.data.progress import Progress
from bigtrain.data.selection import filter_facts
from bigtrain.data.sources import identity, sample
from bigtrain.data.suitability import check_tokenizer
from bigtrain.data.tokenizer import (
    id_count,
    load_tokenizer,
    open_tokenizer,
    sample_characters,
    special_tokens,
    train_tokenizer,
)
from bigtrain.data.vocabulary import TRAIN, SpecialTokens


class Toolkit(NamedTuple):
    """A tokenizer and how its tokens are stored."""

    tokenizer: Tokenizer
    vocab_size: int
    special: SpecialTokens
    frame: Frame
    dtype: str


def toolkit(recipe: Recipe, kept: Path, progress: Progress) -> Toolkit:
    """Return a recipe's tokenizer, its file put at `kept` unless it is there already.

    Raises DataError for a tokenizer that does not suit the recipe.
    """
    if not kept.exists():
        if recipe.data.tokenizer == TRAIN:
            tokenizer = open_tokenizer(trained_tokenizer_file(recipe, progress))
        else:
            tokenizer = load_tokenizer(recipe.data.tokenizer, recipe.origin("data.tokenizer"))
        check_tokenizer(recipe, special_tokens(tokenizer), id_count(tokenizer))
        with written_aside(kept) as file:
            file.write(tokenizer.to_str(pretty=True).encode())
    tokenizer = open_tokenizer(kept)
    special, size = special_tokens(tokenizer), id_count(tokenizer)
    check_tokenizer(recipe, special, size)
    dtype = "uint16" if size <= 2**16 else "uint32"
    return Toolkit(tokenizer, size, special, frame_of(recipe.model.family, special), dtype)


def trained_tokenizer_file(recipe: Recipe, progress: Progress) -> Path:
    """Return the file of the tokenizer trained on a recipe's source, from the cache or made now."""
    data = recipe.data
    origin = recipe.origin("data.source")
    facts = {"source": identity(data, origin), "tokenizer": tokenizer_facts(recipe), "format": FORMAT_VERSION}
    facts |= {"filter": chosen} if (chosen := filter_facts(data)) else {}
    path = cache_folder(data) / "tokenizers" / fingerprint(facts) / TOKENIZER
    with locked(path.parent.with_suffix(".lock")):
        if not path.exists():
            progress.say(f"training a tokenizer of {data.vocab_size} tokens")
            texts = sample(data, origin, sample_characters(data.vocab_size))
            tokenizer = train_tokenizer(
                texts, recipe.model.family, data.vocab_size, data.lowercase, recipe.origin("data.vocab_size")
            )
            with written_aside(path) as file:
                file.write(tokenizer.to_str(pretty=True).encode())
    return path
