from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.data.seen import DIGEST, Seen, digests_of


def test_digests_tell_texts_apart() -> None:
    digests = digests_of(["a", "b", "a", "é", ""])
    assert digests.dtype == np.dtype(DIGEST) and len(digests.tobytes()) == 16 * 5
    assert digests[0] == digests[2] and len(set(digests.tolist())) == 4
    assert len(digests_of([])) == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), max_size=12), max_size=30))
def test_each_text_is_new_once(batches: list[list[int]]) -> None:
    seen, known = Seen(), set[int]()
    for batch in batches:
        expected = []
        for number in batch:
            expected.append(number not in known)
            known.add(number)
        assert seen.add(digests_of([str(number) for number in batch])).tolist() == expected
    assert len(seen) == len(known)


def test_sixteen_bytes_each() -> None:
    seen = Seen()
    for start in range(0, 20_000, 500):
        assert seen.add(digests_of([str(number) for number in range(start, start + 500)])).all()
    runs = seen._runs
    assert sum(run.nbytes for run in runs) == 16 * 20_000
    assert len(runs) <= 8
    assert all((run[1:] > run[:-1]).all() for run in runs)


def test_digests_that_end_in_zeros_are_told_apart() -> None:
    near = np.frombuffer(b"\1" + bytes(15) + b"\1" + bytes(14) + b"\2" + bytes(16), DIGEST)
    assert Seen().add(near).all()
