"""Steps of rows from lanes, read ahead in a thread, resumed from the lanes' positions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from moesaic.data.feed import check_part
from moesaic.data.packing import Batch, pack_batch
from moesaic.data.stream.ahead import Ahead
from moesaic.data.stream.lane import Lane, LaneRow
from moesaic.data.stream.lanes import Cursor, Lanes, Places
from moesaic.data.stream.texts import Skipped, Texts
from moesaic.errors import CheckpointError, ConfigError, DataError


class _Step(NamedTuple):
    batches: list[Batch]
    cursors: dict[int, Cursor]  # of the lanes that were read


class StreamFeed:
    """The feed (see ``data.feed``) of text read while training.

    One part knows its own lanes as far as it read them, and the others as far as it was told. That is enough: each cursor
    counts its rows, and whoever needs a later row reads up to it.
    """

    def __init__(
        self, texts: Texts, tokenizer: Tokenizer, seq_len: int, batch_size: int, accumulate: int, seed: int
    ) -> None:
        if seq_len < 1:
            raise ConfigError(f"seq_len is {seq_len}, but a row needs at least 1 position.")
        if batch_size < 1 or accumulate < 1:
            raise ConfigError(f"batch_size ({batch_size}) and accumulate ({accumulate}) must both be at least 1.")
        lanes = min(texts.config.lanes, batch_size)
        self._places = Places(batch_size, accumulate, lanes)
        self._dealt = Lanes(len(texts.shards), lanes, seed)
        self._texts, self._tokenizer, self._seq_len = texts, tokenizer, seq_len
        self._skipped = Skipped(texts.patience)
        self._steps = 0
        self._cursors = dict.fromkeys(range(lanes), Cursor())
        self._share = (0, 1)
        self._reader: _Reader | None = None
        self._ahead: Ahead[_Step] | None = None

    def next_step(self, part: int = 0, parts: int = 1) -> list[Batch]:
        """See ``Feed``."""
        check_part(part, parts)
        if (part, parts) != self._share:
            self.close()
            self._share = (part, parts)
        if self._reader is None:
            self._reader = _Reader(
                self._open_lane, self._places, self._share, self._seq_len, self._steps, self._cursors
            )
            if self._texts.config.prefetch:
                self._ahead = Ahead(self._reader.step, self._texts.config.prefetch)
        try:
            step = self._ahead.next() if self._ahead is not None else self._reader.step()
        except BaseException:
            self.close()  # a further call begins again at this step
            raise
        self._steps += 1
        self._cursors |= step.cursors
        return step.batches

    def progress(self) -> dict[str, Any]:
        """See ``Feed``. "lanes" holds the fields of each lane's ``Cursor``, "shards" a hash of their sizes and stamps."""
        identity = json.dumps([[shard.size, shard.stamp] for shard in self._texts.shards])
        return {
            "steps": self._steps,
            "lanes": [list(self._cursors[lane]) for lane in range(self._dealt.lanes)],
            "shards": hashlib.sha256(identity.encode()).hexdigest()[:16],
        }

    def state_dict(self, progress: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """See ``Feed``. Of each lane the furthest cursor; "shards" holds name, size and stamp of each."""
        own = self.progress()
        for one in progress:
            if one["steps"] != own["steps"]:
                raise DataError(
                    f"The processes are at different steps of the stream: {own['steps']} and {one['steps']}."
                )
            if one["shards"] != own["shards"]:
                raise DataError("The processes see different shards; make the same files visible to all of them.")
        known = zip(own["lanes"], *(one["lanes"] for one in progress), strict=True)
        return {
            "steps": self._steps,
            "lanes": [max(cursors, key=lambda cursor: cursor[0]) for cursors in known],
            "shards": [[shard.name, shard.size, shard.stamp] for shard in self._texts.shards],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Feed``."""
        steps, lanes, shards = state.get("steps"), state.get("lanes"), state.get("shards")
        if not (_is_count(steps) and _are_cursors(lanes) and _are_stamps(shards)):
            raise CheckpointError("The checkpoint's position in the text is not that of a stream (data.stream=true).")
        assert isinstance(lanes, list) and isinstance(shards, list) and isinstance(steps, int)
        if len(lanes) != self._dealt.lanes:
            raise CheckpointError(
                f"The checkpoint's stream has {len(lanes)} lanes, but data.lanes and batch_size now make {self._dealt.lanes}."
            )
        cursors = {n: Cursor(*lane) for n, lane in enumerate(lanes)}
        for n, cursor in cursors.items():
            if cursor.row > self._places.rows_at(steps, n):
                raise CheckpointError(f"The checkpoint's stream is damaged: lane {n} is ahead of its {steps} steps.")
        now = [[shard.name, shard.size, shard.stamp] for shard in self._texts.shards]
        self._compare(shards, now)
        self.close()
        self._steps, self._cursors = steps, cursors

    def close(self) -> None:
        """See ``Feed``."""
        reader, ahead, self._reader, self._ahead = self._reader, self._ahead, None, None
        # Files that a hanging thread is reading cannot be closed; they end with it.
        if reader is not None and (ahead is None or ahead.close()):
            reader.close()

    def _open_lane(self, number: int, cursor: Cursor) -> Lane:
        return Lane(number, self._dealt, self._texts, self._tokenizer, self._seq_len, cursor, self._skipped)

    def _compare(self, before: list[Any], now: list[Any]) -> None:
        """Raise ``DataError`` unless both lists name the same content in the same order, wherever it lies."""
        again = "Restore it and resume, or start a new run."
        if len(before) != len(now):
            old, new = ({str(name).rsplit("/", 1)[-1] for name, *_ in shards} for shards in (before, now))
            different = sorted(old ^ new)
            named = f" ({'gone' if different[0] in old else 'new'}: {different[0]})" if different else ""
            raise DataError(
                f"The stream has {len(now):,} shards, but the checkpoint counts {len(before):,}{named}. Their list may not "
                f"change in a run. {again}"
            )
        for (old_name, old_size, old_stamp), (name, size, stamp) in zip(before, now, strict=True):
            if old_size != size:
                raise DataError(
                    f"{name} has {size:,} bytes, but the checkpoint knows {old_name} with {old_size:,}. {again}"
                )
            if old_stamp != stamp:
                raise DataError(f"{name} is not what the checkpoint knows as {old_name}: its content changed. {again}")


class _Reader:
    """Makes the steps of one part, one after the other; nobody else touches the lanes."""

    def __init__(
        self,
        open_lane: Callable[[int, Cursor], Lane],
        places: Places,
        share: tuple[int, int],
        seq_len: int,
        steps: int,
        cursors: Mapping[int, Cursor],
    ) -> None:
        self._open_lane, self._places, self._seq_len = open_lane, places, seq_len
        part, parts = share
        self._rows = [int(row) for row in np.array_split(np.arange(places.batch_size), parts)[part]]
        self._steps, self._cursors = steps, dict(cursors)
        self._lanes: dict[int, Lane] = {}

    def step(self) -> _Step:
        """The next one."""
        batches = [
            self._batch([self._read(*self._places.locate(self._steps, micro, row)) for row in self._rows])
            for micro in range(self._places.accumulate)
        ]
        self._steps += 1
        return _Step(batches, {number: lane.cursor for number, lane in self._lanes.items()})

    def close(self) -> None:
        """Close the lanes' files."""
        for lane in self._lanes.values():
            lane.close()

    def _read(self, lane: int, row: int) -> LaneRow:
        if lane not in self._lanes:
            self._lanes[lane] = self._open_lane(lane, self._cursors[lane])
        return self._lanes[lane].row(row)

    def _batch(self, rows: Sequence[LaneRow]) -> Batch:
        if not rows:
            nothing = np.zeros((0, self._seq_len + 1), dtype=np.int64)
            return pack_batch(nothing, nothing, nothing[:, 1:], nothing.astype(bool))
        id_BS1, document_BS1, label_BS1 = (np.stack(columns) for columns in zip(*rows, strict=True))
        return pack_batch(id_BS1, document_BS1, label_BS1[:, :-1].copy(), np.ones(id_BS1.shape, dtype=bool))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_cursors(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, list | tuple) and len(one) == len(Cursor._fields) and all(map(_is_count, one)) for one in value
    )


def _are_stamps(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, list | tuple)
        and len(one) == 3
        and isinstance(one[0], str)
        and _is_count(one[1])
        and isinstance(one[2], str)
        for one in value
    )
