"""What the planner chooses: everything that leaves the mathematics as it is, and what the recipe says `auto` for."""

from __future__ import annotations

from dataclasses import dataclass

from bigtrain.config.schema import Recipe
from bigtrain.config.tensor_parallel import data_ranks
from bigtrain.recompute.policy import resolve


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run a recipe. `recompute` holds one policy per block, the first block's first.

    `replicate` counts the groups of ranks that each hold the whole model: with `zero_stage` 0 every rank is one.
    """

    micro_batch_size: int
    accumulation_steps: int
    recompute: tuple[str, ...]
    zero_stage: int = 0
    replicate: int = 1
    offload: str = "none"
    optimizer_state: str = "fp32"
    gradient_release: bool = False
    master_weights: str = "fp32"

    @classmethod
    def of(cls, recipe: Recipe, blocks: int, world_size: int) -> Choice:
        """Return the choice that a recipe without `auto` has written down."""
        train, sharding, optimizer = recipe.train, recipe.sharding, recipe.optimizer
        micro, stage, replicate = train.micro_batch_size, sharding.zero_stage, sharding.replicate
        assert isinstance(micro, int) and isinstance(stage, int) and isinstance(replicate, int)
        return cls(
            micro_batch_size=micro,
            accumulation_steps=train.global_batch_size // (data_ranks(recipe, world_size) * micro),
            recompute=tuple(resolve(recipe.recompute.policy, blocks)),
            zero_stage=stage,
            replicate=replicate,
            offload=sharding.offload,
            optimizer_state=optimizer.state,
            gradient_release=optimizer.gradient_release is True,
            master_weights=recipe.amp.master_weights,
        )

    def into(self, recipe: Recipe) -> Recipe:
        """Return a recipe with the choice written down in place of what stood there."""
        sections = {
            "train": {"micro_batch_size": self.micro_batch_size},
            "optimizer": {"state": self.optimizer_state, "gradient_release": self.gradient_release},
            "amp": {"master_weights": self.master_weights},
            "recompute": {"policy": self.recompute_policy},
            "sharding": {"zero_stage": self.zero_stage, "replicate": self.replicate, "offload": self.offload},
        }
        return recipe.model_copy(
            update={name: getattr(recipe, name).model_copy(update=keys) for name, keys in sections.items()}
        )

    @property
    def recompute_policy(self) -> str | list[str]:
        """Return the policies as a recipe says them: one word where all blocks have the same."""
        return self.recompute[0] if len(set(self.recompute)) == 1 else list(self.recompute)

    def as_object(self) -> dict[str, object]:
        """Return what `bigtrain plan --json` prints."""
        return {
            "micro_batch_size": self.micro_batch_size,
            "accumulation_steps": self.accumulation_steps,
            "recompute": self.recompute_policy,
            "zero_stage": self.zero_stage,
            "replicate": self.replicate,
            "offload": self.offload,
            "optimizer_state": self.optimizer_state,
            "gradient_release": self.gradient_release,
            "master_weights": self.master_weights,
        }
