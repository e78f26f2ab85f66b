"""Documents and tokenizers from the Hugging Face hub, with a quick answer when it cannot be reached."""

from __future__ import annotations

import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigtrain.config.schema import DataSection
from bigtrain.data.decoding import data_error
from bigtrain.data.readers import KNOWN_SUFFIXES, TEXT_COLUMN, text_of
from bigtrain.errors import DataError

PROBE_SECONDS = 5.0
BATCH_ROWS = 256

_INSTEAD = f"use data.source: embedded, or a folder of files: {KNOWN_SUFFIXES}"


def hub_documents(data: DataSection, name: str, origin: str) -> Iterator[str]:
    """Yield the texts of a hub data set, from the local cache of `datasets` when the hub cannot be reached."""
    dataset = _load(data, name, origin)
    columns = dataset.column_names or list(next(iter(dataset), {}))  # a stream may know them from its rows alone
    if data.text_column not in columns:
        text = f"no column {data.text_column!r} in {name}; there are: {', '.join(columns)}; write one of them"
        raise data_error(origin, text, TEXT_COLUMN)
    row = 0
    for batch in dataset.select_columns([data.text_column]).iter(batch_size=BATCH_ROWS):
        for text in batch[data.text_column]:
            row += 1
            yield text_of({data.text_column: text}, data.text_column, f"{name} row {row}")


def hub_tokenizer_file(name: str, origin: str) -> Path:
    """Return the tokenizer.json of a hub repository, downloaded or cached."""
    reachable = _prepare_environment()
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(huggingface_hub.hf_hub_download(name, "tokenizer.json", local_files_only=not reachable))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = _first_line(error) if reachable else "the Hugging Face hub cannot be reached"
        text = f"{name!r} is no file or folder here, and {reason}; use data.tokenizer: train, or a tokenizer.json"
        raise data_error(origin, text, "data.tokenizer") from error


def cached_tokenizer_file(name: str) -> Path | None:
    """Return the tokenizer.json of a hub repository if it is in the local cache; asks nothing of the network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def reachable(seconds: float = PROBE_SECONDS) -> bool:
    """Return whether the hub answers within this time, which also bounds the name resolution."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    answers: list[bool] = []
    probe = threading.Thread(target=lambda: answers.append(_answers(seconds)), daemon=True)
    probe.start()
    probe.join(seconds)
    return answers == [True]


def _answers(seconds: float) -> bool:
    request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=seconds).close()
    except urllib.error.HTTPError:
        return True  # an answer, whatever it says
    except OSError:
        return False
    return True


def _prepare_environment() -> bool:
    """Tell the Hugging Face libraries, which read this once when imported, whether to try the network at all."""
    online = reachable()
    if not online:
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.stdout.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return online


def _load(data: DataSection, name: str, origin: str) -> Any:
    online = _prepare_environment()
    import datasets

    datasets.logging.set_verbosity_error()
    if not sys.stdout.isatty():
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, data.subset, split=data.split, streaming=data.streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _hub_fault(name, origin, online, error) from error


def _hub_fault(name: str, origin: str, online: bool, error: Exception) -> DataError:
    reason = f"the hub says: {_first_line(error)}" if online else "the Hugging Face hub cannot be reached"
    return data_error(origin, f"{name!r} is no file or folder here, and {reason}; {_INSTEAD}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
