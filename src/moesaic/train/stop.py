"""A clean stop on Ctrl-C or SIGTERM: the first signal asks the run to end after its step, a second one interrupts at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """``with StopRequest(say) as stop: ... if stop.requested: ...``. Outside the block signals work as before.

    ``resume_with`` is the command named to the user when a second signal ends the block at once.
    """

    def __init__(self, say: Callable[[str], None] | None = None, resume_with: str = "") -> None:
        self.requested = False
        self._resume_with = resume_with
        self._say = say or (lambda _: None)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        if kind is KeyboardInterrupt and self._resume_with:
            self._say(f"Stopped at once. Go on from the last checkpoint with: {self._resume_with}")

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Printing while the same stream is being written to is refused; the stop counts all the same.
        with suppress(RuntimeError):
            self._say(
                f"{signal.Signals(number).name}: finishing this step and saving a checkpoint (again to stop at once) ..."
            )
