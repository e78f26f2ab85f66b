"""The model of a run that starts from other weights: what comes with them, and what the recipe has a say in."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.config.load import load_recipe
from bigtrain.config.schema import Recipe
from bigtrain.errors import RecipeError

THERE = """
model: {family: llama, vocab_size: 1000, hidden_size: 64, num_hidden_layers: 3, num_attention_heads: 4,
        num_key_value_heads: 2, intermediate_size: 136, max_position_embeddings: 80, norm_eps: 1e-6, rope_theta: 500.0,
        initializer_range: 0.01, tie_word_embeddings: true}
train: {objective: clm, global_batch_size: 8, steps: 1}
optimizer: {learning_rate: 1e-4}
"""
REST = """
data: {vocab_size: 900, sequence_length: 64}
train: {objective: clm, global_batch_size: 8, steps: 1%s}
optimizer: {learning_rate: 1e-4}
"""
SHAPE = ("family", "hidden_size", "num_hidden_layers", "num_key_value_heads", "max_position_embeddings", "rope_theta")


@pytest.fixture
def there(tmp_path: Path) -> Path:
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "plan.yaml").write_text(THERE)
    return folder


def read(folder: Path, model: str, *overrides: str, inside: str = "") -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(f"model: {model}\n" + REST % (f", init_from: {inside}" if inside else ""))
    return load_recipe(path, list(overrides))


def test_typed_it_goes_over_the_whole_model_of_the_file(there: Path) -> None:
    wanted = load_recipe(there / "plan.yaml", ["data.vocab_size=900", "data.sequence_length=64"]).model
    own = "{family: gpt, preset: gpt2-124m, hidden_size: 1536, vocab_size: 8192, max_position_embeddings: 64}"
    recipe = read(there, own, f"train.init_from={there}")
    assert recipe.model == wanted
    assert recipe.origin("model.hidden_size") == str(there / "plan.yaml")
    assert recipe.origin("model") == str(there / "recipe.yaml:1")
    assert read(there, own, f"train.init_from={there}", "train.init_from=null").model.hidden_size == 1536


def test_what_is_typed_with_it_stays_for_the_launcher_to_judge(there: Path) -> None:
    recipe = read(there, "{family: llama}", f"train.init_from={there}", "model.hidden_size=32")
    assert (recipe.model.hidden_size, recipe.model.num_hidden_layers) == (32, 3)
    recipe = read(there, "{family: gpt, hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 1}",
                  f"train.init_from={there}", "model.family=gpt")  # fmt: skip
    assert (recipe.model.family, recipe.model.hidden_size) == ("gpt", 8)


def test_in_the_file_it_fills_what_the_file_leaves_open(there: Path) -> None:
    recipe = read(there, "{family: llama, hidden_size: 32, vocab_size: auto}", inside=str(there))
    assert [getattr(recipe.model, key) for key in SHAPE] == ["llama", 32, 3, 2, 80, 500.0]
    assert recipe.model.vocab_size == 1000
    recipe = read(there, "{family: llama, preset: llama-7b}", "data.sequence_length=64", inside=str(there))
    assert (recipe.model.preset, recipe.model.hidden_size, recipe.model.rope_theta) == ("llama-7b", None, 500.0)


def test_a_recipe_of_the_same_shape_stays_as_it_is(there: Path) -> None:
    edits = [f"train.init_from={there}", "data.vocab_size=900", "data.sequence_length=64"]
    recipe = load_recipe(there / "plan.yaml", edits)
    assert recipe.model == load_recipe(there / "plan.yaml", edits[1:]).model


def test_where_nothing_is_the_recipe_counts(tmp_path: Path) -> None:
    shape = "{family: llama, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2}"
    assert read(tmp_path, shape, f"train.init_from={tmp_path / 'absent'}").model.hidden_size == 32
    (tmp_path / "plan.yaml").write_text("model: {family: llamb}")
    assert read(tmp_path, shape, f"train.init_from={tmp_path}").model.hidden_size == 32
    with pytest.raises(RecipeError, match=r"hidden_size: missing, and .*absent has no plan.yaml to take it from; impo"):
        read(tmp_path, "{family: llama}", f"train.init_from={tmp_path / 'absent'}")


def test_faults_say_that_the_shape_came_with_the_weights(there: Path) -> None:
    typed = f"train.init_from={there}"
    with pytest.raises(RecipeError, match=r"1000 is smaller than .* 2000; name the tokenizer of .*there in data.tok"):
        read(there, "{family: llama}", typed, "data.vocab_size=2000")
    with pytest.raises(RecipeError, match=r"128 is longer than model.max_position_embeddings, 80; shorten the rows$"):
        read(there, "{family: llama}", typed, "data.sequence_length=128")
    with pytest.raises(RecipeError, match=r"'mlm' does not fit the family 'llama'"):
        read(there, "{family: bert}", typed, "train.objective=mlm")
