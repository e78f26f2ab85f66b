from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from bigtrain.data.background import ReadAhead


def thread_names() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("bigtrain-read-ahead"))


def test_items_come_in_order() -> None:
    assert list(ReadAhead(range(50), 3)) == list(range(50))


def test_nothing_is_an_iteration_too() -> None:
    assert list(ReadAhead([], 2)) == []


def test_reads_no_further_than_its_depth() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    ahead = ReadAhead(items(), 2)
    iterator = iter(ahead)
    assert next(iterator) == 0
    time.sleep(0.05)
    assert made == [0, 1, 2]
    ahead.close()


def test_items_are_made_in_another_thread() -> None:
    assert next(iter(ReadAhead((threading.current_thread().name for _ in range(1)), 1))).startswith("bigtrain-read")


def test_exceptions_are_raised_where_the_item_is_waited_for() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("broken")

    iterator = iter(ReadAhead(items(), 4))
    assert next(iterator) == 1
    with pytest.raises(KeyError, match="broken"):
        next(iterator)


def test_close_ends_the_thread() -> None:
    before = thread_names()
    ahead = ReadAhead(iter(int, 1), 2)
    iterator = iter(ahead)
    assert next(iterator) == 0
    assert len(thread_names()) == len(before) + 1
    ahead.close()
    assert thread_names() == before


def test_leaving_the_iteration_ends_the_thread() -> None:
    before = thread_names()
    for _ in ReadAhead(iter(int, 1), 2):
        break
    assert thread_names() == before


def test_close_twice() -> None:
    ahead = ReadAhead([1], 1)
    ahead.close()
    ahead.close()
    assert list(ahead) == []


def test_an_iteration_that_is_left_open_ends_quietly_with_the_interpreter() -> None:
    script = (
        "from bigtrain.data.background import ReadAhead\n"
        "import itertools\n"
        "left_open = iter(ReadAhead(itertools.count(), 2))\n"
        "print(next(left_open))\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("0\n", "")
