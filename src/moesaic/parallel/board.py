"""Where every rank of a run is, on a board that all can read: the store of ``torch.distributed``.

Each rank's record is written once a second by a thread of its own, so it says two things: what the rank is doing, and, by a
number that grows, that its process is alive. When a collective fails the survivors read the others' records for a little
while: who no longer writes does not answer, whatever clocks say.

>>> board = Board(store, rank=0, world=4, describe=lambda: Record(layer="layer 3"))
>>> board.start()
>>> board.look([2, 3])             # {2: Sight(Record(...), alive=True), 3: Sight(Record(...), alive=False)}
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

EXIT_STATUS = 3  # of a process that cannot end in order
SHOWN = 4  # ranks named one by one
SILENCE = 2.5  # beats without a sign of life that make a rank one that does not answer


@dataclass(frozen=True)
class Record:
    """What a rank says of itself. Plain JSON data.

    Attributes:
        layer: where its model is ("layer 3"), or nothing. doing: the collective it waits in, or nothing.
        entered: how many collectives it has entered on each axis. since_s: seconds without progress.
        beat: grows with every record. at: wall-clock time of the record.
        ended: why it ended, in words; None while it runs. blames: the ranks it ended for.
    """

    layer: str = ""
    doing: str = ""
    entered: dict[str, int] = field(default_factory=dict)
    since_s: float = 0.0
    beat: int = 0
    at: float = 0.0
    ended: str | None = None
    blames: tuple[int, ...] = ()

    def place(self) -> str:
        """ "in the backward of layer 2, in combine over ep", or what is known of it."""
        parts = [f"in {self.layer}" if self.layer else "outside the model"]
        parts.append(f"in {self.doing}" if self.doing else "between collectives")
        return ", ".join(parts)


@dataclass(frozen=True)
class Sight:
    """A rank's last record, and whether it was written while we looked."""

    record: Record
    alive: bool


class Board:
    """This rank's record, kept fresh by a thread, and a look at those of others.

    Args:
        store: of the run; the thread uses a connection of its own.
        describe: called by the thread, about once per ``beat_s``.
        beat_s: seconds between records; in large worlds longer, so that the store sees at most 500 records a second.

    Attributes:
        speaking: held by the thread that looks and then ends the board; another may fail at the same time.
    """

    def __init__(
        self, store: Store, rank: int, world: int, describe: Callable[[], Record], beat_s: float = 1.0
    ) -> None:
        self.rank, self.world, self.beat_s = rank, world, max(beat_s, world / 500)
        self._store = store.clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=5 * self.beat_s))
        self._describe = describe
        self._end: Record | None = None
        self._beat = 0
        self._wanted: Sequence[int] = ()
        self._seen: dict[int, list[Record]] = {}
        self.speaking = threading.Lock()
        self._wake, self._answer = threading.Event(), threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="moesaic-board", daemon=True)

    def start(self) -> None:
        """Write the first record, here, and go on in a thread. All ranks must have started before any of them looks."""
        self._write()
        self._thread.start()
        atexit.register(self._at_exit)

    def end(self, why: str, blames: Sequence[int] = ()) -> None:
        """The last record, for those who look later; waits for it to be written, but not for long."""
        if self._closing:
            return
        self._end = replace(self._describe(), ended=why, blames=tuple(blames))
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(2 * self.beat_s)

    @property
    def ended(self) -> str | None:
        """What ``end`` was told."""
        return None if self._end is None else self._end.ended

    def _at_exit(self) -> None:
        """Where the way to the store is cut, the thread may wait in it for ever, and the interpreter would abort over that."""
        if self._thread.is_alive() and self._closing:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_STATUS)

    def look(self, ranks: Sequence[int]) -> dict[int, Sight]:
        """Records of ``ranks``, once each has shown whether it lives; takes up to 2.5 beats.

        Empty where the store does not answer: its host, or the way there, is gone.
        """
        if not self._thread.is_alive():
            return {}
        self._seen = {rank: [] for rank in ranks}
        self._answer.clear()
        self._wanted = tuple(ranks)
        self._wake.set()
        self._answer.wait((SILENCE + 1) * self.beat_s)
        self._wanted = ()
        seen = {rank: list(records) for rank, records in self._seen.items()}
        if not all(seen.values()):
            return {}
        return {rank: Sight(records[-1], _lives(records)) for rank, records in seen.items()}

    def _run(self) -> None:
        until = 0.0
        while not self._closing:
            try:
                self._write()
                if self._wanted:
                    until = until or time.monotonic() + SILENCE * self.beat_s
                    self._read()
                    if time.monotonic() > until or all(map(_lives, self._seen.values())):
                        self._wanted = ()
                        self._answer.set()
                if not self._wanted:
                    until = 0.0
            except RuntimeError:  # the store is gone; a look then finds no thread
                self._answer.set()
                return
            # Looking needs to see the next beat soon after it was written.
            self._wake.wait(self.beat_s / (4 if self._wanted else 1))
            self._wake.clear()
        try:
            self._write()
        except RuntimeError:
            return

    def _write(self) -> None:
        self._beat += 1
        record = replace(self._end or self._describe(), beat=self._beat, at=time.time())
        self._store.set(_key(self.rank), json.dumps(asdict(record)))

    def _read(self) -> None:
        for rank, text in zip(self._wanted, self._store.multi_get([_key(rank) for rank in self._wanted]), strict=True):
            values = json.loads(text)
            self._seen[rank].append(Record(**{**values, "blames": tuple(values["blames"])}))


def missing(sights: Mapping[int, Sight], axis: str, entered: int) -> tuple[str, tuple[int, ...]]:
    """Who is missing in a collective, in words, and their ranks; both empty where everybody is there.

    Args:
        sights: of the other ranks of the group. axis: of the group; "" where the collective is not one of ours, and nobody can
            tell who has entered it. entered: how many collectives this rank has entered on that axis, this one included.
    """
    found: dict[int, str] = {}
    second_hand: dict[int, str] = {}
    for rank, sight in sorted(sights.items()):
        record = sight.record
        if record.blames:
            second_hand[rank] = f"rank {rank} has ended because of rank {', '.join(map(str, record.blames))}"
        elif record.ended is not None:
            found[rank] = f"rank {rank} has ended: {record.ended.removeprefix(f'Rank {rank}: ').rstrip('.')}"
        elif not sight.alive:
            ago = max(time.time() - record.at, 0.0)
            found[rank] = f"rank {rank} does not answer, last heard of {ago:.0f} s ago {record.place()}"
        elif axis and record.entered.get(axis, 0) < entered:
            found[rank] = f"rank {rank} has not entered it, it is {record.place()} for {record.since_s:.0f} s"
    found = found or second_hand
    words = list(found.values())
    more = f"; and so on for {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return "; ".join(words[:SHOWN]) + more, tuple(found)


def _lives(records: Sequence[Record]) -> bool:
    """Whether a rank wrote while it was looked at, or has said goodbye."""
    return (len(records) > 1 and records[-1].beat > records[0].beat) or (
        bool(records) and records[-1].ended is not None
    )


def _key(rank: int) -> str:
    return f"board/{rank}"
