"""One thing to measure: an arm, a recipe, the rows that it gets, how many steps."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

WARM_UP_STEPS = 3
"""Steps of each process that are not timed: compilation, first memory, caches."""

MODES = ("full", "documents", "loader")

HELD_EQUAL = [
    "optimizer.schedule=constant", "optimizer.warmup_steps=0", "optimizer.name=adamw", "train.steps=1000000",
    "train.tokens=null", "train.epochs=null", "train.eval_every=null", "checkpoint.every_steps=null",
    "checkpoint.every_minutes=null", "logging.trackers=[]", "logging.sample_every=null",
]  # fmt: skip
"""What every arm can do: one learning rate and AdamW. No evaluation and no checkpoint falls into the timed steps."""


@dataclass(frozen=True)
class Job:
    """What a child process is told. `rows` are those of a micro-batch, `accumulation` the micro-batches of a step."""

    arm: str
    recipe: str
    overrides: tuple[str, ...]
    mode: str = "full"
    mean_length: int = 100
    rows: int = 8
    accumulation: int = 1
    steps: int = 15
    checkpointing: bool = False
    zero_stage: int = 2
    folder: str = ""
    """Holds the weights that all arms start from, where they were written."""

    @property
    def key(self) -> str:
        """Return what tells this job from others, wherever its weights are."""
        return json.dumps(asdict(replace(self, folder="")), sort_keys=True)

    def to_json(self) -> str:
        """Return the job as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Return the job that a text holds."""
        found: dict[str, Any] = json.loads(text)
        return cls(**{**found, "overrides": tuple(found["overrides"])})

    def plan(self) -> Any:
        """Plan the recipe with this job's batch. Raises what bigtrain.plan does."""
        import bigtrain

        batch = [f"train.micro_batch_size={self.rows}", f"train.global_batch_size={self.rows * self.accumulation}"]
        return bigtrain.plan(bigtrain.load_recipe(self.recipe, [*HELD_EQUAL, *self.overrides, *batch]))


class CannotRun(Exception):
    """An arm that does not run here; the text says why."""
