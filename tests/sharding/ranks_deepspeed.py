"""A rank that DeepSpeed shards a model for, over gloo: `ranks_deepspeed.py RANK WORLD_SIZE STORE CASES`.

CASES is a file with a list of cases; what was found is printed as JSON, one line for each. One process without
DeepSpeed is what the others are compared with.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bigtrain import amp, batch, recompute
from bigtrain.config.model import resolve_model
from bigtrain.config.schema import Recipe
from bigtrain.models.build import build_model
from bigtrain.optim.build import build_optimizer
from bigtrain.sharding.deepspeed import DeepSpeed, start
from bigtrain.sharding.deepspeed_config import deepspeed_config
from bigtrain.sharding.rows import join_rows

State = dict[str, dict[str, Tensor]]


def rows(recipe: Recipe) -> dict[str, Tensor]:
    """Return a global batch whose rows have from one label to all of them."""
    generator = torch.Generator().manual_seed(recipe.seed)
    count, length = recipe.train.global_batch_size, recipe.data.sequence_length
    ids = torch.randint(5, recipe.data.vocab_size, (count, length), generator=generator)
    kept = torch.rand(count, length, generator=generator) < torch.linspace(0.0, 1.0, count)[:, None]
    kept[:, 1] = True
    labels = ids.masked_fill(~kept, -100)
    return {"input_ids": ids, "labels": labels, "document_lengths": torch.tensor([[length]] * count)}


class Trainer:
    """A model under way, with or without DeepSpeed."""

    def __init__(self, case: dict[str, Any], *, sharded: bool = True) -> None:
        self.recipe = recipe = Recipe.model_validate(case["recipe"])
        self.ranks, train = dist.get_world_size(), recipe.train
        data = recipe.data
        config = resolve_model(recipe.model, vocab_size=data.vocab_size, sequence_length=data.sequence_length)
        torch.manual_seed(recipe.seed)
        self.model = build_model(config, dropout=0.0, attention_dropout=0.0)
        amp.apply(self.model, recipe.amp.precision)
        if recipe.recompute.policy != "none":
            recompute.apply(list(self.model.blocks), recipe.recompute.policy)
        self.first = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.held = self._start(case) if sharded else None
        self.optimizer = (
            self.held.optimizer if self.held else build_optimizer(self.model.parameters(), recipe.optimizer)
        )
        batch_rows = rows(recipe)
        self.labels = batch.count_labels(batch_rows, shifted=False)
        share = train.global_batch_size // (self.ranks if sharded else 1)
        own = (dist.get_rank() if sharded else 0) * share
        mine = {name: value[own : own + share] for name, value in batch_rows.items()}
        self.parts = list(batch.split(mine, train.micro_batch_size))

    def _start(self, case: dict[str, Any]) -> DeepSpeed:
        recipe, micro = self.recipe, self.recipe.train.micro_batch_size
        config = deepspeed_config(
            recipe,
            micro_batch_size=micro,
            accumulation_steps=recipe.train.global_batch_size // self.ranks // micro,
            parameters=sum(p.numel() for p in self.model.parameters()),
            pinned=False,
        )
        config["zero_optimization"].update(case.get("zero", {}))
        return start(self.model, lambda found: build_optimizer(found, recipe.optimizer), config, kind="cpu")

    def step(self, factor: float = 1.0) -> tuple[float, float, bool]:
        """Take a step with the loss times a factor; return loss, norm and whether the weights were updated."""
        total, clip, ranks = 0.0, self.recipe.train.max_grad_norm, self.ranks if self.held else 1
        for index, part in enumerate(self.parts):
            if self.held:
                self.held.before_micro_batch(last=index == len(self.parts) - 1)
            share = batch.count_labels(part, shifted=False) / self.labels
            loss = self.model(**batch.unpad(part)) * share * ranks * factor
            self.held.backward(loss) if self.held else loss.backward()
            total += loss.item() / ranks
        if self.held:
            loss_sum = torch.tensor(total, dtype=torch.float64)
            dist.all_reduce(loss_sum)
            norm, finite = self.held.step(clip)
            return loss_sum.item(), norm.item(), bool(finite)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip or torch.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, norm.item(), True

    def saved(self) -> tuple[dict[str, Tensor], State]:
        """Return copies of this rank's rows and of their states."""
        assert self.held is not None
        with self.held.laid_out():
            weights = {name: rows.detach().clone() for name, rows in self.held.parameters.items()}
            state: Any = self.held.optimizer.state
            states = {
                name: {key: value.clone() for key, value in state.get(rows, {}).items()}
                for name, rows in self.held.parameters.items()
            }
        return weights, states

    def load(self, weights: dict[str, Tensor], states: State) -> None:
        """Go on from what `saved` returned."""
        assert self.held is not None
        with self.held.laid_out(changed=True):
            state: Any = self.held.optimizer.state
            for name, held in self.held.parameters.items():
                held.data.copy_(weights[name])
                for key, value in states[name].items():
                    state[held][key] = value.clone()

    def whole(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return all of each tensor from this rank's rows."""
        assert self.held is not None
        parts = self.held.parts
        return {name: join_rows(value, parts[name], torch.device("cpu")) for name, value in found.items()}

    def evaluation(self) -> list[float]:
        flat = batch.unpad(rows(self.recipe))
        return [float(value) for value in self.model.evaluate(**flat)]


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Train a case; with `alone`, without DeepSpeed. `resumed`: save, load anew and go on, here and without it."""
    trainer = Trainer(case, sharded=not case.get("alone"))
    found: dict[str, Any] = {}
    if trainer.held:
        masters = trainer.whole(trainer.saved()[0])
        found["exact"] = all(torch.equal(masters[name], first) for name, first in trainer.first.items())
    results = [trainer.step() for _ in range(case["steps"])]
    if case.get("resumed"):
        found |= resume(case, trainer)
    if case.get("evaluated"):
        found["evaluation"], found["names"] = trainer.evaluation(), list(trainer.model.state_dict())
        found["training"] = trainer.step()[0] < results[0][0]
    if case.get("skipped"):
        before = trainer.saved()
        bad = trainer.step(float("nan"))
        after = trainer.saved()
        found["skipped"] = [not bad[2], same(before, after), trainer.step()[2]]
    losses, norms, _ = zip(*results, strict=True)
    return {**found, "losses": losses, "norms": norms}


def resume(case: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
    weights, states = trainer.saved()
    again = Trainer(case)
    again.step()  # its states are there, and are to be written over
    again.load(weights, states)
    alone = Trainer(case, sharded=False)
    wholes = trainer.whole(weights)
    moments = {key: trainer.whole({n: s[key] for n, s in states.items()}) for key in ("exp_avg", "exp_avg_sq")}
    alone_state: Any = alone.optimizer.state
    with torch.no_grad():
        for name, parameter in alone.model.named_parameters():
            parameter.copy_(wholes[name])
            alone_state[parameter] = {key: moments[key][name] for key in moments} | {
                "step": states[name]["step"].clone()
            }
    exact = same(trainer.saved(), again.saved())
    fresh = Trainer(case)
    fresh.load(weights, {name: {} for name in states})
    empty = not any(fresh.saved()[1].values())
    on, on_again, on_alone = ([each.step()[:2] for _ in range(2)] for each in (trainer, again, alone))
    return {"exactly": exact, "on": on, "on again": on_again, "on alone": on_alone, "weights alone": empty}


def same(one: tuple[dict[str, Tensor], State], other: tuple[dict[str, Tensor], State]) -> bool:
    """Tell whether two states are bitwise equal."""
    weights = all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    return weights and all(
        one[1][name].keys() == other[1][name].keys()
        and all(torch.equal(value, other[1][name][key]) for key, value in state.items())
        for name, state in one[1].items()
    )


class Asked(dict[str, Any]):
    """A configuration that knows what it was asked for."""

    keys_asked: set[str] = set()  # noqa: RUF012 - one for all copies that DeepSpeed makes

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)


def ignored(case: dict[str, Any]) -> list[str]:
    """Return the keys of our configuration that DeepSpeed never looks at."""
    from deepspeed.runtime.config import DeepSpeedConfig

    config = deepspeed_config(
        Recipe.model_validate(case["recipe"]), micro_batch_size=1, accumulation_steps=1, parameters=10, pinned=False
    )
    DeepSpeedConfig(Asked(config))
    return sorted(set(config) - Asked.keys_asked)


def main(rank: int, world_size: int, store: str, cases: str) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for case in json.loads(Path(cases).read_text()):
        found = {"ignored": ignored(case)} if case.get("ignored") else run(case)
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()
    os._exit(0)  # all is told: threads of gloo's that still run have been seen to abort an interpreter that ends


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
