"""What this process is doing in which collective: bytes and seconds of each kind, and failures turned into words."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from moesaic.errors import MoesaicError


class CollectiveError(MoesaicError):
    """A collective that failed or took too long; the message names rank, layer and collective."""


@dataclass
class Spent:
    """Calls, bytes sent to other ranks and seconds of one kind of collective."""

    calls: int = 0
    sent_bytes: int = 0
    seconds: float = 0.0


class Watch:
    """Every collective of a process passes through ``collective``.

    Attributes:
        rank: of this process. layer: where the model is ("layer 3"), set by hooks. spent: by name, since ``take``.
    """

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.layer = ""
        self.spent: dict[str, Spent] = {}

    @contextmanager
    def collective(self, what: str, axis: str, ranks: tuple[int, ...], sent_bytes: int) -> Iterator[None]:
        """Around one collective: counts it; a failure becomes ``CollectiveError``."""
        started = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            where = f" in {self.layer}" if self.layer else ""
            raise CollectiveError(
                f"Rank {self.rank}: {what} over {axis} with ranks {', '.join(map(str, ranks))} failed{where}: "
                f"{str(error).splitlines()[0]}"
            ) from error
        spent = self.spent.setdefault(what, Spent())
        spent.calls += 1
        spent.sent_bytes += sent_bytes
        spent.seconds += time.perf_counter() - started

    def take(self) -> dict[str, Spent]:
        """What was spent since the last call."""
        spent, self.spent = self.spent, {}
        return spent
