"""Save while training goes on: what is to be saved is copied to main memory, and a thread writes the copy.

>>> saver = AsyncSaver(saving_group(range(world), rank))                  # once, on every rank
>>> saver.save(lambda tensors, extra, group: save_sharded(folder, tensors, extra, group=group), tensors, {"step": 100})
>>> saver.wait()                                                          # before anything else saves to the same place

The thread has a group of its own: on the group of training, its collectives and theirs would meet in another order on every
rank, which hangs. One save at a time; an error of the thread is raised by the next call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist

from moesaic.parallel.comm import Group
from moesaic.parallel.watch import Watch
from moesaic.train.sharded.entries import Tensors, local_of

Write = Callable[[Tensors, dict[str, Any], Group], object]


def saving_group(ranks: Sequence[int], rank: int, timeout_s: float = 3600.0) -> Group:
    """A group for checkpoints alone, on gloo whatever training runs on; every rank must make it at the same time.

    ``timeout_s`` is long: a rank with little to write waits for the one with the most.
    """
    watch = Watch(rank, timeout_s)
    if len(ranks) == 1:
        return Group("saving", ranks, rank, None, watch)
    handle = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_s), backend="gloo")
    return Group("saving", ranks, rank, handle, watch)


class AsyncSaver:
    """Saves in the background over ``group``, which nothing else may use meanwhile."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="moesaic-save")
        self._running: Future[object] | None = None

    def save(self, write: Write, tensors: Tensors, extra: dict[str, Any]) -> None:
        """Copy ``tensors`` and ``extra`` now, and call ``write(copy of tensors, copy of extra, group)`` in the background.

        Every rank calls it at the same step. First waits for the save before, raising what that raised. What the caller does to
        the tensors afterwards is not saved. Needs main memory for what this rank holds, until it is written.
        """
        self.wait()
        staged = {name: (held, local_of(x).to("cpu", copy=True)) for name, (held, x) in tensors.items()}
        self._running = self._pool.submit(write, staged, copy.deepcopy(extra), self.group)

    @property
    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._running is not None and not self._running.done()

    def check(self) -> None:
        """Raise what the last save raised, if it has failed by now; never waits."""
        if not self.busy:
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written; raises what the last save raised, once."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """``wait``, and end the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:  # its own error must not hide the one that is on its way
            self._pool.shutdown(wait=False)
