"""What a trained model says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import bigtrain
from bigtrain.config.model import ModelConfig
from bigtrain.errors import CheckpointError, DataError
from bigtrain.hugging_face.importing import import_folder
from bigtrain.models import build_model
from bigtrain.models.hf import to_hugging_face
from bigtrain.training import generate
from bigtrain.training.generate import TrainedModel, continue_text, fill_masks, load_trained


def trained(recipe: Path, folder: Path, *overrides: str) -> TrainedModel:
    bigtrain.train(bigtrain.plan(bigtrain.load_recipe(recipe, list(overrides))), folder)
    return load_trained(folder)


@pytest.fixture
def bert(tiny_recipes: dict[str, Path], tmp_path: Path) -> TrainedModel:
    return trained(tiny_recipes["bert"], tmp_path / "bert", "train.steps=60", "train.eval_every=null")


@pytest.fixture
def gpt(tiny_recipes: dict[str, Path], tmp_path: Path) -> TrainedModel:
    return trained(tiny_recipes["gpt"], tmp_path / "gpt", "train.steps=60", "train.eval_every=null")


def test_each_mask_gets_its_guesses(bert: TrainedModel) -> None:
    guesses = fill_masks(bert, "red [MASK] blue stone river [MASK]", choices=3)
    assert [len(mask) for mask in guesses] == [3, 3]
    for mask in guesses:
        probabilities = [probability for _, probability in mask]
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0 < sum(probabilities) <= 1 + 1e-6


def test_a_text_without_a_mask_is_refused(bert: TrainedModel) -> None:
    with pytest.raises(DataError, match=r"has no \[MASK\]"):
        fill_masks(bert, "red green")


def test_a_text_longer_than_the_model_reads_is_refused(bert: TrainedModel) -> None:
    with pytest.raises(DataError, match="give 1 to 32"):
        fill_masks(bert, "[MASK] " + "red " * 40)


def test_the_text_goes_on_and_is_the_same_for_a_seed(gpt: TrainedModel) -> None:
    one, again, other = (continue_text(gpt, "red green", tokens=12, seed=seed) for seed in (3, 3, 4))
    assert one.startswith("red green")
    assert len(one) > len("red green")
    assert one == again
    assert one != other


def test_temperature_zero_takes_the_likeliest(gpt: TrainedModel) -> None:
    assert continue_text(gpt, "red", tokens=8, temperature=0, seed=1) == continue_text(
        gpt, "red", tokens=8, temperature=0, seed=2
    )


def test_a_text_may_grow_beyond_what_the_model_reads_at_once(gpt: TrainedModel) -> None:
    assert len(continue_text(gpt, "red green blue", tokens=50, temperature=1.5, seed=1)) > 20


def test_an_empty_prompt_is_refused(gpt: TrainedModel) -> None:
    with pytest.raises(DataError, match="0 tokens"):
        continue_text(gpt, "")


def test_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_trained(tmp_path / "absent")


@pytest.mark.parametrize("family", ["bert", "gpt"])
def test_a_model_of_a_lean_run_says_something(tiny_recipes: dict[str, Path], tmp_path: Path, family: str) -> None:
    lean = (
        *("amp.precision=bf16", "amp.master_weights=split24", "optimizer.state=8bit"),
        *("optimizer.gradient_release=true", "train.max_grad_norm=null", "train.micro_batch_size=8"),
    )
    model = trained(tiny_recipes[family], tmp_path / "run", *lean, "train.steps=30", "train.eval_every=null")
    assert {p.dtype for p in model.model.parameters()} == {torch.float32}
    if family == "gpt":
        assert len(continue_text(model, "red green", tokens=12)) > len("red green")
    else:
        assert len(fill_masks(model, "red [MASK] blue", choices=2)[0]) == 2


def imported(folder: Path, family: Any, words: list[str], frame: str = "$A", **keys: Any) -> TrainedModel:
    """Return an imported model that knows these words, which its tokenizer puts into a frame.

    `keys` go into config.json, those of `generation` into generation_config.json.
    """
    generation = keys.pop("generation", {})
    config = ModelConfig(family, len(words), 32, 1, 2, 2, 64, 16)
    config_json, tensors = to_hugging_face(config, build_model(config).state_dict())
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = [(word, words.index(word)) for word in frame.split() if word != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=marks)
    (folder / "theirs").mkdir(parents=True)
    (folder / "theirs" / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "theirs" / "config.json").write_text(json.dumps({**config_json, **keys}))
    (folder / "theirs" / "generation_config.json").write_text(json.dumps(generation))
    save_file(tensors, folder / "theirs" / "model.safetensors")
    import_folder(folder / "theirs", folder / "in")
    return load_trained(folder / "in")


def test_an_imported_decoder_reads_and_ends_as_its_folder_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["<unk>", "begin", "</s>", "red", "green", "stop", "blue"]
    asked: list[tuple[list[list[int]], set[int]]] = []
    own = generate.continue_rows

    def noted(model: Any, rows: list[list[int]], **options: Any) -> Any:
        asked.append((rows, set(options["ends"])))
        return own(model, rows, **options)

    monkeypatch.setattr(generate, "continue_rows", noted)
    cases = (([5, 6], None, {5, 6}), (5, None, {5}), (None, None, {2}), (99, 99, {2}), (5, [2, 6], {2, 6}))
    for number, (eos, generation, ends) in enumerate(cases):
        keys = {"eos_token_id": eos, "generation": {"eos_token_id": generation}}
        model = imported(tmp_path / str(number), "llama", words, "begin $A </s>", **keys)
        continue_text(model, "red green", tokens=3)
        assert asked.pop() == ([[1, 3, 4]], ends)
    with pytest.raises(DataError, match="0 tokens"):
        continue_text(model, "", tokens=3)


def test_a_bert_without_a_mask_is_refused_and_a_small_one_has_fewer_guesses(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: has none of the masks \[MASK\], <mask>, <\|mask\|>; name"):
        fill_masks(imported(tmp_path / "none", "bert", ["<unk>", "red", "blue"]), "red")
    small = imported(tmp_path / "small", "bert", ["<unk>", "red", "<mask>"])
    assert [len(guesses) for guesses in fill_masks(small, "red <mask>")] == [3]
    with pytest.raises(DataError, match="has no <mask>; put one"):
        fill_masks(small, "red")
