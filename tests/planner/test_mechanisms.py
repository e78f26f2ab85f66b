"""Memory mechanisms in a plan: what `auto` means, what cannot go together, what is allowed and not wanted."""

from __future__ import annotations

import itertools

import pytest

from bigtrain.config.load import load_recipe
from bigtrain.config.schema import Recipe
from bigtrain.errors import RecipeError
from bigtrain.planner import mechanisms
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.mechanisms import mechanism_faults, release_obstacles, without_mechanisms
from bigtrain.planner.plan import plan

CPU = Hardware("cpu", "a processor", 1, 2**36)
SLOW = Hardware("cpu", "a processor", 1, 2**36, slow_bf16=True)
OLD, NEW = (Hardware("cuda", "a GPU", 1, 2**36, capability=version) for version in ((7, 0), (9, 0)))
UNKNOWN = Hardware("cuda", "a GPU", 1, 2**36)


def recipe(*overrides: str) -> Recipe:
    """Return a recipe of one micro-batch a step that does not clip."""
    one = ("train.global_batch_size=8", "train.micro_batch_size=8", "train.max_grad_norm=null")
    return load_recipe("quickstart_bert", [*one, *overrides])


def faults(*overrides: str, on: Hardware = CPU, steps: int = 1) -> list[str]:
    return [str(fault) for fault in mechanism_faults(recipe(*overrides), on, steps)]


def test_plain_has_no_fault_and_no_warning() -> None:
    for hardware in (CPU, SLOW, OLD, NEW):
        assert faults(on=hardware) == []
        assert list(mechanisms.warnings(recipe(), hardware, 0.02)) == []


@pytest.mark.parametrize(
    ("overrides", "hardware", "line"),
    [
        (["amp.precision=fp16"], CPU, "amp.precision: fp16 does not run on the CPU; it can fp32 and bf16"),
        (["amp.precision=fp8"], CPU, "amp.precision: fp8 does not run on the CPU; it can fp32 and bf16"),
        (["amp.precision=bf16"], OLD, "amp.precision: bf16 does not run on a CUDA device of compute capability 7.0; "
                                      "it can fp32 and fp16"),
        (["amp.master_weights=split24"], CPU, "amp.master_weights: split24 keeps weights in bf16, and amp.precision is "
                                              "fp32; use fp32, or amp.precision=bf16"),
        (["amp.precision=fp16", "amp.master_weights=none"], NEW, "amp.master_weights: none keeps weights in bf16, and "
                                              "amp.precision is fp16; use fp32, or amp.precision=bf16"),
        (["optimizer.name=adafactor", "optimizer.state=8bit"], CPU, "optimizer.state: 8bit: adafactor keeps a row and "
                                              "a column for each matrix only; use fp32"),
        (["recompute.policy=offload"], CPU, "recompute.policy: offload on the CPU: the host memory is the device "
                                            "memory there; use full"),
        (["recompute.policy=selective", "train.compile=true"], CPU, "recompute.policy: selective with train.compile on "
            "the CPU: compiled code there does not show which products it holds; use full, or train.compile=false"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_one_line(overrides: list[str], hardware: Hardware, line: str) -> None:
    assert faults(*overrides, on=hardware) == [f"command line: {line}"]
    with pytest.raises(RecipeError) as caught:
        plan(recipe(*overrides), hardware)
    assert str(caught.value) == f"command line: {line}"


@pytest.mark.parametrize(
    ("overrides", "hardware"),
    [
        (["amp.precision=bf16"], CPU),
        (["amp.precision=bf16"], UNKNOWN),
        (["amp.precision=fp16"], OLD),
        (["amp.precision=bf16", "amp.master_weights=split24"], CPU),
        (["amp.precision=bf16", "amp.master_weights=none", "optimizer.state=4bit"], NEW),
        (["optimizer.name=muon", "optimizer.state=8bit"], CPU),
        (["optimizer.name=adafactor"], CPU),
        (["optimizer.name=adafactor", "optimizer.state=auto"], CPU),
        (["recompute.policy=offload"], NEW),
        (["recompute.policy=selective"], CPU),
        (["recompute.policy=selective", "train.compile=true"], NEW),
        (["recompute.policy=full", "train.compile=true"], CPU),
        (["optimizer.gradient_release=true"], CPU),
        (["amp.precision=bf16", "optimizer.gradient_release=true", "recompute.policy=full"], NEW),
    ],
)
def test_what_is_there_is_planned(overrides: list[str], hardware: Hardware) -> None:
    assert faults(*overrides, on=hardware) == []
    planned = plan(recipe(*overrides), hardware)
    again = plan(planned.recipe, hardware)
    assert (again.recipe, again.choice, again.memory) == (planned.recipe, planned.choice, planned.memory)


def test_offload_of_some_blocks_is_offload() -> None:
    layers = load_recipe("quickstart_bert").model.num_hidden_layers or 4
    listed = ", ".join(["full"] * (layers - 1) + ["offload"])
    (line,) = faults(f"recompute.policy=[{listed}]")
    assert "offload on the CPU" in line


OBSTACLES = {
    "train.max_grad_norm": ("train.max_grad_norm=1.0", "1 clips by the norm of all gradients"),
    "train.micro_batch_size": ("train.micro_batch_size=4", "2 micro-batches a step add their gradients"),
    "amp.precision": ("amp.precision=fp16", "fp16 finds an overflow only when the gradients are complete"),
}


@pytest.mark.parametrize("keys", [c for n in range(4) for c in itertools.combinations(OBSTACLES, n)], ids="+".join)
def test_release_is_what_auto_means_where_nothing_stands_against_it(keys: tuple[str, ...]) -> None:
    overrides = [OBSTACLES[key][0] for key in keys]
    steps = 2 if "train.micro_batch_size" in keys else 1
    planned = plan(recipe("optimizer.gradient_release=auto", *overrides), NEW)
    assert planned.recipe.optimizer.gradient_release is (not keys)
    assert (planned.state_bytes["gradients"] == 0) is (not keys)
    found = dict(release_obstacles(recipe(*overrides), steps))
    assert set(found) == set(keys)
    assert all(text.startswith(OBSTACLES[key][1]) for key, text in found.items())
    asked = faults("optimizer.gradient_release=true", *overrides, on=NEW, steps=steps)
    assert len(asked) == len(keys)
    for key, line in zip(keys, asked, strict=True):
        assert line.startswith(f"command line: optimizer.gradient_release: {key}: {OBSTACLES[key][1]}")
        assert line.endswith(", or optimizer.gradient_release=false")


def test_the_way_out_of_accumulation_names_a_size_that_works() -> None:
    over = ("optimizer.gradient_release=true", "train.micro_batch_size=2")
    (line,) = faults(*over, steps=4)
    assert "use train.micro_batch_size=8," in line
    assert plan(recipe(*over, "train.micro_batch_size=8"), CPU).recipe.optimizer.gradient_release is True


def test_auto_is_what_changes_no_number() -> None:
    autos = ("optimizer.state=auto", "amp.master_weights=auto", "recompute.policy=auto")
    resolved = plan(recipe(*autos, "optimizer.gradient_release=false"), CPU).recipe
    assert resolved.optimizer.state == "fp32"
    assert resolved.optimizer.gradient_release is False
    assert resolved.amp.master_weights == "fp32"
    assert resolved.recompute.policy == "none"


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon", "adafactor"])
def test_no_auto_is_left(name: str) -> None:
    autos = ("optimizer.state=auto", "optimizer.gradient_release=auto", "amp.master_weights=auto")
    for hardware, precision in itertools.product((CPU, NEW), ("fp32", "bf16")):
        chosen = plan(recipe(*autos, f"optimizer.name={name}", f"amp.precision={precision}"), hardware).recipe
        left = (chosen.optimizer.state, chosen.optimizer.gradient_release, chosen.amp.master_weights)
        assert "auto" not in (*left, chosen.recompute.policy)


def test_groups_must_divide_the_ranks() -> None:
    three = recipe("sharding.replicate=3")
    (line,) = map(str, mechanism_faults(three, NEW, 1, 8))
    assert line == "command line: sharding.replicate: 3 does not divide 8 ranks; nearest that do: 2, 4"
    assert mechanism_faults(recipe("sharding.replicate=4", "sharding.zero_stage=3"), NEW, 1, 8) == []
    assert mechanism_faults(recipe("sharding.replicate=auto"), NEW, 1, 8) == []


def test_without_sharding_each_rank_is_a_group() -> None:
    two = recipe("sharding.zero_stage=0", "sharding.replicate=2")
    (line,) = map(str, mechanism_faults(two, NEW, 1, 8))
    assert "sharding.replicate: 2: at zero_stage 0 each of 8 ranks holds the whole model; use 8, or auto" in line
    assert mechanism_faults(two, NEW, 1, 2) == []


@pytest.mark.parametrize("place", ["optimizer", "all"])
def test_on_a_cpu_offload_runs_and_is_of_no_use(place: str) -> None:
    asked = recipe(f"sharding.offload={place}")
    assert faults(f"sharding.offload={place}") == []
    (warning,) = mechanisms.warnings(asked, CPU, 0.02)
    assert warning == (
        f"sharding.offload={place} on the CPU: the host memory is the device memory there, so it only costs; use none"
    )
    assert not list(mechanisms.warnings(asked, NEW, 0.02))


def test_all_faults_are_found_at_once() -> None:
    wrong = recipe("sharding.offload=all", "recompute.policy=offload", "sharding.replicate=3", "amp.precision=fp16")
    assert len(mechanism_faults(wrong, CPU, 1, 8)) == 3


def test_sharding_that_does_nothing_is_a_warning() -> None:
    staged = recipe("sharding.zero_stage=3")
    (warning,) = mechanisms.warnings(staged, NEW, 0.02, 1)
    assert warning.startswith("sharding.zero_stage=3 does nothing on one process; use 0")
    assert not list(mechanisms.warnings(staged, NEW, 0.02, 8))
    (warning,) = mechanisms.warnings(recipe("sharding.zero_stage=1", "sharding.replicate=8"), NEW, 0.02, 8)
    assert "does nothing on 8 groups of one process" in warning
    assert not list(mechanisms.warnings(recipe("sharding.zero_stage=1", "sharding.replicate=2"), NEW, 0.02, 8))
    assert not list(mechanisms.warnings(recipe("sharding.zero_stage=0", "sharding.replicate=1"), NEW, 0.02, 1))


def test_a_learning_rate_too_small_to_move_a_weight_is_a_warning_with_the_number() -> None:
    coarse = ("amp.precision=bf16", "amp.master_weights=none")
    (warning,) = mechanisms.warnings(recipe(*coarse, "optimizer.learning_rate=1e-5"), CPU, 0.02)
    assert warning.startswith("a learning rate of 1e-05 is too small for bf16 weights without master weights")
    assert "it takes at least 6.1e-05" in warning
    assert not list(mechanisms.warnings(recipe(*coarse, "optimizer.learning_rate=1e-3"), CPU, 0.02))
    kept = ("amp.precision=bf16", "amp.master_weights=split24", "optimizer.learning_rate=1e-5")
    assert not list(mechanisms.warnings(recipe(*kept), CPU, 0.02))


def test_bf16_where_it_is_slow_is_a_warning() -> None:
    (warning,) = mechanisms.warnings(recipe("amp.precision=bf16"), SLOW, 0.02)
    assert "has no bf16 instructions" in warning
    assert not list(mechanisms.warnings(recipe("amp.precision=bf16"), NEW, 0.02))


def test_a_recipe_without_its_mechanisms() -> None:
    lean = recipe(
        "amp.precision=bf16", "amp.master_weights=split24", "recompute.policy=full", "optimizer.gradient_release=true",
        "train.micro_batch_size=4", "train.max_grad_norm=1",
    )  # fmt: skip
    assert mechanism_faults(lean, CPU, 2)
    plain = without_mechanisms(lean)
    assert mechanism_faults(plain, CPU, 2) == []
    assert plain.amp.precision == "fp32"
    assert plain.model == lean.model
    assert lean.optimizer.gradient_release is True
