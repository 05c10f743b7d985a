"""Seconds by phase of the sparse layer (grouping, gather, products, activation, combine), measured only while somebody listens.

>>> with listen() as seconds:
...     y, plan = layer(x)
>>> seconds["products"]

Kernels that run phases inside one call report each phase's mean over threads, so that phases add up to the call; what a thread
waits for the others is the phase "wait".
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_listeners: list[dict[str, float]] = []


@contextmanager
def listen() -> Iterator[dict[str, float]]:
    """Collect seconds by phase until the block ends, forward and backward, from every layer that runs."""
    seconds: dict[str, float] = {}
    _listeners.append(seconds)
    try:
        yield seconds
    finally:
        _listeners[:] = [one for one in _listeners if one is not seconds]  # not ==: empty dicts are equal


def listening() -> bool:
    """Whether anybody wants to know; kernels keep their clocks off otherwise."""
    return bool(_listeners)


def add(name: str, seconds: float) -> None:
    """Report ``seconds`` of a phase."""
    for listener in _listeners:
        listener[name] = listener.get(name, 0.0) + seconds


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Time a block on the host; free when nobody listens."""
    if not _listeners:
        yield
        return
    start = time.perf_counter()
    yield
    add(name, time.perf_counter() - start)
