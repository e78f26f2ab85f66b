"""Plans: nothing open, nothing changed unasked, planning one gives itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bigtrain
from bigtrain.config.load import read_recipe
from bigtrain.config.schema import Recipe
from bigtrain.config.shipped import shipped_recipes
from bigtrain.errors import DataError, RecipeError
from bigtrain.models import build_model
from bigtrain.planner import hardware
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.plan import MICRO_BATCH_TOKENS, labelled_fraction, plan

GPU = Hardware("cuda", "a GPU", 1, 80 * 2**30)


def recipe(**sections: dict[str, Any]) -> Recipe:
    base: dict[str, Any] = {
        "name": "tiny",
        "model": {"family": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "data": {"vocab_size": 90, "sequence_length": 16},
        "train": {"objective": "mlm", "steps": 10, "global_batch_size": 8},
        "optimizer": {"learning_rate": 1e-2},
        "amp": {},
    }
    return Recipe.model_validate(
        {k: {**v, **sections.get(k, {})} if isinstance(v, dict) else v for k, v in base.items()}
    )


@pytest.mark.parametrize("name", shipped_recipes())
@pytest.mark.parametrize("device", [hardware.cpu(), GPU], ids=["cpu", "gpu"])
def test_planning_a_plan_returns_it(name: str, device: Hardware) -> None:
    first = plan(bigtrain.load_recipe(name), device)
    again = plan(read_recipe(first.to_yaml().encode(), "plan.yaml"), device)
    assert again.recipe == first.recipe
    assert again == first
    assert again.to_yaml() == first.to_yaml()


@pytest.mark.parametrize("name", shipped_recipes())
def test_nothing_is_left_open(name: str) -> None:
    text = plan(bigtrain.load_recipe(name), GPU).to_yaml()
    assert "auto" not in text.replace("#", " # ").split()


def test_a_plan_file_is_a_recipe(tmp_path: Path) -> None:
    first = plan(recipe())
    (tmp_path / "plan.yaml").write_text(first.to_yaml())
    assert plan(bigtrain.load_recipe(tmp_path / "plan.yaml")) == first


@pytest.mark.parametrize(
    ("global_batch", "length", "micro"), [(256, 512, 8), (7, 512, 7), (14, 512, 7), (13, 1024, 1), (4, 9000, 1)]
)
def test_the_micro_batch_divides_and_stays_within_its_tokens(global_batch: int, length: int, micro: int) -> None:
    planned = plan(recipe(train={"global_batch_size": global_batch}, data={"sequence_length": length}), hardware.cpu())
    assert planned.micro_batch_size == planned.recipe.train.micro_batch_size == micro
    assert planned.accumulation_steps * micro == global_batch
    assert micro == 1 or micro * length <= MICRO_BATCH_TOKENS["cpu"]


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


def test_causes_that_hold_nothing_are_not_shown() -> None:
    plain = plan(recipe(), hardware.cpu())
    assert plain.state_bytes["master_weights"] == 0
    assert list(plain.held_bytes) == ["weights", "gradients", "optimizer_state"]
    assert "master_weights " not in plain.to_yaml()
    released = plan(
        recipe(
            amp={"precision": "bf16", "master_weights": "split24"},
            optimizer={"gradient_release": True},
            train={"max_grad_norm": None},
        ),
        hardware.cpu(),
    )
    assert list(released.held_bytes) == ["weights", "master_weights", "optimizer_state"]
    comment = next(line for line in released.to_yaml().splitlines() if "optimizer_state" in line)
    assert "gradients" not in comment


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
    assert on_gpu.recipe.memory.budget == GPU.memory_bytes


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
