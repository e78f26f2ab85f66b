"""An iterator that is read ahead by a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar, cast

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Iterate over `items` while a thread makes the next `depth` of them; may be iterated once.

    What making an item raises is raised where that item is waited for. `close` stops the thread after the item that
    it is making; so does the end of the iteration, whichever way it ends.
    """

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self._items = iter(items)
        self._end = object()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bigtrain-read-ahead")
        self._waiting: deque[Future[object]] = deque(self._begin() for _ in range(depth))

    def __iter__(self) -> Iterator[T]:
        try:
            while self._waiting:
                item = self._waiting.popleft().result()
                if item is self._end:
                    return
                self._waiting.append(self._begin())
                yield cast(T, item)
        finally:
            self.close()

    def close(self) -> None:
        """Stop the thread and wait until it has ended."""
        # Not `shutdown(cancel_futures=True)`: that fails where an iteration is only given up as the interpreter ends.
        while self._waiting:
            self._waiting.pop().cancel()
        self._thread.shutdown(wait=True)

    def _begin(self) -> Future[object]:
        return self._thread.submit(next, self._items, self._end)
