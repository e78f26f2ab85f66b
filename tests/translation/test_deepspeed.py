"""DeepSpeed's configurations as people write them, each a recipe that loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bigtrain.config.load import load_recipe
from bigtrain.config.schema import Recipe
from bigtrain.errors import InputError
from bigtrain.translation.deepspeed import translate_deepspeed
from bigtrain.translation.draft import Draft

PRETRAINING = {
    "train_batch_size": 4096,
    "train_micro_batch_size_per_gpu": 32,
    "steps_per_print": 1000,
    "prescale_gradients": False,
    "optimizer": {
        "type": "Lamb",
        "params": {"lr": 11e-3, "weight_decay": 0.01, "bias_correction": False, "max_coeff": 0.3, "min_coeff": 0.01},
    },
    "gradient_clipping": 1.0,
    "wall_clock_breakdown": False,
    "fp16": {"enabled": True, "loss_scale": 0},
    "sparse_attention": {"mode": "fixed", "block": 16},
}
ZERO3 = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}
NVME = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/mnt/fast", "buffer_count": 4},
        "offload_param": {"device": "nvme", "nvme_path": "/mnt/fast"},
    },
    "aio": {"block_size": 262144},
    "bf16": {"enabled": True},
}
LEGACY = {
    "train_batch_size": 64,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 2, "cpu_offload": True},
    "zero_allow_untested_optimizer": True,
    "tensorboard": {"enabled": True, "output_path": "out"},
    "csv_monitor": {"enabled": True},
    "communication_data_type": "bf16",
    "activation_checkpointing": {"cpu_checkpointing": True, "number_checkpoints": 4},
}


def loaded(draft: Draft, folder: Path) -> Recipe:
    file = folder / "translated.yaml"
    file.write_text(draft.text())
    return load_recipe(file)


@pytest.mark.parametrize("values", [{}, PRETRAINING, ZERO3, NVME], ids=["empty", "bert", "auto", "nvme"])
@pytest.mark.parametrize("preset", [None, "bert-large", "llama-13b"])
def test_configurations_load_as_recipes(values: dict[str, Any], preset: str | None, tmp_path: Path) -> None:
    recipe = loaded(translate_deepspeed(values, "ds.json", preset=preset), tmp_path)
    assert recipe.model.preset == (preset or "gpt2-124m")


def test_a_pretraining_of_bert(tmp_path: Path) -> None:
    draft = translate_deepspeed(PRETRAINING, "ds.json", world_size=64, preset="bert-large")
    recipe = loaded(draft, tmp_path)
    assert (recipe.train.global_batch_size, recipe.train.micro_batch_size) == (4096, 32)
    assert (recipe.optimizer.name, recipe.optimizer.learning_rate, recipe.optimizer.eps) == ("lamb", 11e-3, 1e-8)
    assert recipe.optimizer.schedule == "constant" and recipe.optimizer.warmup_steps == 0
    assert recipe.amp.precision == "fp16" and recipe.sharding.zero_stage == 0 and recipe.sharding.offload == "none"
    assert recipe.logging.every_steps == 1000 and recipe.train.max_grad_norm == 1.0
    told = "\n".join(draft.missing)
    assert (
        "max_coeff" in told and "sparse_attention.mode" in told and "prescale" not in told and "loss_scale" not in told
    )
    assert "  global_batch_size: 4096  # train_batch_size\n" in draft.text()


def test_what_the_trainer_fills_in_is_told(tmp_path: Path) -> None:
    draft = translate_deepspeed(ZERO3, "ds.json")
    recipe = loaded(draft, tmp_path)
    assert (
        recipe.sharding.zero_stage == 3 and recipe.sharding.offload == "all" and recipe.train.micro_batch_size == "auto"
    )
    told = "\n".join(draft.changes)
    for key in ("train_batch_size", "optimizer.params.lr", "gradient_clipping", "bf16.enabled"):
        assert f"{key}: auto is what the Trainer's arguments say" in told
    assert draft.is_placeholder("optimizer.learning_rate")


def test_nvme_is_deepspeeds_own(tmp_path: Path) -> None:
    sharding = loaded(translate_deepspeed(NVME, "ds.json", world_size=8), tmp_path).sharding
    assert (sharding.engine, sharding.offload, sharding.nvme_path) == ("deepspeed", "nvme", "/mnt/fast")


def test_old_spellings_and_the_rest_of_the_sections(tmp_path: Path) -> None:
    recipe = loaded(translate_deepspeed(LEGACY, "ds.json", world_size=8), tmp_path)
    assert recipe.train.micro_batch_size == 4 and recipe.sharding.offload == "optimizer"
    assert recipe.logging.trackers == ["tensorboard"] and recipe.amp.reduce == "bf16"
    assert recipe.recompute.policy == "offload"


def test_ranks_that_share_products_read_the_same_rows(tmp_path: Path) -> None:
    values = {"train_micro_batch_size_per_gpu": 4, "tensor_parallel": {"autotp_size": 2}}
    recipe = loaded(translate_deepspeed(values, "ds.json", world_size=8), tmp_path)
    assert recipe.sharding.tensor_parallel == 2 and recipe.train.global_batch_size == 16
    offloaded = {"zero_optimization": {"stage": 2, "cpu_offload": True}}
    with pytest.raises(InputError, match="tensor_parallel.autotp_size: .* with sharding.offload=optimizer"):
        translate_deepspeed({**values, **offloaded}, "ds.json", world_size=8)


@pytest.mark.parametrize(
    ("values", "ranks", "batch"),
    [
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}, 8, 64),
        ({"train_micro_batch_size_per_gpu": 4}, None, 4),
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4}, 8, 32),
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}, None, 32),
        ({"gradient_accumulation_steps": 4}, 2, 8),
    ],
)
def test_the_global_batch(values: dict[str, Any], ranks: int | None, batch: int) -> None:
    assert translate_deepspeed(values, "f", world_size=ranks).lines["train.global_batch_size"][0] == batch


@pytest.mark.parametrize(
    ("values", "ranks", "told"),
    [
        (
            {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}, 8,
            "f: train_batch_size: 32 is not 4 x 2 x 8; with these it is 64; make them agree",
        ),
        ({"train_batch_size": 30, "train_micro_batch_size_per_gpu": 4}, None, "30 is not 4 x accumulation x ranks"),
        ({"train_micro_batch_size_per_gpu": 0}, None, "train_micro_batch_size_per_gpu: 0 is below 1"),
        ({"train_batch_size": "many"}, None, "train_batch_size: 'many' is not a number"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "fast"}}}, None, "optimizer.params.lr: 'fast' is not"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}}, None, "params.betas: optimizer.betas: "),
        ({"zero_optimization": {"stage": 4}}, None, "zero_optimization.stage: sharding.zero_stage: 4 "),
        ({"bf16": {"enabled": "yes"}}, None, "bf16.enabled: 'yes' is not true or false"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, None, "f: fp16.enabled: is true beside bf16.enabled"),
        ({"optimizer": {"type": 5}}, None, "f: optimizer.type: 5 is not a text; write a text"),
        ({"train_batch_size": 10**400}, None, "train_batch_size: 1000000000"),
    ],
)  # fmt: skip
def test_what_contradicts_or_is_wrong_is_told(values: dict[str, Any], ranks: int | None, told: str) -> None:
    with pytest.raises(InputError) as raised:
        translate_deepspeed(values, "f", world_size=ranks)
    assert told in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "name", "state", "lacks"),
    [
        ("Adam", "adamw", "fp32", False),
        ("Muon", "muon", "fp32", False),
        ("AdamW8bit", "adamw", "8bit", False),
        ("OneBitAdam", "adamw", "fp32", True),
        ("Lion", "adamw", "fp32", True),
    ],
)
def test_optimizers(kind: str, name: str, state: str, lacks: bool, tmp_path: Path) -> None:
    values = {"optimizer": {"type": kind, "params": {"lr": 1e-3, "adam_w_mode": False, "weight_decay": 0.1}}}
    draft = translate_deepspeed(values, "f")
    recipe = loaded(draft, tmp_path)
    assert (recipe.optimizer.name, recipe.optimizer.state) == (name, state)
    assert any(kind in note for note in draft.missing) is lacks
    assert any("adam_w_mode: false adds the decay" in note for note in draft.changes)


@pytest.mark.parametrize(
    ("kind", "params", "expected"),
    [
        ("WarmupLR", {"warmup_max_lr": 3e-4, "warmup_num_steps": 2000}, ("constant", 3e-4, 2000, 20000)),
        ("WarmupDecayLR", {"total_num_steps": 5000}, ("linear", 1e-3, 1000, 5000)),
        ("WarmupCosineLR", {"total_num_steps": 5000, "warmup_num_steps": 10}, ("cosine", 6e-4, 10, 5000)),
        ("OneCycle", {"cycle_max_lr": 1e-2}, ("constant", 6e-4, 0, 1000)),
    ],
)
def test_schedulers(kind: str, params: dict[str, Any], expected: tuple[Any, ...], tmp_path: Path) -> None:
    optimizer = {"type": "AdamW", "params": {"lr": 6e-4}}
    draft = translate_deepspeed({"optimizer": optimizer, "scheduler": {"type": kind, "params": params}}, "f")
    recipe = loaded(draft, tmp_path)
    section = recipe.optimizer
    assert (section.schedule, section.learning_rate, section.warmup_steps, recipe.train.steps) == expected
    assert any("OneCycle" in note for note in draft.missing) is (kind == "OneCycle")
    assert any("another peak" in note for note in draft.changes) is (expected[1] != 6e-4)


def test_the_details_that_differ(tmp_path: Path) -> None:
    values = {
        "torch_autocast": {"enabled": True, "dtype": "torch.float16"},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 2, "mics_shard_size": 4, "offload_param": {"device": "cpu"}},
        "data_types": {"grad_accum_dtype": "fp16"},
        "wandb": {"enabled": False},
        "zero_optimisation": {"stage": 1},
    }
    draft = translate_deepspeed(values, "f", world_size=8)
    recipe = loaded(draft, tmp_path)
    assert recipe.amp.precision == "fp16" and recipe.train.max_grad_norm is None
    assert recipe.sharding.replicate == 2 and recipe.sharding.offload == "all"
    assert "data_types.grad_accum_dtype: fp16; gradients are summed in fp32 or bf16 (amp.reduce)" in draft.missing
    assert any(note.startswith("zero_optimisation.stage: unknown") for note in draft.missing)
    assert any("takes the optimizer states to the host" in note for note in draft.changes)
    told = translate_deepspeed({"zero_optimization": {"stage": 2, "mics_shard_size": 4}}, "f").changes
    assert any("sharding.replicate is ranks / 4; say --world-size N" in note for note in told)
