"""A tokenizer that is to take the place of a run's own: whether it only adds tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bigtrain.data.tokenizer import id_count, load_tokenizer, open_tokenizer
from bigtrain.data.vocabulary import SpecialTokens
from bigtrain.errors import DataError, Fault, InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

OPTION = "--tokenizer"
SHOWN = 3
LONGEST_SHOWN = 40
"""Letters of a token in a message."""


class Larger(NamedTuple):
    """A tokenizer with all tokens of a run's at the same ids and `added` more: its file's text, and its ids."""

    text: str
    ids: int
    added: int


def larger_tokenizer(spec: str, own: Path) -> Larger:
    """Return the tokenizer that a file, a folder or a hub id names, in place of the `own` one of a run.

    Raises InputError where it lacks tokens of the run's, has them at other ids, or adds none.
    """
    before, new = open_tokenizer(own), _loaded(spec)
    had, has = (tokenizer.get_vocab(with_added_tokens=True) for tokenizer in (before, new))
    fault = _lacking(had, has, own) or _moved(had, has, own) or _other_meaning(had, has, own)
    if fault is None and not has.keys() - had.keys():
        fault = f"has no token that {own} lacks; give a tokenizer with more tokens"
    if fault is not None:
        raise InputError(Fault("command line", OPTION, f"{spec}: {fault}"))
    return Larger(new.to_str(pretty=True), id_count(new), len(has.keys() - had.keys()))


def _loaded(spec: str) -> Tokenizer:
    try:
        return load_tokenizer(spec, "command line")
    except DataError as error:
        raise InputError(*(fault._replace(key=OPTION) for fault in error.faults)) from error


def _lacking(had: Mapping[str, int], has: Mapping[str, int], own: Path) -> str | None:
    lost = [token for token in _by_id(had) if token not in has]
    if not lost:
        return None
    text = f"the vocabulary would shrink: {len(lost)} of the {len(had)} tokens of {own} are not in it"
    return f"{text}, such as {_listed(lost)}; give a tokenizer that adds to that one"


def _moved(had: Mapping[str, int], has: Mapping[str, int], own: Path) -> str | None:
    moved = [token for token in _by_id(had) if has[token] != had[token]]
    if not moved:
        return None
    shown = ", ".join(f"{_short(token)} is {has[token]} and was {had[token]}" for token in moved[:SHOWN])
    text = f"{len(moved)} tokens have other ids than in {own}: {shown}"
    return f"{text}; give a tokenizer that adds to that one"


def _other_meaning(had: Mapping[str, int], has: Mapping[str, int], own: Path) -> str | None:
    """Return what is wrong where a token that is new would be the one that ends a document, say."""
    was, now = (asdict(SpecialTokens.of(vocabulary)) for vocabulary in (had, has))
    other = [kind for kind in was if was[kind] is not None and was[kind] != now[kind]]
    if not other:
        return None
    names = [next(token for token, number in has.items() if number == ids[other[0]]) for ids in (now, was)]
    return f"{_short(names[0])} would be its {other[0]} token in place of {_short(names[1])}; leave it out"


def _by_id(vocabulary: Mapping[str, int]) -> Sequence[str]:
    return sorted(vocabulary, key=lambda token: vocabulary[token])


def _listed(tokens: Sequence[str]) -> str:
    return ", ".join(map(_short, tokens[:SHOWN]))


def _short(token: str) -> str:
    return repr(token if len(token) <= LONGEST_SHOWN else token[:LONGEST_SHOWN] + "...")
