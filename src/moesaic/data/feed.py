"""What a training run eats: the batches of each optimiser step, wherever the text comes from.

    feed = corpus.feed(seq_len=256, batch_size=16, accumulate=2, seed=0)
    for batch in feed.next_step(part=0, parts=1):       # 2 micro-batches of 16 rows
        ...
    saved = feed.state_dict()                           # plain JSON; another feed goes on from it exactly

The rows of a step are drawn for all processes together: micro-batch m is its rows [m * batch_size, (m + 1) * batch_size).
Of each micro-batch a process that is part r of n takes its consecutive share, as ``Tensor.tensor_split`` cuts it, so which
rows a step holds, and in which order, never depends on the number of processes. ``RowFeed`` feeds from text in memory,
``data.stream`` from shards read as they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from moesaic.data.packing import Batch, PackedRows, RowSampler
from moesaic.errors import ConfigError, DataError


class Feed(Protocol):
    """An endless sequence of steps, resumed exactly from its state."""

    def next_step(self, part: int = 0, parts: int = 1) -> list[Batch]:
        """The micro-batches of the next step, on the CPU; of each only the share of ``part`` among ``parts``.

        A share is empty where there are more parts than rows. Raises ``DataError`` in words where text cannot be read.
        """

    def progress(self) -> dict[str, Any]:
        """How far this part has read: a little plain JSON data."""

    def state_dict(self, progress: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """Plain JSON data: all that is needed beside the settings to go on after the last step that was handed out.

        ``progress`` is that of all parts. Without the others' a state is as exact, but going on from it reads again what only
        they had read. Raises ``DataError`` if they disagree.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after ``state``, whatever the number of parts that saved it.

        Raises ``CheckpointError`` if it is no state of such a feed, ``DataError`` if the text is not the same any more.
        """

    def close(self) -> None:
        """Stop reading ahead and close files. The feed may be used again afterwards."""


class RowFeed:
    """The feed of text in memory: every epoch a fresh permutation of ``rows`` (see ``RowSampler``).

    >>> RowFeed(PackedRows(view, 256), batch_size=16, accumulate=2, seed=0).next_step()
    """

    def __init__(self, rows: PackedRows, batch_size: int, accumulate: int, seed: int) -> None:
        self.rows = rows
        self._batch_size = batch_size
        self._sampler = RowSampler(len(rows), batch_size * accumulate, seed)

    def next_step(self, part: int = 0, parts: int = 1) -> list[Batch]:
        """See ``Feed``."""
        check_part(part, parts)
        # The sampler draws the whole step, so that its state is one number; rows are read for this part alone.
        return [
            self.rows.batch(micro_B.tensor_split(parts)[part])
            for micro_B in self._sampler.next().split(self._batch_size)
        ]

    def progress(self) -> dict[str, Any]:
        """See ``Feed``: how many rows have been drawn, by all parts alike."""
        return self._sampler.state_dict()

    def state_dict(self, progress: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """See ``Feed``."""
        own = self.progress()
        if any(one != own for one in progress):
            raise DataError(f"The processes drew different numbers of rows: {', '.join(map(str, progress))}.")
        return own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Feed``."""
        self._sampler.load_state_dict(state)

    def close(self) -> None:
        """See ``Feed``; there is nothing to close."""


def check_part(part: int, parts: int) -> None:
    """Raise ``ConfigError`` unless ``part`` is one of ``parts``."""
    if not 0 <= part < parts:
        raise ConfigError(f"part is {part}, but it must lie in 0..{parts - 1} (parts {parts}).")
