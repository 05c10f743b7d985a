"""Who reads what: shards dealt to lanes, lanes to rows, as pure functions of numbers.

>>> dealt = Lanes(shards=3, lanes=4, seed=0)
>>> dealt.stripes(lane=1, epoch=0)            # what lane 1 reads in epoch 0, in order
[Stripe(shard=0, part=1, parts=2)]
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from moesaic.data.formats import Place


class Stripe(NamedTuple):
    """The documents of a shard whose number in the file is ``part`` modulo ``parts``."""

    shard: int
    part: int
    parts: int


class Cursor(NamedTuple):
    """Where a lane stands: before row ``row``, whose first token is number ``token`` of a document.

    The document is number ``document`` (in drawn order) of the window that begins at record ``record`` (byte ``offset``, line
    ``line``) of the lane's stripe number ``stripe`` of ``epoch``.
    """

    row: int = 0
    epoch: int = 0
    stripe: int = 0
    record: int = 0
    offset: int = 0
    line: int = 0
    document: int = 0
    token: int = 0

    @property
    def place(self) -> Place:
        """The beginning of the window."""
        return Place(self.record, self.offset, self.line)


def hash_order(size: int, *key: int | str) -> tuple[int, ...]:
    """A permutation of ``range(size)`` drawn by ``key``: the same with every version of every library."""
    return tuple(sorted(range(size), key=lambda i: hashlib.sha256(f"{key}/{i}".encode()).digest()))


@lru_cache(maxsize=4)
def _dealt(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    return hash_order(size, "shards", seed, epoch)


@dataclass(frozen=True)
class Lanes:
    """``shards`` dealt to ``lanes``, anew in every epoch."""

    shards: int
    lanes: int
    seed: int

    @property
    def parts(self) -> int:
        """Stripes of each shard, so that every lane has at least one."""
        return -(-self.lanes // self.shards)

    def stripes(self, lane: int, epoch: int) -> list[Stripe]:
        """What ``lane`` reads in ``epoch``, in this order; never empty."""
        order = _dealt(self.shards * self.parts, self.seed, epoch)
        return [Stripe(n // self.parts, n % self.parts, self.parts) for n in order[lane :: self.lanes]]


@dataclass(frozen=True)
class Places:
    """Rows of steps of ``accumulate`` micro-batches of ``batch_size`` rows, mapped to rows of ``lanes``, at most as many."""

    batch_size: int
    accumulate: int
    lanes: int

    def locate(self, step: int, micro: int, row: int) -> tuple[int, int]:
        """(lane, which of its rows) of row ``row`` of micro-batch ``micro`` of step ``step``, all counted from 0."""
        lane = row * self.lanes // self.batch_size
        first, end = self._first(lane), self._first(lane + 1)
        return lane, (step * self.accumulate + micro) * (end - first) + row - first

    def rows_at(self, step: int, lane: int) -> int:
        """How many rows of ``lane`` the steps before ``step`` hold."""
        return step * self.accumulate * (self._first(lane + 1) - self._first(lane))

    def _first(self, lane: int) -> int:
        return -(-lane * self.batch_size // self.lanes)
