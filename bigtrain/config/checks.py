"""What must fit together in a recipe. Each check is one function; all are run, and all faults are told at once."""

from __future__ import annotations

import math
from collections.abc import Iterator

from bigtrain.config.keys import listed
from bigtrain.config.paths import LONGEST_DOCUMENT, local_path, looks_like_path
from bigtrain.config.schema import Recipe
from bigtrain.config.shape_checks import fault, nearest_divisors, shape_faults
from bigtrain.config.tensor_parallel import data_ranks, rank_faults, tensor_faults
from bigtrain.config.types import LARGEST
from bigtrain.errors import Fault
from bigtrain.rendezvous import split_rendezvous
from bigtrain.units import parse_share

OBJECTIVES = {"bert": ("mlm", "mlm_nsp"), "gpt": ("clm",), "llama": ("clm",)}
"""What each family can be trained on: attention in both directions would see the next token."""

SHORTEST_PAIR = 5
"""Tokens of a row of next-sentence pairs: [CLS] A [SEP] B [SEP], one for each text."""

LENGTHS = ("steps", "tokens", "epochs")

WSD_DECAY_SHARE = 0.2
"""Warm-up, stable, decay: the last share of the run over which the rate falls (Hu et al. 2024, arXiv 2404.06395)."""

MOST = {"model.num_hidden_layers": 1_000, "train.global_batch_size": 2**32, "cluster.nodes": 2**16}
"""Beyond these, planning takes minutes; the largest runs that were published are below a tenth of each."""

MOST_LISTED = 8
"""So many numbers are written out in an error."""


def recipe_faults(recipe: Recipe) -> list[Fault]:
    """Return every fault that follows from several keys together, or from a file that is not there."""
    if faults := [*_sizes(recipe)]:  # the checks below take time with the size
        return faults
    checks = (_objective, _length, _schedule, _nodes, _rendezvous, _source, _document_lengths, _tokenizer, rank_faults)
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
    if len(ranks) == 1 and (counts := _rank_counts(total, rows, ranks[0])):
        text += f"; or {listed(map(str, counts))} {_readers(recipe)}"
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


def _rank_counts(total: int, rows: int, wanted: int) -> list[int]:
    """Return the numbers of ranks nearest to what was wanted that share a global batch evenly; none if rows do not."""
    shares, left = divmod(total, rows)
    low = [count for count in range(1, math.isqrt(shares) + 1) if shares % count == 0 and not left]
    near = sorted({*low, *(shares // count for count in low)}, key=lambda count: abs(count - wanted))
    return sorted(near[:MOST_LISTED])


def _multiples(total: int, share: int) -> str:
    below = total // share * share
    return ", ".join(str(number) for number in (below, below + share) if number)


def _micro_sizes(total: int, ranks: int, wanted: int) -> str:
    return nearest_divisors(total // ranks, wanted) if total % ranks == 0 else ""


def _sizes(recipe: Recipe) -> Iterator[Fault]:
    sizes = {
        "model.num_hidden_layers": recipe.model.num_hidden_layers or 0,
        "train.global_batch_size": recipe.train.global_batch_size,
        "cluster.nodes": max(map(int, str(recipe.cluster.nodes).split(":"))),
    }
    for key, most in MOST.items():
        if sizes[key] > most:
            yield fault(recipe, key, f"{sizes[key]} is too large to plan; at most {most:,}")


def _objective(recipe: Recipe) -> Iterator[Fault]:
    family, objective = recipe.model.family, recipe.train.objective
    if objective not in OBJECTIVES[family]:
        fits = listed(map(repr, OBJECTIVES[family]))
        text = f"{objective!r} does not fit the family {family!r}; use {fits}"
        yield fault(recipe, "train.objective", text, "model.family")
    length = recipe.data.sequence_length
    if objective == "mlm_nsp" and length < SHORTEST_PAIR:
        text = f"rows of {length} tokens have no room for [CLS] A [SEP] B [SEP]; use at least {SHORTEST_PAIR}"
        yield fault(recipe, "data.sequence_length", text, "train.objective")
    if objective == "clm" and recipe.train.whole_word_masking:
        text = "'clm' masks nothing; use false, or the objective 'mlm' or 'mlm_nsp' of the family 'bert'"
        yield fault(recipe, "train.whole_word_masking", text, "train.objective")


def _length(recipe: Recipe) -> Iterator[Fault]:
    given = [key for key in LENGTHS if getattr(recipe.train, key) is not None]
    if not given:
        yield fault(recipe, "train.steps", "missing; the length of the run is one of steps, tokens or epochs")
    if len(given) > 1:
        text = f"the length of the run is given {len(given)} times, as {listed(given, 'and')}; keep one"
        yield fault(recipe, f"train.{given[-1]}", text)


def _schedule(recipe: Recipe) -> Iterator[Fault]:
    yield from schedule_faults(recipe, _steps(recipe))


def schedule_faults(recipe: Recipe, total_steps: int | None) -> Iterator[Fault]:
    """Yield a fault where the warm-up leaves no room for the rest of the schedule in a run of so many steps.

    Where their number is not known yet, only a warm-up that is a share of the run can be judged.
    """
    warmup, wsd = recipe.optimizer.warmup_steps, recipe.optimizer.schedule == "wsd"
    involved = ("optimizer.schedule", "train.steps", "train.tokens", "train.global_batch_size", "data.sequence_length")
    text = ""
    if isinstance(warmup, str):
        if wsd and parse_share(warmup) > 1 - WSD_DECAY_SHARE:
            text = f"{warmup} of warm-up reach into wsd's decay, the last fifth of the run; use at most 80%"
    elif total_steps is not None:
        most = total_steps - wsd_decay_steps(total_steps)
        if warmup > total_steps:
            text = f"{warmup} steps of warm-up are longer than the run of {total_steps}; write a share such as 6%"
        elif wsd and warmup > most:
            text = f"{warmup} steps of warm-up reach into wsd's decay, the last fifth of the run of {total_steps}"
            text += f"; use at most {most}"
    if text:
        yield fault(recipe, "optimizer.warmup_steps", text, *involved)


def wsd_decay_steps(total_steps: int) -> int:
    """Return the steps over which the rate of `wsd` falls, in a run of so many."""
    return max(1, round(WSD_DECAY_SHARE * total_steps))


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
    if recipe.data.mixture is not None:
        if source != "embedded":
            yield fault(recipe, "data.source", "a mixture names its sources itself; leave this out, or data.mixture")
        for entry in recipe.data.mixture:
            yield from _named(recipe, "data.mixture", entry.source)
    elif isinstance(source, list) and "embedded" in source:
        yield fault(recipe, "data.source", "'embedded' stands alone, not in a list; write data.source: embedded")
    else:
        yield from _named(recipe, "data.source", source)


def _named(recipe: Recipe, key: str, source: str | list[str]) -> Iterator[Fault]:
    for name in source if isinstance(source, list) else [source]:
        yield from _missing_path(recipe, key, name, "name a folder, a file, a hub id or 'embedded'")


def _document_lengths(recipe: Recipe) -> Iterator[Fault]:
    least, most = recipe.data.min_characters, recipe.data.max_characters
    if most is not None and least > most:
        yield fault(recipe, "data.min_characters", f"{least} is above data.max_characters, {most}; no document is both")
    if max(least, most or 0) > LONGEST_DOCUMENT:
        key = "data.min_characters" if least > LONGEST_DOCUMENT else "data.max_characters"
        text = f"documents are cut at {LONGEST_DOCUMENT:,} characters before; use at most so many"
        yield fault(recipe, key, text)


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
