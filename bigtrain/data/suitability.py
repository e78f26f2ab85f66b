"""Whether a tokenizer suits a recipe, and how large it is before there is data."""

from __future__ import annotations

from bigtrain.config.schema import Recipe
from bigtrain.data.vocabulary import TRAIN, SpecialTokens, vocabulary_size
from bigtrain.errors import DataError, Fault


def check_tokenizer(recipe: Recipe, special: SpecialTokens, vocab_size: int) -> None:
    """Raise DataError where a recipe needs a special token that is not there, or a larger vocabulary."""
    where, faults = recipe.origin("data.tokenizer"), []
    wanted = {"mlm": [("mask", "[MASK]")], "clm": []}.get(recipe.train.objective, [("mask", "[MASK]")])
    framing = [("bos", "[CLS]"), ("eos", "[SEP]")] if recipe.model.family == "bert" else [("eos", "<|endoftext|>")]
    for kind, name in (*wanted, *framing):
        if getattr(special, kind) is None:
            need = f"{recipe.model.family} with train.objective {recipe.train.objective}"
            faults.append(Fault(where, "data.tokenizer", f"the tokenizer has no {name} token, which {need} needs"))
    limit = recipe.model.vocab_size
    if isinstance(limit, int) and vocab_size > limit:
        text = f"{limit} is smaller than the tokenizer, which has {vocab_size} tokens; use auto"
        faults.append(Fault(recipe.origin("model.vocab_size"), "model.vocab_size", text))
    if faults:
        raise DataError(*faults)


def expected_vocab_size(recipe: Recipe) -> int | None:
    """Return the tokenizer's size before there is data: known unless the tokenizer is a hub id that is not cached."""
    if recipe.data.tokenizer == TRAIN:
        return recipe.data.vocab_size
    return vocabulary_size(recipe.data.tokenizer, recipe.origin("data.tokenizer"))
