"""DeepSpeed's configuration from a recipe, and contradictions that are told before anything starts."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.config.schema import Recipe
from bigtrain.errors import Fault
from bigtrain.sharding.deepspeed_config import (
    LARGEST_BUCKET,
    OFFLOADED,
    SUPPORTED,
    deepspeed_config,
    deepspeed_faults,
    narrowed,
)

BASE: dict[str, dict[str, Any]] = {
    "model": {"family": "gpt", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "train": {"objective": "clm", "steps": 10, "compile": False},
    "optimizer": {"learning_rate": 1e-3},
    "sharding": {"engine": "deepspeed", "zero_stage": 2, "replicate": 1, "offload": "none"},
}

CONTRADICTIONS: dict[str, list[object]] = {
    "sharding.zero_stage": [0],
    "sharding.replicate": [2, 8],
    "sharding.tensor_parallel": [2],
    "optimizer.name": ["lamb", "muon", "adafactor"],
    "optimizer.state": ["bf16", "8bit", "4bit"],
    "optimizer.gradient_release": [True],
    "amp.precision": ["fp8"],
    "amp.master_weights": ["split24", "none"],
    "recompute.policy": ["offload", ["none", "offload"]],
    "train.on_spike": ["skip"],
    "train.compile": [True],
}


def recipe_of(**keys: object) -> Recipe:
    """Return a recipe with some keys written otherwise: `sharding__zero_stage=3`."""
    sections = {name: dict(section) for name, section in BASE.items()}
    for key, value in keys.items():
        section, _, name = key.partition("__")
        sections.setdefault(section, {})[name] = value
    return Recipe.model_validate({"name": "x", **sections})


def faults(installed: bool = True, **keys: object) -> list[Fault]:
    return deepspeed_faults(recipe_of(**keys), installed=installed)


def config(*, parameters: int = 10**9, pinned: bool = True, **keys: object) -> dict[str, Any]:
    return deepspeed_config(
        recipe_of(**keys), micro_batch_size=4, accumulation_steps=8, parameters=parameters, pinned=pinned
    )


def test_a_recipe_that_fits_has_no_fault() -> None:
    assert not faults()


def test_auto_is_no_fault() -> None:
    open_keys = {key.replace(".", "__"): "auto" for key in SUPPORTED}
    closed = ("sharding__tensor_parallel", "optimizer__name", "amp__precision", "train__on_spike")
    assert not faults(sharding__offload="auto", **{key: v for key, v in open_keys.items() if key not in closed})


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in CONTRADICTIONS.items() for value in values])
def test_each_contradiction_is_one_fault(key: str, value: object) -> None:
    (found,) = faults(**{key.replace(".", "__"): value})
    assert found.key == key
    assert "does not go with sharding.engine=deepspeed" in found.text
    assert "; use " in found.text
    assert "\n" not in found.text


def test_every_supported_key_has_contradictions() -> None:
    assert set(CONTRADICTIONS) == set(SUPPORTED)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in CONTRADICTIONS.items() for value in values])
def test_other_engines_take_what_deepspeed_does_not(key: str, value: object) -> None:
    for engine in ("auto", "fsdp2"):
        assert not faults(sharding__engine=engine, **{key.replace(".", "__"): value})


def test_all_faults_are_told_at_once() -> None:
    found = faults(optimizer__name="lamb", optimizer__state="8bit", sharding__zero_stage=0, sharding__offload="all")
    assert [fault.key for fault in found] == ["sharding.zero_stage", "optimizer.name", "optimizer.state"]


def test_a_fault_says_value_reason_and_what_instead() -> None:
    (found,) = faults(optimizer__name="lamb")
    assert found.text == (
        "'lamb' does not go with sharding.engine=deepspeed: DeepSpeed cuts parameters anywhere, and others need rows "
        "or whole tensors; use 'adamw', or fsdp2"
    )


def test_auto_is_narrowed_to_the_one_value_there_is() -> None:
    open_recipe = recipe_of(
        sharding__replicate="auto",
        sharding__zero_stage="auto",
        optimizer__state="auto",
        optimizer__gradient_release="auto",
        amp__master_weights="auto",
        recompute__policy="auto",
        train__compile="auto",
    )
    found = narrowed(open_recipe)
    assert (found.sharding.replicate, found.sharding.zero_stage) == (1, "auto")
    assert (found.optimizer.state, found.optimizer.gradient_release) == ("fp32", False)
    assert (found.amp.master_weights, found.recompute.policy, found.train.compile) == ("fp32", "auto", False)
    assert narrowed(found) == found
    assert not deepspeed_faults(found, installed=True)


def test_what_is_written_is_not_narrowed() -> None:
    written = recipe_of(sharding__replicate=2, optimizer__state="8bit")
    assert narrowed(written) == written


def test_other_engines_keep_their_auto() -> None:
    open_recipe = recipe_of(sharding__engine="auto", sharding__replicate="auto")
    assert narrowed(open_recipe) is open_recipe


@pytest.mark.parametrize("engine", ["auto", "fsdp2"])
def test_nvme_needs_deepspeed(engine: str) -> None:
    (found,) = faults(sharding__engine=engine, sharding__offload="nvme")
    assert found.key == "sharding.offload"
    assert "use all, or sharding.engine=deepspeed" in found.text


@pytest.mark.parametrize("stage", OFFLOADED)
@pytest.mark.parametrize("offload", ["none", "optimizer", "all", "nvme"])
def test_what_can_be_offloaded_depends_on_the_stage(stage: int, offload: str) -> None:
    drive = {"sharding__nvme_path": "drive"} if offload == "nvme" else {}
    found = faults(sharding__zero_stage=stage, sharding__offload=offload, **drive)
    assert bool(found) == (offload not in OFFLOADED[stage])
    assert all(fault.key == "sharding.offload" and "zero_stage 3" in fault.text for fault in found)


def test_nvme_needs_a_folder() -> None:
    (found,) = faults(sharding__zero_stage=3, sharding__offload="nvme")
    assert found.key == "sharding.nvme_path"
    assert found.text.startswith("missing; name a folder")


def test_without_the_library_the_command_is_told_and_nothing_else() -> None:
    (found,) = faults(installed=False, optimizer__name="lamb")
    assert found.key == "sharding.engine"
    assert found.text == "'deepspeed' is not installed; install it (pip install bigtrain[deepspeed]) or use fsdp2"


def test_the_library_is_looked_for_without_importing_it() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from bigtrain.sharding.deepspeed_config import deepspeed_faults\n"
        "from bigtrain.config.schema import Recipe\n"
        f"deepspeed_faults(Recipe.model_validate({{'name': 'x', **{BASE!r}}}))\n"
        "assert 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_configuration_of_a_plain_recipe() -> None:
    found = config(amp__precision="bf16")
    assert found["train_micro_batch_size_per_gpu"] == 4
    assert found["gradient_accumulation_steps"] == 8
    assert found["gradient_clipping"] == 1.0
    assert found["communication_data_type"] == "fp32"
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}
    assert found["zero_optimization"] == {
        "stage": 2,
        "reduce_bucket_size": LARGEST_BUCKET,
        "allgather_bucket_size": LARGEST_BUCKET,
    }


def test_learning_rate_and_optimizer_stay_here() -> None:
    assert not {"optimizer", "scheduler"} & set(config())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision(precision: str) -> None:
    found = config(amp__precision=precision, amp__reduce="bf16")
    assert [name for name in ("bf16", "fp16") if found[name]["enabled"]] == [precision] * (precision != "fp32")
    assert found["bf16"]["check_grad_overflow"]
    assert found["communication_data_type"] == "bf16"


def test_no_clipping_is_zero() -> None:
    assert config(train__max_grad_norm=None)["gradient_clipping"] == 0.0


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("offload", ["none", "optimizer", "all", "nvme"])
def test_offload(stage: int, offload: str, pinned: bool) -> None:
    zero = config(
        sharding__zero_stage=stage, sharding__offload=offload, sharding__nvme_path="/drive/swap", pinned=pinned
    )["zero_optimization"]
    device = {"none": None, "nvme": "nvme"}.get(offload, "cpu")
    assert zero.get("offload_optimizer", {}).get("device") == device
    assert zero.get("offload_param", {}).get("device") == (None if offload == "optimizer" else device)
    for place in (zero[key] for key in ("offload_optimizer", "offload_param") if key in zero):
        assert place["pin_memory"] is pinned
        assert place.get("nvme_path") == ("/drive/swap" if offload == "nvme" else None)


def test_torchs_linear_function_stays_torchs() -> None:
    assert config(sharding__zero_stage=3)["zero_optimization"]["memory_efficient_linear"] is False


@given(st.integers(1, 10**12), st.sampled_from([1, 2, 3]))
def test_buckets_are_no_larger_than_the_model_nor_than_the_largest(parameters: int, stage: int) -> None:
    zero = config(parameters=parameters, sharding__zero_stage=stage)["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] <= min(LARGEST_BUCKET, parameters + 1)
    assert zero["allgather_bucket_size"] % 2 == 0  # DeepSpeed aligns to two numbers
