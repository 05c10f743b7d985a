"""What this process is doing in which collective: bytes and seconds of each kind, failures in words, an end to hanging.

>>> watch = Watch(rank, timeout_s=600, board=board)
>>> with watch.collective("dispatch", "ep", (0, 2), sent_bytes): ...    # a failure becomes a CollectiveError
>>> with watch.others(): step()                                        # those of FSDP and pipelines too
>>> watch.take()["dispatch"].seconds

A failure names rank, layer and collective, and asks the board who is missing. A thread ends the process in words where a
collective lasts longer than it may: gloo gives up by itself, NCCL may not.
"""

from __future__ import annotations

import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Protocol

import torch
import torch.distributed as dist

from moesaic.errors import MoesaicError
from moesaic.parallel.board import Board, Record, missing

# How gloo, NCCL and the store begin what they say of a connection; other errors of a step are not about collectives.
_CONNECTION = re.compile(
    "Connection (closed|reset|refused)|Application timeout|Timed out waiting|Broken pipe|NCCL|gloo/|wait timeout"
)
_TOO_LONG = re.compile("timed? ?out", re.IGNORECASE)
_SOURCE_PLACE = re.compile(r"^\[[^]]*\] (?:\w+ error \S+: )?")
_ADVICE = re.compile(r"\. This is typically caused by.*")


class CollectiveError(MoesaicError):
    """A collective that failed or took too long; the message names rank, layer and collective."""


@dataclass
class Spent:
    """Calls, bytes sent to other ranks and seconds of one kind of collective."""

    calls: int = 0
    sent_bytes: int = 0
    seconds: float = 0.0


def about_connection(error: BaseException) -> bool:
    """Whether an error of PyTorch is one of a collective."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and _CONNECTION.search(str(error)) is not None


class Mark(Protocol):
    """A place in a device's queue of work, such as ``torch.cuda.Event``."""

    def query(self) -> bool:
        """Whether the device has come past it."""

    def elapsed_time(self, other: Mark) -> float:
        """Milliseconds between two."""


class Watch:
    """Every collective of a process passes through ``collective``.

    Args:
        rank: of this process. timeout_s: what a collective may take; groups are made with it.
        mark: puts a mark into the device's queue. Where collectives are queued (NCCL), marks tell which one hangs and how
            long each took; None where they are done when the call returns (gloo).

    Attributes:
        spent: by name, since ``take``. current: the collective the process is in. entered: collectives entered, by axis.
        queued: collectives between two marks, the oldest first. since: when the process last got on.
        board: where the other ranks are; None where nobody can be asked.
        failed_at, failed: when a collective failed, and the sentence about it.
    """

    def __init__(self, rank: int = 0, timeout_s: float = 600.0, mark: Callable[[], Mark] | None = None) -> None:
        self.rank, self.timeout_s, self.mark = rank, timeout_s, mark
        self.board: Board | None = None
        self.failed_at: float | None = None
        self.failed = ""
        self.spent: dict[str, Spent] = {}
        self.current: Collective | None = None
        self.entered: dict[str, int] = {}
        self.queued: deque[tuple[Collective, Mark, Mark]] = deque()
        self.since = time.perf_counter()
        self._layer = ""

    @property
    def library_timeout(self) -> timedelta:
        """For groups. A library that queues would abort without words, so it gets longer than the limit of our own."""
        return timedelta(seconds=self.timeout_s if self.mark is None else 1.5 * self.timeout_s + 10)

    @property
    def layer(self) -> str:
        """Where the model is ("layer 3"), set by hooks (``layers.py``); empty outside."""
        return self._layer

    @layer.setter
    def layer(self, name: str) -> None:
        self._layer = name
        self.since = time.perf_counter()

    def collective(self, what: str, axis: str, ranks: tuple[int, ...], sent_bytes: int) -> Collective:
        """A context around one collective: counts it; a failure becomes ``CollectiveError``."""
        return Collective(self, what, axis, ranks, sent_bytes)

    @contextmanager
    def others(self) -> Iterator[None]:
        """Around code with collectives that are not ours: a lost connection in there becomes ``CollectiveError``, too."""
        try:
            yield
        except RuntimeError as error:
            if not about_connection(error):
                raise
            raise self.failure(str(error)) from error

    def take(self) -> dict[str, Spent]:
        """What was spent since the last call; seconds of what is still queued come with a later one."""
        self.drain()
        spent, self.spent = self.spent, {}
        return spent

    def drain(self) -> None:
        """Book the time of queued collectives that are done."""
        while self.queued and self.queued[0][2].query():
            entry, begin, end = self.queued.popleft()
            self.spent.setdefault(entry.what, Spent()).seconds += begin.elapsed_time(end) / 1e3

    def beside(self, main: Watch) -> None:
        """For the watch of another thread: ask the board of ``main``, and tell on it what is entered here."""
        self.board, self.entered = main.board, main.entered

    def record(self) -> Record:
        """For the board."""
        entry = self.current
        doing = "" if entry is None else entry.name
        return Record(self._layer, doing, dict(self.entered), time.perf_counter() - self.since)

    def failure(self, reason: str, entry: Collective | None = None) -> CollectiveError:
        """What happened, in words. Asks the board who is missing, which takes up to some seconds, and ends it."""
        self.failed_at = time.perf_counter()
        name = "a collective of FSDP or of the pipeline" if entry is None else entry.full_name
        where = f" in {self._layer}" if self._layer else ""
        if _TOO_LONG.search(reason):
            sentence = f"Rank {self.rank}: {name} took longer than {self.timeout_s:g} s{where}."
        else:
            said = _ADVICE.sub("", _SOURCE_PLACE.sub("", reason.strip().splitlines()[0])).rstrip(". ")
            sentence = f"Rank {self.rank}: {name} failed{where}: {said}."
        if self.board is not None:
            with _signals_ignored(), self.board.speaking:
                if self.board.ended is None:
                    words, blames = self._missing(self.board, entry)
                    if words:
                        sentence += f" {words[0].upper()}{words[1:]}."
                    self.board.end(sentence, blames)
                sentence = self.board.ended or sentence  # where a collective of another thread has failed before, its
        self.failed = sentence
        return CollectiveError(sentence)

    def _missing(self, board: Board, entry: Collective | None) -> tuple[str, tuple[int, ...]]:
        ranks = range(board.world) if entry is None else entry.ranks
        others = [rank for rank in ranks if rank != self.rank]
        if not others:
            return "", ()
        sights = board.look(others)
        if not sights:
            return "the store of the run does not answer: its node, or the way there, is gone", ()
        axis = "" if entry is None else entry.axis
        words, blames = missing(sights, axis, self.entered.get(axis, 0))
        return words or "all others answer and wait, too: a connection is broken, or they do different things", blames


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """torchrun stops the others as soon as one process has died, and they are about to say which one it was."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Collective:
    """One collective, entered and left by ``with``."""

    __slots__ = ("axis", "begin", "ranks", "sent_bytes", "started", "watch", "what")

    def __init__(self, watch: Watch, what: str, axis: str, ranks: tuple[int, ...], sent_bytes: int) -> None:
        self.watch, self.what, self.axis, self.ranks, self.sent_bytes = watch, what, axis, ranks, sent_bytes
        self.started = 0.0
        self.begin: Mark | None = None

    @property
    def name(self) -> str:
        """ "dispatch over ep"."""
        return f"{self.what} over {self.axis}"

    @property
    def full_name(self) -> str:
        """ "dispatch over ep with ranks 0, 2"."""
        return f"{self.name} with ranks {', '.join(map(str, self.ranks))}"

    def __enter__(self) -> None:
        watch = self.watch
        watch.entered[self.axis] = watch.entered.get(self.axis, 0) + 1
        if watch.mark is not None:
            self.begin = watch.mark()
        watch.current = self
        watch.since = self.started = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        watch = self.watch
        if error is not None:
            if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
                raise watch.failure(str(error), self) from error  # still in it, for all that look
            watch.current = None
            return
        watch.current = None
        watch.since = now = time.perf_counter()
        spent = watch.spent.setdefault(self.what, Spent())
        spent.calls += 1
        spent.sent_bytes += self.sent_bytes
        if self.begin is None or watch.mark is None:
            spent.seconds += now - self.started
        else:
            watch.queued.append((self, self.begin, watch.mark()))
            if len(watch.queued) % 256 == 0:  # nobody may ever take
                watch.drain()
