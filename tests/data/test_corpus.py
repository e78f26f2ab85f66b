from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from bigtrain.config.schema import Recipe
from bigtrain.data.corpus import (
    SPLITS,
    Corpus,
    corpus_facts,
    corpus_folder,
    is_prepared,
    open_corpus,
)
from bigtrain.data.vocabulary import SpecialTokens
from bigtrain.errors import DataError

MakeRecipe = Callable[..., Recipe]
BERT = SpecialTokens(pad=0, unk=1, bos=2, eos=3, mask=4)


@pytest.fixture
def copied(bert_corpus: Corpus, make_recipe: MakeRecipe, tmp_path: Path) -> tuple[Recipe, Corpus]:
    """A corpus that a test may damage, and its recipe."""
    recipe = make_recipe("bert", cache=str(tmp_path))
    folder = corpus_folder(recipe)
    shutil.copytree(bert_corpus.folder, folder)
    return recipe, replace(bert_corpus, folder=folder)


def test_bert_documents_are_framed(bert_corpus: Corpus) -> None:
    for split in SPLITS:
        documents = list(bert_corpus.documents(split))
        assert len(documents) == bert_corpus.counts(split).documents > 0
        assert all(ids[0] == 2 and ids[-1] == 3 and not {2, 3} & set(ids[1:-1].tolist()) for ids in documents)
        assert sum(map(len, documents)) == bert_corpus.counts(split).tokens


def test_gpt_documents_end(gpt_corpus: Corpus) -> None:
    documents = list(gpt_corpus.documents("train"))
    assert all(ids[-1] == 0 and 0 not in ids[:-1] for ids in documents)


def test_text_comes_back(gpt_corpus: Corpus, text_file: Path) -> None:
    tokenizer = Tokenizer.from_file(str(gpt_corpus.tokenizer_file))
    found = [tokenizer.decode(ids[:-1].tolist()) for split in SPLITS for ids in gpt_corpus.documents(split)]
    assert sorted(found) == sorted(text_file.read_text().split("\n\n"))
    assert sum(gpt_corpus.counts(split).text_bytes for split in SPLITS) == sum(map(len, found))


def test_manifest(bert_corpus: Corpus, make_recipe: MakeRecipe) -> None:
    assert bert_corpus.family == "bert"
    assert bert_corpus.vocab_size == 400
    assert bert_corpus.special_tokens == BERT
    assert bert_corpus.manifest["facts"] == corpus_facts(make_recipe("bert"))
    assert set(bert_corpus.manifest["files"]) == {
        file.name for file in bert_corpus.folder.iterdir() if file.name not in ("manifest.json", "rows")
    }
    bert_corpus.verify()


def test_unigram_counts_are_of_the_training_split(bert_corpus: Corpus) -> None:
    tokens = np.concatenate(list(bert_corpus.documents("train")))
    assert np.array_equal(bert_corpus.unigram_counts, np.bincount(tokens, minlength=400))


def test_absent(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("bert", cache=str(tmp_path))
    assert not is_prepared(corpus_folder(recipe))
    with pytest.raises(DataError, match=r"recipe.yaml:6: data.source: the data is not prepared; run: bigtrain prepare"):
        open_corpus(recipe)


@pytest.mark.parametrize(
    "name", ["train-00000.tokens", "validation-00000.offsets", "tokenizer.json", "unigram_counts.npy"]
)
@pytest.mark.parametrize("damage", ["shorter", "longer", "gone"])
def test_damaged_files_are_named(copied: tuple[Recipe, Corpus], name: str, damage: str) -> None:
    recipe, corpus = copied
    path = corpus.folder / name
    content = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(content[:-1] if damage == "shorter" else content + b"x")
    with pytest.raises(DataError) as raised:
        open_corpus(recipe)
    what = f"damaged, truncated or absent; delete the folder {corpus.folder} and run again"
    assert str(raised.value) == f"{path}: data.cache: this tokenized data is {what}"


def test_every_damaged_file_is_a_fault(copied: tuple[Recipe, Corpus]) -> None:
    recipe, corpus = copied
    for split in SPLITS:
        (corpus.folder / f"{split}-00000.tokens").write_bytes(b"")
    with pytest.raises(DataError) as raised:
        open_corpus(recipe)
    assert len(raised.value.faults) == 2


@pytest.mark.parametrize("content", ['{"files": ', "", "{}", "[]", "null", '{"files": {}}'])
def test_damaged_manifest(copied: tuple[Recipe, Corpus], content: str) -> None:
    recipe, corpus = copied
    (corpus.folder / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json: data\.cache: this tokenized data is damaged") as raised:
        open_corpus(recipe)
    assert f"delete the folder {corpus.folder} and run again" in str(raised.value)


def test_verify_sees_a_changed_byte(copied: tuple[Recipe, Corpus]) -> None:
    recipe, corpus = copied
    path = corpus.folder / "train-00000.tokens"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    open_corpus(recipe)  # sizes alone are looked at each time
    with pytest.raises(DataError, match=r"train-00000\.tokens"):
        corpus.verify()


@pytest.mark.parametrize(
    "keys",
    [
        {"vocab_size": 401, "family": "bert"},
        {"family": "gpt"},
        {"validation_fraction": 0.2},
        {"text_column": "body"},
        {"source": "embedded"},
        {"source": "user/set"},
    ],
)
def test_what_shapes_tokens_changes_the_folder(make_recipe: MakeRecipe, text_file: Path, keys: dict[str, Any]) -> None:
    data = {key: value for key, value in keys.items() if key not in ("family", "vocab_size")}
    changed = make_recipe(keys.get("family", "bert"), **data)
    if "vocab_size" in keys:
        changed = changed.model_copy(
            update={"data": changed.data.model_copy(update={"vocab_size": keys["vocab_size"]})}
        )
    assert corpus_folder(changed) != corpus_folder(make_recipe("bert"))


def test_what_shapes_rows_alone_does_not(make_recipe: MakeRecipe) -> None:
    base = make_recipe("bert")
    assert corpus_folder(make_recipe("bert", sequence_length=64, packing=False)) == corpus_folder(base)
    assert corpus_folder(base.model_copy(update={"seed": 99, "name": "other"})) == corpus_folder(base)


def test_tokenizer_must_not_exceed_the_model(make_recipe: MakeRecipe, bert_corpus: Corpus) -> None:
    recipe = make_recipe("bert")
    for size in (400, 512):
        fitting = recipe.model_copy(update={"model": recipe.model.model_copy(update={"vocab_size": size})})
        assert open_corpus(fitting).folder == bert_corpus.folder
    small = recipe.model_copy(update={"model": recipe.model.model_copy(update={"vocab_size": 399})})
    with pytest.raises(DataError, match=r"model.vocab_size: 399 is smaller than the tokenizer, which has 400 tokens"):
        open_corpus(small)


def test_opening_loads_nothing_heavy(bert_corpus: Corpus, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    import pickle

    (tmp_path / "recipe").write_bytes(pickle.dumps(make_recipe("bert")))
    code = (
        "import pickle, sys, pathlib; from bigtrain.data import open_corpus\n"
        "corpus = open_corpus(pickle.loads(pathlib.Path(sys.argv[1]).read_bytes()))\n"
        "print(corpus.counts('train').tokens, *{'torch', 'datasets', 'tokenizers', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "recipe")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(bert_corpus.counts("train").tokens)]
    assert json.loads((bert_corpus.folder / "manifest.json").read_text())["dtype"] == "uint16"


def test_public_names_are_found_where_they_live() -> None:
    import bigtrain.data

    assert bigtrain.data.Corpus is Corpus
    assert all(callable(getattr(bigtrain.data, name)) for name in bigtrain.data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bigtrain.data.nothing
