"""A rank that steps its rows of parameters beside the whole ones: `ranks_exchange.py RANK WORLD_SIZE STORE`.

Each rank steps both, from the same numbers, and compares; what it found is printed as JSON, a line for each case.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

from bigtrain.config.schema import OptimizerSection
from bigtrain.optim import adafactor
from bigtrain.optim.build import build_optimizer
from bigtrain.optim.cost import OPTIMIZERS, optimizer_state_bytes, supported_states
from bigtrain.optim.exchange import Exchange, connect
from bigtrain.optim.piecewise import Piecewise
from bigtrain.optim.release import release
from bigtrain.sharding.apply import hand_over_gradients, local_parameters, shard

SHAPES = [(7, 5), (90, 160), (4, 6), (2, 3), (1, 4200), (11, 4), (4, 3, 2), (5,), (1,), (3, 7), (64, 96)]
"""Over three ranks: rows that divide and not, ranks with none, tensors of blocks and below, whole ones on the first."""

WHOLE_ON_FIRST = 4

STEPS, SKIPPED = 6, 3

HEAVY = [(300, 200)] * 5 + [(100, 200), (200,)]
"""Where memory shows: more matrices than ranks."""

FORMATS = [("fp32", "fp32"), ("8bit", "split24"), ("4bit", "none"), ("bf16", "split24")]

CASES = [
    {"name": name, "state": state, "weights": weights, "readable": readable}
    for name in OPTIMIZERS
    for state, weights in FORMATS
    for readable in (True, False)
    if state in supported_states(name) and (readable or state in ("fp32", "8bit"))
]
"""On the CPU the host reads whether a step is left out; on a GPU it does not, which some of these pretend too."""


def rows(tensor: Tensor, rank: int, world_size: int) -> Tensor:
    """Return a copy of a rank's rows."""
    parts = torch.chunk(tensor.detach(), world_size)
    return parts[rank].clone() if rank < len(parts) else tensor.detach()[:0].clone()


class Counted(Exchange):
    """An exchange that counts its collectives."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.calls: Counter[str] = Counter()

    def add(self, sums: Tensor) -> Tensor:
        self.calls[f"add {list(sums.shape)} {sums.dtype}"] += 1
        return super().add(sums)

    def deal(self, hand: Any, rows: Tensor) -> Tensor | None:
        self.calls["deal"] += 1
        return super().deal(hand, rows)

    def take_back(self, hand: Any, dealt: Tensor | None, rows: Tensor) -> None:
        self.calls["take back"] += 1
        super().take_back(hand, dealt, rows)


class Pair:
    """The same optimizer twice: of whole parameters, and of this rank's rows of them."""

    def __init__(self, case: dict[str, Any], shapes: list[tuple[int, ...]]) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.generator = torch.Generator().manual_seed(0)
        self.dtype = torch.float32 if case["weights"] == "fp32" else torch.bfloat16
        self.whole = [nn.Parameter(self._random(shape)) for shape in shapes]
        self.start = [parameter.detach().clone() for parameter in self.whole]
        self.own = [nn.Parameter(self._mine(parameter)) for parameter in self.whole]
        section = OptimizerSection(name=case["name"], state=case["state"], learning_rate=0.01, weight_decay=0.1)
        build: Callable[[list[nn.Parameter]], Any] = lambda parameters: build_optimizer(  # noqa: E731
            parameters, section, master_weights=case["weights"]
        )
        self.optimizers = [build(self.whole), build(self.own)]
        wholes = {own: tuple(whole.shape) for own, whole in zip(self.own, self.whole, strict=True)}
        self.exchange = Counted(None, wholes)
        connect(self.optimizers[1], self.exchange)

    def step(self, *, skipped: bool = False) -> None:
        """Give both the same gradients and take a step, or leave it out, as one of the gradients is not finite."""
        for whole, own in zip(self.whole, self.own, strict=True):
            whole.grad = self._random(whole.shape)
            if skipped:
                whole.grad.view(-1)[0] = float("nan")
            own.grad = self._mine(whole.grad)
        for optimizer in self.optimizers:
            optimizer.found_inf = torch.tensor(float(skipped))
            optimizer.step()

    def differences(self) -> list[tuple[float, float, float]]:
        """Return, for each parameter, how far its rows are from those of the whole, how long those and their way."""
        found = []
        for start, whole, own in zip(self.start, self.whole, self.own, strict=True):
            there = self._mine(whole).double()
            lengths = there - own.detach().double(), there, there - self._mine(start).double()
            far, length, way = (length.norm().item() for length in lengths)
            found.append((far, length, way))
        return found

    def same_steps(self) -> bool:
        """Tell whether every part of a parameter has counted the steps of the whole."""
        one, other = self.optimizers
        pairs = zip(self.whole, self.own, strict=True)
        return all(torch.equal(one.state[whole]["step"], other.state[own]["step"]) for whole, own in pairs)

    def _mine(self, tensor: Tensor) -> Tensor:
        return rows(tensor, self.rank, self.world_size)

    def _random(self, shape: Any) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)


def everything(pair: Pair) -> list[Tensor]:
    states = (state for parameter in pair.own for state in pair.optimizers[1].state[parameter].values())
    return [tensor.detach().clone() for tensor in (*pair.own, *states)]


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """Step both, leave a step out, step on."""
    Piecewise._is_readable = staticmethod(lambda found_inf: case["readable"])  # type: ignore[method-assign]
    pair = Pair(case, SHAPES)
    kept = True
    for step in range(STEPS):
        before = everything(pair) if step == SKIPPED else []
        pair.step(skipped=step == SKIPPED)
        kept &= all(torch.equal(one, other) for one, other in zip(before, everything(pair), strict=False))
    shapes = [tuple(own.shape) for own in pair.own]
    states = [value for own in pair.own for value in pair.optimizers[1].state[own].values()]
    return {
        "differences": pair.differences(),
        "first": torch.equal(pair.own[WHOLE_ON_FIRST], rows(pair.whole[WHOLE_ON_FIRST], pair.rank, pair.world_size)),
        "kept": kept,
        "same_steps": pair.same_steps(),
        "finite": all(bool(torch.isfinite(own).all()) for own in pair.own),
        "calls": dict(pair.exchange.calls),
        "predicted": optimizer_state_bytes(case["name"], case["state"], case["weights"], shapes),
        "state": sum(value.nbytes for value in states),
    }


def peak(pair: Pair) -> int:
    """Return the most that a step allocates beyond what is there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        pair.optimizers[1].step()
    results: Any = recorded.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def weigh(name: str) -> dict[str, Any]:
    """Return what a step on matrices holds for a moment, and the work buffers."""
    Piecewise._is_readable = staticmethod(lambda found_inf: True)  # type: ignore[method-assign]
    pair = Pair({"name": name, "state": "fp32", "weights": "fp32"}, HEAVY)
    pair.step()
    works = pair.optimizers[1]._workspaces.values()
    return {"peak": peak(pair), "buffers": sum(buffer.nbytes for work in works for buffer in work._buffers.values())}


def narrow() -> dict[str, Any]:
    """Return Adafactor's calls and differences where its columns are added up bucket by bucket."""
    plain = adafactor.exchanged_elements
    adafactor.exchanged_elements = lambda shapes: 4300
    found = compare({"name": "adafactor", "state": "fp32", "weights": "fp32", "readable": True})
    adafactor.exchanged_elements = plain
    return found


class Model(nn.Module):
    """Two blocks with rows that three ranks cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.head = nn.Linear(8, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = torch.nn.functional.gelu(block(hidden))
        loss: Tensor = self.head(hidden).square().mean()
        return loss


def released(stage: int) -> dict[str, Any]:
    """Train a model under `fully_shard` with and without gradient release; compare bit by bit."""
    models, norms = [], []
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for releasing in (False, True):
        model = Model()
        sharded = shard(model, list(model.blocks), mesh, zero_stage=stage)
        parameters = list(model.parameters())
        own = local_parameters(parameters)
        optimizer: Any = build_optimizer(own, OptimizerSection(name="adamw", learning_rate=0.01))
        handle = release(parameters, optimizer, own) if releasing else None
        for step in range(3):
            sharded.before_micro_batch(last=True)
            generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
            model(torch.randint(0, 20, (6,), generator=generator)).backward()
            if handle is None:
                hand_over_gradients(parameters, own)
                norms.append(math.hypot(*(p.grad.norm().item() for p in own if p.grad is not None)))
                optimizer.step()
                optimizer.zero_grad()
            else:
                assert all(p.grad is None for p in (*parameters, *own))
                norms.append(handle.take_norm().item())
        models.append(own)
    same = all(torch.equal(one, other) for one, other in zip(*models, strict=True))
    return {"same": same, "norms": norms, "empty": sum(not own.numel() for own in models[0])}


def found() -> Iterator[dict[str, Any]]:
    for case in CASES:
        yield compare(case)
    yield narrow()
    for name in ("muon", "adafactor", "lamb"):
        yield weigh(name)
    for stage in (1, 3):
        yield released(stage)


def main(rank: int, world_size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    for line in found():
        print(json.dumps(line), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
