"""A small corpus that all tests of this folder share, and recipes that name other data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtrain.config.schema import DataSection, ModelSection, OptimizerSection, Recipe, TrainSection
from bigtrain.data.build import prepare
from bigtrain.data.corpus import Corpus

MakeRecipe = Callable[..., Recipe]
VOCABULARY = 400


def recipe(family: str = "bert", vocab_size: int | str = "auto", objective: str = "", **data: Any) -> Recipe:
    """A recipe whose other sections do not matter here."""
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    made = Recipe(
        name="test",
        model=ModelSection.model_validate({"family": family, "vocab_size": vocab_size, **shape}),
        data=DataSection.model_validate({"vocab_size": VOCABULARY, "sequence_length": 32, **data}),
        train=TrainSection.model_validate(
            {"objective": objective or ("mlm" if family == "bert" else "clm"), "steps": 1}
        ),
        optimizer=OptimizerSection(learning_rate=1e-3),
    )
    made._origins = {"data": "recipe.yaml:5", "data.source": "recipe.yaml:6", "data.tokenizer": "recipe.yaml:7"}
    return made


def story(count: int, seed: int = 0) -> list[str]:
    """Documents of a few lines, of very different lengths."""
    words = "the a small red old fox dog house river runs sees finds under over again never and then"
    generator = np.random.default_rng(seed)
    lengths = 1 + generator.geometric(0.04, count)
    return [
        f"{number}. " + " ".join(generator.choice(words.split(), length)) + "." for number, length in enumerate(lengths)
    ]


@pytest.fixture(scope="session", name="story")
def story_fixture() -> Callable[..., list[str]]:
    return story


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "story.txt"
    path.write_text("\n\n".join(story(600)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def make_recipe(text_file: Path, cache: Path) -> MakeRecipe:
    """Recipes on the shared text and cache, unless told otherwise."""

    def make(family: str = "bert", **keys: Any) -> Recipe:
        return recipe(family, **{"source": str(text_file), "cache": str(cache), "validation_fraction": 0.1, **keys})

    return make


@pytest.fixture(scope="session")
def bert_corpus(make_recipe: MakeRecipe) -> Corpus:
    return prepare(make_recipe("bert"), show_progress=False)


@pytest.fixture(scope="session")
def gpt_corpus(make_recipe: MakeRecipe) -> Corpus:
    return prepare(make_recipe("gpt"), show_progress=False)
