"""Shards -> documents: which of them are for training, and a look at the beginning of many shards."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import NamedTuple

from moesaic.data.config import DataConfig
from moesaic.data.formats import START, Place, Reading, Row, read_file
from moesaic.data.readers import unwanted
from moesaic.data.stream.lanes import Stripe, hash_order
from moesaic.data.stream.patient import Patience
from moesaic.data.stream.shards import Shard
from moesaic.errors import DataError, nearest

_TURN = 8  # documents of one shard before the next shard's turn
_AT_ONCE = 16  # shards that take turns


class Text(NamedTuple):
    """A document: its text, the index of its label, and where the record after it begins in its shard."""

    text: str
    label: int
    after: Place


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document is for validation: about ``fraction`` of different texts, the same ones always."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


@dataclass
class Skipped:
    """Counts broken records that were left out, and says so at 1, 10, 100, ... of them."""

    patience: Patience
    count: int = 0

    def add(self, problem: DataError) -> None:
        """One more."""
        self.count += 1
        if str(self.count).strip("0") == "1":
            self.patience.say(f"Broken records left out so far: {self.count:,}. The last one: {problem}")


@dataclass(frozen=True)
class Texts:
    """The documents of ``shards``, read as ``config`` says; blank ones are left out."""

    config: DataConfig
    shards: tuple[Shard, ...]
    patience: Patience = field(default_factory=Patience)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The domains, sorted."""
        return tuple(sorted(set(self.config.labels or (shard.label for shard in self.shards))))

    def read(
        self, stripe: Stripe, start: Place = START, held_out: bool = False, skipped: Skipped | None = None
    ) -> Iterator[Text]:
        """The documents of a stripe from ``start`` on, in the order of the file: those to train on, or those held out.

        Broken records are given to ``skipped`` where ``on_error`` is "skip". Raises ``DataError`` otherwise, and for a
        shard that is gone, changed or out of reach.
        """
        config, shard, labels = self.config, self.shards[stripe.shard], self.labels
        how = Reading(config.text_field, config.label_field, config.document, stripe.part, stripe.parts)
        for found in read_file(shard.name, lambda: shard.open(self.patience), how, start):
            row = self._known(found) if isinstance(found, Row) else found
            if isinstance(row, DataError):
                if config.on_error == "raise":
                    raise unwanted(row)
                if skipped is not None:
                    skipped.add(row)
            elif row.text.strip() and is_held_out(row.text, config.val_fraction) == held_out:
                yield Text(row.text, labels.index(row.label or shard.label), row.after)

    def _known(self, row: Row) -> Row | DataError:
        if row.label is None or row.label in self.labels:
            return row
        return DataError(
            f'{row.where}: the label "{row.label}" is not in data.labels ({", ".join(self.labels)}).'
            f"{nearest(row.label, self.labels)}"
        )

    def spread(self, held_out: bool) -> Iterator[Text]:
        """The documents of all shards, each once, a few shards by turns, the domains as evenly as they go.

        For what needs a fair sample before anything is trained; the same for every seed.
        """
        order = hash_order(len(self.shards), "spread")
        seen: Counter[str] = Counter()
        turn = {n: seen.update([self.shards[n].label]) or seen[self.shards[n].label] for n in order}
        waiting = iter(sorted(order, key=turn.__getitem__))  # the first shard of every label before any second one
        reading = [self.read(Stripe(n, 0, 1), held_out=held_out) for n in islice(waiting, _AT_ONCE)]
        try:
            while reading:
                going = []
                for texts in reading:
                    taken = list(islice(texts, _TURN))
                    yield from taken
                    if len(taken) == _TURN:
                        going.append(texts)
                    else:
                        going += [self.read(Stripe(n, 0, 1), held_out=held_out) for n in islice(waiting, 1)]
                reading = going
        finally:
            for texts in reading:
                texts.close()  # type: ignore[attr-defined]
