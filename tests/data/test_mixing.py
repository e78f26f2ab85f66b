from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtrain.config.schema import Recipe
from bigtrain.data.build import prepare
from bigtrain.data.corpus import SPLITS, Corpus, corpus_folder, is_prepared, open_corpus
from bigtrain.data.loader import Loader, evaluation_batches
from bigtrain.errors import DataError

MakeRecipe = Callable[..., Recipe]
Mix = Callable[..., Recipe]


@pytest.fixture(scope="module")
def mix(
    tmp_path_factory: pytest.TempPathFactory, make_recipe: MakeRecipe, story: Callable[..., list[str]], cache: Path
) -> Mix:
    """Recipes of a large source and one a third of its size, in other letters, with these weights."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "large.txt").write_text("\n\n".join(story(300, 1)))
    lines = (json.dumps({"body": text.upper()}) for text in story(100, 2))
    (folder / "small.jsonl").write_text("\n".join(lines))

    def made(*weights: float, cache: Path = cache, **keys: Any) -> Recipe:
        entries = [
            {"source": str(folder / "large.txt")},
            {"source": str(folder / "small.jsonl"), "text_column": "body"},
        ]
        mixture = [{**entry, "weight": weight} for entry, weight in zip(entries, weights, strict=True)]
        return make_recipe("gpt", source="embedded", mixture=mixture, cache=str(cache), **keys)

    return made


@pytest.fixture(scope="module")
def corpus(mix: Mix) -> Corpus:
    return prepare(mix(1, 3), show_progress=False)


def loader(corpus: Corpus, **keys: Any) -> Loader:
    return Loader(corpus, objective="clm", sequence_length=32, global_batch_size=16, seed=7, **keys)


def test_documents_are_those_of_the_sources(corpus: Corpus, mix: Mix) -> None:
    assert open_corpus(mix(1, 3)).folder == corpus.folder and corpus.folder.parent.name == "mixtures"
    first, second = (source.corpus for source in corpus.sources)
    for split in SPLITS:
        together = [ids.tolist() for ids in corpus.documents(split)]
        assert together == [ids.tolist() for part in (first, second) for ids in part.documents(split)]
        assert corpus.counts(split) == tuple(map(sum, zip(first.counts(split), second.counts(split), strict=True)))
    assert first.tokenizer_file.read_bytes() == second.tokenizer_file.read_bytes() == corpus.tokenizer_file.read_bytes()
    corpus.verify()
    assert not [name for name in corpus.manifest["files"] if name.endswith(".tokens")]


def test_token_frequencies_are_those_of_the_weights(corpus: Corpus) -> None:
    shares = [source.corpus.unigram_counts / source.corpus.unigram_counts.sum() for source in corpus.sources]
    expected = 0.25 * shares[0] + 0.75 * shares[1]
    assert abs(corpus.unigram_counts / corpus.unigram_counts.sum() - expected).max() < 1e-3


def test_rows_come_by_the_weights_on_any_number_of_ranks(corpus: Corpus) -> None:
    alone = loader(corpus)
    batches = [batch["input_ids"].numpy() for batch in islice(alone, 60)]
    alone.close()
    _, bound, end = alone._order.bounds
    assert alone.rows == end
    for number in range(60):
        rows, epochs = alone._order.rows_at(number * 16 + np.arange(16))
        assert 11 <= (rows >= bound).sum() <= 13
    assert epochs[rows >= bound].min() > epochs[rows < bound].max(), "the small source starts over"
    for rank in range(2):
        half = loader(corpus, rank=rank, world_size=2)
        half.seek(40)
        assert (next(iter(half))["input_ids"].numpy() == batches[40][8 * rank : 8 * rank + 8]).all()
        half.close()


def test_a_checkpoint_knows_its_mixture(corpus: Corpus, mix: Mix) -> None:
    other = prepare(mix(1, 2), show_progress=False)
    with pytest.raises(DataError, match="the data are not those that the checkpoint was reading"):
        loader(other).load_state_dict(loader(corpus).state_dict())


def test_evaluations_draw_by_the_weights_too(corpus: Corpus) -> None:
    batches = evaluation_batches(corpus, objective="clm", sequence_length=32, micro_batch_size=4, rows_limit=8)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4]


def test_with_one_tokenizer_sources_are_tokenized_once(mix: Mix, corpus: Corpus) -> None:
    tokenizer = str(corpus.tokenizer_file)
    other = prepare(mix(1, 0.5, tokenizer=tokenizer), False)
    assert other.folder != corpus.folder
    assert [source.corpus.folder for source in other.sources] == [source.corpus.folder for source in corpus.sources]
    only = prepare(mix(1, 0, tokenizer=tokenizer), False)
    assert [source.corpus.folder for source in only.sources] == [corpus.sources[0].corpus.folder]
    assert [ids.tolist() for ids in only.documents("train")] == [
        ids.tolist() for ids in corpus.sources[0].corpus.documents("train")
    ]


def test_a_source_that_is_gone_is_made_again(mix: Mix, tmp_path: Path) -> None:
    recipe = mix(1, 3, cache=tmp_path)
    first = prepare(recipe, show_progress=False)
    before = {path.name: path.read_bytes() for path in first.folder.iterdir() if path.is_file()}
    shutil.rmtree(first.sources[1].corpus.folder)
    assert not is_prepared(corpus_folder(recipe))
    again = prepare(recipe, show_progress=False)
    again.verify()
    assert {path.name: path.read_bytes() for path in again.folder.iterdir() if path.is_file()} == before


def test_faults_are_told_of_the_mixture(mix: Mix, tmp_path: Path) -> None:
    recipe = mix(1, 1, cache=tmp_path)
    assert recipe.data.mixture is not None
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"body": 3}\n')
    for name, text in (
        (str(tmp_path / "none.txt"), "data.mixture: no such file or folder"),
        (str(broken), "broken.jsonl:1: data.text_column: column 'body' holds a number, not text"),
    ):
        entries = [recipe.data.mixture[0], recipe.data.mixture[1].model_copy(update={"source": name})]
        wrong = recipe.model_copy(update={"data": recipe.data.model_copy(update={"mixture": entries})})
        with pytest.raises(DataError, match=text):
            prepare(wrong, show_progress=False)


@pytest.mark.parametrize(
    "change",
    [
        {"sources": [{"corpus": "../../x", "weight": 1.0}]},
        {"sources": [{"corpus": "abc", "weight": -1.0}]},
        {"sources": [{"corpus": "abc"}]},
        {"sources": [{"corpus": "abc", "weight": 1.0}]},
        {"sources": 3},
    ],
)
def test_damaged_manifests(mix: Mix, corpus: Corpus, tmp_path: Path, change: dict[str, Any]) -> None:
    recipe = mix(1, 3, cache=tmp_path)
    folder = corpus_folder(recipe)
    shutil.copytree(corpus.folder, folder)
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(DataError, match="damaged|not prepared"):
        open_corpus(recipe)


def test_bounds_of_a_source_that_is_not_there(corpus: Corpus) -> None:
    files = {"train-007-00000.offsets": corpus.manifest["files"]["train-000-00000.offsets"]}
    shutil.copy(corpus.folder / "train-000-00000.offsets", corpus.folder / "train-007-00000.offsets")
    with pytest.raises(DataError, match=r"train-007-00000.offsets: data.cache: this tokenized data is damaged"):
        Corpus(corpus.folder, {**corpus.manifest, "files": files}).shards("train")
