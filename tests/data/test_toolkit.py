from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bigtrain.config.schema import Recipe
from bigtrain.data import toolkit as module
from bigtrain.data.corpus import Corpus
from bigtrain.data.part import Frame
from bigtrain.data.progress import Progress
from bigtrain.data.toolkit import toolkit, trained_tokenizer_file
from bigtrain.errors import DataError

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def silent() -> Progress:
    return Progress("test", None, shown=False)


def test_trained(make_recipe: MakeRecipe, bert_corpus: Corpus, tmp_path: Path, silent: Progress) -> None:
    kit = toolkit(make_recipe("bert"), tmp_path / "tokenizer.json", silent)
    assert (kit.vocab_size, kit.frame, kit.dtype) == (400, Frame([2], [3]), "uint16")
    assert kit.special == bert_corpus.special_tokens
    assert (tmp_path / "tokenizer.json").read_bytes() == bert_corpus.tokenizer_file.read_bytes()


def test_trained_once(
    make_recipe: MakeRecipe, tmp_path: Path, silent: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("gpt", cache=str(tmp_path))
    first = trained_tokenizer_file(recipe, silent)
    monkeypatch.setattr(module, "train_tokenizer", lambda *_: pytest.fail("trained again"))
    assert trained_tokenizer_file(recipe, silent) == first
    # Documents set aside for evaluation do not change the tokenizer.
    assert trained_tokenizer_file(make_recipe("gpt", cache=str(tmp_path), validation_fraction=0.3), silent) == first


def test_kept_tokenizer_is_used_again(
    make_recipe: MakeRecipe, tmp_path: Path, silent: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "tokenizer.json"
    toolkit(make_recipe("gpt"), kept, silent)
    monkeypatch.setattr(module, "trained_tokenizer_file", lambda *_: pytest.fail("asked for again"))
    assert toolkit(make_recipe("gpt"), kept, silent).special.eos == 0


def test_loaded(make_recipe: MakeRecipe, bert_corpus: Corpus, tmp_path: Path, silent: Progress) -> None:
    recipe = make_recipe("bert", tokenizer=str(bert_corpus.folder))
    assert toolkit(recipe, tmp_path / "tokenizer.json", silent).vocab_size == 400
    gpt = make_recipe("gpt", tokenizer=str(bert_corpus.folder))
    assert toolkit(gpt, tmp_path / "other.json", silent).frame == Frame([], [3])


def test_large_vocabularies_need_wider_ids(make_recipe: MakeRecipe, tmp_path: Path, silent: Progress) -> None:
    for size, dtype in ((2**16, "uint16"), (2**16 + 1, "uint32")):
        recipe = make_recipe("gpt", vocab_size=size)
        data = recipe.data.model_copy(update={"vocab_size": size})
        kit = toolkit(recipe.model_copy(update={"data": data}), tmp_path / f"{size}.json", silent)
        assert (kit.vocab_size, kit.dtype) == (size, dtype)


def test_an_unsuitable_tokenizer_leaves_nothing(
    make_recipe: MakeRecipe, gpt_corpus: Corpus, tmp_path: Path, silent: Progress
) -> None:
    recipe = make_recipe("bert", tokenizer=str(gpt_corpus.folder))
    with pytest.raises(DataError) as raised:
        toolkit(recipe, tmp_path / "tokenizer.json", silent)
    assert "has no [MASK] token, which bert with train.objective mlm needs" in str(raised.value)
    assert not list(tmp_path.iterdir())
