from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from bigtrain.config.schema import Recipe
from bigtrain.data.corpus import Corpus
from bigtrain.data.suitability import check_tokenizer, expected_vocab_size
from bigtrain.data.vocabulary import SpecialTokens
from bigtrain.errors import DataError

MakeRecipe = Callable[..., Recipe]
BERT = SpecialTokens(pad=0, unk=1, bos=2, eos=3, mask=4)


def test_size_of_a_loaded_tokenizer_does_not_depend_on_vocab_size(make_recipe: MakeRecipe, bert_corpus: Corpus) -> None:
    loaded = make_recipe("bert", tokenizer=str(bert_corpus.tokenizer_file))
    assert expected_vocab_size(loaded) == 400
    assert expected_vocab_size(make_recipe("bert")) == 400
    assert expected_vocab_size(make_recipe("bert", tokenizer="user/model")) is None


@pytest.mark.parametrize(
    ("family", "special", "faults"),
    [
        ("bert", BERT, []),
        ("gpt", SpecialTokens(eos=0), []),
        ("bert", replace(BERT, mask=None), ["no [MASK] token"]),
        ("bert", SpecialTokens(eos=0), ["no [MASK] token", "no [CLS] token"]),
        ("llama", SpecialTokens(), ["no <|endoftext|> token"]),
    ],
)
def test_tokenizer_must_have_what_the_task_needs(
    make_recipe: MakeRecipe, family: str, special: SpecialTokens, faults: list[str]
) -> None:
    if not faults:
        check_tokenizer(make_recipe(family), special, 400)
        return
    with pytest.raises(DataError) as raised:
        check_tokenizer(make_recipe(family), special, 400)
    assert len(raised.value.faults) == len(faults)
    for found, expected in zip(raised.value.faults, faults, strict=True):
        assert str(found).startswith("recipe.yaml:7: data.tokenizer: the tokenizer has " + expected)
