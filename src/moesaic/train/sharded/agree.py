"""Work that all ranks of a group do together: it succeeds on all of them, or all raise the same sentence.

Without this a rank that fails alone leaves the others waiting for it until the time-out of a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from moesaic.errors import CheckpointError, MoesaicError
from moesaic.parallel.comm import Group

T = TypeVar("T")


def together(group: Group, what: str, work: Callable[[], T]) -> T:
    """What ``work`` returns here, once every rank has done its own. ``what`` names the step in figures and failures.

    Raises ``CheckpointError`` with the sentence of the first rank that failed, on every rank; alone, what ``work`` raises.
    """
    if group.size == 1:
        return work()
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:  # noqa: BLE001 - whatever it is, the others must hear of it
        failure = error
    said = group.values(None if failure is None else _sentence(failure), what=what)
    for rank, sentence in zip(group.ranks, said, strict=True):
        if sentence is not None:
            shared = CheckpointError(f"Rank {rank}: {sentence}")
            shared.told = rank != group.ranks[group.index]
            raise shared from failure
    return result


def first_says(group: Group, what: str, work: Callable[[], T]) -> T:
    """What ``work`` returns on the first rank of the group, on all of them; fails as ``together`` does."""
    mine = together(group, what, lambda: work() if group.index == 0 else None)
    result: T = group.values(mine, what=what)[0]
    return result


@contextmanager
def as_one(group: Group, what: str) -> Iterator[None]:
    """Around torch's own save or load, which gathers failures itself: raises as ``together`` does."""
    try:
        with group.watch.collective(what, group.axis, group.ranks, 0):
            yield
    except CheckpointException as error:
        rank = min(error.failures)
        cause = error.failures[rank][0]
        raise CheckpointError(f"Rank {group.ranks[rank]}: {_sentence(cause)}") from cause


def _sentence(error: BaseException) -> str:
    if isinstance(error, MoesaicError):
        return str(error)
    lines = str(error).splitlines()
    return f"{type(error).__name__}{': ' + lines[0] if lines else ''}"
