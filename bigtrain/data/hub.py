"""Documents and tokenizers from the Hugging Face hub, with a quick answer when it cannot be reached."""

from __future__ import annotations

import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bigtrain.config.schema import DataSection
from bigtrain.data.decoding import data_error
from bigtrain.data.readers import ANOTHER_COLUMN, KNOWN_SUFFIXES, TEXT_COLUMN, text_of, texts_in
from bigtrain.errors import DataError

PROBE_SECONDS = 5.0
BATCH_ROWS = 256

TEXT_TYPES = ("string", "large_string", "string_view")

_INSTEAD = f"use data.source: embedded, or a folder of files: {KNOWN_SUFFIXES}"
_ASK = "ask for access on its page, then say who you are by HF_TOKEN or: hf auth login"


def hub_texts(data: DataSection, name: str, origin: str) -> Iterator[str]:
    """Yield the texts of a hub data set, from the local cache of `datasets` when the hub cannot be reached."""
    for texts in HubRows(data, name, origin):
        yield from texts


class HubRows:
    """The texts of a hub data set by batches of rows; of a streamed one it knows where it is, and goes on there.

    `state` is what another stream of the same data returned as its own, after `rows` rows.
    """

    def __init__(
        self, data: DataSection, name: str, origin: str, state: Mapping[str, Any] | None = None, rows: int = 0
    ) -> None:
        self._name, self._origin, self._column = name, origin, data.text_column
        self._dataset = _opened(data, name, origin)
        self._resumed = state is not None
        if state is not None:
            self._dataset.load_state_dict(dict(state))
        self.rows = rows
        """Rows that were read, those before the state included."""

    def __iter__(self) -> Iterator[list[str]]:
        batches = self._dataset.iter(batch_size=BATCH_ROWS)
        while (batch := self._next(batches)) is not None:
            texts = batch[self._column]
            for row, text in enumerate(texts, start=self.rows + 1):
                text_of({self._column: text}, self._column, f"{self._name} row {row}")
            self.rows += len(texts)
            yield texts

    def state(self) -> dict[str, Any]:
        """Return the place after the rows that were yielded last, as JSON values; of a stream alone."""
        state: dict[str, Any] = self._dataset.state_dict()
        return state

    def _next(self, batches: Iterator[Any]) -> Any:
        import datasets
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx, or of its successor

        try:
            return next(batches, None)
        except (OSError, ValueError, EOFError, datasets.exceptions.DatasetsError, HTTPError) as error:
            text = f"reading {self._name!r} broke off after row {self.rows}: {_first_line(error)}"
            raise data_error(self._origin, f"{text}; run again to go on after the last finished shard") from error
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            if not self._resumed:
                raise
            text = f"reading {self._name!r} cannot go on after row {self.rows}: it is another data set than it was"
            raise data_error(self._origin, f"{text}; use another data.cache") from error


def _opened(data: DataSection, name: str, origin: str) -> Any:
    """Return a data set of the text column alone; raises DataError where there is none, or it holds no text."""
    dataset = _load(data, name, origin)
    columns = dataset.column_names or list(next(iter(dataset), {}))  # a stream may know them from its rows alone
    if data.text_column not in columns:
        text = f"no column {data.text_column!r} in {name}; there are: {', '.join(columns)}; write one of them"
        raise data_error(origin, text, TEXT_COLUMN)
    held = _held(dataset.features or {}, data.text_column)
    if held not in TEXT_TYPES:
        texts = [column for column in columns if _held(dataset.features, column) in TEXT_TYPES]
        text = f"column {data.text_column!r} of {name} holds {held}, not text{texts_in(texts)}; {ANOTHER_COLUMN}"
        raise data_error(origin, text, TEXT_COLUMN)
    return dataset.select_columns([data.text_column])


def _held(features: Mapping[str, Any], column: str) -> str:
    """Return the type of a column, by its name in `datasets`; of one that is not known yet, that of text."""
    kind = features.get(column)
    return TEXT_TYPES[0] if kind is None else str(getattr(kind, "dtype", None) or type(kind).__name__)


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
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise _hub_fault(name, origin, online, error) from error


def _hub_fault(name: str, origin: str, online: bool, error: Exception) -> DataError:
    from huggingface_hub.errors import GatedRepoError

    if isinstance(error.__cause__, GatedRepoError):
        return data_error(origin, f"the hub says: {_first_line(error)}; {_ASK}")
    reason = f"the hub says: {_first_line(error)}" if online else "the Hugging Face hub cannot be reached"
    return data_error(origin, f"{name!r} is no file or folder here, and {reason}; {_INSTEAD}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
