"""A small recipe that leaves much open, searched on a laptop: what the tests of the search's parts begin with."""

from __future__ import annotations

from typing import Any

from bigtrain.config.load import load_recipe
from bigtrain.planner.hardware import Hardware, of_name
from bigtrain.planner.offers import Offers
from bigtrain.planner.ranking import closest
from bigtrain.planner.search import Found, search
from bigtrain.planner.settle import settled

DEEP = (
    "model.hidden_size=128", "model.num_hidden_layers=6", "model.num_attention_heads=4", "data.vocab_size=512",
    "data.sequence_length=128", "train.global_batch_size=16",
)  # fmt: skip


OPEN = (
    "optimizer.state=auto",
    "amp.master_weights=auto",
    "optimizer.gradient_release=auto",
    "train.max_grad_norm=null",
)


def laptop() -> Hardware:
    return of_name("cpu-laptop")


def opened(*overrides: str, hardware: Hardware | None = None, world_size: int | None = None) -> tuple[Any, ...]:
    """Return what the search takes."""
    return settled(load_recipe("quickstart_gpt", [*DEEP, *overrides]), hardware or laptop(), world_size)


def found(*overrides: str, **where: Any) -> Found:
    return search(*opened(*overrides, **where))


def device_bytes(result: Found) -> int:
    assert result.memory.device_bytes_peak is not None
    return result.memory.device_bytes_peak


def budgets(*overrides: str, hardware: Hardware | None = None) -> list[int]:
    """Return budgets from what the closest choice needs to what no recomputation needs."""
    offers = Offers(*opened(*overrides, hardware=hardware))
    least = offers.report(closest(offers)).device_bytes_peak
    most = device_bytes(found(*overrides, hardware=hardware))
    assert least is not None
    return [least + (most - least) * part // 4 for part in range(5)]
