"""Plans: nothing open, nothing changed unasked, planning one gives itself."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import bigtrain
from bigtrain.config.load import read_recipe
from bigtrain.config.schema import Recipe
from bigtrain.errors import DataError, DoesNotFit, RecipeError
from bigtrain.models import build_model
from bigtrain.planner import hardware
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.plan import Plan, plan, sweep
from bigtrain.planner.price import budget_bytes, memory_of
from bigtrain.planner.settle import labelled_fraction
from bigtrain.units import format_bytes

GPU = Hardware("cuda", "a GPU", 1, 80 * 2**30)


def recipe(**sections: dict[str, Any]) -> Recipe:
    base: dict[str, Any] = {
        "name": "tiny",
        "model": {"family": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "data": {"vocab_size": 90, "sequence_length": 16},
        "train": {"objective": "mlm", "steps": 10, "global_batch_size": 8},
        "optimizer": {"learning_rate": 1e-2},
        "amp": {},
        "memory": {},
    }
    return Recipe.model_validate(
        {k: {**v, **sections.get(k, {})} if isinstance(v, dict) else v for k, v in base.items()}
    )


def same(one: Plan, other: Plan) -> bool:
    """Tell whether two plans are the same, whatever was compared to find them."""
    return one == dataclasses.replace(other, rejected=one.rejected, searched=one.searched)


@pytest.mark.parametrize("name", ["bert_large", "gpt2_124m"])
def test_nothing_is_left_open(name: str) -> None:
    text = plan(bigtrain.load_recipe(name), GPU).to_yaml()
    assert "auto" not in text.replace("#", " # ").split()


def test_a_plan_file_is_a_recipe(tmp_path: Path) -> None:
    first = plan(recipe())
    (tmp_path / "plan.yaml").write_text(first.to_yaml())
    again = plan(bigtrain.load_recipe(tmp_path / "plan.yaml"))
    assert same(again, first) and again.recipe == first.recipe
    assert again.searched == 1 and first.searched > 1


@pytest.mark.parametrize(("global_batch", "length"), [(256, 512), (7, 512), (13, 1024), (4, 9000)])
def test_the_micro_batch_divides(global_batch: int, length: int) -> None:
    planned = plan(recipe(train={"global_batch_size": global_batch}, data={"sequence_length": length}), hardware.cpu())
    assert planned.micro_batch_size == planned.recipe.train.micro_batch_size == planned.choice.micro_batch_size
    assert planned.accumulation_steps * planned.micro_batch_size == global_batch


def test_the_memory_is_that_of_the_recipe_and_the_speed_that_of_the_step() -> None:
    planned = plan(recipe(), GPU)
    assert planned.memory == memory_of(planned.recipe, planned.model, GPU)
    assert planned.tokens_per_step == 8 * 16
    assert planned.tokens_per_second == pytest.approx(128 / planned.seconds.total)
    assert 0 < planned.mfu < 1
    assert planned.rates_source


def test_a_budget_bounds_what_is_chosen() -> None:
    large = bigtrain.load_recipe("bert_large")
    free = plan(large, GPU)
    tight = plan(bigtrain.load_recipe("bert_large", ["memory.budget=9GiB"]), GPU)
    assert tight.memory.device_bytes_peak is not None and tight.memory.device_bytes_peak <= 9 * 2**30
    assert free.memory.device_bytes_peak is not None and free.memory.device_bytes_peak > 9 * 2**30
    assert tight.seconds.total >= free.seconds.total
    with pytest.raises(DoesNotFit, match=r"bert_large.yaml|command line") as error:
        plan(bigtrain.load_recipe("bert_large", ["memory.budget=3GiB", "sharding.offload=none"]), GPU)
    assert error.value.over_bytes > 0 and "would fit" in str(error.value)


def test_without_bounds_anything_is_planned() -> None:
    tight = bigtrain.load_recipe("bert_large", ["memory.budget=1GiB"])
    assert plan(tight, GPU, bounded=False).parameters > 3e8


def test_a_world_size_makes_ranks() -> None:
    planned = plan(bigtrain.load_recipe("bert_large"), GPU, world_size=16)
    assert planned.world_size == 16
    assert (planned.recipe.cluster.nodes, planned.recipe.cluster.devices_per_node) == (2, 8)
    assert planned.accumulation_steps * planned.micro_batch_size * 16 == 256


def test_the_object_has_what_the_interface_names() -> None:
    shown = plan(recipe(), GPU).as_object()
    assert {"choice", "memory", "speed", "parameters", "flops_per_token", "rejected"} <= set(shown)
    memory, speed = shown["memory"], shown["speed"]
    assert isinstance(memory, dict) and isinstance(speed, dict)
    assert sum(memory["by_cause"].values()) == memory["allocated_bytes_peak"]
    assert {"seconds_per_step", "tokens_per_second", "mfu"} <= set(speed)
    assert json.loads(json.dumps(shown)) == shown


def test_a_sweep_goes_up_to_the_budget() -> None:
    points = sweep(bigtrain.load_recipe("bert_large", ["memory.budget=32GiB"]), GPU)
    budgets = [point.budget_bytes for point in points]
    assert budgets == sorted(budgets) and budgets[-1] == 32 * 2**30
    assert points[0].choice is None and points[-1].choice is not None
    rates = [point.tokens_per_second for point in points if point.tokens_per_second is not None]
    assert all(more >= less * 0.99 for less, more in pairwise(rates))


def test_memory_that_cannot_be_read_needs_a_budget() -> None:
    blind = Hardware("cuda", "a GPU", 1, 0)
    with pytest.raises(RecipeError, match=r"memory.budget: auto: the memory of a GPU cannot be read; write a size"):
        plan(recipe(), blind)
    assert plan(recipe(memory={"budget": "4GiB"}), blind).budget_bytes == 4 * 2**30


def test_a_micro_batch_that_is_given_stays() -> None:
    assert plan(recipe(train={"micro_batch_size": 2})).accumulation_steps == 4


@pytest.mark.parametrize("family", ["bert", "gpt", "llama"])
@pytest.mark.parametrize("vocab_size", [64, 90])
def test_parameters_and_bytes_are_those_of_the_built_model(family: str, vocab_size: int) -> None:
    objective = "mlm" if family == "bert" else "clm"
    planned = plan(recipe(model={"family": family}, train={"objective": objective}, data={"vocab_size": vocab_size}))
    with torch.device("meta"):
        model = build_model(planned.model)
    parameters = list(model.parameters())
    stored = sum(p.numel() for p in parameters)
    assert planned.state_bytes["weights"] == planned.state_bytes["gradients"] == 4 * stored
    assert planned.state_bytes["optimizer_state"] == 8 * stored + 4 * len(parameters)


@pytest.mark.parametrize("micro", [2, 8])
@pytest.mark.parametrize(
    ("kept", "weights", "master", "gradients"), [("fp32", 4, 0, 4), ("split24", 2, 1, 2), ("none", 2, 0, 2)]
)
def test_bytes_of_each_way_to_keep_weights(micro: int, kept: str, weights: int, master: int, gradients: int) -> None:
    planned = plan(recipe(amp={"precision": "bf16", "master_weights": kept}, train={"micro_batch_size": micro}))
    with torch.device("meta"):
        parameters = list(build_model(planned.model).parameters())
    stored = sum(p.numel() for p in parameters)
    assert planned.state_bytes == {
        "weights": weights * stored,
        "master_weights": master * stored,
        "gradients": (4 if micro < 8 else gradients) * stored,
        "optimizer_state": 8 * stored + 4 * len(parameters),
    }


def test_causes_that_hold_nothing_are_not_written_down() -> None:
    plain = plan(recipe(), hardware.cpu())
    assert plain.state_bytes["master_weights"] == 0
    assert "master_weights " not in plain.to_yaml()
    assert f"predicted: {format_bytes(plain.memory.device_bytes_peak or 0)} of the device" in plain.to_yaml()


def test_the_length_in_tokens_becomes_steps() -> None:
    assert plan(recipe(train={"steps": None, "tokens": 1000})).total_steps == 8  # 128 tokens a step
    assert plan(recipe()).total_steps == 10


def test_the_length_in_epochs_waits_for_the_data() -> None:
    planned = plan(recipe(train={"steps": None, "epochs": 1.5}))
    assert planned.total_steps is None
    assert planned.with_rows(80).total_steps == 15
    assert planned.with_rows(80).recipe.train.epochs is None
    assert planned.with_rows(1).total_steps == 1


def test_the_share_of_tokens_with_logits() -> None:
    assert labelled_fraction(recipe(train={"masking_probability": 0.3})) == 0.3
    assert labelled_fraction(recipe(model={"family": "gpt"}, train={"objective": "clm"})) == 1.0


def test_compile_and_device_follow_the_hardware() -> None:
    on_cpu, on_gpu = plan(recipe(), hardware.cpu()), plan(recipe(), GPU)
    assert (on_cpu.recipe.train.compile, on_cpu.recipe.train.device) == (False, "cpu")
    assert (on_gpu.recipe.train.compile, on_gpu.recipe.train.device) == (True, "cuda")
    assert on_gpu.recipe.memory.budget == on_gpu.budget_bytes == budget_bytes(GPU)


def test_cuda_asked_for_and_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cuda_devices", lambda: None)
    written = read_recipe(
        b"model: {family: bert, preset: bert-tiny}\ntrain: {objective: mlm, steps: 1, device: cuda}\n"
        b"optimizer: {learning_rate: 1}",
        "r.yaml",
    )
    with pytest.raises(
        RecipeError, match=r"^r.yaml:2: train.device: 'cuda': this machine has no CUDA device; use cpu or auto$"
    ):
        plan(written)


def test_a_tokenizer_that_is_not_here_leaves_the_vocabulary_open() -> None:
    with pytest.raises(RecipeError, match=r"data.tokenizer: someone/something is not on this machine yet"):
        plan(recipe(data={"tokenizer": "someone/something"}))
    assert plan(recipe(data={"tokenizer": "someone/something"}, model={"vocab_size": 77})).model.vocab_size == 77


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(
        '{"model": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"[UNK]": 0, "a": 1, "b": 2}}, '
        '"added_tokens": []}'
    )
    spec = {"tokenizer": str(tmp_path / "tokenizer.json")}
    assert plan(recipe(data=spec)).model.vocab_size == 3
    with pytest.raises(RecipeError, match="2 is less than the 3 tokens"):
        plan(recipe(data=spec, model={"vocab_size": 2}))


def test_a_plan_outlives_its_tokenizer_file(tmp_path: Path) -> None:
    gone = {"tokenizer": str(tmp_path / "gone" / "tokenizer.json")}
    assert plan(recipe(data=gone, model={"vocab_size": 77})).model.vocab_size == 77
    with pytest.raises(DataError, match=r"data.tokenizer"):
        plan(recipe(data=gone))


def test_a_warm_up_longer_than_the_epochs_is_refused_once_they_are_counted() -> None:
    planned = plan(recipe(train={"steps": None, "epochs": 1.0}, optimizer={"learning_rate": 1.0, "warmup_steps": 11}))
    assert planned.with_rows(88).total_steps == 11
    with pytest.raises(RecipeError, match=r"optimizer.warmup_steps: 11 steps of warm-up are longer than the run of 10"):
        planned.with_rows(80)


def test_a_mechanism_that_is_not_there_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"amp.precision: fp16 does not run on the CPU; it can fp32 and bf16$"):
        plan(recipe(amp={"precision": "fp16"}), hardware.cpu())
    assert plan(recipe(amp={"precision": "fp16"}), GPU).recipe.amp.precision == "fp16"


def test_bf16_where_it_is_slow_is_a_warning() -> None:
    slow = Hardware("cpu", "a processor", 1, 2**34, slow_bf16=True)
    assert "amp.precision=fp32" in plan(recipe(amp={"precision": "bf16"}), slow).warnings[0]
    assert plan(recipe(), slow).warnings == ()
    assert plan(recipe(amp={"precision": "bf16"}), GPU).warnings == ()


def test_what_ranks_send_is_an_object_of_its_own() -> None:
    shown = plan(recipe(), GPU, world_size=8).as_object()
    sent, speed = shown["communication"], shown["speed"]
    assert isinstance(sent, dict) and isinstance(speed, dict)
    assert sent["seconds"] == pytest.approx(sum(one["seconds"] for one in sent["collectives"]))
    assert 0 < sent["exposed_seconds"] <= sent["seconds"]
    assert speed["tokens_per_second_per_rank"] == speed["tokens_per_second"] / 8
    alone = plan(recipe(), GPU).as_object()["communication"]
    assert alone == {"seconds": 0, "exposed_seconds": 0.0, "collectives": []}
