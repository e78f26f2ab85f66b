"""The documents of a source in their order, and the place where reading stands: another process goes on there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from bigtrain.config.schema import DataSection
from bigtrain.data.decoding import Meter
from bigtrain.data.hub import HubRows
from bigtrain.data.readers import cut_at_lines
from bigtrain.data.sources import documents, hub_name


class Mark(NamedTuple):
    """A place in a source: after this many documents of what follows the state of a stream, or of all without one."""

    documents: int = 0
    rows: int = 0
    """Rows of the stream before its state."""
    stream: dict[str, Any] | None = None


START = Mark()


class Reading:
    """Iterate over the documents after a mark; may be iterated once.

    Of a streamed hub data set only the file that was being read is opened again; files and downloaded data sets, which
    are here, are read from their start and passed over.
    """

    def __init__(self, data: DataSection, origin: str = "", meter: Meter | None = None, mark: Mark = START) -> None:
        self._texts = self._streamed(data, origin) if is_streamed(data) else documents(data, origin, meter)
        self._skipped = mark.documents
        self.mark = Mark(0, mark.rows, mark.stream)
        """The place after the document that was yielded last."""

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.mark = self.mark._replace(documents=self.mark.documents + 1)
            if self._skipped:
                self._skipped -= 1
            else:
                yield text

    def _streamed(self, data: DataSection, origin: str) -> Iterator[str]:
        name = hub_name(data)
        assert name is not None
        stream = HubRows(data, name, origin, self.mark.stream, self.mark.rows)
        for texts in stream:
            for text in texts:
                yield from cut_at_lines(text)
            self.mark = Mark(0, stream.rows, stream.state())


def is_streamed(data: DataSection) -> bool:
    """Tell whether a source is a hub data set that is read while it is downloaded."""
    return data.streaming and hub_name(data) is not None


def mark_of(told: Any) -> Mark:
    """Return a mark that was stored as JSON; raises ValueError for what is none."""
    mark = Mark(*told)
    whole = all(type(number) is int and number >= 0 for number in mark[:2])
    if not whole or not (mark.stream is None or isinstance(mark.stream, dict)):
        raise ValueError("no mark")
    return mark
