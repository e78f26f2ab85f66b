"""What must fit together in a recipe. Each check is one function; all are run, and all faults are told at once."""

from __future__ import annotations

import math
from collections.abc import Iterator

from bigtrain.config.keys import listed
from bigtrain.config.paths import local_path, looks_like_path
from bigtrain.config.schema import Recipe
from bigtrain.config.shape_checks import fault, nearest_divisors, shape_faults
from bigtrain.config.tensor_parallel import data_ranks, rank_faults, tensor_faults
from bigtrain.config.types import LARGEST
from bigtrain.errors import Fault
from bigtrain.rendezvous import split_rendezvous

OBJECTIVES = {"bert": ("mlm", "mlm_nsp"), "gpt": ("clm",), "llama": ("clm",)}
"""What each family can be trained on: attention in both directions would see the next token."""

LENGTHS = ("steps", "tokens", "epochs")

MOST_LISTED = 8
"""So many numbers are written out in an error."""


def recipe_faults(recipe: Recipe) -> list[Fault]:
    """Return every fault that follows from several keys together, or from a file that is not there."""
    checks = (_objective, _length, _warmup, _nodes, _rendezvous, _source, _tokenizer, rank_faults)
    found = [fault for check in checks for fault in check(recipe)]
    return [*shape_faults(recipe, tensor_faults), *found, *batch_faults(recipe, world_sizes(recipe))]


def world_sizes(recipe: Recipe) -> list[int]:
    """Return the numbers of ranks that the recipe names: none if it is open, one for each number of `least:most`."""
    devices, nodes = recipe.cluster.devices_per_node, recipe.cluster.nodes
    if devices == "auto":
        if recipe.train.device != "cpu":
            return []
        devices = 1
    return [count * devices for count in node_counts(nodes)]


def node_counts(nodes: int | str) -> list[int]:
    """Return the numbers of nodes that `cluster.nodes` allows, rising."""
    least, _, most = str(nodes).partition(":")
    return list(range(int(least), int(most or least) + 1))


def batch_faults(recipe: Recipe, ranks: list[int]) -> list[Fault]:
    """Return a fault if the global batch does not divide among micro-batches on each of these numbers of ranks."""
    total, micro = recipe.train.global_batch_size, recipe.train.micro_batch_size
    rows = 1 if micro == "auto" else micro
    ranks = [data_ranks(recipe, count) for count in ranks]
    common = _common_multiple(ranks)
    share = rows * common
    if total % share == 0:
        return []
    by = [f"micro_batch_size {rows}"] if micro != "auto" else []
    by += [f"{_numbers(ranks)} {_readers(recipe)}"] if ranks else []
    text = f"{total} is not divisible by {' x '.join(by)}; "
    text += f"nearest that are: {_multiples(total, share)}" if share <= LARGEST else "no number is; name fewer nodes"
    if micro != "auto" and (sizes := _micro_sizes(total, common, rows)):
        text += f"; or micro_batch_size {sizes}"
    involved = ("train.micro_batch_size", "cluster.nodes", "cluster.devices_per_node")
    return [fault(recipe, "train.global_batch_size", text, *involved)]


def _readers(recipe: Recipe) -> str:
    sharing = recipe.sharding.tensor_parallel
    return "ranks" if sharing == 1 else f"groups of {sharing} ranks"


def _common_multiple(numbers: list[int]) -> int:
    """Return the least common multiple, or some number above LARGEST where that is."""
    common = 1
    for number in numbers:
        common = math.lcm(common, number)
        if common > LARGEST:
            break
    return common


def _numbers(numbers: list[int]) -> str:
    if len(numbers) <= MOST_LISTED:
        return listed(map(str, numbers), "and")
    return f"{numbers[0]}, {numbers[1]}, ... and {numbers[-1]}"


def _multiples(total: int, share: int) -> str:
    below = total // share * share
    return ", ".join(str(number) for number in (below, below + share) if number)


def _micro_sizes(total: int, ranks: int, wanted: int) -> str:
    return nearest_divisors(total // ranks, wanted) if total % ranks == 0 else ""


def _objective(recipe: Recipe) -> Iterator[Fault]:
    family, objective = recipe.model.family, recipe.train.objective
    if objective not in OBJECTIVES[family]:
        fits = listed(map(repr, OBJECTIVES[family]))
        text = f"{objective!r} does not fit the family {family!r}; use {fits}"
        yield fault(recipe, "train.objective", text, "model.family")


def _length(recipe: Recipe) -> Iterator[Fault]:
    given = [key for key in LENGTHS if getattr(recipe.train, key) is not None]
    if not given:
        yield fault(recipe, "train.steps", "missing; the length of the run is one of steps, tokens or epochs")
    if len(given) > 1:
        text = f"the length of the run is given {len(given)} times, as {listed(given, 'and')}; keep one"
        yield fault(recipe, f"train.{given[-1]}", text)


def _warmup(recipe: Recipe) -> Iterator[Fault]:
    warmup, steps = recipe.optimizer.warmup_steps, _steps(recipe)
    if isinstance(warmup, int) and steps is not None and warmup > steps:
        text = f"{warmup} steps of warm-up are longer than the run of {steps}; write a share such as 6%"
        involved = ("train.steps", "train.tokens", "train.global_batch_size", "data.sequence_length")
        yield fault(recipe, "optimizer.warmup_steps", text, *involved)


def _steps(recipe: Recipe) -> int | None:
    """Return the length of the run in steps, or None where it is not known before the data are."""
    train = recipe.train
    if train.tokens is not None:
        return -(-train.tokens // (train.global_batch_size * recipe.data.sequence_length))
    return train.steps


def _nodes(recipe: Recipe) -> Iterator[Fault]:
    least, _, most = str(recipe.cluster.nodes).partition(":")
    if most and int(least) > int(most):
        yield fault(recipe, "cluster.nodes", f"'{least}:{most}' has the least above the most; write '{most}:{least}'")


def _rendezvous(recipe: Recipe) -> Iterator[Fault]:
    if recipe.cluster.rendezvous is None:
        return
    try:
        split_rendezvous(recipe.cluster.rendezvous)
    except ValueError as error:
        yield fault(recipe, "cluster.rendezvous", str(error))


def _source(recipe: Recipe) -> Iterator[Fault]:
    source = recipe.data.source
    for name in source if isinstance(source, list) else [source]:
        yield from _missing_path(recipe, "data.source", name, "name a folder, a file, a hub id or 'embedded'")


def _tokenizer(recipe: Recipe) -> Iterator[Fault]:
    yield from _missing_path(recipe, "data.tokenizer", recipe.data.tokenizer, "name a tokenizer.json or write 'train'")


def _missing_path(recipe: Recipe, key: str, name: str, instead: str) -> Iterator[Fault]:
    try:
        missing = looks_like_path(name) and not local_path(name).exists()
    except OSError as error:
        yield fault(recipe, key, f"{name[:80]!r} cannot be read: {error.strerror}")
        return
    if missing:
        yield fault(recipe, key, f"no such file or folder: {name!r}; {instead}")
