"""How long a step takes: a roofline for each operation of our models, the optimizer, and what ranks send. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from bigtrain.amp.cost import weight_bytes
from bigtrain.config.model import ModelConfig
from bigtrain.config.schema import Recipe
from bigtrain.config.tensor_parallel import data_ranks
from bigtrain.data.cache import cache_folder
from bigtrain.memory.layout import tensor_shapes
from bigtrain.memory.predict import micro_batch, numbers, torch_threads
from bigtrain.memory.state import gathered_bytes, moved_bytes
from bigtrain.models.operations_cost import FLOAT, Numbers
from bigtrain.models.shape import loss_chunk_tokens, reads_its_end
from bigtrain.planner import update
from bigtrain.planner.choice import Choice
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.links import Transfer, exposed_seconds, links_of, transfers
from bigtrain.planner.rates import rates_of
from bigtrain.planner.roofline import Roofline, Work
from bigtrain.planner.work import BlockWork, ModelWork
from bigtrain.sharding.cost import REDUCE_BYTES, RESHARDING_STAGES, collectives, padded_elements, tensor_sums


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """The seconds of one optimizer step; of communication and offload what nothing hides."""

    forward_seconds: float
    backward_seconds: float
    recompute_seconds: float
    optimizer_seconds: float
    communication_seconds: float = 0.0
    offload_seconds: float = 0.0

    @property
    def total(self) -> float:
        """Return the seconds of the whole step."""
        return (
            self.forward_seconds
            + self.backward_seconds
            + self.recompute_seconds
            + self.optimizer_seconds
            + self.communication_seconds
            + self.offload_seconds
        )


@dataclass(frozen=True, slots=True)
class _Passes:
    """Seconds of one micro-batch; of one block, by policy, what recomputation adds and what its input takes to move."""

    forward: float
    backward: float
    recompute: dict[str, float]
    moved: float
    block: float


class Speed:
    """Predicts the steps of a recipe on a device, whatever is chosen; rows count as full, as for memory.

    Rates are the table's for a device of the table; for this machine those that were measured here, if any were.
    `source` says which. What depends on the micro-batch alone is computed once.
    """

    roofline: type[Roofline] = Roofline
    model_work: type[ModelWork] = ModelWork

    def __init__(self, recipe: Recipe, model: ModelConfig, hardware: Hardware, world_size: int) -> None:
        self.recipe, self.model, self.hardware, self.world_size = recipe, model, hardware, world_size
        precision, threads = recipe.amp.precision, hardware.threads or torch_threads()
        folder: Path = cache_folder(recipe.data)
        self.rates = rates_of(hardware, precision, threads, folder)
        self.source = self.rates.source
        fused = hardware.kind == "cuda" and recipe.train.compile is not False
        self._plain, self._run = self.roofline(self.rates), self.roofline(self.rates, fused)
        self._links = links_of(hardware, recipe)
        self._shapes = tensor_shapes(recipe, model)
        self._parameters = sum(math.prod(shape) for shape in self._shapes.values())
        self._tensor_ranks, self._data_ranks = recipe.sharding.tensor_parallel, data_ranks(recipe, world_size)
        self._groups = model.num_hidden_layers + 1
        self._passes: dict[tuple[int, bool, str], _Passes] = {}
        self._updates: dict[tuple[str, str, bool, bool, int], float] = {}
        self._sent: dict[tuple[object, ...], tuple[float, float]] = {}
        self._transfers: dict[tuple[int, ...], list[Transfer]] = {}
        self._copied: dict[tuple[int, int, int, str], tuple[float, float]] = {}

    def seconds(self, choice: Choice) -> StepSeconds:
        """Return what a step takes."""
        times = choice.accumulation_steps
        key = (choice.micro_batch_size, times > 1, choice.master_weights)
        passes = self._passes.get(key)
        if passes is None:
            passes = self._passes[key] = self._pass(choice)
        again = sum(seconds * choice.recompute.count(policy) for policy, seconds in passes.recompute.items())
        forward, backward = times * passes.forward, times * passes.backward
        sent = 0.0
        copied = self.shard_copies(choice)
        forward, backward = forward + copied[0], backward + copied[1]
        if self.world_size > 1:
            sent = self._communication(choice, forward, backward + times * again)
        return StepSeconds(
            forward,
            backward,
            times * again,
            self._update(choice),
            sent,
            self._offload(choice, passes),
        )

    def tokens_per_second(self, seconds: StepSeconds) -> float:
        """Return tokens of all ranks, those without a label included."""
        return self.recipe.train.global_batch_size * self.recipe.data.sequence_length / seconds.total

    def mfu(self, seconds: StepSeconds, flops_per_token: float) -> float:
        """Return model FLOPs against `peak_flops_per_second`, without recomputed ones."""
        rate = flops_per_token * self.tokens_per_second(seconds) / self.world_size
        return rate / self.peak_flops_per_second

    @property
    def peak_flops_per_second(self) -> float:
        """Return what MFU is taken against: the data sheet's for a device of the table, else what products reach."""
        row, precision = self.hardware.device, self.recipe.amp.precision
        if row is None:
            return self.rates.product_flops_per_second
        return row.flops_per_second.get(precision, row.flops_per_second["fp32"])

    def _numbers(self, choice: Choice) -> Numbers:
        accumulated, slow = choice.accumulation_steps > 1, self.hardware.slow_bf16
        return numbers(choice.into(self.recipe), accumulated=accumulated, slow_bf16=slow)

    def micro_batch_work(self, choice: Choice) -> tuple[Work, Work, BlockWork]:
        """Return the work of a micro-batch forward and backward, without what is recomputed, and of one block."""
        train, model, run = self.recipe.train, self.model, self._run
        budget = self.recipe.memory.budget
        limit = budget if isinstance(budget, int) else self.hardware.memory_bytes
        chunk = loss_chunk_tokens(model.padded_vocab_size, self.hardware.kind, limit)
        kept, batch = self._numbers(choice), micro_batch(self.recipe, choice.micro_batch_size)
        blocks = self.model_work(model, run, kept, chunk, train.dropout, train.attention_dropout, self._tensor_ranks)
        ends = self.model_work(model, self._plain, kept, chunk, train.dropout, train.attention_dropout)
        block, (first, last), layers = blocks.block(batch), ends.ends(batch), model.num_hidden_layers
        forward = block.forward * layers + first + ends.batch(batch)
        backward = block.backward * layers + last
        if choice.accumulation_steps > 1:
            backward += self.accumulation_work(choice)
        return forward, backward, block

    def accumulation_work(self, choice: Choice) -> Work:
        """Return the work of a micro-batch's gradients, of which each but the first is added to what is there."""
        made = weight_bytes(1, choice.master_weights)
        return update.add(self._plain, self._parameters, len(self._shapes), made) * (1 - 1 / choice.accumulation_steps)

    def _pass(self, choice: Choice) -> _Passes:
        run, model = self._run, self.model
        forward, backward, block = self.micro_batch_work(choice)
        kept, batch = self._numbers(choice), micro_batch(self.recipe, choice.micro_batch_size)
        moved = batch.tokens * model.hidden_size * kept.activation / self._links.host_bytes_per_second
        once = block.forward + block.backward
        again = {
            policy: run.elapsed(once + work) - run.elapsed(once)
            for policy, work in block.recompute.items()
            if policy != "none"
        }
        return _Passes(run.elapsed(forward), run.elapsed(backward), again, moved, run.elapsed(block.forward))

    def _shards(self, choice: Choice) -> int:
        return self._data_ranks // choice.replicate if choice.zero_stage else 1

    def _update(self, choice: Choice) -> float:
        accumulated, shards = choice.accumulation_steps > 1, self._shards(choice)
        key = (choice.optimizer_state, choice.master_weights, accumulated, choice.gradient_release, shards)
        if key not in self._updates:
            self._updates[key] = self._plain.elapsed(self.update_work(choice))
        return self._updates[key]

    def update_work(self, choice: Choice) -> Work:
        """Return the work of a rank's update, with the gradients' norm and their clipping."""
        gradient = FLOAT if choice.accumulation_steps > 1 else weight_bytes(1, choice.master_weights)
        clipped = self.recipe.train.max_grad_norm is not None and not choice.gradient_release
        clipping = update.clip(self._plain, self._parameters, len(self._shapes), gradient, clipped=clipped)
        changing = update.update(
            self._plain,
            self.recipe.optimizer.name,
            choice.optimizer_state,
            choice.master_weights,
            self._shapes,
            gradient_bytes=gradient,
        )
        return (clipping + changing) * (1 / self._shards(choice))

    def transfers(self, choice: Choice) -> list[Transfer]:
        """Return what ranks send each other in a step; nothing on one rank."""
        shards, times, repeated = self._shards(choice), choice.accumulation_steps, self._repeated_sums(choice)
        key = (choice.zero_stage, shards, times, repeated, choice.micro_batch_size)
        if key not in self._transfers:
            padded = {name: padded_elements(shape, shards) for name, shape in self._shapes.items()}
            sent = collectives(
                sum(padded.values()),
                choice.zero_stage,
                shards,
                self._data_ranks // shards,
                times,
                2 if self.recipe.amp.precision != "fp32" else FLOAT,
                REDUCE_BYTES[self.recipe.amp.reduce],
                groups=self._groups,
                outside=sum(size for name, size in padded.items() if not name.startswith("blocks.")),
                apart=self._tensor_ranks,
            )
            sent += tensor_sums(
                self._tensor_ranks, self._activation_bytes(choice), self.model.num_hidden_layers, repeated, times
            )
            self._transfers[key] = transfers(self._links, sent, self.world_size)
        return self._transfers[key]

    def shard_copies(self, choice: Choice) -> tuple[float, float]:
        """Return what `fully_shard` copies in a step's forward and backward passes, in seconds; nothing on one rank.

        Parameters out of what was gathered, gradients into what is reduced. From stage 2 on each micro-batch's are, so
        that a rank adds up its part alone.
        """
        if self._data_ranks == 1:
            return 0.0, 0.0
        stage, shards, times = choice.zero_stage, self._shards(choice), choice.accumulation_steps
        key = (stage, shards, times, choice.master_weights)
        if key not in self._copied:
            made = weight_bytes(1, choice.master_weights)
            number = 2 if self.recipe.amp.precision != "fp32" else FLOAT
            again, reductions = stage in RESHARDING_STAGES, 1 if stage == 1 else times
            out = update.copy(self._plain, self._parameters, len(self._shapes), number, number)
            into = update.copy(self._plain, self._parameters, len(self._shapes), number, FLOAT)
            backward = out * (times if again else 0) + into * reductions
            if stage >= 2:
                whole = update.add(self._plain, self._parameters, len(self._shapes), made)
                backward += whole * ((times - 1) * (1 / shards - 1))
            forward = out * (times if again else 1)
            self._copied[key] = self._plain.elapsed(forward), self._plain.elapsed(backward)
        return self._copied[key]

    def _activation_bytes(self, choice: Choice) -> int:
        """Return the bytes of what a block gets, and ranks that share products sum."""
        tokens = choice.micro_batch_size * self.recipe.data.sequence_length
        return tokens * self.model.hidden_size * (2 if self.recipe.amp.precision != "fp32" else FLOAT)

    def _repeated_sums(self, choice: Choice) -> int:
        """Return how many sums over ranks that share products recomputation repeats in a backward pass."""
        if self._tensor_ranks == 1:
            return 0
        again = sum(policy != "none" for policy in choice.recompute)
        return again * (2 if reads_its_end(self.model, self.recipe.train.dropout) else 1)

    def _communication(self, choice: Choice, forward_seconds: float, backward_seconds: float) -> float:
        return exposed_seconds(
            self._links,
            self.transfers(choice),
            accumulation_steps=choice.accumulation_steps,
            forward_seconds=forward_seconds,
            backward_seconds=backward_seconds,
        )

    def _offload(self, choice: Choice, passes: _Passes) -> float:
        """Return what copies to the host and back are not hidden: block inputs, states, and parameters block by block.

        A block's input leaves while the next block computes and comes back before it is needed, except the first. A
        block's weights come while the one before computes where they are gathered from several ranks; on one, torch
        copies them when they are needed.
        """
        times, exposed = choice.accumulation_steps, 0.0
        if offloaded := choice.recompute.count("offload"):
            late = max(0.0, passes.moved - passes.block)
            exposed += times * (2 * late * offloaded + passes.moved)
        if choice.offload != "none":
            held = choice.offload, choice.optimizer_state, choice.master_weights
            key = (*held, choice.zero_stage, self._shards(choice), times)
            if key not in self._sent:
                self._sent[key] = self._copied_seconds(choice)
            update, gathers = self._sent[key]
            window = times * (passes.forward + passes.backward) if self._shards(choice) > 1 else 0.0
            exposed += update + self._links.exposed(gathers, window, self._groups)
        return exposed

    def _copied_seconds(self, choice: Choice) -> tuple[float, float]:
        """Return the seconds in which a rank's states and gradients cross to the device and back, and its weights."""
        recipe, times = choice.into(self.recipe), choice.accumulation_steps
        moved = sum(moved_bytes(recipe, self.model, self.world_size, times))
        gathered = gathered_bytes(recipe, self.model, self.world_size, times)
        rate = self._links.host_bytes_per_second
        return (moved - gathered) / rate, gathered / rate
