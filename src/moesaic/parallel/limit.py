"""An end to hanging: a thread that ends the process in words where nothing else can.

gloo raises by itself when a collective takes too long; NCCL may wait for ever, and a main thread that is stuck between
collectives makes the others wait. So this thread looks at the ``Watch`` and, past the limit, prints one sentence and exits
the process, without unwinding: the main thread cannot be interrupted. After a failure it sees to it that the process ends: what
cleans up may wait for a rank that is gone.
"""

from __future__ import annotations

import os
import sys
import threading
import time

from moesaic.parallel.board import EXIT_STATUS
from moesaic.parallel.torchrun import tell_torchrun
from moesaic.parallel.watch import Watch

UNWINDING_S = 10.0  # from a failed collective to the end of the process


class Limit:
    """Watches the watch.

    Args:
        limit_s: what a collective may take. quiet_s: what may pass without one, and without entering a layer, once the model
            has run; long, since checkpoints and compilation take their time.
        parent: the process that started this one and has to outlive it (torchrun): without it nobody would end or restart this
            process, and a second start would write to the same folders. None where it may end.
    """

    def __init__(self, watch: Watch, limit_s: float, quiet_s: float, parent: int | None = None) -> None:
        self._watch, self._limit_s, self._quiet_s, self._parent = watch, limit_s, quiet_s, parent
        self._stop, self._left = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="moesaic-limit", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """The run is over and went well."""
        self._stop.set()

    def leave(self) -> None:
        """The run has failed and said so; only the interpreter's own end is still watched."""
        self._left = True

    def _run(self) -> None:
        while not self._stop.wait(min(1.0, self._limit_s / 5)):
            if self._left:
                self._see_off()
                continue
            if self._parent is not None and os.getppid() != self._parent:
                self._exit(f"Rank {self._watch.rank}: the torchrun that started it is gone.")
            self._look()

    def _look(self) -> None:
        watch, now = self._watch, time.perf_counter()
        if watch.failed_at is not None:
            if now - watch.failed_at > UNWINDING_S:
                self._exit(watch.failed or f"Rank {watch.rank}: a collective failed.")
            return
        entry = watch.current
        if watch.queued:
            oldest, _, end = watch.queued[0]
            if not end.query():
                entry = oldest
        if entry is not None and now - entry.started > self._limit_s:
            self._exit(str(watch.failure("timed out", entry)))
        if entry is None and watch.layer and now - watch.since > self._quiet_s:
            sentence = f"Rank {watch.rank}: nothing has happened for {now - watch.since:.0f} s in {watch.layer}."
            if watch.board is not None:
                watch.board.end(sentence)
            self._exit(sentence)

    def _see_off(self) -> None:
        # Threads of executors are joined before anything of ours could run.
        if getattr(threading, "_SHUTTING_DOWN", False) and not self._stop.wait(UNWINDING_S):
            os._exit(EXIT_STATUS)

    def _exit(self, sentence: str) -> None:
        if self._stop.is_set():
            return
        print(f"moesaic: {sentence}", file=sys.stderr, flush=True)
        tell_torchrun(sentence)
        os._exit(EXIT_STATUS)
