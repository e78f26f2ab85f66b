"""The plan of a model that no recipe describes. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

from bigtrain.config.schema import (
    AmpSection,
    CheckpointSection,
    ClusterSection,
    DataSection,
    LoggingSection,
    MemorySection,
    OptimizerSection,
    Recipe,
    RecomputeSection,
    ShardingSection,
    TrainSection,
)
from bigtrain.errors import InputError
from bigtrain.memory.profiled import ChangeObject
from bigtrain.memory.record import Recording
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.plan import Plan


@dataclass(frozen=True)
class ModulePlan(Plan):
    """The plan of a model that no recipe describes: for `prepare` in this process, not for a file.

    `row_tokens` are the labels or ids of a row, 1 where it has none: a token is a row then. `recording` is the traced
    step; `changes` say what other policies would save.
    """

    row_tokens: int = 1
    recording: Recording | None = field(default=None, repr=False, compare=False)
    changes: tuple[ChangeObject, ...] = ()

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens of a step, all ranks."""
        return self.recipe.train.global_batch_size * self.row_tokens

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return nothing: warnings are of what recipes say."""
        return ()

    def to_yaml(self) -> str:
        """Raise InputError: there is nothing to read the model from."""
        raise InputError(f"the plan of a {self.recipe.name} is no recipe; give it to bigtrain.prepare in this process")


class Undescribed:
    """Stands where a plan has the shape of a recipe's model; asked for any of it, it raises InputError."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, key: str) -> NoReturn:
        if key.startswith("__"):  # what copying and printing look for
            raise AttributeError(key)
        raise InputError(f"the plan of a {self._name} has no {key}: no recipe describes the model")


def module_recipe(
    name: str,
    hardware: Hardware,
    *,
    global_batch_size: int,
    budget_bytes: int,
    precision: str,
    seed: int,
    causal: bool,
    optimizer: str,
    learning_rate: float,
) -> Recipe:
    """Return what an engine reads of a recipe, without a model section: nobody wrote one.

    `optimizer` and `learning_rate` are those of the factory's; the rate is constant.
    """
    objective = "clm" if causal else "mlm"
    rows = {"objective": objective, "global_batch_size": global_batch_size}
    return Recipe.model_construct(
        name=name,
        seed=seed,
        data=DataSection(),
        train=TrainSection.model_validate({**rows, "compile": False, "device": hardware.kind}),
        optimizer=OptimizerSection.model_construct(name=optimizer, learning_rate=learning_rate, schedule="constant"),
        amp=AmpSection.model_validate({"precision": precision}),
        recompute=RecomputeSection(),
        sharding=ShardingSection(engine="fsdp2"),
        memory=MemorySection.model_construct(budget=budget_bytes),
        checkpoint=CheckpointSection(),
        logging=LoggingSection(),
        cluster=ClusterSection(),
    )
