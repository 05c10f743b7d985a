"""Results produced ahead of their use by one thread, a bounded number of them."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_LOOK = 0.1  # seconds between two looks at whether to stop


class Ahead(Generic[T]):
    """``next()`` gives what calls of ``produce`` return, in order; at most ``most`` results lie ready, one more is being made.

    What a call raises is raised by the ``next()`` whose result it would have been, and by every later one.
    """

    def __init__(self, produce: Callable[[], T], most: int) -> None:
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(most)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        arguments = (produce, self._ready, self._stop)
        # The thread knows nothing of this object, so that forgetting the object ends the thread.
        self._thread = threading.Thread(target=_fill, args=arguments, name="reading ahead", daemon=True)
        weakref.finalize(self, self._stop.set)
        self._thread.start()

    def next(self) -> T:
        """The next result; waits for it."""
        if self._failure is None:
            result, self._failure = self._ready.get()
        if self._failure is not None:
            raise self._failure
        return result  # type: ignore[return-value]

    def close(self, patience: float = 5.0) -> bool:
        """Stop; returns whether the thread has ended within so many seconds (it may hang in a connection)."""
        self._stop.set()
        self._thread.join(patience)
        return not self._thread.is_alive()


def _fill(
    produce: Callable[[], T], ready: queue.Queue[tuple[T | None, BaseException | None]], stop: threading.Event
) -> None:
    while not stop.is_set():
        try:
            made: tuple[T | None, BaseException | None] = produce(), None
        except BaseException as error:  # noqa: BLE001  raised by ``next`` in the thread that waits for it
            made = None, error
        while not stop.is_set():
            try:
                ready.put(made, timeout=_LOOK)
                break
            except queue.Full:
                continue
        if made[1] is not None:
            return
