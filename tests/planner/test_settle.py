"""What a recipe leaves to the search, and what follows from the machine and its own keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.config.load import load_recipe
from bigtrain.errors import InputError, RecipeError
from bigtrain.planner import hardware
from bigtrain.planner.hardware import Hardware, of_name
from bigtrain.planner.price import budget_bytes
from bigtrain.planner.settle import chosen_hardware, labelled_fraction, named_hardware, settled

GPU = Hardware("cuda", "a GPU", 1, 80 * 2**30)
SEARCHED = (
    ("train", "micro_batch_size"),
    ("recompute", "policy"),
    ("sharding", "zero_stage"),
    ("sharding", "replicate"),
    ("sharding", "offload"),
)


def test_the_search_gets_what_is_its_own() -> None:
    recipe, _, device, ranks = settled(load_recipe("gpt2_124m"), GPU, None)
    assert device is GPU and ranks == 1
    assert all(getattr(getattr(recipe, section), key) == "auto" for section, key in SEARCHED)


def test_everything_else_is_a_value() -> None:
    recipe, model, _, _ = settled(load_recipe("gpt2_124m"), GPU, None)
    assert recipe.model.vocab_size == model.vocab_size
    assert (recipe.train.device, recipe.train.compile, recipe.sharding.engine) == ("cuda", True, "fsdp2")
    assert recipe.memory.budget == budget_bytes(GPU)
    assert recipe.cluster.devices_per_node == 1


def test_what_is_written_stays() -> None:
    keys = ["memory.budget=12GiB", "train.compile=false", "train.micro_batch_size=2"]
    recipe, _, _, _ = settled(load_recipe("gpt2_124m", keys), GPU, None)
    assert recipe.memory.budget == 12 * 2**30
    assert recipe.train.compile is False and recipe.train.micro_batch_size == 2


def test_a_device_that_is_named_goes_with_the_recipe() -> None:
    assert named_hardware(load_recipe("gpt2_124m"), "h100").name == "h100"
    assert named_hardware(load_recipe("gpt2_124m", ["train.device=cpu"]), "cpu-laptop").kind == "cpu"
    with pytest.raises(RecipeError, match=r"train.device: 'cpu', but --device h100 is cuda; use auto, or another"):
        named_hardware(load_recipe("gpt2_124m", ["train.device=cpu"]), "h100")
    with pytest.raises(InputError, match="did you mean"):
        named_hardware(load_recipe("gpt2_124m"), "h1000")


def test_no_budget_is_more_than_there_is() -> None:
    with pytest.raises(RecipeError, match=r"memory.budget: 81.00 GiB is more than the 80.00 GiB of a GPU; use auto"):
        settled(load_recipe("gpt2_124m", ["memory.budget=81GiB"]), GPU, None)
    assert settled(load_recipe("gpt2_124m", ["memory.budget=81GiB"]), GPU, None, bounded=False)[0].memory.budget > 2**50


def test_the_ranks_of_a_machine_share_a_cpu() -> None:
    laptop, four = of_name("cpu-laptop"), ["cluster.devices_per_node=4"]
    recipe, _, _, _ = settled(load_recipe("gpt2_124m", four), laptop, None)
    assert recipe.memory.budget == budget_bytes(laptop) // 4
    with pytest.raises(RecipeError, match=r"is more than the 4.00 GiB of cpu-laptop, which 4 ranks share"):
        settled(load_recipe("gpt2_124m", [*four, "memory.budget=5GiB"]), laptop, None)
    gpus, _, _, _ = settled(load_recipe("gpt2_124m", four), GPU, None)
    assert gpus.memory.budget == budget_bytes(GPU)


def test_settling_twice_changes_nothing() -> None:
    once, _, _, ranks = settled(load_recipe("gpt2_124m"), GPU, 8)
    again, _, _, same = settled(once, GPU, None)
    assert again == once and ranks == same == 8


def test_the_hardware_is_what_the_recipe_names_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cuda_devices", lambda: GPU)
    recipe = load_recipe("quickstart_bert")
    assert chosen_hardware(recipe) is GPU
    assert chosen_hardware(load_recipe("quickstart_bert", ["train.device=cpu"])).kind == "cpu"
    assert chosen_hardware(load_recipe("quickstart_bert", ["train.device=cuda"])) is GPU
    monkeypatch.setattr(hardware, "cuda_devices", lambda: None)
    assert chosen_hardware(recipe).kind == "cpu"
    with pytest.raises(RecipeError, match="this machine has no CUDA device; use cpu or auto"):
        chosen_hardware(load_recipe("quickstart_bert", ["train.device=cuda"]))


def test_a_budget_needs_memory_that_can_be_read() -> None:
    blind = Hardware("cpu", "a processor", 1, 0)
    with pytest.raises(RecipeError, match=r"memory.budget: auto: the memory of a processor cannot be read"):
        settled(load_recipe("quickstart_bert"), blind, None)


def test_heads_for_keys_and_values_are_written_for_llama_alone() -> None:
    bert, _, _, _ = settled(load_recipe("bert_base"), GPU, None)
    llama, model, _, _ = settled(load_recipe("gpt_7b"), GPU, None)
    assert bert.model.num_key_value_heads == load_recipe("bert_base").model.num_key_value_heads
    assert llama.model.num_key_value_heads == model.num_key_value_heads


def test_the_share_of_tokens_with_logits() -> None:
    assert labelled_fraction(load_recipe("bert_base", ["train.masking_probability=0.2"])) == 0.2
    assert labelled_fraction(load_recipe("gpt2_124m")) == 1.0


def test_an_open_vocabulary_needs_its_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data.tokenizer: someone/something is not on this machine yet"):
        settled(load_recipe("bert_base", ["data.tokenizer=someone/something"]), GPU, None)
    keys = ["data.tokenizer=someone/something", "model.vocab_size=4096"]
    assert settled(load_recipe("bert_base", keys), GPU, None)[1].vocab_size == 4096
