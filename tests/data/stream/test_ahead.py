"""A thread that works ahead: in order, bounded, honest about failures, gone when nobody waits for it."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Callable

import pytest

from moesaic.data.stream.ahead import Ahead
from moesaic.errors import DataError


def until(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    return true()


def threads() -> int:
    return sum(thread.name == "reading ahead" for thread in threading.enumerate())


def test_results_come_in_order_and_no_more_than_allowed_are_made() -> None:
    made: list[int] = []
    counter = itertools.count()

    def produce() -> int:
        made.append(next(counter))
        return made[-1]

    ahead = Ahead(produce, most=3)
    assert until(lambda: len(made) == 4)  # three lie ready, one waits for room
    time.sleep(0.3)
    assert len(made) == 4
    assert [ahead.next() for _ in range(20)] == list(range(20))
    assert len(made) <= 24
    assert ahead.close()


def test_a_failure_comes_at_its_place_and_stays() -> None:
    answers = iter([1, 2])

    def produce() -> int:
        try:
            return next(answers)
        except StopIteration:
            raise DataError("broken here") from None

    ahead = Ahead(produce, most=5)
    assert until(lambda: threads() == 0)
    assert [ahead.next(), ahead.next()] == [1, 2]
    for _ in range(2):
        with pytest.raises(DataError, match="broken here"):
            ahead.next()
    assert ahead.close()


def test_the_thread_ends_when_it_is_closed_or_forgotten() -> None:
    before = threads()
    closed, forgotten = Ahead(lambda: 1, most=1), Ahead(lambda: 1, most=1)
    assert threads() == before + 2
    assert closed.close()
    assert threads() == before + 1
    del forgotten
    gc.collect()
    assert until(lambda: threads() == before)


def test_a_hanging_thread_is_left_behind() -> None:
    gate = threading.Event()
    ahead = Ahead(gate.wait, most=1)
    assert not ahead.close(patience=0.05)
    gate.set()
    assert until(lambda: threads() == 0)
