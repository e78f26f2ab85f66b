"""Every source that `data.source` can name, as one stream of documents."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bigtrain.config.paths import is_local, local_path
from bigtrain.config.schema import DataSection, Recipe
from bigtrain.data.decoding import Meter, data_error
from bigtrain.data.embedded import embedded_documents, library_digest
from bigtrain.data.hub import hub_texts
from bigtrain.data.readers import KNOWN_SUFFIXES, cut_at_lines, file_format, read_documents
from bigtrain.data.selection import passes
from bigtrain.errors import DataError, Fault

EMBEDDED = "embedded"
SOURCE_KEY, MIXTURE_KEY = "data.source", "data.mixture"
SAMPLE_STRIDE = 3
"""Of the embedded documents every third is enough for a tokenizer, and they come from the whole library."""

NOT_DOCUMENTS = frozenset({"dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json"})
"""What `datasets` writes beside the data in a folder that it saved."""


def documents(data: DataSection, origin: str = "", meter: Meter | None = None) -> Iterator[str]:
    """Yield every document of a source in a fixed order, in constant memory.

    `origin` is where the recipe names the source, for faults that lie in no file. Raises DataError at the first
    fault in the data; all faults of the paths themselves are in one error.
    """
    if data.source == EMBEDDED:
        yield from embedded_documents()
    elif (name := hub_name(data)) is not None:
        for text in hub_texts(data, name, origin):
            yield from cut_at_lines(text)
    else:
        meter = meter or Meter()
        for file in source_files(data, origin):
            yield from read_documents(file, data.text_column, meter)


def sample(data: DataSection, origin: str, characters: int) -> Iterator[str]:
    """Yield documents of about this many characters in all, of those that pass the recipe's filter.

    Of files an equal share each, of a mixture's sources by their weights, else the start.
    """
    wanted = partial(filter, partial(passes, data))
    if data.mixture is not None:
        total = sum(weight for _, weight in members(data))
        with told_of_mixture():
            for source, weight in members(data):
                yield from sample(source, origin, math.ceil(characters * weight / total))
    elif data.source == EMBEDDED:
        chosen = (text for number, text in enumerate(embedded_documents()) if number % SAMPLE_STRIDE == 0)
        yield from _up_to(characters, wanted(chosen))
    elif hub_name(data) is not None:
        yield from _up_to(characters, wanted(documents(data, origin)))
    else:
        files = source_files(data, origin)
        share = -(-characters // len(files))
        each = (_up_to(share, wanted(read_documents(file, data.text_column, Meter()))) for file in files)
        yield from _up_to(characters, (text for texts in each for text in texts))


def members(data: DataSection) -> list[tuple[DataSection, float]]:
    """Return the sources of a mixture that have a weight, each as if it stood alone, with its weight."""
    found = []
    for entry in data.mixture or []:
        own = {name: value for name, value in entry if value is not None and name != "weight"}
        if entry.weight:
            found.append((data.model_copy(update={**own, "mixture": None}), entry.weight))
    return found


@contextmanager
def told_of_mixture() -> Iterator[None]:
    """Let faults of a mixture's source name the key where it is written."""
    try:
        yield
    except DataError as error:
        keys = {SOURCE_KEY: MIXTURE_KEY}
        raise DataError(*(fault._replace(key=keys.get(fault.key, fault.key)) for fault in error.faults)) from error


def source_origin(recipe: Recipe) -> str:
    """Return where a recipe says what its source is, or what its sources are."""
    return recipe.origin(SOURCE_KEY if recipe.data.mixture is None else MIXTURE_KEY)


def identity(data: DataSection, origin: str = "") -> dict[str, Any]:
    """Return what tells this source from another, or from itself after a change, as JSON values."""
    if data.mixture is not None:
        with told_of_mixture():
            return {"mixture": [[identity(source, origin), weight] for source, weight in members(data)]}
    if data.source == EMBEDDED:
        return {"embedded": platform.python_version(), "library": library_digest()}
    if (name := hub_name(data)) is not None:
        return {"hub": name, "subset": data.subset, "split": data.split, "column": data.text_column}
    described = []
    for file in source_files(data, origin):
        status = file.stat()
        described.append([str(file), status.st_size, status.st_mtime_ns])
    return {"files": described, "column": data.text_column}


def hub_name(data: DataSection) -> str | None:
    """Return the hub id that the source is, or None where it is embedded or names paths."""
    if isinstance(data.source, str) and data.source != EMBEDDED and not is_local(data.source):
        return data.source
    return None


def source_files(data: DataSection, origin: str = "") -> list[Path]:
    """Return the files of a source as absolute paths, folders searched through and sorted.

    Raises DataError with a fault for each path that is absent, empty, or of an unknown type.
    """
    files: list[Path] = []
    faults: list[Fault] = []
    for name in [data.source] if isinstance(data.source, str) else data.source:
        try:
            files += _files_at(local_path(name).absolute(), name, origin)
        except DataError as error:
            faults += error.faults
    if faults:
        raise DataError(*faults)
    return files


def total_bytes(data: DataSection, origin: str = "") -> int | None:
    """Return the bytes of a source's files on the disk, or None where it has no files."""
    if data.source == EMBEDDED or hub_name(data) is not None:
        return None
    return sum(file.stat().st_size for file in source_files(data, origin))


def _files_at(path: Path, name: str, origin: str) -> list[Path]:
    if path.is_dir():
        if not (found := sorted(_walk(path))):
            raise data_error(
                origin, f"no file of a known type in {name}; name another folder; known are {KNOWN_SUFFIXES}"
            )
        return found
    if not path.exists():
        instead = "it stands alone, not in a list" if name == EMBEDDED else "name files and folders that are there"
        raise data_error(origin, f"no such file or folder: {name}; {instead}")
    if file_format(path) is None:
        raise data_error(origin, f"unknown file type: {name}; known are {KNOWN_SUFFIXES}")
    if not path.stat().st_size:
        raise data_error(str(name), "the file is empty; leave it out")
    return [path]


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and name not in NOT_DOCUMENTS and file_format(Path(name)):
                yield Path(place, name)


def _up_to(characters: int, texts: Iterable[str]) -> Iterator[str]:
    taken = 0
    for text in texts:
        if taken >= characters:
            return
        yield text
        taken += len(text)
