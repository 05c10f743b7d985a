"""A clock that cuts wall time into pieces, each belonging to one part of the model: the pieces always add up to the whole.

>>> clock = Clock()
>>> clock.start(("other", None))
>>> clock.enter(("attention", 0)); ...; clock.leave()
>>> lap = clock.stop()                # lap.seconds == sum(lap.parts.values())

Parts nest: time inside counts for the innermost. What code reports through ``ops/phases.py`` while a sparse layer is the
innermost part is taken out of that part and counted under the phase's own name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Direction = Literal["forward", "backward", "step"]
DISPATCH, EXPERTS = "dispatch", "experts"


class Place(NamedTuple):
    """A part, in the layer it belongs to (None: in none)."""

    part: str
    layer: int | None = None


class Slot(NamedTuple):
    """Where time is booked."""

    direction: Direction
    part: str
    layer: int | None


@dataclass(frozen=True)
class Lap:
    """What one step or one token took: seconds in all, and by slot. The profiler's own work is in neither, but in ``own``."""

    seconds: float
    parts: dict[Slot, float]
    own: float = 0.0

    def shared(self, among: int) -> Lap:
        """The same for one of ``among`` equal pieces."""
        return Lap(self.seconds / among, {slot: s / among for slot, s in self.parts.items()}, self.own / among)


class Clock:
    """The stack of parts, and the seconds each has had.

    Args:
        now: seconds; another clock in tests.
        wait: called before every reading, for devices that work behind the host's back.
        phases: seconds by phase, filled by ``ops.phases.listen``; None where they mean nothing (a GPU).
    """

    def __init__(
        self,
        now: Callable[[], float] = time.perf_counter,
        wait: Callable[[], None] = lambda: None,
        phases: Mapping[str, float] | None = None,
    ) -> None:
        self._now, self._wait = now, wait
        self._phases = {} if phases is None else phases
        self._seen: dict[str, float] = {}
        self._stack: list[Place] = []
        self._parts: dict[tuple[Direction, Place], float] = {}
        self._own = 0.0
        self._last = 0.0
        self.direction: Direction = "step"

    @property
    def running(self) -> bool:
        """Whether there is anything to book time on."""
        return bool(self._stack)

    def start(self, place: Place) -> None:
        """Begin, with ``place`` for all time that no part claims."""
        self._stack, self._parts, self._own, self.direction = [place], {}, 0.0, "step"
        self._seen = dict(self._phases)
        self._wait()
        self._last = self._now()

    def enter(self, place: Place) -> None:
        """Time belongs to ``place`` until ``leave``."""
        self._cut()
        self._stack.append(place)

    def leave(self) -> None:
        """Back to the part around this one."""
        self._cut()
        self._stack.pop()

    def change(self, place: Place, direction: Direction) -> None:
        """Time belongs to ``place`` from now on, in place of the innermost part."""
        self._cut()
        self._stack[-1] = place
        self.direction = direction

    def restart(self, place: Place) -> Lap:
        """The lap so far; a new one begins, with nothing entered."""
        lap = self.stop()
        self.start(place)
        return lap

    def stop(self) -> Lap:
        """The lap so far; the clock stands until ``start``."""
        self._cut()
        self._stack = []
        parts = {Slot(direction, *place): seconds for (direction, place), seconds in self._parts.items()}
        return Lap(sum(parts.values()), parts, self._own)

    def aside(self, work: Callable[[], None]) -> None:
        """Do the profiler's own work, outside all parts."""
        self._cut()
        work()
        end = self._now()
        self._own += end - self._last
        self._last = end

    def _cut(self) -> None:
        """Book the time since the last cut on the innermost part, less what phases report of it."""
        self._wait()
        now = self._now()
        spent, self._last = now - self._last, now
        place = self._stack[-1]
        if self._seen != self._phases:
            new = {name: seconds - self._seen.get(name, 0.0) for name, seconds in self._phases.items()}
            self._seen = dict(self._phases)
            reported = sum(new.values())
            if place.part in (DISPATCH, EXPERTS) and reported > 0:
                # Clocks of several threads may add up to a little more than passed here; nothing may be counted twice.
                scale = min(1.0, spent / reported)
                for name, seconds in new.items():
                    if not seconds:  # reported earlier, by another part
                        continue
                    self._book(Place(name, place.layer), seconds * scale)
                spent -= reported * scale
        self._book(place, spent)

    def _book(self, place: Place, seconds: float) -> None:
        key = (self.direction, place)
        self._parts[key] = self._parts.get(key, 0.0) + seconds
